//! Each protocol of a shop, with the key and without, through an intercept.

use crate::harness::cluster::{SHOP, kubectl, rolled_out, scale};
use crate::harness::shop::Server;
use crate::harness::{Laptop, Line, inside, on_laptop};

/// What to expect of a key while alice intercepts.
const KEYS: [(&str, &str); 3] = [("alice", "laptop"), ("", "cluster"), ("bob", "cluster")];

/// An intercept of alice's fork, served on her laptop.
#[track_caller]
fn intercepted(laptop: &Laptop, service: &str) -> Server {
    laptop.connect();
    let server = laptop.serve(service, "laptop");
    laptop.intercept(service, server.port(), &["--fork", "alice"]);
    server
}

/// Each line came from where its key leads; the number of connections that they shared.
#[track_caller]
fn no_crossing(lines: &[Line]) -> usize {
    for line in lines {
        let from = if line.key == "alice" { "laptop" } else { "cluster" };
        assert_eq!(line.clone().fine().from(), from, "{line:?}");
    }
    let mut connections: Vec<&str> = lines.iter().map(|line| line.conn.as_str()).collect();
    connections.sort_unstable();
    connections.dedup();
    connections.len()
}

#[test]
fn http1_and_http2_connections_that_are_kept_alive_mix_keys() {
    on_laptop(|laptop| {
        let _server = intercepted(laptop, "cart");
        for kind in ["http1", "h2c"] {
            let lines = inside().ask(
                kind,
                "cart:8080",
                &["--mixed", "alice,-,bob,alice,alice,-", "--n", "120", "--keepalive"],
            );
            assert_eq!((lines.len(), no_crossing(&lines)), (120, 1), "{kind}");
        }
        let lines = inside().ask(
            "h2c",
            "cart:8080",
            &["--mixed", "alice,-", "--n", "200", "--parallel", "20", "--keepalive"],
        );
        assert_eq!((lines.len(), no_crossing(&lines)), (200, 1), "many streams at once");
    });
}

#[test]
fn grpc_calls_streams_and_trailers_go_where_their_key_leads() {
    on_laptop(|laptop| {
        // Connections that cart keeps from before stay with the pod; a new cart has none.
        kubectl(&["--namespace", SHOP, "rollout", "restart", "deployment/cart"]).ok();
        rolled_out(SHOP, "deployment/cart");
        scale("cart", 2);
        let _server = intercepted(laptop, "price");
        for (key, from) in KEYS {
            let one = |kind: &str, more: &[&str]| {
                let args = [&["--key", key], more].concat();
                inside().one(kind, "price:50051", &args).fine()
            };
            let unary = one("grpc", &[]);
            assert_eq!((unary.from(), unary.code.as_str()), (from, "OK"), "{key}");
            let stream = one("grpc-stream", &["--n", "10", "--ms", "100"]);
            assert_eq!((stream.from(), stream.messages), (from, 10), "{key}");
            assert!(stream.first_ms < stream.ms / 2.0, "messages are passed on as they come: {stream:?}");
            let chat = one("grpc-chat", &["--n", "20", "--bytes", "20000"]);
            assert_eq!((chat.from(), chat.messages, chat.same), (from, 20, Some(true)), "{key}");
            assert_eq!(chat.trailers.get("shop-count").map(String::as_str), Some("20"), "{chat:?}");
            assert_eq!(chat.trailers.get("shop-where").map(String::as_str), Some(from), "{chat:?}");
            assert_eq!(
                chat.served_by.is_empty(),
                key.is_empty(),
                "whoever asks with a key is told who answered: {chat:?}"
            );
        }
        let lines =
            inside().ask("grpc", "price:50051", &["--mixed", "alice,-,bob", "--n", "90", "--keepalive"]);
        assert_eq!((lines.len(), no_crossing(&lines)), (90, 1));
        // The mesh of callers: cart, in the cluster, passes the key on by gRPC.
        let tree = inside().http("cart:8080", "alice").fine();
        assert_eq!(tree.answer().find("price").map(|price| price.place.as_str()), Some("laptop"));
    });
}

#[test]
fn websockets_are_upgraded_on_the_side_that_their_key_leads_to() {
    on_laptop(|laptop| {
        let _server = intercepted(laptop, "web");
        for (key, from) in KEYS {
            let line = inside().one("ws", "web:80", &["--key", key, "--n", "20", "--bytes", "100000"]).fine();
            assert_eq!((line.from(), line.messages, line.same), (from, 20, Some(true)), "{key}");
        }
    });
}

#[test]
fn bodies_are_streamed_both_ways_with_trailers_and_100_continue() {
    on_laptop(|laptop| {
        let _server = intercepted(laptop, "cart");
        for (key, from) in KEYS {
            for kind in ["http1", "h2c"] {
                let one = |more: &[&str]| {
                    let args = [&["--key", key], more].concat();
                    inside().one(kind, "cart:8080", &args).fine()
                };
                let large = one(&["--path", "/echo", "--bytes", "5000000"]);
                assert_eq!(
                    (large.from(), large.same, large.bytes),
                    (from, Some(true), 5_000_000),
                    "{kind} {key}"
                );
                let trailer = one(&["--path", "/echo", "--bytes", "100000", "--trailer", "x-sum: 42"]);
                assert_eq!((trailer.from(), trailer.same), (from, Some(true)), "{kind} {key}");
                let sum = trailer.trailers.iter().find(|(name, _)| name.eq_ignore_ascii_case("x-sum"));
                assert_eq!(sum.map(|(_, value)| value.as_str()), Some("42"), "{kind} {key}: {trailer:?}");
                let expect = one(&["--path", "/echo", "--bytes", "100000", "--expect-continue"]);
                assert_eq!((expect.same, expect.continued), (Some(true), true), "{kind} {key}: {expect:?}");
                let stream = one(&["--path", "/stream?n=10&ms=100"]);
                assert!(stream.first_ms < stream.ms / 2.0, "{kind} {key}: {stream:?}");
                let down = one(&["--path", "/bytes?n=20000000"]);
                assert_eq!((down.from(), down.bytes), (from, 20_000_000), "{kind} {key}");
            }
        }
    });
}

#[test]
fn answers_without_a_body_and_refusals_of_one_keep_the_connection_in_step() {
    on_laptop(|laptop| {
        let _server = intercepted(laptop, "cart");
        for (key, from) in KEYS {
            for (path, method, status) in [
                ("/bytes?n=1000", "HEAD", 200),
                ("/status/204", "GET", 204),
                ("/status/304", "GET", 304),
                ("/status/404", "GET", 404),
                ("/status/503", "GET", 503),
                ("/status/204", "DELETE", 204),
            ] {
                let args = ["--key", key, "--path", path, "--method", method, "--n", "4", "--keepalive"];
                for line in inside().ask("http1", "cart:8080", &args) {
                    let line = line.fine();
                    assert_eq!((line.status, line.from()), (status, from), "{key} {method} {path}");
                }
            }
            // The final answer comes instead of "100 Continue": the body is never sent.
            let refused = ["--key", key, "--path", "/status/413", "--bytes", "1000000", "--expect-continue"];
            let line = inside().one("http1", "cart:8080", &refused);
            assert_eq!((line.status, line.continued), (413, false), "{key}: {line:?}");
        }
    });
}
