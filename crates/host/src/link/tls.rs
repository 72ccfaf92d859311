//! TLS 1.3 and nothing older: configurations, and the checks rustls leaves to us.
//!
//! Invariants
//! * A server of this cluster demands a certificate of the cluster's authority, except on `whimbrel-join`.
//! * No session is resumed: every connection proves its certificate anew, so that a removed host stays out.
//!
//! Not here: names and revocation (`PeerIdentity`, checked by `link` after each handshake).

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{Resumption, verify_server_cert_signed_by_trust_anchor};
use rustls::crypto::{CryptoProvider, aws_lc_rs, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::{NoServerSessionStorage, ParsedCertificate, WebPkiClientVerifier};
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, RootCertStore, ServerConfig, SignatureScheme,
};
use std::sync::{Arc, LazyLock};
use whimbrel_wire::peer::{ALPN_HTTP, ALPN_JOIN, ALPN_PEER};

use super::credentials::Credentials;
use crate::error::{Error, ErrorKind, Result};

/// AES-128 first: the data path is bound by the cipher, and every machine of interest has AES in hardware.
static PROVIDER: LazyLock<Arc<CryptoProvider>> = LazyLock::new(|| {
    let mut provider = aws_lc_rs::default_provider();
    provider.cipher_suites = vec![
        aws_lc_rs::cipher_suite::TLS13_AES_128_GCM_SHA256,
        aws_lc_rs::cipher_suite::TLS13_AES_256_GCM_SHA384,
        aws_lc_rs::cipher_suite::TLS13_CHACHA20_POLY1305_SHA256,
    ];
    Arc::new(provider)
});

/// The cryptography everything here uses.
pub(crate) fn provider() -> Arc<CryptoProvider> {
    PROVIDER.clone()
}

fn fault(what: &'static str) -> impl FnOnce(rustls::Error) -> Error {
    move |error| Error::with_source(ErrorKind::Internal, what, error)
}

/// For peers and the remote API: both sides show certificates.
pub(super) fn server(credentials: &Arc<Credentials>) -> Result<Arc<ServerConfig>> {
    let mut config = mutual(credentials)?;
    config.alpn_protocols = vec![ALPN_PEER.to_vec(), ALPN_HTTP.to_vec()];
    Ok(Arc::new(config))
}

/// A server that demands a certificate of the cluster's authority.
fn mutual(credentials: &Arc<Credentials>) -> Result<ServerConfig> {
    let verifier = WebPkiClientVerifier::builder_with_provider(credentials.roots().clone(), provider())
        .build()
        .map_err(|error| Error::with_source(ErrorKind::Internal, "set up client certificates", error))?;
    let config = ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(fault("set up TLS"))?
        .with_client_cert_verifier(verifier)
        .with_cert_resolver(credentials.clone());
    Ok(without_sessions(config))
}

/// For clients of exported disks, which know nothing of our protocols: both sides show certificates.
pub(super) fn export_server(credentials: &Arc<Credentials>) -> Result<Arc<ServerConfig>> {
    Ok(Arc::new(mutual(credentials)?))
}

/// For those who join: only the server shows a certificate.
pub(super) fn join_server(credentials: &Arc<Credentials>) -> Result<Arc<ServerConfig>> {
    let mut config = ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(fault("set up TLS"))?
        .with_no_client_auth()
        .with_cert_resolver(credentials.clone());
    config.alpn_protocols = vec![ALPN_JOIN.to_vec()];
    Ok(Arc::new(without_sessions(config)))
}

fn without_sessions(mut config: ServerConfig) -> ServerConfig {
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    config
}

/// For dialling a host of the cluster. `alpn` is one of `wire::peer::ALPN_*`.
pub(super) fn client(credentials: &Arc<Credentials>, alpn: &[u8]) -> Result<Arc<ClientConfig>> {
    let verifier = AuthorityVerifier { trust: Trust::Authority(credentials.roots().clone()) };
    let mut config = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(fault("set up TLS"))?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier))
        .with_client_cert_resolver(credentials.clone());
    config.alpn_protocols = vec![alpn.to_vec()];
    config.resumption = Resumption::disabled();
    config.enable_sni = false;
    Ok(Arc::new(config))
}

/// For joining: believes the authority whose fingerprint ([`fingerprint`]) is given, and shows no certificate.
pub(super) fn join_client(authority: [u8; 32]) -> Result<Arc<ClientConfig>> {
    let verifier = AuthorityVerifier { trust: Trust::Fingerprint(authority) };
    let mut config = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(fault("set up TLS"))?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier))
        .with_no_client_auth();
    config.alpn_protocols = vec![ALPN_JOIN.to_vec()];
    config.resumption = Resumption::disabled();
    config.enable_sni = false;
    Ok(Arc::new(config))
}

/// What a join token says of the authority: the BLAKE3 hash of its certificate.
pub fn fingerprint(authority: &CertificateDer<'_>) -> [u8; 32] {
    *blake3::hash(authority).as_bytes()
}

#[derive(Debug)]
enum Trust {
    Authority(Arc<RootCertStore>),
    Fingerprint([u8; 32]),
}

/// Checks that a server's certificate is signed by the cluster's authority. Host names mean nothing here: the
/// name in the certificate is compared with the host meant after the handshake, before anything is sent.
#[derive(Debug)]
struct AuthorityVerifier {
    trust: Trust,
}

impl ServerCertVerifier for AuthorityVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let algorithms = PROVIDER.signature_verification_algorithms.all;
        let certificate = ParsedCertificate::try_from(end_entity)?;
        let check = |roots: &RootCertStore| {
            verify_server_cert_signed_by_trust_anchor(&certificate, roots, &[], now, algorithms)
        };
        match &self.trust {
            Trust::Authority(roots) => check(roots)?,
            Trust::Fingerprint(wanted) => {
                let authority = intermediates
                    .iter()
                    .find(|sent| fingerprint(sent) == *wanted)
                    .ok_or(CertificateError::UnknownIssuer)?;
                let mut roots = RootCertStore::empty();
                roots.add(authority.clone().into_owned())?;
                check(&roots)?;
            }
        }
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(rustls::Error::General("TLS 1.2 is not spoken".into()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, cert, dss, &PROVIDER.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        PROVIDER.signature_verification_algorithms.supported_schemes()
    }
}
