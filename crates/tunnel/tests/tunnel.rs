//! Laptop, relay and agent in one process, over loopback sockets.

#![allow(clippy::unwrap_used)] // helpers of tests are tests

mod common;

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use common::*;
use forkd_tunnel::endpoint::EndpointError;
use forkd_tunnel::identity::{Authority, Identity, IdentityError, KeyPair};
use forkd_tunnel::path::PipeEnd;
use forkd_tunnel::relay::{Dropped, Relay};
use forkd_tunnel::stream::{self, AcceptError, OpenError};
use forkd_wire::relay::Register;
use forkd_wire::tunnel::{Outcome, Reset};
use tokio::io::AsyncWriteExt;
use tokio::net::TcpListener;

#[tokio::test]
async fn a_hundred_megabytes_go_both_ways_through_the_relay_byte_for_byte() {
    let world = world().await;
    tokio::spawn(echo(world.agent("a", only(&["l1"]))));
    let laptop = world.laptop("l1").await;
    let connection = laptop.call("a").await;
    let (send, recv) = stream::open(&connection, dial(7)).await.unwrap();
    tokio::time::timeout(PATIENCE * 3, exchange(send, recv, 100 << 20, |_| ())).await.expect("in time");
    assert!(world.relay.forwarded().1 > 200 << 20);
}

#[tokio::test]
async fn a_refusal_comes_back_as_it_was_said() {
    let world = world().await;
    tokio::spawn(echo(world.agent("a", only(&["l1"]))));
    let laptop = world.laptop("l1").await;
    let connection = laptop.call("a").await;
    match stream::open(&connection, dial(9)).await {
        Err(OpenError::Refused { outcome: Outcome::Refused, reason }) => {
            assert_eq!(reason, "port 9 is closed")
        }
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn a_transfer_goes_on_over_the_next_pipe_without_losing_a_byte() {
    let world = world().await;
    tokio::spawn(echo(world.agent("a", only(&["l1"]))));
    let mut laptop = world.laptop("l1").await;
    let connection = laptop.call("a").await;
    let (send, recv) = stream::open(&connection, dial(7)).await.unwrap();
    let (tell, mut at) = tokio::sync::watch::channel(0);
    let len = 40 << 20;
    let transfer = tokio::spawn(exchange(send, recv, len, move |bytes| {
        tell.send_replace(bytes);
    }));
    for cut in 1..=3 {
        at.wait_for(|at| *at >= cut * len / 5).await.unwrap();
        // The pipe dies under way, whatever was in it is lost, and for a while there is none.
        drop(laptop.pipe);
        let stalled = *at.borrow_and_update();
        tokio::time::sleep(Duration::from_millis(200 * cut as u64)).await;
        assert!(*at.borrow() <= stalled + (4 << 20), "only what had arrived goes on");
        let pipe = world.pipe().await;
        let start = Instant::now();
        laptop.pipe = laptop.endpoint.attach_pipe(&world.relay_identity, pipe);
        let resumed = *at.borrow_and_update();
        at.wait_for(|at| *at > resumed + (1 << 20)).await.unwrap();
        eprintln!("resumed after {:?}", start.elapsed());
    }
    tokio::time::timeout(PATIENCE, transfer).await.expect("in time").unwrap();
    assert_eq!(connection.close_reason(), None);
}

#[tokio::test]
async fn a_pipe_that_dies_says_why() {
    let world = world().await;
    let (near, far) = tokio::io::duplex(1 << 16);
    let laptop = world.laptop_over("l1", near);
    drop(far);
    assert!(matches!(laptop.pipe.await, PipeEnd::Closed | PipeEnd::Io(_)));
    let (near, mut far) = tokio::io::duplex(1 << 16);
    let hostile = laptop.endpoint.attach_pipe(&world.relay_identity, near);
    far.write_all(&[0, 0]).await.unwrap();
    assert!(matches!(hostile.await, PipeEnd::EmptyFrame));
    let older = laptop.endpoint.attach_pipe(&world.relay_identity, world.pipe().await);
    let _newer = laptop.endpoint.attach_pipe(&world.relay_identity, world.pipe().await);
    assert!(matches!(older.await, PipeEnd::GivenUp));
}

#[tokio::test]
async fn a_laptop_reaches_only_agents_that_registered_it() {
    let world = world().await;
    let agent = world.agent("a", only(&["l1"]));
    let (friend, stranger) = (world.laptop("l1").await, world.laptop("l2").await);
    friend.sees(&["a"]).await;
    let gateway = world.agent("g", Register { any_laptop: true, laptops: vec![] });
    stranger.sees(&["g"]).await;
    friend.sees(&["a", "g"]).await;

    let not_allowed = world.relay.dropped(Dropped::NotAllowed);
    let target = agent_identity("a");
    let mut call = std::pin::pin!(stranger.endpoint.connect(&target));
    until(|| world.relay.dropped(Dropped::NotAllowed) > not_allowed, &mut call).await;

    // It was not the stranger's packets that the agent got, if any.
    let connection = friend.endpoint.connect(&agent_identity("a")).await.unwrap();
    let (_, caller) = agent.accept().await.unwrap();
    assert_eq!(caller, laptop_identity("l1"));
    assert_eq!(connection.close_reason(), None);

    // The agent changes its mind.
    agent.register(only(&["l2"]));
    friend.sees(&["g"]).await;
    stranger.sees(&["a", "g"]).await;
    let _stranger = stranger.endpoint.connect(&target).await.unwrap();
    assert_eq!(agent.accept().await.unwrap().1, laptop_identity("l2"));
    drop(gateway);
    stranger.sees(&["a"]).await;
}

#[tokio::test]
async fn an_agent_hears_within_seconds_that_a_laptop_is_gone_and_that_it_is_back() {
    let world = world().await;
    let agent = world.agent("a", only(&["l1", "l2"]));
    let mut there = agent.laptops();
    let mut laptop = world.laptop("l1").await;
    let l1 = BTreeSet::from(["l1".to_owned()]);
    there.wait_for(|there| *there == l1).await.unwrap();
    // Only the pipe is cut, as when the machine sleeps or the port-forward dies.
    drop(laptop.pipe);
    tokio::time::timeout(PATIENCE, there.wait_for(BTreeSet::is_empty)).await.expect("in time").unwrap();
    laptop.pipe = laptop.endpoint.attach_pipe(&world.relay_identity, world.pipe().await);
    tokio::time::timeout(PATIENCE, there.wait_for(|there| *there == l1)).await.expect("in time").unwrap();
    laptop.endpoint.close("enough").await;
    tokio::time::timeout(PATIENCE, there.wait_for(BTreeSet::is_empty)).await.expect("in time").unwrap();
}

#[tokio::test]
async fn connections_outlive_the_relay() {
    let mut world = world().await;
    tokio::spawn(echo(world.agent("a", only(&["l1"]))));
    let mut laptop = world.laptop("l1").await;
    let connection = laptop.call("a").await;
    let (mut send, mut recv) = stream::open(&connection, dial(7)).await.unwrap();
    send.write_all(b"before").await.unwrap();
    let mut echoed = [0; 6];
    recv.read_exact(&mut echoed).await.unwrap();

    let addr = world.relay.udp_addr();
    world.relay.close().await;
    assert!(matches!((&mut laptop.pipe).await, PipeEnd::Closed | PipeEnd::Io(_)));
    send.write_all(b"during").await.unwrap();
    // The old one lets go of its port as its last task ends.
    let udp = loop {
        match std::net::UdpSocket::bind(addr) {
            Ok(udp) => break udp,
            Err(_) => tokio::time::sleep(Duration::from_millis(5)).await,
        }
    };
    let tcp = TcpListener::bind("127.0.0.1:0").await.unwrap();
    world.pipes_at = tcp.local_addr().unwrap();
    world.relay = Relay::start(&credentials(&world.authority, &world.relay_identity), udp, tcp).unwrap();
    laptop.pipe = laptop.endpoint.attach_pipe(&world.relay_identity, world.pipe().await);
    tokio::time::timeout(PATIENCE, recv.read_exact(&mut echoed)).await.expect("in time").unwrap();
    assert_eq!(&echoed, b"during");
    assert_eq!(connection.close_reason(), None);
}

#[tokio::test]
async fn a_relay_of_another_authority_is_not_believed() {
    let (ours, theirs) = (world().await, world().await);
    let laptop = ours.laptop_over("l1", theirs.pipe().await);
    let agent = ours.agent("a", Register { any_laptop: true, laptops: vec![] });
    agent.set_relays(&[theirs.relay.udp_addr()]).unwrap();
    for mut problem in [laptop.client.problem(), agent.relay_problem(theirs.relay.udp_addr()).unwrap()] {
        let seen = problem.wait_for(|problem| problem.contains("invalid peer certificate"));
        tokio::time::timeout(PATIENCE, seen).await.expect("in time").unwrap();
    }
    assert_eq!(theirs.relay.parties(), 0);
}

#[tokio::test]
async fn the_relay_lets_in_nobody_with_a_certificate_of_another_authority_or_without_one() {
    let world = world().await;
    let client = quinn::Endpoint::client("127.0.0.1:0".parse().unwrap()).unwrap();
    for wanted in [None, Some(laptop_identity("l1")), Some(agent_identity("a"))] {
        let mut roots = rustls::RootCertStore::empty();
        roots.add(world.authority.certificate().clone()).unwrap();
        let provider = std::sync::Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let builder = rustls::ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .unwrap()
            .with_root_certificates(roots);
        let mut tls = match wanted {
            None => builder.with_no_client_auth(),
            Some(identity) => {
                let (key, forger) = (KeyPair::generate().unwrap(), Authority::create().unwrap());
                let csr = key.request(&identity).unwrap();
                let chain = forger.sign(&csr.der, &identity, Duration::from_secs(60)).unwrap();
                use rustls::pki_types::pem::PemObject;
                let key = rustls::pki_types::PrivateKeyDer::from_pem_slice(key.to_pem().as_bytes()).unwrap();
                builder.with_client_auth_cert(chain.0, key).unwrap()
            }
        };
        tls.alpn_protocols = forkd_wire::ALPN_RELAY.iter().map(|alpn| alpn.to_vec()).collect();
        let crypto = quinn::crypto::rustls::QuicClientConfig::try_from(tls).unwrap();
        let config = quinn::ClientConfig::new(std::sync::Arc::new(crypto));
        let name = forkd_tunnel::identity::ANY_RELAY;
        // In TLS 1.3 the client is done before the server has looked at its certificate.
        if let Ok(connection) = client.connect_with(config, world.relay.udp_addr(), name).unwrap().await {
            let reason = connection.closed().await;
            assert!(matches!(reason, quinn::ConnectionError::ConnectionClosed(_)), "{reason}");
        }
    }
    assert_eq!(world.relay.parties(), 0);
}

#[tokio::test]
async fn an_agent_is_only_who_its_certificate_says() {
    let world = world().await;
    let agent = world.agent("a", only(&["l1"]));
    let laptop = world.laptop("l1").await;
    laptop.sees(&["a"]).await;
    let Identity::Agent { pod_uid, pod, role, .. } = agent_identity("a") else { panic!() };
    // The same id, so the packets get there; but the certificate says another namespace.
    let wanted = Identity::Agent { pod_uid, namespace: "prod".to_owned(), pod, role };
    match laptop.endpoint.connect(&wanted).await {
        Err(EndpointError::Identity(IdentityError::WrongPeer { found, .. })) => {
            assert_eq!(found, agent_identity("a").uri());
        }
        other => panic!("{other:?}"),
    }
    drop(agent);
}

#[tokio::test]
async fn an_agent_that_restarts_is_found_again() {
    let world = world().await;
    let first = world.agent("a", only(&["l1"]));
    let laptop = world.laptop("l1").await;
    let connection = laptop.call("a").await;
    first.accept().await.unwrap();
    first.close("restarting").await;
    drop(first);
    assert!(matches!(connection.closed().await, quinn::ConnectionError::ApplicationClosed(_)));
    laptop.sees(&[]).await;
    tokio::spawn(echo(world.agent("a", only(&["l1"]))));
    let again = laptop.call("a").await;
    stream::open(&again, dial(7)).await.unwrap();
}

#[tokio::test]
async fn what_an_opener_no_longer_waits_for_is_known_to_the_other_side() {
    let world = world().await;
    let agent = world.agent("a", only(&["l1"]));
    let laptop = world.laptop("l1").await;
    let connection = laptop.call("a").await;
    let (far, _) = agent.accept().await.unwrap();
    let opening = tokio::spawn({
        let connection = connection.clone();
        async move { stream::open(&connection, dial(7)).await }
    });
    let (send, recv) = far.accept_bi().await.unwrap();
    let (open, accepting) = stream::accept(send, recv).await.unwrap();
    assert_eq!(open, dial(7));
    opening.abort();
    tokio::time::timeout(PATIENCE, accepting.cancelled()).await.expect("in time");
    assert!(matches!(accepting.refuse(Outcome::TimedOut, "").await, Err(AcceptError::Abandoned)));

    // The other way round: dropped without an answer.
    let opening = tokio::spawn(async move { stream::open(&connection, dial(7)).await });
    let (send, recv) = far.accept_bi().await.unwrap();
    drop(stream::accept(send, recv).await.unwrap());
    match opening.await.unwrap() {
        Err(OpenError::Reset(code)) => assert_eq!(code, stream::code(Reset::Cancelled)),
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn first_bytes_that_are_no_message_reset_the_stream_and_raw_bytes_after_one_are_kept() {
    let world = world().await;
    let agent = world.agent("a", only(&["l1"]));
    let laptop = world.laptop("l1").await;
    let connection = laptop.call("a").await;
    let (far, _) = agent.accept().await.unwrap();
    for first in [&[0xff; 11][..], &[0x80, 0x80, 0x40, 0], &[3, 0xff, 0xff, 0xff]] {
        let (mut send, _recv) = connection.open_bi().await.unwrap();
        send.write_all(first).await.unwrap();
        let (theirs, recv) = far.accept_bi().await.unwrap();
        assert!(matches!(stream::accept(theirs, recv).await, Err(AcceptError::Protocol(_))));
        assert_eq!(send.stopped().await.unwrap(), Some(stream::code(Reset::Protocol)));
    }
    let (mut send, _recv) = connection.open_bi().await.unwrap();
    let mut bytes = bytes::BytesMut::new();
    forkd_wire::encode_delimited(&dial(80), &mut bytes);
    bytes.extend_from_slice(b"GET / HTTP/1.1");
    send.write_all(&bytes).await.unwrap();
    let (theirs, recv) = far.accept_bi().await.unwrap();
    let (open, accepting) = stream::accept(theirs, recv).await.unwrap();
    let (_theirs, mut recv) = accepting.ok().await.unwrap();
    let mut raw = [0; 14];
    recv.read_exact(&mut raw).await.unwrap();
    assert_eq!((open, &raw), (dial(80), b"GET / HTTP/1.1"));
}

#[tokio::test]
async fn a_thousand_streams_live_side_by_side() {
    let world = world().await;
    tokio::spawn(echo(world.agent("a", only(&["l1"]))));
    let laptop = world.laptop("l1").await;
    let connection = laptop.call("a").await;
    let mut streams = Vec::new();
    for _ in 0..1000 {
        streams.push(stream::open(&connection, dial(7)).await.unwrap());
    }
    let echoes = streams.into_iter().map(|(send, recv)| exchange(send, recv, 3000, |_| ()));
    tokio::time::timeout(PATIENCE, futures::future::join_all(echoes)).await.expect("in time");
}
