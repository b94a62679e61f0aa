//! Upgrade and rollback: one agent takes another's place under load. Nobody is refused, open
//! flows go on until the old one's deadline, and rights that are taken away end them there, too.
//!
//! `SIGNET_LAB_HANDOVER=full` runs the load that is promised (500 requests a second, 200
//! streams); without it the load is smaller.

use std::{
    fs,
    path::Path,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use rustix::process::Signal;
use serde_json::json;
use signet_lab::{
    LabOptions,
    agent::{Agent, Process},
    eventually,
    pod::Pod,
    process::Running,
    traffic::{
        Role,
        reports::{HoldReport, LoadReport},
        roles::{Hold, Load},
    },
};

use crate::mesh::{
    CHANGE, HTTP, Mesh, TCP, TIMEOUT, answered, answered_soon, policy, refused_soon, with_logs,
};

/// How long an agent whose place is taken has for its open flows, in these tests.
const DEADLINE: Duration = Duration::from_secs(10);
/// The same as a flag, for agents that are to reach it.
const SHORT: [&str; 2] = ["--drain-deadline", "10s"];
/// For all others: no flow of theirs is cut, however busy the machine is.
const LONG: [&str; 2] = ["--drain-deadline", "5m"];

/// What runs while agents are replaced.
struct Traffic {
    loads: Vec<Running>,
    streams: Running,
}

impl Traffic {
    fn start(mesh: &Mesh) -> Result<Self> {
        let full = std::env::var_os("SIGNET_LAB_HANDOVER").is_some_and(|v| v == "full");
        let (parallel, interval_ms, streams) = if full { (32, 20, 200) } else { (4, 20, 20) };
        let mut loads = Vec::new();
        for to in [mesh.payments.at(HTTP), mesh.reports.at(HTTP)] {
            // Most of it to an enrolled peer; some of it to one outside the mesh.
            let parallel = if to == mesh.payments.at(HTTP) { parallel } else { 1 };
            let load = Load { to, interval_ms, parallel, timeout_ms: 10_000, ..Load::default() };
            loads.push(mesh.frontend.start(&Role::Load(load))?);
        }
        let streams = hold(mesh, &mesh.frontend, streams)?;
        Ok(Self { loads, streams })
    }

    /// Ends it; every request must have been answered.
    fn finish(mut self, begun: Instant) -> Result<HoldReport> {
        for load in &mut self.loads {
            let report: LoadReport = load.finish_and_report(TIMEOUT)?;
            let (total, seconds) = (report.total(), begun.elapsed().as_secs_f64());
            println!("{total} requests, {:.0}/s: {:?}", total as f64 / seconds, report.outcomes);
            ensure!(total > 40, "too few requests to prove anything: {report:?}");
            ensure!(report.answered() == total, "requests failed: {report:?}");
        }
        self.streams.finish_and_report(TIMEOUT)
    }
}

fn hold(mesh: &Mesh, from: &Pod, count: usize) -> Result<Running> {
    let role = Hold { to: mesh.payments.at(TCP), count, interval_ms: 20, ..Hold::default() };
    let running = from.start(&Role::Hold(role))?;
    let open = running.wait_event("open", TIMEOUT)?;
    ensure!(open["count"] == count, "{open}");
    Ok(running)
}

fn closed(streams: &Running) -> usize {
    streams.printed().iter().filter(|line| line["event"] == "closed").count()
}

fn mesh(flags: [&str; 2]) -> Result<Mesh> {
    let options =
        LabOptions { agent_flags: flags.map(str::to_owned).into(), ..LabOptions::default() };
    let mesh = Mesh::with(options, Some("strict"))?;
    mesh.allow_payments(&["frontend", "intruder"])?;
    answered_soon(&mesh.frontend, mesh.payments.at(TCP))?;
    answered_soon(&mesh.intruder, mesh.payments.at(TCP))?;
    Ok(mesh)
}

fn agents(mesh: &Mesh) -> Result<[&Agent; 2]> {
    Ok([mesh.lab.agent("node-1")?, mesh.lab.agent("node-2")?])
}

/// Replaces both nodes' agents; the old ones drain and have been told to end.
fn replace(mesh: &Mesh) -> Result<Vec<Process>> {
    agents(mesh)?.iter().map(|agent| agent.succeed(&[])).collect()
}

#[test]
fn upgrade_and_rollback_refuse_nobody() -> Result<()> {
    let mesh = mesh(SHORT)?;
    with_logs(&mesh, |mesh| {
        let begun = Instant::now();
        let traffic = Traffic::start(mesh)?;
        thread::sleep(Duration::from_secs(1));

        // Upgrade. Streams go on in the old agents until their deadline, and end then.
        for agent in agents(mesh)? {
            agent.set_flags(&LONG);
        }
        let replaced = Instant::now();
        let mut old = replace(mesh)?;
        let both = replaced.elapsed();
        println!("both agents were replaced within {both:?}");
        while replaced.elapsed() < DEADLINE - Duration::from_millis(500) {
            ensure!(
                closed(&traffic.streams) == 0,
                "streams ended after {:?}: {}",
                replaced.elapsed(),
                traffic.streams.said()
            );
            ensure!(old.iter_mut().all(|old| old.ended().is_none()), "an old agent has ended");
            thread::sleep(Duration::from_millis(100));
        }
        for old in &mut old {
            let status = old.wait(both + Duration::from_secs(20))?;
            ensure!(status.code() == Some(0), "an old agent ended with {status}");
        }
        let report = traffic.finish(begun)?;
        ensure!(report.closed.iter().all(|closed| closed.outcome != "told"), "{report:?}");

        // And back. A right that is taken away meanwhile ends the flow in the old agent.
        let begun = Instant::now();
        let traffic = Traffic::start(mesh)?;
        let doomed = hold(mesh, &mesh.intruder, 2)?;
        let mut old = replace(mesh)?;
        ensure!(closed(&doomed) == 0, "{}", doomed.said());
        mesh.allow_payments(&["frontend"])?;
        eventually("the streams that lost their right are closed", CHANGE, || {
            Ok((closed(&doomed) == 2).then_some(()))
        })?;
        eventually("the old agent says why", CHANGE, || {
            let flows = old[1].flows(&["--ends", "--pod", "shop/intruder"])?;
            let withdrawn = |f: &&signet_lab::agent::Flow| f.reason == "right_withdrawn";
            let count = flows.iter().filter(withdrawn).count();
            if count == 2 {
                return Ok(Some(()));
            }
            bail!("{count} of {} records: {flows:?}", flows.len())
        })?;
        ensure!(closed(&traffic.streams) == 0, "others' streams went, too");
        refused_soon(&mesh.intruder, mesh.payments.at(TCP))?;
        // Flows that end let the old agents go before their deadline.
        let report = traffic.finish(begun)?;
        ensure!(report.closed.iter().all(|closed| closed.outcome == "told"), "{report:?}");
        for old in &mut old {
            let status = old.wait(TIMEOUT)?;
            ensure!(status.code() == Some(0), "an old agent ended with {status}");
        }
        for agent in agents(mesh)? {
            agent.wait_ready()?;
        }
        // Pods that come later are the new agents' as any others.
        let late = mesh.lab.pod("shop", "late").service_account("frontend").start()?;
        late.wait_published()?;
        mesh.lab.wait_state(&late, "served")?;
        answered(&late, mesh.payments.at(TCP), "late")?;
        Ok(())
    })
}

/// Where an agent's maps and links of a version are.
fn version(agent: &Agent, version: &str) -> std::path::PathBuf {
    agent.pins().join(version)
}

/// The links that are pinned there, but those of single pods.
fn links(directory: &Path) -> Result<Vec<String>> {
    let mut links = Vec::new();
    for entry in fs::read_dir(directory.join("links"))? {
        let name = entry?.file_name().to_string_lossy().into_owned();
        if !name.contains('-') {
            links.push(name);
        }
    }
    links.sort();
    Ok(links)
}

/// Another version has maps and programs of its own. Here the old agent's are put under another
/// version's name while it runs: to the new one, which reads none of them, they are another
/// version's, and the old one goes on with what it has open.
#[test]
fn another_versions_maps_and_programs_are_swapped_under_load() -> Result<()> {
    let mesh = mesh(LONG)?;
    with_logs(&mesh, |mesh| {
        let stranger = mesh.lab.pod("legacy", "stranger").start()?;
        stranger.wait_published()?;
        // An older version, then a newer one.
        for name in ["v0", "v2"] {
            let begun = Instant::now();
            let traffic = Traffic::start(mesh)?;
            for agent in agents(mesh)? {
                fs::rename(version(agent, "v1"), version(agent, name))?;
            }
            let mut old = replace(mesh)?;
            for agent in agents(mesh)? {
                // What decides is the new one's alone; what the old one's flows are shown and
                // known by stays for as long as it has any.
                let recording = ["ops_agent", "ops_node", "ops_workloads"];
                let answering = ["peername4", "peername6", "sockname4", "sockname6"];
                let kept = links(&version(agent, name))?;
                ensure!(kept == [&recording[..], &answering[..]].concat(), "{kept:?}");
                let all = links(&version(agent, "v1"))?;
                ensure!(all.len() == 13, "{all:?}");
            }
            thread::sleep(Duration::from_secs(3));
            ensure!(closed(&traffic.streams) == 0, "{}", traffic.streams.said());
            refused_soon(&stranger, mesh.payments.at(HTTP))?;
            let report = traffic.finish(begun)?;
            ensure!(report.closed.iter().all(|closed| closed.outcome == "told"), "{report:?}");
            for old in &mut old {
                let status = old.wait(TIMEOUT)?;
                ensure!(status.code() == Some(0), "an old agent ended with {status}");
            }
            for agent in agents(mesh)? {
                eventually("the other version's pins are gone", CHANGE, || {
                    Ok((!version(agent, name).exists()).then_some(()))
                })?;
                agent.wait_ready()?;
            }
        }
        Ok(())
    })
}

/// What the kernel runs for a node: programs by their pinned links.
fn programs(agent: &Agent) -> Result<Vec<String>> {
    let status = agent.status()?;
    ensure!(status["agent"]["state"] == "READY", "{status}");
    let mut links: Vec<String> = fs::read_dir(agent.pins().join("v1/links"))?
        .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
        .collect::<Result<_>>()?;
    links.sort();
    Ok(links)
}

#[test]
fn a_new_agent_that_does_not_get_ready_changes_nothing() -> Result<()> {
    let mesh = mesh(LONG)?;
    with_logs(&mesh, |mesh| {
        let begun = Instant::now();
        let traffic = Traffic::start(mesh)?;
        let agent = mesh.lab.agent("node-1")?;
        let before = programs(agent)?;

        // Another agent's configuration: refused, and told which key.
        let mut other = agent.start_successor(&["--instance", "other"])?;
        let status = other.wait(TIMEOUT)?;
        ensure!(status.code() == Some(3), "{status}");
        ensure!(agent.logged().contains("instance \"default\""), "the key is named");

        // An authority that cannot be reached: no SVIDs, so it waits, alive and not ready.
        let root = mesh.lab.agent("node-1")?.authority_dir().join("root.pem");
        let root = root.display().to_string();
        let unreachable = [
            "--authority",
            "grpc",
            "--ca-address",
            "https://127.0.0.1:1",
            "--ca-root-file",
            &root,
            "--ca-token-file",
            &root,
        ];
        let unready = agent.start_successor(&unreachable)?;
        unready.wait_unready("no SVID has been issued yet for pod shop/")?;
        ensure!(unready.probe("live")?.code() == 0, "it is alive");
        thread::sleep(Duration::from_secs(1));
        ensure!(programs(agent)? == before, "pins were changed");
        answered(&mesh.frontend, mesh.payments.at(TCP), "the old one serves")?;
        // One more comes while it waits, and is ended as an operator would who rolls back.
        let second = agent.start_successor(&[])?;
        ensure!(second.probe("ready").is_ok());
        unready.kill();
        second.wait_ready()?;
        let mut old = agent.promote(second).context("no agent ran")?;
        old.signal(Signal::TERM)?;
        let report = traffic.finish(begun)?;
        ensure!(report.closed.iter().all(|closed| closed.outcome == "told"), "{report:?}");
        ensure!(old.wait(TIMEOUT)?.code() == Some(0));

        // One that waits is told to end: nothing happens.
        let mut third = agent.start_successor(&unreachable)?;
        third.wait_unready("no SVID has been issued yet for pod shop/")?;
        third.signal(Signal::TERM)?;
        ensure!(third.wait(TIMEOUT)?.code() == Some(0));
        answered(&mesh.frontend, mesh.payments.at(TCP), "the second one serves")?;
        // The one that serves is told to end while another waits: that one begins as at any
        // start, once the first has finished.
        let fourth = agent.start_successor(&unreachable)?;
        fourth.wait_unready("no SVID has been issued yet for pod shop/")?;
        ensure!(agent.stop()? == Some(0));
        fourth.wait_ready()?;
        refused_soon(&mesh.frontend, mesh.payments.at(TCP))?;
        drop(agent.promote(fourth));
        Ok(())
    })
}

/// A successor that gets everything and is gone before it says that it serves.
fn give_up_in_the_middle(agent: &Agent) -> Result<usize> {
    use signet::handover::{
        channel::Channel,
        message::{Hello, Message},
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let place = |flag: &str| -> Result<String> {
        let arguments = agent.arguments()?;
        let at = arguments.iter().position(|a| a == flag).context("no such flag")?;
        arguments.get(at + 1).cloned().context("no value")
    };
    let hello = Hello {
        node: agent.node().name.clone(),
        instance: "default".into(),
        bpffs: place("--bpffs")?,
        cgroup_root: place("--cgroup-root")?,
        version: "test".into(),
        abi: 1,
    };
    runtime.block_on(async {
        let path = agent.node().run_dir.join("admin/handover.sock");
        let mut channel = Channel::connect(&path).await?.context("nobody answers")?;
        channel.send(&Message::Hello(hello), &[]).await?;
        channel.send(&Message::Ask, &[]).await?;
        let mut standing = 0;
        while let (Message::Stands(_), _) = channel.receive().await? {
            standing += 1;
        }
        channel.send(&Message::TakeOver, &[]).await?;
        let mut listeners = 0;
        loop {
            let (message, descriptors) = channel.receive().await?;
            match message {
                Message::Endpoint(_) => listeners += descriptors.len(),
                Message::Socket(_) => ensure!(descriptors.len() == 1),
                Message::Yours(totals) => {
                    ensure!(totals.endpoints == standing, "{totals:?}, {standing} stood");
                    return Ok(listeners);
                }
                other => bail!("{other:?}"),
            }
        }
    })
}

#[test]
fn either_agent_may_die_in_the_middle() -> Result<()> {
    let mesh = mesh(LONG)?;
    with_logs(&mesh, |mesh| {
        let begun = Instant::now();
        let traffic = Traffic::start(mesh)?;
        let agent = mesh.lab.agent("node-1")?;
        // The new one dies with everything in its hands: the old one goes on.
        for _ in 0..3 {
            let listeners = give_up_in_the_middle(agent)?;
            ensure!(listeners >= 2, "{listeners} listeners were handed over");
        }
        eventually("the old agent goes on", CHANGE, || {
            Ok((agent.cli(&["status"])?.code() == 0).then_some(()))
        })?;
        // It writes again: a new pod is served, a change of policy is in force.
        let late = mesh.lab.pod("shop", "late").service_account("frontend").start()?;
        late.wait_published()?;
        mesh.lab.wait_state(&late, "served")?;
        answered(&late, mesh.payments.at(TCP), "late")?;
        let deny = policy(
            "no-late",
            "Deny",
            "payments",
            json!([{"from": [{"serviceAccounts": ["intruder"]}]}]),
        );
        mesh.lab.cluster().apply(deny)?;
        refused_soon(&mesh.intruder, mesh.payments.at(TCP))?;
        let report = traffic.finish(begun)?;
        ensure!(report.closed.iter().all(|closed| closed.outcome == "told"), "{report:?}");

        // The old one dies while the new one waits for its word: it begins as after any death.
        agent.signal(Signal::STOP)?;
        let successor = agent.start_successor(&[])?;
        successor.wait_unready("another agent serves the node")?;
        let mut old = agent.promote(successor).context("no agent ran")?;
        old.signal(Signal::KILL)?;
        old.wait(TIMEOUT)?;
        agent.wait_ready()?;
        for pod in [&mesh.frontend, &late] {
            mesh.lab.wait_state(pod, "served")?;
            answered_soon(pod, mesh.payments.at(TCP))?;
        }
        refused_soon(&mesh.intruder, mesh.payments.at(TCP))?;
        Ok(())
    })
}
