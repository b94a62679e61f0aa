//! Flows as applications and records see them.

use std::{
    io,
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use signet_ebpf::abi::{Direction, Mode, Reason, Verdict};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    time::{sleep, timeout},
};

use super::{
    APP_PORT, Authority, CLIENT_IP, Net, Node, OTHER_IP, SERVER_IP, Setup, WIRES, address, allow,
    domain, dropped, eventually, forwarded, identity, ip, limits, pod, world,
};
use crate::{
    config::{Limits, values::TunnelWire},
    endpoint::sockets::ListenerCommand,
    flow::{FlowEvent, FlowRecord, KnownBy, Reporter, Via},
    kernel::Confirm,
    proxy::DataPlaneConfig,
    tunnel::copy::reset_on_close,
};

const PROMPTLY: Duration = Duration::from_secs(3);

/// A client's node and a server's node.
struct Pair {
    net: Net,
    client: Node,
    server: Node,
    client_setup: Setup,
    server_setup: Setup,
    _authority: Authority,
}

impl Pair {
    async fn new() -> Self {
        Self::with(|_| {}).await
    }

    async fn with(adjust: impl Fn(&mut DataPlaneConfig)) -> Self {
        Self::at(CLIENT_IP, SERVER_IP, adjust).await
    }

    async fn at(client_ip: &str, server_ip: &str, adjust: impl Fn(&mut DataPlaneConfig)) -> Self {
        let net = Net::new().await;
        let authority = Authority::new();
        let adjust = |config: &mut DataPlaneConfig| {
            config.wires = WIRES;
            adjust(config);
        };
        let frontend = pod("frontend", client_ip, Mode::Strict);
        let payments = pod("payments", server_ip, Mode::Strict);
        let world = world(7, &[frontend.clone(), payments.clone()], &[&frontend, &payments]);
        let policies = vec![allow("payments-callers", Direction::Ingress, &["frontend"])];
        let client_setup = Setup {
            pod: frontend,
            policies: Vec::new(),
            world: world.clone(),
            authentications: Vec::new(),
        };
        let server_setup = Setup { pod: payments, policies, world, authentications: Vec::new() };
        let client = Node::start(&net, &authority, "node-1", &client_setup, &adjust).await;
        let server = Node::start(&net, &authority, "node-2", &server_setup, &adjust).await;
        Self { net, client, server, client_setup, server_setup, _authority: authority }
    }

    fn app(&self) -> SocketAddr {
        SocketAddr::new(self.server_setup.pod.ips[0], APP_PORT)
    }

    async fn listen(&self) -> TcpListener {
        self.net.listen(self.app()).await
    }

    /// Waits until neither end has an open flow: what they used may be used again.
    async fn settled(&self) {
        self.client.settled().await;
        self.server.settled().await;
    }

    /// An established flow: the client's and the server's sockets, after one byte.
    async fn flow(&self, listener: &TcpListener) -> (TcpStream, TcpStream) {
        let mut client = self.client.dial(&self.net, self.app()).await;
        client.write_all(b"!").await.unwrap();
        let (mut server, _) = timeout(PROMPTLY, listener.accept()).await.unwrap().unwrap();
        server.read_exact(&mut [0]).await.unwrap();
        (client, server)
    }
}

/// How a read ends: `Ok(true)` reset, `Ok(false)` a clean end.
async fn is_reset(app: &mut TcpStream) -> bool {
    let mut byte = [0; 16];
    loop {
        match timeout(PROMPTLY, app.read(&mut byte)).await.expect("the flow ends promptly") {
            Err(e) => return e.kind() == io::ErrorKind::ConnectionReset,
            Ok(0) => return false,
            Ok(_) => {}
        }
    }
}

#[tokio::test]
async fn an_allowed_flow_reaches_the_application_and_both_ends_record_it() {
    let pair = Pair::new().await;
    let listener = pair.listen().await;
    let (mut client, mut server) = pair.flow(&listener).await;
    client.write_all(b"question").await.unwrap();
    client.shutdown().await.unwrap();
    let mut question = Vec::new();
    server.read_to_end(&mut question).await.unwrap();
    server.write_all(b"the answer").await.unwrap();
    drop(server);
    let mut answer = Vec::new();
    client.read_to_end(&mut answer).await.unwrap();
    assert_eq!((question.as_slice(), answer.as_slice()), (&b"question"[..], &b"the answer"[..]));

    let there = pair.server.verdict("verdict", |_| true).await;
    assert_eq!((there.verdict, there.reason), (Verdict::Forwarded, Reason::Allowed));
    assert_eq!(there.policy.as_ref().map(|p| &*p.name), Some("payments-callers"));
    assert_eq!((there.reporter, there.via, there.revision), (Reporter::Destination, Via::Mtls, 7));
    assert_eq!(there.source.identity, Some(identity("frontend")));
    assert_eq!(there.source.known_by, KnownBy::Mtls);
    assert_eq!(there.source.pod, Some(("shop".into(), "frontend-0".into())));
    assert_eq!((there.destination.ip, there.destination.port), (ip(SERVER_IP), APP_PORT));
    // The application was shown the client's pod address and the application's own port.
    let shown = pair.server.kernel.shown.lock().unwrap().clone();
    assert_eq!(shown, [SocketAddr::new(ip(CLIENT_IP), there.source.port)]);

    let here = pair.client.verdict("verdict", |_| true).await;
    assert_eq!((here.verdict, here.reason), (Verdict::Forwarded, Reason::Allowed));
    assert_eq!((here.reporter, here.direction), (Reporter::Source, Direction::Egress));
    assert_eq!(here.destination.known_by, KnownBy::Mtls);
    assert_eq!(here.destination.identity, Some(identity("payments")));
    assert_eq!(here.uuid, there.uuid, "both ends share the flow's uuid");
    assert_eq!(here.source.port, there.source.port);

    for (node, what) in [(&pair.client, "source"), (&pair.server, "destination")] {
        let end = node.end("end", |r| r.uuid == here.uuid).await;
        assert_eq!(end.reason, Reason::Allowed, "{what}");
        match end.event {
            FlowEvent::End { sent, received, .. } => {
                assert_eq!((sent, received), (9, 10), "{what}");
            }
            FlowEvent::Verdict => unreachable!("asked for the end"),
        }
        node.settled().await;
    }
}

#[tokio::test]
async fn the_same_over_ipv6() {
    let pair = Pair::at("fd77::1", "fd77::2", |_| {}).await;
    let listener = pair.listen().await;
    let (client, mut server) = pair.flow(&listener).await;
    drop(client);
    assert!(!is_reset(&mut server).await);
    let shown = pair.server.kernel.shown.lock().unwrap().clone();
    assert_eq!(shown.iter().map(SocketAddr::ip).collect::<Vec<_>>(), [ip("fd77::1")]);
}

#[tokio::test]
async fn a_denied_identity_is_reset_and_both_nodes_say_why_until_the_policy_changes() {
    let pair = Pair::new().await;
    let listener = pair.listen().await;
    let mut setup = pair.server_setup.clone();
    setup.policies = vec![allow("payments-callers", Direction::Ingress, &["checkout"])];
    setup.world.revision = 8;
    pair.server.publish(&setup);

    let mut client = pair.client.dial(&pair.net, pair.app()).await;
    assert!(is_reset(&mut client).await, "the application sees a reset, never a clean end");
    let there = pair.server.verdict("denial", dropped).await;
    let here = pair.client.verdict("denial", dropped).await;
    for record in [&there, &here] {
        assert_eq!(record.reason, Reason::PolicyNoMatch);
        assert_eq!(record.policy.as_ref().map(|p| &*p.name), Some("payments-callers"));
    }
    assert_eq!((there.uuid, there.revision), (here.uuid, 8));
    assert!(
        timeout(Duration::from_millis(50), listener.accept()).await.is_err(),
        "nothing reached the application"
    );

    // The same dial passes once the policy names the client; a denial costs no connection.
    pair.server.publish(&pair.server_setup);
    let (_client, _server) = pair.flow(&listener).await;
    assert!(pair.client.plane.stats().dialled <= 2, "at most one a core");
}

#[tokio::test]
async fn egress_policy_refuses_before_anything_is_dialled() {
    let pair = Pair::new().await;
    let listener = pair.listen().await;
    let mut setup = pair.client_setup.clone();
    setup.policies = vec![allow("may-call", Direction::Egress, &["ledger"])];
    pair.client.publish(&setup);
    let mut client = pair.client.dial(&pair.net, pair.app()).await;
    assert!(is_reset(&mut client).await);
    let here = pair.client.verdict("denial", dropped).await;
    assert_eq!(here.reason, Reason::PolicyNoMatch);
    assert_eq!(here.policy.as_ref().map(|p| &*p.name), Some("may-call"));
    assert_eq!(pair.client.plane.stats().dialled, 0);
    assert!(pair.server.records().is_empty());

    setup.policies = vec![allow("may-call", Direction::Egress, &["payments"])];
    pair.client.publish(&setup);
    pair.flow(&listener).await;
}

#[tokio::test]
async fn an_svid_from_the_address_of_another_accounts_pod_is_told() {
    let pair = Pair::new().await;
    let listener = pair.listen().await;
    pair.flow(&listener).await;
    let first = pair.server.verdict("the pod's own address", forwarded).await;
    let told = |record: &FlowRecord| record.extra.iter().any(|(key, _)| *key == "addressOf");
    assert!(!told(&first), "{first:?}");
    assert_eq!(pair.server.plane.stats().misplaced, 0);

    let mut setup = pair.server_setup.clone();
    let intruder = pod("intruder", CLIENT_IP, Mode::Strict);
    setup.world = world(8, &[intruder, setup.pod.clone()], &[&setup.pod]);
    pair.server.publish(&setup);
    let (_client, _server) = pair.flow(&listener).await;
    let second = pair.server.verdict("another account's", told).await;
    assert!(second.extra.contains(&("addressOf", "shop/intruder-0".into())), "{second:?}");
    assert_eq!(second.source.identity, Some(identity("frontend")), "the certificate counts");
    assert!(forwarded(&second), "{second:?}");
    assert_eq!(pair.server.plane.stats().misplaced, 1);
}

#[tokio::test]
async fn an_open_flow_that_loses_its_right_is_reset_within_a_second() {
    for at_server in [true, false] {
        let pair = Pair::new().await;
        let listener = pair.listen().await;
        let (mut client, mut server) = pair.flow(&listener).await;
        // A change that takes nothing away leaves the flow alone.
        pair.server.publish(&pair.server_setup);
        pair.client.publish(&pair.client_setup);
        sleep(Duration::from_millis(100)).await;
        client.write_all(b"?").await.unwrap();
        timeout(PROMPTLY, server.read_exact(&mut [0])).await.unwrap().unwrap();

        let began = Instant::now();
        let node = if at_server {
            let mut setup = pair.server_setup.clone();
            setup.policies = vec![allow("others", Direction::Ingress, &["checkout"])];
            pair.server.publish(&setup);
            &pair.server
        } else {
            let mut setup = pair.client_setup.clone();
            setup.policies = vec![allow("others", Direction::Egress, &["ledger"])];
            pair.client.publish(&setup);
            &pair.client
        };
        assert!(is_reset(&mut client).await && is_reset(&mut server).await);
        assert!(began.elapsed() < Duration::from_secs(1), "{:?}", began.elapsed());
        let end = node.end("end", |_| true).await;
        assert_eq!(end.reason, Reason::RightWithdrawn, "at_server={at_server}");
        pair.client.settled().await;
        pair.server.settled().await;
    }
}

#[tokio::test]
async fn flows_end_when_trust_in_the_peers_domain_ends() {
    let pair = Pair::new().await;
    let listener = pair.listen().await;
    let (mut client, mut server) = pair.flow(&listener).await;
    pair.server.trust.remove(&super::domain());
    assert!(is_reset(&mut client).await && is_reset(&mut server).await);
    assert_eq!(pair.server.end("end", |_| true).await.reason, Reason::UntrustedPeer);
}

#[tokio::test]
async fn resets_travel_both_ways_and_leave_nothing_behind() {
    // One core: one pooled connection, however the flows fall.
    let pair = Pair::with(|config| config.cores = 1).await;
    let listener = pair.listen().await;
    pair.flow(&listener).await;
    eventually("flows end", || pair.server.plane.stats().open_flows == 0).await;
    let tasks = (pair.client.plane.stats().tasks, pair.server.plane.stats().tasks);
    for client_resets in [true, false] {
        let (client, server) = pair.flow(&listener).await;
        let (resetter, mut victim) =
            if client_resets { (client, server) } else { (server, client) };
        reset_on_close(&resetter);
        drop(resetter);
        assert!(is_reset(&mut victim).await, "client_resets={client_resets}");
    }
    pair.client.settled().await;
    pair.server.settled().await;
    // No more tasks than before: the listeners, and the pooled connection unless it went with
    // its flow.
    eventually("tasks end", || {
        let (client, server) = (pair.client.plane.stats().tasks, pair.server.plane.stats().tasks);
        client <= tasks.0 && server <= tasks.1
    })
    .await;
}

#[tokio::test]
async fn short_connections_reach_their_own_server_and_leak_nothing() {
    let pair = Pair::new().await;
    let listener = pair.listen().await;
    let echo = tokio::spawn(async move {
        while let Ok((mut socket, _)) = listener.accept().await {
            tokio::spawn(async move {
                let (mut r, mut w) = socket.split();
                // A reset by the client is one of the cases.
                let _ = tokio::io::copy(&mut r, &mut w).await;
            });
        }
    });
    let descriptors = || std::fs::read_dir("/proc/self/fd").unwrap().count();
    let before = descriptors();
    for round in 0..6u64 {
        let flows = (0..48u64).map(|i| {
            let pair = &pair;
            async move {
                let mut client = pair.client.dial(&pair.net, pair.app()).await;
                match i % 3 {
                    0 => {
                        let nonce = (round << 32 | i).to_be_bytes();
                        client.write_all(&nonce).await.unwrap();
                        client.shutdown().await.unwrap();
                        let mut back = Vec::new();
                        client.read_to_end(&mut back).await.unwrap();
                        assert_eq!(back, nonce);
                    }
                    1 => drop(client),
                    _ => reset_on_close(&client),
                }
            }
        });
        futures_util::future::join_all(flows).await;
    }
    pair.client.settled().await;
    pair.server.settled().await;
    let stats = pair.client.plane.stats();
    let most = if WIRES == TunnelWire::Hbone { 4 } else { stats.forwarded / 2 };
    assert!(stats.dialled <= most, "the flows share connections: {stats:?}");
    // Those that are kept have two ends here.
    let kept = 2 * stats.pooled_connections;
    eventually("descriptors are closed", || descriptors() <= before + 12 + kept).await;
    echo.abort();
}

#[tokio::test]
async fn bulk_arrives_unchanged_both_ways() {
    let pair = Pair::new().await;
    let listener = pair.listen().await;
    let (client, server) = pair.flow(&listener).await;
    let total: usize = 32 << 20;
    let byte = |i: usize| (i.wrapping_mul(2_654_435_761) >> 13) as u8;
    let send = |mut w: tokio::net::tcp::OwnedWriteHalf| async move {
        let mut at = 0;
        while at < total {
            let n = (total - at).min(100_000);
            let chunk: Vec<u8> = (at..at + n).map(byte).collect();
            w.write_all(&chunk).await.unwrap();
            at += n;
        }
        w.shutdown().await.unwrap();
    };
    let receive = |mut r: tokio::net::tcp::OwnedReadHalf| async move {
        let mut buffer = vec![0; 256 << 10];
        let mut at = 0;
        loop {
            let n = r.read(&mut buffer).await.unwrap();
            if n == 0 {
                return at;
            }
            assert!(buffer[..n].iter().enumerate().all(|(i, &b)| b == byte(at + i)));
            at += n;
        }
    };
    let ((cr, cw), (sr, sw)) = (client.into_split(), server.into_split());
    let ((), (), a, b) = tokio::join!(send(cw), send(sw), receive(cr), receive(sr));
    assert_eq!((a, b), (total, total));
    pair.client.settled().await;
}

#[tokio::test]
async fn an_application_that_refuses_is_told_apart() {
    let pair = Pair::new().await;
    let mut client = pair.client.dial(&pair.net, pair.app()).await;
    assert!(is_reset(&mut client).await);
    assert_eq!(pair.server.verdict("denial", dropped).await.reason, Reason::AppUnreachable);
    assert_eq!(pair.client.verdict("denial", dropped).await.reason, Reason::AppUnreachable);
    assert_eq!(*pair.server.kernel.forgotten.lock().unwrap(), 1, "the entry is taken back");
    let listener = pair.listen().await;
    pair.flow(&listener).await;
    assert_eq!(*pair.server.kernel.forgotten.lock().unwrap(), 1);
}

#[tokio::test]
async fn an_application_that_would_see_another_peer_gets_nothing() {
    let pair = Pair::new().await;
    let listener = pair.listen().await;
    for (answer, longest) in [(Confirm::Missing, 500), (Confirm::Waiting, 2500)] {
        *pair.server.kernel.confirm.lock().unwrap() = Some(answer);
        let began = Instant::now();
        let mut client = pair.client.dial(&pair.net, pair.app()).await;
        // The reset may be there first.
        let _ = client.write_all(b"secret").await;
        let (mut server, _) = listener.accept().await.unwrap();
        let mut got = Vec::new();
        let end = timeout(PROMPTLY, server.read_to_end(&mut got)).await.unwrap();
        assert_eq!(end.unwrap_err().kind(), io::ErrorKind::ConnectionReset);
        assert!(got.is_empty(), "no byte was delivered");
        assert!(is_reset(&mut client).await);
        assert!(began.elapsed() < Duration::from_millis(longest), "{answer:?}");
        let reason = Reason::SourceNotPreserved;
        pair.client.verdict("denial", |r| dropped(r) && r.reason == reason).await;
        pair.server.verdict("denial", |r| dropped(r) && r.reason == reason).await;
    }
    *pair.server.kernel.confirm.lock().unwrap() = None;
    pair.flow(&listener).await;
}

#[tokio::test]
async fn a_dial_of_the_listener_itself_is_reset() {
    let pair = Pair::new().await;
    let mut stray = pair.client.dial_listener(&pair.net).await;
    assert!(is_reset(&mut stray).await);
    assert_eq!(pair.client.plane.stats().unattributed, 1);
    assert!(pair.client.records().is_empty());
}

#[tokio::test]
async fn the_limit_of_open_flows_holds_at_both_ends() {
    let two = Limits { open_flows: 2, ..limits() };
    for at_server in [true, false] {
        let pair = Pair::new().await;
        let listener = pair.listen().await;
        let limited = if at_server { &pair.server } else { &pair.client };
        limited.plane.set_limits(two);
        let first = pair.flow(&listener).await;
        let _second = pair.flow(&listener).await;
        let mut third = pair.client.dial(&pair.net, pair.app()).await;
        assert!(is_reset(&mut third).await);
        let denial = limited.verdict("denial", dropped).await;
        assert_eq!(denial.reason, Reason::LimitExceeded, "at_server={at_server}");
        assert_eq!(pair.client.verdict("denial", dropped).await.reason, Reason::LimitExceeded);
        drop(first);
        eventually("a place comes back", || limited.plane.stats().open_flows < 2).await;
        pair.flow(&listener).await;
    }
}

#[tokio::test]
async fn an_enrolled_peer_that_is_not_served_is_never_dialled_in_clear_from_strict() {
    let pair = Pair::new().await;
    let listener = pair.listen().await;
    let mut setup = pair.client_setup.clone();
    setup.world.served.remove(&pair.server_setup.pod.uid);
    pair.client.publish(&setup);
    let mut client = pair.client.dial(&pair.net, pair.app()).await;
    assert!(is_reset(&mut client).await);
    assert_eq!(pair.client.verdict("denial", dropped).await.reason, Reason::PeerUnreachable);
    assert!(timeout(Duration::from_millis(50), listener.accept()).await.is_err());

    // From permissive it goes direct, from the pod's own address, and says so.
    setup.pod = pod("frontend", CLIENT_IP, Mode::Permissive);
    pair.client.publish(&setup);
    let mut client = pair.client.dial(&pair.net, pair.app()).await;
    client.write_all(b"clear").await.unwrap();
    let (mut server, from) = listener.accept().await.unwrap();
    assert_eq!(from.ip(), ip(CLIENT_IP));
    server.read_exact(&mut [0; 5]).await.unwrap();
    let here = pair.client.verdict("verdict", forwarded).await;
    assert_eq!((here.via, here.destination.known_by), (Via::Plaintext, KnownBy::Address));

    // Turning strict ends it after the grace.
    let mut strict = setup.clone();
    strict.pod = pair.client_setup.pod.clone();
    let began = Instant::now();
    pair.client.publish(&strict);
    assert!(is_reset(&mut client).await);
    assert!(began.elapsed() >= Duration::from_millis(300), "{:?}", began.elapsed());
    assert_eq!(pair.client.end("end", |_| true).await.reason, Reason::RightWithdrawn);
}

#[tokio::test]
async fn a_peer_with_another_identity_than_the_address_may_have_is_refused() {
    let pair = Pair::new().await;
    let listener = pair.listen().await;
    // The client's world says that another account has the server's address.
    let mut setup = pair.client_setup.clone();
    let ledger = pod("ledger", SERVER_IP, Mode::Strict);
    setup.world = world(8, &[setup.pod.clone(), ledger.clone()], &[&ledger]);
    pair.client.publish(&setup);
    let mut client = pair.client.dial(&pair.net, pair.app()).await;
    assert!(is_reset(&mut client).await);
    assert_eq!(pair.client.verdict("denial", dropped).await.reason, Reason::IdentityMismatch);
    pair.client.publish(&pair.client_setup);
    pair.flow(&listener).await;
}

#[tokio::test]
async fn a_client_whose_address_is_anothers_in_the_world_is_known_by_its_certificate_only() {
    let pair = Pair::new().await;
    let listener = pair.listen().await;
    let mut setup = pair.server_setup.clone();
    let checkout = pod("checkout", CLIENT_IP, Mode::Strict);
    setup.world = world(8, &[checkout, setup.pod.clone()], &[]);
    pair.server.publish(&setup);
    pair.flow(&listener).await;
    let there = pair.server.verdict("verdict", forwarded).await;
    assert_eq!(there.source.identity, Some(identity("frontend")));
    assert_eq!(there.source.pod, None, "the names would be checkout's");
}

#[tokio::test]
async fn nobody_at_the_tunnel_port_is_peer_unreachable() {
    let pair = Pair::new().await;
    let lonely = pod("lonely", OTHER_IP, Mode::Strict);
    let mut setup = pair.client_setup.clone();
    setup.world = world(8, &[setup.pod.clone(), lonely.clone()], &[&lonely]);
    pair.client.publish(&setup);
    let mut client = pair.client.dial(&pair.net, address(OTHER_IP, APP_PORT)).await;
    assert!(is_reset(&mut client).await);
    let denial = pair.client.verdict("denial", dropped).await;
    assert_eq!(denial.reason, Reason::PeerUnreachable);
    assert_eq!(denial.extra, [("error", "connect".to_owned())]);
}

#[tokio::test]
async fn stopping_an_endpoint_ends_its_flows_in_their_time() {
    let pair = Pair::new().await;
    let listener = pair.listen().await;
    let (mut client, mut server) = pair.flow(&listener).await;
    let stop = |drain| ListenerCommand::Stop { key: pair.server.key.clone(), drain };
    pair.server.commands.send(stop(Duration::from_millis(500))).unwrap();
    sleep(Duration::from_millis(150)).await;
    // Open flows go on, new ones are refused.
    client.write_all(b"?").await.unwrap();
    timeout(PROMPTLY, server.read_exact(&mut [0])).await.unwrap().unwrap();
    let mut late = pair.client.dial(&pair.net, pair.app()).await;
    assert!(is_reset(&mut late).await);
    assert!(is_reset(&mut client).await && is_reset(&mut server).await);
    pair.server.settled().await;
    eventually("its tasks end", || pair.server.plane.stats().tasks == 0).await;
}

#[tokio::test]
async fn a_peer_that_says_goodbye_while_flows_are_open_gets_a_new_connection() {
    let pair = Pair::with(|config| config.cores = 1).await;
    let listener = pair.listen().await;
    let (mut client, mut server) = pair.flow(&listener).await;
    // Trust changes at the server only: it retires the connection, the open flow goes on.
    let other = Authority::new();
    let elsewhere = crate::spiffe::TrustDomain::parse("other.test").unwrap();
    pair.server.trust.set(elsewhere, other.issuer.bundle());
    sleep(Duration::from_millis(200)).await;
    for _ in 0..3 {
        pair.flow(&listener).await;
    }
    // One more, which is shared again; over the native wire one a flow at most.
    let most = if WIRES == TunnelWire::Hbone { 2 } else { 4 };
    let dialled = pair.client.plane.stats().dialled;
    assert!((2..=most).contains(&dialled), "{dialled} connections");
    client.write_all(b"?").await.unwrap();
    timeout(PROMPTLY, server.read_exact(&mut [0])).await.unwrap().unwrap();
}

#[tokio::test]
async fn a_bundle_that_is_withdrawn_ends_the_flows_of_its_domain() {
    for at_server in [true, false] {
        let pair = Pair::with(|config| config.cores = 1).await;
        let listener = pair.listen().await;
        let (mut client, mut server) = pair.flow(&listener).await;
        let node = if at_server { &pair.server } else { &pair.client };
        // The control: a further root changes nothing for those who are still trusted.
        let elsewhere = crate::spiffe::TrustDomain::parse("other.test").unwrap();
        node.trust.set(elsewhere, Authority::new().issuer.bundle());
        sleep(Duration::from_millis(100)).await;
        client.write_all(b"?").await.unwrap();
        timeout(PROMPTLY, server.read_exact(&mut [0])).await.unwrap().unwrap();

        node.trust.set(domain(), Authority::new().issuer.bundle());
        assert!(is_reset(&mut client).await && is_reset(&mut server).await);
        eventually("the end says why", || {
            let ended = |r: &FlowRecord| {
                matches!(r.event, FlowEvent::End { .. }) && r.reason == Reason::UntrustedPeer
            };
            node.records().iter().any(|r| ended(r))
        })
        .await;
        let mut late = pair.client.dial(&pair.net, pair.app()).await;
        assert!(is_reset(&mut late).await, "nor is a new one let through");
    }
}

#[tokio::test]
async fn a_pod_that_takes_over_an_address_does_not_get_its_predecessors_connections() {
    let pair = Pair::with(|config| config.cores = 1).await;
    let listener = pair.listen().await;
    pair.flow(&listener).await;
    pair.settled().await;
    pair.flow(&listener).await;
    pair.settled().await;
    assert_eq!(pair.client.plane.stats().dialled, 1);
    let mut setup = pair.client_setup.clone();
    let mut successor = (*pair.server_setup.pod).clone();
    successor.uid = "uid-successor".into();
    let successor = Arc::new(successor);
    setup.world = world(8, &[setup.pod.clone(), successor.clone()], &[&successor]);
    pair.client.publish(&setup);
    pair.flow(&listener).await;
    assert_eq!(pair.client.plane.stats().dialled, 2);
}

#[tokio::test]
async fn draining_lets_flows_finish_and_cuts_the_rest() {
    let pair = Pair::new().await;
    let listener = pair.listen().await;
    let (mut quick, mut quick_server) = pair.flow(&listener).await;
    let (mut slow, _slow_server) = pair.flow(&listener).await;
    let Pair { client, server, .. } = pair;
    let client = Arc::new(client);
    let node = client.clone();
    let drained = tokio::spawn(async move { node.plane.drain(Duration::from_millis(800)).await });
    sleep(Duration::from_millis(100)).await;
    quick.write_all(b"last words").await.unwrap();
    quick.shutdown().await.unwrap();
    let mut got = Vec::new();
    quick_server.read_to_end(&mut got).await.unwrap();
    assert_eq!(got, b"last words");
    drop(quick_server);
    assert!(!is_reset(&mut quick).await, "what finished in time ended cleanly");
    assert!(is_reset(&mut slow).await, "what did not was cut");
    timeout(Duration::from_secs(5), drained).await.unwrap().unwrap();
    assert_eq!(client.plane.stats().tasks, 0);
    server.settled().await;
}
