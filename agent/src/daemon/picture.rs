//! What the agent says of itself: the inputs of `signet status` and `signet endpoints`,
//! taken at one moment.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
    time::Instant,
};

use jiff::Timestamp;
use signet_ebpf::abi::{Reason, counter, enforcement};
use tokio::sync::watch;

use super::cluster;
use crate::{
    admin::{
        DropCount, EnforcementState, IssuerFacts, KernelFacts, StatusInputs, Succession, SvidFacts,
        SvidState,
    },
    cluster::{
        model::{Problem, World},
        source::ClusterSource,
    },
    endpoint::{
        self,
        reconcile::{KernelReport, Pulse},
        state::NodeStateHandle,
    },
    flow::{Edges, FlowLog, IstioMetrics, LostCause, Recorder},
    kernel::Counters,
    proxy::DataPlaneHandle,
    spiffe::TrustDomain,
    svid::{self, SvidHandle, SvidStatus, metrics::Purpose},
    telemetry::{metrics::Reading, reason},
    trust::{Trust, follow::Failures},
    workload_api::{WorkloadApiHandle, WorkloadKey},
};

/// Takes the picture of a moment.
pub(super) struct Picture {
    pub(super) node: Arc<str>,
    pub(super) started: Timestamp,
    pub(super) source: Arc<dyn ClusterSource>,
    /// Without the roots, which come and go.
    pub(super) issuer: IssuerFacts,
    pub(super) trust: Arc<Trust>,
    pub(super) domain: TrustDomain,
    pub(super) state: NodeStateHandle,
    pub(super) world: watch::Receiver<Arc<World>>,
    pub(super) svids: SvidHandle,
    /// Of the observer's listener, if it has one.
    pub(super) observer_svids: Option<SvidHandle>,
    pub(super) counters: Counters,
    pub(super) plane: Arc<DataPlaneHandle>,
    pub(super) report: watch::Receiver<KernelReport>,
    pub(super) losses: Arc<Losses>,
    pub(super) log: FlowLog,
    pub(super) edges: Edges,
    pub(super) workloads: WorkloadApiHandle,
    pub(super) foreign_bundles: watch::Receiver<Failures>,
    /// Why pages are not served, if they are not, by the configuration's key.
    pub(super) pages: watch::Receiver<BTreeMap<&'static str, String>>,
    pub(super) istio: IstioMetrics,
    /// Why nobody can look from outside, if so.
    pub(super) viewers: watch::Receiver<Option<String>>,
    pub(super) pulse: Pulse,
    pub(super) succession: watch::Receiver<Succession>,
    pub(super) newest: Newest,
}

impl Picture {
    /// The picture of this moment.
    pub(super) fn take(&self) -> StatusInputs {
        let state = self.state.current();
        let report = self.report.borrow().clone();
        let mut problems = report.problems;
        problems.extend(state.problems.iter().cloned());
        problems.extend(self.foreign_bundles.borrow().iter().map(|(domain, message)| Problem {
            subject: format!("trust domain {domain}"),
            message: message.clone(),
        }));
        problems.extend(
            self.trust
                .issuers()
                .problems()
                .into_iter()
                .map(|(place, message)| Problem { subject: format!("keys of {place}"), message }),
        );
        problems.extend(self.pages.borrow().iter().map(|(key, message)| Problem {
            subject: if *key == "observerListen" { "observer" } else { "metrics" }.into(),
            message: message.clone(),
        }));
        let succession = self.succession.borrow().clone();
        if let Succession::Waits(why) = &succession {
            let message = format!("another agent serves the node until this one can: {why}");
            problems.push(Problem { subject: "hand-over".into(), message });
        }
        let viewers = self.viewers.borrow().clone();
        problems.extend(viewers.map(|message| Problem { subject: "viewers".into(), message }));
        let drops = match self.counters.drops() {
            Ok(drops) => drops.into_iter().map(|(key, count)| DropCount { key, count }).collect(),
            Err(error) => {
                problems
                    .push(Problem { subject: "drop counters".into(), message: error.to_string() });
                Vec::new()
            }
        };
        self.losses.tell();
        let state_enforcement = state.enforcement;
        let (wanted_revision, wanted_since) = self.newest.of(self.world.borrow().revision);
        StatusInputs {
            node: self.node.clone(),
            started: self.started,
            // Before the first turn the state is the empty one, of revision 0.
            state: (state.revision > 0).then_some(state),
            wanted_revision,
            wanted_since,
            source: self.source.name().into(),
            location: self.source.location().into(),
            watches: self.source.watches(),
            kernel: KernelFacts {
                release: rustix::system::uname().release().to_string_lossy().into_owned(),
                programs: report.programs,
                cgroup: report.workloads,
                pins: report.pins,
                probe_cgroups: report.probe_cgroups,
                fallbacks: report.missing_features,
                // As applied: the configuration's, or what overrides it.
                enforcement: match state_enforcement {
                    enforcement::ENFORCE => EnforcementState::Enforce,
                    enforcement::AUDIT => EnforcementState::Audit,
                    _ => EnforcementState::Off,
                },
            },
            issuer: IssuerFacts {
                roots: self.trust.bundle(&self.domain).map(|b| b.expiries()).unwrap_or_default(),
                ..self.issuer.clone()
            },
            svids: self.svids.status().into_iter().map(svid_facts).collect(),
            workload_svids: self.workload_svids(),
            drops,
            problems,
            since_turn: self.pulse.since_turn(),
            settled: self.pulse.is_settled(),
            succession,
            counters: self.counters().iter().flat_map(Reading::flat).collect(),
        }
    }

    fn workload_svids(&self) -> Vec<(String, SvidFacts)> {
        let state = self.state.current();
        let pod = |key: &WorkloadKey| match key {
            WorkloadKey::Pod(key) => match state.endpoints.get(&key.netns) {
                Some(endpoint) => {
                    let name = &endpoint.pod.name;
                    format!("{}/{}", name.namespace, name.name)
                }
                // It went a moment ago.
                None => format!("uid {}", key.uid),
            },
            WorkloadKey::Entry(name) => format!("entry {name}"),
        };
        let held = self.workloads.svids().status().into_iter();
        held.map(|status| (pod(&status.key), svid_facts(status))).collect()
    }

    /// What is counted besides verdicts, for `status` and metrics.
    fn counters(&self) -> Vec<Reading> {
        const EVENTS: [(&str, &str, u32); 4] = [
            ("kernel_redirected", "Connects that were led to a tunnel", counter::REDIRECTED),
            (
                "kernel_unknown_refused",
                "Connections of pods not registered yet that were refused",
                counter::UNKNOWN_REFUSED,
            ),
            (
                "kernel_unknown_passed",
                "Connections of pods not registered yet that passed",
                counter::UNKNOWN_PASSED,
            ),
            ("kernel_guard_dropped", "Frames that raw guards dropped", counter::GUARD_DROPPED),
        ];
        const FULL: [(&str, u32); 5] = [
            ("ORIGINALS", counter::ORIGINALS_FULL),
            ("CLIENTS", counter::CLIENTS_FULL),
            ("UDP_FLOWS", counter::UDP_FULL),
            ("ATTESTED", counter::ATTESTED_FULL),
            ("TUNNELS", counter::TUNNELS_FULL),
        ];
        let get = |index| self.counters.get(index).ok();
        let mut all: Vec<_> = EVENTS
            .into_iter()
            .filter_map(|(name, help, index)| Some(Reading::counter(name, help).value(get(index)?)))
            .collect();
        let full = FULL.into_iter().filter_map(|(map, index)| Some((map, get(index)?)));
        all.push(
            Reading::counter("kernel_map_full", "Entries that a full map did not take")
                .each("map", full),
        );
        all.extend(self.plane.stats().readings());
        all.extend(self.workloads.counters().readings());
        all
    }

    /// Everything that is read when metrics are asked for.
    pub(super) fn readings(&self) -> Vec<Reading> {
        self.losses.tell();
        let mut all = self.counters();
        all.extend(self.log.totals().readings());
        all.extend(self.edges.readings());
        let state = self.state.current();
        let pods = state.endpoints.values().map(|endpoint| {
            let name = &endpoint.pod.name;
            (name.namespace.clone(), name.name.clone())
        });
        self.istio.retain(&pods.collect(), Instant::now());
        all.extend(self.istio.readings());
        all.extend(endpoint::metrics::readings(&state, &self.report.borrow()));
        let mut drops = BTreeMap::<&str, u64>::new();
        for (key, count) in self.counters.drops().unwrap_or_default() {
            let reason = Reason::from_u16(key.reason).unwrap_or(Reason::Internal);
            *drops.entry(reason::name(reason)).or_default() += count;
        }
        all.push(
            Reading::counter(
                "kernel_drops",
                "Drops that the kernel's programs decided, exactly, since they were attached first",
            )
            .each("reason", drops),
        );
        let mut held = vec![
            (Purpose::Tunnel, without_keys(self.svids.status())),
            (Purpose::Workload, without_keys(self.workloads.svids().status())),
        ];
        if let Some(svids) = &self.observer_svids {
            held.push((Purpose::Observer, without_keys(svids.status())));
        }
        all.extend(svid::metrics::readings(Timestamp::now(), &held));
        all.extend(self.trust.readings());
        all.extend(cluster::readings(&self.source.watches()));
        all
    }
}

fn without_keys<K>(held: Vec<SvidStatus<K>>) -> Vec<SvidStatus<()>> {
    held.into_iter().map(SvidStatus::without_key).collect()
}

fn svid_facts<K>(status: SvidStatus<K>) -> SvidFacts {
    SvidFacts {
        id: status.id,
        state: match status.validity {
            Some((not_before, not_after)) => {
                let obtained = status.obtained.unwrap_or(not_before);
                SvidState::Issued { obtained, not_before, not_after }
            }
            None => SvidState::Missing,
        },
        next_attempt: Some(status.next_request),
        error: status.last_error,
    }
}

/// The newest revision that was asked about, and since when.
pub(super) struct Newest(Mutex<(u64, Timestamp)>);

impl Newest {
    pub(super) fn new(started: Timestamp) -> Self {
        Self(Mutex::new((0, started)))
    }

    fn of(&self, revision: u64) -> (u64, Timestamp) {
        let mut newest = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if newest.0 != revision {
            *newest = (revision, Timestamp::now());
        }
        *newest
    }
}

/// Tells the flow log what the kernel lost since it was told last.
pub(super) struct Losses {
    recorder: Recorder,
    counters: Counters,
    told: Mutex<[u64; 2]>,
}

impl Losses {
    const CAUSES: [(LostCause, u32); 2] = [
        (LostCause::KernelRing, counter::EVENTS_LOST),
        (LostCause::KernelRate, counter::EVENTS_LIMITED),
    ];

    /// Counts from now on: the counters are pinned and hold an earlier agent's losses, too.
    pub(super) fn new(recorder: Recorder, counters: Counters) -> Self {
        let told = Self::CAUSES.map(|(_, index)| counters.get(index).unwrap_or(0));
        Self { recorder, counters, told: Mutex::new(told) }
    }

    /// Tells what is new.
    pub(super) fn tell(&self) {
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        for (told, (cause, index)) in told.iter_mut().zip(Self::CAUSES) {
            if let Ok(now) = self.counters.get(index) {
                self.recorder.count_lost(cause, now.saturating_sub(*told));
                *told = now;
            }
        }
    }
}
