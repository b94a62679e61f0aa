//! `signet rollout check`: what would break if a namespace went to a stricter mode, by what was
//! seen of it.

use jiff::Timestamp;
use serde::Serialize;

use super::{
    edges,
    exit::{Exit, Failure, print},
    flows::parse_time,
    sockets::SocketArgs,
    status::Output,
    table::{duration, printable},
};
use crate::{
    proto::{
        self,
        admin::{EdgeEnd, Endpoint, SeenEdge},
    },
    telemetry::names,
};

/// Subcommands of `signet rollout`.
#[derive(clap::Subcommand, Debug)]
pub enum RolloutCommand {
    /// Say what would break if a namespace went to a stricter mode.
    Check(CheckArgs),
}

/// Arguments of `signet rollout check`.
#[derive(clap::Args, Debug)]
#[command(after_help = "\
Examples:
  signet rollout check shop --to strict
  signet rollout check shop --to permissive --since 24h -o json

It knows what agents have seen, at most the last seven days: put the namespace into observe
first, and ask the agents of every node that runs its pods. Exits with 1 when anything would
break, and when nothing was seen at all. Not looked at: NetworkPolicies that would keep peers
from port 15008, and flows in clear that are open now.")]
pub struct CheckArgs {
    #[command(flatten)]
    sockets: SocketArgs,
    /// The namespace
    #[arg(value_name = "NS")]
    namespace: String,
    /// The mode that it should have
    #[arg(long, value_name = "mode")]
    to: Target,
    /// Only what was seen since then (10m, 24h, or a time)
    #[arg(long, value_name = "time", value_parser = parse_time)]
    since: Option<Timestamp>,
    /// How findings are shown
    #[arg(short, long, value_name = "form", default_value = "text")]
    output: Output,
}

/// A mode that is enforced.
#[derive(clap::ValueEnum, Clone, Copy, PartialEq, Eq, Debug)]
enum Target {
    /// Tunnels where both ends can, policies enforced, plaintext accepted.
    Permissive,
    /// Tunnels only.
    Strict,
}

/// Something that would break.
#[derive(Serialize, PartialEq, Eq, Debug)]
#[serde(rename_all = "camelCase")]
struct Finding {
    /// `plaintext`, `verdict`, `unenforceable`, `waiting` or `unseen`.
    kind: &'static str,
    /// The flow, the pod or the namespace.
    subject: String,
    /// What is wrong, and the remedy.
    message: String,
    /// Flows, where it is about some.
    #[serde(skip_serializing_if = "Option::is_none")]
    count: Option<u64>,
    /// The last of them.
    #[serde(skip_serializing_if = "Option::is_none")]
    last_seen: Option<String>,
}

/// Runs the subcommand.
pub async fn run(command: RolloutCommand) -> Result<Exit, Failure> {
    let RolloutCommand::Check(args) = command;
    let seen = edges::ask(&args.sockets, &args.namespace, args.since).await?;
    let findings = check(&args.namespace, args.to, &seen.edges, &seen.pods);
    let text = match args.output {
        Output::Json => findings
            .iter()
            .map(|finding| Ok(serde_json::to_string(finding)? + "\n"))
            .collect::<serde_json::Result<String>>()
            .map_err(|e| Failure::caused(Exit::Bug, e))?,
        Output::Text => show(&args, &findings, seen.edges.len(), Timestamp::now()),
    };
    print(&text)?;
    Ok(match (seen.is_complete, findings.is_empty()) {
        (false, _) => Exit::Unreachable,
        (true, true) => Exit::Done,
        (true, false) => Exit::No,
    })
}

/// What would break, most flows first.
fn check(namespace: &str, to: Target, edges: &[SeenEdge], endpoints: &[Endpoint]) -> Vec<Finding> {
    let mut findings = Vec::new();
    for pod in endpoints {
        let kind = match &*pod.state {
            "unenforceable" => "unenforceable",
            "waiting" => "waiting",
            _ => continue,
        };
        findings.push(Finding {
            kind,
            subject: format!("pod {}/{}", pod.namespace, pod.pod),
            message: match kind {
                "waiting" => format!("is not known completely yet: {}", pod.waiting),
                _ => format!("cannot be enforced and would stay as it is: {}", pod.waiting),
            },
            count: None,
            last_seen: None,
        });
    }
    let mut about_flows: Vec<Finding> = Vec::new();
    // What is accepted in clear now, and would not be: strict and observe tell that themselves.
    let accepts_plaintext = endpoints.iter().any(|pod| pod.mode == "permissive");
    let mut edges_seen = 0;
    let mut edges: Vec<&SeenEdge> = edges.iter().collect();
    edges.sort_by_key(|edge| std::cmp::Reverse(edge.count));
    for edge in edges {
        let (Some(source), Some(destination)) = (&edge.source, &edge.destination) else { continue };
        let own = match &*edge.reporter {
            "destination" => destination,
            _ => source,
        };
        if own.namespace != namespace {
            continue;
        }
        edges_seen += 1;
        let inbound = edge.reporter == "destination";
        let of_policy = edge.reason.starts_with("policy_");
        let (kind, message) = match &*edge.verdict {
            "AUDIT" if to == Target::Strict || of_policy => {
                ("verdict", format!("would be dropped: {}{}", edge.reason, remedy(edge, source)))
            }
            "FORWARDED"
                if to == Target::Strict
                    && inbound
                    && accepts_plaintext
                    && edge.via == "plaintext"
                    && edge.protocol == 6 =>
            {
                ("plaintext", format!("is in clear, which strict refuses{}", plaintext(source)))
            }
            _ => continue,
        };
        about_flows.push(Finding {
            kind,
            subject: format!(
                "{} -> {}:{} {}",
                end(source),
                end(destination),
                edge.port,
                names::protocol(u8::try_from(edge.protocol).unwrap_or(u8::MAX))
            ),
            message,
            count: Some(edge.count),
            last_seen: edge.last_seen.as_ref().and_then(proto::time).map(|t| t.to_string()),
        });
    }
    if edges_seen == 0 {
        findings.push(Finding {
            kind: "unseen",
            subject: format!("namespace {namespace}"),
            message: "nothing was seen of it, so nothing can be said: label it \
                      signet.dev/mode=observe and let it do what it does"
                .into(),
            count: None,
            last_seen: None,
        });
    }
    findings.extend(about_flows);
    findings
}

/// What to do about a flow that observe would not let pass.
fn remedy(edge: &SeenEdge, source: &EdgeEnd) -> String {
    match &*edge.reason {
        "plaintext_refused" => plaintext(source),
        "identity_unknown" => {
            "; the address is inside the cluster's ranges and nobody's: see podRanges, \
             serviceRanges and outsideRanges"
                .into()
        }
        "policy_no_match" => "; no policy allows it: add a rule if it should be".into(),
        "policy_deny" => "; a policy denies it".into(),
        _ => String::new(),
    }
}

/// What to do about a caller in clear.
fn plaintext(source: &EdgeEnd) -> String {
    if source.namespace.is_empty() {
        "; the kubelet's own probes pass, for others exempt the port \
         (signet.dev/exempt-inbound-ports) or take the caller into the mesh"
            .into()
    } else {
        format!("; enrol the namespace {} first", printable(&source.namespace))
    }
}

/// A side, for people.
fn end(end: &EdgeEnd) -> String {
    printable(&match (&*end.namespace, &*end.identity, &*end.network) {
        ("", "", "") => "others".to_owned(),
        ("", "", network) => network.to_owned(),
        ("", identity, _) => identity.to_owned(),
        (namespace, ..) => format!("{namespace}/{}", end.service_account),
    })
}

/// A line a finding, and one that sums up.
fn show(args: &CheckArgs, findings: &[Finding], edges: usize, now: Timestamp) -> String {
    let mut text = String::new();
    for finding in findings {
        let mut line = format!("{}  {}", finding.subject, printable(&finding.message));
        if let Some(count) = finding.count {
            let ago = finding.last_seen.as_ref().and_then(|t| t.parse::<Timestamp>().ok());
            let ago = ago.map(|t| now.duration_since(t).as_secs().max(0).unsigned_abs());
            let ago = ago.map_or_else(String::new, |s| format!(", the last {} ago", duration(s)));
            line.push_str(&format!("  ({count} flows{ago})"));
        }
        text.push_str(&line);
        text.push('\n');
    }
    let to = match args.to {
        Target::Permissive => "permissive",
        Target::Strict => "strict",
    };
    let namespace = printable(&args.namespace);
    text.push_str(&match findings.len() {
        0 => format!("{namespace} can go {to}: none of {edges} kinds of flows seen would break\n"),
        n => format!("{namespace} to {to}: {n} of what was seen would break\n"),
    });
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn account(namespace: &str, name: &str) -> Option<EdgeEnd> {
        Some(EdgeEnd {
            namespace: namespace.into(),
            service_account: name.into(),
            ..EdgeEnd::default()
        })
    }

    fn edge(verdict: &str, reason: &str, via: &str) -> SeenEdge {
        SeenEdge {
            reporter: "destination".into(),
            source: account("legacy", "cron"),
            destination: account("shop", "payments"),
            port: 8080,
            protocol: 6,
            via: via.into(),
            verdict: verdict.into(),
            reason: reason.into(),
            count: 3,
            ..SeenEdge::default()
        }
    }

    fn pod(mode: &str, state: &str) -> Endpoint {
        Endpoint {
            namespace: "shop".into(),
            pod: "payments-1".into(),
            mode: mode.into(),
            state: state.into(),
            waiting: "it has a sidecar".into(),
            ..Endpoint::default()
        }
    }

    fn kinds(to: Target, edges: &[SeenEdge], pods: &[Endpoint]) -> Vec<&'static str> {
        check("shop", to, edges, pods).iter().map(|finding| finding.kind).collect()
    }

    #[test]
    fn observe_says_what_would_be_dropped() {
        let observed = [pod("observe", "observed")];
        let passes = edge("FORWARDED", "allowed", "plaintext");
        let refused = edge("AUDIT", "plaintext_refused", "plaintext");
        let denied = edge("AUDIT", "policy_no_match", "mtls");
        let all = [passes.clone(), refused.clone(), denied];
        assert_eq!(kinds(Target::Strict, &all, &observed), ["verdict", "verdict"]);
        assert_eq!(kinds(Target::Permissive, &all, &observed), ["verdict"], "policies hold there");
        assert!(kinds(Target::Strict, &[passes], &observed).is_empty());
        let finding = &check("shop", Target::Strict, &[refused], &observed)[0];
        assert_eq!(finding.subject, "legacy/cron -> shop/payments:8080 tcp");
        assert!(finding.message.contains("enrol the namespace legacy first"), "{finding:?}");
    }

    #[test]
    fn permissive_accepts_what_strict_does_not() {
        let clear = edge("FORWARDED", "allowed", "plaintext");
        let mut probe = clear.clone();
        probe.source = Some(EdgeEnd { network: "10.0.0.0/24".into(), ..EdgeEnd::default() });
        let edges = [clear.clone(), probe, edge("FORWARDED", "allowed", "mtls")];
        let pods = [pod("permissive", "served")];
        assert_eq!(kinds(Target::Strict, &edges, &pods), ["plaintext", "plaintext"]);
        assert!(kinds(Target::Permissive, &edges, &pods).is_empty());
        let finding = &check("shop", Target::Strict, &edges[1..2], &pods)[0];
        assert!(finding.message.contains("exempt-inbound-ports"), "{finding:?}");
        // What the namespace's own pods dial in clear goes on: it is outside the mesh.
        let mut outbound = clear;
        outbound.reporter = "source".into();
        (outbound.source, outbound.destination) = (outbound.destination, outbound.source);
        assert!(kinds(Target::Strict, &[outbound], &pods).is_empty());
    }

    #[test]
    fn pods_that_stay_open_and_namespaces_that_nobody_saw() {
        let seen = [edge("FORWARDED", "allowed", "mtls")];
        let pods = [pod("strict", "unenforceable"), pod("strict", "served")];
        assert_eq!(kinds(Target::Strict, &seen, &pods), ["unenforceable"]);
        assert_eq!(kinds(Target::Strict, &seen, &[pod("strict", "waiting")]), ["waiting"]);
        assert_eq!(kinds(Target::Strict, &[], &[pod("off", "off")]), ["unseen"]);
        // What others say of it is not what its own pods would meet.
        let legacy = check("legacy", Target::Strict, &seen, &[]);
        assert_eq!(legacy[0].kind, "unseen");
    }
}
