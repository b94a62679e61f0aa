//! TCP's semantics through the tunnel: bulk, half-close, abrupt ends, slow readers, many flows.

use std::{thread, time::Duration};

use anyhow::{Result, ensure};
use signet_lab::traffic::{
    Role,
    reports::{BulkReport, HoldReport},
    roles::{Bulk, BulkDirection, Hold},
};

use crate::mesh::{Mesh, TCP, TIMEOUT, answered_soon, with_logs};

const GIB: u64 = 1 << 30;
const LONG: Duration = Duration::from_secs(300);

fn bulk(mesh: &Mesh, role: Bulk) -> Result<BulkReport> {
    let role = Bulk { to: mesh.payments.at(TCP), ..role };
    mesh.frontend.run(&Role::Bulk(role), LONG)
}

#[test]
fn a_gibibyte_each_way_arrives_unchanged() -> Result<()> {
    let mesh = Mesh::start(Some("strict"))?;
    with_logs(&mesh, |mesh| {
        answered_soon(&mesh.frontend, mesh.payments.at(TCP))?;
        let up = bulk(mesh, Bulk { bytes: GIB, ..Default::default() })?;
        println!("up: {up:?}");
        ensure!(up.outcome == "complete" && up.up_equal == Some(true), "{up:?}");
        let down =
            bulk(mesh, Bulk { bytes: GIB, direction: BulkDirection::Down, ..Default::default() })?;
        println!("down: {down:?}");
        ensure!(down.outcome == "complete" && down.down_equal == Some(true), "{down:?}");
        let both = bulk(
            mesh,
            Bulk { bytes: GIB / 8, direction: BulkDirection::Both, ..Default::default() },
        )?;
        ensure!(
            both.outcome == "complete"
                && both.down_equal == Some(true)
                && both.up_equal == Some(true),
            "{both:?}"
        );
        Ok(())
    })
}

#[test]
fn half_close_and_abrupt_ends_are_what_they_were() -> Result<()> {
    let mesh = Mesh::start(Some("strict"))?;
    with_logs(&mesh, |mesh| {
        answered_soon(&mesh.frontend, mesh.payments.at(TCP))?;
        // The client's end first, then all of the server's data.
        let report = bulk(
            mesh,
            Bulk {
                bytes: 20_000_003,
                direction: BulkDirection::Down,
                half_close_first: true,
                ..Default::default()
            },
        )?;
        ensure!(report.outcome == "complete" && report.down_equal == Some(true), "{report:?}");
        // A server that aborts is a reset, never an end of file.
        let report = bulk(
            mesh,
            Bulk {
                bytes: GIB,
                direction: BulkDirection::Down,
                server_aborts_after: 3_000_000,
                ..Default::default()
            },
        )?;
        ensure!(report.outcome == "read:ECONNRESET", "{report:?}");
        let report =
            bulk(mesh, Bulk { bytes: GIB, server_aborts_after: 3_000_000, ..Default::default() })?;
        ensure!(
            report.outcome.ends_with("ECONNRESET") || report.outcome.ends_with("EPIPE"),
            "{report:?}"
        );
        // A client that aborts leaves nothing open at the server.
        let report =
            bulk(mesh, Bulk { bytes: GIB, client_aborts_after: 3_000_000, ..Default::default() })?;
        ensure!(report.outcome == "aborted", "{report:?}");
        signet_lab::eventually("the server's connections have ended", TIMEOUT, || {
            let server: signet_lab::traffic::reports::TcpServerReport =
                mesh.payments.report_of("tcp")?;
            if server.open == 0 {
                return Ok(Some(()));
            }
            anyhow::bail!("{server:?}")
        })
    })
}

#[test]
fn a_slow_reader_costs_bounded_memory() -> Result<()> {
    let mesh = Mesh::start(Some("strict"))?;
    with_logs(&mesh, |mesh| {
        answered_soon(&mesh.frontend, mesh.payments.at(TCP))?;
        let resident = || -> Result<u64> {
            let mut sum = 0;
            for agent in mesh.lab.agents() {
                sum += agent.usage()?.resident;
            }
            Ok(sum)
        };
        let before = resident()?;
        let slow = Bulk {
            to: mesh.payments.at(TCP),
            bytes: 256 << 20,
            direction: BulkDirection::Down,
            read_rate: 1 << 20,
            ..Default::default()
        };
        let running: Vec<_> = (0..4)
            .map(|_| mesh.frontend.start(&Role::Bulk(slow.clone())))
            .collect::<Result<_>>()?;
        let mut most = 0;
        for _ in 0..30 {
            thread::sleep(Duration::from_millis(100));
            most = most.max(resident()?);
        }
        drop(running);
        let growth = most.saturating_sub(before);
        println!("four slow readers of 256 MiB each: both agents grew by {} KiB", growth >> 10);
        // Windows of 4 MiB a stream on both ends, and TLS buffers.
        ensure!(growth < 64 << 20, "grew by {growth} bytes");
        Ok(())
    })
}

#[test]
fn two_thousand_flows_at_once() -> Result<()> {
    let mesh = Mesh::start(Some("strict"))?;
    with_logs(&mesh, |mesh| {
        answered_soon(&mesh.frontend, mesh.payments.at(TCP))?;
        let role =
            Hold { to: mesh.payments.at(TCP), count: 2000, interval_ms: 500, timeout_ms: 30_000 };
        let mut running = mesh.frontend.start(&Role::Hold(role))?;
        let open = running.wait_event("open", LONG)?;
        ensure!(open["count"] == 2000, "{open}");
        thread::sleep(Duration::from_secs(2));
        let report: HoldReport = running.finish_and_report(LONG)?;
        ensure!(
            report.closed.iter().all(|c| c.outcome == "told" && c.echoed > 0),
            "{:?}",
            report.closed.iter().filter(|c| c.outcome != "told").take(5).collect::<Vec<_>>()
        );
        Ok(())
    })
}
