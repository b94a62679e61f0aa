//! A TLS session over a byte stream, by rustls' unbuffered interface.
//!
//! rustls keeps the protocol, the keys and the records; this module moves their bytes. Against
//! rustls' buffered interface it spares two copies of what is received and one allocation a
//! record of what is sent (docs/performance.md has both measured alone), and a session that
//! waits holds no buffer: ciphertext is read into a borrowed one that grows with what arrives,
//! and sealed into another that leaves with one write.

use std::{
    future::poll_fn,
    io,
    ops::Range,
    pin::Pin,
    task::{Context, Poll, ready},
};

use rustls::{
    CommonState,
    client::{ClientConnectionData, UnbufferedClientConnection},
    server::{ServerConnectionData, UnbufferedServerConnection},
    unbuffered::{ConnectionState, EncodeError, EncryptError, UnbufferedStatus},
};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::buffers::{Buffer, LARGEST, SMALLEST};

/// Bytes of plaintext in a record, at most (RFC 8446, 5.1).
const RECORD: usize = 16 << 10;
/// What a record's protection adds, at most: header, content type, tag (RFC 8446, 5.2).
const OVERHEAD: usize = 5 + 1 + 16;
/// Plaintext that is sealed at once: as many records as fit the largest buffer.
pub(super) const BATCH: usize = LARGEST / (RECORD + OVERHEAD) * RECORD;
/// Room beside the records for what TLS itself has to say: an alert, a key update.
const ASIDE: usize = 128;
/// Reads in a row that a quarter of the buffer would have held, after which it shrinks.
const LEAN_READS: u8 = 16;

/// One side of a session, as rustls has it.
trait Records {
    type Data;

    fn process<'c, 'i>(
        &'c mut self,
        incoming: &'i mut [u8],
    ) -> UnbufferedStatus<'c, 'i, Self::Data>;
}

impl Records for UnbufferedClientConnection {
    type Data = ClientConnectionData;

    fn process<'c, 'i>(
        &'c mut self,
        incoming: &'i mut [u8],
    ) -> UnbufferedStatus<'c, 'i, Self::Data> {
        self.process_tls_records(incoming)
    }
}

impl Records for UnbufferedServerConnection {
    type Data = ServerConnectionData;

    fn process<'c, 'i>(
        &'c mut self,
        incoming: &'i mut [u8],
    ) -> UnbufferedStatus<'c, 'i, Self::Data> {
        self.process_tls_records(incoming)
    }
}

/// Which side this is.
pub(super) enum Side {
    /// It has dialled.
    Client(Box<UnbufferedClientConnection>),
    /// It was dialled.
    Server(Box<UnbufferedServerConnection>),
}

impl std::fmt::Debug for Side {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // The rest is keys and their use.
        f.write_str(match self {
            Self::Client(_) => "Client",
            Self::Server(_) => "Server",
        })
    }
}

/// A session.
///
/// A write may leave ciphertext behind that only the next write or a flush sends. Shutting down
/// ends it in order; an end of the stream below without the peer's close_notify is an error
/// ([`io::ErrorKind::UnexpectedEof`]), and what TLS finds wrong is one of
/// [`io::ErrorKind::InvalidData`] around rustls' error.
#[derive(Debug)]
pub(super) struct Session<T> {
    io: T,
    side: Side,
    incoming: Incoming,
    plain: Plain,
    outgoing: Outgoing,
    /// The peer has ended the session in order.
    peer_closed: bool,
    /// This side has.
    closed: bool,
    /// What the next read is to tell, after the bytes that came before it.
    failed: Option<io::Error>,
    /// TLS has met an error.
    broken: bool,
}

/// Ciphertext that has arrived.
#[derive(Debug)]
struct Incoming {
    /// None while nothing is held.
    buffer: Option<Buffer>,
    held: Range<usize>,
    /// Size of the next buffer, bytes.
    size: usize,
    /// Reads in a row that would have fitted a quarter of it.
    lean: u8,
}

/// Plaintext that the caller had no room for: less than a record, save where a write met
/// records that nobody had read.
#[derive(Debug, Default)]
struct Plain {
    bytes: Vec<u8>,
    at: usize,
}

/// Ciphertext that is to be sent.
#[derive(Debug, Default)]
struct Outgoing {
    /// None while nothing is held.
    buffer: Option<Buffer>,
    held: Range<usize>,
}

/// What came of one step.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Turn {
    /// Plaintext was handed out; there may be more.
    Plain,
    /// TLS has done something of its own.
    Again,
    /// What was to be sealed is.
    Sealed,
    /// There is nothing to do before more arrives.
    Idle,
}

impl<T> Session<T> {
    /// A session that has not begun.
    pub(super) fn new(io: T, side: Side) -> Self {
        Self {
            io,
            side,
            incoming: Incoming { buffer: None, held: 0..0, size: SMALLEST, lean: 0 },
            plain: Plain::default(),
            outgoing: Outgoing::default(),
            peer_closed: false,
            closed: false,
            failed: None,
            broken: false,
        }
    }

    /// The stream below.
    pub(super) fn io(&self) -> &T {
        &self.io
    }

    /// What rustls knows of the session.
    pub(super) fn state(&self) -> &CommonState {
        match &self.side {
            Side::Client(connection) => connection,
            Side::Server(connection) => connection,
        }
    }

    /// One step: what has arrived goes into `out` and, beyond its room, into `plain`; where TLS
    /// takes plaintext, `seal` is sealed (nothing of it: the goodbye).
    fn turn(&mut self, out: &mut ReadBuf<'_>, seal: Option<&[u8]>) -> io::Result<Turn> {
        let Self { side, incoming, plain, outgoing, peer_closed, .. } = self;
        let step = Step { incoming, plain, outgoing, peer_closed };
        match side {
            Side::Client(connection) => step.run(&mut **connection, out, seal),
            Side::Server(connection) => step.run(&mut **connection, out, seal),
        }
        .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))
    }

    /// Queues `bytes`, sealed, or the goodbye where there are none.
    fn seal(&mut self, bytes: &[u8]) -> io::Result<()> {
        while !self.broken {
            // What the reader has left behind is processed first, and kept for it.
            match self.turn(&mut ReadBuf::new(&mut []), Some(bytes))? {
                Turn::Sealed => return Ok(()),
                Turn::Plain | Turn::Again => {}
                Turn::Idle => break,
            }
        }
        Err(io::ErrorKind::BrokenPipe.into())
    }

    /// Queues what TLS says about an error that it met, the alert, and ends the session: what has
    /// arrived behind it is looked at no more.
    fn explain(&mut self) {
        self.broken = true;
        self.incoming.discard(usize::MAX);
        while self.state().wants_write() {
            if self.turn(&mut ReadBuf::new(&mut []), None).is_err() {
                return;
            }
        }
    }
}

/// What a step works on, beside rustls' own state.
struct Step<'a> {
    incoming: &'a mut Incoming,
    plain: &'a mut Plain,
    outgoing: &'a mut Outgoing,
    peer_closed: &'a mut bool,
}

impl Step<'_> {
    fn run<C: Records>(
        self,
        connection: &mut C,
        out: &mut ReadBuf<'_>,
        seal: Option<&[u8]>,
    ) -> Result<Turn, rustls::Error> {
        let Self { incoming, plain, outgoing, peer_closed } = self;
        let UnbufferedStatus { mut discard, state } = connection.process(incoming.bytes());
        let turn = state.and_then(|state| match state {
            ConnectionState::ReadTraffic(mut records) => {
                while let Some(record) = records.next_record() {
                    let record = record?;
                    discard += record.discard;
                    let (now, later) =
                        record.payload.split_at(record.payload.len().min(out.remaining()));
                    out.put_slice(now);
                    plain.bytes.extend_from_slice(later);
                }
                Ok(Turn::Plain)
            }
            ConnectionState::EncodeTlsData(mut data) => {
                let mut encoded = data.encode(outgoing.room(ASIDE));
                if let Err(EncodeError::InsufficientSize(short)) = &encoded {
                    encoded = data.encode(outgoing.room(short.required_size));
                }
                outgoing.held.end += encoded.map_err(|e| rustls::Error::General(e.to_string()))?;
                Ok(Turn::Again)
            }
            ConnectionState::TransmitTlsData(data) => {
                // It waits, before whatever is sealed later.
                data.done();
                Ok(Turn::Again)
            }
            ConnectionState::PeerClosed => {
                *peer_closed = true;
                Ok(Turn::Again)
            }
            ConnectionState::WriteTraffic(mut traffic) => {
                let Some(bytes) = seal else { return Ok(Turn::Idle) };
                let mut put = |room: &mut [u8]| match bytes {
                    [] => traffic.queue_close_notify(room),
                    _ => traffic.encrypt(bytes, room),
                };
                let mut sealed = put(outgoing.room(sealed_size(bytes.len())));
                if let Err(EncryptError::InsufficientSize(short)) = &sealed {
                    sealed = put(outgoing.room(short.required_size));
                }
                outgoing.held.end += sealed.map_err(|e| match e {
                    EncryptError::EncryptExhausted => rustls::Error::EncryptError,
                    e => rustls::Error::General(e.to_string()),
                })?;
                Ok(Turn::Sealed)
            }
            // Neither side offers it.
            ConnectionState::ReadEarlyData(_) => {
                Err(rustls::PeerMisbehaved::TooMuchEarlyDataReceived.into())
            }
            // Blocked or closed.
            _ => Ok(Turn::Idle),
        });
        incoming.discard(discard);
        turn
    }
}

/// Size of `n` bytes once they are sealed, bytes.
fn sealed_size(n: usize) -> usize {
    n + n.div_ceil(RECORD) * OVERHEAD + ASIDE
}

impl<T: AsyncRead + AsyncWrite + Unpin> Session<T> {
    /// Runs the handshake to its end; what the peer said behind it is kept for the reader.
    pub(super) async fn handshake(&mut self) -> io::Result<()> {
        let done = self.shake_hands().await;
        if done.is_err() {
            self.explain();
            // The peer is told if it listens; what went wrong is what the caller has to know.
            let _ = poll_fn(|cx| self.poll_drain(cx)).await;
        }
        done
    }

    async fn shake_hands(&mut self) -> io::Result<()> {
        loop {
            match self.turn(&mut ReadBuf::new(&mut []), None)? {
                Turn::Plain | Turn::Again => continue,
                Turn::Sealed | Turn::Idle => {}
            }
            if !self.state().is_handshaking() {
                return poll_fn(|cx| self.poll_drain(cx)).await;
            }
            // Both at once: a peer may say more before it takes what it is told.
            let read = poll_fn(|cx| {
                if let Poll::Ready(Err(error)) = self.poll_drain(cx) {
                    return Poll::Ready(Err(error));
                }
                self.incoming.poll_fill(&mut self.io, cx)
            });
            if read.await? == 0 || self.peer_closed {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
    }

    /// Sends what is sealed.
    fn poll_drain(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while let Some(buffer) = &self.outgoing.buffer {
            let held = self.outgoing.held.clone();
            if held.is_empty() {
                self.outgoing = Outgoing::default();
                break;
            }
            let n = ready!(Pin::new(&mut self.io).poll_write(cx, &buffer[held]))?;
            if n == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.outgoing.held.start += n;
        }
        Poll::Ready(Ok(()))
    }
}

impl<T: AsyncRead + AsyncWrite + Unpin> AsyncRead for Session<T> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        out: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        if out.remaining() == 0 {
            return Poll::Ready(Ok(()));
        }
        if let Some(error) = this.failed.take() {
            return Poll::Ready(Err(error));
        }
        let before = out.filled().len();
        this.plain.take(out);
        loop {
            while out.remaining() > 0 && !this.incoming.held.is_empty() {
                match this.turn(out, None) {
                    Ok(Turn::Plain | Turn::Again) => {}
                    Ok(Turn::Sealed | Turn::Idle) => break,
                    Err(error) => {
                        this.explain();
                        this.failed = Some(error);
                        break;
                    }
                }
            }
            if !this.outgoing.held.is_empty() {
                // An answer of TLS' own, or what a write has left: its error is the write's.
                let _ = this.poll_drain(cx);
            }
            if out.filled().len() > before || this.peer_closed {
                return Poll::Ready(Ok(()));
            }
            if let Some(error) = this.failed.take() {
                return Poll::Ready(Err(error));
            }
            if this.broken {
                return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
            }
            if ready!(this.incoming.poll_fill(&mut this.io, cx))? == 0 {
                return Poll::Ready(Err(io::ErrorKind::UnexpectedEof.into()));
            }
        }
    }
}

impl<T: AsyncRead + AsyncWrite + Unpin> AsyncWrite for Session<T> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        if bytes.is_empty() {
            return Poll::Ready(Ok(0));
        }
        ready!(self.poll_drain(cx))?;
        let n = bytes.len().min(BATCH);
        self.seal(&bytes[..n])?;
        match self.poll_drain(cx) {
            Poll::Ready(Err(error)) => Poll::Ready(Err(error)),
            // What the socket does not take waits for a flush.
            _ => Poll::Ready(Ok(n)),
        }
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        parts: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let mut filled = parts.iter().filter(|part| !part.is_empty());
        let (Some(first), Some(_)) = (filled.next(), filled.next()) else {
            let only = parts.iter().find(|part| !part.is_empty());
            return self.poll_write(cx, only.map_or(&[], |part| part));
        };
        // One record for a frame's header and its payload: a copy is cheaper than a record.
        let whole: usize = parts.iter().map(|part| part.len()).sum();
        let mut together = Buffer::take(whole.max(first.len()).min(BATCH));
        let most = together.len().min(BATCH);
        let mut n = 0;
        for part in parts {
            let take = part.len().min(most - n);
            together[n..n + take].copy_from_slice(&part[..take]);
            n += take;
        }
        self.poll_write(cx, &together[..n])
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.poll_drain(cx))?;
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if !self.closed {
            self.closed = true;
            self.seal(&[])?;
        }
        ready!(self.poll_drain(cx))?;
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}

impl Incoming {
    fn bytes(&mut self) -> &mut [u8] {
        match &mut self.buffer {
            Some(buffer) => &mut buffer[self.held.clone()],
            None => &mut [],
        }
    }

    /// The first `n` bytes are done with.
    fn discard(&mut self, n: usize) {
        self.held.start = self.held.start.saturating_add(n).min(self.held.end);
        if self.held.is_empty() {
            (self.buffer, self.held) = (None, 0..0);
        }
    }

    /// Reads more behind what is held, which no whole record is. Zero at the end of the stream.
    fn poll_fill<T: AsyncRead + Unpin>(
        &mut self,
        io: &mut T,
        cx: &mut Context<'_>,
    ) -> Poll<io::Result<usize>> {
        let kept = self.held.len();
        let mut buffer = match self.buffer.take() {
            None => Buffer::take(self.size),
            Some(mut buffer) if kept < buffer.len() => {
                buffer.copy_within(self.held.clone(), 0);
                buffer
            }
            Some(buffer) => {
                if buffer.len() >= LARGEST {
                    let what = "a message that fills the largest buffer";
                    return Poll::Ready(Err(io::Error::new(io::ErrorKind::InvalidData, what)));
                }
                let mut larger = Buffer::take(buffer.len() + 1);
                larger[..kept].copy_from_slice(&buffer[self.held.clone()]);
                larger
            }
        };
        let room = buffer.len() - kept;
        let mut into = ReadBuf::new(&mut buffer[kept..]);
        let read = Pin::new(io).poll_read(cx, &mut into);
        let n = into.filled().len();
        self.held = 0..kept + n;
        if !self.held.is_empty() {
            // One that holds nothing goes back while there is nothing to read.
            self.buffer = Some(buffer);
        }
        ready!(read)?;
        self.fit(n, room);
        Poll::Ready(Ok(n))
    }

    /// Fits the size of the next buffer to what a read brought.
    fn fit(&mut self, read: usize, room: usize) {
        self.lean = if read <= self.size / 4 { self.lean.saturating_add(1) } else { 0 };
        if read == room && self.size < LARGEST {
            self.size *= 4;
        } else if self.lean >= LEAN_READS && self.size > SMALLEST {
            self.size /= 4;
            self.lean = 0;
        }
    }
}

impl Plain {
    /// Hands out what is held.
    fn take(&mut self, out: &mut ReadBuf<'_>) {
        let rest = &self.bytes[self.at..];
        if rest.is_empty() {
            return;
        }
        let n = rest.len().min(out.remaining());
        out.put_slice(&rest[..n]);
        self.at += n;
        if self.at == self.bytes.len() {
            // Memory is held only while there is something in it.
            *self = Self::default();
        }
    }
}

impl Outgoing {
    /// Room for `n` bytes behind what is held.
    fn room(&mut self, n: usize) -> &mut [u8] {
        let held = self.held.clone();
        let buffer = match self.buffer.take() {
            Some(buffer) if held.end + n <= buffer.len() => buffer,
            Some(buffer) => {
                let mut larger = Buffer::take(held.len() + n);
                larger[..held.len()].copy_from_slice(&buffer[held.clone()]);
                self.held = 0..held.len();
                larger
            }
            None => Buffer::take(n),
        };
        let end = self.held.end;
        &mut self.buffer.insert(buffer)[end..]
    }
}

#[cfg(test)]
mod tests;
