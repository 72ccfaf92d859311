//! `whimbrel vm …`.

use std::path::PathBuf;

use clap::{Subcommand, ValueEnum};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use whimbrel_wire::api::{
    DiskMove, MemoryTechnique, PostCopy, TaskStarted, Vm, VmAdopt, VmConsole, VmMigrate, VmRecover, VmRun,
    VmStop,
};
use whimbrel_wire::meta::{Mode, NetSpec, VmSpec};
use whimbrel_wire::size::{parse_bytes, parse_ms, parse_rate_bytes_s, show_bytes};
use whimbrel_wire::{ErrorKind, HostId, Name, WireError};

use super::image::absolute;
use super::show::{fields, table};
use super::task::wait_for;
use super::{Context, Output};

/// The commands.
#[derive(Debug, Subcommand)]
pub enum VmCommand {
    /// Start a VM on this host.
    Run(RunArgs),
    /// Take over a QEMU that somebody else started, if it can be moved; disks on files are mirrored into volumes.
    Adopt {
        /// The name it gets.
        name: Name,
        /// Its QMP socket, which nobody else may be connected to.
        #[arg(long, value_name = "SOCKET")]
        qmp: PathBuf,
        /// Print the task and return at once.
        #[arg(long)]
        no_wait: bool,
    },
    /// All VMs of the cluster.
    List,
    /// One VM.
    Show {
        /// Its name.
        name: Name,
    },
    /// The VM's serial console. Ctrl-] leaves it.
    Console {
        /// Its name.
        name: Name,
    },
    /// Shut a VM down; its volumes are kept.
    Stop {
        /// Its name.
        name: Name,
        /// Pull the plug instead of pressing the power button.
        #[arg(long)]
        force: bool,
    },
    /// Move a VM to another host while it runs.
    Migrate(MigrateArgs),
    /// Take over a VM whose host died. The old host must be off: nothing else keeps it from writing.
    Recover {
        /// Its name.
        name: Name,
        /// The host that takes over.
        #[arg(long, value_name = "HOST")]
        on: HostId,
        /// Confirm that the old host is fenced (off, or cut from storage and network).
        #[arg(long)]
        fenced: bool,
    },
}

/// `whimbrel vm run`
#[derive(Debug, clap::Args)]
pub struct RunArgs {
    /// Its name.
    pub name: Name,
    /// Volumes, boot disk first.
    #[arg(long = "volume", value_name = "V", required = true)]
    pub volumes: Vec<Name>,
    /// RAM, like 2G.
    #[arg(long, value_parser = parse_bytes)]
    pub memory: u64,
    /// Virtual processors.
    #[arg(long, default_value_t = 1)]
    pub vcpus: u32,
    /// A network interface: bridge=NAME[,mac=52:54:00:…].
    #[arg(long = "net", value_name = "bridge=BR", value_parser = parse_net)]
    pub nets: Vec<NetSpec>,
    /// Kernel to boot; every host must have it at this path.
    #[arg(long)]
    pub kernel: Option<PathBuf>,
    /// Initial RAM disk.
    #[arg(long)]
    pub initrd: Option<PathBuf>,
    /// Kernel command line.
    #[arg(long)]
    pub append: Option<String>,
    /// Processor model; must exist on every host it moves to.
    #[arg(long)]
    pub cpu: Option<String>,
    /// tcg or kvm; kvm where it works otherwise.
    #[arg(long)]
    pub accel: Option<String>,
    /// Machine type.
    #[arg(long)]
    pub machine: Option<String>,
    /// Further QEMU arguments; {run} stands for the VM's runtime directory on its host.
    #[arg(last = true)]
    pub qemu_args: Vec<String>,
}

/// `whimbrel vm migrate`
#[derive(Debug, clap::Args)]
pub struct MigrateArgs {
    /// Its name.
    pub name: Name,
    /// Where to.
    #[arg(long, value_name = "HOST")]
    pub to: HostId,
    /// The longest pause aimed at, like 100ms.
    #[arg(long, value_parser = parse_ms)]
    pub downtime_limit: Option<u64>,
    /// Most of the link to use, like 1Gbit.
    #[arg(long, value_parser = parse_rate_bytes_s)]
    pub bandwidth: Option<u64>,
    /// Whether memory may follow after the switch-over.
    #[arg(long, value_enum, default_value_t = PostCopyArg::Auto)]
    pub post_copy: PostCopyArg,
    /// When the writable layer moves.
    #[arg(long, value_enum, default_value_t = DiskArg::Copy)]
    pub disk: DiskArg,
    /// How memory moves: a (by the agents) or b (QEMU's own stream); the best that works otherwise.
    #[arg(long, value_enum)]
    pub mode: Option<ModeArg>,
    /// Hash all RAM at the pause on both sides and compare.
    #[arg(long)]
    pub verify: bool,
    /// Send memory without this; may be repeated.
    #[arg(long, value_enum, value_name = "TECHNIQUE")]
    pub without: Vec<TechniqueArg>,
    /// Print the task and return at once.
    #[arg(long)]
    pub no_wait: bool,
}

/// `--without`
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum TechniqueArg {
    /// Pages that are sent again as what changed.
    Delta,
    /// Pages named by an equal one that was sent.
    SamePages,
    /// Pages named by the block of an image that they were read from.
    DiskBlocks,
}

/// `--post-copy`
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum PostCopyArg {
    /// When the guest dirties memory faster than it can be sent.
    Auto,
    /// Never.
    Never,
    /// At once.
    Now,
}

/// `--disk`
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum DiskArg {
    /// Before the switch-over.
    Copy,
    /// After it: the VM runs at the target sooner, and depends on both hosts until its blocks have followed.
    OnDemand,
}

/// `--mode`
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum ModeArg {
    /// The agents move RAM.
    A,
    /// The agents carry QEMU's own stream.
    B,
}

fn parse_net(text: &str) -> Result<NetSpec, WireError> {
    let mut net = NetSpec::default();
    for part in text.split(',') {
        match part.split_once('=') {
            Some(("bridge", bridge)) if !bridge.is_empty() => net.bridge = bridge.to_owned(),
            Some(("mac", mac)) => net.mac = mac.to_owned(),
            _ => {
                return Err(WireError::new(
                    ErrorKind::InvalidInput,
                    format!("read {part:?}: bridge=NAME, optionally with ,mac=52:54:00:…"),
                ));
            }
        }
    }
    if net.bridge.is_empty() {
        return Err(WireError::new(ErrorKind::InvalidInput, "read --net: bridge=NAME is needed"));
    }
    Ok(net)
}

/// Carries out a command.
pub async fn run(context: &Context, command: VmCommand) -> anyhow::Result<()> {
    let client = &context.client;
    match command {
        VmCommand::Run(args) => {
            let vm: Vm = client.post("/v1/vms", &run_request(args)?).await?;
            context.print(&vm, describe)
        }
        VmCommand::Adopt { name, qmp, no_wait } => {
            let started: TaskStarted =
                client.post("/v1/vms/adopt", &VmAdopt { name, qmp: absolute(&qmp)? }).await?;
            wait_for(context, &started, no_wait).await
        }
        VmCommand::List => {
            let vms: Vec<Vm> = client.get("/v1/vms").await?;
            context.print(&vms, |vms| {
                let rows: Vec<Vec<String>> = vms.iter().map(row).collect();
                table(&["NAME", "HOST", "STATE", "EPOCH", "MODE", "MEMORY", "VOLUME", "WAITING FOR"], &rows)
            })
        }
        VmCommand::Show { name } => {
            let vm: Vm = client.get(&format!("/v1/vms/{name}")).await?;
            context.print(&vm, describe)
        }
        VmCommand::Console { name } => console(context, &name).await,
        VmCommand::Stop { name, force } => {
            let vm: Vm = client.post(&format!("/v1/vms/{name}/stop"), &VmStop { force }).await?;
            context.print(&vm, |vm| format!("{} stopped", vm.name))
        }
        VmCommand::Migrate(args) => {
            let (name, no_wait) = (args.name.clone(), args.no_wait);
            let started: TaskStarted =
                client.post(&format!("/v1/vms/{name}/migrate"), &migrate_request(&args)).await?;
            wait_for(context, &started, no_wait).await
        }
        VmCommand::Recover { name, on, fenced } => {
            let body = VmRecover { on, fenced };
            let vm: Vm = client.post(&format!("/v1/vms/{name}/recover"), &body).await?;
            context.print(&vm, describe)
        }
    }
}

fn run_request(args: RunArgs) -> anyhow::Result<VmRun> {
    let path = |path: Option<PathBuf>| path.map(|path| absolute(&path)).transpose();
    Ok(VmRun {
        name: args.name,
        spec: VmSpec {
            memory_bytes: args.memory,
            vcpus: args.vcpus,
            volumes: args.volumes,
            nets: args.nets,
            kernel: path(args.kernel)?,
            initrd: path(args.initrd)?,
            append: args.append,
            machine: args.machine,
            accel: args.accel,
            cpu: args.cpu,
            qemu_args: args.qemu_args,
            foreign: None,
        },
    })
}

fn migrate_request(args: &MigrateArgs) -> VmMigrate {
    VmMigrate {
        to: args.to.clone(),
        downtime_limit_ms: args.downtime_limit,
        bandwidth_bytes_s: args.bandwidth,
        post_copy: match args.post_copy {
            PostCopyArg::Auto => PostCopy::Auto,
            PostCopyArg::Never => PostCopy::Never,
            PostCopyArg::Now => PostCopy::Now,
        },
        disk: match args.disk {
            DiskArg::Copy => DiskMove::Copy,
            DiskArg::OnDemand => DiskMove::OnDemand,
        },
        mode: args.mode.map(|mode| match mode {
            ModeArg::A => Mode::A,
            ModeArg::B => Mode::B,
        }),
        verify: args.verify,
        without: args
            .without
            .iter()
            .map(|technique| match technique {
                TechniqueArg::Delta => MemoryTechnique::Delta,
                TechniqueArg::SamePages => MemoryTechnique::SamePages,
                TechniqueArg::DiskBlocks => MemoryTechnique::DiskBlocks,
            })
            .collect(),
    }
}

fn state(vm: &Vm) -> String {
    serde_json::to_value(vm.state)
        .ok()
        .and_then(|value| value.as_str().map(str::to_owned))
        .unwrap_or_default()
}

fn row(vm: &Vm) -> Vec<String> {
    vec![
        vm.name.to_string(),
        vm.host.to_string(),
        state(vm),
        vm.epoch.to_string(),
        vm.mode.map_or_else(|| "-".into(), |mode| format!("{mode:?}")),
        show_bytes(vm.memory_bytes),
        vm.volume.as_ref().map(ToString::to_string).unwrap_or_default(),
        vm.waiting_for.clone().unwrap_or_default(),
    ]
}

fn describe(vm: &Vm) -> String {
    let mut pairs = vec![
        ("vm", vm.name.to_string()),
        ("host", vm.host.to_string()),
        ("state", state(vm)),
        ("epoch", vm.epoch.to_string()),
        ("mode", vm.mode.map_or_else(|| "-".into(), |mode| format!("{mode:?}"))),
        ("memory", show_bytes(vm.memory_bytes)),
        ("volumes", vm.volumes.iter().map(ToString::to_string).collect::<Vec<_>>().join(" ")),
    ];
    if let Some(waiting_for) = &vm.waiting_for {
        pairs.push(("waiting for", waiting_for.clone()));
    }
    for reason in &vm.mode_reasons {
        pairs.push(("not mode A", reason.clone()));
    }
    fields(&pairs)
}

/// Ctrl-] ends the console, as with telnet and virsh.
const CONSOLE_ESCAPE: u8 = 0x1d;

async fn console(context: &Context, name: &Name) -> anyhow::Result<()> {
    let console: VmConsole = context.client.get(&format!("/v1/vms/{name}/console")).await?;
    if context.output == Output::Json {
        return context.print(&console, |_| String::new());
    }
    let stream = tokio::net::UnixStream::connect(&console.socket).await.map_err(|error| {
        WireError::new(ErrorKind::Unavailable, format!("open the console of vm {name}: {error}"))
    })?;
    eprintln!("console of {name}; Ctrl-] leaves it");
    let _raw = RawTerminal::enter();
    let (mut from_guest, mut to_guest) = stream.into_split();
    let output = tokio::spawn(async move {
        let mut stdout = tokio::io::stdout();
        let mut buffer = [0_u8; 4096];
        while let Ok(count @ 1..) = from_guest.read(&mut buffer).await {
            let chunk = buffer.get(..count).unwrap_or_default();
            if stdout.write_all(chunk).await.is_err() || stdout.flush().await.is_err() {
                break;
            }
        }
    });
    let mut stdin = tokio::io::stdin();
    let mut buffer = [0_u8; 256];
    while !output.is_finished() {
        let Ok(count @ 1..) = stdin.read(&mut buffer).await else { break };
        let typed = buffer.get(..count).unwrap_or_default();
        let escape = typed.iter().position(|byte| *byte == CONSOLE_ESCAPE);
        to_guest.write_all(typed.get(..escape.unwrap_or(count)).unwrap_or_default()).await?;
        if escape.is_some() {
            break;
        }
    }
    Ok(())
}

/// The terminal passes every key on until this is dropped.
struct RawTerminal(Option<rustix::termios::Termios>);

impl RawTerminal {
    fn enter() -> Self {
        let Ok(before) = rustix::termios::tcgetattr(rustix::stdio::stdin()) else { return Self(None) };
        let mut raw = before.clone();
        raw.make_raw();
        let _ =
            rustix::termios::tcsetattr(rustix::stdio::stdin(), rustix::termios::OptionalActions::Now, &raw);
        Self(Some(before))
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        if let Some(before) = &self.0 {
            let _ = rustix::termios::tcsetattr(
                rustix::stdio::stdin(),
                rustix::termios::OptionalActions::Now,
                before,
            );
        }
    }
}

#[cfg(test)]
mod fuzz {
    use super::*;

    whimbrel_fuzz::fuzz! {
        /// What stands behind --net.
        fn nets(bytes) seeds [b"bridge=br0,mac=52:54:00:00:00:01"] {
            let Ok(text) = std::str::from_utf8(bytes) else { return };
            if let Ok(net) = parse_net(text) {
                assert!(!net.bridge.is_empty());
            }
        }
    }
}
