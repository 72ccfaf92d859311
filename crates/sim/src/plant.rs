//! Eleven mistakes that could be made, each behind a switch, to show that the checkers would find them.
//!
//! Five live where the decision is made and are passed to the engine as an argument that production never sets;
//! the others stand in for mistakes in the host crate and live in the simulator's hosts.

use std::fmt;
use std::str::FromStr;
use whimbrel_engine::migrate::handover;

macro_rules! plants {
    ($($(#[$doc:meta])* $variant:ident = $text:literal,)*) => {
        /// A planted mistake.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum Plant {
            $($(#[$doc])* $variant,)*
        }

        impl Plant {
            /// Every one.
            pub const ALL: &'static [Self] = &[$(Self::$variant,)*];

            /// Its name on the command line.
            pub fn as_str(self) -> &'static str {
                match self {
                    $(Self::$variant => $text,)*
                }
            }
        }
    };
}

plants! {
    /// A target takes frames of an older epoch: late ones overwrite what the guest has written since it resumed.
    SkipEpochCheck = "skip-epoch-check",
    /// The source commits without waiting for READY.
    CommitBeforeReady = "commit-before-ready",
    /// The target takes every page that comes, even if a newer one came before it over another link.
    DropPageVersion = "drop-page-version",
    /// A host keeps and advertises an image block before its hash was checked.
    OfferUnverifiedBlock = "offer-unverified-block",
    /// The source takes a commit without an answer for a failed one, and lets the guest go on.
    ResumeWithoutReadBack = "resume-without-read-back",
    /// The source gives up its copy at COMMIT instead of when the guest runs at the target.
    ReleaseBeforeRunning = "release-before-running",
    /// The source goes from listing I/O to device state.
    SkipLastRound = "skip-last-round",
    /// With `--disk on-demand` the source gives up its layer before the target has fetched all of it.
    ReleaseBeforePulled = "release-before-pulled",
    /// The journal is kept in memory only.
    ForgetJournal = "forget-journal",
    /// A reader takes bytes whose hash is wrong.
    AcceptWrongHash = "accept-wrong-hash",
    /// A flush is acknowledged before the disk has it.
    AckFlushEarly = "ack-flush-early",
}

impl Plant {
    /// The engine's part of it.
    pub fn in_engine(self) -> Option<handover::Plant> {
        match self {
            Self::CommitBeforeReady => Some(handover::Plant::CommitBeforeReady),
            Self::ResumeWithoutReadBack => Some(handover::Plant::ResumeWithoutReadBack),
            Self::ReleaseBeforeRunning => Some(handover::Plant::ReleaseBeforeRunning),
            Self::SkipLastRound => Some(handover::Plant::SkipLastRound),
            Self::ReleaseBeforePulled => Some(handover::Plant::ReleaseBeforePulled),
            Self::SkipEpochCheck
            | Self::DropPageVersion
            | Self::OfferUnverifiedBlock
            | Self::ForgetJournal
            | Self::AcceptWrongHash
            | Self::AckFlushEarly => None,
        }
    }
}

impl fmt::Display for Plant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for Plant {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        Self::ALL.iter().copied().find(|plant| plant.as_str() == text).ok_or_else(|| {
            let names: Vec<_> = Self::ALL.iter().map(|plant| plant.as_str()).collect();
            format!("no plant {text:?}; there are {}", names.join(", "))
        })
    }
}
