//! SPIFFE IDs, trust domains, bundles and SVIDs: parse, validate, encode. Pure.

pub mod id;

pub use id::{SpiffeId, SpiffeIdError, TrustDomain};
