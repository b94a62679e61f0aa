//! Single files that are followed: read again when they change, and what they said last kept
//! while they are broken.

use std::{collections::BTreeMap, fs, io, os::unix::fs::MetadataExt as _, path::Path};

use super::FileFault;
use crate::config::yaml::{Fault, MAX_FILE_BYTES};

/// What tells a file's versions apart without reading it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(in crate::cluster) struct Stamp {
    device: u64,
    inode: u64,
    size: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

impl Stamp {
    fn of(metadata: &fs::Metadata) -> Self {
        Self {
            device: metadata.dev(),
            inode: metadata.ino(),
            size: metadata.size(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
            changed: (metadata.ctime(), metadata.ctime_nsec()),
        }
    }

    /// True when a further write could leave the same stamp: clocks of file systems are coarse.
    fn is_young(&self) -> bool {
        let now = jiff::Timestamp::now();
        let age = now.as_nanosecond()
            - (i128::from(self.changed.0) * 1_000_000_000 + i128::from(self.changed.1));
        age < 1_000_000_000
    }
}

/// A file that is followed.
#[derive(Debug)]
pub(super) struct Followed<T> {
    stamp: Stamp,
    /// The stamp was too young when the file was read to tell the next version apart.
    pub(super) young: bool,
    /// What it said when it was last good.
    pub(super) good: Option<T>,
    /// What is wrong with it now.
    pub(super) fault: Option<FileFault>,
    /// Files that came earlier go first where two hold the same object.
    pub(super) age: u64,
}

/// Files of one kind by name.
pub(super) type Followeds<T> = BTreeMap<String, Followed<T>>;

/// Regular files (or links to them) with a manifest's ending that are not hidden.
pub(super) fn list(dir: &Path) -> io::Result<BTreeMap<String, Stamp>> {
    let mut files = BTreeMap::new();
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        let Ok(name) = entry.file_name().into_string() else { continue };
        let ending = Path::new(&name).extension().and_then(|e| e.to_str());
        if name.starts_with('.') || !matches!(ending, Some("yaml" | "yml" | "json")) {
            continue;
        }
        // Follows links: a mounted ConfigMap is links into a directory that is swapped. A file
        // that is gone by now is told of by the next event.
        if let Ok(metadata) = fs::metadata(entry.path())
            && metadata.is_file()
        {
            files.insert(name, Stamp::of(&metadata));
        }
    }
    Ok(files)
}

/// Reads the files that are new or changed, forgets those that are gone.
pub(super) fn update<T>(
    followed: &mut Followeds<T>,
    dir: &Path,
    listed: BTreeMap<String, Stamp>,
    next_age: &mut u64,
    parse: impl Fn(&str, &str) -> Result<T, Fault>,
) {
    followed.retain(|name, _| listed.contains_key(name));
    for (name, stamp) in listed {
        if followed.get(&name).is_some_and(|file| file.stamp == stamp && !file.young) {
            continue;
        }
        let path = dir.join(&name);
        let read = match read_bounded(&path) {
            Ok((text, stamp)) => parse(&name, &text)
                .map(|good| (good, stamp))
                .map_err(|f| (file_fault(&path, f), stamp)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                // Gone between listing and reading; it is forgotten as if not listed.
                followed.remove(&name);
                continue;
            }
            Err(error) => Err((unreadable(&path, &error), stamp)),
        };
        let file = followed.entry(name).or_insert_with(|| {
            *next_age += 1;
            Followed { stamp, young: false, good: None, fault: None, age: *next_age }
        });
        file.stamp = match read {
            Ok((good, stamp)) => {
                file.good = Some(good);
                file.fault = None;
                stamp
            }
            Err((fault, stamp)) => {
                file.fault = Some(fault);
                stamp
            }
        };
        file.young = file.stamp.is_young();
    }
}

pub(in crate::cluster) fn file_fault(path: &Path, fault: Fault) -> FileFault {
    FileFault { path: path.to_owned(), line: fault.line, message: fault.to_string() }
}

pub(in crate::cluster) fn unreadable(path: &Path, error: &io::Error) -> FileFault {
    let message = if error.kind() == io::ErrorKind::InvalidData {
        "not UTF-8 text; write YAML".to_owned()
    } else {
        format!("cannot be read ({error}); make it readable for the agent or remove it")
    };
    FileFault { path: path.to_owned(), line: 0, message }
}

/// A file's text and the stamp of what was read (not of what stood there when listed).
pub(in crate::cluster) fn read_bounded(path: &Path) -> io::Result<(String, Stamp)> {
    use io::Read as _;
    let file = fs::File::open(path)?;
    let stamp = Stamp::of(&file.metadata()?);
    let mut text = String::new();
    // One byte more than is allowed, so that the parser sees and names the excess.
    file.take(MAX_FILE_BYTES + 1).read_to_string(&mut text)?;
    Ok((text, stamp))
}
