//! A flow over HBONE as a byte stream, for who has to read what it carries.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll, ready},
};

use bytes::{Buf, Bytes};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::{Stream, io_error};

/// Bytes that one write takes at most.
const LARGEST_WRITE: usize = 64 << 10;

/// An agreed flow's bytes. The end of the peer's direction is the end of the stream, a reset is
/// an error, a shutdown ends this direction. Dropped before both ended, the stream is reset.
#[derive(Debug)]
pub struct ByteStream {
    stream: Stream,
    /// Received and not yet taken.
    received: Bytes,
    peer_ended: bool,
    ended: bool,
}

impl From<Stream> for ByteStream {
    fn from(stream: Stream) -> Self {
        Self { stream, received: Bytes::new(), peer_ended: false, ended: false }
    }
}

impl ByteStream {
    /// Completes when the peer has reset the stream or the connection is gone, also while nobody
    /// reads.
    pub fn poll_broken(&mut self, cx: &mut Context<'_>) -> Poll<io::Error> {
        if self.ended {
            // A stream that has ended on this side is past resetting.
            return Poll::Pending;
        }
        let reset = ready!(self.stream.send.poll_reset(cx));
        Poll::Ready(match reset {
            Ok(reason) => io::Error::new(io::ErrorKind::ConnectionReset, reason.to_string()),
            Err(error) => io_error(error),
        })
    }

    /// True once the peer has ended its direction.
    pub fn has_peer_ended(&self) -> bool {
        self.peer_ended
    }

    /// Tells the peer that the flow is cut.
    pub fn reset(&mut self) {
        self.stream.send.send_reset(h2::Reason::CANCEL);
    }
}

impl AsyncRead for ByteStream {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        out: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if out.remaining() == 0 {
            return Poll::Ready(Ok(()));
        }
        while this.received.is_empty() {
            if this.peer_ended {
                return Poll::Ready(Ok(()));
            }
            match ready!(this.stream.receive.poll_data(cx)) {
                Some(Ok(bytes)) => this.received = bytes,
                Some(Err(error)) => return Poll::Ready(Err(io_error(error))),
                None => this.peer_ended = true,
            }
        }
        let n = out.remaining().min(this.received.len());
        out.put_slice(&this.received[..n]);
        this.received.advance(n);
        // Only now may the peer send as much again.
        this.stream.receive.flow_control().release_capacity(n).map_err(io_error)?;
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for ByteStream {
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
        if this.ended {
            return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
        }
        let wanted: usize = slices.iter().map(|slice| slice.len()).sum();
        if wanted == 0 {
            return Poll::Ready(Ok(0));
        }
        let wanted = wanted.min(LARGEST_WRITE);
        this.stream.send.reserve_capacity(wanted);
        let mut capacity = this.stream.send.capacity();
        while capacity == 0 {
            capacity = match ready!(this.stream.send.poll_capacity(cx)) {
                Some(capacity) => capacity.map_err(io_error)?,
                None => return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into())),
            };
        }
        let size = wanted.min(capacity);
        let mut part = Vec::with_capacity(size);
        for slice in slices {
            let n = slice.len().min(size - part.len());
            part.extend_from_slice(&slice[..n]);
        }
        this.stream.send.send_data(part.into(), false).map_err(io_error)?;
        Poll::Ready(Ok(size))
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        // The connection's own task writes.
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if !this.ended {
            this.stream.send.send_data(Bytes::new(), true).map_err(io_error)?;
            this.ended = true;
        }
        Poll::Ready(Ok(()))
    }
}
