//! The node's ends of a pod's links, by rtnetlink in the node's own network namespace.
//!
//! What a pod says of its links is not asked: it may make any. The node's devices name the
//! namespace of their other ends by a number that the kernel gives.

use std::{
    io,
    os::fd::{AsRawFd, BorrowedFd},
};

use netlink_packet_core::{
    NLM_F_DUMP, NLM_F_REQUEST, NetlinkHeader, NetlinkMessage, NetlinkPayload, Parseable,
};
use netlink_packet_route::{
    RouteNetlinkMessage,
    link::{InfoKind, LinkAttribute, LinkInfo, LinkMessage},
    nsid::{NsidAttribute, NsidMessage},
};

use super::netlink;

/// A dump that is changed under way is asked for again this often.
const ATTEMPTS: u32 = 3;
/// More ends than this of one pod are not looked at.
const MAX_ENDS: usize = 16;

/// Interface numbers of the node's veth devices whose other ends are in the network namespace
/// `pod`, over a `NETLINK_ROUTE` socket made in the node's.
///
/// # Errors
/// Of the socket, or where the dump keeps changing.
pub fn host_ends(host: BorrowedFd<'_>, pod: BorrowedFd<'_>) -> io::Result<Vec<u32>> {
    let Some(number) = number_of(host, pod)? else { return Ok(Vec::new()) };
    let request = request(RouteNetlinkMessage::GetLink(LinkMessage::default()), NLM_F_DUMP);
    for _ in 0..ATTEMPTS {
        let mut ends = Vec::new();
        let whole = netlink::exchange(host, &request, |payload| {
            if ends.len() < MAX_ENDS
                && let Some((interface, peer)) = veth_of(payload)
                && peer == number
            {
                ends.push(interface);
            }
        })?;
        if whole {
            return Ok(ends);
        }
    }
    Err(io::Error::new(io::ErrorKind::Interrupted, "the links change while they are read"))
}

/// The number that the node's namespace has for another one; `None` where it has none, because
/// no link leads there.
fn number_of(host: BorrowedFd<'_>, other: BorrowedFd<'_>) -> io::Result<Option<i32>> {
    // Descriptors are never negative.
    let fd = other.as_raw_fd().unsigned_abs();
    let mut message = NsidMessage::default();
    message.attributes.push(NsidAttribute::Fd(fd));
    let request = request(RouteNetlinkMessage::GetNsId(message), 0);
    let mut number = None;
    netlink::exchange(host, &request, |payload| {
        let Ok(message) = NsidMessage::parse(payload) else { return };
        number = message.attributes.iter().find_map(|attribute| match attribute {
            NsidAttribute::Id(number) if *number >= 0 => Some(*number),
            _ => None,
        });
    })?;
    Ok(number)
}

/// A veth device's number and the number of its other end's namespace.
fn veth_of(payload: &[u8]) -> Option<(u32, i32)> {
    let message = LinkMessage::parse(payload).ok()?;
    let is_veth = message.attributes.iter().any(|attribute| {
        matches!(attribute, LinkAttribute::LinkInfo(infos)
            if infos.iter().any(|info| matches!(info, LinkInfo::Kind(InfoKind::Veth))))
    });
    let peer = message.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::LinkNetNsId(number) => Some(*number),
        _ => None,
    });
    is_veth.then_some((message.header.index, peer?))
}

fn request(message: RouteNetlinkMessage, flags: u16) -> Vec<u8> {
    let mut header = NetlinkHeader::default();
    header.flags = NLM_F_REQUEST | flags;
    header.sequence_number = 1;
    let mut message = NetlinkMessage::new(header, NetlinkPayload::from(message));
    message.finalize();
    let mut bytes = vec![0; message.buffer_len()];
    message.serialize(&mut bytes);
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::netns::{NetnsFd, NetnsOpener};
    use std::{os::fd::AsFd, sync::Arc};

    #[tokio::test]
    async fn no_link_leads_from_a_namespace_to_itself() {
        if !rustix::process::geteuid().is_root() {
            return;
        }
        let opener = NetnsOpener::start().unwrap();
        let here = Arc::new(NetnsFd::of_this_process().unwrap());
        let socket = opener.netlink(&here, libc::NETLINK_ROUTE as isize).await.unwrap();
        // Real pods' ends are found in the end-to-end tests.
        assert_eq!(host_ends(socket.as_fd(), here.fd.as_fd()).unwrap(), [0u32; 0]);
    }
}
