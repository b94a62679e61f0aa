//! Replicas that share a store.

use std::{collections::BTreeSet, sync::Arc};

use anyhow::{Result, ensure};
use signet::{
    api_server::ApiServer as Client,
    authority::store::{SecretStore, open_or_create},
    config::authority::ObjectPath,
    spiffe::TrustDomain,
};
use signet_lab::api_server::ApiServer;

use crate::client::{Call, channel, populate, replica};

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn three_that_start_at_once_on_an_empty_store_agree_a_hundred_times() -> Result<()> {
    let api = ApiServer::start()?;
    let domain = TrustDomain::parse("cluster.local")?;
    let kubeconfig = api.kubeconfig();
    let mut conflicts = 0;
    for round in 0..100 {
        let name = ObjectPath { namespace: "signet-system".into(), name: format!("root-{round}") };
        let start = Arc::new(tokio::sync::Barrier::new(3));
        let replicas: Vec<_> = (0..3)
            .map(|_| {
                let (name, start) = (name.clone(), start.clone());
                let (kubeconfig, domain) = (kubeconfig.clone(), domain.clone());
                tokio::spawn(async move {
                    let client = Client::connect(Some(&kubeconfig)).await?;
                    let store = SecretStore::new(client, name);
                    start.wait().await;
                    let now = jiff::Timestamp::now();
                    let (state, _) = open_or_create(&store, &domain, false, now).await?;
                    anyhow::Ok((state.signing().to_owned(), state.certificates()?))
                })
            })
            .collect();
        let mut roots = BTreeSet::new();
        for replica in replicas {
            let (signing, certificates) = replica.await??;
            ensure!(certificates.len() == 1);
            roots.insert(signing);
        }
        ensure!(roots.len() == 1, "round {round}: {roots:?}");
        conflicts = api.requests().get("POST secrets").copied().unwrap_or_default() - round - 1;
    }
    // The control: they did race. Without it the test would show nothing.
    ensure!(conflicts > 0, "no replica ever lost a race");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_certificate_of_one_replica_is_good_at_the_others() -> Result<()> {
    let api = ApiServer::start()?;
    populate(&api)?;
    let replicas =
        [replica(&api, "one", &[])?, replica(&api, "two", &[])?, replica(&api, "three", &[])?];
    let token = api.token(
        "signet-system",
        "signet-agent",
        "signet-authority",
        Some("agent-node-1"),
        std::time::Duration::from_secs(600),
    )?;
    let mut intermediates = BTreeSet::new();
    let mut roots = BTreeSet::new();
    for replica in &replicas {
        // Each is reached by the bundle that another one wrote.
        let channel = channel(replica, &api.directory().join("two.pem")).await?;
        let chain = Call::good(&token).make(&channel).await?;
        intermediates.insert(chain[1].clone());
        roots.insert(chain[2].clone());
    }
    ensure!((intermediates.len(), roots.len()) == (3, 1), "an intermediate each, one root");
    Ok(())
}
