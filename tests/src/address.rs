//! The lab's address plan. Every lab has namespaces of its own, so all labs use the same.
//!
//! | what | IPv4 | IPv6 |
//! |---|---|---|
//! | link between nodes | 172.18.0.0/24, node N is .N | fd00:18::/64 |
//! | pods of node N | 10.244.N.0/24, gateway .1 | fd00:244:0:N::/64 |
//! | services | 10.96.0.0/16 | fd00:96::/64 |
//! | the machine outside | 172.18.0.200, 198.51.100.10 | fd00:18::c8, 2001:db8:ff::10 |

use std::{
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    str::FromStr,
};

use anyhow::{Result, bail};

/// Which address families a lab has.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Family {
    /// Both.
    #[default]
    Dual,
    /// IPv4 only.
    V4,
    /// IPv6 only.
    V6,
}

impl Family {
    /// `SIGNET_LAB_FAMILY`, dual when unset.
    pub fn from_env() -> Result<Self> {
        std::env::var("SIGNET_LAB_FAMILY").map_or(Ok(Self::Dual), |v| v.parse())
    }

    /// True when pods have IPv4 addresses.
    pub fn has_v4(self) -> bool {
        self != Self::V6
    }

    /// True when pods have IPv6 addresses.
    pub fn has_v6(self) -> bool {
        self != Self::V4
    }
}

impl FromStr for Family {
    type Err = anyhow::Error;

    fn from_str(s: &str) -> Result<Self> {
        Ok(match s {
            "dual" => Self::Dual,
            "v4" => Self::V4,
            "v6" => Self::V6,
            other => bail!("SIGNET_LAB_FAMILY={other}: say dual, v4 or v6"),
        })
    }
}

/// The addresses of a pod, node or service; at least one is set.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Addresses {
    /// IPv4.
    pub v4: Option<Ipv4Addr>,
    /// IPv6.
    pub v6: Option<Ipv6Addr>,
}

impl Addresses {
    /// Restricts a pair to what the family has.
    pub fn of(family: Family, v4: Ipv4Addr, v6: Ipv6Addr) -> Self {
        Self { v4: family.has_v4().then_some(v4), v6: family.has_v6().then_some(v6) }
    }

    /// All of them, IPv4 first.
    pub fn all(&self) -> Vec<IpAddr> {
        self.v4.map(IpAddr::V4).into_iter().chain(self.v6.map(IpAddr::V6)).collect()
    }

    /// The first: IPv4 where there is one.
    pub fn first(&self) -> IpAddr {
        self.all().first().copied().unwrap_or(IpAddr::V4(Ipv4Addr::UNSPECIFIED))
    }

    /// True when `ip` is one of them.
    pub fn contains(&self, ip: IpAddr) -> bool {
        self.all().contains(&ip)
    }
}

impl fmt::Display for Addresses {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let all: Vec<String> = self.all().iter().map(ToString::to_string).collect();
        f.write_str(&all.join(","))
    }
}

/// Addresses of node `n` (from 1) on the link.
pub fn node(family: Family, n: u8) -> Addresses {
    Addresses::of(
        family,
        Ipv4Addr::new(172, 18, 0, n),
        Ipv6Addr::new(0xfd00, 0x18, 0, 0, 0, 0, 0, n.into()),
    )
}

/// Address `host` of the pods' range of node `n`; host 1 is the node's own gateway address.
pub fn pod(family: Family, n: u8, host: u8) -> Addresses {
    Addresses::of(
        family,
        Ipv4Addr::new(10, 244, n, host),
        Ipv6Addr::new(0xfd00, 0x244, 0, n.into(), 0, 0, 0, host.into()),
    )
}

/// The `host`th virtual address.
pub fn service(family: Family, host: u16) -> Addresses {
    let [high, low] = host.to_be_bytes();
    Addresses::of(
        family,
        Ipv4Addr::new(10, 96, high, low),
        Ipv6Addr::new(0xfd00, 0x96, 0, 0, 0, 0, 0, host),
    )
}

/// The outside machine's addresses on the link.
pub fn outside_on_link(family: Family) -> Addresses {
    node(family, 200)
}

/// The outside machine's public addresses.
pub fn outside(family: Family) -> Addresses {
    Addresses::of(
        family,
        Ipv4Addr::new(198, 51, 100, 10),
        Ipv6Addr::new(0x2001, 0xdb8, 0xff, 0, 0, 0, 0, 0x10),
    )
}

/// The pods' ranges of the whole cluster.
pub fn pod_ranges(family: Family) -> Vec<String> {
    ranges(family, "10.244.0.0/16", "fd00:244::/48")
}

/// The pods' ranges of one node.
pub fn pod_ranges_of(family: Family, node: u8) -> Vec<String> {
    ranges(family, &format!("10.244.{node}.0/24"), &format!("fd00:244:0:{node:x}::/64"))
}

/// The services' ranges.
pub fn service_ranges(family: Family) -> Vec<String> {
    ranges(family, "10.96.0.0/16", "fd00:96::/64")
}

fn ranges(family: Family, v4: &str, v6: &str) -> Vec<String> {
    let mut all = Vec::new();
    if family.has_v4() {
        all.push(v4.to_owned());
    }
    if family.has_v6() {
        all.push(v6.to_owned());
    }
    all
}
