//! A real process is killed while it writes and flushes.

use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};

use super::*;
use crate::disk::check;

const BLOCKS: u64 = 64;

/// Writes for ever: block `n % BLOCKS` gets the number n; says what returned.
#[test]
#[ignore = "run by the test below, which kills it"]
fn child() {
    let Ok(path) = std::env::var("WHIMBREL_TEST_KILL_DIR") else { return };
    let layer = Layer::open(path.as_ref(), None, Epoch(1), true).unwrap();
    let first = (0..BLOCKS).map(|block| number(&layer, block)).max().unwrap_or(0) + 1;
    for n in first.. {
        write(&*layer, n % BLOCKS * BLOCK, &n.to_le_bytes().repeat(512)).unwrap();
        println!("wrote {n}");
        if n % 5 == 0 {
            layer.flush().unwrap();
            println!("flushed {n}");
        }
        if n % 500 == 0 {
            layer.checkpoint().unwrap();
        }
    }
}

/// What a block holds; it must be whole.
fn number(layer: &Layer, block: u64) -> u64 {
    let bytes = read(layer, block * BLOCK, 4096);
    assert!(bytes.chunks(8).all(|word| word == &bytes[..8]), "block {block} is torn");
    u64::from_le_bytes(bytes[..8].try_into().unwrap())
}

#[test]
fn what_returned_before_kill_9_is_there_afterwards() {
    let (_dir, path, layer) = layer(BLOCKS * BLOCK);
    drop(layer);
    let mut before = 0;
    for turn in 0..12u64 {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "disk::test::kill::child", "--ignored", "--nocapture"])
            .env("WHIMBREL_TEST_KILL_DIR", &path)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut wrote = 0;
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let enough = 40 + turn * 37;
        for line in lines.by_ref().map_while(|line| line.ok()) {
            // The harness prints before the child's first line, without an end of line.
            if let Some(n) = line.split("wrote ").nth(1).and_then(|n| n.parse().ok()) {
                wrote = n;
            }
            if wrote > before + enough {
                break;
            }
        }
        child.kill().unwrap();
        // What it said until it died counts too.
        for line in lines.map_while(|line| line.ok()) {
            wrote = line.strip_prefix("wrote ").and_then(|n| n.parse().ok()).unwrap_or(wrote);
        }
        child.wait().unwrap();
        assert!(wrote > before, "the child wrote nothing");
        let report = check(&path).unwrap();
        assert!(report.problems.is_empty(), "{:?}", report.problems);
        let layer = Layer::open(&path, None, Epoch(1), false).unwrap();
        for n in wrote.saturating_sub(BLOCKS - 1).max(1)..=wrote {
            let found = number(&layer, n % BLOCKS);
            // One write may have been under way.
            assert!(
                found == n || found == wrote + 1,
                "turn {turn}: block of {n} holds {found}, {wrote} returned"
            );
        }
        before = wrote;
    }
}
