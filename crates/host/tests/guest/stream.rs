//! Mode B on real QEMU: one QEMU's migration stream carried to another, in the order of the handover.

use std::sync::Arc;
use std::time::Duration;

use crate::support::{TestVm, Wanted, qemus, start};
use tokio::io::DuplexStream;
use whimbrel_engine::memory::precopy::{Decision, Policy, Precopy, WhenStuck};
use whimbrel_host::ErrorKind;
use whimbrel_host::memory::ram::digest;
use whimbrel_host::memory::stream::{Source, Step, StreamOptions, Target};
use whimbrel_host::memory::{Limiter, Progress, RamFile};

const LIMIT: Duration = Duration::from_secs(20);

fn options(bytes_s: Option<u64>) -> StreamOptions {
    StreamOptions::new(100, Arc::new(Limiter::new(bytes_s)))
}

async fn pair(from: &TestVm, to: &TestVm, options: &StreamOptions) -> (Source, Target, Progress) {
    let progress = Progress::default();
    let (near, far): (DuplexStream, _) = tokio::io::duplex(256 << 10);
    let target = Target::accept(to.started.qmp.clone(), far, &options.carry).await.unwrap();
    let source = Source::start(from.started.qmp.clone(), near, options, progress.clone()).await.unwrap();
    (source, target, progress)
}

/// Rounds until the engine, or QEMU, says that it is time to pause.
async fn copy(source: &mut Source) -> u32 {
    let policy = Policy { when_stuck: WhenStuck::PauseAnyway, patience_ms: 2_000, ..Policy::new(100) };
    let mut precopy = Precopy::new(policy);
    loop {
        match source.next_round().await.unwrap() {
            Step::Paused => return precopy.rounds(),
            Step::Round(round) => match precopy.after_round(&round) {
                Decision::Continue { .. } => {}
                Decision::Pause { .. } => return precopy.rounds(),
                Decision::NotConverging(stuck) => panic!("{stuck}"),
            },
        }
    }
}

fn hash(vm: &TestVm) -> blake3::Hash {
    digest(&[RamFile::new("ram", vm.ram()).unwrap()], 2).unwrap()
}

async fn vm(qemu: &whimbrel_host::guest::binary::QemuBinary, name: &'static str) -> TestVm {
    let vm = start(qemu, Wanted { name, incoming: name == "target", ..Wanted::default() }).await;
    if name == "source" {
        vm.prints(20).await;
    }
    vm
}

#[tokio::test(flavor = "multi_thread")]
async fn a_carried_stream_moves_the_guest_and_nothing_runs_before_it_may() {
    let qemus = qemus().await;
    for from in &qemus {
        for to in &qemus {
            let (from, to) = (vm(from, "source").await, vm(to, "target").await);
            let (mut source, mut target, progress) = pair(&from, &to, &options(None)).await;
            let rounds = copy(&mut source).await;
            source.pause(LIMIT).await.unwrap();
            let paused = std::time::Instant::now();
            source.finish(LIMIT).await.unwrap();
            target.wait_loaded(LIMIT).await.unwrap();
            let downtime = paused.elapsed();
            assert_eq!(hash(&from), hash(&to), "RAM differs after {} → {}", from.plan.qemu, to.plan.qemu);
            let figures = progress.get();
            println!("{} → {}: {rounds} rounds, {downtime:?}, {figures:?}", from.plan.qemu, to.plan.qemu);
            assert!(figures.data_pages >= 16_384, "{figures:?}");
            // Some 16 bytes around each piece, at most.
            assert!(figures.wire_bytes < figures.data_pages * 4200, "{figures:?}");
            let printed = (from.printed(), to.printed());
            tokio::time::sleep(Duration::from_millis(50)).await;
            assert_eq!((from.printed(), to.printed()), printed, "neither runs before the commit");
            to.started.qmp.cont().await.unwrap();
            to.prints(20).await;
            assert_eq!(from.printed(), printed.0);

            // As if the target had failed before the commit: the source was only paused.
            to.started.qmp.stop().await.unwrap();
            from.started.qmp.cont().await.unwrap();
            from.prints(5).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cancelled_stream_leaves_the_guest_running() {
    for qemu in qemus().await {
        let (from, to) = (vm(&qemu, "source").await, vm(&qemu, "target").await);
        // Slow enough to be in the middle, however little is left of it by compression.
        let (mut source, mut target, _) = pair(&from, &to, &options(Some(16 << 10))).await;
        let early = tokio::time::timeout(Duration::from_millis(500), source.next_round()).await;
        assert!(early.is_err(), "a slow link ended a round: {early:?}");
        source.cancel().await.unwrap();
        assert_eq!(from.started.qmp.run_state().await.unwrap(), "running");
        from.prints(10).await;
        assert!(target.wait_loaded(LIMIT).await.is_err());

        // The same guest can be moved afterwards, and be cancelled while it is paused.
        let to = vm(&qemu, "target").await;
        let (mut source, _target, _) = pair(&from, &to, &options(None)).await;
        copy(&mut source).await;
        source.pause(LIMIT).await.unwrap();
        source.cancel().await.unwrap();
        from.started.qmp.cont().await.unwrap();
        from.prints(10).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_link_or_target_leaves_the_guest_running_and_says_so() {
    for qemu in qemus().await {
        let (from, to) = (vm(&qemu, "source").await, vm(&qemu, "target").await);
        let (mut source, target, _) = pair(&from, &to, &options(Some(4 << 20))).await;
        let _ = tokio::time::timeout(Duration::from_millis(200), source.next_round()).await;
        drop(target);
        let error = tokio::time::timeout(LIMIT, source.next_round()).await.unwrap().unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unavailable, "{error}");
        assert_eq!(from.started.qmp.run_state().await.unwrap(), "running");

        let to = vm(&qemu, "target").await;
        let (mut source, mut target, _) = pair(&from, &to, &options(Some(4 << 20))).await;
        to.started.process.kill(Duration::from_secs(5)).await.unwrap();
        assert!(target.wait_loaded(LIMIT).await.is_err());
        drop(target);
        let error = tokio::time::timeout(LIMIT, source.next_round()).await.unwrap().unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unavailable, "{error}");
        from.prints(10).await;
    }
}
