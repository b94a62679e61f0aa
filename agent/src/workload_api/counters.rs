//! What the Workload API counts.

use std::{
    collections::BTreeMap,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
};

use tonic::Code;

use crate::telemetry::metrics::Reading;

/// Connections and calls, since the agent's start.
#[derive(Debug, Default)]
pub struct Counters {
    accepted: AtomicU64,
    closed: AtomicU64,
    calls: Mutex<BTreeMap<(&'static str, i32), u64>>,
    unattested: Mutex<BTreeMap<&'static str, u64>>,
    tokens: Mutex<BTreeMap<&'static str, u64>>,
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
        add(&self.calls, (method, code as i32));
    }

    /// A caller is not known as a workload.
    pub(super) fn unattested(&self, reason: &'static str) {
        add(&self.unattested, reason);
    }

    /// A JWT-SVID was `issued`, handed out again (`cached`), or there is none (`failed`).
    pub(super) fn token(&self, result: &'static str) {
        add(&self.tokens, result);
    }

    /// A message was sent on a stream.
    pub(super) fn message(&self) {
        self.sent.fetch_add(1, Relaxed);
    }

    /// All of them.
    pub fn readings(&self) -> Vec<Reading> {
        let mut calls = Reading::counter(
            "workload_api_calls",
            "Calls of the Workload API by method and the code that they began with",
        );
        for ((method, code), count) in held(&self.calls) {
            let code = format!("{:?}", Code::from(code));
            calls = calls.labelled(vec![("method", method.to_owned()), ("code", code)], count);
        }
        vec![
            Reading::counter("workload_api_connections", "Connections that were taken in")
                .value(self.accepted.load(Relaxed)),
            Reading::counter(
                "workload_api_connections_over_limit",
                "Connections that were closed since their caller had too many",
            )
            .value(self.closed.load(Relaxed)),
            Reading::counter("workload_api_stream_messages", "Messages sent on streams")
                .value(self.sent.load(Relaxed)),
            calls,
            Reading::counter(
                "workload_api_unattested",
                "Connections and calls whose process is no workload, by reason",
            )
            .each("reason", held(&self.unattested)),
            Reading::counter("jwt_svids", "JWT-SVIDs that workloads asked for, by result")
                .each("result", held(&self.tokens)),
        ]
    }
}

fn add<K: Ord>(counts: &Mutex<BTreeMap<K, u64>>, key: K) {
    // A count is one operation: nothing half-done is left by a panic.
    *counts.lock().unwrap_or_else(PoisonError::into_inner).entry(key).or_default() += 1;
}

fn held<K: Ord + Clone>(counts: &Mutex<BTreeMap<K, u64>>) -> BTreeMap<K, u64> {
    counts.lock().unwrap_or_else(PoisonError::into_inner).clone()
}
