//! Compressing one block after the other as the link, the processors and the block itself say (capability 3).
//!
//! ```text
//!   a block ──► sample, if its neighbours give reason to doubt ──► Chooser (engine) ──► zstd at its level, or as it is
//!                                    what it cost and gave ──────────►┘      ▲
//!                                    what the link took, idle processors ────┘ `memory::pace`
//! ```
//!
//! The same for everything that a host sends in bulk: pages of memory, QEMU's own stream, pieces of a disk's layer.
//!
//! Not here: the choice (`engine::block::encode`), codecs (`codec`).

use std::sync::Arc;

use parking_lot::Mutex;
use rustix::time::{ClockId, clock_gettime};
use whimbrel_engine::block::encode::{Choice, Chooser, LEVELS, RATIO_MAX, Verdict};

use crate::codec::Compressor;
use crate::error::Result;

/// After a block that shrank to less than this, the next one is taken to be like it.
const PLAINLY_WORTH: f64 = 0.8;

/// The processor time of the calling thread, seconds.
pub fn thread_cpu_s() -> f64 {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    time.tv_sec as f64 + time.tv_nsec as f64 / 1e9
}

/// What became of a block.
#[derive(Clone, Copy, Debug)]
pub struct Packed {
    /// Its compressed length; none if it is to be sent as it is.
    pub length: Option<usize>,
    /// Processor time that it took to find out, seconds.
    pub cpu_s: f64,
    /// Whether that time is what a level costs; else it belongs to the gathering of what is sent as it is.
    pub by_level: bool,
}

/// Of one thread, for one stream of blocks.
pub struct Adaptive {
    chooser: Arc<Mutex<Chooser>>,
    compressor: Compressor,
    /// What the last block compressed to: guests' memory, and disks, are alike for long stretches.
    last_ratio: f64,
}

impl Adaptive {
    /// Asks `chooser`, and tells it what was found.
    pub fn new(chooser: Arc<Mutex<Chooser>>) -> Result<Self> {
        Ok(Self { chooser, compressor: Compressor::new()?, last_ratio: 1.0 })
    }

    /// Compresses `plain` into the front of `out` if that pays. `raw_bytes` is the length of what `plain` stands for; `out` is at
    /// least as long as [`room`] says.
    pub fn pack(&mut self, raw_bytes: usize, plain: &[u8], out: &mut [u8]) -> Result<Packed> {
        let start_s = thread_cpu_s();
        let mut length = None;
        if let Verdict::Compress { level } = self.decide(plain)? {
            let room = out.get_mut(..room(plain.len())).unwrap_or(&mut []);
            length = self.compressor.compress(level, plain, room)?;
            self.last_ratio = length.map_or(1.0, |length| length as f64 / plain.len() as f64);
        }
        let cpu_s = thread_cpu_s() - start_s;
        let (raw_bytes, plain_bytes) = (raw_bytes as u64, plain.len() as u64);
        let wire_bytes = length.map_or(plain_bytes, |length| length as u64);
        let mut chooser = self.chooser.lock();
        let by_level = match chooser.choice() {
            // Bargains are part of what sending raw costs and gives.
            Choice::Raw(_) => {
                chooser.observe_plain(raw_bytes, wire_bytes);
                false
            }
            // Blocks that test C spares are part of what a level costs and gives.
            Choice::Level(index) => {
                chooser.observe_plain(raw_bytes, plain_bytes);
                if let Some(level) = LEVELS.get(index) {
                    chooser.observe_compress(*level, raw_bytes, wire_bytes, cpu_s);
                }
                true
            }
        };
        Ok(Packed { length, cpu_s, by_level })
    }

    /// Reading and checking `bytes`, and whatever else is not compressing, took so much processor time.
    pub fn gathered(&self, bytes: u64, cpu_s: f64) {
        self.chooser.lock().observe_gather(bytes, cpu_s);
    }

    fn decide(&mut self, plain: &[u8]) -> Result<Verdict> {
        let (default, bargains) = {
            let chooser = self.chooser.lock();
            (chooser.decide(0.0), chooser.bargains())
        };
        if bargains {
            let ratio = self.compressor.sample_ratio(plain)?;
            return Ok(self.chooser.lock().decide_bargain(ratio));
        }
        if matches!(default, Verdict::Raw(_)) || self.last_ratio < PLAINLY_WORTH {
            return Ok(default);
        }
        self.last_ratio = self.compressor.sample_ratio(plain)?;
        Ok(self.chooser.lock().decide(self.last_ratio))
    }
}

/// What a block of `bytes` may compress to: what takes more is sent as it is.
pub fn room(bytes: usize) -> usize {
    (bytes as f64 * RATIO_MAX) as usize
}

#[cfg(test)]
mod test {
    use super::*;
    use crate::codec::Decompressor;

    fn text(bytes: usize) -> Vec<u8> {
        b"the disk's blocks are mostly like this ".repeat(bytes / 39 + 1)[..bytes].to_vec()
    }

    fn noise(bytes: usize) -> Vec<u8> {
        let mut out = vec![0; bytes];
        blake3::Hasher::new().finalize_xof().fill(&mut out);
        out
    }

    /// A link of so many bytes per second and so many idle processors, for long enough to count.
    fn after(link_bytes_s: u64, cores: f64) -> Arc<Mutex<Chooser>> {
        let mut chooser = Chooser::new(4, 2);
        for _ in 0..10 {
            chooser.observe_link(link_bytes_s, 1.0);
            chooser.observe_spare_cores(cores, 1.0);
            chooser.end_window();
        }
        Arc::new(Mutex::new(chooser))
    }

    fn pack(chooser: Arc<Mutex<Chooser>>, plain: &[u8]) -> Option<Vec<u8>> {
        let mut out = vec![0; plain.len()];
        let packed = Adaptive::new(chooser).unwrap().pack(plain.len(), plain, &mut out).unwrap();
        out.truncate(packed.length?);
        Some(out)
    }

    #[test]
    fn what_pays_is_compressed_and_comes_back() {
        let plain = text(1 << 20);
        for link_bytes_s in [1_000_000, 10_000_000_000] {
            let packed = pack(after(link_bytes_s, 2.0), &plain).unwrap();
            assert!(packed.len() < plain.len() / 2);
            let mut back = vec![0; plain.len()];
            Decompressor::new().unwrap().decompress(&packed, &mut back).unwrap();
            assert!(back == plain);
        }
    }

    #[test]
    fn what_does_not_pay_is_not() {
        assert_eq!(pack(after(1_000_000, 2.0), &noise(1 << 20)), None);
        assert_eq!(pack(after(10_000_000_000, 2.0), &noise(1 << 20)), None);
        // Guests need the processors.
        assert_eq!(pack(after(1_000_000, 0.0), &text(1 << 20)), None);
        assert_eq!(pack(after(1_000_000, 2.0), &[]), None);
    }
}
