//! Whether a node may have an identity's certificate. Pure.

use std::sync::Arc;

use crate::spiffe::{SpiffeId, TrustDomain};

/// A pod, as far as this question goes.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct NodePod {
    /// `metadata.uid`.
    pub uid: Arc<str>,
    /// Namespace.
    pub namespace: Arc<str>,
    /// Name.
    pub name: Arc<str>,
    /// Its service account.
    pub service_account: Arc<str>,
    /// `status.phase` is Pending or Running.
    pub alive: bool,
    /// A static pod's mirror.
    pub mirror: bool,
}

/// Why a node may not have it.
#[derive(Debug, thiserror::Error, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Denied {
    /// The identity is of another trust domain.
    #[error("{id} is not of the trust domain {domain} that this authority signs for")]
    TrustDomain {
        /// What was asked for.
        id: SpiffeId,
        /// Ours.
        domain: TrustDomain,
    },
    /// The identity is not a service account's.
    #[error("{0} is not a service account's identity (/ns/<namespace>/sa/<service account>)")]
    NotAnAccount(SpiffeId),
    /// No pod of the account is on the node.
    #[error("no pod of {id} is on node {node}")]
    NoPod {
        /// What was asked for.
        id: SpiffeId,
        /// For which node.
        node: Arc<str>,
    },
    /// There are pods, but all have finished.
    #[error("the pods of {id} on node {node} have finished")]
    Finished {
        /// What was asked for.
        id: SpiffeId,
        /// For which node.
        node: Arc<str>,
    },
    /// There are pods, but only mirrors of static ones.
    #[error("the pods of {id} on node {node} are mirrors of static pods, which have no account")]
    Mirror {
        /// What was asked for.
        id: SpiffeId,
        /// For which node.
        node: Arc<str>,
    },
}

impl Denied {
    /// A short stable name, for the audit log.
    pub const fn kind(&self) -> &'static str {
        match self {
            Self::TrustDomain { .. } => "foreign_trust_domain",
            Self::NotAnAccount(_) => "not_a_service_account",
            Self::NoPod { .. } => "no_pod_on_node",
            Self::Finished { .. } => "pod_finished",
            Self::Mirror { .. } => "mirror_pod",
        }
    }

    /// True when a newer list of pods could change the answer.
    pub const fn may_be_stale(&self) -> bool {
        matches!(self, Self::NoPod { .. } | Self::Finished { .. } | Self::Mirror { .. })
    }
}

/// The pod for which `node` may have a certificate of `id`: alive, no mirror, of that account.
pub fn authorize<'a>(
    id: &SpiffeId,
    domain: &TrustDomain,
    node: &Arc<str>,
    pods: &'a [NodePod],
) -> Result<&'a NodePod, Denied> {
    if id.trust_domain() != *domain {
        return Err(Denied::TrustDomain { id: id.clone(), domain: domain.clone() });
    }
    let Some((namespace, account)) = id.workload() else {
        return Err(Denied::NotAnAccount(id.clone()));
    };
    let of_account =
        |pod: &&NodePod| *pod.namespace == *namespace && *pod.service_account == *account;
    let mut nearest = Denied::NoPod { id: id.clone(), node: node.clone() };
    for pod in pods.iter().filter(of_account) {
        match (pod.mirror, pod.alive) {
            (false, true) => return Ok(pod),
            (true, _) => nearest = Denied::Mirror { id: id.clone(), node: node.clone() },
            (false, false) => nearest = Denied::Finished { id: id.clone(), node: node.clone() },
        }
    }
    Err(nearest)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(account: &str) -> NodePod {
        NodePod {
            uid: format!("uid-{account}").into(),
            namespace: "shop".into(),
            name: "p".into(),
            service_account: account.into(),
            alive: true,
            mirror: false,
        }
    }

    #[test]
    fn only_while_a_live_pod_of_the_account_is_there() {
        let domain = TrustDomain::parse("td").unwrap();
        let node: Arc<str> = "node-1".into();
        let pods = [
            pod("web"),
            NodePod { alive: false, ..pod("done") },
            NodePod { mirror: true, ..pod("static") },
            NodePod { alive: false, ..pod("again") },
            pod("again"),
        ];
        let ask = |id: &str| {
            authorize(&SpiffeId::parse(id).unwrap(), &domain, &node, &pods)
                .map(|pod| pod.service_account.to_string())
                .map_err(|denied| denied.kind())
        };
        assert_eq!(ask("spiffe://td/ns/shop/sa/web"), Ok("web".into()));
        assert_eq!(ask("spiffe://td/ns/shop/sa/again"), Ok("again".into()));
        assert_eq!(ask("spiffe://td/ns/shop/sa/done"), Err("pod_finished"));
        assert_eq!(ask("spiffe://td/ns/shop/sa/static"), Err("mirror_pod"));
        assert_eq!(ask("spiffe://td/ns/shop/sa/other"), Err("no_pod_on_node"));
        assert_eq!(ask("spiffe://td/ns/prod/sa/web"), Err("no_pod_on_node"));
        assert_eq!(ask("spiffe://other/ns/shop/sa/web"), Err("foreign_trust_domain"));
        for id in ["spiffe://td", "spiffe://td/web", "spiffe://td/ns/shop/sa/web/x"] {
            assert_eq!(ask(id), Err("not_a_service_account"), "{id}");
        }
    }
}
