//! Every byte that leaves a Whimbrel process, and the nouns the other layers share.
//!
//! Charter: definitions only. Peer messages ([`peer`]), on-disk records ([`record`]), metadata records
//! ([`meta`]), the NBD protocol ([`nbd`]), the HTTP API's types ([`api`]), and the identifiers they are made of. No I/O
//! and no decisions.
//!
//! Glossary
//! * *Host*: one agent with a certificate; named by [`HostId`].
//! * *Object*: anything that moves as blocks: an image, a layer, a VM's memory, a dataset ([`Object`]).
//! * *Block*: `BlockAddr { object, index }`; images use 128 KiB blocks, memory 4 KiB pages.
//! * *Right*: `{ object, holder, epoch }`: who may write; changed only by compare-and-swap, epoch + 1 each time.
//!
//! Invariants
//! * What is parsed here comes from strangers: no parser panics, every length is checked against a limit.
//! * JSON records ignore unknown fields, so that release N reads what N + 1 wrote; binary records carry a version.
//!
//! Not here: who may do what (`engine`), how bytes are moved (`host`).

#![forbid(unsafe_code)]

pub mod api;
pub mod error;
pub mod foreign;
#[cfg(test)]
mod fuzz;
pub mod id;
pub mod meta;
pub mod nbd;
pub mod peer;
pub mod record;
pub mod size;

pub use error::{ErrorKind, WireError};
pub use id::{
    AttemptId, BlockAddr, BlockHash, DataId, DiskId, Epoch, HostId, ImageId, ImageRef, Name, Object, Right,
    Role, SnapshotRef, Time, VmId,
};
