//! What the page draws: workloads, and edges by how they travel and what became of them.

use std::collections::{BTreeMap, BTreeSet};

use serde::Serialize;

use crate::{
    cli::edges::name_of,
    proto::{
        self,
        admin::{EdgeEnd, Endpoint, SeenEdge},
    },
    telemetry::names,
};

/// A picture of the agents' answers.
#[derive(Serialize, Clone, PartialEq, Debug, Default)]
#[serde(rename_all = "camelCase")]
pub struct Graph {
    /// By name.
    pub workloads: Vec<Workload>,
    /// Most flows first.
    pub edges: Vec<Edge>,
    /// Namespaces with pods on the nodes that answered, by name.
    pub namespaces: Vec<Namespace>,
    /// False when a node's answer is missing.
    pub is_complete: bool,
}

/// An account of a namespace, or what is outside of the cluster.
#[derive(Serialize, Clone, PartialEq, Debug)]
#[serde(rename_all = "camelCase")]
pub struct Workload {
    /// `shop/frontend`, a SPIFFE ID, a network.
    pub id: String,
    /// Empty for what is no pod.
    pub namespace: String,
    /// The account, or what else it is.
    pub name: String,
    /// Its pods' mode; empty where none is known.
    pub mode: String,
    /// Pods on the nodes that answered.
    pub pods: u64,
    /// Why one of its pods is not what its mode asks for; empty: all are.
    pub problem: String,
}

/// Flows that have all of this in common, of all reporters that do not tell the same ones.
#[derive(Serialize, Clone, PartialEq, Debug)]
#[serde(rename_all = "camelCase")]
pub struct Edge {
    /// The client's [`Workload::id`].
    pub from: String,
    /// The server's.
    pub to: String,
    /// The server's port; 0: several.
    pub port: u32,
    /// `tcp`, `udp`, …
    pub protocol: String,
    /// `mtls`, `kernel` or `plaintext`.
    pub via: String,
    /// `FORWARDED`, `DROPPED` or `AUDIT`.
    pub verdict: String,
    /// Why.
    pub reason: String,
    /// How many.
    pub count: u64,
    /// The last one, RFC 3339.
    pub last_seen: Option<String>,
}

/// A namespace and how far it is.
#[derive(Serialize, Clone, PartialEq, Debug)]
#[serde(rename_all = "camelCase")]
pub struct Namespace {
    /// Its name.
    pub name: String,
    /// Pods by mode.
    pub modes: BTreeMap<String, u64>,
    /// Pods that wait or cannot be enforced.
    pub problems: u64,
}

/// Edges of the picture: more would not be seen, only be slow.
pub const MAX_EDGES: usize = 20_000;

/// The picture of what agents have seen, which must be one side's of each flow.
pub fn draw(seen: &[SeenEdge], pods: &[Endpoint], is_complete: bool) -> Graph {
    let mut workloads: BTreeMap<String, Workload> = BTreeMap::new();
    let mut namespaces: BTreeMap<&str, Namespace> = BTreeMap::new();
    for pod in pods {
        let id = format!("{}/{}", pod.namespace, pod.service_account);
        let problem = match &*pod.state {
            "waiting" | "unenforceable" => format!("{}: {}", pod.state, pod.waiting),
            _ => String::new(),
        };
        let namespace = namespaces.entry(&pod.namespace).or_insert_with(|| Namespace {
            name: pod.namespace.clone(),
            modes: BTreeMap::new(),
            problems: 0,
        });
        *namespace.modes.entry(pod.mode.clone()).or_default() += 1;
        namespace.problems += u64::from(!problem.is_empty());
        let workload = workloads.entry(id.clone()).or_insert_with(|| Workload {
            id,
            namespace: pod.namespace.clone(),
            name: pod.service_account.clone(),
            mode: pod.mode.clone(),
            pods: 0,
            problem: String::new(),
        });
        workload.pods += 1;
        if !problem.is_empty() {
            workload.problem = problem;
        }
    }
    let mut edges: BTreeMap<Vec<String>, Edge> = BTreeMap::new();
    for edge in seen {
        let unknown = EdgeEnd::default();
        let (source, destination) = (
            edge.source.as_ref().unwrap_or(&unknown),
            edge.destination.as_ref().unwrap_or(&unknown),
        );
        for end in [source, destination] {
            workloads.entry(name_of(end)).or_insert_with(|| outside(end));
        }
        let last_seen = edge.last_seen.as_ref().and_then(proto::time).map(|time| time.to_string());
        let protocol =
            u8::try_from(edge.protocol).map_or_else(|_| edge.protocol.to_string(), names::protocol);
        let key = vec![
            name_of(source),
            name_of(destination),
            edge.port.to_string(),
            protocol.clone(),
            edge.via.clone(),
            edge.verdict.clone(),
            edge.reason.clone(),
        ];
        let drawn = edges.entry(key).or_insert_with(|| Edge {
            from: name_of(source),
            to: name_of(destination),
            port: edge.port,
            protocol,
            via: edge.via.clone(),
            verdict: edge.verdict.clone(),
            reason: edge.reason.clone(),
            count: 0,
            last_seen: None,
        });
        drawn.count += edge.count;
        drawn.last_seen = drawn.last_seen.take().max(last_seen);
    }
    let mut edges: Vec<Edge> = edges.into_values().collect();
    edges.sort_by_key(|edge| std::cmp::Reverse(edge.count));
    // What is refused is what one looks for.
    edges.sort_by_key(|edge| edge.verdict == "FORWARDED");
    let is_complete = is_complete && edges.len() <= MAX_EDGES;
    edges.truncate(MAX_EDGES);
    let drawn: BTreeSet<&str> = edges.iter().flat_map(|e| [&*e.from, &*e.to]).collect();
    workloads.retain(|id, workload| workload.pods > 0 || drawn.contains(&**id));
    Graph {
        workloads: workloads.into_values().collect(),
        edges,
        namespaces: namespaces.into_values().collect(),
        is_complete,
    }
}

/// A side without a pod on the nodes that answered.
fn outside(end: &EdgeEnd) -> Workload {
    let id = name_of(end);
    let name = if end.namespace.is_empty() { id.clone() } else { end.service_account.clone() };
    Workload {
        id,
        namespace: end.namespace.clone(),
        name,
        mode: String::new(),
        pods: 0,
        problem: String::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn end(namespace: &str, account: &str) -> Option<EdgeEnd> {
        Some(EdgeEnd {
            namespace: namespace.into(),
            service_account: account.into(),
            ..EdgeEnd::default()
        })
    }

    fn edge(from: Option<EdgeEnd>, verdict: &str, count: u64) -> SeenEdge {
        SeenEdge {
            source: from,
            destination: end("shop", "payments"),
            port: 8080,
            protocol: 6,
            via: "mtls".into(),
            verdict: verdict.into(),
            reason: "allowed".into(),
            count,
            ..SeenEdge::default()
        }
    }

    fn pod(name: &str, state: &str) -> Endpoint {
        Endpoint {
            namespace: "shop".into(),
            pod: name.into(),
            service_account: "payments".into(),
            mode: "strict".into(),
            state: state.into(),
            waiting: "no cgroup".into(),
            ..Endpoint::default()
        }
    }

    #[test]
    fn what_was_seen_becomes_workloads_and_edges() {
        let network = Some(EdgeEnd { network: "192.0.2.0/24".into(), ..EdgeEnd::default() });
        let seen = [
            edge(end("shop", "frontend"), "FORWARDED", 5),
            edge(end("shop", "frontend"), "FORWARDED", 2),
            edge(network, "DROPPED", 1),
        ];
        let graph = draw(&seen, &[pod("a", "served"), pod("b", "waiting")], true);
        let ids: Vec<&str> = graph.workloads.iter().map(|w| &*w.id).collect();
        assert_eq!(ids, ["192.0.2.0/24", "shop/frontend", "shop/payments"]);
        let payments = &graph.workloads[2];
        assert_eq!((payments.pods, &*payments.mode), (2, "strict"));
        assert_eq!(payments.problem, "waiting: no cgroup");
        let edges: Vec<(&str, &str, u64)> =
            graph.edges.iter().map(|e| (&*e.from, &*e.verdict, e.count)).collect();
        // What is refused comes first.
        assert_eq!(edges, [("192.0.2.0/24", "DROPPED", 1), ("shop/frontend", "FORWARDED", 7)]);
        assert_eq!(graph.edges[0].protocol, "tcp");
        assert_eq!(graph.namespaces.len(), 1);
        assert_eq!((graph.namespaces[0].modes["strict"], graph.namespaces[0].problems), (2, 1));
        assert!(graph.is_complete && !draw(&seen, &[], false).is_complete);
    }

    #[test]
    fn too_many_edges_are_told_and_the_refused_ones_kept() {
        let seen: Vec<SeenEdge> = (0..=MAX_EDGES)
            .map(|n| {
                let verdict = if n == MAX_EDGES { "DROPPED" } else { "FORWARDED" };
                edge(end("shop", &format!("a{n}")), verdict, 1)
            })
            .collect();
        let graph = draw(&seen, &[], true);
        assert_eq!((graph.edges.len(), graph.is_complete), (MAX_EDGES, false));
        assert_eq!(graph.edges[0].verdict, "DROPPED");
        assert_eq!(graph.workloads.len(), MAX_EDGES + 1, "those that are drawn");
    }
}
