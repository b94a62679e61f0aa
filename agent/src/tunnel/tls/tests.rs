//! Sessions over loopback: hostile peers of every kind on either side, each with its own
//! reason, between positive controls.

use std::{collections::BTreeSet, future::Future, net::Ipv4Addr};

use rcgen::{CertificateParams, SanType};
use rustls::{
    HandshakeKind, SignatureScheme,
    client::{ClientSessionMemoryCache, ResolvesClientCert},
    pki_types::PrivateKeyDer,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpListener,
};
use tokio_rustls::{TlsAcceptor, TlsConnector};

use super::*;
use crate::spiffe::{
    Bundle, TrustDomain,
    forge::{Forged, Forger, valid},
};

pub(in crate::tunnel) const WEB: &str = "spiffe://td/ns/shop/sa/web";
const API: &str = "spiffe://td/ns/shop/sa/api";
const SOON: Duration = Duration::from_millis(300);

fn id(text: &str) -> SpiffeId {
    SpiffeId::parse(text).unwrap()
}

/// Trust in one root for `td`.
fn trust(root: &Forger) -> Arc<Trust> {
    let trust = Trust::new();
    trust.set(TrustDomain::parse("td").unwrap(), root.bundle());
    trust
}

fn server(root: &Forger) -> ServerTls {
    ServerTls::new(&root.svid(API), trust(root)).unwrap()
}

fn client(root: &Forger) -> ClientTls {
    ClientTls::new(&root.svid(WEB), trust(root)).unwrap()
}

/// Both ends of a TCP connection: (dialling, accepting).
async fn tcp() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let address = listener.local_addr().unwrap();
    let (dialled, accepted) = tokio::join!(TcpStream::connect(address), listener.accept());
    (dialled.unwrap(), accepted.unwrap().0)
}

/// Runs a server and a peer against each other; the server's answer.
async fn serve<F: Future>(
    server: &ServerTls,
    peer: impl FnOnce(TcpStream) -> F,
) -> Result<(TlsStream, PeerSvid), TlsError> {
    let (dialled, accepted) = tcp().await;
    let (served, _peer) = tokio::join!(server.accept(accepted), peer(dialled));
    served
}

/// Accepts any certificate: hostile peers do not care.
#[derive(Debug)]
struct Careless;

impl ServerCertVerifier for Careless {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        provider().signature_verification_algorithms.supported_schemes()
    }
}

/// Shows a certificate and signs with a key that need not be its own.
#[derive(Debug)]
struct Shows(Arc<CertifiedKey>);

impl Shows {
    fn new(chain: Vec<CertificateDer<'static>>, key: PrivateKeyDer<'static>) -> Arc<Self> {
        let key = provider().key_provider.load_private_key(key).unwrap();
        Arc::new(Self(Arc::new(CertifiedKey::new(chain, key))))
    }
}

impl ResolvesClientCert for Shows {
    fn resolve(&self, _: &[&[u8]], _: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        Some(Arc::clone(&self.0))
    }

    fn has_certs(&self) -> bool {
        true
    }
}

impl rustls::server::ResolvesServerCert for Shows {
    fn resolve(&self, _: rustls::server::ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(Arc::clone(&self.0))
    }
}

/// A plain rustls client that shows `forged`, to be made hostile.
pub(in crate::tunnel) fn raw_client(forged: Forged) -> ClientConfig {
    let mut config = ClientConfig::builder_with_provider(aws_lc_rs::default_provider().into())
        .with_safe_default_protocol_versions()
        .unwrap()
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Careless))
        .with_client_cert_resolver(Shows::new(forged.chain, forged.key.into()));
    config.alpn_protocols = vec![H2.to_vec()];
    config
}

/// A plain rustls server that shows `forged`, to be made hostile.
pub(in crate::tunnel) fn raw_server(forged: Forged) -> ServerConfig {
    let mut config = ServerConfig::builder_with_provider(aws_lc_rs::default_provider().into())
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_cert_resolver(Shows::new(forged.chain, forged.key.into()));
    config.alpn_protocols = vec![H2.to_vec()];
    config
}

/// Connects and reads until the server answers or refuses.
async fn raw_connect(
    config: impl Into<Arc<ClientConfig>>,
    tcp: TcpStream,
) -> io::Result<tokio_rustls::client::TlsStream<TcpStream>> {
    let name = ServerName::try_from("sni.example").unwrap();
    TlsConnector::from(config.into()).connect(name, tcp).await
}

/// Certificates that nobody may get in with, and the kind under which each is counted.
fn hostile(root: &Forger) -> Vec<(&'static str, Reason, Forged)> {
    use Reason::{SvidExpired, UntrustedPeer};
    let other = Forger::root("other");
    let names = |names: &[SanType]| {
        let names = names.to_vec();
        move |p: &mut CertificateParams| p.subject_alt_names = names
    };
    let uri = |text: &str| SanType::URI(text.try_into().unwrap());
    let dns = SanType::DnsName("web.shop".try_into().unwrap());
    let end = |from, until| move |p: &mut CertificateParams| valid(p, from, until);
    vec![
        ("other_root", UntrustedPeer, other.leaf(WEB)),
        ("expired", SvidExpired, root.leaf_with(WEB, end(-7200, -60))),
        ("not_yet_valid", UntrustedPeer, root.leaf_with(WEB, end(60, 7200))),
        ("no_san", UntrustedPeer, root.leaf_with(WEB, names(&[]))),
        ("no_uri_san", UntrustedPeer, root.leaf_with(WEB, names(&[dns]))),
        ("several_uri_sans", UntrustedPeer, root.leaf_with(WEB, names(&[uri(WEB), uri(API)]))),
        ("wrong_trust_domain", UntrustedPeer, root.leaf("spiffe://other/ns/shop/sa/web")),
        ("not_a_spiffe_id", UntrustedPeer, root.leaf("https://td/ns/shop/sa/web")),
    ]
}

#[tokio::test]
async fn a_session_carries_bytes_both_ways_and_names_both_peers() {
    let root = Forger::root("root");
    let (dialled, accepted) = tcp().await;
    let (client, server) = (client(&root), server(&root));
    let expected = [id(API)];
    let (connected, served) =
        tokio::join!(client.connect(dialled, &expected), server.accept(accepted));
    let ((mut here, peer), (mut there, from)) = (connected.unwrap(), served.unwrap());
    assert_eq!((peer.id, from.id), (id(API), id(WEB)));
    assert_eq!((peer.bundle_generation, from.bundle_generation), (1, 1));
    let left = from.not_after.duration_since(Timestamp::now()).as_secs();
    assert!((3500..=3600).contains(&left), "{left}");
    assert_eq!(here.tcp().peer_addr().unwrap(), there.tcp().local_addr().unwrap());

    let session = here.session.state();
    assert_eq!(session.protocol_version(), Some(rustls::ProtocolVersion::TLSv1_3));
    let suite = session.negotiated_cipher_suite().unwrap().suite();
    assert_eq!(suite, rustls::CipherSuite::TLS13_AES_128_GCM_SHA256);
    let group = session.negotiated_key_exchange_group().unwrap().name();
    assert_eq!(group, rustls::NamedGroup::X25519MLKEM768);

    let data: Vec<u8> =
        (0..8 << 20).map(|i: u32| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    let copy = data.clone();
    let echo = tokio::spawn(async move {
        let mut got = vec![0; copy.len()];
        there.read_exact(&mut got).await.unwrap();
        assert!(got == copy);
        there.write_all(&got).await.unwrap();
        there.shutdown().await.unwrap();
        assert_eq!(there.read(&mut [0]).await.unwrap(), 0, "the client's close_notify");
    });
    here.write_all(&data).await.unwrap();
    here.flush().await.unwrap();
    let mut back = Vec::new();
    here.read_to_end(&mut back).await.unwrap();
    assert!(back == data);
    here.shutdown().await.unwrap();
    echo.await.unwrap();
}

#[tokio::test]
async fn a_connection_cut_off_is_an_error_not_an_end() {
    let root = Forger::root("root");
    let (dialled, accepted) = tcp().await;
    let (client, server, expected) = (client(&root), server(&root), [id(API)]);
    let (connected, served) =
        tokio::join!(client.connect(dialled, &expected), server.accept(accepted));
    let ((mut here, _), (mut there, _)) = (connected.unwrap(), served.unwrap());
    there.write_all(b"half").await.unwrap();
    there.flush().await.unwrap();
    drop(there);
    let mut got = Vec::new();
    let error = here.read_to_end(&mut got).await.unwrap_err();
    assert_eq!((got.as_slice(), error.kind()), (b"half".as_slice(), io::ErrorKind::UnexpectedEof));
}

#[tokio::test]
async fn hostile_clients() {
    let root = Forger::root("root");
    let server = server(&root);
    let control = || serve(&server, |tcp| raw_connect(raw_client(root.leaf(WEB)), tcp));
    assert_eq!(control().await.unwrap().1.id, id(WEB));
    let mut kinds = BTreeSet::new();
    for (kind, reason, forged) in hostile(&root) {
        let error = serve(&server, |tcp| raw_connect(raw_client(forged), tcp)).await.unwrap_err();
        assert_eq!((error.kind(), error.reason()), (kind, reason), "{error}");
        assert!(kinds.insert(kind), "{kind} counts two things");
    }
    assert_eq!(control().await.unwrap().1.id, id(WEB));
}

#[tokio::test]
async fn hostile_servers() {
    let root = Forger::root("root");
    let client = client(&root);
    let expected = [id("spiffe://td/ns/shop/sa/other"), id(WEB)];
    let connect = async |config: ServerConfig| {
        let (dialled, accepted) = tcp().await;
        let acceptor = TlsAcceptor::from(Arc::new(config));
        let (connected, _) =
            tokio::join!(client.connect(dialled, &expected), acceptor.accept(accepted));
        connected.map(|(_, peer)| peer.id)
    };
    assert_eq!(connect(raw_server(root.leaf(WEB))).await.unwrap(), id(WEB));
    for (kind, reason, forged) in hostile(&root) {
        let error = connect(raw_server(forged)).await.unwrap_err();
        assert_eq!((error.kind(), error.reason()), (kind, reason), "{error}");
    }
    // A good SVID, but somebody else's.
    let error = connect(raw_server(root.leaf(API))).await.unwrap_err();
    assert_eq!((error.kind(), error.reason()), ("identity_mismatch", Reason::IdentityMismatch));
    assert!(matches!(error, TlsError::IdentityMismatch { found, .. } if found == id(API)));

    let mut stolen = root.leaf(WEB);
    stolen.key = root.leaf(WEB).key;
    let error = connect(raw_server(stolen)).await.unwrap_err();
    assert_eq!((error.kind(), error.reason()), ("bad_signature", Reason::UntrustedPeer));
    for protocols in [vec![], vec![b"http/1.1".to_vec()]] {
        let mut no_h2 = raw_server(root.leaf(WEB));
        no_h2.alpn_protocols = protocols;
        let error = connect(no_h2).await.unwrap_err();
        assert_eq!((error.kind(), error.reason()), ("alpn_missing", Reason::HandshakeFailed));
    }
    assert_eq!(connect(raw_server(root.leaf(WEB))).await.unwrap(), id(WEB));
}

#[tokio::test]
async fn nobody_expected_is_nobody_accepted() {
    let root = Forger::root("root");
    let (client, server) = (client(&root), server(&root));
    let (dialled, accepted) = tcp().await;
    let (connected, served) = tokio::join!(client.connect(dialled, &[]), server.accept(accepted));
    assert_eq!(connected.unwrap_err().kind(), "identity_mismatch");
    assert_eq!(served.unwrap_err().kind(), "refused_by_peer", "before the client's Finished");
}

#[tokio::test]
async fn clients_that_do_not_fit() {
    let root = Forger::root("root");
    let server = server(&root);
    let refused = async |config: ClientConfig| {
        let error = serve(&server, |tcp| raw_connect(config, tcp)).await.unwrap_err();
        (error.kind(), error.reason())
    };
    let raw = || raw_client(root.leaf(WEB));

    let mut anonymous = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Careless))
        .with_no_client_auth();
    anonymous.alpn_protocols = vec![H2.to_vec()];
    assert_eq!(refused(anonymous).await, ("no_certificate", Reason::UntrustedPeer));

    let mut stolen = root.leaf(WEB);
    stolen.key = root.leaf(WEB).key;
    assert_eq!(refused(raw_client(stolen)).await, ("bad_signature", Reason::UntrustedPeer));

    for protocols in [vec![], vec![b"http/1.1".to_vec()]] {
        let mut config = raw();
        config.alpn_protocols = protocols;
        assert_eq!(refused(config).await, ("alpn_missing", Reason::HandshakeFailed));
    }

    let leaf = root.leaf(WEB);
    let mut old = ClientConfig::builder_with_provider(aws_lc_rs::default_provider().into())
        .with_protocol_versions(&[&rustls::version::TLS12])
        .unwrap()
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Careless))
        .with_client_cert_resolver(Shows::new(leaf.chain, leaf.key.into()));
    old.alpn_protocols = vec![H2.to_vec()];
    assert_eq!(refused(old).await, ("tls_incompatible", Reason::HandshakeFailed));

    assert!(serve(&server, |tcp| raw_connect(raw(), tcp)).await.is_ok());
}

#[tokio::test]
async fn bytes_that_are_no_handshake() {
    let root = Forger::root("root");
    let patient = server(&root);
    let hasty = server(&root).with_timeout(SOON);
    let send = async |server: &ServerTls, bytes: &[u8], stay: bool| {
        let peer = |mut tcp: TcpStream| async move {
            let _ = tcp.write_all(bytes).await;
            if stay {
                let _ = tcp.read_to_end(&mut Vec::new()).await;
            }
        };
        let started = time::Instant::now();
        let error = serve(server, peer).await.unwrap_err();
        assert_eq!(error.reason(), Reason::HandshakeFailed);
        (error.kind(), started.elapsed())
    };
    let garbage: Vec<u8> =
        (0..1 << 20).map(|i: u32| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    for bytes in [
        b"GET / HTTP/1.1\r\nHost: payments\r\n\r\n".as_slice(),
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"CONNECT 10.0.0.1:80 HTTP/1.1\r\n\r\n",
        &[0; 64],
        &[0xff; 64],
        &[0x16, 3, 1, 0, 4, 0xff, 0xff, 0xff, 0xff],
        &garbage,
    ] {
        let shown = String::from_utf8_lossy(&bytes[..bytes.len().min(16)]);
        // The peer stays: without an answer at once this would be a timeout.
        assert_eq!(send(&patient, bytes, true).await.0, "not_tls", "{shown:?}");
    }
    assert_eq!(send(&patient, b"", false).await.0, "closed");
    assert_eq!(send(&patient, &[0x16, 3, 1, 0, 200, 1], false).await.0, "closed");
    for stalled in [b"".as_slice(), &[0x16], &[0x16, 3, 1, 0, 200, 1, 0]] {
        let (kind, took) = send(&hasty, stalled, true).await;
        assert_eq!(kind, "timeout");
        assert!(took >= SOON && took < HANDSHAKE_TIMEOUT);
    }
    let control = serve(&patient, |tcp| raw_connect(raw_client(root.leaf(WEB)), tcp)).await;
    assert!(control.is_ok());
}

#[tokio::test]
async fn a_client_waits_only_so_long_and_knows_what_is_no_tls() {
    let root = Forger::root("root");
    let client = client(&root);
    let (dialled, silent) = tcp().await;
    let hasty = client.clone().with_timeout(SOON);
    let error = hasty.connect(dialled, &[id(API)]).await.unwrap_err();
    assert_eq!((error.kind(), error.reason()), ("timeout", Reason::HandshakeFailed));
    drop(silent);
    let (dialled, mut plain) = tcp().await;
    plain.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n").await.unwrap();
    assert_eq!(client.connect(dialled, &[id(API)]).await.unwrap_err().kind(), "not_tls");
    let (dialled, gone) = tcp().await;
    drop(gone);
    assert_eq!(client.connect(dialled, &[id(API)]).await.unwrap_err().kind(), "closed");
}

/// The extensions of the ClientHello that waits in a socket, by number.
async fn client_hello(tcp: &TcpStream) -> Vec<(u16, Vec<u8>)> {
    let mut buf = vec![0; 16 * 1024];
    let length = loop {
        let n = tcp.peek(&mut buf).await.unwrap();
        if n >= 5 && n >= 5 + usize::from(u16::from_be_bytes([buf[3], buf[4]])) {
            break n;
        }
        assert!(n > 0, "the client left");
        time::sleep(Duration::from_millis(1)).await;
    };
    let mut rest = &buf[5..length];
    let mut take = |n: usize| {
        let (taken, left) = rest.split_at(n);
        rest = left;
        taken.to_vec()
    };
    take(4 + 2 + 32); // handshake header, version, random
    let session = take(1)[0];
    take(session.into());
    let suites = take(2);
    take(u16::from_be_bytes([suites[0], suites[1]]).into());
    let compression = take(1)[0];
    take(compression.into());
    let total = take(2);
    let mut total = usize::from(u16::from_be_bytes([total[0], total[1]]));
    let mut extensions = Vec::new();
    while total > 0 {
        let head = take(4);
        let length = usize::from(u16::from_be_bytes([head[2], head[3]]));
        extensions.push((u16::from_be_bytes([head[0], head[1]]), take(length)));
        total -= 4 + length;
    }
    extensions
}

fn offers(hello: &[(u16, Vec<u8>)], extension: u16) -> bool {
    hello.iter().any(|(number, _)| *number == extension)
}

const SERVER_NAME: u16 = 0;
const ALPN: u16 = 16;
const PRE_SHARED_KEY: u16 = 41;
const EARLY_DATA: u16 = 42;
const SUPPORTED_VERSIONS: u16 = 43;
const KEY_SHARE: u16 = 51;

#[tokio::test]
async fn our_client_hello_says_no_more_than_it_must() {
    let root = Forger::root("root");
    let (dialled, accepted) = tcp().await;
    let (client, expected) = (client(&root), [id(API)]);
    let connecting = tokio::spawn(async move { client.connect(dialled, &expected).await });
    let hello = client_hello(&accepted).await;
    connecting.abort();
    for absent in [SERVER_NAME, PRE_SHARED_KEY, EARLY_DATA] {
        assert!(!offers(&hello, absent), "{absent}");
    }
    let extension = |number| &hello.iter().find(|(n, _)| *n == number).unwrap().1[..];
    assert_eq!(extension(ALPN), b"\x00\x0c\x08signet/1\x02h2");
    assert_eq!(extension(SUPPORTED_VERSIONS), [2, 3, 4], "TLS 1.3 only");
    assert_eq!(extension(KEY_SHARE)[2..4], [0x11, 0xec], "X25519MLKEM768 first");
}

#[tokio::test]
async fn a_ticket_offered_is_not_taken_and_none_is_given() {
    let root = Forger::root("root");
    let ours = server(&root);
    let mut config = raw_client(root.leaf(WEB));
    config.resumption = Resumption::store(Arc::new(ClientSessionMemoryCache::new(8)));
    let config = Arc::new(config);

    /// One connection: did the client offer a ticket, and what became of it?
    async fn once<F: Future<Output = ()> + Send + 'static>(
        config: &Arc<ClientConfig>,
        accept: impl FnOnce(TcpStream) -> F,
    ) -> (bool, HandshakeKind) {
        let (dialled, accepted) = tcp().await;
        let config = Arc::clone(config);
        let connecting = tokio::spawn(async move {
            let mut stream = raw_connect(config, dialled).await.unwrap();
            // Tickets come with the first bytes.
            let mut byte = [0];
            stream.read_exact(&mut byte).await.unwrap();
            stream.get_ref().1.handshake_kind().unwrap()
        });
        let offered = offers(&client_hello(&accepted).await, PRE_SHARED_KEY);
        accept(accepted).await;
        (offered, connecting.await.unwrap())
    }

    // The control: a server that gives tickets, and takes them.
    let generous = TlsAcceptor::from(Arc::new(raw_server(root.leaf(API))));
    let to_generous = || {
        once(&config, |tcp| {
            let generous = generous.clone();
            async move { generous.accept(tcp).await.unwrap().write_all(b"x").await.unwrap() }
        })
    };
    let to_ours = || {
        once(&config, |tcp| {
            let ours = ours.clone();
            async move {
                let (mut stream, peer) = ours.accept(tcp).await.unwrap();
                assert_eq!(peer.id, id(WEB), "verified, not remembered");
                stream.write_all(b"x").await.unwrap();
            }
        })
    };
    assert_eq!(to_generous().await, (false, HandshakeKind::Full));
    assert_eq!(to_generous().await, (true, HandshakeKind::Resumed));
    assert_eq!(to_ours().await, (true, HandshakeKind::Full), "offered, not taken");
    while to_ours().await.0 {} // the tickets are used up, one a connection
    assert_eq!(to_ours().await, (false, HandshakeKind::Full), "none was given");
}

#[tokio::test]
async fn trust_is_followed_live() {
    let (old, new) = (Forger::root("old"), Forger::root("new"));
    let trust = trust(&old);
    let server = ServerTls::new(&old.svid(API), Arc::clone(&trust)).unwrap();
    let from = |root: &Forger| {
        let config = raw_client(root.leaf(WEB));
        serve(&server, |tcp| raw_connect(config, tcp))
    };
    assert_eq!(from(&old).await.unwrap().1.bundle_generation, 1);
    assert_eq!(from(&new).await.unwrap_err().kind(), "other_root");
    let td = TrustDomain::parse("td").unwrap();
    trust.set(
        td.clone(),
        Bundle::from_der([old.certificate.clone(), new.certificate.clone()]).unwrap(),
    );
    assert_eq!(from(&old).await.unwrap().1.bundle_generation, 2);
    assert_eq!(from(&new).await.unwrap().1.bundle_generation, 2);
    trust.set(td.clone(), new.bundle());
    assert_eq!(from(&old).await.unwrap_err().kind(), "other_root");
    trust.remove(&td);
    assert_eq!(from(&new).await.unwrap_err().kind(), "wrong_trust_domain");
}

#[tokio::test]
async fn our_own_expired_svid_is_not_used() {
    let root = Forger::root("root");
    let expired = || root.leaf_with(WEB, |p| valid(p, -7200, -60)).into_svid();
    let (dialled, accepted) = tcp().await;
    let client = ClientTls::new(&expired(), trust(&root)).unwrap();
    let error = client.connect(dialled, &[id(API)]).await.unwrap_err();
    assert_eq!((error.kind(), error.reason()), ("own_expired", Reason::SvidExpired));
    let server = ServerTls::new(&expired(), trust(&root)).unwrap();
    assert_eq!(server.accept(accepted).await.unwrap_err().kind(), "own_expired");
}

#[tokio::test]
async fn the_refused_client_learns_why() {
    let root = Forger::root("root");
    let server = server(&root);
    let told = async |forged: Forged| {
        let (dialled, accepted) = tcp().await;
        let client = async {
            let mut stream = raw_connect(raw_client(forged), dialled).await.unwrap();
            TlsError::of_io(stream.read(&mut [0]).await.unwrap_err())
        };
        let (served, told) = tokio::join!(server.accept(accepted), client);
        served.unwrap_err();
        match told {
            TlsError::RefusedByPeer(alert) => alert,
            other => panic!("{other}"),
        }
    };
    let expired = root.leaf_with(WEB, |p| valid(p, -7200, -60));
    assert_eq!(told(expired).await, AlertDescription::CertificateExpired);
    assert_eq!(told(Forger::root("other").leaf(WEB)).await, AlertDescription::UnknownCA);
    let no_san = root.leaf_with(WEB, |p| p.subject_alt_names.clear());
    assert_eq!(told(no_san).await, AlertDescription::BadCertificate);
}

#[tokio::test]
async fn h2_runs_over_it() {
    let root = Forger::root("root");
    let (dialled, accepted) = tcp().await;
    let (client, server, expected) = (client(&root), server(&root), [id(API)]);
    let (connected, served) =
        tokio::join!(client.connect(dialled, &expected), server.accept(accepted));
    let ((here, _), (there, _)) = (connected.unwrap(), served.unwrap());
    let serving = tokio::spawn(async move {
        let mut connection = h2::server::handshake(there).await.unwrap();
        let (request, mut respond) = connection.accept().await.unwrap().unwrap();
        assert_eq!(request.method(), http::Method::CONNECT);
        respond.send_response(http::Response::new(()), true).unwrap();
        while connection.accept().await.is_some() {}
    });
    let (mut send, connection) = h2::client::handshake(here).await.unwrap();
    let driving = tokio::spawn(connection);
    let request = http::Request::builder().method("CONNECT").uri("10.0.0.1:80").body(()).unwrap();
    let (response, _) = send.send_request(request, true).unwrap();
    assert_eq!(response.await.unwrap().status(), 200);
    drop(send);
    driving.await.unwrap().unwrap();
    serving.await.unwrap();
}
