//! The kernel's verdict over hash maps: every rule of DESIGN §2 that the programs enforce,
//! each refusal beside the flow that passes once its one cause is gone.

use std::collections::{HashMap, HashSet};

use signet_ebpf::{
    abi::{
        AddressEntry, Config, Direction, HEARTBEAT_NS, IDENTITY_ANY, Ip, Mode, PodEntry, PolicyKey,
        PolicyValue, Reason, TUNNEL_PORT, Verdict, address, enforcement, known, pod, proto, range,
        service, unknown_pods,
    },
    decide::{
        Action, Decision, ECONNREFUSED, EPERM, Flow, PolicyMaps, decide_egress, decide_ingress,
    },
};

const HOST: u64 = 1;
const POD: u64 = 42;
const OTHER_POD: u64 = 43;
const NOW: u64 = 1_000_000_000_000;

#[derive(Clone)]
struct Maps {
    config: Config,
    pods: HashMap<u64, PodEntry>,
    own: HashSet<(u64, Ip)>,
    addresses: HashMap<Ip, AddressEntry>,
    services: HashMap<(Ip, u16, u8), u32>,
    ranges: Vec<(Ip, u32, u32)>,
    policy: HashMap<(u64, PolicyKey), PolicyValue>,
    exempt: HashSet<(u64, u16, u8)>,
    probes: HashSet<(Ip, u16)>,
}

impl PolicyMaps for Maps {
    fn config(&self) -> Option<&Config> {
        Some(&self.config)
    }
    fn pod(&self, netns: u64) -> Option<&PodEntry> {
        self.pods.get(&netns)
    }
    fn is_own(&self, netns: u64, ip: Ip) -> bool {
        self.own.contains(&(netns, ip))
    }
    fn address(&self, ip: Ip) -> Option<&AddressEntry> {
        self.addresses.get(&ip)
    }
    fn service(&self, ip: Ip, port: u16, protocol: u8) -> Option<u32> {
        self.services.get(&(ip, port, protocol)).copied()
    }
    fn range(&self, ip: Ip) -> Option<u32> {
        let of = |ip: Ip, bits: u32| u128::from_be_bytes(ip.octets()) >> (128 - bits);
        self.ranges
            .iter()
            .filter(|(net, bits, _)| of(*net, *bits) == of(ip, *bits))
            .max_by_key(|(_, bits, _)| *bits)
            .map(|(_, _, kind)| *kind)
    }
    fn policy(&self, netns: u64, _bits: u32, key: &PolicyKey) -> Option<&PolicyValue> {
        self.policy.get(&(netns, *key))
    }
    fn is_exempt(&self, netns: u64, port: u16, protocol: u8) -> bool {
        self.exempt.contains(&(netns, port, protocol))
    }
    fn is_probe(&self, flow: &Flow) -> bool {
        self.probes.contains(&(flow.remote, flow.remote_port))
    }
}

fn v4(a: u8, b: u8, c: u8, d: u8) -> Ip {
    Ip::v4(u32::from_ne_bytes([a, b, c, d]))
}

const OWN: fn() -> Ip = || v4(10, 0, 0, 2);
const PEER: fn() -> Ip = || v4(10, 0, 1, 2);
const OUTSIDE: fn() -> Ip = || v4(192, 0, 2, 1);

/// A strict, ready pod, a served peer, known ranges, a live agent.
fn world(mode: Mode) -> Maps {
    let entry = PodEntry {
        ip4: OWN(),
        identity: 300,
        listener4: 20_001,
        listener6: 20_002,
        listener6_count: 4,
        mode: mode as u8,
        flags: pod::READY,
        revision: 7,
        ..PodEntry::default()
    };
    Maps {
        config: Config {
            host_netns: HOST,
            heartbeat: NOW - 1_000_000,
            enforcing: 1,
            ranges_known: 1,
            ..Config::default()
        },
        pods: HashMap::from([(POD, entry)]),
        own: HashSet::from([(POD, OWN())]),
        addresses: HashMap::from([(
            PEER(),
            AddressEntry {
                identity: 301,
                kind: address::POD,
                flags: address::ENROLLED | address::SERVED | address::ENROLLABLE,
                pad: 0,
            },
        )]),
        services: HashMap::new(),
        ranges: vec![(v4(10, 0, 0, 0), 96 + 8, range::PODS)],
        policy: HashMap::new(),
        exempt: HashSet::new(),
        probes: HashSet::new(),
    }
}

fn flow(remote: Ip, port: u16, protocol: u8) -> Flow {
    Flow {
        netns: POD,
        task_netns: POD,
        local: OWN(),
        remote,
        local_port: port,
        remote_port: port,
        protocol,
        steerable: true,
        now: NOW,
    }
}

fn dial(maps: &Maps, remote: Ip) -> Decision {
    decide_egress(maps, &flow(remote, 8080, proto::TCP))
}

fn arrive(maps: &Maps, remote: Ip) -> Decision {
    decide_ingress(maps, &flow(remote, 8080, proto::TCP))
}

#[track_caller]
fn refused(d: Decision, reason: Reason, errno: u16) {
    assert_eq!((d.action, d.reason, d.errno), (Action::Refuse, reason, errno));
    assert_eq!(d.verdict, Verdict::Dropped);
    assert!(d.report);
}

#[track_caller]
fn passes(d: Decision) {
    assert_eq!((d.action, d.reason), (Action::Pass, Reason::Allowed), "{d:?}");
}

/// Puts a rule for every peer and the one port that the flows use.
fn rule(maps: &mut Maps, direction: Direction, how: u8, protocol: u8, reason: Reason) {
    let key = PolicyKey::rule(direction, how, protocol, 0, IDENTITY_ANY, 8080);
    let value = PolicyValue { number: 9, reason: reason as u16, audit: 0, pad: 0 };
    maps.policy.insert((POD, key), value);
}

#[test]
fn enrolled_peers_are_tunnelled_and_an_unserved_one_is_refused_from_strict_only() {
    for mode in [Mode::Permissive, Mode::Strict] {
        assert_eq!(dial(&world(mode), PEER()).action, Action::Tunnel);
    }
    let mut maps = world(Mode::Strict);
    maps.addresses.get_mut(&PEER()).unwrap().flags &= !address::SERVED;
    refused(dial(&maps, PEER()), Reason::PeerUnreachable, ECONNREFUSED);
    maps.pods.get_mut(&POD).unwrap().mode = Mode::Permissive as u8;
    passes(dial(&maps, PEER()));
    // Not enrolled at all: outside the mesh, direct from either.
    maps.addresses.get_mut(&PEER()).unwrap().flags = 0;
    passes(dial(&maps, PEER()));
    maps.pods.get_mut(&POD).unwrap().mode = Mode::Strict as u8;
    passes(dial(&maps, PEER()));
}

#[test]
fn off_and_loopback_and_own_addresses_are_untouched() {
    let off = world(Mode::Off);
    assert!(!dial(&off, PEER()).report);
    let maps = world(Mode::Strict);
    let six = |last: u32| Ip([0, 0, 0, last.to_be()]);
    for ip in [v4(127, 0, 0, 1), v4(127, 9, 9, 9), v4(0, 0, 0, 0), six(1), six(0), OWN()] {
        let d = dial(&maps, ip);
        assert_eq!((d.action, d.report), (Action::Pass, false), "{ip:?}");
    }
    assert_eq!(dial(&maps, v4(126, 0, 0, 1)).action, Action::Pass);
    assert!(dial(&maps, v4(126, 0, 0, 1)).report, "outside addresses are judged");
}

#[test]
fn an_unknown_address_of_the_ranges_is_refused_from_strict_and_never_taken_for_outside() {
    let stranger = v4(10, 9, 9, 9);
    let mut maps = world(Mode::Strict);
    refused(dial(&maps, stranger), Reason::IdentityUnknown, ECONNREFUSED);
    passes(dial(&maps, OUTSIDE()));
    maps.ranges.push((stranger, 128, range::OUTSIDE));
    passes(dial(&maps, stranger));
    maps.ranges.clear();
    maps.config.ranges_known = 0;
    refused(dial(&maps, OUTSIDE()), Reason::IdentityUnknown, ECONNREFUSED);
    let mut permissive = world(Mode::Permissive);
    passes(dial(&permissive, stranger));
    permissive.pods.get_mut(&POD).unwrap().mode = Mode::Observe as u8;
    let audited = dial(&permissive, stranger);
    assert_eq!((audited.action, audited.verdict), (Action::Pass, Verdict::Audit));
    assert_eq!(audited.reason, Reason::IdentityUnknown);
}

#[test]
fn services_follow_their_endpoints() {
    let vip = v4(10, 96, 0, 1);
    let mut maps = world(Mode::Strict);
    let entry = AddressEntry { kind: address::SERVICE, ..AddressEntry::default() };
    maps.addresses.insert(vip, entry);
    refused(dial(&maps, vip), Reason::PeerUnreachable, ECONNREFUSED);
    maps.services.insert((vip, 8080, proto::TCP), service::NO_ENDPOINTS);
    refused(dial(&maps, vip), Reason::PeerUnreachable, ECONNREFUSED);
    maps.services.insert((vip, 8080, proto::TCP), service::TUNNEL);
    assert_eq!(dial(&maps, vip).action, Action::Tunnel);
    maps.services.insert((vip, 8080, proto::TCP), 0);
    passes(dial(&maps, vip));

    // An address outside that a Service claims is what is out there on all other ports.
    let other = flow(vip, 9999, proto::TCP);
    refused(decide_egress(&maps, &other), Reason::PeerUnreachable, ECONNREFUSED);
    maps.services.insert((vip, service::EXTERNAL, 0), 0);
    passes(decide_egress(&maps, &other));
    maps.services.remove(&(vip, service::EXTERNAL, 0));

    // A denial of whatever the address is not waits until an endpoint is chosen, but only
    // where a proxy will choose it.
    rule(&mut maps, Direction::Egress, known::ADDRESS, proto::TCP, Reason::PolicyDeny);
    refused(dial(&maps, vip), Reason::PolicyDeny, EPERM);
    maps.services.insert((vip, 8080, proto::TCP), service::TUNNEL);
    assert_eq!(dial(&maps, vip).action, Action::Tunnel);
    let elsewhere = 0xbeef;
    let nested = Flow { netns: elsewhere, ..flow(vip, 8080, proto::TCP) };
    maps.pods.get_mut(&POD).unwrap().mode = Mode::Permissive as u8;
    refused(decide_egress(&maps, &nested), Reason::PolicyDeny, EPERM);
}

#[test]
fn a_packet_that_was_never_steered_goes_direct_from_a_permissive_pod_alone() {
    let packet = |to| Flow { steerable: false, ..flow(to, 8080, proto::TCP) };
    let mut maps = world(Mode::Strict);
    assert_eq!(decide_egress(&maps, &packet(PEER())).action, Action::Tunnel);
    maps.pods.get_mut(&POD).unwrap().mode = Mode::Permissive as u8;
    assert_eq!(dial(&maps, PEER()).action, Action::Tunnel);
    passes(decide_egress(&maps, &packet(PEER())));
    // Its policy holds, as far as addresses satisfy it.
    rule(&mut maps, Direction::Egress, known::ADDRESS, proto::TCP, Reason::PolicyNoMatch);
    assert_eq!(dial(&maps, PEER()).action, Action::Tunnel, "the handshake may satisfy it");
    refused(decide_egress(&maps, &packet(PEER())), Reason::PolicyNoMatch, EPERM);
    let vip = v4(10, 96, 0, 10);
    maps.addresses.insert(vip, AddressEntry { kind: address::SERVICE, ..AddressEntry::default() });
    maps.services.insert((vip, 8080, proto::TCP), service::TUNNEL);
    rule(&mut maps, Direction::Egress, known::ADDRESS, proto::TCP, Reason::PolicyDeny);
    assert_eq!(dial(&maps, vip).action, Action::Tunnel, "the endpoint is not chosen yet");
    refused(decide_egress(&maps, &packet(vip)), Reason::PolicyDeny, EPERM);
}

#[test]
fn remote_peers_are_tunnelled_and_judged_by_the_proxy() {
    let remote = OUTSIDE();
    let mut maps = world(Mode::Strict);
    passes(dial(&maps, remote));
    maps.ranges.push((v4(192, 0, 2, 0), 96 + 24, range::REMOTE));
    for mode in [Mode::Permissive, Mode::Strict] {
        maps.pods.get_mut(&POD).unwrap().mode = mode as u8;
        assert_eq!(dial(&maps, remote).action, Action::Tunnel);
    }
    passes(decide_egress(&maps, &flow(remote, 8080, proto::UDP)));
    rule(&mut maps, Direction::Egress, known::ADDRESS, proto::TCP, Reason::PolicyDeny);
    assert_eq!(dial(&maps, remote).action, Action::Tunnel, "its identity is not known yet");
    // A pod's own address is that pod's, whatever the range says.
    maps.policy.clear();
    let pod = AddressEntry { kind: address::POD, ..AddressEntry::default() };
    maps.addresses.insert(remote, pod);
    passes(dial(&maps, remote));
    maps.addresses.clear();
    maps.pods.get_mut(&POD).unwrap().mode = Mode::Observe as u8;
    passes(dial(&maps, remote));
}

#[test]
fn a_pod_without_svid_or_room_is_closed() {
    let mut maps = world(Mode::Strict);
    maps.pods.get_mut(&POD).unwrap().flags = 0;
    refused(dial(&maps, PEER()), Reason::SvidMissing, ECONNREFUSED);
    maps.pods.get_mut(&POD).unwrap().flags = pod::READY | pod::CLOSED;
    refused(dial(&maps, PEER()), Reason::MapFull, ECONNREFUSED);
    assert_eq!(arrive(&maps, PEER()).reason, Reason::MapFull);
    maps.pods.get_mut(&POD).unwrap().flags = pod::READY;
    assert_eq!(dial(&maps, PEER()).action, Action::Tunnel);
}

#[test]
fn egress_denies_are_answered_at_connect_and_unmet_allows_are_left_to_the_handshake() {
    let mut maps = world(Mode::Strict);
    rule(&mut maps, Direction::Egress, known::ADDRESS, proto::TCP, Reason::PolicyDeny);
    refused(dial(&maps, PEER()), Reason::PolicyDeny, EPERM);
    rule(&mut maps, Direction::Egress, known::ADDRESS, proto::TCP, Reason::PolicyNoMatch);
    assert_eq!(dial(&maps, PEER()).action, Action::Tunnel);
    let direct = dial(&maps, OUTSIDE());
    refused(direct, Reason::PolicyNoMatch, EPERM);
    assert_eq!((direct.policy, direct.revision), (9, 7));
    maps.policy.clear();
    passes(dial(&maps, OUTSIDE()));
}

#[test]
fn strict_refuses_plaintext_but_not_tunnels_probes_and_exempt_ports() {
    let mut maps = world(Mode::Strict);
    let d = arrive(&maps, PEER());
    assert_eq!((d.action, d.reason), (Action::Refuse, Reason::PlaintextRefused));
    let tunnel = decide_ingress(&maps, &flow(PEER(), TUNNEL_PORT, proto::TCP));
    assert_eq!(tunnel.action, Action::Tunnel);
    maps.probes.insert((PEER(), 8080));
    passes(arrive(&maps, PEER()));
    maps.probes.clear();
    maps.exempt.insert((POD, 8080, proto::TCP));
    passes(arrive(&maps, PEER()));
    rule(&mut maps, Direction::Ingress, known::ADDRESS, proto::TCP, Reason::PolicyNoMatch);
    assert_eq!(arrive(&maps, PEER()).reason, Reason::PolicyNoMatch, "exempt from one refusal only");
    passes(arrive(&world(Mode::Permissive), PEER()));
    passes(arrive(&maps, OWN()));
}

#[test]
fn the_agents_own_listeners_are_nobodys_destination() {
    let maps = world(Mode::Permissive);
    for port in [20_001, 20_002, 20_005] {
        let d = decide_ingress(&maps, &flow(PEER(), port, proto::TCP));
        assert_eq!((d.action, d.reason), (Action::Refuse, Reason::WrongDestination));
    }
    passes(decide_ingress(&maps, &flow(PEER(), 20_006, proto::TCP)));
}

#[test]
fn observe_judges_as_strict_would_and_touches_nothing() {
    let mut maps = world(Mode::Observe);
    let d = arrive(&maps, PEER());
    assert_eq!((d.action, d.verdict), (Action::Pass, Verdict::Forwarded), "it could be tunnelled");
    rule(&mut maps, Direction::Ingress, known::AUTHENTICATED, proto::TCP, Reason::PolicyDeny);
    let d = arrive(&maps, PEER());
    assert_eq!((d.action, d.verdict), (Action::Pass, Verdict::Audit));
    assert_eq!(d.reason, Reason::PolicyDeny);
    let d = arrive(&maps, OUTSIDE());
    assert_eq!((d.action, d.verdict), (Action::Pass, Verdict::Audit));
    assert_eq!(d.reason, Reason::PlaintextRefused);
}

#[test]
fn unknown_pods_are_refused_while_the_agent_lives_and_enforces() {
    let mut maps = world(Mode::Strict);
    maps.pods.clear();
    let unknown = Flow { task_netns: 0, ..flow(PEER(), 8080, proto::TCP) };
    refused(decide_egress(&maps, &unknown), Reason::PodUnregistered, ECONNREFUSED);
    assert_eq!(decide_ingress(&maps, &unknown).reason, Reason::PodUnregistered);
    maps.probes.insert((PEER(), 8080));
    passes(decide_ingress(&maps, &unknown));
    let cases: [(fn(&mut Config), Action); 6] = [
        (|c| c.enforcing = 0, Action::Pass),
        (|c| c.heartbeat = NOW - HEARTBEAT_NS, Action::Pass),
        (
            |c| {
                c.heartbeat = NOW - HEARTBEAT_NS;
                c.deny_when_dead = 1;
            },
            Action::Refuse,
        ),
        (|c| c.unknown_pods = unknown_pods::ALLOW, Action::Pass),
        (
            |c| {
                c.unknown_pods = unknown_pods::DENY;
                c.enforcing = 0;
            },
            Action::Refuse,
        ),
        (|c| c.enforcement = enforcement::OFF, Action::Pass),
    ];
    for (i, (change, action)) in cases.into_iter().enumerate() {
        let mut maps = maps.clone();
        change(&mut maps.config);
        assert_eq!(decide_egress(&maps, &unknown).action, action, "case {i}");
    }
    let host = Flow { netns: HOST, ..unknown };
    assert!(!decide_egress(&maps, &host).report, "host network is not a pod's");

    // The guard refuses until its deadline, whatever is known of enforcement; then it is over.
    maps.config.enforcing = 0;
    maps.config.guarded_until = 1;
    for (deadline, action) in [(NOW + 1, Action::Refuse), (NOW, Action::Pass)] {
        maps.config.heartbeat = deadline;
        assert_eq!(decide_egress(&maps, &unknown).action, action);
        // Probes are told apart all the same, and an override opens at once.
        passes(decide_ingress(&maps, &unknown));
    }
    maps.config.heartbeat = NOW + 1;
    maps.config.enforcement = enforcement::OFF;
    assert_eq!(decide_egress(&maps, &unknown).action, Action::Pass);
}

#[test]
fn a_new_network_namespace_inside_a_pod_is_never_its_tunnel() {
    let inside = Flow { netns: 77, ..flow(PEER(), 8080, proto::TCP) };
    let strict = decide_egress(&world(Mode::Strict), &inside);
    refused(strict, Reason::PodUnregistered, ECONNREFUSED);
    passes(decide_egress(&world(Mode::Permissive), &inside));
}

#[test]
fn a_socket_in_another_pods_hands_is_refused() {
    let mut maps = world(Mode::Strict);
    let entry = maps.pods[&POD];
    maps.pods.insert(OTHER_POD, entry);
    let stolen = Flow { task_netns: OTHER_POD, ..flow(PEER(), 8080, proto::TCP) };
    refused(decide_egress(&maps, &stolen), Reason::IdentityMismatch, EPERM);
    let own = Flow { task_netns: POD, ..stolen };
    assert_eq!(decide_egress(&maps, &own).action, Action::Tunnel);
}

#[test]
fn udp_is_judged_by_policy_and_other_protocols_by_their_switch() {
    let mut maps = world(Mode::Strict);
    let udp = flow(PEER(), 8080, proto::UDP);
    passes(decide_egress(&maps, &udp));
    passes(decide_ingress(&maps, &udp));
    rule(&mut maps, Direction::Egress, known::ADDRESS, proto::UDP, Reason::PolicyDeny);
    rule(&mut maps, Direction::Ingress, known::ADDRESS, proto::UDP, Reason::PolicyNoMatch);
    refused(decide_egress(&maps, &udp), Reason::PolicyDeny, EPERM);
    assert_eq!(decide_ingress(&maps, &udp).reason, Reason::PolicyNoMatch);
    let icmp = flow(PEER(), 0, 1);
    assert_eq!(decide_egress(&maps, &icmp).action, Action::Pass);
    maps.pods.get_mut(&POD).unwrap().flags |= pod::DENY_OTHER;
    refused(decide_egress(&maps, &icmp), Reason::PolicyDeny, EPERM);
}

#[test]
fn enforcement_audit_reports_and_lets_pass() {
    let mut maps = world(Mode::Strict);
    maps.config.enforcement = enforcement::AUDIT;
    let d = arrive(&maps, PEER());
    assert_eq!((d.action, d.verdict), (Action::Pass, Verdict::Audit));
    assert_eq!(d.reason, Reason::PlaintextRefused);
    maps.config.enforcement = enforcement::OFF;
    assert!(!arrive(&maps, PEER()).report);
}
