//! Parsing of packets, as cgroup_skb (from the network header) and tc (from the link
//! header) see them.

use aya_ebpf::programs::sk_buff::SkBuff;
use signet_ebpf::{
    abi::{Ip, proto},
    guard::{Frame, Kind},
};

/// IPv6 extension headers that are skipped before the transport header.
const MAX_EXTENSIONS: u32 = 4;

/// Nothing known yet.
pub const EMPTY: Frame = Frame {
    kind: Kind::Other,
    source: Ip::UNSPECIFIED,
    destination: Ip::UNSPECIFIED,
    source_port: 0,
    destination_port: 0,
    protocol: 0,
    detail: 0,
    later_fragment: false,
    first_fragment: false,
    fragment_id: 0,
    target: Ip::UNSPECIFIED,
    quoted_protocol: 0,
};

/// Parses network and transport headers that begin at `base`, and tells where the transport
/// header begins; `None` where they are cut short. Of ICMP messages only the type is read.
#[inline(always)]
pub fn parse(skb: &SkBuff, base: usize) -> Option<(Frame, usize)> {
    let mut frame = Frame { kind: Kind::Ip, ..EMPTY };
    let first: u8 = skb.load(base).ok()?;
    let mut offset = base;
    if first >> 4 == 4 {
        frame.source = Ip::v4(skb.load(base + 12).ok()?);
        frame.destination = Ip::v4(skb.load(base + 16).ok()?);
        frame.protocol = skb.load(base + 9).ok()?;
        let id: u16 = skb.load(base + 4).ok()?;
        let fragment: u16 = skb.load(base + 6).ok()?;
        let fragment = u16::from_be(fragment);
        frame.fragment_id = id as u32;
        frame.later_fragment = fragment & 0x1fff != 0;
        frame.first_fragment = fragment & 0x3fff == 0x2000;
        offset += ((first & 0xf) as usize) * 4;
    } else {
        frame.source = Ip(skb.load(base + 8).ok()?);
        frame.destination = Ip(skb.load(base + 24).ok()?);
        frame.protocol = skb.load(base + 6).ok()?;
        offset += 40;
    }
    if first >> 4 == 6 {
        let mut i = 0;
        while i < MAX_EXTENSIONS {
            match frame.protocol {
                // Hop-by-hop, routing, destination options: length in 8-octet units.
                0 | 43 | 60 => {
                    frame.protocol = skb.load(offset).ok()?;
                    let length: u8 = skb.load(offset + 1).ok()?;
                    offset += (length as usize + 1) * 8;
                }
                // Fragment.
                44 => {
                    let next: u8 = skb.load(offset).ok()?;
                    let fragment: u16 = skb.load(offset + 2).ok()?;
                    let fragment = u16::from_be(fragment);
                    frame.fragment_id = skb.load(offset + 4).ok()?;
                    frame.protocol = next;
                    frame.later_fragment = frame.later_fragment || fragment & 0xfff8 != 0;
                    frame.first_fragment = fragment & 0xfff9 == 1;
                    offset += 8;
                    if frame.later_fragment {
                        // What follows is payload, whatever it looks like.
                        break;
                    }
                }
                _ => break,
            }
            i += 1;
        }
    }
    if frame.later_fragment {
        return Some((frame, offset));
    }
    match frame.protocol {
        proto::TCP => {
            frame.detail = skb.load(offset + 13).ok()?;
            (frame.source_port, frame.destination_port) = ports(skb, offset)?;
        }
        proto::UDP => (frame.source_port, frame.destination_port) = ports(skb, offset)?,
        ICMP | ICMPV6 => frame.detail = skb.load(offset).ok()?,
        _ => {}
    }
    Some((frame, offset))
}

const ICMP: u8 = 1;
const ICMPV6: u8 = 58;

/// Source and destination port of a transport header.
#[inline(always)]
fn ports(skb: &SkBuff, offset: usize) -> Option<(u16, u16)> {
    let source: u16 = skb.load(offset).ok()?;
    let destination: u16 = skb.load(offset + 2).ok()?;
    Some((u16::from_be(source), u16::from_be(destination)))
}

/// Reads the packet that begins at `base`, quoted by the ICMP error `frame`: headers without
/// options or extensions. With any, no flow is recognised and the error does not pass.
#[inline(always)]
#[allow(dead_code, reason = "only the guard reads what is quoted")]
pub fn parse_quoted(skb: &SkBuff, base: usize, frame: &mut Frame) -> Option<()> {
    let first: u8 = skb.load(base).ok()?;
    let (sender, protocol, transport): (Ip, u8, usize) = if first == 0x45 {
        frame.target = Ip::v4(skb.load(base + 16).ok()?);
        (Ip::v4(skb.load(base + 12).ok()?), skb.load(base + 9).ok()?, base + 20)
    } else if first >> 4 == 6 {
        frame.target = Ip(skb.load(base + 24).ok()?);
        (Ip(skb.load(base + 8).ok()?), skb.load(base + 6).ok()?, base + 40)
    } else {
        return None;
    };
    if sender != frame.destination {
        return None;
    }
    if protocol == proto::TCP || protocol == proto::UDP {
        (frame.destination_port, frame.source_port) = ports(skb, transport)?;
    }
    frame.quoted_protocol = protocol;
    Some(())
}
