//! One thread of another process, stopped for the time of a few system calls that it makes for us (x86-64).
//!
//! ```text
//!   seize ─▶ interrupt ─▶ stopped ─▶ call … call ─▶ drop: registers and signal mask as before, detached
//! ```
//!
//! Invariants
//! * Only this thread stops; the others, the guest's processors among them, run on.
//! * Whatever happens, also a panic or the death of the tracing thread, the thread goes on where it was: a system
//!   call that the stop interrupted is restarted as the kernel would have restarted it.
//! * A system call that a seccomp filter does not let through is not made: a try could kill the process.
//!
//! Not here: which calls are made (`inject`).
#![expect(unsafe_code, reason = "ptrace(2)")]

use std::ffi::c_void;
use std::io;
use std::time::{Duration, Instant};

use crate::error::{Context, Error, ErrorKind, Result};
use crate::guest::proc_fs;
use crate::guest::seccomp::{self, Call, Instruction};

const PTRACE_GETSIGMASK: u32 = 0x420a;
const PTRACE_SETSIGMASK: u32 = 0x420b;
const PTRACE_SECCOMP_GET_FILTER: u32 = 0x420c;
/// `syscall`.
const SYSCALL_CODE: [u8; 2] = [0x0f, 0x05];
/// How long a thread may take to stop before it is left alone.
const STOP_LIMIT: Duration = Duration::from_secs(1);
/// How long it may take for one system call. These never sleep, but the host may be busy; giving up leaves a thread
/// with registers that are not its own, so that it is the very last resort.
const CALL_LIMIT: Duration = Duration::from_secs(60);
/// Pause between two looks for a stop.
const LOOK_AGAIN: Duration = Duration::from_micros(20);
/// `ERESTARTSYS`, `ERESTARTNOINTR`, `ERESTARTNOHAND`: the call is made again.
const RESTART: [i64; 3] = [-512, -513, -514];
/// `ERESTART_RESTARTBLOCK`: it goes on through `restart_syscall`.
const RESTART_BLOCK: i64 = -516;
const INSTRUCTIONS_MAX: usize = 4096;
const FILTERS_MAX: u64 = 64;

/// See the module's charter. Bound to the thread that made it: ptrace answers no other.
pub(crate) struct Tracee {
    tid: i32,
    at: u64,
    saved: libc::user_regs_struct,
    signal_mask: u64,
    /// `None`: there are filters, and the kernel does not show them to us.
    filters: Option<Vec<Vec<Instruction>>>,
    stopped: bool,
    since: Instant,
    /// Dropped last, when the thread has been let go.
    _hurry: Hurry,
}

/// Puts a thread before all ordinary ones until it is dropped, if we may: on a busy host the time that either
/// thread waits for a processor is most of the time that the stopped one stands still.
pub(crate) struct Hurry {
    tid: i32,
    policy: i32,
}

impl Hurry {
    /// Thread `tid`; 0 is the calling one.
    pub(crate) fn up(tid: i32) -> Self {
        // SAFETY: returns a number.
        let policy = unsafe { libc::sched_getscheduler(tid) };
        // Real-time threads are left as they are; ordinary ones keep their nice value.
        let policy = if matches!(policy, libc::SCHED_OTHER | libc::SCHED_BATCH) { policy } else { -1 };
        if policy >= 0 && !set_policy(tid, libc::SCHED_FIFO, 1) {
            tracing::debug!(error = %io::Error::last_os_error(), "no right to a real-time priority");
        }
        Self { tid, policy }
    }
}

impl Drop for Hurry {
    fn drop(&mut self) {
        // It may have ended meanwhile.
        let _ended = self.policy >= 0 && !set_policy(self.tid, self.policy, 0);
    }
}

fn set_policy(tid: i32, policy: i32, priority: i32) -> bool {
    let parameter = libc::sched_param { sched_priority: priority };
    // SAFETY: the parameter is read.
    unsafe { libc::sched_setscheduler(tid, policy, &raw const parameter) == 0 }
}

/// The address of a `syscall` instruction in a process: its vDSO has one.
pub(crate) fn find_syscall(pid: u32) -> Result<u64> {
    use std::os::unix::fs::FileExt;
    let action = || format!("find a system call instruction in process {pid}");
    let missing = || Error::new(ErrorKind::Unsupported, action());
    let mappings = proc_fs::mappings(pid)?;
    let vdso = mappings.iter().find(|one| one.path == "[vdso]" && one.executable).ok_or_else(missing)?;
    let mut text = vec![0; usize::try_from(vdso.length()).unwrap_or(0).min(1 << 20)];
    let memory = std::fs::File::open(format!("/proc/{pid}/mem")).with_context(action)?;
    memory.read_exact_at(&mut text, vdso.start).with_context(action)?;
    let place = text.windows(SYSCALL_CODE.len()).position(|code| code == SYSCALL_CODE).ok_or_else(missing)?;
    Ok(vdso.start + place as u64)
}

/// # Safety
/// `address` and `data` are what `request` takes.
unsafe fn ptrace(request: u32, tid: i32, address: u64, data: *mut c_void) -> io::Result<i64> {
    // SAFETY: by the caller.
    let result = unsafe { libc::ptrace(request, tid, address as *mut c_void, data) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

fn empty_registers() -> libc::user_regs_struct {
    // SAFETY: a structure of integers; all zeros are a value of it.
    unsafe { std::mem::zeroed() }
}

impl Tracee {
    /// Stops thread `tid` of process `pid`; system calls will be made at address `at` ([`find_syscall`]).
    pub(crate) fn stop(pid: u32, tid: i32, at: u64) -> Result<Self> {
        let action = || format!("stop thread {tid} for a moment");
        // Asked first: it costs a read of /proc, which the thread need not wait for.
        let filtered = proc_fs::status(pid, "Seccomp")? != "0";
        let options = libc::PTRACE_O_TRACESYSGOOD as usize as *mut c_void;
        // SAFETY: PTRACE_SEIZE takes no address, and options as data.
        unsafe { ptrace(libc::PTRACE_SEIZE, tid, 0, options) }.with_context(action).map_err(|error| {
            error.hint("the agent needs CAP_SYS_PTRACE, and no debugger may be attached to this QEMU")
        })?;
        let mut tracee = Self {
            tid,
            at,
            saved: empty_registers(),
            signal_mask: 0,
            filters: Some(Vec::new()),
            stopped: false,
            _hurry: Hurry::up(tid),
            since: Instant::now(),
        };
        // SAFETY: PTRACE_INTERRUPT takes neither.
        unsafe { ptrace(libc::PTRACE_INTERRUPT, tid, 0, std::ptr::null_mut()) }.with_context(action)?;
        tracee.wait(|status| status >> 16 == libc::PTRACE_EVENT_STOP).with_context(action)?;
        tracee.saved = tracee.registers().with_context(action)?;
        tracee.signal_mask = tracee.swap_mask(u64::MAX).with_context(action)?;
        tracee.stopped = true;
        if filtered {
            tracee.filters = tracee.read_filters();
        }
        Ok(tracee)
    }

    /// When the thread was told to stop.
    pub(crate) fn started(&self) -> Instant {
        self.since
    }

    /// Makes the thread call the kernel; the result is as the kernel returns it, errors as `io::Error`.
    pub(crate) fn call(&mut self, number: i64, arguments: [u64; 6]) -> io::Result<i64> {
        let call = Call { number: number as u32, instruction: self.at + 2, arguments };
        // ioctl and close are what any QEMU does all the time; without a look at the filters nothing else is tried.
        let harmless = matches!(number, libc::SYS_ioctl | libc::SYS_close);
        let allowed = match &self.filters {
            Some(filters) => seccomp::allows(filters, &call),
            None => harmless,
        };
        if !allowed {
            let words = format!("a seccomp filter of the process forbids system call {number}");
            return Err(io::Error::new(io::ErrorKind::PermissionDenied, words));
        }
        let mut registers = self.saved;
        registers.rip = self.at;
        registers.rax = number.cast_unsigned();
        // Not in a system call: the kernel must not restart the one that was interrupted, not yet.
        registers.orig_rax = u64::MAX;
        [registers.rdi, registers.rsi, registers.rdx, registers.r10, registers.r8, registers.r9] = arguments;
        self.set_registers(&mut registers)?;
        for _entry_then_exit in 0..2 {
            // SAFETY: PTRACE_SYSCALL takes no address and signal 0.
            unsafe { ptrace(libc::PTRACE_SYSCALL, self.tid, 0, std::ptr::null_mut()) }?;
            self.wait(|status| libc::WSTOPSIG(status) == libc::SIGTRAP | 0x80)?;
        }
        let result = self.registers()?.rax.cast_signed();
        if (-4095..0).contains(&result) {
            return Err(io::Error::from_raw_os_error(i32::try_from(-result).unwrap_or(libc::EIO)));
        }
        Ok(result)
    }

    /// Waits until the thread stops in the way that is `wanted`.
    fn wait(&mut self, wanted: impl Fn(i32) -> bool) -> io::Result<()> {
        let started = Instant::now();
        loop {
            let mut status = 0;
            // SAFETY: writes one integer.
            let found = unsafe { libc::waitpid(self.tid, &raw mut status, libc::__WALL | libc::WNOHANG) };
            if found < 0 {
                return Err(io::Error::last_os_error());
            }
            if found == self.tid {
                if !libc::WIFSTOPPED(status) {
                    return Err(io::Error::new(io::ErrorKind::NotFound, "it ended"));
                }
                if wanted(status) {
                    return Ok(());
                }
                self.pass(status)?;
            }
            let limit = if self.stopped { CALL_LIMIT } else { STOP_LIMIT };
            if started.elapsed() > limit {
                let words = format!("it did not stop within {limit:?}");
                return Err(io::Error::new(io::ErrorKind::TimedOut, words));
            }
            // Sleeping, not spinning: the thread may wait for this very processor.
            std::thread::sleep(LOOK_AGAIN);
        }
    }

    /// Lets a stop that is not ours happen: a signal reaches the thread, whatever it is.
    fn pass(&self, status: i32) -> io::Result<()> {
        let event = status >> 16 != 0;
        let signal = if event { 0 } else { libc::WSTOPSIG(status) & 0x7f };
        let how = if self.stopped { libc::PTRACE_SYSCALL } else { libc::PTRACE_CONT };
        // SAFETY: both take no address and a signal as data.
        unsafe { ptrace(how, self.tid, 0, signal as usize as *mut c_void) }.map(drop)
    }

    fn registers(&self) -> io::Result<libc::user_regs_struct> {
        let mut registers = empty_registers();
        // SAFETY: PTRACE_GETREGS fills a `struct user_regs_struct`.
        unsafe { ptrace(libc::PTRACE_GETREGS, self.tid, 0, (&raw mut registers).cast()) }?;
        Ok(registers)
    }

    fn set_registers(&self, registers: &mut libc::user_regs_struct) -> io::Result<()> {
        // SAFETY: PTRACE_SETREGS reads a `struct user_regs_struct`.
        unsafe { ptrace(libc::PTRACE_SETREGS, self.tid, 0, std::ptr::from_mut(registers).cast()) }.map(drop)
    }

    fn swap_mask(&self, mut mask: u64) -> io::Result<u64> {
        let mut old = 0u64;
        // SAFETY: both take the size of the kernel's signal set, 8 bytes, and a pointer to one.
        unsafe {
            ptrace(PTRACE_GETSIGMASK, self.tid, 8, (&raw mut old).cast())?;
            ptrace(PTRACE_SETSIGMASK, self.tid, 8, (&raw mut mask).cast())?;
        }
        Ok(old)
    }

    fn read_filters(&self) -> Option<Vec<Vec<Instruction>>> {
        let mut filters = Vec::new();
        for index in 0..FILTERS_MAX {
            let mut filter = vec![Instruction::default(); INSTRUCTIONS_MAX];
            // SAFETY: the kernel writes at most BPF_MAXINSNS (4096) instructions, which the vector holds.
            let count =
                unsafe { ptrace(PTRACE_SECCOMP_GET_FILTER, self.tid, index, filter.as_mut_ptr().cast()) };
            match count {
                Ok(count) => filter.truncate(usize::try_from(count).unwrap_or(0)),
                Err(error) if error.raw_os_error() == Some(libc::ENOENT) => return Some(filters),
                Err(_) => return None,
            }
            filters.push(filter);
        }
        None
    }

    fn restore(&mut self) -> io::Result<()> {
        let mut registers = self.saved;
        let (call, result) = (registers.orig_rax.cast_signed(), registers.rax.cast_signed());
        if call >= 0 && (RESTART.contains(&result) || result == RESTART_BLOCK) {
            // As arch/x86/kernel/signal.c does it; from here the kernel would not do it any more.
            registers.rax = if result == RESTART_BLOCK {
                libc::SYS_restart_syscall.cast_unsigned()
            } else {
                registers.orig_rax
            };
            registers.rip -= SYSCALL_CODE.len() as u64;
            registers.orig_rax = u64::MAX;
        }
        self.set_registers(&mut registers)?;
        self.swap_mask(self.signal_mask)?;
        self.stopped = false;
        // SAFETY: PTRACE_DETACH takes no address and signal 0.
        unsafe { ptrace(libc::PTRACE_DETACH, self.tid, 0, std::ptr::null_mut()) }.map(drop)
    }
}

impl Drop for Tracee {
    fn drop(&mut self) {
        // A thread that never stopped is let go by the kernel when the tracing thread ends.
        if self.stopped
            && let Err(error) = self.restore()
        {
            tracing::warn!(tid = self.tid, %error, "let a traced thread go on");
        }
    }
}
