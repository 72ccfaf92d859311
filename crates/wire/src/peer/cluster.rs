//! Joining, and what hosts tell about themselves.
//!
//! | method | who | params, payload → result, payload |
//! |---|---|---|
//! | (join) | nobody yet | [`JoinRequest`], certificate request (DER) → [`JoinAnswer`] |
//! | `cluster.join` | a host, for somebody who joins through it | [`JoinRequest`], request (DER) → [`JoinAnswer`] |
//! | `cluster.renew` | every role | [`RenewRequest`], request (DER) → [`RenewAnswer`] |
//!
//! Requests for certificates name nobody: what the certificate says comes from the token, or from the
//! certificate that is renewed.

use serde::{Deserialize, Serialize};

use crate::id::{HostId, Name, Role};

/// Asks for a certificate, for a token. The payload is a certificate request, DER.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct JoinRequest {
    /// The secret part of the token, hex.
    pub secret: String,
    /// The name that the certificate is to carry.
    pub name: HostId,
    /// `IP:PORT` of the peer port, best first; empty for those who are no hosts.
    #[serde(default)]
    pub addresses: Vec<String>,
    /// Program version.
    #[serde(default)]
    pub version: String,
}

/// The certificate, and what else a member has to know.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct JoinAnswer {
    /// The certificate, PEM.
    pub certificate_pem: String,
    /// The authority's certificate, PEM.
    pub ca_pem: String,
    /// What the certificate allows.
    pub role: Role,
    /// The cluster's name.
    pub cluster: Name,
    /// The host that signs certificates.
    pub signer: Member,
    /// Where the metadata store is.
    pub meta: MetaLocation,
}

/// A host and where it is reached.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Member {
    /// Its name.
    pub name: HostId,
    /// `IP:PORT` of its peer port, best first.
    pub addresses: Vec<String>,
}

/// Where the metadata store is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum MetaLocation {
    /// A file on this machine, shared by its agents, and served to other hosts by whoever made the cluster.
    Sqlite {
        /// The database file.
        path: String,
    },
    /// Served by that host over its peer port.
    Served {
        /// The host.
        by: Member,
    },
    /// etcd, over TLS; the hosts' own certificates are what it knows them by.
    Etcd {
        /// `https://HOST:PORT`.
        endpoints: Vec<String>,
    },
}

/// Asks for a new certificate with the same name and role. The payload is a certificate request, DER.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct RenewRequest {}

/// The new certificate.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct RenewAnswer {
    /// The certificate, PEM.
    pub certificate_pem: String,
}
