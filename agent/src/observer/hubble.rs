//! Signet's reasons in Hubble's words.

use signet_ebpf::abi::{Direction, Reason, Verdict};

use crate::proto::flow;

/// Hubble's event type of a policy verdict.
pub const EVENT_POLICY_VERDICT: i32 = 5;
/// Hubble's event type of a drop.
pub const EVENT_DROP: i32 = 1;
/// Hubble's event type of a trace; `end` records are such.
pub const EVENT_TRACE: i32 = 4;
/// A request of layer 7.
pub const EVENT_L7: i32 = 129;
/// Hubble's match types.
pub mod match_type {
    /// No policy.
    pub const NONE: u32 = 0;
    /// A policy about peers and ports.
    pub const L3_L4: u32 = 2;
}

/// The drop reason that a dropped flow shows in Hubble; `None` for reasons that drop
/// nothing and for numbers that are none.
pub const fn drop_reason(reason: Reason) -> Option<flow::DropReason> {
    use flow::DropReason as D;
    Some(match reason {
        Reason::Allowed => D::Unknown,
        Reason::PolicyDeny => D::PolicyDeny,
        Reason::PolicyNoMatch | Reason::PolicyUnsupported | Reason::RightWithdrawn => {
            D::PolicyDenied
        }
        Reason::PlaintextRefused => D::UnencryptedTraffic,
        Reason::IdentityUnknown => D::UnknownL3TargetAddress,
        Reason::IdentityMismatch | Reason::UntrustedPeer => D::InvalidIdentity,
        Reason::PodUnregistered => D::DropEpNotReady,
        Reason::SvidMissing
        | Reason::SvidExpired
        | Reason::HandshakeFailed
        | Reason::TokenInvalid => D::AuthRequired,
        Reason::WrongDestination | Reason::ProtocolError | Reason::RawPacket => {
            D::InvalidPacketDropped
        }
        Reason::PeerUnreachable | Reason::AppUnreachable => D::ServiceBackendNotFound,
        Reason::SourceNotPreserved => D::InvalidSourceIp,
        Reason::MapFull => D::CtMapInsertionFailed,
        Reason::LimitExceeded => D::ReachedEdtRateLimitingDropHorizon,
        Reason::Draining => D::DropHostNotReady,
        Reason::Internal => D::NoConfigurationAvailableToPerformPolicyDecision,
        Reason::__Unset => return None,
    })
}

/// Hubble's verdict.
pub const fn verdict(verdict: Verdict) -> flow::Verdict {
    match verdict {
        Verdict::Forwarded => flow::Verdict::Forwarded,
        Verdict::Dropped => flow::Verdict::Dropped,
        Verdict::Audit => flow::Verdict::Audit,
    }
}

/// Hubble's direction.
pub const fn direction(direction: Direction) -> flow::TrafficDirection {
    match direction {
        Direction::Ingress => flow::TrafficDirection::Ingress,
        Direction::Egress => flow::TrafficDirection::Egress,
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::telemetry::reason;

    const DOCS: &str = include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/reasons.md"));

    /// Names in the first column of the documentation's table.
    fn documented(text: &str) -> BTreeSet<&str> {
        text.lines()
            .filter_map(|line| line.strip_prefix("| `")?.split_once('`'))
            .filter(|(_, rest)| {
                let cells: Vec<_> = rest.split('|').map(str::trim).collect();
                // Meaning and what to do must both be said.
                cells.len() >= 4 && cells[1..3].iter().all(|c| !c.is_empty())
            })
            .map(|(name, _)| name)
            .collect()
    }

    #[test]
    fn every_reason_has_a_drop_reason_of_hubble() {
        for r in Reason::ALL {
            let mapped = drop_reason(*r);
            assert!(mapped.is_some(), "{} has no mapping", reason::name(*r));
            let is_a_drop = mapped != Some(flow::DropReason::Unknown);
            assert_eq!(is_a_drop, *r != Reason::Allowed, "{}", reason::name(*r));
        }
        assert_eq!(drop_reason(Reason::__Unset), None);
    }

    #[test]
    fn every_reason_has_its_row_in_the_documentation() {
        let names: BTreeSet<_> = Reason::ALL.iter().map(|r| reason::name(*r)).collect();
        assert_eq!(documented(DOCS), names, "docs/reasons.md and the ABI's list differ");
        // Control: a row that says nothing to do does not count.
        assert!(documented("| `x` | meaning |  |").is_empty());
        assert_eq!(documented("| `x` | meaning | do |").len(), 1);
    }

    #[test]
    fn names_parse_back() {
        for r in Reason::ALL {
            assert_eq!(reason::parse(reason::name(*r)), Some(*r));
        }
        assert_eq!(reason::parse("no_such_reason"), None);
    }
}
