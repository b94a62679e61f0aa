//! The objects with their versions, and the changes that watches tell of.

use std::collections::{BTreeMap, VecDeque};

use serde_json::{Map, Value, json};

use super::Refusal;

/// Changes that are remembered; who asks for older ones is told 410.
const HISTORY: usize = 1000;
/// The most bytes of an object.
const MAX_OBJECT: usize = 1_500_000;
/// The most bytes of a Secret's or ConfigMap's data.
const MAX_DATA: usize = 1024 * 1024;

/// Plural, kind, whether it is in a namespace.
pub(super) const KINDS: &[(&str, &str, bool)] = &[
    ("pods", "Pod", true),
    ("secrets", "Secret", true),
    ("configmaps", "ConfigMap", true),
    ("serviceaccounts", "ServiceAccount", true),
    ("services", "Service", true),
    ("namespaces", "Namespace", false),
    ("nodes", "Node", false),
];

/// All objects of the core group.
#[derive(Default)]
pub(super) struct Objects {
    revision: u64,
    all: BTreeMap<Key, Value>,
    changes: VecDeque<Change>,
}

#[derive(Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Key {
    plural: String,
    namespace: String,
    name: String,
}

/// A change, as a watch tells it.
#[derive(Clone)]
pub(super) struct Change {
    pub(super) revision: u64,
    pub(super) plural: String,
    pub(super) namespace: String,
    pub(super) kind: &'static str,
    pub(super) object: Value,
}

/// What of a kind is asked for.
#[derive(Clone, Debug, Default)]
pub(super) struct Selection {
    pub(super) plural: String,
    /// Empty: all.
    pub(super) namespace: String,
    /// `field=value`, all of which must hold.
    pub(super) fields: Vec<(String, String)>,
}

impl Selection {
    pub(super) fn parse(plural: &str, namespace: &str, selector: &str) -> Result<Self, Refusal> {
        let mut fields = Vec::new();
        for term in selector.split(',').filter(|t| !t.is_empty()) {
            let bad = || Refusal::new(400, "BadRequest", format!("field selector {term:?}"));
            let (field, value) = term.split_once('=').ok_or_else(bad)?;
            if !matches!(field, "spec.nodeName" | "metadata.name" | "metadata.namespace") {
                return Err(Refusal::new(
                    400,
                    "BadRequest",
                    format!("field label not supported: {field}"),
                ));
            }
            fields.push((field.to_owned(), value.trim_start_matches('=').to_owned()));
        }
        Ok(Self { plural: plural.into(), namespace: namespace.into(), fields })
    }

    pub(super) fn fits(&self, plural: &str, namespace: &str, object: &Value) -> bool {
        let field = |path: &str| {
            let pointer = format!("/{}", path.replace('.', "/"));
            object.pointer(&pointer).and_then(Value::as_str).unwrap_or_default().to_owned()
        };
        plural == self.plural
            && (self.namespace.is_empty() || namespace == self.namespace)
            && self.fields.iter().all(|(path, value)| field(path) == *value)
    }
}

impl Objects {
    pub(super) fn revision(&self) -> u64 {
        self.revision
    }

    pub(super) fn get(&self, plural: &str, namespace: &str, name: &str) -> Result<Value, Refusal> {
        self.all.get(&key(plural, namespace, name)).cloned().ok_or_else(|| missing(plural, name))
    }

    /// A page of a list: the objects, and the name to go on after.
    pub(super) fn list(
        &self,
        selection: &Selection,
        limit: usize,
        after: Option<&str>,
    ) -> (Vec<Value>, Option<String>) {
        let mark = |k: &Key| format!("{}/{}", k.namespace, k.name);
        let mut fitting = self
            .all
            .iter()
            .filter(|(k, object)| selection.fits(&k.plural, &k.namespace, object))
            .filter(|(k, _)| after.is_none_or(|after| mark(k).as_str() > after));
        let mut page = Vec::new();
        let mut last = None;
        for (k, object) in fitting.by_ref() {
            page.push(object.clone());
            last = Some(mark(k));
            if limit > 0 && page.len() == limit {
                break;
            }
        }
        let more = fitting.next().is_some();
        (page, last.filter(|_| more))
    }

    pub(super) fn create(
        &mut self,
        plural: &str,
        namespace: &str,
        object: Value,
    ) -> Result<Value, Refusal> {
        let (name, object) = checked(plural, namespace, object)?;
        let key = key(plural, namespace, &name);
        if self.all.contains_key(&key) {
            let message = format!("{plural} {name:?} already exists");
            return Err(Refusal::new(409, "AlreadyExists", message));
        }
        if object.pointer("/metadata/resourceVersion").is_some() {
            return Err(Refusal::new(
                400,
                "BadRequest",
                "resourceVersion should not be set on objects to be created",
            ));
        }
        Ok(self.put(key, object, None))
    }

    pub(super) fn replace(
        &mut self,
        plural: &str,
        namespace: &str,
        name: &str,
        object: Value,
    ) -> Result<Value, Refusal> {
        let (own, object) = checked(plural, namespace, object)?;
        if own != name {
            let message = format!("the name of the object ({own}) is not the URL's ({name})");
            return Err(Refusal::new(400, "BadRequest", message));
        }
        let key = key(plural, namespace, name);
        let present = self.all.get(&key).cloned().ok_or_else(|| missing(plural, name))?;
        let version = |o: &Value| {
            o.pointer("/metadata/resourceVersion").and_then(Value::as_str).map(str::to_owned)
        };
        if version(&object).is_some() && version(&object) != version(&present) {
            let message = format!(
                "Operation cannot be fulfilled on {plural} {name:?}: the object has been modified; \
                 please apply your changes to the latest version and try again"
            );
            return Err(Refusal::new(409, "Conflict", message));
        }
        Ok(self.put(key, object, Some(present)))
    }

    /// Creates or replaces, whatever the version.
    pub(super) fn apply(&mut self, mut object: Value) -> Result<Value, Refusal> {
        let kind = object["kind"].as_str().unwrap_or_default().to_owned();
        let Some((plural, ..)) = KINDS.iter().find(|(_, k, _)| *k == kind) else {
            return Err(Refusal::new(400, "BadRequest", format!("kind {kind:?} is not known")));
        };
        let namespace =
            object.pointer("/metadata/namespace").and_then(Value::as_str).unwrap_or("").to_owned();
        if let Some(metadata) = object.pointer_mut("/metadata").and_then(Value::as_object_mut) {
            metadata.remove("resourceVersion");
        }
        let (name, object) = checked(plural, &namespace, object)?;
        let key = key(plural, &namespace, &name);
        let present = self.all.get(&key).cloned();
        Ok(self.put(key, object, present))
    }

    pub(super) fn delete(
        &mut self,
        plural: &str,
        namespace: &str,
        name: &str,
    ) -> Result<Value, Refusal> {
        let key = key(plural, namespace, name);
        let mut object = self.all.remove(&key).ok_or_else(|| missing(plural, name))?;
        self.revision += 1;
        object["metadata"]["resourceVersion"] = self.revision.to_string().into();
        self.note(&key, "DELETED", object.clone());
        Ok(object)
    }

    /// Changes after a revision; `None`: some of them are forgotten.
    pub(super) fn since(&self, revision: u64) -> Option<Vec<Change>> {
        let oldest = self.changes.front().map_or(self.revision + 1, |change| change.revision);
        if revision + 1 < oldest {
            return None;
        }
        Some(self.changes.iter().filter(|c| c.revision > revision).cloned().collect())
    }

    fn put(&mut self, key: Key, mut object: Value, present: Option<Value>) -> Value {
        let inherited = |field: &str| present.as_ref().map(|p| p["metadata"][field].clone());
        let metadata = &mut object["metadata"];
        metadata["uid"] =
            inherited("uid").unwrap_or_else(|| uuid::Uuid::new_v4().to_string().into());
        metadata["creationTimestamp"] = inherited("creationTimestamp")
            .unwrap_or_else(|| format!("{:.0}", jiff::Timestamp::now()).into());
        if let Some(present) = &present {
            metadata["resourceVersion"] = present["metadata"]["resourceVersion"].clone();
            // A write that changes nothing makes no new version.
            if object == *present {
                return object;
            }
        }
        self.revision += 1;
        object["metadata"]["resourceVersion"] = self.revision.to_string().into();
        self.all.insert(key.clone(), object.clone());
        self.note(&key, if present.is_some() { "MODIFIED" } else { "ADDED" }, object.clone());
        object
    }

    fn note(&mut self, key: &Key, kind: &'static str, object: Value) {
        self.changes.push_back(Change {
            revision: self.revision,
            plural: key.plural.clone(),
            namespace: key.namespace.clone(),
            kind,
            object,
        });
        if self.changes.len() > HISTORY {
            self.changes.pop_front();
        }
    }
}

fn key(plural: &str, namespace: &str, name: &str) -> Key {
    Key { plural: plural.into(), namespace: namespace.into(), name: name.into() }
}

fn missing(plural: &str, name: &str) -> Refusal {
    Refusal::new(404, "NotFound", format!("{plural} {name:?} not found"))
}

/// The object's name, and the object with its kind, namespace and metadata in place.
fn checked(plural: &str, namespace: &str, object: Value) -> Result<(String, Value), Refusal> {
    let bad = |message: String| Refusal::new(400, "BadRequest", message);
    let Some((_, kind, namespaced)) = KINDS.iter().find(|(p, ..)| *p == plural) else {
        return Err(Refusal::new(404, "NotFound", format!("there is no resource {plural}")));
    };
    if *namespaced == namespace.is_empty() {
        return Err(bad(format!(
            "{plural}: a namespace is {}",
            if *namespaced { "needed" } else { "wrong" }
        )));
    }
    let Value::Object(mut object) = object else {
        return Err(bad("the object is not one".into()));
    };
    if object.get("kind").is_some_and(|k| k != kind) {
        return Err(bad(format!("kind {} is not {kind}", object["kind"])));
    }
    object.insert("kind".into(), (*kind).into());
    object.insert("apiVersion".into(), "v1".into());
    let metadata = object.entry("metadata").or_insert_with(|| json!({}));
    let metadata = metadata.as_object_mut().ok_or_else(|| bad("metadata".into()))?;
    if metadata.get("namespace").is_some_and(|n| n != namespace) {
        return Err(bad("the namespace of the object is not the URL's".into()));
    }
    if *namespaced {
        metadata.insert("namespace".into(), namespace.into());
    }
    let name = metadata.get("name").and_then(Value::as_str).unwrap_or_default().to_owned();
    let label = |c: u8| c.is_ascii_lowercase() || c.is_ascii_digit() || b"-.".contains(&c);
    if name.is_empty() || name.len() > 253 || !name.bytes().all(label) {
        return Err(invalid(plural, &name, "metadata.name"));
    }
    if matches!(plural, "secrets" | "configmaps") {
        check_data(plural, &name, &object)?;
    }
    let object = Value::Object(object);
    if object.to_string().len() > MAX_OBJECT {
        return Err(Refusal::new(413, "RequestEntityTooLarge", "the object is too large"));
    }
    Ok((name, object))
}

fn check_data(plural: &str, name: &str, object: &Map<String, Value>) -> Result<(), Refusal> {
    let mut total = 0;
    for value in object.get("data").and_then(Value::as_object).into_iter().flat_map(Map::values) {
        let text = value.as_str().ok_or_else(|| invalid(plural, name, "data"))?;
        total += text.len();
        let base64 = |b: u8| b.is_ascii_alphanumeric() || b"+/=".contains(&b);
        if plural == "secrets" && !(text.len() % 4 == 0 && text.bytes().all(base64)) {
            return Err(Refusal::new(400, "BadRequest", "illegal base64 data"));
        }
    }
    // Base64 makes four bytes of three.
    let total = if plural == "secrets" { total / 4 * 3 } else { total };
    if total > MAX_DATA { Err(invalid(plural, name, "data: Too long")) } else { Ok(()) }
}

fn invalid(plural: &str, name: &str, what: &str) -> Refusal {
    Refusal::new(422, "Invalid", format!("{plural} {name:?} is invalid: {what}"))
}
