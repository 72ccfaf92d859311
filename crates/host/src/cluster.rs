//! The cluster's certificate authority, join tokens, certificates and their renewal.

pub mod authority;

pub use authority::{Authority, HOST_LIFE_S, Subject};
