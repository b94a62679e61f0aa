//! What an agent holds: descriptors, threads, memory, map entries. Before = after.

use std::{collections::BTreeMap, fs, path::Path};

use anyhow::{Context, Result};
use aya::maps::{HashMap, Map, MapData, MapError};
use signet_ebpf::abi;

/// A process's use of the machine.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Usage {
    /// Open file descriptors.
    pub descriptors: usize,
    /// Threads.
    pub threads: usize,
    /// Resident memory in bytes, of all kinds.
    pub resident: u64,
    /// What of it is the program's text and other files, in bytes: it comes with the first use of
    /// each page, and the kernel takes it back whenever it likes.
    pub of_files: u64,
    /// Processor time of all its threads since its start, in ticks of the kernel's clock
    /// (a hundredth of a second each).
    pub cpu_ticks: u64,
}

impl Usage {
    /// Of a process.
    pub fn of(pid: u32) -> Result<Self> {
        let count = |part: &str| -> Result<usize> {
            let path = format!("/proc/{pid}/{part}");
            Ok(fs::read_dir(&path).with_context(|| path.clone())?.count())
        };
        let status = fs::read_to_string(format!("/proc/{pid}/status")).context("status")?;
        let bytes = |row: &'static str| -> Result<u64> {
            let kilobytes: u64 = status
                .lines()
                .find_map(|line| line.strip_prefix(row)?.strip_prefix(':'))
                .and_then(|rest| rest.split_whitespace().next())
                .and_then(|n| n.parse().ok())
                .context(row)?;
            Ok(kilobytes * 1024)
        };
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).context("stat")?;
        // After the name, which may hold anything, in parentheses: utime and stime are the
        // twelfth and thirteenth (proc_pid_stat(5)).
        let cpu_ticks = stat
            .rsplit(')')
            .next()
            .map(|rest| {
                rest.split_whitespace().skip(11).take(2).filter_map(|n| n.parse::<u64>().ok())
            })
            .map(Iterator::sum)
            .context("cpu time")?;
        Ok(Self {
            cpu_ticks,
            descriptors: count("fd")?,
            threads: count("task")?,
            resident: bytes("VmRSS")?,
            of_files: bytes("RssFile")?,
        })
    }
}

/// Numbers of entries of the pinned hash maps under `<bpffs>/<instance>/v<ABI>`.
pub fn map_entries(instance: &Path) -> Result<BTreeMap<&'static str, usize>> {
    let directory = instance.join(format!("v{}", abi::ABI_VERSION));
    let mut all = BTreeMap::new();
    macro_rules! count {
        ($($name:literal: $key:ty => $value:ty,)*) => {$(
            all.insert($name, keys::<$key, $value>(&directory.join($name))?);
        )*};
    }
    count! {
        "PODS": u64 => abi::PodEntry,
        "CGROUPS": u64 => u64,
        "OWN": abi::OwnAddressKey => u8,
        "ADDRESSES": abi::Ip => abi::AddressEntry,
        "SERVICES": abi::ServiceKey => u32,
        "EXEMPT": abi::ExemptKey => u8,
        "PROBES": u64 => u8,
        "ATTESTED": abi::FlowKey => abi::Attestation,
        "ORIGINALS": abi::FlowKey => abi::Handover,
        "CLIENTS": abi::FlowKey => abi::Handover,
        "CUT": abi::FlowKey => u64,
        "UDP_FLOWS": abi::FlowKey => abi::UdpFlow,
        "UDP_COUNTS": u64 => i64,
        "TUNNELS": abi::FlowKey => u64,
        "DROPS": abi::DropKey => u64,
    }
    Ok(all)
}

fn keys<K: aya::Pod, V: aya::Pod>(pin: &Path) -> Result<usize> {
    let data = MapData::from_pin(pin).with_context(|| pin.display().to_string())?;
    let map: HashMap<MapData, K, V> =
        Map::HashMap(data).try_into().with_context(|| pin.display().to_string())?;
    let mut count = 0;
    for key in map.keys() {
        match key {
            Ok(_) => count += 1,
            // Deleted while we walked: begin-again semantics of the kernel; not an entry.
            Err(MapError::KeyNotFound) => {}
            Err(error) => return Err(error).with_context(|| pin.display().to_string()),
        }
    }
    Ok(count)
}
