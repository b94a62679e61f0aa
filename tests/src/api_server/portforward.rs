//! `pods/<name>/portforward` over a WebSocket, as a real server proxies it to the kubelet: to a
//! port of the loopback address in the node's network namespace, because the agents' pods are in
//! their hosts' network.

use std::{
    net::{Ipv4Addr, SocketAddr},
    path::PathBuf,
    sync::Arc,
    time::Duration,
};

use axum::{
    Extension,
    body::Body,
    extract::{Path, Query, Request, State as Extract},
    http::{HeaderMap, StatusCode, header},
    response::Response,
};
use futures_util::{SinkExt, StreamExt};
use hyper_util::rt::TokioIo;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};
use tokio_tungstenite::{
    WebSocketStream,
    tungstenite::{Message, handshake::derive_accept_key, protocol::Role},
};

use super::{
    Refusal, Shared,
    access::{Attributes, User},
    http::Params,
};
use crate::netns;

/// The one subprotocol that is spoken, as by a real kubelet: each message begins with a channel's
/// number, two channels a port: data, then what goes wrong.
const PROTOCOL: &str = "v4.channel.k8s.io";
const DATA: u8 = 0;
const ERROR: u8 = 1;
/// How long the port may take to answer.
const DIAL: Duration = Duration::from_secs(5);

/// Answers the request for one pod.
pub(super) async fn answer(
    Extract(shared): Extract<Arc<Shared>>,
    Path((namespace, name)): Path<(String, String)>,
    Query(params): Query<Params>,
    Extension(user): Extension<User>,
    mut request: Request,
) -> Result<Response, Refusal> {
    let path: Vec<&str> = request.uri().path().split('/').filter(|part| !part.is_empty()).collect();
    let wanted = Attributes::of(request.method(), &path, false, "");
    shared.state().authorize(&user, &wanted)?;
    let pod = shared.state().objects.get("pods", &namespace, &name)?;
    let node = pod["spec"]["nodeName"].as_str().unwrap_or_default();
    let bad = |message: String| Refusal::new(400, "BadRequest", message);
    let netns = shared.state().networks.get(node).cloned();
    let netns = netns.ok_or_else(|| bad(format!("pod {name} does not have a host assigned")))?;
    let ports = params.get("ports").map(String::as_str).unwrap_or_default();
    let port: u16 = ports.parse().map_err(|_| bad(format!("ports: {ports:?} is not one port")))?;
    let key = key_of(request.headers()).ok_or_else(|| {
        bad(format!("unable to upgrade: a WebSocket with {PROTOCOL} is what this server speaks"))
    })?;
    let accept = derive_accept_key(key.as_bytes());
    let upgrade = hyper::upgrade::on(&mut request);
    tokio::spawn(async move {
        let Ok(upgraded) = upgrade.await else { return };
        let stream = TokioIo::new(upgraded);
        let socket = WebSocketStream::from_raw_socket(stream, Role::Server, None).await;
        // A client that went has seen enough.
        let _ = carry(socket, netns, port).await;
    });
    Response::builder()
        .status(StatusCode::SWITCHING_PROTOCOLS)
        .header(header::UPGRADE, "websocket")
        .header(header::CONNECTION, "Upgrade")
        .header(header::SEC_WEBSOCKET_ACCEPT, accept)
        .header(header::SEC_WEBSOCKET_PROTOCOL, PROTOCOL)
        .body(Body::empty())
        .map_err(|error| Refusal::new(500, "InternalError", error.to_string()))
}

/// The client's key, if it asks for the WebSocket that is spoken here.
fn key_of(headers: &HeaderMap) -> Option<String> {
    let text = |name| headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or_default();
    let is_socket = text(header::UPGRADE).eq_ignore_ascii_case("websocket")
        && text(header::SEC_WEBSOCKET_VERSION) == "13";
    let mut protocols = text(header::SEC_WEBSOCKET_PROTOCOL).split(',').map(str::trim);
    let key = text(header::SEC_WEBSOCKET_KEY);
    (is_socket && protocols.any(|one| one == PROTOCOL) && !key.is_empty()).then(|| key.to_owned())
}

type Socket = WebSocketStream<TokioIo<hyper::upgrade::Upgraded>>;

async fn carry(mut socket: Socket, netns: PathBuf, port: u16) -> anyhow::Result<()> {
    let [low, high] = port.to_le_bytes();
    for channel in [DATA, ERROR] {
        socket.send(Message::binary(vec![channel, low, high])).await?;
    }
    let mut tcp = match dial(netns, port).await {
        Ok(tcp) => tcp,
        Err(error) => {
            let mut message = vec![ERROR];
            message.extend(format!("failed to connect to localhost:{port}: {error:#}").bytes());
            socket.send(Message::binary(message)).await?;
            return Ok(socket.close(None).await?);
        }
    };
    let (mut read, mut write) = tcp.split();
    let mut buffer = vec![0; 16 * 1024];
    let mut is_open = true;
    loop {
        tokio::select! {
            count = read.read(&mut buffer) => {
                let count = count?;
                if count == 0 {
                    return Ok(socket.close(None).await?);
                }
                let mut message = vec![DATA];
                message.extend(&buffer[..count]);
                socket.send(Message::binary(message)).await?;
            }
            message = socket.next(), if is_open => match message.transpose()? {
                Some(Message::Binary(bytes)) if bytes.first() == Some(&DATA) => {
                    write.write_all(&bytes[1..]).await?;
                }
                Some(Message::Close(_)) | None => {
                    is_open = false;
                    write.shutdown().await?;
                }
                Some(_) => {}
            },
        }
    }
}

async fn dial(netns: PathBuf, port: u16) -> anyhow::Result<TcpStream> {
    let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    let dialling =
        move || netns::inside(&netns, || Ok(std::net::TcpStream::connect_timeout(&address, DIAL)?));
    let stream = tokio::task::spawn_blocking(dialling).await??;
    stream.set_nonblocking(true)?;
    Ok(TcpStream::from_std(stream)?)
}
