//! The addresses of a network namespace, by rtnetlink: what a pod really has, whatever the
//! API says.

use std::{io, net::IpAddr, os::fd::BorrowedFd};

use netlink_packet_core::{
    NLM_F_DUMP, NLM_F_REQUEST, NetlinkHeader, NetlinkMessage, NetlinkPayload, Parseable,
};
use netlink_packet_route::{
    RouteNetlinkMessage,
    address::{AddressAttribute, AddressMessage, AddressScope},
};

use super::netlink;

/// A dump that is changed under way is asked for again this often.
const ATTEMPTS: u32 = 3;
/// More addresses than this are not looked at: a pod may give itself any number.
const MAX_ADDRESSES: usize = 64;

/// A network namespace's addresses, in the kernel's order.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Addresses {
    /// Of global scope.
    pub global: Vec<IpAddr>,
    /// That mean something on one link only.
    pub link_local: Vec<IpAddr>,
}

/// Reads the addresses over a `NETLINK_ROUTE` socket made in the namespace.
///
/// # Errors
/// Of the socket, or where the dump keeps changing.
pub fn read(socket: BorrowedFd<'_>) -> io::Result<Addresses> {
    let request = request();
    for _ in 0..ATTEMPTS {
        let mut found = Addresses::default();
        let whole = netlink::exchange(socket, &request, |payload| {
            let Some((ip, scope)) = address_of(payload) else { return };
            let list = match scope {
                AddressScope::Universe => &mut found.global,
                AddressScope::Link => &mut found.link_local,
                _ => return,
            };
            if list.len() < MAX_ADDRESSES && !list.contains(&ip) {
                list.push(ip);
            }
        })?;
        if whole {
            return Ok(found);
        }
    }
    Err(io::Error::new(io::ErrorKind::Interrupted, "the addresses change while they are read"))
}

fn request() -> Vec<u8> {
    let mut header = NetlinkHeader::default();
    header.flags = NLM_F_REQUEST | NLM_F_DUMP;
    header.sequence_number = 1;
    let message = RouteNetlinkMessage::GetAddress(AddressMessage::default());
    let mut message = NetlinkMessage::new(header, NetlinkPayload::from(message));
    message.finalize();
    let mut bytes = vec![0; message.buffer_len()];
    message.serialize(&mut bytes);
    bytes
}

/// The address in an `RTM_NEWADDR`, and its scope.
fn address_of(payload: &[u8]) -> Option<(IpAddr, AddressScope)> {
    let message = AddressMessage::parse(payload).ok()?;
    // IFA_LOCAL is the own one on point-to-point links, where IFA_ADDRESS is the peer's.
    let local = message.attributes.iter().find_map(|a| match a {
        AddressAttribute::Local(ip) => Some(*ip),
        _ => None,
    });
    let address = local.or_else(|| {
        message.attributes.iter().find_map(|a| match a {
            AddressAttribute::Address(ip) => Some(*ip),
            _ => None,
        })
    });
    Some((address?, message.header.scope))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::netns::{NetnsFd, NetnsOpener};
    use std::{os::fd::AsFd, sync::Arc};

    #[tokio::test]
    async fn loopback_is_not_global() {
        if !rustix::process::geteuid().is_root() {
            return;
        }
        let opener = NetnsOpener::start().unwrap();
        let here = Arc::new(NetnsFd::of_this_process().unwrap());
        let socket = opener.netlink(&here, libc::NETLINK_ROUTE as isize).await.unwrap();
        let found = read(socket.as_fd()).unwrap().global;
        assert!(!found.iter().any(IpAddr::is_loopback), "{found:?}");
        // What the kernel itself lists: every one of ours is in there.
        let fib = std::fs::read_to_string("/proc/net/fib_trie").unwrap();
        for ip in found.iter().filter(|ip| ip.is_ipv4()) {
            assert!(fib.contains(&ip.to_string()), "{ip} is not in /proc/net/fib_trie");
        }
    }
}
