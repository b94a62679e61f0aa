//! The lab's small protocol over TCP: what a connection's first byte says.

/// `hello <text>\n`: the server answers with one JSON line of what it sees.
pub(super) const HELLO: u8 = b'h';
/// A nonce ([`Nonce`]): the server answers with [`Nonce`] of its own tag and port.
pub(super) const NONCE: u8 = 1;
/// A bulk transfer; its header follows.
pub(super) const BULK: u8 = 2;
/// Every further byte is echoed.
pub(super) const ECHO: u8 = 3;

/// Who was dialled, and a random number.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Nonce {
    pub(super) random: u64,
    pub(super) tag: u32,
    pub(super) port: u16,
}

impl Nonce {
    /// Length on the wire, with the first byte.
    pub(super) const LENGTH: usize = 15;

    pub(super) fn to_bytes(self) -> [u8; Self::LENGTH] {
        let mut bytes = [NONCE; Self::LENGTH];
        bytes[1..9].copy_from_slice(&self.random.to_be_bytes());
        bytes[9..13].copy_from_slice(&self.tag.to_be_bytes());
        bytes[13..].copy_from_slice(&self.port.to_be_bytes());
        bytes
    }

    /// The nonce of what follows the first byte.
    pub(super) fn from_rest(rest: [u8; Self::LENGTH - 1]) -> Self {
        let [a, b, c, d, e, f, g, h, i, j, k, l, m, n] = rest;
        Self {
            random: u64::from_be_bytes([a, b, c, d, e, f, g, h]),
            tag: u32::from_be_bytes([i, j, k, l]),
            port: u16::from_be_bytes([m, n]),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_nonce_survives_the_wire() {
        let nonce = Nonce { random: 0x0102_0304_0506_0708, tag: 77, port: 8080 };
        let bytes = nonce.to_bytes();
        assert_eq!(bytes[0], NONCE);
        let mut rest = [0; Nonce::LENGTH - 1];
        rest.copy_from_slice(&bytes[1..]);
        assert_eq!(Nonce::from_rest(rest), nonce);
    }
}
