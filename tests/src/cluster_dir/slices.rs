//! The endpoints controller: EndpointSlices of Services with a selector.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use super::ObjectKey;

/// Label that tells our slices from hand-written ones.
pub(super) const MANAGED_BY: &str = "endpointslice.kubernetes.io/managed-by";
/// Its value.
pub(super) const MANAGER: &str = "signet-lab";

/// All slices that a namespace's Services and Pods call for.
pub(super) fn of_namespace(
    objects: &BTreeMap<ObjectKey, Value>,
    namespace: &str,
) -> BTreeMap<ObjectKey, Value> {
    let of_kind = |kind: &'static str| {
        objects
            .iter()
            .filter(move |(key, _)| key.kind == kind && key.namespace == namespace)
            .map(|(_, value)| value)
    };
    let mut slices = BTreeMap::new();
    for service in of_kind("Service") {
        let Some(selector) = service["spec"]["selector"].as_object() else { continue };
        let selected: Vec<&Value> = of_kind("Pod")
            .filter(|pod| selector.iter().all(|(k, v)| pod["metadata"]["labels"][k] == *v))
            .collect();
        for (family, is_v6) in [("IPv4", false), ("IPv6", true)] {
            if !has_family(service, is_v6) {
                continue;
            }
            let (key, slice) = slice(service, &selected, namespace, family, is_v6);
            slices.insert(key, slice);
        }
    }
    slices
}

fn has_family(service: &Value, is_v6: bool) -> bool {
    let ips = service["spec"]["clusterIPs"].as_array();
    ips.is_none_or(|ips| {
        ips.iter().filter_map(Value::as_str).any(|ip| ip == "None" || ip.contains(':') == is_v6)
    })
}

fn slice(
    service: &Value,
    selected: &[&Value],
    namespace: &str,
    family: &str,
    is_v6: bool,
) -> (ObjectKey, Value) {
    let name = service["metadata"]["name"].as_str().unwrap_or_default();
    let slice_name = format!("{name}-{}", family.to_lowercase());
    let endpoints: Vec<Value> =
        selected.iter().filter_map(|pod| endpoint(pod, namespace, is_v6)).collect();
    let ports: Vec<Value> = service["spec"]["ports"]
        .as_array()
        .into_iter()
        .flatten()
        .map(|port| {
            let mut entry = json!({
                "port": target_port(port, selected),
                "protocol": port["protocol"].as_str().unwrap_or("TCP"),
            });
            if let Some(name) = port["name"].as_str() {
                entry["name"] = json!(name);
            }
            entry
        })
        .collect();
    let slice = json!({
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
        "metadata": {
            "name": slice_name, "namespace": namespace,
            "labels": {"kubernetes.io/service-name": name, MANAGED_BY: MANAGER},
        },
        "addressType": family, "endpoints": endpoints, "ports": ports,
    });
    (ObjectKey::new("EndpointSlice", namespace, &slice_name), slice)
}

/// A pod's endpoint once its address is published and while it is not finished.
fn endpoint(pod: &Value, namespace: &str, is_v6: bool) -> Option<Value> {
    let status = &pod["status"];
    if matches!(status["phase"].as_str(), Some("Succeeded" | "Failed")) {
        return None;
    }
    let ip = status["podIPs"]
        .as_array()?
        .iter()
        .filter_map(|entry| entry["ip"].as_str())
        .find(|ip| ip.contains(':') == is_v6)?;
    let ready = status["conditions"]
        .as_array()
        .is_some_and(|all| all.iter().any(|c| c["type"] == "Ready" && c["status"] == "True"));
    let terminating = !pod["metadata"]["deletionTimestamp"].is_null();
    Some(json!({
        "addresses": [ip],
        "conditions": {
            "ready": ready && !terminating, "serving": ready, "terminating": terminating,
        },
        "nodeName": pod["spec"]["nodeName"],
        "targetRef": {
            "kind": "Pod", "namespace": namespace,
            "name": pod["metadata"]["name"], "uid": pod["metadata"]["uid"],
        },
    }))
}

/// The number behind `targetPort`; a name is looked up in the first selected pod that has it.
fn target_port(port: &Value, selected: &[&Value]) -> Value {
    match &port["targetPort"] {
        Value::Number(number) => json!(number),
        Value::String(name) => selected
            .iter()
            .flat_map(|pod| pod["spec"]["containers"].as_array().into_iter().flatten())
            .flat_map(|container| container["ports"].as_array().into_iter().flatten())
            .find(|p| p["name"] == **name)
            .map_or(Value::Null, |p| p["containerPort"].clone()),
        _ => port["port"].clone(),
    }
}
