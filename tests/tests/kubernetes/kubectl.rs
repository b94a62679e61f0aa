//! Real kubectl against the test API server: the manifests are applied, looked at, conflicted
//! over and taken away, and what they refuse is told in the server's words.

use std::{
    io::Write as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use signet_lab::api_server::ApiServer;

/// kubectl with somebody's token.
struct Kubectl<'a> {
    api: &'a ApiServer,
    kubeconfig: PathBuf,
}

/// What it said.
#[derive(Debug)]
struct Said {
    command: String,
    ok: bool,
    out: String,
    err: String,
}

impl Said {
    fn ok(self) -> Result<String> {
        ensure!(self.ok, "kubectl {}: {} {}", self.command, self.out, self.err);
        Ok(self.out)
    }

    fn refused(self, why: &str) -> Result<()> {
        ensure!(!self.ok && self.err.contains(why), "{why:?} is not in {self:?}");
        Ok(())
    }
}

impl Kubectl<'_> {
    fn run(&self, arguments: &str, input: Option<&Value>) -> Result<Said> {
        let manifests = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
        let mut child = Command::new("kubectl")
            .args(arguments.split_whitespace())
            .current_dir(manifests)
            .env("KUBECONFIG", &self.kubeconfig)
            .env("HOME", self.api.directory())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .context("kubectl, which `cargo xtask setup` installs")?;
        if let (Some(input), Some(mut stdin)) = (input, child.stdin.take()) {
            stdin.write_all(input.to_string().as_bytes())?;
        }
        let output = child.wait_with_output()?;
        let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
        let command = arguments.to_owned();
        Ok(Said {
            command,
            ok: output.status.success(),
            out: text(output.stdout),
            err: text(output.stderr),
        })
    }
}

/// A server that knows no custom kind yet, with a namespace.
fn empty() -> Result<ApiServer> {
    let api = ApiServer::start()?;
    for plural in ["identitypolicies", "clusteridentitypolicies", "nodeenrolments"] {
        api.uninstall(plural)?;
    }
    api.apply(json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "shop"}}))?;
    Ok(api)
}

fn policy(spec: Value) -> Value {
    json!({
        "apiVersion": "signet.dev/v1alpha1", "kind": "IdentityPolicy",
        "metadata": {"name": "callers", "namespace": "shop"}, "spec": spec,
    })
}

#[test]
fn kubectl_applies_looks_conflicts_and_takes_away() -> Result<()> {
    let api = empty()?;
    let kubectl = Kubectl { api: &api, kubeconfig: api.secure_kubeconfig("admin", None)? };
    kubectl
        .run("get identitypolicies -A", None)?
        .refused("the server doesn't have a resource type")?;

    // Once and again: nothing that is applied twice conflicts with itself.
    for _ in 0..2 {
        let said = kubectl.run("apply --server-side -k manifests/base", None)?.ok()?;
        for applied in [
            "customresourcedefinition.apiextensions.k8s.io/identitypolicies.signet.dev",
            "daemonset.apps/signet-agent",
            "validatingadmissionpolicy.admissionregistration.k8s.io/signet-namespace-labels",
        ] {
            ensure!(said.contains(&format!("{applied} serverside-applied")), "{said}");
        }
    }
    let text = kubectl.run("get daemonset signet-agent -n signet-system -o yaml", None)?.ok()?;
    ensure!(text.contains("generation: 1"), "applying it again changed it: {text}");

    // Policies: refused in the rule's words, admitted, shown with their columns.
    let apply = |spec: Value| kubectl.run("apply -f -", Some(&policy(spec)));
    apply(json!({}))?.refused("neither ingress nor egress; write rules")?;
    apply(json!({"action": "Alow", "ingress": []}))?.refused("Unsupported value: \"Alow\"")?;
    apply(json!({"ingres": []}))?.refused("unknown field \"spec.ingres\"")?;
    apply(json!({"ingress": []}))?.ok()?;
    apply(json!({"action": "Deny", "ingress": [{}]}))?.ok()?;
    let table = kubectl.run("get idp -n shop", None)?.ok()?;
    let mut lines = table.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
    let columns = ["NAME", "ACTION", "ACCEPTED", "REASON", "ENFORCED", "AGE"];
    ensure!(lines.next().is_some_and(|head| head == columns), "{table}");
    ensure!(lines.next().is_some_and(|row| row[..2] == ["callers", "Deny"]), "{table}");

    // Labels.
    let label = |what: &str| kubectl.run(&format!("label namespace {what}"), None);
    label("shop signet.dev/mode=strikt")?.refused("\"strikt\" is not one of off, observe")?;
    label("shop signet.dev/mode=observe")?.ok()?;
    label("shop signet.dev/mode=strict")?.refused("--overwrite is false")?;
    label("shop signet.dev/mode=strict --overwrite")?.ok()?;
    label("signet-system signet.dev/mode=strict")?.refused("are never enforced")?;
    let mode = api.get("namespaces", "", "shop").context("no namespace")?;
    ensure!(mode["metadata"]["labels"]["signet.dev/mode"] == "strict", "{mode}");

    // Another manager that wants another value.
    let other = json!({
        "apiVersion": "apps/v1", "kind": "DaemonSet",
        "metadata": {"name": "signet-agent", "namespace": "signet-system"},
        "spec": {"updateStrategy": {"type": "OnDelete"}},
    });
    let apply = "apply --server-side --field-manager=other -f -";
    kubectl
        .run(apply, Some(&other))?
        .refused("conflict with \"kubectl\"")
        .context("a value that another manager applied")?;
    kubectl.run(&format!("{apply} --force-conflicts"), Some(&other))?.ok()?;
    kubectl
        .run("apply --server-side -k manifests/base", None)?
        .refused(".spec.updateStrategy.type")?;

    // With the agent's token there is what the agent may do.
    let token = api.own_token("signet-system", "signet-agent", None)?;
    let agent = Kubectl { api: &api, kubeconfig: api.secure_kubeconfig("agent", Some(&token))? };
    agent.run("get pods -A", None)?.ok()?;
    agent.run("delete configmap signet-agent -n signet-system", None)?.refused(
        "configmaps \"signet-agent\" is forbidden: User \
         \"system:serviceaccount:signet-system:signet-agent\" cannot delete resource",
    )?;
    agent.run("get secrets -A", None)?.refused(
        "secrets is forbidden: User \"system:serviceaccount:signet-system:signet-agent\" cannot \
         list resource \"secrets\" in API group \"\" at the cluster scope",
    )?;

    // Everything goes, with what is in it.
    kubectl.run("delete --ignore-not-found -k manifests/base", None)?.ok()?;
    for plural in ["customresourcedefinitions", "daemonsets", "configmaps", "identitypolicies"] {
        ensure!(api.list(plural).is_empty(), "{plural}: {:?}", api.list(plural));
    }
    let ours = |plural: &str| {
        let of = |object: &&Value| object.to_string().contains("signet");
        api.list(plural).iter().filter(of).count()
    };
    ensure!(ours("clusterroles") + ours("clusterrolebindings") + ours("serviceaccounts") == 0);
    ensure!(
        ours("validatingadmissionpolicies") == 0 && ours("validatingadmissionpolicybindings") == 0
    );
    label("shop signet.dev/mode=strikt --overwrite")?.ok().context("nobody refuses it any more")?;
    Ok(())
}
