//! `signet policy check`.

use std::{path::PathBuf, sync::Arc};

use serde::Serialize;

use super::{OfflineArgs, parse_domain, unreadable};
use crate::{
    admin::policies,
    cli::{
        exit::{Exit, Failure, print},
        sockets::{self, SocketArgs},
        status::Output,
        table::printable,
    },
    cluster::{
        files::{ENFORCEMENT_FILE, FEDERATION_FILE},
        manifest,
        offline::{self, Manifests},
        source::SourceParams,
    },
    config::values::DefaultAction,
    endpoint::check::{self, AskedRequest, Question, Setting},
    proto::admin::{
        CheckPolicyRequest, CheckPolicyResponse, CheckedPolicy, CheckedSide,
        admin_client::AdminClient,
    },
    spiffe::TrustDomain,
    trust::federation,
};

/// Arguments of `signet policy check`.
#[derive(clap::Args, Debug)]
#[command(after_help = "\
Examples:
  signet policy check --from shop/front --to shop/db-0:5432
  signet policy check --from @192.0.2.7 --to shop/db-0:5432 --cluster-dir /etc/signet/cluster
  signet policy check --from shop/front --to shop/db-0:5432 --cluster-dir DIR -f new-policy.yaml
  signet policy check --from shop/gateway --to shop/pay-0:8080 --method POST --path /api/v1/refunds

Without -f and --cluster-dir it asks the agent about what is in force. With them it reads
manifests, and an object of -f goes before one of the directory. Exits with 0 when the flow would
pass, with 1 when it would be refused.")]
pub struct CheckArgs {
    #[command(flatten)]
    sockets: SocketArgs,
    /// Who dials: a service account, a SPIFFE ID, or @ADDRESS for somebody without an identity
    #[arg(long, value_name = "NS/SA[@IP]")]
    from: String,
    /// The pod that is dialled, and its own port (not its Service's)
    #[arg(long, value_name = "NS/POD:PORT")]
    to: String,
    /// tcp or udp
    #[arg(long, value_name = "name", default_value = "tcp")]
    protocol: String,
    /// As if it came in clear, though it would be tunnelled
    #[arg(long)]
    plaintext: bool,
    /// With an HTTP request of this method (GET when another part of one is given)
    #[arg(long, value_name = "method")]
    method: Option<String>,
    /// With a request for this path, normalised and without the query
    #[arg(long, value_name = "path")]
    path: Option<String>,
    /// With a request to this host, with its port where the request names one
    #[arg(long, value_name = "host")]
    host: Option<String>,
    /// With a request with this header; may be given several times
    #[arg(long = "header", value_name = "NAME: VALUE")]
    headers: Vec<String>,
    /// With a request whose valid token says this: a JSON object with iss and sub
    #[arg(long, value_name = "JSON")]
    claims: Option<String>,
    /// Manifests to judge by, files or directories; may be given several times
    #[arg(short, long = "file", value_name = "FILE", num_args = 1..)]
    files: Vec<PathBuf>,
    /// Directory of manifests to judge by
    #[arg(long, value_name = "DIR")]
    cluster_dir: Option<PathBuf>,
    /// With manifests: the cluster's own trust domain
    #[arg(long, value_name = "name", default_value = "cluster.local", value_parser = parse_domain)]
    trust_domain: TrustDomain,
    /// With manifests: what passes where no ALLOW selects and no label says (the agents'
    /// defaultAction)
    #[arg(long, value_name = "allow|deny", default_value = "allow", value_parser = DefaultAction::parse)]
    default_action: DefaultAction,
    #[command(flatten)]
    offline: OfflineArgs,
    /// How it is shown
    #[arg(short, long, value_name = "form", default_value = "text")]
    output: Output,
}

/// Asks and prints.
pub async fn run(args: CheckArgs) -> Result<Exit, Failure> {
    let is_offline = !args.files.is_empty() || args.cluster_dir.is_some();
    let answer = if is_offline { offline_answer(&args)? } else { live_answer(&args).await? };
    let text = match args.output {
        Output::Text => text_of(&args, &answer),
        Output::Json => {
            serde_json::to_string(&Json::of(&answer)).map_err(|e| Failure::caused(Exit::Bug, e))?
                + "\n"
        }
    };
    print(&text)?;
    Ok(if answer.verdict == "DROPPED" { Exit::No } else { Exit::Done })
}

async fn live_answer(args: &CheckArgs) -> Result<CheckPolicyResponse, Failure> {
    let (agents, _) = sockets::connect_all(&args.sockets).await?;
    let Some(agent) = agents.first() else {
        return Err(Failure::new(Exit::Unreachable, "no agent was asked"));
    };
    let request = CheckPolicyRequest {
        from: args.from.clone(),
        to: args.to.clone(),
        protocol: args.protocol.clone(),
        plaintext: args.plaintext,
        method: args.method.clone().unwrap_or_default(),
        path: args.path.clone().unwrap_or_default(),
        host: args.host.clone().unwrap_or_default(),
        headers: args.headers.clone(),
        claims: args.claims.clone().unwrap_or_default(),
    };
    let mut client = AdminClient::new(agent.channel.clone());
    sockets::within_time(agent, client.check_policy(request)).await
}

fn offline_answer(args: &CheckArgs) -> Result<CheckPolicyResponse, Failure> {
    let domain = &args.trust_domain;
    let usage = |message| Failure::new(Exit::Usage, message);
    let mut question =
        Question::parse(&args.from, &args.to, &args.protocol, args.plaintext, domain)
            .map_err(usage)?;
    question.request = AskedRequest::parse(
        args.method.as_deref().unwrap_or_default(),
        args.path.as_deref().unwrap_or_default(),
        args.host.as_deref().unwrap_or_default(),
        &args.headers,
        args.claims.as_deref().unwrap_or_default(),
    )
    .map_err(usage)?;
    // The directory first: what is read later goes before it.
    let paths: Vec<PathBuf> = args.cluster_dir.iter().chain(&args.files).cloned().collect();
    let manifests = Manifests::read(&paths, &args.offline.root_namespace).map_err(unreadable)?;
    let federation = match args.cluster_dir.as_ref().map(|dir| dir.join(FEDERATION_FILE)) {
        Some(path) if path.exists() => {
            let text = offline::text_of(&path).map_err(unreadable)?;
            let read = federation::read(&text, domain);
            Arc::new(read.map_err(|f| unreadable(format!("{}: {f}", path.display())))?)
        }
        _ => Arc::default(),
    };
    let params = SourceParams {
        root_namespace: args.offline.root_namespace.as_str().into(),
        default_deny: args.default_action == DefaultAction::Deny,
        ..SourceParams::new(domain.clone())
    };
    let world = manifests.world(&params, federation);
    let mut setting = Setting::default();
    if let Some(path) = args.cluster_dir.as_ref().map(|dir| dir.join(ENFORCEMENT_FILE))
        && path.exists()
    {
        let text = offline::text_of(&path).map_err(unreadable)?;
        let word = manifest::read_enforcement(&text)
            .map_err(|fault| unreadable(format!("{}: {fault}", path.display())))?;
        setting.enforcement = word.number();
    }
    let answer = check::check(&world, &setting, &question).map_err(unreadable)?;
    Ok(policies::response("", &answer))
}

fn text_of(args: &CheckArgs, answer: &CheckPolicyResponse) -> String {
    let mut text = format!(
        "{} -> {} {}  {}  {} {}\n",
        args.from, args.to, args.protocol, answer.via, answer.verdict, answer.reason
    );
    for side in &answer.sides {
        text += &format!(
            "  {} of {} ({}): {} {}: {}\n",
            side.direction, side.pod, side.mode, side.verdict, side.reason, side.sentence
        );
        for policy in &side.policies {
            let dry = if policy.dry_run { " (dry run)" } else { "" };
            let matches = if policy.matches { "matches" } else { "does not match" };
            text += &format!("    {} {}{dry}: {matches}\n", policy.action, policy.policy);
            for (index, rule) in policy.rules.iter().enumerate() {
                text += &format!("      rule {index}: {}\n", rule.because);
            }
        }
    }
    for note in &answer.notes {
        text += &format!("note: {note}\n");
    }
    text.lines().map(|line| printable(line) + "\n").collect()
}

#[derive(Serialize)]
struct Json<'a> {
    schema: &'static str,
    verdict: &'a str,
    reason: &'a str,
    via: &'a str,
    policy: Option<&'a str>,
    sides: Vec<SideJson<'a>>,
    notes: &'a [String],
}

#[derive(Serialize)]
struct SideJson<'a> {
    direction: &'a str,
    pod: &'a str,
    mode: &'a str,
    verdict: &'a str,
    reason: &'a str,
    policy: Option<&'a str>,
    sentence: &'a str,
    policies: Vec<PolicyJson<'a>>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct PolicyJson<'a> {
    policy: &'a str,
    action: &'a str,
    dry_run: bool,
    matches: bool,
    rules: Vec<RuleJson<'a>>,
}

#[derive(Serialize)]
struct RuleJson<'a> {
    matches: bool,
    because: &'a str,
}

impl<'a> Json<'a> {
    fn of(answer: &'a CheckPolicyResponse) -> Self {
        Self {
            schema: "signet.dev/policy-check/v1",
            verdict: &answer.verdict,
            reason: &answer.reason,
            via: &answer.via,
            policy: answer.sides.last().and_then(|side| given(&side.policy)),
            sides: answer.sides.iter().map(SideJson::of).collect(),
            notes: &answer.notes,
        }
    }
}

impl<'a> SideJson<'a> {
    fn of(side: &'a CheckedSide) -> Self {
        Self {
            direction: &side.direction,
            pod: &side.pod,
            mode: &side.mode,
            verdict: &side.verdict,
            reason: &side.reason,
            policy: given(&side.policy),
            sentence: &side.sentence,
            policies: side.policies.iter().map(PolicyJson::of).collect(),
        }
    }
}

impl<'a> PolicyJson<'a> {
    fn of(policy: &'a CheckedPolicy) -> Self {
        let rules = policy.rules.iter();
        Self {
            policy: &policy.policy,
            action: &policy.action,
            dry_run: policy.dry_run,
            matches: policy.matches,
            rules: rules.map(|r| RuleJson { matches: r.matches, because: &r.because }).collect(),
        }
    }
}

fn given(text: &str) -> Option<&str> {
    (!text.is_empty()).then_some(text)
}
