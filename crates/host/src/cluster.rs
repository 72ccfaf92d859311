//! The cluster's certificate authority, join tokens, certificates and their renewal.
