//! What the API server calls: webhooks of admission, aggregated APIs, webhooks that convert.
//!
//! It calls from a node's address, or from outside of the cluster, in its own TLS and through
//! no tunnel: a pod behind such a Service must take it as it comes, or the cluster's API stops.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use serde_json::Value;

use super::model::ObjectName;

/// The port of a reference that names none.
const DEFAULT_PORT: u64 = 443;
/// The most Services that one object may name; more are no webhooks of anybody.
const MAX_SERVICES: usize = 1000;

/// An object that makes the API server call Services.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct CalledFacts {
    /// `ValidatingWebhookConfiguration`, `MutatingWebhookConfiguration`, `APIService` or
    /// `CustomResourceDefinition`.
    pub kind: Arc<str>,
    /// Its name.
    pub name: Arc<str>,
    /// The Services that it names, with the port there.
    pub services: BTreeSet<(ObjectName, u16)>,
}

/// Services' ports that are called, each with who says so (`kind name`).
pub type Called = BTreeMap<(ObjectName, u16), BTreeSet<Arc<str>>>;

impl CalledFacts {
    /// True for the kinds that this is about.
    pub fn is_read(version: &str, kind: &str) -> bool {
        match kind {
            "ValidatingWebhookConfiguration" | "MutatingWebhookConfiguration" => {
                version.starts_with("admissionregistration.k8s.io/")
            }
            "APIService" => version.starts_with("apiregistration.k8s.io/"),
            "CustomResourceDefinition" => version.starts_with("apiextensions.k8s.io/"),
            _ => false,
        }
    }

    /// What an object names. References that are no references (a URL, a name that is none) are
    /// no Services of the cluster and left out.
    pub fn read(kind: &str, name: &str, object: &Value) -> Self {
        let hooks = object["webhooks"].as_array().into_iter().flatten();
        let of_hooks = hooks.map(|hook| &hook["clientConfig"]["service"]);
        let others = [
            object.pointer("/spec/service"),
            object.pointer("/spec/conversion/webhook/clientConfig/service"),
        ];
        let all = of_hooks.chain(others.into_iter().flatten());
        let services = all.filter_map(reference).take(MAX_SERVICES).collect();
        Self { kind: kind.into(), name: name.into(), services }
    }
}

fn reference(service: &Value) -> Option<(ObjectName, u16)> {
    let text = |field: &str| service[field].as_str().filter(|text| !text.is_empty());
    let port = service["port"].as_u64().unwrap_or(DEFAULT_PORT);
    let name = ObjectName { namespace: text("namespace")?.into(), name: text("name")?.into() };
    Some((name, u16::try_from(port).ok().filter(|port| *port > 0)?))
}

/// All of them, by Service.
pub fn by_service<'a>(all: impl Iterator<Item = &'a CalledFacts>) -> Called {
    let mut called = Called::new();
    for facts in all {
        for service in &facts.services {
            let who = format!("{} {}", facts.kind, facts.name);
            called.entry(service.clone()).or_default().insert(who.into());
        }
    }
    called
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn services(object: Value) -> Vec<String> {
        let facts = CalledFacts::read("K", "n", &object);
        let shown =
            |(name, port): &(ObjectName, u16)| format!("{}/{}:{port}", name.namespace, name.name);
        facts.services.iter().map(shown).collect()
    }

    #[test]
    fn every_kind_of_reference_is_read() {
        let to = |service: Value| json!({"clientConfig": {"service": service}});
        let hooks = json!({"webhooks": [
            to(json!({"namespace": "a", "name": "hook"})),
            to(json!({"namespace": "a", "name": "hook", "port": 8443})),
            {"clientConfig": {"url": "https://elsewhere"}},
            to(json!({"namespace": "a", "name": "", "port": 1})),
            to(json!({"namespace": "a", "name": "far", "port": 70000})),
        ]});
        assert_eq!(services(hooks), ["a/hook:443", "a/hook:8443"]);
        let api = json!({"spec": {"service": {"namespace": "m", "name": "metrics", "port": 6443}}});
        assert_eq!(services(api), ["m/metrics:6443"]);
        let definition = json!({"spec": {"conversion": {
            "strategy": "Webhook", "webhook": to(json!({"namespace": "c", "name": "convert"})),
        }}});
        assert_eq!(services(definition), ["c/convert:443"]);
        // Local APIs and definitions without conversion call nobody.
        assert!(services(json!({"spec": {"service": null}})).is_empty());
        assert!(services(json!({"spec": {"conversion": {"strategy": "None"}}})).is_empty());
        assert!(services(json!([])).is_empty());
    }

    #[test]
    fn whoever_calls_is_named() {
        let facts = |kind: &str| {
            CalledFacts::read(
                kind,
                "x",
                &json!({"webhooks": [
                    {"clientConfig": {"service": {"namespace": "a", "name": "hook"}}},
                ]}),
            )
        };
        let all = [facts("First"), facts("Second")];
        let called = by_service(all.iter());
        let who: Vec<_> = called.values().flatten().map(AsRef::as_ref).collect();
        assert_eq!((called.len(), who), (1, vec!["First x", "Second x"]));
    }
}
