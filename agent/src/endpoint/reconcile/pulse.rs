//! The task's pulse: what `signet probe` asks about.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use crate::kernel::clock;

/// When the task turned last, and whether everything was in place once. Written by the task,
/// read by the admin service.
#[derive(Clone, Debug, Default)]
pub struct Pulse(Arc<Beats>);

#[derive(Debug, Default)]
struct Beats {
    /// `CLOCK_MONOTONIC` in nanoseconds; 0: not yet.
    turned: AtomicU64,
    settled: AtomicBool,
}

impl Pulse {
    /// How long ago the task finished a turn; `None` before its first.
    pub fn since_turn(&self) -> Option<Duration> {
        match self.0.turned.load(Ordering::Relaxed) {
            0 => None,
            at => Some(Duration::from_nanos(clock::monotonic().saturating_sub(at))),
        }
    }

    /// True once every enforced pod that was there has got its listeners (or was told why not).
    pub fn is_settled(&self) -> bool {
        self.0.settled.load(Ordering::Relaxed)
    }

    pub(super) fn turned(&self) {
        self.0.turned.store(clock::monotonic(), Ordering::Relaxed);
    }

    pub(super) fn settle(&self) {
        self.0.settled.store(true, Ordering::Relaxed);
    }
}
