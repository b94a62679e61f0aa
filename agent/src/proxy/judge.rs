//! Policy for one flow of one endpoint, at one state of the node.

use std::{net::IpAddr, sync::Arc};

use signet_ebpf::abi::{Direction, Reason, Verdict, enforcement, proto};

use crate::{
    endpoint::state::{EndpointState, NodeState},
    policy::{
        evaluate::{FlowFacts, Outcome, PeerIdentity, evaluate},
        model::{Policy, PolicyName},
        request::{RequestFacts, depends_on_requests, evaluate_before_requests, evaluate_request},
    },
    spiffe::SpiffeId,
};

/// What a flow's right depends on, besides policy: fixed while it is open.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Facts {
    /// As the endpoint sees the flow.
    pub direction: Direction,
    /// The other side's identity.
    pub peer: Option<SpiffeId>,
    /// A handshake proves it, or will before the first byte.
    pub proven: bool,
    /// The other side's address.
    pub peer_ip: IpAddr,
    /// The destination's port.
    pub port: u16,
    /// Each of its HTTP requests is judged, too.
    pub by_request: bool,
}

/// What policy says.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Judgement {
    /// FORWARDED, DROPPED or AUDIT.
    pub verdict: Verdict,
    /// Why.
    pub reason: Reason,
    /// The deciding policy.
    pub policy: Option<PolicyName>,
    /// Revision of the world that decided.
    pub revision: u64,
}

impl Judgement {
    /// True when the flow may go on.
    pub fn passes(&self) -> bool {
        self.verdict != Verdict::Dropped
    }
}

/// Evaluates the endpoint's policies, as decide.rs does in the kernel: what an endpoint
/// that is not enforced (any more) would refuse passes as AUDIT. A flow whose requests are
/// judged loses only what no request of it may have.
pub fn judge(state: &NodeState, endpoint: &EndpointState, facts: &Facts) -> Judgement {
    let flow = flow_facts(state, endpoint, facts);
    let outcome = if facts.by_request {
        evaluate_before_requests(&endpoint.policies, endpoint.default_deny, &flow)
    } else {
        evaluate(&endpoint.policies, endpoint.default_deny, &flow)
    };
    conclude(state, endpoint, outcome)
}

/// As [`judge`], for one request of a flow.
pub fn judge_request(
    state: &NodeState,
    endpoint: &EndpointState,
    facts: &Facts,
    request: &RequestFacts<'_>,
) -> Judgement {
    let flow = flow_facts(state, endpoint, facts);
    let (policies, default_deny) = (&endpoint.policies, endpoint.default_deny);
    conclude(state, endpoint, evaluate_request(policies, default_deny, &flow, request))
}

/// True when the verdict on a flow depends on what it requests: then it may not be copied.
pub fn asks_requests(state: &NodeState, endpoint: &EndpointState, facts: &Facts) -> bool {
    endpoint.judged
        && facts.direction == Direction::Ingress
        && endpoint.mode.is_enforced()
        && state.enforcement == enforcement::ENFORCE
        && (!endpoint.request_authentications.is_empty()
            || depends_on_requests(
                &endpoint.policies,
                endpoint.default_deny,
                &flow_facts(state, endpoint, facts),
            ))
}

fn flow_facts<'a>(
    state: &'a NodeState,
    endpoint: &'a EndpointState,
    facts: &'a Facts,
) -> FlowFacts<'a> {
    let peer = match &facts.peer {
        None => PeerIdentity::Unknown,
        Some(id) if facts.proven => PeerIdentity::Authenticated(id),
        Some(id) => PeerIdentity::Address(id),
    };
    FlowFacts {
        direction: facts.direction,
        trust_domain: &state.world.trust_domain,
        aliases: &state.world.federation.aliases,
        peer,
        peer_ip: facts.peer_ip,
        local_ips: &endpoint.addresses,
        port: facts.port,
        protocol: proto::TCP,
    }
}

fn conclude(state: &NodeState, endpoint: &EndpointState, outcome: Outcome) -> Judgement {
    let name = |policy: &Option<Arc<Policy>>| policy.as_ref().map(|p| p.name.clone());
    let (verdict, policy) = if !outcome.is_allowed() {
        let enforced = endpoint.mode.is_enforced() && state.enforcement == enforcement::ENFORCE;
        let verdict = if enforced { Verdict::Dropped } else { Verdict::Audit };
        (verdict, name(&outcome.policy))
    } else if outcome.audit.is_some() {
        (Verdict::Audit, name(&outcome.audit))
    } else {
        (Verdict::Forwarded, name(&outcome.policy))
    };
    Judgement { verdict, reason: outcome.reason, policy, revision: state.revision }
}
