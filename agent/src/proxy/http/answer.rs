//! What a client is answered where the application is not asked, and what carries either answer.

use std::{
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    task::{Context, Poll},
};

use bytes::Bytes;
use http::{
    HeaderMap, HeaderName, HeaderValue, Response, StatusCode, Version,
    header::{CONNECTION, CONTENT_TYPE, WWW_AUTHENTICATE},
};
use http_body::{Body, Frame, SizeHint};
use hyper::body::Incoming;
use signet_ebpf::abi::Reason;
use tokio::sync::Notify;

use super::head::is_grpc;
use crate::telemetry::reason;

/// The reason's name, in a refusal.
pub const REASON: HeaderName = HeaderName::from_static("signet-reason");

/// Requests of one flow that are not answered whole.
#[derive(Clone, Debug, Default)]
pub struct Open {
    count: Arc<AtomicUsize>,
    ended: Arc<Notify>,
}

/// One of them, until it is dropped.
#[derive(Debug)]
pub struct Answering(Open);

impl Open {
    /// Counts a request.
    pub fn begin(&self) -> Answering {
        self.count.fetch_add(1, Ordering::AcqRel);
        Answering(self.clone())
    }

    /// Completes when there is none.
    pub async fn none(&self) {
        loop {
            let ended = self.ended.notified();
            if self.count.load(Ordering::Acquire) == 0 {
                return;
            }
            ended.await;
        }
    }
}

impl Drop for Answering {
    fn drop(&mut self) {
        self.0.count.fetch_sub(1, Ordering::AcqRel);
        self.0.ended.notify_waiters();
    }
}

/// An answer's body.
#[derive(Debug)]
pub enum Answer {
    /// Ours.
    Said(Option<Bytes>),
    /// The application's.
    App(Incoming, Answering),
}

impl Body for Answer {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        match self.get_mut() {
            Self::Said(text) => Poll::Ready(text.take().map(|text| Ok(Frame::data(text)))),
            Self::App(body, _) => Pin::new(body).poll_frame(cx),
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Said(text) => text.is_none(),
            Self::App(body, _) => body.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Said(text) => SizeHint::with_exact(text.as_ref().map_or(0, Bytes::len) as u64),
            Self::App(body, _) => body.size_hint(),
        }
    }
}

/// A refusal that names its reason and nothing of the policy; a gRPC call gets its own form.
pub fn refusal(
    status: StatusCode,
    why: Reason,
    detail: Option<&dyn std::fmt::Display>,
    asked: &HeaderMap,
    version: Version,
) -> Response<Answer> {
    let name = reason::name(why);
    let text = match detail {
        Some(detail) => format!("signet: {name}: {detail}\n"),
        None => format!("signet: {name}\n"),
    };
    let mut response;
    if is_grpc(asked) {
        // gRPC's mapping: PERMISSION_DENIED, UNAUTHENTICATED, INTERNAL for what is no gRPC.
        let code = match status {
            StatusCode::FORBIDDEN => "7",
            StatusCode::UNAUTHORIZED => "16",
            _ => "13",
        };
        response = Response::new(Answer::Said(None));
        let headers = response.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
        headers.insert("grpc-status", HeaderValue::from_static(code));
        headers.insert("grpc-message", HeaderValue::from_static(name));
    } else {
        response = Response::new(Answer::Said(Some(text.into())));
        *response.status_mut() = status;
        let headers = response.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
        if status == StatusCode::UNAUTHORIZED {
            headers.insert(WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
    }
    response.headers_mut().insert(REASON, HeaderValue::from_static(name));
    if version != Version::HTTP_2 && status == StatusCode::BAD_REQUEST {
        // What follows a request that has no meaning has none either.
        response.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
    }
    response
}
