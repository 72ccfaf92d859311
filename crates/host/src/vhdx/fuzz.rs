//! Files with bytes changed, checksums put right or not: a chain opens and reads, or says what is wrong.

use std::fs::File;
use std::io::IoSliceMut;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use whimbrel_engine::disk::vhdx::ParentPath;
use whimbrel_wire::record::vhdx::log::{Change, encode_entry};
use whimbrel_wire::record::vhdx::{EntryHeader, Header, RegionTable, TABLE_LEN, Uuid};

use super::*;
use crate::block_dev::BlockRead;
use crate::error::{Error, ErrorKind, Result};

const SIZE: u64 = 5 << 20;
const LOG_AT: u64 = 1 << 20;

/// What is not zeros in a file, in pieces of 4 KiB, and its length.
#[derive(Clone)]
struct Sparse {
    pages: Vec<(u64, Vec<u8>)>,
    length: u64,
}

impl Sparse {
    fn of(file: &File) -> Self {
        let length = file.metadata().unwrap().len();
        let mut pages = Vec::new();
        for at in (0..length).step_by(4096) {
            let mut page = vec![0; 4096];
            file.read_exact_at(&mut page, at).unwrap();
            if page.iter().any(|byte| *byte != 0) {
                pages.push((at, page));
            }
        }
        Self { pages, length }
    }

    fn file(&self) -> File {
        let file = memory_file();
        file.set_len(self.length).unwrap();
        for (at, page) in &self.pages {
            file.write_all_at(page, *at).unwrap();
        }
        file
    }
}

fn memory_file() -> File {
    File::from(rustix::fs::memfd_create("fuzz", rustix::fs::MemfdFlags::CLOEXEC).expect("make a file"))
}

/// A file, and one over it whose log has to be replayed.
fn files() -> &'static [Sparse; 2] {
    static FILES: OnceLock<[Sparse; 2]> = OnceLock::new();
    FILES.get_or_init(|| {
        let base = memory_file();
        let new = NewDisk { size_bytes: SIZE, sector_bytes: 512, disk_id: Uuid::from_u128(1), parent: None };
        let mut writer = Writer::new(&base, new.clone()).unwrap();
        writer.write(0, &[1; 8192]).unwrap();
        writer.write(4 << 20, &[2; 4096]).unwrap();
        writer.finish().unwrap();
        let disk = VhdxFile::open(base.try_clone().unwrap(), "base").unwrap();
        let child = memory_file();
        let parent = NewParent { data_write_id: disk.header().data_write_id, relative_path: "base".into() };
        let mut writer = Writer::new(&child, NewDisk { parent: Some(parent), ..new }).unwrap();
        writer.write(4096, &[3; 1024]).unwrap();
        writer.finish().unwrap();
        let mut table = Box::new([0; 4096]);
        child.read_exact_at(table.as_mut_slice(), 3 << 20).unwrap();
        let header = EntryHeader {
            checksum: 0,
            bytes: 0,
            tail: 0,
            sequence: 1,
            descriptors: 0,
            log_id: Uuid::from_u128(2),
            flushed_file_offset: 0,
            last_file_offset: 9 << 20,
        };
        let entry = encode_entry(&header, &[Change::Zero(3 << 20, 4096), Change::Data(3 << 20, table)]);
        child.write_all_at(&entry, LOG_AT).unwrap();
        for at in Header::OFFSETS {
            let mut bytes = vec![0; Header::LEN];
            child.read_exact_at(&mut bytes, at).unwrap();
            let header = Header { log_id: Uuid::from_u128(2), ..Header::decode(&bytes).unwrap() };
            child.write_all_at(&header.encode(), at).unwrap();
        }
        [Sparse::of(&base), Sparse::of(&child)]
    })
}

/// Changes as the input says: which file, which of its pages that are not zeros, whether to cut it off there, place,
/// length, bytes.
fn change(files: &mut [Sparse; 2], mut bytes: &[u8]) {
    while let [flags, page, low, high, len, rest @ ..] = bytes {
        let (data, rest) = rest.split_at(usize::from(*len % 32).min(rest.len()));
        bytes = rest;
        let file = &mut files[usize::from(*flags & 1)];
        let count = file.pages.len();
        let (at, page) = &mut file.pages[usize::from(*page) % count];
        if flags & 2 != 0 {
            file.length = *at + u64::from(*low);
        }
        let from = usize::from(u16::from_le_bytes([*low, *high])) % 4096;
        let end = (from + data.len()).min(4096);
        page[from..end].copy_from_slice(&data[..end - from]);
    }
    for file in files {
        file.pages.retain(|(at, _)| *at + 4096 <= file.length);
    }
}

/// Puts the checksums of a file right, so that what lies behind them is reached.
fn mend(file: &File) {
    let length = file.metadata().unwrap().len();
    let entry = {
        let mut bytes = [0; 12];
        let _ = file.read_exact_at(&mut bytes, LOG_AT);
        u64::from(u32::from_le_bytes([bytes[8], bytes[9], bytes[10], bytes[11]])).min(64 << 10)
    };
    let [one, two] = Header::OFFSETS;
    let [three, four] = RegionTable::OFFSETS;
    let (header, table) = (Header::LEN as u64, TABLE_LEN as u64);
    for (at, bytes) in [(one, header), (two, header), (three, table), (four, table), (LOG_AT, entry)] {
        if at + bytes > length || bytes < 8 {
            continue;
        }
        let mut record = vec![0; bytes as usize];
        file.read_exact_at(&mut record, at).unwrap();
        record[4..8].fill(0);
        let crc = crc32c::crc32c(&record);
        file.write_all_at(&crc.to_le_bytes(), at + 4).unwrap();
    }
}

/// Two files that are known as `/base` and `/child`.
struct Two([File; 2]);

impl FindParent for Two {
    fn open(&self, path: &Path) -> Result<File> {
        let file = if path == Path::new("/child") { &self.0[1] } else { &self.0[0] };
        file.try_clone().map_err(|error| Error::with_source(ErrorKind::Io, "open", error))
    }
    fn find(&self, _child: &Path, name: &ParentPath) -> Result<PathBuf> {
        match name {
            ParentPath::Relative(name) | ParentPath::Beside(name) if name == "base" => {
                Ok(PathBuf::from("/base"))
            }
            _ => Ok(PathBuf::from("/child")),
        }
    }
}

whimbrel_fuzz::fuzz! {
    /// Open a chain and read the beginning and the end of its disk.
    fn vhdx_files(bytes) seeds [
        [],
        [0, 0, 3, 8, 0, 4, 1, 0, 0, 0],
        [1, 0, 4, 0, 0, 6, 1, 2, 3, 4, 5, 6],
        [0, 1, 1, 24, 0, 4, 9, 0, 0, 0],
        [1, 3, 5, 0, 0, 0],
    ] {
        let (mended, bytes) = bytes.split_first().map_or((true, bytes), |(first, rest)| (first & 1 == 0, rest));
        let mut changed = files().clone();
        change(&mut changed, bytes);
        let two = changed.map(|file| file.file());
        if mended {
            two.iter().for_each(mend);
        }
        match VhdxDisk::open(Path::new("/child"), &Two(two)) {
            Err(error) => assert!(error.kind() != ErrorKind::Internal && error.kind() != ErrorKind::Io, "{error}"),
            Ok(disk) => {
                let size = disk.size_bytes();
                assert!(size > 0 && size.is_multiple_of(512));
                let length = size.min(SIZE) as usize;
                for at in [0, size - length as u64] {
                    let mut all = vec![0; length];
                    disk.read(at, &mut [IoSliceMut::new(&mut all)]).unwrap();
                    let extent = disk.extent(at).unwrap();
                    assert!(extent.length > 0 && extent.length <= size - at);
                    let inside = (extent.length as usize).min(length);
                    assert!(extent.data || all[..inside].iter().all(|byte| *byte == 0));
                }
            }
        }
    }
}
