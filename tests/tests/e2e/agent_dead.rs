//! The agent is dead for longer than its heartbeat counts (30 s).

use std::{thread, time::Duration};

use anyhow::{Result, ensure};
use signet_lab::{
    LabOptions,
    traffic::{Role, reports::FirstMomentReport, roles::FirstMoment},
};

use crate::mesh::{Mesh, TCP, TIMEOUT, answered_soon, refused, retriable, with_logs};

/// The heartbeat's age at which an agent counts as dead, and a little.
const DEAD: Duration = Duration::from_secs(32);

/// A new pod of the unenrolled namespace dials right after the agent's death and again once
/// it counts as dead; what came of each.
fn young_pod(mesh: &Mesh, name: &str) -> Result<FirstMomentReport> {
    let role = FirstMoment { to: mesh.reports.at(TCP), for_ms: 500, ..Default::default() };
    let pod = mesh.lab.pod("legacy", name).container("main", Role::FirstMoment(role)).start()?;
    pod.with_container("main", |running| running.report(TIMEOUT))
}

#[test]
fn new_pods_of_an_unenrolled_namespace_work_and_strict_ones_stay_closed() -> Result<()> {
    let mesh = Mesh::start(Some("strict"))?;
    with_logs(&mesh, |mesh| {
        answered_soon(&mesh.frontend, mesh.payments.at(TCP))?;
        mesh.lab.agent("node-1")?.kill();
        let early = young_pod(mesh, "early")?;
        ensure!(early.answered_us.is_none(), "unknown while the heartbeat is young: {early:?}");
        ensure!(early.outcomes.keys().all(|o| retriable(o)), "{early:?}");
        thread::sleep(DEAD);
        let late = young_pod(mesh, "late")?;
        ensure!(late.answered_us.is_some(), "{late:?}");
        // A registered strict pod stays closed, towards anybody.
        let report = refused(&mesh.frontend, mesh.payments.at(TCP), "closed")?;
        ensure!(retriable(&report.outcome), "{report:?}");
        Ok(())
    })
}

#[test]
fn hardened_nodes_keep_new_pods_closed() -> Result<()> {
    let options = LabOptions {
        agent_flags: vec!["--when-agent-dead".into(), "deny".into()],
        ..Default::default()
    };
    let mesh = Mesh::with(options, Some("strict"))?;
    with_logs(&mesh, |mesh| {
        mesh.lab.agent("node-1")?.kill();
        thread::sleep(DEAD);
        let late = young_pod(mesh, "late")?;
        ensure!(late.answered_us.is_none(), "{late:?}");
        // The control: the agent is back, the same kind of pod works.
        mesh.lab.agent("node-1")?.start_ready()?;
        let role = FirstMoment {
            to: mesh.reports.at(TCP),
            for_ms: 10_000,
            until_answered: true,
            ..Default::default()
        };
        let pod =
            mesh.lab.pod("legacy", "after").container("main", Role::FirstMoment(role)).start()?;
        let report: FirstMomentReport =
            pod.with_container("main", |running| running.report(TIMEOUT))?;
        ensure!(report.answered_us.is_some(), "{report:?}");
        Ok(())
    })
}
