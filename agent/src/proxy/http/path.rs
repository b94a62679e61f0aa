//! Request targets: one spelling a path, or a refusal.
//!
//! Policy compares paths as text, applications decode them, and no two do it alike. A path that
//! servers read differently is refused; every other one gets the one spelling that is judged and
//! forwarded (RFC 3986 §6.2.2: case of escapes, escapes of unreserved characters, dot segments).

use std::borrow::Cow;

/// Longest request target, bytes.
pub const LARGEST_TARGET: usize = 16 << 10;

/// Why a path has more than one meaning.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Ambiguous {
    /// Does not begin with `/`.
    #[error("the path does not begin with a slash")]
    NotAbsolute,
    /// Longer than [`LARGEST_TARGET`].
    #[error("the request target is longer than {LARGEST_TARGET} bytes")]
    TooLong,
    /// A character that has no place in a path (RFC 3986 §3.3).
    #[error("the path holds a character that must be escaped")]
    Character,
    /// A fragment: clients keep it to themselves.
    #[error("the request target has a fragment")]
    Fragment,
    /// `%` without two hexadecimal digits.
    #[error("the path holds a percent sign without two hexadecimal digits")]
    Escape,
    /// A separator in disguise: `%2F`, `%5C` or a backslash, of which some servers make a slash.
    #[error("the path holds an escaped slash or a backslash")]
    Separator,
    /// `;`, behind which some servers see parameters and others more of the name.
    #[error("the path holds a semicolon")]
    Parameter,
    /// `%25`: whoever decodes twice sees another path.
    #[error("the path holds an escaped percent sign")]
    DoubleEscape,
    /// An escaped control character.
    #[error("the path holds an escaped control character")]
    Control,
    /// Escaped bytes that are no UTF-8, overlong forms among them.
    #[error("the path's escapes are not UTF-8")]
    Encoding,
    /// `..` that leaves the root.
    #[error("the path leaves its root")]
    AboveRoot,
}

/// A path in its one spelling.
///
/// Escapes of unreserved characters are decoded, other escapes have upper-case digits, runs of
/// slashes are one slash, dot segments are gone. The result is a fixed point.
///
/// # Errors
/// Where servers disagree about what the path means.
pub fn normalise(path: &str) -> Result<Cow<'_, str>, Ambiguous> {
    if path.len() > LARGEST_TARGET {
        return Err(Ambiguous::TooLong);
    }
    if !path.starts_with('/') {
        return Err(Ambiguous::NotAbsolute);
    }
    if is_plain(path) {
        return Ok(Cow::Borrowed(path));
    }
    let spelt = unescape(path.as_bytes())?;
    let mut segments: Vec<&str> = Vec::new();
    let mut is_directory = false;
    for segment in spelt.split('/').skip(1) {
        is_directory = matches!(segment, "" | "." | "..");
        match segment {
            "" | "." => {}
            ".." => drop(segments.pop().ok_or(Ambiguous::AboveRoot)?),
            name => segments.push(name),
        }
    }
    let mut result = String::with_capacity(spelt.len());
    for segment in &segments {
        result.push('/');
        result.push_str(segment);
    }
    if is_directory || segments.is_empty() {
        result.push('/');
    }
    Ok(Cow::Owned(result))
}

/// True when there is nothing to do: no escapes, no empty or dot segments, nothing refused.
fn is_plain(path: &str) -> bool {
    let mut before = 0;
    for &byte in path.as_bytes() {
        if !is_path_byte(byte) || (before == b'/' && matches!(byte, b'/' | b'.')) {
            return false;
        }
        before = byte;
    }
    true
}

/// The path with the escapes that it keeps, each character checked.
fn unescape(path: &[u8]) -> Result<String, Ambiguous> {
    let mut spelt = String::with_capacity(path.len());
    // Escaped bytes beyond ASCII that make up one character have to be valid together.
    let mut beyond = Vec::new();
    let mut rest = path;
    while let [byte, tail @ ..] = rest {
        let value = if *byte == b'%' {
            let [high, low, tail @ ..] = tail else { return Err(Ambiguous::Escape) };
            rest = tail;
            (digit(*high)? << 4) | digit(*low)?
        } else {
            rest = tail;
            match byte {
                b'\\' => return Err(Ambiguous::Separator),
                b';' => return Err(Ambiguous::Parameter),
                b'#' => return Err(Ambiguous::Fragment),
                b'/' => {}
                byte if is_path_byte(*byte) => {}
                _ => return Err(Ambiguous::Character),
            }
            end_run(&mut beyond)?;
            spelt.push(char::from(*byte));
            continue;
        };
        if value >= 0x80 {
            beyond.push(value);
        } else {
            end_run(&mut beyond)?;
        }
        match value {
            b'/' | b'\\' => return Err(Ambiguous::Separator),
            b'%' => return Err(Ambiguous::DoubleEscape),
            b';' => return Err(Ambiguous::Parameter),
            0..=0x1f | 0x7f => return Err(Ambiguous::Control),
            value if is_unreserved(value) => spelt.push(char::from(value)),
            value => {
                const DIGITS: &[u8; 16] = b"0123456789ABCDEF";
                spelt.push('%');
                spelt.push(char::from(DIGITS[usize::from(value >> 4)]));
                spelt.push(char::from(DIGITS[usize::from(value & 15)]));
            }
        }
    }
    end_run(&mut beyond)?;
    Ok(spelt)
}

/// Checks a run of escaped bytes beyond ASCII.
fn end_run(bytes: &mut Vec<u8>) -> Result<(), Ambiguous> {
    let is_text = std::str::from_utf8(bytes).is_ok();
    bytes.clear();
    if is_text { Ok(()) } else { Err(Ambiguous::Encoding) }
}

fn digit(byte: u8) -> Result<u8, Ambiguous> {
    char::from(byte).to_digit(16).map(|d| d as u8).ok_or(Ambiguous::Escape)
}

/// RFC 3986 §2.3.
fn is_unreserved(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_' | b'~')
}

/// `pchar` without escapes and without `;`, or `/`.
fn is_path_byte(byte: u8) -> bool {
    is_unreserved(byte)
        || matches!(
            byte,
            b'/' | b'!'
                | b'$'
                | b'&'
                | b'\''
                | b'('
                | b')'
                | b'*'
                | b'+'
                | b','
                | b'='
                | b':'
                | b'@'
        )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_spelling_a_path() {
        for (path, expected) in [
            ("/", "/"),
            ("/api/v1/payments", "/api/v1/payments"),
            ("/api/v1/payments/", "/api/v1/payments/"),
            ("//api///v1//payments", "/api/v1/payments"),
            ("/api/./v1/payments", "/api/v1/payments"),
            ("/api/v2/../v1/payments", "/api/v1/payments"),
            ("/api/v1/payments/..", "/api/v1/"),
            ("/api/v1/payments/.", "/api/v1/payments/"),
            ("/..hidden/.x/a..b", "/..hidden/.x/a..b"),
            ("/%61pi/v1/p%61yments", "/api/v1/payments"),
            ("/%2e%2E/x", "refused"),
            ("/a/%2e%2E/x", "/x"),
            ("/a/%2e/x", "/a/x"),
            ("/caf%c3%a9%20x", "/caf%C3%A9%20x"),
            ("/a%3fb%23c", "/a%3Fb%23c"),
            ("/users/a@b:c", "/users/a@b:c"),
            ("/a/b/../..", "/"),
            ("/a//../b", "/b"),
        ] {
            let spelt = normalise(path).map(Cow::into_owned);
            assert_eq!(spelt.as_deref().unwrap_or("refused"), expected, "{path}");
            if let Ok(spelt) = spelt {
                assert_eq!(normalise(&spelt).as_deref(), Ok(&*spelt), "a fixed point");
            }
        }
    }

    #[test]
    fn what_servers_read_differently_is_refused() {
        for (path, why) in [
            ("api", Ambiguous::NotAbsolute),
            ("", Ambiguous::NotAbsolute),
            ("/../x", Ambiguous::AboveRoot),
            ("/a/../../x", Ambiguous::AboveRoot),
            ("/a%2Fb", Ambiguous::Separator),
            ("/a%2fb", Ambiguous::Separator),
            ("/a%5Cb", Ambiguous::Separator),
            ("/a\\b", Ambiguous::Separator),
            ("/public/..;/admin", Ambiguous::Parameter),
            ("/admin;x=1", Ambiguous::Parameter),
            ("/admin%3Bx", Ambiguous::Parameter),
            ("/a%252Fb", Ambiguous::DoubleEscape),
            ("/a%25", Ambiguous::DoubleEscape),
            ("/a%", Ambiguous::Escape),
            ("/a%4", Ambiguous::Escape),
            ("/a%zz", Ambiguous::Escape),
            ("/a%00", Ambiguous::Control),
            ("/a%0d%0ab", Ambiguous::Control),
            ("/a%7F", Ambiguous::Control),
            ("/a%c0%afb", Ambiguous::Encoding),
            ("/a%e0%80%af", Ambiguous::Encoding),
            ("/a%ff", Ambiguous::Encoding),
            ("/a%c3b", Ambiguous::Encoding),
            ("/a b", Ambiguous::Character),
            ("/a\u{e9}", Ambiguous::Character),
            ("/a\"b", Ambiguous::Character),
            ("/a#b", Ambiguous::Fragment),
        ] {
            assert_eq!(normalise(path), Err(why), "{path}");
        }
        let long = "/".to_owned() + &"a".repeat(LARGEST_TARGET);
        assert_eq!(normalise(&long), Err(Ambiguous::TooLong));
        assert!(normalise(&long[..LARGEST_TARGET]).is_ok(), "control");
    }
}
