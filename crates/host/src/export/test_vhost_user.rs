//! The device against a hand-made guest: what is answered, logged, drained, refused.

use std::io::Read;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::VhostUserConfigFlags;
use vhost::{VhostBackend, VhostUserDirtyLogRegion};
use whimbrel_wire::meta::IoLimits;
use whimbrel_wire::peer::migrate::QueueIo;

use super::test_device::RamDevice;
use super::test_guest::{FILE_OFFSET, GPA, Guest, RAM_BYTES, SLOTS, USED, area, data};
use super::{DeviceSlot, VhostUserOptions, VhostUserServer, WriteTracker};
use crate::block_dev::BlockRead;
use crate::error::ErrorKind;
use crate::memory::bitmap::{PageBitmap, SharedDirty};

const READ: u32 = 0;
const WRITE: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;

struct Bench {
    _dir: tempfile::TempDir,
    path: PathBuf,
    device: Arc<RamDevice>,
    server: VhostUserServer,
}

fn serve_with(device: RamDevice, options: VhostUserOptions) -> Bench {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("vub.sock");
    let device = Arc::new(device);
    let server = VhostUserServer::start(&path, DeviceSlot::active(device.clone()), options).unwrap();
    Bench { _dir: dir, path, device, server }
}

fn serve(device: RamDevice) -> Bench {
    serve_with(device, VhostUserOptions { serial: "wh-1".into(), ..VhostUserOptions::default() })
}

fn read_disk(device: &RamDevice, offset: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    device.read(offset, &mut [std::io::IoSliceMut::new(&mut bytes)]).unwrap();
    bytes
}

#[test]
fn requests_are_done_directly_and_through_indirect_tables() {
    let bench = serve(RamDevice::new(1 << 20));
    let mut guest = Guest::new();
    guest.connect(&bench.path);
    guest.put(data(0), &[0xa5; 8192]);
    assert_eq!(guest.request(0, WRITE, 8, 8192, false), 0);
    assert_eq!(read_disk(&bench.device, 4096, 8192), vec![0xa5; 8192]);

    let head = guest.lay_out_indirect(1, READ, 9, 4096, true);
    guest.submit(&[head], true);
    assert_eq!(guest.wait(1), vec![(head, 4097)]);
    assert_eq!(guest.status(1), 0);
    assert_eq!(guest.bytes(data(1), 4096), vec![0xa5; 4096]);

    assert_eq!(guest.request(2, GET_ID, 0, 20, true), 0);
    assert_eq!(&guest.bytes(data(2), 5), b"wh-1\0");
    assert_eq!(guest.request(3, 77, 0, 0, false), 2, "an unknown request is unsupported");
    let counters = bench.server.counters();
    assert_eq!((counters.written_bytes, counters.read_bytes), (8192, 4096));
}

#[test]
fn a_flush_reaches_the_disk_and_a_guest_that_cannot_flush_gets_durable_writes() {
    let bench = serve(RamDevice::new(1 << 20));
    let mut guest = Guest::new();
    guest.connect(&bench.path);
    assert_eq!(guest.request(0, WRITE, 0, 512, false), 0);
    assert_eq!(*bench.device.flushes.lock(), 0);
    assert_eq!(guest.request(0, FLUSH, 0, 0, false), 0);
    assert_eq!(*bench.device.flushes.lock(), 1);
    drop(guest);

    let mut simple = Guest::new();
    simple.features &= !super::blk::F_FLUSH;
    simple.connect(&bench.path);
    assert_eq!(simple.request(0, WRITE, 0, 512, false), 0);
    assert_eq!(*bench.device.flushes.lock(), 2);
}

#[test]
fn requests_that_wait_do_not_hold_up_others() {
    let mut device = RamDevice::new(1 << 20);
    device.slow = Some((0..65536, Duration::from_millis(200)));
    let bench = serve(device);
    let mut guest = Guest::new();
    guest.connect(&bench.path);
    let slow: Vec<u16> =
        (0..4).map(|slot| guest.lay_out(slot, READ, u64::from(slot) * 8, 4096, true)).collect();
    guest.submit(&slow, true);
    let started = Instant::now();
    assert_eq!(guest.request(10, READ, 1024, 4096, true), 0);
    assert!(started.elapsed() < Duration::from_millis(150), "took {:?}", started.elapsed());
    let mut answers: Vec<u16> = guest.wait(4).into_iter().map(|(head, _)| head).collect();
    assert!(started.elapsed() < Duration::from_millis(700), "they did not wait side by side");
    answers.sort_unstable();
    assert_eq!(answers, slow);
}

#[test]
fn a_failing_disk_is_an_error_of_the_request_alone() {
    let mut device = RamDevice::new(1 << 20);
    device.bad = 4096..8192;
    let bench = serve(device);
    let mut guest = Guest::new();
    guest.connect(&bench.path);
    assert_eq!(guest.request(0, READ, 8, 4096, true), 1);
    assert_eq!(guest.request(0, WRITE, 8, 4096, false), 1);
    assert_eq!(guest.request(0, READ, 16, 4096, true), 0);
    // Beyond the end, in parts of sectors, and where arithmetic would wrap.
    assert_eq!(guest.request(0, READ, 2047, 4096, true), 1);
    assert_eq!(guest.request(0, READ, 0, 100, true), 1);
    assert_eq!(guest.request(0, WRITE, u64::MAX - 3, 4096, false), 1);
    assert_eq!(bench.server.counters().errors, 2);
}

#[test]
fn a_guest_waits_for_space_and_is_told_of_no_error() {
    let bench = serve(RamDevice::new(1 << 20));
    let mut guest = Guest::new();
    guest.connect(&bench.path);
    bench.device.full.store(true, Ordering::SeqCst);
    guest.put(data(0), &[0x5a; 4096]);
    let write = guest.lay_out(0, WRITE, 8, 4096, false);
    guest.submit(&[write], true);
    let started = Instant::now();
    while started.elapsed() < Duration::from_millis(1200) {
        assert_eq!(guest.request(10, READ, 1024, 4096, true), 0, "reads go on");
        std::thread::sleep(Duration::from_millis(50));
    }
    assert_eq!(read_disk(&bench.device, 4096, 4096), vec![0; 4096]);
    assert!(bench.server.waits_for_space());
    bench.device.full.store(false, Ordering::SeqCst);
    assert_eq!(guest.wait(1), vec![(write, 1)]);
    assert_eq!(guest.status(0), 0);
    assert_eq!(read_disk(&bench.device, 4096, 4096), vec![0x5a; 4096]);
    assert_eq!(bench.server.counters().errors, 0);
    // One that still waits does not hold up the end of the service.
    bench.device.full.store(true, Ordering::SeqCst);
    let write = guest.lay_out(0, WRITE, 8, 4096, false);
    guest.submit(&[write], true);
    std::thread::sleep(Duration::from_millis(100));
    let stopped = Instant::now();
    bench.server.stop().unwrap();
    assert!(stopped.elapsed() < Duration::from_secs(5), "took {:?}", stopped.elapsed());
}

#[test]
fn a_ring_that_makes_no_sense_stops_and_the_device_lives_on() {
    type Spoil = fn(&mut Guest);
    let cases: [(&str, Spoil); 6] = [
        ("a chain that loops", |guest| {
            guest.raw_desc(0, GPA, 16, 1, 1);
            guest.raw_desc(1, GPA, 16, 1, 0);
            guest.submit(&[0], true);
        }),
        ("memory that is not there", |guest| {
            guest.raw_desc(0, GPA + RAM_BYTES - 8, 64, 0, 0);
            guest.submit(&[0], true);
        }),
        ("a head outside the table", |guest| guest.submit(&[999], true)),
        ("an indirect table that is too long", |guest| {
            guest.raw_desc(0, GPA, !15, 4, 0);
            guest.submit(&[0], true);
        }),
        ("no room for the status", |guest| {
            guest.raw_desc(0, GPA, 16, 0, 0);
            guest.submit(&[0], true);
        }),
        ("a readable part after a writable one", |guest| {
            guest.raw_desc(0, GPA, 16, 1 | 2, 1);
            guest.raw_desc(1, GPA, 16, 0, 0);
            guest.submit(&[0], true);
        }),
    ];
    let bench = serve(RamDevice::new(1 << 20));
    for (what, spoil) in cases {
        let mut guest = Guest::new();
        guest.connect(&bench.path);
        spoil(&mut guest);
        std::thread::sleep(Duration::from_millis(20));
        assert!(guest.answers().is_empty(), "{what}");
        // The next guest is served as if nothing had happened.
        drop(guest);
        let mut next = Guest::new();
        next.connect(&bench.path);
        assert_eq!(next.request(0, READ, 0, 512, true), 0, "after {what}");
    }
}

#[test]
fn a_front_end_that_sends_rubbish_is_let_go() {
    let bench = serve(RamDevice::new(1 << 20));
    for rubbish in
        [&[0xff_u8; 64][..], &[4, 0, 0, 0, 1, 0, 0, 0, 0xff, 0xff, 0, 0], &[5, 0, 0, 0, 1, 0, 0, 0]]
    {
        let mut stream = UnixStream::connect(&bench.path).unwrap();
        std::io::Write::write_all(&mut stream, rubbish).unwrap();
        stream.shutdown(std::net::Shutdown::Write).unwrap();
        let mut rest = Vec::new();
        // Closed, by an end or a reset: not left waiting.
        stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        let ended = stream.read_to_end(&mut rest);
        assert!(!matches!(ended, Err(error) if error.kind() == std::io::ErrorKind::WouldBlock));
    }
    let mut guest = Guest::new();
    guest.connect(&bench.path);
    assert_eq!(guest.request(0, READ, 0, 512, true), 0);
}

#[test]
fn before_the_disk_is_there_questions_are_answered_and_requests_wait() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("vub.sock");
    let slot = DeviceSlot::standby(1 << 20);
    let _server = VhostUserServer::start(&path, slot.clone(), VhostUserOptions::default()).unwrap();
    let mut guest = Guest::new();
    guest.connect(&path);
    let buf = [0; 8];
    let (_, config) =
        guest.frontend.as_mut().unwrap().get_config(0, 8, VhostUserConfigFlags::empty(), &buf).unwrap();
    assert_eq!(config, 2048_u64.to_le_bytes());
    let head = guest.lay_out(0, READ, 0, 512, true);
    guest.submit(&[head], true);
    std::thread::sleep(Duration::from_millis(50));
    assert!(guest.answers().is_empty());
    slot.activate(Arc::new(RamDevice::new(1 << 20))).unwrap();
    assert_eq!(guest.wait(1).len(), 1);
    assert_eq!(guest.status(0), 0);

    slot.fence(Duration::from_secs(1)).unwrap();
    guest.submit(&[head], true);
    std::thread::sleep(Duration::from_millis(50));
    assert!(guest.answers().is_empty());
}

#[test]
fn stopping_a_ring_waits_for_its_requests_and_it_goes_on_where_it_stopped() {
    let mut device = RamDevice::new(1 << 20);
    device.slow = Some((0..4096, Duration::from_millis(150)));
    let bench = serve(device);
    let mut guest = Guest::new();
    guest.connect(&bench.path);
    let heads = [guest.lay_out(0, READ, 0, 4096, true), guest.lay_out(1, READ, 8, 4096, true)];
    guest.submit(&heads, true);
    std::thread::sleep(Duration::from_millis(30));
    let base = guest.frontend.as_ref().unwrap().get_vring_base(0).unwrap();
    assert_eq!(base, 2);
    assert_eq!(guest.used_idx(), 2, "answered before the ring's base was given");
    assert_eq!(guest.answers().len(), 2);
    // Made while stopped: done when it runs again.
    guest.submit(&heads[1..], true);
    std::thread::sleep(Duration::from_millis(30));
    assert!(guest.answers().is_empty());
    guest.restart();
    assert_eq!(guest.wait(1), vec![(heads[1], 4097)]);
}

#[test]
fn a_ring_that_does_not_drain_in_time_keeps_its_requests_for_later() {
    let mut device = RamDevice::new(1 << 20);
    device.slow = Some((0..4096, Duration::from_millis(400)));
    let options = VhostUserOptions { drain_limit: Duration::from_millis(50), ..VhostUserOptions::default() };
    let bench = serve_with(device, options);
    let mut guest = Guest::new();
    guest.connect(&bench.path);
    guest.put(data(0), &[0x11; 4096]);
    let head = guest.lay_out(0, WRITE, 0, 4096, false);
    guest.submit(&[head], true);
    std::thread::sleep(Duration::from_millis(30));
    let asked = Instant::now();
    assert_eq!(guest.frontend.as_ref().unwrap().get_vring_base(0).unwrap(), 1);
    assert!(asked.elapsed() < Duration::from_millis(250));
    assert!(guest.answers().is_empty());
    assert_eq!(bench.server.outstanding().unwrap(), [QueueIo { queue: 0, next_avail: 1, heads: vec![head] }]);
    guest.restart();
    assert_eq!(guest.wait(1), vec![(head, 1)]);
    assert_eq!(bench.server.outstanding().unwrap_err().kind(), ErrorKind::Unavailable, "its ring runs");
    assert_eq!(guest.status(0), 0);
    assert_eq!(read_disk(&bench.device, 0, 4096), vec![0x11; 4096]);
}

#[test]
fn a_limited_disk_is_as_fast_as_its_limit_and_a_flush_is_free() {
    let bench = serve(RamDevice::new(1 << 20));
    let mut guest = Guest::new();
    guest.connect(&bench.path);
    let took = |guest: &mut Guest, count: u64| {
        let started = Instant::now();
        for _ in 0..count {
            assert_eq!(guest.request(0, READ, 8, 4096, true), 0);
        }
        started.elapsed()
    };
    let slot = bench.server.slot();
    assert!(took(&mut guest, 200) < Duration::from_millis(500));
    slot.limit(IoLimits { iops: Some(200), bandwidth_bytes_s: None });
    let limited = took(&mut guest, 100);
    assert!(limited > Duration::from_millis(400) && limited < Duration::from_millis(1500), "{limited:?}");
    let started = Instant::now();
    for _ in 0..20 {
        assert_eq!(guest.request(0, FLUSH, 0, 0, false), 0);
    }
    assert!(started.elapsed() < Duration::from_millis(60), "flushes took {:?}", started.elapsed());
    slot.limit(IoLimits { iops: None, bandwidth_bytes_s: Some(1 << 20) });
    let limited = took(&mut guest, 128);
    assert!(limited > Duration::from_millis(400) && limited < Duration::from_millis(1500), "{limited:?}");
    slot.limit(IoLimits::default());
    assert!(took(&mut guest, 200) < Duration::from_millis(500));
}

/// A disk whose first 8 KiB wait, with `byte` all over it.
fn slow_disk(byte: u8, delay: Duration) -> RamDevice {
    let mut device = RamDevice::new(1 << 20);
    crate::block_dev::BlockDev::write(&device, 0, &[std::io::IoSlice::new(&vec![byte; 1 << 20])]).unwrap();
    device.slow = Some((0..8192, delay));
    device
}

#[test]
fn a_guest_that_moves_waits_for_nothing_and_gets_what_it_left_behind_once() {
    let source = serve(slow_disk(0x11, Duration::from_millis(600)));
    let mut guest = Guest::new();
    guest.connect(&source.path);
    let first = guest.lay_out(0, READ, 0, 4096, true);
    let second = guest.lay_out(1, WRITE, 8, 4096, false);
    guest.put(data(1), &[0x44; 4096]);
    let ends = guest.lay_out(2, READ, 64, 4096, true);
    guest.submit(&[first, ends, second], true);
    assert_eq!(guest.wait(1), vec![(ends, 4097)]);
    source.server.cut_short(true);
    let asked = Instant::now();
    let base = guest.frontend.as_ref().unwrap().get_vring_base(0).unwrap();
    assert!(asked.elapsed() < Duration::from_millis(200), "it waited for {:?}", asked.elapsed());
    assert_eq!(base, 3);
    let left = source.server.outstanding().unwrap();
    assert_eq!(left, [QueueIo { queue: 0, next_avail: 3, heads: vec![first, second] }]);
    // The write may still change the source's disk: whoever hands the volume on waits for it.
    source.server.slot().fence(Duration::from_secs(10)).unwrap();
    assert_eq!(read_disk(&source.device, 4096, 4096), vec![0x44; 4096]);

    let target = serve(slow_disk(0x22, Duration::from_millis(300)));
    target.server.reissue(left);
    guest.move_to(&target.path, u16::try_from(base).unwrap());
    // New requests do not wait for those.
    assert_eq!(guest.request(3, READ, 128, 4096, true), 0);
    let mut answers = guest.wait(2);
    answers.sort_unstable();
    assert_eq!(answers, [(first, 4097), (second, 1)]);
    assert_eq!(guest.bytes(data(0), 4096), vec![0x22; 4096], "the target's disk, not the source's");
    assert_eq!(read_disk(&target.device, 4096, 4096), vec![0x44; 4096]);
    // What still ran at the source has ended: nothing of it came through.
    std::thread::sleep(Duration::from_millis(500));
    assert!(guest.answers().is_empty());
    assert_eq!(guest.bytes(data(0), 4096), vec![0x22; 4096]);
    assert_eq!(target.server.counters().requests, 3);
}

#[test]
fn a_front_end_that_takes_requests_along_is_given_them_at_once_and_once() {
    let source = serve(slow_disk(0x11, Duration::from_millis(600)));
    let mut guest = Guest::new();
    guest.takes_along = true;
    guest.connect(&source.path);
    let first = guest.lay_out(0, READ, 0, 4096, true);
    let second = guest.lay_out(1, READ, 8, 4096, true);
    let ends = guest.lay_out(2, READ, 64, 4096, true);
    guest.submit(&[first, ends, second], true);
    assert_eq!(guest.wait(1), vec![(ends, 4097)]);
    let asked = Instant::now();
    let base = guest.frontend.as_ref().unwrap().get_vring_base(0).unwrap();
    assert!(asked.elapsed() < Duration::from_millis(200), "it waited for {:?}", asked.elapsed());
    // Both ways of taking them along at once: the record counts.
    let left = source.server.outstanding().unwrap();
    assert_eq!(left, [QueueIo { queue: 0, next_avail: 3, heads: vec![first, second] }]);
    let target = serve(slow_disk(0x22, Duration::from_millis(100)));
    target.server.reissue(left);
    guest.move_along_to(&target.path, u16::try_from(base).unwrap());
    let mut answers = guest.wait(2);
    answers.sort_unstable();
    assert_eq!(answers, [(first, 4097), (second, 4097)]);
    assert_eq!(guest.bytes(data(0), 4096), vec![0x22; 4096], "the target's disk, not the source's");
    std::thread::sleep(Duration::from_millis(700));
    assert!(guest.answers().is_empty());
    assert_eq!(guest.bytes(data(0), 4096), vec![0x22; 4096]);
    assert_eq!(target.server.counters().requests, 2);
    // A pause that is not a move is none the wiser, nor slower.
    assert_eq!(guest.request(3, READ, 128, 4096, true), 0);
    let slow = guest.lay_out(0, READ, 0, 4096, true);
    guest.submit(&[slow], true);
    std::thread::sleep(Duration::from_millis(20));
    guest.frontend.as_ref().unwrap().get_vring_base(0).unwrap();
    guest.restart();
    assert_eq!(guest.wait(1), vec![(slow, 4097)]);
}

#[test]
fn a_guest_whose_move_failed_gets_what_it_left_behind_where_it_was() {
    let source = serve(slow_disk(0x11, Duration::from_millis(500)));
    let mut guest = Guest::new();
    guest.connect(&source.path);
    let heads = [guest.lay_out(0, READ, 0, 4096, true), guest.lay_out(1, READ, 8, 4096, true)];
    guest.submit(&heads, true);
    std::thread::sleep(Duration::from_millis(30));
    source.server.cut_short(true);
    assert_eq!(guest.frontend.as_ref().unwrap().get_vring_base(0).unwrap(), 2);
    source.server.cut_short(false);
    guest.restart();
    // Reads that still run from before hold nothing up.
    assert_eq!(guest.request(3, READ, 128, 4096, true), 0);
    let mut answers = guest.wait(2);
    answers.sort_unstable();
    assert_eq!(answers, [(heads[0], 4097), (heads[1], 4097)]);
    assert_eq!(guest.bytes(data(0), 4096), vec![0x11; 4096]);
    std::thread::sleep(Duration::from_millis(600));
    assert!(guest.answers().is_empty());
}

/// Pages of guest memory that a read of `len` bytes into `slot` writes, answer included.
fn pages_of_read(slot: u16, len: u64) -> Vec<u64> {
    let first = data(slot) / 4096;
    let mut pages: Vec<u64> = (first..first + len.div_ceil(4096)).collect();
    pages.extend([(area(slot) + 0x20) / 4096, USED / 4096]);
    pages.sort_unstable();
    pages
}

#[test]
fn what_is_written_to_guest_memory_is_in_the_dirty_log_and_with_the_tracker() {
    let mut device = RamDevice::new(1 << 20);
    device.slow = Some((0..4096, Duration::from_millis(20)));
    let bench = serve(device);
    let mut guest = Guest::new();
    guest.features |= 1 << 26;
    guest.connect(&bench.path);
    let log = tempfile::tempfile_in("/dev/shm").unwrap();
    log.set_len(4096).unwrap();
    let frontend = guest.frontend.as_ref().unwrap();
    let region = VhostUserDirtyLogRegion { mmap_size: 4096, mmap_offset: 0, mmap_handle: log.as_raw_fd() };
    frontend.set_log_base(0, Some(region)).unwrap();
    frontend.set_vring_addr(0, &guest.ring_config(true)).unwrap();
    let meta = guest.ram.metadata().unwrap();
    let dirty = Arc::new(SharedDirty::new((FILE_OFFSET + RAM_BYTES) / 4096));
    let tracker = WriteTracker { device: meta.dev(), inode: meta.ino(), dirty: dirty.clone() };
    bench.server.track_writes(Some(tracker));

    // One that is done at once, one that waits.
    for (slot, sector) in [(1, 64), (2, 0)] {
        assert_eq!(guest.request(slot, READ, sector, 8192, true), 0);
        let expected = pages_of_read(slot, 8192);
        let mut bits = [0; 4096];
        log.read_exact_at(&mut bits, 0).unwrap();
        log.write_all_at(&[0; 4096], 0).unwrap();
        let logged: Vec<u64> = (0..4096 * 8_u64)
            .filter(|page| bits[*page as usize / 8] & 1 << (page % 8) != 0)
            .map(|page| page - GPA / 4096)
            .collect();
        assert_eq!(logged, expected, "sector {sector}");
        let mut tracked = PageBitmap::new((FILE_OFFSET + RAM_BYTES) / 4096);
        dirty.drain_into(&mut tracked);
        let tracked: Vec<u64> =
            tracked.iter_ranges().flatten().map(|page| page - FILE_OFFSET / 4096).collect();
        assert_eq!(tracked, expected, "sector {sector}");
    }

    // A write of the guest changes its status and the ring only.
    assert_eq!(guest.request(3, WRITE, 64, 8192, false), 0);
    let mut tracked = PageBitmap::new((FILE_OFFSET + RAM_BYTES) / 4096);
    dirty.drain_into(&mut tracked);
    assert_eq!(tracked.count(), 2);
    bench.server.track_writes(None);
    assert_eq!(guest.request(3, READ, 64, 4096, true), 0);
    dirty.drain_into(&mut tracked);
    assert_eq!(tracked.count(), 2);
}

#[test]
fn pages_know_the_block_that_filled_them_last() {
    let mut device = RamDevice::new(1 << 20);
    device.slow = Some((0..4096, Duration::from_millis(20)));
    let bench = serve(device);
    let mut guest = Guest::new();
    guest.connect(&bench.path);
    let meta = guest.ram.metadata().unwrap();
    let filled = bench.server.filled(meta.dev(), meta.ino()).unwrap();
    let first = |slot: u16| (FILE_OFFSET + data(slot)) / 4096;
    assert_eq!(filled.block_of(first(1)), None);
    // One that is done at once, one that waits.
    for (slot, sector) in [(1, 64), (2, 0)] {
        assert_eq!(guest.request(slot, READ, sector, 8192, true), 0);
        let blocks = [0, 1, 2].map(|page| filled.block_of(first(slot) + page));
        let block = sector as u32 / 8;
        assert_eq!(blocks, [Some(block), Some(block + 1), None], "sector {sector}");
    }
    // Not whole blocks, a write of the guest, another file: nothing is learned.
    assert_eq!(guest.request(1, READ, 65, 8192, true), 0);
    assert_eq!(guest.request(1, WRITE, 128, 4096, false), 0);
    assert_eq!(filled.block_of(first(1)), Some(8));
    assert_eq!(guest.request(1, READ, 128, 4096, true), 0);
    assert_eq!(filled.block_of(first(1)), Some(16));
    assert_eq!(bench.server.filled(meta.dev(), meta.ino() + 1).unwrap().block_of(first(1)), None);
}

#[test]
fn a_full_ring_is_served_whatever_the_order_and_number_of_kicks() {
    for event_idx in [false, true] {
        let bench = serve(RamDevice::new(1 << 20));
        let mut guest = Guest::new();
        guest.features |= u64::from(event_idx) << 29;
        guest.connect(&bench.path);
        for round in 0..200_u64 {
            let heads: Vec<u16> =
                (0..SLOTS).map(|slot| guest.lay_out(slot, READ, round % 8, 512, true)).collect();
            guest.submit(&heads, true);
            assert_eq!(guest.wait(heads.len()).len(), heads.len());
            if round % 50 == 0 {
                // Long enough for the queue to fall asleep.
                std::thread::sleep(Duration::from_millis(5));
            }
        }
    }
}

/// The capacity that the front-end is told when it asks, bytes.
fn asked_size(guest: &mut Guest) -> u64 {
    let frontend = guest.frontend.as_mut().unwrap();
    let (_, config) = frontend.get_config(0, 8, VhostUserConfigFlags::empty(), &[0; 8]).unwrap();
    u64::from_le_bytes(config.try_into().unwrap()) * 512
}

/// The front-end's end of its channel: the message that a device's configuration changed, alone.
fn hears_of_a_change(channel: &mut UnixStream) {
    let mut message = [0; 12];
    channel.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    channel.read_exact(&mut message).unwrap();
    assert_eq!(message, [2u32, 1, 0].map(u32::to_ne_bytes).concat()[..]);
    channel.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
    assert!(channel.read(&mut message).is_err(), "one is enough");
}

#[test]
fn a_front_end_hears_that_its_disk_became_larger_until_it_looks() {
    let bench = serve(RamDevice::new(1 << 20));
    let mut guest = Guest::new();
    guest.connect(&bench.path);
    assert_eq!(asked_size(&mut guest), 1 << 20);
    let (mut channel, theirs) = UnixStream::pair().unwrap();
    guest.frontend.as_mut().unwrap().set_backend_request_fd(&theirs).unwrap();
    drop(theirs);
    let grow = |size: usize| {
        bench.device.grow(size);
        bench.server.slot().grow(size as u64);
        bench.server.size_notice().unwrap()
    };
    assert_eq!(guest.request(0, WRITE, 2048, 4096, false), 1, "behind the end");
    assert!(bench.server.size_notice().unwrap().deliver(Duration::ZERO), "it knows");
    let notice = grow(2 << 20);
    let delivered = std::thread::spawn(move || notice.deliver(Duration::from_secs(20)));
    hears_of_a_change(&mut channel);
    assert_eq!(asked_size(&mut guest), 2 << 20);
    assert!(delivered.join().unwrap());
    guest.put(data(0), &[7; 4096]);
    assert_eq!(guest.request(0, WRITE, 2048, 4096, false), 0);
    assert_eq!(read_disk(&bench.device, 1 << 20, 4096), [7; 4096]);

    // One that does not look, as QEMU while its device is stopped, hears again when the ring starts.
    assert!(!grow(3 << 20).deliver(Duration::from_millis(20)));
    hears_of_a_change(&mut channel);
    guest.frontend.as_ref().unwrap().get_vring_base(0).unwrap();
    guest.restart();
    hears_of_a_change(&mut channel);
    assert_eq!(asked_size(&mut guest), 3 << 20);
    guest.frontend.as_ref().unwrap().get_vring_base(0).unwrap();
    guest.restart();
    channel.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
    assert!(channel.read(&mut [0; 12]).is_err(), "it knows");

    // One that does not listen is not waited for longer than said, and keeps nothing else up.
    drop(channel);
    assert!(!grow(4 << 20).deliver(Duration::from_millis(20)));
    assert_eq!(guest.request(0, READ, (3 << 20) / 512, 4096, true), 0);
}

#[test]
fn a_front_end_that_comes_back_asks_for_the_size_and_rubbish_as_a_channel_ends_its_connection() {
    let bench = serve(RamDevice::new(1 << 20));
    let mut guest = Guest::new();
    guest.connect(&bench.path);
    let (mut channel, theirs) = UnixStream::pair().unwrap();
    // QEMU does not ask when it connects again: it is told to.
    guest.frontend.as_mut().unwrap().set_backend_request_fd(&theirs).unwrap();
    guest.frontend.as_ref().unwrap().get_vring_base(0).unwrap();
    guest.restart();
    hears_of_a_change(&mut channel);
    assert_eq!(asked_size(&mut guest), 1 << 20);

    let file = tempfile::tempfile().unwrap();
    assert!(guest.frontend.as_mut().unwrap().set_backend_request_fd(&file).is_err());
    let mut other = Guest::new();
    other.connect(&bench.path);
    assert_eq!(other.request(0, READ, 0, 4096, true), 0);
}
