//! Roles that processes of the lab play: servers, clients, attackers.
//!
//! A role's parameters are one struct in [`roles`]: the library hands them to the helper as
//! JSON, a manifest's `args` as flags. Every role prints JSON lines on standard output, each
//! with `event`; one that measures ends with `event: report` ([`reports`]). A client that runs
//! "until told" ends when its standard input closes; a server reports when it reads `report`.

mod bulk;
mod caller;
mod connect_flood;
mod dial;
mod echo;
mod first_moment;
mod hammer;
mod hold;
mod hostile;
mod http;
mod load;
mod measure;
mod outcome;
pub mod reports;
pub mod roles;
mod service_proxy;
mod spoof;
mod tcp_server;
mod udp;

use std::{
    io::{BufRead, Write},
    net::{Ipv6Addr, SocketAddr},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use serde_json::json;

use self::roles::*;

/// What a process does.
#[derive(Clone, Debug, Serialize, Deserialize, clap::Subcommand)]
#[serde(rename_all = "camelCase")]
pub enum Role {
    /// Sleeps until killed.
    Pause,
    /// Answers hellos, nonces, bulk transfers and echoes over TCP.
    TcpServer(TcpServer),
    /// Answers HTTP/1.1 requests with what it sees of the client.
    HttpServer(HttpServer),
    /// Dials once and tells what came of it.
    Dial(Dial),
    /// Dials its destinations in turn until told to stop, and tells what came of each call.
    Caller(Caller),
    /// Sends an HTTP request at an interval until told to stop.
    Load(Load),
    /// Holds connections open and tells when each ends.
    Hold(Hold),
    /// Opens very many short connections and checks whom each reaches.
    Hammer(Hammer),
    /// Transfers bytes and compares checksums.
    Bulk(Bulk),
    /// Serves what a `measure` asks for, on three ports from the given one on.
    MeasureServer(MeasureServer),
    /// Sends as much as it can for some time, and counts.
    Measure(Measure),
    /// Answers datagrams.
    UdpServer(UdpServer),
    /// Sends datagrams and counts answers.
    UdpClient(UdpClient),
    /// Sends a datagram to each of many ports, and counts those that were refused.
    UdpFlood(UdpFlood),
    /// Begins connections as fast as it can, and counts how each is answered at connect.
    ConnectFlood(ConnectFlood),
    /// Dials from its first microsecond on.
    FirstMoment(FirstMoment),
    /// Sends packets with a forged source address through a raw socket.
    Spoof(Spoof),
    /// Forwards a Service's address to its endpoints, as kube-proxy would.
    ServiceProxy(ServiceProxy),
    /// A hostile client on a tunnel port.
    HostileClient(HostileClient),
    /// A hostile server on a tunnel port.
    HostileServer(HostileServer),
}

impl Role {
    /// A TCP server on all addresses of both families.
    pub fn tcp(port: u16) -> Self {
        Self::TcpServer(TcpServer { listen: vec![any(port)], ..Default::default() })
    }

    /// An HTTP server on all addresses of both families.
    pub fn http(port: u16) -> Self {
        Self::HttpServer(HttpServer { listen: vec![any(port)], ..Default::default() })
    }

    /// A UDP server on all addresses of both families.
    pub fn udp(port: u16) -> Self {
        Self::UdpServer(UdpServer { listen: vec![any(port)] })
    }

    /// Dials an address, says hello with a text, reads the answer.
    pub fn dial(to: SocketAddr, text: &str) -> Self {
        Self::Dial(Dial { to, text: text.into(), ..Dial::default() })
    }

    /// The helper's arguments.
    pub fn argv(&self) -> Result<Vec<String>> {
        Ok(vec!["json".into(), serde_json::to_string(self).context("role")?])
    }

    /// A short name for logs.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Pause => "pause",
            Self::TcpServer(_) => "tcp-server",
            Self::HttpServer(_) => "http-server",
            Self::Dial(_) => "dial",
            Self::Caller(_) => "caller",
            Self::Load(_) => "load",
            Self::Hold(_) => "hold",
            Self::Hammer(_) => "hammer",
            Self::Bulk(_) => "bulk",
            Self::MeasureServer(_) => "measure-server",
            Self::Measure(_) => "measure",
            Self::UdpServer(_) => "udp-server",
            Self::UdpFlood(_) => "udp-flood",
            Self::UdpClient(_) => "udp-client",
            Self::ConnectFlood(_) => "connect-flood",
            Self::FirstMoment(_) => "first-moment",
            Self::Spoof(_) => "spoof",
            Self::ServiceProxy(_) => "service-proxy",
            Self::HostileClient(_) => "hostile-client",
            Self::HostileServer(_) => "hostile-server",
        }
    }

    /// True when it prints `listening` once clients may come.
    pub fn announces_listening(&self) -> bool {
        roles::is_server(self.name())
    }

    /// Plays the role in this process, to its end.
    pub fn play(self) -> Result<()> {
        match self {
            Self::Pause => loop {
                thread::park();
            },
            Self::TcpServer(role) => tcp_server::play(&role),
            Self::HttpServer(role) => http::play(&role),
            Self::Dial(role) => dial::play(&role),
            Self::Caller(role) => caller::play(&role),
            Self::Load(role) => load::play(&role),
            Self::Hold(role) => hold::play(&role),
            Self::Hammer(role) => hammer::play(role),
            Self::Bulk(role) => bulk::play(&role),
            Self::MeasureServer(role) => measure::serve(&role),
            Self::Measure(role) => measure::play(&role),
            Self::UdpServer(role) => udp::serve(&role),
            Self::UdpFlood(role) => udp::flood(&role),
            Self::UdpClient(role) => udp::send(&role),
            Self::ConnectFlood(role) => connect_flood::play(&role),
            Self::FirstMoment(role) => first_moment::play(&role),
            Self::Spoof(role) => spoof::play(&role),
            Self::ServiceProxy(role) => service_proxy::play(&role),
            Self::HostileClient(role) => hostile::client(role),
            Self::HostileServer(role) => hostile::server(role),
        }
    }
}

/// The unspecified IPv6 address with a port: listens for both families.
pub fn any(port: u16) -> SocketAddr {
    (Ipv6Addr::UNSPECIFIED, port).into()
}

/// Prints one record.
fn emit(event: &str, record: &impl Serialize) {
    let mut value =
        serde_json::to_value(record).unwrap_or_else(|e| json!({"error": e.to_string()}));
    value["event"] = json!(event);
    let mut out = std::io::stdout().lock();
    // A reader that has gone (a lab that was left up) is no reason to end.
    let _ = writeln!(out, "{value}");
    let _ = out.flush();
}

/// Becomes true when standard input closes.
fn told_to_stop() -> Arc<AtomicBool> {
    let flag = Arc::new(AtomicBool::new(false));
    let setter = Arc::clone(&flag);
    thread::spawn(move || {
        for line in std::io::stdin().lock().lines() {
            if line.is_err() {
                break;
            }
        }
        setter.store(true, Ordering::Relaxed);
    });
    flag
}

/// Calls `report` for each line `report` on standard input.
fn report_when_asked(report: impl Fn() + Send + 'static) {
    thread::spawn(move || {
        for line in std::io::stdin().lock().lines().map_while(Result::ok) {
            if line.trim() == "report" {
                report();
            }
        }
    });
}

/// Microseconds since 1970, comparable between processes of one machine.
pub fn unix_micros() -> u64 {
    let since: Duration = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    since.as_micros() as u64
}
