//! The frames of `signet/1`: what they look like, and nothing else. `docs/wire.md` is their
//! specification and has the vectors that the tests here hold.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use signet_ebpf::abi::Reason;
use uuid::Uuid;

use crate::{policy::model::PolicyName, telemetry::reason, tunnel::hbone::head};

/// Length of a frame's header, bytes: its kind and a length of three bytes.
pub const HEADER: usize = 4;
/// Longest payload of DATA, bytes.
pub const LARGEST_DATA: usize = 256 << 10;
/// Longest payload of OPEN, bytes.
pub const LARGEST_OPEN: usize = 4 << 10;
/// Longest payload of STATUS, bytes.
const LARGEST_STATUS: usize = 1 << 10;
/// Longest payload of RESET, bytes.
const LARGEST_RESET: usize = 64;

/// The version of OPEN that is written and read here.
const VERSION: u8 = 1;
/// STATUS: the flow is let through.
const ACCEPTED: u8 = 0;
/// STATUS: the flow is refused.
const REFUSED: u8 = 1;

/// What a frame is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum Kind {
    /// Client: asks for a flow.
    Open = 1,
    /// Both: bytes of the flow.
    Data = 2,
    /// Both: this direction of the flow has ended.
    Fin = 3,
    /// Both: the flow is reset, and the connection ends with it.
    Reset = 4,
    /// Server: what becomes of the flow that was asked for.
    Status = 5,
    /// Server: no further flow on this connection.
    Close = 6,
}

/// Why bytes are no frame.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FrameError {
    /// No such kind.
    #[error("a frame of the unknown kind {0}")]
    Kind(u8),
    /// Longer or shorter than its kind may be.
    #[error("a {kind:?} frame of {length} bytes")]
    Length {
        /// Its kind.
        kind: Kind,
        /// Its length.
        length: usize,
    },
    /// OPEN of another version.
    #[error("an OPEN of version {0}; this agent speaks version {VERSION}")]
    Version(u8),
    /// The payload says nothing.
    #[error("a malformed {0:?} frame: {1}")]
    Malformed(Kind, &'static str),
}

/// A frame's beginning.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Header {
    /// What follows.
    pub kind: Kind,
    /// How many bytes of it, within the kind's limits.
    pub length: usize,
}

impl Header {
    /// Reads a header.
    pub fn parse(bytes: [u8; HEADER]) -> Result<Self, FrameError> {
        let [kind, high, middle, low] = bytes;
        let length = usize::from(high) << 16 | usize::from(middle) << 8 | usize::from(low);
        let (kind, lengths) = match kind {
            1 => (Kind::Open, 1..=LARGEST_OPEN),
            2 => (Kind::Data, 1..=LARGEST_DATA),
            3 => (Kind::Fin, 0..=0),
            4 => (Kind::Reset, 0..=LARGEST_RESET),
            5 => (Kind::Status, 1..=LARGEST_STATUS),
            6 => (Kind::Close, 0..=0),
            other => return Err(FrameError::Kind(other)),
        };
        if !lengths.contains(&length) {
            return Err(FrameError::Length { kind, length });
        }
        Ok(Self { kind, length })
    }

    /// The header as it is sent.
    pub fn encode(self) -> [u8; HEADER] {
        // Lengths are within their kinds' limits, which fit three bytes.
        let [.., high, middle, low] = self.length.to_be_bytes();
        [self.kind as u8, high, middle, low]
    }
}

/// What a client asks for.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Open {
    /// The application's address.
    pub destination: SocketAddr,
    /// The port of the client's application. Its address is the tunnel's own peer.
    pub client_port: Option<u16>,
    /// The flow's uuid.
    pub flow: Option<Uuid>,
}

impl Open {
    /// Appends the whole frame.
    pub fn encode(&self, out: &mut Vec<u8>) {
        let start = out.len();
        out.extend([Kind::Open as u8, 0, 0, 0, VERSION]);
        match self.destination.ip() {
            IpAddr::V4(ip) => {
                out.push(4);
                out.extend(ip.octets());
            }
            IpAddr::V6(ip) => {
                out.push(6);
                out.extend(ip.octets());
            }
        }
        out.extend(self.destination.port().to_be_bytes());
        out.extend(self.client_port.unwrap_or(0).to_be_bytes());
        out.extend(self.flow.unwrap_or(Uuid::nil()).as_bytes());
        finish(out, start, Kind::Open);
    }

    /// Reads a payload. Extensions that are not known are passed over.
    pub fn parse(payload: &[u8]) -> Result<Self, FrameError> {
        let malformed = |what| FrameError::Malformed(Kind::Open, what);
        let mut rest = payload;
        let [version] = take(&mut rest).ok_or(malformed("empty"))?;
        if version != VERSION {
            return Err(FrameError::Version(version));
        }
        let short = malformed("too short");
        let [family] = take(&mut rest).ok_or(short.clone())?;
        let ip = match family {
            4 => IpAddr::from(Ipv4Addr::from(take::<4>(&mut rest).ok_or(short.clone())?)),
            6 => IpAddr::from(Ipv6Addr::from(take::<16>(&mut rest).ok_or(short.clone())?)),
            _ => return Err(malformed("no such address family")),
        };
        if matches!(ip, IpAddr::V6(v6) if v6.to_ipv4_mapped().is_some()) {
            return Err(malformed("an IPv4 address written as IPv6"));
        }
        let port = u16::from_be_bytes(take(&mut rest).ok_or(short.clone())?);
        if port == 0 {
            return Err(malformed("port 0"));
        }
        let client_port = u16::from_be_bytes(take(&mut rest).ok_or(short.clone())?);
        let flow = Uuid::from_bytes(take(&mut rest).ok_or(short)?);
        while !rest.is_empty() {
            let cut = malformed("an extension that is cut off");
            let [_kind] = take(&mut rest).ok_or(cut.clone())?;
            let length = u16::from_be_bytes(take(&mut rest).ok_or(cut.clone())?);
            rest = rest.get(usize::from(length)..).ok_or(cut)?;
        }
        Ok(Self {
            destination: SocketAddr::new(ip, port),
            client_port: (client_port != 0).then_some(client_port),
            flow: (!flow.is_nil()).then_some(flow),
        })
    }
}

/// What a server answers.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Status {
    /// The application has accepted.
    Accepted,
    /// The flow is refused.
    Refused {
        /// Why; never [`Reason::Allowed`].
        reason: Reason,
        /// The policy that refused, when there is one and the peer may know it.
        policy: Option<PolicyName>,
    },
}

impl Status {
    /// Appends the whole frame.
    pub fn encode(&self, out: &mut Vec<u8>) {
        let start = out.len();
        out.extend([Kind::Status as u8, 0, 0, 0]);
        match self {
            Self::Accepted => out.push(ACCEPTED),
            Self::Refused { reason, policy } => {
                let name = reason::name(*reason);
                // Names are words of at most some dozen letters.
                out.extend([REFUSED, u8::try_from(name.len()).unwrap_or(0)]);
                out.extend(name.bytes());
                let text = policy.as_ref().map(head::policy_text);
                let text = text.filter(|text| text.len() <= head::POLICY_MAX);
                out.extend(text.iter().flat_map(|text| text.bytes()));
            }
        }
        finish(out, start, Kind::Status);
    }

    /// Reads a payload. A peer that refuses for `allowed`, or for nothing that we know, gets
    /// `protocol_error`.
    pub fn parse(payload: &[u8]) -> Result<Self, FrameError> {
        let malformed = |what| FrameError::Malformed(Kind::Status, what);
        let mut rest = payload;
        match take(&mut rest) {
            Some([ACCEPTED]) if rest.is_empty() => Ok(Self::Accepted),
            Some([REFUSED]) => {
                let [length] = take(&mut rest).ok_or(malformed("no reason"))?;
                let length = usize::from(length);
                let name = rest.get(..length).ok_or(malformed("a reason that is cut off"))?;
                let policy = rest.get(length..).and_then(|text| std::str::from_utf8(text).ok());
                Ok(Self::Refused {
                    reason: parse_reason(name).unwrap_or(Reason::ProtocolError),
                    policy: policy.and_then(head::parse_policy),
                })
            }
            _ => Err(malformed("no such verdict")),
        }
    }
}

/// Appends a FIN frame.
pub fn encode_fin(out: &mut Vec<u8>) {
    out.extend(Header { kind: Kind::Fin, length: 0 }.encode());
}

/// Appends a CLOSE frame.
pub fn encode_close(out: &mut Vec<u8>) {
    out.extend(Header { kind: Kind::Close, length: 0 }.encode());
}

/// Appends a RESET frame: with the reason of the agent that ended the flow, without one where
/// an application's reset is passed on.
pub fn encode_reset(reason: Option<Reason>, out: &mut Vec<u8>) {
    let start = out.len();
    out.extend([Kind::Reset as u8, 0, 0, 0]);
    out.extend(reason.map_or("", reason::name).bytes());
    finish(out, start, Kind::Reset);
}

/// Reads a RESET's payload.
pub fn parse_reset(payload: &[u8]) -> Option<Reason> {
    parse_reason(payload)
}

/// A reason's name as a peer wrote it.
fn parse_reason(name: &[u8]) -> Option<Reason> {
    let reason = reason::parse(std::str::from_utf8(name).ok()?)?;
    (reason != Reason::Allowed).then_some(reason)
}

/// Writes the header of the frame that begins at `start`.
fn finish(out: &mut [u8], start: usize, kind: Kind) {
    let length = out.len() - start - HEADER;
    out[start..start + HEADER].copy_from_slice(&Header { kind, length }.encode());
}

/// Takes `N` bytes off the front.
fn take<const N: usize>(rest: &mut &[u8]) -> Option<[u8; N]> {
    let (first, others) = rest.split_first_chunk::<N>()?;
    *rest = others;
    Some(*first)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn open() -> Open {
        Open {
            destination: "10.0.2.7:8080".parse().unwrap(),
            client_port: Some(41872),
            flow: Some(Uuid::from_u128(0x1234_5678_9abc_4def_8123_4567_89ab_cdef)),
        }
    }

    fn refused() -> Status {
        let policy = PolicyName {
            kind: "IdentityPolicy".into(),
            namespace: "shop".into(),
            name: "payments-callers".into(),
        };
        Status::Refused { reason: Reason::PolicyNoMatch, policy: Some(policy) }
    }

    /// The frames of the specification, by the names they have there.
    fn vectors() -> Vec<(&'static str, Vec<u8>)> {
        let six =
            Open { destination: "[fd00::7]:80".parse().unwrap(), client_port: None, flow: None };
        let mut data = Header { kind: Kind::Data, length: 5 }.encode().to_vec();
        data.extend(b"hello");
        let bytes = |encode: &dyn Fn(&mut Vec<u8>)| {
            let mut out = Vec::new();
            encode(&mut out);
            out
        };
        vec![
            ("OPEN, IPv4", bytes(&|out| open().encode(out))),
            ("OPEN, IPv6, nothing optional", bytes(&|out| six.encode(out))),
            ("DATA", data),
            ("FIN", bytes(&encode_fin)),
            ("RESET, an application's", bytes(&|out| encode_reset(None, out))),
            ("RESET, the agent's", bytes(&|out| encode_reset(Some(Reason::RightWithdrawn), out))),
            ("STATUS, accepted", bytes(&|out| Status::Accepted.encode(out))),
            ("STATUS, refused", bytes(&|out| refused().encode(out))),
            ("CLOSE", bytes(&encode_close)),
        ]
    }

    #[test]
    fn the_specification_has_these_vectors() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/wire.md");
        let page = std::fs::read_to_string(path).unwrap();
        for (name, bytes) in vectors() {
            let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
            let row = format!("| {name} | `{hex}` |");
            assert!(page.contains(&row), "docs/wire.md lacks the row\n{row}");
        }
    }

    #[test]
    fn frames_read_back_as_they_were_written() {
        for (name, bytes) in vectors() {
            let header = Header::parse(bytes[..HEADER].try_into().unwrap()).unwrap();
            assert_eq!(header.length, bytes.len() - HEADER, "{name}");
            assert_eq!(header.encode(), bytes[..HEADER], "{name}");
        }
        let mut bytes = Vec::new();
        open().encode(&mut bytes);
        assert_eq!(Open::parse(&bytes[HEADER..]), Ok(open()));
        bytes.clear();
        refused().encode(&mut bytes);
        assert_eq!(Status::parse(&bytes[HEADER..]), Ok(refused()));
        bytes.clear();
        encode_reset(Some(Reason::Draining), &mut bytes);
        assert_eq!(parse_reset(&bytes[HEADER..]), Some(Reason::Draining));
        assert_eq!(parse_reset(b""), None);
    }

    #[test]
    fn lengths_and_kinds_have_limits() {
        let header = |kind: u8, length: usize| {
            let [.., high, middle, low] = length.to_be_bytes();
            Header::parse([kind, high, middle, low])
        };
        assert!(header(2, LARGEST_DATA).is_ok());
        for (kind, length) in
            [(1, 0), (1, LARGEST_OPEN + 1), (2, 0), (2, LARGEST_DATA + 1), (3, 1), (4, 65), (6, 1)]
        {
            assert!(matches!(header(kind, length), Err(FrameError::Length { .. })), "{kind}");
        }
        assert_eq!(header(0, 0), Err(FrameError::Kind(0)));
        assert_eq!(header(b'P', 0), Err(FrameError::Kind(b'P')));
    }

    #[test]
    fn an_open_is_exact_and_passes_over_what_it_does_not_know() {
        let mut bytes = Vec::new();
        open().encode(&mut bytes);
        let payload = &bytes[HEADER..];
        let mut extended = payload.to_vec();
        extended.extend([9, 0, 2, 0xaa, 0xbb, 10, 0, 0]);
        assert_eq!(Open::parse(&extended), Ok(open()));
        for cut in 0..payload.len() {
            assert!(Open::parse(&payload[..cut]).is_err(), "{cut} bytes");
        }
        for cut in payload.len() + 1..payload.len() + 5 {
            assert!(Open::parse(&extended[..cut]).is_err(), "{cut} bytes");
        }
        let changed = |at: usize, byte: u8| {
            let mut bytes = payload.to_vec();
            bytes[at] = byte;
            Open::parse(&bytes)
        };
        assert_eq!(changed(0, 2), Err(FrameError::Version(2)));
        assert!(changed(1, 5).is_err());
        let mut mapped = Vec::new();
        let destination = "[::ffff:10.0.2.7]:80".parse().unwrap();
        Open { destination, ..open() }.encode(&mut mapped);
        assert!(Open::parse(&mapped[HEADER..]).is_err());
    }

    #[test]
    fn a_refusal_is_never_read_as_allowed() {
        let mut lie = vec![REFUSED, 7];
        lie.extend(b"allowedx/y");
        let read = Status::parse(&lie).unwrap();
        assert_eq!(read, Status::Refused { reason: Reason::ProtocolError, policy: None });
        assert!(Status::parse(&[ACCEPTED, 0]).is_err());
        assert!(Status::parse(&[REFUSED, 9, b'x']).is_err());
        assert!(Status::parse(&[7]).is_err());
        assert!(Status::parse(&[]).is_err());
    }

    proptest! {
        #[test]
        fn parsers_never_panic_and_accept_only_what_they_print(
            payload in proptest::collection::vec(any::<u8>(), 0..200),
        ) {
            if let Ok(open) = Open::parse(&payload) {
                let mut out = Vec::new();
                open.encode(&mut out);
                prop_assert_eq!(Open::parse(&out[HEADER..]), Ok(open));
            }
            if let Ok(status) = Status::parse(&payload) {
                let mut out = Vec::new();
                status.encode(&mut out);
                prop_assert_eq!(Status::parse(&out[HEADER..]), Ok(status));
            }
            let _ = parse_reset(&payload);
        }
    }
}
