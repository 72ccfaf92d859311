//! The beat: 16 bytes every millisecond, `"BEAT" 0u32 number:u64` little-endian, on port `whimbrel.beat`.
//!
//! A beat that cannot be written (nobody listens) is skipped; the number still counts, so that a gap in numbers
//! tells a receiver what it missed.

use std::io::{ErrorKind, Write as _};
use std::sync::atomic::Ordering::Relaxed;
use std::thread;
use std::time::{Duration, Instant};

use crate::port;
use crate::report::Counters;

/// Between two beats.
const PERIOD: Duration = Duration::from_millis(1);

/// Sends beats until the program ends.
pub fn run(counters: &Counters) {
    let mut number = 0u64;
    loop {
        let Ok(mut port) = port::open("whimbrel.beat") else {
            thread::sleep(Duration::from_millis(200));
            continue;
        };
        let mut due = Instant::now();
        loop {
            number += 1;
            let mut frame = *b"BEAT\0\0\0\0\0\0\0\0\0\0\0\0";
            frame[8..].copy_from_slice(&number.to_le_bytes());
            match port.write(&frame) {
                Ok(_) => {}
                Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {}
                // The port went away with its device.
                Err(_) => break,
            }
            counters.beats.store(number, Relaxed);
            due += PERIOD;
            let now = Instant::now();
            match due.checked_duration_since(now) {
                Some(left) => thread::sleep(left),
                // Late: the next beat is due from now on, there is no catching up in bursts.
                None => due = now,
            }
        }
    }
}
