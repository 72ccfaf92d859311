//! What happened, as a running hash (to show that a seed repeats exactly) and, on demand, as text.

use std::fmt;
use whimbrel_wire::Time;

/// A trace of one run.
#[derive(Debug, Default)]
pub struct Trace {
    hash: u64,
    lines: Option<Vec<String>>,
    buffer: String,
}

impl Trace {
    /// `keep` keeps the text as well.
    pub fn new(keep: bool) -> Self {
        Self { hash: 0xcbf2_9ce4_8422_2325, lines: keep.then(Vec::new), buffer: String::new() }
    }

    /// Takes numbers that identify an event into the hash.
    pub fn mix(&mut self, now: Time, numbers: &[u64]) {
        for number in std::iter::once(&now.0).chain(numbers) {
            // FNV-1a over words: weak, and enough to tell two runs apart.
            self.hash = (self.hash ^ number).wrapping_mul(0x0000_0100_0000_01b3).rotate_left(23);
        }
    }

    /// Takes a line into the hash, and keeps it if asked to.
    pub fn line(&mut self, now: Time, words: fmt::Arguments<'_>) {
        use fmt::Write;
        self.buffer.clear();
        // Writing into a String does not fail.
        let _ = write!(self.buffer, "{words}");
        self.mix(now, &[]);
        for byte in self.buffer.bytes() {
            self.hash = (self.hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3);
        }
        if let Some(lines) = &mut self.lines {
            lines.push(format!("{:>9.3} ms  {}", now.0 as f64 / 1e6, self.buffer));
        }
    }

    /// The hash so far.
    pub fn hash(&self) -> u64 {
        self.hash
    }

    /// The lines, if they were kept.
    pub fn into_lines(self) -> Vec<String> {
        self.lines.unwrap_or_default()
    }
}
