//! How disks are offered to those who ask for them.

pub mod budget;
pub mod file;
pub mod nbd;
