//! Messages and services generated from `proto/`: what the agent and the command line say
//! to each other, and how times are written in it.

mod strict;

use jiff::Timestamp;

pub use self::strict::{StrictCodec, StrictError, check as check_flows_request};

/// What the messages of this build are made of: a `FileDescriptorSet`.
pub static DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.binpb"));

/// A time on the wire.
pub fn timestamp(t: Timestamp) -> prost_types::Timestamp {
    let (mut seconds, mut nanos) = (t.as_second(), t.subsec_nanosecond());
    if nanos < 0 {
        // Before 1970 jiff counts back, protobuf never does.
        seconds -= 1;
        nanos += 1_000_000_000;
    }
    prost_types::Timestamp { seconds, nanos }
}

/// A time from the wire; `None` when it is out of range.
pub fn time(t: &prost_types::Timestamp) -> Option<Timestamp> {
    Timestamp::new(t.seconds, t.nanos).ok()
}

macro_rules! package {
    ($(#[$doc:meta])* $module:ident = $name:literal) => {
        $(#[$doc])*
        #[allow(
            missing_docs,
            clippy::all,
            clippy::allow_attributes_without_reason,
            reason = "generated code"
        )]
        pub mod $module {
            tonic::include_proto!($name);
        }
    };
}

package! {
    /// Hubble's flow messages.
    flow = "flow"
}
package! {
    /// Node states as Hubble's relay names them.
    relay = "relay"
}
package! {
    /// Hubble's observer service.
    observer = "observer"
}
package! {
    /// Hubble's peer service.
    peer = "peer"
}
package! {
    /// What Signet knows of a flow beyond Hubble's messages.
    detail = "signet.flow.v1"
}
package! {
    /// The agent's own service.
    admin = "signet.admin.v1"
}
package! {
    /// The SPIFFE Workload API, which has no package.
    workload = "_"
}
package! {
    /// Istio's CA API.
    istio_ca = "istio.v1.auth"
}
package! {
    /// The authority's own service.
    authority = "signet.v1"
}
