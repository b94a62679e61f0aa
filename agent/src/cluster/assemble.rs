//! Objects → World: joins what sources have read. Pure, but for the labels' memory.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    net::IpAddr,
    sync::Arc,
};

use super::{
    called::by_service,
    model::{
        Endpoint, Namespace, ObjectName, Override, Pod, PodUid, Problem, Ranges, Service,
        ServicePort, Synced, World,
    },
    modes::{LabelMemory, check_namespace, check_pod, mode_name},
    objects::{EndpointFacts, Objects, PodFacts, ServiceFacts, SliceFacts},
    plaintext::Plaintext,
};
use crate::{
    policy::{
        end_user::RequestAuthentication,
        istio::PeerAuthentication,
        model::{Policy, PolicySet, Rule, Target},
    },
    spiffe::TrustDomain,
    trust::federation::Federation,
};

/// What a World is made of, beside the objects.
#[derive(Clone, Debug)]
pub struct Surroundings {
    /// The cluster's own trust domain.
    pub trust_domain: TrustDomain,
    /// Configured ranges; a list that is empty falls back to what the cluster declares.
    pub ranges: Ranges,
    /// Foreign trust domains and the peers that are dialled there.
    pub federation: Arc<Federation>,
    /// Every policy that was read.
    pub policies: Vec<Arc<Policy>>,
    /// Every PeerAuthentication that was read.
    pub peer_authentications: Vec<Arc<PeerAuthentication>>,
    /// Every RequestAuthentication that was read.
    pub request_authentications: Vec<Arc<RequestAuthentication>>,
    /// The namespace whose Istio objects are the mesh's.
    pub root_namespace: Arc<str>,
    /// What overrides modes and policies.
    pub enforcement: Override,
    /// Announcements: pod uid → the node that claims to serve it.
    pub announced: HashMap<PodUid, Arc<str>>,
    /// What the source could not read.
    pub problems: Vec<Problem>,
    /// What has been read to its end.
    pub synced: Synced,
}

/// Joins objects; remembers last valid label values between Worlds.
#[derive(Clone, Debug, Default)]
pub struct Assembler {
    memory: LabelMemory,
}

impl Assembler {
    /// One for a cluster whose namespaces allow or deny where their labels do not say.
    pub fn new(default_deny: bool) -> Self {
        Self { memory: LabelMemory::new(default_deny) }
    }

    /// The World of these objects, with revision 0.
    pub fn assemble(&mut self, objects: &Objects, around: Surroundings) -> World {
        let mut problems = around.problems;
        let mut namespaces = BTreeMap::new();
        for facts in &objects.namespaces {
            for fault in check_namespace(&facts.labels, &facts.annotations) {
                problems.push(Problem {
                    subject: subject("namespace", &facts.name, &facts.origin),
                    message: format!("{}: {}", fault.key, fault.message),
                });
            }
            namespaces.insert(facts.name.clone(), self.memory.namespace(facts));
        }
        self.add_vanished(objects, &mut namespaces, &mut problems);
        let mut pods = HashMap::with_capacity(objects.pods.len());
        for facts in &objects.pods {
            let pod = self.pod(facts, namespaces.get(&facts.name.namespace), &mut problems);
            pods.insert(facts.uid.clone(), pod);
        }
        let plaintext = Plaintext::new(around.peer_authentications, &around.root_namespace);
        let (peer_authentications, carried) = plaintext.apply(&namespaces, &mut pods);
        self.memory.retain(
            &namespaces.keys().cloned().collect(),
            &objects.pods.iter().map(|pod| pod.uid.clone()).collect(),
        );
        let pods = pods.into_iter().map(|(uid, pod)| (uid, Arc::new(pod))).collect();
        let served = served(around.announced, &pods, &mut problems);
        let pods_by_ip = pods_by_ip(&objects.pods);
        let ranges = ranges(around.ranges, objects);
        let services = services(objects, &pods_by_ip, &ranges);
        let services_by_ip = services
            .values()
            .flat_map(|s| s.cluster_ips.iter().map(|ip| (*ip, s.name.clone())))
            .collect();
        let mut services_by_external_ip: HashMap<_, Vec<_>> = HashMap::new();
        for service in services.values() {
            for ip in &service.external_ips {
                services_by_external_ip.entry(*ip).or_default().push(service.name.clone());
            }
        }
        let mut policies: Vec<_> =
            around.policies.into_iter().map(|policy| with_targets(policy, &services)).collect();
        policies.sort_by(|a, b| a.name.cmp(&b.name));
        let mut request_authentications = around.request_authentications;
        request_authentications.sort_by(|a, b| a.name.cmp(&b.name));
        let mut network_policies = objects.network_policies.clone();
        network_policies.sort_by(|a, b| a.name.cmp(&b.name));
        problems.sort_by(|a, b| (&a.subject, &a.message).cmp(&(&b.subject, &b.message)));
        problems.dedup();
        World {
            revision: 0,
            trust_domain: around.trust_domain,
            namespaces: namespaces
                .into_iter()
                .map(|(name, (namespace, _)): (_, (Namespace, _))| (name, namespace))
                .collect(),
            pods_by_ip,
            pods,
            services,
            services_by_ip,
            services_by_external_ip,
            service_accounts: objects.service_accounts.iter().cloned().collect(),
            nodes: objects
                .nodes
                .iter()
                .map(|node| (node.name.clone(), node.addresses.clone()))
                .collect(),
            zones: objects
                .nodes
                .iter()
                .filter_map(|node| Some((node.name.clone(), node.zone.clone()?)))
                .collect(),
            policies: Arc::new(PolicySet { policies, carried, request_authentications }),
            peer_authentications,
            network_policies,
            called: Arc::new(by_service(objects.called.iter().map(AsRef::as_ref))),
            enforcement: around.enforcement,
            ranges,
            federation: around.federation,
            served,
            problems,
            synced: around.synced,
        }
    }

    /// Pods whose Namespace object is not there: the last state known of it stays in force.
    fn add_vanished(
        &mut self,
        objects: &Objects,
        namespaces: &mut BTreeMap<Arc<str>, (Namespace, super::model::ModeOrigin)>,
        problems: &mut Vec<Problem>,
    ) {
        let orphaned: BTreeSet<&Arc<str>> = objects
            .pods
            .iter()
            .map(|pod| &pod.name.namespace)
            .filter(|name| !namespaces.contains_key(*name))
            .collect();
        for name in orphaned {
            let last = self.memory.vanished_namespace(name);
            problems.push(Problem {
                subject: format!("namespace {name}"),
                message: match &last {
                    Some((last, _)) => format!(
                        "has pods but no Namespace object any more; its last mode {} stays until \
                         they are gone",
                        mode_name(last.mode)
                    ),
                    None => "has pods but no Namespace object; they are off until there is one"
                        .to_owned(),
                },
            });
            if let Some(last) = last {
                namespaces.insert(name.clone(), last);
            }
        }
    }

    fn pod(
        &mut self,
        facts: &PodFacts,
        namespace: Option<&(Namespace, super::model::ModeOrigin)>,
        problems: &mut Vec<Problem>,
    ) -> Pod {
        let shown = || {
            let name = format!("{}/{}", facts.name.namespace, facts.name.name);
            subject("pod", &name, &facts.origin)
        };
        let (mode, mode_origin, ignored) = self.memory.pod(facts, namespace);
        for fault in check_pod(&facts.labels).into_iter().chain(ignored) {
            problems.push(Problem {
                subject: shown(),
                message: format!("{}: {}", fault.key, fault.message),
            });
        }
        if let Some(why) = &facts.unenforceable
            && mode.is_enforced()
            && !facts.finished
        {
            problems.push(Problem {
                subject: shown(),
                message: format!("unenforceable in mode {}: {why}", mode_name(mode)),
            });
        }
        Pod {
            uid: facts.uid.clone(),
            name: facts.name.clone(),
            service_account: facts.service_account.clone(),
            node: facts.node.clone(),
            ips: facts.ips.clone(),
            labels: facts.labels.clone(),
            workload: facts.workload.clone(),
            host_network: facts.host_network,
            finished: facts.finished,
            terminating: facts.terminating,
            alive: facts.alive,
            mirror: facts.mirror,
            named_ports: facts.named_ports.clone(),
            mode,
            mode_origin,
            exempt_ports: namespace.map(|(n, _)| n.exempt_ports.clone()).unwrap_or_default(),
            strict_ports: None,
            unenforceable: facts.unenforceable.clone(),
            captured: facts.captured,
        }
    }
}

/// `namespace shop (namespaces.yaml:3)`.
fn subject(kind: &str, name: &str, origin: &str) -> String {
    if origin.is_empty() { format!("{kind} {name}") } else { format!("{kind} {name} ({origin})") }
}

/// The newest pod that is neither finished nor in the host's network has the address.
fn pods_by_ip(pods: &[Arc<PodFacts>]) -> HashMap<IpAddr, PodUid> {
    let mut owners: HashMap<IpAddr, &PodFacts> = HashMap::new();
    // Of two that began in the same second, the one that stays; then by uid, so that every
    // node answers alike.
    let rank = |pod: &PodFacts| (pod.alive, pod.created, !pod.terminating, pod.uid.clone());
    for pod in pods.iter().filter(|pod| !pod.finished && !pod.host_network) {
        for ip in &pod.ips {
            let owner = owners.entry(*ip).or_insert(pod);
            if rank(owner) < rank(pod) {
                *owner = pod;
            }
        }
    }
    owners.into_iter().map(|(ip, pod)| (ip, pod.uid.clone())).collect()
}

/// Announcements of a node that the pod is bound to; others are ignored and reported.
fn served(
    announced: HashMap<PodUid, Arc<str>>,
    pods: &HashMap<PodUid, Arc<Pod>>,
    problems: &mut Vec<Problem>,
) -> HashMap<PodUid, Arc<str>> {
    announced
        .into_iter()
        .filter(|(uid, node)| {
            // A uid that nobody knows is a pod that is gone, or not here yet.
            let Some(pod) = pods.get(uid) else { return false };
            if pod.node.as_ref() == Some(node) {
                return true;
            }
            problems.push(Problem {
                subject: format!("status of node {node}"),
                message: format!(
                    "served: claims pod {}/{}, which is bound to {}; ignored",
                    pod.name.namespace,
                    pod.name.name,
                    pod.node.as_deref().unwrap_or("no node")
                ),
            });
            false
        })
        .collect()
}

/// Configured ranges, else what Nodes, ServiceCIDRs and IPPools declare (DESIGN §2).
fn ranges(configured: Ranges, objects: &Objects) -> Ranges {
    let mut ranges = configured;
    if ranges.pods.is_empty() {
        let nodes = objects.nodes.iter().flat_map(|node| node.pod_ranges.iter());
        let declared = objects.ranges.iter().flat_map(|declared| declared.pods.iter());
        ranges.pods = nodes.chain(declared).copied().collect();
    }
    if ranges.services.is_empty() {
        let declared = objects.ranges.iter().flat_map(|declared| declared.services.iter());
        ranges.services = declared.copied().collect();
    }
    for list in [&mut ranges.pods, &mut ranges.services, &mut ranges.outside] {
        list.sort();
        list.dedup();
    }
    ranges
}

/// The policy with its Services' present addresses.
fn with_targets(
    mut policy: Arc<Policy>,
    services: &BTreeMap<ObjectName, Arc<Service>>,
) -> Arc<Policy> {
    if policy.egress.iter().flat_map(Rule::all_peers).all(|peer| peer.services.is_empty()) {
        return policy;
    }
    let filled = Arc::make_mut(&mut policy);
    for peer in filled.egress.iter_mut().flat_map(|rule| &mut rule.peers) {
        let mut targets = BTreeSet::new();
        for (namespace, name) in &peer.services {
            let name = ObjectName { namespace: namespace.clone(), name: name.clone() };
            let Some(service) = services.get(&name) else { continue };
            for port in &service.ports {
                let at = |ip: IpAddr, number: u16| Target {
                    ip: ip.to_canonical(),
                    port: number,
                    protocol: port.protocol,
                };
                targets.extend(service.cluster_ips.iter().map(|ip| at(*ip, port.port)));
                targets.extend(port.endpoints.iter().map(|e| at(e.ip, e.port)));
            }
        }
        peer.targets = targets.into_iter().collect();
    }
    policy
}

fn services(
    objects: &Objects,
    pods_by_ip: &HashMap<IpAddr, PodUid>,
    ranges: &Ranges,
) -> BTreeMap<ObjectName, Arc<Service>> {
    // A Service may claim any address as its external one: never one that is somebody's here,
    // or may be, as far as is known.
    let virtual_ones = objects.services.iter().flat_map(|service| &service.cluster_ips);
    let taken: HashSet<IpAddr> = objects
        .nodes
        .iter()
        .flat_map(|node| &node.addresses)
        .chain(virtual_ones)
        .chain(pods_by_ip.keys())
        .copied()
        .collect();
    let mut slices: HashMap<&ObjectName, Vec<&SliceFacts>> = HashMap::new();
    for slice in &objects.slices {
        slices.entry(&slice.service).or_default().push(slice);
    }
    objects
        .services
        .iter()
        .map(|facts| {
            let slices = slices.get(&facts.name).map(Vec::as_slice).unwrap_or_default();
            let mut service = service(facts, slices);
            service.external_ips.retain(|ip| !taken.contains(ip) && !ranges.holds(*ip));
            (facts.name.clone(), Arc::new(service))
        })
        .collect()
}

fn service(facts: &ServiceFacts, slices: &[&SliceFacts]) -> Service {
    let port = |(name, port, protocol): &(Arc<str>, u16, u8)| ServicePort {
        name: name.clone(),
        port: *port,
        protocol: *protocol,
        endpoints: endpoints(slices, name, *port, *protocol),
    };
    Service {
        name: facts.name.clone(),
        cluster_ips: facts.cluster_ips.clone(),
        external_ips: facts.external_ips.clone(),
        node_local: facts.node_local,
        sticky: facts.sticky,
        ports: facts.ports.iter().map(port).collect(),
        is_resolver: facts.is_resolver,
    }
}

/// The ready endpoints of a port by its name, and the terminating ones that still serve: which
/// of them a client is given depends on its node.
fn endpoints(slices: &[&SliceFacts], name: &str, port: u16, protocol: u8) -> Vec<Endpoint> {
    let mut found = Vec::new();
    for slice in slices {
        for (slice_name, target, slice_protocol) in &slice.ports {
            if slice_name.as_ref() != name || *slice_protocol != protocol {
                continue;
            }
            let target = target.unwrap_or(port);
            for EndpointFacts { ip, conditions, node, zones } in &slice.endpoints {
                let takes = conditions.ready || (conditions.serving && conditions.terminating);
                if takes {
                    found.push(Endpoint {
                        ip: *ip,
                        port: target,
                        ready: conditions.ready,
                        serving: conditions.serving,
                        node: node.clone(),
                        zones: zones.clone(),
                    });
                }
            }
        }
    }
    // One that two slices name counts once, as ready where either says so.
    found.sort_by_key(|e| (e.ip, e.port, !e.ready));
    found.dedup_by_key(|e| (e.ip, e.port));
    found
}

#[cfg(test)]
mod tests;
