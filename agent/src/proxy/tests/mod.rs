//! Two data planes against each other over real TLS, in one network namespace of their own
//! whose loopback carries the pods' addresses. What the kernel's programs do (steering and
//! handing addresses over) is a table here.

mod hostile;
mod hostile_native;
mod resolving;

/// The same tests over each wire.
#[path = "."]
mod over_native {
    use super::*;

    const WIRES: TunnelWire = TunnelWire::Native;

    #[path = "flows.rs"]
    #[allow(clippy::duplicate_mod, reason = "the same tests over another wire")]
    mod flows;

    #[path = "requests.rs"]
    #[allow(clippy::duplicate_mod, reason = "the same tests over another wire")]
    mod requests;
}

#[path = "."]
mod over_hbone {
    use super::*;

    const WIRES: TunnelWire = TunnelWire::Hbone;

    #[path = "flows.rs"]
    #[allow(clippy::duplicate_mod, reason = "the same tests over another wire")]
    mod flows;

    #[path = "requests.rs"]
    #[allow(clippy::duplicate_mod, reason = "the same tests over another wire")]
    mod requests;
}

use std::{
    collections::{BTreeMap, HashMap},
    net::{IpAddr, SocketAddr},
    os::fd::{AsFd, OwnedFd},
    process::{Child, Command, Stdio},
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use arc_swap::ArcSwap;
use jiff::Timestamp;
use signet_ebpf::abi::{Direction, Mode, Verdict};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::mpsc,
    time::sleep,
};
use tokio_util::sync::CancellationToken;

use super::{
    DataPlaneConfig, DataPlaneHandle, certificates::Certificates, counters::Counters, plane::Plane,
    sockets::PodSockets, start,
};
use crate::{
    cluster::model::{ModeOrigin, ObjectName, Override, Pod, PodUid, Ranges, Synced, World},
    config::{Limits, values::TunnelWire},
    endpoint::{
        sockets::ListenerCommand,
        state::{EndpointKey, EndpointState, NodeState, NodeStatePublisher},
    },
    flow::{self, FlowEvent, FlowLog, FlowRecord},
    kernel::Confirm,
    netns::{NetnsFd, NetnsOpener},
    policy::{
        end_user::RequestAuthentication,
        model::{Action, Peer, Policy, PolicyName, PolicySet, Rule, Selector},
        request::asks_requests,
    },
    spiffe::{SpiffeId, TrustDomain},
    svid::{SvidHandle, SvidManager, SvidParams, issuer::embedded::EmbeddedIssuer},
    trust::Trust,
};

pub(super) const CLIENT_IP: &str = "10.77.0.1";
pub(super) const SERVER_IP: &str = "10.77.0.2";
pub(super) const OTHER_IP: &str = "10.77.0.3";
pub(super) const APP_PORT: u16 = 8080;

pub(super) fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

pub(super) fn address(ip: &str, port: u16) -> SocketAddr {
    SocketAddr::new(ip.parse().unwrap(), port)
}

pub(super) fn domain() -> TrustDomain {
    TrustDomain::parse("cluster.local").unwrap()
}

pub(super) fn identity(account: &str) -> SpiffeId {
    SpiffeId::for_service_account(&domain(), "shop", account).unwrap()
}

/// A network namespace that lives as long as this value.
pub(super) struct Net {
    holder: Child,
    pub(super) netns: Arc<NetnsFd>,
    pub(super) opener: NetnsOpener,
}

impl Net {
    pub(super) async fn new() -> Self {
        let addresses = [CLIENT_IP, SERVER_IP, OTHER_IP, "10.77.0.4", "fd77::1", "fd77::2"];
        let mut script = "ip link set lo up".to_owned();
        for ip in addresses {
            let length = if ip.contains(':') { "128 nodad" } else { "32" };
            script += &format!(" && ip addr add {ip}/{length} dev lo");
        }
        script += " && echo ready && exec sleep 1000";
        let mut holder = Command::new("unshare")
            .args(["--net", "sh", "-c", &script])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .expect("these tests need root, unshare and ip");
        let mut ready = [0; 6];
        let mut out = holder.stdout.take().unwrap();
        tokio::task::spawn_blocking(move || std::io::Read::read_exact(&mut out, &mut ready))
            .await
            .unwrap()
            .expect("these tests need root, unshare and ip");
        let fd = std::fs::File::open(format!("/proc/{}/ns/net", holder.id())).unwrap().into();
        let opener = NetnsOpener::start().unwrap();
        let netns = Arc::new(opener.adopt(fd).await.unwrap());
        Self { holder, netns, opener }
    }

    pub(super) async fn listen(&self, address: SocketAddr) -> TcpListener {
        let fd = self.opener.tcp_listener(&self.netns, address, 1024).await.unwrap();
        TcpListener::from_std(fd.into()).unwrap()
    }

    /// A socket bound to `from`, not yet connected.
    pub(super) async fn socket(&self, from: SocketAddr) -> OwnedFd {
        let socket = self.opener.tcp_socket(&self.netns, from.is_ipv6()).await.unwrap();
        rustix::net::sockopt::set_socket_reuseaddr(&socket, true).unwrap();
        rustix::net::bind(&socket, &from).unwrap();
        socket
    }
}

/// Connects; a reset that comes at once is left for the first read to see.
pub(super) async fn begin(socket: OwnedFd, to: SocketAddr) -> TcpStream {
    match rustix::net::connect(&socket, &to) {
        Ok(()) | Err(rustix::io::Errno::INPROGRESS) => {}
        Err(error) => panic!("{error}"),
    }
    let stream = TcpStream::from_std(socket.into()).unwrap();
    stream.writable().await.unwrap();
    stream
}

impl Drop for Net {
    fn drop(&mut self) {
        let _ = self.holder.kill();
        let _ = self.holder.wait();
    }
}

pub(super) fn pod(account: &str, pod_ip: &str, mode: Mode) -> Arc<Pod> {
    Arc::new(Pod {
        uid: format!("uid-{account}").into(),
        name: ObjectName { namespace: "shop".into(), name: format!("{account}-0").into() },
        service_account: account.into(),
        node: None,
        ips: vec![ip(pod_ip)],
        labels: Arc::new(BTreeMap::from([("app".into(), account.into())])),
        workload: None,
        host_network: false,
        finished: false,
        terminating: false,
        alive: true,
        mirror: false,
        named_ports: BTreeMap::new(),
        mode,
        mode_origin: ModeOrigin::Namespace,
        exempt_ports: Arc::default(),
        strict_ports: None,
        unenforceable: None,
        captured: false,
    })
}

pub(super) fn world(revision: u64, pods: &[Arc<Pod>], served: &[&Arc<Pod>]) -> World {
    World {
        revision,
        trust_domain: domain(),
        namespaces: BTreeMap::new(),
        pods: pods.iter().map(|p| (p.uid.clone(), p.clone())).collect(),
        pods_by_ip: pods
            .iter()
            .flat_map(|p| p.ips.iter().map(|ip| (*ip, p.uid.clone())))
            .collect::<HashMap<IpAddr, PodUid>>(),
        service_accounts: Default::default(),
        services: BTreeMap::new(),
        services_by_ip: HashMap::new(),
        services_by_external_ip: HashMap::new(),
        nodes: BTreeMap::new(),
        zones: BTreeMap::new(),
        policies: Arc::new(PolicySet::default()),
        peer_authentications: Vec::new(),
        network_policies: Vec::new(),
        called: Arc::default(),
        enforcement: Override::Absent,
        ranges: Ranges {
            pods: vec!["10.77.0.0/16".parse().unwrap()],
            services: vec!["10.96.0.0/16".parse().unwrap()],
            outside: vec!["10.77.9.0/24".parse().unwrap()],
        },
        federation: Arc::default(),
        served: served.iter().map(|p| (p.uid.clone(), "node".into())).collect(),
        problems: Vec::new(),
        synced: Synced { pods: true, policies: true },
    }
}

/// An ALLOW for these service accounts of `shop`, on ingress or egress.
pub(super) fn allow(name: &str, direction: Direction, accounts: &[&str]) -> Arc<Policy> {
    let peer = Peer {
        service_accounts: accounts.iter().map(|a| ("shop".into(), (*a).into())).collect(),
        ..Peer::default()
    };
    let rule = Rule { peers: vec![peer], ..Rule::default() };
    let ingress = direction == Direction::Ingress;
    let name =
        PolicyName { kind: "IdentityPolicy".into(), namespace: "shop".into(), name: name.into() };
    let selector = Selector::of("shop");
    Arc::new(Policy {
        ingress: if ingress { vec![rule.clone()] } else { Vec::new() },
        egress: if ingress { Vec::new() } else { vec![rule] },
        governs_ingress: ingress,
        governs_egress: !ingress,
        ..Policy::new(name, selector, Action::Allow)
    })
}

/// What the kernel would do, as tables.
#[derive(Default)]
pub(super) struct Kernel {
    /// Client's own address at the outbound listener → what it dialled.
    originals: Mutex<HashMap<SocketAddr, SocketAddr>>,
    /// Clients' addresses that were handed to applications, in order.
    pub(super) shown: Mutex<Vec<SocketAddr>>,
    /// What the application's socket answers; `None`: it has taken the address.
    pub(super) confirm: Mutex<Option<Confirm>>,
    /// Entries taken back.
    pub(super) forgotten: Mutex<u32>,
}

impl Kernel {
    fn sockets(self: &Arc<Self>, opener: &NetnsOpener) -> PodSockets {
        let (originals, shown, confirm, forgotten) =
            (self.clone(), self.clone(), self.clone(), self.clone());
        let opener = opener.clone();
        PodSockets {
            tcp: Arc::new(move |netns, v6| {
                let (opener, netns) = (opener.clone(), netns.clone());
                Box::pin(async move { opener.tcp_socket(&netns, v6).await })
            }),
            original: Arc::new(move |fd| {
                let peer: SocketAddr =
                    rustix::net::getpeername(fd.as_fd()).ok()??.try_into().ok()?;
                originals.originals.lock().unwrap().remove(&peer)
            }),
            set_client: Arc::new(move |_, client| {
                shown.shown.lock().unwrap().push(client);
                Ok(())
            }),
            confirm: Arc::new(move |_| confirm.confirm.lock().unwrap().unwrap_or(Confirm::Taken)),
            forget: Arc::new(move |_| *forgotten.forgotten.lock().unwrap() += 1),
        }
    }
}

/// One node with one endpoint.
pub(super) struct Node {
    pub(super) name: &'static str,
    pub(super) plane: DataPlaneHandle,
    pub(super) kernel: Arc<Kernel>,
    pub(super) publisher: NodeStatePublisher,
    pub(super) log: FlowLog,
    pub(super) trust: Arc<Trust>,
    pub(super) commands: mpsc::UnboundedSender<ListenerCommand>,
    pub(super) key: EndpointKey,
    outbound: SocketAddr,
}

/// How a node's endpoint is set up.
#[derive(Clone)]
pub(super) struct Setup {
    pub(super) pod: Arc<Pod>,
    pub(super) policies: Vec<Arc<Policy>>,
    pub(super) world: World,
    pub(super) authentications: Vec<Arc<RequestAuthentication>>,
}

impl Setup {
    pub(super) fn state(&self, name: &str, key: &EndpointKey) -> NodeState {
        let endpoint = EndpointState {
            key: key.clone(),
            pod: self.pod.clone(),
            identity: identity(&self.pod.service_account),
            identity_number: 256,
            mode: self.pod.mode,
            addresses: self.pod.ips.clone(),
            cgroup_path: "/".into(),
            cgroup: 1,
            policies: self.policies.clone().into(),
            request_authentications: self.authentications.clone().into(),
            judged: asks_requests(&self.policies) || !self.authentications.is_empty(),
            raw_guard: None,
            default_deny: false,
            listener4: 20_001,
            listener6: (20_010, 4),
            served: true,
            closed: false,
            since: Timestamp::now(),
        };
        let mut state = NodeState::empty(name.into(), Arc::new(self.world.clone()));
        state.revision = self.world.revision;
        state.endpoints.insert(key.netns, Arc::new(endpoint));
        state
    }
}

pub(super) fn limits() -> Limits {
    Limits { open_flows: 1000, handshakes: 64, handshakes_per_source: 32, backlog: 128 }
}

/// A root that both nodes' SVIDs come from.
pub(super) struct Authority {
    _dir: tempfile::TempDir,
    pub(super) issuer: Arc<EmbeddedIssuer>,
}

impl Authority {
    pub(super) fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let issuer = EmbeddedIssuer::open(
            &dir.path().join("authority"),
            &domain(),
            Duration::from_secs(3600),
        )
        .unwrap();
        Self { _dir: dir, issuer: Arc::new(issuer) }
    }

    pub(super) fn trust(&self) -> Arc<Trust> {
        let trust = Trust::new();
        trust.set(domain(), self.issuer.bundle());
        trust
    }

    /// A handle that has an SVID for `account`.
    pub(super) async fn svids(&self, account: &str) -> SvidHandle {
        let svids = SvidManager::start(self.issuer.clone(), SvidParams::default());
        let id = identity(account);
        svids.want([id.clone()].into());
        eventually("an SVID", || svids.get(&id).is_some()).await;
        svids
    }
}

impl Node {
    pub(super) async fn start(
        net: &Net,
        authority: &Authority,
        name: &'static str,
        setup: &Setup,
        adjust: impl FnOnce(&mut DataPlaneConfig),
    ) -> Self {
        let key = EndpointKey { uid: setup.pod.uid.clone(), netns: net.netns.cookie };
        let (publisher, state) = NodeStatePublisher::new(setup.state(name, &key));
        let (recorder, collector) = flow::start(flow::Limits::default(), flow::Sinks::default());
        let log = recorder.log();
        tokio::spawn(collector.run());
        let kernel = Arc::new(Kernel::default());
        let mut config = DataPlaneConfig::new(limits(), Duration::from_millis(300));
        config.cores = 2;
        adjust(&mut config);
        let svids = authority.svids(&setup.pod.service_account).await;
        let trust = authority.trust();
        let plane = Arc::new(Plane {
            limits: ArcSwap::from_pointee(config.limits),
            certificates: Certificates::new(config.handshake_timeout, config.wires),
            config,
            state,
            sockets: kernel.sockets(&net.opener),
            svids,
            trust: trust.clone(),
            recorder,
            counters: Counters::default(),
            flow_ids: Arc::default(),
            endpoints: Mutex::default(),
            succeeded: false.into(),
            drain: CancellationToken::new(),
            cut: CancellationToken::new(),
        });
        let (commands, receiver) = mpsc::unbounded_channel();
        let plane = start(plane, receiver).unwrap();
        let pod_ip = setup.pod.ips[0];
        let inbound = SocketAddr::new(pod_ip, 15008);
        let loopback = if pod_ip.is_ipv4() { address("127.0.0.1", 0) } else { address("::1", 0) };
        let inbound = net.opener.tcp_listener(&net.netns, inbound, 128).await.unwrap();
        let outbound = net.opener.tcp_listener(&net.netns, loopback, 1024).await.unwrap();
        let at: SocketAddr = rustix::net::getsockname(&outbound).unwrap().try_into().unwrap();
        let serve = ListenerCommand::Serve {
            key: key.clone(),
            netns: net.netns.clone(),
            outbound: vec![outbound],
            inbound: vec![inbound],
        };
        commands.send(serve).unwrap();
        Self { name, plane, kernel, publisher, log, trust, commands, key, outbound: at }
    }

    pub(super) fn publish(&self, setup: &Setup) {
        self.publisher.publish(setup.state(self.name, &self.key));
    }

    /// An application of this node's pod dials `destination`, as connect4 would steer it.
    pub(super) async fn dial(&self, net: &Net, destination: SocketAddr) -> TcpStream {
        let from = SocketAddr::new(self.outbound.ip(), 0);
        let socket = net.socket(from).await;
        let local = rustix::net::getsockname(&socket).unwrap().try_into().unwrap();
        self.kernel.originals.lock().unwrap().insert(local, destination);
        begin(socket, self.outbound).await
    }

    /// A dial that no program has steered.
    pub(super) async fn dial_listener(&self, net: &Net) -> TcpStream {
        let socket = net.socket(SocketAddr::new(self.outbound.ip(), 0)).await;
        begin(socket, self.outbound).await
    }

    pub(super) fn records(&self) -> Vec<Arc<FlowRecord>> {
        let all: flow::recorder::Matches = Arc::new(|_| true);
        self.log.recent(&all)
    }

    /// The first verdict record that `matches`, once it is there.
    pub(super) async fn verdict(
        &self,
        what: &str,
        matches: impl Fn(&FlowRecord) -> bool,
    ) -> Arc<FlowRecord> {
        self.record(what, |r| r.event == FlowEvent::Verdict && matches(r)).await
    }

    pub(super) async fn end(
        &self,
        what: &str,
        matches: impl Fn(&FlowRecord) -> bool,
    ) -> Arc<FlowRecord> {
        self.record(what, |r| r.event != FlowEvent::Verdict && matches(r)).await
    }

    async fn record(&self, what: &str, matches: impl Fn(&FlowRecord) -> bool) -> Arc<FlowRecord> {
        let until = Instant::now() + Duration::from_secs(5);
        loop {
            let records = self.records();
            if let Some(found) = records.iter().find(|r| matches(r)) {
                return found.clone();
            }
            assert!(Instant::now() < until, "{}: no {what} among {records:#?}", self.name);
            sleep(Duration::from_millis(10)).await;
        }
    }

    /// Waits until nothing of any flow is left.
    pub(super) async fn settled(&self) {
        eventually("no open flow", || self.plane.stats().open_flows == 0).await;
    }
}

pub(super) async fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let until = Instant::now() + Duration::from_secs(10);
    while !holds() {
        assert!(Instant::now() < until, "never came: {what}");
        sleep(Duration::from_millis(5)).await;
    }
}

pub(super) fn dropped(record: &FlowRecord) -> bool {
    record.verdict == Verdict::Dropped
}

pub(super) fn forwarded(record: &FlowRecord) -> bool {
    record.verdict == Verdict::Forwarded
}
