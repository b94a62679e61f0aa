//! The kernel's side of Signet: programs, maps, links, pins, and sockets to destroy.

mod bpf;
mod bpffs;
pub mod cgroup;
pub mod clock;
pub mod contents;
pub mod destroy;
mod error;
pub mod events;
pub mod features;
mod flow_sockets;
pub mod maps;
pub mod memory;
mod pinned;
mod pins;
pub mod preflight;
mod programs;
#[cfg(test)]
pub(crate) mod test_host;

pub use error::KernelError;
pub use flow_sockets::{Confirm, FlowSockets};
pub use maps::{Counters, Maps};
pub use pinned::{Pinned, Removed};
pub use programs::{KernelConfig, Programs, check_permitted};
