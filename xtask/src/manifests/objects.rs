//! Single objects: of a known kind, without a field that the API server would refuse or drop,
//! labelled, with images that name a version.

use k8s_openapi::{
    Resource,
    api::{
        admissionregistration::v1::{ValidatingAdmissionPolicy, ValidatingAdmissionPolicyBinding},
        apps::v1::{DaemonSet, Deployment},
        coordination::v1::Lease,
        core::v1::{ConfigMap, Namespace, Secret, Service, ServiceAccount},
        policy::v1::PodDisruptionBudget,
        rbac::v1::{ClusterRole, ClusterRoleBinding, Role, RoleBinding},
        storage::v1::CSIDriver,
    },
    apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition,
};
use serde::{Serialize, de::DeserializeOwned};
use serde_json::Value;

/// The label that every object of ours carries; CustomResourceDefinitions are generated.
const PART_OF: &str = "app.kubernetes.io/part-of";

/// `kind/name`, for messages.
pub fn name(object: &Value) -> String {
    let text = |value: &Value| value.as_str().unwrap_or("?").to_owned();
    format!("{}/{}", text(&object["kind"]), text(&object["metadata"]["name"]))
}

/// What is wrong with one object.
pub fn faults(object: &Value) -> Vec<String> {
    let name = name(object);
    let mut faults: Vec<String> = typed(object).err().into_iter().collect();
    if object["kind"] != "CustomResourceDefinition"
        && object["metadata"]["labels"][PART_OF] != "signet"
    {
        faults.push(format!("metadata.labels[{PART_OF}]: must be signet"));
    }
    let spec = &object["spec"]["template"]["spec"];
    if !spec.is_null() {
        faults.extend(pods(object, spec));
    }
    faults.into_iter().map(|fault| format!("{name}: {fault}")).collect()
}

fn pods(object: &Value, spec: &Value) -> Vec<String> {
    let mut faults = Vec::new();
    for container in containers(spec) {
        let image = container["image"].as_str().unwrap_or_default();
        let tag = image.rsplit_once('/').map_or(image, |(_, last)| last).split_once(':');
        let is_fixed = image.contains("@sha256:")
            || tag.is_some_and(|(_, tag)| !tag.is_empty() && tag != "latest");
        if !is_fixed {
            faults.push(format!("image {image:?}: give a version, not latest"));
        }
        if spec["hostNetwork"] == true && !container["ports"].is_null() {
            faults.push("ports: with hostNetwork they are host ports; leave them out".into());
        }
    }
    let selector = object["spec"]["selector"]["matchLabels"].as_object();
    let labels = &object["spec"]["template"]["metadata"]["labels"];
    for (key, value) in selector.into_iter().flatten() {
        if labels[key] != *value {
            faults.push(format!("spec.selector: its pods have no label {key}={value}"));
        }
    }
    faults
}

/// Every container of a pod's spec.
pub fn containers(spec: &Value) -> impl Iterator<Item = &Value> {
    ["initContainers", "containers"]
        .into_iter()
        .flat_map(|list| spec[list].as_array().into_iter().flatten())
}

/// Reads it as its kind's type and holds what that knows of it against it.
fn typed(object: &Value) -> Result<(), String> {
    macro_rules! kinds {
        ($($kind:ty),* $(,)?) => {
            $(if object["kind"] == <$kind as Resource>::KIND
                && object["apiVersion"] == <$kind as Resource>::API_VERSION
            {
                return strictly::<$kind>(object);
            })*
        };
    }
    kinds!(
        ClusterRole,
        ClusterRoleBinding,
        ConfigMap,
        CSIDriver,
        CustomResourceDefinition,
        DaemonSet,
        Deployment,
        Lease,
        Namespace,
        PodDisruptionBudget,
        Role,
        RoleBinding,
        Secret,
        Service,
        ServiceAccount,
        ValidatingAdmissionPolicy,
        ValidatingAdmissionPolicyBinding,
    );
    // Of Prometheus Operator; what they say is checked with promtool.
    if object["apiVersion"] == "monitoring.coreos.com/v1"
        && ["PodMonitor", "PrometheusRule"].iter().any(|kind| object["kind"] == *kind)
    {
        return Ok(());
    }
    Err(format!(
        "{} {} is no kind that is checked: add it to xtask/src/manifests/objects.rs",
        object["apiVersion"], object["kind"]
    ))
}

fn strictly<T: Serialize + DeserializeOwned>(object: &Value) -> Result<(), String> {
    let read: T = serde_json::from_value(object.clone()).map_err(|e| e.to_string())?;
    let known = serde_json::to_value(read).map_err(|e| e.to_string())?;
    match unknown(object, &known, String::new()) {
        Some(field) => Err(format!("{field}: unknown field, or not of its type")),
        None => Ok(()),
    }
}

/// The first field of `given` that `known` lacks or has differently: the types drop what they do
/// not know.
fn unknown(given: &Value, known: &Value, at: String) -> Option<String> {
    match (given, known) {
        (Value::Object(given), Value::Object(known)) => given.iter().find_map(|(name, value)| {
            let at = if at.is_empty() { name.clone() } else { format!("{at}.{name}") };
            match known.get(name) {
                Some(known) => unknown(value, known, at),
                // Nothing, written out.
                None if value.is_null() => None,
                None => Some(at),
            }
        }),
        (Value::Array(given), Value::Array(known)) if given.len() == known.len() => {
            let pairs = given.iter().zip(known).enumerate();
            pairs
                .into_iter()
                .find_map(|(i, (given, known))| unknown(given, known, format!("{at}[{i}]")))
        }
        (Value::Number(given), Value::Number(known)) if given.as_f64() == known.as_f64() => None,
        (given, known) if given == known => None,
        _ => Some(at),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn daemon_set() -> Value {
        json!({
            "apiVersion": "apps/v1", "kind": "DaemonSet",
            "metadata": {"name": "agent", "labels": {"app.kubernetes.io/part-of": "signet"}},
            "spec": {
                "selector": {"matchLabels": {"app": "agent"}},
                "template": {
                    "metadata": {"labels": {"app": "agent"}},
                    "spec": {
                        "hostNetwork": true,
                        "containers": [{
                            "name": "agent", "image": "registry:5000/signet:v1",
                            "livenessProbe": {"exec": {"command": ["x"]}, "periodSeconds": 5},
                            "resources": {"requests": {"cpu": "50m"}},
                        }],
                    },
                },
            },
        })
    }

    /// Puts `value` at a JSON pointer's place, whose parent exists.
    fn planted(pointer: &str, value: Value) -> Vec<String> {
        let mut object = daemon_set();
        let (parent, name) = pointer.rsplit_once('/').unwrap();
        object.pointer_mut(parent).unwrap()[name] = value;
        faults(&object)
    }

    #[test]
    fn what_is_in_order_has_no_faults() {
        assert_eq!(faults(&daemon_set()), [""; 0]);
    }

    #[test]
    fn planted_faults_are_found_where_they_are() {
        const CONTAINER: &str = "/spec/template/spec/containers/0";
        let cases = [
            ("/spec/updateStrateggy", json!({}), "spec.updateStrateggy: unknown field"),
            ("/spec/template/spec/hostIP", json!(true), "spec.template.spec.hostIP"),
            (
                &format!("{CONTAINER}/livenessProbe/periodSecond"),
                json!(5),
                "spec.template.spec.containers[0].livenessProbe.periodSecond: unknown",
            ),
            (&format!("{CONTAINER}/livenessProbe/periodSeconds"), json!("5"), "invalid type"),
            (&format!("{CONTAINER}/image"), json!("registry:5000/signet"), "give a version"),
            (&format!("{CONTAINER}/image"), json!("signet:latest"), "give a version"),
            (&format!("{CONTAINER}/ports"), json!([{"containerPort": 1}]), "host ports"),
            ("/spec/selector/matchLabels/app", json!("agents"), "its pods have no label"),
            ("/metadata/labels", json!({}), "part-of"),
            ("/kind", json!("DeamonSet"), "no kind that is checked"),
            ("/apiVersion", json!("apps/v1beta1"), "no kind that is checked"),
        ];
        for (pointer, value, message) in cases {
            let found = planted(pointer, value);
            assert!(found.iter().any(|fault| fault.contains(message)), "{pointer}: {found:?}");
        }
    }
}
