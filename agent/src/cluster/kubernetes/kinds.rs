//! What is watched.

use crate::api_server::Right;

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
    /// True when conditions are written on its objects.
    pub(super) fn has_conditions(&self) -> bool {
        POLICIES.iter().any(|(kind, _)| *kind == self.kind)
    }

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
    /// For the Services that the API server calls by it.
    Called,
}

/// Our own kinds of policies, with the plurals of their paths.
pub(super) const POLICIES: [(&str, &str); 2] =
    [("IdentityPolicy", "identitypolicies"), ("ClusterIdentityPolicy", "clusteridentitypolicies")];

/// The ConfigMap that overrides what modes and policies say, with the key `enforcement`.
pub(super) const ENFORCEMENT: &str = "signet-enforcement";
/// The ConfigMap with the key `federation.yaml`.
pub(super) const FEDERATION: &str = "signet-federation";

/// Everything that is watched on a node.
pub(super) fn all(node: &str, namespace: &str) -> Vec<Kind> {
    use Gate::{Enforcing, Everything, Nothing};
    const CORE: (&str, &[&str]) = ("", &["v1"]);
    const ADMISSION: &str = "admissionregistration.k8s.io";
    const AGGREGATION: &str = "apiregistration.k8s.io";
    const EXTENSIONS: &str = "apiextensions.k8s.io";
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
    let called = |group, kind, plural| Kind {
        content: Content::Called,
        ..of((group, &["v1"]), kind, plural, Enforcing)
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
        of(("networking.k8s.io", &["v1"]), "NetworkPolicy", "networkpolicies", Nothing),
        Kind {
            content: Content::Announcement,
            ..of(SIGNET, "NodeEnrolment", "nodeenrolments", Everything)
        },
        of(SIGNET, "IdentityPolicy", "identitypolicies", Enforcing),
        of(SIGNET, "ClusterIdentityPolicy", "clusteridentitypolicies", Enforcing),
        of(ISTIO, "AuthorizationPolicy", "authorizationpolicies", Enforcing),
        // Modes follow from them.
        of(ISTIO, "PeerAuthentication", "peerauthentications", Everything),
        of(ISTIO, "RequestAuthentication", "requestauthentications", Enforcing),
        // Exempt ports follow from them.
        called(ADMISSION, "ValidatingWebhookConfiguration", "validatingwebhookconfigurations"),
        called(ADMISSION, "MutatingWebhookConfiguration", "mutatingwebhookconfigurations"),
        called(AGGREGATION, "APIService", "apiservices"),
        called(EXTENSIONS, "CustomResourceDefinition", "customresourcedefinitions"),
        // Until it is read, what is pinned stays.
        config_map("ConfigMap signet-enforcement", ENFORCEMENT, Nothing, Content::Enforcement),
        config_map("ConfigMap signet-federation", FEDERATION, Everything, Content::Federation),
    ]
}

/// Every right that an agent needs for its watches, its NodeEnrolment and its events, each with
/// whether the kind may be absent.
pub(super) fn rights(node: &str, namespace: &str) -> Vec<(Right, bool)> {
    let mut rights = Vec::new();
    for kind in all(node, namespace) {
        for verb in ["list", "watch"] {
            let mut right = Right::of(verb, kind.group, kind.plural);
            if let Some(namespace) = &kind.namespace {
                let name = kind.fields.as_deref().and_then(|f| f.strip_prefix("metadata.name="));
                right = right.within(namespace).named(name.unwrap_or_default());
            }
            let is_optional = kind.is_optional() && kind.group != "signet.dev";
            if !rights.iter().any(|(known, _)| *known == right) {
                rights.push((right, is_optional));
            }
        }
    }
    for verb in ["create", "patch"] {
        rights.push((Right::of(verb, "signet.dev", "nodeenrolments"), false));
        rights.push((Right::of(verb, "events.k8s.io", "events"), false));
    }
    for (_, plural) in POLICIES {
        let right = Right { subresource: "status", ..Right::of("patch", "signet.dev", plural) };
        rights.push((right, false));
    }
    rights
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::yaml::{self, Node};

    /// Texts of a list field.
    fn texts(node: &Node, name: &str) -> Vec<String> {
        let read = |list: &Node| list.list(64, |item| item.text().map(str::to_owned));
        node.get(name).map(read).transpose().unwrap().unwrap_or_default()
    }

    /// What is watched is what the shipped roles allow, no less; and of the ConfigMaps no more.
    #[test]
    fn the_shipped_roles_allow_every_watch() {
        let path =
            std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../manifests/agent/rbac.yaml");
        let objects = yaml::parse(&std::fs::read_to_string(path).unwrap()).unwrap();
        let rules = |kind: &str| {
            let is_it = |o: &&Node| o.get("kind").is_some_and(|k| k.text() == Ok(kind));
            let role = objects.iter().find(is_it).unwrap_or_else(|| panic!("no {kind}"));
            role.get("rules").unwrap().list(64, |rule| Ok(rule.clone())).unwrap()
        };
        let (cluster, own) = (rules("ClusterRole"), rules("Role"));
        let allows = |rules: &[Node], kind: &Kind, verb: &str, name: Option<&str>| {
            rules.iter().any(|rule| {
                let names = texts(rule, "resourceNames");
                texts(rule, "apiGroups").iter().any(|group| group == kind.group)
                    && texts(rule, "resources").iter().any(|resource| resource == kind.plural)
                    && texts(rule, "verbs").iter().any(|allowed| allowed == verb)
                    && name.is_none_or(|name| names.iter().any(|allowed| allowed == name))
            })
        };
        for kind in all("node-1", "signet-system") {
            for verb in ["list", "watch"] {
                let name = kind.namespace.as_ref().and(kind.fields.as_deref());
                let name = name.and_then(|fields| fields.strip_prefix("metadata.name="));
                let allowed = match name {
                    Some(name) => allows(&own, &kind, verb, Some(name)),
                    None => allows(&cluster, &kind, verb, None),
                };
                assert!(allowed, "{verb} {} is not in manifests/agent/rbac.yaml", kind.plural);
            }
            // The controls: nobody may change what is only read, and no ConfigMap goes unnamed.
            assert_eq!(allows(&cluster, &kind, "patch", None), kind.plural == "nodeenrolments");
            assert!(kind.plural != "configmaps" || !allows(&cluster, &kind, "list", None));
        }
    }
}
