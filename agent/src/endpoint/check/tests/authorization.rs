//! AuthorizationPolicy, row by row.

use super::*;

/// Specs of policies p0, p1, … in `shop`, and the four columns at port 80.
fn rows(rows: &[(&[&str], &str)]) {
    for (specs, wanted) in rows {
        let world = world(&policies(specs));
        assert_eq!(row(&world, 80), *wanted, "{specs:?}");
    }
}

fn policies(specs: &[&str]) -> String {
    let each = specs.iter().enumerate();
    each.map(|(i, spec)| authorization(&format!("p{i}"), spec)).collect()
}

fn remarks(world: &World) -> Vec<String> {
    let all = world.policies.policies.iter().flat_map(|p| &p.remarks);
    all.filter(|r| r.is_fault).map(ToString::to_string).collect()
}

const FRONT: &str = "cluster.local/ns/shop/sa/front";

#[test]
fn order_and_empty_shapes() {
    let allow_front = format!("{{rules: [{{from: [{{source: {{principals: [{FRONT}]}}}}]}}]}}");
    let deny_front =
        format!("{{action: DENY, rules: [{{from: [{{source: {{principals: [{FRONT}]}}}}]}}]}}");
    let (allow, deny) = (allow_front.as_str(), deny_front.as_str());
    rows(&[
        (&[], "AAAA"),
        (&[allow], "ANNN"),
        (&[deny], "DAAA"),
        (&[allow, deny], "DNNN"),
        (&["{}"], "NNNN"),
        (&["{action: ALLOW}"], "NNNN"),
        (&["{rules: []}"], "NNNN"),
        (&["{action: DENY}"], "AAAA"),
        (&["{action: DENY, rules: []}"], "AAAA"),
        (&["{rules: [{}]}"], "AAAA"),
        (&["{action: DENY, rules: [{}]}"], "DDDD"),
        (&["{}", allow], "ANNN"),
        (&["{rules: [{}]}", deny], "DAAA"),
        (&["{rules: [{from: [], to: [], when: []}]}"], "AAAA"),
    ]);
    // A policy without spec at all.
    let bare = "---\napiVersion: security.istio.io/v1beta1\nkind: AuthorizationPolicy\nmetadata: \
                {name: p, namespace: shop}\n";
    assert_eq!(row(&world(bare), 80), "NNNN");
}

#[test]
fn nesting() {
    rows(&[
        // Sources are ORed, fields ANDed, values ORed.
        (
            &[
                "{rules: [{from: [{source: {namespaces: [shop]}}, {source: {namespaces: [evil]}}]}]}",
            ],
            "AANN",
        ),
        (&["{rules: [{from: [{source: {namespaces: [shop, evil]}}]}]}"], "AANN"),
        (&["{rules: [{from: [{source: {namespaces: [shop], ipBlocks: [10.0.0.3]}}]}]}"], "NNNN"),
        (&["{rules: [{from: [{source: {namespaces: [evil], ipBlocks: [10.0.0.3]}}]}]}"], "NANN"),
        // Rules are ORed.
        (
            &[
                "{rules: [{from: [{source: {namespaces: [shop]}}]}, {to: [{operation: {ports: ['80']}}]}]}",
            ],
            "AAAA",
        ),
        (
            &[
                "{rules: [{from: [{source: {namespaces: [shop]}}]}, {to: [{operation: {ports: ['81']}}]}]}",
            ],
            "ANNN",
        ),
        // from AND to AND every when.
        (
            &[
                "{rules: [{from: [{source: {namespaces: [shop]}}], to: [{operation: {ports: ['81']}}]}]}",
            ],
            "NNNN",
        ),
        (
            &[
                "{rules: [{from: [{source: {namespaces: [shop]}}], to: [{operation: {ports: ['80', '81']}}]}]}",
            ],
            "ANNN",
        ),
        (
            &["{rules: [{to: [{operation: {ports: ['81']}}, {operation: {notPorts: ['90']}}]}]}"],
            "AAAA",
        ),
        (&["{rules: [{to: [{operation: {ports: ['80'], notPorts: ['80']}}]}]}"], "NNNN"),
        (
            &[
                "{rules: [{when: [{key: source.namespace, values: [shop]}, {key: destination.port, values: ['80']}]}]}",
            ],
            "ANNN",
        ),
        (
            &[
                "{rules: [{when: [{key: source.namespace, values: [shop]}, {key: destination.port, values: ['81']}]}]}",
            ],
            "NNNN",
        ),
        (
            &["{rules: [{when: [{key: source.namespace, values: ['*'], notValues: [evil]}]}]}"],
            "ANNN",
        ),
        // A match with every field empty never matches.
        (&["{rules: [{from: [{source: {}}]}]}"], "NNNN"),
        (&["{rules: [{from: [{}]}]}"], "NNNN"),
        (&["{rules: [{to: [{operation: {}}]}]}"], "NNNN"),
        (&["{action: DENY, rules: [{from: [{source: {}}]}]}"], "AAAA"),
        (&["{action: DENY, rules: [{from: [{source: {principals: []}}]}]}"], "AAAA"),
        (&["{rules: [{from: [{source: {}}, {source: {namespaces: [shop]}}]}]}"], "ANNN"),
        (&["{rules: [{when: [{key: source.ip}]}]}"], "NNNN"),
    ]);
}

/// Each form of string on each field, with and without an identity, in ALLOW and DENY.
#[test]
fn strings_on_every_field() {
    // What matches, of front, evil, legacy (proven by nothing) and nobody.
    let cases: &[(&str, &str)] = &[
        ("principals: [cluster.local/ns/shop/sa/front]", "x..."),
        ("principals: ['cluster.local/ns/shop/*']", "x..."),
        ("principals: ['cluster.local/*']", "xx.."),
        ("principals: ['*/sa/front']", "xx.."),
        ("principals: ['*/ns/evil/sa/front']", ".x.."),
        ("principals: ['*']", "xx.."),
        ("principals: ['*a*']", "...."),
        ("principals: [other.test/ns/shop/sa/front]", "...."),
        ("notPrincipals: [cluster.local/ns/shop/sa/front]", ".xxx"),
        ("notPrincipals: ['cluster.local/ns/shop/*']", ".xxx"),
        ("notPrincipals: ['*/sa/front']", "..xx"),
        ("notPrincipals: ['*']", "..xx"),
        ("namespaces: [shop]", "x..."),
        ("namespaces: ['sh*']", "x..."),
        ("namespaces: ['*il']", ".x.."),
        ("namespaces: ['*']", "xx.."),
        ("namespaces: ['*sho*']", "...."),
        ("notNamespaces: [shop]", ".xxx"),
        ("notNamespaces: ['*']", "..xx"),
        ("notNamespaces: ['e*']", "x.xx"),
        ("serviceAccounts: [front]", "x..."),
        ("serviceAccounts: [shop/front, evil/front]", "xx.."),
        ("serviceAccounts: [evil/front]", ".x.."),
        ("notServiceAccounts: [front]", ".xxx"),
        ("trustDomains: [cluster.local]", "xx.."),
        ("trustDomains: ['*']", "xx.."),
        ("trustDomains: ['clu*']", "xx.."),
        ("trustDomains: ['*.local']", "xx.."),
        ("trustDomains: [other.test]", "...."),
        ("notTrustDomains: [cluster.local]", "..xx"),
        ("notTrustDomains: [other.test]", "xxxx"),
        ("ipBlocks: [10.0.0.0/24]", "xxx."),
        ("ipBlocks: [192.0.2.9]", "...x"),
        ("ipBlocks: ['fd00::/8']", "...."),
        ("ipBlocks: ['::ffff:10.0.0.0/120']", "xxx."),
        ("ipBlocks: [10.0.0.2/31]", "xx.."),
        ("notIpBlocks: [10.0.0.0/24]", "...x"),
    ];
    for (field, matching) in cases {
        let source = format!("from: [{{source: {{{field}}}}}]");
        let allow = world(&authorization("p", &format!("{{rules: [{{{source}}}]}}")));
        let deny = world(&authorization("p", &format!("{{action: DENY, rules: [{{{source}}}]}}")));
        // The address shows that legacy is legacy/old: it satisfies a DENY, and never an ALLOW
        // that says anything about identities.
        let by_identity = !field.to_lowercase().contains("ipblocks");
        let column = |c: char, allowed: bool, index: usize| match (c, allowed) {
            ('x', true) if index == 2 && by_identity => 'N',
            ('x', true) => 'A',
            (_, true) => 'N',
            ('x', false) => 'D',
            (_, false) => 'A',
        };
        let wanted = |allowed: bool| -> String {
            matching.chars().enumerate().map(|(i, c)| column(c, allowed, i)).collect()
        };
        assert_eq!(row(&allow, 80), wanted(true), "ALLOW {field}");
        // legacy/old is of our own domain: what an address shows may satisfy these DENYs.
        let shown = match *field {
            "principals: ['cluster.local/*']"
            | "principals: ['*']"
            | "namespaces: ['*']"
            | "trustDomains: [cluster.local]"
            | "trustDomains: ['*']"
            | "trustDomains: ['clu*']"
            | "trustDomains: ['*.local']" => {
                let mut row: Vec<char> = wanted(false).chars().collect();
                row[2] = 'D';
                row.into_iter().collect()
            }
            _ => wanted(false),
        };
        assert_eq!(row(&deny, 80), shown, "DENY {field}");
    }
}

/// The fixture that passes without testing anything.
#[test]
fn a_principal_with_the_scheme_never_matches_and_is_told() {
    for pattern in ["spiffe://cluster.local/ns/shop/sa/front", "spiffe://cluster.local/*"] {
        let spec = |action: &str| {
            format!(
                "{{action: {action}, rules: [{{from: [{{source: {{principals: ['{pattern}']}}}}]}}]}}"
            )
        };
        let world = super::world(&authorization("p", &spec("ALLOW")));
        assert_eq!(row(&world, 80), "NNNN");
        let said = remarks(&world);
        assert_eq!(said.len(), 1);
        assert!(
            said[0].starts_with("spec.rules[0].from[0].source.principals[0]: \"spiffe://")
                && said[0].contains("can never match: principals stand without spiffe://"),
            "{said:?}"
        );
        let world = super::world(&authorization("p", &spec("DENY")));
        assert_eq!(row(&world, 80), "AAAA");
        assert_eq!(remarks(&world).len(), 1);
    }
    // The control says nothing.
    let spec = format!("{{rules: [{{from: [{{source: {{principals: [{FRONT}]}}}}]}}]}}");
    assert!(remarks(&world(&authorization("p", &spec))).is_empty());
}

#[test]
fn a_federated_identity_needs_an_allow_that_names_its_domain() {
    let judged = |specs: &[&str]| letter(&ask(&world(&policies(specs)), Who::Partner, 80));
    let allow = |source: &str| format!("{{rules: [{{from: [{{source: {{{source}}}}}]}}]}}");
    assert_eq!(judged(&[]), 'N');
    assert_eq!(judged(&["{rules: [{}]}"]), 'N');
    for source in [
        "principals: ['*']",
        "principals: ['*/sa/front']",
        "principals: ['partner*']",
        "namespaces: [shop]",
        "serviceAccounts: [front]",
        "trustDomains: ['*']",
        "trustDomains: ['partner*']",
        "notNamespaces: [evil]",
        "notTrustDomains: [other.test]",
    ] {
        assert_eq!(judged(&[&allow(source)]), 'N', "{source}");
    }
    for source in [
        "principals: ['partner.test/*']",
        "principals: [partner.test/ns/shop/sa/front]",
        "trustDomains: [partner.test]",
        "trustDomains: [partner.test], namespaces: [shop]",
    ] {
        assert_eq!(judged(&[&allow(source)]), 'A', "{source}");
    }
    assert_eq!(judged(&[&allow("trustDomains: [partner.test], namespaces: [evil]")]), 'N');
    // In a `when` as well, and beside sources that say nothing of it.
    let when = "{rules: [{from: [{source: {notNamespaces: [x]}}], when: [{key: source.principal, \
                values: ['partner.test/*']}]}]}";
    assert_eq!(judged(&[when]), 'A');
    // What names no domain denies in all of them.
    let named = allow("trustDomains: [partner.test]");
    for source in
        ["principals: ['*/sa/front']", "trustDomains: ['*']", "notPrincipals: ['*/sa/front']"]
    {
        let deny = format!("{{action: DENY, rules: [{{from: [{{source: {{{source}}}}}]}}]}}");
        assert_eq!(judged(&[&named, &deny]), 'D', "{source}");
    }
}

#[test]
fn ports_are_the_workload_s() {
    let world = world(&policies(&["{rules: [{to: [{operation: {ports: ['5432', '5433']}}]}]}"]));
    assert_eq!([5432, 5433, 80].map(|port| row(&world, port)), ["AAAA", "AAAA", "NNNN"]);
    let world = super::world(&policies(&[
        "{action: DENY, rules: [{to: [{operation: {notPorts: ['80']}}]}]}",
    ]));
    assert_eq!([80, 81].map(|port| row(&world, port)), ["AAAA", "DDDD"]);
    // What is no port is refused, and told.
    for port in ["http", "0", "70000", "80-90", "+80", "*"] {
        let rule = format!(
            "rules: [{{from: [{{source: {{namespaces: [shop]}}}}], to: [{{operation: {{ports: ['{port}']}}}}]}}]"
        );
        let world = super::world(&policies(&[&format!("{{{rule}}}")]));
        assert_eq!(row(&world, 80), "UUUU", "{port}");
        assert!(remarks(&world)[0].contains("is not a port"), "{:?}", remarks(&world));
        let world = super::world(&policies(&[&format!("{{action: DENY, {rule}}}")]));
        assert_eq!(row(&world, 80), "UAAA", "{port}");
    }
}

#[test]
fn conditions_of_layer_4() {
    let when = |key: &str, values: &str| {
        format!("{{rules: [{{when: [{{key: {key}, values: [{values}]}}]}}]}}")
    };
    let not = |key: &str, values: &str| {
        format!("{{rules: [{{when: [{{key: {key}, notValues: [{values}]}}]}}]}}")
    };
    rows(&[
        (&[&when("source.ip", "10.0.0.0/30")], "AANN"),
        (&[&not("source.ip", "10.0.0.0/24")], "NNNA"),
        (&[&when("source.namespace", "evil")], "NANN"),
        (&[&not("source.namespace", "evil")], "ANNA"),
        (&[&when("source.principal", FRONT)], "ANNN"),
        (&[&not("source.principal", "'*'")], "NNNA"),
        (&[&when("destination.ip", "10.0.0.1")], "AAAA"),
        (&[&when("destination.ip", "10.0.0.5")], "NNNN"),
        (&[&not("destination.ip", "10.0.0.1")], "NNNN"),
        (&[&when("destination.port", "'80'")], "AAAA"),
        (&[&not("destination.port", "'80'")], "NNNN"),
    ]);
    let deny = |text: String| text.replacen('{', "{action: DENY, ", 1);
    rows(&[
        (&[&deny(when("destination.ip", "10.0.0.1"))], "DDDD"),
        (&[&deny(when("destination.ip", "10.0.0.5"))], "AAAA"),
        // Without a value that is an address: counts as matching.
        (&[&deny(when("source.ip", "nowhere"))], "UUUU"),
        (&[&when("source.ip", "nowhere")], "UUUU"),
    ]);
}

/// What asks about requests, in each place, in ALLOW and DENY, where no request is seen.
#[test]
fn a_request_that_nobody_sees_never_widens() {
    let l4 = "from: [{source: {namespaces: [shop]}}]";
    let places = [
        ("from: [{source: {namespaces: [shop], requestPrincipals: ['*']}}]", "UAAA"),
        ("from: [{source: {namespaces: [shop], notRequestPrincipals: ['*']}}]", "UAAA"),
        ("from: [{source: {namespaces: [shop], remoteIpBlocks: [10.0.0.0/8]}}]", "UAAA"),
        ("from: [{source: {namespaces: [shop], notRemoteIpBlocks: [10.0.0.0/8]}}]", "UAAA"),
        // Alone they count as matching everybody.
        ("from: [{source: {requestPrincipals: ['*']}}]", "UUUU"),
        ("to: [{operation: {methods: [GET]}}]", "UUUU"),
        ("to: [{operation: {notMethods: [GET]}}]", "UUUU"),
        ("to: [{operation: {paths: [/x]}}]", "UUUU"),
        ("to: [{operation: {notPaths: [/x]}}]", "UUUU"),
        ("to: [{operation: {hosts: [x]}}]", "UUUU"),
        ("to: [{operation: {notHosts: [x]}}]", "UUUU"),
        ("to: [{operation: {methods: [GET], ports: ['81']}}]", "AAAA"),
        ("to: [{operation: {methods: [GET], ports: ['80']}}]", "UUUU"),
        ("when: [{key: 'request.headers[x]', values: [y]}]", "UUUU"),
        ("when: [{key: 'request.auth.claims[x]', notValues: [y]}]", "UUUU"),
        ("when: [{key: connection.sni, values: [y]}]", "UUUU"),
        (
            "when: [{key: source.ip, values: [10.0.0.2]}, {key: 'request.headers[x]', values: \
             [y]}]",
            "UAAA",
        ),
    ];
    for (rule, denied) in places {
        let deny = format!("{{action: DENY, rules: [{{{rule}}}]}}");
        let allow = format!("{{rules: [{{{rule}}}]}}");
        rows(&[
            (&[&deny], denied),
            (&[&allow], "NNNN"),
            // Another rule of the same policy holds as it is.
            (&[&format!("{{rules: [{{{rule}}}, {{{l4}}}]}}")], "ANNN"),
            (&[&allow, &format!("{{rules: [{{{l4}}}]}}")], "ANNN"),
        ]);
        for spec in [&deny, &allow] {
            let world = world(&policies(&[spec]));
            assert!(remarks(&world).is_empty(), "{spec}");
            let said: Vec<String> =
                world.policies.policies[0].remarks.iter().map(ToString::to_string).collect();
            let asks = said.iter().any(|said| said.contains("it asks about HTTP requests"));
            assert!(asks, "{spec}: {said:?}");
        }
    }
    // One of the namespace is judged whatever it requests.
    let either = "from: [{source: {requestPrincipals: ['*']}}, {source: {namespaces: [shop]}}]";
    rows(&[
        (&[&format!("{{action: DENY, rules: [{{{either}}}]}}")], "DUUU"),
        (&[&format!("{{rules: [{{{either}}}]}}")], "ANNN"),
    ]);
    // What cannot be evaluated whatever is requested is told apart.
    let unknown =
        "when: [{key: source.ip, values: [10.0.0.2]}, {key: request.method, values: [y]}]";
    rows(&[
        (&[&format!("{{action: DENY, rules: [{{{unknown}}}]}}")], "UAAA"),
        (&[&format!("{{rules: [{{{unknown}}}]}}")], "UUUU"),
    ]);
    let said = remarks(&world(&policies(&[&format!("{{rules: [{{{unknown}}}]}}")])));
    assert!(said[0].contains("\"request.method\" is not a key"), "{said:?}");
    // A DENY that is understood is told as such though another counts as matching.
    let deny = "{action: DENY, rules: [{to: [{operation: {methods: [GET]}}]}]}";
    let plain = "{action: DENY, rules: [{from: [{source: {namespaces: [shop]}}]}]}";
    rows(&[(&[deny, plain], "DUUU")]);
}

#[test]
fn what_the_api_server_would_refuse_fails_closed() {
    let accounts = |values: &str| {
        format!("{{rules: [{{from: [{{source: {{serviceAccounts: [{values}]}}}}]}}]}}")
    };
    let many = vec!["front"; 17].join(", ");
    let long = format!("shop/{}", "a".repeat(316));
    for spec in [
        accounts("'*'"),
        accounts("shop/*"),
        accounts("a/b/c"),
        accounts(&many),
        accounts(&long),
        "{rules: [{from: [{source: {serviceAccounts: [front], namespaces: [shop]}}]}]}".into(),
        format!(
            "{{rules: [{{from: [{{source: {{serviceAccounts: [front], principals: [{FRONT}]}}}}]}}]}}"
        ),
        "{rules: [{from: [{source: {ipBlocks: [10.0.0.300]}}]}]}".into(),
    ] {
        rows(&[(&[&spec], "UUUU")]);
        rows(&[(&[&spec.replacen('{', "{action: DENY, ", 1)], "UUUU")]);
        assert!(!remarks(&world(&policies(&[&spec]))).is_empty());
    }
}

#[test]
fn custom_denies_what_it_selects_and_audit_only_reports() {
    let custom = "{action: CUSTOM, provider: {name: x}, selector: {matchLabels: {app: db}}, rules: \
                  [{to: [{operation: {paths: [/admin]}}]}]}";
    rows(&[(&[custom], "UUUU")]);
    let other = world(&policies(&[&custom.replace("app: db", "app: web")]));
    assert_eq!(row(&other, 80), "AAAA");
    assert!(remarks(&other)[0].contains("CUSTOM asks an external authorizer"));
    rows(&[
        (&["{action: AUDIT, rules: [{from: [{source: {namespaces: [shop]}}]}]}"], "aAAA"),
        (&["{action: AUDIT, rules: [{}]}", "{action: DENY, rules: [{}]}"], "DDDD"),
        (&["{action: AUDIT}"], "AAAA"),
    ]);
}

#[test]
fn dry_runs_are_reported_and_decide_nothing() {
    let with = |policies: &[(&str, bool)]| {
        let text: String = policies
            .iter()
            .enumerate()
            .map(|(i, (spec, dry))| {
                let annotation = if *dry { "istio.io/dry-run: 'true'" } else { "" };
                authorization_in("shop", &format!("p{i}"), annotation, spec)
            })
            .collect();
        world(&text)
    };
    let allow_shop = "{rules: [{from: [{source: {namespaces: [shop]}}]}]}";
    let allow_evil = "{rules: [{from: [{source: {namespaces: [evil]}}]}]}";
    let deny_shop = "{action: DENY, rules: [{from: [{source: {namespaces: [shop]}}]}]}";
    type Row<'a> = (&'a [(&'a str, bool)], &'a str);
    let cases: &[Row<'_>] = &[
        (&[(deny_shop, true)], "aAAA"),
        (&[(deny_shop, false)], "DAAA"),
        (&[(allow_shop, true)], "Aaaa"),
        (&[(allow_shop, true), (allow_evil, false)], "NANN"),
        (&[(allow_shop, false), (deny_shop, true)], "aNNN"),
        (&[(allow_shop, true), (deny_shop, false)], "Daaa"),
        (&[("{}", true)], "aaaa"),
        (&[("{action: DENY}", true)], "AAAA"),
        (&[("{action: CUSTOM}", true)], "aaaa"),
    ];
    for (policies, wanted) in cases {
        let world = with(policies);
        // An AUDIT is of a flow that passes: its reason is "allowed".
        assert_eq!(row(&world, 80), *wanted, "{policies:?}");
    }
    let answer = ask(&with(&[(deny_shop, true)]), Who::Front, 80);
    assert!(answer.passes());
    assert_eq!(answer.policy().unwrap().to_string(), "AuthorizationPolicy/shop/p0");
    assert_eq!(
        answer.sides.last().unwrap().sentence,
        "no policy is about its ingress, and the default is allow; the dry run shop/p0 would \
         refuse it"
    );
    // A value that is neither is enforced, and told.
    let odd = world(&authorization_in("shop", "p", "istio.io/dry-run: 'yes'", deny_shop));
    assert_eq!(row(&odd, 80), "DAAA");
    assert!(remarks(&odd)[0].contains("is not \"true\" or \"false\""));
}

#[test]
fn scope_follows_selectors_namespaces_and_labels() {
    let deny = |space: &str, selector: &str| {
        authorization_in(space, "p", "", &format!("{{action: DENY, {selector}rules: [{{}}]}}"))
    };
    let judged =
        |text: &str, to: &str| letter(&ask_for(&world(text), Who::Evil, to, 80, proto::TCP));
    let db = "selector: {matchLabels: {app: db}}, ";
    for (text, at_db, at_web) in [
        (deny("shop", ""), 'D', 'D'),
        (deny("shop", db), 'D', 'A'),
        (deny("shop", "selector: {}, "), 'D', 'D'),
        (deny("shop", "selector: {matchLabels: {app: db, tier: x}}, "), 'A', 'A'),
        (deny("evil", ""), 'A', 'A'),
        (deny("evil", db), 'A', 'A'),
        (deny("istio-system", ""), 'D', 'D'),
        (deny("istio-system", db), 'D', 'A'),
    ] {
        assert_eq!(
            (judged(&text, "shop/db"), judged(&text, "shop/web")),
            (at_db, at_web),
            "{text}"
        );
    }
    // A pod whose label changes leaves the scope.
    let relabelled = deny("shop", "selector: {matchLabels: {app: cache}}, ");
    assert_eq!(judged(&relabelled, "shop/db"), 'A');
    let pod = pod("shop", "db", "db", "10.0.0.1").replace("app: db", "app: cache");
    let mut manifests = Manifests::default();
    let text = namespace("shop", "signet.dev/mode: permissive") + &pod + &relabelled;
    manifests.add(Path::new("t.yaml"), &text, ROOT_NAMESPACE).unwrap();
    let changed = manifests.world(&SourceParams::new(domain()), Arc::default());
    assert_eq!(letter(&ask(&changed, Who::Outside, 80)), 'D');
    // Another root namespace.
    let mut manifests = Manifests::default();
    let text = namespace("shop", "signet.dev/mode: permissive")
        + &super::pod("shop", "db", "db", "10.0.0.1")
        + &deny("mesh", "");
    manifests.add(Path::new("t.yaml"), &text, "mesh").unwrap();
    let root = manifests.world(&SourceParams::new(domain()), Arc::default());
    assert_eq!(letter(&ask(&root, Who::Outside, 80)), 'D');
}

#[test]
fn target_refs_are_not_ours_and_are_told() {
    let spec = "{action: DENY, targetRefs: [{kind: Service, group: '', name: db}], rules: [{}]}";
    let world = world(&authorization("p", spec));
    assert_eq!(row(&world, 80), "AAAA");
    assert_eq!(
        remarks(&world),
        ["spec.targetRefs: it is about Service db, where a waypoint or gateway enforces it: not \
          in force here; write selector to have it enforced on pods"]
    );
    // An empty list is none.
    let spec = "{action: DENY, targetRefs: [], rules: [{}]}";
    assert_eq!(row(&super::world(&authorization("p", spec)), 80), "DDDD");
}

#[test]
fn verdicts_name_the_policy() {
    let sentence = |specs: &[&str], who| {
        let world = world(&policies(specs));
        ask(&world, who, 80).sides.last().unwrap().sentence.clone()
    };
    let deny = "{action: DENY, rules: [{from: [{source: {namespaces: [evil]}}]}]}";
    let allow = "{rules: [{from: [{source: {namespaces: [shop]}}]}]}";
    assert_eq!(sentence(&[deny], Who::Evil), "explicitly denied by shop/p0");
    assert_eq!(
        sentence(&[allow, allow], Who::Evil),
        "ALLOW policies exist (2: shop/p0, shop/p1), none matched"
    );
    assert_eq!(sentence(&[allow], Who::Front), "allowed by shop/p0");
    assert_eq!(sentence(&[deny], Who::Front), "no DENY matched, no ALLOW selects it");
}
