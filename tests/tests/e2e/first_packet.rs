//! A pod's first millisecond: refused or tunnelled, never in clear, in both directions.

use std::{net::SocketAddr, time::Duration};

use anyhow::{Context, Result, ensure};
use signet_lab::{
    Lab,
    pod::Pod,
    traffic::{
        Role,
        reports::{FirstMomentReport, LoadReport, TcpServerReport},
        roles::{FirstMoment, Load},
    },
};

use crate::mesh::{HTTP, Mesh, TCP, TIMEOUT, answered_soon, is_contained, retriable, with_logs};

/// How many pods in all; in batches, so that two cores keep up with the lab's own work. A real
/// runtime takes its time for each.
fn pods() -> usize {
    if is_contained() { 20 } else { 200 }
}
const BATCH: usize = 20;

#[test]
fn what_is_dialled_in_the_first_millisecond_never_goes_in_clear() -> Result<()> {
    let mesh = Mesh::start(Some("strict"))?;
    with_logs(&mesh, |mesh| {
        answered_soon(&mesh.frontend, mesh.payments.at(TCP))?;
        let capture = mesh.lab.capture("first")?;
        let mut reports = Vec::new();
        for batch in 0..pods() / BATCH {
            let pods = first_pods(&mesh.lab, batch, mesh.payments.at(TCP))?;
            for pod in &pods {
                let report: FirstMomentReport =
                    pod.with_container("main", |running| running.report(TIMEOUT))?;
                reports.push(report);
            }
            for pod in pods {
                pod.remove()?;
            }
        }
        let captured = capture.stop()?;
        let hits = captured.complete()?.find("marker-f125");
        ensure!(hits.is_empty(), "in clear: {:?}", &hits[..hits.len().min(5)]);
        let (mut answered, mut refused, mut latest) = (0, 0, 0);
        for report in &reports {
            for (outcome, count) in &report.outcomes {
                match outcome.as_str() {
                    "answered" => answered += count,
                    // Programs retry these; anything else looks like a broken network.
                    "read:ECONNRESET" | "write:ECONNRESET" => refused += count,
                    outcome if retriable(outcome) => refused += count,
                    other => anyhow::bail!("{other}: {report:?}"),
                }
            }
            let first = report.answered_us.with_context(|| format!("never: {report:?}"))?;
            latest = latest.max(first);
        }
        println!(
            "{} pods: {refused} refused and {answered} answered dials; the latest first answer \
             after {} ms",
            reports.len(),
            latest / 1000
        );
        let met = reports.iter().filter(|report| report.first_outcome != "answered").count();
        println!("{met} of {} met a refusal with their first dial", reports.len());
        // The control: refusals were seen at all, so some did dial before they were known. A
        // real runtime may be so slow that none does.
        ensure!(reports.len() == pods() && (refused > 0 || is_contained()));
        Ok(())
    })
}

fn first_pods(lab: &Lab, batch: usize, to: SocketAddr) -> Result<Vec<Pod>> {
    (0..BATCH)
        .map(|i| {
            let role = FirstMoment {
                to,
                text: "marker-f125".into(),
                for_ms: 20_000,
                interval_ms: 2,
                until_answered: true,
            };
            lab.pod("shop", &format!("first-{batch}-{i}"))
                .service_account("frontend")
                .container("main", Role::FirstMoment(role))
                .start()
        })
        .collect()
}

#[test]
fn plaintext_dialled_at_a_pod_from_its_first_millisecond_never_reaches_it() -> Result<()> {
    let mesh = Mesh::start(Some("strict"))?;
    with_logs(&mesh, |mesh| {
        let lab = &mesh.lab;
        answered_soon(&mesh.frontend, mesh.payments.at(TCP))?;
        let mut reached = Vec::new();
        let mut tried = 0;
        for batch in 0..pods() / BATCH {
            // Somebody who is not enrolled dials the address before the pod exists.
            let mut callers = Vec::new();
            let hosts: Vec<u8> = (0..BATCH).map(|i| 150 + i as u8).collect();
            for host in &hosts {
                for ip in signet_lab::address::pod(lab.family(), 2, *host).all() {
                    let load = Load {
                        to: (ip, HTTP).into(),
                        interval_ms: 1,
                        timeout_ms: 50,
                        ..Default::default()
                    };
                    callers.push(mesh.reports.start(&Role::Load(load))?);
                }
            }
            let mut pods = Vec::new();
            for host in &hosts {
                let pod = lab
                    .pod_on(lab.node("node-2")?, "shop", &format!("target-{batch}-{host}"))
                    .host_number(*host)
                    .container("main", Role::tcp(HTTP))
                    .start()?;
                pods.push(pod);
            }
            for pod in &pods {
                lab.wait_state(pod, "served")?;
            }
            for mut caller in callers {
                let report: LoadReport = caller.finish_and_report(TIMEOUT)?;
                tried += report.total();
            }
            for pod in pods {
                let report: TcpServerReport = pod.report_of("main")?;
                if report.accepted > 0 {
                    reached.push((pod.full_name(), report));
                }
                pod.remove()?;
            }
        }
        println!("{tried} plaintext dials at {} young pods", pods());
        ensure!(reached.is_empty(), "{} pods were reached: {reached:?}", reached.len());
        ensure!(tried > 1000);
        Ok(())
    })
}

#[test]
fn a_young_pod_of_an_unenrolled_namespace_is_let_through() -> Result<()> {
    let mesh = Mesh::start(Some("strict"))?;
    with_logs(&mesh, |mesh| {
        let role = FirstMoment {
            to: mesh.reports.at(TCP),
            for_ms: 10_000,
            until_answered: true,
            ..Default::default()
        };
        let pod =
            mesh.lab.pod("legacy", "young").container("main", Role::FirstMoment(role)).start()?;
        let report: FirstMomentReport =
            pod.with_container("main", |running| running.report(TIMEOUT))?;
        let first = report.answered_us.with_context(|| format!("{report:?}"))?;
        println!("an unenrolled pod's first answer after {} ms", first / 1000);
        ensure!(Duration::from_micros(first) < Duration::from_secs(2), "{report:?}");
        Ok(())
    })
}
