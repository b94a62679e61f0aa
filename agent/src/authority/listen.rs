//! The authority's TLS listener: a certificate of its own, renewed in place; bounded numbers of
//! handshakes and connections.

use std::{
    collections::HashMap,
    fmt, io,
    net::{IpAddr, SocketAddr},
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    task::{Context, Poll},
    time::Duration,
};

use arc_swap::ArcSwap;
use rustls::{
    ServerConfig,
    server::{ClientHello, ResolvesServerCert},
    sign::CertifiedKey,
    version::{TLS12, TLS13},
};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore, mpsc},
    time,
};
use tokio_rustls::{TlsAcceptor, server::TlsStream};
use tonic::transport::server::Connected;

use super::{keeper::Signing, metrics::AuthorityMetrics};

/// A handshake that takes longer is given up.
const HANDSHAKE: Duration = Duration::from_secs(10);
/// Handshakes at the same time.
const MAX_HANDSHAKES: usize = 256;
/// Connections at the same time.
const MAX_CONNECTIONS: usize = 4096;

/// Connections from one address at the same time: nobody takes all of them.
const MAX_PER_SOURCE: usize = 128;

/// How many connections each address has.
#[derive(Clone, Default)]
struct Sources(Arc<Mutex<HashMap<IpAddr, usize>>>);

/// One connection of an address; gone with it.
struct Share {
    sources: Sources,
    source: IpAddr,
}

impl Sources {
    /// Room for one more, or `None`.
    fn enter(&self, source: IpAddr) -> Option<Share> {
        let source = source.to_canonical();
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let held = all.entry(source).or_default();
        if *held >= MAX_PER_SOURCE {
            return None;
        }
        *held += 1;
        Some(Share { sources: self.clone(), source })
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        let mut all = self.sources.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(held) = all.get_mut(&self.source) {
            *held -= 1;
            if *held == 0 {
                all.remove(&self.source);
            }
        }
    }
}

/// Where a connection comes from.
#[derive(Clone, Copy, Debug)]
pub struct Peer(pub SocketAddr);

/// A TLS configuration whose certificate is always the replica's present one.
pub fn tls(
    signing: Arc<ArcSwap<Signing>>,
    alpn: &[&[u8]],
) -> Result<Arc<ServerConfig>, rustls::Error> {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let mut config = ServerConfig::builder_with_provider(provider)
        // 1.2 for clients of Istio's API that know no better.
        .with_protocol_versions(&[&TLS13, &TLS12])?
        .with_no_client_auth()
        .with_cert_resolver(Arc::new(Present(signing)));
    config.alpn_protocols = alpn.iter().map(|p| p.to_vec()).collect();
    Ok(Arc::new(config))
}

struct Present(Arc<ArcSwap<Signing>>);

impl ResolvesServerCert for Present {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.0.load().serving().clone())
    }
}

impl fmt::Debug for Present {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Present")
    }
}

/// Accepts connections and shakes hands with many at a time; the receiver gets those that
/// succeeded; all are counted under the listener's `name`. Ends when the receiver is dropped.
pub fn accept(
    listener: TcpListener,
    tls: Arc<ServerConfig>,
    name: &'static str,
    metrics: AuthorityMetrics,
) -> mpsc::Receiver<io::Result<Connection>> {
    let (sender, receiver) = mpsc::channel(64);
    tokio::spawn(async move {
        let acceptor = TlsAcceptor::from(tls);
        let handshakes = Arc::new(Semaphore::new(MAX_HANDSHAKES));
        let connections = Arc::new(Semaphore::new(MAX_CONNECTIONS));
        let sources = Sources::default();
        loop {
            let Ok(room) = connections.clone().acquire_owned().await else { return };
            let Ok(turn) = handshakes.clone().acquire_owned().await else { return };
            let accepted = tokio::select! {
                accepted = listener.accept() => accepted,
                () = sender.closed() => return,
            };
            let (stream, peer) = match accepted {
                Ok(accepted) => accepted,
                Err(error) => {
                    // Out of descriptors, or a client that went: neither ends the listener.
                    tracing::warn!(%error, "a connection was not accepted");
                    time::sleep(Duration::from_millis(50)).await;
                    continue;
                }
            };
            let Some(share) = sources.enter(peer.ip()) else {
                tracing::debug!(%peer, "too many connections from this address");
                metrics.handshake(name, "too_many");
                continue;
            };
            let (acceptor, sender) = (acceptor.clone(), sender.clone());
            let metrics = metrics.clone();
            tokio::spawn(async move {
                let _ = stream.set_nodelay(true);
                let shaken = time::timeout(HANDSHAKE, acceptor.accept(stream)).await;
                drop(turn);
                metrics.handshake(
                    name,
                    match &shaken {
                        Ok(Ok(_)) => "ok",
                        Ok(Err(_)) => "failed",
                        Err(_) => "timeout",
                    },
                );
                match shaken {
                    Ok(Ok(stream)) => {
                        let connection = Connection { stream, peer, _room: (room, share) };
                        let _ = sender.send(Ok(connection)).await;
                    }
                    Ok(Err(error)) => tracing::debug!(%peer, %error, "no TLS handshake"),
                    Err(_) => tracing::debug!(%peer, "the TLS handshake took too long"),
                }
            });
        }
    });
    receiver
}

/// An accepted connection.
pub struct Connection {
    stream: TlsStream<TcpStream>,
    peer: SocketAddr,
    _room: (OwnedSemaphorePermit, Share),
}

impl Connection {
    /// Where it comes from.
    pub fn peer(&self) -> SocketAddr {
        self.peer
    }
}

impl Connected for Connection {
    type ConnectInfo = Peer;

    fn connect_info(&self) -> Peer {
        Peer(self.peer)
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_address_does_not_take_all_connections() {
        let sources = Sources::default();
        let (a, b): (IpAddr, IpAddr) = ("10.0.0.1".parse().unwrap(), "10.0.0.2".parse().unwrap());
        let held: Vec<Share> = (0..MAX_PER_SOURCE).map(|_| sources.enter(a).unwrap()).collect();
        assert!(sources.enter(a).is_none());
        assert!(sources.enter("::ffff:10.0.0.1".parse().unwrap()).is_none(), "the same address");
        assert!(sources.enter(b).is_some(), "another one has room");
        drop(held);
        assert!(sources.enter(a).is_some());
        assert!(sources.0.lock().unwrap().is_empty(), "nothing is remembered");
    }
}
