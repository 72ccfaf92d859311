//! TLS 1.3 between hosts: calls, streams, one port.
