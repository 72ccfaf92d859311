//! Command lines as people and libvirt write them, and what becomes of them.

use std::fs::File;

use whimbrel_wire::foreign::{ForeignArg, ForeignBus};
use whimbrel_wire::meta::VmSpec;

use super::facts::{Device, Drive, Facts};
use super::rewrite::{Plan, PlannedDisk, rewrite};
use crate::guest::binary::QemuBinary;
use crate::guest::launch::{DiskKind, DiskSocket, LaunchPlan, command_line};
use crate::guest::qmp::Version;

fn facts() -> Facts {
    Facts {
        machine: "pc-q35-7.2".into(),
        cpu: "qemu64".into(),
        accel: "tcg".into(),
        vcpus: 1,
        ram: vec![("pc.ram".into(), 256 << 20), ("pc.bios".into(), 256 << 10)],
        ..Facts::default()
    }
}

fn device(id: Option<&str>, number: u32, kind: &str, drive: Option<&str>) -> Device {
    let path = match id {
        Some(id) => format!("/machine/peripheral/{id}"),
        None => format!("/machine/peripheral-anon/device[{number}]"),
    };
    Device {
        path,
        id: id.map(str::to_owned),
        kind: kind.into(),
        bus: "pcie.0".into(),
        addr: Some(8 * (number + 3)),
        drive: drive.map(str::to_owned),
        geometry: drive.map(|_| [130, 16, 63]),
        queues: Some(1),
    }
}

fn drive(name: &str, node: &str, device: &Device) -> Drive {
    Drive {
        name: name.into(),
        node: node.into(),
        device: format!("{}/virtio-backend", device.path),
        source: "/srv/disk.qcow2".into(),
        size_bytes: 64 << 20,
        read_only: false,
    }
}

/// A command line as a shell would split it.
fn words(line: &str) -> Vec<String> {
    line.split_whitespace().map(str::to_owned).collect()
}

fn started(plan: &Plan, incoming: bool) -> Vec<String> {
    let spec = VmSpec {
        memory_bytes: plan.memory_bytes,
        vcpus: 1,
        volumes: (0..plan.disks.len()).map(|n| format!("v{n}").parse().unwrap()).collect(),
        nets: plan.nets.clone(),
        machine: Some("pc-q35-7.2".into()),
        accel: Some("tcg".into()),
        cpu: Some(plan.cpu.clone()),
        foreign: Some(plan.foreign.clone()),
        ..VmSpec::default()
    };
    let disk = |n: usize| DiskSocket {
        id: format!("v{n}").parse().unwrap(),
        socket_path: format!("/run/w/vm/disk{n}.sock").into(),
        kind: DiskKind::Nbd,
    };
    let version = Version { major: 10, minor: 0, micro: 2 };
    let launch = LaunchPlan {
        name: "web".parse().unwrap(),
        qemu: QemuBinary { path: "/usr/bin/qemu-system-x86_64".into(), version, firmware: Vec::new() },
        run_dir: "/run/w/vm".into(),
        ram_path: "/dev/shm/w,eb.ram".into(),
        disks: (0..plan.disks.len()).map(disk).collect(),
        taps: plan.nets.iter().map(|_| File::open("/dev/null").unwrap().into()).collect(),
        incoming,
        user: None,
        spec,
    };
    command_line(&launch).unwrap().into_iter().map(|word| word.into_string().unwrap()).collect()
}

fn has(line: &[String], option: &str, value: &str) -> bool {
    line.windows(2).any(|pair| pair == [option, value])
}

#[test]
fn a_line_typed_by_hand_keeps_its_machine_and_loses_what_is_of_this_host() {
    let blk = device(None, 1, "virtio-blk-pci", Some("virtio0"));
    let mut facts = facts();
    facts.devices = vec![device(Some("n"), 0, "virtio-net-pci", None), blk.clone()];
    facts.drives = vec![drive("virtio0", "#block101", &blk)];
    facts.tap_names.insert("net0".into(), "tap7".into());
    facts.bridges.insert("tap7".into(), "br0".into());
    let plan = rewrite(
        &words(
            "-name web -M q35 -enable-kvm -m 256M -smp 1 -nographic -daemonize -pidfile /run/web.pid \
             -drive file=/srv/disk.qcow2,if=virtio,cache=writethrough,werror=stop \
             -netdev tap,id=net0,script=/etc/up -device virtio-net-pci,netdev=net0,id=n,mac=52:54:00:00:00:09 \
             -qmp unix:/run/web.qmp,server=on,wait=off -monitor stdio",
        ),
        &facts,
    );
    assert_eq!(plan.refusals, Vec::<String>::new());
    let line = started(&plan, true);
    let text = line.join(" ");
    for gone in ["web.pid", "daemonize", "/srv", "/etc/up", "web.qmp", "stdio"] {
        assert!(!text.contains(gone), "{gone}: {text}");
    }
    assert!(has(&line, "-machine", "type=pc-q35-7.2,memory-backend=pc.ram"), "{text}");
    assert!(has(&line, "-device", "virtio-net-pci,netdev=net0,id=n,mac=52:54:00:00:00:09"), "{text}");
    assert!(
        text.contains("id=pc.ram,size=268435456,x-use-canonical-path-for-ramblock-id=off,mem-path=/dev/shm/w,,eb.ram,share=on"),
        "{text}"
    );
    // The device that -drive made, where it is, with what -drive said of it, after those that were stated.
    let disk = "driver=virtio-blk-pci,drive=whimbrel-disk0,bus=pcie.0,addr=0x4.0x0,cyls=130,heads=16,secs=63,werror=stop,write-cache=off";
    assert!(has(&line, "-device", disk), "{text}");
    let place = |what: &str| line.iter().position(|word| word.contains(what)).unwrap();
    assert!(place("virtio-net-pci") < place(disk));
    assert!(text.contains(r#""path":"/run/w/vm/disk0.sock""#) && text.contains("reconnect-delay"), "{text}");
    assert!(has(&line, "-serial", "chardev:whimbrel-serial0") && has(&line, "-monitor", "none"), "{text}");
    assert!(text.contains("path=/run/w/vm/console.sock"), "{text}");
    assert!(has(&line, "-incoming", "defer") && line.last().is_some_and(|word| word == "-S"));
    assert!(!started(&plan, false).contains(&"-incoming".to_owned()));
    assert_eq!(plan.nets[0].bridge, "br0");
    assert_eq!(plan.disks, [PlannedDisk::Drive(facts.drives[0].clone())]);
    assert_eq!(plan.foreign.ram_block.as_deref(), Some("pc.ram"));
}

#[test]
fn libvirts_line_is_understood() {
    let (root, blk) = (
        device(Some("pci.1"), 0, "pcie-root-port", None),
        device(Some("virtio-disk0"), 1, "virtio-blk-pci", Some("libvirt-1-format")),
    );
    let mut facts = facts();
    facts.devices = vec![
        root,
        blk.clone(),
        device(Some("net0"), 2, "virtio-net-pci", None),
        device(Some("serial0"), 4, "isa-serial", None),
    ];
    facts.drives = vec![drive("", "libvirt-1-format", &blk)];
    facts.tap_fds.insert("25".into(), "vnet0".into());
    facts.bridges.insert("vnet0".into(), "virbr0".into());
    let args = [
        "-name",
        "guest=x,debug-threads=on",
        "-S",
        "-object",
        r#"{"qom-type":"secret","id":"masterKey0","format":"raw","file":"/var/lib/libvirt/master-key.aes"}"#,
        "-machine",
        "pc-q35-7.2,usb=off,dump-guest-core=off,memory-backend=pc.ram",
        "-accel",
        "tcg",
        "-cpu",
        "qemu64",
        "-m",
        "size=262144k",
        "-object",
        r#"{"qom-type":"memory-backend-memfd","id":"pc.ram","share":true,"x-use-canonical-path-for-ramblock-id":false,"size":268435456,"hugetlb":true}"#,
        "-overcommit",
        "mem-lock=off",
        "-smp",
        "1,sockets=1,cores=1,threads=1",
        "-uuid",
        "c7a5fdbd-edaf-9455-926a-d65c16db1809",
        "-no-user-config",
        "-nodefaults",
        "-chardev",
        "socket,id=charmonitor,fd=24,server=on,wait=off",
        "-mon",
        "chardev=charmonitor,id=monitor,mode=control",
        "-rtc",
        "base=utc",
        "-no-shutdown",
        "-boot",
        "strict=on",
        "-device",
        r#"{"driver":"pcie-root-port","port":16,"chassis":1,"id":"pci.1","bus":"pcie.0","addr":"0x2"}"#,
        "-blockdev",
        r#"{"driver":"file","filename":"/var/lib/x.qcow2","node-name":"libvirt-1-storage","discard":"unmap"}"#,
        "-blockdev",
        r#"{"node-name":"libvirt-1-format","read-only":false,"driver":"qcow2","file":"libvirt-1-storage","backing":null}"#,
        "-device",
        r#"{"driver":"virtio-blk-pci","bus":"pci.1","addr":"0x0","drive":"libvirt-1-format","id":"virtio-disk0","bootindex":1}"#,
        "-netdev",
        r#"{"type":"tap","fd":"25","vhost":true,"vhostfd":"26","id":"hostnet0"}"#,
        "-device",
        r#"{"driver":"virtio-net-pci","netdev":"hostnet0","id":"net0","mac":"52:54:00:aa:bb:cc","bus":"pcie.0","addr":"0x3"}"#,
        "-chardev",
        "pty,id=charserial0",
        "-device",
        r#"{"driver":"isa-serial","chardev":"charserial0","id":"serial0","index":0}"#,
        "-audiodev",
        r#"{"id":"audio1","driver":"none"}"#,
        "-vnc",
        "127.0.0.1:0,audiodev=audio1",
        "-display",
        "none",
        "-sandbox",
        "on,obsolete=deny",
        "-msg",
        "timestamp=on",
    ];
    let args: Vec<String> = args.iter().map(|word| (*word).to_owned()).collect();
    let plan = rewrite(&args, &facts);
    assert_eq!(plan.refusals, Vec::<String>::new());
    let line = started(&plan, true);
    let text = line.join(" ");
    for gone in ["master-key", "/var/lib", "pty", "fd=24", "hugetlb", "127.0.0.1", "vhostfd"] {
        assert!(!text.contains(gone), "{gone}: {text}");
    }
    let object = line.iter().find(|word| word.contains("memory-backend-file")).unwrap();
    let object: serde_json::Value = serde_json::from_str(object).unwrap();
    assert_eq!(
        (object["share"].as_bool(), object["mem-path"].as_str()),
        (Some(true), Some("/dev/shm/w,eb.ram"))
    );
    let disk = line.iter().find(|word| word.contains("virtio-disk0")).unwrap();
    let disk: serde_json::Value = serde_json::from_str(disk).unwrap();
    assert_eq!((disk["drive"].as_str(), disk["bus"].as_str()), (Some("whimbrel-disk0"), Some("pci.1")));
    assert_eq!((disk["cyls"].as_u64(), disk["bootindex"].as_u64()), (Some(130), Some(1)));
    assert!(text.contains("tap,id=hostnet0,fd=") && plan.nets[0].mac == "52:54:00:aa:bb:cc");
    assert!(has(&line, "-vnc", "unix:/run/w/vm/vnc.sock"), "{text}");
    assert_eq!(text.matches("-sandbox").count(), 1);
    let console = |arg: &&ForeignArg| matches!(arg, ForeignArg::Socket { id, console: true, .. } if id == "charserial0");
    assert_eq!(plan.foreign.args.iter().filter(console).count(), 1);
}

#[test]
fn a_volume_of_ours_stays_on_its_device() {
    let mut facts = facts();
    facts.devices = vec![Device { queues: Some(3), ..device(Some("d"), 0, "vhost-user-blk-pci", None) }];
    facts.own_sockets.insert("/run/w/v.sock".into(), "v".parse().unwrap());
    let line = |reconnect: &str| {
        words(&format!(
            "-nodefaults -m 1G -object memory-backend-file,id=pc.ram,size=256M,mem-path=/dev/shm/x,share=on \
             -machine q35,memory-backend=pc.ram -chardev socket,id=c,path=/run/w/v.sock{reconnect} \
             -device vhost-user-blk-pci,id=d,chardev=c"
        ))
    };
    let plan = rewrite(&line(",reconnect=1"), &facts);
    assert_eq!(plan.refusals, Vec::<String>::new());
    assert!(matches!(&plan.disks[..], [PlannedDisk::Ours { volume, .. }] if volume.as_str() == "v"));
    assert_eq!((plan.foreign.disks[0].bus, plan.foreign.disks[0].queues), (ForeignBus::VhostUserBlk, 3));
    let started = started(&plan, false);
    assert!(
        has(&started, "-chardev", "socket,id=c,path=/run/w/vm/disk0.sock,reconnect-ms=100"),
        "{started:?}"
    );
    let plan = rewrite(&line(""), &facts);
    assert!(plan.refusals[0].contains("reconnect=1 to chardev c"), "{:?}", plan.refusals);
    facts.own_sockets.clear();
    let plan = rewrite(&line(",reconnect=1"), &facts);
    assert!(plan.refusals[0].contains("/run/w/v.sock is not a volume"), "{:?}", plan.refusals);
}

#[test]
fn every_refusal_names_its_argument() {
    let blk = device(Some("d"), 0, "virtio-blk-pci", Some("x"));
    let table: &[(&str, &[&str])] = &[
        ("-drive if=pflash,file=/OVMF.fd", &["-drive if=pflash", "firmware"]),
        ("-pflash /OVMF.fd", &["-pflash", "firmware"]),
        ("-cdrom /x.iso", &["-cdrom /x.iso", "medium"]),
        ("-drive file=/x.iso,media=cdrom", &["-drive file=/x.iso", "medium"]),
        ("-hda /x.img", &["-hda", "if=virtio"]),
        ("/x.img", &["-hda /x.img"]),
        ("-snapshot", &["-snapshot"]),
        ("-readconfig /x.cfg", &["-readconfig"]),
        ("-netdev user,id=u", &["-netdev user,id=u", "tap"]),
        ("-netdev tap,id=t,fd=3", &["-netdev tap", "cannot be found"]),
        ("-netdev tap,id=t,ifname=tap9", &["tap9", "bridge"]),
        ("-netdev tap,id=t,fds=3:4", &["several queues"]),
        ("-nic tap,model=virtio", &["-nic tap", "-netdev and -device"]),
        ("-chardev socket,id=c,host=h,port=1,server=on", &["-chardev socket,id=c", "unix socket"]),
        ("-chardev socket,id=c,path=/swtpm.sock", &["-chardev socket,id=c", "another program"]),
        ("-serial tcp::4444,server=on", &["-serial tcp", "unix socket"]),
        ("-spice port=5900", &["-spice"]),
        ("-tpmdev emulator,id=t,chardev=c", &["-tpmdev"]),
        ("-virtfs local,path=/x,mount_tag=t,security_model=none", &["-virtfs"]),
        ("-object tls-creds-x509,id=t,dir=/x", &["-object tls-creds-x509"]),
        ("-fw_cfg name=opt/x,file=/x", &["-fw_cfg"]),
        ("-bios /x/bios.bin", &["-bios"]),
        ("-machine q35,pflash0=f", &["pflash0"]),
        ("-smp 4", &["-smp 4", "1 processors"]),
        ("-frobnicate", &["-frobnicate"]),
        ("-device virtio-rng-pci,id=gone", &["id=gone", "unplugged"]),
    ];
    for (line, expected) in table {
        let plan = rewrite(&words(&format!("-nodefaults -m 256M {line}")), &facts());
        let all = plan.refusals.join("; ");
        assert!(expected.iter().all(|word| all.contains(word)), "{line}: {all:?}");
    }
    // What QEMU has, and the command line does not say.
    let mut facts = facts();
    facts.devices = vec![blk.clone()];
    let all = rewrite(&words("-nodefaults -m 256M"), &facts).refusals.join("; ");
    assert!(all.contains("device d (virtio-blk-pci)") && all.contains("plugged in after the start"), "{all}");
    facts.drives = vec![Drive { read_only: true, ..drive("x", "n", &blk) }];
    let line = "-nodefaults -m 256M -drive if=none,id=x,file=/x -device virtio-blk-pci,id=d,drive=x";
    let all = rewrite(&words(line), &facts).refusals.join("; ");
    assert!(all.contains("read-only") && all.contains("/srv/disk.qcow2"), "{all}");
    let all = rewrite(&words("-m 256M"), &Facts::default()).refusals.join("; ");
    assert!(all.contains("user-mode network") && all.contains("main memory"), "{all}");
    // A drive that no device of the command line explains.
    facts.devices.clear();
    facts.drives =
        vec![Drive { device: "/machine/unattached/device[5]".into(), ..drive("ide0-hd0", "n", &blk) }];
    let all = rewrite(&words("-nodefaults -m 256M"), &facts).refusals.join("; ");
    assert!(all.contains("drive ide0-hd0 (/srv/disk.qcow2)"), "{all}");
}

#[test]
fn sockets_keep_their_names_unless_those_are_ours() {
    let line = "-nodefaults -m 256M -chardev socket,id=a,path=/x/beat.sock,server=on -chardev \
        socket,id=b,path=/y/beat.sock,server=on -chardev socket,id=c/d,path=/z/qmp.sock,server=on,mux=on";
    let plan = rewrite(&words(line), &facts());
    assert_eq!(plan.refusals, Vec::<String>::new());
    let text = started(&plan, false).join(" ");
    assert!(text.contains("id=a,path=/run/w/vm/beat.sock,"), "{text}");
    assert!(text.contains("id=b,path=/run/w/vm/chardev-b.sock,"), "{text}");
    assert!(text.contains("path=/run/w/vm/chardev-c_d.sock,server=on,wait=off,mux=on"), "{text}");
}

#[test]
fn several_ram_blocks_stay_private_or_are_refused() {
    let mut facts = facts();
    facts.ram = vec![("r0".into(), 128 << 20), ("r1".into(), 128 << 20)];
    let line = |kind: &str| {
        words(&format!(
            "-nodefaults -m 256M -object {kind},id=r0,size=128M -object {kind},id=r1,size=128M \
             -numa node,memdev=r0 -numa node,memdev=r1"
        ))
    };
    let plan = rewrite(&line("memory-backend-ram"), &facts);
    assert_eq!(
        (plan.refusals.len(), plan.memory_bytes, plan.foreign.ram_block.as_deref()),
        (0, 256 << 20, None)
    );
    let text = started(&plan, false).join(" ");
    assert!(text.contains("memory-backend-ram,id=r1") && !text.contains("memory-backend=r"), "{text}");
    let plan = rewrite(&line("memory-backend-file,mem-path=/dev/shm/r"), &facts);
    assert_eq!(plan.refusals.len(), 2, "{:?}", plan.refusals);
}

#[test]
fn a_plan_survives_the_record() {
    let blk = device(Some("d"), 0, "virtio-blk-pci", Some("x"));
    let mut facts = facts();
    facts.devices = vec![blk.clone()];
    facts.drives = vec![drive("x", "n", &blk)];
    let line =
        "-nodefaults -m 256M -drive if=none,id=x,file=/x -device virtio-blk-pci,id=d,drive=x -serial stdio";
    let foreign = rewrite(&words(line), &facts).foreign;
    let text = serde_json::to_string(&foreign).unwrap();
    assert_eq!(serde_json::from_str::<whimbrel_wire::foreign::ForeignSpec>(&text).unwrap(), foreign);
}

proptest::proptest! {
    #[test]
    fn no_command_line_makes_it_panic(line in proptest::collection::vec("-?[a-z]{1,8}|[a-z=,{}\":.0-9]{0,24}", 0..12)) {
        let plan = rewrite(&line, &facts());
        proptest::prop_assert!(plan.disks.is_empty());
    }
}
