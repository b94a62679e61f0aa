//! The one policy model; every source (native, Istio's) is turned into it.

use std::{collections::BTreeMap, sync::Arc};

use ipnet::IpNet;
use signet_ebpf::abi::Direction;

/// Every policy, in evaluation order, with numbers for the kernel.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PolicySet {
    /// All of them.
    pub policies: Vec<Arc<Policy>>,
}

impl PolicySet {
    /// The policies that are about a pod, in evaluation order.
    pub fn selecting(
        &self,
        namespace: &str,
        labels: &BTreeMap<Arc<str>, Arc<str>>,
    ) -> Vec<Arc<Policy>> {
        self.policies.iter().filter(|p| p.selector.selects(namespace, labels)).cloned().collect()
    }
}

/// What a policy does to a flow that it matches.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Action {
    /// Refuses it; goes before every ALLOW.
    Deny,
    /// Lets it pass; once any ALLOW selects a workload, only what matches passes.
    Allow,
    /// Reports it as AUDIT; changes nothing.
    Audit,
}

/// A policy's name and kind, as shown to people: `IdentityPolicy/shop/payments-callers`.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct PolicyName {
    /// `IdentityPolicy`, later `ClusterIdentityPolicy`, `AuthorizationPolicy`, …
    pub kind: Arc<str>,
    /// Namespace; empty for cluster-wide ones.
    pub namespace: Arc<str>,
    /// Name.
    pub name: Arc<str>,
}

impl std::fmt::Display for PolicyName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.namespace.is_empty() {
            write!(f, "{}/{}", self.kind, self.name)
        } else {
            write!(f, "{}/{}/{}", self.kind, self.namespace, self.name)
        }
    }
}

/// A policy.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Policy {
    /// Its name.
    pub name: PolicyName,
    /// Which pods it is about.
    pub selector: Selector,
    /// What it does.
    pub action: Action,
    /// Rules for what the pod receives; any one that matches is enough.
    pub ingress: Vec<Rule>,
    /// Rules for what the pod dials.
    pub egress: Vec<Rule>,
    /// True when the policy speaks about ingress at all (an ALLOW without rules denies all).
    pub governs_ingress: bool,
    /// True when the policy speaks about egress at all.
    pub governs_egress: bool,
    /// What was not understood; it never widens access.
    pub unsupported: Vec<String>,
}

impl Policy {
    /// True when the policy speaks about the direction at all.
    pub fn governs(&self, direction: Direction) -> bool {
        match direction {
            Direction::Ingress => self.governs_ingress,
            Direction::Egress => self.governs_egress,
        }
    }

    /// Its rules for the direction.
    pub fn rules(&self, direction: Direction) -> &[Rule] {
        match direction {
            Direction::Ingress => &self.ingress,
            Direction::Egress => &self.egress,
        }
    }
}

/// Which pods a policy is about.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Selector {
    /// `None`: every namespace.
    pub namespace: Option<Arc<str>>,
    /// All of these labels; empty: every pod.
    pub labels: BTreeMap<Arc<str>, Arc<str>>,
}

impl Selector {
    /// True for a pod with these labels in this namespace.
    pub fn selects(&self, namespace: &str, labels: &BTreeMap<Arc<str>, Arc<str>>) -> bool {
        self.namespace.as_deref().is_none_or(|own| own == namespace)
            && self.labels.iter().all(|(key, value)| labels.get(key) == Some(value))
    }
}

/// One rule: peers AND ports.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Rule {
    /// Any of them; empty: everybody, also without an identity.
    pub peers: Vec<Peer>,
    /// Any of them; empty: every port.
    pub ports: Vec<Ports>,
    /// Ports that it does not cover.
    pub not_ports: Vec<Ports>,
    /// An identity known only by its address counts as if it were proven: it satisfies an
    /// ALLOW too, and it averts a DENY's `not…`.
    pub unauthenticated: bool,
}

/// Who the other side is: all fields that are given must hold, one value of each.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Peer {
    /// SPIFFE ID patterns: exact, `prefix*`, `*suffix`, or `*` for any identity.
    pub identities: Vec<Arc<str>>,
    /// None of these.
    pub not_identities: Vec<Arc<str>>,
    /// Namespaces of our own trust domain (same patterns).
    pub namespaces: Vec<Arc<str>>,
    /// None of these.
    pub not_namespaces: Vec<Arc<str>>,
    /// Service accounts of our own trust domain, as (namespace, name).
    pub service_accounts: Vec<(Arc<str>, Arc<str>)>,
    /// None of these.
    pub not_service_accounts: Vec<(Arc<str>, Arc<str>)>,
    /// Addresses or ranges.
    pub ip_blocks: Vec<IpNet>,
    /// None of these.
    pub not_ip_blocks: Vec<IpNet>,
}

impl Peer {
    /// True when it says anything about who the other side is, beyond its address.
    pub fn constrains_identity(&self) -> bool {
        !(self.identities.is_empty()
            && self.not_identities.is_empty()
            && self.namespaces.is_empty()
            && self.not_namespaces.is_empty()
            && self.service_accounts.is_empty()
            && self.not_service_accounts.is_empty())
    }
}

/// A port range of a protocol.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Ports {
    /// First port.
    pub first: u16,
    /// Last port, inclusive.
    pub last: u16,
    /// IP protocol, TCP or UDP; `None` for both.
    pub protocol: Option<u8>,
}
