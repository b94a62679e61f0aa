//! Which NetworkPolicies would keep peers from the tunnels' port.
//!
//! Traffic that a rule lets pass in clear arrives at port 15008 once both ends are enrolled. So
//! for every rule about TCP whose peers can be pods there must be one, in any policy that
//! selects the same pods, that lets the same peers reach 15008.

use std::{collections::BTreeSet, sync::Arc};

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
}

impl Blocking {
    /// The rule, in words.
    pub fn text(&self) -> String {
        let (direction, whom) =
            if self.egress { ("egress", "its own pods to") } else { ("ingress", "callers of") };
        format!(
            "{direction}[{}] lets {whom} {} pass, but not the tunnels' port {TUNNEL_PORT} in which \
             that travels once it is enrolled ({} pods)",
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

/// Every rule of the namespace's NetworkPolicies that tunnels would not get past.
pub fn blocking(world: &World, namespace: &str) -> Vec<Blocking> {
    let own: Vec<&Arc<NetworkPolicy>> =
        world.network_policies.iter().filter(|p| &*p.name.namespace == namespace).collect();
    let mut found = Vec::new();
    for egress in [false, true] {
        for policy in &own {
            let Some(rules) = rules(policy, egress) else { continue };
            let pods: Vec<&Arc<Pod>> = policy.selected(world).collect();
            for (index, rule) in rules.iter().enumerate() {
                if !rule.speaks_tcp() || rule.covers_tcp(TUNNEL_PORT) {
                    continue;
                }
                let blocked =
                    pods.iter().filter(|pod| !is_covered(world, &own, egress, pod, rule)).count();
                if blocked > 0 {
                    found.push(Blocking {
                        policy: (*policy).clone(),
                        egress,
                        rule: index,
                        ports: ports(rule),
                        pods: blocked,
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
    let selecting = policies.iter().filter(|p| p.pods.matches(&pod.labels));
    let open: Vec<&Rule> = selecting
        .filter_map(|p| rules(p, egress))
        .flatten()
        .filter(|rule| rule.covers_tcp(TUNNEL_PORT))
        .collect();
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
    let reached: BTreeSet<&PodUid> = open
        .iter()
        .flat_map(|open| &open.peers)
        .flat_map(|peer| peer.pods(world, namespace))
        .map(|pod| &pod.uid)
        .collect();
    wanted.is_subset(&reached)
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
