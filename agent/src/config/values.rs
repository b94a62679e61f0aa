//! Values of configuration keys that are one of a few words.

use std::net::IpAddr;

use ipnet::IpNet;
use signet_ebpf::abi;

/// An address range, without host bits; a lone address is a range of one, and an
/// IPv4-mapped one is the IPv4 range that it means. The error is value and remedy.
pub fn parse_range(value: &str) -> Result<IpNet, String> {
    let wrong = || {
        format!(
            "{:?} is not an address range; write it like 10.0.0.0/8 or fd00::/48",
            super::yaml::shorten(value)
        )
    };
    let net = match value.parse::<IpAddr>() {
        Ok(ip) => IpNet::from(ip),
        Err(_) => value.parse::<IpNet>().map_err(|_| wrong())?,
    };
    let trunc = net.trunc();
    if trunc != net {
        return Err(format!("{value:?} has bits set behind its prefix; write {trunc}"));
    }
    if let IpNet::V6(v6) = net
        && let Some(v4) = v6.addr().to_ipv4_mapped()
        && let Some(bits) = v6.prefix_len().checked_sub(96)
    {
        return IpNet::new(v4.into(), bits).map_err(|_| wrong());
    }
    Ok(net)
}

/// Defines an enum of words with `parse` and `as_str`.
macro_rules! words {
    ($(#[$doc:meta])* $name:ident { $($(#[$vdoc:meta])* $variant:ident = $word:literal,)* }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, Debug)]
        pub enum $name {
            $($(#[$vdoc])* $variant,)*
        }

        impl $name {
            /// Every word.
            pub const WORDS: &'static [&'static str] = &[$($word,)*];

            /// The value of a word; the error says which words there are.
            pub fn parse(word: &str) -> Result<Self, String> {
                match word {
                    $($word => Ok(Self::$variant),)*
                    _ => Err(format!(
                        "{:?} is not one of {}",
                        super::yaml::shorten(word),
                        Self::WORDS.join(", ")
                    )),
                }
            }

            /// The word.
            pub const fn as_str(self) -> &'static str {
                match self {
                    $(Self::$variant => $word,)*
                }
            }
        }
    };
}

words! {
    /// Who signs SVIDs.
    Authority {
        /// The agent itself, from a root on disk.
        Embedded = "embedded",
        /// A server of Istio's CA API: `signet authority`, istiod, istio-csr.
        Grpc = "grpc",
    }
}

words! {
    /// What travels in tunnels (DESIGN §4.4, §4a).
    TunnelWire {
        /// `signet/1` where the peer speaks it, else HBONE.
        Auto = "auto",
        /// `signet/1` alone.
        Native = "native",
        /// HBONE alone.
        Hbone = "hbone",
    }
}

words! {
    /// What becomes of pods that are not registered (DESIGN §5).
    UnknownPods {
        /// Refused while the agent lives and something is enforced.
        Auto = "auto",
        /// Refused always.
        Deny = "deny",
        /// Left alone always.
        Allow = "allow",
    }
}

impl UnknownPods {
    /// The number in the kernel's configuration.
    pub const fn number(self) -> u8 {
        match self {
            Self::Auto => abi::unknown_pods::AUTO,
            Self::Deny => abi::unknown_pods::DENY,
            Self::Allow => abi::unknown_pods::ALLOW,
        }
    }
}

words! {
    /// What becomes of unregistered pods while the agent is dead.
    WhenAgentDead {
        /// Left alone.
        Allow = "allow",
        /// Refused.
        Deny = "deny",
    }
}

words! {
    /// What passes where no policy selects.
    DefaultAction {
        /// Everything of our own trust domain.
        Allow = "allow",
        /// Nothing.
        Deny = "deny",
    }
}

words! {
    /// Cluster-wide override.
    Enforcement {
        /// As labels and policies say.
        Enforce = "enforce",
        /// What would be dropped passes as AUDIT.
        Audit = "audit",
        /// Nothing is touched.
        Off = "off",
    }
}

impl Enforcement {
    /// The number in the kernel's configuration.
    pub const fn number(self) -> u8 {
        match self {
            Self::Enforce => abi::enforcement::ENFORCE,
            Self::Audit => abi::enforcement::AUDIT,
            Self::Off => abi::enforcement::OFF,
        }
    }
}

words! {
    /// What becomes of protocols besides TCP and UDP.
    OtherProtocols {
        /// They pass.
        Allow = "allow",
        /// They are refused.
        Deny = "deny",
    }
}

words! {
    /// Which connections the access log tells of.
    AccessLog {
        /// None.
        Off = "off",
        /// Those that were refused, or would have been.
        Denied = "denied",
        /// All.
        All = "all",
    }
}

words! {
    /// How logs are written.
    LogFormat {
        /// For people.
        Text = "text",
        /// One JSON object a line.
        Json = "json",
    }
}

words! {
    /// What passes without a policy, unless it is removed.
    Builtin {
        /// DNS to the pod's own resolvers.
        Dns = "dns",
        /// The probes of the node's own kubelet.
        KubeletProbes = "kubelet-probes",
        /// What the API server calls: webhooks and aggregated APIs.
        Webhooks = "webhooks",
    }
}

impl Builtin {
    /// Every one.
    pub const ALL: [Self; 3] = [Self::Dns, Self::KubeletProbes, Self::Webhooks];
}

/// A resolver of names.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Resolver {
    /// At an address, on port 53.
    Address(IpAddr),
    /// A Service: its own addresses, and the endpoints behind its port 53.
    Service {
        /// Its namespace.
        namespace: String,
        /// Its name.
        name: String,
    },
}

impl Resolver {
    /// `169.254.20.10` or `kube-system/kube-dns`; the error is value and remedy.
    pub fn parse(value: &str) -> Result<Self, String> {
        if let Ok(ip) = value.parse::<IpAddr>() {
            return Ok(Self::Address(ip.to_canonical()));
        }
        let is_name = |part: &str| {
            (1..=63).contains(&part.len())
                && part.bytes().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == b'-')
        };
        match value.split_once('/') {
            Some((namespace, name)) if is_name(namespace) && is_name(name) => {
                Ok(Self::Service { namespace: namespace.into(), name: name.into() })
            }
            _ => Err(format!(
                "{:?} is not a resolver; write an address like 169.254.20.10, or \
                 NAMESPACE/SERVICE",
                super::yaml::shorten(value)
            )),
        }
    }
}

impl std::fmt::Display for Resolver {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Address(ip) => ip.fmt(f),
            Self::Service { namespace, name } => write!(f, "{namespace}/{name}"),
        }
    }
}
