//! An NBD client's bytes, from its first word on, as a fuzz target.

use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use super::{Export, NbdOptions, handshake, proto, session};
use crate::export::pool::Pool;
use crate::export::slot::DeviceSlot;
use crate::export::test_device::RamDevice;

fn export() -> Arc<Export> {
    Arc::new(Export {
        slot: DeviceSlot::active(Arc::new(RamDevice::new(1 << 20))),
        pool: Pool::new("fuzz", 2),
        options: NbdOptions { patience: Duration::from_secs(1), ..NbdOptions::default() },
        stop: AtomicBool::new(false),
    })
}

fn option(number: u32, data: &[u8]) -> Vec<u8> {
    let head =
        [&proto::OPTION_MAGIC.to_be_bytes()[..], &number.to_be_bytes(), &(data.len() as u32).to_be_bytes()];
    [head.concat(), data.to_vec()].concat()
}

fn request(command: u16, offset: u64, length: u32, data: &[u8]) -> Vec<u8> {
    [
        &proto::REQUEST_MAGIC.to_be_bytes()[..],
        &[0, 0],
        &command.to_be_bytes(),
        &7u64.to_be_bytes(),
        &offset.to_be_bytes(),
        &length.to_be_bytes(),
        data,
    ]
    .concat()
}

/// A client that agrees on everything and uses it.
fn conversation() -> Vec<u8> {
    let context = [&[0; 4][..], &1u32.to_be_bytes(), &15u32.to_be_bytes(), proto::CONTEXT].concat();
    [
        3u32.to_be_bytes().to_vec(),
        option(proto::OPT_STRUCTURED_REPLY, &[]),
        option(proto::OPT_SET_META_CONTEXT, &context),
        option(proto::OPT_LIST, &[]),
        option(proto::OPT_INFO, &[0, 0, 0, 0, 0, 1, 0, 3]),
        option(proto::OPT_GO, &[0; 6]),
        request(proto::CMD_WRITE, 512, 512, &[7; 512]),
        request(proto::CMD_READ, 512, 512, &[]),
        request(proto::CMD_BLOCK_STATUS, 0, 4096, &[]),
        request(proto::CMD_WRITE_ZEROES, 0, 4096, &[]),
        request(proto::CMD_TRIM, 0, 4096, &[]),
        request(proto::CMD_FLUSH, 0, 0, &[]),
        request(proto::CMD_CACHE, 0, 4096, &[]),
        request(proto::CMD_DISC, 0, 0, &[]),
    ]
    .concat()
}

whimbrel_fuzz::fuzz! {
    /// Handshake and requests.
    fn client(bytes) seeds [
        conversation(),
        [3u32.to_be_bytes().to_vec(), option(proto::OPT_EXPORT_NAME, &[]), request(proto::CMD_READ, 0, 4096, &[])].concat(),
    ] {
        static EXPORT: OnceLock<Arc<Export>> = OnceLock::new();
        let export = EXPORT.get_or_init(export);
        let (mut client, server) = UnixStream::pair().expect("make a pair of sockets");
        let said = bytes.to_vec();
        let client = std::thread::spawn(move || {
            // An answer may be larger than what a socket holds: one side writes while the other reads.
            let mut reader = client.try_clone().expect("copy a socket");
            let drain = std::thread::spawn(move || std::io::copy(&mut reader, &mut std::io::sink()));
            let _ = client.write_all(&said);
            let _ = client.shutdown(std::net::Shutdown::Write);
            let _ = drain.join();
        });
        if let Ok(Some(agreed)) = handshake::shake_hands(export, &server) {
            let _ = session::run(export, &server, agreed);
        }
        let _ = server.shutdown(std::net::Shutdown::Both);
        // What the client has not sent yet has nobody to read it any more.
        let _ = (&server).read(&mut [0; 1]);
        drop(server);
        client.join().expect("the client ends");
    }
}
