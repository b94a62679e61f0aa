//! A verdict rule by rule, in words. It asks what [`super::evaluate`] asks and decides
//! nothing itself, so that the two cannot disagree.

use std::sync::Arc;

use signet_ebpf::abi::{Direction, Reason, proto};

use super::{
    evaluate::{
        FlowFacts, Outcome, PeerIdentity, Question, RuleVerdict, holds_whatever_comes, judge,
        judge_rule, policy_matches,
    },
    model::{Action, Policy, PolicyName, Rule},
    request::{Asked, RequestFacts},
};

/// An explained verdict of policy.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Explanation {
    /// The verdict, as [`evaluate`] gives it.
    pub outcome: Outcome,
    /// Why, in one sentence.
    pub sentence: String,
    /// Every policy that selects the pod and speaks about the direction, in their order.
    pub policies: Vec<PolicyStep>,
}

/// What one policy makes of the flow.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PolicyStep {
    /// The policy.
    pub policy: Arc<Policy>,
    /// It covers the flow.
    pub matches: bool,
    /// Its rules for the direction, in their order.
    pub rules: Vec<RuleStep>,
}

/// What one rule makes of the flow.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct RuleStep {
    /// It covers the flow.
    pub matches: bool,
    /// The first of its parts that does not hold, or why it counts as holding.
    pub because: String,
}

/// Judges and explains: one request on a flow, or a flow whose requests nobody sees.
pub fn explain(
    policies: &[Arc<Policy>],
    default_deny: bool,
    flow: &FlowFacts<'_>,
    request: Option<&RequestFacts<'_>>,
) -> Explanation {
    let asked = request.map_or(Asked::Unseen, Asked::Seen);
    let question = Question { flow, asked };
    let facts = &question;
    let outcome = judge(policies, default_deny, facts);
    let steps = policies.iter().filter(|policy| policy.governs(flow.direction)).map(|policy| {
        let rules = policy.rules(flow.direction);
        PolicyStep {
            policy: policy.clone(),
            matches: policy_matches(policy, facts),
            rules: rules.iter().map(|rule| step(policy.action, rule, facts)).collect(),
        }
    });
    let steps: Vec<PolicyStep> = steps.collect();
    let sentence = sentence(&outcome, &steps, default_deny, flow);
    Explanation { outcome, sentence, policies: steps }
}

fn step(action: Action, rule: &Rule, question: &Question<'_>) -> RuleStep {
    let verdict = judge_rule(action, rule, question);
    let facts = question.flow;
    let awaited = || {
        let awaited = Question { asked: Asked::Awaited, ..*question };
        matches!(question.asked, Asked::Unseen)
            && rule.asks_requests()
            && judge_rule(action, rule, &awaited) == RuleVerdict::Matches
    };
    let because = match verdict {
        RuleVerdict::Matches
            if rule.unsupported.is_empty() && !holds_whatever_comes(rule, question) =>
        {
            "counts as matching: it asks about HTTP requests, and none is seen here".into()
        }
        RuleVerdict::Matches if rule.unsupported.is_empty() => "matches".into(),
        RuleVerdict::To | RuleVerdict::When(_) | RuleVerdict::Peers if awaited() => {
            "matches only requests that it asks for, and none is seen here".into()
        }
        RuleVerdict::Matches => format!("counts as matching: {}", rule.unsupported.join("; ")),
        RuleVerdict::Never => "asks for what cannot be, so it matches nothing".into(),
        RuleVerdict::Unsupported => {
            format!("matches nothing: {}", rule.unsupported.join("; "))
        }
        RuleVerdict::To => match question.asked {
            Asked::Seen(request) if rule.all_destinations().any(|to| !to.operation.is_empty()) => {
                format!("is not about {} {} at port {}", request.method, request.path, port(facts))
            }
            _ => format!("is not about port {}", port(facts)),
        },
        RuleVerdict::When(index) => format!("its condition when[{index}] does not hold"),
        RuleVerdict::Peers => format!("is not about {}", peer(facts)),
        RuleVerdict::NotProven => format!(
            "would match {}, but only a proven identity counts (or unauthenticated: true)",
            peer(facts)
        ),
        RuleVerdict::Foreign => {
            format!("does not name the trust domain of {}, which is not our own", peer(facts))
        }
    };
    RuleStep { matches: verdict == RuleVerdict::Matches, because }
}

fn sentence(
    outcome: &Outcome,
    steps: &[PolicyStep],
    default_deny: bool,
    facts: &FlowFacts<'_>,
) -> String {
    let by = outcome.policy.as_ref().map(|policy| short(&policy.name));
    let is_builtin = outcome.policy.as_ref().is_some_and(|policy| policy.builtin);
    let counts = |policy: &&Arc<Policy>| !policy.dry_run && !policy.builtin;
    let enforced = || steps.iter().map(|step| &step.policy).filter(counts);
    let allows = || enforced().filter(|policy| policy.action == Action::Allow);
    let mut sentence = match (outcome.reason, by) {
        (Reason::PolicyDeny, Some(by)) => format!("explicitly denied by {by}"),
        (Reason::PolicyNoMatch, Some(_)) => {
            let names: Vec<String> = allows().map(|policy| short(&policy.name)).collect();
            format!("ALLOW policies exist ({}: {}), none matched", names.len(), names.join(", "))
        }
        (Reason::PolicyNoMatch, None) if default_deny => {
            "no policy allows it, and the default is deny".into()
        }
        (Reason::PolicyNoMatch, None) => {
            format!("{} is of a foreign trust domain that no ALLOW names", peer(facts))
        }
        (Reason::Allowed, Some(by)) if is_builtin => {
            format!("nothing else allows it, but the built-in {by} does")
        }
        (Reason::Allowed, Some(by)) => format!("allowed by {by}"),
        (Reason::Allowed, None) if enforced().next().is_none() => {
            format!("no policy is about its {}, and the default is allow", direction(facts))
        }
        (Reason::Allowed, None) => "no DENY matched, no ALLOW selects it".into(),
        (_, Some(by)) if is_asking(outcome) => {
            format!("{by} asks about HTTP requests, none is seen here, and it fails closed")
        }
        (_, Some(by)) => format!("{by} cannot be evaluated in full and fails closed"),
        (_, None) => "a policy cannot be evaluated and fails closed".into(),
    };
    if let Some(audit) = &outcome.audit {
        let name = short(&audit.name);
        sentence += &match (audit.dry_run, outcome.is_allowed()) {
            (true, _) => format!("; the dry run {name} would refuse it"),
            (false, _) => format!("; audited by {name}"),
        };
    }
    sentence
}

/// True when all that the deciding policy lacks is a request.
fn is_asking(outcome: &Outcome) -> bool {
    outcome.policy.as_ref().is_some_and(|policy| {
        policy.unsupported.is_empty()
            && policy.ingress.iter().chain(&policy.egress).all(|rule| rule.unsupported.is_empty())
    })
}

/// `shop/payments-callers`.
fn short(name: &PolicyName) -> String {
    if name.namespace.is_empty() {
        name.name.to_string()
    } else {
        format!("{}/{}", name.namespace, name.name)
    }
}

fn port(facts: &FlowFacts<'_>) -> String {
    match facts.protocol {
        proto::TCP => format!("{}/tcp", facts.port),
        proto::UDP => format!("{}/udp", facts.port),
        other => format!("{} (protocol {other})", facts.port),
    }
}

fn peer(facts: &FlowFacts<'_>) -> String {
    match facts.peer {
        PeerIdentity::Unknown => format!("{} without an identity", facts.peer_ip),
        PeerIdentity::Address(id) => format!("{id} (known by its address)"),
        PeerIdentity::Authenticated(id) => id.to_string(),
    }
}

fn direction(facts: &FlowFacts<'_>) -> &'static str {
    match facts.direction {
        Direction::Ingress => "ingress",
        Direction::Egress => "egress",
    }
}
