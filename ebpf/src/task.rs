//! Which pod the calling task, or a packet's socket, belongs to by its cgroup.

use crate::maps::{CGROUPS, CONFIG};
use aya_ebpf::{
    bindings::__sk_buff,
    helpers::{bpf_get_current_ancestor_cgroup_id, bpf_skb_ancestor_cgroup_id},
};

/// How deep below the workloads root a pod's directory may be: guaranteed pods are one
/// level down, the other QoS classes two, systemd's slices alike.
const LEVELS: u32 = 2;

/// The network namespace registered for the calling task's pod, 0 for none.
#[inline(always)]
pub fn netns_of_task() -> u64 {
    let level = match CONFIG.get(0) {
        Some(config) => config.workloads_level,
        None => return 0,
    };
    let mut i = 1;
    while i <= LEVELS {
        // SAFETY: plain helper call; an id of 0 matches nothing.
        let id = unsafe { bpf_get_current_ancestor_cgroup_id((level + i) as i32) };
        // SAFETY: entries are replaced whole.
        if let Some(netns) = unsafe { CGROUPS.get(&id) } {
            return *netns;
        }
        i += 1;
    }
    0
}

/// The same for the socket that a packet belongs to.
#[inline(always)]
pub fn netns_of_packet(skb: *mut __sk_buff) -> u64 {
    let level = match CONFIG.get(0) {
        Some(config) => config.workloads_level,
        None => return 0,
    };
    let mut i = 1;
    while i <= LEVELS {
        // SAFETY: `skb` is the program's context.
        let id = unsafe { bpf_skb_ancestor_cgroup_id(skb, (level + i) as i32) };
        // SAFETY: entries are replaced whole.
        if let Some(netns) = unsafe { CGROUPS.get(&id) } {
            return *netns;
        }
        i += 1;
    }
    0
}
