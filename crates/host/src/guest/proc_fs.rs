//! What `/proc` says about a process: its mappings, its start time, its rights. Text in, values out.
//!
//! Invariant: a line that is not understood is skipped or makes an error; nothing panics on a strange kernel.

use std::fs;
use std::path::PathBuf;

use crate::error::{Context, Error, ErrorKind, Result};

/// One line of `/proc/PID/maps`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Mapping {
    pub(crate) start: u64,
    pub(crate) end: u64,
    pub(crate) writable: bool,
    pub(crate) executable: bool,
    pub(crate) shared: bool,
    /// Offset in the file.
    pub(crate) offset: u64,
    /// The file system's device number, as `stat` gives it.
    pub(crate) device: u64,
    pub(crate) inode: u64,
    /// The file, or `[vdso]` and the like; empty if anonymous.
    pub(crate) path: String,
}

impl Mapping {
    pub(crate) fn length(&self) -> u64 {
        self.end.saturating_sub(self.start)
    }
}

/// All mappings of a process, by address.
pub(crate) fn mappings(pid: u32) -> Result<Vec<Mapping>> {
    let path = format!("/proc/{pid}/maps");
    let text = fs::read_to_string(&path).with_context(|| format!("read {path}"))?;
    Ok(text.lines().filter_map(parse_mapping).collect())
}

fn parse_mapping(line: &str) -> Option<Mapping> {
    let mut fields = line.splitn(6, ' ');
    let (start, end) = fields.next()?.split_once('-')?;
    let rights = fields.next()?.as_bytes();
    let offset = u64::from_str_radix(fields.next()?, 16).ok()?;
    let (major, minor) = fields.next()?.split_once(':')?;
    let number = |text| u32::from_str_radix(text, 16).ok();
    let device = rustix::fs::makedev(number(major)?, number(minor)?);
    let inode = fields.next()?.parse().ok()?;
    Some(Mapping {
        start: u64::from_str_radix(start, 16).ok()?,
        end: u64::from_str_radix(end, 16).ok()?,
        writable: rights.get(1) == Some(&b'w'),
        executable: rights.get(2) == Some(&b'x'),
        shared: rights.get(3) == Some(&b's'),
        offset,
        device,
        inode,
        path: fields.next().unwrap_or_default().trim_start().to_owned(),
    })
}

/// When a process started, in clock ticks since the host booted: with the pid it names a process for good.
pub(crate) fn start_time(pid: u32) -> Result<u64> {
    let path = format!("/proc/{pid}/stat");
    let text = fs::read_to_string(&path).with_context(|| format!("read {path}"))?;
    stat_field(&text, 22).and_then(|field| field.parse().ok()).ok_or_else(|| strange(&path))
}

/// Field `number` (from 1, at least 3) of a stat line; the name in field 2 may hold blanks and brackets.
fn stat_field(text: &str, number: usize) -> Option<&str> {
    let after_name = text.get(text.rfind(')')? + 1..)?;
    after_name.split_whitespace().nth(number.checked_sub(3)?)
}

/// The value of `key` in `/proc/PID/status`.
pub(crate) fn status(pid: u32, key: &str) -> Result<String> {
    let path = format!("/proc/{pid}/status");
    let text = fs::read_to_string(&path).with_context(|| format!("read {path}"))?;
    let line = text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'));
    line.map(|value| value.trim().to_owned()).ok_or_else(|| strange(&path))
}

/// Whether a process has capability number `bit` in effect.
pub(crate) fn has_capability(pid: u32, bit: u32) -> Result<bool> {
    let mask = status(pid, "CapEff")?;
    let mask = u64::from_str_radix(&mask, 16).map_err(|_| strange("CapEff"))?;
    Ok(mask >> bit & 1 == 1)
}

/// `CAP_SYS_ADMIN`.
pub(crate) const CAP_SYS_ADMIN: u32 = 21;
/// `CAP_SYS_PTRACE`.
pub(crate) const CAP_SYS_PTRACE: u32 = 19;

/// The open descriptors of a process: number and what it links to.
pub(crate) fn descriptors(pid: u32) -> Result<Vec<(i32, PathBuf)>> {
    let path = format!("/proc/{pid}/fd");
    let entries = fs::read_dir(&path).with_context(|| format!("read {path}"))?;
    let mut found = Vec::new();
    for entry in entries.flatten() {
        let number = entry.file_name().to_str().and_then(|name| name.parse().ok());
        // A descriptor may be closed while the directory is read.
        if let (Some(number), Ok(target)) = (number, fs::read_link(entry.path())) {
            found.push((number, target));
        }
    }
    found.sort();
    Ok(found)
}

fn strange(what: &str) -> Error {
    Error::new(ErrorKind::Unsupported, format!("read {what}: not what this kernel should say"))
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn a_mapping_of_a_file_with_blanks_in_its_name_is_read() {
        let line =
            "7f0000000000-7f0008000000 rw-s 00001000 00:1a 4711                       /dev/shm/a b (deleted)";
        let mapping = parse_mapping(line).unwrap();
        assert_eq!(mapping.start, 0x7f00_0000_0000);
        assert_eq!(mapping.length(), 0x800_0000);
        assert_eq!((mapping.offset, mapping.inode), (0x1000, 4711));
        assert!(mapping.shared && mapping.writable && !mapping.executable);
        assert_eq!(mapping.device, rustix::fs::makedev(0, 0x1a));
        assert_eq!(mapping.path, "/dev/shm/a b (deleted)");
        assert!(parse_mapping("rubbish").is_none());
    }

    #[test]
    fn a_process_name_with_brackets_does_not_shift_the_fields() {
        let text = "12 (a ) b) S 1 12 12 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 98765 1 2";
        assert_eq!(stat_field(text, 22), Some("98765"));
        assert_eq!(stat_field("", 22), None);
    }

    #[test]
    fn this_process_is_seen() {
        let pid = std::process::id();
        assert!(start_time(pid).unwrap() > 0);
        assert!(mappings(pid).unwrap().iter().any(|mapping| mapping.path == "[vdso]"));
        assert!(!descriptors(pid).unwrap().is_empty());
        has_capability(pid, CAP_SYS_PTRACE).unwrap();
    }
}

#[cfg(test)]
mod fuzz {
    use super::*;

    whimbrel_fuzz::fuzz! {
        /// Lines of /proc, in which a process writes its own name and paths.
        fn lines(bytes) seeds [
            b"7f0000000000-7f0000001000 rw-s 00001000 00:19 1234 /dev/shm/ram",
            b"12 (a (strange) name) S 1 1 1 0 -1 4194560 0 0 0 0 0 0 0 0 20 0 1 0 5000 0 0",
        ] {
            let text = String::from_utf8_lossy(bytes);
            let _ = parse_mapping(&text);
            for field in [1, 2, 3, 22, usize::from(bytes.first().copied().unwrap_or(0))] {
                let _ = stat_field(&text, field);
            }
        }
    }
}
