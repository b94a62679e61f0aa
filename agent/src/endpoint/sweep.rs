//! Removing what nobody will take any more: tuples of connections that never completed,
//! quiet UDP flows, counters of pods that are gone.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use aya::Pod;

use crate::kernel::{KernelError, Maps, maps::Table};

/// A hand-over is taken within a round trip on loopback.
const HANDOVER: Duration = Duration::from_secs(60);
/// As long as the programs take a quiet UDP flow for one.
const UDP: Duration = Duration::from_secs(120);
/// A probe is over within seconds; its row goes when it closes.
const ATTESTATION: Duration = Duration::from_secs(24 * 3600);

/// Marks a UDP flow that began outside; the rest of the number is a revision.
const INGRESS_BIT: u64 = 1 << 63;

/// How full a map of the kernel is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct MapFill {
    /// Its name.
    pub map: &'static str,
    /// Rows in it.
    pub rows: u64,
    /// Rows that it has room for.
    pub capacity: u64,
}

/// Sweeps every table and tells how full those are that fill up; `registered` are the network namespaces of this node's pods, and
/// `now` is the kernel's monotonic clock.
///
/// # Errors
/// Names the map. The others are swept at the next turn.
pub fn sweep(
    maps: &mut Maps,
    registered: &BTreeSet<u64>,
    now: u64,
) -> Result<Vec<MapFill>, KernelError> {
    let old = |then: u64, limit: Duration| u128::from(now.saturating_sub(then)) > limit.as_nanos();
    let gone = |netns: u64| !registered.contains(&netns);
    drop_rows(&mut maps.originals, |_, v| old(v.time, HANDOVER))?;
    drop_rows(&mut maps.clients, |_, v| old(v.time, HANDOVER))?;
    drop_rows(&mut maps.udp_flows, |k, v| old(v.last, UDP) || gone(k.netns))?;
    count_udp_flows(maps, registered)?;
    drop_rows(&mut maps.tunnels, |key, _| gone(key.netns))?;
    drop_rows(&mut maps.attested, |_, v| old(v.time, ATTESTATION))?;
    drop_rows(&mut maps.drops, |k, _| gone(k.netns))?;
    drop_rows(&mut maps.rate, |netns, _| gone(*netns))?;
    Ok(vec![
        fill(&maps.pods)?,
        fill(&maps.own)?,
        fill(&maps.addresses)?,
        fill(&maps.services)?,
        fill(&maps.exempt)?,
        fill(&maps.originals)?,
        fill(&maps.clients)?,
        fill(&maps.udp_flows)?,
        fill(&maps.tunnels)?,
        fill(&maps.attested)?,
        fill(&maps.drops)?,
        fill(&maps.identities)?,
        fill(&maps.names)?,
    ])
}

fn fill<K: Pod, V: Pod>(table: &Table<K, V>) -> Result<MapFill, KernelError> {
    let rows = table.count()?;
    Ok(MapFill { map: table.name(), rows, capacity: table.capacity() })
}

/// Makes every UDP flow of an earlier process be judged again: that process's revisions
/// mean nothing to this one's.
///
/// # Errors
/// Where the map cannot be read or written.
pub fn forget_revisions(maps: &mut Maps) -> Result<(), KernelError> {
    for (key, mut flow) in maps.udp_flows.rows()? {
        flow.revision |= !INGRESS_BIT;
        maps.udp_flows.set(key, flow)?;
    }
    Ok(())
}

/// Forgets the connections of an earlier process: they ended with it.
///
/// # Errors
/// Where the map cannot be read or written.
pub fn forget_tunnels(maps: &mut Maps) -> Result<(), KernelError> {
    drop_rows(&mut maps.tunnels, |_, _| true)
}

/// Counts each pod's UDP flows again: the programs count what they add, and not what goes here.
fn count_udp_flows(maps: &mut Maps, registered: &BTreeSet<u64>) -> Result<(), KernelError> {
    let mut counts: BTreeMap<u64, i64> = BTreeMap::new();
    for (key, _) in maps.udp_flows.rows()? {
        *counts.entry(key.netns).or_default() += 1;
    }
    for (netns, count) in maps.udp_counts.rows()? {
        match counts.get(&netns).copied().unwrap_or(0) {
            _ if !registered.contains(&netns) => maps.udp_counts.remove(&netns)?,
            now if now != count => maps.udp_counts.set(netns, now)?,
            _ => {}
        }
    }
    Ok(())
}

fn drop_rows<K: Pod, V: Pod>(
    table: &mut Table<K, V>,
    which: impl Fn(&K, &V) -> bool,
) -> Result<(), KernelError> {
    for (key, value) in table.rows()? {
        if which(&key, &value) {
            table.remove(&key)?;
        }
    }
    Ok(())
}
