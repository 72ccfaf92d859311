//! A guest whose writes are followed in groups: nothing is missed, and it goes on when the agent that serves its faults
//! dies. What following writes costs it.

use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use whimbrel_engine::memory::page_group::Capture as Way;
use whimbrel_host::guest::capture::Capture;
use whimbrel_host::guest::inject::{serving_userfaultfd_of, userfaultfd_of};
use whimbrel_host::guest::precheck::{HostFacts, precheck};
use whimbrel_host::guest::process::QemuProcess;
use whimbrel_host::guest::qmp::Qmp;
use whimbrel_host::memory::bitmap::{PAGE_BYTES, PageBitmap};

use crate::support::{RAM_BYTES, TestVm, Wanted, qemus, start};

const PAGES: u64 = RAM_BYTES / PAGE_BYTES as u64;

async fn descriptor(way: Way, qmp: &Qmp, process: &QemuProcess) -> std::os::fd::OwnedFd {
    let injected = match way {
        Way::Pages => userfaultfd_of(qmp, process).await.unwrap(),
        Way::Groups => serving_userfaultfd_of(qmp, process).await.unwrap(),
    };
    injected.uffd
}

async fn follow(way: Way, qmp: &Qmp, process: &QemuProcess, ram: &std::fs::File) -> Capture {
    let report = precheck(qmp, process, &HostFacts::probe()).await.unwrap();
    let mappings = &report.ram.iter().find(|block| block.path.is_some()).unwrap().mappings;
    let uffd = descriptor(way, qmp, process).await;
    Capture::attach(way, process.pid(), uffd, ram, mappings).unwrap()
}

fn copy(dirty: &mut PageBitmap, from: &std::fs::File, to: &mut [u8]) {
    for range in dirty.take().iter_ranges() {
        let (start, end) = (range.start as usize * PAGE_BYTES, range.end as usize * PAGE_BYTES);
        from.read_exact_at(&mut to[start..end], start as u64).unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn memory_followed_in_groups_and_one_by_one_in_turn_is_copied_whole() {
    for qemu in qemus().await {
        let vm = start(&qemu, Wanted { name: "groups", ..Wanted::default() }).await;
        vm.prints(50).await;
        let (qmp, process, ram) = (&vm.started.qmp, &vm.started.process, vm.ram());
        let mut capture = follow(Way::Groups, qmp, process, &ram).await;
        let (mut dirty, mut image) = (PageBitmap::new(PAGES), vec![0; RAM_BYTES as usize]);
        for round in 0..12 {
            capture.scan(&mut dirty).unwrap();
            copy(&mut dirty, &ram, &mut image);
            if round % 4 == 3 {
                let next = if capture.way() == Way::Groups { Way::Pages } else { Way::Groups };
                let uffd = descriptor(next, qmp, process).await;
                capture.switch(uffd, &mut dirty).unwrap();
            }
            vm.prints(3).await;
        }
        qmp.stop().await.unwrap();
        capture.scan(&mut dirty).unwrap();
        copy(&mut dirty, &ram, &mut image);
        let mut real = vec![0; RAM_BYTES as usize];
        ram.read_exact_at(&mut real, 0).unwrap();
        println!("{qemu}: {:?}, {:?}", capture.faults(), capture.switches());
        assert!(image == real, "{qemu}: a written page was missed");
        assert!(capture.faults().faults > 0 && capture.switches().count == 3);
        capture.detach().unwrap();
        qmp.cont().await.unwrap();
        vm.prints(20).await;
    }
}

/// Where the helper process leaves what it knows.
const HOLDER_DIR: &str = "WHIMBREL_TEST_HOLDER";

/// Runs in a process of its own: starts a VM, serves its faults, and is stopped and killed by the test below.
#[tokio::test(flavor = "multi_thread")]
async fn holder_of_a_guests_faults() {
    let Some(dir) = std::env::var_os(HOLDER_DIR).map(PathBuf::from) else { return };
    let qemu = qemus().await.remove(0);
    let vm = start(&qemu, Wanted { name: "held", ..Wanted::default() }).await;
    vm.prints(20).await;
    let ram = vm.ram();
    let mut capture = follow(Way::Groups, &vm.started.qmp, &vm.started.process, &ram).await;
    let says = format!("{} {}", vm.started.process.pid(), vm.plan.console_log_path().display());
    std::fs::write(dir.join("new"), says).unwrap();
    std::fs::rename(dir.join("new"), dir.join("vm")).unwrap();
    let mut dirty = PageBitmap::new(PAGES);
    loop {
        capture.scan(&mut dirty).unwrap();
        dirty.clear();
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn printed(log: &Path) -> u64 {
    std::fs::metadata(log).map_or(0, |file| file.len())
}

#[tokio::test(flavor = "multi_thread")]
async fn the_death_of_the_agent_that_serves_its_faults_lets_the_guest_go_on() {
    let dir = tempfile::tempdir().unwrap();
    let mut helper = Command::new(std::env::current_exe().unwrap());
    helper.args(["--exact", "groups::holder_of_a_guests_faults", "--nocapture"]);
    let helper = helper.env(HOLDER_DIR, dir.path()).stdout(Stdio::null()).spawn().unwrap();
    let mut helper = Killed(helper);
    let deadline = Instant::now() + Duration::from_secs(60);
    while !dir.path().join("vm").exists() {
        assert!(
            Instant::now() < deadline && helper.0.try_wait().unwrap().is_none(),
            "the helper is not ready"
        );
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let says = std::fs::read_to_string(dir.path().join("vm")).unwrap();
    let (qemu, log) = says.split_once(' ').unwrap();
    let (qemu, log) = (QemuProcess::open(qemu.parse().unwrap()).unwrap(), PathBuf::from(log));
    let goes_on = async |more: u64, within: Duration| {
        let (before, until) = (printed(&log), Instant::now() + within);
        while Instant::now() < until && printed(&log) < before + more {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        printed(&log) >= before + more
    };
    assert!(goes_on(5, Duration::from_secs(20)).await, "served, the guest runs");
    let helper_pid = rustix::process::Pid::from_child(&helper.0);
    rustix::process::kill_process(helper_pid, rustix::process::Signal::STOP).unwrap();
    // The next write to an armed page waits for a handler that does not run.
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert!(!goes_on(1, Duration::from_secs(1)).await, "the guest waits for nobody: this test shows nothing");
    helper.0.kill().unwrap();
    helper.0.wait().unwrap();
    let released = goes_on(20, Duration::from_secs(20)).await;
    rustix::process::pidfd_send_signal(qemu.pidfd(), rustix::process::Signal::KILL).unwrap();
    assert!(released, "the guest still waits");
    let ram =
        format!("/dev/shm/whimbrel-test-{}", log.ancestors().nth(2).unwrap().file_name().unwrap().display());
    let _ = std::fs::remove_file(ram);
    let _ = std::fs::remove_dir_all(log.ancestors().nth(2).unwrap());
}

/// Prints the guest's part of the table of `docs/memory.md`:
/// `cargo test -p whimbrel-host --test guest what_following_writes_costs_a_guest -- --ignored --nocapture`.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "a measurement"]
async fn what_following_writes_costs_a_guest() {
    for qemu in qemus().await {
        let vm = start(&qemu, Wanted { name: "cost", ..Wanted::default() }).await;
        vm.prints(200).await;
        println!("| {qemu} | million writes/s | served faults/s | wasted |");
        // In turns: the speed of a shared machine changes.
        for _ in 0..3 {
            for way in [None, Some(Way::Pages), Some(Way::Groups)] {
                measure(&vm, way).await;
            }
        }
    }
}

async fn measure(vm: &TestVm, way: Option<Way>) {
    const WRITES_PER_PRINT: f64 = 16384.0;
    let ram = vm.ram();
    let mut capture = match way {
        Some(way) => Some(follow(way, &vm.started.qmp, &vm.started.process, &ram).await),
        None => None,
    };
    let mut dirty = PageBitmap::new(PAGES);
    if let Some(capture) = &mut capture {
        capture.scan(&mut dirty).unwrap();
    }
    let (started, before, mut resent) = (Instant::now(), vm.printed(), 0);
    while started.elapsed() < Duration::from_secs(3) {
        tokio::time::sleep(Duration::from_millis(100)).await;
        dirty.clear();
        if let Some(capture) = &mut capture {
            capture.scan(&mut dirty).unwrap();
            resent += dirty.count();
        }
    }
    let seconds = started.elapsed().as_secs_f64();
    let rate = (vm.printed() - before) as f64 * WRITES_PER_PRINT / seconds / 1e6;
    let faults = capture.as_ref().map(Capture::faults).unwrap_or_default();
    println!(
        "| {way:?} | {rate:.2} | {:.0} | {:.0} % | groups of {}, {:.0} pages/s sent again |",
        faults.faults as f64 / seconds,
        faults.unchanged_pages as f64 / faults.sampled_pages.max(1) as f64 * 100.0,
        faults.group_pages,
        resent as f64 / seconds,
    );
    if let Some(capture) = capture {
        capture.detach().unwrap();
    }
}
