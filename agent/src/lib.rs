//! Signet's node agent, authority and command line.
//!
//! The map of the house, from the ground up; a floor imports only floors below it
//! (`cargo xtask check` holds this):
//!
//! 1. [`spiffe`] parses and encodes SPIFFE IDs, bundles and SVIDs, [`netns`] opens sockets
//!    inside pods' network namespaces, [`config`] reads the agent's configuration,
//!    [`telemetry`] names reasons and sets logging up, [`proto`] holds the messages of the
//!    gRPC services, [`socket_file`] binds unix sockets, [`api_server`] asks the Kubernetes API.
//! 2. [`policy`] turns policy objects into one model, evaluates and compiles it; [`ca`] signs.
//! 3. [`trust`] holds the bundles of all trusted domains and the keys of end users' issuers.
//! 4. [`cluster`] says what the cluster is: a [`cluster::model::World`] with a revision.
//! 5. [`kernel`] loads, attaches and pins the programs and writes their maps; [`svid`]
//!    requests and rotates SVIDs; [`tunnel`] speaks the native wire and HBONE.
//! 6. [`endpoint`] finds this node's pods and reconciles the kernel with the world.
//! 7. [`flow`] records verdicts.
//! 8. [`proxy`] carries flows; [`observer`] and [`admin`] answer the command line;
//!    [`workload_api`] gives pods their own SVIDs; [`viewer`] lets who may see flows in over TCP;
//!    [`handover`] brings a node from one agent to the next.
//! 9. [`daemon`] puts the node agent together; [`authority`] is the certificate authority;
//!    [`lifecycle`] is what is done to a node where no agent runs: guard, release, uninstall.
//! 10. [`cli`] is the command line.

pub mod admin;
pub mod api_server;
pub mod authority;
pub mod ca;
pub mod cli;
pub mod cluster;
pub mod config;
pub mod daemon;
pub mod endpoint;
pub mod flow;
pub mod handover;
pub mod kernel;
pub mod lifecycle;
pub mod netns;
pub mod observer;
pub mod policy;
pub mod proto;
pub mod proxy;
pub mod socket_file;
pub mod spiffe;
pub mod svid;
pub mod telemetry;
pub mod trust;
pub mod tunnel;
pub mod viewer;
pub mod workload_api;
