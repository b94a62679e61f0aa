//! Structural schemas of custom kinds: objects are pruned, get their defaults and are validated,
//! by the schema's own words and by its rules.
//!
//! A keyword that this does not know makes the schema unusable, by name.

mod check;
mod rules;

use serde_json::{Map, Value, json};

use super::{Refusal, http::cannot};

/// Keywords that mean something here, or nothing anywhere.
const KEYWORDS: [&str; 37] = [
    "additionalProperties",
    "allOf",
    "anyOf",
    "default",
    "description",
    "enum",
    "example",
    "exclusiveMaximum",
    "exclusiveMinimum",
    "externalDocs",
    "format",
    "items",
    "maxItems",
    "maxLength",
    "maxProperties",
    "maximum",
    "minItems",
    "minLength",
    "minProperties",
    "minimum",
    "multipleOf",
    "not",
    "nullable",
    "oneOf",
    "pattern",
    "properties",
    "required",
    "title",
    "type",
    "uniqueItems",
    "x-kubernetes-int-or-string",
    "x-kubernetes-list-map-keys",
    "x-kubernetes-list-type",
    "x-kubernetes-map-type",
    "x-kubernetes-preserve-unknown-fields",
    "x-kubernetes-validations",
    "id",
];

/// The schema of one version of a custom kind.
pub(super) struct Schema {
    root: Value,
}

impl Schema {
    /// Of a CustomResourceDefinition's version, held against what this server can evaluate.
    pub(super) fn of(definition: &Value, version: &str) -> Result<Option<Self>, Refusal> {
        let versions = definition["spec"]["versions"].as_array().into_iter().flatten();
        let mut fitting = versions.into_iter().filter(|known| known["name"] == version);
        let Some(schema) = fitting.next().map(|known| &known["schema"]["openAPIV3Schema"]) else {
            return Ok(None);
        };
        if !schema.is_object() {
            return Err(invalid("spec.versions[0].schema.openAPIV3Schema: Required value"));
        }
        usable(schema, "openAPIV3Schema")?;
        rules::usable(schema)?;
        Ok(Some(Self { root: schema.clone() }))
    }

    /// Takes what the schema does not know out of an object, and says what that was.
    pub(super) fn prune(&self, object: &mut Value) -> Vec<String> {
        let mut unknown = Vec::new();
        if let Value::Object(fields) = object {
            // What every object has is not the schema's to say.
            let keep = ["apiVersion", "kind", "metadata"].map(|name| (name, fields.remove(name)));
            let mut rest = Value::Object(std::mem::take(fields));
            prune(&self.root, &mut rest, "", &mut unknown);
            *object = rest;
            for (name, value) in keep {
                if let Some(value) = value {
                    object[name] = value;
                }
            }
        }
        unknown
    }

    /// Gives an object its defaults.
    pub(super) fn default(&self, object: &mut Value) {
        default(&self.root, object);
    }

    /// What is wrong with an object; `old` is what it replaces.
    pub(super) fn faults(&self, object: &Value, old: Option<&Value>) -> Vec<String> {
        let mut faults = Vec::new();
        check::check(&self.root, object, "", &mut faults);
        // Rules may rely on the schema.
        if faults.is_empty() {
            rules::check(&self.root, object, old, "", &mut faults);
        }
        faults
    }
}

fn invalid(message: &str) -> Refusal {
    Refusal::new(422, "Invalid", message)
}

/// Every schema below one, with its path.
fn below(schema: &Value) -> Vec<(String, &Value)> {
    let mut all = Vec::new();
    for (name, property) in schema["properties"].as_object().into_iter().flatten() {
        all.push((format!("properties.{name}"), property));
    }
    for word in ["items", "additionalProperties", "not"] {
        if schema[word].is_object() {
            all.push((word.to_owned(), &schema[word]));
        }
    }
    for word in ["allOf", "anyOf", "oneOf"] {
        let each = schema[word].as_array().into_iter().flatten().enumerate();
        all.extend(each.map(|(index, schema)| (format!("{word}[{index}]"), schema)));
    }
    all
}

fn usable(schema: &Value, path: &str) -> Result<(), Refusal> {
    for (word, value) in schema.as_object().into_iter().flatten() {
        if !KEYWORDS.contains(&word.as_str()) {
            return Err(cannot(&format!("the schema's word {path}.{word}")));
        }
        if word == "pattern" {
            let pattern = value.as_str().unwrap_or_default();
            if let Err(error) = regex::Regex::new(pattern) {
                return Err(invalid(&format!("{path}.pattern: Invalid value: {error}")));
            }
        }
    }
    for (name, schema) in below(schema) {
        usable(schema, &format!("{path}.{name}"))?;
    }
    Ok(())
}

fn keeps_all(schema: &Value) -> bool {
    schema["x-kubernetes-preserve-unknown-fields"] == true
}

fn join(path: &str, name: &str) -> String {
    if path.is_empty() { name.to_owned() } else { format!("{path}.{name}") }
}

fn prune(schema: &Value, value: &mut Value, path: &str, unknown: &mut Vec<String>) {
    match value {
        Value::Object(fields) => {
            let names: Vec<String> = fields.keys().cloned().collect();
            for name in names {
                let own = join(path, &name);
                let property = match (&schema["properties"][&name], &schema["additionalProperties"])
                {
                    (property @ Value::Object(_), _) | (_, property @ Value::Object(_)) => property,
                    (_, Value::Bool(true)) => continue,
                    _ if keeps_all(schema) => continue,
                    _ => {
                        fields.remove(&name);
                        unknown.push(own);
                        continue;
                    }
                };
                if let Some(field) = fields.get_mut(&name) {
                    prune(property, field, &own, unknown);
                }
            }
        }
        Value::Array(items) => {
            for (index, item) in items.iter_mut().enumerate() {
                prune(&schema["items"], item, &format!("{path}[{index}]"), unknown);
            }
        }
        _ => {}
    }
}

fn default(schema: &Value, value: &mut Value) {
    match value {
        Value::Object(fields) => {
            for (name, property) in schema["properties"].as_object().into_iter().flatten() {
                let is_nothing = match fields.get(name) {
                    None => true,
                    // A null that may not be one counts as not given.
                    Some(Value::Null) => property["nullable"] != true,
                    Some(_) => false,
                };
                if is_nothing && let Some(given) = property.get("default") {
                    fields.insert(name.clone(), given.clone());
                }
                if let Some(field) = fields.get_mut(name) {
                    default(property, field);
                }
            }
            let known = schema["properties"].as_object().cloned().unwrap_or_default();
            if schema["additionalProperties"].is_object() {
                let others = fields.iter_mut().filter(|(name, _)| !known.contains_key(*name));
                others.for_each(|(_, field)| default(&schema["additionalProperties"], field));
            }
        }
        Value::Array(items) => items.iter_mut().for_each(|item| default(&schema["items"], item)),
        _ => {}
    }
}

/// The server's own answer about an object with faults.
pub(super) fn refusal(kind: &str, group: &str, name: &str, faults: &[String]) -> Refusal {
    let said = match faults {
        [one] => one.clone(),
        many => format!("[{}]", many.join(", ")),
    };
    let mut refusal = invalid(&format!("{kind}.{group} {name:?} is invalid: {said}"));
    let causes: Vec<Value> = faults
        .iter()
        .map(|fault| match fault.split_once(": ") {
            Some((field, message)) => {
                json!({"reason": "FieldValueInvalid", "field": field, "message": message})
            }
            None => json!({"reason": "FieldValueInvalid", "message": fault}),
        })
        .collect();
    let mut details = Map::new();
    details.insert("name".into(), name.into());
    details.insert("group".into(), group.into());
    details.insert("kind".into(), kind.into());
    details.insert("causes".into(), causes.into());
    refusal.details = Some(Value::Object(details));
    refusal
}

#[cfg(test)]
mod tests;
