//! Connections to agents: over their admin sockets, or ([`remote`]) through the API server.

use std::{
    fmt, io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use futures_util::{StreamExt, stream};
use hyper_util::rt::TokioIo;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::UnixStream,
};
use tonic::{
    Status, Streaming,
    metadata::{Ascii, MetadataValue},
    service::{Interceptor, interceptor::InterceptedService},
    transport::{Channel, Endpoint, Uri},
};

use super::{
    exit::{Exit, Failure},
    remote,
};

/// An agent has so long to accept a connection and to answer a question.
pub const TIMEOUT: Duration = Duration::from_secs(5);

/// The admin socket where nothing else is said.
const DEFAULT_SOCKET: &str = "/run/signet/admin/agent.sock";

/// Which agents are asked.
#[derive(clap::Args, Clone, Debug)]
pub struct SocketArgs {
    /// Admin socket of an agent; give it several times to ask several agents [default:
    /// /run/signet/admin/agent.sock, or where there is none but a kubeconfig, all nodes]
    #[arg(
        long = "socket",
        value_name = "path",
        env = "SIGNET_SOCKET",
        value_delimiter = ',',
        global = false
    )]
    sockets: Vec<PathBuf>,
    #[command(flatten)]
    cluster: remote::ClusterArgs,
}

impl SocketArgs {
    /// Whether the agents of a cluster are asked, through its API server.
    pub fn is_remote(&self) -> bool {
        self.cluster.is_asked_for()
            || (self.sockets.is_empty()
                && !Path::new(DEFAULT_SOCKET).exists()
                && self.cluster.has_kubeconfig())
    }
}

/// A connected agent.
#[derive(Clone, Debug)]
pub struct Agent {
    /// Its socket's path or its node's name, for messages.
    pub socket: Arc<str>,
    /// The connection.
    pub channel: InterceptedService<Channel, Credential>,
}

/// What each call to an agent carries, if it must say whose it is.
#[derive(Clone, Default)]
pub struct Credential(Option<MetadataValue<Ascii>>);

impl Credential {
    /// A bearer token; `None` when no header can hold it.
    pub fn bearer(token: &str) -> Option<Self> {
        let mut value = MetadataValue::try_from(format!("Bearer {token}")).ok()?;
        value.set_sensitive(true);
        Some(Self(Some(value)))
    }
}

impl fmt::Debug for Credential {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Credential").field(&self.0.as_ref().map(|_| "…")).finish()
    }
}

impl Interceptor for Credential {
    fn call(&mut self, mut request: tonic::Request<()>) -> Result<tonic::Request<()>, Status> {
        if let Some(value) = &self.0 {
            request.metadata_mut().insert("authorization", value.clone());
        }
        Ok(request)
    }
}

/// Connects to one agent's admin socket.
pub async fn connect(path: &Path) -> Result<Agent, Failure> {
    let remedies = Remedies {
        denied: "the admin socket is for root only",
        missing: "is the agent running, and is --socket right?",
    };
    let channel = connect_to(path, &remedies).await?;
    let channel = InterceptedService::new(channel, Credential::default());
    Ok(Agent { socket: path.display().to_string().into(), channel })
}

/// What to do about a socket that cannot be reached.
pub struct Remedies {
    /// Where it may not be reached.
    pub denied: &'static str,
    /// Where there is none.
    pub missing: &'static str,
}

/// Connects to a socket.
pub async fn connect_to(path: &Path, remedies: &Remedies) -> Result<Channel, Failure> {
    let socket: Arc<str> = path.display().to_string().into();
    let stream = match tokio::time::timeout(TIMEOUT, UnixStream::connect(path)).await {
        Ok(Ok(stream)) => stream,
        Ok(Err(error)) => return Err(unreachable(&socket, &error, remedies)),
        Err(_) => {
            let error = io::Error::from(io::ErrorKind::TimedOut);
            return Err(unreachable(&socket, &error, remedies));
        }
    };
    over(stream).await.map_err(|e| {
        Failure::new(Exit::Unreachable, format!("{socket}: no agent answers there: {e}"))
    })
}

/// A channel over a connection that is made already.
pub async fn over<S>(stream: S) -> Result<Channel, tonic::transport::Error>
where
    S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    // Tonic asks for it by a connector, once.
    let stream = Arc::new(Mutex::new(Some(stream)));
    let connector = tower::service_fn(move |_: Uri| {
        let taken = stream.lock().unwrap_or_else(PoisonError::into_inner).take();
        async move {
            taken.map(TokioIo::new).ok_or_else(|| io::Error::from(io::ErrorKind::NotConnected))
        }
    });
    Endpoint::from_static("http://signet.local").connect_with_connector(connector).await
}

/// Connects to all; those that cannot be reached are told on stderr. None at all is a failure.
pub async fn connect_all(args: &SocketArgs) -> Result<(Vec<Agent>, bool), Failure> {
    let (agents, failures) = connect_each(args).await?;
    for failure in &failures {
        anstream::eprintln!("warning: {failure}");
    }
    Ok((agents, failures.is_empty()))
}

/// Connects to all; with them come the failures of those that cannot be reached. None at all is a
/// failure.
pub async fn connect_each(args: &SocketArgs) -> Result<(Vec<Agent>, Vec<Failure>), Failure> {
    if args.is_remote() {
        return remote::connect_each(&args.cluster).await;
    }
    let default = [PathBuf::from(DEFAULT_SOCKET)];
    let sockets = if args.sockets.is_empty() { &default[..] } else { &args.sockets };
    let mut agents = Vec::new();
    let mut failures = Vec::new();
    for path in sockets {
        match connect(path).await {
            Ok(agent) => agents.push(agent),
            Err(failure) => failures.push(failure),
        }
    }
    if agents.is_empty() && !failures.is_empty() {
        if failures.len() > 1 {
            for failure in &failures {
                anstream::eprintln!("warning: {failure}");
            }
        }
        return Err(failures.remove(0));
    }
    Ok((agents, failures))
}

/// Asks so many agents at a time.
const AT_ONCE: usize = 32;

/// Asks all agents one question; the answers come in the agents' order. Where there are several,
/// those that cannot be reached are told on stderr, and the answer is not complete.
///
/// # Errors
/// A refusal; or no answer, where there is but one agent.
pub async fn ask_all<T>(
    agents: &[Agent],
    question: impl AsyncFn(&Agent) -> Result<T, Failure>,
) -> Result<(Vec<T>, bool), Failure> {
    let (mut answers, mut is_complete) = (Vec::new(), true);
    for answer in ask_each(agents, question).await {
        match answer {
            Ok(answer) => answers.push(answer),
            Err(failure) if agents.len() > 1 && failure.exit == Exit::Unreachable => {
                anstream::eprintln!("warning: {failure}");
                is_complete = false;
            }
            Err(failure) => return Err(failure),
        }
    }
    Ok((answers, is_complete))
}

/// What each agent answers, in the agents' order.
pub async fn ask_each<T>(
    agents: &[Agent],
    question: impl AsyncFn(&Agent) -> Result<T, Failure>,
) -> Vec<Result<T, Failure>> {
    let asked: Vec<_> = agents.iter().map(|agent| question(agent)).collect();
    stream::iter(asked).buffered(AT_ONCE).collect().await
}

/// All parts of an answer, each of them in time.
pub async fn all_parts<T>(
    agent: &Agent,
    answer: impl Future<Output = Result<tonic::Response<Streaming<T>>, tonic::Status>>,
) -> Result<Vec<T>, Failure> {
    let mut stream = within_time(agent, answer).await?;
    let mut parts = Vec::new();
    loop {
        let next = async { stream.message().await.map(tonic::Response::new) };
        match within_time(agent, next).await? {
            Some(part) => parts.push(part),
            None => return Ok(parts),
        }
    }
}

/// An agent's answer, if it comes in time.
pub async fn within_time<T>(
    agent: &Agent,
    answer: impl Future<Output = Result<tonic::Response<T>, tonic::Status>>,
) -> Result<T, Failure> {
    within(TIMEOUT, agent, answer).await
}

/// An agent's answer, if it comes within `limit`.
pub async fn within<T>(
    limit: Duration,
    agent: &Agent,
    answer: impl Future<Output = Result<tonic::Response<T>, tonic::Status>>,
) -> Result<T, Failure> {
    match tokio::time::timeout(limit, answer).await {
        Ok(Ok(answer)) => Ok(answer.into_inner()),
        Ok(Err(status)) => Err(Failure::refused(&agent.socket, &status)),
        Err(_) => Err(Failure::new(
            Exit::Unreachable,
            format!("{}: the agent does not answer", agent.socket),
        )),
    }
}

fn unreachable(socket: &str, error: &io::Error, remedies: &Remedies) -> Failure {
    let (exit, remedy) = match error.kind() {
        io::ErrorKind::PermissionDenied => (Exit::Denied, remedies.denied),
        io::ErrorKind::NotFound => (Exit::Unreachable, remedies.missing),
        _ => (Exit::Unreachable, "is the agent running?"),
    };
    Failure::new(exit, format!("{socket}: {error}; {remedy}"))
}
