//! A node boots anew: no program and no pin is there, the kubelet starts the same pods with the
//! same uids, and the agent comes last. With a guard, and without.

use std::{thread, time::Duration};

use anyhow::{Result, ensure};
use signet_lab::{
    pod::Pod,
    traffic::{
        Role,
        reports::{FirstMomentReport, HoldReport},
        roles::{FirstMoment, Hold},
    },
};

use crate::mesh::{
    Mesh, TCP, TIMEOUT, answered, answered_soon, refused, refused_soon, retriable, server,
    with_logs,
};

/// What node-1 runs after its boot.
struct Booted {
    /// `shop/frontend`, as before.
    frontend: Pod,
    /// `legacy/reports`, as before.
    reports: Pod,
}

/// Ends everything on node-1, in the kernel too; `prepare` runs before the kubelet does.
fn reboot(
    mesh: &Mesh,
    first: FirstMoment,
    prepare: impl Fn(&Mesh) -> Result<()>,
) -> Result<Booted> {
    let lab = &mesh.lab;
    let agent = lab.agent("node-1")?;
    agent.kill();
    for pod in [&mesh.frontend, &mesh.intruder, &mesh.reports] {
        pod.end_sandbox();
    }
    // What a reboot leaves of Signet: its files alone.
    let gone = agent.on_node(&["agent", "uninstall"])?;
    ensure!(gone.code() == 0 && !agent.pins().exists(), "{gone:?}");
    prepare(mesh)?;
    let reports = lab
        .pod("legacy", "reports")
        .remake(&mesh.reports)
        // What ends comes second: a real runtime leaves no cgroup of it to run the next thing in.
        .container("main", Role::tcp(TCP))
        .container("first", Role::FirstMoment(first.clone()))
        .start()?;
    let frontend = lab
        .pod("shop", "frontend")
        .service_account("frontend")
        .remake(&mesh.frontend)
        .container("main", Role::Pause)
        .container("first", Role::FirstMoment(first))
        .start()?;
    Ok(Booted { frontend, reports })
}

fn first_moment(pod: &Pod) -> Result<FirstMomentReport> {
    pod.with_container("first", |running| running.report(TIMEOUT))
}

#[test]
fn unguarded_what_was_opened_before_the_agent_is_closed_and_told() -> Result<()> {
    let mesh = Mesh::start(Some("strict"))?;
    with_logs(&mesh, |mesh| {
        let Mesh { lab, payments, .. } = mesh;
        let board = server(lab, "node-2", "legacy", "board")?;
        board.wait_published()?;
        lab.wait_state(&board, "off")?;
        answered_soon(&mesh.frontend, payments.at(TCP))?;
        let entries = lab.agent("node-1")?.map_entries()?;

        let first = FirstMoment {
            to: payments.at(TCP),
            text: "marker-b007".into(),
            for_ms: 300,
            ..Default::default()
        };
        let Booted { frontend, reports } = reboot(mesh, first, |_| Ok(()))?;
        // Nobody is there who refuses it: the other end alone does.
        answered(&frontend, board.at(TCP), "in clear")?;
        let early = first_moment(&frontend)?;
        ensure!(early.answered_us.is_none(), "the strict server took plaintext: {early:?}");
        let hold = |count| Role::Hold(Hold { to: board.at(TCP), count, ..Default::default() });
        let opened_before = frontend.start(&hold(3))?;
        let mut off = reports.start(&hold(2))?;
        opened_before.wait_event("open", TIMEOUT)?;
        off.wait_event("open", TIMEOUT)?;

        let agent = lab.agent("node-1")?;
        agent.start_ready()?;
        lab.wait_state(&frontend, "served")?;
        let report: HoldReport = opened_before.report(TIMEOUT)?;
        ensure!(report.opened == 3 && report.closed.len() == 3, "{report:?}");
        ensure!(report.closed.iter().all(|end| end.outcome != "told"), "{report:?}");
        let told = agent.wait_flow("their end is told", &["--ends"], |flow| {
            flow.event == "end"
                && flow.between("shop/frontend", "legacy/board")
                && flow.reason == "right_withdrawn"
        })?;
        ensure!(told.via == "plaintext", "{told}");
        // The same pod, enforced: to whom it may, and through a tunnel.
        answered_soon(&frontend, payments.at(TCP))?;
        answered_soon(&frontend, board.at(TCP))?;
        refused_soon(&reports, payments.at(TCP))?;
        // The control: what is off kept its connections.
        let kept: HoldReport = off.finish_and_report(TIMEOUT)?;
        ensure!(kept.closed.iter().all(|end| end.outcome == "told"), "{kept:?}");
        // One pod is not there any more; nothing of the old sandboxes is left.
        let now = agent.map_entries()?;
        ensure!(now["PODS"] < entries["PODS"], "{entries:?} became {now:?}");
        Ok(())
    })
}

#[test]
fn guarded_nothing_gets_out_before_the_agent_and_then_all_works() -> Result<()> {
    let mesh = Mesh::start(Some("strict"))?;
    with_logs(&mesh, |mesh| {
        let Mesh { lab, payments, .. } = mesh;
        let board = server(lab, "node-2", "legacy", "board")?;
        board.wait_published()?;
        lab.wait_state(&board, "off")?;
        answered_soon(&mesh.frontend, payments.at(TCP))?;
        let capture = lab.capture("guarded")?;
        let first = FirstMoment {
            to: payments.at(TCP),
            text: "marker-b007".into(),
            for_ms: 1500,
            until_answered: true,
            ..Default::default()
        };
        let Booted { frontend, reports } = reboot(mesh, first, |mesh| {
            let said = mesh.lab.agent("node-1")?.on_node(&["guard"])?;
            ensure!(said.code() == 0 && said.stdout.contains("pods are refused"), "{said:?}");
            Ok(())
        })?;
        for pod in [&frontend, &reports] {
            let early = first_moment(pod)?;
            ensure!(early.answered_us.is_none(), "{}: {early:?}", pod.full_name());
            ensure!(early.outcomes.keys().all(|o| retriable(o)), "{early:?}");
            let report = refused(pod, board.at(TCP), "marker-b007")?;
            ensure!(retriable(&report.outcome), "{report:?}");
        }

        lab.agent("node-1")?.start_ready()?;
        lab.wait_state(&frontend, "served")?;
        lab.wait_state(&reports, "off")?;
        let report = answered_soon(&frontend, payments.at(TCP))?;
        ensure!(report.seen.is_some_and(|seen| frontend.ips().contains(&seen.peer.ip())));
        answered_soon(&reports, board.at(TCP))?;
        refused_soon(&reports, payments.at(TCP))?;
        // The control: what is off says it in clear, on the same link.
        answered(&reports, board.at(TCP), "marker-0ff")?;
        answered(&frontend, payments.at(TCP), "marker-b007")?;
        thread::sleep(Duration::from_millis(200));
        let captured = capture.stop()?;
        let early = captured.complete()?.find("marker-b007");
        ensure!(early.is_empty(), "in clear: {early:?}");
        ensure!(!captured.find("marker-0ff").is_empty());
        Ok(())
    })
}
