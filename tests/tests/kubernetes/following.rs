//! What is followed, and what becomes of it.

use anyhow::Result;
use serde_json::json;
use signet::{
    cluster::{
        model::Override,
        source::{ClusterSource as _, WatchState},
    },
    config::values::Enforcement,
};

use super::{Followed, actions, namespace, pod, policy};

#[tokio::test(flavor = "multi_thread")]
async fn a_cluster_is_read_whole_and_followed() -> Result<()> {
    let followed = Followed::start()?;
    let world = followed.synced().await?;
    assert!(world.pods.is_empty() && world.namespaces.is_empty());
    assert_eq!(world.enforcement, Override::Absent);
    let api = followed.api.clone();

    api.apply(json!({
        "apiVersion": "v1", "kind": "Node", "metadata": {"name": "node-1"},
        "spec": {"podCIDRs": ["10.42.1.0/24"]},
        "status": {"addresses": [{"type": "InternalIP", "address": "192.0.2.1"}]},
    }))?;
    api.apply(namespace("shop", "strict"))?;
    api.apply(pod("web", "u-1", "node-1", "10.42.1.5"))?;
    api.apply(pod("db", "u-2", "node-2", "10.42.2.5"))?;
    api.apply(json!({
        "apiVersion": "v1", "kind": "Service", "metadata": {"name": "db", "namespace": "shop"},
        "spec": {"clusterIPs": ["10.96.0.9"], "ports": [{"name": "sql", "port": 5432}]},
    }))?;
    api.apply(json!({
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
        "metadata": {"name": "db-1", "namespace": "shop",
            "labels": {"kubernetes.io/service-name": "db"}},
        "ports": [{"name": "sql", "port": 5432}], "endpoints": [{"addresses": ["10.42.2.5"]}],
    }))?;
    api.service_account("shop", "web")?;
    api.apply(policy("callers", "Allow"))?;
    let world = followed
        .wait("all of it", |world| {
            world.pods.len() == 2
                && world.service_accounts.len() == 1
                && world.policies.policies.len() == 1
                && world.services.values().any(|s| !s.ports[0].endpoints.is_empty())
        })
        .await?;
    assert_eq!(world.pods["u-1"].mode, world.namespaces["shop"].mode);
    assert_eq!(world.pods["u-1"].mode as u8, 3, "strict");
    assert_eq!(world.pods_by_ip.len(), 2);
    assert_eq!(world.nodes["node-1"].len(), 1);
    assert_eq!(world.ranges.pods.len(), 1);
    assert_eq!(world.problems, []);

    // A label changes modes; a pod that goes is gone; a pod is bound here: from one watch to
    // the other, without a moment of absence.
    api.apply(namespace("shop", "observe"))?;
    followed.wait("observe", |world| world.pods["u-1"].mode as u8 == 1).await?;
    api.delete("pods", "shop", "db")?;
    followed.wait("one pod", |world| world.pods.len() == 1).await?;
    api.apply(json!({"apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": "new", "namespace": "shop", "uid": "u-3"}, "spec": {}}))?;
    followed
        .wait("an unbound pod", |w| w.pods.get("u-3").is_some_and(|p| p.node.is_none()))
        .await?;
    api.apply(pod("new", "u-3", "node-1", "10.42.1.6"))?;
    followed.wait("a bound pod", |w| w.pods.get("u-3").is_some_and(|p| p.node.is_some())).await?;
    // Under the same name another one.
    api.apply(pod("new", "u-4", "node-1", "10.42.1.7"))?;
    followed
        .wait("the new one", |w| w.pods.contains_key("u-4") && !w.pods.contains_key("u-3"))
        .await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn more_objects_than_a_page_holds() -> Result<()> {
    let api = signet_lab::api_server::ApiServer::start()?;
    api.apply(namespace("shop", "observe"))?;
    for n in 0..1100u32 {
        let ip = format!("10.42.{}.{}", n / 200, n % 200 + 1);
        api.apply(pod(&format!("p-{n}"), &format!("u-{n}"), "node-2", &ip))?;
    }
    let followed = Followed::of(std::sync::Arc::new(api), "node-1")?;
    let world = followed.synced().await?;
    assert_eq!(world.pods.len(), 1100);
    assert_eq!(followed.api.requests()["GET pods"], 4, "one page for here, three for elsewhere");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn kinds_that_are_installed_later_are_noticed() -> Result<()> {
    let followed = Followed::start()?;
    let api = followed.api.clone();
    followed.synced().await?;
    let istio = followed
        .wait_watch("AuthorizationPolicy", "absence", |w| w.state == WatchState::Absent)
        .await?;
    assert_eq!((istio.objects, istio.error), (0, None));

    api.apply(namespace("shop", "strict"))?;
    api.install("authorizationpolicies")?;
    api.apply(json!({
        "apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy",
        "metadata": {"name": "deny-all", "namespace": "shop"}, "spec": {},
    }))?;
    followed.wait("Istio's policy", |world| world.policies.policies.len() == 1).await?;
    followed.wait_watch("AuthorizationPolicy", "a list", |w| w.state == WatchState::Listed).await?;

    api.install("peerauthentications")?;
    api.apply(json!({
        "apiVersion": "security.istio.io/v1", "kind": "PeerAuthentication",
        "metadata": {"name": "p", "namespace": "shop"}, "spec": {"mtls": {"mode": "STRICT"}},
    }))?;
    followed.wait("a PeerAuthentication", |w| w.peer_authentications.len() == 1).await?;

    // Its removal is noticed too, at the second 404.
    api.uninstall("authorizationpolicies")?;
    followed.wait("no policy", |world| world.policies.policies.is_empty()).await?;
    followed
        .wait_watch("AuthorizationPolicy", "absence", |w| w.state == WatchState::Absent)
        .await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bad_object_is_reported_and_stops_no_other() -> Result<()> {
    let followed = Followed::start()?;
    let api = followed.api.clone();
    api.apply(namespace("shop", "strict"))?;
    api.apply(policy("callers", "Deny"))?;
    followed.wait("the policy", |world| actions(world) == ["callers Deny"]).await?;

    let mut bad = policy("callers", "Allow");
    bad["spec"]["ingres"] = json!([]);
    api.apply(bad)?;
    let world = followed.wait("a problem", |world| !world.problems.is_empty()).await?;
    assert_eq!(actions(&world), ["callers Deny"]);
    assert_eq!(world.problems[0].subject, "IdentityPolicy shop/callers");
    assert_eq!(
        world.problems[0].message,
        "spec.ingres: unknown field; did you mean ingress?; what it said before stays in force"
    );
    api.apply(policy("other", "Audit"))?;
    followed.wait("the other", |world| actions(world) == ["callers Deny", "other Audit"]).await?;
    let facts = followed.wait_watch("IdentityPolicy", "a fault", |w| w.faulty == 1).await?;
    assert_eq!((facts.objects, facts.error), (2, None));

    api.apply(policy("callers", "Allow"))?;
    let world = followed
        .wait("it is valid", |world| actions(world) == ["callers Allow", "other Audit"])
        .await?;
    assert_eq!(world.problems, []);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn the_override_of_enforcement_is_one_config_map() -> Result<()> {
    let followed = Followed::start()?;
    let api = followed.api.clone();
    followed.synced().await?;
    let config_map = |namespace: &str, word: &str| {
        json!({
            "apiVersion": "v1", "kind": "ConfigMap",
            "metadata": {"name": "signet-enforcement", "namespace": namespace},
            "data": {"enforcement": word},
        })
    };
    // The same name elsewhere means nothing.
    api.apply(config_map("shop", "off"))?;
    let begin = std::time::Instant::now();
    api.apply(config_map("signet-system", "audit"))?;
    let world = followed.wait("audit", |world| world.enforcement != Override::Absent).await?;
    assert_eq!(world.enforcement, Override::Is(Enforcement::Audit));
    println!("applied after {:?}", begin.elapsed());
    // What cannot be read keeps the last word.
    api.apply(config_map("signet-system", "never"))?;
    let world = followed.wait("a problem", |world| !world.problems.is_empty()).await?;
    assert_eq!(world.enforcement, Override::Is(Enforcement::Audit));
    api.delete("configmaps", "signet-system", "signet-enforcement")?;
    followed.wait("no override", |world| world.enforcement == Override::Absent).await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn without_access_it_does_not_begin() -> Result<()> {
    let api = signet_lab::api_server::ApiServer::start()?;
    let path = api.directory().join("broken");
    std::fs::write(&path, "clusters: 7")?;
    let common = signet::cluster::source::SourceParams::new(signet::spiffe::TrustDomain::parse(
        "cluster.local",
    )?);
    let mut params = signet::cluster::kubernetes::KubernetesParams {
        common,
        node: "node-1".into(),
        namespace: None,
        kubeconfig: Some(path.clone()),
        watch_timeout: super::WATCH_TIMEOUT,
    };
    let error = signet::cluster::kubernetes::KubernetesSource::start(params.clone()).unwrap_err();
    let text = error.to_string();
    assert!(
        text.contains("no access to an API server") && text.contains(&*path.to_string_lossy()),
        "{text}"
    );
    // The control: with a good one it does, and says where.
    params.kubeconfig = Some(api.kubeconfig());
    let (source, _board) = signet::cluster::kubernetes::KubernetesSource::start(params)?;
    assert_eq!((source.name(), source.location()), ("kubernetes", api.url()));
    Ok(())
}
