//! The raw guard's verdict on a frame that leaves a pod by its veth (DESIGN §5): pure, the
//! same code in the program and in tests.
//!
//! The hooks at the socket layer judge every socket of a pod, but not a packet socket
//! (`AF_PACKET`), which writes frames past them, nor a sender that forges addresses. So a
//! frame passes the host's end of the veth only where it belongs to a flow that those hooks
//! let through, or answers what arrived, or keeps the link alive under the pod's own
//! addresses. Everything else drops.

use crate::abi::{FlowKey, FragmentKey, Ip, proto};

/// What the guard reads; the program answers from BPF maps, tests from hash sets.
pub trait GuardMaps {
    /// True when `ip` is one of the pod's own addresses, link-local ones included.
    fn is_own(&self, netns: u64, ip: Ip) -> bool;
    /// True for a flow that a socket of the pod, or of the agent for it, was let through with.
    fn has_flow(&self, key: &FlowKey) -> bool;
    /// True when a packet of this flow arrived a short while ago.
    fn has_arrived(&self, key: &FlowKey) -> bool;
    /// True when the first fragment of this datagram passed.
    fn has_fragment(&self, key: &FragmentKey) -> bool;
}

/// What kind of frame it is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    /// IPv4 or IPv6.
    Ip,
    /// ARP: source and destination are the sender's and the target's protocol addresses.
    Arp,
    /// Anything else, also what is cut short.
    Other,
}

/// A frame's headers, as far as the guard reads them. Absent fields are 0.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Frame {
    /// What it is.
    pub kind: Kind,
    /// Sender.
    pub source: Ip,
    /// Receiver.
    pub destination: Ip,
    /// TCP's or UDP's.
    pub source_port: u16,
    /// TCP's or UDP's.
    pub destination_port: u16,
    /// IP protocol behind all extension headers.
    pub protocol: u8,
    /// TCP's flags, or the type of an ICMP or ICMPv6 message.
    pub detail: u8,
    /// A fragment, but not the datagram's first.
    pub later_fragment: bool,
    /// The first of several fragments.
    pub first_fragment: bool,
    /// Identification of the datagram, as it stands in the header.
    pub fragment_id: u32,
    /// Neighbour advertisement: whose address it tells. ICMP error: whose address the quoted
    /// packet was sent to, that is, the pod's.
    pub target: Ip,
    /// ICMP error: the quoted packet's protocol, 0 when it is not one that the receiver of the
    /// error sent. The ports are then the pod's and the receiver's.
    pub quoted_protocol: u8,
}

/// What becomes of a frame.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum FrameVerdict {
    /// It passes.
    Pass,
    /// It passes, and later fragments of the datagram with it.
    PassFirst,
    /// It claims an address that is not the pod's.
    Spoofed,
    /// No socket of the pod was let through with it.
    Unattested,
}

/// TCP flag bits.
pub mod tcp {
    /// SYN.
    pub const SYN: u8 = 0x02;
    /// RST.
    pub const RST: u8 = 0x04;
    /// ACK.
    pub const ACK: u8 = 0x10;
}

/// IP protocol numbers besides TCP and UDP.
mod number {
    pub(super) const ICMP: u8 = 1;
    pub(super) const IGMP: u8 = 2;
    pub(super) const ICMPV6: u8 = 58;
}

/// True for an ICMP or ICMPv6 message that quotes the packet which it answers.
#[inline(always)]
pub const fn is_icmp_error(protocol: u8, detail: u8) -> bool {
    match protocol {
        // Unreachable, source quench, time exceeded, parameter problem; never redirects.
        number::ICMP => matches!(detail, 3 | 4 | 11 | 12),
        number::ICMPV6 => matches!(detail, 1..=4),
        _ => false,
    }
}

/// True for a neighbour advertisement.
#[inline(always)]
pub const fn is_neighbour_advertisement(protocol: u8, detail: u8) -> bool {
    protocol == number::ICMPV6 && detail == 136
}

/// Judges a frame that leaves the pod of the network namespace `netns`.
#[inline(always)]
pub fn judge_frame<M: GuardMaps>(maps: &M, netns: u64, frame: &Frame) -> FrameVerdict {
    if matches!(frame.kind, Kind::Other) {
        return FrameVerdict::Unattested;
    }
    let unspecified = is_unspecified(frame.source);
    if !unspecified && !maps.is_own(netns, frame.source) {
        return FrameVerdict::Spoofed;
    }
    if matches!(frame.kind, Kind::Arp) {
        return FrameVerdict::Pass;
    }
    if frame.later_fragment {
        let key = fragment_of(netns, frame);
        return passes(maps.has_fragment(&key));
    }
    if keeps_link_alive(frame) {
        return FrameVerdict::Pass;
    }
    if is_neighbour_advertisement(frame.protocol, frame.detail) {
        let own = maps.is_own(netns, frame.target);
        return if own { FrameVerdict::Pass } else { FrameVerdict::Spoofed };
    }
    if unspecified {
        return FrameVerdict::Spoofed;
    }
    let mut key = flow_of(netns, frame);
    if is_icmp_error(frame.protocol, frame.detail) {
        // It goes to whoever sent what it answers, and to nobody else.
        key.local = frame.target;
        key.family = frame.quoted_protocol as u32;
        let answers = key.family != 0 && (maps.has_arrived(&key) || maps.has_flow(&key));
        return passes(answers);
    }
    let mut passed = maps.has_flow(&key) || (answers_by_itself(frame) && maps.has_arrived(&key));
    if !passed {
        // A network namespace inside the pod, whose packets the pod itself forwards.
        forward(&mut key);
        passed = maps.has_flow(&key);
    }
    if passed && frame.first_fragment {
        return FrameVerdict::PassFirst;
    }
    passes(passed)
}

#[inline(always)]
const fn passes(yes: bool) -> FrameVerdict {
    if yes { FrameVerdict::Pass } else { FrameVerdict::Unattested }
}

#[inline(always)]
const fn is_unspecified(ip: Ip) -> bool {
    ip.0[3] == 0 && (ip.is_v4() || (ip.0[0] == 0 && ip.0[1] == 0 && ip.0[2] == 0))
}

/// What the kernel, or a DHCP client over a packet socket, sends for the link itself: to its
/// groups, which no router forwards. Only neighbours are also asked one by one.
#[inline(always)]
const fn keeps_link_alive(frame: &Frame) -> bool {
    match frame.protocol {
        number::IGMP => frame.source.is_v4() && is_link_group(frame.destination),
        // Multicast listeners and router solicitations.
        number::ICMPV6 if matches!(frame.detail, 131 | 132 | 143 | 133) => {
            is_link_group(frame.destination)
        }
        number::ICMPV6 => frame.detail == 135,
        proto::UDP => {
            ((frame.source_port == 68 && frame.destination_port == 67)
                || (frame.source_port == 546 && frame.destination_port == 547))
                && is_link_group(frame.destination)
        }
        _ => false,
    }
}

/// True for the limited broadcast, for `224.0.0.0/4` and for `ff02::/16`.
#[inline(always)]
const fn is_link_group(ip: Ip) -> bool {
    if ip.is_v4() {
        ip.0[3] == u32::MAX || ip.0[3].to_ne_bytes()[0] & 0xf0 == 0xe0
    } else {
        let first = ip.0[0].to_ne_bytes();
        first[0] == 0xff && first[1] == 0x02
    }
}

/// What the kernel sends without a socket: a reset, the answer to a SYN (whose socket does
/// not exist yet), the answer to an echo request.
#[inline(always)]
const fn answers_by_itself(frame: &Frame) -> bool {
    match frame.protocol {
        proto::TCP => {
            frame.detail & tcp::RST != 0
                || frame.detail & (tcp::SYN | tcp::ACK) == tcp::SYN | tcp::ACK
        }
        number::ICMP => frame.detail == 0,
        number::ICMPV6 => frame.detail == 129,
        _ => false,
    }
}

/// True for what the guard remembers of the packets that arrive: whatever the pod's kernel
/// may answer without a socket.
#[inline(always)]
pub const fn may_be_answered(protocol: u8, detail: u8) -> bool {
    match protocol {
        proto::TCP | proto::UDP => true,
        number::ICMP => detail == 8,
        number::ICMPV6 => detail == 128,
        _ => false,
    }
}

/// The flow of a frame that leaves the pod.
#[inline(always)]
pub const fn flow_of(netns: u64, frame: &Frame) -> FlowKey {
    FlowKey {
        netns,
        local: frame.source,
        remote: frame.destination,
        local_port: frame.source_port,
        remote_port: frame.destination_port,
        family: frame.protocol as u32,
    }
}

/// Makes it the same flow under whatever address and port the pod gives it when it forwards
/// it.
#[inline(always)]
pub const fn forward(key: &mut FlowKey) {
    key.local = Ip::UNSPECIFIED;
    key.local_port = 0;
}

/// The datagram that a fragment is of.
#[inline(always)]
pub const fn fragment_of(netns: u64, frame: &Frame) -> FragmentKey {
    FragmentKey {
        netns,
        source: frame.source,
        destination: frame.destination,
        id: frame.fragment_id,
        pad: 0,
    }
}
