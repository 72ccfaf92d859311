//! Checkpoints: the map on disk, so that opening replays little.
//!
//! Written while records are appended: the dump may hold records newer than the place it is as of (`covers`). That is
//! harmless because replay from `covers` repeats them, and because the log is flushed between the dump and the
//! header that names it, so no such record can be lost.
//!
//! Invariants: a checkpoint counts once the header names it; the one before is removed after that. Losing one loses
//! nothing.

use std::io::IoSlice;

use whimbrel_engine::disk::extent_map::{ExtentMap, Piece};
use whimbrel_wire::record::layer::{CheckpointRef, Header, LogPoint, Run, RunKind, runs};

use super::files::Dir;
use super::recover::blocks_of;
use crate::error::{Context, Error, ErrorKind, Result};

/// The files of a checkpoint; the second exists if the log alone no longer makes the map.
pub(super) fn names(number: u64) -> [String; 2] {
    [format!("map.{number:08x}"), format!("map.{number:08x}.copy")]
}

/// Writes the map as checkpoint `number`, durably; `twice` if nothing else has what it says. `dump` adds runs to the list from the given block on and gives the
/// block to go on from (see [`ExtentMap::runs`]); between its calls the map may change.
pub(super) fn write(
    dir: &Dir,
    number: u64,
    covers: LogPoint,
    twice: bool,
    mut dump: impl FnMut(u64, &mut Vec<Run>) -> Option<u64>,
) -> Result<CheckpointRef> {
    let names = names(number);
    let what = || format!("write checkpoint {number} in {}", dir.path().display());
    let mut all: Vec<u8> = vec![0; 24];
    let mut from = Some(0);
    let mut some = Vec::new();
    while let Some(block) = from {
        some.clear();
        from = dump(block, &mut some);
        for run in &some {
            all.extend_from_slice(&run.encode());
        }
    }
    let head = runs::encode_head(all.get(24..).unwrap_or_default());
    all.splice(..24, head);
    for name in names.iter().take(if twice { 2 } else { 1 }) {
        let file = dir.create(name).with_context(what)?;
        file.write(0, &[IoSlice::new(&all)]).with_context(what)?;
        file.sync().with_context(what)?;
    }
    dir.sync()?;
    let runs = ((all.len() - 24) / Run::LEN) as u64;
    Ok(CheckpointRef { covers, number, runs, hash: *blake3::hash(&all).as_bytes() })
}

/// Reads the checkpoint that the header names.
pub(super) fn load(dir: &Dir, header: &Header) -> Result<Option<(ExtentMap, LogPoint)>> {
    let Some(checkpoint) = &header.checkpoint else { return Ok(None) };
    let what = || format!("read checkpoint {} in {}", checkpoint.number, dir.path().display());
    let [first, second] = names(checkpoint.number).map(|name| {
        let bytes = dir.read(&name).with_context(what)?;
        if *blake3::hash(&bytes).as_bytes() != checkpoint.hash {
            return Err(Error::new(ErrorKind::Corrupt, format!("{}: the hash of {name} differs", what())));
        }
        Ok(bytes)
    });
    let bytes = first.or_else(|error| second.map_err(|_| error))?;
    let runs = runs::decode(&bytes).map_err(Error::from).with_context(what)?;
    let mut map = ExtentMap::new(blocks_of(header));
    for run in runs {
        let piece = match run.kind {
            RunKind::Zero => Piece::Zero,
            RunKind::Data(place) => Piece::Data(place),
        };
        map.set(run.start, run.blocks.into(), piece);
    }
    Ok(Some((map, checkpoint.covers)))
}

/// Removes every checkpoint but `keep`.
pub(super) fn sweep(dir: &Dir, keep: Option<u64>) -> Result<()> {
    let keep = keep.map(names).unwrap_or_default();
    for file in dir.names().context("list layer")? {
        if file.starts_with("map.") && !keep.contains(&file) {
            dir.remove(&file).context("remove old checkpoint")?;
        }
    }
    Ok(())
}
