//! The guest: memory, registers and a disk, as versions instead of bytes; and the truth about them, which no host
//! can see.
//!
//! Every value the guest writes is the number of the instruction that wrote it, so a newer value is a larger one.
//! [`Truth`] follows the one guest there should be. A [`struct@Copy`] is what some host has of it: what QEMU, RAM file and
//! layer are to a real host. Whatever an executing copy reads is compared with the truth.
//!
//! Not here: who may execute (`moves`, `check`).

use std::collections::BTreeSet;

/// Pages of memory.
pub const PAGES: usize = 24;
/// Blocks of the disk.
pub const BLOCKS: usize = 12;

/// A disk write that the guest has submitted and that has not completed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Io {
    /// Which block.
    pub block: usize,
    /// What is written.
    pub value: u64,
}

/// What is true of the guest.
#[derive(Clone, Debug)]
pub struct Truth {
    /// Memory.
    pub ram: Vec<u64>,
    /// Instructions executed.
    pub regs: u64,
    /// The newest completed write of each block.
    pub written: Vec<u64>,
    /// The newest write of each block that a flush has acknowledged.
    pub acked: Vec<u64>,
    /// Submitted and not completed.
    pub io: Vec<Io>,
    /// Epoch of the last instruction.
    pub epoch: u64,
}

impl Truth {
    /// A guest that has just been started.
    pub fn new() -> Self {
        Self {
            ram: vec![0; PAGES],
            regs: 0,
            written: vec![0; BLOCKS],
            acked: vec![0; BLOCKS],
            io: Vec::new(),
            epoch: 1,
        }
    }

    /// The operator let the guest go on from an older copy, since the host with the newer one is lost.
    pub fn go_back_to(&mut self, copy: &Copy) {
        self.ram.clone_from(&copy.ram);
        self.regs = copy.regs.unwrap_or(self.regs);
        self.io.clone_from(&copy.io);
        for (block, value) in copy.layer.cached.iter().enumerate() {
            self.acked[block] = self.acked[block].min(*value);
            // A listed write may have been applied though it has not completed.
            let listed = copy.io.iter().any(|io| io.block == block && io.value == *value);
            if !listed {
                self.written[block] = *value;
            }
        }
    }
}

/// What a copy does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CopyState {
    /// QEMU waits for a device state.
    Incoming,
    /// QEMU has everything and does not execute.
    Stopped,
    /// QEMU executes.
    Running,
    /// QEMU is gone; files may be left.
    Dead,
}

/// The writable layer: what the page cache holds, and what the disk holds.
#[derive(Clone, Debug)]
pub struct Layer {
    /// As readers see it.
    pub cached: Vec<u64>,
    /// As it is after the loss of power.
    pub durable: Vec<u64>,
    /// Blocks that are still at the source only (`--disk on-demand`).
    pub missing: BTreeSet<usize>,
    /// Some were missing from the start, and not all have been fetched.
    pub partial: bool,
}

impl Layer {
    /// An empty layer.
    pub fn new() -> Self {
        Self { cached: vec![0; BLOCKS], durable: vec![0; BLOCKS], missing: BTreeSet::new(), partial: false }
    }

    /// Makes `blocks` durable.
    pub fn persist(&mut self, blocks: &[u64]) {
        for (durable, value) in self.durable.iter_mut().zip(blocks) {
            *durable = (*durable).max(*value);
        }
    }
}

/// Names a copy for as long as the run lasts.
pub type CopyId = u64;

/// A guest's QEMU, memory and layer on one host.
#[derive(Clone, Debug)]
pub struct Copy {
    /// Its name.
    pub id: CopyId,
    /// What it does.
    pub state: CopyState,
    /// Memory.
    pub ram: Vec<u64>,
    /// Registers; none before the device state has come.
    pub regs: Option<u64>,
    /// Submitted and not completed.
    pub io: Vec<Io>,
    /// The layer.
    pub layer: Layer,
    /// Whether the host performs I/O for it.
    pub takes_io: bool,
    /// The attempt that brought it here.
    pub brought_by: Option<u64>,
    /// Memory, device state and layer are whole: it could be started from the files if QEMU ended.
    pub kept: bool,
    /// Epoch at which it executes, or from which on it refuses frames of older ones.
    pub epoch: u64,
    /// Newest version of each page and block that came over a link; gone when the stream is closed.
    pub have: Option<Have>,
    /// Counts flushes, so that a late end of an old one is known.
    pub flush: u64,
}

/// What has come over links.
#[derive(Clone, Debug)]
pub struct Have {
    /// By page.
    pub pages: Vec<u64>,
    /// By block.
    pub blocks: Vec<u64>,
}

impl Copy {
    /// A guest booted from a disk.
    pub fn booted(id: CopyId, layer: Layer, regs: u64, epoch: u64) -> Self {
        Self {
            id,
            state: CopyState::Running,
            ram: vec![0; PAGES],
            regs: Some(regs),
            io: Vec::new(),
            layer,
            takes_io: true,
            brought_by: None,
            kept: false,
            epoch,
            have: None,
            flush: 0,
        }
    }

    /// Room for a guest that an attempt will bring.
    pub fn incoming(id: CopyId, attempt: u64) -> Self {
        Self {
            id,
            state: CopyState::Incoming,
            ram: vec![0; PAGES],
            regs: None,
            io: Vec::new(),
            layer: Layer::new(),
            takes_io: false,
            brought_by: Some(attempt),
            kept: false,
            epoch: 0,
            have: Some(Have { pages: vec![0; PAGES], blocks: vec![0; BLOCKS] }),
            flush: 0,
        }
    }

    /// QEMU ends; its files stay.
    pub fn kill(&mut self) {
        self.state = CopyState::Dead;
    }

    /// The host loses power: memory is gone, the layer is what was durable.
    pub fn lose_power(&mut self) {
        self.state = CopyState::Dead;
        self.kept = false;
        self.regs = None;
        self.io.clear();
        self.have = None;
        self.layer.cached.clone_from(&self.layer.durable);
        if self.layer.partial {
            // That a block had been written here is as lost as what had been written.
            self.layer.missing = (0..BLOCKS).filter(|block| self.layer.durable[*block] == 0).collect();
        }
    }
}
