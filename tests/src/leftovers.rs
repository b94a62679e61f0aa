//! Names of a lab's parts, and the removal of what dead runs left behind.
//!
//! Every part (network namespace, cgroup, directory, mount) carries the lab's id, and the id
//! carries the pid and the start time of the process that made it: a later run knows for
//! certain whether the maker still lives.

use std::{
    fmt, fs,
    path::{Path, PathBuf},
    sync::atomic::{AtomicU32, Ordering},
};

use anyhow::{Context, Result};
use rustix::mount::UnmountFlags;

use crate::{cgroup, netns};

const PREFIX: &str = "signet-lab-";

/// A lab's unique name: `signet-lab-<pid>-<start time>-<count in this process>`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct LabId(String);

impl LabId {
    /// A name that no other lab on this machine has.
    pub fn new() -> Result<Self> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let pid = std::process::id();
        let start = start_time(pid).context("the start time of this process")?;
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        Ok(Self(format!("{PREFIX}{pid}-{start}-{count}")))
    }

    /// The name.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Where the lab keeps its files. Unix socket paths are short, so is this.
    pub fn directory(&self) -> PathBuf {
        base_directory().join(&self.0)
    }
}

impl fmt::Display for LabId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The directory that holds the labs' directories.
pub fn base_directory() -> PathBuf {
    std::env::var_os("SIGNET_LAB_DIR").map_or_else(|| PathBuf::from("/tmp"), PathBuf::from)
}

/// Removes every lab whose maker is dead (killed before it could tidy up, or told to keep).
///
/// A lab that was kept deliberately carries a `keep` file and stays until `sweep(true)`.
/// Returns the names of the labs that were removed.
pub fn sweep(also_kept: bool) -> Result<Vec<String>> {
    let mut removed = Vec::new();
    for name in labs_seen()? {
        if maker_lives(&name) {
            continue;
        }
        if !also_kept && base_directory().join(&name).join("keep").exists() {
            continue;
        }
        remove(&name);
        removed.push(name);
    }
    Ok(removed)
}

/// Removes every part of the lab called `name`; what is gone already is no error.
pub fn remove(name: &str) {
    // Processes first: nothing else can be removed while they use it.
    if let Ok(root) = cgroup::mount_point() {
        cgroup::kill_and_remove(&root.join(name));
    }
    // A real runtime makes its cgroups in every hierarchy of a hybrid host.
    for hierarchy in cgroup::other_hierarchies() {
        cgroup::remove_tree(&hierarchy.join(name));
    }
    let directory = base_directory().join(name);
    for mount in mounts_below(&directory) {
        if mount.ends_with("bpffs") {
            // A copied mount namespace would keep the file system and with it the pins alive.
            remove_files_below(&mount);
        }
        let _ = rustix::mount::unmount(&mount, UnmountFlags::DETACH);
    }
    for ns in netns::named_with_prefix(name) {
        netns::delete(&ns);
    }
    let _ = fs::remove_dir_all(&directory);
}

/// Names of all labs of which some part exists.
fn labs_seen() -> Result<Vec<String>> {
    let mut names: Vec<String> = Vec::new();
    let mut note = |name: &str| {
        if let Some(lab) = lab_of(name)
            && !names.contains(&lab)
        {
            names.push(lab);
        }
    };
    for directory in [base_directory(), cgroup::mount_point()?, PathBuf::from(netns::DIRECTORY)] {
        let Ok(entries) = fs::read_dir(&directory) else { continue };
        for entry in entries.flatten() {
            note(&entry.file_name().to_string_lossy());
        }
    }
    Ok(names)
}

/// The lab that a part's name belongs to.
fn lab_of(part: &str) -> Option<String> {
    let rest = part.strip_prefix(PREFIX)?;
    let mut fields = rest.splitn(4, '-');
    let (pid, start, count) = (fields.next()?, fields.next()?, fields.next()?);
    let numeric = |s: &str| !s.is_empty() && s.bytes().all(|b| b.is_ascii_digit());
    (numeric(pid) && numeric(start) && numeric(count))
        .then(|| format!("{PREFIX}{pid}-{start}-{count}"))
}

fn maker_lives(lab: &str) -> bool {
    let mut fields = lab.trim_start_matches(PREFIX).split('-');
    let (Some(pid), Some(start)) = (fields.next(), fields.next()) else { return true };
    let Ok(pid) = pid.parse() else { return true };
    start_time(pid).is_some_and(|now| now.to_string() == start)
}

/// Field 22 of `/proc/<pid>/stat`: clock ticks between boot and the process's start.
fn start_time(pid: u32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The command's name may hold spaces and parentheses: count from its end.
    stat.rsplit_once(')')?.1.split_whitespace().nth(19)?.parse().ok()
}

/// Mount points below `directory`, deepest first.
fn mounts_below(directory: &Path) -> Vec<PathBuf> {
    let Ok(table) = fs::read_to_string("/proc/self/mountinfo") else { return Vec::new() };
    let mut found: Vec<PathBuf> = table
        .lines()
        .filter_map(|line| line.split(' ').nth(4))
        .map(PathBuf::from)
        .filter(|mount| mount.starts_with(directory))
        .collect();
    found.sort_by_key(|mount| std::cmp::Reverse(mount.components().count()));
    found
}

/// Unlinks files and directories below `directory`, not itself.
fn remove_files_below(directory: &Path) {
    let Ok(entries) = fs::read_dir(directory) else { return };
    for entry in entries.flatten() {
        let path = entry.path();
        if entry.file_type().is_ok_and(|t| t.is_dir()) {
            remove_files_below(&path);
            let _ = fs::remove_dir(&path);
        } else {
            let _ = fs::remove_file(&path);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_name_their_lab_and_strangers_do_not() {
        assert_eq!(lab_of("signet-lab-12-345-0"), Some("signet-lab-12-345-0".into()));
        assert_eq!(lab_of("signet-lab-12-345-0-node-1"), Some("signet-lab-12-345-0".into()));
        assert_eq!(lab_of("signet-lab-12-x-0"), None);
        assert_eq!(lab_of("signet-lab-12-345"), None);
        assert_eq!(lab_of("somebody-else"), None);
    }

    #[test]
    fn this_process_lives_and_one_with_another_start_time_does_not() {
        let own = LabId::new().unwrap();
        assert!(maker_lives(own.as_str()));
        let pid = std::process::id();
        assert!(!maker_lives(&format!("{PREFIX}{pid}-1-0")));
    }
}
