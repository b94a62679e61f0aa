//! The data plane: carries the flows of this node's endpoints.
//!
//! [`DataPlane::start`] makes one thread with a runtime a core. Each accepted socket goes
//! to the core that has least to do and stays there with everything that belongs to its
//! flow: [`outbound`] at the source, [`inbound`] at the destination. Who may talk to whom is
//! read from the [`NodeState`](crate::endpoint::state::NodeState) flow by flow, and again
//! for every open flow when it changes ([`open_flows`]).

mod certificates;
mod cores;
mod counters;
mod delivery;
mod dial;
mod flow_ids;
pub mod http;
mod inbound;
mod judge;
mod listeners;
mod open_flows;
mod outbound;
mod plaintext;
mod plane;
mod records;
mod resolve;
mod served;
mod sockets;
#[cfg(test)]
mod tests;

use std::{
    collections::BTreeMap,
    io,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
    time::Duration,
};

use arc_swap::ArcSwap;
use tokio::{
    sync::{mpsc, watch},
    time::{Instant, timeout, timeout_at},
};
use tokio_util::sync::CancellationToken;

pub use plane::DataPlaneConfig;

use self::{
    certificates::Certificates, cores::Cores, counters::Counters, plane::Plane, sockets::PodSockets,
};
use crate::{
    config::Limits,
    endpoint::{
        sockets::ListenerCommand,
        state::{EndpointKey, NodeStateHandle},
    },
    flow::Recorder,
    kernel::FlowSockets,
    netns::NetnsOpener,
    svid::SvidHandle,
    trust::Trust,
};

/// How long what was cut may take to go.
const CUT_WITHIN: Duration = Duration::from_secs(2);

/// How often the pools are emptied while flows finish.
const POOL_EMPTIED_EVERY: Duration = Duration::from_millis(100);

/// What the data plane works with.
pub struct Dependencies {
    /// Who is here, and under which policies.
    pub state: NodeStateHandle,
    /// Makes sockets inside pods' network namespaces.
    pub opener: NetnsOpener,
    /// Addresses that travel with sockets.
    pub flow_sockets: Arc<FlowSockets>,
    /// Our identities.
    pub svids: SvidHandle,
    /// Whom we trust.
    pub trust: Arc<Trust>,
    /// Takes the records.
    pub recorder: Recorder,
    /// Which listeners to serve.
    pub commands: mpsc::UnboundedReceiver<ListenerCommand>,
}

/// Starts the data plane.
pub struct DataPlane;

impl DataPlane {
    /// Starts its threads.
    ///
    /// # Errors
    /// Where the kernel gives no thread or no epoll instance.
    pub fn start(config: DataPlaneConfig, deps: Dependencies) -> io::Result<DataPlaneHandle> {
        let sockets = PodSockets::kernel(deps.opener, deps.flow_sockets);
        let plane = Plane {
            limits: ArcSwap::from_pointee(config.limits),
            certificates: Certificates::new(config.handshake_timeout, config.wires),
            config,
            state: deps.state,
            sockets,
            svids: deps.svids,
            trust: deps.trust,
            recorder: deps.recorder,
            counters: Counters::default(),
            flow_ids: Arc::default(),
            endpoints: Mutex::default(),
            drain: CancellationToken::new(),
            succeeded: AtomicBool::new(false),
            cut: CancellationToken::new(),
        };
        start(Arc::new(plane), deps.commands)
    }
}

fn start(
    plane: Arc<Plane>,
    commands: mpsc::UnboundedReceiver<ListenerCommand>,
) -> io::Result<DataPlaneHandle> {
    let (cores, idle) = Cores::new(&plane)?;
    let stop = CancellationToken::new();
    let (failed, failure) = watch::channel(None);
    let mut commands = Some(commands);
    let mut threads = Vec::new();
    for (index, idle) in idle.into_iter().enumerate() {
        if let Some(commands) = commands.take() {
            idle.spawn(listeners::follow(plane.clone(), cores.clone(), commands));
        }
        threads.push(idle.start(index, cores.clone(), stop.clone(), failed.clone())?);
    }
    Ok(DataPlaneHandle { plane, cores, stop, failure, threads: Mutex::new(threads) })
}

/// The running data plane; when it is dropped, its threads end and flows are cut.
pub struct DataPlaneHandle {
    plane: Arc<Plane>,
    cores: Arc<Cores>,
    stop: CancellationToken,
    failure: watch::Receiver<Option<String>>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

/// What the data plane is doing and has done.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Stats {
    /// Flows that are open or being opened.
    pub open_flows: usize,
    /// Tasks: accept loops, flows, connections.
    pub tasks: usize,
    /// Tunnel connections that may take new flows, as a client.
    pub pooled_connections: usize,
    /// Handshakes that succeeded, as a client.
    pub dialled: u64,
    /// Handshakes that succeeded, as a server.
    pub accepted: u64,
    /// Flows that were let through.
    pub forwarded: u64,
    /// Flows and connections that were refused.
    pub refused: u64,
    /// Flows whose client left before they were decided.
    pub abandoned: u64,
    /// Sockets that reached an outbound listener without having been redirected.
    pub unattributed: u64,
    /// Flows whose client showed an SVID, from an address of another account's pod.
    pub misplaced: u64,
    /// Failed dials, handshakes and connections by kind.
    pub failures: BTreeMap<&'static str, u64>,
}

impl DataPlaneHandle {
    /// Numbers, as of now.
    pub fn stats(&self) -> Stats {
        let counters = &self.plane.counters;
        let cores = || self.cores.iter();
        Stats {
            open_flows: cores().map(|c| c.open_flows.count()).sum(),
            tasks: cores().map(|c| c.tracker.len()).sum(),
            pooled_connections: cores().map(|c| c.pool.connections()).sum(),
            dialled: counters.dialled.load(Ordering::Relaxed),
            accepted: counters.accepted.load(Ordering::Relaxed),
            forwarded: counters.forwarded.load(Ordering::Relaxed),
            refused: counters.refused.load(Ordering::Relaxed),
            abandoned: counters.abandoned.load(Ordering::Relaxed),
            unattributed: counters.unattributed.load(Ordering::Relaxed),
            misplaced: counters.misplaced.load(Ordering::Relaxed),
            failures: counters.failures(),
        }
    }

    /// How many flows an endpoint has open; none when it is not served.
    pub fn open_flows_of(&self, key: &EndpointKey) -> usize {
        self.plane.served().get(key).map_or(0, |served| served.open_flows() as usize)
    }

    /// Changes the limits; what is over a new one stays, nothing is added.
    pub fn set_limits(&self, limits: Limits) {
        self.plane.limits.store(Arc::new(limits));
    }

    /// Completes, with the reason, when a thread has ended that must not.
    pub async fn failed(&self) -> String {
        let mut failure = self.failure.clone();
        match failure.wait_for(Option::is_some).await {
            Ok(why) => why.clone().unwrap_or_default(),
            // Every thread has ended in order.
            Err(_) => std::future::pending().await,
        }
    }

    /// As [`DataPlaneHandle::drain`], after another process has got the listeners: requests that
    /// are on their way on connections of this one are served, not refused.
    pub async fn retire(&self, within: Duration) {
        self.plane.succeeded.store(true, Ordering::Release);
        self.drain(within).await;
    }

    /// Ends a drain before its time.
    pub fn cut(&self) {
        self.plane.cut.cancel();
    }

    /// Accepts nothing more, says goodbye to peers, lets flows finish until `within` has
    /// passed, then cuts them and ends the threads.
    pub async fn drain(&self, within: Duration) {
        let deadline = Instant::now() + within;
        self.plane.drain.cancel();
        for core in self.cores.iter() {
            core.tracker.close();
        }
        let finished = timeout_at(deadline, self.finished()).await.is_ok();
        if !finished {
            let left = self.stats().open_flows;
            tracing::warn!(flows = left, ?within, "flows are cut at the end of the drain");
            self.plane.cut.cancel();
            // What does not go now goes with its runtime.
            let _ = timeout(CUT_WITHIN, self.finished()).await;
        }
        self.stop.cancel();
        let threads =
            std::mem::take(&mut *self.threads.lock().unwrap_or_else(PoisonError::into_inner));
        let joined = tokio::task::spawn_blocking(move || {
            for thread in threads {
                // A panic there has been told by `failed`.
                let _ = thread.join();
            }
        });
        let _ = joined.await;
    }

    async fn finished(&self) {
        for core in self.cores.iter() {
            loop {
                // Pooled connections end with their last flow; a flow that is still being
                // opened may put another one in.
                core.pool.retain(|_| false);
                if timeout(POOL_EMPTIED_EVERY, core.tracker.wait()).await.is_ok() {
                    break;
                }
            }
        }
    }
}

impl Drop for DataPlaneHandle {
    fn drop(&mut self) {
        self.plane.cut.cancel();
        self.stop.cancel();
    }
}
