//! One agent takes another's place on a node, without a refused connection: upgrade, rollback,
//! restart.
//!
//! The new agent ([`take`]) finds the old one by its socket, `admin/handover.sock` in the run
//! directory. It reads the cluster and gets SVIDs for every pod that is served, and says when it
//! could take over. The old one ([`give`]) stops writing the kernel's maps and hands its
//! listeners over, by `SCM_RIGHTS`; both accept from them for a moment. Once the new one has
//! applied what it wants and serves, it says so; the old one then only finishes what it has
//! accepted. Until that word the old one can go on as if nothing had happened, and does when the
//! new one ends.
//!
//! Both ends are root's, and each says only what [`message`] allows.

pub mod channel;
pub mod give;
pub mod message;
pub mod take;

use std::path::{Path, PathBuf};

pub use self::{
    give::{Give, Request},
    message::{Hello, NodeSocket},
    take::{TakeError, Taken, is_served, take},
};
use crate::socket_file::{self, BoundSocket, SocketError, SocketParams};

/// Sockets of the node's agent, as they are handed over.
pub type NodeSockets = Vec<(NodeSocket, std::os::fd::OwnedFd)>;

/// Where the socket of a run directory is.
pub fn path_in(run_dir: &Path) -> PathBuf {
    run_dir.join("admin/handover.sock")
}

/// Binds it, for the next hand-over.
///
/// # Errors
/// [`SocketError`].
pub fn bind(run_dir: &Path) -> Result<BoundSocket, SocketError> {
    socket_file::bind(&SocketParams {
        key: "runDir",
        path: &path_in(run_dir),
        directory_mode: 0o700,
        socket_mode: 0o600,
        alone: false,
    })
}
