//! The server's end: reads one request at a time, leaves the answer to others.

use std::time::Duration;

use signet_ebpf::abi::Reason;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    time::timeout,
};

use super::{
    client::EARLY,
    copy::Stream,
    frame::{Kind, Open, Status},
    link::{Event, Link, NativeError},
};
use crate::{policy::model::PolicyName, tunnel::buffers::Buffer};

/// How long a server waits, after its goodbye, for what was on its way to it: were the socket
/// closed over it, the kernel's reset would overtake the goodbye.
const LINGER: Duration = Duration::from_secs(1);
/// How long a refused client may take to end its direction, if the connection is to be used on.
const REFUSED_ENDS_WITHIN: Duration = Duration::from_secs(5);
/// Frames that a client may have under way before it hears of a refusal, beside [`EARLY`].
const SLACK: usize = 4 << 10;

/// A connection on which no flow is open.
#[derive(Debug)]
pub struct Connection<T> {
    link: Link<T>,
}

/// A request that waits for its answer. Dropped unanswered, the connection closes and the
/// client takes its flow for broken.
#[derive(Debug)]
pub struct Incoming<T> {
    /// What it asks for.
    pub open: Open,
    link: Link<T>,
    /// What the client has said already.
    early: Vec<u8>,
    /// The client has ended its direction.
    end: bool,
}

impl<T> Connection<T> {
    /// A connection over an authenticated byte stream that nothing was sent on.
    pub fn new(io: T) -> Self {
        Self { link: Link::new(io) }
    }

    pub(super) fn recycled(link: Link<T>) -> Self {
        Self { link }
    }
}

impl<T: AsyncRead + AsyncWrite + Unpin> Connection<T> {
    /// Waits for the next request; `None` when the client has closed the connection between flows.
    /// Once its first byte is there, the rest has to come `within`.
    ///
    /// Cancel-safe.
    pub async fn next(&mut self, within: Duration) -> Result<Option<Asked>, NativeError> {
        self.link.begun().await?;
        let event = match timeout(within, self.link.event()).await {
            Ok(event) => event?,
            Err(_) => return Err(NativeError::Slow(within)),
        };
        match event {
            // Of the flow before, which had ended here: the client's application did not take its
            // last bytes. The client closes the connection.
            Event::End | Event::Reset(_) => Ok(None),
            Event::Open(open) => Ok(Some(Asked(open))),
            other => Err(unexpected(&other)),
        }
    }

    /// The request that [`Connection::next`] has read, with its connection.
    pub fn take(self, asked: Asked) -> Incoming<T> {
        Incoming { open: asked.0, link: self.link, early: Vec::new(), end: false }
    }

    /// Says that no further request is served, and closes. A request that crosses with it was
    /// not looked at; its client asks on another connection.
    pub async fn goodbye(mut self) -> Result<(), NativeError> {
        let bye = async {
            self.link.queue_close();
            self.link.send().await?;
            self.link.shutdown().await?;
            // Whatever was on its way, until the client has closed.
            let mut left = EARLY + SLACK;
            loop {
                match self.link.event().await {
                    Ok(Event::Data(n)) if n <= left => {
                        left -= n;
                        skip(&mut self.link).await?;
                    }
                    Ok(Event::Open(_) | Event::Fin) => {}
                    _ => return Ok(()),
                }
            }
        };
        // Who neither says anything nor closes has nothing under way.
        timeout(LINGER, bye).await.unwrap_or(Ok(()))
    }
}

/// A request as it was read.
#[derive(Debug)]
pub struct Asked(Open);

impl<T: AsyncRead + AsyncWrite + Unpin> Incoming<T> {
    /// Completes when the client has given the flow up or the connection is gone; holds what
    /// the client says meanwhile, at most [`EARLY`] bytes.
    ///
    /// Cancel-safe.
    pub async fn abandoned(&mut self) {
        loop {
            if self.end || self.early.len() >= EARLY {
                // It may say no more before the answer. Whether it is still there is seen then.
                return std::future::pending().await;
            }
            match self.link.event().await {
                Ok(Event::Data(_)) => {
                    let mut part = Buffer::take((EARLY - self.early.len()).min(16 << 10));
                    let room = (EARLY - self.early.len()).min(part.len());
                    let read =
                        std::future::poll_fn(|cx| self.link.poll_data(cx, &mut part[..room]));
                    match read.await {
                        Ok(n) => self.early.extend(&part[..n]),
                        Err(_) => return,
                    }
                }
                Ok(Event::Fin) => self.end = true,
                // A reset, the end, or what has no place here: nobody waits for an answer.
                _ => return,
            }
        }
    }

    /// Bytes that the client has said already.
    #[cfg(test)]
    pub(super) fn held(&self) -> usize {
        self.early.len()
    }

    /// Answers that the application has accepted. The answer leaves with the flow's first turn.
    pub fn accept(mut self) -> Stream<T> {
        self.link.queue(|out| Status::Accepted.encode(out));
        Stream::of_server(self.link, self.early, self.end)
    }

    /// Answers with a refusal. The connection comes back when the client has ended its
    /// direction in order, ready for the next request.
    pub async fn refuse(
        mut self,
        reason: Reason,
        policy: Option<PolicyName>,
    ) -> Option<Connection<T>> {
        self.link.queue(|out| Status::Refused { reason, policy }.encode(out));
        let ended = async {
            self.link.send().await?;
            let mut left = (EARLY + SLACK).saturating_sub(self.early.len());
            while !self.end {
                match self.link.event().await? {
                    Event::Fin => self.end = true,
                    Event::Data(n) if n <= left => {
                        left -= n;
                        skip(&mut self.link).await?;
                    }
                    other => return Err(unexpected(&other)),
                }
            }
            Ok(())
        };
        match timeout(REFUSED_ENDS_WITHIN, ended).await {
            Ok(Ok(())) => Some(Connection::recycled(self.link)),
            // It closes; the client, who was told, dials anew.
            Ok(Err(_)) | Err(_) => None,
        }
    }
}

/// Takes a DATA frame and forgets it.
async fn skip<T: AsyncRead + Unpin>(link: &mut Link<T>) -> Result<(), NativeError> {
    let mut buffer = Buffer::take(16 << 10);
    while link.has_data() {
        std::future::poll_fn(|cx| link.poll_data(cx, &mut buffer)).await?;
    }
    Ok(())
}

fn unexpected(event: &Event) -> NativeError {
    NativeError::Unexpected(match event {
        Event::Data(_) => Kind::Data,
        Event::Open(_) => Kind::Open,
        Event::Fin => Kind::Fin,
        Event::Reset(_) => Kind::Reset,
        Event::Status(_) => Kind::Status,
        Event::Close => Kind::Close,
        Event::End => return NativeError::Truncated,
    })
}
