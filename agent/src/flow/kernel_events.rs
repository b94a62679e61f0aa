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

use super::{
    parties::known_by_address,
    record::{FlowEvent, FlowRecord, KnownBy, Party, Reporter, Via},
};
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
            http: None,
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
        identity: Some(endpoint.identity.clone()),
        known_by: KnownBy::Kernel,
        ..Party::of_pod(&endpoint.pod, SocketAddr::new(ip, event.local_port))
    }
}

/// The other side, of which the kernel knows only the address.
fn peer_party(event: &Event, state: &NodeState) -> Party {
    let address = SocketAddr::new(event.remote.to_std(), event.remote_port);
    known_by_address(address, state, Some(event.remote_identity))
}

#[cfg(test)]
mod tests {
    use std::{collections::HashMap, sync::Arc};

    use super::*;
    use crate::{
        cluster::model::{ObjectName, World},
        flow::example::{at, endpoint, identity, pod},
        policy::model::{Action, Policy, PolicyName, Selector},
        spiffe::TrustDomain,
    };

    const NETNS: u64 = 77;

    /// node-2 with shop/payments-5b7f (10.0.2.7), and shop/frontend-7d9c (10.0.1.5) elsewhere.
    fn state() -> NodeState {
        let mut world = World::empty(TrustDomain::parse("cluster.local").unwrap());
        let frontend = pod("shop/frontend-7d9c", Mode::Strict);
        world.pods_by_ip.insert("10.0.1.5".parse().unwrap(), frontend.uid.clone());
        world.pods.insert(frontend.uid.clone(), frontend);
        let service = ObjectName { namespace: "shop".into(), name: "catalog".into() };
        world.services_by_ip.insert("10.96.0.7".parse().unwrap(), service);
        let payments = endpoint(&pod("shop/payments-5b7f", Mode::Strict), NETNS, "10.0.2.7");
        let name = PolicyName {
            kind: "IdentityPolicy".into(),
            namespace: "shop".into(),
            name: "no-ping".into(),
        };
        let selector = Selector::default();
        let policy = Policy { governs_ingress: true, ..Policy::new(name, selector, Action::Deny) };
        NodeState {
            endpoints: HashMap::from([(NETNS, payments)]),
            identities: Arc::new(HashMap::from([(300, identity("shop", "frontend"))])),
            policies: Arc::new(HashMap::from([(4, Arc::new(policy))])),
            ..NodeState::empty("node-2".into(), Arc::new(world))
        }
    }

    fn ip(s: &str) -> Ip {
        Ip::from_std(s.parse().unwrap())
    }

    /// Plaintext from the frontend's address, refused at the lookup.
    fn event() -> Event {
        Event {
            time: 5_000_000_000,
            netns: NETNS,
            cgroup: NETNS + 1000,
            revision: 118,
            local: ip("10.0.2.7"),
            remote: ip("10.0.1.5"),
            policy: 0,
            remote_identity: 300,
            local_port: 8080,
            remote_port: 40_000,
            reason: Reason::PlaintextRefused as u16,
            verdict: Verdict::Dropped as u8,
            direction: Direction::Ingress as u8,
            protocol: 6,
            mode: Mode::Strict as u8,
            hook: hook::LOOKUP,
            pad: [0; 5],
        }
    }

    fn convert(event: &Event) -> Option<FlowRecord> {
        KernelEvents::new(true).convert(event, &state(), ClockOffset::from_origin(at(0)))
    }

    #[test]
    fn an_inbound_event_names_both_sides() {
        let record = convert(&event()).unwrap();
        assert_eq!(record.time, at(5000));
        assert_eq!(record.reporter, Reporter::Destination);
        assert_eq!((record.via, record.reason), (Via::Plaintext, Reason::PlaintextRefused));
        assert_eq!(&*record.node, "node-2");
        assert_eq!(record.extra, [("mode", "strict".to_owned())]);
        let names = |p: &Party| p.pod.as_ref().map(|(ns, n)| format!("{ns}/{n}"));
        assert_eq!(names(&record.source).as_deref(), Some("shop/frontend-7d9c"));
        assert_eq!(record.source.known_by, KnownBy::Address);
        assert_eq!(record.source.identity, Some(identity("shop", "frontend")));
        assert_eq!(names(&record.destination).as_deref(), Some("shop/payments-5b7f"));
        assert_eq!(record.destination.known_by, KnownBy::Kernel);
        assert_eq!(record.destination.port, 8080);
    }

    #[test]
    fn an_address_without_a_number_is_known_from_the_world() {
        let record = convert(&Event { remote_identity: 0, ..event() }).unwrap();
        assert_eq!(record.source.identity, Some(identity("shop", "frontend")));
        assert_eq!(record.source.known_by, KnownBy::Address);
        let stranger = Event { remote_identity: 0, remote: ip("10.0.1.6"), ..event() };
        let source = convert(&stranger).unwrap().source;
        assert_eq!((source.identity, source.known_by), (None, KnownBy::Unknown));
    }

    #[test]
    fn an_outbound_refusal_carries_errno_policy_and_the_pods_address() {
        let connect = Event {
            hook: hook::CONNECT,
            direction: Direction::Egress as u8,
            local: Ip::UNSPECIFIED,
            local_port: 0,
            remote: ip("10.96.0.7"),
            remote_port: 80,
            remote_identity: 0,
            reason: Reason::PolicyDeny as u16,
            policy: 4,
            ..event()
        };
        let record = convert(&connect).unwrap();
        assert_eq!(record.reporter, Reporter::Source);
        assert_eq!(record.source.ip, "10.0.2.7".parse::<IpAddr>().unwrap());
        assert_eq!(record.policy.unwrap().name.as_ref(), "no-ping");
        assert_eq!(record.destination.service.as_deref(), Some("shop/catalog"));
        assert_eq!(record.destination.known_by, KnownBy::Unknown);
        assert_eq!(record.extra[1], ("errno", "EPERM".to_owned()));

        let unreachable = Event { reason: Reason::PeerUnreachable as u16, ..connect };
        assert_eq!(convert(&unreachable).unwrap().extra[1].1, "ECONNREFUSED");
        // Without bpf_set_retval there is only one errno.
        let mut old = KernelEvents::new(false);
        let record = old.convert(&unreachable, &state(), ClockOffset::from_origin(at(0))).unwrap();
        assert_eq!(record.extra[1].1, "EPERM");
    }

    #[test]
    fn a_namespace_made_inside_a_pod_is_that_pods_doing() {
        let nested = Event { netns: 4711, ..event() };
        let destination = convert(&nested).unwrap().destination;
        assert_eq!(destination.pod.unwrap().1.as_ref(), "payments-5b7f");
        let stranger = Event { netns: 4711, cgroup: 1, ..event() };
        let destination = convert(&stranger).unwrap().destination;
        assert_eq!((destination.pod, destination.known_by), (None, KnownBy::Unknown));
    }

    #[test]
    fn a_repeated_syn_is_one_record_and_another_port_is_not() {
        let mut events = KernelEvents::new(true);
        let (state, clock) = (state(), ClockOffset::from_origin(at(0)));
        let mut at_ms = |ms: u64, event: Event| {
            let event = Event { time: 60_000_000_000 + ms * 1_000_000, ..event };
            events.convert(&event, &state, clock).is_some()
        };
        assert!(at_ms(0, event()));
        assert!(!at_ms(1000, event()));
        assert!(!at_ms(3000, event()), "two seconds after the last");
        assert!(at_ms(3001, Event { remote_port: 40_001, ..event() }));
        assert!(at_ms(3002, Event { reason: Reason::PolicyDeny as u16, ..event() }));
        assert!(at_ms(20_000, event()), "much later it is another attempt");
        // Each connect is an attempt of its own.
        let connect = Event { hook: hook::CONNECT, local_port: 0, ..event() };
        assert!(at_ms(20_001, connect) && at_ms(20_002, connect));
    }

    #[test]
    fn what_is_remembered_is_bounded() {
        let mut events = KernelEvents::new(true);
        let (state, clock) = (state(), ClockOffset::from_origin(at(0)));
        for n in 0..3 * REMEMBERED as u32 {
            let event = Event { remote: Ip([0, 0, 1, n]), ..event() };
            assert!(events.convert(&event, &state, clock).is_some());
        }
        assert!(events.recent.len() <= REMEMBERED && events.earlier.len() <= REMEMBERED);
    }

    #[test]
    fn numbers_that_nobody_writes_make_no_record() {
        assert!(convert(&event()).is_some());
        assert!(convert(&Event { reason: 4000, ..event() }).is_none());
        assert!(convert(&Event { verdict: 9, ..event() }).is_none());
    }

    #[test]
    fn the_clock_offset_leads_to_now() {
        let t = clock_gettime(ClockId::Monotonic);
        let monotonic = t.tv_sec as u64 * 1_000_000_000 + t.tv_nsec as u64;
        let wall = ClockOffset::now().wall(monotonic);
        let error = wall.duration_since(Timestamp::now()).abs();
        assert!(error < SignedDuration::from_secs(1), "{error:?}");
    }
}
