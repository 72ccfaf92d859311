//! Which way the guest's writes are followed during a copy: what it costs is measured between scans, the engine chooses,
//! and what was measured is shown.
//!
//! Invariants
//! * A copy changes the way at most [`SWITCHES_MAX`] times. A way that cannot be begun, because no suitable userfaultfd
//!   can be made inside QEMU, is not tried again; a change that fails half-way ends the copy.
//!
//! Not here: the ways (`guest::capture`), the choice (`engine::memory::page_group`).

use std::time::{Duration, Instant};

use whimbrel_engine::memory::page_group::{
    Capture as Way, Costs, Distance, Estimate, Looked, Wanted, Writes, choose,
};

use crate::error::Result;
use crate::guest::calibrate;
use crate::guest::capture::{Capture, SwitchStats};
use crate::guest::fault::FaultStats;
use crate::guest::inject::{self, Injected};
use crate::memory::{PageBitmap, RoundReport};
use crate::task::TaskHandle;
use crate::vm::LocalVm;

/// One copy changes the way at most so often.
const SWITCHES_MAX: u32 = 4;

/// See the module's charter.
pub struct Follow {
    wanted: Wanted,
    /// What scans found since the last choice.
    writes: Writes,
    since: Instant,
    faults: FaultStats,
    /// Written pages that were followed one by one: each was a fault that the kernel served.
    single_pages: u64,
    scans: Duration,
    given_up: bool,
}

impl Follow {
    /// Nothing is measured yet.
    pub fn new(wanted: Wanted) -> Self {
        Self {
            wanted,
            writes: Writes::default(),
            since: Instant::now(),
            faults: FaultStats::default(),
            single_pages: 0,
            scans: Duration::ZERO,
            given_up: false,
        }
    }

    /// The way to begin with.
    pub fn first(wanted: Wanted) -> Way {
        match wanted {
            Wanted::Always(way) => way,
            Wanted::Auto => Way::Pages,
        }
    }

    /// Takes note of a scan that found `fresh`.
    pub fn scanned(&mut self, way: Way, fresh: &PageBitmap, took: Duration) {
        self.scans += took;
        if way == Way::Pages {
            let writes = Writes::of(fresh.iter_ranges());
            self.single_pages += writes.pages;
            self.writes.add(&writes);
        }
    }

    /// Begins to count anew, after the scan that reported everything.
    pub fn begin(&mut self) {
        self.writes = Writes::default();
        self.single_pages = 0;
        self.since = Instant::now();
    }

    /// After a round: the other way, if it is the better one now.
    pub fn consider(&mut self, capture: &Capture, report: &RoundReport, dirty_pages: u64) -> Option<Way> {
        let interval_ns = self.since.elapsed().as_secs_f64() * 1e9;
        let (writes, before) = (std::mem::take(&mut self.writes), self.faults);
        self.faults = capture.faults();
        self.since = Instant::now();
        if self.given_up || capture.switches().count >= SWITCHES_MAX {
            return None;
        }
        if self.wanted == Wanted::Always(capture.way()) {
            return None;
        }
        if self.wanted == Wanted::Auto && report.counts.data_pages == 0 {
            return None;
        }
        let page_s = report.duration.as_secs_f64() / report.counts.data_pages.max(1) as f64;
        let (page_ns, fault_ns, opened_ns) = match calibrate::costs() {
            Ok(costs) => costs,
            Err(error) => {
                tracing::warn!(%error, "what following writes costs was not measured");
                self.given_up = true;
                return None;
            }
        };
        let costs = Costs { page_ns, fault_ns, opened_ns, resend_ns: page_s * 1e9 };
        let now = capture.way();
        let estimate = match now {
            Way::Pages => Estimate::of_writes(&writes, &costs),
            Way::Groups => Estimate::of_faults(&since(&before, &self.faults), &costs),
        };
        let distance = Distance::of(dirty_pages as f64 * page_s * 1e3);
        let chosen = choose(now, self.wanted, &estimate, interval_ns, distance);
        tracing::trace!(?now, ?chosen, ?costs, ?estimate, interval_ns, ?distance, "following writes");
        (chosen != now).then_some(chosen)
    }

    /// The userfaultfd that a way takes; none if it cannot be had.
    pub async fn userfaultfd(&mut self, way: Way, vm: &LocalVm) -> Option<Injected> {
        match injected_for(way, vm).await {
            Ok(injected) => Some(injected),
            Err(error) => {
                tracing::info!(vm = %vm.name, %error, ?way, "writes are followed as before");
                self.given_up = true;
                None
            }
        }
    }

    /// Shows what was measured so far.
    pub fn show(&self, capture: &Capture, task: &TaskHandle) {
        let (faults, switches) = (capture.faults(), capture.switches());
        for (name, value) in figures(capture.way(), &faults, &switches, self.single_pages, self.scans) {
            task.figure(name, value);
        }
    }
}

/// The userfaultfd that a way takes.
pub async fn injected_for(way: Way, vm: &LocalVm) -> Result<Injected> {
    let qmp = vm.qmp().await?;
    match way {
        Way::Pages => inject::userfaultfd_of(&qmp, &vm.process).await,
        Way::Groups => inject::serving_userfaultfd_of(&qmp, &vm.process).await,
    }
}

fn since(before: &FaultStats, now: &FaultStats) -> Looked {
    Looked {
        faults: now.faults.saturating_sub(before.faults),
        opened_pages: now.opened_pages.saturating_sub(before.opened_pages),
        sampled_pages: now.sampled_pages.saturating_sub(before.sampled_pages),
        unchanged_pages: now.unchanged_pages.saturating_sub(before.unchanged_pages),
    }
}

/// `wasted_resends` are pages, by their share of the sample; `faults_per_gib` counts those that the kernel served by itself
/// too, per GiB of memory that has to be sent again.
fn figures(
    way: Way,
    faults: &FaultStats,
    switches: &SwitchStats,
    single_pages: u64,
    scans: Duration,
) -> [(&'static str, f64); 9] {
    const GIB_PAGES: f64 = 262_144.0;
    let resent = (faults.opened_pages + single_pages) as f64;
    let all_faults = (faults.faults + single_pages) as f64;
    let share = faults.unchanged_pages as f64 / faults.sampled_pages.max(1) as f64;
    [
        ("capture_groups", f64::from(u8::from(way == Way::Groups))),
        ("group_pages", faults.group_pages as f64),
        ("faults_served", faults.faults as f64),
        ("faults_per_gib", all_faults / (resent / GIB_PAGES).max(1.0 / GIB_PAGES)),
        ("fault_ms", faults.handling.as_secs_f64() * 1e3),
        ("wasted_resends", (faults.opened_pages as f64 * share).round()),
        ("scan_ms", scans.as_secs_f64() * 1e3),
        ("capture_switches", f64::from(switches.count)),
        ("capture_switch_ms", switches.took.as_secs_f64() * 1e3),
    ]
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn figures_are_those_of_both_ways_together() {
        let faults = FaultStats {
            faults: 10,
            opened_pages: 1000,
            sampled_pages: 80,
            unchanged_pages: 20,
            ..FaultStats::default()
        };
        let list = figures(Way::Groups, &faults, &SwitchStats::default(), 500, Duration::from_millis(3));
        let of = |name| list.iter().find(|(one, _)| *one == name).unwrap().1;
        assert_eq!((of("capture_groups"), of("wasted_resends"), of("scan_ms")), (1.0, 250.0, 3.0));
        assert!((of("faults_per_gib") - 510.0 / 1500.0 * 262_144.0).abs() < 1.0);
        let none = figures(Way::Pages, &FaultStats::default(), &SwitchStats::default(), 0, Duration::ZERO);
        assert!(none.iter().all(|(_, value)| *value == 0.0), "{none:?}");
    }
}
