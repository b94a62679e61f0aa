//! The programs attached to the workloads root, the node's root and the agent's cgroup,
//! one file a hook. Stable UAPI contexts only, so no CO-RE is needed.
#![no_std]
#![no_main]
#![feature(core_intrinsics)]
#![allow(internal_features, reason = "atomic_xadd is the one atomic that every BPF kernel has")]

mod connect;
mod filter;
mod maps;
mod packet;
mod sockname;
mod sockops;
mod task;

#[cfg(not(test))]
#[panic_handler]
fn panic(_: &core::panic::PanicInfo) -> ! {
    loop {}
}

#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
