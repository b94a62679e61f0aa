//! What is pinned, used without loading a program: for a node on which no agent may run.

use std::{
    fs, io,
    os::fd::AsFd,
    path::{Path, PathBuf},
};

use aya::maps::{Array, Map, MapData};
use signet_ebpf::abi::{Config, Mode, PodEntry, PodName};

use super::{
    KernelError, bpf,
    contents::{self, Contents},
    maps::Table,
    pins::{self, directories, remove_tree},
    programs::detach_all_filters,
};

/// The pins of one instance, of every version that is there.
#[derive(Debug)]
pub struct Pinned {
    base: PathBuf,
    versions: Vec<PathBuf>,
}

/// What was removed.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Removed {
    /// Links that were detached: each takes its program off its hook.
    pub links: usize,
    /// Maps.
    pub maps: usize,
    /// Filters of raw guards on kernels without tcx.
    pub filters: usize,
}

impl Pinned {
    /// Looks for the pins of an instance; `None` when nothing is pinned.
    pub fn find(bpffs: &Path, instance: &str) -> Option<Self> {
        let base = bpffs.join(instance);
        let versions = directories(&base);
        base.is_dir().then_some(Self { base, versions })
    }

    /// Where they are.
    pub fn path(&self) -> &Path {
        &self.base
    }

    /// The configuration in force.
    ///
    /// # Errors
    /// Where no version's can be read by this build.
    pub fn config(&self) -> Result<Config, KernelError> {
        let mut failure = None;
        for version in &self.versions {
            match config_of(version).and_then(|map| map.get(&0, 0).map_err(failed("read"))) {
                Ok(config) => return Ok(config),
                Err(error) => failure = Some(error),
            }
        }
        Err(failure.unwrap_or(self.nothing()))
    }

    /// Writes `enforcement` of every version that this build can read; answers what it was.
    ///
    /// # Errors
    /// Where none could be written: nothing is changed then.
    pub fn set_enforcement(&self, enforcement: u8) -> Result<u8, KernelError> {
        self.change_config(|config| std::mem::replace(&mut config.enforcement, enforcement))
    }

    fn change_config<T>(&self, change: impl Fn(&mut Config) -> T) -> Result<T, KernelError> {
        let mut outcome = Err(self.nothing());
        for version in &self.versions {
            let changed = config_of(version).and_then(|mut map| {
                let mut config = map.get(&0, 0).map_err(failed("read"))?;
                let answer = change(&mut config);
                map.set(0, config, 0).map_err(failed("write"))?;
                Ok(answer)
            });
            match (&outcome, changed) {
                (Ok(_), _) => {}
                (Err(_), changed) => outcome = changed,
            }
        }
        outcome
    }

    /// Every registered pod with its name: network namespace, name, row.
    ///
    /// # Errors
    /// Where the tables cannot be read.
    pub fn pods(&self) -> Result<Vec<(u64, Option<String>, PodEntry)>, KernelError> {
        let mut all = Vec::new();
        for version in &self.versions {
            let (pods, names) = tables(version)?;
            let names: std::collections::HashMap<u64, PodName> =
                names.rows()?.into_iter().collect();
            for (netns, entry) in pods.rows()? {
                let name = names.get(&netns).and_then(PodName::as_str).map(str::to_owned);
                all.push((netns, name, entry));
            }
        }
        Ok(all)
    }

    /// Every map that is pinned, of every version, with at most so many of its rows.
    ///
    /// # Errors
    /// Where a directory cannot be read, or a map cannot be opened.
    pub fn contents(&self, most: usize) -> Result<Vec<Contents>, KernelError> {
        let mut all = Vec::new();
        for version in &self.versions {
            contents::of_directory(version, most, &mut all)?;
        }
        Ok(all)
    }

    /// Gives the rows of the pod `name` another mode; answers the modes that it had, none
    /// where no such pod is registered.
    ///
    /// # Errors
    /// Where the tables cannot be read or written.
    pub fn set_mode(
        &self,
        name: &str,
        mode: impl Fn(Mode) -> Mode,
    ) -> Result<Vec<Mode>, KernelError> {
        let mut before = Vec::new();
        for version in &self.versions {
            let (mut pods, names) = tables(version)?;
            for (netns, row) in names.rows()? {
                if row.as_str() != Some(name) {
                    continue;
                }
                for (found, mut entry) in pods.rows()? {
                    if found != netns {
                        continue;
                    }
                    let was = Mode::from_u8(entry.mode);
                    before.push(was);
                    entry.mode = mode(was) as u8;
                    pods.set(netns, entry)?;
                }
            }
        }
        Ok(before)
    }

    /// Detaches every link and removes every pin, of all versions: what is left of Signet in
    /// the kernel goes with the last of them.
    ///
    /// # Errors
    /// What could not be detached or removed first; the rest is left then.
    pub fn remove(self) -> Result<Removed, KernelError> {
        let mut removed = Removed::default();
        for version in &self.versions {
            for path in files(&version.join("links")) {
                let link = bpf::object_get(&path).map_err(|source| KernelError::Pin {
                    action: "open",
                    path: path.clone(),
                    source,
                })?;
                // A copied mount namespace may hold another pin of it: detached, it is of no
                // effect there either. What it was attached to may be gone.
                match bpf::link_detach(link.as_fd()) {
                    Err(error) if error.raw_os_error() != Some(libc::ENOLINK) => {
                        tracing::debug!(path = %path.display(), %error, "link not detached");
                    }
                    _ => {}
                }
                drop(link);
                pins::unpin(&path)?;
                removed.links += 1;
            }
            removed.maps += files(version).len();
            remove_tree(version)?;
        }
        removed.filters = detach_all_filters();
        remove_tree(&self.base)?;
        Ok(removed)
    }

    fn nothing(&self) -> KernelError {
        KernelError::Io {
            what: format!("the pins in {}", self.base.display()),
            source: io::Error::from(io::ErrorKind::NotFound),
        }
    }
}

fn failed(action: &'static str) -> impl Fn(aya::maps::MapError) -> KernelError {
    move |source| KernelError::Map { map: "CONFIG", action, source }
}

fn config_of(version: &Path) -> Result<Array<MapData, Config>, KernelError> {
    MapData::from_pin(version.join("CONFIG"))
        .and_then(|data| Array::try_from(Map::Array(data)))
        .map_err(failed("open"))
}

fn tables(version: &Path) -> Result<(Table<u64, PodEntry>, Table<u64, PodName>), KernelError> {
    Ok((Table::open(version, "PODS")?, Table::open(version, "NAMES")?))
}

/// The files of a directory, not its directories.
fn files(directory: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    entries.map(|entry| entry.path()).filter(|path| !path.is_dir()).collect()
}
