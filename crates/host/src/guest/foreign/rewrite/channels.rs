//! Lines, screens and networks: on sockets of the VM's directory, on taps of the same bridge.
//!
//! Not here: disks' sockets (`disks`).

use std::path::{Path, PathBuf};

use whimbrel_wire::foreign::ForeignArg;
use whimbrel_wire::meta::NetSpec;

use super::Work;
use crate::guest::foreign::argv::{Opt, Props};
use crate::guest::launch::NETS_MAX;

impl Work<'_> {
    pub(super) fn chardev(&mut self, option: &Opt) {
        let Some(props) = self.props(option, "backend") else { return };
        let id = props.get("id").unwrap_or_default();
        let backend = props.get("backend").unwrap_or_default();
        let path = props.get("path").map(PathBuf::from);
        let mux = props.is_on("mux");
        let used_by_disk = |(_, device): &(Opt, Props)| {
            device.get("chardev").as_deref() == Some(&id)
                && device.get("driver").is_some_and(|kind| kind.starts_with("vhost-user-blk"))
        };
        if self.of("device", "driver").iter().any(used_by_disk) {
            return;
        }
        match backend.as_str() {
            "null" | "ringbuf" | "memory" => self.push(ForeignArg::Words(option.words())),
            "socket" if props.get("host").is_some() || props.get("port").is_some() => {
                self.refuse(option, "a network address of this host: use a unix socket");
            }
            "socket" if props.is_on("server") => {
                let console = self.is_console(&id, path.clone());
                let file = self.file_name(path.as_deref(), &id, "sock");
                self.push(ForeignArg::Socket { id, file, mux, console });
            }
            "socket" => self.refuse(option, "it connects to another program of this host"),
            "stdio" | "pty" | "vc" => {
                let console = self.is_console(&id, None);
                let file = self.file_name(None, &id, "sock");
                self.push(ForeignArg::Socket { id, file, mux, console });
            }
            "file" => {
                let file = self.file_name(path.as_deref(), &id, "log");
                self.push(ForeignArg::Log { id, file });
            }
            _ => self.refuse(option, "a chardev of this kind belongs to this host"),
        }
    }

    /// Whether a chardev is that of the first serial port; notes its socket.
    fn is_console(&mut self, id: &str, path: Option<PathBuf>) -> bool {
        let serials = self.options.iter().filter(|option| option.name == "serial");
        let mut ports: Vec<String> =
            serials.filter_map(|option| option.text().strip_prefix("chardev:").map(str::to_owned)).collect();
        for (_, device) in self.of("device", "driver") {
            if device.get("driver").as_deref() == Some("isa-serial") {
                ports.extend(device.get("chardev"));
            }
        }
        let is_console = ports.first().is_some_and(|port| port == id);
        if is_console {
            self.plan.console = path;
        }
        is_console
    }

    /// The name a socket or file has here, for any host; made from the id if that is none of its own.
    fn file_name(&self, path: Option<&Path>, id: &str, extension: &str) -> String {
        let taken = |name: &str| {
            self.plan.foreign.args.iter().any(|arg| match arg {
                ForeignArg::Socket { file, .. } | ForeignArg::Log { file, .. } => file == name,
                _ => false,
            })
        };
        // Ours begin with other words than these.
        let ours = |name: &str| {
            ["qmp", "console", "qemu", "disk", "vnc"].iter().any(|word| name.starts_with(word))
                || name.starts_with('.')
        };
        let name = path.and_then(Path::file_name).map(|name| name.to_string_lossy().into_owned());
        if let Some(name) = name
            && !taken(&name)
            && !ours(&name)
        {
            return name;
        }
        let safe: String = id
            .chars()
            .map(|c| if c.is_ascii_alphanumeric() || "-_.".contains(c) { c } else { '_' })
            .collect();
        format!("chardev-{safe}.{extension}")
    }

    pub(super) fn serial(&mut self, option: &Opt) {
        let (number, text) = (self.serials, option.text());
        self.serials += 1;
        if text.starts_with("chardev:") || text == "none" || text == "null" {
            return self.push(ForeignArg::Words(option.words()));
        }
        let (id, console) = (format!("whimbrel-serial{number}"), number == 0);
        if let Some(path) = text.strip_prefix("unix:") {
            let path = PathBuf::from(path.split(',').next().unwrap_or_default());
            if console {
                self.plan.console = Some(path.clone());
            }
            let file = self.file_name(Some(&path), &id, "sock");
            self.push(ForeignArg::Socket { id: id.clone(), file, mux: false, console });
        } else if matches!(text, "stdio" | "mon:stdio" | "pty") || text.starts_with("vc") {
            let file = self.file_name(None, &id, "sock");
            self.push(ForeignArg::Socket { id: id.clone(), file, mux: false, console });
        } else if let Some(path) = text.strip_prefix("file:") {
            let file = self.file_name(Some(Path::new(path)), &id, "log");
            self.push(ForeignArg::Log { id: id.clone(), file });
        } else {
            return self.refuse(option, "a line of this kind belongs to this host: use a unix socket");
        }
        self.words(&["-serial", &format!("chardev:{id}")]);
    }

    pub(super) fn netdev(&mut self, option: &Opt) {
        let Some(props) = self.props(option, "type") else { return };
        let (id, kind) = (props.get("id").unwrap_or_default(), props.get("type").unwrap_or_default());
        if props.get("queues").is_some_and(|count| count != "1") || props.get("fds").is_some() {
            return self.refuse(option, "several queues are not supported: use one");
        }
        let interface = props.get("fd").and_then(|fd| self.facts.tap_fds.get(&fd).cloned());
        let interface = interface.or_else(|| props.get("ifname"));
        let interface = interface.or_else(|| self.facts.tap_names.get(&id).cloned());
        let bridge = match (kind.as_str(), interface) {
            ("tap", Some(interface)) => match self.facts.bridges.get(&interface) {
                Some(bridge) => bridge.clone(),
                None => {
                    return self.refuse(option, &format!("tap {interface} is not on a bridge of this host"));
                }
            },
            ("tap" | "bridge", _) if props.get("br").is_some() => props.get("br").unwrap_or_default(),
            ("bridge", None) => "br0".to_owned(),
            ("tap", None) => return self.refuse(option, "the interface behind the tap cannot be found"),
            ("user", _) => {
                return self.refuse(option, "its connections end with this process: use a tap on a bridge");
            }
            _ => {
                return self
                    .refuse(option, "a network of this kind belongs to this host: use a tap on a bridge");
            }
        };
        if self.plan.nets.len() >= NETS_MAX {
            return self.refuse(option, "there are too many networks");
        }
        let user = self
            .of("device", "driver")
            .into_iter()
            .find(|(_, device)| device.get("netdev").as_ref() == Some(&id));
        let mac = user.and_then(|(_, device)| device.get("mac")).unwrap_or_default();
        let net = u32::try_from(self.plan.nets.len()).unwrap_or(u32::MAX);
        self.plan.nets.push(NetSpec { bridge, mac });
        self.push(ForeignArg::Tap { net, id });
    }

    pub(super) fn display(&mut self, option: &Opt) {
        let kind = option.text().split(',').next().unwrap_or_default();
        match kind {
            "vnc" => self.push(ForeignArg::Screen),
            "none" | "gtk" | "sdl" | "curses" | "cocoa" => self.words(&["-display", "none"]),
            _ => self.refuse(option, "a screen of this kind belongs to this host: use none or vnc"),
        }
    }

    pub(super) fn audiodev(&mut self, option: &Opt) {
        match self.props(option, "driver").and_then(|props| props.get("driver")).as_deref() {
            Some("none") => self.push(ForeignArg::Words(option.words())),
            Some(_) => self.refuse(option, "sound of this host: use driver none"),
            None => {}
        }
    }
}
