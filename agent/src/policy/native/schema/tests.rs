use regex::Regex;

use super::*;
use crate::{config::yaml::parse_one, policy::native};

const HEAD: &str = "# Generated from agent/src/policy/native/schema.rs; do not edit.
# SIGNET_WRITE_GENERATED=1 cargo test -p signet generated
";

#[test]
fn generated_crds_are_in_step() {
    let directory = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../manifests/crds");
    for (file, definition) in definitions() {
        let path = directory.join(file);
        let text = HEAD.to_owned() + &serde_saphyr::to_string(&definition).unwrap();
        if std::env::var_os("SIGNET_WRITE_GENERATED").is_some() {
            std::fs::create_dir_all(&directory).unwrap();
            std::fs::write(&path, &text).unwrap();
        }
        let present = std::fs::read_to_string(&path).unwrap_or_default();
        assert!(
            present == text,
            "manifests/crds/{file} is behind the reader: \
             SIGNET_WRITE_GENERATED=1 cargo test -p signet generated"
        );
        // What was written reads back as what was meant.
        let again: Value = serde_saphyr::from_str(&present).unwrap();
        assert_eq!(again, definition);
    }
}

/// Why a value is not of a schema; as far as our schemas go, without CEL.
fn wrong(schema: &Value, value: &Value, at: &str) -> Option<String> {
    let amount = |key: &str| schema[key].as_u64();
    let fault = |what: &str| Some(format!("{at}: {what}"));
    if let Some(words) = schema["enum"].as_array()
        && !words.contains(value)
    {
        return fault("not one of the words");
    }
    match schema["type"].as_str()? {
        "object" => {
            let Some(fields) = value.as_object() else { return fault("no object") };
            let required = schema["required"].as_array().cloned().unwrap_or_default();
            if let Some(missing) =
                required.iter().filter_map(Value::as_str).find(|name| !fields.contains_key(*name))
            {
                return fault(&format!("no {missing}"));
            }
            if amount("minProperties").is_some_and(|n| (fields.len() as u64) < n)
                || amount("maxProperties").is_some_and(|n| fields.len() as u64 > n)
            {
                return fault("too few or too many fields");
            }
            fields.iter().find_map(|(name, value)| {
                let inner = &schema["properties"][name];
                let inner = if inner.is_null() { &schema["additionalProperties"] } else { inner };
                let open = schema["properties"].is_null() && inner.is_null();
                match (open, inner.is_null()) {
                    (true, _) => None,
                    (false, true) => fault(&format!("unknown {name}")),
                    (false, false) => wrong(inner, value, &format!("{at}.{name}")),
                }
            })
        }
        "array" => {
            let Some(items) = value.as_array() else { return fault("no list") };
            let n = items.len() as u64;
            if amount("minItems").is_some_and(|least| n < least)
                || amount("maxItems").is_some_and(|most| n > most)
            {
                return fault("too few or too many items");
            }
            items.iter().find_map(|item| wrong(&schema["items"], item, &format!("{at}[]")))
        }
        "string" => match value.as_str() {
            Some(text)
                if schema["pattern"]
                    .as_str()
                    .is_none_or(|pattern| Regex::new(pattern).unwrap().is_match(text))
                    && amount("minLength").is_none_or(|least| text.len() as u64 >= least)
                    && amount("maxLength").is_none_or(|most| text.len() as u64 <= most) =>
            {
                None
            }
            _ => fault("no such text"),
        },
        "integer" => match value.as_u64() {
            Some(n)
                if amount("minimum").is_none_or(|least| n >= least)
                    && amount("maximum").is_none_or(|most| n <= most) =>
            {
                None
            }
            _ => fault("no such number"),
        },
        "boolean" => {
            if value.is_boolean() {
                None
            } else {
                fault("no boolean")
            }
        }
        other => fault(&format!("the type {other} is not known here")),
    }
}

fn by_schema(text: &str, is_cluster: bool) -> Option<String> {
    let value: Value = serde_saphyr::from_str(text).unwrap();
    let definition = definition(is_cluster);
    let schema = &definition["spec"]["versions"][0]["schema"]["openAPIV3Schema"];
    wrong(schema, &value, "")
}

fn by_reader(text: &str) -> Option<String> {
    native::read(&parse_one(text).unwrap().unwrap()).err().map(|fault| fault.to_string())
}

fn document(is_cluster: bool, spec: &str) -> String {
    let (kind, metadata) =
        if is_cluster { (CLUSTER_KIND, "{name: p}") } else { (KIND, "{name: p, namespace: shop}") };
    format!("apiVersion: signet.dev/v1alpha1\nkind: {kind}\nmetadata: {metadata}\nspec: {spec}\n")
}

const EVERYTHING: &str = "{selector: {matchLabels: {app: x}}, action: Audit, ingress: [{from: \
     [{identities: ['*/sa/x'], notIdentities: [spiffe://a/b], namespaces: [a], notNamespaces: \
     ['b*'], serviceAccounts: [a/b], notServiceAccounts: [a/c], ipBlocks: [10.0.0.0/8], notIpBlocks: \
     [10.1.0.0/16], trustDomains: [a.b], notTrustDomains: ['*'], \
     requestPrincipals: ['*'], notRequestPrincipals: [a/b]}], http: [{methods: [GET], notMethods: \
     ['P*'], paths: [/a, '/b/{*}', '*/c'], notPaths: ['/b/{**}'], hosts: ['A.b:*'], notHosts: [c]}], \
     headers: [{name: x-a, values: [b], notValues: [c]}], claims: [{path: [a, b], values: ['*']}], \
     ports: [{port: 1, endPort: 2, protocol: TCP}], notPorts: [{protocol: UDP}], unauthenticated: \
     true}], egress: [{to: [{services: \
     [a/b]}]}]}";

#[test]
fn schema_and_reader_know_the_same_fields() {
    for is_cluster in [false, true] {
        let all = document(is_cluster, EVERYTHING);
        assert_eq!((by_schema(&all, is_cluster), by_reader(&all)), (None, None));
    }
    let scoped = EVERYTHING.replace("{matchLabels", "{namespaces: ['a*'], matchLabels");
    assert_eq!(by_schema(&document(true, &scoped), true), None);
    assert_eq!(by_reader(&document(true, &scoped)), None);
    // What the one refuses the other does.
    for spec in [
        scoped.as_str(),
        "{action: Block, ingress: []}",
        "{ingress: [{form: []}]}",
        "{ingress: [{from: []}]}",
        "{ingress: [{from: [{}]}]}",
        "{ingress: [{from: [{services: [a]}]}]}",
        "{ingress: [{from: [{namespaces: []}]}]}",
        "{ingress: [{from: [{identities: a}]}]}",
        "{ingress: [{ports: [{}]}]}",
        "{ingress: [{ports: [{port: 0}]}]}",
        "{ingress: [{ports: [{port: 65536}]}]}",
        "{ingress: [{ports: [{port: 1, protocol: SCTP}]}]}",
        "{ingress: [{unauthenticated: 1}]}",
        "{ingress: {}}",
        "{ingress: [{http: []}]}",
        "{ingress: [{http: [{}]}]}",
        "{ingress: [{http: [{method: [GET]}]}]}",
        "{ingress: [{http: [{methods: []}]}]}",
        "{ingress: [{http: [{paths: [a]}]}]}",
        "{ingress: [{http: [{paths: ['/a?b']}]}]}",
        "{ingress: [{headers: [{name: x-a}]}]}",
        "{ingress: [{headers: [{values: [a], notValues: [b]}]}]}",
        "{ingress: [{claims: [{path: [], values: [a]}]}]}",
        "{ingress: [{claims: [{path: [''], values: [a]}]}]}",
        // Requests are judged where they arrive.
        "{egress: [{http: [{methods: [GET]}]}]}",
        "{egress: [{to: [{requestPrincipals: ['*']}]}]}",
    ] {
        let text = document(false, spec);
        assert!(by_schema(&text, false).is_some(), "the schema takes {spec}");
        assert!(by_reader(&text).is_some(), "the reader takes {spec}");
    }
    // And the limits.
    let ports = |n: usize| {
        document(false, &format!("{{ingress: [{{ports: [{}]}}]}}", vec!["{port: 1}"; n].join(", ")))
    };
    for (n, fits) in [(MAX_PORTS, true), (MAX_PORTS + 1, false)] {
        assert_eq!(by_schema(&ports(n), false).is_none(), fits);
        assert_eq!(by_reader(&ports(n)).is_none(), fits);
    }
}

/// Forms that the reader takes, and that the schema must not refuse; and some that both do.
#[test]
fn patterns_refuse_nothing_that_the_reader_takes() {
    let from = |field: &str, value: &str| {
        document(false, &format!("{{egress: [{{to: [{{{field}: [\"{value}\"]}}]}}]}}"))
    };
    for (field, value) in [
        ("identities", "*"),
        ("identities", "*/sa/x"),
        ("identities", "*://a.b/ns/x"),
        ("identities", "spiffe://*"),
        ("identities", "spiffe://clu*"),
        ("identities", "spiffe://a.b/ns/X_y/sa/z-1"),
        ("identities", "spiffe://a_b/ns/*"),
        ("namespaces", "*"),
        ("namespaces", "*-x"),
        ("namespaces", "x-*"),
        ("namespaces", "a1"),
        ("serviceAccounts", "a"),
        ("serviceAccounts", "a.b-c"),
        ("serviceAccounts", "ns-1/a.b"),
        ("services", "ns/a-b"),
        ("trustDomains", "a_b.c-d"),
        ("trustDomains", "*.test"),
        ("trustDomains", "pre*"),
        ("ipBlocks", "10.0.0.1"),
        ("ipBlocks", "10.0.0.0/8"),
        ("ipBlocks", "fd00::/48"),
        ("ipBlocks", "::ffff:10.0.0.0/104"),
    ] {
        let text = from(field, value);
        assert_eq!((by_reader(&text), by_schema(&text, false)), (None, None), "{field} {value}");
    }
    for (field, value) in [
        ("identities", ""),
        ("identities", "cluster.local/ns/a"),
        ("identities", "spiffe://a/*/b"),
        ("namespaces", "a*b"),
        ("namespaces", "A"),
        ("serviceAccounts", "*"),
        ("serviceAccounts", "a/b/c"),
        ("serviceAccounts", "-a"),
        ("services", "a/*"),
        ("trustDomains", "A"),
        ("ipBlocks", "x"),
        ("ipBlocks", "10.0.0.0/8/9"),
    ] {
        let text = from(field, value);
        assert!(by_reader(&text).is_some(), "{field} {value}");
        assert!(by_schema(&text, false).is_some(), "{field} {value}");
    }
}

#[test]
fn what_only_cel_says_the_reader_says_too() {
    // Kept in step by hand: the schema alone takes these, CEL and the reader do not.
    for (spec, rule) in [
        ("{action: Allow}", "has(self.ingress) || has(self.egress)"),
        ("{ingress: [{ports: [{port: 9, endPort: 8}]}]}", "self.endPort >= self.port"),
        ("{ingress: [{ports: [{endPort: 8}]}]}", "has(self.port)"),
    ] {
        let text = document(false, spec);
        assert!(by_reader(&text).is_some(), "{spec}");
        assert!(definition(false).to_string().contains(rule), "{rule}");
    }
}
