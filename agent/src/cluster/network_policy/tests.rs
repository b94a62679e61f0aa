//! Reading, what blocks tunnels, and what policies on identities say the same.

use super::*;
use crate::cluster::{
    manifest::{self, Object},
    offline::Manifests,
    source::SourceParams,
};

const CLUSTER: &str = "apiVersion: v1
kind: Namespace
metadata: {name: shop, labels: {team: pay}}
---
apiVersion: v1
kind: Namespace
metadata: {name: ops, labels: {team: ops}}
---
apiVersion: v1
kind: Pod
metadata: {name: db, namespace: shop, uid: u-db, labels: {app: db}}
spec:
  serviceAccountName: db
  containers: [{name: c, ports: [{name: sql, containerPort: 5432}]}]
status: {phase: Running, podIPs: [{ip: 10.0.0.1}]}
---
apiVersion: v1
kind: Pod
metadata: {name: web, namespace: shop, uid: u-web, labels: {app: web, tier: front}}
spec: {serviceAccountName: web, containers: [{name: c}]}
status: {phase: Running, podIPs: [{ip: 10.0.0.2}]}
---
apiVersion: v1
kind: Pod
metadata: {name: canary, namespace: shop, uid: u-canary, labels: {app: canary}}
spec: {serviceAccountName: web, containers: [{name: c}]}
status: {phase: Running, podIPs: [{ip: 10.0.0.3}]}
---
apiVersion: v1
kind: Pod
metadata: {name: cron, namespace: ops, uid: u-cron, labels: {app: cron}}
spec: {serviceAccountName: cron, containers: [{name: c}]}
status: {phase: Running, podIPs: [{ip: 10.0.1.1}]}
";

fn policy(name: &str, spec: &str) -> String {
    format!(
        "---\napiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {{name: {name}, \
         namespace: shop}}\nspec: {spec}\n"
    )
}

fn world(policies: &[(&str, &str)]) -> World {
    let mut text = CLUSTER.to_owned();
    for (name, spec) in policies {
        text += &policy(name, spec);
    }
    let domain = crate::spiffe::TrustDomain::parse("cluster.local").unwrap();
    let mut manifests = Manifests::default();
    manifests.add("f.yaml".as_ref(), &text, "istio-system").unwrap();
    manifests.world(&SourceParams::new(domain), Arc::default())
}

fn blocked(policies: &[(&str, &str)]) -> Vec<String> {
    let found = blocking(&world(policies), "shop");
    found
        .iter()
        .map(|b| {
            let direction = if b.egress { "egress" } else { "ingress" };
            format!("{} {direction}[{}] {}", b.policy.name.name, b.rule, b.ports)
        })
        .collect()
}

const DB: &str = "podSelector: {matchLabels: {app: db}}";

#[test]
fn a_rule_without_the_tunnels_port_blocks() {
    let from_web = "from: [{podSelector: {matchLabels: {app: web}}}], ports: [{port: 5432}]";
    let narrow = format!("{{{DB}, ingress: [{{{from_web}}}]}}");
    assert_eq!(blocked(&[("a", &narrow)]), ["a ingress[0] 5432/tcp"]);
    let found = blocking(&world(&[("a", &narrow)]), "shop");
    assert_eq!(
        found[0].remedy(),
        "add to spec.ingress[0].ports of NetworkPolicy shop/a: {port: 15008, protocol: TCP}"
    );
    // The control: with what the remedy says nothing is found.
    let healed = narrow.replace("{port: 5432}", "{port: 5432}, {port: 15008, protocol: TCP}");
    assert!(blocked(&[("a", &healed)]).is_empty());
    // Another policy that selects the same pods opens the port for the same callers, or for all.
    for ports in ["15008", "1, endPort: 65535"] {
        let same = narrow.replace("{port: 5432}", &format!("{{port: {ports}}}"));
        assert!(blocked(&[("a", &narrow), ("b", &same)]).is_empty(), "{ports}");
    }
    let all = "{podSelector: {}, ingress: [{ports: [{port: 15008}]}]}";
    assert!(blocked(&[("a", &narrow), ("b", all)]).is_empty());
    // For other callers it does not help, nor over UDP.
    let others =
        "{podSelector: {}, ingress: [{from: [{podSelector: {matchLabels: {app: canary}}}]}]}";
    assert_eq!(blocked(&[("a", &narrow), ("b", others)]), ["a ingress[0] 5432/tcp"]);
    let udp = "{podSelector: {}, ingress: [{ports: [{port: 15008, protocol: UDP}]}]}";
    assert_eq!(blocked(&[("a", &narrow), ("b", udp)]), ["a ingress[0] 5432/tcp"]);
}

#[test]
fn what_lets_nothing_of_the_mesh_pass_blocks_nothing() {
    for (spec, what) in [
        (format!("{{{DB}, ingress: []}}"), "denies all already"),
        (format!("{{{DB}, ingress: [{{}}]}}"), "lets everything pass"),
        (
            format!(
                "{{{DB}, ingress: [{{from: [{{ipBlock: {{cidr: 192.0.2.0/24}}}}], ports: [{{port: 80}}]}}]}}"
            ),
            "callers outside the cluster",
        ),
        (format!("{{{DB}, ingress: [{{ports: [{{port: 53, protocol: UDP}}]}}]}}"), "datagrams"),
        (
            "{podSelector: {matchLabels: {app: none}}, ingress: [{ports: [{port: 80}]}]}".into(),
            "no pod",
        ),
        (
            format!("{{{DB}, policyTypes: [Egress], ingress: [{{ports: [{{port: 80}}]}}]}}"),
            "egress",
        ),
    ] {
        assert!(blocked(&[("a", &spec)]).is_empty(), "{what}");
    }
    // A block that holds pods is about them.
    let spec = format!(
        "{{{DB}, ingress: [{{from: [{{ipBlock: {{cidr: 10.0.0.0/8}}}}], ports: [{{port: 80}}]}}]}}"
    );
    assert_eq!(blocked(&[("a", &spec)]), ["a ingress[0] 80/tcp"]);
    let spec = "{podSelector: {}, policyTypes: [Egress], egress: [{to: [{namespaceSelector: \
                {matchLabels: {team: ops}}}], ports: [{port: 80, endPort: 90}]}]}";
    assert_eq!(blocked(&[("a", spec)]), ["a egress[0] 80-90/tcp"]);
}

/// The same cluster, with `ops` in a mode and a policy of its own.
fn of_ops(mode: &str, spec: &str) -> Vec<String> {
    let cluster = CLUSTER.replace(
        "labels: {team: ops}",
        &format!("labels: {{team: ops, signet.dev/mode: \"{mode}\"}}"),
    );
    let text = cluster + &policy("theirs", spec).replace("namespace: shop", "namespace: ops");
    let domain = crate::spiffe::TrustDomain::parse("cluster.local").unwrap();
    let mut manifests = Manifests::default();
    manifests.add("f.yaml".as_ref(), &text, "istio-system").unwrap();
    let world = manifests.world(&SourceParams::new(domain), Arc::default());
    blocking(&world, "shop").iter().map(|b| format!("{}; {}", b.text(), b.remedy())).collect()
}

#[test]
fn policies_of_enrolled_namespaces_block_calls_to_and_from_this_one() {
    let to_db = "{podSelector: {}, policyTypes: [Egress], egress: [{to: [{namespaceSelector: {}, \
                 podSelector: {matchLabels: {app: db}}}], ports: [{port: 5432}]}]}";
    assert_eq!(
        of_ops("strict", to_db),
        ["egress[0] lets its own pods to 5432/tcp pass, but not the tunnels' port 15008 in \
             which that travels once shop is enrolled (1 pods); add to spec.egress[0].ports of \
             NetworkPolicy ops/theirs: {port: 15008, protocol: TCP}"]
    );
    let from_web = "{podSelector: {}, ingress: [{from: [{namespaceSelector: {}, podSelector: \
                    {matchLabels: {app: web}}}], ports: [{port: 80}]}]}";
    let found = of_ops("permissive", from_web);
    assert!(found.len() == 1 && found[0].starts_with("ingress[0] lets callers of 80/tcp"));
    // Everybody includes this namespace's pods.
    let anybody = "{podSelector: {}, policyTypes: [Egress], egress: [{ports: [{port: 80}]}]}";
    assert_eq!(of_ops("strict", anybody).len(), 1);
    // The controls: with the port; not about this namespace; calls in clear need no tunnel.
    for spec in [to_db, from_web] {
        let healed = spec.replace("ports: [", "ports: [{port: 15008}, ");
        assert!(of_ops("strict", &healed).is_empty());
        assert!(of_ops("off", spec).is_empty() && of_ops("observe", spec).is_empty());
        let elsewhere = spec.replace("namespaceSelector: {}, ", "");
        assert!(of_ops("strict", &elsewhere).is_empty());
    }
}

#[test]
fn faults_name_field_value_and_remedy() {
    let read = |spec: &str| {
        let text = policy("a", spec);
        manifest::read("f.yaml", &text, "istio-system")
    };
    let manifest = read("{podSelector: {matchExpressions: [{key: a, operator: Exists}]}}").unwrap();
    assert!(matches!(manifest.objects[0].1, Object::NetworkPolicy(_)));
    for (spec, wanted) in [
        (
            "{podSelector: {matchExpressions: [{key: a, operator: Is}]}}",
            "spec.podSelector.matchExpressions[0].operator: \"Is\" is not an operator; write In, \
             NotIn, Exists or DoesNotExist",
        ),
        (
            "{podSelector: {matchExpressions: [{key: a, operator: In}]}}",
            "spec.podSelector.matchExpressions[0].values: none; give at least one",
        ),
        (
            "{podSelector: {}, ingress: [{from: [{ipBlock: {cidr: 10.0.0.0/8, except: [11.0.0.0/9]}}]}]}",
            "spec.ingress[0].from[0].ipBlock.except[0]: 11.0.0.0/9 is not part of 10.0.0.0/8",
        ),
        (
            "{podSelector: {}, ingress: [{from: [{}]}]}",
            "spec.ingress[0].from[0]: write either ipBlock, or podSelector and namespaceSelector",
        ),
        (
            "{podSelector: {}, ingress: [{ports: [{port: 0}]}]}",
            "spec.ingress[0].ports[0].port: 0 is not a port from 1 to 65535",
        ),
        (
            "{podSelector: {}, ingress: [{ports: [{port: 90, endPort: 80}]}]}",
            "spec.ingress[0].ports[0].endPort: 80 is below the first port 90",
        ),
        (
            "{podSelector: {}, ingress: [{ports: [{port: web, endPort: 80}]}]}",
            "spec.ingress[0].ports[0].endPort: there is no first port as a number; give port, or \
             leave it out",
        ),
        (
            "{podSelector: {}, egress: [{ports: [{protocol: ICMP}]}]}",
            "spec.egress[0].ports[0].protocol: \"ICMP\" is not a protocol; write TCP, UDP or SCTP",
        ),
        (
            "{podSelector: {}, policyTypes: [Both]}",
            "spec.policyTypes[0]: \"Both\" is not a type; write Ingress or Egress",
        ),
    ] {
        let fault = read(spec).unwrap_err().to_string();
        assert_eq!(fault, format!("NetworkPolicy a: {wanted}"));
    }
}

#[test]
fn selectors_follow_kubernetes() {
    let labels: Labels = [("app".into(), "db".into())].into();
    let demand = |key: &str, demand| LabelSelector {
        expressions: vec![Expression { key: key.into(), demand }],
        ..LabelSelector::default()
    };
    let values = |value: &str| vec![Arc::from(value)];
    assert!(LabelSelector::default().matches(&labels));
    assert!(demand("app", Demand::In(values("db"))).matches(&labels));
    assert!(!demand("app", Demand::In(values("x"))).matches(&labels));
    assert!(!demand("tier", Demand::In(values("x"))).matches(&labels));
    assert!(demand("tier", Demand::NotIn(values("x"))).matches(&labels), "absent is not in");
    assert!(!demand("app", Demand::NotIn(values("db"))).matches(&labels));
    assert!(demand("app", Demand::Exists).matches(&labels));
    assert!(demand("tier", Demand::DoesNotExist).matches(&labels));
}

#[test]
fn the_identities_of_what_is_selected_now() {
    let spec = format!(
        "{{{DB}, ingress: [{{from: [{{podSelector: {{matchLabels: {{app: web}}}}}}, \
         {{namespaceSelector: {{matchLabels: {{team: ops}}}}}}, {{ipBlock: {{cidr: 192.0.2.0/24, \
         except: [192.0.2.9/32]}}}}, {{podSelector: {{matchLabels: {{app: gone}}}}}}], ports: \
         [{{port: sql}}, {{port: 8000, endPort: 8010}}, {{port: 15008}}, {{port: 53, protocol: UDP}}, \
         {{port: nope}}]}}]}}"
    );
    let found = translate(&world(&[("a", &spec)]), "shop");
    let [suggested] = found.as_slice() else { panic!("{found:?}") };
    assert_eq!(suggested.selector, [("app".into(), "db".into())].into());
    let rules = suggested.rules.as_ref().unwrap();
    assert_eq!(rules.len(), 2);
    assert_eq!(rules[0].ports, [(5432, 5432), (8000, 8010)]);
    assert_eq!((rules[1].ports.as_slice(), rules[1].udp), (&[(53, 53)][..], true));
    assert_eq!(
        rules[0].peers,
        [
            SuggestedPeer::Accounts([("shop".into(), "web".into())].into()),
            SuggestedPeer::Namespaces(["ops".into()].into()),
            SuggestedPeer::Block {
                block: "192.0.2.0/24".parse().unwrap(),
                except: vec!["192.0.2.9/32".parse().unwrap()],
            },
        ]
    );
    assert_eq!(
        suggested.remarks,
        [
            "left out: ingress[0].from[3] selects no pod now",
            "left out: ingress[0].ports[4]: no pod has a port nope now",
            "wider: ingress[0].from[0] selects only some pods of the account shop/web; give them \
             one of their own",
        ]
    );
}

#[test]
fn what_cannot_be_translated_is_said_and_never_wider() {
    let gone =
        format!("{{{DB}, ingress: [{{from: [{{podSelector: {{matchLabels: {{app: gone}}}}}}]}}]}}");
    let found = translate(&world(&[("a", &gone)]), "shop");
    assert_eq!(found[0].rules, Some(vec![]), "nobody, not everybody");
    let expressions =
        "{podSelector: {matchExpressions: [{key: app, operator: Exists}]}, egress: [{}]}";
    let found = translate(&world(&[("a", expressions)]), "shop");
    assert_eq!(found[0].rules, None);
    assert_eq!(found[0].remarks.len(), 2);
    let only_egress = "{podSelector: {}, policyTypes: [Egress]}";
    let found = translate(&world(&[("a", only_egress)]), "shop");
    assert_eq!((&found[0].rules, &*found[0].remarks[0]), (&None, "not translated: egress"));
    let everybody = "{podSelector: {}, ingress: [{}]}";
    let found = translate(&world(&[("a", everybody)]), "shop");
    let all = SuggestedRule { peers: vec![], ports: vec![], udp: false };
    assert_eq!(found[0].rules, Some(vec![all]));
}
