//! How disks are offered to those who ask for them.

pub mod file;
pub mod nbd;
