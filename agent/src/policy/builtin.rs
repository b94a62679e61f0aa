//! Built-ins: what passes for every pod without anybody's policy, listed by
//! `signet policy list` and removed by the configuration key `builtins` (DESIGN §4.6, §4.8).
//!
//! The DNS built-in is an ALLOW like any other, but asked last ([`super::evaluate`]). The
//! kubelet's probes are attested by the kernel before policy is asked; their policy here only
//! gives what decides a name.

use std::{net::IpAddr, sync::Arc};

use signet_ebpf::abi::proto;

use super::model::{Action, Peer, Policy, PolicyName, Ports, Rule, Selector, Target};

/// The kind of their names.
pub const KIND: &str = "Builtin";

/// The port of DNS (RFC 1035 §4.2).
pub const DNS_PORT: u16 = 53;

/// The name of a built-in, as the configuration has it too.
pub fn name(builtin: &str) -> PolicyName {
    PolicyName { kind: KIND.into(), namespace: "".into(), name: builtin.into() }
}

/// A pod's own resolvers: `services` with where they are at present, and port 53 at
/// `addresses`; over UDP and TCP.
pub fn dns(
    services: Vec<(Arc<str>, Arc<str>)>,
    targets: Vec<Target>,
    addresses: &[IpAddr],
) -> Policy {
    let mut egress = Vec::new();
    // A peer that names neither a Service nor an address would be everybody.
    if !services.is_empty() {
        let peer = Peer { services, targets, ..Peer::default() };
        egress.push(Rule { peers: vec![peer], ..Rule::default() });
    }
    if !addresses.is_empty() {
        let ip_blocks = addresses.iter().map(|ip| ip.to_canonical().into()).collect();
        let ports = [proto::UDP, proto::TCP].map(|protocol| Ports {
            first: DNS_PORT,
            last: DNS_PORT,
            protocol: Some(protocol),
        });
        egress.push(Rule::of(vec![Peer { ip_blocks, ..Peer::default() }], ports.to_vec()));
    }
    Policy { egress, governs_egress: true, ..of(crate::config::values::Builtin::Dns.as_str()) }
}

/// The kubelet's probes.
pub fn probes() -> Policy {
    let nothing = Rule { never: true, ..Rule::default() };
    let name = crate::config::values::Builtin::KubeletProbes.as_str();
    Policy { ingress: vec![nothing], governs_ingress: true, ..of(name) }
}

/// Plaintext to what the API server calls. The kernel lets it in by port before policy is asked.
pub fn webhooks() -> Policy {
    let nothing = Rule { never: true, ..Rule::default() };
    let name = crate::config::values::Builtin::Webhooks.as_str();
    Policy { ingress: vec![nothing], governs_ingress: true, ..of(name) }
}

fn of(builtin: &str) -> Policy {
    Policy { builtin: true, ..Policy::new(name(builtin), Selector::default(), Action::Allow) }
}

#[cfg(test)]
mod tests {
    use signet_ebpf::abi::{Direction, Reason};

    use super::*;
    use crate::{
        policy::evaluate::{FlowFacts, PeerIdentity, evaluate},
        spiffe::TrustDomain,
    };

    const VIP: &str = "10.96.0.10";

    fn set(others: &[Policy], addresses: &[IpAddr]) -> Vec<Arc<Policy>> {
        let at = |protocol| Target { ip: VIP.parse().unwrap(), port: DNS_PORT, protocol };
        let services = vec![("kube-system".into(), "kube-dns".into())];
        let builtin = dns(services, vec![at(proto::TCP), at(proto::UDP)], addresses);
        others.iter().cloned().chain([builtin]).map(Arc::new).collect()
    }

    fn judge(policies: &[Arc<Policy>], deny: bool, to: &str, port: u16) -> (Reason, String) {
        let domain = TrustDomain::parse("cluster.local").unwrap();
        let facts = FlowFacts {
            direction: Direction::Egress,
            trust_domain: &domain,
            aliases: &[],
            peer: PeerIdentity::Unknown,
            peer_ip: to.parse().unwrap(),
            local_ips: &[],
            port,
            protocol: proto::UDP,
        };
        let outcome = evaluate(policies, deny, &facts);
        (outcome.reason, outcome.policy.map(|p| p.name.to_string()).unwrap_or_default())
    }

    fn own(action: Action, blocks: &[&str]) -> Policy {
        let name = PolicyName { kind: "k".into(), namespace: "shop".into(), name: "own".into() };
        let ip_blocks = blocks.iter().map(|b| b.parse().unwrap()).collect();
        let peer = Peer { ip_blocks, ..Peer::default() };
        Policy {
            egress: vec![Rule::of(vec![peer], vec![])],
            governs_egress: true,
            ..Policy::new(name, Selector::default(), action)
        }
    }

    #[test]
    fn it_passes_beside_an_allow_and_a_default_of_deny_but_not_over_a_deny() {
        let by = |reason, name: &str| (reason, name.to_owned());
        let alone = set(&[], &[]);
        assert_eq!(judge(&alone, true, VIP, 53), by(Reason::Allowed, "Builtin/dns"));
        assert_eq!(judge(&alone, true, VIP, 54), by(Reason::PolicyNoMatch, ""));
        assert_eq!(judge(&alone, true, "10.96.0.11", 53), by(Reason::PolicyNoMatch, ""));
        // What is open without it is open with it, and is not its doing.
        assert_eq!(judge(&alone, false, VIP, 53), by(Reason::Allowed, ""));
        assert_eq!(judge(&alone, false, "10.96.0.11", 53), by(Reason::Allowed, ""));

        let elsewhere = set(&[own(Action::Allow, &["192.0.2.0/24"])], &[]);
        assert_eq!(judge(&elsewhere, false, VIP, 53), by(Reason::Allowed, "Builtin/dns"));
        assert_eq!(judge(&elsewhere, false, VIP, 80), by(Reason::PolicyNoMatch, "k/shop/own"));
        // An ALLOW of its own goes before it, and a DENY wins.
        let there = set(&[own(Action::Allow, &["10.96.0.0/24"])], &[]);
        assert_eq!(judge(&there, true, VIP, 53), by(Reason::Allowed, "k/shop/own"));
        let denied = set(&[own(Action::Deny, &["10.96.0.0/24"])], &[]);
        assert_eq!(judge(&denied, true, VIP, 53), by(Reason::PolicyDeny, "k/shop/own"));
        // One that cannot be understood denies all the same; such an ALLOW does not.
        let broken = |action| Policy { unsupported: vec!["x".into()], ..own(action, &[]) };
        let denied = set(&[broken(Action::Deny)], &[]);
        assert_eq!(judge(&denied, true, VIP, 53), by(Reason::PolicyUnsupported, "k/shop/own"));
        let allowed = set(&[broken(Action::Allow)], &[]);
        assert_eq!(judge(&allowed, true, VIP, 53), by(Reason::Allowed, "Builtin/dns"));
    }

    #[test]
    fn configured_addresses_count_at_the_port_of_dns_only() {
        let node_local = ["169.254.20.10".parse().unwrap()];
        let policies = set(&[], &node_local);
        assert_eq!(judge(&policies, true, "169.254.20.10", 53).0, Reason::Allowed);
        assert_eq!(judge(&policies, true, "169.254.20.10", 8080).0, Reason::PolicyNoMatch);
        assert_eq!(judge(&policies, true, "169.254.20.11", 53).0, Reason::PolicyNoMatch);
        // With neither Services nor addresses it allows nothing at all.
        let nothing = [Arc::new(dns(vec![], vec![], &[]))];
        assert_eq!(judge(&nothing, true, VIP, 53).0, Reason::PolicyNoMatch);
    }
}
