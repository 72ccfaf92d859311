//! RAM on its way between two hosts.
