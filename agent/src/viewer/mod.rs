//! What changes nothing, over TCP: for the command line on another machine, which comes through
//! the API server's port-forward to a loopback address.
//!
//! The services are the admin socket's own. [`gate`] lets only those of their methods through
//! that are listed as changing nothing, and only for callers whose token [`callers`] finds good:
//! made for this audience alone, of a user that may `get flows.signet.dev`.

pub mod callers;
pub mod gate;

use std::{io, net::SocketAddr, sync::Arc, time::Duration};

use hyper_util::{
    rt::{TokioExecutor, TokioIo, TokioTimer},
    server::conn::auto::Builder,
    service::TowerToHyperService,
};
use tokio::{net::TcpListener, sync::Semaphore, time};
use tonic::service::Routes;

use self::callers::Callers;

/// Connections at the same time; more wait.
const MAX_CONNECTIONS: usize = 64;
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
        loop {
            match TcpListener::bind(address).await {
                Ok(listener) => {
                    told(None);
                    tracing::info!(%address, "flows are served to viewers");
                    serve(listener, routes, callers).await;
                    return;
                }
                Err(error) => told(Some(format!(
                    "viewerListen: {address}: {error}; choose another address or stop who has it"
                ))),
            }
            time::sleep(RETRY).await;
        }
    }
}

/// Serves on a listener until the task is dropped.
pub async fn serve(listener: TcpListener, routes: Routes, callers: Arc<Callers>) {
    let service = TowerToHyperService::new(gate::guarded(routes, callers));
    let room = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    loop {
        let Ok(turn) = Arc::clone(&room).acquire_owned().await else { return };
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                pause(&error).await;
                continue;
            }
        };
        let service = service.clone();
        tokio::spawn(async move {
            let mut builder = Builder::new(TokioExecutor::new()).http2_only();
            builder
                .http2()
                .timer(TokioTimer::new())
                .keep_alive_interval(PING)
                .keep_alive_timeout(PING)
                .max_header_list_size(MAX_HEAD)
                .max_concurrent_streams(MAX_CALLS);
            if let Err(error) = builder.serve_connection(TokioIo::new(stream), service).await {
                tracing::debug!(%error, "a viewer's connection ended");
            }
            drop(turn);
        });
    }
}

/// Out of descriptors, or a client that went: neither ends the listener.
async fn pause(error: &io::Error) {
    tracing::warn!(%error, "a viewer's connection was not accepted");
    time::sleep(Duration::from_millis(50)).await;
}
