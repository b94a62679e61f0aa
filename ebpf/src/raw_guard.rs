//! tc at the host's end of an enforced pod's veth (tcx 6.6, else clsact): what leaves the
//! pod must belong to a flow that the hooks at its sockets let through.
//!
//! Ingress of that device is what the pod sends. Egress, what it receives, is only noted:
//! the pod's kernel answers some packets without a socket.
#![no_std]
#![no_main]
#![feature(core_intrinsics)]
#![allow(internal_features, reason = "atomic_xadd is the one atomic that every BPF kernel has")]

#[allow(dead_code, reason = "the other objects' programs use the rest")]
mod maps;
mod packet;

use aya_ebpf::{
    bindings::TC_ACT_SHOT,
    macros::classifier,
    programs::{TcContext, sk_buff::SkBuff},
};
use maps::{
    ADDRESSES, ARRIVED, CONFIG, FRAGMENTS, GUARD_FLOWS, GUARDED, Kernel, TUNNELS, count, now,
    report,
};
use signet_ebpf::{
    abi::{
        ARRIVED_NS, FlowKey, FragmentKey, GUARD_FLOW_NS, IDENTITY_WORLD, Ip, Mode, PodEntry,
        Reason, Verdict, counter, enforcement, hook,
    },
    decide::{Action, Decision, Flow, PolicyMaps},
    guard::{self, Frame, FrameVerdict, GuardMaps, Kind, judge_frame},
};

/// `TCX_NEXT`, `TC_ACT_UNSPEC`: whatever else is attached decides.
const NEXT: i32 = -1;
const DROP: i32 = TC_ACT_SHOT;

/// Length of an Ethernet header without tags.
const LINK: usize = 14;
const IPV4: u16 = 0x0800;
const ARP: u16 = 0x0806;
const IPV6: u16 = 0x86dd;

/// What arrived is noted again when the note is older than this: a note costs more than a look.
const NOTE_AGAIN_NS: u64 = 10_000_000_000;

/// What the pod sends.
#[classifier]
pub fn guard_out(ctx: TcContext) -> i32 {
    let Some((netns, entry)) = guarded_pod(&ctx) else { return NEXT };
    // What cannot be parsed is nobody's flow.
    let frame = parse(&ctx).unwrap_or(packet::EMPTY);
    match judge_frame(&Guard, netns, &frame) {
        FrameVerdict::Pass => NEXT,
        FrameVerdict::PassFirst => {
            let key = guard::fragment_of(netns, &frame);
            // Without room the later fragments drop, and the datagram with them.
            let _ = FRAGMENTS.insert(&key, &now(), 0);
            NEXT
        }
        FrameVerdict::Spoofed => refuse(netns, entry, &frame, Reason::IdentityMismatch),
        FrameVerdict::Unattested => refuse(netns, entry, &frame, Reason::RawPacket),
    }
}

/// What the pod receives: noted where no flow is known, never dropped.
#[classifier]
pub fn guard_in(ctx: TcContext) -> i32 {
    let Some((netns, _)) = guarded_pod(&ctx) else { return NEXT };
    let Some(frame) = parse(&ctx) else { return NEXT };
    if !matches!(frame.kind, Kind::Ip)
        || frame.later_fragment
        || !guard::may_be_answered(frame.protocol, frame.detail)
    {
        return NEXT;
    }
    let key = guard::flow_of(netns, &frame).mirrored();
    if Guard.has_flow(&key) {
        return NEXT;
    }
    let now = now();
    // SAFETY: a time, replaced whole.
    let noted = unsafe { ARRIVED.get(&key) }.copied();
    if noted.is_none_or(|then| now.wrapping_sub(then) > NOTE_AGAIN_NS) {
        let _ = ARRIVED.insert(&key, &now, 0);
    }
    NEXT
}

/// The enforced pod behind this device.
#[inline(always)]
fn guarded_pod(ctx: &TcContext) -> Option<(u64, &'static PodEntry)> {
    // SAFETY: the program's context.
    let interface = unsafe { maps::read(&raw const (*ctx.skb.skb).ifindex) };
    // SAFETY: a number, replaced whole.
    let netns = *unsafe { GUARDED.get(&interface) }?;
    if CONFIG.get(0)?.enforcement != enforcement::ENFORCE {
        return None;
    }
    let entry = Kernel.pod(netns)?;
    Mode::from_u8(entry.mode).is_enforced().then_some((netns, entry))
}

/// The frame; `None` where it is cut short, or of a kind that no pod's socket makes.
#[inline(always)]
fn parse(ctx: &TcContext) -> Option<Frame> {
    let skb: &SkBuff = &ctx.skb;
    // SAFETY: the program's context. A tag is taken off before tc sees the frame.
    if unsafe { maps::read(&raw const (*skb.skb).vlan_present) } != 0 {
        return None;
    }
    let kind: u16 = skb.load(12).ok()?;
    let kind = u16::from_be(kind);
    if kind == ARP {
        // Ethernet and IPv4 only: both lengths are in the header.
        let lengths: u16 = skb.load(LINK + 4).ok()?;
        if u16::from_be(lengths) != 0x0604 {
            return None;
        }
        let source = Ip::v4(skb.load(LINK + 14).ok()?);
        let destination = Ip::v4(skb.load(LINK + 24).ok()?);
        return Some(Frame { kind: Kind::Arp, source, destination, ..packet::EMPTY });
    }
    let version: u8 = skb.load(LINK).ok()?;
    let agrees = (kind == IPV4 && version >> 4 == 4) || (kind == IPV6 && version >> 4 == 6);
    if !agrees {
        return None;
    }
    let (mut frame, transport) = packet::parse(skb, LINK)?;
    if frame.later_fragment {
        return Some(frame);
    }
    if guard::is_neighbour_advertisement(frame.protocol, frame.detail) {
        frame.target = Ip(skb.load(transport + 8).ok()?);
    } else if guard::is_icmp_error(frame.protocol, frame.detail) {
        // Without a quoted flow it is no answer.
        let _ = packet::parse_quoted(skb, transport + 8, &mut frame);
    }
    Some(frame)
}

#[inline(always)]
fn refuse(netns: u64, entry: &PodEntry, frame: &Frame, reason: Reason) -> i32 {
    count(counter::GUARD_DROPPED);
    let flow = Flow {
        netns,
        task_netns: netns,
        local: frame.source,
        remote: frame.destination,
        local_port: frame.source_port,
        remote_port: frame.destination_port,
        protocol: frame.protocol,
        steerable: false,
        now: now(),
    };
    // SAFETY: entries are replaced whole.
    let remote_identity = match unsafe { ADDRESSES.get(&frame.destination) } {
        Some(address) => address.identity,
        None => IDENTITY_WORLD,
    };
    let decision = Decision {
        action: Action::Refuse,
        errno: 0,
        report: true,
        verdict: Verdict::Dropped,
        reason,
        policy: 0,
        remote_identity,
        mode: Mode::from_u8(entry.mode),
        revision: entry.revision,
    };
    report(&flow, &decision, false, hook::GUARD, entry.cgroup);
    DROP
}

/// The maps as the guard's verdict reads them.
struct Guard;

impl GuardMaps for Guard {
    #[inline(always)]
    fn is_own(&self, netns: u64, ip: Ip) -> bool {
        Kernel.is_own(netns, ip)
    }

    #[inline(always)]
    fn has_flow(&self, key: &FlowKey) -> bool {
        // Most of what an enforced pod sends is its tunnels'.
        if TUNNELS.get_ptr(key).is_some() {
            return true;
        }
        // SAFETY: a time, replaced whole.
        match unsafe { GUARD_FLOWS.get(key) } {
            Some(last) => now().wrapping_sub(*last) < GUARD_FLOW_NS,
            None => false,
        }
    }

    #[inline(always)]
    fn has_arrived(&self, key: &FlowKey) -> bool {
        // SAFETY: a time, replaced whole.
        match unsafe { ARRIVED.get(key) } {
            Some(then) => now().wrapping_sub(*then) < ARRIVED_NS,
            None => false,
        }
    }

    #[inline(always)]
    fn has_fragment(&self, key: &FragmentKey) -> bool {
        // SAFETY: as above.
        match unsafe { FRAGMENTS.get(key) } {
            Some(then) => now().wrapping_sub(*then) < ARRIVED_NS,
            None => false,
        }
    }
}

#[cfg(not(test))]
#[panic_handler]
fn panic(_: &core::panic::PanicInfo) -> ! {
    loop {}
}

#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
