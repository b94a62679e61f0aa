//! What Signet reads of each kind of object, taken from the Kubernetes types: small, owned,
//! comparable. Sources give these to [`super::assemble`].

use std::{collections::BTreeMap, net::IpAddr, sync::Arc};

use ipnet::IpNet;
use k8s_openapi::{
    api::{
        core::v1::{
            Namespace as KubeNamespace, Node as KubeNode, Pod as KubePod, Service as KubeService,
        },
        discovery::v1::EndpointSlice as KubeSlice,
    },
    apimachinery::pkg::apis::meta::v1::ObjectMeta,
};

use super::{
    called::CalledFacts,
    model::{ObjectName, PodUid, Workload},
    network_policy::NetworkPolicy,
};
use crate::config::values::parse_range;

/// Labels or annotations.
pub type Labels = BTreeMap<Arc<str>, Arc<str>>;

/// Everything that a source has read.
#[derive(Clone, Debug, Default)]
pub struct Objects {
    /// Namespaces.
    pub namespaces: Vec<Arc<NamespaceFacts>>,
    /// Pods.
    pub pods: Vec<Arc<PodFacts>>,
    /// Services.
    pub services: Vec<Arc<ServiceFacts>>,
    /// EndpointSlices.
    pub slices: Vec<Arc<SliceFacts>>,
    /// Nodes.
    pub nodes: Vec<Arc<NodeFacts>>,
    /// ServiceAccounts.
    pub service_accounts: Vec<ObjectName>,
    /// Address ranges that the cluster declares.
    pub ranges: Vec<Arc<RangeFacts>>,
    /// NetworkPolicies.
    pub network_policies: Vec<Arc<NetworkPolicy>>,
    /// What makes the API server call Services.
    pub called: Vec<Arc<CalledFacts>>,
}

/// Why an object cannot be used: field, value and remedy.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{field}: {message}")]
pub struct ObjectFault {
    /// The field's path.
    pub field: String,
    /// Value and remedy.
    pub message: String,
}

fn fault(field: &str, message: impl Into<String>) -> ObjectFault {
    ObjectFault { field: field.into(), message: message.into() }
}

/// A Namespace.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct NamespaceFacts {
    /// Its name.
    pub name: Arc<str>,
    /// `metadata.labels`, only Signet's.
    pub labels: Labels,
    /// `metadata.annotations`, only Signet's.
    pub annotations: Labels,
    /// All of `metadata.labels`, by which selectors of others find it.
    pub all_labels: Labels,
    /// `namespaces.yaml:3`, empty where there is no file.
    pub origin: Arc<str>,
}

/// A Pod.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PodFacts {
    /// `metadata.uid`.
    pub uid: PodUid,
    /// Namespace and name.
    pub name: ObjectName,
    /// `spec.serviceAccountName`.
    pub service_account: Arc<str>,
    /// `spec.nodeName`.
    pub node: Option<Arc<str>>,
    /// `status.podIPs`.
    pub ips: Vec<IpAddr>,
    /// `metadata.labels`.
    pub labels: Arc<Labels>,
    /// What runs it: from `metadata.ownerReferences`.
    pub workload: Option<Workload>,
    /// `spec.hostNetwork`.
    pub host_network: bool,
    /// `status.phase` is Succeeded or Failed.
    pub finished: bool,
    /// `status.phase` is Pending (or not set yet) or Running.
    pub alive: bool,
    /// It has the annotation [`MIRROR`].
    pub mirror: bool,
    /// `metadata.deletionTimestamp` is set.
    pub terminating: bool,
    /// `metadata.creationTimestamp`, Unix seconds; 0 when absent.
    pub created: i64,
    /// Named container ports.
    pub named_ports: BTreeMap<Arc<str>, u16>,
    /// Why more than observation is impossible.
    pub unenforceable: Option<Arc<str>>,
    /// A ztunnel carries its traffic: Istio's ambient mesh has said so in an annotation.
    pub captured: bool,
    /// `pods.yaml:3`, empty where there is no file.
    pub origin: Arc<str>,
}

/// A Service.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ServiceFacts {
    /// Namespace and name.
    pub name: ObjectName,
    /// `spec.clusterIPs` without `None`.
    pub cluster_ips: Vec<IpAddr>,
    /// `spec.externalIPs` and `status.loadBalancer.ingress` of `ipMode: VIP`.
    pub external_ips: Vec<IpAddr>,
    /// `spec.internalTrafficPolicy` is Local.
    pub node_local: bool,
    /// `spec.sessionAffinity` is ClientIP.
    pub sticky: bool,
    /// Name, port, IP protocol.
    pub ports: Vec<(Arc<str>, u16, u8)>,
    /// It is called [`RESOLVER`] or has that label, in the namespace that only the cluster's
    /// administrators write to.
    pub is_resolver: bool,
}

/// An EndpointSlice of a Service.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct SliceFacts {
    /// The Service's name.
    pub service: ObjectName,
    /// Name, port (`None`: the Service's own), IP protocol.
    pub ports: Vec<(Arc<str>, Option<u16>, u8)>,
    /// One by address.
    pub endpoints: Vec<EndpointFacts>,
}

/// An address of an EndpointSlice.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct EndpointFacts {
    /// The address.
    pub ip: IpAddr,
    /// Its conditions.
    pub conditions: Conditions,
    /// `nodeName`.
    pub node: Option<Arc<str>>,
    /// `hints.forZones`.
    pub zones: Arc<[Arc<str>]>,
}

/// Conditions of an endpoint.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Conditions {
    /// `ready`; absent means true.
    pub ready: bool,
    /// `serving`; absent means `ready`.
    pub serving: bool,
    /// `terminating`.
    pub terminating: bool,
}

/// A Node.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct NodeFacts {
    /// Its name.
    pub name: Arc<str>,
    /// Internal and external addresses.
    pub addresses: Vec<IpAddr>,
    /// `spec.podCIDRs`.
    pub pod_ranges: Vec<IpNet>,
    /// Label [`ZONE`].
    pub zone: Option<Arc<str>>,
}

/// The label of a Node that names its zone.
pub const ZONE: &str = "topology.kubernetes.io/zone";

/// Address ranges of an object that declares some: a ServiceCIDR, Calico's IPPool.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct RangeFacts {
    /// Kind and name.
    pub name: (Arc<str>, Arc<str>),
    /// Pods' ranges.
    pub pods: Vec<IpNet>,
    /// Services' ranges.
    pub services: Vec<IpNet>,
}

/// Annotation of the pods by which a kubelet shows its static pods.
pub const MIRROR: &str = "kubernetes.io/config.mirror";
/// Istio's annotation of pods that its ambient mesh serves.
const REDIRECTION: &str = "ambient.istio.io/redirection";

/// The label of every namespace with its own name.
const NAME_LABEL: &str = "kubernetes.io/metadata.name";

/// What the Service of the cluster's resolver is called or labelled (`k8s-app`), whatever
/// serves it; in the namespace `kube-system`.
pub const RESOLVER: &str = "kube-dns";

/// Prefix of the labels and annotations that are Signet's.
pub const LABEL_PREFIX: &str = "signet.dev/";

/// Namespace and name of a namespaced object.
pub fn object_name(meta: &ObjectMeta) -> Result<ObjectName, ObjectFault> {
    let name = required(meta.name.as_deref(), "metadata.name", "the object's name")?;
    let space = required(meta.namespace.as_deref(), "metadata.namespace", "its namespace")?;
    Ok(ObjectName { namespace: space, name })
}

fn required(value: Option<&str>, field: &str, what: &str) -> Result<Arc<str>, ObjectFault> {
    match value {
        Some(value) if !value.is_empty() => Ok(value.into()),
        _ => Err(fault(field, format!("missing; write {what}"))),
    }
}

fn labels(map: Option<&BTreeMap<String, String>>) -> Labels {
    map.into_iter().flatten().map(|(k, v)| (k.as_str().into(), v.as_str().into())).collect()
}

fn own_labels(map: Option<&BTreeMap<String, String>>) -> Labels {
    let own = |(key, _): &(&String, &String)| key.starts_with(LABEL_PREFIX);
    map.into_iter()
        .flatten()
        .filter(own)
        .map(|(k, v)| (k.as_str().into(), v.as_str().into()))
        .collect()
}

fn address(field: &str, text: &str) -> Result<IpAddr, ObjectFault> {
    text.parse::<IpAddr>()
        .map(|ip| ip.to_canonical())
        .map_err(|_| fault(field, format!("{text:?} is not an IP address")))
}

fn port(field: &str, number: i32) -> Result<u16, ObjectFault> {
    u16::try_from(number)
        .ok()
        .filter(|n| *n != 0)
        .ok_or_else(|| fault(field, format!("{number} is not a port from 1 to 65535")))
}

/// Absent means TCP. Protocols that Signet does not carry (SCTP) are `None`.
fn protocol(field: &str, name: Option<&str>) -> Result<Option<u8>, ObjectFault> {
    match name {
        None | Some("TCP") => Ok(Some(6)),
        Some("UDP") => Ok(Some(17)),
        Some("SCTP") => Ok(None),
        Some(other) => {
            Err(fault(field, format!("{other:?} is not a protocol; write TCP, UDP or SCTP")))
        }
    }
}

impl NamespaceFacts {
    /// Reads a Namespace.
    pub fn read(object: &KubeNamespace, origin: &str) -> Result<Self, ObjectFault> {
        let meta = &object.metadata;
        let name = required(meta.name.as_deref(), "metadata.name", "the namespace's name")?;
        let mut all_labels = labels(meta.labels.as_ref());
        // The API server sets it on each of them.
        all_labels.insert(NAME_LABEL.into(), name.clone());
        Ok(Self {
            name,
            all_labels,
            labels: own_labels(meta.labels.as_ref()),
            annotations: own_labels(meta.annotations.as_ref()),
            origin: origin.into(),
        })
    }
}

impl PodFacts {
    /// Reads a Pod.
    pub fn read(object: &KubePod, origin: &str) -> Result<Self, ObjectFault> {
        let meta = &object.metadata;
        let name = object_name(meta)?;
        let uid = required(meta.uid.as_deref(), "metadata.uid", "the uid that its cgroup carries")?;
        let spec = object.spec.as_ref();
        let status = object.status.as_ref();
        let mut ips = Vec::new();
        let texts = status.and_then(|s| s.pod_ips.as_ref()).into_iter().flatten();
        for (index, ip) in texts.enumerate() {
            ips.push(address(&format!("status.podIPs[{index}].ip"), &ip.ip)?);
        }
        if ips.is_empty()
            && let Some(ip) = status.and_then(|s| s.pod_ip.as_deref()).filter(|ip| !ip.is_empty())
        {
            ips.push(address("status.podIP", ip)?);
        }
        ips.dedup();
        let mut named_ports = BTreeMap::new();
        let containers = spec.map(|s| s.containers.as_slice()).unwrap_or_default();
        for (c, container) in containers.iter().enumerate() {
            for (p, declared) in container.ports.iter().flatten().enumerate() {
                let field = format!("spec.containers[{c}].ports[{p}].containerPort");
                let number = port(&field, declared.container_port)?;
                if let Some(name) = &declared.name {
                    named_ports.insert(name.as_str().into(), number);
                }
            }
        }
        let phase = status.and_then(|s| s.phase.as_deref()).unwrap_or("Pending");
        let account = spec.and_then(|s| s.service_account_name.as_deref());
        let host_network = spec.and_then(|s| s.host_network).unwrap_or(false);
        Ok(Self {
            uid,
            name,
            service_account: account.filter(|a| !a.is_empty()).unwrap_or("default").into(),
            node: spec
                .and_then(|s| s.node_name.as_deref())
                .filter(|n| !n.is_empty())
                .map(Arc::from),
            ips,
            labels: Arc::new(labels(meta.labels.as_ref())),
            workload: workload(meta),
            host_network,
            finished: matches!(phase, "Succeeded" | "Failed"),
            alive: matches!(phase, "Pending" | "Running"),
            mirror: meta.annotations.as_ref().is_some_and(|a| a.contains_key(MIRROR)),
            terminating: meta.deletion_timestamp.is_some(),
            created: meta.creation_timestamp.as_ref().map_or(0, |t| t.0.as_second()),
            named_ports,
            unenforceable: unenforceable(object).map(Arc::from),
            captured: is_captured(object),
            origin: origin.into(),
        })
    }
}

/// Whose pod it is. A ReplicaSet that a Deployment made has its name and the hash that the pod
/// carries as a label, a Job that a CronJob made its name and a number of minutes.
fn workload(meta: &ObjectMeta) -> Option<Workload> {
    const HASH: &str = "pod-template-hash";
    let owner = meta.owner_references.iter().flatten().find(|o| o.controller == Some(true))?;
    let made_by = |kind: &str, name: &str| Workload { kind: kind.into(), name: name.into() };
    let above = match owner.kind.as_str() {
        "ReplicaSet" => meta
            .labels
            .as_ref()
            .and_then(|labels| labels.get(HASH))
            .and_then(|hash| owner.name.strip_suffix(hash.as_str())?.strip_suffix('-'))
            .map(|name| made_by("Deployment", name)),
        "Job" => owner
            .name
            .rsplit_once('-')
            .filter(|(_, n)| n.len() >= 8 && n.bytes().all(|b| b.is_ascii_digit()))
            .map(|(name, _)| made_by("CronJob", name)),
        _ => None,
    };
    Some(above.unwrap_or_else(|| made_by(&owner.kind, &owner.name)))
}

/// True when Istio's CNI has put the pod behind its node's ztunnel (ambient mode).
fn is_captured(pod: &KubePod) -> bool {
    let redirection = pod.metadata.annotations.as_ref().and_then(|all| all.get(REDIRECTION));
    redirection.is_some_and(|value| value == "enabled")
}

/// Why a pod cannot be enforced, whatever its mode (DESIGN §2).
fn unenforceable(pod: &KubePod) -> Option<String> {
    let spec = pod.spec.as_ref()?;
    if spec.host_network.unwrap_or(false) {
        return Some("it is in the host's network (hostNetwork)".into());
    }
    let mut containers =
        spec.containers.iter().chain(spec.init_containers.iter().flatten()).map(|c| &c.name);
    if let Some(sidecar) =
        containers.find(|n| ["istio-proxy", "linkerd-proxy"].contains(&n.as_str()))
    {
        return Some(format!("the sidecar {sidecar} already carries its traffic"));
    }
    if is_captured(pod) {
        return Some("Istio's ambient mesh already carries its traffic".into());
    }
    // Runtimes whose sandboxes bring a network stack of their own: no socket of the pod is
    // a socket of this kernel.
    let class = spec.runtime_class_name.as_deref()?;
    ["kata", "gvisor", "runsc", "firecracker"]
        .iter()
        .any(|own| class.starts_with(own))
        .then(|| format!("its RuntimeClass {class} has a network stack of its own"))
}

impl ServiceFacts {
    /// Reads a Service.
    pub fn read(object: &KubeService) -> Result<Self, ObjectFault> {
        let name = object_name(&object.metadata)?;
        let mut cluster_ips = Vec::new();
        let mut external_ips = Vec::new();
        let mut ports = Vec::new();
        let (mut node_local, mut sticky) = (false, false);
        if let Some(spec) = &object.spec {
            node_local = spec.internal_traffic_policy.as_deref() == Some("Local");
            sticky = spec.session_affinity.as_deref() == Some("ClientIP");
            for (index, ip) in spec.external_ips.iter().flatten().enumerate() {
                external_ips.push(address(&format!("spec.externalIPs[{index}]"), ip)?);
            }
            let mut texts: Vec<(String, &str)> = Vec::new();
            for (index, ip) in spec.cluster_ips.iter().flatten().enumerate() {
                texts.push((format!("spec.clusterIPs[{index}]"), ip));
            }
            if texts.is_empty() {
                texts.extend(spec.cluster_ip.as_deref().map(|ip| ("spec.clusterIP".into(), ip)));
            }
            for (field, text) in texts {
                if !matches!(text, "" | "None") {
                    cluster_ips.push(address(&field, text)?);
                }
            }
            for (index, declared) in spec.ports.iter().flatten().enumerate() {
                let number = port(&format!("spec.ports[{index}].port"), declared.port)?;
                let field = format!("spec.ports[{index}].protocol");
                if let Some(protocol) = protocol(&field, declared.protocol.as_deref())? {
                    ports.push((declared.name.as_deref().unwrap_or("").into(), number, protocol));
                }
            }
        }
        let balancer = object.status.as_ref().and_then(|status| status.load_balancer.as_ref());
        let balanced = balancer.and_then(|balancer| balancer.ingress.as_ref());
        for (index, ingress) in balanced.into_iter().flatten().enumerate() {
            // Where a proxy has the address, packets from inside go there like all others.
            if let Some(ip) = &ingress.ip
                && ingress.ip_mode.as_deref() != Some("Proxy")
            {
                let field = format!("status.loadBalancer.ingress[{index}].ip");
                external_ips.push(address(&field, ip)?);
            }
        }
        let label = object.metadata.labels.as_ref().and_then(|labels| labels.get("k8s-app"));
        let is_called = &*name.name == RESOLVER || label.is_some_and(|app| app == RESOLVER);
        let is_resolver = is_called && &*name.namespace == "kube-system";
        Ok(Self { name, cluster_ips, external_ips, node_local, sticky, ports, is_resolver })
    }
}

impl SliceFacts {
    /// Reads an EndpointSlice; `None` when it belongs to no Service or holds host names.
    pub fn read(object: &KubeSlice) -> Result<Option<Self>, ObjectFault> {
        let name = object_name(&object.metadata)?;
        let service =
            object.metadata.labels.as_ref().and_then(|l| l.get("kubernetes.io/service-name"));
        let (Some(service), "IPv4" | "IPv6") = (service, object.address_type.as_str()) else {
            return Ok(None);
        };
        let mut ports = Vec::new();
        for (index, declared) in object.ports.iter().flatten().enumerate() {
            let number = match declared.port {
                Some(number) => Some(port(&format!("ports[{index}].port"), number)?),
                None => None,
            };
            let field = format!("ports[{index}].protocol");
            if let Some(protocol) = protocol(&field, declared.protocol.as_deref())? {
                ports.push((declared.name.as_deref().unwrap_or("").into(), number, protocol));
            }
        }
        let mut endpoints = Vec::new();
        for (index, endpoint) in object.endpoints.iter().enumerate() {
            let conditions = endpoint.conditions.as_ref();
            let ready = conditions.and_then(|c| c.ready).unwrap_or(true);
            let conditions = Conditions {
                ready,
                serving: conditions.and_then(|c| c.serving).unwrap_or(ready),
                terminating: conditions.and_then(|c| c.terminating).unwrap_or(false),
            };
            let node = endpoint.node_name.as_deref().map(Arc::from);
            let hints = endpoint.hints.as_ref().and_then(|hints| hints.for_zones.as_ref());
            let zones: Arc<[Arc<str>]> =
                hints.into_iter().flatten().map(|zone| Arc::from(zone.name.as_str())).collect();
            for (a, text) in endpoint.addresses.iter().enumerate() {
                let ip = address(&format!("endpoints[{index}].addresses[{a}]"), text)?;
                let (node, zones) = (node.clone(), zones.clone());
                endpoints.push(EndpointFacts { ip, conditions, node, zones });
            }
        }
        let service = ObjectName { namespace: name.namespace, name: service.as_str().into() };
        Ok(Some(Self { service, ports, endpoints }))
    }
}

impl NodeFacts {
    /// Reads a Node.
    pub fn read(object: &KubeNode) -> Result<Self, ObjectFault> {
        let name = required(object.metadata.name.as_deref(), "metadata.name", "the node's name")?;
        let mut addresses = Vec::new();
        let declared = object.status.as_ref().and_then(|s| s.addresses.as_ref());
        for (index, entry) in declared.into_iter().flatten().enumerate() {
            if matches!(entry.type_.as_str(), "InternalIP" | "ExternalIP") {
                let field = format!("status.addresses[{index}].address");
                addresses.push(address(&field, &entry.address)?);
            }
        }
        let mut pod_ranges = Vec::new();
        if let Some(spec) = &object.spec {
            let texts: Vec<&String> = match &spec.pod_cidrs {
                Some(texts) if !texts.is_empty() => texts.iter().collect(),
                _ => spec.pod_cidr.iter().collect(),
            };
            for (index, text) in texts.into_iter().enumerate() {
                let range = parse_range(text)
                    .map_err(|message| fault(&format!("spec.podCIDRs[{index}]"), message))?;
                pod_ranges.push(range);
            }
        }
        let zone = object.metadata.labels.as_ref().and_then(|labels| labels.get(ZONE));
        Ok(Self { name, addresses, pod_ranges, zone: zone.map(|zone| zone.as_str().into()) })
    }
}

#[cfg(test)]
mod tests {
    use k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference;

    use super::*;

    fn shown(kind: &str, name: &str, controller: bool, hash: Option<&str>) -> Option<String> {
        let owner = OwnerReference {
            kind: kind.into(),
            name: name.into(),
            controller: Some(controller),
            ..OwnerReference::default()
        };
        let labels = hash.map(|h| BTreeMap::from([("pod-template-hash".into(), h.into())]));
        let meta =
            ObjectMeta { owner_references: Some(vec![owner]), labels, ..ObjectMeta::default() };
        workload(&meta).map(|w| format!("{}/{}", w.kind, w.name))
    }

    #[test]
    fn a_workload_is_what_people_made() {
        for (kind, name, hash, expected) in [
            ("ReplicaSet", "web-5b7f", Some("5b7f"), "Deployment/web"),
            ("ReplicaSet", "web-5b7f", None, "ReplicaSet/web-5b7f"),
            ("ReplicaSet", "web-5b7f", Some("ffff"), "ReplicaSet/web-5b7f"),
            ("StatefulSet", "db", None, "StatefulSet/db"),
            ("Job", "backup-29384756", None, "CronJob/backup"),
            ("Job", "backup-now", None, "Job/backup-now"),
        ] {
            assert_eq!(shown(kind, name, true, hash).as_deref(), Some(expected));
        }
        // Who only watches over a pod does not run it.
        assert_eq!(shown("StatefulSet", "db", false, None), None);
        assert_eq!(workload(&ObjectMeta::default()), None);
    }

    #[test]
    fn a_service_says_where_it_is_reached_and_whom_it_gives() {
        let read = |external: &str| {
            let manifest = serde_json::json!({
                "metadata": {"namespace": "shop", "name": "web"},
                "spec": {
                    "clusterIPs": ["10.96.0.1"],
                    "externalIPs": [external],
                    "internalTrafficPolicy": "Local",
                    "sessionAffinity": "ClientIP",
                    "ports": [{"port": 80}],
                },
                "status": {"loadBalancer": {"ingress": [
                    {"ip": "203.0.113.9", "ipMode": "VIP"},
                    {"ip": "203.0.113.10"},
                    {"ip": "203.0.113.11", "ipMode": "Proxy"},
                    {"hostname": "balancer.example"},
                ]}},
            });
            ServiceFacts::read(&serde_json::from_value(manifest).unwrap())
        };
        let web = read("198.51.100.1").unwrap();
        // What a proxy has in front is dialled through it.
        let external = ["198.51.100.1", "203.0.113.9", "203.0.113.10"];
        assert_eq!(web.external_ips, external.map(|ip| ip.parse::<IpAddr>().unwrap()));
        assert!(web.node_local && web.sticky);
        let fault = read("somewhere").unwrap_err().to_string();
        assert!(fault.contains("spec.externalIPs[0]") && fault.contains("somewhere"), "{fault}");
    }
}
