//! Image reads: layer → cache → peer → seed (capability 8).
