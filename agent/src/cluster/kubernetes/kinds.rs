//! What is watched.

/// A kind of objects that is watched by itself.
#[derive(Clone, Debug)]
pub(super) struct Kind {
    /// As `signet status` and metrics name it.
    pub(super) shown: &'static str,
    pub(super) group: &'static str,
    /// The versions that are read, the preferred one first.
    pub(super) versions: &'static [&'static str],
    pub(super) kind: &'static str,
    pub(super) plural: &'static str,
    /// Only in this namespace.
    pub(super) namespace: Option<String>,
    /// Only what fits this field selector.
    pub(super) fields: Option<String>,
    pub(super) gate: Gate,
    pub(super) content: Content,
}

impl Kind {
    /// True when a server may not have it: then 404 says that there are none.
    pub(super) fn is_optional(&self) -> bool {
        !matches!(self.group, "" | "discovery.k8s.io")
    }
}

/// What must wait until this kind is synced.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Gate {
    /// Every change of the kernel: what is pinned stays as it is.
    Everything,
    /// Only what is enforced anew.
    Enforcing,
    /// Nothing.
    Nothing,
}

/// How its objects are read.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Content {
    /// As manifests are.
    Object,
    /// As a node's announcement.
    Announcement,
    /// As a ConfigMap with the override of enforcement.
    Enforcement,
    /// As a ConfigMap with the foreign trust domains.
    Federation,
}

/// The ConfigMap that overrides what modes and policies say, with the key `enforcement`.
pub(super) const ENFORCEMENT: &str = "signet-enforcement";
/// The ConfigMap with the key `federation.yaml`.
pub(super) const FEDERATION: &str = "signet-federation";

/// Everything that is watched on a node.
pub(super) fn all(node: &str, namespace: &str) -> Vec<Kind> {
    use Gate::{Enforcing, Everything, Nothing};
    const CORE: (&str, &[&str]) = ("", &["v1"]);
    const SIGNET: (&str, &[&str]) = ("signet.dev", &["v1alpha1"]);
    const ISTIO: (&str, &[&str]) = ("security.istio.io", &["v1", "v1beta1"]);
    let of = |(group, versions), kind, plural, gate| Kind {
        shown: kind,
        group,
        versions,
        kind,
        plural,
        namespace: None,
        fields: None,
        gate,
        content: Content::Object,
    };
    let config_map = |shown, name: &str, gate, content| Kind {
        shown,
        namespace: Some(namespace.to_owned()),
        fields: Some(format!("metadata.name={name}")),
        content,
        ..of(CORE, "ConfigMap", "configmaps", gate)
    };
    vec![
        of(CORE, "Namespace", "namespaces", Everything),
        // This node's pods by themselves: they are few, and what concerns them is heard without
        // the whole cluster's before it.
        Kind {
            shown: "Pod (this node)",
            fields: Some(format!("spec.nodeName={node}")),
            ..of(CORE, "Pod", "pods", Everything)
        },
        Kind {
            shown: "Pod (other nodes)",
            fields: Some(format!("spec.nodeName!={node}")),
            ..of(CORE, "Pod", "pods", Everything)
        },
        of(CORE, "Service", "services", Everything),
        of(("discovery.k8s.io", &["v1"]), "EndpointSlice", "endpointslices", Everything),
        of(CORE, "Node", "nodes", Everything),
        of(("networking.k8s.io", &["v1", "v1beta1"]), "ServiceCIDR", "servicecidrs", Everything),
        of(("crd.projectcalico.org", &["v1"]), "IPPool", "ippools", Everything),
        // Nothing is decided by them.
        of(CORE, "ServiceAccount", "serviceaccounts", Nothing),
        Kind {
            content: Content::Announcement,
            ..of(SIGNET, "NodeEnrolment", "nodeenrolments", Everything)
        },
        of(SIGNET, "IdentityPolicy", "identitypolicies", Enforcing),
        of(SIGNET, "ClusterIdentityPolicy", "clusteridentitypolicies", Enforcing),
        of(ISTIO, "AuthorizationPolicy", "authorizationpolicies", Enforcing),
        // Modes follow from them.
        of(ISTIO, "PeerAuthentication", "peerauthentications", Everything),
        // Until it is read, what is pinned stays.
        config_map("ConfigMap signet-enforcement", ENFORCEMENT, Nothing, Content::Enforcement),
        config_map("ConfigMap signet-federation", FEDERATION, Everything, Content::Federation),
    ]
}
