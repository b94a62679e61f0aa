//! Tunnel connections by key, of one core.
//!
//! HBONE connections are shared: one dial at a time a key, and the others wait for its result.
//! Native ones carry one flow at a time: whoever finds none that is free waits for the next
//! that is dialled or given back, and while flows wait a few dials run at once. A connection
//! takes no new flow once its [`Stamp`] is no longer the current one, its deadline has passed,
//! or it is full; it ends when its last flow has. Idle connections are dropped by
//! [`Pool::sweep`], and when there are too many; an endpoint's by [`Pool::retain`].

use std::{
    collections::{HashMap, VecDeque},
    future::Future,
    hash::Hash,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use tokio::sync::oneshot;
use tokio_util::task::TaskTracker;

use super::{
    hbone::client::{Client, Permit},
    native::client::Connection,
    tls::{PeerSvid, TlsStream},
};

/// A shared connection that has carried nothing for so long is closed.
pub const IDLE: Duration = Duration::from_secs(300);
/// A native connection that has carried nothing for so long is closed: more are kept of them.
pub const IDLE_NATIVE: Duration = Duration::from_secs(60);
/// A connection takes no new flow when it is older than this.
pub const OLDEST: Duration = Duration::from_secs(1800);
/// Native connections of one key that are kept while they carry nothing.
const KEPT_PER_KEY: usize = 64;
/// Native connections of all keys that are kept while they carry nothing.
const KEPT: usize = 1024;
/// Dials of one key at once, where each flow needs a connection of its own.
const DIALS: usize = 8;

/// What a connection was authenticated with. A flow uses only connections whose stamp is
/// the one that a dial of its own would get.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Stamp {
    /// Generation of the trust bundles.
    pub trust: u64,
    /// When our own SVID begins to be valid, seconds after the epoch: a renewed one differs.
    pub svid_from: i64,
    /// When it ends.
    pub svid_until: i64,
}

/// What a dial gives.
pub struct Dialled {
    /// The connection.
    pub carrier: Carrier,
    /// What it was authenticated with.
    pub stamp: Stamp,
    /// The earlier end of both certificates.
    pub deadline: Instant,
    /// Who the peer proved to be.
    pub peer: Arc<PeerSvid>,
}

/// A connection as it was dialled.
pub enum Carrier {
    /// Flows share it.
    Shared(Client),
    /// It carries one flow at a time.
    Own(Box<Connection<TlsStream>>),
}

/// A place for one flow on a pooled connection.
pub struct Lease {
    /// The place.
    pub place: Place,
    /// What it was authenticated with.
    pub stamp: Stamp,
    /// Until when it takes new flows.
    pub deadline: Instant,
    /// Who the peer proved to be.
    pub peer: Arc<PeerSvid>,
    /// True when it was not dialled for this flow: its death says nothing about the peer.
    pub reused: bool,
}

/// What a flow has of a connection.
pub enum Place {
    /// A stream; the permit is held while the flow lives.
    Stream(Client, Permit),
    /// All of it; [`Pool::give_back`] takes it when the flow has ended in order.
    Whole(Box<Connection<TlsStream>>),
}

/// What is given back: a native connection and what is known of it.
pub struct Free {
    /// The connection.
    pub connection: Box<Connection<TlsStream>>,
    /// What it was authenticated with.
    pub stamp: Stamp,
    /// Until when it takes new flows.
    pub deadline: Instant,
    /// Who the peer proved to be.
    pub peer: Arc<PeerSvid>,
}

/// The pool. Cheap to clone.
pub struct Pool<K, E> {
    slots: Arc<Mutex<HashMap<K, Slot<E>>>>,
    tracker: TaskTracker,
}

impl<K, E> Clone for Pool<K, E> {
    fn clone(&self) -> Self {
        Self { slots: self.slots.clone(), tracker: self.tracker.clone() }
    }
}

/// What a waiting flow is told.
enum Told<E> {
    Lease(Box<Lease>),
    /// A place may be had, or a dial begun.
    LookAgain,
    Failed(Arc<E>),
}

struct Slot<E> {
    /// Flows share these.
    shared: Vec<Shared>,
    /// Each for one flow, the one that was used last at the end.
    free: Vec<Free>,
    /// Flows that wait, in the order they came.
    waiting: VecDeque<oneshot::Sender<Told<E>>>,
    /// Dials under way.
    dials: usize,
    /// The peer spoke the native wire when it was last dialled.
    native: bool,
}

struct Shared {
    client: Client,
    stamp: Stamp,
    deadline: Instant,
    peer: Arc<PeerSvid>,
}

impl<E> Default for Slot<E> {
    fn default() -> Self {
        Self {
            shared: Vec::new(),
            free: Vec::new(),
            waiting: VecDeque::new(),
            dials: 0,
            native: false,
        }
    }
}

impl<E> Slot<E> {
    fn is_empty(&self) -> bool {
        self.shared.is_empty() && self.free.is_empty() && self.dials == 0 && self.waiting.is_empty()
    }

    /// Drops what takes no new flows (flows on it keep it alive) and reserves a place on
    /// what was used last, or the least loaded of what is shared.
    fn reserve(&mut self, stamp: Stamp, now: Instant, reused: bool) -> Option<Lease> {
        while let Some(mut free) = self.free.pop() {
            if free.is_usable(stamp, now) && free.connection.is_quiet() {
                return Some(free.lease(reused));
            }
        }
        self.shared.retain(|c| c.is_usable(stamp, now));
        self.shared.sort_by_key(|c| c.client.streams());
        self.shared.iter().find_map(|c| {
            let place = Place::Stream(c.client.clone(), c.client.reserve()?);
            let Shared { stamp, deadline, peer, .. } = c;
            Some(Lease { place, stamp: *stamp, deadline: *deadline, peer: peer.clone(), reused })
        })
    }

    /// Gives a free connection to the flow that has waited longest, or keeps it.
    fn hand_over(&mut self, free: Free, reused: bool) {
        let mut lease = Box::new(free.lease(reused));
        while let Some(waiting) = self.waiting.pop_front() {
            match waiting.send(Told::Lease(lease)) {
                Ok(()) => return,
                // Its flow has been given up.
                Err(Told::Lease(back)) => lease = back,
                Err(_) => return,
            }
        }
        let Lease { place: Place::Whole(connection), stamp, deadline, peer, .. } = *lease else {
            return;
        };
        if self.free.len() >= KEPT_PER_KEY {
            self.free.remove(0);
        }
        self.free.push(Free { connection, stamp, deadline, peer });
    }

    /// Tells flows that wait to look for a place again: all of them where what was dialled is
    /// shared, else as many as may dial.
    fn stir(&mut self) {
        let most = if self.native { DIALS.saturating_sub(self.dials) } else { usize::MAX };
        for _ in 0..most.min(self.waiting.len().saturating_sub(self.dials)) {
            if let Some(waiting) = self.waiting.pop_front() {
                // A flow that was given up needs nothing.
                let _ = waiting.send(Told::LookAgain);
            }
        }
    }
}

impl Free {
    fn is_usable(&self, stamp: Stamp, now: Instant) -> bool {
        self.stamp == stamp
            && now < self.deadline
            && now.saturating_duration_since(self.connection.created()) < OLDEST
    }

    fn lease(self, reused: bool) -> Lease {
        let Self { connection, stamp, deadline, peer } = self;
        Lease { place: Place::Whole(connection), stamp, deadline, peer, reused }
    }
}

impl Shared {
    fn is_usable(&self, stamp: Stamp, now: Instant) -> bool {
        self.stamp == stamp
            && now < self.deadline
            && now.saturating_duration_since(self.client.created()) < OLDEST
            && !self.client.is_retired()
    }
}

impl<K, E> Pool<K, E>
where
    K: Clone + Eq + Hash + Send + 'static,
    E: Send + Sync + 'static,
{
    /// An empty pool; dials run on `tracker`.
    pub fn new(tracker: TaskTracker) -> Self {
        Self { slots: Arc::default(), tracker }
    }

    /// A flow's place on a connection of `key`, dialled when there is none. A dial runs
    /// to its end even when this future is dropped: others may wait for it. `stamp` says
    /// what a dial begun now would be authenticated with.
    ///
    /// # Errors
    /// What a dial failed with, for everybody who waited by then.
    pub async fn lease<F>(
        &self,
        key: &K,
        stamp: impl Fn() -> Stamp,
        dial: impl Fn() -> F,
    ) -> Result<Lease, Arc<E>>
    where
        F: Future<Output = Result<Dialled, E>> + Send + 'static,
    {
        let mut reused = true;
        loop {
            let told = {
                let mut slots = self.lock();
                let slot = slots.entry(key.clone()).or_default();
                if let Some(lease) = slot.reserve(stamp(), Instant::now(), reused) {
                    return Ok(lease);
                }
                let (tell, told) = oneshot::channel();
                slot.waiting.push_back(tell);
                if slot.dials < if slot.native { DIALS } else { 1 } {
                    slot.dials += 1;
                    let dialling = Dialling { pool: self.clone(), key: key.clone(), done: false };
                    self.tracker.spawn(dialling.run(dial()));
                }
                told
            };
            reused = false;
            match told.await {
                Ok(Told::Lease(lease)) => {
                    // It may have become stale while it was dialled or used.
                    if lease.stamp == stamp() && Instant::now() < lease.deadline {
                        return Ok(*lease);
                    }
                }
                Ok(Told::Failed(error)) => return Err(error),
                // An error means that the slot is gone, with the endpoint: look again.
                Ok(Told::LookAgain) | Err(_) => {}
            }
        }
    }

    /// Takes a native connection back whose flow has ended in order.
    pub fn give_back(&self, key: &K, free: Free) {
        let mut slots = self.lock();
        slots.entry(key.clone()).or_default().hand_over(free, true);
        let held: usize = slots.values().map(|slot| slot.free.len()).sum();
        if held > KEPT {
            // The one that has been idle for longest, of all keys.
            let oldest = slots
                .iter()
                .filter_map(|(key, slot)| Some((slot.free.first()?.connection.idle(), key.clone())))
                .max_by_key(|(idle, _)| *idle);
            if let Some((_, key)) = oldest
                && let Some(slot) = slots.get_mut(&key)
            {
                slot.free.remove(0);
            }
        }
    }

    /// Drops connections that have been idle for [`IDLE`] (native ones: [`IDLE_NATIVE`]), that
    /// their peers have closed or that take no new flows. `stamp` is asked by key; `None`:
    /// nothing of this key is usable any more.
    pub fn sweep(&self, stamp: impl Fn(&K) -> Option<Stamp>) {
        let now = Instant::now();
        self.lock().retain(|key, slot| {
            let current = stamp(key);
            slot.shared.retain(|c| {
                c.client.idle() < IDLE && current.is_some_and(|stamp| c.is_usable(stamp, now))
            });
            slot.free.retain_mut(|c| {
                c.connection.idle() < IDLE_NATIVE
                    && current.is_some_and(|stamp| c.is_usable(stamp, now))
                    && c.connection.is_quiet()
            });
            !slot.is_empty()
        });
    }

    /// Keeps only the keys that `keep` approves; flows in progress are not touched.
    pub fn retain(&self, keep: impl Fn(&K) -> bool) {
        self.lock().retain(|key, _| keep(key));
    }

    /// Connections that may take new flows.
    pub fn connections(&self) -> usize {
        self.lock().values().map(|slot| slot.shared.len() + slot.free.len()).sum()
    }
}

/// A dial under way; counted until it ends, also when its task is aborted.
struct Dialling<K: Eq + Hash, E> {
    pool: Pool<K, E>,
    key: K,
    done: bool,
}

impl<K: Clone + Eq + Hash, E> Dialling<K, E> {
    async fn run(mut self, dial: impl Future<Output = Result<Dialled, E>>) {
        let result = dial.await;
        self.done = true;
        let mut slots = self.pool.lock();
        let slot = slots.entry(self.key.clone()).or_default();
        slot.dials = slot.dials.saturating_sub(1);
        match result {
            Ok(Dialled { carrier: Carrier::Shared(client), stamp, deadline, peer }) => {
                slot.native = false;
                slot.shared.push(Shared { client, stamp, deadline, peer });
            }
            Ok(Dialled { carrier: Carrier::Own(connection), stamp, deadline, peer }) => {
                slot.native = true;
                slot.hand_over(Free { connection, stamp, deadline, peer }, false);
            }
            Err(error) => {
                let error = Arc::new(error);
                for waiting in slot.waiting.drain(..) {
                    // A flow that was given up needs nothing.
                    let _ = waiting.send(Told::Failed(error.clone()));
                }
            }
        }
        slot.stir();
        if slot.is_empty() {
            slots.remove(&self.key);
        }
    }
}

impl<K: Eq + Hash, E> Drop for Dialling<K, E> {
    fn drop(&mut self) {
        if self.done {
            return;
        }
        if let Some(slot) = self.pool.lock().get_mut(&self.key) {
            slot.dials = slot.dials.saturating_sub(1);
            slot.stir();
        }
    }
}

impl<K, E> Pool<K, E> {
    fn lock(&self) -> MutexGuard<'_, HashMap<K, Slot<E>>> {
        // Nothing panics under the lock; if it did, the map would still be whole.
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
