//! Services beyond a virtual address with ready endpoints: whose endpoints a client is given, and
//! by which other addresses it gets there.

use std::{collections::BTreeSet, net::SocketAddr};

use anyhow::{Context, Result};
use serde_json::{Value, json};
use signet_lab::{
    Service,
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
        are(frontend, at(&anywhere), &[1, 2])?;
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
        let family = if at(&by_hand).is_ipv4() { "IPv4" } else { "IPv6" };
        lab.cluster().apply(json!({
            "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
            "metadata": {
                "name": "by-hand-1", "namespace": "shop",
                "labels": {"kubernetes.io/service-name": "by-hand"},
            },
            "addressType": family,
            "ports": [{"name": "tcp", "port": TCP, "protocol": "TCP"}],
            "endpoints": [{"addresses": [far.ip().to_string()], "conditions": {"ready": true}}],
        }))?;
        are(frontend, at(&by_hand), &[2])?;
        lab.cluster().delete(&ObjectKey::new("EndpointSlice", "shop", "by-hand-1"))?;
        refused_soon(frontend, at(&by_hand)).map(drop)
    })
}
