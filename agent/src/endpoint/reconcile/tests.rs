//! The whole task over the real kernel: one pod's life, from its first process to its end.

use std::{
    process::{Child, Command, Stdio},
    sync::Mutex,
    time::Duration,
};

use signet_ebpf::abi::{Mode, PodEntry, pod};
use tokio::time::timeout;

use super::{super::plan::tests::Scene, *};
use crate::{
    kernel::test_host::Host,
    spiffe::TrustDomain,
    svid::{SvidManager, SvidParams, issuer::embedded::EmbeddedIssuer},
};

const ADDRESS: &str = "10.123.0.5";

/// A pod's sandbox: a process in its own network namespace, with an address.
struct Sandbox {
    process: Child,
    cgroup: std::path::PathBuf,
}

impl Sandbox {
    fn start(host: &Host, uid: &str) -> Self {
        let process = Command::new("unshare")
            .args(["-n", "sh", "-c"])
            .arg(format!("ip link set lo up && ip addr add {ADDRESS}/32 dev lo && exec sleep 600"))
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        let cgroup = host.cgroup.join(format!("kubepods/pod{uid}"));
        std::fs::create_dir_all(cgroup.join("c1")).unwrap();
        std::fs::write(cgroup.join("c1/cgroup.procs"), process.id().to_string()).unwrap();
        Self { process, cgroup }
    }
}

impl Drop for Sandbox {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
        for dir in [self.cgroup.join("c1"), self.cgroup.clone()] {
            // The kernel needs a moment to see the process gone.
            for _ in 0..50 {
                match std::fs::remove_dir(&dir) {
                    Err(error) if error.kind() == std::io::ErrorKind::ResourceBusy => {
                        std::thread::sleep(Duration::from_millis(10));
                    }
                    _ => break,
                }
            }
        }
    }
}

/// Everything around the task.
struct Node {
    world: watch::Sender<Arc<World>>,
    _config: watch::Sender<Arc<AgentConfig>>,
    states: super::super::state::NodeStateHandle,
    commands: mpsc::UnboundedReceiver<ListenerCommand>,
    announced: Arc<Mutex<BTreeMap<PodUid, Arc<str>>>>,
    stop: CancellationToken,
    task: tokio::task::JoinHandle<Result<(), ReconcileError>>,
    pins: std::path::PathBuf,
}

impl Node {
    fn start(host: &Host, world: World) -> Self {
        let (programs, maps) = Programs::load(&host.config()).unwrap();
        let pins = programs.pins().to_owned();
        let domain = TrustDomain::parse("cluster.local").unwrap();
        let authority = host.dir.path().join("authority");
        let issuer = EmbeddedIssuer::open(&authority, &domain, Duration::from_secs(3600)).unwrap();
        let world = Arc::new(world);
        let config = AgentConfig {
            node: "node-1".into(),
            unenrol_grace: Duration::from_secs(3),
            ..AgentConfig::default()
        };
        let (world_sender, world_receiver) = watch::channel(world.clone());
        let (config_sender, config) = watch::channel(Arc::new(config));
        let (state, states) = NodeStatePublisher::new(NodeState::empty("node-1".into(), world));
        let (listeners, commands) = mpsc::unbounded_channel();
        let announced = Arc::new(Mutex::new(BTreeMap::new()));
        let board = announced.clone();
        let stop = CancellationToken::new();
        let deps = Deps {
            world: world_receiver,
            config,
            programs,
            maps,
            opener: NetnsOpener::start().unwrap(),
            svids: SvidManager::start(Arc::new(issuer), SvidParams::default()),
            listeners,
            announce: Box::new(move |served, _| {
                if let Some(served) = served {
                    board.lock().unwrap().clone_from(served);
                }
                Ok(())
            }),
            open_flows: Arc::new(|_| 0),
            closed: mpsc::unbounded_channel().0,
            state,
            report: watch::channel(KernelReport::default()).0,
            pulse: Pulse::default(),
            start: Start::AtOnce,
            commands: mpsc::channel(1).1,
        };
        let task = tokio::spawn(run(deps, mpsc::channel(1).1, stop.clone()));
        Self {
            world: world_sender,
            _config: config_sender,
            states,
            commands,
            announced,
            stop,
            task,
            pins,
        }
    }

    /// Waits until the state is as wanted.
    async fn until(&self, what: &str, wanted: impl Fn(&NodeState) -> bool) -> Arc<NodeState> {
        let mut published = self.states.subscribe();
        let waiting = async {
            loop {
                let state = self.states.current();
                if wanted(&state) {
                    return state;
                }
                published.changed().await.expect("the task runs");
            }
        };
        match timeout(Duration::from_secs(10), waiting).await {
            Ok(state) => state,
            Err(_) => panic!("not in time: {what}; {:#?}", self.states.current().waiting),
        }
    }

    /// The pod's row in the kernel, as soon as it is as wanted.
    async fn row(&self, netns: u64, what: &str, wanted: impl Fn(Option<PodEntry>) -> bool) {
        let data = aya::maps::MapData::from_pin(self.pins.join("PODS")).unwrap();
        let pods: aya::maps::HashMap<_, u64, PodEntry> =
            aya::maps::Map::HashMap(data).try_into().unwrap();
        for _ in 0..500 {
            if wanted(pods.get(&netns, 0).ok()) {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("not in time: {what}; the row is {:?}", pods.get(&netns, 0));
    }

    async fn end(self) {
        self.stop.cancel();
        self.task.await.unwrap().unwrap();
        assert!(self.announced.lock().unwrap().is_empty(), "un-announced at the end");
    }
}

fn ready(row: Option<PodEntry>) -> bool {
    row.is_some_and(|row| row.flags & pod::READY != 0 && row.mode == Mode::Strict as u8)
}

#[test]
fn a_pod_s_life() {
    let Some(host) = Host::new("reconcile") else { return };
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    runtime.block_on(live(&host));
    runtime.shutdown_timeout(Duration::from_secs(1));
}

async fn live(host: &Host) {
    let mut scene = Scene::new();
    scene.namespace("shop", Mode::Strict);
    let uid = scene.pod("shop", "pay", "node-1", ADDRESS);
    // The API learns the address late.
    scene.change(&uid, |pod| pod.ips.clear());
    scene.world.pods_by_ip.clear();
    let mut node = Node::start(host, scene.world.clone());

    // No cgroup yet: it waits, and says where it was looked for.
    let state = node.until("it waits", |s| !s.waiting.is_empty()).await;
    assert!(state.waiting[0].reason.contains("--cgroup-root"), "{}", state.waiting[0].reason);

    // The sandbox appears.
    let sandbox = Sandbox::start(host, &uid);
    let served = |s: &NodeState| s.endpoints.values().any(|e| e.served);
    let state = node.until("it is served", served).await;
    let endpoint = state.endpoints.values().next().unwrap().clone();
    let netns = endpoint.key.netns;
    assert_eq!(endpoint.addresses, [ADDRESS.parse::<std::net::IpAddr>().unwrap()]);
    assert_eq!(state.world.pods_by_ip.get(&endpoint.addresses[0]), Some(&uid));
    node.row(netns, "its row is ready", ready).await;
    let Some(ListenerCommand::Serve { key, outbound, inbound, .. }) = node.commands.recv().await
    else {
        panic!("listeners are handed over first");
    };
    assert_eq!(key, endpoint.key);
    assert!(outbound.len() == 5 && inbound.len() == 2, "both families of loopback");
    // Announced last, once everything is in place.
    let announced = async {
        while node.announced.lock().unwrap().is_empty() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    timeout(Duration::from_secs(10), announced).await.expect("it is announced");
    assert_eq!(node.announced.lock().unwrap().len(), 1);

    // A restart: closed until listeners are up again, in the same maps, with the same number.
    node.end().await;
    let mut node = Node::start(host, scene.world.clone());
    let state = node.until("it is served again", served).await;
    assert_eq!(state.endpoints[&netns].identity_number, endpoint.identity_number);
    node.row(netns, "its row is ready again", ready).await;
    assert!(matches!(node.commands.recv().await, Some(ListenerCommand::Serve { .. })));

    // Its namespace goes off: un-announced at once, served a little longer, then left alone.
    scene.set_mode(&uid, Mode::Off);
    node.world.send_replace(Arc::new(scene.world.clone()));
    node.until("it is not served", |s| !served(s)).await;
    node.row(netns, "it is left alone", |row| {
        row.is_some_and(|row| row.mode == Mode::Off as u8 && row.flags == 0)
    })
    .await;
    assert!(matches!(node.commands.recv().await, Some(ListenerCommand::Stop { .. })));
    assert!(node.announced.lock().unwrap().is_empty());

    // Its sandbox goes: nothing is left of it.
    drop(sandbox);
    node.until("it is gone", |s| s.endpoints.is_empty()).await;
    node.row(netns, "its row is gone", |row| row.is_none()).await;
    node.end().await;
}
