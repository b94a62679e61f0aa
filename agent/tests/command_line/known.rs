//! `signet identities` and `signet services`.

use std::{collections::HashMap, sync::Arc};

use signet::{
    admin::StatusInputs,
    cluster::model::{Endpoint, ObjectName, Pod, Service, ServicePort},
    endpoint::state::NodeState,
    spiffe::SpiffeId,
};
use signet_ebpf::abi::Mode;

use super::{Node, code, inputs, pod, run, stderr, stdout};

fn known() -> StatusInputs {
    let mut inputs = inputs("node-1");
    let mut state = NodeState::clone(inputs.state.as_ref().unwrap());
    let mut world = (*state.world).clone();
    let remote = |name: &str, mode, address: &str| {
        let pod = pod(name, mode);
        let ips = vec![address.parse().unwrap()];
        Arc::new(Pod { node: Some("node-2".into()), ips, ..Pod::clone(&pod) })
    };
    for pod in
        [remote("payments-9x", Mode::Strict, "10.0.3.1"), remote("legacy-1", Mode::Off, "10.0.3.2")]
    {
        world.pods_by_ip.insert(pod.ips[0], pod.uid.clone());
        world.pods.insert(pod.uid.clone(), pod);
    }
    // This node serves its pod; the other one has not announced its own.
    world.served.insert("3f1c-payments-5b7f".into(), "node-1".into());
    let endpoint = |address: &str, ready, serving| Endpoint {
        ip: address.parse().unwrap(),
        port: 8080,
        ready,
        serving,
        node: None,
        zones: [].into(),
    };
    let name = |name: &str| ObjectName { namespace: "shop".into(), name: name.into() };
    let port = |endpoints| ServicePort { name: "http".into(), port: 80, protocol: 6, endpoints };
    let services = [
        Service {
            name: name("payments"),
            cluster_ips: vec!["10.96.0.7".parse().unwrap(), "fd00::7".parse().unwrap()],
            external_ips: vec![],
            node_local: false,
            sticky: false,
            ports: vec![port(vec![
                endpoint("10.0.2.7", true, true),
                endpoint("10.0.3.1", false, true),
                endpoint("10.0.3.2", true, true),
                endpoint("fd00::99", false, false),
            ])],
            is_resolver: false,
        },
        Service {
            name: name("empty"),
            cluster_ips: vec![],
            external_ips: vec![],
            node_local: false,
            sticky: false,
            ports: vec![port(vec![])],
            is_resolver: false,
        },
    ];
    for service in services {
        world.services.insert(service.name.clone(), Arc::new(service));
    }
    state.world = Arc::new(world);
    let id = |id: &str| SpiffeId::parse(id).unwrap();
    state.identities = Arc::new(HashMap::from([
        (257, id("spiffe://cluster.local/ns/shop/sa/payments")),
        (258, id("spiffe://cluster.local/ns/shop/sa/frontend")),
        // Another domain's account of the same name is not the pods'.
        (259, id("spiffe://partner.example/ns/shop/sa/payments")),
    ]));
    inputs.state = Some(Arc::new(state));
    inputs
}

#[tokio::test(flavor = "multi_thread")]
async fn identities_are_listed_with_their_pods_and_svids() {
    let node = Node::start(known());
    let socket = node.socket();
    let output = run(&["identities", "--socket", &socket]).await;
    let text = stdout(&output);
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(code(&output), 0, "{}", stderr(&output));
    assert_eq!(
        lines[0].split_whitespace().collect::<Vec<_>>(),
        ["IDENTITY", "NODE", "NUMBER", "PODS", "ELSEWHERE", "SVID", "UNTIL"]
    );
    let row = |n: usize| lines[n].split_whitespace().collect::<Vec<_>>();
    assert_eq!(
        row(1),
        [
            "spiffe://cluster.local/ns/shop/sa/frontend",
            "node-1",
            "258",
            "shop/frontend-7d9c",
            "0",
            "-",
            "-"
        ]
    );
    assert_eq!(
        row(2)[..6],
        [
            "spiffe://cluster.local/ns/shop/sa/payments",
            "node-1",
            "257",
            "shop/payments-5b7f",
            "1",
            "valid"
        ]
    );
    assert_eq!(
        row(3),
        ["spiffe://partner.example/ns/shop/sa/payments", "node-1", "259", "-", "0", "-", "-"]
    );
    let output = run(&["identities", "--socket", &socket, "shop/pay*", "-o", "json"]).await;
    let json: serde_json::Value = serde_json::from_str(&stdout(&output)).unwrap();
    assert_eq!(json["schema"], "signet.dev/identities/v1");
    assert_eq!(json["identities"].as_array().unwrap().len(), 2);
    assert_eq!(json["identities"][0]["svid"]["state"], "valid");
    assert_eq!(json["identities"][1]["svid"], serde_json::Value::Null);
    let output = run(&["identities", "--socket", &socket, "spiffe://partner.example/*"]).await;
    assert_eq!((code(&output), stdout(&output).lines().count()), (0, 2));
    let output = run(&["identities", "--socket", &socket, "shop/nobody"]).await;
    assert_eq!(code(&output), 1);
    assert_eq!(stderr(&output), "no identity shop/nobody on the nodes asked\n");
}

#[tokio::test(flavor = "multi_thread")]
async fn services_are_listed_with_the_way_to_each_endpoint() {
    let node = Node::start(known());
    let socket = node.socket();
    let output = run(&["services", "--socket", &socket]).await;
    assert_eq!(
        stdout(&output),
        "SERVICE        NODE    ADDRESS            PORT    ENDPOINT         POD                 STATE        WAY\n\
         shop/empty     node-1  -                  80/tcp  -                -                   -            -\n\
         shop/payments  node-1  10.96.0.7,fd00::7  80/tcp  10.0.2.7:8080    shop/payments-5b7f  ready        tunnel\n\
         shop/payments  node-1  10.96.0.7,fd00::7  80/tcp  10.0.3.1:8080    shop/payments-9x    terminating  unserved\n\
         shop/payments  node-1  10.96.0.7,fd00::7  80/tcp  10.0.3.2:8080    shop/legacy-1       ready        direct\n\
         shop/payments  node-1  10.96.0.7,fd00::7  80/tcp  [fd00::99]:8080  -                   not-ready    direct\n"
    );
    assert_eq!(code(&output), 0);
    let output = run(&["services", "--socket", &socket, "shop/payments", "-o", "json"]).await;
    let json: serde_json::Value = serde_json::from_str(&stdout(&output)).unwrap();
    assert_eq!(json["revision"], 118);
    assert_eq!(json["services"].as_array().unwrap().len(), 1);
    assert_eq!(json["services"][0]["ports"][0]["endpoints"][1]["node"], "node-2");
    let output = run(&["services", "--socket", &socket, "shop/nothing", "-o", "json"]).await;
    let json: serde_json::Value = serde_json::from_str(&stdout(&output)).unwrap();
    assert_eq!((code(&output), &json["node"]), (1, &"node-1".into()));
    assert_eq!(json["services"], serde_json::json!([]));
    let output = run(&["services", "--socket", &socket, "payments"]).await;
    assert_eq!(code(&output), 2);
    assert!(stderr(&output).contains("NAMESPACE/NAME"), "{}", stderr(&output));
}
