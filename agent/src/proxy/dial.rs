//! Dialling a tunnel: from the source pod's own namespace and address, with its identity.

use std::{
    io,
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::{Duration, Instant},
};

use jiff::Timestamp;
use signet_ebpf::abi::{Reason, TUNNEL_PORT};
use socket2::{SockRef, TcpKeepalive};
use tokio::{
    net::{TcpSocket, TcpStream},
    time::timeout,
};
use tokio_util::task::TaskTracker;

use super::{counters::Counters, plane::Plane, served::Served};
use crate::{
    cluster::model::PodUid,
    endpoint::state::EndpointKey,
    spiffe::SpiffeId,
    tunnel::{
        hbone::{HboneError, client},
        native,
        pool::{Carrier, Dialled, Stamp},
        tls::{PeerSvid, TlsError, TlsStream, Wire},
    },
};

/// How long before its certificates run out a client gives a tunnel up, at most.
const AHEAD: Duration = Duration::from_secs(5);

/// What flows must have in common to share a tunnel connection.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct TunnelKey {
    /// The source pod and its network namespace.
    pub source: EndpointKey,
    /// The source's identity.
    pub identity: SpiffeId,
    /// The source's address.
    pub source_ip: IpAddr,
    /// The destination pod's address.
    pub destination: IpAddr,
    /// The destination pod: one that gets the address of another, even under the same
    /// identity, does not get its connections, which nobody answers any more.
    pub pod: Option<PodUid>,
    /// The only identities that the destination may prove.
    pub expected: Arc<[SpiffeId]>,
}

/// Why there is no tunnel.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DialError {
    /// No SVID yet.
    #[error("no SVID has been issued for {0} yet; `signet status` shows the issuer's state")]
    SvidMissing(SpiffeId),
    /// No socket in the source pod's namespace, or not with its address.
    #[error("no socket from {source_ip} in the source pod's network namespace: {source}")]
    Socket {
        /// The source's address.
        source_ip: IpAddr,
        /// What failed.
        #[source]
        source: io::Error,
    },
    /// The destination's node refuses.
    #[error(
        "{destination} does not accept tunnels: {source}; maybe its agent is down or a NetworkPolicy blocks port 15008"
    )]
    Connect {
        /// The destination.
        destination: SocketAddr,
        /// What failed.
        #[source]
        source: io::Error,
    },
    /// The destination's node does not answer.
    #[error(
        "{destination} did not answer within {within:?}; maybe a NetworkPolicy blocks port 15008"
    )]
    ConnectTimeout {
        /// The destination.
        destination: SocketAddr,
        /// The limit.
        within: Duration,
    },
    /// The TLS handshake failed.
    #[error("the TLS handshake with {destination} failed: {source}")]
    Tls {
        /// The destination.
        destination: SocketAddr,
        /// What failed.
        #[source]
        source: TlsError,
    },
    /// The peer does not speak HBONE.
    #[error("{destination} does not speak HBONE: {source}")]
    Hbone {
        /// The destination.
        destination: SocketAddr,
        /// What failed.
        #[source]
        source: HboneError,
    },
}

impl DialError {
    /// The reason in flow records.
    pub fn reason(&self) -> Reason {
        match self {
            Self::SvidMissing(_) => Reason::SvidMissing,
            Self::Socket { .. } | Self::Connect { .. } | Self::ConnectTimeout { .. } => {
                Reason::PeerUnreachable
            }
            Self::Tls { source, .. } => source.reason(),
            Self::Hbone { source, .. } => source.reason(),
        }
    }

    /// A short stable name for counters and records.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::SvidMissing(_) => "svid_missing",
            Self::Socket { .. } => "socket",
            Self::Connect { .. } => "connect",
            Self::ConnectTimeout { .. } => "connect_timeout",
            Self::Tls { source, .. } => source.kind(),
            Self::Hbone { source, .. } => source.kind(),
        }
    }
}

/// Dials `key`'s destination; the connection's driver runs on `tracker` until the
/// endpoint's end.
pub async fn dial(
    plane: Arc<Plane>,
    tracker: TaskTracker,
    served: Arc<Served>,
    key: TunnelKey,
) -> Result<Dialled, DialError> {
    let result = attempt(&plane, tracker, &served, &key).await;
    match &result {
        Ok(_) => Counters::add(&plane.counters.dialled),
        Err(error) => {
            plane.counters.failed(error.kind());
            tracing::debug!(
                source.uid = %key.source.uid,
                destination = %key.destination,
                kind = error.kind(),
                error = %error,
                "tunnel not established"
            );
        }
    }
    result
}

async fn attempt(
    plane: &Plane,
    tracker: TaskTracker,
    served: &Served,
    key: &TunnelKey,
) -> Result<Dialled, DialError> {
    let svid = plane
        .svids
        .get(&key.identity)
        .ok_or_else(|| DialError::SvidMissing(key.identity.clone()))?;
    let destination = SocketAddr::new(key.destination, TUNNEL_PORT);
    let tls_error = |source| DialError::Tls { destination, source };
    let tls = plane.certificates.client(&svid, &plane.trust).map_err(tls_error)?;
    let tcp = connect(plane, served, key.source_ip, destination).await?;
    let (stream, peer) = tls.connect(tcp, &key.expected).await.map_err(tls_error)?;
    // The generation that verified it: a change during the handshake makes it stale.
    let stamp = Stamp { trust: peer.bundle_generation, ..plane.stamp(&svid) };
    let not_after = svid.not_after.min(peer.not_after);
    let now = Instant::now();
    let deadline = now.checked_add(usable_for(not_after, Timestamp::now())).unwrap_or(now);
    let peer = Arc::new(peer);
    let carrier = match stream.wire() {
        Wire::Native => {
            watch_for_death(stream.tcp());
            Carrier::Own(Box::new(native::client::Connection::new(stream)))
        }
        Wire::Hbone => {
            Carrier::Shared(share(plane, tracker, served, destination, stream, &peer).await?)
        }
    };
    Ok(Dialled { carrier, stamp, deadline, peer })
}

/// Speaks HTTP/2's preface and lets the connection's driver run.
async fn share(
    plane: &Plane,
    tracker: TaskTracker,
    served: &Served,
    destination: SocketAddr,
    stream: TlsStream,
    peer: &Arc<PeerSvid>,
) -> Result<client::Client, DialError> {
    let (client, driver) = client::handshake(stream, plane.config.hbone)
        .await
        .map_err(|source| DialError::Hbone { destination, source })?;
    let (cut, ender, trust) = (served.cut.clone(), client.ender(), plane.trust.clone());
    let peer = peer.clone();
    tracker.spawn(async move {
        tokio::select! {
            ended = driver.run(cut) => {
                if let Err(error) = ended {
                    tracing::debug!(%destination, kind = error.kind(), %error, "tunnel ended");
                }
            }
            // Dropping the driver resets every flow of the connection.
            error = peer.distrusted(&trust) => {
                tracing::info!(%destination, peer = %peer.id, %error, "tunnel cut");
                ender.end(error.reason());
            }
        }
    });
    Ok(client)
}

/// Lets the kernel notice a peer that is gone, in half a minute as HTTP/2's PING would: the
/// native wire has no frames for it.
pub(super) fn watch_for_death(tcp: &TcpStream) {
    let socket = SockRef::from(tcp);
    let probes = TcpKeepalive::new()
        .with_time(Duration::from_secs(10))
        .with_interval(Duration::from_secs(5))
        .with_retries(4);
    // They fail only on a socket that is gone already, which the first read finds out.
    let _ = socket.set_tcp_keepalive(&probes);
    let _ = socket.set_tcp_user_timeout(Some(Duration::from_secs(30)));
}

/// How long a client begins flows on a tunnel whose certificates run out at `not_after`: somewhat
/// less than they last, so that a flow that is on its way at their end, or a server whose clock
/// is ahead, does not meet it.
fn usable_for(not_after: Timestamp, now: Timestamp) -> Duration {
    let left = Duration::try_from(now.duration_until(not_after)).unwrap_or_default();
    left - AHEAD.min(left / 10)
}

/// A TCP connection from the pod's own namespace and address.
pub async fn connect(
    plane: &Plane,
    served: &Served,
    source_ip: IpAddr,
    destination: SocketAddr,
) -> Result<TcpStream, DialError> {
    let socket_error = |source| DialError::Socket { source_ip, source };
    let fd =
        (plane.sockets.tcp)(&served.netns, destination.is_ipv6()).await.map_err(socket_error)?;
    let socket = TcpSocket::from_std_stream(fd.into());
    socket.bind(SocketAddr::new(source_ip, 0)).map_err(socket_error)?;
    let within = plane.config.connect_timeout;
    match timeout(within, socket.connect(destination)).await {
        Ok(Ok(stream)) => Ok(stream),
        Ok(Err(source)) => Err(DialError::Connect { destination, source }),
        Err(_) => Err(DialError::ConnectTimeout { destination, within }),
    }
}

/// A point of time on the clock that sleeps are measured by.
pub fn deadline(until: Timestamp) -> Instant {
    let left = Timestamp::now().duration_until(until);
    let now = Instant::now();
    Duration::try_from(left).map_or(now, |left| now.checked_add(left).unwrap_or(now))
}

/// Stamp of the connections that a dial begun now would make.
pub fn current_stamp(plane: &Plane, identity: &SpiffeId) -> Option<Stamp> {
    plane.svids.get(identity).map(|svid| plane.stamp(&svid))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tunnel_is_given_up_before_its_certificates_run_out() {
        let now = Timestamp::UNIX_EPOCH;
        let after = |seconds: u64| now.checked_add(Duration::from_secs(seconds)).unwrap();
        assert_eq!(usable_for(after(3600), now), Duration::from_secs(3595));
        assert_eq!(usable_for(after(10), now), Duration::from_secs(9));
        assert_eq!(usable_for(now, now), Duration::ZERO);
        assert_eq!(usable_for(now, after(10)), Duration::ZERO, "they ran out");
    }
}
