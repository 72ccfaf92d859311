//! What the runs come to: a table for people, figures for checks.

use std::collections::BTreeMap;

use anyhow::Result;

use super::cell::{Cell, Load};
use crate::bench::{median, print_figures};

/// Our arm's name.
pub const OURS: &str = "whimbrel";
const GIB: f64 = (1u64 << 30) as f64;

/// One move.
#[derive(Clone, Copy, Debug)]
pub struct Run {
    /// From the command to the first beat at the target, without the start of the target's process.
    pub total_s: f64,
    /// That start, where it was part of the command.
    pub start_s: f64,
    /// Longest silence of the beat less its period.
    pub downtime_ms: f64,
    /// Sent by both hosts' interfaces.
    pub bytes: f64,
    /// Processor time of everything but the guest itself.
    pub cpu_s: f64,
    /// What the guest found wrong.
    pub errors: u64,
}

/// A figure of a run.
type Figure = fn(&Run) -> f64;
const TOTAL: Figure = |r| r.total_s;
const DOWNTIME: Figure = |r| r.downtime_ms;
const BYTES: Figure = |r| r.bytes;

/// All runs.
#[derive(Default)]
pub struct Table {
    runs: BTreeMap<(String, String), Vec<Run>>,
    unfinished: Vec<(String, String)>,
    /// Integrity errors of our moves.
    pub errors: u64,
    /// Our moves to a target without the image.
    pub cold_total_s: Vec<f64>,
}

impl Table {
    /// Keeps a finished move.
    pub fn add(&mut self, cell: &Cell, arm: &str, run: Run) {
        eprintln!(
            "  {:<11} {arm:<17} {:>7.2} s (+{:.2}) {:>8.1} ms {:>8.1} MiB {:>6.2} s cpu",
            cell.name,
            run.total_s,
            run.start_s,
            run.downtime_ms,
            run.bytes / f64::from(1 << 20),
            run.cpu_s
        );
        self.runs.entry((cell.name.to_owned(), arm.to_owned())).or_default().push(run);
    }

    /// Keeps that a move took too long.
    pub fn add_unfinished(&mut self, cell: &Cell, arm: &str) {
        eprintln!("  {:<11} {arm:<17} did not finish", cell.name);
        self.unfinished.push((cell.name.to_owned(), arm.to_owned()));
    }

    /// Whether this arm failed to finish in this cell.
    pub fn unfinished(&self, cell: &Cell, arm: &str) -> bool {
        self.unfinished.iter().any(|(c, a)| c == cell.name && a == arm)
    }

    fn median(&self, cell: &Cell, arm: &str, figure: Figure) -> f64 {
        let runs = self.runs.get(&(cell.name.to_owned(), arm.to_owned()));
        median(&runs.into_iter().flatten().map(figure).collect::<Vec<_>>())
    }

    fn arms(&self, cell: &Cell) -> Vec<String> {
        self.runs.keys().filter(|(c, _)| c == cell.name).map(|(_, arm)| arm.clone()).collect()
    }

    /// The best of QEMU's encrypted methods by this figure.
    fn best_peer(&self, cell: &Cell, figure: Figure) -> f64 {
        self.arms(cell)
            .iter()
            .filter(|arm| arm.ends_with(" TLS"))
            .map(|arm| self.median(cell, arm, figure))
            .fold(f64::NAN, f64::min)
    }

    /// The cell's medians, for people.
    pub fn print_cell(&self, cell: &Cell) {
        println!("\n{}: medians", cell.name);
        println!("  {:<18} {:>9} {:>13} {:>12} {:>9}", "", "total s", "downtime ms", "MiB on wire", "cpu s");
        for arm in self.arms(cell) {
            println!(
                "  {arm:<18} {:>9.2} {:>13.1} {:>12.1} {:>9.2}",
                self.median(cell, &arm, TOTAL),
                self.median(cell, &arm, DOWNTIME),
                self.median(cell, &arm, BYTES) / f64::from(1 << 20),
                self.median(cell, &arm, |r| r.cpu_s),
            );
        }
        for (_, arm) in self.unfinished.iter().filter(|(c, _)| c == cell.name) {
            println!("  {arm:<18} did not finish within 60 s");
        }
    }

    /// The figures by their agreed names.
    pub fn print_closing(&self, cells: &[Cell]) -> Result<()> {
        let mut figures = BTreeMap::new();
        for cell in cells {
            for (name, figure) in [("total", TOTAL), ("downtime", DOWNTIME), ("bytes", BYTES)] {
                let ratio = self.median(cell, OURS, figure) / self.best_peer(cell, figure);
                // Where no peer finishes there is nothing to compare with.
                if !ratio.is_nan() {
                    figures.insert(format!("{name}_{}_vs_qemu", cell.name), ratio);
                }
                figures.insert(format!("{name}_{}", cell.name), self.median(cell, OURS, figure));
                figures.insert(format!("qemu_{name}_{}", cell.name), self.best_peer(cell, figure));
            }
            figures.insert(format!("target_start_{}", cell.name), self.median(cell, OURS, |r| r.start_s));
            if cell.name == "mixed_open" {
                figures.insert(
                    "guest_gap_mixed_open_ms".into(),
                    self.median(cell, OURS, |r| r.downtime_ms + 1.0),
                );
                figures.insert("cpu_s_per_gib".into(), self.cpu_per_gib(cell, OURS));
                let peers = self.arms(cell).into_iter().filter(|a| a.ends_with(" TLS"));
                let best = peers.map(|a| self.cpu_per_gib(cell, &a)).fold(f64::NAN, f64::min);
                figures.insert("qemu_cpu_s_per_gib".into(), best);
            }
            if cell.load == Load::Busy {
                let finished = !self.unfinished(cell, OURS) && self.arms(cell).iter().any(|a| a == OURS);
                figures.insert("busy_finished".into(), f64::from(u8::from(finished)));
            }
            if cell.name == "mixed_1g" && !self.cold_total_s.is_empty() {
                let ratio = median(&self.cold_total_s) / self.best_peer(cell, TOTAL);
                figures.insert("total_mixed_1g_cold_vs_qemu".into(), ratio);
            }
        }
        figures.insert("integrity_errors".into(), self.errors as f64);
        figures.retain(|_, v| !v.is_nan());
        print_figures("migrate", &figures)
    }

    /// Per GiB of the guest's RAM, since that is the work, whatever a method puts on the wire.
    fn cpu_per_gib(&self, cell: &Cell, arm: &str) -> f64 {
        let ram = (super::MEMORY_MIB << 20) as f64;
        self.median(cell, arm, |r| r.cpu_s) / (ram / GIB)
    }
}
