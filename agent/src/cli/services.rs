//! `signet services [NS/NAME]`.

use serde::Serialize;

use super::{
    endpoints::{NamedArg, parse_named},
    exit::{Exit, Failure, print},
    sockets::{self, Agent, SocketArgs},
    status::Output,
    table::{Table, printable},
};
use crate::{
    proto::admin::{
        KnownServiceEndpoint, ListServicesRequest, ListServicesResponse, admin_client::AdminClient,
    },
    telemetry::names,
};

/// Arguments of `signet services`.
#[derive(clap::Args, Debug)]
#[command(after_help = "\
Examples:
  signet services
  signet services shop/payments
  signet services shop/ -o json

WAY is how an enrolled pod of this node gets there: tunnel; direct; or unserved, where the endpoint
is enrolled and its agent has not announced it: strict refuses it, permissive goes direct. Exits
with 1 when no Service is found.")]
pub struct ServicesArgs {
    #[command(flatten)]
    sockets: SocketArgs,
    /// Only this Service; NS/ for all of a namespace
    #[arg(value_name = "NS/NAME", value_parser = parse_named)]
    service: Option<NamedArg>,
    /// How they are shown
    #[arg(short, long, value_name = "form", default_value = "text")]
    output: Output,
}

/// Asks and prints.
pub async fn run(args: ServicesArgs) -> Result<Exit, Failure> {
    let (agents, is_complete) = sockets::connect_all(&args.sockets).await?;
    let request = match &args.service {
        Some(s) => ListServicesRequest { namespace: s.namespace.clone(), service: s.name.clone() },
        None => ListServicesRequest::default(),
    };
    let (answers, all_answered) = sockets::ask_all(&agents, async |agent| {
        let mut client = AdminClient::new(agent.channel.clone());
        sockets::all_parts(agent, client.list_services(request.clone())).await
    })
    .await?;
    let is_complete = is_complete && all_answered;
    let parts: Vec<&ListServicesResponse> = answers.iter().flatten().collect();
    let text = match args.output {
        Output::Text => table(&parts),
        Output::Json => answers
            .iter()
            .filter(|parts| !parts.is_empty())
            .map(|parts| json(parts))
            .collect::<Result<String, _>>()?,
    };
    print(&text)?;
    let is_found = parts.iter().any(|part| !part.services.is_empty());
    if let (Some(s), false) = (&args.service, is_found) {
        anstream::eprintln!("no service {}/{} on the nodes asked", s.namespace, s.name);
    }
    Ok(match (is_complete, is_found || args.service.is_none()) {
        (false, _) => Exit::Unreachable,
        (true, false) => Exit::No,
        (true, true) => Exit::Done,
    })
}

/// What `-o json` prints of all Services of an agent.
pub async fn json_of(agent: &Agent) -> Result<String, Failure> {
    let mut client = AdminClient::new(agent.channel.clone());
    json(&sockets::all_parts(agent, client.list_services(ListServicesRequest::default())).await?)
}

fn json(parts: &[ListServicesResponse]) -> Result<String, Failure> {
    let json = serde_json::to_string(&NodeJson::of(parts));
    Ok(json.map_err(|e| Failure::caused(Exit::Bug, e))? + "\n")
}

/// One line an endpoint; a port without any has one, too.
fn table(parts: &[&ListServicesResponse]) -> String {
    let head = ["SERVICE", "NODE", "ADDRESS", "PORT", "ENDPOINT", "POD", "STATE", "WAY"];
    let mut rows = vec![head.map(String::from).to_vec()];
    let or_dash = |text: &str| if text.is_empty() { "-".into() } else { printable(text) };
    for part in parts {
        for service in &part.services {
            let start = |port: String| {
                vec![
                    printable(&format!("{}/{}", service.namespace, service.service)),
                    printable(&part.node),
                    or_dash(&service.addresses.join(",")),
                    port,
                ]
            };
            let none = || std::iter::repeat_n("-".to_owned(), 4);
            if service.ports.is_empty() {
                rows.push(start("-".into()).into_iter().chain(none()).collect());
            }
            for port in &service.ports {
                let shown = format!("{}/{}", port.port, protocol(port.protocol));
                if port.endpoints.is_empty() {
                    rows.push(start(shown.clone()).into_iter().chain(none()).collect());
                }
                for endpoint in &port.endpoints {
                    let mut row = start(shown.clone());
                    row.extend([
                        socket(endpoint),
                        or_dash(&endpoint.pod),
                        endpoint.state.clone(),
                        endpoint.way.clone(),
                    ]);
                    rows.push(row);
                }
            }
        }
    }
    Table::plain(&rows).into_iter().map(|line| line + "\n").collect()
}

fn protocol(number: u32) -> String {
    u8::try_from(number).map_or_else(|_| number.to_string(), names::protocol)
}

/// Address and port; what is no address stays as it came.
fn socket(endpoint: &KnownServiceEndpoint) -> String {
    if endpoint.address.contains(':') {
        format!("[{}]:{}", printable(&endpoint.address), endpoint.port)
    } else {
        format!("{}:{}", printable(&endpoint.address), endpoint.port)
    }
}

#[derive(Serialize)]
struct NodeJson<'a> {
    schema: &'static str,
    node: &'a str,
    revision: u64,
    services: Vec<ServiceJson<'a>>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct ServiceJson<'a> {
    namespace: &'a str,
    service: &'a str,
    addresses: &'a [String],
    is_resolver: bool,
    ports: Vec<PortJson<'a>>,
}

#[derive(Serialize)]
struct PortJson<'a> {
    name: Option<&'a str>,
    port: u32,
    protocol: String,
    endpoints: Vec<EndpointJson<'a>>,
}

#[derive(Serialize)]
struct EndpointJson<'a> {
    address: &'a str,
    port: u32,
    pod: Option<&'a str>,
    node: Option<&'a str>,
    state: &'a str,
    way: &'a str,
}

impl<'a> NodeJson<'a> {
    fn of(parts: &'a [ListServicesResponse]) -> Self {
        let given = |text: &'a str| (!text.is_empty()).then_some(text);
        let endpoint = |e: &'a KnownServiceEndpoint| EndpointJson {
            address: &e.address,
            port: e.port,
            pod: given(&e.pod),
            node: given(&e.node),
            state: &e.state,
            way: &e.way,
        };
        Self {
            schema: "signet.dev/services/v1",
            node: parts.first().map_or("", |part| &part.node),
            revision: parts.first().map_or(0, |part| part.revision),
            services: parts
                .iter()
                .flat_map(|part| &part.services)
                .map(|s| ServiceJson {
                    namespace: &s.namespace,
                    service: &s.service,
                    addresses: &s.addresses,
                    is_resolver: s.is_resolver,
                    ports: s
                        .ports
                        .iter()
                        .map(|p| PortJson {
                            name: given(&p.name),
                            port: p.port,
                            protocol: protocol(p.protocol),
                            endpoints: p.endpoints.iter().map(endpoint).collect(),
                        })
                        .collect(),
                })
                .collect(),
        }
    }
}
