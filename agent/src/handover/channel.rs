//! Messages with descriptors over a unix stream socket: a length, then the message; descriptors
//! travel with its first byte (`SCM_RIGHTS`, unix(7)).

use std::{
    io::{self, IoSlice, IoSliceMut},
    mem::MaybeUninit,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::Path,
};

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use tokio::{io::Interest, net::UnixStream};

use super::message::{MAX_LEN, Message, MessageError};

/// The most descriptors of one message: an endpoint has at most seven listeners.
pub const MAX_DESCRIPTORS: usize = 16;

/// Bytes of the length before a message.
const LENGTH: usize = 4;

/// Why nothing more can be said.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ChannelError {
    /// The other agent is gone, or has closed.
    #[error("the other agent is gone")]
    Closed,
    /// The other end is not root's.
    #[error("the process at the other end belongs to user {0}, not to root")]
    NotRoot(u32),
    /// It says what this agent does not understand.
    #[error(transparent)]
    Message(#[from] MessageError),
    /// More descriptors than any message has, or fewer than it says.
    #[error("a message with descriptors that do not belong to it")]
    Descriptors,
    /// The system refuses.
    #[error("{0}")]
    Io(#[source] io::Error),
}

impl ChannelError {
    /// True where the other process has ended or closed the connection.
    pub fn is_gone(&self) -> bool {
        match self {
            Self::Closed => true,
            Self::Io(error) => matches!(
                error.kind(),
                io::ErrorKind::BrokenPipe
                    | io::ErrorKind::ConnectionReset
                    | io::ErrorKind::NotConnected
            ),
            _ => false,
        }
    }
}

/// A connection between two agents.
#[derive(Debug)]
pub struct Channel {
    stream: UnixStream,
}

impl Channel {
    /// Connects to the agent that serves; `None` where nobody answers.
    ///
    /// # Errors
    /// [`ChannelError::NotRoot`], or what the system refuses.
    pub async fn connect(path: &Path) -> Result<Option<Self>, ChannelError> {
        match UnixStream::connect(path).await {
            Ok(stream) => Self::of(stream).map(Some),
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused
                ) =>
            {
                Ok(None)
            }
            Err(error) => Err(ChannelError::Io(error)),
        }
    }

    /// A connection that was made; its other end must be root's.
    ///
    /// # Errors
    /// [`ChannelError::NotRoot`].
    pub fn of(stream: UnixStream) -> Result<Self, ChannelError> {
        let peer = stream.peer_cred().map_err(ChannelError::Io)?;
        if peer.uid() != 0 {
            return Err(ChannelError::NotRoot(peer.uid()));
        }
        Ok(Self { stream })
    }

    /// Says something, with descriptors, which stay open here.
    ///
    /// # Errors
    /// [`ChannelError`].
    pub async fn send(
        &mut self,
        message: &Message,
        descriptors: &[BorrowedFd<'_>],
    ) -> Result<(), ChannelError> {
        if descriptors.len() > MAX_DESCRIPTORS {
            return Err(ChannelError::Descriptors);
        }
        let body = message.to_bytes()?;
        let length = u32::try_from(body.len()).map_err(|_| MessageError::TooLong(body.len()))?;
        let mut bytes = length.to_be_bytes().to_vec();
        bytes.extend(body);
        let mut sent = 0;
        while sent < bytes.len() {
            let rest = bytes.get(sent..).unwrap_or_default();
            // The descriptors go with the first byte, once.
            let along = if sent == 0 { descriptors } else { &[] };
            let write = || send_once(self.stream.as_fd(), rest, along);
            sent +=
                self.stream.async_io(Interest::WRITABLE, write).await.map_err(ChannelError::Io)?;
        }
        Ok(())
    }

    /// What the other agent says next, with its descriptors.
    ///
    /// # Errors
    /// [`ChannelError`]; the connection is of no more use then.
    pub async fn receive(&mut self) -> Result<(Message, Vec<OwnedFd>), ChannelError> {
        let mut descriptors = Vec::new();
        let mut length = [0; LENGTH];
        self.fill(&mut length, &mut descriptors).await?;
        let length = u32::from_be_bytes(length) as usize;
        if length > MAX_LEN {
            return Err(MessageError::TooLong(length).into());
        }
        let mut body = vec![0; length];
        self.fill(&mut body, &mut descriptors).await?;
        Ok((Message::parse(&body)?, descriptors))
    }

    /// Completes when the other end is closed.
    pub async fn closed(&mut self) {
        while self.receive().await.is_ok() {}
    }

    async fn fill(
        &mut self,
        buffer: &mut [u8],
        descriptors: &mut Vec<OwnedFd>,
    ) -> Result<(), ChannelError> {
        let mut filled = 0;
        while filled < buffer.len() {
            let rest = buffer.get_mut(filled..).unwrap_or_default();
            let read = || receive_once(self.stream.as_fd(), rest, descriptors);
            let came =
                self.stream.async_io(Interest::READABLE, read).await.map_err(ChannelError::Io)?;
            match came {
                Came::Bytes(0) => return Err(ChannelError::Closed),
                Came::Bytes(n) => filled += n,
                Came::Cut => return Err(ChannelError::Descriptors),
            }
            if descriptors.len() > MAX_DESCRIPTORS {
                return Err(ChannelError::Descriptors);
            }
        }
        Ok(())
    }
}

enum Came {
    Bytes(usize),
    /// Descriptors came that there was no room for; the kernel has closed them.
    Cut,
}

fn send_once(
    socket: BorrowedFd<'_>,
    bytes: &[u8],
    descriptors: &[BorrowedFd<'_>],
) -> io::Result<usize> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
    let mut along = SendAncillaryBuffer::new(&mut space);
    if !descriptors.is_empty() && !along.push(SendAncillaryMessage::ScmRights(descriptors)) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    // A peer that is gone is an error here, not a signal.
    let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
    Ok(sendmsg(socket, &[IoSlice::new(bytes)], &mut along, flags)?)
}

fn receive_once(
    socket: BorrowedFd<'_>,
    buffer: &mut [u8],
    descriptors: &mut Vec<OwnedFd>,
) -> io::Result<Came> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
    let mut along = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
    let came = recvmsg(socket, &mut [IoSliceMut::new(buffer)], &mut along, flags)?;
    for message in along.drain() {
        if let RecvAncillaryMessage::ScmRights(came) = message {
            descriptors.extend(came);
        }
    }
    if came.flags.contains(ReturnFlags::CTRUNC) {
        return Ok(Came::Cut);
    }
    Ok(Came::Bytes(came.bytes))
}

#[cfg(test)]
mod tests {
    use std::{fs::File, io::Read as _, io::Seek as _, io::Write as _};

    use tokio::io::AsyncWriteExt as _;

    use super::*;

    fn is_root() -> bool {
        rustix::process::geteuid().is_root()
    }

    fn pair() -> (Channel, Channel) {
        let (a, b) = UnixStream::pair().unwrap();
        (Channel::of(a).unwrap(), Channel::of(b).unwrap())
    }

    #[tokio::test]
    async fn messages_come_in_order_with_their_descriptors() {
        if !is_root() {
            return;
        }
        let (mut a, mut b) = pair();
        let files: Vec<File> = (0..7)
            .map(|n| {
                let mut file = tempfile::tempfile().unwrap();
                file.write_all(&[n]).unwrap();
                file.rewind().unwrap();
                file
            })
            .collect();
        let told = tokio::spawn(async move {
            a.send(&Message::Ask, &[]).await.unwrap();
            for _ in 0..500 {
                let fds: Vec<_> = files.iter().map(AsFd::as_fd).collect();
                a.send(&Message::TakeOver, &fds).await.unwrap();
                a.send(&Message::refusal(&"x".repeat(1000)), &[]).await.unwrap();
            }
        });
        let (message, descriptors) = b.receive().await.unwrap();
        assert_eq!((message, descriptors.len()), (Message::Ask, 0));
        for round in 0..500 {
            let (message, descriptors) = b.receive().await.unwrap();
            assert_eq!((message, descriptors.len()), (Message::TakeOver, 7));
            if round == 0 {
                for (n, fd) in descriptors.into_iter().enumerate() {
                    let mut byte = [9];
                    File::from(fd).read_exact(&mut byte).unwrap();
                    assert_eq!(usize::from(byte[0]), n);
                }
            }
            let (message, descriptors) = b.receive().await.unwrap();
            assert!(matches!(message, Message::Refused(_)) && descriptors.is_empty());
        }
        told.await.unwrap();
        assert!(b.receive().await.unwrap_err().is_gone());
    }

    #[tokio::test]
    async fn what_is_no_message_ends_the_connection_with_a_reason() {
        if !is_root() {
            return;
        }
        for (bytes, why) in [
            (&[0xff; 8][..], "4096"),
            (&[0, 0, 0, 3, b'1', b' ', b'x'][..], "not a message"),
            (&[0, 0, 0, 8, b'9', b' ', b'"', b'd', b'o', b'n', b'e', b'"'][..], "version 9"),
        ] {
            let (mut raw, b) = UnixStream::pair().unwrap();
            let mut b = Channel::of(b).unwrap();
            raw.write_all(bytes).await.unwrap();
            let error = b.receive().await.unwrap_err();
            assert!(error.to_string().contains(why) && !error.is_gone(), "{error}");
        }
        // Cut in the middle of a message.
        let (mut raw, b) = UnixStream::pair().unwrap();
        let mut b = Channel::of(b).unwrap();
        raw.write_all(&[0, 0, 0, 9, b'1']).await.unwrap();
        drop(raw);
        assert!(b.receive().await.unwrap_err().is_gone());
    }
}
