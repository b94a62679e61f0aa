//! A flow over `signet/1` as a byte stream, for who has to read what it carries.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll, ready},
    time::Instant,
};

use signet_ebpf::abi::Reason;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::{
    copy::{Recycled, Stream, terminal},
    frame::{HEADER, LARGEST_DATA},
    link::{Batch, Event, Link},
};

/// Bytes that one write takes at most.
const LARGEST_WRITE: usize = 64 << 10;

/// An agreed flow's bytes. A FIN of the peer is the end of the stream, a reset is an error, a
/// shutdown is a FIN. Dropped before both FINs, the peer takes the flow for broken.
#[derive(Debug)]
pub struct ByteStream<T> {
    link: Link<T>,
    created: Instant,
    /// What the peer said before the answer, and how much of it was taken.
    early: (Vec<u8>, usize),
    peer_ended: bool,
    /// The FIN is queued.
    fin: bool,
    /// The FIN is with the peer's socket.
    ended: bool,
}

impl<T> From<Stream<T>> for ByteStream<T> {
    fn from(stream: Stream<T>) -> Self {
        let Stream { link, created, received, peer_ended, ended } = stream;
        Self { link, created, early: (received, 0), peer_ended, fin: ended, ended }
    }
}

impl<T: AsyncRead + AsyncWrite + Unpin> ByteStream<T> {
    /// Completes when the peer has reset the flow or the connection is gone, also while nobody
    /// reads; what waits to be read hides it.
    pub fn poll_broken(&mut self, cx: &mut Context<'_>) -> Poll<io::Error> {
        if self.early.1 < self.early.0.len() {
            return Poll::Pending;
        }
        loop {
            match ready!(self.link.poll_event(cx)) {
                Ok(Event::Data(_)) if !self.peer_ended => return Poll::Pending,
                Ok(Event::Fin) if !self.peer_ended => self.peer_ended = true,
                Ok(event) => return Poll::Ready(terminal(&event).into_io()),
                Err(error) => return Poll::Ready(error.into_io()),
            }
        }
    }

    /// True once the peer has ended its direction.
    pub fn has_peer_ended(&self) -> bool {
        self.peer_ended
    }

    /// Tells the peer that the flow is cut. What does not go at once is not waited for: the
    /// connection closes without its end being authenticated, which says the same.
    pub fn reset(&mut self, reason: Option<Reason>, cx: &mut Context<'_>) {
        self.link.queue_reset(reason);
        let _ = self.link.poll_send(cx);
    }

    /// The connection, when the flow has ended in order on both sides.
    pub fn recycle(self) -> Option<Recycled<T>> {
        let is_over = self.peer_ended && self.ended && self.link.is_between_frames();
        is_over.then(|| Recycled::new(self.link, self.created))
    }
}

impl<T: AsyncRead + AsyncWrite + Unpin> AsyncRead for ByteStream<T> {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        out: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        // The answer to the request leaves with the first turn, and a client may wait for it before
        // it says anything. An error is found by what comes next.
        let _ = this.link.poll_send(cx);
        let (early, taken) = &mut this.early;
        if *taken < early.len() {
            let n = out.remaining().min(early.len() - *taken);
            out.put_slice(&early[*taken..*taken + n]);
            *taken += n;
            if *taken == early.len() {
                this.early = (Vec::new(), 0);
            }
            return Poll::Ready(Ok(()));
        }
        if this.peer_ended || out.remaining() == 0 {
            return Poll::Ready(Ok(()));
        }
        match ready!(this.link.poll_event(cx)) {
            Ok(Event::Data(_)) => {
                let into = out.initialize_unfilled();
                let n = ready!(this.link.poll_data(cx, into)).map_err(|e| e.into_io())?;
                out.advance(n);
                Poll::Ready(Ok(()))
            }
            Ok(Event::Fin) => {
                this.peer_ended = true;
                Poll::Ready(Ok(()))
            }
            Ok(event) => Poll::Ready(Err(terminal(&event).into_io())),
            Err(error) => Poll::Ready(Err(error.into_io())),
        }
    }
}

impl<T: AsyncRead + AsyncWrite + Unpin> AsyncWrite for ByteStream<T> {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.poll_write_vectored(cx, &[io::IoSlice::new(bytes)])
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        if this.fin {
            return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
        }
        // Whole frames: the one before has to be with the peer's socket.
        ready!(this.link.poll_send(cx))?;
        let wanted: usize = slices.iter().map(|slice| slice.len()).sum();
        if wanted == 0 {
            return Poll::Ready(Ok(0));
        }
        let size = wanted.min(LARGEST_WRITE).min(LARGEST_DATA);
        let mut batch = Batch::take(size + HEADER);
        let mut filled = 0;
        for slice in slices {
            let n = slice.len().min(size - filled);
            batch.room()[filled..filled + n].copy_from_slice(&slice[..n]);
            filled += n;
        }
        this.link.queue_batch(batch, filled);
        // The frame is queued whatever comes of this; an error is found by the next call.
        if let Poll::Ready(Err(error)) = this.link.poll_send(cx) {
            return Poll::Ready(Err(error));
        }
        Poll::Ready(Ok(filled))
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.get_mut().link.poll_send(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        ready!(this.link.poll_send(cx))?;
        if !this.fin {
            this.link.queue_fin();
            this.fin = true;
            ready!(this.link.poll_send(cx))?;
        }
        this.ended = true;
        Poll::Ready(Ok(()))
    }
}
