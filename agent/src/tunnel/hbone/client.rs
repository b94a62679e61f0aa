//! The client's end of an HBONE connection: opens one CONNECT stream a flow.

use std::{
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use bytes::Bytes;
use h2::client::{Builder, Connection, SendRequest};
use http::StatusCode;
use signet_ebpf::abi::Reason;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    time::timeout,
};
use tokio_util::sync::CancellationToken;

use super::{
    FORGIVEN_FRAMES, HboneError, REMEMBER_RESETS_FOR, REMEMBERED_RESETS, Settings, Stream,
    UNSEEN_RESETS, broken,
    head::{Open, Refusal},
    is_goodbye,
    keepalive::keepalive,
};

/// A connection that flows share. Cheap to clone; when the last clone and the last
/// stream are gone the connection says goodbye and closes.
#[derive(Clone)]
pub struct Client {
    send: SendRequest<Bytes>,
    state: Arc<State>,
    settings: Settings,
}

/// What every clone, and every stream's permit, shares.
#[derive(Debug)]
struct State {
    created: Instant,
    streams: AtomicUsize,
    /// Milliseconds after `created` when the last stream ended.
    idle_since: AtomicU64,
    closed: AtomicBool,
    /// Takes no new stream: the peer has said goodbye, or it broke.
    retired: AtomicBool,
    /// Why this side ended the connection, if it did.
    ended: OnceLock<Reason>,
}

/// The right to one stream, held while its flow lives.
#[derive(Debug)]
pub struct Permit(Arc<State>);

impl Permit {
    /// Why this side ended the whole connection, if it did.
    pub fn ended_by(&self) -> Option<Reason> {
        self.0.ended.get().copied()
    }
}

/// Says why a connection is ended, to those whose flows it carries.
#[derive(Clone, Debug)]
pub struct Ender(Arc<State>);

impl Ender {
    /// To be called before the connection's driver is dropped; the first reason counts.
    pub fn end(&self, reason: Reason) {
        self.0.retired.store(true, Ordering::Release);
        let _ = self.0.ended.set(reason);
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        let since = u64::try_from(self.0.created.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.0.idle_since.store(since, Ordering::Relaxed);
        self.0.streams.fetch_sub(1, Ordering::AcqRel);
    }
}

/// What moves the connection's bytes; must be run for the connection to live.
pub struct Driver<T> {
    connection: Connection<T, Bytes>,
    state: Arc<State>,
    settings: Settings,
}

/// Why a stream could not be opened.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OpenError {
    /// The server's answer was not 200.
    #[error("the peer refused the flow with {} ({:?})", .0.status, .0.reason)]
    Refused(Refusal),
    /// No answer in time.
    #[error("the peer did not answer the CONNECT within {0:?}")]
    Unanswered(Duration),
    /// The connection or the stream broke before the answer.
    #[error("the tunnel broke before the answer: {0}")]
    Broken(#[source] h2::Error),
    /// The request could not be written as HTTP: a bug.
    #[error("the CONNECT cannot be encoded: {0}")]
    Unencodable(#[from] http::Error),
}

impl OpenError {
    /// The reason in flow records.
    pub fn reason(&self) -> Reason {
        match self {
            Self::Refused(refusal) => refusal.reason,
            Self::Unanswered(_) => Reason::PeerUnreachable,
            Self::Broken(error) => broken(error),
            Self::Unencodable(_) => Reason::Internal,
        }
    }

    /// True when the connection, not the request, is at fault: another one may do. No
    /// byte of the application has been sent, so asking twice is safe.
    pub fn is_connections_fault(&self) -> bool {
        match self {
            Self::Broken(error) => {
                error.is_io()
                    || is_goodbye(error)
                    || error.reason() == Some(h2::Reason::REFUSED_STREAM)
            }
            _ => false,
        }
    }
}

/// Speaks the preface over an authenticated byte stream.
pub async fn handshake<T>(io: T, settings: Settings) -> Result<(Client, Driver<T>), HboneError>
where
    T: AsyncRead + AsyncWrite + Unpin,
{
    let preface = Builder::new()
        .initial_window_size(settings.stream_window)
        .initial_connection_window_size(settings.connection_window)
        .max_frame_size(settings.max_frame)
        .max_header_list_size(settings.header_list)
        .initial_max_send_streams(settings.client_streams as usize)
        .max_send_buffer_size(settings.send_buffer)
        .max_concurrent_reset_streams(REMEMBERED_RESETS)
        .reset_stream_duration(REMEMBER_RESETS_FOR)
        .max_local_error_reset_streams(Some(FORGIVEN_FRAMES))
        .max_pending_accept_reset_streams(UNSEEN_RESETS)
        .enable_push(false)
        .handshake::<_, Bytes>(io);
    let (send, connection) = match timeout(settings.preface_timeout, preface).await {
        Ok(done) => done?,
        Err(_) => return Err(HboneError::PrefaceTimeout(settings.preface_timeout)),
    };
    let state = Arc::new(State {
        created: Instant::now(),
        streams: AtomicUsize::new(0),
        idle_since: AtomicU64::new(0),
        closed: AtomicBool::new(false),
        retired: AtomicBool::new(false),
        ended: OnceLock::new(),
    });
    let client = Client { send, state: state.clone(), settings };
    Ok((client, Driver { connection, state, settings }))
}

impl<T> Driver<T>
where
    T: AsyncRead + AsyncWrite + Unpin,
{
    /// Runs until the connection ends, is dead, or `cut`, which resets what is open.
    pub async fn run(mut self, cut: CancellationToken) -> Result<(), HboneError> {
        let ping_pong = self.connection.ping_pong();
        let result = tokio::select! {
            ended = &mut self.connection => ended.map_err(HboneError::Http2),
            dead = keepalive(ping_pong, self.settings) => Err(dead),
            () = cut.cancelled() => Err(HboneError::Cut),
        };
        self.state.closed.store(true, Ordering::Release);
        result
    }
}

impl<T> Drop for Driver<T> {
    fn drop(&mut self) {
        // Also when the driver was never run, or its task was aborted.
        self.state.closed.store(true, Ordering::Release);
    }
}

impl Client {
    /// Reserves a stream; `None` when the connection is full, retired or gone.
    pub fn reserve(&self) -> Option<Permit> {
        if self.is_retired() {
            return None;
        }
        let limit =
            (self.settings.client_streams as usize).min(self.send.current_max_send_streams());
        self.state
            .streams
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, |n| (n < limit).then_some(n + 1))
            .ok()?;
        Some(Permit(self.state.clone()))
    }

    /// True once the connection's driver has ended.
    pub fn is_closed(&self) -> bool {
        self.state.closed.load(Ordering::Acquire)
    }

    /// Gives out no stream any more; those that are open go on. For a connection whose
    /// peer refuses new ones (its GOAWAY) while old ones keep it alive.
    pub fn retire(&self) {
        self.state.retired.store(true, Ordering::Release);
    }

    /// For whoever may end the connection.
    pub fn ender(&self) -> Ender {
        Ender(self.state.clone())
    }

    /// True when it gives out no stream any more.
    pub fn is_retired(&self) -> bool {
        self.is_closed() || self.state.retired.load(Ordering::Acquire)
    }

    /// Streams reserved or open.
    pub fn streams(&self) -> usize {
        self.state.streams.load(Ordering::Acquire)
    }

    /// For how long it has carried nothing; zero while it carries something.
    pub fn idle(&self) -> Duration {
        if self.streams() > 0 {
            return Duration::ZERO;
        }
        let since = Duration::from_millis(self.state.idle_since.load(Ordering::Relaxed));
        self.state.created.elapsed().saturating_sub(since)
    }

    /// When it was established.
    pub fn created(&self) -> Instant {
        self.state.created
    }

    /// Asks for a flow and waits for the answer. Dropping the future gives the dial up
    /// and resets the stream. The caller holds the stream's [`Permit`].
    pub async fn open(&self, open: &Open) -> Result<Stream, OpenError> {
        let request = open.request()?;
        let asked = async {
            let mut send = self.send.clone().ready().await.map_err(OpenError::Broken)?;
            let (answer, stream) = send.send_request(request, false).map_err(OpenError::Broken)?;
            drop(send);
            let answer = answer.await.map_err(OpenError::Broken)?;
            if answer.status() != StatusCode::OK {
                return Err(OpenError::Refused(Refusal::parse(&answer)));
            }
            Ok(Stream { send: stream, receive: answer.into_body() })
        };
        match timeout(self.settings.answer_timeout, asked).await {
            Ok(result) => result,
            Err(_) => Err(OpenError::Unanswered(self.settings.answer_timeout)),
        }
    }
}
