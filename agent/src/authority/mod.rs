//! The authority of a trust domain (`signet authority`, DESIGN §6).
//!
//! A request passes the [`gate`] (who calls: [`callers`]; how often: [`limits`]), then
//! [`authorize`] against the pods on the caller's node ([`pods`]), then its service ([`istio`],
//! [`own`]) signs with what the [`keeper`] holds. What replicas share is one document
//! ([`state`]), kept in a [`store`] that replaces it only when nobody else has. One of them keeps
//! the [`taint`] of nodes without an agent, where that is asked for.

pub mod authorize;
pub mod callers;
pub mod gate;
pub mod istio;
pub mod keeper;
pub mod limits;
pub mod listen;
pub mod metrics;
pub mod output;
pub mod own;
pub mod pods;
pub mod request;
pub mod rotate;
pub mod state;
pub mod store;
pub mod taint;
pub mod web;

use std::{io, net::SocketAddr, sync::Arc, time::Duration};

use arc_swap::ArcSwap;
use tokio::{
    net::TcpListener,
    signal::unix::{SignalKind, signal},
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Server;

use self::{
    callers::{CallerAuth, NodeTokens, TokenFileError, TokenReviews},
    gate::GateLayer,
    istio::IstioCa,
    keeper::{Keeper, KeeperError, Signing},
    limits::Limits,
    metrics::AuthorityMetrics,
    output::BundleOutput,
    own::OwnApi,
    pods::{FilesPods, KubePods, PodDirectory},
    request::Authority,
    store::{DirectoryStore, RootStore, SecretStore, StoreError, directory::DirectoryError},
    taint::Tainter,
    web::{Web, WebCertificate, WebError},
};
use crate::{
    api_server::{ApiError, ApiServer},
    cluster::{
        files::{FilesError, FilesSource},
        source::{ClusterSource as _, SourceParams},
    },
    config::{authority::AuthorityConfig, values::LogFormat},
    spiffe::{SpiffeIdError, TrustDomain},
    telemetry::{
        logging::{self, LogError},
        metrics::{Metrics, metrics_page, serve as serve_page},
    },
};

/// A request that takes longer is given up.
const REQUEST: Duration = Duration::from_secs(20);
/// Requests of one connection at the same time.
const PER_CONNECTION: usize = 64;
/// How long requests in flight may go on after SIGTERM.
const DRAIN: Duration = Duration::from_secs(5);

/// Why the authority did not start, or ended.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AuthorityError {
    /// The trust domain's name.
    #[error("trustDomain: {0}")]
    TrustDomain(#[from] SpiffeIdError),
    /// The log.
    #[error(transparent)]
    Log(#[from] LogError),
    /// The cluster directory.
    #[error(transparent)]
    Files(#[from] FilesError),
    /// The node tokens.
    #[error(transparent)]
    Tokens(#[from] TokenFileError),
    /// The directory of the root.
    #[error(transparent)]
    Directory(#[from] DirectoryError),
    /// The API server.
    #[error(transparent)]
    Api(#[from] ApiError),
    /// The store, by itself.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// What is signed with.
    #[error(transparent)]
    Keeper(#[from] KeeperError),
    /// The listener.
    #[error("{key}: {address}: {source}; choose another address or stop who has it")]
    Listen {
        /// The configuration key.
        key: &'static str,
        /// Where.
        address: SocketAddr,
        /// Why not.
        source: io::Error,
    },
    /// Threads, runtimes, signals.
    #[error("cannot start {what}: {source}")]
    Start {
        /// What.
        what: &'static str,
        /// Why not.
        source: io::Error,
    },
    /// The web's certificate.
    #[error(transparent)]
    Web(#[from] WebError),
    /// TLS.
    #[error("the TLS configuration: {0}")]
    Tls(#[from] rustls::Error),
    /// There is nothing to rotate.
    #[error("{0}: there is no root yet; start the authority first")]
    NoDocument(String),
    /// A part has ended.
    #[error("{0} has ended")]
    Ended(String),
}

impl AuthorityError {
    /// True when the API server is what is missing.
    pub fn is_unreachable(&self) -> bool {
        let of_store = |e: &StoreError| matches!(e, StoreError::Api(_) | StoreError::Busy(_));
        match self {
            Self::Api(_) => true,
            Self::Store(e) | Self::Keeper(KeeperError::Store(e)) => of_store(e),
            _ => false,
        }
    }

    /// True for a bug rather than input.
    pub fn is_bug(&self) -> bool {
        matches!(self, Self::Ended(_) | Self::Tls(_) | Self::Start { .. })
    }
}

/// Where things are, by the configuration.
struct Surroundings {
    domain: TrustDomain,
    store: Arc<dyn RootStore>,
    pods: Arc<dyn PodDirectory>,
    api: Option<ApiServer>,
}

impl Surroundings {
    async fn open(config: &AuthorityConfig) -> Result<Self, AuthorityError> {
        let domain = TrustDomain::parse(&config.trust_domain)?;
        let needs_api = config.cluster_dir.is_none()
            || config.store_secret.is_some()
            || config.bundle_config_map.is_some()
            || config.taint_lease.is_some();
        let api = match needs_api {
            true => Some(ApiServer::connect(config.kubeconfig.as_deref()).await?),
            false => None,
        };
        let pods: Arc<dyn PodDirectory> = match (&config.cluster_dir, &api) {
            (Some(dir), _) => {
                let files = FilesSource::start(dir, SourceParams::new(domain.clone()))?;
                Arc::new(FilesPods(files.worlds()))
            }
            (None, Some(api)) => Arc::new(KubePods::new(api.clone())),
            (None, None) => return Err(no_access()),
        };
        let store: Arc<dyn RootStore> = match (&config.store_dir, &config.store_secret, &api) {
            (Some(dir), ..) => Arc::new(DirectoryStore::open(dir)?),
            (None, Some(name), Some(api)) => Arc::new(SecretStore::new(api.clone(), name.clone())),
            _ => return Err(no_access()),
        };
        Ok(Self { domain, store, pods, api })
    }

    fn callers(&self, config: &AuthorityConfig) -> Result<Arc<dyn CallerAuth>, AuthorityError> {
        match (&config.node_token_dir, &self.api) {
            (Some(dir), _) => Ok(Arc::new(NodeTokens::open(dir)?)),
            (None, Some(api)) => Ok(Arc::new(TokenReviews::new(
                api.clone(),
                config.audience.clone(),
                config.node_accounts.clone(),
            ))),
            (None, None) => Err(no_access()),
        }
    }
}

/// The configuration's own check leaves no such combination.
fn no_access() -> AuthorityError {
    AuthorityError::Ended("the configuration's check".into())
}

/// Runs the authority until SIGTERM or SIGINT.
///
/// # Errors
/// The first thing that is wrong.
pub fn run(config: AuthorityConfig) -> Result<(), AuthorityError> {
    let format = match config.log_format {
        LogFormat::Text => logging::Format::Text,
        LogFormat::Json => logging::Format::Json,
    };
    logging::init(&config.log_level, format)?;
    runtime()?.block_on(serve(Arc::new(config)))
}

/// The runtime of the authority's commands.
fn runtime() -> Result<tokio::runtime::Runtime, AuthorityError> {
    tokio::runtime::Builder::new_multi_thread()
        .thread_name("signet-authority")
        .enable_all()
        .build()
        .map_err(|source| AuthorityError::Start { what: "the runtime", source })
}

async fn serve(config: Arc<AuthorityConfig>) -> Result<(), AuthorityError> {
    let start = |source| AuthorityError::Start { what: "the signal handler", source };
    let mut terminate = signal(SignalKind::terminate()).map_err(start)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(start)?;
    let surroundings = Surroundings::open(&config).await?;
    let callers = surroundings.callers(&config)?;
    let (listener, address) = bind("listen", config.listen).await?;
    let web_listener = match config.web_listen {
        Some(address) => Some(bind("webListen", address).await?),
        None => None,
    };
    let metrics_listener = match config.metrics_listen {
        Some(address) => Some(bind("metricsListen", address).await?),
        None => None,
    };

    let mut registry = Metrics::default();
    let metrics = AuthorityMetrics::register(&mut registry);
    let config_map = surroundings.api.clone().zip(config.bundle_config_map.clone());
    let output = BundleOutput::new(config.bundle_file.clone(), config_map);
    let Surroundings { domain, store, pods, api } = surroundings;
    let keeper = Keeper::open(
        config.clone(),
        domain.clone(),
        store.clone(),
        pods.clone(),
        output,
        metrics.clone(),
    )
    .await?;
    let (signing, reports, rotation) = (keeper.signing(), keeper.reports(), keeper.rotation());
    registry.read({
        let (signing, reports) = (signing.clone(), reports.clone());
        move || metrics::readings(&signing, rotation.get(), &reports)
    });
    let (mut measuring, metrics_address) = match metrics_listener {
        Some((listener, address)) => {
            (tokio::spawn(serve_page(listener, metrics_page(registry.shared()))), Some(address))
        }
        None => (tokio::spawn(std::future::pending()), None),
    };
    let authority = Arc::new(Authority {
        domain: domain.clone(),
        pods,
        signing: signing.clone(),
        metrics: metrics.clone(),
    });
    let tls = listen::tls(signing.clone(), &[b"h2"])?;
    let connections = listen::accept(listener, tls, "grpc", metrics.clone());
    let limits = Limits::new(config.requests_per_second, config.request_burst);
    let gate = GateLayer::new(callers, limits, metrics.clone());
    let serving = Server::builder()
        .timeout(REQUEST)
        .concurrency_limit_per_connection(PER_CONNECTION)
        .max_concurrent_streams(PER_CONNECTION as u32 * 2)
        .http2_keepalive_interval(Some(Duration::from_secs(30)))
        .http2_max_header_list_size(32 * 1024)
        .layer(gate)
        .add_service(
            IstioCa::new(authority.clone(), config.svid_ttl, config.max_ttl).into_service(),
        )
        .add_service(
            OwnApi::new(authority, reports, config.refresh_hint, config.oidc_issuer.clone())
                .into_service(),
        );
    let (mut web, web_address) = match web_listener {
        Some((listener, address)) => {
            let files = config.web_cert_file.clone().zip(config.web_key_file.clone());
            let tls = match files {
                Some((certificate, key)) => web::tls(&WebCertificate { certificate, key })?,
                None => listen::tls(signing.clone(), &[b"http/1.1"])?,
            };
            let web = Web::new(signing.clone(), config.oidc_issuer.clone(), config.refresh_hint);
            (tokio::spawn(web::serve(listener, tls, web, metrics)), Some(address))
        }
        None => (tokio::spawn(std::future::pending()), None),
    };
    tracing::info!(
        %address,
        web = web_address.map(tracing::field::display),
        metrics = metrics_address.map(tracing::field::display),
        trust_domain = %domain,
        store = %store.place(),
        roots = describe(&signing),
        "authority started"
    );
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let mut serving = tokio::spawn(serving.serve_with_incoming_shutdown(
        ReceiverStream::new(connections),
        async move {
            let _ = stopped.await;
        },
    ));
    let mut keeping = tokio::spawn(keeper.run());
    let mut tainting = match (config.taint_lease.clone(), api) {
        (Some(lease), Some(api)) => {
            tokio::spawn(Tainter::new(api, lease, config.node_accounts.clone()).run())
        }
        _ => tokio::spawn(std::future::pending()),
    };
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
        ended = &mut serving => return Err(AuthorityError::Ended(format!("the server ({ended:?})"))),
        ended = &mut web => return Err(AuthorityError::Ended(format!("the web server ({ended:?})"))),
        ended = &mut measuring => return Err(AuthorityError::Ended(format!("the metrics' server ({ended:?})"))),
        ended = &mut tainting => return Err(AuthorityError::Ended(format!("the keeper of taints ({ended:?})"))),
        ended = &mut keeping => return Err(AuthorityError::Ended(format!("the keeper ({ended:?})"))),
    }
    tracing::info!("draining");
    let _ = stop.send(());
    let _ = tokio::time::timeout(DRAIN, serving).await;
    Ok(())
}

async fn bind(
    key: &'static str,
    address: SocketAddr,
) -> Result<(TcpListener, SocketAddr), AuthorityError> {
    let failed = |source| AuthorityError::Listen { key, address, source };
    let listener = TcpListener::bind(address).await.map_err(failed)?;
    let address = listener.local_addr().map_err(failed)?;
    Ok((listener, address))
}

fn describe(signing: &ArcSwap<Signing>) -> String {
    let ends: Vec<String> =
        signing.load().bundle.expiries().iter().map(|t| t.to_string()).collect();
    format!("{} until {}", ends.len(), ends.join(", "))
}
