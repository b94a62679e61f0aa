//! A flow's two records: the verdict when it is decided, the end when it ends.

use std::{
    net::SocketAddr,
    sync::atomic::Ordering,
    time::{Duration, Instant},
};

use signet_ebpf::abi::{Direction, Reason, Verdict, proto};
use uuid::Uuid;

use super::judge::Judgement;
use crate::{
    cluster::model::{ObjectName, Pod},
    endpoint::state::NodeState,
    flow::{
        Recorder,
        record::{FlowEvent, FlowRecord, HttpRecord, KnownBy, Party, Reporter, Via},
    },
    policy::model::PolicyName,
    spiffe::SpiffeId,
    tunnel::copy::{CopyError, Counts},
};

/// A known pod as one side of a flow.
pub fn pod_party(
    pod: &Pod,
    identity: Option<SpiffeId>,
    known_by: KnownBy,
    address: SocketAddr,
    service: Option<&ObjectName>,
) -> Party {
    Party {
        identity,
        known_by,
        service: service.map(|s| format!("{}/{}", s.namespace, s.name).into()),
        ..Party::of_pod(pod, address)
    }
}

/// Writes a flow's records.
pub struct FlowRecords {
    recorder: Recorder,
    record: FlowRecord,
    decided: Instant,
}

impl FlowRecords {
    /// A flow that one of this node's endpoints sees in `direction`; nothing is recorded yet.
    pub fn new(
        recorder: &Recorder,
        state: &NodeState,
        uuid: Uuid,
        direction: Direction,
        source: Party,
        destination: Party,
    ) -> Self {
        let reporter = match direction {
            Direction::Egress => Reporter::Source,
            Direction::Ingress => Reporter::Destination,
        };
        let record = FlowRecord {
            time: jiff::Timestamp::now(),
            event: FlowEvent::Verdict,
            uuid,
            node: state.node.clone(),
            reporter,
            direction,
            protocol: proto::TCP,
            via: Via::Mtls,
            verdict: Verdict::Dropped,
            reason: Reason::Internal,
            policy: None,
            revision: state.revision,
            extra: Vec::new(),
            http: None,
            source,
            destination,
        };
        Self { recorder: recorder.clone(), record, decided: Instant::now() }
    }

    /// How it travels, when not through a tunnel.
    pub fn via(&mut self, via: Via) {
        self.record.via = via;
    }

    /// What is learnt of the destination on the way.
    pub fn set_destination(&mut self, destination: Party) {
        self.record.destination = destination;
    }

    /// Adds a `key=value` pair to the next record.
    pub fn note(&mut self, key: &'static str, value: String) {
        self.record.extra.push((key, value));
    }

    /// Records that the flow passes.
    pub fn passed(&mut self, judgement: &Judgement) {
        self.record.verdict = judgement.verdict;
        self.decide(judgement.reason, judgement.policy.clone(), judgement.revision);
    }

    /// Records that the flow is refused.
    pub fn refused(&mut self, reason: Reason, policy: Option<PolicyName>, revision: u64) {
        self.record.verdict = Verdict::Dropped;
        self.decide(reason, policy, revision);
    }

    fn decide(&mut self, reason: Reason, policy: Option<PolicyName>, revision: u64) {
        self.record.reason = reason;
        self.record.policy = policy;
        self.record.revision = revision;
        self.record.time = jiff::Timestamp::now();
        self.decided = Instant::now();
        self.recorder.record(self.record.clone());
        self.record.extra.clear();
    }

    /// Writes the records of the flow's requests.
    pub fn of_requests(&self) -> RequestRecords {
        RequestRecords { recorder: self.recorder.clone(), record: self.record.clone() }
    }

    /// Records how a flow that had passed ended: cut with its connection, closed because of
    /// `close_reason`, broken by somebody, or in order.
    pub fn closed(
        self,
        counts: &Counts,
        result: Result<(), CopyError>,
        cut_for: Option<Reason>,
        close_reason: Option<Reason>,
    ) {
        match (result, cut_for) {
            (Ok(()), _) => self.ended(counts, Reason::Allowed, None),
            (Err(_), Some(reason)) => self.ended(counts, reason, None),
            (Err(CopyError::Stopped), None) => {
                self.ended(counts, close_reason.unwrap_or(Reason::Internal), None);
            }
            (Err(error), None) => self.ended(counts, Reason::Allowed, Some(error.broken_by())),
        }
    }

    /// Records the end of a flow that had passed. `closed_by` names who broke it, if
    /// anybody did.
    pub fn ended(mut self, counts: &Counts, reason: Reason, closed_by: Option<&'static str>) {
        let (from_app, to_app) =
            (counts.from_app.load(Ordering::Relaxed), counts.to_app.load(Ordering::Relaxed));
        // The application is the client where we report as the source.
        let (sent, received) = match self.record.reporter {
            Reporter::Source => (from_app, to_app),
            Reporter::Destination => (to_app, from_app),
        };
        let duration: Duration = self.decided.elapsed();
        self.record.event = FlowEvent::End { sent, received, duration };
        self.record.reason = reason;
        if let Some(by) = closed_by {
            self.note("resetBy", by.to_owned());
        }
        self.record.time = jiff::Timestamp::now();
        self.recorder.record(self.record);
    }
}

/// Writes a record for each request of a flow.
pub struct RequestRecords {
    recorder: Recorder,
    /// The flow's.
    record: FlowRecord,
}

impl RequestRecords {
    /// Records that a request was forwarded, and how it was answered.
    pub fn passed(&self, judgement: &Judgement, http: HttpRecord) {
        let Judgement { verdict, reason, policy, revision } = judgement;
        self.record(*verdict, *reason, policy.clone(), *revision, http);
    }

    /// Records that a request was refused.
    pub fn refused(
        &self,
        reason: Reason,
        policy: Option<PolicyName>,
        revision: u64,
        http: HttpRecord,
    ) {
        self.record(Verdict::Dropped, reason, policy, revision, http);
    }

    fn record(
        &self,
        verdict: Verdict,
        reason: Reason,
        policy: Option<PolicyName>,
        revision: u64,
        http: HttpRecord,
    ) {
        self.recorder.record(FlowRecord {
            time: jiff::Timestamp::now(),
            event: FlowEvent::Verdict,
            verdict,
            reason,
            policy,
            revision,
            extra: Vec::new(),
            http: Some(Box::new(http)),
            ..self.record.clone()
        });
    }
}
