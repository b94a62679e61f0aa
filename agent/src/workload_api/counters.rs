//! What the Workload API counts.

use std::{
    collections::BTreeMap,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
};

use tonic::Code;

/// Connections and calls, since the agent's start.
#[derive(Debug, Default)]
pub struct Counters {
    accepted: AtomicU64,
    closed: AtomicU64,
    calls: Mutex<BTreeMap<(&'static str, i32), u64>>,
    sent: AtomicU64,
}

impl Counters {
    /// A connection was taken in, or closed for being too many.
    pub(super) fn connection(&self, taken_in: bool) {
        let counter = if taken_in { &self.accepted } else { &self.closed };
        counter.fetch_add(1, Relaxed);
    }

    /// A call was begun (`Ok`) or refused.
    pub(super) fn call(&self, method: &'static str, code: Code) {
        let mut calls = self.calls.lock().unwrap_or_else(PoisonError::into_inner);
        *calls.entry((method, code as i32)).or_default() += 1;
    }

    /// A message was sent on a stream.
    pub(super) fn message(&self) {
        self.sent.fetch_add(1, Relaxed);
    }

    /// All of them, by name with labels.
    pub fn all(&self) -> Vec<(String, u64)> {
        let mut all = vec![
            ("workload_api_connections".to_owned(), self.accepted.load(Relaxed)),
            ("workload_api_connections_over_limit".to_owned(), self.closed.load(Relaxed)),
            ("workload_api_stream_messages".to_owned(), self.sent.load(Relaxed)),
        ];
        let calls = self.calls.lock().unwrap_or_else(PoisonError::into_inner);
        for ((method, code), count) in calls.iter() {
            let code = Code::from(*code);
            all.push((
                format!("workload_api_calls{{method=\"{method}\",code=\"{code:?}\"}}"),
                *count,
            ));
        }
        all
    }
}
