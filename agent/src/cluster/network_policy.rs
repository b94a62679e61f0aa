//! NetworkPolicies (`networking.k8s.io/v1`), as far as they matter here: Signet does not enforce
//! them, but says where they keep peers from the tunnels' port, and translates them.
//!
//! An unknown operator, type or protocol is a fault: what is not understood must not count as
//! "blocks nothing".

mod blocking;
mod translate;

use std::{collections::BTreeMap, sync::Arc};

use ipnet::IpNet;
use k8s_openapi::{
    api::networking::v1::{
        NetworkPolicy as KubeNetworkPolicy, NetworkPolicyPeer, NetworkPolicyPort,
    },
    apimachinery::pkg::{
        apis::meta::v1::LabelSelector as KubeLabelSelector, util::intstr::IntOrString,
    },
};
use signet_ebpf::abi::proto;

pub use self::{
    blocking::{Blocking, blocking},
    translate::{Suggested, SuggestedPeer, SuggestedRule, translate},
};
use super::{
    model::{ObjectName, Pod, World},
    objects::{Labels, ObjectFault, object_name},
};
use crate::config::values::parse_range;

/// A NetworkPolicy.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct NetworkPolicy {
    /// Namespace and name.
    pub name: ObjectName,
    /// Which pods of its namespace it is about.
    pub pods: LabelSelector,
    /// What they may receive; `None`: it does not speak about ingress.
    pub ingress: Option<Vec<Rule>>,
    /// What they may dial; `None`: it does not speak about egress.
    pub egress: Option<Vec<Rule>>,
}

/// One rule: any of the peers AND any of the ports.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Rule {
    /// Empty: everybody.
    pub peers: Vec<Peer>,
    /// Empty: every port.
    pub ports: Vec<Port>,
}

/// A peer of a rule.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Peer {
    /// Pods of the cluster.
    Pods {
        /// Of which namespaces; `None`: of the policy's own.
        namespaces: Option<LabelSelector>,
        /// Which of them.
        pods: LabelSelector,
    },
    /// Addresses.
    Block {
        /// These.
        block: IpNet,
        /// Without these.
        except: Vec<IpNet>,
    },
}

/// A port of a rule.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Port {
    /// IP protocol; `None` for one that Signet does not carry (SCTP).
    pub protocol: Option<u8>,
    /// Which.
    pub number: PortNumber,
}

/// Which ports.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum PortNumber {
    /// Every one.
    All,
    /// From the first to the last.
    Range(u16, u16),
    /// Whatever the pod calls so.
    Named(Arc<str>),
}

/// A label selector; an empty one selects everything.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct LabelSelector {
    /// All of these labels.
    pub labels: Labels,
    /// And all of these.
    pub expressions: Vec<Expression>,
}

/// A demand on one label.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Expression {
    /// The label.
    pub key: Arc<str>,
    /// What of it.
    pub demand: Demand,
}

/// What is demanded of a label.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Demand {
    /// One of these values.
    In(Vec<Arc<str>>),
    /// None of these; it may be absent.
    NotIn(Vec<Arc<str>>),
    /// It is there.
    Exists,
    /// It is not there.
    DoesNotExist,
}

impl LabelSelector {
    /// True for an object with these labels.
    pub fn matches(&self, labels: &BTreeMap<Arc<str>, Arc<str>>) -> bool {
        self.labels.iter().all(|(key, value)| labels.get(key) == Some(value))
            && self.expressions.iter().all(|expression| {
                let value = labels.get(&expression.key);
                match &expression.demand {
                    Demand::In(values) => value.is_some_and(|v| values.contains(v)),
                    Demand::NotIn(values) => value.is_none_or(|v| !values.contains(v)),
                    Demand::Exists => value.is_some(),
                    Demand::DoesNotExist => value.is_none(),
                }
            })
    }

    /// True when it selects everything.
    pub fn is_empty(&self) -> bool {
        self.labels.is_empty() && self.expressions.is_empty()
    }
}

impl Port {
    /// True when it is about this port of TCP.
    pub fn covers_tcp(&self, port: u16) -> bool {
        self.protocol == Some(proto::TCP)
            && match &self.number {
                PortNumber::All => true,
                PortNumber::Range(first, last) => (*first..=*last).contains(&port),
                PortNumber::Named(_) => false,
            }
    }
}

impl Rule {
    /// True when it lets this port of TCP pass.
    pub fn covers_tcp(&self, port: u16) -> bool {
        self.ports.is_empty() || self.ports.iter().any(|p| p.covers_tcp(port))
    }

    /// True when it lets any port of TCP pass.
    pub fn speaks_tcp(&self) -> bool {
        self.ports.is_empty() || self.ports.iter().any(|p| p.protocol == Some(proto::TCP))
    }
}

impl Peer {
    /// The pods with a network of their own that it is about now, of a policy in `namespace`.
    fn pods<'a>(&'a self, world: &'a World, namespace: &'a str) -> Vec<&'a Arc<Pod>> {
        let live = |pod: &&Arc<Pod>| !pod.finished && !pod.host_network;
        let mut pods: Vec<&Arc<Pod>> = world
            .pods
            .values()
            .filter(live)
            .filter(|pod| self.is_about(world, namespace, pod))
            .collect();
        pods.sort_by(|a, b| a.name.cmp(&b.name));
        pods
    }

    fn is_about(&self, world: &World, own: &str, pod: &Pod) -> bool {
        let space = &pod.name.namespace;
        match self {
            Self::Pods { namespaces: None, pods } => &**space == own && pods.matches(&pod.labels),
            Self::Pods { namespaces: Some(namespaces), pods } => {
                world.namespaces.get(space).is_some_and(|n| namespaces.matches(&n.labels))
                    && pods.matches(&pod.labels)
            }
            Self::Block { block, except } => pod
                .ips
                .iter()
                .any(|ip| block.contains(ip) && !except.iter().any(|part| part.contains(ip))),
        }
    }
}

impl NetworkPolicy {
    /// Reads one.
    ///
    /// # Errors
    ///
    /// The first field that cannot be understood, with value and remedy.
    pub fn read(object: &KubeNetworkPolicy) -> Result<Self, ObjectFault> {
        let name = object_name(&object.metadata)?;
        let everyone = KubeLabelSelector::default();
        let spec = object.spec.as_ref();
        let pods = spec.and_then(|spec| spec.pod_selector.as_ref()).unwrap_or(&everyone);
        let pods = LabelSelector::read("spec.podSelector", pods)?;
        let mut ingress = Vec::new();
        for (index, rule) in spec.and_then(|s| s.ingress.as_ref()).into_iter().flatten().enumerate()
        {
            let field = format!("spec.ingress[{index}]");
            ingress.push(Rule::read(&field, "from", rule.from.as_deref(), rule.ports.as_deref())?);
        }
        let mut egress = Vec::new();
        let rules = spec.and_then(|s| s.egress.as_ref());
        for (index, rule) in rules.into_iter().flatten().enumerate() {
            let field = format!("spec.egress[{index}]");
            egress.push(Rule::read(&field, "to", rule.to.as_deref(), rule.ports.as_deref())?);
        }
        // Without types: ingress in any case, egress where there are rules.
        let (mut is_ingress, mut is_egress) = (true, !egress.is_empty());
        if let Some(types) = spec.and_then(|s| s.policy_types.as_ref()).filter(|t| !t.is_empty()) {
            (is_ingress, is_egress) = (false, false);
            for (index, kind) in types.iter().enumerate() {
                match kind.as_str() {
                    "Ingress" => is_ingress = true,
                    "Egress" => is_egress = true,
                    other => {
                        return Err(fault(
                            format!("spec.policyTypes[{index}]"),
                            format!("{other:?} is not a type; write Ingress or Egress"),
                        ));
                    }
                }
            }
        }
        Ok(Self {
            name,
            pods,
            ingress: is_ingress.then_some(ingress),
            egress: is_egress.then_some(egress),
        })
    }

    /// The pods that it is about now.
    fn selected<'a>(&'a self, world: &'a World) -> impl Iterator<Item = &'a Arc<Pod>> {
        world.pods.values().filter(|pod| {
            pod.name.namespace == self.name.namespace
                && !pod.finished
                && !pod.host_network
                && self.pods.matches(&pod.labels)
        })
    }
}

impl Rule {
    fn read(
        field: &str,
        whom: &str,
        peers: Option<&[NetworkPolicyPeer]>,
        ports: Option<&[NetworkPolicyPort]>,
    ) -> Result<Self, ObjectFault> {
        let peers = peers.into_iter().flatten().enumerate();
        let ports = ports.into_iter().flatten().enumerate();
        Ok(Self {
            peers: peers
                .map(|(index, peer)| Peer::read(&format!("{field}.{whom}[{index}]"), peer))
                .collect::<Result<_, _>>()?,
            ports: ports
                .map(|(index, port)| Port::read(&format!("{field}.ports[{index}]"), port))
                .collect::<Result<_, _>>()?,
        })
    }
}

impl Peer {
    fn read(field: &str, peer: &NetworkPolicyPeer) -> Result<Self, ObjectFault> {
        let selects = peer.pod_selector.is_some() || peer.namespace_selector.is_some();
        match (&peer.ip_block, selects) {
            (Some(block), false) => {
                let at = format!("{field}.ipBlock");
                let range = |field: String, text: &str| {
                    parse_range(text).map_err(|message| fault(field, message))
                };
                let whole = range(format!("{at}.cidr"), &block.cidr)?;
                let mut except = Vec::new();
                for (index, text) in block.except.iter().flatten().enumerate() {
                    let field = format!("{at}.except[{index}]");
                    let part = range(field.clone(), text)?;
                    if !whole.contains(&part) {
                        return Err(fault(field, format!("{part} is not part of {whole}")));
                    }
                    except.push(part);
                }
                Ok(Self::Block { block: whole, except })
            }
            (None, true) => {
                let read = |name: &str, selector: &KubeLabelSelector| {
                    LabelSelector::read(&format!("{field}.{name}"), selector)
                };
                let namespaces = peer.namespace_selector.as_ref();
                let pods = peer.pod_selector.as_ref();
                Ok(Self::Pods {
                    namespaces: namespaces.map(|s| read("namespaceSelector", s)).transpose()?,
                    pods: pods.map(|s| read("podSelector", s)).transpose()?.unwrap_or_default(),
                })
            }
            _ => Err(fault(
                field.to_owned(),
                "write either ipBlock, or podSelector and namespaceSelector",
            )),
        }
    }
}

impl Port {
    fn read(field: &str, port: &NetworkPolicyPort) -> Result<Self, ObjectFault> {
        let protocol = match port.protocol.as_deref() {
            None | Some("TCP") => Some(proto::TCP),
            Some("UDP") => Some(proto::UDP),
            Some("SCTP") => None,
            Some(other) => {
                return Err(fault(
                    format!("{field}.protocol"),
                    format!("{other:?} is not a protocol; write TCP, UDP or SCTP"),
                ));
            }
        };
        let one = |name: &str, number: i32| {
            u16::try_from(number).ok().filter(|n| *n != 0).ok_or_else(|| {
                fault(format!("{field}.{name}"), format!("{number} is not a port from 1 to 65535"))
            })
        };
        let number = match (&port.port, port.end_port) {
            (None, None) => PortNumber::All,
            (Some(IntOrString::Int(first)), None) => {
                let first = one("port", *first)?;
                PortNumber::Range(first, first)
            }
            (Some(IntOrString::Int(first)), Some(last)) => {
                let (first, last) = (one("port", *first)?, one("endPort", last)?);
                if last < first {
                    return Err(fault(
                        format!("{field}.endPort"),
                        format!("{last} is below the first port {first}"),
                    ));
                }
                PortNumber::Range(first, last)
            }
            (Some(IntOrString::String(name)), None) => PortNumber::Named(name.as_str().into()),
            (_, Some(_)) => {
                return Err(fault(
                    format!("{field}.endPort"),
                    "there is no first port as a number; give port, or leave it out",
                ));
            }
        };
        Ok(Self { protocol, number })
    }
}

impl LabelSelector {
    fn read(field: &str, selector: &KubeLabelSelector) -> Result<Self, ObjectFault> {
        let labels = selector.match_labels.iter().flatten();
        let mut expressions = Vec::new();
        for (index, given) in selector.match_expressions.iter().flatten().enumerate() {
            let at = format!("{field}.matchExpressions[{index}]");
            let values: Vec<Arc<str>> =
                given.values.iter().flatten().map(|v| v.as_str().into()).collect();
            let demand = match (given.operator.as_str(), values.is_empty()) {
                ("In", false) => Demand::In(values),
                ("NotIn", false) => Demand::NotIn(values),
                ("Exists", true) => Demand::Exists,
                ("DoesNotExist", true) => Demand::DoesNotExist,
                ("In" | "NotIn", true) => {
                    return Err(fault(format!("{at}.values"), "none; give at least one"));
                }
                ("Exists" | "DoesNotExist", false) => {
                    return Err(fault(
                        format!("{at}.values"),
                        format!("{} takes none; leave them out", given.operator),
                    ));
                }
                (other, _) => {
                    return Err(fault(
                        format!("{at}.operator"),
                        format!(
                            "{other:?} is not an operator; write In, NotIn, Exists or DoesNotExist"
                        ),
                    ));
                }
            };
            expressions.push(Expression { key: given.key.as_str().into(), demand });
        }
        Ok(Self {
            labels: labels.map(|(k, v)| (k.as_str().into(), v.as_str().into())).collect(),
            expressions,
        })
    }
}

fn fault(field: String, message: impl Into<String>) -> ObjectFault {
    ObjectFault { field, message: message.into() }
}

#[cfg(test)]
mod tests;
