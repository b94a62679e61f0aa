//! Closing direct flows that lost their right.

use std::{
    collections::{HashMap, HashSet},
    os::fd::AsFd,
    sync::Arc,
};

use signet_ebpf::abi::{AddressEntry, FlowKey, Ip};

use super::{
    super::{
        plan::Plan,
        rejudge::{self, Close, Closed, Verdicts},
        state::EndpointKey,
    },
    ClosedFlows, Policies, Reconciler,
};
use crate::{kernel::KernelError, netns::NetnsFd};

/// `NETLINK_SOCK_DIAG`.
const SOCK_DIAG: isize = 4;

impl Reconciler {
    /// Closes direct flows that lost their right. Tunnelled ones are the proxy's. Answers
    /// the endpoints whose earlier sockets could not be closed.
    pub(super) async fn close_flows(
        &mut self,
        plan: &Plan,
        policies_before: &Policies,
        addresses_before: &HashMap<Ip, AddressEntry>,
    ) -> Vec<EndpointKey> {
        let mut failed = Vec::new();
        let addresses_changed = *addresses_before != self.applied.addresses;
        let mut attested = None;
        for (netns, endpoint) in &plan.state.endpoints {
            let policy_changed = policies_before.get(netns).and_then(Option::as_ref)
                != self.applied.policies.get(netns).and_then(Option::as_ref);
            let what = if plan.close_all.contains(netns) {
                Close::Everything
            } else if plan.close_plaintext.contains(netns) {
                Close::NotAsDialledNow
            } else if endpoint.mode.is_enforced() && (policy_changed || addresses_changed) {
                Close::Denied
            } else {
                continue;
            };
            let Some(found) = self.discovery.found().get(&endpoint.key.uid) else { continue };
            let netns_fd = found.netns.clone();
            let attested = match &attested {
                Some(attested) => attested,
                None => attested.insert(self.attested()),
            };
            match self.close_flows_of(&netns_fd, attested, what).await {
                Ok(flows) if flows.is_empty() => {}
                Ok(flows) => {
                    tracing::info!(netns, count = flows.len(), ?what, "closed flows of a pod");
                    // Nobody listening any more is the daemon's end, not this task's affair.
                    let _ = self.deps.closed.send(ClosedFlows {
                        key: endpoint.key.clone(),
                        flows,
                        revision: plan.state.revision,
                    });
                }
                Err(error) => {
                    self.fail("open flows", &error);
                    if what == Close::Everything {
                        failed.push(endpoint.key.clone());
                    }
                }
            }
        }
        failed
    }

    async fn close_flows_of(
        &self,
        netns: &Arc<NetnsFd>,
        attested: &HashSet<FlowKey>,
        what: Close,
    ) -> Result<Vec<Closed>, KernelError> {
        let diag = self
            .deps
            .opener
            .netlink(netns, SOCK_DIAG)
            .await
            .map_err(|source| KernelError::SockDiag { action: "list", source })?;
        let verdicts = Verdicts::new(&self.applied, attested);
        let agent = self.deps.programs.agent().id;
        rejudge::close(diag.as_fd(), netns.cookie, agent, &verdicts, what)
    }

    fn attested(&self) -> HashSet<FlowKey> {
        let rows = self.deps.maps.attested.rows().unwrap_or_default();
        rows.into_iter().map(|(key, _)| key).collect()
    }
}
