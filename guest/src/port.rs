//! Virtio-serial ports by name, with udev or without it.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::PathBuf;

/// Opens the port called `name`; non-blocking, because nobody may be listening outside.
pub fn open(name: &str) -> io::Result<File> {
    let path = find(name).ok_or_else(|| io::Error::from(io::ErrorKind::NotFound))?;
    OpenOptions::new().read(true).write(true).custom_flags(libc::O_NONBLOCK).open(path)
}

fn find(name: &str) -> Option<PathBuf> {
    for entry in fs::read_dir("/sys/class/virtio-ports").ok()?.flatten() {
        let path = entry.path();
        if fs::read_to_string(path.join("name")).is_ok_and(|n| n.trim() == name) {
            return Some(PathBuf::from("/dev").join(entry.file_name()));
        }
    }
    None
}
