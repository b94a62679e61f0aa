//! Policy for one flow of one endpoint, at one state of the node.

use std::{net::IpAddr, sync::Arc};

use signet_ebpf::abi::{Direction, Reason, Verdict, enforcement, proto};

use crate::{
    endpoint::state::{EndpointState, NodeState},
    policy::{
        evaluate::{FlowFacts, PeerIdentity, evaluate},
        model::{Policy, PolicyName},
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
/// that is not enforced (any more) would refuse passes as AUDIT.
pub fn judge(state: &NodeState, endpoint: &EndpointState, facts: &Facts) -> Judgement {
    let peer = match &facts.peer {
        None => PeerIdentity::Unknown,
        Some(id) if facts.proven => PeerIdentity::Authenticated(id),
        Some(id) => PeerIdentity::Address(id),
    };
    let facts = FlowFacts {
        direction: facts.direction,
        trust_domain: &state.world.trust_domain,
        aliases: &state.world.federation.aliases,
        peer,
        peer_ip: facts.peer_ip,
        local_ips: &endpoint.addresses,
        port: facts.port,
        protocol: proto::TCP,
    };
    let outcome = evaluate(&endpoint.policies, endpoint.default_deny, &facts);
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
