//! Files of our own making, whole and damaged, read back.

use std::fs::File;
use std::io::IoSliceMut;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use tempfile::TempDir;
use whimbrel_engine::disk::vhdx::ParentPath;
use whimbrel_wire::record::vhdx::log::{Change, SECTOR_LEN, encode_entry};
use whimbrel_wire::record::vhdx::metadata::item;
use whimbrel_wire::record::vhdx::{
    BatEntry, EntryHeader, Header, MetadataEntry, MetadataTable, ParentLocator, PayloadState, RegionEntry,
    RegionTable, TABLE_LEN, Uuid,
};

use super::*;
use crate::block_dev::BlockRead;
use crate::error::{Error, ErrorKind, Result};

pub(super) const MIB: usize = 1 << 20;
/// Where [`Writer`] puts the log, the metadata and the table.
const LOG: usize = MIB;
const METADATA: usize = 2 * MIB;
const BAT: usize = 3 * MIB;

/// Parents are looked for beside the child.
pub(super) struct Beside;

impl FindParent for Beside {
    fn open(&self, path: &Path) -> Result<File> {
        File::open(path).map_err(|error| Error::with_source(ErrorKind::NotFound, "open", error))
    }
    fn find(&self, child: &Path, name: &ParentPath) -> Result<PathBuf> {
        let (ParentPath::Relative(name) | ParentPath::Beside(name)) = name;
        let path = child.parent().unwrap().join(name);
        path.canonicalize().map_err(|error| {
            Error::with_source(ErrorKind::InvalidInput, format!("find parent {}", path.display()), error)
        })
    }
}

pub(super) struct Bench {
    pub(super) dir: TempDir,
}

impl Bench {
    pub(super) fn new() -> Self {
        Self { dir: TempDir::new().unwrap() }
    }
    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().canonicalize().unwrap().join(name)
    }
    pub(super) fn open(&self, name: &str) -> Result<VhdxDisk> {
        VhdxDisk::open(&self.path(name), &Beside)
    }
    pub(super) fn refusal(&self, name: &str) -> Error {
        self.open(name).map(|_| name.to_owned()).expect_err("a refusal")
    }
    /// Writes a file with these pieces; over `parent`, if one is named.
    pub(super) fn write(&self, name: &str, size: u64, parent: Option<&str>, pieces: &[(u64, Vec<u8>)]) {
        let file = File::create_new(self.path(name)).unwrap();
        let top = parent.map(|parent| (parent, self.open(parent).unwrap()));
        let new = NewDisk {
            size_bytes: size,
            sector_bytes: 512,
            disk_id: top
                .as_ref()
                .map_or_else(Uuid::new_v4, |(_, disk)| disk.top().unwrap().disk_id().unwrap()),
            parent: top.map(|(parent, disk)| NewParent {
                data_write_id: disk.top().unwrap().header().data_write_id,
                relative_path: format!(".\\{parent}"),
            }),
        };
        let mut writer = Writer::new(&file, new).unwrap();
        for (offset, bytes) in pieces {
            if bytes.iter().all(|byte| *byte == 0) {
                writer.write_zeroes(*offset, bytes.len() as u64).unwrap();
            } else {
                writer.write(*offset, bytes).unwrap();
            }
        }
        writer.finish().unwrap();
    }
    /// Changes a file's bytes.
    fn edit(&self, from: &str, to: &str, change: impl FnOnce(&mut Vec<u8>)) {
        let mut bytes = std::fs::read(self.path(from)).unwrap();
        change(&mut bytes);
        std::fs::write(self.path(to), bytes).unwrap();
    }
}

/// The whole disk; what is said to be a hole reads as zeros.
pub(super) fn all(disk: &dyn BlockRead) -> Vec<u8> {
    let mut bytes = vec![0xee; disk.size_bytes() as usize];
    disk.read(0, &mut [IoSliceMut::new(&mut bytes)]).unwrap();
    let mut at = 0;
    while at < disk.size_bytes() {
        let extent = disk.extent(at).unwrap();
        assert!(extent.length > 0 && at + extent.length <= disk.size_bytes());
        let end = (at + extent.length) as usize;
        assert!(extent.data || bytes[at as usize..end].iter().all(|byte| *byte == 0), "hole at {at}");
        at = end as u64;
    }
    bytes
}

/// Numbers that look random and are the same every time.
pub(super) struct Numbers(pub(super) u64);

impl Numbers {
    pub(super) fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % limit
    }
    /// Pieces in rising order, in whole sectors; some zeros, some over the edges of blocks.
    pub(super) fn pieces(&mut self, size: u64, count: u64) -> Vec<(u64, Vec<u8>)> {
        let mut pieces = Vec::new();
        let mut at = 0;
        for left in (1..=count).rev() {
            let sectors = (size - at) / 512;
            if sectors < 2 {
                break;
            }
            at += self.below((2 * sectors / left).clamp(1, sectors)) * 512;
            let length = (self.below(300) + 1) * 512;
            let length = if self.below(8) == 0 { 3 << 20 } else { length }.min(size - at);
            let byte = self.below(9) as u8 * 31;
            pieces.push((at, vec![byte; length as usize]));
            at += length;
        }
        pieces
    }
}

pub(super) fn lay(over: &mut [u8], pieces: &[(u64, Vec<u8>)]) {
    for (offset, bytes) in pieces {
        over[*offset as usize..*offset as usize + bytes.len()].copy_from_slice(bytes);
    }
}

#[test]
fn chains_read_back_as_they_were_written() {
    let mut numbers = Numbers(0x1234_5678_9abc_def1);
    // The last block is cut by the disk's end.
    for size in [512, 2 << 20, (9 << 20) + 3 * 512] {
        let bench = Bench::new();
        let mut expected = vec![0; size as usize];
        let mut seen = Vec::new();
        let names = ["base.vhdx", "one.vhdx", "two.vhdx", "three.vhdx"];
        for (n, name) in names.into_iter().enumerate() {
            let pieces = numbers.pieces(size, 12);
            bench.write(name, size, n.checked_sub(1).map(|below| names[below]), &pieces);
            lay(&mut expected, &pieces);
            let disk = bench.open(name).unwrap();
            assert_eq!(disk.files().len(), n + 1);
            assert!(all(&disk) == expected, "{name} of {size} bytes");
            seen.push(expected.clone());
            assert!(disk.levels().map(|level| all(&level)).eq(seen.iter().cloned()), "each file's own view");
            for _ in 0..20 {
                let at = numbers.below(size / 512) * 512;
                let length = ((numbers.below(9000) + 1) * 512).min(size - at) as usize;
                let (mut first, mut second) =
                    (vec![1; length / 1024 * 512], vec![2; length - length / 1024 * 512]);
                disk.read(at, &mut [IoSliceMut::new(&mut first), IoSliceMut::new(&mut second)]).unwrap();
                assert!([first, second].concat() == expected[at as usize..at as usize + length]);
            }
        }
        let disk = bench.open("three.vhdx").unwrap();
        assert!(disk.read(size, &mut [IoSliceMut::new(&mut [0; 512])]).is_err());
        let ids: Vec<_> = disk.files().iter().map(|file| file.disk_id()).collect();
        assert!(ids.iter().all(|id| *id == ids[0]), "one disk, one identity");
        let headers = disk.files().iter().map(VhdxFile::header);
        let mut writes: Vec<Uuid> = headers.flat_map(|h| [h.file_write_id, h.data_write_id]).collect();
        writes.sort();
        writes.dedup();
        assert_eq!(writes.len(), 8, "every file has new ids");
    }
}

#[test]
fn a_large_disk_costs_what_its_data_costs() {
    let bench = Bench::new();
    let (size, last) = (100 << 30, (100 << 30) - 4096);
    let pieces = [(0, vec![1; 4096]), (50 << 30, vec![2; 64 << 10]), (last, vec![3; 4096])];
    bench.write("base.vhdx", size, None, &pieces);
    bench.write("child.vhdx", size, Some("base.vhdx"), &pieces[1..]);
    for name in ["base.vhdx", "child.vhdx"] {
        let meta = std::fs::metadata(bench.path(name)).unwrap();
        assert!(meta.blocks() * 512 < 1 << 20, "{name} takes {} bytes", meta.blocks() * 512);
        assert!(meta.len() < 16 << 20, "{name} is {} bytes long", meta.len());
        let disk = bench.open(name).unwrap();
        let (mut at, mut data) = (0, 0);
        while at < size {
            let extent = disk.extent(at).unwrap();
            data += if extent.data { extent.length } else { 0 };
            at += extent.length;
        }
        assert!((72 << 10..1 << 20).contains(&data), "{name}: {data} bytes of data");
        let mut end = [0; 4096];
        disk.read(last, &mut [IoSliceMut::new(&mut end)]).unwrap();
        assert_eq!(end, [3; 4096]);
    }
}

#[test]
fn a_writer_that_goes_back_or_outside_is_stopped() {
    let bench = Bench::new();
    let file = File::create_new(bench.path("x.vhdx")).unwrap();
    let new = |parent| NewDisk { size_bytes: 1 << 20, sector_bytes: 512, disk_id: Uuid::nil(), parent };
    let mut writer = Writer::new(&file, new(None)).unwrap();
    writer.write(4096, &[1; 512]).unwrap();
    assert!(writer.write(4096, &[1; 512]).is_err());
    assert!(writer.write(1 << 20, &[1; 512]).is_err());
    drop(writer);
    assert!(bench.refusal("x.vhdx").to_string().contains("does not begin"), "unfinished, it is none");
    let parent = NewParent { data_write_id: Uuid::nil(), relative_path: "x".into() };
    let mut writer = Writer::new(&file, new(Some(parent))).unwrap();
    assert!(writer.write(100, &[1; 512]).is_err(), "bits stand for whole sectors");
    assert!(Writer::new(&file, NewDisk { size_bytes: 100, ..new(None) }).is_err());
}

/// A log entry that sets bytes of the table.
fn entry(sequence: u64, tail: usize, changes: &[Change]) -> Vec<u8> {
    let header = EntryHeader {
        checksum: 0,
        bytes: 0,
        tail: tail as u32,
        sequence,
        descriptors: 0,
        log_id: LOG_ID,
        flushed_file_offset: 4 << 20,
        last_file_offset: 12 << 20,
    };
    encode_entry(&header, changes)
}

const LOG_ID: Uuid = Uuid::from_u128(0x1063);

/// Puts entries into the log, round its end if they go over it.
fn put_log(bytes: &mut [u8], entries: &[(usize, Vec<u8>)]) {
    for (place, entry) in entries {
        for (n, sector) in entry.chunks(SECTOR_LEN).enumerate() {
            let at = LOG + (place + n * SECTOR_LEN) % MIB;
            bytes[at..at + SECTOR_LEN].copy_from_slice(sector);
        }
    }
    edit_headers(bytes, |header| header.log_id = LOG_ID);
}

fn edit_headers(bytes: &mut [u8], change: impl Fn(&mut Header)) {
    for at in Header::OFFSETS {
        let at = at as usize;
        let mut header = Header::decode(&bytes[at..]).unwrap();
        change(&mut header);
        bytes[at..at + Header::LEN].copy_from_slice(&header.encode());
    }
}

/// The table's first 4 KiB with this first entry.
fn table(first: BatEntry) -> Change {
    let mut page = Box::new([0; SECTOR_LEN]);
    page[..8].copy_from_slice(&first.0.to_le_bytes());
    Change::Data(BAT as u64, page)
}

#[test]
fn a_log_is_replayed_in_memory_and_the_file_stays_as_it_is() {
    let bench = Bench::new();
    // Block 0 at 4 MiB, full of ones; its entry is taken away, so that only the log knows it.
    bench.write("clean.vhdx", 2 << 20, None, &[(0, vec![1; 2 << 20])]);
    let gone = |bytes: &mut Vec<u8>| bytes[BAT..BAT + 8].fill(0);
    let at = |mib: u64| table(BatEntry::of_payload(PayloadState::Full, mib << 20));
    let zeros = || table(BatEntry(2));
    let ones = |name: &str| all(&bench.open(name).unwrap()) == vec![1; 2 << 20];
    let nothing = |name: &str| all(&bench.open(name).unwrap()) == vec![0; 2 << 20];

    bench.edit("clean.vhdx", "gone.vhdx", gone);
    assert!(nothing("gone.vhdx"));
    bench.edit("gone.vhdx", "dirty.vhdx", |bytes| put_log(bytes, &[(0, entry(5, 0, &[at(4)]))]));
    let before = std::fs::read(bench.path("dirty.vhdx")).unwrap();
    assert!(ones("dirty.vhdx"));
    assert_eq!(std::fs::read(bench.path("dirty.vhdx")).unwrap(), before);

    // The same entry, and the log is said to be empty.
    bench
        .edit("dirty.vhdx", "clean2.vhdx", |bytes| edit_headers(bytes, |header| header.log_id = Uuid::nil()));
    assert!(nothing("clean2.vhdx"));

    // Of three entries the last one tells where to begin; they go round the ring's end.
    let (a, b, c) = (MIB - 2 * SECTOR_LEN, 0, 2 * SECTOR_LEN);
    let round = [(a, entry(7, a, &[at(4)])), (b, entry(8, a, &[zeros()])), (c, entry(9, a, &[at(4)]))];
    bench.edit("gone.vhdx", "round.vhdx", |bytes| put_log(bytes, &round));
    assert!(ones("round.vhdx"));
    // Torn, the last one is no more, and the one before tells.
    bench.edit("round.vhdx", "torn.vhdx", |bytes| bytes[LOG + c + SECTOR_LEN + 100] ^= 1);
    assert!(nothing("torn.vhdx"));
    // The table is behind the end of the one that counts: the oldest is not of it.
    let late = [(0, entry(7, 0, &[zeros()])), (2 * SECTOR_LEN, entry(8, 2 * SECTOR_LEN, &[at(4)]))];
    bench.edit("gone.vhdx", "late.vhdx", |bytes| put_log(bytes, &late));
    assert!(ones("late.vhdx"));

    // The region table is in the log, zeros over it first.
    bench.edit("clean.vhdx", "regions.vhdx", |bytes| {
        let good: Vec<Change> = (0..TABLE_LEN / SECTOR_LEN)
            .map(|n| {
                let from = RegionTable::OFFSETS[0] as usize + n * SECTOR_LEN;
                Change::Data(from as u64, Box::new(bytes[from..from + SECTOR_LEN].try_into().unwrap()))
            })
            .collect();
        for at in RegionTable::OFFSETS {
            bytes[at as usize..at as usize + TABLE_LEN].fill(0);
        }
        let zeros = Change::Zero(RegionTable::OFFSETS[0], 2 * TABLE_LEN as u64);
        put_log(bytes, &[(0, entry(1, 0, &[vec![zeros], good].concat()))]);
    });
    assert!(ones("regions.vhdx"));

    // A block that the replay makes room for, behind the file's end.
    bench.edit("gone.vhdx", "longer.vhdx", |bytes| put_log(bytes, &[(0, entry(5, 0, &[at(10)]))]));
    assert!(nothing("longer.vhdx"));
    bench.edit("gone.vhdx", "too-long.vhdx", |bytes| put_log(bytes, &[(0, entry(5, 0, &[at(11)]))]));
    assert!(bench.refusal("too-long.vhdx").to_string().contains("cut off"));
}

#[test]
fn a_log_that_cannot_be_replayed_refuses_the_file() {
    let bench = Bench::new();
    bench.write("clean.vhdx", 2 << 20, None, &[(0, vec![1; 2 << 20])]);
    let dirty = |name: &str, entries: &[(usize, Vec<u8>)], change: fn(&mut Vec<u8>)| {
        bench.edit("clean.vhdx", name, |bytes| {
            put_log(bytes, entries);
            change(bytes);
        });
        bench.refusal(name)
    };
    let good = || vec![(0, entry(1, 0, &[table(BatEntry(0))]))];
    let error = dirty("empty.vhdx", &[], |_| ());
    assert!(error.to_string().contains("no entry of it is whole"), "{error}");
    let error = dirty("short.vhdx", &good(), |bytes| bytes.truncate(4 * MIB - 1));
    assert!(error.to_string().contains("its log says 4194304 bytes, it has 4194303"), "{error}");
    dirty("cut.vhdx", &good(), |bytes| bytes.truncate(LOG + 5000));
    let error = dirty("version.vhdx", &good(), |bytes| edit_headers(bytes, |header| header.log_version = 1));
    assert_eq!(error.kind(), ErrorKind::Unsupported);
    dirty("outside.vhdx", &good(), |bytes| edit_headers(bytes, |header| header.log_offset = 1 << 40));
    // Entries of another log, or of one that is longer than the ring, are not ours.
    let error = dirty("other.vhdx", &good(), |bytes| {
        edit_headers(bytes, |header| header.log_id = Uuid::from_u128(9));
    });
    assert!(error.to_string().contains("no entry"), "{error}");
}

/// Many entries that claim to go on to the ring's end cost no more than one look at each sector.
#[test]
fn a_log_full_of_beginnings_takes_no_longer_than_its_length() {
    let bench = Bench::new();
    bench.write("clean.vhdx", 2 << 20, None, &[]);
    bench.edit("clean.vhdx", "hostile.vhdx", |bytes| {
        let mut long = entry(1, 0, &[]);
        long[8..12].copy_from_slice(&(MIB as u32).to_le_bytes());
        let entries: Vec<_> = (0..MIB / SECTOR_LEN).map(|n| (n * SECTOR_LEN, long.clone())).collect();
        put_log(bytes, &entries);
    });
    assert_eq!(bench.refusal("hostile.vhdx").kind(), ErrorKind::Corrupt);
}

#[test]
fn what_is_cut_off_does_not_open() {
    let bench = Bench::new();
    let pieces = [(0, vec![1; 4096]), (5 << 20, vec![2; 4096])];
    bench.write("base.vhdx", 8 << 20, None, &pieces);
    bench.write("child.vhdx", 8 << 20, Some("base.vhdx"), &pieces);
    for name in ["base.vhdx", "child.vhdx"] {
        let whole = std::fs::read(bench.path(name)).unwrap();
        for length in
            [0, 7, 100, 70 << 10, 130 << 10, 200 << 10, 500 << 10, MIB, 2 * MIB, 3 * MIB, 4 * MIB, 5 * MIB]
                .into_iter()
                .chain([whole.len() - 1])
        {
            std::fs::write(bench.path("cut.vhdx"), &whole[..length]).unwrap();
            let error = bench.refusal("cut.vhdx");
            assert!(
                matches!(error.kind(), ErrorKind::Corrupt | ErrorKind::InvalidInput),
                "{length}: {error}"
            );
            assert!(error.to_string().contains("cut.vhdx"), "{error}");
        }
    }
}

#[test]
fn what_is_required_and_unknown_is_named() {
    let bench = Bench::new();
    bench.write("good.vhdx", 8 << 20, None, &[(0, vec![1; 4096])]);
    let unknown = Uuid::from_u128(0xdead_beef);
    let region = |required| {
        move |bytes: &mut Vec<u8>| {
            for at in RegionTable::OFFSETS.map(|at| at as usize) {
                let mut table = RegionTable::decode(&bytes[at..]).unwrap();
                let offset = 6 << 20;
                table.entries.push(RegionEntry { id: unknown, offset, bytes: 1 << 20, required });
                bytes[at..at + TABLE_LEN].copy_from_slice(&table.encode());
            }
            bytes.resize(7 * MIB, 0);
        }
    };
    let metadata = |required| {
        move |bytes: &mut Vec<u8>| {
            let mut table = MetadataTable::decode(&bytes[METADATA..]).unwrap();
            let entry = MetadataEntry {
                id: unknown,
                offset: 80 << 10,
                bytes: 4,
                is_user: false,
                is_virtual_disk: false,
                required,
            };
            table.entries.push(entry);
            bytes[METADATA..METADATA + TABLE_LEN].copy_from_slice(&table.encode());
        }
    };
    bench.edit("good.vhdx", "region.vhdx", region(true));
    bench.edit("good.vhdx", "item.vhdx", metadata(true));
    for name in ["region.vhdx", "item.vhdx"] {
        let error = bench.refusal(name);
        assert_eq!(error.kind(), ErrorKind::Unsupported);
        assert!(
            error.to_string().contains(&unknown.to_string()) && error.to_string().contains(name),
            "{error}"
        );
    }
    bench.edit("good.vhdx", "region.vhdx", region(false));
    bench.edit("good.vhdx", "item.vhdx", metadata(false));
    for name in ["region.vhdx", "item.vhdx"] {
        assert_eq!(all(&bench.open(name).unwrap())[..4096], [1; 4096], "{name}");
    }
}

#[test]
fn damage_is_told() {
    let bench = Bench::new();
    bench.write("good.vhdx", 8 << 20, None, &[(0, vec![1; 4096]), (4 << 20, vec![2; 4096])]);
    let damaged = |change: fn(&mut Vec<u8>), words: &str| {
        bench.edit("good.vhdx", "bad.vhdx", change);
        let error = bench.refusal("bad.vhdx");
        assert!(error.to_string().contains(words), "{error}, expected {words}");
        assert!(error.to_string().contains("bad.vhdx"), "{error}");
    };
    damaged(|bytes| bytes[0] = b'x', "does not begin like one");
    damaged(|bytes| (bytes[64 << 10], bytes[128 << 10]) = (0, 0), "both of its headers");
    damaged(|bytes| (bytes[192 << 10], bytes[256 << 10]) = (0, 0), "region table");
    damaged(|bytes| bytes[METADATA] = 0, "metadata table");
    damaged(|bytes| bytes.copy_within(BAT..BAT + 8, BAT + 8), "lies over something else");
    damaged(|bytes| bytes[BAT] = 4, "state 4");
    damaged(|bytes| bytes[BAT] = 7, "no parent");
    damaged(|bytes| bytes[BAT + 2..BAT + 8].fill(0xff), "cut off");
    damaged(|bytes| bytes[BAT + 2..BAT + 8].fill(0), "lies over something else");
    damaged(|bytes| edit_headers(bytes, |header| header.version = 2), "version 2");
    let item = |bytes: &[u8], id: Uuid| {
        let table = MetadataTable::decode(&bytes[METADATA..]).unwrap();
        METADATA + table.entries.iter().find(|entry| entry.id == id).unwrap().offset as usize
    };
    let set = |id: Uuid, value: u64, length: usize, words: &str| {
        bench.edit("good.vhdx", "bad.vhdx", |bytes| {
            let at = item(bytes, id);
            bytes[at..at + length].copy_from_slice(&value.to_le_bytes()[..length]);
        });
        let error = bench.refusal("bad.vhdx");
        assert!(error.to_string().contains(words), "{error}, expected {words}");
    };
    set(item::FILE_PARAMETERS, 3 << 20, 4, "blocks of 3145728 bytes");
    set(item::FILE_PARAMETERS, 1 << 30, 4, "blocks of");
    set(item::LOGICAL_SECTOR_SIZE, 1024, 4, "sectors of 1024");
    set(item::VIRTUAL_DISK_SIZE, (8 << 20) + 1, 8, "a disk of 8388609 bytes");
    set(item::VIRTUAL_DISK_SIZE, 0, 8, "a disk of 0 bytes");
    set(item::VIRTUAL_DISK_SIZE, 1 << 47, 8, "a disk of");
    set(item::VIRTUAL_DISK_SIZE, 32 << 40, 8, "its table has");
    // One header, or one table, is enough.
    bench.edit("good.vhdx", "half.vhdx", |bytes| (bytes[64 << 10], bytes[192 << 10]) = (0, 0));
    assert_eq!(all(&bench.open("half.vhdx").unwrap())[4 << 20..][..4096], [2; 4096]);
}

/// Changes words of a child's parent locator.
fn relocate(bytes: &mut [u8], pairs: &[(&str, &str)]) {
    let mut table = MetadataTable::decode(&bytes[METADATA..]).unwrap();
    let entry = table.entries.iter_mut().find(|entry| entry.id == item::PARENT_LOCATOR).unwrap();
    let at = METADATA + entry.offset as usize;
    let mut locator = ParentLocator::decode(&bytes[at..at + entry.bytes as usize]).unwrap();
    locator.pairs.retain(|(key, _)| key == ParentLocator::LINKAGE);
    for (key, value) in pairs {
        locator.pairs.retain(|(old, _)| old != key);
        locator.pairs.push(((*key).to_owned(), (*value).to_owned()));
    }
    let item = locator.encode();
    entry.bytes = item.len() as u32;
    bytes[at..at + item.len()].copy_from_slice(&item);
    bytes[METADATA..METADATA + TABLE_LEN].copy_from_slice(&table.encode());
}

#[test]
fn a_parent_is_found_by_its_names_in_order_and_verified() {
    let bench = Bench::new();
    bench.write("base.vhdx", 8 << 20, None, &[(0, vec![1; 4096])]);
    bench.write("child.vhdx", 8 << 20, Some("base.vhdx"), &[(4096, vec![2; 512])]);
    let opens = |pairs: &[(&str, &str)]| {
        bench.edit("child.vhdx", "moved.vhdx", |bytes| relocate(bytes, pairs));
        bench.open("moved.vhdx").map(|disk| all(&disk)[4095..4097].to_vec())
    };
    let dir = bench.dir.path().file_name().unwrap().to_str().unwrap();
    let up = format!("..\\{dir}\\base.vhdx");
    assert_eq!(opens(&[("relative_path", &up)]).unwrap(), [1, 2]);
    assert_eq!(opens(&[("absolute_win32_path", "\\\\?\\D:\\vm\\base.vhdx")]).unwrap(), [1, 2]);
    let stale = [("relative_path", "gone\\base.vhdx"), ("volume_path", "\\\\?\\Volume{x}\\base.vhdx")];
    assert_eq!(opens(&stale).unwrap(), [1, 2]);
    let error = opens(&[("relative_path", "gone.vhdx")]).unwrap_err();
    assert!(error.to_string().contains("gone.vhdx"), "{error}");
    assert_eq!(opens(&[]).unwrap_err().kind(), ErrorKind::Corrupt);
    // The second id counts as well: a merge may be under way.
    let parent = bench.open("base.vhdx").unwrap().top().unwrap().header().data_write_id;
    let other = ParentLocator::braced(Uuid::from_u128(1));
    let (id, path) = (ParentLocator::braced(parent), ("relative_path", "base.vhdx"));
    assert_eq!(opens(&[path, ("parent_linkage", &other), ("parent_linkage2", &id)]).unwrap(), [1, 2]);
    let error = opens(&[path, ("parent_linkage", &other)]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Refused);
    for word in ["moved.vhdx", "base.vhdx", &parent.to_string(), &Uuid::from_u128(1).to_string()] {
        assert!(error.to_string().contains(word), "{error} without {word}");
    }
}

#[test]
fn chains_that_are_no_disk_are_refused() {
    let bench = Bench::new();
    bench.write("base.vhdx", 8 << 20, None, &[(0, vec![1; 4096])]);
    bench.write("child.vhdx", 8 << 20, Some("base.vhdx"), &[(4096, vec![2; 512])]);
    // A parent of another size, with the right id.
    let id = bench.open("base.vhdx").unwrap().top().unwrap().header().data_write_id;
    bench.write("larger.vhdx", (8 << 20) + 512, None, &[]);
    bench
        .edit("larger.vhdx", "larger2.vhdx", |bytes| edit_headers(bytes, |header| header.data_write_id = id));
    bench.edit("child.vhdx", "off.vhdx", |bytes| relocate(bytes, &[("relative_path", "larger2.vhdx")]));
    let error = bench.refusal("off.vhdx");
    assert_eq!(error.kind(), ErrorKind::Refused);
    assert!(error.to_string().contains("8388608") && error.to_string().contains("8389120"), "{error}");
    // A circle: the child under itself, with its own id.
    let own = bench.open("child.vhdx").unwrap().top().unwrap().header().data_write_id;
    let own = ParentLocator::braced(own);
    bench.edit("child.vhdx", "circle.vhdx", |bytes| {
        relocate(bytes, &[("relative_path", ".\\circle.vhdx"), ("parent_linkage", &own)]);
    });
    let error = bench.refusal("circle.vhdx");
    assert_eq!(error.kind(), ErrorKind::InvalidInput);
    assert!(error.to_string().contains("circle"), "{error}");
    // Copies of it under each other, without end.
    for n in 0..70 {
        bench.edit("child.vhdx", &format!("deep{n}.vhdx"), |bytes| {
            let below = format!("deep{}.vhdx", n + 1);
            relocate(bytes, &[("relative_path", &below), ("parent_linkage", &own)]);
            bytes.truncate(8 * MIB);
        });
    }
    assert!(bench.refusal("deep0.vhdx").to_string().contains("more than 64"));
}

#[test]
fn bytes_behind_the_end_of_a_shrunk_file_are_an_error_not_zeros() {
    let bench = Bench::new();
    bench.write("base.vhdx", 8 << 20, None, &[(0, vec![1; 2 << 20])]);
    let disk = bench.open("base.vhdx").unwrap();
    let file = File::options().write(true).open(bench.path("base.vhdx")).unwrap();
    file.set_len(5 << 20).unwrap();
    let mut bytes = vec![0; 2 << 20];
    assert!(disk.read(0, &mut [IoSliceMut::new(&mut bytes)]).is_err());
    file.write_all_at(&[1], 6 << 20).unwrap();
    assert!(disk.read(0, &mut [IoSliceMut::new(&mut bytes)]).is_ok());
}
