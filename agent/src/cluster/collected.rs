//! What every source gathers before a World is assembled of it.

use std::{collections::HashMap, sync::Arc};

use super::{enrolment::Announcement, manifest::Object, model::PodUid, objects::Objects};
use crate::policy::{end_user::RequestAuthentication, istio::PeerAuthentication, model::Policy};

/// Objects of all files, or of all watches.
#[derive(Debug, Default)]
pub(super) struct Collected {
    pub(super) objects: Objects,
    pub(super) policies: Vec<Arc<Policy>>,
    pub(super) peer_authentications: Vec<Arc<PeerAuthentication>>,
    pub(super) request_authentications: Vec<Arc<RequestAuthentication>>,
}

impl Collected {
    pub(super) fn add(&mut self, object: &Object) {
        let objects = &mut self.objects;
        match object {
            Object::Namespace(o) => objects.namespaces.push(o.clone()),
            Object::ServiceAccount(name) => objects.service_accounts.push(name.clone()),
            Object::Pod(o) => objects.pods.push(o.clone()),
            Object::Service(o) => objects.services.push(o.clone()),
            Object::Slice(_, o) => objects.slices.push(o.clone()),
            Object::Node(o) => objects.nodes.push(o.clone()),
            Object::Ranges(o) => objects.ranges.push(o.clone()),
            Object::NetworkPolicy(o) => objects.network_policies.push(o.clone()),
            Object::Called(o) => objects.called.push(o.clone()),
            Object::Policy(o) => self.policies.push(o.clone()),
            Object::PeerAuthentication(o) => self.peer_authentications.push(o.clone()),
            Object::RequestAuthentication(o) => self.request_authentications.push(o.clone()),
        }
    }

    pub(super) fn sort(&mut self) {
        self.objects.pods.sort_by(|a, b| a.uid.cmp(&b.uid));
        self.objects.slices.sort_by(|a, b| a.service.cmp(&b.service));
        self.objects.nodes.sort_by(|a, b| a.name.cmp(&b.name));
    }
}

/// Who claims to serve each pod. Two nodes may claim one pod; the one that it is bound to is
/// meant.
pub(super) fn claims<'a>(
    board: impl Iterator<Item = &'a Announcement>,
    objects: &Objects,
) -> HashMap<PodUid, Arc<str>> {
    let bound: HashMap<_, _> = objects.pods.iter().map(|p| (&p.uid, p.node.as_ref())).collect();
    let mut claims: HashMap<_, Arc<str>> = HashMap::new();
    for announcement in board {
        for uid in announcement.served.keys() {
            let is_bound = bound.get(uid).copied().flatten() == Some(&announcement.node);
            if is_bound || !claims.contains_key(uid) {
                claims.insert(uid.clone(), announcement.node.clone());
            }
        }
    }
    claims
}
