//! Who a flow's sides are, as far as addresses tell.

use std::net::SocketAddr;

use signet_ebpf::abi::proto;

use super::record::{KnownBy, Party};
use crate::{endpoint::state::NodeState, spiffe::SpiffeId};

/// The side at `address`: the pod or Service that the world knows there. `number` is the
/// identity that the kernel had for the address, if it is the kernel that reports.
pub fn known_by_address(address: SocketAddr, state: &NodeState, number: Option<u32>) -> Party {
    let mut party = Party::unknown(address);
    let world = &state.world;
    if let Some(pod) = world.pods_by_ip.get(&address.ip()).and_then(|uid| world.pods.get(uid)) {
        party = Party::of_pod(pod, address);
        // The world says whose address it is, also where the kernel has no number for it.
        party.identity = SpiffeId::for_service_account(
            &world.trust_domain,
            &pod.name.namespace,
            &pod.service_account,
        )
        .ok();
        party.known_by = KnownBy::Address;
    }
    // An external address is a Service's on its ports only.
    let claimed = || {
        let at = |protocol| world.service_at(address, protocol);
        [proto::TCP, proto::UDP].into_iter().find_map(at).map(|service| &service.name)
    };
    if let Some(service) = world.services_by_ip.get(&address.ip()).or_else(claimed) {
        party.service = Some(format!("{}/{}", service.namespace, service.name).into());
    }
    if let Some(identity) = number.and_then(|n| state.identities.get(&n)) {
        party.identity = Some(identity.clone());
        party.known_by = KnownBy::Address;
    }
    party
}
