//! The maps, pinned by name in a directory versioned by the ABI, and the verdict's view
//! of them.
//!
//! None is LRU where an eviction could change an answer: a full map refuses and counts.

use aya_ebpf::{
    bindings::{BPF_F_NO_PREALLOC, BPF_SK_STORAGE_GET_F_CREATE},
    btf_maps,
    helpers::{bpf_ktime_get_ns, bpf_sk_storage_delete, bpf_sk_storage_get},
    macros::{btf_map, map},
    maps::{Array, HashMap, LpmTrie, LruHashMap, PerCpuArray, RingBuf, SockHash, lpm_trie::Key},
};
use core::ffi::c_void;
use signet_ebpf::{
    abi::{
        AddressEntry, Attestation, Config, DropKey, Event, ExemptKey, FlowKey, FragmentKey,
        Handover, Ip, ListenerKey, OwnAddressKey, PodEntry, PolicyKey, PolicyValue, RateWindow,
        ServiceKey, UDP_SHARE, UdpFlow, Verdict, counter,
    },
    decide::{Decision, Flow, PolicyMaps},
};

/// Pods that one node may have registered at once.
pub const MAX_PODS: u32 = 4096;
/// Connections in the hands of two sockets at once.
const MAX_HANDOVERS: u32 = 65_536;
/// Addresses of the whole cluster.
const MAX_ADDRESSES: u32 = 262_144;

#[map]
pub static CONFIG: Array<Config> = Array::pinned(1, 0);
#[map]
pub static PODS: HashMap<u64, PodEntry> = HashMap::pinned(MAX_PODS, BPF_F_NO_PREALLOC);
#[map]
pub static CGROUPS: HashMap<u64, u64> = HashMap::pinned(MAX_PODS, BPF_F_NO_PREALLOC);
#[map]
pub static OWN: HashMap<OwnAddressKey, u8> = HashMap::pinned(4 * MAX_PODS, BPF_F_NO_PREALLOC);
#[map]
pub static ADDRESSES: HashMap<Ip, AddressEntry> = HashMap::pinned(MAX_ADDRESSES, BPF_F_NO_PREALLOC);
#[map]
pub static SERVICES: HashMap<ServiceKey, u32> = HashMap::pinned(MAX_HANDOVERS, BPF_F_NO_PREALLOC);
#[map]
pub static RANGES: LpmTrie<[u8; 16], u32> = LpmTrie::pinned(4096, 0);
#[map]
pub static EXEMPT: HashMap<ExemptKey, u8> = HashMap::pinned(16_384, BPF_F_NO_PREALLOC);
#[map]
pub static PROBES: HashMap<u64, u8> = HashMap::pinned(64, 0);
#[map]
pub static ATTESTED: HashMap<FlowKey, Attestation> =
    HashMap::pinned(MAX_HANDOVERS, BPF_F_NO_PREALLOC);
#[map]
pub static ORIGINALS: HashMap<FlowKey, Handover> =
    HashMap::pinned(MAX_HANDOVERS, BPF_F_NO_PREALLOC);
#[map]
pub static CLIENTS: HashMap<FlowKey, Handover> = HashMap::pinned(MAX_HANDOVERS, BPF_F_NO_PREALLOC);
/// TCP flows that lost their right on a kernel that cannot destroy sockets.
#[map]
pub static CUT: HashMap<FlowKey, u64> = HashMap::pinned(16_384, BPF_F_NO_PREALLOC);
#[map]
pub static UDP_FLOWS: HashMap<FlowKey, UdpFlow> = HashMap::pinned(524_288, BPF_F_NO_PREALLOC);
/// How many of those each pod has: its share of them is bounded. User space counts again
/// whenever it sweeps, so a race costs a few flows of accuracy for some seconds.
#[map]
pub static UDP_COUNTS: HashMap<u64, i64> = HashMap::pinned(2 * MAX_PODS, BPF_F_NO_PREALLOC);
/// Devices of this node with a raw guard: interface → the pod's network namespace.
#[map]
pub static GUARDED: HashMap<u32, u64> = HashMap::pinned(MAX_PODS, BPF_F_NO_PREALLOC);
/// Flows of guarded pods' own sockets, and when one of their packets was seen last. A pod may
/// fill it: an eviction is harmless, because the hook that writes it runs for each packet just
/// before the guard reads it. Also tunnels that were closed, whose last answers may get lost.
#[map]
pub static GUARD_FLOWS: LruHashMap<FlowKey, u64> = LruHashMap::pinned(MAX_HANDOVERS, 0);
/// The agent's open connections inside pods' network namespaces, written once each.
#[map]
pub static TUNNELS: HashMap<FlowKey, u64> = HashMap::pinned(131_072, BPF_F_NO_PREALLOC);
/// When a packet of a flow without a socket arrived at a guarded pod: an eviction only keeps
/// the pod from answering.
#[map]
pub static ARRIVED: LruHashMap<FlowKey, u64> = LruHashMap::pinned(16_384, 0);
/// Datagrams of which the first fragment passed: an eviction loses the datagram.
#[map]
pub static FRAGMENTS: LruHashMap<FragmentKey, u64> = LruHashMap::pinned(4096, 0);
#[map]
pub static DROPS: HashMap<DropKey, u64> = HashMap::pinned(MAX_HANDOVERS, BPF_F_NO_PREALLOC);
#[map]
pub static RATE: HashMap<u64, RateWindow> = HashMap::pinned(2 * MAX_PODS, BPF_F_NO_PREALLOC);
#[map]
pub static COUNTERS: PerCpuArray<u64> = PerCpuArray::pinned(counter::COUNT, 0);
#[map]
pub static EVENTS: RingBuf = RingBuf::pinned(1 << 20, 0);
#[map]
pub static LISTENERS: SockHash<ListenerKey> = SockHash::pinned(2 * MAX_PODS, 0);

/// A pod's compiled policy: replaced as a whole by one write to the outer map.
pub type Policy = btf_maps::LpmTrie<PolicyKey, PolicyValue, 4096>;
#[btf_map]
pub static POLICY: btf_maps::HashOfMaps<u64, Policy, { MAX_PODS as usize }> =
    btf_maps::HashOfMaps::new();

/// What getpeername and accept show for a socket.
#[btf_map]
pub static SHOWN: btf_maps::SkStorage<Handover> = btf_maps::SkStorage::new();
/// On the agent's accepted sockets: what the application dialled.
#[btf_map]
pub static ACCEPTED: btf_maps::SkStorage<Handover> = btf_maps::SkStorage::new();
/// On the agent's sockets to applications: the client to show; set by user space.
#[btf_map]
pub static CLIENT_OF: btf_maps::SkStorage<Handover> = btf_maps::SkStorage::new();

/// Features of this kernel ([`signet_ebpf::abi::feature`]), set by the loader.
#[unsafe(no_mangle)]
static FEATURES: u32 = 0;

/// True when the loader found the feature; the verifier prunes the other branch.
#[inline(always)]
pub fn has(feature: u32) -> bool {
    // SAFETY: a volatile read of read-only data that the loader patched.
    unsafe { core::ptr::read_volatile(&raw const FEATURES) & feature != 0 }
}

/// Reads a context field exactly where it stands: merged loads fail verification.
///
/// # Safety
/// `field` points into a program's context.
#[inline(always)]
pub unsafe fn read<T: Copy>(field: *const T) -> T {
    // SAFETY: as the caller promises.
    unsafe { core::ptr::read_volatile(field) }
}

/// Monotonic time in nanoseconds.
#[inline(always)]
pub fn now() -> u64 {
    // SAFETY: no arguments.
    unsafe { bpf_ktime_get_ns() }
}

/// Adds one to a per-CPU counter.
#[inline(always)]
pub fn count(index: u32) {
    if let Some(p) = COUNTERS.get_ptr_mut(index) {
        // SAFETY: this CPU's own slot.
        unsafe { *p += 1 }
    }
}

/// A socket's storage in `map`, or null.
#[inline(always)]
pub fn stored<M>(map: &'static M, sk: *mut c_void) -> Option<Handover> {
    // SAFETY: map and socket are the kernel's; without F_CREATE the value is not read.
    let p: *const Handover = unsafe {
        bpf_sk_storage_get(core::ptr::from_ref(map).cast_mut().cast(), sk, core::ptr::null_mut(), 0)
            .cast()
    };
    if p.is_null() {
        return None;
    }
    // SAFETY: not null, and a value of this map.
    Some(unsafe { *p })
}

/// Puts `value` into a socket's storage; false when there is no memory.
#[inline(always)]
pub fn store<M>(map: &'static M, sk: *mut c_void, value: &Handover) -> bool {
    let mut init = *value;
    // SAFETY: map and socket are the kernel's; `init` lives on the stack.
    let p: *mut Handover = unsafe {
        bpf_sk_storage_get(
            core::ptr::from_ref(map).cast_mut().cast(),
            sk,
            (&raw mut init).cast(),
            BPF_SK_STORAGE_GET_F_CREATE as u64,
        )
        .cast()
    };
    if p.is_null() {
        return false;
    }
    // SAFETY: not null; an older value is overwritten.
    unsafe { *p = init };
    true
}

/// Takes a socket's storage away.
#[inline(always)]
pub fn forget<M>(map: &'static M, sk: *mut c_void) {
    // SAFETY: map and socket are the kernel's.
    unsafe { bpf_sk_storage_delete(core::ptr::from_ref(map).cast_mut().cast(), sk) };
}

/// The maps as the verdict reads them.
pub struct Kernel;

impl PolicyMaps for Kernel {
    #[inline(always)]
    fn config(&self) -> Option<&Config> {
        CONFIG.get(0)
    }

    #[inline(always)]
    fn pod(&self, netns: u64) -> Option<&PodEntry> {
        // SAFETY: entries are replaced whole and freed after a grace period.
        unsafe { PODS.get(&netns) }
    }

    #[inline(always)]
    fn is_own(&self, netns: u64, ip: Ip) -> bool {
        OWN.get_ptr(&OwnAddressKey { netns, ip }).is_some()
    }

    #[inline(always)]
    fn address(&self, ip: Ip) -> Option<&AddressEntry> {
        // SAFETY: as above.
        unsafe { ADDRESSES.get(&ip) }
    }

    #[inline(always)]
    fn service(&self, ip: Ip, port: u16, protocol: u8) -> Option<u32> {
        // SAFETY: as above.
        unsafe { SERVICES.get(&ServiceKey { ip, port, protocol, pad: 0 }) }.copied()
    }

    #[inline(always)]
    fn range(&self, ip: Ip) -> Option<u32> {
        RANGES.get(Key::new(128, ip.octets())).copied()
    }

    #[inline(always)]
    fn policy(&self, netns: u64, bits: u32, key: &PolicyKey) -> Option<&PolicyValue> {
        // SAFETY: the inner map is only used through the lookup helper.
        let inner = unsafe { POLICY.get(&netns) }?;
        inner.get(&Key::new(bits, *key))
    }

    #[inline(always)]
    fn is_exempt(&self, netns: u64, port: u16, protocol: u8) -> bool {
        EXEMPT.get_ptr(&ExemptKey { netns, port, protocol, pad: [0; 5] }).is_some()
    }

    #[inline(always)]
    fn is_probe(&self, flow: &Flow) -> bool {
        let Some(config) = CONFIG.get(0) else { return false };
        // The node's end of the same flow, as its recording program wrote it.
        let key = FlowKey {
            netns: config.host_netns,
            local: flow.remote,
            remote: flow.local,
            local_port: flow.remote_port,
            remote_port: flow.local_port,
            family: 0,
        };
        ATTESTED.get_ptr(&key).is_some()
    }
}

/// The pod that answers for a flow: a network namespace made inside a pod is that pod's doing.
#[inline(always)]
pub fn owner_of(flow: &Flow) -> u64 {
    if flow.task_netns != 0 && flow.task_netns != flow.netns && Kernel.pod(flow.netns).is_none() {
        flow.task_netns
    } else {
        flow.netns
    }
}

/// Counts a refusal and sends its event, within the endpoint's rate.
#[inline(always)]
pub fn report(flow: &Flow, decision: &Decision, ingress: bool, hook: u8, cgroup: u64) {
    let owner = owner_of(flow);
    if decision.verdict as u8 == Verdict::Dropped as u8 {
        count_drop(owner, flow, decision, ingress);
    }
    if !within_rate(owner, flow.now) {
        count(counter::EVENTS_LIMITED);
        return;
    }
    let Some(mut slot) = EVENTS.reserve::<Event>(0) else {
        count(counter::EVENTS_LOST);
        return;
    };
    let event = slot.as_mut_ptr();
    // SAFETY: the reservation is as large as an event and every byte is written.
    unsafe {
        (*event).time = flow.now;
        (*event).netns = owner;
        (*event).cgroup = cgroup;
        (*event).revision = decision.revision;
        (*event).local = flow.local;
        (*event).remote = flow.remote;
        (*event).policy = decision.policy;
        (*event).remote_identity = decision.remote_identity;
        (*event).local_port = flow.local_port;
        (*event).remote_port = flow.remote_port;
        (*event).reason = decision.reason as u16;
        (*event).verdict = decision.verdict as u8;
        (*event).direction = ingress as u8;
        (*event).protocol = flow.protocol;
        (*event).mode = decision.mode as u8;
        (*event).hook = hook;
        (*event).pad = [0; 5];
    }
    slot.submit(0);
}

#[inline(always)]
fn count_drop(owner: u64, flow: &Flow, decision: &Decision, ingress: bool) {
    let key = DropKey {
        netns: owner,
        peer: flow.remote,
        port: if ingress { flow.local_port } else { flow.remote_port },
        reason: decision.reason as u16,
        protocol: flow.protocol,
        direction: ingress as u8,
        pad: 0,
    };
    if let Some(p) = DROPS.get_ptr_mut(&key) {
        add(p);
    } else if DROPS.insert(&key, 1, 0).is_err() {
        count(counter::DROPS_FULL);
    }
}

/// An atomic add: BPF lacks fetch_add's return value before v3, which nobody needs here.
#[inline(always)]
fn add(p: *mut u64) {
    // SAFETY: a live map value.
    unsafe {
        core::intrinsics::atomic_xadd::<u64, u64, { core::intrinsics::AtomicOrdering::Relaxed }>(
            p, 1,
        );
    }
}

/// True while the pod's share of UDP flows is not used up.
#[inline(always)]
pub fn has_udp_room(owner: u64) -> bool {
    match UDP_COUNTS.get_ptr(&owner) {
        // SAFETY: a live map value.
        Some(count) => unsafe { *count < UDP_SHARE },
        None => UDP_COUNTS.insert(&owner, &0, 0).is_ok(),
    }
}

/// Counts a UDP flow of the pod that came (1) or went (-1).
#[inline(always)]
pub fn count_udp(owner: u64, by: i64) {
    if let Some(count) = UDP_COUNTS.get_ptr_mut(&owner) {
        // SAFETY: a live map value.
        unsafe {
            core::intrinsics::atomic_xadd::<i64, i64, { core::intrinsics::AtomicOrdering::Relaxed }>(
                count, by,
            );
        }
    }
}

/// True while the endpoint's events of this second (2^30 ns) are not used up.
#[inline(always)]
fn within_rate(owner: u64, now: u64) -> bool {
    let limit = match CONFIG.get(0) {
        Some(config) => config.events_per_second as u64,
        None => 0,
    };
    let window = now >> 30;
    match RATE.get_ptr_mut(&owner) {
        Some(rate) => {
            // SAFETY: a live map value; a race between CPUs costs a few events of accuracy.
            unsafe {
                if (*rate).window != window {
                    (*rate).window = window;
                    (*rate).sent = 0;
                }
                (*rate).sent += 1;
                (*rate).sent <= limit
            }
        }
        // No room: the drop counters still tell.
        None => RATE.insert(&owner, &RateWindow { window, sent: 1 }, 0).is_ok(),
    }
}
