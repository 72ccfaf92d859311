//! Whimbrel: one binary. `whimbrel agent` is the daemon of a host; every other command talks to it.
//!
//! ```text
//! cli ──(HTTP/JSON on a unix socket)──► agent ──► host (effects) ──► engine (decisions) ──► wire (bytes)
//! ```
//!
//! Not here: anything that decides or does; see `ARCHITECTURE.md`.

#![forbid(unsafe_code)]

mod agent;
mod cli;
mod config;

use std::process::ExitCode;

use clap::Parser as _;
use whimbrel_wire::{ErrorKind, WireError};

fn main() -> ExitCode {
    let cli = match cli::Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            let _ = error.print();
            // 2 for wrong usage, 0 for --help and --version.
            return ExitCode::from(if error.use_stderr() { 2 } else { 0 });
        }
    };
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("error: start the runtime: {error}");
            return ExitCode::FAILURE;
        }
    };
    let result = match cli.command {
        cli::Command::Agent { config } => runtime.block_on(agent::run(config.as_deref())),
        _ => runtime.block_on(cli::run(cli)),
    };
    // Blocking reads (a terminal, a store that hangs) must not keep the process.
    runtime.shutdown_background();
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => report(&error),
    }
}

fn report(error: &anyhow::Error) -> ExitCode {
    let wire = error.chain().find_map(|cause| cause.downcast_ref::<WireError>().cloned()).or_else(|| {
        error
            .chain()
            .find_map(|cause| cause.downcast_ref::<whimbrel_host::Error>().map(whimbrel_host::Error::to_wire))
    });
    eprintln!("error: {}", wire.as_ref().map_or_else(|| format!("{error:#}"), |wire| wire.message.clone()));
    if let Some(hint) = wire.as_ref().and_then(|wire| wire.hint.as_ref()) {
        eprintln!("hint: {hint}");
    }
    ExitCode::from(wire.map_or(ErrorKind::Internal, |wire| wire.kind).exit_status())
}
