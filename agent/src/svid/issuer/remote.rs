//! An authority that is asked over gRPC: any server of Istio's CA API, and what
//! `signet.v1.Authority` adds where the server has it (the bundle, reports of it, JWT-SVIDs).

use std::{
    error::Error as _,
    io,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use jiff::Timestamp;
use prost_types::{Struct, Value, value::Kind};
use rustls::pki_types::{CertificateDer, pem::PemObject};
use tokio::{io::AsyncReadExt, sync::watch, time};
use tokio_util::sync::CancellationToken;
use tonic::{
    Code, Status,
    metadata::{Ascii, MetadataValue},
    transport::{Certificate, Channel, ClientTlsConfig, Endpoint},
};

use super::{IssueError, IssueFuture, Issuer, JwtFuture, JwtIssuer, JwtRequest, SvidRequest};
use crate::{
    proto::{
        authority::{
            FetchJwtsvidRequest, GetBundleRequest, GetBundleResponse, ReportBundleRequest,
            authority_client::AuthorityClient,
        },
        istio_ca::{
            IstioCertificateRequest,
            istio_certificate_service_client::IstioCertificateServiceClient,
        },
    },
    spiffe::{
        Bundle, JwtBundle, SpiffeBundle, TrustDomain,
        validate::{MAX_INTERMEDIATES, PeerRole, validate},
    },
    trust::Trust,
};

/// A connection that takes longer has failed.
const CONNECT: Duration = Duration::from_secs(5);
/// A call that takes longer has failed.
const CALL: Duration = Duration::from_secs(10);
/// The longest answer, in bytes.
const MAX_ANSWER: usize = 1024 * 1024;
/// The largest file of roots or token, in bytes.
const MAX_FILE: u64 = 1024 * 1024;
/// The bundle is asked for again within these bounds, whatever the authority's hint says.
const HINTS: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(600));
/// How soon it is asked for again after the first failure, and at most.
const RETRY: (Duration, Duration) = (Duration::from_millis(500), Duration::from_secs(30));
/// How often an older bundle is ignored: a replica may be a moment behind, a store that was
/// restored stays behind.
const OLDER_IGNORED: u32 = 3;

/// Where the authority is, and how it and the agent know each other.
#[derive(Clone, Debug)]
pub struct RemoteConfig {
    /// `https://<host>:<port>`.
    pub address: String,
    /// The name in its certificate; `None`: the address's host.
    pub server_name: Option<String>,
    /// PEM roots that its certificate must lead to; read again for every connection.
    pub root_file: PathBuf,
    /// The agent's token; read again for every call, since the kubelet rotates it.
    pub token_file: PathBuf,
    /// Istio's name of the cluster.
    pub cluster_id: String,
    /// The validity asked for.
    pub ttl: Duration,
}

/// A client of the authority.
pub struct RemoteIssuer {
    config: RemoteConfig,
    domain: TrustDomain,
    cluster_id: MetadataValue<Ascii>,
    trust: Arc<Trust>,
    /// The connection, with the roots that it was made under.
    connection: tokio::sync::Mutex<Option<(Vec<u8>, Channel)>>,
    seen: Mutex<Seen>,
    jwt: watch::Sender<Arc<JwtBundle>>,
    /// The server has only Istio's API.
    foreign: AtomicBool,
}

/// What is known of the authority's bundle.
#[derive(Default)]
struct Seen {
    /// The roots, which the authority's own certificate may lead to as well: a rotation must
    /// not cut off an agent whose pinned file comes late.
    bundle: Option<Bundle>,
    sequence: u64,
    older: u32,
}

/// Why the authority gave no answer that can be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RemoteError {
    /// A file cannot be read.
    #[error("{key}: {}: {source}", path.display())]
    File {
        /// The configuration key.
        key: &'static str,
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A file's content or a setting is wrong.
    #[error("{key}: {problem}")]
    Setting {
        /// The configuration key.
        key: &'static str,
        /// What is wrong, with the remedy.
        problem: String,
    },
    /// It does not answer.
    #[error(
        "the authority at {address} does not answer: {cause}; look whether it runs, and whether a NetworkPolicy blocks it"
    )]
    Unreachable {
        /// Where.
        address: String,
        /// Why not.
        cause: String,
    },
    /// It refuses.
    #[error("the authority at {address} refuses ({code:?}): {message}")]
    Refused {
        /// Where.
        address: String,
        /// The gRPC code.
        code: Code,
        /// What it says.
        message: String,
    },
    /// It has only Istio's API.
    #[error("the authority at {0} issues no JWT-SVIDs: it has only Istio's CA API")]
    Foreign(String),
    /// Its answer is no answer.
    #[error("the authority at {address} answers nonsense: {problem}")]
    Answer {
        /// Where.
        address: String,
        /// What is wrong.
        problem: String,
    },
}

impl RemoteError {
    /// A short stable name, for metrics.
    pub const fn kind(&self) -> &'static str {
        match self {
            Self::File { .. } | Self::Setting { .. } => "configuration",
            Self::Unreachable { .. } => "unreachable",
            Self::Refused { code: Code::PermissionDenied, .. } => "denied",
            Self::Refused { code: Code::Unauthenticated, .. } => "unauthenticated",
            Self::Refused { code: Code::ResourceExhausted, .. } => "rate_limited",
            Self::Refused { .. } => "refused",
            Self::Foreign(_) => "unimplemented",
            Self::Answer { .. } => "nonsense",
        }
    }
}

impl RemoteIssuer {
    /// A client that keeps `trust` in step with the authority's bundle. Nothing is asked yet.
    ///
    /// # Errors
    /// A setting that cannot be used; the files are read here once, so that a wrong path is
    /// told at start.
    pub fn new(
        config: RemoteConfig,
        domain: TrustDomain,
        trust: Arc<Trust>,
    ) -> Result<Self, RemoteError> {
        let setting = |key, problem: String| RemoteError::Setting { key, problem };
        let cluster_id = MetadataValue::try_from(&config.cluster_id)
            .map_err(|_| setting("clusterId", "is no printable text".into()))?;
        if !config.address.starts_with("https://") {
            let problem = format!("{:?} does not begin with https://", config.address);
            return Err(setting("caAddress", problem));
        }
        Endpoint::from_shared(config.address.clone())
            .map_err(|e| setting("caAddress", format!("{:?} is no URL: {e}", config.address)))?;
        for (key, path) in [("caRootFile", &config.root_file), ("caTokenFile", &config.token_file)]
        {
            std::fs::metadata(path).map_err(|source| RemoteError::File {
                key,
                path: path.clone(),
                source,
            })?;
        }
        Ok(Self {
            config,
            domain,
            cluster_id,
            trust,
            connection: tokio::sync::Mutex::default(),
            seen: Mutex::default(),
            jwt: watch::Sender::default(),
            foreign: AtomicBool::new(false),
        })
    }

    /// Asks once whether the authority is there and takes this agent's token; changes nothing.
    ///
    /// # Errors
    /// Why not. An authority of Istio's CA API alone is there, too.
    pub async fn reach(&self) -> Result<(), RemoteError> {
        let mut client = self.own_api().await?;
        let request = self.request(GetBundleRequest {}).await?;
        match client.get_bundle(request).await {
            Ok(_) => Ok(()),
            Err(status) if status.code() == Code::Unimplemented => Ok(()),
            Err(status) => Err(self.refused(&status)),
        }
    }

    /// Follows the authority's bundle and reports it, until `stop`.
    pub async fn follow(self: Arc<Self>, stop: CancellationToken) {
        let mut failures = 0u32;
        loop {
            let refreshed = self.refresh().await;
            if !matches!(refreshed, Err(RemoteError::Foreign(_))) {
                self.trust.note_refresh(&self.domain, refreshed.is_ok());
            }
            let wait = match refreshed {
                Ok(hint) => {
                    failures = 0;
                    hint.clamp(HINTS.0, HINTS.1)
                }
                Err(RemoteError::Foreign(_)) => {
                    if !self.foreign.swap(true, Ordering::Relaxed) {
                        tracing::info!(
                            address = self.config.address,
                            "the authority has only Istio's CA API: the bundle comes with each SVID"
                        );
                    }
                    HINTS.1
                }
                Err(error) => {
                    failures = failures.saturating_add(1);
                    tracing::warn!(%error, failures, "the authority's bundle is not followed");
                    let doubled = RETRY.0.saturating_mul(2u32.saturating_pow(failures - 1));
                    doubled.min(RETRY.1)
                }
            };
            // Agents that started together do not ask together for ever.
            let wait = wait.mul_f64(rand::random_range(0.85..=1.0));
            tokio::select! {
                () = stop.cancelled() => return,
                () = time::sleep(wait) => {}
            }
        }
    }

    /// Takes the bundle and reports it; how soon to do so again.
    async fn refresh(&self) -> Result<Duration, RemoteError> {
        let mut client = self.own_api().await?;
        let request = self.request(GetBundleRequest {}).await?;
        let answer = client.get_bundle(request).await.map_err(|status| {
            // Istio's server has no such service.
            match status.code() {
                Code::Unimplemented => RemoteError::Foreign(self.config.address.clone()),
                _ => self.refused(&status),
            }
        })?;
        let answer = answer.into_inner();
        let hint = Duration::from_secs(answer.refresh_hint.into());
        self.foreign.store(false, Ordering::Relaxed);
        self.adopt(answer)?;
        if let Some(bundle) = self.trust.bundle(&self.domain) {
            let digest = bundle.digest().to_vec();
            let request = self.request(ReportBundleRequest { digest }).await?;
            client.report_bundle(request).await.map_err(|status| self.refused(&status))?;
        }
        Ok(hint)
    }

    fn adopt(&self, answer: GetBundleResponse) -> Result<(), RemoteError> {
        if answer.trust_domain != self.domain.as_str() {
            let domain = answer.trust_domain.chars().take(80).collect::<String>();
            return Err(self.nonsense(format!(
                "its trust domain is {domain:?}, this agent's is {}: set trustDomain",
                self.domain
            )));
        }
        let certificates = answer.x509_authorities.into_iter().map(CertificateDer::from);
        let bundle = Bundle::from_der(certificates).map_err(|e| self.nonsense(e.to_string()))?;
        if bundle.certificates().len() == 0 {
            // Empty means that everything is revoked, which an authority in use never is.
            return Err(self.nonsense("its bundle is empty".into()));
        }
        let jwt = SpiffeBundle::decode(&answer.jwks).map_err(|e| self.nonsense(e.to_string()))?.jwt;
        {
            let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
            if answer.sequence < seen.sequence && seen.older < OLDER_IGNORED {
                seen.older += 1;
                return Ok(());
            }
            *seen = Seen { bundle: Some(bundle.clone()), sequence: answer.sequence, older: 0 };
        }
        let jwt = Arc::new(jwt);
        let keys = self.trust.set_jwt(self.domain.clone(), jwt.clone());
        if keys {
            self.jwt.send_replace(jwt);
        }
        if self.trust.set(self.domain.clone(), bundle) || keys {
            tracing::info!(sequence = answer.sequence, "the authority's bundle is in force");
        }
        Ok(())
    }

    async fn create(
        &self,
        request: &SvidRequest,
    ) -> Result<Vec<CertificateDer<'static>>, IssueError> {
        let kind = Some(Kind::StringValue(request.id().to_string()));
        let fields = [("ImpersonatedIdentity".to_owned(), Value { kind })].into();
        let message = IstioCertificateRequest {
            csr: request.csr()?,
            validity_duration: i64::try_from(self.config.ttl.as_secs()).unwrap_or(i64::MAX),
            metadata: Some(Struct { fields }),
        };
        let mut client = IstioCertificateServiceClient::new(self.channel().await?)
            .max_decoding_message_size(MAX_ANSWER);
        let answer = client
            .create_certificate(self.request(message).await?)
            .await
            .map_err(|status| self.refused(&status))?;
        let elements = answer.into_inner().cert_chain;
        let Some((roots, chain)) = elements.split_last().filter(|(_, chain)| !chain.is_empty())
        else {
            let problem = format!("a chain of {} element(s), without roots", elements.len());
            return Err(self.nonsense(problem).into());
        };
        let chain = self.certificates(chain)?;
        let roots = Bundle::from_pem(roots.as_bytes())
            .map_err(|e| self.nonsense(format!("its roots: {e}")))?;
        let known = self.seen.lock().unwrap_or_else(PoisonError::into_inner).bundle.is_some();
        if !known && self.foreign.load(Ordering::Relaxed) {
            // With Istio's API alone this is how roots come and go.
            self.trust.set(self.domain.clone(), roots.clone());
        }
        // A chain that peers would refuse is refused here, where the authority can be named.
        let bundle = self.trust.bundle(&self.domain).unwrap_or_else(|| Arc::new(roots));
        let now = Timestamp::now();
        let bundle_of = |domain: &TrustDomain| (*domain == self.domain).then_some(bundle);
        validate(&chain[0], &chain[1..], bundle_of, PeerRole::Client, now)
            .map_err(|e| self.nonsense(format!("its chain does not lead to its roots: {e}")))?;
        Ok(chain)
    }

    /// The certificates of the elements before the last, leaf first.
    fn certificates(
        &self,
        elements: &[String],
    ) -> Result<Vec<CertificateDer<'static>>, RemoteError> {
        let mut chain = Vec::new();
        for element in elements {
            for certificate in CertificateDer::pem_slice_iter(element.as_bytes()) {
                chain.push(certificate.map_err(|e| self.nonsense(format!("its chain: {e}")))?);
                if chain.len() > MAX_INTERMEDIATES + 1 {
                    return Err(self.nonsense("its chain is too long".into()));
                }
            }
        }
        if chain.is_empty() {
            return Err(self.nonsense("its chain has no certificate".into()));
        }
        Ok(chain)
    }

    async fn token(&self, request: &JwtRequest) -> Result<String, RemoteError> {
        let ttl = request.ttl.map_or(0, |ttl| i64::try_from(ttl.as_secs()).unwrap_or(i64::MAX));
        let message = FetchJwtsvidRequest {
            spiffe_id: request.id.to_string(),
            audience: request.audiences.clone(),
            validity_duration: ttl,
        };
        let mut client = self.own_api().await?;
        let answer = client.fetch_jwtsvid(self.request(message).await?).await;
        let answer = answer.map_err(|status| match status.code() {
            Code::Unimplemented => RemoteError::Foreign(self.config.address.clone()),
            _ => self.refused(&status),
        })?;
        Ok(answer.into_inner().token)
    }

    async fn own_api(&self) -> Result<AuthorityClient<Channel>, RemoteError> {
        let client = AuthorityClient::new(self.channel().await?);
        Ok(client.max_decoding_message_size(MAX_ANSWER))
    }

    /// The connection under the roots that are pinned now.
    async fn channel(&self) -> Result<Channel, RemoteError> {
        let mut roots = read("caRootFile", &self.config.root_file).await?;
        {
            let seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
            for root in seen.bundle.iter().flat_map(Bundle::certificates) {
                let block = pem::encode(&pem::Pem::new("CERTIFICATE", root.to_vec()));
                roots.extend_from_slice(block.as_bytes());
            }
        }
        let mut connection = self.connection.lock().await;
        if let Some((under, channel)) = &*connection
            && *under == roots
        {
            return Ok(channel.clone());
        }
        let setting = |problem: String| RemoteError::Setting { key: "caRootFile", problem };
        Bundle::from_pem(&roots)
            .map_err(|e| setting(format!("{}: {e}", self.config.root_file.display())))?;
        let address = &self.config.address;
        let endpoint = Endpoint::from_shared(address.clone())
            .map_err(|e| RemoteError::Setting { key: "caAddress", problem: e.to_string() })?;
        let name = match &self.config.server_name {
            Some(name) => name.clone(),
            None => {
                let host = endpoint.uri().host().unwrap_or_default();
                host.trim_start_matches('[').trim_end_matches(']').to_owned()
            }
        };
        let tls =
            ClientTlsConfig::new().ca_certificate(Certificate::from_pem(&roots)).domain_name(name);
        let channel = endpoint
            .tls_config(tls)
            .map_err(|e| setting(describe(&e)))?
            .connect_timeout(CONNECT)
            .timeout(CALL)
            .http2_keep_alive_interval(Duration::from_secs(30))
            .keep_alive_timeout(Duration::from_secs(10))
            .connect_lazy();
        *connection = Some((roots, channel.clone()));
        Ok(channel)
    }

    /// A request with who asks.
    async fn request<T>(&self, message: T) -> Result<tonic::Request<T>, RemoteError> {
        let token = read("caTokenFile", &self.config.token_file).await?;
        let token = String::from_utf8_lossy(&token);
        let mut value: MetadataValue<Ascii> =
            format!("Bearer {}", token.trim()).parse().map_err(|_| RemoteError::Setting {
                key: "caTokenFile",
                problem: format!("{} holds no token", self.config.token_file.display()),
            })?;
        value.set_sensitive(true);
        let mut request = tonic::Request::new(message);
        request.metadata_mut().insert("authorization", value);
        request.metadata_mut().insert("clusterid", self.cluster_id.clone());
        Ok(request)
    }

    fn refused(&self, status: &Status) -> RemoteError {
        let address = self.config.address.clone();
        let transport = status.source().map(|_| describe(status));
        match (status.code(), transport) {
            (Code::Unavailable | Code::DeadlineExceeded | Code::Cancelled, _) | (_, Some(_)) => {
                RemoteError::Unreachable { address, cause: describe(status) }
            }
            (code, None) => {
                let message = status.message().chars().take(500).collect();
                RemoteError::Refused { address, code, message }
            }
        }
    }

    fn nonsense(&self, problem: String) -> RemoteError {
        RemoteError::Answer { address: self.config.address.clone(), problem }
    }
}

impl Issuer for RemoteIssuer {
    fn issue<'a>(&'a self, request: &'a SvidRequest) -> IssueFuture<'a> {
        Box::pin(self.create(request))
    }
}

impl JwtIssuer for RemoteIssuer {
    fn issue_jwt<'a>(&'a self, request: &'a JwtRequest) -> JwtFuture<'a> {
        Box::pin(async move { Ok(self.token(request).await?) })
    }

    fn jwt_bundle(&self) -> watch::Receiver<Arc<JwtBundle>> {
        self.jwt.subscribe()
    }

    fn issues_jwts(&self) -> bool {
        !self.foreign.load(Ordering::Relaxed)
    }
}

impl std::fmt::Debug for RemoteIssuer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RemoteIssuer").field("config", &self.config).finish_non_exhaustive()
    }
}

/// A small file, whole.
async fn read(key: &'static str, path: &Path) -> Result<Vec<u8>, RemoteError> {
    let failed = |source| RemoteError::File { key, path: path.to_owned(), source };
    let file = tokio::fs::File::open(path).await.map_err(failed)?;
    let mut content = Vec::new();
    file.take(MAX_FILE).read_to_end(&mut content).await.map_err(failed)?;
    Ok(content)
}

/// An error with its causes, in one line.
fn describe(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let more = error.to_string();
        if !text.contains(&more) {
            text = format!("{text}: {more}");
        }
        cause = error.source();
    }
    text.chars().take(500).collect()
}
