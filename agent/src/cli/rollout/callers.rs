//! Who a caller in clear is when it is no pod with a network of its own: a node, something in a
//! host's network, or somebody behind an address that was translated on the way (SNAT).

use std::collections::BTreeMap;

use ipnet::IpNet;

use super::super::table::printable;
use crate::proto::admin::{CheckRolloutResponse, EdgeEnd, NodeNetwork};

/// Names of nodes or workloads that are told one by one.
const MOST_NAMES: usize = 5;

/// What agents know of addresses that are no pod's.
#[derive(Debug, Default)]
pub(super) struct Surroundings<'a> {
    hosts: BTreeMap<&'a str, Option<&'a NodeNetwork>>,
    pod_ranges: Vec<IpNet>,
}

/// Where a flow in clear comes from.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Caller<'a> {
    /// A pod of a namespace, with a network of its own.
    Pod,
    /// A node's own address; an older agent does not say whose.
    Node(Option<&'a NodeNetwork>),
    /// An address of the pods' ranges that no pod has.
    Nobody,
    /// Anybody else, by address or identity.
    Outside,
}

impl<'a> Surroundings<'a> {
    /// Every agent knows the same, as far as its version does.
    pub(super) fn of(now: &'a [CheckRolloutResponse]) -> Self {
        let mut hosts = BTreeMap::new();
        for answer in now {
            hosts.extend(answer.node_networks.iter().map(|network| (network.as_str(), None)));
        }
        for found in now.iter().flat_map(|answer| &answer.node_hosts) {
            hosts.insert(found.network.as_str(), Some(found));
        }
        let ranges = now.iter().flat_map(|answer| &answer.pod_ranges);
        Self { hosts, pod_ranges: ranges.filter_map(|range| range.parse().ok()).collect() }
    }

    /// Who a side of a flow is.
    pub(super) fn caller(&self, source: &EdgeEnd) -> Caller<'a> {
        if !source.namespace.is_empty() {
            return Caller::Pod;
        }
        if let Some(host) = self.hosts.get(&*source.network) {
            return Caller::Node(*host);
        }
        // Edges name networks of /24 and /64; a node's part of the ranges may be smaller.
        let is_of_pods = source.network.parse::<IpNet>().is_ok_and(|network| {
            self.pod_ranges.iter().any(|range| range.contains(&network) || network.contains(range))
        });
        if is_of_pods { Caller::Nobody } else { Caller::Outside }
    }
}

impl Caller<'_> {
    /// Who that is, as the end of a sentence; empty where the flow's own line says it.
    pub(super) fn text(self) -> String {
        match self {
            Self::Pod | Self::Outside => String::new(),
            Self::Node(None) => "; it comes from a node's own address".into(),
            Self::Node(Some(host)) => {
                let of = some(&host.nodes);
                let who = match host.host_workloads.as_slice() {
                    [] => "a process of the host".to_owned(),
                    all => format!("a process of the host, pods in its network ({})", some(all)),
                };
                format!("; it comes from the own address of {of}: {who}, or what it masquerades")
            }
            Self::Nobody => "; no pod has that address of the pods' ranges: a node has it there, \
                             or it masquerades with it (SNAT)"
                .into(),
        }
    }

    /// What to do about it, when it dials in clear.
    pub(super) fn remedy(self, source: &EdgeEnd, port: u32) -> String {
        let exempt = format!("signet.dev/exempt-inbound-ports: \"{port}/tcp\"");
        let network = printable(&source.network);
        let blocks = format!(
            "where an ALLOW selects the pods, add a rule from ipBlocks: [{network}] to port {port}"
        );
        match self {
            Self::Pod => format!("enrol the namespace {} first", printable(&source.namespace)),
            Self::Node(_) => format!(
                "the kubelet's own probes pass; give other clients a network of their own, keep \
                 their addresses (externalTrafficPolicy: Local), or exempt the port ({exempt}); \
                 {blocks}"
            ),
            Self::Nobody => format!(
                "let clients keep their addresses (no masquerading between pods, \
                 externalTrafficPolicy: Local), or exempt the port ({exempt}); {blocks}"
            ),
            Self::Outside => {
                "exempt the port (signet.dev/exempt-inbound-ports) or take the caller into the mesh"
                    .into()
            }
        }
    }
}

/// The first few of them.
fn some(names: &[String]) -> String {
    let mut text =
        names.iter().take(MOST_NAMES).map(|n| printable(n)).collect::<Vec<_>>().join(", ");
    if names.len() > MOST_NAMES {
        text.push_str(&format!(" and {} more", names.len() - MOST_NAMES));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn from(network: &str) -> EdgeEnd {
        EdgeEnd { network: network.into(), ..EdgeEnd::default() }
    }

    #[test]
    fn callers_are_told_apart_and_named() {
        let host = NodeNetwork {
            network: "10.0.0.0/24".into(),
            nodes: vec!["node-1".into()],
            host_workloads: (0..7).map(|n| format!("DaemonSet kube-system/d{n}")).collect(),
        };
        let answer = CheckRolloutResponse {
            node_networks: vec!["10.0.0.0/24".into(), "10.0.9.0/24".into()],
            node_hosts: vec![host.clone()],
            pod_ranges: vec!["10.244.0.0/16".into(), "fd00::/112".into()],
            ..CheckRolloutResponse::default()
        };
        let now = [answer];
        let around = Surroundings::of(&now);
        let pod = EdgeEnd { namespace: "legacy".into(), ..EdgeEnd::default() };
        assert_eq!(around.caller(&pod), Caller::Pod);
        assert_eq!(around.caller(&from("10.0.0.0/24")), Caller::Node(Some(&host)));
        assert_eq!(around.caller(&from("10.0.9.0/24")), Caller::Node(None), "an older agent");
        assert_eq!(around.caller(&from("10.244.3.0/24")), Caller::Nobody);
        assert_eq!(around.caller(&from("fd00::/64")), Caller::Nobody);
        assert_eq!(around.caller(&from("192.0.2.0/24")), Caller::Outside);
        assert_eq!(around.caller(&EdgeEnd::default()), Caller::Outside, "others");

        let text = Caller::Node(Some(&host)).text();
        assert!(
            text.contains("own address of node-1") && text.contains("/d4 and 2 more"),
            "{text}"
        );
        let source = from("10.0.0.0/24");
        let remedy = Caller::Node(Some(&host)).remedy(&source, 8080);
        assert!(remedy.contains("signet.dev/exempt-inbound-ports: \"8080/tcp\""), "{remedy}");
        assert!(remedy.contains("from ipBlocks: [10.0.0.0/24] to port 8080"), "{remedy}");
        let source = from("10.244.3.0/24");
        let (text, remedy) = (Caller::Nobody.text(), Caller::Nobody.remedy(&source, 8080));
        assert!(text.contains("no pod has that address") && remedy.contains("masquerading"));
        assert!(remedy.contains("ipBlocks: [10.244.3.0/24]"), "{remedy}");
    }
}
