//! `signet/1`: one flow at a time on a mutual-TLS connection, which is used again for the next.
//!
//! `docs/wire.md` is the specification. [`client`] asks for flows, [`server`] takes requests,
//! [`frame`] holds what is on the wire, [`copy`] moves a flow's bytes, [`stream`] hands
//! them to who reads them. None of them knows who is allowed what.

pub mod client;
pub mod copy;
pub mod frame;
mod link;
pub mod server;
pub mod stream;
#[cfg(test)]
mod tests;

pub use link::NativeError;
