//! What an operator has released on this node (`signet agent release`): a record on disk that
//! agents follow, so that it outlives them, until it is re-armed.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::{self, File},
    io::{self, Read, Write},
    os::unix::fs::{MetadataExt, PermissionsExt},
    path::{Path, PathBuf},
    sync::Arc,
};

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::cluster::model::Problem;

/// The record's name in the state directory.
const FILE: &str = "released.json";
/// The longest record that is read, in bytes.
const MAX_LEN: u64 = 1024 * 1024;
/// The command that ends a release.
const REARM: &str = "`signet agent rearm` ends it";

/// What is released.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Released {
    /// The whole node, if it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node: Option<NodeRelease>,
    /// Pods, as `namespace/name`.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub pods: BTreeMap<String, PodRelease>,
}

/// A released node.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NodeRelease {
    /// When.
    pub since: Timestamp,
    /// What `enforcement` was then: its number in the kernel.
    pub before: u8,
}

/// A released pod.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PodRelease {
    /// When.
    pub since: Timestamp,
    /// Its mode in the kernel then, as a number; absent where it was not registered.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub before: Option<u8>,
}

/// Why the record cannot be read or written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ReleasedError {
    /// The file system refuses.
    #[error("{}: cannot {action} ({source}); check --state-dir", path.display())]
    Io {
        /// File.
        path: PathBuf,
        /// What was tried.
        action: &'static str,
        /// What the system says.
        source: io::Error,
    },
    /// It is no record.
    #[error(
        "{}: is no record of releases ({source}); remove it to enforce everything again",
        path.display()
    )]
    Malformed {
        /// File.
        path: PathBuf,
        /// What is wrong and where.
        source: serde_json::Error,
    },
}

impl Released {
    /// Where the record of a state directory is.
    pub fn path(state_dir: &Path) -> PathBuf {
        state_dir.join(FILE)
    }

    /// Reads it; no file is nothing released.
    ///
    /// # Errors
    /// Where it cannot be read or is no record.
    pub fn load(state_dir: &Path) -> Result<Self, ReleasedError> {
        let path = Self::path(state_dir);
        let failed = |source| ReleasedError::Io { path: path.clone(), action: "read", source };
        let file = match File::open(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Self::default()),
            file => file.map_err(failed)?,
        };
        let mut text = Vec::new();
        file.take(MAX_LEN).read_to_end(&mut text).map_err(failed)?;
        serde_json::from_slice(&text).map_err(|source| ReleasedError::Malformed { path, source })
    }

    /// Replaces it, or removes it when nothing is released.
    ///
    /// # Errors
    /// When the file system refuses; the old one is whole then.
    pub fn save(&self, state_dir: &Path) -> Result<(), ReleasedError> {
        let path = Self::path(state_dir);
        let replace = || -> io::Result<()> {
            if *self == Self::default() {
                return match fs::remove_file(&path) {
                    Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
                    _ => Ok(()),
                };
            }
            fs::create_dir_all(state_dir)?;
            let mut beside = tempfile::Builder::new()
                .prefix(".released.json.")
                .permissions(fs::Permissions::from_mode(0o600))
                .tempfile_in(state_dir)?;
            beside.write_all(&serde_json::to_vec(self)?)?;
            beside.as_file().sync_all()?;
            beside.persist(&path).map_err(|e| e.error)?;
            File::open(state_dir)?.sync_all()
        };
        replace().map_err(|source| ReleasedError::Io {
            path: path.clone(),
            action: "write",
            source,
        })
    }

    /// What is released, for `signet status`.
    pub fn problems(&self) -> Vec<Problem> {
        let node = self.node.iter().map(|node| Problem {
            subject: "this node".into(),
            message: format!(
                "released by `signet agent release` at {}: nothing is enforced here; {REARM}",
                node.since.strftime("%Y-%m-%dT%H:%M:%SZ")
            ),
        });
        let pods = self.pods.iter().map(|(name, pod)| Problem {
            subject: format!("pod {name}"),
            message: format!(
                "released by `signet agent release` at {}: it is left alone whatever its mode; \
                 `signet agent rearm --pod {name}` ends it",
                pod.since.strftime("%Y-%m-%dT%H:%M:%SZ")
            ),
        });
        node.chain(pods).collect()
    }

    /// The names of the released pods.
    pub fn pod_names(&self) -> BTreeSet<Arc<str>> {
        self.pods.keys().map(|name| name.as_str().into()).collect()
    }
}

/// Follows the record: read again when the file is another one.
#[derive(Debug)]
pub struct Follower {
    state_dir: PathBuf,
    signature: Option<Signature>,
    current: Released,
    problem: Option<Problem>,
}

/// What tells two versions of a file apart; it is always replaced, never written in place.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Signature {
    inode: u64,
    modified: (i64, i64),
}

impl Follower {
    /// Follows the record of a state directory; call [`Self::poll`] to read it.
    pub fn new(state_dir: PathBuf) -> Self {
        Self { state_dir, signature: None, current: Released::default(), problem: None }
    }

    /// Looks at the file; true when what is released, or what is wrong with it, changed. A
    /// record that cannot be read leaves what was in force.
    pub fn poll(&mut self) -> bool {
        let signature = fs::metadata(Released::path(&self.state_dir))
            .ok()
            .map(|m| Signature { inode: m.ino(), modified: (m.mtime(), m.mtime_nsec()) });
        if signature == self.signature {
            return false;
        }
        self.signature = signature;
        let before = (self.current.clone(), self.problem.clone());
        match Released::load(&self.state_dir) {
            Ok(released) => {
                if released != self.current {
                    tracing::warn!(
                        node = released.node.is_some(),
                        pods = released.pods.len(),
                        "what is released on this node changed"
                    );
                }
                self.current = released;
                self.problem = None;
            }
            Err(error) => {
                tracing::error!(%error, "the record of releases is not read; what is in force stays");
                self.problem =
                    Some(Problem { subject: "releases".into(), message: error.to_string() });
            }
        }
        (&self.current, &self.problem) != (&before.0, &before.1)
    }

    /// What is released.
    pub fn current(&self) -> &Released {
        &self.current
    }

    /// What is released and what is wrong with the record, for `signet status`.
    pub fn problems(&self) -> Vec<Problem> {
        let mut problems = self.current.problems();
        problems.extend(self.problem.clone());
        problems
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_is_followed_until_it_goes() {
        let dir = tempfile::tempdir().unwrap();
        let mut follower = Follower::new(dir.path().to_owned());
        assert!(!follower.poll(), "no record, nothing released");

        let since = Timestamp::UNIX_EPOCH;
        let mut released = Released::default();
        released.pods.insert("shop/db".into(), PodRelease { since, before: Some(3) });
        released.save(dir.path()).unwrap();
        assert!(follower.poll() && !follower.poll());
        assert_eq!(follower.current(), &released);
        assert_eq!(follower.problems()[0].subject, "pod shop/db");

        // What cannot be read leaves what is in force, and is told.
        for broken in ["{", "{\"nodes\": 1}", "{\"node\": {\"since\": \"now\", \"before\": 0}}"] {
            let beside = dir.path().join("beside");
            fs::write(&beside, broken).unwrap();
            fs::rename(&beside, Released::path(dir.path())).unwrap();
            follower.poll();
            assert_eq!(follower.current(), &released, "{broken}");
            let problems = follower.problems();
            let told = problems.iter().find(|p| p.subject == "releases").expect("it is told");
            assert!(told.message.contains("released.json"), "{}", told.message);
        }

        released.pods.clear();
        released.node = Some(NodeRelease { since, before: 0 });
        released.save(dir.path()).unwrap();
        assert!(follower.poll());
        assert_eq!(follower.problems().len(), 1, "{:?}", follower.problems());
        Released::default().save(dir.path()).unwrap();
        assert!(!Released::path(dir.path()).exists());
        assert!(follower.poll());
        assert_eq!(follower.current(), &Released::default());
    }
}
