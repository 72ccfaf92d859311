//! Who this process is and whom it believes: its certificate and key, exchanged while connections run, and the
//! cluster's authority.
//!
//! A certificate names its holder by one URI: `whimbrel://ROLE/NAME/GENERATION`. The generation counts how often a
//! host of that name has joined: removing a host and letting it join again raises it, and older ones are refused.
//!
//! Not here: making certificates and renewing them (`cluster`).

use parking_lot::RwLock;
use rustls::client::ResolvesClientCert;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use rustls::{RootCertStore, SignatureScheme};
use std::fmt;
use std::sync::Arc;
use whimbrel_wire::{HostId, Role};
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::{FromDer, X509Certificate};

use super::tls;
use crate::error::{Context, Error, ErrorKind, Result};

/// Who is at the other end, as its certificate says.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct PeerIdentity {
    /// Its name: a host's, an operator's.
    pub host: HostId,
    /// What it may do.
    pub role: Role,
    /// Which joining of that name the certificate comes from.
    pub generation: u64,
    /// The certificate's serial number, hex.
    pub serial: String,
}

impl fmt::Display for PeerIdentity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.role, self.host)
    }
}

/// What a certificate says.
#[derive(Clone, Debug)]
pub struct CertificateInfo {
    /// Whose it is.
    pub identity: PeerIdentity,
    /// Good from this second since 1970 on.
    pub not_before_s: u64,
    /// No longer good after this second since 1970.
    pub not_after_s: u64,
}

/// The URI that stands in a certificate of this holder.
pub fn identity_uri(role: Role, name: &HostId, generation: u64) -> String {
    format!("whimbrel://{role}/{name}/{generation}")
}

/// Reads a certificate. Says nothing about who signed it.
pub fn read_certificate(der: &CertificateDer<'_>) -> Result<CertificateInfo> {
    let bad = |what: &str| Error::new(ErrorKind::Denied, format!("read certificate: {what}"));
    let (_, certificate) =
        X509Certificate::from_der(der).map_err(|_| bad("it is not an X.509 certificate"))?;
    let names = certificate
        .subject_alternative_name()
        .map_err(|_| bad("its alternative names are damaged"))?
        .ok_or_else(|| bad("it names nobody"))?;
    let mut uris = names.value.general_names.iter().filter_map(|name| match name {
        GeneralName::URI(uri) => uri.strip_prefix("whimbrel://"),
        _ => None,
    });
    let (Some(uri), None) = (uris.next(), uris.next()) else {
        return Err(bad("it has not exactly one whimbrel:// name"));
    };
    let mut parts = uri.split('/');
    let (Some(role), Some(name), Some(generation), None) =
        (parts.next(), parts.next(), parts.next(), parts.next())
    else {
        return Err(bad("its name is not whimbrel://ROLE/NAME/GENERATION"));
    };
    let seconds = |time: i64| u64::try_from(time).unwrap_or(0);
    Ok(CertificateInfo {
        identity: PeerIdentity {
            host: name.parse()?,
            role: role.parse()?,
            generation: generation.parse().map_err(|_| bad("its generation is not a number"))?,
            serial: certificate.raw_serial().iter().map(|byte| format!("{byte:02x}")).collect(),
        },
        not_before_s: seconds(certificate.validity().not_before.timestamp()),
        not_after_s: seconds(certificate.validity().not_after.timestamp()),
    })
}

struct Current {
    key: Arc<CertifiedKey>,
    info: CertificateInfo,
}

/// See the module's charter. Shared by everything of the process that speaks TLS.
pub struct Credentials {
    ca: CertificateDer<'static>,
    roots: Arc<RootCertStore>,
    current: RwLock<Current>,
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Credentials({})", self.me())
    }
}

impl Credentials {
    /// Credentials from the authority's certificate, the own certificate and its key, all PEM.
    pub fn from_pem(ca_pem: &str, certificate_pem: &str, key_pem: &str) -> Result<Arc<Self>> {
        let ca = certificate_from_pem(ca_pem).context("read the authority's certificate")?;
        let mut roots = RootCertStore::empty();
        roots.add(ca.clone()).map_err(|error| {
            Error::with_source(ErrorKind::InvalidInput, "read the authority's certificate", error)
        })?;
        let current = Self::load(&ca, certificate_pem, key_pem)?;
        Ok(Arc::new(Self { ca, roots: Arc::new(roots), current: RwLock::new(current) }))
    }

    fn load(ca: &CertificateDer<'static>, certificate_pem: &str, key_pem: &str) -> Result<Current> {
        let own = certificate_from_pem(certificate_pem).context("read the own certificate")?;
        let info = read_certificate(&own)?;
        let key = PrivateKeyDer::from_pem_slice(key_pem.as_bytes())
            .map_err(|error| Error::with_source(ErrorKind::InvalidInput, "read the own key", error))?;
        // The authority's certificate is sent along: whoever joins knows its fingerprint only.
        let key = CertifiedKey::from_der(vec![own, ca.clone()], key, &tls::provider()).map_err(|error| {
            Error::with_source(ErrorKind::InvalidInput, "match key and certificate", error)
        })?;
        Ok(Current { key: Arc::new(key), info })
    }

    /// Uses another certificate and key from the next handshake on; connections that run are not touched.
    pub fn replace(&self, certificate_pem: &str, key_pem: &str) -> Result<()> {
        let current = Self::load(&self.ca, certificate_pem, key_pem)?;
        *self.current.write() = current;
        Ok(())
    }

    /// Whose credentials these are.
    pub fn me(&self) -> PeerIdentity {
        self.current.read().info.identity.clone()
    }

    /// What the own certificate says.
    pub fn info(&self) -> CertificateInfo {
        self.current.read().info.clone()
    }

    pub(super) fn roots(&self) -> &Arc<RootCertStore> {
        &self.roots
    }

    /// The authority's certificate.
    pub fn authority(&self) -> &CertificateDer<'static> {
        &self.ca
    }
}

impl ResolvesServerCert for Credentials {
    fn resolve(&self, _hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.current.read().key.clone())
    }
}

impl ResolvesClientCert for Credentials {
    fn resolve(&self, _hints: &[&[u8]], _schemes: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        Some(self.current.read().key.clone())
    }

    fn has_certs(&self) -> bool {
        true
    }
}

/// The first certificate of a PEM text.
pub fn certificate_from_pem(pem: &str) -> Result<CertificateDer<'static>> {
    CertificateDer::from_pem_slice(pem.as_bytes())
        .map_err(|error| Error::with_source(ErrorKind::InvalidInput, "read a certificate in PEM", error))
}
