//! Fetching a bundle from its endpoint, in either profile (SPIFFE Federation, section 5.2).

use std::{sync::Arc, time::Duration};

use http::{Request, StatusCode, Uri, header};
use http_body_util::{BodyExt as _, Empty, Limited};
use hyper_util::{client::legacy::Client, rt::TokioExecutor};
use jiff::Timestamp;
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme,
    client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    crypto::{CryptoProvider, aws_lc_rs, verify_tls12_signature, verify_tls13_signature},
    pki_types::{CertificateDer, ServerName, UnixTime},
};
use tokio::time::timeout;

use crate::spiffe::{
    Bundle, SpiffeId,
    validate::{PeerRole, validate},
};

/// A document may not be larger.
const MAX_DOCUMENT: usize = 1 << 20;
/// All of one fetch, redirects included.
const WITHIN: Duration = Duration::from_secs(15);
/// Redirects that are followed.
const MAX_REDIRECTS: usize = 3;

/// How the endpoint proves who it is.
#[derive(Clone, Debug)]
pub enum Verify {
    /// By a web certificate for the URL's host.
    Web {
        /// PEM of the web authorities; the system's when absent.
        roots: Option<Vec<u8>>,
    },
    /// By a web certificate for the URL's host, of one of the system's authorities or of these.
    WebAnd {
        /// PEM of further web authorities.
        more: Option<Vec<u8>>,
    },
    /// By an X509-SVID.
    Spiffe {
        /// The only identity that may answer.
        id: SpiffeId,
        /// What verifies it.
        bundle: Arc<Bundle>,
    },
}

/// Why there is no document.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EndpointError {
    /// No web authority could be read.
    #[error("no web authorities: {0}; name a PEM file as webRoots (jwksRoots for end users' keys)")]
    Roots(String),
    /// TLS cannot be set up.
    #[error("TLS for the endpoint cannot be set up: {0}")]
    Tls(#[from] rustls::Error),
    /// The connection, the handshake or the exchange failed.
    #[error("{url}: {source}")]
    Request {
        /// The endpoint.
        url: Uri,
        /// What failed.
        source: Box<hyper_util::client::legacy::Error>,
    },
    /// Another status than 200.
    #[error("{url}: answered {status}, not 200")]
    Status {
        /// The endpoint.
        url: Uri,
        /// The status.
        status: StatusCode,
    },
    /// A redirect that is not followed.
    #[error("{url}: redirects {why}")]
    Redirect {
        /// The endpoint.
        url: Uri,
        /// Why it is not followed.
        why: &'static str,
    },
    /// The body broke off or is too large.
    #[error("{url}: the document breaks off or has more than {MAX_DOCUMENT} bytes: {problem}")]
    Body {
        /// The endpoint.
        url: Uri,
        /// What is wrong.
        problem: String,
    },
    /// No answer in time.
    #[error("{url}: no answer within {WITHIN:?}")]
    Timeout {
        /// The endpoint.
        url: Uri,
    },
}

/// Fetches the document at `url`.
///
/// # Errors
/// Whatever keeps it from coming; nothing of an endpoint that is not verified is read.
pub async fn fetch(url: &Uri, verify: Verify) -> Result<Vec<u8>, EndpointError> {
    let config = config(verify)?;
    timeout(WITHIN, follow(url.clone(), config))
        .await
        .map_err(|_| EndpointError::Timeout { url: url.clone() })?
}

async fn follow(mut url: Uri, config: ClientConfig) -> Result<Vec<u8>, EndpointError> {
    let connector = hyper_rustls::HttpsConnectorBuilder::new()
        .with_tls_config(config)
        .https_only()
        .enable_http1()
        .build();
    let client = Client::builder(TokioExecutor::new())
        .pool_max_idle_per_host(0)
        .build::<_, Empty<bytes::Bytes>>(connector);
    for _ in 0..=MAX_REDIRECTS {
        let mut request = Request::new(Empty::new());
        *request.uri_mut() = url.clone();
        let answer = client
            .request(request)
            .await
            .map_err(|e| EndpointError::Request { url: url.clone(), source: Box::new(e) })?;
        match answer.status() {
            StatusCode::OK => {
                let body = Limited::new(answer.into_body(), MAX_DOCUMENT).collect().await;
                return body
                    .map(|body| body.to_bytes().to_vec())
                    .map_err(|e| EndpointError::Body { url, problem: e.to_string() });
            }
            // Temporary ones only: a permanent one is for whoever configured the URL.
            StatusCode::FOUND | StatusCode::SEE_OTHER | StatusCode::TEMPORARY_REDIRECT => {
                let to = answer.headers().get(header::LOCATION).and_then(|l| l.to_str().ok());
                let to = to.and_then(|to| to.parse::<Uri>().ok());
                match to {
                    Some(to) if to.scheme_str() == Some("https") => url = to,
                    _ => {
                        let why = "to what is no absolute https URL";
                        return Err(EndpointError::Redirect { url, why });
                    }
                }
            }
            status => return Err(EndpointError::Status { url, status }),
        }
    }
    Err(EndpointError::Redirect { url, why: "too many times" })
}

fn config(verify: Verify) -> Result<ClientConfig, EndpointError> {
    let provider = Arc::new(aws_lc_rs::default_provider());
    let builder = ClientConfig::builder_with_provider(provider.clone())
        .with_safe_default_protocol_versions()?;
    Ok(match verify {
        Verify::Web { roots } => {
            builder.with_root_certificates(web_roots(roots.as_deref())?).with_no_client_auth()
        }
        Verify::WebAnd { more } => {
            builder.with_root_certificates(all_roots(more.as_deref())?).with_no_client_auth()
        }
        Verify::Spiffe { id, bundle } => {
            let verifier = Arc::new(SvidVerifier { id, bundle, provider });
            builder.dangerous().with_custom_certificate_verifier(verifier).with_no_client_auth()
        }
    })
}

fn web_roots(pem: Option<&[u8]>) -> Result<RootCertStore, EndpointError> {
    match pem {
        Some(pem) => store_of(certificates_of(pem)?),
        None => store_of(rustls_native_certs::load_native_certs().certs),
    }
}

fn all_roots(more: Option<&[u8]>) -> Result<RootCertStore, EndpointError> {
    let mut all = rustls_native_certs::load_native_certs().certs;
    if let Some(pem) = more {
        let more = certificates_of(pem)?;
        // Told, though the system's own would do for other servers.
        store_of(more.clone())?;
        all.extend(more);
    }
    store_of(all)
}

fn certificates_of(pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, EndpointError> {
    let blocks = pem::parse_many(pem).map_err(|e| EndpointError::Roots(e.to_string()))?;
    let certificates = blocks.into_iter().filter(|block| block.tag() == "CERTIFICATE");
    Ok(certificates.map(|block| block.into_contents().into()).collect())
}

fn store_of(certificates: Vec<CertificateDer<'static>>) -> Result<RootCertStore, EndpointError> {
    let mut store = RootCertStore::empty();
    let (added, _ignored) = store.add_parsable_certificates(certificates);
    if added == 0 {
        return Err(EndpointError::Roots("none was found".into()));
    }
    Ok(store)
}

/// Takes the X509-SVID of one identity; rustls checks the handshake's signatures.
#[derive(Debug)]
struct SvidVerifier {
    id: SpiffeId,
    bundle: Arc<Bundle>,
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for SvidVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let now = i64::try_from(now.as_secs())
            .ok()
            .and_then(|seconds| Timestamp::from_second(seconds).ok())
            .unwrap_or(Timestamp::MAX);
        let bundle_of =
            |domain: &_| (*domain == self.id.trust_domain()).then(|| self.bundle.clone());
        match validate(end_entity, intermediates, bundle_of, PeerRole::Server, now) {
            Ok(peer) if peer.id == self.id => Ok(ServerCertVerified::assertion()),
            Ok(peer) => Err(refused(format!("the endpoint is {}, not {}", peer.id, self.id))),
            Err(error) => Err(refused(error.to_string())),
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        verify_tls12_signature(message, cert, dss, algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        verify_tls13_signature(message, cert, dss, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

/// An error that says why, and reaches the peer as the alert `bad_certificate`.
fn refused(why: String) -> rustls::Error {
    let why: Box<dyn std::error::Error + Send + Sync> = why.into();
    rustls::Error::InvalidCertificate(CertificateError::Other(rustls::OtherError(Arc::from(why))))
}
