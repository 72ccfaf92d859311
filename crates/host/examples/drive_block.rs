//! A client of vhost-user-blk without a VM, over libblkio's driver: the load of the block benchmark.
//!
//! ```text
//! drive_block read   --socket S --block BYTES --depth N --seconds T          random reads for T seconds
//! drive_block write  --socket S --block BYTES --depth N --count N [--flush-every N] [--flush-always 1]
//! drive_block crash  --socket S --count N --flush-every N                    numbered blocks, until the server dies
//! drive_block verify --socket S --count N                                    of those, how many are not there
//! ```
//!
//! Prints one JSON object. Flushes are sent only if the device says that it needs them, as a guest's kernel does,
//! unless `--flush-always` is given.
#![expect(unsafe_code, reason = "the driver fills lists of MaybeUninit")]

use std::fs::File;
use std::mem::MaybeUninit;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use blkio::{Blkio, Blkioq, Completion, MemoryRegion, ReqFlags};

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

/// Size of a numbered block.
const NUMBERED_BYTES: usize = 4096;
/// The user data of flushes; requests have their slot's number.
const FLUSH: usize = usize::MAX;

#[derive(Default)]
struct Args {
    command: String,
    socket: String,
    block: usize,
    depth: usize,
    seconds: f64,
    count: u64,
    flush_every: u64,
    flush_always: bool,
    seed: u64,
}

fn args() -> Result<Args> {
    let mut given = std::env::args().skip(1);
    let command = given.next().ok_or("a command is missing")?;
    let mut args = Args { command, block: 4096, depth: 1, seconds: 1.0, seed: 1, ..Args::default() };
    while let Some(name) = given.next() {
        let value = given.next().ok_or_else(|| format!("{name} needs a value"))?;
        match name.as_str() {
            "--socket" => args.socket = value,
            "--block" => args.block = value.parse()?,
            "--depth" => args.depth = value.parse()?,
            "--seconds" => args.seconds = value.parse()?,
            "--count" => args.count = value.parse()?,
            "--flush-every" => args.flush_every = value.parse()?,
            "--flush-always" => args.flush_always = value == "1",
            "--seed" => args.seed = value.parse()?,
            other => return Err(format!("{other} is not known").into()),
        }
    }
    Ok(args)
}

/// xorshift64*: the same places in every run of the same seed.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 16) % limit
    }
}

struct Client {
    _blkio: Blkio,
    queue: Blkioq,
    region: MemoryRegion,
    memory: File,
    capacity: u64,
    flush_needed: bool,
}

impl Client {
    fn connect(socket: &str, bytes: usize) -> Result<Self> {
        let mut blkio = Blkio::new("virtio-blk-vhost-user").map_err(|error| error.to_string())?;
        blkio.set_str("path", socket).map_err(|error| error.to_string())?;
        blkio.connect().map_err(|error| error.to_string())?;
        let capacity = blkio.get_u64("capacity").map_err(|error| error.to_string())?;
        let flush_needed = blkio.get_bool("flush-needed").map_err(|error| error.to_string())?;
        blkio.set_i32("num-queues", 1).map_err(|error| error.to_string())?;
        let mut queues = blkio.start().map_err(|error| error.to_string())?.queues;
        let region = blkio.alloc_mem_region(bytes).map_err(|error| error.to_string())?;
        blkio.map_mem_region(&region).map_err(|error| error.to_string())?;
        let queue = queues.pop().ok_or("no queue")?;
        let memory = File::options().read(true).write(true).open(format!("/proc/self/fd/{}", region.fd))?;
        // Touched before anything is timed.
        memory.write_all_at(&vec![0x5a; bytes], 0)?;
        Ok(Self { _blkio: blkio, queue, region, memory, capacity, flush_needed })
    }

    fn at(&self, offset: usize) -> *mut u8 {
        std::ptr::without_provenance_mut(self.region.addr + offset)
    }

    /// Submits what was queued and waits for at least `min` answers; `false` if none came within `limit`.
    fn wait(
        &mut self,
        min: usize,
        limit: Duration,
        mut each: impl FnMut(usize) -> Result<()>,
    ) -> Result<bool> {
        let mut completions: [MaybeUninit<Completion>; 64] = [const { MaybeUninit::uninit() }; 64];
        let mut left = limit;
        let got = match self.queue.do_io(&mut completions, min, Some(&mut left), None) {
            Ok(got) => got,
            Err(error) if error.errno() == blkio::Errno::TIME => return Ok(false),
            Err(error) => return Err(error.to_string().into()),
        };
        for completion in completions.iter().take(got) {
            // SAFETY: `do_io` returned that it filled the first `got` entries.
            let completion = unsafe { completion.assume_init_ref() };
            if completion.ret != 0 {
                return Err(format!("a request failed: {}", completion.ret).into());
            }
            each(completion.user_data)?;
        }
        Ok(true)
    }
}

const LIMIT: Duration = Duration::from_secs(30);

fn read(args: &Args) -> Result<String> {
    let mut client = Client::connect(&args.socket, args.depth * args.block)?;
    let blocks = client.capacity / args.block as u64;
    let mut random = Random(args.seed | 1);
    let mut begun = vec![Instant::now(); args.depth];
    let mut latencies: Vec<u32> = Vec::with_capacity(1 << 20);
    let started = Instant::now();
    let end = started + Duration::from_secs_f64(args.seconds);
    let (mut done, mut idle): (u64, Vec<usize>) = (0, (0..args.depth).collect());
    loop {
        let now = Instant::now();
        if now >= end {
            break;
        }
        for slot in idle.drain(..) {
            let start = random.below(blocks) * args.block as u64;
            let into = client.at(slot * args.block);
            if let Some(begun) = begun.get_mut(slot) {
                *begun = now;
            }
            client.queue.read(start, into, args.block, slot, ReqFlags::empty());
        }
        let (begun, latencies, idle) = (&begun, &mut latencies, &mut idle);
        let answered = client.wait(1, LIMIT, |slot| {
            done += 1;
            if let Some(begun) = begun.get(slot) {
                latencies.push(u32::try_from(begun.elapsed().as_nanos()).unwrap_or(u32::MAX));
            }
            idle.push(slot);
            Ok(())
        })?;
        if !answered {
            return Err("no answer".into());
        }
    }
    let seconds = started.elapsed().as_secs_f64();
    latencies.sort_unstable();
    let percentile = |share: usize| latencies.get(latencies.len() * share / 100).copied().unwrap_or(0);
    Ok(format!(
        "{{\"rate\":{:.1},\"p50_us\":{:.2},\"p99_us\":{:.2}}}",
        done as f64 / seconds,
        f64::from(percentile(50)) / 1e3,
        f64::from(percentile(99)) / 1e3
    ))
}

fn write(args: &Args) -> Result<String> {
    let mut client = Client::connect(&args.socket, args.depth * args.block)?;
    let flushes = args.flush_every > 0 && (client.flush_needed || args.flush_always);
    let batch = if flushes { args.flush_every } else { args.count };
    let blocks = client.capacity / args.block as u64;
    let mut random = Random(args.seed | 1);
    let mut idle: Vec<usize> = (0..args.depth).collect();
    let (mut sent, mut done) = (0, 0);
    let started = Instant::now();
    while done < args.count {
        let batch_end = (sent + batch).min(args.count);
        while done < batch_end {
            while sent < batch_end {
                let Some(slot) = idle.pop() else { break };
                let start = random.below(blocks) * args.block as u64;
                let from = client.at(slot * args.block);
                client.queue.write(start, from, args.block, slot, ReqFlags::empty());
                sent += 1;
            }
            let (idle, done) = (&mut idle, &mut done);
            let answered = client.wait(1, LIMIT, |slot| {
                *done += 1;
                idle.push(slot);
                Ok(())
            })?;
            if !answered {
                return Err("no answer".into());
            }
        }
        // As an fsync does: when everything before it is answered.
        if flushes {
            client.queue.flush(FLUSH, ReqFlags::empty());
            if !client.wait(1, LIMIT, |_| Ok(()))? {
                return Err("no answer to a flush".into());
            }
        }
    }
    let seconds = started.elapsed().as_secs_f64();
    Ok(format!("{{\"rate\":{:.1},\"flushes\":{flushes}}}", args.count as f64 / seconds))
}

fn numbered(block: u64) -> Vec<u8> {
    (0..NUMBERED_BYTES / 16)
        .flat_map(|at| [block, at as u64 ^ 0x5bd1_e995_9d1b_54a5])
        .flat_map(u64::to_le_bytes)
        .collect()
}

/// Scatters the numbered blocks over the disk: an odd step visits every place once.
fn place(block: u64, blocks: u64) -> u64 {
    (block * 7_919 + 13) % blocks * NUMBERED_BYTES as u64
}

fn crash(args: &Args) -> Result<String> {
    let depth = 8;
    let mut client = Client::connect(&args.socket, depth * NUMBERED_BYTES)?;
    let blocks = client.capacity / NUMBERED_BYTES as u64;
    let mut durable = 0;
    let mut next = 0;
    println!("writing");
    'all: while next < args.count {
        // A batch, then a flush if the device wants one; without, an answer is a promise by itself.
        let batch_end = (next + args.flush_every.max(1)).min(args.count);
        while next < batch_end {
            let batch = (batch_end - next).min(depth as u64);
            for slot in 0..batch {
                let at = slot as usize * NUMBERED_BYTES;
                client.memory.write_all_at(&numbered(next + slot), at as u64)?;
                let from = client.at(at);
                client.queue.write(place(next + slot, blocks), from, NUMBERED_BYTES, 0, ReqFlags::empty());
            }
            let mut left = batch;
            while left > 0 {
                if !client.wait(1, Duration::from_secs(2), |_| {
                    left -= 1;
                    Ok(())
                })? {
                    break 'all;
                }
            }
            next += batch;
        }
        if client.flush_needed {
            client.queue.flush(FLUSH, ReqFlags::empty());
            if !client.wait(1, Duration::from_secs(2), |_| Ok(()))? {
                break;
            }
        }
        durable = next;
    }
    Ok(format!("{{\"durable\":{durable},\"flush_needed\":{}}}", client.flush_needed))
}

fn verify(args: &Args) -> Result<String> {
    let mut client = Client::connect(&args.socket, NUMBERED_BYTES)?;
    let blocks = client.capacity / NUMBERED_BYTES as u64;
    let mut lost = 0;
    let mut found = vec![0; NUMBERED_BYTES];
    for block in 0..args.count {
        let into = client.at(0);
        client.queue.read(place(block, blocks), into, NUMBERED_BYTES, 0, ReqFlags::empty());
        if !client.wait(1, LIMIT, |_| Ok(()))? {
            return Err("no answer".into());
        }
        client.memory.read_exact_at(&mut found, 0)?;
        lost += u64::from(found != numbered(block));
    }
    Ok(format!("{{\"lost\":{lost},\"of\":{}}}", args.count))
}

fn main() -> Result<()> {
    let args = args()?;
    let said = match args.command.as_str() {
        "read" => read(&args),
        "write" => write(&args),
        "crash" => crash(&args),
        "verify" => verify(&args),
        other => Err(format!("{other} is not a command").into()),
    }?;
    println!("{said}");
    Ok(())
}
