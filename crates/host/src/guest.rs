//! QEMU on this host: start it, speak with it, see what its guest writes, take and give its device state.
//!
//! ```text
//!   binary ──▶ launch ──▶ process ──▶ qmp ──▶ precheck ──▶ inject ──▶ capture ──▶ device_state
//!   find it    command    run it,     talk    may it be    a uffd     pages       the rest of
//!              line       watch it    to it   moved? how?  of QEMU    written     the VM
//! ```
//!
//! Invariants
//! * A VM outlives the agent: nothing here kills a QEMU because a value is dropped.
//! * Guests and QEMU are strangers: every answer is checked, every wait has a limit, nothing panics on them.
//! * RAM is a named file mapped shared; whoever wants its bytes maps the file ([`crate::memory`]), QEMU is not asked.
//!
//! Not here: bytes of RAM on their way (`memory`), the order of a move (`migrate`), disks (`export`).

pub mod agent;
pub mod binary;
pub(crate) mod calibrate;
pub mod capture;
pub mod device_state;
pub mod dirty;
pub mod drain;
pub mod fault;
pub mod foreign;
pub mod inject;
pub mod launch;
pub mod precheck;
mod proc_fs;
pub mod process;
pub mod processor;
pub mod qmp;
mod seccomp;
pub mod tap;
#[cfg(test)]
mod test_capture;
mod tracee;
pub mod uffd;
