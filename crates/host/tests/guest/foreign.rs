//! A QEMU that somebody started by hand, and its equal made from its command line: the state of the one fits the other.

use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use serde_json::{Value, json};
use whimbrel_host::export::DeviceSlot;
use whimbrel_host::export::nbd::{NbdOptions, NbdServer};
use whimbrel_host::guest::binary::QemuBinary;
use whimbrel_host::guest::device_state::{Loader, Saver};
use whimbrel_host::guest::foreign::{self, Plan};
use whimbrel_host::guest::launch::{DiskKind, DiskSocket, LaunchPlan};
use whimbrel_host::guest::precheck::{HostFacts, precheck};
use whimbrel_host::guest::process::spawn;
use whimbrel_host::guest::qmp::Qmp;
use whimbrel_wire::meta::VmSpec;

use crate::support::{TestVm, qemus, writer};

const RAM_KIB: u64 = 131_064;
const DISK_BYTES: u64 = 4 << 20;

/// Ended when it is dropped, however the test ends.
struct Ended(Child);

impl Drop for Ended {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

struct ByHand {
    child: Ended,
    files: tempfile::TempDir,
    ram: PathBuf,
    qmp: Qmp,
}

impl Drop for ByHand {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.ram);
    }
}

/// With everything that QEMU adds of its own accord but a network: a screen, a CD drive, serial and parallel ports.
async fn by_hand(qemu: &QemuBinary, args: &[&str]) -> ByHand {
    let files = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let name = files.path().file_name().unwrap().to_string_lossy().into_owned();
    let ram = PathBuf::from(format!("/dev/shm/whimbrel-test-{name}"));
    for disk in ["a", "b"] {
        std::fs::write(files.path().join(disk), vec![1; DISK_BYTES as usize]).unwrap();
    }
    let kernel = writer(files.path());
    let mut command = Command::new(&qemu.path);
    for dir in &qemu.firmware {
        command.arg("-L").arg(dir);
    }
    command.args([
        "-M",
        "q35,accel=tcg,memory-backend=mem",
        "-cpu",
        "qemu64",
        "-nic",
        "none",
        "-display",
        "none",
    ]);
    command.args(["-m", &format!("{RAM_KIB}k"), "-kernel", &kernel.to_string_lossy()]);
    command.args([
        "-object",
        &format!(
            "memory-backend-file,id=mem,size={RAM_KIB}k,mem-path={},share=on,prealloc=off",
            ram.display()
        ),
    ]);
    command.args(["-qmp", "unix:qmp,server=on,wait=off"]).args(args).current_dir(files.path());
    let child = Ended(command.stdin(Stdio::null()).stdout(Stdio::null()).spawn().unwrap());
    for _ in 0..500 {
        if let Ok(qmp) = Qmp::connect(&files.path().join("qmp"), Duration::from_secs(5)).await {
            return ByHand { child, files, ram, qmp };
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("{qemu} started by hand has no QMP");
}

async fn plan_for(vm: &ByHand) -> Plan {
    let process = foreign::process_behind(&vm.qmp).await.unwrap();
    assert_eq!(process.pid(), vm.child.0.id());
    let facts = HostFacts::probe();
    let report = precheck(&vm.qmp, &process, &facts).await.unwrap();
    let facts =
        foreign::collect(&vm.qmp, &process, &report, std::collections::BTreeMap::new()).await.unwrap();
    foreign::rewrite(&foreign::words_of(&process).unwrap(), &facts)
}

/// Its equal, waiting for its state, disks not served yet.
async fn equal(qemu: &QemuBinary, plan: &Plan) -> (TestVm, Vec<NbdServer>) {
    let files = tempfile::tempdir().unwrap();
    let run_dir = files.path().join("run");
    let (mut servers, mut disks) = (Vec::new(), Vec::new());
    for (number, _) in plan.disks.iter().enumerate() {
        let socket_path = files.path().join(format!("{number}.sock"));
        let id: whimbrel_wire::Name = format!("v{number}").parse().unwrap();
        let options = NbdOptions { name: id.to_string(), ..NbdOptions::default() };
        servers.push(NbdServer::start(&socket_path, DeviceSlot::standby(DISK_BYTES), options).unwrap());
        disks.push(DiskSocket { id, socket_path, kind: DiskKind::Nbd });
    }
    let name = files.path().file_name().unwrap().to_string_lossy().into_owned();
    let launch = LaunchPlan {
        name: "equal".parse().unwrap(),
        spec: VmSpec {
            memory_bytes: plan.memory_bytes,
            vcpus: 1,
            volumes: disks.iter().map(|disk| disk.id.clone()).collect(),
            machine: Some("q35".into()),
            accel: Some("tcg".into()),
            cpu: Some(plan.cpu.clone()),
            foreign: Some(plan.foreign.clone()),
            ..VmSpec::default()
        },
        qemu: qemu.clone(),
        run_dir,
        ram_path: PathBuf::from(format!("/dev/shm/whimbrel-test-{name}")),
        disks,
        taps: Vec::new(),
        incoming: true,
        user: None,
    };
    let started = spawn(&launch).await.expect("start its equal");
    (TestVm::from_parts(launch, started, files), servers)
}

async fn pci(qmp: &Qmp) -> Value {
    let mut buses: Value = qmp.execute("query-pci", json!({})).await.unwrap();
    // Names are not part of what the guest sees.
    fn strip(value: &mut Value) {
        match value {
            Value::Object(map) => {
                map.remove("qdev_id");
                map.values_mut().for_each(strip);
            }
            Value::Array(list) => list.iter_mut().for_each(strip),
            _ => {}
        }
    }
    strip(&mut buses);
    buses
}

#[tokio::test(flavor = "multi_thread")]
async fn the_state_of_one_started_by_hand_fits_its_equal() {
    let stated = r#"{"driver":"virtio-blk-pci","drive":"node-b","id":"stated","num-queues":2}"#;
    let node = r#"{"driver":"raw","node-name":"node-b","file":{"driver":"file","filename":"b"}}"#;
    let lines: [&[&str]; 2] = [
        &[
            "-drive",
            "file=a,format=raw,if=virtio,werror=stop",
            "-device",
            "virtio-rng-pci",
            "-blockdev",
            node,
            "-device",
            stated,
            "-device",
            "virtio-balloon-pci,id=balloon",
        ],
        &[
            "-nographic",
            "-smp",
            "1",
            "-drive",
            "file=b,format=raw,if=none,id=d,cache=writethrough",
            "-device",
            "virtio-serial-pci",
            "-device",
            "virtio-blk-pci,drive=d,addr=0x9",
            "-chardev",
            "socket,id=port,path=port.sock,server=on,wait=off",
            "-device",
            "virtserialport,chardev=port,name=p",
            "-monitor",
            "none",
            "-serial",
            "file:serial.log",
            "-rtc",
            "base=utc",
            "-usb",
            "-device",
            "usb-tablet",
        ],
    ];
    for qemu in qemus().await {
        for line in lines {
            let hand = by_hand(&qemu, line).await;
            let plan = plan_for(&hand).await;
            assert_eq!(plan.refusals, Vec::<String>::new(), "{qemu}: {line:?}");
            let (equal, _servers) = equal(&qemu, &plan).await;
            let state = Saver::new(&hand.qmp).await.unwrap().save().await.unwrap();
            std::fs::copy(&hand.ram, &equal.plan.ram_path).unwrap();
            let before = pci(&hand.qmp).await;
            let loader = Loader::new(&equal.started.qmp).await.unwrap();
            loader
                .load(&state)
                .await
                .unwrap_or_else(|error| panic!("{qemu}: {line:?}: {error}; {:?}", plan.foreign.args));
            assert_eq!(pci(&equal.started.qmp).await, before, "{qemu}: {line:?}");
            let drives: Vec<Value> = equal.started.qmp.execute("query-block", json!({})).await.unwrap();
            let on_nbd = drives.iter().filter(|drive| drive.pointer("/inserted/drv") == Some(&json!("nbd")));
            assert_eq!(on_nbd.count(), plan.disks.len());
            assert!(hand.files.path().exists());
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_plugged_in_or_out_since_the_start_is_found() {
    for qemu in qemus().await {
        let args = [
            "-device",
            "pcie-root-port,id=rp,chassis=1",
            "-device",
            "qemu-xhci,id=usb",
            "-device",
            "usb-kbd,id=kbd,bus=usb.0",
        ];
        let hand = by_hand(&qemu, &args).await;
        assert_eq!(plan_for(&hand).await.refusals, Vec::<String>::new());
        let late = json!({ "driver": "virtio-rng-pci", "id": "late", "bus": "rp" });
        hand.qmp.execute::<Value>("device_add", late).await.unwrap();
        hand.qmp.execute::<Value>("device_del", json!({ "id": "kbd" })).await.unwrap();
        let refusals = plan_for(&hand).await.refusals;
        let has = |words: &[&str]| refusals.iter().any(|why| words.iter().all(|word| why.contains(word)));
        assert!(has(&["device late", "plugged in after the start"]), "{refusals:?}");
        assert!(has(&["id=kbd", "unplugged"]), "{refusals:?}");
        assert_eq!(refusals.len(), 2, "{refusals:?}");
    }
}
