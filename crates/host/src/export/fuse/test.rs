//! A volume's file in the hands of system calls, on a real mount.
//!
//! The threads that serve are this process's own, and so are those that use the file: nothing here may touch the file
//! from a serving thread.

use std::fs::{self, File, OpenOptions};
use std::io::{self, IoSliceMut, Seek as _, SeekFrom, Write as _};
use std::os::unix::fs::{FileExt as _, MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use rustix::fs::{FallocateFlags, SeekFrom as Whence, fallocate, seek};
use rustix::io::Errno;
use whimbrel_wire::record::layer::Parent;
use whimbrel_wire::{DiskId, Epoch};

use super::{FileDir, FileExport, FileOptions};
use crate::block_dev::{BlockDev, BlockRead};
use crate::disk::{LayerSpec, VolumeDir};
use crate::export::DeviceSlot;
use crate::export::test_device::RamDevice;

const SIZE: usize = 16 << 20;

/// Whether this user may mount. Root must be able to: a failure is one of the test.
pub(super) fn may_mount() -> bool {
    let root = rustix::process::geteuid().is_root();
    if !root {
        eprintln!("not tried: only root may mount");
    }
    root
}

pub(super) struct Bench {
    /// Before the directory: it is mounted in it.
    pub(super) export: Option<FileExport>,
    pub(super) files: Arc<FileDir>,
    pub(super) dir: tempfile::TempDir,
}

impl Bench {
    pub(super) fn start(device: Arc<dyn BlockDev>, options: &FileOptions) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let files = FileDir::new(dir.path().join("files")).unwrap();
        let options = FileOptions { name: "disk".into(), ..options.clone() };
        let export = FileExport::start(&files, DeviceSlot::active(device), options).unwrap();
        Self { export: Some(export), files, dir }
    }

    pub(super) fn with(device: RamDevice) -> (Self, Arc<RamDevice>) {
        let device = Arc::new(device);
        (Self::start(device.clone(), &FileOptions::default()), device)
    }

    pub(super) fn path(&self) -> PathBuf {
        self.dir.path().join("files/disk")
    }

    fn open(&self) -> File {
        File::options().read(true).write(true).open(self.path()).unwrap()
    }

    fn open_with(&self, flags: i32) -> File {
        File::options().read(true).write(true).custom_flags(flags).open(self.path()).unwrap()
    }

    fn stop(&mut self) {
        self.export.take().unwrap().stop().unwrap();
    }
}

fn errno<T: std::fmt::Debug>(result: io::Result<T>) -> Errno {
    Errno::from_io_error(&result.unwrap_err()).unwrap()
}

fn content(device: &dyn BlockRead) -> Vec<u8> {
    let mut bytes = vec![0; device.size_bytes() as usize];
    device.read(0, &mut [IoSliceMut::new(&mut bytes)]).unwrap();
    bytes
}

#[test]
fn it_looks_like_a_file_of_the_disks_size() {
    if !may_mount() {
        return;
    }
    let (mut bench, _) = Bench::with(RamDevice::new(SIZE));
    let names: Vec<_> = fs::read_dir(bench.dir.path().join("files"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect();
    assert_eq!(names, ["disk"]);
    let seen = fs::metadata(bench.path()).unwrap();
    assert!(seen.is_file());
    assert_eq!((seen.len(), seen.permissions().mode(), seen.uid()), (SIZE as u64, 0o100_600, 0));
    assert_eq!(seen.blocks(), 0);
    let before = seen.modified().unwrap();
    bench.open().write_all_at(&[7; 10_000], 100_000).unwrap();
    let seen = fs::metadata(bench.path()).unwrap();
    // From 98,304 to 110,592: three blocks of 4 KiB that have data in them.
    assert_eq!(seen.blocks() * 512, 3 * 4096);
    assert!(seen.modified().unwrap() > before);
    let space = rustix::fs::statvfs(bench.path()).unwrap();
    assert_eq!(space.f_blocks * space.f_frsize, SIZE as u64);
    assert_eq!(space.f_bfree * space.f_frsize, SIZE as u64 - 3 * 4096);
    bench.stop();
    assert!(!bench.path().exists());
    assert_eq!(fs::read_dir(bench.dir.path().join("files")).unwrap().count(), 0);
}

/// The same operations on the file and on bytes in memory, at odd places.
#[test]
fn any_offset_and_length_will_do() {
    if !may_mount() {
        return;
    }
    const BYTES: usize = 1 << 20;
    for flags in [0, libc::O_DIRECT, libc::O_DSYNC] {
        let (bench, device) = Bench::with(RamDevice::new(BYTES));
        let file = bench.open_with(flags);
        let mut naive = vec![0; BYTES];
        let mut x = 0x9e37_79b9_7f4a_7c15_u64 ^ flags as u64;
        let mut random = move |below: usize| {
            x ^= x << 13;
            x ^= x >> 7;
            x ^= x << 17;
            (x >> 33) as usize % below
        };
        for round in 0..1500 {
            let unit = [1, 512, 4096][random(3)];
            let offset = random(BYTES) / unit * unit;
            let longest = [40, 5000, 300_000][random(3)].min(BYTES - offset);
            let length = ((random(longest) + 1).div_ceil(unit) * unit).min(BYTES - offset);
            let range = offset..offset + length;
            let (at, long) = (offset as u64, length as u64);
            match random(6) {
                0 | 1 => {
                    let data = vec![round as u8 | 1; length];
                    file.write_all_at(&data, at).unwrap();
                    naive[range].copy_from_slice(&data);
                }
                2 => {
                    let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
                    fallocate(&file, punch, at, long).unwrap();
                    naive[range].fill(0);
                }
                3 => {
                    fallocate(&file, FallocateFlags::ZERO_RANGE, at, long).unwrap();
                    naive[range].fill(0);
                }
                _ => {
                    let mut data = vec![0xee; length];
                    file.read_exact_at(&mut data, at).unwrap();
                    assert!(data == naive[range], "round {round}, {length} bytes at {offset}");
                }
            }
        }
        assert!(content(&*device) == naive);
        assert!((*device.flushes.lock() > 0) == (flags == libc::O_DSYNC));
    }
}

#[test]
fn clients_that_share_sectors_overwrite_nothing_of_each_other() {
    if !may_mount() {
        return;
    }
    const CLIENTS: usize = 8;
    const ROUNDS: u64 = 150;
    let mut device = RamDevice::new(1 << 20);
    // Half of it goes through the workers.
    device.slow = Some((512 << 10..1 << 20, Duration::from_micros(200)));
    let (bench, device) = Bench::with(device);
    // Every client has 100 bytes of every 800, so that a sector belongs to several of them.
    std::thread::scope(|scope| {
        for client in 0..CLIENTS {
            let file = bench.open();
            scope.spawn(move || {
                for round in 0..ROUNDS {
                    for half in [0, 512 << 10] {
                        let at = half + round % 50 * 800 + client as u64 * 100;
                        file.write_all_at(&[client as u8 + 1; 100], at).unwrap();
                    }
                }
            });
        }
    });
    let bytes = content(&*device);
    for half in [0, 512 << 10] {
        for (place, byte) in bytes[half..half + 50 * 800].iter().enumerate() {
            assert_eq!(usize::from(*byte), place / 100 % CLIENTS + 1, "byte {place}");
        }
    }
}

#[test]
fn what_would_change_the_file_itself_is_refused() {
    if !may_mount() {
        return;
    }
    let (bench, _device) = Bench::with(RamDevice::new(SIZE));
    let (file, size) = (bench.open(), SIZE as u64);
    for other in [0, size - 512, size + 512] {
        assert_eq!(errno(file.set_len(other)), Errno::PERM);
    }
    file.set_len(size).unwrap();
    assert_eq!(errno(File::create(bench.path())), Errno::PERM, "O_TRUNC");
    assert_eq!(errno(fs::set_permissions(bench.path(), fs::Permissions::from_mode(0o666))), Errno::PERM);
    fs::set_permissions(bench.path(), fs::Permissions::from_mode(0o600)).unwrap();
    assert_eq!(errno(std::os::unix::fs::chown(bench.path(), Some(1), None)), Errno::PERM);
    // At the end, as on a disk.
    assert_eq!(errno(file.write_at(b"x", size)), Errno::NOSPC);
    assert_eq!(file.write_at(&[1; 4096], size - 100).unwrap(), 100);
    assert_eq!(errno(OpenOptions::new().append(true).open(bench.path()).unwrap().write(b"x")), Errno::NOSPC);
    assert_eq!(file.read_at(&mut [0; 4096], size - 100).unwrap(), 100);
    assert_eq!(file.read_at(&mut [0; 4096], size).unwrap(), 0);
    assert_eq!(fallocate(&file, FallocateFlags::empty(), 0, 4096), Err(Errno::OPNOTSUPP));
    assert_eq!(fallocate(&file, FallocateFlags::ZERO_RANGE, size, 4096), Err(Errno::NOSPC));
    assert_eq!(file.metadata().unwrap().len(), size);
    // The directory.
    let other = bench.dir.path().join("files/other");
    assert_eq!(errno(File::create(&other)), Errno::ROFS);
    assert_eq!(errno(fs::rename(bench.path(), &other)), Errno::ROFS);
    assert_eq!(errno(fs::remove_file(bench.path())), Errno::ROFS);
    assert_eq!(errno(fs::create_dir(&other)), Errno::ROFS);
    assert_eq!(errno(fs::hard_link(bench.path(), &other)), Errno::ROFS);
    // Times are a program's to set.
    let then = std::time::SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000_007);
    file.set_modified(then).unwrap();
    assert_eq!(file.metadata().unwrap().modified().unwrap(), then);
}

#[test]
fn a_file_to_be_read_only_is_not_written() {
    if !may_mount() {
        return;
    }
    let device = Arc::new(RamDevice::new(SIZE));
    let options = FileOptions { read_only: true, ..FileOptions::default() };
    let bench = Bench::start(device.clone(), &options);
    assert_eq!(fs::metadata(bench.path()).unwrap().permissions().mode(), 0o100_400);
    assert_eq!(errno(File::options().write(true).open(bench.path())), Errno::ROFS);
    let file = File::open(bench.path()).unwrap();
    assert_eq!(errno(file.write_at(b"x", 0)), Errno::BADF);
    file.read_exact_at(&mut [0; 100], 5000).unwrap();
    assert!(content(&*device).iter().all(|byte| *byte == 0));
}

#[test]
fn data_and_holes_are_found() {
    if !may_mount() {
        return;
    }
    let (bench, _device) = Bench::with(RamDevice::new(SIZE));
    let mut file = bench.open();
    file.write_all_at(&[1; 8192], 1 << 20).unwrap();
    file.write_all_at(&[1; 4096], 9 << 20).unwrap();
    let find = |whence| seek(&file, whence);
    assert_eq!(find(Whence::Data(0)), Ok(1 << 20));
    assert_eq!(find(Whence::Data((1 << 20) + 5000)), Ok((1 << 20) + 5000));
    assert_eq!(find(Whence::Hole(1 << 20)), Ok((1 << 20) + 8192));
    assert_eq!(find(Whence::Hole(77)), Ok(77));
    assert_eq!(find(Whence::Data(2 << 20)), Ok(9 << 20));
    assert_eq!(find(Whence::Data(10 << 20)), Err(Errno::NXIO));
    assert_eq!(find(Whence::Hole(SIZE as u64)), Err(Errno::NXIO));
    fallocate(&file, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, 9 << 20, 4096).unwrap();
    assert_eq!(find(Whence::Data(2 << 20)), Err(Errno::NXIO));
    file.write_all_at(&[1; 512], SIZE as u64 - 512).unwrap();
    assert_eq!(find(Whence::Hole(SIZE as u64 - 1)), Ok(SIZE as u64));
    assert_eq!(file.seek(SeekFrom::End(-512)).unwrap(), SIZE as u64 - 512);
}

#[test]
fn what_was_asked_to_be_durable_is_flushed_first() {
    if !may_mount() {
        return;
    }
    let (bench, device) = Bench::with(RamDevice::new(SIZE));
    let flushes = || *device.flushes.lock();
    let file = bench.open();
    file.write_all_at(b"abc", 0).unwrap();
    assert_eq!(flushes(), 0);
    file.sync_all().unwrap();
    file.sync_data().unwrap();
    assert_eq!(flushes(), 2);
    for (flag, count) in [(libc::O_SYNC, 3), (libc::O_DSYNC, 4)] {
        let file = bench.open_with(flag);
        file.write_all_at(&[1; 700], 300).unwrap();
        assert_eq!(flushes(), count);
        drop(file);
        assert_eq!(flushes(), count, "closed, and nothing was left to flush");
    }
    // A close after a write flushes; one after none does not.
    file.write_all_at(b"abc", 0).unwrap();
    drop(file);
    assert_eq!(flushes(), 5);
    drop(bench.open());
    assert_eq!(flushes(), 5);
}

#[test]
fn errors_of_the_disk_are_the_programs() {
    if !may_mount() {
        return;
    }
    let mut device = RamDevice::new(SIZE);
    device.bad = 4096..8192;
    let (bench, device) = Bench::with(device);
    let file = bench.open();
    assert_eq!(errno(file.read_at(&mut [0; 512], 4096)), Errno::IO);
    assert_eq!(errno(file.write_at(&[0; 100], 5000)), Errno::IO);
    file.write_all_at(&[1; 4096], 0).unwrap();
    device.full.store(true, Ordering::SeqCst);
    assert_eq!(errno(file.write_at(&[1; 100], 0)), Errno::NOSPC);
    device.full.store(false, Ordering::SeqCst);
    file.write_all_at(&[2; 100], 0).unwrap();
}

#[test]
fn a_source_that_is_silent_holds_up_nobody_else() {
    if !may_mount() {
        return;
    }
    const SILENCE: Duration = Duration::from_secs(3);
    let mut device = RamDevice::new(SIZE);
    device.slow = Some((8 << 20..16 << 20, SILENCE));
    let (bench, _device) = Bench::with(device);
    let other = RamDevice::new(SIZE);
    let options = FileOptions { name: "other".into(), ..FileOptions::default() };
    let other = FileExport::start(&bench.files, DeviceSlot::active(Arc::new(other)), options).unwrap();
    let begin = Instant::now();
    std::thread::scope(|scope| {
        // More than there are workers.
        for reader in 0..12 {
            let file = bench.open();
            scope.spawn(move || {
                let mut byte = [1; 10];
                file.read_exact_at(&mut byte, (8 << 20) + reader * 5000).unwrap();
                assert_eq!(byte, [0; 10]);
            });
        }
        std::thread::sleep(Duration::from_millis(300));
        for path in [bench.path(), other.path().to_owned()] {
            let file = File::options().read(true).write(true).open(path).unwrap();
            file.write_all_at(b"here", 5).unwrap();
            file.sync_all().unwrap();
            file.read_exact_at(&mut [0; 4096], 0).unwrap();
            assert_eq!(file.metadata().unwrap().len(), SIZE as u64);
        }
        assert!(begin.elapsed() < SILENCE, "{:?}", begin.elapsed());
    });
    assert!(begin.elapsed() >= SILENCE);
    other.stop().unwrap();
}

#[test]
fn a_file_that_is_open_can_be_taken_away_in_the_middle_of_a_request() {
    if !may_mount() {
        return;
    }
    let mut device = RamDevice::new(SIZE);
    device.slow = Some((8 << 20..16 << 20, Duration::from_secs(3)));
    let (mut bench, device) = Bench::with(device);
    let file = bench.open();
    file.write_all_at(b"kept", 0).unwrap();
    let waiting = bench.open();
    let waiter = std::thread::spawn(move || errno(waiting.read_at(&mut [0; 10], 9 << 20)));
    std::thread::sleep(Duration::from_millis(200));
    let begin = Instant::now();
    bench.stop();
    assert!(begin.elapsed() < Duration::from_secs(2), "{:?}", begin.elapsed());
    assert_eq!(waiter.join().unwrap(), Errno::CONNABORTED);
    assert_eq!(errno(file.write_at(b"late", 0)), Errno::NOTCONN);
    assert_eq!(errno(file.sync_all()), Errno::NOTCONN);
    assert!(!bench.path().exists());
    assert_eq!(&content(&*device)[..4], b"kept");
    // The same name, at once, while the old one is still open.
    let options = FileOptions { name: "disk".into(), ..FileOptions::default() };
    bench.export = Some(FileExport::start(&bench.files, DeviceSlot::active(device), options).unwrap());
    let mut bytes = [0; 4];
    bench.open().read_exact_at(&mut bytes, 0).unwrap();
    assert_eq!(&bytes, b"kept");
}

#[test]
fn requests_go_on_when_the_disk_under_the_file_is_exchanged() {
    if !may_mount() {
        return;
    }
    let (bench, first) = Bench::with(RamDevice::new(SIZE));
    let file = bench.open();
    file.write_all_at(b"first", 0).unwrap();
    let slot = bench.export.as_ref().unwrap().slot().clone();
    slot.fence(Duration::from_secs(1)).unwrap();
    let writer = std::thread::spawn(move || {
        file.write_all_at(b"second", 100).unwrap();
        file.sync_all().unwrap();
        file
    });
    std::thread::sleep(Duration::from_millis(200));
    assert!(!writer.is_finished());
    let second = Arc::new(RamDevice::new(SIZE));
    slot.activate(second.clone()).unwrap();
    let file = writer.join().unwrap();
    let mut bytes = [0; 6];
    file.read_exact_at(&mut bytes, 100).unwrap();
    assert_eq!(&bytes, b"second");
    assert!(content(&*second)[..5] == [0; 5] && &content(&*first)[..5] == b"first");
}

#[test]
fn a_disk_that_nobody_serves_is_an_error_in_the_end() {
    if !may_mount() {
        return;
    }
    let options = FileOptions { disk_patience: Duration::from_millis(300), ..FileOptions::default() };
    let bench = Bench::start(Arc::new(RamDevice::new(SIZE)), &options);
    let file = bench.open();
    let slot = bench.export.as_ref().unwrap().slot().clone();
    slot.fence(Duration::from_secs(1)).unwrap();
    assert_eq!(errno(file.read_at(&mut [0; 10], 0)), Errno::IO);
    assert_eq!(errno(file.write_at(&[0; 10], 0)), Errno::IO);
    assert_eq!(errno(file.sync_all()), Errno::IO);
    // Its attributes are still told.
    assert_eq!(fs::metadata(bench.path()).unwrap().len(), SIZE as u64);
}

/// Python, because mapping memory is not a thing of safe Rust.
#[test]
fn a_mapping_is_the_disk_and_synced_when_it_is_taken_away() {
    if !may_mount() {
        return;
    }
    let (mut bench, device) = Bench::with(RamDevice::new(SIZE));
    let script = "
import mmap, sys
f = open(sys.argv[1], 'r+b')
m = mmap.mmap(f.fileno(), 1 << 20)
m[5000:5005] = b'hello'
m.flush()
assert f.seek(5000) == 5000 and f.read(5) == b'hello'
m[9000:9004] = b'late'
print('mapped', flush=True)
sys.stdin.read()
";
    let mut child = Command::new("python3")
        .args(["-c", script])
        .arg(bench.path())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut said = String::new();
    io::BufRead::read_line(&mut io::BufReader::new(child.stdout.as_mut().unwrap()), &mut said).unwrap();
    assert_eq!(said, "mapped\n");
    bench.stop();
    drop(child.stdin.take());
    assert!(child.wait().unwrap().success());
    let bytes = content(&*device);
    assert_eq!(&bytes[5000..5005], b"hello");
    assert_eq!(&bytes[9000..9004], b"late", "never synced by the program");
}

const SERVED: &str = "WHIMBREL_TEST_FUSE_DIR";
const DISK: DiskId = DiskId(uuid::Uuid::from_u128(0x5eed));

/// A volume below `dir`, made if there is none.
fn serve_volume(dir: &Path) -> (Arc<FileDir>, FileExport) {
    let volumes = VolumeDir::new(dir).unwrap();
    if !volumes.path(DISK).exists() {
        let spec = LayerSpec::new(Parent::None, SIZE as u64, Epoch(1));
        volumes.create(&LayerSpec { disk_id: DISK, ..spec }).unwrap();
    }
    let layer = volumes.open(DISK, None, Epoch(1), true).unwrap();
    let files = FileDir::new(dir.join("files")).unwrap();
    let options = FileOptions { name: "disk".into(), ..FileOptions::default() };
    let export = FileExport::start(&files, DeviceSlot::active(layer), options).unwrap();
    (files, export)
}

/// Not a test by itself: what the other process of the next one runs.
#[test]
fn the_other_process_serves_until_it_is_killed() {
    let Some(dir) = std::env::var_os(SERVED) else { return };
    let _served = serve_volume(Path::new(&dir));
    fs::write(Path::new(&dir).join("ready"), "").unwrap();
    // Its parent kills it; should the parent be killed first, it ends by itself.
    std::thread::sleep(Duration::from_secs(60));
}

struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

#[test]
fn what_was_synced_survives_a_killed_server_and_its_dead_mount_hinders_nobody() {
    if !may_mount() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("files/disk");
    let ready = dir.path().join("ready");
    for round in 0..3_u64 {
        let child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "export::fuse::test::the_other_process_serves_until_it_is_killed"])
            .env(SERVED, dir.path())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let child = Killed(child);
        let end = Instant::now() + Duration::from_secs(20);
        while !ready.exists() {
            assert!(Instant::now() < end, "the other process does not serve");
            std::thread::sleep(Duration::from_millis(5));
        }
        fs::remove_file(&ready).unwrap();
        // What earlier rounds synced.
        let file = File::options().read(true).write(true).open(&path).unwrap();
        for earlier in 0..round {
            let mut bytes = [0; 3000];
            file.read_exact_at(&mut bytes, earlier * 3000 + 17).unwrap();
            assert_eq!(bytes, [earlier as u8 + 1; 3000]);
        }
        let load = {
            let file = file.try_clone().unwrap();
            std::thread::spawn(move || {
                let mut at = 8 << 20;
                while file.write_all_at(&[9; 5000], at).is_ok() {
                    at = (8 << 20) + (at + 5000) % (4 << 20);
                }
            })
        };
        file.write_all_at(&[round as u8 + 1; 3000], round * 3000 + 17).unwrap();
        file.sync_all().unwrap();
        drop(child);
        load.join().unwrap();
        // Nobody hangs.
        assert_eq!(errno(file.read_at(&mut [0; 10], 0)), Errno::NOTCONN);
        assert_eq!(errno(File::open(&path)), Errno::NOTCONN);
        // The next round finds the dead mount, with a file open on it.
        std::mem::forget(file);
    }
    let (files, export) = serve_volume(dir.path());
    let mut bytes = [0; 9000];
    File::open(&path).unwrap().read_exact_at(&mut bytes, 17).unwrap();
    assert!(bytes.chunks(3000).zip(1_u8..).all(|(part, byte)| part.iter().all(|place| *place == byte)));
    export.stop().unwrap();
    drop(files);
    // Nothing is mounted any more.
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    assert!(!mounts.contains(dir.path().to_str().unwrap()), "{mounts}");
}

#[test]
fn a_layer_written_through_the_file_has_it_after_it_was_opened_anew() {
    if !may_mount() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (_files, export) = serve_volume(dir.path());
    let path = export.path().to_owned();
    let direct = File::options().write(true).custom_flags(libc::O_DIRECT).open(&path).unwrap();
    let mut naive = vec![0; SIZE];
    for (at, length) in [(0, 4096), (511, 2), (5000, 3), (8191, 70_000), (1 << 20, 3 << 20), (SIZE - 1, 1)] {
        direct.write_all_at(&vec![length as u8 | 1; length], at as u64).unwrap();
        naive[at..at + length].fill(length as u8 | 1);
    }
    fallocate(&direct, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, 9000, 60_000).unwrap();
    naive[9000..69_000].fill(0);
    direct.sync_all().unwrap();
    // Without anything that would flush on the way.
    let copy = dir.path().join("copy");
    let copied = Command::new("cp").arg("-r").arg(dir.path().join("volumes")).arg(&copy).status().unwrap();
    assert!(copied.success());
    drop(direct);
    export.stop().unwrap();
    for place in [dir.path().to_owned(), copy] {
        let root = if place.ends_with("copy") {
            let root = dir.path().join("again");
            fs::create_dir(&root).unwrap();
            fs::rename(&place, root.join("volumes")).unwrap();
            root
        } else {
            place
        };
        let layer = VolumeDir::new(&root).unwrap().open(DISK, None, Epoch(1), false).unwrap();
        assert!(content(&*layer) == naive, "{}", root.display());
    }
}
