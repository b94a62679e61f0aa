//! The verdict, once: the same code runs in the programs over real maps and in tests
//! over hash maps (DESIGN §2, §4, §7).
//!
//! No allocation, no loops, no panics: the verifier walks every path.

use crate::abi::{
    AddressEntry, Config, Direction, HEARTBEAT_NS, IDENTITY_ANY, IDENTITY_WORLD, Ip, Mode,
    POLICY_PROBES, PodEntry, PolicyKey, PolicyValue, Reason, TUNNEL_PORT, Verdict, address,
    enforcement, known, pod, proto, range, service, unknown_pods,
};

/// What the verdict reads; the programs answer from BPF maps, tests from hash maps.
pub trait PolicyMaps {
    /// The configuration; `None` only where the map cannot be read.
    fn config(&self) -> Option<&Config>;
    /// The registered pod of a network namespace.
    fn pod(&self, netns: u64) -> Option<&PodEntry>;
    /// True when `ip` is one of the pod's own addresses.
    fn is_own(&self, netns: u64, ip: Ip) -> bool;
    /// What is known of an address.
    fn address(&self, ip: Ip) -> Option<&AddressEntry>;
    /// Flags of a Service's port.
    fn service(&self, ip: Ip, port: u16, protocol: u8) -> Option<u32>;
    /// The most specific range that holds `ip`.
    fn range(&self, ip: Ip) -> Option<u32>;
    /// Longest match in the pod's policy; `bits` is the length of the looked-up prefix.
    fn policy(&self, netns: u64, bits: u32, key: &PolicyKey) -> Option<&PolicyValue>;
    /// True when the pod's port is exempt from the refusal of plaintext.
    fn is_exempt(&self, netns: u64, port: u16, protocol: u8) -> bool;
    /// True when the node's recording program attests the inbound flow as a probe.
    fn is_probe(&self, flow: &Flow) -> bool;
}

/// A flow, as the pod's own end sees it.
#[derive(Clone, Copy, Debug)]
pub struct Flow {
    /// The socket's network namespace.
    pub netns: u64,
    /// The network namespace registered for the *calling task's* pod cgroup, 0 for none.
    pub task_netns: u64,
    /// The pod's address, unspecified where the kernel has not chosen it yet.
    pub local: Ip,
    /// The other side.
    pub remote: Ip,
    /// The pod's port.
    pub local_port: u16,
    /// The other side's port.
    pub remote_port: u16,
    /// IP protocol.
    pub protocol: u8,
    /// Whether it can still be steered: where a socket is being connected. A packet cannot.
    pub steerable: bool,
    /// `CLOCK_MONOTONIC`, nanoseconds.
    pub now: u64,
}

/// What the program does.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Action {
    /// Nothing: not ours to judge, or judged and let through as it is.
    Pass,
    /// Steer it into the agent's listener: into a tunnel, or what came in to its judge.
    Tunnel,
    /// Refuse it with the errno of [`Decision::errno`] (a drop where there is no errno).
    Refuse,
}

/// What was decided, and what to report.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Decision {
    /// What the program does.
    pub action: Action,
    /// For [`Action::Refuse`]: the errno that the application gets.
    pub errno: u16,
    /// True when the verdict is to be recorded.
    pub report: bool,
    /// The verdict to record.
    pub verdict: Verdict,
    /// Its reason.
    pub reason: Reason,
    /// The deciding policy's number, 0 for none.
    pub policy: u32,
    /// The other side's identity by address.
    pub remote_identity: u32,
    /// The pod's mode.
    pub mode: Mode,
    /// Revision of the pod's entry.
    pub revision: u64,
}

/// `EPERM`: refused by policy; a retry will not help.
pub const EPERM: u16 = 1;
/// `ECONNREFUSED`: refused for now; programs retry it.
pub const ECONNREFUSED: u16 = 111;

impl Decision {
    /// Not ours to judge.
    const UNTOUCHED: Self = Self {
        action: Action::Pass,
        errno: 0,
        report: false,
        verdict: Verdict::Forwarded,
        reason: Reason::Allowed,
        policy: 0,
        remote_identity: IDENTITY_WORLD,
        mode: Mode::Off,
        revision: 0,
    };
}

/// A verdict under construction: what the pod's mode makes of a reason.
#[inline(always)]
fn conclude(
    entry: &PodEntry,
    config: &Config,
    remote_identity: u32,
    reason: Reason,
    errno: u16,
    policy: PolicyValue,
) -> Decision {
    let mode = Mode::from_u8(entry.mode);
    let refused = reason as u16 != Reason::Allowed as u16;
    let enforced = mode.is_enforced() && config.enforcement == enforcement::ENFORCE;
    let (action, verdict) = if !refused {
        let verdict = if policy.audit != 0 { Verdict::Audit } else { Verdict::Forwarded };
        (Action::Pass, verdict)
    } else if enforced {
        (Action::Refuse, Verdict::Dropped)
    } else {
        (Action::Pass, Verdict::Audit)
    };
    Decision {
        action,
        errno,
        report: true,
        verdict,
        reason,
        policy: policy.number,
        remote_identity,
        mode,
        revision: entry.revision,
    }
}

const NO_POLICY: PolicyValue = PolicyValue { number: 0, reason: 0, audit: 0, pad: 0 };

/// The pod's policy over an address-known (or, for observe, as-if authenticated) peer.
///
/// `owner` is the namespace that the pod is registered under, `port` the destination's. An entry of the identity itself goes before the one of
/// every other identity; each entry holds the complete outcome, so there is no merging.
#[inline(always)]
fn judge<M: PolicyMaps>(
    maps: &M,
    owner: u64,
    flow: &Flow,
    direction: Direction,
    how: u8,
    identity: u32,
    port: u16,
) -> (Reason, PolicyValue) {
    let class = match maps.policy(owner, 160, &PolicyKey::class(direction, flow.remote)) {
        Some(value) => value.number,
        None => 0,
    };
    let exact = PolicyKey::rule(direction, how, flow.protocol, class, identity, port);
    let found = match maps.policy(owner, 112, &exact) {
        Some(value) => Some(value),
        None => {
            let any = PolicyKey::rule(direction, how, flow.protocol, class, IDENTITY_ANY, port);
            maps.policy(owner, 112, &any)
        }
    };
    match found {
        Some(value) => (reason_of(value.reason), *value),
        // No entry at all: no policy selects the pod for this direction.
        None => (Reason::Allowed, NO_POLICY),
    }
}

/// The reason in a policy value; a number that this build does not know refuses.
#[inline(always)]
fn reason_of(number: u16) -> Reason {
    if number == Reason::Allowed as u16 {
        Reason::Allowed
    } else if number == Reason::PolicyDeny as u16 {
        Reason::PolicyDeny
    } else if number == Reason::PolicyNoMatch as u16 {
        Reason::PolicyNoMatch
    } else {
        Reason::PolicyUnsupported
    }
}

/// A pod that is not registered (DESIGN §5, "Unknown pods").
#[inline(always)]
fn unknown_pod(config: &Config, now: u64) -> Decision {
    let young = config.heartbeat != 0 && now.wrapping_sub(config.heartbeat) < HEARTBEAT_NS;
    let refuse = match config.unknown_pods {
        // Before the agent's first heartbeat nobody knows what is enforced here.
        _ if config.guarded_until != 0 => now < config.heartbeat,
        unknown_pods::ALLOW => false,
        unknown_pods::AUTO => config.enforcing != 0 && (young || config.deny_when_dead != 0),
        _ => true,
    };
    if !refuse || config.enforcement != enforcement::ENFORCE {
        return Decision::UNTOUCHED;
    }
    Decision {
        action: Action::Refuse,
        errno: ECONNREFUSED,
        report: true,
        verdict: Verdict::Dropped,
        reason: Reason::PodUnregistered,
        ..Decision::UNTOUCHED
    }
}

/// The kind of an address that nobody knows; no entry has it.
const UNKNOWN_ADDRESS: u8 = 0;

/// What is known of an address, as a value whose every field is set: an absent one would
/// leave registers unset that the verifier then finds spilled.
#[inline(always)]
fn peer_at<M: PolicyMaps>(maps: &M, ip: Ip) -> AddressEntry {
    match maps.address(ip) {
        Some(entry) => *entry,
        None => AddressEntry { identity: IDENTITY_WORLD, kind: UNKNOWN_ADDRESS, flags: 0, pad: 0 },
    }
}

/// Not a flag of a Service's port that any map holds: the Service has no such port.
const NO_SUCH_PORT: u32 = 1 << 31;

/// Flags of the dialled Service's port, 0 for what is no Service.
#[inline(always)]
fn service_at<M: PolicyMaps>(maps: &M, flow: &Flow, peer: &AddressEntry) -> u32 {
    if peer.kind != address::SERVICE {
        return 0;
    }
    match maps.service(flow.remote, flow.remote_port, flow.protocol) {
        Some(flags) => flags & !NO_SUCH_PORT,
        // An external address is a Service's only on its ports.
        None => match maps.service(flow.remote, service::EXTERNAL, 0) {
            Some(_) => 0,
            None => NO_SUCH_PORT,
        },
    }
}

/// Not a kind of range that any map holds: no range holds the address.
const NO_RANGE: u32 = 0;

/// The kind of the range that an unknown address lies in.
#[inline(always)]
fn range_at<M: PolicyMaps>(maps: &M, flow: &Flow, peer: &AddressEntry) -> u32 {
    if peer.kind != UNKNOWN_ADDRESS {
        return NO_RANGE;
    }
    match maps.range(flow.remote) {
        Some(kind) => kind,
        None => NO_RANGE,
    }
}

/// Neither TCP nor UDP: `otherProtocols` says, for all of them; packets that pass are not
/// reported one by one.
#[inline(always)]
fn other_protocol(entry: &PodEntry, config: &Config, identity: u32, errno: u16) -> Decision {
    if entry.flags & pod::DENY_OTHER == 0 {
        return Decision::UNTOUCHED;
    }
    conclude(entry, config, identity, Reason::PolicyDeny, errno, NO_POLICY)
}

/// True when two namespaces belong to two different pods.
#[inline(always)]
fn is_foreign(flow: &Flow) -> bool {
    flow.task_netns != 0 && flow.task_netns != flow.netns
}

/// What a pod's socket dials or sends to (connect, sendmsg, cgroup_skb egress).
#[inline(always)]
pub fn decide_egress<M: PolicyMaps>(maps: &M, flow: &Flow) -> Decision {
    let Some(config) = maps.config() else {
        return Decision::UNTOUCHED;
    };
    if config.enforcement == enforcement::OFF || flow.remote.is_local_by_nature() {
        return Decision::UNTOUCHED;
    }
    let (entry, nested) = match maps.pod(flow.netns) {
        Some(entry) => (entry, false),
        None => {
            // An unknown network namespace inside a known pod's cgroup is that pod's own
            // doing: its egress, never its tunnel. The node's namespace is hostNetwork's.
            if flow.task_netns == 0 || flow.netns == config.host_netns {
                if flow.netns == config.host_netns {
                    return Decision::UNTOUCHED;
                }
                return unknown_pod(config, flow.now);
            }
            match maps.pod(flow.task_netns) {
                Some(entry) => (entry, true),
                None => return unknown_pod(config, flow.now),
            }
        }
    };
    let mode = Mode::from_u8(entry.mode);
    if matches!(mode, Mode::Off) || maps.is_own(flow.netns, flow.remote) {
        return Decision::UNTOUCHED;
    }
    let strict = matches!(mode, Mode::Strict);
    let peer = peer_at(maps, flow.remote);
    let identity = peer.identity;
    // A socket of one pod used by a task of another proves nothing.
    if !nested && is_foreign(flow) && mode.is_enforced() {
        return conclude(entry, config, identity, Reason::IdentityMismatch, EPERM, NO_POLICY);
    }
    if entry.flags & pod::CLOSED != 0 {
        return conclude(entry, config, identity, Reason::MapFull, ECONNREFUSED, NO_POLICY);
    }
    if nested && strict {
        // It may be the pod's next sandbox, which is registered in a moment: programs retry this.
        return conclude(entry, config, identity, Reason::PodUnregistered, ECONNREFUSED, NO_POLICY);
    }
    if flow.protocol != proto::TCP && flow.protocol != proto::UDP {
        return other_protocol(entry, config, identity, EPERM);
    }
    let observing = matches!(mode, Mode::Observe);
    let enrollable = peer.flags & address::ENROLLABLE != 0;
    let how = if observing && enrollable { known::AUTHENTICATED } else { known::ADDRESS };
    let owner = if nested { flow.task_netns } else { flow.netns };
    let (reason, policy) =
        judge(maps, owner, flow, Direction::Egress, how, identity, flow.remote_port);
    if flow.protocol != proto::TCP {
        return conclude(entry, config, identity, reason, EPERM, policy);
    }
    let service = service_at(maps, flow, &peer);
    // A DENY that an address satisfies is answered here; an ALLOW that misses may still
    // be satisfied by the handshake, so the tunnel's proxy answers that. Of a Service whose
    // endpoints are tunnelled nothing is known yet, neither the identity nor the port, and
    // of a remote peer not the identity: the proxy judges whom it chose.
    let denied = reason as u16 == Reason::PolicyDeny as u16
        || reason as u16 == Reason::PolicyUnsupported as u16;
    let range = range_at(maps, flow, &peer);
    let chosen_later = service & service::TUNNEL != 0 || range == range::REMOTE;
    // What was dialled before the pod was enrolled, and comes again now, was not steered: a
    // permissive pod may go direct, under what its policy makes of addresses.
    let direct = nested || (!flow.steerable && matches!(mode, Mode::Permissive));
    if denied && (!chosen_later || direct) {
        return conclude(entry, config, identity, reason, EPERM, policy);
    }
    let mut tunnel = false;
    let mut refusal = Reason::Allowed;
    if peer.kind == address::POD {
        if peer.flags & address::ENROLLED != 0 {
            if peer.flags & address::SERVED != 0 {
                tunnel = true;
            } else if strict {
                refusal = Reason::PeerUnreachable;
            }
        }
    } else if peer.kind == address::SERVICE {
        let nobody = service & service::NO_ENDPOINTS != 0;
        if nobody || (service & NO_SUCH_PORT != 0 && strict) {
            refusal = Reason::PeerUnreachable;
        } else {
            tunnel = service & service::TUNNEL != 0;
        }
    } else if range == range::REMOTE {
        tunnel = true;
    } else if peer.kind == UNKNOWN_ADDRESS && (strict || observing) {
        let within = match range {
            // No ranges known: nothing can be told apart, and strict refuses.
            NO_RANGE => config.ranges_known == 0,
            kind => kind != range::OUTSIDE,
        };
        if within {
            refusal = Reason::IdentityUnknown;
        }
    }
    if refusal as u16 != Reason::Allowed as u16 {
        return conclude(entry, config, identity, refusal, ECONNREFUSED, NO_POLICY);
    }
    if !tunnel || observing {
        return conclude(entry, config, identity, reason, EPERM, policy);
    }
    if config.enforcement != enforcement::ENFORCE {
        return conclude(entry, config, identity, reason, EPERM, policy);
    }
    if direct {
        // Permissive: never through the pod's tunnel.
        return conclude(entry, config, identity, reason, EPERM, policy);
    }
    if entry.flags & pod::READY == 0 {
        return conclude(entry, config, identity, Reason::SvidMissing, ECONNREFUSED, NO_POLICY);
    }
    Decision {
        action: Action::Tunnel,
        errno: 0,
        // The proxy records it, with what the handshake proved.
        report: false,
        verdict: Verdict::Forwarded,
        reason: Reason::Allowed,
        policy: policy.number,
        remote_identity: identity,
        mode,
        revision: entry.revision,
    }
}

/// True when requests to the pod are judged by the agent, which is there to do it. Without it
/// the kernel's own entries decide, which hold no rule about requests and fail closed.
#[inline(always)]
fn is_judged(entry: &PodEntry, config: &Config) -> bool {
    let wanted = pod::JUDGED | pod::READY;
    entry.flags & wanted == wanted
        && Mode::from_u8(entry.mode).is_enforced()
        && config.enforcement == enforcement::ENFORCE
}

/// What arrives at a pod from outside its network namespace (sk_lookup, cgroup_skb ingress).
#[inline(always)]
pub fn decide_ingress<M: PolicyMaps>(maps: &M, flow: &Flow) -> Decision {
    let Some(config) = maps.config() else {
        return Decision::UNTOUCHED;
    };
    if config.enforcement == enforcement::OFF || flow.remote.is_local_by_nature() {
        return Decision::UNTOUCHED;
    }
    let Some(entry) = maps.pod(flow.netns) else {
        if flow.netns == config.host_netns || maps.is_probe(flow) {
            return Decision::UNTOUCHED;
        }
        return unknown_pod(config, flow.now);
    };
    let mode = Mode::from_u8(entry.mode);
    if matches!(mode, Mode::Off) || maps.is_own(flow.netns, flow.remote) {
        return Decision::UNTOUCHED;
    }
    let enforced = mode.is_enforced();
    let tcp = flow.protocol == proto::TCP;
    if tcp && enforced && entry.flags & pod::READY != 0 && flow.local_port == TUNNEL_PORT {
        return Decision {
            action: Action::Tunnel,
            mode,
            revision: entry.revision,
            ..Decision::UNTOUCHED
        };
    }
    let peer = peer_at(maps, flow.remote);
    let (identity, enrollable) = (peer.identity, peer.flags & address::ENROLLABLE != 0);
    let listener = tcp
        && enforced
        && (flow.local_port == entry.listener4
            || (entry.listener6_count != 0
                && flow.local_port.wrapping_sub(entry.listener6) < entry.listener6_count));
    if listener {
        return conclude(entry, config, identity, Reason::WrongDestination, 0, NO_POLICY);
    }
    if entry.flags & pod::CLOSED != 0 {
        return conclude(entry, config, identity, Reason::MapFull, 0, NO_POLICY);
    }
    if maps.is_probe(flow) {
        // A listed built-in: the node's own kubelet.
        let builtin = PolicyValue { number: POLICY_PROBES, ..NO_POLICY };
        return conclude(entry, config, identity, Reason::Allowed, 0, builtin);
    }
    let observing = matches!(mode, Mode::Observe);
    if tcp {
        let plaintext_refused = match mode {
            Mode::Strict => true,
            // As strict would, if every peer that can be enrolled were tunnelled.
            Mode::Observe => !enrollable,
            _ => false,
        };
        if plaintext_refused && !maps.is_exempt(flow.netns, flow.local_port, flow.protocol) {
            return conclude(entry, config, identity, Reason::PlaintextRefused, 0, NO_POLICY);
        }
        if is_judged(entry, config) && !maps.is_exempt(flow.netns, flow.local_port, flow.protocol) {
            // The proxy judges what is requested, and records it.
            return Decision {
                action: Action::Tunnel,
                remote_identity: identity,
                mode,
                revision: entry.revision,
                ..Decision::UNTOUCHED
            };
        }
    } else if flow.protocol != proto::UDP {
        return other_protocol(entry, config, identity, 0);
    }
    let how = if observing && enrollable && tcp { known::AUTHENTICATED } else { known::ADDRESS };
    let (reason, policy) =
        judge(maps, flow.netns, flow, Direction::Ingress, how, identity, flow.local_port);
    conclude(entry, config, identity, reason, 0, policy)
}
