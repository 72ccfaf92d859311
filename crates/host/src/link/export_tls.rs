//! TLS for disks that are exported over TCP: the cluster's certificates, for clients that are none of our hosts' own
//! links, such as QEMU and libnbd.
//!
//! Only TLS 1.3 is spoken, as everywhere here, though NBD's text asks for 1.2 too: its clients have had 1.3 for years.
//!
//! Not here: which role may do what (`engine::trust::role`).

use std::sync::Arc;

use rustls::ServerConfig;
use rustls::pki_types::CertificateDer;
use whimbrel_engine::trust::role;

use super::credentials::{PeerIdentity, read_certificate};
use super::{Links, tls};
use crate::error::{Error, ErrorKind, Result};

/// The right to attach an exported disk, in the table of roles.
const ATTACH: &str = "export.nbd";

/// See the module's charter.
#[derive(Clone)]
pub struct ExportTls {
    config: Arc<ServerConfig>,
    links: Links,
}

impl ExportTls {
    /// With the credentials of `links`, and without those that it refuses.
    pub fn new(links: &Links) -> Result<Self> {
        Ok(Self { config: tls::export_server(links.credentials())?, links: links.clone() })
    }

    pub(crate) fn config(&self) -> &Arc<ServerConfig> {
        &self.config
    }

    /// Fails if this peer was removed from the cluster.
    pub(crate) fn check_still(&self, peer: &PeerIdentity) -> Result<()> {
        self.links.check_not_refused(peer)
    }

    /// Who showed these certificates, after the handshake proved them: `Denied` if it may not attach disks.
    pub(crate) fn check(&self, shown: Option<&[CertificateDer<'_>]>) -> Result<PeerIdentity> {
        let certificate = shown.and_then(<[_]>::first).ok_or_else(|| {
            Error::new(ErrorKind::Denied, "attach an exported disk: the client showed no certificate")
        })?;
        let peer = read_certificate(certificate)?.identity;
        self.check_still(&peer)?;
        if !role::may_call(peer.role, ATTACH) {
            return Err(Error::new(
                ErrorKind::Denied,
                format!("attach an exported disk: {peer} has not the role for it"),
            ));
        }
        Ok(peer)
    }
}
