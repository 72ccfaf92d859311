//! Everything that takes part in a move is killed, at every step of it, and either comes back after two seconds or
//! never does. Afterwards the VM runs exactly once, with all that it was told is safe.
//!
//! ```text
//!   h1 keeps the metadata, h2 and h3 move the VM; both agents read their fail point from a file
//!   arm a step ─▶ move ─▶ at the step: strike ─┬─ 2 s ────────────────────────────────────────┬▶ mend ─▶ settled?
//!                                              └─ for good: what is the case now? [recover] ──┘     verify
//! ```
//!
//! One guest goes from case to case; another is booted only where the case loses it, or has gone wrong.
//!
//! Not here: what a case does ([`case`]), what must come of it ([`expect`]), far more orders of events (`crates/sim`).

mod case;
mod expect;
mod world;

use std::collections::BTreeMap;
use std::fs;
use std::time::Instant;

use anyhow::{Context as _, Result, bail, ensure};

use super::Context;
use crate::paths;
use world::World;

/// Only cases whose words contain one of these, separated by semicolons.
const ONLY: &str = "WHIMBREL_KILL_ONLY";

/// What is struck.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Victim {
    SourceAgent,
    TargetAgent,
    TargetQemu,
    /// Silence between source and target; both reach the store.
    Connection,
    /// Every connection between the two is reset, and may be made again.
    Reset,
    /// The source's whole network: neither target nor store.
    SourceNetwork,
    /// The store; source and target hear each other.
    Metadata,
}

impl Victim {
    const ALL: [Victim; 7] = [
        Victim::SourceAgent,
        Victim::TargetAgent,
        Victim::TargetQemu,
        Victim::Connection,
        Victim::Reset,
        Victim::SourceNetwork,
        Victim::Metadata,
    ];

    fn name(self) -> &'static str {
        match self {
            Victim::SourceAgent => "source agent",
            Victim::TargetAgent => "target agent",
            Victim::TargetQemu => "target QEMU",
            Victim::Connection => "connection",
            Victim::Reset => "connection reset",
            Victim::SourceNetwork => "source network",
            Victim::Metadata => "metadata store",
        }
    }

    /// Whose step is waited for.
    fn side(self) -> &'static str {
        match self {
            Victim::TargetAgent | Victim::TargetQemu => "target",
            Victim::SourceAgent
            | Victim::Connection
            | Victim::Reset
            | Victim::SourceNetwork
            | Victim::Metadata => "source",
        }
    }
}

/// One case.
#[derive(Clone, Debug)]
struct Case {
    step: String,
    victim: Victim,
    comes_back: bool,
    mode: &'static str,
}

impl Case {
    fn words(&self) -> String {
        let back = if self.comes_back { "back after 2 s" } else { "never back" };
        format!("{} killed at {}, {back}", self.victim.name(), self.step)
    }

    fn is(&self, steps: &[&str]) -> bool {
        steps.contains(&self.step.as_str())
    }
}

/// What every run tries: each victim where it tells most. Steps, with and without way back.
const TELLING: [(Victim, &[&str], &[&str]); 7] = [
    (Victim::SourceAgent, &["last-round", "release"], &["copy", "commit"]),
    (Victim::TargetAgent, &["device-state", "commit"], &["verify", "resume"]),
    (Victim::TargetQemu, &[], &["copy", "verify", "commit", "announce"]),
    (Victim::Connection, &["resume"], &["last-round", "commit"]),
    (Victim::Reset, &["copy"], &[]),
    (Victim::SourceNetwork, &[], &["commit"]),
    (Victim::Metadata, &["resume"], &["copy", "commit"]),
];

/// Names of the handover's steps, in order, read where they are defined.
fn steps() -> Result<Vec<String>> {
    let path = paths::workspace().join("crates/wire/src/peer/migrate.rs");
    let text = fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
    let body = text.split("\nsteps! {").nth(1).and_then(|b| b.split("\n}").next());
    let names: Vec<String> = body
        .context("find the handover's steps")?
        .lines()
        .filter_map(|l| Some(l.trim().strip_suffix("\",")?.split_once(" = \"")?.1.to_owned()))
        .collect();
    ensure!(names.len() >= 8, "only {} steps found in {}", names.len(), path.display());
    Ok(names)
}

fn cases(long: bool, mode: &'static str) -> Result<Vec<Case>> {
    let mut cases = Vec::new();
    for step in steps()? {
        for victim in Victim::ALL {
            for comes_back in [true, false] {
                let case = Case { step: step.clone(), victim, comes_back, mode };
                let exists = match victim {
                    // It is over at once.
                    Victim::Reset => comes_back,
                    // It is not there before the offer has been taken.
                    Victim::TargetQemu => step != "negotiate",
                    _ => true,
                };
                let tells = TELLING
                    .iter()
                    .any(|(v, back, never)| *v == victim && case.is(if comes_back { back } else { never }));
                if exists && (long || tells) {
                    cases.push(case);
                }
            }
        }
    }
    if !long {
        // Each mode has its own half, so that all are tried once.
        let mut mine = mode == "b";
        cases.retain(|_| {
            mine = !mine;
            mine
        });
    }
    if let Ok(only) = std::env::var(ONLY) {
        cases.retain(|case| only.split(';').any(|words| case.words().contains(words)));
    }
    Ok(cases)
}

/// Every other telling case in mode A on the newer QEMU, the rest in mode B on the older one; all steps and victims, in
/// both modes and on both versions, with `--long`.
pub fn in_mode_a(c: &Context<'_>) -> Result<()> {
    if !c.long && c.lab.qemu.version != crate::qemu::Version::V10_0 {
        println!("       left to QEMU 10.0, and to --long");
        return Ok(());
    }
    run(c, "a")
}

/// See [`in_mode_a`].
pub fn in_mode_b(c: &Context<'_>) -> Result<()> {
    if !c.long && c.lab.qemu.version != crate::qemu::Version::V7_2 {
        println!("       left to QEMU 7.2, and to --long");
        return Ok(());
    }
    run(c, "b")
}

fn run(c: &Context<'_>, mode: &'static str) -> Result<()> {
    let mut world = World::new(c, mode)?;
    if mode == "a" && !world.has_mode_a()? {
        println!("       mode A is not possible on this machine, so not tried");
        return world.leave();
    }
    let (mut table, mut wrong) = (Table::default(), Vec::new());
    for case in cases(c.long, mode)? {
        let started = Instant::now();
        let result = case::run(&mut world, &case);
        let took = started.elapsed().as_secs_f64();
        match result {
            Ok(verdict) => {
                println!("       {took:>5.1} s  {}: {verdict}", case.words());
                table.add(&case, verdict.short());
            }
            Err(e) => {
                println!("       {took:>5.1} s  {}: WRONG: {e:#}", case.words());
                world.tell();
                table.add(&case, "WRONG".to_owned());
                wrong.push(case.words());
                world.anew()?;
            }
        }
    }
    table.print();
    println!("       {} cases in mode {mode}, {} wrong", table.count, wrong.len());
    if !wrong.is_empty() {
        let repeat = format!(
            "{ONLY}='{}' cargo xtask e2e --long --qemu {} 'mode {}'",
            wrong.join(";"),
            c.lab.qemu.version.name(),
            mode.to_uppercase()
        );
        bail!("{} of {} cases went wrong; to repeat them: {repeat}", wrong.len(), table.count);
    }
    world.leave()
}

/// Verdicts by step and victim.
#[derive(Default)]
struct Table {
    cells: BTreeMap<(usize, Victim, bool), String>,
    steps: Vec<String>,
    count: usize,
}

impl Table {
    fn add(&mut self, case: &Case, verdict: String) {
        let known = self.steps.iter().position(|s| *s == case.step);
        let row = known.unwrap_or_else(|| {
            self.steps.push(case.step.clone());
            self.steps.len() - 1
        });
        self.count += 1;
        self.cells.insert((row, case.victim, case.comes_back), verdict);
    }

    /// One line per step: for each victim what came of it with and without way back.
    fn print(&self) {
        let line = |name: &str, cells: &mut dyn Iterator<Item = String>| {
            let cells: Vec<String> = cells.map(|cell| format!("{cell:<21}")).collect();
            println!("       {name:<13}{}", cells.concat().trim_end());
        };
        println!("       runs at S(ource) or T(arget), crashed; silence in ms: back after 2 s / never back");
        line("", &mut Victim::ALL.iter().map(|v| v.name().to_owned()));
        for (row, step) in self.steps.iter().enumerate() {
            let cell = |victim, back| self.cells.get(&(row, victim, back)).map_or("–", String::as_str);
            let both = |victim: &Victim| format!("{} / {}", cell(*victim, true), cell(*victim, false));
            line(step, &mut Victim::ALL.iter().map(both));
        }
    }
}

#[cfg(test)]
mod test {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn the_steps_of_the_handover_are_found_and_every_victim_has_all_of_them() {
        let steps = steps().unwrap();
        assert!(steps.iter().any(|s| s == "commit"), "{steps:?}");
        assert_eq!(steps.first().map(String::as_str), Some("negotiate"));
        let all = cases(true, "a").unwrap();
        assert_eq!(all.len(), steps.len() * (2 * Victim::ALL.len() - 1) - 2);
        let words = |mode| cases(false, mode).unwrap().iter().map(Case::words).collect::<BTreeSet<_>>();
        let telling: BTreeSet<String> = words("a").union(&words("b")).cloned().collect();
        assert!(words("a").is_disjoint(&words("b")), "each is tried once");
        let named: usize = TELLING.iter().map(|(_, back, never)| back.len() + never.len()).sum();
        assert_eq!(telling.len(), named, "a step of the chosen cases has another name");
    }
}
