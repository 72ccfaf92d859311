//! Stores behind a network: read-only HTTP, and S3.
