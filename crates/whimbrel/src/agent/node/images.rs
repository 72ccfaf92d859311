//! What the API says and does about images.

use std::path::PathBuf;
use std::sync::Arc;

use whimbrel_host::records;
use whimbrel_host::volume::{export_as, export_file, format_of, open_file};
use whimbrel_host::{Error, ErrorKind, Result};
use whimbrel_wire::ImageRef;
use whimbrel_wire::api::{Export, Image, ImagePublish, TaskKind, TaskStarted};
use whimbrel_wire::meta::{ClusterRecord, key};

use super::Node;

impl Node {
    /// All images of the cluster.
    pub async fn images_list(&self) -> Result<Vec<Image>> {
        self.store.list().await
    }

    /// One image.
    pub async fn image_show(&self, image: &ImageRef) -> Result<Image> {
        self.store.show(image).await
    }

    /// Publishes a file of this host.
    pub async fn image_publish(&self, request: ImagePublish) -> Result<TaskStarted> {
        // A wrong path or format is worth an answer at once.
        let file = PathBuf::from(&request.file);
        format_of(&file, request.format.as_deref())?;
        if !file.exists() {
            return Err(Error::new(
                ErrorKind::NotFound,
                format!("publish {}: there is no such file", file.display()),
            ));
        }
        let store_url = match request.store_url {
            Some(url) => Some(url),
            None => self.default_store_url().await?,
        };
        let task = self.tasks.start(TaskKind::Publish, format!("image {}", request.image));
        let started = TaskStarted { task: task.id(), host: self.host.clone() };
        let (store, convert, task) = (Arc::clone(&self.store), Arc::clone(&self.convert), Arc::new(task));
        tokio::spawn(async move {
            let result = async {
                let source = open_file(convert, file, request.format.as_deref(), &task).await?;
                task.phase("store");
                store.publish(source, request.image, store_url, &task).await.map(drop)
            };
            let result = result.await;
            task.end(&result);
        });
        Ok(started)
    }

    /// Where the cluster's images go unless told otherwise.
    async fn default_store_url(&self) -> Result<Option<String>> {
        let cluster = records::get::<ClusterRecord>(&*self.meta, key::CLUSTER).await?;
        Ok(cluster.and_then(|cluster| cluster.value.default_store_url))
    }

    /// Checks every block.
    pub async fn image_verify(&self, image: &ImageRef, seed: bool) -> Result<TaskStarted> {
        self.store.resolve(image).await?;
        let task = self.tasks.start(TaskKind::Verify, format!("image {image}"));
        let started = TaskStarted { task: task.id(), host: self.host.clone() };
        let (store, image) = (Arc::clone(&self.store), image.clone());
        tokio::spawn(async move {
            let result = store.verify(&image, seed, &task).await.and_then(|report| {
                #[expect(clippy::cast_precision_loss, reason = "a figure for people")]
                task.figure("checked_blocks", report.checked_blocks as f64);
                match report.bad_blocks.first() {
                    None => Ok(()),
                    Some(first) => Err(Error::new(
                        ErrorKind::Corrupt,
                        format!(
                            "verify image {image}: {} bad blocks, the first: {first}",
                            report.bad_blocks.len()
                        ),
                    )),
                }
            });
            task.end(&result);
        });
        Ok(started)
    }

    /// Fetches the whole image into this host's cache.
    pub async fn image_prefetch(&self, image: &ImageRef) -> Result<TaskStarted> {
        self.store.resolve(image).await?;
        let task = self.tasks.start(TaskKind::Prefetch, format!("image {image}"));
        let started = TaskStarted { task: task.id(), host: self.host.clone() };
        let (store, image) = (Arc::clone(&self.store), image.clone());
        tokio::spawn(async move {
            let result = store.prefetch(&image, &task).await;
            task.end(&result);
        });
        Ok(started)
    }

    /// Writes the image to a file.
    pub async fn image_export(&self, image: &ImageRef, request: Export) -> Result<TaskStarted> {
        let record = self.store.resolve(image).await?;
        let file = PathBuf::from(&request.file);
        if request.chain {
            let what = format!("export image {image}: an image has no snapshots");
            return Err(Error::new(ErrorKind::InvalidInput, what));
        }
        let what = export_as(&file, &request)?;
        let task = self.tasks.start(TaskKind::Export, format!("image {image}"));
        let started = TaskStarted { task: task.id(), host: self.host.clone() };
        let (store, convert, task) = (Arc::clone(&self.store), Arc::clone(&self.convert), Arc::new(task));
        tokio::spawn(async move {
            let result = async {
                let parent = super::parent_of(&record);
                let source = store.open_image(&parent).await?;
                export_file(convert, source, file, what, &task).await
            };
            let result = result.await;
            task.end(&result);
        });
        Ok(started)
    }

    /// Forgets a name.
    pub async fn image_remove(&self, image: &ImageRef) -> Result<Image> {
        let shown = self.store.show(image).await?;
        self.store.remove(image).await?;
        Ok(shown)
    }
}
