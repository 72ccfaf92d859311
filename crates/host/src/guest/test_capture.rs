//! Both ways of following writes, and the change between them, on memory of this process: threads play the guest.

use std::os::unix::fs::FileExt as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use whimbrel_engine::memory::page_group::{Capture as Way, GROUP_MAX_PAGES, GROUP_MIN_PAGES};

use super::calibrate::{Memory, costs, own_userfaultfd};
use super::capture::Capture;
use crate::memory::bitmap::{PAGE_BYTES, PageBitmap};

/// A generator of numbers that look random.
struct Numbers(u64);

impl Numbers {
    fn next(&mut self, below: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % below
    }
}

/// How a thread writes.
#[derive(Clone, Copy, Debug)]
enum Pattern {
    /// One page after the other, round and round.
    Sequential,
    /// Pages anywhere.
    Random,
    /// Runs of pages anywhere.
    Runs,
}

/// Threads that write to memory until they are told to stop.
struct Guest {
    memory: Arc<Memory>,
    pages: u64,
    stop: Arc<AtomicBool>,
    writes: Arc<AtomicU64>,
    threads: Vec<std::thread::JoinHandle<()>>,
}

impl Guest {
    fn start(pages: u64, patterns: &[Pattern]) -> Self {
        let memory = Arc::new(Memory::new(pages).unwrap());
        (0..pages).for_each(|page| memory.write(page, 1));
        let (stop, writes) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let threads = patterns.iter().zip(1u64..).map(|(pattern, seed)| {
            let (memory, stop, writes) = (Arc::clone(&memory), Arc::clone(&stop), Arc::clone(&writes));
            let pattern = *pattern;
            std::thread::spawn(move || {
                let (mut numbers, mut at, mut value) = (Numbers(seed), 0, seed << 32);
                while !stop.load(Ordering::Relaxed) {
                    at = match pattern {
                        Pattern::Sequential => (at + 1) % pages,
                        Pattern::Runs if value % 64 != 0 => (at + 1) % pages,
                        Pattern::Random | Pattern::Runs => numbers.next(pages),
                    };
                    value += 1;
                    memory.write(at, value);
                    writes.fetch_add(1, Ordering::Relaxed);
                }
            })
        });
        Self { threads: threads.collect(), memory: Arc::clone(&memory), pages, stop, writes }
    }

    fn follow(&self, way: Way) -> Capture {
        let mapping = self.memory.mapping();
        Capture::attach(way, std::process::id(), own_userfaultfd().unwrap(), &self.memory.file, &[mapping])
            .unwrap()
    }

    fn copy(&self, dirty: &mut PageBitmap, image: &mut [u8]) {
        for range in dirty.take().iter_ranges() {
            let (start, end) = (range.start as usize * PAGE_BYTES, range.end as usize * PAGE_BYTES);
            self.memory.file.read_exact_at(&mut image[start..end], start as u64).unwrap();
        }
    }

    fn pause(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        self.threads.drain(..).for_each(|thread| thread.join().unwrap());
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        self.pause();
    }
}

/// Copies memory in rounds, changing the way before those rounds for which `changes` says so.
fn copied(first: Way, rounds: u32, changes: impl Fn(u32) -> bool) {
    let pages = 12_000;
    let mut guest = Guest::start(pages, &[Pattern::Runs, Pattern::Random]);
    let mut capture = guest.follow(first);
    let (mut dirty, mut image) = (PageBitmap::new(pages), vec![0; pages as usize * PAGE_BYTES]);
    for round in 0..rounds {
        capture.scan(&mut dirty).unwrap();
        if round == 0 {
            assert_eq!(dirty.count(), pages, "the first scan gives everything");
        }
        guest.copy(&mut dirty, &mut image);
        if changes(round) {
            let before = capture.way();
            capture.switch(own_userfaultfd().unwrap(), &mut dirty).unwrap();
            assert_ne!(capture.way(), before);
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    guest.pause();
    capture.scan(&mut dirty).unwrap();
    guest.copy(&mut dirty, &mut image);
    let mut real = vec![0; image.len()];
    guest.memory.file.read_exact_at(&mut real, 0).unwrap();
    println!(
        "{first:?}: {} writes, {:?}, {:?}",
        guest.writes.load(Ordering::Relaxed),
        capture.faults(),
        capture.switches()
    );
    assert!(image == real, "a written page was missed");
    capture.detach().unwrap();
    // Nothing is left behind: another tracker can be begun, in either way.
    guest.follow(Way::Groups).detach().unwrap();
    guest.follow(Way::Pages).detach().unwrap();
}

#[test]
fn no_write_is_missed_in_groups() {
    copied(Way::Groups, 30, |_| false);
}

#[test]
fn no_write_is_missed_while_the_way_changes() {
    copied(Way::Pages, 30, |round| round % 3 == 2);
    copied(Way::Groups, 30, |round| round % 4 == 1);
}

#[test]
fn a_change_makes_nothing_dirty_that_was_not_written() {
    let guest = Guest::start(5000, &[]);
    let mut capture = guest.follow(Way::Pages);
    let mut dirty = PageBitmap::new(guest.pages);
    capture.scan(&mut dirty).unwrap();
    dirty.clear();
    for way in [Way::Groups, Way::Pages, Way::Groups] {
        capture.switch(own_userfaultfd().unwrap(), &mut dirty).unwrap();
        assert_eq!((capture.way(), dirty.count()), (way, 0));
        // From the first write on after it.
        guest.memory.write(1234, way as u64 + 10);
        capture.scan(&mut dirty).unwrap();
        assert!(dirty.contains(1234) && dirty.count() <= GROUP_MAX_PAGES, "{dirty:?}");
        dirty.clear();
    }
    assert_eq!(capture.switches().unseen_pages, 0);
}

#[test]
fn a_tracker_that_is_dropped_in_the_middle_of_faults_lets_the_guest_go_on() {
    let guest = Guest::start(4096, &[Pattern::Random, Pattern::Sequential]);
    for way in [Way::Groups, Way::Pages, Way::Groups] {
        let capture = guest.follow(way);
        std::thread::sleep(Duration::from_millis(5));
        drop(capture);
        let before = guest.writes.load(Ordering::Relaxed);
        std::thread::sleep(Duration::from_millis(20));
        assert!(guest.writes.load(Ordering::Relaxed) > before + 1000, "{way:?}: the guest stands still");
    }
}

#[test]
fn groups_grow_for_a_guest_that_fills_memory_and_shrink_for_one_that_jumps() {
    let size_for = |pattern| {
        // Slow enough that memory is not written all over between two scans.
        let pages = 1 << 16;
        let mut guest = Guest::start(pages, &[]);
        let mut capture = guest.follow(Way::Groups);
        let mut dirty = PageBitmap::new(pages);
        capture.scan(&mut dirty).unwrap();
        let (mut numbers, mut at) = (Numbers(7), 0);
        for value in 2..40 {
            for _ in 0..1500 {
                at = match pattern {
                    Pattern::Sequential => (at + 1) % pages,
                    _ => numbers.next(pages),
                };
                guest.memory.write(at, value);
            }
            capture.scan(&mut dirty).unwrap();
            dirty.clear();
        }
        guest.pause();
        capture.faults()
    };
    let (filling, jumping) = (size_for(Pattern::Sequential), size_for(Pattern::Random));
    println!("filling {filling:?}; jumping {jumping:?}");
    assert_eq!(filling.group_pages, GROUP_MAX_PAGES, "{filling:?}");
    assert_eq!(jumping.group_pages, GROUP_MIN_PAGES, "{jumping:?}");
    assert!(filling.faults * 10 < jumping.faults, "one fault for many pages");
    assert!(filling.unchanged_pages * 4 < filling.sampled_pages, "{filling:?}");
}

/// Prints the table of `docs/memory.md` on what following writes costs whoever writes:
/// `cargo test -p whimbrel-host --lib what_following_writes_costs -- --ignored --nocapture`.
#[test]
#[ignore = "a measurement"]
fn what_following_writes_costs() {
    println!("one armed page, one served fault, one opened page, ns: {:?}", costs().unwrap());
    println!("| writes | followed | million writes/s | of unfollowed | faults/GiB | wasted re-sends |");
    for pattern in [Pattern::Sequential, Pattern::Runs, Pattern::Random] {
        let mut alone = 0.0;
        for way in [None, Some(Way::Pages), Some(Way::Groups)] {
            let guest = Guest::start(1 << 17, &[pattern]);
            let mut capture = way.map(|way| guest.follow(way));
            let (mut dirty, mut resent, mut first) = (PageBitmap::new(guest.pages), 0, true);
            let (mut started, mut before) = (Instant::now(), 0);
            while first || started.elapsed() < Duration::from_secs(4) {
                if let Some(capture) = &mut capture {
                    capture.scan(&mut dirty).unwrap();
                    resent += if first { 0 } else { dirty.count() };
                    dirty.clear();
                }
                if first {
                    (started, before) = (Instant::now(), guest.writes.load(Ordering::Relaxed));
                    first = false;
                }
                std::thread::sleep(Duration::from_millis(100));
            }
            let writes = guest.writes.load(Ordering::Relaxed) - before;
            let rate = writes as f64 / started.elapsed().as_secs_f64() / 1e6;
            alone = if way.is_none() { rate } else { alone };
            let faults = capture.as_ref().map(Capture::faults).unwrap_or_default();
            let (count, waste) = match way {
                Some(Way::Groups) => {
                    let share = faults.unchanged_pages as f64 / faults.sampled_pages.max(1) as f64;
                    (faults.faults, share)
                }
                _ => (resent, 0.0),
            };
            println!(
                "| {pattern:?} | {way:?} | {rate:.2} | {:.2} | {:.0} | {:.0} % (groups of {}) |",
                rate / alone,
                count as f64 / (resent.max(1) as f64 / 262_144.0),
                waste * 100.0,
                faults.group_pages
            );
        }
    }
}
