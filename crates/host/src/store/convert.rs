//! Foreign disk images in and out: raw, qcow2, VHDX, VMDK.
//!
//! ```text
//!  open(file, format) ─┬─ raw ─────────────────────────────► as it is, with its holes
//!                      ├─ vhdx ─► chain verified ──────────► as it is (`vhdx`)
//!                      └─ qcow2, vmdk ─► inspect ─► check ─► convert ─► a sparse raw file, gone when dropped
//!                                        every file of the chain        by qemu-img, as an unprivileged user, under limits
//!  export(disk, file, format) ─┬─ raw, vhdx ─► file: what is not zeros, or differs from the parent (`copy`)
//!                              └─ qcow2, vmdk ─► sparse raw file ─► convert ─► file
//! ```
//!
//! Invariants
//! * The format is stated, or comes from the file's extension; it is never guessed from content.
//! * No name that stands in an image is opened unless it resolves, symbolic links followed, inside the one directory
//!   that the configuration allows, and its format stands in the image too. Names with a protocol (`json:`, `nbd:`, …)
//!   are refused. What qemu-img opens is handed to it as open files; it resolves no name of an image's choosing.
//! * An image that is cut off or damaged fails before anything was published.
//! * Temporary files live in a directory of this module's own and do not survive it: removed on drop, and at the next
//!   start after a crash.
//!
//! Not here: what becomes of the bytes (`store`, `volume`), the command line.

mod copy;
mod export;
mod inspect;
mod run;
mod source;
mod work;

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;

use crate::block_dev::BlockRead;
use crate::error::{Context, Error, ErrorKind, Result};
use crate::vhdx::{VhdxDisk, VhdxFile};

pub use copy::{Difference, each_data, each_difference};
use source::Source;

/// A file format.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// The disk's bytes.
    Raw,
    /// QEMU's, also compressed and with backing files.
    Qcow2,
    /// Hyper-V's, also lying on others.
    Vhdx,
    /// VMware's, in one file.
    Vmdk,
}

impl Format {
    /// Every format.
    pub const ALL: [Self; 4] = [Self::Raw, Self::Qcow2, Self::Vhdx, Self::Vmdk];

    /// The name people and QEMU use.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
            Self::Vhdx => "vhdx",
            Self::Vmdk => "vmdk",
        }
    }

    /// The format that a file's extension stands for.
    pub fn of_extension(file: &Path) -> Result<Self> {
        let extension = file.extension().and_then(|extension| extension.to_str()).unwrap_or_default();
        match extension.to_ascii_lowercase().as_str() {
            "raw" | "img" | "iso" => Ok(Self::Raw),
            "qcow2" => Ok(Self::Qcow2),
            "vhdx" => Ok(Self::Vhdx),
            "vmdk" => Ok(Self::Vmdk),
            _ => Err(Error::new(
                ErrorKind::InvalidInput,
                format!("read {}: its name does not say its format", file.display()),
            )
            .hint("state it: --format raw, qcow2, vhdx or vmdk")),
        }
    }
}

impl FromStr for Format {
    type Err = Error;
    fn from_str(text: &str) -> Result<Self> {
        Self::ALL.into_iter().find(|format| format.as_str() == text).ok_or_else(|| {
            Error::new(ErrorKind::InvalidInput, format!("read the format {text:?}: raw, qcow2, vhdx or vmdk"))
        })
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// How files are converted.
#[derive(Clone, Debug)]
pub struct ConvertConfig {
    /// Temporary files go into `convert/` under it; it needs room for a disk's data.
    pub work_dir: PathBuf,
    /// The one directory in which backing and external data files may be; none: they are refused.
    pub backing_dir: Option<PathBuf>,
    /// The user that qemu-img runs as (if the agent is root).
    pub uid: u32,
    /// And its group.
    pub gid: u32,
    /// The longest that one conversion may take, seconds.
    pub time_limit_s: u64,
}

impl ConvertConfig {
    /// The default: user and group `nobody`/`nogroup` of Debian, six hours, no backing files.
    pub fn new(work_dir: &Path) -> Self {
        Self {
            work_dir: work_dir.to_owned(),
            backing_dir: None,
            uid: 65534,
            gid: 65534,
            time_limit_s: 6 * 3600,
        }
    }
}

/// Called now and then with bytes done and bytes in all; an error stops the work.
pub type Progress<'a> = &'a mut dyn FnMut(u64, u64) -> Result<()>;

/// See the module's charter. Calls block: run them on a thread that may.
#[derive(Debug)]
pub struct Converter {
    config: ConvertConfig,
}

impl Converter {
    /// Removes what a crash left behind.
    pub fn new(config: ConvertConfig) -> Result<Self> {
        work::sweep(&config.work_dir)?;
        Ok(Self { config })
    }

    /// Opens a disk image. Raw and VHDX files are read as they are; others are converted into a temporary file first.
    ///
    /// `InvalidInput`: not of that format, or it names files that it may not. `Corrupt`: cut off or damaged.
    /// `Refused`: a parent is not what it was when its child was made. `NoSpace`: no room in the work directory.
    /// `Missing`: no qemu-img.
    pub fn open(
        &self,
        file: &Path,
        format: Option<Format>,
        progress: Progress<'_>,
    ) -> Result<Arc<dyn BlockRead>> {
        let stated = format.is_some();
        let format = match format {
            Some(format) => format,
            None => Format::of_extension(file)?,
        };
        match format {
            Format::Raw => {
                let source = Source::open_raw(file)?;
                if !stated {
                    inspect::refuse_foreign_magic(file, &source)?;
                }
                Ok(Arc::new(source))
            }
            Format::Vhdx => Ok(Arc::new(self.open_vhdx(file)?)),
            Format::Qcow2 | Format::Vmdk => {
                let chain = inspect::chain(&self.config, file, format)?;
                Ok(Arc::new(source::convert(&self.config, &chain, progress)?))
            }
        }
    }

    /// The same, with each of the files that a VHDX file lies on: the lowest first, the disk itself last.
    pub fn open_levels(
        &self,
        file: &Path,
        format: Option<Format>,
        progress: Progress<'_>,
    ) -> Result<Vec<Level>> {
        let is_vhdx = match format {
            Some(format) => format == Format::Vhdx,
            None => Format::of_extension(file)? == Format::Vhdx,
        };
        if !is_vhdx {
            return Ok(vec![Level::new(file, self.open(file, format, progress)?)]);
        }
        let name = |disk: &VhdxDisk| disk.top().map(|file| PathBuf::from(file.name()));
        let levels = self.open_vhdx(file)?.levels();
        Ok(levels.map(|disk| Level::new(&name(&disk).unwrap_or_default(), Arc::new(disk))).collect())
    }

    /// Opens a VHDX file with everything it lies on.
    fn open_vhdx(&self, file: &Path) -> Result<VhdxDisk> {
        let path = file.canonicalize().with_context(|| format!("read {}", file.display()))?;
        VhdxDisk::open(&path, &inspect::Parents { config: &self.config })
    }

    /// Writes `disk` into the new file `to`, which appears whole or not at all.
    ///
    /// `InvalidInput`: another format than VHDX with a parent. `AlreadyExists`: there is such a file. `NoSpace`: no room
    /// beside it or in the work directory. What `progress` fails with.
    pub fn export(
        &self,
        disk: &dyn BlockRead,
        to: &Path,
        what: &ExportAs,
        progress: Progress<'_>,
    ) -> Result<()> {
        let (whole, alone);
        let parent: Option<(&VhdxFile, &dyn BlockRead)> = match (&what.parent, what.format) {
            (None, _) => None,
            (Some(ParentFile { file, disk: None }), Format::Vhdx) => {
                whole = self.open_vhdx(file)?;
                whole.top().map(|top| (top, &whole as &dyn BlockRead))
            }
            (Some(ParentFile { file, disk: Some(disk) }), Format::Vhdx) => {
                let path = file.canonicalize().with_context(|| format!("read {}", file.display()))?;
                alone = inspect::open_alone(&path)?;
                Some((&alone, &**disk))
            }
            (Some(_), other) => {
                let why = format!("export to {}: a {other} file is not written over a parent", to.display());
                return Err(Error::new(ErrorKind::InvalidInput, why).hint("--format vhdx"));
            }
        };
        export::export(&self.config, disk, to, what, parent, progress)
    }
}

/// What to write.
#[derive(Clone)]
pub struct ExportAs {
    /// The format.
    pub format: Format,
    /// The disk's identity, where the format has one; random if there is none.
    pub disk_id: Option<uuid::Uuid>,
    /// A VHDX file of the same size: only what differs from it is written, and the new file lies on it.
    pub parent: Option<ParentFile>,
}

/// What a VHDX file is written over.
#[derive(Clone)]
pub struct ParentFile {
    /// The file.
    pub file: PathBuf,
    /// What it holds, where that is known: what it lies on is not looked for then.
    pub disk: Option<Arc<dyn BlockRead>>,
}

/// A disk as one of the files of a chain has it.
pub struct Level {
    /// The file's name, without its extension.
    pub name: String,
    /// Its content.
    pub disk: Arc<dyn BlockRead>,
}

impl Level {
    fn new(file: &Path, disk: Arc<dyn BlockRead>) -> Self {
        let name = file.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        Self { name, disk }
    }
}

impl ExportAs {
    /// A whole file of this format.
    pub fn whole(format: Format) -> Self {
        Self { format, disk_id: None, parent: None }
    }
}

#[cfg(test)]
mod test;
