//! An endpoint that the data plane serves: its lifetime and its limits.

use std::{
    collections::HashMap,
    net::IpAddr,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU32, Ordering},
    },
};

use tokio_util::sync::CancellationToken;

use crate::{endpoint::state::EndpointKey, netns::NetnsFd};

/// A served endpoint; shared by all cores.
#[derive(Debug)]
pub struct Served {
    /// Its key.
    pub key: EndpointKey,
    /// Where its sockets are made.
    pub netns: Arc<NetnsFd>,
    /// Takes nothing new any more.
    pub drain: CancellationToken,
    /// Everything of it ends now.
    pub cut: CancellationToken,
    flows: AtomicU32,
    connections: Mutex<Shares>,
    handshakes: Mutex<Shares>,
}

/// How many places are taken, in all and by each source.
#[derive(Debug, Default)]
struct Shares {
    all: u32,
    by_source: HashMap<IpAddr, u32>,
}

/// How many places there are.
#[derive(Clone, Copy, Debug)]
pub struct Room {
    /// In all.
    pub all: u32,
    /// For one source, so that none can take everybody's.
    pub per_source: u32,
}

impl Shares {
    fn take(&mut self, source: IpAddr, room: Room) -> bool {
        let of_source = self.by_source.get(&source).copied().unwrap_or(0);
        if self.all >= room.all || of_source >= room.per_source {
            return false;
        }
        self.all += 1;
        self.by_source.insert(source, of_source + 1);
        true
    }

    fn give_back(&mut self, source: IpAddr) {
        self.all = self.all.saturating_sub(1);
        if let Some(n) = self.by_source.get_mut(&source) {
            *n = n.saturating_sub(1);
            if *n == 0 {
                self.by_source.remove(&source);
            }
        }
    }
}

/// One of an endpoint's limited places, given back when dropped.
#[derive(Debug)]
pub struct Place {
    served: Arc<Served>,
    of: Kind,
}

#[derive(Debug)]
enum Kind {
    Flow,
    Connection(IpAddr),
    Handshake(IpAddr),
}

impl Served {
    /// A served endpoint that ends with the whole plane.
    pub fn new(
        key: EndpointKey,
        netns: Arc<NetnsFd>,
        drain: &CancellationToken,
        cut: &CancellationToken,
    ) -> Arc<Self> {
        Arc::new(Self {
            key,
            netns,
            drain: drain.child_token(),
            cut: cut.child_token(),
            flows: AtomicU32::new(0),
            connections: Mutex::default(),
            handshakes: Mutex::default(),
        })
    }

    /// How many flows are open or being opened.
    pub fn open_flows(&self) -> u32 {
        self.flows.load(Ordering::Acquire)
    }

    /// A place for an open flow, if fewer than `limit` are taken.
    pub fn flow(self: &Arc<Self>, limit: u32) -> Option<Place> {
        self.flows
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, |n| (n < limit).then_some(n + 1))
            .ok()?;
        Some(Place { served: self.clone(), of: Kind::Flow })
    }

    /// A place for an inbound tunnel connection from `source`.
    pub fn connection(self: &Arc<Self>, source: IpAddr, room: Room) -> Option<Place> {
        lock(&self.connections)
            .take(source, room)
            .then(|| Place { served: self.clone(), of: Kind::Connection(source) })
    }

    /// A place for a handshake in flight with `source`.
    pub fn handshake(self: &Arc<Self>, source: IpAddr, room: Room) -> Option<Place> {
        lock(&self.handshakes)
            .take(source, room)
            .then(|| Place { served: self.clone(), of: Kind::Handshake(source) })
    }
}

fn lock(shares: &Mutex<Shares>) -> MutexGuard<'_, Shares> {
    // Nothing panics between the two counts.
    shares.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Drop for Place {
    fn drop(&mut self) {
        match self.of {
            Kind::Flow => drop(self.served.flows.fetch_sub(1, Ordering::AcqRel)),
            Kind::Connection(source) => lock(&self.served.connections).give_back(source),
            Kind::Handshake(source) => lock(&self.served.handshakes).give_back(source),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_hold_and_places_come_back() {
        let netns = Arc::new(NetnsFd::of_this_process().unwrap());
        let key = EndpointKey { uid: "u".into(), netns: netns.cookie };
        let root = CancellationToken::new();
        let served = Served::new(key, netns, &root, &root);

        let first = served.flow(2);
        let second = served.flow(2);
        assert!(first.is_some() && second.is_some() && served.flow(2).is_none());
        drop(first);
        assert!(served.flow(2).is_some());

        let (a, b) = ("10.0.0.1".parse().unwrap(), "10.0.0.2".parse().unwrap());
        let room = Room { all: 3, per_source: 2 };
        for take in [Served::handshake, Served::connection] {
            let held: Vec<_> = (0..2).map(|_| take(&served, a, room).unwrap()).collect();
            assert!(take(&served, a, room).is_none(), "the source's share is used up");
            let other = take(&served, b, room).unwrap();
            assert!(take(&served, b, room).is_none(), "the endpoint's limit is reached");
            drop((held, other));
            assert!(take(&served, a, room).is_some());
        }
        for shares in [&served.handshakes, &served.connections] {
            assert!(lock(shares).by_source.is_empty(), "no row outlives its places");
        }
    }
}
