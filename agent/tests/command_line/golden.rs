//! What every command prints, to the letter, and the shape of its JSON: `golden/` has both.
//!
//! Later versions may append, never rename or take away. A change that is meant is written with
//! `UPDATE_GOLDEN=1 cargo test -p signet --test command_line golden`, and read before it is
//! committed.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    env, fs,
    path::{Path, PathBuf},
    sync::Arc,
};

use regex::Regex;
use serde_json::Value;
use signet::{
    admin::StatusInputs,
    cluster::{model::Synced, offline::Manifests, source::SourceParams},
    endpoint::state::{EndpointState, NodeState},
    flow::{FlowRecord, KnownBy, Via},
    policy::istio::ROOT_NAMESPACE,
    spiffe::{SpiffeId, TrustDomain},
};
use signet_ebpf::abi::{Reason, Verdict};
use uuid::Uuid;

use super::{
    Node, allowed, as_source, code, denied, ended, endpoint, inputs, party, run, stderr, stdout,
};

/// A cluster with one of everything that commands tell of.
const SHOP: &str = r#"
apiVersion: v1
kind: Namespace
metadata: {name: shop, labels: {signet.dev/mode: strict}}
---
apiVersion: v1
kind: Namespace
metadata: {name: legacy}
---
apiVersion: v1
kind: Pod
metadata: {name: payments-5b7f, namespace: shop, uid: 3f1c-payments-5b7f, labels: {app: payments}}
spec: {serviceAccountName: payments, nodeName: node-2, containers: []}
status: {phase: Running, podIPs: [{ip: 10.0.2.7}]}
---
apiVersion: v1
kind: Pod
metadata: {name: frontend-7d9c, namespace: shop, uid: 3f1c-frontend-7d9c, labels: {app: frontend}}
spec: {serviceAccountName: frontend, nodeName: node-2, containers: []}
status: {phase: Running, podIPs: [{ip: 10.0.1.5}]}
---
apiVersion: v1
kind: Pod
metadata: {name: reports-0, namespace: legacy, uid: 3f1c-reports-0}
spec: {nodeName: node-1, containers: []}
status: {phase: Running, podIPs: [{ip: 10.0.1.8}]}
---
apiVersion: v1
kind: Service
metadata: {name: payments, namespace: shop}
spec: {clusterIPs: [10.96.0.7], ports: [{name: http, port: 80, protocol: TCP}]}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: payments-1, namespace: shop, labels: {kubernetes.io/service-name: payments}}
addressType: IPv4
ports: [{name: http, port: 8080, protocol: TCP}]
endpoints: [{addresses: [10.0.2.7], conditions: {ready: true, serving: true}}]
---
apiVersion: signet.dev/v1alpha1
kind: IdentityPolicy
metadata: {name: payments-callers, namespace: shop}
spec:
  selector: {matchLabels: {app: payments}}
  action: Allow
  ingress:
  - from: [{serviceAccounts: [frontend]}]
    ports: [{port: 8080}]
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: odd, namespace: shop}
spec:
  selector: {matchLabels: {app: frontend}}
  action: DENY
  rules: [{when: [{key: "experimental.envoy.filters.x[y]", values: [z]}]}]
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: payments, namespace: shop}
spec:
  podSelector: {matchLabels: {app: payments}}
  ingress:
  - from: [{podSelector: {matchLabels: {app: frontend}}}]
    ports: [{port: 8080, protocol: TCP}]
"#;

/// A policy under which the frontend comes in no more.
const CHANGE: &str = r#"
apiVersion: signet.dev/v1alpha1
kind: IdentityPolicy
metadata: {name: payments-callers, namespace: shop}
spec:
  selector: {matchLabels: {app: payments}}
  action: Allow
  ingress:
  - from: [{serviceAccounts: [billing]}]
"#;

/// One that cannot be read, and one that cannot be evaluated.
const FAULTY: &str = r#"
apiVersion: signet.dev/v1alpha1
kind: IdentityPolicy
metadata: {name: typo, namespace: shop}
spec: {action: Alow}
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: custom, namespace: shop}
spec: {action: CUSTOM, provider: {name: opa}, rules: [{}]}
"#;

/// [`SHOP`] as an agent of node-2 has it applied.
fn shop() -> StatusInputs {
    let mut manifests = Manifests::default();
    manifests.add(Path::new("shop.yaml"), SHOP, ROOT_NAMESPACE).unwrap();
    let params = SourceParams::new(TrustDomain::parse("cluster.local").unwrap());
    let mut world = manifests.world(&params, Arc::default());
    world.revision = 118;
    world.synced = Synced { pods: true, policies: true };
    for uid in ["3f1c-payments-5b7f", "3f1c-frontend-7d9c"] {
        world.served.insert(uid.into(), "node-2".into());
    }
    let registered = |uid: &str, netns: u64| -> (u64, Arc<EndpointState>) {
        let pod = &world.pods[uid];
        let endpoint = endpoint(pod, netns, &pod.ips[0].to_string());
        let policies = world.policies_of(pod).into();
        (netns, Arc::new(EndpointState { policies, ..EndpointState::clone(&endpoint) }))
    };
    let base = inputs("node-2");
    let state = NodeState {
        revision: 118,
        endpoints: HashMap::from([
            registered("3f1c-payments-5b7f", 1),
            registered("3f1c-frontend-7d9c", 2),
        ]),
        waiting: base.state.as_ref().unwrap().waiting.clone(),
        identities: Arc::new(HashMap::from([
            (257, SpiffeId::parse("spiffe://cluster.local/ns/shop/sa/payments").unwrap()),
            (258, SpiffeId::parse("spiffe://cluster.local/ns/shop/sa/frontend").unwrap()),
        ])),
        ..NodeState::empty("node-2".into(), Arc::new(world))
    };
    StatusInputs { state: Some(Arc::new(state)), ..base }
}

fn refused() -> FlowRecord {
    FlowRecord {
        time: "2026-08-06T10:12:06.777Z".parse().unwrap(),
        uuid: Uuid::from_u128(3),
        via: Via::Plaintext,
        verdict: Verdict::Dropped,
        reason: Reason::PlaintextRefused,
        policy: None,
        extra: vec![("mode", "strict".into())],
        source: signet::flow::Party::unknown("10.9.0.7:39990".parse().unwrap()),
        ..allowed()
    }
}

/// A lookup that was only audited, to a service.
fn audited() -> FlowRecord {
    FlowRecord {
        time: "2026-08-06T10:12:07.100Z".parse().unwrap(),
        uuid: Uuid::from_u128(4),
        protocol: 17,
        via: Via::Plaintext,
        verdict: Verdict::Audit,
        reason: Reason::PolicyDeny,
        source: party("frontend-7d9c", KnownBy::Address, "[fd00::5]:40000"),
        destination: signet::flow::Party {
            service: Some("shop/payments".into()),
            ..party("payments-5b7f", KnownBy::Kernel, "[fd00::7]:53")
        },
        ..allowed()
    }
}

/// Two nodes with the flows of the contract, and the files that commands read.
struct Stage {
    one: Node,
    two: Node,
    files: tempfile::TempDir,
}

impl Stage {
    async fn set() -> Self {
        let (one, two) = (Node::start(inputs("node-1")), Node::start(shop()));
        one.record([as_source(allowed())]).await;
        two.record([allowed(), denied(), refused(), audited(), ended()]).await;
        let files = tempfile::tempdir().unwrap();
        for (name, text) in [("shop.yaml", SHOP), ("change.yaml", CHANGE), ("faulty.yaml", FAULTY)]
        {
            fs::write(files.path().join(name), text).unwrap();
        }
        Self { one, two, files }
    }

    /// What a command prints, as it is written down: `ONE`, `TWO` and `DIR` stand for paths, and
    /// `<time>`, `<ago>` for what depends on when the test runs.
    async fn printed(&self, line: &str) -> (String, String) {
        let dir = self.files.path().display().to_string();
        let (one, two) = (self.one.socket(), self.two.socket());
        let filled =
            |word: &str| word.replace("DIR", &dir).replace("ONE", &one).replace("TWO", &two);
        let args: Vec<String> = line.split_whitespace().map(filled).collect();
        let output = run(&args.iter().map(String::as_str).collect::<Vec<_>>()).await;
        let masked = |text: &str| {
            let text = text.replace(&dir, "DIR").replace(&one, "ONE").replace(&two, "TWO");
            // The flows' own times and the root's are fixed.
            let fixed = |t: &str| t.starts_with("2026-08-06") || t.starts_with("2036");
            let time = Regex::new(r"20\d\d-\d\d-\d\d[T ]\d\d:\d\d:\d\d(\.\d+)?Z?").unwrap();
            let text = time.replace_all(&text, |found: &regex::Captures<'_>| {
                if fixed(&found[0]) { found[0].to_owned() } else { "<time>".to_owned() }
            });
            let ago = Regex::new(r"\b(\d+[dhms])+ ago").unwrap();
            let text = ago.replace_all(&text, "<ago> ago");
            let left = Regex::new(r"\bin (\d+[dhms])+").unwrap();
            let text = left.replace_all(&text, "in <left>");
            text.replace(env!("CARGO_PKG_VERSION"), "<version>")
        };
        let mut text = format!("$ signet {line}\n{}", masked(&stdout(&output)));
        for said in masked(&stderr(&output)).lines() {
            text.push_str(&format!("stderr: {said}\n"));
        }
        text.push_str(&format!("exit: {}\n", code(&output)));
        (text, stdout(&output))
    }
}

/// `golden/NAME` is this text, or becomes it when that is asked for.
pub fn hold(name: &str, text: &str) {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/command_line/golden");
    let path = path.join(name);
    if env::var_os("UPDATE_GOLDEN").is_some_and(|value| value == "1") {
        fs::write(&path, text).unwrap();
    }
    let golden = fs::read_to_string(&path).unwrap_or_default();
    assert_eq!(
        text,
        golden,
        "{} says otherwise; a change that is meant is written with UPDATE_GOLDEN=1",
        path.display()
    );
}

/// Every command that asks agents or reads manifests, as people see it.
const TEXT: [&str; 31] = [
    "flows --socket ONE --socket TWO",
    "flows --socket TWO --ends -o table",
    "flows --socket TWO --ends -o wide",
    "flows --socket TWO --ends -o json",
    "flows --socket TWO --aggregate",
    "status --socket TWO",
    "status --all-nodes --socket TWO --socket ONE",
    "endpoints --socket TWO",
    "endpoints shop/payments-5b7f --socket TWO",
    "endpoints shop/checkout-6c9 --socket TWO",
    "endpoints shop/nobody --socket TWO",
    "identities --socket TWO",
    "services --socket TWO",
    "svid list --socket TWO",
    "svid show shop/frontend-7d9c --socket TWO",
    "policy list --socket TWO",
    "policy list -n legacy --socket TWO",
    "policy check --from shop/frontend --to shop/payments-5b7f:8080 --socket TWO",
    "policy check --from shop/intruder --to shop/payments-5b7f:8080 --socket TWO",
    "policy check --from @10.9.0.7 --to shop/payments-5b7f:8080 -f DIR/shop.yaml",
    "policy diff -f DIR/change.yaml --socket TWO",
    "policy diff -f DIR/change.yaml -n legacy --socket TWO",
    "policy suggest -n shop --socket TWO",
    "policy suggest -n shop --istio --socket TWO",
    "policy suggest -n shop --from-networkpolicies --socket TWO",
    "policy suggest -n legacy --socket TWO",
    "policy validate DIR/shop.yaml",
    "policy validate DIR/faulty.yaml",
    "rollout check shop --to strict --socket TWO",
    "rollout check legacy --to strict --socket TWO",
    "probe ready --socket TWO",
];

/// The same for programs: each line of these is a JSON object.
const JSON: [&str; 16] = [
    "flows --socket TWO --ends -o json",
    "flows --socket TWO --ends -o jsonpb",
    "flows --socket TWO --aggregate -o json",
    "top --once --interval 1 -o json --socket TWO",
    "status -o json --socket TWO",
    "endpoints -o json --socket TWO",
    "identities -o json --socket TWO",
    "services -o json --socket TWO",
    "svid list -o json --socket TWO",
    "policy list -o json --socket TWO",
    "policy check --from shop/frontend --to shop/payments-5b7f:8080 -o json --socket TWO",
    "policy diff -f DIR/change.yaml -o json --socket TWO",
    "policy validate DIR/shop.yaml -o json",
    "policy validate DIR/faulty.yaml -o json",
    "rollout check shop --to strict -o json --socket TWO",
    "rollout check legacy --to strict -o json --socket TWO",
];

#[tokio::test(flavor = "multi_thread")]
async fn what_commands_print_is_what_is_written_down() {
    let stage = Stage::set().await;
    let mut all = String::new();
    for line in TEXT {
        all.push_str(&stage.printed(line).await.0);
        all.push('\n');
    }
    hold("text.txt", &all);
}

/// Adds every path in a value with the types that are there.
fn shape(value: &Value, path: &str, paths: &mut BTreeMap<String, BTreeSet<&'static str>>) {
    let kind = match value {
        Value::Null => "null",
        Value::Bool(_) => "boolean",
        Value::Number(_) => "number",
        Value::String(_) => "string",
        Value::Array(items) => {
            items.iter().for_each(|item| shape(item, &format!("{path}[]"), paths));
            "array"
        }
        Value::Object(fields) => {
            fields.iter().for_each(|(key, item)| shape(item, &format!("{path}.{key}"), paths));
            "object"
        }
    };
    paths.entry(path.to_owned()).or_default().insert(kind);
}

#[tokio::test(flavor = "multi_thread")]
async fn json_has_the_shape_that_is_written_down() {
    let stage = Stage::set().await;
    let mut all = String::new();
    for line in JSON {
        let (_, out) = stage.printed(line).await;
        let mut paths = BTreeMap::new();
        let mut schemas = BTreeSet::new();
        assert!(!out.is_empty(), "{line}");
        for text in out.lines() {
            let value: Value = serde_json::from_str(text).unwrap_or_else(|e| {
                panic!("signet {line}: a line is no JSON ({e}): {text}");
            });
            schemas.insert(value["schema"].as_str().map(str::to_owned));
            shape(&value, "", &mut paths);
        }
        all.push_str(&format!("$ signet {line}\n"));
        // Hubble's form is Hubble's.
        if !line.contains("jsonpb") {
            let named: Vec<_> = schemas.into_iter().flatten().collect();
            let [schema] = &named[..] else { panic!("signet {line}: its records name {named:?}") };
            assert!(schema.starts_with("signet.dev/") && schema.ends_with("/v1"), "{schema}");
            all.push_str(&format!("schema {schema}\n"));
        }
        for (path, kinds) in &paths {
            if !path.is_empty() {
                let kinds: Vec<_> = kinds.iter().copied().collect();
                all.push_str(&format!("{path}: {}\n", kinds.join("|")));
            }
        }
        all.push('\n');
    }
    hold("json.txt", &all);
}

/// `signet flows -o json` of the contract's first record, field by field.
#[tokio::test(flavor = "multi_thread")]
async fn a_flow_in_json_is_the_contracts_record() {
    let node = Node::start(inputs("node-2"));
    node.record([allowed()]).await;
    let output = run(&["flows", "-o", "json", "--socket", &node.socket()]).await;
    let uuid = Uuid::from_u128(1);
    assert_eq!(
        stdout(&output),
        format!(
            r#"{{"schema":"signet.dev/flow/v1","event":"verdict","time":"2026-08-06T10:12:04.318Z","uuid":"{uuid}","node":"node-2","reporter":"destination","direction":"ingress","protocol":"tcp","via":"mtls","verdict":"FORWARDED","reason":"allowed","revision":118,"policy":{{"kind":"IdentityPolicy","namespace":"shop","name":"payments-callers"}},"source":{{"namespace":"shop","pod":"frontend-7d9c","serviceAccount":"frontend","identity":"spiffe://cluster.local/ns/shop/sa/frontend","knownBy":"mtls","ip":"10.0.1.5","port":41872}},"destination":{{"namespace":"shop","pod":"payments-5b7f","serviceAccount":"payments","identity":"spiffe://cluster.local/ns/shop/sa/payments","knownBy":"kernel","ip":"10.0.2.7","port":8080}}}}"#
        ) + "\n"
    );
}
