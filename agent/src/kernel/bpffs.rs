//! The bpffs mount that holds the pins.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use rustix::mount::{MountFlags, mount};

use super::KernelError;

/// `BPF_FS_MAGIC` of `linux/magic.h`.
const MAGIC: u32 = 0xcafe_4a11;

/// Where the kernel offers the conventional mount point.
const CONVENTIONAL: &str = "/sys/fs/bpf";

/// Makes sure that `path` is a directory on a bpffs: makes the directory where its parent is
/// one already, else mounts a bpffs (on `/sys/fs/bpf` for paths below it, else on `path`).
///
/// # Errors
/// Names the path and what is wrong with it.
pub(super) fn ensure(path: &Path) -> Result<(), KernelError> {
    let existing = path.ancestors().find(|p| p.exists()).unwrap_or(Path::new("/"));
    if !existing.is_dir() {
        return Err(KernelError::WrongBpffs {
            path: path.to_owned(),
            problem: format!("{} is not a directory", existing.display()),
        });
    }
    if !is_bpffs(existing)? {
        let point = mount_point(path, existing)?;
        mount(
            "bpf",
            &point,
            "bpf",
            MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC,
            Some(c"mode=0700"),
        )
        .map_err(|errno| KernelError::CannotMountBpffs {
            path: point.clone(),
            source: errno.into(),
        })?;
        tracing::info!(path = %point.display(), "mounted a bpffs");
    }
    fs::create_dir_all(path).map_err(|source| KernelError::Io {
        what: format!("the directory {}", path.display()),
        source,
    })
}

/// Where [`ensure`] would mount a bpffs for `path`; `None`: one is there. Changes nothing.
///
/// # Errors
/// A path that cannot hold pins.
pub(super) fn look(path: &Path) -> Result<Option<PathBuf>, KernelError> {
    let wrong = |problem: String| KernelError::WrongBpffs { path: path.to_owned(), problem };
    let existing = path.ancestors().find(|p| p.exists()).unwrap_or(Path::new("/"));
    if !existing.is_dir() {
        return Err(wrong(format!("{} is not a directory", existing.display())));
    }
    if is_bpffs(existing)? {
        return Ok(None);
    }
    if path.starts_with(CONVENTIONAL) && Path::new(CONVENTIONAL).is_dir() {
        return Ok(Some(CONVENTIONAL.into()));
    }
    if existing == path {
        let mut entries = fs::read_dir(path).map_err(|error| wrong(error.to_string()))?;
        if entries.next().is_some() {
            return Err(wrong("it is not on a bpffs and not empty".into()));
        }
    }
    Ok(Some(path.to_owned()))
}

/// Where to mount: an empty directory, so that nothing of anybody's disappears.
fn mount_point(path: &Path, existing: &Path) -> Result<PathBuf, KernelError> {
    if path.starts_with(CONVENTIONAL) && Path::new(CONVENTIONAL).is_dir() {
        return Ok(CONVENTIONAL.into());
    }
    let wrong = |problem: String| KernelError::WrongBpffs { path: path.to_owned(), problem };
    if existing != path {
        fs::create_dir_all(path)
            .map_err(|error| wrong(format!("the directory cannot be made: {error}")))?;
    }
    let mut entries = fs::read_dir(path).map_err(|error| wrong(error.to_string()))?;
    if entries.next().is_some() {
        return Err(wrong("it is not on a bpffs and not empty, so none is mounted over it".into()));
    }
    Ok(path.to_owned())
}

fn is_bpffs(path: &Path) -> Result<bool, KernelError> {
    let stat = rustix::fs::statfs(path).map_err(|errno| KernelError::Io {
        what: path.display().to_string(),
        source: io::Error::from(errno),
    })?;
    // The type's width differs between architectures; the magic has 32 bits.
    Ok(stat.f_type as u32 == MAGIC)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_and_a_full_directory_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        fs::write(&file, "x").unwrap();
        for path in [dir.path().to_owned(), file.clone(), file.join("below")] {
            let error = ensure(&path).expect_err("not a place for pins");
            assert!(matches!(error, KernelError::WrongBpffs { .. }), "{error}");
            assert!(error.to_string().contains("--bpffs"), "{error}");
            let error = look(&path).expect_err("not a place for pins");
            assert!(error.to_string().contains("--bpffs"), "{error}");
        }
        let below = dir.path().join("new/pins");
        assert_eq!(look(&below).unwrap(), Some(below.clone()));
        assert!(!below.exists(), "looking makes nothing");
    }

    #[test]
    fn an_empty_directory_gets_a_bpffs() {
        if !rustix::process::geteuid().is_root() {
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let point = dir.path().join("bpf");
        assert_eq!(look(&point).unwrap(), Some(point.clone()));
        ensure(&point).unwrap();
        assert!(is_bpffs(&point).unwrap());
        assert_eq!(look(&point.join("signet")).unwrap(), None);
        // A second time there is nothing to do, and a directory below is just made.
        ensure(&point.join("signet")).unwrap();
        assert!(is_bpffs(&point.join("signet")).unwrap());
        rustix::mount::unmount(&point, rustix::mount::UnmountFlags::DETACH).unwrap();
    }
}
