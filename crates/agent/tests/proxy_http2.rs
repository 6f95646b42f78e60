//! HTTP/2 and gRPC's habits through real redirects: who gets which stream.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod pod;

use std::net::SocketAddr;
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use h2::client::SendRequest;
use h2::{Reason, RecvStream};
use http::{HeaderMap, Request, Response};
use pod::{Agent, Outside, PORT, agent, all, in_pod, listen, route};
use tokio::net::TcpListener;

/// With a small window, h2 takes hundreds of small frames at once for an attack.
const BURST: u32 = 16 << 20;

type Heads = Arc<Mutex<Vec<http::request::Parts>>>;

/// Echoes bodies, with its name as a header, and trailers; `/hang` never answers, `/reset` resets,
/// `/stall` answers and then reads nothing, `/continue` wants the body to be held back until it says so.
fn server(listener: TcpListener, name: &'static str) -> (Heads, tokio::task::JoinHandle<Reason>) {
    let seen = Heads::default();
    let heads = seen.clone();
    // The reason of the first stream that its caller reset.
    let reset = tokio::spawn(async move {
        let (tell, mut told) = tokio::sync::mpsc::unbounded_channel();
        loop {
            tokio::select! {
                accepted = listener.accept() => {
                    let (stream, _) = accepted.unwrap();
                    tokio::spawn(connection(stream, name, heads.clone(), tell.clone()));
                }
                Some(reason) = told.recv() => return reason,
            }
        }
    });
    (seen, reset)
}

async fn connection(
    stream: tokio::net::TcpStream,
    name: &'static str,
    heads: Heads,
    tell: tokio::sync::mpsc::UnboundedSender<Reason>,
) {
    let handshake = h2::server::Builder::new().initial_connection_window_size(BURST).handshake(stream);
    let Ok(mut server) = handshake.await else { return };
    while let Some(Ok((request, mut respond))) = server.accept().await {
        let (parts, mut body) = request.into_parts();
        let path = parts.uri.path().to_owned();
        heads.lock().unwrap().push(parts);
        if path == "/goaway" {
            server.graceful_shutdown();
        }
        let tell = tell.clone();
        tokio::spawn(async move {
            match path.as_str() {
                "/reset" => return respond.send_reset(Reason::INADEQUATE_SECURITY),
                "/hang" => {
                    let reason = std::future::poll_fn(|cx| respond.poll_reset(cx)).await;
                    return tell.send(reason.unwrap()).unwrap_or_default();
                }
                "/continue" => {
                    let go_on = Response::builder().status(100).body(()).unwrap();
                    respond.send_informational(go_on).unwrap();
                }
                _ => {}
            }
            let response = Response::builder().header("who", name).body(()).unwrap();
            let mut down = respond.send_response(response, false).unwrap();
            if path == "/stall" {
                return std::future::pending().await;
            }
            while let Some(Ok(data)) = body.data().await {
                let _ = body.flow_control().release_capacity(data.len());
                if send(&mut down, data).await.is_err() {
                    return;
                }
            }
            let mut trailers = body.trailers().await.unwrap_or_default().unwrap_or_default();
            trailers.insert("grpc-status", "0".parse().unwrap());
            let _ = down.send_trailers(trailers);
        });
    }
}

async fn send(to: &mut h2::SendStream<Bytes>, mut data: Bytes) -> Result<(), h2::Error> {
    while !data.is_empty() {
        to.reserve_capacity(data.len());
        let room = std::future::poll_fn(|cx| to.poll_capacity(cx)).await.unwrap()?;
        to.send_data(data.split_to(room.min(data.len())), false)?;
    }
    Ok(())
}

async fn laptop(agent: &Agent, fork: &str, name: &'static str) -> (Heads, tokio::task::JoinHandle<Reason>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    agent.laptops.set(&format!("uid-{fork}"), listener.local_addr().unwrap());
    server(listener, name)
}

struct Caller {
    sender: SendRequest<Bytes>,
    /// How its connection ended.
    ended: tokio::task::JoinHandle<Result<(), h2::Error>>,
}

async fn caller(outside: &Outside) -> Caller {
    let stream = outside.connect().await;
    let (sender, connection) = h2::client::Builder::new()
        // Real clients open no more before they know the server's limit; h2 would.
        .initial_max_send_streams(100)
        .initial_connection_window_size(BURST)
        .handshake(stream)
        .await
        .unwrap();
    Caller { sender, ended: tokio::spawn(connection) }
}

fn request(path: &str, headers: &[(&str, &str)]) -> Request<()> {
    let mut request = Request::post(format!("http://cart{path}"));
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    request.body(()).unwrap()
}

async fn whole(mut body: RecvStream) -> (Vec<u8>, HeaderMap) {
    let mut bytes = Vec::new();
    while let Some(data) = body.data().await {
        let data = data.unwrap();
        body.flow_control().release_capacity(data.len()).unwrap();
        bytes.extend_from_slice(&data);
    }
    (bytes, body.trailers().await.unwrap().unwrap_or_default())
}

/// Sends `body` with a trailer; gives the answer's head, body and trailers.
async fn ask(caller: &Caller, request: Request<()>, body: &'static str) -> (Response<()>, String, HeaderMap) {
    let mut sender = caller.sender.clone().ready().await.unwrap();
    let (response, mut up) = sender.send_request(request, false).unwrap();
    up.send_data(Bytes::from(body), false).unwrap();
    let mut trailers = HeaderMap::new();
    trailers.insert("x-trailer", "sent".parse().unwrap());
    up.send_trailers(trailers).unwrap();
    let (head, body) = response.await.unwrap().into_parts();
    let (bytes, trailers) = whole(body).await;
    (Response::from_parts(head, ()), String::from_utf8(bytes).unwrap(), trailers)
}

fn header<'a>(response: &'a Response<()>, name: &str) -> &'a str {
    response.headers().get(name).map_or("", |value| value.to_str().unwrap())
}

#[test]
fn streams_of_one_connection_go_where_their_keys_say_with_trailers_both_ways() {
    in_pod(async |outside| {
        let agent = agent([route("alice"), route("bob")]).await;
        let (alice, _) = laptop(&agent, "alice", "alice").await;
        laptop(&agent, "bob", "bob").await;
        let (baseline, _) = server(listen(PORT).await, "baseline");
        let caller = caller(&outside).await;
        let parent = ("traceparent", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01");
        for (headers, who, by) in [
            (&[][..], "baseline", ""),
            (
                &[("baggage", "a=b,forkd=alice"), parent, ("tracestate", "v=1")][..],
                "alice",
                "laptop=alice/alice-mbp; service=shop/cart; fork=alice",
            ),
            (&[("x-forkd-id", "bob")], "bob", "laptop=bob/bob-mbp; service=shop/cart; fork=bob"),
            (&[("x-forkd-id", "carol")], "baseline", "baseline; service=shop/cart; fork=carol"),
            (
                &[("x-forkd-id", "bob"), ("user-agent", "kube-probe/1.35")],
                "baseline",
                "baseline; service=shop/cart; fork=bob",
            ),
        ] {
            let (head, body, trailers) = ask(&caller, request("/shop.Cart/Add", headers), "hello").await;
            assert_eq!((header(&head, "who"), header(&head, "forkd-served-by")), (who, by), "{headers:?}");
            assert_eq!(body, "hello");
            assert_eq!(
                (&trailers["grpc-status"], &trailers["x-trailer"]),
                (&"0".parse().unwrap(), &"sent".parse().unwrap())
            );
        }
        let alice = alice.lock().unwrap();
        let states: Vec<_> = alice[0].headers.get_all("tracestate").iter().collect();
        assert_eq!(states, ["forkd=alice", "v=1"], "in front");
        assert_eq!(alice[0].headers["x-forkd-id"], "alice");
        assert_eq!(alice[0].uri.to_string(), "http://cart/shop.Cart/Add");
        assert!(baseline.lock().unwrap()[0].headers.is_empty(), "nothing is added without a key");
    });
}

#[test]
fn a_server_that_says_its_settings_first_is_still_routed() {
    in_pod(async |outside| {
        let agent = agent([route("alice")]).await;
        laptop(&agent, "alice", "alice").await;
        let app = listen(PORT).await;
        let stream = outside.connect().await;
        let (mut eager, _) = app.accept().await.unwrap();
        // SETTINGS with MAX_CONCURRENT_STREAMS 100, before the caller said a word.
        let settings = [0, 0, 6, 4, 0, 0, 0, 0, 0, 0, 3, 0, 0, 0, 100];
        tokio::io::AsyncWriteExt::write_all(&mut eager, &settings).await.unwrap();
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
        let (sender, connection) = h2::client::handshake(stream).await.unwrap();
        let caller = Caller { sender, ended: tokio::spawn(connection) };
        let (head, _, _) = ask(&caller, request("/", &[("x-forkd-id", "alice")]), "").await;
        assert_eq!(header(&head, "who"), "alice");
        // The application gets the unkeyed stream, on the connection whose settings were said.
        let mut sender = caller.sender.clone().ready().await.unwrap();
        let (_response, _) = sender.send_request(request("/", &[]), true).unwrap();
        let mut preface = [0; 24];
        tokio::io::AsyncReadExt::read_exact(&mut eager, &mut preface).await.unwrap();
        assert_eq!(&preface, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n");
        assert_eq!(agent.counters.opaque_connections(PORT), 0);
    });
}

#[test]
fn a_thousand_streams_of_two_forks_never_cross() {
    in_pod(async |outside| {
        let agent = agent([route("alice"), route("bob")]).await;
        laptop(&agent, "alice", "alice").await;
        laptop(&agent, "bob", "bob").await;
        server(listen(PORT).await, "baseline");
        let caller = Arc::new(caller(&outside).await);
        let mut asking = tokio::task::JoinSet::new();
        for n in 0..1000usize {
            let caller = caller.clone();
            asking.spawn(async move {
                let (headers, who) = [
                    (&[("baggage", "forkd=alice")][..], "alice"),
                    (&[("x-forkd-id", "bob")][..], "bob"),
                    (&[][..], "baseline"),
                ][n * n % 7 % 3];
                let (head, body, _) = ask(&caller, request("/", headers), who).await;
                assert_eq!((header(&head, "who"), body.as_str()), (who, who), "{n}");
            });
        }
        while let Some(asked) = asking.join_next().await {
            asked.unwrap();
        }
    });
}

#[test]
fn both_directions_stream_at_once() {
    in_pod(async |outside| {
        let agent = agent([route("alice")]).await;
        laptop(&agent, "alice", "alice").await;
        let caller = caller(&outside).await;
        let mut sender = caller.sender.clone().ready().await.unwrap();
        let (response, mut up) =
            sender.send_request(request("/", &[("x-forkd-id", "alice")]), false).unwrap();
        let mut body = response.await.unwrap().into_body();
        for n in 0..50u32 {
            let message = Bytes::from(format!("message {n}"));
            up.send_data(message.clone(), false).unwrap();
            let data = body.data().await.unwrap().unwrap();
            assert_eq!(data, message, "the answer comes while the request is open");
            body.flow_control().release_capacity(data.len()).unwrap();
        }
        up.send_data(Bytes::new(), true).unwrap();
        let (rest, trailers) = whole(body).await;
        assert!(rest.is_empty());
        assert_eq!(trailers["grpc-status"], "0");
    });
}

#[test]
fn a_body_that_is_held_back_until_100_continue_gets_through() {
    in_pod(async |outside| {
        let agent = agent([route("alice")]).await;
        laptop(&agent, "alice", "alice").await;
        server(listen(PORT).await, "baseline");
        let caller = caller(&outside).await;
        for (key, who) in [("alice", "alice"), ("", "baseline")] {
            let mut sender = caller.sender.clone().ready().await.unwrap();
            let expect = request("/continue", &[("expect", "100-continue"), ("x-forkd-id", key)]);
            let (mut response, mut up) = sender.send_request(expect, false).unwrap();
            let interim = std::future::poll_fn(|cx| response.poll_informational(cx)).await;
            assert_eq!(interim.unwrap().unwrap().status(), 100, "{who}");
            up.send_data(Bytes::from("held back"), true).unwrap();
            let (head, body) = response.await.unwrap().into_parts();
            assert_eq!(
                (head.status.as_u16(), &head.headers["who"]),
                (200, &http::HeaderValue::from_static(who))
            );
            assert_eq!(whole(body).await.0, b"held back");
        }
    });
}

#[test]
fn a_laptop_that_stops_reading_holds_up_its_own_streams_only() {
    in_pod(async |outside| {
        let agent = agent([route("alice")]).await;
        laptop(&agent, "alice", "alice").await;
        server(listen(PORT).await, "baseline");
        let stream = outside.connect().await;
        let (sender, connection) = h2::client::Builder::new().handshake::<_, Bytes>(stream).await.unwrap();
        let caller = Caller { sender, ended: tokio::spawn(connection) };
        let mut stalled = Vec::new();
        for _ in 0..20 {
            let mut sender = caller.sender.clone().ready().await.unwrap();
            let keyed = request("/stall", &[("x-forkd-id", "alice")]);
            let (response, mut up) = sender.send_request(keyed, false).unwrap();
            let body = response.await.unwrap();
            let filled = tokio::spawn(async move {
                let _ = send(&mut up, Bytes::from(vec![0; 8 << 20])).await;
            });
            stalled.push((body, filled));
        }
        let (head, body, _) = ask(&caller, request("/", &[]), "still through").await;
        assert_eq!((header(&head, "who"), body.as_str()), ("baseline", "still through"));
        assert!(stalled.iter().all(|(_, filled)| !filled.is_finished()), "nobody swallowed 8 MiB");
        stalled.iter().for_each(|(_, filled)| filled.abort());
    });
}

#[test]
fn resets_pass_through_both_ways_with_their_reason() {
    in_pod(async |outside| {
        let agent = agent([route("alice")]).await;
        let (_, reset) = laptop(&agent, "alice", "alice").await;
        let caller = caller(&outside).await;
        let mut sender = caller.sender.clone().ready().await.unwrap();
        let keyed = [("x-forkd-id", "alice")];
        let (response, _) = sender.send_request(request("/reset", &keyed), true).unwrap();
        assert_eq!(response.await.unwrap_err().reason(), Some(Reason::INADEQUATE_SECURITY));

        let mut sender = sender.ready().await.unwrap();
        let (response, mut up) = sender.send_request(request("/hang", &keyed), false).unwrap();
        up.send_reset(Reason::CANCEL);
        drop(response);
        assert_eq!(reset.await.unwrap(), Reason::CANCEL);
    });
}

#[test]
fn an_absent_laptop_is_said_in_the_callers_language() {
    in_pod(async |outside| {
        let mut to_baseline = route("bob");
        to_baseline.on_unavailable = 1;
        let agent = agent([route("alice"), to_baseline]).await;
        server(listen(PORT).await, "baseline");
        let caller = caller(&outside).await;
        let (head, body, _) = ask(&caller, request("/", &[("x-forkd-id", "alice")]), "").await;
        assert_eq!((head.status().as_u16(), header(&head, "forkd-served-by")), (503, "agent"));
        assert!(body.contains("laptop alice-mbp of alice is not connected"), "{body}");
        let grpc = [("x-forkd-id", "alice"), ("content-type", "application/grpc+proto")];
        let (head, _, _) = ask(&caller, request("/shop.Cart/Add", &grpc), "").await;
        assert_eq!((head.status().as_u16(), header(&head, "grpc-status")), (200, "14"));
        assert!(header(&head, "grpc-message").contains("not connected"));
        let (head, _, _) = ask(&caller, request("/", &[("x-forkd-id", "bob")]), "").await;
        assert_eq!(header(&head, "who"), "baseline");
        let free: SocketAddr = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
        agent.laptops.set("uid-alice", free);
        let (head, body, _) = ask(&caller, request("/", &[("x-forkd-id", "alice")]), "").await;
        assert_eq!(head.status().as_u16(), 502);
        assert!(body.contains(&free.to_string()), "{body}");
    });
}

#[test]
fn an_application_that_refuses_or_leaves_is_seen_by_the_caller() {
    in_pod(async |outside| {
        let agent = agent([route("alice"), all("dora")]).await;
        laptop(&agent, "alice", "alice").await;
        agent.routes.replace([route("alice")]);
        let caller_without = caller(&outside).await;
        let mut sender = caller_without.sender.clone().ready().await.unwrap();
        let (response, _) = sender.send_request(request("/", &[]), true).unwrap();
        assert_eq!(response.await.unwrap_err().reason(), Some(Reason::REFUSED_STREAM));
        let (head, _, _) = ask(&caller_without, request("/", &[("x-forkd-id", "alice")]), "").await;
        assert_eq!(header(&head, "who"), "alice", "other streams of the connection live");

        server(listen(PORT).await, "baseline");
        let caller = caller(&outside).await;
        let (head, body, _) = ask(&caller, request("/goaway", &[]), "last words").await;
        assert_eq!((header(&head, "who"), body.as_str()), ("baseline", "last words"));
        drop(caller.sender);
        caller.ended.await.unwrap().unwrap();
    });
}

#[test]
fn a_drained_proxy_finishes_its_streams() {
    in_pod(async |outside| {
        let mut agent = agent([route("alice")]).await;
        laptop(&agent, "alice", "alice").await;
        let caller = caller(&outside).await;
        let mut sender = caller.sender.clone().ready().await.unwrap();
        let (response, mut up) =
            sender.send_request(request("/", &[("x-forkd-id", "alice")]), false).unwrap();
        let body = response.await.unwrap().into_body();
        agent.redirect.apply(&[].into()).unwrap();
        agent.stop.take().unwrap().send(()).unwrap();
        let refused = pod::until_refused(&outside, agent.port);
        refused.await;
        up.send_data(Bytes::from("after"), true).unwrap();
        assert_eq!(whole(body).await.0, b"after");
        drop((caller.sender, sender, up));
        assert_eq!(agent.run.await.unwrap(), 0, "nothing was cut");
    });
}
