//! What operators do to a node: break the glass, uninstall, guard its boot.

use std::{fs, path::Path};

use anyhow::{Context, Result, bail, ensure};
use aya::{maps::MapInfo, programs::loaded_programs};
use signet_lab::{
    agent::Agent,
    eventually,
    process::Output,
    traffic::{Role, reports::FirstMomentReport, roles::FirstMoment},
};

use crate::mesh::{
    CHANGE, Mesh, TCP, TIMEOUT, answered, answered_soon, refused, refused_soon, retriable,
    with_logs,
};

/// Runs a command on the node, which must exit with `code`.
fn on_node(agent: &Agent, command: &[&str], code: i32) -> Result<Output> {
    let output = agent.on_node(command)?;
    ensure!(output.code() == code, "signet {command:?}: {output:?}");
    Ok(output)
}

/// Waits until nothing is shown as released.
fn wait_rearmed(agent: &Agent) -> Result<()> {
    eventually("nothing is released", CHANGE, || {
        let status = agent.status()?;
        if status["problems"].to_string().contains("released") {
            bail!("{}", status["problems"])
        }
        ensure!(status["agent"]["enforcement"] == "enforce", "{}", status["agent"]);
        Ok(Some(()))
    })
}

#[test]
fn the_glass_is_broken_with_and_without_an_agent_and_shown_until_it_is_mended() -> Result<()> {
    let mesh = Mesh::start(Some("strict"))?;
    with_logs(&mesh, |mesh| {
        let Mesh { lab, frontend, payments, reports, .. } = mesh;
        let agent = lab.agent("node-2")?;
        let plaintext = payments.at(TCP);
        refused_soon(reports, plaintext)?;

        // One pod, by the living agent: open, and shown.
        let said = on_node(agent, &["agent", "release", "--pod", "shop/payments"], 0)?.stdout;
        ensure!(said.contains("shop/payments is open"), "{said}");
        answered_soon(reports, plaintext)?;
        agent.wait_problem("released by `signet agent release`")?;
        let unknown = on_node(agent, &["agent", "release", "--pod", "shop/paymnts"], 3)?.stderr;
        ensure!(unknown.contains("registered are shop/payments"), "{unknown}");
        on_node(agent, &["agent", "rearm", "--pod", "shop/payments"], 0)?;
        refused_soon(reports, plaintext)?;
        wait_rearmed(agent)?;
        answered_soon(frontend, plaintext)?;

        // One pod, with no agent: from the pins, and it stays when an agent comes.
        agent.kill();
        refused(reports, plaintext, "closed while the agent is dead")?;
        on_node(agent, &["agent", "release", "--pod", "shop/payments"], 0)?;
        answered(reports, plaintext, "no agent is needed")?;
        agent.start_ready()?;
        agent.wait_problem("released by `signet agent release`")?;
        answered(reports, plaintext, "an agent does not close it again")?;
        // Mended with no agent, too.
        agent.kill();
        let said = on_node(agent, &["agent", "rearm"], 0)?.stdout;
        ensure!(said.contains("shop/payments") || said.contains("registered"), "{said}");
        agent.start_ready()?;
        wait_rearmed(agent)?;
        refused_soon(reports, plaintext)?;

        // The whole node, dead and then alive.
        agent.kill();
        refused(reports, plaintext, "closed while the agent is dead")?;
        let said = on_node(agent, &["agent", "release"], 0)?.stdout;
        ensure!(said.contains("shop/payments is open"), "{said}");
        answered(reports, plaintext, "no agent is needed")?;
        agent.start_ready()?;
        agent.wait_problem("nothing is enforced here")?;
        ensure!(agent.status()?["agent"]["enforcement"] == "off");
        answered(reports, plaintext, "an agent does not close it again")?;
        on_node(agent, &["agent", "rearm"], 0)?;
        refused_soon(reports, plaintext)?;
        wait_rearmed(agent)?;

        uninstalled(mesh)
    })
}

/// The lab is up already: what `signet agent uninstall` leaves is told in the same one.
fn uninstalled(mesh: &Mesh) -> Result<()> {
    let Mesh { lab, frontend, payments, reports, .. } = mesh;
    let agent = lab.agent("node-2")?;
    lab.wait_state(payments, "served")?;
    answered_soon(frontend, payments.at(TCP))?;
    let maps = map_ids(&agent.pins())?;
    // The control: this is what must go.
    ensure!(maps.len() > 20, "{maps:?}");
    let programs = programs_over(&maps)?;
    for wanted in ["connect4", "skb_ingress", "ops_node", "lookup", "guard_out"] {
        ensure!(programs.iter().any(|name| name == wanted), "no {wanted} among {programs:?}");
    }

    let refusal = on_node(agent, &["agent", "uninstall"], 1)?.stderr;
    ensure!(refusal.contains("stop it first"), "{refusal}");
    ensure!(programs_over(&maps)?.len() >= programs.len(), "a refusal changes nothing");

    agent.kill();
    unprivileged(agent, &maps)?;
    let said = on_node(agent, &["agent", "uninstall", "--state"], 0)?.stdout;
    ensure!(said.contains("links") && said.contains("removed"), "{said}");
    ensure!(!agent.pins().exists(), "{}", agent.pins().display());
    let node = agent.node();
    for place in [&node.state_dir, &node.run_dir.join("admin"), &node.run_dir.join("workload")] {
        ensure!(!place.exists(), "{} is left", place.display());
    }
    eventually("no program and no map is left", TIMEOUT, || {
        let programs = programs_over(&maps)?;
        let left: Vec<u32> = loaded_maps()?.into_iter().filter(|id| maps.contains(id)).collect();
        ensure!(programs.is_empty() && left.is_empty(), "programs {programs:?}, maps {left:?}");
        Ok(Some(()))
    })?;
    answered(reports, payments.at(TCP), "nothing is enforced any more")?;
    let again = on_node(agent, &["agent", "uninstall"], 0)?.stdout;
    ensure!(again.contains("nothing is pinned"), "{again}");

    // The control: an agent that comes back enforces again.
    agent.start_ready()?;
    lab.wait_state(payments, "served")?;
    refused_soon(reports, payments.at(TCP))?;
    answered_soon(frontend, payments.at(TCP)).map(drop)
}

/// In a container with what runtimes give by default the command says what it lacks, and takes
/// nothing: the manifest's is privileged for it.
fn unprivileged(agent: &Agent, maps: &[u32]) -> Result<()> {
    let before = programs_over(maps)?.len();
    let usual = "-all,+chown,+dac_override,+fowner,+fsetid,+kill,+setgid,+setuid,+setpcap,\
                 +net_bind_service,+sys_chroot,+mknod,+audit_write,+setfcap";
    let program = ["setpriv", "--no-new-privs", "--bounding-set", usual];
    let output = agent.on_node_under(&program, &["agent", "uninstall", "--state"], &[])?;
    ensure!(output.code() == 6, "{} {}", output.stdout, output.stderr);
    ensure!(output.stderr.contains("this process may not use BPF"), "{}", output.stderr);
    ensure!(agent.pins().exists() && agent.node().state_dir.exists(), "{}", output.stderr);
    ensure!(programs_over(maps)?.len() == before, "it took some programs");
    Ok(())
}

/// Ids of the maps that are pinned below a directory.
pub fn map_ids(pins: &Path) -> Result<Vec<u32>> {
    let mut ids = Vec::new();
    for version in fs::read_dir(pins).with_context(|| pins.display().to_string())? {
        for pin in fs::read_dir(version?.path())? {
            let path = pin?.path();
            if !path.is_dir() {
                ids.push(MapInfo::from_pin(&path)?.id());
            }
        }
    }
    Ok(ids)
}

fn loaded_maps() -> Result<Vec<u32>> {
    let mut ids = Vec::new();
    for info in aya::maps::loaded_maps() {
        // Others' maps come and go meanwhile.
        ids.extend(info.map(|info| info.id()).ok());
    }
    Ok(ids)
}

/// Names of the loaded programs that use any of these maps: whatever of one agent's is loaded.
pub fn programs_over(maps: &[u32]) -> Result<Vec<String>> {
    let mut names = Vec::new();
    for info in loaded_programs().flatten() {
        let used = info.map_ids().ok().flatten().unwrap_or_default();
        if used.iter().any(|id| maps.contains(id)) {
            names.push(info.name_as_str().unwrap_or_default().to_owned());
        }
    }
    Ok(names)
}

/// A new pod of a namespace that is not enrolled dials from its first moment on.
fn newcomer(mesh: &Mesh, name: &str, role: FirstMoment) -> Result<FirstMomentReport> {
    let role = FirstMoment { to: mesh.reports.at(TCP), ..role };
    let pod = mesh.lab.pod("legacy", name).container("main", Role::FirstMoment(role)).start()?;
    pod.with_container("main", |running| running.report(TIMEOUT))
}

#[test]
fn a_guarded_boot_refuses_pods_until_the_agent_or_the_deadline_comes() -> Result<()> {
    let mesh = Mesh::start(Some("strict"))?;
    with_logs(&mesh, |mesh| {
        let Mesh { lab, frontend, payments, reports, .. } = mesh;
        let agent = lab.agent("node-1")?;
        let briefly = || FirstMoment { for_ms: 500, ..Default::default() };
        let until = || FirstMoment { for_ms: 60_000, until_answered: true, ..Default::default() };
        // What a reboot leaves of Signet: nothing in the kernel.
        let reboot = || -> Result<()> {
            agent.kill();
            on_node(agent, &["agent", "uninstall"], 0).map(drop)
        };

        // The control: an unguarded boot lets a pod out before there is an agent.
        reboot()?;
        let report = newcomer(mesh, "unguarded", briefly())?;
        ensure!(report.answered_us.is_some(), "{report:?}");

        let said = on_node(agent, &["guard"], 0)?.stdout;
        ensure!(said.contains("pods are refused") && said.contains("300 s"), "{said}");
        let report = newcomer(mesh, "early", briefly())?;
        ensure!(report.answered_us.is_none(), "it got out before the agent was there: {report:?}");
        ensure!(report.outcomes.keys().all(|o| retriable(o)), "{report:?}");
        // Strict pods from before are closed as well, in the way that programs retry.
        let closed = refused(frontend, payments.at(TCP), "guarded")?;
        ensure!(retriable(&closed.outcome), "{closed:?}");
        // The agent takes over: what is off works, what is strict is served.
        agent.start_ready()?;
        lab.wait_state(frontend, "served")?;
        let report = newcomer(mesh, "after", until())?;
        ensure!(report.answered_us.is_some(), "{report:?}");
        answered_soon(frontend, payments.at(TCP))?;
        answered(reports, reports.at(TCP), "its own pod")?;
        let said = on_node(agent, &["guard"], 0)?.stdout;
        ensure!(said.contains("an agent has been here"), "{said}");
        answered(frontend, payments.at(TCP), "a second guard changes nothing")?;

        // No agent comes: it ends by itself.
        reboot()?;
        on_node(agent, &["guard", "--timeout", "3"], 0)?;
        let report = newcomer(mesh, "alone", until())?;
        ensure!(report.answered_us.is_some(), "{report:?}");

        // A released node is not guarded.
        reboot()?;
        on_node(agent, &["agent", "release"], 0)?;
        let said = on_node(agent, &["guard"], 0)?.stdout;
        ensure!(said.contains("nothing to guard"), "{said}");
        ensure!(!agent.pins().exists());
        on_node(agent, &["agent", "rearm"], 0)?;

        // The kubelet's root is made where it is not there yet.
        let root = agent.node().cgroup().join("fresh");
        let name = signet_lab::cgroup::path_below_mount(&root)?;
        let places = ["--instance", "fresh", "--timeout", "1", "--kubelet-config"];
        let config = agent.node().bpffs.with_file_name("kubelet.yaml");
        fs::write(&config, "cgroupDriver: systemd\n")?;
        let mut command = vec!["guard"];
        command.extend(places);
        let config = config.display().to_string();
        command.push(&config);
        let output = agent.on_node_with(&command, &[("--cgroup-root", &name)])?;
        ensure!(output.code() == 0, "{output:?}");
        ensure!(root.with_extension("slice").is_dir() && !root.exists(), "{output:?}");
        let command = ["agent", "uninstall", "--instance", "fresh"];
        on_node(agent, &command, 0)?;
        Ok(())
    })
}

#[test]
fn the_host_s_commands_name_what_is_wrong() -> Result<()> {
    let mesh = Mesh::without_agents(signet_lab::LabOptions::default(), None)?;
    let agent = mesh.lab.agent("node-1")?;
    for (command, code, text) in [
        (&["agent", "release", "--pod", "payments"][..], 3, "namespace/name"),
        (&["agent", "rearm", "--pod", "shop/payments"], 3, "it is not released"),
        (&["guard", "--timeout", "301"], 2, "301"),
        (&["agent", "uninstall", "--instance", "../x"], 3, "--instance"),
    ] {
        let output = on_node(agent, command, code)?;
        ensure!(output.stderr.contains(text), "{command:?}: {output:?}");
    }
    Ok(())
}
