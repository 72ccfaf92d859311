//! Runs one of the engine's machines: gives it events, carries out its actions in order.
//!
//! ```text
//!           ┌────────── events (bounded queue) ◄──────────┐
//!           ▼                                             │
//!   machine.step(now, event) ──► actions ──► journal, fail point, send (at once)
//!                                       └──► store, work (in the background) ─┘
//! ```
//!
//! Invariants
//! * One owner: only this loop touches the machine.
//! * An action is complete, or under way where the engine says so, before the next begins. If the journal cannot
//!   be written, nothing that it guards is begun, and the machine hears that this side is broken.
//!
//! Not here: what the work is (`source`, `target`).

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use whimbrel_engine::migrate::handover::{
    Action, Event, JournalEntry, Outcome, Side, Source, SourceWork, Step,
};
use whimbrel_engine::migrate::handover::{Target, TargetWork, ToSource, ToTarget};
use whimbrel_wire::{AttemptId, Name, Time};

use super::journal::Journal;
use super::store;
use crate::clock;
use crate::error::Error;
use crate::failpoint;
use crate::meta::MetaStore;

/// Events that wait for the machine; whoever has more waits.
pub const EVENTS_MAX: usize = 256;

/// One of the engine's two machines.
pub trait Machine: Send + 'static {
    /// Messages it receives.
    type In: Send + 'static;
    /// Messages it sends.
    type Out: Send + 'static;
    /// Work it has done.
    type Work: Copy + std::fmt::Debug + Send + 'static;
    /// Its side.
    const SIDE: Side;

    /// Takes an event in.
    fn step(
        &mut self,
        now: Time,
        event: Event<Self::In, Self::Work>,
        out: &mut Vec<Action<Self::Out, Self::Work>>,
    );
    /// When it wants a tick.
    fn deadline(&self) -> Option<Time>;
    /// What it waits for, for people.
    fn waiting_for(&self) -> Option<String>;
    /// The attempt it is about.
    fn attempt(&self) -> AttemptId;
    /// The VM it is about.
    fn vm(&self) -> Name;
    /// Whether this work first stops whatever other work is under way.
    fn ends_others(work: Self::Work) -> bool;
}

impl Machine for Source {
    type In = ToSource;
    type Out = ToTarget;
    type Work = SourceWork;
    const SIDE: Side = Side::Source;

    fn step(
        &mut self,
        now: Time,
        event: Event<ToSource, SourceWork>,
        out: &mut Vec<Action<ToTarget, SourceWork>>,
    ) {
        Self::step(self, now, event, out);
    }
    fn deadline(&self) -> Option<Time> {
        Self::deadline(self)
    }
    fn waiting_for(&self) -> Option<String> {
        Self::waiting_for(self)
    }
    fn attempt(&self) -> AttemptId {
        self.offer().attempt
    }
    fn vm(&self) -> Name {
        self.offer().vm.clone()
    }
    fn ends_others(work: SourceWork) -> bool {
        matches!(work, SourceWork::ResumeHere | SourceWork::Release)
    }
}

impl Machine for Target {
    type In = ToTarget;
    type Out = ToSource;
    type Work = TargetWork;
    const SIDE: Side = Side::Target;

    fn step(
        &mut self,
        now: Time,
        event: Event<ToTarget, TargetWork>,
        out: &mut Vec<Action<ToSource, TargetWork>>,
    ) {
        Self::step(self, now, event, out);
    }
    fn deadline(&self) -> Option<Time> {
        Self::deadline(self)
    }
    fn waiting_for(&self) -> Option<String> {
        Self::waiting_for(self)
    }
    fn attempt(&self) -> AttemptId {
        self.offer().attempt
    }
    fn vm(&self) -> Name {
        self.offer().vm.clone()
    }
    fn ends_others(work: TargetWork) -> bool {
        matches!(work, TargetWork::Discard)
    }
}

/// Why work failed.
pub struct WorkFailed {
    /// What happened.
    pub error: Error,
    /// The guest may have run an instruction here (of the target's `Resume`).
    pub may_have_run: bool,
}

impl From<Error> for WorkFailed {
    fn from(error: Error) -> Self {
        Self { error, may_have_run: false }
    }
}

/// The host's part of a side.
pub trait Hands<M: Machine>: Send + Sync + 'static {
    /// Does a piece of work.
    fn work(self: Arc<Self>, work: M::Work) -> impl Future<Output = Result<(), WorkFailed>> + Send;
    /// Tells the other side, if it can be reached now.
    fn send(&self, message: M::Out);
    /// A step begins.
    fn enter(&self, step: Step);
    /// What people see the move wait for.
    fn waiting_for(&self, what: Option<String>);
}

/// Sends events to a machine.
pub type Events<M> = mpsc::Sender<Event<<M as Machine>::In, <M as Machine>::Work>>;
/// Receives a machine's events.
pub type EventQueue<M> = mpsc::Receiver<Event<<M as Machine>::In, <M as Machine>::Work>>;

/// A queue of events.
pub fn queue<M: Machine>() -> (Events<M>, EventQueue<M>) {
    mpsc::channel(EVENTS_MAX)
}

/// Runs `machine` to its end.
pub async fn run<M: Machine, H: Hands<M>>(
    mut machine: M,
    hands: Arc<H>,
    (events, mut queue): (Events<M>, EventQueue<M>),
    meta: Arc<dyn MetaStore>,
    journal: Journal,
) -> Outcome {
    let watch = tokio::spawn(watch_record::<M>(Arc::clone(&meta), machine.vm(), events.clone()));
    let mut actions = Vec::new();
    let mut under_way = Vec::new();
    machine.step(clock::now(), Event::Tick, &mut actions);
    let outcome = loop {
        let context = Performing {
            events: &events,
            meta: &meta,
            journal: &journal,
            attempt: machine.attempt(),
            vm: machine.vm(),
        };
        match context.perform(&hands, &mut actions, &mut under_way).await {
            Ok(Some(outcome)) => break outcome,
            Ok(None) => {}
            Err(error) => {
                tracing::error!(attempt = %machine.attempt(), %error, "the journal of a move cannot be written");
                machine.step(clock::now(), Event::Broken(error.to_wire()), &mut actions);
                continue;
            }
        }
        hands.waiting_for(machine.waiting_for());
        let event = tokio::select! {
            event = queue.recv() => event.unwrap_or(Event::Tick),
            () = sleep_until(machine.deadline()) => Event::Tick,
        };
        machine.step(clock::now(), event, &mut actions);
    };
    watch.abort();
    outcome
}

async fn sleep_until(deadline: Option<Time>) {
    match deadline {
        Some(at) => {
            let left_ns = at.0.saturating_sub(clock::now().0);
            // Never busy: a machine that wants a tick at once gets it in the next millisecond.
            tokio::time::sleep(Duration::from_nanos(left_ns).max(Duration::from_millis(1))).await;
        }
        None => std::future::pending().await,
    }
}

struct Performing<'a, M: Machine> {
    events: &'a Events<M>,
    meta: &'a Arc<dyn MetaStore>,
    journal: &'a Journal,
    attempt: AttemptId,
    vm: Name,
}

impl<M: Machine> Performing<'_, M> {
    async fn perform<H: Hands<M>>(
        &self,
        hands: &Arc<H>,
        actions: &mut Vec<Action<M::Out, M::Work>>,
        under_way: &mut Vec<JoinHandle<()>>,
    ) -> Result<Option<Outcome>, Error> {
        for action in std::mem::take(actions) {
            match action {
                Action::Journal { entry, sync } => self.write(&entry, sync)?,
                Action::Enter(step) => {
                    hands.enter(step);
                    failpoint::reach(M::SIDE, step).await;
                }
                Action::Send(message) => hands.send(message),
                Action::Do(work) => {
                    under_way.retain(|task| !task.is_finished());
                    if M::ends_others(work) {
                        for task in under_way.drain(..) {
                            task.abort();
                            let _ = task.await;
                        }
                    }
                    under_way.push(self.begin(hands, work));
                }
                Action::Read(id) => {
                    let (meta, events, vm) = (Arc::clone(self.meta), self.events.clone(), self.vm.clone());
                    tokio::spawn(async move {
                        let event = match store::read(&*meta, &vm).await {
                            Ok(seen) => Event::Records(id, Box::new(seen)),
                            Err(error) => Event::ReadFailed(id, error.to_wire()),
                        };
                        let _ = events.send(event).await;
                    });
                }
                Action::Cas(id, cas) => {
                    let (meta, events) = (Arc::clone(self.meta), self.events.clone());
                    tokio::spawn(async move {
                        let result = store::cas(&*meta, &cas).await;
                        let _ = events.send(Event::Cas(id, result)).await;
                    });
                }
                Action::Finished(outcome) => {
                    self.journal.remove(self.attempt, M::SIDE);
                    return Ok(Some(outcome));
                }
            }
        }
        Ok(None)
    }

    fn write(&self, entry: &JournalEntry, sync: bool) -> Result<(), Error> {
        self.journal.write(entry, sync)
    }

    fn begin<H: Hands<M>>(&self, hands: &Arc<H>, work: M::Work) -> JoinHandle<()> {
        let (hands, events) = (Arc::clone(hands), self.events.clone());
        tokio::spawn(async move {
            tracing::debug!(?work, "work of a move begins");
            let event = match hands.work(work).await {
                Ok(()) => Event::Done(work),
                Err(WorkFailed { error, may_have_run }) => {
                    tracing::warn!(?work, %error, "work of a move failed");
                    Event::Failed { work, error: error.to_wire(), may_have_run }
                }
            };
            let _ = events.send(event).await;
        })
    }
}

/// Tells the machine when the VM's record changes; tries again for as long as the machine runs.
async fn watch_record<M: Machine>(meta: Arc<dyn MetaStore>, vm: Name, events: Events<M>) {
    let key = whimbrel_wire::meta::key::vm(&vm);
    loop {
        let rev = meta.read(&key).await.map(|snapshot| snapshot.rev);
        if let Ok(rev) = rev
            && let Ok(mut changes) = meta.watch(&key, rev).await
        {
            while changes.recv().await.is_some() {
                if events.send(Event::RecordChanged).await.is_err() {
                    return;
                }
            }
        }
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
}
