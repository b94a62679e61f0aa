//! `signet identities`, assembled: SPIFFE ID ↔ number in this node's kernel, and whose it is.

use std::collections::HashMap;

use jiff::Timestamp;

use super::{
    endpoints,
    inputs::{StatusInputs, SvidFacts},
};
use crate::{
    proto::admin::{KnownIdentity, ListIdentitiesResponse},
    spiffe::SpiffeId,
};

/// Identities in one part.
const PART: usize = 256;
/// Pods of this node that are named of one identity; more are not.
const MOST_PODS: usize = 1000;

/// The answer for a moment, by identity, in parts.
pub fn assemble(inputs: &StatusInputs, now: Timestamp) -> Vec<ListIdentitiesResponse> {
    let Some(state) = &inputs.state else { return Vec::new() };
    let mut here = HashMap::<&SpiffeId, Vec<String>>::new();
    for endpoint in state.endpoints.values() {
        let name = &endpoint.pod.name;
        let pods = here.entry(&endpoint.identity).or_default();
        pods.push(format!("{}/{}", name.namespace, name.name));
    }
    // By account: identities of other trust domains are nobody's in this cluster.
    let mut elsewhere = HashMap::<(&str, &str), u32>::new();
    let others = state.world.pods.values().filter(|pod| {
        !pod.finished && pod.node.as_deref().is_some_and(|node| *node != *inputs.node)
    });
    for pod in others {
        let account = (&*pod.name.namespace, &*pod.service_account);
        *elsewhere.entry(account).or_default() += 1;
    }
    let svids: HashMap<&SpiffeId, &SvidFacts> = inputs.svids.iter().map(|s| (&s.id, s)).collect();
    let mut all: Vec<(&u32, &SpiffeId)> = state.identities.iter().collect();
    all.sort_by(|a, b| a.1.as_str().cmp(b.1.as_str()));
    let one = |(number, id): &(&u32, &SpiffeId)| {
        let mut pods = here.get(id).cloned().unwrap_or_default();
        pods.sort();
        pods.truncate(MOST_PODS);
        let is_own = id.trust_domain().as_str() == &*inputs.issuer.trust_domain;
        let account = id.workload().filter(|_| is_own);
        let svid = svids.get(id).map(|facts| endpoints::svid_of(facts, now));
        KnownIdentity {
            identity: id.to_string(),
            number: **number,
            pods,
            elsewhere: account.and_then(|a| elsewhere.get(&a)).copied().unwrap_or(0),
            svid: svid.as_ref().map(|s| s.state.clone()).unwrap_or_default(),
            svid_not_after: svid.as_ref().and_then(|s| s.not_after),
            svid_error: svid.map(|s| s.error).unwrap_or_default(),
        }
    };
    super::parted(&all, PART)
        .map(|part| ListIdentitiesResponse {
            node: inputs.node.to_string(),
            identities: part.iter().map(one).collect(),
        })
        .collect()
}
