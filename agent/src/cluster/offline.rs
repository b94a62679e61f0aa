//! A World from manifests at rest: what `signet policy check` and `validate` read. Nothing is
//! followed, nobody is served.

use std::{
    collections::{HashMap, HashSet},
    fs,
    path::{Path, PathBuf},
    sync::Arc,
};

use super::{
    assemble::{Assembler, Surroundings},
    collected::Collected,
    files::{
        ENFORCEMENT_FILE, FEDERATION_FILE, FileFault, FilesError, RANGES_FILE, file_fault,
        read_bounded, unreadable,
    },
    manifest::{self, Manifest},
    model::{Override, Ranges, Synced, World},
    source::SourceParams,
};
use crate::trust::federation::Federation;

/// Manifests at rest, each file's whole.
#[derive(Clone, Debug, Default)]
pub struct Manifests {
    files: Vec<(PathBuf, Manifest)>,
}

impl Manifests {
    /// Reads files, and of directories the files in them that hold manifests.
    ///
    /// # Errors
    ///
    /// The first file that cannot be read or understood.
    pub fn read(paths: &[PathBuf], root: &str) -> Result<Self, FilesError> {
        let mut read = Self::default();
        for path in files_of(paths)? {
            let text = text_of(&path).map_err(FilesError::File)?;
            read.add(&path, &text, root).map_err(FilesError::File)?;
        }
        Ok(read)
    }

    /// Adds a file's text.
    ///
    /// # Errors
    ///
    /// What is wrong with it; then nothing is added.
    pub fn add(&mut self, path: &Path, text: &str, root: &str) -> Result<(), FileFault> {
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or("manifest");
        let manifest = manifest::read(name, text, root).map_err(|fault| file_fault(path, fault))?;
        self.files.push((path.to_owned(), manifest));
        Ok(())
    }

    /// The files with what is in them.
    pub fn files(&self) -> impl Iterator<Item = (&Path, &Manifest)> {
        self.files.iter().map(|(path, manifest)| (path.as_path(), manifest))
    }

    /// The World of all objects; of one that is there twice the later file's counts.
    pub fn world(&self, params: &SourceParams, federation: Arc<Federation>) -> World {
        let mut seen = HashSet::new();
        let mut collected = Collected::default();
        for (_, manifest) in self.files.iter().rev() {
            for (_, object) in manifest.objects.iter().rev() {
                if seen.insert(object.identity()) {
                    collected.add(object);
                }
            }
        }
        collected.sort();
        let around = Surroundings {
            trust_domain: params.trust_domain.clone(),
            ranges: Ranges::default(),
            federation,
            policies: collected.policies,
            peer_authentications: collected.peer_authentications,
            request_authentications: collected.request_authentications,
            root_namespace: params.root_namespace.clone(),
            enforcement: Override::Absent,
            announced: HashMap::new(),
            problems: Vec::new(),
            synced: Synced { pods: true, policies: true },
        };
        Assembler::new(params.default_deny).assemble(&collected.objects, around)
    }
}

/// A file's text.
///
/// # Errors
///
/// A file that cannot be read, or is no text.
pub fn text_of(path: &Path) -> Result<String, FileFault> {
    read_bounded(path).map(|(text, _)| text).map_err(|error| unreadable(path, &error))
}

/// The files, and for directories the manifests in them, by name.
///
/// # Errors
///
/// A directory that cannot be listed.
pub fn files_of(paths: &[PathBuf]) -> Result<Vec<PathBuf>, FilesError> {
    let mut files = Vec::new();
    for path in paths {
        if !path.is_dir() {
            files.push(path.clone());
            continue;
        }
        let failed = |source| FilesError::Directory { dir: path.clone(), source };
        let mut listed = Vec::new();
        for entry in fs::read_dir(path).map_err(failed)? {
            let file = entry.map_err(failed)?.path();
            let ending = file.extension().and_then(|e| e.to_str());
            let name = file.file_name().and_then(|n| n.to_str()).unwrap_or(".");
            let beside = [RANGES_FILE, FEDERATION_FILE, ENFORCEMENT_FILE];
            if matches!(ending, Some("yaml" | "yml" | "json"))
                && !name.starts_with('.')
                && !beside.contains(&name)
                && file.is_file()
            {
                listed.push(file);
            }
        }
        listed.sort();
        files.extend(listed);
    }
    Ok(files)
}
