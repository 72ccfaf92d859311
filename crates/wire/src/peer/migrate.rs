//! The handover of a VM between two hosts: control messages.
