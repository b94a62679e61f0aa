//! `signet rollout check`: what would break if a namespace went to a stricter mode, by what was
//! seen of it.

mod callers;

use std::collections::{BTreeMap, BTreeSet};

use jiff::Timestamp;
use serde::Serialize;

use self::callers::{Caller, Surroundings};
use super::{
    edges,
    exit::{Exit, Failure, print},
    flows::parse_time,
    sockets::{self, SocketArgs},
    status::Output,
    table::{duration, printable},
};
use crate::{
    proto::{
        self,
        admin::{
            CheckRolloutRequest, CheckRolloutResponse, EdgeEnd, Endpoint, SeenEdge,
            admin_client::AdminClient,
        },
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

It knows what agents have seen, at most the last seven days: put the namespace into observe first,
and ask the agents of every node that runs its pods. Callers under a node's address (the host's
network, SNAT) are named with the rule to add. It also tells NetworkPolicies, the namespace's own
and those of enrolled namespaces, that would keep peers from the tunnels' port 15008, and the flows
in clear that are open now and would be closed. Exits with 1 when anything would break, and when
nothing was seen at all.")]
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
#[derive(clap::ValueEnum, serde::Deserialize, Clone, Copy, PartialEq, Eq, Debug)]
#[serde(rename_all = "lowercase")]
pub enum Target {
    /// Tunnels where both ends can, policies enforced, plaintext accepted.
    Permissive,
    /// Tunnels only.
    Strict,
}

impl Target {
    /// As labels have it.
    const fn name(self) -> &'static str {
        match self {
            Self::Permissive => "permissive",
            Self::Strict => "strict",
        }
    }
}

/// Something that would break.
#[derive(Serialize, PartialEq, Eq, Debug)]
#[serde(rename_all = "camelCase")]
pub struct Finding {
    /// `plaintext`, `verdict`, `unenforceable`, `waiting`, `unseen`, `network-policy`,
    /// `exempt-ports` or `open-plaintext`.
    kind: &'static str,
    /// The flow, the pod, the policy or the namespace.
    subject: String,
    /// What is wrong.
    text: String,
    /// What to do about it.
    remedy: String,
    /// Flows, where it is about some.
    #[serde(skip_serializing_if = "Option::is_none")]
    count: Option<u64>,
    /// The last of them.
    #[serde(skip_serializing_if = "Option::is_none")]
    last_seen: Option<String>,
}

/// A finding for programs.
#[derive(Serialize)]
struct Line<'a> {
    schema: &'static str,
    #[serde(flatten)]
    finding: &'a Finding,
}

impl<'a> Line<'a> {
    fn of(finding: &'a Finding) -> Self {
        Self { schema: "signet.dev/rollout-check/v1", finding }
    }
}

/// Runs the subcommand.
pub async fn run(command: RolloutCommand) -> Result<Exit, Failure> {
    let RolloutCommand::Check(args) = command;
    let Found { findings, seen, is_complete } =
        find(&args.sockets, &args.namespace, args.to, args.since).await?;
    let text = match args.output {
        Output::Json => findings
            .iter()
            .map(|finding| Ok(serde_json::to_string(&Line::of(finding))? + "\n"))
            .collect::<serde_json::Result<String>>()
            .map_err(|e| Failure::caused(Exit::Bug, e))?,
        Output::Text => show(&args, &findings, seen, Timestamp::now()),
    };
    print(&text)?;
    Ok(match (is_complete, findings.is_empty()) {
        (false, _) => Exit::Unreachable,
        (true, true) => Exit::Done,
        (true, false) => Exit::No,
    })
}

/// What would break, and how much that is known by.
#[derive(Serialize, Debug)]
#[serde(rename_all = "camelCase")]
pub struct Found {
    /// Everything that would.
    pub findings: Vec<Finding>,
    /// Kinds of flows that were seen of the namespace.
    pub seen: usize,
    /// False when an agent did not answer.
    pub is_complete: bool,
}

/// Asks all agents what would break if a namespace went to a mode.
pub async fn find(
    sockets: &SocketArgs,
    namespace: &str,
    to: Target,
    since: Option<Timestamp>,
) -> Result<Found, Failure> {
    let seen = edges::ask(sockets, namespace, since).await?;
    let (now, is_complete) = ask_now(sockets, namespace, to).await?;
    let mut findings = check(namespace, to, &seen.edges, &seen.pods, &now);
    findings.extend(blocking(&now));
    findings.extend(open_flows(&now));
    let is_complete = is_complete && seen.is_complete;
    Ok(Found { findings, seen: seen.edges.len(), is_complete })
}

/// Asks all agents for what is in the way now; false when one did not answer.
async fn ask_now(
    sockets: &SocketArgs,
    namespace: &str,
    to: Target,
) -> Result<(Vec<CheckRolloutResponse>, bool), Failure> {
    let (agents, mut is_complete) = sockets::connect_all(sockets).await?;
    let mut answers = Vec::new();
    for agent in &agents {
        let mut client = AdminClient::new(agent.channel.clone());
        let request = CheckRolloutRequest { namespace: namespace.to_owned(), to: to.name().into() };
        match sockets::within_time(agent, client.check_rollout(request)).await {
            Ok(answer) => answers.push(answer),
            Err(failure) if agents.len() > 1 && failure.exit == Exit::Unreachable => {
                anstream::eprintln!("warning: {failure}");
                is_complete = false;
            }
            Err(failure) => return Err(failure),
        }
    }
    Ok((answers, is_complete))
}

/// Rules of NetworkPolicies in tunnels' way; every agent knows the same ones.
fn blocking(now: &[CheckRolloutResponse]) -> Vec<Finding> {
    let rules = now.iter().flat_map(|answer| &answer.blocking);
    let mut findings: Vec<Finding> = Vec::new();
    for rule in rules {
        let finding = Finding {
            kind: "network-policy",
            subject: format!("NetworkPolicy {}", rule.policy),
            text: rule.text.clone(),
            remedy: rule.remedy.clone(),
            count: None,
            last_seen: None,
        };
        if !findings.contains(&finding) {
            findings.push(finding);
        }
    }
    findings
}

/// Flows in clear that are open, by pod, direction, other side and reason.
fn open_flows(now: &[CheckRolloutResponse]) -> Vec<Finding> {
    let mut open: BTreeMap<(String, &str), u64> = BTreeMap::new();
    for answer in now {
        let mut told = 0;
        for flow in &answer.open {
            let other = match &*flow.remote_pod {
                "" => host_of(&flow.remote).to_owned(),
                pod => pod.to_owned(),
            };
            let subject = if flow.ingress {
                format!("{other} -> {}:{}", flow.pod, port_of(&flow.local))
            } else {
                format!("{} -> {other}:{}", flow.pod, port_of(&flow.remote))
            };
            *open.entry((subject, &flow.reason)).or_default() += 1;
            told += 1;
        }
        if answer.open_total > told {
            let subject = format!("more on node {}", answer.node);
            *open.entry((subject, "")).or_default() += answer.open_total - told;
        }
    }
    let finding = |((subject, reason), count): ((String, &str), u64)| Finding {
        kind: "open-plaintext",
        subject: printable(&subject),
        text: match reason {
            "" => "open in clear, and would be closed".into(),
            reason => format!("open in clear, and would be closed: {}", printable(reason)),
        },
        remedy: "let its client connect again once both ends are enrolled; strict waits for \
                 strictGrace before it closes such flows"
            .into(),
        count: Some(count),
        last_seen: None,
    };
    open.into_iter().map(finding).collect()
}

/// The address of `10.0.0.1:80` or `[fd00::1]:80`.
fn host_of(text: &str) -> &str {
    text.rsplit_once(':').map_or(text, |(host, _)| host.trim_matches(['[', ']']))
}

fn port_of(text: &str) -> &str {
    text.rsplit_once(':').map_or("", |(_, port)| port)
}

/// What would break, most flows first.
fn check(
    namespace: &str,
    to: Target,
    edges: &[SeenEdge],
    endpoints: &[Endpoint],
    now: &[CheckRolloutResponse],
) -> Vec<Finding> {
    let mut findings = Vec::new();
    let exempt: BTreeSet<&str> =
        now.iter().flat_map(|answer| &answer.exempt_ports).map(String::as_str).collect();
    let around = Surroundings::of(now);
    // Ports that callers need who cannot be enrolled, with those callers.
    let mut needed: BTreeMap<u32, BTreeSet<String>> = BTreeMap::new();
    for pod in endpoints {
        let kind = match &*pod.state {
            "unenforceable" => "unenforceable",
            "waiting" => "waiting",
            _ => continue,
        };
        findings.push(Finding {
            kind,
            subject: format!("pod {}/{}", pod.namespace, pod.pod),
            text: match kind {
                "waiting" => format!("is not known completely yet: {}", pod.waiting),
                _ => format!("cannot be enforced and would stay as it is: {}", pod.waiting),
            },
            remedy: match kind {
                "waiting" => "ask again once signet endpoints shows it in its state".into(),
                _ => "take away what is in the way, or leave the pod out of the namespace".into(),
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
        let is_exempt =
            inbound && edge.protocol == 6 && exempt.contains(&*format!("{}/tcp", edge.port));
        let caller = around.caller(source);
        let (kind, text, remedy) = match &*edge.verdict {
            "AUDIT" if to == Target::Strict || of_policy => {
                if edge.reason == "plaintext_refused" && is_exempt {
                    continue;
                }
                let who = if inbound { caller.text() } else { String::new() };
                let text = format!("would be dropped: {}{who}", edge.reason);
                ("verdict", text, remedy(edge, source, caller))
            }
            "FORWARDED"
                if to == Target::Strict
                    && inbound
                    && accepts_plaintext
                    && !is_exempt
                    && edge.via == "plaintext"
                    && edge.protocol == 6 =>
            {
                (
                    "plaintext",
                    format!("is in clear, which strict refuses{}", caller.text()),
                    caller.remedy(source, edge.port),
                )
            }
            _ => continue,
        };
        let is_plaintext = kind == "plaintext" || edge.reason == "plaintext_refused";
        // What observe judged are no probes of the kubelet: those it lets pass.
        let may_probe = matches!(caller, Caller::Node(_)) && edge.verdict != "AUDIT";
        if is_plaintext && inbound && !may_probe && edge.port != 0 && caller != Caller::Pod {
            needed.entry(edge.port).or_default().insert(end(source));
        }
        about_flows.push(Finding {
            kind,
            subject: format!(
                "{} -> {}:{} {}",
                end(source),
                end(destination),
                edge.port,
                names::protocol(u8::try_from(edge.protocol).unwrap_or(u8::MAX))
            ),
            text,
            remedy,
            count: Some(edge.count),
            last_seen: edge.last_seen.as_ref().and_then(proto::time).map(|t| t.to_string()),
        });
    }
    if edges_seen == 0 {
        findings.push(Finding {
            kind: "unseen",
            subject: format!("namespace {namespace}"),
            text: "nothing was seen of it, so nothing can be said".into(),
            remedy: "label it signet.dev/mode=observe and let it do what it does".into(),
            count: None,
            last_seen: None,
        });
    }
    findings.extend(exempt_ports(namespace, &needed, &exempt));
    findings.extend(about_flows);
    findings
}

/// The annotation under which callers outside of the mesh still come in.
fn exempt_ports(
    namespace: &str,
    needed: &BTreeMap<u32, BTreeSet<String>>,
    exempt: &BTreeSet<&str>,
) -> Option<Finding> {
    if needed.is_empty() {
        return None;
    }
    let callers: BTreeSet<&str> = needed.values().flatten().map(String::as_str).collect();
    let callers: Vec<&str> = callers.into_iter().collect();
    let ports: Vec<String> = needed.keys().map(|port| format!("{port}/tcp")).collect();
    let mut all: BTreeSet<&str> = exempt.clone();
    all.extend(ports.iter().map(String::as_str));
    let all: Vec<&str> = all.into_iter().collect();
    Some(Finding {
        kind: "exempt-ports",
        subject: format!("namespace {}", printable(namespace)),
        text: format!(
            "callers that are no pods of the cluster reach {} in clear: {}",
            ports.join(", "),
            callers.join(", ")
        ),
        remedy: format!(
            "to keep them, annotate the namespace: signet.dev/exempt-inbound-ports: \"{}\"",
            all.join(",")
        ),
        count: None,
        last_seen: None,
    })
}

/// What to do about a flow that observe would not let pass.
fn remedy(edge: &SeenEdge, source: &EdgeEnd, caller: Caller<'_>) -> String {
    match &*edge.reason {
        "plaintext_refused" => caller.remedy(source, edge.port),
        "identity_unknown" => {
            "the address is inside the cluster's ranges and nobody's: see podRanges, \
             serviceRanges and outsideRanges"
                .into()
        }
        "policy_no_match" if edge.via == "plaintext" && !source.network.is_empty() => format!(
            "no policy allows it: add a rule from ipBlocks: [{}] to port {} if it should be",
            printable(&source.network),
            edge.port
        ),
        "policy_no_match" => "no policy allows it: add a rule if it should be".into(),
        "policy_deny" => "a policy denies it: change that if it should pass".into(),
        _ => "see docs/reasons.md".into(),
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
        let said = printable(&format!("{}; {}", finding.text, finding.remedy));
        let mut line = format!("{}  {said}", finding.subject);
        if let Some(count) = finding.count {
            let ago = finding.last_seen.as_ref().and_then(|t| t.parse::<Timestamp>().ok());
            let ago = ago.map(|t| now.duration_since(t).as_secs().max(0).unsigned_abs());
            let ago = ago.map_or_else(String::new, |s| format!(", the last {} ago", duration(s)));
            line.push_str(&format!("  ({count} flows{ago})"));
        }
        text.push_str(&line);
        text.push('\n');
    }
    let to = args.to.name();
    let namespace = printable(&args.namespace);
    text.push_str(&match findings.len() {
        0 => format!("{namespace} can go {to}: none of {edges} kinds of flows seen would break\n"),
        n => format!("{namespace} to {to}: {n} findings of what would break\n"),
    });
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proto::admin::{BlockingRule, OpenFlow};

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
        check("shop", to, edges, pods, &[]).iter().map(|finding| finding.kind).collect()
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
        let finding = &check("shop", Target::Strict, &[refused], &observed, &[])[0];
        assert_eq!(finding.subject, "legacy/cron -> shop/payments:8080 tcp");
        assert!(finding.remedy.contains("enrol the namespace legacy first"), "{finding:?}");
    }

    #[test]
    fn permissive_accepts_what_strict_does_not() {
        let clear = edge("FORWARDED", "allowed", "plaintext");
        let mut probe = clear.clone();
        probe.source = Some(EdgeEnd { network: "10.0.0.0/24".into(), ..EdgeEnd::default() });
        let edges = [clear.clone(), probe, edge("FORWARDED", "allowed", "mtls")];
        let pods = [pod("permissive", "served")];
        let all = ["exempt-ports", "plaintext", "plaintext"];
        assert_eq!(kinds(Target::Strict, &edges, &pods), all);
        assert!(kinds(Target::Permissive, &edges, &pods).is_empty());
        let now = |exempt: &[&str], nodes: &[&str]| CheckRolloutResponse {
            exempt_ports: exempt.iter().map(|p| (*p).into()).collect(),
            node_networks: nodes.iter().map(|n| (*n).into()).collect(),
            ..CheckRolloutResponse::default()
        };
        let of = |now| check("shop", Target::Strict, &edges[1..2], &pods, &[now]);
        let found = of(now(&["9090/tcp"], &[]));
        assert_eq!(found[0].kind, "exempt-ports");
        let line = "signet.dev/exempt-inbound-ports: \"8080/tcp,9090/tcp\"";
        assert!(found[0].remedy.contains(line), "{found:?}");
        // A port that is exempt already breaks nothing; a node needs no exemption for probes.
        assert!(of(now(&["8080/tcp"], &[])).is_empty());
        let found = of(now(&[], &["10.0.0.0/24"]));
        assert!(found.len() == 1 && found[0].remedy.contains("own probes pass"), "{found:?}");
        assert!(found[0].text.contains("from a node's own address"), "{found:?}");
        // What observe refused was no probe: its port is to be exempt.
        let mut judged = edges[1].clone();
        (judged.verdict, judged.reason) = ("AUDIT".into(), "plaintext_refused".into());
        let observed = [pod("observe", "observed")];
        let nodes = [now(&[], &["10.0.0.0/24"])];
        let found = check("shop", Target::Strict, &[judged], &observed, &nodes);
        let both: Vec<_> = found.iter().map(|finding| finding.kind).collect();
        assert_eq!(both, ["exempt-ports", "verdict"]);
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
        let legacy = check("legacy", Target::Strict, &seen, &[], &[]);
        assert_eq!(legacy[0].kind, "unseen");
    }

    #[test]
    fn what_is_in_the_way_now_is_told_once_and_counted() {
        let flow = |remote: &str, pod: &str, ingress: bool| OpenFlow {
            pod: "shop/payments".into(),
            local: "10.0.0.1:8080".into(),
            remote: remote.into(),
            remote_pod: pod.into(),
            ingress,
            reason: "plaintext_refused".into(),
        };
        let rule = BlockingRule {
            policy: "shop/db".into(),
            text: "lets 80/tcp pass".into(),
            remedy: "add".into(),
        };
        let answer = CheckRolloutResponse {
            node: "node-1".into(),
            blocking: vec![rule],
            open: vec![
                flow("10.0.0.9:40000", "legacy/cron", true),
                flow("10.0.0.9:40001", "legacy/cron", true),
                flow("[fd00::9]:40001", "", true),
                flow("10.0.0.9:9000", "legacy/cron", false),
            ],
            open_total: 7,
            ..CheckRolloutResponse::default()
        };
        let both = [answer.clone(), CheckRolloutResponse { open: vec![], open_total: 0, ..answer }];
        assert_eq!(blocking(&both).len(), 1, "every agent knows it");
        let found = open_flows(&both);
        let subjects: Vec<_> = found.iter().map(|f| (&*f.subject, f.count)).collect();
        assert_eq!(
            subjects,
            [
                ("fd00::9 -> shop/payments:8080", Some(1)),
                ("legacy/cron -> shop/payments:8080", Some(2)),
                ("more on node node-1", Some(3)),
                ("shop/payments -> legacy/cron:9000", Some(1)),
            ]
        );
    }
}
