//! What the replicas of an authority share, as one document: its roots and how far their
//! rotation has come. Pure: every step is a function from one document to the next, and the
//! store takes the next one only in place of the one that it was made from.

use std::{collections::BTreeSet, fmt, time::Duration};

use aws_lc_rs::digest::{SHA256, digest};
use jiff::Timestamp;
use rustls::pki_types::CertificateDer;
use serde::{Deserialize, Serialize};

use crate::{
    ca::{
        CaError, Root,
        jwt_keys::{self, JwtKeysError, StoredKey},
    },
    spiffe::{JwtBundle, JwtSigner, TrustDomain, bundle::digest_of},
};

/// The document's version that this code writes.
const VERSION: u32 = 1;
/// The longest document that is read, in bytes: what a Secret can hold.
pub const MAX_LEN: usize = 1024 * 1024;

/// The shared document. It holds keys: neither `Debug` nor any error prints it.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct State {
    version: u32,
    trust_domain: String,
    /// Grows with every change of the bundle.
    sequence: u64,
    /// Every root of the bundle; none when a provided authority is used.
    #[serde(default)]
    roots: Vec<StoredRoot>,
    /// The root that signs.
    #[serde(default)]
    signing: Fingerprint,
    #[serde(default)]
    rotation: Option<Rotation>,
    /// Keys of JWT-SVIDs.
    #[serde(default)]
    jwt_keys: Vec<StoredKey>,
}

/// SHA-256 of a certificate's DER, in hex; empty: none.
type Fingerprint = String;

#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct StoredRoot {
    fingerprint: Fingerprint,
    /// Certificate and key.
    pem: String,
}

/// How far a rotation of the root has come.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Rotation {
    /// The root that goes.
    pub from: String,
    /// The root that comes.
    pub to: String,
    /// What is waited for.
    pub phase: Phase,
    /// Since when.
    pub since: Timestamp,
    /// Nodes that are not waited for.
    #[serde(default)]
    pub excluded: BTreeSet<String>,
    /// Nodes that have reported the bundle with the new root.
    #[serde(default)]
    pub reported: BTreeSet<String>,
}

/// What a rotation waits for.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Phase {
    /// Both roots are in the bundle, the old one signs: every agent must have the new one.
    Published,
    /// The new root signs: what the old one has signed must run out.
    Signing,
}

impl From<JwtKeysError> for StateError {
    fn from(error: JwtKeysError) -> Self {
        Self::Malformed(error.0)
    }
}

impl Phase {
    /// Its name in metrics, as in the document.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Published => "published",
            Self::Signing => "signing",
        }
    }
}

/// How long the steps of a rotation take at least.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Pace {
    /// How often agents ask for the bundle.
    pub refresh_hint: Duration,
    /// The longest that anything signed by a root is valid.
    pub longest_ttl: Duration,
}

/// Why a document cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StateError {
    /// It is no such document.
    #[error(
        "is not this authority's document ({0}); restore it, or remove it and a new root is made (every SVID of the old one is then refused)"
    )]
    Malformed(String),
    /// A newer version wrote it.
    #[error(
        "was written by a newer version (format {0}, this one reads {VERSION}); run that version"
    )]
    Newer(u32),
    /// It belongs to another trust domain.
    #[error(
        "belongs to trust domain {found}, this authority to {expected}; set trustDomain to {found} or use another store"
    )]
    ForeignTrustDomain {
        /// Ours.
        expected: TrustDomain,
        /// Its.
        found: String,
    },
    /// A root in it is no good.
    #[error("holds a root that cannot be used: {0}")]
    Root(#[from] CaError),
    /// A rotation cannot begin.
    #[error("{0}")]
    Rotation(&'static str),
}

impl State {
    /// A new authority with a new root.
    pub fn create(domain: &TrustDomain, now: Timestamp) -> Result<Self, StateError> {
        let root = StoredRoot::create(domain, now)?;
        Ok(Self {
            signing: root.fingerprint.clone(),
            roots: vec![root],
            ..Self::without_root(domain, now)?
        })
    }

    /// A new authority whose root is provided.
    pub fn without_root(domain: &TrustDomain, now: Timestamp) -> Result<Self, StateError> {
        Ok(Self {
            version: VERSION,
            trust_domain: domain.as_str().into(),
            sequence: 1,
            roots: Vec::new(),
            signing: Fingerprint::new(),
            rotation: None,
            jwt_keys: vec![StoredKey::create(now)?],
        })
    }

    /// Reads a document and tries every root in it.
    pub fn read(document: &[u8], domain: &TrustDomain, now: Timestamp) -> Result<Self, StateError> {
        #[derive(Deserialize)]
        struct Head {
            version: u32,
        }
        let malformed = |why: String| StateError::Malformed(why);
        if document.len() > MAX_LEN {
            return Err(malformed(format!("{} bytes are too many", document.len())));
        }
        // The parser's message could quote a key: only its place is told.
        let place = |e: serde_json::Error| {
            malformed(format!("line {} column {} is not understood", e.line(), e.column()))
        };
        let head: Head = serde_json::from_slice(document).map_err(place)?;
        if head.version > VERSION {
            return Err(StateError::Newer(head.version));
        }
        let state: Self = serde_json::from_slice(document).map_err(place)?;
        if state.trust_domain != domain.as_str() {
            let found = state.trust_domain.clone();
            return Err(StateError::ForeignTrustDomain { expected: domain.clone(), found });
        }
        for root in &state.roots {
            // A root that ran out verifies nothing and harms nothing, unless it should sign.
            match Root::from_pem(root.pem.as_bytes(), domain, now) {
                Err(CaError::Expired { .. }) if root.fingerprint != state.signing => {}
                Err(error) => return Err(error.into()),
                Ok(parsed) if root.fingerprint == fingerprint(parsed.certificate()) => {}
                Ok(_) => return Err(malformed("a root and its fingerprint differ".into())),
            }
        }
        let has = |print: &str| state.roots.iter().any(|root| root.fingerprint == *print);
        if !state.roots.is_empty() && !has(&state.signing) {
            return Err(malformed("the signing root is not among the roots".into()));
        }
        if let Some(rotation) = &state.rotation
            && !(has(&rotation.from) && has(&rotation.to))
        {
            return Err(malformed("the rotation's roots are not among the roots".into()));
        }
        jwt_keys::bundle(&state.jwt_keys)?;
        Ok(state)
    }

    /// The document.
    pub fn write(&self) -> Vec<u8> {
        // Only maps with keys that are no text could fail.
        serde_json::to_vec_pretty(self).unwrap_or_default()
    }

    /// True when it has roots of its own.
    pub fn has_roots(&self) -> bool {
        !self.roots.is_empty()
    }

    /// Grows with every change of the bundle.
    pub fn sequence(&self) -> u64 {
        self.sequence
    }

    /// The root that signs.
    pub fn signing_root(&self, domain: &TrustDomain, now: Timestamp) -> Result<Root, StateError> {
        let root = self.roots.iter().find(|root| root.fingerprint == self.signing);
        let root = root.ok_or_else(|| StateError::Malformed("there is no signing root".into()))?;
        Ok(Root::from_pem(root.pem.as_bytes(), domain, now)?)
    }

    /// Tells the root that signs.
    pub fn signing(&self) -> &str {
        &self.signing
    }

    /// The certificates of all roots.
    pub fn certificates(&self) -> Result<Vec<CertificateDer<'static>>, StateError> {
        self.roots.iter().map(StoredRoot::certificate).collect()
    }

    /// The keys that verify JWT-SVIDs.
    pub fn jwt_bundle(&self) -> Result<JwtBundle, StateError> {
        Ok(jwt_keys::bundle(&self.jwt_keys)?)
    }

    /// The key that signs JWT-SVIDs now.
    pub fn jwt_signer(&self, now: Timestamp) -> Result<JwtSigner, StateError> {
        Ok(jwt_keys::signer(&self.jwt_keys, now)?)
    }

    /// With the JWT keys that there should be now, when those differ.
    pub fn advance_jwt_keys(
        &self,
        refresh_hint: Duration,
        now: Timestamp,
    ) -> Result<Option<Self>, StateError> {
        let keys = jwt_keys::advance(&self.jwt_keys, refresh_hint, now)?;
        Ok(keys.map(|jwt_keys| Self { jwt_keys, sequence: self.sequence + 1, ..self.clone() }))
    }

    /// The rotation in progress.
    pub fn rotation(&self) -> Option<&Rotation> {
        self.rotation.as_ref()
    }

    /// Begins a rotation: the new root joins the bundle. One that is in progress goes on, with
    /// further nodes that are not waited for.
    pub fn begin_rotation(
        &self,
        domain: &TrustDomain,
        excluded: &BTreeSet<String>,
        now: Timestamp,
    ) -> Result<Self, StateError> {
        let mut next = self.clone();
        if let Some(rotation) = &mut next.rotation {
            rotation.excluded.extend(excluded.iter().cloned());
            return Ok(next);
        }
        if self.roots.is_empty() {
            return Err(StateError::Rotation(
                "the authority is a provided one: rotate it where it comes from and replace the files in caDir",
            ));
        }
        let root = StoredRoot::create(domain, now)?;
        next.rotation = Some(Rotation {
            from: self.signing.clone(),
            to: root.fingerprint.clone(),
            phase: Phase::Published,
            since: now,
            excluded: excluded.clone(),
            reported: BTreeSet::new(),
        });
        next.roots.push(root);
        next.sequence += 1;
        Ok(next)
    }

    /// Notes nodes that have reported the bundle with this digest; `None`: nothing new.
    pub fn note_reports<'a>(
        &self,
        reports: impl IntoIterator<Item = (&'a String, &'a [u8; 32])>,
    ) -> Option<Self> {
        let rotation = self.rotation.as_ref().filter(|r| r.phase == Phase::Published)?;
        let wanted = digest_of(&self.certificates().ok()?);
        let new: Vec<&String> = reports
            .into_iter()
            .filter(|(node, digest)| **digest == wanted && !rotation.reported.contains(*node))
            .map(|(node, _)| node)
            .collect();
        if new.is_empty() {
            return None;
        }
        let mut next = self.clone();
        if let Some(rotation) = &mut next.rotation {
            rotation.reported.extend(new.into_iter().cloned());
        }
        Some(next)
    }

    /// The next step of the rotation, when it is due; `nodes` are those that must have the
    /// new bundle before the new root signs.
    pub fn advance(&self, nodes: &BTreeSet<String>, pace: Pace, now: Timestamp) -> Option<Self> {
        let rotation = self.rotation.as_ref()?;
        let passed = now.duration_since(rotation.since).try_into().unwrap_or(Duration::ZERO);
        let mut next = self.clone();
        match rotation.phase {
            Phase::Published => {
                if passed < pace.refresh_hint * 2 || !rotation.laggards(nodes).is_empty() {
                    return None;
                }
                next.signing = rotation.to.clone();
                next.rotation =
                    Some(Rotation { phase: Phase::Signing, since: now, ..rotation.clone() });
            }
            Phase::Signing => {
                // Another replica may have signed with the old root until it read the document.
                if passed < pace.longest_ttl + pace.refresh_hint * 2 {
                    return None;
                }
                next.roots.retain(|root| root.fingerprint != rotation.from);
                next.sequence += 1;
                next.rotation = None;
            }
        }
        Some(next)
    }
}

impl Rotation {
    /// Those of `nodes` that have not reported the new bundle and are not excluded.
    pub fn laggards(&self, nodes: &BTreeSet<String>) -> Vec<String> {
        let waits =
            |node: &&String| !self.reported.contains(*node) && !self.excluded.contains(*node);
        nodes.iter().filter(waits).cloned().collect()
    }
}

impl StoredRoot {
    fn create(domain: &TrustDomain, now: Timestamp) -> Result<Self, CaError> {
        let root = Root::create(domain, now)?;
        Ok(Self { fingerprint: fingerprint(root.certificate()), pem: root.to_pem() })
    }

    fn certificate(&self) -> Result<CertificateDer<'static>, StateError> {
        use rustls::pki_types::pem::PemObject;
        CertificateDer::from_pem_slice(self.pem.as_bytes())
            .map_err(|e| StateError::Malformed(format!("a root is not PEM: {e}")))
    }
}

impl fmt::Debug for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("State")
            .field("sequence", &self.sequence)
            .field("roots", &self.roots.iter().map(|r| &r.fingerprint).collect::<Vec<_>>())
            .field("signing", &self.signing)
            .field("rotation", &self.rotation)
            .finish_non_exhaustive()
    }
}

fn fingerprint(certificate: &CertificateDer<'_>) -> Fingerprint {
    digest(&SHA256, certificate).as_ref().iter().map(|b| format!("{b:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use jiff::SignedDuration;

    use super::*;

    const PACE: Pace =
        Pace { refresh_hint: Duration::from_secs(10), longest_ttl: Duration::from_secs(100) };

    fn td() -> TrustDomain {
        TrustDomain::parse("td").unwrap()
    }

    fn now() -> Timestamp {
        Timestamp::from_second(1_800_000_000).unwrap()
    }

    fn after(seconds: i64) -> Timestamp {
        now() + SignedDuration::from_secs(seconds)
    }

    fn nodes(names: &[&str]) -> BTreeSet<String> {
        names.iter().map(|n| (*n).to_owned()).collect()
    }

    /// As another replica, or the same after a restart, would go on.
    fn reread(state: &State) -> State {
        let again = State::read(&state.write(), &td(), now()).unwrap();
        assert_eq!(again, *state);
        again
    }

    #[test]
    fn a_rotation_goes_step_by_step_and_each_survives_a_restart() {
        let first = reread(&State::create(&td(), now()).unwrap());
        assert_eq!(first.certificates().unwrap().len(), 1);
        assert_eq!(first.advance(&nodes(&[]), PACE, after(9999)), None);
        let old = first.signing().to_owned();

        let published = reread(&first.begin_rotation(&td(), &nodes(&["gone"]), now()).unwrap());
        assert_eq!(published.certificates().unwrap().len(), 2);
        assert_eq!((published.signing(), published.sequence()), (&*old, 2));
        let all = nodes(&["a", "b", "gone"]);
        // Time alone is not enough, nor are the reports alone.
        assert_eq!(published.advance(&all, PACE, after(9999)), None);
        assert_eq!(published.rotation().unwrap().laggards(&all), ["a", "b"]);
        let digest = digest_of(&published.certificates().unwrap());
        let other = digest_of(&first.certificates().unwrap());
        let (a, b) = ("a".to_owned(), "b".to_owned());
        let one = published.note_reports([(&a, &digest), (&b, &other)]).unwrap();
        assert_eq!(one.rotation().unwrap().laggards(&all), ["b"]);
        assert_eq!(one.note_reports([(&a, &digest)]), None, "nothing new");
        let reported = reread(&one.note_reports([(&b, &digest)]).unwrap());
        assert_eq!(reported.advance(&all, PACE, after(19)), None);
        assert_eq!(reported.advance(&all, PACE, after(-50)), None, "a clock that went back");

        let signing = reread(&reported.advance(&all, PACE, after(20)).unwrap());
        assert_ne!(signing.signing(), old);
        assert_eq!(signing.certificates().unwrap().len(), 2);
        assert_eq!(signing.advance(&all, PACE, after(20 + 119)), None);
        let done = reread(&signing.advance(&all, PACE, after(20 + 120)).unwrap());
        assert_eq!(done.certificates().unwrap().len(), 1);
        assert_eq!((done.rotation(), done.sequence()), (None, 3));
        assert_eq!(done.signing(), signing.signing());
        done.signing_root(&td(), now()).unwrap();
    }

    #[test]
    fn a_rotation_in_progress_takes_further_exclusions() {
        let first = State::create(&td(), now()).unwrap();
        let one = first.begin_rotation(&td(), &nodes(&["a"]), now()).unwrap();
        let two = one.begin_rotation(&td(), &nodes(&["b"]), after(5)).unwrap();
        assert_eq!(two.certificates().unwrap(), one.certificates().unwrap(), "no third root");
        assert_eq!(two.rotation().unwrap().excluded, nodes(&["a", "b"]));
        assert_eq!(two.rotation().unwrap().since, now());
        let provided = State::without_root(&td(), now()).unwrap();
        let error = provided.begin_rotation(&td(), &nodes(&[]), now()).unwrap_err();
        assert!(error.to_string().contains("caDir"), "{error}");
    }

    #[test]
    fn documents_that_are_refused() {
        let good = State::create(&td(), now()).unwrap();
        let text = String::from_utf8(good.write()).unwrap();
        let read = |text: &str| State::read(text.as_bytes(), &td(), now());
        assert!(read(&text).is_ok());
        assert!(matches!(read("{}"), Err(StateError::Malformed(_))));
        assert!(matches!(
            read(&text.replace("\"version\": 1", "\"version\": 2")),
            Err(StateError::Newer(2))
        ));
        assert!(matches!(
            read(&text.replace("\"td\"", "\"other\"")),
            Err(StateError::ForeignTrustDomain { .. })
        ));
        let other = State::create(&td(), now()).unwrap();
        let mixed = text.replace(good.signing(), other.signing());
        assert!(matches!(read(&mixed), Err(StateError::Malformed(_))));
        let broken = text.replace("BEGIN PRIVATE KEY", "BEGIN NONSENSE");
        let error = read(&broken).unwrap_err().to_string();
        assert!(!error.contains("MII") && !error.contains("MIG"), "{error}");
        let debug = format!("{good:?}");
        assert!(!debug.contains("PRIVATE"), "{debug}");
        let late = now() + SignedDuration::from_hours(11 * 365 * 24);
        assert!(matches!(
            State::read(text.as_bytes(), &td(), late),
            Err(StateError::Root(CaError::Expired { .. }))
        ));
    }

    #[test]
    fn a_digest_tells_bundles_and_not_their_order() {
        let a = State::create(&td(), now()).unwrap().certificates().unwrap().remove(0);
        let b = State::create(&td(), now()).unwrap().certificates().unwrap().remove(0);
        assert_eq!(digest_of([&a, &b]), digest_of([&b, &a, &b]));
        assert_ne!(digest_of([&a, &b]), digest_of([&a]));
        assert_ne!(digest_of([&a]), digest_of([&b]));
    }
}
