//! What anybody may read over HTTPS: OIDC discovery, so that a cloud's IAM can verify
//! JWT-SVIDs, and the trust domain's bundle as SPIFFE's `https_web` profile has it.
//!
//! Nothing here is secret and nothing is asked of the caller; a request is a path.

use std::{io, path::PathBuf, sync::Arc, time::Duration};

use arc_swap::ArcSwap;
use axum::{
    Router,
    extract::State,
    http::{StatusCode, header},
    response::{IntoResponse, Response},
    routing::get,
};
use hyper_util::{
    rt::{TokioExecutor, TokioIo, TokioTimer},
    server::conn::auto::Builder,
    service::TowerToHyperService,
};
use rustls::{
    ServerConfig,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
    server::{ClientHello, ResolvesServerCert},
    sign::CertifiedKey,
};
use serde_json::{Value, json};
use tokio::{net::TcpListener, time};

use super::{keeper::Signing, listen, metrics::AuthorityMetrics};
use crate::spiffe::SpiffeBundle;

/// A request's head must be there within this.
const HEAD: Duration = Duration::from_secs(10);
/// A connection is closed after this, whatever it does.
const CONNECTION: Duration = Duration::from_secs(60);
/// How often the certificate's files are looked at.
const RELOAD: Duration = Duration::from_secs(30);

/// What is served.
#[derive(Clone)]
pub struct Web {
    signing: Arc<ArcSwap<Signing>>,
    /// The claim `iss` of tokens; `None`: no discovery.
    issuer: Option<String>,
    refresh_hint: Duration,
}

/// The files of a certificate that browsers and clouds know.
#[derive(Clone, Debug)]
pub struct WebCertificate {
    /// PEM, leaf first.
    pub certificate: PathBuf,
    /// PEM.
    pub key: PathBuf,
}

/// Why the certificate cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WebError {
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
    /// A file's content.
    #[error("{key}: {}: {problem}", path.display())]
    Content {
        /// The configuration key.
        key: &'static str,
        /// Which.
        path: PathBuf,
        /// What is wrong, with the remedy.
        problem: String,
    },
}

impl Web {
    /// Serves what `signing` holds.
    pub fn new(
        signing: Arc<ArcSwap<Signing>>,
        issuer: Option<String>,
        refresh_hint: Duration,
    ) -> Self {
        Self { signing, issuer, refresh_hint }
    }

    /// The paths; discovery is below the issuer's own.
    pub fn router(self) -> Router {
        let mut router = Router::new().route("/bundle", get(bundle));
        if let Some(issuer) = &self.issuer {
            let base = path_of(issuer);
            router = router
                .route(&format!("{base}/.well-known/openid-configuration"), get(discovery))
                .route(&format!("{base}/keys"), get(keys));
        }
        router.with_state(self)
    }

    fn answer(&self, content_type: &'static str, body: String) -> Response {
        let cache = format!("public, max-age={}", self.refresh_hint.as_secs());
        let headers =
            [(header::CONTENT_TYPE, content_type.to_owned()), (header::CACHE_CONTROL, cache)];
        (headers, body).into_response()
    }
}

/// The path of an URL, without a slash at its end.
fn path_of(url: &str) -> &str {
    let rest = url.split_once("://").map_or(url, |(_, rest)| rest);
    let path = rest.find('/').map_or("", |at| &rest[at..]);
    path.trim_end_matches('/')
}

async fn bundle(State(web): State<Web>) -> Response {
    let signing = web.signing.load();
    let bundle = SpiffeBundle {
        x509: signing.bundle.clone(),
        jwt: signing.jwt_bundle.clone(),
        sequence: Some(signing.sequence),
        refresh_hint: Some(web.refresh_hint),
    };
    match bundle.encode() {
        Ok(document) => web.answer("application/json", document),
        Err(error) => {
            tracing::error!(%error, "the bundle cannot be written");
            StatusCode::INTERNAL_SERVER_ERROR.into_response()
        }
    }
}

/// OpenID Connect Discovery 1.0, section 3: what verifiers of tokens read of it.
async fn discovery(State(web): State<Web>) -> Response {
    let issuer = web.issuer.as_deref().unwrap_or_default();
    let document = json!({
        "issuer": issuer,
        "jwks_uri": format!("{}/keys", issuer.trim_end_matches('/')),
        // Required by the standard; nobody logs in here.
        "authorization_endpoint": "",
        "response_types_supported": ["id_token"],
        "subject_types_supported": ["public"],
        "id_token_signing_alg_values_supported": ["ES256"],
    });
    web.answer("application/json", document.to_string())
}

/// The keys as OIDC clients want them: `use` is `sig`, where SPIFFE says `jwt-svid`.
async fn keys(State(web): State<Web>) -> Response {
    let signing = web.signing.load();
    let keys: Vec<Value> = signing
        .jwt_bundle
        .iter()
        .map(|(kid, key)| {
            let mut members: serde_json::Map<String, Value> =
                key.members().into_iter().map(|(n, v)| (n.to_owned(), v.into())).collect();
            members.insert("kid".into(), kid.into());
            members.insert("use".into(), "sig".into());
            members.insert("alg".into(), "ES256".into());
            Value::Object(members)
        })
        .collect();
    web.answer("application/jwk-set+json", json!({"keys": keys}).to_string())
}

/// Serves until the task is dropped.
pub async fn serve(
    listener: TcpListener,
    tls: Arc<ServerConfig>,
    web: Web,
    metrics: AuthorityMetrics,
) {
    let mut connections = listen::accept(listener, tls, "web", metrics);
    let service = TowerToHyperService::new(web.router());
    while let Some(connection) = connections.recv().await {
        let Ok(connection) = connection else { continue };
        let service = service.clone();
        tokio::spawn(async move {
            let mut builder = Builder::new(TokioExecutor::new());
            builder
                .http1()
                .timer(TokioTimer::new())
                .header_read_timeout(HEAD)
                .max_buf_size(16 * 1024);
            let builder = builder.http1_only();
            let serving = builder.serve_connection(TokioIo::new(connection), service);
            if let Ok(Err(error)) = time::timeout(CONNECTION, serving).await {
                tracing::debug!(%error, "a web connection failed");
            }
        });
    }
}

/// A TLS configuration by files, which are read again when they change.
pub fn tls(files: &WebCertificate) -> Result<Arc<ServerConfig>, super::AuthorityError> {
    let present = Arc::new(ArcSwap::new(read(files)?));
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_no_client_auth()
        .with_cert_resolver(Arc::new(Files(present.clone())));
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    let files = files.clone();
    let held = Arc::downgrade(&present);
    drop(present);
    tokio::spawn(async move {
        loop {
            time::sleep(RELOAD).await;
            let Some(present) = held.upgrade() else { return };
            match read(&files) {
                Ok(key) => present.store(key),
                Err(error) => {
                    tracing::error!(%error, "the web certificate is not reloaded; the one in force stays");
                }
            }
        }
    });
    Ok(Arc::new(config))
}

#[derive(Debug)]
struct Files(Arc<ArcSwap<CertifiedKey>>);

impl ResolvesServerCert for Files {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.0.load_full())
    }
}

fn read(files: &WebCertificate) -> Result<Arc<CertifiedKey>, WebError> {
    let content = |key: &'static str, path: &PathBuf| {
        std::fs::read(path).map_err(|source| WebError::File { key, path: path.clone(), source })
    };
    let wrong = |key, path: &PathBuf, problem: String| WebError::Content {
        key,
        path: path.clone(),
        problem,
    };
    let pem = content("webCertFile", &files.certificate)?;
    let chain = CertificateDer::pem_slice_iter(&pem)
        .collect::<Result<Vec<_>, _>>()
        .map_err(|e| wrong("webCertFile", &files.certificate, format!("is not PEM ({e})")))?;
    if chain.is_empty() {
        let problem = "has no block BEGIN CERTIFICATE".into();
        return Err(wrong("webCertFile", &files.certificate, problem));
    }
    let key = PrivateKeyDer::from_pem_slice(&content("webKeyFile", &files.key)?)
        .map_err(|_| wrong("webKeyFile", &files.key, "is not a private key in PEM".into()))?;
    let key = rustls::crypto::aws_lc_rs::sign::any_supported_type(&key)
        .map_err(|_| wrong("webKeyFile", &files.key, "is a key of an unknown kind".into()))?;
    let certified = CertifiedKey::new(chain, key);
    certified.keys_match().map_err(|_| {
        wrong("webKeyFile", &files.key, "does not belong to the certificate in webCertFile".into())
    })?;
    Ok(Arc::new(certified))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn discovery_lies_below_the_issuers_path() {
        for (url, path) in [
            ("https://oidc.example", ""),
            ("https://oidc.example/", ""),
            ("https://oidc.example:8443/clusters/a/", "/clusters/a"),
        ] {
            assert_eq!(path_of(url), path, "{url}");
        }
    }
}
