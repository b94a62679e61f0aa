//! The world: what a node must know of its cluster, as one immutable value with a revision.
//!
//! Sources (a directory of manifests, the Kubernetes API) build a [`World`]; everything
//! below reads it. Nothing here does I/O.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::IpAddr,
    sync::Arc,
};

use http::HeaderName;
use ipnet::IpNet;
use signet_ebpf::abi::Mode;

use super::{called::Called, network_policy::NetworkPolicy};
use crate::{
    config::values::Enforcement,
    policy::{
        end_user::RequestAuthentication,
        istio::PeerAuthentication,
        model::{Policy, PolicySet},
    },
    spiffe::TrustDomain,
    trust::federation::Federation,
};

/// A pod's uid, as the API gives it.
pub type PodUid = Arc<str>;

/// A namespaced name.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct ObjectName {
    /// Namespace.
    pub namespace: Arc<str>,
    /// Name.
    pub name: Arc<str>,
}

/// The whole of what is known, at one revision.
#[derive(Clone, PartialEq, Debug)]
pub struct World {
    /// Grows by one with each published change.
    pub revision: u64,
    /// The cluster's own trust domain.
    pub trust_domain: TrustDomain,
    /// By name.
    pub namespaces: BTreeMap<Arc<str>, Namespace>,
    /// By uid.
    pub pods: HashMap<PodUid, Arc<Pod>>,
    /// Address → pod; only pods that are neither finished nor in the host's network.
    pub pods_by_ip: HashMap<IpAddr, PodUid>,
    /// By name.
    pub services: BTreeMap<ObjectName, Arc<Service>>,
    /// Virtual address → Service.
    pub services_by_ip: HashMap<IpAddr, ObjectName>,
    /// Address outside the cluster's own ranges → the Services that claim it, by name: their
    /// external and load balancers' addresses, which several may share by ports.
    pub services_by_external_ip: HashMap<IpAddr, Vec<ObjectName>>,
    /// ServiceAccounts.
    pub service_accounts: BTreeSet<ObjectName>,
    /// Node name → its addresses.
    pub nodes: BTreeMap<Arc<str>, Vec<IpAddr>>,
    /// Node name → its label `topology.kubernetes.io/zone`, where it has one.
    pub zones: BTreeMap<Arc<str>, Arc<str>>,
    /// Every policy that was understood (or understood as failing closed).
    pub policies: Arc<PolicySet>,
    /// PeerAuthentications by name, each with what became of it; pods' modes, exempt and strict
    /// ports already follow them.
    pub peer_authentications: Vec<Arc<PeerAuthentication>>,
    /// Kubernetes' own policies, by name: not enforced here, but in the way of tunnels.
    pub network_policies: Vec<Arc<NetworkPolicy>>,
    /// Services' ports that the API server calls.
    pub called: Arc<Called>,
    /// What overrides modes and policies.
    pub enforcement: Override,
    /// The cluster's address ranges.
    pub ranges: Ranges,
    /// Foreign trust domains and the peers that are dialled there.
    pub federation: Arc<Federation>,
    /// Uids that some node has announced as served: listeners, SVID and policy in place.
    pub served: HashMap<PodUid, Arc<str>>,
    /// What could not be read or was ignored; shown by `signet status`.
    pub problems: Vec<Problem>,
    /// Which kinds have been read to their end at least once.
    pub synced: Synced,
}

impl World {
    /// Nothing known yet, revision 0.
    pub fn empty(trust_domain: TrustDomain) -> Self {
        Self {
            revision: 0,
            trust_domain,
            namespaces: BTreeMap::new(),
            pods: HashMap::new(),
            pods_by_ip: HashMap::new(),
            services: BTreeMap::new(),
            services_by_ip: HashMap::new(),
            services_by_external_ip: HashMap::new(),
            service_accounts: BTreeSet::new(),
            nodes: BTreeMap::new(),
            zones: BTreeMap::new(),
            policies: Arc::default(),
            peer_authentications: Vec::new(),
            network_policies: Vec::new(),
            called: Arc::default(),
            enforcement: Override::Absent,
            ranges: Ranges::default(),
            federation: Arc::default(),
            served: HashMap::new(),
            problems: Vec::new(),
            synced: Synced::default(),
        }
    }

    /// True when both say the same, whatever their revisions.
    pub fn same_as(&self, other: &Self) -> bool {
        let Self {
            revision: _,
            trust_domain,
            namespaces,
            pods,
            pods_by_ip,
            services,
            services_by_ip,
            services_by_external_ip,
            service_accounts,
            nodes,
            zones,
            policies,
            peer_authentications,
            network_policies,
            called,
            enforcement,
            ranges,
            federation,
            served,
            problems,
            synced,
        } = self;
        *trust_domain == other.trust_domain
            && *namespaces == other.namespaces
            && *pods == other.pods
            && *pods_by_ip == other.pods_by_ip
            && *services == other.services
            && *services_by_ip == other.services_by_ip
            && *services_by_external_ip == other.services_by_external_ip
            && *service_accounts == other.service_accounts
            && *nodes == other.nodes
            && *zones == other.zones
            && *policies == other.policies
            && *peer_authentications == other.peer_authentications
            && *network_policies == other.network_policies
            && *called == other.called
            && *enforcement == other.enforcement
            && *ranges == other.ranges
            && *federation == other.federation
            && *served == other.served
            && *problems == other.problems
            && *synced == other.synced
    }

    /// The policies that are about a pod, in evaluation order.
    pub fn policies_of(&self, pod: &Pod) -> Vec<Arc<Policy>> {
        let mut policies = self.policies.selecting(&pod.name.namespace, &pod.labels);
        policies.extend(pod.strict_ports.clone());
        policies
    }

    /// The RequestAuthentications that are about a pod and in force on it.
    pub fn request_authentications_of(&self, pod: &Pod) -> Vec<Arc<RequestAuthentication>> {
        self.policies.authenticating(&pod.name.namespace, &pod.labels)
    }

    /// The pod of an address.
    pub fn pod_at(&self, ip: IpAddr) -> Option<&Arc<Pod>> {
        self.pods.get(self.pods_by_ip.get(&ip.to_canonical())?)
    }
}

/// The cluster's word over everything that is enforced (DESIGN §10).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Override {
    /// There is none: the agent's configuration says.
    #[default]
    Absent,
    /// This holds.
    Is(Enforcement),
    /// There is one, and nobody can read it: what was in force last stays.
    Unreadable,
}

/// Which sources have given a complete list at least once.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Synced {
    /// Pods and Namespaces.
    pub pods: bool,
    /// Every kind of policy.
    pub policies: bool,
}

/// A Namespace, as far as Signet reads it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Namespace {
    /// Its name.
    pub name: Arc<str>,
    /// Label `signet.dev/mode`; the last valid value when the present one is unknown.
    pub mode: Mode,
    /// Label `signet.dev/allow-pod-override: "true"`.
    pub allow_pod_override: bool,
    /// Label `signet.dev/default: deny`.
    pub default_deny: bool,
    /// Annotation `signet.dev/exempt-inbound-ports`.
    pub exempt_ports: Arc<[ExemptPort]>,
    /// Annotation `signet.dev/identity-headers`.
    pub identity_headers: IdentityHeaders,
    /// All of its labels.
    pub labels: BTreeMap<Arc<str>, Arc<str>>,
}

/// Which headers tell an application, request by request, who its client is.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct IdentityHeaders {
    /// `x-forwarded-client-cert`, in Envoy's form.
    pub client_cert: bool,
    /// A header with the SPIFFE ID alone.
    pub plain: Option<HeaderName>,
}

/// A port on which plaintext is accepted in `strict`.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct ExemptPort {
    /// The pod's port.
    pub port: u16,
    /// IP protocol (6 or 17).
    pub protocol: u8,
}

/// A pod, as far as Signet reads it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Pod {
    /// `metadata.uid`.
    pub uid: PodUid,
    /// Namespace and name.
    pub name: ObjectName,
    /// `spec.serviceAccountName`, `default` when absent.
    pub service_account: Arc<str>,
    /// `spec.nodeName`, once bound.
    pub node: Option<Arc<str>>,
    /// `status.podIPs`, as the API knows them (late).
    pub ips: Vec<IpAddr>,
    /// `metadata.labels`; shared with the records of its flows.
    pub labels: Arc<BTreeMap<Arc<str>, Arc<str>>>,
    /// What runs it, when something does.
    pub workload: Option<Workload>,
    /// `spec.hostNetwork`.
    pub host_network: bool,
    /// `status.phase` is Succeeded or Failed.
    pub finished: bool,
    /// `metadata.deletionTimestamp` is set.
    pub terminating: bool,
    /// `status.phase` is Pending or Running (the authority's rule).
    pub alive: bool,
    /// A mirror of a static pod: the kubelet made it, no account stands behind it.
    pub mirror: bool,
    /// Named container ports: name → port.
    pub named_ports: BTreeMap<Arc<str>, u16>,
    /// The mode in force: the namespace's, raised by the pod's own label (DESIGN §2).
    pub mode: Mode,
    /// Where [`Pod::mode`] comes from.
    pub mode_origin: ModeOrigin,
    /// Ports on which plaintext is accepted in `strict`: by the Namespace's annotation and by
    /// PeerAuthentications.
    pub exempt_ports: Arc<[ExemptPort]>,
    /// Refuses plaintext on ports that a PeerAuthentication makes strict while the pod is
    /// permissive.
    pub strict_ports: Option<Arc<Policy>>,
    /// Why more than observation is impossible, when it is.
    pub unenforceable: Option<Arc<str>>,
    /// A ztunnel carries its traffic, whatever its mode says here.
    pub captured: bool,
}

impl Pod {
    /// True when a ztunnel serves it: peers reach it over HBONE at its own address, under its
    /// service account's identity, and nobody announces it.
    pub fn is_ambient(&self) -> bool {
        self.captured && !self.host_network && !self.finished
    }

    /// True when peers dial it through a tunnel: it is enrolled, or a ztunnel serves it.
    pub fn is_tunnelled(&self) -> bool {
        self.is_ambient() || self.is_enrolled()
    }

    /// True when its desired mode enrols it (permissive or strict, enforceable, not host network).
    pub fn is_enrolled(&self) -> bool {
        self.mode.is_enforced() && self.is_enrollable()
    }

    /// True when it would be enrolled if its mode were this one.
    pub fn is_enrollable_in(&self, mode: Mode) -> bool {
        mode.is_enforced() && self.unenforceable.is_none() && !self.host_network && !self.finished
    }

    /// True when Signet could enrol it: in some mode, enforceable, with its own network.
    pub fn is_enrollable(&self) -> bool {
        self.mode != Mode::Off
            && self.unenforceable.is_none()
            && !self.host_network
            && !self.finished
    }
}

/// What runs a pod: a Deployment, a StatefulSet, a Job, …
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Workload {
    /// `Deployment`.
    pub kind: Arc<str>,
    /// Its name, in the pod's namespace.
    pub name: Arc<str>,
}

/// What gave a pod its mode.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ModeOrigin {
    /// No label: off.
    Default,
    /// The Namespace's label.
    Namespace,
    /// The pod's own label, raising (or, where the Namespace allows it, lowering) the mode.
    Pod,
    /// The namespace carries only values that are unknown: strict.
    InvalidLabel,
    /// A PeerAuthentication tightened the label's mode or, where the Namespace allows it,
    /// loosened it.
    PeerAuthentication,
}

/// A Service with its endpoints.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Service {
    /// Namespace and name.
    pub name: ObjectName,
    /// `spec.clusterIPs` without `None`.
    pub cluster_ips: Vec<IpAddr>,
    /// `spec.externalIPs` and `status.loadBalancer`'s addresses (not those that a proxy has),
    /// without any that is inside the cluster's ranges or a pod's, a node's or a Service's own.
    pub external_ips: Vec<IpAddr>,
    /// `spec.internalTrafficPolicy: Local`: endpoints of the client's node only.
    pub node_local: bool,
    /// `spec.sessionAffinity: ClientIP`.
    pub sticky: bool,
    /// Its ports.
    pub ports: Vec<ServicePort>,
    /// The cluster's own resolver: a Service of kube-system that is called `kube-dns` or has
    /// the label `k8s-app: kube-dns`.
    pub is_resolver: bool,
}

/// A Service's port and what is behind it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ServicePort {
    /// Port name, empty when it has none.
    pub name: Arc<str>,
    /// Service port.
    pub port: u16,
    /// IP protocol.
    pub protocol: u8,
    /// Ready endpoints, and those that terminate and still serve.
    pub endpoints: Vec<Endpoint>,
}

/// One address behind a Service's port.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Endpoint {
    /// The endpoint's address.
    pub ip: IpAddr,
    /// The target port.
    pub port: u16,
    /// `conditions.ready`.
    pub ready: bool,
    /// `conditions.serving` while terminating.
    pub serving: bool,
    /// `nodeName`.
    pub node: Option<Arc<str>>,
    /// `hints.forZones`.
    pub zones: Arc<[Arc<str>]>,
}

/// The cluster's address ranges (DESIGN §2).
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Ranges {
    /// Pods' ranges.
    pub pods: Vec<IpNet>,
    /// Services' ranges.
    pub services: Vec<IpNet>,
    /// Explicitly outside, though inside one of the above.
    pub outside: Vec<IpNet>,
}

impl Ranges {
    /// True when nothing is known: `strict` then refuses every unknown address.
    pub fn is_unknown(&self) -> bool {
        self.pods.is_empty()
    }

    /// True when the most specific range that holds `ip` is the pods' or the Services'; an
    /// equally specific outside range wins. With no ranges known, everything is inside.
    pub fn holds(&self, ip: IpAddr) -> bool {
        let longest = |nets: &[IpNet]| {
            nets.iter().filter(|net| net.contains(&ip)).map(IpNet::prefix_len).max()
        };
        let inside = longest(&self.pods).max(longest(&self.services));
        match (inside, longest(&self.outside)) {
            (None, None) => self.is_unknown(),
            (inside, outside) => inside > outside,
        }
    }
}

/// Something that an operator should know, with its remedy.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Problem {
    /// What it is about: `pod shop/checkout`, `file policies.yaml:12`.
    pub subject: String,
    /// The field, value and remedy, one sentence.
    pub message: String,
}
