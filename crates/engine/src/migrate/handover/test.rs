//! Tests of the two machines against each other.
