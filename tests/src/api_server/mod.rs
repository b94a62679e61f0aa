//! A test API server: the few kinds that Signet's parts read and write, with what makes a real
//! one hard to use right: versions and conflicts, pages, watches that run out, tokens that are
//! bound to audiences and pods and die with them, and times when it does not answer.
//!
//! It speaks HTTP on a loopback address and wants a bearer token; [`ApiServer::kubeconfig`]
//! leads any client to it.

mod http;
mod objects;
mod tokens;

use std::{
    collections::BTreeMap,
    fs,
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    thread,
    time::Duration,
};

use anyhow::{Context, Result, anyhow};
use serde_json::{Value, json};
use tokio::sync::{Barrier, oneshot, watch};

use self::{objects::Objects, tokens::Tokens};

/// A test API server; ends when it is dropped.
pub struct ApiServer {
    address: SocketAddr,
    directory: tempfile::TempDir,
    shared: Arc<Shared>,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<thread::JoinHandle<()>>,
}

/// What the requests' tasks share.
struct Shared {
    state: Mutex<State>,
    /// The revision, for watches.
    changed: watch::Sender<u64>,
    /// The token that clients present.
    client_token: String,
}

#[derive(Default)]
struct State {
    objects: Objects,
    tokens: Tokens,
    /// Every request is answered 503 while set.
    down: bool,
    /// Each request waits so long first.
    delay: Duration,
    /// Requests by method and resource, for assertions.
    requests: BTreeMap<String, usize>,
    /// Requests of this method and resource wait for each other here.
    gathering: Option<(String, Arc<Barrier>)>,
}

/// An answer that is no success, as a `Status` object.
#[derive(Debug)]
struct Refusal {
    code: u16,
    reason: &'static str,
    message: String,
}

impl Refusal {
    fn new(code: u16, reason: &'static str, message: impl Into<String>) -> Self {
        Self { code, reason, message: message.into() }
    }

    fn body(&self) -> Value {
        json!({
            "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
            "message": self.message, "reason": self.reason, "code": self.code,
        })
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells watches of a change.
    fn announce(&self, revision: u64) {
        self.changed.send_replace(revision);
    }
}

impl ApiServer {
    /// Starts one on a free loopback port, with nothing in it.
    pub fn start() -> Result<Self> {
        let directory = tempfile::tempdir().context("a directory")?;
        let shared = Arc::new(Shared {
            state: Mutex::default(),
            changed: watch::Sender::new(0),
            client_token: format!("client-{}", uuid::Uuid::new_v4()),
        });
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .thread_name("lab-api-server")
            .enable_all()
            .build()
            .context("a runtime")?;
        let (stop, stopped) = oneshot::channel();
        let (sender, receiver) = std::sync::mpsc::channel();
        let served = shared.clone();
        let thread = thread::spawn(move || {
            runtime.block_on(async move {
                let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await;
                let (listener, address) = match listener.and_then(|l| Ok((l.local_addr()?, l))) {
                    Ok((address, listener)) => (listener, address),
                    Err(error) => {
                        let _ = sender.send(Err(error));
                        return;
                    }
                };
                let _ = sender.send(Ok(address));
                tokio::select! {
                    _ = axum::serve(listener, http::router(served)) => {}
                    _ = stopped => {}
                }
            });
        });
        let address = receiver.recv().map_err(|_| anyhow!("the server's thread has ended"))??;
        let server = Self { address, directory, shared, stop: Some(stop), thread: Some(thread) };
        server.write_kubeconfig()?;
        Ok(server)
    }

    fn write_kubeconfig(&self) -> Result<()> {
        let config = json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "lab",
            "clusters": [{"name": "lab", "cluster": {"server": self.url()}}],
            "users": [{"name": "lab", "user": {"token": self.shared.client_token}}],
            "contexts": [{"name": "lab", "context": {"cluster": "lab", "user": "lab"}}],
        });
        fs::write(self.kubeconfig(), config.to_string()).context("the kubeconfig")
    }

    /// Its URL.
    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// A kubeconfig for it.
    pub fn kubeconfig(&self) -> PathBuf {
        self.directory.path().join("kubeconfig")
    }

    /// A directory that lives as long as the server, for files of a test.
    pub fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// Creates an object, or replaces it whatever its version.
    pub fn apply(&self, object: Value) -> Result<Value> {
        let mut state = self.shared.state();
        let applied = state.objects.apply(object).map_err(|r| anyhow!("{}", r.message))?;
        let revision = state.objects.revision();
        drop(state);
        self.shared.announce(revision);
        Ok(applied)
    }

    /// An object, by plural (`pods`), namespace (empty: none) and name.
    pub fn get(&self, plural: &str, namespace: &str, name: &str) -> Option<Value> {
        self.shared.state().objects.get(plural, namespace, name).ok()
    }

    /// Removes an object.
    pub fn delete(&self, plural: &str, namespace: &str, name: &str) -> Result<()> {
        let mut state = self.shared.state();
        state.objects.delete(plural, namespace, name).map_err(|r| anyhow!("{}", r.message))?;
        let revision = state.objects.revision();
        drop(state);
        self.shared.announce(revision);
        Ok(())
    }

    /// A pod of an account, bound to a node; its uid.
    pub fn pod(&self, namespace: &str, name: &str, account: &str, node: &str) -> Result<String> {
        self.pod_with(namespace, name, account, node, "Running", &[])
    }

    /// The same in another phase and with annotations.
    pub fn pod_with(
        &self,
        namespace: &str,
        name: &str,
        account: &str,
        node: &str,
        phase: &str,
        annotations: &[(&str, &str)],
    ) -> Result<String> {
        let annotations: BTreeMap<&str, &str> = annotations.iter().copied().collect();
        let pod = self.apply(json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": {"namespace": namespace, "name": name, "annotations": annotations},
            "spec": {"serviceAccountName": account, "nodeName": node, "containers": []},
            "status": {"phase": phase},
        }))?;
        Ok(pod["metadata"]["uid"].as_str().unwrap_or_default().to_owned())
    }

    /// A service account.
    pub fn service_account(&self, namespace: &str, name: &str) -> Result<()> {
        self.apply(json!({
            "apiVersion": "v1", "kind": "ServiceAccount",
            "metadata": {"namespace": namespace, "name": name},
        }))?;
        Ok(())
    }

    /// A token of an account for one audience, bound to a pod by name.
    pub fn token(
        &self,
        namespace: &str,
        account: &str,
        audience: &str,
        pod: Option<&str>,
        lifetime: Duration,
    ) -> Result<String> {
        let mut state = self.shared.state();
        let State { objects, tokens, .. } = &mut *state;
        tokens
            .issue(objects, namespace, account, &[audience.to_owned()], pod, lifetime)
            .map_err(|r| anyhow!("{}", r.message))
    }

    /// Answers 503 to everything, or again as it should.
    pub fn set_down(&self, down: bool) {
        self.shared.state().down = down;
    }

    /// Lets each request wait first.
    pub fn set_delay(&self, delay: Duration) {
        self.shared.state().delay = delay;
    }

    /// From now on requests of a method and resource (`POST secrets`) are answered only in
    /// groups of `count`: who writes at the same time does so for certain.
    pub fn gather(&self, what: &str, count: usize) {
        self.shared.state().gathering = Some((what.to_owned(), Arc::new(Barrier::new(count))));
    }

    /// How many requests there were, by method and resource (`POST tokenreviews`).
    pub fn requests(&self) -> BTreeMap<String, usize> {
        self.shared.state().requests.clone()
    }
}

impl std::fmt::Debug for ApiServer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ApiServer").field("address", &self.address).finish_non_exhaustive()
    }
}

impl Drop for ApiServer {
    fn drop(&mut self) {
        if let Some(stop) = self.stop.take() {
            let _ = stop.send(());
        }
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
