//! What the precheck says of QEMUs that were started in all sorts of ways.

use std::process::{Child, Command, Stdio};
use std::time::Duration;

use serde_json::{Value, json};
use whimbrel_host::guest::binary::QemuBinary;
use whimbrel_host::guest::launch::ram_bytes;
use whimbrel_host::guest::precheck::{HostFacts, MovedBy, Report, precheck, ram_sizes};
use whimbrel_host::guest::process::QemuProcess;
use whimbrel_host::guest::qmp::Qmp;
use whimbrel_wire::meta::Mode;

use crate::support::{Wanted, qemus, start};

/// A QEMU that somebody else started.
struct Foreign {
    child: Child,
    files: tempfile::TempDir,
}

impl Drop for Foreign {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Foreign {
    fn start(qemu: &QemuBinary, args: &[&str]) -> Self {
        let files = tempfile::tempdir().unwrap();
        let socket = format!("unix:{}/qmp,server=on,wait=off", files.path().display());
        let mut command = Command::new(&qemu.path);
        for dir in &qemu.firmware {
            command.arg("-L").arg(dir);
        }
        command.args(["-nodefaults", "-display", "none", "-accel", "tcg", "-qmp", &socket]).args(args);
        Self { child: command.stdin(Stdio::null()).spawn().unwrap(), files }
    }

    async fn look(&self) -> Report {
        let path = self.files.path().join("qmp");
        for _ in 0..500 {
            match Qmp::connect(&path, Duration::from_secs(5)).await {
                Ok(qmp) => {
                    let process = QemuProcess::open(self.child.id()).unwrap();
                    return precheck(&qmp, &process, &HostFacts::probe()).await.unwrap();
                }
                Err(_) => tokio::time::sleep(Duration::from_millis(10)).await,
            }
        }
        panic!("no QMP at {}", path.display());
    }
}

fn has(list: &[String], words: &str) -> bool {
    list.iter().any(|one| one.contains(words))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_vm_of_ours_moves_in_mode_a_and_every_block_is_accounted_for() {
    for qemu in qemus().await {
        let vm = start(&qemu, Wanted { name: "ours", ..Wanted::default() }).await;
        let report = precheck(&vm.started.qmp, &vm.started.process, &HostFacts::probe()).await.unwrap();
        assert_eq!(report.mode, Some(Mode::A), "{report:#?}");
        assert_eq!(report.memory_bytes(), ram_bytes(&vm.plan.spec));
        assert_eq!((report.machine.as_str(), report.cpu.as_str(), report.vcpus), ("pc-q35-7.2", "qemu64", 1));
        assert_eq!((report.accel.as_str(), report.qemu_version), ("tcg", qemu.version));
        assert!(
            report.ram.iter().any(|block| block.name == "pc.bios" && block.moved_by == MovedBy::QemuStream)
        );
        let ram = report.ram.iter().find(|block| block.moved_by == MovedBy::Us).unwrap();
        assert_eq!(ram.path.as_deref(), Some(vm.plan.ram_path.as_path()));
        assert_eq!(ram.mappings.iter().map(|one| one.length).sum::<u64>(), report.memory_bytes());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn private_memory_leaves_mode_b_and_says_what_to_change() {
    for qemu in qemus().await {
        // 8 KiB less than 64 MiB: see `old_versions_under_tcg_lose_even_sizes`.
        let report = Foreign::start(&qemu, &["-machine", "pc", "-m", "65528k", "-S"]).look().await;
        assert_eq!(report.mode, Some(Mode::B), "{report:#?}");
        assert!(has(&report.mode_a_reasons, "pc.ram is not a named file"), "{report:#?}");
        assert!(has(&report.mode_a_reasons, "memory-backend-file,share=on"), "{report:#?}");
        let memfd = ["-machine", "q35,memory-backend=m", "-m", "65528k", "-S", "-object"];
        let memfd = [memfd.as_slice(), &["memory-backend-memfd,id=m,size=65528k,share=on"]].concat();
        let report = Foreign::start(&qemu, &memfd).look().await;
        let block = report.ram.iter().find(|block| block.name == "m").unwrap();
        let named_only = (qemu.version.major, qemu.version.minor) >= (8, 1);
        assert_eq!(block.moved_by, if named_only { MovedBy::QemuStream } else { MovedBy::Nobody });
        assert_eq!(report.mode, Some(Mode::B), "{report:#?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn old_versions_under_tcg_lose_even_sizes() {
    for qemu in qemus().await {
        let report = Foreign::start(&qemu, &["-machine", "pc", "-m", "64M", "-S"]).look().await;
        let lost = qemu.version.major < 9;
        assert_eq!(report.mode, if lost { None } else { Some(Mode::B) }, "{report:#?}");
        assert_eq!(has(&report.refusals, "mode B: QEMU"), lost, "{report:#?}");
        assert_eq!(has(&report.refusals, "mode A: RAM block pc.ram"), lost, "{report:#?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_writes_guest_memory_unseen_is_named() {
    for qemu in qemus().await {
        let files = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let disk = files.path().join("disk.raw");
        std::fs::File::create(&disk).unwrap().set_len(1 << 20).unwrap();
        let wanted = |cache: &str| Wanted {
            name: "direct",
            qemu_args: vec![
                "-drive".to_owned(),
                format!("file={},format=raw,if=none,id=d0,cache={cache}", disk.display()),
                "-device".to_owned(),
                "virtio-blk-pci,drive=d0,id=blk0".to_owned(),
            ],
            ..Wanted::default()
        };
        for (cache, direct) in [("none", true), ("directsync", true), ("writeback", false)] {
            let vm = start(&qemu, wanted(cache)).await;
            let (qmp, process) = (&vm.started.qmp, &vm.started.process);
            let report = precheck(qmp, process, &HostFacts::probe()).await.unwrap();
            // Direct transfers do not prevent mode A; it has to wait for them.
            assert_eq!(report.mode, Some(Mode::A), "cache={cache}: {report:#?}");
            assert_eq!(report.disks.len(), 1);
            assert_eq!((report.disks[0].direct, report.disks[0].ours), (direct, false));
            let expected = if direct { vec![disk.display().to_string()] } else { Vec::new() };
            assert_eq!(report.direct_io, expected, "cache={cache}");
            if direct {
                continue;
            }
            // Another program that writes to the RAM file is found by its mapping.
            let mut other = Command::new("python3");
            let program = format!(
                "import mmap, sys; f = open('{}', 'r+b'); m = mmap.mmap(f.fileno(), 4096); print('mapped', flush=True); \
                 sys.stdin.read()",
                vm.plan.ram_path.display()
            );
            other.args(["-c", &program]).stdin(Stdio::piped()).stdout(Stdio::piped());
            let mut other = other.spawn().unwrap();
            let mut said = [0; 7];
            std::io::Read::read_exact(other.stdout.as_mut().unwrap(), &mut said).unwrap();
            let report = precheck(qmp, process, &HostFacts::probe()).await.unwrap();
            assert_ne!(report.mode, Some(Mode::A), "{report:#?}");
            assert!(has(&report.mode_a_reasons, &format!("process {} (python3)", other.id())), "{report:#?}");
            drop(other.stdin.take());
            other.wait().unwrap();
            let report = precheck(qmp, process, &HostFacts::probe()).await.unwrap();
            assert_eq!(report.mode, Some(Mode::A), "{report:#?}");
        }
        let ivshmem =
            ["-object", "memory-backend-memfd,id=m0,size=1M,share=on", "-device", "ivshmem-plain,memdev=m0"];
        let qemu_args = ivshmem.map(str::to_owned).to_vec();
        let vm = start(&qemu, Wanted { name: "shared", qemu_args, ..Wanted::default() }).await;
        let report = precheck(&vm.started.qmp, &vm.started.process, &HostFacts::probe()).await.unwrap();
        assert!(has(&report.mode_a_reasons, "ivshmem"), "{report:#?}");
        assert_ne!(report.mode, Some(Mode::A));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn memory_that_is_plugged_in_while_the_guest_runs_shows() {
    for qemu in qemus().await {
        let qemu_args = ["-m", "slots=2,maxmem=1G"].map(str::to_owned).to_vec();
        let vm = start(&qemu, Wanted { name: "plugged", qemu_args, ..Wanted::default() }).await;
        let qmp = &vm.started.qmp;
        let before = ram_sizes(qmp).await.unwrap();
        let memory = json!({ "qom-type": "memory-backend-ram", "id": "more", "size": 128 << 20 });
        qmp.execute::<Value>("object-add", memory).await.unwrap();
        let dimm = json!({ "driver": "pc-dimm", "id": "dimm1", "memdev": "more" });
        qmp.execute::<Value>("device_add", dimm).await.unwrap();
        let mut added = ram_sizes(qmp).await.unwrap();
        added.retain(|block| !before.contains(block));
        assert_eq!(added, [("more".to_owned(), 128 << 20)], "{qemu}");
        let report = precheck(qmp, &vm.started.process, &HostFacts::probe()).await.unwrap();
        assert_ne!(report.mode, Some(Mode::A), "{report:#?}");
        assert!(has(&report.mode_a_reasons, "RAM block more is not a named file"), "{report:#?}");
    }
}
