use proptest::{
    collection::vec,
    option,
    prelude::*,
    sample::{Index, select},
};
use signet_ebpf::{
    abi::{AddressEntry, Config, Mode, PodEntry, address, range},
    decide::{Flow, PolicyMaps, decide_egress, decide_ingress},
};

use super::*;
use crate::policy::{
    asked::{
        Operation, PathPattern, PrincipalPattern, RequestCondition, RequestKey, RequestSource,
    },
    model::{Action, Condition, Destination, Peer, Ports, Rule, Selector, Target},
};

const POD: u64 = 7;

/// The kernel's maps with the compiled policy, looked up by longest prefix.
struct Maps {
    config: Config,
    pod: PodEntry,
    peer: Option<AddressEntry>,
    policy: Vec<PolicyEntry>,
}

impl PolicyMaps for Maps {
    fn config(&self) -> Option<&Config> {
        Some(&self.config)
    }
    fn pod(&self, netns: u64) -> Option<&PodEntry> {
        (netns == POD).then_some(&self.pod)
    }
    fn is_own(&self, _: u64, _: Ip) -> bool {
        false
    }
    fn address(&self, _: Ip) -> Option<&AddressEntry> {
        self.peer.as_ref()
    }
    fn service(&self, _: Ip, _: u16, _: u8) -> Option<u32> {
        None
    }
    fn range(&self, _: Ip) -> Option<u32> {
        Some(range::OUTSIDE)
    }
    fn policy(&self, _: u64, bits: u32, key: &PolicyKey) -> Option<&PolicyValue> {
        self.policy
            .iter()
            .filter(|(length, entry, _)| *length <= bits && shares(&entry.0, &key.0, *length))
            .max_by_key(|(length, ..)| *length)
            .map(|(.., value)| value)
    }
    fn is_exempt(&self, _: u64, _: u16, _: u8) -> bool {
        false
    }
    fn is_probe(&self, _: &Flow) -> bool {
        false
    }
}

/// True when the first `bits` bits are the same.
fn shares(a: &[u8; 20], b: &[u8; 20], bits: u32) -> bool {
    (0..bits as usize).all(|i| (a[i / 8] ^ b[i / 8]) & (0x80 >> (i % 8)) == 0)
}

pub(in crate::policy) fn domain() -> TrustDomain {
    TrustDomain::parse("cluster.local").unwrap()
}

pub(in crate::policy) fn identities() -> Vec<(u32, SpiffeId)> {
    [("shop", "front"), ("shop", "pay"), ("evil", "front")]
        .into_iter()
        .enumerate()
        .map(|(i, (ns, sa))| {
            let id = SpiffeId::for_service_account(&domain(), ns, sa).unwrap();
            (256 + i as u32, id)
        })
        .collect()
}

/// The pod's own addresses: two of one family, so that they cannot always be told apart.
fn own_addresses() -> [IpAddr; 3] {
    ["10.1.2.3", "10.200.0.1", "fd00:1::5"].map(|ip| ip.parse().unwrap())
}

fn number_of(name: &PolicyName) -> u32 {
    name.name.parse().unwrap()
}

fn compiled(policies: &[Arc<Policy>], default_deny: bool, observe: bool) -> Vec<PolicyEntry> {
    compile(&CompileInput {
        policies,
        default_deny,
        trust_domain: &domain(),
        aliases: &[],
        identities: &identities(),
        number: &number_of,
        observe,
        local_ips: &own_addresses(),
        max_entries: 1_000_000,
    })
    .unwrap()
}

fn texts(from: &'static [&'static str]) -> impl Strategy<Value = Vec<Arc<str>>> {
    prop_oneof![
        3 => Just(vec![]),
        1 => vec(select(from).prop_map(Arc::from), 1..3),
    ]
}

fn accounts() -> impl Strategy<Value = Vec<(Arc<str>, Arc<str>)>> {
    let pair = (select(&["shop", "evil"][..]), select(&["front", "pay"][..]));
    prop_oneof![
        3 => Just(vec![]),
        1 => vec(pair.prop_map(|(n, a)| (n.into(), a.into())), 1..3),
    ]
}

fn blocks() -> impl Strategy<Value = Vec<IpNet>> {
    const BLOCKS: &[&str] = &[
        "0.0.0.0/0",
        "10.0.0.0/8",
        "10.0.0.0/9",
        "10.128.0.0/9",
        "10.1.0.0/16",
        "10.1.2.3/32",
        "::/0",
        "::/1",
        "8000::/1",
        "::/80",
        "fd00::/8",
        "fd00:1::/32",
        "fd00:1::5/128",
    ];
    let block = select(BLOCKS).prop_map(|b| b.parse().unwrap());
    prop_oneof![2 => Just(vec![]), 1 => vec(block, 1..4)]
}

fn peer() -> impl Strategy<Value = Peer> {
    const IDS: &[&str] = &[
        "*",
        "*/sa/front",
        "spiffe://cluster.local/ns/shop/*",
        "spiffe://clu*",
        "spiffe://cluster.local/ns/evil/sa/front",
        "spiffe://other.test/*",
    ];
    const SPACES: &[&str] = &["shop", "ev*", "*op", "*"];
    const DOMAINS: &[&str] = &["cluster.local", "*", "clu*", "*.test", "other.test"];
    (
        (texts(IDS), texts(IDS), texts(SPACES), texts(SPACES)),
        (accounts(), accounts(), blocks(), blocks()),
        (texts(DOMAINS), texts(DOMAINS), prop::bool::weighted(0.1), targets()),
        source(),
    )
        .prop_map(
            |((i, ni, n, nn), (a, na, b, nb), (d, nd, unidentified, targets), request)| Peer {
                request,
                identities: i,
                not_identities: ni,
                namespaces: n,
                not_namespaces: nn,
                service_accounts: a,
                not_service_accounts: na,
                trust_domains: d,
                not_trust_domains: nd,
                services: if targets.is_empty() { vec![] } else { vec![("a".into(), "b".into())] },
                targets,
                unidentified,
                ip_blocks: b,
                not_ip_blocks: nb,
            },
        )
}

/// Where services are: some at one port, some at several.
fn targets() -> impl Strategy<Value = Vec<Target>> {
    const AT: &[&str] = &["10.1.2.3", "10.0.0.1", "192.0.2.1", "fd00:1::5", "2001:db8::1"];
    let one = (select(AT), select(&[53u16, 80, 8080][..]), select(&[6u8, 17][..]));
    let one =
        one.prop_map(|(ip, port, protocol)| Target { ip: ip.parse().unwrap(), port, protocol });
    prop_oneof![3 => Just(vec![]), 1 => vec(one, 1..6)]
}

fn port() -> impl Strategy<Value = u16> {
    prop_oneof![
        select(&[0u16, 1, 53, 80, 81, 1023, 1024, 8080, 32768, 65534, 65535][..]),
        any::<u16>()
    ]
}

fn ports() -> impl Strategy<Value = Vec<Ports>> {
    let one = (port(), port(), option::of(select(&[6u8, 17][..])))
        .prop_map(|(a, b, protocol)| Ports { first: a.min(b), last: a.max(b), protocol });
    prop_oneof![2 => Just(vec![]), 1 => vec(one, 1..3)]
}

fn destination() -> impl Strategy<Value = Destination> {
    (ports(), ports(), operation()).prop_map(|(ports, not_ports, operation)| Destination {
        ports,
        not_ports,
        operation,
    })
}

/// Mostly nothing: requests are asked about by some rules only.
fn operation() -> impl Strategy<Value = Operation> {
    const METHODS: &[&str] = &["GET", "P*", "*T", "*"];
    const PATHS: &[&str] = &["/a", "/a/*", "/a/{*}", "/{**}", "*/b"];
    const HOSTS: &[&str] = &["shop.example", "*.example", "shop*", "*"];
    let paths = || {
        texts(PATHS).prop_map(|all| all.iter().map(|p| PathPattern::parse(p).unwrap()).collect())
    };
    let some = (texts(METHODS), texts(METHODS), paths(), paths(), texts(HOSTS), texts(HOSTS));
    let some = some.prop_map(|(methods, not_methods, paths, not_paths, hosts, not_hosts)| {
        Operation { methods, not_methods, paths, not_paths, hosts, not_hosts }
    });
    prop_oneof![3 => Just(Operation::default()), 1 => some]
}

fn source() -> impl Strategy<Value = RequestSource> {
    const USERS: &[&str] =
        &["*", "https://login.example/alice", "https://login.example/*", "*/bob"];
    let users =
        || texts(USERS).prop_map(|all| all.iter().map(|p| PrincipalPattern::new(p)).collect());
    let some = (users(), users(), blocks(), blocks());
    let some = some.prop_map(|(principals, not_principals, remote_blocks, not_remote_blocks)| {
        RequestSource { principals, not_principals, remote_blocks, not_remote_blocks }
    });
    prop_oneof![4 => Just(RequestSource::default()), 1 => some]
}

fn request_condition() -> impl Strategy<Value = RequestCondition> {
    const VALUES: &[&str] = &["gold", "go*", "*ld", "*"];
    let key = prop_oneof![
        Just(RequestKey::Header(http::HeaderName::from_static("x-tier"))),
        Just(RequestKey::Audiences),
        Just(RequestKey::Presenter),
        Just(RequestKey::Claim(vec!["tier".into()])),
        Just(RequestKey::Sni),
    ];
    (key, texts(VALUES), texts(VALUES)).prop_map(|(key, values, not_values)| RequestCondition {
        key,
        values,
        not_values,
    })
}

fn condition() -> impl Strategy<Value = Condition> {
    prop_oneof![
        2 => peer().prop_map(|peer| Condition::Peer(Box::new(peer))),
        2 => destination().prop_map(Condition::To),
        1 => (blocks(), blocks())
            .prop_map(|(blocks, not_blocks)| Condition::Local { blocks, not_blocks }),
        1 => request_condition().prop_map(|condition| Condition::Request(Box::new(condition))),
    ]
}

fn rule() -> impl Strategy<Value = Rule> {
    (
        vec(peer(), 0..3),
        vec(destination(), 0..3),
        prop_oneof![2 => Just(vec![]), 1 => vec(condition(), 1..3)],
        any::<bool>(),
        (prop::bool::weighted(0.05), prop::bool::weighted(0.1)),
    )
        .prop_map(|(peers, to, when, unauthenticated, (never, unsupported))| Rule {
            peers,
            to,
            when,
            unauthenticated,
            never,
            unsupported: if unsupported { vec!["x".into()] } else { vec![] },
        })
}

fn blank(name: &str, action: Action) -> Policy {
    let name = PolicyName { kind: "k".into(), namespace: "shop".into(), name: name.into() };
    Policy::new(name, Selector::default(), action)
}

pub(in crate::policy) fn policies() -> impl Strategy<Value = Vec<Arc<Policy>>> {
    let action = select(&[Action::Allow, Action::Deny, Action::Audit][..]);
    let unsupported = prop_oneof![9 => Just(vec![]), 1 => Just(vec!["x".to_owned()])];
    let rules = || option::of(vec(rule(), 0..3));
    let one = (action, rules(), rules(), unsupported, prop::bool::weighted(0.15));
    (vec(one, 0..4), option::of(builtin())).prop_map(|(all, builtin)| {
        let mut policies = Vec::new();
        for (action, ingress, egress, unsupported, dry_run) in all {
            let name = (policies.len() + 1).to_string();
            policies.push(Arc::new(Policy {
                governs_ingress: ingress.is_some(),
                governs_egress: egress.is_some(),
                ingress: ingress.unwrap_or_default(),
                egress: egress.unwrap_or_default(),
                dry_run,
                unsupported,
                ..blank(&name, action)
            }));
        }
        policies.extend(builtin.map(Arc::new));
        policies
    })
}

/// The DNS built-in over some places; it goes last, as the reconciler has it.
fn builtin() -> impl Strategy<Value = Policy> {
    (targets(), vec(addresses(), 0..2)).prop_map(|(targets, addresses)| {
        let services = if targets.is_empty() { vec![] } else { vec![("a".into(), "b".into())] };
        let name = PolicyName { kind: "k".into(), namespace: "".into(), name: "9".into() };
        Policy { name, ..crate::policy::builtin::dns(services, targets, &addresses) }
    })
}

pub(in crate::policy) fn addresses() -> impl Strategy<Value = IpAddr> {
    const SOME: &[&str] = &[
        "10.0.0.1",
        "10.1.0.1",
        "10.1.2.3",
        "10.128.0.1",
        "192.0.2.1",
        "255.255.255.255",
        "fd00::1",
        "fd00:1::1",
        "fd00:1::5",
        "2001:db8::1",
        "8000::",
        "::2",
        "::1:0:0",
    ];
    prop_oneof![
        select(SOME).prop_map(|a| a.parse().unwrap()),
        any::<u32>()
            .prop_map(|a| IpAddr::from(std::net::Ipv4Addr::from(a | 0x0100_0000)))
            .prop_filter("not the loopback", |ip| !ip.is_loopback()),
        any::<u128>().prop_map(|a| IpAddr::V6(Ipv6Addr::from(a | 2)).to_canonical()),
    ]
}

fn ip_of(ip: IpAddr) -> Ip {
    match ip {
        IpAddr::V4(v4) => Ip::from_octets(v4.to_ipv6_mapped().octets()),
        IpAddr::V6(v6) => Ip::from_octets(v6.octets()),
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1500))]

    /// The kernel's verdict over what is compiled is the evaluation's.
    #[test]
    fn the_kernel_and_the_evaluation_agree(
        policies in policies(),
        default_deny: bool,
        observe: bool,
        flows in vec((addresses(), option::of(any::<Index>()), port(), any::<bool>(), any::<bool>()), 1..24),
    ) {
        let entries = compiled(&policies, default_deny, observe);
        let known = identities();
        let domain = domain();
        for (ip, who, port, udp, egress) in flows {
            // Listener port 0 means none; a flow to port 0 is not one.
            if port == 0 {
                continue;
            }
            let who = who.map(|index| index.get(&known));
            // Observed TCP is judged as authenticated, only from peers that can be enrolled;
            // plaintext from others is not policy's to judge there.
            if observe && !udp && !egress && who.is_none() {
                continue;
            }
            let authenticated = observe && who.is_some() && (egress || !udp);
            let peer = match who {
                None => PeerIdentity::Unknown,
                Some((_, id)) if authenticated => PeerIdentity::Authenticated(id),
                Some((_, id)) => PeerIdentity::Address(id),
            };
            let protocol = if udp { proto::UDP } else { proto::TCP };
            let direction = if egress { Direction::Egress } else { Direction::Ingress };
            let wanted = evaluate(&policies, default_deny, &FlowFacts {
                direction,
                trust_domain: &domain,
                aliases: &[],
                peer,
                peer_ip: ip,
                local_ips: &own_addresses(),
                port,
                protocol,
            });
            let mode = if observe { Mode::Observe } else { Mode::Permissive };
            let maps = Maps {
                config: Config::default(),
                pod: PodEntry { mode: mode as u8, ..PodEntry::default() },
                peer: who.map(|(number, _)| AddressEntry {
                    identity: *number,
                    kind: address::POD,
                    flags: address::ENROLLABLE,
                    pad: 0,
                }),
                policy: entries.clone(),
            };
            let flow = Flow {
                netns: POD,
                task_netns: 0,
                local: Ip::UNSPECIFIED,
                remote: ip_of(ip),
                local_port: if egress { 40_000 } else { port },
                remote_port: if egress { port } else { 40_000 },
                protocol,
                steerable: true,
                now: 0,
            };
            let got = if egress { decide_egress(&maps, &flow) } else { decide_ingress(&maps, &flow) };
            let told = wanted.audit.as_ref().filter(|_| wanted.is_allowed());
            let number = told.or(wanted.policy.as_ref()).map_or(0, |p| number_of(&p.name));
            prop_assert_eq!(got.reason, wanted.reason, "{:?} {:?} {:?}", ip, who, flow);
            prop_assert_eq!(got.policy, number, "{:?} {:?} {:?}", ip, who, flow);
            if wanted.is_allowed() {
                let audit = got.verdict == signet_ebpf::abi::Verdict::Audit;
                prop_assert_eq!(audit, wanted.audit.is_some());
            }
        }
    }

    #[test]
    fn prefixes_cover_exactly(a: u16, b: u16, probe: u16) {
        let (first, last) = (a.min(b), a.max(b));
        let rows = prefixes(first, last);
        prop_assert!(rows.len() <= 30);
        let hits = rows.iter().filter(|(port, bits)| {
            let shift = 16 - u32::from(*bits);
            u32::from(*port) >> shift == u32::from(probe) >> shift
        });
        let inside = (first..=last).contains(&probe);
        prop_assert_eq!(hits.count(), usize::from(inside));
    }

    #[test]
    fn no_two_entries_have_one_key(policies in policies(), default_deny: bool, observe: bool) {
        let entries = compiled(&policies, default_deny, observe);
        let mut keys: Vec<_> = entries.iter().map(|(bits, key, _)| (*bits, key.0)).collect();
        let all = keys.len();
        keys.sort_unstable();
        keys.dedup();
        prop_assert_eq!(keys.len(), all);
    }
}

fn allow(ports: Vec<Ports>, peers: Vec<Peer>) -> Vec<Arc<Policy>> {
    vec![Arc::new(Policy {
        ingress: vec![Rule::of(peers, ports)],
        governs_ingress: true,
        ..blank("1", Action::Allow)
    })]
}

#[test]
fn nothing_governed_needs_no_entry() {
    assert!(compiled(&[], false, true).is_empty());
    assert!(!compiled(&[], true, false).is_empty());
    // Only ingress is governed: nothing about egress.
    let entries = compiled(&allow(vec![], vec![]), false, true);
    assert!(!entries.is_empty());
    assert!(entries.iter().all(|(_, key, _)| key.0[1] == Direction::Ingress as u8));
}

#[test]
fn an_allowed_port_is_two_rows_a_protocol() {
    let ports = vec![Ports { first: 8080, last: 8080, protocol: Some(6) }];
    let entries = compiled(&allow(ports, vec![]), false, false);
    // TCP: no match, but for 8080; UDP: no match.
    assert_eq!(entries.len(), 3, "{entries:?}");
}

#[test]
fn too_many_entries_are_refused_with_a_reason() {
    let input = |max_entries| {
        let policies = allow(vec![Ports { first: 1, last: 65534, protocol: None }], vec![]);
        compile(&CompileInput {
            policies: &policies,
            default_deny: false,
            trust_domain: &domain(),
            aliases: &[],
            identities: &identities(),
            number: &number_of,
            observe: false,
            local_ips: &own_addresses(),
            max_entries,
        })
    };
    assert!(input(100).is_ok());
    let error = input(3).unwrap_err();
    assert_eq!(error, CompileError::TooLarge { limit: 3 });
    assert_eq!(error.reason(), Reason::MapFull);
}
