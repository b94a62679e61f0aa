//! The keys of the issuers whose tokens this node's pods take.

use std::{collections::BTreeSet, path::PathBuf, sync::Arc};

use tokio::sync::watch;

use crate::{
    endpoint::state::{NodeState, NodeStateHandle},
    trust::{
        Trust,
        issuers::{Place, Rhythm, run},
    },
};

/// Follows the keys that the node's endpoints want, until the node's state ends.
pub(super) async fn follow(state: NodeStateHandle, trust: Arc<Trust>, roots: Option<PathBuf>) {
    let mut changes = state.subscribe();
    let (sender, wanted) = watch::channel(places(&state.current()));
    let telling = async {
        while changes.changed().await.is_ok() {
            let newer = places(&state.current());
            sender.send_if_modified(|old| {
                let changed = *old != newer;
                *old = newer;
                changed
            });
        }
    };
    tokio::select! {
        () = telling => {}
        () = run(trust.issuers().clone(), wanted, roots, Rhythm::default()) => {}
    }
}

fn places(state: &NodeState) -> BTreeSet<Place> {
    let objects = state.endpoints.values().flat_map(|e| e.request_authentications.iter());
    objects.flat_map(|object| &object.rules).filter_map(|rule| Place::of(&rule.keys)).collect()
}
