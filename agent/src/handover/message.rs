//! What the two agents of a hand-over say to each other: one JSON object a message, behind the
//! version of these messages, strict and of bounded length.
//!
//! A message is `<version> <object>`. Who reads another version says so and goes no further;
//! unknown fields are refused, so a field that is added makes a new version.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use signet_ebpf::abi::Mode;

use crate::endpoint::{
    sockets::OutboundPorts,
    state::{EndpointKey, Standing},
};

/// Version of the messages.
pub const PROTOCOL: u32 = 1;
/// The longest message in bytes, its version included.
pub const MAX_LEN: usize = 4096;
/// The most endpoints that are handed over; a node has some hundreds of pods.
pub const MAX_ENDPOINTS: usize = 16_384;
/// The longest uid of a pod.
const MAX_UID: usize = 128;
/// The longest text for people.
const MAX_TEXT: usize = 1024;

/// Why a message is not understood.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum MessageError {
    /// The other agent speaks another version.
    #[error("the other agent speaks version {0} of the hand-over, this one {PROTOCOL}")]
    Version(u32),
    /// Longer than any message is.
    #[error("a message of {0} bytes; the longest has {MAX_LEN}")]
    TooLong(usize),
    /// Not a message.
    #[error("not a message of the hand-over: {0}")]
    Malformed(String),
}

/// A message.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub enum Message {
    /// The new agent's first word.
    Hello(Hello),
    /// The new agent asks for the list of what stands.
    Ask,
    /// The new agent is ready to serve.
    TakeOver,
    /// The new agent serves; from here on there is no way back.
    Done,
    /// The old agent will not, and why.
    Refused(String),
    /// One endpoint, as it stands. Answers [`Message::Ask`].
    Stands(Endpoint),
    /// The list is complete: so many.
    Listed(u32),
    /// One endpoint that is handed over, its listeners with it. Answers [`Message::TakeOver`].
    Endpoint(Endpoint),
    /// A socket of the node's own, with it.
    Socket(NodeSocket),
    /// Everything is handed over; the old agent writes nothing any more.
    Yours(Totals),
}

/// Who the new agent is: only the same agent's successor gets anything.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Hello {
    /// Its node.
    pub node: String,
    /// Its instance.
    pub instance: String,
    /// Where its pins are.
    pub bpffs: String,
    /// Where pods are.
    pub cgroup_root: String,
    /// Its version, for the log.
    pub version: String,
    /// Its pins' version, for the log.
    pub abi: u32,
}

/// An endpoint, as the old agent has it.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Endpoint {
    /// The pod's uid.
    pub uid: String,
    /// Cookie of its network namespace.
    pub netns: u64,
    /// The mode that the kernel has for it.
    pub mode: ModeName,
    /// It is served.
    pub served: bool,
    /// It has not been enrolled for so long (milliseconds), and still serves.
    pub leaving_for: Option<u64>,
    /// It has been strict for so long (milliseconds), and its plaintext flows are not closed.
    pub strict_for: Option<u64>,
    /// Its listeners; with [`Message::Endpoint`] they come along, in this order.
    pub listeners: Option<Listeners>,
}

/// Which listeners an endpoint has.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Listeners {
    /// Port of the outbound one on every IPv4 address, 0 for none.
    pub port4: u16,
    /// First of the ports on `::1`, 0 for none.
    pub port6: u16,
    /// How many outbound ones there are.
    pub outbound: u8,
    /// There is an inbound one for IPv4.
    pub inbound4: bool,
    /// There is an inbound one for IPv6.
    pub inbound6: bool,
}

impl Listeners {
    /// How many sockets they are.
    pub fn count(&self) -> usize {
        usize::from(self.outbound) + usize::from(self.inbound4) + usize::from(self.inbound6)
    }

    /// The outbound ones' ports.
    pub fn ports(&self) -> OutboundPorts {
        OutboundPorts { v4: self.port4, v6: self.port6 }
    }
}

/// A mode by its name.
#[allow(missing_docs, reason = "the modes' own names")]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum ModeName {
    Off,
    Observe,
    Permissive,
    Strict,
}

/// A socket that belongs to the node's agent, whichever process that is.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum NodeSocket {
    /// `admin/agent.sock`.
    Admin,
    /// The Workload API's.
    Workload,
    /// The one of the next hand-over.
    Handover,
}

/// How much was handed over.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Totals {
    /// Endpoints.
    pub endpoints: u32,
    /// Sockets of the node's own.
    pub sockets: u32,
}

impl Message {
    /// The message as bytes.
    ///
    /// # Errors
    /// [`MessageError::TooLong`].
    pub fn to_bytes(&self) -> Result<Vec<u8>, MessageError> {
        let mut bytes = format!("{PROTOCOL} ").into_bytes();
        serde_json::to_writer(&mut bytes, self)
            .map_err(|error| MessageError::Malformed(error.to_string()))?;
        if bytes.len() > MAX_LEN {
            return Err(MessageError::TooLong(bytes.len()));
        }
        Ok(bytes)
    }

    /// Reads a message.
    ///
    /// # Errors
    /// [`MessageError`].
    pub fn parse(bytes: &[u8]) -> Result<Self, MessageError> {
        if bytes.len() > MAX_LEN {
            return Err(MessageError::TooLong(bytes.len()));
        }
        let malformed = |what: &str| MessageError::Malformed(what.to_owned());
        let end = bytes.iter().position(|b| *b == b' ');
        let (version, object) =
            end.map(|end| bytes.split_at(end)).ok_or_else(|| malformed("no version before it"))?;
        let version = std::str::from_utf8(version)
            .ok()
            .filter(|text| text.len() <= 9 && text.bytes().all(|b| b.is_ascii_digit()))
            .and_then(|text| text.parse::<u32>().ok())
            .ok_or_else(|| malformed("no version before it"))?;
        if version != PROTOCOL {
            return Err(MessageError::Version(version));
        }
        let message: Self = serde_json::from_slice(object)
            .map_err(|error| MessageError::Malformed(error.to_string()))?;
        message.validate().map_err(malformed)?;
        Ok(message)
    }

    fn validate(&self) -> Result<(), &'static str> {
        match self {
            Self::Stands(endpoint) | Self::Endpoint(endpoint) => endpoint.validate(),
            Self::Hello(hello) => hello.validate(),
            Self::Refused(why) if why.len() > MAX_TEXT => Err("a reason of more than 1024 bytes"),
            Self::Listed(count) | Self::Yours(Totals { endpoints: count, .. })
                if *count as usize > MAX_ENDPOINTS =>
            {
                Err("more endpoints than any node has")
            }
            _ => Ok(()),
        }
    }

    /// A refusal, cut to what fits.
    pub fn refusal(why: &str) -> Self {
        Self::Refused(why.chars().take(MAX_TEXT / 4).collect())
    }
}

impl Hello {
    fn validate(&self) -> Result<(), &'static str> {
        let all = [&self.node, &self.instance, &self.bpffs, &self.cgroup_root, &self.version];
        if all.iter().any(|text| text.len() > MAX_TEXT / 2) {
            return Err("a name or path of more than 512 bytes");
        }
        Ok(())
    }

    /// Why `other` is no successor of this one, if it is none.
    pub fn differs(&self, other: &Self) -> Option<String> {
        let keys = [
            ("node", &self.node, &other.node),
            ("instance", &self.instance, &other.instance),
            ("bpffs", &self.bpffs, &other.bpffs),
            ("cgroupRoot", &self.cgroup_root, &other.cgroup_root),
        ];
        keys.iter().find(|(_, own, others)| own != others).map(|(key, own, others)| {
            format!("the agent that serves has {key} {own:?}, the new one {others:?}")
        })
    }
}

impl Endpoint {
    /// The endpoint as it stands.
    pub fn of(standing: &Standing) -> Self {
        let millis = |d: Duration| u64::try_from(d.as_millis()).unwrap_or(u64::MAX);
        Self {
            uid: (*standing.key.uid).to_owned(),
            netns: standing.key.netns,
            mode: standing.mode.into(),
            served: standing.served,
            leaving_for: standing.leaving_for.map(millis),
            strict_for: standing.strict_for.map(millis),
            listeners: None,
        }
    }

    /// As the reconciler wants it.
    pub fn standing(&self) -> Standing {
        Standing {
            key: EndpointKey { uid: self.uid.as_str().into(), netns: self.netns },
            mode: self.mode.into(),
            served: self.served,
            leaving_for: self.leaving_for.map(Duration::from_millis),
            strict_for: self.strict_for.map(Duration::from_millis),
        }
    }

    fn validate(&self) -> Result<(), &'static str> {
        let fine = |b: u8| b.is_ascii_alphanumeric() || b"-_.:".contains(&b);
        if self.uid.is_empty() || self.uid.len() > MAX_UID || !self.uid.bytes().all(fine) {
            return Err("a uid that is none");
        }
        if self.netns == 0 {
            return Err("a network namespace without a cookie");
        }
        let Some(listeners) = &self.listeners else { return Ok(()) };
        let wanted = usize::from(listeners.port4 != 0) + usize::from(listeners.ports().v6_count());
        if wanted != usize::from(listeners.outbound) || listeners.port6 > u16::MAX - 16 {
            return Err("ports that do not fit the number of listeners");
        }
        Ok(())
    }
}

impl From<Mode> for ModeName {
    fn from(mode: Mode) -> Self {
        match mode {
            Mode::Off => Self::Off,
            Mode::Observe => Self::Observe,
            Mode::Permissive => Self::Permissive,
            Mode::Strict => Self::Strict,
        }
    }
}

impl From<ModeName> for Mode {
    fn from(name: ModeName) -> Self {
        match name {
            ModeName::Off => Self::Off,
            ModeName::Observe => Self::Observe,
            ModeName::Permissive => Self::Permissive,
            ModeName::Strict => Self::Strict,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn endpoint() -> impl Strategy<Value = Endpoint> {
        let mode = prop_oneof![
            Just(ModeName::Off),
            Just(ModeName::Observe),
            Just(ModeName::Permissive),
            Just(ModeName::Strict)
        ];
        let listeners =
            proptest::option::of((1u16..60000, 0u16..60000, any::<bool>(), any::<bool>()));
        let times = (proptest::option::of(any::<u64>()), proptest::option::of(any::<u64>()));
        ("[a-z0-9-]{1,40}", 1u64.., mode, any::<bool>(), times, listeners).prop_map(
            |(uid, netns, mode, served, (leaving_for, strict_for), listeners)| Endpoint {
                uid,
                netns,
                mode,
                served,
                leaving_for,
                strict_for,
                listeners: listeners.map(|(port4, port6, inbound4, inbound6)| Listeners {
                    port4,
                    port6,
                    outbound: 1 + if port6 == 0 { 0 } else { 4 },
                    inbound4,
                    inbound6,
                }),
            },
        )
    }

    proptest! {
        #[test]
        fn what_is_written_is_read_back(endpoint in endpoint(), why in ".{0,300}") {
            let totals = Totals { endpoints: 3, sockets: 2 };
            for message in [
                Message::Endpoint(endpoint.clone()),
                Message::Stands(endpoint),
                Message::refusal(&why),
                Message::Yours(totals),
                Message::Socket(NodeSocket::Workload),
                Message::Ask,
                Message::TakeOver,
                Message::Done,
                Message::Listed(7),
            ] {
                let bytes = message.to_bytes().unwrap();
                prop_assert_eq!(Message::parse(&bytes).unwrap(), message);
            }
        }

        #[test]
        fn an_endpoint_stands_as_it_stood(endpoint in endpoint()) {
            let again = Endpoint::of(&endpoint.standing());
            prop_assert_eq!(again, Endpoint { listeners: None, ..endpoint });
        }

        #[test]
        fn reading_never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..600)) {
            let _ = Message::parse(&bytes);
        }

        /// A message with some bytes changed, cut or doubled is read or refused, never a panic;
        /// and what is read can be written again.
        #[test]
        fn damaged_messages_are_read_or_refused(
            endpoint in endpoint(),
            at in any::<prop::sample::Index>(),
            byte in any::<u8>(),
            cut in any::<bool>(),
        ) {
            let mut bytes = Message::Endpoint(endpoint).to_bytes().unwrap();
            let at = at.index(bytes.len());
            if cut { bytes.truncate(at) } else { bytes[at] = byte }
            if let Ok(message) = Message::parse(&bytes) {
                prop_assert!(message.to_bytes().is_ok());
            }
        }
    }

    fn refused(text: &str) -> String {
        Message::parse(text.as_bytes()).unwrap_err().to_string()
    }

    #[test]
    fn what_is_refused_is_told() {
        assert_eq!(Message::parse(b"1 \"done\""), Ok(Message::Done), "the control");
        assert_eq!(Message::parse(b"2 \"done\""), Err(MessageError::Version(2)));
        assert!(refused("\"done\"").contains("no version"));
        assert!(refused("-1 \"done\"").contains("no version"));
        assert!(refused("1 \"gone\"").contains("unknown variant"));
        assert!(refused("1 {\"listed\":16385}").contains("more endpoints"));
        let good = r#"1 {"stands":{"uid":"u","netns":7,"mode":"strict","served":true,"leavingFor":null,"strictFor":null,"listeners":null}}"#;
        assert!(Message::parse(good.as_bytes()).is_ok(), "the control");
        assert!(refused(&good.replace("\"u\"", "\"\"")).contains("uid"));
        assert!(refused(&good.replace("\"u\"", "\"a/b\"")).contains("uid"));
        assert!(refused(&good.replace(":7", ":0")).contains("cookie"));
        assert!(refused(&good.replace("strict\"", "stricter\"")).contains("unknown variant"));
        assert!(refused(&good.replace("\"served\"", "\"serve\"")).contains("unknown field"));
        let long = format!("1 {{\"refused\":\"{}\"}}", "x".repeat(MAX_LEN));
        assert!(refused(&long).contains("4096"));
        let ports = r#"1 {"endpoint":{"uid":"u","netns":7,"mode":"strict","served":true,"leavingFor":null,"strictFor":null,"listeners":{"port4":20000,"port6":0,"outbound":2,"inbound4":true,"inbound6":false}}}"#;
        assert!(refused(ports).contains("ports"));
        assert!(
            Message::parse(ports.replace("\"outbound\":2", "\"outbound\":1").as_bytes()).is_ok()
        );
    }

    #[test]
    fn only_the_same_agents_successor_is_one() {
        let own = Hello {
            node: "node-1".into(),
            instance: "default".into(),
            bpffs: "/sys/fs/bpf/signet".into(),
            cgroup_root: "/kubepods".into(),
            version: "1".into(),
            abi: 1,
        };
        assert_eq!(own.differs(&Hello { version: "2".into(), abi: 2, ..own.clone() }), None);
        let why = own.differs(&Hello { instance: "other".into(), ..own.clone() }).unwrap();
        assert!(why.contains("instance \"default\"") && why.contains("\"other\""), "{why}");
    }
}
