use signet_ebpf::abi::Mode;

use super::*;
use crate::cluster::objects::{Conditions, Labels, NamespaceFacts, NodeFacts};

fn around() -> Surroundings {
    Surroundings {
        trust_domain: TrustDomain::parse("cluster.local").unwrap(),
        ranges: Ranges::default(),
        federation: Arc::default(),
        policies: vec![],
        request_authentications: Vec::new(),
        peer_authentications: vec![],
        root_namespace: "istio-system".into(),
        enforcement: Override::Absent,
        announced: HashMap::new(),
        problems: vec![],
        synced: Synced { pods: true, policies: true },
    }
}

fn name(name: &str) -> ObjectName {
    ObjectName { namespace: "shop".into(), name: name.into() }
}

fn pod(uid: &str, created: i64) -> PodFacts {
    PodFacts {
        uid: uid.into(),
        name: name(uid),
        service_account: "default".into(),
        node: Some("n1".into()),
        ips: vec!["10.0.0.1".parse().unwrap()],
        labels: Arc::default(),
        workload: None,
        host_network: false,
        finished: false,
        alive: true,
        mirror: false,
        terminating: false,
        created,
        named_ports: BTreeMap::new(),
        unenforceable: None,
        captured: false,
        origin: "".into(),
    }
}

fn owner(pods: Vec<PodFacts>) -> Option<String> {
    let objects = Objects { pods: pods.into_iter().map(Arc::new).collect(), ..Objects::default() };
    let world = Assembler::default().assemble(&objects, around());
    world.pods_by_ip.get(&"10.0.0.1".parse().unwrap()).map(ToString::to_string)
}

#[test]
fn the_newest_living_pod_has_the_address() {
    assert_eq!(owner(vec![pod("old", 1), pod("new", 2)]).as_deref(), Some("new"));
    assert_eq!(owner(vec![pod("new", 2), pod("old", 1)]).as_deref(), Some("new"));
    let finished = PodFacts { finished: true, alive: false, ..pod("done", 9) };
    assert_eq!(owner(vec![pod("old", 1), finished.clone()]).as_deref(), Some("old"));
    assert_eq!(owner(vec![finished]), None);
    let host = PodFacts { host_network: true, ..pod("host", 9) };
    assert_eq!(owner(vec![host]), None);
    let leaving = PodFacts { terminating: true, ..pod("z-leaving", 5) };
    assert_eq!(owner(vec![leaving, pod("a-here", 5)]).as_deref(), Some("a-here"));
}

fn slice(ports: &[(&str, Option<u16>)], endpoints: &[(&str, bool, bool, bool)]) -> SliceFacts {
    SliceFacts {
        service: name("web"),
        ports: ports.iter().map(|(n, p)| ((*n).into(), *p, 6)).collect(),
        endpoints: endpoints
            .iter()
            .map(|(ip, ready, serving, terminating)| {
                let (ready, serving, terminating) = (*ready, *serving, *terminating);
                EndpointFacts {
                    ip: ip.parse().unwrap(),
                    conditions: Conditions { ready, serving, terminating },
                    node: None,
                    zones: [].into(),
                }
            })
            .collect(),
    }
}

fn targets(slices: Vec<SliceFacts>, port: usize) -> Vec<(String, u16)> {
    let service = ServiceFacts {
        name: name("web"),
        cluster_ips: vec!["10.96.0.1".parse().unwrap()],
        external_ips: vec![],
        node_local: false,
        sticky: false,
        ports: vec![("http".into(), 80, 6), ("admin".into(), 81, 6)],
        is_resolver: false,
    };
    let objects = Objects {
        services: vec![Arc::new(service)],
        slices: slices.into_iter().map(Arc::new).collect(),
        ..Objects::default()
    };
    let world = Assembler::default().assemble(&objects, around());
    assert_eq!(world.services_by_ip[&"10.96.0.1".parse().unwrap()], name("web"));
    let service = &world.services[&name("web")];
    service.ports[port].endpoints.iter().map(|e| (e.ip.to_string(), e.port)).collect()
}

#[test]
fn service_ports_lead_to_ready_endpoints_by_name() {
    let all = [
        ("10.0.0.2", true, true, false),
        ("10.0.0.1", true, true, false),
        ("10.0.0.3", false, false, false),
        ("10.0.0.4", false, true, true),
    ];
    let slices = || {
        vec![
            slice(&[("http", Some(8080)), ("admin", None)], &all),
            // The same endpoint in a second slice counts once.
            slice(&[("http", Some(8080))], &all[..1]),
        ]
    };
    let at = |hosts: &[u8], port: u16| -> Vec<(String, u16)> {
        hosts.iter().map(|host| (format!("10.0.0.{host}"), port)).collect()
    };
    // What is not ready takes nothing, unless it leaves and still serves.
    assert_eq!(targets(slices(), 0), at(&[1, 2, 4], 8080));
    // Without a number of its own, the Service's.
    assert_eq!(targets(slices(), 1), at(&[1, 2, 4], 81));
    let leaving = vec![slice(&[("http", Some(8080))], &all[2..])];
    assert_eq!(targets(leaving, 0), [("10.0.0.4".to_owned(), 8080)]);
    assert!(targets(vec![], 0).is_empty());
}

#[test]
fn a_service_claims_no_address_that_is_somebody_s() {
    let web = ServiceFacts {
        name: name("web"),
        cluster_ips: vec!["10.96.0.1".parse().unwrap()],
        // A pod's, a node's, a Service's, one that may be a pod's, and one outside.
        external_ips: ["10.0.0.1", "192.0.2.1", "10.96.0.2", "10.1.2.3", "203.0.113.9"]
            .map(|ip| ip.parse().unwrap())
            .into(),
        node_local: false,
        sticky: false,
        ports: vec![("http".into(), 80, 6)],
        is_resolver: false,
    };
    let other = ServiceFacts {
        name: name("other"),
        cluster_ips: vec!["10.96.0.2".parse().unwrap()],
        external_ips: vec!["203.0.113.9".parse().unwrap()],
        ..web.clone()
    };
    let node = NodeFacts {
        name: "n1".into(),
        addresses: vec!["192.0.2.1".parse().unwrap()],
        pod_ranges: vec!["10.1.0.0/16".parse().unwrap()],
        zone: Some("a".into()),
    };
    let objects = Objects {
        pods: vec![Arc::new(pod("u", 1))],
        services: vec![Arc::new(web), Arc::new(other)],
        nodes: vec![Arc::new(node)],
        ..Objects::default()
    };
    let world = Assembler::default().assemble(&objects, around());
    let outside: IpAddr = "203.0.113.9".parse().unwrap();
    assert_eq!(world.services[&name("web")].external_ips, [outside]);
    // Several may share one, by their ports.
    let claims = vec![name("other"), name("web")];
    assert_eq!(world.services_by_external_ip, [(outside, claims)].into());
    assert_eq!(world.zones, [("n1".into(), "a".into())].into());
}

#[test]
fn a_namespace_that_vanishes_under_its_pods_keeps_its_mode() {
    let namespace = NamespaceFacts {
        name: "shop".into(),
        labels: [("signet.dev/mode".into(), "strict".into())].into(),
        annotations: Labels::new(),
        all_labels: Labels::new(),
        origin: "".into(),
    };
    let with = Objects {
        namespaces: vec![Arc::new(namespace)],
        pods: vec![Arc::new(pod("u", 1))],
        ..Objects::default()
    };
    let without = Objects { namespaces: vec![], ..with.clone() };
    let mut assembler = Assembler::default();
    assert_eq!(assembler.assemble(&with, around()).pods["u"].mode, Mode::Strict);
    for _ in 0..2 {
        let world = assembler.assemble(&without, around());
        assert_eq!(world.pods["u"].mode, Mode::Strict);
        assert_eq!(world.problems.len(), 1);
    }
    // With its last pod it is forgotten.
    assembler.assemble(&Objects::default(), around());
    assert_eq!(assembler.assemble(&without, around()).pods["u"].mode, Mode::Off);
}

#[test]
fn unenforceable_pods_are_reported_where_they_should_be_enforced() {
    let mut assembler = Assembler::default();
    let world_of = |assembler: &mut Assembler, mode: &str| {
        let namespace = NamespaceFacts {
            name: "shop".into(),
            labels: [("signet.dev/mode".into(), mode.into())].into(),
            annotations: Labels::new(),
            all_labels: Labels::new(),
            origin: "".into(),
        };
        let pod = PodFacts { unenforceable: Some("why".into()), ..pod("u", 1) };
        let objects = Objects {
            namespaces: vec![Arc::new(namespace)],
            pods: vec![Arc::new(pod)],
            ..Objects::default()
        };
        assembler.assemble(&objects, around())
    };
    let world = world_of(&mut assembler, "strict");
    assert!(!world.pods["u"].is_enrolled());
    assert_eq!(world.problems[0].message, "unenforceable in mode strict: why");
    assert!(world_of(&mut assembler, "observe").problems.is_empty());
}

#[test]
fn a_ztunnels_pods_are_known_by_their_annotation() {
    use k8s_openapi::{
        api::core::v1::{Pod as KubePod, PodSpec},
        apimachinery::pkg::apis::meta::v1::ObjectMeta,
    };
    let read = |redirection: Option<&str>| {
        let annotation = |value: &str| ("ambient.istio.io/redirection".into(), value.into());
        let object = KubePod {
            metadata: ObjectMeta {
                name: Some("pay".into()),
                namespace: Some("mesh".into()),
                uid: Some("u".into()),
                annotations: redirection.map(|value| [annotation(value)].into()),
                ..ObjectMeta::default()
            },
            spec: Some(PodSpec::default()),
            status: None,
        };
        PodFacts::read(&object, "").unwrap()
    };
    for other in [None, Some("disabled"), Some("")] {
        let facts = read(other);
        assert_eq!((facts.captured, facts.unenforceable), (false, None), "{other:?}");
    }
    let facts = read(Some("enabled"));
    assert!(facts.captured && facts.unenforceable.unwrap().contains("ambient"));

    // In a namespace that nobody labelled, too.
    let objects = Objects {
        pods: vec![Arc::new(read(Some("enabled"))), Arc::new(pod("v", 1))],
        ..Objects::default()
    };
    let world = Assembler::default().assemble(&objects, around());
    assert!(world.pods["u"].is_tunnelled() && !world.pods["u"].is_enrolled());
    assert!(!world.pods["v"].is_tunnelled(), "the control");
}
