//! The bundles of all trusted domains and the keys of end users' issuers, shared and followed
//! live.

pub mod endpoint;
pub mod federation;
pub mod follow;
pub mod issuers;

use std::{
    collections::BTreeMap,
    fmt,
    sync::{Arc, Mutex, PoisonError},
};

use arc_swap::ArcSwap;
use jiff::Timestamp;
use tokio::sync::watch;

use self::issuers::Issuers;
use crate::{
    spiffe::{Bundle, JwtBundle, TrustDomain},
    telemetry::metrics::Reading,
};

/// The bundles by trust domain. Readers never block.
///
/// A domain that is not here is not trusted; one with an empty bundle has revoked everything.
/// X.509 and JWT bundles change apart from each other: a new JWT key must not end tunnels.
pub struct Trust {
    x509: Table<Bundle>,
    jwt: Table<JwtBundle>,
    /// How often each domain's source was asked for its bundle; gone with the domain.
    refreshes: Mutex<BTreeMap<TrustDomain, Refreshes>>,
    /// Whom tokens of end users are believed.
    issuers: Arc<Issuers>,
}

#[derive(Clone, Copy, Default)]
struct Refreshes {
    good: u64,
    failed: u64,
    last_good: Option<Timestamp>,
}

/// Bundles of one kind, and how often they changed.
struct Table<B> {
    bundles: ArcSwap<BTreeMap<TrustDomain, Arc<B>>>,
    generation: watch::Sender<u64>,
}

impl Trust {
    /// No domain is trusted, generation 0.
    pub fn new() -> Arc<Self> {
        Arc::new(Self {
            x509: Table::new(),
            jwt: Table::new(),
            refreshes: Mutex::default(),
            issuers: Arc::default(),
        })
    }

    /// The keys of end users' issuers.
    pub fn issuers(&self) -> &Arc<Issuers> {
        &self.issuers
    }

    /// The X.509 bundle of a trust domain; `None` when it is not trusted.
    pub fn bundle(&self, domain: &TrustDomain) -> Option<Arc<Bundle>> {
        self.x509.bundles.load().get(domain).cloned()
    }

    /// The JWT bundle of a trust domain; `None` when its tokens are not trusted.
    pub fn jwt_bundle(&self, domain: &TrustDomain) -> Option<Arc<JwtBundle>> {
        self.jwt.bundles.load().get(domain).cloned()
    }

    /// The domains whose X509-SVIDs are trusted.
    pub fn domains(&self) -> Vec<TrustDomain> {
        self.x509.bundles.load().keys().cloned().collect()
    }

    /// All X.509 bundles at one moment.
    pub fn bundles(&self) -> Arc<BTreeMap<TrustDomain, Arc<Bundle>>> {
        self.x509.bundles.load_full()
    }

    /// All JWT bundles at one moment.
    pub fn jwt_bundles(&self) -> Arc<BTreeMap<TrustDomain, Arc<JwtBundle>>> {
        self.jwt.bundles.load_full()
    }

    /// Grows with every change of any X.509 bundle. A session that was verified under an
    /// earlier generation takes no new flow.
    pub fn generation(&self) -> u64 {
        *self.x509.generation.borrow()
    }

    /// The generation, followed.
    pub fn subscribe(&self) -> watch::Receiver<u64> {
        self.x509.generation.subscribe()
    }

    /// Grows with every change of any JWT bundle, followed.
    pub fn subscribe_jwt(&self) -> watch::Receiver<u64> {
        self.jwt.generation.subscribe()
    }

    /// Sets the X.509 bundle of a domain; true when that changed something.
    pub fn set(&self, domain: TrustDomain, bundle: Bundle) -> bool {
        self.x509.set(domain, Arc::new(bundle))
    }

    /// Sets the JWT bundle of a domain; true when that changed something.
    pub fn set_jwt(&self, domain: TrustDomain, bundle: Arc<JwtBundle>) -> bool {
        self.jwt.set(domain, bundle)
    }

    /// Trusts a domain no longer, in neither kind; true when it was trusted.
    pub fn remove(&self, domain: &TrustDomain) -> bool {
        let jwt = self.jwt.change(|bundles| bundles.remove(domain).is_some());
        self.refreshes.lock().unwrap_or_else(PoisonError::into_inner).remove(domain);
        self.x509.change(|bundles| bundles.remove(domain).is_some()) || jwt
    }
}

/// For metrics. The number of domains is bounded by the federation's.
impl Trust {
    /// Counts that a domain's source was asked for its bundle, whether that is new or not.
    pub fn note_refresh(&self, domain: &TrustDomain, good: bool) {
        let mut all = self.refreshes.lock().unwrap_or_else(PoisonError::into_inner);
        let refreshes = all.entry(domain.clone()).or_default();
        if good {
            refreshes.good += 1;
            refreshes.last_good = Some(Timestamp::now());
        } else {
            refreshes.failed += 1;
        }
    }

    /// The bundles of a moment.
    pub fn readings(&self) -> Vec<Reading> {
        const DOMAIN: &str = "trust_domain";
        let mut info = Reading::gauge("bundle_info", "The X.509 bundle in force, by its digest");
        let mut roots = Reading::gauge("bundle_authorities", "Authorities in the X.509 bundle");
        let mut expiry = Reading::gauge(
            "bundle_expiry_timestamp_seconds",
            "When the last authority of the X.509 bundle runs out",
        );
        for (domain, bundle) in self.bundles().iter() {
            let digest: String = bundle.digest().iter().map(|b| format!("{b:02x}")).collect();
            info = info.labelled(vec![(DOMAIN, domain.to_string()), ("digest", digest)], 1);
            roots = roots.with(DOMAIN, domain.to_string(), bundle.certificates().len());
            let last = bundle.expiries().into_iter().max();
            expiry = expiry.each(DOMAIN, last.map(|at| (domain.to_string(), at)));
        }
        let jwt = self.jwt_bundles();
        let keys = Reading::gauge("bundle_jwt_keys", "Keys in the JWT bundle")
            .each(DOMAIN, jwt.iter().map(|(domain, keys)| (domain.to_string(), keys.iter().len())));
        let mut refreshes =
            Reading::counter("bundle_refreshes", "Looks at a bundle's source, by result");
        let mut last = Reading::gauge(
            "bundle_last_refresh_timestamp_seconds",
            "When a bundle's source was last read",
        );
        let all = self.refreshes.lock().unwrap_or_else(PoisonError::into_inner).clone();
        for (domain, counts) in &all {
            for (result, count) in [("ok", counts.good), ("failed", counts.failed)] {
                let labels = vec![(DOMAIN, domain.to_string()), ("result", result.to_owned())];
                refreshes = refreshes.labelled(labels, count);
            }
            last = last.each(DOMAIN, counts.last_good.map(|at| (domain.to_string(), at)));
        }
        vec![info, roots, expiry, keys, refreshes, last]
    }
}

impl<B: PartialEq> Table<B> {
    fn new() -> Self {
        Self { bundles: ArcSwap::default(), generation: watch::Sender::new(0) }
    }

    fn set(&self, domain: TrustDomain, bundle: Arc<B>) -> bool {
        self.change(|bundles| {
            if bundles.get(&domain).is_some_and(|old| *old == bundle) {
                return false;
            }
            bundles.insert(domain, bundle);
            true
        })
    }

    /// Changes the table; the generation grows when `change` says that it did something.
    fn change(&self, change: impl FnOnce(&mut BTreeMap<TrustDomain, Arc<B>>) -> bool) -> bool {
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
    use crate::spiffe::forge::{Forger, JwtForger};

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

    #[test]
    fn jwt_keys_change_apart_and_go_with_their_domain() {
        let trust = Trust::new();
        let (a, b) = (TrustDomain::parse("a").unwrap(), TrustDomain::parse("b").unwrap());
        trust.set(a.clone(), Forger::root("a").bundle());
        let mut seen = trust.subscribe_jwt();
        let mut keys = JwtBundle::new();
        keys.insert("k", JwtForger::ec().key()).unwrap();
        let keys = Arc::new(keys);
        assert!(trust.set_jwt(a.clone(), Arc::clone(&keys)));
        assert!(seen.has_changed().unwrap());
        seen.mark_unchanged();
        assert_eq!(trust.generation(), 1, "no tunnel ends");
        assert_eq!((trust.jwt_bundle(&a), trust.jwt_bundle(&b)), (Some(Arc::clone(&keys)), None));
        assert!(!trust.set_jwt(a.clone(), Arc::new(JwtBundle::clone(&keys))), "the same again");
        assert!(trust.set_jwt(b.clone(), keys));
        assert_eq!(trust.jwt_bundles().len(), 2);
        assert_eq!((trust.bundles().len(), trust.domains()), (1, vec![a.clone()]));
        assert!(trust.remove(&a) && trust.jwt_bundle(&a).is_none());
        assert!(trust.remove(&b) && !trust.remove(&b));
        assert!(seen.has_changed().unwrap());
    }

    #[test]
    fn a_domain_takes_its_series_along() {
        let trust = Trust::new();
        let a = TrustDomain::parse("a").unwrap();
        trust.set(a.clone(), Forger::root("a").bundle());
        trust.note_refresh(&a, true);
        trust.note_refresh(&a, false);
        let shown = |trust: &Trust| -> Vec<(String, u64)> {
            trust.readings().iter().flat_map(|r| r.flat().collect::<Vec<_>>()).collect()
        };
        let readings = shown(&trust);
        let has = |name: &str, value| readings.iter().any(|(n, v)| n == name && *v == value);
        assert!(has("bundle_authorities{trust_domain=\"a\"}", 1), "{readings:?}");
        for result in ["ok", "failed"] {
            let name = format!("bundle_refreshes{{trust_domain=\"a\",result=\"{result}\"}}");
            assert!(has(&name, 1), "{readings:?}");
        }
        trust.remove(&a);
        assert_eq!(shown(&trust), []);
    }
}
