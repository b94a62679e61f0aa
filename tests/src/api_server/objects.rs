//! The objects with their versions, and the changes that watches tell of.

use std::collections::{BTreeMap, VecDeque};

use serde_json::{Map, Value, json};

use super::{
    Refusal,
    admission::Gate,
    kinds::{KINDS, Kind},
    select::Selection,
};

/// Changes that are remembered; who asks for older ones is told 410.
const HISTORY: usize = 1000;
/// The most bytes of an object.
const MAX_OBJECT: usize = 1_500_000;
/// The most bytes of a Secret's or ConfigMap's data.
const MAX_DATA: usize = 1024 * 1024;

/// All objects.
#[derive(Default)]
pub(super) struct Objects {
    revision: u64,
    all: BTreeMap<Key, Value>,
    changes: VecDeque<Change>,
    /// What each field manager applied last, by object.
    applied: BTreeMap<(Key, String), Value>,
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
    plural: String,
    namespace: String,
    /// The object before; `None`: there was none.
    before: Option<Value>,
    /// The object after; `None`: it was deleted.
    after: Option<Value>,
}

impl Change {
    /// The event for a watch with this selection: an object that begins to fit is new to it, one
    /// that fits no more is gone.
    pub(super) fn event(&self, selection: &Selection) -> Option<Value> {
        let fits = |object: &&Value| selection.fits(&self.plural, &self.namespace, object);
        let (before, after) = (self.before.as_ref().filter(fits), self.after.as_ref().filter(fits));
        let (kind, mut object) = match (before, after) {
            (None, None) => return None,
            (None, Some(after)) => ("ADDED", after.clone()),
            (Some(_), Some(after)) => ("MODIFIED", after.clone()),
            (Some(before), None) => ("DELETED", before.clone()),
        };
        object["metadata"]["resourceVersion"] = self.revision.to_string().into();
        Some(json!({"type": kind, "object": object}))
    }
}

/// A page of a list.
pub(super) struct Page {
    pub(super) items: Vec<Value>,
    pub(super) revision: u64,
    /// The token to go on with.
    pub(super) more: Option<String>,
}

impl Objects {
    pub(super) fn revision(&self) -> u64 {
        self.revision
    }

    pub(super) fn get(&self, plural: &str, namespace: &str, name: &str) -> Result<Value, Refusal> {
        self.all.get(&key(plural, namespace, name)).cloned().ok_or_else(|| missing(plural, name))
    }

    /// All objects of a kind, in one namespace or (empty) in all.
    pub(super) fn all<'a>(
        &'a self,
        plural: &'a str,
        namespace: &'a str,
    ) -> impl Iterator<Item = &'a Value> {
        let begin = key(plural, namespace, "");
        self.all
            .range(begin..)
            .take_while(move |(k, _)| k.plural == plural)
            .filter(move |(k, _)| namespace.is_empty() || k.namespace == namespace)
            .map(|(_, object)| object)
    }

    /// A page of a list. Its revision is the first page's: what has changed since, a watch from
    /// there tells.
    pub(super) fn list(
        &self,
        selection: &Selection,
        limit: usize,
        token: Option<&str>,
    ) -> Result<Page, Refusal> {
        let bad = || Refusal::new(400, "BadRequest", "continue key is not valid");
        let token = token.map(|token| token.split_once(':').ok_or_else(bad)).transpose()?;
        let revision = match token {
            Some((revision, _)) => revision.parse().map_err(|_| bad())?,
            None => self.revision,
        };
        if self.is_forgotten(revision) {
            let message = "The provided continue parameter is too old to display a consistent \
                           list result";
            return Err(Refusal::new(410, "Expired", message));
        }
        let after = token.map(|(_, after)| after);
        let mark = |k: &Key| format!("{}/{}", k.namespace, k.name);
        let mut fitting = self
            .all
            .iter()
            .filter(|(k, object)| selection.fits(&k.plural, &k.namespace, object))
            .filter(|(k, _)| after.is_none_or(|after| mark(k).as_str() > after));
        let mut items = Vec::new();
        let mut last = None;
        for (k, object) in fitting.by_ref() {
            items.push(object.clone());
            last = Some(mark(k));
            if limit > 0 && items.len() == limit {
                break;
            }
        }
        let more = last.filter(|_| fitting.next().is_some());
        Ok(Page { items, revision, more: more.map(|mark| format!("{revision}:{mark}")) })
    }

    /// Creates an object; a uid that it brings along is not kept.
    pub(super) fn create(
        &mut self,
        kind: &Kind,
        namespace: &str,
        object: Value,
        gate: &Gate,
    ) -> Result<Value, Refusal> {
        let (name, object) = checked(kind, namespace, object)?;
        let mut object = divided(kind, None, object, false);
        let key = key(kind.plural, namespace, &name);
        if self.all.contains_key(&key) {
            let message = format!("{} {name:?} already exists", kind.plural);
            return Err(Refusal::new(409, "AlreadyExists", message));
        }
        if object.pointer("/metadata/resourceVersion").is_some() {
            return Err(Refusal::new(
                400,
                "BadRequest",
                "resourceVersion should not be set on objects to be created",
            ));
        }
        if let Some(metadata) = object["metadata"].as_object_mut() {
            metadata.remove("uid");
        }
        gate.enter(&mut object, None)?;
        Ok(self.put(key, object, None))
    }

    /// Replaces an object, or with `status` only that part of it.
    pub(super) fn replace(
        &mut self,
        kind: &Kind,
        namespace: &str,
        name: &str,
        object: Value,
        is_status: bool,
        gate: &Gate,
    ) -> Result<Value, Refusal> {
        let plural = kind.plural;
        let (own, object) = checked(kind, namespace, object)?;
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
        let mut object = divided(kind, Some(&present), object, is_status);
        gate.enter(&mut object, Some(&present))?;
        Ok(self.put(key, object, Some(present)))
    }

    /// Server-side apply: what this manager applied before and applies no more goes, what others
    /// wrote stays. Two managers that want different values of a field conflict unless forced.
    /// Lists are atomic.
    pub(super) fn apply_by(
        &mut self,
        kind: &Kind,
        namespace: &str,
        name: &str,
        object: Value,
        (manager, force): (&str, bool),
        gate: &Gate,
    ) -> Result<Value, Refusal> {
        let (own, object) = checked(kind, namespace, object)?;
        if own != name {
            let message = format!("the name of the object ({own}) is not the URL's ({name})");
            return Err(Refusal::new(400, "BadRequest", message));
        }
        let key = key(kind.plural, namespace, name);
        let present = self.all.get(&key).cloned();
        for ((of, other), theirs) in &self.applied {
            if *of == key
                && other != manager
                && !force
                && let Some(field) = conflict(theirs, &object, String::new())
            {
                let message =
                    format!("Apply failed with 1 conflict: conflict with {other:?}: {field}");
                let mut refusal = Refusal::new(409, "Conflict", message);
                refusal.details = Some(json!({"causes": [{
                    "reason": "FieldManagerConflict", "field": field,
                    "message": format!("conflict with {other:?}"),
                }]}));
                return Err(refusal);
            }
        }
        let mut merged = present.clone().unwrap_or_else(|| json!({}));
        if let Some(before) = self.applied.get(&(key.clone(), manager.to_owned())) {
            take_away(&mut merged, before, &object);
        }
        merge(&mut merged, &object);
        let mut merged = divided(kind, present.as_ref(), merged, false);
        gate.enter(&mut merged, present.as_ref())?;
        if force {
            for ((of, other), theirs) in &mut self.applied {
                if *of == key && other != manager {
                    take_away(theirs, &object, &json!({}));
                }
            }
        }
        self.applied.insert((key.clone(), manager.to_owned()), object);
        Ok(self.put(key, merged, present))
    }

    /// A JSON merge patch (RFC 7386).
    pub(super) fn merge_patch(
        &mut self,
        kind: &Kind,
        namespace: &str,
        name: &str,
        patch: &Value,
        is_status: bool,
        gate: &Gate,
    ) -> Result<Value, Refusal> {
        let key = key(kind.plural, namespace, name);
        let present = self.all.get(&key).cloned().ok_or_else(|| missing(kind.plural, name))?;
        let mut object = present.clone();
        merge_patch(&mut object, patch);
        let (_, object) = checked(kind, namespace, object)?;
        let mut object = divided(kind, Some(&present), object, is_status);
        gate.enter(&mut object, Some(&present))?;
        Ok(self.put(key, object, Some(present)))
    }

    /// Creates or replaces, whatever the version; with another uid it is another object.
    pub(super) fn apply(&mut self, mut object: Value) -> Result<Value, Refusal> {
        let kind = object["kind"].as_str().unwrap_or_default().to_owned();
        let Some(kind) = KINDS.iter().find(|k| k.kind == kind) else {
            return Err(Refusal::new(400, "BadRequest", format!("kind {kind:?} is not known")));
        };
        let namespace =
            object.pointer("/metadata/namespace").and_then(Value::as_str).unwrap_or("").to_owned();
        if let Some(metadata) = object.pointer_mut("/metadata").and_then(Value::as_object_mut) {
            metadata.remove("resourceVersion");
        }
        let (name, object) = checked(kind, &namespace, object)?;
        let uid = object["metadata"]["uid"].as_str();
        let present = self.all.get(&key(kind.plural, &namespace, &name));
        if present.is_some_and(|p| uid.is_some() && p["metadata"]["uid"].as_str() != uid) {
            self.delete(kind.plural, &namespace, &name)?;
        }
        let key = key(kind.plural, &namespace, &name);
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
        self.applied.retain(|(of, _), _| *of != key);
        self.note(&key, Some(object.clone()), None);
        object["metadata"]["resourceVersion"] = self.revision.to_string().into();
        Ok(object)
    }

    /// Deletes every object of a kind.
    pub(super) fn delete_all(&mut self, plural: &str) {
        let keys: Vec<Key> = self.all.keys().filter(|key| key.plural == plural).cloned().collect();
        for key in keys {
            let object = self.all.remove(&key);
            self.note(&key, object, None);
        }
    }

    /// Deletes everything in a namespace.
    pub(super) fn delete_namespace(&mut self, namespace: &str) {
        let is_in = |key: &&Key| key.namespace == namespace;
        let keys: Vec<Key> = self.all.keys().filter(is_in).cloned().collect();
        for key in keys {
            let object = self.all.remove(&key);
            self.applied.retain(|(of, _), _| *of != key);
            self.note(&key, object, None);
        }
    }

    /// Changes after a revision; `None`: some of them are forgotten, or it is none of ours.
    pub(super) fn since(&self, revision: u64) -> Option<Vec<Change>> {
        if self.is_forgotten(revision) || revision > self.revision {
            return None;
        }
        Some(self.changes.iter().filter(|c| c.revision > revision).cloned().collect())
    }

    /// Forgets all changes: whoever does not know the present state must list.
    pub(super) fn forget(&mut self) {
        self.changes.clear();
        // Also of those that have seen everything: their version is older than what is kept.
        self.revision += 1;
    }

    fn is_forgotten(&self, revision: u64) -> bool {
        let oldest = self.changes.front().map_or(self.revision + 1, |change| change.revision);
        revision + 1 < oldest
    }

    fn put(&mut self, key: Key, mut object: Value, present: Option<Value>) -> Value {
        let inherited = |field: &str| present.as_ref().map(|p| p["metadata"][field].clone());
        let metadata = &mut object["metadata"];
        let given = metadata["uid"].as_str().filter(|uid| !uid.is_empty()).map(Value::from);
        metadata["uid"] =
            inherited("uid").or(given).unwrap_or_else(|| uuid::Uuid::new_v4().to_string().into());
        metadata["creationTimestamp"] = inherited("creationTimestamp")
            .unwrap_or_else(|| format!("{:.0}", jiff::Timestamp::now()).into());
        if let Some(generation) = generation(&key.plural, &object, present.as_ref()) {
            object["metadata"]["generation"] = generation.into();
        }
        let metadata = &mut object["metadata"];
        if let Some(present) = &present {
            metadata["resourceVersion"] = present["metadata"]["resourceVersion"].clone();
            // A write that changes nothing makes no new version.
            if object == *present {
                return object;
            }
        }
        object["metadata"]["resourceVersion"] = (self.revision + 1).to_string().into();
        self.all.insert(key.clone(), object.clone());
        self.note(&key, present, Some(object.clone()));
        object
    }

    fn note(&mut self, key: &Key, before: Option<Value>, after: Option<Value>) {
        self.revision += 1;
        self.changes.push_back(Change {
            revision: self.revision,
            plural: key.plural.clone(),
            namespace: key.namespace.clone(),
            before,
            after,
        });
        if self.changes.len() > HISTORY {
            self.changes.pop_front();
        }
    }
}

fn key(plural: &str, namespace: &str, name: &str) -> Key {
    Key { plural: plural.into(), namespace: namespace.into(), name: name.into() }
}

/// Grows with every change of what is wanted of an object that has a status.
fn generation(plural: &str, object: &Value, present: Option<&Value>) -> Option<u64> {
    let kind = KINDS.iter().find(|kind| kind.plural == plural)?;
    if !kind.has_status || matches!(plural, "pods" | "namespaces" | "nodes" | "services") {
        return None;
    }
    let wanted = |object: &Value| {
        let mut object = object.clone();
        if let Some(fields) = object.as_object_mut() {
            fields.retain(|name, _| name != "metadata" && name != "status");
        }
        object
    };
    let before = present
        .map(|present| (present["metadata"]["generation"].as_u64().unwrap_or(0), wanted(present)));
    Some(match before {
        Some((number, before)) if before == wanted(object) && number > 0 => number,
        Some((number, _)) => number + 1,
        None => 1,
    })
}

fn missing(plural: &str, name: &str) -> Refusal {
    Refusal::new(404, "NotFound", format!("{plural} {name:?} not found"))
}

/// Only the status is written through the subresource, and all else only beside it.
fn divided(kind: &Kind, present: Option<&Value>, object: Value, is_status: bool) -> Value {
    if !kind.has_status {
        return object;
    }
    let (mut whole, other) = match (present, is_status) {
        (Some(present), true) => (present.clone(), object),
        (Some(present), false) => (object, present.clone()),
        (None, _) => (object, json!({})),
    };
    match other.get("status") {
        Some(status) => whole["status"] = status.clone(),
        None => drop(whole.as_object_mut().and_then(|whole| whole.remove("status"))),
    }
    whole
}

/// Metadata that no manager owns.
const OWNERLESS: [&str; 3] = ["apiVersion", "kind", "metadata"];

/// The first field that both have with different values.
fn conflict(theirs: &Value, ours: &Value, path: String) -> Option<String> {
    match (theirs, ours) {
        (Value::Object(theirs), Value::Object(ours)) => ours.iter().find_map(|(name, value)| {
            if path.is_empty() && OWNERLESS.contains(&name.as_str()) {
                return None;
            }
            conflict(theirs.get(name)?, value, format!("{path}.{name}"))
        }),
        _ => (theirs != ours).then_some(path),
    }
}

/// Removes what `before` has and `now` has not.
fn take_away(object: &mut Value, before: &Value, now: &Value) {
    let (Value::Object(fields), Value::Object(before)) = (object, before) else { return };
    for (name, old) in before {
        match (fields.get_mut(name), now.get(name)) {
            (Some(field), Some(new)) if old.is_object() => take_away(field, old, new),
            (Some(_), None) if !OWNERLESS.contains(&name.as_str()) => drop(fields.remove(name)),
            _ => {}
        }
    }
}

fn merge(object: &mut Value, applied: &Value) {
    match (object, applied) {
        (Value::Object(object), Value::Object(applied)) => {
            for (name, value) in applied {
                merge(object.entry(name.as_str()).or_insert(Value::Null), value);
            }
        }
        (object, applied) => *object = applied.clone(),
    }
}

fn merge_patch(object: &mut Value, patch: &Value) {
    let Value::Object(patch) = patch else {
        *object = patch.clone();
        return;
    };
    if !object.is_object() {
        *object = json!({});
    }
    let Value::Object(object) = object else { return };
    for (name, value) in patch {
        match value {
            Value::Null => drop(object.remove(name)),
            value => merge_patch(object.entry(name.as_str()).or_insert(Value::Null), value),
        }
    }
}

/// The object's name, and the object with its kind, namespace and metadata in place.
fn checked(kind: &Kind, namespace: &str, object: Value) -> Result<(String, Value), Refusal> {
    let plural = kind.plural;
    let bad = |message: String| Refusal::new(400, "BadRequest", message);
    if kind.is_namespaced == namespace.is_empty() {
        return Err(bad(format!(
            "{plural}: a namespace is {}",
            if kind.is_namespaced { "needed" } else { "wrong" }
        )));
    }
    let Value::Object(mut object) = object else {
        return Err(bad("the object is not one".into()));
    };
    if object.get("kind").is_some_and(|k| k != kind.kind) {
        return Err(bad(format!("kind {} is not {}", object["kind"], kind.kind)));
    }
    object.insert("kind".into(), kind.kind.into());
    object.insert("apiVersion".into(), kind.api_version().into());
    let metadata = object.entry("metadata").or_insert_with(|| json!({}));
    let metadata = metadata.as_object_mut().ok_or_else(|| bad("metadata".into()))?;
    if metadata.get("namespace").is_some_and(|n| n != namespace) {
        return Err(bad("the namespace of the object is not the URL's".into()));
    }
    if kind.is_namespaced {
        metadata.insert("namespace".into(), namespace.into());
    }
    let name = metadata.get("name").and_then(Value::as_str).unwrap_or_default().to_owned();
    // Roles may be named as they like, as far as paths go.
    let is_free = kind.group == "rbac.authorization.k8s.io";
    let label = |c: u8| {
        c.is_ascii_lowercase()
            || c.is_ascii_digit()
            || b"-.".contains(&c)
            || (is_free && c != b'/' && c != b'%')
    };
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
