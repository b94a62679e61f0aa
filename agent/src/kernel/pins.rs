//! The directory of pins: `<bpffs>/<instance>/v<ABI>/`, with links in `links/`.
//!
//! Pinned maps and links outlive the agent. Maps are re-used only where their layout is the
//! one of the embedded objects; anything else is another directory's, built beside and
//! swapped.

use std::{
    collections::BTreeMap,
    ffi::OsStr,
    fs, io,
    os::fd::AsFd,
    path::{Path, PathBuf},
};

use aya::maps::MapInfo;
use signet_ebpf::abi::ABI_VERSION;

use super::{KernelError, bpf, bpffs};

/// What decides whether a pinned map can be used by the embedded programs.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Layout {
    pub(super) kind: u32,
    pub(super) key_size: u32,
    pub(super) value_size: u32,
    pub(super) max_entries: u32,
}

/// The instance's pins.
#[derive(Clone, Debug)]
pub(super) struct Pins {
    /// The running ABI's directory.
    current: PathBuf,
    /// Directories of other versions or layouts, to be swapped out.
    others: Vec<PathBuf>,
}

impl Pins {
    /// Opens (or makes) the instance's directory; maps of another layout are set aside, or left
    /// where they are while the agent that uses them runs (`in_use`).
    pub(super) fn open(
        bpffs: &Path,
        instance: &str,
        layouts: &BTreeMap<String, Layout>,
        in_use: bool,
    ) -> Result<Self, KernelError> {
        let base = bpffs.join(instance);
        bpffs::ensure(&base)?;
        let current = base.join(format!("v{ABI_VERSION}"));
        if current.exists()
            && let Some(difference) = difference(&current, layouts)
        {
            let aside = (0..u32::MAX)
                .map(|i| base.join(format!("v{ABI_VERSION}-other-{i}")))
                .find(|path| !path.exists())
                .unwrap_or_else(|| base.join("other"));
            if in_use {
                tracing::warn!(%difference, beside = %aside.display(), "pinned maps are of another layout, and in use: building anew beside them");
                return Self::make(aside);
            }
            tracing::warn!(%difference, aside = %aside.display(), "pinned maps are of another layout: building anew beside them");
            fs::rename(&current, &aside).map_err(|source| KernelError::Pin {
                action: "set aside",
                path: current.clone(),
                source,
            })?;
        }
        Self::make(current)
    }

    fn make(current: PathBuf) -> Result<Self, KernelError> {
        let links = current.join("links");
        fs::create_dir_all(&links).map_err(|source| KernelError::Pin {
            action: "make the directory of",
            path: links,
            source,
        })?;
        let mut pins = Self { current, others: Vec::new() };
        pins.look_again();
        Ok(pins)
    }

    /// Looks which other versions' pins are there by now.
    pub(super) fn look_again(&mut self) {
        let base = self.current.parent().unwrap_or(Path::new("/"));
        let all = directories(base).into_iter();
        self.others = all.filter(|path| *path != self.current).collect();
    }

    /// The directory of the maps.
    pub(super) fn maps(&self) -> &Path {
        &self.current
    }

    /// Where a link is pinned.
    pub(super) fn link(&self, name: &str) -> PathBuf {
        self.current.join("links").join(name)
    }

    /// Where other versions pinned a link of this name.
    pub(super) fn other_links(&self, name: &str) -> Vec<PathBuf> {
        self.others
            .iter()
            .map(|dir| dir.join("links").join(name))
            .filter(|path| path.exists())
            .collect()
    }

    /// Other versions' directories.
    pub(super) fn others(&self) -> &[PathBuf] {
        &self.others
    }

    /// True while another version's pins are there.
    pub(super) fn has_others(&self) -> bool {
        !self.others.is_empty()
    }

    /// Names of the pinned links that begin with `prefix`, without it.
    pub(super) fn links_with(&self, prefix: &str) -> Vec<String> {
        let Ok(entries) = fs::read_dir(self.current.join("links")) else { return Vec::new() };
        entries
            .flatten()
            .filter_map(|entry| entry.file_name().into_string().ok())
            .filter_map(|name| name.strip_prefix(prefix).map(str::to_owned))
            .collect()
    }

    /// Removes what other versions left; their links that were not taken over detach.
    pub(super) fn remove_others(&mut self) -> Result<(), KernelError> {
        for dir in std::mem::take(&mut self.others) {
            remove_tree(&dir)?;
        }
        Ok(())
    }
}

/// Takes a pinned link off its hook, whoever else holds it, and removes the pin.
pub(super) fn detach(path: &Path) -> Result<(), KernelError> {
    if let Ok(link) = bpf::object_get(path)
        && let Err(error) = bpf::link_detach(link.as_fd())
    {
        // What it was attached to may be gone; without its pin it is of no effect either.
        tracing::debug!(path = %path.display(), %error, "link not detached");
    }
    unpin(path)
}

/// Removes one pin; a missing one is no error.
pub(super) fn unpin(path: &Path) -> Result<(), KernelError> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(KernelError::Pin { action: "remove", path: path.to_owned(), source: error })
        }
        _ => Ok(()),
    }
}

/// How the pinned maps of `dir` differ from `layouts`, for people; `None` when they don't.
fn difference(dir: &Path, layouts: &BTreeMap<String, Layout>) -> Option<String> {
    for (name, wanted) in layouts {
        let path = dir.join(name);
        if !path.exists() {
            continue;
        }
        let found = match layout_of(&path) {
            Ok(found) => found,
            Err(error) => return Some(format!("{name} cannot be read: {error}")),
        };
        if found != *wanted {
            return Some(format!("{name} is {found:?}, not {wanted:?}"));
        }
    }
    None
}

fn layout_of(path: &Path) -> Result<Layout, aya::maps::MapError> {
    let info = MapInfo::from_pin(path)?;
    Ok(Layout {
        kind: info.map_type()? as u32,
        key_size: info.key_size(),
        value_size: info.value_size(),
        max_entries: info.max_entries(),
    })
}

pub(super) fn directories(base: &Path) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(base) else { return Vec::new() };
    let mut found: Vec<_> = entries
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| path.is_dir() && path.file_name() != Some(OsStr::new("links")))
        .collect();
    found.sort();
    found
}

/// Unlinks files explicitly: a copied mount namespace may keep the file system alive.
pub(super) fn remove_tree(dir: &Path) -> Result<(), KernelError> {
    let failed =
        |action, path: &Path, source| KernelError::Pin { action, path: path.to_owned(), source };
    for entry in fs::read_dir(dir).map_err(|e| failed("list", dir, e))?.flatten() {
        let path = entry.path();
        if path.is_dir() {
            remove_tree(&path)?;
        } else {
            unpin(&path)?;
        }
    }
    fs::remove_dir(dir).map_err(|e| failed("remove", dir, e))
}
