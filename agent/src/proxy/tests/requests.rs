//! Flows whose requests are judged, as clients, applications and records see them.

use std::{sync::Arc, time::Duration};

use signet_ebpf::abi::{Direction, Mode, Reason, Verdict};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    time::timeout,
};

use super::{
    APP_PORT, Authority, CLIENT_IP, Net, Node, SERVER_IP, Setup, WIRES, address, allow, dropped,
    eventually, forwarded, identity, pod, world,
};
use crate::{
    flow::{FlowRecord, Via},
    policy::{
        asked::{Operation, PathPattern},
        end_user::RequestAuthentication,
        model::{Action, Destination, Policy, PolicyName, Rule, Selector},
    },
};

const PROMPTLY: Duration = Duration::from_secs(5);

/// ALLOW for the frontend: POST on two paths, GET of websockets.
fn only_payments() -> Arc<Policy> {
    let to = |method: &str, paths: &[&str]| Destination {
        operation: Operation {
            methods: vec![method.into()],
            paths: paths.iter().map(|path| PathPattern::parse(path).unwrap()).collect(),
            ..Operation::default()
        },
        ..Destination::default()
    };
    let mut peers = allow("", Direction::Ingress, &["frontend"]).ingress[0].peers.clone();
    let rule = Rule {
        peers: std::mem::take(&mut peers),
        to: vec![
            to("POST", &["/api/v1/payments", "/api/v1/refunds"]),
            to("GET", &["/ws", "/healthy"]),
        ],
        ..Rule::default()
    };
    let name = PolicyName {
        kind: "AuthorizationPolicy".into(),
        namespace: "shop".into(),
        name: "only-payments".into(),
    };
    Arc::new(Policy {
        ingress: vec![rule],
        governs_ingress: true,
        ..Policy::new(name, Selector::of("shop"), Action::Allow)
    })
}

struct Judged {
    net: Net,
    client: Node,
    server: Node,
    setup: Setup,
    listener: Arc<TcpListener>,
    _authority: Authority,
}

impl Judged {
    async fn new() -> Self {
        Self::with(vec![only_payments()], Vec::new()).await
    }

    async fn with(
        policies: Vec<Arc<Policy>>,
        authentications: Vec<Arc<RequestAuthentication>>,
    ) -> Self {
        let net = Net::new().await;
        let authority = Authority::new();
        let adjust = |config: &mut crate::proxy::DataPlaneConfig| config.wires = WIRES;
        let frontend = pod("frontend", CLIENT_IP, Mode::Strict);
        let payments = pod("payments", SERVER_IP, Mode::Strict);
        let world = world(7, &[frontend.clone(), payments.clone()], &[&frontend, &payments]);
        let client = Setup {
            pod: frontend,
            policies: Vec::new(),
            world: world.clone(),
            authentications: Vec::new(),
        };
        let setup = Setup { pod: payments, policies, world, authentications };
        let client = Node::start(&net, &authority, "node-1", &client, adjust).await;
        let server = Node::start(&net, &authority, "node-2", &setup, adjust).await;
        let listener = Arc::new(net.listen(address(SERVER_IP, APP_PORT)).await);
        Self { net, client, server, setup, listener, _authority: authority }
    }

    /// The application: shows each request's head and body, or follows an upgrade.
    fn serve(&self) {
        let listener = self.listener.clone();
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(show(stream));
            }
        });
    }

    async fn dial(&self) -> TcpStream {
        self.client.dial(&self.net, address(SERVER_IP, APP_PORT)).await
    }

    /// Sends `text` on a connection of its own; everything that is answered.
    async fn say(&self, text: &str) -> String {
        let mut client = self.dial().await;
        client.write_all(text.as_bytes()).await.unwrap();
        client.shutdown().await.unwrap();
        let mut answer = Vec::new();
        // A reset behind the answer is no part of it.
        let _ = timeout(PROMPTLY, client.read_to_end(&mut answer)).await.expect("an end");
        String::from_utf8_lossy(&answer).into_owned()
    }

    async fn record(&self, what: &str, path: &str, verdict: Verdict) -> Arc<FlowRecord> {
        let is = |r: &FlowRecord| {
            r.verdict == verdict && r.http.as_ref().is_some_and(|http| &*http.path == path)
        };
        self.server.verdict(what, is).await
    }
}

/// Reads requests until the end and answers each with what it read.
async fn show(mut stream: TcpStream) {
    let mut read = Vec::new();
    loop {
        let end = loop {
            if let Some(at) = read.windows(4).position(|part| part == b"\r\n\r\n") {
                break at + 4;
            }
            if stream.read_buf(&mut read).await.unwrap_or(0) == 0 {
                return;
            }
        };
        let head = String::from_utf8_lossy(&read[..end]).into_owned();
        let lower = head.to_ascii_lowercase();
        let length = lower
            .split("\r\n")
            .find_map(|line| line.strip_prefix("content-length: ")?.trim().parse().ok())
            .unwrap_or(0usize);
        let is_chunked = lower.contains("transfer-encoding: chunked");
        let whole = loop {
            let is_whole = match is_chunked {
                true => read[end..].ends_with(b"0\r\n\r\n"),
                false => read.len() >= end + length,
            };
            if is_whole {
                break if is_chunked { read.len() } else { end + length };
            }
            if stream.read_buf(&mut read).await.unwrap_or(0) == 0 {
                return;
            }
        };
        if lower.contains("upgrade: websocket") && !lower.contains("x-refuse") {
            let text = "HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\n\
                        upgrade: websocket\r\n\r\n";
            stream.write_all(text.as_bytes()).await.unwrap();
            read.drain(..whole);
            stream.write_all(&read).await.unwrap();
            let (mut from, mut to) = stream.split();
            let _ = tokio::io::copy(&mut from, &mut to).await;
            return;
        }
        let shown: Vec<u8> = read.drain(..whole).collect();
        let head = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n", shown.len());
        if stream.write_all(head.as_bytes()).await.is_err()
            || stream.write_all(&shown).await.is_err()
        {
            return;
        }
    }
}

fn post(path: &str, more: &str) -> String {
    format!("POST {path} HTTP/1.1\r\nHost: payments\r\nContent-Length: 4\r\n{more}\r\npay!")
}

#[tokio::test]
async fn each_request_is_judged_and_recorded() {
    let judged = Judged::new().await;
    judged.serve();
    let mut client = judged.dial().await;
    // Three on one connection, at once: the second one is not for the frontend.
    let text =
        post("/api/v1/payments", "") + &post("/api/v1/admin", "") + &post("/api/v1/refunds", "");
    client.write_all(text.as_bytes()).await.unwrap();
    client.shutdown().await.unwrap();
    let mut answer = String::new();
    timeout(PROMPTLY, client.read_to_string(&mut answer)).await.unwrap().unwrap();
    let statuses: Vec<_> = answer.split("HTTP/1.1 ").skip(1).map(|part| &part[..3]).collect();
    // What the application is shown begins with a request line of its own.
    assert_eq!(statuses.iter().filter(|s| **s == "200").count(), 2, "{answer}");
    assert_eq!(statuses.iter().filter(|s| **s == "403").count(), 1, "{answer}");
    assert!(answer.contains("signet: policy_no_match\n"), "{answer}");
    assert!(!answer.contains("only-payments"), "the policy is not the client's to know: {answer}");

    let passed = judged.record("a payment", "/api/v1/payments", Verdict::Forwarded).await;
    assert_eq!(passed.policy.as_ref().map(|p| &*p.name), Some("only-payments"));
    assert_eq!(passed.source.identity, Some(identity("frontend")));
    let http = passed.http.as_ref().unwrap();
    assert_eq!((&*http.method, http.status, http.version), ("POST", 200, "HTTP/1.1"));
    let denied = judged.record("a denial", "/api/v1/admin", Verdict::Dropped).await;
    assert_eq!((denied.reason, denied.via), (Reason::PolicyNoMatch, Via::Mtls));
    assert_eq!(denied.http.as_ref().unwrap().status, 403);
    judged.record("a refund", "/api/v1/refunds", Verdict::Forwarded).await;
    let flow = judged.server.verdict("the flow's own", |r| r.http.is_none()).await;
    assert_eq!((flow.verdict, flow.reason), (Verdict::Forwarded, Reason::Allowed));
    judged.server.end("the flow's end", |r| r.http.is_none() && r.reason == Reason::Allowed).await;
    judged.server.settled().await;
}

#[tokio::test]
async fn what_has_two_meanings_is_refused_and_never_delivered() {
    let judged = Judged::new().await;
    judged.serve();
    let allowed = "/api/v1/payments";
    let control = judged.say(&post("/api//v1/./x/../%70ayments", "")).await;
    assert!(
        control.starts_with("HTTP/1.1 200") && control.contains("POST /api/v1/payments HTTP"),
        "{control}"
    );
    let smuggled = "GET /api/v1/admin HTTP/1.1\r\nHost: payments\r\n\r\n";
    let length = smuggled.len();
    for (what, text, expected) in [
        ("CL.TE", post(allowed, "Transfer-Encoding: chunked\r\n"), "400"),
        (
            "TE.CL",
            format!(
                "POST {allowed} HTTP/1.1\r\nHost: payments\r\nTransfer-Encoding: chunked\r\n\
                 Content-Length: 3\r\n\r\n{length:x}\r\n{smuggled}\r\n0\r\n\r\n"
            ),
            "400",
        ),
        (
            "TE.TE",
            format!(
                "POST {allowed} HTTP/1.1\r\nHost: payments\r\nTransfer-Encoding: chunked\r\n\
                 Transfer-Encoding: identity\r\n\r\n0\r\n\r\n{smuggled}"
            ),
            "400",
        ),
        ("bare LF", format!("POST {allowed} HTTP/1.1\nHost: payments\n\n"), "400"),
        ("folded", post(allowed, "X: a\r\n b\r\n"), "400"),
        ("two hosts", post(allowed, "Host: admin\r\n"), "400"),
        (
            "other host",
            format!("POST http://admin{allowed} HTTP/1.1\r\nHost: payments\r\n\r\n"),
            "400",
        ),
        ("escaped slash", post("/api/v1%2fpayments", ""), "400"),
        ("parameter", post("/api/v1/admin/..;/payments", ""), "400"),
        ("backslash", post("/api/v1/admin\\..\\payments", ""), "400"),
        ("double", post("/api/v1/%2570ayments", ""), "400"),
        ("dots", post("/api/v1/payments/../admin", ""), "403"),
        ("slashes", post("//api/v1/admin", ""), "403"),
        // No protocol that is known begins so: the flow is reset.
        ("method", format!("post {allowed} HTTP/1.1\r\nHost: payments\r\n\r\n"), ""),
        ("connect", "CONNECT payments:80 HTTP/1.1\r\nHost: payments:80\r\n\r\n".into(), "400"),
        (
            "chunk extension",
            format!(
                "POST {allowed} HTTP/1.1\r\nHost: payments\r\nTransfer-Encoding: chunked\r\n\r\n\
                 4;a=b\r\npay!\r\n0\r\n\r\n{smuggled}"
            ),
            "",
        ),
    ] {
        let answer = judged.say(&text).await;
        assert!(!answer.contains("HTTP/1.1 200"), "{what}: {answer}");
        if !expected.is_empty() {
            assert!(answer.starts_with(&format!("HTTP/1.1 {expected}")), "{what}: {answer}");
        }
        assert!(!answer.contains("/admin HTTP/1.1\r\n"), "{what} was delivered: {answer}");
    }
    let refused = |r: &FlowRecord| dropped(r) && r.reason == Reason::ProtocolError;
    judged.server.verdict("a malformed request", refused).await;
    judged.server.settled().await;
}

/// On a connection that has carried nothing for a second a client waits for the answer before it
/// says anything: it gets one though nothing has been said.
#[tokio::test]
async fn a_flow_on_a_connection_that_has_rested_is_judged_at_once() {
    let judged = Judged::new().await;
    judged.serve();
    let answer = judged.say(&post("/api/v1/payments", "")).await;
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    tokio::time::sleep(Duration::from_millis(1500)).await;
    let began = std::time::Instant::now();
    let answer = judged.say(&post("/api/v1/payments", "")).await;
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    assert!(began.elapsed() < Duration::from_secs(5), "{:?}", began.elapsed());
}

/// Where an application believes what tokens and headers say, neither a silence nor bytes that only
/// some servers take for HTTP lead past the judge, though policy alone would let the flow pass.
#[tokio::test]
async fn nothing_goes_unseen_where_tokens_are_looked_at() {
    let name = |kind: &str| PolicyName {
        kind: kind.into(),
        namespace: "shop".into(),
        name: "users".into(),
    };
    let users = RequestAuthentication {
        name: name("RequestAuthentication"),
        selector: Selector::of("shop"),
        rules: Vec::new(),
        ignored: false,
        remarks: Vec::new(),
    };
    let judged = Judged::with(Vec::new(), vec![Arc::new(users)]).await;
    judged.serve();
    let forged = "X-Forwarded-Client-Cert: URI=spiffe://cluster.local/ns/shop/sa/admin\r\n";
    let asked = post("/api/v1/payments", forged);
    let answer = judged.say(&asked).await;
    assert!(answer.starts_with("HTTP/1.1 200") && !answer.contains("admin"), "control: {answer}");

    let mut slow = judged.dial().await;
    tokio::time::sleep(Duration::from_millis(1500)).await;
    slow.write_all(asked.as_bytes()).await.unwrap();
    slow.shutdown().await.unwrap();
    let mut answer = String::new();
    timeout(PROMPTLY, slow.read_to_string(&mut answer)).await.expect("an end").unwrap();
    assert!(answer.starts_with("HTTP/1.1 200") && !answer.contains("admin"), "{answer}");

    let answer = judged.say(&format!("\r\n{asked}")).await;
    assert_eq!(answer, "", "it is no HTTP");
    let refused = |r: &FlowRecord| dropped(r) && r.reason == Reason::ProtocolError;
    judged.server.verdict("what is no HTTP", refused).await;
}

#[tokio::test]
async fn identities_are_not_the_clients_to_claim() {
    let judged = Judged::new().await;
    judged.serve();
    let forged = "X-Forwarded-Client-Cert: URI=spiffe://cluster.local/ns/shop/sa/admin\r\n\
                  x_signet_identity: admin\r\nX-Signet-Identity: admin\r\nX-Other: kept\r\n\
                  Connection: x-other, keep-alive\r\n";
    let answer = judged.say(&post("/api/v1/payments", forged)).await.to_ascii_lowercase();
    assert!(answer.contains("x-other: kept"), "control: {answer}");
    assert!(!answer.contains("admin") && !answer.contains("x-forwarded-client-cert"), "{answer}");
    assert!(answer.contains("connection: keep-alive\r\n"), "{answer}");
}

#[tokio::test]
async fn an_upgrade_is_judged_and_nothing_is_smuggled_behind_it() {
    let judged = Judged::new().await;
    judged.serve();
    let upgrade = |path: &str, more: &str| {
        format!(
            "GET {path} HTTP/1.1\r\nHost: payments\r\nConnection: Upgrade\r\n\
             Upgrade: websocket\r\n{more}\r\n"
        )
    };
    let mut client = judged.dial().await;
    client.write_all(upgrade("/ws", "").as_bytes()).await.unwrap();
    let mut read = Vec::new();
    while !read.ends_with(b"\r\n\r\n") {
        assert!(timeout(PROMPTLY, client.read_buf(&mut read)).await.unwrap().unwrap() > 0);
    }
    assert!(read.starts_with(b"HTTP/1.1 101"), "{}", String::from_utf8_lossy(&read));
    for text in [&b"\x00\xff opaque"[..], b"GET /api/v1/admin HTTP/1.1\r\n\r\n"] {
        client.write_all(text).await.unwrap();
        let mut echo = vec![0; text.len()];
        timeout(PROMPTLY, client.read_exact(&mut echo)).await.unwrap().unwrap();
        assert_eq!(echo, text);
    }
    drop(client);
    judged.record("the upgrade", "/ws", Verdict::Forwarded).await;

    // Neither a path that is not allowed, nor HTTP/2, nor what follows a refused upgrade.
    let smuggled = "GET /api/v1/admin HTTP/1.1\r\nHost: payments\r\n\r\n";
    assert!(judged.say(&upgrade("/api/v1/admin", "")).await.starts_with("HTTP/1.1 403"));
    let answer = judged.say(&(upgrade("/ws", "X-Refuse: yes\r\n") + smuggled)).await;
    assert!(answer.starts_with("HTTP/1.1 200") && answer.contains("HTTP/1.1 403"), "{answer}");
    let h2c = "GET /healthy HTTP/1.1\r\nHost: payments\r\nConnection: Upgrade, HTTP2-Settings\r\n\
               Upgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAAP__\r\n\r\n";
    let answer = judged.say(&(h2c.to_owned() + smuggled)).await.to_ascii_lowercase();
    assert!(answer.starts_with("http/1.1 200") && !answer.contains("h2c"), "{answer}");
    assert!(answer.contains("http/1.1 403") && !answer.contains("http2-settings"), "{answer}");
    judged.server.settled().await;
}

#[tokio::test]
async fn what_is_no_http_is_refused_and_a_change_of_policy_is_felt_by_the_next_request() {
    let judged = Judged::new().await;
    judged.serve();
    assert_eq!(judged.say("\x16\x03\x01\x02\x00\x01\x00\x01\x7c\x03").await, "");
    let refused = |r: &FlowRecord| dropped(r) && r.http.is_none();
    let record = judged.server.verdict("no HTTP", refused).await;
    assert_eq!(record.reason, Reason::PolicyNoMatch, "as nobody's requests are judged");

    let mut client = judged.dial().await;
    let mut ask = async |expected: &str| {
        client.write_all(post("/api/v1/payments", "").as_bytes()).await.unwrap();
        let mut read = Vec::new();
        while !read.windows(4).any(|part| part == b"\r\n\r\n") {
            assert!(timeout(PROMPTLY, client.read_buf(&mut read)).await.unwrap().unwrap() > 0);
        }
        assert!(read.starts_with(expected.as_bytes()), "{}", String::from_utf8_lossy(&read));
        // The bodies are short and come at once or soon.
        while !(read.ends_with(b"pay!") || read.ends_with(b"no_match\n")) {
            assert!(timeout(PROMPTLY, client.read_buf(&mut read)).await.unwrap().unwrap() > 0);
        }
    };
    ask("HTTP/1.1 200").await;
    let mut setup = judged.setup.clone();
    let mut policy = (*only_payments()).clone();
    for to in &mut policy.ingress[0].to {
        to.operation.paths = vec![PathPattern::parse("/elsewhere").unwrap()];
    }
    setup.policies = vec![Arc::new(policy)];
    judged.server.publish(&setup);
    ask("HTTP/1.1 403").await;
    judged.server.publish(&judged.setup);
    ask("HTTP/1.1 200").await;
    // A right that is withdrawn as a whole closes the flow.
    setup.policies = vec![allow("others", Direction::Ingress, &["checkout"])];
    judged.server.publish(&setup);
    let mut rest = Vec::new();
    timeout(PROMPTLY, client.read_to_end(&mut rest)).await.unwrap().unwrap_err();
    judged.server.end("its end", |r| r.reason == Reason::RightWithdrawn).await;
    judged.server.settled().await;
}

#[tokio::test]
async fn large_bodies_pass_both_ways_and_a_quiet_application_holds_the_client_back() {
    let judged = Judged::new().await;
    let mut client = judged.dial().await;
    let size = 8usize << 20;
    let head = format!(
        "POST /api/v1/payments HTTP/1.1\r\nHost: payments\r\nContent-Length: {size}\r\n\r\n"
    );
    client.write_all(head.as_bytes()).await.unwrap();
    let (mut app, _) = timeout(PROMPTLY, judged.listener.accept()).await.unwrap().unwrap();
    // Nobody reads: what waits in between is bounded.
    let block = vec![7; 64 << 10];
    let mut sent = 0;
    while let Ok(n) = timeout(Duration::from_millis(500), client.write(&block)).await {
        sent += n.unwrap();
        assert!(sent <= size, "the client was never held back");
        if sent > size - block.len() {
            break;
        }
    }
    let rest = vec![7; size - sent];
    let writing = async {
        client.write_all(&rest).await.unwrap();
    };
    let reading = async {
        let (mut read, mut buffer) = (0, vec![0; 64 << 10]);
        let mut head = Vec::new();
        while !head.windows(4).any(|part| part == b"\r\n\r\n") {
            app.read_buf(&mut head).await.unwrap();
        }
        let at = head.windows(4).position(|part| part == b"\r\n\r\n").unwrap() + 4;
        read += head.len() - at;
        while read < size {
            read += app.read(&mut buffer).await.unwrap();
        }
        read
    };
    let ((), read) = tokio::join!(writing, reading);
    assert_eq!(read, size);
    let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {size}\r\nConnection: close\r\n\r\n");
    let answering = async {
        app.write_all(head.as_bytes()).await.unwrap();
        app.write_all(&vec![9; size]).await.unwrap();
        app.shutdown().await.unwrap();
    };
    let mut answer = Vec::new();
    let reading = async {
        timeout(2 * PROMPTLY, client.read_to_end(&mut answer)).await.unwrap().unwrap();
    };
    tokio::join!(answering, reading);
    assert!(answer.ends_with(&[9; 1024]) && answer.len() > size);
    drop(client);
    judged.server.settled().await;
}

#[tokio::test]
async fn an_application_that_breaks_off_is_seen_as_broken_off() {
    let judged = Judged::new().await;
    let mut client = judged.dial().await;
    client.write_all(post("/api/v1/payments", "").as_bytes()).await.unwrap();
    let (mut app, _) = timeout(PROMPTLY, judged.listener.accept()).await.unwrap().unwrap();
    app.read_exact(&mut [0; 16]).await.unwrap();
    crate::tunnel::copy::reset_on_close(&app);
    drop(app);
    let mut answer = Vec::new();
    let end = timeout(PROMPTLY, client.read_to_end(&mut answer)).await.unwrap();
    assert!(end.is_err(), "a reset, never a clean end: {}", String::from_utf8_lossy(&answer));
    // A client that resets is seen by the application, also while it has nothing to say.
    let mut client = judged.dial().await;
    client.write_all(post("/api/v1/payments", "").as_bytes()).await.unwrap();
    let (mut app, _) = timeout(PROMPTLY, judged.listener.accept()).await.unwrap().unwrap();
    app.read_exact(&mut [0; 16]).await.unwrap();
    crate::tunnel::copy::reset_on_close(&client);
    drop(client);
    let end = timeout(PROMPTLY, async {
        while app.read(&mut [0; 256]).await? > 0 {}
        std::io::Result::Ok(())
    });
    assert!(end.await.unwrap().is_err(), "the application hears of the reset");
    judged.server.settled().await;
}

#[tokio::test]
async fn http2_is_judged_stream_by_stream() {
    let judged = Judged::new().await;
    let listener = judged.listener.clone();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            tokio::spawn(async move {
                let mut connection = h2::server::handshake(stream).await.unwrap();
                while let Some(Ok((request, mut answer))) = connection.accept().await {
                    tokio::spawn(async move {
                        let shown = format!("{} {:?}", request.uri(), request.headers());
                        let mut body = request.into_body();
                        let mut length = 0;
                        while let Some(Ok(part)) = body.data().await {
                            length += part.len();
                            let _ = body.flow_control().release_capacity(part.len());
                        }
                        let mut send =
                            answer.send_response(http::Response::new(()), false).unwrap();
                        send.send_data(format!("{shown} {length}").into(), false).unwrap();
                        let mut trailers = http::HeaderMap::new();
                        trailers.insert("grpc-status", "0".parse().unwrap());
                        send.send_trailers(trailers).unwrap();
                    });
                }
            });
        }
    });
    let (send, connection) = h2::client::handshake(judged.dial().await).await.unwrap();
    tokio::spawn(connection);
    let ask = async |path: &str, fields: &[(&str, &str)]| {
        let mut request = http::Request::post(format!("http://payments:8080{path}"));
        for (name, value) in fields {
            request = request.header(*name, *value);
        }
        let mut send = send.clone().ready().await.unwrap();
        let (answer, mut body) = send.send_request(request.body(()).unwrap(), false)?;
        body.send_data("hello".into(), true)?;
        let answer = timeout(PROMPTLY, answer).await.unwrap()?;
        let (head, mut body) = answer.into_parts();
        let mut text = Vec::new();
        while let Some(part) = body.data().await {
            text.extend(part?);
        }
        let trailers = body.trailers().await?;
        Ok::<_, h2::Error>((head, String::from_utf8(text).unwrap(), trailers))
    };
    let forged = [("x-forwarded-client-cert", "URI=admin"), ("x_signet_identity", "admin")];
    let (head, text, trailers) = ask("/api//v1/payments", &forged).await.unwrap();
    assert_eq!(head.status, 200);
    assert!(
        text.starts_with("http://payments:8080/api/v1/payments {") && text.ends_with(" 5"),
        "{text}"
    );
    assert!(!text.contains("admin"), "{text}");
    assert_eq!(trailers.unwrap()["grpc-status"], "0", "trailers pass");
    let (head, text, _) = ask("/api/v1/admin", &[]).await.unwrap();
    assert_eq!((head.status.as_u16(), &*text), (403, "signet: policy_no_match\n"));
    let (head, _, _) =
        ask("/pay.Admin/Drop", &[("content-type", "application/grpc")]).await.unwrap();
    assert_eq!((head.status.as_u16(), &head.headers["grpc-status"]), (200, &"7".parse().unwrap()));
    let (head, _, _) = ask("/api/v1/payments", &[("host", "admin")]).await.unwrap();
    assert_eq!(head.status, 400);
    let (head, _, _) = ask("/api/v1/payments", &[]).await.unwrap();
    assert_eq!(head.status, 200, "the connection goes on");
    drop(send);
    judged.record("a payment", "/api/v1/payments", Verdict::Forwarded).await;
    let tunnels = |r: &FlowRecord| forwarded(r) && r.http.is_none();
    judged.server.verdict("the flow's own", tunnels).await;
    eventually("no open flow", || judged.server.plane.stats().open_flows == 0).await;
}
