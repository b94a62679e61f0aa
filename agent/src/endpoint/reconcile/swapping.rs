//! This process's programs in the place of another process's or another version's.

use std::os::fd::AsFd;

use signet_ebpf::abi::{FlowKey, proto};

use super::{super::apply, super::plan::Plan, Reconciler, closing::diag_socket};
use crate::kernel::{
    FlowSockets, KernelError, clock,
    destroy::{self, States},
};

impl Reconciler {
    /// Attaches the programs over maps that are filled by now, then what belongs to single pods.
    pub(super) async fn swap_in(&mut self, plan: &Plan) {
        // They ask for it from their first packet on.
        if let Err(error) = apply::heartbeat(&mut self.deps.maps, &self.applied) {
            self.fail("heartbeat", &error);
        }
        if let Err(error) = self.deps.programs.activate() {
            return self.fail("programs", &error);
        }
        if !self.deps.programs.other_pins().is_empty() {
            self.note_tunnels().await;
        }
        self.attach_lookups(plan);
        self.attach_guards(plan);
    }

    /// Notes the tunnels that were opened under another version's programs, whose notes are in
    /// other maps: raw guards drop what belongs to no flow that is known.
    async fn note_tunnels(&mut self) {
        let agent = self.deps.programs.agent().id;
        let pods: Vec<_> = self.discovery.found().values().map(|f| f.netns.clone()).collect();
        for netns in pods {
            let listed = match diag_socket(&self.deps.opener, &netns).await {
                Ok(diag) => destroy::list(diag.as_fd(), States::Connected),
                Err(error) => Err(error),
            };
            let noted = listed.and_then(|sockets| {
                let tunnels = sockets.iter().filter(|s| s.cgroup == Some(agent));
                for socket in tunnels.filter(|socket| !socket.is_loopback()) {
                    let key = FlowSockets::client_key(netns.cookie, socket.local, socket.remote);
                    let key = FlowKey { family: u32::from(proto::TCP), ..key };
                    self.deps.maps.tunnels.set(key, clock::monotonic())?;
                }
                Ok::<_, KernelError>(())
            });
            if let Err(error) = noted {
                self.fail("tunnels", &error);
            }
        }
    }
}
