//! What was said by the pods themselves, held against what the agents recorded.

use std::{collections::BTreeMap, fmt, time::Duration};

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use signet_lab::{
    agent::Flow,
    pod::Pod,
    process::Running,
    traffic::reports::{Call, Seen},
};

use super::lives::{FIRST_PORT, Kind, Life, PORTS};
use crate::mesh::retriable;

/// How far a record's time may be from what it is about, in microseconds: it is written behind it.
const BEHIND: u64 = 2_000_000;
/// How long the API may still tell of a pod whose sandbox is gone.
pub const API: Duration = Duration::from_secs(3);
/// How much earlier than a call its record may seem: clocks' resolution.
const BEFORE: u64 = 50_000;

/// What each side said, and what was recorded.
pub struct Truth<'a> {
    pub lives: Vec<Life>,
    pub frontend: &'a Pod,
    /// What the frontend did.
    pub calls: Vec<Call>,
    /// Whom the strict server saw.
    pub seen: Vec<Seen>,
    pub flows: Vec<Record>,
    pub server: &'a Pod,
    /// How old what a node knows from the API may be: with the API server away, nobody hears
    /// that an address is another pod's.
    pub stale: Duration,
}

/// A flow record and its time.
pub struct Record {
    pub flow: Flow,
    /// Microseconds since 1970.
    pub at: u64,
}

/// What was compared, so that a run that compared nothing fails.
#[derive(Debug, Default)]
struct Compared {
    /// Records whose client is known by the port that it called, by how the agent knew it.
    clients: BTreeMap<String, u64>,
    /// Of those, how many named a pod of the same identity that had the address before.
    predecessors: u64,
    /// Answered calls whose record named the server that answered.
    servers: u64,
    /// Calls to pods that are off: both ends are known by addresses alone.
    by_address: u64,
    /// Of those, how many named the address's owner of before.
    stale: u64,
}

impl Truth<'_> {
    /// Fails at the first flow that is taken for somebody else's.
    pub fn hold(&self) -> Result<()> {
        let mut compared = Compared::default();
        self.applications()?;
        self.clients(&mut compared)?;
        self.servers(&mut compared)?;
        println!("{compared:?}");
        println!("{}", First::of(&self.lives)?);
        let clients: u64 = compared.clients.values().sum();
        ensure!(clients > 200, "few clients were compared: {compared:?}");
        ensure!(compared.servers > 50, "few servers were compared: {compared:?}");
        for kind in [Kind::Allowed, Kind::Denied, Kind::Off] {
            let of = |life: &&Life| life.kind == kind;
            let calls: usize = self.lives.iter().filter(of).map(|life| life.calls.len()).sum();
            let answered: usize = self.lives.iter().filter(of).map(Life::answered).sum();
            println!("{kind:?}: {calls} calls, {answered} answered");
            match kind {
                Kind::Denied => ensure!(answered == 0 && calls > 50, "{kind:?} got through"),
                Kind::Allowed | Kind::Off => ensure!(answered > 50, "{kind:?} was not served"),
            }
        }
        Ok(())
    }

    /// The strict server was reached by those alone that its policy names, and was shown their
    /// addresses.
    fn applications(&self) -> Result<()> {
        for seen in &self.seen {
            if self.frontend.ips().contains(&seen.peer.ip()) {
                continue;
            }
            let callers = self.by_port(seen.local.port(), seen.at)?;
            let is_of = |life: &&Life| {
                life.kind == Kind::Allowed
                    && life.addresses.contains(&seen.peer.ip())
                    && seen.text.ends_with("churn-a")
            };
            ensure!(callers.iter().any(is_of), "{seen:?} is nobody of {callers:#?}");
        }
        ensure!(self.seen.len() > 100, "the server saw {} calls", self.seen.len());
        Ok(())
    }

    /// Whoever a record names as the client is the one that called this port.
    fn clients(&self, compared: &mut Compared) -> Result<()> {
        for Record { flow, at } in &self.flows {
            let port = flow.destination.port.unwrap_or_default();
            if !(FIRST_PORT..FIRST_PORT + PORTS).contains(&port)
                || flow.destination.full_name() != self.server.full_name()
                || flow.source.full_name() == self.frontend.full_name()
            {
                continue;
            }
            let callers = self.by_port(port, *at)?;
            let named = flow.source.full_name();
            if flow.source.pod.is_some() && !callers.iter().any(|life| life.name == named) {
                let is_same = |life: &&&Life| self.is_predecessor(&named, life, *at);
                let known = flow.source.known_by.as_deref();
                let is_predecessor = known == Some("mtls") && callers.iter().any(|l| is_same(&l));
                ensure!(is_predecessor, "{flow} of {callers:#?}");
                compared.predecessors += 1;
            }
            if flow.source.identity.is_some() {
                let is_of = |life: &&Life| life.identity() == flow.source.identity;
                ensure!(callers.iter().any(is_of), "{flow} of {callers:#?}");
            }
            let allowed = callers.iter().any(|life| life.kind == Kind::Allowed);
            ensure!(allowed || flow.verdict == "DROPPED", "{flow} of {callers:#?}");
            let known = flow.source.known_by.clone().unwrap_or_default();
            *compared.clients.entry(known).or_default() += 1;
        }
        Ok(())
    }

    /// The server that answered is the one that the record names.
    fn servers(&self, compared: &mut Compared) -> Result<()> {
        let frontend = self.frontend.full_name();
        let mut by_source: BTreeMap<u16, Vec<&Record>> = BTreeMap::new();
        for record in &self.flows {
            let flow = &record.flow;
            if flow.source.full_name() == frontend && flow.is("FORWARDED", "allowed") {
                by_source.entry(flow.source.port.unwrap_or_default()).or_default().push(record);
            }
        }
        for call in &self.calls {
            let (Some(local), Some(tag)) = (call.local, call.tag) else { continue };
            let server = self
                .lives
                .iter()
                .find(|life| {
                    life.number == tag
                        && life.addresses.contains(&call.to.ip())
                        && life.from <= call.end
                        && call.begin <= life.to
                })
                .with_context(|| format!("{call:?} was answered by nobody that lived"))?;
            let records: Vec<&Record> = by_source
                .get(&local.port())
                .into_iter()
                .flatten()
                .filter(|record| {
                    let flow = &record.flow;
                    flow.destination.ip == Some(call.to.ip().to_string())
                        && flow.destination.port == Some(call.to.port())
                        && call.begin <= record.at + BEFORE
                        && record.at <= call.end + BEHIND
                })
                .copied()
                .collect();
            if server.kind == Kind::Off {
                compared.by_address += 1;
                let names = |record: &&Record| record.flow.destination.full_name() == server.name;
                compared.stale += u64::from(!records.iter().any(names));
                continue;
            }
            // Both ends have told of it, or at least one.
            ensure!(!records.is_empty(), "{call:?} has no record; it was {server:?}");
            for Record { flow, at } in records {
                let named = flow.destination.full_name();
                if named != server.name {
                    let is_predecessor =
                        flow.reporter == "source" && self.is_predecessor(&named, server, *at);
                    ensure!(is_predecessor, "{flow}; it was {server:?}");
                    compared.predecessors += 1;
                }
                ensure!(flow.destination.identity == server.identity(), "{flow} {server:?}");
                ensure!(flow.via == "mtls", "{flow}: not through a tunnel");
            }
            compared.servers += 1;
        }
        Ok(())
    }

    /// True when a pod of this name had an address of this one before, under the same identity.
    ///
    /// The other node has a pod's name from the API, by the address; the identity is the one that
    /// the handshake proved. So for as long as the API's word is old, it may name the one before.
    fn is_predecessor(&self, named: &str, life: &Life, at: u64) -> bool {
        let stale = self.stale.as_micros() as u64;
        self.lives.iter().filter(|before| before.name == named).any(|before| {
            before.identity().is_some()
                && before.identity() == life.identity()
                && before.addresses.iter().any(|ip| life.addresses.contains(ip))
                && at <= before.to + stale
        })
    }

    /// Who called this port of the servers about then.
    fn by_port(&self, port: u16, at: u64) -> Result<Vec<&Life>> {
        let found: Vec<&Life> = self
            .lives
            .iter()
            .filter(|life| {
                life.port() == port && life.from <= at + BEFORE && at <= life.to + BEHIND
            })
            .collect();
        ensure!(!found.is_empty(), "nobody called port {port} at {at}");
        Ok(found)
    }
}

/// What init containers met in their first moment.
struct First {
    all: usize,
    refused: usize,
    latest: u64,
}

impl First {
    fn of(lives: &[Life]) -> Result<Self> {
        let mut first = Self { all: 0, refused: 0, latest: 0 };
        for life in lives.iter().filter(|life| life.kind == Kind::Allowed) {
            let Some(report) = &life.first else { continue };
            first.all += 1;
            let outcome = report.first_outcome.as_str();
            let is_refused = retriable(outcome) || outcome.ends_with(":ECONNRESET");
            ensure!(is_refused || outcome == "answered", "{}: {report:?}", life.name);
            first.refused += usize::from(is_refused);
            first.latest = first.latest.max(report.answered_us.unwrap_or_default());
        }
        ensure!(first.all > 0, "no init container reported");
        Ok(first)
    }
}

impl fmt::Display for First {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} of {} init containers ({} %) met a refusal with their first dial; the latest first \
             answer came after {} ms",
            self.refused,
            self.all,
            100 * self.refused / self.all,
            self.latest / 1000
        )
    }
}

/// The calls among a caller's records.
pub fn calls(printed: &[Value]) -> Vec<Call> {
    printed
        .iter()
        .filter(|value| value["event"] == "call")
        .filter_map(|value| serde_json::from_value(value.clone()).ok())
        .collect()
}

/// Whom a pod's TCP server saw since then.
pub fn seen_by(pod: &Pod, since: u64) -> Result<Vec<Seen>> {
    let hellos = pod.printed("main")?.into_iter().filter(|value| value["event"] == "hello");
    let mut all = Vec::new();
    for hello in hellos {
        let seen: Seen = serde_json::from_value(hello).context("hello")?;
        if seen.at >= since {
            all.push(seen);
        }
    }
    Ok(all)
}

/// The verdicts that were followed.
pub fn records(followed: &[Running]) -> Result<Vec<Record>> {
    let mut records = Vec::new();
    for running in followed {
        let log = std::fs::read_to_string(running.log()).unwrap_or_default();
        ensure!(!log.contains("lost"), "the stream of flows is not complete: {log}");
        for value in running.printed() {
            let flow: Flow = serde_json::from_value(value).context("a flow record")?;
            let time: jiff::Timestamp = flow.time.parse().context("a record's time")?;
            if flow.event == "verdict" {
                records.push(Record { flow, at: time.as_microsecond().max(0).cast_unsigned() });
            }
        }
    }
    Ok(records)
}
