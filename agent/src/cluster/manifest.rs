//! A manifest file's text → objects, each with its place.

use std::sync::Arc;

use ipnet::IpNet;
use k8s_openapi::api::{
    core::v1::{Namespace, Node as KubeNode, Pod, Service, ServiceAccount},
    discovery::v1::EndpointSlice,
    networking::v1::NetworkPolicy as KubeNetworkPolicy,
};

use super::{
    called::CalledFacts,
    model::{ObjectName, Ranges},
    modes::{LabelFault, check_namespace, check_pod},
    network_policy::NetworkPolicy,
    objects::{
        NamespaceFacts, NodeFacts, ObjectFault, PodFacts, RangeFacts, ServiceFacts, SliceFacts,
        object_name,
    },
};
use crate::{
    config::{
        values::{Enforcement, parse_range},
        yaml::{self, Fault, Node},
    },
    policy::{
        end_user::RequestAuthentication,
        istio::{self, PeerAuthentication},
        model::Policy,
        native,
    },
};

/// The most ranges that one object may declare.
const MAX_DECLARED_RANGES: usize = 64;

/// An object of a manifest.
#[derive(Clone, PartialEq, Debug)]
pub enum Object {
    /// A Namespace.
    Namespace(Arc<NamespaceFacts>),
    /// A ServiceAccount.
    ServiceAccount(ObjectName),
    /// A Pod.
    Pod(Arc<PodFacts>),
    /// A Service.
    Service(Arc<ServiceFacts>),
    /// An EndpointSlice, with its own name.
    Slice(ObjectName, Arc<SliceFacts>),
    /// A Node.
    Node(Arc<NodeFacts>),
    /// A ServiceCIDR or Calico's IPPool.
    Ranges(Arc<RangeFacts>),
    /// A NetworkPolicy.
    NetworkPolicy(Arc<NetworkPolicy>),
    /// What makes the API server call Services.
    Called(Arc<CalledFacts>),
    /// A policy, native or Istio's.
    Policy(Arc<Policy>),
    /// Istio's word on plaintext.
    PeerAuthentication(Arc<PeerAuthentication>),
    /// Istio's word on end users' tokens.
    RequestAuthentication(Arc<RequestAuthentication>),
}

impl Object {
    /// What may exist once: kind, namespace, name (for a Pod its uid).
    pub fn identity(&self) -> (Arc<str>, Arc<str>, Arc<str>) {
        let empty = || Arc::from("");
        let (kind, namespace, name) = self.parts(empty);
        (kind.into(), namespace, name)
    }

    fn parts(&self, empty: impl Fn() -> Arc<str>) -> (&str, Arc<str>, Arc<str>) {
        match self {
            Self::Namespace(o) => ("Namespace", empty(), o.name.clone()),
            Self::ServiceAccount(name) => {
                ("ServiceAccount", name.namespace.clone(), name.name.clone())
            }
            // A pod that was made anew under its old name is another object.
            Self::Pod(o) => ("Pod with uid", empty(), o.uid.clone()),
            Self::Service(o) => ("Service", o.name.namespace.clone(), o.name.name.clone()),
            Self::Slice(name, _) => ("EndpointSlice", name.namespace.clone(), name.name.clone()),
            Self::Node(o) => ("Node", empty(), o.name.clone()),
            Self::Ranges(o) => (&o.name.0, empty(), o.name.1.clone()),
            Self::NetworkPolicy(o) => {
                ("NetworkPolicy", o.name.namespace.clone(), o.name.name.clone())
            }
            Self::Called(o) => (&o.kind, empty(), o.name.clone()),
            Self::Policy(o) => (&o.name.kind, o.name.namespace.clone(), o.name.name.clone()),
            Self::PeerAuthentication(o) => {
                (&o.name.kind, o.name.namespace.clone(), o.name.name.clone())
            }
            Self::RequestAuthentication(o) => {
                (&o.name.kind, o.name.namespace.clone(), o.name.name.clone())
            }
        }
    }
}

/// What a manifest file holds.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct Manifest {
    /// Objects with the line where each begins.
    pub objects: Vec<(u64, Object)>,
    /// Labels that were not understood: errors at start, later the rules of labels apply.
    pub label_faults: Vec<Fault>,
}

/// Reads a manifest file; `file` is its name, for the objects' origins, `root` the namespace
/// whose Istio objects are the mesh's.
///
/// # Errors
///
/// The first object that cannot be read; then none of the file's objects counts.
pub fn read(file: &str, text: &str, root: &str) -> Result<Manifest, Fault> {
    let mut manifest = Manifest::default();
    let place = Place { file, root };
    for document in yaml::parse(text)? {
        read_document(&place, &document, &mut manifest)?;
    }
    Ok(manifest)
}

/// Reads every document of a manifest file that is about policy (policies, Namespaces with
/// their labels, Lists) by itself, for who wants to know all that is wrong with them.
///
/// # Errors
///
/// Where the file as a whole is no YAML or too large.
pub fn read_policies(
    file: &str,
    text: &str,
    root: &str,
) -> Result<Vec<Result<Manifest, Fault>>, Fault> {
    let place = Place { file, root };
    let read = |document: &Node| {
        let mut manifest = Manifest::default();
        read_document(&place, document, &mut manifest).map(|()| manifest)
    };
    let is_about_policy = |document: &&Node| {
        let text = |field| document.get(field).and_then(|node| node.text().ok());
        match (text("apiVersion"), text("kind")) {
            (Some(version), _) if version.starts_with("signet.dev/") => true,
            (Some(version), _) if version.starts_with(istio::GROUP) => true,
            (Some("v1"), Some(kind)) => matches!(kind, "Namespace" | "List"),
            (Some(_), Some(_)) => false,
            // Not an object at all, which is a fault.
            _ => true,
        }
    };
    Ok(yaml::parse(text)?.iter().filter(is_about_policy).map(read).collect())
}

/// What a document is read with.
struct Place<'a> {
    file: &'a str,
    root: &'a str,
}

fn read_document(place: &Place<'_>, document: &Node, manifest: &mut Manifest) -> Result<(), Fault> {
    let text = |field: &str| -> Result<&str, Fault> {
        document.fields()?;
        match document.get(field) {
            Some(node) => node.text().map_err(|e| e.within(field)),
            None => Err(document.fault("missing; this is not a Kubernetes object").within(field)),
        }
    };
    let (version, kind) = (text("apiVersion")?, text("kind")?);
    if (version, kind) == ("v1", "List") {
        let Some(items) = document.get("items") else { return Ok(()) };
        items
            .list(yaml::MAX_NODES, |item| read_document(place, item, manifest))
            .map_err(|fault| fault.within("items"))?;
        return Ok(());
    }
    let named = |fault: Fault| {
        // Whose field it is, when the file holds many objects.
        let name = document.get("metadata").and_then(|m| m.get("name"));
        match name.and_then(|n| n.text().ok()) {
            Some(name) => fault.within(format!("{kind} {}:", yaml::shorten(name))),
            None => fault.within(format!("{kind}:")),
        }
    };
    let origin = format!("{}:{}", place.file, document.line);
    let object = read_object(document, version, kind, &origin, place.root).map_err(named)?;
    match &object {
        Some(Object::Namespace(facts)) => {
            let faults = check_namespace(&facts.labels, &facts.annotations);
            manifest.label_faults.extend(faults.into_iter().map(|f| named(placed(document, f))));
        }
        Some(Object::Pod(facts)) => {
            let faults = check_pod(&facts.labels);
            manifest.label_faults.extend(faults.into_iter().map(|f| named(placed(document, f))));
        }
        _ => {}
    }
    manifest.objects.extend(object.map(|object| (document.line, object)));
    Ok(())
}

/// Reads one object that is not of a file, as its API server sent it; `None` for what Signet
/// does not read.
///
/// # Errors
///
/// The first field that is not what it should be.
pub fn read_sent(
    object: &Node,
    version: &str,
    kind: &str,
    root: &str,
) -> Result<Option<Object>, Fault> {
    read_object(object, version, kind, "", root)
}

/// `None` for kinds that Signet does not read.
fn read_object(
    document: &Node,
    version: &str,
    kind: &str,
    origin: &str,
    root: &str,
) -> Result<Option<Object>, Fault> {
    let at = |fault: ObjectFault| at_field(document, fault);
    let object = match (version, kind) {
        ("v1", "Namespace") => {
            let object: Namespace = document.deserialize_into()?;
            Object::Namespace(Arc::new(NamespaceFacts::read(&object, origin).map_err(at)?))
        }
        ("v1", "ServiceAccount") => {
            let object: ServiceAccount = document.deserialize_into()?;
            Object::ServiceAccount(object_name(&object.metadata).map_err(at)?)
        }
        ("v1", "Pod") => {
            let object: Pod = document.deserialize_into()?;
            Object::Pod(Arc::new(PodFacts::read(&object, origin).map_err(at)?))
        }
        ("v1", "Service") => {
            let object: Service = document.deserialize_into()?;
            Object::Service(Arc::new(ServiceFacts::read(&object).map_err(at)?))
        }
        ("v1", "Node") => {
            let object: KubeNode = document.deserialize_into()?;
            Object::Node(Arc::new(NodeFacts::read(&object).map_err(at)?))
        }
        ("discovery.k8s.io/v1", "EndpointSlice") => {
            let object: EndpointSlice = document.deserialize_into()?;
            let name = object_name(&object.metadata).map_err(at)?;
            match SliceFacts::read(&object).map_err(at)? {
                Some(facts) => Object::Slice(name, Arc::new(facts)),
                None => return Ok(None),
            }
        }
        (version, "ServiceCIDR") if version.starts_with("networking.k8s.io/") => {
            let services = declared_ranges(document, "cidrs")?;
            Object::Ranges(range_facts(document, kind, Vec::new(), services)?)
        }
        (version, "IPPool") if version.starts_with("crd.projectcalico.org/") => {
            let pods = declared_ranges(document, "cidr")?;
            Object::Ranges(range_facts(document, kind, pods, Vec::new())?)
        }
        ("networking.k8s.io/v1", "NetworkPolicy") => {
            let object: KubeNetworkPolicy = document.deserialize_into()?;
            Object::NetworkPolicy(Arc::new(NetworkPolicy::read(&object).map_err(at)?))
        }
        (version, kind) if CalledFacts::is_read(version, kind) => {
            let object: serde_json::Value = document.deserialize_into()?;
            let name = object["metadata"]["name"].as_str().unwrap_or_default();
            Object::Called(Arc::new(CalledFacts::read(kind, name, &object)))
        }
        (version, istio::AUTHORIZATION_POLICY) if version.starts_with(istio::GROUP) => {
            Object::Policy(Arc::new(istio::read_authorization(document, root)?))
        }
        (version, istio::PEER_AUTHENTICATION) if version.starts_with(istio::GROUP) => {
            let object = istio::read_peer_authentication(document, root)?;
            Object::PeerAuthentication(Arc::new(object))
        }
        (version, istio::REQUEST_AUTHENTICATION) if version.starts_with(istio::GROUP) => {
            let object = istio::read_request_authentication(document, root)?;
            Object::RequestAuthentication(Arc::new(object))
        }
        (version, _) if version.starts_with("signet.dev/") => {
            Object::Policy(Arc::new(native::read(document)?))
        }
        _ => {
            tracing::debug!(version, kind, origin, "this kind is not read");
            return Ok(None);
        }
    };
    Ok(Some(object))
}

/// The ranges in a field of `spec`: one, or a list.
fn declared_ranges(document: &Node, field: &str) -> Result<Vec<IpNet>, Fault> {
    let read = |node: &Node| parse_range(node.text()?).map_err(|m| node.fault(m));
    let Some(node) = document.get("spec").and_then(|spec| spec.get(field)) else {
        return Err(document.fault("missing").within(field).within("spec"));
    };
    let ranges = match &node.value {
        yaml::Value::List(_) => node.list(MAX_DECLARED_RANGES, read),
        _ => read(node).map(|range| vec![range]),
    };
    ranges.map_err(|fault| fault.within(field).within("spec"))
}

fn range_facts(
    document: &Node,
    kind: &str,
    pods: Vec<IpNet>,
    services: Vec<IpNet>,
) -> Result<Arc<RangeFacts>, Fault> {
    let name = match document.get("metadata").and_then(|metadata| metadata.get("name")) {
        Some(name) => name.text()?,
        None => return Err(document.fault("missing").within("metadata.name")),
    };
    Ok(Arc::new(RangeFacts { name: (kind.into(), name.into()), pods, services }))
}

/// A fault of a typed object, at the line of the deepest part of its field that is there.
fn at_field(document: &Node, fault: ObjectFault) -> Fault {
    let mut node = document;
    for segment in fault.field.split(['.', '[', ']']).filter(|s| !s.is_empty()) {
        let next = match (&node.value, segment.parse::<usize>()) {
            (yaml::Value::List(items), Ok(index)) => items.get(index),
            _ => node.get(segment),
        };
        match next {
            Some(next) => node = next,
            None => break,
        }
    }
    Fault::new(node.line, fault.message).within(fault.field)
}

/// A label's fault at the label's line.
fn placed(document: &Node, fault: LabelFault) -> Fault {
    let metadata = document.get("metadata");
    for map in ["labels", "annotations"] {
        if let Some(node) = metadata.and_then(|m| m.get(map)?.get(&fault.key)) {
            return node.fault(fault.message).within(format!("metadata.{map}[{}]", fault.key));
        }
    }
    document.fault(fault.message).within(fault.key.as_ref())
}

/// Reads `enforcement.yaml`.
///
/// # Errors
///
/// Anything but `enforcement: enforce`, `audit` or `off`.
pub fn read_enforcement(text: &str) -> Result<Enforcement, Fault> {
    let missing = "missing; write enforcement: enforce, audit or off";
    let root = yaml::parse_one(text)?.ok_or_else(|| Fault::new(0, missing))?;
    let mut found = None;
    root.known_fields(&["enforcement"], |_, node| {
        found = Some(Enforcement::parse(node.text()?).map_err(|m| node.fault(m))?);
        Ok(())
    })?;
    found.ok_or_else(|| root.fault(missing).within("enforcement"))
}

/// Reads `ranges.yaml`.
pub fn read_ranges(text: &str) -> Result<Ranges, Fault> {
    let mut ranges = Ranges::default();
    let Some(root) = yaml::parse_one(text)? else { return Ok(ranges) };
    root.known_fields(&["podRanges", "serviceRanges", "outsideRanges"], |field, node| {
        let list = node.list(4096, |n| parse_range(n.text()?).map_err(|m| n.fault(m)))?;
        match field {
            "podRanges" => ranges.pods = list,
            "serviceRanges" => ranges.services = list,
            _ => ranges.outside = list,
        }
        Ok(())
    })?;
    Ok(ranges)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn fault(text: &str) -> String {
        let fault = read("f.yaml", text, istio::ROOT_NAMESPACE).unwrap_err();
        format!("{}: {fault}", fault.line)
    }

    const POD: &str = "apiVersion: v1
kind: Pod
metadata: {name: web, namespace: shop, uid: u-1, labels: {app: web}}
spec:
  nodeName: node-1
  containers:
  - name: c
    resources: {limits: {cpu: 1, memory: 1Gi}}
    ports: [{name: http, containerPort: 8080}]
status: {phase: Running, podIPs: [{ip: 10.0.0.1}, {ip: fd00::1}]}
";

    #[test]
    fn a_pod_in_a_list_and_foreign_kinds() {
        let text = format!(
            "apiVersion: v1\nkind: List\nitems:\n- {}---\napiVersion: apps/v1\nkind: Deployment\n",
            POD.trim_end().replace('\n', "\n  ") + "\n"
        );
        let manifest = read("f.yaml", &text, istio::ROOT_NAMESPACE).unwrap();
        let [(4, Object::Pod(pod))] = manifest.objects.as_slice() else {
            panic!("{manifest:?}");
        };
        assert_eq!(pod.ips.len(), 2);
        assert_eq!(pod.named_ports.get("http"), Some(&8080));
        assert_eq!(pod.service_account.as_ref(), "default");
        assert_eq!(pod.origin.as_ref(), "f.yaml:4");
    }

    #[test]
    fn faults_name_object_field_value_and_remedy() {
        assert_eq!(
            fault(&POD.replace("8080", "http")),
            "9: Pod web: spec.containers[0].ports[0].containerPort: invalid type: string \
             \"http\", expected i32"
        );
        assert_eq!(
            fault(&POD.replace("fd00::1", "fd00")),
            "10: Pod web: status.podIPs[1].ip: \"fd00\" is not an IP address"
        );
        assert_eq!(
            fault(&POD.replace("uid: u-1, ", "")),
            "3: Pod web: metadata.uid: missing; write the uid that its cgroup carries"
        );
        assert_eq!(fault("kind: Pod\n"), "1: apiVersion: missing; this is not a Kubernetes object");
        assert_eq!(fault("- a\n"), "1: a list where a mapping is wanted");
        assert_eq!(
            fault("\n---\napiVersion: signet.dev/v1\nkind: IdentityPolicy\nmetadata: {name: a}\n"),
            "3: IdentityPolicy a: apiVersion: \"signet.dev/v1\" is not served; write \
             signet.dev/v1alpha1"
        );
    }

    #[test]
    fn ranges_that_the_cluster_declares() {
        let text = "apiVersion: networking.k8s.io/v1
kind: ServiceCIDR
metadata: {name: kubernetes}
spec: {cidrs: [10.96.0.0/12, fd01::/108]}
---
apiVersion: crd.projectcalico.org/v1
kind: IPPool
metadata: {name: default}
spec: {cidr: 10.42.0.0/16}
";
        let manifest = read("f.yaml", text, istio::ROOT_NAMESPACE).unwrap();
        let [(1, Object::Ranges(services)), (6, Object::Ranges(pods))] =
            manifest.objects.as_slice()
        else {
            panic!("{manifest:?}");
        };
        assert_eq!((services.services.len(), services.pods.len()), (2, 0));
        assert_eq!((pods.services.len(), pods.pods.len()), (0, 1));
        assert_eq!(
            fault(&text.replace("10.42.0.0/16", "10.42.0.1/16")),
            "9: IPPool default: spec.cidr: \"10.42.0.1/16\" has bits set behind its prefix; write \
             10.42.0.0/16"
        );
        assert_eq!(
            fault(&text.replace("cidrs", "cidr")),
            "1: ServiceCIDR kubernetes: spec.cidrs: missing"
        );
    }

    #[test]
    fn label_faults_stand_at_the_label() {
        let manifest = read(
            "f.yaml",
            "apiVersion: v1\nkind: Namespace\nmetadata:\n  name: shop\n  labels:\n    \
             signet.dev/mode: strikt\n",
            istio::ROOT_NAMESPACE,
        )
        .unwrap();
        assert_eq!(manifest.objects.len(), 1);
        let faults: Vec<_> =
            manifest.label_faults.iter().map(|f| format!("{}: {f}", f.line)).collect();
        assert_eq!(
            faults,
            ["6: Namespace shop: metadata.labels[signet.dev/mode]: \"strikt\" is not a mode; \
              write off, observe, permissive or strict"]
        );
    }

    #[test]
    fn ranges_are_strict() {
        let ranges =
            read_ranges("podRanges: [10.0.0.0/16, fd00::/48]\noutsideRanges: [10.0.9.1]\n")
                .unwrap();
        assert_eq!((ranges.pods.len(), ranges.services.len(), ranges.outside.len()), (2, 0, 1));
        let fault = read_ranges("podRange: []\n").unwrap_err();
        assert_eq!(fault.to_string(), "podRange: unknown field; did you mean podRanges?");
        assert!(read_ranges("podRanges: [10.0.0.1/16]\n").is_err());
    }

    #[test]
    fn the_override_of_enforcement_is_one_word() {
        assert_eq!(read_enforcement("enforcement: audit\n").unwrap(), Enforcement::Audit);
        assert_eq!(read_enforcement("enforcement: off\n").unwrap(), Enforcement::Off);
        for (text, wanted) in [
            ("", "missing; write enforcement: enforce, audit or off"),
            ("{}", "enforcement: missing; write enforcement: enforce, audit or off"),
            ("enforcement: no\n", "enforcement: \"no\" is not one of enforce, audit, off"),
            ("enforcment: audit\n", "enforcment: unknown field; did you mean enforcement?"),
        ] {
            assert_eq!(read_enforcement(text).unwrap_err().to_string(), wanted);
        }
    }

    proptest! {
        #[test]
        fn reading_never_panics(text in ".{0,300}") {
            let _ = read("f.yaml", &text, istio::ROOT_NAMESPACE);
            let _ = read_ranges(&text);
        }

        #[test]
        fn mangled_manifests_never_panic(at in 0usize..600, cut in 0usize..40, put in "[ -~\n]{0,8}") {
            let mut text = POD.to_owned();
            let at = at.min(text.len());
            let end = (at + cut).min(text.len());
            text.replace_range(at..end, &put);
            let _ = read("f.yaml", &text, istio::ROOT_NAMESPACE);
        }
    }
}
