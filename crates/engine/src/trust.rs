//! Who may call what.

pub mod role;
