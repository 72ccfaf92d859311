//! The device against libblkio's driver: an implementation that is not ours.

use std::mem::MaybeUninit;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use blkio::{Blkio, Blkioq, MemoryRegion, ReqFlags};

use super::test_device::RamDevice;
use super::{DeviceSlot, VhostUserOptions, VhostUserServer};

const REGION: usize = 1 << 20;

struct Client {
    _blkio: Blkio,
    queues: Vec<Blkioq>,
    region: MemoryRegion,
}

impl Client {
    fn connect(path: &Path, queues: i32) -> Self {
        let mut blkio = Blkio::new("virtio-blk-vhost-user").unwrap();
        blkio.set_str("path", path.to_str().unwrap()).unwrap();
        blkio.connect().unwrap();
        assert_eq!(blkio.get_u64("capacity").unwrap(), 8 << 20);
        assert!(blkio.get_bool("flush-needed").unwrap());
        assert_eq!(blkio.get_i32("request-alignment").unwrap(), 512);
        assert!(blkio.get_i32("max-queues").unwrap() >= queues);
        blkio.set_i32("num-queues", queues).unwrap();
        let queues = blkio.start().unwrap().queues;
        let region = blkio.alloc_mem_region(REGION).unwrap();
        blkio.map_mem_region(&region).unwrap();
        Self { _blkio: blkio, queues, region }
    }

    fn at(&self, offset: usize) -> *mut u8 {
        std::ptr::without_provenance_mut(self.region.addr + offset)
    }

    /// The region's bytes through its file: no pointer needed.
    fn memory(&self) -> std::fs::File {
        std::fs::File::options()
            .read(true)
            .write(true)
            .open(format!("/proc/self/fd/{}", self.region.fd))
            .unwrap()
    }

    fn put(&self, offset: u64, bytes: &[u8]) {
        std::os::unix::fs::FileExt::write_all_at(&self.memory(), bytes, offset).unwrap();
    }

    fn get(&self, offset: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        std::os::unix::fs::FileExt::read_exact_at(&self.memory(), &mut bytes, offset).unwrap();
        bytes
    }

    /// Waits for `count` requests of a queue; their user data and results.
    fn wait(&mut self, queue: usize, count: usize) -> Vec<(usize, i32)> {
        let mut done = Vec::new();
        while done.len() < count {
            let mut completions: [MaybeUninit<blkio::Completion>; 64] =
                std::array::from_fn(|_| MaybeUninit::uninit());
            let mut limit = Duration::from_secs(20);
            let wanted = count - done.len();
            let got = self.queues[queue]
                .do_io(&mut completions[..wanted.min(64)], 1, Some(&mut limit), None)
                .unwrap();
            for completion in &completions[..got] {
                done.push(completed(completion));
            }
        }
        done
    }
}

/// Reads a completion that the driver has written.
#[expect(unsafe_code, reason = "the driver fills a list of MaybeUninit")]
fn completed(completion: &MaybeUninit<blkio::Completion>) -> (usize, i32) {
    // SAFETY: `do_io` returned that it wrote this entry.
    let completion = unsafe { completion.assume_init_ref() };
    (completion.user_data, completion.ret)
}

fn serve(dir: &Path, queues: u16) -> (VhostUserServer, Arc<RamDevice>) {
    let mut device = RamDevice::new(8 << 20);
    device.slow = Some((4 << 20..5 << 20, Duration::from_millis(2)));
    let device = Arc::new(device);
    let options = VhostUserOptions { queues, ..VhostUserOptions::default() };
    let server =
        VhostUserServer::start(&dir.join("vub.sock"), DeviceSlot::active(device.clone()), options).unwrap();
    (server, device)
}

#[test]
fn libblkio_reads_what_it_wrote_and_zeroes_and_discards_and_flushes() {
    let dir = tempfile::tempdir().unwrap();
    let (server, device) = serve(dir.path(), 1);
    let mut client = Client::connect(server.path(), 1);
    let pattern: Vec<u8> = (0..65536_u32).map(|index| ((index * 31) >> 3) as u8).collect();
    client.put(0, &pattern);
    // At both kinds of place: done at once, and after waiting.
    for start in [0_u64, (4 << 20) + 4096] {
        let (from, into) = (client.at(0), client.at(1 << 19));
        client.queues[0].write(start, from, 65536, 1, ReqFlags::empty());
        assert_eq!(client.wait(0, 1), vec![(1, 0)]);
        client.queues[0].read(start, into, 65536, 2, ReqFlags::empty());
        assert_eq!(client.wait(0, 1), vec![(2, 0)]);
        assert!(client.get(1 << 19, 65536) == pattern, "at {start}");

        client.queues[0].write_zeroes(start + 4096, 8192, 3, ReqFlags::empty());
        assert_eq!(client.wait(0, 1), vec![(3, 0)]);
        client.queues[0].discard(start + 32768, 4096, 4, ReqFlags::empty());
        assert_eq!(client.wait(0, 1), vec![(4, 0)]);
        client.queues[0].read(start, into, 65536, 5, ReqFlags::empty());
        assert_eq!(client.wait(0, 1), vec![(5, 0)]);
        let mut expected = pattern.clone();
        expected[4096..12288].fill(0);
        expected[32768..36864].fill(0);
        assert!(client.get(1 << 19, 65536) == expected, "at {start}");
    }
    client.queues[0].flush(6, ReqFlags::empty());
    assert_eq!(client.wait(0, 1), vec![(6, 0)]);
    assert_eq!(*device.flushes.lock(), 1);
    // Beyond the end: an error of the request.
    let into = client.at(0);
    client.queues[0].read((8 << 20) - 512, into, 1024, 7, ReqFlags::empty());
    assert!(client.wait(0, 1)[0].1 < 0);
}

#[test]
fn four_queues_at_depth_keep_their_requests_apart() {
    let dir = tempfile::tempdir().unwrap();
    let (server, _device) = serve(dir.path(), 4);
    let mut client = Client::connect(server.path(), 4);
    // Each queue has its own quarter of memory and of the first 4 MiB of disk.
    let quarter = REGION / 4;
    for queue in 0..4 {
        client.put((queue * quarter) as u64, &vec![queue as u8 + 1; quarter / 2]);
        for request in 0..32 {
            let from = client.at(queue * quarter + request * 4096);
            let start = (queue << 20) + request * 4096;
            client.queues[queue].write(start as u64, from, 4096, request, ReqFlags::empty());
        }
    }
    for queue in 0..4 {
        let mut done: Vec<usize> = client.wait(queue, 32).into_iter().map(|(request, _)| request).collect();
        done.sort_unstable();
        assert_eq!(done, (0..32).collect::<Vec<_>>());
    }
    for queue in 0..4 {
        let into = client.at(queue * quarter + quarter / 2);
        client.queues[queue].read((queue << 20) as u64, into, quarter / 2, 0, ReqFlags::empty());
        assert_eq!(client.wait(queue, 1), vec![(0, 0)]);
        let found = client.get((queue * quarter + quarter / 2) as u64, quarter / 2);
        assert!(found.iter().all(|byte| *byte == queue as u8 + 1), "queue {queue}");
    }
}

#[test]
fn a_client_that_vanishes_with_requests_under_way_is_replaced_by_the_next() {
    let dir = tempfile::tempdir().unwrap();
    let (server, _device) = serve(dir.path(), 1);
    for _ in 0..5 {
        let mut client = Client::connect(server.path(), 1);
        for request in 0..16 {
            let into = client.at(request * 4096);
            let start = (4 << 20) + request * 4096;
            client.queues[0].read(start as u64, into, 4096, request, ReqFlags::empty());
        }
        let mut none: [MaybeUninit<blkio::Completion>; 0] = [];
        client.queues[0].do_io(&mut none, 0, None, None).unwrap();
    }
    let mut client = Client::connect(server.path(), 1);
    let into = client.at(0);
    client.queues[0].read(0, into, 4096, 9, ReqFlags::empty());
    assert_eq!(client.wait(0, 1), vec![(9, 0)]);
}
