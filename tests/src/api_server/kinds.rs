//! The kinds that the server knows, and discovery of them.

use std::collections::BTreeSet;

use serde_json::{Value, json};

use super::Refusal;

/// A kind.
#[derive(Debug)]
pub(super) struct Kind {
    /// Empty: the core group.
    pub(super) group: &'static str,
    pub(super) versions: &'static [&'static str],
    pub(super) plural: &'static str,
    pub(super) kind: &'static str,
    pub(super) is_namespaced: bool,
    /// Writes to the object itself leave `status` as it is.
    pub(super) has_status: bool,
    /// Its group is there only once it is installed, as a CustomResourceDefinition is.
    pub(super) is_custom: bool,
}

const fn core(
    plural: &'static str,
    kind: &'static str,
    is_namespaced: bool,
    has_status: bool,
) -> Kind {
    Kind { group: "", versions: &["v1"], plural, kind, is_namespaced, has_status, is_custom: false }
}

/// A built-in kind of a group, `v1`.
const fn of(
    group: &'static str,
    plural: &'static str,
    kind: &'static str,
    is_namespaced: bool,
    has_status: bool,
) -> Kind {
    Kind { group, ..core(plural, kind, is_namespaced, has_status) }
}

const fn custom(
    group: &'static str,
    versions: &'static [&'static str],
    plural: &'static str,
    kind: &'static str,
    is_namespaced: bool,
    has_status: bool,
) -> Kind {
    Kind { group, versions, plural, kind, is_namespaced, has_status, is_custom: true }
}

const SIGNET: &str = "signet.dev";
const ISTIO: &str = "security.istio.io";
const RBAC: &str = "rbac.authorization.k8s.io";
const ADMISSION: &str = "admissionregistration.k8s.io";

/// All of them; no plural is there twice.
pub(super) const KINDS: &[Kind] = &[
    core("pods", "Pod", true, true),
    core("secrets", "Secret", true, false),
    core("configmaps", "ConfigMap", true, false),
    core("serviceaccounts", "ServiceAccount", true, false),
    core("services", "Service", true, true),
    core("namespaces", "Namespace", false, true),
    core("nodes", "Node", false, true),
    of("discovery.k8s.io", "endpointslices", "EndpointSlice", true, false),
    of("events.k8s.io", "events", "Event", true, false),
    of("networking.k8s.io", "networkpolicies", "NetworkPolicy", true, false),
    of("apps", "deployments", "Deployment", true, true),
    of("apps", "daemonsets", "DaemonSet", true, true),
    of("apps", "replicasets", "ReplicaSet", true, true),
    of("apps", "statefulsets", "StatefulSet", true, true),
    of("apps", "controllerrevisions", "ControllerRevision", true, false),
    of("batch", "jobs", "Job", true, true),
    of("policy", "poddisruptionbudgets", "PodDisruptionBudget", true, true),
    of("coordination.k8s.io", "leases", "Lease", true, false),
    of("storage.k8s.io", "csidrivers", "CSIDriver", false, false),
    of(RBAC, "roles", "Role", true, false),
    of(RBAC, "rolebindings", "RoleBinding", true, false),
    of(RBAC, "clusterroles", "ClusterRole", false, false),
    of(RBAC, "clusterrolebindings", "ClusterRoleBinding", false, false),
    of(ADMISSION, "validatingadmissionpolicies", "ValidatingAdmissionPolicy", false, true),
    of(
        ADMISSION,
        "validatingadmissionpolicybindings",
        "ValidatingAdmissionPolicyBinding",
        false,
        false,
    ),
    of(
        ADMISSION,
        "validatingwebhookconfigurations",
        "ValidatingWebhookConfiguration",
        false,
        false,
    ),
    of(ADMISSION, "mutatingwebhookconfigurations", "MutatingWebhookConfiguration", false, false),
    of("apiregistration.k8s.io", "apiservices", "APIService", false, true),
    of(
        "apiextensions.k8s.io",
        "customresourcedefinitions",
        "CustomResourceDefinition",
        false,
        true,
    ),
    custom("networking.k8s.io", &["v1", "v1beta1"], "servicecidrs", "ServiceCIDR", false, true),
    custom("crd.projectcalico.org", &["v1"], "ippools", "IPPool", false, false),
    custom(SIGNET, &["v1alpha1"], "identitypolicies", "IdentityPolicy", true, true),
    custom(SIGNET, &["v1alpha1"], "clusteridentitypolicies", "ClusterIdentityPolicy", false, true),
    custom(SIGNET, &["v1alpha1"], "nodeenrolments", "NodeEnrolment", false, false),
    custom(ISTIO, &["v1", "v1beta1"], "authorizationpolicies", "AuthorizationPolicy", true, true),
    custom(ISTIO, &["v1", "v1beta1"], "peerauthentications", "PeerAuthentication", true, true),
    custom(
        ISTIO,
        &["v1", "v1beta1"],
        "requestauthentications",
        "RequestAuthentication",
        true,
        true,
    ),
];

impl Kind {
    /// As objects say it, in the preferred version.
    pub(super) fn api_version(&self) -> String {
        group_version(self.group, self.versions[0])
    }
}

fn group_version(group: &str, version: &str) -> String {
    if group.is_empty() { version.to_owned() } else { format!("{group}/{version}") }
}

/// Which custom kinds are installed, by plural.
#[derive(Debug)]
pub(super) struct Installed(BTreeSet<&'static str>);

impl Default for Installed {
    /// Our own.
    fn default() -> Self {
        let own = KINDS.iter().filter(|kind| kind.group == SIGNET);
        Self(own.map(|kind| kind.plural).collect())
    }
}

impl Installed {
    /// Installs or removes a custom kind; false where there is none of that plural.
    pub(super) fn set(&mut self, plural: &str, is_there: bool) -> bool {
        let Some(kind) = KINDS.iter().find(|kind| kind.plural == plural && kind.is_custom) else {
            return false;
        };
        match is_there {
            true => self.0.insert(kind.plural),
            false => self.0.remove(kind.plural),
        };
        true
    }

    pub(super) fn has(&self, kind: &Kind) -> bool {
        !kind.is_custom || self.0.contains(kind.plural)
    }

    /// A kind by its path.
    pub(super) fn find(
        &self,
        group: &str,
        version: &str,
        plural: &str,
    ) -> Result<&'static Kind, Refusal> {
        let fits = |kind: &&Kind| {
            kind.group == group
                && kind.versions.contains(&version)
                && kind.plural == plural
                && self.has(kind)
        };
        KINDS.iter().find(fits).ok_or_else(|| {
            Refusal::new(404, "NotFound", "the server could not find the requested resource")
        })
    }

    /// Every kind that is there.
    pub(super) fn there(&self) -> impl Iterator<Item = &'static Kind> {
        KINDS.iter().filter(|kind| self.has(kind))
    }

    /// Answers discovery: `/api`, `/apis`, `/apis/<group>`, `/api/v1`, `/apis/<group>/<version>`.
    pub(super) fn discover(&self, path: &[&str]) -> Option<Value> {
        let there: Vec<&Kind> = self.there().collect();
        let group = |name: &str| {
            let versions: BTreeSet<&str> = there
                .iter()
                .filter(|kind| kind.group == name)
                .flat_map(|kind| kind.versions.iter().copied())
                .collect();
            let versions: Vec<Value> = versions
                .iter()
                .map(|v| json!({"groupVersion": group_version(name, v), "version": v}))
                .collect();
            (!versions.is_empty()).then(|| {
                json!({
                    "kind": "APIGroup", "apiVersion": "v1", "name": name,
                    "preferredVersion": versions[0], "versions": versions,
                })
            })
        };
        match path {
            ["api"] => Some(json!({"kind": "APIVersions", "versions": ["v1"]})),
            ["apis"] => {
                let names: BTreeSet<&str> =
                    there.iter().map(|kind| kind.group).filter(|g| !g.is_empty()).collect();
                let groups: Vec<Value> = names.into_iter().filter_map(group).collect();
                Some(json!({"kind": "APIGroupList", "apiVersion": "v1", "groups": groups}))
            }
            ["apis", name] => group(name),
            ["api", "v1"] => Some(resources(&there, "", "v1")),
            ["apis", name, version]
                if there.iter().any(|k| k.group == *name && k.versions.contains(version)) =>
            {
                Some(resources(&there, name, version))
            }
            _ => None,
        }
    }
}

/// What people write for a kind.
fn short_names(kind: &Kind) -> &'static [&'static str] {
    match kind.plural {
        "configmaps" => &["cm"],
        "customresourcedefinitions" => &["crd", "crds"],
        "daemonsets" => &["ds"],
        "deployments" => &["deploy"],
        "identitypolicies" => &["idp"],
        "clusteridentitypolicies" => &["cidp"],
        "namespaces" => &["ns"],
        "nodeenrolments" => &["nenr"],
        "nodes" => &["no"],
        "pods" => &["po"],
        "serviceaccounts" => &["sa"],
        "services" => &["svc"],
        _ => &[],
    }
}

fn resources(there: &[&Kind], group: &str, version: &str) -> Value {
    const VERBS: [&str; 7] = ["create", "delete", "get", "list", "patch", "update", "watch"];
    let fits = |kind: &&&Kind| kind.group == group && kind.versions.contains(&version);
    let resources: Vec<Value> = there
        .iter()
        .filter(fits)
        .flat_map(|kind| {
            let of = |name: String, verbs: &[&str]| {
                json!({
                    "name": name, "singularName": kind.kind.to_lowercase(), "kind": kind.kind,
                    "namespaced": kind.is_namespaced, "verbs": verbs,
                    "shortNames": short_names(kind),
                })
            };
            let status = format!("{}/status", kind.plural);
            let status = kind.has_status.then(|| of(status, &["get", "patch", "update"]));
            std::iter::once(of(kind.plural.into(), &VERBS)).chain(status)
        })
        .collect();
    json!({
        "kind": "APIResourceList", "apiVersion": "v1",
        "groupVersion": group_version(group, version), "resources": resources,
    })
}
