//! What this node's pods, policies and kernel programs are, as metrics.
//!
//! No label holds a pod: what is wrong with which is told by `signet status` and by events.

use std::collections::BTreeMap;

use signet_ebpf::abi::enforcement;

use super::{reconcile::KernelReport, state::NodeState};
use crate::telemetry::{metrics::Reading, names};

/// The readings of a state and of the kernel's side.
pub fn readings(state: &NodeState, kernel: &KernelReport) -> Vec<Reading> {
    let mut all = pods(state);
    all.extend(node(state, kernel));
    all.extend(maps(kernel));
    // An enforced namespace where none is left is told as such.
    let enforced = state.endpoints.values().filter(|endpoint| endpoint.mode.is_enforced());
    let mut plaintext: BTreeMap<&str, u64> =
        enforced.map(|endpoint| (&*endpoint.pod.name.namespace, 0)).collect();
    plaintext.extend(kernel.plaintext.iter().map(|(namespace, n)| (&**namespace, *n)));
    all.push(
        Reading::gauge(
            "plaintext_flows",
            "Open flows of enforced pods that strict does not take anew, by namespace",
        )
        .each("namespace", plaintext),
    );
    all
}

fn pods(state: &NodeState) -> Vec<Reading> {
    let mut modes = BTreeMap::from(["off", "observe", "permissive", "strict"].map(|m| (m, 0u64)));
    let (mut closed, mut unguarded) = (0u64, 0u64);
    for endpoint in state.endpoints.values() {
        *modes.entry(names::mode(endpoint.mode)).or_default() += 1;
        closed += u64::from(endpoint.closed);
        unguarded += u64::from(endpoint.mode.is_enforced() && endpoint.raw_guard.is_none());
    }
    let own = state.world.pods.values().filter(|pod| pod.node.as_ref() == Some(&state.node));
    let unenforceable =
        own.filter(|pod| pod.mode.is_enforced() && !pod.finished && pod.unenforceable.is_some());
    vec![
        Reading::gauge("pods", "Pods of this node that are registered, by the mode in force")
            .each("mode", modes),
        Reading::gauge("pods_waiting", "Pods of this node that are not registered yet")
            .value(state.waiting.len()),
        Reading::gauge("pods_closed", "Pods that are refused everything: their rows found no room")
            .value(closed),
        Reading::gauge("pods_unguarded", "Enforced pods without a guard against raw sockets")
            .value(unguarded),
        Reading::gauge("pods_unenforceable", "Pods that their mode cannot be enforced for")
            .value(unenforceable.count()),
    ]
}

fn node(state: &NodeState, kernel: &KernelReport) -> Vec<Reading> {
    let in_force = [
        ("enforce", enforcement::ENFORCE),
        ("audit", enforcement::AUDIT),
        ("off", enforcement::OFF),
    ]
    .map(|(name, value)| (name, state.enforcement == value));
    let programs = kernel.programs.iter().map(|(name, attached)| (*name, *attached));
    let problems = state.world.problems.len() + state.problems.len() + kernel.problems.len();
    vec![
        Reading::gauge("enforcement", "1 for what is in force").each("state", in_force),
        Reading::gauge("program_attached", "1 while a program is where it is meant to be")
            .each("program", programs),
        Reading::gauge("applied_revision", "The revision of the cluster that is in force")
            .value(state.revision),
        Reading::gauge("problems", "Problems that signet status lists").value(problems),
    ]
}

fn maps(kernel: &KernelReport) -> [Reading; 2] {
    [
        Reading::gauge("kernel_map_entries", "Rows of the kernel's maps")
            .each("map", kernel.maps.iter().map(|fill| (fill.map, fill.rows))),
        Reading::gauge("kernel_map_capacity", "Rows that they have room for")
            .each("map", kernel.maps.iter().map(|fill| (fill.map, fill.capacity))),
    ]
}
