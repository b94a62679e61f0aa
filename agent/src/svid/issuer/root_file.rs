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
    ca::{CaError, Root, jwt_keys::JwtKeysError},
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
    /// Its content is no keys for JWT-SVIDs.
    #[error(
        "{path}: {source}; move it away and new ones are made (every token of the old ones is then refused)"
    )]
    JwtKeys {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        source: JwtKeysError,
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
    let Some(pem) = read_file(path)? else { return Ok(None) };
    Root::from_pem(&pem, domain, now)
        .map(Some)
        .map_err(|source| RootFileError::Invalid { path: path.into(), source })
}

/// A file of ours, whole; `None` when there is none.
pub(super) fn read_file(path: &Path) -> Result<Option<Vec<u8>>, RootFileError> {
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
    Ok(Some(pem))
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

pub(super) fn io_error(path: &Path, action: &'static str, source: io::Error) -> RootFileError {
    RootFileError::Io { path: path.into(), action, source }
}

#[cfg(test)]
mod tests {
    use std::{os::unix::fs::symlink, sync::Barrier};

    use super::*;

    fn td() -> TrustDomain {
        TrustDomain::parse("td").unwrap()
    }

    fn open(dir: &Path) -> Result<Root, RootFileError> {
        open_or_create(dir, &td(), Timestamp::now())
    }

    fn mode(path: &Path) -> u32 {
        fs::metadata(path).unwrap().mode() & 0o7777
    }

    fn set_mode(path: &Path, mode: u32) {
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    }

    /// A directory as it should be (the crate's own follows the umask).
    fn directory() -> tempfile::TempDir {
        tempfile::Builder::new().permissions(fs::Permissions::from_mode(0o700)).tempdir().unwrap()
    }

    #[test]
    fn made_once_then_read() {
        let parent = directory();
        let dir = parent.path().join("a/b");
        let made = open(&dir).unwrap();
        assert_eq!((mode(&dir), mode(&dir.join(ROOT_FILE))), (0o700, 0o600));
        let read = open(&dir).unwrap();
        assert_eq!(made.certificate(), read.certificate());
        assert_eq!(fs::read_dir(&dir).unwrap().count(), 1, "nothing lies beside it");
    }

    #[test]
    fn all_who_race_end_with_one_root() {
        for _ in 0..10 {
            let parent = directory();
            let dir = parent.path().join("authority");
            let barrier = Barrier::new(16);
            let roots: Vec<_> = std::thread::scope(|scope| {
                let race = || {
                    barrier.wait();
                    open(&dir).unwrap().certificate().clone()
                };
                let threads: Vec<_> = (0..16).map(|_| scope.spawn(race)).collect();
                threads.into_iter().map(|t| t.join().unwrap()).collect()
            });
            assert!(roots.iter().all(|root| *root == roots[0]));
            assert_eq!(*open(&dir).unwrap().certificate(), roots[0]);
            assert_eq!(fs::read_dir(&dir).unwrap().count(), 1);
        }
    }

    #[test]
    fn one_writer_wins_and_the_others_change_nothing() {
        let dir = directory();
        let path = dir.path().join(ROOT_FILE);
        write_exclusively(dir.path(), &path, b"first").unwrap();
        let error = write_exclusively(dir.path(), &path, b"second").unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::AlreadyExists);
        assert_eq!(fs::read(&path).unwrap(), b"first");
    }

    #[test]
    fn wide_permissions_are_refused() {
        for bad in [0o604, 0o640, 0o660, 0o601, 0o620] {
            let dir = directory();
            let path = dir.path().join(ROOT_FILE);
            open(dir.path()).unwrap();
            set_mode(&path, bad);
            let error = open(dir.path()).unwrap_err();
            assert!(matches!(error, RootFileError::Mode { mode, .. } if mode == bad), "{error}");
            assert!(
                error.to_string().contains(&format!("chmod 0600 {}", path.display())),
                "{error}"
            );
            assert_eq!(mode(&path), bad, "nothing is put right silently");
            set_mode(&path, 0o400);
            open(dir.path()).unwrap();
        }
        for bad in [0o750, 0o701, 0o777] {
            let dir = directory();
            set_mode(dir.path(), bad);
            let error = open(dir.path()).unwrap_err();
            assert!(error.to_string().contains("chmod 0700"), "{error}");
            assert!(!dir.path().join(ROOT_FILE).exists());
            set_mode(dir.path(), 0o700);
            open(dir.path()).unwrap();
        }
    }

    #[test]
    fn what_is_not_a_root_is_refused_and_left_alone() {
        let other = Root::create(&TrustDomain::parse("other").unwrap(), Timestamp::now()).unwrap();
        let huge = vec![b'a'; MAX_LEN as usize + 1];
        for (content, says) in [
            (b"garbage".as_slice(), "BEGIN CERTIFICATE"),
            (b"", "0 certificate(s)"),
            (other.to_pem().as_bytes(), "trustDomain"),
            (&huge, "too many"),
        ] {
            let dir = directory();
            let path = dir.path().join(ROOT_FILE);
            fs::write(&path, content).unwrap();
            set_mode(&path, 0o600);
            let error = open(dir.path()).unwrap_err().to_string();
            assert!(error.contains(says) && error.contains("root.pem"), "{error}");
            assert!(!error.contains("PRIVATE KEY-----\n"), "{error}");
            assert_eq!(fs::read(&path).unwrap(), content);
            fs::remove_file(&path).unwrap();
            open(dir.path()).unwrap();
        }
    }

    #[test]
    fn only_a_regular_file_of_ones_own() {
        let elsewhere = directory();
        open(elsewhere.path()).unwrap();
        let dir = directory();
        let path = dir.path().join(ROOT_FILE);

        symlink(elsewhere.path().join(ROOT_FILE), &path).unwrap();
        assert!(matches!(open(dir.path()), Err(RootFileError::Kind { .. })));
        fs::remove_file(&path).unwrap();
        fs::create_dir(&path).unwrap();
        assert!(matches!(open(dir.path()), Err(RootFileError::Kind { .. })));
        fs::remove_dir(&path).unwrap();
        let fifo = rustix::fs::FileType::Fifo;
        rustix::fs::mknodat(rustix::fs::CWD, &path, fifo, rustix::fs::Mode::RUSR, 0).unwrap();
        assert!(matches!(open(dir.path()), Err(RootFileError::Kind { .. })));
        fs::remove_file(&path).unwrap();

        fs::write(elsewhere.path().join("file"), "").unwrap();
        let error = open(&elsewhere.path().join("file")).unwrap_err();
        assert!(error.to_string().contains("file"), "{error}");
        if rustix::process::geteuid().is_root() {
            open(dir.path()).unwrap();
            std::os::unix::fs::chown(&path, Some(12345), None).unwrap();
            assert!(matches!(open(dir.path()), Err(RootFileError::Owner { uid: 12345, .. })));
        }
    }
}
