//! The open flows of one core, so that a right that is withdrawn ends them.
//!
//! A flow registers before it is judged: when the state changes in between, either its own
//! check sees the new state or the re-judging finds it in the table.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError},
    time::{Duration, Instant},
};

use signet_ebpf::abi::Reason;
use tokio_util::sync::CancellationToken;

use super::judge::Facts;
use crate::endpoint::state::EndpointKey;

/// The table.
#[derive(Debug, Default)]
pub struct OpenFlows {
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    next: u64,
    flows: HashMap<u64, Arc<OpenFlow>>,
}

/// An open flow, as whoever re-judges it sees it.
#[derive(Debug)]
pub struct OpenFlow {
    /// Whose it is.
    pub endpoint: EndpointKey,
    /// `None` until the flow knows what it is to be judged by; it then looks at the
    /// current state itself.
    facts: Mutex<Option<Facts>>,
    closing: CancellationToken,
    reason: OnceLock<Reason>,
    /// Since when it goes on without its right.
    condemned: Mutex<Option<Instant>>,
}

/// What becomes of an open flow.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Fate {
    /// It goes on.
    Keep,
    /// It ends now.
    Close(Reason),
    /// It ends when it has been without its right for so long.
    CloseAfter(Duration, Reason),
}

/// A flow's place in the table, given up when dropped.
#[derive(Debug)]
pub struct Registration {
    table: Arc<OpenFlows>,
    id: u64,
    flow: Arc<OpenFlow>,
}

impl OpenFlows {
    /// Enters a flow that also ends with `parent` (its endpoint).
    pub fn register(
        self: &Arc<Self>,
        endpoint: EndpointKey,
        parent: &CancellationToken,
    ) -> Registration {
        let flow = Arc::new(OpenFlow {
            endpoint,
            facts: Mutex::new(None),
            closing: parent.child_token(),
            reason: OnceLock::new(),
            condemned: Mutex::new(None),
        });
        let mut inner = self.lock();
        let id = inner.next;
        inner.next += 1;
        inner.flows.insert(id, flow.clone());
        Registration { table: self.clone(), id, flow }
    }

    /// Judges every open flow again and ends those that lost their right. Returns when
    /// the next condemned one is due.
    pub fn rejudge(
        &self,
        now: Instant,
        mut fate: impl FnMut(&EndpointKey, &Facts) -> Fate,
    ) -> Option<Instant> {
        // A copy: judging runs policy, and flows must be able to leave meanwhile.
        let flows: Vec<_> = self.lock().flows.values().cloned().collect();
        let mut next: Option<Instant> = None;
        for flow in flows {
            let facts = lock(&flow.facts).clone();
            let Some(facts) = facts else { continue };
            match fate(&flow.endpoint, &facts) {
                Fate::Keep => *lock(&flow.condemned) = None,
                Fate::Close(reason) => flow.close(reason),
                Fate::CloseAfter(grace, reason) => {
                    let due = *lock(&flow.condemned).get_or_insert(now) + grace;
                    if due <= now {
                        flow.close(reason);
                    } else {
                        next = Some(next.map_or(due, |next| next.min(due)));
                    }
                }
            }
        }
        next
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.lock().flows.len()
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        lock(&self.inner)
    }
}

/// Locks; a panic under one of these locks leaves whole values behind.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl OpenFlow {
    fn close(&self, reason: Reason) {
        // The first reason stands.
        let _ = self.reason.set(reason);
        self.closing.cancel();
    }
}

impl Registration {
    /// Says what the flow is judged by from now on.
    pub fn set_facts(&self, facts: Facts) {
        *lock(&self.flow.facts) = Some(facts);
    }

    /// Completes when the flow has to end, with the reason.
    pub async fn closed(&self) -> Reason {
        self.flow.closing.cancelled().await;
        self.close_reason().unwrap_or(Reason::Draining)
    }

    /// Why the flow has to end, when it has.
    pub fn close_reason(&self) -> Option<Reason> {
        let closing = self.flow.closing.is_cancelled();
        closing.then(|| self.flow.reason.get().copied().unwrap_or(Reason::Draining))
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        self.table.lock().flows.remove(&self.id);
    }
}
