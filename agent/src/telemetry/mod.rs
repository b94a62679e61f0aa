//! Names of reasons, logging, metrics.

pub mod logging;
pub mod metrics;
pub mod names;
pub mod reason;
pub mod recent;
pub mod scrub;
