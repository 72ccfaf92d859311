//! Figures for /metrics.
