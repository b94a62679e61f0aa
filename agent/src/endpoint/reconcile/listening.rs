//! Endpoints' listeners and sk_lookup programs: opened before a pod is served, stopped after
//! the kernel steers nothing to them any more.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use signet_ebpf::abi::{ListenerKey, Mode};

use super::{
    super::{
        plan::{self, Params, Plan},
        sockets::{self, ListenerCommand},
        state::EndpointKey,
    },
    Listeners, RETRY, ReconcileError, Reconciler, Role, own_pods,
};
use crate::{
    cluster::model::World,
    kernel::{KernelError, Maps},
    netns::NetnsFd,
};

/// Pods that get their listeners in one turn: a storm of new pods must not hold the others
/// (those that are off, above all) up.
const PODS_A_TURN: usize = 16;

const AF_INET: u32 = 2;
const AF_INET6: u32 = 10;

impl Reconciler {
    /// Opens and hands over the listeners of pods that are enforced and have none.
    pub(super) async fn open_listeners(
        &mut self,
        world: &World,
        params: &Params,
        backlog: u32,
        now: Instant,
    ) -> Result<bool, ReconcileError> {
        let mut opened = false;
        let mut left = PODS_A_TURN;
        self.more_to_open = false;
        for pod in own_pods(world, params) {
            let enforced = plan::wanted_mode(&pod, params).is_some_and(Mode::is_enforced);
            let Some(found) = self.discovery.found().get(&pod.uid).filter(|_| enforced) else {
                continue;
            };
            let netns = found.netns.clone();
            let key = EndpointKey { uid: pod.uid.clone(), netns: netns.cookie };
            let again = match self.listeners.get(&key) {
                None => true,
                Some(Listeners::Failed(_, at)) => now.duration_since(*at) >= RETRY,
                Some(Listeners::Handed(_)) => false,
            };
            if !again {
                continue;
            }
            if left == 0 {
                self.more_to_open = true;
                break;
            }
            left -= 1;
            let state = match self.open(&key, &netns, backlog).await? {
                Ok(kept) => {
                    opened = true;
                    Listeners::Handed(kept)
                }
                Err(why) => {
                    opened |= !matches!(self.listeners.get(&key), Some(Listeners::Failed(old, _)) if **old == *why);
                    Listeners::Failed(why.into(), now)
                }
            };
            self.listeners.insert(key, state);
        }
        Ok(opened)
    }

    /// The inner error is the pod's, the outer one the process's.
    async fn open(
        &mut self,
        key: &EndpointKey,
        netns: &Arc<NetnsFd>,
        backlog: u32,
    ) -> Result<Result<sockets::Listeners, String>, ReconcileError> {
        // Plaintext is refused by this program; without it nothing is served.
        if let Err(error) = self.deps.programs.attach_lookup(netns) {
            return Ok(Err(error.to_string()));
        }
        let opened = match sockets::open(&self.deps.opener, netns, backlog).await {
            Ok(opened) => opened,
            Err(error) => return Ok(Err(error.to_string())),
        };
        match self.hand_over(key, netns, opened) {
            Ok((kept, command)) => {
                self.deps.listeners.send(command).map_err(|_| ReconcileError::DataPlaneGone)?;
                Ok(Ok(kept))
            }
            Err(why) => Ok(Err(why)),
        }
    }

    /// Has tunnels steered to these listeners; the command has the proxy serve them. They are
    /// kept here, too, for a successor.
    fn hand_over(
        &mut self,
        key: &EndpointKey,
        netns: &Arc<NetnsFd>,
        listeners: sockets::Listeners,
    ) -> Result<(sockets::Listeners, ListenerCommand), String> {
        let kept = listeners.try_clone().map_err(|error| error.to_string())?;
        steer(&mut self.deps.maps, netns.cookie, &kept).map_err(|error| error.to_string())?;
        let inbound = listeners.inbound_v4.into_iter().chain(listeners.inbound_v6).collect();
        let command = ListenerCommand::Serve {
            key: key.clone(),
            netns: netns.clone(),
            outbound: listeners.outbound,
            inbound,
        };
        Ok((kept, command))
    }

    /// Goes on with listeners that an earlier process has handed over, as far as their pods are
    /// found; true when there were such. Until then, and until the state that judges their flows
    /// is published ([`Self::serve_adopted`]), connections wait in them.
    pub(super) fn adopt_listeners(&mut self, now: Instant) -> bool {
        let found = self.discovery.found();
        let ready: Vec<(EndpointKey, Arc<NetnsFd>)> = self
            .adopted
            .keys()
            .filter_map(|key| {
                let found = found.get(&key.uid).filter(|f| f.netns.cookie == key.netns)?;
                Some((key.clone(), found.netns.clone()))
            })
            .collect();
        for (key, netns) in &ready {
            let Some(listeners) = self.adopted.remove(key) else { continue };
            let state = match self.hand_over(key, netns, listeners) {
                Ok((kept, command)) => {
                    self.to_serve.push(command);
                    Listeners::Handed(kept)
                }
                Err(why) => Listeners::Failed(why.into(), now),
            };
            self.listeners.insert(key.clone(), state);
        }
        !ready.is_empty()
    }

    /// Has the proxy accept from listeners that were handed over.
    pub(super) fn serve_adopted(&mut self) -> Result<(), ReconcileError> {
        for command in self.to_serve.drain(..) {
            self.deps.listeners.send(command).map_err(|_| ReconcileError::DataPlaneGone)?;
        }
        Ok(())
    }

    /// Stops serving endpoints whose pod or sandbox is gone, at once.
    pub(super) fn drop_listeners_of_the_gone(&mut self) -> Result<bool, ReconcileError> {
        let found = self.discovery.found();
        let gone: Vec<EndpointKey> = self
            .listeners
            .keys()
            .filter(|key| found.get(&key.uid).is_none_or(|f| f.netns.cookie != key.netns))
            .cloned()
            .collect();
        for key in &gone {
            self.stop(key, Duration::ZERO)?;
        }
        Ok(!gone.is_empty())
    }

    /// Stops serving endpoints that left the mesh; the kernel steers nothing to them now.
    pub(super) fn stop_listeners(&mut self, plan: &Plan) -> Result<(), ReconcileError> {
        let over: Vec<EndpointKey> = self
            .listeners
            .keys()
            .filter(|key| plan.state.endpoints.contains_key(&key.netns))
            .filter(|key| !plan.listeners.contains(&key.netns))
            .cloned()
            .collect();
        for key in &over {
            self.stop(key, Duration::ZERO)?;
        }
        Ok(())
    }

    fn stop(&mut self, key: &EndpointKey, drain: Duration) -> Result<(), ReconcileError> {
        let Some(Listeners::Handed(_)) = self.listeners.remove(key) else { return Ok(()) };
        // The maps may be another process's by now.
        let families: &[u32] = if self.role == Role::Acting { &[AF_INET, AF_INET6] } else { &[] };
        for &family in families {
            let key = ListenerKey { netns: key.netns, family, pad: 0 };
            if let Err(error) = self.deps.maps.remove_listener(&key) {
                self.fail("kernel maps", &error);
            }
        }
        let command = ListenerCommand::Stop { key: key.clone(), drain };
        self.deps.listeners.send(command).map_err(|_| ReconcileError::DataPlaneGone)
    }

    pub(super) fn attach_lookups(&mut self, plan: &Plan) {
        let mut failed = Vec::new();
        for found in self.discovery.found().values() {
            if plan.lookups.contains(&found.netns.cookie)
                && let Err(error) = self.deps.programs.attach_lookup(&found.netns)
            {
                failed.push(error);
            }
        }
        for error in failed {
            self.fail("sk_lookup", &error);
        }
    }

    /// Guards are attached before their rows are written: without a row they pass everything.
    pub(super) fn attach_guards(&mut self, plan: &Plan) {
        let mut failed = Vec::new();
        for interface in plan.tables.guarded.keys().chain(&plan.guard_ahead) {
            if let Err(error) = self.deps.programs.attach_guard(*interface) {
                failed.push(error);
            }
        }
        for error in failed {
            self.fail("raw guard", &error);
        }
    }

    pub(super) fn detach_guards(&mut self, plan: &Plan) {
        for interface in self.deps.programs.guarded() {
            if !plan.tables.guarded.contains_key(&interface)
                && !plan.guard_ahead.contains(&interface)
                && let Err(error) = self.deps.programs.detach_guard(interface)
            {
                self.fail("raw guard", &error);
            }
        }
    }

    pub(super) fn detach_lookups(&mut self, plan: &Plan) {
        for cookie in self.deps.programs.pinned_lookups() {
            if !plan.lookups.contains(&cookie)
                && !plan.keep.contains(&cookie)
                && let Err(error) = self.deps.programs.detach_lookup(cookie)
            {
                self.fail("sk_lookup", &error);
            }
        }
    }
}

/// Has the sk_lookup program lead tunnels of a pod to its inbound listeners.
pub(super) fn steer(
    maps: &mut Maps,
    netns: u64,
    listeners: &sockets::Listeners,
) -> Result<(), KernelError> {
    for (family, listener) in [(AF_INET, &listeners.inbound_v4), (AF_INET6, &listeners.inbound_v6)]
    {
        if let Some(listener) = listener {
            maps.set_listener(ListenerKey { netns, family, pad: 0 }, listener)?;
        }
    }
    Ok(())
}
