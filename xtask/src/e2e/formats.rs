//! Disks in the formats of others, in and out, over the command line.
//!
//! ```text
//!   100 GiB with little in it ─import─▶ volume ─export─▶ raw, qcow2, VHDX ─import─▶ volumes of the same content
//!   written on over NBD ─export --parent─▶ a VHDX over the VHDX ─import, publish─▶ the same again
//!   the same chain imported as snapshots, and out again as a chain
//!   the parent written by somebody else ─▶ refused         cancelled half-way ─▶ nothing is left
//! ```

use std::fs::{self, File};
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};

use super::Context;
use crate::cmd::{cmd, output, run};
use crate::lab::Host;

const SIZE: u64 = 100 << 30;
/// What is in the disk, and what a file may take for it beside its own tables.
const DATA: u64 = 3 << 20;
const TAKES_MAX: u64 = 4 * DATA;
/// Nothing in it is zero, so that copying it takes long enough to be cancelled.
const FULL: u64 = 768 << 20;
const CANCEL_LIMIT: Duration = Duration::from_secs(30);

/// The scenario.
pub fn in_and_out(c: &Context<'_>) -> Result<()> {
    let host = c.lab.hosts().first().context("a lab has hosts")?;
    let dir = c.lab.dir().join("formats");
    fs::create_dir_all(&dir).context("make the scenario's directory")?;
    let w = World { host, dir: &dir, qemu_img: c.lab.qemu.program("qemu-img") };
    let first = dir.join("first.raw");
    sparse_file(&first)?;

    let started = Instant::now();
    w.import("fmt", &first)?;
    println!(
        "       {} GiB with {} MiB in it imported in {:.1} s",
        SIZE >> 30,
        DATA >> 20,
        started.elapsed().as_secs_f64()
    );
    let layer = w.host.whimbrel(&["volume", "show", "fmt"])?["layer_bytes"].as_u64().unwrap_or(u64::MAX);
    ensure!(layer < TAKES_MAX, "the layer has {layer} bytes for {DATA}");
    for format in ["raw", "qcow2", "vhdx"] {
        let file = dir.join(format!("out.{format}"));
        let started = Instant::now();
        w.export("fmt", &file, &[])?;
        let took = started.elapsed().as_secs_f64();
        let takes = file.metadata().context("look at what was exported")?.blocks() * 512;
        println!("       exported as {format} in {took:.1} s: takes {} KiB", takes >> 10);
        ensure!(takes < TAKES_MAX, "{format} takes {takes} bytes for {DATA}");
        w.same_again(&file, &first).with_context(|| format!("through {format}"))?;
    }

    let attached = w.host.whimbrel(&["volume", "attach", "fmt"])?;
    let socket = attached["exports"][0].as_str().context("find the socket")?.to_owned();
    let uri = format!("nbd+unix:///fmt?socket={socket}");
    // Something new, and zeros over something old.
    let commands = ["-c", "write -P 0x77 70G 130k", "-c", "write -z 0 64k", "-c", "flush"];
    run(cmd(c.lab.qemu.program("qemu-io"), &["-f", "raw"]).args(commands).arg(&uri))?;
    w.host.whimbrel(&["volume", "detach", "fmt"])?;
    let (base, child, second) = (dir.join("out.vhdx"), dir.join("child.vhdx"), dir.join("second.raw"));
    w.export("fmt", &child, &["--parent", &base.to_string_lossy()])?;
    w.export("fmt", &second, &[])?;
    let takes = child.metadata().context("look at the child")?.blocks() * 512;
    ensure!(takes < 1 << 20, "what changed takes {takes} bytes");
    w.same_again(&child, &second).context("through a chain of two VHDX files")?;
    chain_stays_a_chain(&w, &child, &first, &second).context("a chain of files as a chain of snapshots")?;
    let name = ["--name", "fmt:child"];
    w.host.whimbrel(&[&["image", "publish", &child.to_string_lossy()], name.as_slice()].concat())?;
    w.host.whimbrel(&["image", "remove", "fmt:child"])?;

    run(cmd(c.lab.qemu.program("qemu-io"), &["-f", "vhdx", "-c", "write -P 1 1M 512"]).arg(&base))?;
    let refused = output(&mut w.host.cli(&["volume", "import", "fmt2", &child.to_string_lossy()]))?;
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    ensure!(refused.status.code() == Some(4), "a changed parent: {:?}, {said}", refused.status);
    ensure!(said.contains("child.vhdx") && said.contains("made over content"), "{said}");
    w.host.whimbrel(&["volume", "remove", "fmt"])?;

    cancelled(&w).context("an import cancelled half-way")?;
    fs::remove_dir_all(&dir).context("remove the scenario's directory")
}

/// `child` lies on `out.vhdx`: in as a snapshot and what was written since, and out again as two files.
fn chain_stays_a_chain(w: &World<'_>, child: &Path, first: &Path, second: &Path) -> Result<()> {
    w.import("fmt-chain", child)?;
    let shown = w.host.whimbrel(&["volume", "show", "fmt-chain"])?;
    let snapshots: Vec<&str> = shown["chain"]
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(|layer| layer["snapshot"].as_str())
        .collect();
    ensure!(snapshots == ["out"], "the snapshots are {snapshots:?}: {shown}");
    w.host.whimbrel(&["volume", "create", "fmt-below", "--from", "fmt-chain@out"])?;
    for (volume, expected) in [("fmt-below", first), ("fmt-chain", second)] {
        let back = w.dir.join("back.raw");
        w.export(volume, &back, &[])?;
        run(cmd(&w.qemu_img, &["compare", "-q", "-f", "raw", "-F", "raw"]).arg(expected).arg(&back))?;
        fs::remove_file(&back).context("remove a file")?;
    }
    w.host.whimbrel(&["volume", "remove", "fmt-below"])?;
    let again = w.dir.join("again.vhdx");
    w.export("fmt-chain", &again, &["--chain"])?;
    let takes = again.metadata().context("look at the uppermost file")?.blocks() * 512;
    ensure!(takes < 1 << 20, "what was written since the snapshot takes {takes} bytes");
    w.host.whimbrel(&["volume", "remove", "fmt-chain"])?;
    w.same_again(&again, second).context("the uppermost file of an exported chain")?;
    w.same_again(&w.dir.join("again-out.vhdx"), first).context("the lowest file of an exported chain")
}

struct World<'a> {
    host: &'a Host,
    dir: &'a Path,
    qemu_img: PathBuf,
}

impl World<'_> {
    fn import(&self, name: &str, file: &Path) -> Result<()> {
        self.host.whimbrel(&["volume", "import", name, &file.to_string_lossy()]).map(drop)
    }

    fn export(&self, name: &str, file: &Path, more: &[&str]) -> Result<()> {
        let file = file.to_string_lossy();
        self.host.whimbrel(&[&["volume", "export", name, &file], more].concat()).map(drop)
    }

    /// Imports `file` into a volume, and writes that to a raw file, which must hold what `expected` does.
    fn same_again(&self, file: &Path, expected: &Path) -> Result<()> {
        let back = self.dir.join("back.raw");
        self.import("fmt-back", file)?;
        self.export("fmt-back", &back, &[])?;
        run(cmd(&self.qemu_img, &["compare", "-q", "-f", "raw", "-F", "raw"]).arg(expected).arg(&back))?;
        self.host.whimbrel(&["volume", "remove", "fmt-back"])?;
        fs::remove_file(&back).context("remove a file")
    }
}

/// Data at the beginning, across the 4 GiB of a VHDX file's chunk, and at the end.
fn sparse_file(path: &Path) -> Result<()> {
    let file = File::create(path).context("make a sparse file")?;
    file.set_len(SIZE)?;
    let bytes: Vec<u8> = (0..DATA / 3).map(|n| (n % 251) as u8 + 1).collect();
    for at in [0, (4 << 30) - 5000, SIZE - DATA / 3] {
        file.write_all_at(&bytes, at).context("fill a sparse file")?;
    }
    Ok(())
}

fn cancelled(w: &World<'_>) -> Result<()> {
    let full = w.dir.join("full.raw");
    let file = File::create(&full).context("make a full file")?;
    let bytes = vec![0x5a; 1 << 20];
    for at in (0..FULL).step_by(bytes.len()) {
        file.write_all_at(&bytes, at).context("fill a file")?;
    }
    let started = w.host.whimbrel(&["volume", "import", "fmt-cut", &full.to_string_lossy(), "--no-wait"])?;
    let task = started["task"].as_u64().context("find the task")?.to_string();
    w.host.whimbrel(&["task", "cancel", &task])?;
    let deadline = Instant::now() + CANCEL_LIMIT;
    let state = loop {
        let shown = w.host.whimbrel(&["task", "show", &task])?;
        let state = shown["state"].as_str().unwrap_or_default().to_owned();
        if ["done", "failed", "cancelled"].contains(&state.as_str()) {
            break state;
        }
        ensure!(Instant::now() < deadline, "still {state} after {CANCEL_LIMIT:?}");
        std::thread::sleep(Duration::from_millis(50));
    };
    ensure!(state == "cancelled", "the task ended as {state}");
    let volumes = w.host.whimbrel(&["volume", "list"])?.to_string();
    ensure!(!volumes.contains("fmt-cut"), "a volume is left: {volumes}");
    Ok(())
}
