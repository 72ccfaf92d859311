//! A layer's files with bytes changed, checksums put right or not: it opens and reads, or says what is wrong.

use std::collections::BTreeMap;
use std::sync::OnceLock;

use super::*;
use crate::disk::check::check;

const SIZE: u64 = 1 << 20;

type Files = BTreeMap<String, Vec<u8>>;

/// The files of a layer that was written to, flushed, and closed.
fn files() -> &'static Files {
    static FILES: OnceLock<Files> = OnceLock::new();
    FILES.get_or_init(|| {
        let (_dir, path, layer) = layer(SIZE);
        write(&*layer, 0, &[1; 4096]).unwrap();
        write(&*layer, 65536, &[2; 12288]).unwrap();
        layer.write_zeroes(131_072, 8192).unwrap();
        layer.flush().unwrap();
        layer.checkpoint().unwrap();
        write(&*layer, 4096, &[3; 4096]).unwrap();
        layer.flush().unwrap();
        drop(layer);
        let entries = std::fs::read_dir(&path).unwrap().map(|entry| entry.unwrap());
        entries.map(|e| (e.file_name().into_string().unwrap(), std::fs::read(e.path()).unwrap())).collect()
    })
}

/// The CRC-32C of a block, which stands at 12..16, put right.
fn mend(block: &mut [u8]) {
    let crc = crc32c::crc32c_append(crc32c::crc32c(&block[..12]), &block[16..]);
    block[12..16].copy_from_slice(&crc.to_le_bytes());
}

/// Changes as the input says: file, whether to mend, block, place in it, length, bytes.
fn change(files: &mut Files, mut bytes: &[u8]) {
    let count = files.len().max(1);
    while let [file, flags, block, low, high, len, rest @ ..] = bytes {
        let (data, rest) = rest.split_at(usize::from(*len % 32).min(rest.len()));
        bytes = rest;
        let Some(content) = files.values_mut().nth(usize::from(*file) % count) else { return };
        if flags & 2 != 0 {
            content.truncate(usize::from(*block) * 4096 + usize::from(*low));
        }
        let start = usize::from(*block) * 4096;
        let Some(block) = content.get_mut(start..start + 4096) else { continue };
        let at = usize::from(u16::from_le_bytes([*low, *high])) % 4096;
        let end = (at + data.len()).min(4096);
        block[at..end].copy_from_slice(&data[..end - at]);
        if flags & 1 != 0 {
            mend(block);
        }
    }
}

whimbrel_fuzz::fuzz! {
    /// Open, read everything, check, write: nothing panics, and what opens for writing works.
    fn layer_files(bytes) seeds [
        [0, 1, 0, 72, 0, 8, 0, 0, 0, 1, 0, 0, 0, 0],
        [0, 1, 1, 104, 0, 4, 1, 0, 0, 0],
        [1, 1, 0, 40, 0, 4, 9, 0, 0, 0],
        [2, 0, 1, 0, 0, 6, 1, 2, 3, 4, 5, 6],
        // A checkpoint before the first record.
        [0, 1, 0, 0xcb, 0, 2, 1, 0],
    ] {
        let mut changed = files().clone();
        change(&mut changed, bytes);
        let dir = temp_dir();
        let path = dir.path().join("layer");
        std::fs::create_dir(&path).unwrap();
        for (name, content) in &changed {
            std::fs::write(path.join(name), content).unwrap();
        }
        let _ = check(&path);
        if let Ok(layer) = Layer::open(&path, None, Epoch(u64::MAX - 1), true) {
            // A header may claim a disk of any size.
            let length = layer.size_bytes().min(2 * SIZE);
            let mut all = vec![0; length as usize];
            let _ = layer.read(0, &mut [IoSliceMut::new(&mut all)]);
            if layer.size_bytes() >= 4096 && write(&*layer, 0, &[9; 4096]).is_ok() {
                assert_eq!(read(&*layer, 0, 4096), [9; 4096]);
            }
        }
    }
}
