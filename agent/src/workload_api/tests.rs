//! The Workload API over real cgroups and processes: this test program starts itself as the
//! workloads' processes.

use std::{
    collections::HashMap,
    fs,
    io::{BufRead, BufReader},
    path::PathBuf,
    process::{Child, ChildStdin, Command, Stdio},
    sync::{
        Mutex,
        atomic::{AtomicBool, Ordering::SeqCst},
        mpsc,
    },
};

use hyper_util::rt::TokioIo;
use jiff::Timestamp;
use rustls::pki_types::{CertificateDer, PrivatePkcs8KeyDer};
use serde_json::{Value, json};
use signet_ebpf::abi::Mode;
use tonic::{Code, Request, transport::Endpoint};

use super::*;
use crate::{
    ca::Root,
    cluster::model::World,
    endpoint::state::{EndpointState, NodeState, NodeStatePublisher},
    flow::example,
    kernel::test_host::Host,
    proto::workload::{self as wire, spiffe_workload_api_client::SpiffeWorkloadApiClient},
    spiffe::{JwtBundle, JwtClaims, JwtSigner, JwtSvid, Svid, jwks::SpiffeBundle},
    svid::issuer::{IssueError, IssueFuture, JwtFuture, JwtRequest, SvidRequest},
};

/// What a child process is to do; without it the tests' process is no child.
const ROLE: &str = "SIGNET_UNIT_WORKLOAD";
const WAIT: Duration = Duration::from_secs(20);

/// Issues X509- and JWT-SVIDs, and misbehaves as told.
struct Authority {
    root: Root,
    ttl: Duration,
    fails: AtomicBool,
    signer: JwtSigner,
    /// Signs tokens for this identity, whatever is asked for.
    answers: Mutex<Option<SpiffeId>>,
    keys: tokio::sync::watch::Sender<Arc<JwtBundle>>,
}

impl Authority {
    fn new(ttl: Duration) -> Arc<Self> {
        let signer = JwtSigner::generate().unwrap();
        let mut keys = JwtBundle::new();
        keys.insert(signer.kid(), signer.public_key().clone()).unwrap();
        Arc::new(Self {
            root: Root::create(&domain(), Timestamp::now()).unwrap(),
            ttl,
            fails: AtomicBool::new(false),
            signer,
            answers: Mutex::default(),
            keys: tokio::sync::watch::Sender::new(Arc::new(keys)),
        })
    }
}

impl Issuer for Authority {
    fn issue<'a>(&'a self, request: &'a SvidRequest) -> IssueFuture<'a> {
        Box::pin(async move {
            if self.fails.load(SeqCst) {
                return Err(IssueError::Internal("told to fail".into()));
            }
            let key = request.public_key();
            Ok(vec![self.root.sign_leaf(request.id(), &key, Timestamp::now(), self.ttl)?])
        })
    }
}

impl JwtIssuer for Authority {
    fn issue_jwt<'a>(&'a self, request: &'a JwtRequest) -> JwtFuture<'a> {
        Box::pin(async move {
            let now = Timestamp::now();
            let claims = JwtClaims {
                id: self.answers.lock().unwrap().clone().unwrap_or(request.id.clone()),
                audiences: request.audiences.clone(),
                issued_at: now,
                expires_at: now + jiff::SignedDuration::from_secs(300),
                issuer: None,
            };
            self.signer.sign(&claims).map_err(|e| IssueError::Internal(e.to_string()))
        })
    }

    fn jwt_bundle(&self) -> tokio::sync::watch::Receiver<Arc<JwtBundle>> {
        self.keys.subscribe()
    }
}

fn domain() -> TrustDomain {
    TrustDomain::parse("cluster.local").unwrap()
}

fn id(account: &str) -> String {
    format!("spiffe://cluster.local/ns/shop/sa/{account}")
}

/// A node with pods (directories below its workloads root) and the Workload API.
struct Scene {
    host: Host,
    hierarchy: Hierarchy,
    authority: Arc<Authority>,
    trust: Arc<Trust>,
    publisher: NodeStatePublisher,
    endpoints: Mutex<HashMap<u64, Arc<EndpointState>>>,
    handle: WorkloadApiHandle,
    entries: Entries,
    socket: PathBuf,
    stop: CancellationToken,
    made: Mutex<Vec<PathBuf>>,
}

struct Options {
    ttl: Duration,
    limits: Limits,
    jwt: bool,
    has_peer_pidfd: bool,
    ready: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            ttl: Duration::from_secs(3600),
            limits: Limits { first_answer: Duration::from_secs(2), ..Limits::default() },
            jwt: true,
            has_peer_pidfd: true,
            ready: true,
        }
    }
}

impl Scene {
    /// `None` where the machine cannot.
    fn new(name: &str, options: Options) -> Option<Self> {
        let host = Host::new(name)?;
        let hierarchy = Hierarchy::find().unwrap();
        let authority = Authority::new(options.ttl);
        let trust = Trust::new();
        trust.set(domain(), authority.root.bundle().unwrap());
        trust.set_jwt(domain(), authority.keys.borrow().clone());
        let state = NodeState::empty("node-2".into(), Arc::new(World::empty(domain())));
        let (publisher, state) = NodeStatePublisher::new(state);
        let socket = host.dir.path().join("workload/workload.sock");
        let entries = Entries::open(None, &domain()).unwrap();
        let (api, handle) = WorkloadApi::new(
            WorkloadApiDeps {
                state,
                trust: Arc::clone(&trust),
                trust_domain: domain(),
                hierarchy: hierarchy.clone(),
                workloads_root: host.name.join("kubepods"),
                entries: entries.clone(),
                issuer: authority.clone(),
                jwt_issuer: options.jwt.then(|| authority.clone() as Arc<dyn JwtIssuer>),
                opener: NetnsOpener::start().unwrap(),
                has_peer_pidfd: options.has_peer_pidfd,
                limits: options.limits,
            },
            SvidParams {
                first_retry: Duration::from_millis(20),
                longest_retry: Duration::from_millis(100),
                ..SvidParams::default()
            },
        );
        let stop = CancellationToken::new();
        let serving = CancellationToken::new();
        tokio::spawn(api.serve(bind(&socket).unwrap(), serving, stop.clone().cancelled_owned()));
        let scene = Self {
            host,
            hierarchy,
            authority,
            trust,
            publisher,
            endpoints: Mutex::default(),
            handle,
            entries,
            socket,
            stop,
            made: Mutex::default(),
        };
        if options.ready {
            scene.publish();
        }
        Some(scene)
    }

    fn counted(&self) -> Vec<(String, u64)> {
        let readings = self.handle.counters().readings();
        readings.iter().flat_map(|r| r.flat().collect::<Vec<_>>()).collect()
    }

    fn publish(&self) {
        let empty = NodeState::empty("node-2".into(), Arc::new(World::empty(domain())));
        let endpoints = self.endpoints.lock().unwrap().clone();
        self.publisher.publish(NodeState { revision: 1, endpoints, ..empty });
    }

    /// Makes a directory below the scene's root.
    fn directory(&self, below: &str) -> PathBuf {
        let path = self.host.cgroup.join(below);
        for dir in path.ancestors().take_while(|dir| *dir != self.host.cgroup) {
            self.made.lock().unwrap().push(dir.to_owned());
        }
        fs::create_dir_all(&path).unwrap();
        path
    }

    /// Registers a pod; answers its container's directory.
    fn pod(&self, name: &str, netns: u64) -> PathBuf {
        let pod = example::pod(&format!("shop/{name}"), Mode::Strict);
        let container = self.directory(&format!("kubepods/pod{name}/container"));
        let name = self.host.name.join(format!("kubepods/pod{name}"));
        let directory = self.hierarchy.open(&name).unwrap();
        let endpoint = EndpointState {
            cgroup: directory.id,
            cgroup_path: name.to_str().unwrap().into(),
            ..EndpointState::clone(&example::endpoint(&pod, netns, "10.0.0.1"))
        };
        self.endpoints.lock().unwrap().insert(netns, Arc::new(endpoint));
        self.publish();
        container
    }

    fn forget(&self, netns: u64) {
        self.endpoints.lock().unwrap().remove(&netns);
        self.publish();
    }

    /// A process in this cgroup that calls.
    fn process(&self, cgroup: &std::path::Path, call: &Value) -> Process {
        Process::start(cgroup, &self.socket, call)
    }

    async fn until(&self, what: &str, holds: impl Fn() -> bool) {
        let deadline = time::Instant::now() + WAIT;
        while !holds() {
            assert!(time::Instant::now() < deadline, "{what}");
            time::sleep(Duration::from_millis(10)).await;
        }
    }
}

impl Drop for Scene {
    fn drop(&mut self) {
        self.stop.cancel();
        let mut made = std::mem::take(&mut *self.made.lock().unwrap());
        made.sort_by_key(|dir| std::cmp::Reverse(dir.components().count()));
        for dir in made {
            let _ = fs::remove_dir(dir);
        }
    }
}

/// A workload's process; it ends when this is dropped.
pub(super) struct Process {
    child: Child,
    lines: mpsc::Receiver<Value>,
    _stdin: Option<ChildStdin>,
}

impl Process {
    pub(super) fn start(cgroup: &std::path::Path, socket: &Path, call: &Value) -> Self {
        let mut role = call.clone();
        role["cgroup"] = json!(cgroup);
        role["socket"] = json!(socket);
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "workload_api::tests::the_role_of_a_child", "--nocapture"])
            .env(ROLE, role.to_string())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let stdout = BufReader::new(child.stdout.take().unwrap());
        let (sender, lines) = mpsc::channel();
        std::thread::spawn(move || {
            for line in stdout.lines().map_while(Result::ok) {
                // The test harness says things, too, before it on the same line.
                let Some(start) = line.find("{\"workload\"") else { continue };
                let Ok(value) = serde_json::from_str(&line[start..]) else { continue };
                let _ = sender.send(value);
            }
        });
        let stdin = child.stdin.take();
        Self { child, lines, _stdin: stdin }
    }

    pub(super) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The next thing that it says.
    pub(super) fn next(&self) -> Value {
        self.lines.recv_timeout(WAIT).expect("the child says something")
    }

    /// Ends it for good: its pid is free.
    pub(super) fn end(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.end();
    }
}

/// Not a test but the other processes of the tests here: with [`ROLE`] it joins a cgroup and
/// calls, without it does nothing.
#[test]
fn the_role_of_a_child() {
    let Ok(role) = std::env::var(ROLE) else { return };
    let role: Value = serde_json::from_str(&role).unwrap();
    fs::write(format!("{}/cgroup.procs", role["cgroup"].as_str().unwrap()), "0").unwrap();
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap()
        .block_on(play(&role));
}

fn say(mut value: Value) {
    value["workload"] = json!(true);
    // The key's order: `workload` comes first in what is looked for.
    let text = value.to_string();
    let rest = text.replace(",\"workload\":true", "").replace("\"workload\":true", "");
    let rest = rest.trim_start_matches('{').trim_start_matches(',');
    println!("\n{{\"workload\":true,{rest}");
}

async fn play(role: &Value) {
    let path = PathBuf::from(role["socket"].as_str().unwrap());
    let connect = tower::service_fn(move |_: tonic::transport::Uri| {
        let path = path.clone();
        async move { tokio::net::UnixStream::connect(path).await.map(TokioIo::new) }
    });
    let channel = Endpoint::from_static("http://localhost").connect_with_connector(connect).await;
    let channel = match channel {
        Ok(channel) => channel,
        Err(error) => return say(json!({"error": error.to_string()})),
    };
    if role["call"] == "hold" {
        say(json!({"connected": true}));
        return hold().await;
    }
    let mut client = SpiffeWorkloadApiClient::new(channel);
    let with_header = role["header"] != json!(false);
    macro_rules! request {
        ($message:expr) => {{
            let mut request = Request::new($message);
            if with_header {
                request.metadata_mut().insert("workload.spiffe.io", "true".parse().unwrap());
            }
            request
        }};
    }
    macro_rules! follow {
        ($answer:expr, $show:expr) => {
            match $answer.await {
                Ok(answer) => {
                    let mut stream = answer.into_inner();
                    loop {
                        match stream.message().await {
                            Ok(Some(message)) => say($show(message)),
                            Ok(None) => return say(json!({"ended": true})),
                            Err(status) => return say(refusal(&status)),
                        }
                    }
                }
                Err(status) => say(refusal(&status)),
            }
        };
    }
    let text = |name: &str| role[name].as_str().unwrap_or_default().to_owned();
    match role["call"].as_str().unwrap() {
        "x509" => {
            let streams = role["streams"].as_u64().unwrap_or(1);
            let mut kept = Vec::new();
            for _ in 1..streams {
                let answer = client.fetch_x509svid(request!(wire::X509svidRequest {})).await;
                match answer {
                    Ok(answer) => kept.push(answer.into_inner()),
                    Err(status) => say(refusal(&status)),
                }
            }
            follow!(client.fetch_x509svid(request!(wire::X509svidRequest {})), shown_svid)
        }
        "x509-bundles" => follow!(
            client.fetch_x509_bundles(request!(wire::X509BundlesRequest {})),
            |m: wire::X509BundlesResponse| json!({"bundles": m.bundles})
        ),
        "jwt-bundles" => follow!(
            client.fetch_jwt_bundles(request!(wire::JwtBundlesRequest {})),
            |m: wire::JwtBundlesResponse| json!({"bundles": m.bundles})
        ),
        "jwt" => {
            let audience = role["audience"].as_array().unwrap();
            let audience = audience.iter().map(|a| a.as_str().unwrap().to_owned()).collect();
            let message = wire::JwtsvidRequest { audience, spiffe_id: text("spiffeId") };
            match client.fetch_jwtsvid(request!(message)).await {
                Ok(answer) => {
                    let svid = answer.into_inner().svids.remove(0);
                    say(json!({"id": svid.spiffe_id, "token": svid.svid}));
                }
                Err(status) => say(refusal(&status)),
            }
        }
        "validate" => {
            let message =
                wire::ValidateJwtsvidRequest { audience: text("audience"), svid: text("token") };
            match client.validate_jwtsvid(request!(message)).await {
                Ok(answer) => {
                    let answer = answer.into_inner();
                    let names: Vec<_> = answer.claims.unwrap().fields.into_keys().collect();
                    say(json!({"id": answer.spiffe_id, "claims": names}));
                }
                Err(status) => say(refusal(&status)),
            }
        }
        other => panic!("{other}"),
    }
}

/// Until the parent closes standard input.
async fn hold() {
    let _ = tokio::task::spawn_blocking(|| std::io::stdin().lines().count()).await;
}

fn refusal(status: &tonic::Status) -> Value {
    json!({"code": status.code() as i32, "message": status.message()})
}

fn shown_svid(message: wire::X509svidResponse) -> Value {
    let one = &message.svids[0];
    json!({
        "id": one.spiffe_id,
        "chain": one.x509_svid,
        "key": one.x509_svid_key,
        "bundle": one.bundle,
        "federated": message.federated_bundles.keys().collect::<Vec<_>>(),
    })
}

fn bytes(value: &Value) -> Vec<u8> {
    serde_json::from_value(value.clone()).unwrap()
}

/// Puts the SVID together again: it throws what does not belong together out.
fn svid_of(value: &Value) -> Svid {
    let chain = vec![CertificateDer::from(bytes(&value["chain"]))];
    Svid::new(chain, PrivatePkcs8KeyDer::from(bytes(&value["key"]))).unwrap()
}

fn assert_refused(answer: &Value, code: Code, says: &str) {
    assert_eq!(answer["code"], code as i32, "{answer}");
    assert!(answer["message"].as_str().unwrap().contains(says), "{answer}");
}

#[tokio::test(flavor = "multi_thread")]
async fn each_pod_has_its_own_key_and_follows_rotation() {
    let ttl = Duration::from_secs(8);
    let Some(scene) = Scene::new("wa-own", Options { ttl, ..Options::default() }) else { return };
    let (one, two) = (scene.pod("web-1", 1), scene.pod("web-2", 2));
    let call = json!({"call": "x509"});
    let (one, two) = (scene.process(&one, &call), scene.process(&two, &call));
    let (first, other) = (one.next(), two.next());
    assert_eq!((&first["id"], &other["id"]), (&json!(id("web")), &json!(id("web"))));
    assert_ne!(first["key"], other["key"]);
    assert_eq!(svid_of(&first).id, svid_of(&other).id);
    let root = scene.authority.root.certificate().to_vec();
    assert_eq!(bytes(&first["bundle"]), root);
    assert_eq!(first["federated"], json!([]));

    // Another domain's bundle: the same SVID at once, with everything else as well.
    let foreign = TrustDomain::parse("other").unwrap();
    scene.trust.set(foreign, Authority::new(ttl).root.bundle().unwrap());
    let second = one.next();
    assert_eq!(second["federated"], json!(["spiffe://other"]));
    assert_eq!((&second["key"], &second["id"]), (&first["key"], &first["id"]));

    let renewed = one.next();
    assert_ne!(renewed["key"], first["key"]);
    let (old, new) = (svid_of(&first), svid_of(&renewed));
    assert!(new.not_after > old.not_after && old.is_valid_at(Timestamp::now()), "in time");
    assert_eq!(scene.handle.svids().status().len(), 2);
    assert!(scene.counted().iter().any(|(name, count)| {
        name == "workload_api_calls{method=\"FetchX509SVID\",code=\"Ok\"}" && *count == 2
    }));
}

#[tokio::test(flavor = "multi_thread")]
async fn who_is_no_pod_gets_nothing() {
    let Some(scene) = Scene::new("wa-no", Options { ready: false, ..Options::default() }) else {
        return;
    };
    let outside = scene.directory("outside/poduid");
    let unknown = scene.directory("kubepods/podunknown/container");
    let call = json!({"call": "x509"});
    let answer = scene.process(&outside, &call).next();
    assert_refused(&answer, Code::Unavailable, "starting");

    let pod = scene.pod("web-1", 1);
    for cgroup in [&outside, &unknown] {
        for method in ["x509", "x509-bundles", "jwt-bundles"] {
            let answer = scene.process(cgroup, &json!({"call": method})).next();
            assert_refused(&answer, Code::PermissionDenied, "no identity issued");
        }
        let answer = scene.process(cgroup, &json!({"call": "jwt", "audience": ["a"]})).next();
        assert_refused(&answer, Code::PermissionDenied, "no identity issued");
        let validate = json!({"call": "validate", "audience": "a", "token": "x"});
        let answer = scene.process(cgroup, &validate).next();
        assert_refused(&answer, Code::PermissionDenied, "no identity issued");
    }
    // The control, and the header.
    assert_eq!(scene.process(&pod, &call).next()["id"], id("web"));
    for method in ["x509", "x509-bundles", "jwt-bundles"] {
        let answer = scene.process(&pod, &json!({"call": method, "header": false})).next();
        assert_refused(&answer, Code::InvalidArgument, "security header missing");
    }
    // The directory was made anew: what is in it now is not the pod that was found.
    let path = scene.host.cgroup.join("kubepods/podweb-1");
    scene.until("the child is gone", || fs::remove_dir(path.join("container")).is_ok()).await;
    fs::remove_dir(&path).unwrap();
    // Keeps the inode from being used again.
    let _other = scene.directory("kubepods/podother");
    let anew = scene.directory("kubepods/podweb-1/container");
    let answer = scene.process(&anew, &call).next();
    assert_refused(&answer, Code::PermissionDenied, "no identity issued");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_forged_cgroup_inside_a_pod_is_that_pods() {
    for has_peer_pidfd in [true, false] {
        let options = Options { has_peer_pidfd, ..Options::default() };
        let Some(scene) = Scene::new("wa-forged", options) else { return };
        let (_own, victim) = (scene.pod("web-1", 1), scene.pod("bank-1", 2));
        let forged = scene.directory("kubepods/podweb-1/container/podbank-1/container");
        let call = json!({"call": "x509"});
        assert_eq!(scene.process(&forged, &call).next()["id"], id("web"));
        assert_eq!(scene.process(&victim, &call).next()["id"], id("bank"));
        // A directory whose name only begins like a pod's.
        let longer = scene.directory("kubepods/podbank-11");
        let answer = scene.process(&longer, &call).next();
        assert_refused(&answer, Code::PermissionDenied, "no identity issued");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_that_goes_takes_its_svid_along() {
    let Some(scene) = Scene::new("wa-gone", Options::default()) else { return };
    let (pod, other) = (scene.pod("web-1", 1), scene.pod("bank-1", 2));
    let process = scene.process(&pod, &json!({"call": "x509"}));
    let kept = scene.process(&other, &json!({"call": "x509"}));
    assert_eq!(
        (process.next()["id"].clone(), kept.next()["id"].clone()),
        (json!(id("web")), json!(id("bank")))
    );
    scene.forget(1);
    assert_refused(&process.next(), Code::PermissionDenied, "no identity issued");
    scene.until("its SVID is forgotten", || scene.handle.svids().status().len() == 1).await;
    assert_eq!(scene.handle.svids().status()[0].id.as_str(), id("bank"));
    scene.stop.cancel();
    assert_refused(&kept.next(), Code::Unavailable, "stopping");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failing_authority_is_told() {
    let Some(scene) = Scene::new("wa-fail", Options::default()) else { return };
    let pod = scene.pod("web-1", 1);
    scene.authority.fails.store(true, SeqCst);
    let answer = scene.process(&pod, &json!({"call": "x509"})).next();
    assert_refused(&answer, Code::Unavailable, "told to fail");
    scene.authority.fails.store(false, SeqCst);
    assert_eq!(scene.process(&pod, &json!({"call": "x509"})).next()["id"], id("web"));
}

#[tokio::test(flavor = "multi_thread")]
async fn one_pods_flood_is_its_own() {
    let limits = Limits { connections: 2, calls: 3, first_answer: Duration::from_secs(2) };
    let Some(scene) = Scene::new("wa-flood", Options { limits, ..Options::default() }) else {
        return;
    };
    let (pod, other) = (scene.pod("web-1", 1), scene.pod("bank-1", 2));
    let greedy = scene.process(&pod, &json!({"call": "x509", "streams": 4}));
    assert_refused(&greedy.next(), Code::ResourceExhausted, "3 calls");
    let second = scene.process(&pod, &json!({"call": "hold"}));
    assert_eq!(second.next()["connected"], true);
    let closed =
        |(name, count): &(String, u64)| name == "workload_api_connections_over_limit" && *count > 0;
    let all = || scene.counted();
    // The first has ended its connection with its process.
    drop(greedy);
    let third = scene.process(&pod, &json!({"call": "hold"}));
    assert_eq!(third.next()["connected"], true);
    assert!(!all().iter().any(closed));
    let fourth = scene.process(&pod, &json!({"call": "x509"})).next();
    assert!(
        fourth["error"].is_string()
            || fourth["code"] == Code::Unavailable as i32
            || fourth["code"] == Code::Unknown as i32,
        "{fourth}"
    );
    assert!(all().iter().any(closed), "{:?}", all());
    let answer = scene.process(&other, &json!({"call": "x509"})).next();
    assert_eq!(answer["id"], id("bank"), "the other pod does not notice");
}

#[tokio::test(flavor = "multi_thread")]
async fn tokens_are_fetched_and_validated() {
    let Some(scene) = Scene::new("wa-jwt", Options::default()) else { return };
    let (pod, other) = (scene.pod("web-1", 1), scene.pod("bank-1", 2));
    let fetch = |extra: Value| {
        let mut call = json!({"call": "jwt", "audience": ["bank", "b"]});
        for (name, value) in extra.as_object().unwrap() {
            call[name] = value.clone();
        }
        scene.process(&pod, &call).next()
    };
    let answer = fetch(json!({"spiffeId": id("web")}));
    assert_eq!(answer["id"], id("web"));
    let token = answer["token"].as_str().unwrap().to_owned();
    let keys = scene.authority.keys.borrow().clone();
    let svid = JwtSvid::validate(&token, "bank", |_| Some(keys), Timestamp::now()).unwrap();
    assert_eq!((svid.id.as_str(), svid.audiences), (&*id("web"), vec!["bank".into(), "b".into()]));

    assert_refused(&fetch(json!({"audience": []})), Code::InvalidArgument, "audience");
    assert_refused(&fetch(json!({"audience": ["a", ""]})), Code::InvalidArgument, "audience");
    let many = vec!["a"; jwt_most() + 1];
    assert_refused(&fetch(json!({"audience": many})), Code::InvalidArgument, "too many");
    assert_refused(&fetch(json!({"spiffeId": "web"})), Code::InvalidArgument, "spiffe_id");
    let other_id = fetch(json!({"spiffeId": id("bank")}));
    assert_refused(&other_id, Code::PermissionDenied, "no identity issued");
    *scene.authority.answers.lock().unwrap() = Some(SpiffeId::parse(&id("admin")).unwrap());
    assert_refused(
        &fetch(json!({"audience": ["new"]})),
        Code::Unavailable,
        "is for spiffe://cluster.local/ns/shop/sa/admin",
    );

    // The same again is the same token, until another key signs.
    let again = || fetch(json!({}))["token"].as_str().unwrap().to_owned();
    *scene.authority.answers.lock().unwrap() = None;
    assert_eq!(again(), token);
    assert_ne!(fetch(json!({"audience": ["b", "bank"]}))["token"], *token, "others are another");
    let counted = |result: &str| {
        let name = format!("jwt_svids{{result=\"{result}\"}}");
        scene.counted().into_iter().find(|(n, _)| *n == name).map(|(_, count)| count)
    };
    assert_eq!(
        (counted("issued"), counted("cached"), counted("failed")),
        (Some(2), Some(1), Some(1))
    );
    let mut keys = JwtBundle::clone(&scene.authority.keys.borrow());
    keys.insert("next", JwtSigner::generate().unwrap().public_key().clone()).unwrap();
    scene.authority.keys.send_replace(Arc::new(keys));
    assert_ne!(again(), token, "asked for anew under other keys");

    let validate = |audience: &str, token: &str| {
        let call = json!({"call": "validate", "audience": audience, "token": token});
        scene.process(&other, &call).next()
    };
    let valid = validate("bank", &token);
    assert_eq!(valid["id"], id("web"));
    assert!(valid["claims"].as_array().unwrap().contains(&json!("exp")), "{valid}");
    assert_refused(&validate("shop", &token), Code::InvalidArgument, "not for this audience");
    assert_refused(&validate("bank", "x.y.z"), Code::InvalidArgument, "svid");
    assert_refused(&validate("", &token), Code::InvalidArgument, "audience");
    assert_refused(&validate("bank", ""), Code::InvalidArgument, "missing");

    let follower = scene.process(&pod, &json!({"call": "jwt-bundles"}));
    let read = |message: Value| {
        let document = bytes(&message["bundles"]["spiffe://cluster.local"]);
        SpiffeBundle::decode(&document).unwrap().jwt
    };
    assert_eq!(read(follower.next()), *scene.trust.jwt_bundle(&domain()).unwrap());
    scene.trust.set_jwt(domain(), Arc::default());
    assert!(read(follower.next()).is_empty());
    let revoked = validate("bank", &token);
    assert_refused(&revoked, Code::InvalidArgument, "no key with the token's key ID");
    let bundles = scene.process(&pod, &json!({"call": "x509-bundles"})).next();
    let root = scene.authority.root.certificate().to_vec();
    assert_eq!(bytes(&bundles["bundles"]["spiffe://cluster.local"]), root);
}

fn jwt_most() -> usize {
    crate::spiffe::jwt::MAX_AUDIENCES
}

#[tokio::test(flavor = "multi_thread")]
async fn a_static_entry_is_for_what_it_selects_and_never_for_a_pod() {
    let Some(scene) = Scene::new("wa-entry", Options::default()) else { return };
    let unit = scene.directory("system.slice/backup.service");
    let nested = scene.directory("system.slice/other.service/backup.service");
    let unknown = scene.directory("kubepods/podunknown/backup.service");
    let (pod, call) = (scene.pod("web-1", 1), json!({"call": "x509"}));
    let assert_nobody = |cgroup: &Path| {
        let answer = scene.process(cgroup, &call).next();
        assert_refused(&answer, Code::PermissionDenied, "no identity issued");
    };
    assert_nobody(&unit);

    let dir = tempfile::tempdir().unwrap();
    let write = |selectors: &[(&str, &str)]| {
        let text = selectors.iter().map(|(name, selector)| {
            format!(
                "apiVersion: signet.dev/v1alpha1\nkind: WorkloadEntry\nmetadata: {{name: {name}}}\n\
                 spec: {{spiffeId: \"spiffe://cluster.local/vm/{name}\", selector: {selector}}}\n---\n"
            )
        });
        fs::write(dir.path().join("a.yaml"), text.collect::<String>()).unwrap();
        scene.entries.reload(Some(dir.path()), &domain()).unwrap();
    };
    let own = std::env::current_exe().unwrap();
    let cgroup = scene.host.name.join("system.slice/backup.service");
    let selector = format!("{{cgroup: {}, uid: 0}}", cgroup.display());
    write(&[("backup", &selector), ("root", "{uid: 0}")]);
    let follower = scene.process(&unit, &call);
    assert_eq!(follower.next()["id"], "spiffe://cluster.local/vm/backup", "the one that says most");
    assert_eq!(scene.process(&nested, &call).next()["id"], "spiffe://cluster.local/vm/root");
    // Neither a pod nor what may be one: its root is not the node's.
    assert_eq!(scene.process(&pod, &call).next()["id"], id("web"));
    assert_nobody(&unknown);

    // The entry goes: the stream ends.
    write(&[("other", "{uid: 4294967}")]);
    assert_refused(&follower.next(), Code::PermissionDenied, "no identity issued");
    assert_nobody(&unit);

    let executable = |path: &Path| format!("{{uid: 0, executable: {}}}", path.display());
    write(&[("tests", &executable(&own))]);
    assert_eq!(scene.process(&unit, &call).next()["id"], "spiffe://cluster.local/vm/tests");
    // The same content at another place is another file.
    let copy = dir.path().join("copy");
    fs::copy(&own, &copy).unwrap();
    write(&[("tests", &executable(&copy))]);
    assert_nobody(&unit);
    write(&[("tests", "{uid: 12345}")]);
    assert_nobody(&unit);
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_jwt_issuer_the_calls_are_unimplemented() {
    let Some(scene) = Scene::new("wa-nojwt", Options { jwt: false, ..Options::default() }) else {
        return;
    };
    let pod = scene.pod("web-1", 1);
    for call in [
        json!({"call": "jwt", "audience": ["a"]}),
        json!({"call": "jwt-bundles"}),
        json!({"call": "validate", "audience": "a", "token": "x"}),
    ] {
        assert_refused(&scene.process(&pod, &call).next(), Code::Unimplemented, "no JWT-SVIDs");
    }
    assert_eq!(scene.process(&pod, &json!({"call": "x509"})).next()["id"], id("web"));
}
