//! Certificates renew themselves: at two thirds of their life, with a new key, while connections run.
//!
//! Invariant: the new certificate is on disk before it is used.

use std::sync::Arc;
use std::time::Duration;
use whimbrel_wire::Role;

use super::authority::{self, SKEW_S, Subject, life_s};
use super::files::Files;
use super::serve::Service;
use crate::clock;
use crate::error::{Context, Error, ErrorKind, Result};
use crate::link::{CertificateInfo, certificate_from_pem, read_certificate};
use crate::metrics::metrics;

/// Looks at the clock at least so often, seconds: machines sleep, clocks are set.
const LOOK_S: u64 = 600;

/// When a certificate is to be renewed, seconds since 1970.
fn due_s(info: &CertificateInfo) -> u64 {
    // It was made a while after the beginning of its validity, which allows for clocks that differ.
    let made_s = info.not_before_s + SKEW_S;
    made_s + info.not_after_s.saturating_sub(made_s) * 2 / 3
}

/// Keeps this host's certificate, and on the signer the operator's, renewed; runs until it is dropped.
pub async fn keep_renewed(service: Arc<Service>, files: Files) {
    loop {
        let info = service.links().credentials().info();
        metrics().certificate_end_seconds.set(i64::try_from(info.not_after_s).unwrap_or(i64::MAX));
        let now_s = clock::wall_s();
        let due_s = due_s(&info);
        if now_s < due_s {
            tokio::time::sleep(Duration::from_secs((due_s - now_s).clamp(1, LOOK_S))).await;
            continue;
        }
        match renew(&service, &files).await {
            Ok(()) => tracing::info!(host = %info.identity.host, "renewed the certificate"),
            Err(error) => {
                let left_s = info.not_after_s.saturating_sub(now_s);
                tracing::warn!(%error, left_s, "renew the certificate");
                tokio::time::sleep(Duration::from_secs((left_s / 20).clamp(1, LOOK_S))).await;
            }
        }
    }
}

async fn renew(service: &Service, files: &Files) -> Result<()> {
    let credentials = service.links().credentials();
    let me = credentials.me();
    let (key_pem, request) = authority::new_request()?;
    let certificate_pem = service.renew_own(request).await.context("ask for a new certificate")?;
    let new = read_certificate(&certificate_from_pem(&certificate_pem)?)?.identity;
    if (new.role, &new.host) != (me.role, &me.host) {
        return Err(Error::new(ErrorKind::Denied, format!("renew the certificate: got one for {new}")));
    }
    files.write_credentials(me.role, &certificate_pem, &key_pem)?;
    credentials.replace(&certificate_pem, &key_pem)?;
    renew_operator(service, files)
}

/// The operator's certificate lies beside the authority's key and belongs to nobody who could ask.
fn renew_operator(service: &Service, files: &Files) -> Result<()> {
    let (Some(authority), true) = (service.own_authority(), files.credentials_path(Role::Operator).exists())
    else {
        return Ok(());
    };
    let info = files.credentials(Role::Operator)?.info();
    if clock::wall_s() < due_s(&info) {
        return Ok(());
    }
    let subject =
        Subject { role: Role::Operator, name: info.identity.host, generation: info.identity.generation };
    let (certificate_pem, key_pem) = authority.issue(&subject, life_s(Role::Operator))?;
    files.write_credentials(Role::Operator, &certificate_pem, &key_pem)
}
