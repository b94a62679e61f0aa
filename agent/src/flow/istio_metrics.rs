//! Istio's metrics of connections (the standard "TCP" ones), by its names and labels, so that
//! dashboards made for Istio show what Signet carries.
//!
//! They are counted by the task that keeps the records, off the data path, from the records that
//! reach it; what is lost before is in `signet_lost_events_total`. Only connections that the
//! proxy carried are opened and closed: nobody sees the end of one that went in clear. As in
//! Istio, `sent` is what the server sent and `received` what the client sent, whoever reports
//! (Istio issue 32399), and a principal is only one that a certificate proved.
//!
//! The number of series is bounded: a series is of a pair of workloads, not of pods, there is
//! room for [`MAX_SERIES`], and it goes a minute after the last pod of this node that it was
//! counted for.

use std::{
    collections::{HashMap, HashSet},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant, SystemTime},
};

use prometheus_client::metrics::{
    counter::Counter, exemplar::CounterWithExemplar, family::Family, histogram::Histogram,
};
use signet_ebpf::abi::{Reason, Verdict};

use super::record::{FlowEvent, FlowRecord, KnownBy, Party, Reporter, Via};
use crate::telemetry::metrics::{Metrics, Reading};

/// Series of each metric; further pairs of workloads are counted as left out.
const MAX_SERIES: usize = 4096;
/// A series stays so long after its pods: long enough for the last scrapes to see its end.
const LINGER: Duration = Duration::from_secs(60);
/// What Istio writes where it knows nothing.
const UNKNOWN: &str = "unknown";
/// IANA's number of TCP.
const TCP: u8 = 6;

/// Buckets of request durations.
const MILLISECONDS: [f64; 20] = [
    0.5, 1.0, 5.0, 10.0, 25.0, 50.0, 100.0, 250.0, 500.0, 1e3, 2.5e3, 5e3, 1e4, 3e4, 6e4, 3e5, 6e5,
    1.8e6, 3.6e6, 7.2e6,
];

type Labels = Vec<(&'static str, Arc<str>)>;
type Counts = Family<Labels, Counter>;
type Durations = Family<Labels, Histogram, fn() -> Histogram>;
type CountsWithFlow = Family<Labels, CounterWithExemplar<[(&'static str, String); 1]>>;
/// Namespace and name.
type PodName = (Arc<str>, Arc<str>);

/// Counts connections; clones count the same.
#[derive(Clone, Debug, Default)]
pub struct IstioMetrics(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    requests: Counts,
    durations: Durations,
    opened: CountsWithFlow,
    closed: Counts,
    failed: CountsWithFlow,
    sent: Counts,
    received: Counts,
    left_out: AtomicU64,
    series: Mutex<HashMap<Key, Series>>,
}

impl Default for Shared {
    fn default() -> Self {
        Self {
            requests: Counts::default(),
            // Istio's own buckets, milliseconds.
            durations: Family::new_with_constructor(|| Histogram::new(MILLISECONDS)),
            opened: Family::default(),
            closed: Family::default(),
            failed: Family::default(),
            sent: Family::default(),
            received: Family::default(),
            left_out: AtomicU64::new(0),
            series: Mutex::default(),
        }
    }
}

/// What tells one series from another; cheap to make from a record.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
struct Key {
    reporter: Reporter,
    mutual_tls: bool,
    flags: &'static str,
    source: Side,
    destination: Side,
    /// `namespace/name`.
    service: Option<Arc<str>>,
    /// Of requests: the protocol and the status.
    request: Option<(&'static str, u16)>,
}

#[derive(Clone, PartialEq, Eq, Hash, Debug)]
struct Side {
    namespace: Option<Arc<str>>,
    workload: Option<Arc<str>>,
    principal: Option<Arc<str>>,
    app: Option<Arc<str>>,
    version: Option<Arc<str>>,
    canonical_name: Option<Arc<str>>,
    canonical_revision: Option<Arc<str>>,
}

#[derive(Debug)]
struct Series {
    labels: Labels,
    /// Pods of this node that it was counted for.
    pods: HashSet<PodName>,
    /// Since when none of them is left.
    orphaned: Option<Instant>,
}

impl IstioMetrics {
    /// Adds them to what is served, under Istio's own names.
    pub fn register(&self, metrics: &mut Metrics) {
        let Shared { requests, durations, opened, closed, failed, sent, received, .. } = &*self.0;
        metrics.foreign("istio_requests", "HTTP requests that were judged", requests.clone());
        metrics.foreign(
            "istio_request_duration_milliseconds",
            "From a judged request's head to its answer's",
            durations.clone(),
        );
        metrics.foreign("istio_tcp_connections_opened", "Connections opened", opened.clone());
        metrics.foreign("istio_tcp_connections_closed", "Connections closed", closed.clone());
        metrics.foreign("istio_tcp_connections_failed", "Connections refused", failed.clone());
        metrics.foreign("istio_tcp_sent_bytes", "Bytes that servers sent", sent.clone());
        metrics.foreign("istio_tcp_received_bytes", "Bytes that clients sent", received.clone());
    }

    /// How many series there are, and what found no room.
    pub fn readings(&self) -> Vec<Reading> {
        let held = self.0.series.lock().unwrap_or_else(PoisonError::into_inner).len();
        vec![
            Reading::gauge("istio_series", "Pairs of workloads in Istio's metrics").value(held),
            Reading::counter("istio_series_left_out", "Connections that found no room in them")
                .value(self.0.left_out.load(Ordering::Relaxed)),
        ]
    }

    /// Counts a record; `carried`: the proxy made it.
    pub fn count(&self, record: &FlowRecord, carried: bool) {
        if record.protocol != TCP {
            return;
        }
        let shared = &*self.0;
        if let Some(http) = &record.http {
            if let Some(labels) = self.labels_of(record) {
                shared.requests.get_or_create(&labels).inc();
                let milliseconds = http.latency.as_secs_f64() * 1e3;
                shared.durations.get_or_create(&labels).observe(milliseconds);
            }
            return;
        }
        let flow =
            || (Some([("flow", record.uuid.to_string())]), Some(SystemTime::from(record.time)));
        match (&record.event, record.verdict) {
            (FlowEvent::Verdict, Verdict::Dropped) => {
                if let Some(labels) = self.labels_of(record) {
                    let (exemplar, time) = flow();
                    shared.failed.get_or_create(&labels).inc_by(1, exemplar, time);
                }
            }
            (FlowEvent::Verdict, Verdict::Forwarded | Verdict::Audit) if carried => {
                if let Some(labels) = self.labels_of(record) {
                    let (exemplar, time) = flow();
                    shared.opened.get_or_create(&labels).inc_by(1, exemplar, time);
                }
            }
            (FlowEvent::End { sent, received, .. }, _) if carried => {
                if let Some(labels) = self.labels_of(record) {
                    shared.closed.get_or_create(&labels).inc();
                    shared.sent.get_or_create(&labels).inc_by(*received);
                    shared.received.get_or_create(&labels).inc_by(*sent);
                }
            }
            _ => {}
        }
    }

    /// Forgets the series whose pods have been gone for a minute; `pods` are this node's.
    pub fn retain(&self, pods: &HashSet<PodName>, now: Instant) {
        let shared = &*self.0;
        let mut series = shared.series.lock().unwrap_or_else(PoisonError::into_inner);
        series.retain(|_, series| {
            series.pods.retain(|pod| pods.contains(pod));
            if !series.pods.is_empty() {
                series.orphaned = None;
                return true;
            }
            let since = *series.orphaned.get_or_insert(now);
            if now.saturating_duration_since(since) < LINGER {
                return true;
            }
            shared.opened.remove(&series.labels);
            shared.failed.remove(&series.labels);
            shared.durations.remove(&series.labels);
            for counts in [&shared.requests, &shared.closed, &shared.sent, &shared.received] {
                counts.remove(&series.labels);
            }
            false
        });
    }

    /// The labels of a record's series; `None`, which is counted, where there is no room for
    /// another one.
    fn labels_of(&self, record: &FlowRecord) -> Option<Labels> {
        let mut all = self.0.series.lock().unwrap_or_else(PoisonError::into_inner);
        let key = Key::of(record);
        let pod = record.reporting_party().pod.clone();
        if let Some(series) = all.get_mut(&key) {
            series.orphaned = None;
            series.pods.extend(pod);
            return Some(series.labels.clone());
        }
        if all.len() >= MAX_SERIES {
            self.0.left_out.fetch_add(1, Ordering::Relaxed);
            return None;
        }
        let labels = key.labels();
        let series =
            Series { labels: labels.clone(), pods: pod.into_iter().collect(), orphaned: None };
        all.insert(key, series);
        Some(labels)
    }
}

impl Key {
    fn of(record: &FlowRecord) -> Self {
        let mutual_tls = record.via == Via::Mtls;
        Self {
            reporter: record.reporter,
            mutual_tls,
            flags: response_flags(record.reason),
            source: Side::of(&record.source, mutual_tls),
            destination: Side::of(&record.destination, mutual_tls),
            service: record.destination.service.clone(),
            request: record.http.as_ref().map(|http| {
                let protocol = if http.version == "HTTP/2" { "http2" } else { "http" };
                // Applications may answer any number; those beyond HTTP's are one.
                let status = if (100..600).contains(&http.status) { http.status } else { 0 };
                (protocol, status)
            }),
        }
    }

    fn labels(&self) -> Labels {
        let words = |s: &str| Arc::<str>::from(s);
        let or_unknown = |value: &Option<Arc<str>>| value.clone().unwrap_or_else(|| words(UNKNOWN));
        let mut labels: Labels = vec![("reporter", words(self.reporter.name()))];
        let sides = [(&self.source, SOURCE), (&self.destination, DESTINATION)];
        for (side, names) in sides {
            let values = [
                &side.workload,
                &side.namespace,
                &side.principal,
                &side.app,
                &side.version,
                &None,
                &side.canonical_name,
                &side.canonical_revision,
            ];
            labels.extend(names.into_iter().zip(values).map(|(n, v)| (n, or_unknown(v))));
        }
        let service = self.service.as_deref().and_then(|service| service.split_once('/'));
        let (host, namespace, name) = match service {
            Some((namespace, name)) => {
                (words(&format!("{name}.{namespace}.svc")), words(namespace), words(name))
            }
            None => (words(UNKNOWN), words(UNKNOWN), words(UNKNOWN)),
        };
        labels.extend([
            ("destination_service", host),
            ("destination_service_namespace", namespace),
            ("destination_service_name", name),
            ("request_protocol", words(self.request.map_or("tcp", |(protocol, _)| protocol))),
            ("response_flags", words(self.flags)),
            (
                "connection_security_policy",
                words(if self.mutual_tls { "mutual_tls" } else { UNKNOWN }),
            ),
        ]);
        if let Some((_, status)) = self.request {
            labels.push(("response_code", words(&status.to_string())));
        }
        labels
    }
}

const SOURCE: [&str; 8] = [
    "source_workload",
    "source_workload_namespace",
    "source_principal",
    "source_app",
    "source_version",
    "source_cluster",
    "source_canonical_service",
    "source_canonical_revision",
];

const DESTINATION: [&str; 8] = [
    "destination_workload",
    "destination_workload_namespace",
    "destination_principal",
    "destination_app",
    "destination_version",
    "destination_cluster",
    "destination_canonical_service",
    "destination_canonical_revision",
];

impl Side {
    fn of(party: &Party, mutual_tls: bool) -> Self {
        let label = |names: &[&str]| names.iter().find_map(|name| party.labels.get(*name)).cloned();
        let workload = party
            .workload
            .as_ref()
            .map(|workload| workload.name.clone())
            // A pod that nothing runs is its own workload.
            .or_else(|| party.pod.as_ref().map(|(_, name)| name.clone()));
        // The tunnel's own end is attested by the kernel, and shows its SVID to the other.
        let is_proven = mutual_tls && matches!(party.known_by, KnownBy::Mtls | KnownBy::Kernel);
        let canonical = ["service.istio.io/canonical-name", "app.kubernetes.io/name", "app"];
        let revision =
            ["service.istio.io/canonical-revision", "app.kubernetes.io/version", "version"];
        let latest = party.pod.is_some().then(|| Arc::from("latest"));
        Self {
            namespace: party.pod.as_ref().map(|(namespace, _)| namespace.clone()),
            principal: party
                .identity
                .as_ref()
                .filter(|_| is_proven)
                .map(|identity| identity.to_string().into()),
            app: label(&["app"]),
            version: label(&["version"]),
            canonical_name: label(&canonical).or_else(|| workload.clone()),
            canonical_revision: label(&revision).or(latest),
            workload,
        }
    }
}

/// Why a connection ended or was refused, as ztunnel abbreviates it.
fn response_flags(reason: Reason) -> &'static str {
    match reason {
        Reason::Allowed => "-",
        Reason::PolicyDeny
        | Reason::PolicyNoMatch
        | Reason::PolicyUnsupported
        | Reason::PlaintextRefused
        | Reason::RawPacket
        | Reason::TokenInvalid
        | Reason::RightWithdrawn => "DENY",
        Reason::IdentityUnknown
        | Reason::IdentityMismatch
        | Reason::PodUnregistered
        | Reason::SvidMissing
        | Reason::SvidExpired
        | Reason::UntrustedPeer
        | Reason::HandshakeFailed
        | Reason::SourceNotPreserved => "IDENTITY",
        // No peer, no room, no answer.
        _ => "CONNECT",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::flow::example::{allowed, as_source, denied, ended, request_refused};

    #[test]
    fn requests_are_counted_by_status_and_are_no_connections() {
        let counted = IstioMetrics::default();
        counted.count(&request_refused(), true);
        counted.count(&request_refused(), true);
        let text = text(&counted);
        let requests = line(&text, "istio_requests_total");
        for label in
            ["response_code=\"403\"", "request_protocol=\"http\"", "reporter=\"destination\""]
        {
            assert!(requests.contains(label), "{requests}");
        }
        assert!(requests.ends_with(" 2"), "{requests}");
        let durations = line(&text, "istio_request_duration_milliseconds_count");
        assert!(durations.ends_with(" 2"), "{durations}");
        assert!(!text.contains("istio_tcp_connections_failed_total{"), "{text}");
    }

    fn text(counted: &IstioMetrics) -> String {
        let mut metrics = Metrics::default();
        counted.register(&mut metrics);
        metrics.text().unwrap()
    }

    fn line<'a>(text: &'a str, name: &str) -> &'a str {
        let mut found = text.lines().filter(|l| l.starts_with(&format!("{name}{{")));
        let line = found.next().unwrap_or_else(|| panic!("no {name} in\n{text}"));
        assert_eq!(found.next(), None, "{text}");
        line
    }

    #[test]
    fn a_connection_is_opened_closed_and_its_bytes_are_the_servers_and_the_clients() {
        for seen_by in [|r: &FlowRecord| r.clone(), |r: &FlowRecord| as_source(r)] {
            let counted = IstioMetrics::default();
            for record in [allowed(), ended()] {
                counted.count(&seen_by(&record), true);
            }
            let text = text(&counted);
            let opened = line(&text, "istio_tcp_connections_opened_total");
            let reporter = seen_by(&allowed()).reporter.name();
            for label in [
                &format!("reporter=\"{reporter}\""),
                "source_workload=\"frontend\"",
                "source_workload_namespace=\"shop\"",
                "source_principal=\"spiffe://cluster.local/ns/shop/sa/frontend\"",
                "source_app=\"frontend\"",
                "source_version=\"unknown\"",
                "source_canonical_service=\"frontend\"",
                "source_canonical_revision=\"latest\"",
                "destination_workload=\"payments-5b7f\"",
                "destination_service=\"payments.shop.svc\"",
                "destination_service_name=\"payments\"",
                "destination_service_namespace=\"shop\"",
                "request_protocol=\"tcp\"",
                "response_flags=\"-\"",
                "connection_security_policy=\"mutual_tls\"",
            ] {
                assert!(opened.contains(label), "{label} is not in {opened}");
            }
            // The exemplar leads from a graph to the flow.
            let exemplar = format!("}} 1 # {{flow=\"{}\"}} 1", allowed().uuid);
            assert!(opened.contains(&exemplar), "{opened}");
            for (name, value) in [
                ("istio_tcp_connections_closed_total", 1),
                ("istio_tcp_sent_bytes_total", 340),
                ("istio_tcp_received_bytes_total", 1204),
            ] {
                let line = line(&text, name);
                assert!(line.ends_with(&format!("}} {value}")), "{line}");
            }
            assert!(!text.contains("failed_total{"), "{text}");
        }
    }

    #[test]
    fn a_refused_connection_failed_and_says_how() {
        let counted = IstioMetrics::default();
        counted.count(&denied(), false);
        let text = text(&counted);
        let failed = line(&text, "istio_tcp_connections_failed_total");
        assert!(failed.contains("response_flags=\"DENY\""), "{failed}");
        assert!(!text.contains("opened_total{"), "{text}");
    }

    #[test]
    fn only_what_a_certificate_proved_is_a_principal() {
        let mut record = allowed();
        record.via = Via::Plaintext;
        record.source.known_by = KnownBy::Address;
        let counted = IstioMetrics::default();
        counted.count(&record, true);
        let text = text(&counted);
        let opened = line(&text, "istio_tcp_connections_opened_total");
        assert!(opened.contains("source_principal=\"unknown\""), "{opened}");
        assert!(opened.contains("connection_security_policy=\"unknown\""), "{opened}");
        assert!(opened.contains("source_workload=\"frontend\""), "{opened}");
    }

    #[test]
    fn what_the_kernel_let_pass_in_clear_and_other_protocols_are_not_connections() {
        let counted = IstioMetrics::default();
        counted.count(&allowed(), false);
        counted.count(&FlowRecord { protocol: 17, ..allowed() }, true);
        assert!(!text(&counted).contains("istio_tcp_connections_opened_total{"));
        counted.count(&allowed(), true);
        line(&text(&counted), "istio_tcp_connections_opened_total");
    }

    #[test]
    fn a_series_goes_a_minute_after_the_last_of_its_pods() {
        let counted = IstioMetrics::default();
        counted.count(&allowed(), true);
        let start = Instant::now();
        let here: HashSet<PodName> = [("shop".into(), "payments-5b7f".into())].into();
        let none = HashSet::new();
        counted.retain(&here, start + 10 * LINGER);
        line(&text(&counted), "istio_tcp_connections_opened_total");
        counted.retain(&none, start);
        counted.retain(&none, start + LINGER - Duration::from_secs(1));
        line(&text(&counted), "istio_tcp_connections_opened_total");
        counted.retain(&none, start + LINGER);
        assert!(!text(&counted).contains("opened_total{"));
        // It comes back with the next connection.
        counted.count(&allowed(), true);
        line(&text(&counted), "istio_tcp_connections_opened_total");
    }

    #[test]
    fn the_number_of_series_is_bounded_and_what_is_left_out_counted() {
        let counted = IstioMetrics::default();
        let of = |n: usize| {
            let mut record = allowed();
            record.source.workload = None;
            record.source.pod = Some(("shop".into(), format!("job-{n}").into()));
            record
        };
        for n in 0..MAX_SERIES + 3 {
            counted.count(&of(n), true);
        }
        counted.count(&of(0), true);
        let text = text(&counted);
        let lines =
            text.lines().filter(|l| l.starts_with("istio_tcp_connections_opened_total{")).count();
        assert_eq!((lines, counted.0.left_out.load(Ordering::Relaxed)), (MAX_SERIES, 3));
        assert!(text.contains("} 2 # {flow="), "the known one is counted on");
    }
}
