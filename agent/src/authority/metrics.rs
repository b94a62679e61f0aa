//! What the authority counts. No label names a node or an identity: there may be many, and
//! whoever may read metrics need not know them; the audit log does.

use std::time::Duration;

use arc_swap::ArcSwap;
use jiff::Timestamp;
use tonic::Code;

use super::{
    keeper::{Reports, Signing},
    state::Phase,
};
use crate::{
    spiffe::Bundle,
    telemetry::metrics::{self, Counters, Durations, Metrics, Reading},
};

/// The methods that there are; a path of the caller's making is no label.
const METHODS: [&str; 4] = ["CreateCertificate", "FetchJWTSVID", "GetBundle", "ReportBundle"];

/// Requests, audit lines, handshakes; cheap to clone.
#[derive(Clone, Debug)]
pub struct AuthorityMetrics {
    requests: Counters<3>,
    took: Durations<1>,
    audit: Counters<3>,
    left_out: Counters<0>,
    handshakes: Counters<2>,
    turns: Counters<1>,
}

impl AuthorityMetrics {
    /// With all of them registered.
    pub fn register(metrics: &mut Metrics) -> Self {
        let new = Self {
            requests: Counters::default(),
            took: metrics::durations(),
            audit: Counters::default(),
            left_out: Counters::default(),
            handshakes: Counters::default(),
            turns: Counters::default(),
        };
        metrics.counters(
            "authority_requests",
            "Requests by method, by whether the caller is a node's agent, and by code",
            &new.requests,
        );
        metrics.durations(
            "authority_request_duration_seconds",
            "How long requests of node agents took",
            &new.took,
        );
        metrics.counters(
            "authority_audit_events",
            "What was issued and what was refused, by method and reason",
            &new.audit,
        );
        metrics.counters(
            "authority_audit_lines_left_out",
            "Audit lines about unknown callers that were counted only",
            &new.left_out,
        );
        metrics.counters(
            "authority_handshakes",
            "Connections by listener and how their TLS handshake ended",
            &new.handshakes,
        );
        metrics.counters(
            "authority_store_turns",
            "Looks at the shared document, by result",
            &new.turns,
        );
        new
    }

    /// Counts an answered request; `took` is that of a known caller.
    pub fn request(&self, path: &str, code: Code, took: Option<Duration>) {
        let method = method(path);
        let caller = if took.is_some() { "agent" } else { "unknown" };
        let labels = [("method", method), ("caller", caller), ("code", code_name(code))];
        self.requests.get_or_create(&labels).inc();
        if let Some(took) = took {
            self.took.get_or_create(&[("method", method)]).observe(took.as_secs_f64());
        }
    }

    /// Counts what an audit line says.
    pub fn audit(&self, outcome: &'static str, path: &str, reason: &'static str) {
        let labels = [("outcome", outcome), ("method", method(path)), ("reason", reason)];
        self.audit.get_or_create(&labels).inc();
    }

    /// Counts an audit line that was not written.
    pub fn left_out(&self) {
        self.left_out.get_or_create(&[]).inc();
    }

    /// Counts a connection by how its handshake ended.
    pub fn handshake(&self, listener: &'static str, result: &'static str) {
        self.handshakes.get_or_create(&[("listener", listener), ("result", result)]).inc();
    }

    /// Counts a look at the shared document.
    pub fn turn(&self, good: bool) {
        self.turns.get_or_create(&[("result", if good { "ok" } else { "failed" })]).inc();
    }
}

/// What the replica signs with at a moment, and how far a rotation has come.
pub fn readings(
    signing: &ArcSwap<Signing>,
    rotation: Option<(Phase, Timestamp)>,
    reports: &Reports,
) -> Vec<Reading> {
    let signing = signing.load();
    let gauge = Reading::gauge;
    let ends = signing.bundle.expiries();
    let phase = rotation.map_or("none", |(phase, _)| phase.name());
    let phases = ["none", Phase::Published.name(), Phase::Signing.name()];
    vec![
        gauge("authority_roots", "Roots in the bundle").value(ends.len()),
        gauge("authority_bundle_sequence", "Grows with each change of the bundle")
            .value(signing.sequence),
        gauge("authority_jwt_keys", "Keys in the JWT bundle")
            .value(signing.jwt_bundle.iter().len()),
        gauge("authority_expiry_timestamp_seconds", "When what the replica signs with runs out")
            .each("what", ends.iter().max().map(|at| ("last_root", *at)))
            .with("what", "intermediate", signing.intermediate.not_after())
            .with("what", "serving_certificate", signing.serving_until()),
        gauge("authority_rotation_phase", "1 for the phase in which a root's rotation is")
            .each("phase", phases.map(|name| (name, name == phase))),
        gauge("authority_rotation_since_timestamp_seconds", "Since when it is in that phase")
            .each("phase", rotation.map(|(phase, since)| (phase.name(), since))),
        bundle_reports(&signing.bundle, reports),
    ]
}

fn bundle_reports(bundle: &Bundle, reports: &Reports) -> Reading {
    let (current, others) = reports.count(&bundle.digest());
    Reading::gauge(
        "authority_bundle_reports",
        "Nodes whose agent told this replica which bundle it has, by whether it is the present one",
    )
    .each("bundle", [("current", current), ("other", others)])
}

/// The method of a path, from a list.
fn method(path: &str) -> &'static str {
    let name = path.rsplit('/').next().unwrap_or(path);
    METHODS.into_iter().find(|method| *method == name).unwrap_or("other")
}

const fn code_name(code: Code) -> &'static str {
    match code {
        Code::Ok => "Ok",
        Code::Cancelled => "Cancelled",
        Code::InvalidArgument => "InvalidArgument",
        Code::DeadlineExceeded => "DeadlineExceeded",
        Code::NotFound => "NotFound",
        Code::PermissionDenied => "PermissionDenied",
        Code::ResourceExhausted => "ResourceExhausted",
        Code::OutOfRange => "OutOfRange",
        Code::Unimplemented => "Unimplemented",
        Code::Internal => "Internal",
        Code::Unavailable => "Unavailable",
        Code::Unauthenticated => "Unauthenticated",
        // None of the services answers with these.
        Code::Unknown
        | Code::AlreadyExists
        | Code::FailedPrecondition
        | Code::Aborted
        | Code::DataLoss => "other",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_caller_writes_makes_no_series() {
        let mut registry = Metrics::default();
        let metrics = AuthorityMetrics::register(&mut registry);
        let took = Some(Duration::from_millis(3));
        metrics.request("/signet.v1.Authority/GetBundle", Code::Ok, took);
        for n in 0..1000 {
            metrics.request(&format!("/made/up{n}"), Code::Unauthenticated, None);
            metrics.audit("refused", &format!("/made/up{n}"), "unauthenticated");
        }
        let text = registry.text().unwrap();
        for line in [
            "signet_authority_requests_total{method=\"GetBundle\",caller=\"agent\",code=\"Ok\"} 1",
            "signet_authority_requests_total{method=\"other\",caller=\"unknown\",code=\"Unauthenticated\"} 1000",
            "signet_authority_audit_events_total{outcome=\"refused\",method=\"other\",reason=\"unauthenticated\"} 1000",
            "signet_authority_request_duration_seconds_count{method=\"GetBundle\"} 1",
        ] {
            assert!(text.lines().any(|l| l == line), "{line} is not in\n{text}");
        }
        assert!(!text.contains("up9"), "{text}");
    }
}
