//! What is known of one kind.

use std::{collections::BTreeMap, sync::Arc};

use serde_json::Value;

use super::{
    kinds::{Content, Kind},
    raw::Raw,
};
use crate::{
    cluster::{
        called::CalledFacts,
        enrolment::Announcement,
        manifest::{self, Object},
        model::Problem,
        source::WatchState,
    },
    config::{
        values::Enforcement,
        yaml::{Fault, Node},
    },
    spiffe::TrustDomain,
    trust::federation::{self, Federation},
};

/// Namespace (empty where there is none) and name.
pub(super) type Place = (String, String);

/// What an object says.
#[derive(Clone, PartialEq, Debug)]
pub(super) enum Known {
    Object(Object),
    Announcement(Announcement),
    Enforcement(Enforcement),
    Federation(Arc<Federation>),
}

/// The mesh's words that reading depends on.
#[derive(Clone, Debug)]
pub(super) struct Reading {
    pub(super) trust_domain: TrustDomain,
    pub(super) root_namespace: Arc<str>,
}

/// An object's entry.
#[derive(Clone, PartialEq, Debug)]
struct Entry {
    uid: String,
    /// `metadata.generation`, of policies: 0 for others, of whose changes it would be made news.
    generation: i64,
    /// The last that could be read; `None`: nothing ever could, or there is nothing to know.
    good: Option<Known>,
    /// What is wrong with it now.
    fault: Option<Fault>,
}

/// The objects of one kind, as far as its watch has told.
#[derive(Default)]
pub(super) struct Store {
    pub(super) state: WatchState,
    entries: BTreeMap<Place, Entry>,
    /// A list that is not complete yet.
    listing: Option<BTreeMap<Place, Entry>>,
}

impl Store {
    /// A list begins; it changes nothing until it is complete.
    pub(super) fn begin(&mut self) {
        self.listing = Some(BTreeMap::new());
    }

    /// The list has this object.
    pub(super) fn listed(&mut self, kind: &Kind, version: &str, reading: &Reading, raw: Raw) {
        let (place, entry) = self.read(kind, version, reading, raw);
        if let Some(listing) = &mut self.listing {
            listing.insert(place, entry);
        }
    }

    /// The list is complete: it says what there is. Returns whether that is news.
    pub(super) fn complete(&mut self) -> bool {
        let Some(listing) = self.listing.take() else { return false };
        let news = self.state != WatchState::Listed || self.entries != listing;
        self.entries = listing;
        self.state = WatchState::Listed;
        news
    }

    /// There is no such kind: nothing of it. Returns whether that is news.
    pub(super) fn none(&mut self) -> bool {
        let news = self.state != WatchState::Absent;
        *self = Self { state: WatchState::Absent, ..Self::default() };
        news
    }

    /// An object was made or changed. Returns whether that is news.
    pub(super) fn changed(
        &mut self,
        kind: &Kind,
        version: &str,
        reading: &Reading,
        raw: Raw,
    ) -> bool {
        let (place, entry) = self.read(kind, version, reading, raw);
        let news = self.entries.get(&place) != Some(&entry);
        self.entries.insert(place, entry);
        news
    }

    /// An object is gone.
    pub(super) fn gone(&mut self, raw: &Raw) -> bool {
        self.entries.remove(&raw.place()).is_some()
    }

    /// What all objects say.
    pub(super) fn known(&self) -> impl Iterator<Item = &Known> {
        self.entries.values().filter_map(|entry| entry.good.as_ref())
    }

    /// The uid of an object.
    pub(super) fn uid(&self, namespace: &str, name: &str) -> Option<&str> {
        let entry = self.entries.get(&(namespace.to_owned(), name.to_owned()))?;
        Some(entry.uid.as_str()).filter(|uid| !uid.is_empty())
    }

    /// Namespace, name and generation of all objects.
    pub(super) fn generations(&self) -> impl Iterator<Item = (&str, &str, i64)> {
        self.entries
            .iter()
            .map(|((namespace, name), entry)| (&**namespace, &**name, entry.generation))
    }

    /// How many objects there are, and how many of them could not be read.
    pub(super) fn counts(&self) -> (usize, usize) {
        let faulty = self.entries.values().filter(|entry| entry.fault.is_some()).count();
        (self.entries.len(), faulty)
    }

    /// True when something is there that could never be read.
    pub(super) fn is_unreadable(&self) -> bool {
        self.entries.values().any(|entry| entry.fault.is_some() && entry.good.is_none())
    }

    /// What is wrong with which objects.
    pub(super) fn problems(&self, kind: &Kind) -> impl Iterator<Item = Problem> {
        let name = kind.kind;
        self.entries.iter().filter_map(move |((namespace, object), entry)| {
            let fault = entry.fault.as_ref()?;
            let slash = if namespace.is_empty() { "" } else { "/" };
            let stays = match entry.good {
                Some(_) => "what it said before stays in force",
                None => "it does not count",
            };
            Some(Problem {
                subject: format!("{name} {namespace}{slash}{object}"),
                message: format!("{fault}; {stays}"),
            })
        })
    }

    fn read(&self, kind: &Kind, version: &str, reading: &Reading, raw: Raw) -> (Place, Entry) {
        let place = raw.place();
        let uid = raw.uid().to_owned();
        let generation = if kind.has_conditions() { raw.generation() } else { 0 };
        let entry = match read(kind, version, reading, &place.1, raw.value) {
            Ok(good) => Entry { uid, generation, good, fault: None },
            Err(fault) => {
                // Another object under the same name has nothing to do with what was there.
                let before = self.entries.get(&place).filter(|entry| entry.uid == uid);
                let good = before.and_then(|entry| entry.good.clone());
                Entry { uid, generation, good, fault: Some(fault) }
            }
        };
        (place, entry)
    }
}

fn read(
    kind: &Kind,
    version: &str,
    reading: &Reading,
    name: &str,
    mut value: Value,
) -> Result<Option<Known>, Fault> {
    let api_version = match kind.group {
        "" => version.to_owned(),
        group => format!("{group}/{version}"),
    };
    // Items of a list do not say what they are.
    if let Some(object) = value.as_object_mut() {
        object.insert("apiVersion".into(), api_version.as_str().into());
        object.insert("kind".into(), kind.kind.into());
    }
    match kind.content {
        // Definitions are large: no more of them is looked at than is needed.
        Content::Called => {
            let facts = CalledFacts::read(kind.kind, name, &value);
            Ok(Some(Known::Object(Object::Called(Arc::new(facts)))))
        }
        Content::Object => {
            let node = Node::from_json(value)?;
            let object =
                manifest::read_sent(&node, &api_version, kind.kind, &reading.root_namespace)?;
            Ok(object.map(Known::Object))
        }
        Content::Announcement => {
            let node = Node::from_json(value)?;
            Announcement::of_object(name, &node).map(Known::Announcement).map(Some)
        }
        Content::Enforcement => {
            let missing =
                || Fault::new(0, "missing; write enforce, audit or off").within("data.enforcement");
            let word = value.pointer("/data/enforcement").and_then(Value::as_str);
            let word = Enforcement::parse(word.ok_or_else(missing)?);
            word.map(|word| Some(Known::Enforcement(word)))
                .map_err(|message| Fault::new(0, message).within("data.enforcement"))
        }
        Content::Federation => {
            const FIELD: &str = "data[federation.yaml]";
            let text = value.pointer("/data/federation.yaml").and_then(Value::as_str);
            let text = text.ok_or_else(|| Fault::new(0, "missing").within(FIELD))?;
            let federation = federation::read(text, &reading.trust_domain);
            federation
                .map(|federation| Some(Known::Federation(Arc::new(federation))))
                .map_err(|fault| fault.within(FIELD))
        }
    }
}

#[cfg(test)]
mod tests;
