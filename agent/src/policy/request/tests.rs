use http::HeaderValue;
use proptest::{option, prelude::*, sample::select};
use serde_json::json;
use signet_ebpf::abi::{Reason, proto};

use super::*;
use crate::{
    config::yaml::parse_one,
    policy::{
        compile::tests as generated, end_user::tests as tokens, evaluate::PeerIdentity, istio,
    },
    spiffe::{SpiffeId, TrustDomain},
};

const FRONT: &str = "spiffe://cluster.local/ns/shop/sa/front";

/// A request as the tables have it.
#[derive(Clone)]
struct Request {
    method: &'static str,
    path: &'static str,
    host: &'static str,
    headers: Vec<(&'static str, &'static [u8])>,
    sni: Option<&'static str>,
    remote: &'static str,
    claims: Option<serde_json::Value>,
    from: Option<&'static str>,
}

const PLAIN: Request = Request {
    method: "GET",
    path: "/api/v1/payments",
    host: "pay.shop",
    headers: Vec::new(),
    sni: None,
    remote: "10.0.0.1",
    claims: None,
    from: Some(FRONT),
};

fn policies(specs: &[&str]) -> Vec<Arc<Policy>> {
    specs
        .iter()
        .enumerate()
        .map(|(index, spec)| {
            let annotation = match spec.strip_prefix("dry ") {
                Some(_) => ", annotations: {istio.io/dry-run: \"true\"}",
                None => "",
            };
            let spec = spec.strip_prefix("dry ").unwrap_or(spec);
            let text = format!(
                "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {{name: \
                 p{index}, namespace: shop{annotation}}}\nspec: {spec}\n"
            );
            let object = parse_one(&text).unwrap().unwrap();
            let read = istio::read_authorization(&object, "istio-system");
            Arc::new(read.unwrap_or_else(|error| panic!("{spec}: {error}")))
        })
        .collect()
}

/// What becomes of a flow and of a request on it: refused before it, and on it.
struct Judged {
    unseen: Outcome,
    before: Outcome,
    request: Outcome,
    depends: bool,
}

fn judged(policies: &[Arc<Policy>], request: &Request) -> Judged {
    let domain = TrustDomain::parse("cluster.local").unwrap();
    let from = request.from.map(|id| SpiffeId::parse(id).unwrap());
    let flow = FlowFacts {
        direction: Direction::Ingress,
        trust_domain: &domain,
        aliases: &[],
        peer: from.as_ref().map_or(PeerIdentity::Unknown, PeerIdentity::Authenticated),
        peer_ip: "10.0.0.1".parse().unwrap(),
        local_ips: &[],
        port: 8080,
        protocol: proto::TCP,
    };
    let mut headers = HeaderMap::new();
    for (name, value) in &request.headers {
        let name: HeaderName = name.parse().unwrap();
        headers.append(name, HeaderValue::from_bytes(value).unwrap());
    }
    let user = request.claims.as_ref().map(tokens::user);
    let facts = RequestFacts {
        method: request.method,
        path: request.path,
        host: request.host,
        headers: &headers,
        sni: request.sni,
        remote_ip: request.remote.parse().unwrap(),
        user: user.as_ref(),
    };
    Judged {
        unseen: evaluate(policies, false, &flow),
        before: evaluate_before_requests(policies, false, &flow),
        request: evaluate_request(policies, false, &flow, &facts),
        depends: depends_on_requests(policies, false, &flow),
    }
}

/// True when a rule of an ALLOW with this `to`, `from` or `when` matches the request. The same
/// rule in a DENY must then refuse it and otherwise not, and in a dry run and an AUDIT be
/// reported: each row is asked in all of them.
fn matches(rule: &str, request: &Request) -> bool {
    let spec = |action: &str| format!("{{action: {action}, rules: [{{{rule}}}]}}");
    let allow = policies(&[&spec("ALLOW")]);
    let deny = policies(&[&spec("DENY")]);
    let audit = policies(&[&spec("AUDIT")]);
    let dry = policies(&[&format!("dry {}", spec("DENY"))]);
    assert!(asks_requests(&allow) && asks_requests(&dry), "{rule}");
    let allowed = judged(&allow, request);
    let matches = allowed.request.is_allowed();
    let wanted = if matches { Reason::Allowed } else { Reason::PolicyNoMatch };
    assert_eq!(allowed.request.reason, wanted, "{rule}");
    assert_eq!(allowed.unseen.reason, Reason::PolicyNoMatch, "unseen, {rule}");
    let denied = judged(&deny, request);
    let wanted = if matches { Reason::PolicyDeny } else { Reason::Allowed };
    assert_eq!(denied.request.reason, wanted, "DENY {rule}");
    assert_eq!(denied.unseen.reason, Reason::PolicyUnsupported, "unseen DENY {rule}");
    assert!(denied.before.is_allowed() && denied.depends, "before DENY {rule}");
    for reported in [&audit, &dry] {
        let judged = judged(reported, request);
        assert!(judged.request.is_allowed(), "{rule}");
        assert_eq!(judged.request.audit.is_some(), matches, "{rule}");
        assert!(judged.before.audit.is_none() && judged.unseen.audit.is_some(), "{rule}");
    }
    matches
}

fn to(operation: &str) -> String {
    format!("to: [{{operation: {{{operation}}}}}]")
}

#[test]
fn each_form_on_methods_paths_and_hosts() {
    let get = PLAIN;
    let rows: &[(&str, bool)] = &[
        ("methods: [GET]", true),
        ("methods: [get]", false),
        ("methods: [POST, GET]", true),
        ("methods: ['G*']", true),
        ("methods: ['*ET']", true),
        ("methods: ['*']", true),
        ("methods: [GE]", false),
        ("notMethods: [GET]", false),
        ("notMethods: [POST]", true),
        ("notMethods: ['*']", false),
        ("paths: [/api/v1/payments]", true),
        ("paths: [/api/v1/payments/]", false),
        ("paths: ['/api/*']", true),
        ("paths: ['*/payments']", true),
        ("paths: ['*']", true),
        ("paths: ['/api/v1/pay']", false),
        ("paths: ['/api/{*}/payments']", true),
        ("paths: ['/{*}/payments']", false),
        ("paths: ['/api/{**}']", true),
        ("paths: ['/{**}/payments']", true),
        ("paths: ['/api/v1/payments/{**}']", false),
        ("notPaths: ['/api/*']", false),
        ("notPaths: ['/admin/{**}']", true),
        ("hosts: [pay.shop]", true),
        ("hosts: [PAY.Shop]", true),
        ("hosts: ['*.shop']", true),
        ("hosts: ['pay.*']", true),
        ("hosts: ['*']", true),
        ("hosts: ['pay.shop:*']", false),
        ("notHosts: [pay.shop]", false),
        ("notHosts: [other.shop]", true),
        // Fields are ANDed.
        ("methods: [GET], paths: ['/api/*'], hosts: [pay.shop]", true),
        ("methods: [GET], paths: ['/admin/*']", false),
        ("methods: [POST], paths: ['/api/*']", false),
        ("methods: [GET], notPaths: ['*/payments']", false),
        ("methods: [GET], ports: ['8080']", true),
    ];
    for (operation, wanted) in rows {
        assert_eq!(matches(&to(operation), &get), *wanted, "{operation}");
    }
    // Case does not count in what is asked for either, and a port is part of the host.
    let shouting = Request { host: "PAY.SHOP:8443", ..PLAIN };
    assert!(matches(&to("hosts: ['pay.shop:8443']"), &shouting));
    assert!(matches(&to("hosts: ['pay.shop:*']"), &shouting));
    assert!(!matches(&to("hosts: [pay.shop]"), &shouting));
    assert!(matches(&to("notHosts: [pay.shop]"), &shouting));
    // Without a host: present is not asked of what every request has.
    let nameless = Request { host: "", ..PLAIN };
    assert!(!matches(&to("hosts: [pay.shop]"), &nameless));
    assert!(matches(&to("notHosts: [pay.shop]"), &nameless));
}

#[test]
fn operations_are_ored_and_clauses_are_anded() {
    let rows: &[(&str, bool)] = &[
        ("to: [{operation: {methods: [POST]}}, {operation: {paths: ['/api/*']}}]", true),
        ("to: [{operation: {methods: [POST]}}, {operation: {paths: ['/x']}}]", false),
        ("from: [{source: {namespaces: [shop]}}], to: [{operation: {methods: [GET]}}]", true),
        ("from: [{source: {namespaces: [evil]}}], to: [{operation: {methods: [GET]}}]", false),
        (
            "from: [{source: {namespaces: [evil]}}, {source: {principals: ['*/sa/front']}}], to: \
             [{operation: {methods: [GET]}}]",
            true,
        ),
        ("to: [{operation: {methods: [GET]}}], when: [{key: remote.ip, values: [10.0.0.1]}]", true),
        (
            "to: [{operation: {methods: [GET]}}], when: [{key: remote.ip, values: [10.0.0.2]}]",
            false,
        ),
        (
            "when: [{key: 'request.headers[a]', notValues: [x]}, {key: source.namespace, values: \
             [shop]}]",
            true,
        ),
        (
            "when: [{key: 'request.headers[a]', notValues: [x]}, {key: 'request.headers[b]', \
             values: [x]}]",
            false,
        ),
    ];
    for (rule, wanted) in rows {
        let allow = policies(&[&format!("{{rules: [{{{rule}}}]}}")]);
        assert_eq!(judged(&allow, &PLAIN).request.is_allowed(), *wanted, "{rule}");
        let deny = policies(&[&format!("{{action: DENY, rules: [{{{rule}}}]}}")]);
        assert_eq!(judged(&deny, &PLAIN).request.is_allowed(), !*wanted, "{rule}");
    }
    // Rules are ORed, and so are ALLOW policies.
    let two = "{rules: [{to: [{operation: {methods: [PUT]}}]}, {to: [{operation: {methods: \
               [GET]}}]}]}";
    assert!(judged(&policies(&[two]), &PLAIN).request.is_allowed());
    let put = "{rules: [{to: [{operation: {methods: [PUT]}}]}]}";
    let get = "{rules: [{to: [{operation: {methods: [GET]}}]}]}";
    assert!(!judged(&policies(&[put]), &PLAIN).request.is_allowed());
    let both = judged(&policies(&[put, get]), &PLAIN);
    assert_eq!(both.request.policy.unwrap().name.name.to_string(), "p1");
    // DENY goes first.
    let deny = "{action: DENY, rules: [{to: [{operation: {paths: ['/api/*']}}]}]}";
    let all = judged(&policies(&[put, get, deny]), &PLAIN).request;
    assert_eq!((all.reason, &*all.policy.unwrap().name.name), (Reason::PolicyDeny, "p2"));
}

#[test]
fn headers_by_name_in_any_case_joined_by_commas() {
    let when = |field: &str| format!("when: [{{key: 'request.headers[X-Tier]', {field}}}]");
    let with = |values: &[&'static [u8]]| Request {
        headers: values.iter().map(|value| ("x-TIER", *value)).collect(),
        ..PLAIN
    };
    let rows: &[(&str, &[&'static [u8]], bool)] = &[
        ("values: [gold]", &[b"gold"], true),
        ("values: [gold]", &[b"Gold"], false),
        ("values: [gold]", &[], false),
        ("values: [gold]", &[b""], false),
        ("values: ['go*']", &[b"gold"], true),
        ("values: ['*ld']", &[b"gold"], true),
        ("values: ['*']", &[b"gold"], true),
        // Present, though empty; and absent.
        ("values: ['*']", &[b""], true),
        ("values: ['*']", &[], false),
        ("notValues: ['*']", &[], true),
        ("notValues: ['*']", &[b""], false),
        ("notValues: [gold]", &[b"gold"], false),
        ("notValues: [gold]", &[], true),
        ("notValues: [gold]", &[b"lead"], true),
        ("values: ['go*'], notValues: [gold]", &[b"gold"], false),
        ("values: ['go*'], notValues: [gold]", &[b"gods"], true),
        // Several are one.
        ("values: [gold]", &[b"gold", b"gold"], false),
        ("values: ['gold,lead']", &[b"gold", b"lead"], true),
        ("values: ['gold*']", &[b"gold", b"lead"], true),
        ("values: ['*gold']", &[b"gold", b"lead"], false),
        ("notValues: [gold]", &[b"gold", b"lead"], true),
        // Bytes that are no text.
        ("values: ['go*']", &[b"go\xff"], true),
        ("values: ['go\u{ff}']", &[b"go\xff"], false),
        ("values: ['*']", &[b"\xff"], true),
    ];
    for (field, values, wanted) in rows {
        assert_eq!(matches(&when(field), &with(values)), *wanted, "{field} {values:?}");
    }
    // HTTP/2 has its host elsewhere.
    assert!(matches("when: [{key: 'request.headers[Host]', values: [pay.shop]}]", &PLAIN));
}

#[test]
fn end_users_by_principal_audience_presenter_and_claims() {
    let claims = json!({
        "iss": "https://login.example/r/a", "sub": "alice", "aud": ["pay", "ledger"],
        "azp": "web", "groups": ["ops", "dev"], "scope": "read write", "level": 7,
        "realm": {"role": ["admin"], "name": "a", "deep": {"er": "x"}}, "spaced": "a b",
    });
    let alice = Request { claims: Some(claims), ..PLAIN };
    let from = |field: &str| format!("from: [{{source: {{{field}}}}}]");
    let rows: &[(&str, bool, bool)] = &[
        // For alice, and for nobody.
        ("requestPrincipals: ['*']", true, false),
        ("requestPrincipals: ['https://login.example/r/a/alice']", true, false),
        ("requestPrincipals: ['https://login.example/r/a/*']", true, false),
        ("requestPrincipals: ['*/alice']", true, false),
        ("requestPrincipals: ['https://login.example/r/b/*']", false, false),
        ("notRequestPrincipals: ['*']", false, true),
        ("notRequestPrincipals: ['*/alice']", false, true),
        ("notRequestPrincipals: ['*/bob']", true, true),
        ("namespaces: [shop], requestPrincipals: ['*']", true, false),
        ("remoteIpBlocks: [10.0.0.0/8]", true, true),
        ("remoteIpBlocks: [192.0.2.0/24]", false, false),
        ("notRemoteIpBlocks: [10.0.0.0/8]", false, false),
    ];
    for (field, named, nobody) in rows {
        assert_eq!(matches(&from(field), &alice), *named, "{field}");
        assert_eq!(matches(&from(field), &PLAIN), *nobody, "{field} without a token");
    }
    let rows: &[(&str, &str, bool, bool)] = &[
        ("request.auth.principal", "values: ['*/alice']", true, false),
        ("request.auth.principal", "notValues: ['*/alice']", false, true),
        ("request.auth.audiences", "values: [ledger]", true, false),
        ("request.auth.audiences", "values: [led*]", true, false),
        ("request.auth.audiences", "values: [other]", false, false),
        ("request.auth.audiences", "notValues: [pay]", false, true),
        ("request.auth.presenter", "values: [web]", true, false),
        ("request.auth.presenter", "notValues: [web]", false, true),
        ("request.auth.claims[groups]", "values: [dev]", true, false),
        ("request.auth.claims[groups]", "values: ['*']", true, false),
        ("request.auth.claims[groups]", "values: [de]", false, false),
        ("request.auth.claims[groups]", "notValues: [ops]", false, true),
        ("request.auth.claims[iss]", "values: ['https://login.example/*']", true, false),
        ("request.auth.claims[scope]", "values: [write]", true, false),
        ("request.auth.claims[scope]", "values: ['read write']", false, false),
        ("request.auth.claims[spaced]", "values: ['a b']", true, false),
        ("request.auth.claims[spaced]", "values: [a]", false, false),
        ("request.auth.claims[realm][role]", "values: [admin]", true, false),
        ("request.auth.claims[realm][deep][er]", "values: [x]", true, false),
        ("request.auth.claims[realm][none]", "values: ['*']", false, false),
        ("request.auth.claims[realm]", "values: ['*']", false, false),
        // Numbers are no texts.
        ("request.auth.claims[level]", "values: ['7']", false, false),
        ("request.auth.claims[level]", "notValues: ['7']", true, true),
    ];
    for (key, field, named, nobody) in rows {
        let rule = format!("when: [{{key: '{key}', {field}}}]");
        assert_eq!(matches(&rule, &alice), *named, "{rule}");
        assert_eq!(matches(&rule, &PLAIN), *nobody, "{rule} without a token");
    }
    // A token without a subject is nobody's principal.
    let nameless = Request { claims: Some(json!({"iss": "https://login.example/r/a"})), ..PLAIN };
    assert!(!matches(&from("requestPrincipals: ['*']"), &nameless));
}

#[test]
fn server_names_and_remote_addresses() {
    let named = Request { sni: Some("pay.shop"), ..PLAIN };
    let when = |field: &str| format!("when: [{{key: connection.sni, {field}}}]");
    for (field, wanted, without) in [
        ("values: ['*.shop']", true, false),
        ("values: ['*']", true, false),
        ("values: [other]", false, false),
        ("notValues: ['*.shop']", false, true),
    ] {
        assert_eq!(matches(&when(field), &named), wanted, "{field}");
        assert_eq!(matches(&when(field), &PLAIN), without, "{field}");
    }
    let far = Request { remote: "::ffff:192.0.2.7", ..PLAIN };
    assert!(matches("when: [{key: remote.ip, values: [192.0.2.0/24]}]", &far));
    assert!(!matches("when: [{key: remote.ip, notValues: [192.0.2.0/24]}]", &far));
    assert!(!matches("when: [{key: remote.ip, values: [10.0.0.0/8]}]", &far));
}

#[test]
fn a_flow_is_refused_before_its_requests_only_where_all_of_them_would_be() {
    let get_from_shop = "{rules: [{from: [{source: {namespaces: [shop]}}], to: [{operation: \
                         {methods: [GET]}}]}]}";
    let allow = policies(&[get_from_shop]);
    let front = judged(&allow, &PLAIN);
    assert!(front.before.is_allowed() && front.depends && front.request.is_allowed());
    assert!(!front.unseen.is_allowed());
    let evil = Request { from: Some("spiffe://cluster.local/ns/evil/sa/x"), ..PLAIN };
    let refused = judged(&allow, &evil);
    assert_eq!(refused.before.reason, Reason::PolicyNoMatch);
    assert!(!refused.depends && !refused.request.is_allowed());
    let nobody = judged(&allow, &Request { from: None, ..PLAIN });
    assert_eq!(nobody.before.reason, Reason::PolicyNoMatch);
    // Another port of the same workload needs no HTTP: its verdict depends on nothing.
    let database = "{rules: [{to: [{operation: {ports: ['8080']}}]}, {to: [{operation: {ports: \
                    ['80'], methods: [GET]}}]}]}";
    let open = judged(&policies(&[database]), &PLAIN);
    assert!(open.unseen.is_allowed() && open.before.is_allowed() && !open.depends);
    assert!(asks_requests(&policies(&[database])));
    // A DENY without requests refuses at once, whatever another one asks.
    let denies = policies(&[
        "{action: DENY, rules: [{to: [{operation: {paths: ['/admin/*']}}]}]}",
        "{action: DENY, rules: [{from: [{source: {namespaces: [shop]}}]}]}",
    ]);
    let denied = judged(&denies, &PLAIN);
    assert_eq!(denied.before.reason, Reason::PolicyDeny);
    assert_eq!(denied.unseen.reason, Reason::PolicyDeny);
    assert_eq!(&*denied.before.policy.unwrap().name.name, "p1");
    assert!(!asks_requests(&policies(&["{rules: [{to: [{operation: {ports: ['80']}}]}]}"])));
}

#[test]
fn what_cannot_be_read_never_widens_whatever_is_requested() {
    for rule in [
        "to: [{operation: {paths: ['/a/{*}b'], methods: [GET]}}]",
        "to: [{operation: {methods: [GET]}}], when: [{key: 'request.headers[]', values: [x]}]",
        "to: [{operation: {methods: [GET]}}], when: [{key: 'request.auth.claims[a][]', values: [x]}]",
        "to: [{operation: {methods: [GET]}}], when: [{key: experimental.x, values: [x]}]",
        "to: [{operation: {methods: [GET]}}], from: [{source: {remoteIpBlocks: [here]}}]",
    ] {
        let allow = policies(&[&format!("{{rules: [{{{rule}}}]}}")]);
        assert!(allow[0].remarks.iter().any(|remark| remark.is_fault), "{rule}");
        let allow = judged(&allow, &PLAIN).request;
        assert_eq!(allow.reason, Reason::PolicyUnsupported, "{rule}");
        let deny = policies(&[&format!("{{action: DENY, rules: [{{{rule}}}]}}")]);
        let refused = judged(&deny, &PLAIN).request;
        assert_eq!(refused.reason, Reason::PolicyUnsupported, "{rule}");
        // What the rest of the rule says narrows it.
        let post = judged(&deny, &Request { method: "POST", ..PLAIN }).request;
        assert!(post.is_allowed(), "{rule}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1500))]

    /// Whatever is requested lies between what is decided before requests are seen and what
    /// is decided where none is; and where the two agree it is as they say.
    #[test]
    fn a_request_lies_between_the_two_verdicts_without_one(
        policies in generated::policies(),
        default_deny: bool,
        ip in generated::addresses(),
        who in option::of(0usize..3),
        proven: bool,
        port in select(&[1u16, 53, 80, 8080][..]),
        method in select(&["GET", "POST", "PUT"][..]),
        path in select(&["/", "/a", "/a/b", "/x/b"][..]),
        host in select(&["shop.example", "Shop.Example:80", ""][..]),
        tier in option::of(select(&["gold", "lead", ""][..])),
        user in option::of(select(&["alice", "bob"][..])),
        sni in option::of(select(&["gold", "x"][..])),
    ) {
        let domain = generated::domain();
        let known = generated::identities();
        let id = who.map(|index| &known[index].1);
        let peer = match id {
            None => PeerIdentity::Unknown,
            Some(id) if proven => PeerIdentity::Authenticated(id),
            Some(id) => PeerIdentity::Address(id),
        };
        let flow = FlowFacts {
            direction: Direction::Ingress,
            trust_domain: &domain,
            aliases: &[],
            peer,
            peer_ip: ip,
            local_ips: &["10.1.2.3".parse().unwrap()],
            port,
            protocol: proto::TCP,
        };
        let mut headers = HeaderMap::new();
        if let Some(tier) = tier {
            headers.insert("x-tier", HeaderValue::from_static(tier));
        }
        let user = user.map(|name| tokens::user(&json!({
            "iss": "https://login.example", "sub": name, "aud": "gold", "azp": "lead",
            "tier": tier,
        })));
        let request = RequestFacts {
            method, path, host, headers: &headers, sni, remote_ip: ip, user: user.as_ref(),
        };
        let unseen = evaluate(&policies, default_deny, &flow);
        let before = evaluate_before_requests(&policies, default_deny, &flow);
        let seen = evaluate_request(&policies, default_deny, &flow, &request);
        prop_assert!(!unseen.is_allowed() || seen.is_allowed(), "unseen widens");
        prop_assert!(before.is_allowed() || !seen.is_allowed(), "refused too early");
        if !depends_on_requests(&policies, default_deny, &flow) {
            prop_assert_eq!(seen.is_allowed(), unseen.is_allowed());
            if seen.is_allowed() {
                prop_assert_eq!(&seen, &unseen);
            }
        }
        if !asks_requests(&policies) {
            prop_assert_eq!(&seen, &unseen);
            prop_assert_eq!(&seen, &before);
        }
    }
}
