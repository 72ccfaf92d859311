//! Every decision of Whimbrel: pure functions and state machines.
//!
//! ```text
//! event, now ──► step ──► actions        one state machine per subject; the host carries the actions out
//! ```
//!
//! Invariants: no I/O, no clock, no threads, no randomness that is not an argument, no unsafe code; enforced by
//! this crate's manifest (it depends on `whimbrel-wire` only) and its `clippy.toml`. Sibling folders do not import
//!
//! Not here: how anything is done (`host`).

#![forbid(unsafe_code)]

pub mod block;
pub mod disk;
pub mod export;
pub mod image;
pub mod memory;
pub mod migrate;
pub mod trust;
