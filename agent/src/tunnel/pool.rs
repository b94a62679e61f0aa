//! Tunnel connections by key, shared between the flows of one core.
//!
//! One dial at a time a key: the others wait for its result. A connection takes no new
//! flow once its [`Stamp`] is no longer the current one, its deadline has passed, or it is
//! full; it ends when its last flow has. Idle connections are dropped by
//! [`Pool::sweep`], an endpoint's by [`Pool::retain`].

use std::{
    collections::HashMap,
    future::Future,
    hash::Hash,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use tokio::sync::watch;
use tokio_util::task::TaskTracker;

use super::hbone::client::{Client, Permit};
use crate::spiffe::SpiffeId;

/// A connection that has carried nothing for so long is closed.
pub const IDLE: Duration = Duration::from_secs(300);
/// A connection takes no new flow when it is older than this.
pub const OLDEST: Duration = Duration::from_secs(1800);

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
    pub client: Client,
    /// What it was authenticated with.
    pub stamp: Stamp,
    /// The earlier end of both certificates.
    pub deadline: Instant,
    /// Who the peer proved to be.
    pub peer: SpiffeId,
}

/// A pooled connection with a stream reserved on it.
pub struct Lease {
    /// The connection.
    pub client: Client,
    /// The reservation; held while the flow lives.
    pub permit: Permit,
    /// Who the peer proved to be.
    pub peer: SpiffeId,
    /// True when it was not dialled for this flow: its death says nothing about the peer.
    pub reused: bool,
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

/// The outcome of a dial: `None` while it runs.
type Outcome<E> = Option<Result<(), Arc<E>>>;

struct Slot<E> {
    connections: Vec<Dialled>,
    dial: Option<watch::Receiver<Outcome<E>>>,
}

impl<E> Default for Slot<E> {
    fn default() -> Self {
        Self { connections: Vec::new(), dial: None }
    }
}

impl<E> Slot<E> {
    fn is_empty(&self) -> bool {
        self.connections.is_empty() && self.dial.is_none()
    }

    /// The dial in flight, unless its task is gone without a word.
    fn running_dial(&self) -> Option<watch::Receiver<Outcome<E>>> {
        let running = self.dial.as_ref()?;
        let dead = running.borrow().is_none() && running.has_changed().is_err();
        (!dead).then(|| running.clone())
    }

    /// Drops what takes no new flows (flows on it keep it alive) and reserves a stream on
    /// the least loaded of the rest.
    fn reserve(&mut self, stamp: Stamp, now: Instant, reused: bool) -> Option<Lease> {
        self.connections.retain(|c| c.is_usable(stamp, now));
        self.connections.sort_by_key(|c| c.client.streams());
        self.connections.iter().find_map(|c| {
            let permit = c.client.reserve()?;
            Some(Lease { client: c.client.clone(), permit, peer: c.peer.clone(), reused })
        })
    }
}

impl Dialled {
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

    /// A stream's place on a connection of `key`, dialled when there is none. A dial runs
    /// to its end even when this future is dropped: others may wait for it. `stamp` says
    /// what a dial begun now would be authenticated with.
    ///
    /// # Errors
    /// What the dial failed with, for everybody who waited for it.
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
            let mut outcome = {
                let mut slots = self.lock();
                let slot = slots.entry(key.clone()).or_default();
                if let Some(lease) = slot.reserve(stamp(), Instant::now(), reused) {
                    return Ok(lease);
                }
                match slot.running_dial() {
                    Some(running) => running,
                    None => {
                        let (tell, outcome) = watch::channel(None);
                        slot.dial = Some(outcome.clone());
                        let task = self.clone().finish_dial(key.clone(), dial(), tell);
                        self.tracker.spawn(task);
                        outcome
                    }
                }
            };
            reused = false;
            // An error here means that the dial's task was aborted: look again.
            if let Ok(done) = outcome.wait_for(Option::is_some).await
                && let Some(Err(error)) = done.as_ref()
            {
                return Err(error.clone());
            }
        }
    }

    async fn finish_dial(
        self,
        key: K,
        dial: impl Future<Output = Result<Dialled, E>>,
        tell: watch::Sender<Outcome<E>>,
    ) {
        let result = dial.await;
        let outcome = {
            let mut slots = self.lock();
            let slot = slots.entry(key.clone()).or_default();
            slot.dial = None;
            let outcome = match result {
                Ok(dialled) => {
                    slot.connections.push(dialled);
                    Ok(())
                }
                Err(error) => Err(Arc::new(error)),
            };
            if slot.is_empty() {
                slots.remove(&key);
            }
            outcome
        };
        tell.send_replace(Some(outcome));
    }

    /// Drops connections that have been idle for [`IDLE`] or that take no new flows.
    /// `stamp` is asked by key; `None`: nothing of this key is usable any more.
    pub fn sweep(&self, stamp: impl Fn(&K) -> Option<Stamp>) {
        let now = Instant::now();
        self.lock().retain(|key, slot| {
            let current = stamp(key);
            slot.connections.retain(|c| {
                c.client.idle() < IDLE && current.is_some_and(|stamp| c.is_usable(stamp, now))
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
        self.lock().values().map(|slot| slot.connections.len()).sum()
    }
}

impl<K, E> Pool<K, E> {
    fn lock(&self) -> MutexGuard<'_, HashMap<K, Slot<E>>> {
        // Nothing panics under the lock; if it did, the map would still be whole.
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
