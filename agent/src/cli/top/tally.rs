//! Counts of edges and ends of flows, by identity.

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    sync::Arc,
    time::Duration,
};

use super::Sort;
use crate::{
    cli::{aggregate, edges::name_of, flow_lines},
    flow::{FlowEvent, FlowRecord},
    proto::admin::{EdgeEnd, SeenEdge},
};

/// Ended flows of an identity that its durations are taken of.
const ENDS: usize = 512;
/// Identities whose ended flows are kept.
const IDENTITIES: usize = 4096;

/// One identity at one turn.
#[derive(Clone, PartialEq, Debug)]
pub struct Row {
    /// `namespace/account`, a SPIFFE ID, a network, or `others`.
    pub identity: String,
    /// Flows a second as their client, whatever became of them.
    pub out: f64,
    /// Flows a second as their server.
    pub into: f64,
    /// Denied flows a second, as client or as server.
    pub denied: f64,
    /// As client or as server, in the history that agents keep.
    pub denied_in_all: u64,
    /// Flows a second that would have been denied.
    pub audit: f64,
    /// Why most of what was denied in this turn was; before that, in the history.
    pub reason: Option<String>,
    /// How long half of the ended flows lasted at most, as client or as server.
    pub median: Option<Duration>,
    /// How long all but one in a hundred lasted at most.
    pub slowest: Option<Duration>,
}

/// What there was in a turn.
#[derive(Clone, PartialEq, Debug)]
pub struct Counted {
    /// Flows a second, each counted once.
    pub flows: f64,
    /// Of them, the denied.
    pub denied: f64,
    /// By identity, in the order of their names.
    pub rows: Vec<Row>,
}

/// An agent's edge: ends, port, protocol, via, verdict, reason and reporter.
type Key = (String, String, u32, u32, String, String, String, String);

/// What was counted so far.
#[derive(Debug, Default)]
pub struct Tally {
    /// By agent, at its last answer.
    counts: HashMap<Arc<str>, HashMap<Key, u64>>,
    ends: BTreeMap<String, VecDeque<Duration>>,
    lost: u64,
    is_deaf: bool,
}

/// What comes together for a row.
#[derive(Default)]
struct Sums {
    out: u64,
    into: u64,
    denied: u64,
    audit: u64,
    denied_in_all: u64,
    reasons: BTreeMap<String, (u64, u64)>,
}

impl Tally {
    /// A flow has ended.
    pub fn ended(&mut self, record: &FlowRecord) {
        let FlowEvent::End { duration, .. } = record.event else { return };
        let mut names =
            [flow_lines::workload(&record.source), flow_lines::workload(&record.destination)]
                .to_vec();
        names.dedup();
        // Only an address is known.
        names.retain(|name| !name.is_empty());
        for name in names {
            if !self.ends.contains_key(&name) && self.ends.len() >= IDENTITIES {
                continue;
            }
            let ends = self.ends.entry(name).or_default();
            if ends.len() >= ENDS {
                ends.pop_front();
            }
            ends.push_back(duration);
        }
    }

    /// Agents told that events were lost.
    pub fn lost(&mut self, n: u64) {
        self.lost = self.lost.saturating_add(n);
    }

    /// How many, so far.
    pub fn lost_in_all(&self) -> u64 {
        self.lost
    }

    /// An agent tells of no more flows.
    pub fn deaf(&mut self) {
        self.is_deaf = true;
    }

    /// Whether one tells of none.
    pub fn is_deaf(&self) -> bool {
        self.is_deaf
    }

    /// What came about in `over`, the time since the last turn; without it, counting begins.
    ///
    /// An agent that did not answer at the last turn counts anew: what it saw in between is not
    /// of this turn's time.
    pub fn turn(
        &mut self,
        answers: Vec<(Arc<str>, Vec<SeenEdge>)>,
        over: Option<Duration>,
    ) -> Counted {
        let mut before = std::mem::take(&mut self.counts);
        let mut found = Vec::new();
        for (agent, edges) in answers {
            let known = before.remove(&agent);
            let counts = self.counts.entry(agent).or_default();
            for edge in edges {
                let key = key(&edge);
                // An edge that was not there began in this turn. An agent that starts anew counts
                // from where its history was written last, which may be less than it said.
                let new = match (&known, over) {
                    (Some(known), Some(_)) => {
                        edge.count.saturating_sub(known.get(&key).copied().unwrap_or(0))
                    }
                    _ => 0,
                };
                counts.insert(key, edge.count);
                found.push((new, edge));
            }
        }
        let mut sums: BTreeMap<String, Sums> = BTreeMap::new();
        let (mut flows, mut dropped) = (0, 0);
        for (new, edge) in aggregate::one_side_each(found) {
            let is_denied = edge.verdict == "DROPPED";
            flows += new;
            dropped += if is_denied { new } else { 0 };
            let (source, destination) = (end(&edge.source), end(&edge.destination));
            sums.entry(source.clone()).or_default().out += new;
            sums.entry(destination.clone()).or_default().into += new;
            let mut add = |name: String| {
                let sum = sums.entry(name).or_default();
                if edge.verdict == "AUDIT" {
                    sum.audit += new;
                }
                if is_denied {
                    sum.denied += new;
                    sum.denied_in_all += edge.count;
                    let reason = sum.reasons.entry(edge.reason.clone()).or_default();
                    reason.0 += new;
                    reason.1 += edge.count;
                }
            };
            if source != destination {
                add(destination);
            }
            add(source);
        }
        let seconds = over.unwrap_or_default().as_secs_f64().max(0.001);
        let rate = |n: u64| n as f64 / seconds;
        let row = |(identity, sum): (String, Sums)| {
            let mut lasted: Vec<_> =
                self.ends.get(&identity).into_iter().flatten().copied().collect();
            lasted.sort_unstable();
            let reason = sum.reasons.iter().max_by_key(|(_, counts)| **counts);
            Row {
                out: rate(sum.out),
                into: rate(sum.into),
                denied: rate(sum.denied),
                denied_in_all: sum.denied_in_all,
                audit: rate(sum.audit),
                reason: reason.map(|(reason, _)| reason.clone()),
                median: part(&lasted, 50),
                slowest: part(&lasted, 99),
                identity,
            }
        };
        let rows = sums.into_iter().map(row).collect();
        Counted { flows: rate(flows), denied: rate(dropped), rows }
    }
}

fn key(edge: &SeenEdge) -> Key {
    (
        end(&edge.source),
        end(&edge.destination),
        edge.port,
        edge.protocol,
        edge.via.clone(),
        edge.verdict.clone(),
        edge.reason.clone(),
        edge.reporter.clone(),
    )
}

fn end(end: &Option<EdgeEnd>) -> String {
    end.as_ref().map(name_of).unwrap_or_else(|| "others".into())
}

/// The least that so many percent do not exceed (nearest rank).
fn part(sorted: &[Duration], percent: usize) -> Option<Duration> {
    let rank = (sorted.len() * percent).div_ceil(100);
    sorted.get(rank.saturating_sub(1)).copied()
}

/// In order, what is most first.
pub fn sorted(rows: &[Row], sort: Sort) -> Vec<&Row> {
    let mut rows: Vec<&Row> = rows.iter().collect();
    rows.sort_by(|a, b| {
        let by = match sort {
            Sort::Flows => (b.out + b.into).total_cmp(&(a.out + a.into)),
            Sort::Denied => {
                b.denied.total_cmp(&a.denied).then(b.denied_in_all.cmp(&a.denied_in_all))
            }
            Sort::Latency => b.slowest.cmp(&a.slowest),
            Sort::Name => std::cmp::Ordering::Equal,
        };
        by.then_with(|| a.identity.cmp(&b.identity))
    });
    rows
}

#[cfg(test)]
mod tests {
    use super::*;

    fn end(account: &str) -> Option<EdgeEnd> {
        Some(EdgeEnd {
            namespace: "shop".into(),
            service_account: account.into(),
            ..EdgeEnd::default()
        })
    }

    fn edge(source: &str, destination: &str, verdict: &str, reason: &str, count: u64) -> SeenEdge {
        SeenEdge {
            reporter: "destination".into(),
            source: end(source),
            destination: end(destination),
            port: 80,
            protocol: 6,
            via: "mtls".into(),
            verdict: verdict.into(),
            reason: reason.into(),
            count,
            ..SeenEdge::default()
        }
    }

    fn of<'a>(counted: &'a Counted, name: &str) -> &'a Row {
        counted.rows.iter().find(|row| row.identity == name).unwrap()
    }

    const TWO: Option<Duration> = Some(Duration::from_secs(2));

    #[test]
    fn rates_are_of_what_is_new_and_each_identity_has_both_sides() {
        let mut tally = Tally::default();
        let at = |allowed, denied| {
            vec![
                edge("front", "db", "FORWARDED", "allowed", allowed),
                edge("thief", "db", "DROPPED", "policy_no_match", denied),
                edge("front", "front", "AUDIT", "policy_no_match", allowed),
            ]
        };
        let node = |edges| vec![("node-1".into(), edges)];
        let first = tally.turn(node(at(1000, 50)), None);
        assert_eq!((first.flows, first.denied), (0.0, 0.0));
        assert!(first.rows.iter().all(|row| row.out + row.into + row.denied == 0.0), "{first:?}");
        let counted = tally.turn(node(at(1010, 54)), TWO);
        // A denied flow is in the rows of both ends, and once in the sum.
        assert_eq!((counted.flows, counted.denied), (12.0, 2.0));
        let of = |name| of(&counted, name);
        let (db, front, thief) = (of("shop/db"), of("shop/front"), of("shop/thief"));
        assert_eq!((db.into, db.out, db.denied, db.denied_in_all), (7.0, 0.0, 2.0, 54));
        assert_eq!((front.out, front.into, front.audit, front.denied), (10.0, 5.0, 5.0, 0.0));
        assert_eq!((thief.out, thief.denied), (2.0, 2.0));
        assert_eq!(thief.reason.as_deref(), Some("policy_no_match"));
        assert_eq!(front.reason, None);
        // An edge that was not there counts from nothing; an agent that begins anew never below.
        let mut later = at(3, 0);
        later.push(edge("new", "db", "FORWARDED", "allowed", 6));
        let counted = tally.turn(node(later), TWO);
        assert_eq!((super::tests::of(&counted, "shop/new").out, counted.flows), (3.0, 3.0));
        let order = |sort| -> Vec<&str> {
            sorted(&counted.rows, sort).iter().map(|row| row.identity.as_str()).collect()
        };
        assert_eq!(order(Sort::Flows), ["shop/db", "shop/new", "shop/front", "shop/thief"]);
        assert_eq!(order(Sort::Name), ["shop/db", "shop/front", "shop/new", "shop/thief"]);
    }

    #[test]
    fn an_agent_that_was_away_makes_no_surge() {
        let mut tally = Tally::default();
        let received = |count| edge("front", "db", "FORWARDED", "allowed", count);
        let sent = |count| SeenEdge { reporter: "source".into(), ..received(count) };
        let node = |name: &str, edge| (Arc::from(name), vec![edge]);
        let both = |n| vec![node("node-1", sent(n)), node("node-2", received(n))];
        tally.turn(both(100), None);
        // What both ends report is counted once.
        assert_eq!(tally.turn(both(104), TWO).flows, 2.0);
        // The server's node is away: its client's tells of the same flows.
        assert_eq!(tally.turn(vec![node("node-1", sent(110))], TWO).flows, 3.0);
        // It is back with all that it saw meanwhile, or with its first answer.
        assert_eq!(tally.turn(both(500), TWO).flows, 0.0);
        assert_eq!(tally.turn(both(502), TWO).flows, 1.0);
        // One that had nothing to tell yet was there.
        let mut tally = Tally::default();
        tally.turn(vec![("node-2".into(), vec![])], None);
        assert_eq!(tally.turn(vec![node("node-2", received(8))], TWO).flows, 4.0);
    }

    #[test]
    fn durations_are_of_flows_that_ended() {
        let mut tally = Tally::default();
        let mut record = crate::flow::example::allowed();
        tally.ended(&record);
        assert!(tally.ends.is_empty(), "a verdict is no end");
        for millis in 1..=1000 {
            let duration = Duration::from_millis(millis);
            record.event = FlowEvent::End { sent: 0, received: 0, duration };
            tally.ended(&record);
        }
        assert_eq!(tally.ends.len(), 2, "{:?}", tally.ends.keys());
        let ends = tally.ends.values().next().unwrap();
        assert_eq!((ends.len(), ends[0]), (ENDS, Duration::from_millis(489)));
        let millis: Vec<_> = (1..=200).map(Duration::from_millis).collect();
        assert_eq!(part(&millis, 50), Some(Duration::from_millis(100)));
        assert_eq!(part(&millis, 99), Some(Duration::from_millis(198)));
        assert_eq!(part(&millis[..1], 99), Some(Duration::from_millis(1)));
        assert_eq!(part(&[], 50), None);
    }
}
