//! The guard's place on a node: a copy of this binary and a systemd unit that runs it before the
//! kubelet.

use std::{
    fs, io,
    os::unix::fs::{PermissionsExt, symlink},
    path::{Path, PathBuf},
};

use super::LifecycleError;

/// The binary, below the host's root.
const BINARY: &str = "opt/signet/bin/signet";
/// The unit, below the host's root.
const UNIT: &str = "etc/systemd/system/signet-guard.service";
/// What enables the unit, and where it leads.
const WANTED: (&str, &str) =
    ("etc/systemd/system/multi-user.target.wants/signet-guard.service", "../signet-guard.service");

/// What the unit says.
const UNIT_TEXT: &str = "\
[Unit]
Description=Signet: refuse pods that nobody knows until the agent is there
Documentation=man:signet-guard(1)
Before=kubelet.service k3s.service k3s-agent.service
After=local-fs.target

[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=/opt/signet/bin/signet guard

[Install]
WantedBy=multi-user.target
";

/// Puts binary and unit below `root`, enabled; answers what was written. What is there already
/// is replaced whole.
///
/// # Errors
/// Names the file that cannot be written.
pub fn install(root: &Path) -> Result<Vec<PathBuf>, LifecycleError> {
    let own = Path::new("/proc/self/exe");
    let binary = root.join(BINARY);
    replace(&binary, 0o755, |beside| fs::copy(own, beside).map(drop))?;
    let unit = root.join(UNIT);
    replace(&unit, 0o644, |beside| fs::write(beside, UNIT_TEXT))?;
    let (wanted, target) = (root.join(WANTED.0), WANTED.1);
    if !fs::read_link(&wanted).is_ok_and(|found| found == Path::new(target)) {
        make_parent(&wanted)?;
        remove(&wanted)?;
        symlink(target, &wanted).map_err(failed("make", &wanted))?;
    }
    Ok(vec![binary, unit, wanted])
}

/// Removes what [`install`] put below `root`, with the directories that are empty then; answers
/// what was there.
///
/// # Errors
/// Names the file that cannot be removed.
pub fn uninstall(root: &Path) -> Result<Vec<PathBuf>, LifecycleError> {
    let mut removed = Vec::new();
    for path in [WANTED.0, UNIT, BINARY] {
        let path = root.join(path);
        if remove(&path)? {
            removed.push(path);
        }
    }
    // Ours alone; one that is a mount point or holds something stays.
    for directory in ["opt/signet/bin", "opt/signet"] {
        let _ = fs::remove_dir(root.join(directory));
    }
    Ok(removed)
}

/// Writes a file beside its place and renames it: a running copy goes on with the old one.
fn replace(
    path: &Path,
    mode: u32,
    write: impl FnOnce(&Path) -> io::Result<()>,
) -> Result<(), LifecycleError> {
    make_parent(path)?;
    let mut beside = path.as_os_str().to_owned();
    beside.push(".new");
    let beside = PathBuf::from(beside);
    let done = write(&beside)
        .and_then(|()| fs::set_permissions(&beside, fs::Permissions::from_mode(mode)))
        .and_then(|()| fs::rename(&beside, path));
    done.map_err(failed("write", path))
}

fn make_parent(path: &Path) -> Result<(), LifecycleError> {
    let Some(parent) = path.parent() else { return Ok(()) };
    fs::create_dir_all(parent).map_err(failed("make the directory", parent))
}

fn remove(path: &Path) -> Result<bool, LifecycleError> {
    match fs::remove_file(path) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(failed("remove", path)(error)),
    }
}

fn failed<'a>(
    action: &'static str,
    path: &'a Path,
) -> impl FnOnce(io::Error) -> LifecycleError + 'a {
    move |source| LifecycleError::Io { action, path: path.to_owned(), source }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_installed_is_enabled_and_goes_without_a_trace() {
        let root = tempfile::tempdir().unwrap();
        let units = root.path().join("etc/systemd/system");
        fs::create_dir_all(&units).unwrap();
        fs::write(units.join("kubelet.service"), "somebody else's").unwrap();
        // Twice is once.
        for _ in 0..2 {
            assert_eq!(install(root.path()).unwrap().len(), 3);
        }
        let own = fs::read("/proc/self/exe").unwrap();
        assert!(fs::read(root.path().join(BINARY)).unwrap() == own);
        let mode = fs::metadata(root.path().join(BINARY)).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o755);
        let through_link = fs::read_to_string(root.path().join(WANTED.0)).unwrap();
        assert_eq!(through_link, UNIT_TEXT);
        assert!(through_link.contains("ExecStart=/opt/signet/bin/signet guard\n"));

        assert_eq!(uninstall(root.path()).unwrap().len(), 3);
        assert!(!root.path().join("opt/signet").exists());
        assert!(units.join("kubelet.service").exists(), "others' units stay");
        assert!(uninstall(root.path()).unwrap().is_empty());
    }
}
