//! The filters of `signet flows`, each of which `--not` before it negates.

use clap::{ArgMatches, Args};

use super::exit::{Exit, Failure};
use crate::{
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
    /// Either side's SPIFFE ID, or namespace/account; * stands for anything
    #[arg(long, value_name = "glob")]
    identity: Vec<String>,
    /// Either side's port
    #[arg(long, value_name = "port")]
    port: Vec<String>,
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

const KINDS: [&str; 11] = [
    "namespace",
    "pod",
    "from_pod",
    "to_pod",
    "identity",
    "port",
    "protocol",
    "verdict",
    "reason",
    "policy",
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
    fn add_to(&self, filter: &mut FlowFilter) -> Result<(), Failure> {
        let value = self.value.clone();
        let bad = |expected: &str| {
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
