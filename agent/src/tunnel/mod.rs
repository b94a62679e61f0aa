//! The tunnel: HBONE or `signet/1` over mutual TLS, its pool of connections, and copying.
//!
//! - [`hbone`] speaks HTTP/2 CONNECT, as a client and as a server, over any byte stream;
//! - [`native`] speaks `signet/1`, between two agents of ours: one flow at a time on a connection;
//! - [`pool`] keeps a source pod's tunnel connections for flows to share or to use in turn;
//! - [`copy`] moves bytes between an application's socket and a tunnel stream with TCP's
//!   own semantics: half-close, reset, back-pressure;
//! - [`tls`] makes mutual TLS sessions between SVIDs.
//!
//! Nothing here knows policy, pods or the kernel: the [`proxy`](crate) floor decides who
//! may open what, and passes sockets in.

pub mod buffers;
pub mod copy;
pub mod hbone;
pub mod native;
pub mod pool;
mod session;
pub mod tls;
