//! What is in pinned maps, as bytes: for who looks at a node from afar.

use std::{fs, io, os::fd::AsFd, path::Path};

use aya::maps::{MapData, MapType};

use super::{KernelError, bpf};

/// A pinned map.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Contents {
    /// The directory of its version.
    pub version: String,
    /// Its name.
    pub name: String,
    /// What it is, by the kernel's name.
    pub kind: &'static str,
    /// Bytes of a key.
    pub key_size: u32,
    /// Bytes of a value; maps of one value a CPU have several of them.
    pub value_size: u32,
    /// How many rows there is room for.
    pub max_entries: u32,
    /// Keys and values; `None` for a map whose rows cannot be listed. Of a map of maps the values
    /// are the inner maps' ids.
    pub rows: Option<Vec<(Vec<u8>, Vec<u8>)>>,
    /// There are no rows but these. Rows that change meanwhile may be missing all the same.
    pub is_complete: bool,
}

/// How a map's rows are read.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Rows {
    /// One value.
    Plain,
    /// One value for each possible CPU.
    EachCpu,
    /// Not at all.
    None,
}

/// By the names of `enum bpf_map_type`.
fn kind_of(map: MapType) -> (&'static str, Rows) {
    match map {
        MapType::Hash => ("hash", Rows::Plain),
        MapType::Array => ("array", Rows::Plain),
        MapType::PerCpuHash => ("percpu_hash", Rows::EachCpu),
        MapType::PerCpuArray => ("percpu_array", Rows::EachCpu),
        MapType::LruHash => ("lru_hash", Rows::Plain),
        MapType::LruPerCpuHash => ("lru_percpu_hash", Rows::EachCpu),
        MapType::LpmTrie => ("lpm_trie", Rows::Plain),
        MapType::ArrayOfMaps => ("array_of_maps", Rows::Plain),
        MapType::HashOfMaps => ("hash_of_maps", Rows::Plain),
        MapType::SkStorage => ("sk_storage", Rows::None),
        MapType::RingBuf => ("ringbuf", Rows::None),
        MapType::ProgramArray => ("prog_array", Rows::None),
        _ => ("other", Rows::None),
    }
}

/// Adds every map that is pinned in a version's directory, by name.
pub(super) fn of_directory(
    version: &Path,
    most: usize,
    all: &mut Vec<Contents>,
) -> Result<(), KernelError> {
    let failed = |source| KernelError::Pin { action: "list", path: version.to_owned(), source };
    let mut pins = Vec::new();
    for entry in fs::read_dir(version).map_err(failed)? {
        let path = entry.map_err(failed)?.path();
        if !path.is_dir() {
            pins.push(path);
        }
    }
    pins.sort();
    for pin in pins {
        // Programs are pinned elsewhere; what is here and no map was there before us.
        let Ok(data) = MapData::from_pin(&pin) else { continue };
        let text = |name: Option<&std::ffi::OsStr>| {
            name.map(|name| name.to_string_lossy().into_owned()).unwrap_or_default()
        };
        let read = of_map(&data, most).map_err(|source| KernelError::Pin {
            action: "read",
            path: pin.clone(),
            source,
        })?;
        all.push(Contents {
            version: text(version.file_name()),
            name: text(pin.file_name()),
            ..read
        });
    }
    Ok(())
}

fn of_map(data: &MapData, most: usize) -> io::Result<Contents> {
    let info = data.info().map_err(io::Error::other)?;
    let (kind, how) = kind_of(info.map_type().map_err(io::Error::other)?);
    let (key_size, value_size) = (info.key_size(), info.value_size());
    let mut found = Contents {
        version: String::new(),
        name: String::new(),
        kind,
        key_size,
        value_size,
        max_entries: info.max_entries(),
        rows: None,
        is_complete: how != Rows::None,
    };
    let value = usize::try_from(value_size).map_err(io::Error::other)?;
    let size = match how {
        Rows::None => return Ok(found),
        Rows::Plain => value,
        Rows::EachCpu => {
            let cpus = aya::util::nr_cpus().map_err(|(_, error)| error)?;
            value.next_multiple_of(8) * cpus
        }
    };
    let fd = data.fd().as_fd();
    let key_size = usize::try_from(key_size).map_err(io::Error::other)?;
    let mut rows: Vec<(Vec<u8>, Vec<u8>)> = Vec::new();
    let mut key: Option<Vec<u8>> = None;
    // A map that changes meanwhile may begin anew: it ends all the same.
    let mut steps = 0u64;
    while let Some(next) = bpf::next_key(fd, key.as_deref(), key_size)? {
        steps += 1;
        if rows.len() >= most || steps > 2 * u64::from(found.max_entries) {
            found.is_complete = false;
            break;
        }
        if let Some(value) = bpf::lookup(fd, &next, size)? {
            rows.push((next.clone(), value));
        }
        key = Some(next);
    }
    found.rows = Some(rows);
    Ok(found)
}

#[cfg(test)]
mod tests {
    use signet_ebpf::abi::Config;

    use super::Contents;
    use crate::kernel::{Pinned, Programs, test_host::Host};

    #[test]
    fn pinned_maps_are_read_as_they_are() {
        let Some(host) = Host::new("contents") else {
            println!("skipped: needs root and cgroup2");
            return;
        };
        let config = host.config();
        let (_programs, mut maps) = Programs::load(&config).unwrap();
        let ranges: Vec<(u32, [u8; 16])> =
            (0..20u8).map(|n| (128, std::array::from_fn(|i| if i == 0 { n } else { 0 }))).collect();
        for range in &ranges {
            maps.set_range(*range, 1).unwrap();
        }
        let pinned = Pinned::find(&config.bpffs, &config.instance).unwrap();
        let all = pinned.contents(4096).unwrap();
        let of_name = |name: &str| all.iter().find(|map| map.name == name).unwrap();
        let shown = of_name("CONFIG");
        assert_eq!((shown.kind, shown.is_complete), ("array", true));
        let row = |shown: &Contents| shown.rows.as_ref().unwrap()[0].clone();
        let (key, before) = row(shown);
        assert_eq!((key, before.len()), (vec![0; 4], size_of::<Config>()));
        // The bytes are those that are in force: a change of one field is a change there.
        let mut wanted = maps.config().unwrap();
        wanted.enforcement ^= 1;
        maps.set_config(wanted).unwrap();
        let again = pinned.contents(4096).unwrap();
        let (_, after) = row(again.iter().find(|map| map.name == "CONFIG").unwrap());
        assert_eq!(before.iter().zip(&after).filter(|(a, b)| a != b).count(), 1);
        let shown = of_name("RANGES");
        assert_eq!((shown.kind, shown.key_size, shown.value_size), ("lpm_trie", 20, 4));
        assert_eq!(shown.rows.as_ref().unwrap().len(), 20);
        assert!(all.iter().any(|map| map.kind == "ringbuf" && map.rows.is_none()), "{all:?}");
        assert!(all.iter().any(|map| map.kind.starts_with("percpu_")), "{all:?}");
        // No more than asked for, and that is said.
        let few = pinned.contents(7).unwrap();
        let shown = few.iter().find(|map| map.name == "RANGES").unwrap();
        assert_eq!((shown.rows.as_ref().unwrap().len(), shown.is_complete), (7, false));
    }
}
