//! The runtimes: one thread a core, everything of a flow on one of them.

use std::{
    future::Future,
    io,
    net::TcpStream as StdTcpStream,
    os::fd::OwnedFd,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use signet_ebpf::abi::{Direction, Mode, Reason};
use tokio::{
    net::TcpStream,
    runtime::{Builder, Runtime},
    sync::{mpsc, watch},
    time::{MissedTickBehavior, interval, sleep_until},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use super::{
    dial, inbound,
    judge::{Facts, asks_requests, judge},
    listeners,
    open_flows::Fate,
    outbound,
    plane::{Core, Plane},
    resolve::{Path, Source, route},
    served::Served,
};
use crate::{
    endpoint::state::{EndpointKey, NodeState},
    tunnel::pool::Pool,
};

/// How often idle and stale tunnel connections are looked for.
const SWEEP_EVERY: Duration = Duration::from_secs(15);

/// Which of an endpoint's listeners a socket belongs to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Side {
    /// Redirected clients.
    Outbound,
    /// Tunnels.
    Inbound,
}

/// What a core is given to do.
pub enum Job {
    /// Accept from a listener.
    Listen(OwnedFd, Side, Arc<Served>),
    /// Serve an accepted socket.
    Serve(StdTcpStream, Side, Arc<Served>),
}

/// Hands jobs to cores.
pub struct Cores {
    cores: Vec<Handle>,
}

struct Handle {
    jobs: mpsc::UnboundedSender<Job>,
    /// Jobs handed over and not yet begun.
    waiting: Arc<AtomicUsize>,
    core: Arc<Core>,
}

/// A core that is not running yet.
pub struct Idle {
    runtime: Runtime,
    core: Arc<Core>,
    jobs: mpsc::UnboundedReceiver<Job>,
    waiting: Arc<AtomicUsize>,
}

impl Cores {
    /// Makes the cores; [`Idle::start`] starts each.
    ///
    /// # Errors
    /// Where the kernel gives no epoll instance.
    pub fn new(plane: &Arc<Plane>) -> io::Result<(Arc<Self>, Vec<Idle>)> {
        let mut idle = Vec::new();
        let mut cores = Vec::new();
        for _ in 0..plane.config.cores.max(1) {
            let tracker = TaskTracker::new();
            let core = Arc::new(Core {
                plane: plane.clone(),
                open_flows: Arc::default(),
                pool: Pool::new(tracker.clone()),
                tracker,
            });
            let (jobs, receiver) = mpsc::unbounded_channel();
            let waiting = Arc::new(AtomicUsize::new(0));
            let runtime = Builder::new_current_thread().enable_all().build()?;
            idle.push(Idle {
                runtime,
                core: core.clone(),
                jobs: receiver,
                waiting: waiting.clone(),
            });
            cores.push(Handle { jobs, waiting, core });
        }
        Ok((Arc::new(Self { cores }), idle))
    }

    /// Every core's share.
    pub fn iter(&self) -> impl Iterator<Item = &Arc<Core>> {
        self.cores.iter().map(|handle| &handle.core)
    }

    /// Gives a job to one core; a core that has ended gives it up, which closes sockets.
    pub fn give(&self, index: usize, job: Job) {
        if let Some(handle) = self.cores.get(index % self.cores.len().max(1)) {
            handle.waiting.fetch_add(1, Ordering::Relaxed);
            if handle.jobs.send(job).is_err() {
                handle.waiting.fetch_sub(1, Ordering::Relaxed);
            }
        }
    }

    /// The core that has least to do; `here` where it is not busier than any other, which
    /// spares the way to another thread.
    pub fn least_loaded(&self, here: usize) -> usize {
        let load =
            |handle: &Handle| handle.core.tracker.len() + handle.waiting.load(Ordering::Relaxed);
        let mut best = (here, self.cores.get(here).map_or(usize::MAX, load));
        for (index, handle) in self.cores.iter().enumerate() {
            let load = load(handle);
            if load < best.1 {
                best = (index, load);
            }
        }
        best.0
    }
}

impl Idle {
    /// Lets a task run on the core beside its flows.
    pub fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        self.runtime.spawn(task);
    }

    /// Starts the core's thread, which runs until `stop`. When it ends otherwise, `failed`
    /// says so: without its core, the node's flows hang.
    ///
    /// # Errors
    /// Where no thread can be made.
    pub fn start(
        self,
        index: usize,
        cores: Arc<Cores>,
        stop: CancellationToken,
        failed: watch::Sender<Option<String>>,
    ) -> io::Result<JoinHandle<()>> {
        let name = format!("core-{index}");
        thread::Builder::new().name(name.clone()).spawn(move || {
            let ended = Ended { name, stop: stop.clone(), failed };
            let Self { runtime, core, jobs, waiting } = self;
            runtime.block_on(run(core, index, cores, jobs, waiting, stop));
            // Flows that outlived the deadline are cut here.
            runtime.shutdown_timeout(Duration::from_secs(1));
            drop(ended);
        })
    }
}

/// Tells of a thread's end, also by a panic.
struct Ended {
    name: String,
    stop: CancellationToken,
    failed: watch::Sender<Option<String>>,
}

impl Drop for Ended {
    fn drop(&mut self) {
        if !self.stop.is_cancelled() {
            let why = format!("the data plane's thread {} ended", self.name);
            self.failed.send_replace(Some(why));
        }
    }
}

async fn run(
    core: Arc<Core>,
    index: usize,
    cores: Arc<Cores>,
    mut jobs: mpsc::UnboundedReceiver<Job>,
    waiting: Arc<AtomicUsize>,
    stop: CancellationToken,
) {
    let upkeep = async {
        tokio::join!(rejudge(&core), sweep(&core, index == 0));
    };
    let work = async {
        while let Some(job) = jobs.recv().await {
            begin(&core, index, &cores, job);
            waiting.fetch_sub(1, Ordering::Relaxed);
        }
    };
    tokio::select! {
        () = stop.cancelled() => {}
        () = work => {}
        () = upkeep => {}
    }
}

fn begin(core: &Arc<Core>, index: usize, cores: &Arc<Cores>, job: Job) {
    match job {
        Job::Listen(socket, side, served) => {
            let task = listeners::accept(cores.clone(), core.clone(), index, socket, side, served);
            core.tracker.spawn(task);
        }
        Job::Serve(socket, side, served) => match TcpStream::from_std(socket) {
            Ok(stream) => serve(core, stream, side, served),
            Err(error) => {
                core.plane.counters.failed("socket");
                tracing::warn!(%error, "an accepted socket cannot be watched; it is closed");
            }
        },
    }
}

/// Serves an accepted socket on this core.
pub fn serve(core: &Arc<Core>, stream: TcpStream, side: Side, served: Arc<Served>) {
    let core_of_task = core.clone();
    match side {
        Side::Outbound => core.tracker.spawn(outbound::serve(core_of_task, served, stream)),
        Side::Inbound => core.tracker.spawn(inbound::serve(core_of_task, served, stream)),
    };
}

/// Judges the open flows again with every state. (A change of trust is the connections'
/// affair: whoever is not trusted any more loses all of its flows.)
async fn rejudge(core: &Core) {
    let plane = &core.plane;
    let mut states = plane.state.subscribe();
    // Somebody is condemned and has to go then.
    let mut due: Option<Instant> = None;
    let never = Instant::now() + Duration::from_secs(365 * 86400);
    loop {
        let ended = tokio::select! {
            changed = states.changed() => changed.is_err(),
            () = sleep_until(due.unwrap_or(never).into()) => false,
        };
        let state = plane.state.current();
        due = core.open_flows.rejudge(Instant::now(), |key, facts| fate(plane, &state, key, facts));
        let is_registered = |key: &EndpointKey| {
            state.endpoints.get(&key.netns).is_some_and(|endpoint| endpoint.key == *key)
        };
        core.pool.retain(|key| is_registered(&key.source));
        if ended {
            // The publisher is gone: nothing will change again in this process.
            std::future::pending::<()>().await;
        }
    }
}

/// What becomes of an open flow under a new state.
fn fate(plane: &Plane, state: &NodeState, key: &EndpointKey, facts: &Facts) -> Fate {
    let Some(endpoint) = state.endpoints.get(&key.netns).filter(|e| e.key == *key) else {
        // Its listeners are being stopped; that ends its flows in their time.
        return Fate::Keep;
    };
    // What is copied unseen cannot go on where requests count.
    let is_unseen = !facts.by_request && asks_requests(state, endpoint, facts);
    if is_unseen || !judge(state, endpoint, facts).passes() {
        return Fate::Close(Reason::RightWithdrawn);
    }
    if facts.direction == Direction::Egress && !facts.proven && endpoint.mode == Mode::Strict {
        let source = Source {
            mode: endpoint.mode,
            addresses: &endpoint.addresses,
            node: endpoint.pod.node.as_deref(),
        };
        let there = std::net::SocketAddr::new(facts.peer_ip, facts.port);
        let still_direct =
            route(&state.world, source, there, 0).is_ok_and(|r| matches!(r.path, Path::Direct(_)));
        if !still_direct {
            return Fate::CloseAfter(plane.config.strict_grace, Reason::RightWithdrawn);
        }
    }
    Fate::Keep
}

/// Closes idle and stale tunnel connections; the first core also forgets old keys.
async fn sweep(core: &Core, first: bool) {
    let plane = &core.plane;
    let mut ticks = interval(SWEEP_EVERY);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        core.pool.sweep(|key| dial::current_stamp(plane, &key.identity));
        if first {
            plane.certificates.sweep(|id| plane.svids.get(id));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn size_of_future<A, B, C, F: Future>(_: impl Fn(A, B, C) -> F) -> usize {
        size_of::<F>()
    }

    /// What a flow's task takes while the flow is open: steps that only open it are boxed.
    #[test]
    fn a_flows_task_is_small() {
        let (outbound, inbound) = (size_of_future(outbound::serve), size_of_future(inbound::serve));
        assert!(outbound <= 4608 && inbound <= 6144, "{outbound} and {inbound} bytes");
    }
}
