//! Threads for requests that have to wait: for another host, for a store, for a disk's cache to be flushed.
//!
//! Threads come when jobs wait and none is idle, up to a limit, and go after some idle seconds, or when nobody can give them
//! work any more: an export that serves only local reads has none, a client that came and went leaves none. The queue of
//! jobs is bounded by the rings that feed it: a request that is not answered keeps its place in its ring.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::{Condvar, Mutex};

const IDLE_LIMIT: Duration = Duration::from_secs(10);

type Job = Box<dyn FnOnce() + Send>;

#[derive(Default)]
struct State {
    jobs: VecDeque<Job>,
    threads: usize,
    idle: usize,
    /// Nobody has the pool any more.
    closed: bool,
}

struct Shared {
    state: Mutex<State>,
    work: Condvar,
    max_threads: usize,
    name: String,
}

/// See the module's charter. Clones share the threads.
#[derive(Clone)]
pub(super) struct Pool {
    owned: Arc<Owned>,
}

/// What all clones of a pool have together; its threads have only what is in it.
struct Owned(Arc<Shared>);

impl Drop for Owned {
    fn drop(&mut self) {
        self.0.state.lock().closed = true;
        self.0.work.notify_all();
    }
}

impl Pool {
    pub(super) fn new(name: &str, max_threads: usize) -> Self {
        let shared = Shared {
            state: Mutex::default(),
            work: Condvar::new(),
            max_threads: max_threads.max(1),
            name: name.to_owned(),
        };
        Self { owned: Arc::new(Owned(Arc::new(shared))) }
    }

    /// Runs `job` on a thread of the pool, as soon as one is free.
    pub(super) fn submit(&self, job: impl FnOnce() + Send + 'static) {
        let Owned(shared) = &*self.owned;
        let mut state = shared.state.lock();
        state.jobs.push_back(Box::new(job));
        if state.jobs.len() > state.idle && state.threads < shared.max_threads {
            let thread = std::thread::Builder::new().name(shared.name.clone());
            let shared = Arc::clone(shared);
            let spawned = thread.spawn(move || run(&shared));
            match spawned {
                Ok(_) => state.threads += 1,
                // The threads that there are will get to it; with none, the machine is beyond help anyway.
                Err(error) => tracing::error!(%error, "cannot start a thread for waiting requests"),
            }
        }
        drop(state);
        shared.work.notify_one();
    }
}

fn run(shared: &Shared) {
    let mut state = shared.state.lock();
    loop {
        if let Some(job) = state.jobs.pop_front() {
            drop(state);
            job();
            state = shared.state.lock();
            continue;
        }
        if state.closed {
            state.threads -= 1;
            return;
        }
        state.idle += 1;
        let timed_out = shared.work.wait_for(&mut state, IDLE_LIMIT).timed_out();
        state.idle -= 1;
        if timed_out && state.jobs.is_empty() {
            state.threads -= 1;
            return;
        }
    }
}

#[cfg(test)]
mod test {
    use std::sync::mpsc;

    use super::*;

    #[test]
    fn jobs_run_side_by_side_up_to_the_limit_and_none_is_forgotten() {
        let pool = Pool::new("test", 3);
        let (done, results) = mpsc::channel();
        let gate = Arc::new(std::sync::Barrier::new(3));
        for job in 0..9 {
            let (done, gate) = (done.clone(), gate.clone());
            // Three at a time, or this never ends.
            pool.submit(move || {
                gate.wait();
                done.send(job).unwrap();
            });
        }
        let mut seen: Vec<_> =
            (0..9).map(|_| results.recv_timeout(Duration::from_secs(20)).unwrap()).collect();
        seen.sort_unstable();
        assert_eq!(seen, (0..9).collect::<Vec<_>>());
        let shared = Arc::clone(&pool.owned.0);
        assert!((1..=3).contains(&shared.state.lock().threads));
        // What was given is done; then nobody is left, and nobody waits for the idle seconds.
        let (done, result) = mpsc::channel();
        pool.submit(move || done.send(()).unwrap());
        drop(pool);
        result.recv_timeout(Duration::from_secs(20)).unwrap();
        let patience = std::time::Instant::now() + IDLE_LIMIT / 2;
        while shared.state.lock().threads > 0 {
            assert!(std::time::Instant::now() < patience, "idle threads outlive their pool");
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}
