//! This node's NodeEnrolment: written by server-side apply, at most once a second while pods
//! are only added, at once when one is taken away.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use backon::BackoffBuilder as _;
use jiff::Timestamp;
use kube::{Client, core::Request};
use tokio::sync::watch;

use super::{Shared, client::CALL_TIMEOUT, kinds::Content, store::Known};
use crate::cluster::{
    enrolment::{
        BoardError, EnrolmentBoard,
        crd::{self, MAX_PODS},
    },
    model::PodUid,
};

/// Announcements that only add are at least so far apart.
const APART: Duration = Duration::from_secs(1);
/// How long the end of the agent waits until the last announcement is written.
const LAST_WORD: Duration = Duration::from_secs(2);
/// What is there is looked at this often: somebody may have changed it.
const LOOK: Duration = Duration::from_secs(5);
/// The field manager of server-side apply.
const MANAGER: &str = "signet-agent";

type Served = BTreeMap<PodUid, Arc<str>>;

/// What this node has to say; `None`: nothing yet.
type Wanted = Option<(Served, u64)>;

/// How writing goes.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
struct Written {
    /// What was written last.
    served: Option<Served>,
    /// Why the last attempt failed, if it did.
    failure: Option<Arc<str>>,
}

/// This node's place among the NodeEnrolments. Dropping it waits a moment until its last word
/// is written.
#[derive(Debug)]
pub struct KubernetesBoard {
    node: Arc<str>,
    wanted: watch::Sender<Wanted>,
    written: Arc<Mutex<Written>>,
}

/// What writes, on the source's thread.
pub(super) struct BoardTask {
    node: Arc<str>,
    wanted: watch::Receiver<Wanted>,
    written: Arc<Mutex<Written>>,
}

/// A board with its task.
pub(super) fn pair(node: Arc<str>) -> (KubernetesBoard, BoardTask) {
    let (sender, receiver) = watch::channel(None);
    let written = Arc::new(Mutex::new(Written::default()));
    let board = KubernetesBoard { node: node.clone(), wanted: sender, written: written.clone() };
    (board, BoardTask { node, wanted: receiver, written })
}

fn lock(written: &Mutex<Written>) -> MutexGuard<'_, Written> {
    written.lock().unwrap_or_else(PoisonError::into_inner)
}

impl EnrolmentBoard for KubernetesBoard {
    fn announce(
        &mut self,
        served: &Served,
        revision: u64,
        _now: Timestamp,
    ) -> Result<bool, BoardError> {
        let news = self.wanted.send_if_modified(|wanted| {
            // The revision alone is no news: every node would write at every change.
            if wanted.as_ref().is_some_and(|(known, _)| known == served) {
                return false;
            }
            *wanted = Some((served.clone(), revision));
            true
        });
        if served.len() > MAX_PODS {
            return Err(BoardError::TooMany { count: served.len(), most: MAX_PODS });
        }
        match lock(&self.written).failure.clone() {
            Some(cause) => Err(BoardError::Send { node: self.node.clone(), cause }),
            None => Ok(news),
        }
    }

    fn fall_silent(&mut self) {
        self.wanted.send_replace(None);
    }
}

impl KubernetesBoard {
    fn is_said(&self) -> bool {
        let wanted = self.wanted.borrow();
        match &*wanted {
            None => true,
            Some((served, _)) => lock(&self.written).served.as_ref() == Some(&bounded(served)),
        }
    }
}

impl Drop for KubernetesBoard {
    fn drop(&mut self) {
        let end = Instant::now() + LAST_WORD;
        while !self.is_said() && Instant::now() < end && !self.wanted.is_closed() {
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

/// As much of it as an announcement holds.
fn bounded(served: &Served) -> Served {
    served.iter().take(MAX_PODS).map(|(uid, pod)| (uid.clone(), pod.clone())).collect()
}

impl BoardTask {
    /// Writes whatever is wanted, for ever: also after its board is gone the Worlds go on.
    pub(super) async fn run(mut self, shared: Arc<Shared>, client: Client) {
        let pauses = backon::ExponentialBuilder::default()
            .with_min_delay(Duration::from_millis(250))
            .with_max_delay(shared.params.longest_pause())
            .with_jitter()
            .without_max_times();
        let mut pause = pauses.build();
        let mut last = Instant::now().checked_sub(APART);
        let mut is_open = true;
        loop {
            let wanted = self.wanted.borrow_and_update().clone();
            let (served, revision) = match wanted {
                Some((served, revision)) if !self.is_there(&shared, &bounded(&served), last) => {
                    (bounded(&served), revision)
                }
                _ => {
                    self.rest(&mut is_open, LOOK).await;
                    continue;
                }
            };
            let only_adds = lock(&self.written)
                .served
                .as_ref()
                .is_none_or(|written| written.keys().all(|uid| served.contains_key(uid)));
            let since = last.map_or(APART, |last| last.elapsed());
            if only_adds && since < APART {
                self.rest(&mut is_open, APART - since).await;
                // There may be more to say by now.
                continue;
            }
            last = Some(Instant::now());
            match self.write(&shared, &client, &served, revision).await {
                Ok(()) => {
                    tracing::debug!(pods = served.len(), "announced");
                    *lock(&self.written) = Written { served: Some(served), failure: None };
                    pause = pauses.build();
                }
                Err(error) => {
                    let cause: Arc<str> = error.into();
                    tracing::warn!(%cause, "the NodeEnrolment is not written; trying again");
                    lock(&self.written).failure = Some(cause);
                    let next = pause.next().unwrap_or(APART);
                    self.rest(&mut is_open, next).await;
                }
            }
        }
    }

    /// Waits for news, at most so long.
    async fn rest(&mut self, is_open: &mut bool, most: Duration) {
        if !*is_open {
            tokio::time::sleep(most).await;
        } else if let Ok(Err(_)) = tokio::time::timeout(most, self.wanted.changed()).await {
            *is_open = false;
        }
    }

    /// True when exactly this was written and nobody has changed it since.
    fn is_there(&self, shared: &Shared, served: &Served, last: Option<Instant>) -> bool {
        {
            let written = lock(&self.written);
            if written.served.as_ref() != Some(served) || written.failure.is_some() {
                return false;
            }
        }
        // What was written a moment ago may not have been told yet.
        if last.is_some_and(|last| last.elapsed() < LOOK) {
            return true;
        }
        let stores = shared.stores();
        let board = shared.kinds.iter().zip(stores.iter());
        let Some((_, store)) = board.into_iter().find(|(k, _)| k.content == Content::Announcement)
        else {
            return true;
        };
        // While the watch does not work nothing is known.
        if store.state != crate::cluster::source::WatchState::Listed {
            return true;
        }
        store.known().any(|known| {
            matches!(known, Known::Announcement(announcement)
                if announcement.node == self.node && announcement.served == *served)
        })
    }

    async fn write(
        &self,
        shared: &Shared,
        client: &Client,
        served: &Served,
        revision: u64,
    ) -> Result<(), String> {
        let node_uid = {
            let stores = shared.stores();
            let nodes = shared.kinds.iter().position(|kind| kind.kind == "Node");
            nodes.and_then(|index| stores[index].uid("", &self.node)).map(str::to_owned)
        };
        let object =
            crd::object(&self.node, node_uid.as_deref(), served, revision, Timestamp::now());
        let path = format!("/apis/{}/{}", crd::API_VERSION, crd::PLURAL);
        let params = kube::api::PatchParams::apply(MANAGER).force();
        let request = Request::new(path)
            .patch(&self.node, &params, &kube::api::Patch::Apply(&object))
            .map_err(|error| error.to_string())?;
        let call = client.request::<serde_json::Value>(request);
        match tokio::time::timeout(CALL_TIMEOUT, call).await {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(kube::Error::Api(status))) => {
                let remedy = match status.code {
                    401 | 403 => "; look at the role of the agent's service account",
                    404 => "; apply manifests/crds",
                    _ => "",
                };
                Err(format!("the API server answers {}: {}{remedy}", status.code, status.message))
            }
            Ok(Err(error)) => Err(error.to_string()),
            Err(_) => Err(format!("no answer within {CALL_TIMEOUT:?}")),
        }
    }
}
