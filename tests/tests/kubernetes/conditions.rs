//! Conditions on policies: what they say, that one node writes them, and that another does when
//! that one is gone.

use std::{collections::BTreeMap, sync::Arc};

use anyhow::{Result, ensure};
use serde_json::{Value, json};
use signet::cluster::enrolment::EnrolmentBoard as _;
use signet_lab::api_server::ApiServer;

use super::{Followed, TIMEOUT, namespace, pod, policy};

/// `True Applied`, by type, of a policy of shop; empty while there are none.
fn said(api: &ApiServer, name: &str) -> BTreeMap<String, String> {
    conditions(api, name)
        .iter()
        .map(|c| {
            let text = |field: &str| c[field].as_str().unwrap_or("-").to_owned();
            (text("type"), format!("{} {}", text("status"), text("reason")))
        })
        .collect()
}

fn conditions(api: &ApiServer, name: &str) -> Vec<Value> {
    let object = api.get("identitypolicies", "shop", name).unwrap_or_default();
    object["status"]["conditions"].as_array().cloned().unwrap_or_default()
}

/// Waits until a policy's conditions are these.
async fn wait(api: &ApiServer, name: &str, accepted: &str, enforced: &str) -> Result<()> {
    let wanted = [("Accepted", accepted), ("Enforced", enforced)];
    let wanted: BTreeMap<String, String> =
        wanted.into_iter().map(|(kind, said)| (kind.to_owned(), said.to_owned())).collect();
    let deadline = tokio::time::Instant::now() + TIMEOUT;
    while said(api, name) != wanted {
        ensure!(
            tokio::time::Instant::now() < deadline,
            "{name}: {:#?}, not {wanted:?}",
            conditions(api, name)
        );
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    }
    Ok(())
}

fn selecting(name: &str, app: &str) -> Value {
    let mut object = policy(name, "Allow");
    object["spec"]["selector"] = json!({"matchLabels": {"app": app}});
    object
}

#[tokio::test(flavor = "multi_thread")]
async fn policies_say_whether_they_are_understood_and_hold() -> Result<()> {
    let api = Arc::new(ApiServer::start()?);
    for node in ["node-1", "node-2"] {
        api.apply(json!({"kind": "Node", "metadata": {"name": node}}))?;
    }
    api.apply(namespace("shop", "strict"))?;
    let mut web = pod("web", "u-1", "node-1", "10.0.0.1");
    web["metadata"]["labels"] = json!({"app": "web"});
    api.apply(web)?;
    for object in [selecting("callers", "web"), selecting("nobody", "gone"), policy("odd", "Alow")]
    {
        api.apply(object)?;
    }
    let mut first = Followed::of(api.clone(), "node-1")?;
    let now = jiff::Timestamp::now();
    first.board.announce(&BTreeMap::new(), 1, now)?;
    // Enrolled, and no agent serves it yet.
    wait(&api, "callers", "True Accepted", "False NotServed").await?;
    let mut second = Followed::of(api.clone(), "node-2")?;
    second.board.announce(&BTreeMap::new(), 1, now)?;
    let served = BTreeMap::from([("u-1".into(), "shop/web".into())]);
    first.board.announce(&served, 2, now)?;
    wait(&api, "callers", "True Accepted", "True Applied").await?;
    wait(&api, "nobody", "True Accepted", "True NothingSelected").await?;
    wait(&api, "odd", "False Malformed", "False NotInForce").await?;
    let why = conditions(&api, "odd")[0]["message"].as_str().unwrap_or_default().to_owned();
    ensure!(why.contains("spec.action") && why.contains("Alow"), "{why}");

    // One node wrote, and each only what was news.
    let writes = || api.requests().get("PATCH identitypolicies").copied().unwrap_or(0);
    ensure!(writes() == 4, "{} writes for four states", writes());
    let before = conditions(&api, "callers");
    let written = writes();
    api.apply(pod("web-2", "u-9", "node-2", "10.0.0.9"))?;
    first.wait("another pod", |world| world.pods.len() == 2).await?;
    tokio::time::sleep(std::time::Duration::from_secs(5)).await;
    ensure!(writes() == written, "a pod that changes nothing is written about");

    api.apply(namespace("shop", "observe"))?;
    wait(&api, "callers", "True Accepted", "False NotEnforced").await?;
    let after = conditions(&api, "callers");
    ensure!(before[0] == after[0], "{before:#?} {after:#?}");
    ensure!(before[1]["message"] != after[1]["message"], "{after:#?}");
    api.apply(json!({
        "apiVersion": "v1", "kind": "ConfigMap",
        "metadata": {"namespace": "signet-system", "name": "signet-enforcement"},
        "data": {"enforcement": "audit"},
    }))?;
    wait(&api, "callers", "True Accepted", "False Overridden").await?;

    // The writer goes for good: the next one takes over. Its thread may say a last word.
    drop(first);
    let server = api.clone();
    tokio::spawn(async move {
        loop {
            let _ = server.delete("nodeenrolments", "", "node-1");
            tokio::time::sleep(std::time::Duration::from_millis(100)).await;
        }
    });
    second.wait("a board without it", |world| world.served.is_empty()).await?;
    api.delete("configmaps", "signet-system", "signet-enforcement")?;
    wait(&api, "callers", "True Accepted", "False NotEnforced").await?;
    Ok(())
}
