//! Sixty thousand short connections: every one reaches whom it dialled, nothing is left.

use std::{net::SocketAddr, time::Duration};

use anyhow::{Result, ensure};
use signet_lab::{
    agent::Agent,
    eventually,
    traffic::{
        Role, any,
        reports::{HammerReport, TcpServerReport},
        roles::{Hammer, TcpServer},
    },
};

use crate::{
    held::{Held, as_before},
    mesh::{Mesh, TIMEOUT, answered_soon, with_logs},
};

/// Connections in all; `SIGNET_LAB_STORM` makes it shorter while developing.
fn connections() -> u64 {
    std::env::var("SIGNET_LAB_STORM").ok().and_then(|n| n.parse().ok()).unwrap_or(60_000)
}

/// Longest that a storm may take on two cores.
const STORM: Duration = Duration::from_secs(400);

#[test]
fn sixty_thousand_short_connections_reach_whom_they_dialled() -> Result<()> {
    let mesh = Mesh::start(Some("strict"))?;
    with_logs(&mesh, |mesh| {
        let lab = &mesh.lab;
        // Two servers on several ports each: whoever is mixed up has somewhere wrong to go.
        let server = |node: &str, name: &str, tag| -> Result<_> {
            let listen = (0..4).map(|i| any(9200 + i)).collect();
            let role = TcpServer { listen, tag, ..Default::default() };
            lab.pod_on(lab.node(node)?, "shop", name)
                .container("main", Role::TcpServer(role))
                .start()
        };
        let servers = [server("node-2", "one", 1)?, server("node-2", "two", 2)?];
        let near = server("node-1", "near", 3)?;
        let clients =
            [mesh.frontend.clone(), mesh.intruder.clone(), lab.pod("shop", "third").start()?];
        for pod in servers.iter().chain([&near]).chain(&clients) {
            lab.wait_state(pod, "served")?;
            pod.wait_published()?;
        }
        // The API tells the other node's pods late: they are no leftovers of the storm.
        eventually("both nodes know every address", TIMEOUT, || {
            let known = |agent: &Agent| Ok(agent.map_entries()?.get("ADDRESSES").copied());
            let counts: Vec<_> = lab.agents().iter().map(known).collect::<Result<_>>()?;
            Ok(counts.iter().all(|count| *count == counts[0]).then_some(()))
        })?;
        let mut targets: Vec<(SocketAddr, u32)> = Vec::new();
        for (pod, tag) in servers.iter().chain([&near]).zip(1..) {
            for port in 9200..9204 {
                targets.extend(pod.all_at(port).into_iter().map(|to| (to, tag)));
            }
            for client in &clients {
                answered_soon(client, pod.at(9200))?;
            }
        }

        // A first, small storm makes what stays by right.
        storm(&clients, &targets, 600)?;
        let before: Vec<Held> = lab.agents().iter().map(Held::of).collect::<Result<_>>()?;
        let reports = storm(&clients, &targets, connections() / 3)?;
        let mut answered = 0;
        for report in &reports {
            println!("{report:?}");
            ensure!(report.misdirected == 0, "{report:?}");
            ensure!(report.failures.is_empty(), "{report:?}");
            ensure!(
                report.answered + report.cut + report.port_in_use == report.tried,
                "{report:?}"
            );
            // One third each, but for the source ports that were still in use.
            ensure!(report.answered > report.tried / 5, "{report:?}");
            answered += report.answered;
        }
        let mut nonces = 0;
        for pod in servers.iter().chain([&near]) {
            let report: TcpServerReport = pod.report_of("main")?;
            println!("{}: {report:?}", pod.full_name());
            ensure!(report.misdirected == 0, "{}: {report:?}", pod.full_name());
            nonces += report.nonces;
        }
        ensure!(nonces >= answered, "{nonces} nonces for {answered} answers");

        as_before(lab.agents(), &before, Duration::from_secs(60))
    })
}

fn storm(
    clients: &[signet_lab::pod::Pod],
    targets: &[(SocketAddr, u32)],
    each: u64,
) -> Result<Vec<HammerReport>> {
    let mut running = Vec::new();
    for client in clients {
        running.push(client.start(&Role::Hammer(Hammer {
            to: targets.to_vec(),
            count: each,
            // 64 at once over the three.
            parallel: 22,
            bind_every: 4,
            bind_from: 40_000,
            bind_span: 200,
            ..Default::default()
        }))?);
    }
    let reports = running.iter().map(|r| r.report(STORM)).collect();
    for mut client in running {
        client.finish();
        client.wait(TIMEOUT)?;
    }
    reports
}
