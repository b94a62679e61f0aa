//! Which pods are on a node, and which nodes there are.

use std::{
    collections::{BTreeSet, HashMap},
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use k8s_openapi::api::core::v1::{Node, Pod};
use tokio::sync::watch;

use super::authorize::NodePod;
use crate::{
    api_server::{ApiError, ApiServer},
    cluster::{model::World, objects::MIRROR},
};

/// How old a list may be that says yes. A no is always looked up anew.
const MAX_AGE: Duration = Duration::from_secs(5);
/// How long a fresh answer waits for manifests that are being read.
const SETTLE: Duration = Duration::from_millis(300);
/// The most nodes whose lists are kept.
const MAX_NODES: usize = 5_000;

/// What the directory answers.
pub type Answer<'a, T> = Pin<Box<dyn Future<Output = Result<T, ApiError>> + Send + 'a>>;

/// Knows the pods of each node.
pub trait PodDirectory: Send + Sync + 'static {
    /// The pods bound to a node; `fresh`: as they are now, not as they were a moment ago.
    fn on_node<'a>(&'a self, node: &'a Arc<str>, fresh: bool) -> Answer<'a, Arc<[NodePod]>>;

    /// The nodes that should be running an agent.
    fn ready_nodes(&self) -> Answer<'_, BTreeSet<String>>;
}

/// From a directory of manifests.
#[derive(Clone, Debug)]
pub struct FilesPods(pub watch::Receiver<Arc<World>>);

impl PodDirectory for FilesPods {
    fn on_node<'a>(&'a self, node: &'a Arc<str>, fresh: bool) -> Answer<'a, Arc<[NodePod]>> {
        Box::pin(async move {
            let mut worlds = self.0.clone();
            if fresh {
                // A manifest that was written a moment ago is about to be read.
                let _ = tokio::time::timeout(SETTLE, worlds.changed()).await;
            }
            let world = worlds.borrow();
            let here = world.pods.values().filter(|pod| pod.node.as_ref() == Some(node));
            Ok(here
                .map(|pod| NodePod {
                    uid: pod.uid.clone(),
                    namespace: pod.name.namespace.clone(),
                    name: pod.name.name.clone(),
                    service_account: pod.service_account.clone(),
                    alive: pod.alive,
                    mirror: pod.mirror,
                })
                .collect())
        })
    }

    fn ready_nodes(&self) -> Answer<'_, BTreeSet<String>> {
        let world = self.0.borrow().clone();
        let mut nodes: BTreeSet<String> = world.nodes.keys().map(|n| n.to_string()).collect();
        if nodes.is_empty() {
            let bound = world.pods.values().filter(|pod| pod.alive);
            nodes = bound.filter_map(|pod| Some(pod.node.as_ref()?.to_string())).collect();
        }
        Box::pin(async move { Ok(nodes) })
    }
}

/// From the Kubernetes API.
#[derive(Debug)]
pub struct KubePods {
    api: ApiServer,
    lists: Mutex<HashMap<Arc<str>, Arc<tokio::sync::Mutex<Option<List>>>>>,
}

#[derive(Clone, Debug)]
struct List {
    pods: Arc<[NodePod]>,
    read: Instant,
}

impl KubePods {
    /// Asks this API server.
    pub fn new(api: ApiServer) -> Self {
        Self { api, lists: Mutex::default() }
    }

    fn slot(&self, node: &Arc<str>) -> Arc<tokio::sync::Mutex<Option<List>>> {
        let mut lists = self.lists.lock().unwrap_or_else(PoisonError::into_inner);
        if lists.len() >= MAX_NODES && !lists.contains_key(node) {
            // In use are those that somebody else holds too.
            lists.retain(|_, slot| Arc::strong_count(slot) > 1);
        }
        lists.entry(node.clone()).or_default().clone()
    }
}

impl PodDirectory for KubePods {
    fn on_node<'a>(&'a self, node: &'a Arc<str>, fresh: bool) -> Answer<'a, Arc<[NodePod]>> {
        Box::pin(async move {
            let asked = Instant::now();
            let slot = self.slot(node);
            // One reads, the others that wait take its answer.
            let mut slot = slot.lock().await;
            if let Some(list) = &*slot {
                // What was read since this was asked is fresh.
                if list.read >= asked || (!fresh && list.read.elapsed() < MAX_AGE) {
                    return Ok(list.pods.clone());
                }
            }
            let read = Instant::now();
            let pods: Arc<[NodePod]> =
                self.api.pods_on(node).await?.iter().filter_map(node_pod).collect();
            *slot = Some(List { pods: pods.clone(), read });
            Ok(pods)
        })
    }

    fn ready_nodes(&self) -> Answer<'_, BTreeSet<String>> {
        Box::pin(async move {
            let nodes = self.api.nodes().await?;
            Ok(nodes
                .iter()
                .filter(|n| is_ready(n))
                .filter_map(|n| n.metadata.name.clone())
                .collect())
        })
    }
}

fn node_pod(pod: &Pod) -> Option<NodePod> {
    let spec = pod.spec.as_ref()?;
    let phase = pod.status.as_ref().and_then(|s| s.phase.as_deref()).unwrap_or("Pending");
    let annotations = pod.metadata.annotations.as_ref();
    Some(NodePod {
        uid: pod.metadata.uid.as_deref()?.into(),
        namespace: pod.metadata.namespace.as_deref()?.into(),
        name: pod.metadata.name.as_deref()?.into(),
        service_account: spec.service_account_name.as_deref().unwrap_or("default").into(),
        alive: matches!(phase, "Pending" | "Running"),
        mirror: annotations.is_some_and(|a| a.contains_key(MIRROR)),
    })
}

fn is_ready(node: &Node) -> bool {
    let conditions = node.status.as_ref().and_then(|s| s.conditions.as_deref()).unwrap_or_default();
    conditions.iter().any(|c| c.type_ == "Ready" && c.status == "True")
}
