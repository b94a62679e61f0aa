//! `signet status`.

use clap::ValueEnum;
use jiff::Timestamp;
use serde::Serialize;

use super::{
    exit::{Exit, Failure},
    sockets::{self, Agent, SocketArgs},
    table::{Table, duration, printable},
};
use crate::proto::{
    self,
    admin::{StatusRequest, StatusResponse, Watch, admin_client::AdminClient},
};

/// Arguments of `signet status`.
#[derive(clap::Args, Debug)]
#[command(after_help = "\
Examples:
  signet status
  signet status -o json
  signet status --all-nodes --socket /run/a/admin/agent.sock --socket /run/b/admin/agent.sock

Exits with 1 when an agent is not READY.")]
pub struct StatusArgs {
    #[command(flatten)]
    sockets: SocketArgs,
    /// How it is shown
    #[arg(short, long, value_name = "form", default_value = "text")]
    output: Output,
    /// One line a node, those with problems first
    #[arg(long)]
    all_nodes: bool,
}

/// For people or programs.
#[derive(ValueEnum, Clone, Copy, PartialEq, Eq, Debug)]
pub enum Output {
    /// For people.
    Text,
    /// One JSON object a node.
    Json,
}

/// Asks and prints.
pub async fn run(args: StatusArgs) -> Result<Exit, Failure> {
    let (agents, is_complete) = sockets::connect_all(&args.sockets).await?;
    let (mut answers, all_answered) = sockets::ask_all(&agents, ask).await?;
    let is_complete = is_complete && all_answered;
    let mut text = String::new();
    match (args.output, args.all_nodes) {
        (Output::Json, _) => {
            for status in &answers {
                text.push_str(&json(status)?);
            }
        }
        (Output::Text, true) => text = all_nodes(&mut answers),
        (Output::Text, false) => {
            text = answers.iter().map(self::text).collect::<Vec<_>>().join("\n");
        }
    }
    super::exit::print(&text)?;
    let is_ready = answers.iter().all(|s| s.agent.as_ref().is_some_and(|a| a.state == "READY"));
    Ok(match (is_complete, is_ready) {
        (false, _) => Exit::Unreachable,
        (true, false) => Exit::No,
        (true, true) => Exit::Done,
    })
}

/// Asks one agent.
pub async fn ask(agent: &Agent) -> Result<StatusResponse, Failure> {
    let mut client = AdminClient::new(agent.channel.clone());
    sockets::within_time(agent, client.status(StatusRequest {})).await
}

/// The line of one node for programs.
pub fn json(status: &StatusResponse) -> Result<String, Failure> {
    let json = serde_json::to_string(&StatusJson::of(status));
    Ok(json.map_err(|e| Failure::caused(Exit::Bug, e))? + "\n")
}

/// The text of one node.
pub fn text(status: &StatusResponse) -> String {
    let s = status.clone();
    let (agent, programs) = (s.agent.unwrap_or_default(), s.programs.unwrap_or_default());
    let (cluster, identity) = (s.cluster.unwrap_or_default(), s.identity.unwrap_or_default());
    let (svids, pods) = (s.svids.unwrap_or_default(), s.pods.unwrap_or_default());
    let (policies, events) = (s.policies.unwrap_or_default(), s.events.unwrap_or_default());
    let expires = identity
        .expires
        .as_ref()
        .and_then(proto::time)
        .map(|t| format!(", expires {}", t.strftime("%Y-%m-%d")))
        .unwrap_or_default();
    let plural = if identity.roots == 1 { "root" } else { "roots" };
    let mut svid_line = format!("{} valid  {} failed", svids.valid, svids.failed);
    if let Some(percent) = svids.oldest_percent {
        svid_line.push_str(&format!("  oldest {percent} %"));
    }
    if let Some(seconds) = svids.next_renewal_seconds {
        svid_line.push_str(&format!("  next renewal {}", duration(seconds)));
    }
    let lines = [
        (
            "Agent",
            format!(
                "{}  {}  {}  up {}  kernel {}  enforcement {}",
                agent.node,
                agent.version,
                agent.state,
                duration(agent.uptime_seconds),
                agent.kernel,
                agent.enforcement
            ),
        ),
        (
            "Programs",
            format!(
                "{}/{} attached  cgroup {}  pins {}",
                programs.attached, programs.expected, programs.cgroup, programs.pins
            ),
        ),
        (
            "Cluster",
            format!(
                "{} {}  revision {} applied {} ({} s behind)",
                cluster.source,
                cluster.location,
                cluster.revision,
                cluster.applied,
                cluster.behind_seconds
            ),
        ),
        (
            "Identity",
            format!(
                "{}  issuer {}  {} {plural}{expires}",
                identity.trust_domain, identity.issuer, identity.roots
            ),
        ),
        ("SVIDs", svid_line),
        (
            "Pods",
            format!(
                "{} managed ({} strict, {} permissive, {} observe)  {} waiting  {} off",
                pods.managed, pods.strict, pods.permissive, pods.observe, pods.waiting, pods.off
            ),
        ),
        (
            "Policies",
            format!("{} in force  {} with problems", policies.in_force, policies.with_problems),
        ),
        (
            "Events",
            format!(
                "{} forwarded  {} dropped  {} audit  {} lost",
                events.forwarded, events.dropped, events.audit, events.lost
            ),
        ),
    ];
    let mut text = String::new();
    for (title, line) in lines {
        text.push_str(&format!("{title:<11}{}\n", printable(&line)));
    }
    if !status.problems.is_empty() {
        text.push_str("Problems\n");
        for p in &status.problems {
            let line = format!("{}  {}  {}", p.subject, p.state, p.message);
            text.push_str(&format!("  {}\n", printable(&line)));
        }
    }
    if !cluster.watches.is_empty() {
        text.push_str("Watches\n");
        for line in Table::plain(&watches(&cluster.watches, Timestamp::now())) {
            text.push_str(&format!("  {line}\n"));
        }
    }
    text
}

/// A row a watch.
fn watches(watches: &[Watch], now: Timestamp) -> Vec<Vec<String>> {
    let ago = |time: &Option<prost_types::Timestamp>| {
        let time = time.as_ref().and_then(proto::time)?;
        let seconds = u64::try_from(now.duration_since(time).as_secs()).unwrap_or(0);
        Some(format!("{} ago", duration(seconds)))
    };
    let row = |watch: &Watch| {
        let mut objects = format!("{} objects", watch.objects);
        if watch.faulty > 0 {
            objects.push_str(&format!(", {} not read", watch.faulty));
        }
        let event = ago(&watch.last_event).map_or("no event".into(), |t| format!("event {t}"));
        let heard = ago(&watch.last_heard).map_or("not heard".into(), |t| format!("heard {t}"));
        let (kind, error) = (printable(&watch.kind), printable(&watch.error));
        vec![kind, watch.state.clone(), objects, event, heard, error]
    };
    watches.iter().map(row).collect()
}

/// One line a node.
fn all_nodes(answers: &mut [StatusResponse]) -> String {
    let is_ready = |s: &StatusResponse| s.agent.as_ref().is_some_and(|a| a.state == "READY");
    let node = |s: &StatusResponse| s.agent.as_ref().map(|a| a.node.clone()).unwrap_or_default();
    answers.sort_by_key(|s| (is_ready(s), std::cmp::Reverse(s.problems.len()), node(s)));
    let mut rows = vec![
        ["NODE", "VERSION", "STATE", "PODS", "WAITING", "BEHIND", "LOST", "PROBLEMS"]
            .map(String::from)
            .to_vec(),
    ];
    for status in answers.iter() {
        let s = status.clone();
        let agent = s.agent.unwrap_or_default();
        let pods = s.pods.unwrap_or_default();
        rows.push(vec![
            printable(&agent.node),
            agent.version,
            agent.state,
            pods.managed.to_string(),
            pods.waiting.to_string(),
            duration(s.cluster.unwrap_or_default().behind_seconds),
            s.events.unwrap_or_default().lost.to_string(),
            s.problems.len().to_string(),
        ]);
    }
    Table::plain(&rows).into_iter().map(|line| line + "\n").collect()
}

type Counters = serde_json::Map<String, serde_json::Value>;

/// The same, for programs; keys are the text's titles and words.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct StatusJson {
    schema: &'static str,
    agent: AgentJson,
    programs: ProgramsJson,
    cluster: ClusterJson,
    identity: IdentityJson,
    svids: SvidsJson,
    pods: PodsJson,
    policies: PoliciesJson,
    events: EventsJson,
    problems: Vec<ProblemJson>,
    counters: Counters,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct AgentJson {
    node: String,
    version: String,
    state: String,
    up_seconds: u64,
    kernel: String,
    enforcement: String,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct ProgramsJson {
    attached: u32,
    expected: u32,
    cgroup: String,
    pins: String,
    missing: Vec<String>,
    probe_cgroups: Vec<String>,
    fallbacks: Vec<String>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct ClusterJson {
    source: String,
    location: String,
    revision: u64,
    applied: u64,
    behind_seconds: u64,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    watches: Vec<WatchJson>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct WatchJson {
    kind: String,
    state: String,
    objects: u64,
    faulty: u64,
    last_event: Option<String>,
    last_heard: Option<String>,
    error: Option<String>,
}

impl WatchJson {
    fn of(watch: Watch) -> Self {
        let time = |time: Option<prost_types::Timestamp>| {
            time.as_ref().and_then(proto::time).map(|time| format!("{time:.3}"))
        };
        Self {
            kind: watch.kind,
            state: watch.state,
            objects: watch.objects,
            faulty: watch.faulty,
            last_event: time(watch.last_event),
            last_heard: time(watch.last_heard),
            error: Some(watch.error).filter(|error| !error.is_empty()),
        }
    }
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct IdentityJson {
    trust_domain: String,
    issuer: String,
    roots: u32,
    expires: Option<String>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct SvidsJson {
    valid: u32,
    failed: u32,
    oldest_percent: Option<u32>,
    next_renewal_seconds: Option<u64>,
}

#[derive(Serialize)]
struct PodsJson {
    managed: u32,
    strict: u32,
    permissive: u32,
    observe: u32,
    waiting: u32,
    off: u32,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct PoliciesJson {
    in_force: u32,
    with_problems: u32,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct EventsJson {
    forwarded: u64,
    dropped: u64,
    audit: u64,
    lost: u64,
    lost_by_cause: Counters,
    dropped_by_reason: Counters,
}

#[derive(Serialize)]
struct ProblemJson {
    subject: String,
    state: String,
    message: String,
}

impl StatusJson {
    fn of(status: &StatusResponse) -> Self {
        let counters = |list: Vec<proto::admin::Counter>| -> Counters {
            list.into_iter().map(|c| (c.name, c.value.into())).collect()
        };
        let s = status.clone();
        let (agent, programs) = (s.agent.unwrap_or_default(), s.programs.unwrap_or_default());
        let (cluster, identity) = (s.cluster.unwrap_or_default(), s.identity.unwrap_or_default());
        let (svids, pods) = (s.svids.unwrap_or_default(), s.pods.unwrap_or_default());
        let (policies, events) = (s.policies.unwrap_or_default(), s.events.unwrap_or_default());
        Self {
            schema: "signet.dev/status/v1",
            agent: AgentJson {
                node: agent.node,
                version: agent.version,
                state: agent.state,
                up_seconds: agent.uptime_seconds,
                kernel: agent.kernel,
                enforcement: agent.enforcement,
            },
            programs: ProgramsJson {
                attached: programs.attached,
                expected: programs.expected,
                cgroup: programs.cgroup,
                pins: programs.pins,
                missing: programs.missing,
                probe_cgroups: programs.probe_cgroups,
                fallbacks: programs.fallbacks,
            },
            cluster: ClusterJson {
                source: cluster.source,
                location: cluster.location,
                revision: cluster.revision,
                applied: cluster.applied,
                behind_seconds: cluster.behind_seconds,
                watches: cluster.watches.into_iter().map(WatchJson::of).collect(),
            },
            identity: IdentityJson {
                trust_domain: identity.trust_domain,
                issuer: identity.issuer,
                roots: identity.roots,
                expires: identity.expires.as_ref().and_then(proto::time).map(|t| t.to_string()),
            },
            svids: SvidsJson {
                valid: svids.valid,
                failed: svids.failed,
                oldest_percent: svids.oldest_percent,
                next_renewal_seconds: svids.next_renewal_seconds,
            },
            pods: PodsJson {
                managed: pods.managed,
                strict: pods.strict,
                permissive: pods.permissive,
                observe: pods.observe,
                waiting: pods.waiting,
                off: pods.off,
            },
            policies: PoliciesJson {
                in_force: policies.in_force,
                with_problems: policies.with_problems,
            },
            events: EventsJson {
                forwarded: events.forwarded,
                dropped: events.dropped,
                audit: events.audit,
                lost: events.lost,
                lost_by_cause: counters(events.lost_by_cause),
                dropped_by_reason: counters(events.dropped_by_reason),
            },
            problems: s
                .problems
                .into_iter()
                .map(|p| ProblemJson { subject: p.subject, state: p.state, message: p.message })
                .collect(),
            counters: counters(s.counters),
        }
    }
}
