//! What may make pages shorter that both ends have to know of, and what each of it did.
//!
//! Not here: what they are (`delta`, `reference`), whether frames are compressed (`engine::block::encode`).

use whimbrel_wire::api::MemoryTechnique;
use whimbrel_wire::peer::memory::Technique;

/// Bytes of previous versions that a source keeps if nobody says otherwise.
pub const DELTA_BYTES_DEFAULT: u64 = 64 << 20;

/// Which techniques an end uses, or accepts from the other end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Techniques {
    /// The most bytes of previous versions of pages that a source keeps, so that pages can be sent as their changes; 0:
    /// pages are not sent so.
    pub delta_bytes: u64,
    /// Pages that equal another one are named by it.
    pub same: bool,
    /// Pages that equal a block of an image under the VM's disks are named by it.
    pub disk: bool,
}

impl Default for Techniques {
    fn default() -> Self {
        Self { delta_bytes: DELTA_BYTES_DEFAULT, same: true, disk: true }
    }
}

impl Techniques {
    /// None at all.
    pub const NONE: Self = Self { delta_bytes: 0, same: false, disk: false };

    /// Those that are not among `not`.
    #[must_use]
    pub fn without(self, not: &[MemoryTechnique]) -> Self {
        let has = |technique| !not.contains(&technique);
        Self {
            delta_bytes: if has(MemoryTechnique::Delta) { self.delta_bytes } else { 0 },
            same: self.same && has(MemoryTechnique::SamePages),
            disk: self.disk && has(MemoryTechnique::DiskBlocks),
        }
    }

    /// What is told to the other end.
    pub fn known(&self) -> Vec<Technique> {
        let all = [
            (Technique::Delta, self.delta_bytes > 0),
            (Technique::Same, self.same),
            (Technique::Disk, self.disk),
        ];
        all.into_iter().filter_map(|(technique, on)| on.then_some(technique)).collect()
    }

    /// Those that the other end knows, too.
    #[must_use]
    pub fn shared_with(self, knows: &[Technique]) -> Self {
        let has = |technique| knows.contains(&technique);
        Self {
            delta_bytes: if has(Technique::Delta) { self.delta_bytes } else { 0 },
            same: self.same && has(Technique::Same),
            disk: self.disk && has(Technique::Disk),
        }
    }
}

/// Pages that went in a shorter form.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Saved {
    /// How many.
    pub pages: u64,
    /// Bytes that they would have taken more, frequent words left out in any case.
    pub bytes: u64,
}

impl Saved {
    /// Counts a page that took `wire_bytes` instead of `plain_bytes`.
    pub fn count(&mut self, plain_bytes: usize, wire_bytes: usize) {
        self.pages += 1;
        self.bytes += plain_bytes.saturating_sub(wire_bytes) as u64;
    }

    /// Adds what another part of the work saved.
    pub fn add(&mut self, other: &Self) {
        self.pages += other.pages;
        self.bytes += other.bytes;
    }
}

/// What the techniques did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Shortened {
    /// Pages that were to be sent again and had not changed.
    pub unchanged_pages: u64,
    /// Pages that went as their changes.
    pub delta: Saved,
    /// Pages that were named by an equal page.
    pub same: Saved,
    /// Pages that were named by an equal block of an image.
    pub disk: Saved,
}

impl Shortened {
    /// Adds what another part of the work did.
    pub fn add(&mut self, other: &Self) {
        self.unchanged_pages += other.unchanged_pages;
        self.delta.add(&other.delta);
        self.same.add(&other.same);
        self.disk.add(&other.disk);
    }
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn only_what_both_ends_know_is_used() {
        let all = Techniques::default();
        assert_eq!(all.shared_with(&all.known()), all);
        assert_eq!(all.shared_with(&[]), Techniques::NONE);
        assert_eq!(
            all.shared_with(&[Technique::Unknown, Technique::Same]),
            Techniques { same: true, ..Techniques::NONE }
        );
        assert_eq!(Techniques::NONE.shared_with(&all.known()), Techniques::NONE);
        assert!(Techniques::NONE.known().is_empty());
        assert_eq!(all.without(&[]), all);
        assert_eq!(all.without(&[MemoryTechnique::SamePages]), Techniques { same: false, ..all });
        let not = [MemoryTechnique::Delta, MemoryTechnique::DiskBlocks];
        assert_eq!(all.without(&not), Techniques { same: true, ..Techniques::NONE });
    }
}
