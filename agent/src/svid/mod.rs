//! SVIDs: who issues them, and which this node holds and renews.

pub mod issuer;
pub mod manager;
pub mod metrics;
mod schedule;

pub use crate::spiffe::Svid;
pub use manager::{Clock, SvidHandle, SvidKey, SvidManager, SvidParams, SvidStatus};
