//! What must be the case while something is gone for good, and afterwards.
//!
//! ```text
//!            before COMMIT                    at COMMIT                      after it
//!  lost      target, link: source, at once    who holds it runs it, or       the target runs it
//!            source agent: operator           the operator is asked
//! ```
//!
//! Not here: finding out what is the case (`world`).

use super::{Case, Victim};

/// What is the case.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Is {
    /// The guest runs on one host.
    Source,
    Target,
    /// It runs nowhere, and the record asks the operator to bring the other host back, or to recover it here.
    Operator(Option<Place>),
    /// It runs nowhere, and a task waits for the metadata store.
    Store,
    /// QEMU died under the guest, and the record says so.
    Crashed,
}

/// One of the two hosts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    Source,
    Target,
}

/// A lost target lets the source go on within this time, plus the beat's own jitter on a busy machine.
const LOST_TARGET_MS: f64 = 5500.0;
/// A guest that is not to be paused at all is silent no longer than this: emulation on a busy machine stutters.
const NOT_PAUSED_MS: f64 = 1500.0;

const BEFORE_PAUSE: [&str; 3] = ["negotiate", "prepare", "copy"];
const PAUSED: [&str; 4] = ["list-io", "last-round", "device-state", "verify"];

/// What may be the case when the victim is gone for good.
pub(super) fn without(case: &Case) -> Vec<Is> {
    let early = case.is(&BEFORE_PAUSE) || case.is(&["pause"]);
    let before_commit = early || case.is(&PAUSED);
    match case.victim {
        // QEMU may have paused the guest by then, and goes on only when its agent is back.
        Victim::SourceAgent if case.mode == "b" && case.is(&["pause"]) => {
            vec![Is::Source, Is::Operator(None)]
        }
        Victim::SourceAgent if early => vec![Is::Source],
        // The target has not got all of it: only the source can go on.
        Victim::SourceAgent if before_commit => vec![Is::Operator(None)],
        Victim::SourceAgent | Victim::SourceNetwork if case.is(&["commit"]) => {
            vec![Is::Operator(Some(Place::Target))]
        }
        // A QEMU that dies just when everything has come is started anew from what has come.
        Victim::TargetQemu if case.mode == "a" && case.is(&["device-state", "verify"]) => {
            vec![Is::Source, Is::Target]
        }
        Victim::TargetAgent | Victim::TargetQemu | Victim::Connection | Victim::SourceNetwork
            if before_commit =>
        {
            vec![Is::Source]
        }
        Victim::TargetAgent if case.is(&["commit", "resume"]) => vec![Is::Operator(Some(Place::Source))],
        // Mode A keeps what it takes to start another QEMU; in mode B the right goes back.
        Victim::TargetQemu if case.is(&["commit", "resume"]) => {
            vec![if case.mode == "a" { Is::Target } else { Is::Source }]
        }
        Victim::TargetQemu => vec![Is::Crashed],
        Victim::Metadata if before_commit || case.is(&["commit"]) => vec![Is::Source],
        // The target may have read the record, or not.
        Victim::Metadata if case.is(&["resume"]) => vec![Is::Target, Is::Store],
        Victim::Reset if before_commit || case.is(&["commit"]) => vec![Is::Source, Is::Target],
        Victim::SourceAgent
        | Victim::TargetAgent
        | Victim::Connection
        | Victim::Reset
        | Victim::SourceNetwork
        | Victim::Metadata => vec![Is::Target],
    }
}

/// The longest silence allowed while the guest need not wait for anybody to come back.
pub(super) fn silence_limit_ms(case: &Case) -> Option<f64> {
    let before_pause = case.is(&BEFORE_PAUSE);
    match case.victim {
        // The switch-over itself, if the move goes on.
        Victim::Reset => Some(LOST_TARGET_MS),
        _ if before_pause && !case.comes_back => Some(NOT_PAUSED_MS),
        _ if case.is(&["announce", "release"]) && case.victim != Victim::TargetQemu => Some(LOST_TARGET_MS),
        Victim::TargetAgent
        | Victim::TargetQemu
        | Victim::Connection
        | Victim::SourceNetwork
        | Victim::Metadata
            if before_pause || case.is(&["pause"]) || case.is(&PAUSED) =>
        {
            Some(LOST_TARGET_MS)
        }
        Victim::Metadata if case.is(&["commit"]) => Some(LOST_TARGET_MS),
        _ => None,
    }
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn every_case_has_something_that_must_come_of_it() {
        for mode in ["a", "b"] {
            for case in super::super::cases(true, mode).unwrap() {
                assert!(!without(&case).is_empty(), "{}", case.words());
            }
        }
    }
}
