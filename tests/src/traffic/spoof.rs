//! IPv4 packets with a forged source, through a raw socket with its own IP header.

use std::net::{SocketAddr, SocketAddrV4};

use anyhow::{Result, bail};
use socket2::{Domain, Protocol, Socket, Type};

use super::{emit, outcome::failed, reports::SpoofReport, roles::Spoof};

const TCP: u8 = 6;
const UDP: u8 = 17;
/// IPPROTO_RAW.
const RAW: i32 = 255;

pub(super) fn play(role: &Spoof) -> Result<()> {
    let (SocketAddr::V4(from), SocketAddr::V4(to)) = (role.from, role.to) else {
        bail!("forged packets are IPv4 only")
    };
    let mut report = SpoofReport::default();
    let mut fail = |failure: String| *report.failures.entry(failure).or_default() += 1;
    // IPPROTO_RAW implies IP_HDRINCL.
    match Socket::new(Domain::IPV4, Type::RAW, Some(Protocol::from(RAW))) {
        Ok(socket) => {
            for _ in 0..role.count {
                match socket.send_to(&packet(role, from, to), &role.to.into()) {
                    Ok(_) => report.sent += 1,
                    Err(error) => fail(failed("send", &error)),
                }
            }
        }
        Err(error) => fail(failed("socket", &error)),
    }
    emit("report", &report);
    Ok(())
}

fn packet(role: &Spoof, from: SocketAddrV4, to: SocketAddrV4) -> Vec<u8> {
    let (protocol, segment) =
        if role.udp { (UDP, udp(role.text.as_bytes(), from, to)) } else { (TCP, syn(from, to)) };
    // The kernel fills in length, identification and header checksum.
    let mut packet = vec![0x45, 0, 0, 0, 0, 0, 0, 0, 64, protocol, 0, 0];
    packet.extend(from.ip().octets());
    packet.extend(to.ip().octets());
    packet.extend(segment);
    packet
}

fn syn(from: SocketAddrV4, to: SocketAddrV4) -> Vec<u8> {
    let mut segment = Vec::new();
    segment.extend(from.port().to_be_bytes());
    segment.extend(to.port().to_be_bytes());
    segment.extend([0, 0, 0, 1, 0, 0, 0, 0, 0x50, 0x02, 0xff, 0xff, 0, 0, 0, 0]);
    checksummed(segment, 16, TCP, from, to)
}

fn udp(payload: &[u8], from: SocketAddrV4, to: SocketAddrV4) -> Vec<u8> {
    let mut segment = Vec::new();
    segment.extend(from.port().to_be_bytes());
    segment.extend(to.port().to_be_bytes());
    segment.extend((8 + payload.len() as u16).to_be_bytes());
    segment.extend([0, 0]);
    segment.extend(payload);
    checksummed(segment, 6, UDP, from, to)
}

/// Fills in the checksum at `at`, over the pseudo header and the segment (RFC 9293, 3.1).
fn checksummed(
    mut segment: Vec<u8>,
    at: usize,
    protocol: u8,
    from: SocketAddrV4,
    to: SocketAddrV4,
) -> Vec<u8> {
    let mut all = Vec::new();
    all.extend(from.ip().octets());
    all.extend(to.ip().octets());
    all.extend([0, protocol]);
    all.extend((segment.len() as u16).to_be_bytes());
    all.extend(&segment);
    if all.len() % 2 == 1 {
        all.push(0);
    }
    let mut sum: u32 =
        all.chunks_exact(2).map(|w| u32::from(u16::from_be_bytes([w[0], w[1]]))).sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    segment[at..at + 2].copy_from_slice(&(!(sum as u16)).to_be_bytes());
    segment
}
