//! What roles report.

use std::{collections::BTreeMap, net::SocketAddr};

use serde::{Deserialize, Serialize};

/// What a server sees of one connection.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Seen {
    /// The address that accept() gave.
    pub accepted: SocketAddr,
    /// getpeername().
    pub peer: SocketAddr,
    /// getsockname().
    pub local: SocketAddr,
    /// What the client said.
    pub text: String,
    /// Which server this is.
    #[serde(default)]
    pub tag: u32,
    /// Microseconds since 1970.
    #[serde(default)]
    pub at: u64,
}

/// What a measuring client counted.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct MeasureReport {
    /// Requests, connections, or streams that the server took to their end.
    pub done: u64,
    /// Bytes that were sent in bulk.
    pub bytes: u64,
    /// How long it took.
    pub seconds: f64,
    /// Middle of the times of requests or connections, microseconds.
    pub p50_us: u32,
    /// 99th percentile of them, microseconds.
    pub p99_us: u32,
}

/// One call of a caller.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Call {
    /// Microseconds since 1970, before it dialled.
    pub begin: u64,
    /// Microseconds since 1970, when it had its answer or failure.
    pub end: u64,
    /// Whom it dialled.
    pub to: SocketAddr,
    /// As in [`DialReport::outcome`].
    pub outcome: String,
    /// getsockname() after connect.
    pub local: Option<SocketAddr>,
    /// Which server answered.
    pub tag: Option<u32>,
}

/// What came of a dial. `outcome` is `answered`, or `<step>:<error>` such as
/// `connect:ECONNREFUSED`, `read:ECONNRESET`, `read:EOF`, `read:ETIMEDOUT`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct DialReport {
    /// `answered` or what failed.
    pub outcome: String,
    /// Until connect() returned.
    pub connect_us: u64,
    /// Until the answer or the failure.
    pub total_us: u64,
    /// getpeername() after connect.
    pub peer: Option<SocketAddr>,
    /// getsockname() after connect.
    pub local: Option<SocketAddr>,
    /// The server's view, when it answered.
    pub seen: Option<Seen>,
}

impl DialReport {
    /// True when the server answered.
    pub fn answered(&self) -> bool {
        self.outcome == "answered"
    }

    /// True when connect() itself was refused: ECONNREFUSED or EPERM.
    pub fn refused_at_connect(&self) -> bool {
        matches!(self.outcome.as_str(), "connect:ECONNREFUSED" | "connect:EPERM")
    }

    /// True when it was refused by a reset, at connect or after it; never by a clean end.
    pub fn refused(&self) -> bool {
        self.refused_at_connect() || self.outcome.ends_with(":ECONNRESET")
    }
}

/// A TCP server's counts since its start.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct TcpServerReport {
    /// Connections accepted.
    pub accepted: u64,
    /// Bytes received as hellos, nonces or anything that was not understood.
    pub bytes: u64,
    /// Nonces received.
    pub nonces: u64,
    /// Nonces that were meant for another server or port.
    pub misdirected: u64,
    /// Connections that ended without a byte.
    pub silent: u64,
    /// Connections open now.
    pub open: u64,
}

/// A hammer's counts.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct HammerReport {
    /// Connections tried.
    pub tried: u64,
    /// Normal ones that got their nonce and the right server's tag and port back.
    pub answered: u64,
    /// Answers from another server or port, or with another nonce.
    pub misdirected: u64,
    /// Close-at-once and reset-at-once connections that were opened.
    pub cut: u64,
    /// Explicit source ports that were in use: not a failure.
    pub port_in_use: u64,
    /// Everything else that went wrong: `step:error` → how often.
    pub failures: BTreeMap<String, u64>,
    /// How long it took.
    pub elapsed_ms: u64,
}

/// A load's requests.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct LoadReport {
    /// Outcome → how often.
    pub outcomes: BTreeMap<String, u64>,
    /// When the outcome changed, and to what, in order; the first is the first request.
    pub changes: Vec<Change>,
}

/// A change of a load's outcome.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Change {
    /// Microseconds since 1970, when the request ended.
    pub at: u64,
    /// The new outcome.
    pub outcome: String,
}

impl LoadReport {
    /// Requests in all.
    pub fn total(&self) -> u64 {
        self.outcomes.values().sum()
    }

    /// Requests that were answered with status 200.
    pub fn answered(&self) -> u64 {
        self.outcomes.get("answered").copied().unwrap_or_default()
    }

    /// When the first request after `since` was answered.
    pub fn first_answer_after(&self, since: u64) -> Option<u64> {
        self.changes.iter().find(|c| c.at >= since && c.outcome == "answered").map(|c| c.at)
    }
}

/// One held connection's end.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Closed {
    /// Which.
    pub index: usize,
    /// Microseconds since 1970.
    pub at: u64,
    /// `write:ECONNRESET`, `read:EOF`, …, or `told` when the client was told to stop.
    pub outcome: String,
    /// Bytes echoed before.
    pub echoed: u64,
}

/// All held connections' ends.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct HoldReport {
    /// Connections that were open.
    pub opened: usize,
    /// How each ended.
    pub closed: Vec<Closed>,
}

/// A bulk transfer.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct BulkReport {
    /// `complete`, or `<step>:<error>`.
    pub outcome: String,
    /// Bytes that the client sent.
    pub sent: u64,
    /// Bytes that the client received as data.
    pub received: u64,
    /// What was sent arrived unchanged, as the server says.
    pub up_equal: Option<bool>,
    /// What was received is what the server was to send.
    pub down_equal: Option<bool>,
    /// How long it took.
    pub elapsed_ms: u64,
}

/// A UDP server's counts.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct UdpServerReport {
    /// Datagrams received.
    pub received: u64,
    /// Source address (without port) → datagrams.
    pub sources: BTreeMap<String, u64>,
}

/// A UDP client's counts.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct UdpReport {
    /// Datagrams given to the kernel.
    pub sent: u64,
    /// Answers.
    pub answered: u64,
    /// `connect:…`, `send:…`, `recv:…` → how often.
    pub failures: BTreeMap<String, u64>,
    /// Sources of answers that were not the address dialled.
    pub strangers: Vec<String>,
    /// When the outcome changed, and to what.
    pub changes: Vec<Change>,
}

/// Connections begun as fast as possible.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ConnectFloodReport {
    /// `connect:…`, or `begun` → how often.
    pub outcomes: BTreeMap<String, u64>,
    /// How long it went on, in milliseconds.
    pub took_ms: u64,
}

/// Attempts from a process's first moment on.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct FirstMomentReport {
    /// Microseconds between the process's begin and its first connect().
    pub first_dial_us: u64,
    /// What came of the first attempt.
    pub first_outcome: String,
    /// Outcome → how often.
    pub outcomes: BTreeMap<String, u64>,
    /// Microseconds until the first answer.
    pub answered_us: Option<u64>,
}

/// Forged packets.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct SpoofReport {
    /// Packets that the kernel took.
    pub sent: u32,
    /// `socket:…`, `send:…` → how often.
    pub failures: BTreeMap<String, u64>,
}

/// How far a hostile client got.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct HostileReport {
    /// The last step that worked: ``, `connected`, `handshake`, `request`, `tunnel`.
    pub reached: String,
    /// What ended it: an alert, a reset, a status, an HTTP/2 error.
    pub error: String,
    /// Status of the HTTP answer.
    pub status: Option<u16>,
    /// The application's view through a tunnel that opened.
    pub seen: Option<Seen>,
    /// Negotiated `TLSv1_3`, …
    pub tls_version: Option<String>,
    /// Whether the second handshake was a resumption (`Resume` only).
    pub resumed: Option<bool>,
    /// Session tickets that the server sent (`Resume` only).
    pub tickets: usize,
    /// URI SANs of the server's certificate.
    pub server_ids: Vec<String>,
    /// Bytes that it could send (`Garbage`, `Stall`: connections that were closed by the peer).
    pub amount: u64,
}
