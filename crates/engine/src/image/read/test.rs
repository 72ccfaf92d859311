//! Scripts of random events against a naive account of what should be true, and small swarms of whole machines.

use super::*;
use crate::image::fill::Fill;
use proptest::prelude::*;
use std::collections::HashMap;

const BLOCKS: u64 = 24;
const IMAGE: ImageId = ImageId([9; 32]);

fn host(n: usize) -> HostId {
    format!("h{n}").parse().unwrap()
}

fn ms(n: u64) -> Time {
    Time(n * 1_000_000)
}

fn quick() -> Config {
    Config { join_ms: 0, ..Config::default() }
}

fn want(block: u64, waiter: Waiter) -> Event {
    Event::Want { block, waiter, class: Class::Demand, local: false, for_peer: false }
}

fn asks(actions: &[Action]) -> Vec<(RequestId, Source)> {
    let ask = |action: &Action| match action {
        Action::Ask { request, source, .. } => Some((*request, source.clone())),
        _ => None,
    };
    actions.iter().filter_map(ask).collect()
}

fn step(reads: &mut Reads, now: Time, event: Event) -> Vec<Action> {
    let mut actions = Vec::new();
    reads.step(now, event, &mut actions);
    actions
}

/// One waiter's block, driven by hand: `outcomes` answer the questions in order; which sources were asked.
fn driven(reads: &mut Reads, local: bool, outcomes: &[Outcome]) -> (Vec<Source>, Vec<Action>) {
    let event = Event::Want { block: 1, waiter: 1, class: Class::Demand, local, for_peer: false };
    let mut all = step(reads, ms(1), event);
    let mut sources = Vec::new();
    for outcome in outcomes {
        let Some((request, source)) = asks(&all).pop() else { break };
        sources.push(source);
        all = step(reads, ms(2), Event::Arrived { request, outcome: *outcome });
    }
    (sources, all)
}

fn with_holders(n: usize) -> Reads {
    let mut reads = Reads::new(quick(), IMAGE, host(0), BLOCKS, ms(0));
    for peer in 1..=n {
        let mut has = Bitmap::new(BLOCKS);
        has.insert(1);
        step(&mut reads, ms(0), Event::Hello { host: host(peer), has });
    }
    reads
}

#[test]
fn cache_then_peer_then_seed() {
    use Outcome::*;
    let mut reads = with_holders(1);
    let (sources, end) = driven(&mut reads, true, &[Verified]);
    assert_eq!(sources, [Source::Cache]);
    assert!(matches!(&end[..], [Action::Deliver { keep: false, .. }]));

    let (sources, end) = driven(&mut with_holders(1), true, &[WrongHash, Verified]);
    assert_eq!(sources, [Source::Cache, Source::Peer(host(1))]);
    assert!(matches!(&end[..], [Action::Deliver { keep: true, .. }]));

    let (sources, end) = driven(&mut with_holders(2), false, &[NotHave, Failed, Verified]);
    assert_eq!(sources.len(), 3);
    assert!(matches!(sources[..], [Source::Peer(_), Source::Peer(_), ..]), "{sources:?}");
    assert!(matches!(&end[..], [Action::Deliver { keep: true, .. }]));

    let mut alone = Reads::new(quick(), IMAGE, host(0), BLOCKS, ms(0));
    assert_eq!(driven(&mut alone, false, &[Verified]).0, [Source::Seed]);
}

#[test]
fn a_liar_is_named_and_never_asked_again() {
    let mut reads = with_holders(1);
    let (sources, end) = driven(&mut reads, false, &[Outcome::WrongHash]);
    assert_eq!(sources, [Source::Peer(host(1))]);
    assert!(end.contains(&Action::Report(Report::Liar { host: host(1), block: 1 })));
    assert_eq!(asks(&end)[0].1, Source::Seed, "the read goes on");
    step(&mut reads, ms(3), Event::Left { host: host(1) });
    step(
        &mut reads,
        ms(3),
        Event::Hello { host: host(1), has: Bitmap::from_bytes(BLOCKS, &[0xff; 3]).unwrap() },
    );
    let again = step(&mut reads, ms(4), want(2, 7));
    assert_eq!(asks(&again)[0].1, Source::Seed, "coming back does not clear its name");
}

#[test]
fn without_the_seed_a_read_fails_only_if_no_peer_has_the_block() {
    let mut reads = with_holders(1);
    // The peer times out once, the seed is down: the peer is asked again before giving up.
    let mut all = step(&mut reads, ms(1), want(1, 1));
    let (first, _) = asks(&all).pop().unwrap();
    all = step(&mut reads, ms(2), Event::Arrived { request: first, outcome: Outcome::Failed });
    let (seed, source) = asks(&all).pop().unwrap();
    assert_eq!(source, Source::Seed);
    all = step(&mut reads, ms(3), Event::Arrived { request: seed, outcome: Outcome::Failed });
    let (again, source) = asks(&all).pop().unwrap();
    assert_eq!(source, Source::Peer(host(1)));
    all = step(&mut reads, ms(4), Event::Arrived { request: again, outcome: Outcome::Failed });
    assert_eq!(all, [Action::Fail { block: 1, waiters: vec![1], why: Why::Unreachable }]);

    let mut alone = Reads::new(quick(), IMAGE, host(0), BLOCKS, ms(0));
    let (_, end) = driven(&mut alone, false, &[Outcome::WrongHash]);
    assert!(end.contains(&Action::Fail { block: 1, waiters: vec![1], why: Why::Corrupt }));
}

#[test]
fn a_deadline_moves_on_and_the_late_answer_still_counts() {
    let mut reads = with_holders(2);
    let (slow, _) = asks(&step(&mut reads, ms(1), want(1, 1))).pop().unwrap();
    let wake = reads.next_wake().unwrap();
    assert_eq!(wake, ms(1).plus_ms(quick().peer_ms));
    let (second, source) = asks(&step(&mut reads, wake, Event::Tick)).pop().unwrap();
    assert!(matches!(source, Source::Peer(_)));
    let end = step(&mut reads, wake, Event::Arrived { request: slow, outcome: Outcome::Verified });
    assert!(end.contains(&Action::Cancel { request: second }));
    assert!(end.iter().any(|action| matches!(action, Action::Deliver { request, .. } if *request == slow)));
    assert_eq!(reads.next_wake(), None);
}

#[test]
fn peers_blocks_are_kept_after_the_set_number_of_fetches() {
    let config = Config { keep_after_peer_fetches: 3, ..quick() };
    let mut reads = Reads::new(config, IMAGE, host(0), BLOCKS, ms(0));
    let mut has = Bitmap::new(BLOCKS);
    has.insert(1);
    step(&mut reads, ms(0), Event::Hello { host: host(1), has });
    let kept: Vec<bool> = (0..4)
        .map(|_| match driven(&mut reads, false, &[Outcome::Verified]).1[..] {
            [Action::Deliver { keep, .. }] => keep,
            ref other => panic!("{other:?}"),
        })
        .collect();
    assert_eq!(kept, [false, false, true, true]);
}

#[test]
fn a_fill_waits_for_demand_and_is_promoted_by_it() {
    let mut reads = Reads::new(Config { fill_parallel: 2, ..quick() }, IMAGE, host(0), BLOCKS, ms(0));
    let fill =
        |block| Event::Want { block, waiter: block, class: Class::Fill, local: false, for_peer: false };
    assert_eq!(asks(&step(&mut reads, ms(1), want(0, 100))).len(), 1);
    assert_eq!(asks(&step(&mut reads, ms(1), fill(1))).len(), 1);
    assert_eq!(asks(&step(&mut reads, ms(1), fill(2))).len(), 0, "one beside demand");
    assert_eq!(asks(&step(&mut reads, ms(1), want(2, 101))).len(), 1, "demand starts the queued fill");
}

#[test]
fn the_first_reads_wait_to_learn_who_else_is_there() {
    let mut reads = Reads::new(Config::default(), IMAGE, host(0), BLOCKS, ms(0));
    assert!(step(&mut reads, ms(1), want(1, 1)).is_empty());
    let local = Event::Want { block: 2, waiter: 2, class: Class::Demand, local: true, for_peer: false };
    assert_eq!(asks(&step(&mut reads, ms(1), local))[0].1, Source::Cache, "the cache need not wait");
    let mut other = reads.clone();
    assert_eq!(asks(&step(&mut reads, ms(2), Event::Joined))[0].1, Source::Seed);
    let wake = other.next_wake().unwrap();
    assert_eq!(asks(&step(&mut other, wake, Event::Tick))[0].1, Source::Seed, "but not for ever");
}

/// What a scripted peer does when asked.
#[derive(Clone, Copy, Debug)]
enum Manner {
    Honest,
    Liar,
    Forgetful,
    Busy,
    Silent,
    Down,
}

#[derive(Clone, Debug)]
enum Op {
    Want { block: u64, fill: bool, local: bool, for_peer: bool },
    Answer { which: usize },
    Pass { by_ms: u64 },
    Hello { peer: usize, bits: u32 },
    Leave { peer: usize },
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        4 => (0..BLOCKS, any::<bool>(), prop::bool::weighted(0.2), prop::bool::weighted(0.2))
            .prop_map(|(block, fill, local, for_peer)| Op::Want { block, fill, local, for_peer }),
        6 => (0..64usize).prop_map(|which| Op::Answer { which }),
        3 => (1..3000u64).prop_map(|by_ms| Op::Pass { by_ms }),
        2 => (1..6usize, 0..1u32 << BLOCKS).prop_map(|(peer, bits)| Op::Hello { peer, bits }),
        1 => (1..6usize).prop_map(|peer| Op::Leave { peer }),
    ]
}

fn manner() -> impl Strategy<Value = Manner> {
    prop_oneof![
        4 => Just(Manner::Honest),
        1 => Just(Manner::Liar),
        1 => Just(Manner::Forgetful),
        1 => Just(Manner::Busy),
        1 => Just(Manner::Silent),
        1 => Just(Manner::Down),
    ]
}

/// The naive account: plain sets, no cleverness.
#[derive(Default)]
struct Oracle {
    now_ms: u64,
    waiting: HashMap<Waiter, u64>,
    open: HashMap<RequestId, (u64, Source)>,
    has: HashMap<HostId, BTreeSet<u64>>,
    liars: BTreeSet<HostId>,
    /// Hosts that failed, or were slow, or busy, or asked already: any excuse for not asking them, per block.
    excuse: BTreeSet<(u64, HostId)>,
    troubled: BTreeSet<HostId>,
    asked_cache: BTreeSet<u64>,
}

impl Oracle {
    fn check(&mut self, actions: &[Action]) {
        for action in actions {
            match action {
                Action::Ask { request, block, source, .. } => self.asked(*request, *block, source),
                Action::Cancel { request } => {
                    assert!(self.open.remove(request).is_some(), "cancelled what was not asked");
                }
                Action::Deliver { block, waiters, source, keep, .. } => {
                    assert!(!keep || *source != Source::Cache);
                    assert!(*keep || *source != Source::Seed, "what comes from the seed is kept");
                    self.answered(*block, waiters);
                }
                Action::Fail { block, waiters, .. } => self.answered(*block, waiters),
                Action::Report(Report::Liar { host, .. }) => {
                    self.liars.insert(host.clone());
                }
                _ => {}
            }
        }
    }

    fn answered(&mut self, block: u64, waiters: &[Waiter]) {
        for waiter in waiters {
            assert_eq!(self.waiting.remove(waiter), Some(block), "each waiter is answered once");
        }
        assert!(!self.waiting.values().any(|other| *other == block), "all of a block at once");
        assert!(!self.open.values().any(|(other, _)| *other == block), "nothing is left asked");
        self.excuse.retain(|(other, _)| *other != block);
    }

    fn asked(&mut self, request: RequestId, block: u64, source: &Source) {
        assert!(self.waiting.values().any(|wanted| *wanted == block), "nobody wants block {block}");
        match source {
            Source::Peer(host) | Source::Home(host) => {
                assert!(!self.liars.contains(host), "{host} is quarantined");
                assert!(self.has.contains_key(host), "{host} is not there");
                self.excuse.insert((block, host.clone()));
            }
            Source::Seed => {
                for (host, has) in &self.has {
                    let excused = self.excuse.contains(&(block, host.clone()))
                        || self.troubled.contains(host)
                        || self.liars.contains(host);
                    assert!(excused || !has.contains(&block), "seed asked though {host} has block {block}");
                }
            }
            Source::Cache => {}
        }
        self.open.insert(request, (block, source.clone()));
    }
}

fn outcome(manner: Manner) -> Option<Outcome> {
    match manner {
        Manner::Honest => Some(Outcome::Verified),
        Manner::Liar => Some(Outcome::WrongHash),
        Manner::Forgetful => Some(Outcome::NotHave),
        Manner::Busy => Some(Outcome::Busy),
        Manner::Silent => None,
        Manner::Down => Some(Outcome::Failed),
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 600, ..ProptestConfig::default() })]

    #[test]
    fn random_scripts_agree_with_the_naive_account(
        script in prop::collection::vec(op(), 1..120),
        manners in prop::collection::vec(manner(), 6),
        seed_works in prop::bool::weighted(0.7),
    ) {
        let config = Config { demand_parallel: 4, fill_parallel: 2, ..quick() };
        let mut reads = Reads::new(config, IMAGE, host(0), BLOCKS, ms(0));
        let mut oracle = Oracle::default();
        let mut waiter = 0;
        for op in script {
            let event = match op {
                Op::Want { block, fill, local, for_peer } => {
                    waiter += 1;
                    oracle.waiting.insert(waiter, block);
                    let class = if fill { Class::Fill } else { Class::Demand };
                    Event::Want { block, waiter, class, local, for_peer }
                }
                Op::Answer { which } => {
                    let Some(id) = nth(&oracle.open, which) else { continue };
                    match answer(&mut oracle, id, &manners, seed_works) {
                        Some(event) => event,
                        None => continue,
                    }
                }
                Op::Pass { by_ms } => {
                    oracle.now_ms += by_ms;
                    // Whatever is open may be late now.
                    let late: Vec<_> = oracle.open.values().filter_map(|(_, s)| peer_of(s)).collect();
                    oracle.troubled.extend(late);
                    Event::Tick
                }
                Op::Hello { peer, bits } => {
                    let has = Bitmap::from_bytes(BLOCKS, &bits.to_le_bytes()[..3]).unwrap();
                    oracle.troubled.remove(&host(peer));
                    oracle.has.insert(host(peer), has.iter().collect());
                    Event::Hello { host: host(peer), has }
                }
                Op::Leave { peer } => {
                    oracle.has.remove(&host(peer));
                    Event::Left { host: host(peer) }
                }
            };
            let actions = step(&mut reads, ms(oracle.now_ms), event);
            oracle.check(&actions);
        }
        // Time alone ends everything.
        for _ in 0..10_000 {
            let Some(at) = reads.next_wake() else { break };
            oracle.now_ms = oracle.now_ms.max(at.0.div_ceil(1_000_000));
            let late: Vec<_> = oracle.open.values().filter_map(|(_, s)| peer_of(s)).collect();
            oracle.troubled.extend(late);
            let actions = step(&mut reads, ms(oracle.now_ms), Event::Tick);
            oracle.check(&actions);
        }
        prop_assert!(oracle.waiting.is_empty(), "left waiting: {:?}", oracle.waiting);
        prop_assert_eq!(reads.next_wake(), None);
        prop_assert!(reads.flights.is_empty() && reads.requests.is_empty() && reads.asking == [0, 0]);
    }

    #[test]
    fn hosts_that_boot_at_once_read_the_seed_once_per_block(
        hosts in 2..9usize,
        orders in prop::collection::vec(any::<u64>(), 8),
        fill in any::<bool>(),
    ) {
        let seed_reads = swarm_run(hosts, &orders, fill);
        prop_assert_eq!(seed_reads.len() as u64, BLOCKS, "every block was read");
        for (block, times) in seed_reads {
            prop_assert_eq!(times, 1, "block {}", block);
        }
    }
}

fn peer_of(source: &Source) -> Option<HostId> {
    match source {
        Source::Peer(host) | Source::Home(host) => Some(host.clone()),
        _ => None,
    }
}

fn nth(open: &HashMap<RequestId, (u64, Source)>, which: usize) -> Option<RequestId> {
    let mut ids: Vec<_> = open.keys().copied().collect();
    ids.sort_unstable();
    (!ids.is_empty()).then(|| ids[which % ids.len()])
}

fn answer(oracle: &mut Oracle, id: RequestId, manners: &[Manner], seed_works: bool) -> Option<Event> {
    let (block, source) = oracle.open[&id].clone();
    let outcome = match &source {
        Source::Cache if !oracle.asked_cache.insert(block) => Outcome::Verified,
        Source::Cache => Outcome::WrongHash,
        Source::Seed if seed_works => Outcome::Verified,
        Source::Seed => Outcome::Failed,
        Source::Peer(host) | Source::Home(host) => {
            let index: usize = host.as_str()[1..].parse().unwrap();
            let outcome = outcome(manners[index])?;
            if outcome != Outcome::Verified {
                oracle.troubled.insert(host.clone());
            }
            outcome
        }
    };
    oracle.open.remove(&id);
    Some(Event::Arrived { request: id, outcome })
}

/// Whole machines that talk to each other with a delay; all read (or fill) the whole image at once. How often each
/// block was read from the seed.
fn swarm_run(hosts: usize, orders: &[u64], fill: bool) -> BTreeMap<u64, u32> {
    let mut machines: Vec<Reads> =
        (0..hosts).map(|me| Reads::new(quick(), IMAGE, host(me), BLOCKS, ms(0))).collect();
    let mut cache = vec![BTreeSet::new(); hosts];
    let mut inbox: BTreeMap<(u64, u64), (usize, Event)> = BTreeMap::new();
    let mut seed_reads = BTreeMap::new();
    // Who waits at a home: (home, waiter) → (asker, its request).
    let mut remote: HashMap<(usize, Waiter), (usize, RequestId)> = HashMap::new();
    let (mut now, mut n) = (0, 0);
    for (me, machine) in machines.iter_mut().enumerate() {
        for other in (0..hosts).filter(|other| *other != me) {
            step(machine, ms(0), Event::Hello { host: host(other), has: Bitmap::new(BLOCKS) });
        }
        let mut blocks: Vec<u64> = (0..BLOCKS).collect();
        if fill {
            let mut order = Fill::new(&IMAGE, &host(me), BLOCKS);
            let mut left: BTreeSet<u64> = (0..BLOCKS).collect();
            blocks.clear();
            while let Some(block) = order.next(machine.swarm(), ms(0), |block| left.contains(&block)) {
                left.remove(&block);
                blocks.push(block);
            }
        } else {
            blocks.rotate_left((orders[me % orders.len()] % BLOCKS) as usize);
        }
        for block in blocks {
            n += 1;
            inbox.insert((0, n), (me, want(block, n)));
        }
    }
    while let Some(((at, _), (me, event))) = inbox.pop_first() {
        now = now.max(at);
        let event = match event {
            Event::Want { block, waiter, class, for_peer, .. } => {
                Event::Want { block, waiter, class, for_peer, local: cache[me].contains(&block) }
            }
            other => other,
        };
        let kept = if let Event::Kept { block } = &event { cache[me].insert(*block) } else { false };
        assert!(!kept || cache[me].len() as u64 <= BLOCKS);
        for action in step(&mut machines[me], ms(now), event) {
            n += 1;
            match action {
                Action::Ask { request, block, source, .. } => match source {
                    Source::Cache => {
                        inbox.insert((now, n), (me, Event::Arrived { request, outcome: Outcome::Verified }));
                    }
                    Source::Seed => {
                        *seed_reads.entry(block).or_insert(0) += 1;
                        inbox.insert(
                            (now + 20, n),
                            (me, Event::Arrived { request, outcome: Outcome::Verified }),
                        );
                    }
                    Source::Home(at) => {
                        let home: usize = at.as_str()[1..].parse().unwrap();
                        remote.insert((home, n), (me, request));
                        let class = Class::Demand;
                        let event = Event::Want { block, waiter: n, class, local: false, for_peer: true };
                        inbox.insert((now + 1, n), (home, event));
                    }
                    Source::Peer(at) => {
                        let peer: usize = at.as_str()[1..].parse().unwrap();
                        assert!(cache[peer].contains(&block), "advertised what it lacks");
                        inbox.insert(
                            (now + 2, n),
                            (me, Event::Arrived { request, outcome: Outcome::Verified }),
                        );
                    }
                },
                Action::Deliver { block, keep, waiters, .. } => {
                    if keep {
                        inbox.insert((now, n), (me, Event::Kept { block }));
                    }
                    for waiter in waiters {
                        if let Some((asker, request)) = remote.remove(&(me, waiter)) {
                            n += 1;
                            let event = Event::Arrived { request, outcome: Outcome::Verified };
                            inbox.insert((now + 1, n), (asker, event));
                        }
                    }
                }
                Action::Advertise { block } => {
                    for other in (0..hosts).filter(|other| *other != me) {
                        n += 1;
                        let here = vec![Run { first: block, count: 1 }];
                        inbox.insert(
                            (now + 50, n),
                            (other, Event::Changed { host: host(me), here, gone: vec![] }),
                        );
                    }
                }
                Action::Fail { .. } => panic!("nothing is broken"),
                _ => {}
            }
        }
    }
    assert!(cache.iter().all(|cache| cache.len() as u64 == BLOCKS));
    seed_reads
}
