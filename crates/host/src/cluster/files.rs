//! What a member keeps on disk.
//!
//! ```text
//!   DIR/ca.pem         the authority's certificate
//!   DIR/ca.key         its key: on the host that made the cluster only, mode 0600
//!   DIR/ROLE.pem       certificate and key of this member, in one file so that they change together, mode 0600
//!   DIR/cluster.json   Membership: written last, its presence says that the rest is there
//! ```
//!
//! Invariant: a file is replaced whole (written beside, synced, renamed, the directory synced).

use rustix::fs::{Mode, OFlags};
use serde::{Deserialize, Serialize};
use std::fs;
use std::io::Write;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use whimbrel_wire::peer::cluster::{Member, MetaLocation};
use whimbrel_wire::{HostId, Name, Role};

use super::authority::Authority;
use crate::error::{Context, Error, ErrorKind, Result};
use crate::link::Credentials;

/// Which cluster this is a member of, and as what.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Membership {
    /// The cluster's name.
    pub cluster: Name,
    /// What the certificate allows.
    pub role: Role,
    /// This member's name.
    pub name: HostId,
    /// The host that signs certificates.
    pub signer: Member,
    /// Where the metadata store is.
    pub meta: MetaLocation,
}

/// See the module's charter.
#[derive(Clone, Debug)]
pub struct Files {
    dir: PathBuf,
}

impl Files {
    /// The files under `dir` of an existing member.
    pub fn open(dir: &Path) -> Result<Self> {
        let files = Self { dir: dir.to_owned() };
        if files.path("cluster.json").exists() {
            return Ok(files);
        }
        Err(Error::new(ErrorKind::NotFound, format!("read {}: this host is in no cluster", dir.display()))
            .hint("run `whimbrel cluster init`, or `whimbrel host join ADDR --token T`"))
    }

    /// A place for a new member's files; refuses one that has some.
    pub(super) fn create(dir: &Path) -> Result<Self> {
        let files = Self { dir: dir.to_owned() };
        if files.path("cluster.json").exists() {
            let what = format!("make {}: this host is in a cluster already", dir.display());
            return Err(
                Error::new(ErrorKind::AlreadyExists, what).hint("remove the directory to leave that cluster")
            );
        }
        let made = fs::DirBuilder::new().recursive(true).mode(0o700).create(dir);
        made.with_context(|| format!("make directory {}", dir.display()))?;
        Ok(files)
    }

    /// The directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    fn read(&self, name: &str) -> Result<String> {
        let path = self.path(name);
        fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))
    }

    fn write(&self, name: &str, text: &str, mode: u32) -> Result<()> {
        let path = self.path(name);
        let beside = self.path(&format!(".{name}.new"));
        let write = || -> std::io::Result<()> {
            // A leftover of a crash may have any mode: made anew.
            let _ = fs::remove_file(&beside);
            let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
            let mut file = fs::File::from(rustix::fs::open(&beside, flags, Mode::from_raw_mode(mode))?);
            file.write_all(text.as_bytes())?;
            file.sync_all()?;
            fs::rename(&beside, &path)?;
            fs::File::open(&self.dir)?.sync_all()
        };
        write().with_context(|| format!("write {}", path.display()))
    }

    /// The membership.
    pub fn membership(&self) -> Result<Membership> {
        let text = self.read("cluster.json")?;
        serde_json::from_str(&text).map_err(|error| {
            let what = format!("read {}", self.path("cluster.json").display());
            Error::with_source(ErrorKind::Corrupt, what, error)
        })
    }

    pub(super) fn write_membership(&self, membership: &Membership) -> Result<()> {
        let text = serde_json::to_string_pretty(membership)
            .map_err(|error| Error::with_source(ErrorKind::Internal, "write the membership", error))?;
        self.write("cluster.json", &text, 0o644)
    }

    /// The authority's certificate, PEM.
    pub fn ca_pem(&self) -> Result<String> {
        self.read("ca.pem")
    }

    /// Where the authority's certificate is.
    pub fn ca_path(&self) -> PathBuf {
        self.path("ca.pem")
    }

    pub(super) fn write_ca(&self, ca_pem: &str) -> Result<()> {
        self.write("ca.pem", ca_pem, 0o644)
    }

    /// The authority, on the host that has its key; `None` on others.
    pub fn authority(&self) -> Result<Option<Authority>> {
        if !self.path("ca.key").exists() {
            return Ok(None);
        }
        Ok(Some(Authority::from_pem(&self.ca_pem()?, &self.read("ca.key")?)?))
    }

    pub(super) fn write_authority(&self, authority: &Authority) -> Result<()> {
        self.write("ca.key", &authority.key_pem(), 0o600)?;
        self.write_ca(authority.certificate_pem())
    }

    /// The certificate and key for `role`, ready for use.
    pub fn credentials(&self, role: Role) -> Result<Arc<Credentials>> {
        let both = self.read(&format!("{role}.pem"))?;
        Credentials::from_pem(&self.ca_pem()?, &both, &both)
    }

    /// Where certificate and key for `role` are: one PEM file, also for other programs (`curl --cert`).
    pub fn credentials_path(&self, role: Role) -> PathBuf {
        self.path(&format!("{role}.pem"))
    }

    pub(super) fn write_credentials(&self, role: Role, certificate_pem: &str, key_pem: &str) -> Result<()> {
        self.write(&format!("{role}.pem"), &format!("{certificate_pem}{key_pem}"), 0o600)
    }
}
