//! The error of every effect: a kind to match on, a sentence ("verb + object"), the source kept.
//!
//! Logged once, where it is handled. Crosses a process boundary as [`WireError`], its chain joined by ": ".

use std::error::Error as StdError;
use std::fmt;
use std::io;

pub use whimbrel_wire::{ErrorKind, WireError};

/// The result of every effect.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// See the module's charter.
#[derive(Debug)]
pub struct Error {
    kind: ErrorKind,
    context: String,
    hint: Option<String>,
    source: Option<Box<dyn StdError + Send + Sync>>,
}

impl Error {
    /// An error without a source.
    pub fn new(kind: ErrorKind, context: impl Into<String>) -> Self {
        Self { kind, context: context.into(), hint: None, source: None }
    }

    /// An error caused by `source`.
    pub fn with_source(
        kind: ErrorKind,
        context: impl Into<String>,
        source: impl Into<Box<dyn StdError + Send + Sync>>,
    ) -> Self {
        Self { kind, context: context.into(), hint: None, source: Some(source.into()) }
    }

    /// The same error with words on what to do next.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// What to match on.
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }

    /// The error as it is sent to another process.
    pub fn to_wire(&self) -> WireError {
        WireError { kind: self.kind, message: self.to_string(), hint: self.hint.clone() }
    }
}

/// The kind that fits an error of the operating system.
pub fn kind_of_io(error: &io::Error) -> ErrorKind {
    match error.kind() {
        io::ErrorKind::NotFound => ErrorKind::NotFound,
        io::ErrorKind::AlreadyExists => ErrorKind::AlreadyExists,
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => ErrorKind::NoSpace,
        io::ErrorKind::TimedOut => ErrorKind::TimedOut,
        io::ErrorKind::PermissionDenied => ErrorKind::Missing,
        io::ErrorKind::ConnectionRefused
        | io::ErrorKind::ConnectionReset
        | io::ErrorKind::ConnectionAborted
        | io::ErrorKind::NotConnected
        | io::ErrorKind::BrokenPipe
        | io::ErrorKind::UnexpectedEof
        | io::ErrorKind::HostUnreachable
        | io::ErrorKind::NetworkUnreachable => ErrorKind::Unavailable,
        _ => ErrorKind::Io,
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.context)?;
        let mut next = self.source();
        while let Some(source) = next {
            write!(f, ": {source}")?;
            // Our own errors print their whole chain already.
            if source.is::<Error>() {
                break;
            }
            next = source.source();
        }
        Ok(())
    }
}

impl StdError for Error {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        self.source.as_deref().map(|source| source as _)
    }
}

impl From<WireError> for Error {
    fn from(error: WireError) -> Self {
        Self { kind: error.kind, context: error.message, hint: error.hint, source: None }
    }
}

/// Adds "verb + object" to an error on its way up, keeping its kind and hint.
pub trait Context<T> {
    /// Wraps the error in `context`.
    fn context(self, context: impl Into<String>) -> Result<T>;
    /// Wraps the error in the words that `context` makes.
    fn with_context<C: Into<String>>(self, context: impl FnOnce() -> C) -> Result<T>;
}

impl<T> Context<T> for Result<T, io::Error> {
    fn context(self, context: impl Into<String>) -> Result<T> {
        self.with_context(|| context)
    }
    fn with_context<C: Into<String>>(self, context: impl FnOnce() -> C) -> Result<T> {
        self.map_err(|error| Error::with_source(kind_of_io(&error), context(), error))
    }
}

impl<T> Context<T> for Result<T, rustix::io::Errno> {
    fn context(self, context: impl Into<String>) -> Result<T> {
        self.with_context(|| context)
    }
    fn with_context<C: Into<String>>(self, context: impl FnOnce() -> C) -> Result<T> {
        self.map_err(io::Error::from).with_context(context)
    }
}

impl<T> Context<T> for Result<T, Error> {
    fn context(self, context: impl Into<String>) -> Result<T> {
        self.with_context(|| context)
    }
    fn with_context<C: Into<String>>(self, context: impl FnOnce() -> C) -> Result<T> {
        self.map_err(|mut error| {
            let hint = error.hint.take();
            Error { kind: error.kind, context: context().into(), hint, source: Some(Box::new(error)) }
        })
    }
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn the_chain_is_printed_once_and_the_kind_is_kept() {
        let inner: Result<()> = Err(io::Error::from(io::ErrorKind::StorageFull)).context("write block 7");
        let outer = inner.context("fill cache of image x").unwrap_err();
        assert_eq!(outer.kind(), ErrorKind::NoSpace);
        assert_eq!(outer.to_string(), "fill cache of image x: write block 7: no storage space");
    }
}
