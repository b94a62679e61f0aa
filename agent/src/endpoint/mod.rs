//! This node's pods: discovery and the reconcile loop.

pub mod sockets;
pub mod state;
