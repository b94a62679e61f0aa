//! The one ABI of kernel and user space: map keys and values, event layout, reasons.
//!
//! Everything here is `repr(C)`, free of padding that the kernel would read
//! uninitialised, and size-asserted. Ports are host order, addresses are network
//! order (see [`Ip`]), times are `CLOCK_MONOTONIC` nanoseconds. Appending a field or
//! changing a size means a new [`ABI_VERSION`], which names the pin directory.

mod policy;
mod reason;

pub use policy::{POLICY_FIXED_BITS, POLICY_RULE_BITS, PolicyKey, PolicyValue, known, policy_tag};
pub use reason::Reason;

/// Names the pin directory `…/v<ABI_VERSION>`: maps of another version are never re-used.
pub const ABI_VERSION: u32 = 1;

/// An address as the kernel's contexts hold it: four words in network byte order,
/// IPv4 as `::ffff:a.b.c.d`. Its memory is the 16 octets in order.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct Ip(pub [u32; 4]);

impl Ip {
    /// The third word of every IPv4-mapped address.
    const MAPPED: u32 = 0xffff_u32.to_be();
    /// `::`.
    pub const UNSPECIFIED: Self = Self([0; 4]);

    /// An IPv4 address from its network-order word.
    #[inline(always)]
    pub const fn v4(word: u32) -> Self {
        Self([0, 0, Self::MAPPED, word])
    }

    /// An address from its 16 octets.
    #[inline(always)]
    pub const fn from_octets(o: [u8; 16]) -> Self {
        Self([
            u32::from_ne_bytes([o[0], o[1], o[2], o[3]]),
            u32::from_ne_bytes([o[4], o[5], o[6], o[7]]),
            u32::from_ne_bytes([o[8], o[9], o[10], o[11]]),
            u32::from_ne_bytes([o[12], o[13], o[14], o[15]]),
        ])
    }

    /// The 16 octets.
    #[inline(always)]
    pub const fn octets(self) -> [u8; 16] {
        let [a, b, c, d] = self.0;
        let (a, b, c, d) = (a.to_ne_bytes(), b.to_ne_bytes(), c.to_ne_bytes(), d.to_ne_bytes());
        [
            a[0], a[1], a[2], a[3], b[0], b[1], b[2], b[3], c[0], c[1], c[2], c[3], d[0], d[1],
            d[2], d[3],
        ]
    }

    /// True for an IPv4(-mapped) address.
    #[inline(always)]
    pub const fn is_v4(self) -> bool {
        self.0[0] == 0 && self.0[1] == 0 && self.0[2] == Self::MAPPED
    }

    /// True for what stays inside a network namespace when dialled: 127/8, `::1` and the
    /// unspecified addresses, which Linux takes for the loopback.
    #[inline(always)]
    pub const fn is_local_by_nature(self) -> bool {
        if self.is_v4() {
            self.0[3] == 0 || self.0[3].to_ne_bytes()[0] == 127
        } else {
            self.0[0] == 0
                && self.0[1] == 0
                && self.0[2] == 0
                && (self.0[3] == 0 || self.0[3] == 1u32.to_be())
        }
    }
}

/// IP protocol numbers that the programs tell apart.
pub mod proto {
    /// TCP.
    pub const TCP: u8 = 6;
    /// UDP.
    pub const UDP: u8 = 17;
}

/// The port on which a served pod accepts tunnels (HBONE's convention).
pub const TUNNEL_PORT: u16 = 15008;

/// Identity numbers below this are reserved.
pub const FIRST_IDENTITY: u32 = 256;
/// The identity number of whatever is outside the mesh or unknown.
pub const IDENTITY_WORLD: u32 = 0;
/// The identity number of the node itself.
pub const IDENTITY_HOST: u32 = 1;
/// In a [`PolicyKey`]: every identity that has no entry of its own.
pub const IDENTITY_ANY: u32 = u32::MAX;

/// The policy number of the built-in that lets the kubelet's probes pass; no other policy
/// has it.
pub const POLICY_PROBES: u32 = u32::MAX;

/// A namespace's or pod's mode (DESIGN §2), ordered from loose to tight.
#[repr(u8)]
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub enum Mode {
    /// Untouched, not judged.
    #[default]
    Off = 0,
    /// Untouched, judged as `strict` would.
    Observe = 1,
    /// Tunnelled where the peer is served, plaintext accepted; policy enforced.
    Permissive = 2,
    /// Tunnelled to every enrolled peer, plaintext refused; policy enforced.
    Strict = 3,
}

impl Mode {
    /// The mode of a byte from a map.
    #[inline(always)]
    pub const fn from_u8(v: u8) -> Self {
        match v {
            0 => Self::Off,
            1 => Self::Observe,
            2 => Self::Permissive,
            // A byte that nobody wrote is judged by the tightest rule.
            _ => Self::Strict,
        }
    }

    /// True where policy is enforced and flows are tunnelled.
    #[inline(always)]
    pub const fn is_enforced(self) -> bool {
        matches!(self, Self::Permissive | Self::Strict)
    }
}

/// What became of a flow.
#[repr(u8)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub enum Verdict {
    /// It passes.
    #[default]
    Forwarded = 1,
    /// It was refused or closed.
    Dropped = 2,
    /// It passes, and would have been dropped under enforcement.
    Audit = 4,
}

/// Direction of a flow as the reporting pod sees it.
#[repr(u8)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub enum Direction {
    /// The pod dialled or sent.
    #[default]
    Egress = 0,
    /// The pod is dialled or sent to.
    Ingress = 1,
}

/// Flags of a [`PodEntry`].
pub mod pod {
    /// SVID and listeners are in place: flows may be tunnelled.
    pub const READY: u8 = 1;
    /// Its policy did not fit its map: everything that policy would judge is refused.
    pub const CLOSED: u8 = 1 << 1;
    /// Protocols other than TCP and UDP are refused.
    pub const DENY_OTHER: u8 = 1 << 2;
    /// Policies ask about HTTP requests: what comes in in clear goes through the agent's judge.
    pub const JUDGED: u8 = 1 << 3;
}

/// A registered pod; key: the cookie of its network namespace.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct PodEntry {
    /// First IPv4 address, or [`Ip::UNSPECIFIED`].
    pub ip4: Ip,
    /// First IPv6 address, or [`Ip::UNSPECIFIED`].
    pub ip6: Ip,
    /// The cgroup id of the pod's directory.
    pub cgroup: u64,
    /// Revision of the world under which this entry was written.
    pub revision: u64,
    /// The pod's own identity number.
    pub identity: u32,
    /// Port of the outbound listener, IPv4 (answers on all of 127/8); 0: none.
    pub listener4: u16,
    /// First port of the outbound listeners on `::1`; 0: none.
    pub listener6: u16,
    /// How many consecutive ports from `listener6` on.
    pub listener6_count: u16,
    /// [`Mode`] as a number.
    pub mode: u8,
    /// Bits of [`pod`].
    pub flags: u8,
    /// Zero.
    pub pad: u32,
}

/// Kinds of an [`AddressEntry`].
pub mod address {
    /// A pod's address.
    pub const POD: u8 = 1;
    /// A Service's virtual address.
    pub const SERVICE: u8 = 2;
    /// A node's address.
    pub const NODE: u8 = 3;

    /// Flag: the pod's namespace says permissive or strict (desired).
    pub const ENROLLED: u8 = 1;
    /// Flag: its agent has announced it.
    pub const SERVED: u8 = 1 << 1;
    /// Flag: Signet could enrol it (not off, not hostNetwork, not unenforceable).
    pub const ENROLLABLE: u8 = 1 << 2;
}

/// What is known of an address; key: [`Ip`].
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct AddressEntry {
    /// Identity number, [`IDENTITY_WORLD`] when it has none.
    pub identity: u32,
    /// One of [`address`]'s kinds.
    pub kind: u8,
    /// Flags of [`address`].
    pub flags: u8,
    /// Zero.
    pub pad: u16,
}

/// Key of the table of addresses that are a pod's own.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct OwnAddressKey {
    /// The pod's network namespace.
    pub netns: u64,
    /// The address.
    pub ip: Ip,
}

/// A Service's port.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct ServiceKey {
    /// Virtual address.
    pub ip: Ip,
    /// Service port.
    pub port: u16,
    /// IP protocol.
    pub protocol: u8,
    /// Zero.
    pub pad: u8,
}

/// Flags of a [`ServiceKey`]'s value (a `u32`).
pub mod service {
    /// At least one endpoint is enrolled: the proxy resolves it.
    pub const TUNNEL: u32 = 1;
    /// No endpoint is ready.
    pub const NO_ENDPOINTS: u32 = 1 << 1;
    /// The "port" (with protocol 0) of the row that marks a Service's external address: on ports
    /// without a row it is no Service's, but what is out there.
    pub const EXTERNAL: u16 = 0;
}

/// Kinds of address ranges (values of the ranges LPM).
pub mod range {
    /// Pods' addresses.
    pub const PODS: u32 = 1;
    /// Services' addresses.
    pub const SERVICES: u32 = 2;
    /// Explicitly outside the mesh.
    pub const OUTSIDE: u32 = 3;
    /// Peers of a federated trust domain: dialled through tunnels.
    pub const REMOTE: u32 = 4;
}

/// What to do with a pod that is not registered (DESIGN §5).
pub mod unknown_pods {
    /// Refuse while the heartbeat is young and some namespace is enforced.
    pub const AUTO: u8 = 0;
    /// Refuse always.
    pub const DENY: u8 = 1;
    /// Leave alone always.
    pub const ALLOW: u8 = 2;
}

/// Cluster-wide override of enforcement.
pub mod enforcement {
    /// As labels and policies say.
    pub const ENFORCE: u8 = 0;
    /// What would be dropped passes and is reported as AUDIT.
    pub const AUDIT: u8 = 1;
    /// Nothing is touched.
    pub const OFF: u8 = 2;
}

/// A heartbeat older than this counts as a dead agent.
pub const HEARTBEAT_NS: u64 = 30_000_000_000;

/// The one entry of the configuration array.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Config {
    /// Cookie of the node's own network namespace.
    pub host_netns: u64,
    /// Revision of the world last applied in full.
    pub revision: u64,
    /// Last heartbeat; 0: none yet.
    pub heartbeat: u64,
    /// Ring events a second and endpoint.
    pub events_per_second: u32,
    /// Ancestor level of the workloads root (the cgroup2 root is 0).
    pub workloads_level: u32,
    /// [`unknown_pods`].
    pub unknown_pods: u8,
    /// [`enforcement`].
    pub enforcement: u8,
    /// 1 when some namespace is permissive or strict.
    pub enforcing: u8,
    /// 1 when unknown pods stay refused while the agent is dead.
    pub deny_when_dead: u8,
    /// 1 when the cluster's pod ranges are known.
    pub ranges_known: u8,
    /// 1 while some pod has a raw guard: flows of enforced pods are recorded for it.
    pub guarding: u8,
    /// 1 between `signet guard` and the agent's first heartbeat: `heartbeat` is a moment to
    /// come, and until then every pod that is not registered is refused.
    pub guarded_until: u8,
    /// Zero.
    pub pad: u8,
}

/// A TCP or UDP flow as seen from one socket in one network namespace.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct FlowKey {
    /// The socket's network namespace.
    pub netns: u64,
    /// Local address.
    pub local: Ip,
    /// Remote address.
    pub remote: Ip,
    /// Local port.
    pub local_port: u16,
    /// Remote port.
    pub remote_port: u16,
    /// `AF_INET` or `AF_INET6`; 0 for UDP tracking; the IP protocol in the guard's tables.
    pub family: u32,
}

impl FlowKey {
    /// The same flow as the other socket of the same network namespace sees it.
    #[inline(always)]
    pub const fn mirrored(&self) -> Self {
        Self {
            netns: self.netns,
            local: self.remote,
            remote: self.local,
            local_port: self.remote_port,
            remote_port: self.local_port,
            family: self.family,
        }
    }
}

/// An address and port handed from one socket to another.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Handover {
    /// When it was written.
    pub time: u64,
    /// Cookie of the writing socket.
    pub cookie: u64,
    /// Address.
    pub ip: Ip,
    /// Port.
    pub port: u16,
    /// 1: the socket was redirected to the agent (getsockname shows the pod's address).
    pub redirected: u8,
    /// 1: the other socket has taken it.
    pub taken: u8,
    /// Zero.
    pub pad: u32,
}

/// A flow attested by the node's recording program.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Attestation {
    /// When the connect was seen.
    pub time: u64,
    /// The cgroup in [`PROBES`](crate::abi) that the dialling task was in.
    pub cgroup: u64,
}

/// A tracked UDP flow.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct UdpFlow {
    /// Last packet in either direction.
    pub last: u64,
    /// Revision of the policy that admitted it: an older one is judged again.
    pub revision: u64,
}

/// UDP flows that one pod may have tracked: an eighth of a minute of two thousand new ones a
/// second. What is more is refused to that pod alone.
pub const UDP_SHARE: i64 = 16_384;

/// A datagram of which the first fragment left a pod.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct FragmentKey {
    /// The pod's network namespace.
    pub netns: u64,
    /// Sender.
    pub source: Ip,
    /// Receiver.
    pub destination: Ip,
    /// Identification, as it stands in the header.
    pub id: u32,
    /// Zero.
    pub pad: u32,
}

/// What arrived at a pod longer ago than this is not answered any more.
pub const ARRIVED_NS: u64 = 60_000_000_000;

/// A flow whose sockets sent nothing for longer than this is over for the raw guard: the kernel
/// goes on answering for a closed connection for a minute (TIME_WAIT).
pub const GUARD_FLOW_NS: u64 = 120_000_000_000;

/// Key of the drop counters; never lossy for its key.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct DropKey {
    /// The reporting pod's network namespace.
    pub netns: u64,
    /// The other side.
    pub peer: Ip,
    /// The destination's port.
    pub port: u16,
    /// [`Reason`] as a number.
    pub reason: u16,
    /// IP protocol.
    pub protocol: u8,
    /// [`Direction`] as a number.
    pub direction: u8,
    /// Zero.
    pub pad: u16,
}

/// Token window of an endpoint's events.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct RateWindow {
    /// The window's number (time / 2^30 ns).
    pub window: u64,
    /// Events sent in it.
    pub sent: u64,
}

/// A verdict that the kernel gave.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Event {
    /// When.
    pub time: u64,
    /// The reporting pod's network namespace.
    pub netns: u64,
    /// The pod directory's or task's cgroup.
    pub cgroup: u64,
    /// Revision of the entry that decided.
    pub revision: u64,
    /// The pod's address ([`Ip::UNSPECIFIED`] before the kernel chose one).
    pub local: Ip,
    /// The other side.
    pub remote: Ip,
    /// Number of the deciding policy, 0 for none.
    pub policy: u32,
    /// The other side's identity by address.
    pub remote_identity: u32,
    /// The pod's port.
    pub local_port: u16,
    /// The other side's port.
    pub remote_port: u16,
    /// [`Reason`] as a number.
    pub reason: u16,
    /// [`Verdict`] as a number.
    pub verdict: u8,
    /// [`Direction`] as a number.
    pub direction: u8,
    /// IP protocol.
    pub protocol: u8,
    /// [`Mode`] of the pod as a number.
    pub mode: u8,
    /// [`hook`]: where it was decided.
    pub hook: u8,
    /// Zero.
    pub pad: [u8; 5],
}

/// Where an [`Event`] was decided.
pub mod hook {
    /// cgroup/connect4, connect6.
    pub const CONNECT: u8 = 1;
    /// cgroup/sendmsg4, sendmsg6.
    pub const SENDMSG: u8 = 2;
    /// cgroup_skb egress.
    pub const EGRESS: u8 = 3;
    /// sk_lookup.
    pub const LOOKUP: u8 = 4;
    /// cgroup_skb ingress.
    pub const INGRESS: u8 = 5;
    /// The raw guard at the host's end of the veth.
    pub const GUARD: u8 = 6;
}

/// Indices of the per-CPU counters.
pub mod counter {
    /// Events not sent: the ring was full.
    pub const EVENTS_LOST: u32 = 0;
    /// Events not sent: the endpoint's rate was used up.
    pub const EVENTS_LIMITED: u32 = 1;
    /// Drop counters that found no room.
    pub const DROPS_FULL: u32 = 2;
    /// Original destinations that found no room.
    pub const ORIGINALS_FULL: u32 = 3;
    /// Client addresses that found no room.
    pub const CLIENTS_FULL: u32 = 4;
    /// UDP flows that found no room.
    pub const UDP_FULL: u32 = 5;
    /// Attestations that found no room.
    pub const ATTESTED_FULL: u32 = 6;
    /// Connects redirected to the agent.
    pub const REDIRECTED: u32 = 7;
    /// Connects of unregistered pods refused.
    pub const UNKNOWN_REFUSED: u32 = 8;
    /// Connects of unregistered pods left alone because the agent is dead.
    pub const UNKNOWN_PASSED: u32 = 9;
    /// Tunnels for the raw guard that found no room.
    pub const TUNNELS_FULL: u32 = 10;
    /// Frames that the raw guard dropped.
    pub const GUARD_DROPPED: u32 = 11;
    /// How many there are.
    pub const COUNT: u32 = 16;
}

/// Feature bits that the loader sets in the programs' read-only data.
pub mod feature {
    /// `bpf_set_retval` in cgroup/sock_addr (5.18): any errno instead of EPERM.
    pub const SET_RETVAL: u32 = 1;
    /// `bpf_get_netns_cookie` in cgroup_skb (about 6.15): else the cgroup names the pod.
    pub const SKB_NETNS_COOKIE: u32 = 1 << 1;
    /// `SOCK_DESTROY` (CONFIG_INET_DIAG_DESTROY): else cgroup_skb drops what a flow that
    /// lost its right still sends.
    pub const SOCK_DESTROY: u32 = 1 << 2;
}

/// Key of the tunnel listeners (SOCKHASH): the pod's network namespace and its family.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct ListenerKey {
    /// The pod's network namespace.
    pub netns: u64,
    /// `AF_INET` or `AF_INET6`.
    pub family: u32,
    /// Zero.
    pub pad: u32,
}

/// A pod's exempt inbound port.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct ExemptKey {
    /// The pod's network namespace.
    pub netns: u64,
    /// The pod's port.
    pub port: u16,
    /// IP protocol.
    pub protocol: u8,
    /// Zero.
    pub pad: [u8; 5],
}

/// Bytes that an identity's SPIFFE ID may have in the pinned table.
pub const IDENTITY_NAME_LEN: usize = 606;

/// A row of the pinned identity table: number → SPIFFE ID.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct IdentityName {
    /// Length of the name.
    pub len: u16,
    /// The SPIFFE ID, zero-filled.
    pub bytes: [u8; IDENTITY_NAME_LEN],
}

/// Bytes that a pod's `namespace/name` may have: 63 and 253 and the slash, rounded up.
pub const POD_NAME_LEN: usize = 318;

/// A row of the pinned table of pods' names: network namespace → `namespace/name`. No program
/// reads it; `signet agent release --pod` does, where no agent runs.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PodName {
    /// Length of the name.
    pub len: u16,
    /// The name, zero-filled.
    pub bytes: [u8; POD_NAME_LEN],
}

const _: () = {
    assert!(size_of::<Ip>() == 16);
    assert!(size_of::<PodEntry>() == 64);
    assert!(size_of::<AddressEntry>() == 8);
    assert!(size_of::<OwnAddressKey>() == 24);
    assert!(size_of::<ServiceKey>() == 20);
    assert!(size_of::<Config>() == 40);
    assert!(size_of::<FlowKey>() == 48);
    assert!(size_of::<Handover>() == 40);
    assert!(size_of::<Attestation>() == 16);
    assert!(size_of::<UdpFlow>() == 16);
    assert!(size_of::<PolicyKey>() == 20);
    assert!(size_of::<PolicyValue>() == 8);
    assert!(size_of::<FragmentKey>() == 48);
    assert!(size_of::<DropKey>() == 32);
    assert!(size_of::<RateWindow>() == 16);
    assert!(size_of::<Event>() == 88);
    assert!(size_of::<ListenerKey>() == 16);
    assert!(size_of::<ExemptKey>() == 16);
    assert!(size_of::<IdentityName>() == 608);
    assert!(size_of::<PodName>() == 320);
};

#[cfg(feature = "user")]
mod user {
    //! Views for user space. Every type is `repr(C)`, made of integers and without
    //! padding (the sizes above are the sums of their fields), hence plain old data.
    use super::*;

    impl Ip {
        /// The address of the standard library's type.
        pub fn from_std(ip: std::net::IpAddr) -> Self {
            Self::from_octets(match ip {
                std::net::IpAddr::V4(v4) => v4.to_ipv6_mapped().octets(),
                std::net::IpAddr::V6(v6) => v6.octets(),
            })
        }

        /// The standard library's type, IPv4 where it is mapped.
        pub fn to_std(self) -> std::net::IpAddr {
            std::net::Ipv6Addr::from(self.octets()).to_canonical()
        }
    }

    macro_rules! plain_old_data {
        ($($t:ty),* $(,)?) => {$(
            // SAFETY: repr(C), integers only, no padding (sizes asserted above), Copy and 'static.
            unsafe impl aya::Pod for $t {}
        )*};
    }
    plain_old_data!(
        Ip,
        PodEntry,
        AddressEntry,
        OwnAddressKey,
        ServiceKey,
        Config,
        FlowKey,
        Handover,
        Attestation,
        UdpFlow,
        FragmentKey,
        PolicyKey,
        PolicyValue,
        DropKey,
        RateWindow,
        Event,
        ListenerKey,
        ExemptKey,
        IdentityName,
        PodName,
    );

    impl PodName {
        /// A row; `None` for what is longer than any pod's name.
        pub fn new(name: &str) -> Option<Self> {
            let mut bytes = [0; POD_NAME_LEN];
            bytes.get_mut(..name.len())?.copy_from_slice(name.as_bytes());
            Some(Self { len: u16::try_from(name.len()).ok()?, bytes })
        }

        /// The name; `None` for a row that nobody of ours wrote.
        pub fn as_str(&self) -> Option<&str> {
            std::str::from_utf8(self.bytes.get(..usize::from(self.len))?).ok()
        }
    }

    impl Event {
        /// An event from the ring; `None` when the length is not an event's.
        pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
            if bytes.len() != size_of::<Self>() {
                return None;
            }
            // SAFETY: the length is right and every bit pattern is a valid Event.
            Some(unsafe { std::ptr::read_unaligned(bytes.as_ptr().cast()) })
        }
    }
}
