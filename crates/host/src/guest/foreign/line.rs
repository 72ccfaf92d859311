//! The command line that starts an adopted VM's equal on this host.
//!
//! Invariant: what is not in [`ForeignArg::Words`] is ours: paths of this VM's directory, this host's RAM file and taps.

use std::ffi::OsString;
use std::os::fd::AsRawFd;

use serde_json::json;
use whimbrel_wire::foreign::{ForeignArg, ForeignBus, ForeignSpec};

use super::argv::Props;
use crate::error::{Error, ErrorKind, Result};
use crate::guest::launch::{LaunchPlan, Line, SANDBOX, quoted_path, reconnect};

/// Seconds that requests wait for a disk's server that is away.
pub(crate) const RECONNECT_DELAY_S: u32 = 3600;

/// The arguments of QEMU, without the program itself.
pub(in crate::guest) fn command_line(plan: &LaunchPlan, foreign: &ForeignSpec) -> Result<Vec<OsString>> {
    let mut line = Line::default();
    for dir in &plan.qemu.firmware {
        line.pair("-L", dir.as_os_str());
    }
    line.pair("-name", format!("guest={},debug-threads=on", plan.name));
    for (id, path) in [("whimbrel-qmp0", plan.qmp_path()), ("whimbrel-qmp1", plan.operator_qmp_path())] {
        let path = quoted_path(&path);
        line.pair("-chardev", format!("socket,id={id},path={path},server=on,wait=off"));
        line.pair("-mon", format!("chardev={id},mode=control"));
    }
    for arg in &foreign.args {
        argument(&mut line, plan, foreign, arg)?;
    }
    let sandboxed = |arg: &ForeignArg| matches!(arg, ForeignArg::Words(words) if words.first().is_some_and(|word| word == "-sandbox"));
    if !foreign.args.iter().any(sandboxed) {
        line.pair("-sandbox", SANDBOX);
    }
    if plan.incoming {
        line.pair("-incoming", "defer");
        // Stays paused until the move is committed.
        line.flag("-S");
    }
    Ok(line.arguments)
}

fn argument(line: &mut Line, plan: &LaunchPlan, foreign: &ForeignSpec, arg: &ForeignArg) -> Result<()> {
    match arg {
        ForeignArg::Words(words) => words.iter().for_each(|word| line.flag(word)),
        ForeignArg::Ram(object) => {
            let mut object = Props::parse(object, "qom-type").map_err(|why| corrupt(plan, &why))?;
            object.set("mem-path", plan.ram_path.to_string_lossy().into_owned());
            match &mut object {
                Props::Keys(_) => object.set("share", "on"),
                Props::Json(_) => object.set("share", true),
            }
            line.pair("-object", object.text());
        }
        ForeignArg::Socket { id, file, mux, console } => {
            let (path, log) = if *console {
                let log = quoted_path(&plan.console_log_path());
                (plan.console_path(), format!(",logfile={log},logappend=on"))
            } else {
                (plan.run_dir.join(plain(plan, file)?), String::new())
            };
            let (path, mux) = (quoted_path(&path), if *mux { ",mux=on" } else { "" });
            line.pair("-chardev", format!("socket,id={id},path={path},server=on,wait=off{mux}{log}"));
        }
        ForeignArg::Log { id, file } => {
            let path = quoted_path(&plan.run_dir.join(plain(plan, file)?));
            line.pair("-chardev", format!("file,id={id},path={path},append=on"));
        }
        ForeignArg::Screen => line.pair("-vnc", format!("unix:{}", quoted_path(&plan.screen_path()))),
        ForeignArg::Tap { net, id } => {
            let tap =
                plan.taps.get(*net as usize).ok_or_else(|| corrupt(plan, "there is no such network"))?;
            line.pair("-netdev", format!("tap,id={id},fd={},vhost=off", tap.as_raw_fd()));
        }
        ForeignArg::Disk(number) => {
            let number = *number as usize;
            let disk = plan.disks.get(number).zip(foreign.disks.get(number));
            let (disk, wanted) = disk.ok_or_else(|| corrupt(plan, "there is no such disk"))?;
            let path = disk.socket_path.to_string_lossy();
            match wanted.bus {
                ForeignBus::Nbd => {
                    let node = nbd_node(&wanted.id, &path, disk.id.as_str());
                    line.pair("-blockdev", node.to_string());
                }
                ForeignBus::VhostUserBlk => {
                    let (path, reconnect) = (quoted_path(&disk.socket_path), reconnect(plan.qemu.version));
                    line.pair("-chardev", format!("socket,id={},path={path},{reconnect}", wanted.id));
                }
            }
        }
    }
    Ok(())
}

/// A block node that reads a volume over NBD; also what `blockdev-add` takes.
pub(crate) fn nbd_node(node: &str, socket: &str, export: &str) -> serde_json::Value {
    json!({
        "driver": "nbd", "node-name": node, "server": { "type": "unix", "path": socket }, "export": export,
        // Requests wait this long for the agent to come back; an error to the guest is the last resort.
        "reconnect-delay": RECONNECT_DELAY_S, "discard": "unmap",
    })
}

/// A file's name, which leads nowhere else.
fn plain<'a>(plan: &LaunchPlan, file: &'a str) -> Result<&'a str> {
    if file.is_empty() || file.starts_with('.') || file.contains('/') {
        return Err(corrupt(plan, &format!("{file:?} is no name of a file")));
    }
    Ok(file)
}

fn corrupt(plan: &LaunchPlan, why: &str) -> Error {
    Error::new(ErrorKind::Corrupt, format!("start {}: read its command line: {why}", plan.name))
}
