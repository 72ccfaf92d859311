//! Threads for requests that have to wait: for another host, for a store, for a disk's cache to be flushed.
//!
//! Threads come when jobs wait and none is idle, up to a limit, and go after some idle seconds: an export that
//! serves only local reads has none. The queue of jobs is bounded by the rings that feed it: a request that is not
//! answered keeps its place in its ring.

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
}

struct Shared {
    state: Mutex<State>,
    work: Condvar,
    max_threads: usize,
    name: String,
}

/// See the module's charter. Clones share the threads; they end when they run out of work.
#[derive(Clone)]
pub(super) struct Pool {
    shared: Arc<Shared>,
}

impl Pool {
    pub(super) fn new(name: &str, max_threads: usize) -> Self {
        let shared = Shared {
            state: Mutex::default(),
            work: Condvar::new(),
            max_threads: max_threads.max(1),
            name: name.to_owned(),
        };
        Self { shared: Arc::new(shared) }
    }

    /// Runs `job` on a thread of the pool, as soon as one is free.
    pub(super) fn submit(&self, job: impl FnOnce() + Send + 'static) {
        let mut state = self.shared.state.lock();
        state.jobs.push_back(Box::new(job));
        if state.jobs.len() > state.idle && state.threads < self.shared.max_threads {
            let shared = self.shared.clone();
            let spawned =
                std::thread::Builder::new().name(self.shared.name.clone()).spawn(move || run(&shared));
            match spawned {
                Ok(_) => state.threads += 1,
                // The threads that there are will get to it; with none, the machine is beyond help anyway.
                Err(error) => tracing::error!(%error, "cannot start a thread for waiting requests"),
            }
        }
        drop(state);
        self.shared.work.notify_one();
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
        assert!(pool.shared.state.lock().threads <= 3);
    }
}
