//! `/openapi/v2` and `/openapi/v3`: as much as clients need to know which kinds there are, that
//! their fields are validated here, and what custom kinds look like.

use serde_json::{Map, Value, json};

use super::{
    kinds::{Installed, Kind},
    objects::Objects,
};

/// Answers a path below `/openapi`; `None`: there is no such document.
pub(super) fn answer(installed: &Installed, objects: &Objects, path: &[&str]) -> Option<Value> {
    match path {
        ["openapi", "v2"] => Some(v2(installed, objects)),
        ["openapi", "v3"] => {
            let mut paths = Map::new();
            for (kind, version) in all(installed) {
                let of = place(kind, version);
                paths.insert(of.clone(), json!({"serverRelativeURL": format!("/openapi/v3/{of}")}));
            }
            Some(json!({"paths": paths}))
        }
        ["openapi", "v3", rest @ ..] => {
            let wanted = rest.join("/");
            let kinds: Vec<_> =
                all(installed).filter(|(kind, version)| place(kind, version) == wanted).collect();
            (!kinds.is_empty()).then(|| v3(&kinds, objects))
        }
        _ => None,
    }
}

fn all(installed: &Installed) -> impl Iterator<Item = (&'static Kind, &'static str)> {
    installed.there().flat_map(|kind| kind.versions.iter().map(move |version| (kind, *version)))
}

fn place(kind: &Kind, version: &str) -> String {
    match kind.group {
        "" => format!("api/{version}"),
        group => format!("apis/{group}/{version}"),
    }
}

/// A schema's name: the group backwards, the version, the kind.
fn name(kind: &Kind, version: &str) -> String {
    let group = if kind.group.is_empty() { "core.api.k8s.io" } else { kind.group };
    let mut parts: Vec<&str> = group.split('.').rev().collect();
    parts.extend([version, kind.kind]);
    parts.join(".")
}

fn gvk(kind: &Kind, version: &str) -> Value {
    json!({"group": kind.group, "version": version, "kind": kind.kind})
}

/// A kind's schema: its definition's own, or (built-in) any object.
fn schema(kind: &Kind, version: &str, objects: &Objects) -> Value {
    let definition = format!("{}.{}", kind.plural, kind.group);
    let definition = objects.get("customresourcedefinitions", "", &definition).unwrap_or_default();
    let versions = definition["spec"]["versions"].as_array().cloned().unwrap_or_default();
    let own = versions.into_iter().find(|known| known["name"] == version);
    let mut schema = match own {
        Some(own) => own["schema"]["openAPIV3Schema"].clone(),
        None => json!({"type": "object", "x-kubernetes-preserve-unknown-fields": true}),
    };
    schema["x-kubernetes-group-version-kind"] = json!([gvk(kind, version)]);
    schema
}

/// The paths of a kind with their verbs.
fn paths(kind: &Kind, version: &str, body: &Value) -> Vec<(String, Value)> {
    let begin = match kind.is_namespaced {
        true => format!("/{}/namespaces/{{namespace}}/{}", place(kind, version), kind.plural),
        false => format!("/{}/{}", place(kind, version), kind.plural),
    };
    let of = |action: &str, parameters: &[&str]| {
        let parameters: Vec<Value> = parameters
            .iter()
            .map(|name| {
                json!({"name": name, "in": "query", "schema": {"type": "string"}, "type": "string"})
            })
            .collect();
        let mut operation = json!({
            "parameters": parameters, "responses": {"200": {"description": "OK"}},
            "x-kubernetes-action": action, "x-kubernetes-group-version-kind": gvk(kind, version),
        });
        if let Some(body) = body.as_object().filter(|_| action == "post") {
            operation["requestBody"] = Value::Object(body.clone());
        }
        operation
    };
    let written = ["fieldManager", "fieldValidation"];
    let applied = ["fieldManager", "fieldValidation", "force"];
    vec![
        (begin.clone(), json!({"get": of("list", &[]), "post": of("post", &written)})),
        (
            format!("{begin}/{{name}}"),
            json!({
                "get": of("get", &[]), "put": of("put", &written), "patch": of("patch", &applied),
                "delete": of("delete", &[]),
            }),
        ),
    ]
}

fn v3(kinds: &[(&'static Kind, &'static str)], objects: &Objects) -> Value {
    let (mut all, mut schemas) = (Map::new(), Map::new());
    for (kind, version) in kinds {
        let name = name(kind, version);
        let body = json!({"content": {"application/json": {
            "schema": {"$ref": format!("#/components/schemas/{name}")},
        }}});
        all.extend(paths(kind, version, &body));
        schemas.insert(name, schema(kind, version, objects));
    }
    json!({
        "openapi": "3.0.0", "info": {"title": "Kubernetes", "version": "lab"},
        "paths": all, "components": {"schemas": schemas},
    })
}

fn v2(installed: &Installed, objects: &Objects) -> Value {
    let (mut all, mut definitions) = (Map::new(), Map::new());
    for (kind, version) in self::all(installed) {
        all.extend(paths(kind, version, &Value::Null));
        definitions.insert(name(kind, version), schema(kind, version, objects));
    }
    json!({
        "swagger": "2.0", "info": {"title": "Kubernetes", "version": "lab"},
        "paths": all, "definitions": definitions,
    })
}
