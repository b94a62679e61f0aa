//! `signet flows`: verdicts of one or several agents, merged.

use std::{
    io::{self, IsTerminal, Write},
    time::Instant,
};

use clap::ValueEnum;
use jiff::{SignedDuration, Timestamp};
use prost::Message;
use tokio::sync::mpsc;

use super::{
    aggregate,
    exit::{Exit, Failure},
    filters::{self, FilterArgs, Term},
    flow_lines,
    sockets::{self, Agent, SocketArgs},
    table::Table,
};
use crate::{
    flow::{
        FlowRecord,
        merge::{self, StreamMerger},
    },
    observer::{
        decode::{self, SeenFlow},
        encode::OPTIONS_TYPE,
        jsonpb::Jsonpb,
    },
    proto::{
        self, detail,
        observer::{
            GetFlowsRequest, GetFlowsResponse, get_flows_response::ResponseTypes,
            observer_client::ObserverClient,
        },
    },
};

/// Flows shown when neither a number nor a time is given.
const DEFAULT_LAST: u64 = 20;

/// Arguments of `signet flows`.
#[derive(clap::Args, Debug)]
#[command(after_help = "\
Examples:
  signet flows --verdict dropped --last 50
  signet flows -f -n shop --not --port 53
  signet flows --since 10m --to-pod shop/payments --reason policy_no_match -o json
  signet flows --identity 'shop/*' --ends -o wide

A flow that both ends reported is shown once, as the destination saw it, when the sockets of
both agents are given.")]
pub struct FlowsArgs {
    #[command(flatten)]
    sockets: SocketArgs,
    /// How records are shown [default: table on a terminal without --follow, else compact]
    #[arg(short, long, value_name = "form")]
    output: Option<Output>,
    /// Go on with new flows
    #[arg(short, long)]
    follow: bool,
    /// Show the last so many [default: 20 without --since, --until and --follow]
    #[arg(long, value_name = "number")]
    last: Option<u64>,
    /// From this time on: 5m ago (5m) or a time (2026-08-06T10:00:00Z)
    #[arg(long, value_name = "time", value_parser = parse_time)]
    since: Option<Timestamp>,
    /// Up to this time
    #[arg(long, value_name = "time", value_parser = parse_time)]
    until: Option<Timestamp>,
    /// Show ends of flows too: bytes, duration, why
    #[arg(long)]
    ends: bool,
    /// Who talked to whom in the last seven days, counted: from history, which has no pods
    #[arg(long, conflicts_with_all = ["follow", "ends"])]
    aggregate: bool,
    #[command(flatten)]
    filters: FilterArgs,
}

#[derive(ValueEnum, Clone, Copy, PartialEq, Eq, Debug)]
enum Output {
    /// One line a record, for people and for grep.
    Compact,
    /// Columns.
    Table,
    /// More columns.
    Wide,
    /// One JSON object a line.
    Json,
    /// As Hubble's command line prints it.
    Jsonpb,
}

/// Asks, merges, prints.
pub async fn run(args: FlowsArgs, terms: Vec<Term>) -> Result<Exit, Failure> {
    let stdout = io::stdout();
    let output = args.output.unwrap_or(if stdout.is_terminal() && !args.follow {
        Output::Table
    } else {
        Output::Compact
    });
    let (agents, is_complete) = sockets::connect_all(&args.sockets).await?;
    if args.aggregate {
        return aggregated(&agents, &args, &terms, is_complete).await;
    }
    let request = request(&args, &terms)?;
    let mut out = Printer::new(anstream::AutoStream::auto(stdout.lock()), output)?;
    let result = if args.follow {
        follow(agents, request, &mut out).await
    } else {
        one_shot(agents, request, args.limit(), is_complete, &mut out).await
    };
    match result {
        // `signet flows | head`: whoever reads has seen enough.
        Err(Stop::Write(e)) if e.kind() == io::ErrorKind::BrokenPipe => Ok(Exit::Done),
        Err(Stop::Write(e)) => Err(Failure::new(Exit::Input, format!("stdout: {e}"))),
        Err(Stop::Failure(failure)) => Err(failure),
        Ok(exit) => Ok(exit),
    }
}

/// What was seen, from history.
async fn aggregated(
    agents: &[Agent],
    args: &FlowsArgs,
    terms: &[Term],
    is_complete: bool,
) -> Result<Exit, Failure> {
    let as_json = match args.output {
        None | Some(Output::Table) => false,
        Some(Output::Json) => true,
        Some(_) => {
            return Err(Failure::new(
                Exit::Usage,
                "--aggregate is shown as a table or as JSON: write -o table or -o json",
            ));
        }
    };
    let found = aggregate::ask(agents, args.since, terms).await?;
    let mut out = anstream::AutoStream::auto(io::stdout().lock());
    match aggregate::print(found, args.until, args.last, as_json, &mut out) {
        Err(e) if e.kind() != io::ErrorKind::BrokenPipe => {
            Err(Failure::new(Exit::Input, format!("stdout: {e}")))
        }
        _ if is_complete => Ok(Exit::Done),
        _ => Ok(Exit::Unreachable),
    }
}

impl FlowsArgs {
    fn limit(&self) -> Option<u64> {
        match self.last {
            None if self.since.is_none() && self.until.is_none() && !self.follow => {
                Some(DEFAULT_LAST)
            }
            last => last,
        }
    }
}

fn request(args: &FlowsArgs, terms: &[Term]) -> Result<GetFlowsRequest, Failure> {
    if let (Some(since), Some(until)) = (args.since, args.until)
        && since > until
    {
        return Err(Failure::new(Exit::Usage, format!("--since {since} is after --until {until}")));
    }
    if args.last == Some(0) {
        return Err(Failure::new(Exit::Usage, "--last: 0 shows nothing; give a number from 1 on"));
    }
    let (whitelist, blacklist) = filters::lists(terms)?;
    // Two records may become one: ask for enough of them.
    const RECORDS_PER_FLOW: u64 = 2;
    Ok(GetFlowsRequest {
        number: args.limit().map_or(0, |n| n.saturating_mul(RECORDS_PER_FLOW)),
        follow: args.follow,
        blacklist,
        whitelist,
        since: args.since.map(proto::timestamp),
        until: args.until.map(proto::timestamp),
        first: false,
        field_mask: None,
        experimental: None,
        extensions: Some(prost_types::Any {
            type_url: OPTIONS_TYPE.into(),
            value: detail::Options { ends: args.ends }.encode_to_vec(),
        }),
    })
}

enum Stop {
    Failure(Failure),
    Write(io::Error),
}

impl From<Failure> for Stop {
    fn from(failure: Failure) -> Self {
        Self::Failure(failure)
    }
}

impl From<io::Error> for Stop {
    fn from(error: io::Error) -> Self {
        Self::Write(error)
    }
}

async fn one_shot(
    agents: Vec<Agent>,
    request: GetFlowsRequest,
    limit: Option<u64>,
    mut is_complete: bool,
    out: &mut Printer<impl Write>,
) -> Result<Exit, Stop> {
    let several = agents.len() > 1;
    let mut incoming = ask(agents, request);
    let mut records = Vec::new();
    while let Some(message) = incoming.recv().await {
        match message {
            Incoming::Flow(seen) => records.push(*seen),
            Incoming::Lost(_, warning) => warn(&warning),
            Incoming::Ended(Ok(())) => {}
            Incoming::Ended(Err(failure)) if several && failure.exit == Exit::Unreachable => {
                warn(&failure.to_string());
                is_complete = false;
            }
            Incoming::Ended(Err(failure)) => return Err(failure.into()),
        }
    }
    let mut records = merge::merge(records);
    if let Some(limit) = limit {
        let limit = usize::try_from(limit).unwrap_or(usize::MAX);
        records.drain(..records.len().saturating_sub(limit));
    }
    out.all(&records)?;
    Ok(if is_complete { Exit::Done } else { Exit::Unreachable })
}

async fn follow(
    agents: Vec<Agent>,
    request: GetFlowsRequest,
    out: &mut Printer<impl Write>,
) -> Result<Exit, Stop> {
    let is_bounded = request.until.is_some();
    let mut incoming = ask(agents, request);
    let mut merger = StreamMerger::default();
    let mut exit = if is_bounded { Exit::Done } else { Exit::Unreachable };
    loop {
        let expiry = async {
            match merger.next_expiry() {
                Some(at) => tokio::time::sleep_until(at.into()).await,
                None => std::future::pending().await,
            }
        };
        let message = tokio::select! {
            message = incoming.recv() => message,
            () = expiry => {
                out.all(&merger.expire(Instant::now()))?;
                continue;
            }
        };
        match message {
            Some(Incoming::Flow(seen)) => out.all(&merger.push(*seen, Instant::now()))?,
            Some(Incoming::Lost(_, warning)) => warn(&warning),
            Some(Incoming::Ended(Ok(()))) if is_bounded => {}
            Some(Incoming::Ended(Ok(()))) => warn("an agent ended the stream: it shuts down"),
            Some(Incoming::Ended(Err(failure))) if failure.exit == Exit::Unreachable => {
                warn(&failure.to_string());
                exit = Exit::Unreachable;
            }
            Some(Incoming::Ended(Err(failure))) => return Err(failure.into()),
            None => break,
        }
    }
    out.all(&merger.finish())?;
    Ok(exit)
}

/// A record, and the answer that it came in.
pub(super) struct Answer {
    pub(super) seen: SeenFlow,
    response: GetFlowsResponse,
}

impl AsRef<FlowRecord> for Answer {
    fn as_ref(&self) -> &FlowRecord {
        &self.seen.record
    }
}

/// What an agent says.
pub(super) enum Incoming {
    /// A flow.
    Flow(Box<Answer>),
    /// So many events were lost, and a warning that says so.
    Lost(u64, String),
    /// An agent said everything, or cannot be heard any more.
    Ended(Result<(), Failure>),
}

/// Sends the request to every agent and gathers what they answer; ends when all have ended.
pub(super) fn ask(agents: Vec<Agent>, request: GetFlowsRequest) -> mpsc::Receiver<Incoming> {
    let (tx, rx) = mpsc::channel(1024);
    for agent in agents {
        let (tx, request) = (tx.clone(), request.clone());
        tokio::spawn(async move {
            let result = read(&agent, request, &tx).await;
            // Nobody listens any more only when the command has ended.
            let _ = tx.send(Incoming::Ended(result)).await;
        });
    }
    rx
}

async fn read(
    agent: &Agent,
    request: GetFlowsRequest,
    tx: &mpsc::Sender<Incoming>,
) -> Result<(), Failure> {
    let refused = |status: tonic::Status| Failure::refused(&agent.socket, &status);
    let mut client = ObserverClient::new(agent.channel.clone());
    let mut stream = sockets::within_time(agent, client.get_flows(request)).await?;
    while let Some(response) = stream.message().await.map_err(refused)? {
        let message = match &response.response_types {
            Some(ResponseTypes::Flow(flow)) => {
                let seen = decode::decode(flow).map_err(|e| {
                    Failure::caused(
                        Exit::Input,
                        anyhow::Error::new(e).context(format!("the agent at {}", agent.socket)),
                    )
                })?;
                Incoming::Flow(Box::new(Answer { seen, response }))
            }
            Some(ResponseTypes::LostEvents(lost)) => {
                let cause =
                    if lost.cause.is_empty() { lost.source().as_str_name() } else { &*lost.cause };
                let (node, n) = (&response.node_name, lost.num_events_lost);
                Incoming::Lost(n, format!("{node} lost {n} events ({cause})"))
            }
            Some(ResponseTypes::NodeStatus(_)) | None => continue,
        };
        if tx.send(message).await.is_err() {
            return Ok(());
        }
    }
    Ok(())
}

fn warn(message: &str) {
    anstream::eprintln!("warning: {}", super::table::printable(message));
}

/// Writes records in one of the forms.
struct Printer<W> {
    out: W,
    output: Output,
    table: Table,
    has_header: bool,
    jsonpb: Jsonpb,
}

impl<W: Write> Printer<W> {
    fn new(out: W, output: Output) -> Result<Self, Failure> {
        let jsonpb = Jsonpb::new().map_err(|e| Failure::new(Exit::Bug, e.to_string()))?;
        Ok(Self { out, output, table: Table::default(), has_header: false, jsonpb })
    }

    fn all(&mut self, answers: &[Answer]) -> io::Result<()> {
        let records = answers.iter().map(|answer| &answer.seen);
        match self.output {
            Output::Compact => {
                for seen in records {
                    writeln!(self.out, "{}", flow_lines::compact(seen))?;
                }
            }
            Output::Json => {
                for seen in records {
                    writeln!(self.out, "{}", flow_lines::json(seen)?)?;
                }
            }
            Output::Jsonpb => {
                for answer in answers {
                    let line = self.jsonpb.line(&answer.response).map_err(io::Error::other)?;
                    writeln!(self.out, "{line}")?;
                }
            }
            Output::Table => self.rows(records, false)?,
            Output::Wide => self.rows(records, true)?,
        }
        self.out.flush()
    }

    fn rows<'a>(
        &mut self,
        records: impl Iterator<Item = &'a SeenFlow>,
        wide: bool,
    ) -> io::Result<()> {
        let rows: Vec<_> = records.map(|seen| flow_lines::row(seen, wide)).collect();
        let mut header = flow_lines::TABLE.map(String::from).to_vec();
        if wide {
            header.extend(flow_lines::WIDE.map(String::from));
        }
        self.table.fit(&header);
        rows.iter().for_each(|row| self.table.fit(row));
        if !self.has_header {
            self.has_header = true;
            writeln!(self.out, "{}", self.table.line(&header, |_, _| None))?;
        }
        for row in &rows {
            let line = self.table.line(row, |column, cell| {
                (column == flow_lines::VERDICT_COLUMN).then(|| flow_lines::style(cell)).flatten()
            });
            writeln!(self.out, "{line}")?;
        }
        Ok(())
    }
}

/// A time, or how long ago.
pub(super) fn parse_time(s: &str) -> Result<Timestamp, String> {
    if let Ok(time) = s.parse::<Timestamp>() {
        return Ok(time);
    }
    s.parse::<SignedDuration>()
        .ok()
        .filter(|ago| !ago.is_negative())
        .and_then(|ago| Timestamp::now().checked_sub(ago).ok())
        .ok_or_else(|| {
            "neither a time (2026-08-06T10:00:00Z) nor how long ago (90s, 5m, 1h)".into()
        })
}
