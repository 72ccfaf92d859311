//! The host's monotonic clock, as the engine's Time, and the wall clock for records.
