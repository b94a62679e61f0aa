//! Hostile peers at the tunnel port: each refused for its own reason, beside a good one.

use std::{sync::Arc, time::Duration};

use http::{HeaderValue, Method, Request, StatusCode, header};
use signet_ebpf::abi::{Direction, Mode, Reason};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    time::{sleep, timeout},
};
use uuid::Uuid;

use super::{
    APP_PORT, Authority, CLIENT_IP, Net, Node, OTHER_IP, SERVER_IP, Setup, address, allow, begin,
    dropped, eventually, forwarded, identity, ip, limits, pod, world,
};
use crate::{
    config::{Limits, values::TunnelWire},
    trust::Trust,
    tunnel::{
        hbone::head::{self, Refusal},
        tls::{ClientTls, TlsStream},
    },
};

pub(super) struct Target {
    net: Net,
    pub(super) server: Node,
    authority: Authority,
    trust: Arc<Trust>,
    pub(super) app: TcpListener,
}

impl Target {
    pub(super) async fn new() -> Self {
        let net = Net::new().await;
        let authority = Authority::new();
        let frontend = pod("frontend", CLIENT_IP, Mode::Strict);
        let payments = pod("payments", SERVER_IP, Mode::Strict);
        let world = world(7, &[frontend.clone(), payments.clone()], &[&frontend, &payments]);
        let policies = vec![allow("callers", Direction::Ingress, &["frontend"])];
        let setup = Setup { pod: payments, policies, world, authentications: Vec::new() };
        let server = Node::start(&net, &authority, "node-2", &setup, |config| {
            config.handshake_timeout = Duration::from_millis(500);
            config.hbone.preface_timeout = Duration::from_millis(500);
        })
        .await;
        let trust = authority.trust();
        let app = net.listen(address(SERVER_IP, APP_PORT)).await;
        Self { net, server, authority, trust, app }
    }

    async fn tcp(&self, from: &str) -> TcpStream {
        let socket = self.net.socket(address(from, 0)).await;
        begin(socket, address(SERVER_IP, 15008)).await
    }

    /// An authenticated session as `account` from `from`.
    async fn session(&self, account: &str, from: &str) -> TlsStream {
        self.session_over(TunnelWire::Hbone, account, from).await
    }

    pub(super) async fn session_over(
        &self,
        wires: TunnelWire,
        account: &str,
        from: &str,
    ) -> TlsStream {
        let svids = self.authority.svids(account).await;
        let svid = svids.get(&identity(account)).unwrap();
        let tls = ClientTls::new(&svid, self.trust.clone()).unwrap().with_wires(wires);
        let tcp = self.tcp(from).await;
        tls.connect(tcp, &[identity("payments")]).await.unwrap().0
    }

    async fn http2(&self, account: &str, from: &str) -> h2::client::SendRequest<bytes::Bytes> {
        let session = self.session(account, from).await;
        let (send, connection) = h2::client::handshake(session).await.unwrap();
        tokio::spawn(connection);
        send
    }
}

fn connect(authority: &str) -> Request<()> {
    Request::builder().method(Method::CONNECT).uri(authority).body(()).unwrap()
}

/// Status and reason of the answer; keeps the stream open while it looks.
async fn ask(
    send: &mut h2::client::SendRequest<bytes::Bytes>,
    request: Request<()>,
) -> (StatusCode, Reason) {
    let (answer, _stream) = send.send_request(request, false).unwrap();
    let answer = timeout(Duration::from_secs(5), answer).await.unwrap().unwrap();
    match answer.status() {
        StatusCode::OK => (StatusCode::OK, Reason::Allowed),
        status => (status, Refusal::parse(&answer).reason),
    }
}

#[tokio::test]
async fn only_the_pods_own_address_and_ports_can_be_asked_for() {
    let target = Target::new().await;
    let mut send = target.http2("frontend", CLIENT_IP).await;
    let good = format!("{SERVER_IP}:{APP_PORT}");
    assert_eq!(ask(&mut send, connect(&good)).await, (StatusCode::OK, Reason::Allowed));
    target.app.accept().await.unwrap();
    for authority in [
        format!("{CLIENT_IP}:{APP_PORT}"),
        format!("{OTHER_IP}:{APP_PORT}"),
        format!("127.0.0.1:{APP_PORT}"),
        format!("127.9.9.9:{APP_PORT}"),
        format!("0.0.0.0:{APP_PORT}"),
        format!("[::1]:{APP_PORT}"),
        format!("[::]:{APP_PORT}"),
        format!("[::ffff:{SERVER_IP}]:{APP_PORT}"),
        "169.254.169.254:80".to_owned(),
        "[fe80::1]:80".to_owned(),
        "224.0.0.1:80".to_owned(),
        format!("{SERVER_IP}:15008"),
        format!("{SERVER_IP}:20001"),
        format!("{SERVER_IP}:20010"),
        format!("{SERVER_IP}:20013"),
        "payments.shop.svc:8080".to_owned(),
        "localhost:8080".to_owned(),
    ] {
        let answer = ask(&mut send, connect(&authority)).await;
        assert_eq!(answer, (StatusCode::BAD_REQUEST, Reason::WrongDestination), "{authority}");
    }
    // Beside our own ports it is an ordinary port, on which nobody listens.
    let beside = ask(&mut send, connect(&format!("{SERVER_IP}:20014"))).await;
    assert_eq!(beside, (StatusCode::SERVICE_UNAVAILABLE, Reason::AppUnreachable));
    let get = Request::builder().uri(format!("https://{good}/")).body(()).unwrap();
    assert_eq!(ask(&mut send, get).await, (StatusCode::BAD_REQUEST, Reason::ProtocolError));
    assert!(
        timeout(Duration::from_millis(50), target.app.accept()).await.is_err(),
        "none of them reached the application"
    );
    target.server.verdict("record", |r| r.reason == Reason::WrongDestination).await;
    // The connection still serves.
    assert_eq!(ask(&mut send, connect(&good)).await.0, StatusCode::OK);
}

#[tokio::test]
async fn forged_headers_change_neither_verdict_nor_what_is_shown_nor_the_record() {
    let target = Target::new().await;
    let good = format!("{SERVER_IP}:{APP_PORT}");
    // An intruder that claims to be the frontend, by address and by baggage.
    let mut intruder = target.http2("intruder", OTHER_IP).await;
    let mut forged = connect(&good);
    let claim = format!("for=\"{CLIENT_IP}:4711\"");
    forged.headers_mut().insert(header::FORWARDED, claim.parse().unwrap());
    forged.headers_mut().insert(
        head::BAGGAGE,
        HeaderValue::from_static("k8s.namespace.name=shop,k8s.pod.name=frontend-0"),
    );
    assert_eq!(ask(&mut intruder, forged).await, (StatusCode::UNAUTHORIZED, Reason::PolicyNoMatch));
    let record = target.server.verdict("denial", dropped).await;
    assert_eq!((record.source.ip, record.source.pod.clone()), (ip(OTHER_IP), None));
    assert_eq!(record.source.identity, Some(identity("intruder")));

    // The frontend itself: a foreign address in the header is ignored with its port, its
    // own address adds the port.
    let mut frontend = target.http2("frontend", CLIENT_IP).await;
    for (claimed, port) in
        [(format!("{OTHER_IP}:4711"), None), (format!("{CLIENT_IP}:4711"), Some(4711))]
    {
        let mut request = connect(&good);
        let value = format!("for=\"{claimed}\"");
        request.headers_mut().insert(header::FORWARDED, value.parse().unwrap());
        assert_eq!(ask(&mut frontend, request).await.0, StatusCode::OK);
        let shown = *target.server.kernel.shown.lock().unwrap().last().unwrap();
        assert_eq!(shown.ip(), ip(CLIENT_IP));
        assert_eq!(shown.port() == 4711, port.is_some(), "{claimed}");
    }
}

#[tokio::test]
async fn a_uuid_that_is_in_use_is_not_taken_twice() {
    let target = Target::new().await;
    let mut send = target.http2("frontend", CLIENT_IP).await;
    let uuid = Uuid::new_v4();
    let mut open = Vec::new();
    for _ in 0..2 {
        let mut request = connect(&format!("{SERVER_IP}:{APP_PORT}"));
        request.headers_mut().insert(head::FLOW, uuid.to_string().parse().unwrap());
        let (answer, stream) = send.send_request(request, false).unwrap();
        open.push((answer.await.unwrap(), stream));
    }
    eventually("two records", || target.server.records().len() == 2).await;
    let records = target.server.records();
    assert!(records.iter().any(|r| r.uuid == uuid));
    assert_ne!(records[0].uuid, records[1].uuid);
}

/// What is counted and recorded for a connection that never got as far as a request.
pub(super) async fn refused(target: &Target, kind: &str, reason: Reason) {
    let found = || target.server.plane.stats().failures.keys().any(|k| *k == kind);
    let until = std::time::Instant::now() + Duration::from_secs(5);
    while !found() {
        let failures = target.server.plane.stats().failures;
        assert!(std::time::Instant::now() < until, "no {kind} among {failures:?}");
        sleep(Duration::from_millis(10)).await;
    }
    let is_it = |r: &crate::flow::FlowRecord| {
        dropped(r) && r.reason == reason && r.extra.contains(&("error", kind.to_owned()))
    };
    target.server.verdict(kind, is_it).await;
}

/// Works, and leaves a positive control in the records.
pub(super) async fn still_serves(target: &Target) {
    let mut send = target.http2("frontend", CLIENT_IP).await;
    let good = format!("{SERVER_IP}:{APP_PORT}");
    assert_eq!(ask(&mut send, connect(&good)).await.0, StatusCode::OK);
    target.server.verdict("control", forwarded).await;
}

async fn closed(mut tcp: TcpStream) {
    let mut sink = Vec::new();
    // A reset is as good as an end.
    let _ = timeout(Duration::from_secs(5), tcp.read_to_end(&mut sink)).await.expect("closed");
}

#[tokio::test]
async fn certificates_of_another_root_are_untrusted() {
    let target = Target::new().await;
    let stranger = Authority::new();
    let svids = stranger.svids("frontend").await;
    let svid = svids.get(&identity("frontend")).unwrap();
    let tls = ClientTls::new(&svid, target.trust.clone()).unwrap();
    let tcp = target.tcp(CLIENT_IP).await;
    // The client's own handshake may end before the server's alert arrives.
    if let Ok((mut session, _)) = tls.connect(tcp, &[identity("payments")]).await {
        let _ = timeout(Duration::from_secs(5), session.read(&mut [0; 64])).await.unwrap();
    }
    let state = || target.server.records();
    eventually("the refusal", || state().iter().any(|r| r.reason == Reason::UntrustedPeer)).await;
    assert!(state().iter().all(|r| dropped(r)));
    still_serves(&target).await;
}

#[tokio::test]
async fn stalled_handshakes_garbage_and_other_protocols_end_promptly() {
    let target = Target::new().await;
    closed(target.tcp(CLIENT_IP).await).await;
    refused(&target, "timeout", Reason::HandshakeFailed).await;

    let mut garbage = target.tcp(CLIENT_IP).await;
    // Ten megabytes; the server has long closed when most of it is written.
    let block = vec![0x5a; 1 << 20];
    for _ in 0..10 {
        if garbage.write_all(&block).await.is_err() {
            break;
        }
    }
    closed(garbage).await;
    let mut plain = target.tcp(CLIENT_IP).await;
    plain.write_all(b"GET / HTTP/1.1\r\nHost: payments\r\n\r\n").await.unwrap();
    closed(plain).await;
    let not_tls = target.server.records();
    eventually("both", || target.server.records().len() >= 3).await;
    drop(not_tls);
    assert!(
        target
            .server
            .records()
            .iter()
            .all(|r| r.reason == Reason::HandshakeFailed || r.reason == Reason::ProtocolError)
    );

    // Authenticated, and then silent, or speaking something else.
    let silent = target.session("frontend", CLIENT_IP).await;
    refused(&target, "preface_timeout", Reason::ProtocolError).await;
    drop(silent);
    let mut http1 = target.session("frontend", CLIENT_IP).await;
    http1.write_all(b"GET / HTTP/1.1\r\nHost: payments\r\n\r\n").await.unwrap();
    http1.flush().await.unwrap();
    let failures = || target.server.plane.stats().failures;
    eventually("HTTP/1.1 is refused", || failures().contains_key("http2")).await;
    still_serves(&target).await;
    eventually("nothing is left of them", || {
        // Two accept loops, and the control's connection while its client lives.
        target.server.plane.stats().tasks <= 4
    })
    .await;
}

#[tokio::test]
async fn handshakes_in_flight_are_limited_by_source_and_others_get_through() {
    let target = Target::new().await;
    target.server.plane.set_limits(Limits { handshakes_per_source: 4, ..limits() });
    let mut stalled = Vec::new();
    for _ in 0..8 {
        stalled.push(target.tcp(OTHER_IP).await);
    }
    refused(&target, "limit_exceeded", Reason::LimitExceeded).await;
    // Another source is served while the flood lasts.
    still_serves(&target).await;
    let over = target.server.records();
    let over = over.iter().filter(|r| r.reason == Reason::LimitExceeded).count();
    assert_eq!(over, 4);
}

#[tokio::test]
async fn a_change_of_trust_retires_the_connection() {
    let target = Target::new().await;
    let mut send = target.http2("frontend", CLIENT_IP).await;
    let good = connect(&format!("{SERVER_IP}:{APP_PORT}"));
    assert_eq!(ask(&mut send, good.clone()).await.0, StatusCode::OK);
    let other = Authority::new();
    target
        .server
        .trust
        .set(crate::spiffe::TrustDomain::parse("other.test").unwrap(), other.issuer.bundle());
    // The server says goodbye: no new stream, by whoever speaks HTTP/2.
    let until = std::time::Instant::now() + Duration::from_secs(5);
    loop {
        let asked = match send.send_request(good.clone(), false) {
            Ok((answer, _)) => answer.await,
            Err(error) => Err(error),
        };
        if asked.is_err() {
            break;
        }
        assert!(std::time::Instant::now() < until, "streams are still accepted");
        sleep(Duration::from_millis(20)).await;
    }
    still_serves(&target).await;
}
