//! The client's end: asks for one flow at a time.

use std::{
    task::{Context, Poll, Waker},
    time::{Duration, Instant},
};

use signet_ebpf::abi::Reason;
use tokio::{
    io::{AsyncRead, AsyncWrite, Interest},
    net::TcpStream,
    time::timeout,
};

use super::{
    copy::Stream,
    frame::{Kind, Open, Status},
    link::{Event, Link, NativeError},
};
use crate::tunnel::{
    buffers::{Buffer, SMALLEST},
    copy::try_read_into,
    hbone::head::Refusal,
};

/// Bytes that the application may have said before the answer, which are kept to be said
/// again on another connection.
pub const EARLY: usize = 64 << 10;
/// On a connection that has been idle for longer, the flow's first bytes wait for the answer:
/// its server may be gone without a word, and then the flow can still be asked for elsewhere.
const FRESH: Duration = Duration::from_secs(1);

/// A connection on which no flow is open.
#[derive(Debug)]
pub struct Connection<T> {
    link: Link<T>,
    created: Instant,
    since: Instant,
}

/// What the application has said before the answer, at most [`EARLY`] bytes.
#[derive(Debug, Default)]
pub struct Early {
    /// Its bytes.
    pub bytes: Vec<u8>,
    /// It has ended its direction.
    pub end: bool,
}

impl Early {
    /// Reads what is there without waiting. False when the application has said nothing new.
    fn read(&mut self, app: &TcpStream) -> std::io::Result<bool> {
        let before = (self.bytes.len(), self.end);
        while self.bytes.len() < EARLY && !self.end {
            let mut part = Buffer::take(SMALLEST);
            let room = (EARLY - self.bytes.len()).min(part.len());
            match try_read_into(app, &mut part[..room])? {
                Some(0) => self.end = true,
                Some(n) => {
                    self.bytes.extend_from_slice(&part[..n]);
                    if n < room {
                        break;
                    }
                }
                None => break,
            }
        }
        Ok((self.bytes.len(), self.end) != before)
    }
}

/// Why a flow was not opened.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OpenError {
    /// The server refuses.
    #[error("the peer refused the flow ({:?})", .0.reason)]
    Refused(Refusal),
    /// No answer in time.
    #[error("the peer did not answer within {0:?}")]
    Unanswered(Duration),
    /// The server has said that it serves nothing more on this connection.
    #[error("the peer closed the connection before it took the request")]
    Closed,
    /// The connection broke before the answer.
    #[error("the tunnel broke before the answer: {error}")]
    Broken {
        /// How.
        error: NativeError,
        /// Bytes of the application were on their way.
        said: bool,
    },
    /// The application's own connection failed.
    #[error("the application's connection failed: {0}")]
    App(std::io::Error),
}

impl OpenError {
    /// The reason in flow records.
    pub fn reason(&self) -> Reason {
        match self {
            Self::Refused(refusal) => refusal.reason,
            Self::Unanswered(_) | Self::Closed => Reason::PeerUnreachable,
            Self::Broken { error, .. } => error.reason(),
            Self::App(_) => Reason::Internal,
        }
    }

    /// True when the connection, not the request, is at fault, and no byte of the application
    /// can have been delivered: another connection may do.
    pub fn is_connections_fault(&self) -> bool {
        match self {
            Self::Closed => true,
            Self::Broken { error: NativeError::Io(_) | NativeError::Truncated, said } => !said,
            _ => false,
        }
    }
}

impl<T> Connection<T> {
    /// A connection over an authenticated byte stream that nothing was sent on.
    pub fn new(io: T) -> Self {
        let now = Instant::now();
        Self { link: Link::new(io), created: now, since: now }
    }

    pub(super) fn recycled(link: Link<T>, created: Instant) -> Self {
        Self { link, created, since: Instant::now() }
    }

    /// When it was established.
    pub fn created(&self) -> Instant {
        self.created
    }

    /// For how long it has carried nothing.
    pub fn idle(&self) -> Duration {
        self.since.elapsed()
    }
}

impl<T: AsyncRead + AsyncWrite + Unpin> Connection<T> {
    /// True when the peer has said nothing since the last flow: it has not closed the
    /// connection and it did not break.
    pub fn is_quiet(&mut self) -> bool {
        self.link.poll_event(&mut Context::from_waker(Waker::noop())).is_pending()
    }

    /// Asks for a flow and waits for the answer; what the application says meanwhile goes with
    /// the request. Dropping the future gives the flow up and closes the connection.
    ///
    /// After a refusal the connection may serve another flow: it comes back beside the error.
    pub async fn open(
        self,
        open: &Open,
        app: &TcpStream,
        early: &mut Early,
        within: Duration,
    ) -> (Result<Stream<T>, OpenError>, Option<Self>) {
        let Self { mut link, created, since } = self;
        let speaks = since.elapsed() < FRESH;
        link.queue(|out| open.encode(out));
        let mut said = false;
        let asked = ask(&mut link, app, early, speaks, &mut said);
        match timeout(within, asked).await {
            Err(_) => (Err(OpenError::Unanswered(within)), None),
            Ok(Err(error)) => (Err(error), None),
            Ok(Ok(Status::Accepted)) => {
                if !speaks {
                    link.queue_data(&early.bytes);
                    if early.end {
                        link.queue_fin();
                    }
                }
                (Ok(Stream::of_client(link, created, early.end)), None)
            }
            Ok(Ok(Status::Refused { reason, policy })) => {
                let refusal = Refusal::new(reason).with_policy(policy);
                let ended = said && early.end;
                (Err(OpenError::Refused(refusal)), end(link, created, ended).await)
            }
        }
    }
}

/// Ends the client's direction of a refused flow: the connection is as new.
async fn end<T>(mut link: Link<T>, created: Instant, ended: bool) -> Option<Connection<T>>
where
    T: AsyncRead + AsyncWrite + Unpin,
{
    if !ended {
        link.queue_fin();
    }
    // It would be the next flow's affair to wait for a peer that takes nothing.
    let sent = std::future::poll_fn(|cx| Poll::Ready(link.poll_send(cx))).await;
    (matches!(sent, Poll::Ready(Ok(()))) && link.is_between_frames())
        .then(|| Connection::recycled(link, created))
}

/// Sends the request, with what the application says while the answer is awaited.
async fn ask<T>(
    link: &mut Link<T>,
    app: &TcpStream,
    early: &mut Early,
    speaks: bool,
    said: &mut bool,
) -> Result<Status, OpenError>
where
    T: AsyncRead + AsyncWrite + Unpin,
{
    if speaks {
        // What another connection was told already, and what has come since.
        early.read(app).map_err(OpenError::App)?;
        link.queue_data(&early.bytes);
        *said = !early.bytes.is_empty() || early.end;
        if early.end {
            link.queue_fin();
        }
    }
    loop {
        let sent = early.bytes.len();
        let more = speaks && !early.end && sent < EARLY;
        let answer = std::future::poll_fn(|cx| {
            if let Poll::Ready(Err(error)) = link.poll_send(cx) {
                // The peer's last words, if there are any, say why.
                if let Poll::Ready(event) = link.poll_event(cx) {
                    return Poll::Ready(event);
                }
                return Poll::Ready(Err(error.into()));
            }
            link.poll_event(cx)
        });
        let event = tokio::select! {
            biased;
            event = answer => event,
            ready = app.ready(Interest::READABLE), if more => {
                ready.map_err(OpenError::App)?;
                if early.read(app).map_err(OpenError::App)? {
                    *said = true;
                    link.queue_data(&early.bytes[sent..]);
                    if early.end {
                        link.queue_fin();
                    }
                }
                continue;
            }
        };
        let broken = |error| OpenError::Broken { error, said: *said };
        return match event.map_err(broken)? {
            Event::Status(status) => Ok(status),
            // A reset is of the flow before, which had ended here: the server's application did
            // not take its last bytes. A server resets no flow that it has not answered.
            Event::Close | Event::Reset(_) => Err(OpenError::Closed),
            Event::End => Err(broken(NativeError::Truncated)),
            Event::Data(_) => Err(broken(NativeError::Unexpected(Kind::Data))),
            Event::Open(_) => Err(broken(NativeError::Unexpected(Kind::Open))),
            Event::Fin => Err(broken(NativeError::Unexpected(Kind::Fin))),
        };
    }
}
