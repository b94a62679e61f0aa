//! The verdict over policies, for one flow: DENY, then ALLOW, then the default; AUDIT
//! only reports (DESIGN §7). Pure; [`super::compile`] uses it as its oracle, so the kernel
//! and the proxies cannot disagree.
//!
//! # What an identity that only its address shows is worth
//!
//! - It can *satisfy* a DENY or an AUDIT.
//! - On ingress it cannot *avert* one: `notNamespaces: [shop]` matches plaintext from an
//!   address of `shop` as it matches plaintext from nowhere. (On egress the address is what
//!   the pod itself dials, and a tunnelled flow is judged again over what the handshake
//!   proved, so there it is taken as it is.)
//! - It cannot satisfy an ALLOW that says anything about identities, namespaces or service
//!   accounts, positively or negatively.
//! - A rule with `unauthenticated: true` takes it as if it were proven.
//!
//! # Trust domains
//!
//! Namespaces and service accounts are those of our own trust domain. An identity pattern
//! that does not spell a trust domain out (`*`, `*/sa/frontend`, `spiffe://clu*`) means our
//! own where matching widens access, every domain where it narrows it. A foreign identity
//! comes in only where an ALLOW names its domain. An alias of our own domain is our own, in
//! identities as in patterns.

use std::{net::IpAddr, sync::Arc};

use signet_ebpf::abi::{Direction, Reason, proto};

use super::model::{Action, Peer, Policy, Ports, Rule};
use crate::spiffe::{SpiffeId, TrustDomain};

/// What is known of a flow when it is judged.
#[derive(Clone, Copy, Debug)]
pub struct FlowFacts<'a> {
    /// As the judged pod sees it.
    pub direction: Direction,
    /// The cluster's own trust domain.
    pub trust_domain: &'a TrustDomain,
    /// Other names of it: identities of these domains are our own.
    pub aliases: &'a [TrustDomain],
    /// The other side.
    pub peer: PeerIdentity<'a>,
    /// The other side's address (IPv4-mapped ones count as IPv4).
    pub peer_ip: IpAddr,
    /// The destination's port: the workload's own on ingress, never the tunnel's.
    pub port: u16,
    /// IP protocol.
    pub protocol: u8,
}

/// The other side's identity and how it is known.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum PeerIdentity<'a> {
    /// None: outside the mesh, the node, or plaintext from nobody known.
    Unknown,
    /// Only its address shows it.
    Address(&'a SpiffeId),
    /// A handshake or the kernel proves it.
    Authenticated(&'a SpiffeId),
}

/// What policy makes of a flow.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Outcome {
    /// `allowed`, `policy_deny`, `policy_no_match` or `policy_unsupported`.
    pub reason: Reason,
    /// The deciding policy; for `policy_no_match` the first ALLOW that selects the workload.
    /// `None` when the default decided.
    pub policy: Option<Arc<Policy>>,
    /// The first AUDIT policy that matches.
    pub audit: Option<Arc<Policy>>,
}

impl Outcome {
    /// True when the flow may pass.
    pub fn is_allowed(&self) -> bool {
        self.reason == Reason::Allowed
    }
}

/// Judges a flow under the policies that select the pod, in their order.
///
/// `default_deny` is the namespace's `signet.dev/default: deny`.
pub fn evaluate(policies: &[Arc<Policy>], default_deny: bool, facts: &FlowFacts<'_>) -> Outcome {
    let governing = || policies.iter().filter(|p| p.governs(facts.direction));
    let of = |action: Action| governing().filter(move |p| p.action == action);
    let audit = of(Action::Audit).find(|p| matches(p, facts)).cloned();
    let decided = |reason, policy: Option<&Arc<Policy>>| Outcome {
        reason,
        policy: policy.cloned(),
        audit: audit.clone(),
    };
    if let Some(deny) = of(Action::Deny).find(|p| matches(p, facts)) {
        let reason = if deny.unsupported.is_empty() {
            Reason::PolicyDeny
        } else {
            Reason::PolicyUnsupported
        };
        return decided(reason, Some(deny));
    }
    if let Some(allow) = of(Action::Allow).find(|p| matches(p, facts)) {
        return decided(Reason::Allowed, Some(allow));
    }
    if let Some(first) = of(Action::Allow).find(|p| p.unsupported.is_empty()) {
        return decided(Reason::PolicyNoMatch, Some(first));
    }
    if let Some(broken) = of(Action::Allow).next() {
        return decided(Reason::PolicyUnsupported, Some(broken));
    }
    // Whom a pod may dial in another domain is said by the cluster's remote peers; who may
    // come from there, only by an ALLOW.
    if default_deny || (is_foreign(facts) && facts.direction == Direction::Ingress) {
        return decided(Reason::PolicyNoMatch, None);
    }
    decided(Reason::Allowed, None)
}

/// True when a policy that could not be understood in full, or one of its rules, covers
/// the flow.
fn matches(policy: &Policy, facts: &FlowFacts<'_>) -> bool {
    if !policy.unsupported.is_empty() {
        // What cannot be evaluated never widens: an ALLOW matches nothing, the rest all.
        return policy.action != Action::Allow;
    }
    policy.rules(facts.direction).iter().any(|rule| rule_matches(policy.action, rule, facts))
}

/// Judges one rule of a policy with this action (exposed for `explain`).
pub(super) fn rule_matches(action: Action, rule: &Rule, facts: &FlowFacts<'_>) -> bool {
    ports_match(rule, facts) && peers_match(action, rule, facts)
}

fn ports_match(rule: &Rule, facts: &FlowFacts<'_>) -> bool {
    let covers = |ports: &Ports| {
        // Only TCP and UDP have ports; other protocols are not policy's to judge.
        let protocol = match facts.protocol {
            proto::TCP | proto::UDP => ports.protocol.is_none_or(|p| p == facts.protocol),
            _ => false,
        };
        protocol && (ports.first..=ports.last).contains(&facts.port)
    };
    (rule.ports.is_empty() || rule.ports.iter().any(covers)) && !rule.not_ports.iter().any(covers)
}

fn peers_match(action: Action, rule: &Rule, facts: &FlowFacts<'_>) -> bool {
    let allow = action == Action::Allow;
    if rule.peers.is_empty() {
        // Everybody; but a foreign identity must be named.
        return !(allow && is_foreign(facts));
    }
    rule.peers.iter().any(|peer| match facts.peer {
        PeerIdentity::Unknown => peer_matches(allow, peer, None, facts),
        PeerIdentity::Authenticated(id) => peer_matches(allow, peer, Some(id), facts),
        PeerIdentity::Address(id) if rule.unauthenticated => {
            peer_matches(allow, peer, Some(id), facts)
        }
        PeerIdentity::Address(id) if allow => {
            !peer.constrains_identity() && peer_matches(true, peer, Some(id), facts)
        }
        PeerIdentity::Address(id) => {
            peer_matches(false, peer, Some(id), facts)
                || (facts.direction == Direction::Ingress && peer_matches(false, peer, None, facts))
        }
    })
}

/// All fields that are given hold. `allow`: matching widens access.
fn peer_matches(
    allow: bool,
    peer: &Peer,
    identity: Option<&SpiffeId>,
    facts: &FlowFacts<'_>,
) -> bool {
    let ip = facts.peer_ip.to_canonical();
    let in_blocks = |blocks: &[ipnet::IpNet]| blocks.iter().any(|block| block.contains(&ip));
    if !peer.ip_blocks.is_empty() && !in_blocks(&peer.ip_blocks) {
        return false;
    }
    if in_blocks(&peer.not_ip_blocks) {
        return false;
    }
    let Some(id) = identity else {
        // Nobody: positive fields are false, negative ones true.
        return peer.identities.is_empty()
            && peer.namespaces.is_empty()
            && peer.service_accounts.is_empty();
    };
    let domain = id.trust_domain();
    let own = is_own(&domain, facts);
    if allow && !own && !peer.identities.iter().any(|p| names_domain(p, &domain)) {
        return false;
    }
    let any_identity = |patterns: &[Arc<str>], everywhere: bool| {
        patterns.iter().any(|pattern| {
            (pattern_matches(pattern, id.as_str())
                && (own || everywhere || names_domain(pattern, &domain)))
                || (own && matches_other_name(pattern, id, facts))
        })
    };
    if !peer.identities.is_empty() && !any_identity(&peer.identities, !allow) {
        return false;
    }
    if any_identity(&peer.not_identities, allow) {
        return false;
    }
    let workload = if own { id.workload() } else { None };
    let in_namespaces = |patterns: &[Arc<str>]| match workload {
        Some((namespace, _)) => patterns.iter().any(|p| pattern_matches(p, namespace)),
        None => false,
    };
    if !peer.namespaces.is_empty() && !in_namespaces(&peer.namespaces) {
        return false;
    }
    if in_namespaces(&peer.not_namespaces) {
        return false;
    }
    let in_accounts = |accounts: &[(Arc<str>, Arc<str>)]| match workload {
        Some((namespace, account)) => {
            accounts.iter().any(|(n, a)| n.as_ref() == namespace && a.as_ref() == account)
        }
        None => false,
    };
    if !peer.service_accounts.is_empty() && !in_accounts(&peer.service_accounts) {
        return false;
    }
    !in_accounts(&peer.not_service_accounts)
}

/// True when the other side's identity is of another trust domain.
fn is_foreign(facts: &FlowFacts<'_>) -> bool {
    match facts.peer {
        PeerIdentity::Unknown => false,
        PeerIdentity::Address(id) | PeerIdentity::Authenticated(id) => {
            !is_own(&id.trust_domain(), facts)
        }
    }
}

/// True for the cluster's own trust domain under any of its names.
fn is_own(domain: &TrustDomain, facts: &FlowFacts<'_>) -> bool {
    domain == facts.trust_domain || facts.aliases.contains(domain)
}

/// True when the pattern matches an identity of our own domain under another of its names: a
/// policy may be written before or after the domain got its present one.
fn matches_other_name(pattern: &str, id: &SpiffeId, facts: &FlowFacts<'_>) -> bool {
    !facts.aliases.is_empty()
        && std::iter::once(facts.trust_domain)
            .chain(facts.aliases)
            .any(|name| pattern_matches(pattern, &format!("spiffe://{name}{}", id.path())))
}

/// `*` any, `*suffix` (a leading star goes first), `prefix*`, else exact.
pub(super) fn pattern_matches(pattern: &str, value: &str) -> bool {
    if let Some(suffix) = pattern.strip_prefix('*') {
        return !value.is_empty() && value.ends_with(suffix);
    }
    match pattern.strip_suffix('*') {
        Some(prefix) => value.starts_with(prefix),
        None => value == pattern,
    }
}

/// True when the pattern spells this trust domain out.
fn names_domain(pattern: &str, domain: &TrustDomain) -> bool {
    pattern
        .strip_prefix("spiffe://")
        .and_then(|rest| rest.strip_prefix(domain.as_str()))
        .is_some_and(|rest| rest.starts_with('/'))
}

#[cfg(test)]
mod tests;
