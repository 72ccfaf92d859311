//! Reads a log: group by group, and as a whole when a layer opens.
//!
//! ```text
//! checkpoint, or nothing ──► groups in order, each bound to the one before
//!                            ├ below the highest durable_seq: believed        (damage here refuses to open)
//!                            └ above, in the last segment: payloads verified; the first bad one ends the log
//! ```
//!
//! Invariants: opening for reading changes nothing on disk. Whatever bytes the files hold, nothing panics.
//!
//! Not here: where the next record goes (`append`), the full verification of a layer (`check`).

use std::collections::{BTreeMap, VecDeque};
use std::io::IoSliceMut;
use std::sync::Arc;

use whimbrel_engine::disk::extent_map::{ExtentMap, Piece};
use whimbrel_wire::record::layer::{
    BLOCK_BYTES, BLOCK_LEN, ENTRY_LEN, Entry, EntryKind, GroupHead, Header, LogPoint, SegmentHead,
};

use super::append::segment_name;
use super::checkpoint;
use super::files::{DataFile, Dir};
use crate::error::{Context, Error, ErrorKind, Result};

/// A group as it stands on disk.
#[derive(Debug)]
pub(super) struct Group {
    pub(super) head: GroupHead,
    pub(super) entries: Vec<Entry>,
    /// After its last record.
    pub(super) next: LogPoint,
}

/// A log as it was found.
#[derive(Debug)]
pub(super) struct Recovered {
    pub(super) map: ExtentMap,
    pub(super) segments: BTreeMap<u32, Arc<DataFile>>,
    /// The end of the log.
    pub(super) end: LogPoint,
    /// Whether the next record may follow in the same segment.
    pub(super) clean: bool,
    /// Records read after the checkpoint.
    pub(super) replayed: u64,
    /// Why the checkpoint was not used.
    pub(super) checkpoint_problem: Option<Error>,
}

/// Reads the group at `at`, if a whole one is there that goes on from `at`.
pub(super) fn read_group(file: &DataFile, header: &Header, at: LogPoint) -> Result<Option<Group>> {
    let block = at.block.max(1);
    let mut index = [0; BLOCK_LEN];
    let length = file.read_some(u64::from(block) * BLOCK_BYTES, &mut index);
    let length = length.with_context(|| format!("read log of layer {}", header.disk_id))?;
    let mut slots = index.get(..length).unwrap_or_default().chunks_exact(ENTRY_LEN);
    let Some((head, mut chain)) = slots.next().and_then(GroupHead::decode) else { return Ok(None) };
    let ours = head.salt == header.salt && head.block == block && head.epoch <= header.epoch;
    if !ours || head.first_seq != at.seq || head.chain != at.chain {
        return Ok(None);
    }
    let mut next = LogPoint { segment: at.segment, block: block + 1, ..at };
    let mut entries = Vec::new();
    for slot in slots {
        let Some((entry, crc)) = Entry::decode(slot) else { break };
        let in_place = match entry.kind {
            EntryKind::Data { block, .. } => block == next.block,
            EntryKind::Zero => true,
        };
        let Some(end) = next.block.checked_add(entry.payload_blocks()) else { break };
        if entry.chain != chain || entry.seq != next.seq || !in_place || end > header.segment_blocks {
            break;
        }
        chain = crc;
        next = LogPoint { segment: at.segment, block: end, seq: entry.seq + 1, chain: crc };
        entries.push(entry);
    }
    Ok((!entries.is_empty()).then_some(Group { head, entries, next }))
}

/// Whether the payload of `entry` is what its CRC says.
pub(super) fn payload_is_whole(file: &DataFile, entry: &Entry, buffer: &mut Vec<u8>) -> Result<bool> {
    let EntryKind::Data { block, payload_crc } = entry.kind else { return Ok(true) };
    buffer.resize(entry.length_bytes as usize, 0);
    let length = file.read_some(u64::from(block) * BLOCK_BYTES, buffer).context("read payload of a layer")?;
    Ok(length == buffer.len() && crc32c::crc32c(buffer) == payload_crc)
}

/// Puts a record into the map.
pub(super) fn apply(map: &mut ExtentMap, header: &Header, segment: u32, entry: &Entry) {
    let piece = match entry.kind {
        EntryKind::Zero => Piece::Zero,
        EntryKind::Data { block, .. } => {
            Piece::Data(segment.wrapping_mul(header.segment_blocks).wrapping_add(block))
        }
    };
    map.set(entry.offset_bytes / BLOCK_BYTES, entry.length_bytes / BLOCK_BYTES, piece);
}

/// Blocks of a record that the map names.
pub(super) fn live_blocks(map: &ExtentMap, header: &Header, segment: u32, entry: &Entry) -> u64 {
    let EntryKind::Data { block, .. } = entry.kind else { return 0 };
    let (first, blocks) = (entry.offset_bytes / BLOCK_BYTES, entry.length_bytes / BLOCK_BYTES);
    let place = u64::from(segment) * u64::from(header.segment_blocks) + u64::from(block);
    let (mut done, mut live) = (0, 0);
    while done < blocks {
        let (piece, length) = map.lookup(first + done, blocks - done);
        if u32::try_from(place + done).is_ok_and(|place| piece == Piece::Data(place)) {
            live += length;
        }
        done += length;
    }
    live
}

/// Where a segment's first group begins.
pub(super) fn segment_start(file: &DataFile, number: u32) -> Result<LogPoint> {
    let mut block = [0; BLOCK_LEN];
    file.read(0, &mut [IoSliceMut::new(&mut block)]).context("read the head of a segment")?;
    let head = SegmentHead::decode(&block).map_err(Error::from)?;
    if head.segment != number {
        return Err(Error::new(
            ErrorKind::Corrupt,
            format!("read the head of segment {number}: it says {}", head.segment),
        ));
    }
    Ok(LogPoint { segment: number, block: 1, seq: head.first_seq, chain: head.chain })
}

/// Blocks of the disk.
pub(super) fn blocks_of(header: &Header) -> u64 {
    header.size_bytes.div_ceil(BLOCK_BYTES)
}

/// Opens the segments, by number. Below `first_segment` any may be missing; of the others one whose head never became
/// durable is left out if it is the last.
pub(super) fn open_segments(
    dir: &Dir,
    header: &Header,
    writable: bool,
) -> Result<BTreeMap<u32, (Arc<DataFile>, SegmentHead)>> {
    let what = || format!("open log of layer {}", header.disk_id);
    let number_of =
        |name: &String| name.strip_prefix("segment.").and_then(|hex| u32::from_str_radix(hex, 16).ok());
    let mut numbers: Vec<u32> = dir.names().with_context(what)?.iter().filter_map(number_of).collect();
    numbers.sort_unstable();
    let mut segments = BTreeMap::new();
    let mut expected = header.first_segment;
    for number in numbers {
        let name = segment_name(number);
        if number >= header.first_segment && number != expected {
            return Err(damaged(header, &format!("{} is missing before {name}", segment_name(expected))));
        }
        let file = dir.open(&name, writable).with_context(what)?;
        let mut block = [0; BLOCK_LEN];
        let length = file.read_some(0, &mut block).with_context(what)?;
        let head = SegmentHead::decode(block.get(..length).unwrap_or_default());
        let head = head.ok().filter(|head| {
            head.disk_id == header.disk_id && head.salt == header.salt && head.segment == number
        });
        match head {
            Some(head) => {
                segments.insert(number, (Arc::new(file), head));
                expected = expected.max(number.saturating_add(1));
            }
            None if number < header.first_segment
                || dir.has(&segment_name(number.wrapping_add(1)))
                || has_durable_group(&file, header, 1, None)? =>
            {
                return Err(damaged(header, &format!("the head of {name} is damaged")));
            }
            None => {}
        }
    }
    Ok(segments)
}

/// Reads the log of a layer. `writable` opens its files for writing too.
pub(super) fn recover(dir: &Dir, header: &Header, writable: bool) -> Result<Recovered> {
    let segments = open_segments(dir, header, writable)?;
    let (mut map, start, checkpoint_problem) = match checkpoint::load(dir, header) {
        Ok(Some((map, covers))) => (map, covers, None),
        Ok(None) => (ExtentMap::new(blocks_of(header)), LogPoint::START, None),
        Err(error) if header.first_segment == 0 => {
            (ExtentMap::new(blocks_of(header)), LogPoint::START, Some(error))
        }
        Err(error) => return Err(error),
    };
    if start.segment < header.first_segment {
        let why = format!("its checkpoint is older than {}", segment_name(header.first_segment));
        return Err(damaged(header, &why));
    }
    // The segment after the last one.
    let last =
        segments.last_key_value().map_or(0, |(number, _)| number.saturating_add(1)).max(header.first_segment);
    let (end, replayed) = replay(header, &segments, last, start, &mut map)?;
    let clean = match header.clean_end {
        Some(clean) if clean.seq == end.seq && clean.chain == end.chain => true,
        Some(clean) => {
            let why = format!("it was closed after record {}, but ends after {}", clean.seq - 1, end.seq - 1);
            return Err(damaged(header, &why));
        }
        None => false,
    };
    let end = match header.clean_end {
        Some(clean) if clean.segment < last => clean,
        _ => LogPoint { segment: last, block: 0, ..end },
    };
    let segments: BTreeMap<_, _> = segments.into_iter().map(|(number, (file, _))| (number, file)).collect();
    let clean = clean && segments.contains_key(&end.segment);
    Ok(Recovered { map, clean, segments, end, replayed, checkpoint_problem })
}

/// Applies every record from `start` on; gives the end of the log and the number of records. `last` is the segment
/// after the last one.
fn replay(
    header: &Header,
    segments: &BTreeMap<u32, (Arc<DataFile>, SegmentHead)>,
    last: u32,
    start: LogPoint,
    map: &mut ExtentMap,
) -> Result<(LogPoint, u64)> {
    let mut at = start;
    let mut replayed = 0;
    if start.segment > last {
        return Err(damaged(header, &format!("{} is missing", segment_name(start.segment))));
    }
    for (number, (file, head)) in segments.range(start.segment..) {
        let segment = *number;
        if segment > start.segment || at.block <= 1 {
            if head.first_seq != at.seq || head.chain != at.chain {
                let why = format!(
                    "{} goes on at record {}, but the log before it ends after {}",
                    segment_name(segment),
                    head.first_seq,
                    at.seq.saturating_sub(1)
                );
                return Err(damaged(header, &why));
            }
            at = LogPoint { segment, block: 1, ..at };
        }
        let cut = segments.get(&segment.saturating_add(1)).map(|(_, next)| next.first_seq);
        let before = at.seq;
        at = replay_segment(header, file, at, cut, map)?;
        replayed += at.seq - before;
    }
    Ok((at, replayed))
}

/// Applies one segment's records. Those below `cut`, or below a later group's `durable_seq`, are believed; the others
/// are verified, and the first bad one ends the log.
fn replay_segment(
    header: &Header,
    file: &DataFile,
    start: LogPoint,
    cut: Option<u64>,
    map: &mut ExtentMap,
) -> Result<LogPoint> {
    let mut at = start;
    let mut end = start;
    let mut waiting: VecDeque<(Entry, u32)> = VecDeque::new();
    let mut believe = |entry: &Entry, crc: u32, end: &mut LogPoint| {
        apply(map, header, start.segment, entry);
        let block = match entry.kind {
            EntryKind::Data { block, .. } => block + entry.payload_blocks(),
            EntryKind::Zero => end.block,
        };
        *end = LogPoint { segment: start.segment, block, seq: entry.seq + 1, chain: crc };
    };
    while let Some(group) = read_group(file, header, at)? {
        at = group.next;
        waiting.extend(group.entries.into_iter().map(|entry| (entry, entry.encode().1)));
        let durable = cut.map_or(group.head.durable_seq, |cut| cut - 1);
        while let Some((entry, crc)) = waiting.front().copied().filter(|(entry, _)| entry.seq <= durable) {
            believe(&entry, crc, &mut end);
            waiting.pop_front();
        }
    }
    if let Some(cut) = cut {
        // Torn records of the session that wrote this segment never counted: the next segment says so.
        if end.seq != cut {
            let name = segment_name(start.segment);
            let why = format!("{name} ends after record {}, but the log goes on at {cut}", end.seq - 1);
            return Err(damaged(header, &why));
        }
        return Ok(end);
    }
    let mut buffer = Vec::new();
    for (entry, crc) in waiting {
        if !payload_is_whole(file, &entry, &mut buffer)? {
            break;
        }
        believe(&entry, crc, &mut end);
    }
    if has_durable_group(file, header, end.block.max(1), Some(end.seq))? {
        let why = format!("record {} is damaged, and it was durable", end.seq);
        return Err(damaged(header, &why));
    }
    Ok(end)
}

/// Whether a group from `block` on says that record `seq` (none: the first one found) was durable before it was begun.
fn has_durable_group(file: &DataFile, header: &Header, block: u32, seq: Option<u64>) -> Result<bool> {
    let mut seq = seq;
    let mut chunk = vec![0; 256 * BLOCK_LEN];
    let mut offset = u64::from(block) * BLOCK_BYTES;
    loop {
        let length = file.read_some(offset, &mut chunk);
        let length = length.with_context(|| format!("read log of layer {}", header.disk_id))?;
        for (bytes, at) in chunk.get(..length).unwrap_or_default().chunks_exact(BLOCK_LEN).zip(0u64..) {
            let here = offset / BLOCK_BYTES + at;
            let Some((head, _)) = GroupHead::decode(bytes) else { continue };
            if head.salt != header.salt || u64::from(head.block) != here || head.epoch > header.epoch {
                continue;
            }
            if head.durable_seq >= *seq.get_or_insert(head.first_seq) {
                return Ok(true);
            }
        }
        if length < chunk.len() {
            return Ok(false);
        }
        offset += length as u64;
    }
}

fn damaged(header: &Header, why: &str) -> Error {
    Error::new(ErrorKind::Corrupt, format!("open log of layer {}: {why}", header.disk_id)).hint(
        "data that was reported durable is lost on this disk: check the disk, restore the volume from a copy",
    )
}
