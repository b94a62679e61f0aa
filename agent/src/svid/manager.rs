//! Holds an SVID for every key that is wanted, and renews it in time.
//!
//! The tunnel's SVIDs have their identity for a key; the Workload API, which gives each pod a
//! key pair of its own, has the pod.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    fmt,
    hash::Hash,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use arc_swap::ArcSwap;
use jiff::Timestamp;
use tokio::{sync::watch, task::JoinSet, time};

use super::{
    Svid,
    issuer::{IssueError, Issuer, SvidRequest},
    metrics::{Purpose, SvidMetrics},
    schedule::{renew_at, retry_after},
};
use crate::spiffe::SpiffeId;

/// The wall clock is looked at again after this at the latest: it may jump, or the machine
/// may have slept.
const LONGEST_SLEEP: Duration = Duration::from_secs(30);

/// Tells the time; the system's, but for tests.
pub type Clock = Arc<dyn Fn() -> Timestamp + Send + Sync>;

/// How the manager works.
#[derive(Clone)]
pub struct SvidParams {
    /// The wall clock.
    pub clock: Clock,
    /// Requests to the issuer at the same time.
    pub concurrency: usize,
    /// A request that takes longer has failed.
    pub timeout: Duration,
    /// The wait after the first failure; doubles with each further one.
    pub first_retry: Duration,
    /// The longest wait after a failure; while an SVID is still valid, a sixth of what it has
    /// left at most.
    pub longest_retry: Duration,
    /// How long an SVID is kept after its identity was last wanted: a pod that is replaced
    /// finds it again. It is not renewed meanwhile.
    pub grace: Duration,
    /// What is counted, and what for.
    pub metrics: (SvidMetrics, Purpose),
}

impl Default for SvidParams {
    fn default() -> Self {
        Self {
            clock: Arc::new(Timestamp::now),
            concurrency: 8,
            timeout: Duration::from_secs(10),
            first_retry: Duration::from_millis(250),
            longest_retry: Duration::from_secs(30),
            grace: Duration::from_secs(60),
            metrics: Default::default(),
        }
    }
}

/// What an SVID is held for: equal keys share one SVID and its private key.
pub trait SvidKey: Ord + Hash + Clone + fmt::Debug + Send + Sync + 'static {}

impl<K: Ord + Hash + Clone + fmt::Debug + Send + Sync + 'static> SvidKey for K {}

/// The state of what is wanted, for `status`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SvidStatus<K = SpiffeId> {
    /// What it is held for.
    pub key: K,
    /// The identity.
    pub id: SpiffeId,
    /// When the SVID held was obtained; `None`: none yet. It is valid from some minutes before.
    pub obtained: Option<Timestamp>,
    /// From and until when the SVID held is valid; `None`: none yet.
    pub validity: Option<(Timestamp, Timestamp)>,
    /// When the next request is due.
    pub next_request: Timestamp,
    /// Failures since the last success.
    pub failures: u32,
    /// The last failure since the last success.
    pub last_error: Option<String>,
}

impl<K> SvidStatus<K> {
    /// The same, whatever it is held for.
    pub fn without_key(self) -> SvidStatus<()> {
        let Self { key: _, id, obtained, validity, next_request, failures, last_error } = self;
        SvidStatus { key: (), id, obtained, validity, next_request, failures, last_error }
    }
}

/// Starts the manager.
pub struct SvidManager;

/// Access to the manager; cheap to clone. When the last handle goes, the manager ends.
#[derive(Clone)]
pub struct SvidHandle<K: SvidKey = SpiffeId> {
    wanted: watch::Sender<BTreeMap<K, SpiffeId>>,
    shared: Arc<Shared<K>>,
}

/// What the manager publishes.
struct Shared<K> {
    svids: ArcSwap<HashMap<K, Arc<Svid>>>,
    /// Grows whenever `svids` changes.
    generation: watch::Sender<u64>,
    statuses: Mutex<Vec<SvidStatus<K>>>,
}

impl SvidManager {
    /// Starts the manager on the current tokio runtime. Nothing is requested until
    /// [`SvidHandle::want`] or [`SvidHandle::want_each`] names identities.
    pub fn start<K: SvidKey>(issuer: Arc<dyn Issuer>, params: SvidParams) -> SvidHandle<K> {
        let (wanted, receiver) = watch::channel(BTreeMap::new());
        let shared = Arc::new(Shared {
            svids: ArcSwap::default(),
            generation: watch::Sender::new(0),
            statuses: Mutex::default(),
        });
        let keeper = Keeper {
            issuer,
            params,
            shared: Arc::clone(&shared),
            entries: BTreeMap::new(),
            requests: JoinSet::new(),
            next_number: 0,
        };
        tokio::spawn(keeper.run(receiver));
        SvidHandle { wanted, shared }
    }
}

impl SvidHandle {
    /// Says which identities this node needs, one SVID for each: [`SvidHandle::want_each`].
    pub fn want(&self, ids: BTreeSet<SpiffeId>) {
        self.want_each(ids.into_iter().map(|id| (id.clone(), id)).collect());
    }
}

impl<K: SvidKey> SvidHandle<K> {
    /// Says for what SVIDs are needed, and which. What is new is requested at once; what has
    /// another identity is forgotten with its private key, what is not named any more after
    /// [`SvidParams::grace`].
    pub fn want_each(&self, each: BTreeMap<K, SpiffeId>) {
        self.wanted.send_if_modified(|wanted| {
            let changed = *wanted != each;
            *wanted = each;
            changed
        });
    }

    /// The SVID held for `key`, if there is one. It may have run out when the authority has been
    /// away for long: the tunnel refuses to use it then, with `svid_expired`.
    pub fn get(&self, key: &K) -> Option<Arc<Svid>> {
        self.shared.svids.load().get(key).cloned()
    }

    /// Grows with every SVID obtained, renewed or forgotten.
    pub fn subscribe(&self) -> watch::Receiver<u64> {
        self.shared.generation.subscribe()
    }

    /// The state of everything that is wanted, in the keys' order.
    pub fn status(&self) -> Vec<SvidStatus<K>> {
        self.shared.statuses.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Waits until the manager's task has ended, which it does only by a bug while a handle
    /// is alive: for the daemon to end with a reason.
    pub async fn ended(&self) {
        self.wanted.closed().await;
    }
}

impl<K: SvidKey> fmt::Debug for SvidHandle<K> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SvidHandle").field("wanted", &*self.wanted.borrow()).finish_non_exhaustive()
    }
}

/// The manager's task.
struct Keeper<K> {
    issuer: Arc<dyn Issuer>,
    params: SvidParams,
    shared: Arc<Shared<K>>,
    entries: BTreeMap<K, Entry>,
    requests: JoinSet<Outcome<K>>,
    next_number: u64,
}

/// Something wanted.
struct Entry {
    /// Tells this entry from an earlier one of the same key.
    number: u64,
    id: SpiffeId,
    svid: Option<Arc<Svid>>,
    obtained: Option<Timestamp>,
    next_request: Timestamp,
    in_flight: bool,
    failures: u32,
    last_error: Option<String>,
    /// Since when nobody has wanted it.
    unwanted_since: Option<Timestamp>,
}

impl Entry {
    /// True when a request may be made for it.
    fn is_idle(&self) -> bool {
        !self.in_flight && self.unwanted_since.is_none()
    }
}

/// How a request ended.
struct Outcome<K> {
    key: K,
    number: u64,
    result: Result<Svid, IssueError>,
}

impl<K: SvidKey> Keeper<K> {
    async fn run(mut self, mut wanted: watch::Receiver<BTreeMap<K, SpiffeId>>) {
        loop {
            let each = wanted.borrow_and_update().clone();
            self.adopt(&each);
            self.request_due();
            self.publish();
            let sleep = self.until_next();
            tokio::select! {
                changed = wanted.changed() => {
                    if changed.is_err() {
                        return; // no handle is left; the requests in flight end with the set
                    }
                }
                Some(joined) = self.requests.join_next() => match joined {
                    Ok(outcome) => self.settle(outcome),
                    // A panic inside the issuer: every entry that waits for an answer that
                    // cannot come any more is asked for again.
                    Err(e) => self.lost(&e),
                },
                () = time::sleep(sleep) => {}
            }
        }
    }

    /// Makes the entries those of `each`.
    fn adopt(&mut self, each: &BTreeMap<K, SpiffeId>) {
        let now = (self.params.clock)();
        let grace = self.params.grace;
        self.entries.retain(|key, entry| match each.get(key) {
            Some(id) => {
                entry.unwanted_since = None;
                *id == entry.id
            }
            None => {
                let since = *entry.unwanted_since.get_or_insert(now);
                // Without an SVID there is nothing to keep; a clock that went back keeps nothing.
                let within = since <= now && now.duration_since(since).unsigned_abs() < grace;
                entry.svid.is_some() && within
            }
        });
        for (key, id) in each {
            if !self.entries.contains_key(key) {
                self.next_number += 1;
                let entry = Entry {
                    number: self.next_number,
                    id: id.clone(),
                    svid: None,
                    obtained: None,
                    next_request: now,
                    in_flight: false,
                    failures: 0,
                    last_error: None,
                    unwanted_since: None,
                };
                self.entries.insert(key.clone(), entry);
            }
        }
    }

    /// Starts the requests that are due, those first that have no SVID or the least life left.
    fn request_due(&mut self) {
        let now = (self.params.clock)();
        let mut due: Vec<_> = self
            .entries
            .iter_mut()
            .filter(|(_, entry)| entry.is_idle() && entry.next_request <= now)
            .collect();
        due.sort_by_key(|(_, entry)| entry.svid.as_ref().map(|svid| svid.not_after));
        let room = self.params.concurrency.max(1).saturating_sub(self.requests.len());
        for (key, entry) in due.into_iter().take(room) {
            entry.in_flight = true;
            let (issuer, params) = (Arc::clone(&self.issuer), self.params.clone());
            let (key, number, id) = (key.clone(), entry.number, entry.id.clone());
            let renewal = entry.svid.is_some();
            self.requests.spawn(async move {
                let begun = Instant::now();
                let result = obtain(&*issuer, &params, id).await;
                let (metrics, purpose) = &params.metrics;
                metrics.answered(*purpose, renewal, &result, begun.elapsed());
                Outcome { key, number, result }
            });
        }
    }

    /// Takes a request's outcome.
    fn settle(&mut self, Outcome { key, number, result }: Outcome<K>) {
        // Not wanted any more, or wanted anew in between: the key pair goes with the answer.
        let Some(entry) = self.entries.get_mut(&key).filter(|entry| entry.number == number) else {
            return;
        };
        let id = &entry.id;
        let now = (self.params.clock)();
        entry.in_flight = false;
        match result {
            Ok(svid) => {
                tracing::info!(%id, not_after = %svid.not_after, "SVID obtained");
                let jitter = rand::random_range(-1.0..=1.0);
                entry.next_request = renew_at(now, svid.not_after, jitter);
                entry.svid = Some(Arc::new(svid));
                entry.obtained = Some(now);
                entry.failures = 0;
                entry.last_error = None;
            }
            Err(error) => {
                entry.failures = entry.failures.saturating_add(1);
                // What is still valid is not let run out by patience: several more tries fit
                // into the life that is left.
                let left = entry.svid.as_ref().map(|svid| svid.not_after.duration_since(now));
                let left = left.and_then(|left| Duration::try_from(left).ok());
                let longest = left.map_or(self.params.longest_retry, |left| {
                    (left / 6).max(self.params.first_retry).min(self.params.longest_retry)
                });
                let jitter = rand::random_range(0.0..=1.0);
                let wait = retry_after(entry.failures, self.params.first_retry, longest, jitter);
                entry.next_request = now.saturating_add(wait).unwrap_or(now);
                tracing::warn!(%id, failures = entry.failures, %error, "no SVID; trying again");
                entry.last_error = Some(error.to_string());
            }
        }
    }

    /// A request's task panicked.
    fn lost(&mut self, error: &tokio::task::JoinError) {
        let now = (self.params.clock)();
        let error = IssueError::Internal(error.to_string()).to_string();
        tracing::error!(%error, "a request for an SVID panicked");
        // Which one is not known: the others that are in flight answer to a number that is gone.
        for entry in self.entries.values_mut().filter(|entry| entry.in_flight) {
            self.next_number += 1;
            entry.number = self.next_number;
            entry.in_flight = false;
            entry.failures = entry.failures.saturating_add(1);
            entry.next_request = now.saturating_add(self.params.longest_retry).unwrap_or(now);
            entry.last_error = Some(error.clone());
        }
    }

    /// How long nothing is due by time alone.
    fn until_next(&self) -> Duration {
        if self.requests.len() >= self.params.concurrency.max(1) {
            return LONGEST_SLEEP; // an answer comes first
        }
        let now = (self.params.clock)();
        let due = self.entries.values().filter_map(|entry| match entry.unwanted_since {
            Some(since) => Some(since.saturating_add(self.params.grace).unwrap_or(since)),
            None => (!entry.in_flight).then_some(entry.next_request),
        });
        let next = due.min();
        let wait = next.map_or(LONGEST_SLEEP, |at| at.duration_since(now).unsigned_abs());
        match next {
            Some(at) if at <= now => Duration::ZERO,
            // Not before it is due: a sleep that ends a moment early would spin.
            _ => wait.min(LONGEST_SLEEP) + Duration::from_millis(1),
        }
    }

    /// Publishes SVIDs (when they changed) and statuses.
    fn publish(&self) {
        let statuses = self.entries.iter().map(|(key, entry)| SvidStatus {
            key: key.clone(),
            id: entry.id.clone(),
            obtained: entry.obtained,
            validity: entry.svid.as_ref().map(|svid| (svid.not_before, svid.not_after)),
            next_request: entry.next_request,
            failures: entry.failures,
            last_error: entry.last_error.clone(),
        });
        let statuses = statuses.collect();
        *self.shared.statuses.lock().unwrap_or_else(PoisonError::into_inner) = statuses;

        let held = self.entries.iter().filter_map(|(key, entry)| Some((key, entry.svid.as_ref()?)));
        let old = self.shared.svids.load();
        let same = old.len() == held.clone().count()
            && held.clone().all(|(key, svid)| old.get(key).is_some_and(|o| Arc::ptr_eq(o, svid)));
        if !same {
            let new = held.map(|(key, svid)| (key.clone(), Arc::clone(svid))).collect();
            self.shared.svids.store(Arc::new(new));
            self.shared.generation.send_modify(|generation| *generation += 1);
        }
    }
}

/// One request: a fresh key, the issuer's answer within its time, held against the request.
async fn obtain(
    issuer: &dyn Issuer,
    params: &SvidParams,
    id: SpiffeId,
) -> Result<Svid, IssueError> {
    let request = SvidRequest::new(id)?;
    let chain = time::timeout(params.timeout, issuer.issue(&request))
        .await
        .map_err(|_| IssueError::Timeout(params.timeout))??;
    let svid = request.finish(chain)?;
    if svid.is_valid_at((params.clock)()) {
        Ok(svid)
    } else {
        Err(IssueError::NotValidNow(svid.id))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicI64, AtomicUsize, Ordering::SeqCst};

    use jiff::SignedDuration;

    use super::*;
    use crate::{ca::Root, spiffe::TrustDomain, svid::issuer::IssueFuture};

    /// Signs with a root, and misbehaves as told.
    struct TestIssuer {
        root: Root,
        ttl: Duration,
        delay: Duration,
        /// So many requests fail first.
        failures: AtomicUsize,
        /// So many requests panic first.
        panics: AtomicUsize,
        /// Answers for this identity, whatever is asked for.
        answers: Option<SpiffeId>,
        requests: AtomicUsize,
        running: AtomicUsize,
        most_running: AtomicUsize,
    }

    impl TestIssuer {
        fn new() -> Self {
            Self {
                root: Root::create(&td(), Timestamp::now()).unwrap(),
                ttl: Duration::from_secs(3600),
                delay: Duration::ZERO,
                failures: AtomicUsize::new(0),
                panics: AtomicUsize::new(0),
                answers: None,
                requests: AtomicUsize::new(0),
                running: AtomicUsize::new(0),
                most_running: AtomicUsize::new(0),
            }
        }

        fn requests(&self) -> usize {
            self.requests.load(SeqCst)
        }
    }

    fn take_one(n: &AtomicUsize) -> bool {
        n.fetch_update(SeqCst, SeqCst, |n| n.checked_sub(1)).is_ok()
    }

    impl Issuer for TestIssuer {
        fn issue<'a>(&'a self, request: &'a SvidRequest) -> IssueFuture<'a> {
            Box::pin(async move {
                self.requests.fetch_add(1, SeqCst);
                let running = self.running.fetch_add(1, SeqCst) + 1;
                self.most_running.fetch_max(running, SeqCst);
                time::sleep(self.delay).await;
                self.running.fetch_sub(1, SeqCst);
                assert!(!take_one(&self.panics), "told to panic");
                if take_one(&self.failures) {
                    return Err(IssueError::Internal("told to fail".into()));
                }
                let id = self.answers.as_ref().unwrap_or(request.id());
                let key = request.public_key();
                Ok(vec![self.root.sign_leaf(id, &key, Timestamp::now(), self.ttl)?])
            })
        }
    }

    fn td() -> TrustDomain {
        TrustDomain::parse("td").unwrap()
    }

    fn id(account: &str) -> SpiffeId {
        SpiffeId::for_service_account(&td(), "shop", account).unwrap()
    }

    fn ids(accounts: impl IntoIterator<Item = impl AsRef<str>>) -> BTreeSet<SpiffeId> {
        accounts.into_iter().map(|a| id(a.as_ref())).collect()
    }

    fn quick() -> SvidParams {
        SvidParams {
            first_retry: Duration::from_millis(10),
            longest_retry: Duration::from_millis(40),
            grace: Duration::ZERO,
            ..SvidParams::default()
        }
    }

    fn start(issuer: TestIssuer, params: SvidParams) -> (Arc<TestIssuer>, SvidHandle) {
        let issuer = Arc::new(issuer);
        (Arc::clone(&issuer), SvidManager::start(issuer, params))
    }

    async fn until(handle: &SvidHandle, what: &str, holds: impl Fn(&SvidHandle) -> bool) {
        let deadline = time::Instant::now() + Duration::from_secs(60);
        while !holds(handle) {
            assert!(time::Instant::now() < deadline, "{what}: {:?}", handle.status());
            time::sleep(Duration::from_millis(5)).await;
        }
    }

    #[tokio::test]
    async fn wanted_identities_are_obtained_and_unwanted_forgotten() {
        let (issuer, handle) = start(TestIssuer::new(), quick());
        let mut changes = handle.subscribe();
        assert_eq!((handle.get(&id("a")).is_none(), issuer.requests()), (true, 0));
        handle.want(ids(["a", "b"]));
        until(&handle, "both", |h| h.get(&id("a")).is_some() && h.get(&id("b")).is_some()).await;
        assert!(changes.has_changed().unwrap());
        changes.mark_unchanged();
        let a = handle.get(&id("a")).unwrap();
        assert_eq!(a.id, id("a"));
        assert_ne!(a.private_key(), handle.get(&id("b")).unwrap().private_key());
        let status = handle.status();
        assert_eq!(status.len(), 2);
        assert_eq!(
            (&status[0].id, status[0].failures, &status[0].last_error),
            (&id("a"), 0, &None)
        );
        let left = status[0].next_request.duration_since(Timestamp::now()).as_secs();
        assert!((1400..=2200).contains(&left), "renewed at about half of an hour, not {left} s");

        handle.want(ids(["b", "c"]));
        until(&handle, "c for a", |h| h.get(&id("c")).is_some() && h.get(&id("a")).is_none()).await;
        assert!(changes.has_changed().unwrap());
        assert_eq!(issuer.requests(), 3, "b is kept");
        handle.want(BTreeSet::new());
        until(&handle, "nothing", |h| h.status().is_empty() && h.get(&id("b")).is_none()).await;
    }

    #[tokio::test]
    async fn each_key_has_a_key_pair_of_its_own_and_loses_it_with_its_identity() {
        let handle = SvidManager::start(Arc::new(TestIssuer::new()), quick());
        let want = |each: [(&'static str, &str); 2]| {
            handle.want_each(each.into_iter().map(|(pod, account)| (pod, id(account))).collect());
        };
        let until_held = async |pod: &'static str, account: &str| {
            let deadline = time::Instant::now() + Duration::from_secs(60);
            loop {
                if let Some(svid) = handle.get(&pod).filter(|svid| svid.id == id(account)) {
                    return svid;
                }
                assert!(time::Instant::now() < deadline, "{pod}: {:?}", handle.status());
                time::sleep(Duration::from_millis(5)).await;
            }
        };
        want([("pod-1", "a"), ("pod-2", "a")]);
        let (one, two) = (until_held("pod-1", "a").await, until_held("pod-2", "a").await);
        assert_eq!(one.id, two.id);
        assert_ne!(one.private_key(), two.private_key());
        let keys: Vec<_> = handle.status().iter().map(|s| (s.key, s.id.clone())).collect();
        assert_eq!(keys, [("pod-1", id("a")), ("pod-2", id("a"))]);

        want([("pod-1", "b"), ("pod-2", "a")]);
        assert_ne!(until_held("pod-1", "b").await.private_key(), one.private_key());
        assert!(Arc::ptr_eq(&until_held("pod-2", "a").await, &two), "not touched");
    }

    #[tokio::test]
    async fn an_identity_that_comes_back_in_time_finds_its_svid() {
        let grace = Duration::from_secs(2);
        let (issuer, handle) = start(TestIssuer::new(), SvidParams { grace, ..quick() });
        handle.want(ids(["a"]));
        until(&handle, "first", |h| h.get(&id("a")).is_some()).await;
        let first = handle.get(&id("a")).unwrap();
        handle.want(BTreeSet::new());
        time::sleep(grace / 4).await;
        handle.want(ids(["a", "b"]));
        until(&handle, "b", |h| h.get(&id("b")).is_some()).await;
        assert!(Arc::ptr_eq(&handle.get(&id("a")).unwrap(), &first));
        assert_eq!(issuer.requests(), 2, "a is not requested again");
        handle.want(ids(["b"]));
        until(&handle, "a goes", |h| h.get(&id("a")).is_none()).await;
        assert_eq!(handle.status().len(), 1);
    }

    #[tokio::test]
    async fn failures_are_shown_and_tried_again() {
        let issuer = TestIssuer { failures: AtomicUsize::new(4), ..TestIssuer::new() };
        let (issuer, handle) = start(issuer, quick());
        handle.want(ids(["a"]));
        until(&handle, "failures", |h| h.status().first().is_some_and(|s| s.failures >= 2)).await;
        let status = handle.status().remove(0);
        assert!(status.last_error.is_some_and(|e| e.contains("told to fail")));
        assert_eq!(status.validity, None);
        until(&handle, "success", |h| h.get(&id("a")).is_some()).await;
        until(&handle, "the error goes", |h| h.status()[0].last_error.is_none()).await;
        assert_eq!(issuer.requests(), 5);
    }

    #[tokio::test]
    async fn a_wrong_answer_is_no_svid() {
        let issuer = TestIssuer { answers: Some(id("admin")), ..TestIssuer::new() };
        let (_, handle) = start(issuer, quick());
        handle.want(ids(["a"]));
        until(&handle, "refusal", |h| h.status().first().is_some_and(|s| s.failures > 0)).await;
        assert!(handle.status()[0].last_error.as_ref().unwrap().contains("admin"));
        assert!(handle.get(&id("a")).is_none() && handle.get(&id("admin")).is_none());
    }

    #[tokio::test]
    async fn a_slow_issuer_is_a_failure_and_a_panic_is_survived() {
        let slow = TestIssuer { delay: Duration::from_secs(60), ..TestIssuer::new() };
        let (_, handle) =
            start(slow, SvidParams { timeout: Duration::from_millis(200), ..quick() });
        handle.want(ids(["a"]));
        until(&handle, "timeout", |h| h.status().first().is_some_and(|s| s.failures > 0)).await;
        assert!(handle.status()[0].last_error.as_ref().unwrap().contains("within 200ms"));

        let broken = TestIssuer { panics: AtomicUsize::new(1), ..TestIssuer::new() };
        let (_, handle) = start(broken, quick());
        handle.want(ids(["a", "b", "c"]));
        until(&handle, "all", |h| ["a", "b", "c"].iter().all(|a| h.get(&id(a)).is_some())).await;
    }

    #[tokio::test]
    async fn requests_at_once_have_a_limit() {
        let issuer = TestIssuer { delay: Duration::from_millis(10), ..TestIssuer::new() };
        let (issuer, handle) = start(issuer, SvidParams { concurrency: 3, ..quick() });
        let all = ids((0..30).map(|i| format!("a{i}")));
        handle.want(all.clone());
        until(&handle, "all", |h| all.iter().all(|id| h.get(id).is_some())).await;
        assert_eq!((issuer.most_running.load(SeqCst), issuer.requests()), (3, 30));
    }

    #[tokio::test]
    async fn renewed_before_the_end_with_a_new_key() {
        let issuer = TestIssuer { ttl: Duration::from_secs(8), ..TestIssuer::new() };
        let (_, handle) = start(issuer, quick());
        handle.want(ids(["a"]));
        until(&handle, "first", |h| h.get(&id("a")).is_some()).await;
        let first = handle.get(&id("a")).unwrap();
        until(&handle, "second", |h| h.get(&id("a")).is_some_and(|s| !Arc::ptr_eq(&s, &first)))
            .await;
        assert!(first.is_valid_at(Timestamp::now()), "renewed while the old one is valid");
        let second = handle.get(&id("a")).unwrap();
        assert!(second.not_after > first.not_after);
        assert_ne!(second.private_key(), first.private_key());
    }

    #[tokio::test]
    async fn a_failed_renewal_keeps_the_old_svid_and_a_clock_that_jumps_is_followed() {
        let ahead = Arc::new(AtomicI64::new(0));
        let clock = {
            let ahead = Arc::clone(&ahead);
            let now = move || Timestamp::now() + SignedDuration::from_secs(ahead.load(SeqCst));
            Arc::new(now) as Clock
        };
        let (issuer, handle) = start(TestIssuer::new(), SvidParams { clock, ..quick() });
        handle.want(ids(["a"]));
        until(&handle, "first", |h| h.get(&id("a")).is_some()).await;
        let first = handle.get(&id("a")).unwrap();

        issuer.failures.store(usize::MAX, SeqCst);
        ahead.store(2400, SeqCst);
        handle.want(ids(["a", "b"])); // any change wakes it; the time alone does within 30 s
        until(&handle, "failure", |h| h.status().first().is_some_and(|s| s.failures >= 2)).await;
        assert!(Arc::ptr_eq(&handle.get(&id("a")).unwrap(), &first));
        issuer.failures.store(0, SeqCst);
        until(&handle, "second", |h| h.get(&id("a")).is_some_and(|s| !Arc::ptr_eq(&s, &first)))
            .await;
    }

    #[tokio::test]
    async fn what_is_valid_is_tried_again_before_it_ends() {
        let issuer = TestIssuer { ttl: Duration::from_secs(12), ..TestIssuer::new() };
        // Half a minute after a failure would be far too late.
        let wait = Duration::from_secs(30);
        let params = SvidParams { longest_retry: wait, first_retry: wait / 100, ..quick() };
        let (issuer, handle) = start(issuer, params);
        handle.want(ids(["a"]));
        until(&handle, "first", |h| h.get(&id("a")).is_some()).await;
        let first = handle.get(&id("a")).unwrap();
        issuer.failures.store(5, SeqCst);
        until(&handle, "second", |h| h.get(&id("a")).is_some_and(|s| !Arc::ptr_eq(&s, &first)))
            .await;
        assert!(first.is_valid_at(Timestamp::now()), "the old one was still valid");
        assert_eq!(issuer.requests(), 7);
    }

    #[tokio::test]
    async fn two_minutes_of_skew_work_and_ten_are_told() {
        for (minutes, works) in [(-2, true), (2, true), (-10, false)] {
            let skew = SignedDuration::from_mins(minutes);
            let clock = Arc::new(move || Timestamp::now() + skew) as Clock;
            let (_, handle) = start(TestIssuer::new(), SvidParams { clock, ..quick() });
            handle.want(ids(["a"]));
            if works {
                until(&handle, "an SVID", |h| h.get(&id("a")).is_some()).await;
                continue;
            }
            until(&handle, "failure", |h| h.status().first().is_some_and(|s| s.failures > 0)).await;
            let error = handle.status()[0].last_error.clone().unwrap();
            assert!(error.contains("compare this node's clock"), "{error}");
            assert!(handle.get(&id("a")).is_none());
        }
    }

    #[tokio::test]
    async fn ends_with_its_last_handle() {
        let (issuer, handle) = start(TestIssuer::new(), quick());
        let other = handle.clone();
        drop(handle);
        other.want(ids(["a"]));
        until(&other, "still there", |h| h.get(&id("a")).is_some()).await;
        drop(other);
        let deadline = time::Instant::now() + Duration::from_secs(60);
        while Arc::strong_count(&issuer) > 1 {
            assert!(time::Instant::now() < deadline, "the task has not ended");
            time::sleep(Duration::from_millis(5)).await;
        }
    }
}
