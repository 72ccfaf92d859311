//! What the code under test did: edges it took, constants it compared with. Nothing unless it is instrumented.
//!
//! LLVM's sanitizer coverage (`-Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-inline-8bit-counters …`, both
//! stable options of rustc) gives every edge a byte that is raised when it is taken, and calls the functions below.
#![expect(unsafe_code, reason = "the functions and counters that LLVM's instrumentation calls and keeps")]

use std::cell::RefCell;
use std::sync::atomic::{AtomicU8, AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::sync::{Mutex, PoisonError};

/// Where counters lie: first byte, and how many.
static REGIONS: Mutex<Vec<(usize, usize)>> = Mutex::new(Vec::new());

/// Constants that were compared with, and their widths, in a ring.
const COMPARED_MAX: usize = 1024;
static COMPARED: [AtomicU64; COMPARED_MAX] = [const { AtomicU64::new(0) }; COMPARED_MAX];
static WIDTHS: [AtomicU8; COMPARED_MAX] = [const { AtomicU8::new(0) }; COMPARED_MAX];
static COMPARED_NEXT: AtomicUsize = AtomicUsize::new(0);

thread_local! {
    /// Per region and counter, the sizes of counts that were seen, one bit each.
    static SEEN: RefCell<Vec<Vec<u8>>> = const { RefCell::new(Vec::new()) };
}

/// Whether there is any instrumented code.
pub fn is_on() -> bool {
    !REGIONS.lock().unwrap_or_else(PoisonError::into_inner).is_empty()
}

/// Whether the counters hold something that was not seen before; they start again from zero.
pub fn take_new() -> bool {
    let regions = REGIONS.lock().unwrap_or_else(PoisonError::into_inner);
    SEEN.with_borrow_mut(|seen| {
        seen.resize(regions.len(), Vec::new());
        let mut new = false;
        for ((start, len), seen) in regions.iter().zip(seen) {
            seen.resize(*len, 0);
            // SAFETY: the region was given by LLVM's constructor of a loaded object, which is never unloaded; its bytes
            // are changed by plain adds of other threads at worst, for which an atomic view is good enough.
            let counters = unsafe { std::slice::from_raw_parts(*start as *const AtomicU8, *len) };
            for (counter, seen) in counters.iter().zip(seen) {
                let count = counter.load(Relaxed);
                if count == 0 {
                    continue;
                }
                counter.store(0, Relaxed);
                // Loops count by their magnitude.
                let bit = 1u8 << (8 - count.leading_zeros().min(7)).min(7);
                new |= *seen & bit == 0;
                *seen |= bit;
            }
        }
        new
    })
}

/// One of the constants that the code compared with lately.
pub fn compared(random: u64) -> Option<(u64, usize)> {
    let count = COMPARED_NEXT.load(Relaxed).min(COMPARED_MAX);
    let at = usize::try_from(random % (count.max(1) as u64)).ok()?;
    let width = WIDTHS.get(at)?.load(Relaxed);
    (width > 0).then(|| (COMPARED[at].load(Relaxed), usize::from(width)))
}

fn note(value: u64, width: u8) {
    // Small numbers come up by themselves.
    if value < 256 {
        return;
    }
    let at = COMPARED_NEXT.fetch_add(1, Relaxed) % COMPARED_MAX;
    COMPARED[at].store(value, Relaxed);
    WIDTHS[at].store(width, Relaxed);
}

/// Called once for each instrumented object.
// SAFETY: the name is LLVM's, and nobody else defines it.
#[unsafe(no_mangle)]
extern "C" fn __sanitizer_cov_8bit_counters_init(start: *mut u8, stop: *mut u8) {
    let len = (stop as usize).saturating_sub(start as usize);
    let mut regions = REGIONS.lock().unwrap_or_else(PoisonError::into_inner);
    if len > 0 && !regions.contains(&(start as usize, len)) {
        regions.push((start as usize, len));
    }
}

macro_rules! compare {
    ($($name:ident $type:ty;)*) => {$(
        // SAFETY: the name is LLVM's, and nobody else defines it.
        #[unsafe(no_mangle)]
        extern "C" fn $name(constant: $type, _other: $type) {
            note(u64::from(constant), size_of::<$type>() as u8);
        }
    )*};
}

compare! {
    __sanitizer_cov_trace_const_cmp2 u16;
    __sanitizer_cov_trace_const_cmp4 u32;
    __sanitizer_cov_trace_const_cmp8 u64;
}

macro_rules! ignore {
    ($($name:ident $type:ty;)*) => {$(
        // SAFETY: the name is LLVM's, and nobody else defines it.
        #[unsafe(no_mangle)]
        extern "C" fn $name(_one: $type, _other: $type) {}
    )*};
}

ignore! {
    __sanitizer_cov_trace_const_cmp1 u8;
    __sanitizer_cov_trace_cmp1 u8;
    __sanitizer_cov_trace_cmp2 u16;
    __sanitizer_cov_trace_cmp4 u32;
    __sanitizer_cov_trace_cmp8 u64;
}

/// A switch: how many cases, of how many bits, and their values.
// SAFETY: the name is LLVM's, and nobody else defines it.
#[unsafe(no_mangle)]
extern "C" fn __sanitizer_cov_trace_switch(_value: u64, cases: *const u64) {
    // SAFETY: LLVM passes its own constant table: the number of cases, their width in bits, then the cases.
    let (count, bits) = unsafe { (*cases, *cases.add(1)) };
    for at in 0..usize::try_from(count).unwrap_or(0).min(64) {
        // SAFETY: `at < count`.
        let case = unsafe { *cases.add(2 + at) };
        note(case, (bits / 8).clamp(1, 8) as u8);
    }
}
