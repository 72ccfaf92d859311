//! The metadata store, served to other hosts.
