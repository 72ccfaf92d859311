//! `whimbrel volume …`.

use std::path::PathBuf;

use clap::Subcommand;
use whimbrel_wire::api::{
    Export, TaskStarted, Volume, VolumeAttach, VolumeCheck, VolumeCreate, VolumeImport, VolumeLayer,
    VolumeRelink, VolumeResize, VolumeSnapshot,
};
use whimbrel_wire::meta::IoLimits;
use whimbrel_wire::size::{parse_bytes, parse_rate_bytes_s, show_bytes};
use whimbrel_wire::{ImageRef, Name, SnapshotRef};

use super::Context;
use super::image::absolute;
use super::show::{fields, show_time, table};
use super::task::wait_for;

/// The commands.
#[derive(Debug, Subcommand)]
pub enum VolumeCommand {
    /// Make a volume over an image, from a snapshot of another volume, or an empty one.
    Create {
        /// Its name.
        name: Name,
        /// The image under it: `NAME[:TAG]`
        #[arg(long, required_unless_present_any = ["size", "from"])]
        image: Option<ImageRef>,
        /// Size of the disk (with --image or --from: not smaller than that).
        #[arg(long, value_parser = parse_bytes)]
        size: Option<u64>,
        /// The snapshot that it goes on from: `VOLUME@SNAPSHOT`
        #[arg(long, value_name = "SNAPSHOT", conflicts_with = "image")]
        from: Option<SnapshotRef>,
    },
    /// All volumes.
    List,
    /// One volume.
    Show {
        /// Its name.
        name: Name,
    },
    /// Check all invariants of a volume that is on this host; reads only.
    Check {
        /// Its name.
        name: Name,
    },
    /// Keep the volume's present state as a snapshot, while it is in use: the guest's file systems are frozen for it
    /// if the guest has an agent (qemu-guest-agent).
    Snapshot {
        /// The volume.
        volume: Name,
        /// The snapshot's name; `snap-N` if not given.
        #[arg(long, value_name = "S")]
        name: Option<Name>,
        /// Do not ask the guest to freeze its file systems.
        #[arg(long)]
        no_quiesce: bool,
    },
    /// Limit what the clients of a volume have of it together, from now on and wherever it goes; what is not named is not
    /// limited any more.
    Limit {
        /// Its name.
        name: Name,
        /// Requests per second.
        #[arg(long, value_name = "N")]
        iops: Option<u64>,
        /// Bits per second, such as 800Mbit.
        #[arg(long, value_name = "RATE", value_parser = parse_rate_bytes_s)]
        bandwidth: Option<u64>,
    },
    /// Make a volume larger, while it is in use: a running guest sees the new size.
    Resize {
        /// Its name.
        name: Name,
        /// Size of the disk from then on; not smaller than it is.
        #[arg(value_parser = parse_bytes)]
        size: u64,
    },
    /// Show which layers under a volume are no longer what it was made over, and accept them.
    Relink {
        /// Its name.
        name: Name,
        /// You have seen that the content under a layer changed, and want what the volume reads now.
        #[arg(long)]
        accept_changed_parent: bool,
    },
    /// Make a volume from a disk image file; vhdx files that it lies on become snapshots.
    Import {
        /// Its name.
        name: Name,
        /// The image file.
        file: PathBuf,
        /// raw, qcow2, vhdx or vmdk; from the extension if not given.
        #[arg(long, value_name = "F")]
        format: Option<String>,
        /// No snapshots: the disk as the file has it.
        #[arg(long)]
        flatten: bool,
        /// Print the task and return at once.
        #[arg(long)]
        no_wait: bool,
    },
    /// Write a volume to a file.
    Export {
        /// Its name.
        name: Name,
        /// The file; it must not exist.
        file: PathBuf,
        /// raw, qcow2, vhdx or vmdk; from the extension if not given.
        #[arg(long, value_name = "F")]
        format: Option<String>,
        /// A vhdx file of the same size: write only what differs from it, as a vhdx file that lies on it.
        #[arg(long, value_name = "FILE")]
        parent: Option<PathBuf>,
        /// Write each snapshot too, as vhdx files beside it that lie on each other: FILE-SNAPSHOT.vhdx.
        #[arg(long, conflicts_with = "parent")]
        chain: bool,
        /// Print the task and return at once.
        #[arg(long)]
        no_wait: bool,
    },
    /// Show a volume to programs of this host on a socket or as a file, and print the path; or to others over TLS.
    Attach {
        /// Its name.
        name: Name,
        /// nbd, vhost-user-blk, or fuse: a raw file
        #[arg(long, default_value = "nbd")]
        export: String,
        /// A TCP port instead of a socket, with TLS and the cluster's certificates (nbd only).
        #[arg(long, value_name = "IP:PORT")]
        listen: Option<std::net::SocketAddr>,
        /// Clients may only read (not over vhost-user-blk).
        #[arg(long)]
        read_only: bool,
    },
    /// Take the socket or the file away again.
    Detach {
        /// Its name.
        name: Name,
    },
    /// Delete a volume with its snapshots and all data, or one snapshot.
    Remove {
        /// `VOLUME` or `VOLUME@SNAPSHOT`
        name: String,
        /// Of a snapshot: print the task and return at once.
        #[arg(long)]
        no_wait: bool,
    },
}

/// Carries out a command.
pub async fn run(context: &Context, command: VolumeCommand) -> anyhow::Result<()> {
    let client = &context.client;
    match command {
        VolumeCommand::Create { name, image, size, from } => {
            let body = VolumeCreate { name, image, size_bytes: size, from };
            let volume: Volume = client.post("/v1/volumes", &body).await?;
            context.print(&volume, describe)
        }
        VolumeCommand::List => {
            let volumes: Vec<Volume> = client.get("/v1/volumes").await?;
            context.print(&volumes, |volumes| {
                let rows: Vec<Vec<String>> = volumes.iter().map(row).collect();
                table(&["NAME", "SIZE", "PARENT", "HOLDER", "EPOCH", "ATTACHED TO"], &rows)
            })
        }
        VolumeCommand::Show { name } => {
            let volume: Volume = client.get(&format!("/v1/volumes/{name}")).await?;
            context.print(&volume, describe)
        }
        VolumeCommand::Check { name } => {
            let check: VolumeCheck = client.post(&format!("/v1/volumes/{name}/check"), &()).await?;
            context.print(&check, |check| {
                let mut lines = format!("{}: {} records checked\n", check.name, check.records);
                for note in &check.notes {
                    lines += &format!("  note: {note}\n");
                }
                for problem in &check.problems {
                    lines += &format!("  {problem}\n");
                }
                lines
            })?;
            if check.problems.is_empty() {
                return Ok(());
            }
            Err(whimbrel_wire::WireError::new(
                whimbrel_wire::ErrorKind::Corrupt,
                format!("check volume {}: {} problems", check.name, check.problems.len()),
            )
            .into())
        }
        VolumeCommand::Snapshot { volume, name, no_quiesce } => {
            let body = VolumeSnapshot { name, no_quiesce };
            let volume: Volume = client.post(&format!("/v1/volumes/{volume}/snapshots"), &body).await?;
            context.print(&volume, |volume| {
                let newest = volume.chain.first();
                let name = newest.and_then(|layer| layer.snapshot.as_ref()).map_or("", Name::as_str);
                let how = match newest.is_some_and(|layer| layer.quiesced) {
                    true => "file systems were frozen",
                    false => "as after a crash",
                };
                format!("{}@{name} made ({how})", volume.name)
            })
        }
        VolumeCommand::Limit { name, iops, bandwidth } => {
            let body = IoLimits { iops, bandwidth_bytes_s: bandwidth };
            let volume: Volume = client.post(&format!("/v1/volumes/{name}/limit"), &body).await?;
            context.print(&volume, describe)
        }
        VolumeCommand::Resize { name, size } => {
            let body = VolumeResize { size_bytes: size };
            let volume: Volume = client.post(&format!("/v1/volumes/{name}/resize"), &body).await?;
            context.print(&volume, |volume| format!("{}: {}", volume.name, show_bytes(volume.size_bytes)))
        }
        VolumeCommand::Relink { name, accept_changed_parent } => {
            let body = VolumeRelink { accept_changed_parent };
            let volume: Volume = client.post(&format!("/v1/volumes/{name}/relink"), &body).await?;
            context.print(&volume, |volume| format!("{}: every link holds", volume.name))
        }
        VolumeCommand::Import { name, file, format, flatten, no_wait } => {
            let body = VolumeImport { name, file: absolute(&file)?, format, flatten };
            let started: TaskStarted = client.post("/v1/volumes/import", &body).await?;
            wait_for(context, &started, no_wait).await
        }
        VolumeCommand::Export { name, file, format, parent, chain, no_wait } => {
            let parent = parent.as_deref().map(absolute).transpose()?;
            let body = Export { file: absolute(&file)?, format, parent, chain };
            let started: TaskStarted = client.post(&format!("/v1/volumes/{name}/export"), &body).await?;
            wait_for(context, &started, no_wait).await
        }
        VolumeCommand::Attach { name, export, listen, read_only } => {
            let listen = listen.map(|address| address.to_string());
            let body = VolumeAttach { export, listen, read_only };
            let volume: Volume = client.post(&format!("/v1/volumes/{name}/attach"), &body).await?;
            context.print(&volume, |volume| volume.exports.join("\n"))
        }
        VolumeCommand::Detach { name } => {
            let volume: Volume = client.post(&format!("/v1/volumes/{name}/detach"), &()).await?;
            context.print(&volume, |volume| format!("{} detached", volume.name))
        }
        VolumeCommand::Remove { name, no_wait } if name.contains('@') => {
            let SnapshotRef { volume, snapshot } = name.parse()?;
            let started: TaskStarted =
                client.delete(&format!("/v1/volumes/{volume}/snapshots/{snapshot}")).await?;
            wait_for(context, &started, no_wait).await
        }
        VolumeCommand::Remove { name, no_wait: _ } => {
            let name: Name = name.parse()?;
            let volume: Volume = client.delete(&format!("/v1/volumes/{name}")).await?;
            context.print(&volume, |volume| format!("{} removed", volume.name))
        }
    }
}

fn row(volume: &Volume) -> Vec<String> {
    vec![
        volume.name.to_string(),
        show_bytes(volume.size_bytes),
        volume.parent.as_ref().map(ToString::to_string).unwrap_or_default(),
        volume.holder.to_string(),
        volume.epoch.to_string(),
        volume.attached_to.as_ref().map(ToString::to_string).unwrap_or_default(),
    ]
}

fn describe(volume: &Volume) -> String {
    let mut text = fields(&[
        ("volume", volume.name.to_string()),
        ("disk id", volume.disk_id.to_string()),
        ("data id", volume.data_id.to_string()),
        ("size", show_bytes(volume.size_bytes)),
        ("parent", volume.parent.as_ref().map_or_else(|| "-".into(), ToString::to_string)),
        ("holder", volume.holder.to_string()),
        ("epoch", volume.epoch.to_string()),
        ("attached to", volume.attached_to.as_ref().map_or_else(|| "-".into(), ToString::to_string)),
        ("depends on", volume.depends_on.as_ref().map_or_else(|| "-".into(), ToString::to_string)),
        ("layer on disk", volume.layer_bytes.map_or_else(|| "-".into(), show_bytes)),
        ("exports", volume.exports.join(" ")),
        ("limits", show_limits(&volume.limits)),
    ]);
    if !volume.chain.is_empty() {
        let rows: Vec<Vec<String>> = volume.chain.iter().map(|layer| layer_row(volume, layer)).collect();
        text += "\n";
        text += &table(&["LIES ON", "MADE", "ON DISK", "LAYER", ""], &rows);
    }
    text
}

fn show_limits(limits: &IoLimits) -> String {
    let iops = limits.iops.map(|rate| format!("{rate} requests/s"));
    let bytes = limits.bandwidth_bytes_s.map(|rate| format!("{}/s", show_bytes(rate)));
    let all: Vec<String> = iops.into_iter().chain(bytes).collect();
    if all.is_empty() { "-".into() } else { all.join(", ") }
}

fn layer_row(volume: &Volume, layer: &VolumeLayer) -> Vec<String> {
    let notes = [(layer.quiesced, "file systems frozen"), (layer.removing, "being removed")];
    let notes: Vec<&str> = notes.into_iter().filter(|(is, _)| *is).map(|(_, note)| note).collect();
    vec![
        layer
            .snapshot
            .as_ref()
            .map_or_else(|| "another volume's".into(), |name| format!("{}@{name}", volume.name)),
        show_time(layer.made_s),
        layer.layer_bytes.map_or_else(|| "-".into(), show_bytes),
        layer.disk_id.to_string(),
        notes.join(", "),
    ]
}
