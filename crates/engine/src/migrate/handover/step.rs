//! Fail points: one per side and step, generated from the steps' enum.
//!
//! Invariant: a step without fail points does not compile ([`FailPoint::place`] matches without a wildcard).

use std::fmt;
use std::str::FromStr;

use whimbrel_wire::peer::migrate::{Side, Step};
use whimbrel_wire::{ErrorKind, WireError};

/// A place in the handover where a test can make something fail: right after the host has carried out
/// [`Action::Enter`](super::Action::Enter) of that step on that side, before the step's effect.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct FailPoint {
    /// Whose step.
    pub side: Side,
    /// Which step.
    pub step: Step,
}

const COUNT: usize = Side::ALL.len() * Step::ALL.len();

impl FailPoint {
    /// Every fail point, by side and step.
    pub const ALL: [Self; COUNT] = {
        let mut all = [Self { side: Side::Source, step: Step::Negotiate }; COUNT];
        let mut i = 0;
        while i < COUNT {
            let side = Side::ALL[i / Step::ALL.len()];
            let step = Step::ALL[i % Step::ALL.len()];
            all[i] = Self { side, step };
            // Naming the place here makes a step without one fail to compile.
            assert!(!all[i].place().is_empty(), "every fail point has a place");
            i += 1;
        }
        all
    };

    /// What has happened on this side when the fail point is reached, and what has not.
    pub const fn place(self) -> &'static str {
        match (self.side, self.step) {
            (Side::Source, Step::Negotiate) => "before the attempt is written into the record",
            (Side::Source, Step::Prepare) => "the target has accepted; it is not yet told to prepare",
            (Side::Source, Step::Copy) => "the target is prepared; nothing has been copied",
            (Side::Source, Step::Pause) => "the rest fits and the store has answered; the guest still runs",
            (Side::Source, Step::ListIo) => "the guest is stopped; its I/O is not yet cancelled",
            (Side::Source, Step::LastRound) => "I/O is listed; the last round has not begun",
            (Side::Source, Step::DeviceState) => "memory and disk are sent; device state is not",
            (Side::Source, Step::Verify) => "everything is sent; the target is not yet asked to verify",
            (Side::Source, Step::Commit) => "READY has come; the records are not yet changed",
            (Side::Source, Step::Resume) => "the source knows of the commit; the target has not been told",
            (Side::Source, Step::Announce) => "the source has heard that the guest runs at the target",
            (Side::Source, Step::Pull) => "the guest runs at the target and reads what it lacks from here",
            (Side::Source, Step::Release) => "the source's copy is about to be given up",
            (Side::Target, Step::Negotiate) => "the offer has come; nothing has been checked",
            (Side::Target, Step::Prepare) => "before QEMU is started",
            (Side::Target, Step::Copy) => "the first sign that copying has begun",
            (Side::Target, Step::Pause) => "the first sign that the guest is being stopped",
            (Side::Target, Step::ListIo) => "the first sign that I/O is being listed",
            (Side::Target, Step::LastRound) => "the first sign of the last round",
            (Side::Target, Step::DeviceState) => "the first sign of device state",
            (Side::Target, Step::Verify) => "everything has come; it has not been checked; READY is not said",
            (Side::Target, Step::Commit) => "the record names this host; nothing has followed from it",
            (Side::Target, Step::Resume) => "before the guest is let go",
            (Side::Target, Step::Announce) => "the guest runs; nobody has been told",
            (Side::Target, Step::Pull) => {
                "the record says that the guest runs; nothing is fetched ahead of it yet"
            }
            (Side::Target, Step::Release) => "the record says that the guest runs; the journal still stands",
        }
    }
}

impl fmt::Display for FailPoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.side, self.step)
    }
}

impl FromStr for FailPoint {
    type Err = WireError;
    fn from_str(text: &str) -> Result<Self, WireError> {
        Self::ALL.into_iter().find(|point| point.to_string() == text).ok_or_else(|| {
            WireError::new(
                ErrorKind::InvalidInput,
                format!("read the fail point {text:?}: SIDE:STEP, as in source:pause or target:verify"),
            )
        })
    }
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn every_side_and_step_has_one_fail_point_and_its_name_reads_back() {
        assert_eq!(FailPoint::ALL.len(), 26);
        for point in FailPoint::ALL {
            assert_eq!(point.to_string().parse::<FailPoint>().unwrap(), point);
            assert_eq!(FailPoint::ALL.iter().filter(|other| **other == point).count(), 1);
        }
        assert!("source:jump".parse::<FailPoint>().is_err());
    }
}
