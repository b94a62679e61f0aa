//! The one policy model; every source (native, Istio's) is turned into it.

use std::{collections::BTreeMap, net::IpAddr, sync::Arc};

use ipnet::IpNet;
use signet_ebpf::abi::Direction;

use super::{
    asked::{Operation, RequestCondition, RequestSource},
    end_user::RequestAuthentication,
};

/// Every policy, in evaluation order, with numbers for the kernel.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PolicySet {
    /// All of them.
    pub policies: Vec<Arc<Policy>>,
    /// Those that single pods carry by themselves: the ports that a PeerAuthentication makes
    /// strict on a permissive pod. Their selectors are not asked.
    pub carried: Vec<Arc<Policy>>,
    /// Which end users' tokens requests may carry.
    pub request_authentications: Vec<Arc<RequestAuthentication>>,
}

impl PolicySet {
    /// A set that no pod carries anything of by itself.
    pub fn new(policies: Vec<Arc<Policy>>) -> Self {
        Self { policies, ..Self::default() }
    }

    /// The policies that are about a pod, in evaluation order.
    pub fn selecting(
        &self,
        namespace: &str,
        labels: &BTreeMap<Arc<str>, Arc<str>>,
    ) -> Vec<Arc<Policy>> {
        self.policies.iter().filter(|p| p.selector.selects(namespace, labels)).cloned().collect()
    }

    /// The RequestAuthentications that are about a pod and in force on it.
    pub fn authenticating(
        &self,
        namespace: &str,
        labels: &BTreeMap<Arc<str>, Arc<str>>,
    ) -> Vec<Arc<RequestAuthentication>> {
        let all = self.request_authentications.iter();
        all.filter(|object| {
            !object.ignored
                && !object.rules.is_empty()
                && object.selector.selects(namespace, labels)
        })
        .cloned()
        .collect()
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
    /// `IdentityPolicy`, `ClusterIdentityPolicy`, `AuthorizationPolicy`, `PeerAuthentication`,
    /// `Builtin`.
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
    /// Istio's dry run: what it would refuse is reported as AUDIT, nothing is enforced.
    pub dry_run: bool,
    /// A built-in ALLOW ([`super::builtin`]): it is asked last, for what nothing else lets
    /// pass, and does not make its direction governed.
    pub builtin: bool,
    /// Why the policy as a whole cannot be evaluated: then it fails closed, whatever its
    /// rules say. What only one rule has is in [`Rule::unsupported`].
    pub unsupported: Vec<String>,
    /// How the object was understood, where an operator should know.
    pub remarks: Vec<Remark>,
}

impl Policy {
    /// A policy of no rules that governs nothing yet.
    pub fn new(name: PolicyName, selector: Selector, action: Action) -> Self {
        Self {
            name,
            selector,
            action,
            ingress: Vec::new(),
            egress: Vec::new(),
            governs_ingress: false,
            governs_egress: false,
            dry_run: false,
            builtin: false,
            unsupported: Vec::new(),
            remarks: Vec::new(),
        }
    }

    /// True when its rules for the direction can be evaluated, at least one of them (or
    /// there is none to evaluate).
    pub fn is_evaluable(&self, direction: Direction) -> bool {
        let rules = self.rules(direction);
        self.unsupported.is_empty()
            && (rules.is_empty() || rules.iter().any(|rule| rule.unsupported.is_empty()))
    }

    /// True when the policy speaks about the direction at all.
    pub fn governs(&self, direction: Direction) -> bool {
        match direction {
            Direction::Ingress => self.governs_ingress,
            Direction::Egress => self.governs_egress,
        }
    }

    /// Its condition `Accepted`, as Kubernetes objects have it.
    pub fn accepted(&self) -> Accepted {
        let nothing = !self.governs_ingress && !self.governs_egress;
        Accepted::of(&self.remarks, nothing || !self.unsupported.is_empty())
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
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Selector {
    /// `None`: every namespace.
    pub namespace: Option<Arc<str>>,
    /// Patterns of namespaces (as in [`Peer::namespaces`]), any of them; empty: every one.
    pub among: Vec<Arc<str>>,
    /// All of these labels; empty: every pod.
    pub labels: BTreeMap<Arc<str>, Arc<str>>,
}

impl Selector {
    /// Every pod of a namespace.
    pub fn of(namespace: &str) -> Self {
        Self { namespace: Some(namespace.into()), ..Self::default() }
    }

    /// True for a pod with these labels in this namespace.
    pub fn selects(&self, namespace: &str, labels: &BTreeMap<Arc<str>, Arc<str>>) -> bool {
        self.namespace.as_deref().is_none_or(|own| own == namespace)
            && (self.among.is_empty()
                || self.among.iter().any(|pattern| pattern_matches(pattern, namespace)))
            && self.labels.iter().all(|(key, value)| labels.get(key) == Some(value))
    }
}

/// How a part of an object was understood, where that is not what its author may expect.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Remark {
    /// Line in the object's file; 0 where there is none.
    pub line: u64,
    /// The field's path, `spec.rules[0].to[1]`; empty for the whole object.
    pub field: Arc<str>,
    /// What was found, and what is made of it.
    pub message: Arc<str>,
    /// True when something that the object asks for does not happen as it asks: a fault for
    /// `signet policy validate`. False for mere information.
    pub is_fault: bool,
}

impl std::fmt::Display for Remark {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.field.is_empty() {
            f.write_str(&self.message)
        } else {
            write!(f, "{}: {}", self.field, self.message)
        }
    }
}

/// A condition `Accepted`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Accepted {
    /// False where the object as a whole does not do what it asks for.
    pub status: bool,
    /// `Accepted`, `PartlyUnderstood` or `NotSupported`.
    pub reason: &'static str,
    /// What was not understood, or worth knowing.
    pub message: String,
}

impl Accepted {
    /// Of an object with these remarks; `refused` as a whole.
    pub fn of(remarks: &[Remark], refused: bool) -> Self {
        let faults = remarks.iter().any(|remark| remark.is_fault);
        let reason = match (refused, faults) {
            (true, _) => "NotSupported",
            (false, true) => "PartlyUnderstood",
            (false, false) => "Accepted",
        };
        let said: Vec<String> = remarks.iter().map(ToString::to_string).collect();
        Self { status: !refused, reason, message: said.join("; ") }
    }
}

/// One rule: peers AND destinations AND every condition.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Rule {
    /// Any of them; empty: everybody, also without an identity.
    pub peers: Vec<Peer>,
    /// Any of them; empty: every port.
    pub to: Vec<Destination>,
    /// All of them.
    pub when: Vec<Condition>,
    /// An identity known only by its address counts as if it were proven: it satisfies an
    /// ALLOW too, and it averts a DENY's `not…`.
    pub unauthenticated: bool,
    /// It asks for something that cannot hold, so it matches nothing, in every action.
    pub never: bool,
    /// What of it cannot be evaluated: in an ALLOW it then matches nothing; in the others
    /// what cannot be evaluated counts as matching, and what the other fields say narrows it.
    pub unsupported: Vec<String>,
}

impl Rule {
    /// A rule of peers and ports only.
    pub fn of(peers: Vec<Peer>, ports: Vec<Ports>) -> Self {
        let to = if ports.is_empty() {
            Vec::new()
        } else {
            vec![Destination { ports, ..Destination::default() }]
        };
        Self { peers, to, ..Self::default() }
    }

    /// Every peer that it names anywhere.
    pub fn all_peers(&self) -> impl Iterator<Item = &Peer> {
        let conditions = self.when.iter().filter_map(|condition| match condition {
            Condition::Peer(peer) => Some(&**peer),
            Condition::To(_) | Condition::Local { .. } | Condition::Request(_) => None,
        });
        self.peers.iter().chain(conditions)
    }

    /// Every destination that it names anywhere.
    pub fn all_destinations(&self) -> impl Iterator<Item = &Destination> {
        let conditions = self.when.iter().filter_map(|condition| match condition {
            Condition::To(destination) => Some(destination),
            Condition::Peer(_) | Condition::Local { .. } | Condition::Request(_) => None,
        });
        self.to.iter().chain(conditions)
    }

    /// True when it asks something of HTTP requests, so that a flow alone does not settle it.
    pub fn asks_requests(&self) -> bool {
        self.all_peers().any(|peer| !peer.request.is_empty())
            || self.all_destinations().any(|to| !to.operation.is_empty())
            || self.when.iter().any(|c| matches!(c, Condition::Request(_)))
    }

    /// True when it depends on which of the pod's own addresses the flow is at.
    pub fn asks_local_address(&self) -> bool {
        self.when.iter().any(|c| matches!(c, Condition::Local { .. }))
    }
}

/// Ports and requests that a rule is about; one that names none is about all.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Destination {
    /// Any of them; empty: every port.
    pub ports: Vec<Ports>,
    /// Ports that it does not cover.
    pub not_ports: Vec<Ports>,
    /// Which HTTP requests.
    pub operation: Operation,
}

/// A further demand of a rule (Istio's `when`).
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Condition {
    /// On the other side.
    Peer(Box<Peer>),
    /// On the destination's port.
    To(Destination),
    /// On the pod's own address: one of `blocks` (empty: any), and none of `not_blocks`.
    Local {
        /// Addresses or ranges.
        blocks: Vec<IpNet>,
        /// None of these.
        not_blocks: Vec<IpNet>,
    },
    /// On an HTTP request: a header, a claim of its end user.
    Request(Box<RequestCondition>),
}

/// Who the other side is: all fields that are given must hold, one value of each.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Peer {
    /// SPIFFE ID patterns: exact, `prefix*`, `*suffix`, or `*` for any identity.
    pub identities: Vec<Arc<str>>,
    /// None of these.
    pub not_identities: Vec<Arc<str>>,
    /// Namespaces (same patterns) of our own trust domain, and of one that
    /// [`Peer::trust_domains`] names in full.
    pub namespaces: Vec<Arc<str>>,
    /// None of these.
    pub not_namespaces: Vec<Arc<str>>,
    /// Service accounts of the same domains, as (namespace, name).
    pub service_accounts: Vec<(Arc<str>, Arc<str>)>,
    /// None of these.
    pub not_service_accounts: Vec<(Arc<str>, Arc<str>)>,
    /// Trust domains (same patterns); an alias of our own is our own.
    pub trust_domains: Vec<Arc<str>>,
    /// None of these.
    pub not_trust_domains: Vec<Arc<str>>,
    /// Services (namespace, name) of this cluster: its own addresses and ports, and those of
    /// the endpoints behind them.
    pub services: Vec<(Arc<str>, Arc<str>)>,
    /// What [`Peer::services`] are at present, filled in with the world.
    pub targets: Vec<Target>,
    /// Only who has no identity (that counts, see [`Rule::unauthenticated`]).
    pub unidentified: bool,
    /// Addresses or ranges.
    pub ip_blocks: Vec<IpNet>,
    /// None of these.
    pub not_ip_blocks: Vec<IpNet>,
    /// On behalf of whom an HTTP request comes.
    pub request: RequestSource,
}

impl Peer {
    /// True when it says anything about who the other side is, beyond its address. The end
    /// user of a request is proven by a token, not by the other side.
    pub fn constrains_identity(&self) -> bool {
        !(self.identities.is_empty()
            && self.not_identities.is_empty()
            && self.namespaces.is_empty()
            && self.not_namespaces.is_empty()
            && self.service_accounts.is_empty()
            && self.not_service_accounts.is_empty()
            && self.trust_domains.is_empty()
            && self.not_trust_domains.is_empty()
            && !self.unidentified)
    }
}

/// Where a Service is reached: at its own address, or behind it at an endpoint's.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Target {
    /// The address.
    pub ip: IpAddr,
    /// The port there.
    pub port: u16,
    /// IP protocol, TCP or UDP.
    pub protocol: u8,
}

/// `*` any, `*suffix` (a leading star goes first), `prefix*`, else exact.
pub fn pattern_matches(pattern: &str, value: &str) -> bool {
    if let Some(suffix) = pattern.strip_prefix('*') {
        return !value.is_empty() && value.ends_with(suffix);
    }
    match pattern.strip_suffix('*') {
        Some(prefix) => value.starts_with(prefix),
        None => value == pattern,
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
