//! Compiling endpoints' policies for the kernel, once for each change.

use std::{collections::BTreeSet, net::IpAddr, sync::Arc};

use signet_ebpf::abi::{Mode, pod};

use super::{Numbers, Planner, subject};
use crate::{
    cluster::model::Problem,
    kernel::maps::MAX_POLICY_ENTRIES,
    policy::{
        compile::{CompileInput, compile},
        model::Policy,
    },
    spiffe::{SpiffeId, TrustDomain},
};

/// What a compiled policy was compiled from.
#[derive(Clone, PartialEq, Debug)]
pub(super) struct CompiledFrom {
    policies: Vec<Arc<Policy>>,
    default_deny: bool,
    observe: bool,
    identities: Arc<BTreeSet<u32>>,
    addresses: Vec<IpAddr>,
    aliases: Vec<TrustDomain>,
}

impl Planner<'_> {
    /// Every endpoint's compiled policy.
    pub(super) fn policies(&mut self, numbers: &mut Numbers) {
        let world = self.input.world;
        let names = numbers.identities.names();
        let known: Vec<(u32, SpiffeId)> = self
            .identities
            .iter()
            .filter_map(|number| Some((*number, names.get(number)?.clone())))
            .collect();
        let identities = Arc::new(self.identities.clone());
        numbers.compiled.retain(|netns, _| self.endpoints.contains_key(netns));
        for (netns, endpoint) in &self.endpoints {
            if endpoint.mode == Mode::Off {
                continue;
            }
            let from = CompiledFrom {
                policies: endpoint.policies.to_vec(),
                default_deny: endpoint.default_deny,
                observe: endpoint.mode == Mode::Observe,
                identities: identities.clone(),
                addresses: endpoint.addresses.clone(),
                aliases: world.federation.aliases.clone(),
            };
            if let Some((compiled_from, entries)) = numbers.compiled.get(netns)
                && *compiled_from == from
            {
                self.tables.policies.insert(*netns, Some(entries.clone()));
                continue;
            }
            let of = |policies, default_deny| {
                compile(&CompileInput {
                    policies,
                    default_deny,
                    trust_domain: &world.trust_domain,
                    aliases: &world.federation.aliases,
                    identities: &known,
                    number: &|name| numbers.policies.number(name),
                    observe: from.observe,
                    local_ips: &from.addresses,
                    max_entries: MAX_POLICY_ENTRIES as usize,
                })
            };
            match of(&from.policies, from.default_deny) {
                Ok(entries) => {
                    let entries = Arc::new(entries);
                    numbers.compiled.insert(*netns, (from, entries.clone()));
                    self.tables.policies.insert(*netns, Some(entries));
                }
                Err(error) => {
                    if let Some(entry) = self.tables.pods.get_mut(netns) {
                        entry.flags |= pod::CLOSED;
                    }
                    // Nothing passes, whichever of the two rows is written first.
                    let nothing = of(&[], true).unwrap_or_default();
                    self.tables.policies.insert(*netns, Some(Arc::new(nothing)));
                    self.problems.push(Problem {
                        subject: subject(&endpoint.pod.name),
                        message: format!("{error}; it is closed"),
                    });
                }
            }
        }
    }
}
