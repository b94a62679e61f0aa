//! The cgroup2 hierarchy: where it is mounted, which directories are whose, and the agent's
//! own place in it.

use std::{
    fs::{self, File},
    io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use super::{KernelError, bpf};

/// Name of the directory that the agent makes for itself beside the workloads root.
const AGENT_DIR: &str = "signet-agent";

/// How deep cgroups are looked for; the kernel's programs look no deeper.
const MAX_LEVEL: u32 = 64;

/// The mounted cgroup2 hierarchy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hierarchy {
    /// Where it is mounted.
    mount: PathBuf,
    /// Which part of the hierarchy (as this cgroup namespace names it) the mount shows.
    shown: PathBuf,
}

/// A directory of the hierarchy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cgroup {
    /// Its path below the mount, with a leading slash.
    pub name: PathBuf,
    /// Where that is in the file system.
    pub path: PathBuf,
    /// Its id: what the programs see.
    pub id: u64,
}

impl Hierarchy {
    /// Finds the mount in `/proc/self/mountinfo`.
    ///
    /// # Errors
    /// [`KernelError::NoCgroup2`] where cgroup2 is not mounted.
    pub fn find() -> Result<Self, KernelError> {
        let table = fs::read_to_string("/proc/self/mountinfo")
            .map_err(|source| KernelError::Io { what: "/proc/self/mountinfo".into(), source })?;
        Self::parse(&table).ok_or(KernelError::NoCgroup2)
    }

    /// The mount that shows most of the hierarchy, the first of equals.
    fn parse(mountinfo: &str) -> Option<Self> {
        let mut found: Option<Self> = None;
        for line in mountinfo.lines() {
            // 41 31 0:38 /root /mount/point options - cgroup2 source options
            let Some((left, right)) = line.split_once(" - ") else { continue };
            if right.split(' ').next() != Some("cgroup2") {
                continue;
            }
            let mut fields = left.split(' ').skip(3);
            let (Some(shown), Some(mount)) = (fields.next(), fields.next()) else { continue };
            let candidate = Self { mount: unescape(mount), shown: unescape(shown) };
            let better = found.as_ref().is_none_or(|f| {
                candidate.shown.components().count() < f.shown.components().count()
            });
            if better {
                found = Some(candidate);
            }
        }
        found
    }

    /// Where it is mounted.
    pub fn mount(&self) -> &Path {
        &self.mount
    }

    /// The directory `name`, a path below the mount (a leading slash changes nothing).
    ///
    /// # Errors
    /// Of the file system: above all "not found".
    pub fn open(&self, name: &Path) -> io::Result<Cgroup> {
        let name = Path::new("/").join(name);
        let path = self.join(&name);
        let metadata = fs::metadata(&path)?;
        if !metadata.is_dir() {
            return Err(io::ErrorKind::NotADirectory.into());
        }
        Ok(Cgroup { name, path, id: metadata.ino() })
    }

    fn join(&self, name: &Path) -> PathBuf {
        match name.strip_prefix("/") {
            Ok(relative) => self.mount.join(relative),
            Err(_) => self.mount.join(name),
        }
    }

    /// The cgroup of a process as its `/proc/<pid>/cgroup` says, below this mount; `None`
    /// when it is outside what the mount or the cgroup namespace shows.
    pub fn of_process(&self, proc_cgroup: &str) -> Option<PathBuf> {
        let path = proc_cgroup.lines().find_map(|line| line.strip_prefix("0::"))?;
        let path = Path::new(path.strip_suffix(" (deleted)").unwrap_or(path));
        if path.components().any(|c| c == std::path::Component::ParentDir) {
            return None;
        }
        let below = path.strip_prefix(&self.shown).ok()?;
        Some(Path::new("/").join(below))
    }

    /// This process's cgroup.
    ///
    /// # Errors
    /// Where it is not below the mount.
    pub fn own(&self) -> Result<Cgroup, KernelError> {
        let text = fs::read_to_string("/proc/self/cgroup")
            .map_err(|source| KernelError::Io { what: "/proc/self/cgroup".into(), source })?;
        let name = self.of_process(&text).ok_or_else(|| KernelError::OwnCgroupHidden {
            mount: self.mount.clone(),
            line: text.lines().find(|l| l.starts_with("0::")).unwrap_or("").to_owned(),
        })?;
        self.open(&name).map_err(|source| KernelError::Io {
            what: self.join(&name).display().to_string(),
            source,
        })
    }

    /// The agent's own cgroup: apart from the workloads, and not above them.
    ///
    /// Which programs a socket meets is settled by its cgroup when it is made, so this is
    /// called before the agent makes any. If the agent sits at, in or above the workloads
    /// root, it moves itself to `signet-agent` beside that root.
    ///
    /// # Errors
    /// Where it cannot move.
    pub fn settle_agent(&self, workloads: &Cgroup) -> Result<Cgroup, KernelError> {
        let own = self.own()?;
        if !own.name.starts_with(&workloads.name) && !workloads.name.starts_with(&own.name) {
            return Ok(own);
        }
        let Some(parent) = workloads.name.parent() else {
            return Err(KernelError::WorkloadsIsRoot { root: workloads.path.clone() });
        };
        let name = parent.join(AGENT_DIR);
        let path = self.join(&name);
        let cannot =
            |source| KernelError::CannotMove { from: own.path.clone(), to: path.clone(), source };
        match fs::create_dir(&path) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                return Err(cannot(error));
            }
            _ => {}
        }
        fs::write(path.join("cgroup.procs"), std::process::id().to_string()).map_err(cannot)?;
        tracing::info!(from = %own.path.display(), to = %path.display(), "the agent moved to a cgroup of its own");
        self.open(&name).map_err(cannot)
    }

    /// Where the agent makes a directory for itself beside a workloads root, if it does
    /// ([`Self::settle_agent`]).
    pub fn agents_own(&self, workloads: &Path) -> Option<PathBuf> {
        Some(self.join(&Path::new("/").join(workloads).parent()?.join(AGENT_DIR)))
    }

    /// The ancestor level of `cgroup` as the programs count (the real root is 0).
    ///
    /// A program is asked for this process's ancestors; the mount's top directory or the
    /// nearest directory that both share says how much a cgroup namespace hides. Where the
    /// kernel cannot say (before 5.14), nothing is taken to be hidden.
    pub fn level(&self, cgroup: &Cgroup) -> u32 {
        let own = self.own().ok().map(|own| own.name);
        for shared in cgroup
            .name
            .ancestors()
            .filter(|shared| own.as_ref().is_some_and(|own| own.starts_with(shared)))
        {
            let Ok(directory) = self.open(shared) else { continue };
            for level in 0..MAX_LEVEL {
                match bpf::own_ancestor_cgroup(level) {
                    Ok(id) if id == directory.id => {
                        return level + depth(&cgroup.name) - depth(shared);
                    }
                    Ok(0) | Err(_) => break,
                    Ok(_) => {}
                }
            }
        }
        depth(&cgroup.name)
    }
}

impl Cgroup {
    /// Opens the directory, to attach to.
    pub(super) fn descriptor(&self) -> Result<File, KernelError> {
        File::open(&self.path)
            .map_err(|source| KernelError::Io { what: self.path.display().to_string(), source })
    }

    /// True when `other` is this directory or below it.
    pub fn contains(&self, other: &Path) -> bool {
        other.starts_with(&self.name)
    }
}

/// How many directories `name` is below the mount.
fn depth(name: &Path) -> u32 {
    name.components().filter(|c| matches!(c, std::path::Component::Normal(_))).count() as u32
}

/// Decodes mountinfo's octal escapes (`\040` for a space).
fn unescape(field: &str) -> PathBuf {
    let bytes = field.as_bytes();
    let mut out = Vec::with_capacity(bytes.len());
    let mut i = 0;
    while i < bytes.len() {
        let escape = (bytes[i] == b'\\').then(|| field.get(i + 1..i + 4)).flatten();
        match escape.and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
            Some(byte) => {
                out.push(byte);
                i += 4;
            }
            None => {
                out.push(bytes[i]);
                i += 1;
            }
        }
    }
    PathBuf::from(std::ffi::OsString::from(String::from_utf8_lossy(&out).into_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    const HYBRID: &str = "\
31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755
32 31 0:29 / /sys/fs/cgroup/cpu rw,relatime - cgroup cgroup rw,cpu
41 31 0:38 / /sys/fs/cgroup/unified rw,relatime shared:7 - cgroup2 cgroup2 rw
";

    #[test]
    fn finds_the_mount_on_a_hybrid_host() {
        let h = Hierarchy::parse(HYBRID).unwrap();
        assert_eq!(h.mount(), Path::new("/sys/fs/cgroup/unified"));
        assert_eq!(h.of_process("5:cpu:/x\n0::/a/b\n"), Some("/a/b".into()));
        assert_eq!(h.of_process("0::/a/b (deleted)\n"), Some("/a/b".into()));
    }

    #[test]
    fn no_cgroup2_is_told_apart() {
        let v1 = HYBRID.lines().take(2).collect::<Vec<_>>().join("\n");
        assert_eq!(Hierarchy::parse(&v1), None);
    }

    #[test]
    fn a_part_that_is_mounted_elsewhere_does_not_win() {
        let table = "\
50 23 0:38 /docker/1 /mnt/my\\040part rw - cgroup2 cgroup2 rw
51 23 0:38 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw
";
        assert_eq!(Hierarchy::parse(table).unwrap().mount(), Path::new("/sys/fs/cgroup"));
        let part = Hierarchy::parse(table.lines().next().unwrap()).unwrap();
        assert_eq!(part.mount(), Path::new("/mnt/my part"));
        assert_eq!(part.of_process("0::/docker/1/kubepods\n"), Some("/kubepods".into()));
        assert_eq!(part.of_process("0::/elsewhere\n"), None);
        assert_eq!(part.of_process("0::/../../host\n"), None);
    }

    #[test]
    fn levels_count_from_the_real_root() {
        let _own = super::super::test_host::lock_own_cgroup();
        if !rustix::process::geteuid().is_root() {
            return;
        }
        let Ok(h) = Hierarchy::find() else { return };
        let Ok(own) = h.own() else { return };
        let level = h.level(&own);
        assert_eq!(bpf::own_ancestor_cgroup(level).unwrap(), own.id);
        assert_eq!(bpf::own_ancestor_cgroup(level + 1).unwrap(), 0);
    }
}
