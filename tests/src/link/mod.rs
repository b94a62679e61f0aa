//! The link between nodes: a switch in a network namespace of its own.
//!
//! Whatever one node sends to another, or to the machine outside the mesh, crosses it; a
//! capture opened there sees each frame once, as the switch receives it.

use std::path::{Path, PathBuf};

use anyhow::Result;

use crate::{address::Family, capture::Capture, leftovers::LabId, netns};

/// The switch.
#[derive(Debug)]
pub struct Switch {
    namespace: String,
    path: PathBuf,
}

impl Switch {
    /// Makes the switch without ports.
    pub(crate) fn create(id: &LabId) -> Result<Self> {
        let namespace = format!("{id}-switch");
        let path = netns::create(&namespace)?;
        netns::batch(
            &namespace,
            &["link add br0 type bridge mcast_snooping 0".into(), "link set br0 up".into()],
        )?;
        Ok(Self { namespace, path })
    }

    /// Plugs a namespace in: it gets `eth0` with these addresses.
    pub(crate) fn plug(
        &self,
        port: &str,
        namespace: &str,
        family: Family,
        addresses: &crate::address::Addresses,
    ) -> Result<()> {
        netns::batch(
            &self.namespace,
            &[
                format!("link add {port} type veth peer name eth0 netns {namespace}"),
                format!("link set {port} master br0 up"),
            ],
        )?;
        let mut commands = Vec::new();
        if family.has_v4()
            && let Some(v4) = addresses.v4
        {
            commands.push(format!("addr add {v4}/24 dev eth0"));
        }
        if family.has_v6()
            && let Some(v6) = addresses.v6
        {
            commands.push(format!("addr add {v6}/64 dev eth0 nodad"));
        }
        commands.push("link set eth0 up".into());
        netns::batch(namespace, &commands)
    }

    /// Its network namespace.
    pub fn netns(&self) -> &Path {
        &self.path
    }

    /// Begins a capture of everything that crosses the switch, written to `file` as pcap.
    pub fn capture(&self, file: &Path) -> Result<Capture> {
        Capture::start(&self.path, file)
    }
}
