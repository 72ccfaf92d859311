//! QEMU's own block tests, `tests/qemu-iotests` of its source, against our NBD server.
//!
//! ```text
//!   each test ─▶ check (QEMU's runner) ─▶ the test ─▶ $QEMU_NBD_PROG = stand-in.sh ─▶ agent: volume import, attach
//!                                            └─ qemu-io, qemu-img, QEMU of that version ──NBD──▶ its export
//! ```
//!
//! What a test says of itself decides whether it is one for us: it takes a raw image over NBD, or it starts qemu-nbd
//! on an image itself.
//!
//! Invariants
//! * Each of those runs and passes, and had a volume of ours shown to it, or is left out below by name with the reason.
//!   A test that calls itself "not run", or a case of its own, has not passed; a name below that leaves nothing out is
//!   an error.
//! * What a test prints is what it should; the runner compares it.
//! * Afterwards every volume passes `volume check`.
//! * The suite is as it is published but for one line, which waits for the server a second, and here for as long as it takes.
//!
//! Not here: the tools that people use, one by one (`nbd.rs`), QEMU's source (`qemu.rs`).

use std::fs;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};

use super::Context;
use crate::cmd::{cmd, output, tail};
use crate::lab::Host;
use crate::qemu::{self, Qemu};

/// The scenario's name.
pub(super) const NAME: &str = "QEMU's own block tests pass over NBD";
/// Programs that the tests start in the place of QEMU's; the scripts say how.
const STAND_IN: &str = include_str!("iotests/stand-in.sh");
const NO_QTEST: &str = include_str!("iotests/no-qtest.sh");
/// A test that takes longer has failed, s.
const LIMIT_S: u32 = 120;
/// Tests at once; each of them waits a good deal.
const WORKERS: usize = 4;
/// So many there are at least, of each version.
const FEWEST: usize = 21;
/// How long a volume may be shown after its test.
const DETACH_LIMIT: Duration = Duration::from_secs(10);

/// Tests that would be ours by what they say, and why they are not run.
const LEFT_OUT: [(&str, &str); 17] = [
    (
        "005",
        "asks for room for a file of 5 TB under the server's address, and calls itself not run over any NBD",
    ),
    ("058", "qemu-nbd's option -l: a snapshot inside of a qcow2 file"),
    ("083", "QEMU's client and a faulty server of the suite's own, no other server is asked"),
    ("143", "QEMU's client and QEMU's built-in server, no other server is asked"),
    ("147", "TCP without TLS, which we do not speak; else QEMU's built-in server"),
    ("162", "how qemu-img writes addresses; what is shown is null-co://, which is no image"),
    ("205", "QEMU's built-in server, no other server is asked"),
    ("223", "dirty bitmaps of a qcow2 file, an extension of QEMU's (qemu:dirty-bitmap)"),
    ("233", "qemu-nbd's TLS options with keys of the suite's own; ours are the cluster's"),
    ("241", "a file that is no whole number of sectors long; our volumes are"),
    (
        "264",
        "races a job against the cut that ends the server; a detached volume's connections last some ms longer",
    ),
    ("302", "qemu-nbd's option --offset: the middle of a file, which is then looked at itself"),
    ("block-status-cache", "allocation depths, an extension of QEMU's (qemu:allocation-depth)"),
    ("nbd-qemu-allocation", "allocation depths, an extension of QEMU's (qemu:allocation-depth)"),
    ("nbd-reconnect-on-open", "a server that is gone when its first client is; ours are not"),
    (
        "parallels-read-bitmap",
        "dirty bitmaps of a Parallels file, an extension of QEMU's (qemu:dirty-bitmap)",
    ),
    ("qemu-img-bitmaps", "dirty bitmaps of a qcow2 file, an extension of QEMU's (qemu:dirty-bitmap)"),
];

/// Tests that take 20 s of processor time and 2 GiB of memory, and ask the server for nothing that others do not: only
/// with `--long`.
const LONG: [&str; 1] = ["215"];

/// Tests whose published output has QEMU's last answer and its last event in an order that QEMU has changed since (it
/// differs over its own qemu-nbd as well): every line must be there, the order is not looked at.
const OUT_OF_ORDER: [&str; 2] = ["094", "119"];

/// What starts qemu-nbd, in shell and in Python.
const STARTS: [&str; 6] = [
    "nbd_server_start_unix_socket",
    "nbd_server_start_tcp_socket",
    "$QEMU_NBD ",
    "qemu_nbd(",
    "qemu_nbd_popen(",
    "qemu_nbd_early_pipe(",
];

/// One of QEMU's tests.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Test {
    name: String,
    /// How the runner is told what it runs with.
    with: &'static [&'static str],
}

/// Fetches the tests and makes them wait for the server; outside of the lab, where there is a network.
pub(super) fn fetch(qemu: &Qemu) -> Result<()> {
    const RC: &str = "common.rc";
    const IMPATIENT: &str = "sleep 1 #";
    const ABOUT: &str = "qemu-nbd needs to be listening";
    const PATIENT: &str =
        r#"for ((i = 0; i < 1000; i++)); do [ -f "$QEMU_TEST_DIR/qemu-nbd.pid" ] && break; sleep 0.05; done"#;
    qemu::ensure_block_tests(qemu)?;
    let path = qemu.block_tests().join(RC);
    let text = fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
    if text.contains(PATIENT) {
        return Ok(());
    }
    let is_it = |line: &&str| line.trim_start().starts_with(IMPATIENT) && line.contains(ABOUT);
    let line = text.lines().find(is_it).with_context(|| format!("find where {RC} waits for the server"))?;
    let fresh = path.with_extension("new");
    fs::write(&fresh, text.replace(line, PATIENT)).with_context(|| format!("write {}", fresh.display()))?;
    fs::rename(&fresh, &path).with_context(|| format!("put {} in place", path.display()))
}

/// See the module's charter.
pub(super) fn qemus_own_tests_pass(c: &Context<'_>) -> Result<()> {
    let host = c.lab.hosts().first().context("a lab has hosts")?;
    let suite = c.lab.qemu.block_tests();
    let dir = c.lab.dir().join("iotests");
    fs::create_dir_all(&dir).context("make a directory")?;
    let script = |name: &str, text: &str| -> Result<PathBuf> {
        let path = dir.join(name);
        fs::write(&path, text).with_context(|| format!("write {name}"))?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).context("make it executable")?;
        Ok(path)
    };
    let (mut tests, left_out) = choose(&suite)?;
    tests.retain(|test| c.long || !LONG.contains(&test.name.as_str()));
    let runner = Runner {
        suite,
        qemu: c.lab.qemu.clone(),
        program: c.program.to_path_buf(),
        agent: host.socket(),
        stand_in: script("stand-in", STAND_IN)?,
        no_qtest: script("no-qtest", NO_QTEST)?,
        dir: dir.clone(),
    };
    // With write-through every write is one with FUA.
    let caches: &[&'static [&'static str]] = if c.long { &[&[], &["-c", "writethrough"]] } else { &[&[]] };
    for cache in caches {
        let ran = runner.run_all(&tests, cache)?;
        let volumes = runner.volumes(&tests)?;
        for volume in &volumes {
            whole_and_gone(host, volume)?;
        }
        println!(
            "       {} of QEMU {}'s tests on {} volumes, {left_out} left out by name: {}",
            ran.len(),
            c.lab.qemu.version.name(),
            volumes.len(),
            ran.join(" ")
        );
        ensure!(ran.len() >= FEWEST, "{} tests ran, {FEWEST} at least were expected", ran.len());
        for test in &tests {
            fs::remove_dir_all(dir.join(&test.name)).context("remove a test's directory")?;
        }
    }
    fs::remove_dir_all(&dir).context("remove the tests' directory")
}

/// Tests for us, and how many more are left out by name.
fn choose(suite: &Path) -> Result<(Vec<Test>, usize)> {
    let mut tests = Vec::new();
    for below in ["", "tests"] {
        let dir = suite.join(below);
        let entries = fs::read_dir(&dir).with_context(|| format!("list {}", dir.display()))?;
        for path in entries.flatten().map(|entry| entry.path()) {
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            // As the suite's own runner finds them.
            let is_test = below == "tests" || (name.len() == 3 && name.bytes().all(|b| b.is_ascii_digit()));
            if !is_test || !path.is_file() || name.contains(".out") {
                continue;
            }
            let text = fs::read(&path).with_context(|| format!("read {}", path.display()))?;
            tests.extend(judge(&name, &String::from_utf8_lossy(&text)));
        }
    }
    tests.sort_by(|a, b| a.name.cmp(&b.name));
    for (name, why) in LEFT_OUT {
        ensure!(tests.iter().any(|t| t.name == name), "{name} is left out ({why}), but is not one for us");
    }
    let all = tests.len();
    tests.retain(|test| !LEFT_OUT.iter().any(|(name, _)| *name == test.name));
    let left_out = all - tests.len();
    Ok((tests, left_out))
}

/// Whether a test is one for us, by its text.
fn judge(name: &str, text: &str) -> Option<Test> {
    let formats = declared(text, "_supported_fmt", "supported_fmts");
    let protocols = declared(text, "_supported_proto", "supported_protocols");
    let takes = |list: &[&str], what: &str| list.iter().any(|word| *word == what || *word == "generic");
    let refuses = declared(text, "_unsupported_fmt", "unsupported_fmts").contains(&"raw")
        || declared(text, "_unsupported_proto", "unsupported_protocols").contains(&"nbd");
    let starts = STARTS.iter().any(|word| text.contains(word));
    let with: &[&str] = if takes(&formats, "raw") && takes(&protocols, "nbd") && !refuses {
        &["-raw", "-nbd"]
    } else if starts && takes(&formats, "raw") {
        &["-raw"]
    } else if starts {
        &["-qcow2"]
    } else {
        return None;
    };
    Some(Test { name: name.to_owned(), with })
}

/// What a test lists under a name: words behind a shell's function, or a Python list of strings.
fn declared<'a>(text: &'a str, shell: &str, python: &str) -> Vec<&'a str> {
    let mut words = Vec::new();
    for line in text.lines() {
        if let Some(rest) = line.trim_start().strip_prefix(shell).filter(|rest| rest.starts_with(' ')) {
            words.extend(rest.split('#').next().unwrap_or_default().split_whitespace());
        }
    }
    for (at, _) in text.match_indices(python) {
        // The name may be the end of another one.
        let own = !text[..at].ends_with(|c: char| c.is_alphanumeric() || c == '_');
        let list = text[at + python.len()..].trim_start().strip_prefix('=').map(str::trim_start);
        if let Some((list, _)) = list.and_then(|l| l.strip_prefix('[')).and_then(|l| l.split_once(']'))
            && own
        {
            words.extend(list.split(['\'', '"', ',', ' ', '\n']).filter(|word| !word.is_empty()));
        }
    }
    words
}

/// What running a test takes.
struct Runner {
    suite: PathBuf,
    qemu: Qemu,
    program: PathBuf,
    agent: PathBuf,
    stand_in: PathBuf,
    no_qtest: PathBuf,
    /// Each test has a directory of its own in it.
    dir: PathBuf,
}

impl Runner {
    /// Runs them, several at once; gives their names. Every failure is in the error.
    fn run_all(&self, tests: &[Test], cache: &[&str]) -> Result<Vec<String>> {
        let next = Mutex::new(tests.iter());
        let outcomes = Mutex::new(Vec::new());
        // A thread that failed elsewhere would end the scenario by itself.
        let locked = "no thread panics with the lock held";
        std::thread::scope(|scope| {
            for _ in 0..WORKERS {
                scope.spawn(|| {
                    loop {
                        let Some(test) = next.lock().expect(locked).next() else { return };
                        let outcome = self.run(test, cache).with_context(|| format!("test {}", test.name));
                        outcomes.lock().expect(locked).push((test.name.clone(), outcome));
                    }
                });
            }
        });
        let mut ran = Vec::new();
        let mut failed = Vec::new();
        for (name, outcome) in outcomes.into_inner().expect(locked) {
            match outcome {
                Ok(()) => ran.push(name),
                Err(e) => failed.push(format!("{e:#}")),
            }
        }
        ran.sort();
        if !failed.is_empty() {
            bail!("{} of {} tests failed:\n{}", failed.len(), tests.len(), failed.join("\n"));
        }
        Ok(ran)
    }

    fn run(&self, test: &Test, cache: &[&str]) -> Result<()> {
        let dir = self.dir.join(&test.name);
        // The runner takes the directory of a link to itself for the one that QEMU is built in.
        let build = dir.join("build/tests/qemu-iotests");
        let state = dir.join("state");
        for new in [&build, &state.join("volumes")] {
            fs::create_dir_all(new).with_context(|| format!("make {}", new.display()))?;
        }
        symlink(self.suite.join("check"), build.join("check")).context("link to the suite's runner")?;
        let limit = LIMIT_S.to_string();
        let mut c: Command = cmd("timeout", &["--kill-after=5", &limit, "/usr/bin/python3", "check"]);
        c.args(test.with).args(cache).arg(&test.name).current_dir(&build);
        for (name, program) in [
            ("QEMU_PROG", self.no_qtest.clone()),
            ("WHIMBREL_IOTESTS_QEMU", self.qemu.system()),
            ("QEMU_IMG_PROG", self.qemu.program("qemu-img")),
            ("QEMU_IO_PROG", self.qemu.program("qemu-io")),
            ("QSD_PROG", self.qemu.program("qemu-storage-daemon")),
            ("QEMU_NBD_PROG", self.stand_in.clone()),
            ("TEST_DIR", dir.join("scratch")),
            ("SOCK_DIR", dir.join("sock")),
            ("WHIMBREL_IOTESTS_PROGRAM", self.program.clone()),
            ("WHIMBREL_IOTESTS_SOCKET", self.agent.clone()),
            ("WHIMBREL_IOTESTS_STATE", state.clone()),
        ] {
            c.env(name, program);
        }
        c.env("WHIMBREL_IOTESTS_LIMIT", &limit);
        c.env("PATH", format!("/usr/bin:{}", std::env::var("PATH").unwrap_or_default()));
        let out = output(&mut c)?;
        let said = String::from_utf8_lossy(&out.stdout);
        let log = || fs::read(state.join("log")).unwrap_or_default();
        let out_of_order = || OUT_OF_ORDER.contains(&test.name.as_str()) && self.same_lines(test, &dir);
        let fine = passed(out.status.code(), &said) || (said.contains("output mismatch") && out_of_order());
        if !fine {
            let (said, cried) = (tail(&out.stdout, 60), tail(&out.stderr, 10));
            bail!("it ended with {}: {said}\n{cried}\n{}", out.status, tail(&log(), 10));
        }
        let served = fs::read_to_string(state.join("served")).unwrap_or_default();
        ensure!(!served.is_empty(), "it passed, but no volume was shown to it: left out by name?");
        Ok(())
    }

    /// Whether the test said every line that it should, no more and no less, in whatever order.
    fn same_lines(&self, test: &Test, dir: &Path) -> bool {
        let lines = |path: PathBuf| -> Option<Vec<String>> {
            let text = fs::read_to_string(path).ok()?;
            let mut lines: Vec<String> = text.lines().map(|line| line.trim_end().to_owned()).collect();
            lines.sort();
            Some(lines)
        };
        let (name, scratch) = (&test.name, dir.join("scratch"));
        // Newer runners have a directory for each combination of format and protocol.
        let said = lines(scratch.join(format!("{name}.out.bad")))
            .or_else(|| lines(scratch.join(format!("raw-nbd-{name}/{name}.out.bad"))));
        said.is_some() && said == lines(self.suite.join(format!("{name}.out")))
    }

    /// Names of the volumes that the tests were shown.
    fn volumes(&self, tests: &[Test]) -> Result<Vec<String>> {
        let mut names = Vec::new();
        for test in tests {
            let dir = self.dir.join(&test.name).join("state/volumes");
            let entries = fs::read_dir(&dir).with_context(|| format!("list {}", dir.display()))?;
            names.extend(entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned()));
        }
        Ok(names)
    }
}

/// What the suite's runner says of one test; it takes "not run" for a success.
fn passed(status: Option<i32>, said: &str) -> bool {
    status == Some(0) && said.contains("Passed all 1 iotests") && !said.contains("[case not run]")
}

/// A volume that was shown has no problems, and is removed.
fn whole_and_gone(host: &Host, name: &str) -> Result<()> {
    let end = Instant::now() + DETACH_LIMIT;
    loop {
        let shown = host.whimbrel(&["volume", "show", name])?;
        if shown["exports"].as_array().is_none_or(Vec::is_empty) {
            break;
        }
        ensure!(Instant::now() < end, "volume {name} is shown long after its test: {shown}");
        // Its keeper may do that at this moment; who comes second is refused.
        output(&mut host.cli(&["volume", "detach", name]))?;
    }
    let check = host.whimbrel(&["volume", "check", name])?;
    ensure!(check["problems"].as_array().is_some_and(Vec::is_empty), "{check}");
    host.whimbrel(&["volume", "remove", name]).map(drop)
}

#[cfg(test)]
mod test {
    use super::*;

    fn with(text: &str) -> Option<&'static [&'static str]> {
        judge("001", text).map(|test| test.with)
    }

    #[test]
    fn a_test_is_for_us_by_what_it_declares_or_starts() {
        let over_nbd: &[&str] = &["-raw", "-nbd"];
        assert_eq!(with("_supported_fmt generic\n_supported_proto generic\n"), Some(over_nbd));
        assert_eq!(with("_supported_fmt raw qcow2\n_supported_proto file nbd # both\n"), Some(over_nbd));
        assert_eq!(
            with("iotests.main(supported_fmts=['raw'],\n  supported_protocols=['nbd'])"),
            Some(over_nbd)
        );
        assert_eq!(with("_supported_fmt qcow2 # raw\n_supported_proto generic\n"), None);
        assert_eq!(with("_supported_fmt generic\n_supported_proto file fuse\n"), None);
        assert_eq!(with("_supported_fmt generic\n_unsupported_fmt raw\n_supported_proto generic\n"), None);
        assert_eq!(with("_supported_fmt generic\n_supported_proto generic\n_unsupported_proto nbd\n"), None);
        assert_eq!(with("unsupported_fmts=['raw'], unsupported_protocols=['nbd']"), None);
        assert_eq!(with("supported_fmts=['qcow2'])\nqemu_nbd('-k', sock)"), Some(["-qcow2"].as_slice()));
        assert_eq!(
            with("_supported_fmt raw\n_supported_proto file\n$QEMU_NBD -k x"),
            Some(["-raw"].as_slice())
        );
    }

    #[test]
    fn what_was_not_run_has_not_passed() {
        assert!(passed(Some(0), "001   pass  [1] [2] 1.0s\nPassed all 1 iotests\n"));
        assert!(!passed(Some(0), "Not run: 005\nPassed all 0 iotests\n"));
        assert!(!passed(
            Some(0),
            "    [case not run] no IPv6\n\nSome cases not run in:\n147\nPassed all 1 iotests\n"
        ));
        assert!(!passed(Some(1), "Failures: 001\nFailed 1 of 1 iotests\n"));
        assert!(!passed(None, ""));
    }
}
