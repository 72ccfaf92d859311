//! Layers and volumes on this host.
