//! Writing the difference into the kernel, in an order that never opens what is closed.

use std::{
    collections::{BTreeSet, HashMap},
    hash::Hash,
};

use aya::Pod;
use signet_ebpf::abi::{Config, pod};

use super::tables::{Changes, Tables, changes};
use crate::kernel::{KernelError, Maps, clock, maps::Table};

/// What did not fit or failed. The tables then hold what was written, and the next apply
/// tries the rest again.
#[derive(Debug, Default)]
pub struct Outcome {
    /// Maps of the whole node that are full.
    pub full: BTreeSet<&'static str>,
    /// Network namespaces whose own rows did not fit.
    pub closed: BTreeSet<u64>,
    /// Other failures.
    pub failures: Vec<KernelError>,
}

/// Reads the tables as an earlier process left them.
///
/// # Errors
/// Names the map that cannot be read.
pub fn read(maps: &Maps) -> Result<Tables, KernelError> {
    Ok(Tables {
        config: Config { heartbeat: 0, guarded_until: 0, ..maps.config()? },
        pods: maps.pods.rows()?.into_iter().collect(),
        cgroups: maps.cgroups.rows()?.into_iter().collect(),
        own: maps.own.rows()?.into_iter().collect(),
        addresses: maps.addresses.rows()?.into_iter().collect(),
        services: maps.services.rows()?.into_iter().collect(),
        ranges: maps.ranges()?.into_iter().collect(),
        exempt: maps.exempt.rows()?.into_iter().collect(),
        probes: maps.probes.rows()?.into_iter().collect(),
        guarded: maps.guarded.rows()?.into_iter().collect(),
        names: maps.names.rows()?.into_iter().collect(),
        policies: maps.policies()?.into_iter().map(|netns| (netns, None)).collect(),
    })
}

/// Takes readiness from every registered pod: the listeners of an earlier process are gone,
/// and its pods are closed until they have new ones.
///
/// # Errors
/// Where the map cannot be written.
pub fn close_all(maps: &mut Maps, applied: &mut Tables) -> Result<(), KernelError> {
    for (netns, entry) in &mut applied.pods {
        if entry.flags & pod::READY != 0 {
            entry.flags &= !pod::READY;
            maps.pods.set(*netns, *entry)?;
        }
    }
    Ok(())
}

/// Makes the kernel's tables `wanted`, starting from `applied`, which follows.
///
/// What a pod's verdict reads is written before the pod's own row, and removed after it.
pub fn apply(maps: &mut Maps, applied: &mut Tables, wanted: &Tables) -> Outcome {
    let mut outcome = Outcome::default();
    policies(maps, applied, wanted, &mut outcome);
    let own = changes(&applied.own, &wanted.own);
    let exempt = changes(&applied.exempt, &wanted.exempt);
    let cgroups = changes(&applied.cgroups, &wanted.cgroups);
    let pods = changes(&applied.pods, &wanted.pods);
    let addresses = changes(&applied.addresses, &wanted.addresses);
    let services = changes(&applied.services, &wanted.services);
    let probes = changes(&applied.probes, &wanted.probes);
    let guarded = changes(&applied.guarded, &wanted.guarded);
    let names = changes(&applied.names, &wanted.names);

    set(&mut maps.own, &mut applied.own, &own, &mut outcome, |key, _| Some(key.netns));
    set(&mut maps.exempt, &mut applied.exempt, &exempt, &mut outcome, |key, _| Some(key.netns));
    set(&mut maps.cgroups, &mut applied.cgroups, &cgroups, &mut outcome, |_, netns| Some(*netns));
    ranges(maps, applied, wanted, &mut outcome);
    set(&mut maps.services, &mut applied.services, &services, &mut outcome, |_, _| None);
    set(&mut maps.addresses, &mut applied.addresses, &addresses, &mut outcome, |_, _| None);
    // Gone first: kubelet's cgroup may have been made anew.
    remove(&mut maps.probes, &mut applied.probes, &probes, &mut outcome);
    set(&mut maps.probes, &mut applied.probes, &probes, &mut outcome, |_, _| None);
    set(&mut maps.pods, &mut applied.pods, &pods, &mut outcome, |netns, _| Some(*netns));
    // A name is nobody's right: one that does not fit closes nothing.
    let mut unnamed = Outcome::default();
    remove(&mut maps.names, &mut applied.names, &names, &mut unnamed);
    set(&mut maps.names, &mut applied.names, &names, &mut unnamed, |netns, _| Some(*netns));
    outcome.failures.append(&mut unnamed.failures);
    // Flows are recorded before anything is judged by the record.
    config(maps, applied, wanted, &mut outcome);
    set(&mut maps.guarded, &mut applied.guarded, &guarded, &mut outcome, |_, n| Some(*n));

    remove(&mut maps.guarded, &mut applied.guarded, &guarded, &mut outcome);
    remove(&mut maps.pods, &mut applied.pods, &pods, &mut outcome);
    remove(&mut maps.cgroups, &mut applied.cgroups, &cgroups, &mut outcome);
    remove(&mut maps.own, &mut applied.own, &own, &mut outcome);
    remove(&mut maps.exempt, &mut applied.exempt, &exempt, &mut outcome);
    remove(&mut maps.addresses, &mut applied.addresses, &addresses, &mut outcome);
    remove(&mut maps.services, &mut applied.services, &services, &mut outcome);
    for netns in changes(&applied.policies, &wanted.policies).remove {
        match maps.remove_policy(netns) {
            Ok(()) => {
                applied.policies.remove(&netns);
            }
            Err(error) => outcome.failures.push(error),
        }
    }
    outcome
}

fn policies(maps: &mut Maps, applied: &mut Tables, wanted: &Tables, outcome: &mut Outcome) {
    for (netns, policy) in changes(&applied.policies, &wanted.policies).set {
        // Rows that are kept as they are have no entries to write.
        let Some(entries) = &policy else { continue };
        match maps.set_policy(netns, entries) {
            Ok(()) => {
                applied.policies.insert(netns, policy);
            }
            Err(KernelError::MapFull { .. } | KernelError::PolicyTooLarge { .. }) => {
                outcome.closed.insert(netns);
            }
            Err(error) => outcome.failures.push(error),
        }
    }
}

fn ranges(maps: &mut Maps, applied: &mut Tables, wanted: &Tables, outcome: &mut Outcome) {
    let Changes { set, remove } = changes(&applied.ranges, &wanted.ranges);
    for (key, kind) in set {
        match maps.set_range(key, kind) {
            Ok(()) => {
                applied.ranges.insert(key, kind);
            }
            Err(error) => fail(outcome, error, None),
        }
    }
    for key in remove {
        match maps.remove_range(key) {
            Ok(()) => {
                applied.ranges.remove(&key);
            }
            Err(error) => outcome.failures.push(error),
        }
    }
}

fn config(maps: &mut Maps, applied: &mut Tables, wanted: &Tables, outcome: &mut Outcome) {
    if applied.config == wanted.config {
        return;
    }
    // `signet guard` holds until the first heartbeat.
    let (heartbeat, guarded_until) =
        maps.config().map_or((0, 0), |config| (config.heartbeat, config.guarded_until));
    match maps.set_config(Config { heartbeat, guarded_until, ..wanted.config }) {
        Ok(()) => applied.config = wanted.config,
        Err(error) => outcome.failures.push(error),
    }
}

/// Says that the agent is alive and registers pods. What was applied is written again with it:
/// nobody else's value stays.
///
/// # Errors
/// Where the map cannot be written.
pub fn heartbeat(maps: &mut Maps, applied: &Tables) -> Result<(), KernelError> {
    maps.set_config(Config { heartbeat: clock::monotonic(), ..applied.config })
}

fn set<K, V>(
    table: &mut Table<K, V>,
    applied: &mut HashMap<K, V>,
    changes: &Changes<K, V>,
    outcome: &mut Outcome,
    netns: impl Fn(&K, &V) -> Option<u64>,
) where
    K: Pod + Eq + Hash,
    V: Pod,
{
    for (key, value) in &changes.set {
        match table.set(*key, *value) {
            Ok(()) => {
                applied.insert(*key, *value);
            }
            Err(error) => fail(outcome, error, netns(key, value)),
        }
    }
}

fn remove<K, V>(
    table: &mut Table<K, V>,
    applied: &mut HashMap<K, V>,
    changes: &Changes<K, V>,
    outcome: &mut Outcome,
) where
    K: Pod + Eq + Hash,
    V: Pod,
{
    for key in &changes.remove {
        match table.remove(key) {
            Ok(()) => {
                applied.remove(key);
            }
            Err(error) => outcome.failures.push(error),
        }
    }
}

/// A row that does not fit closes its pod; one that is nobody's closes all.
fn fail(outcome: &mut Outcome, error: KernelError, netns: Option<u64>) {
    match (&error, netns) {
        (KernelError::MapFull { .. }, Some(netns)) => {
            outcome.closed.insert(netns);
        }
        (KernelError::MapFull { map }, None) => {
            outcome.full.insert(map);
        }
        _ => outcome.failures.push(error),
    }
}
