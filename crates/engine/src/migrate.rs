//! Moves of a VM.

pub mod handover;
