//! NetworkPolicies → ALLOW policies on identities: those of the pods that the selectors select
//! now. What cannot be said so is told.
//!
//! A NetworkPolicy closes the pods that it selects but for its rules, and so does an ALLOW; the
//! rules of several add up in both. Callers are known by accounts rather than by labels, so
//! another pod of the same account comes in too, which is told as well.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use ipnet::IpNet;
use signet_ebpf::abi::{TUNNEL_PORT, proto};

use super::{NetworkPolicy, Peer, Port, PortNumber, Rule};
use crate::cluster::model::{ObjectName, Pod, World};

/// An ALLOW for what a NetworkPolicy lets in.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Suggested {
    /// The NetworkPolicy's name.
    pub name: ObjectName,
    /// Its pods' labels; empty: every pod of the namespace.
    pub selector: BTreeMap<Arc<str>, Arc<str>>,
    /// None: nobody comes in. `None` where the policy as a whole is not translated.
    pub rules: Option<Vec<SuggestedRule>>,
    /// What could not be translated, or is wider.
    pub remarks: Vec<String>,
}

/// Any of the peers, any of the ports.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct SuggestedRule {
    /// Empty: everybody.
    pub peers: Vec<SuggestedPeer>,
    /// Ranges, all of one protocol; empty: every port.
    pub ports: Vec<(u16, u16)>,
    /// Datagrams, whose senders are known by their addresses alone.
    pub udp: bool,
}

/// Who may come in.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum SuggestedPeer {
    /// Every pod of these namespaces.
    Namespaces(BTreeSet<Arc<str>>),
    /// These accounts, as (namespace, name).
    Accounts(BTreeSet<(Arc<str>, Arc<str>)>),
    /// These addresses, without some of them.
    Block {
        /// They.
        block: IpNet,
        /// Without these.
        except: Vec<IpNet>,
    },
}

/// Translates the namespace's policies, by name.
pub fn translate(world: &World, namespace: &str) -> Vec<Suggested> {
    let own = world.network_policies.iter().filter(|p| &*p.name.namespace == namespace);
    own.map(|policy| suggestion(world, policy)).collect()
}

fn suggestion(world: &World, policy: &NetworkPolicy) -> Suggested {
    let mut remarks = BTreeSet::new();
    if policy.egress.is_some() {
        remarks.insert("not translated: egress".to_owned());
    }
    let mut rules = None;
    if !policy.pods.expressions.is_empty() {
        remarks.insert(
            "not translated: its podSelector has matchExpressions, which a policy's selector has \
             not; give the pods a label of their own"
                .into(),
        );
    } else if let Some(ingress) = &policy.ingress {
        let pods: Vec<&Arc<Pod>> = policy.selected(world).collect();
        let mut all = Vec::new();
        for (index, rule) in ingress.iter().enumerate() {
            translate_rule(world, policy, &pods, (index, rule), &mut all, &mut remarks);
        }
        rules = Some(all);
    }
    Suggested {
        name: policy.name.clone(),
        selector: policy.pods.labels.clone(),
        rules,
        remarks: remarks.into_iter().collect(),
    }
}

fn translate_rule(
    world: &World,
    policy: &NetworkPolicy,
    pods: &[&Arc<Pod>],
    (index, rule): (usize, &Rule),
    all: &mut Vec<SuggestedRule>,
    remarks: &mut BTreeSet<String>,
) {
    let mut peers = Vec::new();
    for (number, peer) in rule.peers.iter().enumerate() {
        let at = format!("ingress[{index}].from[{number}]");
        peers.extend(translate_peer(world, policy, peer, &at, remarks));
    }
    if peers.is_empty() && !rule.peers.is_empty() {
        // Without peers it would be everybody.
        return;
    }
    let (mut tcp, mut udp) = (BTreeSet::new(), BTreeSet::new());
    for (number, port) in rule.ports.iter().enumerate() {
        let at = format!("ingress[{index}].ports[{number}]");
        let ranges = ranges(port, pods, &at, remarks);
        match port.protocol {
            Some(proto::TCP) => tcp.extend(ranges),
            Some(_) => udp.extend(ranges),
            None => {
                remarks.insert(format!("not translated: {at}: SCTP"));
            }
        }
    }
    // What stands there for tunnels is no port of the pod's own.
    tcp.remove(&(TUNNEL_PORT, TUNNEL_PORT));
    let every = rule.ports.is_empty();
    if every || !tcp.is_empty() {
        let ports = tcp.into_iter().filter(|_| !every).collect();
        all.push(SuggestedRule { peers: peers.clone(), ports, udp: false });
    }
    // Everybody, by any protocol, is said already.
    if (every && !peers.is_empty()) || !udp.is_empty() {
        let ports = if every { vec![(1, u16::MAX)] } else { udp.into_iter().collect() };
        all.push(SuggestedRule { peers, ports, udp: true });
    }
}

fn translate_peer(
    world: &World,
    policy: &NetworkPolicy,
    peer: &Peer,
    at: &str,
    remarks: &mut BTreeSet<String>,
) -> Option<SuggestedPeer> {
    let own = &policy.name.namespace;
    let (namespaces, labels) = match peer {
        Peer::Block { block, except } => {
            return Some(SuggestedPeer::Block { block: *block, except: except.clone() });
        }
        Peer::Pods { namespaces, pods } => (namespaces, pods),
    };
    if labels.is_empty() {
        let selected: BTreeSet<Arc<str>> = match namespaces {
            None => BTreeSet::from([own.clone()]),
            Some(selector) => world
                .namespaces
                .values()
                .filter(|n| selector.matches(&n.labels))
                .map(|n| n.name.clone())
                .collect(),
        };
        if selected.is_empty() {
            remarks.insert(format!("left out: {at} selects no namespace now"));
            return None;
        }
        return Some(SuggestedPeer::Namespaces(selected));
    }
    let selected = peer.pods(world, own);
    if selected.is_empty() {
        remarks.insert(format!("left out: {at} selects no pod now"));
        return None;
    }
    let account = |pod: &Pod| (pod.name.namespace.clone(), pod.service_account.clone());
    let accounts: BTreeSet<_> = selected.iter().map(|pod| account(pod)).collect();
    for pod in world.pods.values().filter(|pod| !pod.finished && !pod.host_network) {
        let (namespace, name) = account(pod);
        let shares = accounts.contains(&(namespace.clone(), name.clone()));
        if shares && !peer.is_about(world, own, pod) {
            remarks.insert(format!(
                "wider: {at} selects only some pods of the account {namespace}/{name}; give \
                 them one of their own"
            ));
        }
    }
    Some(SuggestedPeer::Accounts(accounts))
}

/// The port's numbers, a name's by the pods that have it.
fn ranges(
    port: &Port,
    pods: &[&Arc<Pod>],
    at: &str,
    remarks: &mut BTreeSet<String>,
) -> Vec<(u16, u16)> {
    match &port.number {
        PortNumber::All => vec![(1, u16::MAX)],
        PortNumber::Range(first, last) => vec![(*first, *last)],
        PortNumber::Named(name) => {
            let numbers: BTreeSet<u16> =
                pods.iter().filter_map(|pod| pod.named_ports.get(name).copied()).collect();
            if numbers.is_empty() {
                remarks.insert(format!("left out: {at}: no pod has a port {name} now"));
            }
            numbers.into_iter().map(|number| (number, number)).collect()
        }
    }
}
