//! Layers at rest: headers, the extent log, checkpoints.
