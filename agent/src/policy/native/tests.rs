use proptest::prelude::*;

use super::*;
use crate::config::yaml::parse_one;

fn policy_of(spec: &str) -> Result<Policy, Fault> {
    let text = format!(
        "apiVersion: signet.dev/v1alpha1\nkind: IdentityPolicy\nmetadata: {{name: p, \
         namespace: shop}}\nspec:\n{spec}"
    );
    read(&parse_one(&text).unwrap().unwrap())
}

#[test]
fn a_whole_policy() {
    let policy = policy_of(
        "  selector: {matchLabels: {app: payments}}
  action: Deny
  ingress:
  - from:
    - identities: ['spiffe://other.test/*', '*/sa/x', '*', spiffe://cluster.local/ns/a/sa/b]
      notNamespaces: [test-*]
      serviceAccounts: [frontend, web/front]
      ipBlocks: [10.0.0.0/8, 'fd00::1', '::ffff:10.1.0.0/112']
    ports: [{port: 80, endPort: 90}, {protocol: UDP}]
    notPorts: [{port: 81, protocol: TCP}]
    unauthenticated: true
  egress: []
",
    )
    .unwrap();
    assert_eq!(policy.action, Action::Deny);
    assert_eq!(policy.selector.labels.len(), 1);
    assert!(policy.governs_ingress && policy.governs_egress && policy.egress.is_empty());
    let rule = &policy.ingress[0];
    assert!(rule.unauthenticated);
    assert_eq!(
        rule.to[0].ports,
        [
            Ports { first: 80, last: 90, protocol: None },
            Ports { first: 0, last: 65535, protocol: Some(17) }
        ]
    );
    let peer = &rule.peers[0];
    assert_eq!(peer.identities.len(), 4);
    assert_eq!(
        peer.service_accounts,
        [("shop".into(), "frontend".into()), ("web".into(), "front".into())]
    );
    let blocks: Vec<String> = peer.ip_blocks.iter().map(ToString::to_string).collect();
    assert_eq!(blocks, ["10.0.0.0/8", "fd00::1/128", "10.1.0.0/16"]);
}

#[test]
fn what_it_asks_of_requests() {
    let policy = policy_of(
        "  ingress:
  - from: [{requestPrincipals: ['https://login.example/*'], notRequestPrincipals: ['*/bob']}]
    http:
    - {methods: [POST], paths: [/pay, '/v1/{*}'], hosts: [Pay.Shop]}
    - {notPaths: ['/admin/*']}
    headers: [{name: X-Tier, values: [gold], notValues: ['old*']}]
    claims: [{path: [realm, role], values: [admin]}]
    ports: [{port: 80}]
",
    )
    .unwrap();
    let rule = &policy.ingress[0];
    assert!(rule.asks_requests());
    assert_eq!(rule.to.len(), 2);
    assert!(rule.to.iter().all(|to| to.ports[0].first == 80), "each entry has the ports");
    assert_eq!(rule.to[0].operation.hosts, ["pay.shop".into()]);
    assert_eq!(rule.to[0].operation.paths[1].as_str(), "/v1/{*}");
    assert_eq!(rule.peers[0].request.principals[0].as_str(), "https://login.example/*");
    let keys: Vec<String> = rule.when.iter().map(|c| format!("{c:?}")).collect();
    assert!(keys[0].contains("x-tier") && keys[1].contains("\"realm\", \"role\""), "{keys:?}");
    for (spec, wanted) in [
        (
            "http: [{methods: ['G T']}]",
            "spec.ingress[0].http[0].methods[0]: \"G T\" is not a method",
        ),
        ("http: [{paths: ['/{**}/{*}']}]", "is not a path template"),
        ("http: [{paths: [pay]}]", "can never match; a path begins with /"),
        ("http: [{hosts: ['http://a']}]", "can never match; write a host"),
        ("http: [{}]", "an empty entry; leave http out"),
        ("headers: [{name: 'a b', values: [c]}]", "is not the name of a header"),
        ("headers: [{values: [c]}]", "name the header"),
        ("headers: [{name: a}]", "neither values nor notValues"),
        ("claims: [{values: [a]}]", "write the claim's name"),
        ("from: [{requestPrincipals: [alice]}]", "can never match; write issuer/subject"),
    ] {
        let error = policy_of(&format!("  ingress: [{{{spec}}}]\n")).unwrap_err().to_string();
        assert!(error.contains(wanted), "{error}");
    }
}

#[test]
fn faults_name_line_field_value_and_remedy() {
    let cases = [
        (
            "  action: Block\n  ingress: []\n",
            5,
            "spec.action: \"Block\" is not an action; write Allow, Deny or Audit",
        ),
        (
            "  ingress:\n  - form: []\n",
            6,
            "spec.ingress[0].form: unknown field; did you mean from?",
        ),
        (
            "  ingress:\n  - from:\n    - identities: [cluster.local/ns/a/sa/b]\n",
            7,
            "spec.ingress[0].from[0].identities[0]: \"cluster.local/ns/a/sa/b\" is not a \
             SPIFFE ID; it begins with spiffe:// (or with * for a suffix)",
        ),
        (
            "  ingress:\n  - from:\n    - identities: ['spiffe://a/*/b']\n",
            7,
            "spec.ingress[0].from[0].identities[0]: \"spiffe://a/*/b\" has a * inside; it may \
             begin or end with one",
        ),
        (
            "  ingress:\n  - from:\n",
            6,
            "spec.ingress[0].from: no value; give one or leave the field out",
        ),
        (
            "  ingress:\n  - from: []\n",
            6,
            "spec.ingress[0].from: an empty list; give an entry or leave the field out",
        ),
        (
            "  ingress:\n  - from: [{}]\n",
            6,
            "spec.ingress[0].from[0]: an empty entry; leave the list out to mean everybody",
        ),
        (
            "  ingress:\n  - ports: [{port: 0}]\n",
            6,
            "spec.ingress[0].ports[0].port: the number 0 is not a whole number from 1 to \
             65535",
        ),
        (
            "  ingress:\n  - ports: [{port: 9, endPort: 8}]\n",
            6,
            "spec.ingress[0].ports[0].endPort: 8 is below port 9",
        ),
        (
            "  ingress:\n  - ports: [{port: 9, protocol: SCTP}]\n",
            6,
            "spec.ingress[0].ports[0].protocol: \"SCTP\" is not a protocol with ports here; \
             write TCP or UDP",
        ),
        (
            "  egress:\n  - to:\n    - serviceAccounts: ['a/*']\n",
            7,
            "spec.egress[0].to[0].serviceAccounts[0]: \"a/*\" is not a service account; write \
             name or namespace/name, without *",
        ),
        (
            "  egress:\n  - to:\n    - ipBlocks: [10.0.0.300]\n",
            7,
            "spec.egress[0].to[0].ipBlocks[0]: \"10.0.0.300\" is not an address range; write \
             it like 10.0.0.0/8 or fd00::/48",
        ),
        (
            "  action: Allow\n",
            5,
            "spec: neither ingress nor egress; write rules, or ingress: [] for an Allow that \
             lets nothing in",
        ),
    ];
    for (spec, line, wanted) in cases {
        let fault = policy_of(spec).unwrap_err();
        assert_eq!(fault.to_string(), wanted);
        assert_eq!(fault.line, line, "{wanted}");
    }
}

#[test]
fn limits_hold() {
    let ports = "{port: 1},".repeat(MAX_PORTS);
    assert!(policy_of(&format!("  ingress: [{{ports: [{ports}]}}]\n")).is_ok());
    let fault = policy_of(&format!("  ingress: [{{ports: [{ports}{{port: 1}}]}}]\n")).unwrap_err();
    assert_eq!(fault.to_string(), "spec.ingress[0].ports: 65 entries; 64 is the most");
}

proptest! {
    #[test]
    fn reading_never_panics(
        spec in "(  |- |ingress:|egress:|from:|to:|ports:|\\[|\\]|\\{|\\}|identities: |port: |\
                 '\\*a'|spiffe://a/b|[0-9]{1,6}|, |\n|namespaces: |unauthenticated: true){0,50}"
    ) {
        if let Ok(Some(node)) = parse_one(&format!("spec:\n{spec}")) {
            let _ = read(&node);
        }
        if let Ok(Some(node)) = parse_one(&format!("  ingress:\n{spec}")) {
            let _ = read_spec(
                PolicyName { kind: "k".into(), namespace: "n".into(), name: "x".into() },
                &node,
            );
        }
    }

    #[test]
    fn patterns_never_panic(text in "[*a-z:/.A]{0,40}") {
        let node = Node { line: 1, value: crate::config::yaml::Value::Text(text) };
        let _ = (read_identity(&node), read_namespace(&node), read_account(&node, "n"));
    }
}

fn cluster_policy(metadata: &str, spec: &str) -> Result<Policy, Fault> {
    let text = format!(
        "apiVersion: signet.dev/v1alpha1\nkind: ClusterIdentityPolicy\nmetadata: {metadata}\nspec: \
         {spec}\n"
    );
    read(&parse_one(&text).unwrap().unwrap())
}

#[test]
fn a_cluster_s_policy_is_about_namespaces() {
    let spec = "{selector: {namespaces: [shop, 'prod-*'], matchLabels: {app: db}}, action: Deny, \
                ingress: [{from: [{serviceAccounts: [a/b]}]}]}";
    let policy = cluster_policy("{name: p}", spec).unwrap();
    assert_eq!(policy.name.to_string(), "ClusterIdentityPolicy/p");
    let labels = [("app".into(), "db".into())].into();
    for (namespace, selected) in [("shop", true), ("prod-eu", true), ("prod", false), ("x", false)]
    {
        assert_eq!(policy.selector.selects(namespace, &labels), selected, "{namespace}");
        assert!(!policy.selector.selects(namespace, &Default::default()));
    }
    let everywhere = cluster_policy("{name: p}", "{ingress: []}").unwrap();
    assert!(everywhere.selector.selects("x", &labels));
    let fault = cluster_policy("{name: p, namespace: shop}", spec).unwrap_err();
    assert_eq!(
        fault.to_string(),
        "metadata.namespace: a ClusterIdentityPolicy has none; leave it out"
    );
    let fault = cluster_policy("{name: p}", &spec.replace("a/b", "b")).unwrap_err();
    assert_eq!(
        fault.to_string(),
        "spec.ingress[0].from[0].serviceAccounts[0]: \"b\" is not a service account; write \
         namespace/name, without *"
    );
    // A namespace's policy says no namespaces.
    let fault = policy_of("  selector: {namespaces: [a]}\n  ingress: []\n").unwrap_err();
    assert!(fault.to_string().starts_with("spec.selector.namespaces: unknown field"), "{fault}");
}

#[test]
fn services_are_for_what_is_dialled() {
    let read = policy_of("  egress: [{to: [{services: [db, other/db]}]}]\n").unwrap();
    let named: Vec<_> =
        read.egress[0].peers[0].services.iter().map(|(n, s)| format!("{n}/{s}")).collect();
    assert_eq!(named, ["shop/db", "other/db"]);
    let fault = policy_of("  ingress: [{from: [{services: [db]}]}]\n").unwrap_err();
    assert!(
        fault.to_string().starts_with("spec.ingress[0].from[0].services: unknown field"),
        "{fault}"
    );
}
