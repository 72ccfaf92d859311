//! A command line of QEMU's, taken apart: options, and their properties in both spellings.
//!
//! ```text
//!   words ─► split ─► [Opt { name, value }]        value ─► Props: key=value,key=value   or   {"key": value}
//! ```
//!
//! Invariants: an option that is not in the tables is an error that names it, since nobody could tell whether the next
//! word is its value; a value that is not changed keeps its spelling.
//!
//! Not here: what the options mean (`rewrite`).

use serde_json::{Map, Value};

/// Options that take no value.
const FLAGS: &[&str] = &[
    "S",
    "s",
    "daemonize",
    "enable-kvm",
    "full-screen",
    "mem-prealloc",
    "no-acpi",
    "no-fd-bootchk",
    "no-hpet",
    "no-quit",
    "no-reboot",
    "no-shutdown",
    "no-user-config",
    "nodefaults",
    "nodefconfig",
    "nographic",
    "only-migratable",
    "preconfig",
    "snapshot",
    "usb",
    "win2k-hack",
];

/// Options that take one.
const VALUED: &[&str] = &[
    "D",
    "L",
    "M",
    "accel",
    "acpitable",
    "action",
    "add-fd",
    "alt-grab",
    "append",
    "audio",
    "audiodev",
    "bios",
    "blockdev",
    "boot",
    "cdrom",
    "chardev",
    "chroot",
    "compat",
    "cpu",
    "d",
    "debugcon",
    "device",
    "dfilter",
    "display",
    "drive",
    "dtb",
    "echr",
    "fda",
    "fdb",
    "fsdev",
    "fw_cfg",
    "g",
    "gdb",
    "global",
    "hda",
    "hdb",
    "hdc",
    "hdd",
    "icount",
    "incoming",
    "initrd",
    "iscsi",
    "k",
    "kernel",
    "loadvm",
    "m",
    "machine",
    "mem-path",
    "mon",
    "monitor",
    "msg",
    "mtdblock",
    "name",
    "net",
    "netdev",
    "nic",
    "numa",
    "object",
    "option-rom",
    "overcommit",
    "parallel",
    "perfmap",
    "pflash",
    "pidfile",
    "plugin",
    "prom-env",
    "qmp",
    "qmp-pretty",
    "readconfig",
    "rotate",
    "rtc",
    "run-with",
    "runas",
    "sandbox",
    "sd",
    "seed",
    "serial",
    "set",
    "shim",
    "smbios",
    "smp",
    "spice",
    "tb-size",
    "tpmdev",
    "trace",
    "usbdevice",
    "uuid",
    "vga",
    "virtfs",
    "virtioconsole",
    "vnc",
    "watchdog",
    "watchdog-action",
    "xen-attach",
    "xen-domid",
    "initrd",
];

/// One option.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Opt {
    /// Without its dashes.
    pub name: String,
    /// The word after it, if it takes one.
    pub value: Option<String>,
}

impl Opt {
    /// The value, or nothing.
    pub fn text(&self) -> &str {
        self.value.as_deref().unwrap_or_default()
    }

    /// As it stood on the command line, cut to a length fit for messages.
    pub fn shown(&self) -> String {
        const SHOWN_CHARS: usize = 120;
        let mut text = format!("-{} {}", self.name, self.text());
        if text.chars().count() > SHOWN_CHARS {
            text = text.chars().take(SHOWN_CHARS).collect();
            text.push('…');
        }
        text.trim_end().to_owned()
    }

    /// As words of a command line.
    pub fn words(&self) -> Vec<String> {
        let name = format!("-{}", self.name);
        std::iter::once(name).chain(self.value.clone()).collect()
    }
}

/// The options of a command line, the program's name left out; what is not understood, in words.
pub fn split(words: &[String]) -> (Vec<Opt>, Vec<String>) {
    let (mut options, mut strange) = (Vec::new(), Vec::new());
    let mut rest = words.iter();
    while let Some(word) = rest.next() {
        let Some(name) = word.strip_prefix("--").or_else(|| word.strip_prefix('-')) else {
            // A bare word is a disk image.
            options.push(Opt { name: "hda".to_owned(), value: Some(word.clone()) });
            continue;
        };
        if FLAGS.contains(&name) {
            options.push(Opt { name: name.to_owned(), value: None });
        } else if VALUED.contains(&name) {
            match rest.next() {
                Some(value) => options.push(Opt { name: name.to_owned(), value: Some(value.clone()) }),
                None => strange.push(format!("argument -{name}: its value is missing")),
            }
        } else {
            strange.push(format!("argument -{name}: not known to this version of Whimbrel"));
            // Its value, if that is what follows, must not be taken for a disk.
            if rest.as_slice().first().is_some_and(|next| !next.starts_with('-')) {
                rest.next();
            }
        }
    }
    (options, strange)
}

/// The properties of an option.
#[derive(Clone, Debug, PartialEq)]
pub enum Props {
    /// `key=value,…`, in order.
    Keys(Vec<(String, String)>),
    /// `{"key": value, …}`.
    Json(Map<String, Value>),
}

impl Props {
    /// Reads a value; the first word without a key is the one of `implied`.
    pub fn parse(text: &str, implied: &str) -> Result<Self, String> {
        if text.starts_with('{') {
            return match serde_json::from_str(text) {
                Ok(Value::Object(map)) => Ok(Self::Json(map)),
                Ok(_) => Err("it is no JSON object".to_owned()),
                Err(error) => Err(format!("it is no JSON ({error})")),
            };
        }
        let mut keys = Vec::new();
        for (index, part) in split_commas(text).into_iter().enumerate() {
            match part.split_once('=') {
                Some((key, value)) => keys.push((key.to_owned(), value.to_owned())),
                None if index == 0 && !implied.is_empty() => keys.push((implied.to_owned(), part)),
                None if part.is_empty() => {}
                None => keys.push(match part.strip_prefix("no") {
                    // QEMU's old way to switch off; only for words that are no options themselves.
                    Some(off @ ("server" | "wait" | "delay")) => (off.to_owned(), "off".to_owned()),
                    _ => (part, "on".to_owned()),
                }),
            }
        }
        Ok(Self::Keys(keys))
    }

    /// A property; one of an inner object is named `outer.inner`.
    pub fn get(&self, key: &str) -> Option<String> {
        match self {
            // The last one counts.
            Self::Keys(keys) => {
                keys.iter().rev().find(|(name, _)| name == key).map(|(_, value)| value.clone())
            }
            Self::Json(map) => {
                let value = match map.get(key) {
                    Some(value) => Some(value),
                    None => {
                        let mut parts = key.split('.');
                        let outer = map.get(parts.next()?)?;
                        parts.try_fold(outer, |value, part| value.get(part))
                    }
                };
                value.and_then(scalar)
            }
        }
    }

    /// Whether a property is on.
    pub fn is_on(&self, key: &str) -> bool {
        matches!(self.get(key).as_deref(), Some("on" | "yes" | "true" | "1"))
    }

    /// The names of all properties.
    pub fn names(&self) -> Vec<String> {
        match self {
            Self::Keys(keys) => keys.iter().map(|(key, _)| key.clone()).collect(),
            Self::Json(map) => map.keys().cloned().collect(),
        }
    }

    /// Sets a property.
    pub fn set(&mut self, key: &str, value: impl Into<Value>) {
        let value = value.into();
        match self {
            Self::Keys(keys) => {
                keys.retain(|(name, _)| name != key);
                keys.push((key.to_owned(), scalar(&value).unwrap_or_default()));
            }
            Self::Json(map) => {
                map.insert(key.to_owned(), value);
            }
        }
    }

    /// Takes a property away.
    pub fn remove(&mut self, key: &str) {
        match self {
            Self::Keys(keys) => keys.retain(|(name, _)| name != key),
            Self::Json(map) => {
                map.remove(key);
            }
        }
    }

    /// As a value on a command line.
    pub fn text(&self) -> String {
        match self {
            Self::Keys(keys) => {
                let one = |(key, value): &(String, String)| format!("{key}={}", value.replace(',', ",,"));
                keys.iter().map(one).collect::<Vec<_>>().join(",")
            }
            Self::Json(map) => Value::Object(map.clone()).to_string(),
        }
    }
}

fn scalar(value: &Value) -> Option<String> {
    match value {
        Value::String(text) => Some(text.clone()),
        Value::Bool(true) => Some("on".to_owned()),
        Value::Bool(false) => Some("off".to_owned()),
        Value::Number(number) => Some(number.to_string()),
        Value::Null | Value::Array(_) | Value::Object(_) => None,
    }
}

/// Splits at commas; a doubled one is a comma of the value.
fn split_commas(text: &str) -> Vec<String> {
    let (mut parts, mut part) = (Vec::new(), String::new());
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        match c {
            ',' if chars.peek() == Some(&',') => {
                chars.next();
                part.push(',');
            }
            ',' => parts.push(std::mem::take(&mut part)),
            c => part.push(c),
        }
    }
    parts.push(part);
    parts
}

#[cfg(test)]
mod test {
    use proptest::prelude::*;

    use super::*;

    fn words(line: &[&str]) -> Vec<String> {
        line.iter().map(|word| (*word).to_owned()).collect()
    }

    #[test]
    fn options_are_told_from_values_and_strange_ones_are_named() {
        let line = ["-S", "--machine", "q35", "disk.img", "-frobnicate", "x", "-m"];
        let (options, strange) = split(&words(&line));
        let shown: Vec<String> = options.iter().map(Opt::shown).collect();
        assert_eq!(shown, ["-S", "-machine q35", "-hda disk.img"]);
        assert_eq!(strange.len(), 2, "{strange:?}");
        assert!(strange[0].contains("-frobnicate") && strange[1].contains("-m"), "{strange:?}");
    }

    #[test]
    fn properties_are_read_in_both_spellings() {
        let keys = Props::parse("socket,id=a,path=/x,,y,server,nowait", "backend").unwrap();
        assert_eq!(keys.get("backend").as_deref(), Some("socket"));
        assert_eq!(keys.get("path").as_deref(), Some("/x,y"));
        assert!(keys.is_on("server") && keys.get("wait").as_deref() == Some("off"));
        let json = r#"{"driver":"nbd","server":{"type":"unix","path":"/s"},"port":16,"on":true}"#;
        let json = Props::parse(json, "driver").unwrap();
        assert_eq!(json.get("server.path").as_deref(), Some("/s"));
        assert_eq!((json.get("port").as_deref(), json.is_on("on")), (Some("16"), true));
        assert!(Props::parse("{broken", "x").is_err());
    }

    #[test]
    fn a_changed_property_keeps_the_others() {
        let mut keys = Props::parse("virtio-blk-pci,drive=a,id=b", "driver").unwrap();
        keys.set("drive", "n,0");
        keys.set("cyls", 4);
        assert_eq!(keys.text(), "driver=virtio-blk-pci,id=b,drive=n,,0,cyls=4");
        let mut json = Props::parse(r#"{"driver":"virtio-blk-pci","drive":"a"}"#, "driver").unwrap();
        json.set("drive", "n0");
        json.set("cyls", 4);
        assert_eq!(json.text(), r#"{"cyls":4,"drive":"n0","driver":"virtio-blk-pci"}"#);
    }

    proptest! {
        #[test]
        fn what_is_written_is_read_again(pairs in prop::collection::vec(("[a-z][a-z.-]{0,8}", "[^=]{0,12}"), 1..6)) {
            let props = Props::Keys(pairs);
            prop_assert_eq!(Props::parse(&props.text(), "").unwrap(), props);
        }

        #[test]
        fn no_command_line_makes_it_panic(line in prop::collection::vec(".{0,20}", 0..10)) {
            let (options, _) = split(&line);
            for option in options {
                if let Ok(props) = Props::parse(option.text(), "x") {
                    let _ = (props.get("a.b.c"), props.text());
                }
            }
        }
    }
}
