//! sock_ops: hands addresses from one socket to the other end of the same connection, and
//! records what the node's own probes dial.
//!
//! The original destination must not be read from a map at accept (ports are re-used faster
//! than accept runs): it moves into the accepted socket's own storage when the handshake
//! completes, and the map entry goes.

use crate::maps::{
    ACCEPTED, ATTESTED, CLIENT_OF, CLIENTS, CONFIG, GUARD_FLOWS, ORIGINALS, PROBES, SHOWN, TUNNELS,
    count, now, read, store, stored,
};
use aya_ebpf::{
    EbpfContext,
    bindings::{
        BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB, BPF_SOCK_OPS_STATE_CB, BPF_SOCK_OPS_STATE_CB_FLAG,
        BPF_SOCK_OPS_TCP_CONNECT_CB, BPF_TCP_CLOSE, BPF_TCP_SYN_SENT, bpf_sock_ops,
    },
    helpers::{
        bpf_get_current_ancestor_cgroup_id, bpf_get_current_cgroup_id, bpf_get_netns_cookie,
        bpf_sock_ops_cb_flags_set,
    },
    macros::sock_ops,
    programs::SockOpsContext,
};
use core::ffi::c_void;
use signet_ebpf::abi::{Attestation, FlowKey, Ip, counter, proto};

const AF_INET6: u32 = 10;

/// Reads the v4 and v6 fields both and selects values: loads in two arms would be merged
/// into one with a computed offset, which the verifier refuses.
macro_rules! address {
    ($o:expr, $v6:expr, $f4:ident, $f6:ident) => {{
        let o = $o;
        // SAFETY: `o` is the program's context.
        unsafe {
            let v4 = read(&raw const (*o).$f4);
            let a = read(&raw const (*o).$f6[0]);
            let b = read(&raw const (*o).$f6[1]);
            let c = read(&raw const (*o).$f6[2]);
            let d = read(&raw const (*o).$f6[3]);
            if $v6 { Ip([a, b, c, d]) } else { Ip::v4(v4) }
        }
    }};
}

/// The connection as this socket sees it. `AF_INET6` sockets with mapped addresses meet
/// `AF_INET` ones on the other end, so the family is that of the addresses.
#[inline(always)]
fn key_of(ctx: &SockOpsContext) -> FlowKey {
    let o: *mut bpf_sock_ops = ctx.ops;
    // SAFETY: `o` is the program's context.
    let v6 = unsafe { read(&raw const (*o).family) } == AF_INET6;
    let local = address!(o, v6, local_ip4, local_ip6);
    let remote = address!(o, v6, remote_ip4, remote_ip6);
    FlowKey {
        // SAFETY: the context has this helper.
        netns: unsafe { bpf_get_netns_cookie(ctx.as_ptr()) },
        local,
        remote,
        // SAFETY: `o` is the program's context; remote_port is big-endian in 32 bits.
        local_port: unsafe { read(&raw const (*o).local_port) } as u16,
        // SAFETY: as above.
        remote_port: u32::from_be(unsafe { read(&raw const (*o).remote_port) }) as u16,
        family: 0,
    }
}

#[inline(always)]
fn socket(ctx: &SockOpsContext) -> *mut c_void {
    // SAFETY: the context's socket, null where there is none.
    unsafe { (*ctx.ops).__bindgen_anon_2.sk }.cast()
}

#[inline(always)]
fn op(ctx: &SockOpsContext) -> u32 {
    // SAFETY: the program's context.
    unsafe { read(&raw const (*ctx.ops).op) }
}

/// Asks for state changes of this socket, besides what others asked for.
#[inline(always)]
fn watch_states(ctx: &SockOpsContext) {
    // SAFETY: the program's context.
    unsafe {
        let flags = read(&raw const (*ctx.ops).bpf_sock_ops_cb_flags);
        bpf_sock_ops_cb_flags_set(ctx.ops, (flags | BPF_SOCK_OPS_STATE_CB_FLAG) as i32);
    }
}

/// (old state, new state) of a state change.
#[inline(always)]
fn states(ctx: &SockOpsContext) -> (u32, u32) {
    // SAFETY: the program's context, in a STATE_CB.
    unsafe {
        (
            read(&raw const (*ctx.ops).__bindgen_anon_1.args[0]),
            read(&raw const (*ctx.ops).__bindgen_anon_1.args[1]),
        )
    }
}

/// At the workloads root: applications' sockets.
#[sock_ops]
pub fn ops_workloads(ctx: SockOpsContext) -> u32 {
    let op = op(&ctx);
    if op != BPF_SOCK_OPS_TCP_CONNECT_CB
        && op != BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB
        && op != BPF_SOCK_OPS_STATE_CB
    {
        return 0;
    }
    let sk = socket(&ctx);
    if sk.is_null() {
        return 0;
    }
    if op == BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB {
        // A connection that the agent delivers: the application sees the real client.
        let key = key_of(&ctx).mirrored();
        if let Some(client) = CLIENTS.get_ptr_mut(&key) {
            // SAFETY: a live map value.
            let shown = unsafe { *client };
            if store(&SHOWN, sk, &shown) {
                // SAFETY: as above; the agent deletes the entry once it sees this.
                unsafe { (*client).taken = 1 };
            }
        }
        return 0;
    }
    if op == BPF_SOCK_OPS_STATE_CB {
        let (old, new) = states(&ctx);
        // Never established: nobody will take the entry. One that was established is
        // taken by the other end, or swept.
        if new == BPF_TCP_CLOSE && old == BPF_TCP_SYN_SENT {
            let _ = ORIGINALS.remove(&key_of(&ctx));
        }
        return 0;
    }
    let Some(original) = stored(&SHOWN, sk) else { return 0 };
    if original.redirected == 0 {
        return 0;
    }
    if ORIGINALS.insert(&key_of(&ctx), &original, 0).is_err() {
        count(counter::ORIGINALS_FULL);
        return 0;
    }
    watch_states(&ctx);
    0
}

/// On the agent's own cgroup.
#[sock_ops]
pub fn ops_agent(ctx: SockOpsContext) -> u32 {
    let op = op(&ctx);
    if op != BPF_SOCK_OPS_TCP_CONNECT_CB
        && op != BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB
        && op != BPF_SOCK_OPS_STATE_CB
    {
        return 0;
    }
    let sk = socket(&ctx);
    if sk.is_null() {
        return 0;
    }
    let key = key_of(&ctx);
    if op == BPF_SOCK_OPS_STATE_CB {
        if states(&ctx).1 == BPF_TCP_CLOSE {
            close_tunnel(&key);
        }
        return 0;
    }
    if record_tunnel(&key) {
        watch_states(&ctx);
    }
    if op == BPF_SOCK_OPS_TCP_CONNECT_CB {
        // To an application: the client to show, which user space put on the socket.
        if let Some(client) = stored(&CLIENT_OF, sk)
            && CLIENTS.insert(&key, &client, 0).is_err()
        {
            count(counter::CLIENTS_FULL);
        }
        return 0;
    }
    let key = key.mirrored();
    // SAFETY: entries are replaced whole.
    if let Some(original) = unsafe { ORIGINALS.get(&key) } {
        let original = *original;
        store(&ACCEPTED, sk, &original);
        let _ = ORIGINALS.remove(&key);
    }
    0
}

/// Notes a connection that the agent makes or takes inside a pod's network namespace, for
/// that pod's raw guard; true when it was one.
#[inline(always)]
fn record_tunnel(key: &FlowKey) -> bool {
    let host = match CONFIG.get(0) {
        Some(config) => config.host_netns,
        None => return false,
    };
    // To the application itself nothing leaves the pod.
    let inside = key.local == key.remote || key.remote.is_local_by_nature();
    if key.netns == host || inside {
        return false;
    }
    let key = FlowKey { family: proto::TCP as u32, ..*key };
    if TUNNELS.insert(&key, &now(), 0).is_err() {
        // Its packets do not leave a guarded pod.
        count(counter::TUNNELS_FULL);
        return false;
    }
    true
}

/// The connection is closed; its last packets may still be sent for a while.
#[inline(always)]
fn close_tunnel(key: &FlowKey) {
    let key = FlowKey { family: proto::TCP as u32, ..*key };
    if TUNNELS.remove(&key).is_ok() {
        let _ = GUARD_FLOWS.insert(&key, &now(), 0);
    }
}

/// At the node's root: records the flows of the cgroups that may probe pods.
#[sock_ops]
pub fn ops_node(ctx: SockOpsContext) -> u32 {
    let op = op(&ctx);
    if op != BPF_SOCK_OPS_TCP_CONNECT_CB && op != BPF_SOCK_OPS_STATE_CB {
        return 0;
    }
    let key = key_of(&ctx);
    let Some(config) = CONFIG.get(0) else { return 0 };
    // Only the node's own namespace attests: nobody else can answer or block.
    if key.netns != config.host_netns {
        return 0;
    }
    if op == BPF_SOCK_OPS_STATE_CB {
        if states(&ctx).1 == BPF_TCP_CLOSE {
            let _ = ATTESTED.remove(&key);
        }
        return 0;
    }
    let cgroup = probing_cgroup();
    if cgroup == 0 {
        return 0;
    }
    if ATTESTED.insert(&key, &Attestation { time: now(), cgroup }, 0).is_err() {
        count(counter::ATTESTED_FULL);
        return 0;
    }
    watch_states(&ctx);
    0
}

/// The probing cgroup that the calling task is in, 0 for none.
#[inline(always)]
fn probing_cgroup() -> u64 {
    // SAFETY: plain helper call.
    let own = unsafe { bpf_get_current_cgroup_id() };
    if PROBES.get_ptr(&own).is_some() {
        return own;
    }
    let mut level = 1;
    while level <= 6 {
        // SAFETY: plain helper call; 0 where there is no such ancestor.
        let id = unsafe { bpf_get_current_ancestor_cgroup_id(level) };
        if id == 0 {
            return 0;
        }
        if PROBES.get_ptr(&id).is_some() {
            return id;
        }
        level += 1;
    }
    0
}
