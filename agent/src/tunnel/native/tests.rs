//! Both ends against each other over a byte stream in memory; applications are real sockets.

use std::{io, net::SocketAddr, time::Duration};

use signet_ebpf::abi::Reason;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream, duplex},
    net::{TcpListener, TcpStream},
    time::{sleep, timeout},
};
use uuid::Uuid;

use super::{
    NativeError,
    client::{self, EARLY, Early, OpenError},
    copy,
    frame::{HEADER, Header, Kind, Open, encode_close, encode_reset},
    server,
};
use crate::tunnel::copy::{CopyError, Counts, reset_on_close};

const SOON: Duration = Duration::from_secs(5);

type Client = client::Connection<DuplexStream>;
type Server = server::Connection<DuplexStream>;

fn pair() -> (Client, Server) {
    let (here, there) = duplex(100_000);
    (client::Connection::new(here), server::Connection::new(there))
}

/// Two ends of a TCP connection: the application's, and the one that is carried.
async fn app() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (app, carried) =
        tokio::join!(TcpStream::connect(listener.local_addr().unwrap()), listener.accept());
    (app.unwrap(), carried.unwrap().0)
}

fn open() -> Open {
    let destination: SocketAddr = "10.0.2.7:8080".parse().unwrap();
    Open { destination, client_port: Some(4711), flow: Some(Uuid::from_u128(7)) }
}

async fn incoming(mut server: Server) -> server::Incoming<DuplexStream> {
    let asked = timeout(SOON, server.next(SOON)).await.unwrap().unwrap().unwrap();
    server.take(asked)
}

async fn never() -> Reason {
    std::future::pending().await
}

/// A flow in progress: both applications' sockets, and the tasks that carry it.
struct Carried {
    client: TcpStream,
    server: TcpStream,
    at_client: tokio::task::JoinHandle<Result<Option<Client>, CopyError>>,
    at_server: tokio::task::JoinHandle<Result<Option<Server>, CopyError>>,
}

async fn carry(client: Client, server: Server) -> Carried {
    let (client_app, from_client) = app().await;
    let (server_app, to_server) = app().await;
    let at_client = tokio::spawn(async move {
        let mut early = Early::default();
        let (answer, _) = client.open(&open(), &from_client, &mut early, SOON).await;
        let stream = answer.unwrap();
        let copied = copy::tunnel(from_client, stream, &Counts::default(), never()).await;
        copied.map(|recycled| recycled.map(copy::Recycled::client))
    });
    let incoming = incoming(server).await;
    assert_eq!(incoming.open, open());
    let at_server = tokio::spawn(async move {
        let copied = copy::tunnel(to_server, incoming.accept(), &Counts::default(), never()).await;
        copied.map(|recycled| recycled.map(copy::Recycled::server))
    });
    Carried { client: client_app, server: server_app, at_client, at_server }
}

/// Bytes that say where they belong.
fn bytes(seed: u8, length: usize) -> Vec<u8> {
    (0..length).map(|i| seed ^ u8::try_from(i % 251).unwrap()).collect()
}

#[tokio::test]
async fn a_connection_is_used_again_and_a_flow_sees_its_own_bytes_only() {
    let (mut client, mut server) = pair();
    for (seed, length) in [(1, 3 << 20), (2, 1), (3, 0), (4, 70_000)] {
        let flow = carry(client, server).await;
        let (question, answer) = (bytes(seed, length), bytes(!seed, length));
        let (mut client_reads, mut client_writes) = flow.client.into_split();
        let (mut server_reads, mut server_writes) = flow.server.into_split();
        let asking = {
            let question = question.clone();
            tokio::spawn(
                async move { client_writes.write_all(&question).await.map(|()| client_writes) },
            )
        };
        let mut got = vec![0; length];
        server_reads.read_exact(&mut got).await.unwrap();
        assert!(got == question, "{length} bytes up");
        // Half-close: the FIN goes one way, and the other way still carries bytes.
        drop(asking.await.unwrap().unwrap());
        assert_eq!(server_reads.read(&mut [0; 8]).await.unwrap(), 0);
        let expected = answer.clone();
        let answering = tokio::spawn(async move {
            server_writes.write_all(&answer).await.unwrap();
        });
        let mut got = Vec::new();
        client_reads.read_to_end(&mut got).await.unwrap();
        assert!(got == expected, "{length} bytes down");
        answering.await.unwrap();
        client = timeout(SOON, flow.at_client).await.unwrap().unwrap().unwrap().unwrap();
        server = timeout(SOON, flow.at_server).await.unwrap().unwrap().unwrap().unwrap();
        assert!(client.is_quiet());
    }
}

#[tokio::test]
async fn a_reset_travels_and_ends_the_connection() {
    for client_resets in [true, false] {
        let (client, server) = pair();
        let flow = carry(client, server).await;
        let (resetter, mut victim) = match client_resets {
            true => (flow.client, flow.server),
            false => (flow.server, flow.client),
        };
        reset_on_close(&resetter);
        drop(resetter);
        let error = timeout(SOON, victim.read(&mut [0; 8])).await.unwrap().unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
        let (at_client, at_server) = (flow.at_client.await.unwrap(), flow.at_server.await.unwrap());
        let expected =
            if client_resets { ("application", "peer") } else { ("peer", "application") };
        let broken = (at_client.unwrap_err().broken_by(), at_server.unwrap_err().broken_by());
        assert_eq!(broken, expected);
    }
}

#[tokio::test]
async fn bytes_before_a_reset_arrive_and_a_cut_connection_is_no_end() {
    let (client, server) = pair();
    let mut flow = carry(client, server).await;
    flow.server.write_all(b"last words").await.unwrap();
    sleep(Duration::from_millis(50)).await;
    flow.at_server.abort();
    let mut got = Vec::new();
    let error = timeout(SOON, flow.client.read_to_end(&mut got)).await.unwrap().unwrap_err();
    assert_eq!(
        (got.as_slice(), error.kind()),
        (&b"last words"[..], io::ErrorKind::ConnectionReset)
    );
    assert!(matches!(flow.at_client.await.unwrap(), Err(CopyError::Peer(_))));
}

#[tokio::test]
async fn a_refusal_gives_its_reason_and_the_connection_serves_the_next_flow() {
    let (client, server) = pair();
    let (mut said, from_client) = app().await;
    said.write_all(b"not for you").await.unwrap();
    let asking = tokio::spawn(async move {
        let mut early = Early::default();
        client.open(&open(), &from_client, &mut early, SOON).await
    });
    let server = timeout(SOON, incoming(server).await.refuse(Reason::PolicyNoMatch, None));
    let server = server.await.unwrap().expect("the connection is as new");
    let (answer, client) = asking.await.unwrap();
    let Err(OpenError::Refused(refusal)) = answer else { panic!("{answer:?}") };
    assert_eq!(refusal.reason, Reason::PolicyNoMatch);
    let mut flow = carry(client.expect("the connection is as new"), server).await;
    flow.client.write_all(b"!").await.unwrap();
    let mut got = [0];
    flow.server.read_exact(&mut got).await.unwrap();
    assert_eq!(&got, b"!", "nothing of the refused flow");
}

#[tokio::test]
async fn what_was_said_early_is_said_again_where_the_server_said_goodbye() {
    let (mut said, from_client) = app().await;
    said.write_all(b"early").await.unwrap();
    let mut early = Early::default();
    let (client, server) = pair();
    let bye = tokio::spawn(server.goodbye());
    let (answer, _) = client.open(&open(), &from_client, &mut early, SOON).await;
    let error = answer.unwrap_err();
    assert!(matches!(error, OpenError::Closed) && error.is_connections_fault(), "{error}");
    bye.await.unwrap().unwrap();

    let (client, server) = pair();
    let serving = tokio::spawn(async move {
        let (mut app, to_server) = app().await;
        let incoming = incoming(server).await;
        let counts = Counts::default();
        let copying = copy::tunnel(to_server, incoming.accept(), &counts, never());
        let reading = async {
            let mut got = [0; 5];
            app.read_exact(&mut got).await.unwrap();
            got
        };
        tokio::select! {
            ended = copying => panic!("{:?}", ended.map(drop)),
            got = reading => got,
        }
    });
    let (answer, _) = client.open(&open(), &from_client, &mut early, SOON).await;
    let counts = Counts::default();
    let copying = copy::tunnel(from_client, answer.unwrap(), &counts, never());
    tokio::select! {
        biased;
        got = serving => assert_eq!(&got.unwrap(), b"early"),
        ended = copying => panic!("{:?}", ended.map(drop)),
    }
}

#[tokio::test]
async fn a_reset_of_the_flow_before_is_no_answer_and_no_request() {
    let reset = || {
        let mut frame = Vec::new();
        encode_reset(Some(Reason::RightWithdrawn), &mut frame);
        frame
    };
    let (mut here, there) = duplex(1000);
    here.write_all(&reset()).await.unwrap();
    let asked = server::Connection::new(there).next(SOON).await.unwrap();
    assert!(asked.is_none(), "the connection ends, and nobody broke the protocol");

    let (mut here, there) = duplex(1000);
    here.write_all(&reset()).await.unwrap();
    let mut client = client::Connection::new(there);
    assert!(!client.is_quiet(), "nobody takes it from the pool");
    let (_said, from_client) = app().await;
    let (mut here, there) = duplex(1000);
    here.write_all(&reset()).await.unwrap();
    let client = client::Connection::new(there);
    let (answer, _) = client.open(&open(), &from_client, &mut Early::default(), SOON).await;
    let error = answer.unwrap_err();
    assert!(matches!(error, OpenError::Closed) && error.is_connections_fault(), "{error}");
}

#[tokio::test]
async fn a_flow_that_broke_after_it_had_spoken_is_not_asked_for_again() {
    for speaks in [true, false] {
        let (mut said, from_client) = app().await;
        if speaks {
            said.write_all(b"pay 5").await.unwrap();
            from_client.readable().await.unwrap();
        }
        let (client, server) = pair();
        let mut early = Early::default();
        let asking = tokio::spawn(async move {
            client.open(&open(), &from_client, &mut early, SOON).await.0.unwrap_err()
        });
        drop(incoming(server).await);
        let error = asking.await.unwrap();
        assert!(matches!(error, OpenError::Broken { .. }), "{error}");
        assert_eq!(error.is_connections_fault(), !speaks);
    }
}

#[tokio::test]
async fn before_the_answer_a_bounded_amount_is_held_and_a_client_that_leaves_is_noticed() {
    let (client, server) = pair();
    let (mut said, from_client) = app().await;
    let flood = tokio::spawn(async move {
        // More than all buffers on the way hold: what is not taken waits in the sender.
        let _ = said.write_all(&vec![7; 64 << 20]).await;
    });
    let asking = tokio::spawn(async move {
        let mut early = Early::default();
        let _ = client.open(&open(), &from_client, &mut early, 10 * SOON).await;
    });
    let mut waiting = incoming(server).await;
    assert!(timeout(Duration::from_millis(300), waiting.abandoned()).await.is_err());
    assert_eq!(waiting.held(), EARLY);
    assert!(!flood.is_finished());
    asking.abort();
    flood.abort();

    let (client, server) = pair();
    let (_said, from_client) = app().await;
    let asking = tokio::spawn(async move {
        let mut early = Early::default();
        let _ = client.open(&open(), &from_client, &mut early, 10 * SOON).await;
    });
    let mut waiting = incoming(server).await;
    asking.abort();
    timeout(SOON, waiting.abandoned()).await.expect("a client that leaves is noticed");
}

#[tokio::test]
async fn what_has_no_place_ends_the_connection() {
    let data = |length: usize| Header { kind: Kind::Data, length }.encode().to_vec();
    let mut twice = Vec::new();
    open().encode(&mut twice);
    open().encode(&mut twice);
    let mut close = Vec::new();
    encode_close(&mut close);
    for (what, sent, kind) in [
        ("another protocol", b"GET / HTTP/1.1\r\n\r\n".to_vec(), "native"),
        ("data without a flow", data(5), "native"),
        ("a server's frame", close, "native"),
        ("a frame that is cut off", vec![1, 0, 0], "connection_lost"),
    ] {
        let (mut here, there) = duplex(1000);
        here.write_all(&sent).await.unwrap();
        drop(here);
        let error = server::Connection::new(there).next(SOON).await.unwrap_err();
        assert_eq!(error.kind(), kind, "{what}: {error}");
    }
    // A second request within a flow.
    let (mut here, there) = duplex(1000);
    here.write_all(&twice).await.unwrap();
    let (_app, to_server) = app().await;
    let stream = incoming(server::Connection::new(there)).await.accept();
    let ended = copy::tunnel(to_server, stream, &Counts::default(), never()).await;
    assert!(matches!(ended, Err(CopyError::Peer(_))));
}

#[tokio::test]
async fn a_request_that_dribbles_is_given_up_and_one_that_has_not_begun_is_not() {
    let (mut here, there) = duplex(1000);
    let mut server = server::Connection::new(there);
    let soon = Duration::from_millis(50);
    assert!(timeout(4 * soon, server.next(soon)).await.is_err(), "idle, and cancelled");
    let mut frame = Vec::new();
    open().encode(&mut frame);
    here.write_all(&frame[..HEADER + 3]).await.unwrap();
    assert!(matches!(server.next(soon).await, Err(NativeError::Slow(_))));
}
