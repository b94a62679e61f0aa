//! TCP streams put back in order, and what they say of TLS.

use std::{collections::BTreeMap, net::IpAddr};

use anyhow::{Result, bail, ensure};

use super::packet::{Packet, Transport};

/// One direction of a TCP connection.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Key {
    /// Sender.
    pub from: (IpAddr, u16),
    /// Receiver.
    pub to: (IpAddr, u16),
    /// Counts connections that used the same addresses and ports one after another.
    pub generation: u32,
}

/// The bytes of one direction; where packets are missing a new piece begins.
#[derive(Clone, Debug, Default)]
pub struct Stream {
    /// Contiguous pieces, in order.
    pub pieces: Vec<Vec<u8>>,
    /// The first piece begins with the connection's first byte.
    pub from_start: bool,
}

/// Collects both directions of every connection.
pub fn reassemble(packets: &[Packet]) -> BTreeMap<Key, Stream> {
    let mut generations: BTreeMap<((IpAddr, u16), (IpAddr, u16)), (u32, u32)> = BTreeMap::new();
    let mut segments: BTreeMap<Key, (Option<u32>, Vec<(u32, &[u8])>)> = BTreeMap::new();
    for packet in packets {
        let Transport::Tcp { sequence, flags, .. } = packet.transport else { continue };
        let ends = (packet.from(), packet.to());
        let syn = flags & 2 != 0;
        let generation = generations.entry(ends).or_insert((0, sequence));
        if syn && generation.1 != sequence {
            // Another initial sequence number: a new connection over old ports.
            *generation = (generation.0 + 1, sequence);
        }
        let key = Key { from: ends.0, to: ends.1, generation: generation.0 };
        let entry = segments.entry(key).or_default();
        let first = if syn { sequence.wrapping_add(1) } else { sequence };
        if syn {
            entry.0 = Some(first);
        }
        if !packet.payload().is_empty() {
            entry.1.push((first, packet.payload()));
        }
    }
    segments
        .into_iter()
        .filter(|(_, (_, list))| !list.is_empty())
        .map(|(key, (start, list))| (key, in_order(start, list)))
        .collect()
}

fn in_order(start: Option<u32>, mut segments: Vec<(u32, &[u8])>) -> Stream {
    let base = start.unwrap_or_else(|| segments.first().map_or(0, |s| s.0));
    // Sequence numbers wrap: order by the signed distance from the first.
    segments.sort_by_key(|(sequence, _)| i64::from(sequence.wrapping_sub(base) as i32));
    let mut stream = Stream { pieces: vec![Vec::new()], from_start: start.is_some() };
    let mut next = base;
    for (sequence, payload) in segments {
        let ahead = sequence.wrapping_sub(next) as i32;
        if ahead > 0 {
            if stream.pieces.len() == 1 && stream.pieces[0].is_empty() {
                stream.from_start = false;
            }
            stream.pieces.push(Vec::new());
            next = sequence;
        }
        let known = next.wrapping_sub(sequence) as usize;
        let Some(new) = payload.get(known..) else { continue };
        if let Some(piece) = stream.pieces.last_mut() {
            piece.extend_from_slice(new);
        }
        next = next.wrapping_add(new.len() as u32);
    }
    stream.pieces.retain(|piece| !piece.is_empty());
    stream
}

impl Stream {
    /// True when `needle` occurs in a piece.
    pub fn contains(&self, needle: &[u8]) -> bool {
        self.pieces.iter().any(|piece| super::contains(piece, needle))
    }

    /// Counts the TLS records; errors on any byte that is not TLS 1.3.
    ///
    /// A direction captured from its middle, or with gaps, cannot be walked: an error too.
    pub fn tls13_records(&self, from_server: bool) -> Result<usize> {
        ensure!(self.from_start, "the capture lacks the connection's beginning");
        ensure!(self.pieces.len() <= 1, "the capture has gaps");
        let Some(mut rest) = self.pieces.first().map(Vec::as_slice) else { return Ok(0) };
        let mut count = 0;
        while !rest.is_empty() {
            let Some(header) = rest.get(..5) else {
                // The connection was cut inside a record's header.
                break;
            };
            let (kind, version) = (header[0], u16::from_be_bytes([header[1], header[2]]));
            ensure!(
                (20..=23).contains(&kind) && matches!(version, 0x0301 | 0x0303),
                "record {count} is not TLS: {header:02x?}"
            );
            let length = usize::from(u16::from_be_bytes([header[3], header[4]]));
            let body = &rest[5..rest.len().min(5 + length)];
            if count == 0 && from_server {
                ensure_tls13(kind, body)?;
            }
            rest = rest.get(5 + length..).unwrap_or_default();
            count += 1;
        }
        Ok(count)
    }
}

/// The first record of a server: a ServerHello that selects TLS 1.3, or an alert.
fn ensure_tls13(kind: u8, body: &[u8]) -> Result<()> {
    const ALERT: u8 = 21;
    const HANDSHAKE: u8 = 22;
    match kind {
        ALERT => return Ok(()),
        HANDSHAKE if body.first() == Some(&2) => {}
        _ => bail!("the server's first record is no ServerHello"),
    }
    // Type and length (4), version (2), random (32), session id, cipher suite (2),
    // compression (1), extensions.
    let cut = || anyhow::anyhow!("the ServerHello is cut short");
    let session = usize::from(*body.get(38).ok_or_else(cut)?);
    let mut extensions = body.get(39 + session + 2 + 1 + 2..).ok_or_else(cut)?;
    while let Some(head) = extensions.get(..4) {
        let id = u16::from_be_bytes([head[0], head[1]]);
        let length = usize::from(u16::from_be_bytes([head[2], head[3]]));
        let value = extensions.get(4..4 + length).ok_or_else(cut)?;
        if id == 43 {
            ensure!(value == [3, 4], "the server chose TLS version {value:02x?}");
            return Ok(());
        }
        extensions = &extensions[4 + length..];
    }
    bail!("the ServerHello selects no TLS 1.3 (no supported_versions)")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ordered(start: Option<u32>, segments: &[(u32, &[u8])]) -> Stream {
        in_order(start, segments.to_vec())
    }

    #[test]
    fn disorder_overlap_and_wrapping_numbers() {
        let s = ordered(
            Some(u32::MAX - 1),
            &[(1, b"def"), (u32::MAX - 1, b"abc"), (u32::MAX, b"bcde"), (1, b"def")],
        );
        assert_eq!(s.pieces, [b"abcdef".to_vec()]);
        assert!(s.from_start && s.contains(b"cd"));
    }

    #[test]
    fn a_gap_begins_a_new_piece() {
        let s = ordered(Some(1), &[(1, b"ab"), (5, b"ef")]);
        assert_eq!(s.pieces, [b"ab".to_vec(), b"ef".to_vec()]);
        assert!(!s.contains(b"be"));
        assert!(s.tls13_records(false).is_err());
    }

    #[test]
    fn clear_text_is_not_tls() {
        let s = ordered(Some(1), &[(1, b"GET / HTTP/1.1\r\n")]);
        assert!(s.tls13_records(false).is_err());
        let s = ordered(Some(1), &[(1, &[23, 3, 3, 0, 2, 1, 2, 21, 3, 3, 0, 1, 9])]);
        assert_eq!(s.tls13_records(false).unwrap(), 2);
        // The same bytes from a server: no ServerHello.
        assert!(s.tls13_records(true).is_err());
    }
}
