//! Whether a process holds the other end of a unix connection, where the kernel hands out the
//! peer's pid alone.
//!
//! The accepted socket belongs to the network namespace of whoever connected. There sock_diag
//! tells the inode of its peer, and `/proc/<pid>/fd` says who has that open: a process that
//! merely took over the pid has not.

use std::{
    fs::{self, File},
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::Arc,
};

use netlink_packet_core::{
    NLM_F_REQUEST, NetlinkHeader, NetlinkMessage, NetlinkPayload, Parseable,
};
use netlink_packet_sock_diag::{
    SockDiagMessage,
    unix::{ShowFlags, StateFlags, UnixRequest, UnixResponse},
};

use crate::netns::{NetnsOpener, netlink};

/// `NETLINK_SOCK_DIAG`.
const SOCK_DIAG: isize = 4;

/// True when the process `pid` holds the other end of `accepted`. What cannot be found out is
/// not so.
pub(super) async fn is_held_by(accepted: BorrowedFd<'_>, pid: u32, opener: &NetnsOpener) -> bool {
    match find(accepted, pid, opener).await {
        Ok(held) => held,
        Err(error) => {
            tracing::warn!(
                pid,
                %error,
                "cannot tell whether the process holds its connection: it gets no identity (is the kernel's unix_diag there?)"
            );
            false
        }
    }
}

async fn find(accepted: BorrowedFd<'_>, pid: u32, opener: &NetnsOpener) -> io::Result<bool> {
    let inode = rustix::fs::fstat(accepted)?.st_ino;
    let netns = OwnedFd::from(File::open(format!("/proc/{pid}/ns/net"))?);
    let netns = Arc::new(opener.adopt(netns).await?);
    let socket = opener.netlink(&netns, SOCK_DIAG).await?;
    let Some(peer) = peer_inode(socket.as_fd(), inode)? else { return Ok(false) };
    tokio::task::spawn_blocking(move || has_open(pid, peer)).await?
}

/// The inode of the socket that is connected to the one of this inode.
fn peer_inode(socket: BorrowedFd<'_>, inode: u64) -> io::Result<Option<u32>> {
    let request = UnixRequest {
        state_flags: StateFlags::all(),
        // Sockets' inodes are 32 bits wide, as the request is.
        inode: u32::try_from(inode).map_err(|_| io::ErrorKind::InvalidInput)?,
        show_flags: ShowFlags::PEER,
        cookie: [0xff; 8],
    };
    let mut header = NetlinkHeader::default();
    header.flags = NLM_F_REQUEST;
    header.sequence_number = 1;
    let payload = NetlinkPayload::InnerMessage(SockDiagMessage::UnixRequest(request));
    let mut message = NetlinkMessage::new(header, payload);
    message.finalize();
    let mut bytes = vec![0; message.buffer_len()];
    message.serialize(&mut bytes);
    let mut peer = None;
    let answered = netlink::exchange(socket, &bytes, |payload| {
        if let Ok(response) = UnixResponse::parse(payload) {
            peer = response.peer();
        }
    });
    match answered {
        Ok(_) => Ok(peer.filter(|inode| *inode != 0)),
        // The socket is of another namespace: the process is not who connected.
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// True when the process has the socket of this inode open.
fn has_open(pid: u32, inode: u32) -> io::Result<bool> {
    let wanted = format!("socket:[{inode}]");
    for entry in fs::read_dir(format!("/proc/{pid}/fd"))? {
        // A descriptor that was closed meanwhile is none.
        let Ok(target) = fs::read_link(entry?.path()) else { continue };
        if target.as_os_str() == wanted.as_str() {
            return Ok(true);
        }
    }
    Ok(false)
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::{UnixListener, UnixStream};

    use super::*;

    #[tokio::test]
    async fn only_who_holds_it() {
        if !rustix::process::geteuid().is_root() {
            return;
        }
        let opener = NetnsOpener::start().unwrap();
        let dir = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(dir.path().join("s")).unwrap();
        let client = UnixStream::connect(dir.path().join("s")).unwrap();
        let (accepted, _) = listener.accept().unwrap();
        let own = std::process::id();
        assert!(is_held_by(accepted.as_fd(), own, &opener).await);
        let mut other = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        assert!(!is_held_by(accepted.as_fd(), other.id(), &opener).await);
        other.kill().unwrap();
        other.wait().unwrap();
        assert!(!is_held_by(accepted.as_fd(), other.id(), &opener).await, "gone");
        drop(client);
        assert!(!is_held_by(accepted.as_fd(), own, &opener).await, "closed");
    }
}
