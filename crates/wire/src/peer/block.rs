//! Image blocks and bitmaps between hosts.
