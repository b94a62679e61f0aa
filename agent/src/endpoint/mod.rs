//! This node's pods: found ([`discovery`]), planned for ([`plan`], pure) and applied
//! ([`reconcile`], the one task that writes the kernel's maps). [`check`] answers what would
//! become of a flow.

mod apply;
pub mod check;
pub mod discovery;
pub mod identities;
pub mod metrics;
pub mod phase;
pub mod plan;
pub mod probes;
pub mod reconcile;
pub mod rejudge;
pub mod released;
pub mod sockets;
pub mod state;
mod sweep;
pub mod tables;
mod watcher;
