//! Takes out what looks like a key or a token.

/// What is there instead.
const REDACTED: &str = "[redacted]";

/// The text without PEM blocks of private keys, JSON Web Tokens and bearer tokens.
///
/// A second line: nothing that goes into a bundle should have any. An error message of a server, or
/// a value that stands where a path belongs, might.
pub fn scrub(text: &str) -> String {
    let text = replaced(text, |rest| rest.starts_with("-----BEGIN ").then(|| key(rest)).flatten());
    let text = replaced(&text, |rest| rest.starts_with("eyJ").then(|| jwt(rest)).flatten());
    replaced(&text, |rest| {
        let head = rest.get(..BEARER.len())?;
        head.eq_ignore_ascii_case(BEARER).then(|| bearer(rest)).flatten()
    })
}

const BEARER: &str = "bearer ";

/// The text with every part replaced whose length in bytes `find` gives of what begins with it.
fn replaced(text: &str, find: impl Fn(&str) -> Option<usize>) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(c) = rest.chars().next() {
        match find(rest) {
            Some(length) => {
                out.push_str(REDACTED);
                rest = rest.get(length..).unwrap_or_default();
            }
            None => {
                out.push(c);
                rest = &rest[c.len_utf8()..];
            }
        }
    }
    out
}

/// A private key's block, up to its end or, where that was cut off, the text's. Line breaks may be
/// written as JSON writes them.
fn key(rest: &str) -> Option<usize> {
    const MARK: &str = "PRIVATE KEY-----";
    let dashes = "-----BEGIN ".len();
    let label = dashes + rest[dashes..].find("-----")?;
    if !rest[..label].ends_with("PRIVATE KEY") {
        return None;
    }
    let body = label + "-----".len();
    Some(rest[body..].find(MARK).map_or(rest.len(), |at| body + at + MARK.len()))
}

/// A token: `header.payload.signature`, the first two of them JSON objects in base64url.
fn jwt(rest: &str) -> Option<usize> {
    let is_part = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.' | '=');
    let length = rest.find(|c| !is_part(c)).unwrap_or(rest.len());
    let mut parts = rest[..length].split('.');
    let (header, payload, signature) = (parts.next()?, parts.next()?, parts.next()?);
    // Of a signed one; of an encrypted one the second part is a key, and there are five.
    let is_token = header.len() >= 10
        && signature.len() >= 16
        && (payload.starts_with("eyJ") || parts.next().is_some());
    is_token.then_some(length)
}

/// What follows the word, if it is long enough to be a token.
fn bearer(rest: &str) -> Option<usize> {
    let is_part = |c: char| c.is_ascii_alphanumeric() || "-._~+/=".contains(c);
    let token = &rest[BEARER.len()..];
    let length = token.find(|c| !is_part(c)).unwrap_or(token.len());
    (length >= 16).then_some(BEARER.len() + length)
}

#[cfg(test)]
mod tests {
    use super::*;

    const JWT: &str =
        "eyJhbGciOiJFUzI1NiJ9.eyJzdWIiOiJhZ2VudCJ9.MEUCIQDx2Pz0m3n4b5v6c7x8z9lkjhgfdsaqwerty";

    #[test]
    fn keys_and_tokens_are_taken_out_and_nothing_else() {
        let key = "-----BEGIN EC PRIVATE KEY-----\nMHcCAQEE\n-----END EC PRIVATE KEY-----";
        for (text, expected) in [
            (format!("a {key}\nb {key} c"), "a [redacted]\nb [redacted] c"),
            (key.replace('\n', "\\n"), "[redacted]"),
            (format!("cut: {}", &key[..36]), "cut: [redacted]"),
            (format!("caTokenFile: \"{JWT}\"  # file"), "caTokenFile: \"[redacted]\"  # file"),
            (format!("Authorization: Bearer {JWT} x"), "Authorization: Bearer [redacted] x"),
            ("bearer 0123456789abcdef,".into(), "[redacted],"),
        ] {
            assert_eq!(scrub(&text), expected);
        }
        for text in [
            "",
            "-----BEGIN CERTIFICATE-----\nMIIB\n-----END CERTIFICATE-----",
            "-----BEGIN ",
            "the bearer of bad news: spiffe://cluster.local/ns/shop/sa/front, eyJ and eyJa.b.c",
            "Bearer token expired",
            "größer als 日本",
        ] {
            assert_eq!(scrub(text), text);
        }
    }
}
