//! `signet status`, assembled.

use std::collections::BTreeMap;

use jiff::Timestamp;
use signet_ebpf::abi::Mode;

use super::inputs::{StatusInputs, Succession, SvidFacts, SvidState};
use crate::{
    cluster::source::{WatchFacts, WatchState},
    flow::recorder::Totals,
    proto::{self, admin},
    svid::metrics::used,
    telemetry::{names, reason},
};

/// Behind for longer than this, the agent is not READY.
const MAX_BEHIND_SECONDS: u64 = 30;

/// The answer for a moment.
pub fn assemble(inputs: &StatusInputs, totals: &Totals, now: Timestamp) -> admin::StatusResponse {
    let programs = programs(inputs);
    let cluster = cluster(inputs, now);
    let svids = svids(&inputs.svids, now);
    let state = if inputs.succession == Succession::Succeeded {
        "DRAINING"
    } else if inputs.state.is_none() {
        "STARTING"
    } else if programs.attached < programs.expected
        || cluster.behind_seconds > MAX_BEHIND_SECONDS
        || svids.failed > 0
        || is_unsynced(inputs)
    {
        "DEGRADED"
    } else {
        "READY"
    };
    admin::StatusResponse {
        agent: Some(admin::Agent {
            node: inputs.node.to_string(),
            version: env!("CARGO_PKG_VERSION").into(),
            state: state.into(),
            uptime_seconds: seconds_between(inputs.started, now),
            kernel: inputs.kernel.release.clone(),
            enforcement: inputs.kernel.enforcement.name().into(),
        }),
        identity: Some(admin::Identity {
            trust_domain: inputs.issuer.trust_domain.to_string(),
            issuer: inputs.issuer.name.to_string(),
            roots: count(inputs.issuer.roots.len()),
            expires: inputs.issuer.roots.iter().min().map(|t| proto::timestamp(*t)),
        }),
        pods: Some(pods(inputs)),
        policies: Some(policies(inputs)),
        events: Some(events(inputs, totals)),
        problems: problems(inputs, &programs),
        counters: inputs
            .counters
            .iter()
            .map(|(name, value)| admin::Counter { name: name.clone(), value: *value })
            .collect(),
        programs: Some(programs),
        cluster: Some(cluster),
        svids: Some(svids),
    }
}

fn programs(inputs: &StatusInputs) -> admin::Programs {
    let kernel = &inputs.kernel;
    let missing: Vec<String> = kernel
        .programs
        .iter()
        .filter(|(_, attached)| !attached)
        .map(|(name, _)| (*name).to_owned())
        .collect();
    admin::Programs {
        attached: count(kernel.programs.len() - missing.len()),
        expected: count(kernel.programs.len()),
        cgroup: kernel.cgroup.clone(),
        pins: kernel.pins.clone(),
        missing,
        probe_cgroups: kernel.probe_cgroups.clone(),
        fallbacks: kernel.fallbacks.clone(),
    }
}

fn cluster(inputs: &StatusInputs, now: Timestamp) -> admin::Cluster {
    let applied = inputs.state.as_ref().map_or(0, |s| s.revision);
    let is_behind = applied < inputs.wanted_revision;
    admin::Cluster {
        source: inputs.source.to_string(),
        location: inputs.location.to_string(),
        revision: inputs.wanted_revision,
        applied,
        behind_seconds: if is_behind { seconds_between(inputs.wanted_since, now) } else { 0 },
        watches: inputs.watches.iter().map(watch).collect(),
    }
}

fn watch(facts: &WatchFacts) -> admin::Watch {
    admin::Watch {
        kind: facts.kind.into(),
        state: facts.state.name().into(),
        objects: facts.objects as u64,
        faulty: facts.faulty as u64,
        last_event: facts.last_event.map(proto::timestamp),
        last_heard: facts.last_heard.map(proto::timestamp),
        error: facts.error.as_deref().unwrap_or_default().into(),
    }
}

fn is_unsynced(inputs: &StatusInputs) -> bool {
    inputs.state.as_ref().is_some_and(|s| !(s.world.synced.pods && s.world.synced.policies))
}

fn svids(svids: &[SvidFacts], now: Timestamp) -> admin::Svids {
    let mut valid = 0;
    let mut oldest = None;
    for svid in svids {
        if let SvidState::Issued { obtained, not_after, .. } = svid.state
            && not_after > now
        {
            valid += 1;
            oldest = oldest.max(Some(used_percent(obtained, not_after, now)));
        }
    }
    let next = svids.iter().filter_map(|s| s.next_attempt).min();
    admin::Svids {
        valid,
        failed: count(svids.iter().filter(|s| is_failed(s, now)).count()),
        oldest_percent: oldest,
        next_renewal_seconds: next.map(|t| seconds_between(now, t)),
    }
}

/// Failed: the last attempt did, or what there is has run out.
pub(super) fn is_failed(svid: &SvidFacts, now: Timestamp) -> bool {
    let expired = matches!(svid.state, SvidState::Issued { not_after, .. } if not_after <= now);
    svid.error.is_some() || expired
}

fn used_percent(obtained: Timestamp, not_after: Timestamp, now: Timestamp) -> u32 {
    (used(obtained, not_after, now) * 100.0) as u32
}

fn pods(inputs: &StatusInputs) -> admin::Pods {
    let Some(state) = &inputs.state else { return admin::Pods::default() };
    let mut pods = admin::Pods { waiting: count(state.waiting.len()), ..Default::default() };
    for endpoint in state.endpoints.values() {
        match endpoint.mode {
            Mode::Strict => pods.strict += 1,
            Mode::Permissive => pods.permissive += 1,
            Mode::Observe => pods.observe += 1,
            Mode::Off => pods.off += 1,
        }
    }
    pods.managed = pods.strict + pods.permissive + pods.observe;
    pods
}

fn policies(inputs: &StatusInputs) -> admin::Policies {
    let Some(state) = &inputs.state else { return admin::Policies::default() };
    let world = &state.world;
    let policies = world.policies.policies.iter().map(|p| &p.remarks);
    let tokens = world.policies.request_authentications.iter().map(|p| &p.remarks);
    let all: Vec<_> = policies
        .chain(world.peer_authentications.iter().map(|p| &p.remarks))
        .chain(tokens)
        .collect();
    admin::Policies {
        in_force: count(all.len()),
        with_problems: count(all.iter().filter(|r| r.iter().any(|r| r.is_fault)).count()),
    }
}

fn events(inputs: &StatusInputs, totals: &Totals) -> admin::Events {
    // The kernel's counters are exact; its events may have been limited.
    let kernel_dropped =
        inputs.drops.iter().map(|d| d.count).sum::<u64>().max(totals.kernel_dropped);
    let counters = |pairs: Vec<(&str, u64)>| {
        pairs
            .into_iter()
            .filter(|(_, value)| *value > 0)
            .map(|(name, value)| admin::Counter { name: name.into(), value })
            .collect()
    };
    admin::Events {
        forwarded: totals.forwarded + totals.kernel_forwarded,
        dropped: totals.dropped + kernel_dropped,
        audit: totals.audit + totals.kernel_audit,
        lost: totals.lost_in_all(),
        lost_by_cause: counters(totals.lost.iter().map(|(c, n)| (c.describe(), *n)).collect()),
        dropped_by_reason: counters(
            totals.drops_by_reason.iter().map(|(r, n)| (reason::name(*r), *n)).collect(),
        ),
    }
}

/// In the order of urgency; the same subject and message once.
fn problems(inputs: &StatusInputs, programs: &admin::Programs) -> Vec<admin::Problem> {
    let mut all = Vec::new();
    let mut add = |subject: String, state: &str, message: String| {
        all.push(admin::Problem { subject, state: state.into(), message });
    };
    for program in &programs.missing {
        add(
            format!("program {program}"),
            "missing",
            format!("it is not attached to {}: the agent's log says why", programs.cgroup),
        );
    }
    for svid in &inputs.svids {
        if let Some(error) = &svid.error {
            add(format!("svid {}", svid.id.as_str()), "failed", error.clone());
        }
    }
    for watch in &inputs.watches {
        if let Some(error) = &watch.error {
            let stays = match watch.state {
                WatchState::Waiting => "nothing is known of this kind yet",
                _ => "what was read last stays in force",
            };
            add(format!("watch {}", watch.kind), "failing", format!("{error}; {stays}"));
        }
    }
    for problem in &inputs.problems {
        add(problem.subject.clone(), "problem", problem.message.clone());
    }
    if let Some(state) = &inputs.state {
        for waiting in &state.waiting {
            let name = &waiting.pod.name;
            add(format!("pod {}/{}", name.namespace, name.name), "waiting", waiting.reason.clone());
        }
        let mut unenforceable = BTreeMap::new();
        for endpoint in state.endpoints.values() {
            let pod = &endpoint.pod;
            if let Some(why) = &pod.unenforceable {
                let asks = names::mode(pod.mode);
                unenforceable.insert(
                    format!("pod {}/{}", pod.name.namespace, pod.name.name),
                    format!("its mode is {asks}, which cannot be enforced: {why}"),
                );
            }
        }
        for (subject, message) in unenforceable {
            add(subject, "unenforceable", message);
        }
        let policies = state.world.policies.policies.iter().map(|p| (&p.name, &p.remarks));
        let authentications =
            state.world.peer_authentications.iter().map(|p| (&p.name, &p.remarks));
        let tokens =
            state.world.policies.request_authentications.iter().map(|p| (&p.name, &p.remarks));
        for (name, remarks) in policies.chain(authentications).chain(tokens) {
            for remark in remarks.iter().filter(|remark| remark.is_fault) {
                add(format!("policy {name}"), "unsupported", remark.to_string());
            }
        }
        for problem in state.world.problems.iter().chain(&state.problems) {
            add(problem.subject.clone(), "ignored", problem.message.clone());
        }
    }
    let mut seen = std::collections::HashSet::new();
    all.retain(|p| seen.insert((p.subject.clone(), p.message.clone())));
    all
}

fn seconds_between(from: Timestamp, to: Timestamp) -> u64 {
    u64::try_from(to.duration_since(from).as_secs()).unwrap_or(0)
}

fn count(n: usize) -> u32 {
    u32::try_from(n).unwrap_or(u32::MAX)
}
