//! Bytes as the protocol's text has them, and what is read back.

use proptest::prelude::*;

use super::request::StatusPayload;
use super::*;

fn request(command: Command, offset: u64, length: u64) -> Request {
    Request { flags: 0, command, cookie: 0x0102_0304_0506_0708, offset, length }
}

#[test]
fn heads_stand_as_in_the_protocols_text() {
    let read = request(Command::Read, 512, 1024);
    assert_eq!(
        *Head::data(Replies::Simple, &read, 512, 1024, true),
        [0x67, 0x44, 0x66, 0x98, 0, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8]
    );
    assert_eq!(
        Head::data(Replies::Structured, &read, 512, 1024, true).to_vec(),
        [
            &[0x66, 0x8e, 0x33, 0xef, 0, 1, 0, 1, 1, 2, 3, 4, 5, 6, 7, 8, 0, 0, 4, 8][..],
            &[0, 0, 0, 0, 0, 0, 2, 0],
        ]
        .concat()
    );
    assert_eq!(
        Head::hole(Replies::Extended, &read, 1024, 512, false).to_vec(),
        [
            &[0x6e, 0x8a, 0x27, 0x8c, 0, 0, 0, 2, 1, 2, 3, 4, 5, 6, 7, 8][..],
            &[0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0, 12],
            &[0, 0, 0, 0, 0, 0, 4, 0, 0, 0, 2, 0],
        ]
        .concat()
    );
    assert_eq!(Head::hole(Replies::Extended, &read, 0, 1, true).len(), Head::BYTES_MAX);
    let flush = request(Command::Flush, 0, 0);
    assert_eq!(Head::done(Replies::Structured, &flush).len(), 16);
    assert_eq!(Head::done(Replies::Extended, &flush)[..8], [0x6e, 0x8a, 0x27, 0x8c, 0, 1, 0, 0]);
}

#[test]
fn errors_bring_their_words_where_there_is_room() {
    let write = request(Command::Write, 0, 512);
    assert_eq!(
        reply::error(Replies::Simple, &write, Errno::NoSpace, "full")[..8],
        [0x67, 0x44, 0x66, 0x98, 0, 0, 0, 28]
    );
    let chunk = reply::error(Replies::Structured, &write, Errno::NoSpace, "full");
    assert_eq!(chunk[4..8], [0, 1, 0x80, 1]);
    assert_eq!(chunk[16..], [&[0, 0, 0, 10, 0, 0, 0, 28, 0, 4][..], b"full"].concat());
    let long = "ä".repeat(5000);
    assert!(reply::error(Replies::Extended, &write, Errno::Io, &long).len() <= 32 + 6 + STRING_BYTES_MAX);
}

#[test]
fn runs_have_32_bits_or_64() {
    let runs = [Run { length: 4096, state: STATE_HOLE | STATE_ZERO }, Run { length: 1 << 33, state: 0 }];
    let ask = request(Command::BlockStatus, 0, 1 << 34);
    let compact = reply::status(Replies::Structured, &ask, &runs[..1]);
    assert_eq!(compact[16..], [0, 0, 0, 12, 0, 0, 0, 1, 0, 0, 0x10, 0, 0, 0, 0, 3]);
    let extended = reply::status(Replies::Extended, &ask, &runs);
    assert_eq!(extended[24..40], [0, 0, 0, 0, 0, 0, 0, 40, 0, 0, 0, 1, 0, 0, 0, 2]);
    assert_eq!(extended[56..], [0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
}

#[test]
fn options_with_lengths_that_do_not_fit_are_refused() {
    assert_eq!(InfoQuery::decode(&[0; 6]), Some(InfoQuery { name: b"", kinds: vec![] }));
    let named = [&[0, 0, 0, 1, b'd', 0, 2][..], &[0, 0, 0, 3]].concat();
    assert_eq!(InfoQuery::decode(&named), Some(InfoQuery { name: b"d", kinds: vec![0, 3] }));
    for cut in 0..named.len() {
        assert_eq!(InfoQuery::decode(&named[..cut]), None, "{cut}");
    }
    assert_eq!(InfoQuery::decode(&[&named[..], &[0]].concat()), None);
    let meta = [&[0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 15][..], CONTEXT].concat();
    assert_eq!(MetaQuery::decode(&meta), Some(MetaQuery { name: b"", queries: vec![CONTEXT] }));
    for cut in 0..meta.len() {
        assert_eq!(MetaQuery::decode(&meta[..cut]), None, "{cut}");
    }
    // Four thousand million queries in no bytes.
    assert_eq!(MetaQuery::decode(&[0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff]), None);
    assert_eq!(StatusPayload::decode(&[0; 7]), None);
    assert_eq!(StatusPayload::decode(&[0; 13]), None);
    let two = StatusPayload { length: 0, contexts: vec![0, 0] };
    assert_eq!(StatusPayload::decode(&[0; 16]), Some(two));
}

#[test]
fn payloads_follow_writes_and_flagged_requests() {
    let flagged = |command| Request { flags: request::FLAG_PAYLOAD_LEN, ..request(command, 0, 512) };
    for headers in [Headers::Compact, Headers::Extended] {
        let bytes = |request: Request| request.payload_bytes(headers);
        assert_eq!(bytes(request(Command::Write, 0, 512)), 512);
        assert_eq!(bytes(request(Command::Read, 0, 512)), 0);
        assert_eq!(bytes(flagged(Command::Write)), 512);
        let extended = headers == Headers::Extended;
        assert_eq!(bytes(flagged(Command::BlockStatus)), if extended { 512 } else { 0 });
    }
}

proptest! {
    #[test]
    fn requests_are_read_back(flags: u16, command: u16, cookie: u64, offset: u64, length: u64) {
        let request = Request { flags, command: command.into(), cookie, offset, length };
        prop_assert_eq!(u16::from(request.command), command);
        let bytes = request.encode(Headers::Extended);
        prop_assert_eq!(bytes.len(), Headers::Extended.bytes());
        prop_assert_eq!(Request::decode(Headers::Extended, &bytes), Some(request));
        prop_assert_eq!(Request::decode(Headers::Compact, &bytes), None);
        let short = Request { length: length >> 32, ..request };
        let bytes = short.encode(Headers::Compact);
        prop_assert_eq!(bytes.len(), Headers::Compact.bytes());
        prop_assert_eq!(Request::decode(Headers::Compact, &bytes), Some(short));
        prop_assert_eq!(Request::decode(Headers::Compact, &bytes[1..]), None);
    }

    #[test]
    fn option_heads_are_read_back(option: u32, length: u32) {
        let head = OptionHead { option, length };
        prop_assert_eq!(OptionHead::decode(&head.encode()), Some(head));
    }
}
