//! `signet authority` as its callers see it: a gRPC client over TLS, a test API server, openssl.
//! No agent, no eBPF and no privileges take part.

mod agent_side;
mod client;
mod issuing;
mod oidc;
mod replicas;
mod rights;
mod taint;
