//! Certificates a second: one authority, standalone, over gRPC with TLS, from this machine.

use std::{
    collections::BTreeMap,
    fs,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use prost_types::{Struct, Value, value::Kind};
use signet::proto::istio_ca::{
    IstioCertificateRequest, istio_certificate_service_client::IstioCertificateServiceClient,
};
use signet_lab::authority::{Authority, node_token};
use tonic::{
    metadata::{Ascii, MetadataValue},
    transport::{Certificate, Channel, ClientTlsConfig, Endpoint},
};

use crate::results::{Results, SIGNET};

/// Requests in flight.
const IN_FLIGHT: usize = 16;
/// Certificate requests that are made beforehand and used in turn.
const REQUESTS: usize = 64;
const IDENTITY: &str = "spiffe://cluster.local/ns/shop/sa/web";

/// A cluster of one pod: the authority signs for nobody else.
const CLUSTER: &str = "\
apiVersion: v1
kind: Namespace
metadata: {name: shop}
---
apiVersion: v1
kind: Pod
metadata: {name: web, namespace: shop, uid: uid-web}
spec: {nodeName: node-1, serviceAccountName: web, containers: [{name: c, image: x}]}
status: {phase: Running, podIP: 10.0.0.1, podIPs: [{ip: 10.0.0.1}]}
";

pub fn run(quick: bool, results: &mut Results) -> Result<()> {
    let directory = tempfile::tempdir()?;
    let at = |name: &str| directory.path().join(name);
    fs::create_dir(at("cluster"))?;
    fs::write(at("cluster").join("cluster.yaml"), CLUSTER)?;
    let token = node_token(&at("tokens"), "node-1")?;
    let flags: Vec<String> = [
        ("--names", "localhost".to_owned()),
        ("--store-dir", at("store").display().to_string()),
        ("--cluster-dir", at("cluster").display().to_string()),
        ("--node-token-dir", at("tokens").display().to_string()),
        ("--bundle-file", at("bundle.pem").display().to_string()),
        ("--requests-per-second", "100000".to_owned()),
        ("--request-burst", "100000".to_owned()),
        ("--log-level", "info,signet::audit=off".to_owned()),
    ]
    .into_iter()
    .flat_map(|(flag, value)| [flag.to_owned(), value])
    .collect();
    let authority = Authority::start("authority", directory.path(), None, &flags)?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let (rounds, time) =
        if quick { (1, Duration::from_secs(1)) } else { (3, Duration::from_secs(5)) };
    for round in 1..=rounds {
        let signed = runtime.block_on(load(&authority, &at("bundle.pem"), &token, time))?;
        results.add("certificates", SIGNET, round, signed, "1/s");
    }
    Ok(())
}

/// Certificates a second under load for `time`.
async fn load(authority: &Authority, roots: &Path, token: &str, time: Duration) -> Result<f64> {
    let channel = channel(authority, roots).await?;
    let requests: Arc<Vec<String>> =
        Arc::new((0..REQUESTS).map(|_| request()).collect::<Result<_>>()?);
    let bearer: MetadataValue<Ascii> = format!("Bearer {token}").parse()?;
    let signed = Arc::new(AtomicU64::new(0));
    let begin = Instant::now();
    let mut tasks = tokio::task::JoinSet::new();
    for first in 0..IN_FLIGHT {
        let (channel, requests, bearer) = (channel.clone(), requests.clone(), bearer.clone());
        let signed = signed.clone();
        tasks.spawn(async move {
            let mut client = IstioCertificateServiceClient::new(channel);
            let mut next = first;
            while begin.elapsed() < time {
                let mut request = tonic::Request::new(message(&requests[next % REQUESTS]));
                request.metadata_mut().insert("authorization", bearer.clone());
                let chain = client.create_certificate(request).await?.into_inner().cert_chain;
                ensure!(chain.len() >= 2, "a chain of {}", chain.len());
                signed.fetch_add(1, Ordering::Relaxed);
                next += 1;
            }
            anyhow::Ok(())
        });
    }
    while let Some(done) = tasks.join_next().await {
        done.context("a client ended")??;
    }
    Ok(signed.load(Ordering::Relaxed) as f64 / begin.elapsed().as_secs_f64())
}

async fn channel(authority: &Authority, roots: &Path) -> Result<Channel> {
    let pem = fs::read(roots).with_context(|| roots.display().to_string())?;
    let tls =
        ClientTlsConfig::new().ca_certificate(Certificate::from_pem(pem)).domain_name("localhost");
    Endpoint::from_shared(format!("https://{}", authority.address()))?
        .tls_config(tls)?
        .connect()
        .await
        .context("cannot connect to the authority")
}

/// A certificate request with a fresh ECDSA P-256 key, PEM.
fn request() -> Result<String> {
    let key = rcgen::KeyPair::generate()?;
    let mut params = rcgen::CertificateParams::default();
    params.distinguished_name = rcgen::DistinguishedName::new();
    params.subject_alt_names = vec![rcgen::SanType::URI(IDENTITY.try_into()?)];
    Ok(params.serialize_request(&key)?.pem()?)
}

fn message(csr: &str) -> IstioCertificateRequest {
    let identity = Value { kind: Some(Kind::StringValue(IDENTITY.to_owned())) };
    let fields = BTreeMap::from([("ImpersonatedIdentity".to_owned(), identity)]);
    IstioCertificateRequest {
        csr: csr.to_owned(),
        validity_duration: 3600,
        metadata: Some(Struct { fields }),
    }
}
