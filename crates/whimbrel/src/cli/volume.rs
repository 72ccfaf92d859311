//! `whimbrel volume …`.

use std::path::PathBuf;

use clap::Subcommand;
use whimbrel_wire::api::{
    Export, TaskStarted, Volume, VolumeAttach, VolumeCheck, VolumeCreate, VolumeImport,
};
use whimbrel_wire::size::{parse_bytes, show_bytes};
use whimbrel_wire::{ImageRef, Name};

use super::Context;
use super::image::absolute;
use super::show::{fields, table};
use super::task::wait_for;

/// The commands.
#[derive(Debug, Subcommand)]
pub enum VolumeCommand {
    /// Make a volume over an image, or an empty one.
    Create {
        /// Its name.
        name: Name,
        /// The image under it: `NAME[:TAG]`
        #[arg(long, required_unless_present = "size")]
        image: Option<ImageRef>,
        /// Size of the disk (with --image: not smaller than the image).
        #[arg(long, value_parser = parse_bytes)]
        size: Option<u64>,
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
    /// Make a volume from a disk image file.
    Import {
        /// Its name.
        name: Name,
        /// The image file.
        file: PathBuf,
        /// raw, qcow2, vhdx or vmdk; from the extension if not given.
        #[arg(long, value_name = "F")]
        format: Option<String>,
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
        /// Print the task and return at once.
        #[arg(long)]
        no_wait: bool,
    },
    /// Show a volume to programs of this host on a socket, and print the socket's path; or to others over TLS.
    Attach {
        /// Its name.
        name: Name,
        /// nbd or vhost-user-blk
        #[arg(long, default_value = "nbd")]
        export: String,
        /// A TCP port instead of a socket, with TLS and the cluster's certificates (nbd only).
        #[arg(long, value_name = "IP:PORT")]
        listen: Option<std::net::SocketAddr>,
        /// Clients may only read (nbd only).
        #[arg(long)]
        read_only: bool,
    },
    /// Take the socket away again.
    Detach {
        /// Its name.
        name: Name,
    },
    /// Delete a volume and its data.
    Remove {
        /// Its name.
        name: Name,
    },
}

/// Carries out a command.
pub async fn run(context: &Context, command: VolumeCommand) -> anyhow::Result<()> {
    let client = &context.client;
    match command {
        VolumeCommand::Create { name, image, size } => {
            let body = VolumeCreate { name, image, size_bytes: size };
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
        VolumeCommand::Import { name, file, format, no_wait } => {
            let body = VolumeImport { name, file: absolute(&file)?, format };
            let started: TaskStarted = client.post("/v1/volumes/import", &body).await?;
            wait_for(context, &started, no_wait).await
        }
        VolumeCommand::Export { name, file, format, parent, no_wait } => {
            let parent = parent.as_deref().map(absolute).transpose()?;
            let body = Export { file: absolute(&file)?, format, parent };
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
        VolumeCommand::Remove { name } => {
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
    fields(&[
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
    ])
}
