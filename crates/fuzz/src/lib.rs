//! Fuzzing of decoders as ordinary tests: a few thousand inputs in every test run, minutes with coverage in a long one.
//!
//! ```text
//!   fuzz! { fn frames(bytes) seeds [b"…"] { decode(bytes); } }        in the module whose private decoder it calls
//!
//!   seeds ─▶ corpus ─▶ pick, mutate ─▶ run ─┬─ panic, hang, huge allocation ─▶ shrink ─▶ fail with the command
//!              ▲                            │                                           that repeats it
//!              └── reached something new ◄──┘ (only where the code is instrumented)
//! ```
//!
//! Why not cargo-fuzz, AFL or honggfuzz: they want a nightly compiler, a C++ compiler or programs that the machine does
//! not have, and targets outside the crate, which private decoders would have to be opened for. What makes a fuzzer find
//! things is feedback, and stable rustc gives that: `-Cpasses=sancov-module` counts edges (`coverage`), and
//! `cargo xtask test --long` turns it on for our own crates through `RUSTC_WORKSPACE_WRAPPER`, so that dependencies are
//! not built again. Without it the same targets run as plain mutation tests.
//!
//! | variable | meaning |
//! |---|---|
//! | `WHIMBREL_FUZZ_S` | seconds per target, from a fresh seed, instead of a fixed number of inputs from a fixed one |
//! | `WHIMBREL_FUZZ_INPUT` | run this one input: a file, or `hex:…` |
//! | `WHIMBREL_FUZZ_DIR` | corpora that outlive the run, one directory per target |
//!
//! Invariant: a target is a function of its bytes; it panics exactly when the code under test is wrong.
//!
//! Not here: what is decoded (the `fuzz` modules of the other crates), faults over time (`crates/sim`).

mod corpus;
mod coverage;
mod guard;
mod mutate;
mod rng;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use corpus::Corpus;
use guard::Guard;
use rng::Rng;

/// Inputs per target in an ordinary run; no longer than [`SMOKE_LIMIT`].
const SMOKE_INPUTS: u64 = 10_000;
const SMOKE_LIMIT: Duration = Duration::from_secs(1);
/// Inputs grow to this length.
const LENGTH_MAX: usize = 16 << 10;
/// An input that takes longer hangs.
const HANG: Duration = Duration::from_secs(10);
/// More memory than this at once for at most [`LENGTH_MAX`] bytes of input is wrong.
const MEMORY_MAX: usize = 256 << 20;
/// Runs spent on making a failing input shorter.
const SHRINK_RUNS: u32 = 3_000;

/// Stands for the input in a command.
const INPUT: &str = "{input}";

fn hex(input: &[u8]) -> String {
    input.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// A test that fuzzes.
///
/// ```
/// whimbrel_fuzz::fuzz! {
///     fn numbers(bytes) seeds [b"42", b"-7"] {
///         let _ = std::str::from_utf8(bytes).map(str::parse::<u64>);
///     }
/// }
/// ```
#[macro_export]
macro_rules! fuzz {
    ($($(#[doc = $doc:literal])* fn $name:ident($bytes:ident) seeds [$($seed:expr),* $(,)?] $body:block)+) => {$(
        $(#[doc = $doc])*
        #[test]
        fn $name() {
            let seeds: Vec<Vec<u8>> = vec![$(AsRef::<[u8]>::as_ref(&$seed).to_vec()),*];
            let at = concat!(module_path!(), "::", stringify!($name));
            $crate::run(env!("CARGO_PKG_NAME"), at, seeds, |$bytes: &[u8]| $body);
        }
    )+};
}

/// Names of the target and of the package it is in.
#[derive(Clone, Copy)]
struct Place<'a> {
    package: &'a str,
    /// With the crate's name in front, as `module_path!` gives it.
    at: &'a str,
}

impl Place<'_> {
    /// The test's name for cargo.
    fn test(&self) -> &str {
        self.at.split_once("::").map_or(self.at, |(_, rest)| rest)
    }

    /// What to type to run an input again, with [`INPUT`] in its place.
    fn command(&self) -> String {
        let (package, test) = (self.package, self.test());
        format!("WHIMBREL_FUZZ_INPUT=hex:{INPUT} cargo test -p {package} {test} -- --exact")
    }
}

/// Runs a target; what [`fuzz!`] calls. Panics when the target does.
pub fn run(package: &str, at: &str, seeds: Vec<Vec<u8>>, target: impl Fn(&[u8])) {
    let place = Place { package, at };
    if let Some(input) = std::env::var_os("WHIMBREL_FUZZ_INPUT") {
        target(&read_input(&input.to_string_lossy()));
        return;
    }
    let seconds = std::env::var("WHIMBREL_FUZZ_S").ok().and_then(|s| s.parse::<u64>().ok());
    let (inputs, limit) = match seconds {
        Some(seconds) => (u64::MAX, Duration::from_secs(seconds)),
        None => (SMOKE_INPUTS, SMOKE_LIMIT),
    };
    let fresh = if seconds.is_some() { rng::seed_of_the_clock() } else { 0 };
    let mut rng = Rng::new(fresh ^ rng::hash(at.as_bytes()));
    let dir = std::env::var_os("WHIMBREL_FUZZ_DIR").map(|dir| PathBuf::from(dir).join(at.replace("::", ".")));
    let guard = Guard::new(place.command());
    let mut corpus = Corpus::new(seeds, dir);
    let mut attempt = |input: &[u8]| attempt(&guard, &target, input);
    for input in corpus.inputs() {
        settle(&mut attempt, place, &input);
        coverage::take_new();
    }
    let started = Instant::now();
    let mut count = 0;
    while count < inputs && started.elapsed() < limit {
        let input = mutate::mutate(corpus.pick(&mut rng), &corpus, &mut rng, LENGTH_MAX);
        settle(&mut attempt, place, &input);
        if coverage::take_new() {
            corpus.add(input);
        }
        count += 1;
    }
    if seconds.is_some() {
        let feedback = if coverage::is_on() { "with coverage" } else { "without coverage" };
        println!("fuzz {at}: {count} inputs {feedback}, {} in the corpus", corpus.len());
    }
}

/// Runs one input; what went wrong, if anything did.
fn attempt(guard: &Guard, target: &impl Fn(&[u8]), input: &[u8]) -> Option<String> {
    guard.start(input);
    let outcome = catch_unwind(AssertUnwindSafe(|| target(input)));
    let peak = guard.end();
    match outcome {
        Err(panic) => Some(guard::words_of(panic.as_ref())),
        Ok(()) if peak > MEMORY_MAX => Some(format!("it took {peak} bytes of memory at once")),
        Ok(()) => None,
    }
}

/// Fails with the shortest input that still fails, if this one does.
fn settle(attempt: &mut impl FnMut(&[u8]) -> Option<String>, place: Place<'_>, input: &[u8]) {
    let Some(mut said) = attempt(input) else { return };
    let mut worst = input.to_vec();
    let mut runs = 0;
    let mut chunk = worst.len().div_ceil(2);
    while chunk > 0 && runs < SHRINK_RUNS {
        let mut at = 0;
        while at < worst.len() && runs < SHRINK_RUNS {
            let mut shorter = worst.clone();
            shorter.drain(at..(at + chunk).min(worst.len()));
            runs += 1;
            if let Some(again) = attempt(&shorter) {
                (worst, said) = (shorter, again);
            } else {
                at += chunk;
            }
        }
        chunk /= 2;
    }
    panic!("{}: {said}\nto repeat it:\n  {}", place.at, place.command().replace(INPUT, &hex(&worst)));
}

fn read_input(given: &str) -> Vec<u8> {
    if let Some(hex) = given.strip_prefix("hex:") {
        let pair = |at: usize| hex.get(at..at + 2).and_then(|two| u8::from_str_radix(two, 16).ok());
        return (0..hex.len() / 2)
            .map(|n| pair(2 * n).unwrap_or_else(|| panic!("{hex:?} is not hex")))
            .collect();
    }
    std::fs::read(given).unwrap_or_else(|error| panic!("read the input {given}: {error}"))
}

#[cfg(test)]
mod test {
    use super::*;

    fn fails(target: impl Fn(&[u8])) -> Option<String> {
        let seeds = vec![b"length 0001, body x".to_vec()];
        let run = || run("p", "crate::module::name", seeds, target);
        catch_unwind(AssertUnwindSafe(run)).err().map(|panic| guard::words_of(panic.as_ref()))
    }

    #[test]
    fn a_planted_defect_is_found_shrunk_and_told_with_its_command() {
        let said = fails(|bytes| {
            let digits = bytes.windows(2).any(|two| two == b"99");
            assert!(!digits || bytes.len() < 4, "two nines");
        });
        let said = said.expect("ten thousand inputs hold two nines");
        assert!(said.contains("two nines"), "{said}");
        let hex = said.split("hex:").nth(1).and_then(|rest| rest.split(' ').next()).expect("a command");
        assert_eq!(hex.len(), 8, "shrunk to four bytes: {said}");
        assert!(said.contains("cargo test -p p module::name -- --exact"), "{said}");
    }

    #[test]
    fn a_length_that_is_believed_is_found() {
        let said = fails(|bytes| {
            let length = bytes.first_chunk::<4>().map_or(0, |four| u32::from_le_bytes(*four)) as usize;
            std::hint::black_box(Vec::<u8>::with_capacity(length.min(900 << 20)));
        });
        assert!(said.expect("a large length").contains("bytes of memory at once"));
    }

    #[test]
    fn a_sound_target_passes() {
        assert_eq!(fails(|bytes| assert!(bytes.len() <= LENGTH_MAX)), None);
    }
}
