//! Tells when a directory is made below the workloads root: a hint to look at once.
//!
//! Polling finds everything without it, at most 20 ms later.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use notify::{EventKind, RecommendedWatcher, RecursiveMode, Watcher as _};
use tokio::sync::Notify;

/// Watches the workloads root and the directories of the QoS classes.
pub(super) struct DirectoryWatcher {
    root: PathBuf,
    made: Arc<Notify>,
    /// `None` where inotify cannot be used: polling goes on.
    watcher: Option<RecommendedWatcher>,
}

impl DirectoryWatcher {
    pub(super) fn new(root: &Path) -> Self {
        let made = Arc::new(Notify::new());
        let notify = made.clone();
        let watcher = notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
            if event.is_ok_and(|event| matches!(event.kind, EventKind::Create(_))) {
                notify.notify_one();
            }
        });
        let watcher = watcher.inspect_err(|error| {
            tracing::warn!(%error, "cgroup directories are polled, not watched");
        });
        let mut this = Self { root: root.to_owned(), made, watcher: watcher.ok() };
        this.watch();
        this
    }

    /// Waits until a directory was made since the last call.
    pub(super) async fn made(&mut self) {
        self.made.notified().await;
        // It may be a class's own directory.
        self.watch();
    }

    fn watch(&mut self) {
        let Some(watcher) = &mut self.watcher else { return };
        let classes = std::fs::read_dir(&self.root)
            .into_iter()
            .flatten()
            .flatten()
            .map(|entry| entry.path())
            .filter(|path| is_class(path));
        for path in std::iter::once(self.root.clone()).chain(classes) {
            // Watching twice is once; a directory that went meanwhile needs no watch.
            let _ = watcher.watch(&path, RecursiveMode::NonRecursive);
        }
    }
}

/// True for the directory of a QoS class, of either driver.
fn is_class(path: &Path) -> bool {
    let name = path.file_name().and_then(|name| name.to_str()).unwrap_or("");
    let name = name.strip_suffix(".slice").unwrap_or(name);
    name.ends_with("burstable") || name.ends_with("besteffort")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn classes_of_both_drivers() {
        for (name, class) in [
            ("burstable", true),
            ("kubepods-besteffort.slice", true),
            ("podburst", false),
            ("pod3f1c", false),
        ] {
            assert_eq!(is_class(&Path::new("/kubepods").join(name)), class, "{name}");
        }
    }

    #[tokio::test]
    async fn a_pod_directory_in_a_new_class_is_told() {
        let dir = tempfile::tempdir().unwrap();
        let mut watcher = DirectoryWatcher::new(dir.path());
        if watcher.watcher.is_none() {
            return;
        }
        std::fs::create_dir(dir.path().join("burstable")).unwrap();
        let second = std::time::Duration::from_secs(5);
        tokio::time::timeout(second, watcher.made()).await.expect("the class is told");
        std::fs::create_dir(dir.path().join("burstable/pod1")).unwrap();
        tokio::time::timeout(second, watcher.made()).await.expect("the pod is told");
    }
}
