//! Who may see flows on the observer's listener: by certificate or by token.

use std::{net::SocketAddr, path::Path, sync::Arc, time::Duration};

use anyhow::{Context, Result, ensure};
use rustls::{
    AlertDescription, ClientConfig, RootCertStore,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _},
};
use signet::{
    cluster::model::World,
    flow::{self, Limits, Sinks},
    observer::{self, Observer, peers::Peers},
    spiffe::{Bundle, SpiffeId, TrustDomain},
    trust::Trust,
    viewer::{
        HubbleServer,
        callers::Callers,
        tls::{Files, Serving},
    },
};
use signet_lab::{
    api_server::ApiServer,
    forge::{Forger, Leaf},
    hubble::{
        Caller, Hubble,
        health::{HealthCheckRequest, health_check_response::ServingStatus},
        observer::{
            GetAgentEventsRequest, GetFlowsRequest, GetNamespacesRequest, GetNodesRequest,
            ServerStatusRequest,
        },
        peer::NotifyRequest,
    },
};
use tokio::io::AsyncReadExt as _;
use tonic::{Code, Status};

const AUDIENCE: &str = "signet.dev/observer";
const SYSTEM: &str = "signet-system";
const DOMAIN: &str = "cluster.local";
const NAME: &str = "node-6.hubble.test";
const RELAY: &str = "spiffe://cluster.local/ns/kube-system/sa/hubble-relay";
const OTHER: &str = "spiffe://cluster.local/ns/shop/sa/front";

/// A node's listener on loopback, with all that it is told by.
struct Node {
    address: SocketAddr,
    trust: Arc<Trust>,
    /// The mesh's own authority.
    mesh: Forger,
    /// Whose certificates nobody trusts.
    stranger: Forger,
    /// Whose certificate the listener has.
    server: Forger,
    _files: tempfile::TempDir,
}

fn text(path: &Path) -> Result<String> {
    std::fs::read_to_string(path).with_context(|| path.display().to_string())
}

impl Node {
    async fn start(api: Option<&ApiServer>) -> Result<Self> {
        let files = tempfile::tempdir()?;
        let [mesh, stranger, server] = ["mesh", "stranger", "server"].map(|name| {
            let directory = files.path().join(name);
            std::fs::create_dir(&directory)?;
            Forger::stranger(DOMAIN, &directory)
        });
        let (mesh, stranger, server) = (mesh?, stranger?, server?);
        let domain = TrustDomain::parse(DOMAIN)?;
        let trust = Trust::new();
        trust.set(domain.clone(), Bundle::from_pem(mesh.root().as_bytes())?);
        let pair = server.sign("serving", &Leaf { names: vec![NAME.into()], ..Leaf::of(&[]) })?;

        let (recorder, collector) = flow::start(Limits::default(), Sinks::default());
        tokio::spawn(collector.run());
        let log = recorder.log();
        let mut world = World::empty(domain);
        for (node, ip) in [("node-6", "10.0.0.6"), ("node-7", "10.0.0.7")] {
            world.nodes.insert(node.into(), vec![ip.parse()?]);
        }
        let (sender, worlds) = tokio::sync::watch::channel(Arc::new(world));
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
        let address = listener.local_addr()?;
        let peers = Peers::new(worlds, Some(address), "*.hubble.test");
        let routes = tonic::service::Routes::new(
            Observer::new(log, "node-6".into(), DOMAIN.into()).into_service(),
        )
        .add_service(peers.into_service())
        .add_service(observer::health().await);
        let callers = match api {
            None => None,
            Some(api) => {
                // As the shipped account of the agents, which must have the rights for this.
                let kubeconfig = api.account_kubeconfig(SYSTEM, "signet-agent", None)?;
                let api = signet::api_server::ApiServer::connect(Some(&kubeconfig)).await?;
                Some(Arc::new(Callers::new(api)))
            }
        };
        let hubble = HubbleServer {
            address,
            routes,
            callers,
            clients: vec![SpiffeId::parse(RELAY)?],
            serving: Serving::Files(Box::new(Files::new(pair.clone(), pair))),
            trust: trust.clone(),
        };
        tokio::spawn(async move {
            let _world = (sender, recorder);
            hubble.serve(listener, |_| {}).await;
        });
        Ok(Self { address, trust, mesh, stranger, server, _files: files })
    }

    /// A connection with this certificate, or none.
    async fn dial(&self, certificate: Option<&Path>) -> Result<Hubble> {
        let caller = Caller {
            roots: self.server.root().into(),
            server_name: NAME.into(),
            identity: certificate.map(text).transpose()?,
        };
        Hubble::dial(Path::new("/proc/self/ns/net"), self.address, &caller).await
    }
}

async fn looks(hubble: &Hubble) -> Result<(), Status> {
    hubble.flows(GetFlowsRequest { number: 1, ..Default::default() }).await.map(drop)
}

async fn refused(hubble: &Hubble, code: Code, why: &str) -> Result<()> {
    let status = looks(hubble).await.err().with_context(|| format!("let in: {why}"))?;
    ensure!(status.code() == code && status.message().contains(why), "{why}: {status:?}");
    Ok(())
}

/// A handshake that comes to nothing, by the alert that the server sends; `None`: it succeeds.
async fn handshake(node: &Node, certificate: &Path) -> Result<Option<AlertDescription>> {
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_slice(node.server.root().as_bytes())?)?;
    let pem = text(certificate)?;
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_root_certificates(roots)
        .with_client_auth_cert(
            vec![CertificateDer::from_pem_slice(pem.as_bytes())?],
            PrivateKeyDer::from_pem_slice(pem.as_bytes())?,
        )?;
    config.alpn_protocols = vec![b"h2".to_vec()];
    let stream = tokio::net::TcpStream::connect(node.address).await?;
    let connector = tokio_rustls::TlsConnector::from(Arc::new(config));
    let mut stream = connector.connect(NAME.try_into()?, stream).await?;
    // In TLS 1.3 the client is done before the server has judged its certificate. A server that
    // takes it speaks first: HTTP/2's settings.
    match stream.read(&mut [0; 9]).await {
        Ok(_) => Ok(None),
        Err(error) => match error.get_ref().and_then(|e| e.downcast_ref()) {
            Some(rustls::Error::AlertReceived(alert)) => Ok(Some(*alert)),
            _ => Err(error).context("neither settings nor an alert"),
        },
    }
}

/// Nobody is let in with this certificate, which is refused for this reason.
async fn no_handshake(node: &Node, certificate: &Path, why: AlertDescription) -> Result<()> {
    let alert = handshake(node, certificate).await?;
    ensure!(alert == Some(why), "{alert:?} instead of {why:?}");
    if let Ok(hubble) = node.dial(Some(certificate)).await {
        ensure!(looks(&hubble).await.is_err(), "let in: {why:?}");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn hubbles_tools_are_let_in_by_certificate_or_token() -> Result<()> {
    let api = ApiServer::start()?;
    api.ship(&["crds", "agent"])?;
    let node = Node::start(Some(&api)).await?;
    let hour = Duration::from_secs(3600);
    let token = |account: &str, audience: &str| api.token(SYSTEM, account, audience, None, hour);
    api.service_account(SYSTEM, "other")?;

    // A listed identity, and everything that Hubble's tools ask for.
    let relay = node.mesh.sign("relay", &Leaf::of(&[RELAY]))?;
    let listed = node.dial(Some(&relay)).await?;
    looks(&listed).await?;
    ensure!(handshake(&node, &relay).await?.is_none());
    let check = HealthCheckRequest { service: "observer.Observer".into() };
    let health = listed.health().check(check).await?.into_inner();
    ensure!(health.status() == ServingStatus::Serving, "{health:?}");
    let status = listed.observer().server_status(ServerStatusRequest {}).await?.into_inner();
    ensure!(status.num_connected_nodes == Some(1) && status.max_flows > 0, "{status:?}");
    let nodes = listed.observer().get_nodes(GetNodesRequest {}).await?.into_inner().nodes;
    ensure!(nodes.len() == 1 && nodes[0].name == "node-6", "{nodes:?}");
    listed.observer().get_namespaces(GetNamespacesRequest {}).await?;
    let mut peers = listed.peers().notify(NotifyRequest {}).await?.into_inner();
    for (name, ip) in [("node-6", "10.0.0.6"), ("node-7", "10.0.0.7")] {
        let peer = peers.message().await?.context("a peer")?;
        let server_name = peer.tls.clone().unwrap_or_default().server_name;
        ensure!(
            peer.name == name
                && peer.address == format!("{ip}:{}", node.address.port())
                && server_name == format!("{name}.hubble.test"),
            "{peer:?}"
        );
    }
    let events = listed.observer().get_agent_events(GetAgentEventsRequest {}).await;
    let status = events.err().context("an unlisted method was served")?;
    ensure!(
        status.code() == Code::PermissionDenied && status.message().contains("admin socket only"),
        "{status:?}"
    );

    // Another identity of the mesh, with and without a token.
    let front = node.mesh.sign("front", &Leaf::of(&[OTHER]))?;
    let unlisted = node.dial(Some(&front)).await?;
    let why = format!("{OTHER} is not one of observerClients");
    refused(&unlisted, Code::PermissionDenied, &why).await?;
    let good = token("signet-viewer", AUDIENCE)?;
    looks(&unlisted.with_token(&good)).await?;

    // Nobody's certificate.
    let nobody = node.dial(None).await?;
    looks(&nobody.with_token(&good)).await?;
    refused(&nobody, Code::Unauthenticated, "a bearer token of the audience").await?;
    let guess = nobody.with_token("guess");
    refused(&guess, Code::Unauthenticated, "not valid for the audience").await?;
    let elsewhere = nobody.with_token(&token("signet-viewer", "signet-authority")?);
    refused(&elsewhere, Code::Unauthenticated, "not valid for the audience").await?;
    let other = nobody.with_token(&token("other", AUDIENCE)?);
    refused(&other, Code::PermissionDenied, "signet-system:other may not get flows").await?;

    // Certificates that prove nothing end the handshake, whoever they claim to be.
    let forged = node.stranger.sign("forged", &Leaf::of(&[RELAY]))?;
    no_handshake(&node, &forged, AlertDescription::UnknownCA).await?;
    let old = node.mesh.sign("old", &Leaf { years: (2020, 2021), ..Leaf::of(&[RELAY]) })?;
    no_handshake(&node, &old, AlertDescription::CertificateExpired).await?;
    let two = node.mesh.sign("two", &Leaf::of(&[RELAY, OTHER]))?;
    no_handshake(&node, &two, AlertDescription::BadCertificate).await?;

    // In clear there is nothing.
    let clear = tonic::transport::Endpoint::from_shared(format!("http://{}", node.address))?;
    ensure!(
        match clear.connect().await {
            Err(_) => true,
            Ok(channel) => {
                let mut client =
                    signet::proto::observer::observer_client::ObserverClient::new(channel);
                client.server_status(signet::proto::observer::ServerStatusRequest {}).await.is_err()
            }
        },
        "served in clear"
    );

    // Nobody is listed by a domain whose bundle has gone, on a connection that is open either.
    looks(&listed).await?;
    let domain = TrustDomain::parse(DOMAIN)?;
    node.trust.set(domain.clone(), Bundle::from_pem(node.stranger.root().as_bytes())?);
    refused(&listed, Code::Unauthenticated, "not good any more").await?;
    no_handshake(&node, &relay, AlertDescription::UnknownCA).await?;
    looks(&node.dial(Some(&forged)).await?).await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn without_the_kubernetes_api_only_certificates_count() -> Result<()> {
    let node = Node::start(None).await?;
    let relay = node.mesh.sign("relay", &Leaf::of(&[RELAY]))?;
    looks(&node.dial(Some(&relay)).await?).await?;
    let nobody = node.dial(None).await?;
    refused(&nobody, Code::Unauthenticated, "a client certificate of one of").await?;
    let with_token = nobody.with_token("any");
    refused(&with_token, Code::Unauthenticated, "bearer tokens are not taken here").await?;
    let front = node.mesh.sign("front", &Leaf::of(&[OTHER]))?;
    let unlisted = node.dial(Some(&front)).await?;
    refused(&unlisted, Code::PermissionDenied, "is not one of observerClients").await
}
