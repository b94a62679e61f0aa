//! The node's state: what the reconciler has applied, read by proxies, flow, CLI.

use std::{
    collections::{BTreeSet, HashMap},
    net::IpAddr,
    sync::Arc,
    time::Duration,
};

use arc_swap::ArcSwap;
use signet_ebpf::abi::Mode;
use tokio::sync::watch;

use crate::{
    cluster::{
        builtins::Builtins,
        model::{Pod, Problem, World},
    },
    policy::{end_user::RequestAuthentication, model::Policy},
    spiffe::SpiffeId,
};

/// An endpoint's key: a re-made sandbox is a new endpoint.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct EndpointKey {
    /// The pod's uid.
    pub uid: Arc<str>,
    /// The cookie of its network namespace.
    pub netns: u64,
}

/// A registered endpoint, as the agent that serves it tells its successor.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Standing {
    /// Its key.
    pub key: EndpointKey,
    /// The mode that the kernel has for it.
    pub mode: Mode,
    /// It is served: its successor must be able to before it takes over.
    pub served: bool,
    /// It has not been enrolled for so long, and still serves those who have not heard.
    pub leaving_for: Option<Duration>,
    /// It has been strict for so long, and its plaintext flows have their grace.
    pub strict_for: Option<Duration>,
}

/// Everything applied on this node at one revision; published after the kernel maps.
#[derive(Clone, Debug)]
pub struct NodeState {
    /// Revision of the world that this was planned from.
    pub revision: u64,
    /// This node's name.
    pub node: Arc<str>,
    /// One of [`signet_ebpf::abi::enforcement`]'s: what overrides modes and policies.
    pub enforcement: u8,
    /// Namespaces whose pods are never refused anything, besides kube-system.
    pub never_deny: BTreeSet<Arc<str>>,
    /// What passes without a policy.
    pub builtins: Builtins,
    /// The world it was planned from.
    pub world: Arc<World>,
    /// Registered endpoints by network namespace cookie.
    pub endpoints: HashMap<u64, Arc<EndpointState>>,
    /// Pods of this node that wait, with the reason.
    pub waiting: Vec<Waiting>,
    /// What an operator should know of this node's side; the world has its own.
    pub problems: Vec<Problem>,
    /// Kernel identity number → SPIFFE ID.
    pub identities: Arc<HashMap<u32, SpiffeId>>,
    /// Kernel policy number → policy.
    pub policies: Arc<HashMap<u32, Arc<Policy>>>,
}

/// A registered endpoint.
#[derive(Clone, Debug)]
pub struct EndpointState {
    /// Its key.
    pub key: EndpointKey,
    /// The pod.
    pub pod: Arc<Pod>,
    /// Its identity.
    pub identity: SpiffeId,
    /// Its identity's number in the kernel.
    pub identity_number: u32,
    /// The mode applied (what the pod asks for, or what could be enforced).
    pub mode: Mode,
    /// Its own addresses, as rtnetlink shows them in its network namespace.
    pub addresses: Vec<IpAddr>,
    /// The pod directory's path below the cgroup2 mount.
    pub cgroup_path: Arc<str>,
    /// The pod directory's cgroup id.
    pub cgroup: u64,
    /// Policies that select it.
    pub policies: Arc<[Arc<Policy>]>,
    /// RequestAuthentications that select it.
    pub request_authentications: Arc<[Arc<RequestAuthentication>]>,
    /// The HTTP requests that it receives are to be judged one by one: a policy asks about
    /// them, or a RequestAuthentication selects it.
    pub judged: bool,
    /// How its raw guard is attached; `None`: it has none.
    pub raw_guard: Option<&'static str>,
    /// True when the namespace's default is deny.
    pub default_deny: bool,
    /// Outbound listener port, IPv4 (0: none).
    pub listener4: u16,
    /// First outbound listener port on `::1` (0: none), and how many.
    pub listener6: (u16, u16),
    /// SVID, listeners and kernel entries are in place, and it is announced.
    pub served: bool,
    /// Its rows or policies do not fit the kernel's maps: everything of it is refused.
    pub closed: bool,
    /// When it was registered.
    pub since: jiff::Timestamp,
}

/// A pod of this node that is not registered, and why.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Waiting {
    /// The pod.
    pub pod: Arc<Pod>,
    /// For people: what is missing and where it was looked for.
    pub reason: String,
}

impl NodeState {
    /// The state before anything is applied.
    pub fn empty(node: Arc<str>, world: Arc<World>) -> Self {
        Self {
            revision: 0,
            node,
            enforcement: signet_ebpf::abi::enforcement::ENFORCE,
            never_deny: BTreeSet::new(),
            builtins: Builtins::default(),
            world,
            endpoints: HashMap::new(),
            waiting: Vec::new(),
            problems: Vec::new(),
            identities: Arc::default(),
            policies: Arc::default(),
        }
    }

    /// The registered endpoint that has `ip` as one of its own addresses.
    pub fn endpoint_by_ip(&self, ip: IpAddr) -> Option<&Arc<EndpointState>> {
        self.endpoints.values().find(|e| e.addresses.contains(&ip))
    }
}

/// Reads the node's state; clones see the same one.
#[derive(Clone)]
pub struct NodeStateHandle {
    current: Arc<ArcSwap<NodeState>>,
    published: watch::Receiver<u64>,
}

impl NodeStateHandle {
    /// The state as of now.
    pub fn current(&self) -> Arc<NodeState> {
        self.current.load_full()
    }

    /// Counts publications: it changes after [`NodeStateHandle::current`] does, at every
    /// change that open flows are to be judged by again. It is not the world's revision,
    /// because pods appear and become ready within one.
    pub fn subscribe(&self) -> watch::Receiver<u64> {
        self.published.clone()
    }
}

/// Publishes the node's state; the reconciler holds the only one.
pub struct NodeStatePublisher {
    current: Arc<ArcSwap<NodeState>>,
    published: watch::Sender<u64>,
}

impl NodeStatePublisher {
    /// A publisher of `initial` and its readers' handle.
    pub fn new(initial: NodeState) -> (Self, NodeStateHandle) {
        let current = Arc::new(ArcSwap::from_pointee(initial));
        let (published, receiver) = watch::channel(0);
        let handle = NodeStateHandle { current: current.clone(), published: receiver };
        (Self { current, published }, handle)
    }

    /// Replaces the state, then tells the readers.
    pub fn publish(&self, state: NodeState) {
        self.current.store(Arc::new(state));
        self.published.send_modify(|n| *n += 1);
    }
}
