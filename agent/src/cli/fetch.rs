//! `signet svid fetch`: a client of the SPIFFE Workload API, for use inside a pod.

use std::{
    fs::{self, File},
    io::{self, Write},
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    time::Duration,
};

use rustls::pki_types::{CertificateDer, PrivatePkcs8KeyDer};
use serde::Serialize;
use tokio::time::{self, Instant};
use tonic::{Request, Streaming, transport::Channel};
use x509_parser::{certificate::X509Certificate, prelude::FromDer};

use super::{
    exit::{Exit, Failure, print},
    sockets::{self, Remedies},
    status::Output,
    table::printable,
};
use crate::{
    proto::workload::{
        JwtsvidRequest, X509svidRequest, X509svidResponse,
        spiffe_workload_api_client::SpiffeWorkloadApiClient,
    },
    spiffe::{JwtSvid, Svid, TrustDomain},
};

/// Where the socket is when nothing says otherwise.
const DEFAULT_SOCKET: &str = "unix:///run/signet/workload/workload.sock";
/// The agent may take so long to obtain an SVID.
const ANSWER: Duration = Duration::from_secs(15);
/// How long between two attempts.
const AGAIN: Duration = Duration::from_millis(250);

/// Subcommands of `signet svid fetch`.
#[derive(clap::Subcommand, Debug)]
pub enum FetchCommand {
    /// Fetch this pod's X509-SVID: certificates, private key and bundle.
    X509(X509Args),
    /// Fetch a JWT-SVID of this pod for an audience.
    Jwt(JwtArgs),
}

/// The Workload API's socket, and how long to try.
#[derive(clap::Args, Debug)]
struct EndpointArgs {
    /// Socket of the Workload API, as unix:///path
    #[arg(long, value_name = "uri", env = "SPIFFE_ENDPOINT_SOCKET", default_value = DEFAULT_SOCKET,
          value_parser = parse_socket)]
    socket: PathBuf,
    /// Try again for so many seconds while the agent does not know this pod yet
    #[arg(long, value_name = "seconds", default_value_t = 0)]
    wait: u32,
}

/// Arguments of `signet svid fetch x509`.
#[derive(clap::Args, Debug)]
#[command(after_help = "\
Examples:
  signet svid fetch x509
  signet svid fetch x509 --write /run/tls --wait 30
  signet svid fetch x509 --write /run/tls --watch

Writes svid.pem (the chain), svid_key.pem (mode 0600), svid_bundle.pem and, for each federated
domain, federated.DOMAIN.pem. Each file appears whole. Exits with 5 when this process has no
identity.")]
pub struct X509Args {
    #[command(flatten)]
    endpoint: EndpointArgs,
    /// Write them into this directory
    #[arg(long, value_name = "dir")]
    write: Option<PathBuf>,
    /// Go on and write each renewal, too
    #[arg(long, requires = "write")]
    watch: bool,
    /// How it is told
    #[arg(short, long, value_name = "form", default_value = "text")]
    output: Output,
}

/// Arguments of `signet svid fetch jwt`.
#[derive(clap::Args, Debug)]
#[command(after_help = "\
Examples:
  signet svid fetch jwt --audience payments
  signet svid fetch jwt --audience a --audience b -o json

Prints the token alone, or with -o json what it says, too. Exits with 5 when this process has no
identity, with 6 when the authority issues no JWT-SVIDs.")]
pub struct JwtArgs {
    #[command(flatten)]
    endpoint: EndpointArgs,
    /// Whom the token is for; may be given several times
    #[arg(long, value_name = "name", required = true)]
    audience: Vec<String>,
    /// The identity, where there are several
    #[arg(long, value_name = "id", default_value = "")]
    spiffe_id: String,
    /// How it is told
    #[arg(short, long, value_name = "form", default_value = "text")]
    output: Output,
}

/// The path in `unix:///path` (SPIFFE_Workload_Endpoint, section 4).
fn parse_socket(uri: &str) -> Result<PathBuf, String> {
    let path = uri.strip_prefix("unix://").or_else(|| uri.strip_prefix("unix:"));
    match path {
        Some(path) if path.starts_with('/') && !path.contains(['?', '#']) => Ok(path.into()),
        _ => Err("write it as unix:///path/to/workload.sock".into()),
    }
}

/// Runs the subcommand.
pub async fn run(command: FetchCommand) -> Result<Exit, Failure> {
    match command {
        FetchCommand::X509(args) => x509(args).await,
        FetchCommand::Jwt(args) => jwt(args).await,
    }
}

async fn x509(args: X509Args) -> Result<Exit, Failure> {
    let socket = args.endpoint.socket.display().to_string();
    let (mut stream, first) = args.endpoint.patiently(|client| first_svid(client, &socket)).await?;
    tell(&args, &socket, &first)?;
    if !args.watch {
        return Ok(Exit::Done);
    }
    loop {
        match stream.message().await {
            Ok(Some(message)) => tell(&args, &socket, &message)?,
            // The agent was restarted, or the pod is being removed.
            Ok(None) | Err(_) => {
                let again = EndpointArgs { wait: u32::MAX, socket: args.endpoint.socket.clone() };
                let (new, message) = again.patiently(|client| first_svid(client, &socket)).await?;
                stream = new;
                tell(&args, &socket, &message)?;
            }
        }
    }
}

async fn first_svid(
    mut client: SpiffeWorkloadApiClient<Channel>,
    socket: &str,
) -> Result<(Streaming<X509svidResponse>, X509svidResponse), Failure> {
    let refused = |status: &tonic::Status| Failure::refused(socket, status);
    let request = client.fetch_x509svid(with_header(X509svidRequest {}));
    let mut stream = request.await.map_err(|status| refused(&status))?.into_inner();
    match time::timeout(ANSWER, stream.message()).await {
        Ok(Ok(Some(message))) => Ok((stream, message)),
        Ok(Ok(None)) => Err(unreachable(socket, "the agent ended the stream")),
        Ok(Err(status)) => Err(refused(&status)),
        Err(_) => Err(unreachable(socket, "the agent does not answer")),
    }
}

async fn jwt(args: JwtArgs) -> Result<Exit, Failure> {
    let socket = args.endpoint.socket.display().to_string();
    let token = args
        .endpoint
        .patiently(async |mut client| {
            let message = JwtsvidRequest {
                audience: args.audience.clone(),
                spiffe_id: args.spiffe_id.clone(),
            };
            let answer = time::timeout(ANSWER, client.fetch_jwtsvid(with_header(message))).await;
            let answer = answer.map_err(|_| unreachable(&socket, "the agent does not answer"))?;
            let mut svids =
                answer.map_err(|status| Failure::refused(&socket, &status))?.into_inner().svids;
            if svids.is_empty() {
                return Err(unreachable(&socket, "the agent answers without a token"));
            }
            Ok(svids.remove(0).svid)
        })
        .await?;
    match args.output {
        Output::Text => print(&format!("{}\n", printable(&token)))?,
        Output::Json => {
            let svid = JwtSvid::parse_unverified(&token).map_err(|error| {
                Failure::new(
                    Exit::Bug,
                    format!("{socket}: the token that came is refused: {error}"),
                )
            })?;
            print_json(&TokenJson {
                schema: "signet.dev/jwt-svid/v1",
                spiffe_id: svid.id.as_str(),
                audience: &svid.audiences,
                expires_at: svid.expires_at.to_string(),
                token: &token,
            })?;
        }
    }
    Ok(Exit::Done)
}

impl EndpointArgs {
    /// Connects and asks; again while it is only a matter of time and there is some left.
    async fn patiently<T>(
        &self,
        ask: impl AsyncFn(SpiffeWorkloadApiClient<Channel>) -> Result<T, Failure>,
    ) -> Result<T, Failure> {
        let remedies = Remedies {
            denied: "may this user reach the directory that it is in?",
            missing: "is the directory of the agent's workload socket mounted, and does SPIFFE_ENDPOINT_SOCKET name it?",
        };
        let end = Instant::now() + Duration::from_secs(self.wait.into());
        loop {
            let answer = match sockets::connect_to(&self.socket, &remedies).await {
                Ok(channel) => {
                    // An answer has no more than the SVIDs of one pod and some bundles.
                    let client = SpiffeWorkloadApiClient::new(channel)
                        .max_decoding_message_size(16 * 1024 * 1024);
                    ask(client).await
                }
                Err(failure) => Err(failure),
            };
            match answer {
                // A pod gets its identity some time after it has started.
                Err(failure)
                    if matches!(failure.exit, Exit::Denied | Exit::Unreachable)
                        && Instant::now() < end =>
                {
                    time::sleep(AGAIN).await;
                }
                answer => return answer,
            }
        }
    }
}

/// Every call of the Workload API carries this.
fn with_header<T>(message: T) -> Request<T> {
    let mut request = Request::new(message);
    let header = tonic::metadata::MetadataValue::from_static("true");
    request.metadata_mut().insert("workload.spiffe.io", header);
    request
}

fn unreachable(socket: &str, what: &str) -> Failure {
    Failure::new(Exit::Unreachable, format!("{socket}: {what}"))
}

/// Tells about an SVID that came, and writes it when asked to.
fn tell(args: &X509Args, socket: &str, message: &X509svidResponse) -> Result<(), Failure> {
    let files = Files::of(message).map_err(|problem| {
        Failure::new(Exit::Bug, format!("{socket}: the SVID that came is refused: {problem}"))
    })?;
    let written = match &args.write {
        Some(dir) => Some(files.write(dir)?),
        None => None,
    };
    match args.output {
        Output::Json => print_json(&SvidJson {
            schema: "signet.dev/x509-svid/v1",
            spiffe_id: files.svid.id.as_str(),
            not_before: files.svid.not_before.to_string(),
            not_after: files.svid.not_after.to_string(),
            written: written.unwrap_or_default(),
        }),
        Output::Text => {
            let mut text = format!("{}  until {:.3}\n", files.svid.id, files.svid.not_after);
            for path in written.iter().flatten() {
                text.push_str(&format!("wrote {}\n", printable(&path.display().to_string())));
            }
            print(&text)
        }
    }
}

/// An SVID as files.
struct Files {
    svid: Svid,
    /// Name, content, mode. The key comes first: whoever watches for the chain finds its key.
    files: Vec<(String, String, u32)>,
}

impl Files {
    fn of(message: &X509svidResponse) -> Result<Self, String> {
        let one = message.svids.first().ok_or("there is none")?;
        let chain = certificates(&one.x509_svid)?;
        let key = PrivatePkcs8KeyDer::from(one.x509_svid_key.clone());
        let svid = Svid::new(chain.clone(), key).map_err(|e| e.to_string())?;
        let key_block = pem::encode(&pem::Pem::new("PRIVATE KEY", one.x509_svid_key.clone()));
        let mut files = vec![
            ("svid_key.pem".to_owned(), key_block, 0o600),
            ("svid.pem".to_owned(), blocks(&chain), 0o644),
            ("svid_bundle.pem".to_owned(), blocks(&certificates(&one.bundle)?), 0o644),
        ];
        for (domain, bundle) in &message.federated_bundles {
            // Its name becomes a file's: only what is a trust domain's is one.
            let name = domain.strip_prefix("spiffe://").unwrap_or(domain);
            let name = TrustDomain::parse(name).map_err(|e| e.to_string())?;
            let file = format!("federated.{name}.pem");
            files.push((file, blocks(&certificates(bundle)?), 0o644));
        }
        Ok(Self { svid, files })
    }

    /// Writes each beside its place and moves it there: a reader sees the old or the new one.
    fn write(&self, dir: &Path) -> Result<Vec<PathBuf>, Failure> {
        let failed = |path: &Path, error: io::Error| {
            Failure::new(
                Exit::Input,
                format!(
                    "--write: {}: {error}; give a directory that this user may write to",
                    path.display()
                ),
            )
        };
        fs::create_dir_all(dir).map_err(|error| failed(dir, error))?;
        let mut written = Vec::new();
        for (name, content, mode) in &self.files {
            let path = dir.join(name);
            write_whole(dir, &path, content, *mode).map_err(|error| failed(&path, error))?;
            written.push(path);
        }
        File::open(dir).and_then(|dir| dir.sync_all()).map_err(|error| failed(dir, error))?;
        Ok(written)
    }
}

fn write_whole(dir: &Path, path: &Path, content: &str, mode: u32) -> io::Result<()> {
    let permissions = fs::Permissions::from_mode(mode);
    let mut beside = tempfile::Builder::new()
        .prefix(".svid.")
        .permissions(permissions.clone())
        .tempfile_in(dir)?;
    // Whatever the umask took away.
    beside.as_file().set_permissions(permissions)?;
    beside.write_all(content.as_bytes())?;
    beside.as_file().sync_all()?;
    beside.persist(path).map_err(|e| e.error)?;
    Ok(())
}

/// Takes certificates that lie one behind another apart.
fn certificates(mut der: &[u8]) -> Result<Vec<CertificateDer<'static>>, String> {
    let mut all = Vec::new();
    while !der.is_empty() {
        let (rest, _) = X509Certificate::from_der(der)
            .map_err(|e| format!("certificate {} is malformed ({e})", all.len() + 1))?;
        let (one, _) = der.split_at(der.len() - rest.len());
        all.push(CertificateDer::from(one.to_vec()));
        der = rest;
    }
    Ok(all)
}

fn blocks(certificates: &[CertificateDer<'_>]) -> String {
    let block = |c: &CertificateDer<'_>| pem::encode(&pem::Pem::new("CERTIFICATE", c.to_vec()));
    certificates.iter().map(block).collect()
}

fn print_json(value: &impl Serialize) -> Result<(), Failure> {
    let text = serde_json::to_string(value).map_err(|e| Failure::caused(Exit::Bug, e))?;
    print(&(text + "\n"))
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct SvidJson<'a> {
    schema: &'static str,
    spiffe_id: &'a str,
    not_before: String,
    not_after: String,
    written: Vec<PathBuf>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct TokenJson<'a> {
    schema: &'static str,
    spiffe_id: &'a str,
    audience: &'a [String],
    expires_at: String,
    token: &'a str,
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;
    use crate::{
        proto::workload::X509svid,
        spiffe::{Bundle, forge::Forger},
    };

    fn message() -> X509svidResponse {
        let (own, other) = (Forger::root("own"), Forger::root("other"));
        let middle = own.intermediate("middle", |_| {});
        let forged = middle.leaf("spiffe://td/ns/shop/sa/web").with(&[&middle.certificate]);
        let svid = X509svid {
            spiffe_id: "spiffe://td/ns/shop/sa/web".into(),
            x509_svid: forged.chain.iter().flat_map(|c| c.iter().copied()).collect(),
            x509_svid_key: forged.key.secret_pkcs8_der().to_vec(),
            bundle: own.certificate.to_vec(),
            hint: String::new(),
        };
        X509svidResponse {
            svids: vec![svid],
            crl: vec![],
            federated_bundles: [("spiffe://other".to_owned(), other.certificate.to_vec())].into(),
        }
    }

    #[test]
    fn files_are_whole_and_the_key_is_private() {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("tls");
        for message in [message(), message()] {
            let files = Files::of(&message).unwrap();
            let written = files.write(&target).unwrap();
            assert_eq!(written.len(), 4);
            assert_eq!(fs::read_dir(&target).unwrap().count(), 4, "nothing lies beside them");
            let mode = |name| fs::metadata(target.join(name)).unwrap().mode() & 0o777;
            assert_eq!((mode("svid_key.pem"), mode("svid.pem")), (0o600, 0o644));
            let chain = fs::read(target.join("svid.pem")).unwrap();
            assert_eq!(pem::parse_many(chain).unwrap().len(), 2);
            let bundle = fs::read(target.join("svid_bundle.pem")).unwrap();
            let bundle = Bundle::from_pem(&bundle).unwrap();
            assert_eq!(bundle.certificates().next().unwrap().to_vec(), message.svids[0].bundle);
            assert!(target.join("federated.other.pem").exists());
            let key = fs::read(target.join("svid_key.pem")).unwrap();
            let key = pem::parse(key).unwrap();
            assert_eq!(
                (key.tag(), key.contents()),
                ("PRIVATE KEY", &message.svids[0].x509_svid_key[..])
            );
        }
        fs::write(dir.path().join("file"), "").unwrap();
        let failure = Files::of(&message()).unwrap().write(&dir.path().join("file")).unwrap_err();
        assert_eq!(failure.exit, Exit::Input);
        assert!(failure.to_string().contains("--write"), "{failure}");
    }

    #[test]
    fn what_does_not_fit_together_is_not_written() {
        let good = message();
        let changed = |change: fn(&mut X509svidResponse)| {
            let mut message = good.clone();
            change(&mut message);
            Files::of(&message).map(|_| ()).unwrap_err()
        };
        assert!(changed(|m| m.svids.clear()).contains("none"));
        assert!(changed(|m| m.svids[0].x509_svid.push(0)).contains("certificate 3"));
        assert!(changed(|m| m.svids[0].bundle[0] = 0).contains("certificate 1"));
        assert!(changed(|m| m.svids[0].x509_svid_key.clear()).contains("private key"));
        let evil = changed(|m| {
            let bundle = m.federated_bundles.remove("spiffe://other").unwrap();
            m.federated_bundles.insert("spiffe://../../etc/x".into(), bundle);
        });
        assert!(evil.contains("trust domain"), "{evil}");
    }

    #[test]
    fn sockets_are_uris() {
        assert_eq!(parse_socket("unix:///run/a.sock"), Ok("/run/a.sock".into()));
        assert_eq!(parse_socket("unix:/run/a.sock"), Ok("/run/a.sock".into()));
        for bad in ["/run/a.sock", "unix://run/a.sock", "tcp://127.0.0.1:1", "unix:///a?b", ""] {
            assert!(parse_socket(bad).is_err(), "{bad}");
        }
    }
}
