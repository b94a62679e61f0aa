//! The root on disk: one PEM file of certificate and key, mode 0600, in a directory 0700.
//!
//! Made whole beside its place and linked there only when nothing is there: a reader sees
//! no file or a complete one, and of several writers exactly one wins.

use std::{
    fs::{self, DirBuilder, File, OpenOptions},
    io::{self, Read, Write},
    os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt},
    path::{Path, PathBuf},
};

use jiff::Timestamp;

use crate::{
    ca::{CaError, Root},
    spiffe::TrustDomain,
};

/// The file's name in the authority's directory.
pub const ROOT_FILE: &str = "root.pem";
/// The largest file that is read, in bytes.
const MAX_LEN: u64 = 64 * 1024;

/// Why the root on disk cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RootFileError {
    /// Others may read or write it.
    #[error(
        "{path}: mode {mode:04o} lets others at the authority's key; run: chmod {remedy:04o} {path}"
    )]
    Mode {
        /// File or directory.
        path: PathBuf,
        /// Its permissions.
        mode: u32,
        /// The permissions that it must have.
        remedy: u32,
    },
    /// It is somebody else's.
    #[error(
        "{path}: owned by uid {uid}, while the agent runs as uid {expected}; run: chown {expected} {path}"
    )]
    Owner {
        /// File or directory.
        path: PathBuf,
        /// Its owner.
        uid: u32,
        /// The agent's uid.
        expected: u32,
    },
    /// It is not what it should be.
    #[error("{path}: is not a {expected}; remove it or set authorityDir to another directory")]
    Kind {
        /// Where.
        path: PathBuf,
        /// What it should be.
        expected: &'static str,
    },
    /// It is larger than any root.
    #[error(
        "{path}: {len} bytes are too many for a root (at most {MAX_LEN}); give one certificate and its key"
    )]
    TooLarge {
        /// The file.
        path: PathBuf,
        /// Its length.
        len: u64,
    },
    /// Its content is no root of this trust domain.
    #[error(
        "{path}: {source}; nothing was changed: correct the file, or move it away and a new root is made (every SVID of the old one is then refused)"
    )]
    Invalid {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        source: CaError,
    },
    /// The file system refused.
    #[error(
        "{path}: cannot {action} ({source}); authorityDir must be a directory that the agent may write to"
    )]
    Io {
        /// File or directory.
        path: PathBuf,
        /// What was tried.
        action: &'static str,
        /// What the system says.
        source: io::Error,
    },
    /// A new root could not be made.
    #[error("a new root for {path} cannot be made: {source}")]
    Create {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        source: CaError,
    },
}

impl RootFileError {
    /// The root in `dir` is no good.
    pub(super) fn invalid(dir: &Path, source: CaError) -> Self {
        Self::Invalid { path: dir.join(ROOT_FILE), source }
    }
}

/// The root in `dir`; made when there is none.
pub(super) fn open_or_create(
    dir: &Path,
    domain: &TrustDomain,
    now: Timestamp,
) -> Result<Root, RootFileError> {
    prepare_directory(dir)?;
    let path = dir.join(ROOT_FILE);
    if let Some(root) = read(&path, domain, now)? {
        return Ok(root);
    }
    let root = Root::create(domain, now)
        .map_err(|source| RootFileError::Create { path: path.clone(), source })?;
    match write_exclusively(dir, &path, root.to_pem().as_bytes()) {
        Ok(()) => Ok(root),
        // Another agent was first: its root is the root.
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => read(&path, domain, now)?
            .ok_or_else(|| io_error(&path, "read what another agent wrote", e)),
        Err(e) => Err(io_error(&path, "write", e)),
    }
}

fn prepare_directory(dir: &Path) -> Result<(), RootFileError> {
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(dir)
        .map_err(|e| io_error(dir, "make the directory", e))?;
    let metadata = fs::metadata(dir).map_err(|e| io_error(dir, "look at the directory", e))?;
    if !metadata.is_dir() {
        return Err(RootFileError::Kind { path: dir.into(), expected: "directory" });
    }
    check_access(dir, &metadata, 0o700)
}

/// The root in the file, or `None` when there is no file.
fn read(path: &Path, domain: &TrustDomain, now: Timestamp) -> Result<Option<Root>, RootFileError> {
    // O_NOFOLLOW: what is checked is what is read. O_NONBLOCK: a FIFO must not hang the start.
    let flags = (rustix::fs::OFlags::NOFOLLOW | rustix::fs::OFlags::NONBLOCK).bits();
    let file = match OpenOptions::new().read(true).custom_flags(flags as i32).open(path) {
        Ok(file) => file,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(e) if e.raw_os_error() == Some(rustix::io::Errno::LOOP.raw_os_error()) => {
            return Err(RootFileError::Kind { path: path.into(), expected: "regular file" });
        }
        Err(e) => return Err(io_error(path, "open", e)),
    };
    let metadata = file.metadata().map_err(|e| io_error(path, "look at the file", e))?;
    if !metadata.is_file() {
        return Err(RootFileError::Kind { path: path.into(), expected: "regular file" });
    }
    check_access(path, &metadata, 0o600)?;
    if metadata.len() > MAX_LEN {
        return Err(RootFileError::TooLarge { path: path.into(), len: metadata.len() });
    }
    let mut pem = Vec::new();
    file.take(MAX_LEN).read_to_end(&mut pem).map_err(|e| io_error(path, "read", e))?;
    Root::from_pem(&pem, domain, now)
        .map(Some)
        .map_err(|source| RootFileError::Invalid { path: path.into(), source })
}

fn check_access(path: &Path, metadata: &fs::Metadata, remedy: u32) -> Result<(), RootFileError> {
    let mode = metadata.mode() & 0o7777;
    if mode & 0o077 != 0 {
        return Err(RootFileError::Mode { path: path.into(), mode, remedy });
    }
    let expected = rustix::process::geteuid().as_raw();
    if metadata.uid() != expected {
        return Err(RootFileError::Owner { path: path.into(), uid: metadata.uid(), expected });
    }
    Ok(())
}

/// Writes a file that appears whole and only where nothing is.
fn write_exclusively(dir: &Path, path: &Path, content: &[u8]) -> io::Result<()> {
    let mut beside = tempfile::Builder::new()
        .prefix(".root.pem.")
        .permissions(fs::Permissions::from_mode(0o600))
        .tempfile_in(dir)?;
    beside.write_all(content)?;
    beside.as_file().sync_all()?;
    beside.persist_noclobber(path).map_err(|e| e.error)?;
    // The name must survive a crash too, or the next start would make another root.
    File::open(dir)?.sync_all()
}

fn io_error(path: &Path, action: &'static str, source: io::Error) -> RootFileError {
    RootFileError::Io { path: path.into(), action, source }
}
