//! What guests and front-ends send, as fuzz targets: descriptors in shared memory, vhost-user messages, NBD.

use std::io::{Read as _, Write as _};
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::FileExt as _;
use std::os::unix::net::UnixStream;
use std::sync::atomic::AtomicUsize;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use vhost::vhost_user::BackendReqHandler;
use vmm_sys_util::sock_ctrl_msg::ScmSocket as _;

use super::blk::{self, Identity};
use super::frontend::Frontend;
use super::guest_ram::{GuestRam, RegionAddr};
use super::handover::Handover;
use super::inflight::InflightFile;
use super::pool::Pool;
use super::queue::{Complaints, Device, Stats};
use super::ring::{Chain, Ring, RingAddr};
use super::server::VhostUserOptions;
use super::slot::DeviceSlot;
use super::test_device::RamDevice;

const RAM_BYTES: u64 = 64 << 10;
const USER: u64 = 0x7000_0000;
const GPA: u64 = 0x10_0000;

fn identity() -> Identity {
    Identity { read_only: false, queues: 2, serial: "fuzz".to_owned() }
}

/// A file in memory with these bytes at its start.
fn memory(bytes: &[u8]) -> std::fs::File {
    let file =
        rustix::fs::memfd_create("fuzz", rustix::fs::MemfdFlags::CLOEXEC).expect("make a file in memory");
    let file = std::fs::File::from(file);
    file.set_len(RAM_BYTES).expect("size a file in memory");
    file.write_all_at(bytes.get(..RAM_BYTES as usize).unwrap_or(bytes), 0).expect("fill a file in memory");
    file
}

fn device() -> Arc<Device> {
    Arc::new(Device {
        identity: identity(),
        slot: DeviceSlot::active(Arc::new(RamDevice::new(1 << 20))),
        pool: Pool::new("fuzz", 2),
        busy_poll: Duration::ZERO,
        orphans: AtomicUsize::new(0),
        handover: Handover::default(),
        stats: Stats::default(),
        complaints: Complaints::default(),
    })
}

/// A ring of 8: descriptors at 0, available at 128, used at 192; one request of three parts.
fn ring_with_a_request() -> Vec<u8> {
    let mut bytes = vec![0; 1024];
    let desc = |gpa: u64, len: u32, flags: u16, next: u16| {
        let mut out = gpa.to_le_bytes().to_vec();
        out.extend(len.to_le_bytes());
        out.extend(flags.to_le_bytes());
        out.extend(next.to_le_bytes());
        out
    };
    for (n, part) in [
        desc(GPA + 512, 16, 1, 1),
        desc(GPA + 600, 64, 3, 2),
        desc(GPA + 700, 1, 2, 0),
        desc(GPA + 800, 32, 4, 0),
    ]
    .iter()
    .enumerate()
    {
        bytes[16 * n..16 * (n + 1)].copy_from_slice(part);
    }
    bytes[800..832].copy_from_slice(&[desc(GPA + 512, 16, 1, 1), desc(GPA + 900, 8, 2, 0)].concat());
    bytes[130..132].copy_from_slice(&2u16.to_le_bytes());
    bytes[134] = 3;
    bytes[512] = 11;
    bytes
}

/// One message of a conversation: a request number, a descriptor or none, a body.
fn message(request: u8, fds: u8, body: &[u8]) -> Vec<u8> {
    let mut out = vec![request, fds, u8::try_from(body.len()).unwrap_or(u8::MAX)];
    out.extend_from_slice(body);
    out
}

fn numbers(all: &[u64]) -> Vec<u8> {
    all.iter().flat_map(|n| n.to_le_bytes()).collect()
}

/// As QEMU starts a device: features, memory, ring, kick.
fn conversation() -> Vec<u8> {
    let ring = |index: u32, value: u32| [index.to_le_bytes(), value.to_le_bytes()].concat();
    let table = [&1u32.to_le_bytes()[..], &[0; 4], &numbers(&[GPA, RAM_BYTES, USER, 0])].concat();
    let addr = [&0u32.to_le_bytes()[..], &[0; 4], &numbers(&[USER, USER + 192, USER + 128, 0])].concat();
    [
        message(3, 0, &[]),
        message(1, 0, &[]),
        message(2, 0, &numbers(&[1 << 30 | 1 << 32])),
        message(16, 0, &numbers(&[1 << 0 | 1 << 1 | 1 << 12])),
        message(5, 1, &table),
        message(8, 0, &ring(0, 8)),
        message(10, 0, &ring(0, 0)),
        message(9, 0, &addr),
        message(12, 2, &numbers(&[0])),
        message(13, 2, &numbers(&[0])),
        message(18, 0, &ring(0, 1)),
        message(11, 0, &ring(0, 0)),
    ]
    .concat()
}

/// Sends the messages that `script` describes; what comes back is thrown away.
fn play(mut stream: UnixStream, mut script: &[u8]) {
    let ram = memory(&ring_with_a_request());
    let event = vmm_sys_util::eventfd::EventFd::new(0).expect("make an eventfd");
    // The conversation is over when the other side says so by closing.
    while let [request, fds, len, rest @ ..] = script {
        let (body, rest) = rest.split_at(usize::from(*len).min(rest.len()));
        script = rest;
        let mut bytes = Vec::new();
        // Version 1; now and then with "answer me", or a size that is not the body's.
        let flags = 1 | u32::from(fds & 0x80) >> 4;
        let size = if fds & 0x40 != 0 { u32::from(*len) << 9 } else { body.len() as u32 };
        for number in [u32::from(*request), flags, size] {
            bytes.extend(number.to_le_bytes());
        }
        bytes.extend_from_slice(body);
        let sent = match fds & 3 {
            1 => stream.send_with_fd(bytes.as_slice(), ram.as_raw_fd()).is_ok(),
            2 => stream.send_with_fd(bytes.as_slice(), event.as_raw_fd()).is_ok(),
            _ => stream.write_all(&bytes).is_ok(),
        };
        if !sent {
            break;
        }
    }
    let _ = stream.shutdown(std::net::Shutdown::Write);
    let _ = stream.set_read_timeout(Some(Duration::from_secs(5)));
    let _ = stream.read_to_end(&mut Vec::new());
}

whimbrel_fuzz::fuzz! {
    /// A guest's rings: every byte of them is the guest's.
    fn descriptors(bytes) seeds [ring_with_a_request()] {
        let file = memory(bytes);
        let addr = RegionAddr { gpa: GPA, size: RAM_BYTES, user: USER, file_offset: 0 };
        let ram = Arc::new(GuestRam::default().with(addr, &file).expect("one region"));
        let at = RingAddr { desc: USER, avail: USER + 128, used: USER + 192, used_log: None };
        let event_idx = bytes.len() % 2 == 1;
        let mut ring = Ring::new(&ram, 8, at, event_idx).expect("a ring inside its memory");
        let mut chain = Chain::default();
        for _ in 0..16 {
            let Ok(Some(head)) = ring.pop() else { break };
            assert!(head < 8);
            if ring.chain(&ram, head, &mut chain).is_ok() {
                let inside = |gpa: u64, len: usize| gpa >= GPA && gpa + len as u64 <= GPA + RAM_BYTES;
                assert!(chain.readable.iter().chain(&chain.writable).all(|seg| inside(seg.gpa, seg.len)));
                let _ = blk::ask(&chain.readable);
                for discard in [true, false] {
                    let size = 1 << 20;
                    let ranges = blk::ranges(size, &chain.readable, discard).unwrap_or_default();
                    assert!(ranges.iter().all(|range| range.start <= range.end && range.end <= size));
                }
            }
            ring.put_used(head, 1);
            ring.publish();
            ring.wants_signal();
        }
        ring.ask_for_kicks();
    }

    /// The record of requests under way, as a front-end kept it.
    fn in_flight_record(bytes) seeds [[0; 64], [1, 0, 0, 0, 1, 0, 8, 0, 0, 0, 0, 0]] {
        let (record, file, _) = InflightFile::create(1, 8).expect("make a record");
        let size = file.metadata().expect("look at the record").len() as usize;
        file.write_all_at(bytes.get(..size).unwrap_or(bytes), 0).expect("fill the record");
        let mut queue = record.queue(0, 8).expect("the only queue");
        for ring_used_idx in [0, 7, u16::MAX] {
            if let Ok(found) = queue.recover(ring_used_idx, Vec::new) {
                assert!(found.heads.len() <= 8 && found.heads.iter().all(|head| *head < 8), "{:?}", found.heads);
            }
        }
    }

    /// A front-end's messages, with memory and eventfds that come along.
    fn vhost_user_messages(bytes) seeds [conversation()] {
        static DEVICE: OnceLock<Arc<Device>> = OnceLock::new();
        let device = DEVICE.get_or_init(device).clone();
        let (client, server) = UnixStream::pair().expect("make a pair of sockets");
        let script = bytes.to_vec();
        let player = std::thread::spawn(move || play(client, &script));
        let options = VhostUserOptions {
            max_queue_size: 256,
            drain_limit: Duration::from_millis(200),
            ..VhostUserOptions::default()
        };
        let frontend = Arc::new(Mutex::new(Frontend::new(device, &options)));
        let mut handler = BackendReqHandler::from_stream(server, frontend.clone());
        while handler.handle_request().is_ok() {}
        frontend.lock().unwrap_or_else(PoisonError::into_inner).stop_all();
        drop(handler);
        player.join().expect("the front-end ends");
    }
}
