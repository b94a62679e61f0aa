//! The admin sockets, for root only: `<run dir>/admin/agent.sock` of the agent that serves the
//! node, and one of this process's own.

use std::path::{Path, PathBuf};

use futures_util::StreamExt as _;
use tokio_stream::wrappers::UnixListenerStream;
use tokio_util::sync::CancellationToken;
use tonic::{service::Routes, transport::Server};

use crate::socket_file::{self, BoundSocket, SocketError, SocketParams};

/// The bound socket; its file goes with it.
#[derive(Debug)]
pub struct AdminSocket(BoundSocket);

/// Where the socket of a run directory is.
pub fn path_in(run_dir: &Path) -> PathBuf {
    run_dir.join("admin/agent.sock")
}

impl AdminSocket {
    /// Binds the one of a run directory, taking the place of a socket that nobody serves any
    /// more.
    pub fn bind(run_dir: &Path) -> Result<Self, SocketError> {
        Self::bind_at("runDir", &path_in(run_dir))
    }

    /// Binds one of this process's own; its directory becomes root's alone.
    pub fn bind_own(path: &Path) -> Result<Self, SocketError> {
        Self::bind_at("ownSocket", path)
    }

    /// The one of a run directory, handed over by another process.
    pub const fn of(socket: BoundSocket) -> Self {
        Self(socket)
    }

    fn bind_at(key: &'static str, path: &Path) -> Result<Self, SocketError> {
        let params =
            SocketParams { key, path, directory_mode: 0o700, socket_mode: 0o600, alone: false };
        socket_file::bind(&params).map(Self)
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        self.0.file.path()
    }

    /// The socket as it is bound.
    pub fn into_bound(self) -> BoundSocket {
        self.0
    }

    /// Serves until `shutdown` is done; streams that are open then end. After `succeeded` only
    /// connections that are open go on: another process has the socket and its file.
    pub async fn serve(
        self,
        routes: Routes,
        succeeded: CancellationToken,
        shutdown: impl Future<Output = ()>,
    ) -> Result<(), SocketError> {
        let BoundSocket { listener, file } = self.0;
        let path = file.path().to_owned();
        let incoming =
            UnixListenerStream::new(listener).take_until(succeeded.clone().cancelled_owned());
        let serving = async {
            // It returns when nothing more comes in.
            let result = Server::builder().add_routes(routes).serve_with_incoming(incoming).await;
            result.map_err(|source| SocketError::Serve { path, source })?;
            if succeeded.is_cancelled() {
                file.leave();
                std::future::pending::<()>().await;
            }
            Ok(())
        };
        // A follower's stream never ends by itself: no graceful shutdown waits for it.
        tokio::select! {
            result = serving => result,
            () = shutdown => Ok(()),
        }
    }
}
