//! The command line: one definition of every command, turned into calls of the agent's API.
//!
//! Charter: parse, call, print. The commands know `wire` types only; nothing here opens an image, a socket of a
//! guest or the metadata store.
//!
//! Invariants: results go to standard output, messages to standard error; with `--output json` standard output
//! is exactly one JSON document; the exit status follows from the error's kind ([`whimbrel_wire::ErrorKind`]).
//!
//! Not here: the agent ([`crate::agent`]).

pub mod client;
pub mod cluster;
pub mod image;
pub mod show;
pub mod task;
pub mod vm;
pub mod volume;

use std::path::PathBuf;

use clap::{Parser, Subcommand, ValueEnum};

use crate::config;

/// Moves virtual machines, their images, disks, memory and addresses between hosts while they run.
#[derive(Debug, Parser)]
#[command(name = "whimbrel", version, max_term_width = 110)]
pub struct Cli {
    /// The agent's socket.
    #[arg(long, global = true, env = "WHIMBREL_SOCKET", default_value = config::SOCKET_DEFAULT, value_name = "PATH")]
    pub socket: PathBuf,
    /// How results are printed.
    #[arg(long, global = true, value_enum, default_value_t = Output::Text, value_name = "FORMAT")]
    pub output: Output,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// How results are printed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Output {
    /// Tables for people.
    Text,
    /// One JSON document.
    Json,
}

/// The subjects.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run the host agent in the foreground.
    Agent {
        /// Configuration; every key has a default.
        #[arg(long, value_name = "FILE", env = "WHIMBREL_CONFIG")]
        config: Option<PathBuf>,
    },
    /// Make a cluster, and tokens to join it.
    #[command(subcommand)]
    Cluster(cluster::ClusterCommand),
    /// Join a cluster, and look after its hosts.
    #[command(subcommand)]
    Host(cluster::HostCommand),
    /// Publish disk images and look at them.
    #[command(subcommand)]
    Image(image::ImageCommand),
    /// Make volumes, check them, show them to programs.
    #[command(subcommand)]
    Volume(volume::VolumeCommand),
    /// Run virtual machines and move them.
    #[command(subcommand)]
    Vm(vm::VmCommand),
    /// Watch and cancel long work.
    #[command(subcommand)]
    Task(task::TaskCommand),
    /// The connections to other hosts.
    #[command(subcommand)]
    Link(cluster::LinkCommand),
    /// The effective configuration.
    #[command(subcommand)]
    Config(ConfigCommand),
}

/// `whimbrel config …`
#[derive(Debug, Subcommand)]
pub enum ConfigCommand {
    /// Print every key with its value.
    Show {
        /// The file to read.
        #[arg(long, value_name = "FILE", env = "WHIMBREL_CONFIG")]
        config: Option<PathBuf>,
    },
}

/// Carries out a command other than `agent`.
pub async fn run(cli: Cli) -> anyhow::Result<()> {
    let context = Context { client: client::Client::new(cli.socket.clone()), output: cli.output };
    match cli.command {
        Command::Agent { .. } => Ok(()),
        Command::Cluster(command) => cluster::run_cluster(&context, command).await,
        Command::Host(command) => cluster::run_host(&context, command).await,
        Command::Link(command) => cluster::run_link(&context, command).await,
        Command::Image(command) => image::run(&context, command).await,
        Command::Volume(command) => volume::run(&context, command).await,
        Command::Vm(command) => vm::run(&context, command).await,
        Command::Task(command) => task::run(&context, command).await,
        Command::Config(ConfigCommand::Show { config }) => {
            print!("{}", toml::to_string_pretty(&config::Config::load(config.as_deref())?)?);
            Ok(())
        }
    }
}

/// What every command needs.
pub struct Context {
    /// The agent.
    pub client: client::Client,
    /// How to print.
    pub output: Output,
}

impl Context {
    /// Prints `value`: as JSON, or as the lines that `text` makes of it.
    pub fn print<T: serde::Serialize>(
        &self,
        value: &T,
        text: impl FnOnce(&T) -> String,
    ) -> anyhow::Result<()> {
        match self.output {
            Output::Json => println!("{}", serde_json::to_string(value)?),
            Output::Text => {
                let lines = text(value);
                if !lines.is_empty() {
                    println!("{}", lines.trim_end());
                }
            }
        }
        Ok(())
    }
}
