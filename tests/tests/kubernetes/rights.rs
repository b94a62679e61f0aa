//! The shipped roles allow what the agent does, and nothing that it does not: each right taken
//! away is missed.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::json;
use signet::{
    cluster::{
        enrolment::EnrolmentBoard as _,
        source::{ClusterSource as _, WatchState},
    },
    viewer::callers::{AUDIENCE, Callers},
};
use signet_lab::api_server::{ApiServer, Right};

use super::{Followed, TIMEOUT, namespace, pod, policy};

const SYSTEM: &str = "signet-system";
const ACCOUNT: &str = "signet-agent";
const USER: &str = "system:serviceaccount:signet-system:signet-agent";
/// The agent's own pod, which its token is bound to.
const POD: &str = "signet-agent-1";

/// A server with the shipped manifests, and everything installed that an agent watches.
fn shipped() -> Result<Arc<ApiServer>> {
    let api = ApiServer::start()?;
    api.ship(&["crds", "agent"])?;
    for plural in [
        "servicecidrs",
        "ippools",
        "authorizationpolicies",
        "peerauthentications",
        "requestauthentications",
    ] {
        api.install(plural)?;
    }
    api.apply(json!({"kind": "Node", "metadata": {"name": "node-1"}}))?;
    api.apply(namespace("shop", "strict"))?;
    api.apply(pod("web", "u-1", "node-1", "10.0.0.1"))?;
    api.apply(policy("callers", "Allow"))?;
    let mut everywhere = policy("callers", "Audit");
    everywhere["kind"] = "ClusterIdentityPolicy".into();
    everywhere["metadata"] = json!({"name": "callers"});
    api.apply(everywhere)?;
    api.pod(SYSTEM, POD, ACCOUNT, "node-1")?;
    Ok(Arc::new(api))
}

/// An agent's source with its own token.
fn followed(api: &Arc<ApiServer>) -> Result<Followed> {
    let kubeconfig = api.account_kubeconfig(SYSTEM, ACCOUNT, Some(POD))?;
    Followed::with(api.clone(), "node-1", kubeconfig)
}

/// How often the event on the faulty namespace was told, as its object says.
fn told(api: &ApiServer) -> u64 {
    let events = api.list("events");
    let about = events.iter().filter(|event| event["regarding"]["name"] == "odd");
    about.map(|event| event["series"]["count"].as_u64().unwrap_or(1)).sum()
}

/// What an agent does not get done. Everything is waited for until it is done, or refused.
async fn losses(api: &Arc<ApiServer>) -> Result<Vec<String>> {
    let mut followed = followed(api)?;
    let kubeconfig = api.account_kubeconfig(SYSTEM, ACCOUNT, Some(POD))?;
    let reviewer = signet::api_server::ApiServer::connect(Some(&kubeconfig)).await?;
    let callers = Callers::new(reviewer);
    let viewer = api.token(SYSTEM, "signet-viewer", AUDIENCE, None, TIMEOUT * 10)?;
    let served = BTreeMap::from([("u-1".into(), "shop/web".into())]);
    let deadline = tokio::time::Instant::now() + TIMEOUT;
    let refused = |verb: &str, resource: &str| {
        api.asked().iter().any(|asked| {
            asked.user == USER && asked.verb == verb && asked.resource == resource && !asked.allowed
        })
    };
    loop {
        let mut lost = Vec::new();
        let mut waits = Vec::new();
        // Every watch lists, and then watches.
        for watch in followed.source.watches() {
            let is_there = watch.state == WatchState::Listed;
            match watch.error {
                Some(error) => lost.push(format!("watch {}: {error}", watch.kind)),
                None if !is_there => waits.push(format!("{} is not listed", watch.kind)),
                None => {}
            }
        }
        let watched: Vec<_> = followed.source.watches().iter().map(|watch| watch.kind).collect();
        let taken = api.asked();
        let watches = taken.iter().filter(|asked| asked.user == USER && asked.verb == "watch");
        // Pods and ConfigMaps are watched twice each.
        if watches.count() + 2 < watched.len() {
            waits.push("some are not watched yet".to_owned());
        }
        // The node announces its pods.
        if let Err(error) = followed.board.announce(&served, 1, jiff::Timestamp::now()) {
            lost.push(error.to_string());
        } else if api.get("nodeenrolments", "", "node-1").is_none() {
            waits.push("no NodeEnrolment".to_owned());
        }
        // An event is told, and when it happens again the same one is counted up.
        let is_refused = refused("create", "events") || refused("patch", "events");
        match told(api) {
            0 if refused("create", "events") => lost.push("no event is told".to_owned()),
            1 if refused("patch", "events") => lost.push("the event is not told again".to_owned()),
            count if count < 2 && !is_refused => {
                waits.push(format!("the event was told {count} times"));
                let modes = if count == 0 { ["strict", "strikt"] } else { ["strikt", "strict"] };
                for mode in modes {
                    api.apply(namespace("odd", mode))?;
                    tokio::time::sleep(Duration::from_millis(1300)).await;
                }
            }
            _ => {}
        }
        // Policies say whether they hold.
        for (plural, namespace) in [("identitypolicies", "shop"), ("clusteridentitypolicies", "")] {
            let status = api.get(plural, namespace, "callers").unwrap_or_default();
            if refused("patch", &format!("{plural}/status")) {
                lost.push(format!("cannot patch resource \"{plural}/status\""));
            } else if !status["status"]["conditions"].is_array() {
                waits.push(format!("no conditions on {plural}"));
            }
        }
        // Who looks from outside, and may, is let in.
        if let Err(error) = callers.check(&viewer).await {
            lost.push(error.to_string());
        }
        // A loss stays one: nobody gives the right back.
        if waits.is_empty() || !lost.is_empty() {
            return Ok(lost);
        }
        ensure!(tokio::time::Instant::now() < deadline, "{waits:?}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn each_right_of_the_agents_roles_is_needed() -> Result<()> {
    // The control: nothing is missed under the roles as they are.
    let api = shipped()?;
    let lost = losses(&api).await?;
    ensure!(lost.is_empty(), "{lost:#?}");
    let rights = api.rights_of(SYSTEM, ACCOUNT);
    ensure!(rights.len() > 30, "{rights:?}");
    let asked = api.asked();
    let refused: Vec<_> = asked.iter().filter(|a| a.user == USER && !a.allowed).collect();
    ensure!(refused.is_empty(), "asked for, and not in the roles: {refused:?}");

    let mut missed = tokio::task::JoinSet::new();
    let mut left = rights.into_iter();
    loop {
        while missed.len() < 8
            && let Some(right) = left.next()
        {
            missed.spawn(async move {
                let outcome = without(&right).await;
                outcome.with_context(|| format!("without {} {}", right.verb, right.resource))
            });
        }
        match missed.join_next().await {
            Some(outcome) => outcome??,
            None => return Ok(()),
        }
    }
}

/// What takes Signet off the nodes needs nothing of the API: its account may do nothing there,
/// and its pods are given no token.
#[tokio::test(flavor = "multi_thread")]
async fn what_uninstalls_has_no_right_at_all() -> Result<()> {
    const ACCOUNT: &str = "signet-uninstall";
    let api = shipped()?;
    api.ship(&["uninstall"])?;
    let account = api.get("serviceaccounts", SYSTEM, ACCOUNT).context("no account")?;
    let set = api.get("daemonsets", SYSTEM, ACCOUNT).context("no DaemonSet")?;
    let spec = &set["spec"]["template"]["spec"];
    ensure!(spec["serviceAccountName"] == ACCOUNT, "{spec}");
    ensure!(
        account["automountServiceAccountToken"] == false
            && spec["automountServiceAccountToken"] != true,
        "{account} {spec}"
    );
    ensure!(api.rights_of(SYSTEM, ACCOUNT).is_empty(), "{:?}", api.rights_of(SYSTEM, ACCOUNT));

    // Whoever takes a token from it all the same is refused everything; the control is above:
    // the agents' account is refused nothing of this.
    api.pod(SYSTEM, "signet-uninstall-1", ACCOUNT, "node-1")?;
    let kubeconfig = api.account_kubeconfig(SYSTEM, ACCOUNT, Some("signet-uninstall-1"))?;
    let followed = Followed::with(api.clone(), "node-1", kubeconfig)?;
    let deadline = tokio::time::Instant::now() + TIMEOUT;
    loop {
        let watches = followed.source.watches().into_iter();
        let is_refused =
            |error: &dyn std::fmt::Display| error.to_string().contains("cannot list resource");
        let others: Vec<String> = watches
            .filter(|watch| !watch.error.as_ref().is_some_and(|error| is_refused(error)))
            .map(|watch| watch.kind.to_string())
            .collect();
        if others.is_empty() {
            break;
        }
        ensure!(tokio::time::Instant::now() < deadline, "not refused: {others:?}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let user = format!("system:serviceaccount:{SYSTEM}:{ACCOUNT}");
    let asked = api.asked();
    let mut by_it = asked.iter().filter(|asked| asked.user == user).peekable();
    ensure!(by_it.peek().is_some() && by_it.all(|asked| !asked.allowed), "{asked:?}");
    Ok(())
}

/// The loss of a right is told, by its name where anything is said at all.
async fn without(right: &Right) -> Result<()> {
    let api = shipped()?;
    api.take_right(right)?;
    let lost = losses(&api).await?;
    let named = format!("cannot {} resource \"{}\"", right.verb, right.resource);
    match lost.as_slice() {
        [] => bail!("nothing is lost: the right is not needed"),
        [one, ..] if right.resource == "events" => {
            ensure!(one.contains("the event") || one.contains("no event"), "{lost:?}");
        }
        some => ensure!(some.iter().all(|loss| loss.contains(&named)), "{lost:?}"),
    }
    Ok(())
}
