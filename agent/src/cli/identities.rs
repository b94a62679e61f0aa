//! `signet identities`.

use serde::Serialize;

use super::{
    exit::{Exit, Failure, print},
    sockets::{self, Agent, SocketArgs},
    status::Output,
    table::{Table, printable},
};
use crate::{
    observer::glob,
    proto::{
        self,
        admin::{
            KnownIdentity, ListIdentitiesRequest, ListIdentitiesResponse, admin_client::AdminClient,
        },
    },
    spiffe::SpiffeId,
};

/// Arguments of `signet identities`.
#[derive(clap::Args, Debug)]
#[command(after_help = "\
Examples:
  signet identities
  signet identities shop/payments
  signet identities 'spiffe://*/ns/shop/sa/*' -o json

NUMBER is what this node's kernel calls it; another node has another number. PODS are registered on
this node, ELSEWHERE are pods of its account on other nodes. Exits with 1 when none is found.")]
pub struct IdentitiesArgs {
    #[command(flatten)]
    sockets: SocketArgs,
    /// Only these: NAMESPACE/ACCOUNT or a SPIFFE ID, with * for any characters
    #[arg(value_name = "GLOB")]
    identity: Option<String>,
    /// How they are shown
    #[arg(short, long, value_name = "form", default_value = "text")]
    output: Output,
}

/// Asks and prints.
pub async fn run(args: IdentitiesArgs) -> Result<Exit, Failure> {
    let (agents, is_complete) = sockets::connect_all(&args.sockets).await?;
    let (mut answers, all_answered) = sockets::ask_all(&agents, async |agent| {
        let mut client = AdminClient::new(agent.channel.clone());
        sockets::all_parts(agent, client.list_identities(ListIdentitiesRequest {})).await
    })
    .await?;
    let is_complete = is_complete && all_answered;
    if let Some(wanted) = &args.identity {
        let glob = Glob::new(wanted);
        for part in answers.iter_mut().flatten() {
            part.identities.retain(|i| glob.matches(&i.identity));
        }
    }
    let parts: Vec<&ListIdentitiesResponse> = answers.iter().flatten().collect();
    let text = match args.output {
        Output::Text => table(&parts),
        Output::Json => answers
            .iter()
            .filter(|parts| !parts.is_empty())
            .map(|parts| json(parts))
            .collect::<Result<String, _>>()?,
    };
    print(&text)?;
    let is_found = parts.iter().any(|part| !part.identities.is_empty());
    if let (Some(wanted), false) = (&args.identity, is_found) {
        anstream::eprintln!("no identity {} on the nodes asked", printable(wanted));
    }
    Ok(match (is_complete, is_found || args.identity.is_none()) {
        (false, _) => Exit::Unreachable,
        (true, false) => Exit::No,
        (true, true) => Exit::Done,
    })
}

/// What `-o json` prints of all identities of an agent.
pub async fn json_of(agent: &Agent) -> Result<String, Failure> {
    let mut client = AdminClient::new(agent.channel.clone());
    json(&sockets::all_parts(agent, client.list_identities(ListIdentitiesRequest {})).await?)
}

fn json(parts: &[ListIdentitiesResponse]) -> Result<String, Failure> {
    let json = serde_json::to_string(&NodeJson::of(parts));
    Ok(json.map_err(|e| Failure::caused(Exit::Bug, e))? + "\n")
}

/// The ways in which an identity may be named.
struct Glob {
    pattern: String,
    is_whole: bool,
}

impl Glob {
    fn new(pattern: &str) -> Self {
        Self { pattern: pattern.into(), is_whole: pattern.starts_with("spiffe:") }
    }

    fn matches(&self, id: &str) -> bool {
        if self.is_whole {
            return glob::matches(&self.pattern, id);
        }
        let account = SpiffeId::parse(id).ok().and_then(|id| {
            id.workload().map(|(namespace, account)| format!("{namespace}/{account}"))
        });
        account.is_some_and(|account| glob::matches(&self.pattern, &account))
    }
}

/// One line an identity.
fn table(parts: &[&ListIdentitiesResponse]) -> String {
    let mut rows = vec![
        ["IDENTITY", "NODE", "NUMBER", "PODS", "ELSEWHERE", "SVID", "UNTIL"]
            .map(String::from)
            .to_vec(),
    ];
    for part in parts {
        for i in &part.identities {
            let svid = match (&*i.svid, &*i.svid_error) {
                ("", _) => "-".into(),
                (state, "") => state.to_owned(),
                (state, error) => format!("{state} ({error})"),
            };
            rows.push(vec![
                printable(&i.identity),
                printable(&part.node),
                i.number.to_string(),
                match i.pods.len() {
                    0 => "-".into(),
                    _ => printable(&i.pods.join(",")),
                },
                i.elsewhere.to_string(),
                printable(&svid),
                until(i).unwrap_or_else(|| "-".into()),
            ]);
        }
    }
    Table::plain(&rows).into_iter().map(|line| line + "\n").collect()
}

fn until(identity: &KnownIdentity) -> Option<String> {
    Some(format!("{:.0}", proto::time(identity.svid_not_after.as_ref()?)?))
}

#[derive(Serialize)]
struct NodeJson<'a> {
    schema: &'static str,
    node: &'a str,
    identities: Vec<IdentityJson<'a>>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct IdentityJson<'a> {
    identity: &'a str,
    number: u32,
    pods: &'a [String],
    elsewhere: u32,
    svid: Option<SvidJson<'a>>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct SvidJson<'a> {
    state: &'a str,
    not_after: Option<String>,
    error: Option<&'a str>,
}

impl<'a> NodeJson<'a> {
    fn of(parts: &'a [ListIdentitiesResponse]) -> Self {
        let given = |text: &'a str| (!text.is_empty()).then_some(text);
        Self {
            schema: "signet.dev/identities/v1",
            node: parts.first().map_or("", |part| &part.node),
            identities: parts
                .iter()
                .flat_map(|part| &part.identities)
                .map(|i| IdentityJson {
                    identity: &i.identity,
                    number: i.number,
                    pods: &i.pods,
                    elsewhere: i.elsewhere,
                    svid: given(&i.svid).map(|state| SvidJson {
                        state,
                        not_after: until(i),
                        error: given(&i.svid_error),
                    }),
                })
                .collect(),
        }
    }
}
