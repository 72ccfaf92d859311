//! Settings: `wg.KEY=VALUE` on the kernel's command line, then `KEY=VALUE` arguments on top.

use std::fs;
use std::path::PathBuf;

/// What the workload does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// MiB of memory to use; 0 leaves memory alone.
    pub mem_mib: usize,
    /// MiB of pages to touch per second, all threads together.
    pub mem_rate_mib_s: u64,
    /// MiB of the arena that are written again and again; the rest is written once and only verified. 0 is all.
    pub mem_hot_mib: usize,
    /// Threads, each with its own part of the arena.
    pub mem_threads: usize,
    /// How much of a page is random, in percent; the rest compresses.
    pub mem_entropy: u64,
    /// A page is changed in this many steps: 1 rewrites the whole page each time, 16 a sixteenth of it.
    pub mem_steps: u64,
    /// File or block device for records; none leaves the disk alone.
    pub disk: Option<PathBuf>,
    /// MiB of records before the oldest is overwritten.
    pub disk_mib: u64,
    /// Records per second; 0 is as fast as flushes go.
    pub disk_rate: u64,
    /// Whether to send a beat every millisecond.
    pub beat: bool,
    /// Whether to serve TCP echo (port 7) and stream (port 7000).
    pub serve: bool,
}

impl Default for Config {
    fn default() -> Self {
        Config {
            mem_mib: 0,
            mem_rate_mib_s: 10,
            mem_hot_mib: 0,
            mem_threads: 1,
            mem_entropy: 50,
            mem_steps: 1,
            disk: None,
            disk_mib: 16,
            disk_rate: 0,
            beat: true,
            serve: true,
        }
    }
}

impl Config {
    /// Reads the kernel's command line and the program's arguments.
    pub fn from_machine() -> Result<Config, String> {
        let line = fs::read_to_string("/proc/cmdline").unwrap_or_default();
        let mut config = Config::default();
        for word in line.split_whitespace() {
            if let Some(setting) = word.strip_prefix("wg.") {
                config.set(setting)?;
            }
        }
        for setting in std::env::args().skip(1) {
            config.set(&setting)?;
        }
        Ok(config)
    }

    fn set(&mut self, setting: &str) -> Result<(), String> {
        let (key, value) =
            setting.split_once('=').ok_or_else(|| format!("setting {setting:?} is not KEY=VALUE"))?;
        let number = || value.parse::<u64>().map_err(|_| format!("setting {key}: {value:?} is not a number"));
        match key {
            "mem_mib" => self.mem_mib = number()? as usize,
            "mem_rate" => self.mem_rate_mib_s = number()?,
            "mem_hot" => self.mem_hot_mib = number()? as usize,
            "mem_threads" => self.mem_threads = number()?.clamp(1, 64) as usize,
            "mem_entropy" => self.mem_entropy = number()?.min(100),
            "mem_steps" => self.mem_steps = if number()? > 1 { 16 } else { 1 },
            "disk" => self.disk = (value != "off").then(|| PathBuf::from(value)),
            "disk_mib" => self.disk_mib = number()?.max(1),
            "disk_rate" => self.disk_rate = number()?,
            "beat" => self.beat = value != "off",
            "serve" => self.serve = value != "off",
            // The init script's own.
            "ip" | "gw" => {}
            _ => return Err(format!("setting {key:?} is not known")),
        }
        Ok(())
    }
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn settings_override_the_defaults_and_nonsense_is_named() {
        let mut c = Config::default();
        for s in ["mem_mib=64", "mem_steps=16", "disk=/data/records", "beat=off"] {
            c.set(s).unwrap();
        }
        assert_eq!((c.mem_mib, c.mem_steps, c.beat), (64, 16, false));
        assert_eq!(c.disk.as_deref(), Some(std::path::Path::new("/data/records")));
        assert!(c.set("mem_mib=lots").unwrap_err().contains("lots"));
        assert!(c.set("colour=blue").unwrap_err().contains("colour"));
    }
}
