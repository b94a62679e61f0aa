//! What the daemon tells the admin service: values only, taken at one moment.

use std::{sync::Arc, time::Duration};

use jiff::Timestamp;
use signet_ebpf::abi::DropKey;

use crate::{
    cluster::{model::Problem, source::WatchFacts},
    endpoint::state::NodeState,
    spiffe::SpiffeId,
};

/// The picture of a moment.
#[derive(Clone, Debug)]
pub struct StatusInputs {
    /// This node's name.
    pub node: Arc<str>,
    /// When the agent started.
    pub started: Timestamp,
    /// What is applied; `None` until the first turn of the reconciler.
    pub state: Option<Arc<NodeState>>,
    /// Revision of the newest world.
    pub wanted_revision: u64,
    /// When that world was published.
    pub wanted_since: Timestamp,
    /// `files` or `kubernetes`.
    pub source: Arc<str>,
    /// Where the source reads: a directory, an API server.
    pub location: Arc<str>,
    /// What the source watches.
    pub watches: Vec<WatchFacts>,
    /// The kernel's side.
    pub kernel: KernelFacts,
    /// The authority.
    pub issuer: IssuerFacts,
    /// Every SVID that is wanted for the tunnel.
    pub svids: Vec<SvidFacts>,
    /// Every SVID that the Workload API holds, with its pod as `namespace/name`.
    pub workload_svids: Vec<(String, SvidFacts)>,
    /// The kernel's drop counters.
    pub drops: Vec<DropCount>,
    /// Problems that the world does not carry (the daemon's own, the kernel's, the issuer's).
    pub problems: Vec<Problem>,
    /// How long ago the reconciler turned; `None` before its first turn.
    pub since_turn: Option<Duration>,
    /// Every enforced pod that was there at the start has got its listeners.
    pub settled: bool,
    /// Which of two agents of a node this one is.
    pub succession: Succession,
    /// Further counters by name, as `handshake_failed{kind="expired"}`.
    pub counters: Vec<(String, u64)>,
}

/// Which of two agents of a node one is, while one takes the other's place.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub enum Succession {
    /// It serves the node.
    #[default]
    Serves,
    /// Another one does, and for what this one waits before it takes over.
    Waits(Arc<str>),
    /// Another one does, and this one only finishes what it has accepted.
    Succeeded,
}

/// The kernel's side.
#[derive(Clone, Debug, Default)]
pub struct KernelFacts {
    /// `uname -r`.
    pub release: String,
    /// Names of programs that should be attached, and whether they are.
    pub programs: Vec<(&'static str, bool)>,
    /// The workloads root below the cgroup2 mount.
    pub cgroup: String,
    /// The pin directory.
    pub pins: String,
    /// Where kubelet's probes come from.
    pub probe_cgroups: Vec<String>,
    /// Absent kernel features with the fallback in use.
    pub fallbacks: Vec<String>,
    /// The override of enforcement.
    pub enforcement: EnforcementState,
}

/// The cluster-wide override of enforcement.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum EnforcementState {
    /// As labels and policies say.
    #[default]
    Enforce,
    /// What would be dropped passes and is reported.
    Audit,
    /// Nothing is touched.
    Off,
}

impl EnforcementState {
    /// Its name in the configuration.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Enforce => "enforce",
            Self::Audit => "audit",
            Self::Off => "off",
        }
    }
}

/// The authority.
#[derive(Clone, Debug)]
pub struct IssuerFacts {
    /// The agent's own trust domain.
    pub trust_domain: Arc<str>,
    /// `embedded`, later others.
    pub name: Arc<str>,
    /// `notAfter` of each root of the own bundle.
    pub roots: Vec<Timestamp>,
}

/// One SVID that is wanted.
#[derive(Clone, Debug)]
pub struct SvidFacts {
    /// Whose.
    pub id: SpiffeId,
    /// What there is.
    pub state: SvidState,
    /// When it is renewed or tried again.
    pub next_attempt: Option<Timestamp>,
    /// Why the last attempt failed, if it did.
    pub error: Option<String>,
}

/// What there is of an SVID.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum SvidState {
    /// None was issued yet.
    Missing,
    /// Issued; valid between these.
    Issued {
        /// When it was obtained: it is backdated for clocks that are behind.
        obtained: Timestamp,
        /// Not before.
        not_before: Timestamp,
        /// Not after.
        not_after: Timestamp,
    },
}

/// A drop counter.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct DropCount {
    /// Its key.
    pub key: DropKey,
    /// Drops since the programs were first attached.
    pub count: u64,
}
