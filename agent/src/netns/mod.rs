//! Network namespaces: descriptors that name them, and the one thread that enters them.
//!
//! A socket belongs for ever to the namespace in which it was made, so everything that the
//! agent does inside a pod's network is: make the socket there, use it here.
//! [`NetnsOpener`] owns the only thread of the process that calls `setns`.

pub mod addresses;
pub mod links;
pub mod netlink;
mod opener;
mod stock;

pub use opener::NetnsOpener;

use std::{
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
};

/// A network namespace.
///
/// Holding one keeps the namespace alive: drop it when the pod is gone.
#[derive(Debug)]
pub struct NetnsFd {
    /// An open `/proc/<pid>/ns/net`.
    pub fd: OwnedFd,
    /// The namespace's cookie: unique since boot, never re-used.
    pub cookie: u64,
    /// Sockets made in advance.
    stock: stock::Stock,
}

impl NetnsFd {
    /// The network namespace that this process runs in.
    ///
    /// # Errors
    /// Where `/proc/self/ns/net` cannot be opened or the kernel is older than 5.14.
    pub fn of_this_process() -> io::Result<Self> {
        let fd = OwnedFd::from(std::fs::File::open("/proc/self/ns/net")?);
        Ok(Self::new(fd, cookie_here()?))
    }

    fn new(fd: OwnedFd, cookie: u64) -> Self {
        Self { fd, cookie, stock: stock::Stock::default() }
    }

    /// (device, inode): equal for two descriptors of one live namespace. Inodes are re-used
    /// after a namespace's end, cookies are not.
    pub fn inode(&self) -> io::Result<(u64, u64)> {
        inode(self.fd.as_fd())
    }
}

/// (device, inode) of a namespace's descriptor.
pub fn inode(fd: BorrowedFd<'_>) -> io::Result<(u64, u64)> {
    let stat = rustix::fs::fstat(fd)?;
    Ok((stat.st_dev, stat.st_ino))
}

/// The cookie of the calling thread's network namespace.
fn cookie_here() -> io::Result<u64> {
    let socket = rustix::net::socket_with(
        rustix::net::AddressFamily::UNIX,
        rustix::net::SocketType::DGRAM,
        rustix::net::SocketFlags::CLOEXEC,
        None,
    )?;
    cookie_of_socket(socket.as_fd())
}

/// The cookie of a socket's network namespace (`SO_NETNS_COOKIE`, Linux 5.14).
pub fn cookie_of_socket(socket: BorrowedFd<'_>) -> io::Result<u64> {
    let mut cookie = 0u64;
    let mut len = size_of::<u64>() as libc::socklen_t;
    // SAFETY: the buffer is a u64 and `len` says so; the descriptor is open.
    let r = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_NETNS_COOKIE,
            (&raw mut cookie).cast(),
            &raw mut len,
        )
    };
    if r != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(cookie)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn own_namespace_has_one_cookie() {
        let a = NetnsFd::of_this_process().unwrap();
        let b = NetnsFd::of_this_process().unwrap();
        assert_ne!(a.cookie, 0);
        assert_eq!(a.cookie, b.cookie);
        assert_eq!(a.inode().unwrap(), b.inode().unwrap());
    }
}
