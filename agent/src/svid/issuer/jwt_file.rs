//! The embedded authority's keys of JWT-SVIDs: one file, mode 0600, which the agents on the
//! directory share. Whoever looks first when a step is due takes it; a lock keeps the steps apart.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Write},
    os::unix::fs::{OpenOptionsExt, PermissionsExt},
    path::Path,
    time::Duration,
};

use jiff::Timestamp;
use rustix::fs::{FlockOperation, OFlags, flock};
use serde::{Deserialize, Serialize};

use super::root_file::{RootFileError, io_error, read_file};
use crate::ca::jwt_keys::{self, JwtKeysError, StoredKey};

/// The file's name in the authority's directory.
pub const FILE: &str = "jwt-keys.json";
/// Held while the file is looked at and replaced; itself never replaced.
const LOCK: &str = ".jwt-keys.lock";
/// The format that this code writes.
const VERSION: u32 = 1;

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Document {
    version: u32,
    keys: Vec<StoredKey>,
}

/// The keys as they should be now, in the file too. The directory is there.
pub(super) fn current(
    dir: &Path,
    refresh_hint: Duration,
    now: Timestamp,
) -> Result<Vec<StoredKey>, RootFileError> {
    let lock = dir.join(LOCK);
    let held = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .custom_flags(OFlags::NOFOLLOW.bits() as i32)
        .open(&lock)
        .map_err(|e| io_error(&lock, "open", e))?;
    flock(&held, FlockOperation::LockExclusive).map_err(|e| io_error(&lock, "lock", e.into()))?;
    let path = dir.join(FILE);
    let wrong = |source| RootFileError::JwtKeys { path: path.clone(), source };
    let keys = match read_file(&path)? {
        Some(content) => parse(&content).map_err(wrong)?,
        None => Vec::new(),
    };
    let Some(next) = jwt_keys::advance(&keys, refresh_hint, now).map_err(wrong)? else {
        return Ok(keys);
    };
    replace(dir, &path, &next).map_err(|e| io_error(&path, "write", e))?;
    tracing::info!(keys = ?next, "the keys of JWT-SVIDs have changed");
    Ok(next)
}

fn parse(content: &[u8]) -> Result<Vec<StoredKey>, JwtKeysError> {
    // The parser's message could quote a key: only its place is told.
    let document: Document = serde_json::from_slice(content).map_err(|e| {
        JwtKeysError(format!("line {} column {} is not understood", e.line(), e.column()))
    })?;
    if document.version != VERSION {
        let version = document.version;
        return Err(JwtKeysError(format!("has format {version}, this version reads {VERSION}")));
    }
    jwt_keys::bundle(&document.keys)?;
    if document.keys.is_empty() {
        return Err(JwtKeysError("holds no key".into()));
    }
    Ok(document.keys)
}

fn replace(dir: &Path, path: &Path, keys: &[StoredKey]) -> io::Result<()> {
    let document = Document { version: VERSION, keys: keys.to_vec() };
    let mut beside = tempfile::Builder::new()
        .prefix(".jwt-keys.json.")
        .permissions(fs::Permissions::from_mode(0o600))
        .tempfile_in(dir)?;
    beside.write_all(&serde_json::to_vec_pretty(&document)?)?;
    beside.as_file().sync_all()?;
    beside.persist(path).map_err(|e| e.error)?;
    File::open(dir)?.sync_all()
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeSet, os::unix::fs::MetadataExt, sync::Barrier};

    use super::*;
    use crate::ca::jwt_keys::LIFETIME;

    const HINT: Duration = Duration::from_secs(300);

    fn kids(keys: &[StoredKey]) -> BTreeSet<String> {
        let bundle = jwt_keys::bundle(keys).unwrap();
        bundle.iter().map(|(kid, _)| kid.to_owned()).collect()
    }

    #[test]
    fn all_who_look_at_once_have_the_same_keys() {
        let dir = tempfile::tempdir().unwrap();
        let start = Timestamp::now();
        for at in [start, start + LIFETIME, start + LIFETIME * 3] {
            let barrier = Barrier::new(8);
            let seen: BTreeSet<_> = std::thread::scope(|scope| {
                let look = || {
                    barrier.wait();
                    kids(&current(dir.path(), HINT, at).unwrap())
                };
                let threads: Vec<_> = (0..8).map(|_| scope.spawn(look)).collect();
                threads.into_iter().map(|t| t.join().unwrap()).collect()
            });
            assert_eq!(seen.len(), 1, "{seen:?}");
        }
        let mode = fs::metadata(dir.path().join(FILE)).unwrap().mode();
        assert_eq!(mode & 0o7777, 0o600);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2, "nothing lies beside it");
    }

    #[test]
    fn a_file_that_is_no_keys_is_refused_and_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(FILE);
        let look = || current(dir.path(), HINT, Timestamp::now());
        look().unwrap();
        let good = fs::read_to_string(&path).unwrap();
        for (content, says) in [
            ("garbage".to_owned(), "line 1 column 1"),
            (good.replace("\"version\": 1", "\"version\": 2"), "format 2"),
            (good.replace("\"kid\"", "\"other\""), "not understood"),
            ("{\"version\": 1, \"keys\": []}".to_owned(), "no key"),
        ] {
            fs::write(&path, &content).unwrap();
            let error = look().unwrap_err().to_string();
            assert!(error.contains(says) && error.contains("move it away"), "{error}");
            assert_eq!(fs::read_to_string(&path).unwrap(), content);
        }
        fs::write(&path, &good).unwrap();
        look().unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).unwrap();
        assert!(look().unwrap_err().to_string().contains("chmod 0600"));
        assert!(!format!("{:?}", parse(good.as_bytes()).unwrap()).contains("pkcs8"));
    }
}
