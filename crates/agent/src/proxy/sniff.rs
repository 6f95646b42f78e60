//! What a connection speaks, found out without a timer: whoever speaks first tells.
//!
//! The application is dialed at once. If it speaks first, the protocol is none of ours, unless it says SETTINGS, which
//! servers of HTTP/2 may say before they heard anything. If the caller speaks, its first bytes are HTTP/2's preface, an
//! HTTP/1 request line, or something else.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use bytes::BytesMut;
use forkd_wire::control::Route;
use tokio::net::TcpStream;

use super::baseline::{Baseline, Upstream, reset_on_close};
use super::{Connection, Deliver, DeliverError, drained, http1, http2, pump};

/// RFC 9113 §3.4.
pub(super) const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// Methods by which HTTP/1 is known (RFC 9110, 5789, 4918, 3253, 3744, 5323, 5842, and what Node's parser knows).
const METHODS: &[&str] = &[
    "GET",
    "POST",
    "PUT",
    "HEAD",
    "DELETE",
    "PATCH",
    "OPTIONS",
    "CONNECT",
    "TRACE",
    "QUERY",
    "ACL",
    "BIND",
    "CHECKOUT",
    "COPY",
    "LINK",
    "LOCK",
    "M-SEARCH",
    "MERGE",
    "MKACTIVITY",
    "MKCALENDAR",
    "MKCOL",
    "MOVE",
    "NOTIFY",
    "PROPFIND",
    "PROPPATCH",
    "PURGE",
    "REBIND",
    "REPORT",
    "SEARCH",
    "SOURCE",
    "SUBSCRIBE",
    "UNBIND",
    "UNLINK",
    "UNLOCK",
    "UNSUBSCRIBE",
];
/// The longest request line that is still taken for one, bytes.
const MAX_LINE: usize = 32 * 1024;
/// RFC 9113 §4.1.
const FRAME_HEADER: usize = 9;
/// What one read takes.
const READ: usize = 16 * 1024;
/// How long a caller may stay silent when the application refused the connection. It may be about to send a keyed
/// request, which a laptop would answer; a caller that waits for the application to speak must see it gone.
const SILENCE_AFTER_REFUSAL: Duration = Duration::from_secs(1);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Protocol {
    Http1,
    Http2,
    Opaque,
}

/// What the first bytes are; `None` while they could be several things.
fn classify(bytes: &[u8]) -> Option<Protocol> {
    if bytes.starts_with(PREFACE) {
        return Some(Protocol::Http2);
    }
    if PREFACE.starts_with(bytes) {
        return None;
    }
    // RFC 9112 §2.2: empty lines before the request line are ignored.
    let start = bytes.iter().position(|b| !matches!(b, b'\r' | b'\n')).unwrap_or(bytes.len());
    let bytes = &bytes[start..];
    let (line, whole) = match bytes.iter().position(|b| *b == b'\n') {
        Some(end) => (&bytes[..end], true),
        None => (bytes, false),
    };
    let line = line.strip_suffix(b"\r").unwrap_or(line);
    let method = line.split(|b| *b == b' ').next().unwrap_or_default();
    let complete = line.len() > method.len();
    let known = METHODS
        .iter()
        .any(|m| if complete { m.as_bytes() == method } else { m.as_bytes().starts_with(method) });
    if !known || start + line.len() > MAX_LINE || line.iter().any(|b| b.is_ascii_control()) {
        return Some(Protocol::Opaque);
    }
    if !whole {
        return None;
    }
    let version = line.rsplit(|b| *b == b' ').next().unwrap_or_default();
    Some(if matches!(version, b"HTTP/1.1" | b"HTTP/1.0") { Protocol::Http1 } else { Protocol::Opaque })
}

/// Who said the first word.
enum First {
    Caller(Protocol),
    /// The caller ended its half without a word, or with less than a first line.
    CallerEnded,
    Application,
    /// The application is not there and the caller waits for it.
    Nobody,
}

/// Serves one redirected connection to its end.
pub(super) async fn serve<D: Deliver>(mut connection: Connection<D>, mut client: TcpStream) {
    let mut sent = BytesMut::new();
    let mut baseline = None;
    let first = match listen(&mut connection, &mut client, &mut sent, &mut baseline).await {
        Ok(Some(first)) => first,
        Ok(None) => return,
        Err(error) => {
            tracing::debug!(%error, caller = %connection.caller, "reset before its first request");
            reset_on_close(&client);
            if let Some(Ok(baseline)) = baseline {
                reset_on_close(&baseline.io);
            }
            return;
        }
    };
    let table = connection.table();
    match first {
        First::Caller(Protocol::Http1) if table.has(connection.port()) => {
            Box::pin(http1::serve(connection, client, sent, baseline.and_then(Result::ok))).await;
        }
        First::Caller(Protocol::Http2) if table.has(connection.port()) => {
            Box::pin(http2::serve(connection, client, sent, baseline.and_then(Result::ok))).await;
        }
        First::CallerEnded if sent.is_empty() && table.tcp_probe(connection.port()) => {}
        First::Caller(_) | First::CallerEnded | First::Application | First::Nobody => {
            opaque(&connection, client, sent, baseline).await;
        }
    }
}

/// Waits for the first word. `None` when the proxy stops before there was one.
async fn listen<D: Deliver>(
    connection: &mut Connection<D>,
    client: &mut TcpStream,
    sent: &mut BytesMut,
    baseline: &mut Option<io::Result<Baseline>>,
) -> io::Result<Option<First>> {
    let own = connection.shared.counters.own.clone();
    let mut dial = std::pin::pin!(own.dial(connection.original));
    loop {
        let refused = matches!(baseline, Some(Err(_))) && sent.is_empty();
        // Memory is asked for when there is something to read: connections may stay silent by the thousand.
        tokio::select! {
            biased;
            ready = client.readable() => {
                ready?;
                sent.reserve(READ);
                match client.try_read_buf(sent) {
                    Ok(0) => return Ok(Some(First::CallerEnded)),
                    Ok(_) => if let Some(protocol) = classify(sent) {
                        return Ok(Some(First::Caller(protocol)));
                    },
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                    Err(error) => return Err(error),
                }
            }
            dialed = &mut dial, if baseline.is_none() => *baseline = Some(dialed),
            spoke = spoken(baseline) => {
                spoke?;
                return Ok(Some(First::Application));
            }
            () = tokio::time::sleep(SILENCE_AFTER_REFUSAL), if refused => return Ok(Some(First::Nobody)),
            () = drained(&mut connection.draining) => return Ok(None),
        }
    }
}

/// Done when the application said something that no server of HTTP/2 begins with (or ended).
async fn spoken(baseline: &mut Option<io::Result<Baseline>>) -> io::Result<()> {
    let Some(Ok(baseline)) = baseline else { return std::future::pending().await };
    while begins_settings(&baseline.early) {
        if baseline.early.len() >= FRAME_HEADER {
            // It waits for its caller, and so do we.
            return std::future::pending().await;
        }
        baseline.io.readable().await?;
        baseline.early.reserve(READ);
        match baseline.io.try_read_buf(&mut baseline.early) {
            Ok(0) => return Ok(()),
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// True if these bytes are the beginning (or nothing yet) of a SETTINGS frame (RFC 9113 §6.5): a length that is a
/// multiple of six and not large, type 4, no flag, stream 0.
fn begins_settings(bytes: &[u8]) -> bool {
    let fixed = [0, 0, 0, 4, 0, 0, 0, 0, 0];
    let matches = bytes.iter().zip(fixed).enumerate().all(|(at, (byte, fixed))| match at {
        1 => *byte <= 1,
        2 => true,
        _ => *byte == fixed,
    });
    let length = bytes.get(1..3).map_or(0, |b| u16::from_be_bytes([b[0], b[1]]));
    matches && length % 6 == 0
}

/// Passes what is not HTTP: to the laptop that takes everything, else to the application.
async fn opaque<D: Deliver>(
    connection: &Connection<D>,
    client: TcpStream,
    sent: BytesMut,
    baseline: Option<io::Result<Baseline>>,
) {
    let said = baseline.as_ref().is_some_and(|b| b.as_ref().is_ok_and(|b| !b.early.is_empty()));
    let table = connection.table();
    let port = connection.port();
    match table.opaque(port) {
        Some(route) => match deliver(connection, route).await {
            // What the application said first is dropped: the laptop stands in its place and says its own.
            Ok(stream) => return pump::tunnel(client, Upstream::Laptop(stream), sent, BytesMut::new()).await,
            Err(DeliverError::NotListening(reason)) => {
                tracing::info!(%reason, service = route.service, "the laptop's process is not there");
                return reset_on_close(&client);
            }
            Err(DeliverError::LaptopGone | DeliverError::Unavailable(_)) => {}
        },
        // Counted for what was said, not for a caller that came and went.
        None if table.has(port) && (said || !sent.is_empty()) => {
            connection.shared.counters.count_opaque(port);
        }
        None => {}
    }
    let baseline = match baseline {
        Some(baseline) => baseline,
        None => connection.shared.counters.own.dial(connection.original).await,
    };
    match baseline {
        Ok(baseline) => {
            pump::tunnel::<D::Stream>(client, Upstream::Baseline(baseline), sent, BytesMut::new()).await
        }
        Err(error) => {
            tracing::debug!(%error, to = %connection.original, "the application refused");
            reset_on_close(&client);
        }
    }
}

/// A new connection to the laptop of `route`; what went wrong is logged here.
pub(super) async fn deliver<D: Deliver>(
    connection: &Connection<D>,
    route: &Arc<Route>,
) -> Result<D::Stream, DeliverError> {
    let delivered = connection.shared.deliver.deliver(route, connection.caller).await;
    if let Err(error) = &delivered {
        tracing::debug!(%error, fork = route.fork, service = route.service, "deliver to a laptop");
    }
    delivered
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn first_bytes_are_told_apart_as_soon_as_they_can_be() {
        use Protocol::{Http1, Http2, Opaque};
        for (bytes, expected) in [
            (&b"GET / HTTP/1.1\r\n"[..], Http1),
            (b"\r\nGET / HTTP/1.0\n", Http1),
            (b"OPTIONS * HTTP/1.1\r\nHo", Http1),
            (b"GET /a b HTTP/1.1\r\n", Http1),
            (PREFACE, Http2),
            (b"PRI * HTTP/2.0\r\n\r\nXM", Opaque),
            (b"GET /\r\n", Opaque),
            (b"GET / HTTP/3.0\r\n", Opaque),
            (b"PING", Opaque),
            (b"PING\r\n", Opaque),
            (b"get / HTTP/1.1\r\n", Opaque),
            (b"GETX", Opaque),
            (b"GE T", Opaque),
            (b"\x16\x03\x01", Opaque),
            (b"\0\0\0\x08", Opaque),
            (b"GET \0", Opaque),
        ] {
            assert_eq!(classify(bytes), Some(expected), "{bytes:?}");
        }
        for bytes in
            [&b""[..], b"P", b"PR", b"PRI * HT", b"G", b"GET", b"GET ", b"GET /xyz HTTP/1.", b"PROPFIND"]
        {
            assert_eq!(classify(bytes), None, "{bytes:?}");
        }
        assert_eq!(classify(&[b"GET /", &[b'x'; MAX_LINE][..]].concat()), Some(Opaque));
    }

    #[test]
    fn settings_of_an_eager_server_are_no_word_of_another_protocol() {
        let settings = b"\0\0\x0c\x04\0\0\0\0\0\0\x03\0\0\0\x80";
        for cut in 0..settings.len() {
            assert!(begins_settings(&settings[..cut]), "cut at {cut}");
        }
        for other in [
            &b"220 mail ESMTP\r\n"[..],
            b"\x4a\0\0\0\x0a8.0.36", // MySQL
            b"SSH-2.0-",
            b"\0\0\x0c\x04\x01\0\0\0\0", // acknowledges before it was told anything
            b"\0\0\x0d\x04\0\0\0\0\0",   // no whole settings
            b"\0\0\x0c\x00\0\0\0\0\0",
        ] {
            assert!(!begins_settings(other), "{other:?}");
        }
    }

    #[test]
    fn a_verdict_never_changes_with_more_bytes() {
        for text in
            [&b"GET /index HTTP/1.1\r\nHost: a\r\n\r\n"[..], PREFACE, b"QUIT\r\n", b"PRIORITY\r\n\r\n"]
        {
            let verdict = classify(text).unwrap();
            for cut in 0..text.len() {
                let early = classify(&text[..cut]);
                assert!(early.is_none() || early == Some(verdict), "{text:?} at {cut}: {early:?}");
            }
        }
    }
}
