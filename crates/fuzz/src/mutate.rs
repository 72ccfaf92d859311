//! Making a new input from known ones.

use crate::corpus::Corpus;
use crate::coverage;
use crate::rng::Rng;

/// Numbers at which code changes its mind.
const EDGES: [u64; 22] = [
    0,
    1,
    2,
    7,
    8,
    16,
    63,
    64,
    127,
    128,
    255,
    256,
    4095,
    4096,
    0x7fff,
    0xffff,
    0x2_0000,
    0x7fff_ffff,
    0xffff_ffff,
    1 << 32,
    i64::MAX as u64,
    u64::MAX,
];

/// One to eight changes to `input`, at most `length_max` bytes long.
pub fn mutate(input: &[u8], corpus: &Corpus, rng: &mut Rng, length_max: usize) -> Vec<u8> {
    let mut bytes = input.to_vec();
    for _ in 0..=rng.below(4) * rng.below(3) {
        change(&mut bytes, corpus, rng);
    }
    bytes.truncate(length_max);
    bytes
}

fn change(bytes: &mut Vec<u8>, corpus: &Corpus, rng: &mut Rng) {
    let len = bytes.len();
    match rng.below(13) {
        0 => flip(bytes, rng),
        1 => {
            if let Some(byte) = bytes.get_mut(rng.below(len)) {
                *byte = rng.next() as u8;
            }
        }
        2 | 3 => write_number(bytes, rng),
        4 => bytes.truncate(rng.below(len + 1)),
        5 => {
            let more = 1 + rng.below(40);
            let at = rng.below(len + 1);
            let fresh: Vec<u8> =
                (0..more).map(|_| if rng.chance(3) { rng.next() as u8 } else { 0 }).collect();
            bytes.splice(at..at, fresh);
        }
        6 => {
            let (start, end) = span(rng, len);
            bytes.drain(start..end);
        }
        7 => {
            let (start, end) = span(rng, len);
            let part = bytes[start..end].to_vec();
            let at = rng.below(len + 1);
            bytes.splice(at..at, part);
        }
        8 | 9 => {
            // A piece of another input, over ours or between.
            let other = corpus.pick(rng);
            let (start, end) = span(rng, other.len());
            let at = rng.below(len + 1);
            let until = if rng.chance(2) { at } else { len.min(at + end - start) };
            bytes.splice(at..until, other[start..end].iter().copied());
        }
        10 => change_digits(bytes, rng),
        11 => {
            let (start, end) = span(rng, len);
            let byte = [0, 0xff, b'"', b'\n', rng.next() as u8][rng.below(5)];
            bytes[start..end].fill(byte);
        }
        _ => {
            // What the code was seen to compare with.
            let Some((value, width)) = coverage::compared(rng.next()) else { return flip(bytes, rng) };
            put(bytes, rng, value, width);
        }
    }
}

fn flip(bytes: &mut [u8], rng: &mut Rng) {
    let at = rng.below(bytes.len());
    if let Some(byte) = bytes.get_mut(at) {
        *byte ^= 1 << rng.below(8);
    }
}

/// A piece, more often a short one.
fn span(rng: &mut Rng, len: usize) -> (usize, usize) {
    let start = rng.below(len + 1);
    let longest = if rng.chance(4) { len } else { 32 };
    (start, (start + rng.below(longest + 1)).min(len))
}

fn write_number(bytes: &mut [u8], rng: &mut Rng) {
    let width = 1 << rng.below(4);
    let edge = EDGES[rng.below(EDGES.len())];
    let near = edge.wrapping_add(rng.below(5) as u64).wrapping_sub(2);
    put(bytes, rng, near, width);
}

/// Over what is there, in either byte order.
fn put(bytes: &mut [u8], rng: &mut Rng, value: u64, width: usize) {
    let Some(places) = bytes.len().checked_sub(width) else { return };
    // Fields are aligned more often than not.
    let at = rng.below(places + 1);
    let at = if rng.chance(3) { at } else { at - at % width };
    let field = &mut bytes[at..at + width];
    if rng.chance(4) {
        field.copy_from_slice(&value.to_be_bytes()[8 - width..]);
    } else {
        field.copy_from_slice(&value.to_le_bytes()[..width]);
    }
}

/// Another number in place of one that is written in digits.
fn change_digits(bytes: &mut Vec<u8>, rng: &mut Rng) {
    let from = rng.below(bytes.len());
    let Some(start) = bytes.iter().skip(from).position(u8::is_ascii_digit).map(|at| at + from) else {
        return;
    };
    let end =
        bytes.iter().skip(start).position(|byte| !byte.is_ascii_digit()).map_or(bytes.len(), |n| start + n);
    let edge = EDGES[rng.below(EDGES.len())].wrapping_add(rng.below(3) as u64).wrapping_sub(1);
    let text = match rng.below(4) {
        0 => format!("-{edge}"),
        1 => format!("{edge}{edge}"),
        2 => format!("{edge}.5e{}", rng.below(400)),
        _ => edge.to_string(),
    };
    bytes.splice(start..end, text.into_bytes());
}
