//! Judging direct (untunnelled) TCP flows again: the kernel's own verdict, over the applied
//! tables, for the sockets that a pod has open. The proxy judges tunnelled ones itself.

use std::{collections::HashSet, net::SocketAddr, os::fd::BorrowedFd};

use signet_ebpf::{
    abi::{
        AddressEntry, Config, ExemptKey, FlowKey, Ip, OwnAddressKey, PodEntry, PolicyKey,
        PolicyValue, Reason, ServiceKey, TUNNEL_PORT, proto,
    },
    decide::{Action, Decision, Flow, PolicyMaps, decide_egress, decide_ingress},
};

use super::tables::Tables;
use crate::kernel::{
    KernelError, clock,
    destroy::{self, States, TcpSocket},
    maps::Table,
};

/// Which flows to close.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Close {
    /// Everything that leaves the pod: made before it was registered.
    Everything,
    /// Those that a policy refuses now.
    Denied,
    /// Those that would be refused or tunnelled if they were dialled now.
    NotAsDialledNow,
}

/// A flow that was closed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Closed {
    /// The pod's side.
    pub local: SocketAddr,
    /// The other side.
    pub remote: SocketAddr,
    /// True when the pod was dialled.
    pub ingress: bool,
    /// Why.
    pub reason: Reason,
}

/// The applied tables as the verdict reads them.
pub struct Verdicts<'a> {
    tables: &'a Tables,
    attested: &'a HashSet<FlowKey>,
}

impl<'a> Verdicts<'a> {
    /// Over `tables` and the flows that the node's recording program attests as probes.
    pub fn new(tables: &'a Tables, attested: &'a HashSet<FlowKey>) -> Self {
        Self { tables, attested }
    }
}

/// How flows are closed.
pub enum Means<'a> {
    /// Their sockets are destroyed: both sides are told at once.
    Destroy,
    /// The kernel cannot destroy sockets: cgroup_skb drops whatever they still send or
    /// receive, and both sides find out by their own time-outs.
    Cut(&'a mut Table<FlowKey, u64>),
}

/// Closes what `close` says among the connected sockets of the namespace `netns`, over a
/// sock_diag socket made there. Sockets of the cgroup `agent` are the agent's own. Flows
/// that were cut before are not closed again.
///
/// # Errors
/// Where sockets cannot be listed, destroyed or cut.
pub fn close(
    diag: BorrowedFd<'_>,
    netns: u64,
    agent: u64,
    verdicts: &Verdicts<'_>,
    close: Close,
    means: &mut Means<'_>,
) -> Result<Vec<Closed>, KernelError> {
    let mut closed = Vec::new();
    for (socket, flow) in losing(diag, netns, agent, verdicts, close)? {
        let done = match means {
            Means::Destroy => destroy::destroy(diag, &socket)?,
            Means::Cut(table) => table.add(cut_key(netns, &socket), clock::monotonic())?,
        };
        if done {
            closed.push(flow);
        }
    }
    Ok(closed)
}

/// What [`close`] would close; it is left open.
///
/// # Errors
/// Where sockets cannot be listed.
pub fn survey(
    diag: BorrowedFd<'_>,
    netns: u64,
    agent: u64,
    verdicts: &Verdicts<'_>,
    close: Close,
) -> Result<Vec<Closed>, KernelError> {
    let losing = losing(diag, netns, agent, verdicts, close)?;
    Ok(losing.into_iter().map(|(_, flow)| flow).collect())
}

/// The sockets that `close` is about.
fn losing(
    diag: BorrowedFd<'_>,
    netns: u64,
    agent: u64,
    verdicts: &Verdicts<'_>,
    close: Close,
) -> Result<Vec<(TcpSocket, Closed)>, KernelError> {
    let listening: HashSet<u16> =
        destroy::list(diag, States::Listening)?.iter().map(|socket| socket.local.port()).collect();
    let mut found = Vec::new();
    for socket in destroy::list(diag, States::Connected)? {
        if socket.is_loopback() || is_agents(&socket, agent) {
            continue;
        }
        let ingress = listening.contains(&socket.local.port());
        let Some(reason) = verdicts.loses(netns, &socket, ingress, close) else { continue };
        let flow = Closed { local: socket.local, remote: socket.remote, ingress, reason };
        found.push((socket, flow));
    }
    Ok(found)
}

/// Forgets the cut flows of `netns` whose sockets are gone: among `rows`, the table's keys.
///
/// # Errors
/// Where sockets cannot be listed or a row not be removed.
pub fn forget_cut(
    diag: BorrowedFd<'_>,
    netns: u64,
    rows: &[FlowKey],
    table: &mut Table<FlowKey, u64>,
) -> Result<(), KernelError> {
    let open: HashSet<FlowKey> = destroy::list(diag, States::Connected)?
        .iter()
        .map(|socket| cut_key(netns, socket))
        .collect();
    for key in rows.iter().filter(|key| key.netns == netns && !open.contains(key)) {
        table.remove(key)?;
    }
    Ok(())
}

/// The flow as cgroup_skb sees it.
fn cut_key(netns: u64, socket: &TcpSocket) -> FlowKey {
    FlowKey {
        netns,
        local: Ip::from_std(socket.local.ip()),
        remote: Ip::from_std(socket.remote.ip()),
        local_port: socket.local.port(),
        remote_port: socket.remote.port(),
        family: 0,
    }
}

/// True for the agent's tunnels in the pod's namespace: by their cgroup, or by their port
/// where the kernel does not tell cgroups.
fn is_agents(socket: &TcpSocket, agent: u64) -> bool {
    match socket.cgroup {
        Some(cgroup) => cgroup == agent,
        None => socket.local.port() == TUNNEL_PORT || socket.remote.port() == TUNNEL_PORT,
    }
}

impl Verdicts<'_> {
    /// Why the flow is to be closed, if it is.
    fn loses(&self, netns: u64, socket: &TcpSocket, ingress: bool, close: Close) -> Option<Reason> {
        if close == Close::Everything {
            return Some(Reason::PodUnregistered);
        }
        let decision = self.decide(netns, socket, ingress);
        let by_policy = matches!(
            decision.reason,
            Reason::PolicyDeny | Reason::PolicyNoMatch | Reason::PolicyUnsupported
        );
        match decision.action {
            Action::Refuse if close == Close::NotAsDialledNow || by_policy => Some(decision.reason),
            // It reached the application past the judge of its requests. (Where the kernel tells
            // no cgroup, the judge's own sockets cannot be told from the application's.)
            Action::Tunnel if ingress && socket.cgroup.is_some() => Some(Reason::RightWithdrawn),
            // It is in clear, and would not be any more.
            Action::Tunnel if close == Close::NotAsDialledNow => Some(Reason::PlaintextRefused),
            _ => None,
        }
    }

    fn decide(&self, netns: u64, socket: &TcpSocket, ingress: bool) -> Decision {
        let flow = Flow {
            netns,
            task_netns: netns,
            local: Ip::from_std(socket.local.ip()),
            remote: Ip::from_std(socket.remote.ip()),
            local_port: socket.local.port(),
            remote_port: socket.remote.port(),
            protocol: proto::TCP,
            steerable: true,
            now: clock::monotonic(),
        };
        if ingress { decide_ingress(self, &flow) } else { decide_egress(self, &flow) }
    }
}

impl PolicyMaps for Verdicts<'_> {
    fn config(&self) -> Option<&Config> {
        Some(&self.tables.config)
    }

    fn pod(&self, netns: u64) -> Option<&PodEntry> {
        self.tables.pods.get(&netns)
    }

    fn is_own(&self, netns: u64, ip: Ip) -> bool {
        self.tables.own.contains_key(&OwnAddressKey { netns, ip })
    }

    fn address(&self, ip: Ip) -> Option<&AddressEntry> {
        self.tables.addresses.get(&ip)
    }

    fn service(&self, ip: Ip, port: u16, protocol: u8) -> Option<u32> {
        self.tables.services.get(&ServiceKey { ip, port, protocol, pad: 0 }).copied()
    }

    fn range(&self, ip: Ip) -> Option<u32> {
        let octets = ip.octets();
        self.tables
            .ranges
            .iter()
            .filter(|((bits, range), _)| shares_prefix(range, &octets, *bits))
            .max_by_key(|((bits, _), _)| *bits)
            .map(|(_, kind)| *kind)
    }

    fn policy(&self, netns: u64, bits: u32, key: &PolicyKey) -> Option<&PolicyValue> {
        let entries = self.tables.policies.get(&netns)?.as_ref()?;
        entries
            .iter()
            .filter(|(length, entry, _)| {
                *length <= bits && shares_prefix(&entry.0, &key.0, *length)
            })
            .max_by_key(|(length, ..)| *length)
            .map(|(.., value)| value)
    }

    fn is_exempt(&self, netns: u64, port: u16, protocol: u8) -> bool {
        self.tables.exempt.contains_key(&ExemptKey { netns, port, protocol, pad: [0; 5] })
    }

    fn is_probe(&self, flow: &Flow) -> bool {
        self.attested.contains(&FlowKey {
            netns: self.tables.config.host_netns,
            local: flow.remote,
            remote: flow.local,
            local_port: flow.remote_port,
            remote_port: flow.local_port,
            family: 0,
        })
    }
}

/// True when the first `bits` bits are equal.
fn shares_prefix(a: &[u8], b: &[u8], bits: u32) -> bool {
    let whole = (bits / 8) as usize;
    let rest = bits % 8;
    if a.get(..whole).is_none() || a.get(..whole) != b.get(..whole) {
        return false;
    }
    if rest == 0 {
        return true;
    }
    let mask = 0xffu8 << (8 - rest);
    matches!((a.get(whole), b.get(whole)), (Some(x), Some(y)) if x & mask == y & mask)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use signet_ebpf::abi::{Mode, address, range};
    use std::sync::Arc;

    #[test]
    fn prefixes() {
        assert!(shares_prefix(&[0b1010_0000], &[0b1011_1111], 3));
        assert!(!shares_prefix(&[0b1010_0000], &[0b1011_1111], 4));
        assert!(shares_prefix(&[1], &[2], 0));
        assert!(!shares_prefix(&[1], &[1], 9), "longer than the key");
    }

    proptest! {
        #[test]
        fn prefixes_agree_with_numbers(a: u32, b: u32, bits in 0u32..=32) {
            let wanted = bits == 0 || (a ^ b) >> (32 - bits) == 0;
            prop_assert_eq!(shares_prefix(&a.to_be_bytes(), &b.to_be_bytes(), bits), wanted);
        }
    }

    fn tables() -> Tables {
        let mut tables = Tables::default();
        tables.config.ranges_known = 1;
        let own = Ip::from_std("10.0.0.1".parse().unwrap());
        let peer = Ip::from_std("10.0.0.2".parse().unwrap());
        let entry = PodEntry { mode: Mode::Strict as u8, ip4: own, ..PodEntry::default() };
        tables.pods.insert(7, entry);
        tables.own.insert(OwnAddressKey { netns: 7, ip: own }, 1);
        let flags = address::ENROLLED | address::ENROLLABLE;
        tables
            .addresses
            .insert(peer, AddressEntry { identity: 300, kind: address::POD, flags, pad: 0 });
        tables
            .ranges
            .insert((96 + 8, Ip::from_std("10.0.0.0".parse().unwrap()).octets()), range::PODS);
        tables
    }

    fn socket(remote: &str) -> TcpSocket {
        TcpSocket::between("10.0.0.1:40000".parse().unwrap(), remote.parse().unwrap())
    }

    #[test]
    fn grace_ends_plaintext_and_spares_the_outside() {
        let (tables, attested) = (tables(), HashSet::new());
        let verdicts = Verdicts::new(&tables, &attested);
        let loses = |remote, ingress, close| verdicts.loses(7, &socket(remote), ingress, close);
        let now = Close::NotAsDialledNow;
        assert_eq!(loses("10.0.0.2:80", true, now), Some(Reason::PlaintextRefused));
        assert_eq!(loses("10.0.0.2:80", false, now), Some(Reason::PeerUnreachable));
        assert_eq!(loses("10.0.0.9:80", false, now), Some(Reason::IdentityUnknown));
        assert_eq!(loses("192.0.2.1:80", false, now), None, "outside the mesh, no policy");
        // Without the grace's end, plaintext goes on; a policy's word counts at once.
        assert_eq!(loses("10.0.0.2:80", true, Close::Denied), None);
        assert_eq!(loses("192.0.2.1:80", false, Close::Denied), None);
        assert_eq!(loses("192.0.2.1:80", false, Close::Everything), Some(Reason::PodUnregistered));
    }

    #[test]
    fn a_policy_takes_a_direct_flow_away() {
        let mut tables = tables();
        let attested = HashSet::new();
        let deny =
            PolicyValue { number: 3, reason: Reason::PolicyDeny as u16, ..PolicyValue::default() };
        let key = PolicyKey::rule(
            signet_ebpf::abi::Direction::Egress,
            signet_ebpf::abi::known::ADDRESS,
            proto::TCP,
            0,
            signet_ebpf::abi::IDENTITY_ANY,
            443,
        );
        tables.policies.insert(7, Some(Arc::new(vec![(112, key, deny)])));
        let verdicts = Verdicts::new(&tables, &attested);
        let loses = |remote| verdicts.loses(7, &socket(remote), false, Close::Denied);
        assert_eq!(loses("192.0.2.1:443"), Some(Reason::PolicyDeny));
        assert_eq!(loses("192.0.2.1:80"), None);
    }

    #[test]
    fn a_flow_that_the_judge_has_not_seen_is_closed() {
        let (mut tables, attested) = (tables(), HashSet::new());
        let flags = signet_ebpf::abi::pod::READY;
        let entry = tables.pods.get_mut(&7).unwrap();
        (entry.mode, entry.flags) = (Mode::Permissive as u8, flags);
        let mut seen = socket("10.0.0.2:50000");
        seen.cgroup = Some(1);
        let loses = |tables: &Tables, socket: &TcpSocket| {
            Verdicts::new(tables, &attested).loses(7, socket, true, Close::Denied)
        };
        assert_eq!(loses(&tables, &seen), None, "control: nobody asks about requests");
        tables.pods.get_mut(&7).unwrap().flags |= signet_ebpf::abi::pod::JUDGED;
        assert_eq!(loses(&tables, &seen), Some(Reason::RightWithdrawn));
        assert_eq!(loses(&tables, &socket("10.0.0.2:50000")), None, "whose it is is not known");
        let exempt = ExemptKey { netns: 7, port: 40000, protocol: proto::TCP, pad: [0; 5] };
        tables.exempt.insert(exempt, 1);
        assert_eq!(loses(&tables, &seen), None, "control: an exempt port");
    }

    #[test]
    fn a_probe_is_spared() {
        let tables = tables();
        let key = FlowKey {
            netns: 0,
            local: Ip::from_std("10.0.0.254".parse().unwrap()),
            remote: Ip::from_std("10.0.0.1".parse().unwrap()),
            local_port: 50000,
            remote_port: 40000,
            family: 0,
        };
        let attested = HashSet::from([key]);
        let verdicts = Verdicts::new(&tables, &attested);
        let now = Close::NotAsDialledNow;
        assert_eq!(verdicts.loses(7, &socket("10.0.0.254:50000"), true, now), None);
        assert_eq!(
            verdicts.loses(7, &socket("10.0.0.254:50001"), true, now),
            Some(Reason::PlaintextRefused)
        );
    }

    #[test]
    fn what_is_cut_stays_so_while_its_socket_lives() {
        use std::{
            net::{TcpListener, TcpStream},
            os::fd::AsFd,
        };
        if !rustix::process::geteuid().is_root() {
            return;
        }
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let stream = TcpStream::connect(address).unwrap();
        let diag = destroy::own_diag_socket().unwrap();
        let connected = destroy::list(diag.as_fd(), States::Connected).unwrap();
        let client = stream.local_addr().unwrap();
        let open = connected.iter().find(|s| s.local == client && s.remote == address).unwrap();
        let live = cut_key(7, open);
        let dead = FlowKey { local_port: 1, ..live };
        let foreign = FlowKey { netns: 8, ..dead };
        let mut table = Table::scratch(2);
        assert!(table.add(live, 1).unwrap());
        assert!(table.add(dead, 1).unwrap());
        assert!(!table.add(live, 2).unwrap(), "it is there");
        assert!(table.add(foreign, 1).is_err(), "full");
        forget_cut(diag.as_fd(), 8, &[live, dead], &mut table).unwrap();
        assert_eq!(table.rows().unwrap().len(), 2, "another namespace's");
        forget_cut(diag.as_fd(), 7, &[live, dead], &mut table).unwrap();
        assert_eq!(table.rows().unwrap(), [(live, 1)]);
    }
}
