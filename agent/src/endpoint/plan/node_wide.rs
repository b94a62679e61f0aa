//! Rows that are no pod's: the configuration, ranges, Services, nodes and probes.

use std::net::IpAddr;

use ipnet::IpNet;
use signet_ebpf::abi::{
    AddressEntry, Config, IDENTITY_HOST, IDENTITY_WORLD, Ip, ServiceKey, address, range, service,
};

use super::Planner;
use crate::{cluster::model::Problem, config::values::Builtin};

impl Planner<'_> {
    /// Configuration, ranges, Services, nodes and probes.
    pub(super) fn node_wide(&mut self) {
        let world = self.input.world;
        let enforcing = world.namespaces.values().any(|n| n.mode.is_enforced())
            || world.pods.values().any(|p| p.is_enrolled());
        self.tables.config = Config {
            revision: world.revision,
            enforcing: u8::from(enforcing),
            ranges_known: u8::from(!world.ranges.is_unknown()),
            heartbeat: 0,
            ..self.input.params.config
        };
        for (ranges, kind) in [
            (&world.ranges.pods, range::PODS),
            (&world.ranges.services, range::SERVICES),
            // Last: the same range named twice is outside.
            (&world.ranges.outside, range::OUTSIDE),
        ] {
            self.tables.ranges.extend(ranges.iter().map(|net| (range_key(net), kind)));
        }
        // The same range as any of those is the remote peers'.
        let remotes = world.federation.remotes.iter();
        self.tables.ranges.extend(remotes.map(|r| (range_key(&r.range), range::REMOTE)));
        for ips in world.nodes.values() {
            for ip in ips {
                let entry = AddressEntry {
                    identity: IDENTITY_HOST,
                    kind: address::NODE,
                    ..AddressEntry::default()
                };
                self.tables.addresses.insert(Ip::from_std(*ip), entry);
            }
        }
        let node = Some(&*self.input.params.node);
        for found in world.services.values() {
            for ip in found.cluster_ips.iter().chain(&found.external_ips) {
                let entry = AddressEntry {
                    identity: IDENTITY_WORLD,
                    kind: address::SERVICE,
                    ..AddressEntry::default()
                };
                self.tables.addresses.insert(Ip::from_std(*ip), entry);
                if found.external_ips.contains(ip) {
                    let port = service::EXTERNAL;
                    let key = ServiceKey { ip: Ip::from_std(*ip), port, protocol: 0, pad: 0 };
                    self.tables.services.insert(key, 0);
                }
                for port in &found.ports {
                    let mut flags = 0;
                    let endpoints = world.endpoints_for(found, port, *ip, node);
                    if endpoints.is_empty() {
                        flags |= service::NO_ENDPOINTS;
                    }
                    let enrolled = |ip: &IpAddr| {
                        world
                            .pods_by_ip
                            .get(ip)
                            .and_then(|uid| world.pods.get(uid))
                            .is_some_and(|pod| self.is_enrolled(pod))
                    };
                    if endpoints.iter().any(|e| enrolled(&e.ip)) {
                        flags |= service::TUNNEL;
                    }
                    let key = ServiceKey {
                        ip: Ip::from_std(*ip),
                        port: port.port,
                        protocol: port.protocol,
                        pad: 0,
                    };
                    self.tables.services.insert(key, flags);
                }
            }
        }
        if self.input.params.builtins.has(Builtin::KubeletProbes) {
            self.tables.probes = self.input.observed.probes.iter().map(|id| (*id, 1)).collect();
        }
        for map in self.input.full {
            self.problems.push(Problem {
                subject: format!("BPF map {map}"),
                message: "is full, so every enforced pod of this node is closed: take pods off \
                          the node, or fewer objects into its cluster"
                    .into(),
            });
        }
    }
}

/// A range as the kernel's trie has it: over mapped addresses.
fn range_key(net: &IpNet) -> (u32, [u8; 16]) {
    let bits = match net {
        IpNet::V4(v4) => 96 + u32::from(v4.prefix_len()),
        IpNet::V6(v6) => u32::from(v6.prefix_len()),
    };
    (bits, Ip::from_std(net.network()).octets())
}
