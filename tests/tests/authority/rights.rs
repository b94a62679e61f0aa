//! The shipped roles allow what the authority does, and nothing that it does not: each right
//! taken away is missed.

use std::{path::PathBuf, thread, time::Duration};

use anyhow::{Context, Result, anyhow, bail, ensure};
use signet_lab::{
    api_server::{ApiServer, Right},
    authority::{self, Authority},
    eventually,
};

use super::{
    client::{Call, channel, populate},
    taint,
};

const SYSTEM: &str = "signet-system";
const ACCOUNT: &str = "signet-authority";
const POD: &str = "signet-authority-1";
const USER: &str = "system:serviceaccount:signet-system:signet-authority";

/// A server with the shipped manifests.
fn shipped() -> Result<ApiServer> {
    let api = ApiServer::start()?;
    api.ship(&["agent", "authority", "overlays/taint"])?;
    populate(&api)?;
    taint::agent_is_ready(&api, "node-1")?;
    api.pod(SYSTEM, POD, ACCOUNT, "node-1")?;
    Ok(api)
}

/// Everything that an authority does with its own token: it makes the root, publishes the
/// bundle, signs for a pod, taints the node without an agent, and begins a rotation. The error is what it does not get done.
async fn works(api: &ApiServer) -> Result<()> {
    let path = |p: PathBuf| p.display().to_string();
    let kubeconfig = path(api.account_kubeconfig(SYSTEM, ACCOUNT, Some(POD))?);
    let roots = api.directory().join("roots.pem");
    let store =
        ["--kubeconfig", &kubeconfig, "--store-secret", "signet-system/signet-authority-root"];
    let mut arguments: Vec<String> = store.iter().map(|flag| (*flag).to_owned()).collect();
    for flag in [
        "--taint-lease",
        "signet-system/signet-authority-leader",
        "--bundle-config-map",
        "signet-system/signet-ca-root",
        "--names",
        "localhost",
        "--bundle-file",
    ] {
        arguments.push(flag.into());
    }
    arguments.push(path(roots.clone()));
    let authority = Authority::start("authority", api.directory(), None, &arguments)?;
    let published = eventually("the bundle is published", Duration::from_secs(10), || {
        let map = api.get("configmaps", SYSTEM, "signet-ca-root").unwrap_or_default();
        if map["data"]["root-cert.pem"].is_string() {
            return Ok(Some(()));
        }
        bail!("{}", authority.said())
    });
    // What it says when it is refused is in its log.
    published?;
    let audience = "signet-authority";
    let token = api.token(
        SYSTEM,
        "signet-agent",
        audience,
        Some("agent-node-1"),
        Duration::from_secs(600),
    )?;
    let channel = channel(&authority, &roots).await.with_context(|| authority.said())?;
    if let Err(status) = Call::good(&token).make(&channel).await {
        bail!("{status:?}\n{}", authority.said());
    }
    eventually("node-2 is tainted", Duration::from_secs(10), || {
        if taint::is_tainted(api, "node-2") {
            return Ok(Some(()));
        }
        bail!("{}", authority.said())
    })?;
    ensure!(!taint::is_tainted(api, "node-1"), "the agent of node-1 is ready");
    let mut rotate = vec!["rotate-root", "--timeout", "1s"];
    rotate.extend(store);
    let answer = authority::command(&rotate)?;
    ensure!(
        answer.code() == 1 && answer.stdout.contains("node-1, node-2"),
        "{} {}",
        answer.stdout,
        answer.stderr
    );
    Ok(())
}

#[test]
fn each_right_of_the_authoritys_roles_is_needed() -> Result<()> {
    let api = shipped()?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(works(&api)).context("under the roles as they are")?;
    let asked = api.asked();
    let refused: Vec<_> = asked.iter().filter(|a| a.user == USER && !a.allowed).collect();
    ensure!(refused.is_empty(), "asked for, and not in the roles: {refused:?}");
    let rights = api.rights_of(SYSTEM, ACCOUNT);
    ensure!(rights.len() > 5, "{rights:?}");

    thread::scope(|scope| {
        let each: Vec<_> = rights.iter().map(|right| scope.spawn(|| without(right))).collect();
        for (right, outcome) in rights.iter().zip(each) {
            let outcome = outcome.join().map_err(|_| anyhow!("it panicked"))?;
            outcome.with_context(|| format!("without {} {}", right.verb, right.resource))?;
        }
        Ok(())
    })
}

fn without(right: &Right) -> Result<()> {
    let api = shipped()?;
    api.take_right(right)?;
    // Each waits in its own time.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let Err(loss) = runtime.block_on(works(&api)) else {
        bail!("nothing is lost: the right is not needed")
    };
    let named = format!("cannot {} resource \"{}\"", right.verb, right.resource);
    // In its log the quotes are escaped.
    let said = format!("{loss:#}").replace("\\\"", "\"");
    ensure!(said.contains(&named), "{said}");
    Ok(())
}
