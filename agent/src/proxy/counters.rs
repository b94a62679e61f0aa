//! What the data plane counts.

use std::{
    collections::BTreeMap,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use super::Stats;
use crate::telemetry::metrics::Reading;

/// Counts since the start, shared by all cores.
#[derive(Debug, Default)]
pub struct Counters {
    /// Flows whose verdict was FORWARDED or AUDIT.
    pub forwarded: AtomicU64,
    /// Flows that were refused.
    pub refused: AtomicU64,
    /// Handshakes that succeeded, as a server.
    pub accepted: AtomicU64,
    /// Handshakes that succeeded, as a client.
    pub dialled: AtomicU64,
    /// Sockets that reached an outbound listener without having been redirected.
    pub unattributed: AtomicU64,
    /// Flows whose client showed an SVID, from an address of another account's pod.
    pub misplaced: AtomicU64,
    /// Flows given up by their own client before they were decided.
    pub abandoned: AtomicU64,
    failures: Mutex<BTreeMap<&'static str, u64>>,
}

impl Counters {
    /// Counts one.
    pub fn add(counter: &AtomicU64) {
        counter.fetch_add(1, Ordering::Relaxed);
    }

    /// Counts a failed handshake or connection by its kind.
    pub fn failed(&self, kind: &'static str) {
        *self.lock().entry(kind).or_default() += 1;
    }

    /// Failures by kind.
    pub fn failures(&self) -> BTreeMap<&'static str, u64> {
        self.lock().clone()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeMap<&'static str, u64>> {
        // A count is one operation: nothing half-done is left by a panic.
        self.failures.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Stats {
    /// As metrics.
    pub fn readings(&self) -> Vec<Reading> {
        let counter = |name, help, value: u64| Reading::counter(name, help).value(value);
        vec![
            Reading::gauge("open_flows", "Flows that are open or being opened")
                .value(self.open_flows),
            Reading::gauge("tasks", "Accept loops, flows and connections of the data plane")
                .value(self.tasks),
            Reading::gauge("pooled_connections", "Tunnels that may take new flows, as a client")
                .value(self.pooled_connections),
            Reading::counter("handshakes", "Handshakes of tunnels that succeeded, by role")
                .each("role", [("client", self.dialled), ("server", self.accepted)]),
            counter("flows_forwarded", "Flows that the proxy let through", self.forwarded),
            counter("flows_refused", "Flows and connections that the proxy refused", self.refused),
            counter(
                "flows_abandoned",
                "Flows whose client left before they were decided",
                self.abandoned,
            ),
            counter(
                "flows_unattributed",
                "Sockets that reached an outbound listener without having been redirected",
                self.unattributed,
            ),
            counter(
                "flows_from_another_accounts_address",
                "Flows whose client showed an SVID from an address of another account's pod",
                self.misplaced,
            ),
            Reading::counter(
                "tunnel_failures",
                "Dials, handshakes and connections of tunnels that failed, by kind",
            )
            .each("kind", self.failures.iter().map(|(kind, count)| (*kind, *count))),
        ]
    }
}
