//! The pure part: where a flow goes, by the modes' rules.

use std::collections::BTreeMap;

use signet_ebpf::abi::{Mode, Reason, proto};

use super::{address, identity, ip, pod, world};
use crate::{
    cluster::model::{Endpoint, ObjectName, Service, ServicePort, World},
    proxy::resolve::{Path, RouteError, Source, route},
};

const ENROLLED: &str = "10.77.0.2";
const UNSERVED: &str = "10.77.0.3";
const OFF: &str = "10.77.0.4";
const VIP: &str = "10.96.0.10";

fn sample() -> World {
    let served = pod("payments", ENROLLED, Mode::Strict);
    let unserved = pod("ledger", UNSERVED, Mode::Permissive);
    let off = pod("legacy", OFF, Mode::Off);
    let mut world = world(1, &[served.clone(), unserved, off], &[&served]);
    world.nodes.insert("node-1".into(), vec![ip("10.77.1.1")]);
    world
}

fn service(world: &mut World, endpoints: &[(&str, bool, bool)]) {
    let name = ObjectName { namespace: "shop".into(), name: "payments".into() };
    let endpoints = endpoints.iter().map(|&(at, ready, serving)| Endpoint {
        ip: ip(at),
        port: 8080,
        ready,
        serving,
        node: None,
        zones: [].into(),
    });
    let port = ServicePort {
        name: "http".into(),
        port: 80,
        protocol: proto::TCP,
        endpoints: endpoints.collect(),
    };
    let service = Service {
        name: name.clone(),
        cluster_ips: vec![ip(VIP)],
        external_ips: vec![],
        node_local: false,
        sticky: false,
        ports: vec![port],
        is_resolver: false,
    };
    world.services = BTreeMap::from([(name.clone(), service.into())]);
    world.services_by_ip.insert(ip(VIP), name);
}

fn go(world: &World, mode: Mode, to: &str, port: u16) -> Result<Path, Reason> {
    let own = [ip("10.77.0.1")];
    let source = Source { mode, addresses: &own, node: Some("node-1") };
    route(world, source, address(to, port), 0).map(|r| r.path).map_err(|e| e.reason())
}

#[test]
fn what_a_ztunnel_serves_is_reached_through_it_unannounced() {
    let mut world = sample();
    let uid = world.pods_by_ip[&ip(OFF)].clone();
    let plain = Ok(Path::Direct(Some(identity("legacy"))));
    assert_eq!(go(&world, Mode::Strict, OFF, 80), plain, "the control");
    let mut captured = crate::cluster::model::Pod::clone(&world.pods[&uid]);
    captured.captured = true;
    world.pods.insert(uid.clone(), captured.clone().into());
    for mode in [Mode::Strict, Mode::Permissive] {
        assert_eq!(go(&world, mode, OFF, 80), Ok(Path::Tunnel(identity("legacy"))), "{mode:?}");
    }
    // Where it has finished, its address is nobody's tunnel.
    captured.finished = true;
    world.pods.insert(uid, captured.into());
    assert_eq!(go(&world, Mode::Strict, OFF, 80), plain);
}

#[test]
fn tunnel_or_direct_follows_the_desired_mode() {
    let world = sample();
    let tunnel = Ok(Path::Tunnel(identity("payments")));
    let direct = |account| Ok(Path::Direct(Some(identity(account))));
    let unknown = Ok(Path::Direct(None));
    for (to, from_strict, from_permissive) in [
        (ENROLLED, tunnel.clone(), tunnel.clone()),
        (UNSERVED, Err(Reason::PeerUnreachable), direct("ledger")),
        (OFF, direct("legacy"), direct("legacy")),
        // Inside the cluster's ranges and nobody's: stale knowledge is no clear text.
        ("10.77.0.99", Err(Reason::IdentityUnknown), unknown.clone()),
        ("10.96.0.99", Err(Reason::IdentityUnknown), unknown.clone()),
        // Outside: by a range of its own, or by being nowhere in the cluster's.
        ("10.77.9.1", unknown.clone(), unknown.clone()),
        ("192.0.2.1", unknown.clone(), unknown.clone()),
        ("10.77.1.1", unknown.clone(), unknown.clone()),
        // Its own address.
        ("10.77.0.1", unknown.clone(), unknown.clone()),
    ] {
        assert_eq!(go(&world, Mode::Strict, to, 8080), from_strict, "strict → {to}");
        assert_eq!(go(&world, Mode::Permissive, to, 8080), from_permissive, "permissive → {to}");
    }
}

#[test]
fn without_known_ranges_strict_refuses_what_it_does_not_know() {
    let mut world = sample();
    world.ranges = Default::default();
    assert_eq!(go(&world, Mode::Strict, "192.0.2.1", 80), Err(Reason::IdentityUnknown));
    assert_eq!(go(&world, Mode::Permissive, "192.0.2.1", 80), Ok(Path::Direct(None)));
}

#[test]
fn a_service_gives_a_ready_endpoint_that_the_source_may_reach() {
    let mut world = sample();
    service(&mut world, &[(UNSERVED, true, true), (ENROLLED, true, true)]);
    let own = [ip("10.77.0.1")];
    for pick in 0..8 {
        let strict = Source { mode: Mode::Strict, addresses: &own, node: Some("node-1") };
        let found = route(&world, strict, address(VIP, 80), pick).unwrap();
        assert_eq!(found.destination, address(ENROLLED, 8080), "the unserved one is skipped");
        assert_eq!(found.service.map(|s| s.name.to_string()), Some("payments".into()));
    }
    // Both serve a permissive source: each is picked.
    let permissive = Source { mode: Mode::Permissive, addresses: &own, node: Some("node-1") };
    let picked = |pick| route(&world, permissive, address(VIP, 80), pick).unwrap().destination;
    assert_ne!(picked(0), picked(1));
}

#[test]
fn a_virtual_address_leads_to_endpoints_of_its_own_family() {
    let mut world = sample();
    service(&mut world, &[("fd00:77::2", true, true), (ENROLLED, true, true)]);
    let own = [ip("10.77.0.1")];
    let strict = Source { mode: Mode::Strict, addresses: &own, node: Some("node-1") };
    for pick in 0..8 {
        let found = route(&world, strict, address(VIP, 80), pick).unwrap();
        assert_eq!(found.destination, address(ENROLLED, 8080));
    }
    service(&mut world, &[("fd00:77::2", true, true)]);
    let error = route(&world, strict, address(VIP, 80), 0).unwrap_err();
    assert!(matches!(error, RouteError::NoEndpoint { .. }), "{error}");
}

#[test]
fn endpoints_that_terminate_come_last_and_none_is_an_answer() {
    let mut world = sample();
    service(&mut world, &[(ENROLLED, false, true), (OFF, true, true)]);
    assert_eq!(
        go(&world, Mode::Strict, VIP, 80),
        Ok(Path::Direct(Some(identity("legacy")))),
        "the ready one"
    );
    service(&mut world, &[(ENROLLED, false, true)]);
    assert_eq!(go(&world, Mode::Strict, VIP, 80), Ok(Path::Tunnel(identity("payments"))));
    service(&mut world, &[(ENROLLED, false, false)]);
    assert_eq!(go(&world, Mode::Strict, VIP, 80), Err(Reason::PeerUnreachable));
    service(&mut world, &[(UNSERVED, true, true)]);
    let own = [ip("10.77.0.1")];
    let strict = Source { mode: Mode::Strict, addresses: &own, node: Some("node-1") };
    let error = route(&world, strict, address(VIP, 80), 0).unwrap_err();
    assert!(matches!(error, RouteError::NotServed { .. }), "{error}");
}

#[test]
fn a_port_that_the_service_lacks_is_refused_from_strict() {
    let mut world = sample();
    service(&mut world, &[(ENROLLED, true, true)]);
    assert_eq!(go(&world, Mode::Strict, VIP, 81), Err(Reason::PeerUnreachable));
    assert_eq!(go(&world, Mode::Permissive, VIP, 81), Ok(Path::Direct(None)));
    assert_eq!(go(&world, Mode::Strict, VIP, 80), Ok(Path::Tunnel(identity("payments"))));
}

#[test]
fn affinity_gives_a_client_one_endpoint_whatever_the_pick() {
    let mut world = sample();
    service(&mut world, &[("10.77.0.4", true, true), (ENROLLED, true, true)]);
    let own = [ip("10.77.0.1")];
    let strict = Source { mode: Mode::Strict, addresses: &own, node: Some("node-1") };
    let given = |world: &World| -> std::collections::BTreeSet<_> {
        (0..8)
            .map(|pick| route(world, strict, address(VIP, 80), pick).unwrap().destination)
            .collect()
    };
    assert_eq!(given(&world).len(), 2, "the control: both are picked");
    for service in world.services.values_mut() {
        std::sync::Arc::make_mut(service).sticky = true;
    }
    assert_eq!(given(&world).len(), 1);
}

#[test]
fn a_load_balancer_s_address_leads_to_its_endpoints_and_on_other_ports_outside() {
    const BALANCED: &str = "203.0.113.7";
    let mut world = sample();
    service(&mut world, &[(ENROLLED, true, true)]);
    let names: Vec<_> = world.services.keys().cloned().collect();
    world.services_by_external_ip.insert(ip(BALANCED), names);
    assert_eq!(go(&world, Mode::Strict, BALANCED, 80), Ok(Path::Tunnel(identity("payments"))));
    assert_eq!(go(&world, Mode::Strict, BALANCED, 81), Ok(Path::Direct(None)));
}
