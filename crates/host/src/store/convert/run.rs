//! Runs qemu-img: no shell, no privileges, limits on time, memory, processor time and file size; files as open
//! descriptors.
#![expect(unsafe_code, reason = "limits are set between fork and exec")]

use std::fs::File;
use std::io::{ErrorKind as IoKind, Read};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Resource, Rlimit};

use super::ConvertConfig;
use crate::error::{Context, Error, ErrorKind, Result};

const MEMORY_BYTES_MAX: u64 = 8 << 30;
const OUTPUT_BYTES_MAX: usize = 1 << 20;
/// How often a running child is looked at.
const POLL: Duration = Duration::from_millis(20);

/// What a run left.
pub(super) struct Output {
    pub(super) status: ExitStatus,
    pub(super) stdout: String,
    pub(super) stderr: String,
}

impl Output {
    /// The first line of its complaint, without the program's name.
    pub(super) fn complaint(&self) -> String {
        let line = self.stderr.lines().chain(self.stdout.lines()).find(|line| !line.trim().is_empty());
        let line = line.map(|line| line.trim_start_matches("qemu-img: ").to_owned());
        line.unwrap_or_else(|| match self.status.signal() {
            Some(signal) => format!("qemu-img was ended by signal {signal}"),
            None => format!("qemu-img failed with {}", self.status),
        })
    }
}

/// The path under which a child sees an open file of ours.
pub(super) fn fd_path(file: &File) -> String {
    format!("/proc/self/fd/{}", file.as_raw_fd())
}

/// Runs `qemu-img ARGS` with `files` open under their own numbers. `tick` is called while it runs; its error ends the
/// child.
pub(super) fn qemu_img(
    config: &ConvertConfig,
    args: &[&str],
    files: &[&File],
    file_bytes_max: u64,
    tick: &mut dyn FnMut() -> Result<()>,
) -> Result<Output> {
    let mut command = Command::new("qemu-img");
    command.args(args).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command.current_dir("/").env_clear().env("PATH", "/usr/local/bin:/usr/bin:/bin").env("LC_ALL", "C");
    if rustix::process::geteuid().is_root() && config.uid != 0 {
        // The standard library drops all supplementary groups with it.
        command.uid(config.uid).gid(config.gid);
    }
    let fds: Vec<RawFd> = files.iter().map(|file| file.as_raw_fd()).collect();
    let cpu_limit_s = config.time_limit_s;
    let confine = move || {
        let limit = |most: u64| Rlimit { current: Some(most), maximum: Some(most) };
        rustix::process::setrlimit(Resource::Cpu, limit(cpu_limit_s))?;
        rustix::process::setrlimit(Resource::As, limit(MEMORY_BYTES_MAX))?;
        rustix::process::setrlimit(Resource::Fsize, limit(file_bytes_max))?;
        rustix::process::setrlimit(Resource::Core, limit(0))?;
        rustix::thread::set_no_new_privs(true)?;
        for fd in &fds {
            // SAFETY: the descriptors belong to `files`, which outlive the child's start.
            let fd = unsafe { rustix::fd::BorrowedFd::borrow_raw(*fd) };
            rustix::io::fcntl_setfd(fd, rustix::io::FdFlags::empty())?;
        }
        Ok(())
    };
    // SAFETY: only system calls are made between fork and exec; nothing allocates or takes a lock.
    unsafe { command.pre_exec(confine) };
    let child = command.spawn().map_err(|error| match error.kind() {
        IoKind::NotFound => Error::new(ErrorKind::Missing, "run qemu-img: it is not installed")
            .hint("apt-get install qemu-utils"),
        _ => Error::with_source(ErrorKind::Io, "run qemu-img", error),
    })?;
    wait(child, Duration::from_secs(config.time_limit_s), tick)
}

fn wait(mut child: Child, limit: Duration, tick: &mut dyn FnMut() -> Result<()>) -> Result<Output> {
    let stdout = reader(child.stdout.take());
    let stderr = reader(child.stderr.take());
    let deadline = Instant::now() + limit;
    let ended = loop {
        match child.try_wait().context("wait for qemu-img") {
            Ok(Some(status)) => break Ok(status),
            Ok(None) => {}
            Err(error) => break Err(error),
        }
        if Instant::now() > deadline {
            let why = format!("run qemu-img: not done after {} s", limit.as_secs());
            break Err(Error::new(ErrorKind::TimedOut, why));
        }
        if let Err(error) = tick() {
            break Err(error);
        }
        std::thread::sleep(POLL);
    };
    if ended.is_err() {
        let _ = child.kill();
        let _ = child.wait();
    }
    let text = |reader: std::thread::JoinHandle<Vec<u8>>| {
        String::from_utf8_lossy(&reader.join().unwrap_or_default()).into_owned()
    };
    let (stdout, stderr) = (text(stdout), text(stderr));
    Ok(Output { status: ended?, stdout, stderr })
}

/// Drains a pipe on a thread of its own, keeping its beginning.
fn reader(pipe: Option<impl Read + Send + 'static>) -> std::thread::JoinHandle<Vec<u8>> {
    std::thread::spawn(move || {
        let mut kept = Vec::new();
        let mut buffer = [0; 4096];
        let Some(mut pipe) = pipe else { return kept };
        loop {
            match pipe.read(&mut buffer) {
                Ok(0) => return kept,
                Ok(length) if kept.len() < OUTPUT_BYTES_MAX => {
                    kept.extend_from_slice(buffer.get(..length).unwrap_or_default());
                }
                Ok(_) => {}
                Err(error) if error.kind() == IoKind::Interrupted => {}
                Err(_) => return kept,
            }
        }
    })
}
