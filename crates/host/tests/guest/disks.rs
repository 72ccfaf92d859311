//! A guest that writes and re-reads its disk over our own vhost-user-blk server is moved within this host: memory
//! that the server wrote is not missed, and the disk goes on where it was.

use std::io::{IoSlice, IoSliceMut};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use whimbrel_host::Result;
use whimbrel_host::block_dev::{BlockDev, BlockRead, Extent};
use whimbrel_host::export::{DeviceSlot, VhostUserOptions, VhostUserServer, WriteTracker};
use whimbrel_host::guest::binary::QemuBinary;
use whimbrel_host::guest::device_state::{Loader, Saver};
use whimbrel_host::guest::dirty::Tracker;
use whimbrel_host::guest::inject::userfaultfd_of;
use whimbrel_host::guest::launch::{DiskKind, DiskSocket, LaunchPlan};
use whimbrel_host::guest::precheck::{HostFacts, precheck};
use whimbrel_host::memory::bitmap::{PAGE_BYTES, PageBitmap, SharedDirty};
use whimbrel_wire::meta::Mode;

use crate::support::{RAM_BYTES, Wanted, plan, qemus, start_plan};

/// The guest, a boot sector. Made with `as --32`: for n = 1, 2, …: fills a sector with n, writes it to sector
/// 1 + n % 64 (INT 13h, AH = 43h), reads it back elsewhere (AH = 42h), compares, and prints `.` if it is right and
/// `E` if it is not or either call failed.
const DISK_CHECKER: [u8; 140] = [
    0xfa, 0x31, 0xc0, 0x8e, 0xd8, 0x8e, 0xc0, 0x8e, 0xd0, 0xbc, 0x00, 0x7c, 0xfb, 0xfc, 0x88, 0x16, 0x75,
    0x7c, 0x66, 0x31, 0xdb, 0x66, 0x43, 0xbf, 0x00, 0x80, 0xb9, 0x80, 0x00, 0x66, 0x89, 0xd8, 0x66, 0xf3,
    0xab, 0x66, 0x89, 0xd8, 0x66, 0x83, 0xe0, 0x3f, 0x66, 0x40, 0x66, 0xa3, 0x80, 0x7c, 0xc7, 0x06, 0x7c,
    0x7c, 0x00, 0x80, 0xb8, 0x00, 0x43, 0xe8, 0x26, 0x00, 0xc7, 0x06, 0x7c, 0x7c, 0x00, 0x90, 0xb8, 0x00,
    0x42, 0xe8, 0x1a, 0x00, 0x66, 0x39, 0x1e, 0x00, 0x90, 0x75, 0x0b, 0x66, 0x39, 0x1e, 0xfc, 0x91, 0x75,
    0x04, 0xb0, 0x2e, 0xeb, 0x02, 0xb0, 0x45, 0xba, 0xf8, 0x03, 0xee, 0xeb, 0xb3, 0x66, 0x53, 0x8a, 0x16,
    0x75, 0x7c, 0xbe, 0x78, 0x7c, 0xcd, 0x13, 0x66, 0x5b, 0x73, 0x03, 0x58, 0xeb, 0xe6, 0xc3, 0x00, 0x66,
    0x90, 0x10, 0x00, 0x01, 0x00, 0x00, 0x80, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00,
    0x00, 0x00, 0x00, 0x00,
];

/// A disk in RAM.
struct RamDisk(Mutex<Vec<u8>>);

impl RamDisk {
    fn bootable() -> Arc<Self> {
        let mut bytes = vec![0; 1 << 20];
        bytes[..DISK_CHECKER.len()].copy_from_slice(&DISK_CHECKER);
        bytes[510..512].copy_from_slice(&[0x55, 0xaa]);
        Arc::new(Self(Mutex::new(bytes)))
    }
}

impl BlockRead for RamDisk {
    fn size_bytes(&self) -> u64 {
        self.0.lock().len() as u64
    }
    fn read(&self, offset: u64, into: &mut [IoSliceMut<'_>]) -> Result<()> {
        let mut at = offset as usize;
        for part in into {
            let length = part.len();
            part.copy_from_slice(&self.0.lock()[at..at + length]);
            at += length;
        }
        Ok(())
    }
    fn read_now(&self, offset: u64, into: &mut [IoSliceMut<'_>]) -> Result<bool> {
        self.read(offset, into).map(|()| true)
    }
    fn extent(&self, offset: u64) -> Result<Extent> {
        Ok(Extent { length: self.size_bytes() - offset, data: true })
    }
}

impl BlockDev for RamDisk {
    fn write(&self, offset: u64, from: &[IoSlice<'_>]) -> Result<()> {
        let mut at = offset as usize;
        for part in from {
            self.0.lock()[at..at + part.len()].copy_from_slice(part);
            at += part.len();
        }
        Ok(())
    }
    fn flush(&self) -> Result<()> {
        Ok(())
    }
    fn discard(&self, _offset: u64, _length: u64) -> Result<()> {
        Ok(())
    }
    fn write_zeroes(&self, offset: u64, length: u64) -> Result<()> {
        self.0.lock()[offset as usize..(offset + length) as usize].fill(0);
        Ok(())
    }
    fn write_now(&self, offset: u64, from: &[IoSlice<'_>]) -> Result<bool> {
        self.write(offset, from).map(|()| true)
    }
}

fn disk_plan(qemu: &QemuBinary, wanted: &Wanted, files: &Path, socket: &Path) -> LaunchPlan {
    let mut plan = plan(qemu, wanted, files);
    plan.spec.kernel = None;
    plan.spec.volumes = vec!["root".parse().unwrap()];
    let (id, socket_path) = ("root".parse().unwrap(), socket.to_owned());
    plan.disks = vec![DiskSocket { id, socket_path, kind: DiskKind::VhostUserBlk }];
    plan
}

fn merge(dirty: &mut PageBitmap, written: &SharedDirty, from: &std::fs::File, to: &mut [u8]) {
    written.drain_into(dirty);
    for range in dirty.take().iter_ranges() {
        let (start, end) = (range.start as usize * PAGE_BYTES, range.end as usize * PAGE_BYTES);
        from.read_exact_at(&mut to[start..end], start as u64).unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_with_a_busy_disk_moves_and_neither_memory_nor_disk_goes_back_in_time() {
    for qemu in qemus().await {
        let files = tempfile::tempdir().unwrap();
        let disk = RamDisk::bootable();
        let serve = |name: &str, slot| {
            VhostUserServer::start(&files.path().join(name), slot, VhostUserOptions::default()).unwrap()
        };
        let server = serve("source", DeviceSlot::active(disk.clone()));
        let wanted = Wanted { name: "source", ..Wanted::default() };
        let source = start_plan(|files| disk_plan(&qemu, &wanted, files, server.path()), &wanted).await;
        source.prints(200).await;

        let (qmp, process) = (&source.started.qmp, &source.started.process);
        let facts = HostFacts { disk_sockets: vec![server.path().to_owned()], ..HostFacts::probe() };
        let report = precheck(qmp, process, &facts).await.unwrap();
        assert_eq!(report.mode, Some(Mode::A), "{report:#?}");
        assert!(report.disks.iter().all(|disk| disk.ours) && report.disks.len() == 1, "{report:#?}");
        let stranger = precheck(qmp, process, &HostFacts::probe()).await.unwrap();
        assert_eq!(stranger.mode, Some(Mode::B), "served by nobody we know: {stranger:#?}");

        let ram = source.ram();
        let pages = RAM_BYTES / PAGE_BYTES as u64;
        let (device, inode) = (ram.metadata().unwrap().dev(), ram.metadata().unwrap().ino());
        let written = Arc::new(SharedDirty::new(pages));
        server.track_writes(Some(WriteTracker { device, inode, dirty: written.clone() }));
        let injected = userfaultfd_of(qmp, process).await.unwrap();
        let mappings = &report.ram.iter().find(|block| block.path.is_some()).unwrap().mappings;
        let mut tracker = Tracker::attach(process.pid(), injected.uffd, &ram, mappings).unwrap();
        let (mut dirty, mut image) = (PageBitmap::new(pages), vec![0; RAM_BYTES as usize]);
        for _ in 0..10 {
            tracker.scan(&mut dirty).unwrap();
            merge(&mut dirty, &written, &ram, &mut image);
            source.prints(20).await;
        }
        qmp.stop().await.unwrap();
        let state = Saver::new(qmp).await.unwrap().save().await.unwrap();
        server.slot().fence(Duration::from_secs(5)).unwrap();
        tracker.scan(&mut dirty).unwrap();
        merge(&mut dirty, &written, &ram, &mut image);
        let mut at_pause = vec![0; RAM_BYTES as usize];
        ram.read_exact_at(&mut at_pause, 0).unwrap();
        assert!(image == at_pause, "a page that the guest or its disk's server wrote was missed");

        // A target that fails leaves a source that goes on.
        server.slot().activate(disk.clone()).unwrap();
        qmp.cont().await.unwrap();
        source.prints(50).await;
        qmp.stop().await.unwrap();
        let state_again = Saver::new(qmp).await.unwrap().save().await.unwrap();
        server.slot().fence(Duration::from_secs(5)).unwrap();
        assert!(state_again.len() > state.len() / 2);
        ram.read_exact_at(&mut image, 0).unwrap();

        let other = serve("target", DeviceSlot::standby(disk.size_bytes()));
        let wanted = Wanted { name: "target", incoming: true, ram: Some(image), ..Wanted::default() };
        let target = start_plan(|files| disk_plan(&qemu, &wanted, files, other.path()), &wanted).await;
        Loader::new(&target.started.qmp).await.unwrap().load(&state_again).await.unwrap();
        other.slot().activate(disk.clone()).unwrap();
        target.started.qmp.cont().await.unwrap();
        target.prints(200).await;
        for vm in [&source, &target] {
            let said = std::fs::read_to_string(vm.plan.console_log_path()).unwrap();
            assert!(!said.contains('E'), "{qemu}: the disk was wrong: {said}");
        }
        println!("{qemu}: device state of {} bytes, {:?}", state.len(), other.counters());
    }
}
