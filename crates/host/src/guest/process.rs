//! A QEMU process: started so that it outlives the agent, found again after the agent's restart, watched, ended.
//!
//! ```text
//!   systemd is PID 1:  agent ─ fork ─ fork ─▶ systemd-run --scope (own cgroup) ─ exec ─▶ qemu
//!   otherwise:         agent ─ fork ─ fork, setsid ──────────────────────── exec ─▶ qemu
//! ```
//!
//! Invariants
//! * A process is named by pid and start time; a pid alone may be somebody else's by now.
//! * Dropping a [`QemuProcess`] never ends QEMU; [`QemuProcess::kill`] does.
//! * Sockets, logs and RAM belong to the VM's user before QEMU starts.
//!
//! Not here: the arguments (`launch`), talking to it (`qmp`).
#![expect(unsafe_code, reason = "fork, ids and session of the child between fork and exec")]

use std::ffi::OsString;
use std::fs::{self, OpenOptions};
use std::io::{self, Read};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt, chown};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde::{Deserialize, Serialize};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::time::{Instant, sleep};

use crate::error::{Context, Error, ErrorKind, Result};
use crate::guest::launch::{self, LaunchPlan, command_line};
use crate::guest::proc_fs;
use crate::guest::qmp::Qmp;

/// How long QEMU may take from its start to its QMP greeting.
const START_LIMIT: Duration = Duration::from_secs(30);
/// How much of QEMU's own log an error quotes, bytes.
const LOG_TAIL_BYTES: usize = 2000;

/// A process, for good: survives in a journal across restarts of the agent (not of the host: compare boot ids).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessId {
    /// Process id.
    pub pid: u32,
    /// Clock ticks since boot at which it started.
    pub start_time: u64,
    /// The boot during which it runs.
    pub boot_id: String,
}

/// A QEMU process.
#[derive(Debug)]
pub struct QemuProcess {
    id: ProcessId,
    pidfd: OwnedFd,
}

/// A VM that was just started: its process, and QMP to it.
#[derive(Debug)]
pub struct Started {
    /// The process.
    pub process: QemuProcess,
    /// The agent's connection.
    pub qmp: Qmp,
}

impl QemuProcess {
    /// The process with this pid, whoever started it.
    pub fn open(pid: u32) -> Result<Self> {
        let action = || format!("open process {pid}");
        let pidfd = open_pidfd(pid).with_context(action)?;
        // Read after the descriptor is held: if the process still is, this is its own start time.
        let id = ProcessId {
            pid,
            start_time: proc_fs::start_time(pid).with_context(action)?,
            boot_id: boot_id()?,
        };
        let process = Self { id, pidfd };
        if process.is_alive() {
            Ok(process)
        } else {
            Err(Error::new(ErrorKind::NotFound, format!("{}: it has ended", action())))
        }
    }

    /// The process that was journalled as `id`; `None` if it has ended.
    pub fn reattach(id: &ProcessId) -> Result<Option<Self>> {
        if boot_id()? != id.boot_id {
            return Ok(None);
        }
        match Self::open(id.pid) {
            Ok(process) if process.id == *id => Ok(Some(process)),
            Ok(_) => Ok(None),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// The same process through another descriptor.
    pub fn try_clone(&self) -> Result<Self> {
        let pidfd = self.pidfd.try_clone().context("copy a descriptor")?;
        Ok(Self { id: self.id.clone(), pidfd })
    }

    /// For the journal.
    pub fn id(&self) -> &ProcessId {
        &self.id
    }

    /// Process id.
    pub fn pid(&self) -> u32 {
        self.id.pid
    }

    /// The user and group it runs as.
    pub fn owner(&self) -> Result<(u32, u32)> {
        let of = |key| {
            let text = proc_fs::status(self.id.pid, key)?;
            // Real, effective, saved, of the file system.
            let effective = text.split_whitespace().nth(1).and_then(|id| id.parse().ok());
            effective.ok_or_else(|| Error::new(ErrorKind::Unsupported, format!("read the {key} of QEMU")))
        };
        Ok((of("Uid")?, of("Gid")?))
    }

    /// The descriptor of the process.
    pub fn pidfd(&self) -> &OwnedFd {
        &self.pidfd
    }

    /// Whether it still runs.
    pub fn is_alive(&self) -> bool {
        let mut fds = [rustix::event::PollFd::new(&self.pidfd, rustix::event::PollFlags::IN)];
        let now = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
        matches!(rustix::event::poll(&mut fds, Some(&now)), Ok(0))
    }

    /// Ends it at once; returns when it is gone, or after `limit` with an error. Good for a process that has ended.
    pub async fn kill(&self, limit: Duration) -> Result<()> {
        let action = || format!("kill QEMU, process {}", self.id.pid);
        match pidfd_send_signal(&self.pidfd, Signal::KILL) {
            Ok(()) => {}
            Err(rustix::io::Errno::SRCH) => return Ok(()),
            Err(error) => return Err(error).with_context(action),
        }
        let late = |_| Error::new(ErrorKind::TimedOut, format!("{}: still there after {limit:?}", action()));
        tokio::time::timeout(limit, self.exited()).await.map_err(late)?
    }

    /// Returns when it has ended.
    pub async fn exited(&self) -> Result<()> {
        // A descriptor of its own for each who waits: the reactor takes one only once.
        let own = self.pidfd.try_clone().context("watch QEMU")?;
        // SAFETY: the registration owns its descriptor, which stays open for as long as it lasts.
        let watch = unsafe { AsyncFd::register_with_interest(own, Interest::READABLE) };
        let watch = watch.map_err(io::Error::from).context("watch QEMU")?;
        let ready = watch.readable().await.context("watch QEMU")?;
        drop(ready);
        Ok(())
    }
}

/// A QEMU that nobody else knows yet: it does not outlive a start that is given up.
struct Starting<'a>(Option<&'a QemuProcess>);

impl Starting<'_> {
    fn over(mut self) {
        self.0 = None;
    }
}

impl Drop for Starting<'_> {
    fn drop(&mut self) {
        if let Some(process) = self.0 {
            // An error says that it has ended already.
            let _ = pidfd_send_signal(&process.pidfd, Signal::KILL);
        }
    }
}

/// Starts a VM and connects to its QMP socket. On failure, or when the future is dropped, nothing is left running.
pub async fn spawn(plan: &LaunchPlan) -> Result<Started> {
    let action = || format!("start QEMU for {}", plan.name);
    let arguments = command_line(plan)?;
    prepare_files(plan).with_context(action)?;
    let process = start(plan, &arguments).with_context(action)?;
    let starting = Starting(Some(&process));
    let connected = connect(plan, &process).await;
    starting.over();
    match connected {
        Ok(qmp) => {
            tracing::info!(vm = %plan.name, pid = process.pid(), qemu = %plan.qemu, "QEMU started");
            Ok(Started { process, qmp })
        }
        Err(error) => {
            process.kill(Duration::from_secs(5)).await?;
            Err(error).with_context(action)
        }
    }
}

/// Removes what a VM that has ended leaves on this host: its RAM and its directory of sockets and logs.
pub fn remove_files(run_dir: &Path, ram_path: &Path) -> Result<()> {
    let gone = |result: io::Result<()>, path: &Path| match result {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("remove {}", path.display()))
        }
        _ => Ok(()),
    };
    gone(fs::remove_file(ram_path), ram_path)?;
    gone(fs::remove_dir_all(run_dir), run_dir)
}

async fn connect(plan: &LaunchPlan, process: &QemuProcess) -> Result<Qmp> {
    let deadline = Instant::now() + START_LIMIT;
    loop {
        if !process.is_alive() {
            let words = format!("run {}: it ended: {}", plan.qemu, log_tail(&plan.log_path()));
            return Err(Error::new(ErrorKind::Io, words));
        }
        let left = deadline.saturating_duration_since(Instant::now());
        // Not there yet, or bound and not yet listening: a moment later.
        match Qmp::connect(&plan.qmp_path(), left).await {
            Ok(qmp) => return Ok(qmp),
            Err(_) if !left.is_zero() => sleep(Duration::from_millis(5)).await,
            Err(error) => return Err(error),
        }
    }
}

/// The end of QEMU's own messages.
fn log_tail(path: &Path) -> String {
    let bytes = fs::read(path).unwrap_or_default();
    let tail = bytes.get(bytes.len().saturating_sub(LOG_TAIL_BYTES)..).unwrap_or_default();
    let text = String::from_utf8_lossy(tail).trim().to_owned();
    if text.is_empty() { "it said nothing".to_owned() } else { text }
}

fn prepare_files(plan: &LaunchPlan) -> Result<()> {
    let own = |path: &Path| match plan.user {
        Some((uid, gid)) => chown(path, Some(uid), Some(gid))
            .with_context(|| format!("change the owner of {}", path.display())),
        None => Ok(()),
    };
    let dir = &plan.run_dir;
    fs::create_dir_all(dir).with_context(|| format!("make {}", dir.display()))?;
    fs::set_permissions(dir, fs::Permissions::from_mode(0o700))
        .with_context(|| format!("restrict {}", dir.display()))?;
    own(dir)?;
    for socket in [plan.qmp_path(), plan.operator_qmp_path(), plan.console_path()] {
        match fs::remove_file(&socket) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(error).with_context(|| format!("remove {}", socket.display()));
            }
            _ => {}
        }
    }
    let log = OpenOptions::new().create(true).append(true).mode(0o600).open(plan.log_path());
    log.with_context(|| format!("make {}", plan.log_path().display()))?;
    own(&plan.log_path())?;
    if launch::ram_block(&plan.spec).is_none() {
        return Ok(());
    }
    make_ram(plan)?;
    own(&plan.ram_path)
}

/// Makes the RAM file, sparse. One that is there already (made for an incoming VM) must have the right size.
fn make_ram(plan: &LaunchPlan) -> Result<()> {
    let path = &plan.ram_path;
    let action = || format!("make the RAM file {}", path.display());
    let bytes = plan.spec.memory_bytes;
    let made = OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(path);
    match made {
        Ok(file) => file.set_len(bytes).with_context(action),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            let found = fs::metadata(path).with_context(action)?.len();
            if plan.incoming && found == bytes {
                return Ok(());
            }
            // Stale content would be another VM's memory.
            let words = format!("{}: a file of {found} bytes is there already", action());
            Err(Error::new(ErrorKind::AlreadyExists, words).hint("remove it if no QEMU uses it"))
        }
        Err(error) => Err(error).with_context(action),
    }
}

/// Whether systemd runs this host, so that a scope of its own keeps a VM apart from the agent's service.
fn has_systemd() -> bool {
    Path::new("/run/systemd/system").is_dir()
        && fs::read_link("/proc/1/exe").is_ok_and(|exe| exe.ends_with("systemd"))
}

fn start(plan: &LaunchPlan, arguments: &[OsString]) -> Result<QemuProcess> {
    let mut user = plan.user;
    let mut command = Command::new(&plan.qemu.path);
    if has_systemd() {
        command = Command::new("systemd-run");
        command.args(["--scope", "--quiet", "--collect", "--slice=whimbrel-vms.slice"]);
        // A name of its own: the scope of one that just ended lingers, and two agents may share this systemd.
        let unique = uuid::Uuid::new_v4().simple().to_string();
        command.arg(format!("--unit=whimbrel-vm-{}-{}", plan.name, &unique[..8]));
        // Making a scope takes our rights; systemd-run gives them up afterwards.
        if let Some((uid, gid)) = user.take() {
            command.args([format!("--uid={uid}"), format!("--gid={gid}")]);
        }
        command.arg("--").arg(&plan.qemu.path);
    }
    command.args(arguments).current_dir("/").stdin(Stdio::null());
    let log = || OpenOptions::new().append(true).open(plan.log_path()).context("open QEMU's log");
    command.stdout(log()?).stderr(log()?);
    let (mut pid_from, pid_to) = io::pipe().context("make a pipe")?;
    let keep: Vec<RawFd> = plan.taps.iter().map(AsRawFd::as_raw_fd).collect();
    // Whoever is that user already may not be allowed to change groups: in a user namespace of one user nobody is.
    let (own_uid, own_gid) = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
    let ids = user.filter(|user| *user != (own_uid, own_gid)).map(|(uid, gid)| Ids {
        uid,
        gid,
        groups: groups_for(plan),
    });
    let report = pid_to.as_raw_fd();
    // SAFETY: the closure runs between fork and exec; it makes system calls only and allocates nothing.
    unsafe {
        command.pre_exec(move || detach(report, &keep, ids.as_ref()));
    }
    let mut child = command.spawn().with_context(|| format!("run {}", plan.qemu.path.display()))?;
    drop(pid_to);
    // The child in between ended as soon as it had forked.
    child.wait().context("wait for the child")?;
    let mut bytes = [0; 4];
    pid_from.read_exact(&mut bytes).context("learn QEMU's process id")?;
    QemuProcess::open(u32::from_ne_bytes(bytes))
}

struct Ids {
    uid: u32,
    gid: u32,
    groups: Vec<u32>,
}

/// The groups that an unprivileged VM needs beside its own: the one of /dev/kvm.
fn groups_for(plan: &LaunchPlan) -> Vec<u32> {
    let kvm = plan.spec.accel.as_deref() == Some("kvm");
    let group = fs::metadata("/dev/kvm").ok().filter(|_| kvm).map(|file| file.gid());
    group.into_iter().collect()
}

/// In the child: a session of its own, a parent that is not the agent, the VM's user, the descriptors it keeps.
fn detach(report: RawFd, keep: &[RawFd], ids: Option<&Ids>) -> io::Result<()> {
    let check = |result: i32| if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) };
    // SAFETY: system calls on this process alone; all pointers are to live values of the stated length.
    unsafe {
        check(libc::setsid())?;
        if check(libc::fork())? > 0 {
            libc::_exit(0);
        }
        let pid = libc::getpid().to_ne_bytes();
        if libc::write(report, pid.as_ptr().cast(), pid.len()) != 4 {
            return Err(io::Error::last_os_error());
        }
        for &fd in keep {
            check(libc::fcntl(fd, libc::F_SETFD, 0))?;
        }
        if let Some(ids) = ids {
            check(libc::setgroups(ids.groups.len(), ids.groups.as_ptr()))?;
            check(libc::setgid(ids.gid))?;
            check(libc::setuid(ids.uid))?;
        }
    }
    Ok(())
}

fn open_pidfd(pid: u32) -> io::Result<OwnedFd> {
    let raw = i32::try_from(pid).ok().and_then(Pid::from_raw);
    let raw = raw.ok_or_else(|| io::Error::from(io::ErrorKind::NotFound))?;
    match pidfd_open(raw, PidfdFlags::empty()) {
        Err(rustix::io::Errno::SRCH) => Err(io::ErrorKind::NotFound.into()),
        other => Ok(other?),
    }
}

fn boot_id() -> Result<String> {
    let path = "/proc/sys/kernel/random/boot_id";
    let text = fs::read_to_string(path).with_context(|| format!("read {path}"))?;
    Ok(text.trim().to_owned())
}

#[cfg(test)]
mod test {
    use super::*;

    #[tokio::test]
    async fn a_process_is_known_by_pid_and_start_time() {
        let mut child = Command::new("sleep").arg("60").spawn().unwrap();
        let process = QemuProcess::open(child.id()).unwrap();
        assert!(process.is_alive());
        assert!(QemuProcess::reattach(process.id()).unwrap().is_some());
        let mut other = process.id().clone();
        other.start_time += 1;
        assert!(QemuProcess::reattach(&other).unwrap().is_none());
        process.kill(Duration::from_secs(5)).await.unwrap();
        child.wait().unwrap();
        assert!(!process.is_alive());
        process.kill(Duration::from_secs(5)).await.unwrap();
        assert!(QemuProcess::reattach(process.id()).unwrap().is_none());
    }
}
