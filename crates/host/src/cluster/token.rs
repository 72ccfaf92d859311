//! Join tokens: `whimbrel-SECRET-AUTHORITY`, both hex: 32 random bytes, and the hash of the authority's certificate.
//!
//! Invariant: the store knows the hash of the secret only, so that whoever reads it can join nothing.

use std::fmt::Write;
use std::str::FromStr;
use whimbrel_wire::Role;
use whimbrel_wire::api::Token;
use whimbrel_wire::meta::{TokenRecord, key};

use super::CHANGE;
use crate::clock;
use crate::error::{Context, Error, ErrorKind, Result};
use crate::link::{Credentials, fingerprint};
use crate::meta::{self, Committed, Compare, MetaStore, Op};

/// How long a token is good, seconds: an hour.
pub const TOKEN_LIFE_S: u64 = 3_600;

/// What a token's text says.
#[derive(Clone, PartialEq, Eq)]
pub struct JoinToken {
    secret: String,
    authority: [u8; 32],
}

impl JoinToken {
    fn random(authority: [u8; 32]) -> Self {
        Self {
            secret: uuid::Uuid::new_v4().simple().to_string() + &uuid::Uuid::new_v4().simple().to_string(),
            authority,
        }
    }

    /// The secret, hex.
    pub fn secret(&self) -> &str {
        &self.secret
    }

    /// The fingerprint of the cluster's authority.
    pub fn authority(&self) -> [u8; 32] {
        self.authority
    }

    /// The text to hand over.
    pub fn to_text(&self) -> String {
        let mut text = format!("whimbrel-{}-", self.secret);
        for byte in self.authority {
            // Writing to a string does not fail.
            let _ = write!(text, "{byte:02x}");
        }
        text
    }
}

impl FromStr for JoinToken {
    type Err = Error;
    fn from_str(text: &str) -> Result<Self> {
        let read = || {
            let (secret, authority) = text.trim().strip_prefix("whimbrel-")?.split_once('-')?;
            let hex = |text: &str| text.bytes().all(|byte| byte.is_ascii_hexdigit());
            let authority = blake3::Hash::from_hex(authority).ok()?;
            (secret.len() == 64 && hex(secret))
                .then(|| Self { secret: secret.to_ascii_lowercase(), authority: *authority.as_bytes() })
        };
        read().ok_or_else(|| {
            Error::new(ErrorKind::InvalidInput, "read the token: it is not a whole join token")
                .hint("`whimbrel cluster token` prints one")
        })
    }
}

/// The key of a token's record.
pub(super) fn record_key(secret: &str) -> String {
    key::token(blake3::hash(secret.as_bytes()).to_hex().as_str())
}

/// Makes a token that buys one certificate of `role` within `life_s` seconds (at most [`TOKEN_LIFE_S`]).
pub async fn make_token(
    store: &dyn MetaStore,
    credentials: &Credentials,
    role: Role,
    life_s: u64,
) -> Result<Token> {
    forget_ended(store).await?;
    let token = JoinToken::random(fingerprint(credentials.authority()));
    let expires_s = clock::wall_s() + life_s.min(TOKEN_LIFE_S);
    let key = record_key(&token.secret);
    let value = meta::encode(&key, &TokenRecord { role, expires_s })?;
    let (compare, ops) = (vec![Compare::Absent(key.clone())], vec![Op::Put(key, value)]);
    match meta::commit(store, compare, ops, CHANGE).await.context("make a token")? {
        Committed::Yes(_) => Ok(Token { token: token.to_text(), expires_s }),
        Committed::Conflict => Err(Error::new(ErrorKind::Internal, "make a token: it exists")),
    }
}

/// Removes tokens that nobody used in time.
async fn forget_ended(store: &dyn MetaStore) -> Result<()> {
    let now_s = clock::wall_s();
    for item in store.read(key::TOKENS).await.context("read tokens")?.items {
        let ended = meta::parse::<TokenRecord>(&item.key, &item.value).is_ok_and(|it| it.expires_s <= now_s);
        if ended {
            let compare = vec![Compare::Unchanged(item.key.clone(), item.mod_rev)];
            // Whoever else removed it meanwhile was right.
            meta::commit(store, compare, vec![Op::Delete(item.key)], CHANGE).await?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod fuzz {
    use super::*;

    whimbrel_fuzz::fuzz! {
        /// Tokens that people paste.
        fn tokens(bytes) seeds [JoinToken::random([7; 32]).to_text()] {
            let Ok(text) = std::str::from_utf8(bytes) else { return };
            if let Ok(token) = text.parse::<JoinToken>() {
                assert_eq!(token.to_text().parse::<JoinToken>().expect("it was read before").to_text(), token.to_text());
            }
        }
    }
}
