//! What the records of a VHDX file say together, and whether its parent is still the one it was made over.
//!
//! ```text
//!   two headers ─► current ─► log empty? ──no──► log::active ─► replay ─┐
//!                                 └──yes──────────────────────────────►─┴► regions ─► items ─► Geometry ─► link
//! ```
//!
//! Invariants
//! * What is required and not known refuses the file, by name; what is optional and not known is left alone.
//! * A child opens over a parent only if the parent's `DataWriteGuid` is one of those the child remembers, and the two
//!   disks have the same size and sectors. Nothing is put right silently.
//!
//! Not here: bytes (`wire::record::vhdx`), files (`host::vhdx`), layers of our own (`identity`).

pub mod geometry;
pub mod layout;
pub mod log;

pub use geometry::Geometry;

use whimbrel_wire::record::vhdx::metadata::item;
use whimbrel_wire::record::vhdx::{
    FileParameters, Header, MIB, MetadataEntry, MetadataTable, ParentLocator, RegionTable, TABLE_LEN, Uuid,
};
use whimbrel_wire::{ErrorKind, WireError};

/// The longest chain of files that opens.
pub const CHAIN_MAX: usize = 64;
/// The longest log that is read.
pub const LOG_BYTES_MAX: u32 = 1 << 30;
/// The longest item of metadata (section 2.6.1.2).
const ITEM_BYTES_MAX: u32 = 1 << 20;

fn corrupt(why: impl Into<String>) -> WireError {
    WireError::new(ErrorKind::Corrupt, why)
}

fn unsupported(why: impl Into<String>) -> WireError {
    WireError::new(ErrorKind::Unsupported, why)
}

/// The header that counts (section 2.2.2): the valid one, or that of two with the higher sequence. Two of the same
/// sequence count if they are the same, as Disk2VHD writes them.
///
/// `Corrupt`: none, or two that contradict each other. `Unsupported`: of another version.
pub fn current(headers: [Option<Header>; 2]) -> Result<Header, WireError> {
    let header = match headers {
        [None, None] => return Err(corrupt("both of its headers are damaged")),
        [Some(one), None] | [None, Some(one)] => one,
        [Some(a), Some(b)] if a.sequence == b.sequence && a != b => {
            return Err(corrupt(format!("its two headers differ and both have sequence {}", a.sequence)));
        }
        [Some(a), Some(b)] => {
            if a.sequence >= b.sequence {
                a
            } else {
                b
            }
        }
    };
    if header.version != Header::VERSION {
        return Err(unsupported(format!("version {} of the format is not known", header.version)));
    }
    if header.log_id.is_nil() {
        return Ok(header);
    }
    if header.log_version != 0 {
        return Err(unsupported(format!("version {} of the log is not known", header.log_version)));
    }
    let misplaced = !header.log_offset.is_multiple_of(MIB) || header.log_offset < MIB;
    if misplaced || header.log_bytes == 0 || !u64::from(header.log_bytes).is_multiple_of(MIB) {
        return Err(corrupt(format!("a log of {} bytes at {}", header.log_bytes, header.log_offset)));
    }
    if header.log_bytes > LOG_BYTES_MAX {
        return Err(unsupported(format!(
            "a log of {} bytes, at most {LOG_BYTES_MAX} are read",
            header.log_bytes
        )));
    }
    Ok(header)
}

/// A part of the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Where it begins, bytes.
    pub offset: u64,
    /// Its length, bytes.
    pub bytes: u64,
}

/// Where the parts of a file are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Regions {
    /// The block allocation table.
    pub bat: Extent,
    /// The metadata.
    pub metadata: Extent,
    /// Everything that no block may lie in: head, log, and all regions.
    pub taken: Vec<Extent>,
}

/// Reads the region table (section 2.2.3).
pub fn regions(table: &RegionTable, header: &Header) -> Result<Regions, WireError> {
    let mut taken = vec![Extent { offset: 0, bytes: MIB }];
    if header.log_bytes > 0 {
        taken.push(Extent { offset: header.log_offset, bytes: u64::from(header.log_bytes) });
    }
    let (mut bat, mut metadata) = (None, None);
    for entry in &table.entries {
        let place = Extent { offset: entry.offset, bytes: u64::from(entry.bytes) };
        let whole = place.offset.is_multiple_of(MIB) && place.bytes.is_multiple_of(MIB);
        if !whole || place.offset < MIB || place.bytes == 0 || place.offset.checked_add(place.bytes).is_none()
        {
            return Err(corrupt(format!(
                "region {} has {} bytes at {}",
                entry.id, place.bytes, place.offset
            )));
        }
        let known = match entry.id {
            RegionTable::BAT => Some(&mut bat),
            RegionTable::METADATA => Some(&mut metadata),
            _ => None,
        };
        match known {
            Some(Some(_)) => return Err(corrupt(format!("region {} stands in it twice", entry.id))),
            Some(slot) => *slot = Some(place),
            None if entry.required => {
                return Err(unsupported(format!("it needs a region that is not known: {}", entry.id)));
            }
            None => {}
        }
        taken.push(place);
    }
    let (Some(bat), Some(metadata)) = (bat, metadata) else {
        let which = if bat.is_none() { "block allocation table" } else { "metadata" };
        return Err(corrupt(format!("its region table names no {which}")));
    };
    taken.sort_by_key(|place| place.offset);
    for pair in taken.windows(2) {
        if let [a, b] = pair
            && a.offset + a.bytes > b.offset
        {
            return Err(corrupt(format!("its parts at {} and {} lie over each other", a.offset, b.offset)));
        }
    }
    Ok(Regions { bat, metadata, taken })
}

/// Where the known items of metadata are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Items {
    /// Always there.
    pub file_parameters: Extent,
    /// Always there.
    pub virtual_disk_size: Extent,
    /// Always there.
    pub logical_sector_size: Extent,
    /// Older files may lack it.
    pub physical_sector_size: Option<Extent>,
    /// Older files may lack it.
    pub virtual_disk_id: Option<Extent>,
    /// There if the disk lies on another.
    pub parent_locator: Option<Extent>,
}

/// Reads the metadata table (section 2.6.1); places are of the file, bytes.
pub fn items(table: &MetadataTable, region: Extent) -> Result<Items, WireError> {
    let place = |entry: &MetadataEntry| -> Result<Extent, WireError> {
        let end = u64::from(entry.offset) + u64::from(entry.bytes);
        let inside = entry.offset as usize >= TABLE_LEN && end <= region.bytes;
        if !inside || entry.bytes > ITEM_BYTES_MAX {
            return Err(corrupt(format!(
                "metadata item {} has {} bytes at {}",
                entry.id, entry.bytes, entry.offset
            )));
        }
        Ok(Extent { offset: region.offset + u64::from(entry.offset), bytes: u64::from(entry.bytes) })
    };
    let known = [
        item::FILE_PARAMETERS,
        item::VIRTUAL_DISK_SIZE,
        item::LOGICAL_SECTOR_SIZE,
        item::PHYSICAL_SECTOR_SIZE,
        item::VIRTUAL_DISK_ID,
        item::PARENT_LOCATOR,
    ];
    let mut found: [Option<Extent>; 6] = [None; 6];
    for entry in &table.entries {
        let slot = known.iter().position(|id| *id == entry.id && !entry.is_user);
        match slot.and_then(|n| found.get_mut(n)) {
            Some(Some(_)) => return Err(corrupt(format!("metadata item {} stands in it twice", entry.id))),
            Some(slot) => *slot = Some(place(entry)?),
            None if entry.required => {
                return Err(unsupported(format!("it needs a metadata item that is not known: {}", entry.id)));
            }
            None => {}
        }
    }
    let [parameters, size, logical, physical, id, parent] = found;
    let must =
        |item: Option<Extent>, name: &str| item.ok_or_else(|| corrupt(format!("it does not say its {name}")));
    Ok(Items {
        file_parameters: must(parameters, "block size")?,
        virtual_disk_size: must(size, "disk's size")?,
        logical_sector_size: must(logical, "sector size")?,
        physical_sector_size: physical,
        virtual_disk_id: id,
        parent_locator: parent,
    })
}

/// What a child remembers of its parent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Linkage {
    /// `DataWriteGuid`s that the parent may have: one, or two while a merge is under way.
    pub parent_ids: Vec<Uuid>,
    /// Names of the parent's file, best first, as they stand in the child.
    pub paths: Vec<ParentPath>,
}

/// A name of the parent's file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ParentPath {
    /// From the child's directory on; slashes are `/`.
    Relative(String),
    /// The last part of a path of Windows, to be looked for beside the child.
    Beside(String),
}

/// Reads the parent locator (section 2.6.2.6). `parameters` says whether there has to be one.
pub fn linkage(
    parameters: FileParameters,
    locator: Option<&ParentLocator>,
) -> Result<Option<Linkage>, WireError> {
    if !parameters.has_parent {
        return Ok(None);
    }
    let locator = locator.ok_or_else(|| corrupt("it has a parent and does not say which"))?;
    if locator.kind != ParentLocator::VHDX {
        return Err(unsupported(format!("its parent is of a kind that is not known: {}", locator.kind)));
    }
    let first = locator.guid(ParentLocator::LINKAGE)?;
    let first = first.ok_or_else(|| corrupt("it does not say its parent's identity (parent_linkage)"))?;
    let second = locator.guid(ParentLocator::LINKAGE2)?;
    let relative = locator.get(ParentLocator::RELATIVE_PATH);
    let relative = relative.map(|path| ParentPath::Relative(path.replace('\\', "/")));
    let last_part = |key| locator.get(key).and_then(|path| path.rsplit(['\\', '/']).next());
    let beside = [ParentLocator::VOLUME_PATH, ParentLocator::ABSOLUTE_PATH].into_iter().filter_map(last_part);
    let beside = beside.filter(|name| !name.is_empty()).map(|name| ParentPath::Beside(name.to_owned()));
    let mut paths: Vec<ParentPath> = relative.into_iter().chain(beside).collect();
    paths.dedup();
    if paths.is_empty() {
        return Err(corrupt("it does not say where its parent is"));
    }
    Ok(Some(Linkage { parent_ids: std::iter::once(first).chain(second).collect(), paths }))
}

/// One file of a chain, as [`check_link`] sees it.
#[derive(Clone, Copy, Debug)]
pub struct Member<'a> {
    /// What people know it by.
    pub file: &'a str,
    /// Its `DataWriteGuid`.
    pub data_write_id: Uuid,
    /// Its disk.
    pub geometry: &'a Geometry,
}

/// Whether `child`, which remembers these ids, still forms a disk with `parent` (section 2.6.2.6.3).
///
/// `Refused`: the parent was changed, or has another size or other sectors; both are named.
pub fn check_link(child: Member<'_>, remembered: &[Uuid], parent: Member<'_>) -> Result<(), WireError> {
    let refuse = |why: String| {
        WireError::new(ErrorKind::Refused, format!("open {} over {}: {why}", child.file, parent.file))
    };
    if !remembered.contains(&parent.data_write_id) {
        let ids: Vec<String> = remembered.iter().map(Uuid::to_string).collect();
        let why = format!(
            "it was made over content {}, and {} now has {}",
            ids.join(" or "),
            parent.file,
            parent.data_write_id
        );
        return Err(refuse(why).hint(
            "the parent was written after the child was made: restore the parent as it was; together they are no disk",
        ));
    }
    let (own, below) = (child.geometry, parent.geometry);
    if own.size_bytes() != below.size_bytes() {
        let why = format!("a disk of {} bytes over one of {}", own.size_bytes(), below.size_bytes());
        return Err(refuse(why));
    }
    if own.sector_bytes() != below.sector_bytes() {
        let why = format!("sectors of {} bytes over sectors of {}", own.sector_bytes(), below.sector_bytes());
        return Err(refuse(why));
    }
    Ok(())
}

#[cfg(test)]
mod test;
