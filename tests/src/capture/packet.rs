//! Ethernet, IPv4, IPv6, TCP and UDP headers of captured frames.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    time::SystemTime,
};

/// An IP packet.
#[derive(Clone, Debug)]
pub struct Packet {
    /// When it was received.
    pub time: SystemTime,
    /// Source address.
    pub source: IpAddr,
    /// Destination address.
    pub destination: IpAddr,
    /// What it carries.
    pub transport: Transport,
    payload: Vec<u8>,
}

/// The transport header.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Transport {
    /// A TCP segment.
    Tcp {
        /// Source port.
        source: u16,
        /// Destination port.
        destination: u16,
        /// Sequence number of its first byte.
        sequence: u32,
        /// Flag bits (FIN 1, SYN 2, RST 4, ACK 16).
        flags: u8,
    },
    /// A UDP datagram.
    Udp {
        /// Source port.
        source: u16,
        /// Destination port.
        destination: u16,
    },
    /// Another protocol, or a later fragment: the payload is the whole IP payload.
    Other(u8),
}

const TCP: u8 = 6;
const UDP: u8 = 17;

impl Packet {
    /// Parses an Ethernet frame; `None` for what is not IP or is cut short.
    pub fn parse(time: SystemTime, frame: &[u8]) -> Option<Self> {
        let ip = frame.get(14..)?;
        match u16::from_be_bytes([*frame.get(12)?, *frame.get(13)?]) {
            0x0800 => Self::parse_v4(time, ip),
            0x86dd => Self::parse_v6(time, ip),
            _ => None,
        }
    }

    fn parse_v4(time: SystemTime, ip: &[u8]) -> Option<Self> {
        let header = ip.get(..20)?;
        let length = usize::from(header[0] & 0x0f) * 4;
        let total = usize::from(u16::from_be_bytes([header[2], header[3]]));
        // GSO packets longer than the field can say carry 0.
        let end = if total == 0 { ip.len() } else { total.min(ip.len()) };
        let source = Ipv4Addr::from(<[u8; 4]>::try_from(&header[12..16]).ok()?);
        let destination = Ipv4Addr::from(<[u8; 4]>::try_from(&header[16..20]).ok()?);
        let fragment_offset = u16::from_be_bytes([header[6], header[7]]) & 0x1fff;
        let protocol = header[9];
        let body = ip.get(length..end)?;
        Some(Self::with_transport(
            time,
            source.into(),
            destination.into(),
            protocol,
            fragment_offset != 0,
            body,
        ))
    }

    fn parse_v6(time: SystemTime, ip: &[u8]) -> Option<Self> {
        let header = ip.get(..40)?;
        let source = Ipv6Addr::from(<[u8; 16]>::try_from(&header[8..24]).ok()?);
        let destination = Ipv6Addr::from(<[u8; 16]>::try_from(&header[24..40]).ok()?);
        let length = usize::from(u16::from_be_bytes([header[4], header[5]]));
        let end = if length == 0 { ip.len() } else { (40 + length).min(ip.len()) };
        let mut body = ip.get(40..end)?;
        let mut next = header[6];
        let mut later_fragment = false;
        // Extension headers: hop-by-hop, routing, destination options; fragment.
        loop {
            match next {
                0 | 43 | 60 => {
                    let skip = (usize::from(*body.get(1)?) + 1) * 8;
                    next = *body.first()?;
                    body = body.get(skip..)?;
                }
                44 => {
                    later_fragment = u16::from_be_bytes([*body.get(2)?, *body.get(3)?]) >> 3 != 0;
                    next = *body.first()?;
                    body = body.get(8..)?;
                }
                _ => break,
            }
        }
        Some(Self::with_transport(
            time,
            source.into(),
            destination.into(),
            next,
            later_fragment,
            body,
        ))
    }

    fn with_transport(
        time: SystemTime,
        source: IpAddr,
        destination: IpAddr,
        protocol: u8,
        later_fragment: bool,
        body: &[u8],
    ) -> Self {
        let (transport, payload) = if later_fragment {
            None
        } else {
            match protocol {
                TCP => tcp(body),
                UDP => udp(body),
                _ => None,
            }
        }
        .unwrap_or((Transport::Other(protocol), body));
        Self { time, source, destination, transport, payload: payload.to_vec() }
    }

    /// Source address and port (0 when it has none).
    pub fn from(&self) -> (IpAddr, u16) {
        let port = match self.transport {
            Transport::Tcp { source, .. } | Transport::Udp { source, .. } => source,
            Transport::Other(_) => 0,
        };
        (self.source, port)
    }

    /// Destination address and port (0 when it has none).
    pub fn to(&self) -> (IpAddr, u16) {
        let port = match self.transport {
            Transport::Tcp { destination, .. } | Transport::Udp { destination, .. } => destination,
            Transport::Other(_) => 0,
        };
        (self.destination, port)
    }

    /// What follows the transport header.
    pub fn payload(&self) -> &[u8] {
        &self.payload
    }

    /// `tcp`, `udp` or `ip`.
    pub fn protocol_name(&self) -> &'static str {
        match self.transport {
            Transport::Tcp { .. } => "tcp",
            Transport::Udp { .. } => "udp",
            Transport::Other(_) => "ip",
        }
    }
}

fn tcp(body: &[u8]) -> Option<(Transport, &[u8])> {
    let header = body.get(..20)?;
    let length = usize::from(header[12] >> 4) * 4;
    Some((
        Transport::Tcp {
            source: u16::from_be_bytes([header[0], header[1]]),
            destination: u16::from_be_bytes([header[2], header[3]]),
            sequence: u32::from_be_bytes([header[4], header[5], header[6], header[7]]),
            flags: header[13],
        },
        body.get(length..)?,
    ))
}

fn udp(body: &[u8]) -> Option<(Transport, &[u8])> {
    let header = body.get(..8)?;
    Some((
        Transport::Udp {
            source: u16::from_be_bytes([header[0], header[1]]),
            destination: u16::from_be_bytes([header[2], header[3]]),
        },
        &body[8..],
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ethernet(kind: u16, ip: &[u8]) -> Vec<u8> {
        let mut frame = vec![0; 12];
        frame.extend(kind.to_be_bytes());
        frame.extend(ip);
        frame
    }

    #[test]
    fn reads_tcp_over_ipv4_without_ethernet_padding() {
        let mut ip = vec![0x45, 0, 0, 42, 0, 0, 0, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2];
        ip.extend([0x1f, 0x90, 0x00, 0x50, 0, 0, 0, 9, 0, 0, 0, 0, 0x50, 0x18, 0, 0, 0, 0, 0, 0]);
        ip.extend(b"hi");
        ip.extend([0; 6]);
        let packet = Packet::parse(SystemTime::UNIX_EPOCH, &ethernet(0x0800, &ip)).unwrap();
        assert_eq!(packet.from(), ("10.0.0.1".parse().unwrap(), 8080));
        assert_eq!(packet.to(), ("10.0.0.2".parse().unwrap(), 80));
        assert_eq!(packet.payload(), b"hi");
        assert!(matches!(packet.transport, Transport::Tcp { sequence: 9, flags: 0x18, .. }));
    }

    #[test]
    fn reads_udp_behind_an_ipv6_extension_header() {
        let mut ip = vec![0x60, 0, 0, 0, 0, 19, 0, 64];
        ip.extend(Ipv6Addr::LOCALHOST.octets());
        ip.extend(Ipv6Addr::UNSPECIFIED.octets());
        ip.extend([17, 0, 0, 0, 0, 0, 0, 0]);
        ip.extend([0, 53, 1, 0, 0, 11, 0, 0]);
        ip.extend(b"dns");
        let packet = Packet::parse(SystemTime::UNIX_EPOCH, &ethernet(0x86dd, &ip)).unwrap();
        assert_eq!(packet.transport, Transport::Udp { source: 53, destination: 256 });
        assert_eq!(packet.payload(), b"dns");
    }

    #[test]
    fn cut_frames_are_not_packets() {
        let ip = [0x45, 0, 0, 42, 0, 0, 0, 0, 64, 6];
        assert!(Packet::parse(SystemTime::UNIX_EPOCH, &ethernet(0x0800, &ip)).is_none());
        assert!(Packet::parse(SystemTime::UNIX_EPOCH, &[]).is_none());
    }
}
