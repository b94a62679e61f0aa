//! The main promises; run in every variant.

mod calls;
mod egress;
mod features;
mod metrics;
mod modes;
mod raw_guard;
mod refusals;
mod restart;
mod rights;
mod rollout;
mod udp;
pub mod workload_api;
