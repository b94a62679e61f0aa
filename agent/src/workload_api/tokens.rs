//! JWT-SVIDs that are handed out again: the same identity and audiences get the same token until
//! half of its life is gone, so that a workload that asks for each of its own requests does not
//! ask the authority each time.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use jiff::Timestamp;

use crate::spiffe::{JwtBundle, SpiffeId};

/// Tokens of one identity: a workload that makes up audiences does so at its own cost.
const MOST_OF_ONE: usize = 64;
/// Tokens of all identities.
const MOST: usize = 2048;
/// A longer token is not kept, in bytes.
const LONGEST: usize = 4096;

/// The tokens of this node's workloads, by identity and audiences.
#[derive(Default)]
pub(super) struct Tokens(Mutex<HashMap<SpiffeId, HashMap<Vec<String>, Token>>>);

/// A token that may be handed out again.
pub(super) struct Token {
    /// Its compact form.
    pub(super) text: String,
    /// From then on a new one is asked for.
    pub(super) good_until: Timestamp,
    /// The keys that it was verified with.
    pub(super) keys: Arc<JwtBundle>,
}

impl Token {
    /// A token that was issued `now`, good for half of its life.
    pub(super) fn new(
        text: String,
        expires_at: Timestamp,
        keys: Arc<JwtBundle>,
        now: Timestamp,
    ) -> Self {
        let half = expires_at.duration_since(now) / 2;
        Self { text, good_until: now.saturating_add(half).unwrap_or(now), keys }
    }
}

impl Tokens {
    /// A token that is good and still verifies by the keys in force.
    pub(super) fn get(
        &self,
        id: &SpiffeId,
        audiences: &[String],
        keys: &JwtBundle,
        now: Timestamp,
    ) -> Option<String> {
        let all = self.all();
        let token = all.get(id)?.get(audiences)?;
        // Under other keys its own may have been withdrawn.
        (now < token.good_until && *token.keys == *keys).then(|| token.text.clone())
    }

    /// Keeps a token. Where there is no room for it, the next one is asked for again.
    pub(super) fn put(&self, id: &SpiffeId, audiences: Vec<String>, token: Token, now: Timestamp) {
        if token.text.len() > LONGEST {
            return;
        }
        let mut all = self.all();
        let is_full = |all: &HashMap<SpiffeId, HashMap<Vec<String>, Token>>| {
            let of_one = all.get(id);
            let is_new = of_one.is_none_or(|tokens| !tokens.contains_key(&audiences));
            is_new
                && (of_one.is_some_and(|tokens| tokens.len() >= MOST_OF_ONE)
                    || all.values().map(HashMap::len).sum::<usize>() >= MOST)
        };
        if is_full(&all) {
            all.retain(|_, tokens| {
                tokens.retain(|_, token| now < token.good_until);
                !tokens.is_empty()
            });
            if is_full(&all) {
                return;
            }
        }
        all.entry(id.clone()).or_default().insert(audiences, token);
    }

    /// Forgets what is not good any more, and the tokens of identities that nobody has.
    pub(super) fn sweep(&self, is_there: impl Fn(&SpiffeId) -> bool, now: Timestamp) {
        self.all().retain(|id, tokens| {
            tokens.retain(|_, token| now < token.good_until);
            !tokens.is_empty() && is_there(id)
        });
    }

    fn all(&self) -> MutexGuard<'_, HashMap<SpiffeId, HashMap<Vec<String>, Token>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spiffe::forge::JwtForger;

    fn at(seconds: i64) -> Timestamp {
        Timestamp::from_second(1_800_000_000 + seconds).unwrap()
    }

    fn id(name: &str) -> SpiffeId {
        SpiffeId::parse(&format!("spiffe://td/{name}")).unwrap()
    }

    fn keys() -> Arc<JwtBundle> {
        let mut keys = JwtBundle::new();
        keys.insert("k", JwtForger::ec().key()).unwrap();
        Arc::new(keys)
    }

    fn audience(name: impl ToString) -> Vec<String> {
        vec![name.to_string()]
    }

    #[test]
    fn good_for_half_of_its_life_for_its_identity_audiences_and_keys() {
        let (tokens, keys) = (Tokens::default(), keys());
        let token = Token::new("t".into(), at(300), Arc::clone(&keys), at(0));
        tokens.put(&id("a"), audience("x"), token, at(0));
        let get = |name, audiences: &[String], keys: &JwtBundle, now| {
            tokens.get(&id(name), audiences, keys, at(now))
        };
        assert_eq!(get("a", &audience("x"), &keys, 149).as_deref(), Some("t"));
        assert_eq!(get("a", &audience("x"), &keys, 150), None, "half of it is gone");
        assert_eq!(get("b", &audience("x"), &keys, 0), None);
        assert_eq!(get("a", &audience("y"), &keys, 0), None);
        assert_eq!(get("a", &["x".into(), "y".into()], &keys, 0), None);
        assert_eq!(get("a", &audience("x"), &self::keys(), 0), None, "its key was withdrawn");
        tokens.sweep(|id| id.path() == "/a", at(149));
        assert!(get("a", &audience("x"), &keys, 149).is_some());
        tokens.sweep(|_| false, at(149));
        assert_eq!(get("a", &audience("x"), &keys, 149), None);
    }

    #[test]
    fn one_identity_takes_no_room_from_others() {
        let (tokens, keys) = (Tokens::default(), keys());
        let token = |text: &str, now| Token::new(text.into(), at(now + 100), keys.clone(), at(now));
        for n in 0..MOST_OF_ONE + 10 {
            tokens.put(&id("a"), audience(n), token("t", 0), at(0));
        }
        assert_eq!(tokens.all()[&id("a")].len(), MOST_OF_ONE);
        // One that is there is replaced all the same, and another's is kept.
        tokens.put(&id("a"), audience(0), token("new", 0), at(0));
        assert_eq!(tokens.get(&id("a"), &audience(0), &keys, at(0)).as_deref(), Some("new"));
        tokens.put(&id("b"), audience(0), token("b", 0), at(0));
        assert!(tokens.get(&id("b"), &audience(0), &keys, at(0)).is_some());
        // What is not good any more makes room.
        tokens.put(&id("a"), audience("late"), token("late", 60), at(60));
        assert!(tokens.get(&id("a"), &audience("late"), &keys, at(60)).is_some());
        assert_eq!(tokens.all().len(), 1);

        for n in 0..MOST / MOST_OF_ONE + 10 {
            for a in 0..MOST_OF_ONE {
                tokens.put(&id(&format!("i{n}")), audience(a), token("t", 60), at(60));
            }
        }
        assert_eq!(tokens.all().values().map(HashMap::len).sum::<usize>(), MOST);
        tokens.sweep(|_| false, at(60));
        tokens.put(&id("a"), audience("long"), token(&"t".repeat(LONGEST + 1), 60), at(60));
        assert!(tokens.all().is_empty());
    }
}
