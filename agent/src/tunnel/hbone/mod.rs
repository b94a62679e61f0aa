//! HBONE: one HTTP/2 CONNECT stream a flow, on shared mutual-TLS connections, as a
//! ztunnel speaks and accepts it.
//!
//! [`client`] opens streams, [`server`] accepts them, [`head`] holds what a request or an
//! answer says in its headers. None of them knows who is allowed what.

pub mod client;
pub mod head;
mod keepalive;
pub mod server;
pub mod stream;
#[cfg(test)]
mod tests;

use std::{io, time::Duration};

use bytes::Bytes;
use h2::{RecvStream, SendStream};
use signet_ebpf::abi::Reason;

/// Both ends' limits and windows (reference: what a ztunnel announces).
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// Receive window of a stream, bytes: what one slow reader may hold.
    pub stream_window: u32,
    /// Receive window of a connection, bytes: what all its slow readers may hold.
    pub connection_window: u32,
    /// Largest frame that we accept, bytes.
    pub max_frame: u32,
    /// Header list that we accept, bytes.
    pub header_list: u32,
    /// Streams that a server accepts at once on one connection.
    pub server_streams: u32,
    /// Streams that a client opens at once on one connection, if the server allows them.
    pub client_streams: u32,
    /// Most bytes of one stream that wait to be written to the connection.
    pub send_buffer: usize,
    /// Between a PING's answer and the next PING.
    pub ping_every: Duration,
    /// A PING that is not answered for so long ends the connection.
    pub ping_timeout: Duration,
    /// The HTTP/2 preface must be through by then.
    pub preface_timeout: Duration,
    /// A server ends a connection that carried no stream for so long.
    pub server_idle: Duration,
    /// A client gives a stream up that is not answered by then.
    pub answer_timeout: Duration,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            stream_window: 4 << 20,
            connection_window: 16 << 20,
            max_frame: 1 << 20,
            header_list: 64 << 10,
            server_streams: 200,
            client_streams: 100,
            send_buffer: 1 << 20,
            ping_every: Duration::from_secs(10),
            ping_timeout: Duration::from_secs(20),
            preface_timeout: Duration::from_secs(10),
            server_idle: Duration::from_secs(600),
            answer_timeout: Duration::from_secs(30),
        }
    }
}

/// One flow's stream, after the server's 200.
///
/// Dropping it before both directions have ended resets it.
#[derive(Debug)]
pub struct Stream {
    /// What goes to the peer.
    pub(crate) send: SendStream<Bytes>,
    /// What comes from the peer.
    pub(crate) receive: RecvStream,
}

impl Stream {
    /// Resets the stream: the peer resets its application's connection in turn.
    pub fn reset(mut self) {
        self.send.send_reset(h2::Reason::CANCEL);
    }
}

/// Why a connection ended, other than by being closed in order.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HboneError {
    /// The peer broke HTTP/2, sent GOAWAY with an error, or the byte stream broke.
    #[error("the HTTP/2 connection failed: {0}")]
    Http2(#[from] h2::Error),
    /// The preface and settings did not arrive in time.
    #[error("the peer sent no HTTP/2 preface within {0:?}; is it an HBONE peer?")]
    PrefaceTimeout(Duration),
    /// A PING was not answered.
    #[error("the peer answered no PING within {0:?}; its node or the path to it is gone")]
    PingTimeout(Duration),
    /// Its owner cut it.
    #[error("the connection was cut: its endpoint is gone or the agent stops")]
    Cut,
}

impl HboneError {
    /// The reason in flow records.
    pub fn reason(&self) -> Reason {
        match self {
            Self::Http2(error) => broken(error),
            Self::PrefaceTimeout(_) => Reason::ProtocolError,
            Self::PingTimeout(_) => Reason::PeerUnreachable,
            Self::Cut => Reason::Draining,
        }
    }

    /// A short stable name for counters.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Http2(error) if error.is_io() => "connection_lost",
            Self::Http2(_) => "http2",
            Self::PrefaceTimeout(_) => "preface_timeout",
            Self::PingTimeout(_) => "ping_timeout",
            Self::Cut => "cut",
        }
    }
}

/// The reason that a connection or stream broke for.
fn broken(error: &h2::Error) -> Reason {
    match error.get_io() {
        // TLS below: the server refuses our certificate by an alert, after the client's
        // own handshake has ended.
        Some(error) if error.kind() == io::ErrorKind::InvalidData => Reason::HandshakeFailed,
        Some(_) => Reason::PeerUnreachable,
        // The peer says goodbye.
        None if is_goodbye(error) => Reason::PeerUnreachable,
        None if error.reason() == Some(h2::Reason::REFUSED_STREAM) => Reason::LimitExceeded,
        None => Reason::ProtocolError,
    }
}

/// True when the peer closes the connection in order.
fn is_goodbye(error: &h2::Error) -> bool {
    error.is_go_away() && error.is_remote() && error.reason() == Some(h2::Reason::NO_ERROR)
}

/// An HTTP/2 error as an I/O error, for callers that hold both.
pub(crate) fn io_error(error: h2::Error) -> io::Error {
    match error.is_io() {
        true => error.into_io().unwrap_or_else(|| io::ErrorKind::BrokenPipe.into()),
        false => io::Error::other(error),
    }
}

/// Streams reset by us whose late frames are still expected. Flows of real applications
/// reset in bursts; h2's own bound of 50 would answer each late frame with an error.
const REMEMBERED_RESETS: usize = 4096;
/// For how long late frames of a stream that we reset are expected.
const REMEMBER_RESETS_FOR: Duration = Duration::from_secs(5);
/// Frames on streams long forgotten that a connection survives in its life.
const FORGIVEN_FRAMES: usize = 1 << 16;
/// Streams opened and reset again before we saw them: dials that were given up at once.
const UNSEEN_RESETS: usize = 1024;
