//! From the place that decides to the ring: a queue that never blocks, and followers.
//!
//! [`Recorder::record`] is called on the data plane: it counts, takes a place in a
//! bounded queue and returns. One pod may hold only a share of the queue and the last
//! quarter of it is kept for drops, so that a flood of one pod costs another none of its
//! records. What finds no place is counted by cause.

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    hash::{BuildHasher, RandomState},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU32, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use jiff::{SignedDuration, Timestamp};
use signet_ebpf::abi::{Reason, Verdict};
use tokio::{sync::mpsc, time::sleep};

use super::{
    access_log::{AccessLog, AccessLogSettings},
    edges::Edges,
    hits::Hits,
    istio_metrics::IstioMetrics,
    record::{FlowEvent, FlowRecord},
    ring::Ring,
};
use crate::{
    policy::model::PolicyName,
    telemetry::{metrics::Reading, names, reason},
};

/// How much is kept.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Limits {
    /// Records in the ring, drops not among them.
    pub flows: usize,
    /// Records of drops in the ring.
    pub drops: usize,
    /// Records on their way to the ring.
    pub queue: usize,
    /// Followers at once.
    pub followers: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self { flows: 8192, drops: 4096, queue: 4096, followers: 64 }
    }
}

/// Why a record was not kept.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum LostCause {
    /// The kernel's ring buffer was full.
    KernelRing,
    /// The kernel sends only so many events a second and endpoint.
    KernelRate,
    /// The queue to the ring was full.
    Queue,
    /// The pod's share of that queue was used up.
    PodShare,
}

impl LostCause {
    /// Every cause.
    pub const ALL: [Self; 4] = [Self::KernelRing, Self::KernelRate, Self::Queue, Self::PodShare];

    /// Its name in metrics.
    pub const fn name(self) -> &'static str {
        match self {
            Self::KernelRing => "kernel_ring",
            Self::KernelRate => "kernel_rate",
            Self::Queue => "queue",
            Self::PodShare => "pod_share",
        }
    }

    /// For people, as `warning: node-2 lost 312 events (<this>)`.
    pub const fn describe(self) -> &'static str {
        match self {
            Self::KernelRing => "ring buffer full",
            Self::KernelRate => "rate limit of the pod",
            Self::Queue => "queue full",
            Self::PodShare => "share of the pod used up",
        }
    }
}

/// Hands records over; cheap to clone, never blocks.
#[derive(Clone, Debug)]
pub struct Recorder {
    queue: mpsc::Sender<Queued>,
    shared: Arc<Shared>,
}

/// Moves records from the queue into the ring; run by one task of the control plane.
#[derive(Debug)]
pub struct Collector {
    queue: mpsc::Receiver<Queued>,
    shared: Arc<Shared>,
    edges: Edges,
    access: AccessLog,
    istio: IstioMetrics,
}

/// Reads the ring.
#[derive(Clone, Debug)]
pub struct FlowLog {
    shared: Arc<Shared>,
}

/// Which records are asked for.
pub type Matches = Arc<dyn Fn(&FlowRecord) -> bool + Send + Sync>;

/// Counts since the start; never lossy.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Totals {
    /// Verdicts of the proxy, by kind.
    pub forwarded: u64,
    /// Drops that the proxy decided.
    pub dropped: u64,
    /// Audits that the proxy decided.
    pub audit: u64,
    /// Kernel events with verdict FORWARDED that arrived.
    pub kernel_forwarded: u64,
    /// Kernel events with verdict DROPPED that arrived (the exact number is in `DROPS`).
    pub kernel_dropped: u64,
    /// Kernel events with verdict AUDIT that arrived.
    pub kernel_audit: u64,
    /// Drops by reason, proxy and kernel events together.
    pub drops_by_reason: Vec<(Reason, u64)>,
    /// Losses by cause.
    pub lost: Vec<(LostCause, u64)>,
    /// Records in the ring.
    pub held: u64,
    /// Records that the ring has room for.
    pub capacity: u64,
    /// Records that the ring has seen.
    pub seen: u64,
}

impl Totals {
    /// Losses of every cause together.
    pub fn lost_in_all(&self) -> u64 {
        self.lost.iter().map(|(_, n)| n).sum()
    }
}

impl Totals {
    /// As metrics; drops by reason are those that were recorded, while the kernel's own counts
    /// of its drops are exact.
    pub fn readings(&self) -> Vec<Reading> {
        let mut verdicts =
            Reading::counter("verdicts", "Verdicts that were recorded, by who decided");
        for (origin, forwarded, dropped, audit) in [
            ("proxy", self.forwarded, self.dropped, self.audit),
            ("kernel", self.kernel_forwarded, self.kernel_dropped, self.kernel_audit),
        ] {
            for (verdict, count) in [
                (Verdict::Forwarded, forwarded),
                (Verdict::Dropped, dropped),
                (Verdict::Audit, audit),
            ] {
                let verdict = names::verdict(verdict).to_owned();
                let labels = vec![("origin", origin.to_owned()), ("verdict", verdict)];
                verdicts = verdicts.labelled(labels, count);
            }
        }
        // Also those that never were: a counter that begins at 1 has not grown.
        let mut drops: BTreeMap<&str, u64> =
            Reason::ALL.iter().map(|reason| (reason::name(*reason), 0)).collect();
        drops.extend(self.drops_by_reason.iter().map(|(r, n)| (reason::name(*r), *n)));
        let lost = self.lost.iter().map(|(cause, n)| (cause.name(), *n));
        vec![
            verdicts,
            Reading::counter("drops", "Drops that were recorded, by reason").each("reason", drops),
            Reading::counter("lost_events", "Records that were not kept, by cause")
                .each("cause", lost),
        ]
    }
}

/// Who else gets every record that reaches the ring.
#[derive(Clone, Debug, Default)]
pub struct Sinks {
    /// The history of flows.
    pub edges: Edges,
    /// The access log.
    pub access: AccessLogSettings,
    /// Istio's metrics.
    pub istio: IstioMetrics,
}

/// Makes a recorder and the collector that serves it and `sinks`.
pub fn start(limits: Limits, sinks: Sinks) -> (Recorder, Collector) {
    let (tx, rx) = mpsc::channel(limits.queue.max(16));
    let shared = Arc::new(Shared {
        state: Mutex::new(State {
            ring: Ring::new(limits.flows, limits.drops),
            followers: Vec::new(),
            losses: Losses::default(),
            hits: Hits::default(),
        }),
        limits,
        slots: (0..SLOTS).map(|_| AtomicU32::new(0)).collect(),
        hasher: RandomState::new(),
        verdicts: Default::default(),
        drops: Default::default(),
        lost: Default::default(),
    });
    let Sinks { edges, access, istio } = sinks;
    let access = AccessLog::new(access);
    let collector = Collector { queue: rx, shared: shared.clone(), edges, access, istio };
    (Recorder { queue: tx, shared }, collector)
}

impl Recorder {
    /// Records what the proxy decided.
    pub fn record(&self, record: FlowRecord) {
        self.take(record, Origin::Proxy);
    }

    /// Records what the kernel decided; its drops are counted exactly elsewhere (`DROPS`).
    pub fn record_from_kernel(&self, record: FlowRecord) {
        self.take(record, Origin::Kernel);
    }

    /// Counts records that were lost before they came here.
    pub fn count_lost(&self, cause: LostCause, n: u64) {
        self.shared.count_lost(cause, n);
    }

    /// The reading side.
    pub fn log(&self) -> FlowLog {
        FlowLog { shared: self.shared.clone() }
    }

    fn take(&self, record: FlowRecord, origin: Origin) {
        let shared = &*self.shared;
        shared.count(&record, origin);
        let dropped = record.verdict == Verdict::Dropped;
        let slot = shared.slot_of(&record);
        let (Some(in_flight), Ok(queue)) =
            (shared.slots.get(slot), u32::try_from(self.queue.max_capacity()))
        else {
            return shared.count_lost(LostCause::Queue, 1);
        };
        let share = if dropped { queue / 4 } else { queue / 8 };
        if in_flight.fetch_add(1, Ordering::Relaxed) >= share {
            in_flight.fetch_sub(1, Ordering::Relaxed);
            return shared.count_lost(LostCause::PodShare, 1);
        }
        let kept_for_drops = self.queue.max_capacity() / 4;
        let full = !dropped && self.queue.capacity() <= kept_for_drops;
        if full || self.queue.try_send(Queued { slot, origin, record }).is_err() {
            in_flight.fetch_sub(1, Ordering::Relaxed);
            shared.count_lost(LostCause::Queue, 1);
        }
    }
}

impl Collector {
    /// Moves a batch into the ring.
    fn keep(&self, batch: &mut Vec<Queued>) {
        let mut state = self.shared.state();
        state.losses.sample(Timestamp::now(), &self.shared.lost);
        for Queued { slot, record, .. } in batch.drain(..) {
            if let Some(in_flight) = self.shared.slots.get(slot) {
                in_flight.fetch_sub(1, Ordering::Relaxed);
            }
            let record = Arc::new(record);
            state.followers.retain(|f| f.offer(&record));
            state.hits.count(&record);
            state.ring.push(record);
        }
    }

    /// Runs until every [`Recorder`] is gone.
    pub async fn run(mut self) {
        let mut batch = Vec::with_capacity(BATCH);
        loop {
            let n = self.queue.recv_many(&mut batch, BATCH).await;
            if n == 0 {
                return;
            }
            let now = Instant::now();
            for Queued { record, origin, .. } in &batch {
                self.edges.record(record);
                self.access.tell(record, *origin == Origin::Kernel, now);
                self.istio.count(record, *origin == Origin::Proxy);
            }
            self.keep(&mut batch);
            if n < BATCH {
                sleep(GATHER).await;
            }
        }
    }
}

impl FlowLog {
    /// Records that match, oldest first.
    pub fn recent(&self, matches: &Matches) -> Vec<Arc<FlowRecord>> {
        let mut records = self.shared.state().ring.snapshot();
        records.retain(|r| matches(r));
        records
    }

    /// The records so far that match, and a follower that gets each later one exactly
    /// once; `None` when there are too many followers.
    pub fn follow(&self, matches: Matches) -> Option<(Vec<Arc<FlowRecord>>, Follower)> {
        let (tx, rx) = mpsc::channel(FOLLOWER_QUEUE);
        let lost = Arc::new(AtomicU64::new(0));
        let mut records = {
            let mut state = self.shared.state();
            state.followers.retain(|f| !f.queue.is_closed());
            if state.followers.len() >= self.shared.limits.followers {
                return None;
            }
            state.followers.push(FollowerEntry {
                matches: matches.clone(),
                queue: tx,
                lost: lost.clone(),
            });
            state.ring.snapshot()
        };
        records.retain(|r| matches(r));
        Some((records, Follower { queue: rx, lost, told: 0 }))
    }

    /// Losses since a time (at most the last hour), by cause.
    pub fn losses_since(&self, since: Timestamp) -> Vec<(LostCause, u64)> {
        let mut state = self.shared.state();
        state.losses.sample(Timestamp::now(), &self.shared.lost);
        state.losses.since(since)
    }

    /// How often each policy decided or audited, among the records that arrived.
    pub fn hits(&self) -> HashMap<PolicyName, u64> {
        self.shared.state().hits.snapshot()
    }

    /// The counts.
    pub fn totals(&self) -> Totals {
        let shared = &*self.shared;
        let load = |a: &AtomicU64| a.load(Ordering::Relaxed);
        let [proxy, kernel] = &shared.verdicts;
        let (held, capacity, seen) = {
            let state = shared.state();
            (state.ring.len() as u64, state.ring.capacity() as u64, state.ring.seen())
        };
        Totals {
            forwarded: load(&proxy.forwarded),
            dropped: load(&proxy.dropped),
            audit: load(&proxy.audit),
            kernel_forwarded: load(&kernel.forwarded),
            kernel_dropped: load(&kernel.dropped),
            kernel_audit: load(&kernel.audit),
            drops_by_reason: Reason::ALL
                .iter()
                .zip(&shared.drops)
                .map(|(reason, n)| (*reason, load(n)))
                .filter(|(_, n)| *n > 0)
                .collect(),
            lost: LostCause::ALL.iter().zip(&shared.lost).map(|(c, n)| (*c, load(n))).collect(),
            held,
            capacity,
            seen,
        }
    }
}

/// What a follower gets.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Followed {
    /// A record.
    Record(Arc<FlowRecord>),
    /// So many matching records were lost because the follower was too slow.
    Lost(u64),
}

/// Receives records as they are made.
#[derive(Debug)]
pub struct Follower {
    queue: mpsc::Receiver<Arc<FlowRecord>>,
    lost: Arc<AtomicU64>,
    told: u64,
}

impl Follower {
    /// The next record or loss; `None` once the collector is gone.
    pub async fn next(&mut self) -> Option<Followed> {
        let lost = self.lost.load(Ordering::Relaxed);
        if lost > self.told {
            let n = lost - self.told;
            self.told = lost;
            return Some(Followed::Lost(n));
        }
        self.queue.recv().await.map(Followed::Record)
    }
}

/// Records that a follower may lag behind.
const FOLLOWER_QUEUE: usize = 4096;
/// Records moved under one lock.
const BATCH: usize = 128;
/// How long records gather while they are few: waking the collector costs a flow more than
/// everything else that is recorded of it. A pod's share of the queue lasts for 100,000 records a
/// second meanwhile.
const GATHER: Duration = Duration::from_millis(5);
/// Counters of records in flight; pods whose names hash alike share one.
const SLOTS: usize = 512;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Origin {
    Proxy,
    Kernel,
}

#[derive(Debug)]
struct Queued {
    slot: usize,
    origin: Origin,
    record: FlowRecord,
}

#[derive(Debug, Default)]
struct Verdicts {
    forwarded: AtomicU64,
    dropped: AtomicU64,
    audit: AtomicU64,
}

struct Shared {
    state: Mutex<State>,
    limits: Limits,
    slots: Box<[AtomicU32]>,
    hasher: RandomState,
    verdicts: [Verdicts; 2],
    drops: [AtomicU64; Reason::ALL.len()],
    lost: [AtomicU64; LostCause::ALL.len()],
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shared").field("limits", &self.limits).finish_non_exhaustive()
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        // A panic while the lock was held leaves at worst one record out.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn slot_of(&self, record: &FlowRecord) -> usize {
        let pod = record.reporting_party().pod.as_ref();
        let hash = self.hasher.hash_one(pod.map(|(ns, name)| (&**ns, &**name)));
        (hash % SLOTS as u64) as usize
    }

    fn count(&self, record: &FlowRecord, origin: Origin) {
        if record.event != FlowEvent::Verdict {
            return;
        }
        let [proxy, kernel] = &self.verdicts;
        let verdicts = match origin {
            Origin::Proxy => proxy,
            Origin::Kernel => kernel,
        };
        let counter = match record.verdict {
            Verdict::Forwarded => &verdicts.forwarded,
            Verdict::Dropped => &verdicts.dropped,
            Verdict::Audit => &verdicts.audit,
        };
        counter.fetch_add(1, Ordering::Relaxed);
        if record.verdict == Verdict::Dropped
            && let Some(n) = self.drops.get(record.reason as usize)
        {
            n.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn count_lost(&self, cause: LostCause, n: u64) {
        if let Some(lost) = self.lost.get(cause as usize) {
            lost.fetch_add(n, Ordering::Relaxed);
        }
    }
}

struct State {
    ring: Ring,
    hits: Hits,
    losses: Losses,
    followers: Vec<FollowerEntry>,
}

/// When losses were noticed, in steps of ten seconds over an hour.
#[derive(Default)]
struct Losses {
    told: [u64; LostCause::ALL.len()],
    steps: VecDeque<(Timestamp, [u64; LostCause::ALL.len()])>,
}

impl Losses {
    const STEP: SignedDuration = SignedDuration::from_secs(10);
    const STEPS: usize = 360;

    fn sample(&mut self, now: Timestamp, lost: &[AtomicU64; LostCause::ALL.len()]) {
        let total = lost.each_ref().map(|n| n.load(Ordering::Relaxed));
        if total == self.told {
            return;
        }
        let is_new = match self.steps.back() {
            Some((begun, _)) => now.duration_since(*begun) >= Self::STEP,
            None => true,
        };
        if is_new {
            if self.steps.len() >= Self::STEPS {
                self.steps.pop_front();
            }
            self.steps.push_back((now, Default::default()));
        }
        if let Some((_, step)) = self.steps.back_mut() {
            for ((sum, total), told) in step.iter_mut().zip(total).zip(self.told) {
                *sum += total.saturating_sub(told);
            }
        }
        self.told = total;
    }

    fn since(&self, since: Timestamp) -> Vec<(LostCause, u64)> {
        let mut sums = [0; LostCause::ALL.len()];
        let begun_before = since - Self::STEP;
        for (_, step) in self.steps.iter().filter(|(begun, _)| *begun >= begun_before) {
            for (sum, n) in sums.iter_mut().zip(step) {
                *sum += n;
            }
        }
        LostCause::ALL.into_iter().zip(sums).filter(|(_, n)| *n > 0).collect()
    }
}

struct FollowerEntry {
    matches: Matches,
    queue: mpsc::Sender<Arc<FlowRecord>>,
    lost: Arc<AtomicU64>,
}

impl FollowerEntry {
    /// False when the follower has gone.
    fn offer(&self, record: &Arc<FlowRecord>) -> bool {
        if (self.matches)(record) {
            match self.queue.try_send(record.clone()) {
                Err(mpsc::error::TrySendError::Closed(_)) => return false,
                Err(mpsc::error::TrySendError::Full(_)) => {
                    self.lost.fetch_add(1, Ordering::Relaxed);
                }
                Ok(()) => {}
            }
        }
        !self.queue.is_closed()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::flow::example::{allowed, as_source, denied, ended, refused};

    const SMALL: Limits = Limits { flows: 100, drops: 100, queue: 64, followers: 2 };

    fn everything() -> Matches {
        Arc::new(|_| true)
    }

    fn lost(totals: &Totals, cause: LostCause) -> u64 {
        totals.lost.iter().find(|(c, _)| *c == cause).map_or(0, |(_, n)| *n)
    }

    #[tokio::test]
    async fn what_is_recorded_is_found() {
        let (recorder, collector) = start(SMALL, Sinks::default());
        let log = recorder.log();
        recorder.record(allowed());
        recorder.record(denied());
        recorder.record_from_kernel(refused());
        recorder.record(ended());
        drop(recorder);
        collector.run().await;
        let found: Vec<_> = log.recent(&everything()).iter().map(|r| (**r).clone()).collect();
        assert_eq!(found, [allowed(), denied(), refused(), ended()]);
        let totals = log.totals();
        // An end is no verdict of its own.
        assert_eq!((totals.forwarded, totals.dropped, totals.kernel_dropped), (1, 1, 1));
        assert_eq!(
            totals.drops_by_reason,
            [(Reason::PolicyNoMatch, 1), (Reason::PlaintextRefused, 1)]
        );
        assert_eq!((totals.held, totals.seen, totals.lost_in_all()), (4, 4, 0));
    }

    /// The collector does not run at all: the worst that a data plane can do to it.
    #[tokio::test]
    async fn a_flood_costs_other_pods_nothing_and_every_loss_is_counted() {
        let (recorder, collector) = start(SMALL, Sinks::default());
        let log = recorder.log();
        for _ in 0..1000 {
            recorder.record(allowed());
            recorder.record(denied());
        }
        // Another pod's only denial, as its own node reports it.
        recorder.record(as_source(&denied()));
        drop(recorder);
        collector.run().await;
        let found = log.recent(&everything());
        let of_intruder = found.iter().filter(|r| r.node.as_ref() == "node-1").count();
        assert_eq!(of_intruder, 1);
        let totals = log.totals();
        assert_eq!(found.len() as u64 + totals.lost_in_all(), 2001);
        assert_eq!(lost(&totals, LostCause::PodShare), totals.lost_in_all());
        assert_eq!((totals.forwarded, totals.dropped), (1000, 1001), "counts are never lossy");
        // Places in the queue are given back.
        assert!(log.shared.slots.iter().all(|n| n.load(Ordering::Relaxed) == 0));
    }

    #[tokio::test]
    async fn the_last_quarter_of_the_queue_is_for_drops() {
        let (recorder, _collector) = start(SMALL, Sinks::default());
        // Sixteen pods, eight records each: more than the queue holds.
        for n in 0..16 {
            let mut record = allowed();
            record.destination.pod = Some(("shop".into(), format!("p-{n}").into()));
            (0..8).for_each(|_| recorder.record(record.clone()));
        }
        let before = lost(&recorder.log().totals(), LostCause::Queue);
        assert!(before > 0, "the queue was never full");
        recorder.record(denied());
        assert_eq!(lost(&recorder.log().totals(), LostCause::Queue), before);
        recorder.record(allowed());
        assert!(recorder.log().totals().lost_in_all() > before, "control: no room for the rest");
    }

    #[tokio::test]
    async fn a_follower_gets_each_later_record_once() {
        let (recorder, collector) = start(SMALL, Sinks::default());
        let log = recorder.log();
        let collecting = tokio::spawn(collector.run());
        recorder.record(allowed());
        while log.totals().seen < 1 {
            tokio::task::yield_now().await;
        }
        let drops: Matches = Arc::new(|r| r.verdict == Verdict::Dropped);
        let (past, mut follower) = log.follow(drops.clone()).unwrap();
        assert!(past.is_empty(), "the allowed flow does not match");
        recorder.record(denied());
        recorder.record(allowed());
        recorder.record(refused());
        assert_eq!(follower.next().await, Some(Followed::Record(Arc::new(denied()))));
        assert_eq!(follower.next().await, Some(Followed::Record(Arc::new(refused()))));
        assert_eq!(log.follow(everything()).unwrap().0.len(), 4, "the past is there");
        // Two at most; the one above is gone again.
        let _second = log.follow(drops.clone()).unwrap();
        assert!(log.follow(drops.clone()).is_none());
        drop(follower);
        assert!(log.follow(drops).is_some());
        drop(recorder);
        collecting.await.unwrap();
    }

    #[tokio::test]
    async fn a_slow_follower_is_told_how_much_it_lost() {
        let (recorder, collector) = start(Limits::default(), Sinks::default());
        let (_, mut follower) = recorder.log().follow(everything()).unwrap();
        let collecting = tokio::spawn(collector.run());
        for n in 0..FOLLOWER_QUEUE as u64 + 500 {
            recorder.record(allowed());
            while recorder.log().totals().seen <= n {
                tokio::task::yield_now().await;
            }
        }
        assert_eq!(follower.next().await, Some(Followed::Lost(500)));
        drop(recorder);
        collecting.await.unwrap();
        let mut rest = 0;
        while let Some(followed) = follower.next().await {
            assert!(matches!(followed, Followed::Record(_)));
            rest += 1;
        }
        assert_eq!(rest, FOLLOWER_QUEUE);
    }

    #[test]
    fn losses_are_remembered_with_their_time() {
        let lost: [AtomicU64; LostCause::ALL.len()] = Default::default();
        let at = |s| Timestamp::from_second(s).unwrap();
        let mut losses = Losses::default();
        losses.sample(at(1000), &lost);
        assert!(losses.since(at(0)).is_empty());
        lost[LostCause::KernelRing as usize].store(5, Ordering::Relaxed);
        losses.sample(at(1001), &lost);
        lost[LostCause::KernelRing as usize].store(12, Ordering::Relaxed);
        losses.sample(at(2000), &lost);
        assert_eq!(losses.since(at(0)), [(LostCause::KernelRing, 12)]);
        assert_eq!(losses.since(at(1500)), [(LostCause::KernelRing, 7)]);
        assert!(losses.since(at(3000)).is_empty());
        for n in 0..10_000 {
            lost[LostCause::Queue as usize].fetch_add(1, Ordering::Relaxed);
            losses.sample(at(3000 + n * 10), &lost);
        }
        assert_eq!(losses.steps.len(), Losses::STEPS);
    }
}
