//! The simulator finds nothing in a thousand seeds, and every planted mistake within a thousand.

use whimbrel_sim::{Options, Plant, Tally, find, repeat_command, run};

const SEEDS: u64 = 1_000;

/// Runs seeds without a planted mistake; all of them together must have gone through what matters.
fn nothing_breaks(first: u64, end: u64) {
    let mut sum = Tally::default();
    for seed in first..end {
        let report = run(Options { seed, plant: None, keep_trace: false });
        let words = report.violation.unwrap_or_default();
        assert!(words.is_empty(), "seed {seed}: {words}\nrepeat it with: {}", repeat_command(seed, None));
        sum.add(&report.tally);
    }
    let seen = [
        sum.commits,
        sum.undone,
        sum.recoveries,
        sum.hand_backs,
        sum.operator,
        sum.reads,
        sum.remote_reads,
        sum.pulls,
    ];
    assert!(seen.iter().all(|count| *count > 0), "too quiet to mean anything: {sum:?}");
}

#[test]
fn the_first_half_of_a_thousand_seeds_breaks_no_rule() {
    nothing_breaks(0, SEEDS / 2);
}

#[test]
fn the_second_half_of_a_thousand_seeds_breaks_no_rule() {
    nothing_breaks(SEEDS / 2, SEEDS);
}

#[test]
fn a_seed_repeats_exactly() {
    let hash = |seed| run(Options { seed, plant: None, keep_trace: false }).trace_hash;
    for seed in 0..20 {
        assert_eq!(hash(seed), hash(seed), "seed {seed}");
        assert_ne!(hash(seed), hash(seed + 1), "seed {seed}");
    }
}

#[test]
fn keeping_the_trace_does_not_change_it() {
    let with = run(Options { seed: 5, plant: None, keep_trace: true });
    let without = run(Options { seed: 5, plant: None, keep_trace: false });
    assert_eq!(with.trace_hash, without.trace_hash);
    assert!(!with.trace.is_empty() && without.trace.is_empty());
}

#[test]
fn there_are_eleven_plants_and_a_failure_names_the_command_that_repeats_it() {
    assert_eq!(Plant::ALL.len(), 11);
    for plant in Plant::ALL {
        assert_eq!(plant.as_str().parse::<Plant>(), Ok(*plant));
    }
    let command = repeat_command(7, Some(Plant::SkipLastRound));
    assert_eq!(command, "cargo run -p whimbrel-sim -- --seed 7 --plant skip-last-round");
}

/// One test per plant, so that they run side by side.
macro_rules! found {
    ($($test:ident = $plant:ident,)*) => {
        $(
            #[test]
            fn $test() {
                let Some((seed, words)) = find(0..SEEDS, Some(Plant::$plant)) else {
                    panic!("{} was not found within {SEEDS} seeds", Plant::$plant);
                };
                println!("seed {seed}: {words}\nrepeat it with: {}", repeat_command(seed, Some(Plant::$plant)));
                // It is the mistake that is found, not something else.
                assert!(find([seed], None).is_none(), "seed {seed} fails without the plant, too");
            }
        )*

        #[test]
        fn every_plant_has_a_test() {
            let tested = [$(Plant::$plant,)*];
            assert!(Plant::ALL.iter().all(|plant| tested.contains(plant)));
        }
    };
}

found! {
    skipping_the_epoch_check_is_found = SkipEpochCheck,
    committing_before_ready_is_found = CommitBeforeReady,
    dropping_page_versions_is_found = DropPageVersion,
    offering_unverified_blocks_is_found = OfferUnverifiedBlock,
    resuming_without_reading_back_is_found = ResumeWithoutReadBack,
    releasing_before_the_target_runs_is_found = ReleaseBeforeRunning,
    skipping_the_last_round_is_found = SkipLastRound,
    releasing_before_everything_was_fetched_is_found = ReleaseBeforePulled,
    forgetting_the_journal_is_found = ForgetJournal,
    accepting_a_wrong_hash_is_found = AcceptWrongHash,
    acknowledging_a_flush_early_is_found = AckFlushEarly,
}
