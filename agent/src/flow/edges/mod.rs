//! Who talked to whom in the last seven days: flows, aggregated, bounded, on disk.
//!
//! An edge's key has no pod, no client port and no time, so that what a steady cluster does is
//! a small table; addresses of nobody known count by their network. What does not fit is
//! counted in an edge without a name: a flood of one workload takes no room from others, and
//! is not lost either.

mod file;
#[cfg(test)]
mod tests;

use std::{
    collections::HashMap,
    fmt,
    net::IpAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use ipnet::IpNet;
use jiff::{SignedDuration, Timestamp};
use signet_ebpf::abi::{Reason, Verdict};

pub use self::file::{EdgesFile, EdgesFileError, keep, parse, write};
use super::record::{FlowEvent, FlowRecord, KnownBy, Party, Reporter, Via};
use crate::{spiffe::SpiffeId, telemetry::metrics::Reading};

/// What was not seen for so long is forgotten.
pub const RETENTION: SignedDuration = SignedDuration::from_hours(7 * 24);
/// The most edges with names.
pub const MOST: usize = 20_000;
/// The most edges with names that one workload reports.
pub const MOST_OF_ONE: usize = 1_000;
/// The most edges in all; beyond, flows are counted as not kept.
pub const MOST_IN_ALL: usize = MOST + 5_000;

/// One side of an edge.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum End {
    /// Pods of this cluster, by service account.
    Workload {
        /// Namespace.
        namespace: Arc<str>,
        /// Service account.
        account: Arc<str>,
    },
    /// Somebody who proved an identity and is no pod of this cluster under that name.
    Identity(SpiffeId),
    /// Addresses of nobody known, by their network: /24 or /64.
    Network(IpNet),
    /// Too many to be told apart.
    Others,
}

impl End {
    fn of(party: &Party) -> Self {
        let proven = matches!(party.known_by, KnownBy::Mtls | KnownBy::Kernel);
        let identity = party.identity.as_ref().filter(|_| proven);
        if let (Some((namespace, _)), Some(account)) = (&party.pod, &party.service_account)
            && identity.is_none_or(|id| id.workload() == Some((&**namespace, &**account)))
        {
            return Self::Workload { namespace: namespace.clone(), account: account.clone() };
        }
        match identity {
            Some(id) => Self::Identity(id.clone()),
            None => Self::Network(network_of(party.ip)),
        }
    }

    /// The namespace of a workload.
    pub fn namespace(&self) -> Option<&str> {
        match self {
            Self::Workload { namespace, .. } => Some(namespace),
            _ => None,
        }
    }
}

/// As people read it: `shop/frontend`, a SPIFFE ID, a network, `others`.
impl fmt::Display for End {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Workload { namespace, account } => write!(f, "{namespace}/{account}"),
            Self::Identity(id) => write!(f, "{id}"),
            Self::Network(network) => write!(f, "{network}"),
            Self::Others => f.write_str("others"),
        }
    }
}

/// The network that stands for an address.
pub fn network_of(ip: IpAddr) -> IpNet {
    let ip = ip.to_canonical();
    let len = if ip.is_ipv4() { 24 } else { 64 };
    IpNet::new(ip, len).map_or_else(|_| IpNet::from(ip), |net| net.trunc())
}

/// What flows have in common.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Edge {
    /// Which end reported.
    pub reporter: Reporter,
    /// The client.
    pub source: End,
    /// The server.
    pub destination: End,
    /// The server's port; 0 beside [`End::Others`].
    pub port: u16,
    /// IP protocol.
    pub protocol: u8,
    /// How they travelled, or would have.
    pub via: Via,
    /// What became of them.
    pub verdict: Verdict,
    /// Why.
    pub reason: Reason,
}

impl Edge {
    /// The edge of a record.
    pub fn of(record: &FlowRecord) -> Self {
        Self {
            reporter: record.reporter,
            source: End::of(&record.source),
            destination: End::of(&record.destination),
            port: record.destination.port,
            protocol: record.protocol,
            via: record.via,
            verdict: record.verdict,
            reason: record.reason,
        }
    }

    /// The side that reports.
    fn own(&self) -> &End {
        match self.reporter {
            Reporter::Source => &self.source,
            Reporter::Destination => &self.destination,
        }
    }

    /// The same without who the other side is.
    fn without_name(mut self) -> Self {
        match self.reporter {
            Reporter::Source => self.destination = End::Others,
            Reporter::Destination => self.source = End::Others,
        }
        self.port = 0;
        self
    }

    fn has_name(&self) -> bool {
        self.source != End::Others && self.destination != End::Others
    }
}

/// How often, and when.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Seen {
    /// Flows; at least one.
    pub count: u64,
    /// The first one.
    pub first: Timestamp,
    /// The last one, not before it.
    pub last: Timestamp,
}

/// The history; cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct Edges(Arc<Mutex<Table>>);

#[derive(Debug, Default)]
struct Table {
    edges: HashMap<Edge, Seen>,
    /// Edges with names, by the workload that reports them.
    of_one: HashMap<End, usize>,
    named: usize,
    /// Grows with every change.
    generation: u64,
    /// Flows that found no room at all.
    left_out: u64,
}

impl Edges {
    /// A history that begins with these, of which too old ones are left out.
    pub fn new(edges: impl IntoIterator<Item = (Edge, Seen)>, now: Timestamp) -> Self {
        let mut table = Table::default();
        for (edge, seen) in edges {
            // A clock that went back: what lies ahead would never grow old.
            let seen = Seen { first: seen.first.min(now), last: seen.last.min(now), ..seen };
            table.add(edge, seen);
        }
        table.expire(now);
        table.generation = 0;
        Self(Arc::new(Mutex::new(table)))
    }

    /// Becomes another history: what an earlier process has seen since this one began to read.
    pub fn replace(&self, other: &Self) {
        let mut newer = std::mem::take(&mut *other.table());
        let mut table = self.table();
        newer.generation = table.generation + 1;
        *table = newer;
    }

    /// Counts a verdict.
    pub fn record(&self, record: &FlowRecord) {
        // An edge counts flows, not what they ask for.
        if record.event == FlowEvent::Verdict && record.http.is_none() {
            let seen = Seen { count: 1, first: record.time, last: record.time };
            self.table().add(Edge::of(record), seen);
        }
    }

    /// Forgets what is too old.
    pub fn expire(&self, now: Timestamp) {
        self.table().expire(now);
    }

    /// Those that `wanted` wants, in no order.
    pub fn select(&self, wanted: impl Fn(&Edge, &Seen) -> bool) -> Vec<(Edge, Seen)> {
        let table = self.table();
        let wanted = table.edges.iter().filter(|(edge, seen)| wanted(edge, seen));
        wanted.map(|(edge, seen)| (edge.clone(), *seen)).collect()
    }

    /// How many edges there are, and how many flows found no room.
    pub fn size(&self) -> (usize, u64) {
        let table = self.table();
        (table.edges.len(), table.left_out)
    }

    /// As metrics.
    pub fn readings(&self) -> Vec<Reading> {
        let (edges, left_out) = self.size();
        vec![
            Reading::gauge("edges", "Edges in the history of flows").value(edges),
            Reading::counter("edges_left_out", "Flows that found no room in it").value(left_out),
        ]
    }

    /// Grows with every change.
    pub fn generation(&self) -> u64 {
        self.table().generation
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        // A panic while the lock was held leaves at worst one flow uncounted.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Table {
    fn add(&mut self, edge: Edge, seen: Seen) {
        self.generation += 1;
        if self.count(&edge, &seen) {
            return;
        }
        let of_one = self.of_one.get(edge.own()).copied().unwrap_or_default();
        if edge.has_name() && self.named < MOST && of_one < MOST_OF_ONE {
            self.named += 1;
            *self.of_one.entry(edge.own().clone()).or_default() += 1;
            self.edges.insert(edge, seen);
            return;
        }
        let edge = edge.without_name();
        if self.count(&edge, &seen) {
        } else if self.edges.len() < MOST_IN_ALL {
            self.edges.insert(edge, seen);
        } else {
            self.left_out = self.left_out.saturating_add(seen.count);
        }
    }

    /// Adds to an edge that is there.
    fn count(&mut self, edge: &Edge, seen: &Seen) -> bool {
        let Some(held) = self.edges.get_mut(edge) else { return false };
        held.count = held.count.saturating_add(seen.count);
        held.first = held.first.min(seen.first);
        held.last = held.last.max(seen.last);
        true
    }

    fn expire(&mut self, now: Timestamp) {
        let Self { edges, of_one, named, generation, .. } = self;
        edges.retain(|edge, seen| {
            let keep = now.duration_since(seen.last) < RETENTION;
            if !keep {
                *generation += 1;
                if edge.has_name() {
                    *named -= 1;
                    if let Some(count) = of_one.get_mut(edge.own()) {
                        *count -= 1;
                    }
                }
            }
            keep
        });
        of_one.retain(|_, count| *count > 0);
    }
}
