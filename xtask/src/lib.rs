//! Everything around the product: `cargo xtask demo | test | bench | tidy | guest | qemu`.
//!
//! ```text
//!   main.rs ─ command line
//!     ├─ install.rs  Debian packages, by purpose           ├─ qemu.rs   two QEMU versions under target/
//!     └─ apt.rs, cmd.rs, paths.rs  the machine underneath
//! ```
//!
//! Invariant: xtask does not depend on the product's crates. It builds in seconds on a machine that has only
//! Rust and gcc, and it drives the product as people do: over its command line.
//!
//! Not here: anything that ships.

pub mod apt;
pub mod beat;
pub mod cmd;
pub mod guest;
pub mod install;
pub mod lab;
pub mod paths;
pub mod qemu;
pub mod status;
