//! The CustomResourceDefinitions of both kinds, made from the reader's own lists of fields
//! and limits: `manifests/crds/` is written from here.
//!
//! What a structural schema cannot say is said in CEL where that helps; what neither says
//! (a pattern that can never match) the reader refuses, as the object's condition.

use serde_json::{Map, Value, json};

use super::{
    CLUSTER_KIND, HTTP, KIND, MATCH, MAX_CHARS, MAX_CLAIM_PATH, MAX_LABELS, MAX_PEERS, MAX_PORTS,
    MAX_REQUESTS, MAX_RULES, MAX_VALUES, PORTS, SPEC, known_peer, known_rule, known_selector,
};

/// A namespace or another name of one label.
const LABEL: &str = "[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?";
/// A name of several labels.
const NAME: &str = r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*";

/// Both definitions, with the names of their files.
pub fn definitions() -> [(&'static str, Value); 2] {
    [
        ("identitypolicies.yaml", definition(false)),
        ("clusteridentitypolicies.yaml", definition(true)),
    ]
}

fn definition(is_cluster: bool) -> Value {
    let (kind, plural, short, scope) = if is_cluster {
        (CLUSTER_KIND, "clusteridentitypolicies", "cidp", "Cluster")
    } else {
        (KIND, "identitypolicies", "idp", "Namespaced")
    };
    let condition =
        |kind: &str, field: &str| format!(".status.conditions[?(@.type==\"{kind}\")].{field}");
    json!({
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": format!("{plural}.signet.dev")},
        "spec": {
            "group": "signet.dev",
            "scope": scope,
            "names": {
                "kind": kind,
                "listKind": format!("{kind}List"),
                "plural": plural,
                "singular": kind.to_lowercase(),
                "shortNames": [short],
                "categories": ["signet"],
            },
            "versions": [{
                "name": "v1alpha1",
                "served": true,
                "storage": true,
                "subresources": {"status": {}},
                "additionalPrinterColumns": [
                    {"name": "Action", "type": "string", "jsonPath": ".spec.action"},
                    {"name": "Accepted", "type": "string", "jsonPath": condition("Accepted", "status")},
                    {"name": "Reason", "type": "string", "jsonPath": condition("Accepted", "reason")},
                    {"name": "Enforced", "type": "string", "jsonPath": condition("Enforced", "status")},
                    {"name": "Age", "type": "date", "jsonPath": ".metadata.creationTimestamp"},
                ],
                "schema": {"openAPIV3Schema": {
                    "type": "object",
                    "description": if is_cluster {
                        "Who may reach pods, and whom they may reach, in any namespace."
                    } else {
                        "Who may reach pods of its namespace, and whom they may reach."
                    },
                    "required": ["spec"],
                    "properties": {
                        "apiVersion": {"type": "string"},
                        "kind": {"type": "string"},
                        "metadata": {"type": "object"},
                        "spec": spec(is_cluster),
                        "status": status(),
                    },
                }},
            }],
        },
    })
}

/// An object of these fields, each described by `each`.
fn object(fields: &[&str], each: impl Fn(&str) -> Value) -> Value {
    let properties: Map<String, Value> =
        fields.iter().map(|field| ((*field).to_owned(), each(field))).collect();
    json!({"type": "object", "properties": properties})
}

/// With more keys.
fn with(mut schema: Value, more: Value) -> Value {
    if let (Value::Object(schema), Value::Object(more)) = (&mut schema, more) {
        schema.extend(more);
    }
    schema
}

fn list(items: Value, least: usize, most: usize, description: &str) -> Value {
    let mut schema = json!({
        "type": "array", "items": items, "maxItems": most, "description": description,
    });
    if least > 0 {
        schema["minItems"] = json!(least);
    }
    schema
}

fn rule(message: &str, expression: &str) -> Value {
    json!([{"rule": expression, "message": message}])
}

fn spec(is_cluster: bool) -> Value {
    let schema = object(SPEC, |field| match field {
        "selector" => selector(is_cluster),
        "action" => json!({
            "type": "string", "enum": ["Allow", "Deny", "Audit"], "default": "Allow",
            "description": "Deny goes before Allow; once an Allow selects a pod only what matches \
                            passes; Audit reports.",
        }),
        "ingress" => list(
            traffic_rule("from", is_cluster),
            0,
            MAX_RULES,
            "What the pods receive; any rule that matches is enough, an empty list matches nothing.",
        ),
        _ => list(
            traffic_rule("to", is_cluster),
            0,
            MAX_RULES,
            "What the pods dial; any rule that matches is enough, an empty list matches nothing.",
        ),
    });
    with(
        schema,
        json!({"x-kubernetes-validations": rule(
            "neither ingress nor egress; write rules, or ingress: [] for an Allow that lets nothing in",
            "has(self.ingress) || has(self.egress)",
        )}),
    )
}

fn selector(is_cluster: bool) -> Value {
    let schema = object(known_selector(is_cluster), |field| match field {
        "matchLabels" => json!({
            "type": "object", "maxProperties": MAX_LABELS,
            "additionalProperties": {"type": "string", "maxLength": 63},
            "description": "Labels that a pod must have, all of them.",
        }),
        _ => list(
            namespace(),
            1,
            MAX_VALUES,
            "Namespaces: names, prefix*, *suffix or *; absent: every one.",
        ),
    });
    with(schema, json!({"description": "The pods that it is about; absent: every pod."}))
}

fn traffic_rule(peers: &'static str, is_cluster: bool) -> Value {
    let fields: Vec<&str> = std::iter::once(peers).chain(known_rule(peers == "to")).collect();
    object(&fields, |field| match field {
        "http" => list(
            operation(),
            1,
            MAX_REQUESTS,
            "HTTP requests, any of them; absent: every request, and what is not HTTP.",
        ),
        "headers" => list(
            matched("name", "The header's name.", plain(256)),
            1,
            MAX_REQUESTS,
            "Headers of the request, all of them; several values are one, with commas between.",
        ),
        "claims" => list(
            matched(
                "path",
                "The claim's name, or the names on the way to it.",
                list(plain(MAX_CHARS), 1, MAX_CLAIM_PATH, ""),
            ),
            1,
            MAX_REQUESTS,
            "Claims of the request's end user, all of them.",
        ),
        "ports" => list(
            ports(),
            1,
            MAX_PORTS,
            "Ports of the pod that is reached (not its Service's); absent: every port.",
        ),
        "notPorts" => list(ports(), 1, MAX_PORTS, "Ports that the rule does not cover."),
        "unauthenticated" => json!({
            "type": "boolean",
            "description": "An identity that only the address shows counts as if it were proven.",
        }),
        "from" => list(peer(false, is_cluster), 1, MAX_PEERS, "Any of them; absent: everybody."),
        _ => list(peer(true, is_cluster), 1, MAX_PEERS, "Any of them; absent: everybody."),
    })
}

fn ports() -> Value {
    let number = |description: &str| {
        json!({
            "type": "integer", "minimum": 1, "maximum": 65535, "description": description,
        })
    };
    let schema = object(PORTS, |field| match field {
        "port" => number("The port, or the first of a range."),
        "endPort" => number("The last port of a range."),
        _ => json!({
            "type": "string", "enum": ["TCP", "UDP"], "description": "Absent: both.",
        }),
    });
    with(
        schema,
        json!({
            "minProperties": 1,
            "x-kubernetes-validations": rule(
                "endPort needs port and is not below it",
                "!has(self.endPort) || (has(self.port) && self.endPort >= self.port)",
            ),
        }),
    )
}

fn peer(is_egress: bool, is_cluster: bool) -> Value {
    let values = |items: Value, description: &str| list(items, 1, MAX_VALUES, description);
    let account = || named(is_cluster);
    let schema = object(known_peer(is_egress), |field| match field {
        "identities" => {
            values(identity(), "SPIFFE IDs: exact, prefix*, *suffix, or * for any identity.")
        }
        "notIdentities" => values(identity(), "None of these."),
        "namespaces" => values(namespace(), "Namespaces of our own trust domain."),
        "notNamespaces" => values(namespace(), "None of these."),
        "serviceAccounts" => values(account(), "Service accounts of our own trust domain."),
        "notServiceAccounts" => values(account(), "None of these."),
        "ipBlocks" => values(block(), "Addresses or ranges."),
        "notIpBlocks" => values(block(), "None of these."),
        "requestPrincipals" => values(
            plain(MAX_CHARS),
            "The request's end user: issuer/subject, issuer/*, */subject or * for any.",
        ),
        "notRequestPrincipals" => values(plain(MAX_CHARS), "None of these; absent is none, too."),
        "trustDomains" => values(domain(), "Trust domains: names, prefix*, *suffix or *."),
        "notTrustDomains" => values(domain(), "None of these."),
        _ => {
            values(account(), "Services: their own addresses and their endpoints', at their ports.")
        }
    });
    with(
        schema,
        json!({
            "minProperties": 1,
            "description": "Who the other side is: every field that is given must hold.",
        }),
    )
}

/// An entry of `http`.
fn operation() -> Value {
    let values = |items: Value, description: &str| list(items, 1, MAX_VALUES, description);
    let schema = object(HTTP, |field| match field {
        "methods" => values(plain(MAX_CHARS), "Methods: exact, prefix*, *suffix or *."),
        "paths" => values(
            path(),
            "Paths without the query: exact, prefix*, *suffix, or with {*} for one segment and \
             {**} for any.",
        ),
        "hosts" => values(
            plain(MAX_CHARS),
            "Hosts as the request names them, its port included; case does not count.",
        ),
        "notPaths" => values(path(), "None of these."),
        _ => values(plain(MAX_CHARS), "None of these."),
    });
    with(schema, json!({"minProperties": 1, "description": "Every field that is given must hold."}))
}

/// An entry that wants values of what `by` names.
fn matched(by: &str, description: &str, schema: Value) -> Value {
    let fields: Vec<&str> = std::iter::once(by).chain(MATCH.iter().copied()).collect();
    let named = with(schema, json!({"description": description}));
    let schema = object(&fields, |field| match field {
        "values" => list(
            plain(MAX_CHARS),
            1,
            MAX_VALUES,
            "Any of them: exact, prefix*, *suffix, or * for whatever is present.",
        ),
        "notValues" => list(plain(MAX_CHARS), 1, MAX_VALUES, "None of these."),
        _ => named.clone(),
    });
    with(schema, json!({"required": [by], "minProperties": 2}))
}

fn plain(most: usize) -> Value {
    json!({"type": "string", "minLength": 1, "maxLength": most})
}

fn path() -> Value {
    text(r"^[/*][^?#]*$".into(), MAX_CHARS)
}

fn text(pattern: String, most: usize) -> Value {
    json!({"type": "string", "minLength": 1, "maxLength": most, "pattern": pattern})
}

fn identity() -> Value {
    text(r"^(\*[A-Za-z0-9./_:-]*|spiffe://[A-Za-z0-9./_-]*\*?)$".into(), 2048)
}

fn namespace() -> Value {
    text(r"^(\*[-a-z0-9]*|[-a-z0-9]+\*?)$".into(), 64)
}

fn domain() -> Value {
    text(r"^(\*[-._a-z0-9]*|[-._a-z0-9]+\*?)$".into(), 256)
}

fn named(is_cluster: bool) -> Value {
    let namespace = format!("{LABEL}/");
    let namespace = if is_cluster { namespace } else { format!("({namespace})?") };
    text(format!("^{namespace}{NAME}$"), 317)
}

fn block() -> Value {
    text(r"^[0-9a-fA-F.:]+(/[0-9]{1,3})?$".into(), 43)
}

fn status() -> Value {
    let text = |most: usize| json!({"type": "string", "maxLength": most});
    json!({
        "type": "object",
        "properties": {
            "conditions": {
                "type": "array",
                "maxItems": 16,
                "x-kubernetes-list-type": "map",
                "x-kubernetes-list-map-keys": ["type"],
                "items": {
                    "type": "object",
                    "required": ["type", "status", "lastTransitionTime", "reason", "message"],
                    "properties": {
                        "type": text(316),
                        "status": {"type": "string", "enum": ["True", "False", "Unknown"]},
                        "observedGeneration": {"type": "integer", "format": "int64", "minimum": 0},
                        "lastTransitionTime": {"type": "string", "format": "date-time"},
                        "reason": text(1024),
                        "message": text(32768),
                    },
                },
            },
        },
    })
}

#[cfg(test)]
mod tests;
