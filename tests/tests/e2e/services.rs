//! Services beyond a virtual address with ready endpoints: whose endpoints a client is given, and
//! by which other addresses it gets there.

use std::{
    collections::BTreeSet,
    net::{IpAddr, SocketAddr},
};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use signet_lab::{
    Service, address,
    cluster_dir::ObjectKey,
    eventually,
    pod::Pod,
    traffic::{Role, any, roles::TcpServer},
};

use crate::mesh::{CHANGE, Mesh, TCP, answered, answered_soon, refused_soon, verdict, with_logs};

/// A Service of `shop` for `app: web`, with what `more` adds to it.
fn apply(mesh: &Mesh, name: &str, more: &Value) -> Result<Service> {
    let mut object = json!({
        "apiVersion": "v1", "kind": "Service",
        "metadata": {"name": name, "namespace": "shop"},
        "spec": {
            "selector": {"app": "web"},
            "ports": [{"name": "tcp", "port": 80, "protocol": "TCP", "targetPort": TCP}],
        },
    });
    for part in ["spec", "status"] {
        for (key, value) in more[part].as_object().into_iter().flatten() {
            object[part][key] = value.clone();
        }
    }
    mesh.lab.apply_service(object)
}

/// A slice of a Service without a selector, with these endpoints.
fn slice(mesh: &Mesh, service: &str, endpoints: &[IpAddr]) -> Result<()> {
    let is_v4 = endpoints.iter().all(IpAddr::is_ipv4);
    let endpoints: Vec<Value> = endpoints
        .iter()
        .map(|ip| json!({"addresses": [ip.to_string()], "conditions": {"ready": true}}))
        .collect();
    mesh.lab.cluster().apply(json!({
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
        "metadata": {
            "name": format!("{service}-1"), "namespace": "shop",
            "labels": {"kubernetes.io/service-name": service},
        },
        "addressType": if is_v4 { "IPv4" } else { "IPv6" },
        "ports": [{"name": "tcp", "port": TCP, "protocol": "TCP"}],
        "endpoints": endpoints,
    }))
}

/// Who answers, over some dials.
fn who(client: &Pod, to: SocketAddr) -> Result<BTreeSet<u32>> {
    (0..16).map(|_| Ok(answered(client, to, "who")?.seen.context("no answer")?.tag)).collect()
}

/// Waits until these answer, and nobody else.
fn are(client: &Pod, to: SocketAddr, wanted: &[u32]) -> Result<()> {
    let wanted: BTreeSet<u32> = wanted.iter().copied().collect();
    answered_soon(client, to)?;
    eventually(&format!("{wanted:?} answer at {to}"), CHANGE, || {
        Ok((who(client, to)? == wanted).then_some(()))
    })
}

#[test]
fn endpoints_by_node_affinity_and_address() -> Result<()> {
    let mesh = Mesh::start(Some("strict"))?;
    with_logs(&mesh, |mesh| {
        let Mesh { lab, frontend, payments, .. } = mesh;
        let web = |node: &str, tag: u32| -> Result<Pod> {
            let role = TcpServer { listen: vec![any(TCP)], tag, ..Default::default() };
            let name = format!("web-{tag}");
            let builder = lab.pod_on(lab.node(node)?, "shop", &name).label("app", "web");
            let pod = builder.container("main", Role::TcpServer(role)).start()?;
            lab.wait_state(&pod, "served")?;
            pod.wait_published()?;
            Ok(pod)
        };
        let (near, far) = (web("node-1", 1)?, web("node-2", 2)?);
        let at = |service: &Service| SocketAddr::new(service.addresses.first(), 80);

        let anywhere = apply(mesh, "anywhere", &Value::Null)?;
        // One of both families leads to each by either.
        for ip in anywhere.addresses.all() {
            are(frontend, SocketAddr::new(ip, 80), &[1, 2])?;
        }
        let local = apply(mesh, "local", &json!({"spec": {"internalTrafficPolicy": "Local"}}))?;
        are(frontend, at(&local), &[1])?;
        are(payments, at(&local), &[2])?;
        let sticky = apply(mesh, "sticky", &json!({"spec": {"sessionAffinity": "ClientIP"}}))?;
        answered_soon(frontend, at(&sticky))?;
        eventually("one endpoint has the client", CHANGE, || {
            Ok((who(frontend, at(&sticky))?.len() == 1).then_some(()))
        })?;
        // Its own Service leads a pod to itself, too.
        are(&near, at(&local), &[1])?;

        // A load balancer's address: by pods, not out of the cluster and in again.
        let balanced: SocketAddr = if lab.family().has_v4() {
            "203.0.113.7:80".parse()?
        } else {
            "[2001:db8:77::7]:80".parse()?
        };
        let ingress = json!({"loadBalancer": {"ingress": [{"ip": balanced.ip()}]}});
        let more = json!({"spec": {"type": "LoadBalancer"}, "status": ingress});
        apply(mesh, "balanced", &more)?;
        are(frontend, balanced, &[1, 2])?;
        verdict(
            lab,
            "node-2",
            "destination",
            "shop/frontend",
            "shop/web-2",
            "FORWARDED",
            "allowed",
        )?;

        // Without a selector: the slice says who is behind it.
        let by_hand = apply(mesh, "by-hand", &json!({"spec": {"selector": null}}))?;
        slice(mesh, "by-hand", &[far.ip()])?;
        are(frontend, at(&by_hand), &[2])?;
        mixed(mesh, &far)?;
        without_address(mesh)?;
        lab.cluster().delete(&ObjectKey::new("EndpointSlice", "shop", "by-hand-1"))?;
        refused_soon(frontend, at(&by_hand)).map(drop)
    })
}

/// Behind one address: a pod that is served, one that is off, one that is enrolled and served by
/// nobody, and an address of the pods' range that nobody has. A strict client is given the first
/// two, each in its way, and never an error because of the others.
fn mixed(mesh: &Mesh, served: &Pod) -> Result<()> {
    let Mesh { lab, frontend, .. } = mesh;
    let role = TcpServer { listen: vec![any(TCP)], tag: 7, ..Default::default() };
    let board = lab
        .pod_on(lab.node("node-2")?, "legacy", "board")
        .container("main", Role::TcpServer(role))
        .start()?;
    board.wait_published()?;
    lab.wait_state(&board, "off")?;
    let [nobody, ghost] = [240, 241].map(|host| address::pod(lab.family(), 2, host).first());
    lab.cluster().apply(json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": "ghost", "namespace": "shop", "uid": "9f6e2d0c-0000-4000-8000-0057ab1e0001"},
        "spec": {
            "nodeName": "node-2", "serviceAccountName": "default",
            "containers": [{"name": "main", "image": "none"}],
        },
        "status": {
            "phase": "Running", "podIP": ghost.to_string(), "podIPs": [{"ip": ghost.to_string()}],
        },
    }))?;
    let service = apply(mesh, "mixed", &json!({"spec": {"selector": null}}))?;
    slice(mesh, "mixed", &[served.ip(), board.ip(), ghost, nobody])?;
    are(frontend, SocketAddr::new(service.addresses.first(), 80), &[2, 7])?;
    for (to, via) in [("shop/web-2", "mtls"), ("legacy/board", "plaintext")] {
        let flow = verdict(lab, "node-1", "source", "shop/frontend", to, "FORWARDED", "allowed")?;
        ensure!(flow.via == via, "{flow}");
    }
    // The controls: by themselves neither is reached.
    for (to, reason) in [(ghost, "peer_unreachable"), (nobody, "identity_unknown")] {
        refused_soon(frontend, SocketAddr::new(to, TCP))?;
        lab.agent("node-1")?.wait_flow("the refusal", &[], |flow| {
            flow.destination.ip == Some(to.to_string()) && flow.is("DROPPED", reason)
        })?;
    }
    Ok(())
}

/// Services that are only names: headless ones, whose clients dial pods (as tests do elsewhere),
/// and external names. Known, no fault of anybody's, and nobody's address.
fn without_address(mesh: &Mesh) -> Result<()> {
    let agent = mesh.lab.agent("node-1")?;
    let before = agent.status()?["problems"].clone();
    for (name, spec) in [
        (
            "headless",
            json!({
                "clusterIP": "None", "clusterIPs": ["None"], "selector": {"app": "web"},
                "ports": [{"name": "tcp", "port": TCP, "protocol": "TCP"}],
            }),
        ),
        ("elsewhere", json!({"type": "ExternalName", "externalName": "db.example.org"})),
    ] {
        mesh.lab.cluster().apply(json!({
            "apiVersion": "v1", "kind": "Service",
            "metadata": {"name": name, "namespace": "shop"}, "spec": spec,
        }))?;
    }
    let known = |name: &str| -> Result<Value> {
        let said = agent.cli(&["services", &format!("shop/{name}"), "-o", "json"])?.success()?;
        let node: Value = serde_json::from_str(&said)?;
        Ok(node["services"][0].clone())
    };
    let headless = eventually("the headless Service's pods are known", CHANGE, || {
        let service = known("headless")?;
        let endpoints = service["ports"][0]["endpoints"].as_array().map_or(0, Vec::len);
        Ok((endpoints >= 2).then_some(service))
    })?;
    let endpoints = headless["ports"][0]["endpoints"].as_array().into_iter().flatten();
    let ways: BTreeSet<Option<&str>> = endpoints.map(|e| e["way"].as_str()).collect();
    ensure!(ways == [Some("tunnel")].into() && headless["addresses"] == json!([]), "{headless}");
    let elsewhere = known("elsewhere")?;
    ensure!(elsewhere["addresses"] == json!([]) && elsewhere["ports"] == json!([]), "{elsewhere}");
    let now = agent.status()?["problems"].clone();
    ensure!(now == before, "{before} became {now}");
    Ok(())
}
