//! Every counter and gauge of the agent, in the text form that Prometheus reads.
//!
//! ```text
//! metrics().link_sent_bytes.with_label_values(&[host]).inc_by(n)        anywhere
//! metrics::text()                                                       GET /metrics
//! ```
//!
//! To add one, add a line to the table below: its comment is its help text. Names end in their unit, counters in
//! `_total`. Labels take few values (hosts, roles, classes), never names that guests choose.

use prometheus::{Encoder, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry, TextEncoder};
use std::sync::LazyLock;

macro_rules! table {
    ($($(#[doc = $help:literal])+ $field:ident: $kind:ident $([$($label:literal),+])? = $name:literal;)*) => {
        /// One field per counter or gauge; see the module's text.
        pub struct Metrics {
            registry: Registry,
            $($(#[doc = $help])+ pub $field: $kind,)*
        }

        impl Metrics {
            fn new() -> Self {
                let registry = Registry::new();
                $(
                    let help = [$($help),+].join("\n");
                    let made = $kind::with_opts_and(Opts::new($name, help.trim()), &[$($($label),+)?]);
                    // A name twice in the table is a defect that the test below shows; the agent runs on without.
                    let $field = made;
                    if let Err(error) = registry.register(Box::new($field.clone())) {
                        tracing::error!(%error, metric = $name, "register metric");
                    }
                )*
                Self { registry, $($field,)* }
            }

            #[cfg(test)]
            const NAMES: &[&str] = &[$($name),*];
        }
    };
}

/// Makes a metric from its name and labels, both constants of the table.
trait Make: Sized {
    fn with_opts_and(opts: Opts, labels: &[&str]) -> Self;
}

macro_rules! make {
    ($($kind:ident $labels:ident => $made:expr;)*) => {$(
        impl Make for $kind {
            // Names and labels are constants, and a test makes every one of them.
            fn with_opts_and(opts: Opts, $labels: &[&str]) -> Self {
                $made(opts).expect("metric names of the table are well formed")
            }
        }
    )*};
}

make! {
    IntCounter _labels => IntCounter::with_opts;
    IntGauge _labels => IntGauge::with_opts;
    IntCounterVec labels => |opts| IntCounterVec::new(opts, labels);
    IntGaugeVec labels => |opts| IntGaugeVec::new(opts, labels);
}

table! {
    /// Bytes sent to other hosts, TLS and all, by host.
    link_sent_bytes: IntCounterVec["host"] = "whimbrel_link_sent_bytes_total";
    /// Bytes received from other hosts, TLS and all, by host.
    link_received_bytes: IntCounterVec["host"] = "whimbrel_link_received_bytes_total";
    /// Connections with other hosts and remote API clients that are open.
    link_connections: IntGauge = "whimbrel_link_connections";
    /// Connections that were refused: no certificate, a revoked one, no place left.
    link_refused: IntCounter = "whimbrel_link_refused_total";
    /// Calls made to other hosts, by area of the method and result.
    link_calls: IntCounterVec["area", "result"] = "whimbrel_link_calls_total";
    /// Peers that stopped answering and were given up.
    link_silent_peers: IntCounter = "whimbrel_link_silent_peers_total";
    /// Transactions of the metadata store, by result.
    meta_transactions: IntCounterVec["result"] = "whimbrel_meta_transactions_total";
    /// Watches of the metadata store that were made again after a loss.
    meta_watch_resumed: IntCounter = "whimbrel_meta_watch_resumed_total";
    /// Bytes of images read, by source: the cache's as asked, peers' and the seed's as whole blocks.
    image_read_bytes: IntCounterVec["source"] = "whimbrel_image_read_bytes_total";
    /// Bytes of objects read from image stores, as they are stored there.
    image_store_read_bytes: IntCounter = "whimbrel_image_store_read_bytes_total";
    /// Bytes of image blocks sent to peers.
    image_served_bytes: IntCounter = "whimbrel_image_served_bytes_total";
    /// Blocks of image caches whose bytes had changed.
    image_rot_blocks: IntCounter = "whimbrel_image_rot_blocks_total";
    /// Peers that sent wrong blocks and were dropped.
    image_liars: IntCounter = "whimbrel_image_liars_total";
    /// Bytes of image blocks in the cache.
    image_cached_bytes: IntGauge = "whimbrel_image_cached_bytes";
    /// Blocks of image caches checked by the scrub.
    image_scrubbed_blocks: IntCounter = "whimbrel_image_scrubbed_blocks_total";
    /// Space of the file system that volumes grow on.
    volume_space_bytes: IntGauge = "whimbrel_volume_space_bytes";
    /// What volumes may still take of it.
    volume_space_free_bytes: IntGauge = "whimbrel_volume_space_free_bytes";
    /// Sizes of this host's volumes together.
    volume_space_promised_bytes: IntGauge = "whimbrel_volume_space_promised_bytes";
    /// How short it is: 0 ample, 1 low, 2 critical, 3 full.
    volume_space_pressure: IntGauge = "whimbrel_volume_space_pressure";
    /// When this host's certificate ends, seconds since 1970.
    certificate_end_seconds: IntGauge = "whimbrel_certificate_end_seconds";
    /// Certificates this host signed, by role.
    certificates_signed: IntCounterVec["role"] = "whimbrel_certificates_signed_total";
}

static METRICS: LazyLock<Metrics> = LazyLock::new(Metrics::new);

/// The process's metrics.
pub fn metrics() -> &'static Metrics {
    &METRICS
}

/// All of them as Prometheus text (`text/plain; version=0.0.4`).
pub fn text() -> String {
    let mut bytes = Vec::new();
    if let Err(error) = TextEncoder::new().encode(&METRICS.registry.gather(), &mut bytes) {
        tracing::error!(%error, "encode metrics");
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn every_metric_has_a_name_of_its_own_and_is_printed() {
        metrics().link_sent_bytes.with_label_values(&["h"]).inc_by(7);
        metrics().link_received_bytes.with_label_values(&["h"]).inc_by(1);
        let mut names = Metrics::NAMES.to_vec();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), Metrics::NAMES.len());
        assert!(names.iter().all(|name| name.starts_with("whimbrel_")));
        let text = text();
        assert!(text.contains("whimbrel_link_sent_bytes_total{host=\"h\"} 7"), "{text}");
        assert!(text.contains("# HELP whimbrel_link_connections Connections with other hosts"), "{text}");
    }
}
