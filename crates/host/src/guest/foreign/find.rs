//! Which process answers on a QMP socket.
//!
//! ```text
//!   peer of the socket (whoever called listen) ──┐
//!   thread-id of a virtual processor (QMP) ──────┴─► the process that has that thread
//! ```
//!
//! Invariant: the process has the threads that QMP speaks of, and holds the socket or made it; a pid from another
//! namespace, or of a program that only passes QMP on, is refused.

use std::fs;
use std::path::Path;

use serde_json::{Value, json};

use crate::error::{Context as _, Error, ErrorKind, Result};
use crate::guest::proc_fs;
use crate::guest::process::QemuProcess;
use crate::guest::qmp::Qmp;

/// The QEMU behind a QMP connection.
pub async fn process_behind(qmp: &Qmp) -> Result<QemuProcess> {
    let action = || format!("find the process behind {}", qmp.path().display());
    let cpus: Vec<Value> = qmp.execute("query-cpus-fast", json!({})).await?;
    let thread = cpus.first().and_then(|cpu| cpu.get("thread-id")).and_then(Value::as_u64);
    let thread = thread
        .ok_or_else(|| Error::new(ErrorKind::Unsupported, format!("{}: QEMU names no thread", action())))?;
    let has_thread = |pid: u32| Path::new(&format!("/proc/{pid}/task/{thread}")).exists();
    if let Some(pid) = qmp.peer_pid().filter(|pid| has_thread(*pid)) {
        return QemuProcess::open(pid).with_context(action);
    }
    // The socket was made by somebody else and handed over (as libvirt does): the thread's process must hold it.
    let owner = u32::try_from(thread).ok().and_then(|thread| proc_fs::status(thread, "Tgid").ok());
    let owner = owner.and_then(|text| text.parse::<u32>().ok());
    match owner {
        Some(pid) if holds(pid, qmp.path())? => QemuProcess::open(pid).with_context(action),
        _ => Err(Error::new(
            ErrorKind::Unsupported,
            format!("{}: no process of this host has both that socket and thread {thread}", action()),
        )
        .hint("the agent must see QEMU's process: run both in the same pid namespace")),
    }
}

/// Whether a process has a descriptor of the socket that is bound to `path`.
fn holds(pid: u32, path: &Path) -> Result<bool> {
    let table = format!("/proc/{pid}/net/unix");
    let text = fs::read_to_string(&table).with_context(|| format!("read {table}"))?;
    let inodes = inodes_at(&text, &path.to_string_lossy());
    let open = proc_fs::descriptors(pid)?;
    Ok(open.iter().any(|(_, target)| {
        let target = target.to_string_lossy();
        let inode = target.strip_prefix("socket:[").and_then(|text| text.strip_suffix(']'));
        inode.is_some_and(|inode| inodes.iter().any(|one| one == inode))
    }))
}

/// Inodes of sockets bound to a path, from `/proc/net/unix`: `Num RefCount Protocol Flags Type St Inode Path`.
fn inodes_at(table: &str, path: &str) -> Vec<String> {
    let parse = |line: &str| {
        let mut rest = line;
        for _ in 0..6 {
            rest = rest.trim_start().split_once(' ')?.1;
        }
        let (inode, place) = rest.trim_start().split_once(' ')?;
        (place == path).then(|| inode.to_owned())
    };
    table.lines().skip(1).filter_map(parse).collect()
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn sockets_are_found_by_their_path_blanks_and_all() {
        let table = "Num       RefCount Protocol Flags    Type St Inode Path\n\
            0000000000000000: 00000002 00000000 00010000 0001 01 22911 /run/a b/qmp.sock\n\
            0000000000000000: 00000003 00000000 00000000 0001 03 22954 /run/a b/qmp.sock\n\
            0000000000000000: 00000003 00000000 00000000 0001 03 22956\n";
        assert_eq!(inodes_at(table, "/run/a b/qmp.sock"), ["22911", "22954"]);
        assert!(inodes_at(table, "/run/a").is_empty());
        assert!(inodes_at("", "x").is_empty());
    }

    #[test]
    fn a_process_holds_what_it_listens_on() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
        assert!(holds(std::process::id(), &path).unwrap());
        drop(listener);
        assert!(!holds(std::process::id(), &path).unwrap());
    }
}
