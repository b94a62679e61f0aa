//! `signet check`: what it says of a cluster that is whole, and of each thing that is missing.

use std::{path::Path, process::Command};

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use signet_lab::{
    api_server::{ApiServer, Right},
    process::{signet_binary, without_own_variables},
};

const SYSTEM: &str = "signet-system";

/// A server with everything that a cluster with Signet has.
fn whole() -> Result<ApiServer> {
    let api = ApiServer::start()?;
    api.ship(&["crds", "agent", "authority"])?;
    for (plural, name, status) in [
        ("daemonsets", "signet-agent", json!({"numberReady": 2, "desiredNumberScheduled": 2})),
        ("deployments", "signet-authority", json!({"readyReplicas": 3, "replicas": 3})),
    ] {
        let mut object = api.get(plural, SYSTEM, name).with_context(|| format!("no {plural}"))?;
        object["status"] = status;
        api.apply(object)?;
    }
    Ok(api)
}

/// The exit code, and the findings that are not `ok`, as `area check state: detail -> remedy`.
async fn check(arguments: &[&str], kubeconfig: &Path) -> Result<(Option<i32>, Vec<String>)> {
    let mut command = Command::new(signet_binary()?);
    without_own_variables(&mut command);
    command.arg("check").args(arguments).args(["-o", "json"]).env("SIGNET_NODE", "node-1");
    command.env("SIGNET_KUBECONFIG", kubeconfig).env("KUBECONFIG", kubeconfig);
    command.env("SIGNET_NAMESPACE", SYSTEM);
    let output = tokio::task::spawn_blocking(move || command.output()).await??;
    let errors = String::from_utf8_lossy(&output.stderr).into_owned();
    let json: Value = serde_json::from_slice(&output.stdout).with_context(|| errors)?;
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let findings = json["findings"].as_array().context("no findings")?;
    let notable = findings.iter().filter(|finding| finding["state"] != "ok").map(|f| {
        let [area, check, state] = ["area", "check", "state"].map(|key| text(&f[key]));
        format!("{area} {check} {state}: {} -> {}", text(&f["detail"]), text(&f["remedy"]))
    });
    Ok((output.status.code(), notable.collect()))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cluster_is_checked_from_anywhere() -> Result<()> {
    let api = whole()?;
    let admin = api.kubeconfig();
    let (code, notable) = check(&["cluster"], &admin).await?;
    ensure!(code == Some(0) && notable.is_empty(), "{code:?} {notable:#?}");

    // Somebody without any right sees what may be seen, and is told the rest.
    api.service_account("people", "mallory")?;
    let mallory = api.account_kubeconfig("people", "mallory", None)?;
    let (_, notable) = check(&["cluster"], &mallory).await?;
    let looking = notable.iter().find(|line| line.starts_with("api looking warning"));
    ensure!(
        looking.is_some_and(|line| {
            line.contains("get pods/portforward in signet-system")
                && line.contains("create serviceaccounts/token signet-system/signet-viewer")
                && line.contains("signet-flows")
        }),
        "{notable:#?}"
    );
    ensure!(notable.iter().any(|line| line.starts_with("api rights skipped")), "{notable:#?}");

    // An agent that is not ready, a kind that is not there, a right that is taken.
    let mut set = api.get("daemonsets", SYSTEM, "signet-agent").context("no DaemonSet")?;
    set["status"]["numberReady"] = 1.into();
    api.apply(set)?;
    let (code, notable) = check(&["cluster"], &admin).await?;
    ensure!(
        code == Some(1) && notable.len() == 1 && notable[0].contains("agents failed: 1 of 2 are"),
        "{code:?} {notable:#?}"
    );
    api.delete("clusterrolebindings", "", "signet-viewer")?;
    let (code, notable) = check(&["cluster"], &admin).await?;
    ensure!(
        code == Some(5) && notable.iter().any(|line| line.contains("viewer.yaml")),
        "{code:?} {notable:#?}"
    );
    api.set_down(true);
    let (code, notable) = check(&["cluster"], &admin).await?;
    ensure!(
        code == Some(4) && notable.len() == 1 && notable[0].starts_with("api server failed"),
        "{code:?} {notable:#?}"
    );
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_is_checked_with_the_agents_own_rights() -> Result<()> {
    let api = whole()?;
    let agent = api.account_kubeconfig(SYSTEM, "signet-agent", None)?;
    let of_api = |notable: Vec<String>| -> Vec<String> {
        notable.into_iter().filter(|line| line.starts_with("api ")).collect()
    };
    let (_, notable) = check(&[], &agent).await?;
    ensure!(of_api(notable.clone()).is_empty(), "{notable:#?}");

    let taken = api
        .rights_of(SYSTEM, "signet-agent")
        .into_iter()
        .find(|Right { verb, resource, .. }| verb == "watch" && resource == "services")
        .context("the agent may not watch services at all")?;
    api.take_right(&taken)?;
    let (_, notable) = check(&[], &agent).await?;
    let notable = of_api(notable);
    ensure!(
        notable.len() == 1
            && notable[0].contains("rights failed: this credential may not watch services ->")
            && notable[0].contains("rbac.yaml"),
        "{notable:#?}"
    );
    let stranger = api.directory().join("no-such-kubeconfig");
    let (_, notable) = check(&[], &stranger).await?;
    let notable = of_api(notable);
    ensure!(notable.len() == 1 && notable[0].contains("set kubeconfig"), "{notable:#?}");
    Ok(())
}
