//! Long work: progress, cancel, waiting.
//!
//! ```text
//!  Running ⇄ Waiting ──► Done | Failed | Cancelled
//! ```
//!
//! Every piece of long work registers here, reports through its [`TaskHandle`] and can be asked to stop; people see
//! the same figures through `task list`, `task show`, the progress bar and the event stream.
//!
//! Invariants
//! * A task that ended stays ended; its handle's further reports are ignored.
//! * The register is bounded: of ended tasks the newest [`ENDED_KEPT_MAX`] are kept.
//! * Cancel is a wish: the work undoes itself and then ends as `Cancelled`.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Instant;

use parking_lot::Mutex;
use tokio::sync::watch;
use whimbrel_wire::api::{Task, TaskKind, TaskState};

use crate::error::{Error, ErrorKind, Result};
use crate::memory::Limiter;

/// How many ended tasks are remembered.
pub const ENDED_KEPT_MAX: usize = 200;
/// How many notes a task has.
pub const NOTES_MAX: usize = 16;

/// All long work of this agent.
#[derive(Clone, Default)]
pub struct Tasks {
    shared: Arc<Shared>,
}

#[derive(Default)]
struct Shared {
    next_id: AtomicU64,
    tasks: Mutex<BTreeMap<u64, Arc<Entry>>>,
    changed: watch::Sender<u64>,
}

struct Entry {
    id: u64,
    state: Mutex<State>,
    cancel: watch::Sender<bool>,
    limiter: OnceLock<Arc<Limiter>>,
    ended: watch::Sender<bool>,
}

struct State {
    task: Task,
    /// Start of the window over which the rate is measured, and the bytes done then.
    window: (Instant, u64),
}

/// A rate is measured over windows of about this length.
const RATE_WINDOW_MS: u128 = 1000;

impl Tasks {
    /// Registers new work; it starts in state `Running`.
    pub fn start(&self, kind: TaskKind, object: impl Into<String>) -> TaskHandle {
        let id = self.shared.next_id.fetch_add(1, Ordering::Relaxed) + 1;
        let task = Task {
            id,
            kind,
            object: object.into(),
            phase: "start".into(),
            state: TaskState::Running,
            done_bytes: 0,
            total_bytes: 0,
            rate_bytes_s: 0,
            eta_s: None,
            downtime_ms: None,
            wire_bytes: 0,
            waiting_for: None,
            error: None,
            notes: Vec::new(),
            figures: BTreeMap::new(),
        };
        let entry = Arc::new(Entry {
            id,
            state: Mutex::new(State { task, window: (Instant::now(), 0) }),
            cancel: watch::Sender::new(false),
            limiter: OnceLock::new(),
            ended: watch::Sender::new(false),
        });
        self.shared.tasks.lock().insert(id, Arc::clone(&entry));
        self.shared.announce();
        TaskHandle { entry, shared: Arc::clone(&self.shared) }
    }

    /// All tasks, oldest first.
    pub fn list(&self) -> Vec<Task> {
        self.shared.tasks.lock().values().map(|entry| entry.state.lock().task.clone()).collect()
    }

    /// One task.
    pub fn show(&self, id: u64) -> Result<Task> {
        Ok(self.entry(id)?.state.lock().task.clone())
    }

    /// Asks a task to stop and undo what it did.
    pub fn cancel(&self, id: u64) -> Result<()> {
        let entry = self.entry(id)?;
        if entry.state.lock().task.state.is_final() {
            return Err(Error::new(
                ErrorKind::InvalidInput,
                format!("cancel task {id}: it has ended already"),
            ));
        }
        entry.cancel.send_replace(true);
        Ok(())
    }

    /// Changes the most that a task may send, bytes per second, from now on; `None` lifts the limit. Fails with kind
    /// `Unsupported` for work that has no such limit.
    pub fn limit(&self, id: u64, bytes_s: Option<u64>) -> Result<()> {
        let entry = self.entry(id)?;
        let refuse = |kind, why: &str| Err(Error::new(kind, format!("limit task {id}: {why}")));
        if bytes_s == Some(0) {
            return refuse(ErrorKind::InvalidInput, "nothing would ever be sent");
        }
        if entry.state.lock().task.state.is_final() {
            return refuse(ErrorKind::InvalidInput, "it has ended already");
        }
        let Some(limiter) = entry.limiter.get() else {
            return refuse(ErrorKind::Unsupported, "this kind of work sends without a limit");
        };
        limiter.set(bytes_s);
        self.shared.announce();
        Ok(())
    }

    /// Waits until a task has ended, and gives its last state.
    pub async fn wait(&self, id: u64) -> Result<Task> {
        let entry = self.entry(id)?;
        // The sender lives in the entry that we hold, so the wait cannot fail.
        let _ = entry.ended.subscribe().wait_for(|ended| *ended).await;
        let task = entry.state.lock().task.clone();
        Ok(task)
    }

    /// Changes whenever any task changes; for event streams.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.shared.changed.subscribe()
    }

    fn entry(&self, id: u64) -> Result<Arc<Entry>> {
        self.shared.tasks.lock().get(&id).cloned().ok_or_else(|| {
            Error::new(ErrorKind::NotFound, format!("find task {id}: there is none on this host"))
                .hint("task numbers belong to the host that runs the task; see `whimbrel task list`")
        })
    }
}

impl Shared {
    fn announce(&self) {
        self.changed.send_modify(|count| *count += 1);
    }

    fn forget_old(&self) {
        let mut tasks = self.tasks.lock();
        let ended: Vec<u64> = tasks
            .values()
            .filter(|entry| entry.state.lock().task.state.is_final())
            .map(|entry| entry.id)
            .collect();
        for id in ended.iter().take(ended.len().saturating_sub(ENDED_KEPT_MAX)) {
            tasks.remove(id);
        }
    }
}

/// The work's own end of a task.
pub struct TaskHandle {
    entry: Arc<Entry>,
    shared: Arc<Shared>,
}

impl TaskHandle {
    /// The task's number.
    pub fn id(&self) -> u64 {
        self.entry.id
    }

    fn change(&self, change: impl FnOnce(&mut State)) {
        {
            let mut state = self.entry.state.lock();
            if state.task.state.is_final() {
                return;
            }
            change(&mut state);
        }
        self.shared.announce();
    }

    /// The step the work is in.
    pub fn phase(&self, phase: impl Into<String>) {
        let phase = phase.into();
        self.change(|state| state.task.phase = phase);
    }

    /// Something that people should know; at most [`NOTES_MAX`] are kept.
    pub fn note(&self, note: impl Into<String>) {
        let note = note.into();
        self.change(|state| {
            if state.task.notes.len() < NOTES_MAX && !state.task.notes.contains(&note) {
                state.task.notes.push(note);
            }
        });
    }

    /// Bytes done and bytes to do, as far as known; rate and time left follow from them.
    pub fn progress(&self, done_bytes: u64, total_bytes: u64) {
        self.change(|state| {
            let task = &mut state.task;
            task.done_bytes = done_bytes;
            task.total_bytes = total_bytes;
            let (since, base) = state.window;
            let elapsed_ms = since.elapsed().as_millis();
            if elapsed_ms >= RATE_WINDOW_MS {
                let done = u128::from(done_bytes.saturating_sub(base));
                task.rate_bytes_s = u64::try_from(done * 1000 / elapsed_ms).unwrap_or(u64::MAX);
                state.window = (Instant::now(), done_bytes);
            }
            task.eta_s = match task.rate_bytes_s {
                0 => None,
                rate => Some(total_bytes.saturating_sub(done_bytes).div_ceil(rate)),
            };
        });
    }

    /// The seconds that are left, where the work knows better than its rate of bytes says.
    pub fn time_left(&self, seconds: u64) {
        self.change(|state| state.task.eta_s = Some(seconds));
    }

    /// The limit on what the work sends; others may change it from now on. Only the first one counts.
    pub fn limited_by(&self, limiter: Arc<Limiter>) {
        let _ = self.entry.limiter.set(limiter);
    }

    /// Bytes sent to other hosts so far.
    pub fn wire_bytes(&self, bytes: u64) {
        self.change(|state| state.task.wire_bytes = bytes);
    }

    /// How long the VM stood still.
    pub fn downtime_ms(&self, downtime_ms: f64) {
        self.change(|state| state.task.downtime_ms = Some(downtime_ms));
    }

    /// A further figure.
    pub fn figure(&self, name: &str, value: f64) {
        self.change(|state| {
            state.task.figures.insert(name.to_owned(), value);
        });
    }

    /// What the work waits for or depends on; `None` when it goes on.
    pub fn waiting_for(&self, what: Option<String>) {
        self.change(|state| {
            state.task.state = if what.is_some() { TaskState::Waiting } else { TaskState::Running };
            state.task.waiting_for = what;
        });
    }

    /// Whether somebody asked to stop.
    pub fn is_cancelled(&self) -> bool {
        *self.entry.cancel.borrow()
    }

    /// Becomes true when somebody asks to stop.
    pub fn cancelled(&self) -> watch::Receiver<bool> {
        self.entry.cancel.subscribe()
    }

    /// Ends the task with the work's result.
    pub fn end(&self, result: &Result<()>) {
        self.change(|state| {
            let task = &mut state.task;
            task.waiting_for = None;
            task.eta_s = None;
            match result {
                Ok(()) => {
                    task.state = TaskState::Done;
                    task.phase = "done".into();
                    task.total_bytes = task.total_bytes.max(task.done_bytes);
                }
                Err(error) => {
                    task.state = match error.kind() {
                        ErrorKind::Cancelled => TaskState::Cancelled,
                        _ => TaskState::Failed,
                    };
                    task.error = Some(error.to_wire());
                }
            }
        });
        self.entry.ended.send_replace(true);
        self.shared.forget_old();
    }
}

impl Drop for TaskHandle {
    /// Work that vanishes (its thread panicked) must not look as if it went on.
    fn drop(&mut self) {
        let open = !self.entry.state.lock().task.state.is_final();
        if open {
            self.end(&Err(Error::new(ErrorKind::Internal, "run the task: it stopped without a result")));
        }
    }
}

#[cfg(test)]
mod test {
    use super::*;

    #[tokio::test]
    async fn a_task_ends_once_and_waiters_see_how() {
        let tasks = Tasks::default();
        let handle = tasks.start(TaskKind::Migrate, "vm a");
        let id = handle.id();
        let waiter = tokio::spawn({
            let tasks = tasks.clone();
            async move { tasks.wait(id).await.unwrap() }
        });
        handle.progress(10, 20);
        tasks.cancel(id).unwrap();
        assert!(handle.is_cancelled());
        handle.end(&Err(Error::new(ErrorKind::Cancelled, "move vm a: cancelled")));
        handle.phase("too late");
        let task = waiter.await.unwrap();
        assert_eq!(task.state, TaskState::Cancelled);
        assert_eq!(task.phase, "start");
        assert!(tasks.cancel(id).is_err());
    }

    #[tokio::test]
    async fn a_limit_is_changed_while_somebody_waits_for_it() {
        let tasks = Tasks::default();
        let handle = tasks.start(TaskKind::Migrate, "vm a");
        let kind = |result: Result<()>| result.unwrap_err().kind();
        assert_eq!(kind(tasks.limit(handle.id(), None)), ErrorKind::Unsupported);
        let limiter = Arc::new(Limiter::new(Some(10)));
        handle.limited_by(Arc::clone(&limiter));
        assert_eq!(kind(tasks.limit(handle.id(), Some(0))), ErrorKind::InvalidInput);
        limiter.pass(1 << 20).await;
        let waits = tokio::spawn(async move { limiter.pass(1).await });
        tokio::task::yield_now().await;
        assert!(!waits.is_finished());
        tasks.limit(handle.id(), None).unwrap();
        waits.await.unwrap();
        handle.end(&Ok(()));
        assert_eq!(kind(tasks.limit(handle.id(), None)), ErrorKind::InvalidInput);
    }

    #[test]
    fn work_that_vanishes_is_reported_and_old_tasks_are_forgotten() {
        let tasks = Tasks::default();
        for _ in 0..ENDED_KEPT_MAX + 50 {
            drop(tasks.start(TaskKind::Publish, "image x"));
        }
        let list = tasks.list();
        assert_eq!(list.len(), ENDED_KEPT_MAX);
        assert!(list.iter().all(|task| task.state == TaskState::Failed));
    }
}
