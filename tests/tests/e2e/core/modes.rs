//! Modes: what each touches, how they change live, and what a pod's own label may do.

use std::{thread, time::Duration};

use anyhow::{Result, ensure};
use signet_lab::{
    LabOptions,
    traffic::{Role, reports::LoadReport, roles::Load},
};

use crate::mesh::{
    CHANGE, HTTP, Mesh, TCP, TIMEOUT, answered, answered_soon, refused, refused_soon, verdict,
    with_logs,
};

#[test]
fn observe_touches_nothing_and_says_what_strict_would_do() -> Result<()> {
    let mesh = Mesh::start(Some("observe"))?;
    with_logs(&mesh, |mesh| {
        let Mesh { lab, frontend, intruder, payments, reports, .. } = mesh;
        mesh.allow_payments(&["frontend"])?;
        let capture = lab.capture("observe")?;
        let report = answered(frontend, payments.at(TCP), "marker-ob5e")?;
        ensure!(report.peer == Some(payments.at(TCP)), "{report:?}");
        let captured = capture.stop()?;
        ensure!(!captured.complete()?.find("marker-ob5e").is_empty(), "observe tunnelled");

        // An enrollable peer counts as tunnelled under the identity of its address.
        answered(frontend, payments.at(TCP), "x")?;
        verdict(
            lab,
            "node-2",
            "destination",
            "shop/frontend",
            "shop/payments",
            "FORWARDED",
            "allowed",
        )?;
        answered_until_reported(mesh, intruder, "policy_no_match")?;
        // A peer that is off counts as plaintext.
        answered_until_reported(mesh, reports, "plaintext_refused")?;
        Ok(())
    })
}

/// Everything is answered; the destination reports AUDIT with this reason.
fn answered_until_reported(mesh: &Mesh, client: &signet_lab::pod::Pod, reason: &str) -> Result<()> {
    signet_lab::eventually(&format!("AUDIT {reason}"), CHANGE, || {
        answered(client, mesh.payments.at(TCP), "x")?;
        let flows = mesh.lab.agent("node-2")?.flows(&["--verdict", "audit"])?;
        let found = flows.iter().any(|flow| {
            flow.between(&client.full_name(), "shop/payments") && flow.is("AUDIT", reason)
        });
        if found {
            return Ok(Some(()));
        }
        let seen: Vec<String> = flows.iter().map(ToString::to_string).collect();
        anyhow::bail!("{seen:#?}")
    })
}

#[test]
fn permissive_tunnels_where_it_can_and_takes_plaintext() -> Result<()> {
    let mesh = Mesh::start(Some("permissive"))?;
    with_logs(&mesh, |mesh| {
        let Mesh { lab, frontend, payments, reports, .. } = mesh;
        answered_soon(frontend, payments.at(TCP))?;
        // Served: tunnelled (once the board's news have reached this node).
        signet_lab::eventually("tunnelled", CHANGE, || {
            let capture = lab.capture("permissive")?;
            answered(frontend, payments.at(TCP), "marker-9e51")?;
            let captured = capture.stop()?;
            let hits = captured.complete()?.find("marker-9e51");
            if hits.is_empty() {
                return Ok(Some(()));
            }
            anyhow::bail!("in clear: {hits:?}")
        })?;
        // Plaintext from outside the mesh passes, and policy is enforced on it too.
        let report = answered(reports, payments.at(TCP), "plain")?;
        let seen = report.seen.map(|s| s.accepted.ip());
        ensure!(seen == Some(reports.ip()), "{seen:?}");
        verdict(
            lab,
            "node-2",
            "destination",
            "legacy/reports",
            "shop/payments",
            "FORWARDED",
            "allowed",
        )?;
        mesh.allow_payments(&["frontend"])?;
        refused_soon(reports, payments.at(TCP))?;
        answered_soon(frontend, payments.at(TCP))?;
        Ok(())
    })
}

#[test]
fn a_permissive_pod_reaches_an_enrolled_peer_that_nobody_serves_directly() -> Result<()> {
    let mesh = Mesh::without_agents(LabOptions::default(), Some("permissive"))?;
    with_logs(&mesh, |mesh| {
        mesh.lab.agent("node-1")?.start_ready()?;
        mesh.lab.wait_state(&mesh.frontend, "served")?;
        let report = answered(&mesh.frontend, mesh.payments.at(TCP), "direct")?;
        let seen = report.seen.map(|s| s.accepted.ip());
        ensure!(seen == Some(mesh.frontend.ip()), "{seen:?}");
        Ok(())
    })
}

#[test]
fn a_namespace_moves_up_and_down_while_requests_flow() -> Result<()> {
    let mesh = Mesh::start(None)?;
    with_logs(&mesh, |mesh| {
        let Mesh { lab, frontend, payments, .. } = mesh;
        let load = Load { to: payments.at(HTTP), interval_ms: 5, ..Default::default() };
        let mut running = frontend.start(&Role::Load(load))?;
        running.wait_event("change", TIMEOUT)?;
        for mode in ["observe", "permissive", "strict", "permissive", "observe", "off"] {
            lab.cluster().set_mode("shop", Some(mode))?;
            let state = crate::mesh::state_of(mode);
            for pod in [frontend, payments] {
                lab.wait_state(pod, state)?;
                signet_lab::eventually(&format!("{mode} in force"), CHANGE, || {
                    let endpoint = lab.agent(&pod.node().name)?.endpoint(pod)?;
                    Ok(endpoint.filter(|e| e["mode"] == mode))
                })?;
            }
            thread::sleep(Duration::from_millis(500));
        }
        let report: LoadReport = running.finish_and_report(TIMEOUT)?;
        // From observe to strict by way of permissive nothing is lost: a peer is enrolled and
        // served on both sides before strict refuses what is not.
        ensure!(report.total() > 100, "{report:?}");
        ensure!(report.answered() == report.total(), "{report:?}");
        Ok(())
    })
}

#[test]
fn a_pods_own_label_only_raises() -> Result<()> {
    let mesh = Mesh::start(Some("strict"))?;
    with_logs(&mesh, |mesh| {
        let Mesh { lab, payments, reports, frontend, .. } = mesh;
        refused_soon(reports, payments.at(TCP))?;
        lab.cluster().label_pod("shop", "payments", "signet.dev/mode", Some("off"))?;
        let problem = lab.agent("node-2")?.wait_problem("shop/payments")?;
        ensure!(problem.to_string().contains("signet.dev/mode"), "{problem}");
        refused(reports, payments.at(TCP), "still")?;
        let endpoint = lab.agent("node-2")?.endpoint(payments)?;
        ensure!(endpoint.as_ref().is_some_and(|e| e["mode"] == "strict"), "{endpoint:?}");

        // The controls: a namespace that allows it is followed, and a tighter label counts.
        lab.cluster().label_namespace("shop", "signet.dev/allow-pod-override", Some("true"))?;
        lab.wait_state(payments, "off")?;
        answered_soon(reports, payments.at(TCP))?;
        lab.cluster().label_namespace("shop", "signet.dev/allow-pod-override", None)?;
        lab.cluster().label_pod("shop", "payments", "signet.dev/mode", None)?;
        lab.cluster().set_mode("shop", Some("permissive"))?;
        lab.wait_state(payments, "served")?;
        answered_soon(reports, payments.at(TCP))?;
        lab.cluster().label_pod("shop", "payments", "signet.dev/mode", Some("strict"))?;
        refused_soon(reports, payments.at(TCP))?;
        answered_soon(frontend, payments.at(TCP))?;
        Ok(())
    })
}

#[test]
fn an_unknown_mode_keeps_the_last_valid_one_and_is_reported() -> Result<()> {
    let mesh = Mesh::start(Some("strict"))?;
    with_logs(&mesh, |mesh| {
        refused_soon(&mesh.reports, mesh.payments.at(TCP))?;
        mesh.lab.cluster().set_mode("shop", Some("stricter"))?;
        for agent in mesh.lab.agents() {
            let problem = agent.wait_problem("stricter")?;
            ensure!(problem.to_string().contains("shop"), "{problem}");
        }
        refused(&mesh.reports, mesh.payments.at(TCP), "still strict")?;
        answered(&mesh.frontend, mesh.payments.at(TCP), "still served")?;
        Ok(())
    })
}
