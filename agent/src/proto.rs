//! Messages and services generated from `proto/`: what the agent and the command line say
//! to each other. Nothing here is written by hand.

macro_rules! package {
    ($(#[$doc:meta])* $module:ident = $name:literal) => {
        $(#[$doc])*
        #[allow(missing_docs, clippy::all, reason = "generated code")]
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
    /// What Signet knows of a flow beyond Hubble's messages.
    detail = "signet.flow.v1"
}
package! {
    /// The agent's own service.
    admin = "signet.admin.v1"
}
