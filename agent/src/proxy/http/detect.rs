//! Which protocol a flow speaks, by its first bytes.

/// What every HTTP/2 connection begins with (RFC 9113 §3.4).
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// Bytes by which a request's method has ended.
const LONGEST_METHOD: usize = 32;

/// A protocol whose requests can be judged.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Protocol {
    /// HTTP/1.0 or HTTP/1.1.
    Http1,
    /// HTTP/2 by prior knowledge.
    Http2,
}

/// What the first bytes say.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Found {
    /// This protocol.
    Speaks(Protocol),
    /// Too few bytes to tell.
    Unsure,
    /// Nothing that has requests.
    Other,
}

/// Looks at the first bytes of a flow.
pub fn detect(bytes: &[u8]) -> Found {
    if bytes.starts_with(PREFACE) {
        return Found::Speaks(Protocol::Http2);
    }
    if PREFACE.starts_with(bytes) {
        return Found::Unsure;
    }
    // Methods may be any token, but all that exist are of capitals; most protocols that begin
    // with a letter are told apart by that at once, instead of by a silence.
    let is_method = |b: &u8| b.is_ascii_uppercase() || b"-_".contains(b);
    let method = bytes.iter().position(|b| !is_method(b));
    match method {
        Some(length) if length > 0 && bytes.get(length) == Some(&b' ') => {
            Found::Speaks(Protocol::Http1)
        }
        None if bytes.len() <= LONGEST_METHOD => Found::Unsure,
        _ => Found::Other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_bytes_tell() {
        for (bytes, found) in [
            (&b"GET / HTTP/1.1\r\n"[..], Found::Speaks(Protocol::Http1)),
            (b"PROPFIND /", Found::Speaks(Protocol::Http1)),
            (b"PRI * HTTP/1.1\r\n\r\n", Found::Speaks(Protocol::Http1)),
            (PREFACE, Found::Speaks(Protocol::Http2)),
            (&PREFACE[..10], Found::Unsure),
            (b"", Found::Unsure),
            (b"P", Found::Unsure),
            (b"POST", Found::Unsure),
            (b"\x16\x03\x01\x02\x00\x01", Found::Other),
            (b"M-SEARCH * HTTP/1.1\r\n", Found::Speaks(Protocol::Http1)),
            (b"get / HTTP/1.1\r\n", Found::Other),
            (b"hello", Found::Other),
            (b"SSH-2.0-OpenSSH_9.6\r\n", Found::Other),
            (b"*1\r\n$4\r\nPING\r\n", Found::Other),
            (b"\r\nGET / HTTP/1.1\r\n", Found::Other),
            (b" GET / HTTP/1.1\r\n", Found::Other),
            (&[b'A'; LONGEST_METHOD + 1], Found::Other),
        ] {
            assert_eq!(detect(bytes), found, "{:?}", String::from_utf8_lossy(bytes));
        }
    }
}
