//! The Kubernetes API as the source of Worlds, against the test API server: what it makes of
//! lists, changes and faults; and who may look at agents through it. No agent and no eBPF take
//! part; [`viewers`] makes network namespaces, which needs root.

mod admission;
mod board;
mod check;
mod conditions;
mod events;
mod faults;
mod following;
mod hubble;
mod kubectl;
mod rights;
mod viewers;

use std::{path::PathBuf, sync::Arc, time::Duration};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};
use signet::{
    cluster::{
        kubernetes::{KubernetesParams, KubernetesSource, board::KubernetesBoard},
        model::World,
        source::{ClusterSource as _, SourceParams, WatchFacts},
    },
    spiffe::TrustDomain,
};
use signet_lab::api_server::ApiServer;
use tokio::sync::watch;

/// Longest that anything may take on a busy machine.
const TIMEOUT: Duration = Duration::from_secs(30);
/// So soon a watch is begun anew; a silent one ends after a quarter more.
const WATCH_TIMEOUT: Duration = Duration::from_secs(2);

/// A source that follows a test API server.
struct Followed {
    api: Arc<ApiServer>,
    source: KubernetesSource,
    board: KubernetesBoard,
    worlds: watch::Receiver<Arc<World>>,
}

impl Followed {
    fn start() -> Result<Self> {
        Self::of(Arc::new(ApiServer::start()?), "node-1")
    }

    fn of(api: Arc<ApiServer>, node: &str) -> Result<Self> {
        let kubeconfig = api.kubeconfig();
        Self::with(api, node, kubeconfig)
    }

    fn with(api: Arc<ApiServer>, node: &str, kubeconfig: PathBuf) -> Result<Self> {
        let common = SourceParams::new(TrustDomain::parse("cluster.local")?);
        let (source, board) = KubernetesSource::start(KubernetesParams {
            common,
            node: node.into(),
            namespace: Some("signet-system".into()),
            kubeconfig: Some(kubeconfig),
            watch_timeout: WATCH_TIMEOUT,
        })?;
        let worlds = source.worlds();
        Ok(Self { api, source, board, worlds })
    }

    /// Waits for a World.
    async fn wait(&self, what: &str, wanted: impl Fn(&World) -> bool) -> Result<Arc<World>> {
        let mut worlds = self.worlds.clone();
        let found = tokio::time::timeout(TIMEOUT, worlds.wait_for(|world| wanted(world))).await;
        match found {
            Ok(found) => Ok(found.context("the source has ended")?.clone()),
            Err(_) => {
                let world = self.worlds.borrow().clone();
                bail!("no world with {what}; {world:#?}\n{:#?}", self.source.watches())
            }
        }
    }

    /// Waits until everything is read.
    async fn synced(&self) -> Result<Arc<World>> {
        self.wait("everything", |world| world.synced.pods && world.synced.policies).await
    }

    /// Waits for a state of one watch.
    async fn wait_watch(
        &self,
        kind: &str,
        what: &str,
        wanted: impl Fn(&WatchFacts) -> bool,
    ) -> Result<WatchFacts> {
        let deadline = tokio::time::Instant::now() + TIMEOUT;
        loop {
            let facts = self.source.watches().into_iter().find(|facts| facts.kind == kind);
            let facts = facts.with_context(|| format!("nobody watches {kind}"))?;
            if wanted(&facts) {
                return Ok(facts);
            }
            anyhow::ensure!(tokio::time::Instant::now() < deadline, "no {what}: {facts:?}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}

fn namespace(name: &str, mode: &str) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Namespace",
        "metadata": {"name": name, "labels": {"signet.dev/mode": mode}},
    })
}

fn pod(name: &str, uid: &str, node: &str, ip: &str) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": name, "namespace": "shop", "uid": uid},
        "spec": {"nodeName": node, "serviceAccountName": name, "containers": []},
        "status": {"phase": "Running", "podIPs": [{"ip": ip}]},
    })
}

fn policy(name: &str, action: &str) -> Value {
    json!({
        "apiVersion": "signet.dev/v1alpha1", "kind": "IdentityPolicy",
        "metadata": {"name": name, "namespace": "shop"},
        "spec": {"action": action, "ingress": [{}]},
    })
}

/// Actions of the policies, by name.
fn actions(world: &World) -> Vec<String> {
    let policies = world.policies.policies.iter();
    policies.map(|policy| format!("{} {:?}", policy.name.name, policy.action)).collect()
}
