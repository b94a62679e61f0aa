//! What was seen of a namespace says what would break, also after a restart.

use std::{fs, net::IpAddr, os::unix::fs::PermissionsExt};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use signet::flow::edges::network_of;
use signet_lab::{
    agent::Agent,
    cluster_dir::{ObjectKey, to_yaml},
    eventually,
    traffic::{Role, roles::Hold},
};

use crate::mesh::{
    HTTP, Mesh, TCP, TIMEOUT, answered, answered_soon, policy, refused, refused_soon, verdict,
    with_logs,
};

/// `signet rollout check NS --to MODE`: its exit code and findings.
fn check(agent: &Agent, namespace: &str, to: &str) -> Result<(i32, Vec<Value>)> {
    let answer = agent.cli(&["rollout", "check", namespace, "--to", to, "-o", "json"])?;
    let findings = answer.stdout.lines().map(serde_json::from_str).collect::<Result<_, _>>();
    Ok((answer.code(), findings.with_context(|| format!("{answer:?}"))?))
}

#[test]
fn a_rollout_is_checked_by_what_was_seen_and_survives_a_restart() -> Result<()> {
    let mesh = Mesh::start(Some("observe"))?;
    with_logs(&mesh, |mesh| {
        let agent = mesh.lab.agent("node-2")?;
        let to = mesh.payments.at(TCP);
        let (code, findings) = check(agent, "shop", "strict")?;
        ensure!(code == 1 && findings[0]["kind"] == "unseen", "{findings:?}");

        // The control: what would be tunnelled breaks nothing.
        answered(&mesh.frontend, to, "enrolled")?;
        eventually("the enrolled caller was seen", TIMEOUT, || {
            let (code, findings) = check(agent, "shop", "strict")?;
            ensure!(code == 0 && findings.is_empty(), "{code}: {findings:?}");
            Ok(Some(()))
        })?;
        for n in 0..3 {
            answered(&mesh.reports, to, &format!("in clear {n}"))?;
        }
        let expected = |agent: &Agent| -> Result<()> {
            eventually("the caller in clear was seen", TIMEOUT, || {
                let (code, findings) = check(agent, "shop", "strict")?;
                ensure!(code == 1 && findings.len() == 1, "{code}: {findings:?}");
                let finding = &findings[0];
                let said = |field: &str| finding[field].as_str().unwrap_or_default();
                ensure!(
                    finding["subject"] == format!("legacy/default -> shop/payments:{TCP} tcp")
                        && finding["kind"] == "verdict"
                        && finding["count"] == 3
                        && said("text").contains("plaintext_refused")
                        && said("remedy").contains("enrol the namespace legacy first"),
                    "{finding}"
                );
                Ok(Some(()))
            })
        };
        expected(agent)?;
        let (code, findings) = check(agent, "shop", "permissive")?;
        ensure!(code == 0 && findings.is_empty(), "permissive takes it: {findings:?}");
        let text = agent.cli(&["rollout", "check", "shop", "--to", "strict"])?;
        ensure!(text.code() == 1 && text.stdout.contains("(3 flows, the last "), "{text:?}");
        let later = agent.cli(&["rollout", "check", "shop", "--to", "strict", "--since", "0s"])?;
        ensure!(later.code() == 1 && later.stdout.contains("nothing was seen"), "{later:?}");

        // It is on disk when the agent ends, and damage is no reason not to start.
        ensure!(agent.stop()? == Some(0), "it does not drain");
        let file = agent.node().state_dir.join("edges.ndjson");
        let mode = fs::metadata(&file)?.permissions().mode() & 0o7777;
        ensure!(mode == 0o600, "mode {mode:o}");
        agent.start_ready()?;
        expected(agent)?;
        ensure!(agent.stop()? == Some(0), "it does not drain");
        fs::write(&file, "garbage")?;
        agent.start_ready()?;
        ensure!(agent.logged().contains("the history of flows is damaged"), "no warning");
        ensure!(fs::read_to_string(file.with_extension("ndjson.damaged"))? == "garbage");
        let (code, findings) = check(agent, "shop", "strict")?;
        ensure!(code == 1 && findings[0]["kind"] == "unseen", "{findings:?}");
        Ok(())
    })
}

#[test]
fn policies_suggested_from_what_was_seen_let_the_same_pass_and_nothing_else() -> Result<()> {
    let mesh = Mesh::start(Some("observe"))?;
    with_logs(&mesh, |mesh| {
        let Mesh { lab, frontend, intruder, payments, .. } = mesh;
        let agent = lab.agent("node-2")?;
        let nothing = agent.cli(&["policy", "suggest", "-n", "shop"])?;
        ensure!(nothing.code() == 1 && nothing.stdout.is_empty(), "{nothing:?}");
        answered(frontend, payments.at(TCP), "seen")?;
        ensure!(frontend.curl(&payments.url(HTTP, "/seen"))?.code() == 0);
        let suggest = |form: &[&str]| -> Result<String> {
            eventually("both ports were seen", TIMEOUT, || {
                let arguments = [&["policy", "suggest", "-n", "shop"], form].concat();
                let text = agent.cli(&arguments)?.success()?;
                let ports = [TCP, HTTP].iter().all(|port| text.contains(&port.to_string()));
                Ok(ports.then_some(text))
            })
        };
        for (form, kind) in [(&[][..], "IdentityPolicy"), (&["--istio"], "AuthorizationPolicy")] {
            let text = suggest(form)?;
            ensure!(text.matches("kind: ").count() == 1 && text.contains(kind), "{text}");
            // The control: in strict and without it everybody in the mesh gets in.
            lab.cluster().set_mode("shop", Some("strict"))?;
            for pod in [frontend, intruder, payments] {
                lab.wait_state(pod, "served")?;
            }
            answered_soon(intruder, payments.at(TCP))?;
            lab.cluster().apply_yaml(&text)?;
            refused_soon(intruder, payments.at(TCP))?;
            // That one may have lost its right while it was being opened; this one never has it.
            refused(intruder, payments.at(TCP), "not suggested")?;
            verdict(
                lab,
                "node-2",
                "destination",
                "shop/intruder",
                "shop/payments",
                "DROPPED",
                "policy_no_match",
            )?;
            answered(frontend, payments.at(TCP), "allowed")?;
            ensure!(frontend.curl(&payments.url(HTTP, "/allowed"))?.code() == 0, "{kind}");
            eventually("what was refused is told", TIMEOUT, || {
                let text = suggest(form)?;
                let told = text.contains("# - left out: shop/intruder was refused (policy_no");
                Ok(told.then_some(()))
            })?;
            lab.cluster().delete(&ObjectKey::new(kind, "shop", "payments-callers"))?;
            // The control's calls were seen, too: a new history does not have them.
            ensure!(agent.stop()? == Some(0), "it does not drain");
            fs::remove_file(agent.node().state_dir.join("edges.ndjson"))?;
            agent.start_ready()?;
            lab.wait_state(payments, "served")?;
            answered_soon(frontend, payments.at(TCP))?;
            ensure!(frontend.curl(&payments.url(HTTP, "/seen"))?.code() == 0);
        }
        Ok(())
    })
}

#[test]
fn a_diff_names_exactly_the_flows_that_then_change() -> Result<()> {
    let mesh = Mesh::start(Some("permissive"))?;
    with_logs(&mesh, |mesh| {
        let Mesh { lab, frontend, intruder, payments, reports, .. } = mesh;
        let agent = lab.agent("node-2")?;
        let to = payments.at(TCP);
        for client in [frontend, intruder, reports] {
            answered_soon(client, to)?;
        }
        let written = |name: &str, text: &str| -> Result<String> {
            let path = lab.directory().join(name);
            fs::write(&path, text)?;
            Ok(path.display().to_string())
        };
        let only_frontend = to_yaml(&policy(
            "payments-callers",
            "Allow",
            "payments",
            json!([{"from": [{"serviceAccounts": ["frontend"]}]}]),
        ))?;
        let file = written("proposed.yaml", &only_frontend)?;
        let diff = || -> Result<(i32, Vec<Value>)> {
            let answer = agent.cli(&["policy", "diff", "-f", &file, "-n", "shop", "-o", "json"])?;
            let changes = answer.stdout.lines().map(serde_json::from_str).collect::<Result<_, _>>();
            Ok((answer.code(), changes.with_context(|| format!("{answer:?}"))?))
        };
        let subjects = |changes: &[Value]| -> Vec<String> {
            let mut all: Vec<String> = changes
                .iter()
                .map(|change| change["subject"].as_str().unwrap_or_default().to_owned())
                .collect();
            all.sort();
            all
        };
        let changes = eventually("both callers were seen", TIMEOUT, || {
            let (code, changes) = diff()?;
            ensure!(code == 1 && changes.len() == 2, "{code}: {changes:?}");
            Ok(Some(changes))
        })?;
        let expected = [
            format!("legacy/default -> shop/payments:{TCP} tcp"),
            format!("shop/intruder -> shop/payments:{TCP} tcp"),
        ];
        ensure!(subjects(&changes) == expected, "{changes:?}");
        for change in &changes {
            ensure!(change["before"]["verdict"] == "FORWARDED", "{change}");
            ensure!(change["after"]["verdict"] == "DROPPED", "{change}");
            ensure!(change["after"]["reason"] == "policy_no_match", "{change}");
            let by = &change["after"]["policy"];
            ensure!(by == "IdentityPolicy/shop/payments-callers", "{change}");
        }
        let text = agent.cli(&["policy", "diff", "-f", &file])?;
        ensure!(text.stdout.contains("2 of 3 kinds of flows"), "{text:?}");

        // It is as it was told: those two, and not the third; then nothing is left to change.
        lab.cluster().apply_yaml(&only_frontend)?;
        for client in [intruder, reports] {
            refused_soon(client, to)?;
        }
        answered(frontend, to, "still")?;
        let (code, changes) = diff()?;
        ensure!(code == 0 && changes.is_empty(), "{code}: {changes:?}");

        let namespace = "apiVersion: v1\nkind: Namespace\nmetadata: {name: shop}\n";
        let file = written("namespace.yaml", namespace)?;
        let refused = agent.cli(&["policy", "diff", "-f", &file])?;
        ensure!(refused.code() == 3 && refused.stderr.contains("namespace.yaml:1"), "{refused:?}");
        Ok(())
    })
}

/// NetworkPolicies of a namespace that is enrolled already: what its pods dial in this one.
fn theirs_are_in_the_way_too(mesh: &Mesh) -> Result<()> {
    let (agent, cluster) = (mesh.lab.agent("node-2")?, mesh.lab.cluster());
    let wait = |count: usize| {
        eventually("what is told of legacy's NetworkPolicy", TIMEOUT, || {
            let (_, findings) = check(agent, "shop", "strict")?;
            let about = findings.iter().filter(|f| f["subject"] == "NetworkPolicy legacy/calls");
            let about: Vec<&Value> = about.collect();
            ensure!(about.len() == count, "{findings:?}");
            for finding in about {
                let said = format!("{} {}", finding["text"], finding["remedy"]);
                let is_told = said.contains("once shop is enrolled")
                    && said.contains("spec.egress[0].ports of NetworkPolicy legacy/calls");
                ensure!(is_told, "{finding}");
            }
            Ok(Some(()))
        })
    };
    cluster.apply_yaml(&format!(
        "apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {{name: calls, namespace: legacy}}
spec:
  podSelector: {{}}
  policyTypes: [Egress]
  egress:
  - to: [{{namespaceSelector: {{}}, podSelector: {{matchLabels: {{app: payments}}}}}}]
    ports: [{{port: {TCP}}}]
"
    ))?;
    cluster.set_mode("legacy", Some("permissive"))?;
    wait(1)?;
    // The control: what is not enrolled goes on in clear.
    cluster.set_mode("legacy", None)?;
    wait(0)
}

/// Clients in a host's network, and behind an address that no pod has.
fn callers_without_a_pod_are_named(mesh: &Mesh) -> Result<()> {
    let Mesh { lab, payments, reports, .. } = mesh;
    let (agent, node) = (lab.agent("node-2")?, lab.node("node-1")?);
    let host = lab.pod_on(node, "legacy", "host").host_network().start()?;
    host.wait_published()?;
    answered(&host, payments.at(TCP), "from the host's network")?;
    // As masquerading does: an address of the node's part of the pods' ranges.
    let masked = match reports.at(TCP).ip() {
        IpAddr::V4(ip) => {
            let [a, b, c, _] = ip.octets();
            IpAddr::from([a, b, c, 250])
        }
        IpAddr::V6(ip) => {
            let mut octets = ip.octets();
            octets[15] = 250;
            IpAddr::from(octets)
        }
    };
    let address = masked.to_string();
    node.exec(&["ip", "address", "add", &address, "dev", "lo"])?.success()?;
    let url = payments.url(HTTP, "/masked");
    node.exec(&["curl", "-sS", "-g", "--interface", &address, "--max-time", "5", &url])?
        .success()?;
    let network = network_of(masked).to_string();
    eventually("both callers are named", TIMEOUT, || {
        let (_, findings) = check(agent, "shop", "strict")?;
        let about = |port: u16, what: &str, rule: &str| {
            findings.iter().any(|finding| {
                let said = |field: &str| finding[field].as_str().unwrap_or_default();
                finding["kind"] == "verdict"
                    && said("subject").ends_with(&format!(" -> shop/payments:{port} tcp"))
                    && said("text").contains(what)
                    && said("remedy").contains(rule)
            })
        };
        let exempt = format!("signet.dev/exempt-inbound-ports: \"{TCP}/tcp\"");
        ensure!(about(TCP, "pod legacy/host", &exempt), "{findings:#?}");
        let blocks = format!("ipBlocks: [{network}] to port {HTTP}");
        ensure!(about(HTTP, "no pod has that address", &blocks), "{findings:#?}");
        let all = format!("{HTTP}/tcp,{TCP}/tcp");
        let annotation = findings.iter().find(|finding| finding["kind"] == "exempt-ports");
        let remedy = annotation.and_then(|finding| finding["remedy"].as_str());
        ensure!(remedy.is_some_and(|remedy| remedy.contains(&all)), "{findings:#?}");
        Ok(Some(()))
    })
}

/// A NetworkPolicy of payments: the frontend's pods may dial its TCP port, and these.
fn network_policy(more: &str) -> String {
    format!(
        "apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {{name: payments, namespace: shop}}
spec:
  podSelector: {{matchLabels: {{app: payments}}}}
  ingress:
  - from: [{{podSelector: {{matchLabels: {{app: frontend}}}}}}]
    ports: [{{port: {TCP}}}{more}]
"
    )
}

#[test]
fn network_policies_and_open_flows_in_the_way_are_told_and_translated() -> Result<()> {
    let mesh = Mesh::start(Some("observe"))?;
    with_logs(&mesh, |mesh| {
        let Mesh { lab, frontend, intruder, payments, reports, .. } = mesh;
        let (agent, cluster) = (lab.agent("node-2")?, lab.cluster());
        let to = payments.at(TCP);
        let of = |to: &str, kind: &str| -> Result<Vec<Value>> {
            let (_, findings) = check(agent, "shop", to)?;
            Ok(findings.into_iter().filter(|finding| finding["kind"] == kind).collect())
        };
        // Nothing is open yet, and nothing in the way: the control.
        ensure!(of("strict", "open-plaintext")?.is_empty());
        ensure!(of("strict", "network-policy")?.is_empty());
        let hold = Hold { to, count: 3, ..Hold::default() };
        let holding = reports.start(&Role::Hold(hold))?;
        eventually("the flows in clear are counted", TIMEOUT, || {
            let open = of("strict", "open-plaintext")?;
            ensure!(
                open.len() == 1
                    && open[0]["count"] == 3
                    && open[0]["subject"] == format!("legacy/reports -> shop/payments:{TCP}"),
                "{open:?}"
            );
            Ok(Some(()))
        })?;
        ensure!(of("permissive", "open-plaintext")?.is_empty(), "permissive takes them");
        drop(holding);
        eventually("they are gone", TIMEOUT, || {
            Ok(of("strict", "open-plaintext")?.is_empty().then_some(()))
        })?;

        cluster.apply_yaml(&network_policy(""))?;
        for to in ["permissive", "strict"] {
            eventually("the NetworkPolicy is told", TIMEOUT, || {
                let found = of(to, "network-policy")?;
                let [found] = found.as_slice() else { return Ok(None) };
                let remedy = found["remedy"].as_str().unwrap_or_default();
                let wanted = "NetworkPolicy shop/payments: {port: 15008, protocol: TCP}";
                ensure!(remedy.ends_with(wanted), "{found}");
                Ok(Some(()))
            })?;
        }
        let (code, _) = check(agent, "shop", "permissive")?;
        ensure!(code == 1, "{code}");
        // What the remedy says heals it.
        cluster.apply_yaml(&network_policy(", {port: 15008, protocol: TCP}"))?;
        eventually("nothing is in the way", TIMEOUT, || {
            Ok(of("strict", "network-policy")?.is_empty().then_some(()))
        })?;

        theirs_are_in_the_way_too(mesh)?;
        callers_without_a_pod_are_named(mesh)?;

        // What it says in labels, as identities: it applies, and means the same.
        cluster.set_mode("shop", Some("strict"))?;
        for pod in [frontend, intruder, payments] {
            lab.wait_state(pod, "served")?;
        }
        for (form, kind) in [(&[][..], "IdentityPolicy"), (&["--istio"], "AuthorizationPolicy")] {
            let arguments =
                [&["policy", "suggest", "-n", "shop", "--from-networkpolicies"], form].concat();
            let text = agent.cli(&arguments)?.success()?;
            ensure!(text.contains(kind) && !text.contains("15008"), "{text}");
            answered_soon(intruder, to)?;
            cluster.apply_yaml(&text)?;
            refused_soon(intruder, to)?;
            refused(intruder, to, "not of its labels")?;
            verdict(
                lab,
                "node-2",
                "destination",
                "shop/intruder",
                "shop/payments",
                "DROPPED",
                "policy_no_match",
            )?;
            answered(frontend, to, "of its labels")?;
            refused_soon(frontend, payments.at(HTTP))?;
            cluster.delete(&ObjectKey::new(kind, "shop", "payments"))?;
        }
        Ok(())
    })
}
