//! Questions with an HTTP request.

use super::*;

/// Only the front pods may, with POST, at two paths.
const PAYMENTS: &str = "{selector: {matchLabels: {app: db}}, rules: [{from: [{source: {principals: \
     [cluster.local/ns/shop/sa/front]}}], to: [{operation: {methods: [POST], paths: \
     [/api/v1/payments, /api/v1/refunds]}}]}]}";

/// The same in our own words.
const NATIVE: &str = "---\napiVersion: signet.dev/v1alpha1\nkind: IdentityPolicy\nmetadata: {name: p, \
     namespace: shop}\nspec: {selector: {matchLabels: {app: db}}, ingress: [{from: [{serviceAccounts: \
     [front]}], http: [{methods: [POST], paths: [/api/v1/payments, /api/v1/refunds]}]}]}\n";

fn ask_request(
    world: &World,
    who: &str,
    to: &str,
    (method, path, claims): (&str, &str, &str),
) -> Answer {
    let mut question = Question::parse(who, to, "tcp", false, &domain()).unwrap();
    question.request = AskedRequest::parse(method, path, "", &[], claims).unwrap();
    check(world, &Setting::default(), &question).unwrap()
}

fn because(answer: &Answer) -> &str {
    let side = answer.sides.last().unwrap();
    &side.explanation.as_ref().unwrap().policies[0].rules[0].because
}

#[test]
fn one_caller_with_one_method_on_two_paths() {
    for policy in [authorization("p", PAYMENTS), NATIVE.to_owned()] {
        let world = world(&policy);
        let ask = |who: &str, method: &str, path: &str| {
            ask_request(&world, who, "shop/db:80", (method, path, ""))
        };
        for path in ["/api/v1/payments", "/api/v1/refunds"] {
            let answer = ask("shop/front", "POST", path);
            assert_eq!((letter(&answer), because(&answer)), ('A', "matches"), "{path}");
            assert!(answer.tunnelled && answer.notes.is_empty());
            assert_eq!(letter(&ask("evil/front", "POST", path)), 'N');
            // In clear nobody is proven, and the kernel leaves it to who sees the request.
            assert_eq!(letter(&ask("@10.0.0.4", "POST", path)), 'N');
        }
        for (method, path) in
            [("GET", "/api/v1/payments"), ("POST", "/api/v1/payments/1"), ("POST", "/")]
        {
            let answer = ask("shop/front", method, path);
            assert_eq!((answer.verdict, letter(&answer)), (Verdict::Dropped, 'N'));
            assert_eq!(because(&answer), format!("is not about {method} {path} at port 80/tcp"));
        }
        // Without a request it fails closed, and says what is missing.
        let bare = ask_for(&world, Who::Front, "shop/db", 80, proto::TCP);
        assert_eq!(letter(&bare), 'N');
        assert!(because(&bare).contains("only requests that it asks for"), "{}", because(&bare));
        assert!(bare.notes[0].contains("give --method"), "{:?}", bare.notes);
        // Of others nothing is asked.
        let web = ask_request(&world, "evil/front", "shop/web:80", ("GET", "/", ""));
        assert_eq!(letter(&web), 'A');
    }
}

#[test]
fn plaintext_is_judged_by_its_request_where_it_is_taken_at_all() {
    let deny = "{action: DENY, rules: [{to: [{operation: {paths: ['/admin/*']}}]}]}";
    let deny = authorization("p", deny);
    let ask = |world: &World, path: &str| {
        letter(&ask_request(world, "@192.0.2.9", "shop/db:80", ("GET", path, "")))
    };
    let permissive = world(&deny);
    assert_eq!((ask(&permissive, "/"), ask(&permissive, "/admin/x")), ('A', 'D'));
    assert_eq!(letter(&super::ask(&permissive, Who::Outside, 80)), 'U');
    let strict = world_with("signet.dev/mode: strict", &deny);
    assert_eq!((ask(&strict, "/"), ask(&strict, "/admin/x")), ('P', 'P'));
    // UDP has no requests.
    let udp = ask_for(&permissive, Who::Front, "shop/db", 80, proto::UDP);
    assert_eq!(letter(&udp), 'U');
}

#[test]
fn on_behalf_of_a_user_of_a_group() {
    let world = world(&authorization(
        "p",
        "{rules: [{from: [{source: {namespaces: [shop], requestPrincipals: \
         ['https://login.example/*']}}], when: [{key: 'request.auth.claims[groups]', values: \
         [buyers]}]}]}",
    ));
    let ask = |claims: &str| {
        letter(&ask_request(&world, "shop/front", "shop/db:80", ("GET", "/", claims)))
    };
    let claims = |issuer: &str, group: &str| {
        format!("{{\"iss\": \"{issuer}\", \"sub\": \"alice\", \"groups\": [\"{group}\"]}}")
    };
    assert_eq!(ask(&claims("https://login.example", "buyers")), 'A');
    assert_eq!(ask(&claims("https://login.example", "sellers")), 'N');
    assert_eq!(ask(&claims("https://evil.example", "buyers")), 'N');
    assert_eq!(ask(""), 'N');
}
