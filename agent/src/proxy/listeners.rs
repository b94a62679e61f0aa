//! Endpoints' listeners: taken over from the reconciler, accepted from, given up.

use std::{os::fd::OwnedFd, sync::Arc, time::Duration};

use rustix::io::Errno;
use tokio::{net::TcpListener, sync::mpsc, time::sleep};

use super::{
    cores::{Cores, Job, Side, serve},
    plane::{Core, Plane},
    served::Served,
};
use crate::endpoint::sockets::ListenerCommand;

/// How long a listener rests when the process is out of descriptors or memory.
const REST: Duration = Duration::from_millis(50);

/// Follows the reconciler's commands until it is gone.
pub async fn follow(
    plane: Arc<Plane>,
    cores: Arc<Cores>,
    mut commands: mpsc::UnboundedReceiver<ListenerCommand>,
) {
    let mut next = 0usize;
    while let Some(command) = commands.recv().await {
        match command {
            ListenerCommand::Serve { key, netns, outbound, inbound } => {
                let known = plane.served().get(&key).filter(|s| !s.drain.is_cancelled()).cloned();
                let served = known
                    .unwrap_or_else(|| Served::new(key.clone(), netns, &plane.drain, &plane.cut));
                tracing::debug!(
                    pod.uid = %key.uid,
                    outbound = outbound.len(),
                    inbound = inbound.len(),
                    "serving endpoint"
                );
                plane.served().insert(key, served.clone());
                let outbound = outbound.into_iter().map(|fd| (fd, Side::Outbound));
                let inbound = inbound.into_iter().map(|fd| (fd, Side::Inbound));
                for (listener, side) in outbound.chain(inbound) {
                    cores.give(next, Job::Listen(listener, side, served.clone()));
                    next = next.wrapping_add(1);
                }
            }
            ListenerCommand::Stop { key, drain } => {
                let stopped = plane.served().remove(&key);
                if let Some(served) = stopped {
                    tracing::debug!(pod.uid = %key.uid, ?drain, "endpoint stops");
                    served.drain.cancel();
                    cut_after(&cores, served, drain);
                }
            }
        }
    }
}

/// Ends what is left of a stopped endpoint.
fn cut_after(cores: &Cores, served: Arc<Served>, drain: Duration) {
    if drain.is_zero() {
        served.cut.cancel();
        return;
    }
    if let Some(core) = cores.iter().next() {
        let over = core.plane.cut.clone();
        // Not one of the flows' tasks: nobody who drains waits for it.
        tokio::spawn(async move {
            tokio::select! {
                () = sleep(drain) => served.cut.cancel(),
                () = over.cancelled() => {}
            }
        });
    }
}

/// Accepts from one listener and spreads the sockets over the cores.
pub async fn accept(
    cores: Arc<Cores>,
    core: Arc<Core>,
    here: usize,
    listener: OwnedFd,
    side: Side,
    served: Arc<Served>,
) {
    let listener = match TcpListener::from_std(listener.into()) {
        Ok(listener) => listener,
        Err(error) => {
            core.plane.counters.failed("listener");
            tracing::error!(
                pod.uid = %served.key.uid,
                %error,
                "a listener cannot be watched; the pod's connections will be refused"
            );
            return;
        }
    };
    loop {
        let accepted = tokio::select! {
            biased;
            () = served.drain.cancelled() => return,
            accepted = listener.accept() => accepted,
        };
        let handed_over = accepted.and_then(|(stream, _)| {
            let there = cores.least_loaded(here);
            if there == here {
                serve(&core, stream, side, served.clone());
            } else {
                cores.give(there, Job::Serve(stream.into_std()?, side, served.clone()));
            }
            Ok(())
        });
        match handed_over {
            Ok(()) => {}
            Err(error) => match Errno::from_io_error(&error) {
                // The client has gone already.
                Some(Errno::CONNABORTED | Errno::INTR | Errno::PROTO) => {}
                _ => {
                    core.plane.counters.failed("accept");
                    tracing::warn!(pod.uid = %served.key.uid, %error, "accept failed; retrying");
                    sleep(REST).await;
                }
            },
        }
    }
}
