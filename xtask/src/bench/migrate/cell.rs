//! Cells of the bench: a workload on a link.

use std::time::Duration;

use anyhow::{Result, bail};

use crate::lab::Link;

/// Between the workload's first pass and the move, so that caches and rates are what they stay.
pub const SETTLE: Duration = Duration::from_secs(2);

/// What the guest does while it is moved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Load {
    /// Memory filled, nothing written.
    Idle,
    /// 100 MiB/s of memory over an eighth of it, and 100 fsyncs a second.
    Mixed,
    /// More memory written per second than a 1 Gbit/s link carries.
    Busy,
}

/// One cell.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cell {
    /// As in the names of figures.
    pub name: &'static str,
    /// What the guest does.
    pub load: Load,
    /// Over what it is moved.
    pub link: Link,
}

const ALL: [Cell; 5] = [
    Cell { name: "idle_open", load: Load::Idle, link: Link::Open },
    Cell { name: "mixed_1g", load: Load::Mixed, link: Link::Gbit1 },
    Cell { name: "mixed_10g", load: Load::Mixed, link: Link::Gbit10 },
    Cell { name: "mixed_open", load: Load::Mixed, link: Link::Open },
    Cell { name: "busy_1g", load: Load::Busy, link: Link::Gbit1 },
];

impl Cell {
    /// Settings of the guest's workload.
    pub fn workload(&self) -> String {
        match self.load {
            Load::Idle => "wg.mem_mib=640 wg.mem_rate=0",
            Load::Mixed => {
                "wg.mem_mib=640 wg.mem_hot=128 wg.mem_rate=100 wg.disk=/data/records wg.disk_rate=100"
            }
            Load::Busy => {
                "wg.mem_mib=640 wg.mem_hot=256 wg.mem_rate=200 wg.mem_entropy=90 wg.disk=/data/records wg.disk_rate=100"
            }
        }
        .to_owned()
    }
}

/// The cells called so, or all.
pub fn choose(names: &[String]) -> Result<Vec<Cell>> {
    if names.is_empty() {
        return Ok(ALL.to_vec());
    }
    let known = || ALL.map(|c| c.name).join(", ");
    names
        .iter()
        .map(|n| match ALL.iter().find(|c| c.name == n) {
            Some(c) => Ok(*c),
            None => bail!("cell {n:?} is not known; there are: {}", known()),
        })
        .collect()
}
