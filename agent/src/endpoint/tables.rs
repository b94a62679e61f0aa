//! The kernel's tables as values: what is wanted, what is applied, and the difference.

use std::{
    collections::{BTreeSet, HashMap},
    hash::Hash,
    sync::Arc,
};

use signet_ebpf::abi::{
    AddressEntry, Config, ExemptKey, Ip, OwnAddressKey, PodEntry, PodName, ServiceKey, address, pod,
};

use crate::policy::compile::PolicyEntry;

/// A range's prefix length and octets.
pub type RangeKey = (u32, [u8; 16]);

/// Everything that the reconciler writes into the kernel, but the identity table and the
/// listeners.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Tables {
    /// The configuration, without the heartbeat.
    pub config: Config,
    /// By network namespace.
    pub pods: HashMap<u64, PodEntry>,
    /// Pod directory's cgroup id → network namespace.
    pub cgroups: HashMap<u64, u64>,
    /// Addresses that are a pod's own.
    pub own: HashMap<OwnAddressKey, u8>,
    /// Who an address belongs to.
    pub addresses: HashMap<Ip, AddressEntry>,
    /// Services' ports.
    pub services: HashMap<ServiceKey, u32>,
    /// The cluster's ranges.
    pub ranges: HashMap<RangeKey, u32>,
    /// Exempt inbound ports.
    pub exempt: HashMap<ExemptKey, u8>,
    /// Cgroups whose flows are attested as probes.
    pub probes: HashMap<u64, u8>,
    /// The node's interfaces with a raw guard → the pod's network namespace.
    pub guarded: HashMap<u32, u64>,
    /// `namespace/name` by network namespace, for whoever has only the pins.
    pub names: HashMap<u64, PodName>,
    /// By network namespace. `None`: there is one in the kernel, and nobody knows what it
    /// says (after a restart).
    pub policies: HashMap<u64, Option<Arc<Vec<PolicyEntry>>>>,
}

/// The rows to write and the keys to remove, to get from one table to another.
#[derive(Debug, PartialEq)]
pub struct Changes<K, V> {
    /// New or changed rows.
    pub set: Vec<(K, V)>,
    /// Rows that go.
    pub remove: Vec<K>,
}

/// The difference of two tables.
pub fn changes<K, V>(from: &HashMap<K, V>, to: &HashMap<K, V>) -> Changes<K, V>
where
    K: Eq + Hash + Clone,
    V: PartialEq + Clone,
{
    let set = to
        .iter()
        .filter(|(key, value)| from.get(*key) != Some(*value))
        .map(|(key, value)| (key.clone(), value.clone()))
        .collect();
    let remove = from.keys().filter(|key| !to.contains_key(*key)).cloned().collect();
    Changes { set, remove }
}

impl Tables {
    /// Takes over the rows of the network namespaces `keep` as they are in `applied`.
    pub fn keep(&mut self, applied: &Self, keep: &BTreeSet<u64>) {
        for netns in keep {
            if let Some(entry) = applied.pods.get(netns) {
                self.pods.insert(*netns, *entry);
            }
            if let Some(name) = applied.names.get(netns) {
                self.names.insert(*netns, *name);
            }
            if let Some(policy) = applied.policies.get(netns) {
                self.policies.insert(*netns, policy.clone());
            }
        }
        let kept = |netns: &u64| keep.contains(netns);
        self.cgroups.extend(applied.cgroups.iter().filter(|(_, n)| kept(n)));
        self.guarded.extend(applied.guarded.iter().filter(|(_, n)| kept(n)));
        if !self.guarded.is_empty() {
            self.config.guarding = 1;
        }
        self.own.extend(applied.own.iter().filter(|(k, _)| kept(&k.netns)));
        self.exempt.extend(applied.exempt.iter().filter(|(k, _)| kept(&k.netns)));
    }

    /// These tables less what they would give beyond `applied`: the state between taking
    /// rights away and giving new ones (DESIGN §3a).
    ///
    /// A pod that becomes ready keeps its old row (or is closed, when it has none), and an
    /// address that becomes served is not served yet.
    pub fn without_new_rights(&self, applied: &Self) -> Self {
        let mut between = self.clone();
        for (netns, entry) in &mut between.pods {
            let before = applied.pods.get(netns);
            let was_ready = before.is_some_and(|b| b.flags & pod::READY != 0);
            if entry.flags & pod::READY != 0 && !was_ready {
                match before {
                    Some(before) => *entry = *before,
                    None => entry.flags &= !pod::READY,
                }
            }
        }
        for (ip, entry) in &mut between.addresses {
            let was_served =
                applied.addresses.get(ip).is_some_and(|b| b.flags & address::SERVED != 0);
            if entry.flags & address::SERVED != 0 && !was_served {
                entry.flags &= !address::SERVED;
            }
        }
        between
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn changes_lead_from_one_table_to_the_other(
            from in proptest::collection::hash_map(0u8..20, 0u8..4, 0..20),
            to in proptest::collection::hash_map(0u8..20, 0u8..4, 0..20),
        ) {
            let changes = changes(&from, &to);
            let mut table = from.clone();
            for key in &changes.remove {
                prop_assert!(table.remove(key).is_some());
            }
            for (key, value) in &changes.set {
                prop_assert_ne!(table.insert(*key, *value), Some(*value), "no idle write");
            }
            prop_assert_eq!(table, to);
        }
    }

    #[test]
    fn rights_are_given_in_the_second_step() {
        let ready = PodEntry { mode: 3, flags: pod::READY, ..PodEntry::default() };
        let open = PodEntry { mode: 1, ..PodEntry::default() };
        let served = AddressEntry { flags: address::SERVED | 1, ..AddressEntry::default() };
        let mut applied = Tables::default();
        applied.pods.insert(2, open);
        applied.pods.insert(3, ready);
        applied.addresses.insert(Ip([1; 4]), served);
        let mut wanted = Tables::default();
        for netns in 1..=3 {
            wanted.pods.insert(netns, ready);
        }
        wanted.addresses.insert(Ip([1; 4]), served);
        wanted.addresses.insert(Ip([2; 4]), served);

        let between = wanted.without_new_rights(&applied);
        assert_eq!(between.pods[&1], PodEntry { flags: 0, ..ready }, "new: closed");
        assert_eq!(between.pods[&2], open, "becomes ready in one write, later");
        assert_eq!(between.pods[&3], ready, "was ready before");
        assert_eq!(between.addresses[&Ip([1; 4])], served);
        assert_eq!(between.addresses[&Ip([2; 4])].flags, 1);
    }

    #[test]
    fn kept_namespaces_keep_every_row() {
        let own = OwnAddressKey { netns: 7, ip: Ip([9; 4]) };
        let mut applied = Tables::default();
        applied.pods.insert(7, PodEntry::default());
        applied.pods.insert(8, PodEntry::default());
        applied.cgroups.insert(70, 7);
        applied.cgroups.insert(80, 8);
        applied.own.insert(own, 1);
        applied.guarded.insert(3, 7);
        applied.guarded.insert(4, 8);
        applied.policies.insert(7, None);
        let mut wanted = Tables::default();
        wanted.keep(&applied, &BTreeSet::from([7]));
        assert!(wanted.pods.contains_key(&7) && !wanted.pods.contains_key(&8));
        assert_eq!(wanted.cgroups, HashMap::from([(70, 7)]));
        assert_eq!(wanted.guarded, HashMap::from([(3, 7)]));
        assert_eq!(wanted.config.guarding, 1);
        assert!(wanted.own.contains_key(&own) && wanted.policies.contains_key(&7));
    }
}
