//! Which workloads have SVIDs of their own: those that ask for them, and some time longer.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use super::WorkloadKey;
use crate::{spiffe::SpiffeId, svid::SvidHandle};

/// An SVID that nobody listens to is kept for so long: clients that fetch once come again.
pub const LINGER: Duration = Duration::from_secs(300);

/// Tells the SVID manager what is wanted, by who listens.
pub struct Keeper {
    svids: SvidHandle<WorkloadKey>,
    interests: Mutex<BTreeMap<WorkloadKey, Interest>>,
}

struct Interest {
    id: SpiffeId,
    listeners: usize,
    /// Since when there has been no listener.
    idle: Option<Instant>,
}

/// Somebody listens to a workload's SVID, until this is dropped.
pub struct Listening {
    keeper: Arc<Keeper>,
    key: WorkloadKey,
}

impl Keeper {
    /// A keeper over a manager that nobody else tells what is wanted.
    pub fn new(svids: SvidHandle<WorkloadKey>) -> Arc<Self> {
        Arc::new(Self { svids, interests: Mutex::default() })
    }

    /// The SVIDs.
    pub fn svids(&self) -> &SvidHandle<WorkloadKey> {
        &self.svids
    }

    /// Wants an SVID for the workload, at least while somebody listens.
    pub fn listen(self: &Arc<Self>, key: &WorkloadKey, id: &SpiffeId) -> Listening {
        self.change(|interests| {
            let interest = interests.entry(key.clone()).or_insert_with(|| Interest {
                id: id.clone(),
                listeners: 0,
                idle: None,
            });
            interest.id = id.clone();
            interest.listeners += 1;
            interest.idle = None;
        });
        Listening { keeper: Arc::clone(self), key: key.clone() }
    }

    /// Forgets the SVIDs of workloads that are gone, and those that nobody has listened to
    /// for [`LINGER`].
    pub fn sweep(&self, is_there: impl Fn(&WorkloadKey) -> bool, now: Instant) {
        self.change(|interests| {
            interests.retain(|key, interest| {
                let lingers = interest.idle.is_none_or(|since| now.duration_since(since) < LINGER);
                lingers && is_there(key)
            });
        });
    }

    fn change(&self, change: impl FnOnce(&mut BTreeMap<WorkloadKey, Interest>)) {
        let mut interests = self.interests.lock().unwrap_or_else(PoisonError::into_inner);
        change(&mut interests);
        // Under the lock, so that the manager hears of changes in their order.
        self.svids
            .want_each(interests.iter().map(|(key, i)| (key.clone(), i.id.clone())).collect());
    }
}

impl Drop for Listening {
    fn drop(&mut self) {
        let mut interests = self.keeper.interests.lock().unwrap_or_else(PoisonError::into_inner);
        // It may have been swept with its pod.
        if let Some(interest) = interests.get_mut(&self.key) {
            interest.listeners = interest.listeners.saturating_sub(1);
            if interest.listeners == 0 {
                interest.idle = Some(Instant::now());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        ca::CaError,
        endpoint::state::EndpointKey,
        svid::{
            SvidManager, SvidParams,
            issuer::{IssueError, IssueFuture, Issuer, SvidRequest},
        },
    };

    struct Nobody;

    impl Issuer for Nobody {
        fn issue<'a>(&'a self, _: &'a SvidRequest) -> IssueFuture<'a> {
            Box::pin(async { Err(IssueError::Authority(CaError::Key)) })
        }
    }

    #[tokio::test]
    async fn kept_while_somebody_listens_and_some_time_longer() {
        let keeper = Keeper::new(SvidManager::start(Arc::new(Nobody), SvidParams::default()));
        let key = |netns| WorkloadKey::Pod(EndpointKey { uid: "u".into(), netns });
        let id = SpiffeId::parse("spiffe://td/a").unwrap();
        let wanted = || keeper.interests.lock().unwrap().keys().cloned().collect::<Vec<_>>();
        let first = keeper.listen(&key(1), &id);
        let second = keeper.listen(&key(1), &id);
        let other = keeper.listen(&key(2), &id);
        let later = Instant::now() + LINGER * 2;
        drop(first);
        keeper.sweep(|_| true, later);
        assert_eq!(wanted(), [key(1), key(2)], "one listens still");
        drop(second);
        keeper.sweep(|_| true, Instant::now());
        assert_eq!(wanted(), [key(1), key(2)], "it may come again");
        keeper.sweep(|_| true, later);
        assert_eq!(wanted(), [key(2)]);
        keeper.sweep(|_| false, Instant::now());
        assert!(wanted().is_empty(), "its pod is gone");
        drop(other);
        let again = keeper.listen(&key(2), &id);
        assert_eq!(wanted(), [key(2)]);
        drop(again);
    }
}
