//! The source's end: a redirected client, its original destination, the tunnel to it.

use std::{
    net::{IpAddr, SocketAddr},
    os::fd::AsFd,
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

use http::HeaderValue;
use signet_ebpf::abi::{Direction, Reason};
use tokio::{io::Interest, net::TcpStream, time::timeout};
use uuid::Uuid;

use super::{
    counters::Counters,
    dial::{self, DialError, TunnelKey},
    judge::{Facts, Judgement, judge},
    open_flows::Registration,
    plane::Core,
    records::{FlowRecords, pod_party},
    resolve::{Path, Route, RouteError, Source, names_of, route},
    served::Served,
};
use crate::{
    cluster::model::Pod,
    endpoint::state::{EndpointState, NodeState},
    flow::{
        parties::known_by_address,
        record::{KnownBy, Party, Via},
    },
    policy::model::PolicyName,
    spiffe::SpiffeId,
    tunnel::{
        copy::{self, CopyError, Counts, reset_on_close},
        hbone::{
            self,
            client::{OpenError, Permit},
            head::Open,
        },
        native::{self, client::Early},
        pool::{Free, Lease, Place, Stamp},
        tls::{PeerSvid, TlsStream},
    },
};

/// All of finding a tunnel, dialling included; the parts have limits of their own.
const ESTABLISH_WITHIN: Duration = Duration::from_secs(60);

/// How many connections that others have dialled are tried for a flow.
const TRIES: u32 = 4;

/// Why a flow is refused, for its record and for the application, which sees a reset.
#[derive(Debug, thiserror::Error)]
enum Refused {
    #[error("the pod is not registered (any more)")]
    Unregistered,
    #[error("the pod has {0} open flows, its limit; raise limits.openFlows if it is right")]
    Limit(u32),
    #[error("the pod has no address of the family of {0}")]
    NoSourceAddress(IpAddr),
    #[error(transparent)]
    Route(#[from] RouteError),
    #[error("egress policy refuses: {:?}", .0.reason)]
    Policy(Judgement),
    #[error(transparent)]
    Dial(Arc<DialError>),
    #[error(transparent)]
    Open(#[from] OpenError),
    #[error(transparent)]
    Asked(#[from] native::client::OpenError),
    #[error("no tunnel to {0} within {ESTABLISH_WITHIN:?}")]
    TooLong(SocketAddr),
    #[error("the flow lost its right before it was open: {0:?}")]
    Closed(Reason),
}

impl Refused {
    fn reason(&self) -> Reason {
        match self {
            Self::Unregistered => Reason::PodUnregistered,
            Self::Limit(_) => Reason::LimitExceeded,
            Self::NoSourceAddress(_) | Self::TooLong(_) => Reason::PeerUnreachable,
            Self::Route(error) => error.reason(),
            Self::Policy(judgement) => judgement.reason,
            Self::Dial(error) => error.reason(),
            Self::Open(error) => error.reason(),
            Self::Asked(error) => error.reason(),
            Self::Closed(reason) => *reason,
        }
    }

    fn policy(&self) -> Option<PolicyName> {
        match self {
            Self::Policy(judgement) => judgement.policy.clone(),
            Self::Open(OpenError::Refused(refusal))
            | Self::Asked(native::client::OpenError::Refused(refusal)) => refusal.policy.clone(),
            _ => None,
        }
    }

    /// For the record's `error` field, where the reason alone leaves a question.
    fn kind(&self) -> Option<&'static str> {
        match self {
            Self::Dial(error) => Some(error.kind()),
            Self::Open(OpenError::Unanswered(_)) => Some("unanswered"),
            Self::Open(OpenError::Broken(_)) => Some("broken"),
            Self::Asked(native::client::OpenError::Unanswered(_)) => Some("unanswered"),
            Self::Asked(
                native::client::OpenError::Broken { .. } | native::client::OpenError::Closed,
            ) => Some("broken"),
            _ => None,
        }
    }
}

/// How a flow goes on after it was let through.
enum Onward {
    /// A stream on a shared connection.
    Shared(hbone::Stream, Permit, Arc<PeerSvid>),
    /// A connection for this flow.
    Own(Box<Own>),
    Direct(TcpStream),
}

/// How asking on one connection went.
struct Attempt {
    result: Result<Onward, Refused>,
    /// Another connection may do.
    is_connections_fault: bool,
}

impl Attempt {
    fn done(onward: Onward) -> Self {
        Self { result: Ok(onward), is_connections_fault: false }
    }
}

/// A native connection while it carries a flow.
struct Own {
    stream: native::copy::Stream<TlsStream>,
    key: TunnelKey,
    stamp: Stamp,
    deadline: Instant,
    peer: Arc<PeerSvid>,
}

/// Serves one redirected client to its end.
pub async fn serve(core: Arc<Core>, served: Arc<Served>, app: TcpStream) {
    let plane = &core.plane;
    reset_on_close(&app);
    let (Ok(client), Some(dialled)) = (app.peer_addr(), (plane.sockets.original)(app.as_fd()))
    else {
        // Not redirected: somebody in the pod dialled the listener itself.
        Counters::add(&plane.counters.unattributed);
        return;
    };
    // Fails only on a socket that is gone already, which copying finds out.
    let _ = app.set_nodelay(true);
    let limit = plane.limits.load().open_flows;
    let place = served.flow(limit);
    let flow = Outbound {
        registration: core.open_flows.register(served.key.clone(), &served.cut),
        core: &core,
        served: &served,
        client_port: client.port(),
        dialled,
        uuid: Uuid::new_v4(),
    };
    let state = plane.state.current();
    let mut records = flow.records(&state);
    let admitted =
        if place.is_some() { flow.admit(&mut records) } else { Err(Refused::Limit(limit)) };
    let admitted = match admitted {
        Ok(admitted) => admitted,
        Err(refused) => return flow.refuse(app, records, refused, state.revision),
    };
    let mut early = Early::default();
    // Boxed, here and where the server's end waits once: a flow that is open keeps no room for
    // the steps that opened it.
    let establishing = Box::pin(flow.establish(&admitted, &app, &mut early));
    let established = tokio::select! {
        established = timeout(ESTABLISH_WITHIN, establishing) => match established {
            Ok(established) => established,
            Err(_) => Err(Refused::TooLong(admitted.route.destination)),
        },
        reason = flow.registration.closed() => Err(Refused::Closed(reason)),
        _ = app.ready(Interest::ERROR) => {
            // The client has reset its connection; dropping the attempt resets the stream.
            Counters::add(&plane.counters.abandoned);
            return;
        }
    };
    let onward = match established {
        Ok(onward) => onward,
        Err(refused) => return flow.refuse(app, records, refused, admitted.state.revision),
    };
    let proven = match &onward {
        Onward::Shared(_, _, peer) => Some(&peer.id),
        Onward::Own(own) => Some(&own.peer.id),
        Onward::Direct(_) => None,
    };
    records.set_destination(admitted.destination(proven));
    records.passed(&admitted.judgement);
    Counters::add(&plane.counters.forwarded);
    let counts = Counts::default();
    let (result, ended_by) = flow.carry(app, onward, early, &counts).await;
    match result {
        Ok(()) => records.ended(&counts, Reason::Allowed, None),
        Err(CopyError::Stopped) => {
            let reason =
                ended_by.or_else(|| flow.registration.close_reason()).unwrap_or(Reason::Internal);
            records.ended(&counts, reason, None);
        }
        Err(error) => match ended_by {
            Some(reason) => records.ended(&counts, reason, None),
            None => records.ended(&counts, Reason::Allowed, Some(error.broken_by())),
        },
    }
}

/// A flow that was let through on this side.
struct Admitted {
    state: Arc<NodeState>,
    endpoint: Arc<EndpointState>,
    route: Route,
    judgement: Judgement,
    source_ip: IpAddr,
}

impl Admitted {
    /// The destination, as the record shows it. `proven`: who a handshake has shown it to be.
    fn destination(&self, proven: Option<&SpiffeId>) -> Party {
        let route = &self.route;
        let identity = proven.or(route.path.identity()).cloned();
        let known_by = match (&identity, proven) {
            (None, _) => KnownBy::Unknown,
            (Some(_), Some(_)) => KnownBy::Mtls,
            (Some(_), None) => KnownBy::Address,
        };
        match &route.pod {
            Some(pod) => {
                pod_party(pod, identity, known_by, route.destination, route.service.as_ref())
            }
            None => Party {
                identity,
                known_by,
                service: route
                    .service
                    .as_ref()
                    .map(|s| format!("{}/{}", s.namespace, s.name).into()),
                ..Party::unknown(route.destination)
            },
        }
    }
}

struct Outbound<'a> {
    core: &'a Arc<Core>,
    served: &'a Arc<Served>,
    client_port: u16,
    dialled: SocketAddr,
    uuid: Uuid,
    registration: Registration,
}

impl Outbound<'_> {
    /// The records of the flow, with what is known before anything is resolved.
    fn records(&self, state: &NodeState) -> FlowRecords {
        let dialled = SocketAddr::new(self.dialled.ip().to_canonical(), self.dialled.port());
        let source = match self.endpoint(state) {
            Ok(endpoint) => {
                let ip = own_address(&endpoint, dialled.ip()).unwrap_or(dialled.ip());
                let address = SocketAddr::new(ip, self.client_port);
                let identity = Some(endpoint.identity.clone());
                pod_party(&endpoint.pod, identity, KnownBy::Kernel, address, None)
            }
            Err(_) => Party::unknown(SocketAddr::new(dialled.ip(), self.client_port)),
        };
        FlowRecords::new(
            &self.core.plane.recorder,
            state,
            self.uuid,
            Direction::Egress,
            source,
            known_by_address(dialled, state, None),
        )
    }

    fn endpoint(&self, state: &NodeState) -> Result<Arc<EndpointState>, Refused> {
        let endpoint = state.endpoints.get(&self.served.key.netns);
        endpoint.filter(|e| e.key == self.served.key).cloned().ok_or(Refused::Unregistered)
    }

    /// Resolves and judges, under a state that is current after the flow could be found
    /// by whoever re-judges.
    fn admit(&self, records: &mut FlowRecords) -> Result<Admitted, Refused> {
        let plane = &self.core.plane;
        loop {
            let state = plane.state.current();
            let endpoint = self.endpoint(&state)?;
            let source = Source {
                mode: endpoint.mode,
                addresses: &endpoint.addresses,
                node: endpoint.pod.node.as_deref(),
            };
            let pick = rand::random();
            let mut route = route(&state.world, source, self.dialled, pick)?;
            let destination = route.destination.ip();
            let source_ip =
                own_address(&endpoint, destination).ok_or(Refused::NoSourceAddress(destination))?;
            let mut facts = Facts {
                direction: Direction::Egress,
                peer: route.path.identity().cloned(),
                proven: !matches!(route.path, Path::Direct(_)),
                peer_ip: destination,
                port: route.destination.port(),
                by_request: false,
            };
            let mut judgement = judge(&state, &endpoint, &facts);
            if let Path::Remote(identities) = &route.path {
                // Whoever answers there must be one whom policy lets through, and is judged
                // once more under the name that the handshake proves.
                let allowed = allowed(&state, &endpoint, &facts, identities);
                if let Some((first, passes)) = allowed.first() {
                    facts.peer = Some(first.clone());
                    judgement = passes.clone();
                    route.path = Path::Remote(allowed.into_iter().map(|(id, _)| id).collect());
                }
            }
            self.registration.set_facts(facts);
            // Registered under an old state: whoever re-judges may not have seen it.
            if !Arc::ptr_eq(&state, &plane.state.current()) {
                continue;
            }
            let admitted = Admitted { state, endpoint, route, judgement, source_ip };
            records.set_destination(admitted.destination(None));
            if matches!(admitted.route.path, Path::Direct(_)) {
                records.via(Via::Plaintext);
            }
            if !admitted.judgement.passes() {
                return Err(Refused::Policy(admitted.judgement));
            }
            return Ok(admitted);
        }
    }

    /// Copies the flow to its end; says beside the outcome why this side has ended its tunnel,
    /// if it did.
    async fn carry(
        &self,
        app: TcpStream,
        onward: Onward,
        early: Early,
        counts: &Counts,
    ) -> (Result<(), CopyError>, Option<Reason>) {
        let closed = async {
            self.registration.closed().await;
        };
        let Early { bytes: said, end } = early;
        counts.from_app.fetch_add(said.len() as u64, Ordering::Relaxed);
        match onward {
            Onward::Direct(server) => (copy::direct(app, server, counts, closed).await, None),
            Onward::Shared(stream, permit, _) => {
                let copied = copy::tunnel_after(app, stream, said.into(), end, counts, closed);
                (copied.await, permit.ended_by())
            }
            Onward::Own(own) => {
                // They are with the peer.
                drop(said);
                let Own { stream, key, stamp, deadline, peer } = *own;
                let mut distrusted = None;
                let stop = async {
                    tokio::select! {
                        reason = self.registration.closed() => reason,
                        error = peer.distrusted(&self.core.plane.trust) => {
                            tracing::info!(peer = %peer.id, %error, "tunnel cut");
                            *distrusted.insert(error.reason())
                        }
                    }
                };
                match native::copy::tunnel(app, stream, counts, stop).await {
                    Ok(recycled) => {
                        if let Some(recycled) = recycled {
                            let connection = Box::new(recycled.client());
                            self.give_back(&key, Free { connection, stamp, deadline, peer });
                        }
                        (Ok(()), None)
                    }
                    Err(error) => (Err(error), distrusted),
                }
            }
        }
    }

    /// Keeps a connection for the next flow, while its endpoint is served.
    fn give_back(&self, key: &TunnelKey, free: Free) {
        if !self.served.drain.is_cancelled() && !self.served.cut.is_cancelled() {
            self.core.pool.give_back(key, free);
        }
    }

    async fn establish(
        &self,
        admitted: &Admitted,
        app: &TcpStream,
        early: &mut Early,
    ) -> Result<Onward, Refused> {
        let plane = &self.core.plane;
        let expected = match &admitted.route.path {
            Path::Tunnel(identity) => names_of(identity, &admitted.state.world.federation),
            Path::Remote(identities) => identities.clone(),
            Path::Direct(_) => {
                let destination = admitted.route.destination;
                let server =
                    dial::connect(plane, self.served, admitted.source_ip, destination).await;
                return server.map(Onward::Direct).map_err(|e| Refused::Dial(Arc::new(e)));
            }
        };
        let key = TunnelKey {
            source: self.served.key.clone(),
            identity: admitted.endpoint.identity.clone(),
            source_ip: admitted.source_ip,
            destination: admitted.route.destination.ip(),
            pod: admitted.route.pod.as_ref().map(|pod| pod.uid.clone()),
            expected,
        };
        let open = Open {
            destination: admitted.route.destination,
            client: Some(SocketAddr::new(admitted.source_ip, self.client_port)),
            flow: Some(self.uuid),
            baggage: baggage(&admitted.endpoint.pod),
        };
        // Without an SVID the dial says so.
        let none = Stamp { trust: 0, svid_from: 0, svid_until: 0 };
        let stamp = || dial::current_stamp(plane, &key.identity).unwrap_or(none);
        let mut tries = 0;
        loop {
            let dial = || {
                let (tracker, served) = (self.core.tracker.clone(), self.served.clone());
                dial::dial(plane.clone(), tracker, served, key.clone())
            };
            let lease = self.core.pool.lease(&key, stamp, dial).await.map_err(Refused::Dial)?;
            if matches!(admitted.route.path, Path::Remote(_)) {
                self.judge_proven(admitted, &lease.peer.id)?;
            }
            let reused = lease.reused;
            let Attempt { result, is_connections_fault } =
                self.attempt(&key, lease, &open, app, early).await;
            match result {
                Ok(onward) => return Ok(onward),
                // One that was dialled for this flow would only fail again. A peer's agent that
                // goes says so on each of its connections.
                Err(_) if is_connections_fault && reused && tries + 1 < TRIES => tries += 1,
                Err(error) => return Err(error),
            }
        }
    }

    /// Asks for the flow on one connection.
    async fn attempt(
        &self,
        key: &TunnelKey,
        lease: Lease,
        open: &Open,
        app: &TcpStream,
        early: &mut Early,
    ) -> Attempt {
        let Lease { place, stamp, deadline, peer, .. } = lease;
        match place {
            Place::Stream(client, permit) => match client.open(open).await {
                Ok(stream) => Attempt::done(Onward::Shared(stream, permit, peer)),
                Err(error) => {
                    let is_connections_fault = error.is_connections_fault();
                    if is_connections_fault {
                        // The peer says goodbye while old flows keep the connection alive:
                        // nobody else is to find it in the pool.
                        client.retire();
                    }
                    Attempt { result: Err(error.into()), is_connections_fault }
                }
            },
            Place::Whole(connection) => {
                let asked = native::frame::Open {
                    destination: open.destination,
                    client_port: Some(self.client_port),
                    flow: open.flow,
                };
                let within = self.core.plane.config.hbone.answer_timeout;
                let (answer, free) = connection.open(&asked, app, early, within).await;
                match answer {
                    Ok(stream) => {
                        let key = key.clone();
                        Attempt::done(Onward::Own(Box::new(Own {
                            stream,
                            key,
                            stamp,
                            deadline,
                            peer,
                        })))
                    }
                    Err(error) => {
                        if let Some(connection) = free {
                            let connection = Box::new(connection);
                            self.give_back(key, Free { connection, stamp, deadline, peer });
                        }
                        let is_connections_fault = error.is_connections_fault();
                        Attempt { result: Err(error.into()), is_connections_fault }
                    }
                }
            }
        }
    }

    /// Judges a remote peer under the name that it proved, and lets whoever re-judges know it.
    fn judge_proven(&self, admitted: &Admitted, peer: &SpiffeId) -> Result<(), Refused> {
        let facts = Facts {
            direction: Direction::Egress,
            peer: Some(peer.clone()),
            proven: true,
            peer_ip: admitted.route.destination.ip(),
            port: admitted.route.destination.port(),
            by_request: false,
        };
        self.registration.set_facts(facts.clone());
        // After it is registered: a state that came meanwhile is either seen here or judged
        // by whoever re-judges.
        let state = self.core.plane.state.current();
        let judgement = judge(&state, &self.endpoint(&state)?.clone(), &facts);
        if judgement.passes() { Ok(()) } else { Err(Refused::Policy(judgement)) }
    }

    /// Records the refusal; the application sees a reset, and the record is there by then.
    fn refuse(&self, app: TcpStream, mut records: FlowRecords, refused: Refused, revision: u64) {
        Counters::add(&self.core.plane.counters.refused);
        tracing::debug!(
            pod.uid = %self.served.key.uid,
            dialled = %self.dialled,
            flow = %self.uuid,
            error = %refused,
            "outbound flow refused"
        );
        if let Some(kind) = refused.kind() {
            records.note("error", kind.to_owned());
        }
        records.refused(refused.reason(), refused.policy(), revision);
        drop(app);
    }
}

/// The identities that policy lets through, each with its judgement.
fn allowed(
    state: &NodeState,
    endpoint: &EndpointState,
    facts: &Facts,
    identities: &[SpiffeId],
) -> Vec<(SpiffeId, Judgement)> {
    identities
        .iter()
        .map(|id| {
            let facts = Facts { peer: Some(id.clone()), ..facts.clone() };
            (id.clone(), judge(state, endpoint, &facts))
        })
        .filter(|(_, judgement)| judgement.passes())
        .collect()
}

/// The endpoint's own address of the same family as `towards`.
fn own_address(endpoint: &EndpointState, towards: IpAddr) -> Option<IpAddr> {
    let usable = |ip: &&IpAddr| {
        let link_local = matches!(ip, IpAddr::V6(v6) if v6.is_unicast_link_local());
        ip.is_ipv4() == towards.is_ipv4() && !ip.is_loopback() && !link_local
    };
    // The pod's address in the API first: it is the one that peers map to the pod.
    let known = endpoint.pod.ips.iter().filter(|ip| endpoint.addresses.contains(ip));
    known.chain(&endpoint.addresses).find(usable).copied()
}

/// Who the client is, for peers that show it (hbone.md); we read none of it.
fn baggage(pod: &Pod) -> Option<HeaderValue> {
    let label = |name: &str| pod.labels.get(name).map(|v| &**v).filter(|v| !v.is_empty());
    let service = label("app.kubernetes.io/name").or_else(|| label("app"));
    let service = service.unwrap_or(&pod.name.name);
    let mut text = format!(
        "k8s.namespace.name={},k8s.pod.name={},service.name={service}",
        pod.name.namespace, pod.name.name
    );
    if let Some(version) = label("app.kubernetes.io/version").or_else(|| label("version")) {
        text.push_str(",service.version=");
        text.push_str(version);
    }
    HeaderValue::try_from(text).ok()
}
