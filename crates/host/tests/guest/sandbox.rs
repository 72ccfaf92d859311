//! Injection into processes that resist: inside a system call, behind a seccomp filter, or ended.
#![expect(unsafe_code, reason = "installs a seccomp filter between fork and exec")]

use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use whimbrel_host::ErrorKind;
use whimbrel_host::guest::binary::QemuBinary;
use whimbrel_host::guest::inject::userfaultfd_of;
use whimbrel_host::guest::process::QemuProcess;
use whimbrel_host::guest::qmp::Qmp;

use crate::support::{Wanted, qemus, start};

fn filter(code: u16, jump_true: u8, jump_false: u8, k: u32) -> libc::sock_filter {
    libc::sock_filter { code, jt: jump_true, jf: jump_false, k }
}

/// Kills the whole process on userfaultfd(2).
fn forbid_userfaultfd() -> std::io::Result<()> {
    let program = [
        filter(0x20, 0, 0, 0),
        filter(0x15, 0, 1, libc::SYS_userfaultfd as u32),
        filter(0x06, 0, 0, libc::SECCOMP_RET_KILL_PROCESS),
        filter(0x06, 0, 0, libc::SECCOMP_RET_ALLOW),
    ];
    let fprog = libc::sock_fprog { len: program.len() as u16, filter: program.as_ptr().cast_mut() };
    // SAFETY: the program lives for the calls; both change this process alone, before exec.
    let failed = unsafe {
        libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0
            || libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const fprog) != 0
    };
    if failed { Err(std::io::Error::last_os_error()) } else { Ok(()) }
}

struct Ends(Child);

impl Drop for Ends {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

async fn connect(path: &std::path::Path) -> Qmp {
    for _ in 0..500 {
        if let Ok(qmp) = Qmp::connect(path, Duration::from_secs(5)).await {
            return qmp;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("no QMP at {}", path.display());
}

fn start_filtered(qemu: &QemuBinary, socket: &std::path::Path) -> Ends {
    let mut command = Command::new(&qemu.path);
    for dir in &qemu.firmware {
        command.arg("-L").arg(dir);
    }
    let qmp = format!("unix:{},server=on,wait=off", socket.display());
    command.args(["-nodefaults", "-display", "none", "-accel", "tcg", "-m", "32M", "-qmp", &qmp]);
    // SAFETY: two prctl calls, no allocation.
    unsafe { command.pre_exec(forbid_userfaultfd) };
    Ends(command.stdin(Stdio::null()).spawn().unwrap())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_filter_that_kills_on_userfaultfd_is_respected_and_the_device_serves() {
    for qemu in qemus().await {
        let files = tempfile::tempdir().unwrap();
        let socket = files.path().join("qmp");
        let child = start_filtered(&qemu, &socket);
        let qmp = connect(&socket).await;
        let process = QemuProcess::open(child.0.id()).unwrap();
        match userfaultfd_of(&qmp, &process).await {
            Ok(injected) => println!("{qemu}: by the device, stopped for {:?}", injected.stopped),
            Err(error) => {
                assert!(!std::path::Path::new("/dev/userfaultfd").exists(), "{error}");
                assert_eq!(error.kind(), ErrorKind::Missing, "{error}");
                assert!(error.to_string().contains("seccomp"), "{error}");
            }
        }
        assert_eq!(qmp.run_state().await.unwrap(), "running", "it must have survived");
        let lent = std::fs::read_dir(format!("/proc/{}/fd", process.pid())).unwrap().flatten();
        let lent = lent.filter_map(|fd| std::fs::read_link(fd.path()).ok());
        assert!(!lent.into_iter().any(|target| target.ends_with("userfaultfd")), "nothing stays behind");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_system_call_that_was_interrupted_goes_on_as_if_nothing_had_been() {
    let qemu = qemus().await.remove(0);
    // Any QMP will do; the process that is stopped is a sleeping one.
    let vm = start(&qemu, Wanted { name: "sleeper", ..Wanted::default() }).await;
    let started = Instant::now();
    let mut sleeper = Command::new("sleep").arg("2").spawn().unwrap();
    let process = QemuProcess::open(sleeper.id()).unwrap();
    tokio::time::sleep(Duration::from_millis(100)).await;
    for _ in 0..20 {
        userfaultfd_of(&vm.started.qmp, &process).await.unwrap();
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert!(sleeper.wait().unwrap().success());
    let slept = started.elapsed();
    assert!(slept >= Duration::from_secs(2) && slept < Duration::from_secs(4), "{slept:?}");
    let error = userfaultfd_of(&vm.started.qmp, &process).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound, "{error}");
}
