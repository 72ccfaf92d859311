//! Into the lab's namespaces and out again.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::process::CommandExt as _;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context as _, Result, bail};

use crate::cmd::{cmd, run};
use crate::install::is_root;
use crate::paths;

/// Set for the inner process: the lab's directory.
const INSIDE: &str = "WHIMBREL_LAB";
/// What [`keep_running`] leaves for the outer shell, below the lab's directory.
const KEPT: &str = "kept";

/// The outer shell: starts the inner process, waits for it, and removes the directory. A signal kills the inner
/// process, and with it everything in its process namespace. With "kept" the inner process stays on its own.
const OUTER: &str = r#"
dir=$1; shift
"$@" & inner=$!
trap 'kill -KILL $inner; wait $inner; rm -rf "$dir"; exit 130' INT TERM HUP
while kill -0 $inner 2>/dev/null; do
  if [ -e "$dir/kept" ]; then trap - INT TERM HUP; echo "To remove both hosts: kill -KILL $inner; rm -rf $dir" >&2; exit "$(cat "$dir/kept")"; fi
  sleep 0.2
done
wait $inner; status=$?
rm -rf "$dir"
exit $status
"#;

/// Makes sure that this process runs in namespaces of its own: returns inside of them, having started itself anew
/// with the same arguments. Never returns outside, except with an error. There is no way out to the machine's
/// network inside, so what has to be fetched or built comes before, and is handed in as `prepared` paths.
pub fn enter(prepared: &[(&str, PathBuf)]) -> Result<()> {
    if inside() {
        return prepare_inside();
    }
    let dir = std::env::temp_dir().join(format!("whimbrel-{}", std::process::id()));
    fs::create_dir(&dir).with_context(|| format!("create {}", dir.display()))?;
    fs::set_permissions(&dir, fs::Permissions::from_mode(0o755)).context("open the lab's directory")?;
    let program = paths::xtask()?;
    let mut c = Command::new("sh");
    c.args(["-c", OUTER, "lab"]).arg(&dir).args(["setsid", "unshare"]);
    if !is_root() {
        c.args(["--user", "--map-root-user"]);
    }
    c.args(["--mount", "--net", "--pid", "--fork", "--kill-child", "--mount-proc", "--"]);
    c.arg(program).args(std::env::args_os().skip(1)).env(INSIDE, &dir);
    c.envs(prepared.iter().map(|(name, path)| (*name, path)));
    // Gives an error only when the shell could not be started.
    let error = c.exec();
    drop(fs::remove_dir(&dir));
    Err(error).context("start the lab's shell")
}

/// The lab's directory, inside.
pub fn own_directory() -> Result<PathBuf> {
    std::env::var_os(INSIDE).map(PathBuf::from).context("find the lab: this must run inside of it")
}

/// Tells the outer shell to end with `status` and leave everything here running; then stays for as long as nobody
/// kills it.
pub fn keep_running(status: u8) -> Result<()> {
    let dir = own_directory()?;
    let fresh = dir.join("kept.new");
    fs::write(&fresh, status.to_string()).context("tell the shell that the lab stays")?;
    fs::rename(&fresh, dir.join(KEPT)).context("tell the shell that the lab stays")?;
    loop {
        std::thread::park();
    }
}

/// A path that the outer process prepared under this name.
pub fn prepared(name: &str) -> Result<PathBuf> {
    std::env::var_os(name)
        .map(PathBuf::from)
        .with_context(|| format!("find {name}, which the outer process sets"))
}

/// Whether this user namespace knows one user only, which is what an unprivileged caller gets.
pub fn one_user_only() -> bool {
    let map = fs::read_to_string("/proc/self/uid_map").unwrap_or_default();
    map.split_whitespace().nth(2) == Some("1")
}

/// Whether this process is in the lab already.
pub fn inside() -> bool {
    std::env::var_os(INSIDE).is_some()
}

fn prepare_inside() -> Result<()> {
    if std::process::id() != 1 {
        bail!("{INSIDE} is set, but this is not the lab's first process: unset it");
    }
    // `ip netns` keeps its names under /run; a service manager that cannot see our processes must not be asked.
    run(&mut cmd("mount", &["-t", "tmpfs", "-o", "mode=755", "tmpfs", "/run"]))?;
    run(&mut cmd("ip", &["link", "set", "lo", "up"]))
}
