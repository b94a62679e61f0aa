//! Both ends against each other over plain loopback TCP: flows as applications see them.

use std::{
    io,
    net::SocketAddr,
    sync::{Arc, Mutex, atomic::Ordering},
    time::Duration,
};

use http::{Method, Request, StatusCode};
use signet_ebpf::abi::Reason;
use socket2::SockRef;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::mpsc,
    time::{sleep, timeout},
};
use tokio_util::sync::CancellationToken;

use super::{
    HboneError, Settings, Stream,
    client::{self, Client, OpenError},
    head::{Open, Refusal},
    server::{Control, Incoming, serve},
};
use crate::tunnel::copy::{self, CopyError, Counts, reset_on_close};

const PROMPTLY: Duration = Duration::from_secs(2);

async fn tcp_pair() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let dial = TcpStream::connect(listener.local_addr().unwrap());
    let (a, b) = tokio::join!(dial, listener.accept());
    let (a, b) = (a.unwrap(), b.unwrap().0);
    // As the data plane does: else small frames wait for acknowledgements.
    a.set_nodelay(true).unwrap();
    b.set_nodelay(true).unwrap();
    (a, b)
}

fn open(destination: SocketAddr) -> Open {
    Open { destination, client: None, flow: None, baggage: None }
}

/// A connection whose server hands its requests out.
struct Ends {
    client: Client,
    requests: mpsc::UnboundedReceiver<Incoming>,
    control: Control,
    client_cut: CancellationToken,
    client_end: tokio::task::JoinHandle<Result<(), HboneError>>,
    server_end: tokio::task::JoinHandle<Result<(), HboneError>>,
}

async fn ends(settings: Settings) -> Ends {
    let (a, b) = tcp_pair().await;
    let (tx, requests) = mpsc::unbounded_channel();
    let control = Control::default();
    let server_end = tokio::spawn(serve(b, settings, control.clone(), move |incoming| {
        let _ = tx.send(incoming);
    }));
    let (client, driver) = client::handshake(a, settings).await.unwrap();
    let client_cut = CancellationToken::new();
    let client_end = tokio::spawn(driver.run(client_cut.clone()));
    Ends { client, requests, control, client_cut, client_end, server_end }
}

/// A flow from one application to another: their two sockets, and how each end of the
/// copy ended.
struct Flow {
    client_app: TcpStream,
    server_app: TcpStream,
    source: tokio::task::JoinHandle<(Result<(), CopyError>, u64, u64)>,
    destination: tokio::task::JoinHandle<(Result<(), CopyError>, u64, u64)>,
    stop: CancellationToken,
}

fn copying(
    app: TcpStream,
    stream: Stream,
    stop: CancellationToken,
) -> tokio::task::JoinHandle<(Result<(), CopyError>, u64, u64)> {
    tokio::spawn(async move {
        let counts = Counts::default();
        let result = copy::tunnel(app, stream, &counts, stop.cancelled()).await;
        let count = |n: &std::sync::atomic::AtomicU64| n.load(Ordering::Relaxed);
        (result, count(&counts.from_app), count(&counts.to_app))
    })
}

impl Ends {
    async fn flow(&mut self) -> Flow {
        let permit = self.client.reserve().unwrap();
        let client = self.client.clone();
        let asked =
            tokio::spawn(async move { client.open(&open("10.0.0.1:80".parse().unwrap())).await });
        let incoming = self.requests.recv().await.unwrap();
        let at_server = incoming.accept().unwrap();
        let at_client = asked.await.unwrap().unwrap();
        let (client_app, source_side) = tcp_pair().await;
        let (destination_side, server_app) = tcp_pair().await;
        let stop = CancellationToken::new();
        let source = copying(source_side, at_client, stop.clone());
        let destination = copying(destination_side, at_server, CancellationToken::new());
        drop(permit);
        Flow { client_app, server_app, source, destination, stop }
    }
}

async fn is_reset(app: &mut TcpStream) -> bool {
    let mut byte = [0];
    loop {
        match timeout(PROMPTLY, app.read(&mut byte)).await {
            Ok(Err(e)) => return e.kind() == io::ErrorKind::ConnectionReset,
            Ok(Ok(0)) | Err(_) => return false,
            Ok(Ok(_)) => {}
        }
    }
}

#[tokio::test]
async fn half_close_leaves_the_other_direction_open() {
    let mut ends = ends(Settings::default()).await;
    let mut flow = ends.flow().await;
    flow.client_app.write_all(b"question").await.unwrap();
    flow.client_app.shutdown().await.unwrap();
    let mut question = Vec::new();
    flow.server_app.read_to_end(&mut question).await.unwrap();
    assert_eq!(question, b"question");
    // The client has said its last word; the answer still comes.
    flow.server_app.write_all(b"a longer answer").await.unwrap();
    flow.server_app.shutdown().await.unwrap();
    let mut answer = Vec::new();
    flow.client_app.read_to_end(&mut answer).await.unwrap();
    assert_eq!(answer, b"a longer answer");

    let (result, sent, received) = flow.source.await.unwrap();
    assert!(result.is_ok());
    assert_eq!((sent, received), (8, 15));
    let (result, sent, received) = flow.destination.await.unwrap();
    assert!(result.is_ok());
    assert_eq!((sent, received), (15, 8));
}

#[tokio::test]
async fn a_reset_on_one_side_is_a_reset_on_the_other() {
    let mut ends = ends(Settings::default()).await;
    for client_resets in [true, false] {
        let mut flow = ends.flow().await;
        flow.client_app.write_all(b"x").await.unwrap();
        flow.server_app.read_exact(&mut [0]).await.unwrap();
        let (mut victim, source_by, destination_by) = if client_resets {
            reset_on_close(&flow.client_app);
            drop(flow.client_app);
            (flow.server_app, "application", "peer")
        } else {
            reset_on_close(&flow.server_app);
            drop(flow.server_app);
            (flow.client_app, "peer", "application")
        };
        assert!(is_reset(&mut victim).await, "client_resets={client_resets}");
        let by = |(result, ..): (Result<(), CopyError>, u64, u64)| result.unwrap_err().broken_by();
        assert_eq!(by(flow.source.await.unwrap()), source_by);
        assert_eq!(by(flow.destination.await.unwrap()), destination_by);
    }
    // The connection carries on, and a clean end is still a clean end.
    let mut flow = ends.flow().await;
    flow.client_app.shutdown().await.unwrap();
    assert_eq!(flow.server_app.read(&mut [0]).await.unwrap(), 0);
}

#[tokio::test]
async fn a_reset_is_noticed_while_the_tunnel_is_full() {
    let mut ends = ends(Settings::default()).await;
    let mut flow = ends.flow().await;
    // The server's application reads nothing: all windows and buffers fill.
    let chunk = vec![7; 1 << 20];
    while timeout(Duration::from_millis(300), flow.client_app.write_all(&chunk)).await.is_ok() {}
    reset_on_close(&flow.client_app);
    drop(flow.client_app);
    let (result, ..) = timeout(PROMPTLY, flow.source).await.unwrap().unwrap();
    assert!(matches!(result, Err(CopyError::App(_))));
    let (result, ..) = timeout(PROMPTLY, flow.destination).await.unwrap().unwrap();
    assert!(matches!(result, Err(CopyError::Peer(_))));
    assert!(is_reset(&mut flow.server_app).await);
}

#[tokio::test]
async fn stopping_a_flow_resets_both_applications() {
    let mut ends = ends(Settings::default()).await;
    let mut flow = ends.flow().await;
    flow.client_app.write_all(b"x").await.unwrap();
    flow.server_app.read_exact(&mut [0]).await.unwrap();
    flow.stop.cancel();
    assert!(is_reset(&mut flow.client_app).await);
    assert!(is_reset(&mut flow.server_app).await);
    assert!(matches!(flow.source.await.unwrap().0, Err(CopyError::Stopped)));
}

#[tokio::test]
async fn what_came_before_a_reset_is_still_delivered() {
    let mut ends = ends(Settings::default()).await;
    let mut flow = ends.flow().await;
    // The server answers and closes with the request unread: the kernel sends a reset.
    flow.client_app.write_all(b"a request that nobody reads").await.unwrap();
    sleep(Duration::from_millis(50)).await;
    flow.server_app.write_all(b"answer").await.unwrap();
    sleep(Duration::from_millis(50)).await;
    drop(flow.server_app);
    let mut answer = [0; 6];
    flow.client_app.read_exact(&mut answer).await.unwrap();
    assert_eq!(&answer, b"answer");
    assert!(is_reset(&mut flow.client_app).await);
}

#[tokio::test]
async fn a_slow_reader_holds_back_the_writer_and_nobody_else() {
    let settings =
        Settings { stream_window: 256 << 10, connection_window: 1 << 20, ..Settings::default() };
    let mut ends = ends(settings).await;
    let slow = ends.flow().await;
    for socket in [&slow.client_app, &slow.server_app] {
        SockRef::from(socket).set_send_buffer_size(512 << 10).unwrap();
        SockRef::from(socket).set_recv_buffer_size(512 << 10).unwrap();
    }
    let (mut reader, mut writer) = (slow.server_app, slow.client_app);
    let total = 64 << 20;
    let written = Arc::new(std::sync::atomic::AtomicUsize::new(0));
    let progress = written.clone();
    let writing = tokio::spawn(async move {
        let chunk = vec![0xa5; 64 << 10];
        let mut left: usize = total;
        while left > 0 {
            let n = writer.write(&chunk[..left.min(chunk.len())]).await.unwrap();
            left -= n;
            progress.fetch_add(n, Ordering::Relaxed);
        }
        writer.shutdown().await.unwrap();
        writer
    });
    sleep(Duration::from_millis(500)).await;
    // Sockets' own buffers (autotuned in the copying ends), one window, one batch each.
    let held = written.load(Ordering::Relaxed);
    assert!(held < 24 << 20, "{held} bytes are held for a reader that reads nothing");

    // Another flow on the same connection is not held up.
    let mut other = ends.flow().await;
    other.client_app.write_all(b"ping").await.unwrap();
    let mut got = [0; 4];
    timeout(PROMPTLY, other.server_app.read_exact(&mut got)).await.unwrap().unwrap();
    assert_eq!(&got, b"ping");

    // And the slow one gets everything, unchanged.
    let mut buffer = vec![0; 256 << 10];
    let mut received = 0;
    loop {
        let n = reader.read(&mut buffer).await.unwrap();
        if n == 0 {
            break;
        }
        assert!(buffer[..n].iter().all(|&b| b == 0xa5));
        received += n;
    }
    assert_eq!(received, total);
    drop(writing.await.unwrap());
}

#[tokio::test]
async fn a_thousand_streams_at_once_on_ten_connections() {
    let mut connections = Vec::new();
    for _ in 0..10 {
        let mut ends = ends(Settings::default()).await;
        let mut requests = std::mem::replace(&mut ends.requests, mpsc::unbounded_channel().1);
        // Every accepted stream echoes by copying over a socket pair to itself.
        tokio::spawn(async move {
            while let Some(incoming) = requests.recv().await {
                let stream = incoming.accept().unwrap();
                let (near, far) = tcp_pair().await;
                copying(near, stream, CancellationToken::new());
                tokio::spawn(async move {
                    let (mut r, mut w) = far.into_split();
                    tokio::io::copy(&mut r, &mut w).await.unwrap();
                });
            }
        });
        connections.push(ends);
    }
    let mut flows = Vec::new();
    for i in 0..1000usize {
        let client = connections[i % 10].client.clone();
        let permit = client.reserve().expect("a hundred streams fit a connection");
        flows.push(tokio::spawn(async move {
            let stream = client.open(&open("10.0.0.1:80".parse().unwrap())).await.unwrap();
            let (app, side) = tcp_pair().await;
            copying(side, stream, CancellationToken::new());
            let mut app = app;
            let nonce = i.to_be_bytes().repeat(100);
            app.write_all(&nonce).await.unwrap();
            app.shutdown().await.unwrap();
            let mut back = Vec::new();
            app.read_to_end(&mut back).await.unwrap();
            drop(permit);
            back == nonce
        }));
    }
    assert!(connections[0].client.reserve().is_none(), "the hundred and first does not fit");
    for flow in flows {
        assert!(timeout(Duration::from_secs(60), flow).await.unwrap().unwrap());
    }
    assert!(connections.iter().all(|c| c.client.streams() == 0), "every permit came back");
}

#[tokio::test]
async fn refusals_carry_their_reason() {
    let mut ends = ends(Settings::default()).await;
    for (reason, status) in [
        (Reason::PolicyNoMatch, StatusCode::UNAUTHORIZED),
        (Reason::WrongDestination, StatusCode::BAD_REQUEST),
        (Reason::AppUnreachable, StatusCode::SERVICE_UNAVAILABLE),
    ] {
        let client = ends.client.clone();
        let asked =
            tokio::spawn(async move { client.open(&open("10.0.0.1:80".parse().unwrap())).await });
        ends.requests.recv().await.unwrap().refuse(&Refusal::new(reason));
        match asked.await.unwrap() {
            Err(OpenError::Refused(refusal)) => {
                assert_eq!((refusal.reason, refusal.status), (reason, status));
            }
            other => panic!("expected a refusal, got {other:?}"),
        }
    }
    // After all that the connection still opens flows.
    let mut flow = ends.flow().await;
    flow.client_app.write_all(b"x").await.unwrap();
    flow.server_app.read_exact(&mut [0]).await.unwrap();
}

#[tokio::test]
async fn giving_a_dial_up_tells_the_server() {
    let mut ends = ends(Settings::default()).await;
    let client = ends.client.clone();
    let asked =
        tokio::spawn(async move { client.open(&open("10.0.0.1:80".parse().unwrap())).await });
    let mut incoming = ends.requests.recv().await.unwrap();
    assert!(
        timeout(Duration::from_millis(100), incoming.abandoned()).await.is_err(),
        "not while the client waits"
    );
    asked.abort();
    timeout(PROMPTLY, incoming.abandoned()).await.unwrap();
}

#[tokio::test]
async fn draining_finishes_what_is_open_and_refuses_the_rest() {
    let mut ends = ends(Settings::default()).await;
    let mut flow = ends.flow().await;
    ends.control.drain.cancel();
    sleep(Duration::from_millis(100)).await;
    let refused = ends.client.open(&open("10.0.0.1:80".parse().unwrap())).await.unwrap_err();
    assert!(refused.is_connections_fault(), "{refused}");
    flow.client_app.write_all(b"still here").await.unwrap();
    flow.client_app.shutdown().await.unwrap();
    let mut got = Vec::new();
    flow.server_app.read_to_end(&mut got).await.unwrap();
    assert_eq!(got, b"still here");
    drop(flow.server_app);
    assert!(flow.source.await.unwrap().0.is_ok());
    timeout(PROMPTLY, ends.server_end).await.unwrap().unwrap().unwrap();
    timeout(PROMPTLY, ends.client_end).await.unwrap().unwrap().unwrap();
    assert!(ends.client.is_closed() && ends.client.reserve().is_none());
}

#[tokio::test]
async fn cutting_either_end_resets_the_flows() {
    for cut_server in [true, false] {
        let mut ends = ends(Settings::default()).await;
        let mut flow = ends.flow().await;
        flow.client_app.write_all(b"x").await.unwrap();
        flow.server_app.read_exact(&mut [0]).await.unwrap();
        if cut_server {
            ends.control.cut.cancel()
        } else {
            ends.client_cut.cancel()
        }
        assert!(is_reset(&mut flow.client_app).await, "client, cut_server={cut_server}");
        assert!(is_reset(&mut flow.server_app).await, "server, cut_server={cut_server}");
    }
}

#[tokio::test]
async fn the_last_handle_closes_the_connection() {
    let ends = ends(Settings::default()).await;
    // Both prefaces are through; before that, a close is a broken connection.
    sleep(Duration::from_millis(100)).await;
    drop(ends.client);
    timeout(PROMPTLY, ends.client_end).await.unwrap().unwrap().unwrap();
    timeout(PROMPTLY, ends.server_end).await.unwrap().unwrap().unwrap();
}

#[tokio::test]
async fn a_silent_peer_is_noticed() {
    let settings = Settings {
        ping_every: Duration::from_millis(50),
        ping_timeout: Duration::from_millis(100),
        ..Settings::default()
    };
    // A peer that accepts and never says anything.
    let (a, _silent) = tcp_pair().await;
    let (_client, driver) = client::handshake(a, settings).await.unwrap();
    let end = timeout(PROMPTLY, driver.run(CancellationToken::new())).await.unwrap();
    assert!(matches!(end, Err(HboneError::PingTimeout(_))));
    // One that answers lives.
    let ends = ends(settings).await;
    sleep(Duration::from_millis(500)).await;
    assert!(!ends.client.is_closed());
}

#[tokio::test]
async fn a_client_that_says_nothing_is_dropped() {
    let settings = Settings { preface_timeout: Duration::from_millis(100), ..Settings::default() };
    let (_silent, b) = tcp_pair().await;
    let end = timeout(PROMPTLY, serve(b, settings, Control::default(), drop)).await.unwrap();
    assert!(matches!(end, Err(HboneError::PrefaceTimeout(_))));
}

#[tokio::test]
async fn other_protocols_are_protocol_errors() {
    for hello in [&b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"[..], &[0xff; 4096]] {
        let (mut a, b) = tcp_pair().await;
        let server = tokio::spawn(serve(b, Settings::default(), Control::default(), drop));
        a.write_all(hello).await.unwrap();
        let end = timeout(PROMPTLY, server).await.unwrap().unwrap();
        assert_eq!(end.unwrap_err().reason(), Reason::ProtocolError);
    }
}

#[tokio::test]
async fn an_idle_connection_ends_and_a_busy_one_does_not() {
    let settings = Settings { server_idle: Duration::from_millis(200), ..Settings::default() };
    let mut ends = ends(settings).await;
    let mut flow = ends.flow().await;
    sleep(Duration::from_millis(600)).await;
    flow.client_app.write_all(b"x").await.unwrap();
    flow.server_app.read_exact(&mut [0]).await.unwrap();
    drop((flow.client_app, flow.server_app));
    timeout(PROMPTLY, ends.server_end).await.unwrap().unwrap().unwrap();
}

/// Requests as a hostile client writes them: what reaches the handler, or nothing.
#[tokio::test]
async fn malformed_requests_are_told_apart() {
    let (a, b) = tcp_pair().await;
    let seen = Arc::new(Mutex::new(Vec::new()));
    let log = seen.clone();
    let settings = Settings { header_list: 16 << 10, ..Settings::default() };
    tokio::spawn(serve(b, settings, Control::default(), move |incoming| {
        let reason = incoming.head.as_ref().map_or_else(|e| e.reason(), |_| Reason::Allowed);
        log.lock().unwrap().push(reason);
        incoming.refuse(&Refusal::new(reason));
    }));
    let (mut send, connection) = h2::client::handshake(a).await.unwrap();
    tokio::spawn(connection);
    let connect = |authority: &str| {
        Request::builder().method(Method::CONNECT).uri(authority).body(()).unwrap()
    };
    let get = Request::builder().uri("https://10.0.0.1:80/").body(()).unwrap();
    for (request, expected) in [
        (connect("10.0.0.1:80"), Reason::Allowed),
        (connect("payments.shop:80"), Reason::WrongDestination),
        (get, Reason::ProtocolError),
    ] {
        let (answer, _) = send.send_request(request, false).unwrap();
        answer.await.unwrap();
        assert_eq!(seen.lock().unwrap().pop(), Some(expected));
    }
    // More headers than the limit: answered by the library, never handed on.
    let mut large = connect("10.0.0.1:80");
    let value = http::HeaderValue::from_bytes(&[b'x'; 8 << 10]).unwrap();
    for name in ["a", "b", "c", "d"] {
        large.headers_mut().insert(name, value.clone());
    }
    let (answer, _) = send.send_request(large, false).unwrap();
    let answer = answer.await.map(|answer| answer.status());
    assert!(
        !matches!(answer, Ok(status) if status.is_success()) && seen.lock().unwrap().is_empty(),
        "{answer:?}"
    );
}
