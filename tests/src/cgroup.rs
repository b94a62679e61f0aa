//! cgroup v2 directories: find the mount, make, kill, remove.

use std::{
    fs,
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};

/// Where cgroup v2 is mounted (hybrid hosts have it beside v1).
pub fn mount_point() -> Result<PathBuf> {
    let table = fs::read_to_string("/proc/self/mountinfo").context("/proc/self/mountinfo")?;
    for line in table.lines() {
        let Some((mount, kind)) = line.split_once(" - ") else { continue };
        if kind.split(' ').next() == Some("cgroup2")
            && let Some(path) = mount.split(' ').nth(4)
        {
            return Ok(PathBuf::from(path));
        }
    }
    bail!("no cgroup v2 hierarchy is mounted: mount -t cgroup2 none /sys/fs/cgroup")
}

/// Where the hierarchies of cgroup v1 are mounted, on a hybrid host.
pub fn other_hierarchies() -> Vec<PathBuf> {
    let table = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    table
        .lines()
        .filter_map(|line| line.split_once(" - "))
        .filter(|(_, kind)| kind.split(' ').next() == Some("cgroup"))
        .filter_map(|(mount, _)| mount.split(' ').nth(4))
        .map(PathBuf::from)
        .collect()
}

/// The path below the cgroup2 mount, with a leading slash, as the agent's flags want it.
pub fn path_below_mount(directory: &Path) -> Result<String> {
    let mount = mount_point()?;
    let below = directory
        .strip_prefix(&mount)
        .with_context(|| format!("{} is not below {}", directory.display(), mount.display()))?;
    Ok(format!("/{}", below.display()))
}

/// Makes the directory and its parents.
pub fn create(directory: &Path) -> Result<()> {
    fs::create_dir_all(directory)
        .with_context(|| format!("cannot make the cgroup {}", directory.display()))
}

/// The cgroup's id, as BPF programs see it: the directory's inode number.
pub fn id(directory: &Path) -> Result<u64> {
    use std::os::unix::fs::MetadataExt;
    Ok(fs::metadata(directory).with_context(|| directory.display().to_string())?.ino())
}

/// Pids in this cgroup itself (not below).
pub fn processes(directory: &Path) -> Vec<u32> {
    fs::read_to_string(directory.join("cgroup.procs"))
        .map(|list| list.lines().filter_map(|l| l.parse().ok()).collect())
        .unwrap_or_default()
}

/// The directories directly below.
pub fn children(directory: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    entries.filter(|e| e.file_type().is_ok_and(|t| t.is_dir())).map(|e| e.path()).collect()
}

/// Kills every process in the subtree and removes it.
pub fn kill_and_remove(directory: &Path) {
    if !directory.exists() {
        return;
    }
    // One write kills the whole subtree, also what forks meanwhile (5.14).
    let _ = fs::write(directory.join("cgroup.kill"), "1");
    let deadline = Instant::now() + Duration::from_secs(5);
    while !remove_tree(directory) && Instant::now() < deadline {
        thread::sleep(Duration::from_millis(5));
    }
}

/// The same, and removes it in the hierarchies of cgroup v1 as well, where a real runtime makes
/// the same directories.
pub fn kill_and_remove_everywhere(directory: &Path) {
    kill_and_remove(directory);
    let Ok(below) = path_below_mount(directory) else { return };
    for hierarchy in other_hierarchies() {
        remove_tree(&hierarchy.join(below.trim_start_matches('/')));
    }
}

/// Removes the subtree bottom up; false while processes hold it.
pub fn remove_tree(directory: &Path) -> bool {
    if let Ok(entries) = fs::read_dir(directory) {
        for entry in entries.flatten() {
            if entry.file_type().is_ok_and(|t| t.is_dir()) {
                remove_tree(&entry.path());
            }
        }
    }
    match fs::remove_dir(directory) {
        Ok(()) => true,
        Err(e) => e.kind() == std::io::ErrorKind::NotFound,
    }
}
