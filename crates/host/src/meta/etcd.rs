//! The metadata store in etcd, for clusters that want no single point.
//!
//! ```text
//!   whimbrel/r/KEY       a record
//!   whimbrel/t/TXN_ID    outcome of a transaction: "made", or "void" if it never will be; gone after an hour (lease)
//! ```
//!
//! Invariants
//! * A transaction writes its outcome together with its changes, on condition that there is none yet: asked again
//!   it is not made twice, and one that was declared void is never made, however late its request arrives.
//! * A watch's place is the revision of the last event it got. Progress notices are signs of life only: up to etcd
//!   3.4.24 one may overtake events of the same revision.
//! * After any failure the client is made anew from the certificate files, so that renewed certificates are used.
//!
//! Not here: running etcd; hosts show it their own certificates, so it has to trust the cluster's authority. It does
//! not follow removals of hosts: give it a revocation list (`--client-crl-file`), or reach it over a network of its own.

use async_trait::async_trait;
use etcd_client::{
    Certificate, Client, Compare as EtcdCompare, CompareOp, ConnectOptions, GetOptions, GetResponse,
    Identity, KeyValue, PutOptions, TlsOptions, Txn, TxnOp, TxnOpResponse,
};
use parking_lot::Mutex;
use std::future::Future;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::time::timeout;

use super::batch::{Answered, BATCHES, flatten};
use super::{Committed, Compare, Item, MetaStore, Op, Snapshot, TxnId, WatchEvent, check_txn};
use crate::clock;
use crate::error::{Context, Error, ErrorKind, Result};
use crate::metrics::metrics;

mod watch;

/// How long one answer is waited for.
const ANSWER: Duration = Duration::from_secs(5);
/// Outcomes of transactions are kept for so long, seconds.
const OUTCOME_S: u64 = 3_600;
/// Items of one page of a read.
const PAGE: i64 = 500;
/// Most bytes of one answer.
const MESSAGE_BYTES: usize = 64 << 20;
const RECORDS: &str = "whimbrel/r/";
const OUTCOMES: &str = "whimbrel/t/";
const MADE: &[u8] = b"made";
const VOID: &[u8] = b"void";

/// Where etcd is, and what to show it.
#[derive(Clone, Debug)]
pub struct EtcdOptions {
    /// `https://HOST:PORT` of its members.
    pub endpoints: Vec<String>,
    /// PEM file: the authority that signed etcd's certificates.
    pub ca: PathBuf,
    /// PEM file: certificate and key to show. Read again for every new connection.
    pub identity: PathBuf,
}

struct Shared {
    options: EtcdOptions,
    client: tokio::sync::Mutex<Option<Client>>,
    lease: Mutex<Option<(i64, u64)>>,
    answered: Answered,
}

/// See the module's charter.
pub struct EtcdStore(Arc<Shared>);

impl EtcdStore {
    /// The store; nothing is connected until it is used.
    pub fn new(options: EtcdOptions) -> Result<Arc<Self>> {
        if options.endpoints.is_empty() {
            return Err(Error::new(ErrorKind::InvalidInput, "use etcd: no endpoint is given"));
        }
        if let Some(plain) = options.endpoints.iter().find(|it| !it.starts_with("https://")) {
            return Err(Error::new(
                ErrorKind::InvalidInput,
                format!("use etcd at {plain}: only https is used"),
            ));
        }
        Ok(Arc::new(Self(Arc::new(Shared {
            options,
            client: tokio::sync::Mutex::default(),
            lease: Mutex::default(),
            answered: Answered::default(),
        }))))
    }
}

/// How a request failed, as far as that matters for a transaction.
struct Failure {
    error: Error,
    /// The request may have been carried out.
    maybe: bool,
    /// The lease it named is gone.
    no_lease: bool,
}

impl From<etcd_client::Error> for Failure {
    fn from(error: etcd_client::Error) -> Self {
        use etcd_client::Error as E;
        use tonic::Code;
        let (kind, maybe, no_lease) = match &error {
            E::GRpcStatus(status) => match status.code() {
                Code::InvalidArgument | Code::OutOfRange | Code::FailedPrecondition => {
                    (ErrorKind::InvalidInput, false, false)
                }
                Code::NotFound => (ErrorKind::NotFound, false, status.message().contains("lease")),
                Code::PermissionDenied | Code::Unauthenticated => (ErrorKind::Denied, false, false),
                Code::ResourceExhausted => (ErrorKind::NoSpace, false, false),
                _ => (ErrorKind::Unavailable, true, false),
            },
            E::InvalidArgs(_) | E::InvalidUri(_) | E::EndpointError(_) => {
                (ErrorKind::InvalidInput, false, false)
            }
            _ => (ErrorKind::Unavailable, true, false),
        };
        let text = match &error {
            // The status prints its metadata; people want the message.
            E::GRpcStatus(status) => status.message().to_owned(),
            other => other.to_string(),
        };
        Self { error: Error::new(kind, format!("ask etcd: {text}")), maybe, no_lease }
    }
}

impl Shared {
    async fn connect(&self) -> Result<Client> {
        let mut place = self.client.lock().await;
        if let Some(client) = &*place {
            return Ok(client.clone());
        }
        let options = &self.options;
        let read = async |path: &PathBuf| {
            tokio::fs::read(path).await.with_context(|| format!("read {}", path.display()))
        };
        let identity = read(&options.identity).await?;
        let tls = TlsOptions::new()
            .ca_certificate(Certificate::from_pem(read(&options.ca).await?))
            .identity(Identity::from_pem(&identity, &identity));
        let connect = ConnectOptions::new()
            .with_tls(tls)
            .with_connect_timeout(Duration::from_secs(2))
            .with_keep_alive(Duration::from_secs(1), Duration::from_secs(2))
            .with_keep_alive_while_idle(true)
            .with_require_leader(true);
        let client = timeout(ANSWER, Client::connect(&options.endpoints, Some(connect)));
        let client =
            client.await.map_err(|_| Error::new(ErrorKind::Unavailable, "connect to etcd: no answer"))?;
        let client = client.map_err(|error| Failure::from(error).error).context("connect to etcd")?;
        *place = Some(client.clone());
        Ok(client)
    }

    /// Runs one request; after a failure the next one makes a new connection.
    async fn ask<T, F>(&self, request: impl FnOnce(Client) -> F) -> Result<T, Failure>
    where
        F: Future<Output = Result<T, etcd_client::Error>>,
    {
        let client =
            self.connect().await.map_err(|error| Failure { error, maybe: false, no_lease: false })?;
        let failure = match timeout(ANSWER, request(client)).await {
            Ok(Ok(answer)) => {
                self.answered.now();
                return Ok(answer);
            }
            Ok(Err(error)) => Failure::from(error),
            Err(_) => Failure {
                error: Error::new(ErrorKind::Unavailable, "ask etcd: no answer in time"),
                maybe: true,
                no_lease: false,
            },
        };
        if failure.maybe {
            *self.client.lock().await = None;
        }
        Err(failure)
    }

    /// The lease for outcomes, a new one when the present one is half over.
    async fn lease(&self) -> Result<i64, Failure> {
        let now_s = clock::wall_s();
        if let Some((lease, made_s)) = *self.lease.lock()
            && now_s.saturating_sub(made_s) < OUTCOME_S / 2
        {
            return Ok(lease);
        }
        let life_s = int(OUTCOME_S + OUTCOME_S / 2);
        let granted = self.ask(|mut client| async move { client.lease_grant(life_s, None).await });
        // A lease that was granted unknown to us runs out by itself.
        let granted = granted.await.map_err(|failure| Failure { maybe: false, ..failure })?;
        *self.lease.lock() = Some((granted.id(), now_s));
        Ok(granted.id())
    }

    /// Makes sure that etcd is there before something is sent whose loss would leave a doubt.
    async fn probe(&self) -> Result<(), Failure> {
        if self.answered.ms_ago() < 500 {
            return Ok(());
        }
        let asked = self.ask(|mut client| async move { client.get(RECORDS, None).await });
        asked.await.map(drop).map_err(|failure| Failure { maybe: false, ..failure })
    }

    async fn try_txn(&self, id: TxnId, compare: &[Compare], ops: &[Op]) -> Result<Committed, Failure> {
        self.probe().await?;
        let lease = self.lease().await?;
        let outcome = outcome_key(id);
        let mut conditions = vec![EtcdCompare::create_revision(outcome.clone(), CompareOp::Equal, 0)];
        conditions.extend(compare.iter().map(|condition| match condition {
            Compare::Absent(key) => EtcdCompare::create_revision(record_key(key), CompareOp::Equal, 0),
            Compare::Unchanged(key, rev) => {
                EtcdCompare::mod_revision(record_key(key), CompareOp::Equal, int(*rev))
            }
        }));
        let mut changes = vec![TxnOp::put(outcome.clone(), MADE, Some(PutOptions::new().with_lease(lease)))];
        changes.extend(ops.iter().map(|op| match op {
            Op::Put(key, value) => TxnOp::put(record_key(key), value.clone(), None),
            Op::Delete(key) => TxnOp::delete(record_key(key), None),
        }));
        let txn = Txn::new().when(conditions).and_then(changes).or_else([TxnOp::get(outcome, None)]);
        let answer = self.ask(|mut client| async move { client.txn(txn).await }).await?;
        if answer.succeeded() {
            return Ok(Committed::Yes(uint(answer.header().map_or(0, |header| header.revision()))));
        }
        match found_outcome(&answer.op_responses()) {
            None => Ok(Committed::Conflict),
            Some(Some(rev)) => Ok(Committed::Yes(rev)),
            Some(None) => Err(Failure {
                error: Error::new(
                    ErrorKind::Cancelled,
                    "change records: the request came after it had been given up",
                ),
                maybe: false,
                no_lease: false,
            }),
        }
    }

    async fn try_resolve(&self, id: TxnId) -> Result<Option<u64>, Failure> {
        let lease = self.lease().await?;
        let outcome = outcome_key(id);
        let txn = Txn::new()
            .when([EtcdCompare::create_revision(outcome.clone(), CompareOp::Equal, 0)])
            .and_then([TxnOp::put(outcome.clone(), VOID, Some(PutOptions::new().with_lease(lease)))])
            .or_else([TxnOp::get(outcome, None)]);
        let answer = self.ask(|mut client| async move { client.txn(txn).await }).await?;
        Ok(if answer.succeeded() { None } else { found_outcome(&answer.op_responses()).flatten() })
    }

    /// Repeats `request` once if the lease it used is gone (etcd's data was replaced, or this machine slept).
    async fn with_lease<T, F>(&self, request: impl Fn() -> F) -> Result<T, Failure>
    where
        F: Future<Output = Result<T, Failure>>,
    {
        match request().await {
            Err(Failure { no_lease: true, .. }) => {
                *self.lease.lock() = None;
                request().await
            }
            other => other,
        }
    }
}

fn int(rev: u64) -> i64 {
    i64::try_from(rev).unwrap_or(i64::MAX)
}

fn uint(rev: i64) -> u64 {
    u64::try_from(rev).unwrap_or(0)
}

fn record_key(key: &str) -> String {
    format!("{RECORDS}{key}")
}

fn outcome_key(id: TxnId) -> String {
    format!("{OUTCOMES}{}", id.0)
}

/// What the `or_else` branch found: no outcome, one that was made, or a void one.
fn found_outcome(answers: &[TxnOpResponse]) -> Option<Option<u64>> {
    let [TxnOpResponse::Get(found), ..] = answers else { return None };
    let found = found.kvs().first()?;
    Some((found.value() == MADE).then(|| uint(found.mod_revision())))
}

/// The record that a key of etcd holds; `None` for a key that is none of ours.
fn item_of(found: &KeyValue) -> Option<Item> {
    let key = std::str::from_utf8(found.key()).ok()?.strip_prefix(RECORDS)?.to_owned();
    Some(Item { key, value: found.value().to_vec(), mod_rev: uint(found.mod_revision()) })
}

fn revision_of(answer: &GetResponse) -> i64 {
    answer.header().map_or(0, |header| header.revision())
}

/// The first key after all that start with `prefix`.
fn end_of(prefix: &str) -> Vec<u8> {
    let mut end = prefix.as_bytes().to_vec();
    // No byte of UTF-8 is 0xff: adding one to the last never carries.
    if let Some(last) = end.last_mut() {
        *last += 1;
    }
    end
}

#[async_trait]
impl MetaStore for EtcdStore {
    async fn read(&self, prefix: &str) -> Result<Snapshot> {
        let prefix = record_key(prefix);
        let end = end_of(&prefix);
        let mut items = Vec::new();
        let (mut from, mut rev) = (prefix.into_bytes(), 0);
        loop {
            let (start, end) = (from.clone(), end.clone());
            let page = self.0.ask(|client| async move {
                // Later pages show the revision of the first.
                let options = GetOptions::new().with_range(end).with_limit(PAGE).with_revision(rev);
                client.kv_client().max_decoding_message_size(MESSAGE_BYTES).get(start, Some(options)).await
            });
            let page = page.await.map_err(|failure| failure.error).context("read records")?;
            if rev == 0 {
                rev = revision_of(&page);
            }
            items.extend(page.kvs().iter().filter_map(item_of));
            match page.kvs().last() {
                Some(last) if page.more() => from = [last.key(), &[0]].concat(),
                _ => return Ok(Snapshot { items, rev: uint(rev) }),
            }
        }
    }

    async fn get(&self, key: &str) -> Result<Option<Item>> {
        let key = record_key(key);
        let found = self.0.ask(|mut client| async move { client.get(key, None).await });
        let found = found.await.map_err(|failure| failure.error).context("read a record")?;
        Ok(found.kvs().first().and_then(item_of))
    }

    async fn txn_as(&self, id: TxnId, compare: Vec<Compare>, ops: Vec<Op>) -> Result<Committed> {
        check_txn(&compare, &ops)?;
        let result = self.0.with_lease(|| self.0.try_txn(id, &compare, &ops)).await;
        let label = match &result {
            Ok(Committed::Yes(_)) => "committed",
            Ok(Committed::Conflict) => "conflict",
            Err(Failure { maybe: true, .. }) => "unknown",
            Err(_) => "failed",
        };
        metrics().meta_transactions.with_label_values(&[label]).inc();
        result.map_err(|failure| {
            if failure.maybe {
                Error::with_source(ErrorKind::Unknown, "change records", failure.error)
            } else {
                failure.error
            }
        })
    }

    async fn resolve(&self, id: TxnId) -> Result<Option<u64>> {
        let resolved = self.0.with_lease(|| self.0.try_resolve(id)).await;
        resolved.map_err(|failure| failure.error).context("find out about a transaction")
    }

    async fn watch(&self, prefix: &str, after_rev: u64) -> Result<mpsc::Receiver<WatchEvent>> {
        let (batches, receiver) = mpsc::channel(BATCHES);
        tokio::spawn(watch::run(self.0.clone(), record_key(prefix), after_rev, batches));
        Ok(flatten(receiver))
    }

    fn answered_ms_ago(&self) -> u64 {
        self.0.answered.ms_ago()
    }
}
