//! Negotiations as clients lead them, and requests against a naive judge.

use proptest::prelude::*;
use whimbrel_wire::nbd::option as opt;
use whimbrel_wire::nbd::request::{FLAG_DF, FLAG_FAST_ZERO, FLAG_FUA, FLAG_NO_HOLE, FLAG_PAYLOAD_LEN};
use whimbrel_wire::nbd::{Command, Errno, Request};

use super::*;

const OFFER: Offer<'static> = Offer { name: "disk", size_bytes: 1 << 20, read_only: false };

fn begin(tls: bool) -> Negotiation {
    Negotiation::new(3, tls).unwrap()
}

/// The answers to an option: kinds and data, and what comes next.
fn ask(negotiation: &mut Negotiation, number: u32, data: &[u8]) -> (Vec<(u32, Vec<u8>)>, Next) {
    let mut answer = Vec::new();
    let next = negotiation.step(&OFFER, number, data, &mut answer);
    (replies(&answer, number), next)
}

fn replies(mut bytes: &[u8], number: u32) -> Vec<(u32, Vec<u8>)> {
    let mut found = Vec::new();
    while !bytes.is_empty() {
        let word = |at: usize| u32::from_be_bytes(bytes[at..at + 4].try_into().unwrap());
        assert_eq!(bytes[..8], [0, 3, 0xe8, 0x89, 4, 0x55, 0x65, 0xa9]);
        assert_eq!(word(8), number);
        let end = 20 + word(16) as usize;
        found.push((word(12), bytes[20..end].to_vec()));
        bytes = &bytes[end..];
    }
    found
}

fn kinds(replies: &[(u32, Vec<u8>)]) -> Vec<u32> {
    replies.iter().map(|(kind, _)| *kind).collect()
}

/// Data of INFO and GO for the export `name`, asking for `kinds`.
fn info(name: &[u8], kinds: &[u16]) -> Vec<u8> {
    let mut data = (name.len() as u32).to_be_bytes().to_vec();
    data.extend(name);
    data.extend((kinds.len() as u16).to_be_bytes());
    data.extend(kinds.iter().flat_map(|kind| kind.to_be_bytes()));
    data
}

/// Data of LIST_ and SET_META_CONTEXT for the default export.
fn meta(queries: &[&[u8]]) -> Vec<u8> {
    let mut data = vec![0; 4];
    data.extend((queries.len() as u32).to_be_bytes());
    for query in queries {
        data.extend((query.len() as u32).to_be_bytes());
        data.extend(*query);
    }
    data
}

/// The transmission flags that INFO tells.
fn flags(negotiation: &mut Negotiation) -> u16 {
    let (answers, _) = ask(negotiation, opt::INFO, &info(b"", &[]));
    let (_, export) = answers.iter().find(|(_, data)| data.starts_with(&[0, 0])).unwrap();
    assert_eq!(export[2..10], (1_u64 << 20).to_be_bytes());
    u16::from_be_bytes([export[10], export[11]])
}

#[test]
fn a_client_of_today_gets_extended_headers_and_status() {
    let mut talk = begin(false);
    assert_eq!(kinds(&ask(&mut talk, opt::EXTENDED_HEADERS, &[]).0), [opt::REP_ACK]);
    assert_eq!(kinds(&ask(&mut talk, opt::STRUCTURED_REPLY, &[]).0), [opt::REP_ERR_EXT_HEADER_REQD]);
    let (answers, _) = ask(&mut talk, opt::SET_META_CONTEXT, &meta(&[CONTEXT, b"x-y:z"]));
    assert_eq!(kinds(&answers), [opt::REP_META_CONTEXT, opt::REP_ACK]);
    assert_eq!(answers[0].1, [&1_u32.to_be_bytes(), CONTEXT].concat());
    let (answers, next) = ask(&mut talk, opt::GO, &info(b"disk", &[opt::INFO_BLOCK_SIZE, opt::INFO_NAME]));
    assert_eq!(kinds(&answers), [opt::REP_INFO, opt::REP_INFO, opt::REP_INFO, opt::REP_ACK]);
    assert_eq!(answers[1].1, [0, 3, 0, 0, 2, 0, 0, 0, 0x10, 0, 2, 0, 0, 0]);
    assert_eq!(answers[2].1, b"\0\x01disk");
    assert_eq!(next, Next::Transmission(Agreed { replies: Replies::Extended, status: true }));
}

#[test]
fn flags_tell_what_was_agreed_on() {
    let mut talk = begin(false);
    assert_eq!(flags(&mut talk) & (transmission::SEND_DF | transmission::BLOCK_STATUS_PAYLOAD), 0);
    ask(&mut talk, opt::STRUCTURED_REPLY, &[]);
    assert_ne!(flags(&mut talk) & transmission::SEND_DF, 0);
    ask(&mut talk, opt::SET_META_CONTEXT, &meta(&[CONTEXT]));
    assert_eq!(flags(&mut talk) & transmission::BLOCK_STATUS_PAYLOAD, 0);
    ask(&mut talk, opt::EXTENDED_HEADERS, &[]);
    assert_ne!(flags(&mut talk) & transmission::BLOCK_STATUS_PAYLOAD, 0);
    let mut answer = Vec::new();
    let read_only = Offer { read_only: true, ..OFFER };
    let next = begin(false).step(&read_only, opt::EXPORT_NAME, b"", &mut answer);
    assert_eq!(next, Next::Transmission(Agreed::default()));
    assert_eq!(answer.len(), 10);
    let told = u16::from_be_bytes([answer[8], answer[9]]);
    assert_ne!(told & transmission::READ_ONLY, 0);
    let writes = transmission::SEND_TRIM | transmission::SEND_WRITE_ZEROES | transmission::SEND_FAST_ZERO;
    assert_eq!(told & writes, 0);
}

#[test]
fn nothing_is_told_before_tls_and_nothing_said_before_it_counts() {
    let mut talk = begin(true);
    for number in (2..13).chain([99]).filter(|number| ![opt::ABORT, opt::STARTTLS].contains(number)) {
        let (answers, next) = ask(&mut talk, number, &info(b"disk", &[]));
        assert_eq!((kinds(&answers), next), (vec![opt::REP_ERR_TLS_REQD], Next::Option), "{number}");
    }
    assert!(matches!(ask(&mut talk, opt::EXPORT_NAME, b"disk").1, Next::Refuse(_)));
    assert_eq!(kinds(&ask(&mut talk, opt::STARTTLS, b"x").0), [opt::REP_ERR_INVALID]);
    assert_eq!(ask(&mut talk, opt::STARTTLS, &[]).1, Next::StartTls);
    talk.encrypted();
    assert_eq!(kinds(&ask(&mut talk, opt::STARTTLS, &[]).0), [opt::REP_ERR_INVALID]);
    let (_, next) = ask(&mut talk, opt::GO, &info(b"disk", &[]));
    assert_eq!(next, Next::Transmission(Agreed::default()));
    // Where it is not offered it is not taken.
    assert_eq!(kinds(&ask(&mut begin(false), opt::STARTTLS, &[]).0), [opt::REP_ERR_POLICY]);
}

#[test]
fn contexts_that_are_asked_for_wrongly_are_not_chosen() {
    let mut talk = begin(false);
    assert_eq!(kinds(&ask(&mut talk, opt::SET_META_CONTEXT, &meta(&[CONTEXT])).0), [opt::REP_ERR_INVALID]);
    ask(&mut talk, opt::STRUCTURED_REPLY, &[]);
    let go = |talk: &mut Negotiation| match ask(talk, opt::GO, &info(b"", &[])).1 {
        Next::Transmission(agreed) => agreed.status,
        other => panic!("{other:?}"),
    };
    ask(&mut talk, opt::SET_META_CONTEXT, &meta(&[CONTEXT]));
    assert!(go(&mut talk));
    // A wildcard lists, and chooses nothing; a failure takes back what was chosen.
    for queries in [&[&b"base:"[..]][..], &[], &[b"x:y"]] {
        ask(&mut talk, opt::SET_META_CONTEXT, &meta(&[CONTEXT]));
        assert_eq!(kinds(&ask(&mut talk, opt::SET_META_CONTEXT, &meta(queries)).0), [opt::REP_ACK]);
        assert!(!go(&mut talk));
    }
    ask(&mut talk, opt::SET_META_CONTEXT, &meta(&[CONTEXT]));
    assert_eq!(kinds(&ask(&mut talk, opt::SET_META_CONTEXT, &[0]).0), [opt::REP_ERR_INVALID]);
    assert!(!go(&mut talk));
    for (queries, found) in [(&[][..], true), (&[&b"base:"[..]], true), (&[b"qemu:"], false)] {
        let (answers, _) = ask(&mut talk, opt::LIST_META_CONTEXT, &meta(queries));
        assert_eq!(answers.len(), 1 + usize::from(found), "{queries:?}");
    }
}

#[test]
fn wrong_options_are_answered_and_old_clients_served() {
    let mut talk = begin(false);
    assert_eq!(kinds(&ask(&mut talk, 99, b"?").0), [opt::REP_ERR_UNSUP]);
    assert_eq!(kinds(&ask(&mut talk, opt::GO, &info(b"other", &[])).0), [opt::REP_ERR_UNKNOWN]);
    assert_eq!(kinds(&ask(&mut talk, opt::LIST, b"?").0), [opt::REP_ERR_INVALID]);
    assert_eq!(kinds(&ask(&mut talk, opt::LIST, &[]).0), [opt::REP_SERVER, opt::REP_ACK]);
    assert_eq!(ask(&mut talk, opt::ABORT, b"ignored").1, Next::End);
    assert!(matches!(ask(&mut talk, opt::EXPORT_NAME, b"other").1, Next::Refuse(_)));
    assert!(Negotiation::new(4, false).is_err());
    let mut old = Negotiation::new(0, false).unwrap();
    assert!(matches!(ask(&mut old, opt::LIST, &[]).1, Next::Refuse(_)));
    let mut answer = Vec::new();
    let next = old.step(&OFFER, opt::EXPORT_NAME, b"disk", &mut answer);
    assert_eq!((next, answer.len()), (Next::Transmission(Agreed::default()), 10 + opt::PADDING_BYTES));
}

const COMMANDS: [Command; 8] = [
    Command::Read,
    Command::Write,
    Command::Flush,
    Command::Trim,
    Command::Cache,
    Command::WriteZeroes,
    Command::BlockStatus,
    Command::Other(77),
];

fn replies_of(number: usize) -> Replies {
    [Replies::Simple, Replies::Structured, Replies::Extended][number % 3]
}

proptest! {
    #[test]
    fn what_passes_lies_inside_the_disk_in_whole_units(
        command in 0..COMMANDS.len(),
        form in 0..3_usize,
        flags in 0..64_u16,
        offset in prop_oneof![0..1_u64 << 22, Just(u64::MAX - 511)].prop_map(|at: u64| at & !255),
        length in prop_oneof![0..1_u64 << 22, Just(u64::MAX - 511)].prop_map(|at: u64| at & !255),
        status: bool,
        read_only: bool,
    ) {
        let offer = Offer { read_only, size_bytes: 3 << 20, ..OFFER };
        let agreed = Agreed { replies: replies_of(form), status };
        let request = Request { flags, command: COMMANDS[command], cookie: 1, offset, length };
        let inside = length > 0
            && offset % 512 == 0
            && length % 512 == 0
            && u128::from(offset) + u128::from(length) <= 3 << 20;
        let changes = matches!(request.command, Command::Write | Command::Trim | Command::WriteZeroes);
        match admit(&agreed, &offer, &request, &[]) {
            Ok(Work::Flush) => prop_assert_eq!(request.command, Command::Flush),
            Ok(work) => {
                prop_assert!(inside, "{work:?}");
                prop_assert!(!(changes && read_only));
                let durable = match work {
                    Work::Write { durable } | Work::Trim { durable } | Work::Zero { durable, .. } => Some(durable),
                    _ => None,
                };
                prop_assert_eq!(durable.is_some(), changes);
                prop_assert!(durable.is_none_or(|durable| durable == (flags & FLAG_FUA != 0)));
                if let Work::Status { length: of, .. } = work {
                    prop_assert!(status && of == length);
                }
            }
            // A plain request that lies inside is never refused.
            Err(refusal) => prop_assert!(
                !inside
                    || flags & !FLAG_FUA != 0
                    || (changes && read_only)
                    || (request.command == Command::BlockStatus && !status)
                    || matches!(request.command, Command::Other(_)),
                "{refusal:?}"
            ),
        }
    }
}

#[test]
fn refusals_have_the_errors_that_the_protocol_names() {
    let of = |command, flags, offset, length| Request { flags, command, cookie: 1, offset, length };
    let structured = Agreed { replies: Replies::Structured, status: true };
    let extended = Agreed { replies: Replies::Extended, status: true };
    let large = Offer { size_bytes: 1 << 40, ..OFFER };
    let errno = |agreed: &Agreed, offer: &Offer<'_>, request: Request, payload: &[u8]| {
        admit(agreed, offer, &request, payload).map_err(|refusal| refusal.errno)
    };
    let end = OFFER.size_bytes;
    for (command, wanted) in [
        (Command::Write, Errno::NoSpace),
        (Command::WriteZeroes, Errno::NoSpace),
        (Command::Read, Errno::Inval),
        (Command::Trim, Errno::Inval),
        (Command::BlockStatus, Errno::Inval),
    ] {
        assert_eq!(errno(&structured, &OFFER, of(command, 0, end, 512), &[]), Err(wanted), "{command:?}");
    }
    let read = of(Command::Read, 0, 0, 64 << 20);
    assert_eq!(errno(&structured, &large, read, &[]), Err(Errno::Overflow));
    assert_eq!(errno(&Agreed::default(), &large, read, &[]), Err(Errno::Inval));
    assert_eq!(errno(&Agreed::default(), &OFFER, of(Command::Read, FLAG_DF, 0, 512), &[]), Err(Errno::Inval));
    // Fast means: a hole of whole blocks.
    let zero = |flags, offset, length| {
        errno(&structured, &OFFER, of(Command::WriteZeroes, flags, offset, length), &[])
    };
    assert_eq!(zero(FLAG_FAST_ZERO, 0, 4096), Ok(Work::Zero { as_data: false, durable: false }));
    assert_eq!(zero(FLAG_FAST_ZERO, 512, 4096), Err(Errno::NotSup));
    assert_eq!(zero(FLAG_FAST_ZERO | FLAG_NO_HOLE, 0, 4096), Err(Errno::NotSup));
    assert_eq!(zero(FLAG_NO_HOLE, 512, 512), Ok(Work::Zero { as_data: true, durable: false }));
    // More than 32 bits where that can be said; a list of contexts.
    let trim = of(Command::Trim, 0, 0, 1 << 40);
    assert_eq!(errno(&extended, &large, trim, &[]), Ok(Work::Trim { durable: false }));
    let filtered = of(Command::BlockStatus, FLAG_PAYLOAD_LEN, 0, 12);
    let payload = [&(1_u64 << 40).to_be_bytes()[..], &1_u32.to_be_bytes()].concat();
    let all = Ok(Work::Status { length: 1 << 40, one: false });
    assert_eq!(errno(&extended, &large, filtered, &payload), all);
    for wrong in [&payload[..8], &[&payload[..], &[0, 0, 0, 1]].concat(), &[0; 12], &[]] {
        assert_eq!(errno(&extended, &large, filtered, wrong), Err(Errno::Inval), "{wrong:?}");
    }
    assert_eq!(errno(&structured, &large, filtered, &payload), Err(Errno::Inval));
    // QEMU forgets the flag.
    let plain = of(Command::Write, 0, 0, 512);
    assert_eq!(errno(&extended, &large, plain, &[]), Ok(Work::Write { durable: false }));
    assert_eq!(
        errno(&extended, &large, Request { flags: FLAG_PAYLOAD_LEN, ..plain }, &[]),
        Ok(Work::Write { durable: false })
    );
}
