//! Answers in protobuf's own JSON form, as Hubble's command line prints them (`-o jsonpb`):
//! fields by their names in the `.proto`, 64-bit numbers as text, empty fields left out.

use prost::Message;
use prost_reflect::{DescriptorPool, DynamicMessage, MessageDescriptor, SerializeOptions};

use crate::proto::{DESCRIPTORS, observer::GetFlowsResponse};

/// Why there is no JSON form.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum JsonpbError {
    /// The embedded descriptors cannot be used: a defect of the build.
    #[error("the descriptors of this build: {0}")]
    Descriptors(#[from] prost_reflect::DescriptorError),
    /// The build has no such message: a defect, too.
    #[error("the descriptors of this build do not have {0}")]
    Message(&'static str),
    /// The message is not what it says.
    #[error("the answer cannot be read: {0}")]
    Decode(#[from] prost::DecodeError),
    /// It has no JSON form.
    #[error("the answer has no JSON form: {0}")]
    Json(#[from] serde_json::Error),
}

/// Writes answers.
#[derive(Clone, Debug)]
pub struct Jsonpb {
    response: MessageDescriptor,
}

impl Jsonpb {
    /// Reads the descriptors.
    pub fn new() -> Result<Self, JsonpbError> {
        const RESPONSE: &str = "observer.GetFlowsResponse";
        let pool = DescriptorPool::decode(DESCRIPTORS)?;
        let response = pool.get_message_by_name(RESPONSE).ok_or(JsonpbError::Message(RESPONSE))?;
        Ok(Self { response })
    }

    /// One answer on one line, without a line's end.
    pub fn line(&self, response: &GetFlowsResponse) -> Result<String, JsonpbError> {
        let bytes = response.encode_to_vec();
        let message = DynamicMessage::decode(self.response.clone(), &*bytes)?;
        let mut line = serde_json::Serializer::new(Vec::with_capacity(2 * bytes.len()));
        let options = SerializeOptions::new().use_proto_field_name(true);
        message.serialize_with_options(&mut line, &options)?;
        // serde_json writes nothing else.
        Ok(String::from_utf8_lossy(&line.into_inner()).into_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        flow::example::{allowed, refused},
        observer::encode::encode,
        proto::{self, flow, observer::get_flows_response::ResponseTypes},
    };

    fn json(of: ResponseTypes) -> serde_json::Value {
        let response = GetFlowsResponse {
            response_types: Some(of),
            node_name: "node-2".into(),
            time: Some(proto::timestamp(allowed().time)),
        };
        let line = Jsonpb::new().unwrap().line(&response).unwrap();
        assert!(!line.contains('\n'));
        serde_json::from_str(&line).unwrap()
    }

    #[test]
    fn a_flow_has_hubbles_json_form() {
        let shown = json(ResponseTypes::Flow(encode(&allowed(), "cluster.local")));
        assert_eq!(shown["node_name"], "node-2");
        assert_eq!(shown["time"], "2026-08-06T10:12:04.318Z");
        let flow = &shown["flow"];
        for (pointer, expected) in [
            ("/verdict", "FORWARDED".into()),
            ("/IP/source", "10.0.1.5".into()),
            ("/IP/ipVersion", "IPv4".into()),
            ("/IP/encrypted", true.into()),
            ("/l4/TCP/destination_port", 8080.into()),
            ("/source/namespace", "shop".into()),
            ("/source/pod_name", "frontend-7d9c".into()),
            ("/source/workloads/0/kind", "Deployment".into()),
            ("/Type", "L3_L4".into()),
            ("/traffic_direction", "INGRESS".into()),
            ("/is_reply", false.into()),
            ("/event_type/type", 5.into()),
            ("/ingress_allowed_by/0/name", "payments-callers".into()),
            // 64-bit numbers are text.
            ("/ingress_allowed_by/0/revision", "118".into()),
            ("/extensions/@type", "type.googleapis.com/signet.flow.v1.Detail".into()),
            ("/extensions/known_by", serde_json::Value::Null),
            ("/extensions/source/known_by", "mtls".into()),
        ] {
            let found = flow.pointer(pointer).cloned().unwrap_or_default();
            assert_eq!(found, expected, "{pointer}: {flow:#}");
        }
        let dropped = json(ResponseTypes::Flow(encode(&refused(), "cluster.local")));
        assert_eq!(dropped["flow"]["drop_reason_desc"], "UNENCRYPTED_TRAFFIC");
        assert_eq!(flow.get("drop_reason_desc"), None, "{flow:#}");
    }

    #[test]
    fn losses_have_it_too() {
        let shown = json(ResponseTypes::LostEvents(flow::LostEvent {
            source: flow::LostEventSource::HubbleRingBuffer.into(),
            num_events_lost: 312,
            cpu: None,
            cause: String::new(),
        }));
        assert_eq!(shown["lost_events"]["num_events_lost"], "312");
        assert_eq!(shown["lost_events"]["source"], "HUBBLE_RING_BUFFER");
    }
}
