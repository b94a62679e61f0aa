//! The same through IdentityPolicies.

use super::*;

fn identity_policy(spec: &str) -> String {
    format!(
        "---\napiVersion: signet.dev/v1alpha1\nkind: IdentityPolicy\nmetadata: {{name: p, \
         namespace: shop}}\nspec: {spec}\n"
    )
}

#[test]
fn egress_and_ingress_are_judged_by_their_own_pods() {
    let world = world(&identity_policy(
        "{selector: {matchLabels: {app: front}}, egress: [{to: [{serviceAccounts: [web]}]}]}",
    ));
    assert_eq!(letter(&ask_for(&world, Who::Front, "shop/web", 80, proto::TCP)), 'A');
    let refused = ask_for(&world, Who::Front, "shop/db", 80, proto::TCP);
    assert_eq!(letter(&refused), 'N');
    assert_eq!(refused.sides.len(), 1, "the destination is not asked");
    assert_eq!(refused.sides[0].direction, Direction::Egress);
    assert_eq!(refused.policy().unwrap().to_string(), "IdentityPolicy/shop/p");
    // In clear the address shows an identity, which is not enough for an ALLOW.
    let legacy = identity_policy(
        "{selector: {matchLabels: {app: front}}, egress: [{to: [{namespaces: [legacy]}]}]}",
    );
    let world = super::world(&legacy);
    assert_eq!(letter(&ask_for(&world, Who::Front, "legacy/old", 80, proto::TCP)), 'N');
    let open = legacy.replace("}]}]}\n", "}], unauthenticated: true}]}\n");
    let world = super::world(&open);
    assert_eq!(letter(&ask_for(&world, Who::Front, "legacy/old", 80, proto::TCP)), 'A');
}

#[test]
fn udp_is_judged_by_addresses() {
    let world = world(&identity_policy(
        "{ingress: [{from: [{namespaces: [shop]}], unauthenticated: true, ports: [{port: 53}]}]}",
    ));
    assert_eq!(letter(&ask_for(&world, Who::Front, "shop/db", 53, proto::UDP)), 'A');
    assert_eq!(letter(&ask_for(&world, Who::Evil, "shop/db", 53, proto::UDP)), 'N');
    let world = super::world(&identity_policy("{ingress: [{from: [{namespaces: [shop]}]}]}"));
    let refused = ask_for(&world, Who::Front, "shop/db", 53, proto::UDP);
    assert_eq!(letter(&refused), 'N');
    let because = &refused.sides[1].explanation.as_ref().unwrap().policies[0].rules[0].because;
    assert!(because.contains("only a proven identity counts"), "{because}");
}

/// A Service `shop/data` at 10.96.0.9:80 before `db` at 5432.
const SERVICE: &str = "---\napiVersion: v1\nkind: Service\nmetadata: {name: data, namespace: shop}\nspec: \
     {clusterIPs: [10.96.0.9], ports: [{name: p, port: 80}]}\n---\napiVersion: discovery.k8s.io/v1\nkind: \
     EndpointSlice\nmetadata: {name: data-1, namespace: shop, labels: {kubernetes.io/service-name: \
     data}}\naddressType: IPv4\nendpoints: [{addresses: [10.0.0.1]}]\nports: [{name: p, port: 5432}]\n";

#[test]
fn egress_by_service_is_egress_to_its_endpoints() {
    let policy = |action: &str, service: &str| {
        identity_policy(&format!(
            "{{selector: {{matchLabels: {{app: front}}}}, action: {action}, egress: [{{to: \
             [{{services: [{service}]}}]}}]}}"
        )) + SERVICE
    };
    let at =
        |world: &World, to: &str, port| letter(&ask_for(world, Who::Front, to, port, proto::TCP));
    let allowed = world(&policy("Allow", "data"));
    assert_eq!(at(&allowed, "shop/db", 5432), 'A');
    assert_eq!(at(&allowed, "shop/db", 80), 'N', "another port of the endpoint");
    assert_eq!(at(&allowed, "shop/web", 5432), 'N');
    assert_eq!(letter(&ask_for(&allowed, Who::Front, "shop/db", 5432, proto::UDP)), 'N');
    let denied = world(&policy("Deny", "shop/data"));
    assert_eq!((at(&denied, "shop/db", 5432), at(&denied, "shop/db", 80)), ('D', 'A'));
    let nobody = world(&policy("Allow", "gone"));
    assert_eq!(at(&nobody, "shop/db", 5432), 'N');
}

#[test]
fn a_cluster_s_policy_holds_in_the_namespaces_that_it_names() {
    let policy = |namespaces: &str| {
        format!(
            "---\napiVersion: signet.dev/v1alpha1\nkind: ClusterIdentityPolicy\nmetadata: {{name: \
             p}}\nspec: {{selector: {{namespaces: [{namespaces}]}}, action: Deny, ingress: [{{from: \
             [{{namespaces: [evil]}}]}}]}}\n"
        )
    };
    assert_eq!(row(&world(&policy("'sh*', other")), 80), "ADAA");
    assert_eq!(row(&world(&policy("other")), 80), "AAAA");
    let answer = ask(&world(&policy("shop")), Who::Evil, 80);
    assert_eq!(answer.sides.last().unwrap().sentence, "explicitly denied by p");
}
