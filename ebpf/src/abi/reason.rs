//! The reasons of verdicts: numbers, names, meanings.

/// Calls `$m!` with every reason as `Variant = number "name" "what it means"`.
///
/// Append only: numbers are on the wire of the native tunnel and in pinned maps.
#[macro_export]
macro_rules! for_each_reason {
    ($m:ident) => {
        $m! {
            Allowed = 0 "allowed" "policy, or the absence of one, lets the flow pass",
            PolicyDeny = 1 "policy_deny" "a DENY rule matches",
            PolicyNoMatch = 2 "policy_no_match" "ALLOW policies select the workload and none matches, or the default is deny",
            PolicyUnsupported = 3 "policy_unsupported" "a policy that selects the workload cannot be evaluated and fails closed",
            PlaintextRefused = 4 "plaintext_refused" "strict accepts no plaintext",
            IdentityUnknown = 5 "identity_unknown" "an address of the cluster's ranges that belongs to nobody known",
            IdentityMismatch = 6 "identity_mismatch" "the certificate or the attested identity is not the one that the address may have",
            PodUnregistered = 7 "pod_unregistered" "the pod is not registered yet and unknown pods are refused",
            SvidMissing = 8 "svid_missing" "no SVID has been issued for the workload yet",
            SvidExpired = 9 "svid_expired" "an SVID ran out",
            UntrustedPeer = 10 "untrusted_peer" "the peer's certificate does not verify as an SVID of a trusted domain",
            HandshakeFailed = 11 "handshake_failed" "the TLS handshake did not complete",
            WrongDestination = 12 "wrong_destination" "the tunnel asked for an address or port that is not this pod's to serve",
            PeerUnreachable = 13 "peer_unreachable" "the peer is enrolled but not served, has no endpoint, or its node does not answer on 15008",
            AppUnreachable = 14 "app_unreachable" "the application does not accept the connection",
            RightWithdrawn = 15 "right_withdrawn" "policy or trust changed while the flow was open",
            SourceNotPreserved = 16 "source_not_preserved" "the client's address could not be handed to the application",
            MapFull = 17 "map_full" "a kernel map has no room left",
            LimitExceeded = 18 "limit_exceeded" "a per-endpoint limit is reached",
            Draining = 19 "draining" "the agent is shutting down",
            ProtocolError = 20 "protocol_error" "the peer broke the tunnel's protocol",
            Internal = 21 "internal" "a bug in Signet",
            RawPacket = 22 "raw_packet" "a frame that no socket of the pod was let through with: a packet socket, or forged headers",
            TokenInvalid = 23 "token_invalid" "the token of a request's end user is not valid",
        }
    };
}

macro_rules! define_reason {
    ($($variant:ident = $number:literal $name:literal $doc:literal,)*) => {
        /// Why a flow got its verdict (DESIGN §2).
        #[repr(u16)]
        #[allow(
            clippy::manual_non_exhaustive,
            reason = "the hidden variant is the value of memory that nobody set"
        )]
        #[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
        pub enum Reason {
            $(#[doc = $doc] $variant = $number,)*
            #[doc(hidden)]
            #[default]
            __Unset = u16::MAX,
        }

        impl Reason {
            /// Every reason, in order of its number.
            pub const ALL: &'static [Self] = &[$(Self::$variant,)*];

            /// The reason of a number from a map, an event or the wire.
            #[inline]
            pub const fn from_u16(v: u16) -> Option<Self> {
                match v {
                    $($number => Some(Self::$variant),)*
                    _ => None,
                }
            }
        }
    };
}
for_each_reason!(define_reason);
