//! Requests whose every field is known. Protobuf skips what it does not know; a filter that is
//! skipped would show what was not asked for, so a request of a newer client is refused by the
//! number of the field that this build does not have.
//!
//! It looks at the bytes before they become messages, because a message of a few bytes can become
//! one of a kilobyte: how many filters there are is bounded here.

use std::{any::TypeId, marker::PhantomData, sync::OnceLock};

use bytes::{Buf, Bytes};
use prost::Message;
use prost_reflect::{DescriptorPool, Kind, MessageDescriptor};
use tonic::{
    Status,
    codec::{Codec, DecodeBuf, Decoder},
};
use tonic_prost::{ProstDecoder, ProstEncoder};

use super::{DESCRIPTORS, observer::GetFlowsRequest};

/// The message that is looked at.
const REQUEST: &str = "observer.GetFlowsRequest";
/// Its filters.
const FILTER: &str = "flow.FlowFilter";
/// Filters that a request may carry.
const MAX_FILTERS: usize = 256;
/// Messages within messages; ours are three deep.
const MAX_DEPTH: usize = 16;

/// Why a request is refused.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum StrictError {
    /// A field that this build does not have.
    #[error("{what} field {path} is not known to Signet, which would ignore it")]
    Unknown {
        /// `filter`, or `request`.
        what: &'static str,
        /// Its number, behind the names of the fields that it is in.
        path: String,
    },
    /// More filters than a request may have.
    #[error("the request has more than {MAX_FILTERS} filters")]
    TooMany,
    /// No protobuf.
    #[error("the request cannot be read: {0}")]
    Malformed(&'static str),
    /// The embedded descriptors cannot be used: a defect of the build.
    #[error("the descriptors of this build cannot be used")]
    Descriptors,
}

impl From<StrictError> for Status {
    fn from(error: StrictError) -> Self {
        match error {
            StrictError::Descriptors => Self::internal(error.to_string()),
            _ => Self::invalid_argument(error.to_string()),
        }
    }
}

/// Looks for fields of a `GetFlowsRequest` that this build does not have.
///
/// # Errors
///
/// The first such field; bytes that are no protobuf (encoding.md of its documentation); too many
/// filters.
pub fn check(request: &[u8]) -> Result<(), StrictError> {
    static DESCRIPTOR: OnceLock<Option<MessageDescriptor>> = OnceLock::new();
    let descriptor = DESCRIPTOR
        .get_or_init(|| DescriptorPool::decode(DESCRIPTORS).ok()?.get_message_by_name(REQUEST));
    let descriptor = descriptor.as_ref().ok_or(StrictError::Descriptors)?;
    let mut scan = Scan { path: Vec::new(), filters: 0, within_filter: false };
    scan.message(request, descriptor)
}

struct Scan {
    path: Vec<String>,
    filters: usize,
    within_filter: bool,
}

impl Scan {
    fn message(
        &mut self,
        mut bytes: &[u8],
        descriptor: &MessageDescriptor,
    ) -> Result<(), StrictError> {
        while !bytes.is_empty() {
            let key = varint(&mut bytes)?;
            let number = u32::try_from(key >> 3).ok().filter(|number| *number > 0);
            let number = number.ok_or(StrictError::Malformed("a field has no number"))?;
            let value: &[u8] = match key & 7 {
                0 => {
                    varint(&mut bytes)?;
                    &[]
                }
                1 => take(&mut bytes, 8)?,
                2 => {
                    let length = varint(&mut bytes)?;
                    take(&mut bytes, usize::try_from(length).unwrap_or(usize::MAX))?
                }
                5 => take(&mut bytes, 4)?,
                _ => return Err(StrictError::Malformed("a field is of no type that is in use")),
            };
            let Some(field) = descriptor.get_field(number) else {
                self.path.push(number.to_string());
                let what = if self.within_filter { "filter" } else { "request" };
                return Err(StrictError::Unknown { what, path: self.path.join(".") });
            };
            if let Kind::Message(inner) = field.kind() {
                if key & 7 != 2 {
                    return Err(StrictError::Malformed("a message is of another type"));
                }
                if self.path.len() >= MAX_DEPTH {
                    return Err(StrictError::Malformed("it is nested too deeply"));
                }
                let is_filter = inner.full_name() == FILTER;
                if is_filter {
                    self.filters += 1;
                    if self.filters > MAX_FILTERS {
                        return Err(StrictError::TooMany);
                    }
                    self.within_filter = true;
                } else {
                    self.path.push(field.name().to_owned());
                }
                self.message(value, &inner)?;
                if is_filter {
                    self.within_filter = false;
                } else {
                    self.path.pop();
                }
            }
        }
        Ok(())
    }
}

fn varint(bytes: &mut &[u8]) -> Result<u64, StrictError> {
    let mut value = 0u64;
    for (index, byte) in bytes.iter().take(10).enumerate() {
        let bits = u64::from(byte & 0x7f);
        // Of the tenth byte one bit is left of 64.
        if index == 9 && bits > 1 {
            break;
        }
        value |= bits << (7 * index);
        if byte & 0x80 == 0 {
            *bytes = &bytes[index + 1..];
            return Ok(value);
        }
    }
    Err(StrictError::Malformed("a number does not end"))
}

fn take<'a>(bytes: &mut &'a [u8], length: usize) -> Result<&'a [u8], StrictError> {
    let (taken, rest) = bytes.split_at_checked(length).ok_or(StrictError::Malformed("cut off"))?;
    *bytes = rest;
    Ok(taken)
}

/// The codec of our services: prost's, but that a `GetFlowsRequest` is [`check`]ed.
#[derive(Clone, Debug)]
pub struct StrictCodec<T, U>(PhantomData<(T, U)>);

impl<T, U> Default for StrictCodec<T, U> {
    fn default() -> Self {
        Self(PhantomData)
    }
}

impl<T, U> Codec for StrictCodec<T, U>
where
    T: Message + Send + 'static,
    U: Message + Default + Send + 'static,
{
    type Encode = T;
    type Decode = U;
    type Encoder = ProstEncoder<T>;
    type Decoder = StrictDecoder<U>;

    fn encoder(&mut self) -> Self::Encoder {
        ProstEncoder::default()
    }

    fn decoder(&mut self) -> Self::Decoder {
        StrictDecoder(ProstDecoder::default())
    }
}

/// The decoder of [`StrictCodec`].
#[derive(Clone, Debug)]
pub struct StrictDecoder<U>(ProstDecoder<U>);

impl<U: Message + Default + 'static> Decoder for StrictDecoder<U> {
    type Item = U;
    type Error = Status;

    fn decode(&mut self, buf: &mut DecodeBuf<'_>) -> Result<Option<U>, Status> {
        if TypeId::of::<U>() != TypeId::of::<GetFlowsRequest>() {
            return self.0.decode(buf);
        }
        let bytes: Bytes = buf.copy_to_bytes(buf.remaining());
        check(&bytes)?;
        let read = U::decode(bytes).map_err(|error| Status::invalid_argument(error.to_string()))?;
        Ok(Some(read))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proto::flow::{EventTypeFilter, FlowFilter, Workload};

    /// A field of bytes.
    fn field(number: u32, value: &[u8]) -> Vec<u8> {
        let mut bytes = Vec::new();
        prost::encoding::encode_varint(u64::from(number << 3 | 2), &mut bytes);
        prost::encoding::encode_varint(value.len() as u64, &mut bytes);
        bytes.extend(value);
        bytes
    }

    fn known() -> GetFlowsRequest {
        let workload = Workload { kind: "Deployment".into(), name: "payments".into() };
        let filter = FlowFilter {
            source_pod: vec!["shop/".into()],
            any_port: vec![1, 2, 65_535],
            reply: vec![true, false],
            verdict: vec![1, 2],
            event_type: vec![EventTypeFilter { r#type: 5, match_sub_type: true, sub_type: -1 }],
            source_workload: vec![workload],
            destination_namespace: vec!["shop".into()],
            ..FlowFilter::default()
        };
        GetFlowsRequest {
            number: u64::MAX,
            follow: true,
            whitelist: vec![filter.clone(), FlowFilter::default()],
            blacklist: vec![filter],
            since: Some(prost_types::Timestamp { seconds: -1, nanos: 5 }),
            until: Some(prost_types::Timestamp { seconds: i64::MAX, nanos: 0 }),
            first: true,
            field_mask: Some(prost_types::FieldMask { paths: vec!["verdict".into()] }),
            extensions: Some(prost_types::Any { type_url: "x".into(), value: vec![8, 1] }),
            experimental: None,
        }
    }

    #[test]
    fn what_is_known_passes_and_what_is_not_is_named() {
        let good = known().encode_to_vec();
        assert_eq!(check(&good), Ok(()));
        assert_eq!(check(&[]), Ok(()));
        let whitelisted = |filter: Vec<u8>| field(6, &filter);
        for (more, said) in [
            (whitelisted(field(41, b"x")), "filter field 41 is not known"),
            (whitelisted(vec![0xd0, 0x02, 1]), "filter field 42 is not known"),
            (field(5, &field(150_014, b"x")), "filter field 150014 is not known"),
            (
                whitelisted(field(26, &field(3, b"x"))),
                "filter field source_workload.3 is not known",
            ),
            (whitelisted(field(6, &field(9, b""))), "filter field event_type.9 is not known"),
            (field(11, b"x"), "request field 11 is not known"),
            (field(7, &field(3, b"x")), "request field since.3 is not known"),
        ] {
            // Wherever it stands.
            for bytes in [[&good[..], &more].concat(), [&more[..], &good].concat()] {
                let error = check(&bytes).unwrap_err();
                assert!(error.to_string().starts_with(said), "{error}, not {said}");
                assert_eq!(Status::from(error).code(), tonic::Code::InvalidArgument);
            }
        }
    }

    #[test]
    fn what_is_no_protobuf_is_refused_and_so_are_many_filters() {
        for bytes in [
            &[0x08][..],                                             // a number is missing
            &[0x32, 5, 0],                                           // cut off
            &[0x33],                                                 // a group
            &[0x00, 1],                                              // field 0
            &[0x30, 1],                                              // a filter that is a number
            &[0x80; 11],                                             // a key without an end
            &[0x08, 255, 255, 255, 255, 255, 255, 255, 255, 255, 2], // more than 64 bits
        ] {
            assert!(matches!(check(bytes), Err(StrictError::Malformed(_))), "{bytes:?}");
        }
        let of = |n: usize| field(6, b"").repeat(n);
        assert_eq!(check(&of(MAX_FILTERS)), Ok(()));
        assert_eq!(check(&of(MAX_FILTERS + 1)), Err(StrictError::TooMany));
    }

    proptest::proptest! {
        /// What prost writes is known, and what is cut or changed makes no panic.
        #[test]
        fn any_bytes_are_answered(bytes: Vec<u8>, cut: proptest::sample::Index) {
            let _ = check(&bytes);
            let good = known().encode_to_vec();
            let _ = check(&good[..cut.index(good.len())]);
        }
    }
}
