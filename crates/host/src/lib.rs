//! Every effect of Whimbrel: sockets, files, clocks, threads, processes, and all of the unsafe code.
//!
//! ```text
//! link/      TLS 1.3 between hosts: calls and streams          cluster/  certificates, tokens, joining
//! meta/      the metadata store: SQLite, served, etcd          store/    images: publish, cache, read, scrub
//! disk/      layers and volumes                                export/   vhost-user-blk, NBD
//! guest/     QEMU: start, QMP, inject, dirty pages, streams    memory/   RAM on its way between hosts
//! migrate/   carries out the handover                          task.rs   long work: progress, cancel
//! vhdx/      Hyper-V's disk files, read and written
//! ```
//!
//! Decisions are made in `whimbrel-engine`; this crate carries them out and reports what happened.
//!
//! Not here: configuration, HTTP, the command line (`whimbrel`).

pub mod block_dev;
mod blocking;
pub mod clock;
pub mod cluster;
pub mod codec;
pub mod disk;
pub mod durable;
pub mod error;
pub mod export;
pub mod failpoint;
pub mod guest;
pub mod link;
pub mod memory;
pub mod meta;
pub mod metrics;
pub mod migrate;
pub mod records;
pub mod store;
pub mod task;
pub mod vhdx;
pub mod vm;
pub mod volume;

pub use error::{Context, Error, ErrorKind, Result};
