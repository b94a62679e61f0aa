//! getpeername4/6 and getsockname4/6 (5.8): the application sees the address that it
//! dialled, or the client that dialled it, and its pod's own address. `accept()` asks the
//! same hook.

use crate::maps::{PODS, SHOWN, stored};
use aya_ebpf::{
    EbpfContext, bindings::bpf_sock_addr, helpers::bpf_get_netns_cookie, macros::cgroup_sock_addr,
    programs::SockAddrContext,
};
use signet_ebpf::abi::{Handover, Ip};

#[cgroup_sock_addr(getpeername4)]
pub fn peername4(ctx: SockAddrContext) -> i32 {
    peername(&ctx, false)
}

#[cgroup_sock_addr(getpeername6)]
pub fn peername6(ctx: SockAddrContext) -> i32 {
    peername(&ctx, true)
}

#[cgroup_sock_addr(getsockname4)]
pub fn sockname4(ctx: SockAddrContext) -> i32 {
    sockname(&ctx, false)
}

#[cgroup_sock_addr(getsockname6)]
pub fn sockname6(ctx: SockAddrContext) -> i32 {
    sockname(&ctx, true)
}

#[inline(always)]
fn shown(a: *mut bpf_sock_addr) -> Option<Handover> {
    // SAFETY: the context's socket.
    let sk = unsafe { (*a).__bindgen_anon_1.sk };
    if sk.is_null() {
        return None;
    }
    stored(&SHOWN, sk.cast())
}

#[inline(always)]
fn write_ip(a: *mut bpf_sock_addr, v6: bool, ip: Ip) {
    // SAFETY: the program's context; one store a field, merged ones fail verification.
    unsafe {
        if v6 {
            core::ptr::write_volatile(&raw mut (*a).user_ip6[0], ip.0[0]);
            core::ptr::write_volatile(&raw mut (*a).user_ip6[1], ip.0[1]);
            core::ptr::write_volatile(&raw mut (*a).user_ip6[2], ip.0[2]);
            core::ptr::write_volatile(&raw mut (*a).user_ip6[3], ip.0[3]);
        } else {
            core::ptr::write_volatile(&raw mut (*a).user_ip4, ip.0[3]);
        }
    }
}

#[inline(always)]
fn peername(ctx: &SockAddrContext, v6: bool) -> i32 {
    let a = ctx.sock_addr;
    if let Some(shown) = shown(a) {
        write_ip(a, v6, shown.ip);
        // SAFETY: the program's context.
        unsafe {
            core::ptr::write_volatile(&raw mut (*a).user_port, shown.port.to_be() as u32);
        }
    }
    1
}

#[inline(always)]
fn sockname(ctx: &SockAddrContext, v6: bool) -> i32 {
    let a = ctx.sock_addr;
    let Some(shown) = shown(a) else { return 1 };
    if shown.redirected == 0 {
        return 1;
    }
    // SAFETY: the context has this helper.
    let netns = unsafe { bpf_get_netns_cookie(ctx.as_ptr()) };
    // SAFETY: entries are replaced whole.
    if let Some(entry) = unsafe { PODS.get(&netns) } {
        let own = if shown.ip.is_v4() { entry.ip4 } else { entry.ip6 };
        if own != Ip::UNSPECIFIED {
            write_ip(a, v6, own);
        }
    }
    1
}
