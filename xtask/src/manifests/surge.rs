//! What an upgrade without a refused connection needs of the agents' DaemonSet: two agents share
//! a node for a moment, each is probed over its own socket, and the old one has the time that
//! it is given.

use std::path::Path;

use serde_json::Value;

use super::objects::{containers, name};

/// The DaemonSet, and the ConfigMap of its agents.
const AGENT: &str = "signet-agent";
/// The key of [`AGENT`]'s ConfigMap.
const CONFIG: &str = "agent.yaml";
/// Says where an agent's own socket is, to itself and to `signet probe`.
const OWN_SOCKET: &str = "SIGNET_OWN_SOCKET";
const PROBES: [(&str, &str); 3] =
    [("startupProbe", "live"), ("readinessProbe", "ready"), ("livenessProbe", "live")];

/// What is wrong; nothing where there are no agents.
pub fn faults(objects: &[Value]) -> Vec<String> {
    let of_agent =
        |kind: &str| objects.iter().find(|o| o["kind"] == kind && o["metadata"]["name"] == AGENT);
    let Some(set) = of_agent("DaemonSet") else { return Vec::new() };
    let mut faults = Vec::new();
    let strategy = &set["spec"]["updateStrategy"];
    let rolling = &strategy["rollingUpdate"];
    if strategy["type"] != "RollingUpdate"
        || rolling["maxSurge"] != 1
        || rolling["maxUnavailable"] != 0
    {
        faults.push(
            "spec.updateStrategy: must be RollingUpdate with maxSurge 1, maxUnavailable 0".into(),
        );
    }
    let spec = &set["spec"]["template"]["spec"];
    let agents = containers(spec).filter(|container| container["name"] == "agent");
    for container in agents {
        faults.extend(container_faults(spec, container));
    }
    let config = of_agent("ConfigMap").map(|map| &map["data"][CONFIG]);
    let grace = spec["terminationGracePeriodSeconds"].as_u64().unwrap_or(30);
    match config.and_then(Value::as_str).and_then(drain_deadline) {
        Some(deadline) if deadline < grace => {}
        Some(deadline) => faults.push(format!(
            "spec.template.spec.terminationGracePeriodSeconds: {grace} is not more than the \
             {deadline} s of drainDeadline"
        )),
        None => faults.push(format!(
            "ConfigMap/{AGENT}: {CONFIG} has no drainDeadline in whole seconds or minutes (90s, 1m)"
        )),
    }
    faults.into_iter().map(|fault| format!("{}: {fault}", name(set))).collect()
}

fn container_faults(spec: &Value, container: &Value) -> Vec<String> {
    let mut faults = Vec::new();
    for (probe, kind) in PROBES {
        let wanted = serde_json::json!(["signet", "probe", kind]);
        if container[probe]["exec"]["command"] != wanted {
            faults.push(format!("{probe}: must run signet probe {kind}"));
        }
    }
    let list = |value: &Value| value.as_array().cloned().unwrap_or_default();
    let own = list(&container["env"]).into_iter().find(|env| env["name"] == OWN_SOCKET);
    let Some(directory) = own
        .as_ref()
        .and_then(|env| env["value"].as_str())
        .and_then(|socket| Path::new(socket).parent())
    else {
        faults.push(format!("env: {OWN_SOCKET} is missing: probes would ask another pod's agent"));
        return faults;
    };
    let mount = list(&container["volumeMounts"])
        .into_iter()
        .find(|mount| mount["mountPath"].as_str().map(Path::new) == Some(directory));
    let volume = mount.and_then(|mount| {
        list(&spec["volumes"]).into_iter().find(|volume| volume["name"] == mount["name"])
    });
    if volume.is_none_or(|volume| volume["emptyDir"].is_null()) {
        faults.push(format!(
            "env: {OWN_SOCKET}: {} is no emptyDir: another pod's agent would have the same",
            directory.display()
        ));
    }
    faults
}

/// The seconds of `drainDeadline` in an agent's configuration.
fn drain_deadline(config: &str) -> Option<u64> {
    let value = config.lines().find_map(|line| line.strip_prefix("drainDeadline:"))?.trim();
    let (number, unit) = value.split_at(value.len().checked_sub(1)?);
    let number: u64 = number.parse().ok()?;
    match unit {
        "s" => Some(number),
        "m" => Some(number * 60),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn objects() -> Vec<Value> {
        let probe = |kind: &str| json!({"exec": {"command": ["signet", "probe", kind]}});
        vec![
            json!({
                "kind": "ConfigMap", "metadata": {"name": "signet-agent"},
                "data": {"agent.yaml": "trustDomain: a\ndrainDeadline: 1m\n"},
            }),
            json!({
                "kind": "DaemonSet", "metadata": {"name": "signet-agent"},
                "spec": {
                    "updateStrategy": {
                        "type": "RollingUpdate",
                        "rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0},
                    },
                    "template": {"spec": {
                        "terminationGracePeriodSeconds": 61,
                        "containers": [{
                            "name": "agent",
                            "env": [{"name": OWN_SOCKET, "value": "/own/agent.sock"}],
                            "startupProbe": probe("live"),
                            "readinessProbe": probe("ready"),
                            "livenessProbe": probe("live"),
                            "volumeMounts": [{"name": "own", "mountPath": "/own"}],
                        }],
                        "volumes": [{"name": "own", "emptyDir": {}}],
                    }},
                },
            }),
        ]
    }

    #[test]
    fn what_an_upgrade_needs_is_checked() {
        assert_eq!(faults(&objects()), [""; 0], "the control");
        const SPEC: &str = "/1/spec/template/spec";
        let cases = [
            ("/1/spec/updateStrategy/rollingUpdate/maxSurge".into(), json!(0), "maxSurge 1"),
            ("/1/spec/updateStrategy/rollingUpdate/maxUnavailable".into(), json!(1), "maxSurge 1"),
            (format!("{SPEC}/terminationGracePeriodSeconds"), json!(60), "60 is not more"),
            (
                format!("{SPEC}/containers/0/readinessProbe"),
                json!({"exec": {"command": ["signet", "probe", "live"]}}),
                "readinessProbe",
            ),
            (format!("{SPEC}/containers/0/livenessProbe"), json!(null), "livenessProbe"),
            (format!("{SPEC}/containers/0/env"), json!([]), "is missing"),
            (
                format!("{SPEC}/volumes/0"),
                json!({"name": "own", "hostPath": {"path": "/run"}}),
                "no emptyDir",
            ),
            ("/0/data/agent.yaml".into(), json!("drainDeadline: soon\n"), "no drainDeadline"),
        ];
        for (pointer, value, message) in cases {
            let mut all = Value::Array(objects());
            *all.pointer_mut(&pointer).unwrap() = value;
            let found = faults(all.as_array().unwrap());
            assert!(found.iter().any(|fault| fault.contains(message)), "{pointer}: {found:?}");
        }
    }
}
