//! `cargo xtask bench NAME`: peers and Whimbrel side by side in one run, on the same work.
//!
//! Invariants: runs of all arms are interleaved; a figure is a median; ratios are Whimbrel / best peer; a peer that
//! cannot run makes the bench fail. The last line of output is one JSON object.
//!
//! Not here: what is measured (one module per bench).

pub mod block;
pub mod migrate;

use std::collections::BTreeMap;

use anyhow::{Result, bail};
use serde_json::{Value, json};

use crate::check::kernel_release;

/// How to run a bench.
#[derive(Clone, Debug)]
pub struct Options {
    /// Which one.
    pub name: String,
    /// Fewer runs.
    pub quick: bool,
    /// Only these cells; all if empty.
    pub cells: Vec<String>,
    /// Never install packages.
    pub no_install: bool,
    /// Leave out our own arm, or the peers', while working on the other.
    pub only: Option<Side>,
}

/// One side of a comparison.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Side {
    /// The peers.
    Peers,
    /// Whimbrel.
    Ours,
}

impl Options {
    /// Whether a side takes part.
    pub fn has(&self, side: Side) -> bool {
        self.only.is_none_or(|o| o == side)
    }
}

/// Runs the bench called `options.name`.
pub fn run(options: &Options) -> Result<()> {
    match options.name.as_str() {
        "block" => block::run(options),
        "migrate" => migrate::run(options),
        other => bail!("bench {other:?} is not known; there are: block, migrate"),
    }
}

/// The middle of some runs; the mean of the two middle ones if their number is even. NaN of none.
pub fn median(values: &[f64]) -> f64 {
    let mut sorted: Vec<f64> = values.iter().copied().filter(|v| !v.is_nan()).collect();
    sorted.sort_by(f64::total_cmp);
    let n = sorted.len();
    match n {
        0 => f64::NAN,
        _ if n % 2 == 1 => sorted[n / 2],
        _ => f64::midpoint(sorted[n / 2 - 1], sorted[n / 2]),
    }
}

/// Prints the closing line.
pub fn print_figures(bench: &str, figures: &BTreeMap<String, f64>) -> Result<()> {
    // JSON has no NaN: a figure that could not be had is null, and the bench has said why.
    let figures: BTreeMap<&str, Value> =
        figures.iter().map(|(k, v)| (k.as_str(), json!((v * 1e4).round() / 1e4))).collect();
    println!("{}", json!({ "bench": bench, "figures": figures, "machine": machine()? }));
    Ok(())
}

fn machine() -> Result<Value> {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = info.lines().find_map(|l| l.strip_prefix("model name")?.split_once(": ").map(|(_, m)| m));
    Ok(json!({
        "cpus": std::thread::available_parallelism().map_or(0, usize::from),
        "cpu": model,
        "kernel": kernel_release()?,
    }))
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn a_median_is_the_middle_and_ignores_what_could_not_be_measured() {
        assert!((median(&[3.0, 1.0, 2.0]) - 2.0).abs() < 1e-9);
        assert!((median(&[4.0, 1.0, f64::NAN, 2.0, 3.0]) - 2.5).abs() < 1e-9);
        assert!(median(&[]).is_nan());
    }
}
