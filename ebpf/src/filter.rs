//! cgroup_skb ingress and egress at the workloads root: UDP and other protocols both ways
//! with reply tracking, and a second line for TCP's first packets.
//!
//! A drop here is silent on ingress and EPERM on egress, so TCP is answered earlier where
//! it can be: at connect and in sk_lookup. A packet without a socket meets no hook.

use crate::{
    maps::{
        CONFIG, CUT, GUARD_FLOWS, Kernel, UDP_FLOWS, count, count_udp, has, has_udp_room, now,
        owner_of, report,
    },
    packet, task,
};
use aya_ebpf::{
    EbpfContext,
    helpers::{bpf_get_netns_cookie, bpf_skb_cgroup_id},
    macros::cgroup_skb,
    programs::SkBuffContext,
};
use signet_ebpf::{
    abi::{FlowKey, Mode, Reason, UdpFlow, Verdict, counter, feature, hook, proto},
    decide::{Action, Decision, Flow, PolicyMaps, decide_egress, decide_ingress},
    guard::{self, Frame, tcp},
};

const PASS: i32 = 1;
const DROP: i32 = 0;

/// How stale the note of a flow for the guard may get.
const NOTE_AGAIN_NS: u64 = 1_000_000_000;

/// A UDP flow that was quiet for longer is a new one.
const UDP_IDLE_NS: u64 = 120_000_000_000;

#[cgroup_skb(ingress)]
pub fn skb_ingress(ctx: SkBuffContext) -> i32 {
    // What cannot be parsed cannot be a flow that the stack would accept.
    let Some((packet, _)) = packet::parse(&ctx.skb, 0) else { return DROP };
    filter(&ctx, &packet, true)
}

#[cgroup_skb(egress)]
pub fn skb_egress(ctx: SkBuffContext) -> i32 {
    let Some((packet, _)) = packet::parse(&ctx.skb, 0) else { return DROP };
    if filter(&ctx, &packet, false) == DROP {
        return DROP;
    }
    if is_guarding() {
        record(&ctx, &packet);
    }
    PASS
}

/// True while some pod of this node has a raw guard.
#[inline(always)]
fn is_guarding() -> bool {
    match CONFIG.get(0) {
        Some(config) => config.guarding != 0,
        None => false,
    }
}

/// Notes the flow of a packet that an enforced pod's socket may send, for the guard.
#[inline(always)]
fn record(ctx: &SkBuffContext, packet: &Frame) {
    // Later fragments follow their first one; loopback never meets the guard.
    if packet.later_fragment || packet.destination.is_local_by_nature() {
        return;
    }
    let netns = netns_of(ctx);
    let is_enforced = |netns| match Kernel.pod(netns) {
        Some(entry) => Mode::from_u8(entry.mode).is_enforced(),
        None => false,
    };
    let mut key = guard::flow_of(netns, packet);
    if !is_enforced(netns) {
        // A network namespace inside a pod: the pod forwards it, under an address of its own.
        key.netns = task::netns_of_packet(ctx.skb.skb);
        guard::forward(&mut key);
        if !is_enforced(key.netns) {
            return;
        }
    }
    let now = now();
    if let Some(last) = GUARD_FLOWS.get_ptr_mut(&key) {
        // SAFETY: a live map value. Each second is often enough, and spares the cache.
        unsafe {
            if now.wrapping_sub(*last) > NOTE_AGAIN_NS {
                *last = now;
            }
        }
        return;
    }
    // Without it the guard drops the packet.
    let _ = GUARD_FLOWS.insert(&key, &now, 0);
}

/// The network namespace of the packet's socket.
#[inline(always)]
fn netns_of(ctx: &SkBuffContext) -> u64 {
    if has(feature::SKB_NETNS_COOKIE) {
        // SAFETY: the context has this helper on kernels with the feature bit.
        unsafe { bpf_get_netns_cookie(ctx.as_ptr()) }
    } else {
        // The cgroup names the pod. One that is not registered has none: 0.
        task::netns_of_packet(ctx.skb.skb)
    }
}

#[inline(always)]
fn filter(ctx: &SkBuffContext, packet: &Frame, ingress: bool) -> i32 {
    if packet.later_fragment {
        // Nothing is known of it; the first one was judged, and without that the rest never
        // becomes a datagram.
        return PASS;
    }
    let tcp = packet.protocol == proto::TCP;
    let later = tcp && packet.detail & (tcp::SYN | tcp::ACK) != tcp::SYN;
    // TCP is decided on its first packet only; what comes later goes on, unless the flow
    // lost its right and its sockets could not be destroyed.
    if later && has(feature::SOCK_DESTROY) {
        return PASS;
    }
    let task_netns = task::netns_of_packet(ctx.skb.skb);
    let netns = netns_of(ctx);
    let flow = if ingress {
        Flow {
            netns,
            // The packet's socket is the receiver's own.
            task_netns: netns,
            local: packet.destination,
            remote: packet.source,
            local_port: packet.destination_port,
            remote_port: packet.source_port,
            protocol: packet.protocol,
            steerable: false,
            now: now(),
        }
    } else {
        Flow {
            netns,
            task_netns,
            local: packet.source,
            remote: packet.destination,
            local_port: packet.source_port,
            remote_port: packet.destination_port,
            protocol: packet.protocol,
            steerable: false,
            now: now(),
        }
    };
    if packet.protocol == proto::UDP {
        return udp(ctx, &flow, ingress);
    }
    if tcp && !has(feature::SOCK_DESTROY) {
        let key = key_of(&flow);
        if later {
            // SAFETY: only whether there is an entry matters.
            return if unsafe { CUT.get(&key) }.is_some() { DROP } else { PASS };
        }
        // A new connection of the same ports is judged for itself.
        let _ = CUT.remove(&key);
    }
    let decision = judge(&flow, ingress);
    match decision.action {
        Action::Pass => {
            if decision.report {
                send(ctx, &flow, &decision, ingress);
            }
            PASS
        }
        // A TCP packet that should have been steered and was not: it never leaves.
        Action::Tunnel if !ingress => {
            let refused = Decision {
                action: Action::Refuse,
                verdict: Verdict::Dropped,
                reason: Reason::PlaintextRefused,
                ..decision
            };
            send(ctx, &flow, &refused, ingress);
            DROP
        }
        Action::Tunnel => PASS,
        Action::Refuse => {
            send(ctx, &flow, &decision, ingress);
            DROP
        }
    }
}

#[inline(always)]
fn judge(flow: &Flow, ingress: bool) -> Decision {
    if ingress { decide_ingress(&Kernel, flow) } else { decide_egress(&Kernel, flow) }
}

#[inline(always)]
fn send(ctx: &SkBuffContext, flow: &Flow, decision: &Decision, ingress: bool) {
    let hook = if ingress { hook::INGRESS } else { hook::EGRESS };
    // SAFETY: the program's context.
    report(flow, decision, ingress, hook, unsafe { bpf_skb_cgroup_id(ctx.skb.skb) });
}

#[inline(always)]
fn key_of(flow: &Flow) -> FlowKey {
    FlowKey {
        netns: flow.netns,
        local: flow.local,
        remote: flow.remote,
        local_port: flow.local_port,
        remote_port: flow.remote_port,
        family: 0,
    }
}

/// UDP: the first packet is judged; replies and later packets follow its verdict until the
/// policy's revision changes or the flow falls quiet.
#[inline(always)]
fn udp(ctx: &SkBuffContext, flow: &Flow, ingress: bool) -> i32 {
    let key = key_of(flow);
    let owner = owner_of(flow);
    let mut known = false;
    let mut tracked_before = false;
    if let Some(tracked) = UDP_FLOWS.get_ptr_mut(&key) {
        tracked_before = true;
        // SAFETY: a live map value.
        let (last, revision) = unsafe { ((*tracked).last, (*tracked).revision) };
        known = flow.now.wrapping_sub(last) < UDP_IDLE_NS;
        let began_here = (revision & INGRESS_BIT != 0) == ingress;
        let current = revision & !INGRESS_BIT == policy_revision(flow.netns);
        // A packet of the direction that began the flow is judged again when the policy
        // changed; an answer follows the flow while it is admitted.
        if known && (current || !began_here) {
            // SAFETY: as above.
            unsafe { (*tracked).last = flow.now };
            return PASS;
        }
    }
    let decision = judge(flow, ingress);
    if let Action::Refuse = decision.action {
        if tracked_before && UDP_FLOWS.remove(&key).is_ok() {
            count_udp(owner, -1);
        }
        send(ctx, flow, &decision, ingress);
        return DROP;
    }
    if !decision.report {
        return PASS;
    }
    let entry = UdpFlow {
        last: flow.now,
        revision: decision.revision | if ingress { INGRESS_BIT } else { 0 },
    };
    let has_room = tracked_before || has_udp_room(owner);
    if !has_room || UDP_FLOWS.insert(&key, &entry, 0).is_err() {
        count(counter::UDP_FULL);
        if !decision.mode.is_enforced() {
            return PASS;
        }
        // Without an entry its answers would be judged as new flows.
        let full = Decision {
            action: Action::Refuse,
            verdict: Verdict::Dropped,
            reason: Reason::MapFull,
            policy: 0,
            ..decision
        };
        send(ctx, flow, &full, ingress);
        return DROP;
    }
    if !tracked_before {
        count_udp(owner, 1);
    }
    if !known {
        send(ctx, flow, &decision, ingress);
    }
    PASS
}

/// Marks a tracked flow whose first packet arrived from outside.
const INGRESS_BIT: u64 = 1 << 63;

/// Revision of the pod's entry, 0 when it is not registered.
#[inline(always)]
fn policy_revision(netns: u64) -> u64 {
    match Kernel.pod(netns) {
        Some(entry) => entry.revision,
        None => 0,
    }
}
