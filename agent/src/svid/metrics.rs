//! What is counted of SVIDs, the tunnel's and the Workload API's alike.

use std::time::Duration;

use jiff::Timestamp;

use super::{SvidStatus, issuer::IssueError};
use crate::telemetry::metrics::{self, Counters, Durations, Metrics, Reading};

/// What an SVID is for: the label `use`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Purpose {
    /// The agent's own end of tunnels.
    #[default]
    Tunnel,
    /// Handed out by the Workload API.
    Workload,
    /// The certificate of the observer's listener.
    Observer,
}

impl Purpose {
    /// The label's value.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Tunnel => "tunnel",
            Self::Workload => "workload",
            Self::Observer => "observer",
        }
    }
}

/// Requests for SVIDs; cheap to clone.
#[derive(Clone, Debug)]
pub struct SvidMetrics {
    requests: Counters<3>,
    took: Durations<1>,
}

impl Default for SvidMetrics {
    fn default() -> Self {
        Self { requests: Counters::default(), took: metrics::durations() }
    }
}

impl SvidMetrics {
    /// With both registered.
    pub fn register(metrics: &mut Metrics) -> Self {
        let new = Self::default();
        metrics.counters(
            "svid_requests",
            "Requests for SVIDs, first ones and renewals, by result",
            &new.requests,
        );
        metrics.durations(
            "svid_request_duration_seconds",
            "How long the authority took to answer requests for SVIDs, refusals too",
            &new.took,
        );
        new
    }

    /// Counts a request that was answered, or was not.
    pub(super) fn answered<T>(
        &self,
        purpose: Purpose,
        renewal: bool,
        result: &Result<T, IssueError>,
        took: Duration,
    ) {
        let outcome = result.as_ref().map_or_else(IssueError::kind, |_| "issued");
        let kind = if renewal { "renewal" } else { "first" };
        let labels = [("use", purpose.name()), ("kind", kind), ("result", outcome)];
        self.requests.get_or_create(&labels).inc();
        self.took.get_or_create(&[("use", purpose.name())]).observe(took.as_secs_f64());
    }
}

/// The SVIDs of a moment, by what they are for. Identities are no labels: there may be many.
pub fn readings(now: Timestamp, held: &[(Purpose, Vec<SvidStatus<()>>)]) -> Vec<Reading> {
    let mut svids = Reading::gauge("svids", "SVIDs that are wanted, by state");
    let mut failing =
        Reading::gauge("svids_failing", "SVIDs whose last request failed, valid or not");
    let mut age = Reading::gauge(
        "svid_oldest_age_ratio",
        "Of the valid SVID that has used most of its life, how much that is",
    );
    let mut expiry =
        Reading::gauge("svid_next_expiry_timestamp_seconds", "When the next valid SVID runs out");
    for (purpose, held) in held {
        let purpose = *purpose;
        let mut count = [0usize; 3];
        let (mut oldest, mut next) = (None::<f64>, None::<Timestamp>);
        for status in held {
            let state = match (status.validity, status.obtained) {
                (None, _) => 2,
                (Some((_, until)), _) if until <= now => 1,
                (Some((_, until)), obtained) => {
                    let since = obtained.unwrap_or(now);
                    oldest = Some(oldest.unwrap_or(0.0).max(used(since, until, now)));
                    next = Some(next.map_or(until, |next| next.min(until)));
                    0
                }
            };
            count[state] += 1;
        }
        for (state, count) in ["valid", "expired", "missing"].into_iter().zip(count) {
            let labels = vec![("use", purpose.name().into()), ("state", state.into())];
            svids = svids.labelled(labels, count);
        }
        let failed = held.iter().filter(|status| status.failures > 0).count();
        failing = failing.with("use", purpose.name(), failed);
        age = age.each("use", oldest.map(|ratio| (purpose.name(), ratio)));
        expiry = expiry.each("use", next.map(|at| (purpose.name(), at)));
    }
    vec![svids, failing, age, expiry]
}

/// How much of the time from `since` to `until` is gone, from 0 to 1.
pub fn used(since: Timestamp, until: Timestamp, now: Timestamp) -> f64 {
    let seconds = |from: Timestamp, to: Timestamp| to.duration_since(from).as_secs_f64();
    (seconds(since, now) / seconds(since, until).max(f64::EPSILON)).clamp(0.0, 1.0)
}

#[cfg(test)]
mod tests {
    use jiff::SignedDuration;

    use super::*;
    use crate::spiffe::SpiffeId;

    #[test]
    fn a_moments_svids_by_state() {
        let at = |seconds: i64| Timestamp::from_second(1_800_000_000 + seconds).unwrap();
        let status = |obtained: Option<i64>, failures| SvidStatus {
            key: (),
            id: SpiffeId::parse("spiffe://td/a").unwrap(),
            obtained: obtained.map(at),
            validity: obtained.map(|from| (at(from - 300), at(from + 100))),
            next_request: at(0),
            failures,
            last_error: None,
        };
        let tunnel = vec![status(Some(0), 0), status(Some(20), 1), status(Some(-60), 1)];
        let held = [(Purpose::Tunnel, tunnel), (Purpose::Workload, vec![status(None, 3)])];
        let mut metrics = Metrics::default();
        let readings = readings(at(50), &held);
        metrics.read(move || readings.clone());
        let text = metrics.text().unwrap();
        let expiry = at(100).as_second();
        for line in [
            "signet_svids{use=\"tunnel\",state=\"valid\"} 2.0",
            "signet_svids{use=\"tunnel\",state=\"expired\"} 1.0",
            "signet_svids{use=\"workload\",state=\"missing\"} 1.0",
            "signet_svids_failing{use=\"tunnel\"} 2.0",
            "signet_svids_failing{use=\"workload\"} 1.0",
            // Since it was obtained: that it is backdated does not age it.
            "signet_svid_oldest_age_ratio{use=\"tunnel\"} 0.5",
            &format!("signet_svid_next_expiry_timestamp_seconds{{use=\"tunnel\"}} {expiry}.0"),
        ] {
            assert!(text.lines().any(|l| l == line), "{line} is not in\n{text}");
        }
        assert!(!text.contains("age_ratio{use=\"workload\"}"), "there is none: {text}");
        let day = SignedDuration::from_hours(24);
        assert_eq!((used(at(0), at(0), at(1)), used(at(0) + day, at(0), at(1))), (1.0, 0.0));
    }
}
