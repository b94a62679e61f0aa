//! Copies a flow both ways with TCP's own semantics.
//!
//! A FIN on one side becomes a FIN on the other and leaves the other direction alone; a
//! reset or an error on one side becomes a reset on the other, never a clean end. Bytes
//! wait in the sender's socket, not here: a direction holds at most one batch, and a batch
//! is read only when the other side takes bytes. Buffers grow only while reads fill them
//! and exist only while bytes move.

use std::{
    future::Future,
    io,
    net::Shutdown,
    pin::pin,
    sync::atomic::{AtomicU64, Ordering},
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::{Buf, Bytes};
use h2::{RecvStream, SendStream};
use rustix::{buffer::spare_capacity, io::Errno, net::RecvFlags};
use socket2::SockRef;
use tokio::{io::Interest, net::TcpStream};

use super::hbone::{self, Stream};

/// Size of a direction's first batch, bytes.
const FIRST_BATCH: usize = 4 << 10;
/// Size that a batch grows to while reads fill it, bytes.
const LARGEST_BATCH: usize = 256 << 10;
/// Batches after which a busy direction lets other flows of its core run.
pub(super) const TURN: usize = 4;

/// Bytes that a flow has carried so far; read by others while it lives.
#[derive(Debug, Default)]
pub struct Counts {
    /// Bytes read from the application (or, direct, from the client).
    pub from_app: AtomicU64,
    /// Bytes written to the application.
    pub to_app: AtomicU64,
}

/// Why a flow did not end with both FINs. What was open is, or is to be, reset.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CopyError {
    /// The application's connection was reset or failed.
    #[error("the application's connection failed: {0}")]
    App(#[source] io::Error),
    /// The tunnel's stream (or, direct, the server's connection) was reset or failed.
    #[error("the tunnel's stream failed: {0}")]
    Peer(#[source] io::Error),
    /// Its owner ended it.
    #[error("the flow was ended by its owner")]
    Stopped,
}

impl CopyError {
    /// Who broke the flow, for its record.
    pub fn broken_by(&self) -> &'static str {
        match self {
            Self::App(_) => "application",
            Self::Peer(_) => "peer",
            Self::Stopped => "agent",
        }
    }
}

/// Makes the close of `socket` a reset, also the one that the kernel does when the process
/// is killed: an application must never take a cut flow for one that has ended.
pub fn reset_on_close(socket: &TcpStream) {
    // Fails only on a socket that is gone already.
    let _ = SockRef::from(socket).set_linger(Some(Duration::ZERO));
}

/// The flow has ended in order on both sides: what is still to be sent goes out first.
pub(crate) fn end_on_close(socket: &TcpStream) {
    // As above.
    let _ = SockRef::from(socket).set_linger(None);
}

/// Copies between an application's socket and a tunnel stream until both directions have
/// ended, one side breaks or `stop` completes; then what is open is reset.
pub async fn tunnel(
    app: TcpStream,
    stream: Stream,
    counts: &Counts,
    stop: impl Future<Output = ()>,
) -> Result<(), CopyError> {
    tunnel_after(app, stream, Bytes::new(), false, counts, stop).await
}

/// As [`tunnel`], where `said` was read from the application already and, if `ended`, its FIN.
pub async fn tunnel_after(
    app: TcpStream,
    mut stream: Stream,
    said: Bytes,
    ended: bool,
    counts: &Counts,
    stop: impl Future<Output = ()>,
) -> Result<(), CopyError> {
    reset_on_close(&app);
    let result = {
        let mut flow = TunnelFlow {
            app: &app,
            send: &mut stream.send,
            receive: &mut stream.receive,
            up: Up { batch: FIRST_BATCH, pending: said, end: ended, done: false },
            down: Down { pending: Bytes::new(), taken: 0, end: false, done: false },
            counts,
        };
        // A reset by the application sets the socket's error; readiness to read does not
        // tell when the flow waits for the tunnel and leaves the application's bytes alone.
        let mut broken = pin!(app.ready(Interest::ERROR));
        let mut stop = pin!(stop);
        std::future::poll_fn(|cx| {
            if let Poll::Ready(result) = flow.poll(cx) {
                return Poll::Ready(result);
            }
            if broken.as_mut().poll(cx).is_ready() {
                return Poll::Ready(Err(CopyError::App(socket_error(&app))));
            }
            stop.as_mut().poll(cx).map(|()| Err(CopyError::Stopped))
        })
        .await
    };
    match &result {
        Ok(()) => end_on_close(&app),
        Err(_) => stream.reset(),
    }
    result
}

/// The error that a socket is in.
pub(crate) fn socket_error(socket: &TcpStream) -> io::Error {
    match socket.take_error() {
        Ok(Some(error)) | Err(error) => error,
        Ok(None) => io::ErrorKind::ConnectionReset.into(),
    }
}

struct TunnelFlow<'a> {
    app: &'a TcpStream,
    send: &'a mut SendStream<Bytes>,
    receive: &'a mut RecvStream,
    up: Up,
    down: Down,
    counts: &'a Counts,
}

/// Application → tunnel.
struct Up {
    /// Size of the next batch.
    batch: usize,
    /// Read from the application, not yet taken by the tunnel.
    pending: Bytes,
    /// The application has sent its FIN.
    end: bool,
    /// The FIN is handed to the tunnel.
    done: bool,
}

/// Tunnel → application.
struct Down {
    /// Received, not yet taken by the application.
    pending: Bytes,
    /// Bytes of `pending`'s window that are to be given back once it is empty.
    taken: usize,
    /// The peer has ended its direction.
    end: bool,
    /// The FIN is handed to the application.
    done: bool,
}

impl TunnelFlow<'_> {
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), CopyError>> {
        let down = self.poll_down(cx, TURN)?;
        match self.send.poll_reset(cx) {
            // The peer has said everything and wants to hear no more: no fault.
            Poll::Ready(Ok(h2::Reason::NO_ERROR)) => {
                self.up.done = true;
                self.up.pending = Bytes::new();
            }
            Poll::Ready(reset) => {
                // What came before the reset still reaches an application that reads, as
                // it would from a socket; one that does not read delays nothing.
                let _ = self.poll_down(cx, usize::MAX)?;
                return Poll::Ready(Err(match reset {
                    Ok(reason) => CopyError::Peer(io::Error::new(
                        io::ErrorKind::ConnectionReset,
                        reason.to_string(),
                    )),
                    Err(error) => tunnel_error(error),
                }));
            }
            Poll::Pending => {}
        }
        let up = self.poll_up(cx)?;
        if up.is_ready() && down.is_ready() { Poll::Ready(Ok(())) } else { Poll::Pending }
    }

    fn poll_up(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), CopyError>> {
        let mut turns = 0;
        while !self.up.done {
            while !self.up.pending.is_empty() {
                self.send.reserve_capacity(self.up.pending.len());
                let mut capacity = self.send.capacity();
                if capacity == 0 {
                    capacity = match ready!(self.send.poll_capacity(cx)) {
                        Some(Ok(capacity)) => capacity,
                        Some(Err(error)) => return Poll::Ready(Err(tunnel_error(error))),
                        None => {
                            let error = io::ErrorKind::BrokenPipe.into();
                            return Poll::Ready(Err(CopyError::Peer(error)));
                        }
                    };
                }
                let part = self.up.pending.split_to(capacity.min(self.up.pending.len()));
                self.send.send_data(part, false).map_err(tunnel_error)?;
            }
            if self.up.end {
                self.send.send_data(Bytes::new(), true).map_err(tunnel_error)?;
                self.up.done = true;
                break;
            }
            if turns == TURN {
                cx.waker().wake_by_ref();
                return Poll::Pending;
            }
            turns += 1;
            let bytes =
                ready!(poll_read(self.app, cx, &mut self.up.batch)).map_err(CopyError::App)?;
            self.counts.from_app.fetch_add(bytes.len() as u64, Ordering::Relaxed);
            self.up.end = bytes.is_empty();
            self.up.pending = bytes;
        }
        Poll::Ready(Ok(()))
    }

    fn poll_down(
        &mut self,
        cx: &mut Context<'_>,
        most_turns: usize,
    ) -> Poll<Result<(), CopyError>> {
        let mut turns = 0;
        while !self.down.done {
            while !self.down.pending.is_empty() {
                let n =
                    ready!(poll_write(self.app, cx, &self.down.pending)).map_err(CopyError::App)?;
                self.down.pending.advance(n);
                self.counts.to_app.fetch_add(n as u64, Ordering::Relaxed);
            }
            if self.down.taken > 0 {
                // Only now may the peer send as much again.
                let taken = std::mem::take(&mut self.down.taken);
                self.receive.flow_control().release_capacity(taken).map_err(tunnel_error)?;
            }
            if self.down.end {
                shutdown_write(self.app).map_err(CopyError::App)?;
                self.down.done = true;
                break;
            }
            if turns == most_turns {
                cx.waker().wake_by_ref();
                return Poll::Pending;
            }
            turns += 1;
            match ready!(self.receive.poll_data(cx)) {
                Some(Ok(bytes)) => {
                    self.down.taken = bytes.len();
                    self.down.pending = bytes;
                }
                Some(Err(error)) => return Poll::Ready(Err(tunnel_error(error))),
                None => self.down.end = true,
            }
        }
        Poll::Ready(Ok(()))
    }
}

fn tunnel_error(error: h2::Error) -> CopyError {
    CopyError::Peer(hbone::io_error(error))
}

/// Copies between two sockets (a flow that goes direct) until both directions have
/// ended, one side breaks or `stop` completes; then both are reset.
pub async fn direct(
    client: TcpStream,
    server: TcpStream,
    counts: &Counts,
    stop: impl Future<Output = ()>,
) -> Result<(), CopyError> {
    reset_on_close(&client);
    reset_on_close(&server);
    let result = {
        let mut up = Relay::new(&client, &server, &counts.from_app);
        let mut down = Relay::new(&server, &client, &counts.to_app);
        let mut client_broken = pin!(client.ready(Interest::ERROR));
        let mut server_broken = pin!(server.ready(Interest::ERROR));
        let mut stop = pin!(stop);
        std::future::poll_fn(|cx| {
            let sent = up.poll(cx).map_err(|e| e.of(CopyError::App, CopyError::Peer))?;
            let received = down.poll(cx).map_err(|e| e.of(CopyError::Peer, CopyError::App))?;
            if sent.is_ready() && received.is_ready() {
                return Poll::Ready(Ok(()));
            }
            if client_broken.as_mut().poll(cx).is_ready() {
                return Poll::Ready(Err(CopyError::App(socket_error(&client))));
            }
            if server_broken.as_mut().poll(cx).is_ready() {
                return Poll::Ready(Err(CopyError::Peer(socket_error(&server))));
            }
            stop.as_mut().poll(cx).map(|()| Err(CopyError::Stopped))
        })
        .await
    };
    if result.is_ok() {
        end_on_close(&client);
        end_on_close(&server);
    }
    result
}

/// One direction between two sockets.
struct Relay<'a> {
    from: &'a TcpStream,
    to: &'a TcpStream,
    count: &'a AtomicU64,
    batch: usize,
    pending: Bytes,
    end: bool,
    done: bool,
}

/// Which socket of a [`Relay`] broke.
enum RelayError {
    From(io::Error),
    To(io::Error),
}

impl RelayError {
    fn of(
        self,
        from: impl FnOnce(io::Error) -> CopyError,
        to: impl FnOnce(io::Error) -> CopyError,
    ) -> CopyError {
        match self {
            Self::From(error) => from(error),
            Self::To(error) => to(error),
        }
    }
}

impl<'a> Relay<'a> {
    fn new(from: &'a TcpStream, to: &'a TcpStream, count: &'a AtomicU64) -> Self {
        Self { from, to, count, batch: FIRST_BATCH, pending: Bytes::new(), end: false, done: false }
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), RelayError>> {
        let mut turns = 0;
        while !self.done {
            while !self.pending.is_empty() {
                let n = ready!(poll_write(self.to, cx, &self.pending)).map_err(RelayError::To)?;
                self.pending.advance(n);
                self.count.fetch_add(n as u64, Ordering::Relaxed);
            }
            if self.end {
                shutdown_write(self.to).map_err(RelayError::To)?;
                self.done = true;
                break;
            }
            if turns == TURN {
                cx.waker().wake_by_ref();
                return Poll::Pending;
            }
            turns += 1;
            let bytes =
                ready!(poll_read(self.from, cx, &mut self.batch)).map_err(RelayError::From)?;
            self.end = bytes.is_empty();
            self.pending = bytes;
        }
        Poll::Ready(Ok(()))
    }
}

/// Reads a batch into a buffer of its own; empty at the end of the stream.
fn poll_read(
    socket: &TcpStream,
    cx: &mut Context<'_>,
    batch: &mut usize,
) -> Poll<io::Result<Bytes>> {
    let mut buffer = Vec::new();
    loop {
        ready!(socket.poll_read_ready(cx))?;
        buffer.reserve_exact(*batch);
        let size = buffer.capacity();
        let mut end = false;
        let result = socket.try_io(Interest::READABLE, || {
            match rustix::net::recv(socket, spare_capacity(&mut buffer), RecvFlags::empty()) {
                Ok((_, 0)) => {
                    end = true;
                    Ok(())
                }
                // A short read has emptied the socket: clear its readiness, which saves
                // the read that would only say so. A FIN stays visible as "read closed".
                Ok((_, n)) if n < size => Err(io::ErrorKind::WouldBlock.into()),
                Ok(_) => Ok(()),
                Err(Errno::INTR) => Ok(()),
                Err(error) => Err(error.into()),
            }
        });
        match result {
            Err(error) if error.kind() != io::ErrorKind::WouldBlock => {
                return Poll::Ready(Err(error));
            }
            _ => {}
        }
        if end {
            return Poll::Ready(Ok(Bytes::new()));
        }
        if !buffer.is_empty() {
            if buffer.len() == size {
                *batch = (*batch * 4).min(LARGEST_BATCH);
            } else if buffer.len() < *batch / 4 {
                *batch = (*batch / 2).max(FIRST_BATCH);
            }
            return Poll::Ready(Ok(Bytes::from(buffer)));
        }
    }
}

/// Reads into a buffer that is there already; zero at the end of the stream.
pub(super) fn poll_read_into(
    socket: &TcpStream,
    cx: &mut Context<'_>,
    buffer: &mut [u8],
) -> Poll<io::Result<usize>> {
    loop {
        ready!(socket.poll_read_ready(cx))?;
        if let Some(n) = try_read_into(socket, buffer)? {
            return Poll::Ready(Ok(n));
        }
    }
}

/// Reads what is there; zero at the end of the stream, `None` when nothing is.
pub(super) fn try_read_into(socket: &TcpStream, buffer: &mut [u8]) -> io::Result<Option<usize>> {
    loop {
        let mut read = None;
        let size = buffer.len();
        let result = socket.try_io(Interest::READABLE, || {
            let (n, _) = rustix::net::recv(socket, &mut *buffer, RecvFlags::empty())?;
            read = Some(n);
            // As in `poll_read`: a short read has emptied the socket.
            if n > 0 && n < size { Err(io::ErrorKind::WouldBlock.into()) } else { Ok(()) }
        });
        match (read, result) {
            (Some(n), _) => return Ok(Some(n)),
            (None, Err(error)) => match error.kind() {
                io::ErrorKind::WouldBlock => return Ok(None),
                io::ErrorKind::Interrupted => {}
                _ => return Err(error),
            },
            // Never: without an error there was a read.
            (None, Ok(())) => return Ok(None),
        }
    }
}

/// Writes what the socket takes.
pub(super) fn poll_write(
    socket: &TcpStream,
    cx: &mut Context<'_>,
    bytes: &[u8],
) -> Poll<io::Result<usize>> {
    loop {
        ready!(socket.poll_write_ready(cx))?;
        match socket.try_write(bytes) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            result => return Poll::Ready(result),
        }
    }
}

/// Sends the FIN; a socket that the other side has closed meanwhile needs none.
pub(super) fn shutdown_write(socket: &TcpStream) -> io::Result<()> {
    match SockRef::from(socket).shutdown(Shutdown::Write) {
        Err(error) if error.kind() == io::ErrorKind::NotConnected => Ok(()),
        result => result,
    }
}
