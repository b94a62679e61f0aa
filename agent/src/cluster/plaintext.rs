//! PeerAuthentications over pods: pure.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::Arc,
};

use super::{
    model::{ExemptPort, ModeOrigin, Namespace, Pod, PodUid},
    modes::mode_name,
};
use crate::policy::{
    istio::{PeerAuthentication, apply, resolve},
    model::{Policy, PolicyName, Remark},
};
use signet_ebpf::abi::proto;

/// Every PeerAuthentication, by name.
pub struct Plaintext<'a> {
    objects: Vec<Arc<PeerAuthentication>>,
    root: &'a str,
}

impl<'a> Plaintext<'a> {
    /// Over all objects; `root` is the mesh's root namespace.
    pub fn new(mut objects: Vec<Arc<PeerAuthentication>>, root: &'a str) -> Self {
        objects.sort_by(|a, b| a.name.cmp(&b.name));
        Self { objects, root }
    }

    /// Gives every pod its mode, its exempt and its strict ports under the objects. Returns
    /// the objects with what became of them, and the policies that pods now carry.
    pub fn apply(
        self,
        namespaces: &BTreeMap<Arc<str>, (Namespace, ModeOrigin)>,
        pods: &mut HashMap<PodUid, Pod>,
    ) -> (Vec<Arc<PeerAuthentication>>, Vec<Arc<Policy>>) {
        let mut said: BTreeMap<PolicyName, BTreeSet<String>> = BTreeMap::new();
        let mut carried: BTreeMap<PolicyName, Vec<Arc<Policy>>> = BTreeMap::new();
        let mut of: HashMap<&str, Vec<&PeerAuthentication>> = HashMap::new();
        for object in &self.objects {
            of.entry(&object.name.namespace).or_default().push(object);
            if !object.ignored
                && let Some(remark) = self.enrols_nothing(object, namespaces)
            {
                said.entry(object.name.clone()).or_default().insert(remark);
            }
        }
        for pod in pods.values_mut() {
            let space = &pod.name.namespace;
            let mesh = if **space == *self.root { None } else { of.get(self.root) };
            let objects: Vec<_> =
                [of.get(&**space), mesh].into_iter().flatten().flatten().copied().collect();
            if objects.is_empty() {
                continue;
            }
            let demands = resolve(objects, self.root, space, &pod.labels);
            let may_loosen = namespaces.get(space).is_some_and(|(n, _)| n.allow_pod_override);
            let tcp = |port: &&ExemptPort| port.protocol == proto::TCP;
            let exempt = pod.exempt_ports.iter().filter(tcp).map(|port| port.port).collect();
            let applied = apply(&demands, pod.mode, may_loosen, &exempt);
            if applied.mode != pod.mode {
                pod.mode = applied.mode;
                pod.mode_origin = ModeOrigin::PeerAuthentication;
            }
            if !applied.exempt.is_empty() {
                let more = applied.exempt.iter();
                let more = more.map(|port| ExemptPort { port: *port, protocol: proto::TCP });
                let all: BTreeSet<_> = pod
                    .exempt_ports
                    .iter()
                    .copied()
                    .chain(more)
                    .map(|p| (p.port, p.protocol))
                    .collect();
                pod.exempt_ports =
                    all.into_iter().map(|(port, protocol)| ExemptPort { port, protocol }).collect();
            }
            if let Some(policy) = applied.strict_ports {
                // Pods with the same ports share one policy.
                let known = carried.entry(policy.name.clone()).or_default();
                let shared = known.iter().find(|known| **known == policy).cloned();
                pod.strict_ports = Some(shared.unwrap_or_else(|| {
                    known.push(policy.clone());
                    policy
                }));
            }
            for (name, message) in applied.ignored {
                let message = format!("pods of namespace {space}: {message}");
                said.entry(name).or_default().insert(message);
            }
        }
        let objects = self
            .objects
            .iter()
            .map(|object| match said.remove(&object.name) {
                None => object.clone(),
                Some(messages) => {
                    let mut object = PeerAuthentication::clone(object);
                    object.remarks.extend(messages.into_iter().map(|message| Remark {
                        line: 0,
                        field: "".into(),
                        message: message.into(),
                        is_fault: true,
                    }));
                    Arc::new(object)
                }
            })
            .collect();
        (objects, carried.into_values().flatten().collect())
    }

    /// In a namespace that is not enforced it enrols nothing, and says so.
    fn enrols_nothing(
        &self,
        object: &PeerAuthentication,
        namespaces: &BTreeMap<Arc<str>, (Namespace, ModeOrigin)>,
    ) -> Option<String> {
        let space = &object.name.namespace;
        if **space == *self.root {
            return None;
        }
        let mode = namespaces.get(space).map(|(namespace, _)| namespace.mode);
        let mode = mode.unwrap_or_default();
        (!mode.is_enforced()).then(|| {
            format!(
                "namespace {space} is in mode {}, and a PeerAuthentication enrols nothing: label \
                 the Namespace signet.dev/mode: permissive or strict",
                mode_name(mode)
            )
        })
    }
}
