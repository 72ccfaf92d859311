//! The error that crosses a process boundary: a kind to match on, a sentence for people, a hint what to do next.
//!
//! Invariant: the exit status of the command line is a function of [`ErrorKind`] alone.

use serde::{Deserialize, Serialize};
use std::fmt;
use utoipa::ToSchema;

/// What went wrong, coarsely enough to act on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum ErrorKind {
    /// The named thing does not exist.
    NotFound,
    /// The named thing exists already.
    AlreadyExists,
    /// The request makes no sense, or a file is not what it was said to be.
    InvalidInput,
    /// Another host holds the right, or an epoch is too old.
    Refused,
    /// Something is missing on this machine: a program, a device, a permission.
    Missing,
    /// Bytes are not what their checksum says.
    Corrupt,
    /// A disk or a quota is full.
    NoSpace,
    /// A host or a store does not answer.
    Unavailable,
    /// A limit of time ran out.
    TimedOut,
    /// The certificate's role does not allow the call.
    Denied,
    /// Somebody asked to stop.
    Cancelled,
    /// Not possible with this version, guest or format.
    Unsupported,
    /// The request was sent and no answer came: it may have been carried out. Read back before acting.
    Unknown,
    /// The operating system refused an operation.
    Io,
    /// A defect of this program.
    Internal,
}

impl ErrorKind {
    /// The exit status for this kind (see the interface: 1 failed, 2 usage, 3 missing, 4 refused, 130 interrupted).
    pub fn exit_status(self) -> u8 {
        match self {
            Self::Missing => 3,
            Self::Refused => 4,
            Self::Cancelled => 130,
            _ => 1,
        }
    }

    /// The status of an HTTP answer with this error.
    pub fn http_status(self) -> u16 {
        match self {
            Self::NotFound => 404,
            Self::AlreadyExists | Self::Refused => 409,
            Self::InvalidInput | Self::Unsupported | Self::Corrupt => 422,
            Self::Denied => 403,
            Self::NoSpace => 507,
            Self::Unavailable | Self::Missing => 503,
            Self::TimedOut | Self::Unknown => 504,
            Self::Cancelled | Self::Io | Self::Internal => 500,
        }
    }
}

/// An error as it is sent: by the API, between hosts, in a task's state.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct WireError {
    /// What to match on.
    pub kind: ErrorKind,
    /// "verb + object: reason", with the host if it is another one.
    pub message: String,
    /// What to do next, if there is something.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
}

impl WireError {
    /// An error without a hint.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into(), hint: None }
    }

    /// The same error with a hint.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }
}

impl fmt::Display for WireError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)?;
        match &self.hint {
            Some(hint) => write!(f, " ({hint})"),
            None => Ok(()),
        }
    }
}

impl std::error::Error for WireError {}
