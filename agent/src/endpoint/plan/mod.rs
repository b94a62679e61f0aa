//! From the world and what was found on the node to what is to be applied: pure.

mod addresses;
mod node_wide;
mod policies;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, hash_map::Entry},
    net::IpAddr,
    sync::Arc,
    time::Duration,
};

use signet_ebpf::abi::{
    Config, ExemptKey, Ip, Mode, OwnAddressKey, PodEntry, PodName, enforcement, pod,
};

use self::policies::CompiledFrom;
use super::{
    identities::{Identities, PolicyNumbers},
    phase::{Conditions, Phase},
    sockets::OutboundPorts,
    state::{EndpointKey, EndpointState, NodeState, Waiting},
    tables::Tables,
};
use crate::{
    cluster::{
        builtins::Builtins,
        model::{ExemptPort, ObjectName, Pod, PodUid, Problem, World},
    },
    policy::{compile::PolicyEntry, model::Policy, request::asks_requests},
    spiffe::SpiffeId,
};

/// What a plan depends on besides the world and the node's pods.
#[derive(Clone, Debug, PartialEq)]
pub struct Params {
    /// This node's name.
    pub node: Arc<str>,
    /// What never changes while the agent runs, and the live keys of the configuration; the
    /// revision, the ranges and whether something is enforced are filled in.
    pub config: Config,
    /// Protocols besides TCP and UDP are refused.
    pub deny_other: bool,
    /// How raw guards are attached; `None`: not at all.
    pub raw_guard: Option<&'static str>,
    /// Attaching one takes the link down for an instant, and packets with it (clsact): it is
    /// attached while a pod is only observed, not when it becomes enforced.
    pub guard_ahead: bool,
    /// Namespaces whose pods are never refused anything.
    pub never_deny: BTreeSet<Arc<str>>,
    /// Pods (`namespace/name`) that an operator has released: left alone whatever they ask for.
    pub released: BTreeSet<Arc<str>>,
    /// What passes without a policy.
    pub builtins: Builtins,
    /// How long an un-enrolled pod may go on serving.
    pub unenrol_grace: Duration,
    /// How long plaintext flows of a pod that turned strict may go on.
    pub strict_grace: Duration,
}

/// A pod of this node whose cgroup, network namespace and addresses were found.
#[derive(Clone, Debug, PartialEq)]
pub struct ObservedPod {
    /// Its key.
    pub key: EndpointKey,
    /// The pod directory's cgroup id.
    pub cgroup: u64,
    /// The pod directory's path below the cgroup2 mount.
    pub cgroup_path: Arc<str>,
    /// Addresses of global scope in its network namespace; not empty.
    pub addresses: Vec<IpAddr>,
    /// Addresses of link scope.
    pub link_local: Vec<IpAddr>,
    /// The node's ends of its links: interface numbers.
    pub host_ends: Vec<u32>,
    /// Its outbound listeners, once they are handed over.
    pub listeners: Option<OutboundPorts>,
    /// Why its listeners could not be opened.
    pub listeners_failed: Option<Arc<str>>,
    /// Flows that the data plane has open for it.
    pub open_flows: usize,
    /// When it was found.
    pub since: jiff::Timestamp,
}

/// What was found on the node.
#[derive(Clone, Debug, Default)]
pub struct Observed {
    /// By uid.
    pub pods: BTreeMap<PodUid, ObservedPod>,
    /// Pods that were looked for and not found, with what is missing.
    pub missing: BTreeMap<PodUid, String>,
    /// Cgroups whose flows are attested as probes.
    pub probes: Vec<u64>,
    /// Identities that have an SVID.
    pub svids: BTreeSet<SpiffeId>,
}

/// What is remembered of an endpoint from one turn to the next.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Remembered {
    /// Where it is.
    pub phase: Phase,
    /// The mode that the kernel has for it.
    pub mode: Mode,
    /// When it turned from a looser mode to strict, until its plaintext flows are closed.
    pub strict_since: Option<Duration>,
}

/// What is remembered of all endpoints.
pub type Memory = HashMap<EndpointKey, Remembered>;

/// What goes into a plan.
pub struct Input<'a> {
    /// The world.
    pub world: &'a Arc<World>,
    /// The node.
    pub observed: &'a Observed,
    /// The rest.
    pub params: &'a Params,
    /// The last plan's memory.
    pub memory: &'a Memory,
    /// Namespaces that an earlier process registered, with their modes then.
    pub inherited: &'a BTreeMap<u64, Mode>,
    /// Maps that were full when they were written last.
    pub full: &'a BTreeSet<&'static str>,
    /// Pods whose own rows did not fit when they were written last.
    pub closed: &'a BTreeSet<u64>,
    /// Monotonic time.
    pub now: Duration,
}

/// What is to be applied.
#[derive(Debug)]
pub struct Plan {
    /// The kernel's tables.
    pub tables: Tables,
    /// Network namespaces whose rows stay as they are.
    pub keep: BTreeSet<u64>,
    /// What readers see.
    pub state: NodeState,
    /// For the next plan.
    pub memory: Memory,
    /// Identities that need an SVID.
    pub svids: BTreeSet<SpiffeId>,
    /// Endpoints that need listeners.
    pub listeners: BTreeSet<u64>,
    /// Endpoints that need an sk_lookup program.
    pub lookups: BTreeSet<u64>,
    /// Links that get a guard ahead of time; without a row it passes everything.
    pub guard_ahead: BTreeSet<u32>,
    /// Pods to announce as served: uid → name.
    pub announce: BTreeMap<PodUid, Arc<str>>,
    /// Endpoints that are enforced from their first registration on: sockets that they made
    /// before are destroyed.
    pub close_all: BTreeSet<u64>,
    /// Endpoints whose plaintext flows' grace is over.
    pub close_plaintext: BTreeSet<u64>,
    /// Numbers of identities that some table holds.
    pub identities: BTreeSet<u32>,
    /// When to plan again though nothing happens.
    pub wake: Option<Duration>,
}

/// Numbers, and compiled policies that need not be compiled again.
#[derive(Debug)]
pub struct Numbers {
    /// Of identities.
    pub identities: Identities,
    /// Of policies.
    pub policies: PolicyNumbers,
    compiled: HashMap<u64, (CompiledFrom, Arc<Vec<PolicyEntry>>)>,
}

impl Numbers {
    /// Starts from the pinned identities.
    pub fn new(identities: Identities) -> Self {
        Self { identities, policies: PolicyNumbers::default(), compiled: HashMap::new() }
    }
}

/// Namespaces without which a cluster does not start: never refused anything.
const SYSTEM_NAMESPACES: [&str; 1] = ["kube-system"];

/// The mode that a pod is to get: what it asks for, as far as it can be and may be enforced.
/// `None` for pods that are no endpoints: in the host's network, finished, elsewhere.
pub fn wanted_mode(pod: &Pod, params: &Params) -> Option<Mode> {
    let here = pod.node.as_ref() == Some(&params.node);
    if !here || pod.host_network || pod.finished {
        return None;
    }
    if is_released(pod, params) {
        return Some(Mode::Off);
    }
    Some(capped(pod, &params.never_deny))
}

fn is_released(pod: &Pod, params: &Params) -> bool {
    !params.released.is_empty() && params.released.contains(&name_of(&pod.name))
}

/// The mode of any pod, not more than observe where enforcing is impossible or forbidden.
pub fn capped(pod: &Pod, never_deny: &BTreeSet<Arc<str>>) -> Mode {
    let spared = pod.unenforceable.is_some() || is_spared(&pod.name.namespace, never_deny);
    if spared { pod.mode.min(Mode::Observe) } else { pod.mode }
}

fn is_spared(namespace: &Arc<str>, never_deny: &BTreeSet<Arc<str>>) -> bool {
    never_deny.contains(namespace) || SYSTEM_NAMESPACES.contains(&&**namespace)
}

/// Makes the plan.
pub fn plan(input: &Input<'_>, numbers: &mut Numbers) -> Plan {
    let mut planner = Planner::new(input);
    numbers.policies.update(&input.world.policies, &planner.builtins);
    planner.node_wide();
    planner.endpoints(numbers);
    planner.addresses(numbers);
    planner.policies(numbers);
    planner.finish(numbers)
}

struct Planner<'a> {
    input: &'a Input<'a>,
    builtins: Vec<Arc<Policy>>,
    /// Pods' ports that the API server calls, by address.
    called: HashMap<IpAddr, Vec<ExemptPort>>,
    tables: Tables,
    keep: BTreeSet<u64>,
    memory: Memory,
    endpoints: HashMap<u64, EndpointState>,
    phases: HashMap<u64, Phase>,
    waiting: Vec<Waiting>,
    problems: Vec<Problem>,
    svids: BTreeSet<SpiffeId>,
    ids: HashMap<(Arc<str>, Arc<str>), Option<(SpiffeId, u32)>>,
    identities: BTreeSet<u32>,
    close_all: BTreeSet<u64>,
    close_plaintext: BTreeSet<u64>,
    guard_ahead: BTreeSet<u32>,
    wake: Option<Duration>,
}

impl<'a> Planner<'a> {
    fn new(input: &'a Input<'a>) -> Self {
        Self {
            input,
            builtins: input.params.builtins.policies(input.world),
            called: input.params.builtins.called(input.world),
            tables: Tables::default(),
            keep: BTreeSet::new(),
            memory: Memory::new(),
            endpoints: HashMap::new(),
            phases: HashMap::new(),
            waiting: Vec::new(),
            problems: Vec::new(),
            svids: BTreeSet::new(),
            ids: HashMap::new(),
            identities: BTreeSet::new(),
            close_all: BTreeSet::new(),
            close_plaintext: BTreeSet::new(),
            guard_ahead: BTreeSet::new(),
            wake: None,
        }
    }

    fn is_enrolled(&self, pod: &Pod) -> bool {
        pod.is_enrollable() && capped(pod, &self.input.params.never_deny).is_enforced()
    }

    /// This node's pods, each on its way.
    fn endpoints(&mut self, numbers: &mut Numbers) {
        let world = self.input.world;
        let mut pods: Vec<&Arc<Pod>> = world.pods.values().collect();
        pods.sort_by(|a, b| a.name.cmp(&b.name).then_with(|| a.uid.cmp(&b.uid)));
        for pod in pods {
            let Some(wanted) = wanted_mode(pod, self.input.params) else { continue };
            // What is released is told by the record.
            if wanted != pod.mode && !is_released(pod, self.input.params) {
                self.explain_cap(pod);
            }
            match self.input.observed.pods.get(&pod.uid) {
                Some(found) => self.endpoint(pod, found, wanted, numbers),
                None => {
                    let reason = self.input.observed.missing.get(&pod.uid).cloned();
                    let reason = reason.unwrap_or_else(|| "not looked for yet".into());
                    self.waiting.push(Waiting { pod: pod.clone(), reason });
                }
            }
        }
    }

    /// What cannot be enforced is shown with its pod; what may not be is told here.
    fn explain_cap(&mut self, pod: &Pod) {
        if pod.unenforceable.is_none() {
            self.problems.push(Problem {
                subject: subject(&pod.name),
                message: format!(
                    "its mode is not enforced: pods of the namespace {} never are (kube-system, \
                     neverDeny); it is observed",
                    pod.name.namespace
                ),
            });
        }
    }

    fn endpoint(
        &mut self,
        pod: &Arc<Pod>,
        found: &ObservedPod,
        wanted: Mode,
        numbers: &mut Numbers,
    ) {
        let netns = found.key.netns;
        let known = self.input.memory.get(&found.key).copied();
        if wanted.is_enforced() && !self.input.world.synced.policies && known.is_none() {
            // Nothing enforced is registered anew, and what is pinned stays.
            self.keep.insert(netns);
            self.wait(pod, "its policies have not been read yet".into());
            return;
        }
        let before = known.or_else(|| self.inherited(netns));
        let Some((id, number)) = self.identity(pod, numbers) else {
            self.keep.insert(netns);
            self.wait(pod, "its SPIFFE ID does not fit: shorten trust domain, namespace or service account, or make room in the table of identities".into());
            return;
        };
        let has_svid = self.input.observed.svids.contains(&id);
        let conditions = Conditions {
            wanted,
            ready: has_svid && found.listeners.is_some(),
            open_flows: found.open_flows,
            now: self.input.now,
            unenrol_grace: self.input.params.unenrol_grace,
        };
        let phase = Phase::next(before.map(|b| b.phase), &conditions);
        let mode = phase.mode(wanted);
        self.remember(found, before, phase, mode);
        if phase.needs_listeners() {
            self.svids.insert(id.clone());
        }
        if wanted.is_enforced() && !phase.is_ready() {
            let missing = match (&found.listeners_failed, found.listeners, has_svid) {
                (Some(error), ..) => format!("its listeners cannot be opened: {error}"),
                (None, None, _) => "its listeners are being opened".into(),
                (None, Some(_), false) => "no SVID has been issued for it yet".to_string(),
                (None, Some(_), true) => "it is being made ready".into(),
            };
            let meanwhile = if mode.is_enforced() { "closed" } else { "not enforced" };
            self.wait(pod, format!("{missing}; {meanwhile} meanwhile"));
        }
        let ports = found.listeners.unwrap_or_default();
        let namespace = self.input.world.namespaces.get(&pod.name.namespace);
        let judged = phase.is_judged() && mode != Mode::Off;
        let (mut policies, mut tokens) = (Vec::new(), Vec::new());
        if judged {
            policies = self.input.world.policies_of(pod);
            policies.extend(self.builtins.iter().cloned());
            tokens = self.input.world.request_authentications_of(pod);
        }
        let asks_requests = asks_requests(&policies) || !tokens.is_empty();
        self.own_rows(pod, found, netns, mode, phase, number, ports, asks_requests);
        let raw_guard = self.guard(pod, found, mode);
        if judged {
            let called = pod.ips.iter().filter_map(|ip| self.called.get(&ip.to_canonical()));
            for exempt in pod.exempt_ports.iter().chain(called.flatten()) {
                let key =
                    ExemptKey { netns, port: exempt.port, protocol: exempt.protocol, pad: [0; 5] };
                self.tables.exempt.insert(key, 1);
            }
        }
        self.phases.insert(netns, phase);
        self.endpoints.insert(
            netns,
            EndpointState {
                key: found.key.clone(),
                pod: pod.clone(),
                identity: id,
                identity_number: number,
                mode,
                addresses: found.addresses.clone(),
                cgroup_path: found.cgroup_path.clone(),
                cgroup: found.cgroup,
                judged: asks_requests,
                policies: policies.into(),
                request_authentications: tokens.into(),
                raw_guard,
                default_deny: judged && namespace.is_some_and(|n| n.default_deny),
                listener4: ports.v4,
                listener6: (ports.v6, ports.v6_count()),
                served: phase.is_served(),
                // Known when its row is made.
                closed: false,
                since: found.since,
            },
        );
    }

    /// The raw guard of an enforced pod: on every link that leads to it, or none, and said.
    fn guard(&mut self, pod: &Pod, found: &ObservedPod, mode: Mode) -> Option<&'static str> {
        let kind = self.input.params.raw_guard?;
        if !mode.is_enforced() {
            if self.input.params.guard_ahead && mode == Mode::Observe {
                self.guard_ahead.extend(&found.host_ends);
            }
            return None;
        }
        if found.host_ends.is_empty() {
            self.problems.push(Problem {
                subject: subject(&pod.name),
                message: "raw-guard: none: no veth of the node leads to it, so a packet socket \
                          in it is not stopped here; drop NET_RAW from its containers, and set \
                          rawGuard to false to accept that"
                    .into(),
            });
            return None;
        }
        let netns = found.key.netns;
        self.tables.guarded.extend(found.host_ends.iter().map(|interface| (*interface, netns)));
        self.tables.config.guarding = 1;
        Some(kind)
    }

    /// What the last process left in the kernel: enforced pods are closed until their
    /// listeners are up again, others go on as they are.
    fn inherited(&self, netns: u64) -> Option<Remembered> {
        let mode = *self.input.inherited.get(&netns)?;
        let phase = if mode.is_enforced() {
            Phase::Preparing { since: self.input.now, held: None }
        } else {
            Phase::Plain { mode }
        };
        Some(Remembered { phase, mode, strict_since: None })
    }

    /// The endpoint's memory and timers.
    fn remember(
        &mut self,
        found: &ObservedPod,
        before: Option<Remembered>,
        phase: Phase,
        mode: Mode,
    ) {
        let netns = found.key.netns;
        let now = self.input.now;
        // While enforcement is overridden nothing is closed, and once it is back a strict pod
        // turns strict anew: its plaintext flows have their grace.
        let overridden = self.input.params.config.enforcement != enforcement::ENFORCE;
        let mode = if overridden { mode.min(Mode::Observe) } else { mode };
        if before.is_none() && mode.is_enforced() {
            self.close_all.insert(netns);
        }
        let mut strict_since = match before {
            Some(before) if mode == Mode::Strict && before.mode != Mode::Strict => Some(now),
            Some(before) if mode == Mode::Strict => before.strict_since,
            _ => None,
        };
        if let Some(since) = strict_since {
            let due = since + self.input.params.strict_grace;
            if now >= due {
                self.close_plaintext.insert(netns);
                strict_since = None;
            } else {
                self.wake_at(due);
            }
        }
        if let Some(due) = phase.due(self.input.params.unenrol_grace) {
            self.wake_at(due);
        }
        if matches!(phase, Phase::Leaving { .. }) {
            // Its flows end without telling.
            self.wake_at(now + Duration::from_secs(1));
        }
        self.memory.insert(found.key.clone(), Remembered { phase, mode, strict_since });
    }

    #[allow(clippy::too_many_arguments, reason = "one row is made of all of them")]
    fn own_rows(
        &mut self,
        pod: &Arc<Pod>,
        found: &ObservedPod,
        netns: u64,
        mode: Mode,
        phase: Phase,
        number: u32,
        ports: OutboundPorts,
        asks_requests: bool,
    ) {
        let first = |v4: bool| {
            let ip = found.addresses.iter().find(|ip| ip.is_ipv4() == v4);
            ip.map_or(Ip::UNSPECIFIED, |ip| Ip::from_std(*ip))
        };
        let mut flags = 0;
        if phase.is_ready() {
            flags |= pod::READY;
        }
        if self.input.params.deny_other {
            flags |= pod::DENY_OTHER;
        }
        if asks_requests {
            flags |= pod::JUDGED;
        }
        let closed = self.input.closed.contains(&netns)
            || (mode.is_enforced() && !self.input.full.is_empty());
        if closed {
            flags |= pod::CLOSED;
            if self.input.closed.contains(&netns) {
                self.problems.push(Problem {
                    subject: subject(&pod.name),
                    message: "its rows or policies do not fit a BPF map, so it is closed: use \
                              fewer ports, ranges or identities in its policies"
                        .into(),
                });
            }
        }
        let entry = PodEntry {
            ip4: first(true),
            ip6: first(false),
            cgroup: found.cgroup,
            revision: self.input.world.revision,
            identity: number,
            listener4: ports.v4,
            listener6: ports.v6,
            listener6_count: ports.v6_count(),
            mode: mode as u8,
            flags,
            pad: 0,
        };
        self.tables.pods.insert(netns, entry);
        self.tables.names.extend(PodName::new(&name_of(&pod.name)).map(|name| (netns, name)));
        self.tables.cgroups.insert(found.cgroup, netns);
        // A pod may put any address on its interface: another pod's is not its own.
        let own: Vec<IpAddr> =
            found.addresses.iter().copied().filter(|ip| self.may_have(*ip, pod)).collect();
        for ip in own.iter().chain(&found.link_local) {
            self.tables.own.insert(OwnAddressKey { netns, ip: Ip::from_std(*ip) }, 1);
        }
    }

    fn wait(&mut self, pod: &Arc<Pod>, reason: String) {
        self.waiting.push(Waiting { pod: pod.clone(), reason });
    }

    fn wake_at(&mut self, due: Duration) {
        self.wake = Some(self.wake.map_or(due, |wake| wake.min(due)));
    }

    /// A pod's identity and its number.
    fn identity(&mut self, pod: &Pod, numbers: &mut Numbers) -> Option<(SpiffeId, u32)> {
        let key = (pod.name.namespace.clone(), pod.service_account.clone());
        match self.ids.entry(key) {
            Entry::Occupied(known) => known.get().clone(),
            Entry::Vacant(slot) => {
                let domain = &self.input.world.trust_domain;
                let id = SpiffeId::for_service_account(
                    domain,
                    &pod.name.namespace,
                    &pod.service_account,
                );
                let found = id.ok().and_then(|id| {
                    let number = numbers.identities.number(&id)?;
                    Some((id, number))
                });
                if let Some((_, number)) = &found {
                    self.identities.insert(*number);
                }
                slot.insert(found).clone()
            }
        }
    }

    fn finish(mut self, numbers: &Numbers) -> Plan {
        let strict = self.endpoints.values().any(|e| e.mode == Mode::Strict);
        if strict && self.input.world.ranges.is_unknown() {
            self.problems.push(Problem {
                subject: "podRanges".into(),
                message: "no pod range of the cluster is known, so strict pods reach no address \
                          that is not a known pod's or service's: give podRanges and \
                          serviceRanges (configuration or ranges.yaml)"
                    .into(),
            });
        }
        let world = self.with_local_addresses();
        let listeners =
            self.phases.iter().filter(|(_, p)| p.needs_listeners()).map(|(n, _)| *n).collect();
        let lookups = self
            .endpoints
            .iter()
            .filter(|(_, e)| e.mode != Mode::Off)
            .map(|(netns, _)| *netns)
            .collect();
        let announce = self
            .endpoints
            .values()
            .filter(|e| e.served)
            .map(|e| (e.key.uid.clone(), name_of(&e.pod.name)))
            .collect();
        let state = NodeState {
            revision: world.revision,
            node: self.input.params.node.clone(),
            enforcement: self.input.params.config.enforcement,
            never_deny: self.input.params.never_deny.clone(),
            builtins: self.input.params.builtins.clone(),
            world,
            endpoints: self
                .endpoints
                .into_iter()
                .map(|(netns, endpoint)| {
                    let row = self.tables.pods.get(&netns);
                    let closed = row.is_some_and(|row| row.flags & pod::CLOSED != 0);
                    (netns, Arc::new(EndpointState { closed, ..endpoint }))
                })
                .collect(),
            waiting: self.waiting,
            problems: self.problems,
            identities: numbers.identities.names(),
            policies: numbers.policies.policies(),
        };
        Plan {
            tables: self.tables,
            keep: self.keep,
            state,
            memory: self.memory,
            svids: self.svids,
            listeners,
            lookups,
            announce,
            close_all: self.close_all,
            close_plaintext: self.close_plaintext,
            guard_ahead: self.guard_ahead,
            identities: self.identities,
            wake: self.wake,
        }
    }
}

fn subject(name: &ObjectName) -> String {
    format!("pod {}/{}", name.namespace, name.name)
}

fn name_of(name: &ObjectName) -> Arc<str> {
    format!("{}/{}", name.namespace, name.name).into()
}

#[cfg(test)]
pub(super) mod tests;
