//! The command line of `cargo xtask`.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};
use xtask::{beat, guest, install};

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
