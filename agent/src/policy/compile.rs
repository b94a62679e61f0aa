//! Policies → entries of a pod's policy trie, exactly as the kernel's verdict reads them.
//!
//! The kernel looks up the class of the peer's address, then the outcome under
//! (direction, how known, protocol, class, identity, port), first for the identity itself,
//! then for any. Each entry holds a complete outcome. This module asks [`evaluate`] for
//! every combination that policies can tell apart, so both agree by construction:
//!
//! - *classes* partition addresses by which of the policies' blocks hold them,
//! - *segments* partition ports by which of the policies' ranges hold them,
//! - an identity gets rows of its own only where its outcome differs from a stranger's,
//! - a direction that nothing governs gets no row at all: the kernel then allows.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv6Addr},
    sync::Arc,
};

use ipnet::IpNet;
use signet_ebpf::abi::{
    Direction, IDENTITY_ANY, Ip, POLICY_FIXED_BITS, POLICY_RULE_BITS, PolicyKey, PolicyValue,
    Reason, known, proto,
};

use super::{
    evaluate::{FlowFacts, Outcome, PeerIdentity, evaluate},
    model::{Condition, Peer, Policy, PolicyName, Rule},
};
use crate::spiffe::{SpiffeId, TrustDomain};

/// One entry of a pod's policy trie: prefix length in bits, key data, value.
pub type PolicyEntry = (u32, PolicyKey, PolicyValue);

/// What is compiled.
pub struct CompileInput<'a> {
    /// The policies that select the pod, in evaluation order.
    pub policies: &'a [Arc<Policy>],
    /// The namespace's default is deny.
    pub default_deny: bool,
    /// The cluster's own trust domain.
    pub trust_domain: &'a TrustDomain,
    /// Other names of it.
    pub aliases: &'a [TrustDomain],
    /// Every identity that an address entry may carry, with its kernel number.
    pub identities: &'a [(u32, SpiffeId)],
    /// A policy's kernel number; never 0.
    pub number: &'a dyn Fn(&PolicyName) -> u32,
    /// The pod is in observe mode: rows for peers judged as if authenticated, too.
    pub observe: bool,
    /// The pod's own addresses.
    pub local_ips: &'a [IpAddr],
    /// More entries than this are refused (the pod's inner map's size).
    pub max_entries: usize,
}

/// Why policies do not compile.
#[derive(Debug, thiserror::Error, PartialEq, Eq, Clone)]
#[non_exhaustive]
pub enum CompileError {
    /// The entries do not fit the pod's map.
    #[error(
        "the pod's policies need more than {limit} kernel entries; name fewer port ranges, ip \
         blocks or identities"
    )]
    TooLarge {
        /// The map's size.
        limit: usize,
    },
}

impl CompileError {
    /// What flows of the pod are refused with.
    pub fn reason(&self) -> Reason {
        match self {
            Self::TooLarge { .. } => Reason::MapFull,
        }
    }
}

/// Compiles the policies that select a pod, both directions.
///
/// Entries are in a fixed order, so that equal inputs give equal outputs.
pub fn compile(input: &CompileInput<'_>) -> Result<Vec<PolicyEntry>, CompileError> {
    let mut out = Rows { entries: Vec::new(), limit: input.max_entries };
    for direction in [Direction::Ingress, Direction::Egress] {
        // A built-in allows what is allowed anyway where nothing else speaks.
        let mut speaking = input.policies.iter().filter(|p| !p.builtin);
        if input.default_deny || speaking.any(|p| p.governs(direction)) {
            compile_direction(input, direction, &mut out)?;
        }
    }
    Ok(out.entries)
}

/// The entries so far, bounded.
struct Rows {
    entries: Vec<PolicyEntry>,
    limit: usize,
}

impl Rows {
    fn push(&mut self, entry: PolicyEntry) -> Result<(), CompileError> {
        if self.entries.len() >= self.limit {
            return Err(CompileError::TooLarge { limit: self.limit });
        }
        self.entries.push(entry);
        Ok(())
    }
}

fn compile_direction(
    input: &CompileInput<'_>,
    direction: Direction,
    out: &mut Rows,
) -> Result<(), CompileError> {
    let classes = classes(input.policies, direction);
    for row in &classes.rows {
        let value = PolicyValue { number: row.class, ..PolicyValue::default() };
        let ip = Ip::from_octets(row.first.to_be_bytes());
        out.push((
            POLICY_FIXED_BITS + u32::from(row.bits),
            PolicyKey::class(direction, ip),
            value,
        ))?;
    }
    let hows: &[u8] =
        if input.observe { &[known::ADDRESS, known::AUTHENTICATED] } else { &[known::ADDRESS] };
    // Policy does not speak about other protocols; the kernel asks no rows for them.
    for protocol in [proto::TCP, proto::UDP] {
        for (&class, &representative) in &classes.representatives {
            // What is about other addresses would only cost time.
            let policies = about(input.policies, direction, representative);
            let segments = segments(&policies, direction);
            let outcomes = |peer: PeerIdentity<'_>| -> Vec<PolicyValue> {
                let at = |port: u16| {
                    let facts = FlowFacts {
                        direction,
                        trust_domain: input.trust_domain,
                        aliases: input.aliases,
                        peer,
                        peer_ip: representative,
                        local_ips: input.local_ips,
                        port,
                        protocol,
                    };
                    value_of(input, &evaluate(&policies, input.default_deny, &facts))
                };
                segments.iter().map(|&(first, _)| at(first)).collect()
            };
            let stranger = outcomes(PeerIdentity::Unknown);
            for &how in hows {
                let key = |identity: u32, port: u16| {
                    PolicyKey::rule(direction, how, protocol, class, identity, port)
                };
                // Absent means "allowed, nobody decided".
                let fallback = vec![PolicyValue::default(); segments.len()];
                emit(&segments, &stranger, &fallback, |port| key(IDENTITY_ANY, port), out)?;
                for (number, id) in input.identities {
                    let peer = if how == known::AUTHENTICATED {
                        PeerIdentity::Authenticated(id)
                    } else {
                        PeerIdentity::Address(id)
                    };
                    let own = outcomes(peer);
                    emit(&segments, &own, &stranger, |port| key(*number, port), out)?;
                }
            }
        }
    }
    Ok(())
}

/// What the kernel stores for an outcome. A flow that passes and is audited is told of under
/// the policy that audits it, as the proxies do.
fn value_of(input: &CompileInput<'_>, outcome: &Outcome) -> PolicyValue {
    let policy = match &outcome.audit {
        Some(audit) if outcome.is_allowed() => Some(audit),
        _ => outcome.policy.as_ref(),
    };
    PolicyValue {
        number: policy.map_or(0, |policy| (input.number)(&policy.name)),
        reason: outcome.reason as u16,
        audit: u8::from(outcome.audit.is_some()),
        pad: 0,
    }
}

/// Emits rows so that a longest match gives `wanted` wherever it differs from `fallback`
/// (what the kernel concludes when it finds none of these rows).
fn emit(
    segments: &[(u16, u16)],
    wanted: &[PolicyValue],
    fallback: &[PolicyValue],
    key: impl Fn(u16) -> PolicyKey,
    out: &mut Rows,
) -> Result<(), CompileError> {
    if wanted == fallback {
        return Ok(());
    }
    // Either only what differs, or one row for every port and the exceptions from it.
    let sparse: Vec<_> = runs(segments, wanted)
        .into_iter()
        .flat_map(|(first, last, value)| {
            differing(segments, wanted, fallback, first, last)
                .into_iter()
                .flat_map(move |(a, b)| prefixes(a, b).into_iter().map(move |p| (p, value)))
        })
        .collect();
    let base = most_common(segments, wanted);
    let based: Vec<_> = std::iter::once(((0, 0), base))
        .chain(
            runs(segments, wanted)
                .into_iter()
                .filter(|(_, _, value)| *value != base)
                .flat_map(|(a, b, value)| prefixes(a, b).into_iter().map(move |p| (p, value))),
        )
        .collect();
    let rows = if sparse.len() <= based.len() { sparse } else { based };
    for ((port, bits), value) in rows {
        out.push((POLICY_RULE_BITS + u32::from(bits), key(port), value))?;
    }
    Ok(())
}

/// Neighbouring segments of one value, merged.
fn runs(segments: &[(u16, u16)], values: &[PolicyValue]) -> Vec<(u16, u16, PolicyValue)> {
    let mut runs: Vec<(u16, u16, PolicyValue)> = Vec::new();
    for (&(first, last), &value) in segments.iter().zip(values) {
        match runs.last_mut() {
            Some(run) if run.2 == value => run.1 = last,
            _ => runs.push((first, last, value)),
        }
    }
    runs
}

/// The parts of `[first, last]` whose wanted value is not the fallback's, merged.
fn differing(
    segments: &[(u16, u16)],
    wanted: &[PolicyValue],
    fallback: &[PolicyValue],
    first: u16,
    last: u16,
) -> Vec<(u16, u16)> {
    let mut parts: Vec<(u16, u16)> = Vec::new();
    for ((&(a, b), want), found) in segments.iter().zip(wanted).zip(fallback) {
        if a < first || b > last || want == found {
            continue;
        }
        match parts.last_mut() {
            Some(part) if u32::from(part.1) + 1 == u32::from(a) => part.1 = b,
            _ => parts.push((a, b)),
        }
    }
    parts
}

/// The value that covers the most ports.
fn most_common(segments: &[(u16, u16)], values: &[PolicyValue]) -> PolicyValue {
    let mut sums: Vec<(PolicyValue, u32)> = Vec::new();
    for (&(first, last), &value) in segments.iter().zip(values) {
        let ports = u32::from(last) - u32::from(first) + 1;
        match sums.iter_mut().find(|(v, _)| *v == value) {
            Some((_, sum)) => *sum += ports,
            None => sums.push((value, ports)),
        }
    }
    sums.into_iter().max_by_key(|(_, sum)| *sum).map_or_else(PolicyValue::default, |(v, _)| v)
}

/// A port range as prefixes: (first port, significant bits).
fn prefixes(first: u16, last: u16) -> Vec<(u16, u8)> {
    let (mut from, to) = (u32::from(first), u32::from(last));
    let mut out = Vec::new();
    while from <= to {
        // The largest aligned block that begins at `from` and does not pass `to`.
        let aligned = if from == 0 { 16 } else { from.trailing_zeros() };
        let fits = (to - from + 1).ilog2();
        let free = aligned.min(fits).min(16);
        // `from` ≤ 65535 inside the loop, `free` ≤ 16.
        out.push((from as u16, (16 - free) as u8));
        from += 1 << free;
    }
    out
}

/// The policies less the rules that no flow with a peer at `ip` can match, whoever it is.
fn about(policies: &[Arc<Policy>], direction: Direction, ip: IpAddr) -> Vec<Arc<Policy>> {
    let excludes = |peer: &Peer| {
        let within = |blocks: &[IpNet]| blocks.iter().any(|block| block.contains(&ip));
        peer.targets.is_empty()
            && ((!peer.ip_blocks.is_empty() && !within(&peer.ip_blocks))
                || within(&peer.not_ip_blocks))
    };
    let is_about = |rule: &Rule| {
        (rule.peers.is_empty() || !rule.peers.iter().all(excludes))
            && !rule.when.iter().any(|c| matches!(c, Condition::Peer(peer) if excludes(peer)))
    };
    policies
        .iter()
        .map(|policy| {
            let rules = policy.rules(direction);
            // A rule that was not understood has a say in the reason, wherever the peer is.
            let whole = rules.iter().any(|rule| !rule.unsupported.is_empty());
            if whole || rules.iter().all(is_about) {
                return policy.clone();
            }
            let mut narrowed = Policy::clone(policy);
            match direction {
                Direction::Ingress => narrowed.ingress.retain(is_about),
                Direction::Egress => narrowed.egress.retain(is_about),
            }
            Arc::new(narrowed)
        })
        .collect()
}

/// Ports partitioned by the direction's ranges.
fn segments(policies: &[Arc<Policy>], direction: Direction) -> Vec<(u16, u16)> {
    let mut starts = BTreeSet::from([0u16]);
    for policy in policies {
        for rule in policy.rules(direction) {
            let named = rule.all_destinations().flat_map(|to| to.ports.iter().chain(&to.not_ports));
            let targets = rule.all_peers().flat_map(|peer| &peer.targets);
            let ranges = named
                .map(|ports| (ports.first, ports.last))
                .chain(targets.map(|target| (target.port, target.port)));
            for (first, last) in ranges {
                starts.insert(first);
                if let Some(after) = last.checked_add(1) {
                    starts.insert(after);
                }
            }
        }
    }
    let starts: Vec<u16> = starts.into_iter().collect();
    let ends = starts.iter().skip(1).map(|next| next - 1).chain([u16::MAX]);
    starts.iter().copied().zip(ends).collect()
}

/// A partition of the addresses.
struct Classes {
    /// Rows of the class trie; an address under none of them is of class 0.
    rows: Vec<ClassRow>,
    /// Per class that some address has: one of its addresses.
    representatives: BTreeMap<u32, IpAddr>,
}

struct ClassRow {
    first: u128,
    bits: u8,
    class: u32,
}

/// Bits of `::ffff:0:0/96`, under which the trie holds IPv4.
const MAPPED: u128 = 0xffff_0000_0000;
const MAPPED_BITS: u8 = 96;

/// Partitions addresses by which of the direction's blocks hold them.
fn classes(policies: &[Arc<Policy>], direction: Direction) -> Classes {
    let peers =
        || policies.iter().flat_map(|policy| policy.rules(direction)).flat_map(Rule::all_peers);
    // What policies tell apart: single blocks, and the addresses of one peer's services that
    // are there for the same ports.
    let mut sets: Vec<Vec<IpNet>> = peers()
        .flat_map(|peer| peer.ip_blocks.iter().chain(&peer.not_ip_blocks))
        .map(|block| vec![block.trunc()])
        .chain(peers().flat_map(target_sets))
        .collect();
    sets.sort();
    sets.dedup();
    // The trie's nodes, outermost first: (bits, first address).
    let mut nodes: BTreeSet<(u8, u128)> = BTreeSet::from([(0, 0)]);
    // The peer's family says at which of the pod's own addresses the flow is.
    let by_family =
        policies.iter().flat_map(|policy| policy.rules(direction)).any(Rule::asks_local_address);
    if !sets.is_empty() || by_family {
        // An IPv6 block never holds an IPv4 address, though its prefix may cover `::ffff:0:0/96`.
        nodes.insert((MAPPED_BITS, MAPPED));
        nodes.extend(sets.iter().flatten().map(node_of));
    }
    let nodes: Vec<(u8, u128)> = nodes.into_iter().collect();
    let mut numbers: BTreeMap<(Vec<bool>, bool), u32> = BTreeMap::new();
    let mut representatives = BTreeMap::new();
    let mut rows = Vec::new();
    // The root comes first: its class, where it has an address of its own, is 0.
    let mut next = 1;
    for &(bits, first) in &nodes {
        let Some(address) = own_address(&nodes, bits, first) else { continue };
        let ip = IpAddr::V6(Ipv6Addr::from(address)).to_canonical();
        let holds = |set: &Vec<IpNet>| set.iter().any(|block| block.contains(&ip));
        let membership: Vec<bool> = sets.iter().map(holds).collect();
        let family = by_family && ip.is_ipv4();
        let class = *numbers.entry((membership, family)).or_insert_with(|| {
            if bits == 0 {
                return 0;
            }
            next += 1;
            next - 1
        });
        representatives.entry(class).or_insert(ip);
        if bits != 0 || class != 0 {
            rows.push(ClassRow { first, bits, class });
        }
    }
    Classes { rows, representatives }
}

/// The addresses of a peer's services, those with the same ports together.
fn target_sets(peer: &Peer) -> Vec<Vec<IpNet>> {
    let mut ports: BTreeMap<IpAddr, BTreeSet<(u16, u8)>> = BTreeMap::new();
    for target in &peer.targets {
        ports.entry(target.ip).or_default().insert((target.port, target.protocol));
    }
    let mut sets: BTreeMap<BTreeSet<(u16, u8)>, Vec<IpNet>> = BTreeMap::new();
    for (ip, ports) in ports {
        sets.entry(ports).or_default().push(ip.into());
    }
    sets.into_values().collect()
}

fn node_of(block: &IpNet) -> (u8, u128) {
    match block {
        IpNet::V4(net) => {
            (MAPPED_BITS + net.prefix_len(), MAPPED | u128::from(net.network().to_bits()))
        }
        IpNet::V6(net) => (net.prefix_len(), net.network().to_bits()),
    }
}

/// An address of the node that is in none of the nodes below it, if there is one.
fn own_address(nodes: &[(u8, u128)], bits: u8, first: u128) -> Option<u128> {
    let last = last_of(bits, first);
    let mut below: Vec<(u128, u128)> = nodes
        .iter()
        .filter(|&&(b, f)| b > bits && (first..=last).contains(&f))
        .map(|&(b, f)| (f, last_of(b, f)))
        .collect();
    below.sort_unstable();
    let mut free = first;
    for (a, b) in below {
        if free < a {
            break;
        }
        if b >= free {
            free = b.checked_add(1)?;
        }
    }
    (free <= last).then_some(free)
}

fn last_of(bits: u8, first: u128) -> u128 {
    first | u128::MAX.checked_shr(u32::from(bits)).unwrap_or(0)
}

#[cfg(test)]
pub(super) mod tests;
