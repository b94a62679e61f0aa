//! The raw guard's verdict over tables of flows: what passes, and what each refusal rests on.

use std::{cell::RefCell, collections::HashSet, net::IpAddr};

use signet_ebpf::{
    abi::{FlowKey, FragmentKey, Ip},
    guard::{self, Frame, FrameVerdict, GuardMaps, Kind, judge_frame, tcp},
};

const POD: u64 = 7;
const TCP: u8 = 6;
const UDP: u8 = 17;
const ICMP: u8 = 1;
const ICMPV6: u8 = 58;

#[derive(Default)]
struct Tables {
    own: HashSet<(u64, Ip)>,
    flows: HashSet<FlowKey>,
    arrived: HashSet<FlowKey>,
    fragments: RefCell<HashSet<FragmentKey>>,
}

impl GuardMaps for Tables {
    fn is_own(&self, netns: u64, ip: Ip) -> bool {
        self.own.contains(&(netns, ip))
    }

    fn has_flow(&self, key: &FlowKey) -> bool {
        self.flows.contains(key)
    }

    fn has_arrived(&self, key: &FlowKey) -> bool {
        self.arrived.contains(key)
    }

    fn has_fragment(&self, key: &FragmentKey) -> bool {
        self.fragments.borrow().contains(key)
    }
}

fn ip(text: &str) -> Ip {
    Ip::from_std(text.parse::<IpAddr>().unwrap())
}

/// A pod with an address of each family.
fn pod() -> Tables {
    let own = ["10.0.0.1", "fd00::1", "fe80::1"].map(|text| (POD, ip(text)));
    Tables { own: own.into(), ..Tables::default() }
}

fn frame(source: &str, destination: &str, protocol: u8) -> Frame {
    Frame {
        kind: Kind::Ip,
        source: ip(source),
        destination: ip(destination),
        source_port: 0,
        destination_port: 0,
        protocol,
        detail: 0,
        later_fragment: false,
        first_fragment: false,
        fragment_id: 0,
        target: Ip::UNSPECIFIED,
        quoted_protocol: 0,
    }
}

fn ports(frame: Frame, source_port: u16, destination_port: u16) -> Frame {
    Frame { source_port, destination_port, ..frame }
}

fn judged(tables: &Tables, frame: &Frame) -> FrameVerdict {
    judge_frame(tables, POD, frame)
}

use FrameVerdict::{Pass, PassFirst, Spoofed, Unattested};

#[test]
fn only_flows_of_sockets_leave() {
    let mut tables = pod();
    for (source, destination) in [("10.0.0.1", "10.0.0.2"), ("fd00::1", "fd00::2")] {
        for protocol in [TCP, UDP, 132] {
            let frame = ports(frame(source, destination, protocol), 40_000, 80);
            assert_eq!(judged(&tables, &frame), Unattested);
            tables.flows.insert(guard::flow_of(POD, &frame));
            assert_eq!(judged(&tables, &frame), Pass, "the control");
            // The same in another pod's name, from another port, to another destination.
            assert_ne!(judge_frame(&tables, 8, &frame), Pass);
            assert_eq!(judged(&tables, &ports(frame, 40_001, 80)), Unattested);
            assert_eq!(judged(&tables, &ports(frame, 40_000, 81)), Unattested);
        }
    }
}

#[test]
fn an_address_that_is_not_the_pods_is_spoofed_whatever_it_carries() {
    let mut tables = pod();
    let spoofed = ports(frame("10.0.0.9", "10.0.0.2", UDP), 53, 5000);
    // Even where somebody recorded that flow.
    tables.flows.insert(guard::flow_of(POD, &spoofed));
    assert_eq!(judged(&tables, &spoofed), Spoofed);
    for kind in [Kind::Arp, Kind::Ip] {
        let claim = Frame { kind, ..frame("10.0.0.9", "10.0.0.2", ICMP) };
        assert_eq!(judged(&tables, &claim), Spoofed);
    }
    let unspecified = frame("0.0.0.0", "10.0.0.2", UDP);
    assert_eq!(judged(&tables, &unspecified), Spoofed);
}

#[test]
fn the_link_stays_alive_under_own_addresses() {
    let tables = pod();
    let arp = |source| Frame { kind: Kind::Arp, ..frame(source, "10.0.0.2", 0) };
    assert_eq!(judged(&tables, &arp("10.0.0.1")), Pass);
    assert_eq!(judged(&tables, &arp("0.0.0.0")), Pass, "a probe for a duplicate");
    assert_eq!(judged(&tables, &ports(frame("0.0.0.0", "255.255.255.255", UDP), 68, 67)), Pass);
    // No way out for a packet socket: what a router would forward is no word to the link.
    let dhcp = |to| ports(frame("10.0.0.1", to, UDP), 68, 67);
    assert_eq!(judged(&tables, &dhcp("255.255.255.255")), Pass);
    assert_eq!(judged(&tables, &dhcp("203.0.113.1")), Unattested);
    let dhcp6 = |to| ports(frame("fe80::1", to, UDP), 546, 547);
    assert_eq!(judged(&tables, &dhcp6("ff02::1:2")), Pass);
    assert_eq!(judged(&tables, &dhcp6("2001:db8::1")), Unattested);
    assert_eq!(judged(&tables, &frame("10.0.0.1", "224.0.0.22", 2)), Pass);
    assert_eq!(judged(&tables, &frame("10.0.0.1", "203.0.113.1", 2)), Unattested);
    let listener = Frame { detail: 143, ..frame("fe80::1", "2001:db8::1", ICMPV6) };
    assert_eq!(judged(&tables, &listener), Unattested);
    let icmp = |source, detail| Frame { detail, ..frame(source, "ff02::1", ICMPV6) };
    for detail in [131, 132, 143, 133, 135] {
        assert_eq!(judged(&tables, &icmp("fe80::1", detail)), Pass, "type {detail}");
        assert_eq!(judged(&tables, &icmp("::", detail)), Pass, "type {detail}");
        assert_eq!(judged(&tables, &icmp("fe80::2", detail)), Spoofed, "type {detail}");
    }
    // Router advertisements and redirects are no pod's to send.
    for detail in [134, 137] {
        assert_eq!(judged(&tables, &icmp("fe80::1", detail)), Unattested, "type {detail}");
    }
    let advertised = |target| Frame { target: ip(target), ..icmp("fe80::1", 136) };
    assert_eq!(judged(&tables, &advertised("fd00::1")), Pass);
    assert_eq!(judged(&tables, &advertised("fd00::2")), Spoofed);
    let other = Frame { kind: Kind::Other, ..frame("10.0.0.1", "10.0.0.2", TCP) };
    assert_eq!(judged(&tables, &other), Unattested);
}

#[test]
fn the_kernel_answers_what_arrived_and_nothing_else() {
    let mut tables = pod();
    let answer = |detail| Frame { detail, ..ports(frame("10.0.0.1", "10.0.0.2", TCP), 80, 4000) };
    let pong = Frame { detail: 0, ..frame("10.0.0.1", "10.0.0.2", ICMP) };
    let pong6 = Frame { detail: 129, ..frame("fd00::1", "fd00::2", ICMPV6) };
    let answers = [answer(tcp::RST), answer(tcp::SYN | tcp::ACK), pong, pong6];
    for frame in &answers {
        assert_eq!(judged(&pod(), frame), Unattested);
        tables.arrived.insert(guard::flow_of(POD, frame));
        assert_eq!(judged(&tables, frame), Pass);
    }
    // That a SYN arrived does not let a packet socket send data, or dial back.
    for detail in [tcp::ACK, tcp::ACK | 0x08, tcp::SYN] {
        assert_eq!(judged(&tables, &answer(detail)), Unattested, "flags {detail:#x}");
    }
    let ping = Frame { detail: 8, ..pong };
    assert_eq!(judged(&tables, &ping), Unattested);
}

#[test]
fn icmp_errors_quote_what_arrived_from_their_receiver() {
    let mut tables = pod();
    let quoted = ports(frame("10.0.0.1", "10.0.0.2", UDP), 53, 4000);
    let error = Frame {
        detail: 3,
        target: ip("10.0.0.1"),
        quoted_protocol: UDP,
        ..ports(frame("10.0.0.1", "10.0.0.2", ICMP), 53, 4000)
    };
    assert_eq!(judged(&tables, &error), Unattested);
    tables.arrived.insert(guard::flow_of(POD, &quoted));
    assert_eq!(judged(&tables, &error), Pass);
    // Nothing quoted that the receiver sent: the parser says so by protocol 0.
    assert_eq!(judged(&tables, &Frame { quoted_protocol: 0, ..error }), Unattested);
    assert_eq!(judged(&tables, &Frame { source_port: 54, ..error }), Unattested);
    let redirect = Frame { detail: 5, ..error };
    assert_eq!(judged(&tables, &redirect), Unattested);
}

#[test]
fn fragments_follow_a_first_one_that_passed() {
    let mut tables = pod();
    let first = Frame {
        first_fragment: true,
        fragment_id: 9,
        ..ports(frame("10.0.0.1", "10.0.0.2", UDP), 4000, 53)
    };
    let later =
        Frame { later_fragment: true, fragment_id: 9, ..frame("10.0.0.1", "10.0.0.2", UDP) };
    assert_eq!(judged(&tables, &first), Unattested);
    assert_eq!(judged(&tables, &later), Unattested);
    tables.flows.insert(guard::flow_of(POD, &first));
    assert_eq!(judged(&tables, &first), PassFirst);
    tables.fragments.borrow_mut().insert(guard::fragment_of(POD, &first));
    assert_eq!(judged(&tables, &later), Pass);
    assert_eq!(judged(&tables, &Frame { fragment_id: 10, ..later }), Unattested);
}

#[test]
fn a_namespace_inside_the_pod_is_forwarded_to_where_its_sockets_may_go() {
    let mut tables = pod();
    let inner = ports(frame("172.17.0.2", "203.0.113.1", TCP), 4000, 443);
    let mut key = guard::flow_of(POD, &inner);
    guard::forward(&mut key);
    tables.flows.insert(key);
    let masqueraded = ports(frame("10.0.0.1", "203.0.113.1", TCP), 61_000, 443);
    assert_eq!(judged(&tables, &masqueraded), Pass);
    assert_eq!(judged(&tables, &ports(masqueraded, 61_000, 80)), Unattested);
    assert_eq!(judged(&tables, &inner), Spoofed, "not masqueraded");
}
