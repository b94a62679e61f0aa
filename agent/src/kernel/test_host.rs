//! A cgroup tree and a bpffs of its own, for tests over the real kernel.

use std::{
    fs,
    path::PathBuf,
    sync::{Mutex, MutexGuard, PoisonError},
};

use super::{KernelConfig, cgroup::Hierarchy};

/// Held by tests that look at or change the cgroup of the whole process.
static OWN_CGROUP: Mutex<()> = Mutex::new(());

/// Waits for the process's cgroup to be nobody else's affair.
pub(crate) fn lock_own_cgroup() -> MutexGuard<'static, ()> {
    OWN_CGROUP.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The tree, removed at the end. One at a time in a process.
pub(crate) struct Host {
    pub(crate) dir: tempfile::TempDir,
    pub(crate) cgroup: PathBuf,
    pub(crate) name: PathBuf,
    _own: MutexGuard<'static, ()>,
}

impl Host {
    /// `None` where the machine cannot: no root, no cgroup2.
    pub(crate) fn new(name: &str) -> Option<Self> {
        let own = lock_own_cgroup();
        if !rustix::process::geteuid().is_root() {
            return None;
        }
        let hierarchy = Hierarchy::find().ok()?;
        let name = PathBuf::from(format!("/signet-unit-{name}-{}", std::process::id()));
        let cgroup = hierarchy.mount().join(name.strip_prefix("/").ok()?);
        fs::create_dir_all(cgroup.join("kubepods")).ok()?;
        // The tests' own process stays where it is: outside, not above.
        Some(Self { dir: tempfile::tempdir().ok()?, cgroup, name, _own: own })
    }

    pub(crate) fn config(&self) -> KernelConfig {
        KernelConfig {
            bpffs: self.dir.path().join("bpf"),
            instance: "default".into(),
            workloads: self.name.join("kubepods"),
            node: self.name.clone(),
            mask_features: None,
            succeeds: false,
        }
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        let _ = rustix::mount::unmount(
            self.dir.path().join("bpf/default"),
            rustix::mount::UnmountFlags::DETACH,
        );
        // The process may have moved into this tree: back to the root, then remove.
        if let Ok(h) = Hierarchy::find() {
            let _ = fs::write(h.mount().join("cgroup.procs"), std::process::id().to_string());
        }
        for dir in ["kubepods", "signet-agent", ""] {
            let _ = fs::remove_dir(self.cgroup.join(dir));
        }
    }
}
