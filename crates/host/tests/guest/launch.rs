//! Starting QEMU: as another user, found again, ended; and what is said when it does not start.

use std::os::unix::fs::MetadataExt;
use std::time::Duration;

use whimbrel_host::ErrorKind;
use whimbrel_host::guest::binary::Accel;
use whimbrel_host::guest::inject::userfaultfd_of;
use whimbrel_host::guest::process::{QemuProcess, remove_files, spawn};
use whimbrel_host::guest::qmp::Qmp;

use crate::support::{Wanted, plan, qemus, start};

/// `nobody` and `nogroup`.
const NOBODY: (u32, u32) = (65534, 65534);

fn parent_and_session(pid: u32) -> (u32, u32) {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap().split_whitespace().collect();
    (fields[1].parse().unwrap(), fields[3].parse().unwrap())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_vm_runs_as_its_own_user_in_its_own_session_and_is_found_again() {
    for qemu in qemus().await {
        let root = rustix::process::geteuid().is_root();
        let user = root.then_some(NOBODY);
        let vm = start(&qemu, Wanted { name: "user", user, ..Wanted::default() }).await;
        vm.prints(5).await;
        let process = &vm.started.process;
        let proc = std::fs::metadata(format!("/proc/{}", process.pid())).unwrap();
        let (parent, session) = parent_and_session(process.pid());
        assert_ne!(parent, std::process::id(), "a VM must not be the agent's child");
        assert_ne!(session, parent_and_session(std::process::id()).1);
        if std::path::Path::new("/run/systemd/system").is_dir() {
            let cgroup = std::fs::read_to_string(format!("/proc/{}/cgroup", process.pid())).unwrap();
            assert!(cgroup.contains("whimbrel-vms.slice/whimbrel-vm-user-"), "{cgroup}");
        }
        if let Some((uid, _)) = user {
            assert_eq!(proc.uid(), uid);
            assert_eq!(std::fs::metadata(&vm.plan.ram_path).unwrap().uid(), uid);
            // An unprivileged QEMU gets its userfaultfd too.
            userfaultfd_of(&vm.started.qmp, process).await.unwrap();
        }

        // As after a restart of the agent.
        let again = QemuProcess::reattach(process.id()).unwrap().expect("it runs");
        let operator = Qmp::connect(&vm.plan.operator_qmp_path(), Duration::from_secs(5)).await.unwrap();
        assert_eq!(operator.run_state().await.unwrap(), "running");
        let exit = async { tokio::time::timeout(Duration::from_secs(10), process.exited()).await };
        let (killed, exited) = tokio::join!(again.kill(Duration::from_secs(10)), exit);
        killed.unwrap();
        exited.expect("its end is noticed").unwrap();
        assert!(QemuProcess::reattach(process.id()).unwrap().is_none());
        assert_eq!(operator.run_state().await.unwrap_err().kind(), ErrorKind::Unavailable);
        remove_files(&vm.plan.run_dir, &vm.plan.ram_path).unwrap();
        remove_files(&vm.plan.run_dir, &vm.plan.ram_path).unwrap();
        assert!(!vm.plan.ram_path.exists() && !vm.plan.run_dir.exists());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_qemu_that_does_not_start_says_why_and_a_foreign_ram_file_is_not_taken() {
    for qemu in qemus().await {
        let files = tempfile::tempdir().unwrap();
        let wanted =
            Wanted { name: "bad", qemu_args: vec!["-no-such-option".to_owned()], ..Wanted::default() };
        let bad = plan(&qemu, &wanted, files.path());
        let error = spawn(&bad).await.unwrap_err();
        assert!(error.to_string().contains("no-such-option"), "{error}");
        let error = spawn(&bad).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::AlreadyExists, "{error}");
        remove_files(&bad.run_dir, &bad.ram_path).unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn tcg_works_everywhere_and_kvm_is_believed_only_after_a_guest_ran() {
    for qemu in qemus().await {
        assert!(qemu.accel_works(Accel::Tcg).await, "{qemu}");
        let machine = qemu.newest_machine().await.unwrap();
        assert!(machine.starts_with("pc-q35-"), "{machine}");
        assert!(qemu.cpu_models().await.unwrap().contains(&"qemu64".to_owned()));
        println!("{qemu}: newest {machine}, best {:?}", qemu.best_accel().await);
    }
}
