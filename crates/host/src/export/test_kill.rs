//! The process that serves a disk is killed while requests are under way, again and again; the guest notices nothing.

use std::fs::File;
use std::io::{IoSlice, IoSliceMut};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::test_guest::{Guest, SLOTS, data};
use super::{DeviceSlot, VhostUserOptions, VhostUserServer};
use crate::block_dev::{BlockDev, BlockRead, Extent};
use crate::error::{Context, Result};

const SOCKET: &str = "WHIMBREL_TEST_EXPORT_SOCKET";
const DISK: &str = "WHIMBREL_TEST_EXPORT_DISK";
const BLOCK: usize = 4096;

/// A file as a disk. Two of three blocks make their requests wait, each for another time, so that answers come in
/// another order than requests.
struct FileDisk(File);

impl FileDisk {
    fn delay(offset: u64) -> Option<Duration> {
        let block = offset / BLOCK as u64;
        (!block.is_multiple_of(3)).then(|| Duration::from_micros(block * 7919 % 3000))
    }
}

impl BlockRead for FileDisk {
    fn size_bytes(&self) -> u64 {
        self.0.metadata().map_or(0, |meta| meta.len())
    }

    fn read(&self, offset: u64, into: &mut [IoSliceMut<'_>]) -> Result<()> {
        std::thread::sleep(Self::delay(offset).unwrap_or_default());
        let mut at = offset;
        for part in into {
            self.0.read_exact_at(part, at).context("read test disk")?;
            at += part.len() as u64;
        }
        Ok(())
    }

    fn read_now(&self, offset: u64, into: &mut [IoSliceMut<'_>]) -> Result<bool> {
        if Self::delay(offset).is_some() {
            return Ok(false);
        }
        self.read(offset, into).map(|()| true)
    }

    fn extent(&self, offset: u64) -> Result<Extent> {
        Ok(Extent { length: self.size_bytes() - offset, data: true })
    }
}

impl BlockDev for FileDisk {
    fn write(&self, offset: u64, from: &[IoSlice<'_>]) -> Result<()> {
        std::thread::sleep(Self::delay(offset).unwrap_or_default());
        let mut at = offset;
        for part in from {
            self.0.write_all_at(part, at).context("write test disk")?;
            at += part.len() as u64;
        }
        Ok(())
    }

    fn flush(&self) -> Result<()> {
        self.0.sync_data().context("flush test disk")
    }

    fn discard(&self, _: u64, _: u64) -> Result<()> {
        Ok(())
    }

    fn write_zeroes(&self, offset: u64, length: u64) -> Result<()> {
        self.0.write_all_at(&vec![0; length as usize], offset).context("zero test disk")
    }

    fn write_now(&self, offset: u64, from: &[IoSlice<'_>]) -> Result<bool> {
        if Self::delay(offset).is_some() {
            return Ok(false);
        }
        self.write(offset, from).map(|()| true)
    }
}

/// Not a test by itself: what the other process of the next one runs.
#[test]
fn the_other_process_serves_until_it_is_killed() {
    let (Some(socket), Some(disk)) = (std::env::var_os(SOCKET), std::env::var_os(DISK)) else { return };
    let file = File::options().read(true).write(true).open(disk).unwrap();
    let slot = DeviceSlot::active(Arc::new(FileDisk(file)));
    let _server = VhostUserServer::start(Path::new(&socket), slot, VhostUserOptions::default()).unwrap();
    // Its parent kills it; should the parent be killed first, it ends by itself.
    std::thread::sleep(Duration::from_secs(120));
}

struct Server(Child);

impl Server {
    fn start(socket: &Path, disk: &Path) -> Self {
        let child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "export::test_kill::the_other_process_serves_until_it_is_killed"])
            .env(SOCKET, socket)
            .env(DISK, disk)
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        Self(child)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

/// What the guest knows of one block: what it last wrote, whether that was answered.
struct Expect {
    written: u64,
    under_way: Option<u64>,
}

fn content(block: u64, version: u64) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(BLOCK);
    while bytes.len() < BLOCK {
        bytes.extend(block.to_le_bytes());
        bytes.extend(version.to_le_bytes());
    }
    bytes
}

#[test]
fn a_server_killed_under_load_loses_no_request_and_answers_none_twice() {
    const KILLS: u32 = 12;
    let dir = tempfile::tempdir().unwrap();
    let (socket, disk) = (dir.path().join("vub.sock"), dir.path().join("disk"));
    let blocks = u64::from(SLOTS) * 4;
    File::create(&disk).unwrap().set_len(blocks * BLOCK as u64).unwrap();

    let mut server = Some(Server::start(&socket, &disk));
    let mut guest = Guest::new();
    guest.connect(&socket);
    let mut expect: Vec<Expect> = (0..blocks).map(|_| Expect { written: 0, under_way: None }).collect();
    // The block that each slot's request is about.
    let mut busy: Vec<Option<u64>> = vec![None; usize::from(SLOTS)];
    let (mut next, mut kills, mut out_of_order, mut done_again) = (0_u64, 0, 0_u32, 0);
    let mut taken_order: Vec<u16> = Vec::new();
    let mut next_kill = Instant::now() + Duration::from_millis(60);
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        assert!(Instant::now() < deadline, "{kills} kills, {next} requests: stuck");
        // Keep every slot busy with a write to a block that nobody else writes.
        let mut heads = Vec::new();
        for slot in 0..SLOTS {
            if busy[usize::from(slot)].is_none() && kills < KILLS {
                let block = u64::from(slot) * 4 + next % 4;
                let version = next + 1;
                guest.put(data(slot), &content(block, version));
                heads.push(guest.lay_out(slot, 1, block * 8, BLOCK as u32, false));
                busy[usize::from(slot)] = Some(block);
                expect[block as usize].under_way = Some(version);
                taken_order.push(slot);
                next += 1;
            }
        }
        if !heads.is_empty() {
            guest.submit(&heads, true);
        }
        for (head, _) in guest.answers() {
            let slot = head / 3;
            let block =
                busy[usize::from(slot)].take().expect("an answer to what was not asked, or answered before");
            let at = taken_order.iter().position(|taken| *taken == slot).unwrap();
            out_of_order += u32::from(at > 0);
            taken_order.remove(at);
            assert_eq!(guest.status(slot), 0);
            let entry = &mut expect[block as usize];
            entry.written = entry.under_way.take().unwrap();
            // What was answered is on the disk, whichever process did it.
            let mut found = vec![0; BLOCK];
            File::open(&disk).unwrap().read_exact_at(&mut found, block * BLOCK as u64).unwrap();
            assert!(found == content(block, entry.written), "block {block}");
        }
        if kills < KILLS && Instant::now() > next_kill {
            drop(server.take());
            guest.frontend = None;
            done_again += busy.iter().flatten().count();
            server = Some(Server::start(&socket, &disk));
            guest.connect(&socket);
            kills += 1;
            next_kill = Instant::now() + Duration::from_millis(40 + u64::from(kills) * 13 % 50);
        }
        if kills == KILLS && busy.iter().all(Option::is_none) {
            break;
        }
        std::thread::sleep(Duration::from_micros(100));
    }
    std::thread::sleep(Duration::from_millis(20));
    assert!(guest.answers().is_empty(), "an answer too many");
    // The test must have been what it says: kills with requests under way, answers in another order.
    assert!(next > 500 && done_again > 50 && out_of_order > 100, "{next} {done_again} {out_of_order}");
    let file = File::open(&disk).unwrap();
    for (block, expect) in expect.iter().enumerate().filter(|(_, expect)| expect.written > 0) {
        let mut found = vec![0; BLOCK];
        file.read_exact_at(&mut found, (block * BLOCK) as u64).unwrap();
        assert!(found == content(block as u64, expect.written), "block {block}");
    }
}
