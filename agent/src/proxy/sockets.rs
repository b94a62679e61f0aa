//! Sockets inside pods' network namespaces, and the addresses that travel with them.

use std::{
    future::Future,
    io,
    net::SocketAddr,
    os::fd::{BorrowedFd, OwnedFd},
    pin::Pin,
    sync::Arc,
};

use signet_ebpf::abi::FlowKey;

use crate::{
    kernel::{Confirm, FlowSockets, KernelError},
    netns::{NetnsFd, NetnsOpener},
};

/// A socket that is being made.
pub type Opening = Pin<Box<dyn Future<Output = io::Result<OwnedFd>> + Send>>;

/// What the data plane asks of the kernel, as functions: tests of the plane give it
/// loopback sockets and a table, where the real one needs programs and namespaces.
#[derive(Clone)]
pub struct PodSockets {
    /// A non-blocking TCP socket in a pod's namespace, neither bound nor connected.
    pub tcp: Arc<dyn Fn(&Arc<NetnsFd>, bool) -> Opening + Send + Sync>,
    /// What the client of an accepted outbound socket dialled.
    pub original: Arc<dyn Fn(BorrowedFd<'_>) -> Option<SocketAddr> + Send + Sync>,
    /// Hands a client's address to the application that a socket is about to dial.
    pub set_client:
        Arc<dyn Fn(BorrowedFd<'_>, SocketAddr) -> Result<(), KernelError> + Send + Sync>,
    /// Whether the application's socket has it.
    pub confirm: Arc<dyn Fn(&FlowKey) -> Confirm + Send + Sync>,
    /// Takes it back after a dial that failed.
    pub forget: Arc<dyn Fn(&FlowKey) + Send + Sync>,
}

impl PodSockets {
    /// The kernel's.
    pub fn kernel(opener: NetnsOpener, sockets: Arc<FlowSockets>) -> Self {
        let (s1, s2, s3, s4) = (sockets.clone(), sockets.clone(), sockets.clone(), sockets);
        Self {
            tcp: Arc::new(move |netns, ipv6| {
                let (opener, netns) = (opener.clone(), netns.clone());
                Box::pin(async move { opener.tcp_socket(&netns, ipv6).await })
            }),
            original: Arc::new(move |fd| s1.original(fd)),
            set_client: Arc::new(move |fd, client| s2.set_client(fd, client)),
            confirm: Arc::new(move |key| s3.confirm_client(key)),
            forget: Arc::new(move |key| s4.forget_client(key)),
        }
    }
}
