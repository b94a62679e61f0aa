//! `signet svid`: what the agent holds, and what a pod fetches for itself.

use jiff::Timestamp;
use serde::Serialize;

use super::{
    exit::{Exit, Failure, print},
    fetch::{self, FetchCommand},
    sockets::{self, Agent, SocketArgs},
    status::Output,
    table::{Table, duration, printable},
};
use crate::proto::{
    self,
    admin::{HeldSvid, ListSvidsRequest, ListSvidsResponse, admin_client::AdminClient},
};

/// Subcommands of `signet svid`.
#[derive(clap::Subcommand, Debug)]
pub enum SvidCommand {
    /// List the SVIDs that the agent holds: the tunnels' and pods' own.
    List(ListArgs),
    /// Show some of them in full.
    Show(ShowArgs),
    /// Fetch this pod's own SVID from the Workload API (inside a pod).
    #[command(subcommand)]
    Fetch(FetchCommand),
}

/// Arguments of `signet svid list`.
#[derive(clap::Args, Debug)]
#[command(after_help = "\
Examples:
  signet svid list
  signet svid list -o json")]
pub struct ListArgs {
    #[command(flatten)]
    sockets: SocketArgs,
    /// How they are shown
    #[arg(short, long, value_name = "form", default_value = "text")]
    output: Output,
}

/// Arguments of `signet svid show`.
#[derive(clap::Args, Debug)]
#[command(after_help = "\
Examples:
  signet svid show spiffe://cluster.local/ns/shop/sa/payments
  signet svid show shop/payments-5b7f

Exits with 1 when the agent holds none of it.")]
pub struct ShowArgs {
    #[command(flatten)]
    sockets: SocketArgs,
    /// A SPIFFE ID, or a pod that has an SVID of its own
    #[arg(value_name = "ID|NS/POD")]
    whose: String,
    /// How they are shown
    #[arg(short, long, value_name = "form", default_value = "text")]
    output: Output,
}

/// Runs the subcommand.
pub async fn run(command: SvidCommand) -> Result<Exit, Failure> {
    match command {
        SvidCommand::List(args) => list(args).await,
        SvidCommand::Show(args) => show(args).await,
        SvidCommand::Fetch(command) => fetch::run(command).await,
    }
}

async fn list(args: ListArgs) -> Result<Exit, Failure> {
    let (answers, is_complete) = ask(&args.sockets).await?;
    match args.output {
        Output::Json => print(&json(&answers)?)?,
        Output::Text => print(&table(&answers, Timestamp::now()))?,
    }
    Ok(if is_complete { Exit::Done } else { Exit::Unreachable })
}

async fn show(args: ShowArgs) -> Result<Exit, Failure> {
    let (mut answers, is_complete) = ask(&args.sockets).await?;
    for answer in &mut answers {
        answer.svids.retain(|s| s.identity == args.whose || s.pod == args.whose);
    }
    let is_found = answers.iter().any(|answer| !answer.svids.is_empty());
    match args.output {
        _ if !is_found => {
            anstream::eprintln!("no SVID of {} on the nodes asked", printable(&args.whose));
        }
        Output::Json => print(&json(&answers)?)?,
        Output::Text => {
            let blocks = answers.iter().flat_map(|a| a.svids.iter().map(|s| block(&a.node, s)));
            print(&blocks.collect::<Vec<_>>().join("\n"))?;
        }
    }
    Ok(match (is_complete, is_found) {
        (false, _) => Exit::Unreachable,
        (true, false) => Exit::No,
        (true, true) => Exit::Done,
    })
}

async fn ask(sockets: &SocketArgs) -> Result<(Vec<ListSvidsResponse>, bool), Failure> {
    let (agents, mut is_complete) = sockets::connect_all(sockets).await?;
    let mut answers = Vec::new();
    for agent in &agents {
        let mut client = AdminClient::new(agent.channel.clone());
        match sockets::within_time(agent, client.list_svids(ListSvidsRequest {})).await {
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

/// What `-o json` prints of all SVIDs of an agent.
pub async fn json_of(agent: &Agent) -> Result<String, Failure> {
    let mut client = AdminClient::new(agent.channel.clone());
    json(&[sockets::within_time(agent, client.list_svids(ListSvidsRequest {})).await?])
}

/// One line an SVID.
fn table(answers: &[ListSvidsResponse], now: Timestamp) -> String {
    let mut rows = vec![
        ["IDENTITY", "NODE", "USE", "POD", "STATE", "EXPIRES", "NEXT"].map(String::from).to_vec(),
    ];
    for answer in answers {
        for svid in &answer.svids {
            rows.push(vec![
                printable(&svid.identity),
                printable(&answer.node),
                printable(&svid.r#use),
                or_dash(&svid.pod),
                printable(&svid.state),
                from_now(svid.not_after.as_ref(), now),
                from_now(svid.next_attempt.as_ref(), now),
            ]);
        }
    }
    Table::plain(&rows).into_iter().map(|line| line.trim_end().to_owned() + "\n").collect()
}

/// Everything about one.
fn block(node: &str, svid: &HeldSvid) -> String {
    let pod = match svid.pod.as_str() {
        "" => String::new(),
        pod => format!("  pod {pod}"),
    };
    let mut lines = vec![
        ("Identity", svid.identity.clone()),
        ("Use", format!("{}{pod}  on {node}", svid.r#use)),
        ("State", svid.state.clone()),
    ];
    let times =
        [("Valid", &svid.not_before), ("Until", &svid.not_after), ("Next", &svid.next_attempt)];
    for (title, t) in times {
        if let Some(t) = time(t.as_ref()) {
            lines.push((title, t));
        }
    }
    if !svid.error.is_empty() {
        lines.push(("Error", svid.error.clone()));
    }
    lines.into_iter().map(|(title, line)| format!("{title:<10}{}\n", printable(&line))).collect()
}

fn from_now(t: Option<&prost_types::Timestamp>, now: Timestamp) -> String {
    let Some(t) = t.and_then(proto::time) else { return "-".into() };
    let seconds = t.duration_since(now).as_secs();
    let length = duration(seconds.unsigned_abs());
    if seconds < 0 { format!("{length} ago") } else { format!("in {length}") }
}

fn time(t: Option<&prost_types::Timestamp>) -> Option<String> {
    Some(format!("{:.3}", proto::time(t?)?))
}

fn or_dash(text: &str) -> String {
    if text.is_empty() { "-".into() } else { printable(text) }
}

fn json(answers: &[ListSvidsResponse]) -> Result<String, Failure> {
    answers
        .iter()
        .map(|answer| {
            let node = NodeJson {
                schema: "signet.dev/svids/v1",
                node: &answer.node,
                svids: answer.svids.iter().map(SvidJson::of).collect(),
            };
            Ok(serde_json::to_string(&node)? + "\n")
        })
        .collect::<serde_json::Result<String>>()
        .map_err(|e| Failure::caused(Exit::Bug, e))
}

#[derive(Serialize)]
struct NodeJson<'a> {
    schema: &'static str,
    node: &'a str,
    svids: Vec<SvidJson<'a>>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct SvidJson<'a> {
    identity: &'a str,
    r#use: &'a str,
    pod: Option<&'a str>,
    state: &'a str,
    not_before: Option<String>,
    not_after: Option<String>,
    next_attempt: Option<String>,
    error: Option<&'a str>,
}

impl<'a> SvidJson<'a> {
    fn of(svid: &'a HeldSvid) -> Self {
        let given = |text: &'a str| (!text.is_empty()).then_some(text);
        Self {
            identity: &svid.identity,
            r#use: &svid.r#use,
            pod: given(&svid.pod),
            state: &svid.state,
            not_before: time(svid.not_before.as_ref()),
            not_after: time(svid.not_after.as_ref()),
            next_attempt: time(svid.next_attempt.as_ref()),
            error: given(&svid.error),
        }
    }
}
