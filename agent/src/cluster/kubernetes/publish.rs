//! Stores → Worlds.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use super::{
    Shared,
    kinds::{Content, Gate},
    store::Known,
};
use crate::cluster::{
    assemble::{Assembler, Surroundings},
    collected::{Collected, claims},
    model::{Override, Problem, Synced, World},
    source::WatchState,
};

/// Changes that keep coming are published at the latest after this many quiet times.
const MAX_DEBOUNCES: u32 = 8;
/// A large world is made at most every so many times as long as it takes to make one.
const SHARE: u32 = 4;
/// But not less often than this, whatever it takes: rights are taken away within a second.
const MAX_REST: Duration = Duration::from_millis(400);

/// Publishes a World whenever the stores say something new.
pub(super) struct Publisher {
    shared: Arc<Shared>,
    assembler: Assembler,
    world: Arc<World>,
}

impl Publisher {
    pub(super) fn new(shared: Arc<Shared>) -> Self {
        let world = shared.worlds.borrow().clone();
        let assembler = Assembler::new(shared.params.common.default_deny);
        Self { shared, assembler, world }
    }

    /// Runs until nobody listens any more.
    pub(super) async fn run(mut self) {
        let debounce = self.shared.params.common.debounce;
        loop {
            let shared = self.shared.clone();
            tokio::select! {
                () = shared.changed.notified() => {}
                () = shared.worlds.closed() => return,
            }
            let latest = Instant::now() + debounce * MAX_DEBOUNCES;
            while Instant::now() < latest
                && tokio::time::timeout(debounce, shared.changed.notified()).await.is_ok()
            {
            }
            let begin = Instant::now();
            self.publish();
            tokio::time::sleep((begin.elapsed() * SHARE).min(MAX_REST)).await;
        }
    }

    fn publish(&mut self) {
        let mut world = self.assemble();
        // Half of a cluster is no World: nothing is said before all of it is known.
        if !world.synced.pods {
            return;
        }
        if world.same_as(&self.world) {
            return;
        }
        for problem in world.problems.iter().filter(|p| !self.world.problems.contains(p)) {
            tracing::warn!(subject = problem.subject, "{}", problem.message);
        }
        world.revision = self.world.revision + 1;
        self.world = Arc::new(world);
        self.shared.worlds.send_replace(self.world.clone());
        self.shared.published.notify_one();
        self.shared.conditions.notify_one();
    }

    fn assemble(&mut self) -> World {
        let mut collected = Collected::default();
        let mut board = Vec::new();
        let mut federation = None;
        // Until it is read, what is pinned stays.
        let mut enforcement = Override::Unreadable;
        let mut problems = Vec::<Problem>::new();
        let mut synced = Synced { pods: true, policies: true };
        {
            let stores = self.shared.stores();
            for (kind, store) in self.shared.kinds.iter().zip(stores.iter()) {
                problems.extend(store.problems(kind));
                let is_synced = store.state != WatchState::Waiting;
                match kind.gate {
                    Gate::Everything => synced.pods &= is_synced,
                    Gate::Enforcing => synced.policies &= is_synced,
                    Gate::Nothing => {}
                }
                if kind.content == Content::Enforcement && is_synced && !store.is_unreadable() {
                    enforcement = Override::Absent;
                }
                for known in store.known() {
                    match known {
                        Known::Object(object) => collected.add(object),
                        Known::Announcement(announcement) => board.push(announcement.clone()),
                        Known::Enforcement(word) => enforcement = Override::Is(*word),
                        Known::Federation(known) => federation = Some(known.clone()),
                    }
                }
            }
        }
        // Watches come in any order; the World must not depend on it.
        collected.sort();
        let common = &self.shared.params.common;
        let around = Surroundings {
            trust_domain: common.trust_domain.clone(),
            ranges: common.ranges.clone(),
            federation: federation.unwrap_or_default(),
            announced: claims(board.iter(), &collected.objects),
            policies: collected.policies,
            peer_authentications: collected.peer_authentications,
            request_authentications: collected.request_authentications,
            root_namespace: common.root_namespace.clone(),
            enforcement,
            problems,
            synced,
        };
        self.assembler.assemble(&collected.objects, around)
    }
}
