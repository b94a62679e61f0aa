//! Finding this node's pods where they really are: cgroup directory, network namespace,
//! addresses. Nothing tells the agent but cgroupfs, /proc and rtnetlink.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    ffi::OsStr,
    fs::{self, File},
    io,
    net::IpAddr,
    os::{
        fd::{AsFd, OwnedFd},
        unix::fs::MetadataExt,
    },
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use crate::{
    cluster::model::{Pod, PodUid},
    kernel::cgroup::{Cgroup, Hierarchy},
    netns::{self, NetnsFd, NetnsOpener, addresses, links},
};

/// How often a found pod is looked at again.
const CHECK_EVERY: Duration = Duration::from_millis(500);
/// A pod's addresses may still be coming for so long: dual-stack ones come one by one.
const ADDRESSES_SETTLE: Duration = Duration::from_secs(10);
/// How often addresses are read meanwhile.
const ADDRESSES_EVERY: Duration = Duration::from_millis(200);
/// How often they are read afterwards.
const ADDRESSES_LATER: Duration = Duration::from_secs(2);
/// Containers' directories are one level below the pod's; init systems may add some.
const PROCESS_DEPTH: usize = 4;

/// A pod that was found.
#[derive(Debug)]
pub struct Found {
    /// Its network namespace.
    pub netns: Arc<NetnsFd>,
    /// Its cgroup directory.
    pub cgroup: Cgroup,
    /// Its addresses of global scope; never empty.
    pub addresses: Vec<IpAddr>,
    /// Its addresses of link scope.
    pub link_local: Vec<IpAddr>,
    /// The node's ends of its links: interface numbers. Empty where no veth leads to it.
    pub host_ends: Vec<u32>,
    /// When it was found.
    pub since: jiff::Timestamp,
    found_at: Instant,
    checked: Instant,
    read: Instant,
    inode: (u64, u64),
    anchor: Process,
    route: OwnedFd,
}

/// A process that is known to be in a pod.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Process {
    pid: u32,
    /// Clock ticks since boot: tells two processes of one pid apart.
    started: u64,
}

/// Looks for pods and keeps what it found.
pub struct Discovery {
    hierarchy: Hierarchy,
    workloads: Cgroup,
    host: Arc<NetnsFd>,
    host_inode: (u64, u64),
    opener: NetnsOpener,
    found: HashMap<PodUid, Found>,
    missing: BTreeMap<PodUid, String>,
}

impl Discovery {
    /// Looks below `workloads`.
    ///
    /// # Errors
    /// Where the node's own network namespace cannot be opened.
    pub fn new(hierarchy: Hierarchy, workloads: Cgroup, opener: NetnsOpener) -> io::Result<Self> {
        let host = Arc::new(NetnsFd::of_this_process()?);
        let host_inode = host.inode()?;
        Ok(Self {
            hierarchy,
            workloads,
            host,
            host_inode,
            opener,
            found: HashMap::new(),
            missing: BTreeMap::new(),
        })
    }

    /// The pods that were found.
    pub fn found(&self) -> &HashMap<PodUid, Found> {
        &self.found
    }

    /// The pods that were not found, and what is missing.
    pub fn missing(&self) -> &BTreeMap<PodUid, String> {
        &self.missing
    }

    /// Cgroup ids of every directory where a pod's may be.
    pub fn pod_directories(&self) -> HashSet<u64> {
        let children = |path: &Path| -> Vec<fs::DirEntry> {
            fs::read_dir(path).into_iter().flatten().flatten().collect()
        };
        let mut ids = HashSet::new();
        for entry in children(&self.workloads.path) {
            ids.extend(entry.metadata().map(|m| m.ino()));
            for below in children(&entry.path()) {
                ids.extend(below.metadata().map(|m| m.ino()));
            }
        }
        ids
    }

    /// Looks for those of `pods` that are not found, and after those that are. Returns true
    /// when something changed.
    pub async fn poll(&mut self, pods: &[Arc<Pod>], now: Instant) -> bool {
        let mut changed = self.forget_all_but(pods);
        for pod in pods {
            changed |= match self.found.remove(&pod.uid) {
                Some(found) => self.look_after(pod, found, now).await,
                None => self.look_for(pod, now).await,
            };
        }
        changed
    }

    fn forget_all_but(&mut self, pods: &[Arc<Pod>]) -> bool {
        let wanted: HashSet<&PodUid> = pods.iter().map(|pod| &pod.uid).collect();
        let before = self.found.len() + self.missing.len();
        self.found.retain(|uid, _| wanted.contains(uid));
        self.missing.retain(|uid, _| wanted.contains(uid));
        before != self.found.len() + self.missing.len()
    }

    async fn look_for(&mut self, pod: &Pod, now: Instant) -> bool {
        match self.find(&pod.uid, now).await {
            Ok(found) => {
                tracing::info!(
                    pod = %format_args!("{}/{}", pod.name.namespace, pod.name.name),
                    cgroup = %found.cgroup.path.display(),
                    netns = found.netns.cookie,
                    addresses = ?found.addresses,
                    "found a pod"
                );
                self.missing.remove(&pod.uid);
                self.found.insert(pod.uid.clone(), found);
                true
            }
            Err(reason) => self.miss(&pod.uid, reason),
        }
    }

    fn miss(&mut self, uid: &PodUid, reason: String) -> bool {
        if self.missing.get(uid) == Some(&reason) {
            return false;
        }
        self.missing.insert(uid.clone(), reason);
        true
    }

    /// Checks a found pod from time to time; true when it changed or went.
    async fn look_after(&mut self, pod: &Pod, mut found: Found, now: Instant) -> bool {
        if now.duration_since(found.checked) >= CHECK_EVERY {
            found.checked = now;
            if let Err(reason) = self.is_still(&mut found) {
                tracing::info!(
                    pod = %format_args!("{}/{}", pod.name.namespace, pod.name.name),
                    %reason,
                    "a pod is gone or was made anew"
                );
                // Its new sandbox, if there is one, is another endpoint.
                self.miss(&pod.uid, reason);
                return true;
            }
        }
        let settled = now.duration_since(found.found_at) > ADDRESSES_SETTLE;
        let every = if settled { ADDRESSES_LATER } else { ADDRESSES_EVERY };
        let mut changed = false;
        if now.duration_since(found.read) >= every {
            found.read = now;
            // Without any, the last ones stay: the interface may be between two states, and
            // an endpoint without addresses would be no endpoint.
            if let Ok(addresses) = addresses::read(found.route.as_fd())
                && !addresses.global.is_empty()
            {
                changed |= addresses.global != found.addresses;
                changed |= addresses.link_local != found.link_local;
                found.addresses = addresses.global;
                found.link_local = addresses.link_local;
            }
            if found.host_ends.is_empty() {
                found.host_ends = self.host_ends(&found.netns).await;
                changed |= !found.host_ends.is_empty();
            }
        }
        self.found.insert(pod.uid.clone(), found);
        changed
    }

    fn is_still(&self, found: &mut Found) -> Result<(), String> {
        let metadata = fs::metadata(&found.cgroup.path);
        if !metadata.is_ok_and(|m| m.ino() == found.cgroup.id) {
            return Err(format!("its cgroup {} is gone", found.cgroup.path.display()));
        }
        if netns_of(found.anchor).is_ok_and(|(_, inode)| inode == found.inode) {
            return Ok(());
        }
        // The process that was asked is gone: another of the same sandbox will do.
        match self.sandbox(&found.cgroup) {
            Ok((process, _, inode)) if inode == found.inode => {
                found.anchor = process;
                Ok(())
            }
            Ok(_) => Err("its sandbox was made anew".into()),
            Err(reason) => Err(reason),
        }
    }

    /// Finds everything of a pod, or says what is missing.
    async fn find(&self, uid: &str, now: Instant) -> Result<Found, String> {
        let cgroup = self.directory(uid).ok_or_else(|| {
            format!(
                "no cgroup for uid {uid}: is --cgroup-root right? (looked in {})",
                self.workloads.name.display()
            )
        })?;
        let (anchor, fd, inode) = self.sandbox(&cgroup)?;
        if let Some((other, _)) = self.found.iter().find(|(_, f)| f.inode == inode) {
            return Err(format!("its network namespace is the one of the pod with uid {other}"));
        }
        let netns = self
            .opener
            .adopt(fd)
            .await
            .map_err(|error| format!("its network namespace cannot be entered: {error}"))?;
        let netns = Arc::new(netns);
        let unreadable =
            |error| format!("the addresses in its network namespace cannot be read: {error}");
        let route = self.opener.netlink(&netns, ROUTE).await.map_err(unreadable)?;
        let addresses = addresses::read(route.as_fd()).map_err(unreadable)?;
        if addresses.global.is_empty() {
            return Err("its network namespace has no address of global scope yet".into());
        }
        let host_ends = self.host_ends(&netns).await;
        Ok(Found {
            netns,
            cgroup,
            addresses: addresses.global,
            link_local: addresses.link_local,
            host_ends,
            since: jiff::Timestamp::now(),
            found_at: now,
            checked: now,
            read: now,
            inode,
            anchor,
            route,
        })
    }

    /// The node's ends of a pod's links; none where they cannot be read, which is tried again.
    async fn host_ends(&self, netns: &NetnsFd) -> Vec<u32> {
        let ends = match self.opener.netlink(&self.host, ROUTE).await {
            Ok(socket) => links::host_ends(socket.as_fd(), netns.fd.as_fd()),
            Err(error) => Err(error),
        };
        ends.unwrap_or_else(|error| {
            tracing::warn!(netns = netns.cookie, %error, "the node's links cannot be read");
            Vec::new()
        })
    }

    fn directory(&self, uid: &str) -> Option<Cgroup> {
        candidates(&self.workloads.name, uid)
            .into_iter()
            .find_map(|name| self.hierarchy.open(&name).ok())
    }

    /// The pod's oldest process that is not in the node's network namespace: the sandbox's
    /// own. A container may make more namespaces, never an earlier process.
    fn sandbox(&self, cgroup: &Cgroup) -> Result<(Process, OwnedFd, (u64, u64)), String> {
        let mut processes: Vec<Process> = processes(&cgroup.path, PROCESS_DEPTH)
            .into_iter()
            .filter_map(|pid| Some(Process { pid, started: started(pid)? }))
            .collect();
        processes.sort_by_key(|process| process.started);
        if processes.is_empty() {
            return Err(format!("its cgroup {} has no process yet", cgroup.path.display()));
        }
        for process in processes {
            let Ok((fd, inode)) = netns_of(process) else { continue };
            // Both were read after the pid: a pid that was taken over is in another cgroup.
            if inode != self.host_inode && self.is_in(process, cgroup) {
                return Ok((process, fd, inode));
            }
        }
        Err("its processes are still in the node's network namespace".into())
    }

    fn is_in(&self, process: Process, cgroup: &Cgroup) -> bool {
        fs::read_to_string(format!("/proc/{}/cgroup", process.pid))
            .ok()
            .and_then(|text| self.hierarchy.of_process(&text))
            .is_some_and(|name| cgroup.contains(&name))
    }
}

/// `NETLINK_ROUTE`.
const ROUTE: isize = 0;

/// Where a kubelet may have made the directory of the pod `uid`, by cgroup driver and QoS
/// class: cgroupfs's `burstable/pod<uid>`, systemd's
/// `kubepods-burstable.slice/kubepods-burstable-pod<uid with _>.slice`.
fn candidates(workloads: &Path, uid: &str) -> Vec<PathBuf> {
    if uid.is_empty() || uid.contains('/') {
        return Vec::new();
    }
    let mut names = Vec::with_capacity(6);
    for class in ["", "burstable", "besteffort"] {
        names.push(workloads.join(class).join(format!("pod{uid}")));
    }
    let slice = workloads.file_name().and_then(OsStr::to_str).unwrap_or("");
    if let Some(stem) = slice.strip_suffix(".slice") {
        let uid = uid.replace('-', "_");
        names.push(workloads.join(format!("{stem}-pod{uid}.slice")));
        for class in ["burstable", "besteffort"] {
            let parent = workloads.join(format!("{stem}-{class}.slice"));
            names.push(parent.join(format!("{stem}-{class}-pod{uid}.slice")));
        }
    }
    names
}

/// The processes in a cgroup directory and below. Those that this pid namespace does not
/// show are left out.
fn processes(directory: &Path, depth: usize) -> Vec<u32> {
    let mut found: Vec<u32> = fs::read_to_string(directory.join("cgroup.procs"))
        .unwrap_or_default()
        .lines()
        .filter_map(|line| line.parse().ok())
        .filter(|pid| *pid != 0)
        .collect();
    if depth > 0 {
        for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                found.extend(processes(&entry.path(), depth - 1));
            }
        }
    }
    found
}

/// When a process started, in clock ticks since boot.
fn started(pid: u32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    start_time(&stat)
}

/// Field 22 of `/proc/<pid>/stat`. The name in parentheses may hold anything, also
/// parentheses and spaces, so fields are counted from the last one.
fn start_time(stat: &str) -> Option<u64> {
    let (_, fields) = stat.rsplit_once(") ")?;
    fields.split(' ').nth(19)?.parse().ok()
}

/// A process's network namespace, if it is still that process.
fn netns_of(process: Process) -> io::Result<(OwnedFd, (u64, u64))> {
    let fd = OwnedFd::from(File::open(format!("/proc/{}/ns/net", process.pid))?);
    if started(process.pid) != Some(process.started) {
        return Err(io::ErrorKind::NotFound.into());
    }
    let inode = netns::inode(fd.as_fd())?;
    Ok((fd, inode))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_drivers_and_all_classes_are_candidates() {
        let uid = "3f1c-22";
        let all = candidates(Path::new("/node/kubepods.slice"), uid);
        for wanted in [
            "/node/kubepods.slice/pod3f1c-22",
            "/node/kubepods.slice/burstable/pod3f1c-22",
            "/node/kubepods.slice/besteffort/pod3f1c-22",
            "/node/kubepods.slice/kubepods-pod3f1c_22.slice",
            "/node/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod3f1c_22.slice",
            "/node/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod3f1c_22.slice",
        ] {
            assert!(all.contains(&PathBuf::from(wanted)), "{wanted}: {all:?}");
        }
        // A parent slice's name is part of its children's.
        let nested = candidates(Path::new("/kubelet.slice/kubelet-kubepods.slice"), uid);
        assert!(nested.contains(
            &"/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-pod3f1c_22.slice".into()
        ));
        assert_eq!(candidates(Path::new("/kubepods"), uid).len(), 3, "cgroupfs only");
    }

    #[test]
    fn a_uid_that_is_a_path_is_looked_for_nowhere() {
        assert!(candidates(Path::new("/kubepods"), "../x").is_empty());
        assert!(candidates(Path::new("/kubepods"), "").is_empty());
    }

    #[test]
    fn start_times_are_read_behind_any_name() {
        let fields = (3..=52).map(|n| n.to_string()).collect::<Vec<_>>().join(" ");
        assert_eq!(start_time(&format!("7 (sh) {fields}")), Some(22));
        assert_eq!(start_time(&format!("7 (a) S 1 (b) {fields}")), Some(22));
        assert_eq!(start_time("7 (sh"), None);
        let own = started(std::process::id()).unwrap();
        assert!(own > 0);
    }
}
