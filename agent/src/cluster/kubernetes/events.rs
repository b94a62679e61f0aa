//! Events where people look: on this node's pods that cannot be enforced or whose labels are
//! ignored, and on namespaces and policies with faults.
//!
//! Each node speaks of its own pods. Of what concerns every node the one speaks that comes
//! first by name: there is no leader among agents, and five thousand equal events help nobody.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use k8s_openapi::api::core::v1::ObjectReference;
use kube::{
    Client,
    runtime::events::{Event, EventType, Recorder, Reporter},
};

use super::{Shared, client::CALL_TIMEOUT};
use crate::cluster::{
    model::{Pod, World},
    modes::mode_name,
};

/// What could not be told is tried again this often.
const RETRY: Duration = Duration::from_secs(30);
/// Events told at one turn; the others wait for the next.
const AT_ONCE: usize = 20;
/// Turns are at least so far apart.
const APART: Duration = Duration::from_secs(1);
/// Bytes of an event's note that the API server takes.
const MAX_NOTE: usize = 1000;

/// Something to tell of an object.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
struct Note {
    api_version: &'static str,
    kind: String,
    namespace: String,
    name: String,
    uid: String,
    reason: &'static str,
    message: String,
}

/// Tells events as Worlds come, for ever.
pub(super) async fn run(shared: Arc<Shared>, client: Client) {
    let reporter = Reporter {
        controller: "signet-agent".into(),
        instance: Some(shared.params.node.to_string()),
    };
    let recorder = Recorder::new(client, reporter);
    let mut told = BTreeSet::new();
    let mut failed = false;
    loop {
        let world = shared.worlds.borrow().clone();
        let notes = notes(&world, &shared.params.node, &|kind, namespace, name| {
            let stores = shared.stores();
            let kinds = shared.kinds.iter().zip(stores.iter());
            let mut found = kinds.filter(|(of, _)| of.kind == kind);
            found.find_map(|(_, store)| store.uid(namespace, name).map(str::to_owned))
        });
        // What is no longer so may be so again later, and is told then.
        told.retain(|note| notes.contains(note));
        let new: Vec<Note> = notes.difference(&told).take(AT_ONCE).cloned().collect();
        let is_all = new.len() < AT_ONCE;
        let mut is_told = true;
        for note in new {
            match tell(&recorder, &note).await {
                Ok(()) => drop(told.insert(note)),
                Err(error) => {
                    if !failed {
                        tracing::warn!(%error, "events are not written; trying again");
                    }
                    is_told = false;
                    break;
                }
            }
        }
        failed = !is_told;
        tokio::time::sleep(APART).await;
        let rest = if is_told && is_all { Duration::from_secs(3600) } else { RETRY };
        // A receiver of Worlds would keep the source alive.
        let _ = tokio::time::timeout(rest, shared.published.notified()).await;
    }
}

async fn tell(recorder: &Recorder, note: &Note) -> Result<(), String> {
    let event = Event {
        type_: EventType::Warning,
        reason: note.reason.into(),
        note: Some(shortened(&note.message, MAX_NOTE)),
        action: "Enforcing".into(),
        secondary: None,
    };
    let reference = ObjectReference {
        api_version: Some(note.api_version.into()),
        kind: Some(note.kind.clone()),
        namespace: Some(note.namespace.clone()).filter(|namespace| !namespace.is_empty()),
        name: Some(note.name.clone()),
        uid: Some(note.uid.clone()),
        ..ObjectReference::default()
    };
    match tokio::time::timeout(CALL_TIMEOUT, recorder.publish(&event, &reference)).await {
        Ok(Ok(())) => Ok(()),
        Ok(Err(error)) => Err(error.to_string()),
        Err(_) => Err(format!("no answer within {CALL_TIMEOUT:?}")),
    }
}

/// At most so many bytes of it.
pub(super) fn shortened(text: &str, most: usize) -> String {
    let end = (0..=text.len().min(most)).rev().find(|at| text.is_char_boundary(*at));
    text[..end.unwrap_or(0)].to_owned()
}

/// What there is to tell on this node. `uid` knows objects by kind, namespace and name.
fn notes(
    world: &World,
    node: &str,
    uid: &dyn Fn(&str, &str, &str) -> Option<String>,
) -> BTreeSet<Note> {
    let mut notes = BTreeSet::new();
    let own = |pod: &&Arc<Pod>| pod.node.as_deref() == Some(node) && !pod.finished;
    for pod in world.pods.values().filter(own) {
        if let Some(why) = &pod.unenforceable
            && pod.mode.is_enforced()
        {
            notes.insert(Note {
                api_version: "v1",
                kind: "Pod".into(),
                namespace: pod.name.namespace.to_string(),
                name: pod.name.name.to_string(),
                uid: pod.uid.to_string(),
                reason: "Unenforceable",
                message: format!(
                    "its mode is {}, which cannot be enforced: {why}",
                    mode_name(pod.mode)
                ),
            });
        }
    }
    let is_first = world.nodes.keys().next().is_some_and(|first| &**first == node);
    for problem in &world.problems {
        let Some((kind, name)) = problem.subject.split_once(' ') else { continue };
        let (namespace, name) = name.split_once('/').unwrap_or(("", name));
        let (api_version, kind, reason) = match kind {
            "pod" if !problem.message.starts_with("unenforceable") => {
                let here = world.pods.values().filter(own);
                let mut here =
                    here.filter(|pod| &*pod.name.namespace == namespace && &*pod.name.name == name);
                if here.next().is_none() {
                    continue;
                }
                ("v1", "Pod", "LabelIgnored")
            }
            "namespace" if is_first => ("v1", "Namespace", "LabelIgnored"),
            "IdentityPolicy" | "ClusterIdentityPolicy" if is_first => {
                ("signet.dev/v1alpha1", kind, "NotAccepted")
            }
            _ => continue,
        };
        let Some(uid) = uid(kind, namespace, name) else { continue };
        notes.insert(Note {
            api_version,
            kind: kind.into(),
            namespace: namespace.into(),
            name: name.into(),
            uid,
            reason,
            message: problem.message.clone(),
        });
    }
    notes
}
