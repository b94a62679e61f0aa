//! Why the agent did not start, or ended.

use std::io;

use crate::{
    cluster::{enrolment::BoardError, files::FilesError, kubernetes::KubernetesError},
    handover::TakeError,
    kernel::KernelError,
    socket_file::SocketError,
    spiffe::SpiffeIdError,
    svid::issuer::{RemoteError, RootFileError},
    telemetry::logging::LogError,
    workload_api,
};

/// Why the agent did not start, or ended.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DaemonError {
    /// The kernel's side: this host cannot.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// The cluster directory.
    #[error(transparent)]
    Files(#[from] FilesError),
    /// The Kubernetes API.
    #[error(transparent)]
    Kubernetes(#[from] KubernetesError),
    /// The board of served pods.
    #[error(transparent)]
    Board(#[from] BoardError),
    /// The authority that is asked.
    #[error(transparent)]
    Remote(#[from] RemoteError),
    /// The authority's root.
    #[error(transparent)]
    Root(#[from] RootFileError),
    /// The admin socket or the Workload API's.
    #[error(transparent)]
    Socket(#[from] SocketError),
    /// The static entries of the Workload API.
    #[error(transparent)]
    Entries(#[from] workload_api::EntriesError),
    /// The log.
    #[error(transparent)]
    Log(#[from] LogError),
    /// The trust domain's name.
    #[error("trustDomain: {value:?} is not a trust domain: {source}")]
    TrustDomain {
        /// As configured.
        value: String,
        /// What is wrong with it.
        source: SpiffeIdError,
    },
    /// An identity in the configuration.
    #[error("{key}: {value:?} is not a SPIFFE ID: {source}")]
    SpiffeId {
        /// The key.
        key: &'static str,
        /// As configured.
        value: String,
        /// What is wrong with it.
        source: SpiffeIdError,
    },
    /// A key without which this form of the agent cannot run.
    #[error("{key}: missing; {remedy}")]
    Missing {
        /// The key.
        key: &'static str,
        /// What to give.
        remedy: &'static str,
    },
    /// Threads, runtimes, signals.
    #[error("cannot start {what}: {source}")]
    Start {
        /// What.
        what: &'static str,
        /// Why not.
        source: io::Error,
    },
    /// The agent that serves the node keeps it.
    #[error(transparent)]
    Take(#[from] TakeError),
    /// The node was handed over, and this agent could not do with it; the old one goes on.
    #[error("the node could not be taken over from the agent that serves it: {why}")]
    TakeOver {
        /// Why.
        why: String,
    },
    /// A part of the agent that must run has ended: the process ends and is started anew.
    #[error("{part} has ended: {why}")]
    Ended {
        /// Which.
        part: &'static str,
        /// Why.
        why: String,
    },
}

/// What kind of failure it is, for the exit code.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Fault {
    /// Input that must be changed.
    Input,
    /// A host that cannot.
    Host,
    /// A bug.
    Bug,
}

impl DaemonError {
    /// What kind of failure it is.
    pub fn fault(&self) -> Fault {
        match self {
            Self::Kernel(KernelError::UnknownFeature { .. })
            | Self::Files(_)
            | Self::Kubernetes(KubernetesError::Access(_))
            | Self::Board(_)
            | Self::Root(_)
            | Self::Remote(_)
            | Self::Log(_)
            | Self::Entries(_)
            | Self::TrustDomain { .. }
            | Self::SpiffeId { .. }
            | Self::Missing { .. } => Fault::Input,
            Self::Take(TakeError::Refused(_)) => Fault::Input,
            Self::Kernel(_)
            | Self::Kubernetes(_)
            | Self::Socket(_)
            | Self::Start { .. }
            | Self::Take(_)
            | Self::TakeOver { .. } => Fault::Host,
            Self::Ended { .. } => Fault::Bug,
        }
    }
}
