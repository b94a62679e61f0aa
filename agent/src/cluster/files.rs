//! A directory of manifests, followed live (standalone mode, DESIGN §9).
//!
//! `*.yaml`, `*.yml` and `*.json` in the directory are manifests, `ranges.yaml` the address
//! ranges, `federation.yaml` the trust domains beyond our own, `status/<node>.yaml` the board of
//! who is served; other subdirectories are not followed. A file counts whole or not at all: one that breaks keeps what it said last and
//! becomes a problem; at start it is an error. Writers should replace files by rename.

mod followed;

use std::{
    collections::{BTreeMap, HashMap},
    fs, io,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    sync::{Arc, mpsc},
    time::{Duration, Instant},
};

use notify::{RecursiveMode, Watcher as _};
use tokio::sync::watch;

use self::followed::{Followeds, list, update};
pub(super) use self::followed::{file_fault, read_bounded, unreadable};
use super::{
    assemble::{Assembler, Surroundings},
    collected::{Collected, claims},
    enrolment::{Announcement, BOARD_DIR},
    manifest::{self, Manifest},
    model::{Override, Problem, Ranges, Synced, World},
    source::{ClusterSource, SourceParams, WatchFacts},
};
use crate::{
    config::{at_line, values::Enforcement},
    trust::federation::{self, Federation},
};

/// Name of the file with the cluster's address ranges.
pub const RANGES_FILE: &str = "ranges.yaml";

/// Name of the file with the trust domains that the cluster federates with.
pub const FEDERATION_FILE: &str = "federation.yaml";

/// Name of the file that overrides what modes and policies say. It may break without keeping
/// an agent from starting: what was in force last stays.
pub const ENFORCEMENT_FILE: &str = "enforcement.yaml";

/// Changes that keep coming are published at the latest after this many quiet times.
const MAX_DEBOUNCES: u32 = 8;
/// How soon a watch that was lost is set up again.
const RETRY: Duration = Duration::from_millis(500);

/// Why the directory cannot be followed; exit code 3.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FilesError {
    /// The directory cannot be read.
    #[error("cluster directory {}: cannot be read ({source}); check --cluster-dir", dir.display())]
    Directory {
        /// The directory.
        dir: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A file cannot be read or understood.
    #[error("{0}")]
    File(FileFault),
    /// The kernel gives no watch.
    #[error(
        "cluster directory {}: cannot be watched ({source}); raise fs.inotify.max_user_watches \
         or max_user_instances", dir.display()
    )]
    Watch {
        /// The directory.
        dir: PathBuf,
        /// Why.
        source: notify::Error,
    },
    /// No thread.
    #[error("no thread to follow the cluster directory: {0}")]
    Thread(io::Error),
}

/// What is wrong with a file: `<path>:<line>: <field>: <value and remedy>`.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{}{}: {message}", path.display(), at_line(*line))]
pub struct FileFault {
    /// The file.
    pub path: PathBuf,
    /// Line, 0 for the whole file.
    pub line: u64,
    /// Field, value and remedy.
    pub message: String,
}

/// Follows a directory of manifests.
#[derive(Debug)]
pub struct FilesSource {
    dir: PathBuf,
    worlds: watch::Receiver<Arc<World>>,
}

impl FilesSource {
    /// Reads the directory and follows it until the last receiver is dropped.
    ///
    /// The first World is there when this returns. Every published World differs from the
    /// one before, and its revision is one more.
    ///
    /// # Errors
    ///
    /// A directory or file that cannot be read or understood.
    pub fn start(dir: impl Into<PathBuf>, params: SourceParams) -> Result<Self, FilesError> {
        let dir = dir.into();
        let debounce = params.debounce;
        let (signal, events) = mpsc::channel();
        let watcher = notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
            // Reading the directory is no change of it. An error may hide one.
            if !event.is_ok_and(|event| is_read(event.kind)) {
                let _ = signal.send(());
            }
        })
        .map_err(|source| FilesError::Watch { dir: dir.clone(), source })?;
        let mut watches = Watches { watcher, dir: dir.clone(), held: [None, None] };
        // The watch comes before the first reading, so that no change falls between.
        watches.hold().map_err(|source| FilesError::Watch { dir: dir.clone(), source })?;
        let (mut directory, world) = Directory::open(dir.clone(), params)?;
        let (sender, worlds) = watch::channel(world);
        std::thread::Builder::new()
            .name("signet-files".into())
            .spawn(move || follow(&mut directory, &mut watches, &events, &sender, debounce))
            .map_err(FilesError::Thread)?;
        Ok(Self { dir, worlds })
    }
}

impl ClusterSource for FilesSource {
    fn worlds(&self) -> watch::Receiver<Arc<World>> {
        self.worlds.clone()
    }

    fn name(&self) -> &'static str {
        "files"
    }

    fn location(&self) -> String {
        self.dir.display().to_string()
    }

    fn watches(&self) -> Vec<WatchFacts> {
        Vec::new()
    }
}

fn is_read(kind: notify::EventKind) -> bool {
    use notify::event::{AccessKind, AccessMode, EventKind};
    match kind {
        EventKind::Access(AccessKind::Close(AccessMode::Write)) => false,
        EventKind::Access(_) => true,
        _ => false,
    }
}

/// The watcher's thread: waits for quiet, reads, publishes.
fn follow(
    directory: &mut Directory,
    watches: &mut Watches,
    events: &mpsc::Receiver<()>,
    sender: &watch::Sender<Arc<World>>,
    debounce: Duration,
) {
    while !sender.is_closed() {
        // What happened before a new watch was set nobody tells of: read at once.
        if !matches!(watches.hold(), Ok(Hold::New)) {
            match events.recv_timeout(RETRY) {
                Ok(()) => {}
                Err(mpsc::RecvTimeoutError::Timeout) if watches.is_stale() => {}
                Err(mpsc::RecvTimeoutError::Timeout) => continue,
                Err(mpsc::RecvTimeoutError::Disconnected) => return,
            }
        }
        let latest = Instant::now() + debounce * MAX_DEBOUNCES;
        while events.recv_timeout(debounce).is_ok() && Instant::now() < latest {}
        // A directory that was replaced is watched before it is read.
        let _ = watches.hold();
        if let Some(world) = directory.refresh() {
            sender.send_replace(world);
        }
    }
}

/// What became of the watches.
enum Hold {
    /// They are as they were.
    Same,
    /// One is new.
    New,
}

/// Watches on the directory and on the board in it.
struct Watches {
    watcher: notify::RecommendedWatcher,
    dir: PathBuf,
    /// Inodes of the watched directories.
    held: [Option<(u64, u64)>; 2],
}

impl Watches {
    fn dirs(&self) -> [PathBuf; 2] {
        [self.dir.clone(), self.dir.join(BOARD_DIR)]
    }

    /// True when a directory is not the one that is watched, or the main one is not there.
    fn is_stale(&self) -> bool {
        self.held[0].is_none()
            || self.dirs().iter().zip(self.held).any(|(dir, held)| inode(dir) != held)
    }

    /// Watches what is there. The board may be missing, the directory may not.
    fn hold(&mut self) -> notify::Result<Hold> {
        let mut result = Ok(Hold::Same);
        for (index, dir) in self.dirs().iter().enumerate() {
            let present = inode(dir);
            if present == self.held[index] && (index > 0 || present.is_some()) {
                continue;
            }
            if self.held[index].take().is_some() {
                // The kernel drops the watch of a directory that is gone by itself.
                let _ = self.watcher.unwatch(dir);
            }
            match self.watcher.watch(dir, RecursiveMode::NonRecursive) {
                Ok(()) => {
                    // One made since it was looked at is held at the next turn.
                    self.held[index] = present;
                    if result.is_ok() {
                        result = Ok(Hold::New);
                    }
                }
                Err(error) if index == 0 => result = Err(error),
                Err(_) => {}
            }
        }
        result
    }
}

fn inode(dir: &Path) -> Option<(u64, u64)> {
    fs::metadata(dir).ok().map(|m| (m.dev(), m.ino()))
}

/// The directory's contents; reads, but does not watch.
#[derive(Debug)]
struct Directory {
    dir: PathBuf,
    params: SourceParams,
    manifests: Followeds<Manifest>,
    ranges: Followeds<Ranges>,
    federation: Followeds<Arc<Federation>>,
    enforcement: Followeds<Enforcement>,
    board: Followeds<Announcement>,
    assembler: Assembler,
    /// The directory itself could not be read the last time.
    unreadable: Option<String>,
    world: Arc<World>,
    next_age: u64,
}

impl Directory {
    /// Reads a directory for the first time.
    fn open(dir: PathBuf, params: SourceParams) -> Result<(Self, Arc<World>), FilesError> {
        let world = Arc::new(World::empty(params.trust_domain.clone()));
        let default_deny = params.default_deny;
        let mut directory = Self {
            dir,
            params,
            manifests: BTreeMap::new(),
            ranges: BTreeMap::new(),
            federation: BTreeMap::new(),
            enforcement: BTreeMap::new(),
            board: BTreeMap::new(),
            assembler: Assembler::new(default_deny),
            unreadable: None,
            world,
            next_age: 0,
        };
        directory
            .read_all()
            .map_err(|source| FilesError::Directory { dir: directory.dir.clone(), source })?;
        // The board is other nodes' word: what is wrong with it must not keep this one down.
        let faults = directory.manifests.values().filter_map(|f| f.fault.clone());
        let faults = faults.chain(directory.ranges.values().filter_map(|f| f.fault.clone()));
        let faults = faults.chain(directory.federation.values().filter_map(|f| f.fault.clone()));
        if let Some(fault) = faults.min_by(|a, b| a.path.cmp(&b.path)) {
            return Err(FilesError::File(fault));
        }
        for (name, file) in &directory.manifests {
            if let Some(fault) = file.good.iter().flat_map(|m| &m.label_faults).next() {
                return Err(FilesError::File(file_fault(&directory.dir.join(name), fault.clone())));
            }
        }
        if let Some(duplicate) = directory.objects().1.into_iter().next() {
            return Err(FilesError::File(duplicate));
        }
        let world = match directory.publish() {
            Some(world) => world,
            None => directory.world.clone(),
        };
        Ok((directory, world))
    }

    /// Reads what changed; a new World, if it says something new.
    fn refresh(&mut self) -> Option<Arc<World>> {
        self.unreadable = self.read_all().err().map(|error| error.to_string());
        self.publish()
    }

    fn read_all(&mut self) -> io::Result<()> {
        let listed = list(&self.dir)?;
        let (ranges, others): (_, BTreeMap<_, _>) =
            listed.into_iter().partition(|(name, _)| name == RANGES_FILE);
        let (federation, others): (_, BTreeMap<_, _>) =
            others.into_iter().partition(|(name, _)| name == FEDERATION_FILE);
        let (enforcement, manifests) =
            others.into_iter().partition(|(name, _)| name == ENFORCEMENT_FILE);
        let board = match list(&self.dir.join(BOARD_DIR)) {
            Ok(board) => board,
            Err(error) if error.kind() == io::ErrorKind::NotFound => BTreeMap::new(),
            Err(error) => return Err(error),
        };
        let board = board.into_iter().filter(|(name, _)| name.ends_with(".yaml")).collect();
        let age = &mut self.next_age;
        let root = &self.params.root_namespace;
        update(&mut self.manifests, &self.dir, manifests, age, |name, text| {
            manifest::read(name, text, root)
        });
        update(&mut self.ranges, &self.dir, ranges, age, |_, text| manifest::read_ranges(text));
        update(&mut self.enforcement, &self.dir, enforcement, age, |_, text| {
            manifest::read_enforcement(text)
        });
        let own = &self.params.trust_domain;
        update(&mut self.federation, &self.dir, federation, age, |_, text| {
            federation::read(text, own).map(Arc::new)
        });
        update(&mut self.board, &self.dir.join(BOARD_DIR), board, age, |name, text| {
            Announcement::read(name.trim_end_matches(".yaml"), text)
        });
        Ok(())
    }

    /// All objects, and those that are there twice (the older file's stays).
    fn objects(&self) -> (Collected, Vec<FileFault>) {
        let mut files: Vec<_> = self.manifests.iter().collect();
        files.sort_by_key(|(_, file)| file.age);
        let mut seen: HashMap<_, (&str, u64)> = HashMap::new();
        let mut collected = Collected::default();
        let mut duplicates = Vec::new();
        for (name, file) in files {
            for (line, object) in file.good.iter().flat_map(|m| &m.objects) {
                let identity = object.identity();
                if let Some((other, other_line)) = seen.get(&identity) {
                    let (kind, namespace, named) = &identity;
                    let slash = if namespace.is_empty() { "" } else { "/" };
                    duplicates.push(FileFault {
                        path: self.dir.join(name),
                        line: *line,
                        message: format!(
                            "{kind} {namespace}{slash}{named}: also in {other}:{other_line}, which \
                             stays in force; remove one"
                        ),
                    });
                    continue;
                }
                seen.insert(identity, (name, *line));
                collected.add(object);
            }
        }
        // Files come and go in any order; the World must not depend on it.
        collected.sort();
        (collected, duplicates)
    }

    fn publish(&mut self) -> Option<Arc<World>> {
        let (collected, duplicates) = self.objects();
        let mut problems: Vec<Problem> = duplicates.iter().map(Self::problem).collect();
        problems
            .extend(self.manifests.values().filter_map(|f| f.fault.as_ref()).map(Self::problem));
        problems.extend(self.ranges.values().filter_map(|f| f.fault.as_ref()).map(Self::problem));
        problems
            .extend(self.federation.values().filter_map(|f| f.fault.as_ref()).map(Self::problem));
        problems
            .extend(self.enforcement.values().filter_map(|f| f.fault.as_ref()).map(Self::problem));
        problems.extend(self.board.values().filter_map(|f| f.fault.as_ref()).map(Self::problem));
        problems.extend(self.unreadable.iter().map(|error| Problem {
            subject: format!("cluster directory {}", self.dir.display()),
            message: format!("cannot be read ({error}); what was read last stays in force"),
        }));
        let mut ranges = self.params.ranges.clone();
        if let Some(file) = self.ranges.values().find_map(|f| f.good.as_ref()) {
            let lists = [
                (&mut ranges.pods, &file.pods),
                (&mut ranges.services, &file.services),
                (&mut ranges.outside, &file.outside),
            ];
            for (configured, declared) in lists {
                if configured.is_empty() {
                    configured.clone_from(declared);
                }
            }
        }
        let board = self.board.values().filter_map(|f| f.good.as_ref());
        let claims = claims(board, &collected.objects);
        let around = Surroundings {
            trust_domain: self.params.trust_domain.clone(),
            ranges,
            federation: self.federation.values().find_map(|f| f.good.clone()).unwrap_or_default(),
            policies: collected.policies,
            peer_authentications: collected.peer_authentications,
            request_authentications: collected.request_authentications,
            root_namespace: self.params.root_namespace.clone(),
            enforcement: match self.enforcement.values().next().map(|file| file.good) {
                None => Override::Absent,
                Some(Some(word)) => Override::Is(word),
                Some(None) => Override::Unreadable,
            },
            announced: claims,
            problems,
            synced: Synced { pods: true, policies: true },
        };
        let mut world = self.assembler.assemble(&collected.objects, around);
        if world.same_as(&self.world) {
            return None;
        }
        for problem in world.problems.iter().filter(|p| !self.world.problems.contains(p)) {
            tracing::warn!(subject = problem.subject, "{}", problem.message);
        }
        world.revision = self.world.revision + 1;
        self.world = Arc::new(world);
        Some(self.world.clone())
    }

    fn problem(fault: &FileFault) -> Problem {
        Problem {
            subject: format!("file {}{}", fault.path.display(), at_line(fault.line)),
            message: fault.message.clone(),
        }
    }
}

#[cfg(test)]
mod tests;
