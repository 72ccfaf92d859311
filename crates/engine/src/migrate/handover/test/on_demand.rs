//! Moves with `--disk on-demand`: what follows after the switch-over.

use super::*;

#[test]
fn without_faults_the_blocks_follow() {
    let world = run(&[], None, DiskMove::OnDemand).unwrap();
    assert_eq!((world.at_target, world.at_source), (Guest::Runs, Guest::Dead));
    assert!(!world.missing && !world.layer_at_source);
    let (volume, _) = world.volume.unwrap();
    assert_eq!((volume.right.holder, volume.right.epoch, volume.depends_on), (host("b"), Epoch(10), None));
    assert_eq!(world.source_outcome, Some(Outcome::Moved));
}

/// Goes on until the blocks are about to follow.
fn following() -> World {
    let mut world = World::new(None, DiskMove::OnDemand);
    world.faults = false;
    while world.target.as_ref().is_none_or(|target| target.step_now() != Step::Pull) || !world.serves {
        world.pending.retain(|pending| !matches!(pending, Pending::TargetWork(TargetWork::Pull)));
        if world.pending.is_empty() {
            world.now = world.now.plus_ms(100);
            world.tick();
        } else {
            world.happen(0, 0);
        }
    }
    world
}

#[test]
fn a_guest_that_ends_while_blocks_follow_does_not_end_the_fetching() {
    let mut world = following();
    assert!(world.target.as_ref().unwrap().waiting_for().unwrap().contains("depends on a"));
    // Its QEMU is gone, and with it the agent; the next one has only the journal.
    world.at_target = Guest::Dead;
    world.vm.state = VmState::Stopped;
    world.rev += 1;
    world.crash(Side::Target, 1);
    world.calm().unwrap_err();
    assert!(!world.missing && world.source.is_none() && world.target.is_none());
    assert_eq!(world.vm.state, VmState::Stopped, "how it ended is not this move's business");
    assert_eq!(world.volume.unwrap().0.depends_on, None);
}

#[test]
fn a_vm_whose_blocks_follow_is_not_moved_on() {
    let world = following();
    let mut vm = world.vm.clone();
    vm.state = VmState::Running;
    let on =
        Offer { source: host("b"), target: host("c"), epoch: vm.right.epoch, ..offer(DiskMove::OnDemand) };
    let mut source = Source::new(on, world.now);
    let mut out = Vec::new();
    source.step(world.now, Event::Tick, &mut out);
    let Some(Action::Read(id)) = out.pop() else { panic!("{out:?}") };
    source.step(world.now, Event::Records(id, Box::new(world.seen())), &mut out);
    let Some(Outcome::Stayed(error)) = source.outcome() else { panic!("{:?}", source.outcome()) };
    assert!(error.message.contains("depends on host a"), "{error}");
}

#[test]
fn the_operator_takes_the_vm_back_where_its_blocks_are() {
    let mut world = following();
    let cas = recover(&world.seen(), &host("a")).unwrap();
    assert_eq!(cas.volumes.first().unwrap().0.depends_on, None);
    world.crash(Side::Target, 1);
    world.target_journal = None;
    (world.at_target, world.missing) = (Guest::Dead, false);
    assert!(matches!(world.apply(&cas), CasResult::Yes(_)));
    world.calm().unwrap();
    assert_eq!(world.at_source, Guest::Runs);
    assert!(world.layer_at_source && !world.serves);
}
