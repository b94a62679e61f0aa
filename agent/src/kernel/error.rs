//! What can go wrong with the kernel. Every one of these is exit code 6.

use aya::maps::MapError;

/// Why the kernel's side cannot be set up or changed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum KernelError {
    /// A map operation failed.
    #[error("cannot {action} the BPF map {map}")]
    Map {
        /// The map's name.
        map: &'static str,
        /// What was tried.
        action: &'static str,
        /// aya's error.
        #[source]
        source: MapError,
    },
}
