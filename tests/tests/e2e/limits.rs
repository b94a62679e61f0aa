//! Limits per endpoint, set live by the configuration file.

use std::fs;

use anyhow::{Result, ensure};
use signet_lab::{
    LabOptions,
    traffic::{Role, reports::HoldReport, roles::Hold},
};

use crate::mesh::{
    CHANGE, Mesh, TCP, TIMEOUT, answered, answered_soon, refused, refused_soon, verdict, with_logs,
};

#[test]
fn a_pod_at_its_limit_is_refused_others_are_not_and_the_file_is_followed() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let file = directory.path().join("agent.yaml");
    fs::write(&file, "limits:\n  openFlows: 3\n")?;
    let options = LabOptions {
        agent_flags: vec!["--config".into(), file.display().to_string()],
        ..Default::default()
    };
    let mesh = Mesh::with(options, Some("strict"))?;
    with_logs(&mesh, |mesh| {
        let Mesh { lab, frontend, intruder, payments, .. } = mesh;
        // A second server pod: the limit holds for each endpoint, on both nodes.
        let other = crate::mesh::server(lab, "node-2", "shop", "other")?;
        lab.wait_state(&other, "served")?;
        answered_soon(frontend, payments.at(TCP))?;
        answered_soon(intruder, other.at(TCP))?;
        let hold = Role::Hold(Hold { to: payments.at(TCP), count: 3, ..Default::default() });
        let mut held = frontend.start(&hold)?;
        held.wait_event("open", TIMEOUT)?;

        refused(frontend, payments.at(TCP), "one too many")?;
        answered(intruder, other.at(TCP), "another pod's affair")?;
        let (from, to) = ("shop/frontend", "shop/payments");
        verdict(lab, "node-1", "source", from, to, "DROPPED", "limit_exceeded")?;

        // Raised in the file, without a restart.
        fs::write(&file, "limits:\n  openFlows: 100\n")?;
        answered_soon(frontend, payments.at(TCP))?;
        // What cannot be read changes nothing.
        fs::write(&file, "limits:\n  openFlow: 1\n")?;
        let agent = lab.agent("node-1")?;
        signet_lab::eventually("the fault is named", CHANGE, || {
            let log = agent.logged();
            Ok((log.contains("agent.yaml") && log.contains("openFlow")).then_some(()))
        })?;
        answered(frontend, payments.at(TCP), "still")?;
        fs::write(&file, "limits:\n  openFlows: 3\n")?;
        refused_soon(frontend, payments.at(TCP))?;
        let report: HoldReport = held.finish_and_report(TIMEOUT)?;
        ensure!(report.closed.iter().all(|c| c.outcome == "told"), "{report:?}");
        Ok(())
    })
}
