//! Flow records on the wire: Hubble's message, with Signet's own beside it.

use std::net::IpAddr;

use prost::Message;
use signet_ebpf::abi::{Direction, Verdict};

use super::{hubble, labels};
use crate::{
    cluster::model::Workload,
    flow::{FlowEvent, FlowRecord, HttpRecord, Party, Via},
    proto::{self, detail, flow},
    telemetry::reason,
};

/// Type of [`flow::Flow::extensions`].
pub const DETAIL_TYPE: &str = "type.googleapis.com/signet.flow.v1.Detail";
/// Type of a request's options.
pub const OPTIONS_TYPE: &str = "type.googleapis.com/signet.flow.v1.Options";

/// The message of a record; `trust_domain` is the reporting agent's own.
pub fn encode(record: &FlowRecord, trust_domain: &str) -> flow::Flow {
    let FlowRecord { source, destination, .. } = record;
    let is_verdict = record.event == FlowEvent::Verdict;
    let dropped = record.verdict == Verdict::Dropped;
    let drop_reason = if dropped { hubble::drop_reason(record.reason) } else { None };
    let drop_reason = drop_reason.unwrap_or(flow::DropReason::Unknown);
    let policies: Vec<_> = record.policy.iter().map(|p| policy(p, record.revision)).collect();
    let denied = record.verdict != Verdict::Forwarded;
    let by = |direction, denies: bool| {
        if record.direction == direction && denied == denies { policies.clone() } else { vec![] }
    };
    let event_type = match (&record.http, is_verdict) {
        (Some(_), _) => hubble::EVENT_L7,
        (None, true) => hubble::EVENT_POLICY_VERDICT,
        (None, false) => hubble::EVENT_TRACE,
    };
    flow::Flow {
        time: Some(proto::timestamp(record.time)),
        verdict: hubble::verdict(record.verdict).into(),
        drop_reason: drop_reason as u32,
        ip: Some(flow::Ip {
            source: source.ip.to_string(),
            destination: destination.ip.to_string(),
            ip_version: match source.ip {
                IpAddr::V4(_) => flow::IpVersion::IPv4,
                IpAddr::V6(_) => flow::IpVersion::IPv6,
            }
            .into(),
            encrypted: record.via == Via::Mtls,
        }),
        l4: layer4(record),
        source: Some(endpoint(source)),
        destination: Some(endpoint(destination)),
        r#type: match record.http {
            Some(_) => flow::FlowType::L7,
            None => flow::FlowType::L3L4,
        }
        .into(),
        node_name: record.node.to_string(),
        l7: record.http.as_deref().map(|http| layer7(http, record.verdict)),
        event_type: Some(flow::CiliumEventType { r#type: event_type, sub_type: 0 }),
        source_service: service(source),
        destination_service: service(destination),
        traffic_direction: hubble::direction(record.direction).into(),
        policy_match_type: match record.policy {
            Some(_) => hubble::match_type::L3_L4,
            None => hubble::match_type::NONE,
        },
        drop_reason_desc: drop_reason.into(),
        is_reply: Some(false),
        socket_cookie: 0,
        cgroup_id: 0,
        uuid: record.uuid.to_string(),
        auth_type: match record.via {
            Via::Mtls => flow::AuthType::Spire,
            Via::Kernel | Via::Plaintext => flow::AuthType::Disabled,
        }
        .into(),
        emitter: Some(flow::Emitter {
            name: "Signet".into(),
            version: env!("CARGO_PKG_VERSION").into(),
        }),
        egress_allowed_by: by(Direction::Egress, false),
        ingress_allowed_by: by(Direction::Ingress, false),
        egress_denied_by: by(Direction::Egress, true),
        ingress_denied_by: by(Direction::Ingress, true),
        policy_log: vec![reason::name(record.reason).into()],
        summary: summary(record),
        extensions: Some(prost_types::Any {
            type_url: DETAIL_TYPE.into(),
            value: detail(record, trust_domain).encode_to_vec(),
        }),
    }
}

fn summary(record: &FlowRecord) -> String {
    let reason = reason::name(record.reason);
    let via = record.via.name();
    if let Some(http) = &record.http {
        let (method, path, status) = (&http.method, &http.path, http.status);
        return format!("{reason} via {via} {method} {path} {status}");
    }
    match &record.event {
        FlowEvent::Verdict => format!("{reason} via {via}"),
        FlowEvent::End { sent, received, .. } => {
            format!("end {reason} via {via} sent={sent} received={received}")
        }
    }
}

/// What Hubble's tools know as a request that was refused, or as the answer to one.
fn layer7(http: &HttpRecord, verdict: Verdict) -> flow::Layer7 {
    let of = match verdict {
        Verdict::Dropped => flow::L7FlowType::Request,
        Verdict::Forwarded | Verdict::Audit => flow::L7FlowType::Response,
    };
    let record = flow::Http {
        code: http.status.into(),
        method: http.method.to_string(),
        url: http.path.to_string(),
        protocol: http.version.into(),
    };
    flow::Layer7 {
        r#type: of.into(),
        latency_ns: u64::try_from(http.latency.as_nanos()).unwrap_or(u64::MAX),
        record: Some(flow::layer7::Record::Http(record)),
    }
}

fn layer4(record: &FlowRecord) -> Option<flow::Layer4> {
    use flow::layer4::Protocol;
    let source_port = record.source.port.into();
    let destination_port = record.destination.port.into();
    let protocol = match record.protocol {
        6 => Protocol::Tcp(flow::Tcp { source_port, destination_port, flags: None }),
        17 => Protocol::Udp(flow::Udp { source_port, destination_port }),
        132 => Protocol::Sctp(flow::Sctp { source_port, destination_port }),
        1 => Protocol::IcmPv4(flow::IcmPv4::default()),
        58 => Protocol::IcmPv6(flow::IcmPv6::default()),
        _ => return None,
    };
    Some(flow::Layer4 { protocol: Some(protocol) })
}

fn endpoint(party: &Party) -> flow::Endpoint {
    let labels = labels::labels(party).map(|label| label.to_string()).collect();
    let workload =
        |w: &Workload| flow::Workload { name: w.name.to_string(), kind: w.kind.to_string() };
    let workloads = party.workload.iter().map(workload).collect();
    let (namespace, pod_name) = match &party.pod {
        Some((namespace, name)) => (namespace.to_string(), name.to_string()),
        None => Default::default(),
    };
    flow::Endpoint { namespace, pod_name, labels, workloads, ..Default::default() }
}

fn service(party: &Party) -> Option<flow::Service> {
    let (namespace, name) = party.service.as_deref()?.split_once('/')?;
    Some(flow::Service { name: name.into(), namespace: namespace.into() })
}

fn policy(name: &crate::policy::model::PolicyName, revision: u64) -> flow::Policy {
    flow::Policy {
        name: name.name.to_string(),
        namespace: name.namespace.to_string(),
        labels: Vec::new(),
        revision,
        kind: name.kind.to_string(),
    }
}

fn detail(record: &FlowRecord, trust_domain: &str) -> detail::Detail {
    let (event, sent, received, duration) = match &record.event {
        FlowEvent::Verdict => ("verdict", 0, 0, std::time::Duration::ZERO),
        FlowEvent::End { sent, received, duration } => ("end", *sent, *received, *duration),
    };
    let party = |p: &Party| detail::Party {
        service_account: p.service_account.as_deref().unwrap_or_default().into(),
        identity: p.identity.as_ref().map(|i| i.as_str().into()).unwrap_or_default(),
        known_by: p.known_by.name().into(),
    };
    detail::Detail {
        event: event.into(),
        reporter: record.reporter.name().into(),
        via: record.via.name().into(),
        reason: reason::name(record.reason).into(),
        revision: record.revision,
        policy: record.policy.as_ref().map(|p| detail::PolicyName {
            kind: p.kind.to_string(),
            namespace: p.namespace.to_string(),
            name: p.name.to_string(),
        }),
        source: Some(party(&record.source)),
        destination: Some(party(&record.destination)),
        protocol: record.protocol.into(),
        trust_domain: trust_domain.into(),
        extra: record
            .extra
            .iter()
            .map(|(key, value)| detail::Pair { key: (*key).into(), value: value.clone() })
            .collect(),
        sent,
        received,
        duration_ns: u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX),
    }
}
