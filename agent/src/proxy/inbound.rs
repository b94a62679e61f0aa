//! The destination's end: authenticates tunnels, judges each flow, delivers it.

use std::{
    net::{IpAddr, SocketAddr},
    sync::{Arc, OnceLock},
    time::{Duration, Instant},
};

use signet_ebpf::abi::{Direction, Reason, TUNNEL_PORT};
use tokio::{
    net::TcpStream,
    time::{sleep, sleep_until},
};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::{
    counters::Counters,
    delivery::{DeliveryError, deliver},
    dial::{deadline, watch_for_death},
    http::{Admitted, Carrier},
    judge::{Facts, Judgement, asks_requests, judge},
    open_flows::Registration,
    plaintext,
    plane::Core,
    records::{FlowRecords, pod_party},
    resolve::{identity_of, names_of},
    served::{Room, Served},
};
use crate::{
    endpoint::state::{EndpointState, NodeState},
    flow::record::{KnownBy, Party},
    policy::model::PolicyName,
    spiffe::{SpiffeId, Svid},
    tunnel::{
        copy::{self, Counts, reset_on_close},
        hbone::{
            self, HboneError,
            head::{HeadError, Refusal},
            server::{Control, serve as serve_http2},
        },
        native::{self, NativeError},
        tls::{PeerSvid, TlsError, TlsStream, Wire},
    },
};

/// A connection is kept at least so long when another process takes over.
const YOUNG: Duration = Duration::from_secs(2);

/// Why a connection is refused before it carries anything.
#[derive(Debug, thiserror::Error)]
enum Unaccepted {
    #[error("the pod is not registered (any more)")]
    Unregistered,
    #[error("too many handshakes or connections of this pod or from this source at once")]
    Limit,
    #[error("no SVID has been issued for {0} yet")]
    SvidMissing(SpiffeId),
    #[error("the TLS handshake failed: {0}")]
    Tls(#[from] TlsError),
    #[error(transparent)]
    Hbone(#[from] HboneError),
    #[error(transparent)]
    Native(#[from] NativeError),
}

impl Unaccepted {
    fn reason(&self) -> Reason {
        match self {
            Self::Unregistered => Reason::PodUnregistered,
            Self::Limit => Reason::LimitExceeded,
            Self::SvidMissing(_) => Reason::SvidMissing,
            Self::Tls(error) => error.reason(),
            Self::Hbone(error) => error.reason(),
            Self::Native(error) => error.reason(),
        }
    }

    fn kind(&self) -> &'static str {
        match self {
            Self::Unregistered => "pod_unregistered",
            Self::Limit => "limit_exceeded",
            Self::SvidMissing(_) => "svid_missing",
            Self::Tls(error) => error.kind(),
            Self::Hbone(error) => error.kind(),
            Self::Native(error) => error.kind(),
        }
    }

    /// True when the connection had been authenticated and only ended: its flows have their own
    /// records. One that breaks the protocol is a refusal.
    fn is_end(&self) -> bool {
        matches!(self, Self::Hbone(_) | Self::Native(_)) && self.reason() != Reason::ProtocolError
    }

    /// True when its owner ended it.
    fn is_cut(&self) -> bool {
        matches!(self, Self::Hbone(HboneError::Cut) | Self::Native(NativeError::Cut))
    }
}

/// Why a flow is refused.
#[derive(Debug, thiserror::Error)]
enum Refused {
    #[error("the request is malformed: {0}")]
    Head(#[from] HeadError),
    #[error("{0} is not an address and port that this tunnel serves")]
    WrongDestination(SocketAddr),
    #[error("the pod is not registered (any more)")]
    Unregistered,
    #[error("the pod has {0} open flows, its limit; raise limits.openFlows if it is right")]
    Limit(u32),
    #[error("a certificate of the connection ran out while it was open")]
    Expired,
    #[error("the peer's certificate is not trusted any more")]
    Untrusted,
    #[error("the agent or the endpoint is draining")]
    Draining,
    #[error("ingress policy refuses: {:?}", .0.reason)]
    Policy(Judgement),
    #[error(transparent)]
    Delivery(#[from] DeliveryError),
    #[error("the flow lost its right before it was open: {0:?}")]
    Closed(Reason),
}

impl Refused {
    fn reason(&self) -> Reason {
        match self {
            Self::Head(error) => error.reason(),
            Self::WrongDestination(_) => Reason::WrongDestination,
            Self::Unregistered => Reason::PodUnregistered,
            Self::Limit(_) => Reason::LimitExceeded,
            Self::Expired => Reason::SvidExpired,
            Self::Untrusted => Reason::UntrustedPeer,
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

/// An authenticated tunnel connection.
struct Tunnel {
    core: Arc<Core>,
    served: Arc<Served>,
    /// The tunnel's TCP peer: the only source of the client's address.
    peer: SocketAddr,
    /// The pod's address and the tunnel port.
    local: SocketAddr,
    /// What the peer's certificate proves.
    certified: PeerSvid,
    /// The earlier end of both certificates.
    until: Instant,
    /// Everything of the connection ends now.
    cut: CancellationToken,
    /// Why, if it was this side.
    cut_for: OnceLock<Reason>,
}

/// Serves one connection to an endpoint's tunnel port to its end.
pub async fn serve(core: Arc<Core>, served: Arc<Served>, tcp: TcpStream) {
    let plane = core.plane.clone();
    let (Ok(peer), Ok(local)) = (tcp.peer_addr(), tcp.local_addr()) else {
        // Reset before it was accepted.
        return;
    };
    let (peer, local) = (canonical(peer), canonical(local));
    if local.port() != TUNNEL_PORT {
        return plaintext::serve(core, served, tcp, peer, local).await;
    }
    match accept(core, served.clone(), tcp, peer, local).await {
        Ok(()) => {}
        Err(error) if error.is_end() => {
            if !error.is_cut() {
                plane.counters.failed(error.kind());
            }
            tracing::debug!(%peer, %local, kind = error.kind(), %error, "inbound tunnel ended");
        }
        Err(error) => {
            plane.counters.failed(error.kind());
            Counters::add(&plane.counters.refused);
            tracing::debug!(%peer, %local, kind = error.kind(), %error, "tunnel refused");
            let state = plane.state.current();
            let mut records = FlowRecords::new(
                &plane.recorder,
                &state,
                Uuid::new_v4(),
                Direction::Ingress,
                Party::unknown(peer),
                destination_party(endpoint(&state, &served).as_deref(), local),
            );
            records.note("error", error.kind().to_owned());
            records.refused(error.reason(), None, state.revision);
        }
    }
}

async fn accept(
    core: Arc<Core>,
    served: Arc<Served>,
    tcp: TcpStream,
    peer: SocketAddr,
    local: SocketAddr,
) -> Result<(), Unaccepted> {
    let plane = core.plane.clone();
    let limits = **plane.limits.load();
    // Fails only on a socket that is gone already, which the handshake finds out.
    let _ = tcp.set_nodelay(true);
    let handshakes = Room { all: limits.handshakes, per_source: limits.handshakes_per_source };
    let handshake = served.handshake(peer.ip(), handshakes);
    let place = served.connection(peer.ip(), connections(limits.open_flows));
    let (Some(handshake), Some(_place)) = (handshake, place) else {
        reset_on_close(&tcp);
        return Err(Unaccepted::Limit);
    };
    let state = plane.state.current();
    let identity = endpoint(&state, &served).ok_or(Unaccepted::Unregistered)?.identity.clone();
    drop(state);
    let svid = plane.svids.get(&identity).ok_or(Unaccepted::SvidMissing(identity.clone()))?;
    let mut trust_changes = plane.trust.subscribe();
    let tls = plane.certificates.server(&svid, &plane.trust)?;
    let (stream, certified) = tokio::select! {
        done = Box::pin(tls.accept(tcp)) => done?,
        () = served.cut.cancelled() => return Err(HboneError::Cut.into()),
    };
    drop(handshake);
    Counters::add(&plane.counters.accepted);
    let until = expiry(&svid, &certified);
    let verified_under = certified.bundle_generation;
    let control = Control { drain: CancellationToken::new(), cut: served.cut.child_token() };
    let (begun, draining) = (Instant::now(), served.drain.clone());
    let (drain, cut) = (control.drain.clone(), control.cut.clone());
    let cut_for = OnceLock::new();
    let tunnel = Arc::new(Tunnel { core, served, peer, local, certified, until, cut, cut_for });
    let serving = async {
        match stream.wire() {
            Wire::Hbone => tunnel.clone().serve_hbone(stream, control).await.map_err(Into::into),
            Wire::Native => tunnel.serve_native(stream, control).await.map_err(Into::into),
        }
    };
    tokio::pin!(serving);
    // Says goodbye when its certificates run out or trust changes: the client dials anew
    // and is verified under what holds then.
    let retire = async {
        tokio::select! {
            () = sleep_until(until.into()) => {}
            () = draining.cancelled() => {
                // Whoever dialled it a moment ago has a request for it, and would dial once
                // more in vain.
                if plane.is_succeeded() {
                    sleep_until((begun + YOUNG).into()).await;
                }
            }
            () = async {
                // An error means that trust is gone, with the whole agent.
                let _ = trust_changes.wait_for(|&now| now != verified_under).await;
            } => {}
        }
        drain.cancel();
        std::future::pending::<()>().await;
    };
    tokio::select! {
        ended = &mut serving => ended,
        () = retire => Ok(()),
        error = tunnel.certified.distrusted(&plane.trust) => {
            tracing::info!(%peer, id = %tunnel.certified.id, %error, "tunnel cut");
            // The reason first: its flows look for it when they are told.
            let _ = tunnel.cut_for.set(error.reason());
            tunnel.cut.cancel();
            match serving.await {
                Err(error) if !Unaccepted::is_cut(&error) => Err(error),
                _ => Ok(()),
            }
        }
    }
}

/// How many connections an endpoint may have. Each may carry a flow, and those that peers keep
/// for their next flow must not stand in the way of others, nor one peer in everybody's. What
/// is over the limit of flows is refused flow by flow, with the reason.
pub(super) fn connections(open_flows: u32) -> Room {
    let per_source = open_flows.saturating_add(8);
    Room { all: per_source.saturating_mul(2), per_source }
}

/// The earlier end of both certificates.
fn expiry(own: &Svid, peer: &PeerSvid) -> Instant {
    deadline(own.not_after.min(peer.not_after))
}

impl Tunnel {
    /// Serves an HTTP/2 connection: its flows are tasks of their own.
    async fn serve_hbone(
        self: Arc<Self>,
        stream: TlsStream,
        control: Control,
    ) -> Result<(), HboneError> {
        let (tracker, settings) = (self.core.tracker.clone(), self.core.plane.config.hbone);
        serve_http2(stream, settings, control, |incoming| {
            let tunnel = self.clone();
            tracker.spawn(async move { tunnel.flow(Incoming::Hbone(incoming)).await });
        })
        .await
    }

    /// Serves a native connection: one flow after the other.
    async fn serve_native(&self, stream: TlsStream, control: Control) -> Result<(), NativeError> {
        let settings = self.core.plane.config.hbone;
        watch_for_death(stream.tcp());
        let mut connection = native::server::Connection::new(stream);
        loop {
            let asked = tokio::select! {
                // A goodbye that is due comes before the next request: its client asks again.
                biased;
                () = control.cut.cancelled() => return Err(NativeError::Cut),
                () = control.drain.cancelled() => return Box::pin(connection.goodbye()).await,
                () = sleep(settings.server_idle) => return Box::pin(connection.goodbye()).await,
                asked = connection.next(settings.preface_timeout) => match asked? {
                    Some(asked) => asked,
                    None => return Ok(()),
                },
            };
            let incoming = Incoming::Native(Box::new(connection.take(asked)));
            match self.flow(incoming).await {
                Some(free) => connection = free,
                None => return Ok(()),
            }
        }
    }

    /// Serves one request to its end; gives a native connection back that may serve another.
    async fn flow(&self, mut incoming: Incoming) -> Option<native::server::Connection<TlsStream>> {
        let plane = &self.core.plane;
        let asked = incoming.asked(self.peer.ip());
        let id = plane.flow_ids.admit(asked.as_ref().ok().and_then(|asked| asked.flow));
        let limit = plane.limits.load().open_flows;
        let place = self.served.flow(limit);
        let registration = self.core.open_flows.register(self.served.key.clone(), &self.cut);
        let state = plane.state.current();
        // The tunnel's TCP peer: a request adds at most the port.
        let claimed = asked.as_ref().ok().and_then(|asked| asked.client_port);
        let client = SocketAddr::new(self.peer.ip(), claimed.unwrap_or(self.peer.port()));
        let destination = asked.as_ref().map_or(self.local, |asked| asked.destination);
        let endpoint = endpoint(&state, &self.served);
        let mut records = FlowRecords::new(
            &plane.recorder,
            &state,
            id.uuid(),
            Direction::Ingress,
            self.source_party(&state, client),
            destination_party(endpoint.as_deref(), destination),
        );
        if let Some(holder) = self.other_holder(&state, client) {
            // The certificate is what counts. But an SVID that is used from where another
            // account's pod is may be a stolen one.
            Counters::add(&plane.counters.misplaced);
            tracing::warn!(
                peer = %self.peer,
                identity = %self.certified.id,
                %holder,
                "an SVID comes from an address of another account's pod"
            );
            records.note("addressOf", holder);
        }
        let admitted = match (&place, asked) {
            (None, _) => Err(Refused::Limit(limit)),
            (Some(_), Err(error)) => Err(error.into()),
            (Some(_), Ok(asked)) => {
                self.admit(asked.destination, client.ip(), |facts| registration.set_facts(facts))
            }
        };
        let (facts, judgement) = match admitted {
            Ok(admitted) => admitted,
            Err(Refused::Policy(judgement)) if self.is_judged() => {
                let facts = self.facts(client.ip(), destination.port());
                return Box::pin(self.by_request(
                    incoming,
                    None,
                    facts,
                    client,
                    judgement,
                    records,
                    &registration,
                ))
                .await;
            }
            Err(refused) => {
                // A peer that is slow to take its refusal holds nobody's place meanwhile.
                drop((place, registration));
                return Box::pin(self.refuse(incoming, records, &refused, state.revision)).await;
            }
        };
        let delivered = tokio::select! {
            delivered = Box::pin(deliver(
                &plane.sockets,
                &self.served,
                destination,
                client,
                plane.config.app_timeout,
            )) => delivered.map_err(Refused::Delivery),
            reason = registration.closed() => Err(Refused::Closed(reason)),
            () = incoming.abandoned() => {
                Counters::add(&plane.counters.abandoned);
                return None;
            }
        };
        let app = match delivered {
            Ok(app) => app,
            Err(refused) => {
                drop((place, registration));
                return Box::pin(self.refuse(incoming, records, &refused, judgement.revision))
                    .await;
            }
        };
        if facts.by_request {
            let app = Some(app);
            return Box::pin(self.by_request(
                incoming,
                app,
                facts,
                client,
                judgement,
                records,
                &registration,
            ))
            .await;
        }
        let counts = Counts::default();
        let (result, free) = match incoming {
            Incoming::Native(incoming) => {
                records.passed(&judgement);
                Counters::add(&plane.counters.forwarded);
                let stop = registration.closed();
                match native::copy::tunnel(app, incoming.accept(), &counts, stop).await {
                    Ok(recycled) => (Ok(()), recycled.map(native::copy::Recycled::server)),
                    Err(error) => (Err(error), None),
                }
            }
            Incoming::Hbone(incoming) => {
                let stream = match incoming.accept() {
                    Ok(stream) => stream,
                    Err(error) => {
                        // The client is gone; the application must not take this for an end.
                        tracing::debug!(flow = %id.uuid(), %error, "client gone before the answer");
                        Counters::add(&plane.counters.abandoned);
                        drop(app);
                        return None;
                    }
                };
                records.passed(&judgement);
                Counters::add(&plane.counters.forwarded);
                let stop = async {
                    registration.closed().await;
                };
                (copy::tunnel(app, stream, &counts, stop).await, None)
            }
        };
        let cut_for = self.cut_for.get().copied();
        records.closed(&counts, result, cut_for, registration.close_reason());
        free
    }

    /// Checks the request and judges it under a state that is current after the flow could
    /// be found by whoever re-judges.
    fn admit(
        &self,
        destination: SocketAddr,
        client: IpAddr,
        set_facts: impl Fn(Facts),
    ) -> Result<(Facts, Judgement), Refused> {
        let plane = &self.core.plane;
        if self.served.drain.is_cancelled() && !plane.is_succeeded() {
            return Err(Refused::Draining);
        }
        if Instant::now() >= self.until {
            return Err(Refused::Expired);
        }
        if plane.trust.generation() != self.certified.bundle_generation
            && self.certified.verify_again(&plane.trust, jiff::Timestamp::now()).is_err()
        {
            return Err(Refused::Untrusted);
        }
        loop {
            let state = plane.state.current();
            let endpoint = endpoint(&state, &self.served).ok_or(Refused::Unregistered)?;
            if !may_be_asked_for(&endpoint, self.local, destination) {
                return Err(Refused::WrongDestination(destination));
            }
            let mut facts = self.facts(client, destination.port());
            facts.by_request = asks_requests(&state, &endpoint, &facts);
            set_facts(facts.clone());
            if !Arc::ptr_eq(&state, &plane.state.current()) {
                continue;
            }
            let judgement = judge(&state, &endpoint, &facts);
            return if judgement.passes() {
                Ok((facts, judgement))
            } else {
                Err(Refused::Policy(judgement))
            };
        }
    }

    fn facts(&self, client: IpAddr, port: u16) -> Facts {
        Facts {
            direction: Direction::Ingress,
            peer: Some(self.certified.id.clone()),
            proven: true,
            peer_ip: client,
            port,
            by_request: false,
        }
    }

    /// True when refused clients are told request by request.
    fn is_judged(&self) -> bool {
        let state = self.core.plane.state.current();
        endpoint(&state, &self.served).is_some_and(|endpoint| endpoint.judged)
    }

    /// Serves a flow whose requests are judged; without an application where none may pass.
    #[allow(clippy::too_many_arguments, reason = "all that is known of a flow by then")]
    async fn by_request(
        &self,
        incoming: Incoming,
        app: Option<TcpStream>,
        facts: Facts,
        client: SocketAddr,
        judgement: Judgement,
        records: FlowRecords,
        registration: &Registration,
    ) -> Option<native::server::Connection<TlsStream>> {
        let carrier = match incoming.carry() {
            Ok(carrier) => carrier,
            Err(error) => {
                tracing::debug!(%client, %error, "client gone before the answer");
                Counters::add(&self.core.plane.counters.abandoned);
                return None;
            }
        };
        let (core, served, cut_for) = (&self.core, &self.served, Some(&self.cut_for));
        let admitted =
            Admitted { core, served, facts, client, judgement, records, registration, cut_for };
        match admitted.serve(carrier, app).await? {
            Carrier::Native(stream) => stream.recycle().map(native::copy::Recycled::server),
            Carrier::Hbone(_) | Carrier::Plain(_) => None,
        }
    }

    /// The client as the record shows it. Its names come from the world by address, and
    /// only when the certificate agrees with what the world says of that address.
    fn source_party(&self, state: &NodeState, client: SocketAddr) -> Party {
        let identity = self.certified.id.clone();
        let pod = state
            .world
            .pods_by_ip
            .get(&client.ip())
            .and_then(|uid| state.world.pods.get(uid))
            .filter(|pod| identity_of(&state.world, pod).as_ref() == Some(&identity));
        match pod {
            Some(pod) => pod_party(pod, Some(identity), KnownBy::Mtls, client, None),
            None => Party {
                identity: Some(identity),
                known_by: KnownBy::Mtls,
                ..Party::unknown(client)
            },
        }
    }

    /// The pod that has the client's address, when it is of another account than the SVID.
    fn other_holder(&self, state: &NodeState, client: SocketAddr) -> Option<String> {
        let pod = state.world.pods.get(state.world.pods_by_ip.get(&client.ip())?)?;
        let identity = identity_of(&state.world, pod)?;
        let differs = !names_of(&identity, &state.world.federation).contains(&self.certified.id);
        differs.then(|| format!("{}/{}", pod.name.namespace, pod.name.name))
    }

    /// Records the refusal and answers with its reason.
    async fn refuse(
        &self,
        incoming: Incoming,
        mut records: FlowRecords,
        why: &Refused,
        revision: u64,
    ) -> Option<native::server::Connection<TlsStream>> {
        let plane = &self.core.plane;
        Counters::add(&plane.counters.refused);
        tracing::debug!(
            peer = %self.peer,
            identity = %self.certified.id.as_str(),
            destination = %incoming.shown(),
            error = %why,
            "inbound flow refused"
        );
        let policy = why.policy();
        // The names of our policies are for our own trust domain.
        let own = plane.state.current().world.trust_domain == self.certified.id.trust_domain();
        let told = policy.clone().filter(|_| own);
        records.refused(why.reason(), policy, revision);
        match incoming {
            Incoming::Native(incoming) => incoming.refuse(why.reason(), told).await,
            Incoming::Hbone(incoming) => {
                incoming.refuse(&Refusal::new(why.reason()).with_policy(told));
                None
            }
        }
    }
}

/// A request over either wire, not answered yet.
enum Incoming {
    Hbone(hbone::server::Incoming),
    Native(Box<native::server::Incoming<TlsStream>>),
}

/// What a request asks for.
struct Asked {
    destination: SocketAddr,
    client_port: Option<u16>,
    flow: Option<Uuid>,
}

impl Incoming {
    /// What it asks for. A port that is claimed with another address than the tunnel's peer has
    /// is not the client's.
    fn asked(&self, peer: IpAddr) -> Result<Asked, HeadError> {
        match self {
            Self::Native(incoming) => {
                let native::frame::Open { destination, client_port, flow } = incoming.open;
                Ok(Asked { destination, client_port, flow })
            }
            Self::Hbone(incoming) => {
                let open = incoming.head.as_ref().map_err(Clone::clone)?;
                let client_port = open.client.filter(|client| client.ip() == peer);
                Ok(Asked {
                    destination: open.destination,
                    client_port: client_port.map(|client| client.port()),
                    flow: open.flow,
                })
            }
        }
    }

    /// Answers that the application has accepted, for who reads what is asked.
    fn carry(self) -> Result<Carrier, h2::Error> {
        Ok(match self {
            Self::Native(incoming) => Carrier::Native(Box::new(incoming.accept().into())),
            Self::Hbone(incoming) => Carrier::Hbone(incoming.accept()?.into()),
        })
    }

    /// Completes when the client has given the flow up or the connection is gone.
    async fn abandoned(&mut self) {
        match self {
            Self::Hbone(incoming) => incoming.abandoned().await,
            Self::Native(incoming) => incoming.abandoned().await,
        }
    }

    /// Where it wants to go, fit for logs.
    fn shown(&self) -> String {
        match self {
            Self::Hbone(incoming) => incoming.authority.clone(),
            Self::Native(incoming) => incoming.open.destination.to_string(),
        }
    }
}

/// The endpoint's entry, when it is still the same one.
pub(super) fn endpoint(state: &NodeState, served: &Served) -> Option<Arc<EndpointState>> {
    state.endpoints.get(&served.key.netns).filter(|e| e.key == served.key).cloned()
}

/// The pod as the destination of a flow.
pub(super) fn destination_party(endpoint: Option<&EndpointState>, address: SocketAddr) -> Party {
    match endpoint {
        Some(endpoint) if endpoint.addresses.contains(&address.ip()) => pod_party(
            &endpoint.pod,
            Some(endpoint.identity.clone()),
            KnownBy::Kernel,
            address,
            None,
        ),
        _ => Party::unknown(address),
    }
}

/// True when a CONNECT over a tunnel to `local` may name `destination`: the very address
/// that the tunnel was dialled by, one of the pod's own, never one that means something
/// else inside the pod, never a port of ours.
pub(super) fn may_be_asked_for(
    endpoint: &EndpointState,
    local: SocketAddr,
    destination: SocketAddr,
) -> bool {
    let ip = destination.ip();
    let special = ip.is_loopback()
        || ip.is_unspecified()
        || ip.is_multicast()
        || match ip {
            IpAddr::V4(v4) => v4.is_link_local() || v4.is_broadcast(),
            IpAddr::V6(v6) => v6.is_unicast_link_local(),
        };
    let port = destination.port();
    let (first, count) = endpoint.listener6;
    let ours = port == TUNNEL_PORT
        || (endpoint.listener4 != 0 && port == endpoint.listener4)
        || (first != 0 && port.checked_sub(first).is_some_and(|n| n < count));
    ip == local.ip() && endpoint.addresses.contains(&ip) && !special && port != 0 && !ours
}

/// IPv4 where it is mapped.
fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}
