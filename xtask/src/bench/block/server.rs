//! The servers of `bench block`: each one a process that ends with its value.

use std::fmt;
use std::fs;
use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};

use super::Bench;
use crate::cmd::{capture, cmd, dying_with_us, line};

const START_LIMIT: Duration = Duration::from_secs(30);

/// How qemu-storage-daemon does its I/O.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Aio {
    Threads,
    IoUring,
}

impl Aio {
    pub(super) const ALL: [Aio; 2] = [Aio::Threads, Aio::IoUring];
}

impl fmt::Display for Aio {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Aio::Threads => "threads",
            Aio::IoUring => "io_uring",
        })
    }
}

/// A kind of qcow2 overlay whose units are 4 KiB.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Overlay {
    Clusters4k,
    ExtendedL2,
}

impl Overlay {
    pub(super) fn with_every_aio() -> impl Iterator<Item = (Overlay, Aio)> {
        [Overlay::Clusters4k, Overlay::ExtendedL2].into_iter().flat_map(|o| Aio::ALL.map(|aio| (o, aio)))
    }

    fn options(self) -> &'static str {
        match self {
            Overlay::Clusters4k => "cluster_size=4k",
            Overlay::ExtendedL2 => "extended_l2=on,cluster_size=128k",
        }
    }
}

impl fmt::Display for Overlay {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Overlay::Clusters4k => "qcow2 4k",
            Overlay::ExtendedL2 => "qcow2 extended_l2",
        })
    }
}

/// A process that serves a disk. It is killed when the value goes.
pub(super) struct Server {
    child: Child,
    // Our own ends with its input.
    _input: Option<ChildStdin>,
    pub(super) socket: PathBuf,
    export: &'static str,
}

impl Drop for Server {
    fn drop(&mut self) {
        self.kill();
    }
}

impl Server {
    /// Ends the process at once, as `kill -9` does.
    pub(super) fn kill(&mut self) {
        // Both fail only for a process that is gone.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// Where fio finds the disk over NBD.
    pub(super) fn nbd_uri(&self) -> String {
        format!("nbd+unix:///{}?socket={}", self.export, self.socket.with_extension("nbd").display())
    }

    /// Ours, with a fresh layer over the base.
    pub(super) fn ours(bench: &Bench, name: &str, nbd: bool) -> Result<Server> {
        let layer = bench.path(&format!("{name}.layer"));
        if layer.exists() {
            fs::remove_dir_all(&layer).context("remove the layer of the last run")?;
        }
        Server::ours_again(bench, name, nbd)
    }

    /// Ours, with the layer that an earlier one left.
    pub(super) fn ours_again(bench: &Bench, name: &str, nbd: bool) -> Result<Server> {
        let socket = bench.path(&format!("{name}.sock"));
        let mut command = dying_with_us(bench.examples.join("serve_block"), &["--base"]);
        command.arg(&bench.base).arg("--layer").arg(bench.path(&format!("{name}.layer")));
        command.arg("--vhost-user").arg(&socket);
        if nbd {
            command.arg("--nbd").arg(socket.with_extension("nbd"));
        }
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().with_context(|| format!("start {}", line(&command)))?;
        let mut said = String::new();
        if let Some(output) = child.stdout.take() {
            BufReader::new(output).read_line(&mut said).context("wait for our server")?;
        }
        let input = child.stdin.take();
        let server = Server { child, _input: input, socket, export: "" };
        if said.trim() != "ready" {
            bail!("{} did not start", line(&command));
        }
        Ok(server)
    }

    /// qemu-storage-daemon on the base itself.
    pub(super) fn qsd_raw(bench: &Bench, aio: Aio) -> Result<Server> {
        let base = bench.base.display();
        let node = format!("driver=file,node-name=n0,filename={base},aio={aio}");
        Server::qsd(bench, &format!("qsd-raw-{aio}"), &[node], false)
    }

    /// qemu-storage-daemon on a fresh overlay over the base.
    pub(super) fn qsd_overlay(bench: &Bench, overlay: Overlay, aio: Aio, nbd: bool) -> Result<Server> {
        let file = bench.path("overlay.qcow2");
        let base = bench.base.to_string_lossy();
        let args = ["create", "-q", "-f", "qcow2", "-o", overlay.options(), "-F", "raw", "-b", &base];
        capture(cmd(bench.qemu.program("qemu-img"), &args).arg(&file))?;
        Server::qsd_overlay_again(bench, aio, nbd)
    }

    /// qemu-storage-daemon on the overlay that an earlier one left.
    pub(super) fn qsd_overlay_again(bench: &Bench, aio: Aio, nbd: bool) -> Result<Server> {
        let (file, base) = (bench.path("overlay.qcow2"), bench.base.display());
        let nodes = [
            format!("driver=file,node-name=f0,filename={},aio={aio}", file.display()),
            format!("driver=file,node-name=bf,filename={base},aio={aio},read-only=on"),
            "driver=raw,node-name=b0,file=bf,read-only=on".to_owned(),
            "driver=qcow2,node-name=n0,file=f0,backing=b0".to_owned(),
        ];
        Server::qsd(bench, "qsd-overlay", &nodes, nbd)
    }

    fn qsd(bench: &Bench, name: &str, nodes: &[String], nbd: bool) -> Result<Server> {
        let socket = bench.path(&format!("{name}.sock"));
        let mut command = dying_with_us(bench.qemu.program("qemu-storage-daemon"), &[]);
        for node in nodes {
            command.args(["--blockdev", node]);
        }
        let ready = if nbd {
            let path = socket.with_extension("nbd");
            command
                .arg("--nbd-server")
                .arg(format!("addr.type=unix,addr.path={},max-connections=0", path.display()));
            command.args(["--export", "type=nbd,id=e0,node-name=n0,name=d,writable=on"]);
            path
        } else {
            command.arg("--export").arg(format!(
                "type=vhost-user-blk,id=e0,node-name=n0,addr.type=unix,addr.path={},writable=on,num-queues=1",
                socket.display()
            ));
            socket.clone()
        };
        Server::start(command, socket, &ready, "d")
    }

    /// nbdkit on the base itself.
    pub(super) fn nbdkit(bench: &Bench) -> Result<Server> {
        let socket = bench.path("nbdkit.sock");
        let path = socket.with_extension("nbd");
        let mut command = dying_with_us("nbdkit", &["-f", "-U"]);
        command.arg(&path).arg("file").arg(&bench.base);
        Server::start(command, socket, &path, "")
    }

    fn start(mut command: Command, socket: PathBuf, ready: &Path, export: &'static str) -> Result<Server> {
        // A socket that a killed process left would look as if this one were ready.
        if ready.exists() {
            fs::remove_file(ready).context("remove an old socket")?;
        }
        let child = command.spawn().with_context(|| format!("start {}", line(&command)))?;
        let mut server = Server { child, _input: None, socket, export };
        let deadline = Instant::now() + START_LIMIT;
        while !ready.exists() {
            if let Some(status) = server.child.try_wait()? {
                bail!("{} ended with {status}", line(&command));
            }
            if Instant::now() > deadline {
                bail!("{} is not ready after {START_LIMIT:?}", line(&command));
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        // Bound; listening follows at once.
        std::thread::sleep(Duration::from_millis(100));
        Ok(server)
    }
}
