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
        sockets::{self, ListenerCommand, OutboundPorts},
        state::EndpointKey,
    },
    Listeners, RETRY, ReconcileError, Reconciler, own_pods,
};
use crate::{cluster::model::World, netns::NetnsFd};

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
                Ok(ports) => {
                    opened = true;
                    Listeners::Handed(ports)
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
    ) -> Result<Result<OutboundPorts, String>, ReconcileError> {
        // Plaintext is refused by this program; without it nothing is served.
        if let Err(error) = self.deps.programs.attach_lookup(netns) {
            return Ok(Err(error.to_string()));
        }
        let opened = match sockets::open(&self.deps.opener, netns, backlog).await {
            Ok(opened) => opened,
            Err(error) => return Ok(Err(error.to_string())),
        };
        let mut inbound = Vec::with_capacity(2);
        for (family, listener) in [(AF_INET, opened.inbound_v4), (AF_INET6, opened.inbound_v6)] {
            let Some(listener) = listener else { continue };
            let key = ListenerKey { netns: netns.cookie, family, pad: 0 };
            if let Err(error) = self.deps.maps.set_listener(key, &listener) {
                return Ok(Err(error.to_string()));
            }
            inbound.push(listener);
        }
        let command = ListenerCommand::Serve {
            key: key.clone(),
            netns: netns.clone(),
            outbound: opened.outbound,
            inbound,
        };
        self.deps.listeners.send(command).map_err(|_| ReconcileError::DataPlaneGone)?;
        Ok(Ok(opened.ports))
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
        for family in [AF_INET, AF_INET6] {
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
