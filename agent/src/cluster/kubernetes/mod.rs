//! The Kubernetes API as a source of Worlds (DESIGN §2).
//!
//! Each kind of [`kinds`] has a watch of its own ([`follow`]) over kube's watcher, which lists
//! in pages, follows by resource version with bookmarks and lists again when the server has
//! forgotten that version. What a watch tells goes into the kind's [`store`]: only a completed
//! list replaces what is known, a failed one changes nothing, and an object that cannot be
//! read keeps its last valid state. [`publish`] makes a World of all stores whenever one has
//! changed. [`board`] is this node's place among the NodeEnrolments, [`events`] tell of objects
//! with faults where people look, and [`conditions`] say of our policies whether they hold.
//!
//! All of it runs on a thread of its own with a current-thread runtime: a large cluster's lists
//! do not hold up the control plane.

pub mod board;
mod client;
mod conditions;
mod events;
mod follow;
mod kinds;
mod publish;
mod raw;
mod store;

use std::{
    io,
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak, mpsc},
    time::Duration,
};

use tokio::sync::{Notify, watch};

use self::{
    board::{BoardTask, KubernetesBoard},
    client::Watching,
    kinds::Kind,
    publish::Publisher,
    store::Store,
};
use super::{
    model::World,
    source::{ClusterSource, SourceParams, WatchFacts},
};
use crate::api_server::{ApiError, Right, access};

/// How long a server may end a watch at the latest by default; kube's own default, below the
/// 295 s that it allows.
pub const WATCH_TIMEOUT: Duration = Duration::from_secs(290);
/// Servers send a bookmark about once a minute: a watch that is silent for longer than this is
/// made anew.
const SILENCE: Duration = Duration::from_secs(60);
/// A kind that the server does not know is asked for again this often.
const ABSENT_RETRY: Duration = Duration::from_secs(30);

/// Every right that an agent of this node needs, each with whether the kind may be absent.
pub fn rights(node: &str, namespace: &str) -> Vec<(Right, bool)> {
    kinds::rights(node, namespace)
}

/// How to follow the API server.
#[derive(Clone, Debug)]
pub struct KubernetesParams {
    /// What every source needs.
    pub common: SourceParams,
    /// This node's name, as pods' `spec.nodeName` has it.
    pub node: Arc<str>,
    /// Where the ConfigMaps of the mesh are; the kubeconfig's or service account's own
    /// namespace where it is not given.
    pub namespace: Option<String>,
    /// A kubeconfig; the pod's own service account where there is none.
    pub kubeconfig: Option<PathBuf>,
    /// After this the server ends each watch, and it is begun anew; 1 s to 290 s.
    pub watch_timeout: Duration,
}

impl KubernetesParams {
    /// A connection that hears nothing for so long is closed.
    fn silence(&self) -> Duration {
        let least = self.watch_timeout.min(SILENCE);
        least + least / 4
    }

    /// How long to wait before a kind that the server does not know is asked for again.
    fn absent_retry(&self) -> Duration {
        (self.watch_timeout / 2).min(ABSENT_RETRY)
    }

    /// The longest pause between attempts.
    fn longest_pause(&self) -> Duration {
        self.watch_timeout.min(Duration::from_secs(30))
    }
}

/// Why the API cannot be followed at all. A server that does not answer is none of these: it
/// is tried until it does.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum KubernetesError {
    /// There is no usable configuration.
    #[error(transparent)]
    Access(#[from] ApiError),
    /// No thread, or no runtime on it.
    #[error("no thread to follow the Kubernetes API: {0}")]
    Thread(io::Error),
}

/// The stores with what wakes who reads them.
struct Shared {
    params: KubernetesParams,
    kinds: Vec<Kind>,
    stores: Mutex<Vec<Store>>,
    watching: Vec<Arc<Watching>>,
    changed: Notify,
    /// A World was published, for who tells of it on this thread.
    published: Notify,
    /// The same, for who writes conditions.
    conditions: Notify,
    worlds: watch::Sender<Arc<World>>,
}

impl Shared {
    fn stores(&self) -> MutexGuard<'_, Vec<Store>> {
        self.stores.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What each watch is like now.
    fn facts(&self) -> Vec<WatchFacts> {
        let stores = self.stores();
        let each = self.kinds.iter().zip(stores.iter()).zip(&self.watching);
        each.map(|((kind, store), watching)| watching.facts(kind, store)).collect()
    }
}

/// Follows the Kubernetes API.
#[derive(Debug)]
pub struct KubernetesSource {
    location: String,
    worlds: watch::Receiver<Arc<World>>,
    facts: Facts,
}

/// Reads the stores' state. The Worlds end with the thread, so nothing else keeps them.
struct Facts(Weak<Shared>);

impl std::fmt::Debug for Facts {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Facts").finish_non_exhaustive()
    }
}

impl KubernetesSource {
    /// Begins to follow; returns at once, with a World of which nothing is synced yet. Ends
    /// when the source, its board and every receiver of Worlds are gone.
    ///
    /// # Errors
    ///
    /// Without a usable configuration or a thread.
    pub fn start(params: KubernetesParams) -> Result<(Self, KubernetesBoard), KubernetesError> {
        let (board, board_task) = board::pair(params.node.clone());
        let (ready, started) = mpsc::channel();
        std::thread::Builder::new()
            .name("signet-kubernetes".into())
            .spawn(move || run(params, board_task, &ready))
            .map_err(KubernetesError::Thread)?;
        let ended = || io::Error::other("it ended at once");
        let source = started.recv().map_err(|_| KubernetesError::Thread(ended()))??;
        Ok((source, board))
    }
}

impl ClusterSource for KubernetesSource {
    fn worlds(&self) -> watch::Receiver<Arc<World>> {
        self.worlds.clone()
    }

    fn name(&self) -> &'static str {
        "kubernetes"
    }

    fn location(&self) -> String {
        self.location.clone()
    }

    fn watches(&self) -> Vec<WatchFacts> {
        self.facts.0.upgrade().map(|shared| shared.facts()).unwrap_or_default()
    }
}

type Started = Result<KubernetesSource, KubernetesError>;

/// The thread.
fn run(params: KubernetesParams, board: BoardTask, ready: &mpsc::Sender<Started>) {
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            let _ = ready.send(Err(KubernetesError::Thread(error)));
            return;
        }
    };
    runtime.block_on(async move {
        let config = match access(params.kubeconfig.as_deref()).await {
            Ok(config) => config,
            Err(error) => {
                let _ = ready.send(Err(error.into()));
                return;
            }
        };
        let location = config.cluster_url.to_string().trim_end_matches('/').to_owned();
        let namespace = params.namespace.clone();
        let namespace = namespace.unwrap_or_else(|| config.default_namespace.clone());
        let kinds = kinds::all(&params.node, &namespace);
        let (worlds, receiver) =
            watch::channel(Arc::new(World::empty(params.common.trust_domain.clone())));
        let shared = Arc::new(Shared {
            stores: Mutex::new(kinds.iter().map(|_| Store::default()).collect()),
            watching: kinds.iter().map(|_| Arc::default()).collect(),
            kinds,
            changed: Notify::new(),
            published: Notify::new(),
            conditions: Notify::new(),
            worlds,
            params,
        });
        let mut tasks = tokio::task::JoinSet::new();
        for index in 0..shared.kinds.len() {
            match client::of_watch(&config, &shared.params, &shared.watching[index]) {
                Ok(client) => drop(tasks.spawn(follow::follow(shared.clone(), index, client))),
                Err(error) => {
                    let _ = ready.send(Err(error.into()));
                    return;
                }
            }
        }
        match client::of_calls(&config) {
            Ok(client) => {
                tasks.spawn(board.run(shared.clone(), client.clone()));
                tasks.spawn(events::run(shared.clone(), client.clone()));
                tasks.spawn(conditions::run(shared.clone(), client));
            }
            Err(error) => {
                let _ = ready.send(Err(error.into()));
                return;
            }
        }
        let facts = Facts(Arc::downgrade(&shared));
        let source = KubernetesSource { location, worlds: receiver, facts };
        if ready.send(Ok(source)).is_err() {
            return;
        }
        tasks.spawn(Publisher::new(shared).run());
        // None of them ends but the publisher, when nobody listens any more, or by a bug; then
        // the Worlds end, and with them the agent.
        let _ = tasks.join_next().await;
    });
}
