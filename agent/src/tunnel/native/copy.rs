//! Copies a flow over a `signet/1` connection with TCP's own semantics.
//!
//! As over HBONE: a FIN is a FIN, a reset is a reset, bytes wait in the sender's socket. A
//! connection whose flow has ended in order on both sides is given back for the next one.

use std::{
    future::Future,
    io,
    pin::pin,
    sync::atomic::Ordering,
    task::{Context, Poll, ready},
    time::Instant,
};

use signet_ebpf::abi::Reason;
use tokio::{
    io::{AsyncRead, AsyncWrite, Interest},
    net::TcpStream,
};

use super::{
    client, frame,
    link::{Batch, Event, Link, NativeError},
    server,
};
use crate::{
    telemetry::reason,
    tunnel::{
        buffers::{self, Buffer},
        copy::{
            CopyError, Counts, TURN, end_on_close, poll_read_into, poll_write, reset_on_close,
            shutdown_write, socket_error,
        },
    },
};

/// A flow that both sides have agreed on.
#[derive(Debug)]
pub struct Stream<T> {
    pub(super) link: Link<T>,
    /// When the connection was made.
    pub(super) created: Instant,
    /// What the peer has said already.
    pub(super) received: Vec<u8>,
    /// The peer has ended its direction.
    pub(super) peer_ended: bool,
    /// This side has ended its direction.
    pub(super) ended: bool,
}

/// A connection whose flow has ended in order.
#[derive(Debug)]
pub struct Recycled<T> {
    link: Link<T>,
    created: Instant,
}

impl<T> Recycled<T> {
    pub(super) fn new(link: Link<T>, created: Instant) -> Self {
        Self { link, created }
    }

    /// For the next flow that this side asks for.
    pub fn client(self) -> client::Connection<T> {
        client::Connection::recycled(self.link, self.created)
    }

    /// For the next flow that the peer asks for.
    pub fn server(self) -> server::Connection<T> {
        server::Connection::recycled(self.link)
    }
}

impl<T> Stream<T> {
    pub(super) fn of_client(link: Link<T>, created: Instant, ended: bool) -> Self {
        Self { link, created, received: Vec::new(), peer_ended: false, ended }
    }

    pub(super) fn of_server(link: Link<T>, received: Vec<u8>, peer_ended: bool) -> Self {
        Self { link, created: Instant::now(), received, peer_ended, ended: false }
    }
}

/// Copies between an application's socket and a stream until both directions have ended, one
/// side breaks or `stop` says why it must end; then what is open is reset, and the peer is
/// told. Gives the connection back when it may carry another flow.
pub async fn tunnel<T>(
    app: TcpStream,
    stream: Stream<T>,
    counts: &Counts,
    stop: impl Future<Output = Reason>,
) -> Result<Option<Recycled<T>>, CopyError>
where
    T: AsyncRead + AsyncWrite + Unpin,
{
    reset_on_close(&app);
    let Stream { mut link, created, received, peer_ended, ended } = stream;
    let mut stopped = None;
    let result = {
        let mut flow = Flow {
            app: &app,
            link: &mut link,
            up: Up { size: buffers::SMALLEST, end: ended, fin: ended, done: false },
            down: Down {
                first: received,
                buffer: None,
                at: 0,
                filled: 0,
                end: peer_ended,
                done: false,
                failed: None,
            },
            counts,
        };
        // As over HBONE: readiness to read does not tell of a reset while the flow waits for
        // the tunnel.
        let mut broken = pin!(app.ready(Interest::ERROR));
        let mut stop = pin!(stop);
        std::future::poll_fn(|cx| {
            if let Poll::Ready(result) = flow.poll(cx) {
                return Poll::Ready(result);
            }
            if broken.as_mut().poll(cx).is_ready() {
                return Poll::Ready(Err(CopyError::App(socket_error(&app))));
            }
            stop.as_mut().poll(cx).map(|reason| {
                stopped = Some(reason);
                Err(CopyError::Stopped)
            })
        })
        .await
    };
    match result {
        Ok(()) => {
            end_on_close(&app);
            Ok(link.is_between_frames().then_some(Recycled { link, created }))
        }
        Err(error) => {
            if !matches!(error, CopyError::Peer(_)) {
                link.queue_reset(stopped);
                // What does not go at once is not waited for: the connection closes without
                // its end being authenticated, which says the same.
                std::future::poll_fn(|cx| {
                    let _ = link.poll_send(cx);
                    Poll::Ready(())
                })
                .await;
            }
            Err(error)
        }
    }
}

struct Flow<'a, T> {
    app: &'a TcpStream,
    link: &'a mut Link<T>,
    up: Up,
    down: Down,
    counts: &'a Counts,
}

/// Application → tunnel.
struct Up {
    /// Size of the next batch.
    size: usize,
    /// The application has sent its FIN.
    end: bool,
    /// The FIN is queued.
    fin: bool,
    /// The FIN is with the peer's socket.
    done: bool,
}

/// Tunnel → application.
struct Down {
    /// What the peer said before the answer; empty, and without memory, afterwards.
    first: Vec<u8>,
    /// Holds `at..filled` for the application; none while nothing moves.
    buffer: Option<Buffer>,
    at: usize,
    filled: usize,
    /// The peer has ended its direction.
    end: bool,
    /// The FIN is handed to the application.
    done: bool,
    /// What ended the stream after the bytes that are held.
    failed: Option<NativeError>,
}

impl<T: AsyncRead + AsyncWrite + Unpin> Flow<'_, T> {
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), CopyError>> {
        let down = self.poll_down(cx)?;
        if self.down.end && !self.up.done {
            // The peer has ended its direction and asks for nothing before this one has ended:
            // what comes is a reset, or what has no place here.
            if let Poll::Ready(event) = self.link.poll_event(cx) {
                let error = event.map_or_else(|error| error, |event| terminal(&event));
                return Poll::Ready(Err(CopyError::Peer(error.into_io())));
            }
        }
        let up = match self.poll_up(cx) {
            Poll::Ready(Err(CopyError::Peer(error))) => {
                // What came before the break still reaches an application that reads.
                let _ = self.poll_down(cx)?;
                return Poll::Ready(Err(CopyError::Peer(error)));
            }
            up => up?,
        };
        if up.is_ready() && down.is_ready() { Poll::Ready(Ok(())) } else { Poll::Pending }
    }

    fn poll_up(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), CopyError>> {
        let mut turns = 0;
        while !self.up.done {
            ready!(self.link.poll_send(cx)).map_err(CopyError::Peer)?;
            if self.up.fin {
                self.up.done = true;
                break;
            }
            if self.up.end {
                self.link.queue_fin();
                self.up.fin = true;
                continue;
            }
            if turns == TURN {
                cx.waker().wake_by_ref();
                return Poll::Pending;
            }
            turns += 1;
            // The buffer is taken when there is something to read.
            ready!(self.app.poll_read_ready(cx)).map_err(CopyError::App)?;
            let mut batch = Batch::take(self.up.size);
            let room = batch.room();
            let size = room.len().min(frame::LARGEST_DATA);
            let n =
                ready!(poll_read_into(self.app, cx, &mut room[..size])).map_err(CopyError::App)?;
            self.up.size =
                buffers::next_size(self.up.size, if n == size { self.up.size } else { n });
            self.counts.from_app.fetch_add(n as u64, Ordering::Relaxed);
            if n == 0 {
                self.up.end = true;
            } else {
                self.link.queue_batch(batch, n);
            }
        }
        Poll::Ready(Ok(()))
    }

    fn poll_down(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), CopyError>> {
        while self.down.at < self.down.first.len() {
            let n = ready!(poll_write(self.app, cx, &self.down.first[self.down.at..]))
                .map_err(CopyError::App)?;
            self.down.at += n;
            self.counts.to_app.fetch_add(n as u64, Ordering::Relaxed);
        }
        if !self.down.first.is_empty() {
            self.down.first = Vec::new();
            self.down.at = 0;
        }
        let mut turns = 0;
        while !self.down.done {
            if let Some(buffer) = &self.down.buffer {
                while self.down.at < self.down.filled {
                    let n =
                        ready!(poll_write(self.app, cx, &buffer[self.down.at..self.down.filled]))
                            .map_err(CopyError::App)?;
                    self.down.at += n;
                    self.counts.to_app.fetch_add(n as u64, Ordering::Relaxed);
                }
                (self.down.buffer, self.down.at, self.down.filled) = (None, 0, 0);
            }
            if self.down.end {
                shutdown_write(self.app).map_err(CopyError::App)?;
                self.down.done = true;
                break;
            }
            if turns == TURN {
                cx.waker().wake_by_ref();
                return Poll::Pending;
            }
            turns += 1;
            ready!(self.poll_fill(cx)).map_err(|error| CopyError::Peer(error.into_io()))?;
        }
        Poll::Ready(Ok(()))
    }

    /// Takes what has arrived, up to a whole buffer, so that the application gets it in one
    /// write. Ready when there is something, or the end.
    fn poll_fill(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), NativeError>> {
        let down = &mut self.down;
        if let Some(error) = down.failed.take() {
            return Poll::Ready(Err(error));
        }
        loop {
            let step = match self.link.poll_event(cx) {
                Poll::Ready(Ok(Event::Data(length))) => {
                    let buffer = down.buffer.get_or_insert_with(|| Buffer::take(length));
                    if down.filled == buffer.len() {
                        return Poll::Ready(Ok(()));
                    }
                    self.link.poll_data(cx, &mut buffer[down.filled..])
                }
                Poll::Ready(Ok(Event::Fin)) => {
                    down.end = true;
                    return Poll::Ready(Ok(()));
                }
                Poll::Ready(Ok(event)) => Poll::Ready(Err(terminal(&event))),
                Poll::Ready(Err(error)) => Poll::Ready(Err(error)),
                Poll::Pending => Poll::Pending,
            };
            match (step, down.filled > 0) {
                (Poll::Ready(Ok(n)), _) => down.filled += n,
                // What came before it still reaches an application that reads.
                (Poll::Ready(Err(error)), true) => {
                    down.failed = Some(error);
                    return Poll::Ready(Ok(()));
                }
                (Poll::Ready(Err(error)), false) => return Poll::Ready(Err(error)),
                (Poll::Pending, true) => return Poll::Ready(Ok(())),
                (Poll::Pending, false) => {
                    down.buffer = None;
                    return Poll::Pending;
                }
            }
        }
    }
}

/// What an event that is no part of a flow means for it.
pub(super) fn terminal(event: &Event) -> NativeError {
    NativeError::Unexpected(match event {
        Event::Reset(reason) => {
            let text = reason.map_or("reset by the peer's application", reason::name);
            return io::Error::new(io::ErrorKind::ConnectionReset, text).into();
        }
        Event::End => return NativeError::Truncated,
        Event::Open(_) => frame::Kind::Open,
        Event::Data(_) => frame::Kind::Data,
        Event::Fin => frame::Kind::Fin,
        Event::Status(_) => frame::Kind::Status,
        Event::Close => frame::Kind::Close,
    })
}
