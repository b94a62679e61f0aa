//! Listing and destroying sockets of one network namespace, by sock_diag.
//!
//! `SOCK_DESTROY` answers the owner with ECONNABORTED and the peer with a reset. The netlink
//! socket must have been made in the namespace that is meant ([`crate::netns`]).

use std::{
    io,
    net::{IpAddr, SocketAddr},
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use netlink_packet_core::{
    NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST, NetlinkHeader, NetlinkMessage, NetlinkPayload,
    NetlinkSerializable, Nla as _, Parseable,
};
use netlink_packet_sock_diag::{
    SockDiagMessage,
    inet::{ExtensionFlags, InetRequest, InetResponse, SocketId, StateFlags, nlas::Nla},
    message::SockDiagDestroy,
};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};

use super::KernelError;
use crate::netns::netlink;

const TCP: u8 = 6;
const AF_INET: u8 = 2;
const AF_INET6: u8 = 10;
/// `INET_DIAG_CGROUP_ID` (5.9): the socket's cgroup.
const CGROUP_ID: u16 = 21;

/// A TCP socket of the namespace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TcpSocket {
    /// Its own side.
    pub local: SocketAddr,
    /// The other side; port 0 while it listens.
    pub remote: SocketAddr,
    /// Its inode: what `/proc/<pid>/fd` shows.
    pub inode: u32,
    /// Its cgroup, where the kernel tells it.
    pub cgroup: Option<u64>,
    id: SocketId,
    family: u8,
}

/// Which states to list.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum States {
    /// Listening ones.
    Listening,
    /// Everything between SYN_SENT and the last acknowledgement.
    Connected,
}

/// Lists TCP sockets of both families over `socket`, a `NETLINK_SOCK_DIAG` socket made in
/// the namespace.
///
/// # Errors
/// [`KernelError::SockDiag`].
pub fn list(socket: BorrowedFd<'_>, states: States) -> Result<Vec<TcpSocket>, KernelError> {
    let wanted = match states {
        States::Listening => StateFlags::LISTEN,
        States::Connected => {
            StateFlags::ESTABLISHED
                | StateFlags::SYN_SENT
                | StateFlags::SYN_RECV
                | StateFlags::FIN_WAIT1
                | StateFlags::FIN_WAIT2
                | StateFlags::CLOSE_WAIT
                | StateFlags::LAST_ACK
                | StateFlags::CLOSING
        }
    };
    let mut found = Vec::new();
    for family in [AF_INET, AF_INET6] {
        let request = serialise(
            SockDiagMessage::InetRequest(request(family, wanted.clone(), empty_id(family))),
            NLM_F_REQUEST | NLM_F_DUMP,
        );
        let listed = netlink::exchange(socket, &request, |payload| {
            if let Some(socket) = parse(payload) {
                found.push(socket);
            }
        });
        match listed {
            // A dump that changed under way still lists everything that was there throughout.
            Ok(_) => {}
            // A kernel without IPv6.
            Err(error) if error.kind() == io::ErrorKind::NotFound && family == AF_INET6 => {}
            Err(source) => return Err(KernelError::SockDiag { action: "list", source }),
        }
    }
    Ok(found)
}

/// Destroys one socket of `list`. Returns false when it had gone already.
///
/// # Errors
/// [`KernelError::SockDiag`], above all where the kernel lacks CONFIG_INET_DIAG_DESTROY.
pub fn destroy(socket: BorrowedFd<'_>, target: &TcpSocket) -> Result<bool, KernelError> {
    let message = destroy_message(target.family, target.id.clone());
    match netlink::exchange(socket, &message, |_| {}) {
        Ok(_) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(source) => Err(KernelError::SockDiag { action: "destroy", source }),
    }
}

impl TcpSocket {
    /// A socket that was not listed, for tests of what is decided about sockets.
    #[cfg(test)]
    pub(crate) fn between(local: SocketAddr, remote: SocketAddr) -> Self {
        let id = SocketId::new_v4();
        Self { local, remote, inode: 0, cgroup: None, id, family: AF_INET }
    }

    /// True when it never leaves the namespace.
    pub fn is_loopback(&self) -> bool {
        self.remote.ip().to_canonical().is_loopback() || self.local.ip() == self.remote.ip()
    }
}

/// True when the kernel can destroy sockets: asked for one that cannot be, it says "not
/// found" instead of "not supported".
pub(super) fn is_supported() -> bool {
    let attempt = || -> io::Result<()> {
        let socket = own_diag_socket()?;
        // From port 0 to port 0: no socket has these.
        netlink::exchange(socket.as_fd(), &destroy_message(AF_INET, SocketId::new_v4()), |_| {})?;
        Ok(())
    };
    match attempt() {
        Ok(()) => true,
        Err(error) => error.kind() == io::ErrorKind::NotFound,
    }
}

/// A sock_diag socket in this thread's own network namespace.
///
/// # Errors
/// Where the kernel has no sock_diag.
pub fn own_diag_socket() -> io::Result<OwnedFd> {
    let protocol = std::num::NonZeroU32::new(libc::NETLINK_SOCK_DIAG.unsigned_abs())
        .map(rustix::net::Protocol::from_raw);
    Ok(socket_with(AddressFamily::NETLINK, SocketType::RAW, SocketFlags::CLOEXEC, protocol)?)
}

fn destroy_message(family: u8, id: SocketId) -> Vec<u8> {
    serialise(
        SockDiagDestroy::new(SockDiagMessage::InetRequest(request(family, StateFlags::all(), id))),
        NLM_F_REQUEST | NLM_F_ACK,
    )
}

fn request(family: u8, states: StateFlags, socket_id: SocketId) -> InetRequest {
    InetRequest { family, protocol: TCP, extensions: ExtensionFlags::empty(), states, socket_id }
}

fn empty_id(family: u8) -> SocketId {
    if family == AF_INET { SocketId::new_v4() } else { SocketId::new_v6() }
}

fn serialise<T: NetlinkSerializable>(message: T, flags: u16) -> Vec<u8> {
    let mut header = NetlinkHeader::default();
    header.flags = flags;
    header.sequence_number = 1;
    let mut message = NetlinkMessage::new(header, NetlinkPayload::InnerMessage(message));
    message.finalize();
    let mut bytes = vec![0; message.buffer_len()];
    message.serialize(&mut bytes);
    bytes
}

fn parse(payload: &[u8]) -> Option<TcpSocket> {
    let response = InetResponse::parse(payload).ok()?;
    let id = response.header.socket_id;
    let cgroup = response.nlas.iter().find_map(|nla| match nla {
        Nla::Other(other) if other.kind() == CGROUP_ID => {
            let mut value = vec![0; other.value_len()];
            other.emit_value(&mut value);
            Some(u64::from_ne_bytes(value.try_into().ok()?))
        }
        _ => None,
    });
    Some(TcpSocket {
        local: canonical(id.source_address, id.source_port),
        remote: canonical(id.destination_address, id.destination_port),
        inode: response.header.inode,
        cgroup,
        family: response.header.family,
        id,
    })
}

fn canonical(ip: IpAddr, port: u16) -> SocketAddr {
    SocketAddr::new(ip.to_canonical(), port)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{
        io::{Read, Write},
        net::{TcpListener, TcpStream},
    };

    #[test]
    fn a_chosen_connection_is_destroyed_and_others_stay() {
        if !rustix::process::geteuid().is_root() || !is_supported() {
            return;
        }
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let mut doomed = TcpStream::connect(address).unwrap();
        let (mut doomed_peer, _) = listener.accept().unwrap();
        let mut kept = TcpStream::connect(address).unwrap();
        let (mut kept_peer, _) = listener.accept().unwrap();

        let diag = own_diag_socket().unwrap();
        let listening = list(diag.as_fd(), States::Listening).unwrap();
        assert!(listening.iter().any(|s| s.local == address));
        let local = doomed.local_addr().unwrap();
        let connected = list(diag.as_fd(), States::Connected).unwrap();
        let found: Vec<_> =
            connected.iter().filter(|s| s.local == local && s.remote == address).collect();
        assert_eq!(found.len(), 1, "{connected:?}");
        assert!(found[0].is_loopback());
        assert!(destroy(diag.as_fd(), found[0]).unwrap());
        assert!(!destroy(diag.as_fd(), found[0]).unwrap(), "it has gone already");

        let error = doomed.read(&mut [0; 1]).expect_err("its owner is told");
        assert_eq!(error.kind(), io::ErrorKind::ConnectionAborted);
        let error = doomed_peer.read(&mut [0; 1]).expect_err("its peer is told");
        assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
        kept.write_all(b"x").unwrap();
        kept_peer.read_exact(&mut [0; 1]).unwrap();
    }
}
