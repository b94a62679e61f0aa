//! Names of reasons, logging, metrics.

pub mod reason;
