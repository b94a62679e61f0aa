//! The tunnel: HBONE over mutual TLS, its pool of connections, and copying.
//!
//! - [`hbone`] speaks HTTP/2 CONNECT, as a client and as a server, over any byte stream;
//! - [`pool`] keeps a source pod's tunnel connections and shares them between flows;
//! - [`copy`] moves bytes between an application's socket and a tunnel stream with TCP's
//!   own semantics: half-close, reset, back-pressure;
//! - [`tls`] makes mutual TLS sessions between SVIDs.
//!
//! Nothing here knows policy, pods or the kernel: the [`proxy`](crate) floor decides who
//! may open what, and passes sockets in.

pub mod copy;
pub mod hbone;
pub mod pool;
mod read_ahead;
pub mod tls;
