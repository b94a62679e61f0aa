//! The taint of nodes without an agent: set and removed by one replica, the others' taints left
//! alone, never on more nodes than may have it.

use std::{path::PathBuf, time::Duration};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use signet_lab::{api_server::ApiServer, authority::Authority, eventually};

use super::client::populate;

const SYSTEM: &str = "signet-system";
const TAINT: &str = "node.signet.dev/agent-not-ready";
/// A turn of the leader and more; taking the Lease over takes four of them.
const SOON: Duration = Duration::from_secs(40);

fn taints(api: &ApiServer, node: &str) -> Vec<Value> {
    let node = api.get("nodes", "", node).unwrap_or_default();
    node["spec"]["taints"].as_array().cloned().unwrap_or_default()
}

/// True when the node has our taint.
pub fn is_tainted(api: &ApiServer, node: &str) -> bool {
    taints(api, node).iter().any(|taint| taint["key"] == TAINT && taint["effect"] == "NoSchedule")
}

/// The node's agent is there: its pod is Ready, and its NodeEnrolment belongs to the Node.
pub fn agent_is_ready(api: &ApiServer, node: &str) -> Result<()> {
    api.change("pods", SYSTEM, &format!("agent-{node}"), |pod| {
        pod["status"]["conditions"] = json!([{"type": "Ready", "status": "True"}]);
    })?;
    let uid = api.get("nodes", "", node).context("no such node")?["metadata"]["uid"].clone();
    api.apply(json!({
        "apiVersion": "signet.dev/v1alpha1", "kind": "NodeEnrolment",
        "metadata": {"name": node, "ownerReferences": [
            {"apiVersion": "v1", "kind": "Node", "name": node, "uid": uid},
        ]},
        "status": {"served": [], "revision": 1, "time": "2026-01-01T00:00:00Z"},
    }))?;
    Ok(())
}

fn holder(api: &ApiServer) -> Option<String> {
    let lease = api.get("leases", SYSTEM, "signet-authority-leader")?;
    lease["spec"]["holderIdentity"].as_str().map(str::to_owned)
}

fn replica(api: &ApiServer, name: &str) -> Result<Authority> {
    let path = |p: PathBuf| p.display().to_string();
    let flags = [
        "--kubeconfig",
        &path(api.account_kubeconfig(SYSTEM, "signet-authority", None)?),
        "--store-secret",
        "signet-system/signet-authority-root",
        "--taint-lease",
        "signet-system/signet-authority-leader",
        "--names",
        "localhost",
    ];
    let flags: Vec<String> = flags.iter().map(|flag| (*flag).to_owned()).collect();
    Authority::start(name, api.directory(), None, &flags)
}

#[test]
fn the_leader_alone_taints_nodes_and_the_next_one_goes_on() -> Result<()> {
    let api = ApiServer::start()?;
    api.ship(&["agent", "authority", "overlays/taint"])?;
    populate(&api)?;
    agent_is_ready(&api, "node-1")?;
    let other = json!({"key": "dedicated", "value": "gpu", "effect": "NoSchedule"});
    api.change("nodes", "", "node-2", |node| node["spec"]["taints"] = json!([other]))?;
    // A third node without an agent: one of three is as much as there may be.
    api.apply(json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": "node-3"}}))?;

    let first = replica(&api, "one")?;
    eventually("node-2 is tainted", SOON, || Ok(is_tainted(&api, "node-2").then_some(())))?;
    let leader = holder(&api).context("nobody holds the Lease")?;
    let second = replica(&api, "two")?;
    ensure!(taints(&api, "node-2").contains(&other), "another's taint went");
    ensure!(!is_tainted(&api, "node-1"), "its agent is ready");
    ensure!(!is_tainted(&api, "node-3"), "that is one too many");

    // The agent comes: its node is free, and there is room for the next.
    agent_is_ready(&api, "node-2")?;
    eventually("node-2 is free", SOON, || Ok((!is_tainted(&api, "node-2")).then_some(())))?;
    ensure!(taints(&api, "node-2") == [other], "another's taint stays");
    eventually("node-3 is tainted", SOON, || Ok(is_tainted(&api, "node-3").then_some(())))?;
    ensure!(holder(&api).as_ref() == Some(&leader), "the leader stays while it renews");
    let leads = |replica: &Authority| {
        replica.lines().iter().any(|line| line["leader"] == true || line["step"].is_string())
    };
    ensure!(leads(&first) && !leads(&second), "both act: {}", second.said());

    // The leader is gone: the other one goes on once the Lease has run out.
    drop(first);
    api.apply(json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"namespace": SYSTEM, "name": "agent-node-3"},
        "spec": {"serviceAccountName": "signet-agent", "nodeName": "node-3", "containers": []},
    }))?;
    agent_is_ready(&api, "node-3")?;
    eventually("node-3 is free", SOON, || Ok((!is_tainted(&api, "node-3")).then_some(())))?;
    ensure!(holder(&api) != Some(leader) && leads(&second), "{}", second.said());
    Ok(())
}
