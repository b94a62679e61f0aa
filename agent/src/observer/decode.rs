//! Flow records from the wire, for the command line.

use std::{net::IpAddr, sync::Arc, time::Duration};

use prost::Message;
use signet_ebpf::abi::{Direction, Reason, Verdict};
use uuid::Uuid;

use super::encode::DETAIL_TYPE;
use crate::{
    cluster::model::Workload,
    flow::{FlowEvent, FlowRecord, HttpRecord, KnownBy, Party, Reporter, Via},
    policy::model::PolicyName,
    proto::{self, detail, flow},
    spiffe::SpiffeId,
    telemetry::reason,
};

/// A record as a client sees it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct SeenFlow {
    /// The record; its `extra` is empty, see [`SeenFlow::extra`].
    pub record: FlowRecord,
    /// The reason as the agent names it, also when this client does not know it.
    pub reason: String,
    /// Further pairs.
    pub extra: Vec<(String, String)>,
    /// The reporting agent's own trust domain.
    pub trust_domain: Arc<str>,
}

impl AsRef<FlowRecord> for SeenFlow {
    fn as_ref(&self) -> &FlowRecord {
        &self.record
    }
}

/// Why a message is no record.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum DecodeError {
    /// It comes from another observer than Signet's.
    #[error("the flow carries no signet.flow.v1.Detail: is this the socket of a Signet agent?")]
    NoDetail,
    /// A field cannot be read.
    #[error(
        "field {0} of the flow cannot be read: are client and agent of very different versions?"
    )]
    Field(&'static str),
}

/// The record of a message.
pub fn decode(flow: &flow::Flow) -> Result<SeenFlow, DecodeError> {
    let any = flow
        .extensions
        .as_ref()
        .filter(|any| any.type_url == DETAIL_TYPE)
        .ok_or(DecodeError::NoDetail)?;
    let detail = detail::Detail::decode(&*any.value).map_err(|_| DecodeError::NoDetail)?;
    let ip = flow.ip.as_ref().ok_or(DecodeError::Field("IP"))?;
    let (source_port, destination_port) = ports(flow)?;
    let source = party(
        flow.source.as_ref(),
        detail.source.as_ref(),
        flow.source_service.as_ref(),
        parse_ip(&ip.source)?,
        source_port,
    )?;
    let destination = party(
        flow.destination.as_ref(),
        detail.destination.as_ref(),
        flow.destination_service.as_ref(),
        parse_ip(&ip.destination)?,
        destination_port,
    )?;
    let record = FlowRecord {
        time: flow.time.as_ref().and_then(proto::time).ok_or(DecodeError::Field("time"))?,
        event: match detail.event.as_str() {
            "verdict" => FlowEvent::Verdict,
            "end" => FlowEvent::End {
                sent: detail.sent,
                received: detail.received,
                duration: Duration::from_nanos(detail.duration_ns),
            },
            _ => return Err(DecodeError::Field("event")),
        },
        uuid: Uuid::parse_str(&flow.uuid).map_err(|_| DecodeError::Field("uuid"))?,
        node: flow.node_name.as_str().into(),
        reporter: Reporter::parse(&detail.reporter).ok_or(DecodeError::Field("reporter"))?,
        direction: match flow.traffic_direction() {
            flow::TrafficDirection::Ingress => Direction::Ingress,
            flow::TrafficDirection::Egress => Direction::Egress,
            flow::TrafficDirection::Unknown => {
                return Err(DecodeError::Field("traffic_direction"));
            }
        },
        protocol: u8::try_from(detail.protocol).map_err(|_| DecodeError::Field("protocol"))?,
        via: Via::parse(&detail.via).ok_or(DecodeError::Field("via"))?,
        verdict: match flow.verdict() {
            flow::Verdict::Forwarded => Verdict::Forwarded,
            flow::Verdict::Dropped => Verdict::Dropped,
            flow::Verdict::Audit => Verdict::Audit,
            _ => return Err(DecodeError::Field("verdict")),
        },
        reason: reason::parse(&detail.reason).unwrap_or(Reason::Internal),
        policy: detail.policy.as_ref().map(|p| PolicyName {
            kind: p.kind.as_str().into(),
            namespace: p.namespace.as_str().into(),
            name: p.name.as_str().into(),
        }),
        revision: detail.revision,
        extra: Vec::new(),
        http: flow.l7.as_ref().map(http).transpose()?.map(Box::new),
        source,
        destination,
    };
    Ok(SeenFlow {
        record,
        reason: detail.reason,
        extra: detail.extra.into_iter().map(|p| (p.key, p.value)).collect(),
        trust_domain: detail.trust_domain.into(),
    })
}

fn http(l7: &flow::Layer7) -> Result<HttpRecord, DecodeError> {
    let Some(flow::layer7::Record::Http(http)) = &l7.record else {
        return Err(DecodeError::Field("l7"));
    };
    Ok(HttpRecord {
        method: http.method.as_str().into(),
        path: http.url.as_str().into(),
        version: HttpRecord::VERSIONS
            .into_iter()
            .find(|version| *version == http.protocol)
            .ok_or(DecodeError::Field("l7.http.protocol"))?,
        status: u16::try_from(http.code).map_err(|_| DecodeError::Field("l7.http.code"))?,
        latency: Duration::from_nanos(l7.latency_ns),
    })
}

fn parse_ip(s: &str) -> Result<IpAddr, DecodeError> {
    s.parse().map_err(|_| DecodeError::Field("IP"))
}

fn ports(flow: &flow::Flow) -> Result<(u16, u16), DecodeError> {
    use flow::layer4::Protocol;
    let (source, destination) = match flow.l4.as_ref().and_then(|l4| l4.protocol.as_ref()) {
        Some(Protocol::Tcp(p)) => (p.source_port, p.destination_port),
        Some(Protocol::Udp(p)) => (p.source_port, p.destination_port),
        Some(Protocol::Sctp(p)) => (p.source_port, p.destination_port),
        Some(Protocol::IcmPv4(_) | Protocol::IcmPv6(_)) | None => (0, 0),
    };
    let port = |p: u32| u16::try_from(p).map_err(|_| DecodeError::Field("l4"));
    Ok((port(source)?, port(destination)?))
}

fn party(
    endpoint: Option<&flow::Endpoint>,
    detail: Option<&detail::Party>,
    service: Option<&flow::Service>,
    ip: IpAddr,
    port: u16,
) -> Result<Party, DecodeError> {
    let detail = detail.ok_or(DecodeError::Field("extensions"))?;
    let some = |s: &str| (!s.is_empty()).then(|| Arc::<str>::from(s));
    let own = |label: &String| {
        let (key, value) = label.strip_prefix("k8s:")?.split_once('=')?;
        // These two are fields of the record.
        (!key.starts_with("io.cilium.k8s.") && !key.starts_with("io.kubernetes.pod."))
            .then(|| (key.into(), value.into()))
    };
    let labels = endpoint.iter().flat_map(|e| &e.labels).filter_map(own).collect();
    let workload = endpoint
        .and_then(|e| e.workloads.first())
        .and_then(|w| Some(Workload { kind: some(&w.kind)?, name: some(&w.name)? }));
    Ok(Party {
        pod: endpoint.and_then(|e| Some((some(&e.namespace)?, some(&e.pod_name)?))),
        service_account: some(&detail.service_account),
        labels: Arc::new(labels),
        workload,
        identity: match detail.identity.as_str() {
            "" => None,
            id => Some(SpiffeId::parse(id).map_err(|_| DecodeError::Field("identity"))?),
        },
        known_by: KnownBy::parse(&detail.known_by).ok_or(DecodeError::Field("known_by"))?,
        service: service.map(|s| format!("{}/{}", s.namespace, s.name).into()),
        ip,
        port,
    })
}
