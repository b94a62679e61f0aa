//! `signet policy`, assembled: what is in force, and what would become of a flow.

use std::{
    collections::{BTreeSet, HashMap},
    sync::Arc,
};

use signet_ebpf::abi::{Direction, Mode, enforcement, proto};

use super::inputs::StatusInputs;
use crate::{
    cluster::{builtins::called_endpoints, model::World},
    config::values::Builtin,
    endpoint::{
        check::{self, Answer, Setting, Side},
        state::{EndpointState, NodeState},
    },
    policy::{
        builtin,
        end_user::RequestAuthentication,
        explain::PolicyStep,
        istio::{Mtls, PeerAuthentication},
        model::{Accepted, Action, Policy, PolicyName, Rule, Selector},
    },
    proto::admin,
    telemetry::{names, reason},
};

/// Every policy with its conditions.
pub fn list(inputs: &StatusInputs, hits: &HashMap<PolicyName, u64>) -> admin::ListPoliciesResponse {
    let node = inputs.node.to_string();
    let Some(state) = &inputs.state else {
        return admin::ListPoliciesResponse { node, ..Default::default() };
    };
    let hits = |name: &PolicyName| hits.get(name).copied().unwrap_or(0);
    let world = &state.world;
    let mut policies: Vec<_> =
        world.policies.policies.iter().map(|p| policy(state, p, hits(&p.name))).collect();
    policies.extend(
        world.peer_authentications.iter().map(|p| peer_authentication(state, p, hits(&p.name))),
    );
    let tokens = &world.policies.request_authentications;
    policies.extend(tokens.iter().map(|p| request_authentication(state, p, hits(&p.name))));
    policies.extend(
        Builtin::ALL.map(|which| builtin(state, which, hits(&builtin::name(which.as_str())))),
    );
    admin::ListPoliciesResponse { node, revision: state.revision, policies }
}

fn policy(state: &NodeState, policy: &Arc<Policy>, hits: u64) -> admin::PolicyInForce {
    let selected =
        || state.endpoints.values().filter(|e| e.policies.iter().any(|p| p.name == policy.name));
    let directions = [(Direction::Ingress, "ingress"), (Direction::Egress, "egress")];
    admin::PolicyInForce {
        action: action(policy.action).into(),
        directions: directions
            .iter()
            .filter(|(direction, _)| policy.governs(*direction))
            .map(|(_, name)| (*name).into())
            .collect(),
        selects: selects(&policy.selector),
        dry_run: policy.dry_run,
        pods: count(selected().count()),
        conditions: vec![accepted(policy.accepted()), enforced(state, selected())],
        ..named(&policy.name, hits)
    }
}

/// The most places that are told of what a built-in allows.
const MOST_PLACES: usize = 32;

/// A built-in: in force or removed, and what it allows.
fn builtin(state: &NodeState, which: Builtin, hits: u64) -> admin::PolicyInForce {
    let made = state.builtins.policy(which, &state.world);
    let in_force = state.builtins.has(which);
    let selected = || state.endpoints.values().filter(|e| in_force && e.mode != Mode::Off);
    let allows = match which {
        Builtin::Dns => format!("allows DNS to the pod's own resolvers: {}", places(&made)),
        Builtin::KubeletProbes => {
            "allows what the node's own kubelet (probeCgroups) dials: probes".into()
        }
        Builtin::Webhooks => {
            format!("allows plaintext to what the API server calls: {}", calls(&state.world))
        }
    };
    let condition = if in_force {
        admin::Condition {
            r#type: "Accepted".into(),
            status: "True".into(),
            reason: "InForce".into(),
            message: allows,
        }
    } else {
        admin::Condition {
            r#type: "Accepted".into(),
            status: "False".into(),
            reason: "Removed".into(),
            message: format!("removed by the key builtins of the configuration; it {allows}"),
        }
    };
    let direction = if made.governs_ingress { "ingress" } else { "egress" };
    admin::PolicyInForce {
        action: action(made.action).into(),
        directions: vec![direction.into()],
        selects: selects(&made.selector),
        pods: count(selected().count()),
        conditions: vec![condition, enforced(state, selected())],
        ..named(&made.name, hits)
    }
}

/// `10.0.0.1:8443/tcp (APIService v1.metrics.k8s.io), …`.
fn calls(world: &World) -> String {
    let mut places: BTreeSet<String> = called_endpoints(world)
        .map(|(who, endpoint)| {
            let at = std::net::SocketAddr::new(endpoint.ip, endpoint.port);
            let who: Vec<&str> = who.iter().map(AsRef::as_ref).collect();
            format!("{at}/tcp ({})", who.join(", "))
        })
        .collect();
    let more = places.len().saturating_sub(MOST_PLACES);
    if places.is_empty() {
        return "no Service of a webhook or an aggregated API has an endpoint".into();
    }
    while places.len() > MOST_PLACES {
        places.pop_last();
    }
    let shown: Vec<String> = places.into_iter().collect();
    match more {
        0 => shown.join(", "),
        more => format!("{} and {more} more", shown.join(", ")),
    }
}

/// `10.96.0.10:53/udp, …`.
fn places(policy: &Policy) -> String {
    let peers = || policy.egress.iter().flat_map(Rule::all_peers);
    let targets = peers().flat_map(|peer| &peer.targets).map(|target| {
        let protocol = if target.protocol == proto::UDP { "udp" } else { "tcp" };
        format!("{}/{protocol}", std::net::SocketAddr::new(target.ip, target.port))
    });
    let addresses = peers().flat_map(|peer| &peer.ip_blocks).map(|block| {
        let at = std::net::SocketAddr::new(block.addr(), builtin::DNS_PORT);
        format!("{at}/udp and tcp")
    });
    let mut all: Vec<String> = targets.chain(addresses).collect();
    if all.is_empty() {
        return "none is known (no Service kube-system/kube-dns); name them in dnsResolvers".into();
    }
    let more = all.len().saturating_sub(MOST_PLACES);
    all.truncate(MOST_PLACES);
    let more = if more == 0 { String::new() } else { format!(" and {more} more") };
    all.join(", ") + &more
}

fn peer_authentication(
    state: &NodeState,
    object: &PeerAuthentication,
    hits: u64,
) -> admin::PolicyInForce {
    let root = object.selector.is_none();
    let selector = Selector {
        labels: object.selector.clone().unwrap_or_default(),
        ..Selector::of(&object.name.namespace)
    };
    let selected = || {
        let about =
            |e: &&Arc<EndpointState>| selector.selects(&e.pod.name.namespace, &e.pod.labels);
        state.endpoints.values().filter(about)
    };
    let pods = selected().count();
    let mut conditions =
        vec![accepted(Accepted::of(&object.remarks, object.ignored)), enforced(state, selected())];
    if root && pods == 0 {
        // Of the mesh: which pods follow it depends on all others.
        conditions.truncate(1);
    }
    let mode = match object.mode {
        Mtls::Unset => "UNSET",
        Mtls::Disable => "DISABLE",
        Mtls::Permissive => "PERMISSIVE",
        Mtls::Strict => "STRICT",
    };
    admin::PolicyInForce {
        action: mode.into(),
        directions: if object.ignored { Vec::new() } else { vec!["ingress".into()] },
        selects: selects(&selector),
        pods: count(pods),
        conditions,
        ..named(&object.name, hits)
    }
}

fn request_authentication(
    state: &NodeState,
    object: &RequestAuthentication,
    hits: u64,
) -> admin::PolicyInForce {
    let selected = || {
        let about = |e: &&Arc<EndpointState>| {
            e.request_authentications.iter().any(|own| own.name == object.name)
        };
        state.endpoints.values().filter(about)
    };
    let nothing = object.ignored || object.rules.is_empty();
    admin::PolicyInForce {
        action: "JWT".into(),
        directions: if nothing { Vec::new() } else { vec!["ingress".into()] },
        selects: selects(&object.selector),
        pods: count(selected().count()),
        conditions: vec![
            accepted(Accepted::of(&object.remarks, object.ignored)),
            enforced(state, selected()),
        ],
        ..named(&object.name, hits)
    }
}

fn named(name: &PolicyName, hits: u64) -> admin::PolicyInForce {
    admin::PolicyInForce {
        kind: name.kind.to_string(),
        namespace: name.namespace.to_string(),
        name: name.name.to_string(),
        hits,
        ..Default::default()
    }
}

fn accepted(accepted: Accepted) -> admin::Condition {
    admin::Condition {
        r#type: "Accepted".into(),
        status: if accepted.status { "True" } else { "False" }.into(),
        reason: accepted.reason.into(),
        message: accepted.message,
    }
}

/// On this node alone; the others are asked for themselves.
/// Whether it holds for every pod of this node that it is about, and where not, why.
fn enforced<'a>(
    state: &NodeState,
    selected: impl Iterator<Item = &'a Arc<EndpointState>>,
) -> admin::Condition {
    let (mut pods, mut in_force, mut closed) = (0_usize, 0_usize, 0_usize);
    for endpoint in selected {
        pods += 1;
        if endpoint.closed {
            closed += 1;
        } else if endpoint.mode.is_enforced() {
            in_force += 1;
        }
    }
    let overridden = state.enforcement != enforcement::ENFORCE;
    let (status, reason, how) = match (pods, in_force, closed) {
        (0, ..) => ("True", "NothingSelected", "no pod of it there".to_owned()),
        (.., closed) if closed > 0 => (
            "False",
            "PodsClosed",
            format!("{closed} of {pods} pods are closed: their policies do not fit"),
        ),
        _ if overridden => ("False", "Overridden", "enforcement is overridden".to_owned()),
        (_, 0, _) => {
            ("False", "NotEnforced", format!("none of {pods} pods is in permissive or strict"))
        }
        _ => ("True", "Applied", format!("for {in_force} of {pods} pods")),
    };
    admin::Condition {
        r#type: "Enforced".into(),
        status: status.into(),
        reason: reason.into(),
        message: format!("revision {} on node {}: {how}", state.revision, state.node),
    }
}

/// `shop app=db`, `* app=db`, `shop,prod-*`.
fn selects(selector: &Selector) -> String {
    let mut text = match (&selector.namespace, selector.among.is_empty()) {
        (Some(namespace), _) => namespace.to_string(),
        (None, true) => "*".into(),
        (None, false) => selector.among.join(","),
    };
    for (key, value) in &selector.labels {
        text += &format!(" {key}={value}");
    }
    text
}

/// An action's name.
pub fn action(action: Action) -> &'static str {
    match action {
        Action::Allow => "Allow",
        Action::Deny => "Deny",
        Action::Audit => "Audit",
    }
}

/// Why a question is not answered.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Unanswered {
    /// The question is none.
    #[error("{0}")]
    Question(String),
    /// There is nothing to answer from yet.
    #[error("the agent has not read the cluster yet")]
    Early,
    /// It cannot be found out now.
    #[error("{0}")]
    Busy(String),
    /// It is about what is not there.
    #[error(transparent)]
    Check(#[from] check::CheckError),
}

/// Answers over the world that is applied on this node.
///
/// # Errors
///
/// A question that cannot be read, or is about no known pod.
pub fn answer(
    inputs: &StatusInputs,
    request: &admin::CheckPolicyRequest,
) -> Result<admin::CheckPolicyResponse, Unanswered> {
    let state = inputs.state.as_ref().ok_or(Unanswered::Early)?;
    let mut question = check::Question::parse(
        &request.from,
        &request.to,
        &request.protocol,
        request.plaintext,
        &state.world.trust_domain,
    )
    .map_err(Unanswered::Question)?;
    question.request = check::AskedRequest::parse(
        &request.method,
        &request.path,
        &request.host,
        &request.headers,
        &request.claims,
    )
    .map_err(Unanswered::Question)?;
    let setting = Setting::of(state);
    let answer = check::check(&state.world, &setting, &question)?;
    Ok(response(&inputs.node, &answer))
}

/// The answer as it is told.
pub fn response(node: &str, answer: &Answer) -> admin::CheckPolicyResponse {
    admin::CheckPolicyResponse {
        node: node.into(),
        verdict: names::verdict(answer.verdict).into(),
        reason: reason::name(answer.reason).into(),
        via: if answer.tunnelled { "mtls" } else { "plaintext" }.into(),
        sides: answer.sides.iter().map(side).collect(),
        notes: answer.notes.clone(),
    }
}

fn side(side: &Side) -> admin::CheckedSide {
    let steps = side.explanation.iter().flat_map(|explanation| &explanation.policies);
    admin::CheckedSide {
        direction: match side.direction {
            Direction::Ingress => "ingress",
            Direction::Egress => "egress",
        }
        .into(),
        pod: format!("{}/{}", side.pod.namespace, side.pod.name),
        mode: names::mode(side.mode).into(),
        verdict: names::verdict(side.verdict).into(),
        reason: reason::name(side.reason).into(),
        policy: side.policy.as_ref().map(ToString::to_string).unwrap_or_default(),
        sentence: side.sentence.clone(),
        policies: steps.map(step).collect(),
    }
}

fn step(step: &PolicyStep) -> admin::CheckedPolicy {
    let rules = step.rules.iter();
    admin::CheckedPolicy {
        policy: step.policy.name.to_string(),
        action: action(step.policy.action).into(),
        dry_run: step.policy.dry_run,
        matches: step.matches,
        rules: rules
            .map(|r| admin::CheckedRule { matches: r.matches, because: r.because.clone() })
            .collect(),
    }
}

fn count(n: usize) -> u32 {
    u32::try_from(n).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        cluster::model::World,
        flow::example::{endpoint, pod},
        spiffe::TrustDomain,
    };

    #[test]
    fn enforced_is_told_of_pods_that_are() {
        let world = World::empty(TrustDomain::parse("cluster.local").unwrap());
        let mut state = NodeState::empty("node-2".into(), Arc::new(world));
        let told = |state: &NodeState, pods: &[(Mode, bool)]| {
            let endpoints: Vec<_> = pods
                .iter()
                .map(|(mode, closed)| {
                    let endpoint = endpoint(&pod("shop/web", *mode), 7, "10.0.0.1");
                    Arc::new(EndpointState { closed: *closed, ..EndpointState::clone(&endpoint) })
                })
                .collect();
            let condition = enforced(state, endpoints.iter());
            (condition.status, condition.reason, condition.message)
        };
        let strict = (Mode::Strict, false);
        let observed = (Mode::Observe, false);
        let closed = (Mode::Strict, true);
        for (pods, status, reason, how) in [
            (&[][..], "True", "NothingSelected", "no pod of it there"),
            (&[strict, observed], "True", "Applied", "for 1 of 2 pods"),
            (&[observed], "False", "NotEnforced", "none of 1 pods is in permissive or strict"),
            (
                &[strict, closed],
                "False",
                "PodsClosed",
                "1 of 2 pods are closed: their policies do not fit",
            ),
        ] {
            let message = format!("revision 0 on node node-2: {how}");
            assert_eq!(told(&state, pods), (status.into(), reason.into(), message));
        }
        state.enforcement = enforcement::AUDIT;
        assert_eq!(told(&state, &[strict]).1, "Overridden");
    }
}
