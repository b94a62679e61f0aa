//! `signet policy`, assembled: what is in force, and what would become of a flow.

use std::{collections::HashMap, sync::Arc};

use signet_ebpf::abi::{Direction, Mode, proto};

use super::inputs::StatusInputs;
use crate::{
    config::values::Builtin,
    endpoint::{
        check::{self, Answer, Setting, Side},
        state::{EndpointState, NodeState},
    },
    policy::{
        builtin,
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
    policies.extend(
        Builtin::ALL.map(|which| builtin(state, which, hits(&builtin::name(which.as_str())))),
    );
    admin::ListPoliciesResponse { node, revision: state.revision, policies }
}

fn policy(state: &NodeState, policy: &Arc<Policy>, hits: u64) -> admin::PolicyInForce {
    let pods = state
        .endpoints
        .values()
        .filter(|endpoint| endpoint.policies.iter().any(|p| p.name == policy.name))
        .count();
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
        pods: count(pods),
        conditions: vec![accepted(policy.accepted()), enforced(state, pods)],
        ..named(&policy.name, hits)
    }
}

/// The most places that are told of what a built-in allows.
const MOST_PLACES: usize = 32;

/// A built-in: in force or removed, and what it allows.
fn builtin(state: &NodeState, which: Builtin, hits: u64) -> admin::PolicyInForce {
    let made = state.builtins.policy(which, &state.world);
    let in_force = state.builtins.has(which);
    let judged = |endpoint: &&Arc<EndpointState>| endpoint.mode != Mode::Off;
    let pods = if in_force { state.endpoints.values().filter(judged).count() } else { 0 };
    let allows = match which {
        Builtin::Dns => format!("allows DNS to the pod's own resolvers: {}", places(&made)),
        Builtin::KubeletProbes => {
            "allows what the node's own kubelet (probeCgroups) dials: probes".into()
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
        pods: count(pods),
        conditions: vec![condition, enforced(state, pods)],
        ..named(&made.name, hits)
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
    let pods = state
        .endpoints
        .values()
        .filter(|e| selector.selects(&e.pod.name.namespace, &e.pod.labels))
        .count();
    let mut conditions =
        vec![accepted(Accepted::of(&object.remarks, object.ignored)), enforced(state, pods)];
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
fn enforced(state: &NodeState, pods: usize) -> admin::Condition {
    admin::Condition {
        r#type: "Enforced".into(),
        status: "True".into(),
        reason: "Applied".into(),
        message: format!("revision {} on node {}, {pods} pods", state.revision, state.node),
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
    let question = check::Question::parse(
        &request.from,
        &request.to,
        &request.protocol,
        request.plaintext,
        &state.world.trust_domain,
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
