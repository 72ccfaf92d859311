//! What hosts say to each other: framing, hello, methods.
//!
//! Everything runs over TLS 1.3 with certificates on both sides. ALPN `whimbrel` selects this protocol,
//! `http/1.1` the remote API; both share the host's one port.
//!
//! Not here: who may call what (`engine`), how connections are kept (`host::link`).

pub mod block;
pub mod cluster;
pub mod memory;
pub mod meta;
pub mod migrate;
