//! The bundles of all trusted domains, shared and followed live.

use std::{collections::BTreeMap, fmt, sync::Arc};

use arc_swap::ArcSwap;
use tokio::sync::watch;

use crate::spiffe::{Bundle, TrustDomain};

/// The bundles by trust domain. Readers never block.
///
/// A domain that is not here is not trusted; one with an empty bundle has revoked everything.
pub struct Trust {
    bundles: ArcSwap<BTreeMap<TrustDomain, Arc<Bundle>>>,
    generation: watch::Sender<u64>,
}

impl Trust {
    /// No domain is trusted, generation 0.
    pub fn new() -> Arc<Self> {
        Arc::new(Self { bundles: ArcSwap::default(), generation: watch::Sender::new(0) })
    }

    /// The bundle of a trust domain; `None` when it is not trusted.
    pub fn bundle(&self, domain: &TrustDomain) -> Option<Arc<Bundle>> {
        self.bundles.load().get(domain).cloned()
    }

    /// The trusted domains.
    pub fn domains(&self) -> Vec<TrustDomain> {
        self.bundles.load().keys().cloned().collect()
    }

    /// Grows with every change of any bundle. A session that was verified under an earlier
    /// generation takes no new flow.
    pub fn generation(&self) -> u64 {
        *self.generation.borrow()
    }

    /// The generation, followed.
    pub fn subscribe(&self) -> watch::Receiver<u64> {
        self.generation.subscribe()
    }

    /// Sets the bundle of a domain; true when that changed something.
    pub fn set(&self, domain: TrustDomain, bundle: Bundle) -> bool {
        self.change(|bundles| {
            if bundles.get(&domain).is_some_and(|old| **old == bundle) {
                return false;
            }
            bundles.insert(domain, Arc::new(bundle));
            true
        })
    }

    /// Trusts a domain no longer; true when it was trusted.
    pub fn remove(&self, domain: &TrustDomain) -> bool {
        self.change(|bundles| bundles.remove(domain).is_some())
    }

    /// Changes the table; the generation grows when `change` says that it did something.
    fn change(&self, change: impl FnOnce(&mut BTreeMap<TrustDomain, Arc<Bundle>>) -> bool) -> bool {
        // The sender's lock makes writers take turns, and readers of the new generation see
        // the new table: it is stored first.
        self.generation.send_if_modified(|generation| {
            let mut bundles = BTreeMap::clone(&self.bundles.load());
            let changed = change(&mut bundles);
            if changed {
                self.bundles.store(Arc::new(bundles));
                *generation += 1;
            }
            changed
        })
    }
}

impl fmt::Debug for Trust {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Trust")
            .field("generation", &self.generation())
            .field("domains", &self.domains())
            .finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spiffe::forge::Forger;

    #[test]
    fn generations_grow_with_changes_only() {
        let trust = Trust::new();
        let (a, b) = (TrustDomain::parse("a").unwrap(), TrustDomain::parse("b").unwrap());
        let mut seen = trust.subscribe();
        assert_eq!((trust.generation(), trust.bundle(&a)), (0, None));
        let first = Forger::root("a").bundle();
        assert!(trust.set(a.clone(), first.clone()));
        assert!(seen.has_changed().unwrap());
        assert_eq!(*seen.borrow_and_update(), 1);
        assert_eq!(trust.bundle(&a).as_deref(), Some(&first));
        assert_eq!(trust.bundle(&b), None, "a bundle is for its own domain only");
        assert!(!trust.set(a.clone(), first), "the same again is no change");
        assert!(!seen.has_changed().unwrap());
        assert!(trust.set(a.clone(), Forger::root("a").bundle()));
        assert!(!trust.remove(&b));
        assert!(trust.remove(&a));
        assert_eq!((trust.generation(), trust.domains()), (3, vec![]));
    }
}
