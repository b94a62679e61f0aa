//! What would become of a flow: the kernel's own verdict ([`signet_ebpf::decide`]) and the
//! proxies' evaluation over a world, explained. Pure.
//!
//! The tables hold two pods only, source and destination, compiled as the reconciler does.

mod question;
mod request;

use std::{
    collections::{BTreeSet, HashMap, HashSet},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    sync::Arc,
};

use signet_ebpf::{
    abi::{
        AddressEntry, Config, Direction, ExemptKey, FIRST_IDENTITY, Ip, Mode, OwnAddressKey,
        PodEntry, Reason, Verdict, address, enforcement, pod, proto, range,
    },
    decide::{Action, Decision, Flow, decide_egress, decide_ingress},
};

use super::{plan, rejudge::Verdicts, state::NodeState, tables::Tables};
use crate::{
    cluster::{
        builtins::Builtins,
        model::{ExemptPort, ObjectName, Pod, World},
    },
    policy::{
        compile::{CompileInput, compile},
        evaluate::{FlowFacts, PeerIdentity},
        explain::{Explanation, explain},
        model::{Policy, PolicyName},
        request::asks_requests,
    },
    spiffe::SpiffeId,
};

pub use self::request::AskedRequest;

/// Entries that a pod's policy may have here; the check is of verdicts, not of room.
const MAX_ENTRIES: usize = 1_000_000;
/// The source's network namespace in the tables, and the destination's.
const SOURCE: u64 = 1;
const DESTINATION: u64 = 2;
/// A port that programs dial from.
const EPHEMERAL: u16 = 40_000;

/// Who dials.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct From {
    /// Its identity; `None`: the address says.
    pub identity: Option<SpiffeId>,
    /// Its address; `None`: that of a pod with the identity, if there is one.
    pub address: Option<IpAddr>,
}

/// A flow that may be.
#[derive(Clone, PartialEq, Debug)]
pub struct Question {
    /// Who dials.
    pub from: From,
    /// The pod that is dialled.
    pub to: ObjectName,
    /// Its port (not its Service's).
    pub port: u16,
    /// TCP or UDP.
    pub protocol: u8,
    /// In clear, though it would be tunnelled.
    pub plaintext: bool,
    /// An HTTP request on it.
    pub request: Option<AskedRequest>,
}

/// What is beside the world.
#[derive(Clone, Debug, Default)]
pub struct Setting {
    /// Namespaces whose pods are never refused anything, besides kube-system.
    pub never_deny: BTreeSet<Arc<str>>,
    /// One of [`enforcement`]'s.
    pub enforcement: u8,
    /// What passes without a policy.
    pub builtins: Builtins,
}

impl Setting {
    /// As on a node.
    pub fn of(state: &NodeState) -> Self {
        Self {
            never_deny: state.never_deny.clone(),
            enforcement: state.enforcement,
            builtins: state.builtins.clone(),
        }
    }
}

/// The question cannot be answered.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CheckError {
    /// The destination is not known.
    #[error("no pod {}/{} is known; name one of the cluster's (or give its manifest)", .0.namespace, .0.name)]
    NoPod(ObjectName),
    /// Two pods of the name, or a pod in the node's network.
    #[error("pod {}/{} is in its node's network, where nothing is judged", .0.namespace, .0.name)]
    HostNetwork(ObjectName),
}

/// The answer.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Answer {
    /// FORWARDED, DROPPED or AUDIT.
    pub verdict: Verdict,
    /// Of the side that decides.
    pub reason: Reason,
    /// It would travel in a tunnel.
    pub tunnelled: bool,
    /// The sides that judge it, the source first; the last one decides.
    pub sides: Vec<Side>,
    /// What was assumed.
    pub notes: Vec<String>,
}

impl Answer {
    /// True when the flow would pass.
    pub fn passes(&self) -> bool {
        self.verdict != Verdict::Dropped
    }

    /// The policy that decided.
    pub fn policy(&self) -> Option<&PolicyName> {
        self.sides.last().and_then(|side| side.policy.as_ref())
    }
}

/// What one pod's side makes of the flow.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Side {
    /// As the pod sees it.
    pub direction: Direction,
    /// The pod.
    pub pod: ObjectName,
    /// Its mode in force.
    pub mode: Mode,
    /// FORWARDED, DROPPED or AUDIT.
    pub verdict: Verdict,
    /// Why.
    pub reason: Reason,
    /// The policy that decides or, where the flow passes and is audited, that audits.
    pub policy: Option<PolicyName>,
    /// Why, in one sentence.
    pub sentence: String,
    /// Rule by rule; `None` where no policy was asked.
    pub explanation: Option<Explanation>,
}

/// Answers a question.
///
/// # Errors
///
/// Where the destination is no pod that is judged.
pub fn check(world: &World, setting: &Setting, question: &Question) -> Result<Answer, CheckError> {
    Check::new(world, setting, question)?.answer()
}

struct Check<'a> {
    world: &'a World,
    setting: &'a Setting,
    question: &'a Question,
    to: Arc<Pod>,
    from: Option<Arc<Pod>>,
    from_id: Option<SpiffeId>,
    from_ip: IpAddr,
    to_id: Option<SpiffeId>,
    to_ip: IpAddr,
    /// By number, from [`FIRST_IDENTITY`] on.
    identities: Vec<(u32, SpiffeId)>,
    builtins: Vec<Arc<Policy>>,
    /// Pods' ports that the API server calls, by address.
    called: HashMap<IpAddr, Vec<ExemptPort>>,
    tables: Tables,
    notes: Vec<String>,
}

impl<'a> Check<'a> {
    fn new(
        world: &'a World,
        setting: &'a Setting,
        question: &'a Question,
    ) -> Result<Self, CheckError> {
        let mut notes = Vec::new();
        let newest = |pods: &mut dyn Iterator<Item = &'a Arc<Pod>>| {
            pods.filter(|pod| !pod.finished)
                .max_by_key(|p| (!p.terminating, p.uid.clone()))
                .cloned()
        };
        let to = newest(&mut world.pods.values().filter(|pod| pod.name == question.to))
            .ok_or_else(|| CheckError::NoPod(question.to.clone()))?;
        if to.host_network {
            return Err(CheckError::HostNetwork(question.to.clone()));
        }
        let identity_of = |pod: &Pod| {
            let (space, account) = (&pod.name.namespace, &pod.service_account);
            SpiffeId::for_service_account(&world.trust_domain, space, account).ok()
        };
        let asked = &question.from;
        let from = match asked.address {
            Some(ip) => world.pod_at(ip).cloned(),
            None => {
                let mut of_account = world.pods.values().filter(|pod| {
                    !pod.host_network && identity_of(pod).as_ref() == asked.identity.as_ref()
                });
                newest(&mut of_account).filter(|_| asked.identity.is_some())
            }
        };
        let shown = from.as_ref().and_then(|pod| identity_of(pod));
        let from_id = asked.identity.clone().or(shown.clone());
        // Whom the address belongs to is not who is asked about: it is no pod's then.
        let from = from.filter(|_| shown == from_id);
        if from.is_none() && asked.identity.is_some() && asked.address.is_none() {
            notes.push(
                "no pod has that identity: its address is taken to be none of any rule's; give \
                 @ADDRESS for rules on addresses"
                    .into(),
            );
        }
        let v6 = |pod: &Pod| !pod.ips.is_empty() && pod.ips.iter().all(IpAddr::is_ipv6);
        let is_v6 = match asked.address {
            Some(ip) => ip.is_ipv6(),
            None => v6(&to) || from.as_ref().is_some_and(|pod| v6(pod)),
        };
        let nowhere = |host: u8| match is_v6 {
            // Documentation's ranges (RFC 5737, RFC 3849).
            true => IpAddr::from(Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, host.into())),
            false => IpAddr::from(Ipv4Addr::new(192, 0, 2, host)),
        };
        let address = |pod: &Pod| pod.ips.iter().copied().find(|ip| ip.is_ipv6() == is_v6);
        let from_ip =
            asked.address.or_else(|| from.as_deref().and_then(address)).unwrap_or(nowhere(1));
        let to_ip = address(&to).unwrap_or(nowhere(2));
        let to_id = identity_of(&to);
        let mut identities: Vec<SpiffeId> = from_id.iter().chain(&to_id).cloned().collect();
        identities.sort();
        identities.dedup();
        let identities = (FIRST_IDENTITY..).zip(identities).collect();
        let mut check = Self {
            world,
            setting,
            question,
            to,
            from,
            from_id,
            from_ip: from_ip.to_canonical(),
            to_id,
            to_ip,
            identities,
            builtins: setting.builtins.policies(world),
            called: setting.builtins.called(world),
            tables: Tables::default(),
            notes,
        };
        check.fill();
        Ok(check)
    }

    fn mode(&self, pod: &Pod) -> Mode {
        plan::capped(pod, &self.setting.never_deny)
    }

    fn is_enrolled(&self, pod: &Pod) -> bool {
        pod.is_enrollable() && self.mode(pod).is_enforced()
    }

    /// The pod's policies and the built-ins, as the reconciler joins them.
    fn policies_of(&self, pod: &Pod) -> Vec<Arc<Policy>> {
        let own = self.world.policies_of(pod);
        own.into_iter().chain(self.builtins.iter().cloned()).collect()
    }

    fn number(&self, id: Option<&SpiffeId>) -> u32 {
        self.identities.iter().find(|(_, known)| Some(known) == id).map_or(0, |(n, _)| *n)
    }

    fn default_deny(&self, pod: &Pod) -> bool {
        self.world.namespaces.get(&pod.name.namespace).is_some_and(|n| n.default_deny)
    }

    /// Rows as the reconciler writes them, of the two pods.
    fn fill(&mut self) {
        self.tables.config = Config {
            enforcement: self.setting.enforcement,
            enforcing: 1,
            ranges_known: 1,
            ..Config::default()
        };
        let mut pods = vec![(DESTINATION, self.to.clone(), self.to_ip, self.to_id.clone())];
        if let Some(from) = self.from.clone() {
            pods.push((SOURCE, from, self.from_ip, self.from_id.clone()));
        }
        for (netns, found, ip, id) in pods {
            let mode = self.mode(&found);
            let entry = PodEntry {
                mode: mode as u8,
                identity: self.number(id.as_ref()),
                flags: if mode.is_enforced() { pod::READY } else { 0 },
                ..PodEntry::default()
            };
            self.tables.pods.insert(netns, entry);
            self.tables.own.insert(OwnAddressKey { netns, ip: Ip::from_std(ip) }, 1);
            let mut flags = 0;
            if found.is_ambient() || self.is_enrolled(&found) {
                // Whether it is served now is not asked here.
                flags |= address::ENROLLED | address::SERVED;
            }
            if found.is_ambient() || found.is_enrollable() {
                flags |= address::ENROLLABLE;
            }
            let entry =
                AddressEntry { identity: entry.identity, kind: address::POD, flags, pad: 0 };
            self.tables.addresses.insert(Ip::from_std(ip), entry);
            let called = found.ips.iter().filter_map(|ip| self.called.get(&ip.to_canonical()));
            for exempt in found.exempt_ports.iter().chain(called.flatten()) {
                let (port, protocol) = (exempt.port, exempt.protocol);
                self.tables.exempt.insert(ExemptKey { netns, port, protocol, pad: [0; 5] }, 1);
            }
            let policies = self.policies_of(&found);
            let numbers: Vec<PolicyName> = policies.iter().map(|p| p.name.clone()).collect();
            let entries = compile(&CompileInput {
                policies: &policies,
                default_deny: self.default_deny(&found),
                trust_domain: &self.world.trust_domain,
                aliases: &self.world.federation.aliases,
                identities: &self.identities,
                number: &|name| number_in(&numbers, name),
                observe: mode == Mode::Observe,
                local_ips: &found.ips,
                max_entries: MAX_ENTRIES,
            });
            match entries {
                Ok(entries) => self.tables.policies.insert(netns, Some(Arc::new(entries))),
                Err(_) => {
                    if let Some(entry) = self.tables.pods.get_mut(&netns) {
                        entry.flags |= pod::CLOSED;
                    }
                    self.tables.policies.insert(netns, None)
                }
            };
        }
        // Whoever is no pod of the cluster is outside of its ranges here: whether an address
        // inside is known is not what is asked.
        self.tables.ranges.insert((0, Ip::UNSPECIFIED.octets()), range::OUTSIDE);
    }

    fn answer(mut self) -> Result<Answer, CheckError> {
        let mut sides = Vec::new();
        let dialled = self.from.clone().map(|from| (self.decide(SOURCE), from));
        let mut tunnelled = match &dialled {
            Some((decision, _)) => decision.action == Action::Tunnel,
            None => self.would_tunnel(),
        };
        tunnelled &= !self.question.plaintext && self.question.protocol == proto::TCP;
        tunnelled &= self.is_enrolled(&self.to) && self.setting.enforcement == enforcement::ENFORCE;
        if let Some((decision, from)) = dialled
            && self.mode(&from) != Mode::Off
        {
            // One that would be tunnelled is judged as if, though it is asked about in clear.
            let decision = (!tunnelled && decision.action != Action::Tunnel).then_some(decision);
            sides.push(self.side(Direction::Egress, &from, decision));
        }
        let passes = |side: &Side| side.verdict != Verdict::Dropped;
        if sides.iter().all(passes) {
            let decision = (!tunnelled).then(|| self.decide(DESTINATION));
            let to = self.to.clone();
            if self.question.request.is_none() && asks_requests(&self.policies_of(&to)) {
                self.notes.push(
                    "policies ask about HTTP requests, and none is given: what asks so fails \
                     closed; give --method, --path and --host"
                        .into(),
                );
            }
            sides.push(self.side(Direction::Ingress, &to, decision));
        }
        let rank = |verdict: Verdict| match verdict {
            Verdict::Dropped => 2,
            Verdict::Audit => 1,
            Verdict::Forwarded => 0,
        };
        let verdict = sides.iter().map(|s| s.verdict).max_by_key(|v| rank(*v));
        let reason = sides.iter().map(|s| s.reason).find(|r| *r != Reason::Allowed);
        Ok(Answer {
            verdict: verdict.unwrap_or_default(),
            reason: reason.unwrap_or(Reason::Allowed),
            tunnelled,
            sides,
            notes: self.notes,
        })
    }

    /// Of a source that is no known pod: one whose namespace is enforced, or that is not of
    /// this cluster's, proves its identity.
    fn would_tunnel(&mut self) -> bool {
        let Some(id) = &self.from_id else { return false };
        let own = id.trust_domain() == self.world.trust_domain;
        let space = id.workload().map(|(namespace, _)| namespace).filter(|_| own);
        let known = space.and_then(|space| self.world.namespaces.get(space));
        match known {
            Some(namespace) => namespace.mode.is_enforced(),
            None => {
                self.notes.push(format!("{id} is taken to prove its identity in a tunnel"));
                true
            }
        }
    }

    /// The kernel's verdict on one side.
    fn decide(&self, netns: u64) -> Decision {
        let attested = HashSet::new();
        let verdicts = Verdicts::new(&self.tables, &attested);
        let source = netns == SOURCE;
        let (local, remote) =
            if source { (self.from_ip, self.to_ip) } else { (self.to_ip, self.from_ip) };
        let port = self.question.port;
        let flow = Flow {
            netns,
            task_netns: 0,
            local: Ip::from_std(local),
            remote: Ip::from_std(remote),
            local_port: if source { EPHEMERAL } else { port },
            remote_port: if source { port } else { EPHEMERAL },
            protocol: self.question.protocol,
            steerable: true,
            now: 0,
        };
        if source { decide_egress(&verdicts, &flow) } else { decide_ingress(&verdicts, &flow) }
    }

    /// One side; `decision` is the kernel's where it judges, else the proxy does.
    fn side(&self, direction: Direction, judged: &Arc<Pod>, decision: Option<Decision>) -> Side {
        let mode = self.mode(judged);
        let (id, ip) = match direction {
            Direction::Ingress => (self.from_id.as_ref(), self.from_ip),
            Direction::Egress => (self.to_id.as_ref(), self.to_ip),
        };
        let enrollable = match direction {
            Direction::Ingress => {
                self.from.as_ref().is_some_and(|pod| pod.is_ambient() || pod.is_enrollable())
            }
            Direction::Egress => self.to.is_ambient() || self.to.is_enrollable(),
        };
        // An address shows an identity only where it is a known pod's.
        let known = direction == Direction::Egress || self.from.is_some();
        let tcp = self.question.protocol == proto::TCP;
        let as_if = mode == Mode::Observe && enrollable && (tcp || direction == Direction::Egress);
        let peer = match id {
            Some(id) if decision.is_none() || as_if => PeerIdentity::Authenticated(id),
            Some(id) if known => PeerIdentity::Address(id),
            _ => PeerIdentity::Unknown,
        };
        let facts = FlowFacts {
            direction,
            trust_domain: &self.world.trust_domain,
            aliases: &self.world.federation.aliases,
            peer,
            peer_ip: ip,
            local_ips: &judged.ips,
            port: self.question.port,
            protocol: self.question.protocol,
        };
        let policies = self.policies_of(judged);
        let default_deny = self.default_deny(judged);
        let mut explanation = explain(&policies, default_deny, &facts, None);
        let mut decision = decision;
        let asked = self.question.request.as_ref().filter(|_| tcp);
        if let Some(request) = asked.filter(|_| direction == Direction::Ingress) {
            // Where policy alone stops it, the kernel leaves the flow to who judges requests.
            if decision.is_some_and(|d| d.report && d.reason == explanation.outcome.reason) {
                decision = None;
            }
            explanation = explain(&policies, default_deny, &facts, Some(&request.facts(ip)));
        }
        let outcome = &explanation.outcome;
        let mut side = Side {
            direction,
            pod: judged.name.clone(),
            mode,
            verdict: Verdict::Forwarded,
            reason: outcome.reason,
            policy: None,
            sentence: explanation.sentence.clone(),
            explanation: None,
        };
        let named = match &outcome.audit {
            Some(audit) if outcome.is_allowed() => Some(audit),
            _ => outcome.policy.as_ref(),
        };
        side.policy = named.map(|policy| policy.name.clone());
        match decision {
            None => {
                side.verdict = if !outcome.is_allowed() {
                    if mode.is_enforced() { Verdict::Dropped } else { Verdict::Audit }
                } else if outcome.audit.is_some() {
                    Verdict::Audit
                } else {
                    Verdict::Forwarded
                };
            }
            Some(decision) => {
                side.verdict = decision.verdict;
                side.reason = decision.reason;
                // What the kernel refuses before it asks policy, or never judges.
                let unasked = !decision.report || decision.reason != outcome.reason;
                if unasked {
                    side.policy = None;
                    side.sentence = self.without_policy(mode, &decision);
                    return side;
                }
            }
        }
        side.explanation = Some(explanation);
        side
    }

    fn without_policy(&self, mode: Mode, decision: &Decision) -> String {
        if decision.action == Action::Tunnel {
            return "its port 15008 is the tunnels'".into();
        }
        if !decision.report {
            return if self.setting.enforcement == enforcement::OFF {
                "enforcement is off: nothing is judged".into()
            } else {
                "its mode is off: nothing is judged".into()
            };
        }
        match decision.reason {
            Reason::PlaintextRefused => match mode {
                Mode::Observe => "strict would refuse it: it comes in plaintext".into(),
                _ => "its mode is strict: plaintext is refused".into(),
            },
            Reason::MapFull => "its policies do not fit the kernel's map: it is closed".into(),
            reason => crate::telemetry::reason::name(reason).into(),
        }
    }
}

fn number_in(names: &[PolicyName], name: &PolicyName) -> u32 {
    let index = names.iter().position(|known| known == name);
    index.and_then(|index| u32::try_from(index + 1).ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests;
