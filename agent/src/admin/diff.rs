//! What other policies would change: the flows that were seen, judged under both sets by what
//! `signet policy check` asks.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
};

use jiff::Timestamp;

use super::{edges::end, inputs::StatusInputs, policies::Unanswered};
use crate::{
    cluster::{
        manifest::{self, Object},
        model::{ObjectName, World},
    },
    endpoint::{
        check::{self, Answer, From, Question, Setting},
        state::NodeState,
    },
    flow::{
        edges::{Edge, Edges, End},
        record::{Reporter, Via},
    },
    policy::model::{Policy, PolicySet},
    proto::{
        self,
        admin::{ChangedEdge, DiffPoliciesRequest, DiffPoliciesResponse, EdgeVerdict},
    },
    spiffe::SpiffeId,
    telemetry::{names, reason},
};

/// The most text of manifests, bytes.
const MOST_TEXT: usize = 1 << 20;
/// The most flows that are judged for one question; each is two verdicts.
const MOST: usize = 4_000;

/// What is judged: the flows that were seen under one of these.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
struct Case {
    source: End,
    destination: End,
    port: u16,
    protocol: u8,
    plaintext: bool,
}

/// Answers over the world that is applied on this node and what its pods received.
///
/// # Errors
///
/// Manifests that cannot be read or hold anything but policies; an agent without a world.
pub fn answer(
    inputs: &StatusInputs,
    edges: &Edges,
    request: &DiffPoliciesRequest,
) -> Result<DiffPoliciesResponse, Unanswered> {
    let state = inputs.state.as_ref().ok_or(Unanswered::Early)?;
    let proposed = read(&request.manifests, &request.root_namespace)?;
    let after = with_policies(&state.world, proposed);
    let setting = Setting::of(state);
    let mut response = DiffPoliciesResponse { node: inputs.node.to_string(), ..Default::default() };
    let cases = cases(edges, request);
    for (n, (case, (count, last))) in cases.iter().enumerate() {
        let questions = if n < MOST { questions(state, case) } else { Vec::new() };
        let mut is_judged = false;
        // The pods of one account may carry different labels: the first that changes is told.
        for question in questions {
            let judged = |world| check::check(world, &setting, &question);
            let (Ok(before), Ok(after)) = (judged(&state.world), judged(&after)) else { continue };
            is_judged = true;
            if before.verdict == after.verdict && before.reason == after.reason {
                continue;
            }
            response.changes.push(ChangedEdge {
                source: Some(end(&case.source)),
                destination: Some(end(&case.destination)),
                pod: question.to.name.to_string(),
                port: case.port.into(),
                protocol: case.protocol.into(),
                before: Some(verdict(&before)),
                after: Some(verdict(&after)),
                count: *count,
                last_seen: Some(proto::timestamp(*last)),
            });
            break;
        }
        if is_judged {
            response.judged += 1;
        } else {
            response.unjudged += 1;
        }
    }
    Ok(response)
}

/// The policies of the text; nothing else may be in it.
fn read(text: &str, root: &str) -> Result<Vec<Arc<Policy>>, Unanswered> {
    if text.len() > MOST_TEXT {
        return Err(Unanswered::Question(format!(
            "the manifests are {} bytes long, the most is {MOST_TEXT}: ask about fewer policies",
            text.len()
        )));
    }
    let manifest = manifest::read("manifests", text, root)
        .map_err(|fault| Unanswered::Question(fault.to_string()))?;
    manifest.objects.into_iter().map(|(line, object)| policy_of(line, object)).collect()
}

fn policy_of(line: u64, object: Object) -> Result<Arc<Policy>, Unanswered> {
    match object {
        Object::Policy(policy) => Ok(policy),
        other => {
            let (kind, ..) = other.identity();
            Err(Unanswered::Question(format!(
                "line {line}: a {kind} is no policy of flows; give IdentityPolicies, \
                 ClusterIdentityPolicies and AuthorizationPolicies only"
            )))
        }
    }
}

/// The world with these policies, each in place of the one of its name, if there is one.
fn with_policies(world: &World, proposed: Vec<Arc<Policy>>) -> World {
    let mut policies = world.policies.policies.clone();
    for policy in proposed {
        match policies.iter_mut().find(|p| p.name == policy.name) {
            Some(old) => *old = policy,
            None => policies.push(policy),
        }
    }
    let set = PolicySet { policies, ..PolicySet::clone(&world.policies) };
    World { policies: Arc::new(set), ..world.clone() }
}

/// What arrived, by what decides about it; the most frequent first.
fn cases(edges: &Edges, request: &DiffPoliciesRequest) -> Vec<(Case, (u64, Timestamp))> {
    let since = request.since.as_ref().and_then(proto::time);
    let wanted = |edge: &Edge| {
        edge.reporter == Reporter::Destination
            && (request.namespace.is_empty()
                || edge.destination.namespace() == Some(&*request.namespace))
    };
    let found =
        edges.select(|edge, seen| wanted(edge) && since.is_none_or(|since| seen.last >= since));
    let mut cases: HashMap<Case, (u64, Timestamp)> = HashMap::new();
    for (edge, seen) in found {
        let case = Case {
            plaintext: edge.via == Via::Plaintext,
            source: edge.source,
            destination: edge.destination,
            port: edge.port,
            protocol: edge.protocol,
        };
        let (count, last) = cases.entry(case).or_insert((0, seen.last));
        *count = count.saturating_add(seen.count);
        *last = seen.last.max(*last);
    }
    // The same order each time.
    let mut cases: Vec<_> = cases.into_iter().collect();
    cases.sort_by_cached_key(|(case, (count, _))| {
        (u64::MAX - count, case.source.clone(), case.destination.clone(), case.port, case.protocol)
    });
    cases
}

/// The questions that a case stands for: one a pod of the account on this node.
fn questions(state: &NodeState, case: &Case) -> Vec<Question> {
    let End::Workload { namespace, account } = &case.destination else { return Vec::new() };
    let Some(from) = source(state, &case.source) else { return Vec::new() };
    let pods: BTreeMap<&Arc<str>, &ObjectName> = state
        .endpoints
        .values()
        .map(|endpoint| &endpoint.pod)
        .filter(|pod| pod.name.namespace == *namespace && pod.service_account == *account)
        .map(|pod| (&pod.name.name, &pod.name))
        .collect();
    pods.into_values()
        .map(|to| Question {
            from: from.clone(),
            to: to.clone(),
            port: case.port,
            protocol: case.protocol,
            plaintext: case.plaintext,
            request: None,
        })
        .collect()
}

fn source(state: &NodeState, end: &End) -> Option<From> {
    match end {
        End::Workload { namespace, account } => {
            let domain = &state.world.trust_domain;
            let id = SpiffeId::for_service_account(domain, namespace, account).ok()?;
            Some(From { identity: Some(id), address: None })
        }
        End::Identity(id) => Some(From { identity: Some(id.clone()), address: None }),
        // The network's first address stands for all of it.
        End::Network(network) => Some(From { identity: None, address: Some(network.addr()) }),
        End::Others => None,
    }
}

fn verdict(answer: &Answer) -> EdgeVerdict {
    EdgeVerdict {
        verdict: names::verdict(answer.verdict).into(),
        reason: reason::name(answer.reason).into(),
        policy: answer.policy().map(ToString::to_string).unwrap_or_default(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{flow::example, spiffe::TrustDomain};

    const POLICY: &str = "\
apiVersion: signet.dev/v1alpha1
kind: IdentityPolicy
metadata: {name: NAME, namespace: shop}
spec: {ingress: []}
";

    fn policies(names: &[&str]) -> Vec<Arc<Policy>> {
        let texts: Vec<String> = names.iter().map(|name| POLICY.replace("NAME", name)).collect();
        read(&texts.join("---\n"), "istio-system").unwrap()
    }

    #[test]
    fn only_policies_of_a_bounded_size_are_read() {
        assert_eq!(policies(&["one", "two"]).len(), 2);
        let refused = |text: &str| read(text, "istio-system").unwrap_err().to_string();
        let error = refused("apiVersion: v1\nkind: Namespace\nmetadata: {name: shop}\n");
        assert!(error.contains("line 1") && error.contains("Namespace"), "{error}");
        let error = refused(&POLICY.replace("NAME", "one").replace("ingress", "ingres"));
        assert!(error.contains("ingres"), "{error}");
        assert!(refused(&"#".repeat(MOST_TEXT + 1)).contains("fewer policies"));
    }

    #[test]
    fn a_policy_replaces_the_one_of_its_name_and_leaves_the_others() {
        let mut world = World::empty(TrustDomain::parse("cluster.local").unwrap());
        world.policies = Arc::new(PolicySet::new(policies(&["one", "two"])));
        let mut changed = Policy::clone(&policies(&["two"])[0]);
        changed.dry_run = true;
        let changed = Arc::new(changed);
        let after = with_policies(&world, [vec![changed.clone()], policies(&["three"])].concat());
        let names: Vec<&str> = after.policies.policies.iter().map(|p| &*p.name.name).collect();
        assert_eq!(names, ["one", "two", "three"]);
        assert_eq!(after.policies.policies[1], changed);
        assert_eq!(world.policies.policies.len(), 2, "the world in force is another");
    }

    #[test]
    fn flows_that_one_verdict_decides_are_one_case() {
        let edges = Edges::default();
        for record in [example::allowed(), example::allowed(), example::denied()] {
            edges.record(&record);
        }
        let request = DiffPoliciesRequest::default();
        let found = cases(&edges, &request);
        let counts: Vec<u64> = found.iter().map(|(_, (count, _))| *count).collect();
        assert_eq!(counts, [2, 1]);
        let elsewhere = DiffPoliciesRequest { namespace: "legacy".into(), ..request };
        assert!(cases(&edges, &elsewhere).is_empty());
    }
}
