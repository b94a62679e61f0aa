//! Flow records: what was decided, kept and merged.
//!
//! Whoever decides a flow hands a [`record::FlowRecord`] to a [`Recorder`]; the
//! [`Collector`] moves it into the ring, from which a [`FlowLog`] answers, and counts it in
//! the history ([`edges`]).

pub mod access_log;
pub mod edges;
#[cfg(test)]
pub(crate) mod example;
mod hits;
pub mod istio_metrics;
pub mod kernel_events;
pub mod merge;
pub mod parties;
pub mod record;
pub mod recorder;
pub mod ring;

pub use edges::Edges;
pub use istio_metrics::IstioMetrics;
pub use record::{FlowEvent, FlowRecord, HttpRecord, KnownBy, Party, Reporter, Via};
pub use recorder::{
    Collector, FlowLog, Followed, Follower, Limits, LostCause, Recorder, Sinks, start,
};
