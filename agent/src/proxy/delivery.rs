//! The last hop: from the tunnel to the application, inside the pod's network namespace,
//! with the client's address shown to the application's socket.

use std::{
    io,
    net::SocketAddr,
    os::fd::AsFd,
    time::{Duration, Instant},
};

use rustix::io::Errno;
use signet_ebpf::abi::{FlowKey, Reason};
use tokio::{
    net::TcpStream,
    time::{sleep, timeout},
};

use super::{served::Served, sockets::PodSockets};
use crate::{
    kernel::{Confirm, FlowSockets, KernelError},
    tunnel::copy::reset_on_close,
};

/// How long the application's end may take to have the client's address. It has it when
/// the handshake's last packet has crossed the pod's loopback.
const CONFIRM_WITHIN: Duration = Duration::from_secs(1);

/// Why a flow was not delivered.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DeliveryError {
    /// No socket in the pod's namespace.
    #[error("no socket can be made in the pod's network namespace: {0}")]
    Socket(#[source] io::Error),
    /// The application refuses, or there is none.
    #[error("the application at {address} does not accept: {source}")]
    Refused {
        /// Its address.
        address: SocketAddr,
        /// What connect said.
        #[source]
        source: io::Error,
    },
    /// The application's backlog is full, or something drops the packets.
    #[error("the application at {address} did not accept within {within:?}")]
    Timeout {
        /// Its address.
        address: SocketAddr,
        /// The limit.
        within: Duration,
    },
    /// The client's address could not be put on the socket.
    #[error("the client's address cannot be handed over: {0}")]
    HandOver(#[source] KernelError),
    /// The application's socket did not take the client's address.
    #[error(
        "the application's socket did not take the client's address ({0:?}); is the application in a cgroup below the workloads root?"
    )]
    NotTaken(Confirm),
}

impl DeliveryError {
    /// The reason in flow records.
    pub fn reason(&self) -> Reason {
        match self {
            Self::Socket(_) | Self::Refused { .. } | Self::Timeout { .. } => Reason::AppUnreachable,
            Self::HandOver(_) | Self::NotTaken(_) => Reason::SourceNotPreserved,
        }
    }
}

/// The hand-over's entry, taken back unless the application's socket took it.
struct Entry<'a> {
    sockets: &'a PodSockets,
    key: FlowKey,
    taken: bool,
}

impl Drop for Entry<'_> {
    fn drop(&mut self) {
        if !self.taken {
            (self.sockets.forget)(&self.key);
        }
    }
}

/// Connects to the application at `address`, which sees `client` as its peer.
///
/// # Errors
/// When the application does not accept, or would see another peer: then the connection
/// is reset before a byte is delivered.
pub async fn deliver(
    sockets: &PodSockets,
    served: &Served,
    address: SocketAddr,
    client: SocketAddr,
    within: Duration,
) -> Result<TcpStream, DeliveryError> {
    let refused = |source| DeliveryError::Refused { address, source };
    let socket =
        (sockets.tcp)(&served.netns, address.is_ipv6()).await.map_err(DeliveryError::Socket)?;
    (sockets.set_client)(socket.as_fd(), client).map_err(DeliveryError::HandOver)?;
    let started = rustix::net::connect(&socket, &address);
    // The port is chosen by now, also when the connect has failed already: the entry of a
    // failed dial has to be found, too.
    let local = rustix::net::getsockname(&socket)
        .ok()
        .and_then(|local| SocketAddr::try_from(local).ok())
        .ok_or_else(|| DeliveryError::Socket(io::ErrorKind::AddrNotAvailable.into()))?;
    let local_ip = if local.ip().is_unspecified() { address.ip() } else { local.ip() };
    let key = FlowSockets::client_key(
        served.netns.cookie,
        SocketAddr::new(local_ip, local.port()),
        address,
    );
    let mut entry = Entry { sockets, key, taken: false };
    match started {
        Ok(()) | Err(Errno::INPROGRESS) => {}
        Err(error) => return Err(refused(error.into())),
    }
    let stream = TcpStream::from_std(socket.into()).map_err(DeliveryError::Socket)?;
    reset_on_close(&stream);
    // The pod's loopback carries the whole handshake within the call, when the application has
    // room for it: then there is nothing to wait for.
    if let Some(error) = stream.take_error().map_err(refused)? {
        return Err(refused(error));
    }
    if (sockets.confirm)(&key) == Confirm::Taken {
        entry.taken = true;
        return Ok(stream);
    }
    match timeout(within, stream.writable()).await {
        Ok(ready) => ready.map_err(refused)?,
        Err(_) => return Err(DeliveryError::Timeout { address, within }),
    }
    if let Some(error) = stream.take_error().map_err(refused)? {
        return Err(refused(error));
    }
    let confirmed = confirm(sockets, &key).await;
    if confirmed != Confirm::Taken {
        return Err(DeliveryError::NotTaken(confirmed));
    }
    entry.taken = true;
    Ok(stream)
}

/// Waits for the application's socket to take its client's address.
async fn confirm(sockets: &PodSockets, key: &FlowKey) -> Confirm {
    let until = Instant::now() + CONFIRM_WITHIN;
    let mut pause = Duration::from_micros(200);
    loop {
        match (sockets.confirm)(key) {
            Confirm::Waiting if Instant::now() < until => {
                sleep(pause).await;
                pause = (pause * 2).min(Duration::from_millis(50));
            }
            answer => return answer,
        }
    }
}
