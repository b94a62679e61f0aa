//! Connections to the Workload API: who made each, and how many one caller may have.

use std::{
    collections::HashMap,
    fmt, io,
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    task::{Context, Poll},
    time::Duration,
};

use futures_util::{Stream, stream};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{UnixListener, UnixStream},
    time,
};
use tonic::transport::server::Connected;

use super::{
    WorkloadKey,
    attest::{Caller, Method},
    authority::AuthorityFilter,
    counters::Counters,
};

/// A wait after an error of `accept`, above all of too many open files.
const PAUSE: Duration = Duration::from_millis(100);

/// Bytes that are read at once: requests are small.
const READ: usize = 4096;

/// What is counted together.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub enum Payer {
    /// A workload, whose users are its own.
    Workload(WorkloadKey),
    /// All processes of a user that are no workload's.
    User(u32),
}

/// Counts something by payer; a slot is given back when it is dropped.
#[derive(Clone, Default)]
pub struct Slots(Arc<Mutex<HashMap<Payer, usize>>>);

/// One of a payer's.
pub struct Slot {
    slots: Slots,
    payer: Payer,
}

impl Slots {
    /// A slot, unless the payer has `most` already.
    pub fn take(&self, payer: &Payer, most: usize) -> Option<Slot> {
        let mut table = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let count = table.entry(payer.clone()).or_default();
        if *count >= most {
            return None;
        }
        *count += 1;
        Some(Slot { slots: self.clone(), payer: payer.clone() })
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        let mut table = self.slots.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = table.get_mut(&self.payer) {
            *count -= 1;
            if *count == 0 {
                table.remove(&self.payer);
            }
        }
    }
}

impl fmt::Debug for Slot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Slot").field(&self.payer).finish()
    }
}

/// A connection whose caller is known.
#[derive(Debug)]
pub struct Connection {
    stream: UnixStream,
    filter: AuthorityFilter,
    /// Bytes that came and have passed the filter.
    ready: Vec<u8>,
    caller: Arc<Caller>,
    _slot: Slot,
}

/// What takes connections in.
pub struct Reception<F> {
    /// The socket.
    pub listener: UnixListener,
    /// How callers are told apart.
    pub method: Method,
    /// Gives a connection its slot, or says why there is none.
    pub admit: F,
    /// Where connections of nobody are counted.
    pub counters: Arc<Counters>,
}

impl<F: FnMut(&Caller) -> Option<Slot>> Reception<F> {
    /// The connections that are taken in. It never ends, and has no errors: what cannot be
    /// told apart or is too many is closed.
    pub fn connections(self) -> impl Stream<Item = io::Result<Connection>> {
        stream::unfold(self, |mut reception| async move {
            loop {
                match reception.listener.accept().await {
                    Ok((stream, _)) => {
                        if let Some(connection) = reception.take_in(stream).await {
                            return Some((Ok(connection), reception));
                        }
                    }
                    Err(error) => {
                        tracing::warn!(%error, "a connection to the Workload API was lost");
                        time::sleep(PAUSE).await;
                    }
                }
            }
        })
    }

    async fn take_in(&mut self, stream: UnixStream) -> Option<Connection> {
        let caller = match Caller::of(&stream, &self.method).await {
            Ok(caller) => Arc::new(caller),
            Err(error) => {
                tracing::debug!(%error, "a connection to the Workload API was closed");
                self.counters.unattested(error.kind());
                return None;
            }
        };
        let Some(slot) = (self.admit)(&caller) else {
            tracing::debug!(?caller, "too many connections to the Workload API: closed");
            return None;
        };
        Some(Connection {
            stream,
            filter: AuthorityFilter::new(),
            ready: Vec::new(),
            caller,
            _slot: slot,
        })
    }
}

impl Connected for Connection {
    type ConnectInfo = Arc<Caller>;

    fn connect_info(&self) -> Self::ConnectInfo {
        Arc::clone(&self.caller)
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        while this.ready.is_empty() {
            let mut came = [0; READ];
            let mut came = ReadBuf::new(&mut came);
            match Pin::new(&mut this.stream).poll_read(cx, &mut came) {
                Poll::Ready(Ok(())) => {}
                other => return other,
            }
            if came.filled().is_empty() {
                this.filter.end(&mut this.ready);
                if this.ready.is_empty() {
                    return Poll::Ready(Ok(()));
                }
            }
            this.filter.feed(came.filled(), &mut this.ready);
        }
        let len = this.ready.len().min(buf.remaining());
        buf.put_slice(&this.ready[..len]);
        this.ready.drain(..len);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Connection {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_payer_has_its_own_slots() {
        let slots = Slots::default();
        let (one, two) = (Payer::User(1), Payer::User(2));
        let held: Vec<_> = (0..3).map_while(|_| slots.take(&one, 3)).collect();
        assert_eq!(held.len(), 3);
        assert!(slots.take(&one, 3).is_none());
        assert!(slots.take(&two, 3).is_some());
        drop(held);
        assert!(slots.take(&one, 1).is_some());
        assert!(slots.0.lock().unwrap().is_empty(), "nothing is kept of those that are gone");
    }
}
