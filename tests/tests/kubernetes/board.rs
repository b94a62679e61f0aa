//! NodeEnrolments: written by their node, read by all.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use signet::cluster::enrolment::{BoardError, EnrolmentBoard as _};
use signet_lab::api_server::ApiServer;

use super::{Followed, TIMEOUT, namespace, pod};

fn served(uids: &[&str]) -> BTreeMap<Arc<str>, Arc<str>> {
    uids.iter().map(|uid| ((*uid).into(), format!("shop/{uid}").into())).collect()
}

fn now() -> jiff::Timestamp {
    jiff::Timestamp::now()
}

async fn eventually(what: &str, mut is_so: impl FnMut() -> bool) -> Result<()> {
    let deadline = tokio::time::Instant::now() + TIMEOUT;
    while !is_so() {
        ensure!(tokio::time::Instant::now() < deadline, "{what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    Ok(())
}

fn uids(api: &ApiServer, node: &str) -> Option<Vec<String>> {
    let object = api.get("nodeenrolments", "", node)?;
    let served = object["status"]["served"].as_array()?;
    Some(served.iter().filter_map(|pod| Some(pod["uid"].as_str()?.to_owned())).collect())
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_node_announces_the_others_see() -> Result<()> {
    let api = Arc::new(ApiServer::start()?);
    api.apply(namespace("shop", "strict"))?;
    let node = api.apply(json!({"kind": "Node", "metadata": {"name": "node-1"}}))?;
    api.apply(pod("web", "u-1", "node-1", "10.0.0.1"))?;
    api.apply(pod("db", "u-2", "node-2", "10.0.0.2"))?;
    let mut first = Followed::of(api.clone(), "node-1")?;
    let mut second = Followed::of(api.clone(), "node-2")?;
    first.synced().await?;
    second.synced().await?;

    // A node that claims another's pod is not believed, and named.
    second.board.announce(&served(&["u-1", "u-2"]), 1, now())?;
    let world = first.wait("the claim", |world| !world.problems.is_empty()).await?;
    assert!(!world.served.contains_key("u-1") && world.served.contains_key("u-2"));
    assert_eq!(
        (world.problems[0].subject.as_str(), world.problems[0].message.as_str()),
        ("status of node node-2", "served: claims pod shop/web, which is bound to node-1; ignored")
    );

    // Its own node is.
    assert!(first.board.announce(&served(&["u-1"]), 3, now())?);
    second
        .wait("served", |world| world.served.get("u-1").is_some_and(|node| &**node == "node-1"))
        .await?;
    let object = api.get("nodeenrolments", "", "node-1").context("it is not written")?;
    assert_eq!(object["metadata"]["ownerReferences"][0]["uid"], node["metadata"]["uid"]);
    assert_eq!(
        (&object["status"]["revision"], &object["kind"]),
        (&json!(3), &json!("NodeEnrolment"))
    );

    // A revision alone is no news.
    assert!(!first.board.announce(&served(&["u-1"]), 4, now())?);
    second.board.announce(&served(&["u-2"]), 2, now())?;
    first.wait("no claim", |w| w.problems.is_empty() && w.served.len() == 2).await?;

    // Taken away at once.
    first.board.announce(&served(&[]), 5, now())?;
    let begin = std::time::Instant::now();
    second.wait("not served", |world| !world.served.contains_key("u-1")).await?;
    println!("taken away after {:?}", begin.elapsed());
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn writes_are_few_and_the_last_word_is_written() -> Result<()> {
    let mut followed = Followed::start()?;
    let api = followed.api.clone();
    followed.synced().await?;
    let begin = std::time::Instant::now();
    let all: Vec<String> = (0..200).map(|n| format!("u-{n:03}")).collect();
    for count in 1..=all.len() {
        let uids: Vec<&str> = all[..count].iter().map(String::as_str).collect();
        followed.board.announce(&served(&uids), count as u64, now())?;
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    eventually("all are written", || uids(&api, "node-1").is_some_and(|u| u.len() == 200)).await?;
    let most = begin.elapsed().as_secs() as usize + 2;
    let writes = api.requests()["PATCH nodeenrolments"];
    ensure!(writes <= most, "{writes} writes within {:?}", begin.elapsed());

    // The board is dropped right behind its last word.
    followed.board.announce(&served(&[]), 999, now())?;
    drop(followed.board);
    assert_eq!(uids(&api, "node-1"), Some(vec![]));
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failing_write_is_told_and_tried_again() -> Result<()> {
    let mut followed = Followed::start()?;
    let api = followed.api.clone();
    followed.synced().await?;
    api.set_faults(|faults| faults.refusal = Some(503));
    followed.board.announce(&served(&["u-1"]), 1, now())?;
    let mut failure = String::new();
    eventually("the failure is told", || {
        match followed.board.announce(&served(&["u-1"]), 1, now()) {
            Err(BoardError::Send { node, cause }) => {
                failure = format!("{node} {cause}");
                true
            }
            _ => false,
        }
    })
    .await?;
    assert_eq!(failure, "node-1 the API server answers 503: the server is down");
    api.set_faults(|faults| faults.refusal = None);
    eventually("it is written", || uids(&api, "node-1").is_some()).await?;
    eventually("no failure is told any more", || {
        followed.board.announce(&served(&["u-1"]), 1, now()).is_ok()
    })
    .await?;

    // Somebody deletes it, or writes something else: it is written again.
    api.delete("nodeenrolments", "", "node-1")?;
    eventually("it is there again", || uids(&api, "node-1").is_some()).await?;
    let mut other: Value = api.get("nodeenrolments", "", "node-1").expect("it is there");
    other["status"]["served"] = json!([]);
    api.apply(other)?;
    eventually("it says what it said", || uids(&api, "node-1").is_some_and(|u| u == ["u-1"]))
        .await?;

    // More than an announcement holds is told, and the rest is announced.
    let all: Vec<String> = (0..501).map(|n| format!("u-{n:03}")).collect();
    let all: Vec<&str> = all.iter().map(String::as_str).collect();
    let error = followed.board.announce(&served(&all), 2, now()).unwrap_err();
    assert!(error.to_string().starts_with("501 pods are served on this node"), "{error}");
    eventually("500 are written", || uids(&api, "node-1").is_some_and(|u| u.len() == 500)).await?;
    Ok(())
}
