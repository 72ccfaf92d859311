//! `whimbrel image …`.

use std::path::PathBuf;

use clap::Subcommand;
use whimbrel_wire::ImageRef;
use whimbrel_wire::api::{Export, Image, ImageCheck, ImagePublish, TaskStarted};
use whimbrel_wire::size::show_bytes;

use super::Context;
use super::show::{fields, table};
use super::task::wait_for;

/// The commands.
#[derive(Debug, Subcommand)]
pub enum ImageCommand {
    /// Put a disk image into a store, under a name.
    Publish {
        /// The image file.
        file: PathBuf,
        /// raw, qcow2, vhdx or vmdk; taken from the file's extension if not given, never from its content.
        #[arg(long, value_name = "F")]
        format: Option<String>,
        /// `NAME[:TAG]`
        #[arg(long)]
        name: ImageRef,
        /// A directory, s3://BUCKET/PREFIX or https://…; the cluster's default store otherwise.
        #[arg(long, value_name = "URL")]
        store: Option<String>,
        /// Print the task and return at once.
        #[arg(long)]
        no_wait: bool,
    },
    /// All images.
    List,
    /// One image, with what was read of it and where from.
    Show {
        /// `NAME[:TAG]`
        name: ImageRef,
    },
    /// Check every block against its hash, in the cache and, with --store, in the store.
    Verify {
        /// `NAME[:TAG]`
        name: ImageRef,
        /// Read the store too.
        #[arg(long)]
        store: bool,
        /// Print the task and return at once.
        #[arg(long)]
        no_wait: bool,
    },
    /// Fetch the whole image into this host's cache.
    Prefetch {
        /// `NAME[:TAG]`
        name: ImageRef,
        /// Return when everything is there (the default; --no-wait returns at once).
        #[arg(long)]
        wait: bool,
        /// Print the task and return at once.
        #[arg(long, conflicts_with = "wait")]
        no_wait: bool,
    },
    /// Write the image to a file.
    Export {
        /// `NAME[:TAG]`
        name: ImageRef,
        /// The file; it must not exist.
        file: PathBuf,
        /// raw, qcow2, vhdx or vmdk; from the extension if not given.
        #[arg(long, value_name = "F")]
        format: Option<String>,
        /// Print the task and return at once.
        #[arg(long)]
        no_wait: bool,
    },
    /// Forget the name; blocks that no other image needs are collected later.
    Remove {
        /// `NAME[:TAG]`
        name: ImageRef,
    },
}

/// Carries out a command.
pub async fn run(context: &Context, command: ImageCommand) -> anyhow::Result<()> {
    match command {
        ImageCommand::Publish { file, format, name, store, no_wait } => {
            let file = absolute(&file)?;
            let body = ImagePublish { file, format, image: name, store_url: store };
            let started: TaskStarted = context.client.post("/v1/images", &body).await?;
            wait_for(context, &started, no_wait).await
        }
        ImageCommand::List => {
            let images: Vec<Image> = context.client.get("/v1/images").await?;
            context.print(&images, |images| {
                let rows: Vec<Vec<String>> = images
                    .iter()
                    .map(|image| {
                        vec![
                            image.name.to_string(),
                            image.id.to_string().chars().take(12).collect(),
                            show_bytes(image.size_bytes),
                            show_bytes(image.stored_bytes),
                            show_bytes(image.cached_bytes),
                            image.store_url.clone(),
                        ]
                    })
                    .collect();
                table(&["NAME", "ID", "SIZE", "STORED", "CACHED HERE", "STORE"], &rows)
            })
        }
        ImageCommand::Show { name } => {
            let image: Image = context.client.get(&format!("/v1/images/{name}")).await?;
            context.print(&image, describe)
        }
        ImageCommand::Verify { name, store, no_wait } => {
            let started: TaskStarted =
                context.client.post(&format!("/v1/images/{name}/verify"), &ImageCheck { store }).await?;
            wait_for(context, &started, no_wait).await
        }
        ImageCommand::Prefetch { name, wait: _, no_wait } => {
            let started: TaskStarted =
                context.client.post(&format!("/v1/images/{name}/prefetch"), &()).await?;
            wait_for(context, &started, no_wait).await
        }
        ImageCommand::Export { name, file, format, no_wait } => {
            let body = Export { file: absolute(&file)?, format, parent: None, chain: false };
            let started: TaskStarted =
                context.client.post(&format!("/v1/images/{name}/export"), &body).await?;
            wait_for(context, &started, no_wait).await
        }
        ImageCommand::Remove { name } => {
            let image: Image = context.client.delete(&format!("/v1/images/{name}")).await?;
            context.print(&image, |image| format!("{} removed", image.name))
        }
    }
}

/// The agent has another working directory.
pub fn absolute(file: &std::path::Path) -> anyhow::Result<String> {
    Ok(std::path::absolute(file)?.to_string_lossy().into_owned())
}

fn describe(image: &Image) -> String {
    fields(&[
        ("image", image.name.to_string()),
        ("id", image.id.to_string()),
        ("size", show_bytes(image.size_bytes)),
        ("stored", show_bytes(image.stored_bytes)),
        ("cached here", show_bytes(image.cached_bytes)),
        ("read from layers", show_bytes(image.read_bytes.layer)),
        ("read from cache", show_bytes(image.read_bytes.cache)),
        ("read from peers", show_bytes(image.read_bytes.peer)),
        ("read from seed", show_bytes(image.read_bytes.seed)),
        ("store", image.store_url.clone()),
    ])
}
