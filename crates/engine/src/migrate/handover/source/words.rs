//! What the source says of itself to people.
//!
//! Not here: what it does (`source`).

use super::{Offer, Source, State};

impl Source {
    /// What it waits for, or depends on, for people; none while it is busy.
    pub fn waiting_for(&self) -> Option<String> {
        let Offer { vm, source, target, .. } = &self.offer;
        match self.state {
            State::Reading | State::Writing => Some(self.desk.words()),
            State::Offered => Some(format!("host {target} to answer")),
            State::Checking => {
                Some(format!("{}: it must answer before the guest is paused", self.desk.words()))
            }
            State::Committing | State::Resolving | State::Fencing => Some(format!(
                "{}: only it knows whether vm {vm} is at {source} or {target}",
                self.desk.words()
            )),
            State::Waiting => {
                Some(format!("host {target}, which holds vm {vm} now, to run it; {}", self.way_out()))
            }
            State::Serving => {
                Some(format!("depends on {source}: the volumes' blocks are still being fetched"))
            }
            State::Undoing => Some(format!("QEMU of vm {vm} to go on at {source}")),
            State::Clearing => Some(format!(
                "{}, to take the attempt out of the record; vm {vm} is at {source}",
                self.desk.words()
            )),
            State::Preparing
            | State::Copying
            | State::Working(_)
            | State::Verifying
            | State::Dropping
            | State::Releasing
            | State::Done => None,
        }
    }
}
