//! The admin socket: `<run dir>/admin/agent.sock`, for root only.

use std::path::{Path, PathBuf};

use tokio_stream::wrappers::UnixListenerStream;
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
    /// Binds it, taking the place of a socket that nobody serves any more.
    pub fn bind(run_dir: &Path) -> Result<Self, SocketError> {
        let params = SocketParams {
            key: "runDir",
            path: &path_in(run_dir),
            directory_mode: 0o700,
            socket_mode: 0o600,
            alone: false,
        };
        socket_file::bind(&params).map(Self)
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        self.0.file.path()
    }

    /// Serves until `shutdown` is done; streams that are open then end.
    pub async fn serve(
        self,
        routes: Routes,
        shutdown: impl Future<Output = ()>,
    ) -> Result<(), SocketError> {
        let BoundSocket { listener, file } = self.0;
        let serving = Server::builder()
            .add_routes(routes)
            .serve_with_incoming(UnixListenerStream::new(listener));
        // A follower's stream never ends by itself: no graceful shutdown waits for it.
        tokio::select! {
            result = serving => result
                .map_err(|source| SocketError::Serve { path: file.path().to_owned(), source }),
            () = shutdown => Ok(()),
        }
    }
}
