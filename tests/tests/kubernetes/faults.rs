//! Everything that an API server does to a watch.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use anyhow::{Result, ensure};
use signet::cluster::source::{ClusterSource as _, WatchState};
use signet_lab::api_server::ApiServer;

use super::{Followed, actions, namespace, pod, policy};

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_said_before_everything_is_known() -> Result<()> {
    let api = Arc::new(ApiServer::start()?);
    api.apply(namespace("shop", "strict"))?;
    api.apply(pod("web", "u-1", "node-1", "10.0.0.1"))?;
    api.set_faults(|faults| faults.refusal = Some(429));
    let followed = Followed::of(api.clone(), "node-1")?;
    let facts =
        followed.wait_watch("Pod (this node)", "a failure", |watch| watch.errors > 1).await?;
    assert_eq!(facts.state, WatchState::Waiting);
    assert_eq!(facts.error.as_deref(), Some("the API server answers 429: too many requests"));
    let world = followed.worlds.borrow().clone();
    assert!(world.revision == 0 && !world.synced.pods && !world.synced.policies);

    api.set_faults(|faults| faults.refusal = None);
    let world = followed.synced().await?;
    assert_eq!(world.pods.len(), 1, "the first World has all of it");
    followed.wait_watch("Pod (this node)", "health", |watch| watch.error.is_none()).await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failed_list_changes_nothing_and_a_complete_empty_one_is_the_truth() -> Result<()> {
    let followed = Followed::start()?;
    let api = followed.api.clone();
    api.apply(namespace("shop", "strict"))?;
    api.apply(policy("callers", "Deny"))?;
    followed.wait("the policy", |world| actions(world) == ["callers Deny"]).await?;
    let before = followed.wait_watch("IdentityPolicy", "a list", |w| w.lists > 0).await?;

    // It must list anew and cannot; meanwhile the policy goes.
    api.set_down(true);
    api.forget_history();
    api.delete("identitypolicies", "shop", "callers")?;
    followed.wait_watch("IdentityPolicy", "failures", |w| w.errors >= before.errors + 3).await?;
    let world = followed.worlds.borrow().clone();
    assert_eq!(actions(&world), ["callers Deny"], "what was known stays");

    api.set_down(false);
    followed.wait("no policy", |world| world.policies.policies.is_empty()).await?;
    let after = followed.wait_watch("IdentityPolicy", "health", |w| w.error.is_none()).await?;
    assert!(after.lists > before.lists, "{before:?} {after:?}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stalled_watch_is_begun_anew() -> Result<()> {
    let followed = Followed::start()?;
    let api = followed.api.clone();
    api.apply(namespace("shop", "observe"))?;
    followed.wait("the namespace", |world| !world.namespaces.is_empty()).await?;
    let before = api.requests()["WATCH namespaces"];
    api.set_faults(|faults| faults.stalled = true);
    api.apply(namespace("shop", "strict"))?;
    // New watches stall as well: they are begun over and over.
    let deadline = tokio::time::Instant::now() + super::TIMEOUT;
    while api.requests()["WATCH namespaces"] < before + 3 {
        ensure!(tokio::time::Instant::now() < deadline, "nobody noticed the silence");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert_eq!(followed.worlds.borrow().namespaces["shop"].mode as u8, 1);
    api.set_faults(|faults| faults.stalled = false);
    followed.wait("strict", |world| world.namespaces["shop"].mode as u8 == 3).await?;
    Ok(())
}

/// Drops, forgotten versions, refusals, stalls and slow answers, one after the other, while
/// objects change: no World ever lacks what was there all the time.
#[tokio::test(flavor = "multi_thread")]
async fn no_fault_loses_or_invents_anything() -> Result<()> {
    let followed = Followed::start()?;
    let api = followed.api.clone();
    api.apply(namespace("shop", "strict"))?;
    api.apply(pod("web", "u-web", "node-1", "10.0.0.1"))?;
    api.apply(pod("db", "u-db", "node-2", "10.0.0.2"))?;
    api.apply(policy("constant", "Deny"))?;
    followed
        .wait("the beginning", |world| world.pods.len() == 2 && actions(world) == ["constant Deny"])
        .await?;

    let over = Arc::new(AtomicBool::new(false));
    let watcher = {
        let (mut worlds, over) = (followed.worlds.clone(), over.clone());
        tokio::spawn(async move {
            let mut seen = 0u32;
            while !over.load(Ordering::Relaxed) {
                if tokio::time::timeout(Duration::from_millis(100), worlds.changed()).await.is_err()
                {
                    continue;
                }
                let world = worlds.borrow_and_update().clone();
                seen += 1;
                let modes: Vec<u8> = ["u-web", "u-db"]
                    .iter()
                    .filter_map(|u| Some(world.pods.get(*u)?.mode as u8))
                    .collect();
                ensure!(modes == [3, 3], "revision {}: {modes:?}", world.revision);
                ensure!(
                    actions(&world).contains(&"constant Deny".to_owned()),
                    "revision {}: {:?}",
                    world.revision,
                    actions(&world)
                );
                ensure!(world.synced.pods && world.synced.policies, "it is synced no more");
            }
            Ok(seen)
        })
    };
    for round in 0..12u32 {
        api.apply(pod("churn", &format!("u-{round}"), "node-2", "10.0.0.3"))?;
        api.apply(policy("churn", if round % 2 == 0 { "Allow" } else { "Audit" }))?;
        match round % 6 {
            0 => api.drop_watches(),
            1 => {
                api.forget_history();
                api.drop_watches();
            }
            2 => api.set_faults(|faults| faults.refusal = Some(429)),
            3 => api.set_faults(|faults| faults.stalled = true),
            4 => api.set_faults(|faults| faults.delay = Duration::from_millis(500)),
            _ => api.set_down(true),
        }
        tokio::time::sleep(Duration::from_millis(700)).await;
        api.set_faults(|faults| *faults = Default::default());
    }
    // The positive control: after all that a change is still noticed, and nothing was lost.
    api.delete("pods", "shop", "churn")?;
    api.delete("identitypolicies", "shop", "churn")?;
    api.apply(policy("last", "Audit"))?;
    followed
        .wait("the last change", |world| {
            world.pods.len() == 2 && actions(world) == ["constant Deny", "last Audit"]
        })
        .await?;
    over.store(true, Ordering::Relaxed);
    let seen = watcher.await??;
    ensure!(seen > 5, "the watcher saw {seen} Worlds only");
    let errors: u64 = followed.source.watches().iter().map(|watch| watch.errors).sum();
    ensure!(errors > 10, "the faults were not felt: {errors} errors");
    Ok(())
}
