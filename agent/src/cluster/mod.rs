//! What a node must know of its cluster.
//!
//! [`files`] follows a directory of manifests and publishes a [`model::World`] for every
//! change; [`manifest`] reads one file, [`objects`] takes from each object what matters,
//! [`assemble`] joins them, whatever their source; [`modes`] are the rules of labels,
//! [`plaintext`] those of PeerAuthentications; [`offline`] reads manifests once;
//! [`enrolment`] says who is served, [`builtins`] what passes without a policy, [`called`] what
//! the API server calls, [`serving`] which endpoints of a Service a client is given,
//! [`network_policy`] reads what is not ours to enforce but in tunnels' way.

pub mod assemble;
pub mod builtins;
pub mod called;
mod collected;
pub mod enrolment;
pub mod files;
pub mod kubernetes;
pub mod manifest;
pub mod model;
pub mod modes;
pub mod network_policy;
pub mod objects;
pub mod offline;
pub mod plaintext;
pub mod serving;
pub mod source;
