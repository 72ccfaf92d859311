//! Long work: progress, cancel, waiting.
