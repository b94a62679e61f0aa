//! Tests of the plan: one world, what was found, and what comes out.

use super::*;
use crate::{
    cluster::model::{ModeOrigin, Namespace, Ranges, Service, ServicePort, Synced},
    policy::model::{Action, PolicyName, PolicySet, Rule, Selector},
    spiffe::TrustDomain,
};
use proptest::prelude::*;
use signet_ebpf::abi::{IDENTITY_HOST, ServiceKey, address, enforcement, range, service};

const NODE: &str = "node-1";

/// A world and a node under construction.
pub(in crate::endpoint) struct Scene {
    pub(in crate::endpoint) world: World,
    observed: Observed,
    params: Params,
    memory: Memory,
    inherited: BTreeMap<u64, Mode>,
    full: BTreeSet<&'static str>,
    closed: BTreeSet<u64>,
    numbers: Numbers,
    now: Duration,
}

impl Scene {
    pub(in crate::endpoint) fn new() -> Self {
        Self {
            world: World {
                revision: 1,
                synced: Synced { pods: true, policies: true },
                ..World::empty(TrustDomain::parse("cluster.local").unwrap())
            },
            observed: Observed::default(),
            params: Params {
                deny_other: false,
                raw_guard: Some("tcx"),
                guard_ahead: false,
                node: NODE.into(),
                config: Config {
                    host_netns: 1,
                    enforcement: enforcement::ENFORCE,
                    ..Config::default()
                },
                never_deny: BTreeSet::new(),
                released: BTreeSet::new(),
                builtins: Builtins::default(),
                unenrol_grace: Duration::from_secs(60),
                strict_grace: Duration::from_secs(600),
            },
            memory: Memory::new(),
            inherited: BTreeMap::new(),
            full: BTreeSet::new(),
            closed: BTreeSet::new(),
            numbers: Numbers::new(Identities::from_rows(&[])),
            now: Duration::from_secs(100),
        }
    }

    pub(in crate::endpoint) fn namespace(&mut self, name: &str, mode: Mode) {
        self.world.namespaces.insert(
            name.into(),
            Namespace {
                name: name.into(),
                mode,
                allow_pod_override: false,
                default_deny: false,
                exempt_ports: Arc::default(),
                identity_headers: Default::default(),
                labels: BTreeMap::new(),
            },
        );
    }

    /// A pod of `namespace` on `node`, in its mode, with the API's address.
    pub(in crate::endpoint) fn pod(
        &mut self,
        namespace: &str,
        name: &str,
        node: &str,
        ip: &str,
    ) -> PodUid {
        let uid: PodUid = format!("uid-{name}").into();
        let ip: IpAddr = ip.parse().unwrap();
        let pod = Pod {
            uid: uid.clone(),
            name: ObjectName { namespace: namespace.into(), name: name.into() },
            service_account: name.into(),
            node: Some(node.into()),
            ips: vec![ip],
            labels: Arc::default(),
            workload: None,
            host_network: false,
            finished: false,
            terminating: false,
            alive: true,
            mirror: false,
            named_ports: BTreeMap::new(),
            mode: self.world.namespaces.get(namespace).map_or(Mode::Off, |n| n.mode),
            mode_origin: ModeOrigin::Namespace,
            exempt_ports: Arc::default(),
            strict_ports: None,
            unenforceable: None,
            captured: false,
        };
        self.world.pods.insert(uid.clone(), Arc::new(pod));
        self.world.pods_by_ip.insert(ip, uid.clone());
        uid
    }

    pub(in crate::endpoint) fn set_mode(&mut self, uid: &PodUid, mode: Mode) {
        self.change(uid, |pod| pod.mode = mode);
    }

    pub(in crate::endpoint) fn change(&mut self, uid: &PodUid, change: impl FnOnce(&mut Pod)) {
        let mut pod = Pod::clone(&self.world.pods[uid]);
        change(&mut pod);
        self.world.pods.insert(uid.clone(), Arc::new(pod));
        self.world.revision += 1;
    }

    /// The pod was found in the network namespace `netns` with `ip`.
    fn found(&mut self, uid: &PodUid, netns: u64, ip: &str) {
        self.observed.pods.insert(
            uid.clone(),
            ObservedPod {
                key: EndpointKey { uid: uid.clone(), netns },
                cgroup: netns * 10,
                cgroup_path: format!("/kubepods/pod{uid}").into(),
                addresses: vec![ip.parse().unwrap()],
                link_local: Vec::new(),
                host_ends: vec![u32::try_from(netns).unwrap()],
                listeners: None,
                listeners_failed: None,
                open_flows: 0,
                since: jiff::Timestamp::UNIX_EPOCH,
            },
        );
    }

    /// Its listeners are open, and its SVID is there.
    fn ready(&mut self, uid: &PodUid) {
        let found = self.observed.pods.get_mut(uid).unwrap();
        found.listeners = Some(OutboundPorts { v4: 20_001, v6: 20_004 });
        let pod = &self.world.pods[uid];
        let id = SpiffeId::for_service_account(
            &self.world.trust_domain,
            &pod.name.namespace,
            &pod.service_account,
        );
        self.observed.svids.insert(id.unwrap());
    }

    fn policy(&mut self, name: &str, namespace: &str, action: Action, ingress: Vec<Rule>) {
        let name = PolicyName {
            kind: "IdentityPolicy".into(),
            namespace: namespace.into(),
            name: name.into(),
        };
        let selector = Selector::of(namespace);
        let policy =
            Policy { ingress, governs_ingress: true, ..Policy::new(name, selector, action) };
        let mut policies = self.world.policies.policies.clone();
        policies.push(Arc::new(policy));
        self.world.policies = Arc::new(PolicySet::new(policies));
        self.world.revision += 1;
    }

    fn plan(&mut self) -> Plan {
        let world = Arc::new(self.world.clone());
        let input = Input {
            world: &world,
            observed: &self.observed,
            params: &self.params,
            memory: &self.memory,
            inherited: &self.inherited,
            full: &self.full,
            closed: &self.closed,
            now: self.now,
        };
        let plan = plan(&input, &mut self.numbers);
        self.memory.clone_from(&plan.memory);
        plan
    }
}

fn ip(text: &str) -> Ip {
    Ip::from_std(text.parse().unwrap())
}

#[test]
fn an_off_pod_is_registered_and_left_alone() {
    let mut scene = Scene::new();
    scene.world.synced.policies = false;
    scene.namespace("legacy", Mode::Off);
    let uid = scene.pod("legacy", "old", NODE, "10.0.0.1");
    scene.found(&uid, 7, "10.0.0.1");
    let plan = scene.plan();
    let entry = plan.tables.pods[&7];
    assert_eq!((entry.mode, entry.flags), (Mode::Off as u8, 0));
    assert_eq!(plan.tables.cgroups[&70], 7);
    assert!(plan.svids.is_empty() && plan.listeners.is_empty() && plan.lookups.is_empty());
    assert!(plan.announce.is_empty() && plan.close_all.is_empty());
    assert_eq!(plan.tables.config.enforcing, 0);
    assert_eq!(plan.tables.addresses[&ip("10.0.0.1")].flags, 0);
}

#[test]
fn a_strict_pod_is_closed_first_then_served() {
    let mut scene = Scene::new();
    scene.namespace("shop", Mode::Strict);
    let uid = scene.pod("shop", "pay", NODE, "10.0.0.1");
    scene.found(&uid, 7, "10.0.0.1");
    let plan = scene.plan();
    let entry = plan.tables.pods[&7];
    assert_eq!((entry.mode, entry.flags), (Mode::Strict as u8, 0));
    assert_eq!(plan.close_all, [7].into(), "sockets from before it was registered");
    assert!(plan.listeners.contains(&7) && plan.lookups.contains(&7));
    assert_eq!(plan.svids.len(), 1);
    assert!(plan.announce.is_empty());
    assert_eq!(plan.state.waiting.len(), 1);
    assert!(plan.state.waiting[0].reason.contains("closed meanwhile"));
    assert_eq!(plan.tables.config.enforcing, 1);
    let flags = plan.tables.addresses[&ip("10.0.0.1")].flags;
    assert_eq!(flags, address::ENROLLED | address::ENROLLABLE, "desired, and not served yet");

    scene.ready(&uid);
    let plan = scene.plan();
    let entry = plan.tables.pods[&7];
    assert_eq!(entry.flags, pod::READY);
    assert_eq!((entry.listener4, entry.listener6, entry.listener6_count), (20_001, 20_004, 4));
    assert_eq!(plan.announce.get(&uid).map(|n| &**n), Some("shop/pay"));
    assert!(plan.close_all.is_empty() && plan.state.waiting.is_empty());
    assert!(plan.state.endpoints[&7].served);
    assert_ne!(plan.tables.addresses[&ip("10.0.0.1")].flags & address::SERVED, 0);
}

#[test]
fn peers_are_served_when_their_node_says_so() {
    let mut scene = Scene::new();
    scene.namespace("shop", Mode::Strict);
    let uid = scene.pod("shop", "pay", "node-2", "10.0.2.1");
    assert_eq!(
        scene.plan().tables.addresses[&ip("10.0.2.1")].flags,
        address::ENROLLED | address::ENROLLABLE
    );
    scene.world.served.insert(uid, "node-2".into());
    let flags = scene.plan().tables.addresses[&ip("10.0.2.1")].flags;
    assert_ne!(flags & address::SERVED, 0);
}

#[test]
fn peers_that_a_ztunnel_serves_are_served_and_own_ones_are_not_managed() {
    let mut scene = Scene::new();
    scene.namespace("mesh", Mode::Off);
    let tunnelled = address::ENROLLED | address::SERVED | address::ENROLLABLE;
    let uid = scene.pod("mesh", "pay", "node-2", "10.0.2.1");
    let entry = |scene: &mut Scene, address| scene.plan().tables.addresses[&ip(address)];
    assert_eq!(entry(&mut scene, "10.0.2.1").flags, 0, "the control");
    scene.change(&uid, |pod| pod.captured = true);
    let shown = entry(&mut scene, "10.0.2.1");
    assert_eq!(shown.flags, tunnelled);
    assert!(shown.identity >= 256, "under its account's identity");
    scene.change(&uid, |pod| pod.host_network = true);
    assert_eq!(entry(&mut scene, "10.0.2.1").flags, 0);

    // One of this node is a peer like any other, and nothing is enforced for it.
    scene.namespace("shop", Mode::Strict);
    let own = scene.pod("shop", "web", NODE, "10.0.0.1");
    scene.found(&own, 7, "10.0.0.1");
    scene.change(&own, |pod| {
        pod.captured = true;
        pod.unenforceable = Some("Istio's ambient mesh already carries its traffic".into());
    });
    let plan = scene.plan();
    assert_eq!(plan.tables.pods[&7].mode, Mode::Observe as u8);
    assert_eq!(plan.tables.addresses[&ip("10.0.0.1")].flags, tunnelled);
    assert!(plan.svids.is_empty() && plan.announce.is_empty());
}

#[test]
fn what_waits_says_what_is_missing() {
    let mut scene = Scene::new();
    scene.namespace("shop", Mode::Strict);
    let uid = scene.pod("shop", "pay", NODE, "10.0.0.1");
    scene.observed.missing.insert(uid, "no cgroup for uid 3f1c".into());
    let plan = scene.plan();
    assert!(plan.tables.pods.is_empty());
    assert_eq!(plan.state.waiting[0].reason, "no cgroup for uid 3f1c");
}

#[test]
fn nothing_enforced_is_registered_before_policies_are_read() {
    let mut scene = Scene::new();
    scene.world.synced.policies = false;
    scene.namespace("shop", Mode::Strict);
    let uid = scene.pod("shop", "pay", NODE, "10.0.0.1");
    scene.found(&uid, 7, "10.0.0.1");
    scene.ready(&uid);
    let plan = scene.plan();
    assert!(!plan.tables.pods.contains_key(&7));
    assert_eq!(plan.keep, [7].into(), "what an earlier process pinned stays");
    scene.world.synced.policies = true;
    assert_eq!(scene.plan().tables.pods[&7].flags, pod::READY, "the control");
}

#[test]
fn spared_and_unenforceable_pods_are_observed_and_told() {
    let mut scene = Scene::new();
    scene.params.never_deny = ["ops".into()].into();
    for (i, namespace) in ["kube-system", "ops", "shop"].into_iter().enumerate() {
        scene.namespace(namespace, Mode::Strict);
        let name = format!("p{i}");
        let address = format!("10.0.0.{}", i + 1);
        let uid = scene.pod(namespace, &name, NODE, &address);
        scene.found(&uid, 10 + i as u64, &address);
        if namespace == "shop" {
            scene.change(&uid, |pod| pod.unenforceable = Some("an Istio sidecar".into()));
        }
    }
    let plan = scene.plan();
    for netns in 10..13 {
        assert_eq!(plan.tables.pods[&netns].mode, Mode::Observe as u8, "{netns}");
    }
    for address in ["10.0.0.1", "10.0.0.2", "10.0.0.3"] {
        assert_eq!(plan.tables.addresses[&ip(address)].flags & address::ENROLLED, 0);
    }
    let told = plan.state.problems.iter().filter(|p| p.subject.starts_with("pod "));
    assert_eq!(told.count(), 2, "the unenforceable one is shown with its pod");
    assert!(plan.svids.is_empty() && plan.announce.is_empty());
}

#[test]
fn host_network_finished_and_foreign_pods_are_no_endpoints() {
    let mut scene = Scene::new();
    scene.namespace("shop", Mode::Strict);
    let host = scene.pod("shop", "host", NODE, "10.0.0.1");
    scene.change(&host, |pod| pod.host_network = true);
    let done = scene.pod("shop", "done", NODE, "10.0.0.2");
    scene.change(&done, |pod| pod.finished = true);
    scene.pod("shop", "far", "node-2", "10.0.0.3");
    let plan = scene.plan();
    assert!(plan.tables.pods.is_empty() && plan.state.waiting.is_empty());
}

#[test]
fn an_unenrolled_pod_leaves_in_order() {
    let mut scene = Scene::new();
    scene.namespace("shop", Mode::Strict);
    scene.policy("none", "shop", Action::Allow, Vec::new());
    let uid = scene.pod("shop", "pay", NODE, "10.0.0.1");
    scene.found(&uid, 7, "10.0.0.1");
    scene.ready(&uid);
    let served = scene.plan();
    assert_eq!(served.announce.len(), 1);
    assert!(!served.tables.policies[&7].as_ref().unwrap().is_empty());

    scene.set_mode(&uid, Mode::Off);
    scene.observed.pods.get_mut(&uid).unwrap().open_flows = 1;
    let leaving = scene.plan();
    assert!(leaving.announce.is_empty(), "un-announced at once");
    let entry = leaving.tables.pods[&7];
    assert_eq!((entry.mode, entry.flags), (Mode::Permissive as u8, pod::READY));
    assert!(leaving.tables.policies[&7].as_ref().unwrap().is_empty(), "nothing is refused");
    assert!(leaving.listeners.contains(&7) && leaving.wake.is_some());
    assert_eq!(leaving.tables.addresses[&ip("10.0.0.1")].flags, 0);

    scene.now += Duration::from_secs(61);
    let left = scene.plan();
    assert_eq!(left.tables.pods[&7].mode, Mode::Off as u8);
    assert!(left.listeners.is_empty() && left.lookups.is_empty() && left.svids.is_empty());
    assert!(!left.tables.policies.contains_key(&7));
}

#[test]
fn a_pod_that_turns_strict_closes_plaintext_after_the_grace_only() {
    let mut scene = Scene::new();
    scene.namespace("shop", Mode::Permissive);
    let uid = scene.pod("shop", "pay", NODE, "10.0.0.1");
    scene.found(&uid, 7, "10.0.0.1");
    scene.ready(&uid);
    scene.plan();
    scene.set_mode(&uid, Mode::Strict);
    let turned = scene.plan();
    assert_eq!(turned.tables.pods[&7].mode, Mode::Strict as u8);
    assert!(turned.close_plaintext.is_empty() && turned.close_all.is_empty());
    assert_eq!(turned.wake, Some(scene.now + Duration::from_secs(600)));
    scene.now += Duration::from_secs(599);
    assert!(scene.plan().close_plaintext.is_empty());
    scene.now += Duration::from_secs(1);
    assert_eq!(scene.plan().close_plaintext, [7].into());
    assert!(scene.plan().close_plaintext.is_empty(), "once");
}

#[test]
fn while_enforcement_is_overridden_nothing_is_closed_and_then_there_is_grace() {
    let mut scene = Scene::new();
    scene.params.config.enforcement = enforcement::AUDIT;
    scene.namespace("shop", Mode::Strict);
    let uid = scene.pod("shop", "pay", NODE, "10.0.0.1");
    scene.found(&uid, 7, "10.0.0.1");
    scene.ready(&uid);
    let plan = scene.plan();
    assert_eq!(plan.tables.pods[&7].mode, Mode::Strict as u8, "its mode is what it was");
    assert_eq!(plan.state.enforcement, enforcement::AUDIT);
    assert!(plan.close_all.is_empty() && plan.close_plaintext.is_empty());
    scene.now += Duration::from_secs(10_000);
    assert!(scene.plan().close_plaintext.is_empty());
    scene.params.config.enforcement = enforcement::ENFORCE;
    let armed = scene.plan();
    assert!(armed.close_plaintext.is_empty() && armed.close_all.is_empty());
    assert_eq!(armed.wake, Some(scene.now + Duration::from_secs(600)));
    scene.now += Duration::from_secs(600);
    assert_eq!(scene.plan().close_plaintext, [7].into());
}

#[test]
fn an_earlier_process_s_pods_go_on_closed() {
    let mut scene = Scene::new();
    scene.namespace("shop", Mode::Strict);
    let uid = scene.pod("shop", "pay", NODE, "10.0.0.1");
    scene.found(&uid, 7, "10.0.0.1");
    scene.inherited.insert(7, Mode::Strict);
    let plan = scene.plan();
    assert_eq!(plan.tables.pods[&7].flags, 0, "closed until its listeners are up");
    assert!(plan.close_all.is_empty(), "its sockets were hooked all the time");

    // One that was observed, and is strict now, was registered: its flows have their grace.
    let mut scene = Scene::new();
    scene.namespace("shop", Mode::Strict);
    let uid = scene.pod("shop", "pay", NODE, "10.0.0.1");
    scene.found(&uid, 7, "10.0.0.1");
    scene.inherited.insert(7, Mode::Observe);
    let plan = scene.plan();
    assert_eq!(plan.tables.pods[&7].mode, Mode::Observe as u8);
    assert!(plan.close_all.is_empty());
}

#[test]
fn local_addresses_count_before_the_api_knows_them() {
    let mut scene = Scene::new();
    scene.namespace("shop", Mode::Strict);
    let uid = scene.pod("shop", "pay", NODE, "10.0.0.1");
    scene.change(&uid, |pod| pod.ips.clear());
    scene.world.pods_by_ip.clear();
    scene.found(&uid, 7, "10.0.0.1");
    let plan = scene.plan();
    assert_eq!(plan.tables.addresses[&ip("10.0.0.1")].kind, address::POD);
    let known: IpAddr = "10.0.0.1".parse().unwrap();
    assert_eq!(plan.state.world.pods_by_ip.get(&known), Some(&uid));
}

#[test]
fn a_pod_cannot_take_another_s_address() {
    let mut scene = Scene::new();
    scene.namespace("shop", Mode::Strict);
    let victim = scene.pod("shop", "victim", "node-2", "10.0.2.1");
    let thief = scene.pod("shop", "thief", NODE, "10.0.0.1");
    scene.found(&thief, 7, "10.0.0.1");
    scene.observed.pods.get_mut(&thief).unwrap().addresses.push("10.0.2.1".parse().unwrap());
    let plan = scene.plan();
    let stolen: IpAddr = "10.0.2.1".parse().unwrap();
    assert_eq!(plan.state.world.pods_by_ip.get(&stolen), Some(&victim));
    let names = plan.state.identities;
    let number = plan.tables.addresses[&ip("10.0.2.1")].identity;
    assert!(names[&number].as_str().ends_with("/sa/victim"));
    assert!(plan.state.problems.iter().any(|p| p.message.contains("10.0.2.1")));

    // Once the holder has gone, an address is re-used.
    scene.change(&victim, |pod| pod.terminating = true);
    let plan = scene.plan();
    let number = plan.tables.addresses[&ip("10.0.2.1")].identity;
    assert!(plan.state.identities[&number].as_str().ends_with("/sa/thief"));
}

#[test]
fn services_ranges_nodes_and_exempt_ports_are_written() {
    let mut scene = Scene::new();
    scene.namespace("shop", Mode::Strict);
    scene.namespace("legacy", Mode::Off);
    let uid = scene.pod("shop", "pay", NODE, "10.0.0.1");
    scene.change(&uid, |pod| {
        pod.exempt_ports = [crate::cluster::model::ExemptPort { port: 9090, protocol: 6 }].into();
    });
    scene.pod("legacy", "old", "node-2", "10.0.2.9");
    scene.found(&uid, 7, "10.0.0.1");
    scene.ready(&uid);
    scene.world.nodes.insert(NODE.into(), vec!["192.0.2.1".parse().unwrap()]);
    scene.world.ranges = Ranges {
        pods: vec!["10.0.0.0/8".parse().unwrap()],
        services: vec!["fd00::/48".parse().unwrap()],
        outside: vec!["10.9.0.0/16".parse().unwrap()],
    };
    let endpoint = |ip: &str| crate::cluster::model::Endpoint {
        ip: ip.parse().unwrap(),
        port: 8080,
        ready: true,
        serving: true,
        node: None,
        zones: [].into(),
    };
    let port = |port, endpoints| ServicePort { name: "".into(), port, protocol: 6, endpoints };
    let name = ObjectName { namespace: "shop".into(), name: "pay".into() };
    let service = Service {
        name: name.clone(),
        cluster_ips: vec!["10.96.0.1".parse().unwrap()],
        external_ips: vec!["203.0.113.7".parse().unwrap()],
        node_local: false,
        sticky: false,
        ports: vec![
            port(80, vec![endpoint("10.0.0.1")]),
            port(81, vec![]),
            port(82, vec![endpoint("10.0.2.9")]),
            port(83, vec![endpoint("fd00::9")]),
        ],
        is_resolver: false,
    };
    scene.world.services.insert(name, Arc::new(service));
    let tables = scene.plan().tables;
    let key = |port| ServiceKey { ip: ip("10.96.0.1"), port, protocol: 6, pad: 0 };
    assert_eq!(tables.services[&key(80)], service::TUNNEL);
    assert_eq!(tables.services[&key(81)], service::NO_ENDPOINTS);
    assert_eq!(tables.services[&key(82)], 0);
    assert_eq!(tables.services[&key(83)], service::NO_ENDPOINTS, "another family's endpoint");
    assert_eq!(tables.addresses[&ip("10.96.0.1")].kind, address::SERVICE);
    // A load balancer's address, by the pods' own rules: only what is tunnelled is steered.
    let balanced = |port| ServiceKey { ip: ip("203.0.113.7"), port, protocol: 6, pad: 0 };
    assert_eq!(tables.services[&balanced(80)], service::TUNNEL);
    assert_eq!(tables.addresses[&ip("203.0.113.7")].kind, address::SERVICE);
    let mark = ServiceKey { protocol: 0, ..balanced(service::EXTERNAL) };
    assert!(tables.services.contains_key(&mark));
    assert!(!tables.services.contains_key(&ServiceKey { ip: ip("10.96.0.1"), ..mark }));
    assert_eq!(tables.addresses[&ip("192.0.2.1")].identity, IDENTITY_HOST);
    assert_eq!(tables.ranges[&(104, ip("10.0.0.0").octets())], range::PODS);
    assert_eq!(tables.ranges[&(112, ip("10.9.0.0").octets())], range::OUTSIDE);
    assert_eq!(tables.ranges[&(48, ip("fd00::").octets())], range::SERVICES);
    assert_eq!(tables.config.ranges_known, 1);
    let exempt = ExemptKey { netns: 7, port: 9090, protocol: 6, pad: [0; 5] };
    assert!(tables.exempt.contains_key(&exempt));
}

#[test]
fn full_maps_close() {
    let mut scene = Scene::new();
    scene.namespace("shop", Mode::Strict);
    scene.namespace("legacy", Mode::Off);
    for (name, namespace, netns) in [("a", "shop", 7), ("b", "shop", 8), ("c", "legacy", 9)] {
        let address = format!("10.0.0.{netns}");
        let uid = scene.pod(namespace, name, NODE, &address);
        scene.found(&uid, netns, &address);
        scene.ready(&uid);
    }
    let closed = |plan: &Plan, netns: u64| plan.tables.pods[&netns].flags & pod::CLOSED != 0;
    scene.closed = [7].into();
    let plan = scene.plan();
    assert!(closed(&plan, 7) && !closed(&plan, 8) && !closed(&plan, 9));
    assert_eq!([7, 8, 9].map(|n| plan.state.endpoints[&n].closed), [true, false, false]);
    assert!(plan.state.problems.iter().any(|p| p.subject == "pod shop/a"));
    scene.closed.clear();
    scene.full = ["ADDRESSES"].into();
    let plan = scene.plan();
    assert!(closed(&plan, 7) && closed(&plan, 8), "every enforced pod");
    assert!(!closed(&plan, 9), "what is off is left alone");
    scene.full.clear();
    assert!(!closed(&scene.plan(), 7), "room again");
}

#[test]
fn compiled_policies_are_not_compiled_again() {
    let mut scene = Scene::new();
    scene.namespace("shop", Mode::Strict);
    scene.policy("p", "shop", Action::Deny, vec![Rule::default()]);
    let uid = scene.pod("shop", "pay", NODE, "10.0.0.1");
    scene.found(&uid, 7, "10.0.0.1");
    let first = scene.plan().tables.policies[&7].clone().unwrap();
    assert!(!first.is_empty());
    scene.world.revision += 1;
    let second = scene.plan().tables.policies[&7].clone().unwrap();
    assert!(Arc::ptr_eq(&first, &second));
    scene.policy("q", "shop", Action::Allow, Vec::new());
    let third = scene.plan().tables.policies[&7].clone().unwrap();
    assert!(!Arc::ptr_eq(&first, &third), "another set of policies");
}

proptest! {
    /// Whatever happens in whatever order: an enforced pod that was never registered in a
    /// looser mode is never tunnelled without SVID and listeners, never open, and announced
    /// only when it is ready.
    #[test]
    fn an_enforced_pod_is_never_open(
        steps in proptest::collection::vec((any::<bool>(), any::<bool>(), 0u64..30, any::<bool>()), 1..30),
    ) {
        let mut scene = Scene::new();
        scene.namespace("shop", Mode::Strict);
        let uid = scene.pod("shop", "pay", NODE, "10.0.0.1");
        for (found, ready, seconds, full) in steps {
            scene.now += Duration::from_secs(seconds);
            scene.world.revision += 1;
            scene.full = if full { ["OWN"].into() } else { BTreeSet::new() };
            if found {
                scene.found(&uid, 7, "10.0.0.1");
                scene.observed.svids.clear();
                if ready {
                    scene.ready(&uid);
                }
            } else {
                scene.observed.pods.clear();
            }
            let plan = scene.plan();
            match plan.tables.pods.get(&7) {
                None => prop_assert!(!found),
                Some(entry) => {
                    prop_assert_eq!(entry.mode, Mode::Strict as u8);
                    prop_assert_eq!(entry.flags & pod::READY != 0, ready);
                    prop_assert_eq!(entry.flags & pod::CLOSED != 0, full);
                    prop_assert!(plan.tables.policies.contains_key(&7));
                }
            }
            prop_assert_eq!(plan.announce.contains_key(&uid), found && ready);
            // A flow can only be steered to a listener that is there.
            for entry in plan.tables.pods.values() {
                prop_assert!(entry.flags & pod::READY == 0 || entry.listener4 != 0);
            }
        }
    }
}

/// One strict pod that is ready, in the network namespace 1.
fn strict_pod(scene: &mut Scene) -> PodUid {
    scene.namespace("shop", Mode::Strict);
    let uid = scene.pod("shop", "a", NODE, "10.0.0.1");
    scene.found(&uid, 1, "10.0.0.1");
    scene.ready(&uid);
    uid
}

#[test]
fn enforced_pods_are_guarded_at_every_end_of_their_links() {
    let mut scene = Scene::new();
    let strict = strict_pod(&mut scene);
    scene.namespace("watch", Mode::Observe);
    let observed = scene.pod("watch", "b", NODE, "10.0.0.2");
    scene.found(&observed, 2, "10.0.0.2");
    scene.observed.pods.get_mut(&strict).unwrap().host_ends = vec![7, 9];
    let plan = scene.plan();
    assert_eq!(plan.tables.guarded, HashMap::from([(7, 1), (9, 1)]));
    assert_eq!(plan.tables.config.guarding, 1);
    assert_eq!(plan.state.endpoints[&1].raw_guard, Some("tcx"));
    assert_eq!(plan.state.endpoints[&2].raw_guard, None);
    let told = |plan: &Plan| plan.state.problems.iter().any(|p| p.message.contains("raw-guard"));
    assert!(!told(&plan));

    // Where attaching costs packets it is done while nothing depends on them yet.
    scene.observed.pods.get_mut(&observed).unwrap().host_ends = vec![11];
    assert!(scene.plan().guard_ahead.is_empty());
    scene.params.guard_ahead = true;
    let plan = scene.plan();
    assert_eq!((plan.guard_ahead, plan.tables.guarded.len()), ([11].into(), 2));
    scene.set_mode(&observed, Mode::Off);
    assert!(scene.plan().guard_ahead.is_empty(), "off is left alone");

    // Without a veth it is said; told not to guard, it is not.
    scene.observed.pods.get_mut(&strict).unwrap().host_ends.clear();
    let plan = scene.plan();
    assert!(plan.tables.guarded.is_empty() && plan.tables.config.guarding == 0);
    assert!(told(&plan));
    scene.params.raw_guard = None;
    assert!(!told(&scene.plan()));
}

#[test]
fn another_pods_address_on_the_interface_is_not_its_own() {
    let mut scene = Scene::new();
    let thief = strict_pod(&mut scene);
    scene.pod("shop", "victim", "node-2", "10.0.0.9");
    let stolen = OwnAddressKey { netns: 1, ip: ip("10.0.0.9") };
    let link_local = OwnAddressKey { netns: 1, ip: ip("fe80::1") };
    let found = scene.observed.pods.get_mut(&thief).unwrap();
    found.addresses.push("10.0.0.9".parse().unwrap());
    found.link_local.push("fe80::1".parse().unwrap());
    let plan = scene.plan();
    assert!(!plan.tables.own.contains_key(&stolen));
    assert!(plan.tables.own.contains_key(&link_local));
    // The control: an address that nobody has is its own.
    let found = scene.observed.pods.get_mut(&thief).unwrap();
    found.addresses[1] = "10.0.0.8".parse().unwrap();
    let free = OwnAddressKey { netns: 1, ip: ip("10.0.0.8") };
    assert!(scene.plan().tables.own.contains_key(&free));
}

#[test]
fn other_protocols_are_refused_where_the_configuration_says_so() {
    let mut scene = Scene::new();
    strict_pod(&mut scene);
    assert_eq!(scene.plan().tables.pods[&1].flags & pod::DENY_OTHER, 0);
    scene.params.deny_other = true;
    assert_ne!(scene.plan().tables.pods[&1].flags & pod::DENY_OTHER, 0);
}
