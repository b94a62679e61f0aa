//! Mutual TLS between SVIDs: beside `session.rs`, which moves the bytes, the only file that
//! names rustls' connection types.
//!
//! TLS 1.3 only, both sides' certificates, ALPN demanded (`signet/1` before `h2`), no SNI, no
//! resumption, no tickets, no early data. Every handshake has a verifier of its own, which holds the peer's
//! chain against the bundle of *its* trust domain (see [`crate::spiffe::validate`]) and, for
//! a client, against the identities that the destination may have, before the client's
//! Finished leaves. Signatures are the crypto provider's.

use std::{
    io,
    pin::Pin,
    sync::{Arc, Mutex, OnceLock, PoisonError},
    task::{Context, Poll},
    time::Duration,
};

use jiff::Timestamp;
use rustls::{
    AlertDescription, CertificateError, ClientConfig, DigitallySignedStruct, DistinguishedName,
    ServerConfig, SignatureScheme,
    client::{
        Resumption, UnbufferedClientConnection,
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    },
    crypto::{CryptoProvider, aws_lc_rs},
    pki_types::{CertificateDer, ServerName, UnixTime},
    server::{
        NoServerSessionStorage, UnbufferedServerConnection,
        danger::{ClientCertVerified, ClientCertVerifier},
    },
    sign::{CertifiedKey, SingleCertAndKey},
};
use signet_ebpf::abi::Reason;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
    time,
};

use super::session::{Session, Side};
use crate::{
    config::values::TunnelWire,
    spiffe::{
        SpiffeId, Svid,
        validate::{PeerRole, ValidationError, validate},
    },
    trust::Trust,
};

/// ALPN of HBONE.
const H2: &[u8] = b"h2";
/// ALPN of the native wire.
const NATIVE: &[u8] = b"signet/1";
/// A handshake that takes longer has failed.
pub const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);

/// The client's side, of one source identity.
#[derive(Clone)]
pub struct ClientTls {
    config: ClientConfig,
    own: Own,
}

/// The server's side, of one destination identity.
#[derive(Clone)]
pub struct ServerTls {
    certificate: Arc<SingleCertAndKey>,
    own: Own,
}

/// What a session carries, as both sides have agreed.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Wire {
    /// [`super::hbone`]: ALPN `h2`.
    Hbone,
    /// [`super::native`]: ALPN `signet/1`.
    Native,
}

/// The protocols that a side offers or takes, the preferred one first.
fn protocols(wires: TunnelWire) -> Vec<Vec<u8>> {
    match wires {
        TunnelWire::Auto => vec![NATIVE.to_vec(), H2.to_vec()],
        TunnelWire::Native => vec![NATIVE.to_vec()],
        TunnelWire::Hbone => vec![H2.to_vec()],
    }
}

/// What both sides know about themselves.
#[derive(Clone)]
struct Own {
    /// The wires to agree on.
    wires: TunnelWire,
    id: SpiffeId,
    not_after: Timestamp,
    trust: Arc<Trust>,
    timeout: Duration,
}

/// Who the other side has proved to be.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PeerSvid {
    /// Its identity.
    pub id: SpiffeId,
    /// When its certificate (or an intermediate of its chain) runs out: no new flow afterwards.
    pub not_after: Timestamp,
    /// [`Trust::generation`] under which it was verified: after a change, no new flow.
    pub bundle_generation: u64,
    /// As it was presented, leaf first, to be verified again when a bundle changes.
    chain: Arc<[CertificateDer<'static>]>,
    role: PeerRole,
}

impl PeerSvid {
    /// Verifies the same chain under the bundles as they are now.
    ///
    /// # Errors
    /// Why it would not be taken any more.
    pub fn verify_again(&self, trust: &Trust, now: Timestamp) -> Result<(), ValidationError> {
        let (leaf, intermediates) = self.chain.split_first().ok_or_else(|| {
            // Never: a session whose peer showed no certificate does not exist.
            ValidationError::UntrustedDomain(self.id.clone())
        })?;
        validate(leaf, intermediates, |domain| trust.bundle(domain), self.role, now).map(drop)
    }

    /// Waits until a bundle changes so that the peer would not be taken any more.
    pub async fn distrusted(&self, trust: &Trust) -> ValidationError {
        let mut changes = trust.subscribe();
        let mut seen = self.bundle_generation;
        loop {
            let changed = changes.wait_for(|&now| now != seen).await.map(|now| *now);
            let Ok(generation) = changed else {
                // Trust is gone, with the whole agent.
                return std::future::pending().await;
            };
            seen = generation;
            match self.verify_again(trust, Timestamp::now()) {
                // Out of its time, it takes no new flow; that is no reason to end those open.
                Ok(()) | Err(ValidationError::Expired { .. }) => {}
                Err(error) => return error,
            }
        }
    }
}

/// Why there is no session with the peer.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TlsError {
    /// The peer's chain is not a valid SVID of a trusted domain.
    #[error(transparent)]
    Validation(#[from] ValidationError),
    /// The server is somebody else.
    #[error(
        "the peer is {found}, which the destination may not be (expected {expected:?}); its address may have passed to another pod"
    )]
    IdentityMismatch {
        /// The proven identity.
        found: SpiffeId,
        /// The identities that the destination may have.
        expected: Vec<SpiffeId>,
    },
    /// The peer showed no certificate.
    #[error("the peer presented no certificate; tunnels are mutual, it must present its SVID")]
    NoCertificate,
    /// The peer does not hold the key of the certificate that it shows.
    #[error("the peer did not prove that it holds its certificate's key: its signature is wrong")]
    BadSignature,
    /// Not TLS at all.
    #[error("the peer does not speak TLS ({0}); port 15008 accepts tunnels only")]
    NotTls(String),
    /// TLS, but not ours.
    #[error("the peer's TLS does not fit ({0}); TLS 1.3 with an AES-GCM suite is needed")]
    Incompatible(String),
    /// No wire in common.
    #[error(
        "the peer did not agree on a wire; it must offer ALPN signet/1 or h2 (HBONE), as `tunnel` allows on both sides"
    )]
    AlpnMissing,
    /// The peer sent an alert.
    #[error("the peer refused the handshake with the alert {0:?}; its log says why")]
    RefusedByPeer(AlertDescription),
    /// The peer broke the protocol.
    #[error("the peer broke the TLS protocol: {0}")]
    Protocol(rustls::Error),
    /// The peer left.
    #[error("the peer closed the connection during the handshake")]
    Closed,
    /// The peer was too slow.
    #[error("the handshake did not complete within {0:?}; the peer is stalled or overloaded")]
    Timeout(Duration),
    /// The socket failed.
    #[error("the connection failed during the handshake: {0}")]
    Io(io::Error),
    /// Our own SVID has run out.
    #[error(
        "this node's own SVID for {id} ran out at {not_after}; look at `signet status` for why it was not renewed"
    )]
    OwnExpired {
        /// Our identity.
        id: SpiffeId,
        /// When it ran out.
        not_after: Timestamp,
    },
    /// Our own SVID cannot be used.
    #[error("this node's own SVID for {id} cannot be used for TLS: {problem}")]
    OwnUnusable {
        /// Our identity.
        id: SpiffeId,
        /// What the library says.
        problem: rustls::Error,
    },
}

/// An authenticated, encrypted byte stream over TCP; a wire's frames run over it.
///
/// A write may leave ciphertext behind that only the next write or a *flush* sends: flush
/// before waiting for an answer.
///
/// Dropping it closes the socket without a close_notify, which the peer takes for an error;
/// [`tokio::io::AsyncWriteExt::shutdown`] ends it properly. An end of file without the
/// peer's close_notify is an error ([`io::ErrorKind::UnexpectedEof`]).
#[derive(Debug)]
pub struct TlsStream {
    session: Session<TcpStream>,
    wire: Wire,
}

impl ClientTls {
    /// The client's side for a source identity.
    pub fn new(svid: &Svid, trust: Arc<Trust>) -> Result<Self, TlsError> {
        let own = Own::new(svid, trust);
        let unusable = |problem| TlsError::OwnUnusable { id: svid.id.clone(), problem };
        let mut config = ClientConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(unusable)?
            .dangerous()
            // Replaced for each connection by one that knows whom it expects: nobody.
            .with_custom_certificate_verifier(PeerVerifier::new(&own, Some(Vec::new())))
            .with_client_auth_cert(svid.chain_der.clone(), svid.private_key())
            .map_err(unusable)?;
        config.alpn_protocols = protocols(own.wires);
        config.enable_sni = false;
        config.resumption = Resumption::disabled();
        config.enable_early_data = false;
        Ok(Self { config, own })
    }

    /// The same with another limit for a handshake's duration.
    pub fn with_timeout(mut self, timeout: Duration) -> Self {
        self.own.timeout = timeout;
        self
    }

    /// The same, offering these wires; both without it.
    pub fn with_wires(mut self, wires: TunnelWire) -> Self {
        self.own.wires = wires;
        self.config.alpn_protocols = protocols(wires);
        self
    }

    /// Makes a session with a server that must be one of `expected`.
    pub async fn connect(
        &self,
        tcp: TcpStream,
        expected: &[SpiffeId],
    ) -> Result<(TlsStream, PeerSvid), TlsError> {
        self.own.check_validity()?;
        let verifier = PeerVerifier::new(&self.own, Some(expected.to_vec()));
        let mut config = self.config.clone();
        config.dangerous().set_certificate_verifier(Arc::clone(&verifier) as _);
        // Never sent (no SNI) and never verified: the identity is the SPIFFE ID.
        let address = tcp.peer_addr().map_err(TlsError::Io)?.ip();
        let name = ServerName::IpAddress(address.into());
        let client =
            UnbufferedClientConnection::new(Arc::new(config), name).map_err(TlsError::Protocol)?;
        self.own.complete(tcp, Side::Client(Box::new(client)), &verifier).await
    }
}

impl ServerTls {
    /// The server's side for a destination identity.
    pub fn new(svid: &Svid, trust: Arc<Trust>) -> Result<Self, TlsError> {
        let unusable = |problem| TlsError::OwnUnusable { id: svid.id.clone(), problem };
        let certified =
            CertifiedKey::from_der(svid.chain_der.clone(), svid.private_key(), &provider())
                .map_err(unusable)?;
        let server = Self { certificate: Arc::new(certified.into()), own: Own::new(svid, trust) };
        server.config(&PeerVerifier::new(&server.own, None)).map_err(unusable)?;
        Ok(server)
    }

    /// The same with another limit for a handshake's duration.
    pub fn with_timeout(mut self, timeout: Duration) -> Self {
        self.own.timeout = timeout;
        self
    }

    /// The same, taking these wires; both without it.
    pub fn with_wires(mut self, wires: TunnelWire) -> Self {
        self.own.wires = wires;
        self
    }

    /// Makes a session with a client of any trusted domain.
    pub async fn accept(&self, tcp: TcpStream) -> Result<(TlsStream, PeerSvid), TlsError> {
        self.own.check_validity()?;
        let verifier = PeerVerifier::new(&self.own, None);
        let config = self
            .config(&verifier)
            .map_err(|problem| TlsError::OwnUnusable { id: self.own.id.clone(), problem })?;
        let server =
            UnbufferedServerConnection::new(Arc::new(config)).map_err(TlsError::Protocol)?;
        self.own.complete(tcp, Side::Server(Box::new(server)), &verifier).await
    }

    /// A configuration for one connection: rustls takes the client's verifier only when it
    /// builds one. The parsed key is shared.
    fn config(&self, verifier: &Arc<PeerVerifier>) -> Result<ServerConfig, rustls::Error> {
        let mut config = ServerConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .with_client_cert_verifier(Arc::clone(verifier) as _)
            .with_cert_resolver(Arc::clone(&self.certificate) as _);
        config.alpn_protocols = protocols(self.own.wires);
        config.ignore_client_order = true;
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
        config.max_early_data_size = 0;
        Ok(config)
    }
}

impl Own {
    fn new(svid: &Svid, trust: Arc<Trust>) -> Self {
        let (id, not_after) = (svid.id.clone(), svid.not_after);
        Self { wires: TunnelWire::Auto, id, not_after, trust, timeout: HANDSHAKE_TIMEOUT }
    }

    fn check_validity(&self) -> Result<(), TlsError> {
        if Timestamp::now() <= self.not_after {
            return Ok(());
        }
        Err(TlsError::OwnExpired { id: self.id.clone(), not_after: self.not_after })
    }

    /// Runs a handshake to its end: a session with a verified peer, or the one reason.
    async fn complete(
        &self,
        tcp: TcpStream,
        side: Side,
        verifier: &PeerVerifier,
    ) -> Result<(TlsStream, PeerSvid), TlsError> {
        let mut session = Session::new(tcp, side);
        let done = time::timeout(self.timeout, session.handshake())
            .await
            .map_err(|_| TlsError::Timeout(self.timeout))?;
        let peer = match (done, verifier.take()) {
            (_, Some(Err(refusal))) => return Err(refusal),
            (Err(e), _) => return Err(TlsError::of_io(e)),
            (Ok(()), Some(Ok(peer))) => peer,
            // A session whose peer nobody has verified must not exist.
            (Ok(()), None) => return Err(TlsError::NoCertificate),
        };
        let wire = match session.state().alpn_protocol() {
            Some(H2) => Wire::Hbone,
            Some(NATIVE) => Wire::Native,
            _ => return Err(TlsError::AlpnMissing),
        };
        Ok((TlsStream { session, wire }, peer))
    }
}

impl TlsStream {
    /// The socket below, for its addresses and options; reading or writing it breaks the session.
    pub fn tcp(&self) -> &TcpStream {
        self.session.io()
    }

    /// What both sides have agreed that it carries.
    pub fn wire(&self) -> Wire {
        self.wire
    }
}

impl AsyncRead for TlsStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.session).poll_read(cx, buf)
    }
}

impl AsyncWrite for TlsStream {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.session).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.session).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.session.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.session).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.session).poll_shutdown(cx)
    }
}

impl TlsError {
    /// The verdict's reason.
    pub const fn reason(&self) -> Reason {
        match self {
            Self::Validation(e) => e.reason(),
            Self::IdentityMismatch { .. } => Reason::IdentityMismatch,
            Self::NoCertificate | Self::BadSignature => Reason::UntrustedPeer,
            Self::NotTls(_)
            | Self::Incompatible(_)
            | Self::AlpnMissing
            | Self::RefusedByPeer(_)
            | Self::Protocol(_)
            | Self::Closed
            | Self::Timeout(_)
            | Self::Io(_) => Reason::HandshakeFailed,
            Self::OwnExpired { .. } => Reason::SvidExpired,
            Self::OwnUnusable { .. } => Reason::Internal,
        }
    }

    /// A short stable name, for counters.
    pub const fn kind(&self) -> &'static str {
        match self {
            Self::Validation(e) => e.kind(),
            Self::IdentityMismatch { .. } => "identity_mismatch",
            Self::NoCertificate => "no_certificate",
            Self::BadSignature => "bad_signature",
            Self::NotTls(_) => "not_tls",
            Self::Incompatible(_) => "tls_incompatible",
            Self::AlpnMissing => "alpn_missing",
            Self::RefusedByPeer(_) => "refused_by_peer",
            Self::Protocol(_) => "tls_protocol",
            Self::Closed => "closed",
            Self::Timeout(_) => "timeout",
            Self::Io(_) => "io",
            Self::OwnExpired { .. } => "own_expired",
            Self::OwnUnusable { .. } => "own_unusable",
        }
    }

    /// What an I/O error of a [`TlsStream`] means.
    ///
    /// In TLS 1.3 a client's handshake is over before the server has judged the client's
    /// certificate: that refusal comes as an error of the first read.
    pub fn of_io(error: io::Error) -> Self {
        use rustls::Error as E;
        match error.kind() {
            io::ErrorKind::UnexpectedEof
            | io::ErrorKind::ConnectionReset
            | io::ErrorKind::ConnectionAborted
            | io::ErrorKind::BrokenPipe => return Self::Closed,
            _ => {}
        }
        match error.get_ref().and_then(|e| e.downcast_ref::<E>()) {
            None => Self::Io(error),
            Some(E::InvalidMessage(problem)) => Self::NotTls(format!("{problem:?}")),
            Some(E::PeerIncompatible(problem)) => Self::Incompatible(format!("{problem:?}")),
            Some(E::NoCertificatesPresented) => Self::NoCertificate,
            Some(E::InvalidCertificate(CertificateError::BadSignature)) => Self::BadSignature,
            Some(E::NoApplicationProtocol) => Self::AlpnMissing,
            Some(E::AlertReceived(AlertDescription::NoApplicationProtocol)) => Self::AlpnMissing,
            Some(E::AlertReceived(alert)) => Self::RefusedByPeer(*alert),
            Some(other) => Self::Protocol(other.clone()),
        }
    }
}

/// Verifies one connection's peer and keeps what came out: who it is, or why not.
#[derive(Debug)]
struct PeerVerifier {
    trust: Arc<Trust>,
    /// For a client: the identities that the server may have.
    expected: Option<Vec<SpiffeId>>,
    outcome: Mutex<Option<Result<PeerSvid, TlsError>>>,
}

impl PeerVerifier {
    fn new(own: &Own, expected: Option<Vec<SpiffeId>>) -> Arc<Self> {
        Arc::new(Self { trust: Arc::clone(&own.trust), expected, outcome: Mutex::default() })
    }

    fn take(&self) -> Option<Result<PeerSvid, TlsError>> {
        self.outcome.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// Verifies a chain; the error that rustls gets becomes the alert that the peer sees.
    fn verify(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        role: PeerRole,
        now: UnixTime,
    ) -> Result<(), rustls::Error> {
        let outcome = self.judge(leaf, intermediates, role, now);
        let answer = match &outcome {
            Ok(_) => Ok(()),
            Err(refusal) => Err(rustls::Error::InvalidCertificate(alert_of(refusal))),
        };
        *self.outcome.lock().unwrap_or_else(PoisonError::into_inner) = Some(outcome);
        answer
    }

    fn judge(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        role: PeerRole,
        now: UnixTime,
    ) -> Result<PeerSvid, TlsError> {
        // Read first: a bundle that changes in between then makes the session stale at once.
        let bundle_generation = self.trust.generation();
        let now = i64::try_from(now.as_secs())
            .ok()
            .and_then(|seconds| Timestamp::from_second(seconds).ok())
            .unwrap_or(Timestamp::MAX);
        let bundle_of = |domain: &_| self.trust.bundle(domain);
        let peer = validate(leaf, intermediates, bundle_of, role, now)?;
        if let Some(expected) = &self.expected
            && !expected.contains(&peer.id)
        {
            return Err(TlsError::IdentityMismatch { found: peer.id, expected: expected.clone() });
        }
        let chain = std::iter::once(leaf).chain(intermediates).map(|c| c.clone().into_owned());
        Ok(PeerSvid {
            id: peer.id,
            not_after: peer.not_after,
            bundle_generation,
            chain: chain.collect(),
            role,
        })
    }
}

impl ServerCertVerifier for PeerVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        self.verify(end_entity, intermediates, PeerRole::Server, now)?;
        Ok(ServerCertVerified::assertion())
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
        verify_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        provider().signature_verification_algorithms.supported_schemes()
    }
}

impl ClientCertVerifier for PeerVerifier {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        // The client has one identity and shows it; names of roots would only leak and grow.
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        self.verify(end_entity, intermediates, PeerRole::Client, now)?;
        Ok(ClientCertVerified::assertion())
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
        verify_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        provider().signature_verification_algorithms.supported_schemes()
    }
}

/// The peer holds the certificate's key: the provider's own check.
fn verify_signature(
    message: &[u8],
    cert: &CertificateDer<'_>,
    dss: &DigitallySignedStruct,
) -> Result<HandshakeSignatureValid, rustls::Error> {
    let algorithms = &provider().signature_verification_algorithms;
    rustls::crypto::verify_tls13_signature(message, cert, dss, algorithms)
}

/// What the peer is told.
fn alert_of(refusal: &TlsError) -> CertificateError {
    match refusal {
        TlsError::Validation(ValidationError::Expired { .. }) => CertificateError::Expired,
        TlsError::Validation(ValidationError::NotYetValid { .. }) => CertificateError::NotValidYet,
        TlsError::Validation(
            ValidationError::UnknownAuthority(_)
            | ValidationError::UntrustedDomain(_)
            | ValidationError::AuthorityExpired(_),
        ) => CertificateError::UnknownIssuer,
        TlsError::IdentityMismatch { .. } => CertificateError::ApplicationVerificationFailure,
        _ => CertificateError::BadEncoding,
    }
}

/// aws-lc-rs, with its choices in our order: AES-GCM before ChaCha20, and the hybrid
/// post-quantum key exchange first.
fn provider() -> Arc<CryptoProvider> {
    static PROVIDER: OnceLock<Arc<CryptoProvider>> = OnceLock::new();
    let make = || {
        use aws_lc_rs::{cipher_suite as suite, kx_group};
        Arc::new(CryptoProvider {
            cipher_suites: vec![
                suite::TLS13_AES_128_GCM_SHA256,
                suite::TLS13_AES_256_GCM_SHA384,
                suite::TLS13_CHACHA20_POLY1305_SHA256,
            ],
            kx_groups: vec![
                kx_group::X25519MLKEM768,
                kx_group::X25519,
                kx_group::SECP256R1,
                kx_group::SECP384R1,
            ],
            ..aws_lc_rs::default_provider()
        })
    };
    Arc::clone(PROVIDER.get_or_init(make))
}

#[cfg(test)]
pub(super) mod tests;
