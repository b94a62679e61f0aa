//! Tells when the configuration file may have changed.

use std::{path::Path, sync::Arc, time::Duration};

use notify::{EventKind, RecommendedWatcher, RecursiveMode, Watcher as _};
use tokio::sync::Notify;

/// Editors write a file in several steps, and a ConfigMap's symlink is swapped in two.
const QUIET: Duration = Duration::from_millis(200);

/// Watches the file's directory: a file that is replaced by a rename, or a symlink that is
/// swapped, is another inode each time.
pub struct FileChanges {
    changed: Arc<Notify>,
    /// `None` without a file, and where it cannot be watched.
    _watcher: Option<RecommendedWatcher>,
}

impl FileChanges {
    /// Of `file`; without one nothing ever changes. A directory that cannot be watched is
    /// reported: SIGHUP still makes the agent read again.
    pub fn of(file: Option<&Path>) -> Self {
        let changed = Arc::new(Notify::new());
        let watcher = file.and_then(|file| {
            watch(file, changed.clone())
                .inspect_err(|error| {
                    tracing::warn!(
                        file = %file.display(),
                        %error,
                        "the configuration file is not watched: send SIGHUP after a change"
                    );
                })
                .ok()
        });
        Self { changed, _watcher: watcher }
    }

    /// Waits until something happened in the directory since the last call, and then until
    /// it is quiet.
    pub async fn changed(&self) {
        self.changed.notified().await;
        while tokio::time::timeout(QUIET, self.changed.notified()).await.is_ok() {}
    }
}

fn watch(file: &Path, changed: Arc<Notify>) -> notify::Result<RecommendedWatcher> {
    let mut watcher = notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
        // Reading it is an event too. An error may have swallowed one.
        if event.map_or(true, |event| !matches!(event.kind, EventKind::Access(_))) {
            changed.notify_one();
        }
    })?;
    let directory = match file.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    watcher.watch(directory, RecursiveMode::NonRecursive)?;
    Ok(watcher)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{fs, os::unix::fs::symlink};
    use tokio::time::timeout;

    const SOON: Duration = Duration::from_secs(10);

    #[tokio::test]
    async fn writes_renames_and_swapped_symlinks_are_told() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("agent.yaml");
        fs::write(&file, "a").unwrap();
        let changes = FileChanges::of(Some(&file));
        let quiet = timeout(QUIET * 2, changes.changed()).await;
        assert!(quiet.is_err(), "nothing happened");
        fs::write(&file, "b").unwrap();
        timeout(SOON, changes.changed()).await.expect("a write");
        fs::write(dir.path().join("new"), "c").unwrap();
        fs::rename(dir.path().join("new"), &file).unwrap();
        timeout(SOON, changes.changed()).await.expect("a rename");
        // As a kubelet updates a ConfigMap's volume.
        symlink("..one", dir.path().join("..data_tmp")).unwrap();
        fs::rename(dir.path().join("..data_tmp"), dir.path().join("..data")).unwrap();
        timeout(SOON, changes.changed()).await.expect("a swapped symlink");
        let _ = fs::read(&file).unwrap();
        let quiet = timeout(QUIET * 2, changes.changed()).await;
        assert!(quiet.is_err(), "reading is no change");
    }

    #[tokio::test]
    async fn without_a_file_nothing_changes() {
        for file in [None, Some(Path::new("/no/such/dir/agent.yaml"))] {
            let changes = FileChanges::of(file);
            assert!(timeout(QUIET, changes.changed()).await.is_err());
        }
    }
}
