//! The new agent's side.

use std::{
    os::fd::{AsFd, OwnedFd},
    path::Path,
    time::Duration,
};

use rustix::net::sockopt;

use super::{
    NodeSockets,
    channel::{Channel, ChannelError},
    message::{Endpoint, Hello, MAX_ENDPOINTS, Message},
};
use crate::{
    endpoint::{
        reconcile::{Control, Given},
        sockets,
        state::Standing,
    },
    netns::cookie_of_socket,
};

/// Between two looks whether everything is there.
const AGAIN: Duration = Duration::from_millis(200);

/// An agent that serves answers in this time, unless it is busy with another successor.
const FIRST_ANSWER: Duration = Duration::from_secs(2);

/// Why the old agent's place cannot be taken.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TakeError {
    /// It will not.
    #[error(
        "the agent that serves this node refuses to hand over: {0}; give both the same \
         configuration, or stop it first"
    )]
    Refused(String),
    /// It is not understood.
    #[error(
        "the agent that serves this node cannot hand over to this one: {0}; stop it first, and \
         start this one again"
    )]
    Channel(#[from] ChannelError),
    /// What came is not what was said.
    #[error("the agent that serves this node handed over {0}")]
    Wrong(&'static str),
}

/// What was handed over. The old agent waits for [`Taken::done`].
#[derive(Debug)]
pub struct Taken {
    /// The endpoints with their listeners.
    pub endpoints: Vec<Given>,
    /// The node's sockets.
    pub sockets: NodeSockets,
    channel: Channel,
}

impl Taken {
    /// Tells the old agent that this one serves. The connection's end then says that the old
    /// process has ended.
    ///
    /// # Errors
    /// When it is gone: nobody waits.
    pub async fn done(channel: &mut Channel) -> Result<(), ChannelError> {
        channel.send(&Message::Done, &[]).await
    }

    /// The parts.
    pub fn into_parts(self) -> (Vec<Given>, NodeSockets, Channel) {
        (self.endpoints, self.sockets, self.channel)
    }
}

/// True when an agent that hands over serves the node of this run directory. Asked before
/// anything is made.
///
/// # Errors
/// [`TakeError`] when it will not hand over to this one.
pub async fn is_served(socket: &Path, own: &Hello) -> Result<bool, TakeError> {
    let Some(mut channel) = Channel::connect(socket).await? else { return Ok(false) };
    let answer = async {
        // Who refuses closes at once, maybe before the question: the refusal is there to be read.
        let mut asked = Ok(());
        for message in [Message::Hello(own.clone()), Message::Ask] {
            if asked.is_ok() {
                asked = channel.send(&message, &[]).await;
            }
        }
        channel.receive().await.map_err(|error| asked.err().unwrap_or(error))
    };
    match tokio::time::timeout(FIRST_ANSWER, answer).await {
        Ok(Ok((Message::Refused(why), _))) => Err(TakeError::Refused(why)),
        Ok(Err(error)) if !error.is_gone() => Err(error.into()),
        // Also when it is busy with another one: its turn comes.
        _ => Ok(true),
    }
}

/// Gets ready and takes everything over; `None` when whoever served the node is gone, so that
/// nothing is left to be taken over. `waits` hears what is missing meanwhile.
///
/// # Errors
/// [`TakeError`]: the old agent goes on.
pub async fn take(
    socket: &Path,
    own: &Hello,
    control: &Control,
    mut waits: impl FnMut(&str),
) -> Result<Option<Taken>, TakeError> {
    loop {
        let Some(mut channel) = Channel::connect(socket).await? else { return Ok(None) };
        match converse(&mut channel, own, control, &mut waits).await {
            Ok((endpoints, sockets)) => return Ok(Some(Taken { endpoints, sockets, channel })),
            // It has ended, or takes us for one that has: whether somebody answers tells.
            Err(TakeError::Channel(error)) if error.is_gone() => tokio::time::sleep(AGAIN).await,
            Err(error) => return Err(error),
        }
    }
}

async fn converse(
    channel: &mut Channel,
    own: &Hello,
    control: &Control,
    waits: &mut impl FnMut(&str),
) -> Result<(Vec<Given>, NodeSockets), TakeError> {
    channel.send(&Message::Hello(own.clone()), &[]).await?;
    loop {
        channel.send(&Message::Ask, &[]).await?;
        let standing = listed(channel).await?;
        match control.prepare(standing).await {
            Ok(()) => {}
            Err(why) => {
                waits(&why);
                tokio::time::sleep(AGAIN).await;
                continue;
            }
        }
        channel.send(&Message::TakeOver, &[]).await?;
        match handed_over(channel).await? {
            Ok(all) => return Ok(all),
            Err(why) => {
                waits(&format!("the agent that serves the node does not hand over yet: {why}"));
                tokio::time::sleep(AGAIN).await;
            }
        }
    }
}

async fn listed(channel: &mut Channel) -> Result<Vec<Standing>, TakeError> {
    let mut all = Vec::new();
    loop {
        match channel.receive().await?.0 {
            Message::Stands(endpoint) if all.len() < MAX_ENDPOINTS => all.push(endpoint.standing()),
            Message::Listed(count) if count as usize == all.len() => return Ok(all),
            Message::Refused(why) => return Err(TakeError::Refused(why)),
            _ => return Err(TakeError::Wrong("a list that is none")),
        }
    }
}

/// Everything, or why not yet.
async fn handed_over(
    channel: &mut Channel,
) -> Result<Result<(Vec<Given>, NodeSockets), String>, TakeError> {
    let (mut endpoints, mut sockets) = (Vec::new(), Vec::new());
    loop {
        let (message, mut descriptors) = channel.receive().await?;
        match message {
            Message::Endpoint(endpoint) if endpoints.len() < MAX_ENDPOINTS => {
                endpoints.push(given(&endpoint, descriptors)?);
            }
            Message::Socket(socket) if sockets.len() < 16 => {
                let (Some(descriptor), true) = (descriptors.pop(), descriptors.is_empty()) else {
                    return Err(TakeError::Wrong("a socket without its descriptor"));
                };
                sockets.push((socket, descriptor));
            }
            Message::Yours(totals)
                if totals.endpoints as usize == endpoints.len()
                    && totals.sockets as usize == sockets.len() =>
            {
                return Ok(Ok((endpoints, sockets)));
            }
            Message::Refused(why) if endpoints.is_empty() && sockets.is_empty() => {
                return Ok(Err(why));
            }
            _ => return Err(TakeError::Wrong("something else than it said")),
        }
    }
}

/// An endpoint with its listeners, each a listening socket in the pod's network namespace.
fn given(endpoint: &Endpoint, descriptors: Vec<OwnedFd>) -> Result<Given, TakeError> {
    let standing = endpoint.standing();
    let Some(listeners) = endpoint.listeners else {
        if !descriptors.is_empty() {
            return Err(TakeError::Wrong("sockets of an endpoint without listeners"));
        }
        return Ok(Given { standing, listeners: None });
    };
    if listeners.count() != descriptors.len() {
        return Err(TakeError::Wrong("another number of listeners than it said"));
    }
    for descriptor in &descriptors {
        let listens = sockopt::socket_acceptconn(descriptor.as_fd()).unwrap_or(false);
        let netns = cookie_of_socket(descriptor.as_fd()).ok();
        if !listens || netns != Some(endpoint.netns) {
            return Err(TakeError::Wrong("a socket that does not listen in its pod"));
        }
    }
    let mut descriptors = descriptors.into_iter();
    let outbound = descriptors.by_ref().take(usize::from(listeners.outbound)).collect();
    let inbound_v4 = listeners.inbound4.then(|| descriptors.next()).flatten();
    let inbound_v6 = listeners.inbound6.then(|| descriptors.next()).flatten();
    let listeners =
        sockets::Listeners { outbound, inbound_v4, inbound_v6, ports: listeners.ports() };
    Ok(Given { standing, listeners: Some(listeners) })
}

#[cfg(test)]
mod tests {
    use tokio::net::UnixListener;

    use super::*;

    #[tokio::test]
    async fn a_refusal_is_heard_though_its_connection_is_closed_at_once() {
        if !rustix::process::geteuid().is_root() {
            eprintln!("skipped: the other end must be root's");
            return;
        }
        let own = Hello {
            node: "node-1".into(),
            instance: "other".into(),
            bpffs: "/sys/fs/bpf".into(),
            cgroup_root: "/kubepods".into(),
            version: "0".into(),
            abi: 1,
        };
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("handover.sock");
        let listener = UnixListener::bind(&socket).unwrap();
        tokio::spawn(async move {
            // Nothing is read: what is said to a closed connection fails.
            while let Ok((stream, _)) = listener.accept().await {
                let mut channel = Channel::of(stream).unwrap();
                channel.send(&Message::refusal("not yours"), &[]).await.unwrap();
            }
        });
        for _ in 0..50 {
            match is_served(&socket, &own).await {
                Err(TakeError::Refused(why)) => assert_eq!(why, "not yours"),
                other => panic!("{other:?}"),
            }
        }
        // The control: nobody there is no refusal.
        assert!(!is_served(&directory.path().join("none.sock"), &own).await.unwrap());
    }
}
