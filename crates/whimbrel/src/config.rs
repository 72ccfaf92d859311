//! The agent's configuration: one TOML file, every key with a default.
//!
//! Unknown keys are reported at start and otherwise ignored, so that a file survives going back one release.

use std::path::{Path, PathBuf};

use anyhow::Context as _;
use serde::{Deserialize, Serialize};
use whimbrel_engine::memory::page_group::{Capture, Wanted};
use whimbrel_host::memory::Techniques;

/// Where the agent listens and the command line connects.
pub const SOCKET_DEFAULT: &str = "/run/whimbrel/agent.sock";

/// The file that is read if it exists and no other is named.
const FILE_DEFAULT: &str = "/etc/whimbrel/whimbrel.toml";

/// See the module's charter.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default)]
pub struct Config {
    /// This host's name in the cluster; the machine's host name if empty.
    pub name: String,
    /// State that survives a restart: certificates, metadata, cache, layers.
    pub data_dir: PathBuf,
    /// State that does not survive a reboot: sockets of running VMs.
    pub run_dir: PathBuf,
    /// The API's unix socket; `agent.sock` below `run_dir` if empty.
    pub socket: PathBuf,
    /// RAM of VMs; a tmpfs or hugetlbfs.
    pub memory_dir: PathBuf,
    /// Where other hosts and remote operators reach this host: one TLS port for everything.
    pub listen: String,
    /// `IP:PORT`s told to other hosts, best first; derived from `listen` and the machine's addresses if empty.
    pub advertise: Vec<String>,
    /// The metadata store of a cluster made here.
    pub meta: Meta,
    /// QEMU's program.
    pub qemu: String,
    /// The unprivileged user that VMs and image converters run as; `nobody` if this one does not exist.
    pub vm_user: String,
    /// The one directory in which files may be that published or imported images lie on; none if empty.
    pub backing_dir: PathBuf,
    /// A block fetched from a peer is kept after this many fetches.
    pub keep_after_fetches: u32,
    /// Most bytes per second that this host serves to others' image reads; 0 is no limit.
    pub upload_limit_bytes_s: u64,
    /// How fast the cache is re-read in search of bit rot; 0 turns it off.
    pub scrub_bytes_s: u64,
    /// How a guest's writes are followed while its memory is copied: `auto` (by measured cost), always `pages`
    /// (asynchronously, one by one) or always `groups` (by write faults that open several).
    pub write_tracking: WriteTracking,
    /// Tenants whose objects this host may read; empty means objects without a domain.
    pub domains: Vec<String>,
    /// How memory travels when a VM is moved by the agents (mode A).
    pub memory: Memory,
}

/// What makes pages of a moving VM's memory shorter, beyond compression. What the host at the other end has switched off, or
/// does not know, is not used either.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default)]
pub struct Memory {
    /// Most bytes of versions of pages that a move keeps at its source, so that a page which is sent again travels as what
    /// changed; 0 turns it off.
    pub delta_cache_bytes: u64,
    /// A page that equals one that was sent before is named instead of sent.
    pub same_pages: bool,
    /// A page that equals the block of an image that it was read from is named instead of sent, if the target has the image.
    pub disk_blocks: bool,
}

impl Default for Memory {
    fn default() -> Self {
        let Techniques { delta_bytes, same, disk } = Techniques::default();
        Self { delta_cache_bytes: delta_bytes, same_pages: same, disk_blocks: disk }
    }
}

impl Memory {
    /// As the mover of memory takes it.
    pub fn techniques(&self) -> Techniques {
        Techniques { delta_bytes: self.delta_cache_bytes, same: self.same_pages, disk: self.disk_blocks }
    }
}

/// See [`Config::write_tracking`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum WriteTracking {
    /// Whichever costs less.
    #[default]
    Auto,
    /// Page by page.
    Pages,
    /// In groups.
    Groups,
}

impl From<WriteTracking> for Wanted {
    fn from(tracking: WriteTracking) -> Self {
        match tracking {
            WriteTracking::Auto => Self::Auto,
            WriteTracking::Pages => Self::Always(Capture::Pages),
            WriteTracking::Groups => Self::Always(Capture::Groups),
        }
    }
}

/// The metadata store of a cluster.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Meta {
    /// A SQLite file; `meta.db` below `data_dir` if empty. Agents of one machine may share it: each names it here.
    pub sqlite: PathBuf,
    /// etcd's `https://HOST:PORT`s; used instead of SQLite if there are any. etcd's certificates are signed by the
    /// cluster's authority, and it knows the hosts by theirs.
    pub etcd: Vec<String>,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            name: String::new(),
            data_dir: "/var/lib/whimbrel".into(),
            run_dir: "/run/whimbrel".into(),
            socket: PathBuf::new(),
            memory_dir: "/dev/shm/whimbrel".into(),
            listen: "[::]:7420".into(),
            advertise: Vec::new(),
            meta: Meta::default(),
            qemu: "qemu-system-x86_64".into(),
            vm_user: "whimbrel-vm".into(),
            backing_dir: PathBuf::new(),
            keep_after_fetches: 1,
            upload_limit_bytes_s: 0,
            scrub_bytes_s: 4 << 20,
            write_tracking: WriteTracking::Auto,
            domains: Vec::new(),
            memory: Memory::default(),
        }
    }
}

impl Config {
    /// Reads `file`, or the default file if it exists, or takes the defaults.
    pub fn load(file: Option<&Path>) -> anyhow::Result<Self> {
        let path = match file {
            Some(path) => path,
            None if Path::new(FILE_DEFAULT).exists() => Path::new(FILE_DEFAULT),
            None => return Self::default().completed(),
        };
        let text = std::fs::read_to_string(path)
            .with_context(|| format!("read configuration {}", path.display()))?;
        Self::parse(&text).with_context(|| format!("read configuration {}", path.display()))
    }

    fn parse(text: &str) -> anyhow::Result<Self> {
        let table: toml::Table = toml::from_str(text)?;
        let known = toml::Table::try_from(Self::default())?;
        for key in unknown_keys(&table, &known, "") {
            tracing::warn!(key, "configuration key is unknown and ignored");
        }
        let config: Self = table.try_into()?;
        config.completed()
    }

    /// The SQLite file of a cluster made here.
    pub fn sqlite_path(&self) -> PathBuf {
        if self.meta.sqlite.as_os_str().is_empty() {
            self.data_dir.join("meta.db")
        } else {
            self.meta.sqlite.clone()
        }
    }

    fn completed(mut self) -> anyhow::Result<Self> {
        if self.name.is_empty() {
            let name = rustix::system::uname().nodename().to_string_lossy().into_owned();
            self.name = name.split('.').next().unwrap_or_default().to_owned();
        }
        if self.socket.as_os_str().is_empty() {
            self.socket = self.run_dir.join("agent.sock");
        }
        self.name.parse::<whimbrel_wire::Name>().context("read key `name`")?;
        self.listen.parse::<std::net::SocketAddr>().context("read key `listen`: IP:PORT")?;
        for domain in &self.domains {
            domain.parse::<whimbrel_wire::Name>().context("read key `domains`")?;
        }
        Ok(self)
    }
}

fn unknown_keys(table: &toml::Table, known: &toml::Table, prefix: &str) -> Vec<String> {
    let mut unknown = Vec::new();
    for (key, value) in table {
        match (known.get(key), value) {
            (None, _) => unknown.push(format!("{prefix}{key}")),
            (Some(toml::Value::Table(known)), toml::Value::Table(table)) => {
                unknown.extend(unknown_keys(table, known, &format!("{prefix}{key}.")));
            }
            (Some(_), _) => {}
        }
    }
    unknown
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn an_empty_file_is_the_defaults_and_unknown_keys_are_named() {
        let config = Config::parse("name = 'a'").unwrap();
        assert_eq!(config.socket, PathBuf::from(SOCKET_DEFAULT));
        assert_eq!(config.sqlite_path(), PathBuf::from("/var/lib/whimbrel/meta.db"));
        let table: toml::Table = toml::from_str("nmae = 'a'\n[meta]\nsqlight = 'x'").unwrap();
        let known = toml::Table::try_from(Config::default()).unwrap();
        assert_eq!(unknown_keys(&table, &known, ""), ["meta.sqlight", "nmae"]);
    }

    #[test]
    fn techniques_are_switched_off_one_by_one() {
        let with = |text: &str| Config::parse(&format!("name = 'a'\n{text}")).unwrap().memory.techniques();
        assert_eq!(with(""), Techniques::default());
        assert_eq!(with("[memory]\nsame_pages = false"), Techniques { same: false, ..Techniques::default() });
        let none = "[memory]\nsame_pages = false\ndisk_blocks = false\ndelta_cache_bytes = 0";
        assert_eq!(with(none), Techniques::NONE);
    }

    #[test]
    fn a_bad_value_is_refused() {
        for bad in ["name = 'a/b'", "name = 'a'\nlisten = 'here'", "name = 'a'\ndomains = ['']"] {
            assert!(Config::parse(bad).is_err(), "{bad}");
        }
    }
}

#[cfg(test)]
mod fuzz {
    use super::*;

    whimbrel_fuzz::fuzz! {
        /// A configuration file, edited by hand.
        fn files(bytes) seeds [
            toml::to_string(&Config { name: "h".into(), ..Config::default() }).expect("write the defaults"),
            b"name = 'a'\nlisten = '0.0.0.0:1'\ndomains = ['x']\n[meta]\netcd = ['https://h:1']",
        ] {
            let Ok(text) = std::str::from_utf8(bytes) else { return };
            if let Ok(config) = Config::parse(text) {
                let again = toml::to_string(&config).expect("what was read can be written");
                assert!(Config::parse(&again).is_ok(), "{again}");
            }
        }
    }
}
