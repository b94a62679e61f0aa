//! What changes nothing, over TCP.
//!
//! [`ViewerServer`] is for the command line on another machine, which comes through the API
//! server's port-forward to a loopback address; the services are the admin socket's own.
//! [`HubbleServer`] is for Hubble's tools: its observer and peer services only, over TLS.
//! [`gate`] lets only those methods through that are listed as changing nothing, and only for
//! callers whose token [`callers`] finds good (made for this audience alone, of a user that may
//! `get flows.signet.dev`) or who prove a listed identity by a certificate ([`tls`]).

pub mod callers;
pub mod gate;
pub mod tls;

use std::{
    collections::HashMap,
    io,
    net::{IpAddr, SocketAddr},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use axum::{Extension, Router};
use hyper_util::{
    rt::{TokioExecutor, TokioIo, TokioTimer},
    server::conn::auto::Builder,
    service::TowerToHyperService,
};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, TcpStream},
    sync::Semaphore,
    time,
};
use tokio_rustls::TlsAcceptor;
use tonic::service::Routes;

use self::{
    callers::Callers,
    gate::{Gate, HUBBLE, READ_ONLY},
    tls::{Client, Serving, ServingError, server_config},
};
use crate::{spiffe::SpiffeId, trust::Trust};

/// Connections at the same time; more wait.
const MAX_CONNECTIONS: usize = 64;
/// Of them, from one address where others than this machine can connect.
const MAX_PER_SOURCE: usize = 16;
/// A handshake that takes longer is given up.
const HANDSHAKE: Duration = Duration::from_secs(10);
/// Calls at the same time on one connection.
const MAX_CALLS: u32 = 32;
/// The longest head of a call, bytes: a token is some kilobytes.
const MAX_HEAD: u32 = 32 * 1024;
/// A connection that is silent for so long is asked whether it lives.
const PING: Duration = Duration::from_secs(20);
/// Between two tries to get the address.
const RETRY: Duration = Duration::from_secs(5);

/// Serves the read-only half on an address, as soon as it is to be had.
pub struct ViewerServer {
    /// Where.
    pub address: SocketAddr,
    /// All services.
    pub routes: Routes,
    /// Who is let in.
    pub callers: Arc<Callers>,
}

impl ViewerServer {
    /// Serves until the task is dropped. An address that is taken is tried again: that nobody
    /// looks from outside is no reason not to run. `told` hears what is wrong, and `None` when
    /// nothing is any more.
    pub async fn run(self, told: impl Fn(Option<String>)) {
        let Self { address, routes, callers } = self;
        let listener = listen("viewerListen", address, &told).await;
        tracing::info!(%address, "flows are served to viewers");
        serve(listener, routes, callers).await;
    }
}

/// Binds an address as soon as it is to be had.
async fn listen(key: &str, address: SocketAddr, told: impl Fn(Option<String>)) -> TcpListener {
    loop {
        match TcpListener::bind(address).await {
            Ok(listener) => {
                told(None);
                return listener;
            }
            Err(error) => told(Some(format!(
                "{key}: {address}: {error}; choose another address or stop who has it"
            ))),
        }
        time::sleep(RETRY).await;
    }
}

/// Serves on a listener until the task is dropped.
pub async fn serve(listener: TcpListener, routes: Routes, callers: Arc<Callers>) {
    let gate = Gate { methods: READ_ONLY, callers: Some(callers), clients: Vec::new() };
    let router = gate.guard(routes);
    let room = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    loop {
        let Ok(turn) = Arc::clone(&room).acquire_owned().await else { return };
        let Some((stream, _)) = accepted(&listener).await else { continue };
        let router = router.clone();
        tokio::spawn(async move {
            serve_connection(stream, router, None).await;
            drop(turn);
        });
    }
}

/// Serves Hubble's tools over TLS.
pub struct HubbleServer {
    /// Where.
    pub address: SocketAddr,
    /// The observer, the peers and their health.
    pub routes: Routes,
    /// Judges tokens; `None` where there is no API server to ask.
    pub callers: Option<Arc<Callers>>,
    /// Whoever proves one of these identities is let in.
    pub clients: Vec<SpiffeId>,
    /// The listener's certificate.
    pub serving: Serving,
    /// By which clients' certificates are verified.
    pub trust: Arc<Trust>,
}

impl HubbleServer {
    /// Serves until the task is dropped, as [`ViewerServer::run`].
    pub async fn run(self, told: impl Fn(Option<String>)) {
        let listener = listen("observerListen", self.address, &told).await;
        tracing::info!(address = %self.address, "flows are served to Hubble's tools");
        self.serve(listener, told).await;
    }

    /// Serves on a listener until the task is dropped.
    pub async fn serve(self, listener: TcpListener, told: impl Fn(Option<String>)) {
        let Self { address: _, routes, callers, clients, serving, trust } = self;
        let router = Gate { methods: HUBBLE, callers, clients }.guard(routes);
        let room = Arc::new(Semaphore::new(MAX_CONNECTIONS));
        let sources = Sources::default();
        let mut is_well = true;
        // Before anybody comes, so that status says at once what is wrong.
        let mut config = soon(&serving, &trust, &told).await;
        loop {
            let Ok(turn) = Arc::clone(&room).acquire_owned().await else { return };
            let Some((stream, peer)) = accepted(&listener).await else { continue };
            let Some(share) = sources.enter(peer.ip()) else {
                tracing::debug!(%peer, "too many connections from this address");
                continue;
            };
            match server_config(&serving, &trust) {
                Ok(newer) => {
                    config = newer;
                    if !is_well {
                        told(None);
                        is_well = true;
                    }
                }
                // Goes on with what it has: clients refuse what has run out.
                Err(error) => {
                    told(Some(format!("observerListen: {error}")));
                    is_well = false;
                }
            }
            let (acceptor, router) = (TlsAcceptor::from(config.clone()), router.clone());
            let trust = trust.clone();
            tokio::spawn(async move {
                match time::timeout(HANDSHAKE, acceptor.accept(stream)).await {
                    Ok(Ok(stream)) => {
                        let client = Client::of(stream.get_ref().1.peer_certificates(), &trust);
                        serve_connection(stream, router, client).await;
                    }
                    Ok(Err(error)) => tracing::debug!(%peer, %error, "no TLS handshake"),
                    Err(_) => tracing::debug!(%peer, "the TLS handshake took too long"),
                }
                drop((turn, share));
            });
        }
    }
}

/// The first certificate, as soon as there is one.
async fn soon(
    serving: &Serving,
    trust: &Arc<Trust>,
    told: impl Fn(Option<String>),
) -> Arc<rustls::ServerConfig> {
    loop {
        match server_config(serving, trust) {
            Ok(config) => {
                told(None);
                return config;
            }
            // An authority that was just asked answers in a moment.
            Err(error @ ServingError::NoSvid(_)) => {
                told(Some(format!("observerListen: {error}")));
                time::sleep(Duration::from_millis(250)).await;
            }
            Err(error) => {
                told(Some(format!("observerListen: {error}")));
                time::sleep(RETRY).await;
            }
        }
    }
}

async fn serve_connection(
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    router: Router,
    client: Option<Client>,
) {
    // Outside of the gate, which reads it.
    let router = match client {
        Some(client) => router.layer(Extension(client)),
        None => router,
    };
    let mut builder = Builder::new(TokioExecutor::new()).http2_only();
    builder
        .http2()
        .timer(TokioTimer::new())
        .keep_alive_interval(PING)
        .keep_alive_timeout(PING)
        .max_header_list_size(MAX_HEAD)
        .max_concurrent_streams(MAX_CALLS);
    let service = TowerToHyperService::new(router);
    if let Err(error) = builder.serve_connection(TokioIo::new(stream), service).await {
        tracing::debug!(%error, "a viewer's connection ended");
    }
}

/// How many connections each address has.
#[derive(Clone, Default)]
struct Sources(Arc<Mutex<HashMap<IpAddr, usize>>>);

/// One connection of an address; gone with it.
struct Share(Sources, IpAddr);

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
        Some(Share(self.clone(), source))
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        let mut all = self.0.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(held) = all.get_mut(&self.1) {
            *held -= 1;
            if *held == 0 {
                all.remove(&self.1);
            }
        }
    }
}

async fn accepted(listener: &TcpListener) -> Option<(TcpStream, SocketAddr)> {
    match listener.accept().await {
        Ok(accepted) => Some(accepted),
        Err(error) => {
            pause(&error).await;
            None
        }
    }
}

/// Out of descriptors, or a client that went: neither ends the listener.
async fn pause(error: &io::Error) {
    tracing::warn!(%error, "a viewer's connection was not accepted");
    time::sleep(Duration::from_millis(50)).await;
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
