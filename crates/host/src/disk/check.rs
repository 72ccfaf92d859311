//! Verifies a layer on disk without changing it: `whimbrel volume check`.
//!
//! Checked: both header slots, each segment's head and place in the chain, every record's and payload's CRC, the
//! checkpoint against a replay of the whole log (once segments were freed: that the log has every block that the
//! checkpoint names), `pull.map`. A layer that is being written shows a tail that is not
//! durable yet; that is a note, not a problem.
//!
//! Not here: repair. Damage below what was durable is not repairable from the layer itself.

use std::path::Path;

use whimbrel_engine::disk::extent_map::{ExtentMap, Piece};
use whimbrel_wire::record::layer::{BLOCK_BYTES, Header, LogPoint, Run, State, runs};

use super::files::Dir;
use super::header_file::HeaderFile;
use super::pull;
use super::recover::{self, apply, blocks_of};
use crate::error::Result;

/// What was found.
#[derive(Clone, Debug)]
pub struct Report {
    /// The header that counts.
    pub header: Header,
    /// The end of the log.
    pub end: LogPoint,
    /// Records in the log.
    pub records: u64,
    /// Length of the log, bytes.
    pub log_bytes: u64,
    /// Bytes of the disk that the layer holds data for.
    pub data_bytes: u64,
    /// What is wrong; the layer is sound if there is nothing.
    pub problems: Vec<String>,
    /// What is worth knowing.
    pub notes: Vec<String>,
}

/// Verifies the layer in `path`. An error means that not even its header could be read.
pub fn check(path: &Path) -> Result<Report> {
    let dir = Dir::new(path);
    let file = HeaderFile::open(&dir, false)?;
    let header = file.get().clone();
    let mut report = Report {
        header: header.clone(),
        end: LogPoint::START,
        records: 0,
        log_bytes: 0,
        data_bytes: 0,
        problems: Vec::new(),
        notes: Vec::new(),
    };
    check_slots(&dir, &mut report)?;
    match recover::recover(&dir, &header, false) {
        Ok(found) => {
            report.end = found.end;
            report.problems.extend(found.checkpoint_problem.iter().map(ToString::to_string));
            let (full, live_blocks) = check_log(&dir, &header, &found.map, found.end.seq, &mut report)?;
            let data = data_blocks(&found.map);
            if live_blocks != data {
                report
                    .problems
                    .push(format!("of {data} blocks that the map names the log has {live_blocks}"));
            }
            // Once segments were freed the log alone no longer makes the map.
            if header.first_segment == 0 {
                compare(&found.map, &full, &mut report);
            }
            report.data_bytes = data * BLOCK_BYTES;
        }
        Err(error) => report.problems.push(error.to_string()),
    }
    match header.state {
        State::Ready | State::Sealed => {}
        State::Receiving(position) => {
            report
                .notes
                .push(format!("being received from another host, up to its record {}", position.at.seq - 1));
        }
        State::Pulling => check_pull(&dir, &mut report),
    }
    Ok(report)
}

fn check_slots(dir: &Dir, report: &mut Report) -> Result<()> {
    let bytes = dir.read("header").unwrap_or_default();
    for (slot, number) in bytes.chunks(Header::LEN).zip(0..2) {
        if let Err(error) = Header::decode(slot) {
            report.notes.push(format!("header slot {number} does not count ({error}); the other one does"));
        }
    }
    Ok(())
}

/// Reads every record from the first one on, with its payload unless nothing of it is live (it may have been freed).
/// Gives the map that the records make, and how many blocks of `opened` they hold.
fn check_log(
    dir: &Dir,
    header: &Header,
    opened: &ExtentMap,
    end_seq: u64,
    report: &mut Report,
) -> Result<(ExtentMap, u64)> {
    let mut live_blocks = 0;
    let mut map = ExtentMap::new(blocks_of(header));
    let segments = recover::open_segments(dir, header, false)?;
    let mut at = LogPoint::START;
    let mut buffer = Vec::new();
    for (number, (file, head)) in &segments {
        let segment = *number;
        report.log_bytes += file.len().unwrap_or(0);
        at = LogPoint { segment, block: 1, seq: head.first_seq, chain: head.chain };
        let next = segments.range(segment.saturating_add(1)..).next();
        let cut = next.map_or(end_seq, |(_, (_, next))| next.first_seq);
        while let Some(group) = recover::read_group(file, header, at)? {
            for entry in group.entries.iter().filter(|entry| entry.seq < cut) {
                let live = recover::live_blocks(opened, header, segment, entry);
                live_blocks += live;
                if live > 0 && !recover::payload_is_whole(file, entry, &mut buffer)? {
                    report.problems.push(format!(
                        "the payload of record {} ({} bytes at {} of the disk) is damaged",
                        entry.seq, entry.length_bytes, entry.offset_bytes
                    ));
                }
                apply(&mut map, header, segment, entry);
                report.records += 1;
            }
            at = group.next;
        }
    }
    if at.seq > end_seq {
        report.notes.push(format!("{} records at the end are torn and do not count", at.seq - end_seq));
    }
    Ok((map, live_blocks))
}

/// The map as it opens must be the map that the whole log makes.
fn compare(opened: &ExtentMap, full: &ExtentMap, report: &mut Report) {
    let mut block = 0;
    while block < full.blocks() {
        let (one, one_blocks) = opened.lookup(block, full.blocks() - block);
        let (other, other_blocks) = full.lookup(block, full.blocks() - block);
        if one != other {
            let at = block * BLOCK_BYTES;
            report
                .problems
                .push(format!("the checkpoint has {one:?} at {at} of the disk, the log {other:?}"));
            return;
        }
        block += one_blocks.min(other_blocks);
    }
}

fn data_blocks(map: &ExtentMap) -> u64 {
    let (mut block, mut data) = (0, 0);
    while block < map.blocks() {
        let (piece, blocks) = map.lookup(block, map.blocks() - block);
        if let Piece::Data(_) = piece {
            data += blocks;
        }
        block += blocks;
    }
    data
}

fn check_pull(dir: &Dir, report: &mut Report) {
    match dir
        .read(pull::MAP_NAME)
        .map_err(|error| error.to_string())
        .and_then(|bytes| runs::decode(&bytes).map_err(|error| error.to_string()))
    {
        Ok(runs) => {
            let blocks: u64 = runs.iter().map(|run: &Run| u64::from(run.blocks)).sum();
            report.notes.push(format!(
                "up to {} bytes are still at another host",
                (blocks * BLOCK_BYTES).saturating_sub(report.data_bytes)
            ));
        }
        Err(error) => {
            report.problems.push(format!("which blocks are still at another host is not known: {error}"));
        }
    }
}
