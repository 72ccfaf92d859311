//! What an image says about other files, before any program follows it.
//!
//! The headers of qcow2 and VMDK are read here, because merely opening such a file with qemu-img may open what it
//! names. VHDX files are read by `vhdx`, which asks here where their parents may be. A chain is a list of open files, each with its stated format.
//!
//! Not here: whether the content is sound (`source` asks `qemu-img check`).

use std::fs::{File, OpenOptions};
use std::io::{Seek, SeekFrom, Write};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use whimbrel_engine::disk::vhdx::ParentPath;

use super::run::fd_path;
use super::work::WorkDir;
use super::{ConvertConfig, Format, Source};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::vhdx::{FindParent, VhdxFile};

const DEPTH_MAX: usize = 16;
const NAME_LEN_MAX: u32 = 1023;
const QCOW2_MAGIC: u32 = 0x5146_49fb;
const QCOW2_DATA_FILE: u64 = 1 << 2;
const EXTENSION_BACKING_FORMAT: u32 = 0xe279_2aca;
const EXTENSION_DATA_FILE: u32 = 0x4441_5441;

/// One image of a chain, open.
#[derive(Debug)]
pub(super) struct Link {
    pub(super) path: PathBuf,
    pub(super) format: Format,
    pub(super) file: File,
    /// qcow2's external data file.
    pub(super) data_file: Option<File>,
}

/// An image and what it lies on, in order.
#[derive(Debug)]
pub(super) struct Chain {
    pub(super) links: Vec<Link>,
    /// Copies of files that the converter's user may not read are here.
    pub(super) _work: WorkDir,
}

impl Chain {
    /// The file that people named.
    pub(super) fn name(&self) -> String {
        self.links.first().map(|link| link.path.display().to_string()).unwrap_or_default()
    }

    /// The chain from `first` on as options for QEMU, which then opens nothing but our descriptors.
    pub(super) fn options(&self, first: usize, with_backing: bool) -> Value {
        let mut below = Value::Null;
        for (number, link) in self.links.iter().enumerate().skip(first).rev() {
            let mut options = json!({
                "driver": link.format.as_str(),
                "file": { "driver": "file", "filename": fd_path(&link.file), "locking": "off" },
            });
            if link.format == Format::Qcow2 || link.format == Format::Vmdk {
                options["backing"] = if with_backing || number != first { below } else { Value::Null };
            }
            if let Some(data) = &link.data_file {
                options["data-file"] =
                    json!({ "driver": "file", "filename": fd_path(data), "locking": "off" });
            }
            below = options;
        }
        below
    }

    /// Every open file.
    pub(super) fn files(&self) -> Vec<&File> {
        self.links.iter().flat_map(|link| std::iter::once(&link.file).chain(&link.data_file)).collect()
    }
}

/// What one header names.
#[derive(Debug, Default, PartialEq, Eq)]
struct Names {
    backing: Option<String>,
    backing_format: Option<String>,
    data_file: Option<String>,
}

/// Opens `file` and everything it lies on.
pub(super) fn chain(config: &ConvertConfig, file: &Path, format: Format) -> Result<Chain> {
    let what = || format!("read {}", file.display());
    let work = WorkDir::new(&config.work_dir)?;
    let mut links: Vec<Link> = Vec::new();
    let mut next = Some((file.canonicalize().with_context(what)?, format));
    while let Some((path, format)) = next.take() {
        if links.len() == DEPTH_MAX || links.iter().any(|link| link.path == path) {
            let why = format!("{}: its backing files go in a circle, or more than {DEPTH_MAX} deep", what());
            return Err(Error::new(ErrorKind::InvalidInput, why));
        }
        let file = open_regular(&path)?;
        let names = match format {
            Format::Qcow2 => qcow2_names(&path, &file)?,
            Format::Vmdk => vmdk_names(&path, &file)?,
            Format::Raw => Names::default(),
            Format::Vhdx => return Err(mixed(&path)),
        };
        let allowed = |name: &str, role: &str| resolve(config, &path, name, role);
        let data_file = match &names.data_file {
            Some(name) => Some(readable(config, &work, open_regular(&allowed(name, "data file")?)?)?),
            None => None,
        };
        if let Some(name) = &names.backing {
            let target = allowed(name, "backing file")?;
            let format = names.backing_format.as_deref().ok_or_else(|| {
                Error::new(
                    ErrorKind::InvalidInput,
                    format!(
                        "read {}: it does not state the format of its backing file {name:?}",
                        path.display()
                    ),
                )
                .hint("qemu-img rebase -u -b BACKING -F FORMAT FILE writes it into the header")
            })?;
            next = Some((target, format.parse()?));
        }
        let file = readable(config, &work, file)?;
        links.push(Link { path, format, file, data_file });
    }
    Ok(Chain { links, _work: work })
}

/// The file that `name`, which stands in the image at `path`, means: inside the allowed directory, or refused.
fn resolve(config: &ConvertConfig, path: &Path, name: &str, role: &str) -> Result<PathBuf> {
    let refuse = |why: &str| {
        Error::new(ErrorKind::InvalidInput, format!("read {}: its {role} {name:?} {why}", path.display()))
    };
    let has_protocol = name.split('/').next().is_some_and(|first| first.contains(':'));
    if has_protocol || name.contains('\0') {
        return Err(refuse("is not a plain file name"));
    }
    let Some(allowed) = &config.backing_dir else {
        let error = refuse("is refused: no directory for such files is configured");
        return Err(error.hint(
            "make one file of them with the tool that made them, or allow their directory in the agent's configuration: \
             backing_dir",
        ));
    };
    let allowed = allowed.canonicalize().with_context(|| format!("read {}", allowed.display()))?;
    let joined = path.parent().unwrap_or(Path::new("/")).join(name);
    let target = joined.canonicalize().map_err(|error| refuse(&format!("cannot be found ({error})")))?;
    if !target.starts_with(&allowed) {
        let error = refuse(&format!("is outside the allowed directory {}", allowed.display()));
        return Err(error.hint("move it there, or make one file of them with the tool that made them"));
    }
    Ok(target)
}

/// Where parents of VHDX files are looked for.
pub(super) struct Parents<'a> {
    pub(super) config: &'a ConvertConfig,
}

impl FindParent for Parents<'_> {
    fn open(&self, path: &Path) -> Result<File> {
        open_regular(path)
    }

    fn find(&self, child: &Path, name: &ParentPath) -> Result<PathBuf> {
        let (ParentPath::Relative(name) | ParentPath::Beside(name)) = name;
        resolve(self.config, child, name, "parent")
    }
}

/// Opens one file of a chain, at a resolved path, without what it lies on.
pub(super) fn open_alone(path: &Path) -> Result<VhdxFile> {
    VhdxFile::open(open_regular(path)?, &path.display().to_string())
}

/// Opens a file that must be a regular one at exactly `path`, which has no symbolic links in it.
fn open_regular(path: &Path) -> Result<File> {
    let what = || format!("read {}", path.display());
    // A name that becomes a device or a pipe meanwhile must not hang us.
    let mut options = OpenOptions::new();
    let file =
        options.read(true).custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK).open(path).with_context(what)?;
    if !file.metadata().with_context(what)?.is_file() {
        return Err(Error::new(ErrorKind::InvalidInput, format!("{}: it is not a regular file", what())));
    }
    // A directory on the way may have been replaced by a link since the name was resolved.
    let opened = std::fs::read_link(fd_path(&file)).with_context(what)?;
    if opened != path {
        let why = format!("{}: {} was opened instead", what(), opened.display());
        return Err(Error::new(ErrorKind::InvalidInput, why));
    }
    Ok(file)
}

/// The file, or a copy of it that the converter's user may read.
fn readable(config: &ConvertConfig, work: &WorkDir, file: File) -> Result<File> {
    let meta = file.metadata().context("look at image")?;
    let mode = meta.mode();
    let may = if !rustix::process::geteuid().is_root() || config.uid == 0 {
        true
    } else if meta.uid() == config.uid {
        mode & 0o400 != 0
    } else if meta.gid() == config.gid {
        mode & 0o040 != 0
    } else {
        mode & 0o004 != 0
    };
    if may {
        return Ok(file);
    }
    let mut copy = work.create(&uuid::Uuid::new_v4().to_string())?;
    let mut from = &file;
    if rustix::fs::ioctl_ficlone(&copy, &file).is_err() {
        from.seek(SeekFrom::Start(0)).context("copy image")?;
        std::io::copy(&mut from, &mut copy).context("copy image into the work directory")?;
        copy.flush().context("copy image")?;
    }
    let (uid, gid) = (rustix::fs::Uid::from_raw(config.uid), rustix::fs::Gid::from_raw(config.gid));
    rustix::fs::fchown(&copy, Some(uid), Some(gid)).context("hand image to the converter")?;
    Ok(copy)
}

/// A file whose extension says raw, but whose first bytes are another format's, was most likely meant as that one.
pub(super) fn refuse_foreign_magic(path: &Path, source: &Source) -> Result<()> {
    let mut head = [0; 512];
    let length = source.head(&mut head)?;
    let head = head.get(..length).unwrap_or_default();
    let magics: [(&[u8], &str); 4] =
        [(b"QFI\xfb", "qcow2"), (b"vhdxfile", "vhdx"), (b"KDMV", "vmdk"), (b"# Disk DescriptorFile", "vmdk")];
    match magics.iter().find(|(magic, _)| head.starts_with(magic)) {
        Some((_, format)) => Err(Error::new(
            ErrorKind::InvalidInput,
            format!("read {}: its name says raw, but it begins like {format}", path.display()),
        )
        .hint(format!("state what it is: --format {format}, or --format raw if it is meant as it is"))),
        None => Ok(()),
    }
}

/// A chain of one format that lies on a VHDX file.
fn mixed(path: &Path) -> Error {
    let why = format!("read {}: a vhdx file under a file of another format is not read", path.display());
    Error::new(ErrorKind::Unsupported, why).hint("make one file of them: qemu-img convert -O qcow2")
}

fn not_a(path: &Path, format: Format, why: &str) -> Error {
    Error::new(ErrorKind::InvalidInput, format!("read {} as {format}: {why}", path.display()))
        .hint("state its real format with --format, or get the file again if it is cut off")
}

/// Reads up to `length` bytes at `offset`.
fn read_up_to(path: &Path, file: &File, offset: u64, length: usize) -> Result<Vec<u8>> {
    let mut bytes = vec![0; length];
    let mut done = 0;
    while let Some(rest) = bytes.get_mut(done..).filter(|rest| !rest.is_empty()) {
        match file.read_at(rest, offset + done as u64) {
            Ok(0) => break,
            Ok(count) => done += count,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error).with_context(|| format!("read {}", path.display())),
        }
    }
    bytes.truncate(done);
    Ok(bytes)
}

fn be32(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_be_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

fn be64(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_be_bytes(bytes.get(at..at + 8)?.try_into().ok()?))
}

fn qcow2_names(path: &Path, file: &File) -> Result<Names> {
    let head = read_up_to(path, file, 0, 64 << 10)?;
    let cut_off = || not_a(path, Format::Qcow2, "the header is cut off");
    if be32(&head, 0) != Some(QCOW2_MAGIC) {
        return Err(not_a(path, Format::Qcow2, "it does not begin like one"));
    }
    let version = be32(&head, 4).ok_or_else(cut_off)?;
    let (backing_at, backing_len) =
        (be64(&head, 8).ok_or_else(cut_off)?, be32(&head, 16).ok_or_else(cut_off)?);
    let (incompatible, header_len) = match version {
        2 => (0, 72),
        3 => (be64(&head, 72).ok_or_else(cut_off)?, be32(&head, 100).ok_or_else(cut_off)?),
        other => return Err(not_a(path, Format::Qcow2, &format!("version {other} is not known"))),
    };
    let mut names = Names::default();
    let text = |bytes: &[u8]| {
        String::from_utf8(bytes.to_vec()).map_err(|_| not_a(path, Format::Qcow2, "a name in it is not text"))
    };
    let mut at = header_len as usize;
    while let (Some(kind), Some(length)) = (be32(&head, at), be32(&head, at + 4)) {
        let beyond = backing_at != 0 && at as u64 >= backing_at;
        if kind == 0 || beyond {
            break;
        }
        let body = head.get(at + 8..(at + 8).saturating_add(length as usize)).ok_or_else(cut_off)?;
        match kind {
            EXTENSION_BACKING_FORMAT => names.backing_format = Some(text(body)?),
            EXTENSION_DATA_FILE => names.data_file = Some(text(body)?),
            _ => {}
        }
        at += 8 + (length as usize).next_multiple_of(8);
    }
    if incompatible & QCOW2_DATA_FILE == 0 {
        names.data_file = None;
    } else if names.data_file.is_none() {
        return Err(not_a(path, Format::Qcow2, "it has an external data file and does not name it"));
    }
    if backing_at != 0 {
        if backing_len > NAME_LEN_MAX {
            return Err(not_a(path, Format::Qcow2, "the name of its backing file is too long"));
        }
        let name = read_up_to(path, file, backing_at, backing_len as usize)?;
        if name.len() != backing_len as usize {
            return Err(cut_off());
        }
        names.backing = Some(text(&name)?);
    }
    Ok(names)
}

fn vmdk_names(path: &Path, file: &File) -> Result<Names> {
    let head = read_up_to(path, file, 0, 512)?;
    let several = |why: &str| {
        Error::new(ErrorKind::Unsupported, format!("read {} as vmdk: {why}", path.display()))
            .hint("make one file of it first: qemu-img convert -O qcow2")
    };
    let le64 = |at: usize| head.get(at..at + 8).and_then(|b| b.try_into().ok()).map_or(0, u64::from_le_bytes);
    if head.starts_with(b"# Disk DescriptorFile") || head.starts_with(b"COWD") {
        return Err(several("its disk is in other files"));
    }
    if !head.starts_with(b"KDMV") {
        return Err(not_a(path, Format::Vmdk, "it does not begin like one"));
    }
    // Without a capacity QEMU would follow the embedded descriptor to other files.
    if le64(12) == 0 {
        return Err(several("its disk is in other files"));
    }
    let (at, length) = (le64(28).saturating_mul(512), le64(36).saturating_mul(512).min(1 << 20));
    let descriptor = read_up_to(path, file, at, length as usize)?;
    let descriptor = String::from_utf8_lossy(&descriptor);
    if descriptor.lines().any(|line| line.trim_start().starts_with("parentFileNameHint")) {
        return Err(several("it lies on a parent file"));
    }
    Ok(Names::default())
}

#[cfg(test)]
mod fuzz {
    use super::*;

    fn qcow2() -> Vec<u8> {
        let mut head = vec![0; 200];
        let mut put = |at: usize, bytes: &[u8]| head[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &QCOW2_MAGIC.to_be_bytes());
        put(4, &3u32.to_be_bytes());
        put(8, &150u64.to_be_bytes());
        put(16, &8u32.to_be_bytes());
        put(72, &QCOW2_DATA_FILE.to_be_bytes());
        put(100, &104u32.to_be_bytes());
        put(104, &EXTENSION_BACKING_FORMAT.to_be_bytes());
        put(108, &3u32.to_be_bytes());
        put(112, b"raw");
        put(120, &EXTENSION_DATA_FILE.to_be_bytes());
        put(124, &4u32.to_be_bytes());
        put(128, b"data");
        put(150, b"base.img");
        head
    }

    fn vmdk() -> Vec<u8> {
        let mut head = vec![0; 1100];
        head[..4].copy_from_slice(b"KDMV");
        (head[12], head[28], head[36]) = (8, 1, 1);
        head[512..525].copy_from_slice(b"CID=fffffffe\n");
        head
    }

    whimbrel_fuzz::fuzz! {
        /// Headers of images that somebody else made.
        fn image_headers(bytes) seeds [qcow2(), vmdk(), b"# Disk DescriptorFile"] {
            let file = rustix::fs::memfd_create("fuzz", rustix::fs::MemfdFlags::CLOEXEC).expect("make a file");
            let file = File::from(file);
            file.write_all_at(bytes, 0).expect("fill a file");
            let path = Path::new("image");
            if let Ok(names) = qcow2_names(path, &file) {
                assert!(names.backing.is_none_or(|name| name.len() <= NAME_LEN_MAX as usize));
            }
            let _ = vmdk_names(path, &file);
        }
    }
}
