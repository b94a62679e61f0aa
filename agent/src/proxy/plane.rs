//! What all cores share.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use arc_swap::ArcSwap;
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use super::{
    certificates::Certificates,
    counters::Counters,
    dial::{DialError, TunnelKey},
    flow_ids::FlowIds,
    open_flows::OpenFlows,
    served::Served,
    sockets::PodSockets,
};
use crate::{
    config::{Limits, values::TunnelWire},
    endpoint::state::{EndpointKey, NodeStateHandle},
    flow::Recorder,
    spiffe::Svid,
    svid::SvidHandle,
    trust::Trust,
    tunnel::{
        hbone,
        pool::{Pool, Stamp},
    },
};

/// How the data plane behaves.
#[derive(Clone)]
pub struct DataPlaneConfig {
    /// Runtimes, one thread each; at least one.
    pub cores: usize,
    /// Limits of one endpoint.
    pub limits: Limits,
    /// A TLS handshake must be through by then, in either role.
    pub handshake_timeout: Duration,
    /// A TCP connection to a peer's node must be there by then.
    pub connect_timeout: Duration,
    /// An application must have accepted by then.
    pub app_timeout: Duration,
    /// Open flows that go direct from a pod that has turned strict end after this.
    pub strict_grace: Duration,
    /// What tunnels may carry.
    pub wires: TunnelWire,
    /// Windows, limits and timers of HTTP/2; those of requests and of idle connections hold for
    /// the native wire, too.
    pub hbone: hbone::Settings,
}

impl DataPlaneConfig {
    /// The defaults for these limits on this machine.
    pub fn new(limits: Limits, strict_grace: Duration) -> Self {
        Self {
            cores: std::thread::available_parallelism().map_or(1, usize::from),
            limits,
            handshake_timeout: Duration::from_secs(10),
            connect_timeout: Duration::from_secs(10),
            app_timeout: Duration::from_secs(10),
            strict_grace,
            wires: TunnelWire::Auto,
            hbone: hbone::Settings::default(),
        }
    }
}

/// Shared by all cores.
pub struct Plane {
    pub(super) config: DataPlaneConfig,
    pub(super) limits: ArcSwap<Limits>,
    pub(super) state: NodeStateHandle,
    pub(super) sockets: PodSockets,
    pub(super) svids: SvidHandle,
    pub(super) trust: Arc<Trust>,
    pub(super) recorder: Recorder,
    pub(super) certificates: Certificates,
    pub(super) counters: Counters,
    pub(super) flow_ids: Arc<FlowIds>,
    /// The endpoints whose listeners are served.
    pub(super) endpoints: Mutex<HashMap<EndpointKey, Arc<Served>>>,
    /// Takes nothing new any more.
    pub(super) drain: CancellationToken,
    /// Another process has the listeners: while this one drains, what reaches it all the same
    /// is served.
    pub(super) succeeded: AtomicBool,
    /// Everything ends now.
    pub(super) cut: CancellationToken,
}

impl Plane {
    /// True once another process serves the endpoints.
    pub(super) fn is_succeeded(&self) -> bool {
        self.succeeded.load(Ordering::Acquire)
    }

    /// The endpoints whose listeners are served; never hold it across an await.
    pub(super) fn served(&self) -> MutexGuard<'_, HashMap<EndpointKey, Arc<Served>>> {
        // A panic under the lock leaves a whole map behind.
        self.endpoints.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What a connection made with this SVID now is authenticated with.
    pub(super) fn stamp(&self, svid: &Svid) -> Stamp {
        Stamp {
            trust: self.trust.generation(),
            svid_from: svid.not_before.as_second(),
            svid_until: svid.not_after.as_second(),
        }
    }
}

/// What everything on one core shares.
pub struct Core {
    pub(super) plane: Arc<Plane>,
    pub(super) open_flows: Arc<OpenFlows>,
    pub(super) pool: Pool<TunnelKey, DialError>,
    /// Owns every task of a flow or a connection.
    pub(super) tracker: TaskTracker,
}
