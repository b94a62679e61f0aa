//! What objects say of each other: accounts, roles, ConfigMaps, policies, namespaces, kinds.

use std::collections::BTreeSet;

use serde_json::Value;

use super::objects::{containers, name};

/// Where everything of ours is.
const NAMESPACE: &str = "signet-system";
/// What others make in the namespace: every cluster, or Istio's authority.
const GIVEN: [&str; 2] = ["ConfigMap/kube-root-ca.crt", "ConfigMap/istio-ca-root-cert"];

/// References that lead nowhere.
pub fn faults(objects: &[Value]) -> Vec<String> {
    let mut there: BTreeSet<String> = objects.iter().map(name).collect();
    there.extend(GIVEN.map(str::to_owned));
    let mut faults = Vec::new();
    for object in objects {
        let mut wanted = BTreeSet::new();
        let spec = &object["spec"]["template"]["spec"];
        if !spec.is_null() {
            of_pods(spec, &mut wanted);
        }
        if !object["roleRef"].is_null() {
            wanted.insert(key(&object["roleRef"]["kind"], &object["roleRef"]["name"]));
        }
        for subject in list(&object["subjects"]) {
            wanted.insert(key(&subject["kind"], &subject["name"]));
            if subject["namespace"] != NAMESPACE {
                faults.push(format!("{}: subjects: namespace must be {NAMESPACE}", name(object)));
            }
        }
        if let Some(policy) = object["spec"]["policyName"].as_str() {
            wanted.insert(format!("ValidatingAdmissionPolicy/{policy}"));
        }
        for missing in wanted.difference(&there) {
            faults.push(format!("{}: refers to {missing}, which is not there", name(object)));
        }
        let namespace = &object["metadata"]["namespace"];
        if !namespace.is_null() && namespace != NAMESPACE {
            faults.push(format!("{}: metadata.namespace must be {NAMESPACE}", name(object)));
        }
        faults.extend(selector(object, objects));
        faults.extend(own_kinds(object, objects));
    }
    let mut seen = BTreeSet::new();
    for object in objects {
        if !seen.insert((name(object), object["metadata"]["namespace"].to_string())) {
            faults.push(format!("{}: is there twice", name(object)));
        }
    }
    faults
}

fn of_pods(spec: &Value, wanted: &mut BTreeSet<String>) {
    wanted.insert(key(&"ServiceAccount".into(), &spec["serviceAccountName"]));
    for volume in list(&spec["volumes"]) {
        if let Some(map) = volume["configMap"]["name"].as_str() {
            wanted.insert(format!("ConfigMap/{map}"));
        }
        if let Some(secret) = volume["secret"]["secretName"].as_str() {
            wanted.insert(format!("Secret/{secret}"));
        }
    }
    let volumes: BTreeSet<String> =
        list(&spec["volumes"]).map(|v| key(&"volume".into(), &v["name"])).collect();
    for container in containers(spec) {
        for mount in list(&container["volumeMounts"]) {
            let mount = key(&"volume".into(), &mount["name"]);
            if !volumes.contains(&mount) {
                wanted.insert(mount);
            }
        }
    }
}

/// A Service or a disruption budget that selects no pods of ours.
fn selector(object: &Value, objects: &[Value]) -> Option<String> {
    let selector = match object["kind"].as_str()? {
        "Service" => &object["spec"]["selector"],
        "PodDisruptionBudget" => &object["spec"]["selector"]["matchLabels"],
        _ => return None,
    };
    let wanted = selector.as_object()?;
    let selects = objects.iter().any(|other| {
        let labels = &other["spec"]["template"]["metadata"]["labels"];
        !labels.is_null() && wanted.iter().all(|(key, value)| labels[key] == *value)
    });
    (!selects).then(|| format!("{}: its selector selects no pods", name(object)))
}

/// Rights on kinds of ours for which there is no CustomResourceDefinition, or on parts of them
/// that none of its versions has.
fn own_kinds(object: &Value, objects: &[Value]) -> Vec<String> {
    // Agents ask about it; it is never stored.
    const NOT_STORED: &str = "flows";
    let mut faults = Vec::new();
    for rule in list(&object["rules"]) {
        if !list(&rule["apiGroups"]).any(|group| group == "signet.dev") {
            continue;
        }
        for resource in list(&rule["resources"]).filter_map(Value::as_str) {
            let (plural, part) = resource.split_once('/').unwrap_or((resource, ""));
            let wanted = format!("CustomResourceDefinition/{plural}.signet.dev");
            let Some(definition) = objects.iter().find(|object| name(object) == wanted) else {
                if plural != NOT_STORED {
                    faults.push(format!("{}: rules: there is no {wanted}", name(object)));
                }
                continue;
            };
            let has = |version: &Value| !version["subresources"][part].is_null();
            if !part.is_empty() && !list(&definition["spec"]["versions"]).any(has) {
                faults.push(format!("{}: rules: {wanted} has no {part}", name(object)));
            }
        }
    }
    faults
}

fn key(kind: &Value, name: &Value) -> String {
    format!("{}/{}", kind.as_str().unwrap_or("?"), name.as_str().unwrap_or("?"))
}

fn list(value: &Value) -> impl Iterator<Item = &Value> {
    value.as_array().into_iter().flatten()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn build() -> Vec<Value> {
        let metadata = |name: &str| json!({"name": name, "namespace": NAMESPACE});
        vec![
            json!({"kind": "ServiceAccount", "metadata": metadata("a")}),
            json!({"kind": "ConfigMap", "metadata": metadata("c")}),
            json!({"kind": "CustomResourceDefinition", "metadata": {"name": "things.signet.dev"},
                "spec": {"versions": [{"subresources": {"status": {}}}]}}),
            json!({"kind": "ClusterRole", "metadata": {"name": "r"}, "rules": [
                {"apiGroups": ["signet.dev"], "resources": ["things", "flows", "things/status"],
                    "verbs": ["get"]},
            ]}),
            json!({"kind": "ClusterRoleBinding", "metadata": {"name": "b"},
                "roleRef": {"kind": "ClusterRole", "name": "r"},
                "subjects": [{"kind": "ServiceAccount", "name": "a", "namespace": NAMESPACE}]}),
            json!({"kind": "ValidatingAdmissionPolicy", "metadata": {"name": "p"}}),
            json!({"kind": "ValidatingAdmissionPolicyBinding", "metadata": {"name": "p"},
                "spec": {"policyName": "p"}}),
            json!({"kind": "Deployment", "metadata": metadata("d"), "spec": {"template": {
                "metadata": {"labels": {"app": "d"}},
                "spec": {
                    "serviceAccountName": "a",
                    "containers": [{"volumeMounts": [{"name": "v"}]}],
                    "volumes": [{"name": "v", "configMap": {"name": "c"}}],
                },
            }}}),
            json!({"kind": "Service", "metadata": metadata("s"), "spec": {"selector": {"app": "d"}}}),
        ]
    }

    #[test]
    fn what_hangs_together_has_no_faults() {
        assert_eq!(faults(&build()), [""; 0]);
    }

    #[test]
    fn planted_faults_are_found() {
        let pod = "/spec/template/spec";
        let cases = [
            (7, format!("{pod}/serviceAccountName"), json!("z"), "refers to ServiceAccount/z"),
            (7, format!("{pod}/volumes/0/configMap/name"), json!("z"), "refers to ConfigMap/z"),
            (7, format!("{pod}/volumes/0/name"), json!("z"), "refers to volume/v"),
            (7, "/metadata/namespace".into(), json!("default"), "metadata.namespace"),
            (4, "/roleRef/name".into(), json!("z"), "refers to ClusterRole/z"),
            (4, "/roleRef/kind".into(), json!("Role"), "refers to Role/r"),
            (4, "/subjects/0/name".into(), json!("z"), "refers to ServiceAccount/z"),
            (4, "/subjects/0/namespace".into(), json!("z"), "subjects: namespace"),
            (6, "/spec/policyName".into(), json!("z"), "refers to ValidatingAdmissionPolicy/z"),
            (8, "/spec/selector/app".into(), json!("z"), "selects no pods"),
            (
                3,
                "/rules/0/resources/0".into(),
                json!("z"),
                "there is no CustomResourceDefinition/z",
            ),
            (
                3,
                "/rules/0/resources/2".into(),
                json!("z/status"),
                "there is no CustomResourceDefinition/z",
            ),
            (
                3,
                "/rules/0/resources/2".into(),
                json!("things/scale"),
                "things.signet.dev has no scale",
            ),
            (
                2,
                "/spec/versions/0/subresources".into(),
                json!({}),
                "things.signet.dev has no status",
            ),
            (1, "/metadata/name".into(), json!("a"), "refers to ConfigMap/c"),
        ];
        for (index, pointer, value, message) in cases {
            let mut objects = build();
            *objects[index].pointer_mut(&pointer).unwrap() = value;
            let found = faults(&objects);
            assert!(found.iter().any(|fault| fault.contains(message)), "{pointer}: {found:?}");
        }
        let mut twice = build();
        twice.push(twice[1].clone());
        assert!(faults(&twice).iter().any(|fault| fault.contains("is there twice")));
    }
}
