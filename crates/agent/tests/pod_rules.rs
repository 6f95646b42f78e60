//! The redirect and what is not HTTP: rules as the kernel has them, sockets as callers see them.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod pod;

use std::io::ErrorKind;
use std::time::Duration;

use forkd_agent::nft::{NftError, Redirect};
use forkd_agent::older::{Pooled, close_pooled, count};
use pod::{POD, POD6, PORT, agent, all, ask, http_server, in_pod, laptop, listen, route, run, until};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpSocket, TcpStream};

const GET: &str = "GET / HTTP/1.1\r\nHost: cart\r\n\r\n";
const KEYED: &str = "GET / HTTP/1.1\r\nbaggage: forkd=alice\r\n\r\n";

/// A connection as Envoy makes it: user 1337, from `from`.
async fn envoy(from: &str, to: &str) -> TcpStream {
    nix::unistd::setfsuid(nix::unistd::Uid::from_raw(1337));
    let socket = if from.contains('.') { TcpSocket::new_v4() } else { TcpSocket::new_v6() };
    nix::unistd::setfsuid(nix::unistd::Uid::from_raw(0));
    let socket = socket.unwrap();
    let from: std::net::IpAddr = from.parse().unwrap();
    socket.bind((from, 0).into()).unwrap();
    let to: std::net::IpAddr = to.parse().unwrap();
    socket.connect((to, PORT).into()).await.unwrap()
}

/// Listens like an application that says `banner` first, then echoes.
fn speaks_first(listener: TcpListener, banner: &'static [u8]) {
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            tokio::spawn(async move {
                stream.write_all(banner).await.unwrap_or_default();
                let (mut read, mut write) = stream.split();
                tokio::io::copy(&mut read, &mut write).await.unwrap_or_default();
            });
        }
    });
}

async fn read_exactly(stream: &mut TcpStream, expected: &[u8]) {
    let mut bytes = vec![0; expected.len()];
    stream.read_exact(&mut bytes).await.unwrap();
    assert_eq!(bytes, expected);
}

#[test]
fn the_rules_are_the_ones_that_are_right_with_and_without_a_sidecar() {
    in_pod(async |_| {
        let mut redirect = Redirect::new(15100).unwrap();
        redirect.apply(&[8080, 80].into()).unwrap();
        let rules = run("nft list table inet forkd");
        let lines: Vec<_> = rules.lines().map(|line| line.split('#').next().unwrap().trim()).collect();
        for line in [
            "flags owner",
            "type inet_service",
            "elements = { 80, 8080 }",
            "type nat hook prerouting priority -99; policy accept;",
            "iifname != \"lo\" tcp flags syn / fin,syn,rst,ack tcp dport @ports redirect to :15100",
            "type nat hook output priority -101; policy accept;",
            "oifname \"lo\" meta skuid 1337 ip saddr 127.0.0.6 tcp flags syn / fin,syn,rst,ack tcp dport @ports redirect to :15100",
            "oifname \"lo\" meta skuid 1337 ip daddr 127.0.0.1 tcp flags syn / fin,syn,rst,ack tcp dport @ports redirect to :15100",
            "oifname \"lo\" meta skuid 1337 ip6 saddr ::6 tcp flags syn / fin,syn,rst,ack tcp dport @ports redirect to :15100",
            "oifname \"lo\" meta skuid 1337 ip6 daddr ::1 tcp flags syn / fin,syn,rst,ack tcp dport @ports redirect to :15100",
        ] {
            let same = |have: &&str| have.replace("priority dstnat + 1", "priority -99") == line;
            assert!(lines.iter().any(same), "{line:?} is not among\n{rules}");
        }
        redirect.apply(&[9090].into()).unwrap();
        redirect.apply(&[9090].into()).unwrap();
        assert!(run("nft list set inet forkd ports").contains("elements = { 9090 }"));
        redirect.apply(&[].into()).unwrap();
        assert!(!run("nft list set inet forkd ports").contains("elements"));
        redirect.apply(&[9090].into()).unwrap();
        run("nft add table inet other");
        drop(redirect);
        assert_eq!(run("nft list tables"), "table inet other\n", "nothing else is touched, nothing is left");
    });
}

#[test]
fn a_dead_agents_table_is_replaced_and_a_live_ones_is_not() {
    in_pod(async |_| {
        run("nft add table inet forkd");
        run("nft add set inet forkd stale { type inet_service ; }");
        let mut one = Redirect::new(15100).unwrap();
        one.apply(&[8080].into()).unwrap();
        assert!(!run("nft list table inet forkd").contains("stale"));
        let mut two = Redirect::new(15200).unwrap();
        assert!(matches!(two.apply(&[8080].into()), Err(NftError::Taken)), "the first agent lives");
        assert!(run("nft list table inet forkd").contains(":15100"));
        one.remove().unwrap();
        two.apply(&[8080].into()).unwrap();
        assert!(run("nft list table inet forkd").contains(":15200"));
    });
}

#[test]
fn without_the_capability_the_message_names_it() {
    in_pod(async |_| {
        // Root of a user namespace of its own has no say over this network namespace.
        let refused = std::thread::spawn(|| {
            // Threads share what a user namespace must not; a process of its own does not.
            let line = format!("unshare --user --map-root-user {} --exact --nocapture as_a_stranger", exe());
            run(&format!("env FORKD_TEST_STRANGER=1 {line}"))
        });
        let output = refused.join().unwrap();
        assert!(output.contains("refused: may not set nftables rules"), "{output}");
        assert!(output.contains("NET_ADMIN"), "{output}");
    });
}

#[test]
fn a_killed_agent_leaves_no_table() {
    in_pod(async |outside| {
        http_server(listen(PORT).await, "baseline");
        let mut agent = std::process::Command::new(exe())
            .args(["--exact", "--nocapture", "as_a_stranger"])
            .env("FORKD_TEST_STRANGER", "held")
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let mut said = std::io::BufReader::new(agent.stdout.take().unwrap());
        let mut line = String::new();
        while !line.contains("held") {
            line.clear();
            assert_ne!(std::io::BufRead::read_line(&mut said, &mut line).unwrap(), 0, "it ended early");
        }
        assert!(run("nft list tables").contains("inet forkd"));
        agent.kill().unwrap();
        agent.wait().unwrap();
        // The kernel ends its sockets a moment after the process.
        until("the table is gone", || run("nft list tables").is_empty()).await;
        assert!(ask(&mut outside.connect().await, GET).await.ends_with("baseline"));
    });
}

fn exe() -> String {
    std::env::current_exe().unwrap().to_str().unwrap().to_owned()
}

/// What the tests above run as a process of its own; by itself, it makes its own namespace and succeeds.
#[test]
fn as_a_stranger() {
    let redirect = || Redirect::new(15100).unwrap();
    match std::env::var("FORKD_TEST_STRANGER").as_deref() {
        Ok("held") => {
            let mut redirect = redirect();
            redirect.apply(&[PORT].into()).unwrap();
            println!("held");
            // Longer than the test, which kills it.
            std::thread::sleep(pod::PATIENCE * 6);
        }
        Ok(_) => {
            let refused = redirect().apply(&[PORT].into()).unwrap_err();
            println!("refused: {refused}");
            assert!(matches!(refused, NftError::NoPermission));
        }
        Err(_) => in_pod(async |_| Redirect::new(15100).unwrap().apply(&[PORT].into()).unwrap()),
    }
}

#[test]
fn removing_the_ports_gives_new_connections_back_and_keeps_the_old() {
    in_pod(async |outside| {
        let mut agent = agent([all("alice")]).await;
        laptop(&agent, "alice", "alice").await;
        http_server(listen(PORT).await, "baseline");
        let mut old = outside.connect().await;
        assert!(ask(&mut old, GET).await.ends_with("alice"));
        agent.redirect.apply(&[].into()).unwrap();
        let mut new = outside.connect().await;
        assert!(ask(&mut new, GET).await.ends_with("baseline"));
        assert!(ask(&mut old, GET).await.ends_with("alice"), "a live connection is not cut");
        agent.redirect.apply(&[PORT].into()).unwrap();
        assert!(ask(&mut outside.connect().await, GET).await.ends_with("alice"));
        assert!(ask(&mut new, GET).await.ends_with("baseline"), "one that predates the redirect stays");
        assert_eq!(count(PORT, agent.counters.own()).unwrap(), 1);
        drop(new);
        until("the older connection is gone", || count(PORT, agent.counters.own()).unwrap() == 0).await;
    });
}

#[test]
fn connections_from_before_the_first_table_are_not_cut() {
    in_pod(async |outside| {
        // Nothing has switched on connection tracking in this namespace yet.
        let app = listen(PORT).await;
        let mut client = outside.connect().await;
        let (mut server, _) = app.accept().await.unwrap();
        client.write_all(b"before").await.unwrap();
        read_exactly(&mut server, b"before").await;
        let agent = agent([all("alice")]).await;
        laptop(&agent, "alice", "alice").await;
        client.write_all(b"after").await.unwrap();
        read_exactly(&mut server, b"after").await;
        server.write_all(b"answer").await.unwrap();
        read_exactly(&mut client, b"answer").await;
        assert!(ask(&mut outside.connect().await, GET).await.ends_with("alice"));
    });
}

#[test]
fn ipv6_callers_are_routed_too() {
    in_pod(async |outside| {
        let agent = agent([route("alice")]).await;
        laptop(&agent, "alice", "alice").await;
        http_server(listen(PORT).await, "baseline");
        let mut client = outside.try_connect(format!("[{POD6}]:{PORT}").parse().unwrap()).await.unwrap();
        assert!(ask(&mut client, KEYED).await.ends_with("alice"));
        assert!(ask(&mut client, GET).await.ends_with("baseline"));
    });
}

#[test]
fn who_dials_the_agents_own_port_finds_nothing() {
    in_pod(async |outside| {
        let agent = agent([all("alice")]).await;
        laptop(&agent, "alice", "alice").await;
        let mut client = outside.try_connect(format!("{POD}:{}", agent.port).parse().unwrap()).await.unwrap();
        client.write_all(GET.as_bytes()).await.unwrap_or_default();
        let read = client.read(&mut [0; 1]).await;
        assert!(matches!(read, Ok(0)) || read.is_err_and(|error| error.kind() == ErrorKind::ConnectionReset));
    });
}

#[test]
fn what_a_sidecar_hands_over_is_routed_and_nothing_else_inside_the_pod() {
    in_pod(async |_| {
        let agent = agent([all("alice")]).await;
        laptop(&agent, "alice", "alice").await;
        http_server(listen(PORT).await, "baseline");
        for (from, to) in [("127.0.0.6", POD), ("127.0.0.2", "127.0.0.1"), ("::1", "::1")] {
            let answer = ask(&mut envoy(from, to).await, GET).await;
            assert!(answer.ends_with("alice"), "Envoy from {from} to {to}: {answer}");
        }
        for (from, to) in [("127.0.0.1", POD), (POD, POD)] {
            let answer = ask(&mut envoy(from, to).await, GET).await;
            assert!(answer.ends_with("baseline"), "user 1337 from {from} to {to}: {answer}");
        }
        for to in ["127.0.0.1", POD] {
            let mut own = TcpStream::connect((to, PORT)).await.unwrap();
            assert!(ask(&mut own, GET).await.ends_with("baseline"), "the pod's own calls to {to}");
        }
    });
}

#[test]
fn a_sidecars_idle_pooled_connections_are_closed_and_nobody_elses() {
    in_pod(async |outside| {
        let app = listen(PORT).await;
        let mut idle = envoy("127.0.0.6", POD).await;
        let (mut idle_end, _) = app.accept().await.unwrap();
        let mut busy = envoy("127.0.0.6", POD).await;
        let (mut busy_end, _) = app.accept().await.unwrap();
        let mut other = outside.connect().await;
        let (mut other_end, _) = app.accept().await.unwrap();
        for (client, end) in [(&mut idle, &mut idle_end), (&mut other, &mut other_end)] {
            client.write_all(b"request").await.unwrap();
            read_exactly(end, b"request").await;
            end.write_all(b"response").await.unwrap();
            read_exactly(client, b"response").await;
        }
        // A little later than any of the above, as the kernel's clock of milliseconds sees it: still unanswered.
        tokio::time::sleep(Duration::from_millis(20)).await;
        busy.write_all(b"request").await.unwrap();
        read_exactly(&mut busy_end, b"request").await;

        let agent = agent([all("alice")]).await;
        laptop(&agent, "alice", "alice").await;
        let mut redirected = envoy("127.0.0.6", POD).await;
        assert!(ask(&mut redirected, GET).await.ends_with("alice"));
        let own = agent.counters.own();
        assert_eq!(count(PORT, own).unwrap(), 3);
        assert_eq!(close_pooled(PORT, Duration::from_secs(3600)).unwrap(), Pooled { closed: 0, busy: 2 });
        assert_eq!(close_pooled(PORT, Duration::from_millis(10)).unwrap(), Pooled { closed: 1, busy: 1 });
        assert_eq!(idle.read(&mut [0; 1]).await.unwrap_err().kind(), ErrorKind::ConnectionAborted);
        busy_end.write_all(b"response").await.unwrap();
        read_exactly(&mut busy, b"response").await;
        other.write_all(b"more").await.unwrap();
        read_exactly(&mut other_end, b"more").await;
        assert!(ask(&mut redirected, GET).await.ends_with("alice"), "what came through the agent stays");
        until("the closed one is not counted", || count(PORT, own).unwrap() == 2).await;
    });
}

#[test]
fn a_server_that_speaks_first_is_passed_and_counted() {
    in_pod(async |outside| {
        let agent = agent([route("alice")]).await;
        laptop(&agent, "alice", "alice").await;
        speaks_first(listen(PORT).await, b"220 hello\r\n");
        let mut client = outside.connect().await;
        read_exactly(&mut client, b"220 hello\r\n").await;
        client.write_all(KEYED.as_bytes()).await.unwrap();
        read_exactly(&mut client, KEYED.as_bytes()).await;
        assert_eq!(agent.counters.opaque_connections(PORT), 1);
        client.shutdown().await.unwrap();
        assert_eq!(client.read(&mut [0; 1]).await.unwrap(), 0);
    });
}

#[test]
fn bytes_that_are_no_http_reach_the_application_or_the_laptop_that_takes_all() {
    in_pod(async |outside| {
        let agent = agent([route("alice")]).await;
        speaks_first(listen(PORT).await, b"");
        let mut client = outside.connect().await;
        client.write_all(b"\0\x01PING").await.unwrap();
        read_exactly(&mut client, b"\0\x01PING").await;
        assert_eq!(agent.counters.opaque_connections(PORT), 1);

        let process = TcpListener::bind("127.0.0.1:0").await.unwrap();
        agent.laptops.set("uid-alice", process.local_addr().unwrap());
        agent.routes.replace([all("alice")]);
        client.write_all(b"still the application").await.unwrap();
        read_exactly(&mut client, b"still the application").await;
        let mut client = outside.connect().await;
        client.write_all(b"\0\x01PING").await.unwrap();
        let (mut server, _) = process.accept().await.unwrap();
        read_exactly(&mut server, b"\0\x01PING").await;
        // Resets pass in both directions.
        server.set_zero_linger().unwrap();
        drop(server);
        assert_eq!(client.read(&mut [0; 1]).await.unwrap_err().kind(), ErrorKind::ConnectionReset);
        let mut client = outside.connect().await;
        client.write_all(b"\0").await.unwrap();
        let (mut server, _) = process.accept().await.unwrap();
        read_exactly(&mut server, b"\0").await;
        client.set_zero_linger().unwrap();
        drop(client);
        // This laptop is a plain TCP connection, which ends when it is dropped; a tunnel's stream is reset.
        assert!(matches!(server.read(&mut [0; 1]).await, Ok(0)));
        assert_eq!(agent.counters.opaque_connections(PORT), 1, "a target that takes all wants them");
    });
}

#[test]
fn a_laptop_speaks_first_in_the_place_of_an_application_that_does() {
    in_pod(async |outside| {
        let agent = agent([all("alice")]).await;
        speaks_first(listen(PORT).await, b"220 baseline\r\n");
        let process = TcpListener::bind("127.0.0.1:0").await.unwrap();
        agent.laptops.set("uid-alice", process.local_addr().unwrap());
        speaks_first(process, b"220 laptop\r\n");
        let mut client = outside.connect().await;
        read_exactly(&mut client, b"220 laptop\r\n").await;
        agent.laptops.remove("uid-alice");
        let mut client = outside.connect().await;
        read_exactly(&mut client, b"220 baseline\r\n").await;
    });
}

#[test]
fn an_application_that_refuses_resets_its_callers_but_not_a_fork() {
    in_pod(async |outside| {
        let agent = agent([route("alice")]).await;
        laptop(&agent, "alice", "alice").await;
        let mut unkeyed = outside.connect().await;
        unkeyed.write_all(GET.as_bytes()).await.unwrap();
        assert_eq!(unkeyed.read(&mut [0; 1]).await.unwrap_err().kind(), ErrorKind::ConnectionReset);
        let mut silent = outside.connect().await;
        assert_eq!(silent.read(&mut [0; 1]).await.unwrap_err().kind(), ErrorKind::ConnectionReset);
        let mut keyed = outside.connect().await;
        assert!(ask(&mut keyed, KEYED).await.ends_with("alice"));
    });
}

#[test]
fn a_tcp_probe_stays_in_the_pod() {
    in_pod(async |outside| {
        let mut target = all("alice");
        target.tcp_probe = true;
        let agent = agent([target]).await;
        let process = TcpListener::bind("127.0.0.1:0").await.unwrap();
        agent.laptops.set("uid-alice", process.local_addr().unwrap());
        let _app = listen(PORT).await;
        drop(outside.connect().await);
        // The first connection that reaches the laptop is the one that says something.
        let mut client = outside.connect().await;
        client.write_all(b"\0word").await.unwrap();
        let (mut server, _) = process.accept().await.unwrap();
        read_exactly(&mut server, b"\0word").await;
    });
}

#[test]
fn thousands_of_idle_connections_are_held_and_end_with_the_application() {
    in_pod(async |outside| {
        let agent = agent([route("alice")]).await;
        let app = listen(PORT).await;
        let mut clients = Vec::new();
        let mut ends = Vec::new();
        for _ in 0..2000 {
            clients.push(outside.connect().await);
            ends.push(app.accept().await.unwrap().0);
        }
        assert_eq!(count(PORT, agent.counters.own()).unwrap(), 0, "all of them are the agent's");
        drop(ends);
        for client in &mut clients {
            assert_eq!(client.read(&mut [0; 1]).await.unwrap(), 0);
        }
    });
}
