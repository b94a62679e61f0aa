//! Parameters of the roles.

use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr},
    path::PathBuf,
};

use serde::{Deserialize, Serialize};

/// True for roles that print `listening` once clients may come.
pub fn is_server(role: &str) -> bool {
    matches!(
        role,
        "tcp-server"
            | "http-server"
            | "measure-server"
            | "udp-server"
            | "service-proxy"
            | "hostile-server"
    )
}

/// See [`super::Role::TcpServer`].
#[derive(Clone, Debug, Default, Serialize, Deserialize, clap::Args)]
#[serde(default, rename_all = "camelCase")]
pub struct TcpServer {
    /// Addresses to listen on.
    #[arg(long, required = true)]
    pub listen: Vec<SocketAddr>,
    /// A number that tells this server from others.
    #[arg(long, default_value_t = 0)]
    pub tag: u32,
    /// Prints every accepted connection.
    #[arg(long)]
    pub verbose: bool,
}

/// See [`super::Role::HttpServer`].
#[derive(Clone, Debug, Default, Serialize, Deserialize, clap::Args)]
#[serde(default, rename_all = "camelCase")]
pub struct HttpServer {
    /// Addresses to listen on.
    #[arg(long, required = true)]
    pub listen: Vec<SocketAddr>,
    /// A name that answers carry.
    #[arg(long, default_value = "")]
    pub name: String,
}

/// See [`super::Role::Dial`].
#[derive(Clone, Debug, Serialize, Deserialize, clap::Args)]
#[serde(default, rename_all = "camelCase")]
pub struct Dial {
    /// Where to.
    #[arg(long)]
    pub to: SocketAddr,
    /// What to say; empty: connects and waits for a byte or the end.
    #[arg(long, default_value = "hello")]
    pub text: String,
    /// Source address to bind to first.
    #[arg(long)]
    pub bind: Option<SocketAddr>,
    /// IP_TRANSPARENT, so that a foreign address can be bound.
    #[arg(long)]
    pub transparent: bool,
    /// SO_BINDTODEVICE.
    #[arg(long)]
    pub device: Option<String>,
    /// A Multipath TCP socket.
    #[arg(long)]
    pub mptcp: bool,
    /// Limit of each step.
    #[arg(long, default_value_t = 5000)]
    pub timeout_ms: u64,
}

impl Default for Dial {
    fn default() -> Self {
        Self {
            to: nowhere(),
            text: "hello".into(),
            bind: None,
            transparent: false,
            device: None,
            mptcp: false,
            timeout_ms: 5000,
        }
    }
}

/// See [`super::Role::Caller`].
#[derive(Clone, Debug, Default, Serialize, Deserialize, clap::Args)]
#[serde(default, rename_all = "camelCase")]
pub struct Caller {
    /// TCP servers of the lab.
    #[arg(long, required = true)]
    pub to: Vec<SocketAddr>,
    /// What to say: who it is.
    #[arg(long, default_value = "hello")]
    pub text: String,
    /// Pause between two calls.
    #[arg(long, default_value_t = 20)]
    pub interval_ms: u64,
    /// Limit of each step of a call.
    #[arg(long, default_value_t = 1000)]
    pub timeout_ms: u64,
}

/// See [`super::Role::Load`].
#[derive(Clone, Debug, Serialize, Deserialize, clap::Args)]
#[serde(default, rename_all = "camelCase")]
pub struct Load {
    /// An HTTP server's address.
    #[arg(long)]
    pub to: SocketAddr,
    /// The request's path, which is its marker too.
    #[arg(long, default_value = "/")]
    pub path: String,
    /// Pause between two requests of one thread.
    #[arg(long, default_value_t = 10)]
    pub interval_ms: u64,
    /// Threads.
    #[arg(long, default_value_t = 1)]
    pub parallel: usize,
    /// Limit of each step.
    #[arg(long, default_value_t = 2000)]
    pub timeout_ms: u64,
    /// Ends by itself after so many requests a thread; 0: when told.
    #[arg(long, default_value_t = 0)]
    pub count: u64,
}

impl Default for Load {
    fn default() -> Self {
        Self {
            to: nowhere(),
            path: "/".into(),
            interval_ms: 10,
            parallel: 1,
            timeout_ms: 2000,
            count: 0,
        }
    }
}

/// See [`super::Role::Hold`].
#[derive(Clone, Debug, Serialize, Deserialize, clap::Args)]
#[serde(default, rename_all = "camelCase")]
pub struct Hold {
    /// A TCP server of the lab.
    #[arg(long)]
    pub to: SocketAddr,
    /// How many connections.
    #[arg(long, default_value_t = 1)]
    pub count: usize,
    /// Pause between two bytes on one connection.
    #[arg(long, default_value_t = 5)]
    pub interval_ms: u64,
    /// Limit of each step.
    #[arg(long, default_value_t = 10000)]
    pub timeout_ms: u64,
}

impl Default for Hold {
    fn default() -> Self {
        Self { to: nowhere(), count: 1, interval_ms: 5, timeout_ms: 10_000 }
    }
}

/// See [`super::Role::Hammer`].
#[derive(Clone, Debug, Serialize, Deserialize, clap::Args)]
#[serde(default, rename_all = "camelCase")]
pub struct Hammer {
    /// Destinations as `address=tag of the server behind it`.
    #[arg(long, required = true, value_parser = parse_target)]
    pub to: Vec<(SocketAddr, u32)>,
    /// Connections in all.
    #[arg(long, default_value_t = 1000)]
    pub count: u64,
    /// At once.
    #[arg(long, default_value_t = 64)]
    pub parallel: usize,
    /// Kinds, taken in turn.
    #[arg(long, default_value = "normal,close,reset", value_delimiter = ',')]
    pub kinds: Vec<HammerKind>,
    /// Every so many connections bind a source port explicitly; 0: none.
    #[arg(long, default_value_t = 0)]
    pub bind_every: u64,
    /// First of the source ports to bind.
    #[arg(long, default_value_t = 20000)]
    pub bind_from: u16,
    /// How many source ports: the fewer, the more collide.
    #[arg(long, default_value_t = 64)]
    pub bind_span: u16,
    /// Limit of each step.
    #[arg(long, default_value_t = 10000)]
    pub timeout_ms: u64,
}

/// What a short connection does.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "camelCase")]
pub enum HammerKind {
    /// Sends its nonce, reads the answer, closes.
    Normal,
    /// Sends its nonce and closes at once.
    Close,
    /// Sends its nonce and resets at once.
    Reset,
}

impl Default for Hammer {
    fn default() -> Self {
        Self {
            to: Vec::new(),
            count: 1000,
            parallel: 64,
            kinds: vec![HammerKind::Normal, HammerKind::Close, HammerKind::Reset],
            bind_every: 0,
            bind_from: 20_000,
            bind_span: 64,
            timeout_ms: 10_000,
        }
    }
}

/// See [`super::Role::Bulk`].
#[derive(Clone, Debug, Serialize, Deserialize, clap::Args)]
#[serde(default, rename_all = "camelCase")]
pub struct Bulk {
    /// A TCP server of the lab.
    #[arg(long)]
    pub to: SocketAddr,
    /// How many bytes each way.
    #[arg(long, default_value_t = 1 << 20)]
    pub bytes: u64,
    /// Which way.
    #[arg(long, value_enum, default_value = "up")]
    pub direction: BulkDirection,
    /// Reads at most so many bytes a second; 0: as fast as it can.
    #[arg(long, default_value_t = 0)]
    pub read_rate: u64,
    /// Closes its sending side before it reads (down only).
    #[arg(long)]
    pub half_close_first: bool,
    /// The server resets the connection after so many bytes; 0: it does not.
    #[arg(long, default_value_t = 0)]
    pub server_aborts_after: u64,
    /// The client resets the connection after so many bytes; 0: it does not.
    #[arg(long, default_value_t = 0)]
    pub client_aborts_after: u64,
    /// Limit of a read or write without progress.
    #[arg(long, default_value_t = 20000)]
    pub timeout_ms: u64,
}

/// Which way bytes go.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "camelCase")]
pub enum BulkDirection {
    /// Client to server.
    #[default]
    Up,
    /// Server to client.
    Down,
    /// Both at once.
    Both,
}

impl Default for Bulk {
    fn default() -> Self {
        Self {
            to: nowhere(),
            bytes: 1 << 20,
            direction: BulkDirection::Up,
            read_rate: 0,
            half_close_first: false,
            server_aborts_after: 0,
            client_aborts_after: 0,
            timeout_ms: 20_000,
        }
    }
}

/// See [`super::Role::MeasureServer`].
#[derive(Clone, Debug, Serialize, Deserialize, clap::Args)]
#[serde(rename_all = "camelCase")]
pub struct MeasureServer {
    /// The first of three ports: bulk, HTTP, one byte a connection.
    #[arg(long)]
    pub listen: SocketAddr,
}

/// See [`super::Role::Measure`].
#[derive(Clone, Debug, Serialize, Deserialize, clap::Args)]
#[serde(rename_all = "camelCase")]
pub struct Measure {
    /// The first port of a `measure-server`.
    #[arg(long)]
    pub to: SocketAddr,
    /// What to do.
    #[arg(long, value_enum)]
    pub kind: MeasureKind,
    /// Connections at once.
    #[arg(long, default_value_t = 1)]
    pub parallel: usize,
    /// For how long.
    #[arg(long, default_value_t = 1000)]
    pub millis: u64,
}

/// What a measuring client does on each of its connections.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "camelCase")]
pub enum MeasureKind {
    /// Sends without a pause, and waits until the server has all of it.
    Bulk,
    /// One HTTP request after the other.
    Http,
    /// A connection for each byte and its answer.
    Connect,
    /// One request, then nothing until standard input closes.
    Hold,
}

/// See [`super::Role::UdpServer`].
#[derive(Clone, Debug, Default, Serialize, Deserialize, clap::Args)]
#[serde(default, rename_all = "camelCase")]
pub struct UdpServer {
    /// Addresses to listen on.
    #[arg(long, required = true)]
    pub listen: Vec<SocketAddr>,
}

/// See [`super::Role::UdpClient`].
#[derive(Clone, Debug, Serialize, Deserialize, clap::Args)]
#[serde(default, rename_all = "camelCase")]
pub struct UdpClient {
    /// Where to.
    #[arg(long)]
    pub to: SocketAddr,
    /// A text that each datagram carries.
    #[arg(long, default_value = "hello")]
    pub text: String,
    /// Connects the socket first, and sends without an address.
    #[arg(long)]
    pub connected: bool,
    /// How many; 0: until told to stop.
    #[arg(long, default_value_t = 1)]
    pub count: u64,
    /// Pause between two.
    #[arg(long, default_value_t = 10)]
    pub interval_ms: u64,
    /// How long to wait for each answer.
    #[arg(long, default_value_t = 1000)]
    pub timeout_ms: u64,
}

impl Default for UdpClient {
    fn default() -> Self {
        Self {
            to: nowhere(),
            text: "hello".into(),
            connected: false,
            count: 1,
            interval_ms: 10,
            timeout_ms: 1000,
        }
    }
}

/// See [`super::Role::UdpFlood`].
#[derive(Clone, Debug, Serialize, Deserialize, clap::Args)]
#[serde(default, rename_all = "camelCase")]
pub struct UdpFlood {
    /// The first address and port; each datagram goes to the next port.
    #[arg(long)]
    pub to: SocketAddr,
    /// How many.
    #[arg(long, default_value_t = 1000)]
    pub count: u16,
}

impl Default for UdpFlood {
    fn default() -> Self {
        Self { to: nowhere(), count: 1000 }
    }
}

/// See [`super::Role::ConnectFlood`].
#[derive(Clone, Debug, Serialize, Deserialize, clap::Args)]
#[serde(default, rename_all = "camelCase")]
pub struct ConnectFlood {
    /// Where to.
    #[arg(long)]
    pub to: SocketAddr,
    /// For so long.
    #[arg(long, default_value_t = 1000)]
    pub for_ms: u64,
}

impl Default for ConnectFlood {
    fn default() -> Self {
        Self { to: nowhere(), for_ms: 1000 }
    }
}

/// See [`super::Role::FirstMoment`].
#[derive(Clone, Debug, Serialize, Deserialize, clap::Args)]
#[serde(default, rename_all = "camelCase")]
pub struct FirstMoment {
    /// Where to.
    #[arg(long)]
    pub to: SocketAddr,
    /// The text to get across.
    #[arg(long, default_value = "hello")]
    pub text: String,
    /// Gives up after so long.
    #[arg(long, default_value_t = 1000)]
    pub for_ms: u64,
    /// Pause between two attempts.
    #[arg(long, default_value_t = 1)]
    pub interval_ms: u64,
    /// Ends at the first answer.
    #[arg(long)]
    pub until_answered: bool,
}

impl Default for FirstMoment {
    fn default() -> Self {
        Self {
            to: nowhere(),
            text: "hello".into(),
            for_ms: 1000,
            interval_ms: 1,
            until_answered: false,
        }
    }
}

/// See [`super::Role::Spoof`].
#[derive(Clone, Debug, Serialize, Deserialize, clap::Args)]
#[serde(default, rename_all = "camelCase")]
pub struct Spoof {
    /// The forged source (IPv4).
    #[arg(long)]
    pub from: SocketAddr,
    /// Where to (IPv4).
    #[arg(long)]
    pub to: SocketAddr,
    /// A UDP datagram instead of a TCP SYN.
    #[arg(long)]
    pub udp: bool,
    /// What the datagram carries.
    #[arg(long, default_value = "")]
    pub text: String,
    /// How many.
    #[arg(long, default_value_t = 1)]
    pub count: u32,
}

impl Default for Spoof {
    fn default() -> Self {
        Self { from: nowhere(), to: nowhere(), udp: false, text: String::new(), count: 1 }
    }
}

/// See [`super::Role::ServiceProxy`].
#[derive(Clone, Debug, Serialize, Deserialize, clap::Args)]
#[serde(rename_all = "camelCase")]
pub struct ServiceProxy {
    /// The Service's address.
    #[arg(long)]
    pub listen: SocketAddr,
    /// File of the EndpointSlice, read for each connection.
    #[arg(long)]
    pub slice: PathBuf,
    /// Name of the port, empty for an unnamed one.
    #[arg(long, default_value = "")]
    pub port_name: String,
    /// UDP instead of TCP.
    #[arg(long)]
    pub udp: bool,
}

/// See [`super::Role::HostileClient`].
#[derive(Clone, Debug, Serialize, Deserialize, clap::Args)]
#[serde(default, rename_all = "camelCase")]
pub struct HostileClient {
    /// The tunnel port to attack.
    #[arg(long)]
    pub to: SocketAddr,
    /// PEM file with certificate chain and key; none: no client certificate.
    #[arg(long)]
    pub certificate: Option<PathBuf>,
    /// What it does.
    #[arg(long, value_enum, default_value = "connect")]
    pub attack: Attack,
    /// `:authority` of the CONNECT request.
    #[arg(long, default_value = "")]
    pub authority: String,
    /// Method of the request.
    #[arg(long, default_value = "CONNECT")]
    pub method: String,
    /// Headers of the request, as `name: value`.
    #[arg(long)]
    pub header: Vec<String>,
    /// What it says through a tunnel that opens (a `hello` of the lab's TCP server).
    #[arg(long, default_value = "hello")]
    pub text: String,
    /// ALPN protocols that it offers; empty: none.
    #[arg(long, default_value = "h2", value_delimiter = ',')]
    pub alpn: Vec<String>,
    /// Offers TLS 1.2 only.
    #[arg(long)]
    pub tls12: bool,
    /// Source address to bind to first.
    #[arg(long)]
    pub bind: Option<SocketAddr>,
    /// Bytes of garbage, or connections that stall.
    #[arg(long, default_value_t = 0)]
    pub amount: u64,
    /// Limit of each step.
    #[arg(long, default_value_t = 5000)]
    pub timeout_ms: u64,
}

impl Default for HostileClient {
    fn default() -> Self {
        Self {
            to: nowhere(),
            certificate: None,
            attack: Attack::Connect,
            authority: String::new(),
            method: "CONNECT".into(),
            header: Vec::new(),
            text: "hello".into(),
            alpn: vec!["h2".into()],
            tls12: false,
            bind: None,
            amount: 0,
            timeout_ms: 5000,
        }
    }
}

/// What a hostile client does.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "camelCase")]
pub enum Attack {
    /// Handshake, then one HTTP/2 request.
    #[default]
    Connect,
    /// Handshake twice with the same session store: is a ticket given, is a PSK accepted?
    Resume,
    /// Handshake, then an HTTP/1.1 request.
    Http1,
    /// Plain HTTP/1.1 bytes without TLS.
    Plain,
    /// `amount` bytes of garbage without TLS.
    Garbage,
    /// Handshake, then `amount` bytes of garbage instead of HTTP/2.
    GarbageInside,
    /// `amount` connections that send half of a ClientHello and wait.
    Stall,
}

/// See [`super::Role::HostileServer`].
#[derive(Clone, Debug, Serialize, Deserialize, clap::Args)]
#[serde(rename_all = "camelCase")]
pub struct HostileServer {
    /// Addresses to listen on.
    #[arg(long, required = true)]
    pub listen: Vec<SocketAddr>,
    /// PEM file with certificate chain and key.
    #[arg(long)]
    pub certificate: PathBuf,
    /// ALPN protocols that it offers.
    #[arg(long, default_value = "h2", value_delimiter = ',')]
    pub alpn: Vec<String>,
}

fn nowhere() -> SocketAddr {
    (IpAddr::V4(Ipv4Addr::UNSPECIFIED), 0).into()
}

fn parse_target(s: &str) -> Result<(SocketAddr, u32), String> {
    let (address, tag) = s.rsplit_once('=').unwrap_or((s, "0"));
    Ok((
        address.parse().map_err(|e| format!("{address}: {e}"))?,
        tag.parse().map_err(|e| format!("{tag}: {e}"))?,
    ))
}
