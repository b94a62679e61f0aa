//! `signet svid list`, assembled: every SVID that this agent holds or wants.

use jiff::Timestamp;

use super::{
    inputs::{StatusInputs, SvidFacts, SvidState},
    status::is_failed,
};
use crate::proto::{self, admin};

/// The answer for a moment: the tunnels' by identity, then pods' own by pod.
pub fn assemble(inputs: &StatusInputs, now: Timestamp) -> admin::ListSvidsResponse {
    let mut svids: Vec<_> =
        inputs.svids.iter().map(|facts| held(facts, "tunnel", "", now)).collect();
    let mut own: Vec<_> = inputs
        .workload_svids
        .iter()
        .map(|(pod, facts)| held(facts, "workload", pod, now))
        .collect();
    svids.sort_by(|a, b| a.identity.cmp(&b.identity));
    own.sort_by(|a, b| a.pod.cmp(&b.pod));
    svids.extend(own);
    admin::ListSvidsResponse { node: inputs.node.to_string(), svids }
}

fn held(facts: &SvidFacts, used_for: &str, pod: &str, now: Timestamp) -> admin::HeldSvid {
    let (state, validity) = match facts.state {
        SvidState::Issued { not_before, not_after, .. } if not_after > now => {
            ("valid", Some((not_before, not_after)))
        }
        SvidState::Issued { not_before, not_after, .. } => {
            ("expired", Some((not_before, not_after)))
        }
        SvidState::Missing if is_failed(facts, now) => ("failed", None),
        SvidState::Missing => ("missing", None),
    };
    admin::HeldSvid {
        identity: facts.id.to_string(),
        r#use: used_for.into(),
        pod: pod.into(),
        state: state.into(),
        not_before: validity.map(|(from, _)| proto::timestamp(from)),
        not_after: validity.map(|(_, until)| proto::timestamp(until)),
        next_attempt: facts.next_attempt.map(proto::timestamp),
        error: facts.error.clone().unwrap_or_default(),
    }
}
