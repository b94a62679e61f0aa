//! Unix sockets as files: bound in a directory of the agent's own, removed with their owner.

use std::{
    fs, io,
    os::fd::{AsFd, OwnedFd},
    os::unix::{
        fs::{DirBuilderExt, FileTypeExt, MetadataExt, PermissionsExt},
        net::UnixStream,
    },
    path::{Path, PathBuf},
};

use tokio::net::UnixListener;

/// Where a socket is and who may reach it.
#[derive(Clone, Debug)]
pub struct SocketParams<'a> {
    /// The configuration key that says where, for messages.
    pub key: &'static str,
    /// The socket's path; its directory is made when it is not there.
    pub path: &'a Path,
    /// The directory's mode.
    pub directory_mode: u32,
    /// The socket's mode.
    pub socket_mode: u32,
    /// Whether nothing else may be in the directory.
    pub alone: bool,
}

/// Why a socket cannot be served.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SocketError {
    /// The directory cannot be made ours.
    #[error("{key}: {}: {source}; it must be a directory that the agent may make and own", path.display())]
    Directory {
        /// The configuration key.
        key: &'static str,
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Somebody else owns the directory.
    #[error("{key}: {} belongs to user {owner}, not to the agent's: remove it or choose another {key}", path.display())]
    Owner {
        /// The configuration key.
        key: &'static str,
        /// Which.
        path: PathBuf,
        /// Whose it is.
        owner: u32,
    },
    /// Another agent answers there.
    #[error("{}: another agent answers on this socket: stop it or choose another {key}", path.display())]
    InUse {
        /// The configuration key.
        key: &'static str,
        /// Which.
        path: PathBuf,
    },
    /// Something that is no socket is in the way.
    #[error("{}: something that is no socket is in the way: remove it", path.display())]
    Obstacle {
        /// Which.
        path: PathBuf,
    },
    /// Something else is in a directory that the socket must have for itself.
    #[error(
        "{key}: {} is in the socket's directory, which pods mount and so must hold the socket alone: remove it or choose another {key}",
        path.display()
    )]
    NotAlone {
        /// The configuration key.
        key: &'static str,
        /// What is there.
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
    #[error("{}: serving the socket: {source}", path.display())]
    Serve {
        /// Which.
        path: PathBuf,
        /// Why.
        source: tonic::transport::Error,
    },
}

/// A bound socket.
#[derive(Debug)]
pub struct BoundSocket {
    /// Takes connections.
    pub listener: UnixListener,
    /// Removes the file when it is dropped.
    pub file: OwnFile,
}

/// A socket's file; dropping it removes the file unless another has taken its place.
#[derive(Debug)]
pub struct OwnFile {
    path: PathBuf,
    inode: (u64, u64),
}

impl OwnFile {
    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Leaves the file where it is: another process has the socket.
    pub fn leave(mut self) {
        self.inode = NOBODYS;
    }

    /// Takes the file over: from now on it goes with this process.
    ///
    /// # Errors
    /// When it is gone.
    pub fn own(&mut self) -> io::Result<()> {
        let meta = fs::symlink_metadata(&self.path)?;
        self.inode = (meta.dev(), meta.ino());
        Ok(())
    }
}

/// A file that no process removes: no file system has it.
const NOBODYS: (u64, u64) = (u64::MAX, u64::MAX);

impl BoundSocket {
    /// A socket that another process has bound at `path` and handed over. Its file stays that
    /// process's until [`OwnFile::own`].
    ///
    /// # Errors
    /// When it is not the one at this path; it is closed then.
    pub fn adopt(descriptor: OwnedFd, path: &Path) -> Result<Self, SocketError> {
        let failed = |source| SocketError::Bind { path: path.to_owned(), source };
        let listener = std::os::unix::net::UnixListener::from(descriptor);
        let address = listener.local_addr().map_err(failed)?;
        if address.as_pathname() != Some(path) {
            let other = format!("the socket that was handed over is {address:?}");
            return Err(failed(io::Error::new(io::ErrorKind::InvalidInput, other)));
        }
        listener.set_nonblocking(true).map_err(failed)?;
        let listener = UnixListener::from_std(listener).map_err(failed)?;
        Ok(Self { listener, file: OwnFile { path: path.to_owned(), inode: NOBODYS } })
    }

    /// The socket once more, to be handed over later.
    ///
    /// # Errors
    /// Where the process has no descriptors left.
    pub fn descriptor(&self) -> Result<OwnedFd, SocketError> {
        self.listener
            .as_fd()
            .try_clone_to_owned()
            .map_err(|source| SocketError::Bind { path: self.file.path().to_owned(), source })
    }
}

impl Drop for OwnFile {
    fn drop(&mut self) {
        let same = fs::symlink_metadata(&self.path).is_ok_and(|m| (m.dev(), m.ino()) == self.inode);
        if same {
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// Binds a socket, taking the place of one that nobody serves any more.
///
/// # Errors
/// When the directory is not the agent's, or something is in the way; nothing is changed then.
pub fn bind(params: &SocketParams<'_>) -> Result<BoundSocket, SocketError> {
    let key = params.key;
    let path = params.path.to_owned();
    let dir = path.parent().unwrap_or(Path::new("/")).to_owned();
    let directory = |source| SocketError::Directory { key, path: dir.clone(), source };
    // Only the last directory has the mode asked for: what lies above may hold sockets of
    // several modes.
    if let Some(above) = dir.parent() {
        fs::DirBuilder::new().recursive(true).mode(0o755).create(above).map_err(directory)?;
    }
    fs::DirBuilder::new()
        .recursive(true)
        .mode(params.directory_mode)
        .create(&dir)
        .map_err(directory)?;
    let meta = fs::symlink_metadata(&dir).map_err(directory)?;
    let own = rustix::process::geteuid().as_raw();
    if !meta.is_dir() {
        return Err(directory(io::Error::from(io::ErrorKind::NotADirectory)));
    }
    if meta.uid() != own {
        return Err(SocketError::Owner { key, path: dir, owner: meta.uid() });
    }
    if params.alone {
        for entry in fs::read_dir(&dir).map_err(directory)? {
            let entry = entry.map_err(directory)?.path();
            if entry != path {
                return Err(SocketError::NotAlone { key, path: entry });
            }
        }
    }
    // It may be older than the agent, with another mode.
    fs::set_permissions(&dir, fs::Permissions::from_mode(params.directory_mode))
        .map_err(directory)?;
    let bind = |source| SocketError::Bind { path: path.clone(), source };
    match fs::symlink_metadata(&path) {
        Err(_) => {}
        Ok(m) if !m.file_type().is_socket() => return Err(SocketError::Obstacle { path }),
        Ok(_) if UnixStream::connect(&path).is_ok() => {
            return Err(SocketError::InUse { key, path });
        }
        Ok(_) => fs::remove_file(&path).map_err(bind)?,
    }
    let listener = UnixListener::bind(&path).map_err(bind)?;
    fs::set_permissions(&path, fs::Permissions::from_mode(params.socket_mode)).map_err(bind)?;
    let mut file = OwnFile { path: path.clone(), inode: NOBODYS };
    file.own().map_err(bind)?;
    Ok(BoundSocket { listener, file })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn params(path: &Path) -> SocketParams<'_> {
        SocketParams {
            key: "workloadSocket",
            path,
            directory_mode: 0o755,
            socket_mode: 0o666,
            alone: true,
        }
    }

    fn mode(path: &Path) -> u32 {
        fs::metadata(path).unwrap().mode() & 0o7777
    }

    #[tokio::test]
    async fn made_with_its_modes_and_removed_with_its_owner() {
        let parent = tempfile::tempdir().unwrap();
        let path = parent.path().join("run/workload/workload.sock");
        let bound = bind(&params(&path)).unwrap();
        assert_eq!((mode(path.parent().unwrap()), mode(&path)), (0o755, 0o666));
        let error = bind(&params(&path)).unwrap_err();
        assert!(matches!(error, SocketError::InUse { .. }), "{error}");
        UnixStream::connect(&path).unwrap();
        drop(bound);
        assert!(!path.exists());

        // A private one, beside; its directory's mode is corrected.
        let admin = parent.path().join("run/admin/agent.sock");
        fs::create_dir(admin.parent().unwrap()).unwrap();
        let bound = bind(&SocketParams {
            directory_mode: 0o700,
            socket_mode: 0o600,
            alone: false,
            ..params(&admin)
        })
        .unwrap();
        assert_eq!((mode(admin.parent().unwrap()), mode(&admin)), (0o700, 0o600));
        // Whose place was taken leaves the file alone.
        fs::remove_file(&admin).unwrap();
        fs::write(&admin, "another's").unwrap();
        drop(bound);
        assert!(admin.exists());
    }

    #[tokio::test]
    async fn handed_over_with_its_file() {
        let parent = tempfile::tempdir().unwrap();
        let path = parent.path().join("run/workload.sock");
        let old = bind(&params(&path)).unwrap();
        let elsewhere = BoundSocket::adopt(old.descriptor().unwrap(), &parent.path().join("x"));
        assert!(elsewhere.unwrap_err().to_string().contains("workload.sock"));
        // One that gives up before it is the owner leaves everything.
        drop(BoundSocket::adopt(old.descriptor().unwrap(), &path).unwrap());
        assert!(path.exists());
        let mut new = BoundSocket::adopt(old.descriptor().unwrap(), &path).unwrap();
        new.file.own().unwrap();
        let BoundSocket { listener, file } = old;
        drop(listener);
        file.leave();
        // Whoever connects reaches the one that has it now.
        let (dialled, accepted) =
            tokio::join!(tokio::net::UnixStream::connect(&path), new.listener.accept());
        dialled.unwrap();
        accepted.unwrap();
        drop(new);
        assert!(!path.exists());
    }

    #[tokio::test]
    async fn what_is_in_the_way_is_named_and_left_alone() {
        let parent = tempfile::tempdir().unwrap();
        let path = parent.path().join("workload/workload.sock");
        drop(bind(&params(&path)).unwrap());
        let beside = parent.path().join("workload/agent.sock");
        fs::write(&beside, "").unwrap();
        let error = bind(&params(&path)).unwrap_err();
        assert!(matches!(&error, SocketError::NotAlone { path, .. } if *path == beside), "{error}");
        assert!(error.to_string().contains("workloadSocket"), "{error}");
        fs::remove_file(&beside).unwrap();

        fs::write(&path, "a file").unwrap();
        let error = bind(&params(&path)).unwrap_err();
        assert!(matches!(error, SocketError::Obstacle { .. }), "{error}");
        assert_eq!(fs::read(&path).unwrap(), b"a file");
        fs::remove_file(&path).unwrap();

        // A socket that nobody serves is replaced.
        drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
        assert!(path.exists());
        drop(bind(&params(&path)).unwrap());

        fs::remove_dir(path.parent().unwrap()).unwrap();
        fs::write(path.parent().unwrap(), "no directory").unwrap();
        let error = bind(&params(&path)).unwrap_err();
        assert!(matches!(error, SocketError::Directory { .. }), "{error}");
    }
}
