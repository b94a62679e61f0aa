//! The pods that run here: whether each has a veth whose other end the node holds, and whether
//! somebody else has Signet's port.

use std::{
    collections::BTreeMap,
    fs,
    os::{
        fd::{AsFd, OwnedFd},
        unix::fs::MetadataExt,
    },
    path::{Path, PathBuf},
    sync::Arc,
};

use signet_ebpf::abi::TUNNEL_PORT;

use super::Findings;
use crate::{
    cli::exit::Exit,
    kernel::{
        cgroup::Cgroup,
        destroy::{self, States},
    },
    netns::{self, NetnsFd, NetnsOpener, links},
};

/// Network namespaces that are looked at; pods' links on a node are of one kind.
const MOST: usize = 64;
/// Directories that are walked, and how deep.
const MOST_DIRECTORIES: usize = 4096;
const DEPTH: usize = 8;

/// A pod's network namespace, by some process in it.
struct Found {
    cgroup: PathBuf,
    netns: OwnedFd,
}

pub(super) async fn look(workloads: &Cgroup, findings: &mut Findings) {
    let found = match find(workloads) {
        Ok(found) => found,
        Err(error) => {
            return findings.failed(
                "pods",
                "links",
                Exit::Host,
                format!("the node's own network namespace cannot be opened: {error}"),
                "run this in the host's pid namespace (hostPID), as root",
            );
        }
    };
    if found.is_empty() {
        return findings.skipped(
            "pods",
            "links",
            format!("no pod with a network of its own runs in {}", workloads.name.display()),
        );
    }
    match ask(&found).await {
        Ok(seen) => tell(&found, &seen, findings),
        Err(error) => findings.failed(
            "pods",
            "links",
            Exit::Host,
            format!("pods' network namespaces cannot be entered: {error}"),
            "run this as root, in the host's pid and network namespaces (hostPID, hostNetwork)",
        ),
    }
}

/// Every network namespace of a process below the root, but the node's own.
fn find(workloads: &Cgroup) -> std::io::Result<Vec<Found>> {
    let own = fs::metadata("/proc/self/ns/net")?;
    let mut by_number = BTreeMap::new();
    let mut walk = vec![(workloads.path.clone(), 0)];
    let mut walked = 0;
    while let Some((directory, depth)) = walk.pop() {
        walked += 1;
        if walked > MOST_DIRECTORIES || by_number.len() >= MOST {
            break;
        }
        // One that went meanwhile has no pods.
        let Ok(entries) = fs::read_dir(&directory) else { continue };
        for entry in entries.flatten() {
            if depth < DEPTH && entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                walk.push((entry.path(), depth + 1));
            }
        }
        let Some((number, netns)) = of_first_process(&directory) else { continue };
        if number != (own.dev(), own.ino()) {
            let cgroup = directory.strip_prefix(&workloads.path).unwrap_or(&directory).to_owned();
            by_number.entry(number).or_insert(Found { cgroup, netns });
        }
    }
    Ok(by_number.into_values().collect())
}

fn of_first_process(cgroup: &Path) -> Option<((u64, u64), OwnedFd)> {
    let pids = fs::read_to_string(cgroup.join("cgroup.procs")).ok()?;
    // Number 0 is a process of another pid namespace.
    pids.lines().filter(|pid| *pid != "0").find_map(|pid| {
        let netns = OwnedFd::from(fs::File::open(format!("/proc/{pid}/ns/net")).ok()?);
        Some((netns::inode(netns.as_fd()).ok()?, netns))
    })
}

/// What is seen of one namespace.
struct Seen {
    has_link: bool,
    /// Somebody listens on the port that tunnels come in by.
    port_taken: bool,
}

async fn ask(found: &[Found]) -> std::io::Result<Vec<Seen>> {
    let opener = NetnsOpener::start()?;
    let here = Arc::new(NetnsFd::of_this_process()?);
    let route = opener.netlink(&here, libc::NETLINK_ROUTE as isize).await?;
    let mut seen = Vec::with_capacity(found.len());
    for pod in found {
        let there = Arc::new(opener.adopt(pod.netns.try_clone()?).await?);
        let ends = links::host_ends(route.as_fd(), there.fd.as_fd())?;
        let diag = opener.netlink(&there, libc::NETLINK_SOCK_DIAG as isize).await?;
        let listeners = destroy::list(diag.as_fd(), States::Listening)
            .map_err(|error| std::io::Error::other(error.to_string()))?;
        seen.push(Seen {
            has_link: !ends.is_empty(),
            port_taken: listeners.iter().any(|listener| listener.local.port() == TUNNEL_PORT),
        });
    }
    Ok(seen)
}

fn tell(found: &[Found], seen: &[Seen], findings: &mut Findings) {
    let named = |which: &dyn Fn(&Seen) -> bool| -> Vec<String> {
        let pairs = found.iter().zip(seen).filter(|(_, seen)| which(seen));
        pairs.map(|(pod, _)| pod.cgroup.display().to_string()).collect()
    };
    let unlinked = named(&|seen| !seen.has_link);
    if unlinked.is_empty() {
        let count = found.len();
        findings.ok("pods", "links", format!("each of {count} has a veth to this node"));
    } else {
        findings.warning(
            "pods",
            "links",
            format!(
                "{} of {} have no veth to this node: {}",
                unlinked.len(),
                found.len(),
                unlinked.join(", ")
            ),
            "such pods get no raw guard (`raw-guard: none`): what packet sockets send is not \
             stopped; use a CNI with veth pairs",
        );
    }
    let taken = named(&|seen| seen.port_taken);
    if taken.is_empty() {
        findings.ok("pods", "tunnel port", format!("nobody listens on {TUNNEL_PORT}"));
    } else {
        findings.failed(
            "pods",
            "tunnel port",
            Exit::No,
            format!("somebody listens on {TUNNEL_PORT} in {}", taken.join(", ")),
            "take the pod out of the other mesh (ztunnel, a sidecar), or move the application to \
             another port: tunnels come in by this one",
        );
    }
}
