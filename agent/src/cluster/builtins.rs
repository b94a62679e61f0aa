//! Which built-ins are in force, and what they allow in this cluster.

use std::{
    collections::{BTreeSet, HashMap},
    net::IpAddr,
    sync::Arc,
};

use signet_ebpf::abi::proto;

use super::model::{Endpoint, ExemptPort, ObjectName, World};
use crate::{
    config::values::{Builtin, Resolver},
    policy::{
        builtin::{self, DNS_PORT},
        model::{Policy, Target},
    },
};

/// The configuration's word on built-ins.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Builtins {
    /// Those in force.
    pub in_force: Vec<Builtin>,
    /// Resolvers besides the cluster's own.
    pub resolvers: Vec<Resolver>,
}

impl Default for Builtins {
    /// All of them, with the cluster's own resolvers.
    fn default() -> Self {
        Self { in_force: Builtin::ALL.to_vec(), resolvers: Vec::new() }
    }
}

impl Builtins {
    /// True while it was not removed.
    pub fn has(&self, builtin: Builtin) -> bool {
        self.in_force.contains(&builtin)
    }

    /// What policies of this world's pods end with: the built-ins that policy decides about.
    pub fn policies(&self, world: &World) -> Vec<Arc<Policy>> {
        let dns = self.has(Builtin::Dns).then(|| Arc::new(self.policy(Builtin::Dns, world)));
        dns.into_iter().collect()
    }

    /// A built-in as it is, or would be, in this world.
    pub fn policy(&self, builtin: Builtin, world: &World) -> Policy {
        match builtin {
            Builtin::Dns => self.dns(world),
            Builtin::KubeletProbes => builtin::probes(),
            Builtin::Webhooks => builtin::webhooks(),
        }
    }

    /// The pods' ports that the API server calls, by address; none once that is removed.
    pub fn called(&self, world: &World) -> HashMap<IpAddr, Vec<ExemptPort>> {
        let mut called: HashMap<IpAddr, Vec<ExemptPort>> = HashMap::new();
        if !self.has(Builtin::Webhooks) {
            return called;
        }
        for (_, endpoint) in called_endpoints(world) {
            let ports = called.entry(endpoint.ip.to_canonical()).or_default();
            let port = ExemptPort { port: endpoint.port, protocol: proto::TCP };
            if !ports.contains(&port) {
                ports.push(port);
            }
        }
        called
    }

    fn dns(&self, world: &World) -> Policy {
        let own = world.services.values().filter(|service| service.is_resolver);
        let mut names: BTreeSet<ObjectName> = own.map(|service| service.name.clone()).collect();
        let mut addresses: BTreeSet<IpAddr> = BTreeSet::new();
        for resolver in &self.resolvers {
            match resolver {
                Resolver::Address(ip) => {
                    addresses.insert(*ip);
                }
                Resolver::Service { namespace, name } => {
                    let (namespace, name) = (namespace.as_str().into(), name.as_str().into());
                    names.insert(ObjectName { namespace, name });
                }
            }
        }
        let mut targets = BTreeSet::new();
        // Only their port 53 and what is behind it: not their metrics.
        for service in names.iter().filter_map(|name| world.services.get(name)) {
            for port in service.ports.iter().filter(|port| port.port == DNS_PORT) {
                let at = |ip: IpAddr, number: u16| Target {
                    ip: ip.to_canonical(),
                    port: number,
                    protocol: port.protocol,
                };
                targets.extend(service.cluster_ips.iter().map(|ip| at(*ip, port.port)));
                targets.extend(port.endpoints.iter().map(|e| at(e.ip, e.port)));
            }
        }
        let names = names.into_iter().map(|name| (name.namespace, name.name)).collect();
        let addresses: Vec<IpAddr> = addresses.into_iter().collect();
        builtin::dns(names, targets.into_iter().collect(), &addresses)
    }
}

/// What is behind the Services' ports that the API server calls, each with who says so: pods of
/// the Service's own namespace. Whoever may write EndpointSlices there can put any address behind
/// it, and must not open another namespace's pods by that.
pub fn called_endpoints(world: &World) -> impl Iterator<Item = (&BTreeSet<Arc<str>>, &Endpoint)> {
    world.called.iter().flat_map(|((name, number), who)| {
        let service = world.services.get(name);
        let ports = service.into_iter().flat_map(|service| &service.ports);
        let meant = ports.filter(|port| port.port == *number && port.protocol == proto::TCP);
        let is_own = |endpoint: &&Endpoint| {
            world.pod_at(endpoint.ip).is_some_and(|pod| pod.name.namespace == name.namespace)
        };
        meant.flat_map(|port| &port.endpoints).filter(is_own).map(move |endpoint| (who, endpoint))
    })
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use signet_ebpf::abi::Mode;

    use super::*;
    use crate::{
        cluster::model::{ModeOrigin, Pod, PodUid, Service, ServicePort},
        policy::model::Rule,
        spiffe::TrustDomain,
    };

    fn service(namespace: &str, name: &str, is_resolver: bool, vip: &str) -> Arc<Service> {
        let port = |port: u16, protocol, target| ServicePort {
            name: format!("p{port}").into(),
            port,
            protocol,
            endpoints: vec![Endpoint {
                ip: "10.0.0.3".parse().unwrap(),
                port: target,
                ready: true,
                serving: true,
                node: None,
                zones: [].into(),
            }],
        };
        Arc::new(Service {
            name: ObjectName { namespace: namespace.into(), name: name.into() },
            cluster_ips: vec![vip.parse().unwrap()],
            external_ips: vec![],
            node_local: false,
            sticky: false,
            ports: vec![port(53, 17, 5353), port(53, 6, 5353), port(9153, 6, 9153)],
            is_resolver,
        })
    }

    fn world(services: &[Arc<Service>]) -> World {
        let mut world = World::empty(TrustDomain::parse("cluster.local").unwrap());
        world.services = services.iter().map(|s| (s.name.clone(), s.clone())).collect();
        world
    }

    /// A pod of a namespace at an address, which nobody else has any more.
    fn put(world: &mut World, namespace: &str, ip: IpAddr) {
        let uid: PodUid = namespace.into();
        let pod = Pod {
            uid: uid.clone(),
            name: ObjectName { namespace: namespace.into(), name: "pod".into() },
            service_account: "default".into(),
            node: None,
            ips: vec![ip],
            labels: Arc::default(),
            workload: None,
            host_network: false,
            finished: false,
            terminating: false,
            alive: true,
            mirror: false,
            named_ports: BTreeMap::new(),
            mode: Mode::Strict,
            mode_origin: ModeOrigin::Namespace,
            exempt_ports: Arc::default(),
            strict_ports: None,
            unenforceable: None,
            captured: false,
        };
        world.pods.insert(uid.clone(), Arc::new(pod));
        world.pods_by_ip.insert(ip, uid);
    }

    fn reached(policy: &Policy) -> Vec<String> {
        let targets = policy.egress.iter().flat_map(Rule::all_peers).flat_map(|p| &p.targets);
        targets.map(|t| format!("{}:{}/{}", t.ip, t.port, t.protocol)).collect()
    }

    #[test]
    fn what_the_api_server_calls_is_exempt_behind_its_service_only() {
        let mut world = world(&[
            service("shop", "hook", false, "10.96.0.20"),
            service("shop", "other", false, "10.96.0.21"),
        ]);
        let hook = ObjectName { namespace: "shop".into(), name: "hook".into() };
        let gone = ObjectName { namespace: "shop".into(), name: "gone".into() };
        let who = BTreeSet::from(["APIService v1.x".into()]);
        world.called =
            Arc::new([((hook, 9153), who.clone()), ((gone, 443), who)].into_iter().collect());
        let mut builtins = Builtins::default();
        let ip: IpAddr = "10.0.0.3".parse().unwrap();
        // Nobody's address, and a pod of another namespace that somebody put behind the Service.
        assert!(builtins.called(&world).is_empty());
        put(&mut world, "bank", ip);
        assert!(builtins.called(&world).is_empty());
        put(&mut world, "shop", ip);
        let called = builtins.called(&world);
        assert_eq!(called.len(), 1);
        assert_eq!(called[&ip], [ExemptPort { port: 9153, protocol: 6 }]);
        // A port that nobody calls is closed, and so is all of it once that is removed.
        builtins.in_force = vec![Builtin::Dns];
        assert!(builtins.called(&world).is_empty());
    }

    #[test]
    fn the_clusters_resolver_is_found_and_only_its_port_53() {
        let world = world(&[
            service("kube-system", "kube-dns", true, "10.96.0.10"),
            service("shop", "dns", false, "10.96.0.77"),
        ]);
        let mut builtins = Builtins::default();
        let policies = builtins.policies(&world);
        let vip_and_endpoint =
            ["10.0.0.3:5353/6", "10.0.0.3:5353/17", "10.96.0.10:53/6", "10.96.0.10:53/17"];
        assert_eq!(reached(&policies[0]), vip_and_endpoint);
        // One more, by name and by address; one that is not there reaches nothing.
        builtins.resolvers = vec![
            Resolver::Service { namespace: "shop".into(), name: "dns".into() },
            Resolver::Service { namespace: "shop".into(), name: "gone".into() },
            Resolver::Address("169.254.20.10".parse().unwrap()),
        ];
        let policy = builtins.policy(Builtin::Dns, &world);
        assert!(reached(&policy).contains(&"10.96.0.77:53/17".to_owned()));
        assert_eq!(policy.egress.len(), 2);
        // Removed, it is none of the pods' policies.
        builtins.in_force = vec![Builtin::KubeletProbes];
        assert!(builtins.policies(&world).is_empty());
    }
}
