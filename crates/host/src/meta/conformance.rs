//! What every metadata store does, checked against each back-end: SQLite shared by several agents, the same store
//! served over mutual TLS, and Debian's etcd over TLS.

mod rig;

use super::*;
use rig::{EtcdRig, Rig, ServedRig, SqliteRig};
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use tokio::time::timeout;

use crate::link::proxy::Mode;

const SOON: Duration = Duration::from_secs(20);

/// One test per check and back-end.
macro_rules! checks {
    ($($check:ident),* $(,)?) => {
        mod sqlite_file {
            $(#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $check() { super::$check(&mut super::SqliteRig::new().await).await; })*
        }
        mod served {
            $(#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $check() { super::$check(&mut super::ServedRig::new().await).await; })*
        }
        mod etcd_over_tls {
            $(#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $check() { super::$check(&mut super::EtcdRig::new().await).await; })*
        }
    };
}

checks!(
    each_epoch_is_won_by_exactly_one_of_many_writers,
    a_transaction_is_all_or_nothing,
    conditions_hold_or_nothing_changes,
    a_read_sees_one_revision_however_much_there_is,
    a_watch_tells_every_change_once_and_in_order,
    a_slow_watcher_delays_nobody_and_misses_nothing,
    a_compacted_revision_is_reported,
    a_transaction_is_made_once_under_its_name,
    a_lost_answer_is_unknown_and_can_be_found_out,
    after_an_outage_work_and_watches_go_on,
    limits_are_checked_before_anything_is_sent,
);

#[derive(Debug, PartialEq, Serialize, Deserialize)]
struct Counter {
    epoch: u64,
    holder: usize,
}

fn put(key: &str, value: impl Into<Vec<u8>>) -> Op {
    Op::Put(key.to_owned(), value.into())
}

fn absent(key: &str) -> Compare {
    Compare::Absent(key.to_owned())
}

async fn write(store: &dyn MetaStore, key: &str, value: impl Into<Vec<u8>>) -> u64 {
    match commit(store, vec![], vec![put(key, value)], SOON).await.unwrap() {
        Committed::Yes(rev) => rev,
        Committed::Conflict => panic!("a transaction without conditions"),
    }
}

async fn next(events: &mut mpsc::Receiver<WatchEvent>) -> WatchEvent {
    timeout(SOON, events.recv()).await.expect("an event in time").expect("the watch goes on")
}

async fn each_epoch_is_won_by_exactly_one_of_many_writers(rig: &mut dyn Rig) {
    const WRITERS: usize = 6;
    const EACH: u64 = 10;
    let watcher = rig.client().await;
    let start = watcher.read("r/").await.unwrap().rev;
    let mut events = watcher.watch("r/", start).await.unwrap();
    let mut writers = tokio::task::JoinSet::new();
    for holder in 0..WRITERS {
        let store = rig.client().await;
        writers.spawn(async move {
            let mut won = Vec::new();
            for _ in 0..EACH {
                let change = |old: Option<Counter>| {
                    Ok(Some(Counter { epoch: old.map_or(0, |it| it.epoch) + 1, holder }))
                };
                let now = update(&*store, "r/vm", SOON, change).await.unwrap().unwrap();
                won.push((now.epoch, holder));
            }
            won
        });
    }
    let mut won: Vec<_> = writers.join_all().await.into_iter().flatten().collect();
    won.sort_unstable();
    let epochs: Vec<_> = won.iter().map(|(epoch, _)| *epoch).collect();
    assert_eq!(epochs, (1..=WRITERS as u64 * EACH).collect::<Vec<_>>());
    let mut last = start;
    for (epoch, holder) in won {
        let WatchEvent::Put(item) = next(&mut events).await else { panic!("a put") };
        assert_eq!(parse::<Counter>("r/vm", &item.value).unwrap(), Counter { epoch, holder });
        assert!(item.mod_rev > last, "revisions rise");
        last = item.mod_rev;
    }
}

async fn a_transaction_is_all_or_nothing(rig: &mut dyn Rig) {
    let (writer, reader) = (rig.client().await, rig.client().await);
    write(&*writer, "pair/x", "0").await;
    let writing = tokio::spawn(async move {
        for round in 0..40 {
            let value = round.to_string();
            let ops = vec![put("pair/a", value.clone()), put("pair/b", value)];
            assert!(matches!(writer.txn(vec![], ops).await.unwrap(), Committed::Yes(_)));
            sleep(Duration::from_millis(5)).await;
        }
    });
    let mut seen = BTreeSet::new();
    while !writing.is_finished() {
        let items = reader.read("pair/").await.unwrap().items;
        if let [a, b, _] = &items[..] {
            assert_eq!((&a.value, a.mod_rev), (&b.value, b.mod_rev));
            seen.insert(a.mod_rev);
        }
    }
    writing.await.unwrap();
    assert!(seen.len() > 1, "{seen:?}");
    // One of two conditions fails: nothing is changed.
    let ops = vec![put("pair/a", "lost"), put("pair/c", "lost"), Op::Delete("pair/x".into())];
    let conditions = vec![absent("pair/c"), absent("pair/x")];
    assert_eq!(reader.txn(conditions, ops).await.unwrap(), Committed::Conflict);
    let items = reader.read("pair/").await.unwrap().items;
    let keys: Vec<_> = items.iter().map(|item| &item.key[..]).collect();
    assert_eq!(keys, ["pair/a", "pair/b", "pair/x"]);
    assert_eq!(items[0].value, b"39");
}

async fn conditions_hold_or_nothing_changes(rig: &mut dyn Rig) {
    let store = rig.client().await;
    assert_eq!(store.get("k").await.unwrap(), None);
    let Committed::Yes(first) = store.txn(vec![absent("k")], vec![put("k", "1")]).await.unwrap() else {
        panic!("the key is absent");
    };
    let item = store.get("k").await.unwrap().unwrap();
    assert_eq!((&item.value[..], item.mod_rev), (&b"1"[..], first));
    assert_eq!(store.txn(vec![absent("k")], vec![put("k", "2")]).await.unwrap(), Committed::Conflict);
    let unchanged = |rev| vec![Compare::Unchanged("k".into(), rev)];
    assert_eq!(store.txn(unchanged(first + 9), vec![put("k", "2")]).await.unwrap(), Committed::Conflict);
    let Committed::Yes(second) = store.txn(unchanged(first), vec![put("k", "2")]).await.unwrap() else {
        panic!("the key is unchanged");
    };
    assert!(second > first);
    assert_eq!(store.txn(unchanged(first), vec![put("k", "3")]).await.unwrap(), Committed::Conflict);
    assert_eq!(
        store.txn(vec![Compare::Unchanged("none".into(), first)], vec![]).await.unwrap(),
        Committed::Conflict
    );
    assert!(matches!(
        store.txn(unchanged(second), vec![Op::Delete("k".into())]).await.unwrap(),
        Committed::Yes(_)
    ));
    assert_eq!(store.get("k").await.unwrap(), None);
    // Removing what is not there is no conflict.
    assert!(matches!(store.txn(vec![], vec![Op::Delete("k".into())]).await.unwrap(), Committed::Yes(_)));
    assert!(matches!(store.txn(vec![absent("k")], vec![put("k", "")]).await.unwrap(), Committed::Yes(_)));
    assert_eq!(store.get("k").await.unwrap().unwrap().value, b"");
    // A prefix is a prefix.
    for key in ["a/1", "a/2", "a", "a0", "b/1"] {
        write(&*store, key, key).await;
    }
    let keys = |snapshot: Snapshot| snapshot.items.into_iter().map(|item| item.key).collect::<Vec<_>>();
    assert_eq!(keys(store.read("a/").await.unwrap()), ["a/1", "a/2"]);
    assert_eq!(keys(store.read("a").await.unwrap()), ["a", "a/1", "a/2", "a0"]);
    assert_eq!(keys(store.read("").await.unwrap()), ["a", "a/1", "a/2", "a0", "b/1", "k"]);
    assert!(store.read("c").await.unwrap().items.is_empty());
    assert!(store.answered_ms_ago() < 1_000);
}

async fn a_read_sees_one_revision_however_much_there_is(rig: &mut dyn Rig) {
    let store = rig.client().await;
    let value = vec![7; 200 << 10];
    for number in 0..50 {
        write(&*store, &format!("big/{number:03}"), value.clone()).await;
    }
    for chunk in 0..12 {
        let ops = (0..100).map(|number| put(&format!("many/{:04}", chunk * 100 + number), "x")).collect();
        commit(&*store, vec![], ops, SOON).await.unwrap();
    }
    let big = store.read("big/").await.unwrap();
    assert_eq!(big.items.len(), 50);
    assert!(big.items.iter().all(|item| item.value == value && item.mod_rev <= big.rev));
    let many = store.read("many/").await.unwrap();
    assert_eq!(many.items.len(), 1_200);
    assert!(many.items.is_sorted_by(|a, b| a.key < b.key));
}

async fn a_watch_tells_every_change_once_and_in_order(rig: &mut dyn Rig) {
    let (watcher, other) = (rig.client().await, rig.client().await);
    let before = write(&*other, "w/0", "before").await;
    let mut events = watcher.watch("w/", before).await.unwrap();
    let mut wanted = Vec::new();
    for round in 1..=30u64 {
        let ops = vec![
            put("w/a", round.to_string()),
            put("elsewhere", "x"),
            put("w/b", round.to_string()),
            Op::Delete("w/never".into()),
        ];
        let Committed::Yes(rev) = other.txn(vec![], ops).await.unwrap() else { panic!("no conditions") };
        wanted.push(("w/a", round.to_string(), rev));
        wanted.push(("w/b", round.to_string(), rev));
    }
    let told = async |events: &mut mpsc::Receiver<WatchEvent>| {
        for (key, value, rev) in &wanted {
            let item = Item { key: (*key).into(), value: value.clone().into(), mod_rev: *rev };
            assert_eq!(next(events).await, WatchEvent::Put(item));
        }
    };
    told(&mut events).await;
    let Committed::Yes(rev) = other.txn(vec![], vec![Op::Delete("w/a".into())]).await.unwrap() else {
        panic!("no conditions")
    };
    assert_eq!(next(&mut events).await, WatchEvent::Deleted("w/a".into(), rev));
    // From the middle of the past, and by another client.
    let mut past = other.watch("w/", before).await.unwrap();
    told(&mut past).await;
    // Nothing more, and the store keeps answering a process that only watches.
    assert!(timeout(Duration::from_millis(2_500), events.recv()).await.is_err());
    assert!(watcher.answered_ms_ago() < 1_500, "{}", watcher.answered_ms_ago());
}

async fn a_slow_watcher_delays_nobody_and_misses_nothing(rig: &mut dyn Rig) {
    let store = rig.client().await;
    let rev = store.read("").await.unwrap().rev;
    let mut slow = store.watch("s/", rev).await.unwrap();
    let mut quick = store.watch("s/", rev).await.unwrap();
    const ROUNDS: usize = 30;
    for round in 0..ROUNDS {
        let ops = (0..100).map(|number| put(&format!("s/{number:03}"), format!("{round}"))).collect();
        commit(&*store, vec![], ops, SOON).await.unwrap();
    }
    for events in [&mut quick, &mut slow] {
        for round in 0..ROUNDS {
            for number in 0..100 {
                let WatchEvent::Put(item) = next(events).await else { panic!("a put") };
                assert_eq!(
                    (item.key, item.value),
                    (format!("s/{number:03}"), format!("{round}").into_bytes())
                );
            }
        }
    }
}

async fn a_compacted_revision_is_reported(rig: &mut dyn Rig) {
    let store = rig.client().await;
    let old = write(&*store, "c/1", "1").await;
    write(&*store, "c/2", "1").await;
    write(&*store, "c/2", "2").await;
    rig.compact(&*store).await;
    let mut events = store.watch("c/", old).await.unwrap();
    assert_eq!(next(&mut events).await, WatchEvent::Compacted);
    assert_eq!(timeout(SOON, events.recv()).await.unwrap(), None, "the watch is over");
    let now = store.read("c/").await.unwrap();
    assert_eq!(now.items.len(), 2);
    let mut events = store.watch("c/", now.rev).await.unwrap();
    write(&*store, "c/3", "3").await;
    assert!(matches!(next(&mut events).await, WatchEvent::Put(item) if item.key == "c/3"));
    // A revision that this store never had: it is another store.
    let mut events = store.watch("c/", now.rev + 1_000_000).await.unwrap();
    assert_eq!(next(&mut events).await, WatchEvent::Compacted);
}

async fn a_transaction_is_made_once_under_its_name(rig: &mut dyn Rig) {
    let (a, b) = (rig.client().await, rig.client().await);
    let id = TxnId::random();
    let Committed::Yes(rev) = a.txn_as(id, vec![], vec![put("o/1", "1")]).await.unwrap() else {
        panic!("no conditions")
    };
    write(&*b, "o/1", "2").await;
    assert_eq!(b.txn_as(id, vec![], vec![put("o/1", "1")]).await.unwrap(), Committed::Yes(rev));
    assert_eq!(a.get("o/1").await.unwrap().unwrap().value, b"2", "not made twice");
    assert_eq!(b.resolve(id).await.unwrap(), Some(rev));
    // Given up before it came: it never happens.
    let id = TxnId::random();
    assert_eq!(a.resolve(id).await.unwrap(), None);
    let late = b.txn_as(id, vec![], vec![put("o/2", "late")]).await.unwrap_err();
    assert_eq!(late.kind(), ErrorKind::Cancelled, "{late}");
    assert_eq!(a.get("o/2").await.unwrap(), None);
    assert_eq!(b.resolve(id).await.unwrap(), None);
    // A conflict is no outcome: the same name may be tried again.
    let id = TxnId::random();
    assert_eq!(a.txn_as(id, vec![absent("o/1")], vec![put("o/3", "x")]).await.unwrap(), Committed::Conflict);
    assert_eq!(a.resolve(id).await.unwrap(), None);
}

async fn a_lost_answer_is_unknown_and_can_be_found_out(rig: &mut dyn Rig) {
    let store = rig.client().await;
    write(&*store, "u/0", "0").await;
    if !rig.lose(Mode::LoseAnswers) {
        // A file has no wire that could lose an answer.
        return;
    }
    let id = TxnId::random();
    let lost = store.txn_as(id, vec![absent("u/1")], vec![put("u/1", "made")]).await.unwrap_err();
    assert_eq!(lost.kind(), ErrorKind::Unknown, "{lost}");
    rig.lose(Mode::Pass);
    let found = eventually(async || store.resolve(id).await.ok()).await;
    let item = store.get("u/1").await.unwrap().unwrap();
    assert_eq!((found, &item.value[..]), (Some(item.mod_rev), &b"made"[..]));
    // The request itself is lost: just as unknown, and found out not to have been made.
    write(&*store, "u/0", "1").await;
    rig.lose(Mode::LoseRequests);
    let id = TxnId::random();
    let lost = store.txn_as(id, vec![], vec![put("u/2", "never")]).await.unwrap_err();
    assert_eq!(lost.kind(), ErrorKind::Unknown, "{lost}");
    rig.lose(Mode::Pass);
    assert_eq!(eventually(async || store.resolve(id).await.ok()).await, None);
    assert_eq!(store.get("u/2").await.unwrap(), None);
    // And `commit` does all that by itself, in both cases making the change exactly once.
    for (mode, key) in [(Mode::LoseAnswers, "u/3"), (Mode::LoseRequests, "u/4")] {
        write(&*store, "u/0", "2").await;
        rig.lose(mode);
        let again = store.clone();
        let committing = tokio::spawn(async move {
            commit(&*again, vec![Compare::Absent(key.into())], vec![put(key, "once")], SOON).await
        });
        sleep(Duration::from_millis(3_500)).await;
        rig.lose(Mode::Pass);
        let Committed::Yes(rev) = committing.await.unwrap().unwrap() else { panic!("{key} was absent") };
        assert_eq!(store.get(key).await.unwrap().unwrap().mod_rev, rev);
    }
}

/// Repeats until there is something, for ten seconds.
async fn eventually<T>(mut ask: impl AsyncFnMut() -> Option<T>) -> T {
    for _ in 0..100 {
        if let Some(found) = ask().await {
            return found;
        }
        sleep(Duration::from_millis(100)).await;
    }
    panic!("not within ten seconds");
}

async fn after_an_outage_work_and_watches_go_on(rig: &mut dyn Rig) {
    let (store, other) = (rig.client().await, rig.client().await);
    let mut rev = store.read("").await.unwrap().rev;
    let mut events = store.watch("x/", rev).await.unwrap();
    for round in 0..3u64 {
        for number in 0..20 {
            write(&*other, "x/1", format!("{round} {number} before")).await;
        }
        rig.stop().await;
        let begun = Instant::now();
        let failed = store.txn(vec![], vec![put("x/lost", "x")]).await.unwrap_err();
        assert!(matches!(failed.kind(), ErrorKind::Unavailable | ErrorKind::Unknown), "{failed}");
        if rig.is_remote() {
            let failed = store.read("x/").await.unwrap_err();
            assert_eq!(failed.kind(), ErrorKind::Unavailable, "{failed}");
            sleep(Duration::from_millis(1_200)).await;
            assert!(store.answered_ms_ago() >= 1_000, "{}", store.answered_ms_ago());
        }
        assert!(begun.elapsed() < Duration::from_secs(9), "failing takes {:?}", begun.elapsed());
        rig.start().await;
        eventually(async || store.get("x/1").await.ok()).await;
        for number in 0..20 {
            write(&*other, "x/1", format!("{round} {number} after")).await;
        }
        for half in ["before", "after"] {
            for number in 0..20 {
                let event = loop {
                    match next(&mut events).await {
                        // A transaction that failed with Unknown may have been made.
                        WatchEvent::Put(item) if item.key == "x/lost" => {}
                        other => break other,
                    }
                };
                let WatchEvent::Put(item) = event else { panic!("a put, not {event:?}") };
                assert_eq!(String::from_utf8_lossy(&item.value), format!("{round} {number} {half}"));
                assert!(item.mod_rev > rev);
                rev = item.mod_rev;
            }
        }
    }
}

async fn limits_are_checked_before_anything_is_sent(rig: &mut dyn Rig) {
    let store = rig.client().await;
    let many = (0..=TXN_PARTS_MAX).map(|number| put(&format!("l/{number}"), "x")).collect();
    for ops in [
        vec![put("", "x")],
        vec![put("l/1", "1"), put("l/1", "2")],
        vec![put("l/1", "1"), Op::Delete("l/1".into())],
        vec![put(&"k".repeat(KEY_BYTES_MAX + 1), "x")],
        vec![put("l/1", vec![0; TXN_BYTES_MAX])],
        many,
    ] {
        assert_eq!(store.txn(vec![], ops).await.unwrap_err().kind(), ErrorKind::InvalidInput);
    }
    let most = (0..TXN_PARTS_MAX).map(|number| put(&format!("l/{number}"), "x")).collect();
    assert!(matches!(store.txn(vec![], most).await.unwrap(), Committed::Yes(_)));
    let long = vec![7; TXN_BYTES_MAX - 16];
    write(&*store, "l/long", long.clone()).await;
    assert_eq!(store.get("l/long").await.unwrap().unwrap().value, long);
}

#[tokio::test]
async fn fields_of_a_newer_release_survive_an_older_ones_change() {
    let dir = tempfile::tempdir().unwrap();
    let store = SqliteStore::open(&dir.path().join("meta.db")).unwrap();
    write(&*store, "r", r#"{"epoch":1,"mood":"good","holder":7}"#).await;
    let change = |old: Option<Counter>| Ok(old.map(|it| Counter { epoch: it.epoch + 1, ..it }));
    update(&*store, "r", SOON, change).await.unwrap();
    let value: serde_json::Value = parse("r", &store.get("r").await.unwrap().unwrap().value).unwrap();
    assert_eq!(value, serde_json::json!({ "epoch": 2, "holder": 7, "mood": "good" }));
    // A change that changes nothing writes nothing.
    let before = store.get("r").await.unwrap().unwrap().mod_rev;
    update(&*store, "r", SOON, |old: Option<Counter>| Ok(old)).await.unwrap();
    assert_eq!(store.get("r").await.unwrap().unwrap().mod_rev, before);
}

#[tokio::test]
async fn many_processes_may_open_one_file_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("meta.db");
    let opening: Vec<_> = (0..8)
        .map(|_| {
            let path = path.clone();
            std::thread::spawn(move || SqliteStore::open(&path))
        })
        .collect();
    let stores: Vec<Arc<_>> = opening.into_iter().map(|it| it.join().unwrap().unwrap()).collect();
    for (number, store) in stores.iter().enumerate() {
        write(&**store, &format!("p/{number}"), "x").await;
    }
    assert_eq!(stores[0].read("p/").await.unwrap().items.len(), 8);
}

#[tokio::test]
async fn another_agents_write_is_told_within_fifty_milliseconds() {
    let mut rig = SqliteRig::new().await;
    let (watcher, writer) = (rig.client().await, rig.client().await);
    let mut events = watcher.watch("", 0).await.unwrap();
    let mut slowest = Duration::ZERO;
    for number in 0..20 {
        write(&*writer, "k", number.to_string()).await;
        let begun = std::time::Instant::now();
        next(&mut events).await;
        slowest = slowest.max(begun.elapsed());
    }
    eprintln!("slowest notice of another process's write: {slowest:?}");
    // Twice the promise: the test's machine has other work.
    assert!(slowest < Duration::from_millis(100), "{slowest:?}");
    rig.stop().await;
}

#[tokio::test]
async fn a_damaged_or_newer_file_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let damaged = dir.path().join("damaged.db");
    std::fs::write(&damaged, vec![0x5a; 8192]).unwrap();
    let error = SqliteStore::open(&damaged).err().unwrap();
    assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
    // Damage that opening alone would not meet.
    let torn = dir.path().join("torn.db");
    drop(SqliteStore::open(&torn).unwrap());
    let connection = rusqlite::Connection::open(&torn).unwrap();
    connection.execute("INSERT INTO kv VALUES ('k', zeroblob(20000), 1)", []).unwrap();
    connection.query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |_| Ok(())).unwrap();
    drop(connection);
    let mut bytes = std::fs::read(&torn).unwrap();
    let pages = bytes.len() / 4096;
    bytes[2 * 4096..(pages - 5) * 4096].fill(0x5a);
    std::fs::write(&torn, bytes).unwrap();
    let error = SqliteStore::open(&torn).err().unwrap();
    assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
    let newer = dir.path().join("newer.db");
    drop(SqliteStore::open(&newer).unwrap());
    let connection = rusqlite::Connection::open(&newer).unwrap();
    connection.execute("UPDATE state SET format = 2", []).unwrap();
    let error = SqliteStore::open(&newer).err().unwrap();
    assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");
}
