//! Addresses that travel with sockets: what a redirected client dialled, and which client
//! an application shall see.

use std::{
    net::SocketAddr,
    os::fd::{AsRawFd, BorrowedFd},
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use aya::maps::{HashMap, Map, MapData, MapError, SkStorage};
use signet_ebpf::abi::{FlowKey, Handover, Ip};

use super::{KernelError, clock, pins::directories};

/// The data plane's side of the address hand-over; shared by all its cores.
#[derive(Debug)]
pub struct FlowSockets {
    accepted: SkStorage<MapData, Handover>,
    pins: PathBuf,
    /// Other versions' maps of accepted sockets: while one agent takes over from another, each
    /// may accept what the other's programs have led to it.
    others: Mutex<Others>,
    /// Shards by port, so that cores do not wait for each other: aya's writers take `&mut`.
    shards: Vec<Mutex<Shard>>,
}

#[derive(Debug, Default)]
struct Others {
    looked: Option<Instant>,
    accepted: Vec<SkStorage<MapData, Handover>>,
}

#[derive(Debug)]
struct Shard {
    client_of: SkStorage<MapData, Handover>,
    clients: HashMap<MapData, FlowKey, Handover>,
}

/// How often other versions' maps are looked for at most.
const LOOK_EVERY: Duration = Duration::from_millis(20);

/// Whether an application's socket has got its client's address.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Confirm {
    /// The application's socket holds it; the entry is deleted.
    Taken,
    /// The entry is there and no socket has taken it yet: the application's end is not
    /// established. Ask again shortly, and give up by [`FlowSockets::forget_client`].
    Waiting,
    /// There is no entry: no connect was seen, or the map was full.
    Missing,
}

impl FlowSockets {
    /// Opens the pinned maps of `pins`, the directory of the running ABI.
    ///
    /// # Errors
    /// Names the map that is missing or has another layout.
    pub fn open(pins: &Path) -> Result<Self, KernelError> {
        let shards = std::thread::available_parallelism().map_or(1, |n| n.get().min(64));
        let shards = (0..shards)
            .map(|_| {
                Ok(Mutex::new(Shard {
                    client_of: open(pins, "CLIENT_OF", Map::SkStorage)?,
                    clients: open(pins, "CLIENTS", Map::HashMap)?,
                }))
            })
            .collect::<Result<_, KernelError>>()?;
        Ok(Self {
            accepted: open(pins, "ACCEPTED", Map::SkStorage)?,
            pins: pins.to_owned(),
            others: Mutex::default(),
            shards,
        })
    }

    /// What the client of an accepted outbound socket dialled; `None` for a direct dial of
    /// the agent's port, which is to be closed.
    pub fn original(&self, socket: BorrowedFd<'_>) -> Option<SocketAddr> {
        let own = self.accepted.get(&socket.as_raw_fd(), 0).ok();
        let value = own.or_else(|| self.original_elsewhere(socket))?;
        Some(SocketAddr::new(value.ip.to_std(), value.port))
    }

    /// The same by another version's programs, where there are any. Rare: no redirected client
    /// comes here otherwise.
    fn original_elsewhere(&self, socket: BorrowedFd<'_>) -> Option<Handover> {
        let mut others = self.others.lock().unwrap_or_else(PoisonError::into_inner);
        if others.looked.is_none_or(|looked| looked.elapsed() >= LOOK_EVERY) {
            let base = self.pins.parent()?;
            // One of another layout cannot be read, and says nothing.
            let open = |dir: PathBuf| open(&dir, "ACCEPTED", Map::SkStorage).ok();
            others.accepted = directories(base).into_iter().filter_map(open).collect();
            others.looked = Some(Instant::now());
        }
        others.accepted.iter().find_map(|map| map.get(&socket.as_raw_fd(), 0).ok())
    }

    /// Makes the application's end of `socket`, which is not yet connected, show `client`.
    ///
    /// # Errors
    /// Where the kernel has no memory for the socket's storage.
    pub fn set_client(
        &self,
        socket: BorrowedFd<'_>,
        client: SocketAddr,
    ) -> Result<(), KernelError> {
        let value = Handover {
            time: clock::monotonic(),
            ip: Ip::from_std(client.ip()),
            port: client.port(),
            ..Handover::default()
        };
        let mut shard = self.shard(client.port());
        shard.client_of.insert(&socket.as_raw_fd(), value, 0).map_err(|source| KernelError::Map {
            map: "CLIENT_OF",
            action: "write",
            source,
        })
    }

    /// Asks whether the application's socket has taken the client's address; deletes the
    /// entry when it has.
    ///
    /// `key` is the connected socket as [`FlowSockets::client_key`] gives it.
    pub fn confirm_client(&self, key: &FlowKey) -> Confirm {
        let mut shard = self.shard(key.local_port);
        match shard.clients.get(key, 0) {
            Ok(value) if value.taken != 0 => {
                // Already gone is as good: nobody else writes this key.
                let _ = shard.clients.remove(key);
                Confirm::Taken
            }
            Ok(_) => Confirm::Waiting,
            Err(_) => Confirm::Missing,
        }
    }

    /// Deletes the entry of a dial that failed or was given up.
    pub fn forget_client(&self, key: &FlowKey) {
        let _ = self.shard(key.local_port).clients.remove(key);
    }

    /// The key of a dialling socket of the agent inside the namespace `netns`.
    pub fn client_key(netns: u64, local: SocketAddr, remote: SocketAddr) -> FlowKey {
        FlowKey {
            netns,
            local: Ip::from_std(local.ip()),
            remote: Ip::from_std(remote.ip()),
            local_port: local.port(),
            remote_port: remote.port(),
            // The programs leave it zero: a mapped address belongs to either family.
            family: 0,
        }
    }

    fn shard(&self, port: u16) -> std::sync::MutexGuard<'_, Shard> {
        let index = usize::from(port) % self.shards.len();
        // A panic elsewhere leaves nothing half-done: every operation is one system call.
        self.shards[index].lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Opens one pinned map as `T`.
fn open<T>(pins: &Path, name: &'static str, kind: fn(MapData) -> Map) -> Result<T, KernelError>
where
    T: TryFrom<Map, Error = MapError>,
{
    MapData::from_pin(pins.join(name))
        .and_then(|data| T::try_from(kind(data)))
        .map_err(|source| KernelError::Map { map: name, action: "open", source })
}
