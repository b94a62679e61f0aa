//! `signet endpoints [NS/POD]`.

use serde::Serialize;

use super::{
    exit::{Exit, Failure, print},
    sockets::{self, Agent, SocketArgs},
    status::Output,
    table::{Table, printable},
};
use crate::{
    proto::{
        self,
        admin::{
            Drop, Endpoint, EndpointSvid, EndpointsRequest, EndpointsResponse,
            admin_client::AdminClient,
        },
    },
    telemetry::names,
};

/// Arguments of `signet endpoints`.
#[derive(clap::Args, Debug)]
#[command(after_help = "\
Examples:
  signet endpoints
  signet endpoints shop/payments-5b7f
  signet endpoints shop/ -o json

Exits with 1 when no pod is found.")]
pub struct EndpointsArgs {
    #[command(flatten)]
    sockets: SocketArgs,
    /// Only this pod, in full; NS/ for all pods of a namespace
    #[arg(value_name = "NS/POD", value_parser = parse_named)]
    pod: Option<NamedArg>,
    /// How they are shown
    #[arg(short, long, value_name = "form", default_value = "text")]
    output: Output,
}

/// `NAMESPACE/NAME`, or `NAMESPACE/` for everything in it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct NamedArg {
    /// The namespace.
    pub namespace: String,
    /// Empty: every one.
    pub name: String,
}

/// Reads a [`NamedArg`].
pub fn parse_named(s: &str) -> Result<NamedArg, String> {
    match s.split_once('/') {
        Some((namespace, name)) if !namespace.is_empty() && !name.contains('/') => {
            Ok(NamedArg { namespace: namespace.into(), name: name.into() })
        }
        _ => Err("write it as NAMESPACE/NAME, or NAMESPACE/ for all of the namespace's".into()),
    }
}

/// Asks and prints.
pub async fn run(args: EndpointsArgs) -> Result<Exit, Failure> {
    let (agents, is_complete) = sockets::connect_all(&args.sockets).await?;
    let request = match &args.pod {
        Some(p) => EndpointsRequest { namespace: p.namespace.clone(), pod: p.name.clone() },
        None => EndpointsRequest::default(),
    };
    let (answers, all_answered) = sockets::ask_all(&agents, async |agent| {
        let mut client = AdminClient::new(agent.channel.clone());
        sockets::within_time(agent, client.endpoints(request.clone())).await
    })
    .await?;
    let is_complete = is_complete && all_answered;
    let in_full = args.pod.as_ref().is_some_and(|p| !p.name.is_empty());
    let text = match args.output {
        Output::Json => answers.iter().map(json).collect::<Result<String, _>>()?,
        Output::Text if in_full => {
            let all = answers.iter().flat_map(|a| &a.endpoints);
            all.map(block).collect::<Vec<_>>().join("\n")
        }
        Output::Text => list(&answers),
    };
    print(&text)?;
    let is_found = answers.iter().any(|a| !a.endpoints.is_empty());
    if let (Some(p), false) = (&args.pod, is_found) {
        anstream::eprintln!("no pod {}/{} on the nodes asked", p.namespace, p.name);
    }
    Ok(match (is_complete, is_found || args.pod.is_none()) {
        (false, _) => Exit::Unreachable,
        (true, false) => Exit::No,
        (true, true) => Exit::Done,
    })
}

/// What `-o json` prints of all pods of an agent.
pub async fn json_of(agent: &Agent) -> Result<String, Failure> {
    let mut client = AdminClient::new(agent.channel.clone());
    let request = EndpointsRequest::default();
    json(&sockets::within_time(agent, client.endpoints(request)).await?)
}

fn json(answer: &EndpointsResponse) -> Result<String, Failure> {
    let json = serde_json::to_string(&NodeJson::of(answer));
    Ok(json.map_err(|e| Failure::caused(Exit::Bug, e))? + "\n")
}

/// One line a pod.
fn list(answers: &[EndpointsResponse]) -> String {
    let mut rows = vec![
        ["POD", "NODE", "MODE", "FROM", "STATE", "IDENTITY", "SVID", "POLICIES", "DROPS"]
            .map(String::from)
            .to_vec(),
    ];
    for answer in answers {
        for e in &answer.endpoints {
            rows.push(vec![
                printable(&format!("{}/{}", e.namespace, e.pod)),
                printable(&answer.node),
                e.mode.clone(),
                e.mode_origin.clone(),
                e.state.clone(),
                or_dash(&e.identity),
                e.svid.as_ref().map_or_else(|| "-".into(), |s| s.state.clone()),
                e.policies.len().to_string(),
                e.drops.iter().map(|d| d.count).sum::<u64>().to_string(),
            ]);
        }
    }
    Table::plain(&rows).into_iter().map(|line| line + "\n").collect()
}

/// Everything about one pod.
fn block(e: &Endpoint) -> String {
    let mut lines: Vec<(&str, String)> = vec![
        ("Pod", format!("{}/{}  uid {}", e.namespace, e.pod, e.uid)),
        ("Mode", format!("{} (from {})", e.mode, e.mode_origin)),
        (
            "State",
            match time(e.since.as_ref()) {
                Some(since) => format!("{}  since {since}", e.state),
                None => e.state.clone(),
            },
        ),
    ];
    if !e.waiting.is_empty() {
        lines.push(("Waiting", e.waiting.clone()));
    }
    if e.netns != 0 {
        lines.push(("Cgroup", format!("{}  id {}", e.cgroup, e.cgroup_id)));
        lines.push(("Netns", format!("cookie {}", e.netns)));
    }
    lines.push(("Addresses", or_dash(&e.addresses.join(" "))));
    lines.push(("Account", or_dash(&e.service_account)));
    if !e.identity.is_empty() {
        lines.push(("Identity", format!("{}  number {}", e.identity, e.identity_number)));
    }
    if let Some(svid) = &e.svid {
        lines.push(("SVID", svid_text(svid)));
    }
    let policies = if e.policies.is_empty() { "none".into() } else { e.policies.join(" ") };
    let default = if e.default_deny { "deny" } else { "allow" };
    lines.push(("Policies", format!("{policies}  default {default}")));
    if !e.raw_guard.is_empty() {
        lines.push(("Raw guard", e.raw_guard.clone()));
    }
    lines.push(("Revision", e.revision.to_string()));
    let mut text = String::new();
    for (title, line) in lines {
        text.push_str(&format!("{title:<11}{}\n", printable(&line)));
    }
    if !e.drops.is_empty() {
        text.push_str("Drops\n");
        for drop in &e.drops {
            text.push_str(&format!("  {}\n", printable(&drop_text(drop))));
        }
    }
    text
}

fn svid_text(svid: &EndpointSvid) -> String {
    let mut text = svid.state.clone();
    if let Some(until) = time(svid.not_after.as_ref()) {
        text.push_str(&format!("  until {until}"));
    }
    if !svid.error.is_empty() {
        text.push_str(&format!("  {}", svid.error));
    }
    text
}

fn drop_text(drop: &Drop) -> String {
    let protocol = u8::try_from(drop.protocol).map_or_else(|_| "-".into(), names::protocol);
    let peer = match drop.peer_pod.as_str() {
        "" => drop.peer.clone(),
        pod => format!("{pod} ({})", drop.peer),
    };
    let way = if drop.direction == "ingress" { "from" } else { "to" };
    let mut text =
        format!("{} {}  {way} {peer}  port {} {protocol}", drop.count, drop.reason, drop.port);
    if let Some(last) = time(drop.last.as_ref()) {
        text.push_str(&format!("  last {last}"));
    }
    text
}

fn time(t: Option<&prost_types::Timestamp>) -> Option<String> {
    Some(format!("{:.3}", proto::time(t?)?))
}

fn or_dash(text: &str) -> String {
    if text.is_empty() { "-".into() } else { printable(text) }
}

#[derive(Serialize)]
struct NodeJson<'a> {
    schema: &'static str,
    node: &'a str,
    endpoints: Vec<EndpointJson<'a>>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct EndpointJson<'a> {
    namespace: &'a str,
    pod: &'a str,
    uid: &'a str,
    mode: &'a str,
    mode_origin: &'a str,
    state: &'a str,
    waiting: Option<&'a str>,
    since: Option<String>,
    cgroup: Option<&'a str>,
    cgroup_id: Option<u64>,
    netns: Option<u64>,
    addresses: &'a [String],
    service_account: &'a str,
    identity: Option<&'a str>,
    identity_number: Option<u32>,
    svid: Option<SvidJson<'a>>,
    policies: &'a [String],
    default_deny: bool,
    raw_guard: Option<&'a str>,
    revision: u64,
    drops: Vec<DropJson<'a>>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct SvidJson<'a> {
    state: &'a str,
    not_after: Option<String>,
    error: Option<&'a str>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct DropJson<'a> {
    count: u64,
    reason: &'a str,
    direction: &'a str,
    peer: &'a str,
    peer_pod: Option<&'a str>,
    port: u32,
    protocol: String,
    last: Option<String>,
}

impl<'a> NodeJson<'a> {
    fn of(answer: &'a EndpointsResponse) -> Self {
        Self {
            schema: "signet.dev/endpoints/v1",
            node: &answer.node,
            endpoints: answer.endpoints.iter().map(EndpointJson::of).collect(),
        }
    }
}

impl<'a> EndpointJson<'a> {
    fn of(e: &'a Endpoint) -> Self {
        let is_registered = e.netns != 0;
        Self {
            namespace: &e.namespace,
            pod: &e.pod,
            uid: &e.uid,
            mode: &e.mode,
            mode_origin: &e.mode_origin,
            state: &e.state,
            waiting: given(&e.waiting),
            since: time(e.since.as_ref()),
            cgroup: given(&e.cgroup),
            cgroup_id: is_registered.then_some(e.cgroup_id),
            netns: is_registered.then_some(e.netns),
            addresses: &e.addresses,
            service_account: &e.service_account,
            identity: given(&e.identity),
            identity_number: is_registered.then_some(e.identity_number),
            svid: e.svid.as_ref().map(|s| SvidJson {
                state: &s.state,
                not_after: time(s.not_after.as_ref()),
                error: given(&s.error),
            }),
            policies: &e.policies,
            default_deny: e.default_deny,
            raw_guard: given(&e.raw_guard),
            revision: e.revision,
            drops: e
                .drops
                .iter()
                .map(|d| DropJson {
                    count: d.count,
                    reason: &d.reason,
                    direction: &d.direction,
                    peer: &d.peer,
                    peer_pod: given(&d.peer_pod),
                    port: d.port,
                    protocol: u8::try_from(d.protocol)
                        .map_or_else(|_| d.protocol.to_string(), names::protocol),
                    last: time(d.last.as_ref()),
                })
                .collect(),
        }
    }
}

fn given(text: &str) -> Option<&str> {
    (!text.is_empty()).then_some(text)
}
