//! Whether the agent is ready or live, for the kubelet's probes.
//!
//! Ready is what an upgrade may build on: the cluster has been read in full, the programs are
//! attached, listeners are open. An authority that cannot be reached is no reason: SVIDs serve
//! until they expire, and pods without one are closed, not lost. Live is only that the
//! reconciler turns: nothing that a restart would not mend.

use std::time::Duration;

use jiff::Timestamp;

use super::{StatusInputs, Succession};
use crate::proto::admin::{ProbeResponse, probe_request::Kind};

/// A reconciler that has not turned for so long is stuck; the kernel's programs take the agent
/// for dead after the same time.
const STUCK: Duration = Duration::from_nanos(signet_ebpf::abi::HEARTBEAT_NS);

/// The answer to a probe.
pub(super) fn answer(inputs: &StatusInputs, kind: Kind, now: Timestamp) -> ProbeResponse {
    let refusal = match kind {
        Kind::Live => not_live(inputs, now),
        Kind::Ready => not_live(inputs, now).or_else(|| not_ready(inputs)),
    };
    match refusal {
        Some(reason) => ProbeResponse { ok: false, reason },
        None => ProbeResponse { ok: true, reason: well(inputs, kind) },
    }
}

/// Whether the agent is ready, and why it is or is not.
///
/// # Errors
/// The reason why it is not.
pub fn readiness(inputs: &StatusInputs) -> Result<String, String> {
    let ProbeResponse { ok, reason } = answer(inputs, Kind::Ready, Timestamp::now());
    if ok { Ok(reason) } else { Err(reason) }
}

fn not_live(inputs: &StatusInputs, now: Timestamp) -> Option<String> {
    let (since, what) = match inputs.since_turn {
        Some(since) => (since, "the reconciler turned last"),
        None => {
            let uptime = now.duration_since(inputs.started);
            let uptime = Duration::try_from(uptime).unwrap_or_default();
            (uptime, "the reconciler has never turned, and the agent started")
        }
    };
    (since >= STUCK).then(|| format!("{what} {} s ago: it is stuck", since.as_secs()))
}

fn not_ready(inputs: &StatusInputs) -> Option<String> {
    match &inputs.succession {
        Succession::Serves => {}
        Succession::Waits(why) => {
            return Some(format!("another agent serves the node until this one can: {why}"));
        }
        Succession::Succeeded => {
            return Some("another agent serves the node; this one finishes its open flows".into());
        }
    }
    let Some(state) = &inputs.state else {
        return Some("the cluster's objects have not been applied to the kernel once".into());
    };
    if !state.world.synced.pods {
        return Some("the cluster's pods and namespaces have not been read in full once".into());
    }
    if !state.world.synced.policies {
        return Some("the cluster's policies have not been read in full once".into());
    }
    let missing: Vec<&str> = inputs
        .kernel
        .programs
        .iter()
        .filter(|(_, attached)| !attached)
        .map(|(name, _)| *name)
        .collect();
    if inputs.kernel.programs.is_empty() || !missing.is_empty() {
        return Some(format!("programs are not attached: {}", missing.join(", ")));
    }
    if !inputs.settled {
        return Some("pods that are enforced wait for their listeners".into());
    }
    None
}

fn well(inputs: &StatusInputs, kind: Kind) -> String {
    match (kind, &inputs.state) {
        (Kind::Ready, Some(state)) => format!(
            "revision {} is applied, {} programs are attached",
            state.revision,
            inputs.kernel.programs.len()
        ),
        _ => "the reconciler turns".into(),
    }
}
