//! What an agent holds, for "before = after".

use anyhow::{Context, Result, ensure};
use signet_lab::agent::{Agent, Usage};

/// Entries of maps, descriptors, threads, open flows.
#[derive(Debug)]
pub struct Held {
    maps: Vec<(&'static str, usize)>,
    /// Connections that the raw guard knows of: pooled ones, each a descriptor.
    tunnels: usize,
    usage: Usage,
    open_flows: u64,
}

impl Held {
    /// Entries of a map.
    pub fn entries(&self, map: &str) -> Option<usize> {
        self.maps.iter().find(|(name, _)| *name == map).map(|(_, entries)| *entries)
    }

    pub fn of(agent: &Agent) -> Result<Self> {
        let maps = agent.map_entries()?;
        let tunnels = maps.get("TUNNELS").copied().unwrap_or(usize::MAX);
        let maps = ["ORIGINALS", "CLIENTS", "ATTESTED", "PODS", "OWN", "ADDRESSES", "CGROUPS"]
            .into_iter()
            .map(|name| (name, maps.get(name).copied().unwrap_or_default()))
            .collect();
        let status = agent.status()?;
        let open_flows = status["counters"]["openFlows"].as_u64().unwrap_or_default();
        Ok(Self { maps, tunnels, usage: agent.usage()?, open_flows })
    }

    pub fn no_more_than(&self, before: &Self) -> Result<()> {
        for ((name, now), (_, then)) in self.maps.iter().zip(&before.maps) {
            ensure!(now <= then, "{name} has {now} entries, {then} before");
        }
        ensure!(self.tunnels <= self.usage.descriptors, "{} tunnels", self.tunnels);
        let (now, then) = (self.usage, before.usage);
        // Tunnels are kept for the next flow, some more or fewer of them. Their table and the
        // descriptors are not read at one instant: where there are no more of all kinds, a
        // tunnel that was closed in between does not count.
        let beside = |held: &Self| held.usage.descriptors.saturating_sub(held.tunnels);
        ensure!(
            now.descriptors <= then.descriptors || beside(self) <= beside(before) + 4,
            "descriptors {before:?} {self:?}"
        );
        // The runtime keeps a thread of its pool for blocking work for a while.
        ensure!(now.threads <= then.threads + 2, "threads {then:?} {now:?}");
        ensure!(self.open_flows <= before.open_flows, "open flows {}", self.open_flows);
        Ok(())
    }
}

/// Waits until every agent holds no more than before.
pub fn as_before(agents: &[Agent], before: &[Held], timeout: std::time::Duration) -> Result<()> {
    for (agent, before) in agents.iter().zip(before) {
        signet_lab::eventually("nothing is left", timeout, || {
            let now = Held::of(agent)?;
            now.no_more_than(before)
                .with_context(|| format!("{}: {before:?} {now:?}", agent.node().name))?;
            Ok(Some(()))
        })?;
    }
    Ok(())
}
