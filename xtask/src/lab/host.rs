//! One host of a lab: its agent, and the VMs on it.

use std::cell::RefCell;
use std::fs;
use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use serde_json::Value;

use super::net;
use crate::cmd::{self, cmd};
use crate::guest::{APPEND, BEAT_PORT, Image, STATUS_PORT};
use crate::qemu::Qemu;

/// How long an agent may take to answer after its start.
const AGENT_START_LIMIT: Duration = Duration::from_secs(30);
/// RAM files of all VMs of a host together.
const MEMORY_LIMIT: &str = "8G";

/// Runs in mounts of its own: lays an empty directory over each of its first arguments, then becomes what follows `--`.
const ALONE: &str = r#"while [ "$1" != -- ]; do mount -t tmpfs -o size=4k,mode=0 none "$1" || exit; shift; done; shift; exec "$@""#;

/// See the module's charter.
pub struct Host {
    name: String,
    /// Its place in the namespaces, `NAME` of `ip netns`.
    dir: PathBuf,
    peer_address: String,
    /// Directories that its agent must not see.
    hidden: RefCell<Vec<PathBuf>>,
    whimbrel: RefCell<PathBuf>,
    agent: RefCell<Option<Child>>,
}

/// A VM to start.
pub struct VmArgs<'a> {
    /// Its name.
    pub name: &'a str,
    /// Existing volumes, boot disk first.
    pub volumes: &'a [&'a str],
    /// RAM.
    pub memory_mib: u64,
    /// Virtual processors.
    pub vcpus: u32,
    /// Workload settings, `wg.KEY=VALUE …`.
    pub workload: &'a str,
    /// Whether it gets an interface on the guests' network.
    pub net: bool,
}

impl VmArgs<'_> {
    /// The words of `vm run`.
    pub fn words(&self, image: &Image) -> Vec<String> {
        let (memory, vcpus) = (format!("{}M", self.memory_mib), self.vcpus.to_string());
        let append = format!("{APPEND} {}", self.workload);
        let (kernel, initrd) = (image.kernel.to_string_lossy(), image.initrd.to_string_lossy());
        let mut args = vec!["vm", "run", self.name, "--memory", &memory];
        for volume in self.volumes {
            args.extend(["--volume", *volume]);
        }
        args.extend(["--vcpus", &vcpus, "--accel", "tcg", "--kernel", &kernel, "--initrd", &initrd]);
        args.extend(["--append", &append]);
        if self.net {
            args.extend(["--net", "bridge=br0"]);
        }
        args.push("--");
        args.into_iter().map(str::to_owned).chain(port_args("{run}")).collect()
    }
}

/// Sockets of a VM's two ports on one host.
#[derive(Clone, Debug)]
pub struct VmSockets {
    /// For [`crate::beat`].
    pub beat: PathBuf,
    /// For [`crate::status`].
    pub status: PathBuf,
    /// QEMU's own monitor, for people and tests.
    pub qmp: PathBuf,
}

impl Host {
    /// Makes the namespace and the directories.
    /// `number` counts within the lab, `place` is the host's own on the hosts' network.
    pub(super) fn new(lab: &Path, lab_name: &str, number: usize, place: usize, qemu: &Qemu) -> Result<Host> {
        let name = format!("{lab_name}-h{number}");
        let dir = lab.join(format!("h{number}"));
        for sub in ["data", "run", "memory"] {
            fs::create_dir_all(dir.join(sub)).with_context(|| format!("make {}", dir.display()))?;
        }
        let memory = dir.join("memory");
        let options = format!("size={MEMORY_LIMIT},mode=755,huge=advise");
        cmd::run(cmd("mount", &["-t", "tmpfs", "-o", &options, "tmpfs"]).arg(&memory))?;
        net::add_host(&name, place)?;
        let peer_address = format!("{}:7420", net::address(place));
        let host = Host {
            name,
            dir,
            peer_address,
            hidden: RefCell::default(),
            whimbrel: RefCell::new(PathBuf::new()),
            agent: RefCell::new(None),
        };
        fs::write(host.config_path(), host.config(qemu)).context("write the agent's configuration")?;
        Ok(host)
    }

    fn config(&self, qemu: &Qemu) -> String {
        let dir = self.dir.display();
        // Where files may be that lie under others.
        let disks = self.dir.parent().unwrap_or(&self.dir).display();
        // In a user namespace of one user there is nobody else to run as.
        let vm_user = if super::one_user_only() { "root" } else { "nobody" };
        format!(
            "name = \"{}\"\ndata_dir = \"{dir}/data\"\nrun_dir = \"{dir}/run\"\nmemory_dir = \"{dir}/memory\"\n\
             backing_dir = \"{disks}\"\nlisten = \"{}\"\nadvertise = [\"{}\"]\nqemu = \"{}\"\nvm_user = \"{vm_user}\"\n",
            self.name,
            self.peer_address,
            self.peer_address,
            qemu.system().display(),
        )
    }

    /// From the next start of its agent on this host runs another QEMU.
    pub fn use_qemu(&self, qemu: &Qemu) -> Result<()> {
        fs::write(self.config_path(), self.config(qemu)).context("write the agent's configuration")
    }

    /// Adds lines to the agent's configuration, for its next start.
    pub fn configure(&self, lines: &str) -> Result<()> {
        let path = self.config_path();
        let config = fs::read_to_string(&path).context("read the agent's configuration")?;
        fs::write(path, config + lines).context("write the agent's configuration")
    }

    fn config_path(&self) -> PathBuf {
        self.dir.join("whimbrel.toml")
    }

    /// Its name in the cluster and among the namespaces.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// `IP:PORT` of its agent for other hosts.
    pub fn peer_address(&self) -> &str {
        &self.peer_address
    }

    /// Its directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The agent's socket.
    pub fn socket(&self) -> PathBuf {
        self.dir.join("run/agent.sock")
    }

    /// The agent's log.
    pub fn log_path(&self) -> PathBuf {
        self.dir.join("agent.log")
    }

    /// A command that runs on this host: in its network.
    pub fn command(&self, program: &Path) -> Command {
        let mut c = cmd("ip", &["netns", "exec", &self.name]);
        c.arg(program);
        c
    }

    /// From its next start on the agent runs in mounts of its own, where these directories are empty.
    pub fn hide(&self, directories: Vec<PathBuf>) {
        self.hidden.replace(directories);
    }

    /// Starts the agent, and waits until it answers.
    pub fn start_agent(&self, whimbrel: &Path) -> Result<()> {
        self.start_agent_with(whimbrel, &[])
    }

    /// The same with environment variables, such as an armed fail point.
    pub fn start_agent_with(&self, whimbrel: &Path, env: &[(&str, &str)]) -> Result<()> {
        self.launch_agent(whimbrel, env, &[])
    }

    /// The same for an agent that lacks a capability, such as `sys_ptrace`.
    pub fn start_agent_without_capability(&self, whimbrel: &Path, capability: &str) -> Result<()> {
        let without = [format!("--bounding-set=-{capability}"), format!("--inh-caps=-{capability}")];
        self.launch_agent(whimbrel, &[], &["setpriv", &without[0], &without[1], "--"])
    }

    /// The same for an agent that sees what is mounted for the process `pid` of this machine.
    pub fn start_agent_in_mounts_of(&self, whimbrel: &Path, pid: u32) -> Result<()> {
        // In other mounts one stands in their root.
        let whimbrel = whimbrel.canonicalize().with_context(|| format!("find {}", whimbrel.display()))?;
        self.launch_agent(&whimbrel, &[], &["nsenter", &format!("--mount=/proc/{pid}/ns/mnt"), "--"])
    }

    /// `through`: words in front of the agent's own command.
    fn launch_agent(&self, whimbrel: &Path, env: &[(&str, &str)], through: &[&str]) -> Result<()> {
        self.whimbrel.replace(whimbrel.to_path_buf());
        let log = fs::OpenOptions::new().create(true).append(true).open(self.log_path());
        let log = log.context("open the agent's log")?;
        let hidden = self.hidden.borrow();
        let mut c = cmd("ip", &["netns", "exec", &self.name]);
        if !hidden.is_empty() {
            c.args(["unshare", "--mount", "--propagation", "private", "sh", "-c", ALONE, "sh"]);
            c.args(hidden.iter()).arg("--");
        }
        c.args(through).arg(whimbrel);
        c.arg("--socket").arg(self.socket()).args(["agent", "--config"]).arg(self.config_path());
        c.env("WHIMBREL_LOG", std::env::var("WHIMBREL_LOG").unwrap_or_else(|_| "info".to_owned()));
        c.env("NO_COLOR", "1").env_remove("WHIMBREL_FAILPOINT").envs(env.iter().copied());
        c.stdout(Stdio::from(log.try_clone().context("share the agent's log")?)).stderr(Stdio::from(log));
        let child = c.spawn().with_context(|| format!("start the agent of {}", self.name))?;
        self.agent.replace(Some(child));
        let end = Instant::now() + AGENT_START_LIMIT;
        loop {
            if UnixStream::connect(self.socket()).is_ok() {
                return Ok(());
            }
            let ended = self.agent.borrow_mut().as_mut().and_then(|c| c.try_wait().ok().flatten());
            if let Some(status) = ended {
                bail!("the agent of {} ended at once ({status}):\n{}", self.name, self.log_tail());
            }
            if Instant::now() > end {
                bail!("the agent of {} does not answer:\n{}", self.name, self.log_tail());
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// The agent's process, if it was started.
    pub fn agent_pid(&self) -> Option<u32> {
        // `ip netns exec` becomes the program, so the child is the agent.
        self.agent.borrow().as_ref().map(Child::id)
    }

    /// Waits until the agent has ended by itself; whether it did.
    pub fn wait_agent_end(&self, limit: Duration) -> bool {
        let end = Instant::now() + limit;
        while Instant::now() < end {
            let mut agent = self.agent.borrow_mut();
            match agent.as_mut().map(Child::try_wait) {
                Some(Ok(None)) => {}
                Some(_) => {
                    *agent = None;
                    return true;
                }
                None => return true,
            }
            drop(agent);
            std::thread::sleep(Duration::from_millis(10));
        }
        false
    }

    /// Takes the host off the hosts' network, or puts it back.
    pub fn set_network(&self, up: bool) -> Result<()> {
        let state = if up { "up" } else { "down" };
        cmd::run(&mut cmd("ip", &["-n", &self.name, "link", "set", "eth0", state]))
    }

    /// Resets this host's TCP connections to `other` for as long as `on` lasts.
    pub fn reset_connections(&self, other: &Host, on: bool) -> Result<()> {
        net::reset_to(&self.name, other.peer_address.split(':').next().unwrap_or_default(), on)
    }

    /// Whether an agent was started and not killed since.
    pub fn has_agent(&self) -> bool {
        self.agent.borrow().is_some()
    }

    /// Kills the agent as a crash would; its VMs go on.
    pub fn kill_agent(&self) -> Result<()> {
        if let Some(mut child) = self.agent.take() {
            child.kill().context("kill the agent")?;
            child.wait().context("wait for the agent's end")?;
        }
        Ok(())
    }

    /// The end of the agent's log.
    pub fn log_tail(&self) -> String {
        cmd::tail(&fs::read(self.log_path()).unwrap_or_default(), 25)
    }

    /// A command line of this host's agent.
    pub fn cli(&self, args: &[&str]) -> Command {
        let mut c = cmd(&*self.whimbrel.borrow(), &["--output", "json", "--socket"]);
        c.arg(self.socket()).args(args);
        c
    }

    /// Runs a command on this host's agent and gives the JSON that it printed.
    pub fn whimbrel(&self, args: &[&str]) -> Result<Value> {
        let text = cmd::capture(&mut self.cli(args)).with_context(|| format!("on {}", self.name))?;
        serde_json::from_str(&text).with_context(|| format!("read what `{}` printed", args.join(" ")))
    }

    /// A figure of the agent's `/metrics`, summed over its labels; 0 if it was never counted.
    pub fn metric(&self, name: &str) -> Result<f64> {
        let what = || format!("read the metrics of {}", self.name);
        let mut stream = UnixStream::connect(self.socket()).with_context(what)?;
        let ask = "GET /metrics HTTP/1.1\r\nHost: agent\r\nConnection: close\r\n\r\n";
        stream.write_all(ask.as_bytes()).with_context(what)?;
        let mut text = String::new();
        stream.read_to_string(&mut text).with_context(what)?;
        let ours = text.lines().filter_map(|line| line.strip_prefix(name)?.rsplit_once(' '));
        ours.filter(|(labels, _)| labels.is_empty() || labels.starts_with('{'))
            .map(|(_, value)| value.parse::<f64>().with_context(what))
            .sum()
    }

    /// Publishes an image and makes a volume over it.
    pub fn publish(&self, file: &Path, image: &str) -> Result<Value> {
        self.whimbrel(&["image", "publish", &file.to_string_lossy(), "--format", "raw", "--name", image])
    }

    /// `vm run`, with the workload's ports.
    pub fn run_vm(&self, vm: &VmArgs<'_>, image: &Image) -> Result<Value> {
        let args = vm.words(image);
        self.whimbrel(&args.iter().map(String::as_str).collect::<Vec<_>>())
    }

    /// Where the sockets of a VM are on this host; they need not exist yet.
    pub fn vm_sockets(&self, vm: &str) -> VmSockets {
        let dir = self.dir.join("run/vms").join(vm);
        VmSockets {
            beat: dir.join("beat.sock"),
            status: dir.join("status.sock"),
            qmp: dir.join("qmp-operator.sock"),
        }
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        // Best effort: the end of the lab's first process ends everything for certain.
        drop(self.kill_agent());
        if let Err(e) = net::remove_host(&self.name) {
            eprintln!("{e:#}");
        }
    }
}

/// QEMU arguments for the workload's ports, sockets in `dir`.
pub fn port_args(dir: &str) -> Vec<String> {
    let port = |id: &str, name: &str| {
        [
            "-chardev".to_owned(),
            format!("socket,id=wg{id},path={dir}/{id}.sock,server=on,wait=off"),
            "-device".to_owned(),
            format!("virtserialport,chardev=wg{id},name={name}"),
        ]
    };
    let mut args = vec!["-device".to_owned(), "virtio-serial-pci".to_owned()];
    args.extend(port("beat", BEAT_PORT));
    args.extend(port("status", STATUS_PORT));
    args
}
