//! The agent's client against a real authority, and against ones that lie.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use rcgen::{CertificateParams, IsCa, Issuer as Signer, KeyPair};
use signet::{
    proto::istio_ca::{
        IstioCertificateRequest, IstioCertificateResponse,
        istio_certificate_service_server::{
            IstioCertificateService, IstioCertificateServiceServer,
        },
    },
    spiffe::{JwtSvid, SpiffeId, Svid, TrustDomain},
    svid::issuer::{
        IssueError, Issuer, JwtIssuer, JwtRequest, RemoteConfig, RemoteIssuer, SvidRequest,
    },
    trust::Trust,
};
use signet_lab::eventually;
use tokio_util::sync::CancellationToken;
use tonic::{
    Request, Response, Status,
    transport::{Identity, Server, ServerTlsConfig},
};

use crate::client::{Cluster, TIMEOUT};

fn domain() -> TrustDomain {
    TrustDomain::parse("cluster.local").expect("a trust domain")
}

fn web() -> SpiffeId {
    SpiffeId::parse("spiffe://cluster.local/ns/shop/sa/web").expect("an id")
}

/// An agent's client with its files in a directory.
struct Agent {
    dir: tempfile::TempDir,
    config: RemoteConfig,
}

impl Agent {
    fn new(address: std::net::SocketAddr, roots: &Path, token: &str) -> Result<Self> {
        let dir = tempfile::tempdir()?;
        fs::copy(roots, dir.path().join("roots.pem"))?;
        fs::write(dir.path().join("token"), token)?;
        let config = RemoteConfig {
            address: format!("https://{address}"),
            server_name: Some("localhost".into()),
            root_file: dir.path().join("roots.pem"),
            token_file: dir.path().join("token"),
            cluster_id: "Kubernetes".into(),
            ttl: Duration::from_secs(600),
        };
        Ok(Self { dir, config })
    }

    fn write(&self, name: &str, content: impl AsRef<[u8]>) -> Result<()> {
        fs::write(self.dir.path().join(name), content).context("writing")
    }

    fn client(&self) -> Result<(Arc<RemoteIssuer>, Arc<Trust>)> {
        let trust = Trust::new();
        let client = RemoteIssuer::new(self.config.clone(), domain(), trust.clone())?;
        Ok((Arc::new(client), trust))
    }
}

async fn issue(client: &RemoteIssuer, id: SpiffeId) -> Result<Svid, IssueError> {
    let request = SvidRequest::new(id)?;
    let chain = client.issue(&request).await?;
    request.finish(chain)
}

fn roots_of(cluster: &Cluster) -> PathBuf {
    cluster.api.directory().join("authority.pem")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn svids_tokens_and_the_bundle_come_from_the_authority() -> Result<()> {
    let cluster = Cluster::start(&["--refresh-hint", "1s"])?;
    let token = cluster.token("node-1")?;
    let agent = Agent::new(cluster.authority.address(), &roots_of(&cluster), &token)?;
    let (client, trust) = agent.client()?;
    let stop = CancellationToken::new();
    let following = tokio::spawn(client.clone().follow(stop.clone()));
    let svid = issue(&client, web()).await?;
    ensure!(svid.id == web() && svid.chain_der.len() == 2, "leaf and intermediate");
    let bundle = eventually("the bundle is known", TIMEOUT, || Ok(trust.bundle(&domain())))?;
    ensure!(bundle.certificates().len() == 1);

    let request = JwtRequest { id: web(), audiences: vec!["vault".into()], ttl: None };
    let token = client.issue_jwt(&request).await?;
    let keys = client.jwt_bundle().borrow().clone();
    ensure!(client.issues_jwts() && trust.jwt_bundle(&domain()).as_ref() == Some(&keys));
    let now = jiff::Timestamp::now();
    let check = |audience: &str| {
        JwtSvid::validate(&token, audience, |_| Some(keys.clone()), now).map(|svid| svid.id)
    };
    ensure!(check("vault")? == web() && check("other").is_err());
    // The same attestation as for certificates.
    let id = SpiffeId::parse("spiffe://cluster.local/ns/shop/sa/db")?;
    let refused = client.issue_jwt(&JwtRequest { id, ..request }).await.unwrap_err();
    ensure!(refused.to_string().contains("PermissionDenied"), "{refused}");

    stop.cancel();
    following.await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn files_are_read_again_and_errors_name_them() -> Result<()> {
    let cluster = Cluster::start(&[])?;
    let good = cluster.token("node-1")?;
    let agent = Agent::new(cluster.authority.address(), &roots_of(&cluster), "x")?;
    let (client, _) = agent.client()?;
    let error = issue(&client, web()).await.unwrap_err().to_string();
    ensure!(error.contains("Unauthenticated"), "{error}");
    agent.write("token", &good)?;
    issue(&client, web()).await?;
    let error = issue(&client, SpiffeId::parse("spiffe://cluster.local/ns/shop/sa/db")?).await;
    ensure!(error.unwrap_err().to_string().contains("no pod of"));

    // Another root is pinned: nobody is believed until the right one is back.
    let stranger = KeyPair::generate()?;
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    let other = params.self_signed(&stranger)?.pem();
    agent.write("roots.pem", other)?;
    let error = issue(&client, web()).await.unwrap_err().to_string();
    ensure!(error.contains("does not answer") && error.contains("certificate"), "{error}");
    agent.write("roots.pem", "garbage")?;
    let error = issue(&client, web()).await.unwrap_err().to_string();
    ensure!(error.contains("caRootFile") && error.contains("roots.pem"), "{error}");
    fs::copy(roots_of(&cluster), agent.dir.path().join("roots.pem"))?;
    issue(&client, web()).await?;

    // Another name than the one in its certificate.
    let named = RemoteConfig { server_name: Some("vault.example".into()), ..agent.config.clone() };
    let client = RemoteIssuer::new(named, domain(), Trust::new())?;
    ensure!(issue(&client, web()).await.unwrap_err().to_string().contains("does not answer"));
    let missing = RemoteConfig { token_file: "/no/such/token".into(), ..agent.config.clone() };
    let error = RemoteIssuer::new(missing, domain(), Trust::new()).unwrap_err().to_string();
    ensure!(error.contains("caTokenFile") && error.contains("/no/such/token"), "{error}");
    let plain = RemoteConfig { address: "http://localhost:1".into(), ..agent.config.clone() };
    let error = RemoteIssuer::new(plain, domain(), Trust::new()).unwrap_err().to_string();
    ensure!(error.contains("caAddress") && error.contains("https://"), "{error}");
    Ok(())
}

/// A server of Istio's API alone, which answers for whom it likes.
struct Liar {
    /// Signs the leaf.
    signer: Signer<'static, KeyPair>,
    certificate: String,
    /// The identity in the leaf; `None`: the one asked for.
    answers: Option<String>,
    /// The last element.
    roots: String,
}

#[tonic::async_trait]
impl IstioCertificateService for Liar {
    async fn create_certificate(
        &self,
        request: Request<IstioCertificateRequest>,
    ) -> Result<Response<IstioCertificateResponse>, Status> {
        let failed = |e: rcgen::Error| Status::internal(e.to_string());
        let csr = request.into_inner().csr;
        let mut csr = rcgen::CertificateSigningRequestParams::from_pem(&csr).map_err(failed)?;
        if let Some(id) = &self.answers {
            let uri = id.as_str().try_into().map_err(failed)?;
            csr.params.subject_alt_names = vec![rcgen::SanType::URI(uri)];
        }
        csr.params.key_usages = vec![rcgen::KeyUsagePurpose::DigitalSignature];
        let leaf = csr.signed_by(&self.signer).map_err(failed)?.pem();
        let cert_chain = vec![leaf, self.certificate.clone(), self.roots.clone()];
        Ok(Response::new(IstioCertificateResponse { cert_chain }))
    }
}

/// A root for the trust domain: its certificate and key.
fn root() -> Result<(String, Signer<'static, KeyPair>)> {
    let key = KeyPair::generate()?;
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    params.key_usages = vec![rcgen::KeyUsagePurpose::KeyCertSign];
    let certificate = params.self_signed(&key)?;
    Ok((certificate.pem(), Signer::from_ca_cert_pem(&certificate.pem(), key)?))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_istio_server_is_enough_but_its_answer_is_held_against_the_request() -> Result<()> {
    let (mesh_root, _) = root()?;
    for (what, answers, roots, says) in [
        ("honest", None, None, None),
        ("another identity", Some("spiffe://cluster.local/ns/shop/sa/admin"), None, Some("admin")),
        (
            "another trust domain",
            Some("spiffe://other/ns/shop/sa/web"),
            None,
            Some("does not lead"),
        ),
        ("roots that did not sign", None, Some(mesh_root), Some("does not lead")),
        ("no roots", None, Some(String::new()), Some("roots")),
    ] {
        let (certificate, signer) = root()?;
        let server_key = KeyPair::generate()?;
        let server = CertificateParams::new(vec!["localhost".to_owned()])?
            .signed_by(&server_key, &signer)?
            .pem();
        let liar = Liar {
            signer,
            certificate: certificate.clone(),
            answers: answers.map(str::to_owned),
            roots: roots.unwrap_or_else(|| certificate.clone()),
        };
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
        let address = listener.local_addr()?;
        let identity = Identity::from_pem(server, server_key.serialize_pem());
        let serving = Server::builder()
            .tls_config(ServerTlsConfig::new().identity(identity))?
            .add_service(IstioCertificateServiceServer::new(liar))
            .serve_with_incoming(tokio_stream::wrappers::TcpListenerStream::new(listener));
        let serving = tokio::spawn(serving);

        let pinned = tempfile::NamedTempFile::new()?;
        fs::write(pinned.path(), &certificate)?;
        let agent = Agent::new(address, pinned.path(), "token")?;
        let (client, trust) = agent.client()?;
        let stop = CancellationToken::new();
        tokio::spawn(client.clone().follow(stop.clone()));
        eventually("it is known to have Istio's API only", TIMEOUT, || {
            Ok((!client.issues_jwts()).then_some(()))
        })?;
        match (issue(&client, web()).await, says) {
            (Ok(svid), None) => {
                ensure!(svid.id == web(), "{what}");
                ensure!(trust.bundle(&domain()).is_some(), "{what}: its roots are the bundle");
            }
            (Err(error), Some(says)) => {
                ensure!(error.to_string().contains(says), "{what}: {error}")
            }
            (Ok(_), Some(_)) => anyhow::bail!("{what}: believed"),
            (Err(error), None) => return Err(error).context(what),
        }
        stop.cancel();
        serving.abort();
    }
    Ok(())
}
