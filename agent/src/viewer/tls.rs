//! TLS of the observer's listener: its certificate, and whom clients prove to be by theirs.
//!
//! TLS 1.3 only, ALPN `h2`. A client may show a certificate or none; one that is no valid SVID of
//! a trusted domain ends the handshake, so that nobody is taken for a client without one.

use std::{
    fmt, io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use jiff::Timestamp;
use rustls::{
    CertificateError, DigitallySignedStruct, DistinguishedName, ServerConfig, SignatureScheme,
    client::danger::HandshakeSignatureValid,
    crypto::{CryptoProvider, aws_lc_rs},
    pki_types::{CertificateDer, PrivateKeyDer, UnixTime, pem::PemObject as _},
    server::{
        NoServerSessionStorage,
        danger::{ClientCertVerified, ClientCertVerifier},
    },
    sign::{CertifiedKey, SingleCertAndKey},
};

use crate::{
    spiffe::{
        SpiffeId, Svid,
        validate::{PeerRole, ValidationError, validate},
    },
    svid::SvidHandle,
    trust::Trust,
};

/// Files are looked at again after this.
const LOOK_AGAIN: Duration = Duration::from_secs(10);
/// The largest certificate or key file, bytes.
const MAX_FILE: u64 = 256 * 1024;

/// Why there is no certificate to serve with.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ServingError {
    /// The authority has given none yet.
    #[error("there is no SVID of {0} yet; signet status says whether the authority answers")]
    NoSvid(SpiffeId),
    /// It ran out.
    #[error("the SVID of {id} ran out at {not_after}; signet status says why it is not renewed")]
    Expired {
        /// Whose.
        id: SpiffeId,
        /// When.
        not_after: Timestamp,
    },
    /// A file cannot be read.
    #[error("{key}: {}: {source}", path.display())]
    Unreadable {
        /// The configuration's key.
        key: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A file holds something else.
    #[error("{key}: {}: {why}; it must hold {expected}", path.display())]
    Malformed {
        /// The configuration's key.
        key: &'static str,
        /// The file.
        path: PathBuf,
        /// What should be there.
        expected: &'static str,
        /// What is wrong.
        why: String,
    },
    /// Certificate and key do not go together, or the library cannot use them.
    #[error("the certificate cannot be used for TLS: {0}")]
    Unusable(#[from] rustls::Error),
}

/// Where the listener's certificate comes from.
pub enum Serving {
    /// The SVID of an identity of this node.
    Svid(SvidHandle, SpiffeId),
    /// Files.
    Files(Box<Files>),
}

impl Serving {
    /// The certificate as it is now.
    ///
    /// # Errors
    /// Why there is none.
    pub fn current(&self) -> Result<Arc<SingleCertAndKey>, ServingError> {
        match self {
            Self::Svid(svids, id) => {
                let svid = svids.get(id).ok_or_else(|| ServingError::NoSvid(id.clone()))?;
                of_svid(&svid)
            }
            Self::Files(files) => files.current(Instant::now()),
        }
    }
}

impl fmt::Debug for Serving {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Svid(_, id) => write!(f, "Svid({id})"),
            Self::Files(files) => write!(f, "Files({})", files.certificate.display()),
        }
    }
}

fn of_svid(svid: &Svid) -> Result<Arc<SingleCertAndKey>, ServingError> {
    if !svid.is_valid_at(Timestamp::now()) {
        return Err(ServingError::Expired { id: svid.id.clone(), not_after: svid.not_after });
    }
    Ok(certified(svid.chain_der.clone(), svid.private_key())?)
}

fn certified(
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
) -> Result<Arc<SingleCertAndKey>, rustls::Error> {
    // Refuses a key that is another certificate's.
    Ok(Arc::new(CertifiedKey::from_der(chain, key, &provider())?.into()))
}

/// A certificate in files.
pub struct Files {
    certificate: PathBuf,
    key: PathBuf,
    read: Mutex<Option<(Instant, Arc<SingleCertAndKey>)>>,
}

impl Files {
    /// Nothing is read yet.
    pub fn new(certificate: PathBuf, key: PathBuf) -> Self {
        Self { certificate, key, read: Mutex::default() }
    }

    /// As they were a moment ago. A pair that cannot be used while it is being replaced does
    /// not take the place of one that can.
    fn current(&self, now: Instant) -> Result<Arc<SingleCertAndKey>, ServingError> {
        let mut read = self.read.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((at, pair)) = &*read
            && now.saturating_duration_since(*at) < LOOK_AGAIN
        {
            return Ok(pair.clone());
        }
        let pair = match (self.load(), read.take()) {
            (Ok(pair), _) => pair,
            (Err(error), Some((_, old))) => {
                tracing::error!(%error, "the observer's certificate is not read again");
                old
            }
            (Err(error), None) => return Err(error),
        };
        *read = Some((now, pair.clone()));
        Ok(pair)
    }

    fn load(&self) -> Result<Arc<SingleCertAndKey>, ServingError> {
        let malformed = |key, path: &Path, expected, why: String| ServingError::Malformed {
            key,
            path: path.to_owned(),
            expected,
            why,
        };
        let (key, expected) = ("observerCertFile", "PEM certificates, the leaf first");
        let text = bounded(key, &self.certificate)?;
        let chain: Vec<_> = CertificateDer::pem_slice_iter(&text)
            .collect::<Result<_, _>>()
            .map_err(|e| malformed(key, &self.certificate, expected, e.to_string()))?;
        if chain.is_empty() {
            return Err(malformed(key, &self.certificate, expected, "no certificate".into()));
        }
        let key = "observerKeyFile";
        let private = PrivateKeyDer::from_pem_slice(&bounded(key, &self.key)?)
            .map_err(|e| malformed(key, &self.key, "a PEM private key", e.to_string()))?;
        Ok(certified(chain, private)?)
    }
}

fn bounded(key: &'static str, path: &Path) -> Result<Vec<u8>, ServingError> {
    use io::Read as _;
    let unreadable = |source| ServingError::Unreadable { key, path: path.to_owned(), source };
    let mut bytes = Vec::new();
    let file = std::fs::File::open(path).map_err(unreadable)?;
    file.take(MAX_FILE + 1).read_to_end(&mut bytes).map_err(unreadable)?;
    if bytes.len() as u64 > MAX_FILE {
        let why = io::Error::other(format!("larger than {MAX_FILE} bytes"));
        return Err(unreadable(why));
    }
    Ok(bytes)
}

/// A configuration for connections that begin now.
///
/// # Errors
/// Why there is no certificate.
pub fn server_config(
    serving: &Serving,
    trust: &Arc<Trust>,
) -> Result<Arc<ServerConfig>, ServingError> {
    let mut config = ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_client_cert_verifier(Arc::new(AnySvid { trust: trust.clone() }))
        .with_cert_resolver(serving.current()?);
    config.alpn_protocols = vec![b"h2".to_vec()];
    // A resumed session would be somebody whose certificate nobody has looked at.
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    config.max_early_data_size = 0;
    Ok(Arc::new(config))
}

/// Whom a client proved to be.
#[derive(Clone)]
pub struct Client {
    chain: Arc<[CertificateDer<'static>]>,
    trust: Arc<Trust>,
}

impl Client {
    /// Who showed this chain in a handshake that succeeded; `None` without one.
    pub fn of(chain: Option<&[CertificateDer<'_>]>, trust: &Arc<Trust>) -> Option<Self> {
        let chain: Arc<[_]> = chain?.iter().map(|c| c.clone().into_owned()).collect();
        (!chain.is_empty()).then(|| Self { chain, trust: trust.clone() })
    }

    /// The identity, while its certificate is valid and its domain's bundle holds it: asked at
    /// every call, since connections outlive certificates.
    ///
    /// # Errors
    /// Why it would not be taken any more.
    pub fn identity(&self, now: Timestamp) -> Result<SpiffeId, ValidationError> {
        judge(&self.trust, &self.chain, now)
    }
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Client").finish_non_exhaustive()
    }
}

fn judge(
    trust: &Trust,
    chain: &[CertificateDer<'_>],
    now: Timestamp,
) -> Result<SpiffeId, ValidationError> {
    let (leaf, intermediates) = match chain.split_first() {
        Some((leaf, rest)) => (leaf.clone(), rest),
        // What is no certificate is refused as such.
        None => (CertificateDer::from(Vec::new()), &[][..]),
    };
    let bundle_of = |domain: &_| trust.bundle(domain);
    validate(&leaf, intermediates, bundle_of, PeerRole::Client, now).map(|peer| peer.id)
}

/// Takes any valid SVID of a trusted domain; which of them may look is said at the calls, where
/// there is an answer.
#[derive(Debug)]
struct AnySvid {
    trust: Arc<Trust>,
}

impl ClientCertVerifier for AnySvid {
    fn client_auth_mandatory(&self) -> bool {
        false
    }

    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        let now = i64::try_from(now.as_secs())
            .ok()
            .and_then(|seconds| Timestamp::from_second(seconds).ok())
            .unwrap_or(Timestamp::MAX);
        let chain: Vec<_> = std::iter::once(end_entity).chain(intermediates).cloned().collect();
        match judge(&self.trust, &chain, now) {
            Ok(_) => Ok(ClientCertVerified::assertion()),
            Err(error) => {
                tracing::warn!(%error, "a viewer's certificate is refused");
                Err(rustls::Error::InvalidCertificate(alert_of(&error)))
            }
        }
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(rustls::PeerIncompatible::Tls12NotOffered.into())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &provider().signature_verification_algorithms;
        rustls::crypto::verify_tls13_signature(message, cert, dss, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        provider().signature_verification_algorithms.supported_schemes()
    }
}

/// What the client is told.
fn alert_of(error: &ValidationError) -> CertificateError {
    match error {
        ValidationError::Expired { .. } => CertificateError::Expired,
        ValidationError::NotYetValid { .. } => CertificateError::NotValidYet,
        ValidationError::UnknownAuthority(_)
        | ValidationError::UntrustedDomain(_)
        | ValidationError::AuthorityExpired(_) => CertificateError::UnknownIssuer,
        _ => CertificateError::BadEncoding,
    }
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(aws_lc_rs::default_provider())
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeSet, fs};

    use tokio::net::{TcpListener, TcpStream};
    use tokio_rustls::TlsAcceptor;

    use super::*;
    use crate::{
        spiffe::{TrustDomain, forge::Forger},
        svid::{SvidManager, SvidParams, issuer::EmbeddedIssuer},
        tunnel::tls::{ClientTls, TlsError},
    };

    fn pem(forger: &Forger, id: &str, directory: &Path) -> (PathBuf, PathBuf) {
        let leaf = forger.leaf(id);
        let (certificate, key) = (directory.join("tls.crt"), directory.join("tls.key"));
        let chain: Vec<_> =
            leaf.chain.iter().map(|c| pem::Pem::new("CERTIFICATE", c.to_vec())).collect();
        fs::write(&certificate, pem::encode_many(&chain)).unwrap();
        let text = pem::encode(&pem::Pem::new("PRIVATE KEY", leaf.key.secret_pkcs8_der()));
        fs::write(&key, text).unwrap();
        (certificate, key)
    }

    #[test]
    fn files_are_read_again_and_broken_ones_do_not_replace_good_ones() {
        let dir = tempfile::tempdir().unwrap();
        let root = Forger::root("a");
        let (certificate, key) = pem(&root, "spiffe://cluster.local/a", dir.path());
        let files = Files::new(certificate.clone(), key.clone());
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let first = files.current(at(0)).unwrap();
        pem(&root, "spiffe://cluster.local/b", dir.path());
        assert!(Arc::ptr_eq(&first, &files.current(at(9)).unwrap()), "not at each connection");
        let second = files.current(at(10)).unwrap();
        assert!(!Arc::ptr_eq(&first, &second), "it has changed");
        fs::write(&key, "half of a ke").unwrap();
        assert!(Arc::ptr_eq(&second, &files.current(at(20)).unwrap()), "it stays");
    }

    #[test]
    fn what_files_lack_is_said_with_key_and_path() {
        let dir = tempfile::tempdir().unwrap();
        let root = Forger::root("a");
        let (certificate, key) = pem(&root, "spiffe://cluster.local/a", dir.path());
        let told = |certificate: &Path, key: &Path| {
            let files = Files::new(certificate.to_owned(), key.to_owned());
            files.current(Instant::now()).err().map(|error| error.to_string())
        };
        assert_eq!(told(&certificate, &key), None, "the control");
        let other = tempfile::tempdir().unwrap();
        let (_, others_key) = pem(&root, "spiffe://cluster.local/b", other.path());
        for (certificate, key, words) in [
            (&dir.path().join("no"), &key, ["observerCertFile", "No such file"]),
            (&certificate, &dir.path().join("no"), ["observerKeyFile", "No such file"]),
            (&key, &key, ["observerCertFile", "no certificate"]),
            (&certificate, &certificate, ["observerKeyFile", "a PEM private key"]),
            (&certificate, &others_key, ["cannot be used for TLS", ""]),
        ] {
            let told = told(certificate, key).unwrap();
            assert!(words.iter().all(|word| told.contains(word)), "{told}");
        }
        fs::write(&certificate, vec![b'x'; 300 * 1024]).unwrap();
        assert!(told(&certificate, &key).unwrap().contains("larger than"));
    }

    /// Without files the listener proves to be an identity of the node.
    #[tokio::test]
    async fn the_svid_of_an_account_serves() {
        let dir = tempfile::tempdir().unwrap();
        let domain = TrustDomain::parse("cluster.local").unwrap();
        let issuer = EmbeddedIssuer::open(&dir.path().join("a"), &domain, Duration::from_secs(600));
        let issuer = Arc::new(issuer.unwrap());
        let trust = Trust::new();
        trust.set(domain.clone(), issuer.bundle());
        let svids: SvidHandle = SvidManager::start(issuer, SvidParams::default());
        let id = |account| SpiffeId::for_service_account(&domain, "signet-system", account);
        let (agent, relay) = (id("signet-agent").unwrap(), id("relay").unwrap());
        let serving = Serving::Svid(svids.clone(), agent.clone());
        let Err(ServingError::NoSvid(missing)) = serving.current() else { panic!("served") };
        assert_eq!(missing, agent);
        svids.want(BTreeSet::from([agent.clone(), relay.clone()]));
        let mut changes = svids.subscribe();
        while svids.get(&agent).is_none() || svids.get(&relay).is_none() {
            changes.changed().await.unwrap();
        }
        let config = server_config(&serving, &trust).unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let served = trust.clone();
        let server = tokio::spawn(async move {
            let mut seen = Vec::new();
            for _ in 0..2 {
                let (stream, _) = listener.accept().await.unwrap();
                let Ok(stream) = TlsAcceptor::from(config.clone()).accept(stream).await else {
                    seen.push(None);
                    continue;
                };
                let client = Client::of(stream.get_ref().1.peer_certificates(), &served);
                seen.push(client.map(|client| client.identity(Timestamp::now()).unwrap()));
            }
            seen
        });
        let client = ClientTls::new(&svids.get(&relay).unwrap(), trust).unwrap();
        let dial = || TcpStream::connect(address);
        let (_stream, server_is) =
            client.connect(dial().await.unwrap(), std::slice::from_ref(&agent)).await.unwrap();
        assert_eq!(server_is.id, agent);
        let other = client.connect(dial().await.unwrap(), std::slice::from_ref(&relay)).await;
        assert!(matches!(other, Err(TlsError::IdentityMismatch { .. })));
        assert_eq!(server.await.unwrap(), [Some(relay), None]);
    }
}
