//! QEMU's own migration between two QEMUs on one shared image.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use serde_json::json;

use super::cell::{self, Cell};
use super::report::Run;
use super::{DOWNTIME_LIMIT_MS, FINISH_LIMIT, MEMORY_MIB};
use crate::beat::Receiver;
use crate::cmd::{self, capture};
use crate::cpu::overhead_s;
use crate::guest::APPEND;
use crate::lab::{Host, Lab, port_args};
use crate::qmp::Qmp;
use crate::status::Status;

const SOON: Duration = Duration::from_secs(20);
const BOOT: Duration = Duration::from_secs(120);
const PORT: u16 = 4444;
/// As many as the machine can run at once beside the guest.
const CHANNELS: u32 = 2;

/// A way to migrate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Method {
    kind: Kind,
    /// Whether the connections are encrypted.
    pub tls: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Precopy,
    Multifd,
    MultifdZstd,
}

impl Method {
    /// All of them, encrypted ones first.
    pub fn all() -> [Method; 6] {
        let m = |kind, tls| Method { kind, tls };
        [
            m(Kind::Precopy, true),
            m(Kind::Multifd, true),
            m(Kind::MultifdZstd, true),
            m(Kind::Precopy, false),
            m(Kind::Multifd, false),
            m(Kind::MultifdZstd, false),
        ]
    }

    /// For tables.
    pub fn name(self) -> String {
        let kind = match self.kind {
            Kind::Precopy => "precopy",
            Kind::Multifd => "multifd",
            Kind::MultifdZstd => "multifd+zstd",
        };
        format!("{kind}{}", if self.tls { " TLS" } else { "" })
    }
}

/// One QEMU process.
struct Process {
    child: Child,
    qmp: Qmp,
    dir: PathBuf,
    /// Its index in the beat's receiver.
    source: usize,
}

impl Drop for Process {
    fn drop(&mut self) {
        // It may have ended by itself.
        drop(self.child.kill());
        drop(self.child.wait());
        drop(fs::remove_dir_all(&self.dir));
    }
}

/// A VM that QEMU moves.
pub struct Peer<'a> {
    lab: &'a Lab,
    cell: Cell,
    disk: PathBuf,
    process: Process,
    at: usize,
    started: u32,
    receiver: Receiver,
    status: Status,
}

impl<'a> Peer<'a> {
    /// Boots it on the first host and waits for its workload.
    pub fn boot(lab: &'a Lab, cell: &Cell) -> Result<Peer<'a>> {
        make_certificates(lab)?;
        let disk = lab.dir().join("peer.raw");
        cmd::run(cmd::cmd("cp", &["--sparse=always"]).arg(&lab.image.disk).arg(&disk))?;
        let mut receiver = Receiver::new();
        let host = lab.hosts().first().context("a lab has hosts")?;
        let process = start(lab, host, cell, &disk, 0, false, &mut receiver)?;
        if !receiver.wait_for_beats(1, BOOT) {
            bail!("QEMU's VM sent no beat: {}", log_of(&process.dir));
        }
        let mut status = Status::connect(&process.dir.join("status.sock"), SOON)?;
        status.wait_ready(BOOT)?;
        std::thread::sleep(cell::SETTLE);
        Ok(Peer { lab, cell: *cell, disk, process, at: 0, started: 1, receiver, status })
    }

    /// Moves it to the other host; none if that took too long, and the VM is where it was.
    pub fn migrate(&mut self, method: Method) -> Result<Option<Run>> {
        let hosts = self.lab.hosts();
        let (from, to) = (self.at, 1 - self.at);
        let target_host = hosts.get(to).context("find the target in the lab")?;
        let number = self.started;
        self.started += 1;
        let mut target =
            start(self.lab, target_host, &self.cell, &self.disk, number, true, &mut self.receiver)?;
        let creds = self.lab.dir().join("tls");
        configure(&mut target.qmp, method, &creds, "server")?;
        configure(&mut self.process.qmp, method, &creds, "client")?;
        target.qmp.execute("migrate-incoming", json!({ "uri": format!("tcp:0.0.0.0:{PORT}") }))?;
        let bytes = |lab: &Lab| -> Result<u64> { hosts.iter().map(|h| lab.bytes_out(h)).sum() };
        let bytes_before = bytes(self.lab)?;
        let cpu = |p: &Process, t: &Process| overhead_s(p.child.id()) + overhead_s(t.child.id());
        let cpu_before = cpu(&self.process, &target);
        self.receiver.restart_window();
        let started = Instant::now();
        let address = target_host.peer_address().split(':').next().unwrap_or_default().to_owned();
        self.process.qmp.execute("migrate", json!({ "uri": format!("tcp:{address}:{PORT}") }))?;
        let end = started + FINISH_LIMIT;
        let first = loop {
            if let Some(at) = self.receiver.wait_for_source(target.source, Duration::from_millis(100)) {
                break at;
            }
            let state = self.process.qmp.execute("query-migrate", json!({}))?;
            if state["status"] == "failed" {
                bail!("{} failed: {state}; target: {}", method.name(), log_of(&target.dir));
            }
            if Instant::now() > end {
                return Ok(None);
            }
        };
        std::thread::sleep(Duration::from_millis(300));
        let cpu_s = cpu(&self.process, &target) - cpu_before;
        let beat = self.receiver.report();
        let bytes = bytes(self.lab)? - bytes_before;
        self.status = Status::connect(&target.dir.join("status.sock"), SOON)?;
        self.process = target;
        self.at = to;
        debug_assert_ne!(from, to);
        // The next move starts from a settled guest.
        std::thread::sleep(Duration::from_millis(700));
        Ok(Some(Run {
            total_s: first.duration_since(started).as_secs_f64(),
            start_s: 0.0,
            downtime_ms: beat.downtime_ms(),
            bytes: bytes as f64,
            cpu_s,
            errors: 0,
        }))
    }

    /// Fails if the guest found anything wrong.
    pub fn must_be_whole(mut self) -> Result<()> {
        let errors = self.status.command("verify-all", BOOT)?;
        if errors > 0 {
            bail!("{errors} integrity errors after QEMU's own moves: {}", self.status.now()?);
        }
        Ok(())
    }
}

fn start(
    lab: &Lab,
    host: &Host,
    cell: &Cell,
    disk: &Path,
    number: u32,
    incoming: bool,
    receiver: &mut Receiver,
) -> Result<Process> {
    let dir = host.dir().join(format!("peer-{number}"));
    fs::create_dir_all(&dir).context("make QEMU's directory")?;
    let mut c = host.command(&lab.qemu.system());
    c.args([
        "-name",
        "peer,debug-threads=on",
        "-accel",
        "tcg,thread=multi",
        "-cpu",
        "qemu64",
        "-machine",
        "q35",
    ]);
    c.args(["-m", &MEMORY_MIB.to_string(), "-smp", "1", "-nodefaults", "-display", "none", "-no-reboot"]);
    c.arg("-kernel").arg(&lab.image.kernel).arg("-initrd").arg(&lab.image.initrd);
    c.args(["-append", &format!("{APPEND} {}", cell.workload())]);
    c.args([
        "-blockdev",
        &format!("driver=raw,node-name=d,file.driver=file,file.filename={}", disk.display()),
    ]);
    c.args(["-device", "virtio-blk-pci,drive=d"]).args(port_args(&dir.to_string_lossy()));
    let dir_text = dir.display();
    c.args(["-serial", &format!("file:{dir_text}/console.log")]);
    c.args(["-qmp", &format!("unix:{dir_text}/qmp.sock,server=on,wait=off")]);
    if incoming {
        c.args(["-incoming", "defer"]);
    }
    let log = fs::File::create(dir.join("qemu.log")).context("create QEMU's log")?;
    let child = c.stdout(Stdio::null()).stderr(log).spawn().context("start QEMU")?;
    let qmp = Qmp::connect(&dir.join("qmp.sock"), SOON).with_context(|| log_of(&dir))?;
    let source = receiver.add(&dir.join("beat.sock"));
    Ok(Process { child, qmp, dir, source })
}

fn log_of(dir: &Path) -> String {
    let end = |name: &str| cmd::tail(&fs::read(dir.join(name)).unwrap_or_default(), 5);
    format!("QEMU says: {}; console: {}", end("qemu.log"), end("console.log"))
}

fn configure(qmp: &mut Qmp, method: Method, creds: &Path, end: &str) -> Result<()> {
    let multifd = method.kind != Kind::Precopy;
    let capability = |name: &str, on: bool| json!({ "capability": name, "state": on });
    qmp.execute("migrate-set-capabilities", json!({ "capabilities": [capability("multifd", multifd)] }))?;
    let mut parameters = json!({
        "downtime-limit": DOWNTIME_LIMIT_MS,
        // No limit of its own: QEMU's default would be slower than the links.
        "max-bandwidth": 100_000_000_000u64,
        "tls-creds": "",
    });
    if multifd {
        parameters["multifd-channels"] = json!(CHANNELS);
        parameters["multifd-compression"] =
            json!(if method.kind == Kind::MultifdZstd { "zstd" } else { "none" });
    }
    if method.tls {
        let id = format!("tls-{end}");
        // The object stays for the process's next move.
        let made = qmp.execute(
            "object-add",
            json!({ "qom-type": "tls-creds-x509", "id": id, "dir": creds, "endpoint": end, "verify-peer": true }),
        );
        if let Err(e) = made
            && !e.to_string().contains("duplicate")
        {
            return Err(e);
        }
        parameters["tls-creds"] = json!(id);
    }
    qmp.execute("migrate-set-parameters", parameters).map(drop)
}

/// One authority, and a certificate for both ends that names both hosts' addresses; as `tls-creds-x509` wants them.
fn make_certificates(lab: &Lab) -> Result<()> {
    let dir = lab.dir().join("tls");
    if dir.join("client-key.pem").exists() {
        return Ok(());
    }
    fs::create_dir_all(&dir).context("make the certificates' directory")?;
    let addresses: Vec<String> = lab
        .hosts()
        .iter()
        .map(|h| format!("IP:{}", h.peer_address().split(':').next().unwrap_or_default()))
        .collect();
    let openssl = |line: &str, extra: &[&str]| -> Result<()> {
        let mut c = cmd::cmd("openssl", &line.split_whitespace().collect::<Vec<_>>());
        capture(c.args(extra).current_dir(&dir)).map(drop)
    };
    let key = "-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2";
    openssl(
        &format!("req -x509 {key} -keyout ca-key.pem -out ca-cert.pem -subj /CN=bench"),
        &["-addext", "keyUsage=critical,keyCertSign"],
    )?;
    let names = format!("subjectAltName={}", addresses.join(","));
    openssl(
        &format!(
            "req -x509 -CA ca-cert.pem -CAkey ca-key.pem {key} -keyout server-key.pem -out server-cert.pem -subj /CN=host"
        ),
        &[
            "-addext",
            &names,
            "-addext",
            "basicConstraints=critical,CA:FALSE",
            "-addext",
            "keyUsage=critical,digitalSignature,keyEncipherment",
            "-addext",
            "extendedKeyUsage=serverAuth,clientAuth",
        ],
    )?;
    for part in ["cert", "key"] {
        fs::copy(dir.join(format!("server-{part}.pem")), dir.join(format!("client-{part}.pem")))
            .context("give the client its certificate")?;
    }
    Ok(())
}
