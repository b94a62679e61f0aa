//! The agent is dead for longer than its heartbeat counts (30 s).

use std::{net::SocketAddr, thread, time::Duration};

use anyhow::{Result, ensure};
use signet_lab::{
    LabOptions,
    agent::Agent,
    authority::{Authority, node_token},
    pod::Pod,
    traffic::{
        Role,
        reports::{DialReport, FirstMomentReport, UdpReport},
        roles::{Dial, FirstMoment, UdpClient},
    },
};

use crate::mesh::{Mesh, TCP, TIMEOUT, answered_soon, refused, refused_soon, retriable, with_logs};

/// The heartbeat's age at which an agent counts as dead, and a little.
const DEAD: Duration = Duration::from_secs(32);

/// A new pod of the unenrolled namespace dials right after the agent's death and again once
/// it counts as dead; what came of each.
fn young_pod(mesh: &Mesh, name: &str) -> Result<FirstMomentReport> {
    let role = FirstMoment { to: mesh.reports.at(TCP), for_ms: 500, ..Default::default() };
    let pod = mesh.lab.pod("legacy", name).container("main", Role::FirstMoment(role)).start()?;
    pod.with_container("main", |running| running.report(TIMEOUT))
}

/// The flags with which agents take SVIDs from the authority's pod.
fn ask_authority(mesh: &Mesh, address: SocketAddr) -> Result<()> {
    let directory = mesh.lab.directory();
    let tokens = directory.join("tokens");
    for agent in mesh.lab.agents() {
        let token = node_token(&tokens, &agent.node().name)?;
        let file = directory.join(format!("agent-token-{}", agent.node().name));
        std::fs::write(&file, token)?;
        agent.set_flags(&[
            "--authority",
            "grpc",
            "--ca-address",
            &format!("https://{address}"),
            "--ca-root-file",
            &directory.join("bundle.pem").display().to_string(),
            "--ca-token-file",
            &file.display().to_string(),
        ]);
    }
    Ok(())
}

/// The authority's pod on node-1, always at the same address, and what runs in it.
fn authority_pod(mesh: &Mesh, name: &str) -> Result<(Pod, Authority)> {
    let (lab, directory) = (&mesh.lab, mesh.lab.directory());
    let pod = lab.pod("signet-system", name).host_number(200).start()?;
    let path = |part: &str| directory.join(part).display().to_string();
    let flags: Vec<String> = [
        ("--listen", SocketAddr::new(pod.ip(), 15012).to_string()),
        ("--names", pod.ip().to_string()),
        ("--store-dir", path("store")),
        ("--cluster-dir", lab.cluster().path().display().to_string()),
        ("--node-token-dir", path("tokens")),
        ("--bundle-file", path("bundle.pem")),
    ]
    .into_iter()
    .flat_map(|(flag, value)| [flag.to_owned(), value])
    .collect();
    let running = Authority::start(name, &directory.join("logs"), Some(pod.place()), &flags)?;
    Ok((pod, running))
}

#[test]
fn with_authority_and_agent_dead_what_is_off_restarts_and_a_strict_pod_stays_closed() -> Result<()>
{
    let mesh = Mesh::without_agents(LabOptions::default(), Some("strict"))?;
    with_logs(&mesh, |mesh| {
        let Mesh { lab, frontend, payments, .. } = mesh;
        for namespace in ["signet-system", "kube-system"] {
            lab.namespace(namespace, None)?;
        }
        // Its address is known before it is there: agents are told it.
        let at = signet_lab::address::pod(lab.family(), 1, 200).first();
        ask_authority(mesh, SocketAddr::new(at, 15012))?;
        let (authority, running) = authority_pod(mesh, "authority-1")?;
        let resolver = |name: &str| {
            lab.pod("kube-system", name)
                .label("k8s-app", "kube-dns")
                .container("main", Role::udp(53))
                .start()
        };
        let first_resolver = resolver("coredns-1")?;
        lab.start_agents()?;
        for pod in [frontend, payments] {
            lab.wait_state(pod, "served")?;
        }
        answered_soon(frontend, payments.at(TCP))?;

        lab.agents().iter().for_each(Agent::kill);
        drop(running);
        authority.remove()?;
        first_resolver.remove()?;
        let early = young_pod(mesh, "early")?;
        ensure!(early.answered_us.is_none(), "unknown while the heartbeat is young: {early:?}");
        ensure!(early.outcomes.keys().all(|o| retriable(o)), "{early:?}");
        thread::sleep(DEAD);

        // The life lines come back first, with nobody of ours there.
        let second_resolver = resolver("coredns-2")?;
        let late = young_pod(mesh, "late")?;
        ensure!(late.answered_us.is_some(), "{late:?}");
        let off = lab.pod("legacy", "asks").start()?;
        let query = UdpClient { to: second_resolver.at(53), count: 3, ..Default::default() };
        let answers: UdpReport = off.run(&Role::UdpClient(query), TIMEOUT)?;
        ensure!(answers.answered == 3, "{answers:?}");
        let (authority, running) = authority_pod(mesh, "authority-2")?;
        let dial = Dial {
            to: authority.at(15012),
            text: String::new(),
            timeout_ms: 500,
            ..Default::default()
        };
        let dialled: DialReport = off.run(&Role::Dial(dial), TIMEOUT)?;
        ensure!(dialled.peer.is_some(), "an off pod reaches the authority: {dialled:?}");
        // Registered strict pods stay closed, in both directions.
        let report = refused(frontend, payments.at(TCP), "closed")?;
        ensure!(retriable(&report.outcome), "{report:?}");
        for to in payments.all_at(TCP) {
            refused(&off, to, "closed")?;
        }

        // The control: the agents come back, get their SVIDs from there and serve.
        for agent in lab.agents() {
            agent.start_ready()?;
        }
        for pod in [frontend, payments] {
            lab.wait_state(pod, "served")?;
        }
        answered_soon(frontend, payments.at(TCP))?;
        refused_soon(&off, payments.at(TCP))?;
        let issued = running.audit().iter().any(|line| line.to_string().contains("frontend"));
        ensure!(issued, "{}", running.said());
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
