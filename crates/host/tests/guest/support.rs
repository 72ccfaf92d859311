//! For tests of guests: which QEMUs to test with, a guest that never stops writing memory, and how to start it.

use std::env;
use std::path::{Path, PathBuf};
use std::time::Duration;

use whimbrel_host::guest::binary::QemuBinary;
use whimbrel_host::guest::launch::LaunchPlan;
use whimbrel_host::guest::process::{Started, spawn};
use whimbrel_wire::meta::VmSpec;

/// RAM of the test guest, bytes; see `ram_bytes`.
pub const RAM_BYTES: u64 = (128 << 20) - 8192;

/// The guest: a multiboot kernel that QEMU loads by itself. It touches 16384 pages from 4 MiB on, then writes
/// for ever into a window of 256 pages that moves on, and prints a dot per 16384 writes. Made with `as --32`:
///
/// ```text
///        multiboot header; first_page: 0x400000; page_mask: 0x3fff; burst: 0x4000
/// entry: cli; esi = 12345; ebx = 0
/// fill:  ecx = page_mask; do { *(first_page + (ecx << 12) + 8) = ecx } while (--ecx >= 0)
/// round: ecx = burst; do { esi = esi * 1664525 + 1013904223; ebx++
///            edi = first_page + ((((esi >> 24) + ((ebx >> 18) << 6)) & page_mask) << 12)
///            [edi] = ebx; [edi + 4] = edi; [edi + 2048] = esi; [edi + 4092] = ebx } while (--ecx)
///        out 0x3f8, '.'; jmp round
/// ```
const WRITER: [u8; 153] = [
    0x02, 0xb0, 0xad, 0x1b, 0x00, 0x00, 0x01, 0x00, 0xfe, 0x4f, 0x51, 0xe4, 0x00, 0x00, 0x10, 0x00, 0x00,
    0x00, 0x10, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x2c, 0x00, 0x10, 0x00, 0x00, 0x00,
    0x40, 0x00, 0xff, 0x3f, 0x00, 0x00, 0x00, 0x40, 0x00, 0x00, 0xfa, 0xbe, 0x39, 0x30, 0x00, 0x00, 0x31,
    0xdb, 0x8b, 0x0d, 0x24, 0x00, 0x10, 0x00, 0x89, 0xcf, 0xc1, 0xe7, 0x0c, 0x03, 0x3d, 0x20, 0x00, 0x10,
    0x00, 0x89, 0x4f, 0x08, 0x49, 0x79, 0xef, 0x8b, 0x0d, 0x28, 0x00, 0x10, 0x00, 0x69, 0xf6, 0x0d, 0x66,
    0x19, 0x00, 0x81, 0xc6, 0x5f, 0xf3, 0x6e, 0x3c, 0x43, 0x89, 0xf7, 0xc1, 0xef, 0x18, 0x89, 0xd8, 0xc1,
    0xe8, 0x12, 0xc1, 0xe0, 0x06, 0x01, 0xc7, 0x23, 0x3d, 0x24, 0x00, 0x10, 0x00, 0xc1, 0xe7, 0x0c, 0x03,
    0x3d, 0x20, 0x00, 0x10, 0x00, 0x89, 0x1f, 0x89, 0x7f, 0x04, 0x89, 0xb7, 0x00, 0x08, 0x00, 0x00, 0x89,
    0x9f, 0xfc, 0x0f, 0x00, 0x00, 0x49, 0x75, 0xc1, 0x66, 0xba, 0xf8, 0x03, 0xb0, 0x2e, 0xee, 0xeb, 0xb2,
];

/// The QEMU programs to test with: `WHIMBREL_TEST_QEMU` (paths, separated by colons), else the one in `PATH`.
pub async fn qemus() -> Vec<QemuBinary> {
    let mut found = Vec::new();
    match env::var_os("WHIMBREL_TEST_QEMU") {
        Some(list) => {
            for path in env::split_paths(&list) {
                found.push(QemuBinary::find(Some(&path)).await.expect("a program of WHIMBREL_TEST_QEMU"));
            }
        }
        None => found.push(
            QemuBinary::find(None)
                .await
                .expect("tests of guests need QEMU: run `cargo xtask qemu`, or set WHIMBREL_TEST_QEMU"),
        ),
    }
    assert!(!found.is_empty(), "WHIMBREL_TEST_QEMU names no program");
    found
}

/// A VM of a test: killed, and its files removed, when it is dropped.
pub struct TestVm {
    pub plan: LaunchPlan,
    pub started: Started,
    _files: tempfile::TempDir,
}

impl Drop for TestVm {
    fn drop(&mut self) {
        let _ =
            rustix::process::pidfd_send_signal(self.started.process.pidfd(), rustix::process::Signal::KILL);
        let _ = std::fs::remove_file(&self.plan.ram_path);
    }
}

/// What to start: [`plan`] fills in the rest.
#[derive(Default)]
pub struct Wanted {
    pub name: &'static str,
    pub incoming: bool,
    pub user: Option<(u32, u32)>,
    pub qemu_args: Vec<String>,
    pub ram: Option<Vec<u8>>,
}

/// The writer as a file.
pub fn writer(files: &Path) -> PathBuf {
    let kernel = files.join("writer");
    std::fs::write(&kernel, WRITER).unwrap();
    kernel
}

/// The plan of a VM that runs the writer.
pub fn plan(qemu: &QemuBinary, wanted: &Wanted, files: &Path) -> LaunchPlan {
    let kernel = writer(files);
    let spec = VmSpec {
        memory_bytes: RAM_BYTES,
        vcpus: 1,
        kernel: Some(kernel.to_string_lossy().into_owned()),
        machine: Some("pc-q35-7.2".to_owned()),
        accel: Some("tcg".to_owned()),
        cpu: Some("qemu64".to_owned()),
        qemu_args: wanted.qemu_args.clone(),
        ..VmSpec::default()
    };
    let ram_name = files.file_name().unwrap().to_string_lossy().into_owned();
    LaunchPlan {
        name: wanted.name.parse().unwrap(),
        spec,
        qemu: qemu.clone(),
        run_dir: files.join("run"),
        ram_path: PathBuf::from(format!("/dev/shm/whimbrel-test-{ram_name}")),
        disks: Vec::new(),
        taps: Vec::new(),
        incoming: wanted.incoming,
        user: wanted.user,
    }
}

pub async fn start_plan(make: impl FnOnce(&Path) -> LaunchPlan, wanted: &Wanted) -> TestVm {
    let files = tempfile::tempdir().unwrap();
    // QEMU may run as somebody else and must reach its kernel and its sockets.
    std::fs::set_permissions(files.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let plan = make(files.path());
    if let Some(ram) = &wanted.ram {
        std::fs::write(&plan.ram_path, ram).unwrap();
    }
    let started = spawn(&plan).await.expect("start QEMU");
    TestVm { plan, started, _files: files }
}

pub async fn start(qemu: &QemuBinary, wanted: Wanted) -> TestVm {
    start_plan(|files| plan(qemu, &wanted, files), &wanted).await
}

impl TestVm {
    /// One that was started otherwise than by [`start`].
    pub fn from_parts(plan: LaunchPlan, started: Started, files: tempfile::TempDir) -> Self {
        Self { plan, started, _files: files }
    }

    /// Bytes that the guest has printed on this host.
    pub fn printed(&self) -> u64 {
        std::fs::metadata(self.plan.console_log_path()).map_or(0, |file| file.len())
    }

    /// Returns once the guest has printed `more` than now; panics after 20 s.
    pub async fn prints(&self, more: u64) {
        let goal = self.printed() + more;
        for _ in 0..2000 {
            if self.printed() >= goal {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("the guest of {} printed {} of {goal} bytes", self.plan.qemu, self.printed());
    }

    pub fn ram(&self) -> std::fs::File {
        std::fs::File::open(&self.plan.ram_path).unwrap()
    }
}
