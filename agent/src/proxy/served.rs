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
    connections: AtomicU32,
    handshakes: Mutex<Handshakes>,
}

#[derive(Debug, Default)]
struct Handshakes {
    all: u32,
    by_source: HashMap<IpAddr, u32>,
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
    Connection,
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
            connections: AtomicU32::new(0),
            handshakes: Mutex::default(),
        })
    }

    /// How many flows are open or being opened.
    pub fn open_flows(&self) -> u32 {
        self.flows.load(Ordering::Acquire)
    }

    /// A place for an open flow, if fewer than `limit` are taken.
    pub fn flow(self: &Arc<Self>, limit: u32) -> Option<Place> {
        self.counted(&self.flows, limit, Kind::Flow)
    }

    /// A place for an inbound tunnel connection.
    pub fn connection(self: &Arc<Self>, limit: u32) -> Option<Place> {
        self.counted(&self.connections, limit, Kind::Connection)
    }

    /// A place for a handshake in flight with `source`.
    pub fn handshake(
        self: &Arc<Self>,
        source: IpAddr,
        limit: u32,
        limit_per_source: u32,
    ) -> Option<Place> {
        let mut handshakes = self.handshakes();
        let of_source = handshakes.by_source.get(&source).copied().unwrap_or(0);
        if handshakes.all >= limit || of_source >= limit_per_source {
            return None;
        }
        handshakes.all += 1;
        handshakes.by_source.insert(source, of_source + 1);
        Some(Place { served: self.clone(), of: Kind::Handshake(source) })
    }

    fn counted(self: &Arc<Self>, counter: &AtomicU32, limit: u32, of: Kind) -> Option<Place> {
        counter
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, |n| (n < limit).then_some(n + 1))
            .ok()?;
        Some(Place { served: self.clone(), of })
    }

    fn handshakes(&self) -> MutexGuard<'_, Handshakes> {
        // Nothing panics between the two counts.
        self.handshakes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        match self.of {
            Kind::Flow => drop(self.served.flows.fetch_sub(1, Ordering::AcqRel)),
            Kind::Connection => drop(self.served.connections.fetch_sub(1, Ordering::AcqRel)),
            Kind::Handshake(source) => {
                let mut handshakes = self.served.handshakes();
                handshakes.all = handshakes.all.saturating_sub(1);
                if let Some(n) = handshakes.by_source.get_mut(&source) {
                    *n = n.saturating_sub(1);
                    if *n == 0 {
                        handshakes.by_source.remove(&source);
                    }
                }
            }
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
        let held: Vec<_> = (0..2).map(|_| served.handshake(a, 3, 2).unwrap()).collect();
        assert!(served.handshake(a, 3, 2).is_none(), "the source's share is used up");
        let other = served.handshake(b, 3, 2).unwrap();
        assert!(served.handshake(b, 3, 2).is_none(), "the endpoint's limit is reached");
        drop((held, other));
        assert!(served.handshake(a, 3, 2).is_some());
        assert!(served.handshakes().by_source.is_empty(), "no row outlives its handshakes");
    }
}
