//! Whether a block is worth compressing on its way (capability 3).
