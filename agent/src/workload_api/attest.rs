//! Who is at the other end of a connection: a process, told apart from every other by its
//! pidfd, and the pod whose cgroup it is in.
//!
//! What the process is, the kernel says: no path, name or environment of the caller's counts.
//! A cgroup that somebody made inside a pod, of whatever name, is below that pod's directory;
//! the directory is compared at the level where discovery found it, and by its id.

use std::{
    fmt, fs, io,
    os::{
        fd::{AsFd, AsRawFd, FromRawFd, OwnedFd},
        unix::fs::MetadataExt,
    },
    path::{Path, PathBuf},
    sync::Arc,
};

use rustix::{
    event::{PollFd, PollFlags, poll},
    process::{Pid, PidfdFlags, pidfd_open},
    time::{ClockId, Timespec, clock_gettime},
};
use tokio::net::UnixStream;

use super::other_end;
use crate::{
    endpoint::state::{EndpointState, NodeState},
    kernel::cgroup::Hierarchy,
    netns::NetnsOpener,
};

/// A process that has connected. It stays this process: its pid may be another's later, but
/// then nothing is said about it any more.
pub struct Caller {
    pidfd: OwnedFd,
    pid: u32,
    uid: u32,
}

/// Why nothing can be said about a caller.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AttestError {
    /// The socket does not say who is there.
    #[error("the socket does not say who has connected: {0}")]
    Credentials(#[source] io::Error),
    /// The process is in a pid namespace that the agent does not see.
    #[error(
        "the caller's process is not visible to the agent; run the agent in the host's pid namespace (hostPID)"
    )]
    Invisible,
    /// The process has ended, or its pid is another process's.
    #[error("the process that connected is gone")]
    Gone,
    /// Its directory in /proc cannot be read.
    #[error("what process {pid} is cannot be read in /proc: {source}")]
    Proc {
        /// Its pid.
        pid: u32,
        /// Why not.
        source: io::Error,
    },
}

impl AttestError {
    /// A short stable name, for metrics.
    pub const fn kind(&self) -> &'static str {
        match self {
            Self::Credentials(_) => "no_credentials",
            Self::Invisible => "invisible",
            Self::Gone => "gone",
            Self::Proc { .. } => "unreadable",
        }
    }
}

/// How callers are told apart.
#[derive(Clone)]
pub enum Method {
    /// The socket hands out the peer's pidfd (`SO_PEERPIDFD`, Linux 6.5).
    PeerPidfd,
    /// The socket gives a pid, which may be another process's by now: the process must hold the
    /// connection's other end.
    PeerPid(NetnsOpener),
}

impl Caller {
    /// The process at the other end of `stream`.
    ///
    /// # Errors
    /// When it is gone, or cannot be told apart from one that took over its pid.
    pub async fn of(stream: &UnixStream, method: &Method) -> Result<Self, AttestError> {
        let accepted = clock_gettime(ClockId::Boottime);
        let peer = peer_credentials(stream).map_err(AttestError::Credentials)?;
        let pid = u32::try_from(peer.pid).ok().filter(|pid| *pid != 0);
        let pid = pid.ok_or(AttestError::Invisible)?;
        let pidfd = match method {
            // Of the very process that connected. The pid is of the same kernel object, so it
            // is this process's for as long as the pidfd says that it is alive.
            Method::PeerPidfd => peer_pidfd(stream).map_err(|_| AttestError::Gone)?,
            Method::PeerPid(opener) => {
                let pidfd = open_pidfd(pid)?;
                // The pid may have been taken over before it was opened. Whoever did that
                // started after the connection was made, or does not hold its other end.
                let held = started_before(pid, accepted)
                    && other_end::is_held_by(stream.as_fd(), pid, opener).await;
                if !held {
                    return Err(AttestError::Gone);
                }
                pidfd
            }
        };
        let caller = Self { pidfd, pid, uid: peer.uid };
        caller.check_alive()?;
        Ok(caller)
    }

    /// Its user, as the socket recorded it when it connected.
    pub fn uid(&self) -> u32 {
        self.uid
    }

    /// The cgroup that it is in now, below the hierarchy's mount; `None` when it is outside
    /// what the agent can see of the hierarchy.
    pub fn cgroup(&self, hierarchy: &Hierarchy) -> Result<Option<PathBuf>, AttestError> {
        let text = self.read("cgroup")?;
        Ok(hierarchy.of_process(&text))
    }

    /// Device and inode of the file that it executes.
    pub(super) fn executable(&self) -> Result<(u64, u64), AttestError> {
        // The link leads to the file itself, whatever mount namespace it is in.
        let metadata = fs::metadata(format!("/proc/{}/exe", self.pid));
        self.check_alive()?;
        metadata
            .map(|m| (m.dev(), m.ino()))
            .map_err(|source| AttestError::Proc { pid: self.pid, source })
    }

    /// Reads a file of its directory in /proc. It is the process's own: it was alive
    /// afterwards, so its pid was not another's before.
    fn read(&self, file: &str) -> Result<String, AttestError> {
        let text = fs::read_to_string(format!("/proc/{}/{file}", self.pid));
        self.check_alive()?;
        text.map_err(|source| AttestError::Proc { pid: self.pid, source })
    }

    /// Fails when the process has ended.
    fn check_alive(&self) -> Result<(), AttestError> {
        let mut fds = [PollFd::new(&self.pidfd, PollFlags::IN)];
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        // A pidfd becomes readable when its process ends (pidfd_open(2)).
        match poll(&mut fds, Some(&now)) {
            Ok(0) => Ok(()),
            _ => Err(AttestError::Gone),
        }
    }
}

impl fmt::Debug for Caller {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Caller").field("pid", &self.pid).field("uid", &self.uid).finish()
    }
}

/// The endpoint whose pod directory is the cgroup `name` or holds it.
pub fn pod_of(state: &NodeState, hierarchy: &Hierarchy, name: &Path) -> Option<Arc<EndpointState>> {
    let endpoint = state.endpoints.values().find(|endpoint| {
        // By whole names from the root on: the level is that of the recorded path, and what
        // is below it may be called anything.
        let recorded = Path::new(&*endpoint.cgroup_path);
        recorded.components().count() > 1 && name.starts_with(recorded)
    })?;
    // The directory at that path must still be the one that was found.
    let directory = hierarchy.open(Path::new(&*endpoint.cgroup_path)).ok()?;
    (directory.id == endpoint.cgroup).then(|| Arc::clone(endpoint))
}

fn open_pidfd(pid: u32) -> Result<OwnedFd, AttestError> {
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw).ok_or(AttestError::Invisible)?;
    pidfd_open(pid, PidfdFlags::empty()).map_err(|_| AttestError::Gone)
}

/// True when the process started before `moment`, as far as clock ticks tell.
fn started_before(pid: u32, moment: Timespec) -> bool {
    let Ok(stat) = fs::read_to_string(format!("/proc/{pid}/stat")) else { return false };
    let Some(ticks) = start_ticks(&stat) else { return false };
    let per_second = rustix::param::clock_ticks_per_second().max(1);
    let moment = moment.tv_sec.cast_unsigned() * per_second
        + moment.tv_nsec.cast_unsigned() * per_second / 1_000_000_000;
    ticks <= moment
}

/// Field 22 of `/proc/<pid>/stat`, counted behind the name, which may hold anything.
fn start_ticks(stat: &str) -> Option<u64> {
    let (_, fields) = stat.rsplit_once(") ")?;
    fields.split(' ').nth(19)?.parse().ok()
}

/// `SO_PEERCRED`. Not by a wrapper that takes pid 0, a process that this namespace does not
/// show, for impossible.
fn peer_credentials(socket: &impl AsRawFd) -> io::Result<libc::ucred> {
    let mut peer = libc::ucred { pid: 0, uid: 0, gid: 0 };
    let mut len = size_of::<libc::ucred>() as libc::socklen_t;
    // SAFETY: the buffer is a ucred, of plain integers, and `len` says its size.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEERCRED,
            (&raw mut peer).cast(),
            &raw mut len,
        )
    };
    if result == 0 { Ok(peer) } else { Err(io::Error::last_os_error()) }
}

/// `SO_PEERPIDFD`.
fn peer_pidfd(socket: &impl AsRawFd) -> io::Result<OwnedFd> {
    let mut pidfd: libc::c_int = -1;
    let mut len = size_of::<libc::c_int>() as libc::socklen_t;
    // SAFETY: the buffer is an int, and `len` says its size.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEERPIDFD,
            (&raw mut pidfd).cast(),
            &raw mut len,
        )
    };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    if pidfd < 0 {
        return Err(io::ErrorKind::NotFound.into());
    }
    // SAFETY: the kernel has just made it for this call; nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(pidfd) })
}

#[cfg(test)]
#[path = "attest_tests.rs"]
mod tests;
