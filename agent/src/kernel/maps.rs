//! The maps, typed. The reconciler is the only writer; the counters have readers.

use std::path::Path;

use aya::{
    Ebpf, Pod,
    maps::{
        Array, HashMap, HashOfMaps, LpmTrie, Map, MapData, MapError, PerCpuArray, SockHash,
        lpm_trie::Key,
    },
};
use signet_ebpf::abi::{
    AddressEntry, Attestation, Config, DropKey, ExemptKey, FlowKey, Handover, IdentityName, Ip,
    ListenerKey, OwnAddressKey, PodEntry, PodName, PolicyKey, PolicyValue, RateWindow, ServiceKey,
    UdpFlow, counter,
};

use super::KernelError;

/// A pod's policy as the kernel walks it.
pub type PolicyMap = LpmTrie<MapData, PolicyKey, PolicyValue>;

/// `BPF_F_NO_PREALLOC`: the kernel wants it for tries, and inner maps must agree with the
/// outer map's template.
const NO_PREALLOC: u32 = 1;

/// `BPF_NOEXIST`.
const NO_EXIST: u64 = 1;

/// Most entries that one pod's policy may have: what the programs' template says.
pub const MAX_POLICY_ENTRIES: u32 = 4096;

/// Identities that the pinned table holds.
const MAX_IDENTITIES: u32 = 65_536;

/// Pods whose names the pinned table holds.
const MAX_NAMES: u32 = 16_384;

/// Names of the maps that are pinned; both objects share them.
pub(super) const PINNED: [&str; 29] = [
    "CONFIG",
    "PODS",
    "CGROUPS",
    "OWN",
    "ADDRESSES",
    "SERVICES",
    "RANGES",
    "EXEMPT",
    "POLICY",
    "PROBES",
    "ATTESTED",
    "ORIGINALS",
    "CLIENTS",
    "CUT",
    "UDP_FLOWS",
    "UDP_COUNTS",
    "GUARDED",
    "GUARD_FLOWS",
    "TUNNELS",
    "ARRIVED",
    "FRAGMENTS",
    "DROPS",
    "RATE",
    "COUNTERS",
    "EVENTS",
    "LISTENERS",
    "SHOWN",
    "ACCEPTED",
    "CLIENT_OF",
];

/// One table of the kernel that user space writes.
#[derive(Debug)]
pub struct Table<K: Pod, V: Pod> {
    name: &'static str,
    map: HashMap<MapData, K, V>,
    capacity: u32,
}

/// Every map that user space reads or writes.
#[allow(missing_docs, reason = "the names are the ABI's, described in the programs' maps.rs")]
pub struct Maps {
    config: Array<MapData, Config>,
    pub pods: Table<u64, PodEntry>,
    pub cgroups: Table<u64, u64>,
    pub own: Table<OwnAddressKey, u8>,
    pub addresses: Table<Ip, AddressEntry>,
    pub services: Table<ServiceKey, u32>,
    pub exempt: Table<ExemptKey, u8>,
    pub probes: Table<u64, u8>,
    pub attested: Table<FlowKey, Attestation>,
    pub originals: Table<FlowKey, Handover>,
    pub clients: Table<FlowKey, Handover>,
    pub cut: Table<FlowKey, u64>,
    pub udp_flows: Table<FlowKey, UdpFlow>,
    pub udp_counts: Table<u64, i64>,
    pub guarded: Table<u32, u64>,
    pub tunnels: Table<FlowKey, u64>,
    pub drops: Table<DropKey, u64>,
    pub rate: Table<u64, RateWindow>,
    pub identities: Table<u32, IdentityName>,
    pub names: Table<u64, PodName>,
    ranges: LpmTrie<MapData, [u8; 16], u32>,
    policy: HashOfMaps<MapData, u64, PolicyMap>,
    listeners: SockHash<MapData, ListenerKey>,
}

impl Maps {
    /// Takes the maps out of the loaded object `object`; the tables that no program reads are
    /// made here.
    pub(super) fn take(ebpf: &mut Ebpf, pins: &Path) -> Result<Self, KernelError> {
        let identities = Table::pinned(pins, "IDENTITIES", MAX_IDENTITIES)?;
        let names = Table::pinned(pins, "NAMES", MAX_NAMES)?;
        Ok(Self {
            config: take(ebpf, "CONFIG")?,
            pods: Table::take(ebpf, "PODS")?,
            cgroups: Table::take(ebpf, "CGROUPS")?,
            own: Table::take(ebpf, "OWN")?,
            addresses: Table::take(ebpf, "ADDRESSES")?,
            services: Table::take(ebpf, "SERVICES")?,
            exempt: Table::take(ebpf, "EXEMPT")?,
            probes: Table::take(ebpf, "PROBES")?,
            attested: Table::take(ebpf, "ATTESTED")?,
            originals: Table::take(ebpf, "ORIGINALS")?,
            clients: Table::take(ebpf, "CLIENTS")?,
            cut: Table::take(ebpf, "CUT")?,
            udp_flows: Table::take(ebpf, "UDP_FLOWS")?,
            udp_counts: Table::take(ebpf, "UDP_COUNTS")?,
            guarded: Table::take(ebpf, "GUARDED")?,
            tunnels: Table::take(ebpf, "TUNNELS")?,
            drops: Table::take(ebpf, "DROPS")?,
            rate: Table::take(ebpf, "RATE")?,
            identities,
            names,
            ranges: take(ebpf, "RANGES")?,
            policy: take(ebpf, "POLICY")?,
            listeners: take(ebpf, "LISTENERS")?,
        })
    }

    /// Takes over what another version's programs have noted of flows that go on, as far as its
    /// rows are like ours: UDP flows and probes. What is here already stays.
    pub fn carry(&mut self, pins: &Path) {
        self.udp_flows.carry(pins, "UDP_FLOWS");
        self.attested.carry(pins, "ATTESTED");
    }

    /// The configuration.
    pub fn config(&self) -> Result<Config, KernelError> {
        self.config.get(&0, 0).map_err(failed("CONFIG", "read"))
    }

    /// Replaces the configuration.
    pub fn set_config(&mut self, config: Config) -> Result<(), KernelError> {
        self.config.set(0, config, 0).map_err(failed("CONFIG", "write"))
    }

    /// Every range with its kind.
    pub fn ranges(&self) -> Result<Vec<((u32, [u8; 16]), u32)>, KernelError> {
        self.ranges
            .iter()
            .map(|row| row.map(|(key, kind)| ((key.prefix_len(), key.data()), kind)))
            .collect::<Result<_, _>>()
            .map_err(failed("RANGES", "read"))
    }

    /// Writes one range.
    pub fn set_range(&mut self, (bits, ip): (u32, [u8; 16]), kind: u32) -> Result<(), KernelError> {
        self.ranges.insert(&Key::new(bits, ip), kind, 0).map_err(|e| full_or("RANGES", "write", e))
    }

    /// Removes one range; a missing one is no error.
    pub fn remove_range(&mut self, (bits, ip): (u32, [u8; 16])) -> Result<(), KernelError> {
        gone_is_fine(self.ranges.remove(&Key::new(bits, ip)))
            .map_err(failed("RANGES", "remove from"))
    }

    /// Replaces a pod's whole policy by one write to the outer map.
    ///
    /// # Errors
    /// [`KernelError::PolicyTooLarge`], or [`KernelError::MapFull`] of the outer map.
    pub fn set_policy(
        &mut self,
        netns: u64,
        entries: &[(u32, PolicyKey, PolicyValue)],
    ) -> Result<(), KernelError> {
        if entries.len() > MAX_POLICY_ENTRIES as usize {
            return Err(KernelError::PolicyTooLarge {
                entries: entries.len(),
                max: MAX_POLICY_ENTRIES,
            });
        }
        let mut inner = PolicyMap::create(MAX_POLICY_ENTRIES, NO_PREALLOC)
            .map_err(failed("POLICY", "create"))?;
        for (bits, key, value) in entries {
            inner
                .insert(&Key::new(*bits, *key), *value, 0)
                .map_err(|e| full_or("POLICY", "write", e))?;
        }
        self.policy.insert(netns, &inner, 0).map_err(|e| full_or("POLICY", "write", e))
    }

    /// Removes a pod's policy; a missing one is no error.
    pub fn remove_policy(&mut self, netns: u64) -> Result<(), KernelError> {
        gone_is_fine(self.policy.remove(&netns)).map_err(failed("POLICY", "remove from"))
    }

    /// The network namespaces that have a policy.
    pub fn policies(&self) -> Result<Vec<u64>, KernelError> {
        self.policy.keys().collect::<Result<_, _>>().map_err(failed("POLICY", "read"))
    }

    /// Registers a listening socket for a pod's tunnels.
    pub fn set_listener(
        &mut self,
        key: ListenerKey,
        listener: &impl std::os::fd::AsRawFd,
    ) -> Result<(), KernelError> {
        self.listeners
            .insert(key, listener.as_raw_fd(), 0)
            .map_err(|e| full_or("LISTENERS", "write", e))
    }

    /// Removes a listener; a missing (or closed) one is no error.
    pub fn remove_listener(&mut self, key: &ListenerKey) -> Result<(), KernelError> {
        gone_is_fine(self.listeners.remove(key)).map_err(failed("LISTENERS", "remove from"))
    }
}

impl<K: Pod, V: Pod> Table<K, V> {
    /// A table for user space alone, opened where it is pinned, else made and pinned.
    fn pinned(pins: &Path, name: &'static str, entries: u32) -> Result<Self, KernelError> {
        let path = pins.join(name);
        if !path.exists() {
            HashMap::<MapData, K, V>::create(entries, NO_PREALLOC)
                .map_err(failed(name, "create"))?
                .pin(&path)
                .map_err(|error| KernelError::Map {
                    map: name,
                    action: "pin",
                    source: MapError::PinError { name: None, error },
                })?;
        }
        Self::open(pins, name)
    }

    /// The table pinned under its name in `pins`.
    pub(super) fn open(pins: &Path, name: &'static str) -> Result<Self, KernelError> {
        let data = MapData::from_pin(pins.join(name)).map_err(failed(name, "open"))?;
        Self::of(name, Map::HashMap(data))
    }

    fn of(name: &'static str, map: Map) -> Result<Self, KernelError> {
        let capacity = match &map {
            Map::HashMap(data) | Map::LruHashMap(data) => {
                data.info().map_err(failed(name, "describe"))?.max_entries()
            }
            // The conversion refuses it by its kind.
            _ => 0,
        };
        let map = HashMap::try_from(map).map_err(failed(name, "open"))?;
        Ok(Self { name, map, capacity })
    }

    fn take(ebpf: &mut Ebpf, name: &'static str) -> Result<Self, KernelError> {
        Self::of(name, found(ebpf, name)?)
    }

    /// A table that no program knows, for tests.
    #[cfg(test)]
    pub(crate) fn scratch(rows: u32) -> Self {
        let map = HashMap::create(rows, NO_PREALLOC).expect("a map");
        Self { name: "SCRATCH", map, capacity: rows }
    }

    /// Adds the rows of the table of this name elsewhere.
    fn carry(&mut self, pins: &Path, name: &'static str) {
        let rows = Self::open(pins, name).and_then(|other| other.rows());
        let added = rows.and_then(|rows| {
            rows.into_iter().try_for_each(|(key, value)| self.add(key, value).map(drop))
        });
        if let Err(error) = added {
            // Of another layout, or not there: its flows are judged anew.
            tracing::info!(pins = %pins.display(), %error, "not taken over from another version");
        }
    }

    /// The map's name.
    pub fn name(&self) -> &'static str {
        self.name
    }

    /// How many rows there are. Rows that change meanwhile may be missing.
    ///
    /// # Errors
    /// Where the map cannot be read.
    pub fn count(&self) -> Result<u64, KernelError> {
        self.map.keys().try_fold(0, |rows, key| {
            key.map_err(failed(self.name, "read"))?;
            Ok(rows + 1)
        })
    }

    /// How many rows there is room for.
    pub fn capacity(&self) -> u64 {
        self.capacity.into()
    }

    /// Every row. Rows that change meanwhile may be missing.
    pub fn rows(&self) -> Result<Vec<(K, V)>, KernelError> {
        self.map.iter().collect::<Result<_, _>>().map_err(failed(self.name, "read"))
    }

    /// Writes one row.
    ///
    /// # Errors
    /// [`KernelError::MapFull`] where there is no room.
    pub fn set(&mut self, key: K, value: V) -> Result<(), KernelError> {
        self.map.insert(key, value, 0).map_err(|error| full_or(self.name, "write", error))
    }

    /// Writes a row that is not there; false when there is one, which stays as it is.
    ///
    /// # Errors
    /// [`KernelError::MapFull`] where there is no room.
    pub fn add(&mut self, key: K, value: V) -> Result<bool, KernelError> {
        match self.map.insert(key, value, NO_EXIST) {
            Ok(()) => Ok(true),
            Err(MapError::SyscallError(error))
                if error.io_error.kind() == std::io::ErrorKind::AlreadyExists =>
            {
                Ok(false)
            }
            Err(error) => Err(full_or(self.name, "write", error)),
        }
    }

    /// Removes one row; a missing one is no error.
    pub fn remove(&mut self, key: &K) -> Result<(), KernelError> {
        gone_is_fine(self.map.remove(key)).map_err(failed(self.name, "remove from"))
    }
}

/// Reads the programs' counters; any number of readers.
pub struct Counters {
    counters: PerCpuArray<MapData, u64>,
    drops: HashMap<MapData, DropKey, u64>,
}

impl Counters {
    /// Opens the pinned maps of `pins`.
    ///
    /// # Errors
    /// Names the map that is missing or has another layout.
    pub fn open(pins: &Path) -> Result<Self, KernelError> {
        let open =
            |name: &'static str| MapData::from_pin(pins.join(name)).map_err(failed(name, "open"));
        Ok(Self {
            counters: PerCpuArray::try_from(Map::PerCpuArray(open("COUNTERS")?))
                .map_err(failed("COUNTERS", "open"))?,
            drops: HashMap::try_from(Map::HashMap(open("DROPS")?))
                .map_err(failed("DROPS", "open"))?,
        })
    }

    /// The sum over all CPUs of counter `index` ([`counter`]).
    ///
    /// # Errors
    /// Where the index is not below [`counter::COUNT`].
    pub fn get(&self, index: u32) -> Result<u64, KernelError> {
        debug_assert!(index < counter::COUNT);
        let values = self.counters.get(&index, 0).map_err(failed("COUNTERS", "read"))?;
        Ok(values.iter().sum())
    }

    /// Every drop counter: pod, peer, port, reason → how many.
    ///
    /// # Errors
    /// Where the map cannot be read.
    pub fn drops(&self) -> Result<Vec<(DropKey, u64)>, KernelError> {
        self.drops.iter().collect::<Result<_, _>>().map_err(failed("DROPS", "read"))
    }
}

fn take<T>(ebpf: &mut Ebpf, name: &'static str) -> Result<T, KernelError>
where
    T: TryFrom<Map, Error = MapError>,
{
    T::try_from(found(ebpf, name)?).map_err(failed(name, "open"))
}

fn found(ebpf: &mut Ebpf, name: &'static str) -> Result<Map, KernelError> {
    ebpf.take_map(name).ok_or(KernelError::Missing { object: super::programs::MAIN_OBJECT, name })
}

fn failed(map: &'static str, action: &'static str) -> impl Fn(MapError) -> KernelError {
    move |source| KernelError::Map { map, action, source }
}

/// Tells "no room" apart: E2BIG of hash tables, ENOSPC of tries, ENOMEM of either.
fn full_or(map: &'static str, action: &'static str, source: MapError) -> KernelError {
    let errno = match &source {
        MapError::SyscallError(error) => error.io_error.raw_os_error(),
        _ => None,
    };
    match errno {
        Some(libc::E2BIG | libc::ENOSPC | libc::ENOMEM) => KernelError::MapFull { map },
        _ => KernelError::Map { map, action, source },
    }
}

fn gone_is_fine(result: Result<(), MapError>) -> Result<(), MapError> {
    match result {
        Err(MapError::KeyNotFound) => Ok(()),
        Err(MapError::SyscallError(error))
            if error.io_error.raw_os_error() == Some(libc::ENOENT) =>
        {
            Ok(())
        }
        other => other,
    }
}
