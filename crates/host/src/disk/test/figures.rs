//! Rates of one thread, printed; and bounds that only a defect would break.

use std::time::Instant;

use super::*;

fn rate(what: &str, count: u64, mut each: impl FnMut(u64)) -> f64 {
    let start = Instant::now();
    (0..count).for_each(&mut each);
    let us = start.elapsed().as_secs_f64() * 1e6 / count as f64;
    println!("{what}: {us:.2} us each, {:.0}/s", 1e6 / us);
    us
}

#[test]
fn one_thread_reads_and_writes_at_a_decent_rate() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("layer");
    let spec = LayerSpec::new(Parent::None, 1 << 30, Epoch(1));
    Layer::create(&path, &spec).unwrap();
    let layer = Layer::open(&path, None, Epoch(1), true).unwrap();
    let blocks = 20_000u64;
    let mut bytes = vec![7u8; 4096];
    let scattered = |n: u64| n * 7919 % 262_144 * BLOCK;
    let wrote = rate("write 4k", blocks, |n| layer.write(scattered(n), &[IoSlice::new(&bytes)]).unwrap());
    let read = rate("read 4k", blocks, |n| {
        layer.read(scattered(n % blocks), &mut [IoSliceMut::new(&mut bytes)]).unwrap();
    });
    rate("write 4k, flush every 64", 4096, |n| {
        layer.write(scattered(n), &[IoSlice::new(&bytes)]).unwrap();
        if n % 64 == 63 {
            layer.flush().unwrap();
        }
    });
    rate("write 4k + flush", 500, |n| {
        layer.write(scattered(n), &[IoSlice::new(&bytes)]).unwrap();
        layer.flush().unwrap();
    });
    let mut large = vec![7u8; 128 << 10];
    rate("write 128k", 2000, |n| layer.write(n % 4000 * (128 << 10), &[IoSlice::new(&large)]).unwrap());
    rate("read 128k", 2000, |n| {
        layer.read(n % 4000 * (128 << 10), &mut [IoSliceMut::new(&mut large)]).unwrap();
    });
    let info = layer.info();
    println!("map: {} bytes, log: {} bytes", info.map_bytes, info.log_bytes);
    let start = Instant::now();
    drop(layer);
    drop(Layer::open(&path, None, Epoch(1), true).unwrap());
    println!("open after an unclean end: {:.1} ms", start.elapsed().as_secs_f64() * 1e3);
    // Unoptimised, on a busy machine: far above what is expected, so that only a defect (a sync or a copy of the map
    // per call) breaks it.
    assert!(read < 400.0 && wrote < 1000.0, "read {read} us, write {wrote} us");
}
