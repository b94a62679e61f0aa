//! What all PeerAuthentications together ask of one pod, and what it gets under its labels.
//!
//! Istio resolves per pod: workload over namespace over mesh, the oldest on each level; an
//! unset mode inherits. The namespace's label `signet.dev/mode` is the floor (DESIGN §2):
//! only from there may PeerAuthentications tighten, and make exceptions down to it; below it
//! only where the Namespace lets pods override it.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use signet_ebpf::abi::{Mode, proto};

use super::{Mtls, PEER_AUTHENTICATION, PeerAuthentication};
use crate::policy::model::{Action, Destination, Peer, Policy, PolicyName, Ports, Rule, Selector};

/// What is asked for a port or a whole pod.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Demand {
    /// Plaintext is taken.
    Permissive,
    /// Plaintext is refused.
    Strict,
}

/// What is asked for one pod, each with the object that asks.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Demands {
    /// For every port; `None`: nothing is said on any level.
    pub mode: Option<(Demand, PolicyName)>,
    /// For single ports.
    pub ports: BTreeMap<u16, Demand>,
    /// The object that asks for single ports.
    pub ports_by: Option<PolicyName>,
}

/// What a pod gets.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Applied {
    /// The mode.
    pub mode: Mode,
    /// TCP ports on which a strict pod takes plaintext all the same.
    pub exempt: BTreeSet<u16>,
    /// Refuses plaintext on single ports of a permissive pod.
    pub strict_ports: Option<Arc<Policy>>,
    /// What was not followed, by object.
    pub ignored: Vec<(PolicyName, String)>,
}

/// What is asked of a pod with these labels, of a namespace. `all` may be of any namespaces.
pub fn resolve<'a>(
    all: impl IntoIterator<Item = &'a PeerAuthentication>,
    root: &str,
    namespace: &str,
    labels: &BTreeMap<Arc<str>, Arc<str>>,
) -> Demands {
    let (mut mesh, mut space, mut workload) = (None, None, None);
    for object in all.into_iter().filter(|object| !object.ignored) {
        let own = *object.name.namespace == *namespace;
        let slot = match &object.selector {
            None if own && namespace != root => &mut space,
            None if *object.name.namespace == *root => &mut mesh,
            Some(selector) if own && selector.iter().all(|(k, v)| labels.get(k) == Some(v)) => {
                &mut workload
            }
            _ => continue,
        };
        let age = |object: &PeerAuthentication| (object.created, object.name.clone());
        if slot.is_none_or(|held: &PeerAuthentication| age(object) < age(held)) {
            *slot = Some(object);
        }
    }
    let demand = |mtls: Mtls| match mtls {
        Mtls::Unset => None,
        Mtls::Disable | Mtls::Permissive => Some(Demand::Permissive),
        Mtls::Strict => Some(Demand::Strict),
    };
    let mode = [workload, space, mesh]
        .into_iter()
        .flatten()
        .find_map(|object| Some((demand(object.mode)?, object.name.clone())));
    let ports: BTreeMap<u16, Demand> = workload
        .iter()
        .flat_map(|object| &object.ports)
        .filter_map(|(port, mtls)| Some((*port, demand(*mtls)?)))
        .collect();
    let ports_by = workload.filter(|_| !ports.is_empty()).map(|object| object.name.clone());
    Demands { mode, ports, ports_by }
}

/// What a pod gets whose labels (and its namespace's) give it the mode `floor`.
///
/// `may_loosen` is the Namespace's `signet.dev/allow-pod-override`; `exempt` are the TCP
/// ports that the Namespace's annotation exempts.
pub fn apply(demands: &Demands, floor: Mode, may_loosen: bool, exempt: &BTreeSet<u16>) -> Applied {
    let mut applied =
        Applied { mode: floor, exempt: BTreeSet::new(), strict_ports: None, ignored: Vec::new() };
    if !floor.is_enforced() {
        // Nothing is enrolled by it; the caller says so once a namespace.
        return applied;
    }
    let keeps_floor = floor == Mode::Strict && !may_loosen;
    if let Some((demand, by)) = &demands.mode {
        match demand {
            Demand::Strict => applied.mode = Mode::Strict,
            Demand::Permissive if keeps_floor => {
                applied.ignored.push((by.clone(), looser("PERMISSIVE")));
            }
            Demand::Permissive => applied.mode = Mode::Permissive,
        }
    }
    let mut strict = Vec::new();
    for (port, demand) in &demands.ports {
        match (demand, applied.mode) {
            (Demand::Permissive, Mode::Strict) if keeps_floor => {
                let said = looser(&format!("PERMISSIVE for port {port}"));
                applied.ignored.extend(demands.ports_by.clone().map(|by| (by, said)));
            }
            (Demand::Permissive, Mode::Strict) => {
                applied.exempt.insert(*port);
            }
            (Demand::Strict, Mode::Permissive) if !exempt.contains(port) => {
                strict.push(Ports { first: *port, last: *port, protocol: Some(proto::TCP) });
            }
            _ => {}
        }
    }
    if let Some(by) = demands.ports_by.clone().filter(|_| !strict.is_empty()) {
        applied.strict_ports = Some(Arc::new(refusing_plaintext(by, strict)));
    }
    applied
}

fn looser(what: &str) -> String {
    format!(
        "{what} is looser than the mode strict that labels ask for, and is ignored; label the \
         Namespace signet.dev/allow-pod-override: \"true\" to allow it"
    )
}

/// A DENY of everything without an identity on these ports.
fn refusing_plaintext(name: PolicyName, ports: Vec<Ports>) -> Policy {
    let rule = Rule {
        peers: vec![Peer { unidentified: true, ..Peer::default() }],
        to: vec![Destination { ports, ..Destination::default() }],
        ..Rule::default()
    };
    let name = PolicyName { kind: PEER_AUTHENTICATION.into(), ..name };
    // Pods carry it themselves: its selector selects nobody.
    let nobody = Selector::of("");
    Policy { ingress: vec![rule], governs_ingress: true, ..Policy::new(name, nobody, Action::Deny) }
}
