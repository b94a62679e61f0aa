//! The rules that the manifests bring: each refuses its bad case in its own words and admits the
//! good one.

use std::path::Path;

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use signet_lab::{
    api_server::{ApiServer, Ask},
    cluster_dir,
};

const POLICIES: &str = "/apis/signet.dev/v1alpha1/namespaces/shop/identitypolicies";
const CLUSTER_POLICIES: &str = "/apis/signet.dev/v1alpha1/clusteridentitypolicies";

/// A server with the shipped manifests; its rules came in past admission.
fn shipped() -> Result<ApiServer> {
    let api = ApiServer::start()?;
    api.ship(&["crds", "agent"])?;
    for name in ["shop", "kube-system"] {
        api.apply(json!({"kind": "Namespace", "metadata": {"name": name}}))?;
    }
    Ok(api)
}

fn message(answer: &(u16, Value)) -> &str {
    answer.1["message"].as_str().unwrap_or_default()
}

/// What each rule of the shipped files says, up to where it is put together.
fn words_of_rules() -> Result<Vec<String>> {
    fn collect(value: &Value, found: &mut Vec<String>) {
        match value {
            Value::Object(fields) => {
                for (name, field) in fields {
                    let is_rules =
                        matches!(name.as_str(), "validations" | "x-kubernetes-validations");
                    for rule in field.as_array().into_iter().flatten().filter(|_| is_rules) {
                        let said = rule["message"].as_str().map(str::to_owned);
                        let first = || {
                            let text = rule["messageExpression"].as_str()?;
                            let text = text.split_once('"')?.1.replace("\\\"", "\u{1}");
                            Some(text.split_once('"')?.0.replace('\u{1}', "\""))
                        };
                        let rule = rule["rule"].as_str().unwrap_or_default();
                        found.push(said.or_else(first).unwrap_or_else(|| rule.to_owned()));
                    }
                    collect(field, found);
                }
            }
            Value::Array(items) => items.iter().for_each(|item| collect(item, found)),
            _ => {}
        }
    }
    let mut found = Vec::new();
    let manifests = Path::new(env!("CARGO_MANIFEST_DIR")).join("../manifests");
    for part in ["crds", "agent", "authority"] {
        for file in std::fs::read_dir(manifests.join(part))? {
            let text = std::fs::read_to_string(file?.path())?;
            cluster_dir::parse(&text)?.iter().for_each(|object| collect(object, &mut found));
        }
    }
    found.sort();
    found.dedup();
    Ok(found)
}

fn policy(spec: Value) -> Value {
    json!({
        "apiVersion": "signet.dev/v1alpha1", "kind": "IdentityPolicy",
        "metadata": {"name": "p"}, "spec": spec,
    })
}

/// Bad and good specifications of policies, and what is said of the bad ones.
fn policies() -> Vec<(Value, Value, &'static str)> {
    let good = json!({"ingress": [{"ports": [{"port": 80, "endPort": 90}]}]});
    let of = |bad: Value, said: &'static str| (bad, good.clone(), said);
    vec![
        of(json!({}), "neither ingress nor egress; write rules, or ingress: [] for an Allow"),
        of(
            json!({"ingress": [{"ports": [{"port": 80, "endPort": 79}]}]}),
            "spec.ingress[0].ports[0]: Invalid value: \"object\": endPort needs port and is not below it",
        ),
        of(
            json!({"ingress": [{"notPorts": [{"endPort": 79}]}]}),
            "spec.ingress[0].notPorts[0]: Invalid value: \"object\": endPort needs port",
        ),
        of(
            json!({"egress": [{"ports": [{"endPort": 79}]}]}),
            "spec.egress[0].ports[0]: Invalid value: \"object\": endPort needs port",
        ),
        of(
            json!({"egress": [{"notPorts": [{"port": 2, "endPort": 1}]}]}),
            "spec.egress[0].notPorts[0]: Invalid value: \"object\": endPort needs port",
        ),
        of(
            json!({"action": "Alow", "ingress": []}),
            "spec.action: Unsupported value: \"Alow\": supported values: \"Allow\", \"Deny\", \"Audit\"",
        ),
        of(
            json!({"ingress": [{"ports": [{"port": 0}]}]}),
            "spec.ingress[0].ports[0].port in body should be greater than or equal to 1",
        ),
        of(json!({"ingress": [{"ports": [{}]}]}), "should have at least 1 properties"),
        of(json!({"ingress": [{"from": []}]}), "should have at least 1 items"),
        of(
            json!({"ingress": [{"from": [{"identities": ["http://x"]}]}]}),
            "spec.ingress[0].from[0].identities[0] in body should match '^(",
        ),
        of(
            json!({"ingress": [{"from": [{"ipBlocks": ["ten"]}]}]}),
            "spec.ingress[0].from[0].ipBlocks[0] in body should match",
        ),
        of(json!({"ingress": {}}), "spec.ingress in body must be of type array"),
        of(json!({"ingress": vec![json!({}); 65]}), "spec.ingress: Too many: 65"),
    ]
}

#[test]
fn the_schemas_refuse_what_is_no_policy() -> Result<()> {
    let api = shipped()?;
    let mut said_by_rules = Vec::new();
    for (index, (bad, good, said)) in policies().into_iter().enumerate() {
        for (path, kind) in
            [(POLICIES, "IdentityPolicy"), (CLUSTER_POLICIES, "ClusterIdentityPolicy")]
        {
            let named = |spec: &Value| {
                let mut object = policy(spec.clone());
                object["kind"] = kind.into();
                object["metadata"]["name"] = format!("p-{index}").into();
                object
            };
            let answer = api.ask(Ask::create(path, &named(&bad)))?;
            ensure!(answer.0 == 422 && message(&answer).contains(said), "{bad}: {answer:?}");
            ensure!(
                message(&answer)
                    .starts_with(&format!("{kind}.signet.dev \"p-{index}\" is invalid")),
                "{answer:?}"
            );
            said_by_rules.push(message(&answer).to_owned());
            let answer = api.ask(Ask::create(path, &named(&good)))?;
            ensure!(answer.0 == 201, "{answer:?}");
            // Its default came, and what a policy says of itself did not.
            ensure!(answer.1["spec"]["action"] == "Allow", "{answer:?}");
        }
    }

    // Names of namespaces, and of admission, say the rest of what rules can say.
    said_by_rules.extend(labels_are_refused(&api)?);
    said_by_rules.push(another_node_is_refused(&api)?);
    let words = words_of_rules()?;
    ensure!(words.len() >= 8, "{words:?}");
    for word in words {
        let is_said = said_by_rules.iter().any(|said| said.contains(&word));
        ensure!(is_said, "no case for the rule that says: {word}");
    }
    Ok(())
}

fn labels_are_refused(api: &ApiServer) -> Result<Vec<String>> {
    let mut all = Vec::new();
    for (namespace, label, bad, good, said) in [
        (
            "shop",
            "mode",
            "strikt",
            "strict",
            "label signet.dev/mode: \"strikt\" is not one of off, observe, permissive, strict",
        ),
        (
            "kube-system",
            "mode",
            "strict",
            "observe",
            "label signet.dev/mode: pods of kube-system are never enforced",
        ),
        (
            "signet-system",
            "mode",
            "permissive",
            "off",
            "label signet.dev/mode: pods of signet-system are never enforced",
        ),
        ("shop", "default", "maybe", "deny", "label signet.dev/default: the value must be"),
        ("shop", "same-node", "direct", "kernel", "label signet.dev/same-node: the value must be"),
        (
            "shop",
            "allow-pod-override",
            "yes",
            "true",
            "label signet.dev/allow-pod-override: the value must be true or false",
        ),
    ] {
        let path = format!("/api/v1/namespaces/{namespace}");
        let labelled =
            |value: &str| json!({"metadata": {"labels": {format!("signet.dev/{label}"): value}}});
        let before = api.get("namespaces", "", namespace);
        let answer = api.ask(Ask::merge(&path, &labelled(bad)))?;
        let begin = format!(
            "namespaces {namespace:?} is forbidden: ValidatingAdmissionPolicy \
             'signet-namespace-labels' with binding 'signet-namespace-labels' denied request: "
        );
        ensure!(answer.0 == 422 && message(&answer).starts_with(&begin), "{answer:?}");
        ensure!(message(&answer).contains(said), "{answer:?}");
        ensure!(api.get("namespaces", "", namespace) == before, "it was written nevertheless");
        all.push(message(&answer).to_owned());
        let answer = api.ask(Ask::merge(&path, &labelled(good)))?;
        ensure!(answer.0 == 200, "{answer:?}");
    }
    // Other labels are nobody's business here.
    let other = json!({"metadata": {"labels": {"team": "strikt"}}});
    let answer = api.ask(Ask::merge("/api/v1/namespaces/shop", &other))?;
    ensure!(answer.0 == 200, "{answer:?}");
    Ok(all)
}

fn another_node_is_refused(api: &ApiServer) -> Result<String> {
    api.pod("signet-system", "agent-1", "signet-agent", "node-1")?;
    let token = api.own_token("signet-system", "signet-agent", Some("agent-1"))?;
    let unbound = api.own_token("signet-system", "signet-agent", None)?;
    let enrolment = |node: &str| {
        let object = json!({
            "apiVersion": "signet.dev/v1alpha1", "kind": "NodeEnrolment",
            "metadata": {"name": node},
            "status": {"served": [], "revision": 1, "time": "2026-01-01T00:00:00Z"},
        });
        let path = format!(
            "/apis/signet.dev/v1alpha1/nodeenrolments/{node}?fieldManager=signet-agent&force=true"
        );
        (path, object)
    };
    let (path, own) = enrolment("node-1");
    let answer = api.ask(Ask::apply(&path, &own).by(&token))?;
    ensure!(answer.0 == 200 || answer.0 == 201, "{answer:?}");
    let (path, other) = enrolment("node-2");
    let answer = api.ask(Ask::apply(&path, &other).by(&token))?;
    let said = message(&answer).to_owned();
    ensure!(
        answer.0 == 403
            && said.ends_with(
                "an agent writes the NodeEnrolment of its own node only, which is node-1, not node-2"
            ),
        "{answer:?}"
    );
    ensure!(api.get("nodeenrolments", "", "node-2").is_none(), "it was written nevertheless");
    let (path, own) = enrolment("node-1");
    let answer = api.ask(Ask::apply(&path, &own).by(&unbound))?;
    ensure!(
        answer.0 == 403 && message(&answer).contains("which is not in its token"),
        "{answer:?}"
    );
    // Whoever RBAC lets write it may write any.
    let (path, other) = enrolment("node-2");
    let answer = api.ask(Ask::apply(&path, &other))?;
    ensure!(answer.0 == 200 || answer.0 == 201, "{answer:?}");
    Ok(said)
}

#[test]
fn unknown_fields_go_or_are_refused_and_nothing_is_passed_unevaluated() -> Result<()> {
    let api = shipped()?;
    let mut odd = policy(json!({"ingress": [], "egres": [], "ingresss": 1}));
    odd["status"] = json!({"conditions": []});
    let strict = format!("{POLICIES}?fieldValidation=Strict");
    let answer = api.ask(Ask::create(&strict, &odd))?;
    ensure!(
        answer.0 == 400
            && message(&answer).contains("strict decoding error: unknown field \"spec.egres\""),
        "{answer:?}"
    );
    let answer = api.ask(Ask::create(POLICIES, &odd))?;
    let spec = &answer.1["spec"];
    ensure!(answer.0 == 201 && *spec == json!({"action": "Allow", "ingress": []}), "{answer:?}");
    ensure!(answer.1["status"].is_null(), "a status is written by its subresource: {answer:?}");

    // A policy that this server cannot evaluate never takes effect in silence.
    let named = "/apis/admissionregistration.k8s.io/v1/validatingadmissionpolicies";
    let admission = |expression: &str| {
        json!({
            "apiVersion": "admissionregistration.k8s.io/v1", "kind": "ValidatingAdmissionPolicy",
            "metadata": {"name": "x"},
            "spec": {"validations": [{"expression": expression}]},
        })
    };
    for (expression, said) in [
        ("isIP(object.spec.ip)", "the function isIP"),
        ("authorizer.path('/').check('get').allowed()", "the "),
    ] {
        let object = admission(expression);
        let answer = api.ask(Ask::create(named, &object))?;
        ensure!(answer.0 == 501 && message(&answer).contains(said), "{answer:?}");
    }
    let object = admission("true");
    let answer = api.ask(Ask::create(named, &object))?;
    ensure!(answer.0 == 201, "{answer:?}");
    let first = api.get("validatingadmissionpolicies", "", "signet-namespace-labels");
    ensure!(first.context("shipped")?["spec"]["failurePolicy"] == "Ignore");
    Ok(())
}
