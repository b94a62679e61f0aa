//! cgroup_skb ingress and egress at the workloads root: UDP and other protocols both ways
//! with reply tracking, and a second line for TCP's first packets.
//!
//! A drop here is silent on ingress and EPERM on egress, so TCP is answered earlier where
//! it can be: at connect and in sk_lookup. A packet without a socket meets no hook.

use crate::{
    maps::{CUT, Kernel, UDP_FLOWS, count, has, now, report},
    task,
};
use aya_ebpf::{
    EbpfContext,
    helpers::{bpf_get_netns_cookie, bpf_skb_cgroup_id},
    macros::cgroup_skb,
    programs::SkBuffContext,
};
use signet_ebpf::{
    abi::{FlowKey, Ip, UdpFlow, counter, feature, hook, proto},
    decide::{Action, Decision, Flow, PolicyMaps, decide_egress, decide_ingress},
};

const PASS: i32 = 1;
const DROP: i32 = 0;

/// A UDP flow that was quiet for longer is a new one.
const UDP_IDLE_NS: u64 = 120_000_000_000;

#[cgroup_skb(ingress)]
pub fn skb_ingress(ctx: SkBuffContext) -> i32 {
    filter(&ctx, true)
}

#[cgroup_skb(egress)]
pub fn skb_egress(ctx: SkBuffContext) -> i32 {
    filter(&ctx, false)
}

/// What a packet's headers say.
struct Packet {
    source: Ip,
    destination: Ip,
    source_port: u16,
    destination_port: u16,
    protocol: u8,
    /// TCP flags of a first fragment.
    flags: u8,
}

const TCP_SYN: u8 = 0x02;
const TCP_ACK: u8 = 0x10;

/// IPv6 extension headers that are skipped before the transport header.
const MAX_EXTENSIONS: u32 = 4;

/// Parses the network and transport headers; `None` where they are cut short.
#[inline(always)]
fn parse(ctx: &SkBuffContext) -> Option<Packet> {
    let first: u8 = ctx.load(0).ok()?;
    let (source, destination, mut protocol, mut offset, mut later) = if first >> 4 == 4 {
        let source: u32 = ctx.load(12).ok()?;
        let destination: u32 = ctx.load(16).ok()?;
        let protocol: u8 = ctx.load(9).ok()?;
        let fragment: u16 = ctx.load(6).ok()?;
        let length = ((first & 0xf) as usize) * 4;
        (
            Ip::v4(source),
            Ip::v4(destination),
            protocol,
            length,
            u16::from_be(fragment) & 0x1fff != 0,
        )
    } else {
        let source: [u32; 4] = ctx.load(8).ok()?;
        let destination: [u32; 4] = ctx.load(24).ok()?;
        let protocol: u8 = ctx.load(6).ok()?;
        (Ip(source), Ip(destination), protocol, 40, false)
    };
    if first >> 4 == 6 {
        let mut i = 0;
        while i < MAX_EXTENSIONS {
            match protocol {
                // Hop-by-hop, routing, destination options: length in 8-octet units.
                0 | 43 | 60 => {
                    protocol = ctx.load(offset).ok()?;
                    let length: u8 = ctx.load(offset + 1).ok()?;
                    offset += (length as usize + 1) * 8;
                }
                // Fragment.
                44 => {
                    let next: u8 = ctx.load(offset).ok()?;
                    let fragment: u16 = ctx.load(offset + 2).ok()?;
                    protocol = next;
                    later = later || u16::from_be(fragment) & 0xfff8 != 0;
                    offset += 8;
                }
                _ => break,
            }
            i += 1;
        }
    }
    let mut packet =
        Packet { source, destination, source_port: 0, destination_port: 0, protocol, flags: 0 };
    if later {
        // Of a later fragment nothing is known; the first one was judged, and without it
        // the rest never becomes a datagram.
        packet.protocol = LATER_FRAGMENT;
        return Some(packet);
    }
    if protocol == proto::TCP || protocol == proto::UDP {
        packet.source_port = u16::from_be(ctx.load(offset).ok()?);
        packet.destination_port = u16::from_be(ctx.load(offset + 2).ok()?);
        if protocol == proto::TCP {
            packet.flags = ctx.load(offset + 13).ok()?;
        }
    }
    Some(packet)
}

/// Not a protocol number that IANA assigns.
const LATER_FRAGMENT: u8 = 255;

#[inline(always)]
fn filter(ctx: &SkBuffContext, ingress: bool) -> i32 {
    // What cannot be parsed cannot be a flow that the stack would accept.
    let Some(packet) = parse(ctx) else { return DROP };
    let tcp = packet.protocol == proto::TCP;
    let later = tcp && packet.flags & (TCP_SYN | TCP_ACK) != TCP_SYN;
    // TCP is decided on its first packet only; what comes later goes on, unless the flow
    // lost its right and its sockets could not be destroyed.
    if later && has(feature::SOCK_DESTROY) {
        return PASS;
    }
    if packet.protocol == LATER_FRAGMENT {
        return PASS;
    }
    let skb = ctx.skb.skb;
    let task_netns = task::netns_of_packet(skb);
    let netns = if has(feature::SKB_NETNS_COOKIE) {
        // SAFETY: the context has this helper on kernels with the feature bit.
        unsafe { bpf_get_netns_cookie(ctx.as_ptr()) }
    } else {
        // The cgroup names the pod. One that is not registered has none: 0.
        task_netns
    };
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
        Action::Tunnel if !ingress => DROP,
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
    let mut known = false;
    if let Some(tracked) = UDP_FLOWS.get_ptr_mut(&key) {
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
        let _ = UDP_FLOWS.remove(&key);
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
    if UDP_FLOWS.insert(&key, &entry, 0).is_err() {
        count(counter::UDP_FULL);
        // Without an entry its answers would be judged as new flows.
        return if decision.mode.is_enforced() { DROP } else { PASS };
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
