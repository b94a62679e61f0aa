//! What is done to a node where no agent runs, or must not be waited for: [`guard`] before the
//! kubelet starts, [`release`] to break the glass, [`uninstall`] to leave nothing.

pub mod boot;
pub mod guard;
pub mod release;
pub mod uninstall;

use std::{io, path::PathBuf};

use crate::{endpoint::released::ReleasedError, kernel::KernelError};

/// Why one of them could not be done.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LifecycleError {
    /// The kernel's side.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// The record of releases.
    #[error(transparent)]
    Released(#[from] ReleasedError),
    /// There is no such pod.
    #[error("--pod {name}: no pod of this name is registered on this node; registered are {known}")]
    NoPod {
        /// As asked for.
        name: String,
        /// Those that are.
        known: String,
    },
    /// The pod is not released.
    #[error("--pod {name}: it is not released; released are {known}")]
    NotReleased {
        /// As asked for.
        name: String,
        /// Those that are.
        known: String,
    },
    /// Not `namespace/name`.
    #[error("--pod {name}: write it as namespace/name")]
    PodName {
        /// As given.
        name: String,
    },
    /// An agent runs.
    #[error(
        "an agent answers on {}: stop it first (delete its DaemonSet, or end its process)",
        socket.display()
    )]
    AgentRuns {
        /// Its admin socket.
        socket: PathBuf,
    },
    /// A file or directory.
    #[error("cannot {action} {}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// Which.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
}

impl LifecycleError {
    /// True where this host cannot, rather than what was asked being wrong.
    pub fn is_hosts(&self) -> bool {
        match self {
            Self::Kernel(KernelError::UnknownFeature { .. }) => false,
            Self::Kernel(_) | Self::Io { .. } => true,
            _ => false,
        }
    }
}
