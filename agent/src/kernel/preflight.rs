//! What a node lacks for the programs: found without changing anything.

use std::{
    fs::File,
    os::fd::AsFd,
    path::{Path, PathBuf},
};

use aya::{programs::ProgramType, sys::is_program_supported};

use super::{
    KernelError,
    bpf::{self, attach_flags},
    bpffs,
    cgroup::{Cgroup, Hierarchy},
    programs::{self, HOOKS, Root},
};

/// Kinds of programs that are needed, with what the kernel is built with for each.
const KINDS: [(ProgramType, &str, &str); 5] = [
    (ProgramType::CgroupSockAddr, "cgroup_sock_addr", "CONFIG_CGROUP_BPF"),
    (ProgramType::CgroupSkb, "cgroup_skb", "CONFIG_CGROUP_BPF"),
    (ProgramType::SockOps, "sock_ops", "CONFIG_CGROUP_BPF"),
    (ProgramType::SkLookup, "sk_lookup", "CONFIG_INET and CONFIG_BPF_SYSCALL (Linux 5.9)"),
    (ProgramType::SchedClassifier, "sched_cls", "CONFIG_NET_CLS_BPF and CONFIG_NET_SCH_INGRESS"),
];

/// Kinds of programs that this kernel does not take, with what it would have to be built with.
pub fn missing_programs() -> Vec<(&'static str, &'static str)> {
    KINDS
        .into_iter()
        .filter(|(kind, ..)| !is_program_supported(*kind).unwrap_or(false))
        .map(|(_, name, built)| (name, built))
        .collect()
}

/// Where a bpffs would be mounted for pins in `path`; `None`: one is there.
///
/// # Errors
/// A path that cannot hold pins.
pub fn bpffs(path: &Path) -> Result<Option<PathBuf>, KernelError> {
    bpffs::look(path)
}

/// The workloads root and the node's, as the agent would find them.
///
/// # Errors
/// A root that is not there, or cannot be one.
pub fn roots(
    hierarchy: &Hierarchy,
    workloads: &Path,
    node: &Path,
) -> Result<(Cgroup, Cgroup), KernelError> {
    let workloads = programs::open_workloads(hierarchy, workloads)?;
    let node = programs::open_root(hierarchy, node, "--node-cgroup")?;
    if workloads.path == hierarchy.mount() {
        return Err(KernelError::WorkloadsIsRoot { root: workloads.path });
    }
    Ok((workloads, node))
}

/// Another tool's program where ours belong.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Conflict {
    /// Our program that it concerns.
    pub program: &'static str,
    /// The other programs by number and name.
    pub owner: String,
    /// The cgroup that they are attached to.
    pub holder: PathBuf,
    /// Ours cannot be attached; else ours would take the place of theirs for the pods.
    pub is_exclusive: bool,
}

/// Programs of others that do not let ours be attached, or that ours would silently replace.
pub fn conflicts(hierarchy: &Hierarchy, workloads: &Cgroup, node: &Cgroup) -> Vec<Conflict> {
    let mut found = Vec::new();
    for (program, hook, root) in HOOKS {
        let cgroup = match root {
            Root::Workloads => workloads,
            Root::Node => node,
            // Made by the agent, or its service's own.
            Root::Agent => continue,
        };
        for (level, name) in cgroup.name.ancestors().enumerate() {
            let Ok(holder) = hierarchy.open(name) else { continue };
            let Ok(directory) = File::open(&holder.path) else { continue };
            let Ok(attached) = bpf::query(directory.as_fd(), hook) else { continue };
            if attached.programs.is_empty() || attached.flags & attach_flags::ALLOW_MULTI != 0 {
                continue;
            }
            let is_override = attached.flags & attach_flags::ALLOW_OVERRIDE != 0;
            // On the very cgroup a link stands beside no program that was attached otherwise.
            found.push(Conflict {
                program,
                owner: programs::describe(&attached.programs),
                holder: holder.path,
                is_exclusive: level == 0 || !is_override,
            });
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::{check_permitted, test_host::lock_own_cgroup};

    #[test]
    fn this_host_is_looked_at_without_a_change() {
        if check_permitted().is_err() {
            return;
        }
        let _own = lock_own_cgroup();
        assert_eq!(missing_programs(), []);
        let Ok(hierarchy) = Hierarchy::find() else { return };
        let nowhere = Path::new("/signet-no-such-cgroup");
        let error = roots(&hierarchy, nowhere, Path::new("/")).expect_err("no such cgroup");
        assert!(error.to_string().contains("--cgroup-root"), "{error}");
        let error = roots(&hierarchy, Path::new("/"), Path::new("/")).expect_err("the root");
        assert!(matches!(error, KernelError::WorkloadsIsRoot { .. }), "{error}");
    }
}
