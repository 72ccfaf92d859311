//! What can go wrong around a running VM is made to go wrong, on real processes. Each time the answer says what, where
//! and what to do, and the VM runs on, untouched.
//!
//! Not here: what people mistype (`scenario.rs`), what dies in the middle of a move (`kill.rs`).

use std::fs;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};

use super::{Context, IMAGE};
use crate::cmd::{capture, cmd, output, run};
use crate::flight::Flight;
use crate::lab::{Host, Lab};
use crate::qemu::Qemu;

const VM: &str = "steadfast";
const MEMORY_MIB: u64 = 256;
/// The layer grows to more than the full disk below holds.
const WORKLOAD: &str = "wg.mem_mib=32 wg.mem_rate=10 wg.disk=/data/records wg.disk_mib=32";
/// An answer that takes longer is none.
const ANSWER_LIMIT: Duration = Duration::from_secs(60);

/// See the module's charter.
pub fn errors_leave_the_vm_alone(c: &Context<'_>) -> Result<()> {
    let lab = Lab::new("errors", 3, &c.lab.qemu, &c.lab.image)?;
    lab.start_cluster(c.program)?;
    let [source, target, other] = lab.hosts() else {
        bail!("a lab of three hosts has {}", lab.hosts().len())
    };
    source.publish(&lab.image.disk, IMAGE)?;
    let mut flight = Flight::start(&lab, 0, VM, IMAGE, MEMORY_MIB, 2, WORKLOAD)?;
    let epoch = source.whimbrel(&["vm", "show", VM])?["epoch"].clone();
    let mut wrong = Vec::new();
    let cases: [(&str, Case); 12] = [
        ("the name runs elsewhere", |x| {
            x.source.whimbrel(&["volume", "create", "second", "--image", IMAGE])?;
            let said = x.fails(x.target, &["vm", "run", VM, "--volume", "second", "--memory", "64M"], &[VM]);
            x.source.whimbrel(&["volume", "remove", "second"])?;
            said
        }),
        ("the target's memory is full", |x| {
            let memory = x.target.dir().join("memory");
            run(cmd("mount", &["-o", "remount,size=64m"]).arg(&memory))?;
            let said = x.move_fails(x.target, &[], &["memory", "bytes free", x.target.name()]);
            run(cmd("mount", &["-o", "remount,size=8g"]).arg(&memory))?;
            said
        }),
        ("the target's disk is full", |x| {
            let layers = x.target.dir().join("data/volumes");
            fs::create_dir_all(&layers).context("make the volumes' directory")?;
            x.wait_for_layer(2 << 20)?;
            // Agents see mounts that were there before they started.
            x.anew(x.target, || {
                run(cmd("mount", &["-t", "tmpfs", "-o", "size=1m,mode=755", "tmpfs"]).arg(&layers))
            })?;
            let said = x.move_fails(x.target, &[], &["space", x.target.name()]);
            x.anew(x.target, || run(cmd("umount", &[]).arg(&layers)))?;
            said
        }),
        ("the store's disk is full", |x| {
            let store = x.dir.join("small-store");
            fs::create_dir_all(&store).context("make a store")?;
            x.anew(x.other, || run(cmd("mount", &["-t", "tmpfs", "-o", "size=64k", "tmpfs"]).arg(&store)))?;
            let (file, store_name) = (x.disk.to_string_lossy(), store.to_string_lossy());
            let args =
                ["image", "publish", &file, "--format", "raw", "--name", "no:room", "--store", &store_name];
            let said = x.fails(x.other, &args, &["no:room", "small-store", "space"]);
            x.anew(x.other, || run(cmd("umount", &[]).arg(&store)))?;
            said
        }),
        ("the target is down", |x| {
            x.target.kill_agent()?;
            let said = x.move_fails(x.target, &[], &[x.target.name()]);
            x.target.start_agent(x.program)?;
            said
        }),
        ("the target's QEMU is another version", |x| {
            let Some(qemu) = &x.other_qemu else { return Ok(None) };
            x.other.use_qemu(qemu)?;
            x.anew(x.other, || Ok(()))?;
            // The newer one knows the older one's machines: that way a move is possible.
            if qemu.version > x.qemu.version {
                return Ok(None);
            }
            x.move_fails(x.other, &[], &["machine", x.other.name()])
        }),
        ("the processor would not be the same", |x| {
            // `max` is what QEMU's version makes of it; the other host's is another one by now, and knows the machine.
            if x.other_qemu.as_ref().is_none_or(|qemu| qemu.version < x.qemu.version) {
                return Ok(None);
            }
            x.source.whimbrel(&["volume", "create", "various", "--image", IMAGE])?;
            let run = ["vm", "run", "various", "--volume", "various", "--memory", "64M", "--cpu", "max"];
            x.source.whimbrel(&run)?;
            let args = ["vm", "migrate", "various", "--to", x.other.name()];
            let said =
                x.fails(x.source, &args, &["various", x.other.name(), "processor", "CPUID", "--cpu"])?;
            let shown = x.source.whimbrel(&["vm", "show", "various"])?;
            ensure!(
                shown["state"] == "running" && shown["host"] == x.source.name(),
                "afterwards it is {shown}"
            );
            x.source.whimbrel(&["vm", "stop", "various", "--force"])?;
            x.source.whimbrel(&["volume", "remove", "various"])?;
            Ok(said)
        }),
        ("there is no right to userfaultfd", |x| {
            x.source.kill_agent()?;
            x.source.start_agent_without_capability(x.program, "sys_ptrace")?;
            let shown = x.source.whimbrel(&["vm", "show", VM])?["mode_reasons"].to_string();
            let said = x.move_fails(x.target, &["--mode", "a"], &["mode A", "trace"]);
            x.anew(x.source, || Ok(()))?;
            ensure!(shown.contains("CAP_SYS_PTRACE") || shown.contains("Linux"), "`vm show` says {shown}");
            said
        }),
        ("the metadata store is damaged", |x| {
            x.source.kill_agent()?;
            let file = |name: &str| x.source.dir().join("data").join(name);
            // The log goes too: it may have all pages that count.
            for name in STORE_FILES {
                fs::rename(file(name), x.dir.join(name)).context("put the store aside")?;
            }
            fs::write(file(STORE_FILES[0]), [0x5a; 8192]).context("write a damaged store")?;
            let said = match x.source.start_agent(x.program) {
                Ok(()) => "nothing".to_owned(),
                Err(e) => format!("{e:#}"),
            };
            x.source.kill_agent()?;
            for name in STORE_FILES {
                fs::rename(x.dir.join(name), file(name)).context("put the store back")?;
            }
            x.source.start_agent(x.program)?;
            let words = ["ended at once", STORE_FILES[0], "put back a copy"];
            Ok((!words.iter().all(|w| said.contains(w))).then_some(said))
        }),
        ("images that are cut off, damaged or something else", |x| {
            let (whole, cut, text) =
                (x.dir.join("whole.qcow2"), x.dir.join("cut.qcow2"), x.dir.join("text.qcow2"));
            capture(cmd(x.qemu.program("qemu-img"), &["convert", "-O", "qcow2"]).arg(&x.disk).arg(&whole))?;
            let length = fs::metadata(&whole).context("look at an image")?.len();
            fs::copy(&whole, &cut).context("copy an image")?;
            let file = fs::OpenOptions::new().write(true).open(&cut).context("open an image")?;
            file.set_len(length / 2).context("cut an image off")?;
            fs::write(&text, "this is no image").context("write a file")?;
            let mut said = Vec::new();
            for (file, words) in [(&cut, ["cut.qcow2", "damaged"]), (&text, ["text.qcow2", "qcow2"])] {
                let name = file.to_string_lossy();
                let args = ["image", "publish", &name, "--format", "qcow2", "--name", "bad:1"];
                said.extend(x.fails(x.source, &args, &words)?);
            }
            // Said to be raw, it would be copied as it is, header and all.
            let name = whole.to_string_lossy().replace(".qcow2", ".raw");
            fs::rename(&whole, &name).context("rename an image")?;
            said.extend(x.fails(
                x.source,
                &["image", "publish", &name, "--name", "bad:2"],
                &["qcow2", "--format"],
            )?);
            Ok(joined(&said))
        }),
        ("a store's blocks are damaged", |x| {
            let (name, store) = x.own_store("blocks")?;
            damage(&store, "packs")?;
            let mut said = Vec::new();
            said.extend(x.fails(x.target, &["image", "verify", &name, "--store"], &[&name, "bad blocks"])?);
            said.extend(x.fails(x.target, &["image", "prefetch", &name], &[&name, "damaged"])?);
            Ok(joined(&said))
        }),
        ("a store's manifest is damaged, the store is gone", |x| {
            let (name, store) = x.own_store("manifest")?;
            damage(&store, "manifests")?;
            let mut said = Vec::new();
            let fetch = ["image", "prefetch", &name];
            said.extend(x.fails(x.target, &fetch, &[&name, "damaged", "publish the image again"])?);
            fs::remove_dir_all(&store).context("remove a store")?;
            said.extend(x.fails(x.other, &fetch, &[&name, "store-manifest"])?);
            Ok(joined(&said))
        }),
    ];
    let x = Stage {
        source,
        target,
        other,
        dir: lab.dir().to_path_buf(),
        disk: lab.image.disk.clone(),
        qemu: lab.qemu.clone(),
        other_qemu: c.other_qemu.as_ref().map(|qemu| lab.show_qemu(qemu)).transpose()?,
        program: c.program,
    };
    for (name, case) in cases {
        let started = Instant::now();
        match case(&x) {
            Ok(None) => {}
            Ok(Some(what)) => wrong.push(format!("{name}: {what}")),
            Err(e) => wrong.push(format!("{name}: {e:#}")),
        }
        if started.elapsed() > ANSWER_LIMIT {
            wrong.push(format!("{name}: took {:?}", started.elapsed()));
        }
        let now = source.whimbrel(&["vm", "show", VM])?;
        if now["host"] != source.name() || now["state"] != "running" || now["epoch"] != epoch {
            wrong.push(format!("{name}: afterwards the VM is {now}"));
            break;
        }
        if let Err(e) = flight.must_be_whole() {
            wrong.push(format!("{name}: afterwards {e:#}"));
        }
    }
    if flight.receiver().report().resets > 0 {
        wrong.push("the guest started anew".to_owned());
    }
    // What was in the way is out of it: the VM can be moved.
    let moved = flight.migrate(1, &[]).map(drop).and_then(|()| flight.must_be_whole());
    if let Err(e) = moved.context("move it when nothing is wrong any more") {
        wrong.push(format!("{e:#}"));
    }
    if !wrong.is_empty() {
        bail!("{}\n{}", wrong.join("\n         "), source.log_tail());
    }
    flight.stop()
}

/// The metadata store, its log, and the index of that.
const STORE_FILES: [&str; 3] = ["meta.db", "meta.db-wal", "meta.db-shm"];

/// `None` if the answer was as it must be, what it was otherwise.
type Case = fn(&Stage<'_>) -> Result<Option<String>>;

struct Stage<'a> {
    source: &'a Host,
    target: &'a Host,
    other: &'a Host,
    dir: PathBuf,
    disk: PathBuf,
    qemu: Qemu,
    other_qemu: Option<Qemu>,
    program: &'a Path,
}

impl Stage<'_> {
    /// Runs a command that must fail, with these words in what it says.
    fn fails(&self, on: &Host, args: &[&str], words: &[&str]) -> Result<Option<String>> {
        let out = output(&mut on.cli(args))?;
        let said = String::from_utf8_lossy(&out.stderr).into_owned();
        let refused = matches!(out.status.code(), Some(1 | 4));
        let missing: Vec<_> =
            words.iter().filter(|w| !said.to_lowercase().contains(&w.to_lowercase())).collect();
        if refused && missing.is_empty() {
            return Ok(None);
        }
        Ok(Some(format!(
            "`{}` ended with {}, lacks {missing:?}, and said {said:?}",
            args.join(" "),
            out.status
        )))
    }

    fn move_fails(&self, to: &Host, options: &[&str], words: &[&str]) -> Result<Option<String>> {
        let args = [&["vm", "migrate", VM, "--to", to.name()], options].concat();
        self.fails(self.source, &args, &[words, &[VM]].concat())
    }

    /// Waits until the VM's layer holds so much.
    fn wait_for_layer(&self, bytes: u64) -> Result<()> {
        let end = Instant::now() + ANSWER_LIMIT / 2;
        while self.source.whimbrel(&["volume", "show", VM])?["layer_bytes"].as_u64().unwrap_or(0) < bytes {
            ensure!(Instant::now() < end, "the guest wrote less than {bytes} bytes");
            std::thread::sleep(Duration::from_millis(200));
        }
        Ok(())
    }

    /// Restarts a host's agent, with something done in between.
    fn anew(&self, host: &Host, between: impl FnOnce() -> Result<()>) -> Result<()> {
        host.kill_agent()?;
        between()?;
        host.start_agent(self.program)
    }

    /// An image in a store of its own, which no host has in its cache.
    fn own_store(&self, name: &str) -> Result<(String, PathBuf)> {
        let store = self.dir.join(format!("store-{name}"));
        let image = format!("{name}:1");
        // Content of its own: an equal block of another image would be taken from there.
        let file = self.dir.join(format!("{name}.raw"));
        let mut bytes = vec![0; 4 << 20];
        blake3::Hasher::new().update(name.as_bytes()).finalize_xof().fill(&mut bytes);
        fs::write(&file, bytes).context("write an image")?;
        let (path, url) = (file.to_string_lossy(), store.to_string_lossy());
        let args = ["image", "publish", &path, "--format", "raw", "--name", &image, "--store", &url];
        self.source.whimbrel(&args)?;
        Ok((image, store))
    }
}

fn joined(said: &[String]) -> Option<String> {
    (!said.is_empty()).then(|| said.join("; "))
}

/// Changes bytes in the middle of every object of a kind.
fn damage(store: &Path, kind: &str) -> Result<()> {
    let listed = capture(cmd("find", &[]).arg(store.join(kind)).args(["-type", "f"]))?;
    ensure!(!listed.is_empty(), "{} has no {kind}", store.display());
    for path in listed.lines() {
        let file = fs::OpenOptions::new().write(true).open(path).context("open an object")?;
        let middle = file.metadata().context("look at an object")?.len() / 2;
        file.write_all_at(b"damaged!", middle).context("damage an object")?;
    }
    Ok(())
}
