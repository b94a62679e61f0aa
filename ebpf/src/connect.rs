//! cgroup/connect4, connect6 (4.17) and sendmsg4, sendmsg6 (4.18): what a pod dials or
//! sends to, decided before a packet exists.

use crate::{
    maps::{self, Kernel, SHOWN, count, has, now, read, report, store},
    task,
};
use aya_ebpf::{
    EbpfContext,
    bindings::bpf_sock_addr,
    helpers::{
        bpf_get_current_cgroup_id, bpf_get_netns_cookie, bpf_get_socket_cookie, bpf_set_retval,
    },
    macros::cgroup_sock_addr,
    programs::SockAddrContext,
};
use signet_ebpf::{
    abi::{Handover, Ip, counter, feature, hook},
    decide::{Action, EPERM, Flow, PolicyMaps, decide_egress},
};

/// Loopback's interface index.
const LOOPBACK: u32 = 1;

#[cgroup_sock_addr(connect4)]
pub fn connect4(ctx: SockAddrContext) -> i32 {
    connect(&ctx, false)
}

#[cgroup_sock_addr(connect6)]
pub fn connect6(ctx: SockAddrContext) -> i32 {
    connect(&ctx, true)
}

#[cgroup_sock_addr(sendmsg4)]
pub fn sendmsg4(ctx: SockAddrContext) -> i32 {
    sendmsg(&ctx, false)
}

#[cgroup_sock_addr(sendmsg6)]
pub fn sendmsg6(ctx: SockAddrContext) -> i32 {
    sendmsg(&ctx, true)
}

/// The destination in the context.
#[inline(always)]
fn destination(a: *const bpf_sock_addr, v6: bool) -> Ip {
    // SAFETY: `a` is the program's context.
    unsafe {
        if v6 {
            Ip([
                read(&raw const (*a).user_ip6[0]),
                read(&raw const (*a).user_ip6[1]),
                read(&raw const (*a).user_ip6[2]),
                read(&raw const (*a).user_ip6[3]),
            ])
        } else {
            Ip::v4(read(&raw const (*a).user_ip4))
        }
    }
}

#[inline(always)]
fn flow_of(ctx: &SockAddrContext, v6: bool) -> Flow {
    let a = ctx.sock_addr;
    // SAFETY: `a` is the program's context.
    let (port, protocol) = unsafe {
        (u16::from_be(read(&raw const (*a).user_port) as u16), read(&raw const (*a).protocol) as u8)
    };
    Flow {
        // SAFETY: the context is of a type that has this helper.
        netns: unsafe { bpf_get_netns_cookie(ctx.as_ptr()) },
        task_netns: task::netns_of_task(),
        local: Ip::UNSPECIFIED,
        remote: destination(a, v6),
        local_port: 0,
        remote_port: port,
        // MPTCP's number (262) has TCP's as its low byte, and is TCP on the wire.
        protocol,
        steerable: true,
        now: now(),
    }
}

/// Refuses with `errno`; a kernel without `bpf_set_retval` (before 5.18) says EPERM.
#[inline(always)]
fn refuse(errno: u16) -> i32 {
    if errno != EPERM && has(feature::SET_RETVAL) {
        // SAFETY: a negative errno.
        unsafe { bpf_set_retval(-(errno as i32)) };
    }
    0
}

#[inline(always)]
fn connect(ctx: &SockAddrContext, v6: bool) -> i32 {
    let a = ctx.sock_addr;
    // SAFETY: the context's socket; null only where the kernel gives none.
    let sk = unsafe { (*a).__bindgen_anon_1.sk };
    if sk.is_null() {
        return 0;
    }
    let flow = flow_of(ctx, v6);
    let decision = decide_egress(&Kernel, &flow);
    // What passes is reported with its first packet, where both ports are known.
    if decision.report && decision.action == Action::Refuse {
        // SAFETY: plain helper call.
        report(&flow, &decision, false, hook::CONNECT, unsafe { bpf_get_current_cgroup_id() });
    }
    match decision.action {
        Action::Pass => {
            // A socket that was steered once and dials again shows what it dials now.
            maps::forget(&SHOWN, sk.cast());
            1
        }
        Action::Refuse => refuse(decision.errno),
        Action::Tunnel => {
            let Some(entry) = Kernel.pod(flow.netns) else { return refuse(EPERM) };
            let original = Handover {
                time: flow.now,
                // SAFETY: the context has this helper.
                cookie: unsafe { bpf_get_socket_cookie(ctx.as_ptr()) },
                ip: flow.remote,
                port: flow.remote_port,
                redirected: 1,
                taken: 0,
                pad: 0,
            };
            if !store(&SHOWN, sk.cast(), &original) {
                return refuse(EPERM);
            }
            count(counter::REDIRECTED);
            // A socket bound to a device cannot reach the loopback: the pod's own address
            // leads to the same listener.
            // SAFETY: the context's socket.
            let device = unsafe { read(&raw const (*sk).bound_dev_if) };
            let bound = device > LOOPBACK;
            // SAFETY: `a` is the program's context; fields are written one by one because
            // merged stores fail verification.
            unsafe {
                if flow.remote.is_v4() {
                    if entry.listener4 == 0 {
                        return refuse(EPERM);
                    }
                    let to = if bound { entry.ip4.0[3] } else { spread(original.cookie) };
                    core::ptr::write_volatile(
                        &raw mut (*a).user_port,
                        entry.listener4.to_be() as u32,
                    );
                    if v6 {
                        core::ptr::write_volatile(&raw mut (*a).user_ip6[3], to);
                    } else {
                        core::ptr::write_volatile(&raw mut (*a).user_ip4, to);
                    }
                } else if v6 {
                    if entry.listener6 == 0 || entry.listener6_count == 0 {
                        return refuse(EPERM);
                    }
                    let count = entry.listener6_count as u64;
                    let port = entry.listener6 + (original.cookie % count) as u16;
                    let to = if bound { entry.ip6 } else { Ip([0, 0, 0, 1u32.to_be()]) };
                    core::ptr::write_volatile(&raw mut (*a).user_port, port.to_be() as u32);
                    core::ptr::write_volatile(&raw mut (*a).user_ip6[0], to.0[0]);
                    core::ptr::write_volatile(&raw mut (*a).user_ip6[1], to.0[1]);
                    core::ptr::write_volatile(&raw mut (*a).user_ip6[2], to.0[2]);
                    core::ptr::write_volatile(&raw mut (*a).user_ip6[3], to.0[3]);
                }
            }
            1
        }
    }
}

/// One of 127.0.0.1 … 127.0.0.254: one destination would limit a pod to some 28,000
/// concurrent flows.
#[inline(always)]
fn spread(cookie: u64) -> u32 {
    u32::from_ne_bytes([127, 0, 0, (cookie % 254) as u8 + 1])
}

#[inline(always)]
fn sendmsg(ctx: &SockAddrContext, v6: bool) -> i32 {
    let flow = flow_of(ctx, v6);
    let decision = decide_egress(&Kernel, &flow);
    if let Action::Refuse = decision.action {
        if decision.report {
            // SAFETY: plain helper call.
            report(&flow, &decision, false, hook::SENDMSG, unsafe { bpf_get_current_cgroup_id() });
        }
        return refuse(decision.errno);
    }
    1
}
