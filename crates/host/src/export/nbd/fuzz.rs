//! An NBD client's bytes, from its first word on, as fuzz targets; what we answer must be what a client understands.

use std::io::{Read as _, Write as _};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use whimbrel_engine::export::nbd::Agreed;
use whimbrel_wire::nbd::request::{FLAG_DF, FLAG_FUA, FLAG_NO_HOLE, FLAG_PAYLOAD_LEN, FLAG_REQ_ONE};
use whimbrel_wire::nbd::{CONTEXT, Command, Headers, OptionHead, Replies, Request, option};

use super::line::Line;
use super::{Export, NbdOptions, handshake, session, test_client};
use crate::export::slot::DeviceSlot;
use crate::export::test_device::RamDevice;

const DISK_BYTES: usize = 1 << 20;

fn export() -> Arc<Export> {
    static EXPORT: OnceLock<Arc<Export>> = OnceLock::new();
    let make = || {
        Arc::new(Export {
            slot: DeviceSlot::active(Arc::new(RamDevice::new(DISK_BYTES))),
            options: NbdOptions { patience: Duration::from_secs(1), workers: 2, ..NbdOptions::default() },
            tls: None,
            stop: AtomicBool::new(false),
        })
    };
    EXPORT.get_or_init(make).clone()
}

fn ask(number: u32, data: &[u8]) -> Vec<u8> {
    [&OptionHead { option: number, length: data.len() as u32 }.encode()[..], data].concat()
}

fn request(headers: Headers, command: Command, flags: u16, offset: u64, length: u64) -> Vec<u8> {
    Request { flags, command, cookie: 7, offset, length }.encode(headers)
}

/// Requests of every kind.
fn requests(headers: Headers) -> Vec<u8> {
    let carries = if headers == Headers::Extended { FLAG_PAYLOAD_LEN } else { 0 };
    let mut said = Vec::new();
    let mut say = |command, flags, offset, length| {
        said.extend(request(headers, command, flags, offset, length));
        if command == Command::Write {
            said.extend(vec![7; length as usize]);
        }
    };
    say(Command::Write, carries, 512, 512);
    say(Command::Write, carries | FLAG_FUA, 8192, 4096);
    say(Command::Read, 0, 0, 65536);
    say(Command::BlockStatus, FLAG_REQ_ONE, 0, 4096);
    say(Command::WriteZeroes, 0, 0, 4096);
    say(Command::WriteZeroes, FLAG_NO_HOLE, 0, 4096);
    say(Command::Trim, 0, 0, 4096);
    say(Command::Flush, 0, 0, 0);
    say(Command::Cache, 0, 0, 4096);
    if headers == Headers::Extended {
        say(Command::BlockStatus, FLAG_PAYLOAD_LEN, 0, 12);
        said.extend([0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 1]);
    }
    said.extend(request(headers, Command::Read, FLAG_DF, 0, 8192));
    said.extend(request(headers, Command::Disconnect, 0, 0, 0));
    said
}

/// A client that agrees on everything and uses it.
fn conversation(headers: Headers) -> Vec<u8> {
    let context = [&[0; 4][..], &1u32.to_be_bytes(), &15u32.to_be_bytes(), CONTEXT].concat();
    let form = if headers == Headers::Extended { option::EXTENDED_HEADERS } else { option::STRUCTURED_REPLY };
    [
        3u32.to_be_bytes().to_vec(),
        ask(option::LIST, &[]),
        ask(option::STARTTLS, &[]),
        ask(form, &[]),
        ask(option::LIST_META_CONTEXT, &[0; 8]),
        ask(option::SET_META_CONTEXT, &context),
        ask(option::INFO, &[0, 0, 0, 0, 0, 1, 0, 3]),
        ask(option::GO, &[0; 6]),
        requests(headers),
    ]
    .concat()
}

/// Has a client say `said` to what `serve` does with the other end; gives what it was told.
fn talk(said: &[u8], serve: impl FnOnce(Line)) -> Vec<u8> {
    let (mut client, server) = UnixStream::pair().expect("make a pair of sockets");
    let said = said.to_vec();
    let client = std::thread::spawn(move || {
        // An answer may be larger than what a socket holds: one side writes while the other reads.
        let mut reader = client.try_clone().expect("copy a socket");
        let told = std::thread::spawn(move || {
            let mut told = Vec::new();
            // A reset is an end too.
            let _ = reader.read_to_end(&mut told);
            told
        });
        let _ = client.write_all(&said);
        let _ = client.shutdown(std::net::Shutdown::Write);
        told.join().expect("the reader ends")
    });
    let server = Arc::new(OwnedFd::from(server));
    serve(Line::new(server.clone()));
    super::line::shut(&server);
    drop(server);
    client.join().expect("the client ends")
}

whimbrel_fuzz::fuzz! {
    /// Handshake and requests, as one stream of bytes.
    fn client(bytes) seeds [
        conversation(Headers::Compact),
        conversation(Headers::Extended),
        [
            0u32.to_be_bytes().to_vec(),
            ask(option::EXPORT_NAME, &[]),
            request(Headers::Compact, Command::Read, 0, 0, 4096),
        ].concat(),
    ] {
        let export = export();
        talk(bytes, |mut line| {
            if let Ok(Some(agreed)) = handshake::shake_hands(&export, &mut line) {
                let _ = session::run(&export, line, agreed);
            }
        });
    }

    /// Requests of each form: the first byte says which.
    fn requests_and_answers(bytes) seeds [
        [&[0][..], &requests(Headers::Compact)].concat(),
        [&[1][..], &requests(Headers::Compact)].concat(),
        [&[2][..], &requests(Headers::Extended)].concat(),
    ] {
        let Some((form, said)) = bytes.split_first() else { return };
        let replies = [Replies::Simple, Replies::Structured, Replies::Extended][usize::from(form % 3)];
        let export = export();
        let told = talk(said, |line| {
            let _ = session::run(&export, line, Agreed { replies, status: true });
        });
        if replies == Replies::Simple {
            // Without the requests beside them simple replies cannot be taken apart.
            return;
        }
        let mut rest = told.as_slice();
        while let Some((length, chunk)) = test_client::chunk(rest, 0) {
            if let Some((offset, _)) = chunk.content {
                assert!(offset < DISK_BYTES as u64);
            }
            assert!(chunk.runs.iter().all(|(length, _)| (1..=DISK_BYTES as u64).contains(length)));
            rest = rest.get(length..).unwrap_or_default();
        }
        // What was sent was sent whole.
        assert!(rest.is_empty(), "{} bytes that are no reply", rest.len());
    }
}
