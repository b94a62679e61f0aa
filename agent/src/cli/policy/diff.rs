//! `signet policy diff`: which of the flows that were seen other policies would change.

use std::{path::PathBuf, time::Duration};

use jiff::Timestamp;
use serde::Serialize;

use super::{OfflineArgs, unreadable};
use crate::{
    cli::{
        edges::name_of,
        exit::{Exit, Failure, print},
        flows::parse_time,
        sockets::{self, SocketArgs},
        status::Output,
        table::printable,
    },
    cluster::{
        manifest::Object,
        offline::{self, Manifests},
    },
    proto::{
        self,
        admin::{
            ChangedEdge, DiffPoliciesRequest, DiffPoliciesResponse, EdgeVerdict,
            admin_client::AdminClient,
        },
    },
    telemetry::names,
};

/// An agent judges thousands of flows under two sets of policies.
const LIMIT: Duration = Duration::from_secs(60);

/// Arguments of `signet policy diff`.
#[derive(clap::Args, Debug)]
#[command(after_help = "\
Examples:
  signet policy diff -f new-policy.yaml
  signet policy diff -f policies/ -n shop --since 24h -o json

Each flow that the agents' pods received is judged as `signet policy check` does, by what is in
force and by that with the given policies added, or in place of those of their names. A policy that
is not given stays. Ask the agents of every node. Exits with 0 when nothing changes, with 1 when
something does.")]
pub struct DiffArgs {
    #[command(flatten)]
    sockets: SocketArgs,
    /// Manifests of policies, files or directories; may be given several times
    #[arg(short, long = "file", value_name = "FILE", num_args = 1.., required = true)]
    files: Vec<PathBuf>,
    /// Only what was seen since then (24h, or a time)
    #[arg(long, value_name = "time", value_parser = parse_time)]
    since: Option<Timestamp>,
    /// Only what arrived in this namespace
    #[arg(short, long, value_name = "name", default_value = "")]
    namespace: String,
    #[command(flatten)]
    offline: OfflineArgs,
    /// How it is shown
    #[arg(short, long, value_name = "form", default_value = "text")]
    output: Output,
}

/// Asks and prints.
pub async fn run(args: DiffArgs) -> Result<Exit, Failure> {
    let manifests = manifests(&args)?;
    let (agents, mut is_complete) = sockets::connect_all(&args.sockets).await?;
    let mut answers = Vec::with_capacity(agents.len());
    for agent in &agents {
        let request = DiffPoliciesRequest {
            manifests: manifests.clone(),
            root_namespace: args.offline.root_namespace.clone(),
            since: args.since.map(proto::timestamp),
            namespace: args.namespace.clone(),
        };
        let mut client = AdminClient::new(agent.channel.clone());
        match sockets::within(LIMIT, agent, client.diff_policies(request)).await {
            Ok(answer) => answers.push(answer),
            Err(failure) if agents.len() > 1 && failure.exit == Exit::Unreachable => {
                anstream::eprintln!("warning: {failure}");
                is_complete = false;
            }
            Err(failure) => return Err(failure),
        }
    }
    let text = match args.output {
        Output::Text => text_of(&answers),
        Output::Json => json_of(&answers)?,
    };
    print(&text)?;
    let differs = answers.iter().any(|answer| !answer.changes.is_empty());
    Ok(match (is_complete, differs) {
        (false, _) => Exit::Unreachable,
        (true, false) => Exit::Done,
        (true, true) => Exit::No,
    })
}

/// The files' text, once everything in it was understood: faults are told by file and line.
fn manifests(args: &DiffArgs) -> Result<String, Failure> {
    let paths = offline::files_of(&args.files).map_err(unreadable)?;
    let read = Manifests::read(&paths, &args.offline.root_namespace).map_err(unreadable)?;
    for (path, manifest) in read.files() {
        let other = manifest.objects.iter().find(|(_, o)| !matches!(o, Object::Policy(_)));
        if let Some((line, object)) = other {
            let (kind, ..) = object.identity();
            return Err(unreadable(format!(
                "{}:{line}: a {kind} is no policy of flows; give IdentityPolicies, \
                 ClusterIdentityPolicies and AuthorizationPolicies only",
                path.display()
            )));
        }
    }
    let mut all = String::new();
    for path in &paths {
        let text = offline::text_of(path).map_err(unreadable)?;
        all.push_str("---\n");
        all.push_str(&text);
        all.push('\n');
    }
    Ok(all)
}

fn text_of(answers: &[DiffPoliciesResponse]) -> String {
    let mut text = String::new();
    let mut changes: Vec<&ChangedEdge> = answers.iter().flat_map(|a| &a.changes).collect();
    changes.sort_by_key(|change| std::cmp::Reverse(change.count));
    for change in &changes {
        let last = change.last_seen.as_ref().and_then(proto::time);
        let last = last.map_or_else(|| "-".into(), |time| time.to_string());
        text += &format!(
            "{}  {} -> {}  ({} flows, the last {last})\n",
            subject(change),
            side(change.before.as_ref()),
            side(change.after.as_ref()),
            change.count
        );
    }
    let judged: u64 = answers.iter().map(|answer| answer.judged).sum();
    let unjudged: u64 = answers.iter().map(|answer| answer.unjudged).sum();
    text += &format!("{} of {judged} kinds of flows that were seen would change\n", changes.len());
    if unjudged > 0 {
        text += &format!(
            "{unjudged} could not be judged: their callers are nobody known, or their pods are gone\n"
        );
    }
    text.lines().map(|line| printable(line) + "\n").collect()
}

/// `shop/frontend -> shop/payments:8080 tcp`.
fn subject(change: &ChangedEdge) -> String {
    let name = |end: &Option<_>| end.as_ref().map_or_else(|| "others".into(), name_of);
    let protocol = u8::try_from(change.protocol).map_or_else(|_| "-".into(), names::protocol);
    let (source, destination) = (name(&change.source), name(&change.destination));
    format!("{source} -> {destination}:{} {protocol}", change.port)
}

fn side(verdict: Option<&EdgeVerdict>) -> String {
    let Some(found) = verdict else { return "-".into() };
    let policy = if found.policy.is_empty() { "-" } else { &found.policy };
    format!("{} {} {policy}", found.verdict, found.reason)
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Json<'a> {
    schema: &'static str,
    node: &'a str,
    subject: String,
    pod: &'a str,
    before: VerdictJson<'a>,
    after: VerdictJson<'a>,
    count: u64,
    last_seen: Option<String>,
}

#[derive(Serialize)]
struct VerdictJson<'a> {
    verdict: &'a str,
    reason: &'a str,
    policy: Option<&'a str>,
}

impl<'a> VerdictJson<'a> {
    fn of(found: Option<&'a EdgeVerdict>) -> Self {
        let text = |get: fn(&EdgeVerdict) -> &String| found.map_or("", |v| get(v));
        let policy = text(|v| &v.policy);
        Self {
            verdict: text(|v| &v.verdict),
            reason: text(|v| &v.reason),
            policy: (!policy.is_empty()).then_some(policy),
        }
    }
}

/// One line a change.
fn json_of(answers: &[DiffPoliciesResponse]) -> Result<String, Failure> {
    let mut text = String::new();
    for answer in answers {
        for change in &answer.changes {
            let json = Json {
                schema: "signet.dev/policy-diff/v1",
                node: &answer.node,
                subject: subject(change),
                pod: &change.pod,
                before: VerdictJson::of(change.before.as_ref()),
                after: VerdictJson::of(change.after.as_ref()),
                count: change.count,
                last_seen: change
                    .last_seen
                    .as_ref()
                    .and_then(proto::time)
                    .map(|time| time.to_string()),
            };
            text += &serde_json::to_string(&json).map_err(|e| Failure::caused(Exit::Bug, e))?;
            text.push('\n');
        }
    }
    Ok(text)
}
