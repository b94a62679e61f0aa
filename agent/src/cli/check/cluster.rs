//! The API server: what is installed, who may what, what runs.

use std::path::PathBuf;

use k8s_openapi::api::apps::v1::{DaemonSet, Deployment};
use kube::Api;

use super::Findings;
use crate::{
    api_server::{ApiError, ApiServer, Right, TokenUser, access, persons_access},
    cli::exit::{Exit, Failure},
    cluster::kubernetes,
    config::AgentConfig,
    viewer::callers,
};

/// Signet's own kinds.
const KINDS: [&str; 3] = ["clusteridentitypolicies", "identitypolicies", "nodeenrolments"];
/// ValidatingAdmissionPolicies are what keeps a node to its own NodeEnrolment.
const OLDEST: u32 = 30;

/// A cluster, looked at by a person.
#[derive(clap::Args, Clone, Debug)]
#[command(next_help_heading = "Cluster")]
pub(super) struct ClusterArgs {
    /// The kubeconfig that leads there [default: $KUBECONFIG, or ~/.kube/config]
    #[arg(long, value_name = "file")]
    kubeconfig: Option<PathBuf>,
    /// The kubeconfig's context
    #[arg(long, value_name = "name")]
    context: Option<String>,
    /// The agents' namespace
    #[arg(long, value_name = "name", default_value = "signet-system")]
    agent_namespace: String,
}

/// Looks at it as the agent of this node does.
pub(super) async fn look_as_agent(config: &AgentConfig, findings: &mut Findings) {
    if let Some(dir) = &config.cluster_dir {
        if dir.is_dir() {
            findings.ok("cluster", "directory", format!("{} is followed", dir.display()));
        } else {
            findings.failed(
                "cluster",
                "directory",
                Exit::No,
                format!("{} is no directory", dir.display()),
                "make it, or correct clusterDir",
            );
        }
        return;
    }
    let found = match access(config.kubeconfig.as_deref()).await {
        Ok(found) => found,
        Err(error) => return no_access(&error, findings),
    };
    let namespace = config.namespace.clone().unwrap_or_else(|| found.default_namespace.clone());
    let Some(api) = server(found, findings).await else { return };
    kinds(&api, findings).await;
    let node = if config.node.is_empty() { "-" } else { &config.node };
    let mut missing = Vec::new();
    for (right, is_optional) in needed(node, &namespace) {
        match api.may_i(&right).await {
            Ok(true) => {}
            Ok(false) => missing.push((right, is_optional)),
            Err(error) => return unasked("rights", &error, findings),
        }
    }
    rights("this credential", &missing, findings);
}

/// Looks at it as a person.
///
/// # Errors
/// Without a usable kubeconfig.
pub(super) async fn look(args: &ClusterArgs, findings: &mut Findings) -> Result<(), Failure> {
    let found = persons_access(args.kubeconfig.as_deref(), args.context.as_deref())
        .await
        .map_err(|error| Failure::caused(Exit::Input, error))?;
    let Some(api) = server(found, findings).await else { return Ok(()) };
    kinds(&api, findings).await;
    agents_rights(&api, &args.agent_namespace, findings).await;
    own_rights(&api, &args.agent_namespace, findings).await;
    running(&api, &args.agent_namespace, findings).await;
    Ok(())
}

/// Everything that an agent needs.
fn needed(node: &str, namespace: &str) -> Vec<(Right, bool)> {
    let mut all = kubernetes::rights(node, namespace);
    all.push((Right::of("create", "authentication.k8s.io", "tokenreviews"), false));
    all.push((Right::of("create", "authorization.k8s.io", "subjectaccessreviews"), false));
    all
}

fn no_access(error: &ApiError, findings: &mut Findings) {
    findings.failed(
        "api",
        "server",
        Exit::No,
        error.to_string(),
        "set kubeconfig, or run this in the agent's pod; standalone, set clusterDir",
    );
}

async fn server(found: kube::Config, findings: &mut Findings) -> Option<ApiServer> {
    let url = found.cluster_url.to_string();
    let url = url.trim_end_matches('/');
    let api = match ApiServer::of(found) {
        Ok(api) => api,
        Err(error) => {
            no_access(&error, findings);
            return None;
        }
    };
    match api.version().await {
        Ok(version) => {
            match minor(&version) {
                Some(minor) if minor < OLDEST => findings.warning(
                    "api",
                    "server",
                    format!("{url} is Kubernetes {version}"),
                    format!(
                        "before 1.{OLDEST} admission does not hold a node to its own \
                         NodeEnrolment: use a newer one"
                    ),
                ),
                _ => findings.ok("api", "server", format!("{url} is Kubernetes {version}")),
            }
            Some(api)
        }
        Err(error) => {
            unasked("server", &error, findings);
            None
        }
    }
}

/// The minor number of `v1.33.0`.
fn minor(version: &str) -> Option<u32> {
    let digits = version.strip_prefix("v1.")?.split(|c: char| !c.is_ascii_digit()).next()?;
    digits.parse().ok()
}

fn unasked(check: &'static str, error: &ApiError, findings: &mut Findings) {
    let (exit, remedy) = match error {
        ApiError::Refused { .. } => (Exit::Denied, "is the credential still valid?"),
        _ => (Exit::Unreachable, "is the API server up, and does a firewall block it?"),
    };
    findings.failed("api", check, exit, error.to_string(), remedy);
}

async fn kinds(api: &ApiServer, findings: &mut Findings) {
    match api.kinds_of("signet.dev/v1alpha1").await {
        Ok(found) => {
            let found = found.unwrap_or_default();
            let missing: Vec<&str> =
                KINDS.into_iter().filter(|kind| !found.contains(*kind)).collect();
            if missing.is_empty() {
                findings.ok("api", "kinds", "every kind of signet.dev/v1alpha1 is installed");
            } else {
                findings.failed(
                    "api",
                    "kinds",
                    Exit::No,
                    format!("not installed: {} of signet.dev/v1alpha1", missing.join(", ")),
                    "kubectl apply -k manifests/crds",
                );
            }
        }
        Err(error) => unasked("kinds", &error, findings),
    }
    match api.kinds_of("security.istio.io/v1").await {
        Ok(Some(_)) => findings.ok("api", "istio", "Istio's security kinds are read, too"),
        Ok(None) => findings.ok("api", "istio", "Istio's security kinds are not installed"),
        Err(error) => unasked("istio", &error, findings),
    }
}

fn rights(whose: &str, missing: &[(Right, bool)], findings: &mut Findings) {
    let list = |optional: bool| -> Vec<String> {
        let some = missing.iter().filter(|(_, is_optional)| *is_optional == optional);
        some.map(|(right, _)| right.to_string()).collect()
    };
    let (needed, optional) = (list(false), list(true));
    if needed.is_empty() && optional.is_empty() {
        findings.ok("api", "rights", format!("{whose} may do what an agent does"));
    }
    if !needed.is_empty() {
        findings.failed(
            "api",
            "rights",
            Exit::Denied,
            format!("{whose} may not {}", needed.join(", ")),
            "kubectl apply -f manifests/agent/rbac.yaml, and run the agent as that service account",
        );
    }
    if !optional.is_empty() {
        findings.warning(
            "api",
            "rights",
            format!("{whose} may not {}", optional.join(", ")),
            "if these kinds are installed, kubectl apply -f manifests/agent/rbac.yaml",
        );
    }
}

/// What the agents' service account may, where this person may ask.
async fn agents_rights(api: &ApiServer, namespace: &str, findings: &mut Findings) {
    let may_ask = Right::of("create", "authorization.k8s.io", "subjectaccessreviews");
    match api.may_i(&may_ask).await {
        Ok(true) => {}
        Ok(false) => {
            return findings.skipped("api", "rights", format!("this person may not {may_ask}"));
        }
        Err(error) => return unasked("rights", &error, findings),
    }
    let agent = TokenUser {
        username: format!("system:serviceaccount:{namespace}:signet-agent"),
        groups: vec![
            "system:serviceaccounts".into(),
            format!("system:serviceaccounts:{namespace}"),
            "system:authenticated".into(),
        ],
        ..TokenUser::default()
    };
    let mut missing = Vec::new();
    for (right, is_optional) in needed("-", namespace) {
        match api.may(&agent, &right).await {
            Ok(true) => {}
            Ok(false) => missing.push((right, is_optional)),
            Err(error) => return unasked("rights", &error, findings),
        }
    }
    rights(&agent.username, &missing, findings);
    let viewer = TokenUser {
        username: format!("system:serviceaccount:{namespace}:signet-viewer"),
        ..TokenUser::default()
    };
    match api.may(&viewer, &callers::right()).await {
        Ok(true) => findings.ok("api", "viewer", format!("{} may get flows", viewer.username)),
        Ok(false) => findings.failed(
            "api",
            "viewer",
            Exit::Denied,
            format!("{} may not {}", viewer.username, callers::right()),
            "kubectl apply -f manifests/agent/viewer.yaml",
        ),
        Err(error) => unasked("viewer", &error, findings),
    }
}

/// What this person needs to look at all nodes.
async fn own_rights(api: &ApiServer, namespace: &str, findings: &mut Findings) {
    let wanted = [
        Right::of("list", "", "pods").within(namespace),
        Right { subresource: "portforward", ..Right::of("get", "", "pods").within(namespace) },
        Right {
            subresource: "token",
            ..Right::of("create", "", "serviceaccounts").within(namespace).named("signet-viewer")
        },
    ];
    let mut missing = Vec::new();
    for right in wanted {
        match api.may_i(&right).await {
            Ok(true) => {}
            Ok(false) => missing.push(right.to_string()),
            Err(error) => return unasked("looking", &error, findings),
        }
    }
    if missing.is_empty() {
        findings.ok("api", "looking", "this person may look at all nodes");
    } else {
        findings.warning(
            "api",
            "looking",
            format!("this person may not {}", missing.join(", ")),
            format!("to look at all nodes, bind the Role {namespace}/signet-flows to it"),
        );
    }
}

/// The agents and the authority, as far as this person may see them.
async fn running(api: &ApiServer, namespace: &str, findings: &mut Findings) {
    let sets: Api<DaemonSet> = Api::namespaced(api.client(), namespace);
    match sets.get_opt("signet-agent").await {
        Ok(Some(set)) => {
            let status = set.status.unwrap_or_default();
            let (ready, wanted) = (status.number_ready, status.desired_number_scheduled);
            if ready == wanted {
                findings.ok("cluster", "agents", format!("{ready} of {wanted} are ready"));
            } else {
                findings.failed(
                    "cluster",
                    "agents",
                    Exit::No,
                    format!("{ready} of {wanted} are ready"),
                    format!(
                        "kubectl -n {namespace} get pods -l app.kubernetes.io/name=signet-agent, \
                         then `signet check` on a node that is not"
                    ),
                );
            }
        }
        other => absent("agents", &format!("DaemonSet {namespace}/signet-agent"), other, findings),
    }
    let deployments: Api<Deployment> = Api::namespaced(api.client(), namespace);
    match deployments.get_opt("signet-authority").await {
        Ok(Some(deployment)) => {
            let wanted = deployment.spec.and_then(|spec| spec.replicas).unwrap_or(1);
            let ready = deployment.status.and_then(|s| s.ready_replicas).unwrap_or(0);
            let detail = format!("{ready} of {wanted} replicas are ready");
            let remedy = format!("kubectl -n {namespace} logs deployment/signet-authority");
            match ready {
                0 => findings.failed("cluster", "authority", Exit::No, detail, remedy),
                _ if ready < wanted => findings.warning("cluster", "authority", detail, remedy),
                _ => findings.ok("cluster", "authority", detail),
            }
        }
        other => {
            let what = format!("Deployment {namespace}/signet-authority");
            absent("authority", &what, other, findings);
        }
    }
}

fn absent<T>(
    check: &'static str,
    what: &str,
    answer: Result<Option<T>, kube::Error>,
    findings: &mut Findings,
) {
    match answer {
        Err(kube::Error::Api(status)) if status.code == 403 => {
            findings.skipped("cluster", check, format!("this person may not get {what}"));
        }
        Err(error) => findings.failed(
            "cluster",
            check,
            Exit::Unreachable,
            format!("{what}: {error}"),
            "is the API server up?",
        ),
        Ok(_) if check == "authority" => findings.warning(
            "cluster",
            check,
            format!("there is no {what}"),
            "nothing must be done where agents ask another authority (caAddress)",
        ),
        Ok(_) => findings.failed(
            "cluster",
            check,
            Exit::No,
            format!("there is no {what}"),
            "kubectl apply -k manifests/base",
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions() {
        assert_eq!(minor("v1.33.0"), Some(33));
        assert_eq!(minor("v1.28.4+k3s1"), Some(28));
        assert_eq!(minor("v1.31-eks"), Some(31));
        assert_eq!((minor("v2.0.0"), minor("nonsense")), (None, None));
    }
}
