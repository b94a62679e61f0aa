//! Events on objects that have something wrong with them.

use std::{sync::Arc, time::Duration};

use anyhow::{Result, ensure};
use serde_json::{Value, json};
use signet_lab::api_server::ApiServer;

use super::{Followed, TIMEOUT, namespace, pod, policy};

/// Reason, object and note of each event of an instance.
fn told(api: &ApiServer, instance: &str) -> Vec<String> {
    let text = |value: &Value| value.as_str().unwrap_or("-").to_owned();
    let of = |event: &&Value| event["reportingInstance"] == instance;
    let mut all: Vec<String> = api
        .list("events")
        .iter()
        .filter(of)
        .map(|event| {
            let regarding = &event["regarding"];
            let (reason, note) = (text(&event["reason"]), text(&event["note"]));
            format!("{reason} {} {}: {note}", text(&regarding["kind"]), text(&regarding["name"]))
        })
        .collect();
    all.sort();
    all
}

#[tokio::test(flavor = "multi_thread")]
async fn objects_with_faults_get_events_once_from_one_node() -> Result<()> {
    let api = Arc::new(ApiServer::start()?);
    for node in ["node-1", "node-2"] {
        api.apply(json!({"kind": "Node", "metadata": {"name": node}}))?;
    }
    api.apply(namespace("shop", "strict"))?;
    api.apply(namespace("odd", "strikt"))?;
    let mut sidecar = pod("sidecar", "u-1", "node-1", "10.0.0.1");
    sidecar["spec"]["containers"] = json!([{"name": "istio-proxy"}]);
    api.apply(sidecar)?;
    let mut labelled = pod("labelled", "u-2", "node-2", "10.0.0.2");
    labelled["metadata"]["labels"] = json!({"signet.dev/mode": "loose"});
    api.apply(labelled)?;
    // The control: nothing is wrong with it, and nothing is told of it.
    api.apply(pod("fine", "u-3", "node-1", "10.0.0.3"))?;
    api.apply(policy("callers", "Alow"))?;

    let first = Followed::of(api.clone(), "node-1")?;
    let second = Followed::of(api.clone(), "node-2")?;
    first.synced().await?;
    second.synced().await?;
    let deadline = tokio::time::Instant::now() + TIMEOUT;
    let (mut of_first, mut of_second) = (Vec::new(), Vec::new());
    while of_first.len() < 3 || of_second.is_empty() {
        ensure!(tokio::time::Instant::now() < deadline, "{of_first:#?} {of_second:#?}");
        tokio::time::sleep(Duration::from_millis(50)).await;
        (of_first, of_second) = (told(&api, "node-1"), told(&api, "node-2"));
    }
    // A change of something else tells nothing twice.
    api.apply(pod("fine", "u-3", "node-1", "10.0.0.4"))?;
    first.wait("the change", |world| world.pods_by_ip.len() == 3).await?;
    tokio::time::sleep(Duration::from_millis(1500)).await;
    let (of_first, of_second) = (told(&api, "node-1"), told(&api, "node-2"));
    let begin = |all: &[String]| -> Vec<String> {
        all.iter().map(|line| line.split(": ").next().unwrap_or_default().to_owned()).collect()
    };
    ensure!(
        begin(&of_first)
            == [
                "LabelIgnored Namespace odd",
                "NotAccepted IdentityPolicy callers",
                "Unenforceable Pod sidecar"
            ],
        "{of_first:#?}"
    );
    ensure!(begin(&of_second) == ["LabelIgnored Pod labelled"], "{of_second:#?}");
    ensure!(of_first[0].contains("\"strikt\" is not a mode"), "{of_first:#?}");
    ensure!(of_first[2].contains("the sidecar istio-proxy already carries"), "{of_first:#?}");
    Ok(())
}
