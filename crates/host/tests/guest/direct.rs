//! Direct I/O into guest memory: a guest reads a slow disk past the page cache while its memory is copied in rounds.
//! Without a grace period between a scan and the copy, bytes that arrive after the scan are lost.

use std::io::{IoSlice, IoSliceMut};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use whimbrel_host::Result;
use whimbrel_host::block_dev::{BlockDev, BlockRead, Extent};
use whimbrel_host::export::DeviceSlot;
use whimbrel_host::export::fuse::{FileDir, FileExport, FileOptions};
use whimbrel_host::guest::binary::QemuBinary;
use whimbrel_host::guest::dirty::Tracker;
use whimbrel_host::guest::drain::Drains;
use whimbrel_host::guest::inject::userfaultfd_of;
use whimbrel_host::guest::precheck::{HostFacts, precheck};
use whimbrel_host::memory::bitmap::{PAGE_BYTES, PageBitmap};
use whimbrel_wire::meta::Mode;

use crate::support::{RAM_BYTES, TestVm, Wanted, plan, qemus, start_plan};

/// The guest, a boot sector. Made with `as --32`: for n = 1, 2, …: reads 4 KiB from sector 8 × (1 + n % 8) into page
/// 0x20 + n % 16 (INT 13h, AH = 42h), and prints `.`, or `E` if that failed. Nothing else ever writes to these pages.
const DISK_READER: [u8; 144] = [
    0xfa, 0x31, 0xc0, 0x8e, 0xd8, 0x8e, 0xc0, 0x8e, 0xd0, 0xbc, 0x00, 0x7c, 0xfb, 0xfc, 0x88, 0x16, 0x70,
    0x7c, 0x66, 0x31, 0xdb, 0x66, 0x43, 0x66, 0x89, 0xd8, 0x66, 0x83, 0xe0, 0x07, 0x66, 0x40, 0x66, 0xc1,
    0xe0, 0x03, 0x66, 0xa3, 0x88, 0x7c, 0x89, 0xd8, 0x83, 0xe0, 0x0f, 0xc1, 0xe0, 0x08, 0x05, 0x00, 0x20,
    0xa3, 0x86, 0x7c, 0x66, 0x53, 0x8a, 0x16, 0x70, 0x7c, 0xb4, 0x42, 0xbe, 0x80, 0x7c, 0xcd, 0x13, 0x66,
    0x5b, 0xb0, 0x2e, 0x73, 0x02, 0xb0, 0x45, 0xba, 0xf8, 0x03, 0xee, 0xeb, 0xc4, 0x00, 0x00, 0x00, 0x00,
    0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00,
    0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00,
    0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x10, 0x00, 0x08, 0x00, 0x00, 0x00, 0x00, 0x00,
    0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00,
];
const DISK_BYTES: u64 = 1 << 20;
/// How long a read takes, but for the boot sector's.
const SLOW: Duration = Duration::from_millis(200);

/// A disk that reads slowly, and gives other bytes each time.
#[derive(Default)]
struct SlowDisk {
    reads: AtomicU64,
}

impl BlockRead for SlowDisk {
    fn size_bytes(&self) -> u64 {
        DISK_BYTES
    }
    fn read(&self, offset: u64, into: &mut [IoSliceMut<'_>]) -> Result<()> {
        let mut sector = [0; PAGE_BYTES];
        if offset < PAGE_BYTES as u64 {
            sector[..DISK_READER.len()].copy_from_slice(&DISK_READER);
            sector[510..512].copy_from_slice(&[0x55, 0xaa]);
        } else {
            std::thread::sleep(SLOW);
        }
        for (at, byte) in (offset as usize..).zip(into.iter_mut().flat_map(|part| part.iter_mut())) {
            if at >= PAGE_BYTES && at.is_multiple_of(PAGE_BYTES) {
                sector.fill((self.reads.fetch_add(1, Ordering::Relaxed) % 251) as u8 + 1);
            }
            *byte = sector[at % PAGE_BYTES];
        }
        Ok(())
    }
    fn read_now(&self, _offset: u64, _into: &mut [IoSliceMut<'_>]) -> Result<bool> {
        Ok(false)
    }
    fn extent(&self, offset: u64) -> Result<Extent> {
        Ok(Extent { length: DISK_BYTES - offset, data: true })
    }
}

impl BlockDev for SlowDisk {
    fn write(&self, _offset: u64, _from: &[IoSlice<'_>]) -> Result<()> {
        Ok(())
    }
    fn flush(&self) -> Result<()> {
        Ok(())
    }
    fn discard(&self, _offset: u64, _length: u64) -> Result<()> {
        Ok(())
    }
    fn write_zeroes(&self, _offset: u64, _length: u64) -> Result<()> {
        Ok(())
    }
    fn write_now(&self, _offset: u64, _from: &[IoSlice<'_>]) -> Result<bool> {
        Ok(true)
    }
}

async fn reader(qemu: &QemuBinary, file: &Path, cache: &str) -> TestVm {
    let qemu_args = vec![
        "-drive".to_owned(),
        format!("file={},format=raw,if=none,id=d0,cache={cache},aio=threads", file.display()),
        "-device".to_owned(),
        "virtio-blk-pci,drive=d0,bootindex=0".to_owned(),
    ];
    let wanted = Wanted { name: "reader", qemu_args, ..Wanted::default() };
    let make = |files: &Path| {
        let mut plan = plan(qemu, &wanted, files);
        plan.spec.kernel = None;
        plan
    };
    start_plan(make, &wanted).await
}

/// Copies a reading guest in rounds; gives the pages that differ from its RAM at the pause, and what the drains took.
async fn copied(vm: &TestVm, mut drains: Option<&mut Drains>) -> Vec<u64> {
    let (qmp, process) = (&vm.started.qmp, &vm.started.process);
    let report = precheck(qmp, process, &HostFacts::probe()).await.unwrap();
    assert_eq!(report.mode, Some(Mode::A), "{report:#?}");
    assert_eq!(report.direct_io.len(), 1, "{report:#?}");
    let mappings = &report.ram.iter().find(|block| block.path.is_some()).unwrap().mappings;
    let ram = vm.ram();
    let injected = userfaultfd_of(qmp, process).await.unwrap();
    let mut tracker = Tracker::attach(process.pid(), injected.uffd, &ram, mappings).unwrap();
    let (mut dirty, mut image) =
        (PageBitmap::new(RAM_BYTES / PAGE_BYTES as u64), vec![0; RAM_BYTES as usize]);
    let copy = |dirty: &mut PageBitmap, image: &mut Vec<u8>| {
        for range in dirty.take().iter_ranges() {
            let (start, end) = (range.start as usize * PAGE_BYTES, range.end as usize * PAGE_BYTES);
            ram.read_exact_at(&mut image[start..end], start as u64).unwrap();
        }
    };
    for _ in 0..6 {
        tracker.scan(&mut dirty).unwrap();
        if let Some(drains) = drains.as_deref_mut() {
            drains.pass().await.unwrap();
        }
        copy(&mut dirty, &mut image);
        tokio::time::sleep(SLOW / 3).await;
    }
    qmp.stop().await.unwrap();
    tracker.scan(&mut dirty).unwrap();
    copy(&mut dirty, &mut image);
    let mut at_pause = vec![0; RAM_BYTES as usize];
    ram.read_exact_at(&mut at_pause, 0).unwrap();
    qmp.cont().await.unwrap();
    let pages = image.chunks(PAGE_BYTES).zip(at_pause.chunks(PAGE_BYTES)).enumerate();
    pages.filter(|(_, (ours, real))| ours != real).map(|(page, _)| page as u64).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn direct_reads_that_end_after_a_scan_are_not_lost() {
    for qemu in qemus().await {
        // `writeback` too: a file on FUSE may be read directly although QEMU does not ask for it.
        for cache in ["none", "writeback"] {
            let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
            let files = FileDir::new(dir.path().join("files")).unwrap();
            let options = FileOptions { name: "slow".to_owned(), ..FileOptions::default() };
            let slot = DeviceSlot::active(Arc::new(SlowDisk::default()));
            let export = FileExport::start(&files, slot, options).unwrap();
            let vm = reader(&qemu, export.path(), cache).await;
            vm.prints(5).await;

            let lost = copied(&vm, None).await;
            assert!(
                !lost.is_empty(),
                "{qemu}, cache={cache}: nothing was lost without waiting: shows nothing"
            );
            assert!(
                lost.iter().all(|page| (0x20..0x30).contains(page)),
                "only direct reads are lost: {lost:x?}"
            );
            let mut drains = Drains::new(vm.started.qmp.clone());
            let after = copied(&vm, Some(&mut drains)).await;
            println!(
                "{qemu}, cache={cache}: without waiting {lost:x?} were lost, with {after:x?}; {:?}",
                drains.stats()
            );
            assert!(after.is_empty(), "{qemu}, cache={cache}: {after:x?} were lost in spite of waiting");
            assert!(drains.stats().longest > SLOW / 4, "a drain waits for a read: {:?}", drains.stats());
            assert_eq!(vm.started.qmp.run_state().await.unwrap(), "running");
            vm.prints(5).await;
            let said = std::fs::read_to_string(vm.plan.console_log_path()).unwrap();
            assert!(!said.contains('E'), "{qemu}: a read failed: {said}");
            drop(vm);
            export.stop().unwrap();
        }
    }
}
