//! Bad input: one clear error with file, field, value and remedy; what ran keeps running.

use std::{fs, time::Duration};

use anyhow::{Result, ensure};
use signet_lab::{
    Lab, LabOptions,
    capture::TUNNEL_PORT,
    process::Output,
    traffic::{Role, reports::TcpServerReport},
};

use crate::{
    foreign::ForeignProgram,
    mesh::{Mesh, TCP, TIMEOUT, answered, answered_soon, refused, refused_soon, with_logs},
};

/// Starts node-1's agent with these further arguments; it must end by itself.
fn ends(lab: &Lab, flags: &[&str]) -> Result<(i32, String)> {
    let agent = lab.agent("node-1")?;
    agent.set_flags(flags);
    let before = agent.logged().len();
    agent.start()?;
    let code = agent.wait_end(TIMEOUT)?;
    agent.set_flags(&[]);
    Ok((code, agent.logged()[before..].to_owned()))
}

fn one_node() -> Result<Lab> {
    let lab = Lab::with(LabOptions { nodes: 1, ..Default::default() })?;
    lab.namespace("shop", Some("strict"))?;
    Ok(lab)
}

/// One error line that holds every part.
fn says(log: &str, parts: &[&str]) -> Result<()> {
    let errors: Vec<&str> = log.lines().filter(|line| line.contains("error")).collect();
    ensure!(
        errors.iter().any(|line| parts.iter().all(|part| line.contains(part))),
        "no line has {parts:?}:\n{log}"
    );
    Ok(())
}

#[test]
fn flags_and_configuration() -> Result<()> {
    let lab = one_node()?;
    let file = lab.directory().join("agent.yaml");
    let config = file.display().to_string();

    fs::write(&file, "svidTtll: 1h\n")?;
    let (code, log) = ends(&lab, &["--config", &config])?;
    ensure!(code == 3, "exit code {code}: {log}");
    says(&log, &["agent.yaml", "svidTtll", "svidTtl"])?;

    let (code, log) = ends(&lab, &["--svid-ttl", "soon"])?;
    ensure!(code == 3 || code == 2, "exit code {code}: {log}");
    says(&log, &["svid-ttl", "soon"])?;

    let (code, log) = ends(&lab, &["--trust-domain", "Cluster Local"])?;
    ensure!(code == 3, "exit code {code}: {log}");
    says(&log, &["trust-domain", "Cluster Local"])?;

    let (code, log) = ends(&lab, &["--no-such-flag"])?;
    ensure!(code == 2, "exit code {code}: {log}");
    Ok(())
}

#[test]
fn a_directory_of_manifests_that_cannot_be_read() -> Result<()> {
    let lab = one_node()?;
    lab.cluster().write_file("broken.yaml", "apiVersion: v1\nkind: Pod\nmetadata: [oops\n")?;
    let (code, log) = ends(&lab, &[])?;
    ensure!(code == 3, "exit code {code}: {log}");
    says(&log, &["broken.yaml"])?;
    lab.cluster().write_file(
        "broken.yaml",
        "apiVersion: signet.dev/v1alpha1\nkind: IdentityPolicy\nmetadata: {name: p, namespace: \
         shop}\nspec:\n  ingress:\n  - from: [{identities: [\"spiffe://UPPER case/x\"]}]\n",
    )?;
    let (code, log) = ends(&lab, &[])?;
    ensure!(code == 3, "exit code {code}: {log}");
    says(&log, &["broken.yaml", "identities", "UPPER case"])?;
    // The control: without it the agent starts.
    lab.cluster().remove_file("broken.yaml")?;
    lab.agent("node-1")?.start_ready()?;
    Ok(())
}

#[test]
fn a_file_that_breaks_later_keeps_its_last_good_state() -> Result<()> {
    let mesh = Mesh::start(Some("strict"))?;
    with_logs(&mesh, |mesh| {
        let Mesh { lab, frontend, intruder, payments, .. } = mesh;
        mesh.allow_payments(&["frontend"])?;
        refused_soon(intruder, payments.at(TCP))?;
        answered_soon(frontend, payments.at(TCP))?;
        let file = "identitypolicy.shop.payments-callers.yaml";
        lab.cluster().write_file(file, "apiVersion: signet.dev/v1alpha1\nkind: [\n")?;
        for agent in lab.agents() {
            let problem = agent.wait_problem(file)?;
            ensure!(!problem["message"].to_string().is_empty(), "{problem}");
        }
        refused(intruder, payments.at(TCP), "still")?;
        answered(frontend, payments.at(TCP), "still")?;
        // Mended, it is read again.
        mesh.allow_payments(&["frontend", "intruder"])?;
        answered_soon(intruder, payments.at(TCP))?;
        Ok(())
    })
}

#[test]
fn a_pod_without_cgroup_is_reported_with_where_it_was_looked_for() -> Result<()> {
    let mesh = Mesh::start(Some("strict"))?;
    with_logs(&mesh, |mesh| {
        mesh.lab.cluster().apply(serde_json::json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": {"name": "ghost", "namespace": "shop", "uid": "0d15ea5e-0000"},
            "spec": {"nodeName": "node-1", "containers": [{"name": "main", "image": "x"}]},
            "status": {"phase": "Pending"},
        }))?;
        let problem = mesh.lab.agent("node-1")?.wait_problem("shop/ghost")?.to_string();
        ensure!(problem.contains("waiting") && problem.contains("cgroup"), "{problem}");
        ensure!(problem.contains("0d15ea5e-0000") && problem.contains("kubepods"), "{problem}");
        answered_soon(&mesh.frontend, mesh.payments.at(TCP))?;
        Ok(())
    })
}

#[test]
fn hosts_that_cannot() -> Result<()> {
    let lab = one_node()?;
    let node = &lab.nodes()[0];

    let (code, log) = ends(&lab, &["--bpffs", "/proc"])?;
    ensure!(code == 6, "exit code {code}: {log}");
    says(&log, &["bpffs", "/proc"])?;

    let (code, log) = ends(&lab, &["--cgroup-root", "/no/such/cgroup"])?;
    ensure!(code == 6, "exit code {code}: {log}");
    says(&log, &["/no/such/cgroup"])?;

    // Not root: nobody's uid, everything else as before. And root without the rights to BPF,
    // as a container has that is not privileged.
    let agent = lab.agent("node-1")?;
    let nobody = ["--reuid=65534", "--clear-groups"];
    let unprivileged = ["--bounding-set=-bpf,-sys_admin,-perfmon", "--inh-caps=-all"];
    for less in [nobody, unprivileged] {
        let mut argv = vec!["setpriv".to_owned()];
        argv.extend(less.map(str::to_owned));
        argv.push(signet_lab::process::signet_binary()?.display().to_string());
        argv.extend(agent.arguments()?);
        let argv: Vec<&str> = argv.iter().map(String::as_str).collect();
        let Output { status, stderr, .. } = node.agent_place().run(&argv)?;
        ensure!(status.code() == Some(6), "{less:?} {status}: {stderr}");
        ensure!(
            stderr.contains("root") && stderr.contains("capabilities BPF"),
            "{less:?} {stderr}"
        );
    }

    agent.set_env("SIGNET_MASK_FEATURES", "warp_drive");
    let (code, log) = ends(&lab, &[])?;
    ensure!(code == 3, "exit code {code}: {log}");
    says(&log, &["SIGNET_MASK_FEATURES", "warp_drive", "set_retval"])?;
    agent.set_env("SIGNET_MASK_FEATURES", "");

    // The control.
    agent.start_ready()?;
    Ok(())
}

#[test]
fn another_tools_exclusive_program_is_named() -> Result<()> {
    let lab = one_node()?;
    let workloads = lab.nodes()[0].workloads();
    let foreign = ForeignProgram::attach(&workloads)?;
    let (code, log) = ends(&lab, &[])?;
    ensure!(code == 6, "exit code {code}: {log}");
    says(&log, &["othertool", &workloads.display().to_string(), "bpftool cgroup detach"])?;
    // The control: without it the agent starts.
    drop(foreign);
    lab.agent("node-1")?.start_ready()?;
    Ok(())
}

#[test]
fn an_application_on_the_tunnels_own_port_is_in_nobodys_way() -> Result<()> {
    let mesh = Mesh::start(Some("off"))?;
    with_logs(&mesh, |mesh| {
        let Mesh { lab, frontend, payments, .. } = mesh;
        let mut squatter = payments.start(&Role::tcp(TUNNEL_PORT))?;
        squatter.wait_event("listening", TIMEOUT)?;
        // The control: while nothing is enrolled it is an application as any other.
        answered(frontend, payments.at(TUNNEL_PORT), "squatter")?;
        lab.cluster().set_mode("shop", Some("strict"))?;
        lab.wait_state(frontend, "served")?;
        lab.wait_state(payments, "served")?;
        for to in payments.all_at(TCP) {
            let report = answered_soon(frontend, to)?;
            ensure!(report.peer == Some(to), "{report:?}");
        }
        // Its port is the tunnel's now, and no tunnel leads to the tunnel's port.
        refused(frontend, payments.at(TUNNEL_PORT), "squatter")?;
        squatter.send("report")?;
        let report: TcpServerReport = squatter.report(TIMEOUT)?;
        ensure!(report.accepted == 1, "more than the control: {report:?}");
        Ok(())
    })
}

#[test]
fn a_second_agent_on_one_node_is_refused_and_the_first_goes_on() -> Result<()> {
    let lab = Lab::start()?;
    lab.namespace("shop", Some("strict"))?;
    lab.namespace("legacy", None)?;
    let server = lab
        .pod_on(lab.node("node-2")?, "shop", "server")
        .container("main", Role::tcp(TCP))
        .start()?;
    lab.start_agents()?;
    lab.wait_state(&server, "served")?;
    // The same run-dir and the same pods, other pins: not one that may take the first's place.
    let agent = lab.agent("node-2")?;
    let mut argv = vec![signet_lab::process::signet_binary()?.display().to_string()];
    argv.extend(agent.arguments()?);
    argv.extend(["--instance", "other"].map(str::to_owned));
    let argv: Vec<&str> = argv.iter().map(String::as_str).collect();
    let mut second = agent.node().agent_place().start_program("second-agent", &argv)?;
    let status = second.wait(Duration::from_secs(30))?;
    let said = fs::read_to_string(second.log())?;
    ensure!(!status.success(), "two agents on one node: {said}");
    ensure!(said.contains("instance \"default\"") && said.contains("stop it first"), "{said}");
    ensure!(!agent.node().bpffs.join("other").exists(), "it has pinned something");
    // What ran before keeps running.
    let client = lab.pod("shop", "client").start()?;
    lab.wait_state(&client, "served")?;
    answered_soon(&client, server.at(TCP))?;
    Ok(())
}
