//! An allowed call and a denied one: tunnels on the wire, addresses shown, verdicts.

use anyhow::{Result, ensure};
use serde_json::Value;
use signet_lab::traffic::{Role, reports::DialReport, roles::Dial};

use crate::mesh::{
    HTTP, Mesh, TCP, TIMEOUT, answered, answered_soon, dial, refused, refused_soon, verdict,
    with_logs,
};

#[test]
fn curl_crosses_only_in_tunnels_and_in_clear_with_the_namespace_off() -> Result<()> {
    let mesh = Mesh::start(Some("strict"))?;
    with_logs(&mesh, |mesh| {
        let Mesh { lab, frontend, payments, service, .. } = mesh;
        // From before the first connection: a tunnel can only be read from its beginning.
        let capture = lab.capture("strict")?;
        answered_soon(frontend, payments.at(TCP))?;
        for address in payments.all_at(HTTP) {
            let answer = frontend.curl(&format!("http://{address}/marker-7c41"))?.success()?;
            ensure!(answer.contains("/marker-7c41"), "{answer}");
        }
        for ip in service.addresses.all() {
            let url = format!("http://{}/marker-7c41", std::net::SocketAddr::from((ip, 80)));
            let answer = frontend.curl(&url)?.success()?;
            ensure!(answer.contains("/marker-7c41"), "{answer}");
        }
        let captured = capture.stop()?;
        let records = captured.only_tunnels_between(&frontend.ips(), &payments.ips())?;
        ensure!(records > 10, "only {records} TLS records");
        let hits = captured.find("marker-7c41");
        ensure!(hits.is_empty(), "in clear: {hits:?}");

        // The control: the same search finds the marker once nothing is enrolled.
        lab.cluster().set_mode("shop", Some("off"))?;
        lab.wait_state(frontend, "off")?;
        lab.wait_state(payments, "off")?;
        let capture = lab.capture("off")?;
        frontend.curl(&payments.url(HTTP, "/marker-7c41"))?.success()?;
        let captured = capture.stop()?;
        captured.complete()?;
        ensure!(captured.find("marker-7c41").len() >= 2, "{:?}", captured.find("marker-7c41"));
        ensure!(captured.only_tunnels_between(&frontend.ips(), &payments.ips()).is_err());
        Ok(())
    })
}

#[test]
fn both_sides_are_shown_each_other() -> Result<()> {
    let mesh = Mesh::start(Some("strict"))?;
    with_logs(&mesh, |mesh| {
        let Mesh { frontend, payments, .. } = mesh;
        answered_soon(frontend, payments.at(TCP))?;
        for to in payments.all_at(TCP) {
            let report = answered(frontend, to, "who is there")?;
            shown(&report, to, frontend)?;
        }
        // IPv4 through an IPv6 socket.
        if let Some(v4) = payments.addresses().v4 {
            let mapped = (v4.to_ipv6_mapped(), TCP).into();
            let report: DialReport =
                frontend.run(&Role::Dial(Dial { to: mapped, ..Dial::default() }), TIMEOUT)?;
            ensure!(report.answered(), "{report:?}");
            ensure!(report.peer == Some(mapped), "{report:?}");
            let seen = report.seen.as_ref().map(|s| s.accepted.ip());
            ensure!(seen == frontend.addresses().v4.map(Into::into), "{report:?}");
        }
        // HTTP over the Service's address: the server sees the client, not a proxy.
        let ip = mesh.service.addresses.first();
        let url = format!("http://{}/x", std::net::SocketAddr::from((ip, 80)));
        let seen: Value = serde_json::from_str(&frontend.curl(&url)?.success()?)?;
        let accepted: std::net::SocketAddr = serde_json::from_value(seen["accepted"].clone())?;
        ensure!(frontend.ips().contains(&accepted.ip()), "{seen}");
        Ok(())
    })
}

fn shown(
    report: &DialReport,
    dialled: std::net::SocketAddr,
    client: &signet_lab::pod::Pod,
) -> Result<()> {
    let Some(seen) = &report.seen else { anyhow::bail!("{report:?}") };
    let local = report.local.map(|a| a.ip());
    ensure!(report.peer == Some(dialled), "getpeername is not what was dialled: {report:?}");
    ensure!(local.is_some_and(|ip| client.ips().contains(&ip)), "getsockname: {report:?}");
    ensure!(client.ips().contains(&seen.accepted.ip()), "accept(): {report:?}");
    ensure!(seen.peer == seen.accepted, "accept() and getpeername() differ: {report:?}");
    ensure!(seen.local == dialled, "the server's getsockname: {report:?}");
    ensure!(Some(seen.accepted.port()) == report.local.map(|a| a.port()), "port: {report:?}");
    Ok(())
}

#[test]
fn two_pods_of_one_account_arrive_from_their_own_addresses() -> Result<()> {
    let mesh = Mesh::start(Some("strict"))?;
    with_logs(&mesh, |mesh| {
        let twin = mesh.lab.pod("shop", "frontend-2").service_account("frontend").start()?;
        mesh.lab.wait_state(&twin, "served")?;
        for _ in 0..10 {
            for client in [&mesh.frontend, &twin] {
                let report = answered_soon(client, mesh.payments.at(TCP))?;
                let seen = report.seen.map(|s| s.accepted.ip());
                ensure!(seen == Some(client.ip()), "{}: {seen:?}", client.full_name());
            }
        }
        Ok(())
    })
}

#[test]
fn a_denied_identity_gets_a_reset_and_a_verdict_on_both_nodes() -> Result<()> {
    let mesh = Mesh::start(Some("strict"))?;
    with_logs(&mesh, |mesh| {
        let Mesh { lab, frontend, intruder, payments, .. } = mesh;
        let to = payments.at(TCP);
        // The control: without policy the intruder is answered.
        answered_soon(intruder, to)?;
        mesh.allow_payments(&["frontend"])?;
        refused_soon(intruder, to)?;
        answered_soon(frontend, to)?;
        let report = refused(intruder, to, "let me in")?;
        ensure!(report.total_us < 1_000_000, "not at once: {report:?}");

        let (from, dest) = ("shop/intruder", "shop/payments");
        let server =
            verdict(lab, "node-2", "destination", from, dest, "DROPPED", "policy_no_match")?;
        ensure!(server.via == "mtls" && server.direction == "ingress", "{server}");
        ensure!(server.policy_name() == "shop/payments-callers", "{server}");
        ensure!(server.source.known_by.as_deref() == Some("mtls"), "{server}");
        ensure!(
            server.source.identity.as_deref() == Some("spiffe://cluster.local/ns/shop/sa/intruder"),
            "{server}"
        );
        let client = verdict(lab, "node-1", "source", from, dest, "DROPPED", "policy_no_match")?;
        ensure!(client.direction == "egress", "{client}");

        // The allowed one: one flow, one uuid, both nodes.
        let server =
            verdict(lab, "node-2", "destination", "shop/frontend", dest, "FORWARDED", "allowed")?;
        let client = lab.agent("node-1")?.wait_flow("the same flow", &[], |flow| {
            flow.reporter == "source" && flow.uuid == server.uuid
        })?;
        ensure!(client.is("FORWARDED", "allowed") && client.via == "mtls", "{client}");
        ensure!(client.between("shop/frontend", dest), "{client}");

        // Allowed after the policy's file changes.
        mesh.allow_payments(&["frontend", "intruder"])?;
        answered_soon(intruder, to)?;
        Ok(())
    })
}

#[test]
fn nothing_stays_behind_after_calls() -> Result<()> {
    let mesh = Mesh::start(Some("strict"))?;
    with_logs(&mesh, |mesh| {
        answered_soon(&mesh.frontend, mesh.payments.at(TCP))?;
        // A first burst makes what stays by right: the pool's connections, threads, buffers.
        burst(mesh)?;
        let before: Vec<_> = mesh.lab.agents().iter().map(held).collect::<Result<_>>()?;
        for _ in 0..3 {
            burst(mesh)?;
        }
        for (agent, before) in mesh.lab.agents().iter().zip(before) {
            signet_lab::eventually("map entries and descriptors as before", TIMEOUT, || {
                let now = held(agent)?;
                if now.0 == before.0 && now.1 <= before.1 + 2 && now.2 <= before.2 {
                    return Ok(Some(()));
                }
                anyhow::bail!("{}: {before:?} became {now:?}", agent.node().name)
            })?;
        }
        Ok(())
    })
}

/// Entries of the hand-over maps, descriptors beside the tunnels', threads.
fn held(agent: &signet_lab::agent::Agent) -> Result<(Vec<usize>, usize, usize)> {
    let maps = agent.map_entries()?;
    let entries = ["ORIGINALS", "CLIENTS", "PODS", "OWN", "ADDRESSES"]
        .iter()
        .map(|name| maps.get(name).copied().unwrap_or_default())
        .collect();
    let usage = agent.usage()?;
    // Tunnels are kept for the next flow, some more or fewer of them.
    let tunnels = maps.get("TUNNELS").copied().unwrap_or_default();
    Ok((entries, usage.descriptors.saturating_sub(tunnels), usage.threads))
}

fn burst(mesh: &Mesh) -> Result<()> {
    use signet_lab::traffic::{reports::HammerReport, roles::Hammer};
    let to = mesh.payments.all_at(TCP).into_iter().map(|to| (to, 0)).collect();
    let hammer = Hammer { to, count: 300, parallel: 16, ..Default::default() };
    let report: HammerReport = mesh.frontend.run(&Role::Hammer(hammer), TIMEOUT)?;
    ensure!(report.misdirected == 0, "{report:?}");
    ensure!(report.answered == 100 && report.failures.is_empty(), "{report:?}");
    Ok(())
}

#[test]
fn a_pod_reaches_itself_and_its_loopback_untouched() -> Result<()> {
    let mesh = Mesh::start(Some("strict"))?;
    with_logs(&mesh, |mesh| {
        for to in mesh.payments.all_at(TCP) {
            let report = dial(&mesh.payments, to, "self")?;
            ensure!(report.answered() && report.peer == Some(to), "{report:?}");
        }
        let report = dial(&mesh.payments, (std::net::Ipv6Addr::LOCALHOST, TCP).into(), "lo")?;
        ensure!(report.answered(), "{report:?}");
        Ok(())
    })
}

#[test]
fn a_server_on_loopback_only_is_unreachable_through_the_tunnel() -> Result<()> {
    let mesh = Mesh::start(Some("strict"))?;
    with_logs(&mesh, |mesh| {
        let loopbacks = [
            (std::net::Ipv4Addr::LOCALHOST, 9100).into(),
            (std::net::Ipv6Addr::LOCALHOST, 9100).into(),
        ];
        let role = signet_lab::traffic::roles::TcpServer {
            listen: loopbacks.to_vec(),
            ..Default::default()
        };
        let _server = mesh.payments.start(&Role::TcpServer(role))?;
        _server.wait_event("listening", TIMEOUT)?;
        // The controls: it answers inside the pod, and the tunnel to the pod works.
        answered(&mesh.payments, loopbacks[1], "inside")?;
        answered_soon(&mesh.frontend, mesh.payments.at(TCP))?;
        for to in mesh.payments.all_at(9100) {
            refused(&mesh.frontend, to, "outside")?;
        }
        verdict(
            &mesh.lab,
            "node-2",
            "destination",
            "shop/frontend",
            "shop/payments",
            "DROPPED",
            "app_unreachable",
        )?;
        Ok(())
    })
}
