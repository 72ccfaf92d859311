//! Which chains open, and in which order ids and data change (capability 12).
