//! The command line of a VM: a pure function of its plan, and equal at source and target where it must be.
//!
//! ```text
//!   pcie.0   0x02 virtio-rng     0x04 … 0x0b net0 …     0x10 … 0x1d disk0 …     (0x1f: the chipset's own)
//! ```
//!
//! Invariants
//! * Two plans with the same spec make the same devices at the same PCI addresses, whatever the sockets, paths and
//!   descriptors on their hosts; only so can one load the other's device state.
//! * RAM is one named file, mapped shared: what mode A needs, and what vhost-user needs.
//! * Nothing a guest or an image says reaches the command line; paths are quoted for QEMU's option parser.
//!
//! Not here: making the files and sockets, starting the process (`process`).

use std::ffi::OsString;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use whimbrel_wire::Name;
use whimbrel_wire::meta::VmSpec;

use crate::error::{Error, ErrorKind, Result};
use crate::guest::binary::QemuBinary;
use crate::guest::qmp::Version;

/// Most disks a VM has.
pub const DISKS_MAX: usize = 14;
/// Most network interfaces a VM has.
pub const NETS_MAX: usize = 8;
/// Milliseconds between two attempts to reach the disk's server after it went away.
const RECONNECT_MS: u32 = 100;
/// What QEMU may no longer do once it runs.
pub(super) const SANDBOX: &str = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny";
/// `-device` id, `-object` id and RAM block of the guest's memory.
pub const RAM_ID: &str = "ram";

/// How a disk reaches QEMU.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DiskKind {
    /// Shared memory and event descriptors: the fast one.
    #[default]
    VhostUserBlk,
    /// Over the socket; where a back-end cannot map the guest's memory.
    Nbd,
}

/// One disk and the socket that serves it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskSocket {
    /// The volume's name, which the guest sees as the disk's serial number (NBD only) and people see in QMP.
    pub id: Name,
    /// Where its server listens.
    pub socket_path: PathBuf,
    /// What its server speaks.
    pub kind: DiskKind,
}

/// All that is needed to start a VM on this host.
#[derive(Debug)]
pub struct LaunchPlan {
    /// The VM's name.
    pub name: Name,
    /// How it is to be started; `machine`, `accel` and `cpu` are settled ([`settle`]).
    pub spec: VmSpec,
    /// The program.
    pub qemu: QemuBinary,
    /// Directory for its sockets and logs; made by `process::spawn`, owned by the VM's user.
    pub run_dir: PathBuf,
    /// The file that is its RAM, on tmpfs or hugetlbfs; made by `process::spawn` unless it is there already.
    pub ram_path: PathBuf,
    /// Its disks, in the order of `spec.volumes`.
    pub disks: Vec<DiskSocket>,
    /// Its taps, in the order of `spec.nets`.
    pub taps: Vec<OwnedFd>,
    /// Wait for device state from another host, and stay paused after it.
    pub incoming: bool,
    /// User and group it runs as; ours if none.
    pub user: Option<(u32, u32)>,
}

impl LaunchPlan {
    /// The agent's QMP socket.
    pub fn qmp_path(&self) -> PathBuf {
        self.run_dir.join("qmp.sock")
    }

    /// A second QMP socket, for people and tools.
    pub fn operator_qmp_path(&self) -> PathBuf {
        self.run_dir.join("qmp-operator.sock")
    }

    /// The serial console's socket.
    pub fn console_path(&self) -> PathBuf {
        self.run_dir.join("console.sock")
    }

    /// All that the serial console ever printed on this host.
    pub fn console_log_path(&self) -> PathBuf {
        self.run_dir.join("console.log")
    }

    /// The screen's socket (VNC), of an adopted VM that has one.
    pub fn screen_path(&self) -> PathBuf {
        self.run_dir.join("vnc.sock")
    }

    /// QEMU's own messages.
    pub fn log_path(&self) -> PathBuf {
        self.run_dir.join("qemu.log")
    }
}

/// Fills in what a VM keeps for life: a versioned machine type, the accelerator, the processor.
///
/// The accelerator is TCG unless `kvm` was asked for, or `prefer_kvm` is set and a probe shows that it works.
pub async fn settle(spec: &mut VmSpec, qemu: &QemuBinary, prefer_kvm: bool) -> Result<()> {
    use crate::guest::binary::Accel;
    let known = qemu.machine_types().await?;
    let machine = match spec.machine.take() {
        Some(machine) => machine,
        None => qemu.newest_machine().await?,
    };
    if !known.contains(&machine) {
        return Err(Error::new(
            ErrorKind::Unsupported,
            format!("start machine type {machine}: {qemu} does not know it"),
        )
        .hint("use a host with a newer QEMU, or a machine type that both hosts know"));
    }
    spec.machine = Some(machine);
    let accel = match spec.accel.as_deref() {
        Some("tcg") => Accel::Tcg,
        Some("kvm") => {
            if !qemu.accel_works(Accel::Kvm).await {
                let words = "start the VM with KVM: it does not work on this host";
                return Err(Error::new(ErrorKind::Missing, words)
                    .hint("check that /dev/kvm exists and runs guests, or use accel tcg"));
            }
            Accel::Kvm
        }
        Some(other) => {
            let words = format!("read the accelerator {other:?}: tcg or kvm");
            return Err(Error::new(ErrorKind::InvalidInput, words));
        }
        None if prefer_kvm => qemu.best_accel().await,
        None => Accel::Tcg,
    };
    spec.accel = Some(accel.as_str().to_owned());
    // `qemu64` and `max` differ between versions or hosts; these two do not within a machine type.
    let cpu = spec.cpu.take().unwrap_or_else(|| match accel {
        Accel::Tcg => "qemu64".to_owned(),
        Accel::Kvm => "x86-64-v2".to_owned(),
    });
    spec.cpu = Some(cpu);
    Ok(())
}

/// Bytes of RAM that QEMU is told to give a VM: under TCG 8 KiB less than asked for.
///
/// QEMU before 9.0 under TCG loses track of writes to a RAM block that is a whole multiple of 64 pages, and its own
/// migration stream (mode B) then leaves them behind: when it clears 64 bits of the dirty bitmap at once it does not
/// tell the processors' TLBs. Other sizes take the way that does. A function of the spec, so that both hosts agree.
pub fn ram_bytes(spec: &VmSpec) -> u64 {
    const WORD_BYTES: u64 = 64 * 4096;
    let tracked_badly = spec.accel.as_deref() == Some("tcg") && spec.memory_bytes.is_multiple_of(WORD_BYTES);
    // QEMU rounds up to 8 KiB.
    if tracked_badly { spec.memory_bytes.saturating_sub(8192) } else { spec.memory_bytes }
}

/// The RAM block that is a file; none if an adopted VM has several.
pub fn ram_block(spec: &VmSpec) -> Option<&str> {
    spec.foreign.as_ref().map_or(Some(RAM_ID), |foreign| foreign.ram_block.as_deref())
}

/// How many queues a disk of a VM has: a function of the spec, so that both hosts agree.
pub fn disk_queues(spec: &VmSpec, index: usize) -> u16 {
    if let Some(disk) = spec.foreign.as_ref().and_then(|foreign| foreign.disks.get(index)) {
        return disk.queues;
    }
    u16::try_from(spec.vcpus.clamp(1, 4)).unwrap_or(1)
}

/// The arguments of QEMU, without the program itself.
pub fn command_line(plan: &LaunchPlan) -> Result<Vec<OsString>> {
    check(plan)?;
    if let Some(foreign) = &plan.spec.foreign {
        return super::foreign::command_line(plan, foreign);
    }
    let mut line = Line::default();
    base(&mut line, plan);
    channels(&mut line, plan);
    for (index, tap) in plan.taps.iter().enumerate() {
        net(&mut line, plan, index, tap);
    }
    for (index, disk) in plan.disks.iter().enumerate() {
        self::disk(&mut line, plan, index, disk);
    }
    boot(&mut line, &plan.spec);
    if plan.incoming {
        line.pair("-incoming", "defer");
        // Stays paused until the move is committed.
        line.flag("-S");
    }
    // What an operator adds may need what the sandbox denies; then they state their own.
    if !plan.spec.qemu_args.iter().any(|argument| argument == "-sandbox") {
        line.pair("-sandbox", SANDBOX);
    }
    let run_dir = plan.run_dir.to_string_lossy();
    for argument in &plan.spec.qemu_args {
        line.flag(&argument.replace("{run}", &run_dir));
    }
    Ok(line.arguments)
}

fn check(plan: &LaunchPlan) -> Result<()> {
    let bad =
        |words: String| Err(Error::new(ErrorKind::InvalidInput, format!("start {}: {words}", plan.name)));
    let spec = &plan.spec;
    let page = 4096;
    if spec.memory_bytes == 0 || !spec.memory_bytes.is_multiple_of(page) {
        return bad(format!("memory of {} bytes is not a multiple of {page}", spec.memory_bytes));
    }
    if spec.vcpus == 0 {
        return bad("it has no processor".to_owned());
    }
    if plan.disks.len() > DISKS_MAX || spec.nets.len() > NETS_MAX {
        return bad(format!("at most {DISKS_MAX} disks and {NETS_MAX} networks"));
    }
    if plan.taps.len() != spec.nets.len() {
        return bad(format!("{} taps for {} networks", plan.taps.len(), spec.nets.len()));
    }
    if plan.disks.len() != spec.volumes.len() {
        return bad(format!("{} disk sockets for {} volumes", plan.disks.len(), spec.volumes.len()));
    }
    if spec.machine.is_none() || spec.accel.is_none() || spec.cpu.is_none() {
        return bad("machine, accelerator and processor are not settled".to_owned());
    }
    // An adopted VM's addresses are with its devices.
    if spec.foreign.is_none()
        && let Some(net) = spec.nets.iter().find(|net| !is_mac(&net.mac))
    {
        return bad(format!("{:?} is not a MAC address", net.mac));
    }
    Ok(())
}

fn is_mac(text: &str) -> bool {
    let parts: Vec<_> = text.split(':').collect();
    parts.len() == 6
        && parts.iter().all(|part| part.len() == 2 && part.bytes().all(|b| b.is_ascii_hexdigit()))
}

#[derive(Default)]
pub(super) struct Line {
    pub(super) arguments: Vec<OsString>,
}

impl Line {
    pub(super) fn flag(&mut self, flag: &str) {
        self.arguments.push(flag.into());
    }
    pub(super) fn pair(&mut self, flag: &str, value: impl Into<OsString>) {
        self.arguments.push(flag.into());
        self.arguments.push(value.into());
    }
}

/// A value within QEMU's `key=value,…` options, where a comma is doubled.
fn quoted(text: &str) -> String {
    text.replace(',', ",,")
}

pub(super) fn quoted_path(path: &Path) -> String {
    quoted(&path.to_string_lossy())
}

fn base(line: &mut Line, plan: &LaunchPlan) {
    let spec = &plan.spec;
    let text = |field: &Option<String>| quoted(field.as_deref().unwrap_or_default());
    for dir in &plan.qemu.firmware {
        line.pair("-L", dir.as_os_str());
    }
    line.pair("-name", format!("guest={},debug-threads=on", plan.name));
    line.flag("-nodefaults");
    line.flag("-no-user-config");
    line.pair("-display", "none");
    let machine = text(&spec.machine);
    line.pair("-machine", format!("{machine},accel={},memory-backend={RAM_ID}", text(&spec.accel)));
    line.pair("-cpu", spec.cpu.as_deref().unwrap_or_default());
    line.pair("-smp", spec.vcpus.to_string());
    let bytes = ram_bytes(spec);
    line.pair("-m", format!("size={bytes}b"));
    let ram = quoted_path(&plan.ram_path);
    line.pair("-object", format!("memory-backend-file,id={RAM_ID},size={bytes},mem-path={ram},share=on"));
    line.pair("-object", "rng-random,id=rng0,filename=/dev/urandom");
    line.pair("-device", "virtio-rng-pci,id=rng,rng=rng0,bus=pcie.0,addr=0x2");
}

fn channels(line: &mut Line, plan: &LaunchPlan) {
    for (id, path) in [("qmp0", plan.qmp_path()), ("qmp1", plan.operator_qmp_path())] {
        let path = quoted_path(&path);
        line.pair("-chardev", format!("socket,id={id},path={path},server=on,wait=off"));
        line.pair("-mon", format!("chardev={id},mode=control"));
    }
    let (path, log) = (quoted_path(&plan.console_path()), quoted_path(&plan.console_log_path()));
    let console = format!("socket,id=console,path={path},server=on,wait=off,logfile={log},logappend=on");
    line.pair("-chardev", console);
    line.pair("-device", "isa-serial,id=serial0,chardev=console");
}

fn net(line: &mut Line, plan: &LaunchPlan, index: usize, tap: &OwnedFd) {
    let mac = plan.spec.nets.get(index).map(|net| net.mac.as_str()).unwrap_or_default();
    line.pair("-netdev", format!("tap,id=tap{index},fd={},vhost=off", tap.as_raw_fd()));
    let address = 0x4 + index;
    // Without a ROM there is no network boot, and no file that could differ between versions.
    let device = format!(
        "virtio-net-pci,id=net{index},netdev=tap{index},mac={mac},romfile=,bus=pcie.0,addr={address:#x}"
    );
    line.pair("-device", device);
}

fn disk(line: &mut Line, plan: &LaunchPlan, index: usize, disk: &DiskSocket) {
    let path = quoted_path(&disk.socket_path);
    let place = format!("bus=pcie.0,addr={:#x},bootindex={}", 0x10 + index, index + 1);
    let queues = disk_queues(&plan.spec, index);
    match disk.kind {
        DiskKind::VhostUserBlk => {
            let reconnect = reconnect(plan.qemu.version);
            line.pair("-chardev", format!("socket,id=vhost{index},path={path},{reconnect}"));
            let device =
                format!("vhost-user-blk-pci,id=disk{index},chardev=vhost{index},num-queues={queues}");
            line.pair("-device", format!("{device},{place}"));
        }
        DiskKind::Nbd => {
            let server = format!("server.type=unix,server.path={path},export={}", disk.id);
            // Requests wait this long for the server to come back; an error to the guest is the last resort.
            let patience = "reconnect-delay=3600,discard=unmap,detect-zeroes=off";
            line.pair("-blockdev", format!("driver=nbd,node-name=node{index},{server},{patience}"));
            let device = format!("virtio-blk-pci,id=disk{index},drive=node{index},num-queues={queues}");
            line.pair("-device", format!("{device},serial={},{place}", serial_of(&disk.id)));
        }
    }
}

/// virtio-blk's serial number has 20 bytes.
fn serial_of(id: &Name) -> String {
    id.as_str().chars().take(20).collect()
}

/// Milliseconds since 9.2; whole seconds before.
pub(super) fn reconnect(version: Version) -> String {
    if (version.major, version.minor) >= (9, 2) {
        format!("reconnect-ms={RECONNECT_MS}")
    } else {
        "reconnect=1".to_owned()
    }
}

fn boot(line: &mut Line, spec: &VmSpec) {
    for (flag, value) in [("-kernel", &spec.kernel), ("-initrd", &spec.initrd), ("-append", &spec.append)] {
        if let Some(value) = value {
            line.pair(flag, value);
        }
    }
}

#[cfg(test)]
mod test {
    use super::*;
    use whimbrel_wire::meta::NetSpec;

    fn plan(version: Version) -> LaunchPlan {
        let spec = VmSpec {
            memory_bytes: 1 << 30,
            vcpus: 2,
            volumes: vec!["root".parse().unwrap(), "data".parse().unwrap()],
            nets: vec![NetSpec { bridge: "br0".into(), mac: "52:54:00:12:34:56".into() }],
            machine: Some("pc-q35-7.2".into()),
            accel: Some("tcg".into()),
            cpu: Some("qemu64".into()),
            qemu_args: vec!["-chardev".into(), "file,id=x,path={run}/x".into()],
            ..VmSpec::default()
        };
        let disk = |id: &str, kind| DiskSocket {
            id: id.parse().unwrap(),
            socket_path: format!("/run/whimbrel/a,b/{id}.sock").into(),
            kind,
        };
        LaunchPlan {
            name: "web-1".parse().unwrap(),
            spec,
            qemu: QemuBinary { path: "/usr/bin/qemu-system-x86_64".into(), version, firmware: Vec::new() },
            run_dir: "/run/whimbrel/vm/web-1".into(),
            ram_path: "/dev/shm/whimbrel/web-1".into(),
            disks: vec![disk("root", DiskKind::VhostUserBlk), disk("data", DiskKind::Nbd)],
            taps: vec![std::fs::File::open("/dev/null").unwrap().into()],
            incoming: false,
            user: None,
        }
    }

    const V7: Version = Version { major: 7, minor: 2, micro: 22 };
    const V10: Version = Version { major: 10, minor: 0, micro: 2 };

    fn text(plan: &LaunchPlan) -> Vec<String> {
        command_line(plan).unwrap().into_iter().map(|word| word.into_string().unwrap()).collect()
    }

    #[test]
    fn ram_under_tcg_has_no_size_whose_writes_old_versions_lose() {
        let bytes = |accel: &str, memory_bytes| {
            ram_bytes(&VmSpec { accel: Some(accel.into()), memory_bytes, ..VmSpec::default() })
        };
        assert_eq!(bytes("kvm", 1 << 30), 1 << 30);
        for asked in [1 << 30, (1 << 30) - 8192, 256 << 10] {
            let given = bytes("tcg", asked);
            assert!(
                given % (256 << 10) != 0 && given % 8192 == 0 && asked - given <= 8192,
                "{asked}: {given}"
            );
        }
    }

    #[test]
    fn ram_is_a_shared_named_file_and_disks_reconnect_as_the_version_spells_it() {
        let line = text(&plan(V7)).join(" ");
        assert!(line.contains(
            "memory-backend-file,id=ram,size=1073733632,mem-path=/dev/shm/whimbrel/web-1,share=on"
        ));
        assert!(line.contains("-machine pc-q35-7.2,accel=tcg,memory-backend=ram"));
        assert!(line.contains("socket,id=vhost0,path=/run/whimbrel/a,,b/root.sock,reconnect=1 "));
        assert!(line.contains("server.path=/run/whimbrel/a,,b/data.sock,export=data"));
        assert!(text(&plan(V10)).join(" ").contains(",reconnect-ms=100 "));
        assert!(line.contains("path=/run/whimbrel/vm/web-1/x"), "{{run}} is replaced");
    }

    #[test]
    fn source_and_target_have_the_same_devices() {
        let source = plan(V7);
        let mut target = plan(V10);
        target.run_dir = "/elsewhere".into();
        target.ram_path = "/dev/shm/other".into();
        target.incoming = true;
        let devices = |plan: &LaunchPlan| {
            let line = text(plan);
            let pairs = line
                .windows(2)
                .filter(|pair| matches!(pair[0].as_str(), "-device" | "-machine" | "-cpu" | "-m"));
            pairs.map(|pair| pair[1].clone()).collect::<Vec<_>>()
        };
        assert_eq!(devices(&source), devices(&target));
        let line = text(&target);
        assert!(
            line.windows(2).any(|pair| pair == ["-incoming", "defer"]) && line.contains(&"-S".to_owned())
        );
        assert!(!text(&source).contains(&"-S".to_owned()));
    }

    type Spoil = fn(&mut LaunchPlan);

    #[test]
    fn a_plan_that_makes_no_sense_is_refused_with_words() {
        let cases: [(&str, Spoil); 6] = [
            ("multiple of 4096", |plan| plan.spec.memory_bytes = 4097),
            ("no processor", |plan| plan.spec.vcpus = 0),
            ("0 taps for 1 networks", |plan| plan.taps.clear()),
            ("disk sockets", |plan| drop(plan.disks.pop())),
            ("not settled", |plan| plan.spec.machine = None),
            ("MAC address", |plan| plan.spec.nets[0].mac = "52:54:00:12:34:5,id=x".into()),
        ];
        for (words, spoil) in cases {
            let mut plan = plan(V10);
            spoil(&mut plan);
            let error = command_line(&plan).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::InvalidInput);
            assert!(error.to_string().contains(words), "{error}");
        }
    }
}
