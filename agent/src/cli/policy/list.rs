//! `signet policy list`.

use std::collections::HashMap;

use serde::Serialize;

use crate::{
    cli::{
        exit::{Exit, Failure, print},
        sockets::{self, Agent, SocketArgs},
        status::Output,
        table::{Table, printable},
    },
    policy::builtin,
    proto::admin::{
        Condition, ListPoliciesRequest, ListPoliciesResponse, PolicyInForce,
        admin_client::AdminClient,
    },
};

/// The condition that says whether a policy holds.
const ENFORCED: &str = "Enforced";

/// Arguments of `signet policy list`.
#[derive(clap::Args, Debug)]
#[command(after_help = "\
Examples:
  signet policy list
  signet policy list -n shop -o json

PODS are this node's pods that a policy is about; HITS are verdicts that it decided or audited since
the agent's start. Built-ins pass without a policy; the configuration key builtins removes them.")]
pub struct ListArgs {
    #[command(flatten)]
    sockets: SocketArgs,
    /// Only policies of this namespace (and the cluster's)
    #[arg(short, long, value_name = "name")]
    namespace: Option<String>,
    /// How they are shown
    #[arg(short, long, value_name = "form", default_value = "text")]
    output: Output,
}

/// Asks and prints.
pub async fn run(args: ListArgs) -> Result<Exit, Failure> {
    let (agents, is_complete) = sockets::connect_all(&args.sockets).await?;
    let (mut answers, all_answered) = sockets::ask_all(&agents, async |agent| {
        let mut client = AdminClient::new(agent.channel.clone());
        sockets::within_time(agent, client.list_policies(ListPoliciesRequest {})).await
    })
    .await?;
    let is_complete = is_complete && all_answered;
    if let Some(namespace) = &args.namespace {
        for answer in &mut answers {
            answer.policies.retain(|p| p.namespace.is_empty() || p.namespace == *namespace);
        }
    }
    across_nodes(&mut answers);
    let text = match args.output {
        Output::Text => text_of(&answers),
        Output::Json => lines_of(&answers)?.into_iter().map(|line| line + "\n").collect(),
    };
    print(&text)?;
    Ok(if is_complete { Exit::Done } else { Exit::Unreachable })
}

/// What `-o json` prints of all policies, a line a node.
pub async fn list_lines(agents: &[Agent]) -> Result<Vec<String>, Failure> {
    let mut answers = Vec::new();
    for agent in agents {
        let mut client = AdminClient::new(agent.channel.clone());
        let asked = client.list_policies(ListPoliciesRequest {});
        match sockets::within_time(agent, asked).await {
            Ok(answer) => answers.push(answer),
            Err(failure) if failure.exit == Exit::Unreachable && agents.len() > 1 => {}
            Err(failure) => return Err(failure),
        }
    }
    across_nodes(&mut answers);
    lines_of(&answers)
}

fn lines_of(answers: &[ListPoliciesResponse]) -> Result<Vec<String>, Failure> {
    answers
        .iter()
        .map(|answer| serde_json::to_string(&Json::of(answer)))
        .collect::<serde_json::Result<_>>()
        .map_err(|e| Failure::caused(Exit::Bug, e))
}

/// Says of every policy on how many of the asked nodes that have pods of it it is enforced.
fn across_nodes(answers: &mut [ListPoliciesResponse]) {
    let mut counts: HashMap<String, (usize, usize)> = HashMap::new();
    let enforced = |policy: &PolicyInForce| {
        policy.conditions.iter().any(|c| c.r#type == ENFORCED && c.status == "True")
    };
    for policy in answers.iter().flat_map(|answer| &answer.policies).filter(|p| p.pods > 0) {
        let (on, of) = counts.entry(name_of(policy)).or_default();
        *of += 1;
        *on += usize::from(enforced(policy));
    }
    for policy in answers.iter_mut().flat_map(|answer| &mut answer.policies) {
        let (on, of) = counts.get(&name_of(policy)).copied().unwrap_or_default();
        for condition in policy.conditions.iter_mut().filter(|c| c.r#type == ENFORCED) {
            condition.message = format!("Enforced on {on}/{of} nodes; {}", condition.message);
        }
    }
}

fn text_of(answers: &[ListPoliciesResponse]) -> String {
    let head = ["NODE", "POLICY", "ACTION", "DIRECTION", "SELECTS", "PODS", "HITS", "ACCEPTED"];
    let mut rows = vec![head.map(String::from).to_vec()];
    let mut said = Vec::new();
    let mut builtins = Vec::new();
    for answer in answers {
        for policy in &answer.policies {
            let accepted = policy.conditions.iter().find(|c| c.r#type == "Accepted");
            let directions = policy.directions.join(",");
            rows.push(vec![
                printable(&answer.node),
                printable(&name_of(policy)),
                format!("{}{}", policy.action, if policy.dry_run { " (dry run)" } else { "" }),
                if directions.is_empty() { "-".into() } else { directions },
                printable(&policy.selects),
                policy.pods.to_string(),
                policy.hits.to_string(),
                accepted.map_or_else(|| "-".into(), |c| c.reason.clone()),
            ]);
            let unusual = accepted.filter(|c| c.reason != "Accepted");
            // What is merely observed was meant so.
            let unheld =
                policy.conditions.iter().find(|c| c.r#type == ENFORCED && c.reason == "PodsClosed");
            for condition in unusual.into_iter().chain(unheld) {
                let line = format!("  {}: {}", name_of(policy), condition.message);
                let line = printable(&line);
                let is_builtin = policy.kind == builtin::KIND && condition.r#type != ENFORCED;
                let said = if is_builtin { &mut builtins } else { &mut said };
                if !said.contains(&line) {
                    said.push(line);
                }
            }
        }
    }
    let mut lines = Table::plain(&rows);
    if !builtins.is_empty() {
        lines.push("Built-ins".into());
        lines.extend(builtins);
    }
    if !said.is_empty() {
        lines.push("Problems".into());
        lines.extend(said);
    }
    lines.into_iter().map(|line| line + "\n").collect()
}

/// `Kind/namespace/name`.
fn name_of(policy: &PolicyInForce) -> String {
    let slash = if policy.namespace.is_empty() { "" } else { "/" };
    format!("{}/{}{slash}{}", policy.kind, policy.namespace, policy.name)
}

#[derive(Serialize)]
struct Json<'a> {
    schema: &'static str,
    node: &'a str,
    revision: u64,
    policies: Vec<PolicyJson<'a>>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct PolicyJson<'a> {
    kind: &'a str,
    namespace: Option<&'a str>,
    name: &'a str,
    action: &'a str,
    directions: &'a [String],
    selects: &'a str,
    dry_run: bool,
    pods: u32,
    hits: u64,
    conditions: Vec<ConditionJson<'a>>,
}

#[derive(Serialize)]
struct ConditionJson<'a> {
    r#type: &'a str,
    status: &'a str,
    reason: &'a str,
    message: &'a str,
}

impl<'a> Json<'a> {
    fn of(answer: &'a ListPoliciesResponse) -> Self {
        let condition = |c: &'a Condition| ConditionJson {
            r#type: &c.r#type,
            status: &c.status,
            reason: &c.reason,
            message: &c.message,
        };
        let policy = |p: &'a PolicyInForce| PolicyJson {
            kind: &p.kind,
            namespace: (!p.namespace.is_empty()).then_some(&*p.namespace),
            name: &p.name,
            action: &p.action,
            directions: &p.directions,
            selects: &p.selects,
            dry_run: p.dry_run,
            pods: p.pods,
            hits: p.hits,
            conditions: p.conditions.iter().map(condition).collect(),
        };
        Self {
            schema: "signet.dev/policies/v1",
            node: &answer.node,
            revision: answer.revision,
            policies: answer.policies.iter().map(policy).collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(
        node: &str,
        name: &str,
        pods: u32,
        status: &str,
        reason: &str,
    ) -> ListPoliciesResponse {
        let condition = |r#type: &str, status: &str, reason: &str, message: String| Condition {
            r#type: r#type.into(),
            status: status.into(),
            reason: reason.into(),
            message,
        };
        let policy = PolicyInForce {
            kind: "IdentityPolicy".into(),
            namespace: "shop".into(),
            name: name.into(),
            action: "Allow".into(),
            pods,
            conditions: vec![
                condition("Accepted", "True", "Accepted", String::new()),
                condition(ENFORCED, status, reason, format!("revision 7 on node {node}")),
            ],
            ..PolicyInForce::default()
        };
        ListPoliciesResponse { node: node.into(), revision: 7, policies: vec![policy] }
    }

    #[test]
    fn a_policy_is_enforced_on_so_many_of_the_nodes_that_have_pods_of_it() {
        let mut answers = [
            answer("node-1", "a", 2, "True", "Applied"),
            answer("node-2", "a", 1, "False", "PodsClosed"),
            answer("node-3", "a", 0, "True", "NothingSelected"),
            answer("node-4", "b", 0, "True", "NothingSelected"),
        ];
        across_nodes(&mut answers);
        let told: Vec<_> =
            answers.iter().map(|a| a.policies[0].conditions[1].message.as_str()).collect();
        assert_eq!(
            told,
            [
                "Enforced on 1/2 nodes; revision 7 on node node-1",
                "Enforced on 1/2 nodes; revision 7 on node node-2",
                "Enforced on 1/2 nodes; revision 7 on node node-3",
                "Enforced on 0/0 nodes; revision 7 on node node-4",
            ]
        );
        let text = text_of(&answers);
        let problems = text.split_once("Problems\n").map(|(_, rest)| rest);
        assert_eq!(
            problems,
            Some("  IdentityPolicy/shop/a: Enforced on 1/2 nodes; revision 7 on node node-2\n"),
            "{text}"
        );
    }
}
