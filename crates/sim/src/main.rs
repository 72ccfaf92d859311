//! Runs seeds: one with its trace, or a range of them with a summary.

use std::process::ExitCode;
use std::time::Instant;

use clap::Parser;
use whimbrel_sim::{Options, Plant, Tally, repeat_command, run};

/// Simulates hosts that move a VM and read an image while things break.
#[derive(Parser)]
struct Args {
    /// Run this seed, twice, and print its trace.
    #[arg(long, conflicts_with = "seeds")]
    seed: Option<u64>,
    /// Run the seeds A..B (B not included).
    #[arg(long, value_name = "A..B", value_parser = parse_range, default_value = "0..1000")]
    seeds: (u64, u64),
    /// Plant a mistake.
    #[arg(long)]
    plant: Option<Plant>,
    /// With --seed: no trace.
    #[arg(long)]
    quiet: bool,
}

fn parse_range(text: &str) -> Result<(u64, u64), String> {
    let form = || format!("{text:?} is not of the form A..B");
    let (first, end) = text.split_once("..").ok_or_else(form)?;
    Ok((first.parse().map_err(|_| form())?, end.parse().map_err(|_| form())?))
}

fn main() -> ExitCode {
    let args = Args::parse();
    match args.seed {
        Some(seed) => one(seed, args.plant, args.quiet),
        None => many(args.seeds, args.plant),
    }
}

fn one(seed: u64, plant: Option<Plant>, quiet: bool) -> ExitCode {
    let report = run(Options { seed, plant, keep_trace: !quiet });
    for line in &report.trace {
        println!("{line}");
    }
    let again = run(Options { seed, plant, keep_trace: false });
    println!("{:?}", report.tally);
    println!("trace {:016x}", report.trace_hash);
    if again.trace_hash != report.trace_hash {
        println!("the second run differs: {:016x}", again.trace_hash);
        return ExitCode::FAILURE;
    }
    match report.violation {
        Some(words) => {
            println!("seed {seed} broke a rule: {words}");
            ExitCode::FAILURE
        }
        None => ExitCode::SUCCESS,
    }
}

fn many((first, end): (u64, u64), plant: Option<Plant>) -> ExitCode {
    let start = Instant::now();
    let mut sum = Tally::default();
    for seed in first..end {
        let report = run(Options { seed, plant, keep_trace: false });
        sum.add(&report.tally);
        if let Some(words) = report.violation {
            println!("seed {seed} broke a rule: {words}");
            println!("repeat it with: {}", repeat_command(seed, plant));
            return ExitCode::FAILURE;
        }
    }
    let seconds = start.elapsed().as_secs_f64();
    println!("{} seeds in {seconds:.1} s, no rule broken: {sum:?}", end.saturating_sub(first));
    ExitCode::SUCCESS
}
