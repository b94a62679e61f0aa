//! The binary against agents' services on real sockets: output, warnings and exit codes.

mod browser;
mod bundle;
mod check;
mod exits;
mod golden;
mod known;
mod top;
mod ui;

use std::{
    collections::HashMap,
    io::{BufRead, BufReader, Write as _},
    net::{IpAddr, SocketAddr},
    os::unix::fs::PermissionsExt,
    path::Path,
    process::{Command, Output, Stdio},
    sync::Arc,
    time::Duration,
};

use jiff::{SignedDuration, Timestamp};
use signet::{
    admin::{
        Admin, DropCount, EnforcementState, IssuerFacts, KernelFacts, StatusInputs, SvidFacts,
        SvidState,
        socket::{AdminSocket, path_in},
    },
    cluster::{
        model::{ModeOrigin, ObjectName, Pod, Problem, Synced, World},
        source::{WatchFacts, WatchState},
    },
    endpoint::{
        reconcile::Survey,
        state::{EndpointKey, EndpointState, NodeState, Waiting},
    },
    flow::{
        self, FlowEvent, FlowRecord, KnownBy, Limits, LostCause, Party, Recorder, Reporter, Via,
    },
    observer::{self, Observer},
    policy::model::PolicyName,
    socket_file::SocketError,
    spiffe::{SpiffeId, TrustDomain},
    telemetry::recent::Recent,
};
use signet_ebpf::abi::{Direction, DropKey, Ip, Mode, Reason, Verdict};
use tempfile::TempDir;
use tonic::service::Routes;
use tracing_subscriber::fmt::MakeWriter as _;
use uuid::Uuid;

/// An agent's two services over made-up inputs.
struct Node {
    dir: TempDir,
    recorder: Recorder,
    logs: Recent,
}

impl Node {
    /// Serves until the test's runtime ends.
    fn start(inputs: StatusInputs) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let socket = AdminSocket::bind(dir.path()).unwrap();
        let edges = flow::Edges::default();
        let (recorder, collector) = flow::start(
            Limits::default(),
            flow::Sinks { edges: edges.clone(), ..Default::default() },
        );
        tokio::spawn(collector.run());
        let log = recorder.log();
        let observer = Observer::new(log.clone(), inputs.node.clone(), "cluster.local".into());
        let (surveys, mut surveyed) = tokio::sync::mpsc::channel::<Survey>(1);
        // No pod has a flow in clear that is open.
        tokio::spawn(async move {
            while let Some(survey) = surveyed.recv().await {
                let _ = survey.answer.send(Ok(Vec::new()));
            }
        });
        let logs = Recent::default();
        let admin = Admin::new(Arc::new(move || inputs.clone()), log, edges, surveys)
            .with_logs(logs.clone());
        let routes = Routes::new(observer.into_service()).add_service(admin.into_service());
        tokio::spawn(async move {
            let routes = routes.add_service(observer::health().await);
            socket.serve(routes, Default::default(), std::future::pending()).await.unwrap();
        });
        Self { dir, recorder, logs }
    }

    /// A line of its log, with somebody's token.
    fn log(&self, message: &str, token: &str) {
        let line = format!("2026-08-06T10:12:04.318Z  WARN {message}, token {token}\n");
        self.logs.make_writer().write_all(line.as_bytes()).unwrap();
    }

    fn socket(&self) -> String {
        path_in(self.dir.path()).display().to_string()
    }

    /// Records, and waits until it is in the ring.
    async fn record(&self, records: impl IntoIterator<Item = FlowRecord>) {
        let seen = self.recorder.log().totals().seen;
        let mut n = 0;
        for record in records {
            self.recorder.record(record);
            n += 1;
        }
        while self.recorder.log().totals().seen < seen + n {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }
}

fn binary(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_signet"));
    command.args(args).env_remove("SIGNET_SOCKET");
    command
}

async fn run(args: &[&str]) -> Output {
    let mut command = binary(args);
    tokio::task::spawn_blocking(move || command.output().unwrap()).await.unwrap()
}

fn stdout(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).unwrap()
}

fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

fn code(output: &Output) -> i32 {
    output.status.code().unwrap()
}

fn party(name: &str, known_by: KnownBy, address: &str) -> Party {
    let account = name.split('-').next().unwrap();
    let id = format!("spiffe://cluster.local/ns/shop/sa/{account}");
    Party {
        pod: Some(("shop".into(), name.into())),
        service_account: Some(account.into()),
        identity: Some(SpiffeId::parse(&id).unwrap()),
        known_by,
        ..Party::unknown(address.parse::<SocketAddr>().unwrap())
    }
}

fn allowed() -> FlowRecord {
    FlowRecord {
        time: "2026-08-06T10:12:04.318Z".parse().unwrap(),
        event: FlowEvent::Verdict,
        uuid: Uuid::from_u128(1),
        node: "node-2".into(),
        reporter: Reporter::Destination,
        direction: Direction::Ingress,
        protocol: 6,
        via: Via::Mtls,
        verdict: Verdict::Forwarded,
        reason: Reason::Allowed,
        policy: Some(PolicyName {
            kind: "IdentityPolicy".into(),
            namespace: "shop".into(),
            name: "payments-callers".into(),
        }),
        revision: 118,
        extra: vec![],
        http: None,
        source: party("frontend-7d9c", KnownBy::Mtls, "10.0.1.5:41872"),
        destination: party("payments-5b7f", KnownBy::Kernel, "10.0.2.7:8080"),
    }
}

fn as_source(record: FlowRecord) -> FlowRecord {
    let (reporter, direction) = (Reporter::Source, Direction::Egress);
    FlowRecord { node: "node-1".into(), reporter, direction, ..record }
}

fn denied() -> FlowRecord {
    FlowRecord {
        time: "2026-08-06T10:12:05.002Z".parse().unwrap(),
        uuid: Uuid::from_u128(2),
        verdict: Verdict::Dropped,
        reason: Reason::PolicyNoMatch,
        source: party("intruder-x2", KnownBy::Mtls, "10.0.1.9:51544"),
        ..allowed()
    }
}

fn ended() -> FlowRecord {
    FlowRecord {
        time: "2026-08-06T10:12:09.120Z".parse().unwrap(),
        event: FlowEvent::End { sent: 1204, received: 340, duration: Duration::from_millis(4802) },
        policy: None,
        ..allowed()
    }
}

const ALLOWED: &str = "2026-08-06T10:12:04.318Z node-2 in shop/frontend-7d9c:41872 (shop/frontend,mtls) -> shop/payments-5b7f:8080 (shop/payments,kernel) tcp mtls FORWARDED allowed IdentityPolicy/shop/payments-callers\n";
const DENIED: &str = "2026-08-06T10:12:05.002Z node-2 in shop/intruder-x2:51544 (shop/intruder,mtls) -> shop/payments-5b7f:8080 (shop/payments,kernel) tcp mtls DROPPED policy_no_match IdentityPolicy/shop/payments-callers\n";
const ENDED: &str = "2026-08-06T10:12:09.120Z node-2 in shop/frontend-7d9c:41872 (shop/frontend,mtls) -> shop/payments-5b7f:8080 (shop/payments,kernel) tcp mtls END allowed - sent=1204 received=340 duration=4.802s\n";

fn pod(name: &str, mode: Mode) -> Arc<Pod> {
    Arc::new(Pod {
        uid: format!("3f1c-{name}").into(),
        name: ObjectName { namespace: "shop".into(), name: name.into() },
        service_account: name.split('-').next().unwrap().into(),
        node: Some("node-1".into()),
        ips: Vec::new(),
        labels: Default::default(),
        workload: None,
        host_network: false,
        finished: false,
        terminating: false,
        alive: true,
        mirror: false,
        named_ports: Default::default(),
        mode,
        mode_origin: ModeOrigin::Namespace,
        exempt_ports: Arc::default(),
        strict_ports: None,
        unenforceable: None,
        captured: false,
    })
}

fn endpoint(pod: &Arc<Pod>, netns: u64, address: &str) -> Arc<EndpointState> {
    let id = format!("spiffe://cluster.local/ns/shop/sa/{}", pod.service_account);
    Arc::new(EndpointState {
        key: EndpointKey { uid: pod.uid.clone(), netns },
        pod: pod.clone(),
        identity: SpiffeId::parse(&id).unwrap(),
        identity_number: 256 + u32::try_from(netns).unwrap(),
        mode: pod.mode,
        addresses: vec![address.parse::<IpAddr>().unwrap()],
        cgroup_path: format!("/kubepods/pod{}", pod.uid).into(),
        cgroup: netns + 1000,
        request_authentications: Arc::new([]),
        judged: false,
        policies: Arc::new([]),
        raw_guard: None,
        default_deny: false,
        listener4: 0,
        listener6: (0, 0),
        served: true,
        closed: false,
        since: "2026-08-06T10:00:00Z".parse().unwrap(),
    })
}

/// One strict, one observed, one waiting pod; everything in order.
fn inputs(node: &str) -> StatusInputs {
    let now = Timestamp::now();
    let mut world = World::empty(TrustDomain::parse("cluster.local").unwrap());
    world.revision = 118;
    world.synced = Synced { pods: true, policies: true };
    let payments = pod("payments-5b7f", Mode::Strict);
    let frontend = pod("frontend-7d9c", Mode::Observe);
    for (pod, address) in [(&payments, "10.0.2.7"), (&frontend, "10.0.1.5")] {
        world.pods_by_ip.insert(address.parse().unwrap(), pod.uid.clone());
        world.pods.insert(pod.uid.clone(), pod.clone());
    }
    let state = NodeState {
        revision: 118,
        endpoints: HashMap::from([
            (1, endpoint(&payments, 1, "10.0.2.7")),
            (2, endpoint(&frontend, 2, "10.0.1.5")),
        ]),
        waiting: vec![Waiting {
            pod: pod("checkout-6c9", Mode::Strict),
            reason: "no cgroup for uid 3f1c: is --cgroup-root right? (looked in /kubepods)".into(),
        }],
        ..NodeState::empty(node.into(), Arc::new(world))
    };
    let hour = SignedDuration::from_hours(1);
    StatusInputs {
        node: node.into(),
        started: now - SignedDuration::from_mins(192),
        state: Some(Arc::new(state)),
        wanted_revision: 118,
        wanted_since: now - hour,
        source: "files".into(),
        location: "/etc/signet/cluster".into(),
        watches: vec![],
        kernel: KernelFacts {
            release: "6.18".into(),
            programs: vec![("connect4", true), ("connect6", true)],
            cgroup: "/kubepods".into(),
            pins: "/sys/fs/bpf/signet/default/v1".into(),
            probe_cgroups: vec!["/system.slice/kubelet.service".into()],
            fallbacks: vec![],
            enforcement: EnforcementState::Enforce,
        },
        issuer: IssuerFacts {
            trust_domain: "cluster.local".into(),
            name: "embedded".into(),
            roots: vec!["2036-08-04T00:00:00Z".parse().unwrap()],
        },
        svids: vec![SvidFacts {
            id: SpiffeId::parse("spiffe://cluster.local/ns/shop/sa/payments").unwrap(),
            state: SvidState::Issued {
                obtained: now - hour * 41 / 100,
                not_before: now - hour * 41 / 100 - SignedDuration::from_mins(5),
                not_after: now + hour * 59 / 100,
            },
            next_attempt: Some(now + SignedDuration::from_secs(9 * 60 + 1)),
            error: None,
        }],
        workload_svids: vec![(
            "shop/frontend-7d9c".into(),
            SvidFacts {
                id: SpiffeId::parse("spiffe://cluster.local/ns/shop/sa/frontend").unwrap(),
                state: SvidState::Missing,
                next_attempt: Some(now + SignedDuration::from_secs(2)),
                error: Some("the authority did not answer within 10s".into()),
            },
        )],
        drops: vec![DropCount {
            key: DropKey {
                netns: 1,
                peer: Ip::from_std("10.0.1.5".parse().unwrap()),
                port: 8080,
                reason: Reason::PlaintextRefused as u16,
                protocol: 6,
                direction: Direction::Ingress as u8,
                pad: 0,
            },
            count: 17,
        }],
        problems: vec![],
        since_turn: Some(Duration::from_millis(300)),
        settled: true,
        succession: Default::default(),
        counters: vec![("handshake_failed{kind=\"expired\"}".into(), 3)],
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn flows_are_printed_as_the_contract_says() {
    let node = Node::start(inputs("node-2"));
    node.record([denied(), allowed(), ended()]).await;
    let socket = node.socket();
    // Not on a terminal: compact, oldest first, without ends.
    let output = run(&["flows", "--socket", &socket]).await;
    assert_eq!(
        (stdout(&output), stderr(&output), code(&output)),
        (format!("{ALLOWED}{DENIED}"), String::new(), 0)
    );
    let output = run(&["flows", "--socket", &socket, "--ends"]).await;
    assert_eq!(stdout(&output), format!("{ALLOWED}{DENIED}{ENDED}"));
    // The environment names the socket, too.
    let mut command = binary(&["flows", "--last", "1"]);
    command.env("SIGNET_SOCKET", &socket);
    let output = tokio::task::spawn_blocking(move || command.output().unwrap()).await.unwrap();
    assert_eq!(stdout(&output), DENIED);
    let output = run(&["flows", "--socket", &socket, "-o", "table"]).await;
    assert_eq!(
        stdout(&output),
        "TIME          SOURCE              DESTINATION              PROTO  VIA   VERDICT    REASON           POLICY\n\
         10:12:04.318  shop/frontend-7d9c  shop/payments-5b7f:8080  tcp    mtls  FORWARDED  allowed          shop/payments-callers\n\
         10:12:05.002  shop/intruder-x2    shop/payments-5b7f:8080  tcp    mtls  DROPPED    policy_no_match  shop/payments-callers\n"
    );
    let output = run(&["flows", "--socket", &socket, "-o", "json", "--ends"]).await;
    let lines: Vec<serde_json::Value> =
        stdout(&output).lines().map(|l| serde_json::from_str(l).unwrap()).collect();
    assert_eq!(lines.len(), 3);
    assert_eq!(lines[2]["event"], "end");
    assert_eq!(lines[2]["durationSeconds"], 4.802);
    assert_eq!(lines[1]["source"]["pod"], "intruder-x2");
}

#[tokio::test(flavor = "multi_thread")]
async fn flows_have_hubbles_form_too() {
    let node = Node::start(inputs("node-2"));
    node.record([denied(), allowed()]).await;
    let output = run(&["flows", "--socket", &node.socket(), "-o", "jsonpb"]).await;
    let lines: Vec<serde_json::Value> =
        stdout(&output).lines().map(|l| serde_json::from_str(l).unwrap()).collect();
    let shown: Vec<_> = lines
        .iter()
        .map(|line| {
            (line["node_name"].as_str().unwrap(), line["flow"]["verdict"].as_str().unwrap())
        })
        .collect();
    assert_eq!(shown, [("node-2", "FORWARDED"), ("node-2", "DROPPED")]);
    assert_eq!(lines[1]["flow"]["drop_reason_desc"], "POLICY_DENIED");
    assert_eq!(lines[1]["flow"]["policy_log"][0], "policy_no_match");
}

#[tokio::test(flavor = "multi_thread")]
async fn history_is_shown_by_account() {
    let node = Node::start(inputs("node-2"));
    node.record([denied(), allowed(), denied(), ended()]).await;
    let socket = node.socket();
    let counts = async |filters: &[&str]| -> Vec<String> {
        let mut args = vec!["flows", "--socket", &socket, "--aggregate", "-o", "json"];
        args.extend(filters);
        let output = run(&args).await;
        assert_eq!((stderr(&output), code(&output)), (String::new(), 0));
        let mut lines: Vec<_> = stdout(&output)
            .lines()
            .map(|l| serde_json::from_str::<serde_json::Value>(l).unwrap())
            .map(|l| format!("{} {}", l["source"]["serviceAccount"].as_str().unwrap(), l["flows"]))
            .collect();
        lines.sort();
        lines
    };
    assert_eq!(counts(&[]).await, ["frontend 1", "intruder 2"]);
    for (filter, expected) in [
        (&["--verdict", "dropped"][..], &["intruder 2"][..]),
        (&["--not", "--verdict", "dropped"], &["frontend 1"]),
        (&["--identity", "shop/front*"], &["frontend 1"]),
        (&["--identity", "spiffe://*/ns/shop/sa/intruder"], &["intruder 2"]),
        (&["--from-namespace", "shop", "--to-port", "8000-8999"], &["frontend 1", "intruder 2"]),
        (&["--to-namespace", "legacy"], &[]),
        (&["--port", "9"], &[]),
        (&["--node", "node-*", "--via", "mtls"], &["frontend 1", "intruder 2"]),
    ] {
        assert_eq!(counts(filter).await, expected, "{filter:?}");
    }
    let output = run(&["flows", "--socket", &socket, "--aggregate", "--pod", "x"]).await;
    assert_eq!(code(&output), 2);
    assert!(stderr(&output).contains("--pod and --aggregate exclude each other"), "{output:?}");
    let output = run(&["flows", "--socket", &socket, "--aggregate", "-o", "wide"]).await;
    assert_eq!(code(&output), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_observers_health_is_told() {
    use tonic_health::pb::{
        HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient,
    };
    let node = Node::start(inputs("node-2"));
    let path = node.socket();
    let channel =
        tonic::transport::Endpoint::from_static("http://signet.local")
            .connect_with_connector(tower::service_fn(move |_: tonic::transport::Uri| {
                let path = path.clone();
                async move {
                    tokio::net::UnixStream::connect(path).await.map(hyper_util::rt::TokioIo::new)
                }
            }))
            .await
            .unwrap();
    let mut client = HealthClient::new(channel);
    for (service, serves) in [("observer.Observer", true), ("", true), ("no.Such", false)] {
        let answer = client.check(HealthCheckRequest { service: service.into() }).await;
        let serving = answer.is_ok_and(|a| a.get_ref().status() == ServingStatus::Serving);
        assert_eq!(serving, serves, "{service}");
    }
}

#[tokio::test]
async fn shells_complete_and_manuals_are_written() {
    for shell in ["bash", "zsh", "fish"] {
        let output = run(&["completion", shell]).await;
        let script = stdout(&output);
        assert_eq!(code(&output), 0);
        assert!(script.contains("aggregate") && script.contains("rollout"), "{shell}");
    }
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let output = run(&["man", dir.path().to_str().unwrap()]).await;
    assert_eq!(code(&output), 0, "{output:?}");
    let page = std::fs::read_to_string(at("signet-flows.1")).unwrap();
    assert!(page.contains("\\-\\-aggregate") && page.contains("Examples"), "{page}");
    assert!(at("signet.1").exists() && at("signet-policy-check.1").exists());
    let output = run(&["man", at("missing").to_str().unwrap()]).await;
    assert_eq!(code(&output), 3);
    assert!(stderr(&output).contains("name a directory that exists"), "{output:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn filters_compose_and_not_negates_the_next() {
    let node = Node::start(inputs("node-2"));
    node.record([allowed(), denied()]).await;
    let socket = node.socket();
    let both = format!("{ALLOWED}{DENIED}");
    for (filter, expected) in [
        ("--verdict dropped", DENIED),
        ("--verdict DROPPED --verdict forwarded", &both),
        ("--not --verdict dropped", ALLOWED),
        ("--from-pod shop/frontend", ALLOWED),
        ("--from-pod intruder", DENIED),
        ("--to-pod payments --not --from-pod intruder", ALLOWED),
        ("--not --pod intruder --not --pod frontend", ""),
        ("-n shop", &both),
        ("-n shop --pod frontend", ALLOWED),
        ("-n legacy", ""),
        ("--identity shop/intruder", DENIED),
        ("--identity spiffe://*/sa/front*", ALLOWED),
        ("--port 41872", ALLOWED),
        ("--reason policy_no_match", DENIED),
        ("--policy payments-* --protocol tcp --node node-2", &both),
        ("--protocol udp", ""),
        ("--since 2026-08-06T10:12:05Z", DENIED),
        ("--until 2026-08-06T10:12:05Z", ALLOWED),
        ("--since 2026-08-06T10:12:00Z --until 2026-08-06T10:13:00Z", &both),
    ] {
        let mut args = vec!["flows", "--socket", &socket];
        args.extend(filter.split(' '));
        let output = run(&args).await;
        assert_eq!(stdout(&output), expected, "{filter}: {}", stderr(&output));
        assert_eq!(code(&output), 0, "{filter}");
    }
    for (filter, named) in [
        ("--verdict maybe", "--verdict"),
        ("--reason because", "--reason"),
        ("--not", "--not"),
        ("--since yesterday", "--since"),
        ("--last 0", "--last"),
        ("--since 2026-08-06T10:13:00Z --until 2026-08-06T10:12:00Z", "--until"),
    ] {
        let mut args = vec!["flows", "--socket", &socket];
        args.extend(filter.split(' '));
        let output = run(&args).await;
        assert_eq!(code(&output), 2, "{filter}");
        assert!(stderr(&output).contains(named), "{filter}: {}", stderr(&output));
        assert_eq!(stdout(&output), "");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn two_agents_make_one_view() {
    let (one, two) = (Node::start(inputs("node-1")), Node::start(inputs("node-2")));
    one.record([as_source(allowed()), as_source(denied())]).await;
    two.record([allowed(), denied()]).await;
    let (a, b) = (one.socket(), two.socket());
    let output = run(&["flows", "--socket", &a, "--socket", &b]).await;
    assert_eq!(stdout(&output), format!("{ALLOWED}{DENIED}"));
    // The control: one agent alone shows its own.
    let output = run(&["flows", "--socket", &a]).await;
    assert_eq!(stdout(&output).matches("node-1 out").count(), 2);
    let output = run(&["flows", "--socket", &a, "--socket", &b, "--node", "node-1"]).await;
    assert_eq!(stdout(&output).matches("node-1 out").count(), 2);
    // One that is gone: what there is, a warning and its exit code.
    let output = run(&["flows", "--socket", "/no/such.sock", "--socket", &b]).await;
    assert_eq!(stdout(&output), format!("{ALLOWED}{DENIED}"));
    assert!(stderr(&output).contains("/no/such.sock"), "{}", stderr(&output));
    assert_eq!(code(&output), 4);
}

#[tokio::test(flavor = "multi_thread")]
async fn followed_flows_come_as_they_are_made() {
    let node = Node::start(inputs("node-2"));
    node.record([allowed()]).await;
    let socket = node.socket();
    let mut child = binary(&["flows", "-f", "--socket", &socket, "--verdict", "dropped"])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap());
    // It follows once the agent has it as a follower; until then it misses what is made.
    let reading = tokio::task::spawn_blocking(move || {
        let mut line = String::new();
        lines.read_line(&mut line).unwrap();
        line
    });
    while !reading.is_finished() {
        node.record([allowed(), denied()]).await;
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert_eq!(reading.await.unwrap(), DENIED);
    child.kill().unwrap();
    child.wait().unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn losses_are_told_on_stderr() {
    let node = Node::start(inputs("node-2"));
    node.recorder.count_lost(LostCause::KernelRing, 312);
    node.record([FlowRecord { time: Timestamp::now(), ..denied() }]).await;
    let output = run(&["flows", "--socket", &node.socket()]).await;
    assert_eq!(stderr(&output), "warning: node-2 lost 312 events (ring buffer full)\n");
    assert_eq!(stdout(&output).lines().count(), 1);
    assert_eq!(code(&output), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn status_is_printed_as_the_contract_says() {
    let node = Node::start(inputs("node-1"));
    node.record([allowed(), denied()]).await;
    let socket = node.socket();
    let output = run(&["status", "--socket", &socket]).await;
    let version = env!("CARGO_PKG_VERSION");
    assert_eq!(
        stdout(&output),
        format!(
            "Agent      node-1  {version}  READY  up 3h12m  kernel 6.18  enforcement enforce\n\
             Programs   2/2 attached  cgroup /kubepods  pins /sys/fs/bpf/signet/default/v1\n\
             Cluster    files /etc/signet/cluster  revision 118 applied 118 (0 s behind)\n\
             Identity   cluster.local  issuer embedded  1 root, expires 2036-08-04\n\
             SVIDs      1 valid  0 failed  oldest 41 %  next renewal 9m\n\
             Pods       2 managed (1 strict, 0 permissive, 1 observe)  1 waiting  0 off\n\
             Policies   0 in force  0 with problems\n\
             Events     1 forwarded  18 dropped  0 audit  0 lost\n\
             Problems\n  \
               pod shop/checkout-6c9  waiting  no cgroup for uid 3f1c: is --cgroup-root right? (looked in /kubepods)\n"
        )
    );
    assert_eq!(code(&output), 0);

    let output = run(&["status", "--socket", &socket, "-o", "json"]).await;
    let json: serde_json::Value = serde_json::from_str(&stdout(&output)).unwrap();
    let keys: Vec<_> = json.as_object().unwrap().keys().cloned().collect();
    for title in [
        "agent", "programs", "cluster", "identity", "svids", "pods", "policies", "events",
        "problems",
    ] {
        assert!(keys.iter().any(|k| k == title), "{title} is missing from {keys:?}");
    }
    assert_eq!(json["agent"]["state"], "READY");
    assert_eq!(json["pods"]["strict"], 1);
    assert_eq!(json["events"]["droppedByReason"]["policy_no_match"], 1);
    assert_eq!(json["counters"]["handshake_failed{kind=\"expired\"}"], 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn watches_of_the_kubernetes_api_are_shown_with_what_fails() {
    let heard = Timestamp::now() - SignedDuration::from_mins(125);
    let watch = |kind, state, error: Option<&str>| WatchFacts {
        kind,
        state,
        objects: 3,
        faulty: usize::from(error.is_some()),
        lists: 1,
        events: 3,
        errors: 0,
        last_event: None,
        last_heard: Some(heard),
        error: error.map(Into::into),
    };
    let mut inputs = inputs("node-1");
    inputs.source = "kubernetes".into();
    inputs.location = "https://10.96.0.1".into();
    inputs.watches = vec![
        watch("Namespace", WatchState::Listed, None),
        watch("Pod (this node)", WatchState::Waiting, Some("the API server answers 403: no")),
    ];
    let node = Node::start(inputs);
    let socket = node.socket();
    let text = stdout(&run(&["status", "--socket", &socket]).await);
    for wanted in [
        "Cluster    kubernetes https://10.96.0.1  revision 118",
        "  watch Pod (this node)  failing  the API server answers 403: no; nothing is known of \
         this kind yet\n",
    ] {
        assert!(text.contains(wanted), "{wanted:?} is not in {text}");
    }
    let (_, watches) = text.split_once("\nWatches\n").expect("watches are shown");
    let words = |line: &str| line.split_whitespace().collect::<Vec<_>>().join(" ");
    assert_eq!(
        watches.lines().map(words).collect::<Vec<_>>(),
        [
            "Namespace listed 3 objects no event heard 2h5m ago",
            "Pod (this node) waiting 3 objects, 1 not read no event heard 2h5m ago the API \
             server answers 403: no",
        ]
    );
    let json: serde_json::Value =
        serde_json::from_str(&stdout(&run(&["status", "--socket", &socket, "-o", "json"]).await))
            .unwrap();
    let watches = &json["cluster"]["watches"];
    assert_eq!(
        (&watches[0]["kind"], &watches[0]["state"]),
        (&"Namespace".into(), &"listed".into())
    );
    assert!(watches[0]["error"].is_null(), "{watches}");
    assert_eq!(watches[1]["error"], "the API server answers 403: no");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_that_is_not_ready_is_the_answer_no() {
    let good = Node::start(inputs("node-1"));
    let mut broken = inputs("node-2");
    broken.kernel.programs.push(("lookup", false));
    broken.problems.push(Problem {
        subject: "file policies.yaml:12".into(),
        message: "field spec.action: \"Alow\" is not Allow, Deny or Audit".into(),
    });
    let bad = Node::start(broken);
    let (a, b) = (good.socket(), bad.socket());
    let output = run(&["status", "--socket", &b]).await;
    assert_eq!(code(&output), 1);
    let text = stdout(&output);
    assert!(text.contains("  DEGRADED  ") && text.contains("2/3 attached"), "{text}");
    assert!(text.contains("  program lookup  missing  "), "{text}");
    assert!(text.contains("  file policies.yaml:12  problem  field spec.action"), "{text}");
    let output = run(&["status", "--all-nodes", "--socket", &a, "--socket", &b]).await;
    let nodes: Vec<String> = stdout(&output)
        .lines()
        .map(|l| l.split_whitespace().next().unwrap_or_default().into())
        .collect();
    assert_eq!(nodes, ["NODE", "node-2", "node-1"], "problems come first");
    let mut starting = inputs("node-3");
    starting.state = None;
    let output = run(&["status", "--socket", &Node::start(starting).socket()]).await;
    assert!(stdout(&output).contains("  STARTING  "), "{}", stdout(&output));
    assert_eq!(code(&output), 1);
}

/// `signet probe KIND` of an agent with these inputs: exit code and the line.
async fn probe(kind: &str, inputs: StatusInputs) -> (i32, String) {
    let node = Node::start(inputs);
    let output = run(&["probe", kind, "--socket", &node.socket()]).await;
    (code(&output), stdout(&output))
}

#[tokio::test(flavor = "multi_thread")]
async fn probes_answer_by_exit_code_and_say_why() {
    let (exit, line) = probe("ready", inputs("node-1")).await;
    assert_eq!(exit, 0, "the control: {line}");
    assert_eq!(line, "ready: revision 118 is applied, 2 programs are attached\n");
    assert_eq!(probe("live", inputs("node-1")).await, (0, "live: the reconciler turns\n".into()));

    // What makes it not ready, one thing at a time; it is live all the same.
    let unsynced = |synced| {
        let mut inputs = inputs("node-1");
        let mut state = NodeState::clone(inputs.state.as_ref().unwrap());
        let mut world = World::clone(&state.world);
        world.synced = synced;
        state.world = Arc::new(world);
        inputs.state = Some(Arc::new(state));
        inputs
    };
    let mut detached = inputs("node-1");
    detached.kernel.programs.push(("lookup", false));
    let cases = [
        (StatusInputs { state: None, ..inputs("node-1") }, "not been applied"),
        (unsynced(Synced { pods: false, policies: true }), "pods and namespaces"),
        (unsynced(Synced { pods: true, policies: false }), "policies"),
        (detached, "programs are not attached: lookup"),
        (StatusInputs { settled: false, ..inputs("node-1") }, "wait for their listeners"),
    ];
    for (inputs, why) in cases {
        let (exit, line) = probe("ready", inputs.clone()).await;
        assert_eq!(exit, 1, "{line}");
        assert!(line.starts_with("not ready: ") && line.contains(why), "{line}");
        assert_eq!(probe("live", inputs).await.0, 0);
    }
    // The authority is none of it.
    let mut closed = inputs("node-1");
    closed.svids[0].state = SvidState::Missing;
    closed.svids[0].error = Some("the authority did not answer within 10s".into());
    assert_eq!(probe("ready", closed).await.0, 0);

    // Stuck, and never having turned.
    let late = Some(Duration::from_secs(31));
    for since_turn in [late, None] {
        let (exit, line) = probe("live", StatusInputs { since_turn, ..inputs("node-1") }).await;
        assert_eq!(exit, 1, "{line}");
        assert!(line.starts_with("not live: ") && line.contains("stuck"), "{line}");
    }
    let young = StatusInputs { since_turn: None, started: Timestamp::now(), ..inputs("node-1") };
    assert_eq!(probe("live", young).await.0, 0, "it has only just started");

    let output = run(&["probe", "live", "--socket", "/no/such/socket"]).await;
    assert_eq!(code(&output), 4);
    assert!(stderr(&output).contains("is the agent running"), "{}", stderr(&output));
}

#[tokio::test(flavor = "multi_thread")]
async fn endpoints_are_listed_and_one_is_shown_in_full() {
    let node = Node::start(inputs("node-1"));
    node.record([denied()]).await;
    let socket = node.socket();
    let output = run(&["endpoints", "--socket", &socket]).await;
    assert_eq!(
        stdout(&output),
        "POD                 NODE    MODE     FROM       STATE     IDENTITY                                    SVID   POLICIES  DROPS\n\
         shop/checkout-6c9   node-1  strict   namespace  waiting   -                                           -      0         0\n\
         shop/frontend-7d9c  node-1  observe  namespace  observed  spiffe://cluster.local/ns/shop/sa/frontend  -      0         0\n\
         shop/payments-5b7f  node-1  strict   namespace  served    spiffe://cluster.local/ns/shop/sa/payments  valid  0         18\n"
    );
    let output = run(&["endpoints", "--socket", &socket, "shop/payments-5b7f"]).await;
    let text = stdout(&output);
    for line in [
        "Pod        shop/payments-5b7f  uid 3f1c-payments-5b7f\n",
        "Mode       strict (from namespace)\n",
        "State      served  since 2026-08-06T10:00:00.000Z\n",
        "Cgroup     /kubepods/pod3f1c-payments-5b7f  id 1001\n",
        "Netns      cookie 1\n",
        "Identity   spiffe://cluster.local/ns/shop/sa/payments  number 257\n",
        "SVID       valid  until ",
        "Policies   none  default allow\n",
        "Revision   118\n",
        "Drops\n  17 plaintext_refused  from shop/frontend-7d9c (10.0.1.5)  port 8080 tcp\n",
        "  1 policy_no_match  from 10.0.1.9  port 8080 tcp  last 2026-08-06T10:12:05.002Z\n",
    ] {
        assert!(text.contains(line), "{line:?} is missing from\n{text}");
    }
    let output = run(&["endpoints", "--socket", &socket, "shop/checkout-6c9", "-o", "json"]).await;
    let json: serde_json::Value = serde_json::from_str(&stdout(&output)).unwrap();
    assert_eq!(json["endpoints"][0]["state"], "waiting");
    assert!(json["endpoints"][0]["waiting"].as_str().unwrap().contains("--cgroup-root"));
    assert_eq!(json["endpoints"][0]["netns"], serde_json::Value::Null);
    let output = run(&["endpoints", "--socket", &socket, "shop/nobody"]).await;
    assert_eq!((code(&output), stdout(&output)), (1, String::new()));
    let output = run(&["endpoints", "--socket", &socket, "nobody"]).await;
    assert_eq!(code(&output), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn svids_are_listed_and_shown() {
    let node = Node::start(inputs("node-1"));
    let socket = node.socket();
    let output = run(&["svid", "list", "--socket", &socket]).await;
    let text = stdout(&output);
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(
        lines[0].split_whitespace().collect::<Vec<_>>(),
        ["IDENTITY", "NODE", "USE", "POD", "STATE", "EXPIRES", "NEXT"]
    );
    assert!(
        lines[1].starts_with("spiffe://cluster.local/ns/shop/sa/payments  node-1  tunnel    -  "),
        "{text}"
    );
    assert!(lines[1].contains("  valid   in 35m"), "{text}");
    assert!(
        lines[2].starts_with("spiffe://cluster.local/ns/shop/sa/frontend  node-1  workload  shop/frontend-7d9c  failed"),
        "{text}"
    );
    assert_eq!(code(&output), 0);

    let output = run(&["svid", "show", "shop/frontend-7d9c", "--socket", &socket]).await;
    let text = stdout(&output);
    for line in [
        "Identity  spiffe://cluster.local/ns/shop/sa/frontend\n",
        "Use       workload  pod shop/frontend-7d9c  on node-1\n",
        "State     failed\n",
        "Error     the authority did not answer within 10s\n",
    ] {
        assert!(text.contains(line), "{line:?} is missing from\n{text}");
    }
    let payments = "spiffe://cluster.local/ns/shop/sa/payments";
    let output = run(&["svid", "show", payments, "-o", "json", "--socket", &socket]).await;
    let json: serde_json::Value = serde_json::from_str(&stdout(&output)).unwrap();
    assert_eq!(json["schema"], "signet.dev/svids/v1");
    assert_eq!(json["node"], "node-1");
    assert_eq!(json["svids"].as_array().unwrap().len(), 1);
    assert_eq!(json["svids"][0]["use"], "tunnel");
    assert_eq!(json["svids"][0]["state"], "valid");
    assert_eq!(json["svids"][0]["pod"], serde_json::Value::Null);
    let output = run(&["svid", "show", "shop/nobody", "--socket", &socket]).await;
    assert_eq!((code(&output), stdout(&output)), (1, String::new()));
    assert!(stderr(&output).contains("shop/nobody"), "{}", stderr(&output));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_socket_is_the_owners_and_one_agents() {
    let dir = tempfile::tempdir().unwrap();
    let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
    let socket = AdminSocket::bind(dir.path()).unwrap();
    assert_eq!(mode(&dir.path().join("admin")), 0o700);
    assert_eq!(mode(socket.path()), 0o600);
    let second = AdminSocket::bind(dir.path()).unwrap_err();
    assert!(matches!(second, SocketError::InUse { .. }), "{second}");
    drop(socket);
    assert!(!path_in(dir.path()).exists());
    // A socket that its agent left behind is taken over; a file is not.
    drop(std::os::unix::net::UnixListener::bind(path_in(dir.path())).unwrap());
    let third = AdminSocket::bind(dir.path()).unwrap();
    drop(third);
    std::fs::write(path_in(dir.path()), "mine").unwrap();
    let fourth = AdminSocket::bind(dir.path()).unwrap_err();
    assert!(matches!(fourth, SocketError::Obstacle { .. }), "{fourth}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reader_that_goes_away_is_no_error() {
    let node = Node::start(inputs("node-2"));
    // More than a pipe holds.
    for _ in 0..20 {
        node.record((0..200).map(|_| FlowRecord { uuid: Uuid::new_v4(), ..allowed() })).await;
    }
    let socket = node.socket();
    let args = ["flows", "--last", "4000", "--socket", &socket];
    let complete = run(&args).await;
    assert_eq!((stdout(&complete).lines().count(), code(&complete)), (4000, 0));
    let mut child = binary(&args).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let reading = tokio::task::spawn_blocking(move || {
        let mut line = String::new();
        BufReader::with_capacity(64, child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        (line, child.wait_with_output().unwrap())
    });
    let (line, output) = reading.await.unwrap();
    assert_eq!(line, ALLOWED);
    assert_eq!((code(&output), stderr(&output)), (0, String::new()));
}

#[test]
fn help_has_examples() {
    let output = binary(&["--help"]).output().unwrap();
    assert_eq!(code(&output), 0);
    let text = stdout(&output);
    assert!(text.contains("signet flows -f -n shop"), "{text}");
}
