//! Who is served: the board on which nodes announce the pods whose listeners, SVID and
//! policy are in place (DESIGN §2, §9).
//!
//! In standalone mode it is `status/<node>.yaml` in the cluster directory: each node writes
//! its own file by atomic rename and reads the others'. With the Kubernetes API it is the
//! NodeEnrolment that is named like the node ([`crd`]). What a node says counts only for pods
//! that are bound to it.

pub mod crd;

use std::{
    collections::BTreeMap,
    fs,
    io::Write as _,
    path::{Path, PathBuf},
    sync::Arc,
};

use jiff::Timestamp;

use super::model::PodUid;
use crate::config::yaml::{self, Fault};

/// The board's directory, in the cluster directory.
pub const BOARD_DIR: &str = "status";

/// Pods in one announcement.
const MAX_SERVED: usize = 10_000;

/// A node's announcement.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Announcement {
    /// The node that speaks.
    pub node: Arc<str>,
    /// Served pods: uid → `namespace/name`, for people.
    pub served: BTreeMap<PodUid, Arc<str>>,
    /// Revision of the node's world when it wrote.
    pub revision: u64,
    /// When it wrote.
    pub time: Timestamp,
}

/// A node's place among those that announce.
pub trait EnrolmentBoard: Send + Sync {
    /// Announces exactly these pods as served, replacing what this node said before. Returns
    /// whether there was something new to say. A board that writes by itself, later, returns
    /// the failure of its last attempt until one has succeeded.
    ///
    /// # Errors
    ///
    /// [`BoardError`]; then peers still see an earlier announcement.
    fn announce(
        &mut self,
        served: &BTreeMap<PodUid, Arc<str>>,
        revision: u64,
        now: Timestamp,
    ) -> Result<bool, BoardError>;

    /// Says nothing more, and leaves what was said: another process speaks for the node. A later
    /// [`EnrolmentBoard::announce`] speaks again.
    fn fall_silent(&mut self);
}

/// Why an announcement could not be written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BoardError {
    /// The node's name cannot be a file's.
    #[error("node {node:?}: not a node name; write at most 253 characters a-z, 0-9, - and .")]
    Name {
        /// The name.
        node: String,
    },
    /// More pods than an announcement holds.
    #[error(
        "{count} pods are served on this node; an announcement holds {most}: peers do not see the others"
    )]
    TooMany {
        /// How many there are.
        count: usize,
        /// How many fit.
        most: usize,
    },
    /// The API server did not take it.
    #[error("NodeEnrolment {node}: cannot be written ({cause})")]
    Send {
        /// The object's name.
        node: Arc<str>,
        /// Why.
        cause: Arc<str>,
    },
    /// The file system refuses.
    #[error("{}: cannot be written ({source}); the cluster directory must be writable", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
}

impl Announcement {
    /// Reads an announcement that stands in the file of `node`.
    ///
    /// # Errors
    ///
    /// The first field that is unknown, missing or not what it should be; also when the file
    /// speaks for another node.
    pub fn read(node: &str, text: &str) -> Result<Self, Fault> {
        let Some(root) = yaml::parse_one(text)? else {
            return Err(Fault::new(0, "empty; the node's agent writes it"));
        };
        Self::of_node(node, &root)
    }

    fn of_node(node: &str, root: &yaml::Node) -> Result<Self, Fault> {
        match root.get("node").map(yaml::Node::text).transpose().map_err(|f| f.within("node"))? {
            Some(name) if name == node => {}
            Some(name) => {
                let message = format!("{name:?} speaks in the file of {node:?}; ignored");
                return Err(root.fault(message).within("node"));
            }
            None => return Err(root.fault("missing").within("node")),
        }
        Self::of_fields(node, root, &["node", "served", "revision", "time"], MAX_SERVED)
    }

    /// What a file and an object have in common.
    fn of_fields(
        node: &str,
        fields: &yaml::Node,
        known: &[&str],
        most: usize,
    ) -> Result<Self, Fault> {
        let (mut served, mut revision, mut time) = (BTreeMap::new(), 0, None);
        fields.known_fields(known, |field, value| {
            match field {
                "revision" => revision = value.number(0, u64::MAX)?,
                "time" => {
                    let wrong = |_| value.fault(format!("{} is not a time", value.describe()));
                    time = Some(value.text()?.parse().map_err(wrong)?);
                }
                "served" => {
                    for (uid, pod) in value.list(most, read_served)? {
                        served.insert(uid, pod);
                    }
                }
                _ => {}
            }
            Ok(())
        })?;
        let time = time.ok_or_else(|| fields.fault("missing").within("time"))?;
        Ok(Self { node: node.into(), served, revision, time })
    }

    /// As its file holds it.
    fn write(&self) -> String {
        let mut text = format!(
            "node: {}\nrevision: {}\ntime: {}\nserved:{}\n",
            self.node,
            self.revision,
            self.time,
            if self.served.is_empty() { " []" } else { "" }
        );
        for (uid, pod) in &self.served {
            // JSON's strings are YAML's.
            text.push_str(&format!("- uid: {}\n  pod: {}\n", quoted(uid), quoted(pod)));
        }
        text
    }
}

fn quoted(text: &str) -> String {
    serde_json::Value::from(text).to_string()
}

fn read_served(entry: &yaml::Node) -> Result<(PodUid, Arc<str>), Fault> {
    let (mut uid, mut pod) = (None, None);
    entry.known_fields(&["uid", "pod"], |field, value| {
        let text: Arc<str> = value.text()?.into();
        match field {
            "uid" => uid = Some(text),
            _ => pod = Some(text),
        }
        Ok(())
    })?;
    let missing = |field: &str| entry.fault("missing").within(field);
    Ok((uid.ok_or_else(|| missing("uid"))?, pod.ok_or_else(|| missing("pod"))?))
}

/// This node's place on the board.
#[derive(Debug)]
pub struct FilesBoard {
    node: Arc<str>,
    dir: PathBuf,
    last: Option<(BTreeMap<PodUid, Arc<str>>, u64)>,
}

impl FilesBoard {
    /// Takes this node's place; makes the board's directory where it is missing.
    ///
    /// # Errors
    ///
    /// A name that cannot be a file's, a directory that cannot be made.
    pub fn open(cluster_dir: &Path, node: &str) -> Result<Self, BoardError> {
        if !crate::policy::native::is_dns_name(node, 253) {
            return Err(BoardError::Name { node: yaml::shorten(node) });
        }
        let dir = cluster_dir.join(BOARD_DIR);
        fs::create_dir_all(&dir)
            .map_err(|source| BoardError::Write { path: dir.clone(), source })?;
        Ok(Self { node: node.into(), dir, last: None })
    }

    /// This node's file.
    pub fn path(&self) -> PathBuf {
        self.dir.join(format!("{}.yaml", self.node))
    }
}

impl EnrolmentBoard for FilesBoard {
    fn announce(
        &mut self,
        served: &BTreeMap<PodUid, Arc<str>>,
        revision: u64,
        now: Timestamp,
    ) -> Result<bool, BoardError> {
        if self.last.as_ref().is_some_and(|(s, r)| s == served && *r == revision) {
            return Ok(false);
        }
        let announcement =
            Announcement { node: self.node.clone(), served: served.clone(), revision, time: now };
        let path = self.path();
        // A reader sees the old file or the new one. It need not outlive a power cut: the
        // agent announces anew when it starts.
        let result = tempfile::Builder::new()
            .prefix(".announce-")
            .permissions(std::os::unix::fs::PermissionsExt::from_mode(0o644))
            .tempfile_in(&self.dir)
            .and_then(|mut file| {
                file.write_all(announcement.write().as_bytes())?;
                file.persist(&path).map_err(|e| e.error)?;
                Ok(())
            });
        result.map_err(|source| BoardError::Write { path, source })?;
        self.last = Some((served.clone(), revision));
        Ok(true)
    }

    fn fall_silent(&mut self) {
        // What is in the file is another's from now on.
        self.last = None;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn now() -> Timestamp {
        Timestamp::from_second(1_700_000_000).unwrap()
    }

    #[test]
    fn what_is_announced_is_read_back() {
        let dir = tempfile::tempdir().unwrap();
        let mut board = FilesBoard::open(dir.path(), "node-1").unwrap();
        let served =
            BTreeMap::from([("u-1".into(), "shop/web".into()), ("2".into(), "x/\"y".into())]);
        assert!(board.announce(&served, 7, now()).unwrap());
        assert!(!board.announce(&served, 7, now()).unwrap());
        let text = fs::read_to_string(board.path()).unwrap();
        let read = Announcement::read("node-1", &text).unwrap();
        assert_eq!(read.served, served);
        assert_eq!((read.revision, read.time), (7, now()));
        assert!(board.announce(&BTreeMap::new(), 8, now()).unwrap());
        let text = fs::read_to_string(board.path()).unwrap();
        assert!(Announcement::read("node-1", &text).unwrap().served.is_empty());
        // No temporary file stays behind.
        assert_eq!(fs::read_dir(dir.path().join(BOARD_DIR)).unwrap().count(), 1);
    }

    #[test]
    fn a_file_speaks_for_its_node_only() {
        let text = "node: node-2\nserved: []\nrevision: 1\ntime: 2026-01-01T00:00:00Z\n";
        assert!(Announcement::read("node-2", text).is_ok());
        let fault = Announcement::read("node-1", text).unwrap_err();
        assert_eq!(fault.to_string(), "node: \"node-2\" speaks in the file of \"node-1\"; ignored");
        let fault = Announcement::read("node-2", &text.replace("served", "serve")).unwrap_err();
        assert_eq!(fault.to_string(), "serve: unknown field; did you mean served?");
    }

    #[test]
    fn names_that_are_paths_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["../x", "a/b", "", ".hidden"] {
            assert!(matches!(FilesBoard::open(dir.path(), name), Err(BoardError::Name { .. })));
        }
    }

    proptest! {
        #[test]
        fn reading_never_panics(text in ".{0,200}") {
            let _ = Announcement::read("n", &text);
        }

        #[test]
        fn every_announcement_round_trips(
            served in proptest::collection::btree_map("[ -~é]{1,20}", "[ -~\n]{1,20}", 0..5),
            revision: u64,
        ) {
            let served = served.into_iter().map(|(k, v)| (k.into(), v.into())).collect();
            let written = Announcement { node: "n".into(), served, revision, time: now() };
            prop_assert_eq!(Announcement::read("n", &written.write()).unwrap(), written);
        }
    }
}
