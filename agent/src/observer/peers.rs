//! Hubble's peer service: which nodes there are, and where their observers listen.

use std::{
    collections::{BTreeMap, VecDeque},
    net::{IpAddr, SocketAddr},
    pin::Pin,
    sync::Arc,
};

use futures_util::{Stream, stream};
use tokio::sync::watch;
use tonic::{Request, Response, Status};

use crate::{
    cluster::model::World,
    proto::peer::{
        ChangeNotification, ChangeNotificationType as Change, NotifyRequest, Tls,
        peer_server::{self, PeerServer},
    },
};

/// Answers the peer service of one agent.
#[derive(Clone, Debug)]
pub struct Peers {
    worlds: watch::Receiver<Arc<World>>,
    listen: Option<SocketAddr>,
    server_name: Arc<str>,
}

impl Peers {
    /// `listen` is where this agent's observer listens, and so every other's: nodes are
    /// configured alike. `server_name` is the name in their certificates, `*` for the node's.
    pub fn new(
        worlds: watch::Receiver<Arc<World>>,
        listen: Option<SocketAddr>,
        server_name: &str,
    ) -> Self {
        Self { worlds, listen, server_name: server_name.into() }
    }

    /// The service, ready to be routed.
    pub fn into_service(self) -> PeerServer<Self> {
        PeerServer::new(self)
    }

    fn peers(&self, world: &World, listen: SocketAddr) -> BTreeMap<Arc<str>, Told> {
        let told = |(node, addresses): (&Arc<str>, &Vec<IpAddr>)| {
            let address = address(addresses, listen)?;
            // As Hubble's own agents do: a wildcard in a certificate stands for one label.
            let server_name = self.server_name.replacen('*', &node.replace('.', "-"), 1);
            Some((node.clone(), Told { address, server_name }))
        };
        world.nodes.iter().filter_map(told).collect()
    }
}

/// Where a node's observer is: an address of the family in which they listen.
fn address(addresses: &[IpAddr], listen: SocketAddr) -> Option<SocketAddr> {
    let fits = |ip: &&IpAddr| match listen.ip() {
        // Takes both.
        IpAddr::V6(own) if own.is_unspecified() => true,
        own => ip.is_ipv4() == own.is_ipv4(),
    };
    addresses.iter().find(fits).map(|ip| SocketAddr::new(*ip, listen.port()))
}

/// What a client knows of a peer.
#[derive(Clone, PartialEq, Eq, Debug)]
struct Told {
    address: SocketAddr,
    server_name: String,
}

impl Told {
    fn notification(&self, name: &str, change: Change) -> ChangeNotification {
        ChangeNotification {
            name: name.into(),
            address: self.address.to_string(),
            r#type: change.into(),
            tls: Some(Tls { server_name: self.server_name.clone() }),
        }
    }
}

/// What a client that knows `before` must hear to know `after`.
fn changes(
    before: &BTreeMap<Arc<str>, Told>,
    after: &BTreeMap<Arc<str>, Told>,
) -> VecDeque<ChangeNotification> {
    let gone = before
        .iter()
        .filter(|(name, _)| !after.contains_key(*name))
        .map(|(name, told)| told.notification(name, Change::PeerDeleted));
    let new = after.iter().filter_map(|(name, told)| match before.get(name) {
        None => Some(told.notification(name, Change::PeerAdded)),
        Some(old) if old != told => Some(told.notification(name, Change::PeerUpdated)),
        Some(_) => None,
    });
    gone.chain(new).collect()
}

/// One client's stream.
struct Notifying {
    peers: Peers,
    listen: SocketAddr,
    told: BTreeMap<Arc<str>, Told>,
    pending: VecDeque<ChangeNotification>,
}

impl Notifying {
    async fn step(mut self) -> Option<(Result<ChangeNotification, Status>, Self)> {
        loop {
            if let Some(notification) = self.pending.pop_front() {
                return Some((Ok(notification), self));
            }
            // The world ends with the agent.
            self.peers.worlds.changed().await.ok()?;
            let world = self.peers.worlds.borrow_and_update().clone();
            self.tell(&world);
        }
    }

    fn tell(&mut self, world: &World) {
        let now = self.peers.peers(world, self.listen);
        self.pending = changes(&self.told, &now);
        self.told = now;
    }
}

type Notifications = Pin<Box<dyn Stream<Item = Result<ChangeNotification, Status>> + Send>>;

#[tonic::async_trait]
impl peer_server::Peer for Peers {
    type NotifyStream = Notifications;

    async fn notify(&self, _: Request<NotifyRequest>) -> Result<Response<Notifications>, Status> {
        let Some(listen) = self.listen else {
            return Err(Status::failed_precondition(
                "observerListen is off: nodes serve flows on their own sockets only, where no \
                 peer can ask them; set it on all nodes",
            ));
        };
        let mut peers = self.clone();
        let world = peers.worlds.borrow_and_update().clone();
        let mut notifying =
            Notifying { peers, listen, told: BTreeMap::new(), pending: VecDeque::new() };
        notifying.tell(&world);
        Ok(Response::new(Box::pin(stream::unfold(notifying, Notifying::step))))
    }
}

#[cfg(test)]
mod tests {
    use futures_util::StreamExt as _;

    use super::*;
    use crate::spiffe::TrustDomain;

    fn world(nodes: &[(&str, &[&str])]) -> Arc<World> {
        let mut world = World::empty(TrustDomain::parse("cluster.local").unwrap());
        world.nodes = nodes
            .iter()
            .map(|(name, ips)| ((*name).into(), ips.iter().map(|ip| ip.parse().unwrap()).collect()))
            .collect();
        Arc::new(world)
    }

    async fn stream(peers: &Peers) -> Notifications {
        let asked = peer_server::Peer::notify(peers, Request::new(NotifyRequest {})).await;
        asked.unwrap().into_inner()
    }

    fn line(told: ChangeNotification) -> String {
        let name = told.tls.clone().unwrap().server_name;
        format!("{:?} {} {} {name}", told.r#type(), told.name, told.address)
    }

    #[tokio::test]
    async fn every_node_is_told_and_then_every_change() {
        let (worlds, seen) = watch::channel(world(&[
            ("a.x", &["fd00::1", "10.0.0.1"]),
            ("b", &["10.0.0.2"]),
            // Has no address where observers listen.
            ("c", &["fd00::3"]),
        ]));
        let listen = Some("0.0.0.0:4254".parse().unwrap());
        let peers = Peers::new(seen, listen, "*.hubble.test");
        let mut told = stream(&peers).await;
        let mut next = async || line(told.next().await.unwrap().unwrap());
        assert_eq!(next().await, "PeerAdded a.x 10.0.0.1:4254 a-x.hubble.test");
        assert_eq!(next().await, "PeerAdded b 10.0.0.2:4254 b.hubble.test");
        // A revision that changes no node is not told.
        let same = worlds.borrow().clone();
        worlds.send_replace(same);
        worlds.send_replace(world(&[("b", &["10.0.0.9"]), ("d", &["10.0.0.4"])]));
        assert_eq!(next().await, "PeerDeleted a.x 10.0.0.1:4254 a-x.hubble.test");
        assert_eq!(next().await, "PeerUpdated b 10.0.0.9:4254 b.hubble.test");
        assert_eq!(next().await, "PeerAdded d 10.0.0.4:4254 d.hubble.test");
        // Who comes later hears what there is.
        let mut later = stream(&peers).await;
        assert!(line(later.next().await.unwrap().unwrap()).starts_with("PeerAdded b 10.0.0.9"));
        drop(worlds);
        assert!(told.next().await.is_none(), "it ends with the agent");
    }

    #[tokio::test]
    async fn without_a_listener_there_are_no_peers() {
        let (_worlds, seen) = watch::channel(world(&[("a", &["10.0.0.1"])]));
        let peers = Peers::new(seen, None, "*");
        let asked = peer_server::Peer::notify(&peers, Request::new(NotifyRequest {})).await;
        let Err(status) = asked else { panic!("told") };
        assert_eq!(status.code(), tonic::Code::FailedPrecondition);
        assert!(status.message().starts_with("observerListen is off"), "{status}");
    }

    #[test]
    fn the_address_is_of_the_listeners_family() {
        let both = ["10.0.0.1".parse().unwrap(), "fd00::1".parse().unwrap()];
        let of = |listen: &str| address(&both, listen.parse().unwrap()).unwrap().to_string();
        assert_eq!(of("0.0.0.0:1"), "10.0.0.1:1");
        assert_eq!(of("[fd00::9]:1"), "[fd00::1]:1");
        assert_eq!(of("[::]:1"), "10.0.0.1:1");
        assert_eq!(address(&both[..1], "[fd00::9]:1".parse().unwrap()), None);
    }
}
