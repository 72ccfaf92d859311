//! Serves a volume, as the agent does, from a process of its own: for the block benchmark and for trying things.
//!
//! `serve_block --base FILE --layer DIR [--vhost-user SOCKET] [--nbd SOCKET] [--queues N] [--busy-poll-us N]`
//!
//! The layer is made if DIR does not exist. Ends when its standard input does.

use std::fs::File;
use std::io::{IoSliceMut, Read};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use whimbrel_host::block_dev::{BlockRead, Extent};
use whimbrel_host::disk::{Layer, LayerSpec};
use whimbrel_host::error::{Context, Error, ErrorKind, Result};
use whimbrel_host::export::nbd::{NbdOptions, NbdServer};
use whimbrel_host::export::{DeviceSlot, VhostUserOptions, VhostUserServer};
use whimbrel_wire::id::Epoch;
use whimbrel_wire::record::layer::Parent;

/// A raw image in a file.
struct RawBase {
    file: File,
    size: u64,
}

impl RawBase {
    fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).with_context(|| format!("open {}", path.display()))?;
        let size = file.metadata().with_context(|| format!("look at {}", path.display()))?.len();
        Ok(Self { file, size })
    }
}

impl BlockRead for RawBase {
    fn size_bytes(&self) -> u64 {
        self.size
    }

    fn read(&self, offset: u64, into: &mut [IoSliceMut<'_>]) -> Result<()> {
        let wanted: usize = into.iter().map(|part| part.len()).sum();
        let got = rustix::io::preadv(&self.file, into, offset).context("read base")?;
        if got == wanted {
            return Ok(());
        }
        // Interrupted half-way, which a file hardly is: slice by slice.
        let mut at = offset;
        for part in into {
            self.file.read_exact_at(part, at).context("read base")?;
            at += part.len() as u64;
        }
        Ok(())
    }

    fn read_now(&self, offset: u64, into: &mut [IoSliceMut<'_>]) -> Result<bool> {
        self.read(offset, into).map(|()| true)
    }

    fn extent(&self, offset: u64) -> Result<Extent> {
        Ok(Extent { length: self.size.saturating_sub(offset).max(1), data: true })
    }
}

#[derive(Default)]
struct Args {
    base: Option<PathBuf>,
    layer: Option<PathBuf>,
    vhost_user: Option<PathBuf>,
    nbd: Option<PathBuf>,
    queues: u16,
    busy_poll_us: Option<u64>,
}

fn usage(what: &str) -> Error {
    Error::new(ErrorKind::InvalidInput, format!("read the command line: {what}"))
}

fn args() -> Result<Args> {
    let mut parsed = Args { queues: 1, ..Args::default() };
    let mut given = std::env::args().skip(1);
    while let Some(name) = given.next() {
        let value = given.next().ok_or_else(|| usage(&format!("{name} needs a value")))?;
        let number = || value.parse::<u64>().map_err(|_| usage(&format!("{value} is no number")));
        match name.as_str() {
            "--base" => parsed.base = Some(value.into()),
            "--layer" => parsed.layer = Some(value.into()),
            "--vhost-user" => parsed.vhost_user = Some(value.into()),
            "--nbd" => parsed.nbd = Some(value.into()),
            "--queues" => parsed.queues = u16::try_from(number()?).map_err(|_| usage("too many queues"))?,
            "--busy-poll-us" => parsed.busy_poll_us = Some(number()?),
            other => return Err(usage(&format!("{other} is not known"))),
        }
    }
    Ok(parsed)
}

fn main() -> Result<()> {
    let args = args()?;
    let base = args.base.as_deref().map(RawBase::open).transpose()?;
    let layer_dir = args.layer.ok_or_else(|| usage("--layer is missing"))?;
    let layer_dir = std::path::absolute(&layer_dir).context("name the layer")?;
    if !layer_dir.exists() {
        let size = base.as_ref().map(|base| base.size).ok_or_else(|| usage("a new layer needs --base"))?;
        Layer::create(&layer_dir, &LayerSpec::new(Parent::None, size, Epoch(1)))?;
    }
    let base = base.map(|base| Arc::new(base) as Arc<dyn BlockRead>);
    let layer = Layer::open(&layer_dir, base, Epoch(1), true)?;
    let slot = DeviceSlot::active(layer);
    let mut options = VhostUserOptions { queues: args.queues, ..VhostUserOptions::default() };
    if let Some(us) = args.busy_poll_us {
        options.busy_poll = Duration::from_micros(us);
    }
    let vhost_user =
        args.vhost_user.map(|path| VhostUserServer::start(&path, slot.clone(), options)).transpose()?;
    let nbd =
        args.nbd.map(|path| NbdServer::start(&path, slot.clone(), NbdOptions::default())).transpose()?;
    println!("ready");
    // Whoever started us holds the other end.
    let mut rest = Vec::new();
    std::io::stdin().read_to_end(&mut rest).context("wait for the end of input")?;
    drop((vhost_user, nbd));
    Ok(())
}
