//! Joining, and what hosts tell about themselves.
