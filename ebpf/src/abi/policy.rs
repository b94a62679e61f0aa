//! A compiled policy: key and value of a pod's trie.

use super::{Direction, Ip};

/// What a [`PolicyKey`] is about.
pub mod policy_tag {
    /// `ip` octets → class of the address (value: `class`).
    pub const CLASS: u8 = 1;
    /// (direction, known, protocol, class, identity, port) → verdict.
    pub const RULE: u8 = 2;
}

/// How a peer's identity is known, as far as compiled policy tells it apart.
pub mod known {
    /// From its address, or not at all.
    pub const ADDRESS: u8 = 0;
    /// As if from a handshake (observe judges so).
    pub const AUTHENTICATED: u8 = 1;
}

/// Bits of a [`PolicyKey`] before the port (rules) or before the address (classes).
pub const POLICY_FIXED_BITS: u32 = 32;
/// Prefix length of a rule that covers every port.
pub const POLICY_RULE_BITS: u32 = 96;

/// Key data of a pod's policy, a longest-prefix-match trie.
///
/// `CLASS`: octets are `[tag, direction, 0, 0]` then the 16 of the address.
/// `RULE`: `[tag, direction, known, protocol]`, class (u32, big-endian), identity (u32,
/// big-endian), port (u16, big-endian); the prefix ends inside the port.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct PolicyKey(pub [u8; 20]);

impl PolicyKey {
    /// Key that looks an address's class up (prefix 160) or declares one (shorter).
    #[inline(always)]
    pub const fn class(direction: Direction, ip: Ip) -> Self {
        let o = ip.octets();
        Self([
            policy_tag::CLASS,
            direction as u8,
            0,
            0,
            o[0],
            o[1],
            o[2],
            o[3],
            o[4],
            o[5],
            o[6],
            o[7],
            o[8],
            o[9],
            o[10],
            o[11],
            o[12],
            o[13],
            o[14],
            o[15],
        ])
    }

    /// Key of a rule; prefix [`POLICY_RULE_BITS`] plus the port's significant bits.
    #[inline(always)]
    pub const fn rule(
        direction: Direction,
        known: u8,
        protocol: u8,
        class: u32,
        identity: u32,
        port: u16,
    ) -> Self {
        let (c, i, p) = (class.to_be_bytes(), identity.to_be_bytes(), port.to_be_bytes());
        Self([
            policy_tag::RULE,
            direction as u8,
            known,
            protocol,
            c[0],
            c[1],
            c[2],
            c[3],
            i[0],
            i[1],
            i[2],
            i[3],
            p[0],
            p[1],
            0,
            0,
            0,
            0,
            0,
            0,
        ])
    }
}

/// Value of a pod's policy.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct PolicyValue {
    /// `CLASS`: the class. `RULE`: number of the deciding policy, 0 for none.
    pub number: u32,
    /// `RULE`: a [`Reason`]; `allowed` passes, anything else refuses.
    pub reason: u16,
    /// `RULE`: 1 when an AUDIT policy matches.
    pub audit: u8,
    /// Zero.
    pub pad: u8,
}
