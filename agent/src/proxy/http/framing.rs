//! How HTTP/1 requests are cut out of a byte stream: strictly, and before anybody else reads them.
//!
//! Request smuggling lives on what two parsers make of the same bytes. [`Framing`] reads a stream
//! by the letter of RFC 9112 without any of its leniencies and lets bytes through only when their
//! message has one meaning. The HTTP library behind it then parses what was let through: a request
//! passes when both found the same one.

use super::path::LARGEST_TARGET;

/// Longest head of a request, bytes.
pub const LARGEST_HEAD: usize = 64 << 10;
/// Most header fields of a request, and of its trailer.
pub const MOST_FIELDS: usize = 100;
/// Longest method, bytes.
const LARGEST_METHOD: usize = 32;
/// Longest line with a chunk's size, bytes.
const LARGEST_CHUNK_LINE: usize = 18;
/// Longest trailer, bytes.
const LARGEST_TRAILER: usize = 8 << 10;

/// What is wrong with a request.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Fault {
    /// The first line is not `METHOD SP target SP HTTP/1.x`.
    #[error("the request line is malformed")]
    RequestLine,
    /// Lower case, too long, or no token.
    #[error("the method is malformed")]
    Method,
    /// Not HTTP/1.0 or HTTP/1.1.
    #[error("the version is neither HTTP/1.0 nor HTTP/1.1")]
    Version,
    /// A line that ends without CR, or a CR that ends none.
    #[error("a line ends otherwise than with CR LF")]
    LineEnd,
    /// A line that goes on on the next one.
    #[error("a header field is folded over several lines")]
    Folded,
    /// No colon, space before it, or a character that no name has.
    #[error("a header field's name is malformed")]
    FieldName,
    /// A control character.
    #[error("a header field's value holds a control character")]
    FieldValue,
    /// More than [`LARGEST_HEAD`] bytes or [`MOST_FIELDS`] fields.
    #[error("the request's head is too large")]
    TooLarge,
    /// Both `content-length` and `transfer-encoding`.
    #[error("the request has both a content-length and a transfer-encoding")]
    TwoLengths,
    /// Repeated, or not a plain number.
    #[error("the content-length is malformed or repeated")]
    ContentLength,
    /// Anything but one `chunked`, on HTTP/1.1.
    #[error("the transfer-encoding is not exactly `chunked`")]
    TransferEncoding,
    /// No, or more than one, `host`; or not one of a URL.
    #[error("the host is missing, malformed or repeated")]
    Host,
    /// The target names another host than `host` does.
    #[error("the request target and the host differ")]
    HostMismatch,
    /// A chunk's size is malformed or carries an extension.
    #[error("a chunk's size is malformed or has an extension")]
    Chunk,
    /// A trailer field that changes the message's framing, routing or authentication.
    #[error("a trailer field may not be one")]
    Trailer,
    /// Anything but `100-continue`.
    #[error("an expectation other than 100-continue")]
    Expectation,
    /// An upgrade with a body, from HTTP/1.0, or to several protocols.
    #[error("the upgrade is malformed")]
    Upgrade,
    /// The head did not come in time.
    #[error("the request's head did not come in time")]
    Slow,
    /// The client ended in the middle of a request.
    #[error("the client ended in the middle of a request")]
    Truncated,
}

/// A request's head, as far as framing goes.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Head {
    /// The method.
    pub method: String,
    /// The request target, as it was sent.
    pub target: String,
    /// It asks for another protocol, which makes what follows it no HTTP.
    pub upgrades: bool,
}

/// What may be done with the bytes at hand.
#[derive(PartialEq, Eq, Debug)]
pub enum Step {
    /// So many bytes make a whole head: they may pass.
    Head(usize, Head),
    /// So many bytes may pass; at least one.
    Pass(usize),
    /// More bytes are needed.
    More,
    /// Nothing passes before [`Framing::go_on`].
    Hold,
    /// The message has more than one meaning, or none.
    Fault(Fault),
}

/// The state of one stream.
#[derive(Debug)]
pub struct Framing {
    state: State,
    /// Bytes of a line or head that were looked at and end none.
    seen: usize,
}

#[derive(Debug)]
enum State {
    Head,
    /// So much of a body is to come.
    Sized(u64),
    /// A chunk's size.
    Chunk,
    /// So much of a chunk is to come.
    Data(u64),
    /// The CR LF behind a chunk.
    DataEnd,
    Trailer,
    /// A request to switch protocols is not answered yet.
    Held,
    /// No HTTP any more.
    Opaque,
}

impl Default for Framing {
    fn default() -> Self {
        Self::new()
    }
}

impl Framing {
    /// A stream of which nothing was read.
    pub fn new() -> Self {
        Self { state: State::Head, seen: 0 }
    }

    /// True where the stream may end: between two requests, or where it is no HTTP any more.
    pub fn is_between(&self) -> bool {
        matches!(self.state, State::Head | State::Opaque | State::Held)
    }

    /// True where a request's head comes next.
    pub fn awaits_head(&self) -> bool {
        matches!(self.state, State::Head)
    }

    /// The upgrade is answered: what follows is another protocol, or more HTTP.
    pub fn go_on(&mut self, switched: bool) {
        if matches!(self.state, State::Held) {
            self.state = if switched { State::Opaque } else { State::Head };
        }
    }

    /// What may be done with the bytes at hand, which begin where the last step ended.
    pub fn step(&mut self, bytes: &[u8]) -> Step {
        if bytes.is_empty() {
            return match self.state {
                State::Held => Step::Hold,
                _ => Step::More,
            };
        }
        match &mut self.state {
            State::Held => Step::Hold,
            State::Opaque => Step::Pass(bytes.len()),
            State::Sized(left) => {
                let n = take(left, bytes.len());
                if *left == 0 {
                    self.state = State::Head;
                }
                Step::Pass(n)
            }
            State::Data(left) => {
                let n = take(left, bytes.len());
                if *left == 0 {
                    self.state = State::DataEnd;
                }
                Step::Pass(n)
            }
            State::DataEnd => match bytes {
                [b'\r', b'\n', ..] => {
                    self.state = State::Chunk;
                    Step::Pass(2)
                }
                [b'\r'] => Step::More,
                _ => Step::Fault(Fault::Chunk),
            },
            State::Chunk => self.chunk(bytes),
            State::Trailer => self.trailer(bytes),
            State::Head => self.head(bytes),
        }
    }

    fn chunk(&mut self, bytes: &[u8]) -> Step {
        let Some(end) = bytes.iter().position(|&b| b == b'\n') else {
            let is_too_long = bytes.len() > LARGEST_CHUNK_LINE;
            return if is_too_long { Step::Fault(Fault::Chunk) } else { Step::More };
        };
        let line = &bytes[..end];
        let Some(digits) = line.strip_suffix(b"\r") else { return Step::Fault(Fault::LineEnd) };
        // No sign, no space, no extension, no more than a number holds.
        let is_size = (1..=15).contains(&digits.len()) && digits.iter().all(u8::is_ascii_hexdigit);
        let size = std::str::from_utf8(digits).ok().filter(|_| is_size);
        let Some(size) = size.and_then(|size| u64::from_str_radix(size, 16).ok()) else {
            return Step::Fault(Fault::Chunk);
        };
        self.state = if size == 0 { State::Trailer } else { State::Data(size) };
        Step::Pass(end + 1)
    }

    fn trailer(&mut self, bytes: &[u8]) -> Step {
        let end = if bytes.starts_with(b"\r\n") { Some(2) } else { self.end_of_fields(bytes) };
        let Some(end) = end else {
            let is_too_long = bytes.len() > LARGEST_TRAILER;
            return if is_too_long { Step::Fault(Fault::TooLarge) } else { Step::More };
        };
        if end > 2
            && let Err(fault) = check_trailer(&bytes[..end])
        {
            return Step::Fault(fault);
        }
        self.state = State::Head;
        self.seen = 0;
        Step::Pass(end)
    }

    fn head(&mut self, bytes: &[u8]) -> Step {
        let Some(end) = self.end_of_fields(bytes) else {
            // Refuse early what no further byte can mend.
            return match bytes {
                [b'\r' | b'\n' | b' ', ..] => Step::Fault(Fault::RequestLine),
                _ if bytes.len() > LARGEST_HEAD => Step::Fault(Fault::TooLarge),
                _ => Step::More,
            };
        };
        if end > LARGEST_HEAD {
            return Step::Fault(Fault::TooLarge);
        }
        self.seen = 0;
        match parse(&bytes[..end]) {
            Ok((head, body)) => {
                self.state = match body {
                    _ if head.upgrades => State::Held,
                    Body::Sized(0) => State::Head,
                    Body::Sized(length) => State::Sized(length),
                    Body::Chunked => State::Chunk,
                };
                Step::Head(end, head)
            }
            Err(fault) => Step::Fault(fault),
        }
    }

    /// Where the empty line ends, by the most lenient reading: a bare LF counts here, so that
    /// it is looked at and refused instead of being waited behind.
    fn end_of_fields(&mut self, bytes: &[u8]) -> Option<usize> {
        let from = self.seen.min(bytes.len());
        for at in from..bytes.len() {
            if bytes[at] == b'\n' {
                let line = &bytes[..at];
                let line = line.strip_suffix(b"\r").unwrap_or(line);
                if line.is_empty() || line.ends_with(b"\n") {
                    return Some(at + 1);
                }
            }
        }
        self.seen = bytes.len();
        None
    }
}

/// Takes at most `at_hand` off what is left.
fn take(left: &mut u64, at_hand: usize) -> usize {
    let n = usize::try_from(*left).map_or(at_hand, |left| left.min(at_hand));
    *left -= n as u64;
    n
}

enum Body {
    Sized(u64),
    Chunked,
}

/// Lines of a head or trailer, each without its CR LF, the last and empty one left out.
fn lines(bytes: &[u8]) -> impl Iterator<Item = Result<&[u8], Fault>> {
    let bytes = bytes.strip_suffix(b"\n").unwrap_or(bytes);
    let mut lines = bytes.split(|&b| b == b'\n').peekable();
    std::iter::from_fn(move || {
        let line = lines.next()?;
        let Some(line) = line.strip_suffix(b"\r") else { return Some(Err(Fault::LineEnd)) };
        if line.contains(&b'\r') {
            return Some(Err(Fault::LineEnd));
        }
        if line.is_empty() && lines.peek().is_none() {
            return None;
        }
        Some(Ok(line))
    })
}

/// A field's name in lower case and its value without the white space around it.
fn field(line: &[u8]) -> Result<(String, &[u8]), Fault> {
    if matches!(line, [b' ' | b'\t', ..]) {
        return Err(Fault::Folded);
    }
    let colon = line.iter().position(|&b| b == b':').ok_or(Fault::FieldName)?;
    let (name, value) = (&line[..colon], &line[colon + 1..]);
    if name.is_empty() || !name.iter().all(|&b| is_token(b)) {
        return Err(Fault::FieldName);
    }
    let value = value.trim_ascii();
    if value.iter().any(|&b| (b < 0x20 && b != b'\t') || b == 0x7f) {
        return Err(Fault::FieldValue);
    }
    let name = name.iter().map(|b| char::from(b.to_ascii_lowercase())).collect();
    Ok((name, value))
}

fn parse(bytes: &[u8]) -> Result<(Head, Body), Fault> {
    let mut lines = lines(bytes);
    let first = lines.next().ok_or(Fault::RequestLine)??;
    let mut parts = first.split(|&b| b == b' ');
    let (Some(method), Some(target), Some(version), None) =
        (parts.next(), parts.next(), parts.next(), parts.next())
    else {
        return Err(Fault::RequestLine);
    };
    // Methods are case-sensitive, servers often are not.
    let is_method = (1..=LARGEST_METHOD).contains(&method.len())
        && method.iter().all(|&b| is_token(b) && !b.is_ascii_lowercase());
    if !is_method {
        return Err(Fault::Method);
    }
    let is_target = (1..=LARGEST_TARGET).contains(&target.len())
        && target.iter().all(|&b| (0x21..=0x7e).contains(&b) && b != b'#');
    if !is_target {
        return Err(Fault::RequestLine);
    }
    let is_http_11 = match version {
        b"HTTP/1.1" => true,
        b"HTTP/1.0" => false,
        _ => return Err(Fault::Version),
    };
    let (mut fields, mut length, mut chunked) = (0, None, false);
    let (mut host, mut upgrade, mut asks_upgrade) = (None, None, false);
    for line in lines {
        let (name, value) = field(line?)?;
        fields += 1;
        if fields > MOST_FIELDS {
            return Err(Fault::TooLarge);
        }
        match &*name {
            "content-length" => {
                let is_number =
                    (1..=18).contains(&value.len()) && value.iter().all(u8::is_ascii_digit);
                let number = std::str::from_utf8(value).ok().filter(|_| is_number);
                let number = number.and_then(|n| n.parse::<u64>().ok());
                if length.replace(number.ok_or(Fault::ContentLength)?).is_some() {
                    return Err(Fault::ContentLength);
                }
            }
            "transfer-encoding" => {
                if chunked || !is_http_11 || !value.eq_ignore_ascii_case(b"chunked") {
                    return Err(Fault::TransferEncoding);
                }
                chunked = true;
            }
            "host" if !is_host(value) || host.replace(value).is_some() => {
                return Err(Fault::Host);
            }
            "expect" if !value.eq_ignore_ascii_case(b"100-continue") => {
                return Err(Fault::Expectation);
            }
            "upgrade" if upgrade.replace(value).is_some() => return Err(Fault::Upgrade),
            "connection" => {
                asks_upgrade |= value
                    .split(|&b| b == b',')
                    .any(|token| token.trim_ascii().eq_ignore_ascii_case(b"upgrade"));
            }
            // Gateways that make variables of fields cannot tell these from the real ones.
            name if name.contains('_') => {
                let dashed = name.replace('_', "-");
                match &*dashed {
                    "content-length" => return Err(Fault::ContentLength),
                    "transfer-encoding" => return Err(Fault::TransferEncoding),
                    "host" => return Err(Fault::Host),
                    _ => {}
                }
            }
            _ => {}
        }
    }
    if chunked && length.is_some() {
        return Err(Fault::TwoLengths);
    }
    if host.is_none() && is_http_11 {
        return Err(Fault::Host);
    }
    if let (Some(authority), Some(host)) = (authority(target), host)
        && !authority.eq_ignore_ascii_case(host)
    {
        return Err(Fault::HostMismatch);
    }
    let upgrades = asks_upgrade
        && is_http_11
        && upgrade.is_some_and(|protocol| protocol.eq_ignore_ascii_case(b"websocket"));
    if upgrades && (chunked || length.is_some_and(|length| length > 0)) {
        return Err(Fault::Upgrade);
    }
    let text = |bytes: &[u8]| bytes.iter().map(|&b| char::from(b)).collect();
    let head = Head { method: text(method), target: text(target), upgrades };
    let body = if chunked { Body::Chunked } else { Body::Sized(length.unwrap_or(0)) };
    Ok((head, body))
}

/// The authority of a target in absolute form.
fn authority(target: &[u8]) -> Option<&[u8]> {
    let at = target.windows(3).position(|part| part == b"://")?;
    if target.starts_with(b"/") {
        return None;
    }
    let rest = &target[at + 3..];
    let end = rest.iter().position(|b| matches!(b, b'/' | b'?')).unwrap_or(rest.len());
    Some(&rest[..end])
}

/// A host, with or without a port: what a URL may name, and nothing of its neighbours.
pub(super) fn is_host(value: &[u8]) -> bool {
    let is_host_byte = |b: &u8| {
        b.is_ascii_alphanumeric() || matches!(b, b'-' | b'.' | b'_' | b'~' | b':' | b'[' | b']')
    };
    !value.is_empty() && value.len() <= 255 && value.iter().all(is_host_byte)
}

fn check_trailer(bytes: &[u8]) -> Result<(), Fault> {
    for (n, line) in lines(bytes).enumerate() {
        let (name, _) = field(line?)?;
        if n >= MOST_FIELDS {
            return Err(Fault::TooLarge);
        }
        let forbidden = [
            "authorization",
            "connection",
            "content-encoding",
            "content-length",
            "content-type",
            "cookie",
            "host",
            "te",
            "trailer",
            "transfer-encoding",
            "upgrade",
        ];
        if forbidden.contains(&&*name.replace('_', "-")) {
            return Err(Fault::Trailer);
        }
    }
    Ok(())
}

/// RFC 9110 §5.6.2.
fn is_token(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every head that passes, in order, or the fault; the stream comes in pieces of `size`.
    fn heads(bytes: &[u8], size: usize) -> Result<Vec<String>, Fault> {
        let (mut framing, mut found) = (Framing::new(), Vec::new());
        let mut held: Vec<u8> = Vec::new();
        for piece in bytes.chunks(size) {
            held.extend(piece);
            loop {
                match framing.step(&held) {
                    Step::Head(n, head) => {
                        found.push(format!("{} {}", head.method, head.target));
                        held.drain(..n);
                    }
                    Step::Pass(n) => {
                        assert!(n > 0);
                        held.drain(..n);
                    }
                    Step::More | Step::Hold => break,
                    Step::Fault(fault) => return Err(fault),
                }
            }
        }
        Ok(found)
    }

    fn all(text: &str) -> Result<Vec<String>, Fault> {
        let whole = heads(text.as_bytes(), usize::MAX >> 1);
        for size in [1, 2, 7] {
            assert_eq!(heads(text.as_bytes(), size), whole, "in pieces of {size}: {text:?}");
        }
        whole
    }

    #[test]
    fn requests_follow_each_other() {
        let both = ["GET /a", "POST /b", "GET /c"].map(String::from).to_vec();
        let text = "GET /a HTTP/1.1\r\nHost: x\r\n\r\n\
             POST /b HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nhello\
             GET /c HTTP/1.1\r\nHost: x\r\n\r\n";
        assert_eq!(all(text), Ok(both.clone()));
        let text = "GET /a HTTP/1.0\r\n\r\n\
             POST /b HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: Chunked\r\n\r\n\
             5\r\nhello\r\nA\r\n0123456789\r\n0\r\nx-sum: 1\r\n\r\n\
             GET /c HTTP/1.1\r\nHost:x:80\r\n\r\n";
        assert_eq!(all(text), Ok(both));
        // A body that looks like a request is a body.
        let text =
            "POST /a HTTP/1.1\r\nHost: x\r\nContent-Length: 18\r\n\r\nGET / HTTP/1.1\r\n\r\n";
        assert_eq!(all(text), Ok(vec!["POST /a".to_owned()]));
    }

    #[test]
    fn nothing_passes_behind_an_upgrade_before_it_is_answered() {
        let text = b"GET /ws HTTP/1.1\r\nHost: x\r\nConnection: keep-alive, Upgrade\r\n\
            Upgrade: WebSocket\r\n\r\n";
        let next = b"GET /admin HTTP/1.1\r\nHost: x\r\n\r\n";
        for switched in [true, false] {
            let mut framing = Framing::new();
            let Step::Head(n, head) = framing.step(text) else { panic!("a head") };
            assert!(n == text.len() && head.upgrades);
            assert_eq!(framing.step(next), Step::Hold);
            framing.go_on(switched);
            match (switched, framing.step(next)) {
                (true, Step::Pass(n)) => assert_eq!(n, next.len()),
                (false, Step::Head(_, head)) => assert_eq!(head.target, "/admin"),
                other => panic!("{other:?}"),
            }
        }
        // HTTP/2 over the same connection is no upgrade that is followed.
        let h2c = "GET /a HTTP/1.1\r\nHost: x\r\nConnection: Upgrade, HTTP2-Settings\r\n\
            Upgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAAP__\r\n\r\nGET /b HTTP/1.1\r\nHost: x\r\n\r\n";
        assert_eq!(all(h2c).unwrap().len(), 2);
    }

    #[test]
    fn what_two_parsers_read_differently_is_refused() {
        let head = |fields: &str| format!("POST /a HTTP/1.1\r\nHost: x\r\n{fields}\r\n\r\n");
        for (text, fault) in [
            (head("Content-Length: 4\r\nTransfer-Encoding: chunked"), Fault::TwoLengths),
            (head("Transfer-Encoding: chunked\r\nContent-Length: 4"), Fault::TwoLengths),
            (head("Content-Length: 4\r\nContent-Length: 4"), Fault::ContentLength),
            (head("Content-Length: 4, 4"), Fault::ContentLength),
            (head("Content-Length: +4"), Fault::ContentLength),
            (head("Content-Length: 0x4"), Fault::ContentLength),
            (head("Content-Length:"), Fault::ContentLength),
            (head("Content-Length: 9999999999999999999"), Fault::ContentLength),
            (head("Content_Length: 4"), Fault::ContentLength),
            (head("Transfer-Encoding: xchunked"), Fault::TransferEncoding),
            (head("Transfer-Encoding: chunked\r\nTransfer-Encoding: x"), Fault::TransferEncoding),
            (head("Transfer-Encoding: chunked, identity"), Fault::TransferEncoding),
            (head("Transfer-Encoding: gzip, chunked"), Fault::TransferEncoding),
            (head("Transfer-Encoding:\x0bchunked"), Fault::FieldValue),
            (head("Transfer-Encoding : chunked"), Fault::FieldName),
            (head("Transfer_Encoding: chunked"), Fault::TransferEncoding),
            (head("X: y\r\n Transfer-Encoding: chunked"), Fault::Folded),
            (head("X: a\rTransfer-Encoding: chunked"), Fault::LineEnd),
            (head("X: a\nTransfer-Encoding: chunked"), Fault::LineEnd),
            (head("X: a\0b"), Fault::FieldValue),
            (head("X y: a"), Fault::FieldName),
            (head(": a"), Fault::FieldName),
            (head("no colon"), Fault::FieldName),
            (head("Host: y"), Fault::Host),
            (head("Expect: 200-ok"), Fault::Expectation),
            ("POST /a HTTP/1.1\r\n\r\n".to_owned(), Fault::Host),
            ("POST /a HTTP/1.1\r\nHost: a@b\r\n\r\n".to_owned(), Fault::Host),
            ("POST /a HTTP/1.1\r\nHost: x/y\r\n\r\n".to_owned(), Fault::Host),
            ("GET http://b/ HTTP/1.1\r\nHost: a\r\n\r\n".to_owned(), Fault::HostMismatch),
            ("GET /a HTTP/1.1\nHost: x\n\n".to_owned(), Fault::LineEnd),
            ("GET  /a HTTP/1.1\r\nHost: x\r\n\r\n".to_owned(), Fault::RequestLine),
            ("GET /a\tHTTP/1.1\r\nHost: x\r\n\r\n".to_owned(), Fault::RequestLine),
            ("GET /a#b HTTP/1.1\r\nHost: x\r\n\r\n".to_owned(), Fault::RequestLine),
            ("GET /a\r\n\r\n".to_owned(), Fault::RequestLine),
            ("get /a HTTP/1.1\r\nHost: x\r\n\r\n".to_owned(), Fault::Method),
            ("GET /a HTTP/1.2\r\nHost: x\r\n\r\n".to_owned(), Fault::Version),
            ("GET /a HTTP/2.0\r\nHost: x\r\n\r\n".to_owned(), Fault::Version),
            (
                "POST /a HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n".to_owned(),
                Fault::TransferEncoding,
            ),
            ("\r\nGET /a HTTP/1.1\r\nHost: x\r\n\r\n".to_owned(), Fault::RequestLine),
            (
                "GET /a HTTP/1.1\r\nHost: x\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\
                 Content-Length: 3\r\n\r\n"
                    .to_owned(),
                Fault::Upgrade,
            ),
        ] {
            assert_eq!(all(&text), Err(fault), "{text:?}");
        }
        assert_eq!(all(&head("Content-Length: 0\r\nX_y: a\tb\u{e9}")).unwrap().len(), 1, "control");
    }

    #[test]
    fn chunks_have_one_meaning() {
        let chunked = |body: &str| {
            all(&format!("POST /a HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n{body}"))
        };
        for (body, fault) in [
            ("5;x\r\nhello\r\n0\r\n\r\n", Fault::Chunk),
            ("5;a=\"b\r\n\"\r\nhello\r\n0\r\n\r\n", Fault::Chunk),
            ("5 \r\nhello\r\n0\r\n\r\n", Fault::Chunk),
            ("+5\r\nhello\r\n0\r\n\r\n", Fault::Chunk),
            ("0x5\r\nhello\r\n0\r\n\r\n", Fault::Chunk),
            ("\r\nhello\r\n0\r\n\r\n", Fault::Chunk),
            ("ffffffffffffffff5\r\nhello\r\n0\r\n\r\n", Fault::Chunk),
            ("5\nhello\r\n0\r\n\r\n", Fault::LineEnd),
            ("5\r\nhelloX\r\n0\r\n\r\n", Fault::Chunk),
            ("5\r\nhello0\r\n\r\n", Fault::Chunk),
            ("0\r\nContent-Length: 4\r\n\r\n", Fault::Trailer),
            ("0\r\nTransfer_Encoding: chunked\r\n\r\n", Fault::Trailer),
            ("0\r\nx: y\n\r\n", Fault::LineEnd),
            ("0\r\n x: y\r\n\r\n", Fault::Folded),
        ] {
            assert_eq!(chunked(body), Err(fault), "{body:?}");
        }
        assert_eq!(chunked("05\r\nhello\r\n000\r\nx-a: b\r\n\r\n").unwrap().len(), 1, "control");
    }

    #[test]
    fn heads_are_bounded() {
        let many = |n: usize| {
            let fields: String = (1..n).map(|n| format!("x-{n}: y\r\n")).collect();
            format!("GET /a HTTP/1.1\r\nHost: x\r\n{fields}\r\n")
        };
        assert_eq!(heads(many(MOST_FIELDS).as_bytes(), 4096).unwrap().len(), 1, "control");
        assert_eq!(heads(many(MOST_FIELDS + 1).as_bytes(), 4096), Err(Fault::TooLarge));
        let endless = format!("GET /a HTTP/1.1\r\nHost: x\r\nx: {}", "y".repeat(LARGEST_HEAD));
        assert_eq!(heads(endless.as_bytes(), 4096), Err(Fault::TooLarge));
    }
}
