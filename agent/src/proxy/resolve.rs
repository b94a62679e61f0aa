//! From what an application dialled to whom its flow goes and how (DESIGN §2, §4.3).
//!
//! Pure. The choice between tunnel and direct follows the *desired* mode of the peer: an
//! enrolled peer that is not served is refused from a strict source, never dialled in clear.

use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use signet_ebpf::abi::{Mode, Reason, proto};

use crate::{
    cluster::{
        model::{ObjectName, Pod, Ranges, Service, World},
        serving::by_affinity,
    },
    spiffe::{SpiffeId, TrustDomain},
    trust::federation::Federation,
};

/// Who dials.
#[derive(Clone, Copy, Debug)]
pub struct Source<'a> {
    /// The pod's mode.
    pub mode: Mode,
    /// Its own addresses.
    pub addresses: &'a [IpAddr],
    /// Its node.
    pub node: Option<&'a str>,
}

/// Where a flow goes.
#[derive(Clone, Debug)]
pub struct Route {
    /// The application's address: a pod's, never a virtual one (unless it goes direct to
    /// something that Signet does not know).
    pub destination: SocketAddr,
    /// The pod that has it.
    pub pod: Option<Arc<Pod>>,
    /// The Service that was dialled.
    pub service: Option<ObjectName>,
    /// How.
    pub path: Path,
}

/// How a flow travels.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Path {
    /// Through a tunnel to the only identity that the pod may have.
    Tunnel(SpiffeId),
    /// Through a tunnel to a peer outside the cluster, who may be any of these.
    Remote(Arc<[SpiffeId]>),
    /// In clear; the identity that the address shows.
    Direct(Option<SpiffeId>),
}

impl Path {
    /// The other side's identity, where there is only one that it may have.
    pub fn identity(&self) -> Option<&SpiffeId> {
        match self {
            Self::Tunnel(identity) => Some(identity),
            Self::Remote(identities) => match &**identities {
                [identity] => Some(identity),
                _ => None,
            },
            Self::Direct(identity) => identity.as_ref(),
        }
    }
}

/// Why there is nowhere to go.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RouteError {
    /// The Service has no such port.
    #[error("the Service {}/{} has no TCP port {port}", service.namespace, service.name)]
    NoServicePort {
        /// The Service.
        service: ObjectName,
        /// What was dialled.
        port: u16,
    },
    /// The Service's port has no endpoint that takes flows.
    #[error("no endpoint of {}/{} is ready", service.namespace, service.name)]
    NoEndpoint {
        /// The Service.
        service: ObjectName,
    },
    /// The peer's namespace is enrolled and its node has not announced it.
    #[error("{}/{} is enrolled, but its node does not serve it (yet): is an agent running there?",
        pod.namespace, pod.name)]
    NotServed {
        /// The peer.
        pod: ObjectName,
    },
    /// The address is inside the cluster's ranges and nobody known has it.
    #[error(
        "{ip} is inside the cluster's ranges and no pod that is known has it; if it is outside the mesh, list it in outsideRanges"
    )]
    UnknownAddress {
        /// The address.
        ip: IpAddr,
    },
    /// The pod's service account makes no SPIFFE ID.
    #[error("the identity of {}/{} cannot be named", pod.namespace, pod.name)]
    NoIdentity {
        /// The peer.
        pod: ObjectName,
    },
}

impl RouteError {
    /// The reason in flow records.
    pub fn reason(&self) -> Reason {
        match self {
            Self::NoServicePort { .. } | Self::NoEndpoint { .. } | Self::NotServed { .. } => {
                Reason::PeerUnreachable
            }
            Self::UnknownAddress { .. } | Self::NoIdentity { .. } => Reason::IdentityUnknown,
        }
    }
}

/// Resolves what was dialled. `pick` chooses among a Service's endpoints: a random number.
///
/// # Errors
/// Where a source of this mode may not go there.
pub fn route(
    world: &World,
    source: Source<'_>,
    dialled: SocketAddr,
    pick: u64,
) -> Result<Route, RouteError> {
    let ip = dialled.ip().to_canonical();
    let address = SocketAddr::new(ip, dialled.port());
    let Some(service) = world.service_at(address, proto::TCP) else {
        return pod_route(world, source, address, None);
    };
    let Some(port) =
        service.ports.iter().find(|p| p.port == dialled.port() && p.protocol == proto::TCP)
    else {
        return unserved_service_port(source, service, address);
    };
    let mut candidates = world.endpoints_for(service, port, ip, source.node);
    if candidates.is_empty() {
        return Err(RouteError::NoEndpoint { service: service.name.clone() });
    }
    // The first that this source may reach, beginning at a random one, or at its own.
    let mut start = usize::try_from(pick % candidates.len() as u64).unwrap_or(0);
    if service.sticky
        && let Some(client) = source.addresses.first()
    {
        by_affinity(&mut candidates, *client);
        start = 0;
    }
    let mut refused = None;
    for endpoint in candidates[start..].iter().chain(&candidates[..start]) {
        let address = SocketAddr::new(endpoint.ip.to_canonical(), endpoint.port);
        match pod_route(world, source, address, Some(service)) {
            Ok(route) => return Ok(route),
            Err(error) => {
                refused.get_or_insert(error);
            }
        }
    }
    Err(refused.unwrap_or(RouteError::NoEndpoint { service: service.name.clone() }))
}

/// A Service address with a port that the Service does not have.
fn unserved_service_port(
    source: Source<'_>,
    service: &Service,
    address: SocketAddr,
) -> Result<Route, RouteError> {
    if source.mode == Mode::Strict {
        return Err(RouteError::NoServicePort {
            service: service.name.clone(),
            port: address.port(),
        });
    }
    Ok(Route {
        destination: address,
        pod: None,
        service: Some(service.name.clone()),
        path: Path::Direct(None),
    })
}

/// A pod's address, or one that is nobody's.
fn pod_route(
    world: &World,
    source: Source<'_>,
    destination: SocketAddr,
    service: Option<&Service>,
) -> Result<Route, RouteError> {
    let ip = destination.ip();
    let strict = source.mode == Mode::Strict;
    let pod = world.pods_by_ip.get(&ip).and_then(|uid| world.pods.get(uid));
    let service = service.map(|s| s.name.clone());
    let Some(pod) = pod else {
        if let Some(identities) = remote_peers(world, ip) {
            return Ok(Route { destination, pod: None, service, path: Path::Remote(identities) });
        }
        let node = world.nodes.values().any(|addresses| addresses.contains(&ip));
        let own = source.addresses.contains(&ip);
        if strict && !node && !own && world.ranges.holds(ip) {
            return Err(RouteError::UnknownAddress { ip });
        }
        return Ok(Route { destination, pod: None, service, path: Path::Direct(None) });
    };
    let identity = identity_of(world, pod);
    let direct = |identity| Route {
        destination,
        pod: Some(pod.clone()),
        service: service.clone(),
        path: Path::Direct(identity),
    };
    // Its own address never leaves the pod.
    if source.addresses.contains(&ip) || !pod.is_tunnelled() {
        return Ok(direct(identity));
    }
    if !pod.is_ambient() && !world.served.contains_key(&pod.uid) {
        return if strict {
            Err(RouteError::NotServed { pod: pod.name.clone() })
        } else {
            Ok(direct(identity))
        };
    }
    let Some(identity) = identity else {
        return Err(RouteError::NoIdentity { pod: pod.name.clone() });
    };
    Ok(Route { destination, pod: Some(pod.clone()), service, path: Path::Tunnel(identity) })
}

/// Who may answer at an address of remote peers, unless a more specific range says what it is.
fn remote_peers(world: &World, ip: IpAddr) -> Option<Arc<[SpiffeId]>> {
    let remote = world.federation.remote(ip)?;
    let Ranges { pods, services, outside } = &world.ranges;
    let narrower = [pods, services, outside]
        .into_iter()
        .flatten()
        .any(|net| net.contains(&ip) && net.prefix_len() > remote.range.prefix_len());
    (!narrower).then(|| remote.identities.clone())
}

/// The identity of a pod's service account in our own trust domain.
pub fn identity_of(world: &World, pod: &Pod) -> Option<SpiffeId> {
    SpiffeId::for_service_account(&world.trust_domain, &pod.name.namespace, &pod.service_account)
        .ok()
}

/// The identity under every name of our own domain: while the domain gets a new one, the
/// peer's node may still have SVIDs of the old one, or have the new ones already.
pub fn names_of(identity: &SpiffeId, federation: &Federation) -> Arc<[SpiffeId]> {
    let renamed = |domain: &TrustDomain| {
        SpiffeId::parse(&format!("spiffe://{domain}{}", identity.path())).ok()
    };
    std::iter::once(identity.clone()).chain(federation.aliases.iter().filter_map(renamed)).collect()
}
