//! The taint `node.signet.dev/agent-not-ready` (NoSchedule), where it is asked for: pods do not
//! come to a node whose agent is not ready.
//!
//! One replica does it, the holder of a Lease. A node's agent is ready when its NodeEnrolment is
//! that of this very Node and its pod is Ready, which the kubelet's probe says. Never more than a
//! tenth of the nodes (at least one) carry the taint by our doing: a fault that is everywhere
//! must not close the whole cluster. What is not known changes nothing.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use jiff::Timestamp;
use k8s_openapi::{
    api::{coordination::v1::LeaseSpec, core::v1::Taint},
    apimachinery::pkg::apis::meta::v1::MicroTime,
};

use crate::{
    api_server::{ApiError, ApiServer, Written, nodes::NodeTaints},
    cluster::enrolment::crd,
    config::authority::ObjectPath,
};

/// The taint's key.
pub const TAINT: &str = "node.signet.dev/agent-not-ready";
/// The only effect that is ours; others under this key are somebody else's.
const EFFECT: &str = "NoSchedule";
/// How often nodes are looked at, and the Lease renewed.
const TURN: Duration = Duration::from_secs(5);
/// A Lease that nobody has renewed for so long is free.
const LEASE: Duration = Duration::from_secs(20);
/// An agent that was ready may be away for so long: an upgrade takes less.
const GRACE: Duration = Duration::from_secs(60);

/// Keeps the taint, while this replica is the leader.
pub struct Tainter {
    api: ApiServer,
    lease: ObjectPath,
    agents: Vec<ObjectPath>,
    /// This replica's name in the Lease.
    identity: String,
    /// Another's Lease as it was last seen, and since when it has been the same.
    seen: Option<(String, Instant)>,
    /// Since when nodes that had an agent lack one, by uid.
    away: BTreeMap<String, Instant>,
    is_leader: bool,
}

/// What is to be done with a node's taint.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Step {
    Set,
    Remove,
}

/// What is known of a node.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Known {
    is_tainted: bool,
    is_ready: bool,
    /// Its agent has been away for longer than the grace, or was never there.
    is_due: bool,
}

impl Tainter {
    /// Keeps the taint of nodes by what these accounts' pods and their NodeEnrolments say.
    pub fn new(api: ApiServer, lease: ObjectPath, agents: Vec<ObjectPath>) -> Self {
        let host = std::env::var("HOSTNAME").unwrap_or_default();
        let identity = format!("{host}_{}", uuid::Uuid::new_v4());
        let (seen, away) = (None, BTreeMap::new());
        Self { api, lease, agents, identity, seen, away, is_leader: false }
    }

    /// Runs until the task is dropped. What fails is tried again.
    pub async fn run(mut self) {
        loop {
            if let Err(error) = self.turn().await {
                tracing::warn!(%error, "the taint of nodes is left as it is; trying again");
            }
            tokio::time::sleep(TURN).await;
        }
    }

    async fn turn(&mut self) -> Result<(), ApiError> {
        let leads = self.lead().await;
        let was = std::mem::replace(&mut self.is_leader, matches!(leads, Ok(true)));
        if was != self.is_leader {
            tracing::info!(leader = self.is_leader, lease = %self.lease, "who taints nodes");
        }
        if !leads? {
            self.away.clear();
            return Ok(());
        }
        let accounts: Vec<(&str, &str)> =
            self.agents.iter().map(|path| (&*path.namespace, &*path.name)).collect();
        // All of it is read before anything is written.
        let nodes = self.api.node_taints().await?;
        let enrolments = self.api.owners(crd::API_VERSION, crd::PLURAL).await?;
        let with_agents = self.api.nodes_with_ready_pods(&accounts).await?;
        let now = Instant::now();
        self.away.retain(|uid, _| nodes.iter().any(|node| node.uid == *uid));
        let known: Vec<Known> = nodes
            .iter()
            .map(|node| {
                let has_been = enrolments.get(&node.name).is_some_and(|owner| *owner == node.uid);
                let is_ready = has_been && with_agents.contains(&node.name);
                let since = match is_ready {
                    true => {
                        self.away.remove(&node.uid);
                        now
                    }
                    false => *self.away.entry(node.uid.clone()).or_insert(now),
                };
                let is_due = !is_ready && (!has_been || now - since >= GRACE);
                Known { is_tainted: node.taints.iter().any(is_ours), is_ready, is_due }
            })
            .collect();
        for (index, step) in plan(&known) {
            self.take(&nodes[index], step).await?;
        }
        Ok(())
    }

    async fn take(&self, node: &NodeTaints, step: Step) -> Result<(), ApiError> {
        let mut changed = node.clone();
        changed.taints.retain(|taint| !is_ours(taint));
        if step == Step::Set {
            changed.taints.push(Taint {
                key: TAINT.into(),
                effect: EFFECT.into(),
                value: None,
                time_added: None,
            });
        }
        // Somebody else's write goes first; the next turn looks again.
        if let Written::Done(_) = self.api.set_taints(&changed).await? {
            tracing::info!(node = node.name, step = ?step, taint = TAINT, "node's taint");
        }
        Ok(())
    }

    /// Takes or renews the Lease; true while it is this replica's.
    async fn lead(&mut self) -> Result<bool, ApiError> {
        let ObjectPath { namespace, name } = &self.lease;
        let lease = self.api.lease(namespace, name).await?;
        let Some(mut lease) = lease else {
            tracing::warn!(lease = %self.lease, "there is no such Lease: nobody taints nodes");
            return Ok(false);
        };
        let spec = lease.spec.take().unwrap_or_default();
        let holder = spec.holder_identity.clone().unwrap_or_default();
        let version = lease.metadata.resource_version.clone().unwrap_or_default();
        if !holder.is_empty() && holder != self.identity {
            // By this replica's own clock: the other's may be wrong.
            let since = match &self.seen {
                Some((seen, since)) if *seen == version => *since,
                _ => {
                    self.seen = Some((version, Instant::now()));
                    return Ok(false);
                }
            };
            if since.elapsed() < LEASE {
                return Ok(false);
            }
        }
        let now = MicroTime(Timestamp::now());
        let is_new = holder != self.identity;
        lease.spec = Some(LeaseSpec {
            holder_identity: Some(self.identity.clone()),
            lease_duration_seconds: i32::try_from(LEASE.as_secs()).ok(),
            acquire_time: if is_new { Some(now.clone()) } else { spec.acquire_time },
            renew_time: Some(now),
            lease_transitions: Some(
                spec.lease_transitions.unwrap_or(0).saturating_add(i32::from(is_new)),
            ),
            ..spec
        });
        let written = self.api.write_lease(namespace, name, &lease).await?;
        Ok(matches!(written, Written::Done(_)))
    }
}

fn is_ours(taint: &Taint) -> bool {
    taint.key == TAINT && taint.effect == EFFECT
}

/// What to do: the taint goes wherever the agent is ready, and comes where it is not, as long as
/// no more than a tenth of the nodes, or one, have it. What goes now makes room the next time.
fn plan(nodes: &[Known]) -> Vec<(usize, Step)> {
    let most = (nodes.len() / 10).max(1);
    let mut tainted = nodes.iter().filter(|node| node.is_tainted).count();
    let mut steps = Vec::new();
    for (index, node) in nodes.iter().enumerate() {
        if node.is_tainted && node.is_ready {
            steps.push((index, Step::Remove));
        } else if !node.is_tainted && node.is_due && tainted < most {
            tainted += 1;
            steps.push((index, Step::Set));
        }
    }
    steps
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn node(text: &str) -> Known {
        let has = |c| text.contains(c);
        Known { is_tainted: has('t'), is_ready: has('r'), is_due: has('d') && !has('r') }
    }

    #[test]
    fn the_taint_comes_and_goes_with_the_agent() {
        for (nodes, wanted) in [
            (vec!["r", "d"], vec![(1, Step::Set)]),
            // Away, but not for long.
            (vec!["r", ""], vec![]),
            (vec!["tr", "r"], vec![(0, Step::Remove)]),
            // One of two is as much as there may be.
            (vec!["d", "d"], vec![(0, Step::Set)]),
            (vec!["td", "d"], vec![]),
            (vec!["tr", "d"], vec![(0, Step::Remove)]),
            (vec![], vec![]),
        ] {
            let nodes: Vec<Known> = nodes.into_iter().map(node).collect();
            assert_eq!(plan(&nodes), wanted, "{nodes:?}");
        }
        let many = vec![node("d"); 39];
        assert_eq!(plan(&many).len(), 3);
    }

    proptest! {
        #[test]
        fn never_more_than_a_tenth_get_it(
            nodes in proptest::collection::vec((any::<bool>(), any::<bool>(), any::<bool>()), 0..80)
        ) {
            let mut nodes: Vec<Known> = nodes
                .into_iter()
                .map(|(is_tainted, is_ready, is_due)| Known {
                    is_tainted,
                    is_ready,
                    is_due: is_due && !is_ready,
                })
                .collect();
            let before = nodes.iter().filter(|node| node.is_tainted).count();
            for (index, step) in plan(&nodes) {
                nodes[index].is_tainted = step == Step::Set;
            }
            let after = nodes.iter().filter(|node| node.is_tainted).count();
            // What was there without our doing is not counted against us, and nothing is added to it.
            prop_assert!(after <= (nodes.len() / 10).max(1).max(before));
            prop_assert!(nodes.iter().all(|node| !(node.is_tainted && node.is_ready)));
        }
    }
}
