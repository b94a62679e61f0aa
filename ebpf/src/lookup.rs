//! sk_lookup (5.9), one instance a pod: steers tunnels to the agent's listener and answers
//! refused plaintext with a reset at once.
//!
//! sk_lookup contexts have no netns cookie, so the loader writes it into this instance's
//! read-only data.
#![no_std]
#![no_main]
#![feature(core_intrinsics)]
#![allow(internal_features, reason = "atomic_xadd is the one atomic that every BPF kernel has")]

#[allow(dead_code, reason = "the other object's programs use the rest")]
mod maps;

use aya_ebpf::{bindings::bpf_sk_lookup, macros::sk_lookup, programs::SkLookupContext};
use maps::{Kernel, LISTENERS, now, read, report};
use signet_ebpf::{
    abi::{Ip, ListenerKey, hook, proto},
    decide::{Action, Flow, decide_ingress},
};

/// The network namespace that this instance is attached to.
#[unsafe(no_mangle)]
static NETNS: u64 = 0;

const SK_DROP: u32 = 0;
const SK_PASS: u32 = 1;
const LOOPBACK: u32 = 1;
const AF_INET: u32 = 2;
const AF_INET6: u32 = 10;

macro_rules! address {
    ($l:expr, $v6:expr, $f4:ident, $f6:ident) => {{
        let l = $l;
        // SAFETY: the program's context; both families are read, then a value selected,
        // because merged loads fail verification.
        unsafe {
            let v4 = read(&raw const (*l).$f4);
            let a = read(&raw const (*l).$f6[0]);
            let b = read(&raw const (*l).$f6[1]);
            let c = read(&raw const (*l).$f6[2]);
            let d = read(&raw const (*l).$f6[3]);
            if $v6 { Ip([a, b, c, d]) } else { Ip::v4(v4) }
        }
    }};
}

#[sk_lookup]
pub fn lookup(ctx: SkLookupContext) -> u32 {
    let l: *mut bpf_sk_lookup = ctx.lookup;
    // SAFETY: the program's context.
    let (protocol, interface, family) = unsafe {
        (
            read(&raw const (*l).protocol),
            read(&raw const (*l).ingress_ifindex),
            read(&raw const (*l).family),
        )
    };
    // UDP is cgroup_skb's; what stays inside the pod is the pod's own.
    if protocol != proto::TCP as u32 || interface <= LOOPBACK {
        return SK_PASS;
    }
    let v6 = family == AF_INET6;
    let local = address!(l, v6, local_ip4, local_ip6);
    let remote = address!(l, v6, remote_ip4, remote_ip6);
    // SAFETY: read-only data that the loader patched.
    let netns = unsafe { core::ptr::read_volatile(&raw const NETNS) };
    let flow = Flow {
        netns,
        task_netns: netns,
        local,
        remote,
        // SAFETY: the program's context; local_port is in host order, remote_port not.
        local_port: unsafe { read(&raw const (*l).local_port) } as u16,
        // SAFETY: as above.
        remote_port: u16::from_be(unsafe { read(&raw const (*l).remote_port) }),
        protocol: proto::TCP,
        steerable: false,
        now: now(),
    };
    let decision = decide_ingress(&Kernel, &flow);
    match decision.action {
        // Passing plaintext is reported by cgroup_skb, which sees TCP's flags.
        Action::Pass => SK_PASS,
        Action::Refuse => {
            if decision.report {
                report(&flow, &decision, true, hook::LOOKUP, 0);
            }
            SK_DROP
        }
        Action::Tunnel => {
            let key = ListenerKey { netns, family: if v6 { AF_INET6 } else { AF_INET }, pad: 0 };
            match LISTENERS.redirect_sk_lookup(&ctx, &key, 0) {
                Ok(()) => SK_PASS,
                // The agent is dead: its socket left the map.
                Err(_) => SK_DROP,
            }
        }
    }
}

#[cfg(not(test))]
#[panic_handler]
fn panic(_: &core::panic::PanicInfo) -> ! {
    loop {}
}

#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
