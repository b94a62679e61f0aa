//! Two reporters, one flow: the merged view.
//!
//! Both ends of a tunnelled flow report it. Records join on uuid, event, both pods and
//! the destination's port, at most one record a reporter; the destination's is shown.
//! Anything else shows every record: a uuid alone proves nothing, a client chooses it.

use std::{
    collections::HashMap,
    net::IpAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use uuid::Uuid;

use super::record::{FlowEvent, FlowRecord, Party, Reporter};

/// How long a follower waits for the destination's record of a flow.
pub const PATIENCE: Duration = Duration::from_millis(500);
/// How long a shown flow is remembered, so that the source's record joins it.
const MEMORY: Duration = Duration::from_secs(10);
/// Records held or remembered at most.
const HELD: usize = 16384;

/// Merges a finished set, keeping its order by time.
pub fn merge<T: AsRef<FlowRecord>>(mut records: Vec<T>) -> Vec<T> {
    records.sort_by_key(|r| r.as_ref().time);
    let mut groups: HashMap<Joint, Reporters> = HashMap::new();
    for record in &records {
        let record = record.as_ref();
        groups.entry(Joint::of(record)).or_default().count(record);
    }
    records.retain(|r| {
        let record = r.as_ref();
        let joined = groups.get(&Joint::of(record)).is_some_and(Reporters::are_one_flow);
        !(joined && record.reporter == Reporter::Source)
    });
    records
}

/// Merges a stream: a destination's record passes at once, a source's waits a moment for it.
#[derive(Debug)]
pub struct StreamMerger<T> {
    held: HashMap<Joint, (Instant, T)>,
    shown: HashMap<Joint, Instant>,
}

impl<T> Default for StreamMerger<T> {
    fn default() -> Self {
        Self { held: HashMap::new(), shown: HashMap::new() }
    }
}

impl<T: AsRef<FlowRecord>> StreamMerger<T> {
    /// Takes a record; returns what can be shown, in order.
    pub fn push(&mut self, item: T, now: Instant) -> Vec<T> {
        let record = item.as_ref();
        let joint = Joint::of(record);
        match record.reporter {
            Reporter::Destination => {
                if self.held.remove(&joint).is_none() && self.shown.len() < HELD {
                    self.shown.insert(joint, now);
                }
                vec![item]
            }
            Reporter::Source => {
                if self.shown.remove(&joint).is_some() {
                    return Vec::new();
                }
                if self.held.len() >= HELD {
                    return vec![item];
                }
                // A second record of one reporter is another flow: both are shown.
                self.held.insert(joint, (now, item)).map(|(_, first)| first).into_iter().collect()
            }
        }
    }

    /// What has waited long enough, oldest first.
    pub fn expire(&mut self, now: Instant) -> Vec<T> {
        self.shown.retain(|_, at| now.duration_since(*at) < MEMORY);
        let mut due: Vec<T> = self
            .held
            .extract_if(|_, (at, _)| now.duration_since(*at) >= PATIENCE)
            .map(|(_, (_, item))| item)
            .collect();
        due.sort_by_key(|r| r.as_ref().time);
        due
    }

    /// When [`StreamMerger::expire`] has something to do next.
    pub fn next_expiry(&self) -> Option<Instant> {
        self.held.values().map(|(at, _)| *at + PATIENCE).min()
    }

    /// Everything held, for the end of the stream.
    pub fn finish(&mut self) -> Vec<T> {
        let mut rest: Vec<T> = self.held.drain().map(|(_, (_, item))| item).collect();
        rest.sort_by_key(|r| r.as_ref().time);
        rest
    }
}

/// What two records of one flow have in common.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
struct Joint {
    uuid: Uuid,
    end: bool,
    /// Of a flow's requests only the destination knows: they are no second record of it.
    request: bool,
    source: Side,
    destination: Side,
    port: u16,
}

impl Joint {
    fn of(record: &FlowRecord) -> Self {
        Self {
            uuid: record.uuid,
            end: record.event != FlowEvent::Verdict,
            request: record.http.is_some(),
            source: Side::of(&record.source),
            destination: Side::of(&record.destination),
            port: record.destination.port,
        }
    }
}

#[derive(Clone, PartialEq, Eq, Hash, Debug)]
enum Side {
    Pod(Arc<str>, Arc<str>),
    Address(IpAddr),
}

impl Side {
    fn of(party: &Party) -> Self {
        match &party.pod {
            Some((namespace, name)) => Self::Pod(namespace.clone(), name.clone()),
            None => Self::Address(party.ip),
        }
    }
}

#[derive(Default, Debug)]
struct Reporters {
    source: u32,
    destination: u32,
}

impl Reporters {
    fn count(&mut self, record: &FlowRecord) {
        match record.reporter {
            Reporter::Source => self.source += 1,
            Reporter::Destination => self.destination += 1,
        }
    }

    fn are_one_flow(&self) -> bool {
        self.source == 1 && self.destination == 1
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::flow::example::{allowed, as_source, denied, ended, refused};

    #[test]
    fn both_ends_of_a_flow_are_one_line_the_destinations() {
        let both = vec![as_source(&allowed()), allowed()];
        assert_eq!(merge(both), [allowed()]);
        let both = vec![denied(), as_source(&denied())];
        assert_eq!(merge(both), [denied()]);
        // Ends join ends, not verdicts.
        let four = vec![ended(), as_source(&allowed()), allowed(), as_source(&ended())];
        assert_eq!(merge(four), [allowed(), ended()]);
    }

    #[test]
    fn what_only_one_end_saw_stays() {
        assert_eq!(merge(vec![as_source(&denied())]), [as_source(&denied())]);
        assert_eq!(merge(vec![refused()]), [refused()]);
    }

    #[test]
    fn a_uuid_alone_joins_nothing() {
        // Another pod that uses the uuid of somebody else's flow.
        let mut forged = as_source(&allowed());
        forged.source = denied().source;
        assert_eq!(merge(vec![forged.clone(), allowed()]).len(), 2);
        let mut other_port = as_source(&allowed());
        other_port.destination.port += 1;
        assert_eq!(merge(vec![other_port, allowed()]).len(), 2);
        // The control is `both_ends_of_a_flow_are_one_line_the_destinations`.
    }

    #[test]
    fn a_second_record_of_one_reporter_shows_all() {
        let three = vec![as_source(&allowed()), as_source(&allowed()), allowed()];
        assert_eq!(merge(three).len(), 3);
        let mut elsewhere = allowed();
        elsewhere.node = "node-3".into();
        assert_eq!(merge(vec![as_source(&allowed()), allowed(), elsewhere]).len(), 3);
    }

    #[test]
    fn a_stream_waits_for_the_destination_and_not_for_ever() {
        let start = Instant::now();
        let later = |ms| start + Duration::from_millis(ms);
        let mut stream = StreamMerger::default();
        // Source first.
        assert!(stream.push(as_source(&allowed()), start).is_empty());
        assert_eq!(stream.push(allowed(), later(100)), [allowed()]);
        assert!(stream.expire(later(10_000)).is_empty());
        // Destination first.
        assert_eq!(stream.push(denied(), start), [denied()]);
        assert!(stream.push(as_source(&denied()), later(50)).is_empty());
        assert_eq!(stream.next_expiry(), None);
        // Source only.
        assert!(stream.push(as_source(&denied()), start).is_empty());
        assert_eq!(stream.next_expiry(), Some(start + PATIENCE));
        assert!(stream.expire(later(499)).is_empty());
        assert_eq!(stream.expire(later(500)), [as_source(&denied())]);
        // At the end of the stream.
        assert!(stream.push(as_source(&denied()), start).is_empty());
        assert_eq!(stream.finish(), [as_source(&denied())]);
    }

    #[test]
    fn a_stream_shows_every_record_of_a_reporter_that_repeats_itself() {
        let now = Instant::now();
        let mut stream = StreamMerger::default();
        assert!(stream.push(as_source(&allowed()), now).is_empty());
        assert_eq!(stream.push(as_source(&allowed()), now), [as_source(&allowed())]);
        assert_eq!(stream.finish(), [as_source(&allowed())]);
    }
}
