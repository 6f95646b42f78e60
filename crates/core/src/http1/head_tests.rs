//! Tables of raw heads.

use super::*;

fn head(lines: &str) -> Vec<u8> {
    format!("POST /x HTTP/1.1\r\n{lines}\r\n").into_bytes()
}

fn framing(lines: &str) -> Result<Framing, Ambiguous> {
    request(&head(lines)).map(|request| request.framing)
}

fn answer(status: &str, lines: &str, to: Method) -> Result<Response, Ambiguous> {
    response(format!("HTTP/1.1 {status}\r\n{lines}\r\n").as_bytes(), to)
}

#[test]
fn the_end_of_a_head_is_found_torn_anywhere() {
    for text in [
        "GET / HTTP/1.1\r\n\r\n",
        "GET / HTTP/1.1\r\nA: b\r\n\r\n",
        "\r\n\r\nGET / HTTP/1.1\r\nA: b\r\n\r\n",
        "GET / HTTP/1.1\nA: b\n\n",
        "GET / HTTP/1.1\r\nA: b\n\r\n",
    ] {
        let input = [text.as_bytes(), b"body\r\n\r\nmore"].concat();
        let mut end = HeadEnd::default();
        for cut in 0..text.len() {
            assert_eq!(end.find(&input[..cut]), Ok(None), "{text:?} at {cut}");
        }
        assert_eq!(end.find(&input[..text.len()]), Ok(Some(text.len())), "{text:?}");
        assert_eq!(HeadEnd::default().find(&input), Ok(Some(text.len())), "{text:?}");
        assert!(request(text.as_bytes()).is_ok(), "{text:?}");
    }
}

#[test]
fn a_head_of_more_than_64_kib_is_given_up() {
    let long = [b"GET / HTTP/1.1\r\na: ".to_vec(), vec![b'x'; MAX_HEAD]].concat();
    assert_eq!(HeadEnd::default().find(&long), Err(TooLong));
    assert_eq!(HeadEnd::default().find(&[&long[..], b"\r\n\r\n"].concat()), Err(TooLong));
    let empty_lines = b"\r\n".repeat(MAX_HEAD / 2);
    assert_eq!(HeadEnd::default().find(&empty_lines), Err(TooLong));
}

#[test]
fn requests_are_framed_as_rfc_9112_says() {
    for (lines, expected) in [
        ("", Framing::Length(0)),
        ("Content-Length: 0\r\n", Framing::Length(0)),
        ("content-LENGTH:  12 \r\n", Framing::Length(12)),
        ("Content-Length: 5\r\nContent-Length: 5\r\n", Framing::Length(5)),
        ("Content-Length: 5, 5\r\n", Framing::Length(5)),
        ("Transfer-Encoding: chunked\r\n", Framing::Chunked),
        ("Transfer-Encoding: gzip, Chunked\r\n", Framing::Chunked),
        ("Transfer-Encoding: gzip\r\nTransfer-Encoding: chunked\r\n", Framing::Chunked),
    ] {
        assert_eq!(framing(lines), Ok(expected), "{lines:?}");
    }
}

#[test]
fn what_could_smuggle_a_request_is_ambiguous() {
    for lines in [
        "Content-Length: 5\r\nTransfer-Encoding: chunked\r\n",
        "Content-Length: 5\r\nContent-Length: 6\r\n",
        "Content-Length: 5, 6\r\n",
        "Content-Length: +5\r\n",
        "Content-Length: -5\r\n",
        "Content-Length: 5 5\r\n",
        "Content-Length: 0x5\r\n",
        "Content-Length:\r\n",
        "Content-Length: 5,\r\n",
        "Content-Length: 99999999999999999999\r\n",
        "Transfer-Encoding: chunked, gzip\r\n",
        "Transfer-Encoding: gzip\r\n",
        "Transfer-Encoding: chunked, chunked\r\n",
        "Transfer-Encoding: xchunked\r\n",
        "Transfer-Encoding:\x0bchunked\r\n",
        "Transfer-Encoding: \"chunked\"\r\n",
        "Transfer-Encoding : chunked\r\n",
        " Transfer-Encoding: chunked\r\n",
        "A: b\r\n folded\r\n",
        "A: b\r\n\tTransfer-Encoding: chunked\r\n",
        "A\rB: c\r\n",
        "A: b\rContent-Length: 5\r\n",
        "A: b\0c\r\n",
        "no colon\r\n",
        ": empty name\r\n",
    ] {
        assert!(framing(lines).is_err(), "{lines:?} gave {:?}", framing(lines));
    }
    assert!(request(b"POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n").is_err());
    assert!(request(b"CONNECT a:1 HTTP/1.1\r\nContent-Length: 5\r\n\r\n").is_err());
    assert!(request(b"GET / HTTP/2.0\r\n\r\n").is_err());
    assert!(request(b"PRI * HTTP/2.0\r\n\r\n").is_err());
}

#[test]
fn responses_are_framed_as_rfc_9112_says() {
    use Framing::{Chunked, Length, Tunnel, UntilClose};
    for (status, lines, to, expected) in [
        ("200 OK", "Content-Length: 3\r\n", Method::Other, Length(3)),
        ("200 OK", "Content-Length: 3\r\n", Method::Head, Length(0)),
        ("200 OK", "Transfer-Encoding: chunked\r\n", Method::Head, Length(0)),
        ("200 OK", "Transfer-Encoding: chunked\r\n", Method::Other, Chunked),
        ("200 OK", "", Method::Other, UntilClose),
        ("200", "", Method::Other, UntilClose),
        ("200 OK", "Content-Length: 3\r\n", Method::Connect, Tunnel),
        ("404 No", "Content-Length: 3\r\n", Method::Connect, Length(3)),
        ("100 Continue", "", Method::Other, Length(0)),
        ("103 Early Hints", "Link: x\r\n", Method::Other, Length(0)),
        ("101 Switching", "Upgrade: websocket\r\n", Method::Other, Tunnel),
        ("204 No Content", "Content-Length: 3\r\n", Method::Other, Length(0)),
        ("304 Not Modified", "Content-Length: 3\r\n", Method::Other, Length(0)),
    ] {
        let response = answer(status, lines, to).unwrap();
        assert_eq!(response.framing, expected, "{status} {lines:?} to {to:?}");
        assert_eq!(response.is_interim(), matches!(response.status, 100 | 103), "{status}");
    }
    assert!(answer("200 OK", "Content-Length: 3\r\nTransfer-Encoding: chunked\r\n", Method::Other).is_err());
    assert!(answer("200 OK", "Content-Length: 3\r\nContent-Length: 4\r\n", Method::Other).is_err());
}

#[test]
fn connections_are_kept_as_rfc_9112_says() {
    let kept = |version: &str, lines: &str| {
        let head = format!("GET / HTTP/{version}\r\n{lines}\r\n");
        request(head.as_bytes()).unwrap().keep_alive
    };
    assert!(kept("1.1", ""));
    assert!(!kept("1.1", "Connection: close\r\n"));
    assert!(!kept("1.1", "Connection: x, Close\r\n"));
    assert!(!kept("1.0", ""));
    assert!(kept("1.0", "Connection: Keep-Alive\r\n"));
    assert!(!kept("1.0", "Connection: keep-alive, close\r\n"));
    assert!(!answer("200 OK", "", Method::Other).unwrap().keep_alive, "the end of the connection is its end");
}

#[test]
fn what_a_request_wants_is_seen() {
    let request = request(&head(
        "Expect: 100-Continue\r\nUpgrade: websocket\r\nUser-Agent: kube-probe/1.35\r\n\
         Accept: text/html, application/json;q=0.9\r\nbaggage: a=b,forkd=alice\r\n",
    ))
    .unwrap();
    assert!(request.expects_continue && request.upgrade && request.probe && request.accepts_json);
    assert_eq!(request.carried.key().map(Key::as_str), Some("alice"));
}

#[test]
fn hundreds_of_headers_are_read() {
    let lines: String = (0..900).map(|i| format!("h{i}: {i}\r\n")).collect();
    let request = request(&head(&format!("{lines}x-forkd-id: bob\r\n"))).unwrap();
    assert_eq!(request.carried.key().map(Key::as_str), Some("bob"));
}

#[test]
fn carriers_are_added_and_every_other_byte_stays() {
    let before =
        head("hOsT: a\r\nX-Forkd-Id:  alice\r\ntraceparent: 00-1-2-01\r\nTraceState: v=1\r\nb: c\r\n");
    let after = request(&before).unwrap().with_carriers(&before);
    let expected = "POST /x HTTP/1.1\r\nhOsT: a\r\nX-Forkd-Id:  alice\r\ntraceparent: 00-1-2-01\r\n\
                    tracestate: forkd=alice\r\nTraceState: v=1\r\nb: c\r\nbaggage: forkd=alice\r\n\r\n";
    assert_eq!(String::from_utf8(after.clone()).unwrap(), expected);
    assert_eq!(request(&after).unwrap().with_carriers(&after), after, "nothing is added twice");

    let unkeyed = head("baggage: a=b\r\n");
    assert_eq!(request(&unkeyed).unwrap().with_carriers(&unkeyed), unkeyed);
    let bare = b"GET / HTTP/1.1\nbaggage: forkd=alice\n\n";
    let after = request(bare).unwrap().with_carriers(bare);
    assert_eq!(after, b"GET / HTTP/1.1\nbaggage: forkd=alice\nx-forkd-id: alice\r\n\n");
    assert!(request(&after).is_ok());
}

#[test]
fn any_bytes_give_an_answer() {
    let alphabet = b"GET / HTTP/1.1\r\n\r\nContent-Length: 5,\x00\xff\t ;chunkedTransfer-Encoding";
    let mut state = 11u64;
    for _ in 0..50_000 {
        let bytes: Vec<u8> = (0..60)
            .map(|_| {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                alphabet[(state >> 33) as usize % alphabet.len()]
            })
            .collect();
        let input = [b"GET / HTTP/1.1\r\n", &bytes[..]].concat();
        if let Ok(Some(len)) = HeadEnd::default().find(&input) {
            let _ = request(&input[..len]);
            let _ = response(&input[..len], Method::Other);
        }
    }
}
