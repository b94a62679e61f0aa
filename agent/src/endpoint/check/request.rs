//! The HTTP request of a question.

use std::net::IpAddr;

use http::{HeaderMap, HeaderName, HeaderValue, Method};

use crate::{
    config::yaml::shorten,
    policy::{end_user::EndUser, request::RequestFacts},
};

/// Headers that a question may give.
const MAX_HEADERS: usize = 64;

/// A request that may be.
#[derive(Clone, PartialEq, Debug)]
pub struct AskedRequest {
    method: String,
    path: String,
    host: String,
    headers: HeaderMap,
    user: Option<EndUser>,
}

impl AskedRequest {
    /// Texts as people write them: a method (empty: GET), a normalised path without the query
    /// (empty: `/`), a host, headers as `NAME: VALUE`, and the claims of a token that is taken
    /// to be valid, as JSON. `None` when all of them are empty.
    ///
    /// # Errors
    ///
    /// What is wrong, with the form that is wanted.
    pub fn parse(
        method: &str,
        path: &str,
        host: &str,
        headers: &[String],
        claims: &str,
    ) -> Result<Option<Self>, String> {
        if [method, path, host, claims].iter().all(|text| text.is_empty()) && headers.is_empty() {
            return Ok(None);
        }
        let method = if method.is_empty() { "GET" } else { method };
        if Method::from_bytes(method.as_bytes()).is_err() {
            return Err(format!("{:?} is not a method; write one like GET", shorten(method)));
        }
        let path = if path.is_empty() { "/" } else { path };
        if !(path.starts_with('/') || path == "*") || path.contains(['?', '#']) {
            return Err(format!(
                "{:?} is not a path; write it with a leading / and without the query",
                shorten(path)
            ));
        }
        if headers.len() > MAX_HEADERS {
            return Err(format!("{} headers; {MAX_HEADERS} is the most", headers.len()));
        }
        let mut map = HeaderMap::new();
        for header in headers {
            let wrong = || format!("{:?} is not a header; write NAME: VALUE", shorten(header));
            let (name, value) = header.split_once(':').ok_or_else(wrong)?;
            let name: HeaderName = name.trim().parse().map_err(|_| wrong())?;
            let value = HeaderValue::from_str(value.trim()).map_err(|_| wrong())?;
            map.append(name, value);
        }
        let user = match claims {
            "" => None,
            _ => {
                let read = serde_json::from_str(claims).ok().and_then(EndUser::of_claims);
                Some(read.ok_or_else(|| {
                    format!(
                        "{:?} are not a token's claims; write a JSON object with iss and sub",
                        shorten(claims)
                    )
                })?)
            }
        };
        Ok(Some(Self {
            method: method.into(),
            path: path.into(),
            host: host.into(),
            headers: map,
            user,
        }))
    }

    /// The facts, of a request from this address.
    pub(super) fn facts(&self, remote_ip: IpAddr) -> RequestFacts<'_> {
        RequestFacts {
            method: &self.method,
            path: &self.path,
            host: &self.host,
            headers: &self.headers,
            sni: None,
            remote_ip,
            user: self.user.as_ref(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_read() {
        let parse = |method: &str, path: &str, headers: &[&str], claims: &str| {
            let headers: Vec<String> = headers.iter().map(|h| (*h).to_owned()).collect();
            AskedRequest::parse(method, path, "", &headers, claims)
        };
        assert_eq!(parse("", "", &[], ""), Ok(None));
        let read = parse("", "", &["X-A: b", "x-a:c"], "{\"iss\": \"i\", \"sub\": \"s\"}");
        let read = read.unwrap().unwrap();
        let facts = read.facts("10.0.0.1".parse().unwrap());
        assert_eq!((facts.method, facts.path), ("GET", "/"));
        assert_eq!(facts.headers.get_all("x-a").iter().count(), 2);
        assert_eq!(facts.user.unwrap().principal(), "i/s");
        for (method, path, header, claims, wanted) in [
            ("G T", "/", "", "", "is not a method"),
            ("GET", "a", "", "", "is not a path"),
            ("GET", "/a?b", "", "", "without the query"),
            ("GET", "/", "a", "", "is not a header"),
            ("GET", "/", "a b: c", "", "is not a header"),
            ("GET", "/", "", "{}", "are not a token's claims"),
            ("GET", "/", "", "{\"iss\": 3}", "are not a token's claims"),
            ("GET", "/", "", "[", "are not a token's claims"),
        ] {
            let headers: &[&str] = if header.is_empty() { &[] } else { &[header] };
            let error = parse(method, path, headers, claims).unwrap_err();
            assert!(error.contains(wanted), "{error}");
        }
    }
}
