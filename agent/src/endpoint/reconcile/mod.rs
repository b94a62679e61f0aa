//! The one task that owns the endpoints and writes the kernel's maps (DESIGN §3a).
//!
//! A turn: look at the node, open listeners, plan, then apply in two steps. Rights are taken
//! from the kernel first, then the state is published (open flows are judged again), then
//! rights are given, then served pods are announced.

mod closing;
mod listening;
mod pulse;
mod succession;
mod surveying;
mod swapping;
mod upkeep;
mod waking;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::Arc,
    time::{Duration, Instant},
};

use signet_ebpf::abi::{Config, Mode, enforcement};
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;

pub use self::pulse::Pulse;
use self::succession::Role;
pub use self::succession::{Command, Control, Given, Start};
pub use self::surveying::{Survey, Surveyed};
use self::waking::{Wake, Woken};
pub use super::sweep::MapFill;
use super::{
    apply,
    discovery::Discovery,
    identities::{Identities, NEXT_ROW},
    plan::{self, Input, Memory, Numbers, Observed, ObservedPod, Params, Plan},
    probes::ProbeCgroups,
    rejudge::Closed,
    released::Follower,
    sockets::{self, ListenerCommand},
    state::{EndpointKey, NodeState, NodeStatePublisher},
    tables::Tables,
};
use crate::{
    cluster::{
        builtins::Builtins,
        model::{Override, Pod, PodUid, Problem, World},
    },
    config::AgentConfig,
    kernel::{KernelError, Maps, Programs},
    netns::NetnsOpener,
    policy::compile::PolicyEntry,
    spiffe::SpiffeId,
    svid::SvidHandle,
};

/// A pod that was not found for so long is looked for at the usual pace.
const IMPATIENCE: Duration = Duration::from_secs(60);
/// What failed is tried again after this.
const RETRY: Duration = Duration::from_secs(1);

/// Announces served pods (uid → `namespace/name`) at a revision; the error is for people.
/// `None`: another process speaks from now on, and what was said stays.
pub type Announce =
    Box<dyn FnMut(Option<&BTreeMap<PodUid, Arc<str>>>, u64) -> Result<(), String> + Send + Sync>;

/// How many flows the data plane has open for an endpoint.
pub type OpenFlows = Arc<dyn Fn(&EndpointKey) -> usize + Send + Sync>;

/// What the task works with.
pub struct Deps {
    /// The world, as its source publishes it.
    pub world: watch::Receiver<Arc<World>>,
    /// The configuration; its live keys are followed.
    pub config: watch::Receiver<Arc<AgentConfig>>,
    /// The loaded programs.
    pub programs: Programs,
    /// Their maps.
    pub maps: Maps,
    /// Opens sockets in pods' network namespaces.
    pub opener: NetnsOpener,
    /// SVIDs.
    pub svids: SvidHandle,
    /// The proxy.
    pub listeners: mpsc::UnboundedSender<ListenerCommand>,
    /// The board.
    pub announce: Announce,
    /// The data plane's tables.
    pub open_flows: OpenFlows,
    /// Where closed flows are told.
    pub closed: mpsc::UnboundedSender<ClosedFlows>,
    /// Where the state is published.
    pub state: NodeStatePublisher,
    /// Where facts for `signet status` are published.
    pub report: watch::Sender<KernelReport>,
    /// Where turns are noted, for probes.
    pub pulse: Pulse,
    /// Whether the maps are this process's from the beginning.
    pub start: Start,
    /// What a hand-over asks for.
    pub commands: mpsc::Receiver<Command>,
}

/// Flows of an endpoint that were closed from the kernel's side.
#[derive(Clone, Debug)]
pub struct ClosedFlows {
    /// Whose.
    pub key: EndpointKey,
    /// They.
    pub flows: Vec<Closed>,
    /// Revision of the world that decided.
    pub revision: u64,
}

/// Facts about the kernel's side, for `signet status`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct KernelReport {
    /// Every program, and whether it is attached where it is meant to be.
    pub programs: Vec<(&'static str, bool)>,
    /// The workloads root below the cgroup2 mount.
    pub workloads: String,
    /// The directory of the pins.
    pub pins: String,
    /// Where probes come from.
    pub probe_cgroups: Vec<String>,
    /// What the kernel lacks or what is masked, one sentence each.
    pub missing_features: Vec<String>,
    /// Problems of the kernel's side.
    pub problems: Vec<Problem>,
    /// How full the kernel's maps are, as of the last sweep.
    pub maps: Vec<MapFill>,
    /// Open flows of enforced pods that `strict` would not take anew, by namespace.
    pub plaintext: BTreeMap<Arc<str>, u64>,
}

/// Why the task ended by itself.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ReconcileError {
    /// The pinned maps cannot be read or cleared of readiness.
    #[error("the pinned state cannot be taken over")]
    Inherit(#[source] KernelError),
    /// Discovery cannot start.
    #[error("pods cannot be looked for: the node's own network namespace cannot be opened")]
    Discovery(#[source] std::io::Error),
    /// The source of the world is gone.
    #[error("the source of the cluster's objects has ended")]
    WorldGone,
    /// The proxy is gone.
    #[error("the data plane has ended")]
    DataPlaneGone,
}

/// Runs until `stop` is cancelled; then un-announces this node's pods and returns. The
/// kernel keeps what it has: registered enforced pods stay closed.
///
/// # Errors
/// [`ReconcileError`]: the process should end with it.
pub async fn run(
    deps: Deps,
    surveys: mpsc::Receiver<Survey>,
    stop: CancellationToken,
) -> Result<(), ReconcileError> {
    let mut task = Reconciler::start(deps)?;
    let mut wake = Wake::new(&task, surveys);
    loop {
        let changed = match wake.wait(&mut task, &stop).await? {
            Woken::Stop => {
                if task.role == Role::Acting {
                    task.unannounce();
                }
                return Ok(());
            }
            Woken::Asked(survey) => {
                task.survey(survey).await;
                false
            }
            Woken::Told(command) => {
                task.obey(command).await?;
                continue;
            }
            Woken::Changed => true,
            Woken::Time => false,
        };
        match task.role {
            Role::Waiting => {}
            Role::Acting => task.turn(changed).await?,
            Role::Yielded => task.watch(changed).await?,
        }
        task.deps.pulse.turned();
    }
}

/// Compiled policies by network namespace, as [`Tables`] has them.
type Policies = HashMap<u64, Option<Arc<Vec<PolicyEntry>>>>;

/// An endpoint's listeners, as far as this task knows.
enum Listeners {
    /// Served; these are the same once more, for a successor.
    Handed(sockets::Listeners),
    Failed(Arc<str>, Instant),
}

struct Reconciler {
    deps: Deps,
    role: Role,
    /// Listeners of an earlier process whose pods are not found yet.
    adopted: HashMap<EndpointKey, sockets::Listeners>,
    /// Listeners of an earlier process that are served once the state is published.
    to_serve: Vec<ListenerCommand>,
    discovery: Discovery,
    applied: Tables,
    numbers: Numbers,
    memory: Memory,
    inherited: BTreeMap<u64, Mode>,
    full: BTreeSet<&'static str>,
    closed: BTreeSet<u64>,
    listeners: HashMap<EndpointKey, Listeners>,
    announced: BTreeMap<PodUid, Arc<str>>,
    announce_failed: Option<String>,
    probes: ProbeCgroups,
    workloads_level: u32,
    started: Instant,
    first_missed: HashMap<PodUid, Instant>,
    /// Some pods' listeners are left for the next turn.
    more_to_open: bool,
    planned: Option<u64>,
    last_state: Option<NodeState>,
    due: Option<Instant>,
    last_heartbeat: Option<Instant>,
    last_sweep: Option<Instant>,
    last_count: Option<Instant>,
    fill: Vec<MapFill>,
    plaintext: BTreeMap<Arc<str>, u64>,
    failures: Vec<Problem>,
    released: Follower,
    /// What the configuration and the cluster said last of enforcement, releases aside.
    said_enforcement: u8,
}

impl Reconciler {
    fn start(deps: Deps) -> Result<Self, ReconcileError> {
        let programs = &deps.programs;
        let discovery = Discovery::new(
            programs.hierarchy().clone(),
            programs.workloads().clone(),
            deps.opener.clone(),
        )
        .map_err(ReconcileError::Discovery)?;
        let workloads_level = programs.workloads_level();
        let mut released = Follower::new(deps.config.borrow().state_dir.clone());
        released.poll();
        let start = deps.start;
        let mut task = Self {
            deps,
            role: Role::Waiting,
            adopted: HashMap::new(),
            to_serve: Vec::new(),
            discovery,
            applied: Tables::default(),
            numbers: Numbers::new(Identities::from_rows(&[])),
            memory: Memory::new(),
            inherited: BTreeMap::new(),
            full: BTreeSet::new(),
            closed: BTreeSet::new(),
            listeners: HashMap::new(),
            announced: BTreeMap::new(),
            announce_failed: None,
            probes: ProbeCgroups::default(),
            workloads_level,
            started: Instant::now(),
            first_missed: HashMap::new(),
            more_to_open: false,
            planned: None,
            last_state: None,
            due: None,
            last_heartbeat: None,
            last_sweep: None,
            last_count: None,
            fill: Vec::new(),
            plaintext: BTreeMap::new(),
            failures: Vec::new(),
            released,
            said_enforcement: enforcement::ENFORCE,
        };
        task.find_probes();
        if start == Start::AtOnce {
            task.inherit(None)?;
        }
        Ok(task)
    }

    /// One turn; `changed` when the world, the configuration or an SVID did.
    async fn turn(&mut self, changed: bool) -> Result<(), ReconcileError> {
        let now = Instant::now();
        let world = self.deps.world.borrow_and_update().clone();
        let config = self.deps.config.borrow_and_update().clone();
        // Until the first complete list, what is pinned stays as it is.
        if !world.synced.pods {
            return Ok(());
        }
        let (params, released) = self.params(&world, &config);
        let pods = own_pods(&world, &params);
        let mut changed = changed | released | self.discovery.poll(&pods, now).await;
        changed |= self.follow_workloads();
        self.note_missing(now);
        changed |= self.drop_listeners_of_the_gone()?;
        changed |= self.adopt_listeners(now);
        changed |= self.open_listeners(&world, &params, config.limits.backlog, now).await?;
        changed |= self.sweep(now).await;
        changed |= self.due.is_some_and(|due| due <= now);
        changed |= self.planned != Some(world.revision);
        if changed {
            self.apply(&world, &params, now).await?;
        }
        self.beat(now);
        if !self.more_to_open && self.planned == Some(world.revision) {
            self.deps.pulse.settle();
        }
        Ok(())
    }

    /// What a plan depends on besides the world, and whether releases have changed.
    fn params(&mut self, world: &World, config: &AgentConfig) -> (Params, bool) {
        let mut params = params(config, &self.deps.programs, self.workloads_level);
        let released = self.released.poll();
        self.said_enforcement = match world.enforcement {
            Override::Absent => params.config.enforcement,
            Override::Is(word) => word.number(),
            // What is pinned, also from before this process.
            Override::Unreadable => self.said_enforcement,
        };
        params.config.enforcement = match self.released.current().node {
            Some(_) => enforcement::OFF,
            None => self.said_enforcement,
        };
        params.released = self.released.current().pod_names();
        (params, released)
    }

    /// Plans and applies.
    async fn apply(
        &mut self,
        world: &Arc<World>,
        params: &Params,
        now: Instant,
    ) -> Result<(), ReconcileError> {
        self.due = None;
        let observed = self.observed(world, params);
        let mut plan = self.plan(world, params, &observed, now);
        self.failures.clear();
        if !self.write_identities() {
            // No map may hold a number whose name is not pinned: nothing is applied.
            self.due = Some(now + RETRY);
            return Ok(());
        }
        plan.keep.extend(self.still_there(&observed, &plan));
        plan.tables.keep(&self.applied, &plan.keep);
        // Over maps that are being filled they would decide too early.
        let swaps = self.deps.programs.is_waiting();
        if !swaps {
            self.attach_lookups(&plan);
            self.attach_guards(&plan);
        }

        let before_policies = self.applied.policies.clone();
        let before_addresses = self.applied.addresses.clone();
        let between = plan.tables.without_new_rights(&self.applied);
        let mut outcome = apply::apply(&mut self.deps.maps, &mut self.applied, &between);
        plan.state.problems.append(&mut self.failures.clone());
        self.publish(&plan);
        let given = apply::apply(&mut self.deps.maps, &mut self.applied, &plan.tables);
        outcome.full.extend(given.full);
        outcome.closed.extend(given.closed);
        outcome.failures.extend(given.failures);

        if swaps && outcome.failures.is_empty() {
            self.swap_in(&plan).await;
        }
        if !self.deps.programs.is_waiting() {
            self.serve_adopted()?;
        }
        self.deps.svids.want(plan.svids.clone());
        self.announce(&plan);
        self.stop_listeners(&plan)?;
        self.detach_lookups(&plan);
        self.detach_guards(&plan);
        for key in self.close_flows(&plan, &before_policies, &before_addresses).await {
            // As if it were not registered yet: the next plan closes them again.
            plan.memory.remove(&key);
        }
        self.forget_identities(&plan, now);

        self.memory = std::mem::take(&mut plan.memory);
        for endpoint in plan.state.endpoints.keys() {
            self.inherited.remove(endpoint);
        }
        self.planned = Some(world.revision);
        self.schedule(&plan, outcome, now);
        self.last_state = Some(plan.state);
        self.report();
        Ok(())
    }

    fn plan(
        &mut self,
        world: &Arc<World>,
        params: &Params,
        observed: &Observed,
        now: Instant,
    ) -> Plan {
        let input = Input {
            world,
            observed,
            params,
            memory: &self.memory,
            inherited: &self.inherited,
            full: &self.full,
            closed: &self.closed,
            now: now.duration_since(self.started),
        };
        plan::plan(&input, &mut self.numbers)
    }

    /// When to plan again without anything happening.
    fn schedule(&mut self, plan: &Plan, outcome: apply::Outcome, now: Instant) {
        for error in &outcome.failures {
            self.fail("kernel maps", error);
        }
        let refitted = outcome.full != self.full || outcome.closed != self.closed;
        self.full = outcome.full;
        self.closed = outcome.closed;
        let mut due = plan.wake.map(|wake| self.started + wake);
        let mut at_most = |limit: Instant| due = Some(due.map_or(limit, |due| due.min(limit)));
        if refitted {
            at_most(now);
        }
        let unhappy = !self.full.is_empty() || !self.closed.is_empty();
        if unhappy || !self.failures.is_empty() || self.announce_failed.is_some() {
            at_most(now + RETRY);
        }
        self.due = due;
    }

    fn fail(&mut self, subject: &str, error: &dyn std::error::Error) {
        let mut message = error.to_string();
        let mut source = error.source();
        while let Some(cause) = source {
            message = format!("{message}: {cause}");
            source = cause.source();
        }
        let problem = Problem { subject: subject.to_owned(), message };
        if !self.failures.contains(&problem) {
            tracing::error!(subject, message = %problem.message, "failed; trying again");
            self.failures.push(problem);
        }
    }

    fn publish(&mut self, plan: &Plan) {
        self.deps.state.publish(plan.state.clone());
    }

    fn observed(&self, world: &World, params: &Params) -> Observed {
        let pods = self.discovery.found().iter().map(|(uid, found)| {
            let key = EndpointKey { uid: uid.clone(), netns: found.netns.cookie };
            let (listeners, listeners_failed) = match self.listeners.get(&key) {
                Some(Listeners::Handed(kept)) => (Some(kept.ports), None),
                Some(Listeners::Failed(why, _)) => (None, Some(why.clone())),
                None => (None, None),
            };
            let observed = ObservedPod {
                cgroup: found.cgroup.id,
                cgroup_path: found.cgroup.name.to_string_lossy().into(),
                addresses: found.addresses.clone(),
                link_local: found.link_local.clone(),
                host_ends: found.host_ends.clone(),
                listeners,
                listeners_failed,
                open_flows: (self.deps.open_flows)(&key),
                since: found.since,
                key,
            };
            (uid.clone(), observed)
        });
        let svids = own_pods(world, params)
            .iter()
            .filter_map(|pod| identity_of(world, pod))
            .filter(|id| self.deps.svids.get(id).is_some())
            .collect();
        Observed {
            pods: pods.collect(),
            missing: self.discovery.missing().clone(),
            probes: self.probes.cgroups.iter().map(|c| c.id).collect(),
            svids,
        }
    }

    /// Pods of an earlier process that are there and were not found this time: they stay
    /// closed, as they are.
    fn still_there(&self, observed: &Observed, plan: &Plan) -> BTreeSet<u64> {
        if self.inherited.is_empty() || observed.missing.is_empty() {
            return BTreeSet::new();
        }
        let live = self.discovery.pod_directories();
        self.applied
            .pods
            .iter()
            .filter(|(netns, entry)| {
                self.inherited.contains_key(netns)
                    && !plan.state.endpoints.contains_key(netns)
                    && live.contains(&entry.cgroup)
            })
            .map(|(netns, _)| *netns)
            .collect()
    }

    fn note_missing(&mut self, now: Instant) {
        let missing = self.discovery.missing();
        self.first_missed.retain(|uid, _| missing.contains_key(uid));
        for uid in missing.keys() {
            self.first_missed.entry(uid.clone()).or_insert(now);
        }
    }

    /// True while some pod has been looked for, and not for long, or waits for its turn.
    fn is_impatient(&self) -> bool {
        let now = Instant::now();
        self.more_to_open
            || self.first_missed.values().any(|since| now.duration_since(*since) < IMPATIENCE)
    }

    // ---- identities

    /// Pins the names of new numbers; false when one could not be.
    fn write_identities(&mut self) -> bool {
        for (number, row) in self.numbers.identities.unwritten() {
            match self.deps.maps.identities.set(number, row) {
                Ok(()) => self.numbers.identities.written(number),
                Err(error) => {
                    self.fail("identities", &error);
                    return false;
                }
            }
        }
        true
    }

    fn forget_identities(&mut self, plan: &Plan, now: Instant) {
        let now = now.duration_since(self.started);
        let Some((next, old)) = self.numbers.identities.forget(&plan.identities, now) else {
            return;
        };
        if let Err(error) = self.deps.maps.identities.set(NEXT_ROW, next) {
            // Without it the highest number could be given away again after a restart.
            self.fail("identities", &error);
            return;
        }
        for number in old {
            if let Err(error) = self.deps.maps.identities.remove(&number) {
                self.fail("identities", &error);
            }
        }
    }

    // ---- announcing

    fn announce(&mut self, plan: &Plan) {
        if plan.announce == self.announced && self.announce_failed.is_none() {
            return;
        }
        match (self.deps.announce)(Some(&plan.announce), plan.state.revision) {
            Ok(()) => {
                self.announced.clone_from(&plan.announce);
                self.announce_failed = None;
            }
            Err(error) => {
                tracing::error!(%error, "announcing served pods failed; trying again");
                self.announce_failed = Some(error);
            }
        }
    }

    fn unannounce(&mut self) {
        let revision = self.planned.unwrap_or(0);
        if let Err(error) = (self.deps.announce)(Some(&BTreeMap::new()), revision) {
            tracing::error!(%error, "un-announcing this node's pods failed");
        }
    }
}

/// The configuration as the plan needs it.
fn params(config: &AgentConfig, programs: &Programs, workloads_level: u32) -> Params {
    Params {
        node: config.node.as_str().into(),
        config: Config {
            host_netns: programs.host_netns(),
            events_per_second: config.events_per_second,
            workloads_level,
            unknown_pods: config.unknown_pods.number(),
            enforcement: config.enforcement.number(),
            deny_when_dead: u8::from(
                config.when_agent_dead == crate::config::values::WhenAgentDead::Deny,
            ),
            ..Config::default()
        },
        deny_other: config.other_protocols == crate::config::values::OtherProtocols::Deny,
        raw_guard: config.raw_guard.then(|| programs.guard_kind()),
        guard_ahead: !programs.features().has(crate::kernel::features::Feature::Tcx),
        // The agent's own home is never closed against it.
        never_deny: config
            .never_deny
            .iter()
            .chain(&config.namespace)
            .map(|name| name.as_str().into())
            .collect(),
        released: BTreeSet::new(),
        builtins: Builtins {
            in_force: config.builtins.clone(),
            resolvers: config.dns_resolvers.clone(),
        },
        unenrol_grace: config.unenrol_grace,
        strict_grace: config.strict_grace,
    }
}

/// The pods that should be endpoints here.
fn own_pods(world: &World, params: &Params) -> Vec<Arc<Pod>> {
    let mut pods: Vec<Arc<Pod>> = world
        .pods
        .values()
        .filter(|pod| plan::wanted_mode(pod, params).is_some())
        .cloned()
        .collect();
    // The same order every time: what is short is given to the same ones.
    pods.sort_by(|a, b| a.uid.cmp(&b.uid));
    pods
}

fn identity_of(world: &World, pod: &Pod) -> Option<SpiffeId> {
    SpiffeId::for_service_account(&world.trust_domain, &pod.name.namespace, &pod.service_account)
        .ok()
}

#[cfg(test)]
mod tests;
