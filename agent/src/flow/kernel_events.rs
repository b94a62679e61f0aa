//! The kernel's verdicts as flow records.
//!
//! An [`Event`] names a pod by its network namespace and everything else by number and
//! address; the [`NodeState`] turns that into names. A SYN that is sent again makes the
//! same verdict again: one record of it is enough.

use std::{
    collections::HashSet,
    net::{IpAddr, SocketAddr},
};

use jiff::{SignedDuration, Timestamp};
use rustix::time::{ClockId, clock_gettime};
use signet_ebpf::abi::{Direction, Event, Ip, Mode, Reason, Verdict, hook};
use uuid::Uuid;

use super::record::{FlowEvent, FlowRecord, KnownBy, Party, Reporter, Via};
use crate::{endpoint::state::NodeState, telemetry::names};

/// The same flow refused again within this time is a retransmission.
const RETRANSMISSION: u64 = 3_000_000_000;
/// Flows remembered for that; beyond, retransmissions are recorded again.
const REMEMBERED: usize = 4096;

/// How far the wall clock is ahead of the monotonic one.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ClockOffset(SignedDuration);

impl ClockOffset {
    /// As it is now; the wall clock may be set, so measure it again for each batch.
    pub fn now() -> Self {
        let t = clock_gettime(ClockId::Monotonic);
        // CLOCK_MONOTONIC's nanoseconds are below 10^9.
        let monotonic = SignedDuration::new(t.tv_sec, i32::try_from(t.tv_nsec).unwrap_or(0));
        Self(Timestamp::now().as_duration() - monotonic)
    }

    /// For tests and replay: a monotonic time of 0 is this moment.
    pub fn from_origin(origin: Timestamp) -> Self {
        Self(origin.as_duration())
    }

    /// The wall-clock time of a monotonic one in nanoseconds.
    pub fn wall(self, monotonic: u64) -> Timestamp {
        let since = SignedDuration::from_nanos(i64::try_from(monotonic).unwrap_or(i64::MAX));
        self.0
            .checked_add(since)
            .and_then(|d| Timestamp::from_duration(d).ok())
            .unwrap_or(Timestamp::MAX)
    }
}

/// Turns events into records.
#[derive(Debug)]
pub struct KernelEvents {
    /// `bpf_set_retval` is there: refusals carry the errno that was meant.
    any_errno: bool,
    recent: HashSet<Seen>,
    earlier: HashSet<Seen>,
    rotated: u64,
}

impl KernelEvents {
    /// `any_errno`: the programs run with `feature::SET_RETVAL`.
    pub fn new(any_errno: bool) -> Self {
        Self { any_errno, recent: HashSet::new(), earlier: HashSet::new(), rotated: 0 }
    }

    /// The record of an event; `None` for a retransmission and for numbers that no
    /// program of this ABI writes.
    pub fn convert(
        &mut self,
        event: &Event,
        state: &NodeState,
        clock: ClockOffset,
    ) -> Option<FlowRecord> {
        let reason = Reason::from_u16(event.reason)?;
        let verdict = verdict_of(event.verdict)?;
        if self.is_repeated(event) {
            return None;
        }
        let direction = if event.direction == Direction::Ingress as u8 {
            Direction::Ingress
        } else {
            Direction::Egress
        };
        let own = own_party(event, state);
        let peer = peer_party(event, state);
        let (source, destination, reporter) = match direction {
            Direction::Egress => (own, peer, Reporter::Source),
            Direction::Ingress => (peer, own, Reporter::Destination),
        };
        let mut extra = vec![("mode", names::mode(Mode::from_u8(event.mode)).to_owned())];
        if let Some(errno) = self.errno(event, verdict, reason) {
            extra.push(("errno", errno.to_owned()));
        }
        Some(FlowRecord {
            time: clock.wall(event.time),
            event: FlowEvent::Verdict,
            uuid: Uuid::new_v4(),
            node: state.node.clone(),
            reporter,
            direction,
            protocol: event.protocol,
            via: Via::Plaintext,
            verdict,
            reason,
            policy: state.policies.get(&event.policy).map(|p| p.name.clone()),
            revision: event.revision,
            extra,
            source,
            destination,
        })
    }

    /// What the application's call returned (`ebpf/src/decide.rs` decides which).
    fn errno(&self, event: &Event, verdict: Verdict, reason: Reason) -> Option<&'static str> {
        let by_call = matches!(event.hook, hook::CONNECT | hook::SENDMSG);
        if verdict != Verdict::Dropped || !by_call {
            return None;
        }
        let retry = match reason {
            Reason::MapFull
            | Reason::SvidMissing
            | Reason::PeerUnreachable
            | Reason::IdentityUnknown => true,
            // A network namespace made inside a strict pod never becomes registered.
            Reason::PodUnregistered => Mode::from_u8(event.mode) != Mode::Strict,
            _ => false,
        };
        Some(if retry && self.any_errno { "ECONNREFUSED" } else { "EPERM" })
    }

    fn is_repeated(&mut self, event: &Event) -> bool {
        // Each connect is an attempt of its own; packets may be the same one again.
        if event.hook == hook::CONNECT {
            return false;
        }
        if event.time.saturating_sub(self.rotated) >= RETRANSMISSION {
            let stale = event.time.saturating_sub(self.rotated) >= 2 * RETRANSMISSION;
            self.earlier = std::mem::take(&mut self.recent);
            if stale {
                self.earlier.clear();
            }
            self.rotated = event.time;
        }
        let seen = Seen::of(event);
        let repeated = self.recent.contains(&seen) || self.earlier.contains(&seen);
        if self.recent.len() < REMEMBERED {
            self.recent.insert(seen);
        }
        repeated
    }
}

/// What makes two events one flow's.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
struct Seen {
    netns: u64,
    local: Ip,
    remote: Ip,
    local_port: u16,
    remote_port: u16,
    reason: u16,
    protocol: u8,
    verdict: u8,
    direction: u8,
}

impl Seen {
    fn of(event: &Event) -> Self {
        Self {
            netns: event.netns,
            local: event.local,
            remote: event.remote,
            local_port: event.local_port,
            remote_port: event.remote_port,
            reason: event.reason,
            protocol: event.protocol,
            verdict: event.verdict,
            direction: event.direction,
        }
    }
}

fn verdict_of(number: u8) -> Option<Verdict> {
    [Verdict::Forwarded, Verdict::Dropped, Verdict::Audit].into_iter().find(|v| *v as u8 == number)
}

/// The pod that the event is about: attested by its network namespace or its cgroup.
fn own_party(event: &Event, state: &NodeState) -> Party {
    let endpoint = state.endpoints.get(&event.netns).or_else(|| {
        // A namespace made inside a pod's cgroup is that pod's doing.
        state.endpoints.values().find(|e| event.cgroup != 0 && e.cgroup == event.cgroup)
    });
    let remote = event.remote.to_std();
    let shown = event.local.to_std();
    let Some(endpoint) = endpoint else {
        return known_by_address(SocketAddr::new(shown, event.local_port), state, None);
    };
    let ip = if shown.is_unspecified() {
        let same_family = |a: &&IpAddr| a.is_ipv4() == remote.is_ipv4();
        endpoint.addresses.iter().find(same_family).copied().unwrap_or(shown)
    } else {
        shown
    };
    Party {
        pod: Some((endpoint.pod.name.namespace.clone(), endpoint.pod.name.name.clone())),
        service_account: Some(endpoint.pod.service_account.clone()),
        identity: Some(endpoint.identity.clone()),
        known_by: KnownBy::Kernel,
        service: None,
        ip,
        port: event.local_port,
    }
}

/// The other side, of which the kernel knows only the address.
fn peer_party(event: &Event, state: &NodeState) -> Party {
    let address = SocketAddr::new(event.remote.to_std(), event.remote_port);
    known_by_address(address, state, Some(event.remote_identity))
}

fn known_by_address(address: SocketAddr, state: &NodeState, number: Option<u32>) -> Party {
    let mut party = Party::unknown(address);
    let world = &state.world;
    if let Some(pod) = world.pods_by_ip.get(&address.ip()).and_then(|uid| world.pods.get(uid)) {
        party.pod = Some((pod.name.namespace.clone(), pod.name.name.clone()));
        party.service_account = Some(pod.service_account.clone());
    }
    if let Some(service) = world.services_by_ip.get(&address.ip()) {
        party.service = Some(format!("{}/{}", service.namespace, service.name).into());
    }
    if let Some(identity) = number.and_then(|n| state.identities.get(&n)) {
        party.identity = Some(identity.clone());
        party.known_by = KnownBy::Address;
    }
    party
}
