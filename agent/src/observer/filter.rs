//! Hubble's filters over flow records. A field that is not implemented is refused by its
//! name: a filter that is ignored would show what was not asked for.

use std::{net::IpAddr, ops::RangeInclusive, str::FromStr};

use ipnet::IpNet;
use regex::{Regex, RegexBuilder};
use signet_ebpf::abi::{Direction, Verdict};

use super::{glob, hubble, labels::LabelSelector};
use crate::{
    flow::{FlowEvent, FlowRecord, Party, Via},
    proto::flow::{self, FlowFilter},
    telemetry::{names, reason},
};

/// Values that a request's filters may carry together.
const MAX_VALUES: usize = 4096;
/// Memory that one regular expression may take, bytes.
const LARGEST_EXPRESSION: usize = 256 << 10;

/// Why a filter is refused.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum FilterError {
    /// The field is Hubble's, and Signet does not implement it.
    #[error("filter field {0} is not implemented by Signet")]
    Unsupported(&'static str),
    /// The value cannot be read.
    #[error("filter field {field}: {value:?} is not {expected}")]
    Value {
        /// The field.
        field: &'static str,
        /// As given.
        value: String,
        /// What it should be.
        expected: &'static str,
    },
    /// More values than a request may carry.
    #[error("the filters carry more than {MAX_VALUES} values")]
    TooMany,
}

/// A compiled request: one of the whitelist, none of the blacklist.
pub struct Filters {
    whitelist: Vec<Conditions>,
    blacklist: Vec<Conditions>,
}

impl std::fmt::Debug for Filters {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Filters")
            .field("whitelist", &self.whitelist.len())
            .field("blacklist", &self.blacklist.len())
            .finish()
    }
}

impl Filters {
    /// Compiles both lists.
    pub fn compile(
        whitelist: Vec<FlowFilter>,
        blacklist: Vec<FlowFilter>,
    ) -> Result<Self, FilterError> {
        let mut budget = MAX_VALUES;
        let mut compile = |list: Vec<FlowFilter>| {
            list.into_iter().map(|f| conditions(f, &mut budget)).collect::<Result<Vec<_>, _>>()
        };
        Ok(Self { whitelist: compile(whitelist)?, blacklist: compile(blacklist)? })
    }

    /// True when the record is asked for.
    pub fn matches(&self, record: &FlowRecord) -> bool {
        let all = |filter: &Conditions| filter.iter().all(|condition| condition(record));
        (self.whitelist.is_empty() || self.whitelist.iter().any(all))
            && !self.blacklist.iter().any(all)
    }
}

type Condition = Box<dyn Fn(&FlowRecord) -> bool + Send + Sync>;
type Conditions = Vec<Condition>;

fn conditions(filter: FlowFilter, budget: &mut usize) -> Result<Conditions, FilterError> {
    // Every field by its name: a new one does not compile until it is dealt with.
    let FlowFilter {
        source_ip,
        source_pod,
        destination_ip,
        destination_pod,
        verdict,
        event_type,
        source_fqdn,
        destination_fqdn,
        http_status_code,
        source_label,
        destination_label,
        protocol,
        source_port,
        destination_port,
        reply,
        source_service,
        destination_service,
        dns_query,
        source_identity,
        destination_identity,
        http_method,
        http_path,
        tcp_flags,
        node_name,
        ip_version,
        source_workload,
        destination_workload,
        trace_id,
        uuid,
        traffic_direction,
        http_url,
        http_header,
        drop_reason_desc,
        source_ip_xlated,
        node_labels,
        interface,
        source_cluster_name,
        destination_cluster_name,
        ip_trace_id,
        encrypted,
        experimental,
        any_namespace,
        any_pod,
        any_identity,
        any_port,
        reason,
        policy,
        any_label,
        any_workload,
        any_service,
        any_ip,
        via,
        source_namespace,
        destination_namespace,
    } = filter;
    for (name, given) in [
        ("source_fqdn", !source_fqdn.is_empty()),
        ("destination_fqdn", !destination_fqdn.is_empty()),
        ("dns_query", !dns_query.is_empty()),
        ("source_identity", !source_identity.is_empty()),
        ("destination_identity", !destination_identity.is_empty()),
        ("tcp_flags", !tcp_flags.is_empty()),
        ("trace_id", !trace_id.is_empty()),
        ("http_url", !http_url.is_empty()),
        ("http_header", !http_header.is_empty()),
        ("source_ip_xlated", !source_ip_xlated.is_empty()),
        ("node_labels", !node_labels.is_empty()),
        ("interface", !interface.is_empty()),
        ("source_cluster_name", !source_cluster_name.is_empty()),
        ("destination_cluster_name", !destination_cluster_name.is_empty()),
        ("ip_trace_id", !ip_trace_id.is_empty()),
        ("experimental.cel_expression", experimental.is_some()),
    ] {
        if given {
            return Err(FilterError::Unsupported(name));
        }
    }
    let mut all = Builder { conditions: Vec::new(), budget };
    all.any("source_ip", source_ip, network, |n, r| n.contains(&r.source.ip))?;
    all.any("destination_ip", destination_ip, network, |n, r| n.contains(&r.destination.ip))?;
    all.any("source_pod", source_pod, hubble_pod, |p, r| p.matches(&r.source))?;
    all.any("destination_pod", destination_pod, hubble_pod, |p, r| p.matches(&r.destination))?;
    all.any("source_service", source_service, hubble_pod, |p, r| p.matches_service(&r.source))?;
    all.any("destination_service", destination_service, hubble_pod, |p, r| {
        p.matches_service(&r.destination)
    })?;
    all.any("source_label", source_label, selector, |s, r| s.matches(&r.source))?;
    all.any("destination_label", destination_label, selector, |s, r| s.matches(&r.destination))?;
    all.any("source_workload", source_workload, Ok, |w, r| has_workload(&r.source, w))?;
    all.any("destination_workload", destination_workload, Ok, |w, r| {
        has_workload(&r.destination, w)
    })?;
    all.any("source_port", source_port, ports, |p, r| p.contains(&r.source.port))?;
    all.any("destination_port", destination_port, ports, |p, r| p.contains(&r.destination.port))?;
    all.any("protocol", protocol, protocol_number, |p, r| *p == r.protocol)?;
    all.any("node_name", node_name, node_pattern, |p, r| glob::matches(p, &r.node))?;
    all.any("uuid", uuid, text_of, |u, r| *u == r.uuid.to_string())?;
    all.any("any_namespace", any_namespace, text_of, |n, r| either(r, |p| is_in(p, n)))?;
    all.any("source_namespace", source_namespace, text_of, |n, r| is_in(&r.source, n))?;
    all.any("destination_namespace", destination_namespace, text_of, |n, r| {
        is_in(&r.destination, n)
    })?;
    all.any("any_label", any_label, selector, |s, r| either(r, |p| s.matches(p)))?;
    all.any("any_workload", any_workload, Ok, |w, r| either(r, |p| has_workload(p, w)))?;
    all.any("any_service", any_service, any_pod_of, |pattern, r| {
        either(r, |p| pattern.matches_service(p))
    })?;
    all.any("any_ip", any_ip, network, |n, r| either(r, |p| n.contains(&p.ip)))?;
    all.any("via", via, via_of, |via, r| *via == r.via)?;
    all.any("any_pod", any_pod, any_pod_of, |pod, r| either(r, |p| pod.matches(p)))?;
    all.any("any_identity", any_identity, text_of, |i, r| either(r, |p| has_identity(p, i)))?;
    all.any("reason", reason, reason_of, |wanted, r| *wanted == r.reason)?;
    all.any("policy", policy, text_of, |pattern, r| {
        r.policy.as_ref().is_some_and(|p| {
            glob::matches(pattern, &p.name)
                || glob::matches(pattern, &format!("{}/{}", p.namespace, p.name))
                || glob::matches(pattern, &format!("{}/{}/{}", p.kind, p.namespace, p.name))
        })
    })?;
    all.any("any_port", any_port, port_of, |port, r| either(r, |p| p.port == *port))?;
    all.any("verdict", verdict, verdict_of, |v, r| *v == r.verdict)?;
    all.any("traffic_direction", traffic_direction, direction_of, |d, r| *d == r.direction)?;
    all.any("drop_reason_desc", drop_reason_desc, drop_reason_of, |d, r| {
        r.verdict == Verdict::Dropped && hubble::drop_reason(r.reason) == Some(*d)
    })?;
    all.any("http_method", http_method, text_of, |method, r| {
        r.http.as_ref().is_some_and(|http| http.method.eq_ignore_ascii_case(method))
    })?;
    all.any("http_path", http_path, expression, |path, r| {
        r.http.as_ref().is_some_and(|http| path.is_match(&http.path))
    })?;
    all.any("http_status_code", http_status_code, status_of, |status, r| {
        r.http.as_ref().is_some_and(|http| status.contains(&http.status))
    })?;
    all.any("ip_version", ip_version, is_v6, |v6, r| *v6 == r.source.ip.is_ipv6())?;
    // Records are made per flow, in the direction of its first packet.
    all.any("reply", reply, Ok, |reply, _| !*reply)?;
    all.any("encrypted", encrypted, Ok, |e, r| *e == (r.via == Via::Mtls))?;
    all.any("event_type", event_type, Ok, |t, r| {
        let own = match r.event {
            FlowEvent::Verdict if r.http.is_some() => t.r#type == hubble::EVENT_L7,
            FlowEvent::Verdict => t.r#type == hubble::EVENT_POLICY_VERDICT,
            FlowEvent::End { .. } => t.r#type == hubble::EVENT_TRACE,
        };
        let as_drop = t.r#type == hubble::EVENT_DROP
            && r.event == FlowEvent::Verdict
            && r.verdict == Verdict::Dropped;
        (own || as_drop) && (!t.match_sub_type || t.sub_type == 0)
    })?;
    Ok(all.conditions)
}

struct Builder<'a> {
    conditions: Conditions,
    budget: &'a mut usize,
}

impl Builder<'_> {
    /// Adds "one of these values holds", unless there are none.
    fn any<V, T>(
        &mut self,
        field: &'static str,
        values: Vec<V>,
        parse: impl Fn(V) -> Result<T, BadValue>,
        holds: impl Fn(&T, &FlowRecord) -> bool + Send + Sync + 'static,
    ) -> Result<(), FilterError>
    where
        T: Send + Sync + 'static,
    {
        *self.budget = self.budget.checked_sub(values.len()).ok_or(FilterError::TooMany)?;
        if values.is_empty() {
            return Ok(());
        }
        let values: Vec<T> = values
            .into_iter()
            .map(|v| {
                parse(v).map_err(|BadValue { value, expected }| FilterError::Value {
                    field,
                    value,
                    expected,
                })
            })
            .collect::<Result<_, _>>()?;
        self.conditions.push(Box::new(move |record| values.iter().any(|v| holds(v, record))));
        Ok(())
    }
}

/// A value that cannot be read.
#[derive(Debug)]
pub struct BadValue {
    value: String,
    expected: &'static str,
}

impl BadValue {
    fn new(value: impl ToString, expected: &'static str) -> Self {
        Self { value: value.to_string(), expected }
    }
}

/// `namespace/prefix of the name`.
struct PodPattern {
    namespace: Option<String>,
    prefix: String,
}

impl PodPattern {
    fn matches(&self, party: &Party) -> bool {
        party.pod.as_ref().is_some_and(|(namespace, name)| self.holds(namespace, name))
    }

    fn matches_service(&self, party: &Party) -> bool {
        let service = party.service.as_deref().and_then(|s| s.split_once('/'));
        service.is_some_and(|(namespace, name)| self.holds(namespace, name))
    }

    fn holds(&self, namespace: &str, name: &str) -> bool {
        self.namespace.as_deref().is_none_or(|n| n == namespace) && name.starts_with(&self.prefix)
    }
}

/// Hubble's rule: without a namespace it is `default`, with an empty one any.
fn hubble_pod(value: String) -> Result<PodPattern, BadValue> {
    Ok(match value.split_once('/') {
        Some(("", prefix)) => PodPattern { namespace: None, prefix: prefix.into() },
        Some((namespace, prefix)) => {
            PodPattern { namespace: Some(namespace.into()), prefix: prefix.into() }
        }
        None => PodPattern { namespace: Some("default".into()), prefix: value },
    })
}

fn any_pod_of(value: String) -> Result<PodPattern, BadValue> {
    if value.contains('/') { hubble_pod(value) } else { hubble_pod(format!("/{value}")) }
}

fn either(record: &FlowRecord, holds: impl Fn(&Party) -> bool) -> bool {
    holds(&record.source) || holds(&record.destination)
}

fn is_in(party: &Party, namespace: &str) -> bool {
    party.pod.as_ref().is_some_and(|(own, _)| **own == *namespace)
}

/// Hubble's rule: what is left empty is any.
fn has_workload(party: &Party, wanted: &flow::Workload) -> bool {
    party.workload.as_ref().is_some_and(|own| {
        (wanted.name.is_empty() || *own.name == *wanted.name)
            && (wanted.kind.is_empty() || own.kind.eq_ignore_ascii_case(&wanted.kind))
    })
}

/// The whole SPIFFE ID, or `namespace/account` of an ID of Kubernetes' form.
fn has_identity(party: &Party, pattern: &str) -> bool {
    let Some(identity) = &party.identity else { return false };
    let id = identity.as_str();
    let short = id
        .split_once("/ns/")
        .and_then(|(_, rest)| rest.split_once("/sa/"))
        .map(|(namespace, account)| format!("{namespace}/{account}"));
    glob::matches(pattern, id) || short.is_some_and(|s| glob::matches(pattern, &s))
}

fn text_of(value: String) -> Result<String, BadValue> {
    Ok(value)
}

fn selector(value: String) -> Result<LabelSelector, BadValue> {
    LabelSelector::parse(&value)
        .ok_or_else(|| BadValue::new(value, "a label selector (app=payments,tier!=test)"))
}

fn via_of(value: String) -> Result<Via, BadValue> {
    Via::parse(&value).ok_or_else(|| BadValue::new(value, "mtls, kernel or plaintext"))
}

fn network(value: String) -> Result<IpNet, BadValue> {
    IpNet::from_str(&value)
        .or_else(|_| IpAddr::from_str(&value).map(IpNet::from))
        .map_err(|_| BadValue::new(value, "an address or a range in CIDR form"))
}

fn ports(value: String) -> Result<RangeInclusive<u16>, BadValue> {
    let (first, last) = value.split_once('-').unwrap_or((&value, &value));
    match (first.parse(), last.parse()) {
        (Ok(first), Ok(last)) if first <= last => Ok(first..=last),
        _ => Err(BadValue::new(value, "a port or a range of ports")),
    }
}

fn port_of(value: u32) -> Result<u16, BadValue> {
    u16::try_from(value).map_err(|_| BadValue::new(value, "a port"))
}

fn protocol_number(value: String) -> Result<u8, BadValue> {
    names::parse_protocol(&value).ok_or_else(|| {
        BadValue::new(value, "tcp, udp, sctp, icmp, icmpv6 or a number (layer 7 is not recorded)")
    })
}

/// Hubble's rule: a regular expression, found anywhere in the path.
fn expression(value: String) -> Result<Regex, BadValue> {
    RegexBuilder::new(&value)
        .size_limit(LARGEST_EXPRESSION)
        .dfa_size_limit(LARGEST_EXPRESSION)
        .build()
        .map_err(|_| BadValue::new(value, "a regular expression of a moderate size"))
}

/// Hubble's rule: a status, or the beginning of one with `+` for the rest.
pub fn status_of(value: String) -> Result<RangeInclusive<u16>, BadValue> {
    let digits = value.strip_suffix('+').unwrap_or(&value);
    let is_open = digits.len() < value.len();
    let wanted = if is_open { 1..=2 } else { 3..=3 };
    let number = digits.parse::<u16>().ok().filter(|_| {
        wanted.contains(&digits.len()) && digits.bytes().all(|digit| digit.is_ascii_digit())
    });
    match (number, digits.len()) {
        (Some(first), 1) => Ok(first * 100..=first * 100 + 99),
        (Some(first), 2) => Ok(first * 10..=first * 10 + 9),
        (Some(one), _) => Ok(one..=one),
        (None, _) => Err(BadValue::new(value, "an HTTP status (404) or its beginning (5+)")),
    }
}

fn node_pattern(value: String) -> Result<String, BadValue> {
    if value.contains('/') {
        return Err(BadValue::new(value, "a node's name without a cluster's"));
    }
    Ok(value)
}

fn reason_of(value: String) -> Result<signet_ebpf::abi::Reason, BadValue> {
    reason::parse(&value).ok_or_else(|| BadValue::new(value, "a reason (see docs/reasons.md)"))
}

fn verdict_of(value: i32) -> Result<Verdict, BadValue> {
    match flow::Verdict::try_from(value) {
        Ok(flow::Verdict::Forwarded) => Ok(Verdict::Forwarded),
        Ok(flow::Verdict::Dropped) => Ok(Verdict::Dropped),
        Ok(flow::Verdict::Audit) => Ok(Verdict::Audit),
        other => Err(BadValue::new(
            other.map_or_else(|_| value.to_string(), |v| v.as_str_name().into()),
            "a verdict that Signet gives (FORWARDED, DROPPED, AUDIT)",
        )),
    }
}

fn direction_of(value: i32) -> Result<Direction, BadValue> {
    match flow::TrafficDirection::try_from(value) {
        Ok(flow::TrafficDirection::Ingress) => Ok(Direction::Ingress),
        Ok(flow::TrafficDirection::Egress) => Ok(Direction::Egress),
        _ => Err(BadValue::new(value, "INGRESS or EGRESS")),
    }
}

fn drop_reason_of(value: i32) -> Result<flow::DropReason, BadValue> {
    flow::DropReason::try_from(value)
        .map_err(|_| BadValue::new(value, "a drop reason that Signet maps to"))
}

fn is_v6(value: i32) -> Result<bool, BadValue> {
    match flow::IpVersion::try_from(value) {
        Ok(flow::IpVersion::IPv4) => Ok(false),
        Ok(flow::IpVersion::IPv6) => Ok(true),
        _ => Err(BadValue::new(value, "IPv4 or IPv6")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::flow::example::{allowed, denied, ended, refused};

    fn is_shown(filter: FlowFilter, record: &FlowRecord) -> bool {
        Filters::compile(vec![filter], vec![]).unwrap().matches(record)
    }

    fn workload(kind: &str, name: &str) -> flow::Workload {
        flow::Workload { kind: kind.into(), name: name.into() }
    }

    fn strings(values: &[&str]) -> Vec<String> {
        values.iter().map(|v| (*v).to_owned()).collect()
    }

    macro_rules! filter {
        ($field:ident: $value:expr) => {
            FlowFilter { $field: $value, ..Default::default() }
        };
    }

    /// Each filter with a record that it shows and one that it does not.
    #[test]
    fn every_filter_shows_what_it_should_and_nothing_else() {
        let allowed_only: Vec<(&str, FlowFilter)> = vec![
            ("source_ip", filter!(source_ip: strings(&["10.0.1.5"]))),
            ("source_pod", filter!(source_pod: strings(&["shop/front"]))),
            ("source_pod, any namespace", filter!(source_pod: strings(&["/frontend"]))),
            ("source_port", filter!(source_port: strings(&["41872"]))),
            ("source_port, range", filter!(source_port: strings(&["41000-42000"]))),
            ("any_pod", filter!(any_pod: strings(&["frontend"]))),
            ("any_identity", filter!(any_identity: strings(&["spiffe://*/sa/frontend"]))),
            ("any_identity, short", filter!(any_identity: strings(&["shop/front*"]))),
            ("any_port", filter!(any_port: vec![41872])),
            ("verdict", filter!(verdict: vec![flow::Verdict::Forwarded.into()])),
            ("reason", filter!(reason: strings(&["allowed"]))),
            ("policy", filter!(policy: strings(&["payments-callers"]))),
            ("policy, long", filter!(policy: strings(&["IdentityPolicy/shop/*"]))),
            ("encrypted", filter!(encrypted: vec![true])),
            ("uuid", filter!(uuid: vec![allowed().uuid.to_string()])),
            ("source_label", filter!(source_label: strings(&["app=frontend,!tier"]))),
            ("any_label", filter!(any_label: strings(&["k8s:app in (frontend, x)"]))),
            ("source_workload", filter!(source_workload: vec![workload("", "frontend")])),
            ("any_workload", filter!(any_workload: vec![workload("deployment", "frontend")])),
            ("any_ip", filter!(any_ip: strings(&["10.0.1.0/24"]))),
            ("source_namespace", filter!(source_namespace: strings(&["shop"]))),
            ("via", filter!(via: strings(&["mtls"]))),
            ("source_ip, range", filter!(source_ip: strings(&["10.0.0.0/16", "10.7.0.0/16"]))),
        ];
        for (name, filter) in allowed_only {
            assert!(is_shown(filter.clone(), &allowed()), "{name} hides what it should show");
            assert!(!is_shown(filter, &refused()), "{name} shows what it should hide");
        }
        let refused_only: Vec<(&str, FlowFilter)> = vec![
            ("drop_reason_desc", {
                filter!(drop_reason_desc: vec![flow::DropReason::UnencryptedTraffic.into()])
            }),
            ("event_type drop", {
                let drop = flow::EventTypeFilter { r#type: 1, ..Default::default() };
                filter!(event_type: vec![drop])
            }),
            ("encrypted", filter!(encrypted: vec![false])),
        ];
        for (name, filter) in refused_only {
            assert!(is_shown(filter.clone(), &refused()), "{name} hides what it should show");
            assert!(!is_shown(filter, &allowed()), "{name} shows what it should hide");
        }
        let both: Vec<(&str, &str, FlowFilter, FlowFilter)> = vec![
            (
                "destination_ip",
                "destination_ip",
                filter!(destination_ip: strings(&["10.0.2.7"])),
                filter!(destination_ip: strings(&["10.0.2.8"])),
            ),
            (
                "destination_pod",
                "destination_pod in default",
                filter!(destination_pod: strings(&["shop/pay"])),
                filter!(destination_pod: strings(&["payments"])),
            ),
            (
                "destination_service",
                "destination_service",
                filter!(destination_service: strings(&["shop/payments"])),
                filter!(destination_service: strings(&["legacy/payments"])),
            ),
            (
                "destination_port",
                "source_service",
                filter!(destination_port: strings(&["8080"])),
                filter!(source_service: strings(&["shop/payments"])),
            ),
            (
                "any_service",
                "destination_workload",
                filter!(any_service: strings(&["pay"])),
                filter!(destination_workload: vec![workload("Deployment", "frontend")]),
            ),
            (
                "destination_label",
                "destination_label",
                filter!(destination_label: strings(&["io.kubernetes.pod.namespace=shop"])),
                filter!(destination_label: strings(&["app=frontend"])),
            ),
            (
                "destination_namespace",
                "destination_namespace",
                filter!(destination_namespace: strings(&["shop"])),
                filter!(destination_namespace: strings(&["legacy"])),
            ),
            (
                "protocol",
                "protocol",
                filter!(protocol: strings(&["TCP"])),
                filter!(protocol: strings(&["udp"])),
            ),
            (
                "node_name",
                "node_name",
                filter!(node_name: strings(&["node-*"])),
                filter!(node_name: strings(&["node"])),
            ),
            (
                "traffic_direction",
                "traffic_direction",
                filter!(traffic_direction: vec![flow::TrafficDirection::Ingress.into()]),
                filter!(traffic_direction: vec![flow::TrafficDirection::Egress.into()]),
            ),
            (
                "ip_version",
                "ip_version",
                filter!(ip_version: vec![flow::IpVersion::IPv4.into()]),
                filter!(ip_version: vec![flow::IpVersion::IPv6.into()]),
            ),
            ("reply", "reply", filter!(reply: vec![false]), filter!(reply: vec![true])),
            (
                "any_namespace",
                "any_namespace",
                filter!(any_namespace: strings(&["shop"])),
                filter!(any_namespace: strings(&["sho"])),
            ),
        ];
        for (shows, hides, good, bad) in both {
            assert!(is_shown(good, &allowed()), "{shows}");
            assert!(!is_shown(bad, &allowed()), "{hides}");
        }
        let trace = flow::EventTypeFilter { r#type: 4, ..Default::default() };
        assert!(is_shown(filter!(event_type: vec![trace]), &ended()));
        assert!(!is_shown(filter!(event_type: vec![trace]), &allowed()));
    }

    #[test]
    fn lists_compose() {
        let of_intruder = filter!(source_pod: strings(&["/intruder"]));
        let drops = filter!(verdict: vec![flow::Verdict::Dropped.into()]);
        let shown = |whitelist: &[FlowFilter], blacklist: &[FlowFilter]| {
            let filters = Filters::compile(whitelist.to_vec(), blacklist.to_vec()).unwrap();
            [allowed(), denied(), refused()].map(|r| filters.matches(&r))
        };
        assert_eq!(shown(&[], &[]), [true, true, true]);
        assert_eq!(shown(std::slice::from_ref(&drops), &[]), [false, true, true]);
        assert_eq!(
            shown(std::slice::from_ref(&drops), std::slice::from_ref(&of_intruder)),
            [false, false, true]
        );
        assert_eq!(shown(&[], &[of_intruder.clone(), drops.clone()]), [true, false, false]);
        // Fields of one filter must all hold; filters of a list, any.
        let both = FlowFilter { verdict: drops.verdict.clone(), ..of_intruder };
        assert_eq!(shown(&[both], &[]), [false, true, false]);
    }

    #[test]
    fn requests_are_found_by_what_they_asked() {
        let refused = crate::flow::example::request_refused();
        for (name, filter) in [
            ("method", filter!(http_method: strings(&["get"]))),
            ("path", filter!(http_path: strings(&["^/api/v[0-9]/admin$"]))),
            ("status", filter!(http_status_code: strings(&["403"]))),
            ("4+", filter!(http_status_code: strings(&["4+"]))),
            ("40+", filter!(http_status_code: strings(&["40+"]))),
        ] {
            assert!(is_shown(filter.clone(), &refused), "{name}");
            assert!(!is_shown(filter, &allowed()), "{name}: a flow is no request");
        }
        for (name, filter) in [
            ("method", filter!(http_method: strings(&["POST"]))),
            ("path", filter!(http_path: strings(&["^/payments"]))),
            ("status", filter!(http_status_code: strings(&["5+", "404"]))),
        ] {
            assert!(!is_shown(filter, &refused), "{name}");
        }
    }

    #[test]
    fn what_is_not_implemented_is_refused_by_its_name() {
        let refusal = |filter| Filters::compile(vec![], vec![filter]).unwrap_err();
        let cel = flow::flow_filter::Experimental { cel_expression: strings(&["true"]) };
        for (name, filter) in [
            ("source_fqdn", filter!(source_fqdn: strings(&["a.b"]))),
            ("destination_identity", filter!(destination_identity: vec![1])),
            ("tcp_flags", filter!(tcp_flags: vec![flow::TcpFlags::default()])),
            ("interface", filter!(interface: vec![flow::NetworkInterface::default()])),
            ("experimental.cel_expression", filter!(experimental: Some(cel))),
        ] {
            assert_eq!(refusal(filter), FilterError::Unsupported(name));
        }
        for (field, filter) in [
            ("source_ip", filter!(source_ip: strings(&["10.0.0.0/40"]))),
            ("destination_port", filter!(destination_port: strings(&["9-3"]))),
            ("protocol", filter!(protocol: strings(&["http"]))),
            ("verdict", filter!(verdict: vec![flow::Verdict::Redirected.into()])),
            ("reason", filter!(reason: strings(&["because"]))),
            ("source_label", filter!(source_label: strings(&["a b"]))),
            ("any_label", filter!(any_label: strings(&[""]))),
            ("via", filter!(via: strings(&["pigeon"]))),
            ("any_port", filter!(any_port: vec![70_000])),
            ("http_path", filter!(http_path: strings(&["/("]))),
            ("http_status_code", filter!(http_status_code: strings(&["40"]))),
            ("http_status_code", filter!(http_status_code: strings(&["+"]))),
            ("node_name", filter!(node_name: strings(&["cluster/node"]))),
        ] {
            let FilterError::Value { field: named, .. } = refusal(filter) else {
                panic!("{field}")
            };
            assert_eq!(named, field);
        }
        let many = filter!(uuid: vec!["x".into(); MAX_VALUES + 1]);
        assert_eq!(refusal(many), FilterError::TooMany);
    }
}
