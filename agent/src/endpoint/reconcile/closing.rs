//! Closing direct flows that lost their right.

use std::{
    collections::{BTreeSet, HashMap, HashSet},
    os::fd::AsFd,
    sync::Arc,
};

use signet_ebpf::abi::{AddressEntry, FlowKey, Ip};

use super::{
    super::{
        plan::Plan,
        rejudge::{self, Close, Closed, Means, Verdicts},
        state::EndpointKey,
    },
    ClosedFlows, Policies, Reconciler,
};
use crate::{
    kernel::{KernelError, features::Feature},
    netns::{NetnsFd, NetnsOpener},
};

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
        &mut self,
        netns: &Arc<NetnsFd>,
        attested: &HashSet<FlowKey>,
        what: Close,
    ) -> Result<Vec<Closed>, KernelError> {
        let diag = diag_socket(&self.deps.opener, netns).await?;
        let verdicts = Verdicts::new(&self.applied, attested);
        let agent = self.deps.programs.agent().id;
        let mut means = if self.deps.programs.features().has(Feature::SockDestroy) {
            Means::Destroy
        } else {
            Means::Cut(&mut self.deps.maps.cut)
        };
        rejudge::close(diag.as_fd(), netns.cookie, agent, &verdicts, what, &mut means)
    }

    /// Forgets the cut flows of pods that are gone, and those whose sockets are.
    pub(super) async fn sweep_cut(&mut self) {
        let rows = match self.deps.maps.cut.rows() {
            Ok(rows) => rows.into_iter().map(|(key, _)| key).collect::<Vec<_>>(),
            Err(error) => return self.fail("sweep", &error),
        };
        let namespaces: BTreeSet<u64> = rows.iter().map(|key| key.netns).collect();
        for netns in namespaces {
            let found = self.discovery.found().values().find(|found| found.netns.cookie == netns);
            let swept = match found.map(|found| found.netns.clone()) {
                Some(netns_fd) => match diag_socket(&self.deps.opener, &netns_fd).await {
                    Ok(diag) => {
                        let table = &mut self.deps.maps.cut;
                        rejudge::forget_cut(diag.as_fd(), netns, &rows, table)
                    }
                    Err(error) => Err(error),
                },
                None => rows
                    .iter()
                    .filter(|key| key.netns == netns)
                    .try_for_each(|key| self.deps.maps.cut.remove(key)),
            };
            if let Err(error) = swept {
                self.fail("sweep", &error);
            }
        }
    }

    pub(super) fn attested(&self) -> HashSet<FlowKey> {
        let rows = self.deps.maps.attested.rows().unwrap_or_default();
        rows.into_iter().map(|(key, _)| key).collect()
    }
}

pub(super) async fn diag_socket(
    opener: &NetnsOpener,
    netns: &Arc<NetnsFd>,
) -> Result<std::os::fd::OwnedFd, KernelError> {
    opener
        .netlink(netns, SOCK_DIAG)
        .await
        .map_err(|source| KernelError::SockDiag { action: "list", source })
}
