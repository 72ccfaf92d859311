//! The one spine of every move.
