//! The history of flows, as an answer in parts.

use crate::{
    flow::edges::{Edge, Edges, End, Seen},
    proto::{
        self,
        admin::{EdgeEnd, ListEdgesRequest, ListEdgesResponse, SeenEdge},
    },
    telemetry::{names, reason},
};

/// Edges in one part.
const PART: usize = 256;

/// What is asked for, in parts.
pub fn assemble(edges: &Edges, node: &str, request: &ListEdgesRequest) -> Vec<ListEdgesResponse> {
    let since = request.since.as_ref().and_then(proto::time);
    let of_namespace = |end: &End| end.namespace() == Some(&*request.namespace);
    let found = edges.select(|edge, seen| {
        let there = request.namespace.is_empty()
            || of_namespace(&edge.source)
            || of_namespace(&edge.destination);
        there && since.is_none_or(|since| seen.last >= since)
    });
    let part = |part: &[(Edge, Seen)]| ListEdgesResponse {
        node: node.to_owned(),
        edges: part.iter().map(|(edge, seen)| message(edge, seen)).collect(),
    };
    found.chunks(PART).map(part).collect()
}

fn message(edge: &Edge, seen: &Seen) -> SeenEdge {
    SeenEdge {
        reporter: edge.reporter.name().into(),
        source: Some(end(&edge.source)),
        destination: Some(end(&edge.destination)),
        port: edge.port.into(),
        protocol: edge.protocol.into(),
        via: edge.via.name().into(),
        verdict: names::verdict(edge.verdict).into(),
        reason: reason::name(edge.reason).into(),
        count: seen.count,
        first_seen: Some(proto::timestamp(seen.first)),
        last_seen: Some(proto::timestamp(seen.last)),
    }
}

pub(super) fn end(end: &End) -> EdgeEnd {
    match end {
        End::Workload { namespace, account } => EdgeEnd {
            namespace: (**namespace).into(),
            service_account: (**account).into(),
            ..EdgeEnd::default()
        },
        End::Identity(id) => EdgeEnd { identity: id.to_string(), ..EdgeEnd::default() },
        End::Network(network) => EdgeEnd { network: network.to_string(), ..EdgeEnd::default() },
        End::Others => EdgeEnd::default(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::flow::{FlowRecord, example};

    #[test]
    fn by_namespace_and_time_in_parts() {
        let edges = Edges::default();
        for port in 1..=300 {
            let mut record = example::allowed();
            record.destination.port = port;
            edges.record(&record);
        }
        let late = FlowRecord { time: example::at(100_000), ..example::denied() };
        edges.record(&late);
        let ask = |namespace: &str, since: Option<i64>| {
            let since = since.map(|ms| proto::timestamp(example::at(ms)));
            let request = ListEdgesRequest { namespace: namespace.into(), since };
            assemble(&edges, "node-2", &request)
        };
        let parts = ask("", None);
        assert_eq!(parts.iter().map(|p| p.edges.len()).collect::<Vec<_>>(), [256, 45]);
        assert_eq!(ask("shop", None), parts);
        assert!(ask("legacy", None).is_empty());
        let last = ask("shop", Some(100_000));
        let edge = &last[0].edges[0];
        assert_eq!((last.len(), last[0].edges.len(), edge.count), (1, 1, 1));
        assert_eq!((&*edge.verdict, &*edge.reason), ("DROPPED", "policy_no_match"));
        assert_eq!(edge.source.as_ref().unwrap().service_account, "intruder");
    }
}
