//! The command line of `cargo xtask`.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};
use xtask::qemu::Version;
use xtask::{beat, bench, check, demo, e2e, fuzz, guest, install, tidy};

/// Demo, test, bench, tidy and guest images.
#[derive(Parser)]
#[command(name = "cargo xtask")]
struct Cli {
    #[command(subcommand)]
    command: Cmd,
}

#[derive(Subcommand)]
enum Cmd {
    /// Publishes an image, boots a real VM from it on one host, and moves it live to another.
    Demo {
        /// Print one JSON object as the last line.
        #[arg(long)]
        json: bool,
        /// Use this disk image instead of a Debian made for it.
        #[arg(long, value_name = "FILE")]
        image: Option<PathBuf>,
        /// Leave both hosts up.
        #[arg(long)]
        keep: bool,
        /// Never install packages.
        #[arg(long)]
        no_install: bool,
        /// 7.2 or 10.0
        #[arg(long)]
        qemu: Option<Version>,
    },
    /// Everything continuous integration wants to hold.
    Test {
        /// Soaks and long fuzzing too.
        #[arg(long)]
        long: bool,
        /// Never install packages.
        #[arg(long)]
        no_install: bool,
    },
    /// End-to-end scenarios on two real agents.
    E2e {
        /// 7.2 or 10.0
        #[arg(long, default_value = "10.0")]
        qemu: Version,
        /// The product's program; built if not given.
        #[arg(long)]
        program: Option<PathBuf>,
        /// More rounds.
        #[arg(long)]
        long: bool,
        /// Leave out scenarios whose name contains this.
        #[arg(long)]
        without: Vec<String>,
        /// Only scenarios whose name contains one of these.
        only: Vec<String>,
    },
    /// Peers and Whimbrel side by side.
    Bench {
        /// Which bench: block, migrate
        name: String,
        /// Fewer runs.
        #[arg(long)]
        quick: bool,
        /// Only these cells.
        #[arg(long, value_delimiter = ',')]
        cells: Vec<String>,
        /// Never install packages.
        #[arg(long)]
        no_install: bool,
        /// Only one side, while working on it.
        #[arg(long)]
        only: Option<bench::Side>,
    },
    /// Fuzzes decoders, with coverage; the corpus stays under target/fuzz.
    Fuzz {
        /// Per target.
        #[arg(long, default_value_t = fuzz::SECONDS)]
        seconds: u64,
        /// Only targets whose name contains this.
        #[arg(default_value = "")]
        only: String,
    },
    /// House rules that no compiler checks.
    Tidy {
        /// Write docs/cli.md from the program's help.
        #[arg(long)]
        write_cli: bool,
    },
    /// Makes the QEMU versions under test ready and prints their directories.
    Qemu,
    /// Listens to the beat of a guest on the sockets of its QEMUs and prints a line of JSON every second.
    Beat {
        /// Unix sockets of the ports called whimbrel.beat; they may appear later.
        #[arg(required = true)]
        sockets: Vec<PathBuf>,
        /// How long to listen.
        #[arg(long, default_value_t = 10)]
        seconds: u64,
    },
    /// Builds the guest images and prints their paths.
    Guest {
        /// The Debian image too (half a minute, needs root).
        #[arg(long)]
        debian: bool,
    },
}

fn main() -> ExitCode {
    match dispatch(&Cli::parse().command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("error: {e:#}");
            if e.is::<install::Missing>() {
                ExitCode::from(install::MISSING_STATUS)
            } else {
                ExitCode::FAILURE
            }
        }
    }
}

fn dispatch(command: &Cmd) -> Result<()> {
    match command {
        Cmd::Demo { json, image, keep, no_install, qemu } => demo::run(&demo::Options {
            json: *json,
            image: image.clone(),
            keep: *keep,
            no_install: *no_install,
            qemu: *qemu,
        })?,
        Cmd::Test { long, no_install } => {
            check::run_all(&check::Options { long: *long, no_install: *no_install })?;
        }
        Cmd::E2e { qemu, program, long, without, only } => e2e::run(&e2e::Options {
            qemu: *qemu,
            program: program.clone(),
            only: only.clone(),
            without: without.clone(),
            long: *long,
        })?,
        Cmd::Bench { name, quick, cells, no_install, only } => bench::run(&bench::Options {
            name: name.clone(),
            quick: *quick,
            cells: cells.clone(),
            no_install: *no_install,
            only: *only,
        })?,
        Cmd::Fuzz { seconds, only } => fuzz::run_for(*seconds, only)?,
        Cmd::Tidy { write_cli: true } => tidy::cli_docs(&check::build(false)?, true)?,
        Cmd::Tidy { write_cli: false } => tidy::run()?,
        Cmd::Qemu => {
            for q in xtask::qemu::ensure_all()? {
                println!("{} {}", q.version.name(), q.bin.display());
            }
        }
        Cmd::Beat { sockets, seconds } => {
            let receiver = beat::Receiver::on(sockets);
            for _ in 0..*seconds {
                std::thread::sleep(std::time::Duration::from_secs(1));
                println!("{}", receiver.report().json());
            }
        }
        Cmd::Guest { debian } => {
            install::ensure(&[install::Purpose::Run], false)?;
            let image = guest::tiny()?;
            println!("kernel {}", image.kernel.display());
            println!("initrd {}", image.initrd.display());
            println!("tiny {}", image.disk.display());
            if *debian {
                println!("debian {}", guest::debian()?.disk.display());
            }
        }
    }
    Ok(())
}
