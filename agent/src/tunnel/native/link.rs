//! One end of a `signet/1` connection: frames in and out over a byte stream.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll, ready},
};

use signet_ebpf::abi::Reason;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt as _, ReadBuf};

use super::frame::{
    FrameError, HEADER, Header, Kind, Open, Status, encode_close, encode_fin, encode_reset,
    parse_reset,
};
use crate::tunnel::buffers::{Buffer, SMALLEST};

/// Why a connection is of no more use.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum NativeError {
    /// The byte stream broke, or ended without its end being authenticated.
    #[error("the connection failed: {0}")]
    Io(#[from] io::Error),
    /// What the peer sent is no frame.
    #[error("the peer broke the protocol: {0}")]
    Frame(#[from] FrameError),
    /// A frame that has no place there.
    #[error("the peer broke the protocol: an unexpected {0:?} frame")]
    Unexpected(Kind),
    /// The stream ended within a frame or within a flow.
    #[error("the peer ended the connection in the middle of a flow")]
    Truncated,
    /// A request came too slowly.
    #[error("the peer did not complete its request within {0:?}")]
    Slow(std::time::Duration),
    /// Its owner cut it.
    #[error("the connection was cut: its endpoint is gone or the agent stops")]
    Cut,
}

impl NativeError {
    /// The reason in flow records.
    pub fn reason(&self) -> Reason {
        match self {
            // TLS below: the server refuses our certificate by an alert, after the client's
            // own handshake has ended.
            Self::Io(error) if error.kind() == io::ErrorKind::InvalidData => {
                Reason::HandshakeFailed
            }
            Self::Io(_) | Self::Truncated => Reason::PeerUnreachable,
            Self::Frame(_) | Self::Unexpected(_) | Self::Slow(_) => Reason::ProtocolError,
            Self::Cut => Reason::Draining,
        }
    }

    /// A short stable name for counters.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Io(_) | Self::Truncated => "connection_lost",
            Self::Frame(_) | Self::Unexpected(_) => "native",
            Self::Slow(_) => "preface_timeout",
            Self::Cut => "cut",
        }
    }

    /// As an I/O error, for callers that hold both.
    pub fn into_io(self) -> io::Error {
        match self {
            Self::Io(error) => error,
            Self::Truncated => io::ErrorKind::UnexpectedEof.into(),
            other => io::Error::other(other),
        }
    }
}

/// What comes next from the peer.
#[derive(Debug)]
pub(super) enum Event {
    /// So many bytes of the flow; [`Link::poll_data`] takes them.
    Data(usize),
    Open(Open),
    Fin,
    Reset(Option<Reason>),
    Status(Status),
    Close,
    /// The connection has ended, in order and between frames.
    End,
}

/// The state of one end.
#[derive(Debug)]
pub(super) struct Link<T> {
    io: T,
    header: [u8; HEADER],
    /// Bytes of `header` that are there.
    have: usize,
    /// The frame whose payload is being read; none between frames and within DATA.
    frame: Option<Header>,
    /// Its payload so far. Empty, and without memory, while no such frame is read.
    payload: Vec<u8>,
    /// Bytes of a DATA frame that are still to be taken.
    data: usize,
    /// What is to be written, whole frames.
    out: Option<Outgoing>,
    /// Something was written that is not flushed yet.
    unflushed: bool,
    /// The peer has ended the stream between frames.
    ended: bool,
}

#[derive(Debug)]
struct Outgoing {
    buffer: Buffer,
    written: usize,
    end: usize,
}

/// Room for a batch of the flow's bytes, with its frame's header before it.
pub(super) struct Batch(Buffer);

impl Batch {
    /// Room for about `size` bytes, header included.
    pub(super) fn take(size: usize) -> Self {
        Self(Buffer::take(size))
    }

    /// Where the bytes go.
    pub(super) fn room(&mut self) -> &mut [u8] {
        &mut self.0[HEADER..]
    }
}

impl<T> Link<T> {
    pub(super) fn new(io: T) -> Self {
        Self {
            io,
            header: [0; HEADER],
            have: 0,
            frame: None,
            payload: Vec::new(),
            data: 0,
            out: None,
            unflushed: false,
            ended: false,
        }
    }

    /// True when everything that was queued is with the peer's socket and nothing of a frame
    /// has been read.
    pub(super) fn is_between_frames(&self) -> bool {
        self.out.is_none()
            && !self.unflushed
            && self.have == 0
            && self.frame.is_none()
            && self.data == 0
            && !self.ended
    }

    /// Appends a small frame to what is to be written.
    ///
    /// Small frames come one at a time beside at most one batch: a FIN, a STATUS, a RESET.
    pub(super) fn queue(&mut self, encode: impl FnOnce(&mut Vec<u8>)) {
        let mut frame = Vec::with_capacity(64);
        encode(&mut frame);
        self.append(&frame);
    }

    pub(super) fn queue_fin(&mut self) {
        self.queue(encode_fin);
    }

    pub(super) fn queue_close(&mut self) {
        self.queue(encode_close);
    }

    pub(super) fn queue_reset(&mut self, reason: Option<Reason>) {
        self.queue(|out| encode_reset(reason, out));
    }

    /// Appends bytes of the flow as a DATA frame; for a few bytes that are at hand already.
    pub(super) fn queue_data(&mut self, bytes: &[u8]) {
        for part in bytes.chunks(super::frame::LARGEST_DATA) {
            let header = Header { kind: Kind::Data, length: part.len() };
            self.append(&header.encode());
            self.append(part);
        }
    }

    /// Makes a batch, of which `length` bytes are filled, what is to be written next. Nothing
    /// else may be waiting.
    pub(super) fn queue_batch(&mut self, mut batch: Batch, length: usize) {
        debug_assert!(self.out.is_none(), "a batch waits until all before it is written");
        let header = Header { kind: Kind::Data, length };
        batch.0[..HEADER].copy_from_slice(&header.encode());
        self.out = Some(Outgoing { buffer: batch.0, written: 0, end: HEADER + length });
    }

    fn append(&mut self, bytes: &[u8]) {
        let out = self.out.get_or_insert_with(|| Outgoing {
            buffer: Buffer::take(SMALLEST.max(bytes.len())),
            written: 0,
            end: 0,
        });
        if out.end + bytes.len() > out.buffer.len() {
            let held = out.end - out.written;
            let mut larger = Buffer::take(held + bytes.len());
            larger[..held].copy_from_slice(&out.buffer[out.written..out.end]);
            *out = Outgoing { buffer: larger, written: 0, end: held };
        }
        out.buffer[out.end..out.end + bytes.len()].copy_from_slice(bytes);
        out.end += bytes.len();
    }
}

impl<T: AsyncWrite + Unpin> Link<T> {
    /// Writes what is queued and flushes it.
    pub(super) fn poll_send(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while let Some(out) = &mut self.out {
            let n =
                ready!(Pin::new(&mut self.io).poll_write(cx, &out.buffer[out.written..out.end]))?;
            if n == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.unflushed = true;
            out.written += n;
            if out.written == out.end {
                self.out = None;
            }
        }
        if self.unflushed {
            ready!(Pin::new(&mut self.io).poll_flush(cx))?;
            self.unflushed = false;
        }
        Poll::Ready(Ok(()))
    }

    pub(super) async fn send(&mut self) -> io::Result<()> {
        std::future::poll_fn(|cx| self.poll_send(cx)).await
    }

    /// Ends the stream below in order.
    pub(super) async fn shutdown(&mut self) -> io::Result<()> {
        self.io.shutdown().await
    }
}

impl<T: AsyncRead + Unpin> Link<T> {
    /// What comes next. After an [`Event::Data`], its bytes have to be taken first.
    ///
    /// Cancel-safe: what was read of a frame is kept.
    pub(super) fn poll_event(&mut self, cx: &mut Context<'_>) -> Poll<Result<Event, NativeError>> {
        if self.ended {
            return Poll::Ready(Ok(Event::End));
        }
        if self.data > 0 {
            return Poll::Ready(Ok(Event::Data(self.data)));
        }
        let frame = match self.frame {
            Some(frame) => frame,
            None => {
                while self.have < HEADER {
                    let n = ready!(read(&mut self.io, cx, &mut self.header[self.have..]))?;
                    if n == 0 {
                        self.ended = self.have == 0;
                        return Poll::Ready(match self.ended {
                            true => Ok(Event::End),
                            false => Err(NativeError::Truncated),
                        });
                    }
                    self.have += n;
                }
                self.have = 0;
                let frame = Header::parse(self.header)?;
                if frame.kind == Kind::Data {
                    self.data = frame.length;
                    return Poll::Ready(Ok(Event::Data(frame.length)));
                }
                self.payload.reserve_exact(frame.length);
                self.frame = Some(frame);
                frame
            }
        };
        while self.payload.len() < frame.length {
            let mut part = [0; 256];
            let want = (frame.length - self.payload.len()).min(part.len());
            let n = ready!(read(&mut self.io, cx, &mut part[..want]))?;
            if n == 0 {
                return Poll::Ready(Err(NativeError::Truncated));
            }
            self.payload.extend(&part[..n]);
        }
        self.frame = None;
        let payload = std::mem::take(&mut self.payload);
        Poll::Ready(Ok(match frame.kind {
            Kind::Open => Event::Open(Open::parse(&payload)?),
            Kind::Fin => Event::Fin,
            Kind::Reset => Event::Reset(parse_reset(&payload)),
            Kind::Status => Event::Status(Status::parse(&payload)?),
            Kind::Close => Event::Close,
            // Handled above: its payload is the flow's.
            Kind::Data => return Poll::Ready(Err(NativeError::Unexpected(Kind::Data))),
        }))
    }

    /// Waits until something of the next frame is there, or the end, or what broke the stream.
    ///
    /// Cancel-safe.
    pub(super) async fn begun(&mut self) -> Result<(), NativeError> {
        std::future::poll_fn(|cx| {
            if self.have > 0 || self.frame.is_some() || self.data > 0 || self.ended {
                return Poll::Ready(Ok(()));
            }
            let n = match ready!(read(&mut self.io, cx, &mut self.header[..1])) {
                // A peer that leaves between flows need not say so: nothing is cut off.
                Err(error) if is_gone(&error) => 0,
                read => read?,
            };
            self.have = n;
            // The end of a stream stays one: it is read again as an event.
            self.ended = n == 0;
            Poll::Ready(Ok(()))
        })
        .await
    }

    /// True while bytes of a DATA frame are to be taken.
    pub(super) fn has_data(&self) -> bool {
        self.data > 0
    }

    pub(super) async fn event(&mut self) -> Result<Event, NativeError> {
        std::future::poll_fn(|cx| self.poll_event(cx)).await
    }

    /// Takes bytes of the DATA frame; at least one.
    pub(super) fn poll_data(
        &mut self,
        cx: &mut Context<'_>,
        into: &mut [u8],
    ) -> Poll<Result<usize, NativeError>> {
        let want = into.len().min(self.data);
        let n = ready!(read(&mut self.io, cx, &mut into[..want]))?;
        if n == 0 {
            return Poll::Ready(Err(NativeError::Truncated));
        }
        self.data -= n;
        Poll::Ready(Ok(n))
    }
}

/// The peer's socket is closed.
fn is_gone(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::UnexpectedEof
            | io::ErrorKind::ConnectionReset
            | io::ErrorKind::ConnectionAborted
            | io::ErrorKind::BrokenPipe
    )
}

fn read<T: AsyncRead + Unpin>(
    io: &mut T,
    cx: &mut Context<'_>,
    into: &mut [u8],
) -> Poll<io::Result<usize>> {
    let mut buffer = ReadBuf::new(into);
    ready!(Pin::new(io).poll_read(cx, &mut buffer))?;
    Poll::Ready(Ok(buffer.filled().len()))
}
