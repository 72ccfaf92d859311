//! Hosts in one thread: virtual time, faults, checkers; the engine runs unchanged.
//!
//! One seed makes one run: a few hosts with one VM that is moved to and fro while agents are killed, hosts lose
//! power, QEMUs end, links are cut, and the metadata store stops answering or answers what cannot be told apart from
//! nothing; beside it, all hosts read one image. After a while faults end, what can come back comes back, and what
//! only an operator can decide is decided. Then everything must have come to an end.
//!
//! ```text
//!  rng ── net   store   guest (the truth, and copies of it)   plant
//!          └──────┴───────┴──► world ◄── moves   stream   exec   reads   faults
//!                                └──► check ──► Report { violation, trace hash }
//! ```
//!
//! What is checked: see `check`, and the places where it happens: one guest, at the holder, at a rising epoch
//! (`exec`, `store`); memory, registers and outstanding I/O at the target are what the guest left at the pause;
//! flushed writes survive (`exec`); reads return the right bytes (`reads`).
//!
//! Not here: real processes (`cargo xtask test`), sockets and files (`host`).

mod check;
mod exec;
mod faults;
mod guest;
mod moves;
mod net;
pub mod plant;
mod reads;
mod rng;
mod store;
mod stream;
mod trace;
mod world;

pub use plant::Plant;
pub use world::Tally;

use world::World;

/// What a run is made from.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// The seed.
    pub seed: u64,
    /// The planted mistake.
    pub plant: Option<Plant>,
    /// Keep the trace as text.
    pub keep_trace: bool,
}

/// How a run went.
#[derive(Clone, Debug)]
pub struct Report {
    /// The rule that was broken, if one was.
    pub violation: Option<String>,
    /// Equal for equal runs.
    pub trace_hash: u64,
    /// What the run was like.
    pub tally: Tally,
    /// The trace, if it was kept.
    pub trace: Vec<String>,
}

/// Runs a seed.
pub fn run(options: Options) -> Report {
    let mut world = World::new(options.seed, options.plant, options.keep_trace);
    world.run(check::END, World::settled);
    world.check_end();
    Report {
        violation: world.violation,
        trace_hash: world.trace.hash(),
        tally: world.tally,
        trace: world.trace.into_lines(),
    }
}

/// The one command that repeats a run.
pub fn repeat_command(seed: u64, plant: Option<Plant>) -> String {
    match plant {
        Some(plant) => format!("cargo run -p whimbrel-sim -- --seed {seed} --plant {plant}"),
        None => format!("cargo run -p whimbrel-sim -- --seed {seed}"),
    }
}

/// The first of `seeds` that breaks a rule, and which.
pub fn find(seeds: impl IntoIterator<Item = u64>, plant: Option<Plant>) -> Option<(u64, String)> {
    seeds.into_iter().find_map(|seed| {
        let report = run(Options { seed, plant, keep_trace: false });
        report.violation.map(|words| (seed, words))
    })
}
