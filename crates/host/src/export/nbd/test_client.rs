//! The other side of the protocol, written down a second time from its text: for tests.

use whimbrel_wire::nbd::{Replies, Request};

/// What a chunk says of a part of a read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Content {
    Data(Vec<u8>),
    Hole(u32),
}

/// One reply or chunk, taken apart.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Chunk {
    pub(super) cookie: u64,
    /// The error of a simple reply or an error chunk; 0 if there is none.
    pub(super) error: u32,
    pub(super) last: bool,
    /// Offset and content, of chunks that have some.
    pub(super) content: Option<(u64, Content)>,
    /// Runs of a status chunk.
    pub(super) runs: Vec<(u64, u64)>,
}

fn number(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0, |value, byte| value << 8 | u64::from(*byte))
}

/// Takes one reply off the front of `bytes`: how long it is, and what it says; `None` if it is not all there. Simple
/// replies have `data` bytes behind them if there is no error.
pub(super) fn chunk(bytes: &[u8], data: usize) -> Option<(usize, Chunk)> {
    let magic = number(bytes.get(..4)?);
    if magic == 0x6744_6698 {
        let error = number(bytes.get(4..8)?) as u32;
        let cookie = number(bytes.get(8..16)?);
        let data = if error == 0 { data } else { 0 };
        let content = bytes.get(16..16 + data)?;
        let content = (data > 0).then(|| (0, Content::Data(content.to_vec())));
        return Some((16 + data, Chunk { cookie, error, last: true, content, runs: Vec::new() }));
    }
    let extended = match magic {
        0x668e_33ef => false,
        0x6e8a_278c => true,
        other => panic!("{other:x} begins no reply"),
    };
    let (flags, kind) = (number(bytes.get(4..6)?), number(bytes.get(6..8)?));
    let cookie = number(bytes.get(8..16)?);
    let (head, length) =
        if extended { (32, number(bytes.get(24..32)?)) } else { (20, number(bytes.get(16..20)?)) };
    assert!(length <= 33 << 20, "a payload of {length} bytes");
    let payload = bytes.get(head..head + length as usize)?;
    let mut chunk = Chunk { cookie, error: 0, last: flags & 1 != 0, content: None, runs: Vec::new() };
    assert_eq!(flags & !1, 0);
    match kind {
        0 => assert!(payload.is_empty() && chunk.last),
        1 => {
            assert!(payload.len() > 8);
            chunk.content = Some((number(&payload[..8]), Content::Data(payload[8..].to_vec())));
        }
        2 => {
            assert_eq!(payload.len(), 12);
            chunk.content = Some((number(&payload[..8]), Content::Hole(number(&payload[8..]) as u32)));
        }
        5 | 6 => {
            assert_eq!(kind == 6, extended);
            let (head, each) = if extended { (8, 16) } else { (4, 8) };
            assert_eq!(number(&payload[..4]), 1);
            assert!(!extended || number(&payload[4..8]) as usize == (payload.len() - head) / each);
            let (runs, rest) = (payload[head..].chunks_exact(each), payload[head..].len() % each);
            assert!(rest == 0 && runs.len() > 0);
            chunk.runs = runs.map(|run| (number(&run[..each / 2]), number(&run[each / 2..]))).collect();
        }
        0x8001 => {
            chunk.error = number(&payload[..4]) as u32;
            assert_ne!(chunk.error, 0);
            assert_eq!(number(&payload[4..6]) as usize, payload.len() - 6);
            assert!(std::str::from_utf8(&payload[6..]).is_ok());
        }
        other => panic!("kind {other} of a chunk is not known"),
    }
    Some((head + length as usize, chunk))
}

/// The content of a whole answer to a read, which is all of `bytes`.
pub(super) fn contents(replies: Replies, request: &Request, mut bytes: &[u8]) -> Vec<(u64, Content)> {
    let mut found = Vec::new();
    loop {
        if replies == Replies::Extended {
            assert_eq!(number(&bytes[16..24]), request.offset);
        }
        let (length, chunk) = chunk(bytes, request.length as usize).expect("a whole chunk");
        assert_eq!((chunk.cookie, chunk.error), (request.cookie, 0));
        found.extend(chunk.content);
        bytes = &bytes[length..];
        if chunk.last {
            assert!(bytes.is_empty());
            return found;
        }
    }
}
