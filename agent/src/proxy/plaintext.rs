//! What comes in in clear to an endpoint whose policies ask about requests: the pod's sk_lookup
//! program steers it here instead of to the application.
//!
//! Nobody is authenticated: an identity that an address suggests satisfies a DENY and no ALLOW,
//! as in the kernel.

use std::{net::SocketAddr, sync::Arc};

use signet_ebpf::abi::{Direction, Reason};
use tokio::net::TcpStream;
use uuid::Uuid;

use super::{
    counters::Counters,
    delivery::{DeliveryError, deliver},
    http::{Admitted, Carrier},
    inbound::{connections, destination_party, endpoint, may_be_asked_for},
    judge::{Facts, Judgement, asks_requests, judge},
    open_flows::Registration,
    plane::Core,
    records::{FlowRecords, pod_party},
    resolve::identity_of,
    served::Served,
};
use crate::{
    endpoint::state::NodeState,
    flow::record::{KnownBy, Party, Via},
    policy::model::PolicyName,
    tunnel::copy::{self, Counts, reset_on_close},
};

/// Why a flow in clear is refused.
#[derive(Debug, thiserror::Error)]
enum Refused {
    #[error("the pod is not registered (any more)")]
    Unregistered,
    #[error("{0} is not an address and port of the pod that may be dialled")]
    WrongDestination(SocketAddr),
    #[error("the pod, or this source, has as many open flows as it may")]
    Limit,
    #[error("the agent or the endpoint is draining")]
    Draining,
    #[error("ingress policy refuses: {:?}", .0.reason)]
    Policy(Box<Judgement>),
    #[error(transparent)]
    Delivery(#[from] DeliveryError),
    #[error("the flow lost its right before it was open: {0:?}")]
    Closed(Reason),
}

impl Refused {
    fn reason(&self) -> Reason {
        match self {
            Self::Unregistered => Reason::PodUnregistered,
            Self::WrongDestination(_) => Reason::WrongDestination,
            Self::Limit => Reason::LimitExceeded,
            Self::Draining => Reason::Draining,
            Self::Policy(judgement) => judgement.reason,
            Self::Delivery(error) => error.reason(),
            Self::Closed(reason) => *reason,
        }
    }

    fn policy(&self) -> Option<PolicyName> {
        match self {
            Self::Policy(judgement) => judgement.policy.clone(),
            _ => None,
        }
    }
}

/// Serves one connection from `client` to the pod's `local` address to its end.
pub async fn serve(
    core: Arc<Core>,
    served: Arc<Served>,
    tcp: TcpStream,
    client: SocketAddr,
    local: SocketAddr,
) {
    reset_on_close(&tcp);
    // Fails only on a socket that is gone already, which the first read finds out.
    let _ = tcp.set_nodelay(true);
    let plane = core.plane.clone();
    let state = plane.state.current();
    let registration = core.open_flows.register(served.key.clone(), &served.cut);
    let mut records = FlowRecords::new(
        &plane.recorder,
        &state,
        Uuid::new_v4(),
        Direction::Ingress,
        source_party(&state, client),
        destination_party(endpoint(&state, &served).as_deref(), local),
    );
    records.via(Via::Plaintext);
    let limit = plane.limits.load().open_flows;
    let place = served.connection(client.ip(), connections(limit)).zip(served.flow(limit));
    let opened = match &place {
        Some(_) => open(&core, &served, &registration, client, local).await,
        None => Err(Refused::Limit),
    };
    let (facts, judgement, app) = match opened {
        Ok((facts, judgement, app)) => (facts, judgement, Some(app)),
        // Steered here because requests are judged: each one is told.
        Err(Refused::Policy(judgement)) => (facts_of(&state, client, local), *judgement, None),
        Err(why) => {
            Counters::add(&plane.counters.refused);
            tracing::debug!(%client, %local, error = %why, "plaintext flow refused");
            records.refused(why.reason(), why.policy(), plane.state.current().revision);
            return;
        }
    };
    let app = match app {
        Some(app) if !facts.by_request => app,
        app => {
            let (core, served, registration) = (&core, &served, &registration);
            let admitted = Admitted {
                core,
                served,
                facts,
                client,
                judgement,
                records,
                registration,
                cut_for: None,
            };
            admitted.serve(Carrier::Plain(tcp), app).await;
            return;
        }
    };
    records.passed(&judgement);
    Counters::add(&plane.counters.forwarded);
    let counts = Counts::default();
    let stop = async {
        registration.closed().await;
    };
    let result = copy::direct(app, tcp, &counts, stop).await;
    records.closed(&counts, result, None, registration.close_reason());
}

/// Judges the flow and connects to the application.
async fn open(
    core: &Core,
    served: &Served,
    registration: &Registration,
    client: SocketAddr,
    local: SocketAddr,
) -> Result<(Facts, Judgement, TcpStream), Refused> {
    let plane = &core.plane;
    if served.drain.is_cancelled() && !plane.is_succeeded() {
        return Err(Refused::Draining);
    }
    let (facts, judgement) = loop {
        let state = plane.state.current();
        let endpoint = endpoint(&state, served).ok_or(Refused::Unregistered)?;
        if !may_be_asked_for(&endpoint, local, local) {
            return Err(Refused::WrongDestination(local));
        }
        let mut facts = facts_of(&state, client, local);
        facts.by_request = asks_requests(&state, &endpoint, &facts);
        // Found by whoever re-judges before it is judged: no change slips between.
        registration.set_facts(facts.clone());
        if !Arc::ptr_eq(&state, &plane.state.current()) {
            continue;
        }
        let judgement = judge(&state, &endpoint, &facts);
        if !judgement.passes() {
            return Err(Refused::Policy(Box::new(judgement)));
        }
        break (facts, judgement);
    };
    let app = tokio::select! {
        app = deliver(&plane.sockets, served, local, client, plane.config.app_timeout) => app?,
        reason = registration.closed() => return Err(Refused::Closed(reason)),
    };
    Ok((facts, judgement, app))
}

fn facts_of(state: &NodeState, client: SocketAddr, local: SocketAddr) -> Facts {
    Facts {
        direction: Direction::Ingress,
        peer: state.world.pod_at(client.ip()).and_then(|pod| identity_of(&state.world, pod)),
        proven: false,
        peer_ip: client.ip(),
        port: local.port(),
        by_request: false,
    }
}

/// The client as the record shows it: by its address, which proves nothing.
fn source_party(state: &NodeState, client: SocketAddr) -> Party {
    match state.world.pod_at(client.ip()) {
        Some(pod) => {
            let identity = identity_of(&state.world, pod);
            pod_party(pod, identity, KnownBy::Address, client, None)
        }
        None => Party::unknown(client),
    }
}
