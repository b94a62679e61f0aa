//! Who an address belongs to: the API's word, and this node's own pods by what their network
//! namespaces really have.

use std::{net::IpAddr, sync::Arc};

use signet_ebpf::abi::{AddressEntry, IDENTITY_WORLD, Ip, address};

use super::{Numbers, Planner, is_spared, subject};
use crate::cluster::model::{Pod, PodUid, Problem, World};

impl Planner<'_> {
    /// Who each pod address belongs to: the API's word, and this node's own pods by what
    /// their network namespaces really have.
    pub(super) fn addresses(&mut self, numbers: &mut Numbers) {
        let world = self.input.world.clone();
        for (ip, uid) in &world.pods_by_ip {
            let Some(pod) = world.pods.get(uid) else { continue };
            let entry = self.address_entry(pod, numbers);
            self.tables.addresses.insert(Ip::from_std(*ip), entry);
        }
        let mut local: Vec<(IpAddr, Arc<Pod>)> = Vec::new();
        for endpoint in self.endpoints.values() {
            local.extend(endpoint.addresses.iter().map(|ip| (*ip, endpoint.pod.clone())));
        }
        for (ip, pod) in local {
            if self.may_have(ip, &pod) {
                let entry = self.address_entry(&pod, numbers);
                self.tables.addresses.insert(Ip::from_std(ip), entry);
            } else {
                self.problems.push(Problem {
                    subject: subject(&pod.name),
                    message: format!(
                        "has {ip} in its network namespace, which belongs to another pod: it is \
                         not taken for that one's"
                    ),
                });
            }
        }
    }

    /// A pod's address is its own unless the API gives it to another pod that lives: a pod
    /// may put any address on its interface.
    pub(super) fn may_have(&self, ip: IpAddr, pod: &Pod) -> bool {
        let world = self.input.world;
        let Some(holder) = world.pods_by_ip.get(&ip) else { return true };
        if *holder == pod.uid || pod.ips.contains(&ip) {
            return true;
        }
        let Some(holder) = world.pods.get(holder) else { return true };
        let gone_from_here = holder.node.as_ref() == Some(&self.input.params.node)
            && !self.input.observed.pods.contains_key(&holder.uid);
        holder.terminating || holder.finished || gone_from_here
    }

    fn address_entry(&mut self, pod: &Pod, numbers: &mut Numbers) -> AddressEntry {
        let mut flags = 0;
        if pod.is_ambient() {
            flags |= address::ENROLLABLE | address::ENROLLED | address::SERVED;
        }
        if pod.is_enrollable() && !is_spared(&pod.name.namespace, &self.input.params.never_deny) {
            flags |= address::ENROLLABLE;
        }
        if self.is_enrolled(pod) {
            flags |= address::ENROLLED;
            if self.is_served(pod) {
                flags |= address::SERVED;
            }
        }
        AddressEntry {
            // Without a number it is a stranger: in no ALLOW, in every DENY of strangers.
            identity: self.identity(pod, numbers).map_or(IDENTITY_WORLD, |(_, number)| number),
            kind: address::POD,
            flags,
            pad: 0,
        }
    }

    /// Own pods are served when they are; others when their node has said so.
    fn is_served(&self, pod: &Pod) -> bool {
        if pod.node.as_ref() == Some(&self.input.params.node) {
            return self.endpoints.values().any(|e| e.key.uid == pod.uid && e.served);
        }
        self.input.world.served.contains_key(&pod.uid)
    }

    /// The world with this node's own pods at the addresses that they really have: the API
    /// learns them late.
    pub(super) fn with_local_addresses(&self) -> Arc<World> {
        let world = self.input.world;
        let mut learnt: Vec<(IpAddr, PodUid)> = Vec::new();
        for endpoint in self.endpoints.values() {
            for ip in &endpoint.addresses {
                let known = world.pods_by_ip.get(ip) == Some(&endpoint.key.uid);
                if !known && self.may_have(*ip, &endpoint.pod) {
                    learnt.push((*ip, endpoint.key.uid.clone()));
                }
            }
        }
        if learnt.is_empty() {
            return world.clone();
        }
        let mut world = World::clone(world);
        world.pods_by_ip.extend(learnt);
        Arc::new(world)
    }
}
