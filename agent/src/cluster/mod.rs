//! What a node must know of its cluster.
//!
//! [`files`] follows a directory of manifests and publishes a [`model::World`] for every
//! change; [`assemble`] makes the World of objects, whatever their source; [`modes`] are the
//! rules of labels; [`enrolment`] says who is served.

pub mod model;
