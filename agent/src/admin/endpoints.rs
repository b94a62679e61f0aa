//! `signet endpoints`, assembled: every pod of this node, also those that wait.

use std::{collections::HashMap, net::IpAddr, sync::Arc};

use jiff::Timestamp;
use signet_ebpf::abi::{Direction, Mode, Reason, Verdict};

use super::{
    inputs::{DropCount, StatusInputs, SvidFacts, SvidState},
    status::is_failed,
};
use crate::{
    cluster::model::{ModeOrigin, Pod},
    endpoint::state::{EndpointState, NodeState},
    flow::{FlowEvent, FlowLog, FlowRecord, Reporter, Via, recorder::Matches},
    proto::{self, admin},
    telemetry::{names, reason},
};

/// Drops shown per endpoint.
const MAX_DROPS: usize = 20;

/// The drops in the ring, newest last.
pub fn recent_drops(log: &FlowLog) -> Vec<Arc<FlowRecord>> {
    let drops: Matches =
        Arc::new(|r| r.verdict == Verdict::Dropped && r.event == FlowEvent::Verdict);
    log.recent(&drops)
}

/// The answer for a moment.
pub fn assemble(
    inputs: &StatusInputs,
    recent: &[Arc<FlowRecord>],
    request: &admin::EndpointsRequest,
    now: Timestamp,
) -> admin::EndpointsResponse {
    let mut endpoints = Vec::new();
    if let Some(state) = &inputs.state {
        for endpoint in state.endpoints.values() {
            endpoints.push(registered(inputs, state, endpoint, recent, now));
        }
        for waiting in &state.waiting {
            endpoints.push(admin::Endpoint {
                state: "waiting".into(),
                waiting: waiting.reason.clone(),
                revision: state.revision,
                ..of_pod(&waiting.pod)
            });
        }
    }
    endpoints.retain(|e| {
        let wanted = |asked: &str, is: &str| asked.is_empty() || asked == is;
        wanted(&request.namespace, &e.namespace) && wanted(&request.pod, &e.pod)
    });
    endpoints.sort_by(|a, b| (&a.namespace, &a.pod, a.netns).cmp(&(&b.namespace, &b.pod, b.netns)));
    admin::EndpointsResponse { node: inputs.node.to_string(), endpoints }
}

fn of_pod(pod: &Pod) -> admin::Endpoint {
    admin::Endpoint {
        namespace: pod.name.namespace.to_string(),
        pod: pod.name.name.to_string(),
        uid: pod.uid.to_string(),
        service_account: pod.service_account.to_string(),
        labels: pod.labels.iter().map(|(l, v)| (l.to_string(), v.to_string())).collect(),
        mode: names::mode(pod.mode).into(),
        mode_origin: match pod.mode_origin {
            ModeOrigin::Default => "default",
            ModeOrigin::Namespace => "namespace",
            ModeOrigin::Pod => "pod",
            ModeOrigin::InvalidLabel => "invalid-label",
            ModeOrigin::PeerAuthentication => "peer-authentication",
        }
        .into(),
        addresses: pod.ips.iter().map(ToString::to_string).collect(),
        ..Default::default()
    }
}

fn registered(
    inputs: &StatusInputs,
    state: &NodeState,
    endpoint: &EndpointState,
    recent: &[Arc<FlowRecord>],
    now: Timestamp,
) -> admin::Endpoint {
    let pod = &endpoint.pod;
    let (status, waiting) = match (&pod.unenforceable, endpoint.mode) {
        (Some(why), _) => ("unenforceable", why.to_string()),
        (None, Mode::Off) => ("off", String::new()),
        (None, Mode::Observe) => ("observed", String::new()),
        (None, Mode::Permissive | Mode::Strict) if endpoint.served => ("served", String::new()),
        (None, Mode::Permissive | Mode::Strict) => {
            ("starting", "its SVID, listeners or announcement are not in place yet".into())
        }
    };
    admin::Endpoint {
        mode: names::mode(endpoint.mode).into(),
        state: status.into(),
        waiting,
        cgroup: endpoint.cgroup_path.to_string(),
        cgroup_id: endpoint.cgroup,
        netns: endpoint.key.netns,
        identity: endpoint.identity.as_str().into(),
        identity_number: endpoint.identity_number,
        svid: svid(inputs, endpoint, now),
        policies: endpoint.policies.iter().map(|p| p.name.to_string()).collect(),
        default_deny: endpoint.default_deny,
        raw_guard: match endpoint.raw_guard {
            Some(kind) => kind.into(),
            None if endpoint.mode.is_enforced() => "none".into(),
            None => String::new(),
        },
        revision: state.revision,
        addresses: endpoint.addresses.iter().map(ToString::to_string).collect(),
        drops: drops(inputs, state, endpoint, recent),
        since: Some(proto::timestamp(endpoint.since)),
        ..of_pod(pod)
    }
}

fn svid(
    inputs: &StatusInputs,
    endpoint: &EndpointState,
    now: Timestamp,
) -> Option<admin::EndpointSvid> {
    let facts = inputs.svids.iter().find(|s| s.id == endpoint.identity)?;
    Some(svid_of(facts, now))
}

/// What there is of a tunnel SVID.
pub(super) fn svid_of(facts: &SvidFacts, now: Timestamp) -> admin::EndpointSvid {
    let (state, not_after) = match facts.state {
        SvidState::Issued { not_after, .. } if not_after > now => ("valid", Some(not_after)),
        SvidState::Issued { not_after, .. } => ("expired", Some(not_after)),
        SvidState::Missing if is_failed(facts, now) => ("failed", None),
        SvidState::Missing => ("missing", None),
    };
    admin::EndpointSvid {
        state: state.into(),
        not_after: not_after.map(proto::timestamp),
        error: facts.error.clone().unwrap_or_default(),
    }
}

/// What drops are told apart by.
type DropId = (IpAddr, u16, Reason, u8, bool);

/// The kernel's exact counters and the proxy's drops that the ring still holds, most
/// frequent first.
fn drops(
    inputs: &StatusInputs,
    state: &NodeState,
    endpoint: &EndpointState,
    recent: &[Arc<FlowRecord>],
) -> Vec<admin::Drop> {
    let mut counts: HashMap<DropId, (u64, Option<Timestamp>)> = HashMap::new();
    for DropCount { key, count } in
        inputs.drops.iter().filter(|d| d.key.netns == endpoint.key.netns)
    {
        // A number of a newer ABI is shown as what it is here: not known.
        let reason = Reason::from_u16(key.reason).unwrap_or(Reason::Internal);
        let ingress = key.direction == Direction::Ingress as u8;
        let id = (key.peer.to_std(), key.port, reason, key.protocol, ingress);
        counts.entry(id).or_default().0 += count;
    }
    let name = &endpoint.pod.name;
    for record in recent {
        let own = record.reporting_party().pod.as_ref();
        if !own.is_some_and(|(ns, pod)| *ns == name.namespace && *pod == name.name) {
            continue;
        }
        let peer = match record.reporter {
            Reporter::Source => &record.destination,
            Reporter::Destination => &record.source,
        };
        let ingress = record.direction == Direction::Ingress;
        let id = (peer.ip, record.destination.port, record.reason, record.protocol, ingress);
        // What the kernel counted is not counted again; the proxy's drops are through mTLS.
        let by_kernel = record.via == Via::Plaintext;
        let entry = counts.entry(id).or_default();
        if !by_kernel {
            entry.0 += 1;
        }
        entry.1 = entry.1.max(Some(record.time));
    }
    let mut drops: Vec<_> = counts.into_iter().collect();
    drops.sort_by(|(a, (n, t)), (b, (m, u))| (m, u, a.0, a.1).cmp(&(n, t, b.0, b.1)));
    drops
        .into_iter()
        .take(MAX_DROPS)
        .map(|((peer, port, reason, protocol, ingress), (count, last))| admin::Drop {
            count: count.max(1),
            reason: reason::name(reason).into(),
            peer: peer.to_string(),
            peer_pod: pod_at(state, peer),
            port: port.into(),
            protocol: protocol.into(),
            direction: if ingress { "ingress" } else { "egress" }.into(),
            last: last.map(proto::timestamp),
        })
        .collect()
}

fn pod_at(state: &NodeState, address: IpAddr) -> String {
    let world = &state.world;
    let pod = world.pods_by_ip.get(&address).and_then(|uid| world.pods.get(uid));
    pod.map(|p| format!("{}/{}", p.name.namespace, p.name.name)).unwrap_or_default()
}
