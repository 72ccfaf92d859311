//! The self-checking workload of test guests: it uses memory, disk and network all the time, and notices when a
//! byte of them is lost, changed, or travels back in time.
//!
//! ```text
//!            ┌── memory.rs  arena of versioned pages, written and re-read
//!   main ────┼── disk.rs    numbered records, fsynced and read back past the page cache
//!            ├── cold.rs    known content read and written, sizes of disks, on command
//!            ├── beat.rs    a number every millisecond  ──▶ port whimbrel.beat
//!            ├── net.rs     TCP echo and stream
//!            └── report.rs  JSON lines ──▶ port whimbrel.status (commands come back on it), and the console
//! ```
//!
//! Settings are `wg.KEY=VALUE` words on the kernel's command line, or `KEY=VALUE` arguments (`config.rs`).
//!
//! Invariants: every error is counted once and never taken back; a worker that is broken is repaired only after
//! it was counted; the program needs std and a static libc only, so that it runs in any Linux guest.
//!
//! Not here: measuring silence (guest clocks stop with the guest: `xtask/src/beat.rs`), building images
//! (`xtask/src/guest.rs`).

mod beat;
mod cold;
mod config;
mod disk;
mod memory;
mod net;
mod port;
mod report;

use std::sync::Arc;
use std::sync::mpsc::channel;
use std::thread;

use config::Config;
use report::{Counters, Order};

fn main() {
    let config = match Config::from_machine() {
        Ok(c) => c,
        Err(e) => {
            eprintln!("whimbrel-guest: {e}");
            std::process::exit(2);
        }
    };
    let counters = Arc::new(Counters::default());
    let mut workers = Vec::new();
    if config.mem_mib > 0 {
        for part in 0..config.mem_threads {
            let (tx, rx) = channel::<Order>();
            workers.push(tx);
            let (config, counters) = (config.clone(), Arc::clone(&counters));
            thread::spawn(move || memory::Worker::new(&config, part, counters).run(&rx));
        }
    }
    if let Some(path) = config.disk.clone() {
        let (tx, rx) = channel::<Order>();
        workers.push(tx);
        let (config, counters) = (config.clone(), Arc::clone(&counters));
        thread::spawn(move || disk::run(&path, &config, &counters, &rx));
    }
    if config.beat {
        let counters = Arc::clone(&counters);
        thread::spawn(move || beat::run(&counters));
    }
    if config.serve {
        net::start();
    }
    report::run(&counters, &workers);
}
