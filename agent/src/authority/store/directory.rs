//! The document in a directory: one file 0600 in a directory 0700, replaced under a lock.

use std::{
    fs::{self, DirBuilder, File, OpenOptions},
    io::{self, Read, Write},
    os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt},
    path::{Path, PathBuf},
};

use aws_lc_rs::digest::{SHA256, digest};
use rustix::fs::{FlockOperation, OFlags, flock};

use super::{Answer, RootStore, StoreError, Stored, Version};
use crate::authority::state::MAX_LEN;

/// The document's file.
pub const FILE: &str = "authority.json";
/// Writers hold a lock on this one; it is never replaced.
const LOCK: &str = ".lock";

/// A directory.
#[derive(Clone, Debug)]
pub struct DirectoryStore {
    dir: PathBuf,
}

/// Why the directory cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DirectoryError {
    /// Others may read or write it.
    #[error("storeDir: {}: mode {mode:04o} lets others at the authority's keys; run: chmod {remedy:04o} {}", path.display(), path.display())]
    Mode {
        /// File or directory.
        path: PathBuf,
        /// Its permissions.
        mode: u32,
        /// Those that it must have.
        remedy: u32,
    },
    /// It is somebody else's.
    #[error("storeDir: {}: belongs to uid {uid}, while the authority runs as uid {own}; run: chown {own} {}", path.display(), path.display())]
    Owner {
        /// File or directory.
        path: PathBuf,
        /// Its owner.
        uid: u32,
        /// Our own.
        own: u32,
    },
    /// It is not what it should be.
    #[error("storeDir: {}: is not a {expected}; remove it or give another directory", path.display())]
    Kind {
        /// Where.
        path: PathBuf,
        /// What it should be.
        expected: &'static str,
    },
    /// The file system refused.
    #[error("storeDir: {}: cannot {action} ({source}); it must be a directory that the authority may write to", path.display())]
    Io {
        /// File or directory.
        path: PathBuf,
        /// What was tried.
        action: &'static str,
        /// What the system says.
        source: io::Error,
    },
}

impl DirectoryStore {
    /// Opens the directory; made when there is none.
    pub fn open(dir: &Path) -> Result<Self, DirectoryError> {
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(dir)
            .map_err(|e| failed(dir, "make the directory", e))?;
        let metadata = fs::metadata(dir).map_err(|e| failed(dir, "look at the directory", e))?;
        if !metadata.is_dir() {
            return Err(DirectoryError::Kind { path: dir.into(), expected: "directory" });
        }
        check_access(dir, &metadata, 0o700)?;
        Ok(Self { dir: dir.to_owned() })
    }

    fn read_file(&self) -> Result<Option<Vec<u8>>, DirectoryError> {
        let path = self.dir.join(FILE);
        // O_NOFOLLOW: what is checked is what is read. O_NONBLOCK: a FIFO must not hang it.
        let flags = (OFlags::NOFOLLOW | OFlags::NONBLOCK).bits();
        let file = match OpenOptions::new().read(true).custom_flags(flags as i32).open(&path) {
            Ok(file) => file,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(e) if e.raw_os_error() == Some(rustix::io::Errno::LOOP.raw_os_error()) => {
                return Err(DirectoryError::Kind { path, expected: "regular file" });
            }
            Err(e) => return Err(failed(&path, "open", e)),
        };
        let metadata = file.metadata().map_err(|e| failed(&path, "look at the file", e))?;
        if !metadata.is_file() {
            return Err(DirectoryError::Kind { path, expected: "regular file" });
        }
        check_access(&path, &metadata, 0o600)?;
        let mut document = Vec::new();
        // One byte more than is allowed, so that the reader of the document names the excess.
        file.take(MAX_LEN as u64 + 1)
            .read_to_end(&mut document)
            .map_err(|e| failed(&path, "read", e))?;
        Ok(Some(document))
    }

    fn replace_file(
        &self,
        document: &[u8],
        version: Option<&Version>,
    ) -> Result<Option<Version>, DirectoryError> {
        let lock = self.dir.join(LOCK);
        let held = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .custom_flags(OFlags::NOFOLLOW.bits() as i32)
            .open(&lock)
            .map_err(|e| failed(&lock, "open", e))?;
        flock(&held, FlockOperation::LockExclusive).map_err(|e| failed(&lock, "lock", e.into()))?;
        if self.read_file()?.as_deref().map(version_of).as_ref() != version {
            return Ok(None);
        }
        let path = self.dir.join(FILE);
        let write = || -> io::Result<()> {
            let mut beside = tempfile::Builder::new()
                .prefix(".authority.json.")
                .permissions(fs::Permissions::from_mode(0o600))
                .tempfile_in(&self.dir)?;
            beside.write_all(document)?;
            beside.as_file().sync_all()?;
            beside.persist(&path).map_err(|e| e.error)?;
            // The name must survive a crash too, or the next start would make another root.
            File::open(&self.dir)?.sync_all()
        };
        write().map_err(|e| failed(&path, "write", e))?;
        Ok(Some(version_of(document)))
    }
}

impl RootStore for DirectoryStore {
    fn read(&self) -> Answer<'_, Stored> {
        let result = self
            .read_file()
            .map(|document| Stored { version: document.as_deref().map(version_of), document });
        Box::pin(async move { Ok(result?) })
    }

    fn replace<'a>(
        &'a self,
        document: &'a [u8],
        version: Option<&'a Version>,
    ) -> Answer<'a, Option<Version>> {
        let (store, document, version) = (self.clone(), document.to_vec(), version.cloned());
        Box::pin(async move {
            // The lock may be somebody else's for a moment.
            let task = tokio::task::spawn_blocking(move || {
                store.replace_file(&document, version.as_ref())
            });
            match task.await {
                Ok(result) => Ok(result?),
                Err(error) => {
                    Err(StoreError::from(failed(&self.dir, "write", io::Error::other(error))))
                }
            }
        })
    }

    fn place(&self) -> String {
        self.dir.join(FILE).display().to_string()
    }
}

fn version_of(document: &[u8]) -> Version {
    Version(digest(&SHA256, document).as_ref().iter().map(|b| format!("{b:02x}")).collect())
}

fn check_access(path: &Path, metadata: &fs::Metadata, remedy: u32) -> Result<(), DirectoryError> {
    let mode = metadata.mode() & 0o7777;
    if mode & 0o077 != 0 {
        return Err(DirectoryError::Mode { path: path.into(), mode, remedy });
    }
    let own = rustix::process::geteuid().as_raw();
    if metadata.uid() != own {
        return Err(DirectoryError::Owner { path: path.into(), uid: metadata.uid(), own });
    }
    Ok(())
}

fn failed(path: &Path, action: &'static str, source: io::Error) -> DirectoryError {
    DirectoryError::Io { path: path.into(), action, source }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use jiff::Timestamp;

    use super::*;
    use crate::{authority::store::open_or_create, spiffe::TrustDomain};

    fn td() -> TrustDomain {
        TrustDomain::parse("td").unwrap()
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 4)]
    async fn replicas_that_start_at_once_agree() {
        for _ in 0..100 {
            let parent = tempfile::tempdir().unwrap();
            let dir = parent.path().join("store");
            let start = Arc::new(tokio::sync::Barrier::new(3));
            let replicas: Vec<_> = (0..3)
                .map(|_| {
                    let (dir, start) = (dir.clone(), start.clone());
                    tokio::spawn(async move {
                        start.wait().await;
                        let store = DirectoryStore::open(&dir).unwrap();
                        let now = Timestamp::now();
                        open_or_create(&store, &td(), false, now).await.unwrap().0
                    })
                })
                .collect();
            let mut roots = std::collections::BTreeSet::new();
            for replica in replicas {
                roots.insert(replica.await.unwrap().signing().to_owned());
            }
            assert_eq!(roots.len(), 1, "{roots:?}");
            let mode = |path: &Path| fs::metadata(path).unwrap().mode() & 0o7777;
            assert_eq!((mode(&dir), mode(&dir.join(FILE))), (0o700, 0o600));
        }
    }

    #[tokio::test]
    async fn a_write_from_an_old_version_changes_nothing() {
        let parent = tempfile::tempdir().unwrap();
        let store = DirectoryStore::open(&parent.path().join("store")).unwrap();
        let first = store.replace(b"1", None).await.unwrap().unwrap();
        assert_eq!(store.replace(b"x", None).await.unwrap(), None);
        let second = store.replace(b"2", Some(&first)).await.unwrap().unwrap();
        assert_eq!(store.replace(b"x", Some(&first)).await.unwrap(), None);
        let stored = store.read().await.unwrap();
        assert_eq!((stored.document.as_deref(), stored.version), (Some(&b"2"[..]), Some(second)));
    }

    #[tokio::test]
    async fn wide_permissions_and_other_kinds_are_refused() {
        let parent = tempfile::tempdir().unwrap();
        let dir = parent.path().join("store");
        let store = DirectoryStore::open(&dir).unwrap();
        store.replace(b"1", None).await.unwrap().unwrap();
        let file = dir.join(FILE);
        let set = |path: &Path, mode| {
            fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
        };
        set(&file, 0o640);
        let error = store.read().await.err().unwrap().to_string();
        assert!(error.contains("chmod 0600"), "{error}");
        set(&file, 0o600);
        assert!(store.read().await.is_ok());
        set(&dir, 0o755);
        let error = DirectoryStore::open(&dir).unwrap_err().to_string();
        assert!(error.contains("chmod 0700"), "{error}");
        set(&dir, 0o700);
        fs::rename(&file, dir.join("elsewhere")).unwrap();
        std::os::unix::fs::symlink(dir.join("elsewhere"), &file).unwrap();
        let error = store.read().await.err().unwrap().to_string();
        assert!(error.contains("regular file"), "{error}");
        assert!(DirectoryStore::open(&file.join("x")).is_err());
    }
}
