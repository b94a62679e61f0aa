//! `signet flows --aggregate`: who talked to whom in the last seven days, from the agents'
//! history rather than from their recent flows.

use std::{
    collections::{HashMap, HashSet},
    io::{self, Write},
};

use jiff::{Timestamp, tz::TimeZone};
use serde_json::json;

use super::{
    edges::name_of,
    exit::{Exit, Failure},
    filters::Term,
    flow_lines,
    sockets::{self, Agent},
    table::{Table, printable},
};
use crate::{
    observer::glob,
    proto::{
        self,
        admin::{
            EdgeEnd, ListEdgesRequest, ListEdgesResponse, SeenEdge, admin_client::AdminClient,
        },
    },
    telemetry::names,
};

const HEADER: [&str; 8] =
    ["LAST", "FLOWS", "SOURCE", "DESTINATION", "PROTO", "VIA", "VERDICT", "REASON"];
const VERDICT_COLUMN: usize = 6;

/// What all agents have seen, one line for each reporter's edge.
pub async fn ask(
    agents: &[Agent],
    since: Option<Timestamp>,
    terms: &[Term],
) -> Result<Vec<(String, SeenEdge)>, Failure> {
    for term in terms {
        term.of_edge(&SeenEdge::default(), "")?;
    }
    let mut found = Vec::new();
    for agent in agents {
        for (node, edge) in seen_by(agent, since).await? {
            if shows(terms, &edge, &node)? {
                found.push((node, edge));
            }
        }
    }
    Ok(one_side_each(found))
}

/// Every edge of an agent, with its node.
pub async fn seen_by(
    agent: &Agent,
    since: Option<Timestamp>,
) -> Result<Vec<(String, SeenEdge)>, Failure> {
    let mut client = AdminClient::new(agent.channel.clone());
    let request = ListEdgesRequest { namespace: String::new(), since: since.map(proto::timestamp) };
    let parts = sockets::all_parts(agent, client.list_edges(request)).await?;
    let named = |part: ListEdgesResponse| {
        let node = part.node;
        part.edges.into_iter().map(move |edge| (node.clone(), edge))
    };
    Ok(parts.into_iter().flat_map(named).collect())
}

/// Terms of one kind: any of them; of different kinds: all; negated ones: none.
fn shows(terms: &[Term], edge: &SeenEdge, node: &str) -> Result<bool, Failure> {
    let mut wanted: HashMap<&str, bool> = HashMap::new();
    for term in terms {
        let holds = term.of_edge(edge, node)?;
        if term.negated {
            if holds {
                return Ok(false);
            }
        } else {
            *wanted.entry(term.kind()).or_default() |= holds;
        }
    }
    Ok(wanted.values().all(|holds| *holds))
}

/// A tunnelled flow that both ends reported counts once, as the destination saw it. An edge in
/// clear is reported by one end, or by two that do not know of each other: both are shown.
pub fn one_side_each<A>(found: Vec<(A, SeenEdge)>) -> Vec<(A, SeenEdge)> {
    let key = |edge: &SeenEdge| {
        let end = |end: &Option<EdgeEnd>| end.as_ref().map(name_of).unwrap_or_default();
        (
            end(&edge.source),
            end(&edge.destination),
            edge.port,
            edge.protocol,
            edge.via.clone(),
            edge.verdict.clone(),
        )
    };
    let received: HashSet<_> = found
        .iter()
        .filter(|(_, edge)| edge.reporter == "destination" && edge.via == "mtls")
        .map(|(_, edge)| key(edge))
        .collect();
    found
        .into_iter()
        .filter(|(_, edge)| edge.reporter == "destination" || !received.contains(&key(edge)))
        .collect()
}

/// Prints the newest `limit` of them, oldest first.
pub fn print(
    mut found: Vec<(String, SeenEdge)>,
    until: Option<Timestamp>,
    limit: Option<u64>,
    as_json: bool,
    out: &mut impl Write,
) -> io::Result<()> {
    let time = |t: &Option<prost_types::Timestamp>| t.as_ref().and_then(proto::time);
    found.retain(|(_, edge)| match (until, time(&edge.first_seen)) {
        (Some(until), Some(first)) => first <= until,
        _ => true,
    });
    found.sort_by_key(|(_, edge)| time(&edge.last_seen));
    if let Some(limit) = limit {
        let limit = usize::try_from(limit).unwrap_or(usize::MAX);
        found.drain(..found.len().saturating_sub(limit));
    }
    if as_json {
        for (node, edge) in &found {
            writeln!(out, "{}", line(node, edge))?;
        }
        return out.flush();
    }
    let mut rows = vec![HEADER.map(String::from).to_vec()];
    rows.extend(found.iter().map(|(_, edge)| row(edge)));
    let mut table = Table::default();
    rows.iter().for_each(|row| table.fit(row));
    for row in &rows {
        let styled = table.line(row, |column, cell| {
            (column == VERDICT_COLUMN).then(|| flow_lines::style(cell)).flatten()
        });
        writeln!(out, "{styled}")?;
    }
    out.flush()
}

fn shown(end: &Option<EdgeEnd>) -> String {
    printable(&end.as_ref().map_or_else(|| "others".into(), name_of))
}

fn row(edge: &SeenEdge) -> Vec<String> {
    let last = edge.last_seen.as_ref().and_then(proto::time).map_or_else(
        || "-".into(),
        |t| t.to_zoned(TimeZone::UTC).strftime("%Y-%m-%d %H:%M:%S").to_string(),
    );
    let destination = match edge.port {
        0 => shown(&edge.destination),
        port => format!("{} :{port}", shown(&edge.destination)),
    };
    vec![
        last,
        edge.count.to_string(),
        shown(&edge.source),
        destination,
        protocol(edge),
        printable(&edge.via),
        printable(&edge.verdict),
        printable(&edge.reason),
    ]
}

fn protocol(edge: &SeenEdge) -> String {
    u8::try_from(edge.protocol).map_or_else(|_| edge.protocol.to_string(), names::protocol)
}

/// An edge for programs.
pub fn line(node: &str, edge: &SeenEdge) -> serde_json::Value {
    let time = |t: &Option<prost_types::Timestamp>| {
        t.as_ref().and_then(proto::time).map(|t| t.to_string())
    };
    let end = |end: &Option<EdgeEnd>| {
        let end = end.clone().unwrap_or_default();
        let fields = [
            ("namespace", end.namespace),
            ("serviceAccount", end.service_account),
            ("identity", end.identity),
            ("network", end.network),
        ];
        let given = fields.into_iter().filter(|(_, value)| !value.is_empty());
        serde_json::Value::Object(given.map(|(k, v)| (k.to_owned(), v.into())).collect())
    };
    json!({
        "schema": "signet.dev/edge/v1",
        "node": node,
        "reporter": edge.reporter,
        "source": end(&edge.source),
        "destination": end(&edge.destination),
        "port": edge.port,
        "protocol": protocol(edge),
        "via": edge.via,
        "verdict": edge.verdict,
        "reason": edge.reason,
        "flows": edge.count,
        "firstSeen": time(&edge.first_seen),
        "lastSeen": time(&edge.last_seen),
    })
}

impl Term {
    /// True when the filter holds for an edge that `node` tells of. Edges have accounts, not
    /// pods: a filter that they cannot answer is a failure, never ignored.
    fn of_edge(&self, edge: &SeenEdge, node: &str) -> Result<bool, Failure> {
        let value = self.value();
        let end = |end: &Option<EdgeEnd>| end.clone().unwrap_or_default();
        let (source, destination) = (end(&edge.source), end(&edge.destination));
        let has_port = |text: &str| {
            let (first, last) = text.split_once('-').unwrap_or((text, text));
            first.parse().is_ok_and(|first: u32| edge.port >= first)
                && last.parse().is_ok_and(|last: u32| edge.port <= last)
        };
        Ok(match self.kind() {
            "namespace" => source.namespace == value || destination.namespace == value,
            "from_namespace" => source.namespace == value,
            "to_namespace" => destination.namespace == value,
            "identity" => [&source, &destination].iter().any(|end| {
                glob::matches(value, &name_of(end))
                    || value.split_once("/ns/").is_some_and(|(_, rest)| {
                        rest.split_once("/sa/").is_some_and(|(namespace, account)| {
                            end.identity.is_empty()
                                && glob::matches(namespace, &end.namespace)
                                && glob::matches(account, &end.service_account)
                        })
                    })
            }),
            "port" | "to_port" => has_port(value),
            "protocol" => names::parse_protocol(value).map(u32::from) == Some(edge.protocol),
            "verdict" => edge.verdict.eq_ignore_ascii_case(value),
            "reason" => edge.reason == value,
            "via" => edge.via == value,
            "node" => glob::matches(value, node),
            other => {
                return Err(Failure::new(
                    Exit::Usage,
                    format!(
                        "--{} and --aggregate exclude each other: history has accounts, networks \
                         and servers' ports, nothing finer; filter by --namespace, \
                         --from-namespace, --to-namespace, --identity, --port, --protocol, --via, \
                         --verdict, --reason or --node",
                        other.replace('_', "-")
                    ),
                ));
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn end(name: &str) -> Option<EdgeEnd> {
        let (namespace, service_account) = name.split_once('/').unwrap();
        Some(EdgeEnd {
            namespace: namespace.into(),
            service_account: service_account.into(),
            ..EdgeEnd::default()
        })
    }

    fn edge(reporter: &str, source: &str, via: &str, count: u64) -> (String, SeenEdge) {
        let edge = SeenEdge {
            reporter: reporter.into(),
            source: end(source),
            destination: end("shop/payments"),
            port: 8080,
            protocol: 6,
            via: via.into(),
            verdict: "FORWARDED".into(),
            reason: "allowed".into(),
            count,
            first_seen: Some(prost_types::Timestamp { seconds: 100, nanos: 0 }),
            last_seen: Some(prost_types::Timestamp {
                seconds: 200 + i64::try_from(count).unwrap(),
                nanos: 0,
            }),
        };
        ("node-1".into(), edge)
    }

    #[test]
    fn a_tunnelled_edge_of_both_ends_is_one() {
        let found = one_side_each(vec![
            edge("source", "shop/frontend", "mtls", 3),
            edge("destination", "shop/frontend", "mtls", 4),
            edge("source", "shop/other", "mtls", 5),
            edge("source", "shop/frontend", "plaintext", 6),
        ]);
        assert_eq!(found.iter().map(|(_, e)| e.count).collect::<Vec<_>>(), [4, 5, 6]);
    }

    #[test]
    fn printed_newest_last_and_no_more_than_asked_for() {
        let found = vec![
            edge("destination", "shop/b", "mtls", 9),
            edge("destination", "shop/a", "mtls", 1),
            edge("destination", "shop/c", "mtls", 5),
        ];
        let mut out = Vec::new();
        print(found.clone(), None, Some(2), false, &mut out).unwrap();
        assert_eq!(
            anstream::adapter::strip_str(&String::from_utf8(out).unwrap()).to_string(),
            "LAST                 FLOWS  SOURCE  DESTINATION          PROTO  VIA   VERDICT    REASON\n\
             1970-01-01 00:03:25  5      shop/c  shop/payments :8080  tcp    mtls  FORWARDED  allowed\n\
             1970-01-01 00:03:29  9      shop/b  shop/payments :8080  tcp    mtls  FORWARDED  allowed\n"
        );
        let mut out = Vec::new();
        let before = Timestamp::from_second(50).unwrap();
        print(found, Some(before), None, true, &mut out).unwrap();
        assert!(out.is_empty(), "what began later is not shown");
    }
}
