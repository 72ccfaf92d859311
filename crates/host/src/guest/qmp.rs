//! QMP, QEMU's control protocol: one JSON document per line on a unix socket; events interleave with answers.
//!
//! ```text
//!   execute ──▶ write lock ──▶ socket ──▶ QEMU ──▶ reader task ──┬─ answer, by id ──▶ the waiting call
//!                                                               └─ event ──▶ every [`Events`]
//! ```
//!
//! Invariants
//! * Every call has a limit; a call whose answer came too late is forgotten, and the connection goes on.
//! * A QEMU that is gone, or closes the socket, fails all waiting and later calls with `ErrorKind::Unavailable`.
//! * Events are kept for [`EVENTS_MAX`] per receiver; a receiver that falls behind is told so, never silently.
//!
//! Not here: what the commands mean (`device_state`, `precheck`).

use std::collections::HashMap;
use std::fmt;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, BufReader, Interest};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{broadcast, oneshot};
use tokio::time::{Instant, sleep, timeout, timeout_at};

use crate::error::{Context, Error, ErrorKind, Result};

/// Events kept for a receiver that is slow.
pub const EVENTS_MAX: usize = 1024;
/// Limit of a call that names none.
pub const CALL_LIMIT: Duration = Duration::from_secs(10);
/// How long a migration may take to be cancelled.
const CANCEL_LIMIT: Duration = Duration::from_secs(10);
const CANCEL_POLL: Duration = Duration::from_millis(2);
/// The longest line accepted from QEMU, bytes.
const LINE_MAX_BYTES: u64 = 16 << 20;

/// A connection to one QEMU. Clones share it.
#[derive(Clone)]
pub struct Qmp {
    inner: Arc<Inner>,
}

struct Inner {
    path: PathBuf,
    version: Version,
    peer_pid: Option<u32>,
    writer: tokio::sync::Mutex<OwnedWriteHalf>,
    /// `None` once the connection is gone.
    live: Mutex<Option<Live>>,
    next_id: AtomicU64,
    reader: Mutex<Option<tokio::task::AbortHandle>>,
}

struct Live {
    /// Calls that wait, by id.
    waiting: HashMap<u64, oneshot::Sender<Answer>>,
    events: broadcast::Sender<Event>,
}

type Answer = std::result::Result<Value, QmpError>;

/// QEMU's version, as its greeting says.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version {
    /// `10` of 10.0.2.
    pub major: u32,
    /// `0` of 10.0.2.
    pub minor: u32,
    /// `2` of 10.0.2.
    pub micro: u32,
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.micro)
    }
}

/// What QEMU says by itself.
#[derive(Clone, Debug, PartialEq)]
pub struct Event {
    /// `STOP`, `MIGRATION`, …
    pub name: String,
    /// Its data; null if none.
    pub data: Value,
    /// QEMU's clock, microseconds since 1970.
    pub time_us: u64,
}

/// QEMU's own error; the source of the [`Error`] that a failed call returns.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct QmpError {
    /// `GenericError`, `CommandNotFound`, `DeviceNotFound`, …
    pub class: String,
    /// Words for people.
    pub desc: String,
}

impl fmt::Display for QmpError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "QEMU says: {} ({})", self.desc, self.class)
    }
}

impl std::error::Error for QmpError {}

impl QmpError {
    fn kind(&self) -> ErrorKind {
        match self.class.as_str() {
            "CommandNotFound" => ErrorKind::Unsupported,
            "DeviceNotFound" => ErrorKind::NotFound,
            "KVMMissingCap" => ErrorKind::Missing,
            _ => ErrorKind::Io,
        }
    }

    fn from_json(error: &Value) -> Self {
        let text = |key| error.get(key).and_then(Value::as_str).unwrap_or("unknown").to_owned();
        Self { class: text("class"), desc: text("desc") }
    }
}

impl Qmp {
    /// Connects to the socket at `path` and agrees on capabilities, within `limit`.
    pub async fn connect(path: &Path, limit: Duration) -> Result<Self> {
        let action = || format!("connect to QMP at {}", path.display());
        timeout(limit, Self::handshake(path))
            .await
            .map_err(|_| {
                Error::new(ErrorKind::TimedOut, format!("{}: no greeting within {limit:?}", action()))
                    .hint("another program may hold this QMP socket: QEMU serves one connection per socket")
            })?
            .with_context(action)
    }

    async fn handshake(path: &Path) -> Result<Self> {
        let stream = UnixStream::connect(path).await.context("connect")?;
        let peer_pid = stream.peer_cred().ok().and_then(|who| u32::try_from(who.pid()?).ok());
        let (reader, writer) = stream.into_split();
        let mut lines = BufReader::new(reader);
        let greeting = read_line(&mut lines).await?;
        let version = version_of(&greeting)
            .ok_or_else(|| Error::new(ErrorKind::InvalidInput, "read the greeting: this is not QMP"))?;
        let inner = Arc::new(Inner {
            path: path.to_owned(),
            version,
            peer_pid,
            writer: tokio::sync::Mutex::new(writer),
            live: Mutex::new(Some(Live {
                waiting: HashMap::new(),
                events: broadcast::channel(EVENTS_MAX).0,
            })),
            next_id: AtomicU64::new(1),
            reader: Mutex::new(None),
        });
        // The task holds the parts it needs weakly: dropping the last handle ends it and closes the socket.
        let task = tokio::spawn(read_all(lines, Arc::downgrade(&inner)));
        *inner.reader.lock() = Some(task.abort_handle());
        let qmp = Self { inner };
        let _: Value = qmp.execute("qmp_capabilities", json!({})).await?;
        Ok(qmp)
    }

    /// The socket's path.
    pub fn path(&self) -> &Path {
        &self.inner.path
    }

    /// QEMU's version.
    pub fn version(&self) -> Version {
        self.inner.version
    }

    /// The process that made the socket, as this host numbers it; QEMU itself, unless it was given the socket.
    pub fn peer_pid(&self) -> Option<u32> {
        self.inner.peer_pid
    }

    /// Whether the connection is gone; it does not come back.
    pub fn is_closed(&self) -> bool {
        self.inner.live.lock().is_none()
    }

    /// Runs a command with `args` (an object), within [`CALL_LIMIT`].
    pub async fn execute<T: DeserializeOwned>(&self, command: &str, args: Value) -> Result<T> {
        self.execute_within(command, args, CALL_LIMIT).await
    }

    /// Runs a command within `limit`.
    pub async fn execute_within<T: DeserializeOwned>(
        &self,
        command: &str,
        args: Value,
        limit: Duration,
    ) -> Result<T> {
        self.call(command, args, None, limit).await
    }

    /// Runs a command that takes a descriptor along (`getfd`, `add-fd`).
    pub async fn execute_with_fd<T: DeserializeOwned>(
        &self,
        command: &str,
        args: Value,
        fd: BorrowedFd<'_>,
    ) -> Result<T> {
        self.call(command, args, Some(fd), CALL_LIMIT).await
    }

    /// Runs a command of the human monitor and returns what it prints. For what QMP has no command for.
    pub async fn human(&self, line: &str) -> Result<String> {
        self.execute("human-monitor-command", json!({ "command-line": line })).await
    }

    /// The run state: `running`, `paused`, `inmigrate`, `postmigrate`, ….
    pub async fn run_state(&self) -> Result<String> {
        let status: Value = self.execute("query-status", json!({})).await?;
        text_at(&status, "status", "query-status")
    }

    /// Stops the virtual processors; returns once block I/O is drained.
    pub async fn stop(&self) -> Result<()> {
        self.execute::<Value>("stop", json!({})).await.map(drop)
    }

    /// Lets the virtual processors run.
    pub async fn cont(&self) -> Result<()> {
        self.execute::<Value>("cont", json!({})).await.map(drop)
    }

    /// Ends the migration that QEMU is in the middle of, if it is in one: also one that an earlier process of this agent
    /// began, which QEMU holds before the switch-over until somebody says how to go on.
    pub async fn cancel_migration(&self) -> Result<()> {
        if self.is_migration_over().await? {
            return Ok(());
        }
        self.execute::<Value>("migrate_cancel", json!({})).await.context("cancel QEMU's migration")?;
        let deadline = Instant::now() + CANCEL_LIMIT;
        while Instant::now() < deadline {
            if self.is_migration_over().await? {
                return Ok(());
            }
            sleep(CANCEL_POLL).await;
        }
        Err(Error::new(ErrorKind::TimedOut, "cancel QEMU's migration: it goes on"))
    }

    async fn is_migration_over(&self) -> Result<bool> {
        let info: Value = self.execute("query-migrate", json!({})).await?;
        // QEMU says nothing of a migration that never was.
        let status = info.get("status").and_then(Value::as_str).unwrap_or("none");
        Ok(matches!(status, "cancelled" | "failed" | "completed" | "none"))
    }

    /// Every event from now on.
    pub fn events(&self) -> Events {
        let receiver = match self.inner.live.lock().as_ref() {
            Some(live) => live.events.subscribe(),
            // Its sender is dropped at once: the receiver says that QEMU is gone.
            None => broadcast::channel(1).1,
        };
        Events { receiver }
    }

    async fn call<T: DeserializeOwned>(
        &self,
        command: &str,
        args: Value,
        fd: Option<BorrowedFd<'_>>,
        limit: Duration,
    ) -> Result<T> {
        let action = || format!("execute {command} at QEMU {}", self.inner.path.display());
        let deadline = Instant::now() + limit;
        let id = self.inner.next_id.fetch_add(1, Ordering::Relaxed);
        let (answer_to, answer) = oneshot::channel();
        match self.inner.live.lock().as_mut() {
            Some(live) => live.waiting.insert(id, answer_to),
            None => return Err(gone()).with_context(action),
        };
        // Whatever ends this call, its entry must not stay behind.
        let _forget = Forget { inner: &self.inner, id };
        let mut line = json!({ "execute": command, "arguments": args, "id": id }).to_string().into_bytes();
        line.push(b'\n');
        let sent = timeout_at(deadline, self.inner.send(&line, fd)).await;
        let late = || Error::new(ErrorKind::TimedOut, format!("no answer within {limit:?}"));
        sent.map_err(|_| late()).and_then(|sent| sent).with_context(action)?;
        let answer = timeout_at(deadline, answer).await.map_err(|_| late()).with_context(action)?;
        let value = match answer {
            Ok(Ok(value)) => value,
            Ok(Err(error)) => return Err(Error::with_source(error.kind(), action(), error)),
            Err(_) => return Err(gone()).with_context(action),
        };
        serde_json::from_value(value)
            .map_err(|error| Error::with_source(ErrorKind::Unsupported, action(), error))
    }
}

impl fmt::Debug for Qmp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Qmp({}, QEMU {})", self.inner.path.display(), self.inner.version)
    }
}

struct Forget<'a> {
    inner: &'a Inner,
    id: u64,
}

impl Drop for Forget<'_> {
    fn drop(&mut self) {
        if let Some(live) = self.inner.live.lock().as_mut() {
            live.waiting.remove(&self.id);
        }
    }
}

impl Inner {
    async fn send(&self, line: &[u8], fd: Option<BorrowedFd<'_>>) -> Result<()> {
        let writer = self.writer.lock().await;
        let stream: &UnixStream = writer.as_ref();
        let mut rest = line;
        let mut fd = fd;
        while !rest.is_empty() {
            stream.writable().await.context("send")?;
            let sent = stream.try_io(Interest::WRITABLE, || send_once(stream, rest, fd));
            match sent {
                Ok(count) => {
                    // The descriptor went with the first byte.
                    fd = None;
                    rest = rest.get(count..).unwrap_or_default();
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error).context("send"),
            }
        }
        Ok(())
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        if let Some(reader) = self.reader.get_mut() {
            reader.abort();
        }
    }
}

fn send_once(stream: &UnixStream, bytes: &[u8], fd: Option<BorrowedFd<'_>>) -> io::Result<usize> {
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let fds = fd.map(|fd| [fd]);
    if let Some(fds) = &fds {
        control.push(SendAncillaryMessage::ScmRights(fds));
    }
    let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
    Ok(rustix::net::sendmsg(stream.as_fd(), &[io::IoSlice::new(bytes)], &mut control, flags)?)
}

/// A receiver of events.
pub struct Events {
    receiver: broadcast::Receiver<Event>,
}

impl Events {
    /// The next event; `ErrorKind::Unavailable` when QEMU is gone, `ErrorKind::Unknown` when events were lost
    /// because this receiver was too slow (ask QEMU for its state, and go on).
    pub async fn next(&mut self) -> Result<Event> {
        self.receiver.recv().await.map_err(|error| match error {
            broadcast::error::RecvError::Closed => gone(),
            broadcast::error::RecvError::Lagged(count) => {
                Error::new(ErrorKind::Unknown, format!("receive events of QEMU: {count} were lost"))
            }
        })
    }

    /// The first event that `wanted` accepts, within `limit`; others are dropped.
    pub async fn wait(&mut self, wanted: impl Fn(&Event) -> bool, limit: Duration) -> Result<Event> {
        let search = async {
            loop {
                let event = self.next().await?;
                if wanted(&event) {
                    return Ok(event);
                }
            }
        };
        timeout(limit, search).await.map_err(|_| {
            Error::new(ErrorKind::TimedOut, format!("wait for an event of QEMU: none within {limit:?}"))
        })?
    }
}

fn gone() -> Error {
    Error::new(ErrorKind::Unavailable, "QEMU closed the connection")
}

/// A text field of an answer.
pub(crate) fn text_at(value: &Value, key: &str, command: &str) -> Result<String> {
    value.get(key).and_then(Value::as_str).map(str::to_owned).ok_or_else(|| {
        Error::new(ErrorKind::Unsupported, format!("read the answer of {command}: it has no text {key:?}"))
    })
}

fn version_of(greeting: &Value) -> Option<Version> {
    let qemu = greeting.get("QMP")?.get("version")?.get("qemu")?;
    let number = |key| qemu.get(key).and_then(Value::as_u64).and_then(|n| u32::try_from(n).ok());
    Some(Version { major: number("major")?, minor: number("minor")?, micro: number("micro")? })
}

async fn read_line(lines: &mut BufReader<OwnedReadHalf>) -> Result<Value> {
    let mut line = Vec::new();
    let count = (&mut *lines).take(LINE_MAX_BYTES).read_until(b'\n', &mut line).await.context("receive")?;
    if count == 0 {
        return Err(gone());
    }
    if line.last() != Some(&b'\n') {
        return Err(Error::new(ErrorKind::Unavailable, "receive: QEMU broke off within a line"));
    }
    serde_json::from_slice(&line)
        .map_err(|error| Error::with_source(ErrorKind::InvalidInput, "read a line of QMP", error))
}

async fn read_all(mut lines: BufReader<OwnedReadHalf>, inner: std::sync::Weak<Inner>) {
    let error = loop {
        let message = match read_line(&mut lines).await {
            Ok(message) => message,
            Err(error) => break error,
        };
        let Some(inner) = inner.upgrade() else { return };
        dispatch(&inner, message);
    };
    if let Some(inner) = inner.upgrade() {
        tracing::debug!(path = %inner.path.display(), %error, "QMP connection ended");
        // Dropping the senders fails the calls that wait.
        drop(inner.live.lock().take());
    }
}

fn dispatch(inner: &Inner, mut message: Value) {
    if let Some(name) = message.get("event").and_then(Value::as_str).map(str::to_owned) {
        let stamp = |key| message.pointer(&format!("/timestamp/{key}")).and_then(Value::as_u64).unwrap_or(0);
        let time_us = stamp("seconds").saturating_mul(1_000_000).saturating_add(stamp("microseconds"));
        let data = message.get_mut("data").map(Value::take).unwrap_or_default();
        // Nobody listening is fine.
        if let Some(live) = inner.live.lock().as_ref() {
            let _ = live.events.send(Event { name, data, time_us });
        }
        return;
    }
    let Some(id) = message.get("id").and_then(Value::as_u64) else {
        tracing::warn!(path = %inner.path.display(), %message, "QMP answer without an id");
        return;
    };
    let answer = match message.get("error") {
        Some(error) => Err(QmpError::from_json(error)),
        None => Ok(message.get_mut("return").map(Value::take).unwrap_or_default()),
    };
    let waiting = inner.live.lock().as_mut().and_then(|live| live.waiting.remove(&id));
    if let Some(waiting) = waiting {
        let _ = waiting.send(answer);
    }
}

#[cfg(test)]
mod test {
    use super::*;
    use std::os::unix::net::UnixListener;
    use tokio::io::AsyncWriteExt;

    const GREETING: &str =
        r#"{"QMP": {"version": {"qemu": {"micro": 2, "minor": 0, "major": 10}}, "capabilities": []}}"#;
    const LIMIT: Duration = Duration::from_secs(5);

    /// A QEMU that greets and then does what `serve` does, and a connection to it.
    async fn fake<F>(
        serve: impl FnOnce(BufReader<OwnedReadHalf>, OwnedWriteHalf) -> F,
    ) -> (Qmp, tempfile::TempDir)
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("qmp.sock");
        let listener = UnixListener::bind(&path).unwrap();
        listener.set_nonblocking(true).unwrap();
        let listener = tokio::net::UnixListener::from_std(listener).unwrap();
        let accepted = async {
            let (stream, _) = listener.accept().await.unwrap();
            let (reader, mut writer) = stream.into_split();
            let mut reader = BufReader::new(reader);
            say(&mut writer, GREETING).await;
            let hello = read_line(&mut reader).await.unwrap();
            assert_eq!(hello["execute"], "qmp_capabilities");
            say(&mut writer, &format!(r#"{{"return": {{}}, "id": {}}}"#, hello["id"])).await;
            tokio::spawn(serve(reader, writer));
        };
        let (qmp, ()) = tokio::join!(Qmp::connect(&path, LIMIT), accepted);
        (qmp.unwrap(), dir)
    }

    async fn say(writer: &mut OwnedWriteHalf, line: &str) {
        writer.write_all(format!("{line}\r\n").as_bytes()).await.unwrap();
    }

    #[tokio::test]
    async fn answers_find_their_calls_whatever_comes_between() {
        let (qmp, _dir) = fake(async |mut reader, mut writer| {
            let first = read_line(&mut reader).await.unwrap();
            let second = read_line(&mut reader).await.unwrap();
            let event = r#"{"event": "STOP", "timestamp": {"seconds": 2, "microseconds": 5}}"#;
            say(&mut writer, event).await;
            say(&mut writer, &format!(r#"{{"return": "two", "id": {}}}"#, second["id"])).await;
            let failed = r#"{"class": "DeviceNotFound", "desc": "no x"}"#;
            say(&mut writer, &format!(r#"{{"error": {failed}, "id": {}}}"#, first["id"])).await;
        })
        .await;
        assert_eq!(qmp.version(), Version { major: 10, minor: 0, micro: 2 });
        let mut events = qmp.events();
        let first = async { qmp.execute::<Value>("one", json!({ "id": "x" })).await };
        let (first, second) = tokio::join!(first, qmp.execute::<String>("two", json!({})));
        let error = first.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NotFound);
        assert!(error.to_string().contains("no x"), "{error}");
        assert_eq!(second.unwrap(), "two");
        let event = events.wait(|event| event.name == "STOP", LIMIT).await.unwrap();
        assert_eq!(event.time_us, 2_000_005);
    }

    #[tokio::test]
    async fn a_call_has_a_limit_and_its_late_answer_disturbs_nobody() {
        let (qmp, _dir) = fake(async |mut reader, mut writer| {
            let first = read_line(&mut reader).await.unwrap();
            let second = read_line(&mut reader).await.unwrap();
            say(&mut writer, &format!(r#"{{"return": 1, "id": {}}}"#, first["id"])).await;
            say(&mut writer, &format!(r#"{{"return": 2, "id": {}}}"#, second["id"])).await;
            let _ = read_line(&mut reader).await;
        })
        .await;
        let slow = qmp.execute_within::<u32>("slow", json!({}), Duration::from_millis(20)).await;
        assert_eq!(slow.unwrap_err().kind(), ErrorKind::TimedOut);
        assert_eq!(qmp.execute::<u32>("quick", json!({})).await.unwrap(), 2);
    }

    #[tokio::test]
    async fn a_qemu_that_is_gone_fails_waiting_and_later_calls_and_events() {
        let (qmp, _dir) = fake(async |mut reader, writer| {
            let _ = read_line(&mut reader).await;
            drop(writer);
        })
        .await;
        let mut events = qmp.events();
        for _ in 0..2 {
            let error = qmp.execute::<Value>("query-status", json!({})).await.unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Unavailable, "{error}");
        }
        assert!(qmp.is_closed());
        assert_eq!(events.next().await.unwrap_err().kind(), ErrorKind::Unavailable);
        assert_eq!(qmp.events().next().await.unwrap_err().kind(), ErrorKind::Unavailable);
    }

    #[tokio::test]
    async fn lost_events_are_told() {
        let (qmp, _dir) = fake(async |mut reader, mut writer| {
            let call = read_line(&mut reader).await.unwrap();
            for _ in 0..EVENTS_MAX + 10 {
                say(&mut writer, r#"{"event": "X"}"#).await;
            }
            say(&mut writer, &format!(r#"{{"return": 1, "id": {}}}"#, call["id"])).await;
            let _ = read_line(&mut reader).await;
        })
        .await;
        let mut events = qmp.events();
        qmp.execute::<u32>("x", json!({})).await.unwrap();
        assert_eq!(events.next().await.unwrap_err().kind(), ErrorKind::Unknown);
        assert_eq!(events.next().await.unwrap().name, "X");
    }

    #[tokio::test]
    async fn what_is_not_qmp_is_said_to_be_not_qmp() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.sock");
        assert_eq!(Qmp::connect(&path, LIMIT).await.unwrap_err().kind(), ErrorKind::NotFound);
        let listener = tokio::net::UnixListener::bind(&path).unwrap();
        let serve = async {
            let (stream, _) = listener.accept().await.unwrap();
            let (_reader, mut writer) = stream.into_split();
            say(&mut writer, "SSH-2.0").await;
        };
        let (result, ()) = tokio::join!(Qmp::connect(&path, LIMIT), serve);
        assert_eq!(result.unwrap_err().kind(), ErrorKind::InvalidInput);
        let silent = Qmp::connect(&path, Duration::from_millis(20)).await.unwrap_err();
        assert_eq!(silent.kind(), ErrorKind::TimedOut);
    }
}

#[cfg(test)]
mod fuzz {
    use super::*;
    use std::io::Write as _;
    use std::sync::OnceLock;

    const GREETING: &[u8] =
        b"{\"QMP\": {\"version\": {\"qemu\": {\"micro\": 2, \"minor\": 0, \"major\": 10}}, \"capabilities\": []}}\n";

    /// A QEMU that says `said` and goes away.
    fn talk_to(said: &[u8]) {
        static DIR: OnceLock<tempfile::TempDir> = OnceLock::new();
        let path = DIR.get_or_init(|| tempfile::tempdir().expect("make a directory")).path().join("qmp.sock");
        let _ = std::fs::remove_file(&path);
        let listener = std::os::unix::net::UnixListener::bind(&path).expect("listen");
        let said = said.to_vec();
        let qemu = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().expect("accept");
            let _ = stream.write_all(&said);
            let _ = stream.shutdown(std::net::Shutdown::Write);
            // Read to the end, so that the other side sees our words before a reset.
            let _ = io::copy(&mut stream, &mut io::sink());
        });
        let runtime =
            tokio::runtime::Builder::new_current_thread().enable_all().build().expect("make a runtime");
        runtime.block_on(async {
            let limit = Duration::from_secs(2);
            let Ok(qmp) = Qmp::connect(&path, limit).await else { return };
            let _: Result<Value> = qmp.execute_within("query-status", json!({}), limit).await;
        });
        drop(runtime);
        qemu.join().expect("the other side ends");
    }

    whimbrel_fuzz::fuzz! {
        /// Everything that comes out of a QMP socket.
        fn replies(bytes) seeds [
            b"{\"return\": {}, \"id\": 1}\n{\"return\": {\"status\": \"running\"}, \"id\": 2}\n",
            b"{\"event\": \"STOP\", \"timestamp\": {\"seconds\": 1, \"microseconds\": 2}, \"data\": {}}\n",
            b"{\"error\": {\"class\": \"GenericError\", \"desc\": \"no\"}, \"id\": 1}\n",
        ] {
            talk_to(bytes);
            talk_to(&[GREETING, bytes].concat());
        }
    }
}
