//! The SPIFFE Workload API: each pod its own SVIDs, by who has connected; nobody else anything.

use std::{collections::BTreeSet, fs, os::unix::fs::MetadataExt, time::Duration};

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use signet_lab::{
    Lab, LabOptions, cgroup,
    pod::Pod,
    process::{Output, Place, Running, signet_binary},
};

use crate::{
    mesh::{Mesh, TIMEOUT, with_logs},
    spiffe_clients::{followed, start_rust},
};

/// Renewed at half of it.
const TTL: &str = "10s";

fn mesh() -> Result<Mesh> {
    let agent_flags = vec!["--svid-ttl".into(), TTL.into()];
    Mesh::with(LabOptions { agent_flags, ..Default::default() }, Some("strict"))
}

/// `signet svid fetch …` in a place of node-1.
pub fn fetch(lab: &Lab, place: &Place, arguments: &[&str]) -> Result<Output> {
    let socket = lab.agent("node-1")?.workload_socket();
    let endpoint = format!("SPIFFE_ENDPOINT_SOCKET=unix://{}", socket.display());
    let binary = signet_binary()?.display().to_string();
    place.run(&[&["env", &endpoint, &binary, "svid", "fetch"], arguments].concat())
}

/// The identity that a place of node-1 gets.
fn identity(lab: &Lab, place: &Place) -> Result<String> {
    let answer = fetch(lab, place, &["x509", "-o", "json"])?.success()?;
    let answer: Value = serde_json::from_str(&answer).context("JSON")?;
    Ok(answer["spiffeId"].as_str().context("no spiffeId")?.to_owned())
}

/// It gets nothing, and is told so in the standard's words.
fn is_nobody(lab: &Lab, place: &Place) -> Result<()> {
    let answer = fetch(lab, place, &["x509"])?;
    ensure!(answer.code() == 5, "exit code {}: {} {}", answer.code(), answer.stdout, answer.stderr);
    ensure!(answer.stderr.contains("no identity issued"), "{}", answer.stderr);
    Ok(())
}

/// Distinct certificates that a follower has seen.
fn leaves(follower: &Running) -> BTreeSet<String> {
    let printed = follower.printed();
    printed.iter().filter_map(|v| v["leaf"].as_str().map(str::to_owned)).collect()
}

#[test]
fn pods_of_one_account_have_their_own_keys_and_follow_rotation() -> Result<()> {
    let mesh = mesh()?;
    with_logs(&mesh, |mesh| {
        let Mesh { lab, frontend, .. } = mesh;
        let second = lab.pod("shop", "frontend-2").service_account("frontend").start()?;
        lab.wait_state(&second, "served")?;
        let one = start_rust(lab, frontend, &["watch"])?;
        let two = start_rust(lab, &second, &["watch"])?;
        for follower in [&one, &two] {
            let first = follower.wait_event("svid", TIMEOUT)?;
            ensure!(first["id"] == "spiffe://cluster.local/ns/shop/sa/frontend", "{first}");
        }
        followed(&one, 3)?;
        followed(&two, 3)?;
        let shared: Vec<_> = leaves(&one).intersection(&leaves(&two)).cloned().collect();
        ensure!(shared.is_empty(), "two pods share a certificate: {shared:?}");

        let held = lab.agent("node-1")?.cli(&["svid", "list", "-o", "json"])?.success()?;
        let held: Value = serde_json::from_str(&held)?;
        let own = |pod: &Pod| {
            let svids = held["svids"].as_array().into_iter().flatten();
            svids.filter(|s| s["use"] == "workload" && s["pod"] == *pod.full_name()).count()
        };
        ensure!(own(frontend) == 1 && own(&second) == 1, "{held}");
        // It goes with its pod.
        drop(two);
        second.remove()?;
        signet_lab::eventually("its SVID is forgotten", TIMEOUT, || {
            let answer = lab.agent("node-1")?.cli(&["svid", "show", "shop/frontend-2"])?;
            ensure!(answer.code() == 1, "{} {}", answer.code(), answer.stdout);
            Ok(Some(()))
        })
    })
}

#[test]
fn who_is_no_pod_has_no_identity_and_a_forged_cgroup_is_its_pods() -> Result<()> {
    let mesh = mesh()?;
    with_logs(&mesh, |mesh| {
        let Mesh { lab, frontend, intruder, reports, .. } = mesh;
        let agent = lab.agent("node-1")?;
        let before = agent.metrics()?;
        ensure!(
            identity(lab, frontend.place())? == "spiffe://cluster.local/ns/shop/sa/frontend",
            "the pod's own identity"
        );
        // A pod outside the mesh has an identity, too: the API touches none of its traffic.
        ensure!(
            identity(lab, reports.place())? == "spiffe://cluster.local/ns/legacy/sa/default",
            "an off pod's identity"
        );
        is_nobody(lab, lab.outside())?;
        is_nobody(lab, &lab.node("node-1")?.system_place())?;
        // A pod of the other node is none of this node's.
        is_nobody(lab, mesh.payments.place())?;
        let host = lab.pod("shop", "host").host_network().start()?;
        is_nobody(lab, host.place())?;

        // What a privileged container of the intruder can make: cgroups below its own, named as
        // the victim's are.
        let victim = frontend.cgroup().strip_prefix(lab.node("node-1")?.workloads())?;
        let forged = intruder.place().cgroup.join("kubepods").join(victim).join("container");
        cgroup::create(&forged)?;
        let place = Place { cgroup: forged, ..intruder.place().clone() };
        let got = identity(lab, &place)?;
        ensure!(got == "spiffe://cluster.local/ns/shop/sa/intruder", "{got}");
        // Beside the pods' directories nothing is a pod's.
        let beside = lab.node("node-1")?.workloads().join("podforged");
        cgroup::create(&beside)?;
        is_nobody(lab, &Place { cgroup: beside.clone(), ..intruder.place().clone() })?;
        cgroup::kill_and_remove(&beside);

        let after = agent.metrics()?;
        let grown = |name: &str, labels: &[(&str, &str)]| {
            after.sum(name, labels) - before.sum(name, labels)
        };
        let calls = |code| {
            grown("workload_api_calls_total", &[("method", "FetchX509SVID"), ("code", code)])
        };
        ensure!((calls("Ok"), calls("PermissionDenied")) == (3.0, 5.0), "{after:?}");
        ensure!(grown("workload_api_calls_total", &[]) == 8.0, "{after:?}");
        ensure!(grown("workload_api_connections_total", &[]) == 8.0, "{after:?}");
        let nobody = [("reason", "no_workload")];
        ensure!(grown("workload_api_unattested_total", &nobody) == 5.0, "{after:?}");
        let held = [("use", "workload"), ("state", "valid")];
        ensure!(after.sum("svids", &held) == 3.0, "{after:?}");
        Ok(())
    })
}

#[test]
fn a_static_entry_serves_what_is_no_pod() -> Result<()> {
    let entries = tempfile::tempdir()?;
    let flags = ["--workload-entries", &entries.path().display().to_string()].map(str::to_owned);
    let options = LabOptions { agent_flags: flags.into(), nodes: 1, ..Default::default() };
    let lab = Lab::with(options)?;
    lab.namespace("shop", Some("strict"))?;
    lab.cluster().service_account("shop", "frontend")?;
    let pod = lab.pod("shop", "frontend").service_account("frontend").start()?;
    let place = lab.node("node-1")?.system_place();
    let below = cgroup::path_below_mount(&place.cgroup)?;
    let write = |selector: &str| {
        let text = format!(
            "apiVersion: signet.dev/v1alpha1\nkind: WorkloadEntry\nmetadata: {{name: backup}}\n\
             spec:\n  spiffeId: spiffe://cluster.local/vm/backup\n  selector: {selector}\n"
        );
        fs::write(entries.path().join("backup.yaml"), text)
    };

    write("{executable: /usr/bin/backup}")?;
    let agent = lab.agent("node-1")?;
    agent.start()?;
    ensure!(agent.wait_end(TIMEOUT)? == 3, "{}", agent.logged());
    ensure!(
        agent.logged().contains("backup.yaml:6: spec.selector: executable alone proves nothing"),
        "{}",
        agent.logged()
    );

    write(&format!("{{cgroup: {below}, uid: 0}}"))?;
    agent.start_ready()?;
    lab.wait_state(&pod, "served")?;
    let got = identity(&lab, &place)?;
    ensure!(got == "spiffe://cluster.local/vm/backup", "{got}");
    let got = identity(&lab, pod.place())?;
    ensure!(got == "spiffe://cluster.local/ns/shop/sa/frontend", "{got}");
    is_nobody(&lab, lab.outside())?;

    write("{uid: 12345}")?;
    agent.signal(rustix::process::Signal::HUP)?;
    signet_lab::eventually("the entry has changed", TIMEOUT, || {
        is_nobody(&lab, &place)?;
        Ok(Some(()))
    })
}

#[test]
fn the_socket_is_alone_and_files_are_written_whole() -> Result<()> {
    let mesh = mesh()?;
    with_logs(&mesh, |mesh| {
        let Mesh { lab, frontend, .. } = mesh;
        let agent = lab.agent("node-1")?;
        let socket = agent.workload_socket();
        let directory = socket.parent().context("a directory")?;
        let mode = |path: &std::path::Path| fs::metadata(path).map(|m| m.mode() & 0o7777);
        ensure!(mode(&socket)? == 0o666 && mode(directory)? == 0o755, "modes");
        ensure!(fs::read_dir(directory)?.count() == 1, "something else is in {directory:?}");

        let target = lab.directory().join("tls");
        let path = target.display().to_string();
        let written = fetch(lab, frontend.place(), &["x509", "--write", &path, "-o", "json"])?;
        let written: Value = serde_json::from_str(&written.success()?)?;
        ensure!(written["written"].as_array().is_some_and(|w| w.len() == 3), "{written}");
        ensure!(mode(&target.join("svid_key.pem"))? == 0o600, "the key's mode");
        ensure!(mode(&target.join("svid.pem"))? == 0o644, "the chain's mode");
        // The bundle that verifies it, and no other.
        let root = fs::read_to_string(agent.authority_dir().join("root.pem"))?;
        let bundle = fs::read_to_string(target.join("svid_bundle.pem"))?;
        let certificate = |pem: &str| {
            let body = pem.split("-----BEGIN CERTIFICATE-----").nth(1)?;
            let body = body.split("-----END").next()?;
            Some(body.split_whitespace().collect::<String>())
        };
        ensure!(
            certificate(&bundle).is_some() && certificate(&bundle) == certificate(&root),
            "{bundle}"
        );

        let token = fetch(lab, frontend.place(), &["jwt", "--audience", "payments", "-o", "json"])?;
        let token: Value = serde_json::from_str(&token.success()?)?;
        ensure!(
            token["spiffeId"] == "spiffe://cluster.local/ns/shop/sa/frontend"
                && token["audience"] == serde_json::json!(["payments"])
                && token["token"].as_str().is_some_and(|t| t.split('.').count() == 3),
            "{token}"
        );
        let other = "spiffe://cluster.local/ns/shop/sa/payments";
        let answer =
            fetch(lab, frontend.place(), &["jwt", "--audience", "a", "--spiffe-id", other])?;
        ensure!(answer.code() == 5 && answer.stdout.is_empty(), "{answer:?}");
        let answer = fetch(lab, frontend.place(), &["jwt"])?;
        ensure!(answer.code() == 2 && answer.stderr.contains("--audience"), "{answer:?}");

        // Following: each renewal is written, as a whole.
        let endpoint = format!("SPIFFE_ENDPOINT_SOCKET=unix://{}", socket.display());
        let binary = signet_binary()?.display().to_string();
        let follow =
            ["env", &endpoint, &binary, "svid", "fetch", "x509", "--write", &path, "--watch"];
        let following = frontend.place().start_program("svid-watch", &follow)?;
        let before = fs::read(target.join("svid.pem"))?;
        signet_lab::eventually("a renewal is written", TIMEOUT, || {
            Ok((fs::read(target.join("svid.pem"))? != before).then_some(()))
        })?;
        let written = || -> Result<_> { Ok(fs::read(target.join("svid.pem"))?) };
        let second = written()?;
        signet_lab::eventually("another one is", TIMEOUT, || {
            Ok((written()? != second).then_some(()))
        })?;
        drop(following);

        // A file that cannot be written, a socket that is not there, an identity that waits.
        let answer = fetch(lab, frontend.place(), &["x509", "--write", "/proc/no"])?;
        ensure!(answer.code() == 3 && answer.stderr.contains("--write"), "{answer:?}");
        let absent = &["x509", "--socket", "unix:///no/such.sock"];
        let answer = fetch(lab, frontend.place(), absent)?;
        ensure!(answer.code() == 4 && answer.stderr.contains("/no/such.sock"), "{answer:?}");
        agent.kill();
        let answer = fetch(lab, frontend.place(), &["x509"])?;
        ensure!(answer.code() == 4, "{answer:?}");
        agent.start()?;
        let answer = fetch(lab, frontend.place(), &["x509", "--wait", "30"])?;
        ensure!(answer.code() == 0, "{answer:?}");
        Ok(())
    })
}

#[test]
fn clients_come_back_to_a_restarted_agent() -> Result<()> {
    let mesh = mesh()?;
    with_logs(&mesh, |mesh| {
        let Mesh { lab, frontend, .. } = mesh;
        let follower = start_rust(lab, frontend, &["watch"])?;
        follower.wait_event("svid", TIMEOUT)?;
        let agent = lab.agent("node-1")?;
        ensure!(agent.stop()? == Some(0), "it does not drain");
        ensure!(!agent.workload_socket().exists(), "its socket stays");
        let before = leaves(&follower).len();
        agent.start_ready()?;
        signet_lab::eventually("a new SVID", Duration::from_secs(60), || {
            Ok((leaves(&follower).len() > before).then_some(()))
        })
    })
}
