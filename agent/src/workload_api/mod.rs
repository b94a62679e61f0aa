//! The SPIFFE Workload API: each workload of this node gets SVIDs of its own.
//!
//! A caller is known by its process alone ([`attest`]); there is no authentication on the
//! wire. Its key pairs are made here for it and never used by the agent itself; the tunnel's
//! keys never leave the agent.

mod answers;
mod attest;
pub mod authority;
mod connections;
mod counters;
mod entries;
mod keeper;
mod other_end;
mod service;
mod tokens;

use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use futures_util::StreamExt as _;
use tokio::time;
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tonic::transport::Server;

use self::{
    attest::{Caller, Method},
    connections::{Payer, Reception, Slot, Slots},
    keeper::Keeper,
    service::Service,
};
pub use self::{
    counters::Counters,
    entries::{Entries, EntriesError},
};
use crate::{
    endpoint::state::{EndpointKey, NodeStateHandle},
    kernel::cgroup::Hierarchy,
    netns::NetnsOpener,
    socket_file::{self, BoundSocket, SocketError, SocketParams},
    spiffe::{SpiffeId, TrustDomain},
    svid::{
        SvidHandle, SvidManager, SvidParams,
        issuer::{Issuer, JwtIssuer},
        metrics::Purpose,
    },
    trust::Trust,
};

/// How often it is looked after SVIDs that nobody listens to.
const SWEEP_EVERY: Duration = Duration::from_secs(10);
/// The longest request, in bytes: audiences and tokens are small.
const MAX_REQUEST: usize = 64 * 1024;

/// How much one caller may have at a time, and how long it waits.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Limits {
    /// Connections of one workload, or of one user's processes that are none.
    pub connections: usize,
    /// Calls of one workload that are not answered to the end, streams above all.
    pub calls: usize,
    /// A workload whose SVID cannot be obtained in this time is told so.
    pub first_answer: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self { connections: 128, calls: 256, first_answer: Duration::from_secs(10) }
    }
}

/// Whom an SVID of its own belongs to.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum WorkloadKey {
    /// A pod.
    Pod(EndpointKey),
    /// What the static entry of this name selects.
    Entry(Arc<str>),
}

/// A workload that calls.
#[derive(Clone, PartialEq, Eq, Debug)]
struct Workload {
    key: WorkloadKey,
    id: SpiffeId,
}

/// What the Workload API works with.
pub struct WorkloadApiDeps {
    /// The node's pods.
    pub state: NodeStateHandle,
    /// The bundles that are handed out, and that tokens are validated against.
    pub trust: Arc<Trust>,
    /// The cluster's own trust domain.
    pub trust_domain: TrustDomain,
    /// Where cgroups are.
    pub hierarchy: Hierarchy,
    /// The cgroup that holds all pods, below the hierarchy's mount: no static entry selects
    /// what is in it.
    pub workloads_root: PathBuf,
    /// Workloads that are no pods.
    pub entries: Entries,
    /// Who issues X509-SVIDs.
    pub issuer: Arc<dyn Issuer>,
    /// Who issues JWT-SVIDs; `None`: nobody, and the JWT calls say so.
    pub jwt_issuer: Option<Arc<dyn JwtIssuer>>,
    /// Makes sockets in other network namespaces.
    pub opener: NetnsOpener,
    /// Whether the kernel has `SO_PEERPIDFD`.
    pub has_peer_pidfd: bool,
    /// Limits of one caller.
    pub limits: Limits,
}

/// The Workload API.
pub struct WorkloadApi {
    method: Method,
    slots: Slots,
    service: Service,
    stop: CancellationToken,
}

/// What others may see of it; cheap to clone.
#[derive(Clone)]
pub struct WorkloadApiHandle {
    svids: SvidHandle<WorkloadKey>,
    counters: Arc<Counters>,
}

/// Binds the socket: mode 0666, alone in a directory of mode 0755, which pods mount.
///
/// # Errors
/// [`SocketError`].
pub fn bind(path: &Path) -> Result<BoundSocket, SocketError> {
    socket_file::bind(&SocketParams {
        key: "workloadSocket",
        path,
        directory_mode: 0o755,
        socket_mode: 0o666,
        alone: true,
    })
}

impl WorkloadApi {
    /// Puts it together; nothing is answered until [`WorkloadApi::serve`].
    pub fn new(deps: WorkloadApiDeps, params: SvidParams) -> (Self, WorkloadApiHandle) {
        let method = if deps.has_peer_pidfd {
            Method::PeerPidfd
        } else {
            Method::PeerPid(deps.opener.clone())
        };
        // A pod's key goes with the pod: the lingering is the keeper's, while it is there.
        let metrics = (params.metrics.0, Purpose::Workload);
        let params = SvidParams { grace: Duration::ZERO, metrics, ..params };
        let svids = SvidManager::start(Arc::clone(&deps.issuer), params);
        let counters = Arc::new(Counters::default());
        let stop = CancellationToken::new();
        let service =
            Service::new(deps, Keeper::new(svids.clone()), Arc::clone(&counters), stop.clone());
        let handle = WorkloadApiHandle { svids, counters };
        (Self { method, slots: Slots::default(), service, stop }, handle)
    }

    /// Answers until `shutdown` is done; open streams are then ended with a status. After
    /// `succeeded` only connections that are open go on: another process has the socket and its
    /// file.
    ///
    /// # Errors
    /// When the transport fails.
    pub async fn serve(
        self,
        socket: BoundSocket,
        succeeded: CancellationToken,
        shutdown: impl Future<Output = ()>,
    ) -> Result<(), SocketError> {
        let Self { method, slots, service, stop } = self;
        let BoundSocket { listener, file } = socket;
        let path = file.path().to_owned();
        let (admission, limit) = (service.clone(), service.limits().connections);
        let admit = move |caller: &Caller| -> Option<Slot> {
            let payer = match admission.workload_of(caller) {
                Ok(Some(workload)) => Payer::Workload(workload.key),
                // Who has none is told so at its call; here it only is counted.
                Ok(None) | Err(_) => Payer::User(caller.uid()),
            };
            let slot = slots.take(&payer, limit);
            admission.counters().connection(slot.is_some());
            slot
        };
        let counters = Arc::clone(service.counters());
        let reception = Reception { listener, method, admit, counters };
        let tasks = TaskTracker::new();
        tasks.spawn(sweep(service.clone(), stop.clone()));
        let serving = Server::builder()
            // More than a workload may have, so that who asks for more is told, not stalled.
            .max_concurrent_streams(service.limits().calls.saturating_add(16) as u32)
            .http2_max_header_list_size(8 * 1024)
            .http2_keepalive_interval(Some(Duration::from_secs(60)))
            .add_service(service.into_server(MAX_REQUEST))
            .serve_with_incoming(Box::pin(
                reception.connections().take_until(succeeded.clone().cancelled_owned()),
            ));
        let serving = async {
            // It returns when nothing more comes in.
            serving.await.map_err(|source| SocketError::Serve { path, source })?;
            if succeeded.is_cancelled() {
                file.leave();
                std::future::pending::<()>().await;
            }
            Ok(())
        };
        let result = tokio::select! {
            result = serving => result,
            () = shutdown => Ok(()),
        };
        stop.cancel();
        tasks.close();
        tasks.wait().await;
        result
    }
}

impl WorkloadApiHandle {
    /// The SVIDs that workloads have, with their state.
    pub fn svids(&self) -> &SvidHandle<WorkloadKey> {
        &self.svids
    }

    /// What was counted.
    pub fn counters(&self) -> &Counters {
        &self.counters
    }
}

/// Forgets SVIDs of pods that are gone at once, idle ones from time to time.
async fn sweep(service: Service, stop: CancellationToken) {
    let mut states = service.states();
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            changed = states.changed() => {
                if changed.is_err() {
                    return;
                }
            }
            () = time::sleep(SWEEP_EVERY) => {}
        }
        service.sweep(Instant::now());
    }
}

#[cfg(test)]
pub(crate) mod tests;
