use serde_json::json;

use super::*;
use crate::cluster::kubernetes::kinds;

fn kind(shown: &str) -> Kind {
    let all = kinds::all("node-1", "signet-system");
    all.into_iter().find(|kind| kind.shown == shown).unwrap()
}

fn reading() -> Reading {
    Reading {
        trust_domain: TrustDomain::parse("cluster.local").unwrap(),
        root_namespace: "istio-system".into(),
    }
}

fn raw(value: Value) -> Raw {
    serde_json::from_value(value).unwrap()
}

fn policy(uid: &str, action: &str) -> Raw {
    raw(json!({
        "metadata": {"name": "p", "namespace": "shop", "uid": uid, "resourceVersion": "3",
            "managedFields": [{"manager": "kubectl"}]},
        "spec": {"action": action, "ingress": [{}]},
    }))
}

fn action(store: &Store) -> Option<String> {
    store.known().find_map(|known| match known {
        Known::Object(Object::Policy(policy)) => Some(format!("{:?}", policy.action)),
        _ => None,
    })
}

fn problems(store: &Store, kind: &Kind) -> Vec<String> {
    store.problems(kind).map(|p| format!("{}: {}", p.subject, p.message)).collect()
}

#[test]
fn only_a_complete_list_replaces_what_is_known() {
    let (kind, reading) = (kind("IdentityPolicy"), reading());
    let mut store = Store::default();
    store.begin();
    store.listed(&kind, "v1alpha1", &reading, policy("a", "Allow"));
    assert_eq!((store.state, store.known().count()), (WatchState::Waiting, 0));
    assert!(store.complete());
    assert_eq!((store.state, action(&store).as_deref()), (WatchState::Listed, Some("Allow")));

    // A list that breaks off changes nothing; the next one begins anew.
    store.begin();
    store.listed(&kind, "v1alpha1", &reading, policy("b", "Deny"));
    store.begin();
    assert_eq!(action(&store).as_deref(), Some("Allow"));
    store.listed(&kind, "v1alpha1", &reading, policy("a", "Allow"));
    assert!(!store.complete(), "the same again is no news");

    // A complete empty one is authoritative.
    store.begin();
    assert!(store.complete());
    assert_eq!(store.known().count(), 0);
    // And so is the kind's absence.
    assert!(store.none());
    assert!(!store.none());
    assert_eq!(store.state, WatchState::Absent);
}

#[test]
fn a_bad_object_keeps_its_last_valid_state_and_stops_no_other() {
    let (kind, reading) = (kind("IdentityPolicy"), reading());
    let mut store = Store::default();
    store.begin();
    store.listed(&kind, "v1alpha1", &reading, policy("a", "Deny"));
    let other = raw(json!({
        "metadata": {"name": "q", "namespace": "shop"}, "spec": {"ingres": []},
    }));
    store.listed(&kind, "v1alpha1", &reading, other);
    store.complete();
    assert_eq!(
        problems(&store, &kind),
        ["IdentityPolicy shop/q: spec.ingres: unknown field; did you mean ingress?; it does not \
          count"]
    );
    assert_eq!((store.counts(), action(&store).as_deref()), ((2, 1), Some("Deny")));

    assert!(store.changed(&kind, "v1alpha1", &reading, policy("a", "Denny")));
    assert_eq!(action(&store).as_deref(), Some("Deny"));
    assert!(
        problems(&store, &kind)[0].ends_with("what it said before stays in force"),
        "{:?}",
        problems(&store, &kind)
    );
    // Also over a list.
    store.begin();
    store.listed(&kind, "v1alpha1", &reading, policy("a", "Denny"));
    store.complete();
    assert_eq!(action(&store).as_deref(), Some("Deny"));
    // But not for another object of that name.
    store.changed(&kind, "v1alpha1", &reading, policy("b", "Denny"));
    assert_eq!(action(&store), None);
    assert!(store.is_unreadable());
    // It is valid again.
    store.changed(&kind, "v1alpha1", &reading, policy("b", "Audit"));
    assert_eq!((action(&store).as_deref(), store.counts()), (Some("Audit"), (1, 0)));
    assert!(store.gone(&policy("b", "Audit")));
    assert!(!store.gone(&policy("b", "Audit")));
}

#[test]
fn objects_without_the_type_that_lists_leave_out_are_read() {
    let reading = reading();
    let mut store = Store::default();
    let pods = kind("Pod (this node)");
    let pod = json!({
        "metadata": {"name": "web", "namespace": "shop", "uid": "u-1"},
        "spec": {"nodeName": "node-1", "containers": []},
        "status": {"podIPs": [{"ip": "10.0.0.1"}]},
    });
    assert!(store.changed(&pods, "v1", &reading, raw(pod.clone())));
    let [Known::Object(Object::Pod(read))] = store.known().collect::<Vec<_>>()[..] else {
        panic!("no pod");
    };
    assert_eq!((&*read.uid, read.ips.len()), ("u-1", 1));
    // What Signet does not read is no news.
    let mut later = pod;
    later["metadata"]["resourceVersion"] = json!("9");
    later["status"]["startTime"] = json!("2026-01-01T00:00:00Z");
    assert!(!store.changed(&pods, "v1", &reading, raw(later)));
    assert_eq!(store.uid("shop", "web"), Some("u-1"));
}

#[test]
fn the_config_maps_of_the_mesh() {
    let reading = reading();
    let enforcement = kind("ConfigMap signet-enforcement");
    let of = |data: Value| {
        let mut store = Store::default();
        let object = json!({"metadata": {"name": "signet-enforcement"}, "data": data});
        store.changed(&enforcement, "v1", &reading, raw(object));
        let word = store.known().find_map(|known| match known {
            Known::Enforcement(word) => Some(*word),
            _ => None,
        });
        (word, problems(&store, &enforcement).pop().unwrap_or_default())
    };
    assert_eq!(of(json!({"enforcement": "audit"})), (Some(Enforcement::Audit), String::new()));
    assert_eq!(
        of(json!({"enforcement": "none"})),
        (
            None,
            "ConfigMap signet-enforcement: data.enforcement: \"none\" is not one of enforce, \
             audit, off; it does not count"
                .into()
        )
    );
    assert!(of(json!({})).1.contains("data.enforcement: missing; write enforce, audit or off"));

    let federation = kind("ConfigMap signet-federation");
    let mut store = Store::default();
    let object = json!({"metadata": {"name": "signet-federation"},
        "data": {"federation.yaml": "trustDomains:\n- name: a.example\n  endpoint: {url: \
            \"https://a.example:8443/b\", profile: https_web}\n"}});
    store.changed(&federation, "v1", &reading, raw(object.clone()));
    let known = store.known().next().cloned();
    assert!(matches!(known, Some(Known::Federation(f)) if f.domains.len() == 1));
    let mut bad = object;
    bad["data"]["federation.yaml"] = json!("trustDomains: [{name: cluster.local}]\n");
    store.changed(&federation, "v1", &reading, raw(bad));
    assert!(problems(&store, &federation)[0].contains("data[federation.yaml].trustDomains[0]"));
    assert_eq!(store.known().count(), 1, "the last valid one stays");
}

#[test]
fn deep_objects_are_refused_not_followed() {
    let (kind, reading) = (kind("IdentityPolicy"), reading());
    let mut deep = json!({});
    for _ in 0..100 {
        deep = json!({"a": deep});
    }
    let mut store = Store::default();
    let object = json!({"metadata": {"name": "p", "namespace": "shop"}, "spec": deep});
    store.changed(&kind, "v1alpha1", &reading, raw(object));
    assert!(problems(&store, &kind)[0].contains("nested deeper than 48 levels"));
}

proptest::proptest! {
    #[test]
    fn nothing_that_is_json_breaks_a_watch(text in "[ -~]{0,40}", number: i64, which in 0usize..16) {
        let kinds = kinds::all("node-1", "signet-system");
        let kind = &kinds[which % kinds.len()];
        let mut store = Store::default();
        for spec in [json!(text), json!(number), json!([text]), json!({&text: number})] {
            let object = json!({"metadata": {"name": &text, "labels": spec.clone()},
                "spec": spec.clone(), "status": spec.clone(), "data": spec});
            store.changed(kind, kind.versions[0], &reading(), raw(object));
            let _ = store.problems(kind).count();
        }
    }
}
