//! What a run may not do beside panicking: hang, or take a lot of memory.
//!
//! Memory is counted where it is allocated, per thread, while an input runs. An allocation beyond reason ends the
//! process, as it would end the agent, but with the command that repeats it.
#![expect(unsafe_code, reason = "an allocator that counts")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::any::Any;
use std::cell::Cell;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::{HANG, INPUT, hex};

/// One allocation of this much is not tried.
const REFUSED: usize = 1 << 30;

struct Counting;

#[global_allocator]
static ALLOCATOR: Counting = Counting;

thread_local! {
    static ARMED: Cell<bool> = const { Cell::new(false) };
    static LIVE: Cell<usize> = const { Cell::new(0) };
    static PEAK: Cell<usize> = const { Cell::new(0) };
}

/// The command without its input, and the input that runs now, for those who have to tell it from the allocator.
static NOW: Mutex<(String, Vec<u8>)> = Mutex::new((String::new(), Vec::new()));

fn told() -> String {
    let now = NOW.lock().unwrap_or_else(PoisonError::into_inner);
    now.0.replace(INPUT, &hex(&now.1))
}

fn grow(bytes: usize) {
    // A thread that is ending has no more locals, and nothing to count.
    let _ = ARMED.try_with(|armed| {
        if !armed.get() {
            return;
        }
        if bytes > REFUSED {
            armed.set(false);
            eprintln!("an allocation of {bytes} bytes\nto repeat it:\n  {}", told());
            std::process::abort();
        }
        let live = LIVE.get().saturating_add(bytes);
        LIVE.set(live);
        PEAK.set(PEAK.get().max(live));
    });
}

fn shrink(bytes: usize) {
    let _ = ARMED.try_with(|armed| {
        if armed.get() {
            LIVE.set(LIVE.get().saturating_sub(bytes));
        }
    });
}

// SAFETY: everything is passed on to the system's allocator with the same arguments; counting allocates nothing.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        grow(layout.size());
        // SAFETY: the caller's promise is passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        shrink(layout.size());
        // SAFETY: the caller's promise is passed on.
        unsafe { System.dealloc(ptr, layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        grow(layout.size());
        // SAFETY: the caller's promise is passed on.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, ptr: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
        shrink(layout.size());
        grow(new_size);
        // SAFETY: the caller's promise is passed on.
        unsafe { System.realloc(ptr, layout, new_size) }
    }
}

/// What the watchdog looks at.
#[derive(Default)]
struct Watched {
    /// When the input under way was started.
    since: Option<Instant>,
    done: bool,
}

/// Watches one target's runs.
pub struct Guard {
    watched: Arc<(Mutex<Watched>, Condvar)>,
}

impl Guard {
    /// `command` has [`INPUT`] in the input's place.
    pub fn new(command: String) -> Self {
        NOW.lock().unwrap_or_else(PoisonError::into_inner).0 = command;
        let watched: Arc<(Mutex<Watched>, Condvar)> = Arc::default();
        let seen = Arc::clone(&watched);
        std::thread::spawn(move || watch(&seen));
        Self { watched }
    }

    fn lock(&self) -> MutexGuard<'_, Watched> {
        self.watched.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// An input starts.
    pub fn start(&self, input: &[u8]) {
        let mut now = NOW.lock().unwrap_or_else(PoisonError::into_inner);
        now.1.clear();
        now.1.extend_from_slice(input);
        drop(now);
        self.lock().since = Some(Instant::now());
        LIVE.set(0);
        PEAK.set(0);
        ARMED.set(true);
    }

    /// It has ended; the most memory it took at once.
    pub fn end(&self) -> usize {
        ARMED.set(false);
        self.lock().since = None;
        PEAK.get()
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        self.lock().done = true;
        self.watched.1.notify_all();
    }
}

fn watch((watched, changed): &(Mutex<Watched>, Condvar)) {
    let mut state = watched.lock().unwrap_or_else(PoisonError::into_inner);
    while !state.done {
        if state.since.is_some_and(|since| since.elapsed() > HANG) {
            eprintln!("an input takes longer than {HANG:?}\nto repeat it:\n  {}", told());
            std::process::abort();
        }
        let waited = changed.wait_timeout(state, Duration::from_millis(500));
        state = waited.map_or_else(|poisoned| poisoned.into_inner().0, |(state, _)| state);
    }
}

/// What a panic said.
pub fn words_of(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().cloned();
    text.or_else(|| panic.downcast_ref::<&str>().map(|&text| text.to_owned()))
        .unwrap_or_else(|| "a panic".to_owned())
}
