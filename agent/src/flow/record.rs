//! A flow's record: one `verdict` when decided, one `end` when it ends (DESIGN §2).

use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use signet_ebpf::abi::{Direction, Reason, Verdict};
use uuid::Uuid;

use crate::{
    cluster::model::{Pod, Workload},
    policy::model::PolicyName,
    spiffe::SpiffeId,
};

/// How a flow travelled.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Via {
    /// Through a mutual-TLS tunnel.
    Mtls,
    /// On the same node, attested by the kernel.
    Kernel,
    /// In clear.
    Plaintext,
}

impl Via {
    /// Its name in records.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Mtls => "mtls",
            Self::Kernel => "kernel",
            Self::Plaintext => "plaintext",
        }
    }

    /// The one of a name.
    pub fn parse(s: &str) -> Option<Self> {
        [Self::Mtls, Self::Kernel, Self::Plaintext].into_iter().find(|v| v.name() == s)
    }
}

/// How an identity is known.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum KnownBy {
    /// A verified certificate.
    Mtls,
    /// Kernel attestation: cgroup and network namespace.
    Kernel,
    /// Only the address that the world model maps to it.
    Address,
    /// Not at all.
    Unknown,
}

impl KnownBy {
    /// Its name in records.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Mtls => "mtls",
            Self::Kernel => "kernel",
            Self::Address => "address",
            Self::Unknown => "unknown",
        }
    }

    /// The one of a name.
    pub fn parse(s: &str) -> Option<Self> {
        [Self::Mtls, Self::Kernel, Self::Address, Self::Unknown].into_iter().find(|k| k.name() == s)
    }
}

/// One side of a flow.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Party {
    /// Namespace and pod name, when it is a known pod.
    pub pod: Option<(Arc<str>, Arc<str>)>,
    /// Service account, when it is a known pod.
    pub service_account: Option<Arc<str>>,
    /// `metadata.labels`, when it is a known pod.
    pub labels: Arc<BTreeMap<Arc<str>, Arc<str>>>,
    /// What runs it, when it is a known pod and something does.
    pub workload: Option<Workload>,
    /// Its identity.
    pub identity: Option<SpiffeId>,
    /// How that is known.
    pub known_by: KnownBy,
    /// Service that was dialled, as `namespace/name`.
    pub service: Option<Arc<str>>,
    /// Address.
    pub ip: IpAddr,
    /// Port.
    pub port: u16,
}

impl Party {
    /// A party of which nothing but the address is known.
    pub fn unknown(address: SocketAddr) -> Self {
        Self {
            pod: None,
            service_account: None,
            labels: Arc::default(),
            workload: None,
            identity: None,
            known_by: KnownBy::Unknown,
            service: None,
            ip: address.ip(),
            port: address.port(),
        }
    }

    /// A known pod at an address; who it is by certificate or kernel is for the caller to say.
    pub fn of_pod(pod: &Pod, address: SocketAddr) -> Self {
        Self {
            pod: Some((pod.name.namespace.clone(), pod.name.name.clone())),
            service_account: Some(pod.service_account.clone()),
            labels: pod.labels.clone(),
            workload: pod.workload.clone(),
            ..Self::unknown(address)
        }
    }
}

/// Which end reports.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Reporter {
    /// The client's node.
    Source,
    /// The server's node.
    Destination,
}

impl Reporter {
    /// Its name in records.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Source => "source",
            Self::Destination => "destination",
        }
    }

    /// The one of a name.
    pub fn parse(s: &str) -> Option<Self> {
        [Self::Source, Self::Destination].into_iter().find(|r| r.name() == s)
    }
}

/// What happened.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum FlowEvent {
    /// The flow was decided.
    Verdict,
    /// The flow ended.
    End {
        /// Bytes from the client to the server.
        sent: u64,
        /// Bytes from the server to the client.
        received: u64,
        /// From the verdict to the end.
        duration: std::time::Duration,
    },
}

/// One HTTP request of a flow.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct HttpRecord {
    /// The method; `-` where none was understood.
    pub method: Arc<str>,
    /// The path without the query, normalised where that succeeded.
    pub path: Arc<str>,
    /// `HTTP/1.0`, `HTTP/1.1` or `HTTP/2`.
    pub version: &'static str,
    /// The answer's status; 0 where the application broke off without one.
    pub status: u16,
    /// From the request's head to the answer's.
    pub latency: std::time::Duration,
}

impl HttpRecord {
    /// Every [`HttpRecord::version`].
    pub const VERSIONS: [&'static str; 3] = ["HTTP/1.0", "HTTP/1.1", "HTTP/2"];
}

impl Default for HttpRecord {
    fn default() -> Self {
        Self {
            method: "-".into(),
            path: "-".into(),
            version: "HTTP/1.1",
            status: 0,
            latency: std::time::Duration::ZERO,
        }
    }
}

/// A record.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct FlowRecord {
    /// When.
    pub time: jiff::Timestamp,
    /// What happened.
    pub event: FlowEvent,
    /// Shared by both ends of a flow.
    pub uuid: Uuid,
    /// The reporting node.
    pub node: Arc<str>,
    /// Which end reports.
    pub reporter: Reporter,
    /// As the reporting pod sees it.
    pub direction: Direction,
    /// `tcp`, `udp` or the number of another protocol.
    pub protocol: u8,
    /// How it travelled, or would have.
    pub via: Via,
    /// The verdict.
    pub verdict: Verdict,
    /// Why; for [`FlowEvent::End`] the close reason.
    pub reason: Reason,
    /// The deciding policy.
    pub policy: Option<PolicyName>,
    /// Revision of the world that decided.
    pub revision: u64,
    /// Further `key=value` pairs: `mode=strict`, `errno=ECONNREFUSED`, …
    pub extra: Vec<(&'static str, String)>,
    /// The request, where one HTTP request was decided and not the whole flow. It has the
    /// flow's uuid, and only the destination reports it.
    pub http: Option<Box<HttpRecord>>,
    /// The client.
    pub source: Party,
    /// The server.
    pub destination: Party,
}

impl FlowRecord {
    /// The side that reports: the client for the source's records, the server for the
    /// destination's.
    pub fn reporting_party(&self) -> &Party {
        match self.reporter {
            Reporter::Source => &self.source,
            Reporter::Destination => &self.destination,
        }
    }
}

impl AsRef<FlowRecord> for FlowRecord {
    fn as_ref(&self) -> &FlowRecord {
        self
    }
}
