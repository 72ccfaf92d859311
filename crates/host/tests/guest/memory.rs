//! Mode A's two halves on real QEMU: pages written are seen from outside, and device state goes over to another
//! process that carries on with the copied memory.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::time::Duration;

use crate::support::{RAM_BYTES, TestVm, Wanted, qemus, start};
use whimbrel_host::guest::device_state::{self, Loader, Saver};
use whimbrel_host::guest::dirty::Tracker;
use whimbrel_host::guest::inject::userfaultfd_of;
use whimbrel_host::guest::precheck::{HostFacts, precheck};
use whimbrel_host::memory::bitmap::{PAGE_BYTES, PageBitmap};
use whimbrel_wire::meta::Mode;

/// Copies the pages of `dirty` from the RAM file.
fn copy(dirty: &mut PageBitmap, from: &File, to: &mut [u8]) -> u64 {
    let pages = dirty.count();
    for range in dirty.take().iter_ranges() {
        let (start, end) = (range.start as usize * PAGE_BYTES, range.end as usize * PAGE_BYTES);
        from.read_exact_at(&mut to[start..end], start as u64).unwrap();
    }
    pages
}

fn all_of(file: &File) -> Vec<u8> {
    let mut bytes = vec![0; RAM_BYTES as usize];
    file.read_exact_at(&mut bytes, 0).unwrap();
    bytes
}

async fn tracker(vm: &TestVm) -> Tracker {
    let (qmp, process) = (&vm.started.qmp, &vm.started.process);
    let report = precheck(qmp, process, &HostFacts::probe()).await.unwrap();
    assert_eq!(report.mode, Some(Mode::A), "{report:#?}");
    let ram = report.ram.iter().find(|block| block.path.is_some()).unwrap();
    let injected = userfaultfd_of(qmp, process).await.unwrap();
    println!("{}: stopped for {:?}", vm.plan.qemu, injected.stopped);
    Tracker::attach(process.pid(), injected.uffd, &vm.ram(), &ram.mappings).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn memory_copied_in_rounds_equals_the_source_at_the_pause_and_the_target_carries_on() {
    for qemu in qemus().await {
        let source = start(&qemu, Wanted { name: "source", ..Wanted::default() }).await;
        source.prints(50).await;
        let ram = source.ram();
        let mut tracker = tracker(&source).await;
        let mut dirty = PageBitmap::new(RAM_BYTES / PAGE_BYTES as u64);
        let mut image = vec![0; RAM_BYTES as usize];
        let first = tracker.scan(&mut dirty).unwrap();
        assert!(first.dirty_pages >= 16384, "the guest touched 64 MiB: {first:?}");
        assert!(first.dirty_pages < RAM_BYTES / PAGE_BYTES as u64, "the rest are holes: {first:?}");
        copy(&mut dirty, &ram, &mut image);
        for _ in 0..10 {
            source.prints(5).await;
            let stats = tracker.scan(&mut dirty).unwrap();
            assert!(stats.dirty_pages > 0, "the guest writes all the time");
            assert!(stats.dirty_pages < first.dirty_pages, "tracking says what was written, not everything");
            println!("{qemu}: {stats:?}, copied {}", copy(&mut dirty, &ram, &mut image));
        }
        source.prints(1).await;
        source.started.qmp.stop().await.unwrap();
        let at_pause = all_of(&ram);
        assert!(image != at_pause, "without the last round the copy is stale, else this test shows nothing");
        let state = Saver::new(&source.started.qmp).await.unwrap().save().await.unwrap();
        println!("{qemu}: device state of {} bytes", state.len());
        tracker.scan(&mut dirty).unwrap();
        copy(&mut dirty, &ram, &mut image);
        assert!(image == all_of(&ram), "a written page was missed");
        tracker.detach().unwrap();

        let wanted = Wanted { name: "target", incoming: true, ram: Some(image.clone()), ..Wanted::default() };
        let target = start(&qemu, wanted).await;
        Loader::new(&target.started.qmp).await.unwrap().load(&state).await.unwrap();
        assert!(image == all_of(&target.ram()), "loading device state changed RAM");
        let before = target.printed();
        tokio::time::sleep(Duration::from_millis(50)).await;
        assert_eq!(target.printed(), before, "the target is paused until told to run");
        target.started.qmp.cont().await.unwrap();
        device_state::announce_self(&target.started.qmp).await.unwrap();
        target.prints(20).await;

        // As if the target had failed: the source was only paused.
        source.started.qmp.cont().await.unwrap();
        source.prints(20).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_userfaultfd_is_made_within_two_milliseconds_and_leaves_no_trace() {
    for qemu in qemus().await {
        let vm = start(&qemu, Wanted { name: "inject", ..Wanted::default() }).await;
        vm.prints(5).await;
        let descriptors =
            || std::fs::read_dir(format!("/proc/{}/fd", vm.started.process.pid())).unwrap().count();
        let before = descriptors();
        let mut stops = Vec::new();
        for _ in 0..21 {
            stops.push(userfaultfd_of(&vm.started.qmp, &vm.started.process).await.unwrap().stopped);
        }
        stops.sort();
        println!("{qemu}: median {:?}, worst {:?}", stops[10], stops[20]);
        assert!(stops[10] < Duration::from_millis(2), "{stops:?}");
        assert_eq!(descriptors(), before);
        // A range has one userfaultfd at a time: a second tracker shows that nothing is left of the first, whether
        // it was detached or just closed, as by an agent that dies.
        for detach in [true, false] {
            let tracker = tracker(&vm).await;
            if detach { tracker.detach().unwrap() } else { drop(tracker) }
        }
        let _third = tracker(&vm).await;
        vm.prints(5).await;
        assert_eq!(vm.started.qmp.run_state().await.unwrap(), "running");
    }
}
