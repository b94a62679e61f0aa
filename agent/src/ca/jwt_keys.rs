//! The keys of JWT-SVIDs, shared by replicas: each is in the bundle before it signs first, and
//! stays until the last token that it signed has run out. Pure.

use std::time::Duration;

use base64::{Engine as _, prelude::BASE64_STANDARD};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::spiffe::{JwtBundle, JwtSigner};

/// How long a key signs before the next one takes over.
pub const LIFETIME: Duration = Duration::from_secs(24 * 3600);
/// The longest that a token is valid.
pub const LONGEST_TOKEN: Duration = Duration::from_secs(3600);
/// The most keys that a document may have.
const MAX_KEYS: usize = 16;

/// Why the keys cannot be used. It quotes none of them.
#[derive(Debug, thiserror::Error, Clone, PartialEq, Eq)]
#[error("{0}")]
pub struct JwtKeysError(pub String);

/// A key in a document. It is secret: `Debug` does not print it.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct StoredKey {
    kid: String,
    /// PKCS #8, base64.
    pkcs8: String,
    /// From when on it signs; it is in the bundle as soon as it is in the document.
    signs_from: Timestamp,
}

impl StoredKey {
    /// A new key.
    pub fn create(signs_from: Timestamp) -> Result<Self, JwtKeysError> {
        let signer = JwtSigner::generate().map_err(jwt)?;
        let pkcs8 = BASE64_STANDARD.encode(signer.to_pkcs8().map_err(jwt)?);
        Ok(Self { kid: signer.kid().into(), pkcs8, signs_from })
    }

    fn signer(&self) -> Result<JwtSigner, JwtKeysError> {
        let wrong = |_| JwtKeysError("a JWT key is not base64".into());
        let signer = JwtSigner::from_pkcs8(&BASE64_STANDARD.decode(&self.pkcs8).map_err(wrong)?)
            .map_err(jwt)?;
        if signer.kid() != self.kid {
            return Err(JwtKeysError("a JWT key and its kid differ".into()));
        }
        Ok(signer)
    }
}

/// Reads all keys, as a check and as the bundle.
pub fn bundle(keys: &[StoredKey]) -> Result<JwtBundle, JwtKeysError> {
    if keys.len() > MAX_KEYS {
        return Err(JwtKeysError(format!("there are {} JWT keys", keys.len())));
    }
    let mut bundle = JwtBundle::new();
    for key in keys {
        let signer = key.signer()?;
        bundle
            .insert(signer.kid(), signer.public_key().clone())
            .map_err(|e| JwtKeysError(e.to_string()))?;
    }
    Ok(bundle)
}

/// The key that signs now: of those whose time has come, the newest.
pub fn signer(keys: &[StoredKey], now: Timestamp) -> Result<JwtSigner, JwtKeysError> {
    let ready = keys.iter().filter(|key| key.signs_from <= now);
    let newest = ready.max_by_key(|key| key.signs_from);
    // A clock that went back finds none: the oldest is in every bundle.
    let key = newest.or_else(|| keys.iter().min_by_key(|key| key.signs_from));
    key.ok_or_else(|| JwtKeysError("there is no JWT key".into()))?.signer()
}

/// The keys as they should be now; `None`: as they are.
pub fn advance(
    keys: &[StoredKey],
    refresh_hint: Duration,
    now: Timestamp,
) -> Result<Option<Vec<StoredKey>>, JwtKeysError> {
    let later = |t: Timestamp, by: Duration| t.saturating_add(by).unwrap_or(Timestamp::MAX);
    let Some(newest) = keys.iter().map(|key| key.signs_from).max() else {
        // Nobody has a bundle without it.
        return Ok(Some(vec![StoredKey::create(now)?]));
    };
    let mut next = keys.to_vec();
    // Replaced so early that the next one can be everywhere when this one's life ends.
    let is_due = later(now, refresh_hint * 2) >= later(newest, LIFETIME);
    if is_due && keys.len() < MAX_KEYS {
        next.push(StoredKey::create(later(now, refresh_hint * 2).max(later(newest, LIFETIME)))?);
    }
    // A key goes when its successor has signed for as long as a token of it could live.
    let successors: Vec<Timestamp> = next.iter().map(|key| key.signs_from).collect();
    next.retain(|key| {
        let successor = successors.iter().filter(|at| **at > key.signs_from).min();
        successor.is_none_or(|at| now < later(later(*at, LONGEST_TOKEN), refresh_hint * 2))
    });
    Ok((next != keys).then_some(next))
}

fn jwt(error: impl std::fmt::Display) -> JwtKeysError {
    JwtKeysError(error.to_string())
}

impl std::fmt::Debug for StoredKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("StoredKey")
            .field("kid", &self.kid)
            .field("signs_from", &self.signs_from)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use jiff::SignedDuration;

    use super::*;

    const HINT: Duration = Duration::from_secs(300);

    fn at(seconds: u64) -> Timestamp {
        Timestamp::from_second(1_800_000_000).unwrap()
            + SignedDuration::try_from(Duration::from_secs(seconds)).unwrap()
    }

    #[test]
    fn a_key_is_published_before_it_signs_and_stays_while_its_tokens_live() {
        let kid = |keys: &[StoredKey], now| signer(keys, now).unwrap().kid().to_owned();
        let step = |keys: &[StoredKey], now| advance(keys, HINT, now).unwrap();
        let first = step(&[], at(0)).unwrap();
        assert_eq!((first.len(), bundle(&first).unwrap().iter().len()), (1, 1));
        let one = kid(&first, at(0));
        let day = LIFETIME.as_secs();
        assert!(step(&first, at(day - 601)).is_none());

        let two_keys = step(&first, at(day - 600)).unwrap();
        assert_eq!(bundle(&two_keys).unwrap().iter().len(), 2);
        assert_eq!(kid(&two_keys, at(day - 1)), one, "published, does not sign yet");
        let two = kid(&two_keys, at(day));
        assert_ne!(two, one);
        assert!(step(&two_keys, at(day)).is_none());
        assert!(step(&two_keys, at(day + 3600 + 599)).is_none(), "its tokens may live");
        let left = step(&two_keys, at(day + 3600 + 600)).unwrap();
        assert_eq!((left.len(), kid(&left, at(day * 2 - 1))), (1, two));

        // Switched off for a week, then on: the next key still gets its two hints.
        let late = step(&left, at(day * 9)).unwrap();
        assert_eq!(kid(&late, at(day * 9)), kid(&left, at(day * 9)));
        assert_ne!(kid(&late, at(day * 9 + 600)), kid(&left, at(day * 9)));
        assert_eq!(kid(&late, at(0)), kid(&left, at(0)), "a clock that went back");
    }

    #[test]
    fn keys_that_are_damaged() {
        let mut keys = vec![StoredKey::create(at(0)).unwrap()];
        assert!(bundle(&keys).is_ok());
        keys[0].kid = "other".into();
        assert!(bundle(&keys).is_err());
        keys[0].pkcs8 = "%".into();
        assert!(bundle(&keys).is_err());
    }
}
