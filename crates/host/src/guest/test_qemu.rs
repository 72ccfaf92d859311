//! For tests: QEMU programs to test with, and a small guest.
