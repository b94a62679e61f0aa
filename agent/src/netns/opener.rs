//! The one thread that enters network namespaces.

use std::{
    io,
    net::SocketAddr,
    os::fd::{AsFd, OwnedFd},
    sync::{Arc, Weak, mpsc},
    thread,
    time::{Duration, Instant},
};

use rustix::{
    net::{
        AddressFamily, Protocol, SocketFlags, SocketType, bind, ipproto, listen, socket_with,
        sockopt,
    },
    thread::{LinkNameSpaceType, move_into_link_name_space},
};
use tokio::sync::oneshot;

use super::{NetnsFd, cookie_here, stock::Fill};

/// Opens sockets inside pods' network namespaces; clones share one thread.
///
/// The sockets belong to the agent's cgroup (so its own programs see them, the workloads'
/// do not) and to the pod's network.
#[derive(Clone)]
pub struct NetnsOpener {
    requests: mpsc::Sender<Request>,
}

/// What the thread is asked for.
enum Request {
    /// Learn the cookie of a namespace.
    Adopt(OwnedFd, oneshot::Sender<io::Result<NetnsFd>>),
    /// Make a socket.
    Socket(Arc<NetnsFd>, Make, oneshot::Sender<io::Result<OwnedFd>>),
    /// Make TCP sockets in advance, of IPv6 or not.
    Stock(Arc<NetnsFd>, bool),
}

/// Which socket.
enum Make {
    Tcp { ipv6: bool },
    Listener { address: SocketAddr, backlog: u32 },
    Netlink { protocol: u32 },
}

impl NetnsOpener {
    /// Starts the thread.
    ///
    /// # Errors
    /// Where no thread can be made.
    pub fn start() -> io::Result<Self> {
        let (requests, queue) = mpsc::channel();
        thread::Builder::new().name("netns".into()).spawn(move || serve(&queue))?;
        Ok(Self { requests })
    }

    /// Turns an open `/proc/<pid>/ns/net` into a [`NetnsFd`] by asking a socket in it for
    /// the cookie.
    pub async fn adopt(&self, fd: OwnedFd) -> io::Result<NetnsFd> {
        let (reply, answer) = oneshot::channel();
        self.send(Request::Adopt(fd, reply))?;
        answer.await.map_err(|_| stopped())?
    }

    /// A TCP socket, non-blocking, close-on-exec and without delay of small segments, neither
    /// bound nor connected. Where flows are many, it was made in advance.
    pub async fn tcp_socket(&self, netns: &Arc<NetnsFd>, ipv6: bool) -> io::Result<OwnedFd> {
        let (ready, fill) = netns.stock.take(ipv6);
        let made = match ready {
            Some(socket) => Ok(socket),
            None => self.make(netns, Make::Tcp { ipv6 }).await,
        };
        // After it: whoever waits does not wait for those of others.
        if fill == Fill::Wanted {
            self.send(Request::Stock(netns.clone(), ipv6))?;
        }
        made
    }

    /// A listening TCP socket, non-blocking and close-on-exec; port 0 takes a free one.
    /// IPv6 listeners take IPv6 only; nothing may share the port.
    pub async fn tcp_listener(
        &self,
        netns: &Arc<NetnsFd>,
        address: SocketAddr,
        backlog: u32,
    ) -> io::Result<OwnedFd> {
        self.make(netns, Make::Listener { address, backlog }).await
    }

    /// A raw netlink socket of `protocol`, close-on-exec, blocking with a timeout of one
    /// second: dumps are answered by the kernel at once.
    pub async fn netlink(&self, netns: &Arc<NetnsFd>, protocol: isize) -> io::Result<OwnedFd> {
        let protocol = u32::try_from(protocol).map_err(|_| io::ErrorKind::InvalidInput)?;
        self.make(netns, Make::Netlink { protocol }).await
    }

    async fn make(&self, netns: &Arc<NetnsFd>, make: Make) -> io::Result<OwnedFd> {
        let (reply, answer) = oneshot::channel();
        self.send(Request::Socket(netns.clone(), make, reply))?;
        answer.await.map_err(|_| stopped())?
    }

    fn send(&self, request: Request) -> io::Result<()> {
        self.requests.send(request).map_err(|_| stopped())
    }
}

fn stopped() -> io::Error {
    io::Error::other("the thread that enters network namespaces has ended")
}

/// How often shelves are looked at that may have to be emptied.
const TIDY_EVERY: Duration = Duration::from_secs(2);

/// Serves requests until every [`NetnsOpener`] is gone.
fn serve(queue: &mpsc::Receiver<Request>) {
    let mut stocked: Vec<Weak<NetnsFd>> = Vec::new();
    let mut due = Instant::now();
    // Whoever asked may have given up meanwhile: a failed reply only closes the socket.
    loop {
        let wait = if stocked.is_empty() { Duration::MAX } else { TIDY_EVERY };
        let request = match queue.recv_timeout(wait) {
            Ok(request) => Some(request),
            Err(mpsc::RecvTimeoutError::Timeout) => None,
            Err(mpsc::RecvTimeoutError::Disconnected) => return,
        };
        if Instant::now() >= due {
            stocked.retain(|netns| netns.upgrade().is_some_and(|netns| netns.stock.tidy()));
            due = Instant::now() + TIDY_EVERY;
        }
        let Some(request) = request else { continue };
        match request {
            Request::Adopt(fd, reply) => {
                let result = enter(&fd).and_then(|()| cookie_here());
                let _ = reply.send(result.map(|cookie| NetnsFd::new(fd, cookie)));
            }
            Request::Socket(netns, make, reply) => {
                let _ = reply.send(enter(&netns.fd).and_then(|()| open(&make)));
            }
            Request::Stock(netns, ipv6) => {
                // An error is met again, and told, by who finds none.
                let made = enter(&netns.fd).map(|()| {
                    let each = (0..netns.stock.wanted(ipv6)).map(|_| open(&Make::Tcp { ipv6 }));
                    each.map_while(Result::ok).collect()
                });
                netns.stock.fill(ipv6, made.unwrap_or_default());
                if !stocked.iter().any(|known| known.as_ptr() == Arc::as_ptr(&netns)) {
                    stocked.push(Arc::downgrade(&netns));
                }
            }
        }
    }
}

/// Moves this thread. It is never moved back: every request enters its own namespace.
fn enter(netns: &OwnedFd) -> io::Result<()> {
    Ok(move_into_link_name_space(netns.as_fd(), Some(LinkNameSpaceType::Network))?)
}

fn open(make: &Make) -> io::Result<OwnedFd> {
    match *make {
        Make::Tcp { ipv6 } => {
            let socket = tcp(if ipv6 { AddressFamily::INET6 } else { AddressFamily::INET })?;
            sockopt::set_tcp_nodelay(&socket, true)?;
            Ok(socket)
        }
        Make::Listener { address, backlog } => {
            let family = if address.is_ipv6() { AddressFamily::INET6 } else { AddressFamily::INET };
            let socket = tcp(family)?;
            if address.is_ipv6() {
                sockopt::set_ipv6_v6only(&socket, true)?;
            }
            bind(&socket, &address)?;
            listen(&socket, i32::try_from(backlog).unwrap_or(i32::MAX))?;
            Ok(socket)
        }
        Make::Netlink { protocol } => {
            let protocol = std::num::NonZeroU32::new(protocol).map(Protocol::from_raw);
            let socket = socket_with(
                AddressFamily::NETLINK,
                SocketType::RAW,
                SocketFlags::CLOEXEC,
                protocol,
            )?;
            sockopt::set_socket_timeout(
                &socket,
                sockopt::Timeout::Recv,
                Some(std::time::Duration::from_secs(1)),
            )?;
            Ok(socket)
        }
    }
}

fn tcp(family: AddressFamily) -> io::Result<OwnedFd> {
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    Ok(socket_with(family, SocketType::STREAM, flags, Some(ipproto::TCP))?)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Both halves need root: the sandbox of the tests has it, a developer's may not.
    fn is_root() -> bool {
        rustix::process::geteuid().is_root()
    }

    #[tokio::test]
    async fn sockets_are_made_in_the_namespace_that_was_asked_for() {
        if !is_root() {
            return;
        }
        let opener = NetnsOpener::start().unwrap();
        let (tx, rx) = mpsc::channel();
        let (hold, release) = mpsc::channel::<()>();
        // A thread of its own network namespace, to be entered from outside.
        let other = thread::spawn(move || {
            // SAFETY: a network namespace is the thread's own; files and memory stay shared.
            unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWNET) }
                .unwrap();
            let fd = std::fs::File::open("/proc/thread-self/ns/net").unwrap();
            tx.send(OwnedFd::from(fd)).unwrap();
            let _ = release.recv();
        });
        let here = Arc::new(NetnsFd::of_this_process().unwrap());
        let there = Arc::new(opener.adopt(rx.recv().unwrap()).await.unwrap());
        assert_ne!(here.cookie, there.cookie);

        let socket = opener.tcp_socket(&there, true).await.unwrap();
        assert_eq!(super::super::cookie_of_socket(socket.as_fd()).unwrap(), there.cookie);
        let socket = opener.tcp_socket(&here, false).await.unwrap();
        assert_eq!(super::super::cookie_of_socket(socket.as_fd()).unwrap(), here.cookie);

        // What was made in advance belongs there as well.
        let made: Vec<OwnedFd> = {
            let mut made = Vec::new();
            for _ in 0..50 {
                made.push(opener.tcp_socket(&there, true).await.unwrap());
            }
            made
        };
        for socket in &made {
            assert_eq!(super::super::cookie_of_socket(socket.as_fd()).unwrap(), there.cookie);
        }

        // A port that is taken here is free there.
        let listener = opener.tcp_listener(&here, "0.0.0.0:0".parse().unwrap(), 16).await.unwrap();
        let address = socket2::SockRef::from(&listener).local_addr().unwrap();
        let address = address.as_socket().unwrap();
        let error = opener.tcp_listener(&here, address, 16).await.expect_err("taken here");
        assert_eq!(error.kind(), io::ErrorKind::AddrInUse);
        opener.tcp_listener(&there, address, 16).await.expect("free there");
        drop(hold);
        other.join().unwrap();
    }
}
