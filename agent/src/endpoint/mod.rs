//! This node's pods: discovery and the reconcile loop.

pub mod state;
