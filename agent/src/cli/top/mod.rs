//! `signet top`: who talks how much at this moment, who is denied, and how long flows last, by
//! identity. On a terminal it is live; elsewhere it prints a table or JSON at each turn.

mod screen;
mod tally;

use std::{
    io::{self, IsTerminal, Write},
    sync::Arc,
    time::{Duration, Instant},
};

use clap::ValueEnum;
use jiff::Timestamp;
use tokio::{sync::mpsc, time::MissedTickBehavior};

use self::tally::{Row, Tally};
use super::{
    aggregate,
    exit::{Exit, Failure},
    flows::{self, Incoming},
    sockets::{self, Agent, SocketArgs},
    table::{Table, duration, printable},
};
use crate::{
    observer::encode::OPTIONS_TYPE,
    proto::{admin::SeenEdge, detail, observer::GetFlowsRequest},
};

/// Arguments of `signet top`.
#[derive(clap::Args, Debug)]
#[command(after_help = "\
Examples:
  signet top
  signet top --once --sort denied
  signet top -o json --interval 10 | jq 'select(.deniedPerSecond > 0)'

OUT/S and IN/S are flows a second as client and as server, DENIED all that were denied in the
history that agents keep. P50 and P99 are how long flows lasted that ended since the command began,
at most the last 512 of an identity: with short connections, how long an exchange takes. Agents know
the end of tunnelled flows only. On a terminal: q ends, s sorts by the next column, d shows only who
was denied, arrows and page keys scroll. Exits with 4 when an agent does not answer.")]
pub struct TopArgs {
    #[command(flatten)]
    sockets: SocketArgs,
    /// How it is shown [default: live on a terminal, else table]
    #[arg(short, long, value_name = "form")]
    output: Option<Output>,
    /// Show one interval and end
    #[arg(long)]
    once: bool,
    /// Seconds over which rates are taken, and between two turns
    #[arg(long, value_name = "seconds", default_value_t = 2, value_parser = clap::value_parser!(u64).range(1..=3600))]
    interval: u64,
    /// What comes first
    #[arg(long, value_name = "column", default_value = "flows")]
    sort: Sort,
}

#[derive(ValueEnum, Clone, Copy, PartialEq, Eq, Debug)]
enum Output {
    /// Columns.
    Table,
    /// One JSON object a line and identity.
    Json,
}

/// By what identities are ordered; the most of it comes first.
#[derive(ValueEnum, Clone, Copy, PartialEq, Eq, Debug)]
pub enum Sort {
    /// Flows a second, as client and as server.
    Flows,
    /// Denied flows a second.
    Denied,
    /// The longest flows.
    Latency,
    /// The identity's name, from a on.
    Name,
}

impl Sort {
    /// The next one, and after the last the first.
    const fn next(self) -> Self {
        match self {
            Self::Flows => Self::Denied,
            Self::Denied => Self::Latency,
            Self::Latency => Self::Name,
            Self::Name => Self::Flows,
        }
    }

    const fn name(self) -> &'static str {
        match self {
            Self::Flows => "flows",
            Self::Denied => "denied",
            Self::Latency => "latency",
            Self::Name => "name",
        }
    }
}

/// One turn.
#[derive(Clone, Debug)]
struct Turn {
    time: Timestamp,
    /// Over which rates were taken.
    over: Duration,
    /// Flows a second; one between two identities counts once here, and in both their rows.
    flows: f64,
    /// Of them, the denied.
    denied: f64,
    rows: Vec<Row>,
    /// Agents that answered.
    nodes: usize,
    /// Which agents did not, and why.
    missing: Vec<String>,
    /// Some agents do not answer, or tell of no more ends of flows.
    is_partial: bool,
    /// Agents said that they lost events since the command began: durations are of fewer flows.
    lost: u64,
}

/// Shows it until it is interrupted.
pub async fn run(args: TopArgs) -> Result<Exit, Failure> {
    let (agents, is_complete) = sockets::connect_all(&args.sockets).await?;
    let is_live = args.output.is_none() && !args.once && io::stdout().is_terminal();
    let (turns, mut shown) = mpsc::channel(1);
    let watcher = Watcher { agents, is_complete, every: Duration::from_secs(args.interval) };
    let watching = watcher.run(turns);
    if is_live {
        return tokio::select! {
            failed = watching => Err(failed),
            ended = screen::run(shown, args.sort) => ended,
        };
    }
    let output = args.output.unwrap_or(Output::Table);
    let printing = async {
        let mut is_first = true;
        while let Some(turn) = shown.recv().await {
            for missing in &turn.missing {
                anstream::eprintln!("warning: {}", printable(missing));
            }
            match print(&turn, args.sort, output, is_first) {
                Err(e) if e.kind() == io::ErrorKind::BrokenPipe => return Ok(Exit::Done),
                Err(e) => return Err(Failure::new(Exit::Input, format!("stdout: {e}"))),
                Ok(()) => is_first = false,
            }
            if args.once {
                return Ok(if turn.is_partial { Exit::Unreachable } else { Exit::Done });
            }
        }
        Ok(Exit::Unreachable)
    };
    tokio::select! {
        failed = watching => Err(failed),
        ended = printing => ended,
    }
}

/// Asks the agents.
struct Watcher {
    agents: Vec<Agent>,
    is_complete: bool,
    every: Duration,
}

impl Watcher {
    /// Gives a turn an interval; ends with what makes it impossible.
    async fn run(self, turns: mpsc::Sender<Turn>) -> Failure {
        let Self { agents, is_complete, every } = self;
        let mut tally = Tally::default();
        let mut incoming = flows::ask(agents.clone(), ends());
        let mut hears = true;
        let mut tick = tokio::time::interval(every);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut before: Option<Instant> = None;
        loop {
            tokio::select! {
                message = incoming.recv(), if hears => match message {
                    Some(Incoming::Flow(answer)) => tally.ended(&answer.seen.record),
                    Some(Incoming::Lost(n, _)) => tally.lost(n),
                    // Without it there are still the rates.
                    Some(Incoming::Ended(_)) => tally.deaf(),
                    None => hears = false,
                },
                _ = tick.tick() => {
                    let Seen { answers, missing } = match seen_by_all(&agents).await {
                        Ok(seen) => seen,
                        Err(failure) => return failure,
                    };
                    let nodes = answers.len();
                    let now = Instant::now();
                    let over = before.map(|before| now.duration_since(before));
                    before = Some(now);
                    // The first time says where counting begins.
                    let counted = tally.turn(answers, over);
                    let Some(over) = over else { continue };
                    let turn = Turn {
                        time: Timestamp::now(),
                        over,
                        flows: counted.flows,
                        denied: counted.denied,
                        rows: counted.rows,
                        nodes,
                        is_partial: !is_complete || !missing.is_empty() || tally.is_deaf(),
                        missing,
                        lost: tally.lost_in_all(),
                    };
                    if turns.send(turn).await.is_err() {
                        // Nobody looks any more: whoever did ends the command.
                        return std::future::pending().await;
                    }
                }
            }
        }
    }
}

/// What agents have seen.
struct Seen {
    /// By the agent that answers.
    answers: Vec<(Arc<str>, Vec<SeenEdge>)>,
    /// Why the others do not.
    missing: Vec<String>,
}

/// Asks all of them; a failure when none is there, or one refuses.
async fn seen_by_all(agents: &[Agent]) -> Result<Seen, Failure> {
    let mut seen = Seen { answers: Vec::new(), missing: Vec::new() };
    let mut failed = None;
    let asked = sockets::ask_each(agents, async |agent| aggregate::seen_by(agent, None).await);
    for (agent, answer) in agents.iter().zip(asked.await) {
        match answer {
            Ok(edges) => {
                let edges = edges.into_iter().map(|(_, edge)| edge).collect();
                seen.answers.push((agent.socket.clone(), edges));
            }
            Err(failure) if failure.exit == Exit::Unreachable => {
                seen.missing.push(failure.to_string());
                failed = Some(failure);
            }
            Err(failure) => return Err(failure),
        }
    }
    match failed {
        Some(failure) if seen.answers.is_empty() => Err(failure),
        _ => Ok(seen),
    }
}

/// Flows as they end, from now on.
fn ends() -> GetFlowsRequest {
    use prost::Message as _;
    GetFlowsRequest {
        follow: true,
        extensions: Some(prost_types::Any {
            type_url: OPTIONS_TYPE.into(),
            value: detail::Options { ends: true }.encode_to_vec(),
        }),
        ..GetFlowsRequest::default()
    }
}

const HEADER: [&str; 9] =
    ["IDENTITY", "OUT/S", "IN/S", "DENIED/S", "DENIED", "AUDIT/S", "P50", "P99", "REASON"];

/// The cells of a row.
fn cells(row: &Row) -> [String; 9] {
    let time = |time: Option<Duration>| time.map_or_else(|| "-".into(), short);
    [
        printable(&row.identity),
        rate(row.out),
        rate(row.into),
        rate(row.denied),
        row.denied_in_all.to_string(),
        rate(row.audit),
        time(row.median),
        time(row.slowest),
        row.reason.as_deref().map_or_else(|| "-".into(), printable),
    ]
}

/// Flows a second.
fn rate(rate: f64) -> String {
    if rate == 0.0 || rate >= 99.95 { format!("{rate:.0}") } else { format!("{rate:.1}") }
}

/// `3.2ms`, `410us`, `12.5s`.
fn short(time: Duration) -> String {
    match time.as_secs_f64() {
        s if s >= 60.0 => duration(time.as_secs()),
        s if s >= 1.0 => format!("{s:.1}s"),
        s if s >= 0.001 => format!("{:.1}ms", s * 1e3),
        s => format!("{:.0}us", s * 1e6),
    }
}

fn print(turn: &Turn, sort: Sort, output: Output, is_first: bool) -> io::Result<()> {
    let mut out = anstream::AutoStream::auto(io::stdout().lock());
    let rows = tally::sorted(&turn.rows, sort);
    match output {
        Output::Json => {
            for row in rows {
                writeln!(out, "{}", json(turn, row))?;
            }
        }
        Output::Table => {
            if !is_first {
                writeln!(out)?;
            }
            writeln!(out, "{}", headline(turn))?;
            let mut lines = vec![HEADER.map(String::from).to_vec()];
            lines.extend(rows.into_iter().map(|row| cells(row).to_vec()));
            for line in Table::plain(&lines) {
                writeln!(out, "{}", line.trim_end())?;
            }
        }
    }
    out.flush()
}

/// What is said of all of them.
fn headline(turn: &Turn) -> String {
    let partial = if turn.is_partial { "  incomplete: some agents do not answer" } else { "" };
    let lost = match turn.lost {
        0 => String::new(),
        n => format!("  {n} events lost"),
    };
    format!(
        "{}  {} {}  {} identities  {} flows/s  {} denied/s{lost}{partial}",
        turn.time.strftime("%H:%M:%S"),
        turn.nodes,
        if turn.nodes == 1 { "node" } else { "nodes" },
        turn.rows.len(),
        rate(turn.flows),
        rate(turn.denied),
    )
}

fn json(turn: &Turn, row: &Row) -> serde_json::Value {
    let seconds = |time: Option<Duration>| time.map(|time| time.as_secs_f64());
    serde_json::json!({
        "schema": "signet.dev/top/v1",
        "time": turn.time.to_string(),
        "seconds": turn.over.as_secs_f64(),
        "isPartial": turn.is_partial,
        "identity": row.identity,
        "outPerSecond": row.out,
        "inPerSecond": row.into,
        "deniedPerSecond": row.denied,
        "deniedInAll": row.denied_in_all,
        "auditPerSecond": row.audit,
        "reason": row.reason,
        "p50Seconds": seconds(row.median),
        "p99Seconds": seconds(row.slowest),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_short() {
        for (of, expected) in [(0.0, "0"), (0.25, "0.2"), (12.0, "12.0"), (1234.4, "1234")] {
            assert_eq!(rate(of), expected);
        }
        for (micros, expected) in
            [(410, "410us"), (3_200, "3.2ms"), (12_500_000, "12.5s"), (3_600_000_000, "1h")]
        {
            assert_eq!(short(Duration::from_micros(micros)), expected);
        }
    }
}
