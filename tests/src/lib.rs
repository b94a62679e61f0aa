//! Signet's lab: everything around the agents, so that they can be tested on one machine.
//!
//! A [`Lab`] has a switch ([`link`]), nodes ([`node`]), a cluster directory ([`cluster_dir`]),
//! one real agent a node ([`agent`]) and pods, started by a kubelet that waits for nobody
//! ([`kubelet`], [`pod`]). Pods run roles of the helper `signet-lab-worker` ([`traffic`]) or
//! any program. What crosses between nodes is captured ([`capture`]).
//!
//! ```no_run
//! use signet_lab::{Lab, traffic::{Role, roles}};
//! # fn main() -> anyhow::Result<()> {
//! let lab = Lab::start()?;
//! lab.namespace("shop", Some("strict"))?;
//! let server = lab.pod_on(lab.node("node-2")?, "shop", "payments")
//!     .container("main", Role::http(8080))
//!     .start()?;
//! let client = lab.pod("shop", "frontend").start()?;
//! lab.start_agents()?;
//! let answer = client.curl(&server.url(8080, "/hello"))?.success()?;
//! # Ok(())
//! # }
//! ```
//!
//! Environment: `SIGNET_BIN`, `SIGNET_LAB_WORKER` (programs), `SIGNET_LAB_FAMILY`
//! (`dual|v4|v6`), `SIGNET_LAB_BACKEND` (`own|containerd`), `SIGNET_LAB_DIR` (where files go), `SIGNET_LAB_LOGS` (agent logs also of
//! tests that pass), `SIGNET_LAB_KEEP_FAILED` (copies logs and cluster directory of a test
//! that fails); agents inherit `SIGNET_MASK_FEATURES` and `SIGNET_TUNNEL`.

#![forbid(unsafe_code)]

pub mod address;
pub mod agent;
pub mod api_server;
pub mod authority;
pub mod capture;
pub mod cgroup;
pub mod cluster_dir;
pub mod forge;
pub mod hubble;
pub mod kubelet;
pub mod lab;
pub mod leftovers;
pub mod link;
pub mod metrics;
pub mod netns;
pub mod node;
pub mod pod;
pub mod process;
pub mod runtime;
pub mod terminal;
pub mod traffic;

use std::time::Duration;

pub use lab::{Lab, LabOptions, Service, eventually};

/// How long a server of the lab may take until it listens, on a busy machine.
pub const START_TIMEOUT: Duration = Duration::from_secs(10);
