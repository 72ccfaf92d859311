//! Blocks and pages to bytes and back: zero, raw, zstd.
