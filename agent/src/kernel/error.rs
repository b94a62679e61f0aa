//! What can go wrong with the kernel. Every one of these is exit code 6, but the two that
//! are about `SIGNET_MASK_FEATURES` and paths that the operator gave.

use std::{io, path::PathBuf};

use aya::{EbpfError, maps::MapError, programs::ProgramError};

/// Why the kernel's side cannot be set up or changed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum KernelError {
    /// No permission for BPF at all.
    #[error(
        "this process may not use BPF: run the agent as root, or with the capabilities BPF, \
         NET_ADMIN, PERFMON and SYS_ADMIN"
    )]
    NotPermitted,
    /// The kernel has no BPF.
    #[error("this kernel has no bpf(2): it needs CONFIG_BPF_SYSCALL and CONFIG_CGROUP_BPF")]
    NoBpf,
    /// cgroup2 is not mounted.
    #[error("no cgroup2 is mounted: mount one (`mount -t cgroup2 none /sys/fs/cgroup`)")]
    NoCgroup2,
    /// A cgroup that was configured does not exist.
    #[error(
        "the cgroup {path} does not exist: is {option} right? (it is a path below the cgroup2 \
         mount {mount})"
    )]
    NoCgroup {
        /// Where it was looked for.
        path: PathBuf,
        /// The option that names it.
        option: &'static str,
        /// The mount.
        mount: PathBuf,
    },
    /// The workloads root is the root of the hierarchy.
    #[error(
        "the workloads root {root} is the root of the cgroup hierarchy, so the agent itself would \
         be steered: set --cgroup-root to the directory of the pods"
    )]
    WorkloadsIsRoot {
        /// The root.
        root: PathBuf,
    },
    /// The agent's cgroup cannot be seen.
    #[error(
        "the agent's own cgroup ({line}) is not below the cgroup2 mount {mount}: run it in the \
         host's cgroup namespace, or mount its hierarchy"
    )]
    OwnCgroupHidden {
        /// The mount.
        mount: PathBuf,
        /// What /proc/self/cgroup says.
        line: String,
    },
    /// The agent is among the workloads and cannot leave.
    #[error(
        "the agent runs in {from}, where its own connections would be steered, and cannot move to \
         {to}: start it in a cgroup outside the workloads root"
    )]
    CannotMove {
        /// Where it is.
        from: PathBuf,
        /// Where it wanted to be.
        to: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The pins' place is no bpffs and cannot become one.
    #[error(
        "--bpffs {path} cannot hold pins: {problem}; give a directory on a bpffs, or an empty one"
    )]
    WrongBpffs {
        /// The path.
        path: PathBuf,
        /// What is wrong.
        problem: String,
    },
    /// bpffs cannot be mounted.
    #[error("cannot mount a bpffs on {path}: mount it beforehand (`mount -t bpf bpf {path}`)")]
    CannotMountBpffs {
        /// The mount point.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// An unknown name in `SIGNET_MASK_FEATURES`.
    #[error("SIGNET_MASK_FEATURES: unknown feature {name:?}; known are {known}")]
    UnknownFeature {
        /// The name.
        name: String,
        /// All names.
        known: String,
    },
    /// A file or directory.
    #[error("cannot use {what}")]
    Io {
        /// What.
        what: String,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The embedded object cannot be loaded.
    #[error(
        "cannot load the BPF object {object}: is this kernel too old? (5.15 is the oldest meant)"
    )]
    Load {
        /// Which object.
        object: &'static str,
        /// aya's error.
        #[source]
        source: Box<EbpfError>,
    },
    /// The object lacks a program or map that the loader expects: a build of two halves.
    #[error("the BPF object {object} has no {name}: the agent and its programs are of two builds")]
    Missing {
        /// Which object.
        object: &'static str,
        /// What is missing.
        name: &'static str,
    },
    /// The verifier refuses a program.
    #[error("the kernel refuses the program {program}")]
    Program {
        /// Its name.
        program: &'static str,
        /// aya's error with the verifier's log.
        #[source]
        source: Box<ProgramError>,
    },
    /// A program cannot be attached.
    #[error("cannot attach {program} to {target}")]
    Attach {
        /// Its name.
        program: &'static str,
        /// Cgroup or network namespace.
        target: String,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// Another tool's program excludes ours.
    #[error(
        "cannot attach {program} to {target}: {owner} is attached to {holder} for itself alone \
         (without BPF_F_ALLOW_MULTI); detach it (`bpftool cgroup detach`) or have its owner \
         attach it by a link"
    )]
    Conflict {
        /// Our program.
        program: &'static str,
        /// Our cgroup.
        target: String,
        /// The other program.
        owner: String,
        /// The cgroup that it is attached to.
        holder: String,
    },
    /// A link's program cannot be replaced.
    #[error("cannot replace the program of the link {path}")]
    Replace {
        /// The pin.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// A pin cannot be made or removed.
    #[error("cannot {action} the pin {path}")]
    Pin {
        /// What was tried.
        action: &'static str,
        /// The pin.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// A map operation failed.
    #[error("cannot {action} the BPF map {map}")]
    Map {
        /// The map's name.
        map: &'static str,
        /// What was tried.
        action: &'static str,
        /// aya's error.
        #[source]
        source: MapError,
    },
    /// A map has no room.
    #[error("the BPF map {map} is full: fewer pods, addresses or policies fit this node")]
    MapFull {
        /// The map's name.
        map: &'static str,
    },
    /// A pod's policy has too many entries.
    #[error(
        "the pod's policies compile to {entries} entries, and {max} is the most: use fewer ports, ranges or identities"
    )]
    PolicyTooLarge {
        /// How many it has.
        entries: usize,
        /// How many it may have.
        max: u32,
    },
    /// Sockets could not be listed or destroyed.
    #[error("cannot {action} sockets by sock_diag")]
    SockDiag {
        /// What was tried.
        action: &'static str,
        /// Why not.
        #[source]
        source: io::Error,
    },
}
