//! Places where a test may end or hold this process.
