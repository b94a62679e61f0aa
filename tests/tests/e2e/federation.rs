//! Two clusters with an authority each: who may come in, who may be dialled, and what
//! happens when a bundle is withdrawn.

use anyhow::{Result, ensure};
use serde_json::{Value, json};
use signet_lab::{
    Lab, LabOptions, address,
    pod::Pod,
    traffic::{Role, reports::HoldReport, roles::Hold},
};

use crate::mesh::{TCP, TIMEOUT, answered_soon, dial, refused, refused_soon};

const OTHER: &str = "other.example";
const CLIENT: &str = "spiffe://cluster.local/ns/prod/sa/api";
const SERVER: &str = "spiffe://other.example/ns/prod/sa/payments";

/// Writes both clusters' `federation.yaml`: each trusts the other's root, and the first
/// dials the second's pods as remote peers.
fn federate(lab: &Lab, remote_identities: &[&str]) -> Result<()> {
    let [first, second] = lab.agents() else { anyhow::bail!("two agents") };
    for (agent, name) in [(first, "first.pem"), (second, "second.pem")] {
        std::fs::write(lab.directory().join(name), agent.root_certificate()?)?;
    }
    let bundle = |name: &str| lab.directory().join(name).display().to_string();
    let remotes: Vec<Value> = address::pod_ranges_of(lab.family(), 2)
        .into_iter()
        .map(|cidr| json!({"cidr": cidr, "trustDomain": OTHER, "identities": remote_identities}))
        .collect();
    write(
        lab.cluster(),
        &json!({
            "trustDomains": [{"name": OTHER, "bundle": bundle("second.pem")}],
            "remotePeers": remotes,
        }),
    )?;
    write(
        lab.second_cluster()?,
        &json!({"trustDomains": [{"name": "cluster.local", "bundle": bundle("first.pem")}]}),
    )
}

fn write(cluster: &signet_lab::cluster_dir::ClusterDir, federation: &Value) -> Result<()> {
    // JSON is YAML.
    cluster.write_file("federation.yaml", &federation.to_string())
}

/// An ALLOW of the second cluster's payments.
fn allow(lab: &Lab, from: Value) -> Result<()> {
    lab.second_cluster()?.apply(json!({
        "apiVersion": "signet.dev/v1alpha1", "kind": "IdentityPolicy",
        "metadata": {"name": "callers", "namespace": "prod"},
        "spec": {"action": "Allow", "ingress": [{"from": [from]}]},
    }))
}

struct Pair {
    lab: Lab,
    client: Pod,
    server: Pod,
}

impl Pair {
    fn start() -> Result<Self> {
        let options = LabOptions { second_domain: Some(OTHER.into()), ..Default::default() };
        let lab = Lab::with(options)?;
        for (cluster, account) in [(lab.cluster(), "api"), (lab.second_cluster()?, "payments")] {
            cluster.namespace("prod", &[("signet.dev/mode", "strict")])?;
            cluster.service_account("prod", account)?;
        }
        let client = lab.pod("prod", "api").service_account("api").start()?;
        let server = lab
            .pod_on(lab.node("node-2")?, "prod", "payments")
            .service_account("payments")
            .container("tcp", Role::tcp(TCP))
            .start()?;
        lab.start_agents()?;
        lab.wait_state(&client, "served")?;
        lab.wait_state(&server, "served")?;
        Ok(Self { lab, client, server })
    }
}

#[test]
fn a_foreign_identity_comes_in_by_name_only_and_leaves_with_its_bundle() -> Result<()> {
    let Pair { lab, client, server } = Pair::start()?;
    let test = || -> Result<()> {
        let to = server.at(TCP);
        // Nothing federated: an address outside the cluster, dialled in clear, refused there.
        let report = dial(&client, to, "marker-fede")?;
        ensure!(report.refused(), "{report:?}");
        federate(&lab, &[SERVER])?;
        // Trusted, but a foreign identity needs an ALLOW that names its domain.
        verdict_soon(&lab, &client, &server, "policy_no_match")?;
        // Namespaces and accounts are those of the cluster's own domain.
        allow(&lab, json!({"namespaces": ["prod"], "serviceAccounts": ["api"]}))?;
        allow(&lab, json!({"namespaces": ["prod"]}))?;
        refused_soon(&client, to)?;
        allow(&lab, json!({"identities": ["*"]}))?;
        refused_soon(&client, to)?;

        // Another pod of the account: a tunnel can only be read from its beginning.
        let fresh = lab.pod("prod", "api-2").service_account("api").start()?;
        lab.wait_state(&fresh, "served")?;
        let capture = lab.capture("federated")?;
        allow(&lab, json!({"identities": [CLIENT]}))?;
        for to in server.all_at(TCP) {
            let report = answered_soon(&fresh, to)?;
            ensure!(report.peer == Some(to), "{report:?}");
            let seen = report.seen.map(|s| s.accepted.ip());
            ensure!(seen.is_some_and(|ip| fresh.ips().contains(&ip)), "{seen:?}");
        }
        dial(&fresh, to, "marker-fede")?;
        let captured = capture.stop()?;
        ensure!(captured.find("marker-fede").is_empty(), "in clear");
        captured.only_tunnels_between(&fresh.ips(), &server.ips())?;
        let flow = lab.agent("node-2")?.wait_flow("the foreign caller", &[], |flow| {
            flow.reporter == "destination" && flow.is("FORWARDED", "allowed")
        })?;
        ensure!(flow.source.identity.as_deref() == Some(CLIENT), "{flow}");
        ensure!(flow.source.known_by.as_deref() == Some("mtls"), "{flow}");
        let flow = lab.agent("node-1")?.wait_flow("the remote peer", &[], |flow| {
            flow.reporter == "source" && flow.is("FORWARDED", "allowed") && flow.via == "mtls"
        })?;
        ensure!(flow.destination.identity.as_deref() == Some(SERVER), "{flow}");

        let refreshes = || -> Result<f64> {
            let of_first = [("trust_domain", "cluster.local"), ("result", "ok")];
            Ok(lab.agent("node-2")?.metrics()?.sum("bundle_refreshes_total", &of_first))
        };
        ensure!(refreshes()? >= 1.0, "the other domain's bundle was read");
        // The bundle is withdrawn while a flow is open.
        let mut held = client.start(&Role::Hold(Hold { to, ..Default::default() }))?;
        held.wait_event("open", TIMEOUT)?;
        write(lab.second_cluster()?, &json!({"trustDomains": []}))?;
        let report: HoldReport = held.report(TIMEOUT)?;
        ensure!(report.closed.iter().all(|c| c.outcome.ends_with("ECONNRESET")), "{report:?}");
        held.finish();
        lab.agent("node-2")?.wait_flow("its end says why", &["--ends"], |flow| {
            flow.event == "end" && flow.reason == "untrusted_peer"
        })?;
        ensure!(refreshes()? == 0.0, "a domain's series go with it");
        refused(&client, to, "distrusted")?;
        lab.agent("node-2")?.wait_flow("a handshake is refused", &[], |flow| {
            flow.is("DROPPED", "untrusted_peer")
        })?;
        // The control: federated again, it is answered again.
        federate(&lab, &[SERVER])?;
        answered_soon(&client, to)?;
        Ok(())
    };
    test().inspect_err(|_| eprintln!("{}", lab.agent_logs(60)))
}

/// Dials until the server's node refuses for this reason.
fn verdict_soon(lab: &Lab, client: &Pod, server: &Pod, reason: &str) -> Result<()> {
    signet_lab::eventually(&format!("refused as {reason}"), crate::mesh::CHANGE, || {
        let report = dial(client, server.at(TCP), "not named")?;
        ensure!(report.refused(), "{report:?}");
        let flows = lab.agent("node-2")?.flows(&["--reason", reason])?;
        Ok((!flows.is_empty()).then_some(()))
    })
}

#[test]
fn a_remote_peer_that_proves_another_name_gets_nothing() -> Result<()> {
    let Pair { lab, client, server } = Pair::start()?;
    let test = || -> Result<()> {
        allow(&lab, json!({"identities": [CLIENT]}))?;
        federate(&lab, &["spiffe://other.example/ns/prod/sa/ledger"])?;
        signet_lab::eventually("its name is not the one expected", crate::mesh::CHANGE, || {
            let report = dial(&client, server.at(TCP), "wrong name")?;
            ensure!(report.refused(), "{report:?}");
            let flows = lab.agent("node-1")?.flows(&["--reason", "identity_mismatch"])?;
            Ok((!flows.is_empty()).then_some(()))
        })?;
        // The control: named among others, it is taken.
        federate(&lab, &["spiffe://other.example/ns/prod/sa/ledger", SERVER])?;
        answered_soon(&client, server.at(TCP))?;
        let flow =
            lab.agent("node-1")?.wait_flow("under the name that it proved", &[], |flow| {
                flow.reporter == "source" && flow.is("FORWARDED", "allowed")
            })?;
        ensure!(flow.destination.identity.as_deref() == Some(SERVER), "{flow}");
        Ok(())
    };
    test().inspect_err(|_| eprintln!("{}", lab.agent_logs(60)))
}

#[test]
fn an_alias_of_the_domain_is_the_domain() -> Result<()> {
    let Pair { lab, client, server } = Pair::start()?;
    let test = || -> Result<()> {
        allow(&lab, json!({"namespaces": ["prod"]}))?;
        federate(&lab, &[SERVER])?;
        // The control: another domain's namespace is not ours.
        verdict_soon(&lab, &client, &server, "policy_no_match")?;
        let bundle = lab.directory().join("first.pem").display().to_string();
        write(
            lab.second_cluster()?,
            &json!({
                "trustDomains": [{"name": "cluster.local", "bundle": bundle}],
                "trustDomainAliases": ["cluster.local"],
            }),
        )?;
        answered_soon(&client, server.at(TCP))?;
        let flow = lab.agent("node-2")?.wait_flow("under its own name", &[], |flow| {
            flow.reporter == "destination" && flow.is("FORWARDED", "allowed")
        })?;
        ensure!(flow.source.identity.as_deref() == Some(CLIENT), "{flow}");
        Ok(())
    };
    test().inspect_err(|_| eprintln!("{}", lab.agent_logs(60)))
}
