//! The archive, and the file that it becomes.

use std::{
    io::{self, Write},
    path::Path,
};

use flate2::{Compression, write::GzEncoder};
use jiff::Timestamp;

use crate::{
    cli::exit::{Exit, Failure},
    telemetry::scrub,
};

/// A tar of texts, gzipped, in memory.
pub struct Archive {
    tar: tar::Builder<GzEncoder<Vec<u8>>>,
    /// The directory that everything in it is in.
    root: String,
    time: u64,
}

impl Archive {
    /// An empty one; unpacked, everything is in the directory `root`.
    pub fn new(root: String, time: Timestamp) -> Self {
        let gzip = GzEncoder::new(Vec::new(), Compression::default());
        let time = u64::try_from(time.as_second()).unwrap_or(0);
        Self { tar: tar::Builder::new(gzip), root, time }
    }

    /// Adds a text, without whatever is a secret in it.
    pub fn add(&mut self, name: &str, text: &str) -> Result<(), Failure> {
        let text = scrub::scrub(text);
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(tar::EntryType::Regular);
        header.set_mode(0o600);
        header.set_mtime(self.time);
        header.set_size(text.len() as u64);
        let path = format!("{}/{name}", self.root);
        self.tar.append_data(&mut header, path, text.as_bytes()).map_err(unwritten)
    }

    /// Its bytes.
    pub fn finish(self) -> Result<Vec<u8>, Failure> {
        self.tar.into_inner().and_then(GzEncoder::finish).map_err(unwritten)
    }
}

fn unwritten(error: io::Error) -> Failure {
    Failure::caused(Exit::Bug, anyhow::Error::new(error).context("the archive in memory"))
}

/// The refusal to replace a file.
pub fn exists(path: &Path) -> Failure {
    let path = path.display();
    let why = format!("{path} exists; name another file with -o, or replace it with --force");
    Failure::new(Exit::Input, why)
}

/// Writes a file that only its owner reads: whole, or not at all. Without `force` it replaces
/// nothing; with it, a link is replaced and not followed.
pub fn write(path: &Path, bytes: &[u8], force: bool) -> Result<(), Failure> {
    let failed = |error: io::Error| {
        let at = path.display().to_string();
        Failure::caused(Exit::Input, anyhow::Error::new(error).context(at))
    };
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
    // Its mode is 0600 from the beginning.
    let mut file = tempfile::Builder::new()
        .prefix(".signet-support-")
        .tempfile_in(parent.unwrap_or(Path::new(".")))
        .map_err(failed)?;
    file.write_all(bytes).and_then(|()| file.as_file().sync_all()).map_err(failed)?;
    let kept = if force { file.persist(path) } else { file.persist_noclobber(path) };
    match kept {
        Ok(_) => Ok(()),
        Err(e) if !force && e.error.kind() == io::ErrorKind::AlreadyExists => Err(exists(path)),
        Err(e) => Err(failed(e.error)),
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::PermissionsExt};

    use super::*;

    #[test]
    fn a_file_is_the_owners_and_is_replaced_only_by_force() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("bundle.tar.gz");
        write(&path, b"one", false).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o7777, 0o600);
        let refused = write(&path, b"two", false).unwrap_err();
        assert_eq!(refused.exit, Exit::Input);
        assert!(refused.to_string().contains("--force"), "{refused}");
        assert_eq!(fs::read(&path).unwrap(), b"one");
        write(&path, b"two", true).unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"two");

        // A link to somebody else's file.
        let (link, other) = (dir.path().join("link"), dir.path().join("other"));
        fs::write(&other, "other").unwrap();
        std::os::unix::fs::symlink(&other, &link).unwrap();
        assert_eq!(write(&link, b"three", false).unwrap_err().exit, Exit::Input);
        write(&link, b"three", true).unwrap();
        assert_eq!(fs::read(&link).unwrap(), b"three");
        assert_eq!(fs::read(&other).unwrap(), b"other");

        let missing = write(&dir.path().join("no/such"), b"x", false).unwrap_err();
        assert!(missing.to_string().contains("no/such"), "{missing}");
        // Nothing is left behind.
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 3);
    }
}
