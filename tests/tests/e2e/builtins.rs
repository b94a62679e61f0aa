//! Built-ins: what passes without a policy, listed, explained, and removed by configuration.

use std::{fs, net::SocketAddr};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use signet_lab::{
    LabOptions, Service,
    cluster_dir::ObjectKey,
    eventually,
    pod::Pod,
    traffic::{Role, reports::UdpReport, roles::UdpClient},
};

use crate::mesh::{
    CHANGE, HTTP, Mesh, TCP, TIMEOUT, answered_soon, refused_soon, verdict, with_logs,
};

const DNS: u16 = 53;

/// A pod that answers on port 53, as a resolver does, over UDP and TCP.
fn resolver(mesh: &Mesh, namespace: &str, name: &str) -> Result<Pod> {
    let pod = mesh
        .lab
        .pod_on(mesh.lab.node("node-2")?, namespace, name)
        .container("udp", Role::udp(DNS))
        .container("tcp", Role::tcp(DNS))
        .start()?;
    pod.wait_published()?;
    Ok(pod)
}

fn kube_dns(mesh: &Mesh) -> Result<Service> {
    mesh.lab.apply_service(json!({
        "apiVersion": "v1", "kind": "Service",
        "metadata": {"name": "kube-dns", "namespace": "kube-system"},
        "spec": {
            "selector": {"app": "coredns"},
            "ports": [
                {"name": "dns", "port": DNS, "protocol": "UDP", "targetPort": DNS},
                {"name": "dns-tcp", "port": DNS, "protocol": "TCP", "targetPort": DNS},
            ],
        },
    }))
}

fn datagrams(client: &Pod, to: SocketAddr) -> Result<UdpReport> {
    let role = UdpClient { to, count: 2, timeout_ms: 300, ..Default::default() };
    client.run(&Role::UdpClient(role), TIMEOUT)
}

/// Names are resolved over both protocols.
fn resolves(client: &Pod, at: &[SocketAddr]) -> Result<()> {
    for to in at {
        eventually(&format!("{} resolves at {to}", client.full_name()), CHANGE, || {
            let report = datagrams(client, *to)?;
            ensure!(report.answered == 2, "{report:?}");
            Ok(Some(()))
        })?;
        answered_soon(client, *to)?;
    }
    Ok(())
}

/// Nothing is answered over either protocol.
fn does_not_resolve(client: &Pod, at: &[SocketAddr]) -> Result<()> {
    for to in at {
        eventually(&format!("{} resolves nothing at {to}", client.full_name()), CHANGE, || {
            let report = datagrams(client, *to)?;
            Ok((report.answered == 0 && report.sent == 0).then_some(()))
        })?;
        refused_soon(client, *to)?;
    }
    Ok(())
}

/// The newest verdict of the client's node about a dial of port 53 there has this reason.
fn told(mesh: &Mesh, client: &str, at: &str, word: &str, reason: &str) -> Result<String> {
    for protocol in ["udp", "tcp"] {
        let agent = mesh.lab.agent("node-1")?;
        let flow = agent.wait_flow(
            &format!("{client} -> {at} {word} {reason}"),
            &["--port", "53", "--protocol", protocol],
            |flow| flow.source.full_name() == client && flow.is(word, reason),
        )?;
        if protocol == "tcp" {
            return Ok(flow.policy_name());
        }
    }
    Ok(String::new())
}

fn listed(mesh: &Mesh, name: &str) -> Result<Value> {
    let output = mesh.lab.agent("node-1")?.cli(&["policy", "list", "-o", "json"])?;
    let list: Value = serde_json::from_str(&output.stdout).context(output.stderr.clone())?;
    let policies = list["policies"].as_array().context("no policies")?;
    let found = policies.iter().find(|p| p["kind"] == "Builtin" && p["name"] == name);
    found.cloned().with_context(|| format!("no built-in {name} in {list}"))
}

fn in_force(mesh: &Mesh, name: &str, reason: &str) -> Result<Value> {
    eventually(&format!("{name} is {reason}"), CHANGE, || {
        let listed = listed(mesh, name)?;
        Ok((listed["conditions"][0]["reason"] == reason).then_some(listed))
    })
}

const ONLY_PAYMENTS: &str = "apiVersion: signet.dev/v1alpha1
kind: IdentityPolicy
metadata: {name: only-payments, namespace: shop}
spec:
  selector: {matchLabels: {app: frontend}}
  egress: [{to: [{services: [shop/payments]}]}]
";

const NO_NAMES: &str = "apiVersion: signet.dev/v1alpha1
kind: IdentityPolicy
metadata: {name: no-names, namespace: shop}
spec:
  selector: {matchLabels: {app: frontend}}
  action: Deny
  egress: [{to: [{services: [kube-system/kube-dns]}]}]
";

#[test]
fn dns_and_probes_pass_until_they_are_denied_or_removed() -> Result<()> {
    let mesh = Mesh::without_agents(LabOptions::default(), Some("strict"))?;
    with_logs(&mesh, |mesh| {
        let Mesh { lab, frontend, payments, .. } = mesh;
        let cluster = lab.cluster();
        lab.namespace("kube-system", None)?;
        let coredns = resolver(mesh, "kube-system", "coredns")?;
        let other = resolver(mesh, "legacy", "other")?;
        let service = kube_dns(mesh)?;
        cluster.namespace(
            "watched",
            &[("signet.dev/mode", "observe"), ("signet.dev/default", "deny")],
        )?;
        let watched = lab.pod("watched", "client").start()?;
        watched.wait_published()?;
        let config = lab.directory().join("agent.yaml");
        let file = config.display().to_string();
        let configure = |text: &str| fs::write(&config, text).context("agent.yaml");
        configure("builtins: [dns, kubelet-probes]\n")?;
        for agent in lab.agents() {
            agent.set_flags(&["--config", &file]);
        }
        lab.start_agents()?;
        for pod in [frontend, payments] {
            lab.wait_state(pod, "served")?;
        }
        lab.wait_state(&watched, "observed")?;

        let mut names: Vec<SocketAddr> = coredns.all_at(DNS);
        names.extend(service.addresses.all().into_iter().map(|ip| SocketAddr::from((ip, DNS))));
        // Without a policy everything is open, and that is no built-in's doing.
        resolves(frontend, &names)?;
        resolves(frontend, &other.all_at(DNS))?;

        // Under an egress ALLOW to something else names are resolved, by the built-in.
        cluster.apply_yaml(ONLY_PAYMENTS)?;
        does_not_resolve(frontend, &other.all_at(DNS))?;
        resolves(frontend, &names)?;
        let by = told(mesh, "shop/frontend", "other", "DROPPED", "policy_no_match")?;
        ensure!(by == "shop/only-payments", "{by}");
        for protocol in ["udp", "tcp"] {
            let by_builtin = |flow: &signet_lab::agent::Flow| {
                flow.source.full_name() == "shop/frontend"
                    && flow.is("FORWARDED", "allowed")
                    && flow.policy_name() == "/dns"
            };
            let filters = ["--port", "53", "--protocol", protocol];
            lab.agent("node-1")?.wait_flow("Builtin/dns decides", &filters, by_builtin)?;
        }
        let shown = in_force(mesh, "dns", "InForce")?;
        let message = shown["conditions"][0]["message"].as_str().unwrap_or_default();
        for to in &names {
            ensure!(message.contains(&format!("{to}/udp")), "{to} in {message}");
        }
        let output = lab.agent("node-1")?.cli(&[
            "policy",
            "check",
            "--from",
            "shop/frontend",
            "--to",
            "kube-system/coredns:53",
            "--protocol",
            "udp",
        ])?;
        ensure!(output.code() == 0, "{} {}", output.stdout, output.stderr);
        ensure!(output.stdout.contains("the built-in dns"), "{}", output.stdout);
        // The same where the default is deny, and where it is only observed.
        cluster.delete(&ObjectKey::new("IdentityPolicy", "shop", "only-payments"))?;
        cluster.label_namespace("shop", "signet.dev/default", Some("deny"))?;
        refused_soon(frontend, payments.at(TCP))?;
        does_not_resolve(frontend, &other.all_at(DNS))?;
        resolves(frontend, &names)?;
        resolves(&watched, &names)?;
        resolves(&watched, &other.all_at(DNS))?;
        told(mesh, "watched/client", "other", "AUDIT", "policy_no_match")?;
        let by = told(mesh, "watched/client", "kube-dns", "FORWARDED", "allowed")?;
        ensure!(by == "/dns", "{by}");

        // A DENY wins.
        cluster.apply_yaml(NO_NAMES)?;
        does_not_resolve(frontend, &names)?;
        let by = told(mesh, "shop/frontend", "kube-dns", "DROPPED", "policy_deny")?;
        ensure!(by == "shop/no-names", "{by}");
        cluster.delete(&ObjectKey::new("IdentityPolicy", "shop", "no-names"))?;
        resolves(frontend, &names)?;

        // The kubelet's probes: named, and removed without touching names.
        let probe = payments.url(HTTP, "/healthz");
        let node = lab.node("node-2")?;
        eventually("a probe passes", CHANGE, || Ok(node.probe(&probe)?.success().ok()))?;
        lab.agent("node-2")?.wait_flow("Builtin/kubelet-probes decides", &[], |flow| {
            flow.is("FORWARDED", "allowed") && flow.policy_name() == "/kubelet-probes"
        })?;
        configure("builtins: [dns]\n")?;
        in_force(mesh, "kubelet-probes", "Removed")?;
        eventually("a probe is refused", CHANGE, || {
            Ok((node.probe(&probe)?.code() != 0).then_some(()))
        })?;
        lab.agent("node-2")?.wait_flow("the probe's refusal", &[], |flow| {
            flow.destination.full_name() == "shop/payments"
                && flow.is("DROPPED", "plaintext_refused")
        })?;
        resolves(frontend, &names)?;

        // Removed, DNS is refused as anything else is.
        configure("builtins: [kubelet-probes]\n")?;
        in_force(mesh, "dns", "Removed")?;
        does_not_resolve(frontend, &names)?;
        verdict(
            lab,
            "node-1",
            "source",
            "shop/frontend",
            "kube-system/coredns",
            "DROPPED",
            "policy_no_match",
        )?;
        eventually("a probe passes again", CHANGE, || Ok(node.probe(&probe)?.success().ok()))?;
        configure("builtins: [dns, kubelet-probes]\n")?;
        resolves(frontend, &names)?;
        Ok(())
    })
}
