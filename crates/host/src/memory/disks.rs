//! Images under a VM's disks, as far as they are on this host, and which pages of memory came from them.
//!
//! Disks are numbered by their places in the VM's list of volumes, which both ends read in its record: a number leads to an
//! image that this VM's disks lie on, never to anything else. Only what is on this host is read: looking for a page never
//! makes a host fetch a block.
//!
//! Not here: whether a page is named (`known`), whether it was found (`lookup`).

use std::io::IoSliceMut;
use std::sync::Arc;

use whimbrel_engine::memory::PageId;

use crate::block_dev::BlockRead;
use crate::export::FilledFrom;
use crate::memory::bitmap::PAGE_BYTES;

/// The image under each disk that has one, by the disk's number.
#[derive(Clone, Default)]
pub struct Images(pub Vec<Option<Arc<dyn BlockRead>>>);

impl std::fmt::Debug for Images {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Images({} of {} disks)", self.0.iter().flatten().count(), self.0.len())
    }
}

impl Images {
    /// Whether there is one at all.
    pub fn any(&self) -> bool {
        self.0.iter().any(Option::is_some)
    }

    /// Reads a 4 KiB block of the image under a disk into `page`; false if it is not on this host.
    pub fn read(&self, disk: u16, block: u32, page: &mut [u8]) -> bool {
        let Some(Some(image)) = self.0.get(usize::from(disk)) else { return false };
        let offset = u64::from(block) * PAGE_BYTES as u64;
        if offset + page.len() as u64 > image.size_bytes() {
            return false;
        }
        image.read_here(offset, &mut [IoSliceMut::new(page)]).unwrap_or_else(|error| {
            tracing::debug!(%error, disk, block, "an image under a disk was not read for a move of memory");
            false
        })
    }
}

/// A source's disks: their images, and which pages of the RAM block they filled.
#[derive(Clone, Default)]
pub struct Disks {
    /// The images.
    pub images: Images,
    /// By the disk's number; none where nobody knows.
    pub filled: Vec<Option<FilledFrom>>,
    /// The RAM block's number.
    pub block: u16,
}

impl std::fmt::Debug for Disks {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Disks")
            .field("images", &self.images)
            .field("block", &self.block)
            .finish_non_exhaustive()
    }
}

impl Disks {
    /// The blocks, with their disks' numbers, that a page may have been filled from: one at most for each disk.
    pub fn sources(&self, page: PageId) -> impl Iterator<Item = (u16, u32)> + '_ {
        let filled = if page.block == self.block { self.filled.as_slice() } else { &[] };
        (0_u16..)
            .zip(filled)
            .filter_map(move |(disk, filled)| Some((disk, filled.as_ref()?.block_of(u64::from(page.page))?)))
    }
}
