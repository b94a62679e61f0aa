//! Conditions on our own policies, where `kubectl get` and GitOps tools look: `Accepted`, whether
//! all of it was understood, and `Enforced`, whether it holds for the pods that it selects.
//!
//! There is no leader among agents, and five thousand equal writes help nobody. Of the nodes
//! that announce pods the first by name writes, as soon as something differs from what it wrote
//! last, and at a turn no more than [`EVENTS`] allows: every agent watches policies, so that each
//! write is an event for each node. The next few look at longer and longer intervals, by
//! one list, and write only what was out of date twice running: the first one's agent may be
//! dead. Nobody else does anything.
//!
//! Conditions of other types belong to others and are left as they were when last read.
//!
//! Messages have no counts and no revisions: they would change with every pod.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::Arc,
    time::Duration,
};

use jiff::Timestamp;
use kube::{
    Api, Client,
    api::{ApiResource, DynamicObject, ListParams, Patch, PatchParams},
    core::GroupVersionKind,
};
use serde_json::{Value, json};
use tokio::time::{self, Instant};

use super::{Shared, client::CALL_TIMEOUT, kinds::POLICIES, store::Known};
use crate::{
    cluster::model::{Override, Pod, World},
    config::values::Enforcement,
    policy::model::{Policy, PolicyName},
};

/// Turns are at least so far apart: what changes back and forth within one is not written.
const APART: Duration = Duration::from_secs(2);
/// Policies written at one turn; the others wait for the next.
const AT_ONCE: usize = 20;
/// Watch events that the writes of one turn may cause, one for each node and write: with 5,000
/// nodes one policy a second is written.
const EVENTS: usize = 10_000;
/// The writer reads what is there again this often: somebody may have changed it.
const AGAIN: Duration = Duration::from_secs(600);
/// What could not be written is tried again after this.
const RETRY: Duration = Duration::from_secs(15);
/// Nodes that stand in for the writer, each looking so much less often than the one before.
const STAND_INS: usize = 3;
const STAND_IN_EVERY: Duration = Duration::from_secs(60);
/// Policies asked for at a time.
const PAGE: u32 = 500;
/// The field manager.
const MANAGER: &str = "signet-agent";
/// Bytes of a message; the schema takes more.
const MAX_MESSAGE: usize = 2000;

/// A condition without its time.
#[derive(Clone, PartialEq, Eq, Debug)]
struct Condition {
    kind: &'static str,
    status: bool,
    reason: &'static str,
    message: String,
}

/// What a policy's status is to say.
#[derive(Clone, PartialEq, Eq, Debug)]
struct Wanted {
    generation: i64,
    conditions: [Condition; 2],
}

/// What an object's status says.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
struct Written {
    /// As the API has them.
    conditions: Vec<Value>,
}

type Name = (&'static str, String, String);

/// Writes conditions as Worlds come, for ever.
pub(super) async fn run(shared: Arc<Shared>, client: Client) {
    let mut there = None;
    let mut suspects = BTreeSet::new();
    let mut failed = false;
    let mut last = None;
    loop {
        let rank = rank(&shared);
        if rank != last {
            there = None;
            last = rank;
        }
        match rank {
            Some(rank) if rank <= STAND_INS => {
                match turn(&shared, &client, rank, &mut there, &mut suspects).await {
                    Ok(()) => failed = false,
                    Err(error) => {
                        if !failed {
                            tracing::warn!(%error, "conditions of policies are not written; trying again");
                        }
                        failed = true;
                        there = None;
                    }
                }
            }
            _ => {}
        }
        time::sleep(APART).await;
        // A receiver of Worlds would keep the source alive.
        match rank {
            Some(0) => {
                let rest = if failed { RETRY } else { AGAIN };
                let _ = time::timeout(rest, shared.conditions.notified()).await;
            }
            // By the clock, not by what happens, unless this node becomes the writer.
            Some(rank) if rank <= STAND_INS => {
                let times = u32::try_from(rank).unwrap_or(1);
                let until = Instant::now() + STAND_IN_EVERY * times;
                while self::rank(&shared) != Some(0) && Instant::now() < until {
                    let _ = time::timeout_at(until, shared.conditions.notified()).await;
                }
            }
            // Not announced yet: with the next World it may be.
            None => shared.conditions.notified().await,
            // The many others look now and then whether those before them are gone.
            Some(_) => time::sleep(STAND_IN_EVERY).await,
        }
    }
}

/// How many announcing nodes come before this one; `None`: it does not announce yet, or not all
/// is known.
fn rank(shared: &Shared) -> Option<usize> {
    let world = shared.worlds.borrow().clone();
    if !(world.synced.pods && world.synced.policies) {
        return None;
    }
    let own = &shared.params.node;
    let (mut announces, mut before) = (false, 0);
    for known in shared.stores().iter().flat_map(|store| store.known()) {
        let Known::Announcement(announcement) = known else { continue };
        let node = &announcement.node;
        announces |= node == own;
        // One that was left behind by a Node that is gone does not count.
        before += usize::from(node < own && world.nodes.contains_key(node));
    }
    announces.then_some(before)
}

async fn turn(
    shared: &Shared,
    client: &Client,
    rank: usize,
    there: &mut Option<(Instant, BTreeMap<Name, Written>)>,
    suspects: &mut BTreeSet<Name>,
) -> Result<(), String> {
    let is_stale = |(read, _): &(Instant, _)| read.elapsed() >= AGAIN;
    if rank > 0 || there.as_ref().is_none_or(is_stale) {
        *there = Some((Instant::now(), read(client).await?));
    }
    let Some((_, there)) = there else { return Ok(()) };
    let wanted = wanted(shared);
    there.retain(|name, _| wanted.contains_key(name));
    let nodes = shared.worlds.borrow().nodes.len().max(1);
    let mut left = (EVENTS / nodes).clamp(1, AT_ONCE);
    let before = std::mem::take(suspects);
    for (name, wanted) in &wanted {
        let written = there.entry(name.clone()).or_default();
        if !differs(written, wanted, rank > 0) {
            continue;
        }
        if rank > 0 && !before.contains(name) {
            suspects.insert(name.clone());
            continue;
        }
        if left == 0 {
            // The rest at the next turn.
            shared.conditions.notify_one();
            break;
        }
        left -= 1;
        let conditions = rendered(written, wanted, Timestamp::now());
        write(client, name, &conditions).await?;
        written.conditions = conditions;
    }
    Ok(())
}

/// What every policy's status is to say.
fn wanted(shared: &Shared) -> BTreeMap<Name, Wanted> {
    let world = shared.worlds.borrow().clone();
    let faults: HashMap<&str, &str> =
        world.problems.iter().map(|p| (&*p.subject, &*p.message)).collect();
    let reach = reach(&world);
    let in_force: HashMap<&PolicyName, &Policy> =
        world.policies.policies.iter().map(|policy| (&policy.name, &**policy)).collect();
    let mut wanted = BTreeMap::new();
    let stores = shared.stores();
    for (kind, store) in shared.kinds.iter().zip(stores.iter()) {
        let Some((own, _)) = POLICIES.into_iter().find(|(own, _)| *own == kind.kind) else {
            continue;
        };
        for (namespace, name, generation) in store.generations() {
            let slash = if namespace.is_empty() { "" } else { "/" };
            let fault = faults.get(&*format!("{own} {namespace}{slash}{name}"));
            let policy =
                PolicyName { kind: own.into(), namespace: namespace.into(), name: name.into() };
            let in_force = in_force.get(&policy).copied();
            let reach = reach.get(&policy).copied().unwrap_or_default();
            let conditions = conditions(&world, in_force, fault.copied(), reach);
            let name = (own, namespace.to_owned(), name.to_owned());
            wanted.insert(name, Wanted { generation, conditions });
        }
    }
    wanted
}

/// How far a policy gets: it selects a pod, one that is enrolled, one that is served.
#[derive(Clone, Copy, Default)]
struct Reach {
    selects: bool,
    enrolled: bool,
    served: bool,
}

fn reach(world: &World) -> HashMap<PolicyName, Reach> {
    let mut by_namespace = HashMap::<&str, Vec<&Pod>>::new();
    for pod in world.pods.values().filter(|pod| !pod.finished) {
        by_namespace.entry(&pod.name.namespace).or_default().push(pod);
    }
    let own = world.policies.policies.iter();
    let own = own.filter(|policy| POLICIES.iter().any(|(kind, _)| *kind == &*policy.name.kind));
    own.map(|policy| {
        let selector = &policy.selector;
        let mut reach = Reach::default();
        let namespaces = by_namespace.iter().filter(|(namespace, _)| {
            selector.namespace.as_deref().is_none_or(|n| n == **namespace)
        });
        for pod in namespaces.flat_map(|(_, pods)| pods) {
            if selector.selects(&pod.name.namespace, &pod.labels) {
                reach.selects = true;
                reach.enrolled |= pod.is_enrolled();
                reach.served |= pod.is_enrolled() && world.served.contains_key(&pod.uid);
            }
            // More than this is not told.
            if reach.served {
                break;
            }
        }
        (policy.name.clone(), reach)
    })
    .collect()
}

fn conditions(
    world: &World,
    in_force: Option<&Policy>,
    fault: Option<&str>,
    reach: Reach,
) -> [Condition; 2] {
    let accepted = match (fault, in_force) {
        (Some(fault), _) => (false, "Malformed", fault.to_owned()),
        (None, Some(policy)) => {
            let accepted = policy.accepted();
            (accepted.status, accepted.reason, accepted.message)
        }
        (None, None) => (false, "NotInForce", "it is not in force".to_owned()),
    };
    let overridden = match world.enforcement {
        Override::Is(Enforcement::Enforce) | Override::Absent => None,
        Override::Is(word) => {
            Some(format!("the ConfigMap signet-enforcement says {}", word.as_str()))
        }
        Override::Unreadable => {
            Some("the ConfigMap signet-enforcement cannot be read; what held last stays".to_owned())
        }
    };
    let enforced = match (in_force, overridden, reach) {
        (None, ..) => (false, "NotInForce", "it is not in force".to_owned()),
        (_, Some(how), _) => (false, "Overridden", how),
        (.., Reach { selects: false, .. }) => {
            (true, "NothingSelected", "no pod is selected".to_owned())
        }
        (.., Reach { enrolled: false, .. }) => (
            false,
            "NotEnforced",
            "no pod that it selects is in permissive or strict; label the namespace \
             signet.dev/mode"
                .to_owned(),
        ),
        (.., Reach { served: false, .. }) => (
            false,
            "NotServed",
            "no agent has announced a pod that it selects; see signet endpoints".to_owned(),
        ),
        _ => (true, "Applied", "in force for the pods that it selects".to_owned()),
    };
    let made = |kind, (status, reason, message): (bool, &'static str, String)| Condition {
        kind,
        status,
        reason,
        message: super::events::shortened(&message, MAX_MESSAGE),
    };
    [made("Accepted", accepted), made("Enforced", enforced)]
}

/// Whether it is to be written. Who only stands in overlooks what another version words
/// otherwise.
fn differs(written: &Written, wanted: &Wanted, stands_in: bool) -> bool {
    wanted.conditions.iter().any(|wanted_one| {
        let found = written.conditions.iter().find(|c| c["type"] == wanted_one.kind);
        found.is_none_or(|found| {
            let is_same = found["status"] == status(wanted_one.status)
                && found["observedGeneration"] == wanted.generation;
            let is_worded = found["reason"] == wanted_one.reason
                && found["message"] == wanted_one.message.as_str();
            !is_same || (!stands_in && !is_worded)
        })
    })
}

/// The conditions as the API has them, others' among them: the time is that of the status' last
/// change.
fn rendered(written: &Written, wanted: &Wanted, now: Timestamp) -> Vec<Value> {
    let one = |condition: &Condition| {
        let before = written.conditions.iter().find(|c| c["type"] == condition.kind);
        let since = before
            .filter(|before| before["status"] == status(condition.status))
            .and_then(|before| before["lastTransitionTime"].as_str())
            .map_or_else(|| format!("{now:.0}"), str::to_owned);
        json!({
            "type": condition.kind, "status": status(condition.status),
            "reason": condition.reason, "message": condition.message,
            "observedGeneration": wanted.generation, "lastTransitionTime": since,
        })
    };
    let is_ours = |c: &Value| wanted.conditions.iter().any(|own| c["type"] == own.kind);
    let others = written.conditions.iter().filter(|c| !is_ours(c)).cloned();
    wanted.conditions.iter().map(one).chain(others).collect()
}

const fn status(is_so: bool) -> &'static str {
    if is_so { "True" } else { "False" }
}

fn api(client: &Client, (kind, plural): (&str, &str), namespace: &str) -> Api<DynamicObject> {
    let gvk = GroupVersionKind::gvk("signet.dev", "v1alpha1", kind);
    let resource = ApiResource::from_gvk_with_plural(&gvk, plural);
    match namespace {
        "" => Api::all_with(client.clone(), &resource),
        namespace => Api::namespaced_with(client.clone(), namespace, &resource),
    }
}

/// What all statuses say.
async fn read(client: &Client) -> Result<BTreeMap<Name, Written>, String> {
    let mut found = BTreeMap::new();
    for (kind, plural) in POLICIES {
        let api = api(client, (kind, plural), "");
        let mut params = ListParams::default().limit(PAGE);
        loop {
            let page = in_time(api.list(&params)).await?;
            for object in page.items {
                let conditions =
                    object.data.pointer("/status/conditions").and_then(Value::as_array);
                let written = Written { conditions: conditions.cloned().unwrap_or_default() };
                let metadata = object.metadata;
                let place =
                    (metadata.namespace.unwrap_or_default(), metadata.name.unwrap_or_default());
                found.insert((kind, place.0, place.1), written);
            }
            match page.metadata.continue_.filter(|token| !token.is_empty()) {
                Some(token) => params = params.continue_token(&token),
                None => break,
            }
        }
    }
    Ok(found)
}

async fn write(client: &Client, name: &Name, conditions: &[Value]) -> Result<(), String> {
    let (kind, namespace, name) = name;
    let plural = POLICIES.iter().find(|(own, _)| own == kind).map_or("", |(_, plural)| plural);
    let patch = json!({"status": {"conditions": conditions}});
    let params = PatchParams { field_manager: Some(MANAGER.into()), ..PatchParams::default() };
    let api = api(client, (kind, plural), namespace);
    let patch = Patch::Merge(&patch);
    let written = time::timeout(CALL_TIMEOUT, api.patch_status(name, &params, &patch)).await;
    match written {
        Ok(Ok(_)) => Ok(()),
        // It went meanwhile.
        Ok(Err(kube::Error::Api(status))) if status.code == 404 => Ok(()),
        Ok(Err(error)) => Err(error.to_string()),
        Err(_) => Err(format!("no answer within {CALL_TIMEOUT:?}")),
    }
}

async fn in_time<T>(call: impl Future<Output = Result<T, kube::Error>>) -> Result<T, String> {
    match time::timeout(CALL_TIMEOUT, call).await {
        Ok(Ok(answer)) => Ok(answer),
        Ok(Err(error)) => Err(error.to_string()),
        Err(_) => Err(format!("no answer within {CALL_TIMEOUT:?}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wanted(status: bool, message: &str) -> Wanted {
        let one = |kind| Condition { kind, status, reason: "Accepted", message: message.into() };
        Wanted { generation: 3, conditions: [one("Accepted"), one("Enforced")] }
    }

    #[test]
    fn the_time_is_that_of_the_last_change_of_status() {
        let first: Timestamp = "2026-08-06T10:00:00Z".parse().unwrap();
        let later: Timestamp = "2026-08-06T11:00:00Z".parse().unwrap();
        let written =
            Written { conditions: rendered(&Written::default(), &wanted(true, "a"), first) };
        assert_eq!(written.conditions[0]["lastTransitionTime"], "2026-08-06T10:00:00Z");
        let worded = rendered(&written, &wanted(true, "b"), later);
        assert_eq!(worded[0]["lastTransitionTime"], "2026-08-06T10:00:00Z");
        assert_eq!(
            (&worded[0]["message"], &worded[0]["observedGeneration"]),
            (&"b".into(), &3.into())
        );
        let turned = rendered(&written, &wanted(false, "b"), later);
        assert_eq!(turned[1]["lastTransitionTime"], "2026-08-06T11:00:00Z");
    }

    #[test]
    fn conditions_of_others_stay_and_are_no_news() {
        let now: Timestamp = "2026-08-06T10:00:00Z".parse().unwrap();
        let foreign = json!({"type": "Synced", "status": "True"});
        let mut written = Written { conditions: vec![foreign.clone()] };
        written.conditions = rendered(&written, &wanted(true, "a"), now);
        assert_eq!((written.conditions.len(), &written.conditions[2]), (3, &foreign));
        assert!(!differs(&written, &wanted(true, "a"), false));
        assert!(differs(&written, &wanted(false, "a"), false));
    }

    #[test]
    fn a_stand_in_overlooks_other_words_but_no_other_state() {
        let now: Timestamp = "2026-08-06T10:00:00Z".parse().unwrap();
        let written =
            Written { conditions: rendered(&Written::default(), &wanted(true, "a"), now) };
        for stands_in in [false, true] {
            assert!(!differs(&written, &wanted(true, "a"), stands_in));
            assert!(differs(&written, &wanted(false, "a"), stands_in));
            let newer = Wanted { generation: 4, ..wanted(true, "a") };
            assert!(differs(&written, &newer, stands_in));
            assert!(differs(&Written::default(), &wanted(true, "a"), stands_in));
            assert_eq!(differs(&written, &wanted(true, "b"), stands_in), !stands_in);
        }
    }
}
