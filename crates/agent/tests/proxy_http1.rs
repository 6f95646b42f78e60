//! HTTP/1 through real redirects: who gets which bytes.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod pod;

use bytes::BytesMut;
use pod::{PORT, agent, all, ask, http_server, in_pod, laptop, listen, read_response, route};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;

fn get(extra: &str) -> String {
    format!("GET /x HTTP/1.1\r\nHoSt: cart\r\n{extra}\r\n")
}

#[test]
fn unkeyed_bytes_are_the_same_on_both_sides() {
    in_pod(async |outside| {
        let agent = agent([route("alice")]).await;
        laptop(&agent, "alice", "alice").await;
        let app = listen(PORT).await;
        let request = "POST /a%20b HTTP/1.1\r\nhOsT:cart\r\nX-Odd:   two  spaces  \r\nTransfer-Encoding:  chunked\r\n\
                       baggage: user=1;x\r\nTrailer: A\r\n\r\n5;ext=\"q;r\"\r\nhello\r\n0003\r\nabc\r\n0;last\r\nA: b\r\n\r\n";
        let response = "HTTP/1.1 200 Fine by me\r\nX-lower: a\r\nx-Lower:b\r\ntransfer-encoding: Chunked\r\n\r\n\
                        A;x\r\n0123456789\r\n0\r\nGrpc-Status: 0\r\n\r\n";
        let mut client = outside.connect().await;
        client.write_all(request.as_bytes()).await.unwrap();
        let (mut server, _) = app.accept().await.unwrap();
        let mut received = vec![0; request.len()];
        server.read_exact(&mut received).await.unwrap();
        assert_eq!(String::from_utf8(received).unwrap(), request);
        server.write_all(response.as_bytes()).await.unwrap();
        let mut answer = vec![0; response.len()];
        client.read_exact(&mut answer).await.unwrap();
        assert_eq!(String::from_utf8(answer).unwrap(), response);
        drop(client);
        assert_eq!(server.read(&mut [0; 1]).await.unwrap(), 0, "nothing more, and the caller's end arrives");
    });
}

#[test]
fn one_kept_alive_connection_mixes_keys() {
    in_pod(async |outside| {
        let agent = agent([route("alice"), route("bob")]).await;
        let alice = laptop(&agent, "alice", "alice").await;
        let bob = laptop(&agent, "bob", "bob").await;
        let baseline = http_server(listen(PORT).await, "baseline");
        let mut client = outside.connect().await;
        for (extra, who, by) in [
            ("", "baseline", None),
            (
                "baggage: a=b,forkd=alice;p\r\n",
                "alice",
                Some("laptop=alice/alice-mbp; service=shop/cart; fork=alice"),
            ),
            ("", "baseline", None),
            ("x-forkd-id: bob\r\n", "bob", Some("laptop=bob/bob-mbp; service=shop/cart; fork=bob")),
            ("baggage: forkd=carol\r\n", "baseline", Some("baseline; service=shop/cart; fork=carol")),
            (
                "tracestate: forkd=alice\r\n",
                "alice",
                Some("laptop=alice/alice-mbp; service=shop/cart; fork=alice"),
            ),
            (
                "User-Agent: kube-probe/1.35\r\nx-forkd-id: bob\r\n",
                "baseline",
                Some("baseline; service=shop/cart; fork=bob"),
            ),
        ] {
            let answer = ask(&mut client, &get(extra)).await;
            let line = by.map(|by| format!("forkd-served-by: {by}\r\n")).unwrap_or_default();
            let expected = format!(
                "HTTP/1.1 200 OK\r\nX-Odd:  {who} \r\ncontent-LENGTH: {}\r\n{line}\r\n{who}",
                who.len()
            );
            assert_eq!(answer, expected, "{extra:?}");
        }
        let alice = alice.lock().unwrap();
        let first = String::from_utf8(alice[0].clone()).unwrap();
        assert_eq!(
            first,
            get("baggage: a=b,forkd=alice;p\r\nx-forkd-id: alice\r\n"),
            "the missing carrier is added"
        );
        assert_eq!((alice.len(), bob.lock().unwrap().len()), (2, 1));
        assert_eq!(baseline.lock().unwrap()[0], get("").into_bytes());
    });
}

#[test]
fn pipelined_requests_are_answered_in_order() {
    in_pod(async |outside| {
        let agent = agent([route("alice")]).await;
        laptop(&agent, "alice", "alice").await;
        http_server(listen(PORT).await, "baseline");
        let mut client = outside.connect().await;
        let post = "POST / HTTP/1.1\r\nx-forkd-id: alice\r\nContent-Length: 4\r\n\r\nbody";
        client.write_all([&get(""), post, &get(""), post].concat().as_bytes()).await.unwrap();
        let mut buffer = BytesMut::new();
        for who in ["baseline", "alice", "baseline", "alice"] {
            let answer = read_response(&mut client, &mut buffer).await;
            assert!(answer.ends_with(who.as_bytes()), "{who}: {:?}", String::from_utf8_lossy(&answer));
        }
        assert!(buffer.is_empty());
    });
}

#[test]
fn a_thousand_mixed_requests_of_two_forks_never_cross() {
    in_pod(async |outside| {
        let agent = agent([route("alice"), route("bob")]).await;
        let alice = laptop(&agent, "alice", "alice").await;
        let bob = laptop(&agent, "bob", "bob").await;
        let baseline = http_server(listen(PORT).await, "baseline");
        let clients = (0..10usize).map(|client| {
            let outside = outside.clone();
            tokio::spawn(async move {
                let mut stream = outside.connect().await;
                for n in 0..100usize {
                    let (extra, who) = [
                        ("baggage: forkd=alice\r\n", "alice"),
                        ("x-forkd-id: bob\r\n", "bob"),
                        ("baggage: other=1\r\n", "baseline"),
                    ][(client * 7 + n * n) % 3];
                    let answer = ask(&mut stream, &get(&format!("X-N: {client}-{n}-{who}\r\n{extra}"))).await;
                    assert!(answer.ends_with(who), "{client}-{n}: {answer}");
                }
            })
        });
        for client in clients.collect::<Vec<_>>() {
            client.await.unwrap();
        }
        let mut total = 0;
        for (seen, who) in [(alice, "alice"), (bob, "bob"), (baseline, "baseline")] {
            for request in seen.lock().unwrap().iter() {
                let request = String::from_utf8_lossy(request);
                let name = request.lines().find_map(|line| line.strip_prefix("X-N: ")).unwrap();
                assert!(name.ends_with(&format!("-{who}")), "{name} reached {who}");
                total += 1;
            }
        }
        assert_eq!(total, 1000);
    });
}

#[test]
fn continue_is_passed_before_the_body_and_early_answers_too() {
    in_pod(async |outside| {
        let agent = agent([route("alice")]).await;
        let process = TcpListener::bind("127.0.0.1:0").await.unwrap();
        agent.laptops.set("uid-alice", process.local_addr().unwrap());
        let mut client = outside.connect().await;
        let head = "POST / HTTP/1.1\r\nx-forkd-id: alice\r\nbaggage: forkd=alice\r\nExpect: 100-continue\r\nContent-Length: 8\r\n\r\n";
        client.write_all(head.as_bytes()).await.unwrap();
        let (mut server, _) = process.accept().await.unwrap();
        let mut received = vec![0; head.len()];
        server.read_exact(&mut received).await.unwrap();
        assert_eq!(received, head.as_bytes());
        server.write_all(b"HTTP/1.1 100 Continue\r\n\r\n").await.unwrap();
        let mut interim = vec![0; 25];
        client.read_exact(&mut interim).await.unwrap();
        assert_eq!(interim, b"HTTP/1.1 100 Continue\r\n\r\n");
        client.write_all(b"1234").await.unwrap();
        server.read_exact(&mut received[..4]).await.unwrap();
        // The answer is complete before the request is.
        server.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok").await.unwrap();
        let answer = read_response(&mut client, &mut BytesMut::new()).await;
        assert!(answer.ends_with(b"\r\n\r\nok"));
        client.write_all(b"5678").await.unwrap();
        server.read_exact(&mut received[..4]).await.unwrap();
        assert_eq!(&received[..4], b"5678");
        // The same connections serve the next request.
        client.write_all(get("baggage: forkd=alice\r\nx-forkd-id: alice\r\n").as_bytes()).await.unwrap();
        let mut next = vec![0; get("baggage: forkd=alice\r\nx-forkd-id: alice\r\n").len()];
        server.read_exact(&mut next).await.unwrap();
        server.write_all(b"HTTP/1.1 413 No\r\nConnection: close\r\n\r\nbye").await.unwrap();
        drop(server);
        let mut rest = Vec::new();
        client.read_to_end(&mut rest).await.unwrap();
        assert!(rest.ends_with(b"\r\n\r\nbye"), "a body that ends with the connection");
    });
}

#[test]
fn a_websocket_goes_where_its_handshake_says_and_is_raw_bytes_from_then_on() {
    in_pod(async |outside| {
        let agent = agent([route("alice")]).await;
        let process = TcpListener::bind("127.0.0.1:0").await.unwrap();
        agent.laptops.set("uid-alice", process.local_addr().unwrap());
        let mut client = outside.connect().await;
        let handshake = "GET /ws HTTP/1.1\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nbaggage: forkd=alice\r\nx-forkd-id: alice\r\n\r\n";
        client.write_all(handshake.as_bytes()).await.unwrap();
        let (mut server, _) = process.accept().await.unwrap();
        let mut received = vec![0; handshake.len()];
        server.read_exact(&mut received).await.unwrap();
        server
            .write_all(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\n\r\n\x81\x02hi")
            .await
            .unwrap();
        let mut buffer = BytesMut::new();
        let answer = String::from_utf8(read_response(&mut client, &mut buffer).await).unwrap();
        assert!(answer.contains("forkd-served-by: laptop=alice/alice-mbp;"), "{answer}");
        while buffer.len() < 4 {
            client.read_buf(&mut buffer).await.unwrap();
        }
        assert_eq!(&buffer[..], b"\x81\x02hi");
        // Not a request any more, whatever it looks like; the routes may go meanwhile.
        agent.routes.replace([]);
        client.write_all(get("").as_bytes()).await.unwrap();
        let mut frame = vec![0; get("").len()];
        server.read_exact(&mut frame).await.unwrap();
        assert_eq!(frame, get("").as_bytes());
        client.shutdown().await.unwrap();
        assert_eq!(server.read(&mut [0; 1]).await.unwrap(), 0, "half-close");
        server.write_all(b"late").await.unwrap();
        drop(server);
        let mut late = Vec::new();
        client.read_to_end(&mut late).await.unwrap();
        assert_eq!(late, b"late");
    });
}

#[test]
fn a_gone_laptop_is_a_503_that_says_why_or_the_baseline() {
    in_pod(async |outside| {
        let mut to_baseline = route("bob");
        to_baseline.on_unavailable = 1;
        let agent = agent([route("alice"), to_baseline]).await;
        http_server(listen(PORT).await, "baseline");
        let mut client = outside.connect().await;
        let answer = ask(&mut client, &get("x-forkd-id: alice\r\n")).await;
        assert!(answer.starts_with("HTTP/1.1 503 Service Unavailable\r\n"), "{answer}");
        assert!(answer.contains("\r\nforkd-served-by: agent\r\n"), "{answer}");
        assert!(answer.contains("laptop alice-mbp of alice is not connected"), "{answer}");
        let json = ask(&mut client, &get("x-forkd-id: alice\r\nAccept: application/json\r\n")).await;
        let body: serde_json::Value = serde_json::from_str(json.split("\r\n\r\n").nth(1).unwrap()).unwrap();
        assert!(body["try"].as_str().unwrap().contains("forkd connect"), "{body}");
        let answer = ask(&mut client, &get("x-forkd-id: bob\r\n")).await;
        assert!(answer.ends_with("baseline") && answer.contains("forkd-served-by: baseline;"), "{answer}");
        let answer = ask(&mut client, &get("")).await;
        assert!(answer.ends_with("baseline"), "the connection is still good: {answer}");

        // The laptop comes, without its process.
        let free = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
        agent.laptops.set("uid-alice", free);
        let answer = ask(&mut client, &get("x-forkd-id: alice\r\n")).await;
        assert!(answer.starts_with("HTTP/1.1 502 "), "{answer}");
        assert!(answer.contains(&format!("127.0.0.1:{}", free.port())), "{answer}");
    });
}

#[test]
fn a_target_that_takes_all_leaves_other_forks_probes_and_its_absence_to_others() {
    in_pod(async |outside| {
        let agent = agent([all("alice"), route("bob")]).await;
        let alice = laptop(&agent, "alice", "alice").await;
        laptop(&agent, "bob", "bob").await;
        http_server(listen(PORT).await, "baseline");
        let mut client = outside.connect().await;
        assert!(ask(&mut client, &get("")).await.ends_with("alice"));
        assert!(ask(&mut client, &get("x-forkd-id: bob\r\n")).await.ends_with("bob"));
        assert!(ask(&mut client, &get("User-Agent: kube-probe/1.35\r\n")).await.ends_with("baseline"));
        assert_eq!(alice.lock().unwrap()[0], get("").into_bytes(), "nothing is added without a key");
        agent.laptops.remove("uid-alice");
        let mut client = outside.connect().await;
        assert!(ask(&mut client, &get("")).await.ends_with("baseline"));
        let own = ask(&mut client, &get("x-forkd-id: alice\r\n")).await;
        assert!(own.starts_with("HTTP/1.1 503"), "who asked for the laptop is told: {own}");
    });
}

#[test]
fn routes_change_between_two_requests_of_a_live_connection() {
    in_pod(async |outside| {
        let agent = agent([route("alice")]).await;
        laptop(&agent, "alice", "alice").await;
        http_server(listen(PORT).await, "baseline");
        let mut client = outside.connect().await;
        assert!(ask(&mut client, &get("x-forkd-id: alice\r\n")).await.ends_with("alice"));
        agent.routes.replace([]);
        assert!(ask(&mut client, &get("x-forkd-id: alice\r\n")).await.ends_with("baseline"));
        let mut other = route("alice");
        other.target = "uid-second".to_owned();
        agent.routes.replace([other]);
        laptop(&agent, "second", "second").await;
        assert!(ask(&mut client, &get("x-forkd-id: alice\r\n")).await.ends_with("second"));
    });
}

#[test]
fn ambiguous_requests_reach_the_application_whole_and_no_laptop() {
    in_pod(async |outside| {
        let agent = agent([route("alice"), all("bob")]).await;
        let alice = laptop(&agent, "alice", "alice").await;
        let bob = laptop(&agent, "bob", "bob").await;
        let app = listen(PORT).await;
        for smuggled in [
            "POST / HTTP/1.1\r\nx-forkd-id: alice\r\nContent-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET /admin HTTP/1.1\r\nx-forkd-id: alice\r\n\r\n",
            "POST / HTTP/1.1\r\nx-forkd-id: alice\r\nContent-Length: 4\r\nContent-Length: 5\r\n\r\nbodyx",
            "GET / HTTP/1.1\r\nx-forkd-id: alice\r\nA: b\r\n folded\r\n\r\n",
        ] {
            let mut client = outside.connect().await;
            client.write_all(smuggled.as_bytes()).await.unwrap();
            client.shutdown().await.unwrap();
            let (mut server, _) = app.accept().await.unwrap();
            let mut received = String::new();
            server.read_to_string(&mut received).await.unwrap();
            assert_eq!(received, smuggled);
        }
        assert_eq!((alice.lock().unwrap().len(), bob.lock().unwrap().len()), (0, 0));
    });
}

#[test]
fn large_bodies_stream_both_ways_with_backpressure() {
    const SIZE: usize = 64 * 1024 * 1024;
    in_pod(async |outside| {
        let agent = agent([route("alice")]).await;
        let process = TcpListener::bind("127.0.0.1:0").await.unwrap();
        agent.laptops.set("uid-alice", process.local_addr().unwrap());
        let mut client = outside.connect().await;
        let head = format!(
            "PUT / HTTP/1.1\r\nbaggage: forkd=alice\r\nx-forkd-id: alice\r\nContent-Length: {SIZE}\r\n\r\n"
        );
        client.write_all(head.as_bytes()).await.unwrap();
        let (mut server, _) = process.accept().await.unwrap();
        let mut received = vec![0; head.len()];
        server.read_exact(&mut received).await.unwrap();
        server
            .write_all(format!("HTTP/1.1 200 OK\r\nContent-Length: {SIZE}\r\n\r\n").as_bytes())
            .await
            .unwrap();
        let (mut client_read, mut client_write) = client.into_split();
        let (mut server_read, mut server_write) = server.into_split();
        // The server does not read: the caller's writing stops well before the end.
        let chunk = vec![7; 64 * 1024];
        let mut stuck = 0;
        while let Ok(wrote) =
            tokio::time::timeout(std::time::Duration::from_millis(500), client_write.write(&chunk)).await
        {
            stuck += wrote.unwrap();
            assert!(stuck < SIZE, "everything was swallowed although nobody reads");
        }
        let sender = tokio::spawn(async move {
            for _ in 0..(SIZE - stuck) / chunk.len() {
                client_write.write_all(&chunk).await.unwrap();
            }
            client_write.write_all(&chunk[..(SIZE - stuck) % chunk.len()]).await.unwrap();
            client_write
        });
        let echo = tokio::spawn(async move { tokio::io::copy(&mut server_read, &mut server_write).await });
        let answer = pod::read_response(&mut client_read, &mut BytesMut::new()).await;
        let body = &answer[answer.len() - SIZE..];
        assert!(body.iter().all(|b| *b == 7));
        drop(sender.await.unwrap());
        drop(client_read);
        assert_eq!(echo.await.unwrap().unwrap(), SIZE as u64);
    });
}
