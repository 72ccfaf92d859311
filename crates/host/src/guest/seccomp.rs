//! Whether a process's seccomp filters let a system call through: asked of the filters, not by trying (a try may
//! kill the process).
