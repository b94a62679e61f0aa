//! Talking netlink over a socket that [`super::NetnsOpener`] made: one request, its answers.

use std::{io, os::fd::BorrowedFd};

use rustix::net::{RecvFlags, SendFlags, recv, send};

/// The kernel's dump messages are at most this long.
const BUFFER: usize = 64 * 1024;
/// A dump that has not ended after this many reads is not the kernel's.
const MAX_READS: usize = 100_000;

const HEADER: usize = 16;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
/// A dump was changed while it was read.
const NLM_F_DUMP_INTR: u16 = 0x10;
const NLM_F_MULTI: u16 = 2;

/// Sends a serialised request and calls `each` with every answer's payload.
///
/// Returns `false` when the dump was changed while it was read: what came is then neither
/// the state before nor after, and should be asked for again.
///
/// # Errors
/// The kernel's answer as errno, a truncated message, or a time-out.
pub fn exchange(
    socket: BorrowedFd<'_>,
    request: &[u8],
    mut each: impl FnMut(&[u8]),
) -> io::Result<bool> {
    send(socket, request, SendFlags::empty())?;
    let mut buffer = vec![0u8; BUFFER];
    let mut whole = true;
    for _ in 0..MAX_READS {
        let (_, len) = recv(socket, &mut buffer, RecvFlags::TRUNC)?;
        if len > BUFFER {
            return Err(bad("a netlink answer is longer than 64 KiB"));
        }
        let mut rest = &buffer[..len];
        while rest.len() >= HEADER {
            let message = Message::parse(rest).ok_or_else(|| bad("a netlink answer is cut off"))?;
            whole &= message.flags & NLM_F_DUMP_INTR == 0;
            match message.kind {
                NLMSG_DONE => return Ok(whole),
                NLMSG_ERROR => {
                    return match message.errno() {
                        0 => Ok(whole),
                        errno => Err(io::Error::from_raw_os_error(errno)),
                    };
                }
                _ => each(message.payload),
            }
            if message.flags & NLM_F_MULTI == 0 {
                return Ok(whole);
            }
            rest = rest.get(message.padded..).unwrap_or(&[]);
        }
    }
    Err(bad("a netlink dump does not end"))
}

fn bad(what: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

struct Message<'a> {
    kind: u16,
    flags: u16,
    payload: &'a [u8],
    /// Its length with the padding up to the next one.
    padded: usize,
}

impl<'a> Message<'a> {
    fn parse(bytes: &'a [u8]) -> Option<Self> {
        let (len, tail) = bytes.split_first_chunk::<4>()?;
        let (kind, tail) = tail.split_first_chunk::<2>()?;
        let (flags, _) = tail.split_first_chunk::<2>()?;
        let len = u32::from_ne_bytes(*len) as usize;
        Some(Self {
            kind: u16::from_ne_bytes(*kind),
            flags: u16::from_ne_bytes(*flags),
            payload: bytes.get(HEADER..len)?,
            padded: len.next_multiple_of(4),
        })
    }

    /// Of an error message; 0 is an acknowledgement.
    fn errno(&self) -> i32 {
        let code =
            self.payload.first_chunk::<4>().map_or(-libc::EPROTO, |c| i32::from_ne_bytes(*c));
        code.saturating_neg()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn messages_parse() {
        let mut bytes = Vec::new();
        bytes.extend(20u32.to_ne_bytes());
        bytes.extend(NLMSG_ERROR.to_ne_bytes());
        bytes.extend(0u16.to_ne_bytes());
        bytes.extend([0; 8]);
        bytes.extend((-libc::ENOENT).to_ne_bytes());
        let message = Message::parse(&bytes).unwrap();
        assert_eq!(message.errno(), libc::ENOENT);
        assert_eq!(message.padded, 20);
        assert!(Message::parse(&bytes[..19]).is_none(), "cut off");
    }

    proptest! {
        #[test]
        fn no_bytes_panic(bytes in proptest::collection::vec(any::<u8>(), 0..64)) {
            if let Some(message) = Message::parse(&bytes) {
                prop_assert!(message.payload.len() + HEADER <= bytes.len());
                let _ = message.errno();
            }
        }
    }
}
