//! The memory worker: an arena of 4 KiB pages, each a pure function of (page number, version), written in a
//! scattered order at a set rate and re-read all the time.
//!
//! ```text
//!   page = [ mark^index | version | checksum of the rest | 0 | 508 words of payload ]
//!   shadow[index] = version that must be there: exactly that, neither older (it travelled back) nor newer
//! ```
//!
//! Invariant: one thread owns a part of the arena, so a mismatch is never a race of its own.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::mpsc::Receiver;
use std::thread;
use std::time::{Duration, Instant};

use crate::config::Config;
use crate::report::{Corrupt, Counters, Order};

/// Words of 8 bytes in a page.
const WORDS: usize = 512;
const HEADER: usize = 4;
const MARK: u64 = 0x7768_696d_6272_656c;

/// One thread's part of the arena.
pub struct Worker {
    arena: Vec<u64>,
    /// Where the first page starts, so that pages of the arena are pages of the machine.
    first: usize,
    shadow: Vec<u64>,
    /// Pages that are written again.
    hot: usize,
    part: usize,
    threads: u64,
    steps: u64,
    entropy: u64,
    rate_mib_s: u64,
    writing: bool,
    write_at: usize,
    read_at: usize,
    counters: Arc<Counters>,
}

impl Worker {
    /// Takes this part's share of `config.mem_mib` and writes every page once.
    pub fn new(config: &Config, part: usize, counters: Arc<Counters>) -> Worker {
        let pages = (config.mem_mib << 8) / config.mem_threads;
        let hot = match (config.mem_hot_mib << 8) / config.mem_threads {
            0 => pages,
            hot => hot.min(pages),
        };
        let arena = vec![0u64; (pages + 1) * WORDS];
        let first = arena.as_ptr().align_offset(4096).min(WORDS);
        let mut worker = Worker {
            arena,
            first,
            shadow: vec![config.mem_steps - 1; pages],
            hot,
            part,
            threads: config.mem_threads as u64,
            steps: config.mem_steps,
            entropy: config.mem_entropy,
            rate_mib_s: config.mem_rate_mib_s,
            writing: true,
            write_at: 0,
            read_at: 0,
            counters,
        };
        for index in 0..pages {
            worker.write(index);
        }
        worker
    }

    /// Works until the program ends.
    pub fn run(mut self, orders: &Receiver<Order>) {
        self.counters.ready.fetch_add(1, Relaxed);
        let mut owed = 0f64;
        let mut last = Instant::now();
        loop {
            while let Ok(order) = orders.try_recv() {
                self.obey(&order);
            }
            let now = Instant::now();
            // A guest that was paused does not make up for it in a burst.
            let passed = now.duration_since(last).as_secs_f64().min(0.05);
            last = now;
            if self.writing {
                owed += passed * (self.rate_mib_s * 256) as f64 / self.threads as f64;
            }
            let burst = (owed as usize).min(4096);
            owed -= burst as f64;
            for _ in 0..burst {
                // Stride by a number that shares no factor with any arena size in use: scattered, yet complete.
                self.write_at = (self.write_at + 7919) % self.hot;
                let index = self.write_at;
                self.check(index);
                self.write(index);
            }
            for _ in 0..(burst / 4).clamp(32, 256) {
                self.read_at = (self.read_at + 1) % self.shadow.len();
                self.check(self.read_at);
            }
            thread::sleep(Duration::from_millis(2));
        }
    }

    fn obey(&mut self, order: &Order) {
        match order {
            Order::Writing(on) => self.writing = *on,
            Order::Rate(mib_s) => self.rate_mib_s = *mib_s,
            Order::VerifyAll(done) => {
                for index in 0..self.shadow.len() {
                    self.check(index);
                }
                let _ = done.send(());
            }
            // One thread is enough for a test of the tester.
            Order::Corrupt(Corrupt::Page) if self.part == 0 => {
                let at = self.base(self.shadow.len() / 2) + HEADER + 100;
                if let Some(word) = self.arena.get_mut(at) {
                    *word ^= 1 << 17;
                }
            }
            Order::Corrupt(Corrupt::Version) if self.part == 0 => {
                let index = self.shadow.len() / 3;
                let older = self.shadow[index];
                self.write(index);
                let newer = self.shadow[index];
                self.put(index, older);
                self.shadow[index] = newer;
            }
            Order::Corrupt(_) => {}
        }
    }

    fn base(&self, index: usize) -> usize {
        self.first + index * WORDS
    }

    /// Takes the page to its next version.
    fn write(&mut self, index: usize) {
        let version = self.shadow[index] + 1;
        if self.steps == 1 || version == self.steps {
            self.put(index, version);
        } else {
            let step = (version % self.steps) as usize;
            let (from, to) = span(step, self.steps as usize);
            self.fill(index, version, from, to);
            self.head(index, version);
        }
        self.shadow[index] = version;
        self.counters.pages_written.fetch_add(1, Relaxed);
    }

    /// Writes the whole page as it is at `version`.
    fn put(&mut self, index: usize, version: u64) {
        for step in 0..self.steps {
            let (from, to) = span(step as usize, self.steps as usize);
            self.fill(index, last_change(version, step, self.steps), from, to);
        }
        self.head(index, version);
    }

    fn fill(&mut self, index: usize, version: u64, from: usize, to: usize) {
        let base = self.base(index);
        let (number, entropy) = (self.number(index), self.entropy);
        if let Some(words) = self.arena.get_mut(base + from..base + to) {
            for (i, word) in words.iter_mut().enumerate() {
                *word = content(number, version, from + i, entropy);
            }
        }
    }

    fn head(&mut self, index: usize, version: u64) {
        let (base, number) = (self.base(index), self.number(index));
        let sum = checksum(&self.arena[base + HEADER..base + WORDS]);
        self.arena[base..base + HEADER].copy_from_slice(&[MARK ^ number, version, sum, 0]);
    }

    /// A page's number across all threads.
    fn number(&self, index: usize) -> u64 {
        ((self.part as u64) << 32) | index as u64
    }

    /// Reads the page and counts what is wrong with it; a bad page is rewritten, so it counts once.
    fn check(&mut self, index: usize) {
        self.counters.pages_verified.fetch_add(1, Relaxed);
        if let Some(fault) = self.fault(index) {
            self.counters.memory_error(&format!("memory page {index} of part {}: {fault}", self.part));
            self.put(index, self.shadow[index]);
        }
    }

    fn fault(&self, index: usize) -> Option<String> {
        let base = self.base(index);
        let page = self.arena.get(base..base + WORDS)?;
        let [mark, version, sum, ..] = *page else { return Some("cut short".to_owned()) };
        let expected = self.shadow[index];
        if mark != MARK ^ self.number(index) {
            return Some(format!("is another page or lost (mark {mark:#x})"));
        }
        if checksum(&page[HEADER..]) != sum {
            return Some(format!("content does not match its checksum at version {version}"));
        }
        if version != expected {
            let way = if version < expected { "went back" } else { "is ahead of its record" };
            return Some(format!("{way}: version {version}, expected {expected}"));
        }
        None
    }
}

/// Words `from..to` of a page that belong to change step `step`.
fn span(step: usize, steps: usize) -> (usize, usize) {
    let width = WORDS / steps;
    ((step * width).max(HEADER), (step + 1) * width)
}

/// The newest version up to `version` that rewrote `step`; every step was written at the first version.
fn last_change(version: u64, step: u64, steps: u64) -> u64 {
    let behind = (version + steps - step) % steps;
    version.saturating_sub(behind).max(steps)
}

/// Word `at` of a page: random for `entropy` percent of the words, the rest repeats.
fn content(number: u64, version: u64, at: usize, entropy: u64) -> u64 {
    let at = at as u64;
    if (at * 61) % 100 < entropy {
        let mut x = number.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ version.rotate_left(29) ^ (at << 52 | at);
        x = (x ^ (x >> 32)).wrapping_mul(0xd6e8_feb8_6659_fd93);
        x ^ (x >> 32)
    } else {
        0x6c65_7262_6d69_6877
    }
}

fn checksum(words: &[u64]) -> u64 {
    words.iter().fold(MARK, |sum, w| (sum.rotate_left(5) ^ w).wrapping_mul(0x9fb2_1c65_1e98_df25))
}

#[cfg(test)]
mod test {
    use super::*;

    fn worker(steps: u64) -> Worker {
        let config = Config { mem_mib: 1, mem_steps: steps, ..Config::default() };
        Worker::new(&config, 0, Arc::default())
    }

    fn errors_after(steps: u64, what: Corrupt) -> u64 {
        let mut w = worker(steps);
        w.obey(&Order::Corrupt(what));
        (0..w.shadow.len()).for_each(|i| w.check(i));
        // A second look must not count it again.
        (0..w.shadow.len()).for_each(|i| w.check(i));
        w.counters.mem_errors.load(Relaxed)
    }

    #[test]
    fn pages_verify_after_any_number_of_whole_or_partial_changes() {
        for steps in [1, 16] {
            let mut w = worker(steps);
            for round in 0..40 {
                (0..w.shadow.len()).filter(|i| i % 3 == round % 3).for_each(|i| w.write(i));
            }
            (0..w.shadow.len()).for_each(|i| assert_eq!(w.fault(i), None));
        }
    }

    #[test]
    fn a_partial_change_leaves_the_page_as_if_written_whole() {
        let mut w = worker(16);
        (0..23).for_each(|_| w.write(5));
        let base = w.base(5);
        let stepwise = w.arena[base..base + WORDS].to_vec();
        w.put(5, w.shadow[5]);
        assert_eq!(stepwise, w.arena[base..base + WORDS]);
    }

    #[test]
    fn a_flipped_bit_and_an_older_version_are_each_counted_once() {
        for steps in [1, 16] {
            assert_eq!(errors_after(steps, Corrupt::Page), 1);
            assert_eq!(errors_after(steps, Corrupt::Version), 1);
        }
    }

    #[test]
    fn pages_are_aligned_as_the_machine_has_them() {
        let w = worker(1);
        assert_eq!(w.arena[w.first..].as_ptr().align_offset(4096), 0);
    }
}
