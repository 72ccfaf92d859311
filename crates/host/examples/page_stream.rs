//! Measures mode A's data path on this machine: `cargo run --release -p whimbrel-host --example page_stream`.
//!
//! Prints, for some contents of memory (or of a RAM file given as argument): what zstd's levels give for groups of
//! pages, rates of encoding and decoding per second of processor time, and whole rounds over TCP on the loopback.

use std::path::Path;

use tokio::net::{TcpListener, TcpStream};
use whimbrel_engine::block::encode::LEVELS;
use whimbrel_host::codec::adaptive::thread_cpu_s;
use whimbrel_host::codec::{Compressor, Decompressor};
use whimbrel_host::memory::{
    PAGE_BYTES, Progress, RamFile, Source, SourceOptions, TargetOptions, Techniques, target,
};
use whimbrel_host::{Error, ErrorKind, Result};

const PAGES: u64 = 131_072;

/// A RAM file on tmpfs, removed when dropped.
struct Scratch(std::path::PathBuf);

impl Scratch {
    fn new(name: &str, pages: u64) -> Result<(Self, RamFile)> {
        let path = Path::new("/dev/shm").join(format!("whimbrel-page-stream-{}-{name}", std::process::id()));
        let io = |error| Error::with_source(ErrorKind::Io, "make a RAM file", error);
        let file = std::fs::File::create_new(&path).map_err(io)?;
        file.set_len(pages * PAGE_BYTES as u64).map_err(io)?;
        let ram = RamFile::open_target("ram", &path)?;
        Ok((Self(path), ram))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

fn mix(mut x: u64) -> u64 {
    x = (x ^ (x >> 32)).wrapping_mul(0xd6e8_feb8_6659_fd93);
    x ^ (x >> 32)
}

/// A page of which `entropy` percent of the words are random and the rest are equal.
fn page(number: u64, entropy: u64) -> Vec<u8> {
    let word = |at: u64| match (at * 61) % 100 < entropy {
        true => mix(number.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ (at << 52 | at)),
        false => 0x6c65_7262_6d69_6877,
    };
    (0..512).flat_map(|at| word(at).to_le_bytes()).collect()
}

fn fill(ram: &RamFile, entropy: u64) -> Result<()> {
    for number in 0..ram.pages() {
        // An eighth of real guests' touched memory is zero.
        if number % 8 != 0 {
            ram.write(number, &page(number, entropy))?;
        }
    }
    Ok(())
}

fn codec_table(ram: &RamFile) -> Result<()> {
    let (mut pack, mut unpack) = (Compressor::new()?, Decompressor::new()?);
    for group_pages in [16, 64, 128] {
        for level in LEVELS {
            let mut raw = vec![0; group_pages * PAGE_BYTES];
            let (mut packed, mut back) = (vec![0; raw.len()], vec![0; raw.len()]);
            let (mut raw_bytes, mut packed_bytes, mut pack_s, mut unpack_s) = (0, 0, 0.0, 0.0);
            for group in (0..ram.pages() / group_pages as u64).step_by(7) {
                ram.read(group * group_pages as u64, &mut raw)?;
                let start_s = thread_cpu_s();
                let len = pack.compress(level, &raw, &mut packed)?;
                pack_s += thread_cpu_s() - start_s;
                raw_bytes += raw.len();
                packed_bytes += len.unwrap_or(raw.len());
                if let Some(packed) = len.and_then(|len| packed.get(..len)) {
                    let start_s = thread_cpu_s();
                    unpack.decompress(packed, &mut back)?;
                    unpack_s += thread_cpu_s() - start_s;
                }
            }
            println!(
                "  {group_pages:>4} pages, level {level:>2}: ratio {:.3}, pack {:.2} GB/s, unpack {:.2} GB/s",
                packed_bytes as f64 / raw_bytes as f64,
                raw_bytes as f64 / pack_s / 1e9,
                raw_bytes as f64 / unpack_s.max(1e-9) / 1e9
            );
        }
    }
    Ok(())
}

async fn round(from: &RamFile, raw_only: bool, techniques: Techniques) -> Result<()> {
    let io = |error| Error::with_source(ErrorKind::Io, "connect the loopback", error);
    let listener = TcpListener::bind("127.0.0.1:0").await.map_err(io)?;
    let (near, far) =
        tokio::try_join!(TcpStream::connect(listener.local_addr().map_err(io)?), listener.accept())
            .map_err(io)?;
    let (_scratch, to) = Scratch::new("target", from.pages())?;
    let receiving = tokio::spawn(async move {
        let mut far = far.0;
        target::receive(&mut far, vec![to], &TargetOptions::default(), &Progress::default()).await
    });
    let options = SourceOptions { raw_only, techniques, ..SourceOptions::default() };
    let progress = Progress::default();
    let mut source = Source::open(near, vec![from.try_clone()?], options, progress.clone()).await?;
    for round in 0..3 {
        let report = source.send_round(&source.full_sets(), round == 2).await?;
        // Those that are named, or found unchanged, are read and compared, too.
        let pages = report.counts.data_pages + report.counts.referred_pages + report.unchanged_pages;
        let data_bytes = pages as f64 * PAGE_BYTES as f64;
        println!(
            "  round {}: {:.3} s, {:.2} GB/s of data, wire {:.3}, encode {:.2} GB/s per core, decode {:.2} GB/s per core",
            report.round,
            report.duration.as_secs_f64(),
            data_bytes / report.duration.as_secs_f64() / 1e9,
            report.wire_bytes as f64 / data_bytes,
            data_bytes / report.encode_cpu_s / 1e9,
            data_bytes / (report.decode_ms.max(1) as f64 / 1e3) / 1e9
        );
    }
    source.close().await?;
    receiving.await.map_err(|error| Error::with_source(ErrorKind::Internal, "receive", error))??;
    Ok(())
}

async fn measure(name: &str, ram: &RamFile) -> Result<()> {
    println!("{name}:");
    codec_table(ram)?;
    println!(" open loopback, decided while it runs");
    round(ram, false, Techniques::default()).await?;
    println!(" open loopback, every page with its bytes");
    round(ram, false, Techniques::NONE).await?;
    println!(" open loopback, every page with its bytes, never compressed");
    round(ram, true, Techniques::NONE).await
}

#[tokio::main]
async fn main() -> Result<()> {
    if let Some(path) = std::env::args().nth(1) {
        return measure(&path, &RamFile::open_source("ram", Path::new(&path))?).await;
    }
    for entropy in [100, 50, 10] {
        let (_scratch, ram) = Scratch::new("source", PAGES)?;
        fill(&ram, entropy)?;
        measure(&format!("{entropy} % random words"), &ram).await?;
    }
    Ok(())
}
