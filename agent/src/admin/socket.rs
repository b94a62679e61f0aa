//! The admin socket: `<run dir>/admin/agent.sock`, for root only.

use std::{
    fs, io,
    os::unix::{
        fs::{DirBuilderExt, FileTypeExt, MetadataExt, PermissionsExt},
        net::UnixStream,
    },
    path::{Path, PathBuf},
};

use tokio::net::UnixListener;
use tokio_stream::wrappers::UnixListenerStream;
use tonic::{service::Routes, transport::Server};

/// Why the socket cannot be served.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SocketError {
    /// The directory cannot be made ours.
    #[error("runDir: {}: {source}; it must be a directory that the agent may make and own", path.display())]
    Directory {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Somebody else owns the directory.
    #[error("runDir: {} belongs to user {owner}, not to the agent's: remove it or choose another runDir", path.display())]
    Owner {
        /// Which.
        path: PathBuf,
        /// Whose it is.
        owner: u32,
    },
    /// Another agent answers there.
    #[error("{}: another agent answers on this socket: stop it or choose another runDir", path.display())]
    InUse {
        /// Which.
        path: PathBuf,
    },
    /// Something that is no socket is in the way.
    #[error("{}: something that is no socket is in the way: remove it", path.display())]
    Obstacle {
        /// Which.
        path: PathBuf,
    },
    /// The socket cannot be opened.
    #[error("{}: {source}", path.display())]
    Bind {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Serving ended with an error.
    #[error("the admin socket: {0}")]
    Serve(#[from] tonic::transport::Error),
}

/// The bound socket; its file goes with it.
#[derive(Debug)]
pub struct AdminSocket {
    listener: UnixListener,
    file: OwnFile,
}

/// Removes the socket's file unless another has taken its place.
#[derive(Debug)]
struct OwnFile {
    path: PathBuf,
    inode: (u64, u64),
}

impl Drop for OwnFile {
    fn drop(&mut self) {
        let same = fs::symlink_metadata(&self.path).is_ok_and(|m| (m.dev(), m.ino()) == self.inode);
        if same {
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// Where the socket of a run directory is.
pub fn path_in(run_dir: &Path) -> PathBuf {
    run_dir.join("admin/agent.sock")
}

impl AdminSocket {
    /// Binds it, taking the place of a socket that nobody serves any more.
    pub fn bind(run_dir: &Path) -> Result<Self, SocketError> {
        let dir = run_dir.join("admin");
        let directory = |source| SocketError::Directory { path: dir.clone(), source };
        fs::DirBuilder::new().recursive(true).mode(0o700).create(&dir).map_err(directory)?;
        let meta = fs::symlink_metadata(&dir).map_err(directory)?;
        let own = rustix::process::geteuid().as_raw();
        if !meta.is_dir() {
            return Err(directory(io::Error::from(io::ErrorKind::NotADirectory)));
        }
        if meta.uid() != own {
            return Err(SocketError::Owner { path: dir, owner: meta.uid() });
        }
        // It may be older than the agent, with another mode.
        fs::set_permissions(&dir, fs::Permissions::from_mode(0o700)).map_err(directory)?;
        let path = path_in(run_dir);
        match fs::symlink_metadata(&path) {
            Err(_) => {}
            Ok(m) if !m.file_type().is_socket() => return Err(SocketError::Obstacle { path }),
            Ok(_) if UnixStream::connect(&path).is_ok() => return Err(SocketError::InUse { path }),
            Ok(_) => fs::remove_file(&path)
                .map_err(|source| SocketError::Bind { path: path.clone(), source })?,
        }
        let bind = |source| SocketError::Bind { path: path.clone(), source };
        let listener = UnixListener::bind(&path).map_err(bind)?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).map_err(bind)?;
        let meta = fs::symlink_metadata(&path).map_err(bind)?;
        let file = OwnFile { path, inode: (meta.dev(), meta.ino()) };
        Ok(Self { listener, file })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.file.path
    }

    /// Serves until `shutdown` is done; streams that are open then end.
    pub async fn serve(
        self,
        routes: Routes,
        shutdown: impl Future<Output = ()>,
    ) -> Result<(), SocketError> {
        let Self { listener, file } = self;
        let serving = Server::builder()
            .add_routes(routes)
            .serve_with_incoming(UnixListenerStream::new(listener));
        // A follower's stream never ends by itself: no graceful shutdown waits for it.
        let result = tokio::select! {
            result = serving => result.map_err(SocketError::Serve),
            () = shutdown => Ok(()),
        };
        drop(file);
        result
    }
}
