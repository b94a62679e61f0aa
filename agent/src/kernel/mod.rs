//! The kernel's side of Signet: programs, maps, links, pins, and sockets to destroy.

pub mod clock;
mod error;
mod flow_sockets;

pub use error::KernelError;
pub use flow_sockets::{Confirm, FlowSockets};
