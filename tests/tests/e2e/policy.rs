//! Policies as people bring them: plain Istio YAML, the same as IdentityPolicies, and the
//! switch that overrides them all.

use std::{
    net::SocketAddr,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use signet_lab::{cluster_dir::ObjectKey, eventually, pod::Pod};

use crate::mesh::{
    CHANGE, HTTP, Mesh, TCP, answered, answered_soon, refused, refused_soon, server, verdict,
    with_logs,
};

/// `signet policy check` of node-2's agent: exit code and answer.
fn check(mesh: &Mesh, from: &str, to: &str, more: &[&str]) -> Result<(i32, Value)> {
    let mut arguments = vec!["policy", "check", "--from", from, "--to", to, "-o", "json"];
    arguments.extend(more);
    let output = mesh.lab.agent("node-2")?.cli(&arguments)?;
    let answer = serde_json::from_str(&output.stdout)
        .with_context(|| format!("{} {}", output.stdout, output.stderr))?;
    Ok((output.status.code().unwrap_or(-1), answer))
}

/// Asks until the agent answers so: what was applied takes a moment.
fn checked(mesh: &Mesh, from: &str, to: &str, more: &[&str], reason: &str) -> Result<Value> {
    eventually(&format!("{from} -> {to} is {reason}"), CHANGE, || {
        let (code, answer) = check(mesh, from, to, more)?;
        let allowed = answer["verdict"] != "DROPPED";
        ensure!((code == 0) == allowed, "{code} {answer}");
        Ok((answer["reason"] == reason).then_some(answer))
    })
}

fn istio(kind: &str, namespace: &str, name: &str, spec: &str) -> String {
    format!(
        "apiVersion: security.istio.io/v1\nkind: {kind}\nmetadata: {{name: {name}, namespace: \
         {namespace}}}\nspec: {spec}\n"
    )
}

/// Refused now and, where it is asked for, for this reason on the destination's side.
fn refused_for(mesh: &Mesh, client: &Pod, to: SocketAddr, reason: &str) -> Result<()> {
    refused_soon(client, to)?;
    refused(client, to, "refused")?;
    let (from, at) = (client.full_name(), "shop/payments");
    verdict(&mesh.lab, "node-2", "destination", &from, at, "DROPPED", reason)?;
    Ok(())
}

/// Two accounts reach the database's port, nobody else does, and no other port.
fn two_principals_reach_the_database(mesh: &Mesh, policy: &str, yaml: &str) -> Result<()> {
    let Mesh { lab, frontend, intruder, payments, reports, .. } = mesh;
    let auditor = lab.pod("shop", "auditor").service_account("auditor").start()?;
    auditor.wait_published()?;
    lab.wait_state(&auditor, "served")?;
    // The control: without the policy everybody who proves an identity reaches it.
    for client in [frontend, &auditor, intruder] {
        answered_soon(client, payments.at(TCP))?;
        client.curl(&payments.url(HTTP, "/x"))?.success()?;
    }
    lab.cluster().apply_yaml(yaml)?;
    refused_for(mesh, intruder, payments.at(TCP), "policy_no_match")?;
    for client in [frontend, &auditor] {
        for to in payments.all_at(TCP) {
            answered(client, to, "one of the two")?;
        }
        refused(client, payments.at(HTTP), "another port")?;
    }
    refused(reports, payments.at(TCP), "in clear")?;
    let flow = lab.agent("node-2")?.wait_flow("the policy is named", &[], |flow| {
        flow.between("shop/intruder", "shop/payments") && flow.is("DROPPED", "policy_no_match")
    })?;
    ensure!(flow.policy_name() == policy, "{flow}");

    // What the agent says of flows is what became of them.
    let to = format!("shop/payments:{TCP}");
    for (from, reason) in [
        ("shop/frontend", "allowed"),
        ("shop/auditor", "allowed"),
        ("shop/intruder", "policy_no_match"),
    ] {
        let answer = checked(mesh, from, &to, &[], reason)?;
        ensure!(answer["via"] == "mtls", "{answer}");
    }
    let other = format!("shop/payments:{HTTP}");
    checked(mesh, "shop/frontend", &other, &[], "policy_no_match")?;
    let clear = format!("@{}", reports.ip());
    let answer = checked(mesh, &clear, &to, &[], "plaintext_refused")?;
    ensure!(answer["via"] == "plaintext", "{answer}");
    Ok(())
}

#[test]
fn a_database_that_two_principals_reach_in_istio_s_words() -> Result<()> {
    let mesh = Mesh::start(Some("strict"))?;
    with_logs(&mesh, |mesh| {
        let spec = format!(
            "
  selector: {{matchLabels: {{app: payments}}}}
  action: ALLOW
  rules:
  - from:
    - source:
        principals: [cluster.local/ns/shop/sa/frontend, cluster.local/ns/shop/sa/auditor]
    to:
    - operation: {{ports: [\"{TCP}\"]}}"
        );
        let yaml = istio("AuthorizationPolicy", "shop", "db", &spec);
        two_principals_reach_the_database(mesh, "shop/db", &yaml)?;

        let output = mesh.lab.agent("node-2")?.cli(&["policy", "list", "-o", "json"])?;
        let list: Value = serde_json::from_str(output.stdout.trim())?;
        let policy = &list["policies"][0];
        ensure!(policy["kind"] == "AuthorizationPolicy" && policy["pods"] == 1, "{list}");
        ensure!(policy["hits"].as_u64() >= Some(2), "{list}");
        ensure!(policy["conditions"][0]["status"] == "True", "{list}");
        let enforced = &policy["conditions"][1];
        ensure!(enforced["type"] == "Enforced" && enforced["status"] == "True", "{list}");
        let message = enforced["message"].as_str().unwrap_or_default();
        ensure!(message.starts_with("Enforced on 1/1 nodes; "), "{list}");
        Ok(())
    })
}

#[test]
fn a_database_that_two_accounts_reach_as_an_identity_policy() -> Result<()> {
    let mesh = Mesh::start(Some("strict"))?;
    with_logs(&mesh, |mesh| {
        let yaml = format!(
            "apiVersion: signet.dev/v1alpha1
kind: IdentityPolicy
metadata: {{name: db, namespace: shop}}
spec:
  selector: {{matchLabels: {{app: payments}}}}
  ingress:
  - from: [{{serviceAccounts: [frontend, auditor]}}]
    ports: [{{port: {TCP}, protocol: TCP}}]
"
        );
        two_principals_reach_the_database(mesh, "shop/db", &yaml)
    })
}

#[test]
fn peer_authentications_refuse_plaintext_and_make_exceptions() -> Result<()> {
    let mesh = Mesh::start(Some("permissive"))?;
    with_logs(&mesh, |mesh| {
        let Mesh { lab, frontend, payments, reports, .. } = mesh;
        let cluster = lab.cluster();
        // The control: plaintext passes, and so does the tunnel.
        answered_soon(reports, payments.at(TCP))?;
        answered_soon(frontend, payments.at(TCP))?;
        reports.curl(&payments.url(HTTP, "/x"))?.success()?;
        for (namespace, name) in [("shop", "default"), ("istio-system", "mesh")] {
            let strict = istio("PeerAuthentication", namespace, name, "{mtls: {mode: STRICT}}");
            cluster.apply_yaml(&strict)?;
            refused_for(mesh, reports, payments.at(TCP), "plaintext_refused")?;
            answered_soon(frontend, payments.at(TCP))?;
            // One port of the workload takes plaintext all the same.
            let spec = format!(
                "{{selector: {{matchLabels: {{app: payments}}}}, portLevelMtls: {{{TCP}: {{mode: \
                 PERMISSIVE}}}}}}"
            );
            cluster.apply_yaml(&istio("PeerAuthentication", "shop", "port", &spec))?;
            for to in payments.all_at(TCP) {
                answered_soon(reports, to)?;
            }
            refused(reports, payments.at(HTTP), "another port")?;
            answered(frontend, payments.at(TCP), "the tunnel")?;
            cluster.delete(&ObjectKey::new("PeerAuthentication", "shop", "port"))?;
            refused_soon(reports, payments.at(TCP))?;
            cluster.delete(&ObjectKey::new("PeerAuthentication", namespace, name))?;
            answered_soon(reports, payments.at(TCP))?;
        }
        // A single strict port of a permissive pod.
        let spec = format!(
            "{{selector: {{matchLabels: {{app: payments}}}}, portLevelMtls: {{{TCP}: {{mode: \
             STRICT}}}}}}"
        );
        cluster.apply_yaml(&istio("PeerAuthentication", "shop", "port", &spec))?;
        refused_for(mesh, reports, payments.at(TCP), "policy_deny")?;
        reports.curl(&payments.url(HTTP, "/x"))?.success()?;
        answered_soon(frontend, payments.at(TCP))?;
        Ok(())
    })
}

#[test]
fn a_deny_with_not_principals_refuses_everybody_else() -> Result<()> {
    let mesh = Mesh::start(Some("permissive"))?;
    with_logs(&mesh, |mesh| {
        let Mesh { lab, frontend, intruder, payments, reports, .. } = mesh;
        for client in [frontend, intruder, reports] {
            answered_soon(client, payments.at(TCP))?;
        }
        let spec = "{selector: {matchLabels: {app: payments}}, action: DENY, rules: [{from: \
                    [{source: {notPrincipals: [cluster.local/ns/shop/sa/frontend]}}]}]}";
        lab.cluster().apply_yaml(&istio("AuthorizationPolicy", "shop", "only", spec))?;
        refused_for(mesh, intruder, payments.at(TCP), "policy_deny")?;
        refused_for(mesh, reports, payments.at(TCP), "policy_deny")?;
        for to in payments.all_at(TCP) {
            answered(frontend, to, "the one")?;
        }
        // Only reported, once it is a dry run.
        lab.cluster().change(&ObjectKey::new("AuthorizationPolicy", "shop", "only"), |policy| {
            policy["metadata"]["annotations"] = serde_json::json!({"istio.io/dry-run": "true"});
        })?;
        answered_soon(intruder, payments.at(TCP))?;
        let flow = verdict(
            lab,
            "node-2",
            "destination",
            "shop/intruder",
            "shop/payments",
            "AUDIT",
            "allowed",
        )?;
        ensure!(flow.policy_name() == "shop/only", "{flow}");
        Ok(())
    })
}

#[test]
fn enforcement_is_overridden_within_a_second_and_over_a_restart() -> Result<()> {
    let mesh = Mesh::start(Some("strict"))?;
    with_logs(&mesh, |mesh| {
        let Mesh { lab, frontend, intruder, payments, reports, .. } = mesh;
        let cluster = lab.cluster();
        mesh.allow_payments(&["frontend"])?;
        answered_soon(frontend, payments.at(TCP))?;
        refused_soon(intruder, payments.at(TCP))?;
        refused(reports, payments.at(TCP), "in clear")?;
        let shown = |word: &str| -> Result<()> {
            for node in ["node-1", "node-2"] {
                eventually(&format!("{node} shows {word}"), CHANGE, || {
                    let status = lab.agent(node)?.status()?;
                    Ok((status["agent"]["enforcement"] == word).then_some(()))
                })?;
            }
            Ok(())
        };
        shown("enforce")?;
        cluster.write_file("enforcement.yaml", "enforcement: audit\n")?;
        let began = Instant::now();
        answered_soon(reports, payments.at(TCP))?;
        let took = began.elapsed();
        println!("plaintext to a strict pod passes {took:?} after enforcement: audit");
        ensure!(took <= Duration::from_secs(1), "{took:?}");
        answered_soon(intruder, payments.at(TCP))?;
        shown("audit")?;
        verdict(
            lab,
            "node-2",
            "destination",
            "legacy/reports",
            "shop/payments",
            "AUDIT",
            "plaintext_refused",
        )?;
        // A file that breaks, and an agent that starts over it: the last word stays.
        cluster.write_file("enforcement.yaml", "enforcement: perhaps\n")?;
        lab.agent("node-2")?.wait_problem("enforcement.yaml")?;
        answered(reports, payments.at(TCP), "the last word")?;
        lab.agent("node-2")?.stop()?;
        lab.agent("node-2")?.start_ready()?;
        shown("audit")?;
        answered_soon(reports, payments.at(TCP))?;
        cluster.write_file("enforcement.yaml", "enforcement: enforce\n")?;
        refused_soon(reports, payments.at(TCP))?;
        refused_soon(intruder, payments.at(TCP))?;
        answered_soon(frontend, payments.at(TCP))?;
        shown("enforce")?;
        Ok(())
    })
}

#[test]
fn egress_by_service_and_a_cluster_s_policy() -> Result<()> {
    let mesh = Mesh::start(Some("strict"))?;
    with_logs(&mesh, |mesh| {
        let Mesh { lab, frontend, intruder, payments, service, .. } = mesh;
        let other = server(lab, "node-2", "shop", "intruder-2")?;
        lab.wait_state(&other, "served")?;
        answered_soon(frontend, other.at(TCP))?;
        lab.cluster().apply_yaml(
            "apiVersion: signet.dev/v1alpha1
kind: ClusterIdentityPolicy
metadata: {name: frontends}
spec:
  selector: {namespaces: ['sh*'], matchLabels: {app: frontend}}
  egress: [{to: [{services: [shop/payments]}]}]
",
        )?;
        refused_soon(frontend, other.at(TCP))?;
        refused(frontend, other.at(TCP), "not listed")?;
        for ip in service.addresses.all() {
            frontend.curl(&format!("http://{}/x", SocketAddr::from((ip, 80))))?.success()?;
        }
        frontend.curl(&payments.url(HTTP, "/x"))?.success()?;
        refused(frontend, payments.at(TCP), "another port of the endpoint")?;
        answered(intruder, other.at(TCP), "not selected")?;
        let flow = verdict(
            lab,
            "node-1",
            "source",
            "shop/frontend",
            "shop/intruder-2",
            "DROPPED",
            "policy_no_match",
        )?;
        ensure!(flow.policy_name() == "/frontends", "{flow}");
        Ok(())
    })
}
