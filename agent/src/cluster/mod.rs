//! What a node must know of its cluster.

pub mod model;
