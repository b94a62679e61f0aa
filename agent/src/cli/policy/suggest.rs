//! `signet policy suggest`: the least that what was seen coming in needs.

use std::collections::{BTreeMap, BTreeSet};

use jiff::Timestamp;

use super::networkpolicies;
use crate::{
    cli::{
        edges::{self, Seen, arrives_in},
        exit::{Exit, Failure, print},
        flows::parse_time,
        sockets::{self, SocketArgs},
    },
    proto::admin::{EdgeEnd, Endpoint, StatusRequest, admin_client::AdminClient},
};

/// Labels that a controller gives to each of its pods or revisions: no selector outlives them.
const OF_ONE_POD: &[&str] = &[
    "pod-template-hash",
    "controller-revision-hash",
    "pod-template-generation",
    "statefulset.kubernetes.io/pod-name",
    "apps.kubernetes.io/pod-index",
    "batch.kubernetes.io/controller-uid",
    "controller-uid",
];
/// Labels that say by themselves what a pod is, in this order.
const TELLING: &[&str] = &["app.kubernetes.io/name", "app", "k8s-app"];

/// Arguments of `signet policy suggest`.
#[derive(clap::Args, Debug)]
#[command(after_help = "\
Examples:
  signet policy suggest -n shop > shop-policies.yaml
  signet policy suggest -n shop --istio --since 24h
  signet policy suggest -n shop --from-networkpolicies

Each account of the namespace that was called gets an ALLOW for the callers and ports seen; what
was refused is left out. Nothing is suggested for what was never called. What cannot be put into a
policy is said in comments. Ask the agents of every node that runs the namespace's pods. Exits with
1 when nothing was seen.")]
pub struct SuggestArgs {
    #[command(flatten)]
    sockets: SocketArgs,
    /// The namespace
    #[arg(short, long, value_name = "name")]
    namespace: String,
    /// Write Istio's AuthorizationPolicy rather than IdentityPolicy
    #[arg(long)]
    istio: bool,
    /// Translate the namespace's NetworkPolicies instead, by the identities of the pods that
    /// their selectors select now
    #[arg(long, conflicts_with = "since")]
    from_networkpolicies: bool,
    /// Only what was seen since then (24h, or a time)
    #[arg(long, value_name = "time", value_parser = parse_time)]
    since: Option<Timestamp>,
}

/// Asks and prints.
pub async fn run(args: SuggestArgs) -> Result<Exit, Failure> {
    if args.from_networkpolicies {
        return networkpolicies::run(&args.sockets, &args.namespace, args.istio).await;
    }
    let seen = edges::ask(&args.sockets, &args.namespace, args.since).await?;
    let domain = trust_domain(&args.sockets).await?;
    let suggestions = suggest(&args.namespace, &seen);
    let form = if args.istio { Form::Istio { domain } } else { Form::Native };
    print(&write(&suggestions, &args.namespace, &form))?;
    let is_useful = suggestions.iter().any(|s| !s.rules.is_empty());
    if suggestions.is_empty() {
        anstream::eprintln!(
            "nothing was seen coming into {}: put it into observe and let it do what it does",
            args.namespace
        );
    }
    Ok(match (seen.is_complete, is_useful) {
        (false, _) => Exit::Unreachable,
        (true, true) => Exit::Done,
        (true, false) => Exit::No,
    })
}

/// The cluster's own trust domain, which Istio's principals begin with.
async fn trust_domain(args: &SocketArgs) -> Result<String, Failure> {
    let (agents, _) = sockets::connect_all(args).await?;
    let Some(agent) = agents.first() else { return Ok(String::new()) };
    let mut client = AdminClient::new(agent.channel.clone());
    let status = sockets::within_time(agent, client.status(StatusRequest {})).await?;
    Ok(status.identity.unwrap_or_default().trust_domain)
}

/// Whose policies are written.
pub(super) enum Form {
    /// Our own.
    Native,
    /// Istio's, whose principals begin with the trust domain.
    Istio {
        /// It.
        domain: String,
    },
}

/// Who calls.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
enum Caller {
    Account { namespace: String, name: String },
    Identity(String),
    Network(String),
}

/// A port of a protocol.
type Port = (bool, u32);

/// A policy for the pods of one account.
#[derive(Debug)]
struct Suggestion {
    account: String,
    selector: BTreeMap<String, String>,
    /// Callers by the TCP ports (false) or UDP ports (true) that they use.
    rules: BTreeMap<(bool, BTreeSet<u32>), BTreeSet<Caller>>,
    /// What the policy does not say.
    remarks: BTreeSet<String>,
}

/// One for each account that was called.
fn suggest(namespace: &str, seen: &Seen) -> Vec<Suggestion> {
    let mut ports: BTreeMap<&str, BTreeMap<(bool, Caller), BTreeSet<u32>>> = BTreeMap::new();
    let mut remarks: BTreeMap<&str, BTreeSet<String>> = BTreeMap::new();
    for edge in &seen.edges {
        let Some((source, destination)) = arrives_in(edge, namespace) else { continue };
        let account = &*destination.service_account;
        let remarks = remarks.entry(account).or_default();
        if edge.verdict == "DROPPED" {
            remarks.insert(format!("left out: {} was refused ({})", name(source), edge.reason));
            continue;
        }
        let (Some(caller), Some(port)) = (caller(source), port(edge.protocol, edge.port)) else {
            remarks.insert(format!(
                "not covered: {} flows of {}, protocol {}",
                edge.count,
                name(source),
                edge.protocol
            ));
            continue;
        };
        if edge.reason == "plaintext_refused" && matches!(caller, Caller::Account { .. }) {
            remarks.insert(format!(
                "{} comes in clear: enrol its namespace, or strict refuses it",
                name(source)
            ));
        }
        let of_account = ports.entry(account).or_default();
        of_account.entry((port.0, caller)).or_default().insert(port.1);
    }
    remarks
        .into_iter()
        .map(|(account, mut remarks)| {
            let selector = selector(account, &seen.pods);
            let mut rules: BTreeMap<_, BTreeSet<Caller>> = BTreeMap::new();
            match selector {
                Some(_) => {
                    for ((udp, caller), ports) in ports.remove(account).unwrap_or_default() {
                        rules.entry((udp, ports)).or_default().insert(caller);
                    }
                }
                None => {
                    remarks.insert(format!(
                        "no labels tell the pods of account {account} from the namespace's \
                         others: give them one"
                    ));
                }
            }
            let selector = selector.unwrap_or_default();
            Suggestion { account: account.into(), selector, rules, remarks }
        })
        .collect()
}

fn caller(end: &EdgeEnd) -> Option<Caller> {
    match (&*end.namespace, &*end.identity, &*end.network) {
        ("", "", "") => None,
        ("", "", network) => Some(Caller::Network(network.into())),
        ("", identity, _) => Some(Caller::Identity(identity.into())),
        (namespace, ..) => {
            Some(Caller::Account { namespace: namespace.into(), name: end.service_account.clone() })
        }
    }
}

fn name(end: &EdgeEnd) -> String {
    match caller(end) {
        None => "others".into(),
        Some(Caller::Account { namespace, name }) => format!("{namespace}/{name}"),
        Some(Caller::Identity(text) | Caller::Network(text)) => text,
    }
}

fn port(protocol: u32, port: u32) -> Option<Port> {
    match (protocol, port) {
        (_, 0) => None,
        (6, port) => Some((false, port)),
        (17, port) => Some((true, port)),
        _ => None,
    }
}

/// Labels that all pods of the account have and no pod of another account has all of.
fn selector(account: &str, pods: &[Endpoint]) -> Option<BTreeMap<String, String>> {
    let (own, others): (Vec<_>, Vec<_>) =
        pods.iter().partition(|pod| pod.service_account == account);
    let (first, rest) = own.split_first()?;
    let mut common: BTreeMap<&String, &String> = first.labels.iter().collect();
    common.retain(|label, value| {
        !OF_ONE_POD.contains(&label.as_str())
            && rest.iter().all(|pod| pod.labels.get(*label) == Some(*value))
    });
    let tells = |labels: &BTreeMap<&String, &String>| {
        !labels.is_empty()
            && others.iter().all(|pod| labels.iter().any(|(l, v)| pod.labels.get(*l) != Some(*v)))
    };
    let one = TELLING
        .iter()
        .filter_map(|label| common.get_key_value(&(*label).to_owned()))
        .map(|(label, value)| BTreeMap::from([(*label, *value)]))
        .find(tells);
    let chosen = one.or_else(|| tells(&common).then(|| common.clone()))?;
    Some(chosen.into_iter().map(|(label, value)| (label.clone(), value.clone())).collect())
}

/// All of them, as documents of one file.
fn write(suggestions: &[Suggestion], namespace: &str, form: &Form) -> String {
    let (mut out, mut is_first) = (String::new(), true);
    for suggestion in suggestions {
        let (comments, document) = suggestion.write(namespace, form);
        if !document.is_empty() && !std::mem::take(&mut is_first) {
            out.push_str("---\n");
        }
        out.push_str(&comments);
        out.push_str(&document);
    }
    out
}

impl Suggestion {
    /// Comments and, where there is something to allow, a document.
    fn write(&self, namespace: &str, form: &Form) -> (String, String) {
        let mut out = format!("# {namespace}/{}\n", comment(&self.account));
        for remark in &self.remarks {
            out.push_str(&format!("# - {}\n", comment(remark)));
        }
        let mut rules = String::new();
        for ((udp, ports), callers) in &self.rules {
            match form {
                Form::Native => rules.push_str(&native(*udp, ports, callers)),
                Form::Istio { .. } if *udp => {
                    let ports: Vec<String> = ports.iter().map(u32::to_string).collect();
                    out.push_str(&format!("# - not covered: UDP, ports {}\n", ports.join(", ")));
                }
                Form::Istio { domain } => rules.push_str(&istio(domain, ports, callers)),
            }
        }
        if rules.is_empty() {
            return (out, String::new());
        }
        let (version, kind, action, field) = match form {
            Form::Native => ("signet.dev/v1alpha1", "IdentityPolicy", "Allow", "ingress"),
            Form::Istio { .. } => ("security.istio.io/v1", "AuthorizationPolicy", "ALLOW", "rules"),
        };
        let name = quoted(&format!("{}-callers", self.account));
        let mut document = format!(
            "apiVersion: {version}\nkind: {kind}\nmetadata:\n  name: {name}\n  namespace: {}\n\
             spec:\n  selector:\n    matchLabels:\n",
            quoted(namespace)
        );
        for (label, value) in &self.selector {
            document.push_str(&format!("      {}: {}\n", quoted(label), quoted(value)));
        }
        document.push_str(&format!("  action: {action}\n  {field}:\n{rules}"));
        (out, document)
    }
}

fn native(udp: bool, ports: &BTreeSet<u32>, callers: &BTreeSet<Caller>) -> String {
    let mut out = "  - from:\n".to_owned();
    let [accounts, identities, networks] =
        by_kind(callers, |namespace, name| format!("{namespace}/{name}"));
    for (field, list) in
        [("serviceAccounts", accounts), ("identities", identities), ("ipBlocks", networks)]
    {
        if !list.is_empty() {
            out.push_str(&format!("    - {field}: [{}]\n", list.join(", ")));
        }
    }
    let protocol = if udp { "UDP" } else { "TCP" };
    out.push_str("    ports:\n");
    for port in ports {
        out.push_str(&format!("    - {{port: {port}, protocol: {protocol}}}\n"));
    }
    if udp {
        out.push_str("    # No tunnel carries UDP: callers are known by their address alone.\n");
        out.push_str("    unauthenticated: true\n");
    }
    out
}

fn istio(domain: &str, ports: &BTreeSet<u32>, callers: &BTreeSet<Caller>) -> String {
    let mut out = "  - from:\n".to_owned();
    let [mut principals, identities, networks] =
        by_kind(callers, |namespace, name| format!("{domain}/ns/{namespace}/sa/{name}"));
    principals.extend(identities.iter().map(|id| id.replacen("spiffe://", "", 1)));
    for (field, list) in [("principals", principals), ("ipBlocks", networks)] {
        if !list.is_empty() {
            out.push_str(&format!("    - source:\n        {field}: [{}]\n", list.join(", ")));
        }
    }
    let ports: Vec<String> = ports.iter().map(|port| format!("\"{port}\"")).collect();
    out.push_str(&format!("    to:\n    - operation:\n        ports: [{}]\n", ports.join(", ")));
    out
}

/// Accounts, identities and networks, quoted.
fn by_kind(callers: &BTreeSet<Caller>, account: impl Fn(&str, &str) -> String) -> [Vec<String>; 3] {
    let mut lists: [Vec<String>; 3] = Default::default();
    for caller in callers {
        match caller {
            Caller::Account { namespace, name } => lists[0].push(quoted(&account(namespace, name))),
            Caller::Identity(id) => lists[1].push(quoted(id)),
            Caller::Network(network) => lists[2].push(quoted(network)),
        }
    }
    lists
}

/// A YAML scalar: a JSON string is one.
pub(super) fn quoted(text: &str) -> String {
    serde_json::Value::from(text).to_string()
}

/// Text that stays in its comment.
pub(super) fn comment(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{cli::policy::validate::validate, proto::admin::SeenEdge};

    fn account(namespace: &str, name: &str) -> EdgeEnd {
        EdgeEnd { namespace: namespace.into(), service_account: name.into(), ..EdgeEnd::default() }
    }

    fn edge(source: EdgeEnd, port: u32) -> SeenEdge {
        SeenEdge {
            reporter: "destination".into(),
            source: Some(source),
            destination: Some(account("shop", "payments")),
            port,
            protocol: 6,
            via: "mtls".into(),
            verdict: "FORWARDED".into(),
            reason: "allowed".into(),
            count: 3,
            ..SeenEdge::default()
        }
    }

    fn pod(account: &str, labels: &[(&str, &str)]) -> Endpoint {
        Endpoint {
            service_account: account.into(),
            labels: labels.iter().map(|(l, v)| ((*l).into(), (*v).into())).collect(),
            ..Endpoint::default()
        }
    }

    /// The same for a second account, and a third that was refused to everybody.
    fn more() -> Seen {
        let mut seen = seen();
        for (name, verdict) in [("orders", "AUDIT"), ("vault", "DROPPED")] {
            seen.edges.push(SeenEdge {
                destination: Some(account("shop", name)),
                verdict: verdict.into(),
                reason: "plaintext_refused".into(),
                ..edge(account("legacy", "cron"), 80)
            });
            seen.pods.push(pod(name, &[("app", name)]));
        }
        seen
    }

    fn seen() -> Seen {
        let network = EdgeEnd { network: "10.9.0.0/24".into(), ..EdgeEnd::default() };
        let foreign = EdgeEnd { identity: "spiffe://other/x".into(), ..EdgeEnd::default() };
        let refused = SeenEdge {
            verdict: "DROPPED".into(),
            reason: "policy_no_match".into(),
            ..edge(account("shop", "intruder"), 8080)
        };
        let dns = SeenEdge { protocol: 17, ..edge(account("shop", "frontend"), 53) };
        let sent = SeenEdge { reporter: "source".into(), ..edge(account("a", "b"), 1) };
        Seen {
            edges: vec![
                edge(account("shop", "frontend"), 8080),
                edge(account("shop", "frontend"), 8443),
                edge(account("ops", "cron"), 8080),
                edge(account("ops", "other"), 8080),
                edge(network, 8080),
                edge(foreign, 8080),
                edge(EdgeEnd::default(), 0),
                refused,
                dns,
                sent,
            ],
            pods: vec![
                pod("payments", &[("app", "payments"), ("pod-template-hash", "1"), ("tier", "x")]),
                pod("payments", &[("app", "payments"), ("pod-template-hash", "2"), ("tier", "x")]),
                pod("frontend", &[("app", "frontend"), ("tier", "x")]),
            ],
            is_complete: true,
        }
    }

    fn written(seen: &Seen, form: &Form) -> String {
        write(&suggest("shop", seen), "shop", form)
    }

    #[test]
    fn callers_and_ports_and_what_is_left_out() {
        let text = written(&seen(), &Form::Native);
        for line in [
            "      \"app\": \"payments\"",
            "    - serviceAccounts: [\"ops/cron\", \"ops/other\"]",
            "    - identities: [\"spiffe://other/x\"]",
            "    - ipBlocks: [\"10.9.0.0/24\"]",
            "    - serviceAccounts: [\"shop/frontend\"]",
            "    - {port: 8443, protocol: TCP}",
            "    - {port: 53, protocol: UDP}",
            "    unauthenticated: true",
            "# - left out: shop/intruder was refused (policy_no_match)",
            "# - not covered: 3 flows of others, protocol 6",
        ] {
            assert!(text.lines().any(|l| l == line), "{line} is not in\n{text}");
        }
        assert!(!text.contains("tier") && !text.contains("a/b"), "{text}");
        assert_eq!(text.matches("kind:").count(), 1);
    }

    #[test]
    fn what_is_written_is_understood_without_a_complaint() {
        let istio = Form::Istio { domain: "cluster.local".into() };
        for form in [Form::Native, istio] {
            let (text, mut found) = (written(&more(), &form), Vec::new());
            let policies = validate("suggested.yaml".as_ref(), &text, "istio-system", &mut found);
            assert!(policies == 2 && found.is_empty(), "{found:?} in\n{text}");
            assert!(text.contains("# - legacy/cron comes in clear: enrol its namespace"), "{text}");
            assert!(text.contains("# shop/vault\n# - left out: legacy/cron was refused"), "{text}");
        }
    }

    #[test]
    fn a_selector_tells_the_accounts_pods_from_others() {
        let labels = |account: &str, pods: &[Endpoint]| {
            selector(account, pods).map(|s| s.into_keys().collect::<Vec<_>>())
        };
        let one = pod("a", &[("app", "x"), ("tier", "1")]);
        let same_app = pod("b", &[("app", "x"), ("tier", "2")]);
        assert_eq!(labels("a", std::slice::from_ref(&one)), Some(vec!["app".into()]));
        let both = [one.clone(), same_app];
        assert_eq!(labels("a", &both), Some(vec!["app".into(), "tier".into()]));
        assert_eq!(labels("a", &[one.clone(), pod("b", &[("app", "x"), ("tier", "1")])]), None);
        assert_eq!(labels("a", &[pod("a", &[("pod-template-hash", "1")])]), None);
        assert_eq!(labels("a", &[pod("b", &[("app", "x")])]), None, "it has no pod here");
        let mut seen = seen();
        seen.pods.clear();
        let text = written(&seen, &Form::Native);
        assert!(text.contains("no labels tell") && !text.contains("kind:"), "{text}");
    }
}
