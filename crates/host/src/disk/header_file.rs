//! The header on disk: two slots, written in turn.

use std::fs::File;
use std::io::IoSlice;

use whimbrel_wire::record::layer::Header;

use super::files::{DataFile, Dir};
use crate::error::{Context, Error, ErrorKind, Result};

const NAME: &str = "header";

/// The open header file and what it says.
#[derive(Debug)]
pub(super) struct HeaderFile {
    file: DataFile,
    header: Header,
    /// Held by the one handle that may change the layer.
    lock: Option<File>,
}

/// Why a header was not updated.
pub(super) enum UpdateError {
    /// It still says what it said.
    Unchanged(Error),
    /// Nobody knows what a later reader will find: go read-only.
    Unknown(Error),
}

impl From<UpdateError> for Error {
    fn from(error: UpdateError) -> Self {
        match error {
            UpdateError::Unchanged(error) | UpdateError::Unknown(error) => error,
        }
    }
}

impl HeaderFile {
    /// Writes the first header into both slots.
    pub(super) fn create(dir: &Dir, header: &Header) -> Result<Self> {
        let what = || format!("create header of layer {}", header.disk_id);
        let file = dir.create(NAME).with_context(what)?;
        let mut other = header.clone();
        other.generation += 1;
        for slot in [header, &other] {
            file.write(slot.slot_offset(), &[IoSlice::new(slot.encode().as_slice())]).with_context(what)?;
        }
        file.sync().with_context(what)?;
        Ok(Self { file, header: other, lock: None })
    }

    /// Reads the newer valid slot. `writable`: takes the layer's lock too.
    pub(super) fn open(dir: &Dir, writable: bool) -> Result<Self> {
        let lock = if writable { Some(dir.lock()?) } else { None };
        let what = || format!("open layer {}", dir.path().display());
        let file = dir.open(NAME, writable).with_context(what)?;
        let mut slots = [[0; Header::LEN]; 2];
        for (slot, offset) in slots.iter_mut().zip([0, Header::LEN as u64]) {
            file.read_some(offset, slot).with_context(what)?;
        }
        let header = Header::newest([&slots[0], &slots[1]]).map_err(Error::from).map_err(|error| {
            let damaged = error.kind() == ErrorKind::Corrupt;
            let error = Error::with_source(error.kind(), what(), error);
            if damaged {
                error.hint("both header slots are damaged: restore this layer from a copy")
            } else {
                error
            }
        })?;
        Ok(Self { file, header, lock })
    }

    /// Gives the lock back: another handle may change the layer from here on.
    pub(super) fn release(&mut self) {
        self.lock = None;
    }

    pub(super) fn get(&self) -> &Header {
        &self.header
    }

    /// Changes the header, durably, or not at all.
    pub(super) fn update(&mut self, change: impl FnOnce(&mut Header)) -> Result<(), UpdateError> {
        let what = || format!("update header of layer {}", self.header.disk_id);
        if self.lock.is_none() {
            return Err(UpdateError::Unchanged(Error::new(
                ErrorKind::Refused,
                format!("{}: not open for writing", what()),
            )));
        }
        let mut next = self.header.clone();
        change(&mut next);
        next.generation += 1;
        let bytes = next.encode();
        let written = self.file.write(next.slot_offset(), &[IoSlice::new(bytes.as_slice())]);
        // A torn slot is noticed by its checksum, and the other one counts.
        written.with_context(what).map_err(UpdateError::Unchanged)?;
        self.file.sync().with_context(what).map_err(UpdateError::Unknown)?;
        self.header = next;
        Ok(())
    }
}
