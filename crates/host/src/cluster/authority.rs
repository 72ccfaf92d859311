//! The cluster's certificate authority: a P-256 key, and the certificates it signs.
//!
//! Invariants
//! * What a certificate says is decided here, by the caller of [`Authority::sign`]; of a request only the public
//!   key is used, after its signature proved that the asker has the private one.
//! * Ends of certificates are staggered by nothing: each counts from its own making.
//!
//! Not here: who may ask for which certificate (`cluster::serve`), files (`cluster::files`).

use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, DistinguishedName, DnType,
    ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose, PKCS_ECDSA_P256_SHA256, PublicKeyData,
    SanType, SerialNumber,
};
use rustls::pki_types::CertificateSigningRequestDer;
use std::sync::Arc;
use time::{Duration, OffsetDateTime};
use whimbrel_wire::{HostId, Name, Role};

use crate::error::{Error, ErrorKind, Result};
use crate::link::{Credentials, identity_uri};

/// How long a host's certificate lives, seconds: 30 days. It is renewed after two thirds.
pub const HOST_LIFE_S: u64 = 30 * 86_400;
/// How long the certificate of an operator, reader or guest lives, seconds: a year.
pub const OTHER_LIFE_S: u64 = 365 * 86_400;
/// How long the authority itself lives, seconds: 20 years.
const AUTHORITY_LIFE_S: u64 = 20 * 365 * 86_400;
/// Clocks of hosts may differ by this much, seconds.
pub(super) const SKEW_S: u64 = 3_600;

/// How long certificates of this role live, seconds.
pub fn life_s(role: Role) -> u64 {
    if role == Role::Host { HOST_LIFE_S } else { OTHER_LIFE_S }
}

fn fault(what: &'static str) -> impl FnOnce(rcgen::Error) -> Error {
    move |error| Error::with_source(ErrorKind::Internal, what, error)
}

/// Whose certificate it is to be.
#[derive(Clone, Debug)]
pub struct Subject {
    /// What it may do.
    pub role: Role,
    /// Its name.
    pub name: HostId,
    /// Which joining of that name.
    pub generation: u64,
}

/// See the module's charter.
pub struct Authority {
    certificate_pem: String,
    issuer: Issuer<'static, KeyPair>,
}

impl Authority {
    /// A new authority for the cluster `name`.
    pub fn generate(name: &Name) -> Result<Self> {
        let key = new_key()?;
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, format!("Whimbrel cluster {name}"));
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        live(&mut params, AUTHORITY_LIFE_S);
        let certificate = params.self_signed(&key).map_err(fault("make the authority's certificate"))?;
        Ok(Self { certificate_pem: certificate.pem(), issuer: Issuer::new(params, key) })
    }

    /// The authority from its certificate and key, PEM.
    pub fn from_pem(certificate_pem: &str, key_pem: &str) -> Result<Self> {
        let bad = |error| Error::with_source(ErrorKind::Corrupt, "read the authority's key", error);
        let key = KeyPair::from_pem(key_pem).map_err(bad)?;
        let issuer = Issuer::from_ca_cert_pem(certificate_pem, key).map_err(bad)?;
        Ok(Self { certificate_pem: certificate_pem.to_owned(), issuer })
    }

    /// Its certificate, PEM.
    pub fn certificate_pem(&self) -> &str {
        &self.certificate_pem
    }

    /// Its private key, PEM. Goes into one file of mode 0600 and nowhere else.
    pub fn key_pem(&self) -> String {
        self.issuer.key().serialize_pem()
    }

    /// Signs a request (DER), giving `subject` a certificate for `life_s` seconds from now. PEM.
    pub fn sign(&self, subject: &Subject, request_der: &[u8], life_s: u64) -> Result<String> {
        let request =
            CertificateSigningRequestParams::from_der(&CertificateSigningRequestDer::from(request_der))
                .map_err(|error| {
                    Error::with_source(ErrorKind::InvalidInput, "read the certificate request", error)
                })?;
        self.sign_key(subject, &request.public_key, life_s)
    }

    fn sign_key(&self, subject: &Subject, key: &impl PublicKeyData, life_s: u64) -> Result<String> {
        let mut params = leaf_params(&subject.name, life_s);
        let uri = identity_uri(subject.role, &subject.name, subject.generation);
        let uri = uri.try_into().map_err(fault("write a name into a certificate"))?;
        params.subject_alt_names = vec![SanType::URI(uri)];
        params.extended_key_usages.push(ExtendedKeyUsagePurpose::ClientAuth);
        if subject.role == Role::Host {
            // For clients that are none of ours, and compare names: those of exported disks.
            let name = subject.name.as_str().try_into().map_err(fault("write a name into a certificate"))?;
            params.subject_alt_names.push(SanType::DnsName(name));
            params.extended_key_usages.push(ExtendedKeyUsagePurpose::ServerAuth);
        }
        let certificate = params.signed_by(key, &self.issuer).map_err(fault("sign a certificate"))?;
        crate::metrics::metrics().certificates_signed.with_label_values(&[subject.role.as_str()]).inc();
        Ok(certificate.pem())
    }

    /// A key and certificate for `subject` in one go: (certificate, key), PEM.
    pub fn issue(&self, subject: &Subject, life_s: u64) -> Result<(String, String)> {
        let key = new_key()?;
        Ok((self.sign_key(subject, &key, life_s)?, key.serialize_pem()))
    }

    /// Credentials for `name`, first generation: what the host that makes a cluster starts with.
    pub fn credentials(&self, role: Role, name: &HostId) -> Result<Arc<Credentials>> {
        let subject = Subject { role, name: name.clone(), generation: 1 };
        let (certificate, key) = self.issue(&subject, HOST_LIFE_S)?;
        Credentials::from_pem(&self.certificate_pem, &certificate, &key)
    }

    /// A key and certificate for a server that is none of ours but trusted by the cluster, for example etcd:
    /// `names` are DNS names or IP addresses. It carries no role. (certificate, key), PEM.
    pub fn issue_service(&self, names: &[String], life_s: u64) -> Result<(String, String)> {
        let key = new_key()?;
        let common = names.first().map_or("service", String::as_str);
        let mut params =
            CertificateParams::new(names.to_vec()).map_err(fault("write names into a certificate"))?;
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, common);
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        finish_leaf(&mut params, life_s);
        let certificate = params.signed_by(&key, &self.issuer).map_err(fault("sign a certificate"))?;
        Ok((certificate.pem(), key.serialize_pem()))
    }
}

/// A new private key.
fn new_key() -> Result<KeyPair> {
    KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).map_err(fault("make a key"))
}

/// A new key (PEM) and a request for a certificate for it (DER). The request names nobody: the authority decides.
pub fn new_request() -> Result<(String, Vec<u8>)> {
    let key = new_key()?;
    let request =
        CertificateParams::default().serialize_request(&key).map_err(fault("make a certificate request"))?;
    Ok((key.serialize_pem(), request.der().to_vec()))
}

fn live(params: &mut CertificateParams, life_s: u64) {
    let seconds = |s: u64| Duration::seconds(i64::try_from(s).unwrap_or(i64::MAX));
    let now = OffsetDateTime::now_utc();
    params.not_before = now - seconds(SKEW_S);
    params.not_after = now + seconds(life_s);
}

fn leaf_params(name: &HostId, life_s: u64) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, name.as_str());
    finish_leaf(&mut params, life_s);
    params
}

fn finish_leaf(params: &mut CertificateParams, life_s: u64) {
    // 16 random bytes; the first bit is cleared so that the number stays positive in every reader's eyes.
    let mut serial = *uuid::Uuid::new_v4().as_bytes();
    serial[0] = (serial[0] & 0x7f) | 0x40;
    params.serial_number = Some(SerialNumber::from_slice(&serial));
    params.is_ca = IsCa::ExplicitNoCa;
    params.use_authority_key_identifier_extension = true;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    live(params, life_s);
}
