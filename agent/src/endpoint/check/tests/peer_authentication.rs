//! PeerAuthentication: every combination of levels and modes.

use super::*;

fn object(space: &str, name: &str, created: &str, spec: &str) -> String {
    format!(
        "---\napiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {{name: \
         {name}, namespace: {space}, creationTimestamp: \"{created}\"}}\nspec: {spec}\n"
    )
}

const OLD: &str = "2026-01-01T00:00:00Z";
const NEW: &str = "2026-02-01T00:00:00Z";
const MODES: [Option<&str>; 5] =
    [None, Some("UNSET"), Some("DISABLE"), Some("PERMISSIVE"), Some("STRICT")];

/// What Istio says of a port: strict or not; `None` where no level says anything.
fn wanted(levels: [Option<&str>; 3], port: Option<&str>) -> Option<bool> {
    let strict = |mode: Option<&str>| match mode {
        None | Some("UNSET") => None,
        Some("STRICT") => Some(true),
        Some(_) => Some(false),
    };
    let [mesh, namespace, workload] = levels.map(strict);
    strict(port).or(workload).or(namespace).or(mesh)
}

/// Mesh × namespace × workload × port, under each label, with and without leave to loosen.
#[test]
fn every_combination_of_modes() {
    let mut rows = 0;
    for label in ["permissive", "strict"] {
        for override_ in [false, true] {
            let labels =
                format!("signet.dev/mode: {label}, signet.dev/allow-pod-override: \"{override_}\"");
            for mesh in MODES {
                for namespace in MODES {
                    for workload in MODES {
                        for port in MODES {
                            let mtls = |mode: &str| format!("mtls: {{mode: {mode}}}");
                            let mut objects = String::new();
                            for (space, mode) in [("istio-system", mesh), ("shop", namespace)] {
                                if let Some(mode) = mode {
                                    let spec = format!("{{{}}}", mtls(mode));
                                    objects += &object(space, "default", OLD, &spec);
                                }
                            }
                            if workload.is_some() || port.is_some() {
                                let mut spec = "{selector: {matchLabels: {app: db}}".to_owned();
                                if let Some(mode) = workload {
                                    spec += &format!(", {}", mtls(mode));
                                }
                                if let Some(mode) = port {
                                    spec += &format!(", portLevelMtls: {{5432: {{mode: {mode}}}}}");
                                }
                                objects += &object("shop", "db", OLD, &(spec + "}"));
                            }
                            let world = world_with(&labels, &objects);
                            let levels = [mesh, namespace, workload];
                            let floor = label == "strict";
                            let expected = |wanted: Option<bool>| match wanted {
                                None => floor,
                                Some(true) => true,
                                Some(false) => floor && !override_,
                            };
                            let what = format!("{label} {override_} {levels:?} {port:?}");
                            for (number, wanted) in
                                [(80, wanted(levels, None)), (5432, wanted(levels, port))]
                            {
                                let strict = expected(wanted);
                                let row = row(&world, number);
                                assert!(
                                    row.starts_with("AA"),
                                    "mTLS passes: {what} {number} {row}"
                                );
                                let open = &row[2..] == "AA";
                                assert_eq!(open, !strict, "{what} port {number}: {row}");
                            }
                            // What is looser than the label is told, on the object.
                            let looser = |wanted: Option<bool>| wanted == Some(false);
                            let others = wanted([mesh, namespace, None], None);
                            let ignored = floor
                                && !override_
                                && [wanted(levels, None), wanted([None; 3], port), others]
                                    .into_iter()
                                    .any(looser);
                            let told = world.peer_authentications.iter().any(|object| {
                                object.remarks.iter().any(|r| r.message.contains("looser"))
                            });
                            assert_eq!(told, ignored, "{what}");
                            rows += 1;
                        }
                    }
                }
            }
        }
    }
    assert_eq!(rows, 4 * 625);
}

#[test]
fn the_oldest_of_a_level_holds() {
    let strict = "{mtls: {mode: STRICT}}";
    let open = "{mtls: {mode: PERMISSIVE}}";
    for (first, second, wanted) in [(strict, open, "AAPP"), (open, strict, "AAAA")] {
        for space in ["shop", "istio-system"] {
            let objects = object(space, "z", OLD, first) + &object(space, "a", NEW, second);
            assert_eq!(row(&world(&objects), 80), wanted, "{space}");
        }
    }
    let workload = |name: &str, created: &str, mode: &str| {
        let spec = format!("{{selector: {{matchLabels: {{app: db}}}}, mtls: {{mode: {mode}}}}}");
        object("shop", name, created, &spec)
    };
    let objects = workload("z", OLD, "STRICT") + &workload("a", NEW, "PERMISSIVE");
    assert_eq!(row(&world(&objects), 80), "AAPP");
    // The same age: by name.
    let objects = workload("z", OLD, "STRICT") + &workload("a", OLD, "PERMISSIVE");
    assert_eq!(row(&world(&objects), 80), "AAAA");
}

#[test]
fn what_istio_ignores_is_ignored_and_told() {
    let told = |world: &World, text: &str| {
        let all = world.peer_authentications.iter().flat_map(|object| &object.remarks);
        assert!(all.clone().any(|r| r.message.contains(text)), "{:?}", all.collect::<Vec<_>>());
    };
    // A selector in the root namespace.
    let spec = "{selector: {matchLabels: {app: db}}, mtls: {mode: STRICT}}";
    let world = world(&object("istio-system", "a", OLD, spec));
    assert_eq!(row(&world, 80), "AAAA");
    told(&world, "with a selector is ignored");
    // Ports without a selector.
    let spec = "{mtls: {mode: STRICT}, portLevelMtls: {80: {mode: PERMISSIVE}}}";
    let world = super::world(&object("shop", "a", OLD, spec));
    assert_eq!(row(&world, 80), "AAPP");
    told(&world, "it needs a selector of pods");
    // Another workload's.
    let spec = "{selector: {matchLabels: {app: web}}, mtls: {mode: STRICT}}";
    assert_eq!(row(&super::world(&object("shop", "a", OLD, spec)), 80), "AAAA");
    // Nothing is enrolled by it.
    for labels in ["", "signet.dev/mode: observe"] {
        let world = world_with(labels, &object("shop", "a", OLD, "{mtls: {mode: STRICT}}"));
        let untouched = world_with(labels, "");
        assert_eq!(row(&world, 80), row(&untouched, 80));
        told(&world, "enrols nothing");
    }
}

#[test]
fn exempt_ports_stay_open_where_plaintext_is_refused() {
    let namespace = "---\napiVersion: v1\nkind: Namespace\nmetadata: {name: ops, labels: \
                     {signet.dev/mode: permissive}, annotations: \
                     {signet.dev/exempt-inbound-ports: \"9090\"}}\n";
    let text = |spec: &str| {
        namespace.to_owned() + &pod("ops", "db", "db", "10.0.0.9") + &object("ops", "a", OLD, spec)
    };
    let strict = world(&text("{mtls: {mode: STRICT}}"));
    let ports = world(&text(
        "{selector: {matchLabels: {app: db}}, portLevelMtls: {9090: {mode: STRICT}, 80: {mode: \
         STRICT}}}",
    ));
    for (world, refused) in [(&strict, 'P'), (&ports, 'D')] {
        let at = |port| letter(&ask_for(world, Who::Outside, "ops/db", port, proto::TCP));
        assert_eq!((at(9090), at(80)), ('A', refused));
    }
    // A port that is strict by itself is refused by name, and open to whoever has an identity.
    let answer = ask_for(&ports, Who::Outside, "ops/db", 80, proto::TCP);
    assert_eq!(answer.policy().unwrap().to_string(), "PeerAuthentication/ops/a");
    assert_eq!(letter(&ask_for(&ports, Who::Legacy, "ops/db", 80, proto::TCP)), 'D');
    assert_eq!(letter(&ask_for(&ports, Who::Evil, "ops/db", 80, proto::TCP)), 'A');
    assert_eq!(letter(&ask_for(&ports, Who::Outside, "ops/db", 81, proto::TCP)), 'A');
}

#[test]
fn a_pod_s_own_label_is_part_of_the_floor() {
    let own = pod("shop", "vault", "vault", "10.0.0.8")
        .replace("{app: vault}", "{app: vault, signet.dev/mode: strict}");
    let objects = own + &object("shop", "a", OLD, "{mtls: {mode: PERMISSIVE}}");
    let ask_vault =
        |world: &World| letter(&ask_for(world, Who::Outside, "shop/vault", 80, proto::TCP));
    assert_eq!(ask_vault(&world(&objects)), 'P');
    let labels = "signet.dev/mode: permissive, signet.dev/allow-pod-override: \"true\"";
    assert_eq!(ask_vault(&world_with(labels, &objects)), 'A');
}
