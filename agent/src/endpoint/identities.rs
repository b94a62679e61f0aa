//! Numbers of identities and policies in the kernel.
//!
//! An identity's number is pinned with its SPIFFE ID and read back before anything else is
//! written, and never given to another identity: map entries, socket storage and open flows
//! may hold it for any time.

use std::{
    collections::{BTreeSet, HashMap, HashSet, VecDeque},
    sync::Arc,
    time::Duration,
};

use signet_ebpf::abi::{
    FIRST_IDENTITY, IDENTITY_ANY, IDENTITY_NAME_LEN, IdentityName, POLICY_PROBES,
};

use crate::{
    policy::{
        builtin,
        model::{Policy, PolicyName, PolicySet},
    },
    spiffe::SpiffeId,
};

/// Row of the pinned table that holds the next number instead of a name, in decimal.
pub const NEXT_ROW: u32 = 0;

/// A row whose identity nobody has had for so long is removed; its number stays unused.
const FORGET_AFTER: Duration = Duration::from_secs(24 * 3600);

/// SPIFFE ID ↔ number.
#[derive(Clone, Debug)]
pub struct Identities {
    numbers: HashMap<SpiffeId, u32>,
    names: Arc<HashMap<u32, SpiffeId>>,
    next: u32,
    /// Numbers whose rows are not in the pinned table yet.
    unwritten: Vec<u32>,
    last_used: HashMap<u32, Duration>,
}

impl Identities {
    /// The table as it was pinned. Rows that do not read are left alone, and their numbers
    /// are not given away.
    pub fn from_rows(rows: &[(u32, IdentityName)]) -> Self {
        let mut numbers = HashMap::new();
        let mut names = HashMap::new();
        let mut next = FIRST_IDENTITY;
        for (number, row) in rows {
            let text = text_of(row);
            if *number == NEXT_ROW {
                next = next.max(text.and_then(|t| t.parse().ok()).unwrap_or(0));
                continue;
            }
            next = next.max(number.saturating_add(1));
            if let Some(id) = text.and_then(|t| SpiffeId::parse(t).ok()) {
                names.insert(*number, id.clone());
                numbers.insert(id, *number);
            }
        }
        Self {
            numbers,
            names: Arc::new(names),
            next,
            unwritten: Vec::new(),
            last_used: HashMap::new(),
        }
    }

    /// The identity's number, a new one if it has none; `None` when its name does not fit
    /// the table or the numbers are used up.
    pub fn number(&mut self, id: &SpiffeId) -> Option<u32> {
        if let Some(number) = self.numbers.get(id) {
            return Some(*number);
        }
        if id.as_str().len() > IDENTITY_NAME_LEN || self.next == IDENTITY_ANY {
            return None;
        }
        let number = self.next;
        self.next += 1;
        self.numbers.insert(id.clone(), number);
        Arc::make_mut(&mut self.names).insert(number, id.clone());
        self.unwritten.push(number);
        Some(number)
    }

    /// Number → SPIFFE ID.
    pub fn names(&self) -> Arc<HashMap<u32, SpiffeId>> {
        self.names.clone()
    }

    /// Rows to be written before any map holds their numbers, with how to say that one is
    /// written.
    pub fn unwritten(&self) -> Vec<(u32, IdentityName)> {
        self.unwritten
            .iter()
            .filter_map(|number| Some((*number, row_of(self.names.get(number)?.as_str())?)))
            .collect()
    }

    /// The row of `number` is written.
    pub fn written(&mut self, number: u32) {
        self.unwritten.retain(|n| *n != number);
    }

    /// Numbers whose rows may go, because nobody has used them for a day; the row
    /// [`NEXT_ROW`] that comes with them must be written first.
    pub fn forget(
        &mut self,
        used: &BTreeSet<u32>,
        now: Duration,
    ) -> Option<(IdentityName, Vec<u32>)> {
        for number in used {
            self.last_used.insert(*number, now);
        }
        let mut old = Vec::new();
        for number in self.names.keys() {
            let last = *self.last_used.entry(*number).or_insert(now);
            if !used.contains(number) && now.saturating_sub(last) > FORGET_AFTER {
                old.push(*number);
            }
        }
        if old.is_empty() {
            return None;
        }
        let names = Arc::make_mut(&mut self.names);
        for number in &old {
            self.last_used.remove(number);
            if let Some(id) = names.remove(number) {
                self.numbers.remove(&id);
            }
        }
        Some((row_of(&self.next.to_string())?, old))
    }
}

fn row_of(text: &str) -> Option<IdentityName> {
    let mut bytes = [0; IDENTITY_NAME_LEN];
    bytes.get_mut(..text.len())?.copy_from_slice(text.as_bytes());
    Some(IdentityName { len: u16::try_from(text.len()).ok()?, bytes })
}

fn text_of(row: &IdentityName) -> Option<&str> {
    std::str::from_utf8(row.bytes.get(..usize::from(row.len))?).ok()
}

/// Policies that are gone and still have their number: events of theirs may be on their way.
const DEPARTED: usize = 1024;

/// Policy ↔ number, for as long as this process lives: policies are compiled anew at start,
/// before any flow is judged by them.
#[derive(Clone, Debug, Default)]
pub struct PolicyNumbers {
    numbers: HashMap<PolicyName, u32>,
    policies: Arc<HashMap<u32, Arc<Policy>>>,
    /// Oldest first.
    departed: VecDeque<PolicyName>,
    last: u32,
}

impl PolicyNumbers {
    /// Gives every policy of `set` its number; one that changed keeps its own, and one that is
    /// gone keeps it for a while, so that late events still name it. So has every one of
    /// `builtins`, and the kubelet's probes the number that the kernel has for them.
    pub fn update(&mut self, set: &PolicySet, builtins: &[Arc<Policy>]) {
        let mut policies = HashMap::with_capacity(set.policies.len() + set.carried.len());
        let mut current = HashSet::with_capacity(policies.capacity());
        policies.insert(POLICY_PROBES, Arc::new(builtin::probes()));
        for policy in set.policies.iter().chain(&set.carried).chain(builtins) {
            let number = *self.numbers.entry(policy.name.clone()).or_insert_with(|| {
                // Never 0: that means "no policy". A number a name: four thousand million.
                self.last = self.last.saturating_add(1).min(POLICY_PROBES - 1);
                self.last
            });
            policies.insert(number, policy.clone());
            current.insert(&policy.name);
        }
        self.departed.retain(|name| !current.contains(name));
        for (number, policy) in self.policies.iter() {
            if policies.contains_key(number) {
                continue;
            }
            if !self.departed.contains(&policy.name) {
                self.departed.push_back(policy.name.clone());
            }
            policies.insert(*number, policy.clone());
        }
        while self.departed.len() > DEPARTED {
            let Some(name) = self.departed.pop_front() else { break };
            if let Some(number) = self.numbers.remove(&name) {
                policies.remove(&number);
            }
        }
        self.policies = Arc::new(policies);
    }

    /// The number of a policy; 0 for one that was never numbered.
    pub fn number(&self, name: &PolicyName) -> u32 {
        self.numbers.get(name).copied().unwrap_or(0)
    }

    /// Number → policy, those that are gone for a short while included.
    pub fn policies(&self) -> Arc<HashMap<u32, Arc<Policy>>> {
        self.policies.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::model::{Action, Selector};
    use proptest::prelude::*;

    fn id(n: u32) -> SpiffeId {
        SpiffeId::parse(&format!("spiffe://cluster.local/ns/shop/sa/a{n}")).unwrap()
    }

    proptest! {
        /// Whatever is numbered, written, forgotten and read back: two identities never
        /// have had one number.
        #[test]
        fn a_number_is_one_identity_for_ever(steps in proptest::collection::vec((0u32..8, any::<bool>(), any::<bool>()), 1..60)) {
            let mut table = Identities::from_rows(&[]);
            let mut pinned: HashMap<u32, IdentityName> = HashMap::new();
            let mut ever: HashMap<u32, SpiffeId> = HashMap::new();
            let mut now = Duration::ZERO;
            for (n, restart, forget) in steps {
                let id = id(n);
                let number = table.number(&id).unwrap();
                prop_assert!(number >= FIRST_IDENTITY);
                prop_assert_eq!(ever.entry(number).or_insert_with(|| id.clone()), &id);
                for (number, row) in table.unwritten() {
                    pinned.insert(number, row);
                    table.written(number);
                }
                prop_assert!(table.unwritten().is_empty());
                now += Duration::from_secs(20 * 3600);
                if forget && let Some((next, old)) = table.forget(&BTreeSet::new(), now) {
                    pinned.insert(NEXT_ROW, next);
                    for number in old {
                        pinned.remove(&number);
                    }
                }
                if restart {
                    let rows: Vec<_> = pinned.iter().map(|(n, r)| (*n, *r)).collect();
                    table = Identities::from_rows(&rows);
                }
            }
        }
    }

    #[test]
    fn what_was_pinned_is_read_back() {
        let mut table = Identities::from_rows(&[]);
        let one = table.number(&id(1)).unwrap();
        let rows = table.unwritten();
        let mut again = Identities::from_rows(&rows);
        assert_eq!(again.number(&id(1)), Some(one));
        assert_eq!(again.names().get(&one), Some(&id(1)));
        assert_ne!(again.number(&id(2)), Some(one));
    }

    #[test]
    fn a_row_that_does_not_read_keeps_its_number() {
        let broken = IdentityName { len: 9, bytes: [b'x'; IDENTITY_NAME_LEN] };
        let mut table = Identities::from_rows(&[(300, broken)]);
        assert_eq!(table.number(&id(1)), Some(301));
    }

    #[test]
    fn a_used_identity_is_not_forgotten() {
        let mut table = Identities::from_rows(&[]);
        let one = table.number(&id(1)).unwrap();
        let two = table.number(&id(2)).unwrap();
        let used = BTreeSet::from([one]);
        assert_eq!(table.forget(&used, Duration::ZERO).map(|f| f.1), None);
        let (_, old) = table.forget(&used, FORGET_AFTER + Duration::from_secs(1)).unwrap();
        assert_eq!(old, [two]);
    }

    fn set_of(names: &[&str]) -> PolicySet {
        let policies = names.iter().map(|name| {
            let name = PolicyName {
                kind: "IdentityPolicy".into(),
                namespace: "shop".into(),
                name: (*name).into(),
            };
            Arc::new(Policy::new(name, Selector::default(), Action::Allow))
        });
        PolicySet { policies: policies.collect(), ..PolicySet::default() }
    }

    #[test]
    fn a_policy_that_is_gone_still_has_its_name_for_a_while() {
        let mut numbers = PolicyNumbers::default();
        let one = set_of(&["one"]);
        numbers.update(&one, &[]);
        let number = numbers.number(&one.policies[0].name);
        assert_ne!(number, 0);
        numbers.update(&set_of(&["two"]), &[]);
        assert_eq!(&*numbers.policies()[&number].name.name, "one");
        numbers.update(&one, &[]);
        assert_eq!(numbers.number(&one.policies[0].name), number, "it came back");

        // Not for ever: many others came and went.
        let names: Vec<String> = (0..2 * DEPARTED).map(|n| format!("p{n}")).collect();
        for name in &names {
            numbers.update(&set_of(&[name]), &[]);
        }
        assert!(!numbers.policies().contains_key(&number));
        assert_eq!(numbers.policies().len(), DEPARTED + 2, "and the probes");
        numbers.update(&one, &[]);
        assert_ne!(numbers.number(&one.policies[0].name), number, "nobody's number twice");
    }
}
