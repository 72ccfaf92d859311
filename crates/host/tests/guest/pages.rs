//! Mode A's data path on real QEMU: rounds of the pages that the tracker names, while the guest writes, decided by
//! the engine; then the device state, and the target carries on.

use std::time::Duration;

use crate::support::{TestVm, Wanted, qemus, start};
use whimbrel_engine::memory::precopy::{Decision, Policy, Precopy, WhenStuck};
use whimbrel_host::guest::device_state::{Loader, Saver};
use whimbrel_host::guest::dirty::Tracker;
use whimbrel_host::guest::inject::userfaultfd_of;
use whimbrel_host::guest::precheck::{HostFacts, precheck};
use whimbrel_host::memory::{Progress, RamFile, Source, SourceOptions, TargetOptions, target};

async fn tracker(vm: &TestVm) -> Tracker {
    let (qmp, process) = (&vm.started.qmp, &vm.started.process);
    let report = precheck(qmp, process, &HostFacts::probe()).await.unwrap();
    let ram = report.ram.iter().find(|block| block.path.is_some()).unwrap();
    let injected = userfaultfd_of(qmp, process).await.unwrap();
    Tracker::attach(process.pid(), injected.uffd, &vm.ram(), &ram.mappings).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn rounds_over_a_stream_move_a_writing_guest_with_equal_ram() {
    for qemu in qemus().await {
        let from = start(&qemu, Wanted { name: "source", ..Wanted::default() }).await;
        let to = start(&qemu, Wanted { name: "target", incoming: true, ..Wanted::default() }).await;
        from.prints(20).await;
        let mut tracker = tracker(&from).await;
        let (near, mut far) = tokio::io::duplex(256 << 10);
        let ram = RamFile::open_target("ram", &to.plan.ram_path).unwrap();
        let receiving = tokio::spawn(async move {
            target::receive(&mut far, vec![ram], &TargetOptions::default(), &Progress::default()).await
        });
        let ram = RamFile::open_source("ram", &from.plan.ram_path).unwrap();
        let progress = Progress::default();
        let mut source =
            Source::open(near, vec![ram], SourceOptions::default(), progress.clone()).await.unwrap();

        let mut precopy = Precopy::new(Policy {
            when_stuck: WhenStuck::PauseAnyway,
            patience_ms: 2_000,
            ..Policy::new(100)
        });
        let mut sets = source.full_sets();
        // Re-armed before the first page is read.
        tracker.scan(&mut sets[0]).unwrap();
        loop {
            let report = source.send_round(&sets, false).await.unwrap();
            sets = source.empty_sets();
            tracker.scan(&mut sets[0]).unwrap();
            println!("{qemu}: {report:?}, then {:?}", sets[0]);
            match precopy.after_round(&report.to_engine(sets[0].count(), 0)) {
                Decision::Continue { .. } => {}
                Decision::Pause { .. } => break,
                Decision::NotConverging(stuck) => panic!("{stuck}"),
            }
        }
        from.started.qmp.stop().await.unwrap();
        let state = Saver::new(&from.started.qmp).await.unwrap().save().await.unwrap();
        tracker.scan(&mut sets[0]).unwrap();
        assert!(!sets[0].is_empty(), "the guest writes all the time");
        let last = source.send_round(&sets, true).await.unwrap();
        println!("{qemu}: last {last:?}");
        source.compare_digests().await.expect("the target's RAM is the source's at the pause");
        source.close().await.unwrap();
        assert!(receiving.await.unwrap().unwrap().complete);
        tracker.detach().unwrap();

        Loader::new(&to.started.qmp).await.unwrap().load(&state).await.unwrap();
        to.started.qmp.cont().await.unwrap();
        to.prints(20).await;
        tokio::time::sleep(Duration::from_millis(10)).await;
        assert_eq!(progress.get().left_pages, 0);
    }
}
