//! Requests that a test makes by itself, over HTTP as everybody else.

use std::{
    io::{Read, Write},
    net::TcpStream,
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::ApiServer;

/// The longest that an answer may take.
const TIMEOUT: Duration = Duration::from_secs(10);

/// A request of a test.
#[derive(Clone, Copy, Debug)]
pub struct Ask<'a> {
    /// `GET`, `POST`, …
    pub method: &'a str,
    /// Path and query.
    pub path: &'a str,
    /// Of the body.
    pub content: &'a str,
    /// The body; null: none.
    pub body: &'a Value,
    /// Whose token; `None`: the one that may do everything.
    pub token: Option<&'a str>,
}

impl<'a> Ask<'a> {
    /// Creates an object.
    pub fn create(path: &'a str, body: &'a Value) -> Self {
        Self { method: "POST", path, content: "application/json", body, token: None }
    }

    /// Applies an object by server-side apply; the path names the field manager.
    pub fn apply(path: &'a str, body: &'a Value) -> Self {
        Self { method: "PATCH", path, content: "application/apply-patch+yaml", body, token: None }
    }

    /// Merges into an object.
    pub fn merge(path: &'a str, body: &'a Value) -> Self {
        Self { method: "PATCH", path, content: "application/merge-patch+json", body, token: None }
    }

    /// With somebody's token.
    #[must_use]
    pub fn by(self, token: &'a str) -> Self {
        Self { token: Some(token), ..self }
    }
}

impl ApiServer {
    /// Makes a request; its status code, and what was answered.
    pub fn ask(&self, ask: Ask<'_>) -> Result<(u16, Value)> {
        let Ask { method, path, content, body, token } = ask;
        let token = token.unwrap_or(&self.shared.client_token);
        let body = if body.is_null() { String::new() } else { body.to_string() };
        let mut stream = TcpStream::connect(self.address).context("the API server")?;
        stream.set_read_timeout(Some(TIMEOUT))?;
        write!(
            stream,
            "{method} {path} HTTP/1.1\r\nHost: lab\r\nConnection: close\r\nAuthorization: Bearer \
             {token}\r\nContent-Type: {content}\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        )?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).context("the answer")?;
        let (head, body) = answer.split_once("\r\n\r\n").context("no answer")?;
        let code = head.split_whitespace().nth(1).context("no status")?;
        ensure!(!head.to_lowercase().contains("transfer-encoding"), "an answer in chunks: {head}");
        Ok((code.parse()?, serde_json::from_str(body).with_context(|| body.to_owned())?))
    }
}
