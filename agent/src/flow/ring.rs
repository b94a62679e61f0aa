//! Recent flows in bounded memory, shared out fairly.
//!
//! Two areas, one for drops and one for the rest. In each, a full area gives up the
//! oldest record of the largest conversation (peer, port) of the pod that holds most: a
//! pod, and within it a peer, that floods displaces its own records, never another's.

use std::{
    cmp::Reverse,
    collections::{BTreeSet, HashMap, VecDeque},
    net::IpAddr,
    sync::Arc,
};

use signet_ebpf::abi::Verdict;

use super::record::{FlowRecord, Party, Reporter};

/// Recent flows.
#[derive(Debug)]
pub struct Ring {
    flows: Area,
    drops: Area,
    seen: u64,
}

impl Ring {
    /// A ring that keeps so many records of drops and of everything else.
    pub fn new(flows: usize, drops: usize) -> Self {
        Self { flows: Area::new(flows), drops: Area::new(drops), seen: 0 }
    }

    /// Keeps a record, giving up another where there is no room.
    pub fn push(&mut self, record: Arc<FlowRecord>) {
        self.seen += 1;
        let area =
            if record.verdict == Verdict::Dropped { &mut self.drops } else { &mut self.flows };
        area.push(self.seen, record);
    }

    /// Everything kept, oldest first.
    pub fn snapshot(&self) -> Vec<Arc<FlowRecord>> {
        let mut all: Vec<_> = self.flows.entries().chain(self.drops.entries()).collect();
        all.sort_unstable_by_key(|e| (e.record.time, e.seq));
        all.into_iter().map(|e| e.record.clone()).collect()
    }

    /// Records kept.
    pub fn len(&self) -> usize {
        self.flows.len + self.drops.len
    }

    /// True when nothing is kept.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Records that there is room for.
    pub fn capacity(&self) -> usize {
        self.flows.capacity + self.drops.capacity
    }

    /// Records ever pushed.
    pub fn seen(&self) -> u64 {
        self.seen
    }
}

/// The reporting pod; `None` for pods that nobody knows.
type PodKey = Option<(Arc<str>, Arc<str>)>;

/// What a pod talks with: a known pod by name, anything else by address, and the
/// destination's port.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
struct Conversation {
    pod: PodKey,
    ip: Option<IpAddr>,
    port: u16,
}

impl Conversation {
    fn of(record: &FlowRecord) -> Self {
        let peer: &Party = match record.reporter {
            Reporter::Source => &record.destination,
            Reporter::Destination => &record.source,
        };
        Self {
            ip: peer.pod.is_none().then_some(peer.ip),
            pod: peer.pod.clone(),
            port: record.destination.port,
        }
    }
}

#[derive(Debug)]
struct Entry {
    seq: u64,
    record: Arc<FlowRecord>,
}

#[derive(Debug)]
struct Area {
    capacity: usize,
    len: usize,
    pods: HashMap<PodKey, Share>,
    /// (records, pod), for the largest.
    by_size: BTreeSet<(usize, PodKey)>,
}

/// A pod's records.
#[derive(Debug, Default)]
struct Share {
    len: usize,
    queues: HashMap<Conversation, VecDeque<Entry>>,
    /// (records, oldest record, conversation): the last is the largest and, of several,
    /// the one with the oldest record.
    by_size: BTreeSet<(usize, Reverse<u64>, Conversation)>,
}

impl Area {
    fn new(capacity: usize) -> Self {
        Self { capacity, len: 0, pods: HashMap::new(), by_size: BTreeSet::new() }
    }

    fn push(&mut self, seq: u64, record: Arc<FlowRecord>) {
        if self.capacity == 0 {
            return;
        }
        let pod = record.reporting_party().pod.clone();
        let share = self.pods.entry(pod.clone()).or_default();
        self.by_size.remove(&(share.len, pod.clone()));
        share.push(seq, record);
        self.by_size.insert((share.len, pod));
        self.len += 1;
        while self.len > self.capacity {
            self.give_up_one();
        }
    }

    fn give_up_one(&mut self) {
        let Some((_, pod)) = self.by_size.pop_last() else { return };
        let Some(share) = self.pods.get_mut(&pod) else { return };
        share.give_up_one();
        self.len -= 1;
        if share.len == 0 {
            self.pods.remove(&pod);
        } else {
            self.by_size.insert((share.len, pod));
        }
    }

    fn entries(&self) -> impl Iterator<Item = &Entry> {
        self.pods.values().flat_map(|s| s.queues.values().flatten())
    }
}

impl Share {
    fn push(&mut self, seq: u64, record: Arc<FlowRecord>) {
        let conversation = Conversation::of(&record);
        let queue = self.queues.entry(conversation.clone()).or_default();
        let oldest = Reverse(queue.front().map_or(seq, |e| e.seq));
        let mut key = (queue.len(), oldest, conversation);
        self.by_size.remove(&key);
        queue.push_back(Entry { seq, record });
        key.0 = queue.len();
        self.by_size.insert(key);
        self.len += 1;
    }

    fn give_up_one(&mut self) {
        let Some((_, _, conversation)) = self.by_size.pop_last() else { return };
        let Some(queue) = self.queues.get_mut(&conversation) else { return };
        queue.pop_front();
        self.len -= 1;
        match queue.front() {
            Some(front) => {
                let key = (queue.len(), Reverse(front.seq), conversation);
                self.by_size.insert(key);
            }
            None => {
                self.queues.remove(&conversation);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::flow::{
        example::{allowed, at, denied, party},
        record::KnownBy,
    };

    /// A drop that `pod` reports, of a client on `client`.
    fn drop_of(pod: &str, client: &str, ms: i64) -> Arc<FlowRecord> {
        Arc::new(FlowRecord {
            time: at(ms),
            source: Party::unknown(format!("{client}:4000").parse().unwrap()),
            destination: party(pod, KnownBy::Kernel, "10.0.2.7:8080"),
            ..denied()
        })
    }

    fn is_held(ring: &Ring, record: &Arc<FlowRecord>) -> bool {
        ring.snapshot().iter().any(|held| Arc::ptr_eq(held, record))
    }

    #[test]
    fn one_drop_of_b_outlives_a_flood_of_a() {
        let mut ring = Ring::new(50, 50);
        let of_b = drop_of("shop/b-1", "10.0.0.9", 0);
        ring.push(of_b.clone());
        for ms in 1..10_000 {
            ring.push(drop_of("shop/a-1", "10.0.0.8", ms));
        }
        assert!(is_held(&ring, &of_b));
        assert_eq!((ring.len(), ring.seen()), (50, 10_000));
        // The control: the flood displaces its own.
        let first_of_a = ring.snapshot().into_iter().find(|r| r.time > of_b.time);
        assert_eq!(first_of_a.map(|r| r.time), Some(at(9_951)));
    }

    #[test]
    fn one_clients_drop_outlives_a_flood_of_another_at_the_same_pod() {
        let mut ring = Ring::new(0, 50);
        let lone = drop_of("shop/b-1", "10.0.0.9", 0);
        ring.push(lone.clone());
        for ms in 1..10_000 {
            ring.push(drop_of("shop/b-1", "10.0.0.8", ms));
        }
        assert!(is_held(&ring, &lone));
        assert_eq!(ring.len(), 50);
    }

    #[test]
    fn drops_have_room_of_their_own() {
        let mut ring = Ring::new(10, 10);
        let drop = drop_of("shop/payments-5b7f", "10.0.0.9", 0);
        ring.push(drop.clone());
        for ms in 1..1000 {
            ring.push(Arc::new(FlowRecord { time: at(ms), ..allowed() }));
        }
        assert!(is_held(&ring, &drop));
        assert_eq!(ring.len(), 11);
    }

    proptest! {
        /// Never above capacity; in order; nobody holds less than an equal share while
        /// another holds more than one above it.
        #[test]
        fn memory_is_bounded_and_fair(
            capacity in 1usize..40,
            pushes in prop::collection::vec((0u8..6, 0u8..4), 0..300),
        ) {
            let mut ring = Ring::new(0, capacity);
            let mut pushed = std::collections::HashMap::<u8, usize>::new();
            for (ms, (pod, client)) in pushes.iter().enumerate() {
                let pod_name = format!("shop/p{pod}-1");
                ring.push(drop_of(&pod_name, &format!("10.0.0.{client}"), ms as i64));
                *pushed.entry(*pod).or_default() += 1;
                prop_assert!(ring.len() <= capacity);
            }
            prop_assert_eq!(ring.len(), pushes.len().min(capacity));
            prop_assert_eq!(ring.seen(), pushes.len() as u64);
            let snapshot = ring.snapshot();
            prop_assert!(snapshot.is_sorted_by_key(|r| r.time));
            let held = |pod: u8| {
                let name = format!("p{pod}-1");
                let of_pod = |r: &&Arc<FlowRecord>| {
                    r.destination.pod.as_ref().is_some_and(|(_, n)| **n == *name)
                };
                snapshot.iter().filter(of_pod).count()
            };
            let most = pushed.keys().map(|p| held(*p)).max().unwrap_or(0);
            for (pod, n) in &pushed {
                let lost_some = held(*pod) < *n;
                prop_assert!(!lost_some || held(*pod) + 1 >= most, "{pod} holds {}", held(*pod));
            }
        }
    }
}
