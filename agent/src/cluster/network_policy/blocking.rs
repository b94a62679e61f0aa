//! Which NetworkPolicies would keep peers from the tunnels' port.
//!
//! Traffic that a rule lets pass in clear arrives at port 15008 once both ends are enrolled. So
//! for every rule about TCP whose peers can be pods there must be one, in any policy that
//! selects the same pods, that lets the same peers reach 15008. That holds for the namespace's
//! own policies, and for those of namespaces that are enrolled already: what their pods dial in
//! it, and who of it dials them.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use signet_ebpf::abi::TUNNEL_PORT;

use super::{NetworkPolicy, Peer, PortNumber, Rule};
use crate::cluster::model::{Pod, PodUid, World};

/// A rule without a way for tunnels.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Blocking {
    /// Its policy.
    pub policy: Arc<NetworkPolicy>,
    /// It is about what the pods dial.
    pub egress: bool,
    /// Its index among the policy's rules of the direction.
    pub rule: usize,
    /// The ports that it lets pass now, for people: `8080/tcp`.
    pub ports: String,
    /// Pods that it is about now.
    pub pods: usize,
    /// The namespace whose enrolment makes it block, where that is not the policy's own.
    pub other: Option<Arc<str>>,
}

impl Blocking {
    /// The rule, in words.
    pub fn text(&self) -> String {
        let (direction, whom) =
            if self.egress { ("egress", "its own pods to") } else { ("ingress", "callers of") };
        let enrolled = self.other.as_deref().unwrap_or("it");
        format!(
            "{direction}[{}] lets {whom} {} pass, but not the tunnels' port {TUNNEL_PORT} in which \
             that travels once {enrolled} is enrolled ({} pods)",
            self.rule, self.ports, self.pods
        )
    }

    /// What to add.
    pub fn remedy(&self) -> String {
        let direction = if self.egress { "egress" } else { "ingress" };
        format!(
            "add to spec.{direction}[{}].ports of NetworkPolicy {}/{}: {{port: {TUNNEL_PORT}, \
             protocol: TCP}}",
            self.rule, self.policy.name.namespace, self.policy.name.name
        )
    }
}

/// Every rule of NetworkPolicies that tunnels of and to the namespace's pods would not get past:
/// first its own policies', then those of enrolled namespaces.
pub fn blocking(world: &World, namespace: &str) -> Vec<Blocking> {
    let mut by_namespace = BTreeMap::<&str, Vec<&Arc<NetworkPolicy>>>::new();
    for policy in world.network_policies.iter() {
        by_namespace.entry(&policy.name.namespace).or_default().push(policy);
    }
    let own = by_namespace.remove(namespace).unwrap_or_default();
    let mut found = blocking_of(world, &own, None);
    for policies in by_namespace.values() {
        found.extend(blocking_of(world, policies, Some(namespace)));
    }
    found
}

/// The rules of one namespace's policies; with `other`, only as far as they are about pods of
/// that namespace, and of pods that are enrolled.
fn blocking_of(
    world: &World,
    policies: &[&Arc<NetworkPolicy>],
    other: Option<&str>,
) -> Vec<Blocking> {
    let mut found = Vec::new();
    for egress in [false, true] {
        for policy in policies {
            let Some(rules) = rules(policy, egress) else { continue };
            let is_met = |pod: &&Arc<Pod>| other.is_none() || pod.is_enrolled();
            let pods: Vec<&Arc<Pod>> = policy.selected(world).filter(is_met).collect();
            for (index, rule) in rules.iter().enumerate() {
                if pods.is_empty() || !rule.speaks_tcp() || rule.covers_tcp(TUNNEL_PORT) {
                    continue;
                }
                let is_blocked = |pod: &&&Arc<Pod>| match other {
                    None => !is_covered(world, policies, egress, pod, rule),
                    Some(other) => !is_covered_for(world, policies, egress, pod, rule, other),
                };
                let blocked = pods.iter().filter(is_blocked).count();
                if blocked > 0 {
                    found.push(Blocking {
                        policy: (*policy).clone(),
                        egress,
                        rule: index,
                        ports: ports(rule),
                        pods: blocked,
                        other: other.map(Arc::from),
                    });
                }
            }
        }
    }
    found
}

fn rules(policy: &NetworkPolicy, egress: bool) -> Option<&Vec<Rule>> {
    if egress { policy.egress.as_ref() } else { policy.ingress.as_ref() }
}

/// True when all pods that the rule lets pass reach the pod's tunnels (or it theirs) by some
/// rule.
fn is_covered(
    world: &World,
    policies: &[&Arc<NetworkPolicy>],
    egress: bool,
    pod: &Pod,
    rule: &Rule,
) -> bool {
    let namespace = &*pod.name.namespace;
    let open = open(policies, egress, pod);
    if open.iter().any(|open| open.peers.is_empty()) {
        return true;
    }
    if rule.peers.is_empty() {
        return false;
    }
    // The same selector covers pods that are not there yet; else those that are now.
    let mut wanted: BTreeSet<&PodUid> = BTreeSet::new();
    for peer in &rule.peers {
        if open.iter().any(|open| open.peers.contains(peer)) {
            continue;
        }
        if let Peer::Pods { .. } = peer
            && peer.pods(world, namespace).is_empty()
        {
            return false;
        }
        // Addresses of nobody in the cluster never come through a tunnel.
        wanted.extend(peer.pods(world, namespace).iter().map(|pod| &pod.uid));
    }
    wanted.is_subset(&reached(world, &open, namespace))
}

/// True when those pods of `other` that the rule lets pass reach the pod's tunnels (or it
/// theirs) by some rule.
fn is_covered_for(
    world: &World,
    policies: &[&Arc<NetworkPolicy>],
    egress: bool,
    pod: &Pod,
    rule: &Rule,
    other: &str,
) -> bool {
    let namespace = &*pod.name.namespace;
    let open = open(policies, egress, pod);
    if open.iter().any(|open| open.peers.is_empty()) {
        return true;
    }
    let everybody = world.pods.values().filter(|pod| !pod.finished && !pod.host_network);
    let wanted: BTreeSet<&PodUid> = everybody
        .filter(|pod| &*pod.name.namespace == other)
        .filter(|pod| {
            rule.peers.is_empty()
                || rule.peers.iter().any(|peer| peer.is_about(world, namespace, pod))
        })
        .map(|pod| &pod.uid)
        .collect();
    wanted.is_subset(&reached(world, &open, namespace))
}

/// The rules that let somebody pass to the pod's tunnels, or it to others'.
fn open<'a>(policies: &'a [&Arc<NetworkPolicy>], egress: bool, pod: &Pod) -> Vec<&'a Rule> {
    let selecting = policies.iter().filter(|p| p.pods.matches(&pod.labels));
    selecting
        .filter_map(|p| rules(p, egress))
        .flatten()
        .filter(|rule| rule.covers_tcp(TUNNEL_PORT))
        .collect()
}

/// The pods that such rules name, of policies in `namespace`.
fn reached<'a>(world: &'a World, open: &[&'a Rule], namespace: &'a str) -> BTreeSet<&'a PodUid> {
    open.iter()
        .flat_map(|open| &open.peers)
        .flat_map(|peer| peer.pods(world, namespace))
        .map(|pod| &pod.uid)
        .collect()
}

/// `8080/tcp, http/tcp`.
fn ports(rule: &Rule) -> String {
    let shown =
        rule.ports.iter().filter(|p| p.protocol == Some(6)).map(|port| match &port.number {
            PortNumber::All => "all of tcp".to_owned(),
            PortNumber::Range(first, last) if first == last => format!("{first}/tcp"),
            PortNumber::Range(first, last) => format!("{first}-{last}/tcp"),
            PortNumber::Named(name) => format!("{name}/tcp"),
        });
    shown.collect::<Vec<_>>().join(", ")
}
