//! Makes the `:authority` of gRPC's C core acceptable.
//!
//! Clients built on it (Python, C++, Ruby, PHP …) name a unix socket's path there, with `%2F` for
//! each slash. RFC 3986 allows that in a host's name, but the HTTP library here takes no percent
//! sign and resets the stream. Nobody reads the authority on this socket, so every percent
//! sign in it becomes a minus on its way in: no length changes, neither of a frame nor of HPACK's
//! table. What is no well-formed HEADERS frame passes as it is, for the library to judge.

/// The client's connection preface (RFC 9113, section 3.4), in bytes.
const PREFACE: usize = 24;
/// A frame's header (RFC 9113, section 4.1).
const FRAME_HEAD: usize = 9;
/// Longer frames are not allowed here (SETTINGS_MAX_FRAME_SIZE's default).
const MAX_FRAME: usize = 16_384;
const HEADERS: u8 = 1;
const PADDED: u8 = 8;
const PRIORITY: u8 = 0x20;
/// `:authority` in HPACK's static table (RFC 7541, appendix A).
const AUTHORITY_INDEX: usize = 1;

/// Follows a connection's bytes and corrects them.
#[derive(Debug)]
pub struct AuthorityFilter {
    state: State,
    /// A frame's header, or a HEADERS frame that is not complete yet.
    frame: Vec<u8>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum State {
    /// So many bytes pass: the preface or a frame's payload.
    Pass(usize),
    /// A frame's header is being collected.
    Head,
    /// A HEADERS frame of this length, header included, is being collected.
    Collect(usize),
}

impl AuthorityFilter {
    /// At a connection's beginning.
    pub fn new() -> Self {
        Self { state: State::Pass(PREFACE), frame: Vec::new() }
    }

    /// Takes bytes that came; puts what may go on behind `out`.
    pub fn feed(&mut self, mut input: &[u8], out: &mut Vec<u8>) {
        while !input.is_empty() {
            match self.state {
                State::Pass(left) => {
                    let taken = take(&mut input, left);
                    out.extend_from_slice(taken);
                    self.state = State::Pass(left - taken.len());
                }
                State::Head => {
                    let missing = FRAME_HEAD - self.frame.len();
                    self.frame.extend_from_slice(take(&mut input, missing));
                }
                State::Collect(len) => {
                    let missing = len - self.frame.len();
                    self.frame.extend_from_slice(take(&mut input, missing));
                }
            }
            self.advance(out);
        }
    }

    /// The connection has ended: what is held goes on as it is.
    pub fn end(&mut self, out: &mut Vec<u8>) {
        out.append(&mut self.frame);
    }

    /// Goes to the next state when this one is complete.
    fn advance(&mut self, out: &mut Vec<u8>) {
        if self.state == State::Pass(0) {
            self.state = State::Head;
        }
        if self.state == State::Head
            && let [a, b, c, kind, ..] = self.frame[..]
            && self.frame.len() == FRAME_HEAD
        {
            let len = usize::from(a) << 16 | usize::from(b) << 8 | usize::from(c);
            if kind == HEADERS && len <= MAX_FRAME {
                self.state = State::Collect(FRAME_HEAD + len);
            } else {
                out.append(&mut self.frame);
                self.state = if len == 0 { State::Head } else { State::Pass(len) };
            }
        }
        if self.state == State::Collect(self.frame.len()) {
            correct_frame(&mut self.frame);
            out.append(&mut self.frame);
            self.state = State::Head;
        }
    }
}

impl Default for AuthorityFilter {
    fn default() -> Self {
        Self::new()
    }
}

fn take<'a>(input: &mut &'a [u8], most: usize) -> &'a [u8] {
    let (taken, rest) = input.split_at(most.min(input.len()));
    *input = rest;
    taken
}

fn correct_frame(frame: &mut [u8]) {
    let Some((head, payload)) = frame.split_at_mut_checked(FRAME_HEAD) else { return };
    let flags = head[4];
    let padding = if flags & PADDED == 0 { None } else { payload.first().copied() };
    let begin = usize::from(padding.is_some()) + if flags & PRIORITY == 0 { 0 } else { 5 };
    let end = payload.len().checked_sub(padding.unwrap_or(0).into());
    if let Some(block) = end.and_then(|end| payload.get_mut(begin..end)) {
        // The end of well-formed fields, or of what is in this frame: both are fine.
        let _ = correct_block(block);
    }
}

/// Walks a header block's fields (RFC 7541, section 6). `None` where it is cut off or malformed.
fn correct_block(block: &mut [u8]) -> Option<()> {
    let mut at = 0;
    while let Some(first) = block.get(at).copied() {
        if first & 0x80 != 0 {
            integer(block, &mut at, 7)?;
            continue;
        }
        if first & 0xe0 == 0x20 {
            integer(block, &mut at, 5)?;
            continue;
        }
        let index = integer(block, &mut at, if first & 0x40 == 0 { 4 } else { 6 })?;
        let is_authority = if index == 0 {
            let (name, _) = string(block, &mut at)?;
            block.get(name)? == b":authority"
        } else {
            index == AUTHORITY_INDEX
        };
        let (value, is_huffman) = string(block, &mut at)?;
        if is_authority && !is_huffman {
            for byte in block.get_mut(value)?.iter_mut().filter(|byte| **byte == b'%') {
                *byte = b'-';
            }
        }
    }
    Some(())
}

/// An integer with a prefix of so many bits (RFC 7541, section 5.1).
fn integer(block: &[u8], at: &mut usize, bits: u32) -> Option<usize> {
    let most = (1_usize << bits) - 1;
    let mut value = usize::from(*block.get(*at)?) & most;
    *at += 1;
    if value < most {
        return Some(value);
    }
    // No length or index in a frame of 16 KiB needs more than three further bytes.
    for shift in [0, 7, 14] {
        let byte = *block.get(*at)?;
        *at += 1;
        value += usize::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return Some(value);
        }
    }
    None
}

/// A string's place, and whether it is Huffman-coded (RFC 7541, section 5.2).
fn string(block: &[u8], at: &mut usize) -> Option<(std::ops::Range<usize>, bool)> {
    let is_huffman = *block.get(*at)? & 0x80 != 0;
    let len = integer(block, at, 7)?;
    let range = *at..at.checked_add(len)?;
    block.get(range.clone())?;
    *at = range.end;
    Some((range, is_huffman))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// What gRPC's C core 58 (Python's grpcio 1.85) sent for `unix:///tmp/dumpw.sock`.
    const C_CORE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\
        \x00\x00\x06\x04\x00\x00\x00\x00\x00\x00\x02\x00\x00\x00\x00\
        \x00\x00\x51\x01\x04\x00\x00\x00\x01\
        @\x05:path\x20/SpiffeWorkloadAPI/FetchX509SVID\
        @\n:authority\x10tmp%2Fdumpw.sock\x83\x86@\x02te\x08trailers\
        \x00\x00\x04\x08\x00\x00\x00\x00\x01\x00\x00\x00\x05";

    fn through(chunks: &[&[u8]]) -> Vec<u8> {
        let mut filter = AuthorityFilter::new();
        let mut out = Vec::new();
        for chunk in chunks {
            filter.feed(chunk, &mut out);
        }
        filter.end(&mut out);
        out
    }

    fn replaced(bytes: &[u8], from: &str, to: &str) -> Vec<u8> {
        let at = bytes.windows(from.len()).position(|w| w == from.as_bytes()).unwrap();
        let mut bytes = bytes.to_vec();
        bytes[at..at + from.len()].copy_from_slice(to.as_bytes());
        bytes
    }

    #[test]
    fn the_authority_of_the_c_core_is_corrected() {
        let expected = replaced(C_CORE, "tmp%2Fdumpw.sock", "tmp-2Fdumpw.sock");
        assert_eq!(through(&[C_CORE]), expected);
        let single: Vec<_> = C_CORE.chunks(1).collect();
        assert_eq!(through(&single), expected);
        assert!("tmp%2Fdumpw.sock".parse::<http::uri::Authority>().is_err(), "needed no more");
        assert!("tmp-2Fdumpw.sock".parse::<http::uri::Authority>().is_ok());
    }

    #[test]
    fn nothing_else_is_touched() {
        // Another header, a path, a frame of another kind, with the same bytes.
        for (from, to) in [(":authority", ":authorit%"), ("\x00\x00\x51\x01", "\x00\x00\x51\x00")] {
            let bytes = replaced(C_CORE, from, to);
            assert_eq!(through(&[&bytes]), bytes);
        }
        let path = replaced(C_CORE, "/SpiffeW", "/%piffeW");
        assert!(through(&[&path]).windows(8).any(|w| w == b"/%piffeW"));
    }

    #[test]
    fn padding_priority_and_the_static_index_are_understood() {
        let mut block = b"\x41\x05a%2Fb".to_vec();
        assert_eq!(correct_block(&mut block), Some(()));
        assert_eq!(block, b"\x41\x05a-2Fb");
        // Huffman-coded values have no percent sign of their own.
        let mut block = b"\x41\x85a%2Fb".to_vec();
        correct_block(&mut block);
        assert_eq!(block, b"\x41\x85a%2Fb");
        let mut frame = b"\x00\x00\x10\x01\x2c\x00\x00\x00\x01\x03PRIO!\x01\x05a%2Fb%%%".to_vec();
        correct_frame(&mut frame);
        assert_eq!(frame, b"\x00\x00\x10\x01\x2c\x00\x00\x00\x01\x03PRIO!\x01\x05a-2Fb%%%");
        // More padding than there is.
        let mut frame = b"\x00\x00\x08\x01\x0c\x00\x00\x00\x01\xff\x01\x05a%2Fb".to_vec();
        correct_frame(&mut frame);
        assert!(frame.contains(&b'%'));
    }

    proptest! {
        #[test]
        fn any_bytes_in_any_pieces_keep_their_length(
            bytes in prop::collection::vec(any::<u8>(), 0..300), cut in 1usize..50,
        ) {
            let all = [&C_CORE[..PREFACE], &bytes[..]].concat();
            let whole = through(&[&all]);
            prop_assert_eq!(&through(&all.chunks(cut).collect::<Vec<_>>()), &whole);
            prop_assert_eq!(whole.len(), all.len());
            for (was, is) in all.iter().zip(&whole) {
                prop_assert!(was == is || (*was == b'%' && *is == b'-'));
            }
        }
    }
}
