//! Clients that send rubbish, stop reading or vanish, and what they do to others: nothing.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use whimbrel_wire::nbd::{Command, Headers, OptionHead, Request, option};

use super::test_client;
use super::{NbdOptions, NbdServer};
use crate::export::DeviceSlot;
use crate::export::test_device::RamDevice;

const SIZE: usize = 16 << 20;

fn start(dir: &tempfile::TempDir, patience: Duration) -> NbdServer {
    let slot = DeviceSlot::active(Arc::new(RamDevice::new(SIZE)));
    let options = NbdOptions { patience, ..NbdOptions::default() };
    NbdServer::start(&dir.path().join("nbd.sock"), slot, options).unwrap()
}

fn ask(number: u32, data: &[u8]) -> Vec<u8> {
    [&OptionHead { option: number, length: data.len() as u32 }.encode()[..], data].concat()
}

fn request(command: Command, offset: u64, length: u64) -> Vec<u8> {
    Request { flags: 0, command, cookie: 9, offset, length }.encode(Headers::Compact)
}

/// A client past the handshake, with structured replies.
fn connect(dir: &tempfile::TempDir) -> UnixStream {
    let mut stream = UnixStream::connect(dir.path().join("nbd.sock")).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    let hello = [3_u32.to_be_bytes().to_vec(), ask(option::STRUCTURED_REPLY, &[]), ask(option::GO, &[0; 6])];
    stream.write_all(&hello.concat()).unwrap();
    // Greeting; two acknowledgements, two pieces of information.
    let mut answers = [0; 18 + 20 + 20 + 32 + 34];
    stream.read_exact(&mut answers).unwrap();
    stream
}

fn answer(stream: &mut UnixStream) -> test_client::Chunk {
    let mut bytes = Vec::new();
    loop {
        let mut byte = [0; 1];
        stream.read_exact(&mut byte).unwrap();
        bytes.push(byte[0]);
        if let Some((_, chunk)) = test_client::chunk(&bytes, 0) {
            return chunk;
        }
    }
}

fn reads(stream: &mut UnixStream) {
    stream.write_all(&request(Command::Read, 0, 512)).unwrap();
    let got = answer(stream);
    assert_eq!((got.cookie, got.error, got.last), (9, 0, true));
}

/// The connection ends within the time a client has.
fn ends(stream: &mut UnixStream, what: &str) {
    let mut rest = Vec::new();
    let ended = stream.read_to_end(&mut rest);
    assert!(!matches!(ended, Err(error) if error.kind() == std::io::ErrorKind::WouldBlock), "{what}");
}

#[test]
fn rubbish_ends_its_own_connection_only() {
    let dir = tempfile::tempdir().unwrap();
    let _server = start(&dir, Duration::from_secs(5));
    let mut good = connect(&dir);
    let hello = 3_u32.to_be_bytes().to_vec();
    let head = |number: u32, length: u32| OptionHead { option: number, length }.encode().to_vec();
    let handshakes: [(&str, Vec<u8>); 6] = [
        ("flags that nobody knows", vec![0xff; 64]),
        ("a huge option", [hello.clone(), head(option::GO, u32::MAX)].concat()),
        ("no magic number", [hello.clone(), vec![0x5a; 4096]].concat()),
        ("another export, the old way", [hello.clone(), ask(option::EXPORT_NAME, b"other")].concat()),
        (
            "a long name, the old way",
            [hello.clone(), head(option::EXPORT_NAME, 70_000), vec![b'x'; 70_000]].concat(),
        ),
        ("half an option", [hello, head(option::GO, 100)].concat()),
    ];
    for (what, bytes) in handshakes {
        let mut stream = UnixStream::connect(dir.path().join("nbd.sock")).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        // Closed meanwhile, perhaps.
        let _ = stream.write_all(&bytes);
        ends(&mut stream, what);
        reads(&mut good);
    }
    let requests: [(&str, Vec<u8>); 3] = [
        ("a huge write", request(Command::Write, 0, u32::MAX.into())),
        ("no magic number", vec![0x5a; 28]),
        (
            "a request of the other form",
            Request { flags: 0, command: Command::Read, cookie: 1, offset: 0, length: 512 }
                .encode(Headers::Extended),
        ),
    ];
    for (what, bytes) in requests {
        let mut stream = connect(&dir);
        stream.write_all(&bytes).unwrap();
        ends(&mut stream, what);
        reads(&mut good);
    }
}

#[test]
fn options_that_are_too_large_or_unknown_are_answered() {
    let dir = tempfile::tempdir().unwrap();
    let _server = start(&dir, Duration::from_secs(5));
    let mut stream = UnixStream::connect(dir.path().join("nbd.sock")).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    stream
        .write_all(&[&3_u32.to_be_bytes()[..], &ask(option::GO, &vec![0; 100_000]), &ask(77, b"?")].concat())
        .unwrap();
    let mut answers = [0; 18 + 20 + 20];
    stream.read_exact(&mut answers).unwrap();
    assert_eq!(answers[30..34], option::REP_ERR_TOO_BIG.to_be_bytes());
    assert_eq!(answers[50..54], option::REP_ERR_UNSUP.to_be_bytes());
}

#[test]
fn a_client_that_stops_reading_holds_nobody_up_and_is_left() {
    let dir = tempfile::tempdir().unwrap();
    let server = start(&dir, Duration::from_secs(2));
    let mut good = connect(&dir);
    let mut greedy = connect(&dir);
    let data = [request(Command::Write, 0, 1 << 20), vec![7; 1 << 20]].concat();
    good.write_all(&data).unwrap();
    assert_eq!(answer(&mut good).error, 0);
    // Asks for far more than sockets hold, of both kinds: read at once, and read later.
    greedy.set_write_timeout(Some(Duration::from_millis(200))).unwrap();
    for _ in 0..64 {
        if greedy.write_all(&request(Command::Read, 0, 1 << 20)).is_err()
            || greedy.write_all(&request(Command::Read, 0, 2 << 20)).is_err()
        {
            break;
        }
    }
    let started = Instant::now();
    while server.connections() == 2 {
        let one = Instant::now();
        reads(&mut good);
        assert!(one.elapsed() < Duration::from_secs(1), "held up for {:?}", one.elapsed());
        assert!(started.elapsed() < Duration::from_secs(20), "it was never left");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn a_client_that_vanishes_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let server = start(&dir, Duration::from_secs(5));
    let mut good = connect(&dir);
    for cut in [0, 4, 28, 28 + 100, 28 + 512] {
        let mut stream = connect(&dir);
        let bytes = [request(Command::Write, 512, 512), vec![7; 512]].concat();
        stream.write_all(&bytes[..cut]).unwrap();
        drop(stream);
        reads(&mut good);
    }
    // And with work under way.
    for _ in 0..8 {
        let mut stream = connect(&dir);
        for at in 0..32 {
            stream.write_all(&request(Command::BlockStatus, at * 4096, 4096)).unwrap();
            stream.write_all(&request(Command::Cache, 0, 8 << 20)).unwrap();
        }
        drop(stream);
    }
    let started = Instant::now();
    while server.connections() > 1 {
        assert!(started.elapsed() < Duration::from_secs(20), "{} are left", server.connections());
        std::thread::sleep(Duration::from_millis(5));
    }
    reads(&mut good);
    // One that does not get through its handshake is left too.
    let mut silent = UnixStream::connect(dir.path().join("nbd.sock")).unwrap();
    silent.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    ends(&mut silent, "a silent client");
}

#[test]
fn clients_that_say_nothing_keep_nobody_out_and_those_that_work_stay() {
    let dir = tempfile::tempdir().unwrap();
    let slot = DeviceSlot::active(Arc::new(RamDevice::new(SIZE)));
    let options = NbdOptions { max_connections: 3, ..NbdOptions::default() };
    let _server = NbdServer::start(&dir.path().join("nbd.sock"), slot, options).unwrap();
    let mut good = connect(&dir);
    let _silent: Vec<_> = (0..4).map(|_| UnixStream::connect(dir.path().join("nbd.sock")).unwrap()).collect();
    let mut second = connect(&dir);
    let mut third = connect(&dir);
    for client in [&mut good, &mut second, &mut third] {
        reads(client);
    }
    let mut fourth = UnixStream::connect(dir.path().join("nbd.sock")).unwrap();
    fourth.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    ends(&mut fourth, "one too many");
    reads(&mut good);
}

#[test]
fn an_end_that_is_asked_for_comes_after_the_answers() {
    let dir = tempfile::tempdir().unwrap();
    let _server = start(&dir, Duration::from_secs(5));
    let mut stream = connect(&dir);
    let all = [
        request(Command::Cache, 0, 8 << 20),
        request(Command::Flush, 0, 0),
        request(Command::Disconnect, 0, 0),
    ];
    stream.write_all(&all.concat()).unwrap();
    let mut rest = Vec::new();
    stream.read_to_end(&mut rest).unwrap();
    assert_eq!(rest.len(), 2 * 16);
}
