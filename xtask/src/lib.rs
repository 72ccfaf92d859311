//! Everything around the product: `cargo xtask demo | test | bench | tidy | guest | qemu`.
//!
//! ```text
//!   main.rs ─ command line
//!     ├─ demo.rs   the product's main job, shown          ├─ check.rs  `test`: everything CI wants; tidy.rs
//!     ├─ e2e.rs    scenarios on real agents               └─ bench/    peers and us, side by side
//!     │      └─ flight.rs  one VM through its moves ─ beat.rs, status.rs, tcp.rs listen to it
//!     ├─ lab.rs    several hosts on one machine           ├─ qemu.rs   two QEMU versions under target/
//!     ├─ guest.rs  guest images                           ├─ install.rs  Debian packages, by purpose
//!     └─ apt.rs, cmd.rs, paths.rs  the machine underneath
//! ```
//!
//! Invariant: xtask does not depend on the product's crates. It builds in seconds on a machine that has only
//! Rust and gcc, and it drives the product as people do: over its command line.
//!
//! Not here: anything that ships.

pub mod apt;
pub mod beat;
pub mod bench;
pub mod check;
pub mod cmd;
pub mod cpu;
pub mod demo;
pub mod e2e;
pub mod flight;
pub mod fuzz;
pub mod guest;
pub mod install;
pub mod lab;
pub mod paths;
pub mod qemu;
pub mod qmp;
pub mod status;
pub mod tcp;
pub mod tidy;
