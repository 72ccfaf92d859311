//! A QEMU that somebody else started: who it is, what it runs, and how another host starts its equal.
//!
//! ```text
//!   QMP socket ─► find: process ─► facts: QMP, /proc ─┐
//!                    └─► argv: options ───────────────┴─► rewrite ─┬─► ForeignSpec: a command line for any host
//!                                                                  └─► or what cannot be had elsewhere, all of it
//!   ForeignSpec + this host's sockets, taps, RAM ─► line: words
//! ```
//!
//! Invariants
//! * Looking changes nothing.
//! * A reason names the argument, device or drive, and says what would have to change.
//! * The rewritten command line has the devices that the running QEMU has, at their addresses: those that were plugged
//!   or unplugged since its start are found and refused.
//!
//! Not here: taking it over (`vm::adopt`), RAM blocks and migration blockers (`precheck`).

mod argv;
mod facts;
mod find;
mod line;
mod rewrite;
#[cfg(test)]
mod test;

pub use facts::{Device, Drive, Facts, collect};
pub use find::process_behind;
pub(super) use line::command_line;
pub(crate) use line::nbd_node;
pub use rewrite::{Plan, PlannedDisk, rewrite};

use std::fs;

use crate::error::{Context as _, Error, ErrorKind, Result};
use crate::guest::process::QemuProcess;

/// The words of a process's command line, the program left out.
pub fn words_of(process: &QemuProcess) -> Result<Vec<String>> {
    let path = format!("/proc/{}/cmdline", process.pid());
    let bytes = fs::read(&path).with_context(|| format!("read {path}"))?;
    let words = bytes.strip_suffix(&[0]).unwrap_or(&bytes).split(|byte| *byte == 0).skip(1);
    let words: Option<Vec<String>> = words.map(|word| String::from_utf8(word.to_vec()).ok()).collect();
    words.ok_or_else(|| Error::new(ErrorKind::Unsupported, format!("read {path}: it is not UTF-8")))
}
