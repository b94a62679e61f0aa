//! NodeEnrolment (`signet.dev/v1alpha1`): what a node announces, as an object of the API.
//!
//! Cluster-scoped, named like its node; the node's agent alone writes it (an admission policy
//! holds that). Everything is in `status`, which is no subresource: one write says it all.

use std::{collections::BTreeMap, sync::Arc};

use jiff::Timestamp;
use serde_json::{Value, json};

use super::Announcement;
use crate::{
    cluster::model::PodUid,
    config::yaml::{Fault, Node},
};

/// Group and version.
pub const API_VERSION: &str = "signet.dev/v1alpha1";
/// The kind.
pub const KIND: &str = "NodeEnrolment";
/// Its plural, in paths.
pub const PLURAL: &str = "nodeenrolments";
/// Pods of one node: more than any kubelet runs, and with the longest names 160 KiB.
pub const MAX_PODS: usize = 500;

/// The CustomResourceDefinition: `manifests/crds/nodeenrolments.yaml` is written from here.
pub fn definition() -> Value {
    json!({
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": format!("{PLURAL}.signet.dev")},
        "spec": {
            "group": "signet.dev",
            "scope": "Cluster",
            "names": {
                "kind": KIND,
                "listKind": format!("{KIND}List"),
                "plural": PLURAL,
                "singular": KIND.to_lowercase(),
                "shortNames": ["nenr"],
                "categories": ["signet"],
            },
            "versions": [{
                "name": "v1alpha1",
                "served": true,
                "storage": true,
                "additionalPrinterColumns": [
                    {"name": "Revision", "type": "integer", "jsonPath": ".status.revision"},
                    {"name": "Written", "type": "date", "jsonPath": ".status.time"},
                    {"name": "Age", "type": "date", "jsonPath": ".metadata.creationTimestamp"},
                ],
                "schema": {"openAPIV3Schema": {
                    "type": "object",
                    "description": "Which pods of a node are served: their listeners, SVID and \
                                    policy are in place. Named like the node, whose agent \
                                    alone writes it.",
                    "required": ["status"],
                    "properties": {
                        "apiVersion": {"type": "string"},
                        "kind": {"type": "string"},
                        "metadata": {"type": "object"},
                        "status": status(),
                    },
                }},
            }],
        },
    })
}

fn status() -> Value {
    json!({
        "type": "object",
        "required": ["served", "revision", "time"],
        "properties": {
            "served": {
                "type": "array", "maxItems": MAX_PODS,
                "x-kubernetes-list-type": "atomic",
                "description": "The served pods.",
                "items": {
                    "type": "object",
                    "required": ["uid", "pod"],
                    "properties": {
                        "uid": {
                            "type": "string", "minLength": 1, "maxLength": 63,
                            "description": "The pod's metadata.uid; what counts.",
                        },
                        "pod": {
                            "type": "string", "maxLength": 317,
                            "description": "namespace/name, for people.",
                        },
                    },
                },
            },
            "revision": {
                "type": "integer", "format": "int64", "minimum": 0,
                "description": "Revision of the agent's world when it wrote.",
            },
            "time": {
                "type": "string", "format": "date-time",
                "description": "When the agent wrote.",
            },
        },
    })
}

/// The object of an announcement; with the node's uid it goes when the Node does.
pub fn object(
    node: &str,
    node_uid: Option<&str>,
    served: &BTreeMap<PodUid, Arc<str>>,
    revision: u64,
    now: Timestamp,
) -> Value {
    let served: Vec<Value> = served
        .iter()
        .take(MAX_PODS)
        .map(|(uid, pod)| json!({"uid": uid.as_ref(), "pod": pod.as_ref()}))
        .collect();
    let owners: Vec<Value> = node_uid
        .map(|uid| json!({"apiVersion": "v1", "kind": "Node", "name": node, "uid": uid}))
        .into_iter()
        .collect();
    json!({
        "apiVersion": API_VERSION,
        "kind": KIND,
        "metadata": {"name": node, "ownerReferences": owners},
        "status": {
            "served": served,
            // What a 64-bit integer of the API holds.
            "revision": i64::try_from(revision).unwrap_or(i64::MAX),
            "time": format!("{now:.0}"),
        },
    })
}

impl Announcement {
    /// Reads a NodeEnrolment that is named `node`.
    ///
    /// # Errors
    ///
    /// The first field that is unknown, missing or not what it should be.
    pub fn of_object(node: &str, object: &Node) -> Result<Self, Fault> {
        object.known_fields(&["apiVersion", "kind", "metadata", "status"], |_, _| Ok(()))?;
        let Some(status) = object.get("status") else {
            return Err(object.fault("missing; the node's agent writes it").within("status"));
        };
        Self::of_fields(node, status, &["served", "revision", "time"], MAX_PODS)
            .map_err(|fault| fault.within("status"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEAD: &str = "# Generated from agent/src/cluster/enrolment/crd.rs; do not edit.
# SIGNET_WRITE_GENERATED=1 cargo test -p signet generated
";

    #[test]
    fn generated_crd_is_in_step() {
        let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("../manifests/crds/nodeenrolments.yaml");
        let text = HEAD.to_owned() + &serde_saphyr::to_string(&definition()).unwrap();
        if std::env::var_os("SIGNET_WRITE_GENERATED").is_some() {
            std::fs::write(&path, &text).unwrap();
        }
        assert!(
            std::fs::read_to_string(&path).unwrap_or_default() == text,
            "manifests/crds/nodeenrolments.yaml is behind the code: \
             SIGNET_WRITE_GENERATED=1 cargo test -p signet generated"
        );
    }

    fn served(count: usize) -> BTreeMap<PodUid, Arc<str>> {
        (0..count).map(|n| (format!("u-{n:04}").into(), format!("shop/web-{n}").into())).collect()
    }

    #[test]
    fn what_is_written_is_read_back_and_fits_the_schema() {
        let now = Timestamp::from_second(1_700_000_000).unwrap();
        let written = object("node-1", Some("n-uid"), &served(3), 7, now);
        assert_eq!(written["metadata"]["ownerReferences"][0]["uid"], "n-uid");
        let read =
            Announcement::of_object("node-1", &Node::from_json(written.clone()).unwrap()).unwrap();
        assert_eq!((read.served, read.revision, read.time), (served(3), 7, now));
        assert_eq!(&*read.node, "node-1");

        // Every field of the object is one of the schema's, and every required one is there.
        let schema = &definition()["spec"]["versions"][0]["schema"]["openAPIV3Schema"];
        let status = written["status"].as_object().unwrap();
        let known = schema["properties"]["status"]["properties"].as_object().unwrap();
        assert_eq!(status.keys().collect::<Vec<_>>(), known.keys().collect::<Vec<_>>());
    }

    #[test]
    fn it_is_bounded_both_ways() {
        let now = Timestamp::from_second(0).unwrap();
        let written = object("n", None, &served(MAX_PODS + 1), 1, now);
        assert_eq!(written["status"]["served"].as_array().unwrap().len(), MAX_PODS);
        assert!(written["metadata"]["ownerReferences"].as_array().unwrap().is_empty());

        let mut longer = written.clone();
        let entries = longer["status"]["served"].as_array_mut().unwrap();
        entries.push(json!({"uid": "one-more", "pod": "shop/x"}));
        let fault = Announcement::of_object("n", &Node::from_json(longer).unwrap()).unwrap_err();
        assert_eq!(fault.to_string(), "status.served: 501 entries; 500 is the most");
    }

    #[test]
    fn what_is_not_one_is_refused() {
        let of = |object: Value| {
            let node = Node::from_json(object).unwrap();
            Announcement::of_object("n", &node).unwrap_err().to_string()
        };
        let head = json!({"apiVersion": API_VERSION, "kind": KIND, "metadata": {"name": "n"}});
        let with = |status: Value| {
            let mut object = head.clone();
            object["status"] = status;
            of(object)
        };
        assert_eq!(of(head.clone()), "status: missing; the node's agent writes it");
        assert_eq!(with(json!({"served": [], "revision": 1})), "status.time: missing");
        assert_eq!(
            with(json!({"served": [{"uid": "a"}], "revision": 1, "time": "1970-01-01T00:00:00Z"})),
            "status.served[0].pod: missing"
        );
        assert_eq!(with(json!({"serve": []})), "status.serve: unknown field; did you mean served?");
    }
}
