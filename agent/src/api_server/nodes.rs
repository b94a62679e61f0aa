//! What the authority's leader reads and writes of nodes: their taints, the agents on them, and
//! the Lease that says who is the leader.

use std::collections::{BTreeMap, BTreeSet};

use k8s_openapi::api::{
    coordination::v1::Lease,
    core::v1::{Node, Pod, Taint},
};
use kube::{
    Api,
    api::{ListParams, Patch, PatchParams, PostParams},
    core::Request,
};
use serde_json::{Value, json};

use super::{ApiError, ApiServer, MAX_OBJECTS, PAGE, Written, within, written};

/// A node, as far as its taint is concerned.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct NodeTaints {
    /// `metadata.name`.
    pub name: String,
    /// `metadata.uid`.
    pub uid: String,
    /// `metadata.resourceVersion`, for a write that nobody else's may precede.
    pub version: String,
    /// All its taints.
    pub taints: Vec<Taint>,
}

impl ApiServer {
    /// Every node with its taints.
    ///
    /// # Errors
    /// When the API server does not answer or refuses.
    pub async fn node_taints(&self) -> Result<Vec<NodeTaints>, ApiError> {
        let nodes = self.nodes().await?;
        Ok(nodes.into_iter().filter_map(taints_of).collect())
    }

    /// Replaces a node's taints if it is still what was read.
    ///
    /// # Errors
    /// When the API server does not answer or refuses; that somebody else was first is none.
    pub async fn set_taints(&self, node: &NodeTaints) -> Result<Written, ApiError> {
        let api: Api<Node> = Api::all(self.client.clone());
        let patch = json!({
            "metadata": {"resourceVersion": node.version, "uid": node.uid},
            "spec": {"taints": node.taints},
        });
        let what = format!("the taints of node {}", node.name);
        let params = PatchParams::default();
        let done = within(&what, api.patch(&node.name, &params, &Patch::Merge(&patch))).await;
        written(done.map(|node| node.metadata.resource_version))
    }

    /// The nodes on which a Ready pod of one of these service accounts (namespace, name) runs.
    ///
    /// # Errors
    /// When the API server does not answer or refuses.
    pub async fn nodes_with_ready_pods(
        &self,
        accounts: &[(&str, &str)],
    ) -> Result<BTreeSet<String>, ApiError> {
        let mut nodes = BTreeSet::new();
        let namespaces: BTreeSet<&str> = accounts.iter().map(|(namespace, _)| *namespace).collect();
        for namespace in namespaces {
            let api: Api<Pod> = Api::namespaced(self.client.clone(), namespace);
            let what = format!("the pods of namespace {namespace}");
            let pods = self.list(api, &what, ListParams::default()).await?;
            let is_meant = |account: Option<&str>| {
                accounts.iter().any(|(of, name)| *of == namespace && account == Some(*name))
            };
            for pod in pods.iter().filter(|pod| is_ready(pod)) {
                let Some(spec) = &pod.spec else { continue };
                if is_meant(spec.service_account_name.as_deref()) {
                    nodes.extend(spec.node_name.clone());
                }
            }
        }
        Ok(nodes)
    }

    /// Who owns each cluster-wide object of a custom kind: the first owner's uid by name.
    ///
    /// # Errors
    /// When the API server does not answer, refuses, or lists without end.
    pub async fn owners(
        &self,
        api_version: &str,
        plural: &str,
    ) -> Result<BTreeMap<String, String>, ApiError> {
        let what = format!("the {plural}");
        let path = format!("/apis/{api_version}/{plural}");
        let mut params = ListParams::default().limit(PAGE);
        let mut all = BTreeMap::new();
        loop {
            let request = Request::new(path.clone()).list(&params);
            let request = request.map_err(|error| ApiError::Config(error.to_string()))?;
            let page: Value = within(&what, self.client.request(request)).await?;
            for item in page["items"].as_array().into_iter().flatten() {
                let text = |pointer: &str| item.pointer(pointer).and_then(Value::as_str);
                let owner = text("/metadata/ownerReferences/0/uid").unwrap_or_default();
                let name = text("/metadata/name").unwrap_or_default();
                all.insert(name.to_owned(), owner.to_owned());
            }
            if all.len() > MAX_OBJECTS {
                return Err(ApiError::TooMany(what));
            }
            match page["metadata"]["continue"].as_str().filter(|token| !token.is_empty()) {
                Some(token) => params = params.continue_token(token),
                None => return Ok(all),
            }
        }
    }

    /// A Lease, as it is now.
    ///
    /// # Errors
    /// When the API server does not answer or refuses.
    pub async fn lease(&self, namespace: &str, name: &str) -> Result<Option<Lease>, ApiError> {
        let api: Api<Lease> = Api::namespaced(self.client.clone(), namespace);
        Ok(within(&format!("lease {namespace}/{name}"), api.get_opt(name)).await?)
    }

    /// Replaces a Lease if it is still what was read.
    ///
    /// # Errors
    /// When the API server does not answer or refuses; that somebody else was first is none.
    pub async fn write_lease(
        &self,
        namespace: &str,
        name: &str,
        lease: &Lease,
    ) -> Result<Written, ApiError> {
        let api: Api<Lease> = Api::namespaced(self.client.clone(), namespace);
        let what = format!("lease {namespace}/{name}");
        let done = within(&what, api.replace(name, &PostParams::default(), lease)).await;
        written(done.map(|lease| lease.metadata.resource_version))
    }
}

fn taints_of(node: Node) -> Option<NodeTaints> {
    Some(NodeTaints {
        name: node.metadata.name?,
        uid: node.metadata.uid?,
        version: node.metadata.resource_version?,
        taints: node.spec.and_then(|spec| spec.taints).unwrap_or_default(),
    })
}

fn is_ready(pod: &Pod) -> bool {
    let conditions = pod.status.as_ref().and_then(|status| status.conditions.as_deref());
    let is_ending = pod.metadata.deletion_timestamp.is_some();
    let mut conditions = conditions.unwrap_or_default().iter();
    !is_ending && conditions.any(|c| c.type_ == "Ready" && c.status == "True")
}
