//! The ABI's values by the names that people see and type.

use signet_ebpf::abi::{Direction, Mode, Verdict};

/// `off`, `observe`, `permissive`, `strict`, as labels write it.
pub const fn mode(mode: Mode) -> &'static str {
    match mode {
        Mode::Off => "off",
        Mode::Observe => "observe",
        Mode::Permissive => "permissive",
        Mode::Strict => "strict",
    }
}

/// `FORWARDED`, `DROPPED`, `AUDIT`.
pub const fn verdict(verdict: Verdict) -> &'static str {
    match verdict {
        Verdict::Forwarded => "FORWARDED",
        Verdict::Dropped => "DROPPED",
        Verdict::Audit => "AUDIT",
    }
}

/// The verdict of a name in any case.
pub fn parse_verdict(s: &str) -> Option<Verdict> {
    [Verdict::Forwarded, Verdict::Dropped, Verdict::Audit]
        .into_iter()
        .find(|v| verdict(*v).eq_ignore_ascii_case(s))
}

/// `ingress`, `egress`.
pub const fn direction(direction: Direction) -> &'static str {
    match direction {
        Direction::Ingress => "ingress",
        Direction::Egress => "egress",
    }
}

/// `tcp`, `udp`, or the protocol's number.
pub fn protocol(protocol: u8) -> String {
    match protocol {
        6 => "tcp".into(),
        17 => "udp".into(),
        other => other.to_string(),
    }
}

/// The IP protocol of a name in any case, or of a number.
pub fn parse_protocol(s: &str) -> Option<u8> {
    match s.to_ascii_lowercase().as_str() {
        "tcp" => Some(6),
        "udp" => Some(17),
        "icmp" | "icmpv4" => Some(1),
        "icmpv6" => Some(58),
        "sctp" => Some(132),
        number => number.parse().ok(),
    }
}
