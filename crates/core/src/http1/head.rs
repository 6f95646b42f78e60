//! Heads: where they end and what they say (RFC 9112 §2–§6).

use httparse::{EMPTY_HEADER, Header, Status};

use super::Framing;
use crate::key::{Carried, CarriersToAdd, HEADER, Key, MEMBER};

/// The longest head that is read, bytes. Node, Go, Envoy and nginx refuse less or as much by default.
pub const MAX_HEAD: usize = 64 * 1024;
/// Headers for which no memory is asked.
const FEW_HEADERS: usize = 64;

/// The head is longer than [`MAX_HEAD`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("head of more than {MAX_HEAD} bytes")]
pub struct TooLong;

/// Two implementations could read this message in two ways (RFC 9112 §11.2), or it is no HTTP/1 at all.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Ambiguous {
    /// No valid head: bare CR, obs-fold, whitespace before a colon, bytes that are no HTTP.
    #[error("malformed head: {0}")]
    Malformed(#[from] httparse::Error),
    /// Transfer-Encoding beside Content-Length.
    #[error("both Transfer-Encoding and Content-Length")]
    TwoLengths,
    /// Content-Length values that differ, or are no plain number.
    #[error("invalid Content-Length")]
    ContentLength,
    /// A Transfer-Encoding that does not end in exactly one `chunked`, or in HTTP/1.0.
    #[error("invalid Transfer-Encoding")]
    TransferEncoding,
}

/// Finds the end of a head in a buffer that grows, looking at every byte once.
#[derive(Clone, Debug, Default)]
pub struct HeadEnd {
    scanned: usize,
    line: usize,
    begun: bool,
}

impl HeadEnd {
    /// Length of the head at the front of `buffer`, up to and with its empty line; `None` while that is missing.
    /// `buffer` must begin with the bytes of the call before. Empty lines in front count as part of the head (§2.2).
    ///
    /// # Errors
    /// [`TooLong`] when [`MAX_HEAD`] bytes hold no end.
    pub fn find(&mut self, buffer: &[u8]) -> Result<Option<usize>, TooLong> {
        while let Some(at) = buffer.get(self.scanned..).and_then(|rest| rest.iter().position(|b| *b == b'\n'))
        {
            let line = &buffer[self.line..self.scanned + at];
            self.scanned += at + 1;
            self.line = self.scanned;
            if !matches!(line, [] | [b'\r']) {
                self.begun = true;
            } else if self.begun {
                return if self.scanned <= MAX_HEAD { Ok(Some(self.scanned)) } else { Err(TooLong) };
            }
        }
        self.scanned = buffer.len();
        if buffer.len() >= MAX_HEAD { Err(TooLong) } else { Ok(None) }
    }
}

/// Methods that change how a response is framed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Method {
    /// The response has no body, whatever it says.
    Head,
    /// A 2xx response makes the connection a tunnel.
    Connect,
    /// Any other.
    Other,
}

/// What routing needs to know of a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    /// See [`Method`].
    pub method: Method,
    /// How its body ends.
    pub framing: Framing,
    /// The connection may carry another request after this one (RFC 9112 §9.3).
    pub keep_alive: bool,
    /// It asks for another protocol: a 101 makes the connection a tunnel.
    pub upgrade: bool,
    /// It waits for a 100 before it sends its body.
    pub expects_continue: bool,
    /// A probe of the kubelet.
    pub probe: bool,
    /// It would rather have JSON than text.
    pub accepts_json: bool,
    /// What it says about forks.
    pub carried: Carried,
    /// Where its first `tracestate` line begins, bytes.
    tracestate_at: Option<usize>,
}

/// What routing needs to know of a response.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Response {
    /// Status code.
    pub status: u16,
    /// How its body ends.
    pub framing: Framing,
    /// The connection may carry another response after this one.
    pub keep_alive: bool,
}

impl Response {
    /// 1xx other than 101: the response proper is still to come.
    pub fn is_interim(&self) -> bool {
        (100..200).contains(&self.status) && self.framing != Framing::Tunnel
    }
}

/// Reads a whole request head, as [`HeadEnd`] cut it.
///
/// # Errors
/// [`Ambiguous`]: the request must not be routed.
pub fn request(head: &[u8]) -> Result<Request, Ambiguous> {
    let mut few = [EMPTY_HEADER; FEW_HEADERS];
    let mut parsed = httparse::Request::new(&mut few);
    match parsed.parse(head) {
        Err(httparse::Error::TooManyHeaders) => {
            // A line has at least four bytes: `a:\r\n`, or three with a bare LF.
            let mut many = vec![EMPTY_HEADER; head.len() / 3];
            let mut parsed = httparse::Request::new(&mut many);
            let status = parsed.parse(head)?;
            request_of(head, status, parsed.method, parsed.version, parsed.headers)
        }
        status => request_of(head, status?, parsed.method, parsed.version, parsed.headers),
    }
}

/// Reads a whole response head. `to` is the method of the request that it answers.
///
/// # Errors
/// [`Ambiguous`]: where the response ends is unknown.
pub fn response(head: &[u8], to: Method) -> Result<Response, Ambiguous> {
    let mut few = [EMPTY_HEADER; FEW_HEADERS];
    let mut parsed = httparse::Response::new(&mut few);
    match parsed.parse(head) {
        Err(httparse::Error::TooManyHeaders) => {
            let mut many = vec![EMPTY_HEADER; head.len() / 3];
            let mut parsed = httparse::Response::new(&mut many);
            let status = parsed.parse(head)?;
            response_of(to, status, parsed.code, parsed.version, parsed.headers)
        }
        status => response_of(to, status?, parsed.code, parsed.version, parsed.headers),
    }
}

impl Request {
    /// The head with the carriers that it lacks ([`Carried::to_add`]), all other bytes as they were.
    pub fn with_carriers(&self, head: &[u8]) -> Vec<u8> {
        let (Some(key), add) = (self.carried.key(), self.carried.to_add()) else { return head.to_vec() };
        let lines = lines_of(key, add);
        match (add.tracestate, self.tracestate_at) {
            (true, Some(at)) => {
                let mut out = Vec::with_capacity(head.len() + 160);
                out.extend_from_slice(&head[..at]);
                out.extend_from_slice(format!("tracestate: {MEMBER}={key}\r\n").as_bytes());
                out.extend_from_slice(&head[at..]);
                let others = lines_of(key, CarriersToAdd { tracestate: false, ..add });
                with_lines(&out, &others)
            }
            _ => with_lines(head, &lines),
        }
    }
}

fn lines_of(key: &Key, add: CarriersToAdd) -> String {
    let mut lines = String::new();
    for (wanted, name) in [(add.baggage, "baggage"), (add.tracestate, "tracestate")] {
        if wanted {
            lines.push_str(&format!("{name}: {MEMBER}={key}\r\n"));
        }
    }
    if add.header {
        lines.push_str(&format!("{HEADER}: {key}\r\n"));
    }
    lines
}

/// `head` with these whole header lines (each with its CRLF) behind its own.
pub fn with_lines(head: &[u8], lines: &str) -> Vec<u8> {
    let end = if head.ends_with(b"\r\n") { 2 } else { 1 }.min(head.len());
    let (start, end) = head.split_at(head.len() - end);
    [start, lines.as_bytes(), end].concat()
}

fn request_of(
    head: &[u8],
    status: Status<usize>,
    method: Option<&str>,
    version: Option<u8>,
    headers: &[Header<'_>],
) -> Result<Request, Ambiguous> {
    let lengths = complete(head.len(), status, headers)?;
    let method = match method {
        Some("HEAD") => Method::Head,
        Some("CONNECT") => Method::Connect,
        _ => Method::Other,
    };
    let framing = match lengths.framing(version)? {
        // Content in a CONNECT has no defined meaning (RFC 9110 §9.3.6).
        Some(_) if method == Method::Connect => return Err(Ambiguous::TransferEncoding),
        Some(framing) => framing,
        None => Framing::Length(0),
    };
    let mut request = Request {
        method,
        framing,
        keep_alive: lengths.keep_alive(version),
        upgrade: false,
        expects_continue: false,
        probe: false,
        accepts_json: false,
        carried: Carried::default(),
        tracestate_at: None,
    };
    for header in headers {
        request.carried.see(header.name.as_bytes(), header.value);
        match header.name {
            name if is(name, "upgrade") => request.upgrade = true,
            name if is(name, "expect") => {
                request.expects_continue |= header.value.eq_ignore_ascii_case(b"100-continue");
            }
            name if is(name, "user-agent") => request.probe |= header.value.starts_with(b"kube-probe/"),
            name if is(name, "accept") => {
                request.accepts_json |= tokens(header.value).any(|t| t.starts_with(b"application/json"));
            }
            name if is(name, "tracestate") && request.tracestate_at.is_none() => {
                // The parser's names are parts of `head`.
                request.tracestate_at = (name.as_ptr() as usize).checked_sub(head.as_ptr() as usize);
            }
            _ => {}
        }
    }
    Ok(request)
}

fn response_of(
    to: Method,
    status: Status<usize>,
    code: Option<u16>,
    version: Option<u8>,
    headers: &[Header<'_>],
) -> Result<Response, Ambiguous> {
    let lengths = complete(usize::MAX, status, headers)?;
    let code = code.unwrap_or_default();
    let framing = match (code, to) {
        (101, _) | (200..300, Method::Connect) => Framing::Tunnel,
        (100..200 | 204 | 304, _) | (_, Method::Head) => Framing::Length(0),
        _ => lengths.framing(version)?.unwrap_or(Framing::UntilClose),
    };
    let keep_alive = lengths.keep_alive(version) && framing != Framing::UntilClose;
    Ok(Response { status: code, framing, keep_alive })
}

/// What the headers say about the length of the body and of the connection.
#[derive(Default)]
struct Lengths {
    content_length: Option<u64>,
    transfer_encoding: bool,
    /// The last transfer coding is `chunked`, and it is the only one of that name.
    chunked: bool,
    close: bool,
    kept: bool,
}

fn complete(len: usize, status: Status<usize>, headers: &[Header<'_>]) -> Result<Lengths, Ambiguous> {
    match status {
        Status::Complete(end) if end == len || len == usize::MAX => {}
        // The parser and `HeadEnd` disagree about the end: so would others.
        _ => return Err(httparse::Error::NewLine.into()),
    }
    let mut lengths = Lengths::default();
    let mut chunked = 0;
    for header in headers {
        if is(header.name, "content-length") {
            for value in header.value.split(|b| *b == b',').map(<[u8]>::trim_ascii) {
                let number = Some(value)
                    .filter(|v| !v.is_empty() && v.iter().all(u8::is_ascii_digit))
                    .and_then(|v| str::from_utf8(v).ok()?.parse().ok());
                match (number, lengths.content_length) {
                    (None, _) => return Err(Ambiguous::ContentLength),
                    (Some(new), Some(old)) if new != old => return Err(Ambiguous::ContentLength),
                    (number, _) => lengths.content_length = number,
                }
            }
        } else if is(header.name, "transfer-encoding") {
            lengths.transfer_encoding = true;
            for coding in header.value.split(|b| *b == b',').map(<[u8]>::trim_ascii) {
                lengths.chunked = coding.eq_ignore_ascii_case(b"chunked");
                chunked += usize::from(lengths.chunked);
            }
        } else if is(header.name, "connection") {
            for token in tokens(header.value) {
                lengths.close |= token.eq_ignore_ascii_case(b"close");
                lengths.kept |= token.eq_ignore_ascii_case(b"keep-alive");
            }
        }
    }
    lengths.chunked &= chunked == 1;
    Ok(lengths)
}

impl Lengths {
    /// RFC 9112 §6.3, points 3 to 5; `None` when no header says a length.
    fn framing(&self, version: Option<u8>) -> Result<Option<Framing>, Ambiguous> {
        match (self.transfer_encoding, self.content_length) {
            (true, Some(_)) => Err(Ambiguous::TwoLengths),
            // §6.1: in HTTP/1.0 it is a sign of broken framing.
            (true, None) if self.chunked && version == Some(1) => Ok(Some(Framing::Chunked)),
            (true, None) => Err(Ambiguous::TransferEncoding),
            (false, length) => Ok(length.map(Framing::Length)),
        }
    }

    /// RFC 9112 §9.3.
    fn keep_alive(&self, version: Option<u8>) -> bool {
        !self.close && (version == Some(1) || self.kept)
    }
}

fn is(name: &str, expected: &str) -> bool {
    name.eq_ignore_ascii_case(expected)
}

fn tokens(value: &[u8]) -> impl Iterator<Item = &[u8]> {
    value.split(|b| *b == b',').map(<[u8]>::trim_ascii)
}

#[cfg(test)]
#[path = "head_tests.rs"]
mod tests;
