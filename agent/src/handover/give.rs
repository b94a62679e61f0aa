//! The old agent's side.

use std::{os::fd::AsFd, time::Duration};

use tokio::{
    sync::{mpsc, oneshot},
    time::timeout,
};

use super::{
    NodeSockets,
    channel::{Channel, ChannelError},
    message::{Endpoint, Hello, Listeners, Message, Totals},
};
use crate::{
    endpoint::reconcile::{Control, Given},
    socket_file::BoundSocket,
};

/// A new agent that says nothing for so long is not one: it asks several times a second.
const SILENCE: Duration = Duration::from_secs(30);

/// What the process must do besides the reconciler.
#[derive(Debug)]
pub enum Request {
    /// Stop whatever two processes cannot do at a time, and answer with the node's sockets.
    Pause(oneshot::Sender<NodeSockets>),
    /// Go on as before.
    Continue,
}

/// Hands the node over to whoever asks rightly.
#[derive(Debug)]
pub struct Give {
    /// This agent.
    pub own: Hello,
    /// Its reconciler.
    pub control: Control,
    /// The process around it.
    pub process: mpsc::Sender<Request>,
}

/// How a conversation ended.
enum Ended {
    /// The other agent serves.
    Succeeded(Channel),
    /// Nothing was handed over.
    Left,
}

impl Give {
    /// Answers new agents, one at a time, until one serves in this one's place. The connection
    /// to it then says, by its end, that this process has ended.
    pub async fn run(self, socket: BoundSocket) -> Channel {
        let BoundSocket { listener, file } = socket;
        loop {
            let channel = match listener.accept().await {
                Ok((stream, _)) => Channel::of(stream),
                Err(error) => {
                    tracing::warn!(%error, "a successor could not be answered");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    continue;
                }
            };
            let outcome = match channel {
                Ok(channel) => self.converse(channel).await,
                Err(error) => Err(error),
            };
            match outcome {
                Ok(Ended::Succeeded(channel)) => {
                    file.leave();
                    return channel;
                }
                Ok(Ended::Left) => {}
                // Nobody's word: somebody looked whether an agent is here.
                Err(error) if error.is_gone() => {}
                Err(error) => tracing::warn!(%error, "a successor is not answered"),
            }
        }
    }

    async fn converse(&self, mut channel: Channel) -> Result<Ended, ChannelError> {
        let heard = hear(&mut channel).await?;
        let Message::Hello(hello) = heard else {
            refuse(&mut channel, "the first word is not hello").await?;
            return Ok(Ended::Left);
        };
        if let Some(why) = self.own.differs(&hello) {
            tracing::warn!(%why, "an agent asked for this one's place and is refused");
            refuse(&mut channel, &why).await?;
            return Ok(Ended::Left);
        }
        tracing::info!(version = %hello.version, abi = hello.abi, "a successor gets ready");
        loop {
            match hear(&mut channel).await? {
                Message::Ask => self.list(&mut channel).await?,
                Message::TakeOver => match self.hand_over(&mut channel).await {
                    Ok(true) => return Ok(Ended::Succeeded(channel)),
                    Ok(false) => {}
                    Err(error) => {
                        tracing::warn!(%error, "the hand-over was not completed");
                        self.go_on().await;
                        return Err(error);
                    }
                },
                other => {
                    refuse(&mut channel, &format!("{other:?} was not expected")).await?;
                    return Ok(Ended::Left);
                }
            }
        }
    }

    async fn list(&self, channel: &mut Channel) -> Result<(), ChannelError> {
        let standing = match self.control.list().await {
            Ok(standing) => standing,
            Err(why) => return refuse(channel, &why).await,
        };
        for standing in &standing {
            channel.send(&Message::Stands(Endpoint::of(standing)), &[]).await?;
        }
        channel.send(&Message::Listed(count(standing.len())), &[]).await
    }

    /// Hands everything over and waits until the new agent serves; false when this agent cannot
    /// at this moment. After an error it must go on ([`Self::go_on`]).
    async fn hand_over(&self, channel: &mut Channel) -> Result<bool, ChannelError> {
        let given = match self.control.give().await {
            Ok(given) => given,
            Err(why) => {
                refuse(channel, &why).await?;
                return Ok(false);
            }
        };
        let (reply, answer) = oneshot::channel();
        let asked = self.process.send(Request::Pause(reply)).await;
        let sockets = match asked {
            Ok(()) => answer.await.unwrap_or_default(),
            // The process ends.
            Err(_) => return Err(ChannelError::Closed),
        };
        let totals = Totals { endpoints: count(given.len()), sockets: count(sockets.len()) };
        for given in &given {
            send(channel, given).await?;
        }
        drop(given);
        for (socket, descriptor) in &sockets {
            channel.send(&Message::Socket(*socket), &[descriptor.as_fd()]).await?;
        }
        channel.send(&Message::Yours(totals), &[]).await?;
        // No limit: as long as that process is there it may write the maps, and two must not.
        // One that hangs fails its liveness probe and is ended.
        match channel.receive().await? {
            (Message::Done, _) => {
                self.control.retire().await;
                Ok(true)
            }
            _ => Err(ChannelError::Closed),
        }
    }

    async fn go_on(&self) {
        let _ = self.process.send(Request::Continue).await;
        self.control.resume().await;
    }
}

async fn send(channel: &mut Channel, given: &Given) -> Result<(), ChannelError> {
    let mut endpoint = Endpoint::of(&given.standing);
    let mut descriptors = Vec::new();
    if let Some(listeners) = &given.listeners {
        endpoint.listeners = Some(Listeners {
            port4: listeners.ports.v4,
            port6: listeners.ports.v6,
            outbound: u8::try_from(listeners.outbound.len()).unwrap_or(u8::MAX),
            inbound4: listeners.inbound_v4.is_some(),
            inbound6: listeners.inbound_v6.is_some(),
        });
        descriptors.extend(listeners.all().map(AsFd::as_fd));
    }
    channel.send(&Message::Endpoint(endpoint), &descriptors).await
}

/// The next word of one that gets ready; it has nothing to send along.
async fn hear(channel: &mut Channel) -> Result<Message, ChannelError> {
    match timeout(SILENCE, channel.receive()).await {
        Ok(heard) => heard.map(|(message, _)| message),
        Err(_) => Err(ChannelError::Io(std::io::ErrorKind::TimedOut.into())),
    }
}

async fn refuse(channel: &mut Channel, why: &str) -> Result<(), ChannelError> {
    channel.send(&Message::refusal(why), &[]).await
}

fn count(n: usize) -> u32 {
    u32::try_from(n).unwrap_or(u32::MAX)
}
