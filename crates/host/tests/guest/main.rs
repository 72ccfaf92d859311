//! Guests on real QEMU, under TCG: launching, tracking of writes, device state. `WHIMBREL_TEST_QEMU` lists the
//! programs to test with; otherwise it is the one in `PATH`.

#![expect(clippy::unwrap_used, reason = "the helpers of tests are tests too")]

mod direct;
mod disks;
mod foreign;
mod groups;
mod launch;
mod memory;
mod pages;
mod precheck;
mod sandbox;
mod stream;
mod support;
mod tap;
