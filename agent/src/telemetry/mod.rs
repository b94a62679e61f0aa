//! Names of reasons, logging, metrics.

pub mod logging;
pub mod names;
pub mod reason;
