//! Turning blocks into fewer bytes and back: zstd with kept contexts, zero detection, and the sample that tells
//! whether a block is worth compressing. Frequent words are taken out of pages by [`words`], at a tenth of the cost.
//!
//! Invariants: a [`Decompressor`] never writes more than the caller's limit, whatever the bytes say; nothing here
//! panics on foreign bytes.
//!
//! Not here: whether to compress (`engine::block::encode`, asked by [`adaptive`]), framing and checks (`wire`).

pub mod adaptive;
pub mod words;

use crate::error::{Error, ErrorKind, Result};

/// Compresses blocks, one after the other, each on its own (no window across blocks).
pub struct Compressor {
    context: zstd::bulk::Compressor<'static>,
    level: i32,
    sample: Vec<u8>,
    sample_out: Vec<u8>,
}

/// A sample takes so many pieces, spread over the block, of so many bytes.
const SAMPLE_PIECES: usize = 16;
const SAMPLE_PIECE_BYTES: usize = 512;
/// Level for samples: what it says of compressibility holds for the higher ones.
const SAMPLE_LEVEL: i32 = 1;

impl Compressor {
    /// A compressor; about 1 MiB of tables.
    pub fn new() -> Result<Self> {
        let context = zstd::bulk::Compressor::new(SAMPLE_LEVEL)
            .map_err(|error| Error::with_source(ErrorKind::Internal, "make zstd compressor", error))?;
        Ok(Self { context, level: SAMPLE_LEVEL, sample: Vec::new(), sample_out: Vec::new() })
    }

    /// Compresses `raw` into the front of `out` and returns how many bytes that took; nothing if `out` is too small.
    /// `level` is zstd's, negative ones are the fast ones.
    pub fn compress(&mut self, level: i32, raw: &[u8], out: &mut [u8]) -> Result<Option<usize>> {
        self.set_level(level)?;
        // The only thing that can go wrong in a single call on valid buffers is that the output does not fit.
        let packed = self.context.compress_to_buffer(raw, out).ok();
        if packed.is_none() {
            // The context is left in the middle of a frame, where it takes no other level.
            let reset = self.context.context_mut().reset(zstd::zstd_safe::ResetDirective::SessionOnly);
            reset.map_err(|_| Error::new(ErrorKind::Internal, "reset zstd compressor"))?;
        }
        Ok(packed)
    }

    /// Compresses `raw` into a new buffer, however long it gets.
    pub fn compress_all(&mut self, level: i32, raw: &[u8]) -> Result<Vec<u8>> {
        self.set_level(level)?;
        self.context
            .compress(raw)
            .map_err(|error| Error::with_source(ErrorKind::Internal, "compress block", error))
    }

    /// What share of its size a small sample of `raw` compresses to; 1 if it does not get smaller.
    pub fn sample_ratio(&mut self, raw: &[u8]) -> Result<f64> {
        if raw.is_empty() {
            return Ok(1.0);
        }
        let mut sample = std::mem::take(&mut self.sample);
        let mut out = std::mem::take(&mut self.sample_out);
        sample.clear();
        let stride = raw.len().div_ceil(SAMPLE_PIECES).max(SAMPLE_PIECE_BYTES);
        for piece in raw.chunks(stride) {
            sample.extend_from_slice(piece.get(..SAMPLE_PIECE_BYTES).unwrap_or(piece));
        }
        out.resize(sample.len(), 0);
        let found = self.compress(SAMPLE_LEVEL, &sample, &mut out);
        let ratio = found.map(|len| len.unwrap_or(sample.len()) as f64 / sample.len() as f64);
        (self.sample, self.sample_out) = (sample, out);
        ratio
    }

    fn set_level(&mut self, level: i32) -> Result<()> {
        if self.level != level {
            self.context
                .set_compression_level(level)
                .map_err(|error| Error::with_source(ErrorKind::Internal, "set zstd level", error))?;
            self.level = level;
        }
        Ok(())
    }
}

/// Decompresses blocks.
pub struct Decompressor {
    context: zstd::bulk::Decompressor<'static>,
}

impl Decompressor {
    /// A decompressor; about 150 KiB of tables.
    pub fn new() -> Result<Self> {
        let context = zstd::bulk::Decompressor::new()
            .map_err(|error| Error::with_source(ErrorKind::Internal, "make zstd decompressor", error))?;
        Ok(Self { context })
    }

    /// Decompresses `packed` into the front of `out` and returns how many bytes that took; fails with kind `Corrupt`.
    pub fn decompress_up_to(&mut self, packed: &[u8], out: &mut [u8]) -> Result<usize> {
        self.context
            .decompress_to_buffer(packed, out)
            .map_err(|error| Error::with_source(ErrorKind::Corrupt, "decompress block", error))
    }

    /// Decompresses `packed` into `out`, filling it exactly, or fails with kind `Corrupt`.
    pub fn decompress(&mut self, packed: &[u8], out: &mut [u8]) -> Result<()> {
        let raw_bytes = out.len();
        let found = self.decompress_up_to(packed, out)?;
        if found == raw_bytes {
            Ok(())
        } else {
            let text = format!("decompress block: {found} bytes instead of {raw_bytes}");
            Err(Error::new(ErrorKind::Corrupt, text))
        }
    }
}

/// Whether all bytes are zero.
pub fn is_zero(bytes: &[u8]) -> bool {
    // A chunk at a time without a branch inside, so that the compiler uses wide registers; data that is not zero
    // is usually found in the first chunk.
    let mut chunks = bytes.chunks_exact(256);
    chunks.all(|chunk| chunk.iter().fold(0, |all, byte| all | byte) == 0)
        && chunks.remainder().iter().all(|byte| *byte == 0)
}

#[cfg(test)]
mod test {
    use super::*;
    use proptest::prelude::*;

    fn noise(len: usize) -> Vec<u8> {
        let mut state = 0x9e37_79b9_7f4a_7c15u64;
        std::iter::repeat_with(|| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 32) as u8
        })
        .take(len)
        .collect()
    }

    #[test]
    fn a_sample_tells_noise_from_text() {
        let mut codec = Compressor::new().unwrap();
        assert!(codec.sample_ratio(&noise(65_536)).unwrap() > 0.95);
        let text = b"the guest's memory is mostly like this ".repeat(1700);
        assert!(codec.sample_ratio(&text).unwrap() < 0.5);
        assert_eq!(codec.sample_ratio(&[]).unwrap(), 1.0);
        assert!(codec.sample_ratio(&[1]).unwrap() <= 1.0);
    }

    #[test]
    fn what_does_not_fit_is_not_compressed_and_what_is_too_long_is_corrupt() {
        let (mut pack, mut unpack) = (Compressor::new().unwrap(), Decompressor::new().unwrap());
        let mut out = vec![0; 4096];
        assert_eq!(pack.compress(1, &noise(4096), &mut out[..4000]).unwrap(), None);
        let len = pack.compress(1, &[7; 4096], &mut out).unwrap().unwrap();
        let packed = &out[..len];
        for wrong in [4095, 4097, 0] {
            let error = unpack.decompress(packed, &mut vec![0; wrong]).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Corrupt, "{wrong}");
        }
    }

    proptest! {
        #[test]
        fn what_was_compressed_comes_back(raw in prop::collection::vec(0u8..9, 0..5000), level in -5i32..4) {
            let packed = Compressor::new().unwrap().compress_all(level, &raw).unwrap();
            let mut back = vec![0; raw.len()];
            Decompressor::new().unwrap().decompress(&packed, &mut back).unwrap();
            prop_assert_eq!(back, raw);
        }

        #[test]
        fn foreign_bytes_are_corrupt_or_data_but_never_a_panic(packed in prop::collection::vec(any::<u8>(), 0..300)) {
            let _ = Decompressor::new().unwrap().decompress(&packed, &mut [0; 4096]);
        }

        #[test]
        fn zero_is_zero(len in 0usize..1000, at: prop::sample::Index) {
            let mut bytes = vec![0; len];
            prop_assert!(is_zero(&bytes));
            if len > 0 {
                bytes[at.index(len)] = 1;
                prop_assert!(!is_zero(&bytes));
            }
        }
    }
}

#[cfg(test)]
mod fuzz {
    use super::*;

    whimbrel_fuzz::fuzz! {
        /// A compressed block of another host.
        fn packed(bytes) seeds [
            Compressor::new().and_then(|mut pack| pack.compress_all(1, &[7; 4096])).expect("compress"),
        ] {
            let mut out = [0; 4096];
            let _ = Decompressor::new().expect("make a decompressor").decompress(bytes, &mut out);
        }
    }
}
