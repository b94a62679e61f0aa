//! The image's root directory as a table: path below the root → what is there.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, bail};

use super::{elf, inside};

/// Where the dynamic linker of the usual distributions looks, beside its own directory.
const LIBRARY_DIRECTORIES: [&str; 6] = [
    "/lib/x86_64-linux-gnu",
    "/usr/lib/x86_64-linux-gnu",
    "/lib64",
    "/usr/lib64",
    "/lib",
    "/usr/lib",
];

/// One entry.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Entry {
    /// A directory.
    Directory,
    /// A file that may be executed.
    Program(Vec<u8>),
    /// A symbolic link to this target.
    Link(String),
}

/// By path, sorted.
pub type Root = BTreeMap<String, Entry>;

/// The root with `binary` at `place`, `links` to it beside it, and all that it needs.
pub fn collect(binary: &Path, place: &str, links: &[&str]) -> anyhow::Result<Root> {
    let mut root = Root::new();
    let bytes = fs::read(binary).with_context(|| binary.display().to_string())?;
    let needs = elf::needs(&bytes).with_context(|| binary.display().to_string())?;
    root.insert(place.into(), Entry::Program(bytes));
    let name = place.rsplit('/').next().unwrap_or(place);
    for link in links {
        root.insert((*link).into(), Entry::Link(name.into()));
    }
    let mut wanted: BTreeSet<PathBuf> = needs.interpreter.iter().map(PathBuf::from).collect();
    for library in &needs.libraries {
        wanted.insert(find(library)?);
    }
    let mut done = BTreeSet::new();
    while let Some(path) = wanted.pop_first() {
        if !done.insert(path.clone()) {
            continue;
        }
        // Read through symbolic links: the name that is asked for is the one that counts.
        let bytes = fs::read(&path).with_context(|| path.display().to_string())?;
        for library in elf::needs(&bytes).with_context(|| path.display().to_string())?.libraries {
            wanted.insert(find(&library)?);
        }
        root.insert(inside(&path), Entry::Program(bytes));
    }
    let directories: BTreeSet<String> = root
        .keys()
        .flat_map(|path| Path::new(path).ancestors().skip(1))
        .map(|directory| directory.to_string_lossy().into_owned())
        .filter(|directory| !directory.is_empty())
        .collect();
    root.extend(directories.into_iter().map(|directory| (directory, Entry::Directory)));
    Ok(root)
}

fn find(library: &str) -> anyhow::Result<PathBuf> {
    let found = LIBRARY_DIRECTORIES.iter().map(|dir| Path::new(dir).join(library));
    match found.into_iter().find(|path| path.is_file()) {
        Some(path) => Ok(path),
        None => bail!("{library}: not in {}", LIBRARY_DIRECTORIES.join(", ")),
    }
}
