//! The one policy model; every source (native, Istio's) is turned into it.

use std::{collections::BTreeMap, sync::Arc};

use ipnet::IpNet;

/// Every policy, in evaluation order, with numbers for the kernel.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PolicySet {
    /// All of them.
    pub policies: Vec<Arc<Policy>>,
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

/// Which pods a policy is about.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Selector {
    /// `None`: every namespace.
    pub namespace: Option<Arc<str>>,
    /// All of these labels; empty: every pod.
    pub labels: BTreeMap<Arc<str>, Arc<str>>,
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
    /// An identity known only by its address satisfies an ALLOW too.
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

/// A port range of a protocol.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Ports {
    /// First port.
    pub first: u16,
    /// Last port, inclusive.
    pub last: u16,
    /// IP protocol, `None` for TCP and UDP.
    pub protocol: Option<u8>,
}
