//! An endpoint's listeners: opened here inside the pod's network namespace, served by the
//! proxy.

use std::{
    io,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr},
    os::fd::OwnedFd,
    sync::Arc,
    time::Duration,
};

use super::state::EndpointKey;
use crate::netns::{NetnsFd, NetnsOpener};

/// How many consecutive ports on `::1` the outbound side listens on: IPv6 has one loopback
/// address, and one destination address limits a pod to some 28,000 concurrent flows.
pub const OUTBOUND_PORTS_V6: u16 = 4;

/// Ports that outbound listeners are picked from: below Linux's default range of ephemeral
/// ports (32768 on), so a pod's own sockets never meet them by chance.
const OUTBOUND_PORTS: std::ops::Range<u16> = 20_000..30_000;

/// How many ports are tried before the pod is said to have none free.
const ATTEMPTS: u16 = 64;

/// Tells the proxy which listeners to serve; sent by the reconciler.
#[derive(Debug)]
pub enum ListenerCommand {
    /// Serve these from now on. They are bound and listening.
    Serve {
        /// Whose they are.
        key: EndpointKey,
        /// The pod's network namespace.
        netns: Arc<NetnsFd>,
        /// Redirected clients arrive here.
        outbound: Vec<OwnedFd>,
        /// Tunnels arrive here.
        inbound: Vec<OwnedFd>,
    },
    /// Accept nothing more for this endpoint, and close its flows after `drain`.
    Stop {
        /// Whose they are.
        key: EndpointKey,
        /// How long open flows may go on.
        drain: Duration,
    },
}

/// An endpoint's listeners, open and not yet handed over.
#[derive(Debug)]
pub struct Listeners {
    /// Redirected clients arrive here.
    pub outbound: Vec<OwnedFd>,
    /// Tunnels arrive here, by family.
    pub inbound_v4: Option<OwnedFd>,
    /// Tunnels over IPv6 arrive here.
    pub inbound_v6: Option<OwnedFd>,
    /// The ports of the outbound ones.
    pub ports: OutboundPorts,
}

impl Listeners {
    /// The same listeners once more: they are open until both are closed.
    ///
    /// # Errors
    /// Where the process has no descriptors left.
    pub fn try_clone(&self) -> io::Result<Self> {
        let again = |fd: &Option<OwnedFd>| fd.as_ref().map(OwnedFd::try_clone).transpose();
        Ok(Self {
            outbound: self.outbound.iter().map(OwnedFd::try_clone).collect::<io::Result<_>>()?,
            inbound_v4: again(&self.inbound_v4)?,
            inbound_v6: again(&self.inbound_v6)?,
            ports: self.ports,
        })
    }

    /// All of them: outbound ones, then the inbound one of IPv4, then that of IPv6.
    pub fn all(&self) -> impl Iterator<Item = &OwnedFd> {
        self.outbound.iter().chain(&self.inbound_v4).chain(&self.inbound_v6)
    }
}

/// Where the outbound listeners are, for the kernel to redirect to.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct OutboundPorts {
    /// Port on every IPv4 address, 0 for none.
    pub v4: u16,
    /// First of [`OUTBOUND_PORTS_V6`] ports on `::1`, 0 for none.
    pub v6: u16,
}

impl OutboundPorts {
    /// How many ports there are from `v6` on.
    pub fn v6_count(self) -> u16 {
        if self.v6 == 0 { 0 } else { OUTBOUND_PORTS_V6 }
    }
}

/// Opens an endpoint's listeners.
///
/// Outbound ones are on every IPv4 address (so that all of 127/8 answers) and on `::1`;
/// inbound ones on loopback addresses only: packets from outside reach them by sk_lookup
/// alone. A family that the namespace does not have is left out.
///
/// # Errors
/// Where neither family can be served, or every port that was tried is taken.
pub async fn open(
    opener: &NetnsOpener,
    netns: &Arc<NetnsFd>,
    backlog: u32,
) -> io::Result<Listeners> {
    let v4 = absent_as_none(open_v4(opener, netns, backlog).await)?;
    let v6 = absent_as_none(open_v6(opener, netns, backlog).await)?;
    if v4.is_none() && v6.is_none() {
        return Err(io::Error::new(
            io::ErrorKind::AddrNotAvailable,
            "the pod's network namespace has neither 127.0.0.1 nor ::1 (is its lo up?)",
        ));
    }
    let mut listeners = Listeners {
        outbound: Vec::new(),
        inbound_v4: None,
        inbound_v6: None,
        ports: OutboundPorts::default(),
    };
    if let Some((port, outbound, inbound)) = v4 {
        listeners.ports.v4 = port;
        listeners.outbound.push(outbound);
        listeners.inbound_v4 = Some(inbound);
    }
    if let Some((port, outbound, inbound)) = v6 {
        listeners.ports.v6 = port;
        listeners.outbound.extend(outbound);
        listeners.inbound_v6 = Some(inbound);
    }
    Ok(listeners)
}

async fn open_v4(
    opener: &NetnsOpener,
    netns: &Arc<NetnsFd>,
    backlog: u32,
) -> io::Result<(u16, OwnedFd, OwnedFd)> {
    let loopback = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
    let inbound = opener.tcp_listener(netns, loopback, backlog).await?;
    for port in candidates(netns.cookie, 1) {
        let wildcard = SocketAddr::from((Ipv4Addr::UNSPECIFIED, port));
        match opener.tcp_listener(netns, wildcard, backlog).await {
            Ok(outbound) => return Ok((port, outbound, inbound)),
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => {}
            Err(error) => return Err(error),
        }
    }
    Err(no_port())
}

async fn open_v6(
    opener: &NetnsOpener,
    netns: &Arc<NetnsFd>,
    backlog: u32,
) -> io::Result<(u16, Vec<OwnedFd>, OwnedFd)> {
    let loopback = SocketAddr::from((Ipv6Addr::LOCALHOST, 0));
    let inbound = opener.tcp_listener(netns, loopback, backlog).await?;
    'candidate: for first in candidates(netns.cookie, OUTBOUND_PORTS_V6) {
        let mut outbound = Vec::with_capacity(usize::from(OUTBOUND_PORTS_V6));
        for port in first..first + OUTBOUND_PORTS_V6 {
            let address = SocketAddr::from((Ipv6Addr::LOCALHOST, port));
            match opener.tcp_listener(netns, address, backlog).await {
                Ok(listener) => outbound.push(listener),
                Err(error) if error.kind() == io::ErrorKind::AddrInUse => continue 'candidate,
                Err(error) => return Err(error),
            }
        }
        return Ok((first, outbound, inbound));
    }
    Err(no_port())
}

fn no_port() -> io::Error {
    io::Error::new(
        io::ErrorKind::AddrInUse,
        format!(
            "no free port for the agent's listeners in the pod ({ATTEMPTS} of {}-{} were tried)",
            OUTBOUND_PORTS.start, OUTBOUND_PORTS.end
        ),
    )
}

/// The ports to try, spread by the namespace: whoever guesses one pod's port has not
/// guessed the next one's.
fn candidates(cookie: u64, stride: u16) -> impl Iterator<Item = u16> {
    let slots = (OUTBOUND_PORTS.end - OUTBOUND_PORTS.start) / stride;
    // Fibonacci hashing: any odd constant near 2^64/phi spreads consecutive cookies.
    let start = (cookie.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 48) as u16;
    (0..ATTEMPTS).map(move |i| {
        let slot = (u32::from(start) + u32::from(i) * 37) % u32::from(slots);
        // In range: slot < slots, so start + slot * stride < end.
        OUTBOUND_PORTS.start + slot as u16 * stride
    })
}

/// A family that the namespace lacks is no error.
fn absent_as_none<T>(result: io::Result<T>) -> io::Result<Option<T>> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(error)
            if error.kind() == io::ErrorKind::AddrNotAvailable
                || error.raw_os_error() == Some(libc::EAFNOSUPPORT) =>
        {
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn candidates_stay_in_range_and_differ(cookie: u64, stride in 1u16..=8) {
            let ports: Vec<u16> = candidates(cookie, stride).collect();
            prop_assert_eq!(ports.len(), usize::from(ATTEMPTS));
            for &port in &ports {
                prop_assert!(OUTBOUND_PORTS.contains(&port));
                prop_assert!(OUTBOUND_PORTS.contains(&(port + stride - 1)));
            }
            let distinct: std::collections::HashSet<_> = ports.iter().collect();
            prop_assert_eq!(distinct.len(), ports.len());
        }
    }

    #[tokio::test]
    async fn listeners_open_in_this_namespace() {
        if !rustix::process::geteuid().is_root() {
            return;
        }
        let opener = NetnsOpener::start().unwrap();
        let netns = Arc::new(NetnsFd::of_this_process().unwrap());
        let first = open(&opener, &netns, 64).await.unwrap();
        assert!(OUTBOUND_PORTS.contains(&first.ports.v4));
        // The same namespace again: the ports of the first are taken, others are found.
        let second = open(&opener, &netns, 64).await.unwrap();
        assert_ne!(first.ports.v4, second.ports.v4);
        assert_eq!(
            first.outbound.len(),
            1 + usize::from(first.ports.v6_count()),
            "one for IPv4, {OUTBOUND_PORTS_V6} for IPv6 where there is any"
        );
    }
}
