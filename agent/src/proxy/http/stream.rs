//! The client's end of a judged flow, whatever carries it, and the watch over what comes in.

use std::{
    collections::VecDeque,
    io,
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError, atomic::Ordering},
    task::{Context, Poll, Waker, ready},
    time::Duration,
};

use bytes::{Buf, BytesMut};
use signet_ebpf::abi::Reason;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
    time::Sleep,
};

use super::framing::{Fault, Framing, Head, Step};
use crate::tunnel::{
    copy::{Counts, end_on_close, reset_on_close, socket_error},
    hbone, native,
    tls::TlsStream,
};

/// Bytes that one read takes at most.
const READ: usize = 16 << 10;

/// What a client's bytes come through.
#[derive(Debug)]
pub enum Carrier {
    /// The native wire.
    Native(Box<native::stream::ByteStream<TlsStream>>),
    /// HBONE.
    Hbone(hbone::stream::ByteStream),
    /// A socket, in clear.
    Plain(TcpStream),
}

/// A byte stream that several hold: who speaks the protocol on it, and who ends the flow.
#[derive(Debug)]
pub struct Shared<T>(Arc<Mutex<T>>);

impl<T> Clone for Shared<T> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<T> Shared<T> {
    /// The stream, held by one.
    pub fn new(stream: T) -> Self {
        Self(Arc::new(Mutex::new(stream)))
    }

    /// The stream; never hold it across an await.
    pub fn lock(&self) -> MutexGuard<'_, T> {
        // Whoever panicked has broken its own flow only.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The stream, when nobody else holds it any more.
    pub fn into_inner(self) -> Option<T> {
        let stream = Arc::into_inner(self.0)?;
        Some(stream.into_inner().unwrap_or_else(PoisonError::into_inner))
    }
}

impl<T: AsyncRead + Unpin> AsyncRead for Shared<T> {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        out: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut *self.lock()).poll_read(cx, out)
    }
}

impl<T: AsyncWrite + Unpin> AsyncWrite for Shared<T> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, b: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut *self.lock()).poll_write(cx, b)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut *self.lock()).poll_write_vectored(cx, slices)
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut *self.lock()).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut *self.lock()).poll_shutdown(cx)
    }
}

impl Carrier {
    /// Completes when the client has reset the flow, also while nobody reads.
    fn poll_broken(&mut self, cx: &mut Context<'_>) -> Poll<io::Error> {
        match self {
            Self::Native(stream) => stream.poll_broken(cx),
            Self::Hbone(stream) => stream.poll_broken(cx),
            // Its error fails the next read or write, and one of them always waits.
            Self::Plain(stream) => match stream.poll_peek(cx, &mut ReadBuf::new(&mut [0])) {
                Poll::Ready(Err(error)) => Poll::Ready(error),
                _ => Poll::Pending,
            },
        }
    }

    /// Tells the client that the flow is cut.
    fn reset(&mut self, reason: Option<Reason>, cx: &mut Context<'_>) {
        match self {
            Self::Native(stream) => stream.reset(reason, cx),
            Self::Hbone(stream) => stream.reset(),
            Self::Plain(stream) => reset_on_close(stream),
        }
    }

    fn has_ended(&self) -> bool {
        match self {
            Self::Native(stream) => stream.has_peer_ended(),
            Self::Hbone(stream) => stream.has_peer_ended(),
            Self::Plain(_) => false,
        }
    }
}

impl AsyncRead for Carrier {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        out: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Native(stream) => Pin::new(&mut **stream).poll_read(cx, out),
            Self::Hbone(stream) => Pin::new(stream).poll_read(cx, out),
            Self::Plain(stream) => Pin::new(stream).poll_read(cx, out),
        }
    }
}

impl AsyncWrite for Carrier {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, b: &[u8]) -> Poll<io::Result<usize>> {
        self.poll_write_vectored(cx, &[io::IoSlice::new(b)])
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Native(stream) => Pin::new(&mut **stream).poll_write_vectored(cx, slices),
            Self::Hbone(stream) => Pin::new(stream).poll_write_vectored(cx, slices),
            Self::Plain(stream) => Pin::new(stream).poll_write_vectored(cx, slices),
        }
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Native(stream) => Pin::new(&mut **stream).poll_flush(cx),
            Self::Hbone(stream) => Pin::new(stream).poll_flush(cx),
            Self::Plain(stream) => Pin::new(stream).poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Native(stream) => Pin::new(&mut **stream).poll_shutdown(cx),
            Self::Hbone(stream) => Pin::new(stream).poll_shutdown(cx),
            Self::Plain(stream) => Pin::new(stream).poll_shutdown(cx),
        }
    }
}

/// A client whose bytes are counted.
#[derive(Clone, Debug)]
pub struct Client {
    carrier: Shared<Carrier>,
    counts: Arc<Counts>,
}

impl Client {
    /// Counts what goes through `carrier`.
    pub fn new(carrier: Carrier, counts: Arc<Counts>) -> Self {
        Self { carrier: Shared::new(carrier), counts }
    }

    /// Completes when the client has reset the flow, also while nobody reads.
    pub async fn broken(&self) -> io::Error {
        std::future::poll_fn(|cx| self.carrier.lock().poll_broken(cx)).await
    }

    /// Tells the client that the flow is cut; it is when the last holder is gone.
    pub async fn reset(&self, reason: Option<Reason>) {
        std::future::poll_fn(|cx| {
            self.carrier.lock().reset(reason, cx);
            Poll::Ready(())
        })
        .await;
    }

    /// Takes what the client still says after this side has ended, up to a limit, so that the
    /// last answer is not overtaken by a reset. True when the client has ended, too.
    pub async fn linger(&mut self) -> bool {
        const MOST: usize = 1 << 20;
        let (mut taken, mut buffer) = (0, vec![0; READ].into_boxed_slice());
        while taken < MOST {
            match tokio::io::AsyncReadExt::read(self, &mut buffer).await {
                Ok(0) => return true,
                Ok(n) => taken += n,
                Err(_) => return false,
            }
        }
        self.carrier.lock().has_ended()
    }

    /// What carried the flow, when nobody else holds it any more.
    pub fn into_carrier(self) -> Option<Carrier> {
        self.carrier.into_inner()
    }
}

impl AsyncRead for Client {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        out: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = out.filled().len();
        ready!(Pin::new(&mut self.carrier).poll_read(cx, out))?;
        let n = out.filled().len() - before;
        self.counts.to_app.fetch_add(n as u64, Ordering::Relaxed);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Client {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, b: &[u8]) -> Poll<io::Result<usize>> {
        self.poll_write_vectored(cx, &[io::IoSlice::new(b)])
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let n = ready!(Pin::new(&mut self.carrier).poll_write_vectored(cx, slices))?;
        self.counts.from_app.fetch_add(n as u64, Ordering::Relaxed);
        Poll::Ready(Ok(n))
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.carrier).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.carrier).poll_shutdown(cx)
    }
}

/// The application's socket, held by who speaks to it and by who ends the flow.
pub type App = Shared<TcpStream>;

impl App {
    /// The flow has ended in order: what is still to be sent goes out first.
    pub fn end_on_close(&self) {
        end_on_close(&self.lock());
    }

    /// The error that the socket is in.
    pub fn error(&self) -> io::Error {
        socket_error(&self.lock())
    }
}

/// What [`Framing`] found in a client's bytes, for who answers the requests: one entry a
/// request, in order.
#[derive(Clone, Debug, Default)]
pub struct Requests(Arc<Mutex<Found>>);

#[derive(Debug, Default)]
struct Found {
    heads: VecDeque<Result<Head, Fault>>,
    framing: Framing,
    /// What broke a request's body.
    broken: Option<Fault>,
    /// Waits for the answer to an upgrade.
    waiting: Option<Waker>,
}

impl Requests {
    fn lock(&self) -> MutexGuard<'_, Found> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The request that comes next.
    pub fn next(&self) -> Option<Result<Head, Fault>> {
        self.lock().heads.pop_front()
    }

    /// What broke a request's body, if anything did.
    pub fn broken(&self) -> Option<Fault> {
        self.lock().broken
    }

    /// The upgrade is answered: what follows is another protocol, or more HTTP.
    pub fn go_on(&self, switched: bool) {
        let mut found = self.lock();
        found.framing.go_on(switched);
        if let Some(waker) = found.waiting.take() {
            waker.wake();
        }
    }
}

/// Stands in for a request that may not pass, so that its refusal finds its place behind the
/// answers to those before it.
const STAND_IN: &[u8] = b"GET / HTTP/1.1\r\nhost: refused\r\nconnection: close\r\n\r\n";

/// An HTTP/1 client, of whose bytes only whole and unambiguous messages pass.
#[derive(Debug)]
pub struct Watched {
    client: Client,
    requests: Requests,
    /// Read, and not yet passed on.
    buffer: BytesMut,
    /// Bytes of the buffer that may pass.
    passing: usize,
    /// What of [`STAND_IN`] is to be passed; nothing follows it.
    stand_in: Option<&'static [u8]>,
    /// How long a head may take, and when the one that has begun is due.
    head_timeout: Duration,
    due: Option<Pin<Box<Sleep>>>,
    ended: bool,
}

impl Watched {
    /// Watches `client`, of which `said` was read already.
    pub fn new(client: Client, said: BytesMut, requests: Requests, head_timeout: Duration) -> Self {
        Self {
            client,
            requests,
            buffer: said,
            passing: 0,
            stand_in: None,
            head_timeout,
            due: None,
            ended: false,
        }
    }

    /// Reads more; false at the end of the stream.
    fn poll_more(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<bool>> {
        if self.ended {
            return Poll::Ready(Ok(false));
        }
        let held = self.buffer.len();
        self.buffer.resize(held + READ, 0);
        let mut into = ReadBuf::new(&mut self.buffer[held..]);
        let result = Pin::new(&mut self.client).poll_read(cx, &mut into);
        let n = into.filled().len();
        self.buffer.truncate(held + n);
        ready!(result)?;
        self.ended = n == 0;
        Poll::Ready(Ok(n > 0))
    }

    fn fault(&mut self, fault: Fault) -> io::Result<()> {
        self.due = None;
        let mut found = self.requests.lock();
        if found.framing.awaits_head() {
            found.heads.push_back(Err(fault));
            self.stand_in = Some(STAND_IN);
            self.ended = true;
            self.buffer.clear();
            return Ok(());
        }
        found.broken = Some(fault);
        Err(io::Error::new(io::ErrorKind::InvalidData, fault))
    }
}

impl AsyncRead for Watched {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        out: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if out.remaining() == 0 {
            return Poll::Ready(Ok(()));
        }
        loop {
            if let Some(left) = this.stand_in {
                let n = left.len().min(out.remaining());
                out.put_slice(&left[..n]);
                this.stand_in = Some(&left[n..]);
                return Poll::Ready(Ok(()));
            }
            if this.passing > 0 {
                let n = this.passing.min(out.remaining());
                out.put_slice(&this.buffer[..n]);
                this.buffer.advance(n);
                this.passing -= n;
                return Poll::Ready(Ok(()));
            }
            let (step, awaits_head, is_between) = {
                let mut found = this.requests.lock();
                let step = found.framing.step(&this.buffer);
                if let Step::Head(_, head) = &step {
                    found.heads.push_back(Ok(head.clone()));
                }
                if step == Step::Hold {
                    found.waiting = Some(cx.waker().clone());
                }
                (step, found.framing.awaits_head(), found.framing.is_between())
            };
            match step {
                Step::Head(n, _) | Step::Pass(n) => {
                    this.passing = n;
                    this.due = None;
                }
                Step::Hold => return Poll::Pending,
                Step::Fault(fault) => this.fault(fault)?,
                Step::More => {
                    if this.buffer.is_empty() {
                        this.due = None;
                    } else if awaits_head {
                        let after = this.head_timeout;
                        let due =
                            this.due.get_or_insert_with(|| Box::pin(tokio::time::sleep(after)));
                        if due.as_mut().poll(cx).is_ready() {
                            this.fault(Fault::Slow)?;
                            continue;
                        }
                    }
                    if !ready!(this.poll_more(cx))? {
                        if this.buffer.is_empty() && is_between {
                            return Poll::Ready(Ok(()));
                        }
                        this.fault(Fault::Truncated)?;
                    }
                }
            }
        }
    }
}

impl AsyncWrite for Watched {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.client).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.client).poll_write_vectored(cx, slices)
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.client).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.client).poll_shutdown(cx)
    }
}

/// A stream of which the beginning was read already.
#[derive(Debug)]
pub struct Begun {
    client: Client,
    said: BytesMut,
}

impl Begun {
    /// `client`, of which `said` was read.
    pub fn new(client: Client, said: BytesMut) -> Self {
        Self { client, said }
    }
}

impl AsyncRead for Begun {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        out: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.said.is_empty() {
            return Pin::new(&mut self.client).poll_read(cx, out);
        }
        let n = self.said.len().min(out.remaining());
        out.put_slice(&self.said.split_to(n));
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Begun {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.client).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.client).poll_write_vectored(cx, slices)
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.client).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.client).poll_shutdown(cx)
    }
}
