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
//! Namespaces and service accounts are those of our own trust domain, and of one that the
//! same peer's `trustDomains` names in full. An identity pattern
//! that does not spell a trust domain out (`*`, `*/sa/frontend`, `spiffe://clu*`) means our
//! own where matching widens access, every domain where it narrows it. A foreign identity
//! comes in only where an ALLOW names its domain. An alias of our own domain is our own, in
//! identities as in patterns.
//!
//! # Built-ins
//!
//! A built-in is an ALLOW that is asked last: for a flow that no DENY refuses and that nothing
//! else lets pass. It selects nothing, so what is open by default stays open beside it.
//!
//! # Requests
//!
//! What a rule asks of HTTP requests ([`super::asked`]) a flow alone does not settle. Where
//! nobody judges the flow's requests (the kernel, UDP, what a pod dials, bytes that are no
//! HTTP) it fails closed: in an ALLOW it does not hold, in the others it does. Who judges
//! requests asks [`super::request`].
//!
//! # Dry run
//!
//! A policy in dry run decides nothing. Where the flow passes, and would not if the dry runs
//! were in force beside the others, the outcome names the one that would refuse it.

use std::{net::IpAddr, sync::Arc};

use signet_ebpf::abi::{Direction, Reason, proto};

use super::{
    model::{Action, Condition, Destination, Peer, Policy, Ports, Rule, Target, pattern_matches},
    request::Asked,
};
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
    /// The pod's own addresses; the flow is at one of the same family as the peer's.
    pub local_ips: &'a [IpAddr],
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
    /// The first AUDIT policy that matches, else the dry run that would refuse what passes.
    pub audit: Option<Arc<Policy>>,
}

impl Outcome {
    /// True when the flow may pass.
    pub fn is_allowed(&self) -> bool {
        self.reason == Reason::Allowed
    }
}

/// Judges a flow under the policies that select the pod, in their order, where nobody judges
/// its requests.
///
/// `default_deny` is the namespace's (or the cluster's) default.
pub fn evaluate(policies: &[Arc<Policy>], default_deny: bool, facts: &FlowFacts<'_>) -> Outcome {
    judge(policies, default_deny, &Question { flow: facts, asked: Asked::Unseen })
}

/// What is judged: a flow, and what is known of the request on it.
#[derive(Clone, Copy)]
pub(super) struct Question<'a> {
    pub(super) flow: &'a FlowFacts<'a>,
    pub(super) asked: Asked<'a>,
}

/// As [`evaluate`], for any question.
pub(super) fn judge(policies: &[Arc<Policy>], default_deny: bool, facts: &Question<'_>) -> Outcome {
    let (reason, policy) = decide(policies, default_deny, facts, false);
    let mut audit = governing(policies, facts, true)
        .find(|p| p.action == Action::Audit && policy_matches(p, facts))
        .cloned();
    if audit.is_none() && reason == Reason::Allowed && policies.iter().any(|p| p.dry_run) {
        let (dry, by) = decide(policies, default_deny, facts, true);
        if dry != Reason::Allowed {
            // It is a dry run: only those are in this decision and not in the first.
            audit = by.cloned();
        }
    }
    Outcome { reason, policy: policy.cloned(), audit }
}

/// Those that speak about the flow's direction; dry runs only where they are asked for.
fn governing<'a>(
    policies: &'a [Arc<Policy>],
    facts: &'a Question<'_>,
    with_dry_runs: bool,
) -> impl Iterator<Item = &'a Arc<Policy>> {
    policies
        .iter()
        .filter(move |p| p.governs(facts.flow.direction) && (with_dry_runs || !p.dry_run))
}

fn decide<'a>(
    policies: &'a [Arc<Policy>],
    default_deny: bool,
    facts: &'a Question<'_>,
    with_dry_runs: bool,
) -> (Reason, Option<&'a Arc<Policy>>) {
    let of = |action: Action| {
        governing(policies, facts, with_dry_runs).filter(move |p| p.action == action && !p.builtin)
    };
    // The first that denies for what it says, not for what is not understood of it.
    let mut unsure = None;
    for deny in of(Action::Deny) {
        match policy_denies(deny, facts) {
            Some(Reason::PolicyDeny) => return (Reason::PolicyDeny, Some(deny)),
            Some(_) => unsure = unsure.or(Some(deny)),
            None => {}
        }
    }
    if let Some(deny) = unsure {
        return (Reason::PolicyUnsupported, Some(deny));
    }
    if let Some(allow) = of(Action::Allow).find(|p| policy_matches(p, facts)) {
        return (Reason::Allowed, Some(allow));
    }
    let refusal = refusal_of_none(of(Action::Allow), default_deny, facts);
    if refusal.0 == Reason::Allowed {
        return refusal;
    }
    let mut builtins = governing(policies, facts, with_dry_runs).filter(|p| p.builtin);
    match builtins.find(|p| policy_matches(p, facts)) {
        Some(builtin) => (Reason::Allowed, Some(builtin)),
        None => refusal,
    }
}

/// What becomes of a flow that no policy denies and none of `allows` matches.
fn refusal_of_none<'a>(
    allows: impl Iterator<Item = &'a Arc<Policy>>,
    default_deny: bool,
    facts: &Question<'_>,
) -> (Reason, Option<&'a Arc<Policy>>) {
    let mut broken = None;
    for allow in allows {
        if allow.is_evaluable(facts.flow.direction) {
            return (Reason::PolicyNoMatch, Some(allow));
        }
        broken = broken.or(Some(allow));
    }
    if let Some(broken) = broken {
        return (Reason::PolicyUnsupported, Some(broken));
    }
    // Whom a pod may dial in another domain is said by the cluster's remote peers; who may
    // come from there, only by an ALLOW.
    if default_deny || (is_foreign(facts) && facts.flow.direction == Direction::Ingress) {
        return (Reason::PolicyNoMatch, None);
    }
    (Reason::Allowed, None)
}

/// Why a DENY covers the flow, if it does: `policy_deny` where a rule says so in full,
/// `policy_unsupported` where something of it counts as matching.
fn policy_denies(policy: &Policy, facts: &Question<'_>) -> Option<Reason> {
    if !policy.unsupported.is_empty() {
        return Some(Reason::PolicyUnsupported);
    }
    let matching = |rule: &&Rule| judge_rule(Action::Deny, rule, facts) == RuleVerdict::Matches;
    let mut reason = None;
    for rule in policy.rules(facts.flow.direction).iter().filter(matching) {
        if rule.unsupported.is_empty() && holds_whatever_comes(rule, facts) {
            return Some(Reason::PolicyDeny);
        }
        reason = Some(Reason::PolicyUnsupported);
    }
    reason
}

/// True unless a DENY's rule, which matches, does so only because requests are not seen.
pub(super) fn holds_whatever_comes(rule: &Rule, facts: &Question<'_>) -> bool {
    if !matches!(facts.asked, Asked::Unseen) || !rule.asks_requests() {
        return true;
    }
    let awaited = Question { asked: Asked::Awaited, ..*facts };
    judge_rule(Action::Deny, rule, &awaited) == RuleVerdict::Matches
}

/// True when a policy that could not be understood in full, or one of its rules, covers
/// the flow.
pub(super) fn policy_matches(policy: &Policy, facts: &Question<'_>) -> bool {
    if !policy.unsupported.is_empty() {
        // What cannot be evaluated never widens: an ALLOW matches nothing, the rest all.
        return policy.action != Action::Allow;
    }
    let rules = policy.rules(facts.flow.direction);
    rules.iter().any(|rule| judge_rule(policy.action, rule, facts) == RuleVerdict::Matches)
}

/// What a rule makes of a flow, with the first of its parts that does not hold.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum RuleVerdict {
    /// All of it holds, or counts as holding.
    Matches,
    /// It can match nothing.
    Never,
    /// Part of an ALLOW cannot be evaluated.
    Unsupported,
    /// None of its destinations has the port.
    To,
    /// The condition of this index does not hold.
    When(usize),
    /// None of its peers is the other side.
    Peers,
    /// It would match, but only proven identities count in it, and the other side's is
    /// known by its address alone.
    NotProven,
    /// It would match, but does not name the other side's foreign trust domain.
    Foreign,
}

/// Judges one rule of a policy with this action.
pub(super) fn judge_rule(action: Action, rule: &Rule, facts: &Question<'_>) -> RuleVerdict {
    if rule.never {
        return RuleVerdict::Never;
    }
    let allow = action == Action::Allow;
    if allow && !rule.unsupported.is_empty() {
        return RuleVerdict::Unsupported;
    }
    if !rule.to.is_empty() && !rule.to.iter().any(|to| covers(allow, to, facts)) {
        return RuleVerdict::To;
    }
    for (index, condition) in rule.when.iter().enumerate() {
        let holds = match condition {
            Condition::Peer(_) => true,
            Condition::To(destination) => covers(allow, destination, facts),
            Condition::Request(condition) => facts.asked.fulfils(allow, condition),
            Condition::Local { blocks, not_blocks } => is_local(allow, blocks, not_blocks, facts),
        };
        if !holds {
            return RuleVerdict::When(index);
        }
    }
    match facts.flow.peer {
        PeerIdentity::Unknown => judge_peers(allow, rule, None, facts),
        PeerIdentity::Authenticated(id) => judge_peers(allow, rule, Some(id), facts),
        PeerIdentity::Address(id) if rule.unauthenticated => {
            judge_peers(allow, rule, Some(id), facts)
        }
        PeerIdentity::Address(id) if allow => {
            // Peers that ask for an identity do not count.
            let taken = |peer: &Peer| !peer.constrains_identity();
            let verdict = judge_peers_that(allow, rule, Some(id), facts, taken);
            let proven = judge_peers(allow, rule, Some(id), facts);
            if verdict != proven && proven == RuleVerdict::Matches {
                RuleVerdict::NotProven
            } else {
                verdict
            }
        }
        PeerIdentity::Address(id) => {
            // It may be whom the address shows, or (plaintext) anybody.
            let shown = judge_peers(false, rule, Some(id), facts);
            if shown == RuleVerdict::Matches || facts.flow.direction == Direction::Egress {
                return shown;
            }
            judge_peers(false, rule, None, facts)
        }
    }
}

/// True when the flow's port and its request are of the destination's.
fn covers(allow: bool, destination: &Destination, facts: &Question<'_>) -> bool {
    let covers = |ports: &Ports| {
        // Only TCP and UDP have ports; other protocols are not policy's to judge.
        let protocol = match facts.flow.protocol {
            proto::TCP | proto::UDP => ports.protocol.is_none_or(|p| p == facts.flow.protocol),
            _ => false,
        };
        protocol && (ports.first..=ports.last).contains(&facts.flow.port)
    };
    (destination.ports.is_empty() || destination.ports.iter().any(covers))
        && !destination.not_ports.iter().any(covers)
        && facts.asked.is_of(allow, &destination.operation)
}

/// Judges the pod's own address. Of several of one family it is not known which the flow is
/// at: an ALLOW must hold for all, the others for any.
fn is_local(
    allow: bool,
    blocks: &[ipnet::IpNet],
    not_blocks: &[ipnet::IpNet],
    facts: &Question<'_>,
) -> bool {
    let peer = facts.flow.peer_ip.to_canonical();
    let within = |blocks: &[ipnet::IpNet], ip: &IpAddr| blocks.iter().any(|b| b.contains(ip));
    let holds = |ip: &IpAddr| (blocks.is_empty() || within(blocks, ip)) && !within(not_blocks, ip);
    let mut ips =
        facts.flow.local_ips.iter().filter(|ip| ip.is_ipv4() == peer.is_ipv4()).peekable();
    if ips.peek().is_none() {
        return !allow;
    }
    if allow { ips.all(holds) } else { ips.any(holds) }
}

fn judge_peers(
    allow: bool,
    rule: &Rule,
    identity: Option<&SpiffeId>,
    facts: &Question<'_>,
) -> RuleVerdict {
    judge_peers_that(allow, rule, identity, facts, |_| true)
}

/// Judges the rule's peers and its conditions on the peer, as far as `counts` lets them.
fn judge_peers_that(
    allow: bool,
    rule: &Rule,
    identity: Option<&SpiffeId>,
    facts: &Question<'_>,
    counts: impl Fn(&Peer) -> bool,
) -> RuleVerdict {
    let foreign = identity.map(SpiffeId::trust_domain).filter(|domain| !is_own(domain, facts));
    let mut is_named = foreign.is_none() || !allow;
    let mut holds = |peer: &Peer| {
        let holds = counts(peer) && peer_matches(allow, peer, identity, facts);
        if holds && let Some(domain) = &foreign {
            is_named |= names_peer_domain(peer, domain);
        }
        holds
    };
    // Every peer is asked, because any that holds may name the domain.
    let peers = rule.peers.iter().fold(rule.peers.is_empty(), |any, peer| holds(peer) || any);
    if !peers {
        return RuleVerdict::Peers;
    }
    for (index, condition) in rule.when.iter().enumerate() {
        if let Condition::Peer(peer) = condition
            && !holds(peer)
        {
            return RuleVerdict::When(index);
        }
    }
    if is_named { RuleVerdict::Matches } else { RuleVerdict::Foreign }
}

/// All fields that are given hold. `allow`: matching widens access.
fn peer_matches(
    allow: bool,
    peer: &Peer,
    identity: Option<&SpiffeId>,
    facts: &Question<'_>,
) -> bool {
    let ip = facts.flow.peer_ip.to_canonical();
    let in_blocks = |blocks: &[ipnet::IpNet]| blocks.iter().any(|block| block.contains(&ip));
    if !peer.ip_blocks.is_empty() && !in_blocks(&peer.ip_blocks) {
        return false;
    }
    if in_blocks(&peer.not_ip_blocks) {
        return false;
    }
    let is_target = |target: &Target| {
        target.ip == ip && target.port == facts.flow.port && target.protocol == facts.flow.protocol
    };
    if !peer.services.is_empty() && !peer.targets.iter().any(is_target) {
        return false;
    }
    if !facts.asked.comes_from(allow, &peer.request) {
        return false;
    }
    let Some(id) = identity else {
        // Nobody: positive fields are false, negative ones true.
        return peer.identities.is_empty()
            && peer.namespaces.is_empty()
            && peer.service_accounts.is_empty()
            && peer.trust_domains.is_empty();
    };
    if peer.unidentified {
        return false;
    }
    let domain = id.trust_domain();
    let own = is_own(&domain, facts);
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
    let in_domains = |patterns: &[Arc<str>], everywhere: bool| {
        patterns.iter().any(|pattern| {
            if own {
                return own_names(facts).any(|name| pattern_matches(pattern, name.as_str()));
            }
            pattern_matches(pattern, domain.as_str())
                && (everywhere || **pattern == *domain.as_str())
        })
    };
    if !peer.trust_domains.is_empty() && !in_domains(&peer.trust_domains, !allow) {
        return false;
    }
    if in_domains(&peer.not_trust_domains, allow) {
        return false;
    }
    let is_named = || peer.trust_domains.iter().any(|name| **name == *domain.as_str());
    let workload = if own || is_named() { id.workload() } else { None };
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
fn is_foreign(facts: &Question<'_>) -> bool {
    match facts.flow.peer {
        PeerIdentity::Unknown => false,
        PeerIdentity::Address(id) | PeerIdentity::Authenticated(id) => {
            !is_own(&id.trust_domain(), facts)
        }
    }
}

/// True for the cluster's own trust domain under any of its names.
fn is_own(domain: &TrustDomain, facts: &Question<'_>) -> bool {
    domain == facts.flow.trust_domain || facts.flow.aliases.contains(domain)
}

/// True when the pattern matches an identity of our own domain under another of its names: a
/// policy may be written before or after the domain got its present one.
fn matches_other_name(pattern: &str, id: &SpiffeId, facts: &Question<'_>) -> bool {
    !facts.flow.aliases.is_empty()
        && own_names(facts)
            .any(|name| pattern_matches(pattern, &format!("spiffe://{name}{}", id.path())))
}

/// The names of our own trust domain.
fn own_names<'a>(facts: &Question<'a>) -> impl Iterator<Item = &'a TrustDomain> {
    std::iter::once(facts.flow.trust_domain).chain(facts.flow.aliases)
}

/// True when a peer that holds spells this foreign trust domain out.
fn names_peer_domain(peer: &Peer, domain: &TrustDomain) -> bool {
    peer.identities.iter().any(|pattern| names_domain(pattern, domain))
        || peer.trust_domains.iter().any(|name| **name == *domain.as_str())
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
