//! This agent after another one, and another one after it: the sockets that belong to the node,
//! and what happens around a hand-over.

use std::{
    path::Path,
    time::{Duration, Instant},
};

use tokio::{
    signal::unix::Signal,
    sync::{oneshot, watch},
    task::JoinHandle,
};
use tokio_util::sync::CancellationToken;

use super::DaemonError;
use crate::{
    admin::{
        Succession,
        socket::{AdminSocket, path_in},
    },
    config::AgentConfig,
    endpoint::reconcile::Control,
    handover::{self, Hello, NodeSocket, NodeSockets, Taken, channel::Channel, take},
    proxy::DataPlaneHandle,
    socket_file::{BoundSocket, SocketError},
    workload_api,
};

/// An agent whose place is taken, with nothing left to do, waits so long to be told to end.
/// Whoever supervises it would start it again, and it would take the node back.
const LINGER: Duration = Duration::from_secs(600);

/// An agent that was told to end, and hands nothing over, does so within this.
const ENDS_WITHIN: Duration = Duration::from_secs(20);

/// What runs in one process only stops within this.
const STOPS_WITHIN: Duration = Duration::from_secs(5);

/// The sockets that belong to the node's agent, whichever process that is.
pub(super) struct Sockets {
    pub(super) admin: BoundSocket,
    pub(super) workload: BoundSocket,
    pub(super) handover: BoundSocket,
}

impl Sockets {
    /// Binds them, where nobody else has them.
    pub(super) fn bind(config: &AgentConfig) -> Result<Self, SocketError> {
        Ok(Self {
            admin: AdminSocket::bind(&config.run_dir)?.into_bound(),
            workload: workload_api::bind(&config.workload_socket())?,
            handover: handover::bind(&config.run_dir)?,
        })
    }

    /// The same, where an agent that is ending may have them for a moment.
    pub(super) async fn bind_soon(config: &AgentConfig) -> Result<Self, SocketError> {
        let deadline = Instant::now() + ENDS_WITHIN;
        let mut told = false;
        loop {
            match Self::bind(config) {
                Err(error @ SocketError::InUse { .. }) if Instant::now() < deadline => {
                    if !told {
                        tracing::info!(%error, "an agent that does not hand over is on this node: waiting until it has ended");
                        told = true;
                    }
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
                outcome => return outcome,
            }
        }
    }

    /// Those that were handed over; what this agent has elsewhere is bound there.
    fn adopt(config: &AgentConfig, given: NodeSockets) -> Result<Self, SocketError> {
        let mut given: std::collections::BTreeMap<_, _> = given.into_iter().collect();
        let mut adopt = |which, path: &Path| {
            given.remove(&which).map(|descriptor| BoundSocket::adopt(descriptor, path))
        };
        let admin = adopt(NodeSocket::Admin, &path_in(&config.run_dir));
        let handover = adopt(NodeSocket::Handover, &handover::path_in(&config.run_dir));
        let workload_path = config.workload_socket();
        let workload = match adopt(NodeSocket::Workload, &workload_path) {
            Some(Ok(workload)) => workload,
            // Configured elsewhere.
            Some(Err(error)) => {
                tracing::info!(%error, "the Workload API's socket is another one now");
                workload_api::bind(&workload_path)?
            }
            None => workload_api::bind(&workload_path)?,
        };
        Ok(Self {
            admin: match admin {
                Some(admin) => admin?,
                None => AdminSocket::bind(&config.run_dir)?.into_bound(),
            },
            handover: match handover {
                Some(handover) => handover?,
                None => handover::bind(&config.run_dir)?,
            },
            workload,
        })
    }

    /// Their files go with this process from now on.
    fn own(&mut self) {
        for socket in [&mut self.admin, &mut self.workload, &mut self.handover] {
            if let Err(error) = socket.file.own() {
                let path = socket.file.path().display().to_string();
                tracing::error!(path, %error, "the socket's file is gone");
            }
        }
    }

    /// They once more, for a successor.
    pub(super) fn descriptors(&self) -> Result<NodeSockets, SocketError> {
        Ok(vec![
            (NodeSocket::Admin, self.admin.descriptor()?),
            (NodeSocket::Workload, self.workload.descriptor()?),
            (NodeSocket::Handover, self.handover.descriptor()?),
        ])
    }
}

/// Who this agent is, for the one that serves.
pub(super) fn hello(config: &AgentConfig) -> Hello {
    Hello {
        node: config.node.clone(),
        instance: config.instance.clone(),
        bpffs: config.bpffs.display().to_string(),
        cgroup_root: config.cgroup_root.clone(),
        version: env!("CARGO_PKG_VERSION").into(),
        abi: signet_ebpf::abi::ABI_VERSION,
    }
}

/// Takes the place of the agent that serves, once this one could; `before` is called in between,
/// while nothing is counted by either. Without such an agent (any more) it is as at any start.
pub(super) async fn take_place(
    config: &AgentConfig,
    control: &Control,
    place: &watch::Sender<Succession>,
    before: impl AsyncFnOnce(),
) -> Result<(Sockets, Option<Channel>), DaemonError> {
    tracing::info!("another agent serves the node: this one gets ready to take over");
    let waits = |why: &str| {
        place.send_if_modified(|place| {
            let now = Succession::Waits(why.into());
            let changed = *place != now;
            if changed {
                tracing::info!(why, "not taking over yet");
                *place = now;
            }
            changed
        });
    };
    let taken = take(&handover::path_in(&config.run_dir), &hello(config), control, waits).await?;
    let Some(taken) = taken else {
        tracing::warn!("the agent that served the node is gone: its pods were closed meanwhile");
        let sockets = Sockets::bind_soon(config).await?;
        before().await;
        if let Err(why) = control.take_over(None).await {
            // As at any start: it is tried again.
            tracing::info!(why, "not everything is applied yet");
        }
        place.send_replace(Succession::Serves);
        return Ok((sockets, None));
    };
    let (endpoints, sockets, mut channel) = taken.into_parts();
    tracing::info!(endpoints = endpoints.len(), "taking over");
    let mut sockets = Sockets::adopt(config, sockets)?;
    before().await;
    control.take_over(Some(endpoints)).await.map_err(|why| DaemonError::TakeOver { why })?;
    place.send_replace(Succession::Serves);
    if let Err(error) = Taken::done(&mut channel).await {
        tracing::warn!(%error, "the old agent does not hear that this one serves");
    }
    sockets.own();
    tracing::info!("this agent serves the node");
    Ok((sockets, Some(channel)))
}

/// What may run in one process of a node only, and stops for a hand-over.
pub(super) struct Alone<F> {
    start: F,
    stop: CancellationToken,
    tasks: Vec<Task>,
}

/// A part of the agent with its name; it completes with why it ended.
pub(super) type Task = (&'static str, JoinHandle<String>);

impl<F: FnMut(&CancellationToken) -> Vec<Task>> Alone<F> {
    /// Starts it: tasks that end when their token is cancelled.
    pub(super) fn start(mut start: F) -> Self {
        let stop = CancellationToken::new();
        Self { tasks: start(&stop), start, stop }
    }

    /// Stops it, and waits until it has stopped.
    pub(super) async fn pause(&mut self) {
        self.stop.cancel();
        for (part, mut task) in std::mem::take(&mut self.tasks) {
            if tokio::time::timeout(STOPS_WITHIN, &mut task).await.is_err() {
                tracing::warn!(part, within = ?STOPS_WITHIN, "it does not stop in time");
                task.abort();
                let _ = task.await;
            }
        }
    }

    /// Starts it again.
    pub(super) fn go_on(&mut self) {
        if self.tasks.is_empty() {
            self.stop = CancellationToken::new();
            self.tasks = (self.start)(&self.stop);
        }
    }

    /// Completes when a part of it ends by itself, with what it was and why.
    pub(super) async fn ended(&mut self) -> (&'static str, String) {
        if self.tasks.is_empty() {
            return std::future::pending().await;
        }
        let waiting = self.tasks.iter_mut().map(|(part, task)| {
            Box::pin(async move { (*part, task.await.unwrap_or_else(|e| e.to_string())) })
        });
        let (ended, index, _) = futures_util::future::select_all(waiting).await;
        drop(self.tasks.swap_remove(index));
        ended
    }
}

/// A part of what runs [`Alone`]: its work until it is stopped.
pub(super) fn task(
    part: &'static str,
    stop: &CancellationToken,
    work: impl Future<Output = String> + Send + 'static,
) -> Task {
    let stop = stop.clone();
    let until_then = async move {
        tokio::select! {
            () = stop.cancelled() => String::new(),
            why = work => why,
        }
    };
    (part, tokio::spawn(until_then))
}

/// Finishes what this process has accepted, in the time that it has for it; then waits to be
/// told to end.
pub(super) async fn retire(
    plane: &DataPlaneHandle,
    within: Duration,
    terminate: &mut Signal,
    interrupt: &mut Signal,
    mut blind: impl AsyncFnMut(),
) {
    let drain = plane.retire(within);
    tokio::pin!(drain);
    let mut told = false;
    let mut sees = true;
    loop {
        tokio::select! {
            () = &mut drain => break,
            _ = terminate.recv() => told = true,
            _ = interrupt.recv() => {
                told = true;
                plane.cut();
            }
            () = blind(), if sees => {
                // Nobody takes rights away any more.
                sees = false;
                plane.cut();
            }
        }
    }
    tracing::info!("nothing is left to be done here");
    if !told {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
            () = tokio::time::sleep(LINGER) => {}
        }
    }
}

/// Answers with the sockets; a successor that has none of them would be none.
pub(super) fn answer(reply: oneshot::Sender<NodeSockets>, sockets: &NodeSockets) {
    let all = sockets.iter().map(|(which, fd)| Ok((*which, fd.try_clone()?)));
    match all.collect::<std::io::Result<NodeSockets>>() {
        Ok(all) => drop(reply.send(all)),
        Err(error) => tracing::error!(%error, "the node's sockets cannot be handed over"),
    }
}
