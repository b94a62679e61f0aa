//! The filters of `signet flows`, each of which `--not` before it negates.

use std::net::IpAddr;

use clap::{ArgMatches, Args};
use ipnet::IpNet;

use super::exit::{Exit, Failure};
use crate::{
    flow::Via,
    observer::{filter::status_of, labels::LabelSelector},
    proto::flow::{self, FlowFilter},
    telemetry::{names, reason},
};

/// Filters; several of one kind: any of them, of different kinds: all of them.
#[derive(Args, Clone, Debug, Default)]
#[command(next_help_heading = "Filters")]
pub struct FilterArgs {
    /// Negate the filter that follows: --not --port 53
    #[arg(
        long,
        num_args = 0,
        action = clap::ArgAction::Append,
        default_missing_value = "true",
        value_parser = clap::builder::BoolValueParser::new()
    )]
    not: Vec<bool>,
    /// Either side's namespace
    #[arg(short, long, value_name = "name")]
    namespace: Vec<String>,
    /// Either side's pod, by the beginning of its name: [namespace/]pod
    #[arg(long, value_name = "pod")]
    pod: Vec<String>,
    /// The client's pod
    #[arg(long, value_name = "pod")]
    from_pod: Vec<String>,
    /// The server's pod
    #[arg(long, value_name = "pod")]
    to_pod: Vec<String>,
    /// The client's namespace
    #[arg(long, value_name = "name")]
    from_namespace: Vec<String>,
    /// The server's namespace
    #[arg(long, value_name = "name")]
    to_namespace: Vec<String>,
    /// Either side's labels, as a selector: app=payments,tier!=test
    #[arg(short, long, value_name = "selector")]
    label: Vec<String>,
    /// The client's labels
    #[arg(long, value_name = "selector")]
    from_label: Vec<String>,
    /// The server's labels
    #[arg(long, value_name = "selector")]
    to_label: Vec<String>,
    /// Either side's workload: [kind/]name
    #[arg(long, value_name = "workload")]
    workload: Vec<String>,
    /// The client's workload
    #[arg(long, value_name = "workload")]
    from_workload: Vec<String>,
    /// The server's workload
    #[arg(long, value_name = "workload")]
    to_workload: Vec<String>,
    /// The service that was dialled, by the beginning of its name: [namespace/]service
    #[arg(long, value_name = "service")]
    service: Vec<String>,
    /// Either side's address, or a range of addresses
    #[arg(long, value_name = "address")]
    ip: Vec<String>,
    /// The client's address
    #[arg(long, value_name = "address")]
    from_ip: Vec<String>,
    /// The server's address
    #[arg(long, value_name = "address")]
    to_ip: Vec<String>,
    /// Either side's SPIFFE ID, or namespace/account; * stands for anything
    #[arg(long, value_name = "glob")]
    identity: Vec<String>,
    /// Either side's port
    #[arg(long, value_name = "port")]
    port: Vec<String>,
    /// The client's port, or a range of ports: 8000-8999
    #[arg(long, value_name = "port")]
    from_port: Vec<String>,
    /// The server's port
    #[arg(long, value_name = "port")]
    to_port: Vec<String>,
    /// tcp, udp or a number
    #[arg(long, value_name = "protocol")]
    protocol: Vec<String>,
    /// forwarded, dropped or audit
    #[arg(long, value_name = "verdict")]
    verdict: Vec<String>,
    /// A reason's name, as shown in the REASON column
    #[arg(long, value_name = "reason")]
    reason: Vec<String>,
    /// The deciding policy: [[kind/]namespace/]name; * stands for anything
    #[arg(long, value_name = "policy")]
    policy: Vec<String>,
    /// How it travelled: mtls, kernel or plaintext
    #[arg(long, value_name = "way")]
    via: Vec<String>,
    /// ingress or egress, as the reporting pod sees it
    #[arg(long, value_name = "direction")]
    direction: Vec<String>,
    /// Requests with this HTTP method
    #[arg(long, value_name = "method")]
    http_method: Vec<String>,
    /// Requests whose path the regular expression is found in
    #[arg(long, value_name = "regex")]
    http_path: Vec<String>,
    /// Requests answered with this status (404), or with one that begins so (5+)
    #[arg(long, value_name = "status")]
    http_status: Vec<String>,
    /// One flow, by the identifier that both ends share
    #[arg(long, value_name = "uuid")]
    uuid: Vec<String>,
    /// The node that reports; * stands for anything
    #[arg(long, value_name = "name")]
    node: Vec<String>,
}

/// One filter as it was given.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Term {
    /// `--not` stood before it.
    pub negated: bool,
    kind: &'static str,
    value: String,
}

const KINDS: [&str; 31] = [
    "namespace",
    "from_namespace",
    "to_namespace",
    "pod",
    "from_pod",
    "to_pod",
    "label",
    "from_label",
    "to_label",
    "workload",
    "from_workload",
    "to_workload",
    "service",
    "ip",
    "from_ip",
    "to_ip",
    "identity",
    "port",
    "from_port",
    "to_port",
    "protocol",
    "verdict",
    "reason",
    "policy",
    "via",
    "direction",
    "http_method",
    "http_path",
    "http_status",
    "uuid",
    "node",
];

/// The filters in the order of the command line; each `--not` belongs to the next one.
pub fn terms(matches: Option<&ArgMatches>) -> Result<Vec<Term>, Failure> {
    let Some(matches) = matches else { return Ok(Vec::new()) };
    let mut nots: Vec<usize> = match matches.value_source("not") {
        Some(clap::parser::ValueSource::CommandLine) => {
            matches.indices_of("not").into_iter().flatten().collect()
        }
        _ => Vec::new(),
    };
    let mut terms = Vec::new();
    for kind in KINDS {
        let values = matches.get_many::<String>(kind).into_iter().flatten();
        for (index, value) in matches.indices_of(kind).into_iter().flatten().zip(values) {
            // The value's index follows the flag's, and that the one of `--not`'s own value.
            let negation = nots.iter().position(|not| not + 2 == index);
            if let Some(at) = negation {
                nots.remove(at);
            }
            let term = Term { negated: negation.is_some(), kind, value: value.clone() };
            // Checked here, where it can be named as the user wrote it.
            term.add_to(&mut FlowFilter::default())?;
            terms.push((index, term));
        }
    }
    if !nots.is_empty() {
        return Err(Failure::new(
            Exit::Usage,
            "--not: no filter follows it; write for example --not --port 53",
        ));
    }
    terms.sort_by_key(|(index, _)| *index);
    Ok(terms.into_iter().map(|(_, term)| term).collect())
}

/// The request's lists: one filter that all must hold for, and one for each negation.
pub fn lists(terms: &[Term]) -> Result<(Vec<FlowFilter>, Vec<FlowFilter>), Failure> {
    let mut wanted = FlowFilter::default();
    let mut unwanted = Vec::new();
    for term in terms {
        if term.negated {
            let mut filter = FlowFilter::default();
            term.add_to(&mut filter)?;
            unwanted.push(filter);
        } else {
            term.add_to(&mut wanted)?;
        }
    }
    let whitelist = if wanted == FlowFilter::default() { Vec::new() } else { vec![wanted] };
    Ok((whitelist, unwanted))
}

impl Term {
    /// The flag, `_` for `-`.
    pub(super) fn kind(&self) -> &'static str {
        self.kind
    }

    /// What was given.
    pub(super) fn value(&self) -> &str {
        &self.value
    }

    fn add_to(&self, filter: &mut FlowFilter) -> Result<(), Failure> {
        let value = self.value.clone();
        let bad = |expected: &'static str| {
            let flag = self.kind.replace('_', "-");
            Failure::new(Exit::Usage, format!("--{flag}: {:?} is not {expected}", self.value))
        };
        if value.is_empty() {
            return Err(bad("a value"));
        }
        match self.kind {
            "namespace" => filter.any_namespace.push(value),
            "pod" => filter.any_pod.push(value),
            "from_pod" => filter.source_pod.push(in_any_namespace(value)),
            "to_pod" => filter.destination_pod.push(in_any_namespace(value)),
            "from_namespace" => filter.source_namespace.push(value),
            "to_namespace" => filter.destination_namespace.push(value),
            "label" => filter.any_label.push(selector(value).map_err(bad)?),
            "from_label" => filter.source_label.push(selector(value).map_err(bad)?),
            "to_label" => filter.destination_label.push(selector(value).map_err(bad)?),
            "workload" => filter.any_workload.push(workload(&value)),
            "from_workload" => filter.source_workload.push(workload(&value)),
            "to_workload" => filter.destination_workload.push(workload(&value)),
            "service" => filter.any_service.push(value),
            "ip" => filter.any_ip.push(network(value).map_err(bad)?),
            "from_ip" => filter.source_ip.push(network(value).map_err(bad)?),
            "to_ip" => filter.destination_ip.push(network(value).map_err(bad)?),
            "from_port" => filter.source_port.push(ports(value).map_err(bad)?),
            "to_port" => filter.destination_port.push(ports(value).map_err(bad)?),
            "via" => {
                Via::parse(&value).ok_or_else(|| bad("mtls, kernel or plaintext"))?;
                filter.via.push(value);
            }
            "direction" => filter.traffic_direction.push(match value.as_str() {
                "ingress" => flow::TrafficDirection::Ingress.into(),
                "egress" => flow::TrafficDirection::Egress.into(),
                _ => return Err(bad("ingress or egress")),
            }),
            "uuid" => {
                uuid::Uuid::parse_str(&value).map_err(|_| bad("the identifier of a flow"))?;
                filter.uuid.push(value.to_ascii_lowercase());
            }
            "http_method" => filter.http_method.push(value),
            "http_path" => {
                regex::Regex::new(&value).map_err(|_| bad("a regular expression"))?;
                filter.http_path.push(value);
            }
            "http_status" => {
                status_of(value.clone()).map_err(|_| bad("an HTTP status (404, 5+)"))?;
                filter.http_status_code.push(value);
            }
            "identity" => filter.any_identity.push(value),
            "port" => {
                let port: u16 = value.parse().map_err(|_| bad("a port from 0 to 65535"))?;
                filter.any_port.push(port.into());
            }
            "protocol" => {
                names::parse_protocol(&value).ok_or_else(|| bad("tcp, udp or a number"))?;
                filter.protocol.push(value);
            }
            "verdict" => {
                let verdict = names::parse_verdict(&value)
                    .ok_or_else(|| bad("forwarded, dropped or audit"))?;
                filter.verdict.push(verdict as i32);
            }
            "reason" => {
                reason::parse(&value)
                    .ok_or_else(|| bad("a reason (docs/reasons.md lists them)"))?;
                filter.reason.push(value);
            }
            "policy" => filter.policy.push(value),
            "node" => filter.node_name.push(value),
            other => {
                return Err(Failure::new(Exit::Bug, format!("filter {other} has no field")));
            }
        }
        Ok(())
    }
}

fn selector(value: String) -> Result<String, &'static str> {
    LabelSelector::parse(&value).map(|_| value).ok_or("a label selector (app=payments,tier!=test)")
}

fn network(value: String) -> Result<String, &'static str> {
    let is_one = value.parse::<IpNet>().is_ok() || value.parse::<IpAddr>().is_ok();
    is_one.then_some(value).ok_or("an address or a range (10.0.0.0/16)")
}

fn ports(value: String) -> Result<String, &'static str> {
    let (first, last) = value.split_once('-').unwrap_or((&value, &value));
    match (first.parse::<u16>(), last.parse::<u16>()) {
        (Ok(first), Ok(last)) if first <= last => Ok(value),
        _ => Err("a port or a range of ports (8000-8999)"),
    }
}

/// `[kind/]name`.
fn workload(value: &str) -> flow::Workload {
    let (kind, name) = value.split_once('/').unwrap_or(("", value));
    flow::Workload { kind: kind.into(), name: name.into() }
}

/// Hubble takes a name alone for one in namespace `default`; we for one in any.
fn in_any_namespace(pod: String) -> String {
    if pod.contains('/') { pod } else { format!("/{pod}") }
}

// The ABI's numbers of verdicts are Hubble's.
const _: () = {
    use signet_ebpf::abi::Verdict;
    assert!(Verdict::Forwarded as i32 == flow::Verdict::Forwarded as i32);
    assert!(Verdict::Dropped as i32 == flow::Verdict::Dropped as i32);
    assert!(Verdict::Audit as i32 == flow::Verdict::Audit as i32);
};

#[cfg(test)]
mod tests {
    use clap::{Command, FromArgMatches};

    use super::*;

    fn parse(args: &[&str]) -> Result<Vec<Term>, Failure> {
        let command = FilterArgs::augment_args(Command::new("flows")).no_binary_name(true);
        let matches = command.try_get_matches_from(args).unwrap();
        FilterArgs::from_arg_matches(&matches).unwrap();
        terms(Some(&matches))
    }

    fn shown(args: &[&str]) -> Vec<String> {
        parse(args)
            .unwrap()
            .into_iter()
            .map(|t| format!("{}{}={}", if t.negated { "!" } else { "" }, t.kind, t.value))
            .collect()
    }

    #[test]
    fn not_belongs_to_the_filter_that_follows_it() {
        assert_eq!(shown(&["--pod", "a", "--port", "1"]), ["pod=a", "port=1"]);
        assert_eq!(shown(&["--not", "--pod", "a", "--port", "1"]), ["!pod=a", "port=1"]);
        assert_eq!(shown(&["--pod", "a", "--not", "--pod", "b"]), ["pod=a", "!pod=b"]);
        assert_eq!(shown(&["--not", "--port=53", "-n", "x"]), ["!port=53", "namespace=x"]);
        assert_eq!(shown(&["--not", "-nx", "--not", "-n", "y"]), ["!namespace=x", "!namespace=y"]);
        assert_eq!(
            shown(&["--not", "--verdict", "dropped", "--verdict", "audit", "--not", "--port", "2"]),
            ["!verdict=dropped", "verdict=audit", "!port=2"]
        );
    }

    #[test]
    fn a_not_without_a_filter_is_usage() {
        for args in [&["--not"][..], &["--pod", "a", "--not"], &["--not", "--not", "--pod", "a"]] {
            let failure = parse(args).unwrap_err();
            assert_eq!(failure.exit, Exit::Usage, "{args:?}");
            assert!(failure.to_string().contains("--not"), "{failure}");
        }
    }

    #[test]
    fn values_are_checked_and_named() {
        for (args, named) in [
            (["--port", "http"], "--port: \"http\""),
            (["--port", "65536"], "--port: \"65536\""),
            (["--verdict", "maybe"], "--verdict: \"maybe\""),
            (["--reason", "because"], "--reason: \"because\""),
            (["--protocol", "smoke"], "--protocol: \"smoke\""),
            (["--from-pod", ""], "--from-pod: \"\""),
            (["--label", "a b"], "--label: \"a b\""),
            (["--to-ip", "payments"], "--to-ip: \"payments\""),
            (["--to-port", "9-3"], "--to-port: \"9-3\""),
            (["--via", "pigeon"], "--via: \"pigeon\""),
            (["--direction", "up"], "--direction: \"up\""),
            (["--uuid", "7"], "--uuid: \"7\""),
            (["--http-status", "4xx"], "--http-status: \"4xx\""),
            (["--http-path", "/("], "--http-path: \"/(\""),
        ] {
            let failure = parse(&args).unwrap_err();
            assert_eq!(failure.exit, Exit::Usage);
            assert!(failure.to_string().starts_with(named), "{failure}");
        }
        assert_eq!(shown(&["--verdict", "DROPPED"]), ["verdict=DROPPED"]);
    }

    #[test]
    fn lists_compose() {
        let terms = parse(&["--to-pod", "b", "--not", "--port", "1", "--not", "--port", "2"]);
        let (whitelist, blacklist) = lists(&terms.unwrap()).unwrap();
        assert_eq!(whitelist.len(), 1);
        assert_eq!(whitelist[0].destination_pod, ["/b"]);
        assert_eq!(blacklist.iter().map(|f| f.any_port.clone()).collect::<Vec<_>>(), [[1], [2]]);
        assert_eq!(lists(&[]).unwrap(), (vec![], vec![]));
    }
}
