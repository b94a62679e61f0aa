//! Hostile peers that speak the native wire: each refused for its own reason, beside a good one.

use std::{net::SocketAddr, time::Duration};

use signet_ebpf::abi::{Reason, Verdict};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    time::timeout,
};
use uuid::Uuid;

use super::{
    APP_PORT, CLIENT_IP, OTHER_IP, SERVER_IP, address, dropped, eventually,
    hostile::{Target, refused, still_serves},
    ip, limits,
};
use crate::{
    config::{Limits, values::TunnelWire},
    tunnel::{
        native::frame::{HEADER, Header, Kind, Open, Status, encode_fin},
        tls::TlsStream,
    },
};

const SOON: Duration = Duration::from_secs(5);

fn open(destination: SocketAddr) -> Vec<u8> {
    named(destination, Uuid::new_v4())
}

fn named(destination: SocketAddr, flow: Uuid) -> Vec<u8> {
    let mut frame = Vec::new();
    Open { destination, client_port: Some(4711), flow: Some(flow) }.encode(&mut frame);
    frame
}

fn good() -> SocketAddr {
    address(SERVER_IP, APP_PORT)
}

async fn send(session: &mut TlsStream, bytes: &[u8]) {
    session.write_all(bytes).await.unwrap();
    session.flush().await.unwrap();
}

/// The server's answer.
async fn status(session: &mut TlsStream) -> Status {
    let mut header = [0; HEADER];
    timeout(SOON, session.read_exact(&mut header)).await.unwrap().unwrap();
    let header = Header::parse(header).unwrap();
    assert_eq!(header.kind, Kind::Status);
    let mut payload = vec![0; header.length];
    timeout(SOON, session.read_exact(&mut payload)).await.unwrap().unwrap();
    Status::parse(&payload).unwrap()
}

async fn ends(mut session: TlsStream) {
    let mut sink = Vec::new();
    // A reset is as good as an end.
    let _ = timeout(SOON, session.read_to_end(&mut sink)).await.expect("closed");
}

#[tokio::test]
async fn only_the_pods_own_address_and_ports_can_be_asked_for_on_one_connection() {
    let target = Target::new().await;
    let mut session = target.session_over(TunnelWire::Native, "frontend", CLIENT_IP).await;
    // One connection for all: a refused request ends with its FIN and the next one follows.
    for wrong in [
        address("127.0.0.1", APP_PORT),
        address(OTHER_IP, APP_PORT),
        address("169.254.169.254", 80),
        address("::1", APP_PORT),
        address(SERVER_IP, 15008),
    ] {
        send(&mut session, &open(wrong)).await;
        let expected = Status::Refused { reason: Reason::WrongDestination, policy: None };
        assert_eq!(status(&mut session).await, expected, "{wrong}");
        let mut fin = Vec::new();
        encode_fin(&mut fin);
        send(&mut session, &fin).await;
    }
    let flow = Uuid::new_v4();
    send(&mut session, &named(good(), flow)).await;
    assert_eq!(status(&mut session).await, Status::Accepted);
    let (mut app, _) = timeout(SOON, target.app.accept()).await.unwrap().unwrap();
    // The client's address is the tunnel's peer; the request adds the port alone.
    let shown = *target.server.kernel.shown.lock().unwrap().last().unwrap();
    assert_eq!(shown, address(CLIENT_IP, 4711));
    let record = target.server.verdict("control", |r| r.verdict == Verdict::Forwarded).await;
    assert_eq!((record.source.ip, record.uuid), (ip(CLIENT_IP), flow));

    // A second request inside the flow breaks it, and the application hears a reset.
    send(&mut session, &open(good())).await;
    let error = timeout(SOON, app.read(&mut [0; 8])).await.unwrap().unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
    ends(session).await;
}

#[tokio::test]
async fn policy_is_asked_flow_by_flow_and_nothing_is_delivered_before() {
    let target = Target::new().await;
    let mut intruder = target.session_over(TunnelWire::Native, "intruder", OTHER_IP).await;
    for _ in 0..2 {
        let mut request = open(good());
        request.extend(Header { kind: Kind::Data, length: 5 }.encode());
        request.extend(b"hello");
        encode_fin(&mut request);
        send(&mut intruder, &request).await;
        let Status::Refused { reason, policy } = status(&mut intruder).await else {
            panic!("an intruder is let in")
        };
        assert_eq!(reason, Reason::PolicyNoMatch);
        // A peer of our own trust domain hears which policy it was.
        assert_eq!(policy.map(|policy| policy.name), Some("callers".into()));
    }
    eventually("both are recorded", || {
        target.server.records().iter().filter(|r| dropped(r)).count() == 2
    })
    .await;
    let knocked = timeout(Duration::from_millis(100), target.app.accept()).await;
    assert!(knocked.is_err(), "the application heard of it");
    still_serves(&target).await;
}

#[tokio::test]
async fn who_does_not_take_its_refusal_holds_nobodys_place() {
    let target = Target::new().await;
    target.server.plane.set_limits(Limits { open_flows: 1, ..limits() });
    let mut intruder = target.session_over(TunnelWire::Native, "intruder", OTHER_IP).await;
    send(&mut intruder, &open(good())).await;
    let answer = status(&mut intruder).await;
    assert!(matches!(answer, Status::Refused { reason: Reason::PolicyNoMatch, .. }), "{answer:?}");
    // It has not ended its direction, and the only place is free.
    let mut frontend = target.session_over(TunnelWire::Native, "frontend", CLIENT_IP).await;
    send(&mut frontend, &open(good())).await;
    assert_eq!(status(&mut frontend).await, Status::Accepted);
    // The control: there is only one.
    let mut second = target.session_over(TunnelWire::Native, "frontend", CLIENT_IP).await;
    send(&mut second, &open(good())).await;
    let over = Status::Refused { reason: Reason::LimitExceeded, policy: None };
    assert_eq!(status(&mut second).await, over);
}

#[tokio::test]
async fn garbage_dribble_and_oversized_frames_are_refused_for_their_reason() {
    let target = Target::new().await;
    for garbage in [
        &b"GET / HTTP/1.1\r\n\r\n"[..],
        // DATA before any request; an OPEN longer than one may be; an unknown version.
        &[2, 0, 0, 1, 0],
        &[1, 0, 0x20, 0],
        &[1, 0, 0, 1, 9],
    ] {
        let mut session = target.session_over(TunnelWire::Native, "frontend", CLIENT_IP).await;
        send(&mut session, garbage).await;
        ends(session).await;
    }
    refused(&target, "native", Reason::ProtocolError).await;
    eventually("each is recorded", || {
        target.server.records().iter().filter(|r| r.reason == Reason::ProtocolError).count() == 4
    })
    .await;
    let mut slow = target.session_over(TunnelWire::Native, "frontend", CLIENT_IP).await;
    send(&mut slow, &open(good())[..7]).await;
    refused(&target, "preface_timeout", Reason::ProtocolError).await;
    ends(slow).await;
    still_serves(&target).await;
}
