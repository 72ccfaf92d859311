//! How a block travels: raw or compressed, and how hard; decided per block while the move runs (capability 3).
//!
//! Three tests, in this order:
//!
//! ```text
//!  A  do no harm   are processors spare beyond a reserve?                     no → raw (Vetoed)
//!  B  network      does any level get bytes across sooner than sending raw?   no → raw (LinkIsFaster)
//!  C  this block   does the sample promise that compressing it beats          no → raw (Incompressible)
//!                  sending it?
//!                                                                            yes → Compress(level)
//! ```
//!
//! "Raw" is what costs next to nothing: the bytes as they are, or (memory) without their frequent words. Its own ratio
//! is observed like that of a level.
//!
//! Tests A and B look at the whole pipeline: encoding workers and the link run side by side, so a choice moves
//! `min(compress rate × spare processors, link rate / ratio)` raw bytes per second, and sending raw
//! `min(gather rate × processors, link rate / ratio)`. The best rate counts; of those that give up at most a quarter
//! of it the one with the fewest bytes wins: what a move does not put on a wire others have.
//! They are re-read once per window and change only after two windows agree, so that one late sample does not
//! flip the default. Test C is made for every block.
//!
//! Where the link is faster, a block that promises to shrink to [`BARGAIN_RATIO`] is compressed all the same, with a
//! fast level: what it saves need not be encrypted, sent and received.
//!
//! Invariants: a pure function of what was observed; zero blocks never come here (they have no payload).
//!
//! Not here: codecs, sampling, clocks (`host::codec`, `host::memory::source`).

/// The zstd levels that the choice is made from, fastest first.
pub const LEVELS: [i32; 4] = [-5, -1, 1, 3];

/// A compressed block is sent only if it is at most this share of the original; else raw.
pub const RATIO_MAX: f64 = 0.95;

/// A block of which a sample shrinks to this share is compressed whatever the link's speed. Measured over TLS on
/// loopback: reading a byte costs 0.4 ns, having it on the wire both ends together 3, the level of bargains and its undoing
/// 1.5. At a half that comes to the same, at 0.85 it takes a quarter longer: what is given up for fewer bytes elsewhere
/// too. Samples promise a little less than the whole keeps.
pub const BARGAIN_RATIO: f64 = 0.9;
/// The level of bargains: it costs a quarter more than the fastest and gives as much less.
const BARGAIN_LEVEL: i32 = LEVELS[1];

/// What is known of the levels before anything was measured: raw bytes per second of one processor, wire bytes
/// per raw byte. Measured on the memory of a Debian guest; only the proportions matter for long.
const PRIOR: [(f64, f64); LEVELS.len()] = [(1.0e9, 0.48), (8.0e8, 0.39), (7.0e8, 0.36), (4.2e8, 0.355)];
/// Raw bytes per second that one processor gathers and checks, before anything was measured.
const PRIOR_GATHER_BYTES_S: f64 = 3.0e9;
/// Choices within this factor of the best rate compete by their bytes.
const NEAR: f64 = 0.75;
/// What is left of older observations after each window.
const KEEP: f64 = 0.7;

/// Amount per cost, over recent windows. A burst into an empty socket buffer costs almost no time and so weighs
/// almost nothing, which a mean of rates would not give.
#[derive(Clone, Copy, Debug, Default)]
struct Quotient {
    amount: f64,
    cost: f64,
}

impl Quotient {
    fn add(&mut self, amount: f64, cost: f64) {
        if amount >= 0.0 && cost > 0.0 {
            self.amount += amount;
            self.cost += cost;
        }
    }

    fn age(&mut self) {
        // Kept from vanishing: an old observation is better than none.
        if self.cost > 1e-6 {
            self.amount *= KEEP;
            self.cost *= KEEP;
        }
    }

    fn get(&self) -> Option<f64> {
        (self.cost > 0.0).then(|| self.amount / self.cost)
    }
}

/// What blocks are sent as by default.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Choice {
    /// As they are, for the given reason.
    Raw(Reason),
    /// Compressed with the level of [`LEVELS`] at this index.
    Level(usize),
}

/// Why a block is sent as it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// Test A: no processor to spare.
    Vetoed,
    /// Test B: the link takes raw bytes faster than they can be compressed, or its rate is not known yet.
    LinkIsFaster,
    /// Test C: compressing this block would not pay.
    Incompressible,
}

/// What one block is sent as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// As it is.
    Raw(Reason),
    /// Compressed with this zstd level.
    Compress {
        /// An element of [`LEVELS`].
        level: i32,
    },
}

/// The state of the choice for one move. See the module.
#[derive(Clone, Debug)]
pub struct Chooser {
    workers: f64,
    reserve_cores: f64,
    link_bytes_s: Quotient,
    spare_cores: Quotient,
    gather_bytes_s: Quotient,
    plain_ratio: Quotient,
    rate: [Quotient; LEVELS.len()],
    ratio: [Quotient; LEVELS.len()],
    choice: Choice,
    raw_only: bool,
    /// What the last window wanted instead.
    wanted: Choice,
}

impl Chooser {
    /// Starts with raw, until the link has been measured. `cores` is the machine's number of processors, of which
    /// a twentieth stays reserved for others; `workers` encode at once.
    pub fn new(cores: u32, workers: u32) -> Self {
        let choice = Choice::Raw(Reason::LinkIsFaster);
        Self {
            workers: f64::from(workers.max(1)),
            reserve_cores: 0.05 * f64::from(cores.max(1)),
            link_bytes_s: Quotient::default(),
            spare_cores: Quotient::default(),
            gather_bytes_s: Quotient::default(),
            plain_ratio: Quotient::default(),
            rate: Default::default(),
            ratio: Default::default(),
            choice,
            raw_only: false,
            wanted: choice,
        }
    }

    /// Never compresses (for measurements).
    pub fn raw_only(self) -> Self {
        Self { raw_only: true, ..self }
    }

    /// `wire_bytes` went out in `busy_s` seconds in which the link always had something to send.
    pub fn observe_link(&mut self, wire_bytes: u64, busy_s: f64) {
        self.link_bytes_s.add(wire_bytes as f64, busy_s);
    }

    /// For `seconds`, so many processors were idle, or busy with encoding for this move.
    pub fn observe_spare_cores(&mut self, cores: f64, seconds: f64) {
        self.spare_cores.add(cores * seconds, seconds);
    }

    /// Reading and checking `raw_bytes` took `cpu_s` seconds of one processor.
    pub fn observe_gather(&mut self, raw_bytes: u64, cpu_s: f64) {
        self.gather_bytes_s.add(raw_bytes as f64, cpu_s);
    }

    /// Uncompressed, `raw_bytes` are `plain_bytes`.
    pub fn observe_plain(&mut self, raw_bytes: u64, plain_bytes: u64) {
        self.plain_ratio.add(plain_bytes as f64, raw_bytes as f64);
    }

    /// Compressing `raw_bytes` to `wire_bytes` with `level`, those included that test C spared, took `cpu_s` seconds of one processor.
    pub fn observe_compress(&mut self, level: i32, raw_bytes: u64, wire_bytes: u64, cpu_s: f64) {
        let index = LEVELS.iter().position(|known| *known == level);
        let Some(index) = index else { return };
        if let (Some(rate), Some(ratio)) = (self.rate.get_mut(index), self.ratio.get_mut(index)) {
            rate.add(raw_bytes as f64, cpu_s);
            ratio.add(wire_bytes as f64, raw_bytes as f64);
        }
    }

    /// Ends a window: repeats tests A and B.
    pub fn end_window(&mut self) {
        let wanted = if self.raw_only { self.choice } else { self.best() };
        if wanted == self.wanted {
            self.choice = wanted;
        }
        self.wanted = wanted;
        let single =
            [&mut self.link_bytes_s, &mut self.spare_cores, &mut self.gather_bytes_s, &mut self.plain_ratio];
        for quotient in single.into_iter().chain(&mut self.rate).chain(&mut self.ratio) {
            quotient.age();
        }
    }

    /// Wire bytes per second that the link takes, if that has been measured.
    pub fn link_bytes_s(&self) -> Option<f64> {
        self.link_bytes_s.get()
    }

    /// The default as it stands.
    pub fn choice(&self) -> Choice {
        self.choice
    }

    /// Test C for one block: `sample_ratio` is what a small sample of it compressed to.
    pub fn decide(&self, sample_ratio: f64) -> Verdict {
        let index = match self.choice {
            Choice::Raw(reason) => return Verdict::Raw(reason),
            Choice::Level(index) => index,
        };
        let link = self.link_bytes_s.get().unwrap_or(f64::INFINITY);
        let (rate, _) = self.expect(index);
        let pays = (1.0 / (rate * self.usable_cores())).max(sample_ratio / link) < 1.0 / link;
        match LEVELS.get(index) {
            Some(level) if pays && sample_ratio < RATIO_MAX => Verdict::Compress { level: *level },
            _ => Verdict::Raw(Reason::Incompressible),
        }
    }

    /// Whether a sample is worth taking of blocks that are sent raw by default.
    pub fn bargains(&self) -> bool {
        self.choice == Choice::Raw(Reason::LinkIsFaster) && !self.raw_only
    }

    /// Test C for one block that is sent raw by default.
    pub fn decide_bargain(&self, sample_ratio: f64) -> Verdict {
        if self.bargains() && sample_ratio <= BARGAIN_RATIO {
            return Verdict::Compress { level: BARGAIN_LEVEL };
        }
        self.decide(sample_ratio)
    }

    /// Wire bytes per raw byte that the default is expected to give.
    pub fn expected_ratio(&self) -> f64 {
        match self.choice {
            Choice::Raw(_) => self.plain_ratio(),
            Choice::Level(index) => self.expect(index).1.min(1.0),
        }
    }

    fn plain_ratio(&self) -> f64 {
        self.plain_ratio.get().unwrap_or(1.0).clamp(0.001, 1.0)
    }

    fn usable_cores(&self) -> f64 {
        self.spare_cores.get().unwrap_or(self.workers).clamp(0.01, self.workers)
    }

    /// The rate and ratio of a level: as measured, or its prior scaled by how the nearest measured level does.
    fn expect(&self, index: usize) -> (f64, f64) {
        let measured = |at: usize| Some((self.rate.get(at)?.get()?, self.ratio.get(at)?.get()?));
        let Some(&prior) = PRIOR.get(index) else { return (1.0, 1.0) };
        if let Some(found) = measured(index) {
            return found;
        }
        let nearest =
            (0..LEVELS.len()).filter(|at| measured(*at).is_some()).min_by_key(|at| at.abs_diff(index));
        let scaled = nearest.and_then(|at| {
            let ((rate, ratio), near) = (measured(at)?, PRIOR.get(at)?);
            Some((prior.0 * rate / near.0, prior.1 * ratio / near.1))
        });
        scaled.unwrap_or(prior)
    }

    fn best(&self) -> Choice {
        let Some(link) = self.link_bytes_s.get() else { return Choice::Raw(Reason::LinkIsFaster) };
        let cores = self.usable_cores();
        if cores < self.reserve_cores {
            return Choice::Raw(Reason::Vetoed);
        }
        let gather = self.gather_bytes_s.get().unwrap_or(PRIOR_GATHER_BYTES_S);
        let plain = self.plain_ratio();
        let raw_rate = (gather * cores).min(link / plain);
        let options: Vec<(Choice, f64, f64)> = (0..LEVELS.len())
            .map(|index| {
                let (rate, ratio) = self.expect(index);
                let ratio = ratio.clamp(0.001, plain);
                // Gathering comes on top of compressing.
                let encode = cores / (1.0 / rate + 1.0 / gather);
                (Choice::Level(index), encode.min(link / ratio), ratio)
            })
            .chain([(Choice::Raw(Reason::LinkIsFaster), raw_rate, plain)])
            .collect();
        let fastest = options.iter().map(|(_, rate, _)| *rate).fold(0.0, f64::max);
        options
            .iter()
            .filter(|(_, rate, _)| *rate >= fastest * NEAR)
            .min_by(|a, b| a.2.total_cmp(&b.2))
            .map_or(Choice::Raw(Reason::LinkIsFaster), |(choice, ..)| *choice)
    }
}

#[cfg(test)]
mod test {
    use super::*;
    use proptest::prelude::*;

    fn chooser(link_bytes_s: f64, spare_cores: f64) -> Chooser {
        let mut chooser = Chooser::new(2, 2);
        for _ in 0..20 {
            chooser.observe_link(link_bytes_s as u64, 1.0);
            chooser.observe_spare_cores(spare_cores, 1.0);
            chooser.end_window();
        }
        chooser
    }

    #[test]
    fn a_gigabit_link_compresses_and_an_open_loopback_does_not() {
        assert!(matches!(chooser(1.19e8, 1.0).decide(0.4), Verdict::Compress { .. }));
        assert_eq!(chooser(2.5e9, 1.0).decide(0.4), Verdict::Raw(Reason::LinkIsFaster));
    }

    #[test]
    fn a_fast_link_compresses_bargains_only_and_none_without_spare_processors() {
        let fast = chooser(2.5e9, 1.0);
        assert_eq!(fast.decide_bargain(0.3), Verdict::Compress { level: BARGAIN_LEVEL });
        assert_eq!(fast.decide_bargain(0.92), Verdict::Raw(Reason::LinkIsFaster));
        assert_eq!(chooser(2.5e9, 0.01).decide_bargain(0.1), Verdict::Raw(Reason::Vetoed));
        let raw = Chooser::new(2, 2).raw_only();
        assert_eq!(raw.decide_bargain(0.1), Verdict::Raw(Reason::LinkIsFaster));
    }

    #[test]
    fn a_slower_link_compresses_harder() {
        let level = |link| match chooser(link, 1.0).decide(0.3) {
            Verdict::Compress { level } => level,
            Verdict::Raw(_) => i32::MIN,
        };
        let levels: Vec<i32> = [1e7, 5e7, 1.2e8, 3e8, 6e8, 4e9].map(level).to_vec();
        assert!(levels.windows(2).all(|pair| pair[0] >= pair[1]), "{levels:?}");
        assert_eq!((levels.first(), levels.last()), (Some(&3), Some(&i32::MIN)));
    }

    #[test]
    fn without_spare_processors_nothing_is_compressed_however_slow_the_link() {
        assert_eq!(chooser(1e6, 0.01).decide(0.1), Verdict::Raw(Reason::Vetoed));
    }

    #[test]
    fn an_incompressible_block_goes_raw_among_compressed_ones() {
        let chooser = chooser(1.19e8, 1.0);
        assert_eq!(chooser.decide(0.99), Verdict::Raw(Reason::Incompressible));
        assert!(matches!(chooser.decide(0.5), Verdict::Compress { .. }));
    }

    #[test]
    fn one_odd_window_does_not_flip_the_default() {
        let mut chooser = chooser(1.19e8, 1.0);
        let before = chooser.choice();
        for _ in 0..8 {
            chooser.observe_link(8_000_000_000, 1.0);
        }
        chooser.end_window();
        assert_eq!(chooser.choice(), before);
        chooser.end_window();
        assert_ne!(chooser.choice(), before);
    }

    #[test]
    fn what_was_measured_replaces_what_was_assumed() {
        let mut chooser = chooser(1.19e8, 1.0);
        // This data does not compress well enough, at any level, to be worth a slow processor.
        for level in LEVELS {
            for _ in 0..20 {
                chooser.observe_compress(level, 1_000_000, 900_000, 0.05);
            }
        }
        chooser.end_window();
        chooser.end_window();
        assert_eq!(chooser.choice(), Choice::Raw(Reason::LinkIsFaster));
    }

    proptest! {
        /// The naive oracle: push a thousand equal blocks through both stages and take the time.
        #[test]
        fn the_choice_is_never_much_slower_than_the_best_fixed_choice(
            link in 1e6f64..5e9,
            spare in 0.2f64..2.0,
            rates in prop::array::uniform4(5e7f64..3e9),
            ratios in prop::array::uniform4(0.05f64..1.0),
        ) {
            let mut chooser = Chooser::new(2, 2);
            for _ in 0..40 {
                chooser.observe_link(link as u64, 1.0);
                chooser.observe_spare_cores(spare, 1.0);
                chooser.observe_gather(3_000_000_000, 1.0);
                for (index, level) in LEVELS.iter().enumerate() {
                    let raw = 1_000_000_000u64;
                    chooser.observe_compress(*level, raw, (raw as f64 * ratios[index]) as u64, raw as f64 / rates[index]);
                }
                chooser.end_window();
            }
            let seconds = |compress: Option<usize>| {
                let raw = 1000.0 * 262_144.0;
                let (cpu, ratio) = match compress {
                    Some(index) => (1.0 / rates[index] + 1.0 / 3e9, ratios[index]),
                    None => (1.0 / 3e9, 1.0),
                };
                (raw * cpu / spare).max(raw * ratio / link)
            };
            let best = (0..LEVELS.len()).map(Some).chain([None]).map(seconds).fold(f64::INFINITY, f64::min);
            let chosen = match chooser.choice() {
                Choice::Level(index) => seconds(Some(index)),
                Choice::Raw(_) => seconds(None),
            };
            prop_assert!(chosen <= best / NEAR * 1.01, "{chosen} against {best}");
        }
    }
}
