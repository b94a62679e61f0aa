//! The server's end of an HBONE connection: reads requests, leaves the answer to others.

use std::future::poll_fn;

use bytes::Bytes;
use h2::{
    RecvStream,
    server::{Builder, SendResponse},
};
use http::{Request, Response};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    time::{sleep, timeout},
};
use tokio_util::sync::CancellationToken;

use super::{
    FORGIVEN_FRAMES, HboneError, REMEMBER_RESETS_FOR, REMEMBERED_RESETS, Settings, Stream,
    UNSEEN_RESETS,
    head::{HeadError, Open, Refusal},
    keepalive::keepalive,
};

/// Longest part of a strange authority that is kept for logs, characters.
const SHOWN_AUTHORITY: usize = 128;

/// A request that waits for its answer. Dropped unanswered, it is reset.
pub struct Incoming {
    /// What it asks for, or why that cannot be.
    pub head: Result<Open, HeadError>,
    /// The authority as it was sent, cut to a length fit for logs.
    pub authority: String,
    answer: SendResponse<Bytes>,
    receive: RecvStream,
}

impl Incoming {
    fn new(request: Request<RecvStream>, answer: SendResponse<Bytes>) -> Self {
        let head = Open::parse(&request);
        let authority = request.uri().authority().map_or("", |a| a.as_str());
        let authority = authority.chars().take(SHOWN_AUTHORITY).collect();
        Self { head, authority, answer, receive: request.into_body() }
    }

    /// Completes when the client has given the flow up or the connection is gone.
    pub async fn abandoned(&mut self) {
        // An error says the same as a reason: there is nobody left to answer.
        let _ = poll_fn(|cx| self.answer.poll_reset(cx)).await;
    }

    /// Answers 200.
    pub fn accept(mut self) -> Result<Stream, h2::Error> {
        let send = self.answer.send_response(Response::new(()), false)?;
        Ok(Stream { send, receive: self.receive })
    }

    /// Answers with a refusal.
    pub fn refuse(mut self, refusal: &Refusal) {
        // An error means that the stream is gone: nobody waits for the answer.
        let _ = self.answer.send_response(refusal.response(), true);
    }

    /// Resets the stream without an answer.
    pub fn reset(mut self) {
        self.answer.send_reset(h2::Reason::CANCEL);
    }
}

/// How a connection's owner ends it.
#[derive(Clone, Debug, Default)]
pub struct Control {
    /// GOAWAY: no new streams; open ones finish.
    pub drain: CancellationToken,
    /// Everything that is open is reset.
    pub cut: CancellationToken,
}

/// Serves a connection until it ends; `on_request` must not block.
pub async fn serve<T>(
    io: T,
    settings: Settings,
    control: Control,
    mut on_request: impl FnMut(Incoming),
) -> Result<(), HboneError>
where
    T: AsyncRead + AsyncWrite + Unpin,
{
    let preface = Builder::new()
        .initial_window_size(settings.stream_window)
        .initial_connection_window_size(settings.connection_window)
        .max_frame_size(settings.max_frame)
        .max_header_list_size(settings.header_list)
        .max_concurrent_streams(settings.server_streams)
        .max_send_buffer_size(settings.send_buffer)
        .max_concurrent_reset_streams(REMEMBERED_RESETS)
        .reset_stream_duration(REMEMBER_RESETS_FOR)
        .max_local_error_reset_streams(Some(FORGIVEN_FRAMES))
        .max_pending_accept_reset_streams(UNSEEN_RESETS)
        .handshake::<_, Bytes>(io);
    let mut connection = tokio::select! {
        () = control.cut.cancelled() => return Err(HboneError::Cut),
        done = timeout(settings.preface_timeout, preface) => match done {
            Ok(connection) => connection?,
            Err(_) => return Err(HboneError::PrefaceTimeout(settings.preface_timeout)),
        },
    };
    let ping = keepalive(connection.ping_pong(), settings);
    tokio::pin!(ping);
    let mut draining = false;
    loop {
        tokio::select! {
            () = control.cut.cancelled() => return Err(HboneError::Cut),
            () = control.drain.cancelled(), if !draining => {
                draining = true;
                connection.graceful_shutdown();
            }
            dead = &mut ping => return Err(dead),
            () = sleep(settings.server_idle), if !draining => {
                // Streams that live longer than this without a new one beside them are
                // no idleness.
                if !connection.has_streams() {
                    draining = true;
                    connection.graceful_shutdown();
                }
            }
            request = connection.accept() => match request {
                None => return Ok(()),
                Some(request) => {
                    let (request, answer) = request?;
                    on_request(Incoming::new(request, answer));
                }
            },
        }
    }
}
