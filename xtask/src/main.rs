//! The command line of `cargo xtask`.

use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};

/// Demo, test, bench, tidy and guest images.
#[derive(Parser)]
#[command(name = "cargo xtask")]
struct Cli {
    #[command(subcommand)]
    command: Cmd,
}

#[derive(Subcommand)]
enum Cmd {
    /// Makes the QEMU versions under test ready and prints their directories.
    Qemu,
}

fn main() -> ExitCode {
    match dispatch(&Cli::parse().command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("error: {e:#}");
            ExitCode::FAILURE
        }
    }
}

fn dispatch(command: &Cmd) -> Result<()> {
    match command {
        Cmd::Qemu => {
            for q in xtask::qemu::ensure_all()? {
                println!("{} {}", q.version.name(), q.bin.display());
            }
        }
    }
    Ok(())
}
