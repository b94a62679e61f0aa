//! End-to-end tests: real agents, real eBPF, real traffic.
//!
//! What is in `core` is run once more for each variant (`SIGNET_LAB_FAMILY=v4|v6`,
//! `SIGNET_MASK_FEATURES=5.15`, `SIGNET_TUNNEL=hbone`), so it asks the lab for addresses and never assumes a family.

mod agent_dead;
mod agreement;
mod ambient;
mod authority;
mod bad_input;
mod builtins;
mod bypass;
mod churn;
mod core;
mod federation;
mod first_packet;
mod foreign;
mod handover;
mod held;
mod hostile;
mod hubble;
mod install;
mod jobs;
mod kubernetes;
mod layer7;
mod life_lines;
mod lifecycle;
mod limits;
mod mesh;
mod node_ports;
mod pid_reuse;
mod policy;
mod prometheus;
mod reboot;
mod recording;
mod seen;
mod services;
mod spiffe_clients;
mod storm;
mod swaps;
mod transfer;
