//! Example records and states, for the tests of everything that reads them.

use std::{collections::BTreeMap, net::SocketAddr, sync::Arc};

use jiff::Timestamp;
use signet_ebpf::abi::{Direction, Mode, Reason, Verdict};
use uuid::Uuid;

use super::record::{FlowEvent, FlowRecord, HttpRecord, KnownBy, Party, Reporter, Via};
use crate::{
    cluster::model::{ModeOrigin, ObjectName, Pod, Workload},
    endpoint::state::{EndpointKey, EndpointState},
    policy::model::PolicyName,
    spiffe::SpiffeId,
};

/// `2026-08-06T10:12:00Z` and so many milliseconds.
pub(crate) fn at(ms: i64) -> Timestamp {
    Timestamp::from_millisecond(1_786_011_120_000 + ms).unwrap()
}

/// A pod `namespace/name` whose account has the name's first word.
pub(crate) fn party(pod: &str, known_by: KnownBy, address: &str) -> Party {
    let address: SocketAddr = address.parse().unwrap();
    let (namespace, name) = pod.split_once('/').unwrap();
    let account = name.split('-').next().unwrap();
    Party {
        pod: Some((namespace.into(), name.into())),
        service_account: Some(account.into()),
        identity: Some(identity(namespace, account)),
        known_by,
        ..Party::unknown(address)
    }
}

pub(crate) fn identity(namespace: &str, account: &str) -> SpiffeId {
    SpiffeId::parse(&format!("spiffe://cluster.local/ns/{namespace}/sa/{account}")).unwrap()
}

/// frontend → payments, allowed, as the destination reports it.
pub(crate) fn allowed() -> FlowRecord {
    FlowRecord {
        time: at(4318),
        event: FlowEvent::Verdict,
        uuid: Uuid::from_u128(7),
        node: "node-2".into(),
        reporter: Reporter::Destination,
        direction: Direction::Ingress,
        protocol: 6,
        via: Via::Mtls,
        verdict: Verdict::Forwarded,
        reason: Reason::Allowed,
        policy: Some(PolicyName {
            kind: "IdentityPolicy".into(),
            namespace: "shop".into(),
            name: "payments-callers".into(),
        }),
        revision: 118,
        extra: vec![],
        http: None,
        source: Party {
            labels: Arc::new(BTreeMap::from([("app".into(), "frontend".into())])),
            workload: Some(Workload { kind: "Deployment".into(), name: "frontend".into() }),
            ..party("shop/frontend-7d9c", KnownBy::Mtls, "10.0.1.5:41872")
        },
        destination: Party {
            service: Some("shop/payments".into()),
            ..party("shop/payments-5b7f", KnownBy::Kernel, "10.0.2.7:8080")
        },
    }
}

/// The same flow as the source reports it.
pub(crate) fn as_source(record: &FlowRecord) -> FlowRecord {
    FlowRecord {
        node: "node-1".into(),
        reporter: Reporter::Source,
        direction: Direction::Egress,
        ..record.clone()
    }
}

/// A denied identity.
pub(crate) fn denied() -> FlowRecord {
    FlowRecord {
        time: at(5002),
        uuid: Uuid::from_u128(8),
        verdict: Verdict::Dropped,
        reason: Reason::PolicyNoMatch,
        source: party("shop/intruder-x2", KnownBy::Mtls, "10.0.1.9:51544"),
        ..allowed()
    }
}

/// Plaintext from somebody unknown, refused by strict.
pub(crate) fn refused() -> FlowRecord {
    FlowRecord {
        time: at(6777),
        uuid: Uuid::from_u128(9),
        via: Via::Plaintext,
        verdict: Verdict::Dropped,
        reason: Reason::PlaintextRefused,
        policy: None,
        extra: vec![("mode", "strict".into())],
        source: Party::unknown("10.9.0.7:39990".parse().unwrap()),
        ..allowed()
    }
}

/// A request of [`allowed`] that policy refuses.
pub(crate) fn request_refused() -> FlowRecord {
    FlowRecord {
        time: at(5102),
        verdict: Verdict::Dropped,
        reason: Reason::PolicyNoMatch,
        http: Some(Box::new(HttpRecord {
            method: "GET".into(),
            path: "/api/v1/admin".into(),
            version: "HTTP/1.1",
            status: 403,
            latency: std::time::Duration::from_micros(350),
        })),
        ..allowed()
    }
}

/// The end of [`allowed`].
pub(crate) fn ended() -> FlowRecord {
    FlowRecord {
        time: at(9120),
        event: FlowEvent::End {
            sent: 1204,
            received: 340,
            duration: std::time::Duration::from_millis(4802),
        },
        policy: None,
        ..allowed()
    }
}

/// A pod of node-2.
pub(crate) fn pod(name: &str, mode: Mode) -> Arc<Pod> {
    let (namespace, name) = name.split_once('/').unwrap();
    Arc::new(Pod {
        uid: format!("uid-of-{name}").into(),
        name: ObjectName { namespace: namespace.into(), name: name.into() },
        service_account: name.split('-').next().unwrap().into(),
        node: Some("node-2".into()),
        ips: Vec::new(),
        labels: Arc::default(),
        workload: None,
        host_network: false,
        finished: false,
        terminating: false,
        alive: true,
        mirror: false,
        named_ports: BTreeMap::new(),
        mode,
        mode_origin: ModeOrigin::Namespace,
        exempt_ports: Arc::default(),
        strict_ports: None,
        unenforceable: None,
        captured: false,
    })
}

/// That pod, registered under a network namespace.
pub(crate) fn endpoint(pod: &Arc<Pod>, netns: u64, address: &str) -> Arc<EndpointState> {
    let account = &pod.service_account;
    Arc::new(EndpointState {
        key: EndpointKey { uid: pod.uid.clone(), netns },
        pod: pod.clone(),
        identity: identity(&pod.name.namespace, account),
        identity_number: 257,
        mode: pod.mode,
        addresses: vec![address.parse().unwrap()],
        cgroup_path: format!("/kubepods/pod{}", pod.uid).into(),
        cgroup: netns + 1000,
        policies: Arc::new([]),
        request_authentications: Arc::new([]),
        judged: false,
        raw_guard: None,
        default_deny: false,
        listener4: 0,
        listener6: (0, 0),
        served: true,
        closed: false,
        since: at(0),
    })
}
