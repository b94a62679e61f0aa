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
