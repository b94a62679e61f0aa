//! Rights that are taken away end open flows; rights that are given begin at once.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use signet_lab::{
    LabOptions,
    traffic::{
        Role,
        reports::{Closed, HoldReport},
        roles::Hold,
        unix_micros,
    },
};

use crate::mesh::{Mesh, TCP, TIMEOUT, answered_soon, refused_soon, with_logs};

/// An open flow must be closed this soon after its policy's file has changed.
const WITHDRAWN: Duration = Duration::from_secs(1);

#[test]
fn an_open_flow_that_loses_its_right_is_closed_within_a_second() -> Result<()> {
    let mesh = Mesh::start(Some("strict"))?;
    with_logs(&mesh, |mesh| {
        let Mesh { frontend, intruder, payments, lab, .. } = mesh;
        let to = payments.at(TCP);
        let mut latencies = Vec::new();
        for _ in 0..3 {
            mesh.allow_payments(&["frontend", "intruder"])?;
            answered_soon(intruder, to)?;
            answered_soon(frontend, to)?;
            let hold = Role::Hold(Hold { to, count: 5, ..Default::default() });
            let mut losing = intruder.start(&hold)?;
            let mut keeping = frontend.start(&hold)?;
            losing.wait_event("open", TIMEOUT)?;
            keeping.wait_event("open", TIMEOUT)?;

            let changed = unix_micros();
            mesh.allow_payments(&["frontend"])?;
            let report: HoldReport = losing.report(TIMEOUT)?;
            ensure!(report.opened == 5 && report.closed.len() == 5, "{report:?}");
            for Closed { at, outcome, .. } in &report.closed {
                // A reset: an application must not take it for a complete answer.
                ensure!(
                    outcome.ends_with("ECONNRESET") || outcome.ends_with("EPIPE"),
                    "{report:?}"
                );
                latencies.push(Duration::from_micros(at.saturating_sub(changed)));
            }
            let kept: HoldReport = keeping.finish_and_report(TIMEOUT)?;
            ensure!(kept.closed.iter().all(|c| c.outcome == "told"), "{kept:?}");
            losing.finish();
        }
        latencies.sort();
        let (median, worst) = (latencies[latencies.len() / 2], latencies[latencies.len() - 1]);
        println!("open flow closed after a policy change: median {median:?}, worst {worst:?}");
        ensure!(worst <= WITHDRAWN, "median {median:?}, worst {worst:?}");
        lab.agent("node-2")?.wait_flow("its end says why", &["--ends"], |flow| {
            flow.event == "end"
                && flow.reason == "right_withdrawn"
                && flow.between("shop/intruder", "shop/payments")
        })?;
        Ok(())
    })
}

#[test]
fn a_plaintext_flow_that_loses_its_right_is_closed_too() -> Result<()> {
    let mesh = Mesh::start(Some("permissive"))?;
    with_logs(&mesh, |mesh| {
        let Mesh { reports, payments, .. } = mesh;
        let to = payments.at(TCP);
        answered_soon(reports, to)?;
        let mut held = reports.start(&Role::Hold(Hold { to, ..Default::default() }))?;
        held.wait_event("open", TIMEOUT)?;
        let changed = unix_micros();
        mesh.allow_payments(&["frontend"])?;
        refused_soon(reports, to)?;
        let report: HoldReport = held.report(TIMEOUT)?;
        let closed = &report.closed[0];
        let latency = Duration::from_micros(closed.at.saturating_sub(changed));
        println!("plaintext flow ended {latency:?} after the change: {}", closed.outcome);
        ensure!(closed.outcome != "told" && latency <= WITHDRAWN, "{report:?} {latency:?}");
        held.finish();
        Ok(())
    })
}

#[test]
fn where_sockets_cannot_be_destroyed_their_packets_are_dropped() -> Result<()> {
    let masked = std::env::var("SIGNET_MASK_FEATURES").unwrap_or_default();
    let options = LabOptions {
        agent_env: vec![("SIGNET_MASK_FEATURES".into(), format!("{masked},sock_destroy"))],
        ..Default::default()
    };
    let mesh = Mesh::with(options, Some("permissive"))?;
    with_logs(&mesh, |mesh| {
        let Mesh { lab, frontend, reports, payments, .. } = mesh;
        let to = payments.at(TCP);
        let cut = || -> Result<usize> {
            let entries = lab.agent("node-2")?.map_entries()?;
            entries.get("CUT").copied().context("no such map")
        };
        answered_soon(reports, to)?;
        let hold = Role::Hold(Hold { to, timeout_ms: 2000, ..Default::default() });
        let mut losing = reports.start(&hold)?;
        let mut keeping = frontend.start(&hold)?;
        losing.wait_event("open", TIMEOUT)?;
        keeping.wait_event("open", TIMEOUT)?;
        ensure!(cut()? == 0, "{}", cut()?);

        let changed = unix_micros();
        mesh.allow_payments(&["frontend"])?;
        let report: HoldReport = losing.report(TIMEOUT)?;
        let closed = &report.closed[0];
        // It hears nothing more, and gives up two seconds after its last answer.
        ensure!(closed.outcome == "read:ETIMEDOUT", "{report:?}");
        let silent = Duration::from_micros(closed.at.saturating_sub(changed));
        ensure!(silent <= WITHDRAWN + Duration::from_secs(2), "{silent:?} {report:?}");
        ensure!(cut()? == 1, "{}", cut()?);
        let kept: HoldReport = keeping.finish_and_report(TIMEOUT)?;
        ensure!(kept.closed.iter().all(|c| c.outcome == "told"), "{kept:?}");
        lab.agent("node-2")?.wait_flow("its end says why", &["--ends"], |flow| {
            flow.event == "end" && flow.between("legacy/reports", "shop/payments")
        })?;

        losing.finish();
        payments.remove()?;
        signet_lab::eventually("nothing stays cut of a pod that is gone", TIMEOUT, || {
            Ok((cut()? == 0).then_some(()))
        })?;
        Ok(())
    })
}
