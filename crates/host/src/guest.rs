//! QEMU on this host: start, QMP, precheck, memory tracking, device state.
