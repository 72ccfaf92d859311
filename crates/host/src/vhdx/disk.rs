//! A VHDX file with everything it lies on, as one disk.

use std::io::IoSliceMut;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use whimbrel_engine::disk::vhdx::{CHAIN_MAX, ParentPath, check_link};

use super::file::{Block, VhdxFile};
use crate::block_dev::{BlockRead, Extent};
use crate::error::{Error, ErrorKind, Result};

/// Runs that are put together to one extent, at most.
const EXTENT_RUNS_MAX: usize = 4096;
/// An extent of data need not be longer, so that it is soon found.
const DATA_BYTES_ENOUGH: u64 = 1 << 20;
/// A shorter hole is cheaper read than skipped.
const HOLE_BYTES_MIN: u64 = 64 << 10;

/// How files are found and opened. Paths are resolved: absolute, without symbolic links.
pub trait FindParent {
    /// Opens a file for reading.
    fn open(&self, path: &Path) -> Result<std::fs::File>;
    /// The file that `child` calls its parent by this name, if it may be opened.
    fn find(&self, child: &Path, name: &ParentPath) -> Result<PathBuf>;
}

/// See the module's charter.
#[derive(Clone, Debug)]
pub struct VhdxDisk {
    /// The uppermost first.
    files: Arc<[VhdxFile]>,
    /// The one that this disk is seen from; there is one of that number.
    top: usize,
}

impl VhdxDisk {
    /// Opens the file at `path`, which is resolved, and what it lies on.
    ///
    /// The errors of [`VhdxFile::open`]; `InvalidInput`: a parent is missing, may not be opened, or the chain goes in a
    /// circle or is too deep; `Refused`: a parent is not what it was when its child was made.
    pub fn open(path: &Path, finder: &dyn FindParent) -> Result<Self> {
        let mut files: Vec<VhdxFile> = Vec::new();
        let mut paths: Vec<PathBuf> = Vec::new();
        let mut next = Some(path.to_owned());
        while let Some(path) = next.take() {
            let refuse = |why: String| {
                let first =
                    files.first().map_or_else(|| path.display().to_string(), |file| file.name().to_owned());
                Err(Error::new(ErrorKind::InvalidInput, format!("read {first}: {why}")))
            };
            if paths.contains(&path) {
                return refuse(format!("its parents go in a circle: {} lies under itself", path.display()));
            }
            if files.len() == CHAIN_MAX {
                return refuse(format!("it lies on more than {CHAIN_MAX} files"));
            }
            let file = VhdxFile::open(finder.open(&path)?, &path.display().to_string())?;
            if let Some((child, linkage)) = files.last().and_then(|child| Some((child, child.linkage()?))) {
                check_link(child.member(), &linkage.parent_ids, file.member())?;
            }
            if let Some(linkage) = file.linkage() {
                let mut found = linkage.paths.iter().map(|name| finder.find(&path, name));
                // The first name is the best one, and so is what is wrong with it.
                let first = found.next().unwrap_or_else(|| {
                    Err(Error::new(
                        ErrorKind::Corrupt,
                        format!("read {}: its parent has no name", path.display()),
                    ))
                });
                next = Some(first.or_else(|error| found.find_map(Result::ok).ok_or(error))?);
            }
            paths.push(path);
            files.push(file);
        }
        Ok(Self { files: files.into(), top: 0 })
    }

    /// The files, uppermost first.
    pub fn files(&self) -> &[VhdxFile] {
        self.files.get(self.top..).unwrap_or_default()
    }

    /// The uppermost file.
    pub fn top(&self) -> Option<&VhdxFile> {
        self.files().first()
    }

    /// The disk as each of the files has it, the lowest first, this one last.
    pub fn levels(&self) -> impl Iterator<Item = Self> + use<> {
        let files = Arc::clone(&self.files);
        (self.top..files.len()).rev().map(move |top| Self { files: Arc::clone(&files), top })
    }

    fn fill(&self, level: usize, offset: u64, into: &mut [u8]) -> Result<()> {
        let Some(file) = self.files.get(level) else {
            into.fill(0);
            return Ok(());
        };
        let (mut at, mut rest) = (offset, into);
        while !rest.is_empty() {
            let (block, within) = place_of(file, at);
            let length = (file.geometry().block_bytes() - within).min(rest.len() as u64);
            let (mut part, more) = rest.split_at_mut(length as usize);
            match file.block(block)? {
                Block::Zeros => part.fill(0),
                Block::Parent => self.fill(level + 1, at, part)?,
                Block::Here(data) => file.read_at(data + within, part)?,
                Block::Partial { data, bits } => {
                    let mut within = within;
                    let mut at = at;
                    while !part.is_empty() {
                        let (here, run) = file.run_of_bits(bits, at, part.len() as u64)?;
                        let (piece, more) = part.split_at_mut(run as usize);
                        if here {
                            file.read_at(data + within, piece)?;
                        } else {
                            self.fill(level + 1, at, piece)?;
                        }
                        part = more;
                        within += run;
                        at += run;
                    }
                }
            }
            at += length;
            rest = more;
        }
        Ok(())
    }

    /// A run of one kind at the start of this range of the disk; may be shorter than it is.
    fn run(&self, level: usize, offset: u64, length: u64) -> Result<Extent> {
        let zeros = |length| Ok(Extent { length, data: false });
        let Some(file) = self.files.get(level) else { return zeros(length) };
        let (block, within) = place_of(file, offset);
        let length = (file.geometry().block_bytes() - within).min(length);
        match file.block(block)? {
            Block::Zeros => zeros(length),
            Block::Parent => self.run(level + 1, offset, length),
            Block::Here(data) => file.extent_at(data + within, length),
            Block::Partial { data, bits } => match file.run_of_bits(bits, offset, length)? {
                (true, length) => file.extent_at(data + within, length),
                (false, length) => self.run(level + 1, offset, length),
            },
        }
    }
}

/// The block that a byte of the disk is in, and where in it.
fn place_of(file: &VhdxFile, offset: u64) -> (u64, u64) {
    (file.geometry().block_of(offset), offset % file.geometry().block_bytes())
}

impl BlockRead for VhdxDisk {
    fn size_bytes(&self) -> u64 {
        self.top().map_or(0, |file| file.geometry().size_bytes())
    }

    fn read(&self, offset: u64, into: &mut [IoSliceMut<'_>]) -> Result<()> {
        let length: usize = into.iter().map(|slice| slice.len()).sum();
        if offset.checked_add(length as u64).is_none_or(|end| end > self.size_bytes()) {
            let name = self.top().map_or_else(String::new, |file| file.name().to_owned());
            let why = format!("read {name}: {length} bytes at {offset} are behind the disk's end");
            return Err(Error::new(ErrorKind::InvalidInput, why));
        }
        let mut at = offset;
        for slice in into {
            self.fill(self.top, at, slice)?;
            at += slice.len() as u64;
        }
        Ok(())
    }

    fn read_now(&self, offset: u64, into: &mut [IoSliceMut<'_>]) -> Result<bool> {
        self.read(offset, into).map(|()| true)
    }

    fn extent(&self, offset: u64) -> Result<Extent> {
        let end = self.size_bytes();
        let mut whole = Extent { length: 0, data: false };
        for _ in 0..EXTENT_RUNS_MAX {
            let at = offset.saturating_add(whole.length);
            if at >= end {
                break;
            }
            let run = self.run(self.top, at, end - at)?;
            let data = run.data || run.length < HOLE_BYTES_MIN;
            let enough = whole.data && whole.length >= DATA_BYTES_ENOUGH;
            if whole.length > 0 && (data != whole.data || enough) {
                break;
            }
            whole = Extent { length: whole.length + run.length, data };
        }
        Ok(whole)
    }
}
