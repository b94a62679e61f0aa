//! Large reads below TLS: rustls asks for 4 KiB at a time, a system call each.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll, ready},
};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::buffers::{Buffer, LARGEST, SMALLEST};

/// After so many reads in a row that would have fitted a quarter, the buffer shrinks to that.
const LEAN_READS: u8 = 32;

/// Reads ahead into a buffer that grows with the traffic and that is held only while it has
/// something to give; writes pass through.
#[derive(Debug)]
pub(super) struct ReadAhead<T> {
    inner: T,
    buffer: Option<Buffer>,
    /// Size of the next buffer, bytes.
    size: usize,
    /// What of the buffer is unread.
    unread: std::ops::Range<usize>,
    /// Reads in a row that would have fitted a quarter of the buffer.
    lean: u8,
}

impl<T> ReadAhead<T> {
    pub(super) fn new(inner: T) -> Self {
        Self { inner, buffer: None, size: SMALLEST, unread: 0..0, lean: 0 }
    }

    pub(super) fn get_ref(&self) -> &T {
        &self.inner
    }

    /// Fits the size of the next buffer to what a read brought.
    fn fit(&mut self, read: usize) {
        self.lean = if read <= self.size / 4 { self.lean.saturating_add(1) } else { 0 };
        if read == self.size && self.size < LARGEST {
            self.size *= 4;
        } else if self.lean >= LEAN_READS && self.size > SMALLEST {
            self.size /= 4;
            self.lean = 0;
        }
    }
}

impl<T: AsyncRead + Unpin> AsyncRead for ReadAhead<T> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        out: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        if this.unread.is_empty() {
            let mut buffer = match this.buffer.take() {
                Some(buffer) if buffer.len() == this.size => buffer,
                _ => Buffer::take(this.size),
            };
            // Dropped, and so given back, while there is nothing to read.
            let mut into = ReadBuf::new(&mut buffer);
            ready!(Pin::new(&mut this.inner).poll_read(cx, &mut into))?;
            this.unread = 0..into.filled().len();
            this.fit(this.unread.end);
            this.buffer = Some(buffer);
        }
        let Some(buffer) = &this.buffer else { return Poll::Ready(Ok(())) };
        let n = this.unread.len().min(out.remaining());
        out.put_slice(&buffer[this.unread.start..this.unread.start + n]);
        this.unread.start += n;
        Poll::Ready(Ok(()))
    }
}

impl<T: AsyncWrite + Unpin> AsyncWrite for ReadAhead<T> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.inner).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.inner).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.inner.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt, duplex},
        time::timeout,
    };

    use super::*;

    #[tokio::test]
    async fn grows_with_bulk_shrinks_with_trickle_and_loses_nothing() {
        let (mut writer, reader) = duplex(LARGEST);
        let mut reader = ReadAhead::new(reader);
        let bulk: Vec<u8> = (0..4 * LARGEST).map(|i| (i % 251) as u8).collect();
        let expected = bulk.clone();
        let writing = tokio::spawn(async move {
            writer.write_all(&bulk).await.unwrap();
            writer
        });
        let mut got = vec![0; expected.len()];
        reader.read_exact(&mut got).await.unwrap();
        assert!(got == expected);
        assert_eq!(reader.size, LARGEST);

        let mut writer = writing.await.unwrap();
        for i in 0..200u8 {
            writer.write_all(&[i]).await.unwrap();
            assert_eq!(reader.read_u8().await.unwrap(), i);
        }
        assert_eq!(reader.size, SMALLEST);
        assert!(timeout(Duration::from_millis(10), reader.read_u8()).await.is_err());
        assert!(reader.buffer.is_none(), "one that waits holds no buffer");
        drop(writer);
        assert_eq!(reader.read(&mut [0; 8]).await.unwrap(), 0);
        assert_eq!(reader.read(&mut [0; 8]).await.unwrap(), 0, "an end stays one");
    }
}
