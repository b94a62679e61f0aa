//! A test API server: the kinds that Signet's parts read and write, with what makes a real one
//! hard to use right: versions and conflicts, pages, selectors, watches with bookmarks that run
//! out or begin too late, server-side apply, tokens that are bound to audiences and pods and die
//! with them, kinds that are installed later, and times when it does not answer, stalls or
//! breaks off ([`Faults`]).
//!
//! It speaks HTTP, and HTTPS for [kubectl](ApiServer::secure_kubeconfig), on loopback addresses and wants a bearer token; [`ApiServer::kubeconfig`]
//! leads any client to it, [`ApiServer::listen_in`] one in another network namespace. Whoever
//! comes with that kubeconfig's token may do everything (`system:masters`); a service account
//! with its own token ([`ApiServer::account_kubeconfig`]) what the roles say that are in the
//! server. Whatever comes over HTTP passes the schemas of custom kinds and the admission policies
//! that are in the server ([`admission`]); what a test puts there itself ([`ApiServer::apply`])
//! passes nothing. What it cannot do (streaming lists, strategic merge patches, webhooks) it
//! answers with 501 or 404.

mod access;
mod admission;
mod ask;
mod cel;
mod http;
mod kinds;
mod objects;
mod openapi;
mod portforward;
mod rights;
mod schema;
mod select;
mod table;
mod tls;
mod tokens;
mod watch;

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    thread,
    time::Duration,
};

use anyhow::{Context, Result, anyhow};
use axum::serve::Listener as _;
use serde_json::{Value, json};
use tokio::{
    net::TcpListener,
    sync::{Barrier, oneshot, watch as channel},
};

pub use self::{
    ask::Ask,
    rights::{Asked, Right},
};
use self::{
    kinds::{Installed, Kind},
    objects::Objects,
    tls::{Handshaken, Identity},
    tokens::Tokens,
};
use crate::netns;

/// How often a watch is told that nothing happened; a real server does so every minute.
const BOOKMARK_EVERY: Duration = Duration::from_secs(1);

/// How long a pod's own token is good.
const DAY: Duration = Duration::from_secs(24 * 3600);

/// A test API server; ends when it is dropped.
pub struct ApiServer {
    address: SocketAddr,
    /// The same over TLS.
    secure: SocketAddr,
    directory: tempfile::TempDir,
    shared: Arc<Shared>,
    handle: tokio::runtime::Handle,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<thread::JoinHandle<()>>,
}

/// What the requests' tasks share.
struct Shared {
    state: Mutex<State>,
    /// The revision, for watches.
    changed: channel::Sender<u64>,
    /// Counts up when all watches break off.
    drops: channel::Sender<u64>,
    /// The token that clients present.
    client_token: String,
}

#[derive(Default)]
struct State {
    objects: Objects,
    tokens: Tokens,
    installed: Installed,
    faults: Faults,
    /// Requests by method and resource, for assertions.
    requests: BTreeMap<String, usize>,
    /// What RBAC was asked.
    asked: BTreeSet<Asked>,
    /// Where nodes' loopback addresses are, for port-forwards.
    networks: BTreeMap<String, PathBuf>,
    /// Requests of this method and resource wait for each other here.
    gathering: Option<(String, Arc<Barrier>)>,
}

impl State {
    /// What follows from an object: a definition makes its kind.
    fn follow(&mut self, kind: &Kind, object: &Value) -> Result<(), Refusal> {
        if kind.plural != "customresourcedefinitions" {
            return Ok(());
        }
        let plural = object["spec"]["names"]["plural"].as_str().unwrap_or_default();
        if !self.installed.set(plural, true) {
            return Err(http::cannot(&format!("custom kinds that it does not know: {plural}")));
        }
        Ok(())
    }

    /// What goes with an object: all that is in a namespace, all that is of a custom kind. A
    /// real server does the same, by and by.
    fn take_along(&mut self, kind: &Kind, object: &Value) {
        match kind.plural {
            "namespaces" => {
                let name = object["metadata"]["name"].as_str().unwrap_or_default();
                self.objects.delete_namespace(name);
            }
            "customresourcedefinitions" => {
                let plural = object["spec"]["names"]["plural"].as_str().unwrap_or_default();
                if self.installed.set(plural, false) {
                    self.objects.delete_all(plural);
                }
            }
            _ => {}
        }
    }
}

/// What is wrong with the server at the moment.
#[derive(Clone, Copy, Debug, Default)]
pub struct Faults {
    /// Every request is answered with this code: 503, 429, ….
    pub refusal: Option<u16>,
    /// Each request waits so long first.
    pub delay: Duration,
    /// Open watches tell nothing, not even bookmarks, and do not end.
    pub stalled: bool,
}

/// An answer that is no success, as a `Status` object.
#[derive(Debug)]
struct Refusal {
    code: u16,
    reason: &'static str,
    message: String,
    details: Option<Value>,
}

impl Refusal {
    fn new(code: u16, reason: &'static str, message: impl Into<String>) -> Self {
        Self { code, reason, message: message.into(), details: None }
    }

    fn body(&self) -> Value {
        let mut body = json!({
            "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
            "message": self.message, "reason": self.reason, "code": self.code,
        });
        if let Some(details) = &self.details {
            body["details"] = details.clone();
        }
        body
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes objects and tells watches.
    fn change<T>(
        &self,
        change: impl FnOnce(&mut State) -> Result<T, Refusal>,
    ) -> Result<T, Refusal> {
        let mut state = self.state();
        let result = change(&mut state)?;
        let revision = state.objects.revision();
        drop(state);
        self.changed.send_replace(revision);
        Ok(result)
    }

    fn bookmark_every(&self) -> Duration {
        BOOKMARK_EVERY
    }
}

impl ApiServer {
    /// Starts one on a free loopback port, with nothing in it.
    pub fn start() -> Result<Self> {
        let directory = tempfile::tempdir().context("a directory")?;
        let mut state = State::default();
        for object in access::built_in() {
            state.objects.apply(object).map_err(|refusal| anyhow!("{}", refusal.message))?;
        }
        let shared = Arc::new(Shared {
            state: Mutex::new(state),
            changed: channel::Sender::new(0),
            drops: channel::Sender::new(0),
            client_token: format!("client-{}", uuid::Uuid::new_v4()),
        });
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .thread_name("lab-api-server")
            .enable_all()
            .build()
            .context("a runtime")?;
        let identity = Identity::shared()?;
        let (stop, stopped) = oneshot::channel();
        let (sender, receiver) = std::sync::mpsc::channel();
        let served = shared.clone();
        let handle = runtime.handle().clone();
        let thread = thread::spawn(move || {
            runtime.block_on(async move {
                let (open, secure) = match listeners(identity).await {
                    Ok(listeners) => listeners,
                    Err(error) => {
                        let _ = sender.send(Err(error));
                        return;
                    }
                };
                let addresses = open.local_addr().and_then(|a| Ok((a, secure.local_addr()?)));
                let _ = sender.send(addresses);
                tokio::select! {
                    _ = axum::serve(open, http::router(served.clone())) => {}
                    _ = axum::serve(secure, http::router(served)) => {}
                    _ = stopped => {}
                }
            });
        });
        let ended = |_| anyhow!("the server's thread has ended");
        let (address, secure) = receiver.recv().map_err(ended)??;
        let (stop, thread) = (Some(stop), Some(thread));
        let server = Self { address, secure, directory, shared, handle, stop, thread };
        server.write_kubeconfig(&server.kubeconfig(), address, &server.shared.client_token)?;
        Ok(server)
    }

    fn write_kubeconfig(&self, path: &Path, address: SocketAddr, token: &str) -> Result<()> {
        let config = json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "lab",
            "clusters": [{"name": "lab", "cluster": {"server": format!("http://{address}")}}],
            "users": [{"name": "lab", "user": {"token": token}}],
            "contexts": [{"name": "lab", "context": {"cluster": "lab", "user": "lab"}}],
        });
        fs::write(path, config.to_string()).context("the kubeconfig")
    }

    /// A kubeconfig that leads over TLS, for kubectl; with somebody's token, or the one of
    /// [`Self::kubeconfig`].
    pub fn secure_kubeconfig(&self, name: &str, token: Option<&str>) -> Result<PathBuf> {
        let authority = self.directory.path().join("api-server.pem");
        fs::write(&authority, &Identity::shared()?.certificate).context("the certificate")?;
        let config = json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "lab",
            "clusters": [{"name": "lab", "cluster": {
                "server": format!("https://{}", self.secure), "certificate-authority": authority,
            }}],
            "users": [{"name": "lab", "user": {
                "token": token.unwrap_or(&self.shared.client_token),
            }}],
            "contexts": [{"name": "lab", "context": {"cluster": "lab", "user": "lab"}}],
        });
        let path = self.directory.path().join(format!("kubeconfig-tls-{name}"));
        fs::write(&path, config.to_string()).context("the kubeconfig")?;
        Ok(path)
    }

    /// Its URL.
    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// A kubeconfig for it.
    pub fn kubeconfig(&self) -> PathBuf {
        self.directory.path().join("kubeconfig")
    }

    /// A kubeconfig with a service account's own token, good for a day, which is bound to a pod
    /// by name.
    pub fn account_kubeconfig(
        &self,
        namespace: &str,
        account: &str,
        pod: Option<&str>,
    ) -> Result<PathBuf> {
        let token = self.own_token(namespace, account, pod)?;
        let name = format!("kubeconfig-{namespace}-{account}-{}", pod.unwrap_or_default());
        let path = self.directory.path().join(name);
        self.write_kubeconfig(&path, self.address, &token)?;
        Ok(path)
    }

    /// A service account's token for this server itself, as pods are given one.
    pub fn own_token(&self, namespace: &str, account: &str, pod: Option<&str>) -> Result<String> {
        let mut state = self.shared.state();
        let State { objects, tokens, .. } = &mut *state;
        tokens
            .issue(objects, namespace, account, &[], pod, DAY)
            .map_err(|r| anyhow!("{}", r.message))
    }

    /// Puts what `manifests/<part>` has into the server, past admission. Kustomize's own files
    /// are left out.
    pub fn ship(&self, parts: &[&str]) -> Result<()> {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../manifests");
        for part in parts {
            let directory = root.join(part);
            let files =
                fs::read_dir(&directory).with_context(|| directory.display().to_string())?;
            for file in files {
                let path = file.context("a manifest")?.path();
                let is_yaml = path.extension().is_some_and(|extension| extension == "yaml");
                if !is_yaml || path.ends_with("kustomization.yaml") {
                    continue;
                }
                let text = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
                for object in crate::cluster_dir::parse(&text)? {
                    self.apply(object).with_context(|| path.display().to_string())?;
                }
            }
        }
        Ok(())
    }

    /// Listens on a loopback address of another network namespace, too; the kubeconfig for there,
    /// with this token or the one of [`Self::kubeconfig`].
    pub fn listen_in(&self, namespace: &Path, token: Option<&str>) -> Result<PathBuf> {
        let listener = netns::inside(namespace, || {
            let listener = std::net::TcpListener::bind("127.0.0.1:0").context("a listener")?;
            listener.set_nonblocking(true).context("a listener")?;
            Ok(listener)
        })?;
        let address = listener.local_addr().context("a listener")?;
        let router = http::router(self.shared.clone());
        self.handle.spawn(async move {
            match tokio::net::TcpListener::from_std(listener) {
                Ok(listener) => drop(axum::serve(listener, router).await),
                Err(error) => eprintln!("the test API server does not listen: {error}"),
            }
        });
        let name = namespace.file_name().unwrap_or_default().to_string_lossy();
        let path = self.directory.path().join(format!("kubeconfig-{name}"));
        self.write_kubeconfig(&path, address, token.unwrap_or(&self.shared.client_token))?;
        Ok(path)
    }

    /// Port-forwards to pods of a node lead to the loopback address of this network namespace.
    pub fn forward_to(&self, node: &str, namespace: &Path) {
        self.shared.state().networks.insert(node.into(), namespace.into());
    }

    /// A directory that lives as long as the server, for files of a test.
    pub fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// Creates an object, or replaces it whatever its version.
    pub fn apply(&self, object: Value) -> Result<Value> {
        let changed = self.shared.change(|state| {
            let kind = object["kind"].as_str().unwrap_or_default().to_owned();
            let made = state.objects.apply(object)?;
            match kinds::KINDS.iter().find(|known| known.kind == kind) {
                Some(kind) => state.follow(kind, &made).map(|()| made),
                None => Ok(made),
            }
        });
        changed.map_err(|r| anyhow!("{}", r.message))
    }

    /// An object, by plural (`pods`), namespace (empty: none) and name.
    pub fn get(&self, plural: &str, namespace: &str, name: &str) -> Option<Value> {
        self.shared.state().objects.get(plural, namespace, name).ok()
    }

    /// All objects of a kind, by plural.
    pub fn list(&self, plural: &str) -> Vec<Value> {
        let selection = select::Selection::parse(plural, "", "", "");
        let page = selection.and_then(|all| self.shared.state().objects.list(&all, 0, None));
        page.map(|page| page.items).unwrap_or_default()
    }

    /// Removes an object.
    pub fn delete(&self, plural: &str, namespace: &str, name: &str) -> Result<()> {
        self.shared
            .change(|state| state.objects.delete(plural, namespace, name))
            .map(drop)
            .map_err(|r| anyhow!("{}", r.message))
    }

    /// Removes an object by its kind (`Pod`).
    pub fn delete_kind(&self, kind: &str, namespace: &str, name: &str) -> Result<()> {
        let known = kinds::KINDS.iter().find(|known| known.kind == kind);
        let known = known.with_context(|| format!("kind {kind:?} is not known"))?;
        self.delete(known.plural, namespace, name)
    }

    /// Installs a custom kind by its plural; before that the server answers 404.
    pub fn install(&self, plural: &str) -> Result<()> {
        self.set_installed(plural, true)
    }

    /// Removes a custom kind with all its objects.
    pub fn uninstall(&self, plural: &str) -> Result<()> {
        self.set_installed(plural, false)
    }

    fn set_installed(&self, plural: &str, is_there: bool) -> Result<()> {
        let changed = self.shared.change(|state| {
            let is_known = state.installed.set(plural, is_there);
            if is_known && !is_there {
                state.objects.delete_all(plural);
            }
            Ok(is_known)
        });
        match changed {
            Ok(true) => Ok(()),
            Ok(false) => Err(anyhow!("{plural:?} is not a custom kind of the test server")),
            Err(refusal) => Err(anyhow!("{}", refusal.message)),
        }
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

    /// Answers 503 to everything and ends every watch, or again as it should.
    pub fn set_down(&self, down: bool) {
        self.set_faults(|faults| faults.refusal = down.then_some(503));
        if down {
            self.drop_watches();
        }
    }

    /// Changes what is wrong with the server.
    pub fn set_faults(&self, change: impl FnOnce(&mut Faults)) {
        change(&mut self.shared.state().faults);
        // Watches look again.
        self.shared.changed.send_modify(|_| {});
    }

    /// Every watch breaks off in the midst.
    pub fn drop_watches(&self) {
        self.shared.drops.send_modify(|count| *count += 1);
    }

    /// Forgets every past change: whoever wants to go on from one is told 410.
    pub fn forget_history(&self) {
        let _ = self.shared.change(|state| {
            state.objects.forget();
            Ok(())
        });
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

/// The server's listeners: in clear, and over TLS.
async fn listeners(identity: &Identity) -> io::Result<(TcpListener, Handshaken)> {
    let open = TcpListener::bind("127.0.0.1:0").await?;
    let secure = TcpListener::bind("127.0.0.1:0").await?;
    Ok((open, Handshaken::on(secure, identity)?))
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
