//! A repository of images in an object store: a directory, S3, or read-only HTTP.
//!
//! ```text
//!   /dir, file:///dir                               objects are files; each write is synced and renamed into place
//!   s3://BUCKET/PREFIX?endpoint=URL&region=NAME     keys from the configuration, else AWS_ACCESS_KEY_ID, …
//!   http://HOST/PATH, https://HOST/PATH             reading only; names are found by their path, nothing is listed
//! ```
//!
//! Invariants: a URL holds no secret, since it is stored and shown; one that does is refused. Every call is limited in time; failures that may pass are tried again a few times; after some failures
//! in a row the `breaker` answers at once for a while, so that readers turn to peers instead of waiting. What is
//! read is checked by the caller: here only its length is.
//!
//! Not here: what the objects mean (`wire::record::image`), who may write when (`guard`).

mod breaker;

use std::path::Path as FilePath;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use futures_util::{StreamExt, TryStreamExt};
use object_store::aws::AmazonS3Builder;
use object_store::http::HttpBuilder;
use object_store::local::LocalFileSystem;
use object_store::path::Path;
use object_store::{
    BackoffConfig, ClientOptions, Error as StoreError, ObjectStore, ObjectStoreExt, PutPayload, RetryConfig,
    WriteMultipart,
};

use crate::error::{Context, Error, ErrorKind, Result};
use crate::metrics::metrics;
use breaker::Breaker;

/// For reading a block or a small object.
const READ_TIMEOUT: Duration = Duration::from_secs(12);
/// For writing a pack, and for listing.
const WRITE_TIMEOUT: Duration = Duration::from_secs(180);
/// Objects larger than this are written in parts.
const PART_BYTES: usize = 16 << 20;
/// The most objects of one listing.
const LIST_MAX: usize = 4 << 20;

/// See the module's charter.
pub struct Repo {
    url: String,
    store: Box<dyn ObjectStore>,
    prefix: String,
    writable: bool,
    breaker: Breaker,
    fetched_bytes: AtomicU64,
    sent_bytes: AtomicU64,
}

/// Keys of an S3 account.
#[derive(Clone)]
pub struct S3Keys {
    /// Names the key.
    pub access_key_id: String,
    /// The secret; never shown.
    pub secret_access_key: String,
}

impl std::fmt::Debug for S3Keys {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "S3Keys({})", self.access_key_id)
    }
}

/// One object of a listing.
#[derive(Clone, Debug)]
pub struct Listed {
    /// Its path, without the repository's prefix.
    pub path: String,
    /// Its size, bytes.
    pub size_bytes: u64,
    /// When it was last written, seconds since 1970 by the store's clock.
    pub modified_s: i64,
}

impl Repo {
    /// A repository at `url`. `create` makes a directory that does not exist.
    pub fn open(url: &str, create: bool, keys: Option<&S3Keys>) -> Result<Arc<Self>> {
        // Without what follows the "?": a secret that somebody put there must not get into messages.
        let what = || format!("open the store {}", url.split('?').next().unwrap_or_default());
        let (store, prefix, writable): (Box<dyn ObjectStore>, String, bool) =
            if let Some(rest) = url.strip_prefix("s3://") {
                let (store, prefix) = open_s3(rest, keys).with_context(what)?;
                (store, prefix, true)
            } else if url.starts_with("http://") || url.starts_with("https://") {
                let store = HttpBuilder::new()
                    .with_url(url)
                    .with_retry(retries())
                    .with_client_options(client_options())
                    .build()
                    .map_err(|error| invalid(what(), error))?;
                (Box::new(store), String::new(), false)
            } else if let Some(dir) = directory_of(url) {
                (open_directory(dir, create).with_context(what)?, String::new(), true)
            } else {
                return Err(Error::new(ErrorKind::InvalidInput, what())
                    .hint("a store is /dir, file:///dir, s3://bucket/prefix?endpoint=… or http(s)://…"));
            };
        Ok(Arc::new(Self {
            url: url.to_owned(),
            store,
            prefix,
            writable,
            breaker: Breaker::default(),
            fetched_bytes: AtomicU64::new(0),
            sent_bytes: AtomicU64::new(0),
        }))
    }

    /// The URL it was opened with.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// Bytes of objects read so far.
    pub fn fetched_bytes(&self) -> u64 {
        self.fetched_bytes.load(Ordering::Relaxed)
    }

    fn count_fetched(&self, bytes: usize) {
        self.fetched_bytes.fetch_add(bytes as u64, Ordering::Relaxed);
        metrics().image_store_read_bytes.inc_by(bytes as u64);
    }

    /// Bytes of objects written so far.
    pub fn sent_bytes(&self) -> u64 {
        self.sent_bytes.load(Ordering::Relaxed)
    }

    /// Fails with a sentence if this repository cannot be written.
    pub fn check_writable(&self) -> Result<()> {
        if self.writable {
            return Ok(());
        }
        Err(Error::new(ErrorKind::Unsupported, format!("write to {}: HTTP stores are read-only", self.url))
            .hint("publish to the directory or bucket behind it"))
    }

    /// Exactly `length` bytes of an object; an object that is too short is [`ErrorKind::Corrupt`].
    pub async fn range(&self, path: &str, offset: u64, length: u64) -> Result<Bytes> {
        let what = || format!("read {path} of {}", self.url);
        let place = self.place(path);
        let read = self.store.get_range(&place, offset..offset + length);
        let bytes = match self.limited(READ_TIMEOUT, read).await {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == ErrorKind::Io => {
                // Stores word a range beyond the end in many ways; the size tells.
                return match self.size(path).await {
                    Ok(Some(size)) if size < offset + length => Err(too_short(size, offset + length)),
                    _ => Err(error),
                }
                .with_context(what);
            }
            Err(error) => return Err(error).with_context(what),
        };
        self.count_fetched(bytes.len());
        if bytes.len() as u64 != length {
            return Err(too_short(offset + bytes.len() as u64, offset + length)).with_context(what);
        }
        Ok(bytes)
    }

    /// A whole object of at most `max_bytes`.
    pub async fn get(&self, path: &str, max_bytes: u64) -> Result<Bytes> {
        let what = || format!("read {path} of {}", self.url);
        let place = self.place(path);
        let read = async {
            let found = self.store.get(&place).await?;
            let size = found.meta.size;
            if size > max_bytes {
                return Ok((size, Bytes::new()));
            }
            found.bytes().await.map(|bytes| (size, bytes))
        };
        let (size, bytes) = self.limited(READ_TIMEOUT, read).await.with_context(what)?;
        if size > max_bytes || bytes.len() as u64 > max_bytes {
            let error =
                Error::new(ErrorKind::Corrupt, format!("it has {size} bytes, {max_bytes} are the limit"));
            return Err(error).with_context(what);
        }
        self.count_fetched(bytes.len());
        Ok(bytes)
    }

    /// The size of an object, `None` if there is none.
    pub async fn size(&self, path: &str) -> Result<Option<u64>> {
        let place = self.place(path);
        match self.limited(READ_TIMEOUT, self.store.head(&place)).await {
            Ok(meta) => Ok(Some(meta.size)),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error).with_context(|| format!("look for {path} in {}", self.url)),
        }
    }

    /// Writes an object; it appears whole or not at all.
    pub async fn put(&self, path: &str, bytes: Bytes) -> Result<()> {
        self.check_writable()?;
        let length = bytes.len();
        let place = self.place(path);
        let write = async {
            if length <= PART_BYTES {
                self.store.put(&place, PutPayload::from_bytes(bytes)).await?;
            } else {
                let upload = self.store.put_multipart(&place).await?;
                let mut parts = WriteMultipart::new_with_chunk_size(upload, PART_BYTES);
                parts.put(bytes);
                parts.finish().await?;
            }
            Ok(())
        };
        self.limited(WRITE_TIMEOUT, write).await.with_context(|| format!("write {path} to {}", self.url))?;
        self.sent_bytes.fetch_add(length as u64, Ordering::Relaxed);
        Ok(())
    }

    /// Writes a file as an object.
    pub async fn put_file(&self, path: &str, file: &FilePath) -> Result<()> {
        self.check_writable()?;
        let what = || format!("write {path} to {}", self.url);
        let length = tokio::fs::metadata(file).await.with_context(what)?.len();
        if length <= PART_BYTES as u64 {
            return self.put(path, Bytes::from(tokio::fs::read(file).await.with_context(what)?)).await;
        }
        let place = self.place(path);
        let upload = self.limited(READ_TIMEOUT, self.store.put_multipart(&place)).await.with_context(what)?;
        let mut parts = WriteMultipart::new_with_chunk_size(upload, PART_BYTES);
        let mut at = 0;
        while at < length {
            let part = read_part(file, at, length - at).await.with_context(what)?;
            at += part.len() as u64;
            self.limited(WRITE_TIMEOUT, parts.wait_for_capacity(2)).await.with_context(what)?;
            parts.put(part);
        }
        self.limited(WRITE_TIMEOUT, parts.finish()).await.with_context(what)?;
        self.sent_bytes.fetch_add(length, Ordering::Relaxed);
        Ok(())
    }

    /// Removes an object; one that is not there is removed already.
    pub async fn delete(&self, path: &str) -> Result<()> {
        self.check_writable()?;
        let place = self.place(path);
        match self.limited(READ_TIMEOUT, self.store.delete(&place)).await {
            Err(error) if error.kind() != ErrorKind::NotFound => {
                Err(error).with_context(|| format!("remove {path} from {}", self.url))
            }
            _ => Ok(()),
        }
    }

    /// All objects under a prefix, as whole path segments.
    pub async fn list(&self, prefix: &str) -> Result<Vec<Listed>> {
        let place = self.place(prefix);
        let skip = if self.prefix.is_empty() { 0 } else { self.prefix.len() + 1 };
        let listed = self.store.list(Some(&place)).map_ok(|meta| Listed {
            path: meta.location.as_ref().get(skip..).unwrap_or_default().to_owned(),
            size_bytes: meta.size,
            modified_s: meta.last_modified.timestamp(),
        });
        let read = listed.take(LIST_MAX).try_collect::<Vec<_>>();
        match self.limited(WRITE_TIMEOUT, read).await {
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(Vec::new()),
            other => other.with_context(|| format!("list {prefix} of {}", self.url)),
        }
    }

    fn place(&self, path: &str) -> Path {
        if self.prefix.is_empty() { Path::from(path) } else { Path::from(format!("{}/{path}", self.prefix)) }
    }

    /// Runs a call under a limit of time and the breaker.
    async fn limited<T>(
        &self,
        limit: Duration,
        call: impl Future<Output = object_store::Result<T>>,
    ) -> Result<T> {
        self.breaker.check()?;
        let result = match tokio::time::timeout(limit, call).await {
            Ok(result) => result.map_err(from_store),
            Err(_) => Err(Error::new(
                ErrorKind::TimedOut,
                format!("wait for the store: no answer in {} s", limit.as_secs()),
            )),
        };
        self.breaker.note(result.as_ref().map_or_else(
            |error| !matches!(error.kind(), ErrorKind::Unavailable | ErrorKind::TimedOut),
            |_| true,
        ));
        result
    }
}

fn too_short(size: u64, needed: u64) -> Error {
    Error::new(ErrorKind::Corrupt, format!("it has {size} bytes, {needed} are needed: it is cut short"))
}

fn invalid(what: String, error: impl std::error::Error + Send + Sync + 'static) -> Error {
    Error::with_source(ErrorKind::InvalidInput, what, error)
}

/// The directory a URL means, if it means one.
fn directory_of(url: &str) -> Option<&str> {
    url.strip_prefix("file://").or(Some(url)).filter(|dir| dir.starts_with('/'))
}

fn open_directory(dir: &str, create: bool) -> Result<Box<dyn ObjectStore>> {
    if create {
        std::fs::create_dir_all(dir).with_context(|| format!("make the directory {dir}"))?;
    }
    let store = LocalFileSystem::new_with_prefix(dir)
        .map_err(from_store)
        .map_err(|error| error.hint("is the directory there, and mounted?"))?;
    Ok(Box::new(store.with_fsync(true)))
}

/// `BUCKET/PREFIX?key=value&…`; values are taken as they stand.
fn open_s3(rest: &str, keys: Option<&S3Keys>) -> Result<(Box<dyn ObjectStore>, String)> {
    let (place, query) = rest.split_once('?').unwrap_or((rest, ""));
    let (bucket, prefix) = place.split_once('/').unwrap_or((place, ""));
    let mut options = client_options();
    let mut builder = AmazonS3Builder::from_env().with_bucket_name(bucket).with_retry(retries());
    if let Some(keys) = keys {
        builder =
            builder.with_access_key_id(&keys.access_key_id).with_secret_access_key(&keys.secret_access_key);
    }
    for (key, value) in query.split('&').filter_map(|pair| pair.split_once('=')) {
        builder = match key {
            "endpoint" => {
                options = options.with_allow_http(value.starts_with("http://"));
                builder.with_endpoint(value)
            }
            "region" => builder.with_region(value),
            "virtual_hosted_style" => builder.with_virtual_hosted_style_request(value == "true"),
            other => {
                return Err(Error::new(
                    ErrorKind::InvalidInput,
                    format!("{other} is not known: endpoint, region and virtual_hosted_style are"),
                )
                .hint("keys belong into the agent's configuration or environment, not into a URL"));
            }
        };
    }
    let store = builder
        .with_client_options(options)
        .build()
        .map_err(|error| Error::with_source(ErrorKind::InvalidInput, "set up S3", error))?;
    Ok((Box::new(store), prefix.trim_matches('/').to_owned()))
}

fn retries() -> RetryConfig {
    RetryConfig {
        backoff: BackoffConfig {
            init_backoff: Duration::from_millis(100),
            max_backoff: Duration::from_secs(2),
            base: 2.0,
        },
        max_retries: 3,
        retry_timeout: Duration::from_secs(10),
    }
}

fn client_options() -> ClientOptions {
    ClientOptions::new()
        .with_connect_timeout(Duration::from_secs(3))
        .with_timeout(WRITE_TIMEOUT)
        .with_allow_http(true)
        .with_pool_max_idle_per_host(8)
}

fn from_store(error: StoreError) -> Error {
    let kind = match &error {
        StoreError::NotFound { .. } => ErrorKind::NotFound,
        StoreError::PermissionDenied { .. } | StoreError::Unauthenticated { .. } => ErrorKind::Denied,
        StoreError::AlreadyExists { .. } | StoreError::Precondition { .. } => ErrorKind::AlreadyExists,
        StoreError::NotSupported { .. } | StoreError::NotImplemented { .. } => ErrorKind::Unsupported,
        StoreError::InvalidPath { .. } | StoreError::UnknownConfigurationKey { .. } => {
            ErrorKind::InvalidInput
        }
        other => kind_of_chain(other),
    };
    Error::with_source(kind, "ask the store", error)
}

/// Digs for what the operating system or the HTTP client said.
fn kind_of_chain(error: &StoreError) -> ErrorKind {
    let mut next: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(source) = next {
        if let Some(io) = source.downcast_ref::<std::io::Error>() {
            return crate::error::kind_of_io(io);
        }
        let text = source.to_string();
        if ["error sending request", "status 5", "timed out", "Server error"]
            .iter()
            .any(|sign| text.contains(sign))
        {
            return ErrorKind::Unavailable;
        }
        next = source.source();
    }
    ErrorKind::Io
}

async fn read_part(file: &FilePath, offset: u64, left: u64) -> Result<Bytes> {
    let file = file.to_owned();
    let read = move || {
        use std::os::unix::fs::FileExt;
        let length = usize::try_from(left).unwrap_or(PART_BYTES).min(PART_BYTES);
        let mut part = vec![0; length];
        std::fs::File::open(&file)?.read_exact_at(&mut part, offset)?;
        Ok::<_, std::io::Error>(Bytes::from(part))
    };
    let part = tokio::task::spawn_blocking(read).await;
    part.map_err(|error| Error::with_source(ErrorKind::Internal, "read a part", error))?
        .context("read a part")
}

#[cfg(test)]
mod test;
