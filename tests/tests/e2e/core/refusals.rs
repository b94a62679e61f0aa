//! What strict refuses, and what it lets pass: never "the host" as such.

use std::net::SocketAddr;

use anyhow::{Result, ensure};
use serde_json::json;
use signet_lab::{
    LabOptions, address,
    process::Place,
    traffic::{
        Role,
        reports::{DialReport, TcpServerReport},
        roles::Dial,
    },
};

use crate::mesh::{
    CHANGE, HTTP, Mesh, TCP, TIMEOUT, answered, answered_soon, dial_with, refused, refused_soon,
    verdict, with_logs,
};

/// A dial from a place that is no pod.
fn dial_from(place: &Place, to: SocketAddr, text: &str) -> Result<DialReport> {
    let mut running = place.start_role("dial", &Role::dial(to, text).argv()?)?;
    let report = running.report(TIMEOUT)?;
    running.finish();
    Ok(report)
}

#[test]
fn plaintext_is_refused_at_once_and_reported() -> Result<()> {
    let mesh = Mesh::start(Some("strict"))?;
    with_logs(&mesh, |mesh| {
        let Mesh { lab, payments, reports, frontend, .. } = mesh;
        answered_soon(frontend, payments.at(TCP))?;
        let before: TcpServerReport = payments.report_of("tcp")?;
        for to in payments.all_at(TCP) {
            // The quickest of three: a first packet that the busy machine itself lost is sent
            // again after a second; one that is dropped silently always is.
            let mut quickest = u64::MAX;
            for _ in 0..3 {
                quickest = quickest.min(refused(reports, to, "plain from a pod")?.total_us);
            }
            ensure!(quickest < 500_000, "not at once: {quickest} us");
            let report = dial_from(lab.outside(), to, "plain from outside")?;
            ensure!(report.refused() && report.total_us < 500_000, "{report:?}");
        }
        // A closed port looks the same.
        for to in payments.all_at(9999) {
            refused(reports, to, "closed port")?;
        }
        let flow = verdict(
            lab,
            "node-2",
            "destination",
            "legacy/reports",
            "shop/payments",
            "DROPPED",
            "plaintext_refused",
        )?;
        ensure!(flow.via == "plaintext", "{flow}");
        let after: TcpServerReport = payments.report_of("tcp")?;
        ensure!(after.accepted == before.accepted, "{before:?} {after:?}");
        // The control: the other way round nothing is in the way.
        answered(frontend, reports.at(TCP), "outwards")?;
        Ok(())
    })
}

#[test]
fn only_the_kubelets_processes_probe() -> Result<()> {
    let mesh = Mesh::start(Some("strict"))?;
    with_logs(&mesh, |mesh| {
        let node = mesh.lab.node("node-2")?;
        for to in mesh.payments.all_at(HTTP) {
            let probe = node.probe(&format!("http://{to}/healthz"))?;
            ensure!(probe.status.success(), "the kubelet's probe: {probe:?}");
        }
        for to in mesh.payments.all_at(TCP) {
            let report = dial_from(&node.kubelet_place(), to, "tcp probe")?;
            ensure!(report.answered(), "{report:?}");
            // The same node, the same address, another process.
            let report = dial_from(&node.system_place(), to, "any host process")?;
            ensure!(report.refused(), "a host process got through: {report:?}");
            // Another node's kubelet is not this node's.
            let other = mesh.lab.node("node-1")?;
            let report = dial_from(&other.kubelet_place(), to, "another kubelet")?;
            ensure!(report.refused(), "another node's kubelet got through: {report:?}");
        }
        let status = mesh.lab.agent("node-2")?.status()?;
        ensure!(status["programs"]["probeCgroups"].to_string().contains("kubelet"), "{status}");
        Ok(())
    })
}

#[test]
fn exempt_ports_take_plaintext_and_no_others() -> Result<()> {
    let mesh = Mesh::start(Some("strict"))?;
    with_logs(&mesh, |mesh| {
        let Mesh { lab, payments, reports, .. } = mesh;
        refused_soon(reports, payments.at(TCP))?;
        refused(reports, payments.at(HTTP), "x")?;
        let exempt = format!("{TCP}/tcp");
        lab.cluster().annotate_namespace(
            "shop",
            "signet.dev/exempt-inbound-ports",
            Some(&exempt),
        )?;
        for to in payments.all_at(TCP) {
            answered_soon(reports, to)?;
        }
        for to in payments.all_at(HTTP) {
            let report = refused(reports, to, "not exempt")?;
            ensure!(report.total_us < 500_000, "{report:?}");
        }
        lab.cluster().annotate_namespace("shop", "signet.dev/exempt-inbound-ports", None)?;
        refused_soon(reports, payments.at(TCP))?;
        Ok(())
    })
}

#[test]
fn an_enrolled_peer_that_is_not_served_is_never_dialled_in_clear() -> Result<()> {
    let mesh = Mesh::without_agents(LabOptions::default(), Some("strict"))?;
    with_logs(&mesh, |mesh| {
        let Mesh { lab, frontend, payments, service, .. } = mesh;
        lab.agent("node-1")?.start_ready()?;
        lab.wait_state(frontend, "served")?;
        let capture = lab.capture("unserved")?;
        for to in payments.all_at(TCP) {
            refused(frontend, to, "marker-u45e")?;
        }
        for ip in service.addresses.all() {
            refused(frontend, (ip, 80).into(), "marker-u45e")?;
        }
        let captured = capture.stop()?;
        captured.complete()?;
        let packets = captured.tcp_between(&frontend.ips(), &payments.ips());
        ensure!(packets.is_empty(), "{} packets were sent", packets.len());
        verdict(
            lab,
            "node-1",
            "source",
            "shop/frontend",
            "shop/payments",
            "DROPPED",
            "peer_unreachable",
        )?;
        // The control: served, it is reached.
        lab.agent("node-2")?.start_ready()?;
        answered_soon(frontend, payments.at(TCP))?;
        Ok(())
    })
}

#[test]
fn an_address_of_the_cluster_that_nobody_knows_is_refused_and_the_world_outside_is_not()
-> Result<()> {
    let mesh = Mesh::start(Some("strict"))?;
    with_logs(&mesh, |mesh| {
        let Mesh { lab, frontend, .. } = mesh;
        let outside = lab.outside().start_role("outside", &Role::tcp(TCP).argv()?)?;
        outside.wait_event("listening", TIMEOUT)?;
        let capture = lab.capture("unknown")?;
        let unknown =
            [address::pod(lab.family(), 2, 250).all(), address::service(lab.family(), 999).all()]
                .concat();
        for ip in &unknown {
            refused(frontend, (*ip, TCP).into(), "marker-0dd1")?;
        }
        let captured = capture.stop()?;
        ensure!(captured.complete()?.tcp_between(&frontend.ips(), &unknown).is_empty());
        lab.agent("node-1")?.wait_flow("identity_unknown", &[], |flow| {
            flow.is("DROPPED", "identity_unknown")
                && flow.source.full_name() == "shop/frontend"
                && flow.destination.ip == Some(unknown[0].to_string())
        })?;
        for ip in lab.outside_addresses().all() {
            let report = answered(frontend, (ip, TCP).into(), "outside the mesh")?;
            ensure!(report.peer == Some((ip, TCP).into()), "{report:?}");
        }
        Ok(())
    })
}

#[test]
fn without_ranges_strict_refuses_what_it_does_not_know_and_names_the_key() -> Result<()> {
    let options = LabOptions { ranges: false, ..Default::default() };
    let mesh = Mesh::with(options, Some("strict"))?;
    with_logs(&mesh, |mesh| {
        let outside = mesh.lab.outside().start_role("outside", &Role::tcp(TCP).argv()?)?;
        outside.wait_event("listening", TIMEOUT)?;
        let to = (mesh.lab.outside_addresses().first(), TCP).into();
        refused(&mesh.frontend, to, "nobody knows")?;
        mesh.lab.agent("node-1")?.wait_problem("podRanges")?;
        // The control: with ranges the same address is outside them.
        mesh.lab.cluster().set_ranges(
            &address::pod_ranges(mesh.lab.family()),
            &address::service_ranges(mesh.lab.family()),
            &[],
        )?;
        answered_soon(&mesh.frontend, to)?;
        Ok(())
    })
}

#[test]
fn a_spoofed_address_gains_nothing() -> Result<()> {
    let mesh = Mesh::start(Some("strict"))?;
    with_logs(&mesh, |mesh| {
        let Mesh { lab, frontend, payments, reports, .. } = mesh;
        mesh.allow_payments(&["frontend"])?;
        answered_soon(frontend, payments.at(TCP))?;
        let before: TcpServerReport = payments.report_of("tcp")?;
        // A pod that is off takes the address of the one that is allowed, on the same bridge.
        for (ip, to) in frontend.ips().into_iter().zip(payments.all_at(TCP)) {
            reports.add_address(ip, "eth0")?;
            let spoofed =
                Dial { to, bind: Some((ip, 0).into()), timeout_ms: 1500, ..Dial::default() };
            let report = dial_with(reports, spoofed)?;
            ensure!(!report.answered(), "the spoofed address was believed: {report:?}");
        }
        let after: TcpServerReport = payments.report_of("tcp")?;
        ensure!(after.accepted == before.accepted, "{before:?} {after:?}");
        // The control: the attacker's own address works where plaintext is taken.
        lab.cluster().delete(&signet_lab::cluster_dir::ObjectKey::new(
            "IdentityPolicy",
            "shop",
            "payments-callers",
        ))?;
        lab.cluster().set_mode("shop", Some("permissive"))?;
        answered_soon(reports, payments.at(TCP))?;
        Ok(())
    })
}

#[test]
fn policy_on_address_blocks_and_ports_decides_plaintext_in_the_kernel() -> Result<()> {
    let mesh = Mesh::start(Some("permissive"))?;
    with_logs(&mesh, |mesh| {
        let Mesh { lab, payments, reports, .. } = mesh;
        for to in payments.all_at(TCP) {
            answered_soon(reports, to)?;
        }
        let blocks: Vec<String> = reports
            .ips()
            .iter()
            .map(|ip| format!("{ip}/{}", if ip.is_ipv4() { 32 } else { 128 }))
            .collect();
        lab.cluster().apply(crate::mesh::policy(
            "no-reports",
            "Deny",
            "payments",
            json!([{"from": [{"ipBlocks": blocks}], "ports": [{"port": TCP, "protocol": "TCP"}]}]),
        ))?;
        for to in payments.all_at(TCP) {
            refused_soon(reports, to)?;
        }
        for to in payments.all_at(HTTP) {
            signet_lab::eventually("the other port is open", CHANGE, || {
                Ok(reports.curl(&format!("http://{to}/x"))?.status.success().then_some(()))
            })?;
        }
        let flow = verdict(
            lab,
            "node-2",
            "destination",
            "legacy/reports",
            "shop/payments",
            "DROPPED",
            "policy_deny",
        )?;
        ensure!(flow.policy_name() == "shop/no-reports", "{flow}");
        Ok(())
    })
}
